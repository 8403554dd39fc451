"""Producer windows: verdicts on repeated chunks, against a model that keeps the whole log."""

import random

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tallymark_protocol.limits import CHUNK_RETRY_NS_MAX, PRODUCER_RETENTION_NS, PRODUCER_WINDOW
from tallymark_store.dedup import NEW, REPEAT, REUSED, UNKNOWN, ProducerWindows, TableFullError
from tallymark_store.dedup.producer_kernels import SHARD_COUNT
from tallymark_store.dedup.producers import ENTRY_DTYPE

MINUTE = 60 * 10**9
START = 1_700_000_000 * 10**9
W = PRODUCER_WINDOW


def judge(windows, chunks, now, base):
    """Judge (producer, sequence, checksum, count, first_sent) tuples; return [(verdict, first offset, record)]."""
    n = len(chunks)
    producer, sequence, checksum, count, first_sent = zip(*chunks, strict=True) if chunks else ((),) * 5
    verdict = np.full(n, 99, dtype=np.uint8)
    first_offset = np.full(n, 99, dtype=np.int64)
    original_base = np.full(n, 99, dtype=np.int64)
    windows.judge_chunks(
        np.array(producer, dtype=np.uint64),
        np.array(sequence, dtype=np.uint64),
        np.array(checksum, dtype=np.uint32),
        np.array(first_sent, dtype=np.int64),
        np.array(count, dtype=np.uint32),
        now,
        base,
        verdict,
        first_offset,
        original_base,
    )
    return list(zip(verdict.tolist(), first_offset.tolist(), original_base.tolist(), strict=True))


def insert(windows, chunks, answers, base, now):
    """Insert the chunks that were judged new."""
    new = [(chunk, answer) for chunk, answer in zip(chunks, answers, strict=True) if answer[0] == NEW]
    windows.insert(
        np.array([chunk[0] for chunk, _ in new], dtype=np.uint64),
        np.array([chunk[1] for chunk, _ in new], dtype=np.uint64),
        np.array([chunk[2] for chunk, _ in new], dtype=np.uint32),
        np.array([chunk[3] for chunk, _ in new], dtype=np.uint32),
        np.array([answer[1] for _, answer in new], dtype=np.int64),
        base,
        now,
    )


def append(windows, chunks, now, base):
    answers = judge(windows, chunks, now, base)
    insert(windows, chunks, answers, base, now)
    return answers


def clean(windows):
    """Drop whatever may be dropped, as growth does now and then."""
    for shard in range(SHARD_COUNT):
        windows._rebuild(shard)


def test_new_repeat_and_reused():
    """A repeat gets the first outcome's place; other content under the same sequence is an error."""
    windows = ProducerWindows()
    chunks = [(7, 1, 0xAA, 10, START), (7, 2, 0xBB, 5, START), (8, 1, 0xCC, 1, START)]
    assert append(windows, chunks, START, 100) == [(NEW, 100, 100), (NEW, 110, 100), (NEW, 115, 100)]
    again = [(7, 2, 0xBB, 5, START), (7, 2, 0xBC, 5, START), (7, 2, 0xBB, 6, START), (7, 3, 1, 4, START)]
    assert judge(windows, again, START + MINUTE, 116) == [
        (REPEAT, 110, 100),
        (REUSED, 110, 100),
        (REUSED, 110, 100),
        (NEW, 116, 116),
    ]


def test_a_repeat_within_one_append():
    """The second copy in one call refers to the first one's offsets, and only new chunks take offsets."""
    windows = ProducerWindows()
    chunks = [(1, 1, 5, 3, START), (1, 1, 5, 3, START), (1, 2, 5, 4, START), (1, 1, 6, 3, START)]
    assert judge(windows, chunks, START, 50) == [
        (NEW, 50, 50),
        (REPEAT, 50, 50),
        (NEW, 53, 50),
        (REUSED, 50, 50),
    ]


def test_judging_changes_nothing():
    """Judged and backed out: the same chunks are new again, and the digest is as before."""
    windows = ProducerWindows()
    append(windows, [(1, 1, 1, 1, START), (2, 2_000, 1, 1, START)], START, 0)
    before = (windows.digest(9, START), len(windows), windows.entries(9).tolist())
    chunks = [(p, s, 1, 1, START) for p in range(300) for s in (2_001, 9_000, 1)]
    first = judge(windows, chunks, START + 1, 2)
    assert (windows.digest(9, START), len(windows), windows.entries(9).tolist()) == before
    assert judge(windows, chunks, START + 1, 2) == first
    assert judge(windows, [(1, 1, 1, 1, START)], START + 1, 2) == [(REPEAT, 0, 0)]


def test_the_window_edge():
    """Sequences down to highest - window + 1 are judged, the next lower is unknown, remembered or not."""
    windows = ProducerWindows()
    append(windows, [(1, 10, 1, 1, START), (1, 11, 1, 1, START)], START, 0)
    append(windows, [(1, 10 + W, 1, 1, START)], START, 2)
    chunks = [(1, 10, 1, 1, START), (1, 9, 1, 1, START), (1, 11, 1, 1, START), (1, 12, 1, 1, START)]
    verdicts = [answer[0] for answer in judge(windows, chunks, START, 3)]
    assert verdicts == [UNKNOWN, UNKNOWN, REPEAT, NEW]


def test_a_new_chunk_moves_the_window_within_its_own_append():
    """What an earlier chunk of the call pushes out is unknown to the later ones."""
    windows = ProducerWindows()
    append(windows, [(1, 5, 1, 1, START)], START, 0)
    chunks = [(1, 5, 1, 1, START), (1, 5 + W, 1, 1, START), (1, 5, 1, 1, START), (1, 6, 1, 1, START)]
    assert [answer[0] for answer in judge(windows, chunks, START, 1)] == [REPEAT, NEW, UNKNOWN, NEW]


def test_the_first_sending_bounds_what_may_be_new():
    """A chunk first sent longer ago than it may be retried is unknown unless it is remembered."""
    windows = ProducerWindows()
    late = START - CHUNK_RETRY_NS_MAX
    assert [
        answer[0] for answer in append(windows, [(1, 1, 1, 1, late), (1, 2, 1, 1, late - 1)], START, 0)
    ] == [
        NEW,
        UNKNOWN,
    ]
    later = START + PRODUCER_RETENTION_NS
    assert judge(windows, [(1, 1, 1, 1, late)], later, 1) == [(REPEAT, 0, 0)]
    assert judge(windows, [(1, 1, 1, 1, late)], later + 1, 1) == [(UNKNOWN, -1, -1)]
    assert judge(windows, [(1, 1, 1, 1, START + 10 * MINUTE)], START, 1) == [(REPEAT, 0, 0)]
    assert judge(windows, [(3, 1, 1, 1, 2**62)], START, 1) == [(NEW, 1, 1)]


def test_the_highest_that_has_expired_gives_way_to_the_next():
    """When the highest sequence was appended first, the window is that of the ones that are left."""
    windows = ProducerWindows()
    append(windows, [(1, 5_000, 1, 1, START)], START, 0)
    append(windows, [(1, 4_500, 1, 1, START)], START + 10 * MINUTE, 1)
    now = START + 21 * MINUTE
    edge = 4_500 - W
    chunks = [(1, edge, 1, 1, now), (1, edge + 1, 1, 1, now), (1, 4_500, 1, 1, now), (1, 5_000, 1, 1, now)]
    assert [answer[0] for answer in judge(windows, chunks, now, 2)] == [UNKNOWN, NEW, REPEAT, NEW]


def test_far_below_an_expired_highest():
    """An entry that became possible only because the highest had expired is found again."""
    windows = ProducerWindows()
    append(windows, [(1, 5_000, 1, 1, START)], START, 0)
    now = START + 21 * MINUTE
    assert append(windows, [(1, 10, 1, 1, now)], now, 1) == [(NEW, 1, 1)]
    clean(windows)
    assert judge(windows, [(1, 10, 1, 1, now), (1, 11, 1, 1, now)], now + MINUTE, 2) == [
        (REPEAT, 1, 1),
        (NEW, 2, 2),
    ]


def test_cleaning_keeps_an_entry_below_a_committed_highest_that_had_expired():
    """Found by the model: dropped as below the window, such a chunk would have been new again."""
    windows = ProducerWindows()
    append(windows, [(1, 0, 1, 1, START), (1, W, 1, 1, START)], START, 0)
    windows.advance(2, START)
    now = START + 21 * MINUTE
    assert append(windows, [(1, 0, 1, 1, now)], now, 2) == [(NEW, 2, 2)]
    clean(windows)
    assert judge(windows, [(1, 0, 1, 1, now)], now, 3) == [(REPEAT, 2, 2)]


def test_truncation_revives_what_the_truncated_record_had_pushed_out():
    """The window moves back with the log; a retry from before is a repeat again (DEDUP-1)."""
    windows = ProducerWindows()
    append(windows, [(1, 5, 1, 1, START)], START, 0)
    windows.advance(1, START)
    append(windows, [(1, 5 + W, 1, 1, START)], START + MINUTE, 1)
    clean(windows)
    assert judge(windows, [(1, 5, 1, 1, START)], START + MINUTE, 2)[0][0] == UNKNOWN
    windows.truncate(1)
    assert judge(windows, [(1, 5, 1, 1, START)], START + MINUTE, 1) == [(REPEAT, 0, 0)]


def test_truncation_takes_time_back():
    """What had expired by an uncommitted record's time only is still there after it is gone."""
    windows = ProducerWindows()
    append(windows, [(1, 5, 1, 1, START)], START, 0)
    windows.advance(1, START)
    append(windows, [(2, 1, 1, 1, START + 25 * MINUTE)], START + 25 * MINUTE, 1)
    clean(windows)
    windows.truncate(1)
    assert judge(windows, [(1, 5, 1, 1, START)], START + 2 * MINUTE, 1) == [(REPEAT, 0, 0)]


def test_what_is_dead_for_good_goes():
    """A busy producer takes the memory of one window, an idle one none."""
    windows = ProducerWindows()
    base = 0
    for step in range(100):
        now = START + step * 10**9
        chunks = [(1, step * 500 + i, 1, 1, now) for i in range(500)] + [(1_000 + step, 1, 1, 1, now)]
        assert {answer[0] for answer in append(windows, chunks, now, base)} == {NEW}
        base += len(chunks)
        windows.advance(base, now)
    clean(windows)
    assert len(windows) == W + 1 + 2 * 100
    assert len(windows.entries(base, now)) == W + 100
    windows.advance(base + 1, now + PRODUCER_RETENTION_NS + 1)
    clean(windows)
    assert len(windows) == 0
    assert len(windows.entries(base)) == 0


def test_inserting_twice_is_inserting_once():
    """Replaying records over a checkpoint that has them already changes nothing."""
    a, b = ProducerWindows(salt=1), ProducerWindows(salt=2)
    records = [[(p, s, p, 2, START) for p in range(20)] for s in range(40)]
    for i, chunks in enumerate(records):
        append(a, chunks, START + i, i * 40)
    b.load(a.entries(30 * 40))
    for i, chunks in enumerate(records[20:], start=20):
        answers = [(NEW, i * 40 + 2 * j, i * 40) for j in range(20)]
        insert(b, chunks, answers, i * 40, START + i)
    assert a.digest(1_600, START + 40) == b.digest(1_600, START + 40)
    assert len(a) == len(b)
    assert a.digest(1_600, START + 40) != a.digest(1_560, START + 40)


def test_entries_load_in_parts_in_any_order():
    """A checkpoint's entries give the same verdicts wherever and however they are loaded."""
    windows = ProducerWindows()
    append(windows, [(1, 5_000, 1, 1, START)], START, 0)
    append(windows, [(1, 4_500, 1, 1, START), (2, 1, 1, 1, START)], START + 10 * MINUTE, 1)
    entries = windows.entries(3)
    assert entries.dtype == ENTRY_DTYPE
    assert entries["first_offset"].tolist() == [0, 1, 2]
    other = ProducerWindows(salt=77)
    for part in (entries[2:], entries[1:2], entries[:1]):
        other.load(np.frombuffer(part.tobytes(), dtype=ENTRY_DTYPE))
    now = START + 21 * MINUTE
    chunks = [(1, s, 1, 1, now) for s in (3_476, 3_477, 4_500, 5_000)] + [(2, 1, 1, 1, START)]
    assert judge(other, chunks, now, 3) == judge(windows, chunks, now, 3)
    assert other.digest(3, now) == windows.digest(3, now)


def test_many_chunks_at_once_grow_the_table_while_judging():
    """A call larger than the table is judged whole and leaves nothing behind."""
    windows = ProducerWindows()
    chunks = [(1, s, 1, 1, START) for s in range(8_000)]
    answers = judge(windows, chunks, START, 0)
    assert answers == [(NEW, s, 0) for s in range(8_000)]
    assert len(windows) == 0
    insert(windows, chunks, answers, 0, START)
    repeats = judge(windows, chunks, START, 8_000)
    assert [answer[0] for answer in repeats] == [UNKNOWN] * (8_000 - W) + [REPEAT] * W


def test_a_full_table_says_so():
    """Where the reserved range ends, judging raises and changes nothing."""
    windows = ProducerWindows(slots_max=16 * 128)
    append(windows, [(1, 1, 1, 1, START)], START, 0)
    with pytest.raises(TableFullError):
        judge(windows, [(1, 10 + s, 1, 1, START) for s in range(5_000)], START, 1)
    assert judge(windows, [(1, 1, 1, 1, START)], START, 1) == [(REPEAT, 0, 0)]
    assert len(windows) == 2


def test_extreme_numbers():
    """Producer, sequence, checksum and count at the ends of their ranges."""
    windows = ProducerWindows()
    top, small = 2**64 - 1, 2**32 - 1
    chunks = [
        (0, 0, 0, 0, START),
        (top, top, small, small, START),
        (top, 0, 0, 1, START),
        (0, top, 1, 1, START),
    ]
    answers = append(windows, chunks, START, 0)
    assert [answer[0] for answer in answers] == [NEW, NEW, UNKNOWN, NEW]
    assert answers[3][1] == small
    repeats = judge(windows, chunks, START, small + 1)
    assert [answer[0] for answer in repeats] == [UNKNOWN, REPEAT, UNKNOWN, REPEAT]
    assert judge(windows, [], START, small + 1) == []


class Model:
    """The whole log, and the rules applied to it from scratch."""

    def __init__(self):
        self.records = []  # (base, append_ns, [(producer, sequence, checksum, count, first_offset)])

    def end(self):
        return self.records[-1][0] + sum(chunk[3] for chunk in self.records[-1][2]) + 1 if self.records else 0

    def last_ns(self):
        return self.records[-1][1] if self.records else START

    def live(self, now, extra):
        entries = [
            (chunk, base)
            for base, append_ns, chunks in [*self.records, extra]
            for chunk in chunks
            if append_ns >= now - PRODUCER_RETENTION_NS
        ]
        highest = {}
        for chunk, _ in entries:
            highest[chunk[0]] = max(highest.get(chunk[0], 0), chunk[1])
        return [entry for entry in entries if entry[0][1] > highest[entry[0][0]] - W], highest

    def judge(self, chunks, now):
        base = offset = self.end()
        taken = []
        answers = []
        for producer, sequence, checksum, count, first_sent in chunks:
            live, highest = self.live(now, (base, now, taken))
            match = [entry for entry in live if entry[0][:2] == (producer, sequence)]
            assert len(match) <= 1
            if match:
                (_, _, old_checksum, old_count, first_offset), old_base = match[0]
                same = (old_checksum, old_count) == (checksum, count)
                answers.append((REPEAT if same else REUSED, first_offset, old_base))
            elif sequence <= highest.get(producer, -1) - W or first_sent < now - CHUNK_RETRY_NS_MAX:
                answers.append((UNKNOWN, -1, -1))
            else:
                answers.append((NEW, offset, base))
                taken.append((producer, sequence, checksum, count, offset))
                offset += count
        return answers, (base, now, taken)


# Around the window's edges, and far apart.
sequences = st.sampled_from([0, 1, 2, W - 1, W, W + 1, W + 2, 2 * W, 2 * W + 1, 5 * W])
step = st.one_of(
    st.tuples(
        st.sampled_from(["append", "append", "append", "back out"]),
        st.lists(
            st.tuples(
                st.integers(0, 2), sequences, st.integers(0, 1), st.integers(1, 3), st.integers(-3, 17)
            ),
            max_size=6,
        ),
        st.sampled_from([0, 1, 4, 5, 9, 11, 15, 16, 20, 21]),
    ),
    st.tuples(st.just("truncate"), st.integers(0, 4), st.just(0)),
    st.tuples(st.just("commit"), st.integers(0, 4), st.just(0)),
    st.tuples(st.sampled_from(["clean", "restart"]), st.just(0), st.just(0)),
)


def play(steps, *, honest):
    """Drive windows and model through one history; with honest clients, no chunk is ever new twice."""
    windows, model = ProducerWindows(slots_max=2**13), Model()
    committed = 0  # how many records
    first_sendings = {}
    clock = START
    salts = random.Random(0)
    for kind, argument, minutes in steps:
        if kind in ("append", "back out"):
            if honest:
                # Real time goes on through a truncation; leaders' clocks differ, here by up to a minute.
                clock += minutes * MINUTE
                now = max(model.last_ns(), clock - (MINUTE if minutes % 2 else 0))
            else:
                now = model.last_ns() + minutes * MINUTE
            chunks = []
            for producer, sequence, checksum, count, lag in argument:
                sent = now - lag * MINUTE
                if honest:
                    sent = first_sendings.setdefault((producer, sequence), sent)
                    checksum, count = 1, 1
                chunks.append((producer, sequence, checksum, count, sent))
            answers, record = model.judge(chunks, now)
            assert judge(windows, chunks, now, record[0]) == answers
            if honest:
                there = {chunk[:2] for _, _, old in model.records for chunk in old}
                assert not any(
                    answer[0] == NEW and chunk[:2] in there
                    for chunk, answer in zip(chunks, answers, strict=True)
                )
            if kind == "append":
                insert(windows, chunks, answers, record[0], now)
                model.records.append(record)
        elif kind == "truncate":
            keep = max(committed, len(model.records) - argument)
            del model.records[keep:]
            windows.truncate(model.end())
        elif kind == "commit":
            committed = min(len(model.records), committed + argument)
            if committed:
                base, append_ns, chunks = model.records[committed - 1]
                windows.advance(base + sum(chunk[3] for chunk in chunks) + 1, append_ns)
        elif kind == "clean":
            clean(windows)
        else:
            fresh = ProducerWindows(salt=salts.getrandbits(64), slots_max=2**13)
            entries = windows.entries(model.end())
            cut = salts.randrange(len(entries) + 1)
            fresh.load(entries[cut:])
            fresh.load(entries[:cut])
            windows = fresh
        now = model.last_ns()
        live, _ = model.live(now, (0, now, []))
        expected = sorted((*chunk, base) for chunk, base in live)
        columns = ["producer", "sequence", "checksum", "count", "first_offset", "record_base"]
        assert sorted(windows.entries(model.end(), now)[columns].tolist()) == expected


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(step, max_size=30))
def test_any_history_follows_the_rules(steps):
    """Whatever is appended, backed out, truncated, committed, cleaned and reloaded, the rules alone decide."""
    play(steps, honest=False)


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(step, max_size=30))
def test_no_chunk_is_new_twice(steps):
    """No chunk in the log is judged new again (DEDUP-1).

    That holds while a first sending is dated at most R - CHUNK_RETRY_NS_MAX (5 minutes) after the append time of the
    record: here a client's clock runs up to 3 minutes ahead, and a leader's up to 1 minute behind another's.
    """
    play(steps, honest=True)
