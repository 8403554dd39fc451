"""When and how checkpoints are taken while the store serves, and the log below them dropped.

One partition at a time. At one offset, the applied one, the fold's arrays are copied in one go (a memcpy) and the
producer windows are listed; remembered ids, which never change once written, are then gathered shard by shard with
the loop running in between. Files are written and synced in a thread. The manifest is switched once everything that
the judge had seen by then is committed (what was gathered may have been shaped by it) and what it covers is on this
store's own disk: others may have been faster. After that, where ids take more memory than they may, the oldest are
looked up in the checkpoint's files from then on, and leave it (`DedupIndex.spill`).

With `recycle`, segments that no partition needs any more go after that, in this order: checkpoints of all partitions
are durable, and so are the archives, where raw events are to be kept; the indexes forget what lies in those segments; the log's state without it is durable; the files are
removed, in a thread. A crash at any point leaves a log from which everything follows that a checkpoint doesn't hold.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tallymark_protocol.errors import UnavailableError
from tallymark_runtime.clock import Clock
from tallymark_runtime.disk import Disk, DiskError
from tallymark_store import checkpoint, container, incoming
from tallymark_store.dedup.id_file import ENTRY_DTYPE
from tallymark_store.dedup.index import SHARD_COUNT, DedupIndex
from tallymark_store.id_budget import IdBudget
from tallymark_store.id_merging import IdMerger
from tallymark_store.partition import Partition
from tallymark_store.recycling import Holds, recycle_floor
from tallymark_store.replication.ports import Membership
from tallymark_store.store import Offload, Store
from tallymark_store.wal import DamagedError

if TYPE_CHECKING:
    from tallymark_store.archive.archiver import Archiver

if TYPE_CHECKING:
    from tallymark_store.spilling import Spilling

_log = logging.getLogger(__name__)

POLL_S = 0.25  # how often it is looked whether one is due
RETRY_S = 10.0  # after the disk refused


class Checkpointer:
    """Takes checkpoints of a store's partitions.

    Args:
        disk: the folder that holds a folder for each partition.
        interval_s: a checkpoint is due so long after the last, if anything was folded since.
        events_max: or after so many folded events.
        holds: who keeps more of log and files than the newest checkpoints do.
        archiver: where raw events have another home: then only what it has durably is dropped, too.
        expire_holds: called before the log is dropped: who has kept something for too long lets go.
        recycle: whether the log below the checkpoints is dropped.
        id_budget: how much memory remembered ids may take.
        spilling: who has files of cells that are to be kept with a checkpoint, or not any longer.

    Attributes:
        merger: merges files of remembered ids; it runs beside this.
        lock: held while a checkpoint is taken; whoever else changes checkpoints takes it.
        recycled_bytes: of log files that were removed.
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
        holds: Holds,
        expire_holds: Callable[[], None] = lambda: None,
        recycle: bool = False,
        id_budget: IdBudget | None = None,
        archiver: Archiver | None = None,
        spilling: Spilling | None = None,
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
        self._holds = holds
        self._expire_holds = expire_holds
        self._recycle = recycle
        self._id_budget = id_budget or IdBudget(None)
        self._archiver = archiver
        self._spilling = spilling
        self.lock = asyncio.Lock()
        self.merger = IdMerger(
            store, lambda number: disk.at(folder(number)), manifests, holds, self.lock, offload
        )
        self.recycled_bytes = 0
        self.count = 0  # taken since the start
        self.finished_ns = clock.monotonic_ns()  # when the last was, or the start
        self.took_ns = 0  # the last one

    async def run(self) -> None:
        """Take checkpoints for ever, whenever one is due."""
        while True:
            await asyncio.sleep(POLL_S)
            events = self._store.events_folded - self._last_events
            waited = self._clock.monotonic_ns() - self._last_ns
            is_due = events >= self._events_due() or (events > 0 and waited >= self._interval_ns)
            if is_due or (events > 0 and self._id_budget.is_full(self._indexes())):
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

    def _events_due(self) -> int:
        """After how many events the next one is due: at least as many as there are cells in memory.

        A checkpoint writes all of those. So it writes about a hundred bytes for each event at most, and a start folds no
        more events than it loads cells, or than the setting says.
        """
        folds = [partition.fold for partition in self._store.partitions.values()]
        return max(self._events_max, sum(fold.cell_count - fold.spilled_cell_count for fold in folds))

    async def take(self) -> None:
        """Take a checkpoint of every partition and of the log's state.

        Raises:
            DiskError: the disk refused; the checkpoints before stay in force.
        """
        async with self.lock:
            began_ns = self._last_ns = self._clock.monotonic_ns()
            self._last_events = self._store.events_folded
            for partition in list(self._store.partitions.values()):
                if partition.error is None:
                    await self._try_partition(partition)
            # With damage in the log, every start is to read it again from before: to say where the damage lies.
            if all(partition.error is None for partition in self._store.partitions.values()):
                wal = self._store.wal
                floor = self._trim() if self._recycle else 0
                start = wal.snapshot()
                await self._store.wait_synced(start.position)
                await self._offload(checkpoint.write_wal_start, self._disk, start)
                if floor:
                    self.recycled_bytes += await self._offload(wal.remove_segments_before, floor)
            self.count += 1
            self.finished_ns = self._clock.monotonic_ns()
            self.took_ns = self.finished_ns - began_ns
        self.merger.wake()

    def _indexes(self) -> list[DedupIndex]:
        return [partition.dedup for partition in self._store.partitions.values()]

    def _trim(self) -> int:
        """Have the indexes forget what no partition needs any more; the lowest segment that is left."""
        self._expire_holds()
        wal = self._store.wal
        needed = {number: self._holds.lowest(number, self._needed(number)) for number in wal.partitions}
        floor = recycle_floor(wal.partitions, needed, wal.synced_end.segment)
        for number, index in wal.partitions.items():
            rows = int(index.column("segment").searchsorted(floor, side="left"))
            if rows:
                last = index.row(rows - 1)
                self._store.partitions[number].times.drop(index, last.base_offset + last.count)
        wal.trim(floor)
        return floor

    def _needed(self, number: int) -> int:
        """The lowest offset of a partition that is in its log only."""
        manifest = self._manifests.get(number)
        offset = 0 if manifest is None else manifest.offset
        return offset if self._archiver is None else min(offset, self._archiver.end_offset(number))

    async def _try_partition(self, partition: Partition) -> None:
        try:
            await self._take_partition(partition)
        except UnavailableError as error:
            # A leadership ended, or the copy: what was gathered is of no use, and the next time is near.
            if self._store.stopped.is_set():
                raise
            _log.info("no checkpoint of partition %d: %s", partition.partition, error)

    async def _take_partition(self, partition: Partition) -> None:
        disk = self._disk.at(folder(partition.partition))
        # Before anything is written: this checkpoint's files may have the names of the snapshot's.
        await finish_incoming(
            self._store, self._manifests, disk, partition, self._offload, archiver=self._archiver
        )
        previous = self._manifests.get(partition.partition)
        if partition.applied == (0 if previous is None else previous.offset):
            await self._tidy(partition, previous)
            return
        generation = self._store.generation(partition.partition)
        replica = self._store.replicas.get(partition.partition)
        async with self._store.folding.held(partition) as run:
            offset = partition.applied
            memberships = [] if replica is None else replica.memberships_below(offset)
            manifest, state = snapshot_parts(partition, memberships)
            id_floor = partition.dedup_floor(manifest.last_append_ns)
            state |= totals_parts(await run(partition.fold.snapshot))
        if partition.error is not None:
            return
        ids = await self._gather_ids(partition, previous.offset if previous else 0, offset)
        seen = partition.judged_end
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
            if partition.dedup.spilled_end > id_floor:
                damage = DamagedError(
                    f"partition {partition.partition}: {error}", partition=partition.partition
                )
                self._store.refuse(partition, damage)
                return
            # Found while files were joined; all that is still needed is in memory.
            _log.warning("writing all event ids of partition %d anew: %s", partition.partition, error)
            ids = await self._gather_ids(partition, id_floor, offset)
            written = await self._offload(
                checkpoint.write, disk, None, manifest=manifest, state=state, new_ids=ids, id_floor=id_floor
            )
        await self._store.wait_committed(partition, seen, generation)
        await self._store.wait_durable(partition, offset)
        await self._offload(checkpoint.publish, disk, written, self._holds.files(partition.partition))
        if self._store.partitions.get(partition.partition) is not partition:
            # The copy began anew meanwhile, or with a snapshot; and what comes in by now is for the one that there is.
            checkpoint.discard(disk, keeps_incoming=True, keeps_cells=True)
            return
        self._manifests[partition.partition] = written
        await self._tidy(partition, written)
        spilled_end = partition.dedup.spilled_end
        await self._spill_ids(partition, disk, written)
        await self._sweep_ids(partition, has_spilled=partition.dedup.spilled_end > spilled_end)

    async def _tidy(self, partition: Partition, manifest: checkpoint.Manifest | None) -> None:
        """Have files of cells and alerts removed that neither the checkpoint in force nor anybody else needs."""
        if self._spilling is None:
            return
        listed = [] if manifest is None else checkpoint.files_of(manifest)
        await self._spilling.tidy(partition, [*listed, *self._holds.files(partition.partition)])

    async def _spill_ids(self, partition: Partition, disk: Disk, manifest: checkpoint.Manifest) -> None:
        """Look old ids up in the files of the checkpoint in force, if ids take more memory than they may."""
        dedup = partition.dedup
        end = dedup.spilled_end
        if self._id_budget.is_exceeded(self._indexes()):
            counts = await self._offload(checkpoint.id_counts, disk, manifest.id_files)
            ends = [end for _, _, end in manifest.id_files]
            end = self._id_budget.spill_end(dedup, self._indexes(), list(zip(ends, counts, strict=True)))
        if end == 0:
            return
        # Also where no more is spilled: files that have left the window are let go.
        listed = [entry for entry in manifest.id_files if entry[1] < end]
        files = await self._offload(checkpoint.open_ids, disk, listed, dedup.files)
        if self._store.partitions.get(partition.partition) is partition:
            dedup.spill(end, files)

    async def _sweep_ids(self, partition: Partition, *, has_spilled: bool) -> None:
        """Give back the memory of ids that have left the window, or are in files only."""
        floor = partition.committed_floor()
        if has_spilled or floor > partition.dedup.keep_offset:
            for _ in range(SHARD_COUNT):
                partition.dedup.sweep(floor, 1)
                await asyncio.sleep(0)

    async def _gather_ids(self, partition: Partition, since: int, offset: int) -> npt.NDArray[Any]:
        parts = []
        for shard in range(SHARD_COUNT):
            parts.append(partition.dedup.entries(shard, since, offset).view(np.uint64))
            await asyncio.sleep(0)
        return np.concatenate(parts).view(
            ENTRY_DTYPE
        )  # structs would be matched field by field, array by array


def folder(partition: int) -> str:
    """The name of a partition's folder."""
    return f"p-{partition:04d}"


async def finish_incoming(
    store: Store,
    manifests: dict[int, checkpoint.Manifest],
    disk: Disk,
    partition: Partition,
    offload: Offload,
    *,
    archiver: Archiver | None = None,
) -> None:
    """Publish the snapshot that a copy began with, if that has failed before.

    Until then it is all of the copy that is on disk, beside a log that begins there. Call it with the lock that
    checkpoints are taken under held, before anything is written to their folder or removed.

    Raises:
        DiskError: it failed again.
        UnavailableError: the copy was discarded meanwhile.
    """
    number, start = partition.partition, partition.index.log_start
    manifest = manifests.get(number)
    if partition.error is not None or start == 0 or (manifest is not None and manifest.offset >= start):
        return
    await store.wait_durable(partition, start)
    if archiver is not None:
        await archiver.install(number, start)
    found: checkpoint.Manifest | None = await offload(incoming.finish, disk, number, start)
    if store.partitions.get(number) is not partition:
        checkpoint.discard(disk, keeps_cells=True)
        raise UnavailableError(f"this copy of partition {number} was discarded")
    if found is not None:
        manifests[number] = found
        _log.info("partition %d: the snapshot of offset %d was published late", number, start)


def totals_parts(snapshot: Mapping[str, container.Part]) -> dict[str, container.Part]:
    """The totals' part of a checkpoint, of the fold's snapshot."""
    return {f"fold.{name}": part for name, part in snapshot.items()}


def snapshot_parts(
    partition: Partition, memberships: Sequence[Membership] = ()
) -> tuple[checkpoint.Manifest, dict[str, container.Part]]:
    """A partition's state at its applied offset, at once, but for the remembered ids and the totals."""
    offset = partition.applied
    index = partition.index
    state: dict[str, container.Part] = {
        "windows": partition.windows.entries(offset),
        "outcomes": partition.outcomes.encode(offset),
        "times": partition.times.below(index, offset),
    }
    cell_files, alert_files = partition.fold.spilled.names, partition.fold.alert_files.names
    is_spilled = bool(cell_files or alert_files)
    manifest = checkpoint.Manifest(
        format_version=checkpoint.CELLS_FORMAT_VERSION if is_spilled else checkpoint.FORMAT_VERSION,
        partition=partition.partition,
        offset=offset,
        last_append_ns=index.append_ns_before(offset),
        epoch=index.epoch_before(offset),
        memberships=[
            (membership.offset, [(member.node_id, member.copy_id) for member in membership.members])
            for membership in memberships[-checkpoint.MEMBERSHIPS_MAX :]
        ],
        cell_files=cell_files,
        alert_files=alert_files,
    )
    return manifest, state
