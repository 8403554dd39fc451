"""The index of event ids: verdicts, growth, memory, and agreement with a plain model of the log."""

import mmap
import random

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tallymark_store.dedup import (
    CONFLICT,
    DUPLICATE,
    LOOK_UP_AND_REMEMBER,
    LOOK_UP_ONLY,
    DedupIndex,
    TableFullError,
    warm_up,
)
from tallymark_store.dedup.index import ENTRY_DTYPE, SHARD_COUNT


def columns(rows):
    """(lo, hi, fingerprint) rows as three uint64 arrays."""
    table = np.array(rows, dtype=np.uint64).reshape(-1, 3)
    return tuple(np.ascontiguousarray(table[:, i]) for i in range(3))


def judge(index, rows, base, floor=0, wants=None):
    """Judge (lo, hi, fingerprint) rows; return [(verdict, original)], (0, -1) where nothing was written."""
    lo, hi, fingerprint = columns(rows)
    wanted = np.ones(len(rows), dtype=np.uint8) if wants is None else np.array(wants, dtype=np.uint8)
    verdict = np.zeros(len(rows), dtype=np.uint8)
    original = np.full(len(rows), -1, dtype=np.int64)
    index.judge(lo, hi, fingerprint, wanted, base, floor, verdict, original)
    return list(zip(verdict.tolist(), original.tolist(), strict=True))


def random_columns(seed, n):
    table = np.random.default_rng(seed).integers(0, 2**64, (3, n), dtype=np.uint64)
    return table[0].copy(), table[1].copy(), table[2].copy()


def held(index, low=0, high=2**62):
    """Every entry in the index, as a sorted list of tuples."""
    return sorted(row for shard in range(SHARD_COUNT) for row in index.entries(shard, low, high).tolist())


def test_new_duplicate_conflict_across_and_within_batches():
    """A first id is new; a repeat is judged by its fingerprint, also inside one batch, and names the original."""
    index = DedupIndex()
    assert judge(index, [(1, 2, 7), (1, 3, 7), (1, 2, 7), (1, 2, 8)], base=10) == [
        (0, -1),
        (0, -1),
        (DUPLICATE, 10),
        (CONFLICT, 10),
    ]
    assert judge(index, [(1, 3, 7), (2, 2, 0), (1, 2, 8)], base=14) == [
        (DUPLICATE, 11),
        (0, -1),
        (CONFLICT, 10),
    ]
    assert len(index) == 3


def test_events_that_want_nothing_are_neither_judged_nor_remembered():
    """An event without id, or rejected before, leaves no trace and its outputs untouched."""
    index = DedupIndex()
    assert judge(index, [(5, 5, 1), (5, 5, 1)], base=0, wants=[0, 1]) == [(0, -1), (0, -1)]
    assert held(index) == [(5, 5, 1, 1)]


def test_an_event_that_is_only_looked_up_is_never_remembered():
    """What will be rejected anyway is still told apart from a repeat, and leaves the id free."""
    index = DedupIndex()
    judge(index, [(1, 1, 1)], base=0)
    rows = [(1, 1, 1), (1, 1, 2), (5, 5, 1), (5, 5, 2), (5, 5, 3)]
    answers = judge(index, rows, base=10, wants=[LOOK_UP_ONLY] * 3 + [LOOK_UP_AND_REMEMBER, LOOK_UP_ONLY])
    assert answers == [(DUPLICATE, 0), (CONFLICT, 0), (0, -1), (0, -1), (CONFLICT, 13)]
    assert held(index) == [(1, 1, 1, 0), (5, 5, 2, 13)]


def test_all_zero_and_all_one_keys_are_ordinary():
    """No key, fingerprint or offset 0 is mistaken for an empty slot."""
    top = 2**64 - 1
    index = DedupIndex()
    rows = [(0, 0, 0), (top, top, top), (0, top, 0), (top, 0, 0)]
    assert judge(index, rows, base=0) == [(0, -1)] * 4
    assert judge(index, rows, base=4) == [(DUPLICATE, i) for i in range(4)]


def test_the_floor_is_inclusive():
    """An entry at the floor is live; one below has left the window and its id is new again."""
    index = DedupIndex()
    judge(index, [(1, 1, 1), (2, 2, 2)], base=99)
    assert judge(index, [(1, 1, 1), (2, 2, 2)], base=200, floor=100) == [(0, -1), (DUPLICATE, 100)]
    assert judge(index, [(1, 1, 9)], base=202, floor=100) == [(CONFLICT, 200)]


def test_truncation_brings_back_what_a_truncated_record_had_pushed_out_of_the_window():
    """An uncommitted record's floor is gone with it: the older entry counts again (DEDUP-1)."""
    index = DedupIndex()
    judge(index, [(1, 1, 1)], base=10)
    assert judge(index, [(1, 1, 1)], base=50, floor=20) == [(0, -1)]
    assert index.truncate(50) == 1
    assert judge(index, [(1, 1, 1)], base=50, floor=10) == [(DUPLICATE, 10)]


def test_truncate_is_exclusive_of_the_log_end_and_keeps_probe_chains():
    """Entries at the log end go, those below stay findable behind the ones that went."""
    index = DedupIndex(salt=9)
    lo, hi, fingerprint = random_columns(1, 5_000)
    index.apply(lo, hi, fingerprint, np.arange(5_000))
    assert index.truncate(2_000) == 3_000
    assert index.truncate(2_000) == 0
    verdict = np.zeros(5_000, dtype=np.uint8)
    original = np.full(5_000, -1, dtype=np.int64)
    index.judge(lo, hi, fingerprint, np.ones(5_000, dtype=np.uint8), 2_000, 0, verdict, original)
    assert verdict.tolist() == [DUPLICATE] * 2_000 + [0] * 3_000
    assert original[:2_000].tolist() == list(range(2_000))
    assert len(held(index)) == 5_000


def test_apply_is_idempotent_and_agrees_with_judge():
    """A follower that applies the accepted events, twice and in pieces, has the leader's state."""
    leader, follower = DedupIndex(salt=1), DedupIndex(salt=2)
    lo, hi, fingerprint = random_columns(2, 3_000)
    lo[1_000:1_500] = lo[:500]
    hi[1_000:1_500] = hi[:500]
    verdict = np.zeros(3_000, dtype=np.uint8)
    leader.judge(
        lo, hi, fingerprint, np.ones(3_000, dtype=np.uint8), 70, 0, verdict, np.zeros(3_000, dtype=np.int64)
    )
    assert (verdict == CONFLICT).sum() == 500
    kept = verdict == 0
    offsets = np.arange(70, 3_070)[kept]
    for part in (slice(0, 900), slice(500, None), slice(None)):
        follower.apply(lo[kept][part], hi[kept][part], fingerprint[kept][part], offsets[part])
    assert follower.digest(0, 3_070) == leader.digest(0, 3_070)
    assert len(follower) == len(leader) == 2_500
    assert follower.digest(0, 3_069) != leader.digest(0, 3_070)


def test_entries_are_exact_as_of_an_offset_while_ingest_goes_on():
    """Shards read between appends yield the state as of the checkpoint's offset, and loading gives it back."""
    index = DedupIndex(salt=3)
    lo, hi, fingerprint = random_columns(3, 20_000)
    index.apply(lo[:8_000], hi[:8_000], fingerprint[:8_000], np.arange(8_000))
    parts = []
    for shard in range(SHARD_COUNT):
        more = slice(8_000 + shard * 150, 8_150 + shard * 150)
        index.apply(lo[more], hi[more], fingerprint[more], np.arange(more.start, more.stop))
        parts.append(index.entries(shard, 100, 8_000))
    entries = np.concatenate(parts)
    assert sorted(entries["offset"].tolist()) == list(range(100, 8_000))
    restored = DedupIndex(salt=4)
    restored.load(np.frombuffer(entries.tobytes(), dtype=ENTRY_DTYPE))
    assert restored.digest(100, 8_000) == index.digest(100, 8_000)
    assert restored.digest(0, 2**40) == restored.digest(100, 8_000)
    by_offset = {row[3]: row[:3] for row in entries.tolist()}
    assert by_offset[100] == (int(lo[100]), int(hi[100]), int(fingerprint[100]))


def test_read_only_and_strided_columns_are_taken():
    """Columns cut out of a received buffer work like any other."""
    table = np.arange(30, dtype=np.uint64).reshape(10, 3)
    table.flags.writeable = False
    index = DedupIndex()
    index.apply(table[:, 0], table[:, 1], table[:, 2], np.arange(10))
    verdict = np.zeros(10, dtype=np.uint8)
    original = np.zeros(10, dtype=np.int64)
    index.judge(table[:, 0], table[:, 1], table[:, 2], np.ones(10, dtype=np.uint8), 10, 0, verdict, original)
    assert verdict.tolist() == [DUPLICATE] * 10
    assert original.tolist() == list(range(10))


def test_sweep_drops_spent_entries_bit_by_bit_and_gives_memory_back():
    """A sweep reads only the shards it may; a whole round leaves the window's entries and little memory."""
    index = DedupIndex(salt=5)
    lo, hi, fingerprint = random_columns(4, 200_000)
    index.apply(lo, hi, fingerprint, np.arange(200_000))
    before = index.memory_bytes
    live = index.digest(190_000, 200_000)
    first = index.sweep(190_000, 4)
    assert 4 / SHARD_COUNT * 190_000 * 0.9 < first < 4 / SHARD_COUNT * 190_000 * 1.1
    total = first + index.sweep(190_000, 1_000)
    assert total == 190_000
    assert len(index) == 10_000
    assert index.memory_bytes < before / 4
    assert index.digest(0, 200_000) == live
    verdict = np.zeros(200_000, dtype=np.uint8)
    index.judge(
        lo,
        hi,
        fingerprint,
        np.ones(200_000, dtype=np.uint8),
        200_000,
        190_000,
        verdict,
        np.zeros(200_000, dtype=np.int64),
    )
    assert verdict.tolist() == [0] * 190_000 + [DUPLICATE] * 10_000


def test_a_sliding_window_neither_grows_nor_forgets():
    """Spent slots are used again: memory stays that of one window however many ids pass through."""
    index = DedupIndex(salt=6)
    window = 20_000
    peak = 0
    for step in range(40):
        base = step * 5_000
        floor = max(0, base - window)
        lo, hi, fingerprint = random_columns(100 + step, 5_000)
        verdict = np.zeros(5_000, dtype=np.uint8)
        original = np.zeros(5_000, dtype=np.int64)
        index.judge(lo, hi, fingerprint, np.ones(5_000, dtype=np.uint8), base, floor, verdict, original)
        assert not verdict.any()
        index.sweep(floor, 16)
        peak = max(peak, index.memory_bytes)
        if base >= window:
            old = random_columns(100 + step - 4, 5_000)
            index.judge(*old, np.ones(5_000, dtype=np.uint8), base + 5_000, base - 20_000, verdict, original)
            assert (verdict == DUPLICATE).all()
            assert original.tolist() == list(range(base - 20_000, base - 15_000))
    assert peak < 48 * (window + 5_000) * 1.5 + SHARD_COUNT * 4_096


def resident_bytes(table):
    """Memory that the kernel counts for exactly this range: its pages that are in memory or swapped out."""
    first = table.ctypes.data // mmap.PAGESIZE
    count = -(-table.nbytes // mmap.PAGESIZE)
    pages = 0
    with open("/proc/self/pagemap", "rb", buffering=0) as entries:
        entries.seek(first * 8)
        while count > 0:
            # A page's entry: bit 63 present, bit 62 swapped (Documentation/admin-guide/mm/pagemap.rst).
            words = np.frombuffer(entries.read(min(count, 1 << 17) * 8), dtype=np.uint64)
            pages += int(np.count_nonzero(words >> np.uint64(62)))
            count -= len(words)
    return pages * mmap.PAGESIZE


def test_memory_per_id_stays_below_48_bytes_at_every_size():
    """From 100,000 ids on, counted after each of many appends; and the kernel's own count agrees."""
    index = DedupIndex(salt=7)
    step = 7_000
    for i in range(60):
        lo, hi, fingerprint = random_columns(i, step)
        index.apply(lo, hi, fingerprint, np.arange(i * step, i * step + step))
        if len(index) >= 100_000:
            assert index.memory_bytes <= 48 * len(index)
    resident = resident_bytes(index._arena.table)
    assert 0 < resident <= 48 * len(index)


def test_a_full_table_takes_nothing_of_the_batch():
    """Where the reserved range ends, judge raises and what was there before is untouched."""
    index = DedupIndex(slots_max=64 * 256)
    lo, hi, fingerprint = random_columns(8, 100_000)
    index.apply(lo[:5_000], hi[:5_000], fingerprint[:5_000], np.arange(5_000))
    before = held(index)
    verdict = np.zeros(95_000, dtype=np.uint8)
    with pytest.raises(TableFullError):
        index.judge(
            lo[5_000:],
            hi[5_000:],
            fingerprint[5_000:],
            np.ones(95_000, dtype=np.uint8),
            5_000,
            0,
            verdict,
            np.zeros(95_000, dtype=np.int64),
        )
    assert held(index) == before


def test_the_layout_shows_in_nothing():
    """Two indexes with other salts, sizes and histories hold the same entries and the same digest."""
    lo, hi, fingerprint = random_columns(9, 6_000)
    a, b = DedupIndex(salt=1), DedupIndex(salt=2**64 - 1)
    a.apply(lo, hi, fingerprint, np.arange(6_000))
    b.reserve(200_000)
    order = np.random.default_rng(0).permutation(6_000)
    b.apply(lo[order], hi[order], fingerprint[order], order.astype(np.int64))
    assert held(a) == held(b)
    assert a.digest(10, 5_990) == b.digest(10, 5_990)
    assert a.digest(10, 5_990) != a.digest(11, 5_990)


def test_an_empty_batch_and_an_empty_index():
    """Nothing in, nothing out."""
    index = DedupIndex()
    assert judge(index, [], base=0) == []
    assert held(index) == []
    assert index.digest(0, 10) == 0
    assert index.truncate(0) == 0
    assert index.sweep(5, 64) == 0


def test_warm_up_runs_every_kernel():
    """It needs no arguments and can be called again."""
    warm_up()
    warm_up()


class Model:
    """The log as a list of accepted ids, and nothing cleverer."""

    def __init__(self):
        self.log = []  # (key, fingerprint) or None, by offset

    def judge(self, rows, floor):
        answers = []
        for key, fingerprint in rows:
            match = [
                i for i in range(floor, len(self.log)) if self.log[i] is not None and self.log[i][0] == key
            ]
            assert len(match) <= 1
            if match:
                same = self.log[match[0]][1] == fingerprint
                answers.append((DUPLICATE if same else CONFLICT, match[0]))
                self.log.append(None)
            else:
                answers.append((0, -1))
                self.log.append((key, fingerprint))
        return answers


step = st.one_of(
    st.tuples(
        st.just("append"),
        st.lists(st.tuples(st.integers(0, 12), st.integers(0, 1)), max_size=8),
        st.integers(0, 5),
    ),
    st.tuples(st.just("truncate"), st.integers(0, 12), st.just(0)),
    st.tuples(st.just("commit"), st.integers(0, 8), st.just(0)),
    st.tuples(st.just("restart"), st.just(0), st.just(0)),
)


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(step, max_size=40))
def test_any_history_agrees_with_the_model(steps):
    """Appends, truncations that take the floor back, sweeps and restarts, in any order (DEDUP-1)."""
    index, model = DedupIndex(slots_max=2**13), Model()
    floors = [0]  # by offset: the floor in force as of a log of this length; never decreases
    committed = 0
    salts = random.Random(0)
    for kind, argument, rise in steps:
        end = len(model.log)
        if kind == "append":
            floor = min(end, floors[-1] + rise)
            rows = [(key % 3, key, fingerprint) for key, fingerprint in argument]
            assert judge(index, rows, base=end, floor=floor) == model.judge(argument, floor)
            floors += [floor] * len(argument)
        elif kind == "truncate":
            end = max(committed, end - argument)
            index.truncate(end)
            del model.log[end:]
            del floors[end + 1 :]
        elif kind == "commit":
            committed = min(end, committed + argument)
            index.sweep(floors[committed], argument * 16)
        else:
            parts = [index.entries(shard, floors[committed], end) for shard in range(SHARD_COUNT)]
            fresh = DedupIndex(salt=salts.getrandbits(64), slots_max=2**13)
            fresh.sweep(floors[committed], 0)
            for part in parts:
                fresh.load(part)
            index = fresh
        expected = sorted(
            (entry[0] % 3, entry[0], entry[1], offset)
            for offset, entry in enumerate(model.log)
            if entry is not None and offset >= floors[-1]
        )
        assert held(index, low=floors[-1]) == expected
