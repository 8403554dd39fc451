"""Tail or damage: torn tails never cost what was synced, bad synced bytes never pass unnoticed."""

import random

import pytest

from tallymark_runtime.disk import DiskError, MemoryDisk
from tallymark_store.wal import DamagedError, RecordMeta, WalConfig, WalStart, open_wal
from tallymark_store.wal.format import (
    GROUP_HEADER_BYTES,
    RECORD_HEADER_BYTES,
    segment_name,
    segment_number,
)
from tallymark_store.wal.recovery import MixedLogError
from tallymark_store.wal.writer import Group

from .payload_builder import event
from .store_driver import BASE, Driver, metric

LOG_ID = bytes(range(16))
SMALL = WalConfig(segment_bytes=4096)


def reopen(disk, start=None):
    """Open the log in `disk`."""
    return open_wal(disk, new_log_id=LOG_ID, config=SMALL, start=start)


def put(wal, partition, payload, count=1):
    """Append one record at the partition's log end."""
    base = wal.log_end(partition)
    wal.append(RecordMeta(partition, 1, 1, base, count, 1000 + base), [payload])


def payloads(wal, partition):
    """All payloads of a partition, read and verified."""
    index = wal.partitions.get(partition)
    return (
        [] if index is None else [wal.read_record(partition, row)[1].tobytes() for row in range(len(index))]
    )


def copy_of(disk):
    """An independent disk with the same files."""
    other = MemoryDisk()
    for name in disk.list():
        file, source = other.create(name), disk.open(name)
        file.write(0, [source.read(0, source.size())])
        file.sync()
    other.sync_dir()
    return other


def build(*, marker, groups=3):
    """A log of three partitions: one group each time, partition 2 last; return it with its groups."""
    disk = MemoryDisk()
    wal, _ = reopen(disk)
    done: list[Group] = []
    for number in range(groups):
        for partition in (0, 1, 2):
            put(wal, partition, bytes([65 + number]) * (21 + partition), count=2)
            done += wal.sync_all()
    if marker:
        assert wal.write_marker()
        done += wal.sync_all()
    return disk, wal, done


def spans(wal):
    """(partition, row number, first byte, end) of every record, all in segment 0."""
    found = []
    for partition, index in wal.partitions.items():
        for number in range(len(index)):
            row = index.row(number)
            assert row.segment == 0
            found.append((partition, number, row.position, row.position + RECORD_HEADER_BYTES + row.length))
    return found


@pytest.mark.parametrize("how", ["cut", "zeros", "garbage"])
def test_a_tail_torn_at_any_byte_costs_nothing_that_was_synced(how):
    """From any byte of the last, unsynced group on the log is gone: no damage, all before it is there."""
    disk, wal, _ = build(marker=False)
    put(wal, 2, b"never acknowledged", count=3)
    put(wal, 0, b"nor this")
    group = wal.take_group()
    wal.write_group(group)
    name = segment_name(0)
    size = disk.open(name).size()
    rng = random.Random(7)
    for torn in range(group.start.position, group.end):
        broken = copy_of(disk)
        if how == "cut":
            broken.cut(name, torn)
        elif how == "zeros":
            broken.overwrite(name, torn, bytes(size - 64 - torn))
        else:
            broken.overwrite(name, torn, b"\xff" + rng.randbytes(rng.randint(0, group.end + 100 - torn)))
        for _ in range(2):
            again, recovery = reopen(broken)
            assert recovery.damages == {}, torn
            assert not recovery.unproven
            assert payloads(again, 0) == [b"A" * 21, b"B" * 21, b"C" * 21]
            assert payloads(again, 2) == [b"A" * 23, b"B" * 23, b"C" * 23]
        assert recovery.tail_bytes == 0
        put(again, 2, b"new")
        again.sync_all()
        again, recovery = reopen(broken)
        assert recovery.damages == {}
        assert payloads(again, 2) == [b"A" * 23, b"B" * 23, b"C" * 23, b"new"]


def test_a_whole_unsynced_group_may_be_kept_and_is_then_durable():
    """What was written but not synced when the process died is kept, and survives the machine's crash after."""
    disk, wal, _ = build(marker=False)
    put(wal, 1, b"written only")
    group = wal.take_group()
    disk.open(segment_name(0)).write(group.start.position, group.parts)
    wal, recovery = reopen(disk)
    assert recovery.damages == {}
    assert payloads(wal, 1)[-1] == b"written only"
    disk.crash(random.Random(1), lose_all=True)
    wal, recovery = reopen(disk)
    assert recovery.damages == {}
    assert payloads(wal, 1)[-1] == b"written only"


def test_a_bit_flipped_in_the_last_acknowledged_record_of_an_idle_log():
    """With its marker behind it, every bit of the record counts, and only its partition is damaged."""
    disk, wal, _ = build(marker=True)
    partition, number, start, end = max(spans(wal), key=lambda span: span[2])
    assert (partition, number) == (2, 2)
    for position in range(start, end):
        broken = copy_of(disk)
        broken.flip_bit(segment_name(0), position, position % 8)
        for _ in range(2):
            again, recovery = reopen(broken)
            assert set(recovery.damages) == {2}, position
            damage = recovery.damages[2]
            assert (damage.segment, damage.file, damage.offset) == (0, segment_name(0), 4)
            assert "partition 2" in damage.sentence
            assert not recovery.is_damaged(0)
            assert not recovery.is_damaged(77)
            assert payloads(again, 2) == [b"A" * 23, b"B" * 23]
            with pytest.raises(DamagedError):
                put(again, 2, b"refused")
        put(again, 1, b"goes on")
        again.sync_all()
        again, recovery = reopen(broken)
        assert set(recovery.damages) == {2}
        assert payloads(again, 1)[-1] == b"goes on"


@pytest.mark.parametrize("marker", [True, False])
def test_a_bit_flipped_in_any_earlier_record(marker):
    """Damage of that partition from that record on; the others are whole wherever something follows."""
    disk, wal, _ = build(marker=marker)
    for partition, number, start, end in spans(wal):
        if (partition, number) == (2, 2):
            continue
        for position in (*range(start, end, 3), end - 1):
            broken = copy_of(disk)
            broken.flip_bit(segment_name(0), position, position % 8)
            again, recovery = reopen(broken)
            assert partition in recovery.damages, position
            assert recovery.damages[partition].offset == number * 2
            # Without a marker nothing may follow on another partition: then nobody can prove that it is whole.
            others = set(recovery.damages) - {partition}
            assert not others or (not marker and number == 2)
            assert len(payloads(again, partition)) == number


def test_a_bit_flipped_anywhere_never_loses_a_record_silently():
    """Every byte of the file: whatever isn't there any more belongs to a partition reported as damaged."""
    disk, wal, groups = build(marker=True)
    expected = {partition: payloads(wal, partition) for partition in (0, 1, 2)}
    last = groups[-1]
    assert last.is_marker
    for position in range(last.end + 64):
        broken = copy_of(disk)
        broken.flip_bit(segment_name(0), position, position % 8)
        again, recovery = reopen(broken)
        for partition in (0, 1, 2):
            if not recovery.is_damaged(partition):
                assert payloads(again, partition) == expected[partition], position
        if position >= last.start.position:
            assert recovery.damages == {}, position  # the marker alone is gone


def test_a_flipped_group_header_costs_nothing():
    """Its records are found one by one, and a finding says so."""
    disk, wal, groups = build(marker=True)
    expected = {partition: payloads(wal, partition) for partition in (0, 1, 2)}
    for group in groups[:-1]:
        broken = copy_of(disk)
        broken.flip_bit(segment_name(0), group.start.position + 9, 4)
        again, recovery = reopen(broken)
        assert recovery.damages == {}
        assert [finding.position for finding in recovery.findings] == [group.start.position]
        assert {partition: payloads(again, partition) for partition in (0, 1, 2)} == expected


def test_a_lost_group_is_noticed_wherever_it_was():
    """A group that became zeros, wholly: whoever had records in it is damaged, nobody else."""
    disk, _wal, groups = build(marker=True)
    for number, group in enumerate(groups[:-1]):
        broken = copy_of(disk)
        broken.overwrite(segment_name(0), group.start.position, bytes(group.size))
        _, recovery = reopen(broken)
        assert set(recovery.damages) == {number % 3}


def test_a_lost_truncation_is_noticed():
    """After a truncation and new appends up to the old end, offsets alone would show nothing."""
    disk = MemoryDisk()
    wal, _ = reopen(disk)
    put(wal, 1, b"old1")
    put(wal, 1, b"old2")
    wal.sync_all()
    wal.truncate(1, 0, epoch=2, append_ns=0)
    put(wal, 1, b"new1")
    put(wal, 1, b"new2")
    (lost,) = wal.sync_all()
    put(wal, 1, b"new3")
    wal.sync_all()
    disk.overwrite(segment_name(0), lost.start.position, bytes(lost.size))
    wal, recovery = reopen(disk)
    assert set(recovery.damages) == {1}
    wal.reset(1, 9, epoch=3, append_ns=0)
    put(wal, 1, b"healed")
    wal.sync_all()
    wal, recovery = reopen(disk)
    assert recovery.damages == {}
    assert payloads(wal, 1) == [b"healed"]


def test_a_partition_lost_without_a_trace():
    """Its only record is gone and no marker followed: whoever asks for it is told that it is damaged."""
    disk = MemoryDisk()
    wal, _ = reopen(disk)
    put(wal, 5, b"only here")
    (lost,) = wal.sync_all()
    put(wal, 1, b"a")
    wal.sync_all()
    disk.overwrite(segment_name(0), lost.start.position, bytes(lost.size))
    for _ in range(3):
        wal, recovery = reopen(disk)
        assert recovery.damages == {}  # partition 1 begins with its record 0: nothing of it can be missing
        assert recovery.unproven
        assert recovery.is_damaged(5)
        assert not recovery.is_damaged(1)
    with pytest.raises(DamagedError):
        put(wal, 5, b"refused")
    wal.reset(5, 0, epoch=1, append_ns=0)
    put(wal, 5, b"again")
    wal.sync_all()
    wal, recovery = reopen(disk)
    assert not recovery.is_damaged(5)
    assert recovery.is_damaged(6)
    assert payloads(wal, 5) == [b"again"]


def fill(groups=24):
    """A log over several segments, partition 1 in every group and partition 2 in the first only."""
    disk = MemoryDisk()
    wal, _ = reopen(disk)
    put(wal, 2, b"two")
    for number in range(groups):
        put(wal, 1, bytes([number]) * 600)
        wal.sync_all()
    wal.write_marker()
    wal.sync_all()
    wal.prepare_ahead()
    return disk, wal


def test_a_missing_segment_in_the_middle():
    """The partitions that had records there are damaged, the others proven by the marker."""
    disk, wal = fill()
    assert wal.synced_end.segment >= 4
    disk.remove(segment_name(2))
    disk.sync_dir()
    for _ in range(2):
        wal, recovery = reopen(disk)
        assert set(recovery.damages) == {1}
        assert recovery.damages[1].segment == 2
        assert "missing" in recovery.damages[1].sentence
        assert payloads(wal, 2) == [b"two"]


def test_a_segment_cut_short_in_the_middle():
    """What lay behind the cut is missed."""
    disk, _ = fill()
    disk.cut(segment_name(1), 1500)
    wal, recovery = reopen(disk)
    assert set(recovery.damages) == {1}
    assert recovery.damages[1].segment == 1
    disk.cut(segment_name(3), 0)
    wal, recovery = reopen(disk)
    assert set(recovery.damages) == {1}
    assert payloads(wal, 2) == [b"two"]


@pytest.mark.parametrize("size", [0, 10, 64, 100, 4000])
def test_a_newest_segment_that_was_never_used_may_be_short(size):
    """Nothing was synced there: it is replaced without a word."""
    disk, wal = fill()
    newest = max(disk.list())
    assert newest == segment_name(wal.synced_end.segment + 1)
    before = payloads(wal, 1)
    disk.cut(newest, size)
    wal, recovery = reopen(disk)
    assert (recovery.damages, recovery.findings) == ({}, [])
    for _ in range(10):
        put(wal, 1, bytes(600))
    wal.sync_all()
    wal, recovery = reopen(disk)
    assert (recovery.damages, recovery.findings) == ({}, [])
    assert payloads(wal, 1) == before + [bytes(600)] * 10


def test_bad_segment_headers():
    """In a used segment it is reported and nothing is lost; in an unused one the file is replaced."""
    disk, wal = fill()
    before = payloads(wal, 1)
    for segment, expected in ((0, 1), (1, 1), (wal.synced_end.segment, 1), (wal.synced_end.segment + 1, 0)):
        broken = copy_of(disk)
        broken.flip_bit(segment_name(segment), 26, 1)
        for _ in range(2):
            again, recovery = reopen(broken)
            assert recovery.damages == {}
            assert payloads(again, 1) == before
        assert len(recovery.findings) == expected
        put(again, 1, b"more")
        again.sync_all()
        again, recovery = reopen(broken)
        assert recovery.damages == {}
        assert payloads(again, 1) == [*before, b"more"]


def test_a_log_with_one_segment_survives_its_header():
    """The copy at the end says which log it is; without both, nothing is trusted and nothing is removed."""
    disk, wal, _ = build(marker=True)
    before = payloads(wal, 1)
    disk.flip_bit(segment_name(0), 30)
    wal, recovery = reopen(disk)
    assert recovery.damages == {}
    assert payloads(wal, 1) == before
    disk, wal, _ = build(marker=True)
    disk.flip_bit(segment_name(0), 30)
    disk.flip_bit(segment_name(0), 4096 - 64 + 30)
    content = disk.open(segment_name(0)).read(0, 4096).tobytes()
    for _ in range(3):
        wal, recovery = open_wal(disk, new_log_id=b"another log's id", config=SMALL)
        assert recovery.is_damaged(0)
        assert recovery.is_damaged(1)
        assert disk.open(segment_name(0)).read(0, 4096).tobytes() == content
        with pytest.raises(DamagedError):
            put(wal, 1, b"refused")
        wal.reset(9, 0, epoch=1, append_ns=0)
        wal.sync_all()


def test_damage_at_the_end_stays_known_without_room_for_a_marker():
    """What recovery found on a full disk, and couldn't note, is found again once records follow."""
    disk, _, _ = build(marker=True)
    disk.flip_bit(segment_name(0), 30)
    disk.flip_bit(segment_name(0), 4096 - 64 + 30)
    disk.capacity = 4096
    wal, recovery = open_wal(disk, new_log_id=b"another log's id", config=SMALL)
    assert recovery.is_damaged(1)
    assert wal.full
    disk.capacity = None
    wal.poll_space(0)
    # Whoever writes it doesn't know better: as if no marker of this life had come first.
    wal._writer._marker_due = False
    wal.reset(9, 0, epoch=1, append_ns=0)
    wal.sync_all()
    for _ in range(2):
        wal, recovery = open_wal(disk, new_log_id=b"another log's id", config=SMALL)
        assert recovery.is_damaged(1)
        assert not recovery.is_damaged(9)


def test_a_segment_of_another_log_counts_as_bad():
    """Bytes of another log never look valid, though their own checksums are right."""
    disk, _ = fill()
    other = MemoryDisk()
    wal, _ = open_wal(other, new_log_id=b"y" * 16, config=SMALL)
    for number in range(24):
        put(wal, 1, bytes([number]) * 600)
        wal.sync_all()
    disk.overwrite(segment_name(2), 0, other.open(segment_name(2)).read(0, 4096).tobytes())
    wal, recovery = reopen(disk)
    assert set(recovery.damages) == {1}
    assert payloads(wal, 2) == [b"two"]


def test_a_copied_group_does_not_look_valid_elsewhere():
    """Bytes of this very segment at another place are no group and no record."""
    disk, wal, groups = build(marker=True)
    source = groups[2]
    data = disk.open(segment_name(0)).read(source.start.position, source.size).tobytes()
    disk.overwrite(segment_name(0), groups[5].start.position, data)
    wal, recovery = reopen(disk)
    assert set(recovery.damages) == {2}
    assert len(payloads(wal, 2)) == 1


def test_stale_bytes_behind_a_new_tail_are_never_found():
    """A long torn tail is wiped before anything shorter is written over its beginning."""
    disk, wal, _ = build(marker=False)
    for _ in range(3):
        put(wal, 1, b"S" * 200)
    group = wal.take_group()
    wal.write_group(group)
    disk.flip_bit(segment_name(0), group.start.position + 3)
    wal, recovery = reopen(disk)
    assert recovery.tail_bytes > 600
    rest = disk.open(segment_name(0)).read(group.start.position + 200, 800).tobytes()
    assert rest == bytes(800)


def test_a_read_error_is_an_error_and_not_damage():
    """EIO while recovering ends recovery; nothing was changed by it."""
    disk, wal, _ = build(marker=True)
    before = payloads(wal, 1)
    for _ in range(3):
        disk.fail_next("read", name=segment_name(0))
        with pytest.raises(DiskError):
            reopen(disk)
    wal, recovery = reopen(disk)
    assert recovery.damages == {}
    assert payloads(wal, 1) == before


def test_files_that_are_not_the_logs_are_left_alone():
    """Only interrupted preparations are cleaned up."""
    disk, _, _ = build(marker=True)
    disk.create("notes.txt")
    disk.create("wal-x.seg")
    disk.create("wal-0000000000000009.tmp")
    reopen(disk)
    assert disk.list() == ["notes.txt", segment_name(0), "wal-x.seg"]


def test_damage_from_a_checkpoint_on():
    """Started from a checkpoint, what follows is verified as strictly."""
    disk, wal, _ = build(marker=True)
    arrays = wal.snapshot().to_arrays()
    put(wal, 1, b"behind")
    (group,) = wal.sync_all()
    put(wal, 0, b"further")
    wal.sync_all()
    wal.write_marker()
    wal.sync_all()
    disk.flip_bit(segment_name(0), group.start.position + GROUP_HEADER_BYTES + RECORD_HEADER_BYTES)
    again, recovery = reopen(disk, WalStart.from_arrays(arrays))
    assert set(recovery.damages) == {1}
    assert recovery.damages[1].offset == 6
    assert payloads(again, 0)[-1] == b"further"


def test_random_damage_is_never_silent():
    """Whatever is overwritten below the marker, what an undamaged partition shows is all that it had."""
    for seed in range(150):
        rng = random.Random(seed)
        disk, wal = fill(groups=rng.randint(3, 20))
        expected = {partition: payloads(wal, partition) for partition in (1, 2)}
        end = wal.synced_end
        for _ in range(rng.randint(1, 3)):
            segment = rng.randint(0, end.segment)
            limit = 4096 if segment < end.segment else end.position - 192
            position = rng.randrange(limit)
            length = min(rng.choice((1, 3, 64, 700, 5000)), limit - position)
            disk.overwrite(
                segment_name(segment), position, rng.choice((bytes(length), rng.randbytes(length)))
            )
        first = None
        for _ in range(3):
            again, recovery = reopen(disk)
            damaged = {partition for partition in (1, 2) if recovery.is_damaged(partition)}
            assert first in (None, damaged), seed
            first = damaged
            for partition in (1, 2):
                shown = payloads(again, partition)
                assert shown == expected[partition][: len(shown)], seed
                assert partition in damaged or shown == expected[partition], seed


OTHER_ID = b"y" * 16


def log_of(log_id, *, groups=24, tail=False):
    """A log over several segments with its `WalStart`; with `tail`, a written group that was never synced."""
    disk = MemoryDisk()
    wal, _ = open_wal(disk, new_log_id=log_id, config=SMALL)
    for number in range(groups):
        put(wal, 1, bytes([number]) * 600)
        wal.sync_all()
    wal.write_marker()
    wal.sync_all()
    start = WalStart.from_arrays(wal.snapshot().to_arrays())
    if tail:
        put(wal, 1, b"torn" * 9)
        wal.write_group(wal.take_group())
        disk.flip_bit(segment_name(wal.synced_end.segment), wal.synced_end.position + 9)
    return disk, start, payloads(wal, 1)[:groups]


def contents(disk):
    """The bytes of all files."""
    return {name: disk.open(name).read(0, disk.open(name).size()).tobytes() for name in disk.list()}


def kept(disk, before):
    """Whether whatever was written in all files is still there; unused room may have been."""
    now = contents(disk)
    return all(
        len(now[name]) == len(data) and all(b in (0, a) for a, b in zip(now[name], data, strict=True))
        for name, data in before.items()
    )


def copy_segment(source, target, number, to=None):
    """Copy a segment file between disks, whatever is there."""
    name = segment_name(number if to is None else to)
    if name in target.list():
        target.remove(name)
    file, origin = target.create(name), source.open(segment_name(number))
    file.write(0, [origin.read(0, origin.size())])
    file.sync()
    target.sync_dir()


def spoil_headers(disk, names):
    """Make both headers of segments unreadable."""
    for name in names:
        disk.flip_bit(name, 30)
        disk.flip_bit(name, 4096 - 64 + 30)


@pytest.mark.parametrize("groups", [1, 5, 24, 60])
@pytest.mark.parametrize("tail", [False, True])
def test_a_start_of_another_log_is_ignored(groups, tail):
    """The whole log is read by its own id, nothing of it is removed, and it goes on."""
    disk, _, expected = log_of(LOG_ID, tail=tail)
    _, foreign, _ = log_of(OTHER_ID, groups=groups)
    before = contents(disk)
    wal, recovery = reopen(disk, foreign)
    assert (recovery.damages, recovery.unproven, recovery.start_ignored) == ({}, False, True)
    assert payloads(wal, 1) == expected
    assert ["another log" in finding.sentence for finding in recovery.findings] == [True]
    assert set(before) <= set(disk.list())
    put(wal, 1, b"more")
    wal.sync_all()
    start = WalStart.from_arrays(wal.snapshot().to_arrays())
    assert start.log_id == LOG_ID
    for known in (start, None):
        wal, recovery = reopen(disk, known)
        assert (recovery.damages, recovery.findings, recovery.start_ignored) == ({}, [], False)
        assert payloads(wal, 1) == [*expected, b"more"]


def test_a_start_of_another_log_beside_unreadable_headers_wipes_nothing():
    """With a torn end that may be the start's own log, opening is refused and every byte stays."""
    disk, _, _ = log_of(LOG_ID)
    _, foreign, _ = log_of(OTHER_ID, groups=5)
    spoil_headers(disk, [max(disk.list())])
    before = contents(disk)
    for _ in range(2):
        with pytest.raises(MixedLogError, match=max(disk.list())):
            reopen(disk, foreign)
        assert contents(disk) == before


@pytest.mark.parametrize("with_start", [None, "own", "foreign"])
def test_a_segment_of_another_log_behind_the_end_is_never_removed(with_start):
    """Opening is refused before anything is changed; without that segment it works."""
    disk, own, expected = log_of(LOG_ID)
    other, foreign, _ = log_of(OTHER_ID, groups=9)
    start = {None: None, "own": own, "foreign": foreign}[with_start]
    behind = segment_number(max(disk.list())) + 1
    copy_segment(other, disk, 1, to=behind)
    copy_segment(other, disk, 0, to=behind + 1)
    before = contents(disk)
    for _ in range(2):
        with pytest.raises(MixedLogError, match=segment_name(behind)):
            reopen(disk, start)
        assert contents(disk) == before
    disk.remove(segment_name(behind))
    disk.remove(segment_name(behind + 1))
    wal, recovery = reopen(disk, start)
    assert recovery.damages == {}
    assert payloads(wal, 1) == expected


def test_another_logs_majority_wipes_nothing():
    """One segment of a log among many of another: refused or damaged, and all files stay as they are."""
    for number in (0, 2, 6):
        disk, _, _ = log_of(LOG_ID)
        other, start, _ = log_of(OTHER_ID, groups=9)
        copy_segment(other, disk, min(number, 1), to=number)
        for known in (None, start):
            broken = copy_of(disk)
            before = contents(broken)
            try:
                _, recovery = reopen(broken, known)
            except MixedLogError:
                assert contents(broken) == before
            else:
                assert recovery.is_damaged(1)
                assert kept(broken, before)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("groups", [1, 24])
def test_a_log_of_which_no_header_is_readable_is_never_wiped(own, groups):
    """Whether the start belongs to it can't be told: all that is there stays, and its partitions are refused."""
    disk, start, _ = log_of(LOG_ID, groups=groups, tail=True)
    if not own:
        _, start, _ = log_of(OTHER_ID, groups=5)
    spoil_headers(disk, disk.list())
    before = contents(disk)
    for _ in range(2):
        _, recovery = reopen(disk, start)
        assert recovery.is_damaged(1)
        assert recovery.is_damaged(7)
        assert kept(disk, before)


def store_of(events, log_id, monkeypatch):
    """A store with a checkpoint and a start of its log, and records behind them."""
    monkeypatch.setitem(Driver.open.__globals__, "LOG_ID", log_id)
    driver = Driver()
    driver.schema(0, metric(5, code="m"), BASE)
    for sequence in range(3):
        driver.append(0, [event(i) for i in range(events)], [(7, sequence, BASE, events, sequence)], BASE)
        driver.sync()
        if sequence == 1:
            driver.checkpoint(0)
            driver.wal_start()
    return driver


@pytest.mark.parametrize("with_checkpoint", [True, False])
def test_a_store_with_the_checkpoints_of_another_folds_its_own_log(with_checkpoint, monkeypatch):
    """Neither their start of the log nor their totals are used, and the log stays whole."""
    theirs = store_of(3, OTHER_ID, monkeypatch)
    driver = store_of(40, LOG_ID, monkeypatch)
    before = driver.partitions[0].digest()
    copied = [""] if not with_checkpoint else ["", "p-0000"]
    for folder in copied:
        source, target = theirs.disk.at("checkpoints"), driver.disk.at("checkpoints")
        if folder:
            source, target = source.at(folder), target.at(folder)
        for name in [name for name in target.list() if folder or name == "wal-start"]:
            target.remove(name)
        for name in [name for name in source.list() if folder or name == "wal-start"]:
            file, origin = target.create(name), source.open(name)
            file.write(0, [origin.read(0, origin.size())])
            file.sync()
        target.sync_dir()
    for _ in range(2):
        driver.crash()
        assert driver.partitions[0].error is None
        assert driver.partitions[0].digest() == before
        assert any("another log's" in report for report in driver.reports)
        driver.check_digests()
    driver.checkpoint(0)
    driver.wal_start()
    driver.crash()
    assert driver.reports == []
    assert driver.partitions[0].digest() == before
