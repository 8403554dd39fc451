"""Event ids in files: found like those in memory, merged without loss, and damage never makes an id new (DEDUP-1)."""

import itertools
import random

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tallymark_runtime.disk import MemoryDisk
from tallymark_store.dedup import (
    CONFLICT,
    DUPLICATE,
    LOOK_UP_ONLY,
    DedupIndex,
    IdFileError,
    IdMerge,
    TableFullError,
    file_kernels,
    open_id_file,
    write_id_file,
)
from tallymark_store.dedup.id_file import ENTRY_DTYPE, PAGE_BYTES
from tallymark_store.dedup.index import SHARD_COUNT

from .test_store_dedup_index import Model, judge, step

BLOCK = file_kernels.BLOCK_ENTRIES


def entries_of(keys, start=0, *, fingerprint=7):
    """Entries of (lo, hi) keys at the offsets from `start` on."""
    out = np.zeros(len(keys), dtype=ENTRY_DTYPE)
    for i, (lo, hi) in enumerate(keys):
        out[i] = (lo, hi, fingerprint, start + i)
    return out


def random_entries(seed, n, start=0):
    rng = np.random.default_rng(seed)
    out = np.zeros(n, dtype=ENTRY_DTYPE)
    for field in ("lo", "hi", "fingerprint"):
        out[field] = rng.integers(0, 2**64, n, dtype=np.uint64)
    out["offset"] = np.arange(start, start + n)
    return out


def filed(entries, start, end, disk=None, name="f"):
    """Entries in a file, opened."""
    disk = disk or MemoryDisk()
    write_id_file(disk, name, entries, start, end)
    return open_id_file(disk, name, start, end)


def merged(files, floor=0, disk=None):
    disk = disk or MemoryDisk()
    merge = IdMerge(disk, files, "merged", floor)
    while merge.step():
        pass
    merge.close()
    return open_id_file(disk, "merged", files[0].start, files[-1].end) if merge.count else None


def ask(index, entries, *, base, floor=0):
    """Judge the ids of entries; returns verdicts and originals."""
    n = len(entries)
    verdict = np.zeros(n, dtype=np.uint8)
    original = np.full(n, -1, dtype=np.int64)
    index.judge(
        entries["lo"].copy(), entries["hi"].copy(), entries["fingerprint"].copy(), np.full(n, LOOK_UP_ONLY, np.uint8),
        base, floor, verdict, original,
    )  # fmt: skip
    return verdict, original


@pytest.mark.parametrize("n", [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK + 17, 40_000])
def test_every_id_of_a_file_is_found(n):
    """At the edges of blocks, too; and an id that isn't there is not found, whatever it looks like."""
    entries = random_entries(n, n)
    index = DedupIndex()
    index.spill(n, [filed(entries, 0, n)])
    verdict, original = ask(index, entries, base=n)
    assert (verdict == DUPLICATE).all()
    assert original.tolist() == list(range(n))
    for field in ("lo", "hi"):
        other = entries.copy()
        other[field] += np.uint64(1)
        assert not ask(index, other, base=n)[0].any()
    other = entries.copy()
    other["fingerprint"] += np.uint64(1)
    assert (ask(index, other, base=n)[0] == CONFLICT).all()
    assert len(index) == 0


def test_keys_that_share_their_first_half():
    """Runs of them may be longer than blocks, and begin and end anywhere in them."""
    keys = [(lo, hi) for lo in (0, 5, 6, 2**64 - 1) for hi in range(3 * BLOCK + lo % 7)]
    entries = entries_of(keys)
    rng = np.random.default_rng(3)
    file = filed(entries[rng.permutation(len(entries))], 0, len(entries))
    index = DedupIndex()
    index.spill(len(entries), [file])
    verdict, original = ask(index, entries, base=len(entries))
    assert (verdict == DUPLICATE).all()
    assert original.tolist() == list(range(len(entries)))
    strangers = entries_of([(lo, 10**6) for lo in (0, 1, 5, 6, 7, 2**64 - 1)])
    assert not ask(index, strangers, base=len(entries))[0].any()


def test_an_entry_counts_from_its_offset_up_to_the_floor():
    """To the offset; of two entries of one key the one that is live counts, also in one file."""
    entries = entries_of([(1, 1), (2, 2), (1, 1), (3, 3)], 10)
    for files in ([filed(entries, 10, 14)], [filed(entries[:2], 10, 12), filed(entries[2:], 12, 14)]):
        index = DedupIndex()
        index.spill(14, files)
        assert judge(index, [(2, 2, 7), (1, 1, 7)], base=14, floor=11) == [(DUPLICATE, 11), (DUPLICATE, 12)]
        assert judge(index, [(2, 2, 7), (1, 1, 9)], base=16, floor=12) == [(0, -1), (CONFLICT, 12)]
        assert judge(index, [(1, 1, 7), (2, 2, 7)], base=18, floor=13) == [(0, -1), (DUPLICATE, 16)]


def test_a_repeat_within_a_batch_of_what_is_in_a_file():
    """Both refer to the file's; what is new is remembered in memory, once."""
    index = DedupIndex()
    index.spill(1, [filed(entries_of([(1, 1)]), 0, 1)])
    rows = [(1, 1, 7), (1, 1, 8), (2, 2, 7), (2, 2, 7)]
    wants = np.ones(4, dtype=np.uint8)
    assert judge(index, rows, base=1, wants=wants) == [
        (DUPLICATE, 0),
        (CONFLICT, 0),
        (0, -1),
        (DUPLICATE, 3),
    ]
    assert len(index) == 1
    assert wants.all(), "the caller's wishes stay as they were"


def test_spilling_gives_memory_back_and_changes_no_digest():
    """Bit by bit, with files beyond what is spilled, and files merged; the sweep frees what is in files."""
    n = 60_000
    entries = random_entries(1, n)
    twin, index = DedupIndex(salt=1), DedupIndex(salt=2)
    twin.load(entries)
    index.load(entries)
    before = index.memory_bytes
    disk = MemoryDisk()
    files = [filed(entries[at : at + 10_000], at, at + 10_000, disk, f"f{at}") for at in range(0, n, 10_000)]
    for end, used in ((15_000, files[:2]), (30_000, files[:3]), (60_000, files)):
        index.spill(end, used)
        for low, high in ((0, n), (1, n - 1), (end - 1, end + 1), (29_999, 30_001)):
            assert index.digest(low, high) == twin.digest(low, high)
        index.sweep(0, SHARD_COUNT)
        assert len(index) == n - end
        assert index.digest(0, n) == twin.digest(0, n)
    assert index.memory_bytes < before / 4
    assert index.memory_bytes < 2.2 * n + SHARD_COUNT * 4_096 + 64 * 1024
    index.spill(60_000, [merged(files[:4], 5_000), *files[4:]])
    assert index.digest(5_000, n) == twin.digest(5_000, n)
    verdict, original = ask(index, entries[5_000:], base=n, floor=5_000)
    assert (verdict == DUPLICATE).all()
    assert original.tolist() == list(range(5_000, n))


@pytest.mark.parametrize("spread", ["even", "low", "one"])
def test_a_merge_loses_nothing_but_what_has_left_the_window(spread, monkeypatch):
    """However keys are spread; in small pieces; the order of its inputs' entries doesn't matter."""
    monkeypatch.setattr("tallymark_store.dedup.id_file.MERGE_BLOCKS", 3)
    n = 8_000
    entries = random_entries(5, n)
    if spread == "low":
        entries["lo"] >>= np.uint64(52)
    elif spread == "one":
        entries["lo"] = 9
    cuts = [0, 1, 1_000, 1_200, 5_000, n]
    files = [filed(entries[a:b], a, b) for a, b in itertools.pairwise(cuts)]
    for floor in (0, 1_100, n - 1):
        file = merged(files, floor)
        assert (file.start, file.end) == (0, n)
        found = np.sort(file.entries(), order="offset")
        assert (found == entries[floor:]).all()
        index = DedupIndex()
        index.spill(n, [file])
        assert (ask(index, entries[floor:], base=n)[0] == DUPLICATE).all()
    assert merged(files, n) is None


def test_damage_anywhere_is_found_and_makes_no_id_new():
    """Each byte of a file: opening it fails, or whoever needs the block; and a file that is cut or another."""
    n = BLOCK + 3
    entries = random_entries(2, n)
    disk = MemoryDisk()
    write_id_file(disk, "f", entries, 0, n)
    size = disk.open("f").size()
    rng = random.Random(1)
    places = [*range(80), PAGE_BYTES - 1, *rng.sample(range(size), 300), size - 1]
    for place in places:
        disk.flip_bit("f", place, rng.randrange(8))
        try:
            index = DedupIndex()
            index.spill(n, [open_id_file(disk, "f", 0, n)])
        except IdFileError:
            pass
        else:
            assert place >= PAGE_BYTES
            with pytest.raises(IdFileError, match=r"f: block \d of its event ids is damaged"):
                ask(index, entries, base=n)
            with pytest.raises(IdFileError):
                index.digest(0, n)
            with pytest.raises(IdFileError):
                merged(index.files)
        finally:
            whole = MemoryDisk()
            write_id_file(whole, "f", entries, 0, n)
            disk.overwrite("f", 0, whole.open("f").read(0, size).tobytes())
    with pytest.raises(IdFileError, match=r"holds the ids of \[0, 131\)"):
        open_id_file(disk, "f", 1, n)
    with pytest.raises(IdFileError, match="missing"):
        open_id_file(disk, "g", 0, n)
    for length in (size - 1, PAGE_BYTES, PAGE_BYTES - 1, 7, 0):
        disk.cut("f", length)
        with pytest.raises(IdFileError):
            open_id_file(disk, "f", 0, n)


def test_a_batch_that_meets_damage_remembers_nothing():
    """Whatever of it was judged before."""
    n = 3 * BLOCK
    entries = random_entries(4, n)
    disk = MemoryDisk()
    file = filed(entries, 0, n, disk)
    disk.flip_bit("f", PAGE_BYTES + 2 * PAGE_BYTES + 5)
    index = DedupIndex()
    index.spill(n, [file])
    rows = [(1, 2, 3), *((int(e["lo"]), int(e["hi"]), 0) for e in entries)]
    with pytest.raises(IdFileError):
        judge(index, rows, base=n)
    assert len(index) == 0


def test_a_full_table_takes_nothing_of_the_batch_beside_files():
    """As without files."""
    index = DedupIndex(slots_max=64 * 256)
    index.spill(10, [filed(entries_of([(1, i) for i in range(10)]), 0, 10)])
    fresh = random_entries(6, 90_000)
    rows = [(int(e["lo"]), int(e["hi"]), 0) for e in fresh]
    with pytest.raises(TableFullError):
        judge(index, rows, base=10)
    assert not any(len(index.entries(shard, 10, 2**62)) for shard in range(SHARD_COUNT))


class Spilling:
    """An index whose committed ids go to files, as checkpoints and merges write them."""

    def __init__(self, rng, slots_max=2**13):
        self.rng = rng
        self.slots_max = slots_max
        self.disk = MemoryDisk()
        self.index = self.fresh()
        self.files = []
        self.written = 0
        self.number = 0

    def fresh(self):
        return DedupIndex(salt=self.rng.getrandbits(64), slots_max=self.slots_max)

    def name(self):
        self.number += 1
        return f"f{self.number}"

    def checkpoint(self, offset, floor):
        """Write what has been committed since the last time; spill up to the end of some file, or not at all."""
        shards = range(SHARD_COUNT)
        entries = np.concatenate([self.index.entries(shard, self.written, offset) for shard in shards])
        if len(entries):
            file = filed(entries, self.written, offset, self.disk, self.name())
            self.files.append(file)
        self.written = max(self.written, offset)
        self.files = [file for file in self.files if file.end > floor]
        self.merge(floor)
        ends = [file.end for file in self.files if file.end >= self.index.spilled_end]
        end = self.rng.choice([self.index.spilled_end, *ends])
        self.index.spill(end, [file for file in self.files if file.start < end])

    def merge(self, floor):
        """Some neighbours, whether or not they are spilled."""
        if len(self.files) < 3 or self.rng.random() < 0.5:
            return
        first = self.rng.randrange(len(self.files) - 1)
        some = self.files[first : first + 2]
        merge = IdMerge(self.disk, some, name := self.name(), floor)
        while merge.step():
            pass
        made = [open_id_file(self.disk, name, some[0].start, some[1].end)] if merge.count else []
        self.files[first : first + 2] = made

    def restart(self, floor, end, entries):
        """Map some of the files, take the others into memory, and replay the rest."""
        self.index = self.fresh()
        self.index.sweep(floor, 0)
        mapped = self.rng.randint(0, len(self.files))
        if mapped:
            self.index.spill(self.files[mapped - 1].end, self.files[:mapped])
        for file in self.files[mapped:]:
            self.index.load(file.entries())
        self.index.load(entries[(entries["offset"] >= self.written) & (entries["offset"] < end)])


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(st.one_of(step, st.tuples(st.just("spill"), st.just(0), st.just(0))), max_size=60))
def test_any_history_agrees_with_the_model_wherever_ids_are(steps):
    """Appends, truncations, sweeps, restarts, with committed ids in files, merged, and in memory (DEDUP-1)."""
    rng = random.Random(0)
    spilling, model = Spilling(rng), Model()
    twin = DedupIndex(salt=3, slots_max=2**13)
    floors = [0]
    committed = 0
    for kind, argument, rise in steps:
        end = len(model.log)
        index = spilling.index
        if kind == "append":
            floor = min(end, floors[-1] + rise)
            rows = [(key % 3, key, fingerprint) for key, fingerprint in argument]
            expected = model.judge(argument, floor)
            assert judge(index, rows, base=end, floor=floor) == expected
            assert judge(twin, rows, base=end, floor=floor) == expected
            floors += [floor] * len(argument)
        elif kind == "truncate":
            end = max(committed, end - argument)
            index.truncate(end)
            twin.truncate(end)
            del model.log[end:]
            del floors[end + 1 :]
        elif kind == "commit":
            committed = min(end, committed + argument)
            index.sweep(floors[committed], argument * 16)
        elif kind == "spill":
            spilling.checkpoint(committed, floors[committed])
        else:
            logged = [
                (key % 3, key, fingerprint, offset)
                for offset, entry in enumerate(model.log)
                if entry is not None
                for key, fingerprint in [entry]
            ]
            spilling.restart(floors[committed], end, np.array(logged, dtype=ENTRY_DTYPE))
            index = spilling.index
        end = len(model.log)
        assert index.digest(floors[-1], end) == twin.digest(floors[-1], end)
