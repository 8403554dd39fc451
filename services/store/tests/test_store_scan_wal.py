"""Scans over the real write-ahead log: what is synced, what still waits, and what is damaged."""

from __future__ import annotations

import pytest

from tallymark_protocol.model import AggType
from tallymark_runtime.disk import MemoryDisk
from tallymark_store.scan import kernels as k
from tallymark_store.scan.events import EventsScan
from tallymark_store.scan.metric import ScanMetric
from tallymark_store.scan.source import TAIL_SEGMENT, RecordCursor, WalSource
from tallymark_store.scan.totals import TotalsScan
from tallymark_store.wal import (
    RECORD_HEADER_BYTES,
    DamagedError,
    RecordKind,
    RecordMeta,
    Wal,
    WalConfig,
    open_wal,
)
from tallymark_store.wal.format import segment_name

from .scan_helpers import build_body

END = 2**63 - 1
METRIC = ScanMetric("u", 1, AggType.SUM, 0, END)
LOG_ID = bytes(range(16))
CONFIG = WalConfig(segment_bytes=4_096)


def append(wal: Wal, partition: int, first: int, n: int) -> None:
    """Events of account 1 with the values first, first + 1, ..., timed by their values."""
    events = [{"account": 1, "code": "u", "value": first + i, "time": first + i} for i in range(n)]
    base = wal.log_end(partition)
    meta = RecordMeta(partition, RecordKind.EVENTS, 1, base, n, 77, first, first + n - 1)
    body = build_body(events)
    wal.append(meta, [body[:20], body[20:]])


def control(wal: Wal, partition: int) -> None:
    wal.append(RecordMeta(partition, RecordKind.EPOCH_START, 1, wal.log_end(partition), 1, 77), [b"start"])


def total(wal: Wal, partition: int, start: int = 0, end: int = END) -> tuple[int, int]:
    scan = TotalsScan(
        WalSource(wal, partition),
        METRIC,
        account=1,
        intervals=[(start, end, 0)],
        applied=wal.log_end(partition),
    )
    while not scan.step(7):
        pass
    if not len(scan.rows):
        return 0, 0
    return int(scan.rows[0, k.R_COUNT]), int(scan.rows[0, k.R_SUM_LO])


def filled(disk: MemoryDisk) -> Wal:
    wal, _ = open_wal(disk, new_log_id=LOG_ID, config=CONFIG)
    for i in range(60):
        control(wal, 4)
        append(wal, 4, 10 * i, 10)
        append(wal, 5, 7 * i, 7)
        if i % 3 == 0:
            wal.sync_all()
    return wal


def test_synced_and_waiting_records_count_alike() -> None:
    """Over many segments, before and after the last sync, and after a restart."""
    disk = MemoryDisk()
    wal = filled(disk)
    source = WalSource(wal, 4)
    for _ in range(2):
        assert total(wal, 4) == (600, sum(range(600)))
        assert total(wal, 5) == (420, sum(range(420)))
        assert total(wal, 4, 95, 303) == (208, sum(range(95, 303)))
        assert total(wal, 6) == (0, 0)
        page = EventsScan(
            source, account=1, metric=METRIC, start_ns=5, end_ns=599, applied=wal.log_end(4), from_offset=200
        )
        page.run()
        assert [event.value for event in page.events] == list(range(181, 599))
        assert page.events[0].offset == 200
        assert (source.rows(0, END).segment != TAIL_SEGMENT).all()
        wal.sync_all()
    wal.close()
    wal, recovery = open_wal(disk, new_log_id=LOG_ID, config=CONFIG)
    assert not recovery.damages
    assert total(wal, 4) == (600, sum(range(600)))


def test_waiting_records_are_pinned() -> None:
    """What isn't on disk yet is copied when the scan is made; syncing afterwards changes nothing."""
    disk = MemoryDisk()
    wal = filled(disk)
    append(wal, 4, 1_000, 3)
    source = WalSource(wal, 4)
    pinned = source.pin(source.rows(0, END))
    assert (pinned.rows.segment == TAIL_SEGMENT).any()
    assert (pinned.rows.segment != TAIL_SEGMENT).any()
    cursor = RecordCursor(source, source.rows(0, END))
    wal.sync_all()
    assert not (source.pin(source.rows(0, END)).rows.segment == TAIL_SEGMENT).any()
    offsets = []
    while (run := cursor.next_run(25)) is not None:
        data, records = run
        offsets += records[:, k.K_BASE].tolist()
        assert not data.flags.writeable
    assert offsets == source.rows(0, END).base_offset.tolist()


def test_a_bound_inside_the_log_is_kept() -> None:
    """Records at and above the applied offset don't count."""
    disk = MemoryDisk()
    wal = filled(disk)
    bases = WalSource(wal, 4).rows(0, END).base_offset.tolist()
    for number in (0, 1, 30):
        scan = TotalsScan(
            WalSource(wal, 4), METRIC, account=1, intervals=[(0, END, 0)], applied=bases[number]
        )
        scan.run()
        assert scan.rows[:, k.R_COUNT].sum() == 10 * number


def test_a_flipped_bit_is_damage_of_that_partition_only() -> None:
    """The error names partition, segment and place; the other partition is still answered."""
    disk = MemoryDisk()
    wal = filled(disk)
    wal.sync_all()
    row = wal.partitions[4].row(41)
    assert row.kind == RecordKind.EVENTS
    for byte in (RECORD_HEADER_BYTES - 5, RECORD_HEADER_BYTES, RECORD_HEADER_BYTES + row.length - 1):
        disk.flip_bit(segment_name(row.segment), row.position + byte, 3)
        with pytest.raises(DamagedError) as caught:
            total(wal, 4)
        assert (caught.value.partition, caught.value.segment) == (4, row.segment)
        assert caught.value.position == row.position + RECORD_HEADER_BYTES
        assert total(wal, 5) == (420, sum(range(420)))
        assert total(wal, 4, 0, 200) == (200, sum(range(200)))
        disk.flip_bit(segment_name(row.segment), row.position + byte, 3)
    assert total(wal, 4) == (600, sum(range(600)))
