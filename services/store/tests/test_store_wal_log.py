"""A partition's log as its replica sees it; above all, what a sync says after the log was cut."""

from __future__ import annotations

import random

import numpy as np
import pytest

from tallymark_runtime.disk import MemoryDisk
from tallymark_store.replication.membership import encode_members
from tallymark_store.replication.messages import Record
from tallymark_store.replication.ports import Member, Membership
from tallymark_store.replication.wal_log import WalLog
from tallymark_store.wal import (
    DamagedError,
    Group,
    LogFullError,
    RecordKind,
    RecordMeta,
    Wal,
    WalConfig,
    open_wal,
)

LOG_ID = bytes(range(16))


def opened(disk: MemoryDisk, **config: int) -> Wal:
    wal, _ = open_wal(
        disk, new_log_id=LOG_ID, config=WalConfig(segment_bytes=config.pop("segment_bytes", 16_384), **config)
    )
    return wal


def record(
    base: int, epoch: int, *, count: int = 1, payload: bytes = b"x", kind: int = RecordKind.EVENTS
) -> Record:
    return Record(RecordMeta(3, kind, epoch, base, count, 100 + base), (payload,))


def filled(wal: Wal, *epochs: int) -> WalLog:
    """A log with one record of two offsets for each epoch given."""
    log = WalLog(wal, 3)
    for epoch in epochs:
        log.append([record(log.log_end, epoch, count=2)])
    return log


def durable(log: WalLog, groups: list[Group]) -> list[int | None]:
    return [log.durable_end(group.number, group.log_ends[3]) for group in groups if 3 in group.log_ends]


def take(wal: Wal) -> Group:
    group = wal.take_group()
    assert group is not None
    return group


def finish(wal: Wal, group: Group) -> Group:
    wal.write_group(group)
    wal.synced(group)
    return group


def test_a_sync_tells_what_is_on_disk() -> None:
    """The partition's log end in the group."""
    wal = opened(MemoryDisk())
    log = filled(wal, 1, 1)
    assert durable(log, wal.sync_all()) == [4]
    log.append([record(4, 1)])
    assert durable(log, wal.sync_all()) == [5]


def test_a_sync_of_before_the_cut_says_nothing() -> None:
    """The log has grown to the same end again, with other bytes: their sync is another one."""
    wal = opened(MemoryDisk())
    log = filled(wal, 1)
    wal.sync_all()
    log.append([record(2, 1, count=8)])
    before = take(wal)  # under way when the log is cut
    log.truncate(2)
    log.append([record(2, 2, count=8)])
    assert log.log_end == 10
    finish(wal, before)
    assert before.log_ends == {3: 10}
    assert durable(log, [before]) == [None]
    after = finish(wal, take(wal))
    assert durable(log, [after]) == [10]


def test_a_cut_in_the_very_group_counts_with_it() -> None:
    """What was appended, cut off and appended again before any sync is one group, and its end is the last one."""
    wal = opened(MemoryDisk())
    log = filled(wal, 1, 1)
    log.truncate(2)
    log.append([record(2, 2)])
    assert durable(log, wal.sync_all()) == [3]


def test_a_cut_alone_is_durable_with_its_group() -> None:
    """Everything below the new end is, then."""
    wal = opened(MemoryDisk())
    log = filled(wal, 1, 1)
    before = take(wal)
    log.truncate(2)
    finish(wal, before)
    assert durable(log, [before]) == [None]
    assert durable(log, [finish(wal, take(wal))]) == [2]
    assert log.log_end == 2


def test_two_cuts_wait_for_the_second() -> None:
    """Groups between them say nothing either."""
    wal = opened(MemoryDisk())
    log = filled(wal, 1, 1)
    wal.sync_all()
    log.truncate(2)
    log.append([record(2, 2, count=5)])
    first = take(wal)
    log.truncate(2)
    log.append([record(2, 3, count=5)])
    second = take(wal)
    finish(wal, first)
    finish(wal, second)
    assert durable(log, [first, second]) == [None, 7]


def test_a_reset_copy_is_durable_with_its_group() -> None:
    """An end of the discarded copy never counts for the new one."""
    wal = opened(MemoryDisk())
    log = filled(wal, 1, 1, 1)
    before = take(wal)
    log.reset()
    assert (log.log_start, log.log_end) == (0, 0)
    log.append([record(0, 4, count=2)])
    finish(wal, before)
    assert durable(log, [before]) == [None]
    assert durable(log, [finish(wal, take(wal))]) == [2]


def test_what_was_reported_survives_a_crash() -> None:
    """At every moment: cut, append, sync in any order, lose power, and what was said to be durable is there."""
    for crash_at in range(6):
        disk = MemoryDisk()
        wal = opened(disk)
        log = filled(wal, 1, 1)
        known = (0, 0)  # (epoch, end) reported durable
        steps = [
            lambda log=log: log.truncate(2),
            lambda log=log: log.append([record(2, 2, count=3)]),
            lambda log=log: log.truncate(2),
            lambda log=log: log.append([record(2, 3, count=3)]),
            lambda log=log: log.append([record(5, 3, count=3)]),
        ]
        waiting = take(wal)
        for number, step in enumerate(steps):
            step()
            if number >= crash_at:
                break
            finish(wal, waiting)
            end = log.durable_end(waiting.number, waiting.log_ends[3])
            if end is not None:
                known = (log.epoch_before(end), end)
            waiting = take(wal)
        disk.crash(random.Random(1), lose_all=True)
        again = WalLog(opened(disk), 3)
        assert again.log_end >= known[1]
        assert again.epoch_before(known[1]) == known[0]


def test_tails_name_the_ends_of_epochs() -> None:
    """Oldest first, as many as are asked for, of what lies below an offset."""
    log = filled(opened(MemoryDisk()), 1, 1, 4, 7, 7)
    assert log.tail(log.log_end, 10) == [(1, 4), (4, 6), (7, 10)]
    assert log.tail(log.log_end, 2) == [(4, 6), (7, 10)]
    assert log.tail(6, 10) == [(1, 4), (4, 6)]
    assert log.tail(4, 10) == [(1, 4)]
    assert log.tail(0, 10) == []
    assert WalLog(opened(MemoryDisk()), 3).tail(0, 10) == []


def test_epochs_are_known_at_boundaries_only() -> None:
    """0 where the log begins, -1 where no record ends."""
    log = filled(opened(MemoryDisk()), 1, 4)
    assert [log.epoch_before(offset) for offset in range(6)] == [0, -1, 1, -1, 4, -1]


def test_reads_give_records_in_pieces_and_in_bounds() -> None:
    """At least one, also where it is larger than asked for; not synced ones as they were written."""
    wal = opened(MemoryDisk())
    log = WalLog(wal, 3)
    parts = (b"head", np.frombuffer(b"tail", np.uint8))
    log.append([Record(RecordMeta(3, RecordKind.EVENTS, 1, 0, 1, 1), parts)])
    log.append([record(1 + k, 1, payload=bytes(400)) for k in range(4)])
    assert log.read(0, 1)[0].parts is parts
    assert [x.meta.base_offset for x in log.read(0, 1_100)] == [0, 1, 2]
    wal.sync_all()
    found = log.read(0, 10**9)
    assert [x.end for x in found] == [1, 2, 3, 4, 5]
    assert b"".join(bytes(part) for part in found[0].parts) == b"headtail"
    assert log.read(5, 100) == []


def test_reads_begin_at_a_boundary() -> None:
    """Other nodes name offsets, too; one within a record gives nothing."""
    log = filled(opened(MemoryDisk()), 1, 1)
    assert log.read(1, 100) == []
    assert len(log.read(2, 100)) == 1


def test_memberships_are_found_in_the_log() -> None:
    """Those that are there, cut ones not."""
    log = filled(opened(MemoryDisk()), 1)
    a, b = Member("a", "1"), Member("b", "2")
    for members in ((a,), (a, b)):
        payload = encode_members(members)
        log.append([record(log.log_end, 1, payload=payload, kind=RecordKind.MEMBERSHIP)])
    assert log.memberships() == [Membership((a,), 2), Membership((a, b), 3)]
    log.truncate(3)
    assert log.memberships() == [Membership((a,), 2)]


def test_every_write_asks_for_a_sync() -> None:
    """Appends, cuts and resets: nobody else knows of them."""
    called = []
    log = WalLog(opened(MemoryDisk()), 3, lambda: called.append(1))
    log.append([record(0, 1), record(1, 1)])
    log.truncate(1)
    log.reset()
    assert len(called) == 4


def test_what_finds_no_room_leaves_the_rest() -> None:
    """The first records are there, whole; the error says that it may be tried again."""
    log = WalLog(opened(MemoryDisk(), segment_bytes=8_192, log_bytes_max=8_192), 3)
    with pytest.raises(LogFullError) as caught:
        log.append([record(k, 1, payload=bytes(1_000)) for k in range(20)])
    assert caught.value.retriable
    assert 0 < log.log_end < 20
    assert len(log.read(0, 10**9)) == log.log_end


def test_a_damaged_copy_takes_nothing_before_it_is_reset() -> None:
    """Then it is as new."""
    wal = opened(MemoryDisk())
    log = filled(wal, 1)
    wal.mark_damaged(3)
    with pytest.raises(DamagedError):
        log.append([record(2, 1)])
    log.reset()
    log.append([record(0, 5)])
    assert durable(log, wal.sync_all()) == [1]
