"""Logs that do not begin at offset 0, in the write-ahead log and in its twin in memory; what is known of before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import pytest

from tallymark_runtime.disk import MemoryDisk
from tallymark_store.recycling import Holds, recycle_floor
from tallymark_store.replication.core import parting_point
from tallymark_store.replication.memory_log import MemoryLog
from tallymark_store.replication.messages import Record, Tail
from tallymark_store.replication.wal_log import WalLog
from tallymark_store.wal import PartitionIndex, RecordKind, RecordMeta, WalConfig, WalStart, open_wal
from tallymark_store.window_times import STEPS, WindowTimes

LOG_ID = bytes(range(16))


def record(base: int, epoch: int, *, count: int = 1, payload: bytes = b"x") -> Record:
    return Record(RecordMeta(3, RecordKind.EVENTS, epoch, base, count, 100 + base), (payload,))


class TrimmableLog(Protocol):
    log_start: int
    log_end: int

    def append(self, records: list[Record]) -> None: ...
    def truncate(self, new_end: int) -> None: ...
    def read(self, start: int, bytes_max: int) -> list[Record]: ...
    def tail(self, below: int, count: int) -> Tail: ...
    def epoch_before(self, offset: int) -> int: ...


class _Wal:
    """A write-ahead log in which each record has a segment of its own, so that any of them can be dropped."""

    def __init__(self) -> None:
        self.wal, _ = open_wal(MemoryDisk(), new_log_id=LOG_ID, config=WalConfig(segment_bytes=4_096))
        self.log = WalLog(self.wal, 3)

    def fill(self, *records: tuple[int, int]) -> WalLog:
        for epoch, count in records:
            self.log.append([record(self.log.log_end, epoch, count=count, payload=bytes(3_000))])
            self.wal.sync_all()
        return self.log

    def trim(self, offset: int) -> None:
        index = self.wal.partitions[3]
        row = index.find(offset)
        self.wal.trim(index.row(row).segment if row >= 0 else self.wal.synced_end.segment + 1)

    def reset(self, offset: int, epoch: int) -> None:
        self.log.reset(offset, epoch=epoch, append_ns=77)


class _Memory:
    def __init__(self) -> None:
        self.log = MemoryLog()

    def fill(self, *records: tuple[int, int]) -> MemoryLog:
        for epoch, count in records:
            self.log.append([record(self.log.log_end, epoch, count=count)])
        return self.log

    def trim(self, offset: int) -> None:
        self.log.trim(offset)

    def reset(self, offset: int, epoch: int) -> None:
        self.log.reset(offset, epoch=epoch)


LOGS: list[Callable[[], _Wal | _Memory]] = [_Wal, _Memory]


@pytest.mark.parametrize("make", LOGS)
def test_a_trimmed_log_knows_the_epoch_of_what_ended_at_its_start(make: Callable[[], _Wal | _Memory]) -> None:
    """And nothing else of before; what lies above is as it was."""
    held = make()
    log = held.fill((1, 2), (1, 2), (4, 2), (7, 2), (7, 2))
    held.trim(6)
    assert (log.log_start, log.log_end) == (6, 10)
    assert [log.epoch_before(offset) for offset in range(11)] == [-1, -1, -1, -1, -1, -1, 4, -1, 7, -1, 7]
    assert log.tail(10, 10) == [(4, 6), (7, 10)]
    assert log.tail(10, 1) == [(7, 10)]
    assert log.tail(6, 10) == [(4, 6)]
    assert log.tail(5, 10) == []
    assert [found.end for found in log.read(6, 10**6)] == [8, 10]
    log.truncate(6)
    assert (log.log_start, log.log_end, log.epoch_before(6), log.tail(6, 9)) == (6, 6, 4, [(4, 6)])
    log.append([record(6, 9)])
    assert log.tail(7, 9) == [(4, 6), (9, 7)]


@pytest.mark.parametrize("make", LOGS)
def test_a_log_trimmed_within_an_epoch_names_it_once(make: Callable[[], _Wal | _Memory]) -> None:
    """Tails ascend in both: an epoch that reaches over the start ends where its last record does."""
    held = make()
    log = held.fill((5, 1), (5, 1), (5, 1))
    held.trim(2)
    assert log.tail(3, 9) == [(5, 3)]
    assert log.tail(2, 9) == [(5, 2)]


@pytest.mark.parametrize("make", LOGS)
def test_a_log_that_begins_with_a_snapshot(make: Callable[[], _Wal | _Memory]) -> None:
    """It is empty, and its end is that of a record of the epoch that it was told."""
    held = make()
    log = held.fill((1, 2), (2, 2))
    held.reset(50, 8)
    assert (log.log_start, log.log_end) == (50, 50)
    assert log.tail(50, 9) == [(8, 50)]
    assert [log.epoch_before(offset) for offset in (0, 2, 49, 50, 51)] == [-1, -1, -1, 8, -1]
    assert log.read(50, 100) == []
    assert log.read(0, 100) == []
    log.append([record(50, 8), record(51, 9)])
    assert log.tail(52, 9) == [(8, 51), (9, 52)]
    held.reset(0, 0)
    assert (log.log_start, log.log_end, log.epoch_before(0), log.tail(0, 9)) == (0, 0, 0, [])


def test_parting_points_of_logs_that_do_not_begin_at_0() -> None:
    """Where the tails have no epoch in common, what is committed in both is where they part."""
    assert parting_point([(4, 6), (7, 10)], 10, [(4, 6)], 6, 6) == 6
    assert parting_point([(4, 6), (7, 10)], 10, [(2, 3)], 3, 2) == 2
    assert parting_point([(4, 6), (7, 10)], 10, [], 0, 0) == 0
    assert parting_point([(4, 60)], 60, [(4, 6)], 6, 6) == 6


def test_what_is_known_of_before_survives_a_restart() -> None:
    """By the start of the log that is kept beside the checkpoints, and by the record of the reset."""
    disk = MemoryDisk()
    wal, _ = open_wal(disk, new_log_id=LOG_ID, config=WalConfig(segment_bytes=4_096))
    for k in range(6):
        wal.append(record(k, k + 1, payload=bytes(2_500)).meta, [bytes(2_500)])
        wal.sync_all()
    index = wal.partitions[3]
    wal.trim(index.row(3).segment)
    start = wal.snapshot()
    wal.sync_all()
    arrays = start.to_arrays()
    assert wal.remove_segments_before(index.row(0).segment) > 0
    for _ in range(2):
        wal, recovery = open_wal(disk, new_log_id=LOG_ID, start=WalStart.from_arrays(arrays))
        index = wal.partitions[3]
        assert not recovery.is_damaged(3)
        assert (index.log_start, index.start_epoch, index.start_append_ns) == (3, 3, 102)
        assert index.append_ns_before(3) == 102
        assert index.append_ns_before(4) == 103
    wal.reset(3, 90, epoch=12, append_ns=555)
    wal.sync_all()
    wal, _ = open_wal(disk, new_log_id=LOG_ID, start=WalStart.from_arrays(arrays))
    index = wal.partitions[3]
    assert (index.log_start, index.log_end, index.last_epoch(), index.last_append_ns()) == (90, 90, 12, 555)


# ------------------------------------------------------------ what may go


def filled(segments: list[int], start: int = 0) -> PartitionIndex:
    index = PartitionIndex(1, start)
    for offset, segment in enumerate(segments, start=start):
        index.append(
            RecordMeta(1, RecordKind.EVENTS, 1, offset, 1, offset), segment=segment, position=0, length=1
        )
    return index


def test_the_floor_is_what_the_neediest_partition_needs() -> None:
    """Nothing of a partition without a checkpoint goes; one that needs nothing keeps nothing."""
    one, two = filled([3, 4, 5, 6]), filled([3, 3, 7])
    assert recycle_floor({1: one, 2: two}, {1: 2, 2: 2}, 9) == 5
    assert recycle_floor({1: one, 2: two}, {1: 4, 2: 2}, 9) == 7
    assert recycle_floor({1: one, 2: two}, {1: 4, 2: 3}, 9) == 9
    assert recycle_floor({1: one, 2: two}, {1: 4}, 9) == 3
    assert recycle_floor({1: one, 2: two}, {1: 4, 2: 3}, 2) == 2
    assert recycle_floor({}, {}, 9) == 9
    empty = PartitionIndex(3, 80)
    assert recycle_floor({1: one, 3: empty}, {1: 3, 3: 0}, 9) == 6
    assert recycle_floor({1: filled([4, 5], start=70)}, {1: 0}, 9) == 4


class _Overtaken(PartitionIndex):
    """Whose columns grow the moment after a reader has loaded the first thing of them."""

    is_overtaken = False

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if name in ("_bases", "_last") and self.is_overtaken:
            self.is_overtaken = False
            end = self.log_end
            self.append(RecordMeta(1, RecordKind.EVENTS, 1, end, 1, end), segment=0, position=0, length=1)
        return value


def test_a_record_is_found_while_the_index_grows() -> None:
    """By a thread that counts again what was committed before."""
    index = _Overtaken(1)
    for base in range(64):
        index.append(RecordMeta(1, RecordKind.EVENTS, 1, base, 1, base), segment=0, position=0, length=1)
    for offset in (0, 31, 62, 63):
        for _ in range(130):  # one of them makes the columns grow
            index.is_overtaken = True
            assert index.find(offset) == offset
            assert not index.is_overtaken
    assert len(index) == 64 + 4 * 130


def test_holds_keep_log_and_files() -> None:
    """Each as long as it is held, whoever else does."""
    holds = Holds()
    assert holds.lowest(1, 9) == 9
    holds.take("a", 1, 5, frozenset({"x", "y"}))
    holds.take("b", 1, 7, frozenset({"y", "z"}))
    with holds.held(1, 0):
        assert holds.lowest(1, 9) == 0
    assert (holds.lowest(1, 9), holds.lowest(1, 3), holds.lowest(2, 9)) == (5, 3, 9)
    assert holds.files(1) == {"x", "y", "z"}
    assert holds.files(2) == frozenset()
    holds.release("a")
    holds.release("a")
    assert (holds.lowest(1, 9), holds.files(1)) == (7, {"y", "z"})


# ------------------------------------------------------------ times


def timed(times: list[int]) -> PartitionIndex:
    index = PartitionIndex(1)
    for offset, append_ns in enumerate(times):
        index.append(
            RecordMeta(1, RecordKind.EVENTS, 1, offset, 1, append_ns), segment=offset, position=0, length=1
        )
    return index


@pytest.mark.parametrize("seed", range(20))
def test_the_window_begins_at_the_same_offset_whatever_was_dropped(seed: int) -> None:
    """A whole log, one dropped in steps, and one that began with a checkpoint: one floor."""
    rng = np.random.default_rng(seed)
    window = int(rng.integers(1, 40)) * STEPS + int(rng.integers(0, 3))
    times = np.sort(rng.integers(0, 3 * window, 200)).tolist()
    whole, trimmed = timed(times), timed(times)
    reference, own = WindowTimes(window), WindowTimes(window)
    installed: tuple[PartitionIndex, WindowTimes] | None = None
    for offset in sorted(rng.integers(0, 200, 5).tolist()):
        own.drop(trimmed, max(offset, trimmed.log_start))
        trimmed.trim(offset)
        if installed is None and offset > 60:
            index = PartitionIndex(1)
            index.reset(offset, epoch=1, append_ns=times[offset - 1])
            for at in range(offset, 200):
                index.append(
                    RecordMeta(1, RecordKind.EVENTS, 1, at, 1, times[at]), segment=at, position=0, length=1
                )
            installed = index, WindowTimes(window, own.below(trimmed, max(offset, trimmed.log_start)))
        last = times[offset - 1] if offset else 0
        for now in [last, *rng.integers(last, 4 * window, 30).tolist()]:
            expected = reference.floor(whole, now)
            assert expected == whole.log_end or times[expected] >= now - window - window // STEPS
            assert expected == 0 or times[expected - 1] < now - window
            assert own.floor(trimmed, now) == max(expected, 0)
            if installed is not None:
                assert installed[1].floor(installed[0], now) == expected


def test_times_are_bounded() -> None:
    """However many records there are: one for each step of the window."""
    window = STEPS * 10
    index = timed(list(range(3 * window // 10)))
    for append_ns in range(10):
        index.append(
            RecordMeta(1, RecordKind.EVENTS, 1, index.log_end, 1, 3 * window + append_ns),
            segment=10**6, position=0, length=1,
        )  # fmt: skip
    times = WindowTimes(window)
    assert len(times.below(index, index.log_end)) <= STEPS + 2
