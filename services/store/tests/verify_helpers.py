"""Small data directories of stores, whole, to be verified and spoiled."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from tallymark_protocol.identifiers import encode_event_id
from tallymark_protocol.model import AggType, AlertThreshold, DimensionFilter, UniqueType
from tallymark_runtime.catalog import Cluster
from tallymark_runtime.clock import ManualClock
from tallymark_runtime.disk import MemoryDisk
from tallymark_store import checkpoint
from tallymark_store.archive.archiver import Archiver
from tallymark_store.belonging import check_cluster
from tallymark_store.recycling import recycle_floor
from tallymark_store.replicas_file import ReplicasFile
from tallymark_store.replication.effects import Role
from tallymark_store.replication.ports import DurableState
from tallymark_store.verify import Report, Scratch, verify_store

from .payload_builder import event
from .spilled_driver import SpilledDriver
from .store_driver import BASE, WINDOW, metric

SECOND = 10**9
METRICS = (
    metric(5, code="sum", agg_type=AggType.SUM, filters=[DimensionFilter(key="z", values=["1", "2"])]),
    metric(
        6,
        code="calls",
        agg_type=AggType.COUNT,
        thresholds=[AlertThreshold(code="t", value=3, recurring=True)],
    ),
    metric(7, code="peak", agg_type=AggType.MAX),
    metric(8, code="users", agg_type=AggType.COUNT_UNIQUE, unique_type=UniqueType.STRING),
    metric(9, code="last", agg_type=AggType.LATEST),
)


async def inline(function: Any, *args: Any) -> Any:
    return function(*args)


class Directory:
    """A store's folder on a disk in memory, as a store that was stopped leaves it."""

    def __init__(self, partitions: int = 2, *, archive: bool = True) -> None:
        self.driver = SpilledDriver(partition_count=partitions)
        self.disk: MemoryDisk = self.driver.disk
        self.cluster = Cluster(partitions, cluster_id="ab" * 16, dedup_window_ns=WINDOW)
        self.sequence = 0
        mark = self.disk.create("CLUSTER")
        mark.write_sync(0, [self.cluster.cluster_id.encode()])
        replicas = ReplicasFile(self.disk)
        replicas.use_log(self.driver.wal.log_id)
        for number in range(partitions):
            replicas.save(number, DurableState(f"copy-{number}", promised=3))
            for record in METRICS:
                self.driver.schema(number, record, BASE)
        replicas.close()
        check_cluster(self.disk, self.cluster)
        self.driver.sync()
        self.archiver = self._archiver() if archive else None

    def _archiver(self) -> Archiver:
        store = SimpleNamespace(
            wal=self.driver.wal,
            partitions=self.driver.partitions,
            replicas={
                number: SimpleNamespace(copy_id=f"copy-{number}", role=Role.FOLLOWER, durable_end=2**62)
                for number in self.driver.partitions
            },
            stopped=asyncio.Event(),
        )
        return Archiver(
            store,  # type: ignore[arg-type]
            self.disk.at("archive"),
            ManualClock(BASE + 365 * 24 * 3_600 * SECOND),
            events=1,
            interval_s=1.0,
            report=lambda _: None,
            offload=inline,
        )

    def send(self, n: int, number: int = 0) -> None:
        """Append n events of all metrics, some of them late, negative, repeated or refused."""
        events = []
        for i in range(n):
            code = METRICS[i % 5].schema.code
            at = BASE + (self.sequence * 7 + i * 13) % 90 * 3_600 * SECOND - 40 * 24 * 3_600 * SECOND
            fields: dict[str, Any] = {"time": at, "id": encode_event_id(f"{self.sequence}-{i}")}
            if code == "users":
                fields |= {
                    "operation": 2 if i % 11 == 8 else 1,
                    "value": 0,
                    "text": b"\x01" + f"user-{i % 4}".encode(),
                }
            if code == "sum":
                fields["properties"] = {"z": str(i % 3), "other": "x" * (i % 5)}
            events.append(event(2**63 + i % 3, code, **{"value": (i - n // 2) * 10**11, **fields}))
        if self.sequence:
            events[0] = event(2**63, "calls", value=1, id=encode_event_id("0-1"))
        now = BASE + self.sequence * SECOND
        self.driver.append(number, events, [(7, self.sequence, BASE, n, self.sequence)], now)
        self.sequence += 1
        self.driver.sync()

    def checkpoint(self) -> None:
        for number in self.driver.partitions:
            self.driver.checkpoint(number)
        self.driver.wal_start()

    async def spilled(self) -> None:
        """Take all cells and alert records out of memory."""
        spilling = self.driver.spilling()
        await spilling.relieve()
        await spilling.relieve_alerts()

    async def archived(self) -> None:
        assert self.archiver is not None
        await self.archiver.take_all()

    def recycle(self) -> None:
        """Drop the log that checkpoints and archive cover."""
        wal = self.driver.wal
        needed = {}
        for number in wal.partitions:
            archived = self.archiver.archives[number].manifest.end_offset if self.archiver else 0
            needed[number] = min(self.driver.manifests[number].offset, archived)
        floor = recycle_floor(wal.partitions, needed, wal.synced_end.segment)
        for number, index in wal.partitions.items():
            rows = int(index.column("segment").searchsorted(floor, side="left"))
            if rows:
                last = index.row(rows - 1)
                self.driver.partitions[number].times.drop(index, last.base_offset + last.count)
        wal.trim(floor)
        start = wal.snapshot()
        self.driver.sync()
        checkpoint.write_wal_start(self.disk.at("checkpoints"), start)
        wal.remove_segments_before(floor)

    def stop(self) -> None:
        self.driver.wal.write_marker()
        self.driver.wal.sync_all()

    def verify(self, scratch: Scratch | None = None) -> Report:
        return verify_store(self.disk, cluster=self.cluster, scratch=scratch)
