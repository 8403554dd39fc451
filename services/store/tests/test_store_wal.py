"""The write-ahead log in use: appending, reading, rolling over, running full, truncating, checkpointing."""

import errno

import numpy as np
import pytest

from tallymark_runtime.disk import DiskError, MemoryDisk, RealDisk
from tallymark_store.wal import (
    DamagedError,
    LogBusyError,
    LogFailedError,
    LogFullError,
    PartitionIndex,
    RecordKind,
    RecordMeta,
    WalConfig,
    WalStart,
    WalThreads,
    open_wal,
)
from tallymark_store.wal.format import segment_name

LOG_ID = bytes(range(16))
SMALL = WalConfig(segment_bytes=8192)


def reopen(disk, config=SMALL, start=None):
    """Open the log in `disk`."""
    return open_wal(disk, new_log_id=LOG_ID, config=config, start=start)


def put(wal, partition, payload, count=1, kind=RecordKind.EVENTS, epoch=1):
    """Append one record at the partition's log end."""
    base = wal.log_end(partition)
    meta = RecordMeta(partition, kind, epoch, base, count, 1000 + base, 5, 9)
    wal.append(meta, [payload] if isinstance(payload, bytes) else payload)
    return meta


def payloads(wal, partition):
    """All payloads of a partition, read and verified."""
    index = wal.partitions.get(partition)
    return (
        [] if index is None else [wal.read_record(partition, row)[1].tobytes() for row in range(len(index))]
    )


def test_records_are_read_before_and_after_their_sync_and_after_a_restart():
    """The same meta and payload come back from memory, from the file and from recovery."""
    disk = MemoryDisk()
    wal, recovery = reopen(disk)
    assert recovery.damages == {}
    assert not recovery.is_damaged(3)
    meta = put(
        wal, 3, [b"one", bytearray(b"two"), np.frombuffer(b"three", np.uint8), memoryview(b"!")], count=7
    )
    assert wal.buffer_bytes > 0
    got, payload = wal.read(3, 6)
    assert (got, payload.tobytes()) == (meta, b"onetwothree!")
    (group,) = wal.sync_all()
    assert group.log_ends == {3: 7}
    assert wal.buffer_bytes == 0
    got, payload = wal.read(3, 0)
    assert (got, payload.tobytes()) == (meta, b"onetwothree!")
    assert wal.read(3, 7) is None
    assert wal.read(4, 0) is None
    wal, recovery = reopen(disk)
    assert recovery.damages == {}
    got, payload = wal.read(3, 3)
    assert (got, payload.tobytes()) == (meta, b"onetwothree!")
    with pytest.raises(ValueError):
        payload[0] = 1


def test_groups_hold_what_arrived_since_the_last_take():
    """One group commits records of several partitions; nothing to take is None."""
    wal, _ = reopen(MemoryDisk())
    assert wal.take_group() is None
    put(wal, 1, b"a")
    put(wal, 2, b"b", count=5)
    put(wal, 1, b"c", count=2)
    group = wal.take_group()
    assert group.log_ends == {1: 3, 2: 5}
    put(wal, 1, b"d")
    wal.write_group(group)
    wal.synced(group)
    assert wal.take_group().log_ends == {1: 4}


def test_an_empty_payload_and_every_padding():
    """Payloads of 0 to 20 bytes survive, whatever the padding."""
    disk = MemoryDisk()
    wal, _ = reopen(disk)
    expected = [bytes([65 + size]) * size for size in range(21)]
    for payload in expected:
        put(wal, 1, payload)
        wal.sync_all()
    wal, recovery = reopen(disk)
    assert recovery.damages == {}
    assert payloads(wal, 1) == expected


def test_the_log_rolls_over_segments():
    """Many records fill several segments; all are found again, by offset too."""
    disk = MemoryDisk()
    wal, _ = reopen(disk)
    expected = []
    for number in range(60):
        expected.append(bytes([number]) * (500 + number))
        put(wal, number % 3, expected[-1], count=number + 1)
        if number % 4 == 0:
            wal.sync_all()
    wal.sync_all()
    assert wal.synced_end.segment >= 4
    for _ in range(3):
        wal, recovery = reopen(disk)
        assert (recovery.damages, recovery.findings, recovery.tail_bytes) == ({}, [], 0)
        for partition in range(3):
            assert payloads(wal, partition) == expected[partition::3]
        meta, payload = wal.read(2, 3 + 6 + 2)
        assert (meta.base_offset, payload.tobytes()) == (9, expected[8])


def test_many_records_in_one_group_span_segments():
    """What doesn't fit goes on in the next segment, before anything was synced."""
    disk = MemoryDisk()
    wal, _ = reopen(disk)
    expected = [bytes([number]) * 700 for number in range(40)]
    for payload in expected:
        put(wal, 1, payload)
    groups = wal.sync_all()
    assert len(groups) > 3
    wal, recovery = reopen(disk)
    assert recovery.damages == {}
    assert payloads(wal, 1) == expected


def test_a_huge_record_gets_a_segment_of_its_size():
    """A record larger than a segment is stored, between small ones, and ready segments are replaced."""
    disk = MemoryDisk()
    wal, _ = reopen(disk)
    wal.prepare_ahead()
    expected = [b"small", b"H" * 50_001, b"after", b"G" * 20_000, b"end"]
    for payload in expected:
        put(wal, 1, payload)
        wal.prepare_ahead()
    wal.sync_all()
    wal, recovery = reopen(disk)
    assert (recovery.damages, recovery.findings) == ({}, [])
    assert payloads(wal, 1) == expected


def test_control_records_take_one_offset_and_keep_their_kind():
    """Kinds and epochs come back."""
    disk = MemoryDisk()
    wal, _ = reopen(disk)
    put(wal, 1, b"schema", kind=RecordKind.SCHEMA, epoch=4)
    put(wal, 1, b"start", kind=RecordKind.EPOCH_START, epoch=2**62)
    put(wal, 1, b"later", kind=77, epoch=2**62)
    wal.sync_all()
    wal, _ = reopen(disk)
    assert wal.partitions[1].column("kind").tolist() == [2, 3, 77]
    assert wal.partitions[1].last_epoch() == 2**62


def test_appends_must_continue_the_log():
    """A wrong base offset is a defect of the caller."""
    wal, _ = reopen(MemoryDisk())
    put(wal, 1, b"a", count=3)
    for base in (2, 4):
        with pytest.raises(AssertionError, match="log end is 3"):
            wal.append(RecordMeta(1, 1, 1, base, 1, 0), [b"x"])
    with pytest.raises(AssertionError):
        wal.append(RecordMeta(1, RecordKind.RESET, 1, 3, 1, 0), [b"x"])
    with pytest.raises(AssertionError):
        wal.append(RecordMeta(1, 1, 1, 3, 0, 0), [b"x"])
    assert wal.log_end(1) == 3


def test_truncation_is_replayed():
    """Cut, go on with other content, restart: the new content is there, the old is not."""
    disk = MemoryDisk()
    wal, _ = reopen(disk)
    for payload in (b"a", b"b", b"c"):
        put(wal, 1, payload, count=10)
    put(wal, 2, b"other", count=30)
    wal.sync_all()
    wal.truncate(1, 10, epoch=2, append_ns=5)
    assert wal.log_end(1) == 10
    assert wal.read(1, 10) is None
    put(wal, 1, b"B", count=5)
    groups = wal.sync_all()
    assert groups[-1].log_ends == {1: 15}
    assert groups[-1].truncated == {1}
    wal, recovery = reopen(disk)
    assert recovery.damages == {}
    assert payloads(wal, 1) == [b"a", b"B"]
    assert payloads(wal, 2) == [b"other"]
    wal.truncate(1, 0, epoch=3, append_ns=6)
    wal.sync_all()
    wal, recovery = reopen(disk)
    assert recovery.damages == {}
    assert (wal.log_end(1), len(wal.partitions[1])) == (0, 0)


def test_truncating_what_is_not_synced_yet():
    """A truncation in the same group as what it cuts."""
    disk = MemoryDisk()
    wal, _ = reopen(disk)
    put(wal, 1, b"a")
    put(wal, 1, b"b")
    wal.truncate(1, 1, epoch=1, append_ns=0)
    put(wal, 1, b"c")
    (group,) = wal.sync_all()
    assert group.log_ends == {1: 2}
    assert payloads(wal, 1) == [b"a", b"c"]
    wal, recovery = reopen(disk)
    assert recovery.damages == {}
    assert payloads(wal, 1) == [b"a", b"c"]


def test_a_log_is_cut_between_records_only():
    """Cutting inside a record, or outside the log, is a defect of the caller."""
    wal, _ = reopen(MemoryDisk())
    put(wal, 1, b"a", count=10)
    for new_end in (5, 11, -1):
        with pytest.raises(AssertionError):
            wal.truncate(1, new_end, epoch=1, append_ns=0)
    with pytest.raises(AssertionError):
        wal.truncate(2, 0, epoch=1, append_ns=0)


def test_a_reset_begins_a_new_copy_elsewhere():
    """A discarded copy is empty and goes on at the snapshot's offset."""
    disk = MemoryDisk()
    wal, _ = reopen(disk)
    put(wal, 1, b"a", count=10)
    wal.reset(1, 500, epoch=3, append_ns=0)
    put(wal, 1, b"new", count=2)
    wal.reset(7, 90, epoch=3, append_ns=0)
    wal.sync_all()
    wal, recovery = reopen(disk)
    assert recovery.damages == {}
    assert (wal.partitions[1].log_start, wal.log_end(1), wal.log_end(7)) == (500, 502, 90)
    assert payloads(wal, 1) == [b"new"]
    assert wal.read(1, 5) is None


def test_a_marker_is_due_when_the_log_goes_idle():
    """Only after the sync of records, once, and not while something waits."""
    wal, _ = reopen(MemoryDisk())
    assert not wal.needs_marker
    assert not wal.write_marker()
    put(wal, 1, b"a")
    assert not wal.needs_marker
    wal.sync_all()
    assert wal.needs_marker
    assert wal.write_marker()
    assert not wal.needs_marker
    (group,) = wal.sync_all()
    assert group.is_marker
    assert not wal.needs_marker


def test_the_buffer_is_bounded():
    """Too much unsynced is refused, and taken after the sync; one large record always passes."""
    wal, _ = reopen(MemoryDisk(), WalConfig(segment_bytes=65536, buffer_bytes_max=1000))
    put(wal, 1, bytes(5000))
    with pytest.raises(LogBusyError) as caught:
        put(wal, 1, b"x")
    assert caught.value.retriable
    assert wal.log_end(1) == 1
    wal.sync_all()
    put(wal, 1, b"x")


@pytest.mark.parametrize("by", ["disk", "limit"])
def test_a_full_log_refuses_before_it_takes_anything_and_recovers(by):
    """What was accepted stays; small records go on while they fit; room later ends it."""
    disk = MemoryDisk(capacity=3 * 8192 if by == "disk" else None)
    config = SMALL if by == "disk" else WalConfig(segment_bytes=8192, log_bytes_max=3 * 8192)
    wal, _ = reopen(disk, config)
    accepted = []
    for number in range(12):
        accepted.append(bytes([number]) * 1500)
        put(wal, 1, accepted[-1])
        wal.poll_space(0)
    with pytest.raises(LogFullError) as caught:
        put(wal, 1, bytes(1500))
    assert caught.value.retriable
    assert wal.full
    assert wal.log_end(1) == len(accepted)
    assert wal.total_bytes == 3 * 8192
    put(wal, 1, b"fits")
    accepted.append(b"fits")
    while True:
        try:
            put(wal, 2, b"")
        except LogFullError:
            break
    wal.sync_all()
    assert wal.write_marker()
    wal.sync_all()
    with pytest.raises(LogFullError):
        put(wal, 1, bytes(1500))
    if by == "disk":
        disk.capacity = None
        wal.poll_space(10**9)
    else:
        wal, _ = reopen(disk)
    assert not wal.full
    put(wal, 1, b"room again" * 100)
    accepted.append(b"room again" * 100)
    wal.sync_all()
    wal, recovery = reopen(disk)
    assert recovery.damages == {}
    assert payloads(wal, 1) == accepted
    assert disk.list() == sorted(segment_name(number) for number in range(len(disk.list())))


def test_space_is_looked_for_once_a_second():
    """Polling in between doesn't touch the disk."""
    disk = MemoryDisk(capacity=8192)
    wal, _ = reopen(disk)
    put(wal, 1, b"takes the only segment")
    wal.prepare_ahead()
    assert wal.full
    wal.poll_space(0)
    writes = disk.write_count
    disk.capacity = None
    wal.poll_space(999_999_999)
    assert wal.full
    assert disk.write_count == writes
    wal.poll_space(1_000_000_000)
    assert not wal.full


def test_a_log_without_any_room_opens_and_says_so():
    """Not even the first segment fits; nothing is taken until it does."""
    disk = MemoryDisk(capacity=100)
    wal, recovery = reopen(disk)
    assert recovery.damages == {}
    assert wal.full
    with pytest.raises(LogFullError):
        put(wal, 1, b"a")
    with pytest.raises(LogFullError):
        wal.reset(1, 5, epoch=1, append_ns=0)
    assert wal.log_end(1) == 0
    assert wal.idle
    disk.capacity = None
    wal.poll_space(0)
    put(wal, 1, b"a")
    wal.sync_all()
    wal, recovery = reopen(disk)
    assert payloads(wal, 1) == [b"a"]


def test_no_room_for_the_large_segment_leaves_the_small_one_in_use():
    """A huge record is refused; small ones go on into the segment that was ready."""
    disk = MemoryDisk(capacity=2 * 8192 + 100)
    wal, _ = reopen(disk)
    wal.prepare_ahead()
    with pytest.raises(LogFullError):
        put(wal, 1, bytes(50_000))
    assert wal.full
    for number in range(5):
        put(wal, 1, bytes([number]) * 1000)
    wal.poll_space(0)
    assert not wal.full
    for number in range(5):
        put(wal, 1, bytes([number]) * 1000)
    wal.sync_all()
    wal, recovery = reopen(disk)
    assert recovery.damages == {}
    assert len(payloads(wal, 1)) == 10


@pytest.mark.parametrize("operation", ["write", "sync"])
def test_after_a_failed_write_or_sync_nothing_is_taken(operation):
    """One failure ends the log's life in this process; it is told once."""
    disk = MemoryDisk()
    wal, _ = reopen(disk)
    told = []
    wal.on_failed = told.append
    put(wal, 1, b"good")
    wal.sync_all()
    put(wal, 1, b"bad")
    disk.fail_next(operation)
    with pytest.raises(DiskError):
        wal.sync_all()
    assert wal.failed
    with pytest.raises(LogFailedError) as refused:
        put(wal, 1, b"more")
    assert refused.value.retriable, "whoever takes over can be asked"
    with pytest.raises(LogFailedError):
        wal.take_group()
    with pytest.raises(LogFailedError):
        wal.truncate(1, 0, epoch=1, append_ns=0)
    assert not wal.needs_marker
    assert len(told) == 1
    wal, recovery = reopen(disk)
    assert payloads(wal, 1)[:1] == [b"good"]
    assert recovery.damages == {}


def test_an_error_while_preparing_that_is_not_lack_of_room_is_a_failure():
    """EIO while a segment is made fails the log."""
    disk = MemoryDisk()
    wal, _ = reopen(disk)
    put(wal, 1, bytes(5000))
    disk.fail_next("write", name=".tmp", number=errno.EIO)
    with pytest.raises(LogFailedError, match="Input/output error"):
        put(wal, 1, bytes(5000))
    assert wal.failed
    assert wal.log_end(1) == 1


def test_quota_is_lack_of_room():
    """EDQUOT and ENOSPC in the middle of preparing leave a full log and no rubbish."""
    for number in (errno.EDQUOT, errno.ENOSPC):
        disk = MemoryDisk()
        wal, _ = reopen(disk)
        put(wal, 1, b"a")
        disk.fail_next("write", name=".tmp", number=number)
        wal.prepare_ahead()
        assert wal.full
        assert disk.list() == [segment_name(0)]
        wal.poll_space(0)
        assert not wal.full


def test_bit_rot_is_found_on_read():
    """Every read verifies; the error names partition and place; the damage is remembered."""
    disk = MemoryDisk()
    wal, _ = reopen(disk)
    put(wal, 1, b"first")
    put(wal, 1, b"second")
    put(wal, 2, b"other")
    wal.sync_all()
    row = wal.partitions[1].row(1)
    for shift in (0, 40, 88, 93):
        disk.flip_bit(segment_name(row.segment), row.position + shift)
        with pytest.raises(DamagedError) as caught:
            wal.read(1, 1)
        assert (caught.value.partition, caught.value.position) == (1, row.position)
        assert not caught.value.retriable
        disk.flip_bit(segment_name(row.segment), row.position + shift)
    assert wal.read(1, 0)[1].tobytes() == b"first"
    wal.mark_damaged(1)
    with pytest.raises(DamagedError):
        put(wal, 1, b"more")
    put(wal, 2, b"goes on")
    wal.sync_all()
    assert wal.write_marker()
    wal.sync_all()
    wal, recovery = reopen(disk)
    assert set(recovery.damages) == {1}
    assert payloads(wal, 2) == [b"other", b"goes on"]
    wal.reset(1, 0, epoch=2, append_ns=0)
    put(wal, 1, b"healed")
    wal.sync_all()
    wal, recovery = reopen(disk)
    assert recovery.damages == {}
    assert payloads(wal, 1) == [b"healed"]


def test_a_checkpoint_shortens_recovery_and_lets_segments_go():
    """Trim, snapshot, remove: the log opens from the checkpoint, and only from it."""
    disk = MemoryDisk()
    wal, _ = reopen(disk)
    expected = []
    for number in range(50):
        expected.append(bytes([number]) * 900)
        put(wal, 1, expected[-1], count=3)
        put(wal, 2, b"two" * 30)
    floor = wal.partitions[1].row(30).segment
    wal.sync_all()
    wal.trim(floor)
    put(wal, 1, b"unsynced")
    start = wal.snapshot()
    assert not wal.is_synced(start.position)
    put(wal, 1, b"after")
    wal.truncate(1, 151, epoch=1, append_ns=1)
    wal.sync_all()
    assert wal.is_synced(start.position)
    assert wal.remove_segments_before(floor) == floor * 8192
    kept = len(wal.partitions[1])
    start = WalStart.from_arrays(start.to_arrays())
    wal, recovery = reopen(disk, start=start)
    assert (recovery.damages, recovery.findings) == ({}, [])
    assert len(payloads(wal, 1)) == kept
    assert payloads(wal, 1) == [*expected, b"unsynced"][-kept:]
    assert wal.partitions[1].log_start == 150 - (kept - 1) * 3
    _, recovery = reopen(disk)
    assert set(recovery.damages) == {1, 2}


def test_a_checkpoint_of_an_unused_log():
    """A snapshot before the first record is as good as none."""
    disk = MemoryDisk()
    wal, _ = reopen(disk)
    arrays = wal.snapshot().to_arrays()
    wal, recovery = reopen(disk, start=WalStart.from_arrays(arrays))
    put(wal, 1, b"a")
    wal.sync_all()
    wal, recovery = reopen(disk, start=WalStart.from_arrays(arrays))
    assert recovery.damages == {}
    assert payloads(wal, 1) == [b"a"]


def test_a_checkpoint_notices_what_is_gone():
    """Files that its rows lie in, or that it was taken in, are missed."""
    disk = MemoryDisk()
    wal, _ = reopen(disk)
    for number in range(20):
        put(wal, 1, bytes([number]) * 900)
    put(wal, 2, b"late")
    wal.sync_all()
    start = wal.snapshot()
    disk.remove(segment_name(1))
    _, recovery = reopen(disk, start=WalStart.from_arrays(start.to_arrays()))
    assert set(recovery.damages) == {1}
    assert recovery.damages[1].segment == 1
    assert 5 < recovery.damages[1].offset < 10
    for name in disk.list():
        disk.remove(name)
    wal, recovery = reopen(disk, start=WalStart.from_arrays(start.to_arrays()))
    assert set(recovery.damages) == {1, 2}
    assert recovery.is_damaged(99)
    with pytest.raises(DamagedError):
        put(wal, 99, b"a")


def test_broken_checkpoints_are_refused():
    """Arrays that can't be a log's state raise ValueError."""
    wal, _ = reopen(MemoryDisk())
    put(wal, 1, b"a", count=4)
    put(wal, 1, b"b", count=4)
    arrays = wal.snapshot().to_arrays()
    with pytest.raises(ValueError):
        WalStart.from_arrays({name: column for name, column in arrays.items() if name != "wal"})
    with pytest.raises(ValueError):
        WalStart.from_arrays({name: column for name, column in arrays.items() if name != "1.count"})
    with pytest.raises(ValueError):
        WalStart.from_arrays({**arrays, "1.count": np.array([4, 5])})
    with pytest.raises(ValueError):
        WalStart.from_arrays({**arrays, "1.length": np.array([4])})


def test_index_finds_every_offset():
    """Rows tile the log: every offset has exactly one row."""
    index = PartitionIndex(1)
    base = 0
    for number in range(300):
        index.append(
            RecordMeta(1, 1, 1, base, number % 5 + 1, 0), segment=number // 10, position=number, length=1
        )
        base += number % 5 + 1
    for offset in range(base):
        row = index.row(index.find(offset))
        assert row.base_offset <= offset < row.base_offset + row.count
    assert index.find(base) == -1
    assert index.find(-1) == -1
    assert index.rows_of(0, base) == (0, 300)
    assert index.rows_of(3, 4) == (2, 3)
    assert index.rows_of(7, 7) == (0, 0)
    index.trim(10)
    assert len(index) == 200
    assert index.log_start == 300
    assert index.find(299) == -1
    assert index.rows_of(0, 301) == (0, 1)
    index.truncate(300)
    assert (len(index), index.log_end) == (0, 300)
    index.append(RecordMeta(1, 1, 1, 300, 2, 0), segment=99, position=0, length=0)
    assert index.find(301) == 0


def test_threads_sync_in_order_and_prepare_ahead(tmp_path):
    """On real files: every append is synced, in order, and survives a restart."""
    disk = RealDisk(tmp_path / "wal")
    config = WalConfig(segment_bytes=65536)
    wal, _ = open_wal(disk, new_log_id=LOG_ID, config=config)
    synced, failures = [], []
    threads = WalThreads(wal, on_synced=synced.append, on_failed=failures.append)
    threads.start()
    expected = []
    for number in range(300):
        expected.append(bytes([number % 256]) * number)
        put(wal, number % 2, expected[-1], count=2)
        threads.wake()
    threads.close()
    assert failures == []
    assert [group.number for group in synced] == list(range(len(synced)))
    assert synced[-1].is_marker
    ends = [group.log_ends[1] for group in synced if 1 in group.log_ends]
    assert ends == sorted(ends)
    assert ends[-1] == 300
    assert wal.idle
    wal.close()
    wal, recovery = open_wal(disk, new_log_id=LOG_ID, config=config)
    assert (recovery.damages, recovery.findings, recovery.tail_bytes) == ({}, [], 0)
    assert payloads(wal, 0) == expected[0::2]
    assert payloads(wal, 1) == expected[1::2]
    wal.close()


def test_threads_report_a_failure_once():
    """After it the threads end and nothing more is acknowledged."""
    disk = MemoryDisk()
    wal, _ = reopen(disk)
    synced, failures = [], []
    threads = WalThreads(wal, on_synced=synced.append, on_failed=failures.append)
    disk.fail_next("sync", name=segment_name(0))
    put(wal, 1, b"a")
    threads.start()
    threads.close()
    assert synced == []
    assert len(failures) == 1
    assert wal.failed
    with pytest.raises(LogFailedError):
        put(wal, 1, b"b")
