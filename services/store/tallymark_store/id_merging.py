"""Merging the files of remembered ids, beside the checkpoints that write and list them.

A file is made of several neighbouring ones in a worker thread, a bounded piece of the work at a time, while checkpoints
are taken, and snapshots sent and installed, as ever. The lock that checkpoints are taken under is held only to create
the file, and to exchange it for the others in the manifest that is in force by then, if that still lists them. So the
order of a checkpoint is kept: the file is durable before a manifest lists it, and the others go after that. Until then
the file is held (`Holds`), as what no manifest lists is removed with every checkpoint.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

import msgspec

from tallymark_protocol.errors import UnavailableError
from tallymark_runtime.disk import Disk, DiskError
from tallymark_store import checkpoint
from tallymark_store.partition import Partition
from tallymark_store.recycling import Holds
from tallymark_store.store import Offload, Store

_log = logging.getLogger(__name__)

MERGED_IDS_MAX = 1 << 28
_FILES = 4  # that are made one
_SMALL_IDS = 1 << 14  # files with fewer are as good as one with so many
_ANY_OFFSET = 1 << 62  # holds files, and nothing of the log


def plan_merge(counts: Sequence[int]) -> int:
    """Which four neighbouring files to make one, by how many ids they hold: the place of the first; -1: none.

    None of them may be larger than the others together: so an id is written again only as often as the number of ids
    grows fourfold, and the number of files grows with the logarithm of that of ids.
    """
    best, best_total = -1, MERGED_IDS_MAX + 1
    sizes = [max(count, _SMALL_IDS) for count in counts]
    for place in range(len(sizes) - _FILES + 1):
        some = sizes[place : place + _FILES]
        total = sum(some)
        if 2 * max(some) <= total < best_total:
            best, best_total = place, total
    return best


class IdMerger:
    """Merges id files of a store's partitions, for ever.

    Args:
        folder: gives the folder of a partition's checkpoints.
        manifests: of the checkpoints in force; shared with who takes them.
        lock: the one that checkpoints are taken under.

    Attributes:
        count: merges that were published.
    """

    def __init__(
        self,
        store: Store,
        folder: Callable[[int], Disk],
        manifests: dict[int, checkpoint.Manifest],
        holds: Holds,
        lock: asyncio.Lock,
        offload: Offload,
    ) -> None:
        self.count = 0
        self._store = store
        self._folder = folder
        self._manifests = manifests
        self._holds = holds
        self._lock = lock
        self._offload = offload
        self._wake = asyncio.Event()
        # By partition: the manifest whose files could not be merged. Only the next one is tried, which also removes
        # what was left behind.
        self._failed: dict[int, checkpoint.Manifest] = {}

    def wake(self) -> None:
        """There are new files."""
        self._wake.set()

    async def run(self) -> None:
        """Merge what there is to be merged, whenever there are new files."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            for number in sorted(self._manifests):
                try:
                    while await self.merge(number):
                        pass
                except (DiskError, checkpoint.CheckpointError, UnavailableError) as error:
                    self._give_up(number)
                    _log.warning("partition %d: files of event ids were not merged: %s", number, error)
                except Exception:
                    self._give_up(number)
                    _log.exception("partition %d: files of event ids were not merged", number)

    def _give_up(self, number: int) -> None:
        if number in self._manifests:
            self._failed[number] = self._manifests[number]

    async def merge(self, number: int) -> bool:
        """Merge a few of a partition's files, if there are such; whether there were.

        Raises:
            DiskError: the disk refuses; the manifest is as it was, or lists the merged file.
            CheckpointError: a file is damaged, or gone by now.
        """
        who = object()
        disk = self._folder(number)
        merge = None
        try:
            async with self._lock:
                manifest = self._manifests.get(number)
                partition = self._store.partitions.get(number)
                if manifest is None or partition is None or self._failed.get(number) is manifest:
                    return False
                counts = await self._offload(checkpoint.id_counts, disk, manifest.id_files)
                place = plan_merge(counts)
                if place < 0:
                    return False
                inputs = manifest.id_files[place : place + _FILES]
                name = checkpoint.ids_name(inputs[0][1], inputs[-1][2])
                self._holds.take(who, number, _ANY_OFFSET, frozenset({name}))
                # What has left the window as of the manifest, not as of now: a start must find what was in force there.
                floor = partition.dedup_floor(manifest.last_append_ns)
                merge, entry = await self._offload(checkpoint.begin_merge, disk, inputs, floor)
            while await self._offload(checkpoint.merge_step, merge):
                pass
            await self._offload(disk.sync_dir)
            async with self._lock:
                await self._exchange(partition, disk, inputs, [entry] if merge.count else [])
        except asyncio.CancelledError:
            # The process ends, and a worker thread may still be in a step: descriptors that were given back under its
            # hands might be another file's by the time it writes.
            merge = None
            raise
        finally:
            self._holds.release(who)
            if merge is not None:
                merge.close()
        return True

    async def _exchange(
        self,
        partition: Partition,
        disk: Disk,
        inputs: list[tuple[str, int, int]],
        merged: list[tuple[str, int, int]],
    ) -> None:
        """Publish the manifest in force with other files, if it still lists those that were merged."""
        number = partition.partition
        manifest = self._manifests.get(number)
        if self._store.partitions.get(number) is not partition or manifest is None:
            return
        if manifest.offset < partition.index.log_start:
            return  # a snapshot is about to take its place
        listed = manifest.id_files
        place = listed.index(inputs[0]) if inputs[0] in listed else -1
        if place < 0 or listed[place : place + len(inputs)] != inputs:
            return
        listed = [*listed[:place], *merged, *listed[place + len(inputs) :]]
        manifest = msgspec.structs.replace(manifest, id_files=listed)
        spilled_end = partition.dedup.spilled_end
        files = await self._offload(
            checkpoint.open_ids,
            disk,
            [entry for entry in listed if entry[1] < spilled_end],
            partition.dedup.files,
        )
        await self._offload(checkpoint.publish, disk, manifest, self._holds.files(number))
        if self._store.partitions.get(number) is not partition:
            # The copy began anew meanwhile; what comes in by now is for the one that there is.
            checkpoint.discard(disk, keeps_incoming=True, keeps_cells=True)
            return
        self._manifests[number] = manifest
        partition.dedup.spill(spilled_end, files)
        self.count += 1
