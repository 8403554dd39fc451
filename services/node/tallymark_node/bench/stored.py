"""The totals that a stopped server has on disk, by metric: all accounts and periods together.

No query adds up a million accounts. What a start would do is done here, on a disk that keeps everything as it is.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from tallymark_protocol import limits
from tallymark_runtime.disk import DiskError
from tallymark_runtime.read_only_disk import ReadOnlyDisk
from tallymark_store.recovery import recover
from tallymark_store.verify.overlay import OverlayDisk
from tallymark_store.verify.totals import running_totals
from tallymark_store.wal import WalConfig

_LIMB = 1 << 64


class MetricTotal(msgspec.Struct):
    """All of a metric."""

    count: int = 0
    sum: int = 0


def totals_on_disk(data_dir: Path, partition_count: int) -> dict[str, MetricTotal]:
    """By metric code, what its billing periods add up to. For aggregations that don't sum, `sum` means nothing.

    Raises:
        DiskError: the disk can't be read.
        RuntimeError: a partition can't be read back.
    """
    disk = ReadOnlyDisk(data_dir / "store")
    problems: list[str] = []
    found = recover(
        OverlayDisk(disk),
        partition_count=partition_count,
        dedup_window_ns=limits.DEDUP_WINDOW_NS,
        wal_config=WalConfig(),
        new_log_id=bytes(16),
        salt=1,
        report=problems.append,
        id_bytes=0,
    )
    totals: dict[str, MetricTotal] = {}
    try:
        for number, partition in found.partitions.items():
            if partition.error is not None:
                raise RuntimeError(f"partition {number}: {partition.error.message}")
            fold = partition.fold
            cells = running_totals(fold)
            for slot in range(fold.schemas.count):
                own = cells[cells["slot"] == slot]
                total = totals.setdefault(fold.schemas.record(slot).schema.code, MetricTotal())
                total.count += int(own["count"].sum())
                # Halves of 32 bits: the low words are unsigned, and their sum could be too large for 64 bits.
                low = own["low"].view("<u8")
                total.sum += int((low & 0xFFFFFFFF).sum()) + (int((low >> 32).sum()) << 32)
                total.sum += int(own["high"].sum()) * _LIMB
    finally:
        found.wal.close()
    return totals


__all__ = ["DiskError", "MetricTotal", "totals_on_disk"]
