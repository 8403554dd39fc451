"""When and how checkpoints are taken while the store serves.

One partition at a time. At one offset, the applied one, the fold's arrays are copied in one go (a memcpy) and the
producer windows are listed; remembered ids, which never change once written, are then gathered shard by shard with
the loop running in between. Files are written and synced in a thread. The manifest is switched once everything that
the judge had seen by then is committed (what was gathered may have been shaped by it) and what it covers is on this
store's own disk: others may have been faster.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import numpy as np
import numpy.typing as npt

from tallymark_protocol.errors import UnavailableError
from tallymark_runtime.clock import Clock
from tallymark_runtime.disk import Disk, DiskError
from tallymark_store import checkpoint, container
from tallymark_store.dedup.index import SHARD_COUNT
from tallymark_store.partition import Partition
from tallymark_store.store import Offload, Store

_log = logging.getLogger(__name__)

POLL_S = 0.25  # how often it is looked whether one is due
RETRY_S = 10.0  # after the disk refused


class Checkpointer:
    """Takes checkpoints of a store's partitions.

    Args:
        disk: the folder that holds a folder for each partition.
        interval_s: a checkpoint is due so long after the last, if anything was folded since.
        events_max: or after so many folded events.
    """

    def __init__(
        self,
        store: Store,
        disk: Disk,
        manifests: dict[int, checkpoint.Manifest],
        clock: Clock,
        *,
        interval_s: float,
        events_max: int,
        offload: Offload = asyncio.to_thread,
    ) -> None:
        self._store = store
        self._disk = disk
        self._manifests = manifests
        self._clock = clock
        self._interval_ns = int(interval_s * 1e9)
        self._events_max = events_max
        self._offload = offload
        self._last_ns = clock.monotonic_ns()
        self._last_events = store.events_folded
        self._lock = asyncio.Lock()
        self.count = 0  # taken since the start
        self.finished_ns = clock.monotonic_ns()  # when the last was, or the start
        self.took_ns = 0  # the last one

    async def run(self) -> None:
        """Take checkpoints for ever, whenever one is due."""
        while True:
            await asyncio.sleep(POLL_S)
            events = self._store.events_folded - self._last_events
            waited = self._clock.monotonic_ns() - self._last_ns
            if events >= self._events_max or (events > 0 and waited >= self._interval_ns):
                try:
                    await self.take()
                except DiskError as error:
                    _log.warning("no checkpoint could be written: %s", error)
                    await asyncio.sleep(RETRY_S)
                except (
                    Exception
                ):  # without checkpoints starts grow longer and longer; never end them in silence
                    _log.exception("no checkpoint could be taken")
                    await asyncio.sleep(RETRY_S)

    async def take(self) -> None:
        """Take a checkpoint of every partition and of the log's state.

        Raises:
            DiskError: the disk refused; the checkpoints before stay in force.
        """
        async with self._lock:
            began_ns = self._last_ns = self._clock.monotonic_ns()
            self._last_events = self._store.events_folded
            for partition in list(self._store.partitions.values()):
                if partition.error is None:
                    await self._try_partition(partition)
            # With damage in the log, every start is to read it again from before: to say where the damage lies.
            if all(partition.error is None for partition in self._store.partitions.values()):
                start = self._store.wal.snapshot()
                await self._store.wait_synced(start.position)
                await self._offload(checkpoint.write_wal_start, self._disk, start)
            self.count += 1
            self.finished_ns = self._clock.monotonic_ns()
            self.took_ns = self.finished_ns - began_ns

    async def _try_partition(self, partition: Partition) -> None:
        try:
            await self._take_partition(partition)
        except UnavailableError as error:
            # A leadership ended, or the copy: what was gathered is of no use, and the next time is near.
            if self._store.stopped.is_set():
                raise
            _log.info("no checkpoint of partition %d: %s", partition.partition, error)

    async def _take_partition(self, partition: Partition) -> None:
        previous = self._manifests.get(partition.partition)
        offset = partition.applied
        if offset == (0 if previous is None else previous.offset):
            return
        generation = self._store.generation(partition.partition)
        manifest, state = snapshot_parts(partition)
        id_floor = partition.dedup_floor(manifest.last_append_ns)
        ids = await self._gather_ids(partition, previous.offset if previous else 0, offset)
        seen = partition.judged_end
        disk = self._disk.at(folder(partition.partition))
        try:
            written: checkpoint.Manifest = await self._offload(
                checkpoint.write,
                disk,
                previous,
                manifest=manifest,
                state=state,
                new_ids=ids,
                id_floor=id_floor,
            )
        except checkpoint.CheckpointError as error:
            # Found while files were joined; all that is still needed is in memory.
            _log.warning("writing all event ids of partition %d anew: %s", partition.partition, error)
            ids = await self._gather_ids(partition, id_floor, offset)
            written = await self._offload(
                checkpoint.write, disk, None, manifest=manifest, state=state, new_ids=ids, id_floor=id_floor
            )
        await self._store.wait_committed(partition, seen, generation)
        await self._store.wait_durable(partition, offset)
        await self._offload(checkpoint.publish, disk, written)
        if self._store.partitions.get(partition.partition) is not partition:
            checkpoint.discard(disk)  # the copy began anew meanwhile
            return
        self._manifests[partition.partition] = written
        await self._sweep_ids(partition)

    async def _sweep_ids(self, partition: Partition) -> None:
        """Give back the memory of ids that have left the window."""
        floor = partition.committed_floor()
        if floor > partition.dedup.keep_offset:
            for _ in range(SHARD_COUNT):
                partition.dedup.sweep(floor, 1)
                await asyncio.sleep(0)

    async def _gather_ids(self, partition: Partition, since: int, offset: int) -> npt.NDArray[Any]:
        parts = []
        for shard in range(SHARD_COUNT):
            parts.append(partition.dedup.entries(shard, since, offset))
            await asyncio.sleep(0)
        return np.concatenate(parts)


def folder(partition: int) -> str:
    """The name of a partition's folder."""
    return f"p-{partition:04d}"


def snapshot_parts(partition: Partition) -> tuple[checkpoint.Manifest, dict[str, container.Part]]:
    """A partition's state at its applied offset, but for the remembered ids: all of it at once."""
    offset = partition.applied
    index = partition.index
    row = index.find(offset - 1)
    last_append_ns = index.row(row).append_ns if row >= 0 else 0
    state: dict[str, container.Part] = {
        f"fold.{name}": part for name, part in partition.fold.snapshot().items()
    }
    state["windows"] = partition.windows.entries(offset)
    manifest = checkpoint.Manifest(
        format_version=checkpoint.FORMAT_VERSION,
        partition=partition.partition,
        offset=offset,
        last_append_ns=last_append_ns,
    )
    return manifest, state
