"""Random histories with crashes, against a model: synced means present, unsynced means a prefix of groups."""

import contextlib
import random

import pytest

from tallymark_runtime.disk import DiskError, MemoryDisk
from tallymark_store.wal import LogFullError, RecordMeta, WalConfig, WalStart, open_wal
from tallymark_store.wal.format import segment_name

LOG_ID = b"0123456789abcdef"


def frozen(model):
    """A copy of a model: partition -> (log end, [(base offset, payload)])."""
    return {partition: (end, list(records)) for partition, (end, records) in model.items()}


def content(wal):
    """Everything in the log, verified."""
    shown = {}
    for partition, index in wal.partitions.items():
        records = []
        for row in range(len(index)):
            meta, payload = wal.read_record(partition, row)
            records.append((meta.base_offset, payload.tobytes()))
        shown[partition] = (index.log_end, records)
    return shown


def change(rng, wal, model):
    """Do one random thing to the log and the model."""
    partition = rng.randrange(4)
    log_end, records = model.get(partition, (0, []))
    kind = rng.random()
    if kind < 0.06 and partition in model:
        new_end = rng.choice([log_end, *(base for base, _ in records)])
        wal.truncate(partition, new_end, epoch=1, append_ns=0)
        model[partition] = (new_end, [record for record in records if record[0] < new_end])
    elif kind < 0.08:
        start = rng.randrange(1000)
        wal.reset(partition, start, epoch=1, append_ns=0)
        model[partition] = (start, [])
    else:
        payload = rng.randbytes(rng.choice((0, 1, 30, 200, 900, 5000 if rng.random() < 0.1 else 50)))
        count = rng.randint(1, 9)
        wal.append(RecordMeta(partition, 1, 1, log_end, count, 0), [payload[:7], payload[7:]])
        model[partition] = (log_end + count, [*records, (log_end, payload)])


@pytest.mark.parametrize("block", range(6))
def test_crashes_lose_nothing_that_was_synced(block):
    """Crash at random places, tear at random places, recover, compare, go on: many lives of many logs."""
    for seed in range(block * 40, block * 40 + 40):
        rng = random.Random(seed)
        disk = MemoryDisk()
        config = WalConfig(segment_bytes=rng.choice((2048, 4096, 8192)))
        model = {}
        start = None
        wal, recovery = open_wal(disk, new_log_id=LOG_ID, config=config)
        for life in range(4):
            synced = live(rng, disk, wal, model)
            if rng.random() < 0.3 and life % 2 == 0 and wal.idle and not wal.failed:
                start = wal.snapshot().to_arrays()
            torn_write(rng, disk, wal)
            if rng.random() < 0.8:
                disk.crash(rng, torn=rng.random() < 0.8, lose_all=rng.random() < 0.1)
            use = start if start is not None and rng.random() < 0.5 else None
            wal, recovery = open_wal(
                disk,
                new_log_id=LOG_ID,
                config=config,
                start=None if use is None else WalStart.from_arrays(use),
            )
            assert recovery.damages == {}, (seed, life)
            assert not recovery.unproven
            shown = content(wal)
            assert shown in synced, (seed, life)
            model = frozen(shown)


def live(rng, disk, wal, model):
    """Run the log for a while; return the states that a crash right now may leave."""
    possible = [frozen(model)]
    pending = []  # the states after each append that isn't synced
    for _ in range(rng.randint(0, 25)):
        for _ in range(rng.randint(0, 4)):
            before = wal.buffer_bytes
            change(rng, wal, model)
            assert wal.buffer_bytes > before
            pending.append(frozen(model))
        if rng.random() < 0.3:
            wal.prepare_ahead()
        if rng.random() < 0.75:
            wal.sync_all()
            possible = [frozen(model)]
            pending = []
        if rng.random() < 0.3 and wal.write_marker():
            wal.sync_all()
    # What is still in memory may reach the disk in `torn_write`, whole groups at a time.
    return possible + pending


def torn_write(rng, disk, wal):
    """Write what waits without syncing it, or a part of it, as a process that dies in between would."""
    if rng.random() < 0.7:
        group = wal.take_group()
        if group is not None:
            disk.open(segment_name(group.start.segment)).write(group.start.position, group.parts)


@pytest.mark.parametrize("block", range(3))
def test_a_crash_during_recovery_changes_nothing(block):
    """Recover, crash in the middle of it, recover again: the same log."""
    for seed in range(block * 30, block * 30 + 30):
        rng = random.Random(seed)
        disk = MemoryDisk()
        config = WalConfig(segment_bytes=4096)
        wal, _ = open_wal(disk, new_log_id=LOG_ID, config=config)
        model = {}
        possible = live(rng, disk, wal, model)
        torn_write(rng, disk, wal)
        disk.crash(rng)
        for _ in range(4):
            disk.fail_next(rng.choice(("write", "sync", "sync_dir", "remove", "rename", "create")))
            with contextlib.suppress(DiskError):
                open_wal(disk, new_log_id=LOG_ID, config=config)
            disk.crash(rng)
        wal, recovery = open_wal(disk, new_log_id=LOG_ID, config=config)
        assert recovery.damages == {}, seed
        assert not recovery.unproven
        shown = content(wal)
        assert shown in possible, seed
        disk.crash(rng, lose_all=True)
        wal, recovery = open_wal(disk, new_log_id=LOG_ID, config=config)
        assert recovery.damages == {}, seed
        assert content(wal) == shown, seed


def test_a_disk_that_fills_up_at_random_never_costs_what_was_accepted():
    """Whatever was accepted under a capacity that comes and goes can be synced and is there after a crash."""
    for seed in range(40):
        rng = random.Random(seed)
        disk = MemoryDisk(capacity=rng.choice((5_000, 12_000, 30_000)))
        config = WalConfig(segment_bytes=4096)
        wal, _ = open_wal(disk, new_log_id=LOG_ID, config=config)
        model = {}
        refused = 0
        for step in range(80):
            try:
                change(rng, wal, model)
            except LogFullError:
                refused += 1
                disk.capacity += rng.choice((0, 0, 1000, 8000))
            wal.poll_space(step * 10**9)
            if rng.random() < 0.3:
                wal.sync_all()
                wal.write_marker()
                wal.sync_all()
        wal.sync_all()
        disk.crash(rng)
        disk.capacity = None
        wal, recovery = open_wal(disk, new_log_id=LOG_ID, config=config)
        assert recovery.damages == {}, seed
        assert content(wal) == frozen(model), seed
        assert refused or len(disk.list()) < 12
