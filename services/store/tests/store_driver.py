"""A store without a loop: partitions, their log and checkpoints on a `MemoryDisk`, driven step by step."""

from __future__ import annotations

import random
import struct
from typing import Any

import google_crc32c
import msgspec
import numpy as np

from tallymark_protocol import layout
from tallymark_protocol.model import MetricSchema
from tallymark_protocol.payload import COLUMNS
from tallymark_protocol.schema import MetricRecord, encode_record, make_record
from tallymark_runtime.disk import MemoryDisk
from tallymark_store import batch, checkpoint
from tallymark_store.checkpointer import folder, snapshot_parts, totals_parts
from tallymark_store.dedup.index import SHARD_COUNT
from tallymark_store.folding import replay
from tallymark_store.id_budget import IdBudget
from tallymark_store.id_merging import plan_merge
from tallymark_store.partition import Partition
from tallymark_store.prepared import LoggedVerdicts, Prepared
from tallymark_store.recovery import Recovered, recover
from tallymark_store.wal import RecordKind, RecordMeta, WalConfig

from .payload_builder import build_payload, place

DAY = 24 * 3_600 * 10**9
BASE = 19_789 * DAY
LOG_ID = bytes(range(16))
WAL = WalConfig(segment_bytes=64 * 1024)
WINDOW = 2 * DAY

Chunk = tuple[int, int, int, int, int]  # producer, sequence, first sent, events, checksum


def payload_of(events: list[dict[str, Any]], chunks: list[Chunk]) -> bytes:
    """A payload whose chunks carry the checksums given."""
    data = bytearray(build_payload(events, [chunk[:4] for chunk in chunks]))
    for c, chunk in enumerate(chunks):
        at = layout.PAYLOAD_HEADER_BYTES + layout.CHUNK_ENTRY_BYTES * c + 24
        struct.pack_into("<I", data, at, chunk[4])
    return bytes(data)


def metric(uid: int, **fields: Any) -> MetricRecord:
    return make_record(uid, MetricSchema(**fields))


class Driver:
    """One life of the store after another, on one disk."""

    def __init__(
        self, *, partition_count: int = 1, window_ns: int = WINDOW, seed: int = 1, id_bytes: int | None = None
    ) -> None:
        self.disk = MemoryDisk()
        self.rng = random.Random(seed)
        self.partition_count = partition_count
        self.window_ns = window_ns
        self.budget = IdBudget(id_bytes)
        self.spills_all = True  # where there is a budget; else what comes to be in files is left to chance
        self.reports: list[str] = []
        self.found: Recovered
        self.open()

    def open(self) -> None:
        self.reports = []
        self.found = recover(
            self.disk,
            partition_count=self.partition_count,
            dedup_window_ns=self.window_ns,
            wal_config=WAL,
            new_log_id=LOG_ID,
            salt=self.rng.getrandbits(63),
            report=self.reports.append,
            id_bytes=self.budget.limit_bytes,
        )
        self.wal = self.found.wal
        self.partitions = self.found.partitions
        self.manifests = self.found.manifests

    def crash(self, *, lose_all: bool = False) -> None:
        """Lose power and start again."""
        self.disk.crash(self.rng, lose_all=lose_all)
        self.open()

    # ------------------------------------------------------------ appending

    def schema(self, number: int, record: MetricRecord, now_ns: int) -> int:
        partition = self.partitions[number]
        offset = partition.log_end
        append_ns = partition.stamp(now_ns)
        meta = RecordMeta(number, RecordKind.SCHEMA, 1, offset, 1, append_ns, append_ns, append_ns)
        self.wal.append(meta, [encode_record(record)])
        partition.appended_schema(record, offset, append_ns)
        return offset

    def read(self, number: int, offset: int) -> LoggedVerdicts:
        found = self.wal.read(number, offset)
        assert found is not None
        view = batch.parse(found[1], 0, len(found[1]))
        return LoggedVerdicts(found[0].base_offset, view.verdicts, view.originals)

    def prepare(self, number: int, data: bytes, now_ns: int) -> tuple[Prepared, Any]:
        partition = self.partitions[number]
        array, columns = place(data)
        assert len(columns) == COLUMNS
        slots = partition.schemas.slots_of(array, columns)
        checksum = google_crc32c.value(data)
        prepared = partition.prepare(
            array, columns, checksum, slots, now_ns, lambda at: self.read(number, at)
        )
        return prepared, columns

    def append(self, number: int, events: list[dict[str, Any]], chunks: list[Chunk], now_ns: int) -> Prepared:
        """As the store does it, on this side of the sync."""
        prepared, _ = self.prepare(number, payload_of(events, chunks), now_ns)
        self.take(number, prepared)
        return prepared

    def take(self, number: int, prepared: Prepared) -> None:
        partition = self.partitions[number]
        if prepared.record is not None:
            meta = RecordMeta(
                number, RecordKind.EVENTS, 1, partition.log_end, prepared.event_count, prepared.append_ns,
                prepared.min_time_ns, prepared.max_time_ns,
            )  # fmt: skip
            self.wal.append(meta, prepared.record)
            partition.appended(prepared)

    def sync(self) -> None:
        """Sync, commit, send, fold."""
        self.wal.sync_all()
        for partition in self.partitions.values():
            for send in partition.commit(partition.log_end):
                send()
            while partition.error is None and partition.fold_behind:
                partition.fold_steps()

    # ------------------------------------------------------------ checkpoints

    def write_checkpoint(self, number: int) -> checkpoint.Manifest:
        """Everything before the switch."""
        partition = self.partitions[number]
        previous = self.manifests.get(number)
        since = previous.offset if previous else 0
        manifest, state = snapshot_parts(partition)
        state |= totals_parts(partition.fold.snapshot())
        floor = partition.dedup_floor(manifest.last_append_ns)
        ids = np.concatenate(
            [partition.dedup.entries(shard, since, manifest.offset) for shard in range(SHARD_COUNT)]
        )
        return checkpoint.write(
            self.checkpoints(number), previous, manifest=manifest, state=state, new_ids=ids, id_floor=floor
        )

    def checkpoints(self, number: int) -> MemoryDisk:
        return self.disk.at("checkpoints").at(folder(number))

    def checkpoint(self, number: int) -> None:
        """A checkpoint as the store takes one: switched to when all that it has seen is committed."""
        previous = self.manifests.get(number)
        if previous is not None and previous.offset == self.partitions[number].applied:
            return
        written = self.write_checkpoint(number)
        self.sync()
        checkpoint.publish(self.checkpoints(number), written)
        self.manifests[number] = written
        self.spill(number)
        partition = self.partitions[number]
        partition.dedup.sweep(partition.committed_floor(), SHARD_COUNT)

    def spill(self, number: int) -> None:
        """As the store does it after a checkpoint: forget in memory what is too much for it."""
        id_files, disk = self.manifests[number].id_files, self.checkpoints(number)
        indexes = [partition.dedup for partition in self.partitions.values()]
        dedup = self.partitions[number].dedup
        counts = zip([end for _, _, end in id_files], checkpoint.id_counts(disk, id_files), strict=True)
        end = self.budget.spill_end(dedup, indexes, list(counts))
        if end and not self.spills_all:
            ends = [end for _, _, end in id_files if end >= dedup.spilled_end]
            end = self.rng.choice([dedup.spilled_end, *ends])
        if end:
            listed = [entry for entry in id_files if entry[1] < end]
            dedup.spill(end, checkpoint.open_ids(disk, listed, dedup.files))

    def merge(self, number: int) -> bool:
        """As the store does it beside checkpoints; whether there was something to be merged."""
        manifest, disk, partition = self.manifests[number], self.checkpoints(number), self.partitions[number]
        place = plan_merge(checkpoint.id_counts(disk, manifest.id_files))
        if place < 0:
            return False
        listed = list(manifest.id_files)
        floor = partition.dedup_floor(manifest.last_append_ns)
        merge, entry = checkpoint.begin_merge(disk, listed[place : place + 4], floor)
        while checkpoint.merge_step(merge):
            pass
        merge.close()
        disk.sync_dir()
        listed[place : place + 4] = [entry] if merge.count else []
        merged = msgspec.structs.replace(manifest, id_files=listed)
        checkpoint.publish(disk, merged)
        self.manifests[number] = merged
        end = partition.dedup.spilled_end
        if end:
            spilled = [entry for entry in listed if entry[1] < end]
            partition.dedup.spill(end, checkpoint.open_ids(disk, spilled, partition.dedup.files))
        return True

    def wal_start(self) -> None:
        start = self.wal.snapshot()
        self.sync()
        assert self.wal.is_synced(start.position)
        checkpoint.write_wal_start(self.disk.at("checkpoints"), start)

    # ------------------------------------------------------------ checking

    def recount(self, number: int) -> str:
        """The digest of a count of the log from its first record."""
        counted = Partition(
            number, dedup_window_ns=self.window_ns, indexes=self.wal.partitions, salt=self.rng.getrandbits(63)
        )
        replay(self.wal, counted, self.partitions[number].applied)
        return counted.digest()

    def check_digests(self) -> None:
        """FOLD-1: what is in force is what the log says."""
        for number, partition in self.partitions.items():
            assert partition.digest() == self.recount(number)
