"""Spilling: when and how cells leave memory for files, so that memory is bounded whatever the history.

All partitions of a store share a budget. When their cells take more, the coldest go until they take 80 % of it, a
bounded piece at a time (ADR 12):

1. units that are cold are copied to a buffer, in slices with the loop running in between;
2. a thread sorts them and writes them to a file of the partition's checkpoint folder, and syncs it;
3. the fold is given the file, and in slices what is still as it was copied leaves memory.

Alert records have a budget of their own, and go likewise, the oldest first (`alert_spilling`).

Files of about one size are merged, neighbours in age only. A file stays in the folder as long as the fold, the newest
checkpoint or who is sent a checkpoint needs it; what is left over is removed after each checkpoint (`tidy`), under the
lock that they are taken under, and at a start (`remove_unlisted`). A file that can't be written to its end goes at
once, and none is begun where the disk has no room for it: a full disk must not be kept full by what was tried.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from tallymark_protocol.errors import UnavailableError
from tallymark_runtime.disk import Disk, DiskError, FileMissingError
from tallymark_store import alert_spilling, checkpoint
from tallymark_store.checkpointer import folder
from tallymark_store.fold.alert_files import AlertFile, in_pieces
from tallymark_store.fold.spilled import (
    PIECE_RECORDS,
    Packer,
    Piece,
    SpilledFile,
    SpilledFileError,
    file_bytes_max,
    merged_records,
)
from tallymark_store.partition import Partition
from tallymark_store.room import NO_RESERVE, Room
from tallymark_store.wal import DamagedError

if TYPE_CHECKING:
    from tallymark_store.store import Offload

_log = logging.getLogger(__name__)

Ints = npt.NDArray[np.int64]
F = TypeVar("F")  # a file, as it is read

POLL_S = 0.25  # how often it is looked whether there is too much
RETRY_S = 10.0  # after the disk refused
RETRY_TURNS = 40  # after it refused a merge, the first time
RETRY_TURNS_MAX = 2_400
SPILL_TO = 0.8  # of the budget
_CELLS_LEAST = 0.25  # of the budget: so much stays for cells, whatever sets and files take
GROWTH = 1.05  # what is too much and cannot go is put up with, until it is so much more
WAITS_MAX = 240  # or has been so often: meanwhile some of it may be over
SLICE_ROWS = 1 << 15  # looked at between two turns of the loop
SLICE_RECORDS = 1 << 14  # of units that are taken out of memory likewise
MERGED_FILES = 8  # of about one size: merged then
_SIZES = 8  # files are of about one size up to this factor


class Holder(Protocol):
    """Who has partitions: a store."""

    @property
    def partitions(self) -> dict[int, Partition]:
        """The copies that are here, by their numbers."""


class Spilling:
    """Keeps the cells of a store's partitions within a budget.

    Args:
        store: whose partitions.
        disk: the folder that holds a folder for each partition's checkpoints.
        budget_bytes: for the cells of all partitions; None: as much as they need, and there are files only from a life
            that had a budget.
        alert_budget_bytes: for their alert records, likewise.
        token: of this process: no two lives of a store give their files the same names.
        on_damage: told that a partition's file cannot be trusted.
        reserve_bytes: of the disk, that are left to others.

    Attributes:
        spilled_units: since the start.
        spilled_alerts: likewise.
        merges: likewise.
    """

    def __init__(
        self,
        store: Holder,
        disk: Disk,
        *,
        budget_bytes: int | None,
        alert_budget_bytes: int | None = None,
        token: int,
        offload: Offload,
        on_damage: Callable[[Partition, DamagedError], None],
        piece_records: int = PIECE_RECORDS,
        reserve_bytes: int = 0,
    ) -> None:
        self.spilled_units = self.spilled_alerts = self.merges = 0
        self._store = store
        self._disk = disk
        self._budget_bytes = budget_bytes
        self._alert_budget_bytes = alert_budget_bytes
        self._token = token
        self._offload = offload
        self._on_damage = on_damage
        self._piece_records = piece_records
        self._room = Room(reserve_bytes)
        self._count = 0  # of names given
        self._in_vain_bytes = 0  # what was left the last time, if it was too much
        self._waits = 0  # how often that was put up with since
        self._is_short = False  # whether more could have gone
        self._turns = 0  # of merging
        # By partition and kind of file: the turn from which a merge is tried again, how often it failed, its records.
        self._failures: dict[tuple[int, str], tuple[int, int, int]] = {}
        self._writing: set[tuple[int, str]] = set()  # files that nobody lists yet

    async def run(self) -> None:
        """Keep within the budget for ever."""
        while True:
            await asyncio.sleep(POLL_S)
            # One that fails doesn't keep the others from it.
            has_failed = False
            for step in (self.relieve, self.relieve_alerts, self.merge):
                try:
                    await step()
                except DiskError as error:
                    _log.warning("cells could not be spilled: %s", error)
                    has_failed = True
                except Exception:  # without it memory grows; never end it in silence
                    _log.exception("cells could not be spilled")
                    has_failed = True
            if has_failed:
                await asyncio.sleep(RETRY_S)

    async def relieve(self) -> None:
        """Take the coldest cells out of memory if they take more than they may.

        Raises:
            DiskError: the disk refused, of some partition; what it refused is as it was.
        """
        if self._budget_bytes is None:
            return
        cells, sets = self._taken()
        taken = cells + sets
        # What files keep in memory can't go.
        kept = sum(partition.fold.spilled.memory_bytes for partition in self._served())
        budget = max(self._budget_bytes - kept, int(_CELLS_LEAST * self._budget_bytes))
        if taken <= budget:
            return
        if self._in_vain_bytes and taken <= GROWTH * self._in_vain_bytes and self._waits < WAITS_MAX:
            self._waits += 1
            return
        self._waits = 0
        self._is_short = False
        # Large open sets stay where they are: the cells that are in use must not go in their place.
        least = min(_CELLS_LEAST * self._budget_bytes, budget)
        fraction = 1.0 - max(SPILL_TO * budget / taken, min(least / max(cells, 1), 1.0))
        refused: DiskError | None = None
        for partition in self._served():
            try:
                await self.spill(partition, fraction)
            except DiskError as error:
                refused = error
            except UnavailableError as error:
                self._gave_up(partition, error)
        if refused is not None:
            raise refused
        left = sum(self._taken())
        self._in_vain_bytes = left if left > budget and not self._is_short else 0

    async def relieve_alerts(self) -> None:
        """Take the oldest alert records out of memory if they take more than they may.

        Raises:
            DiskError: the disk refused, of some partition; what it refused is as it was.
        """
        budget, served = self._alert_budget_bytes, self._served()
        if budget is None or sum(partition.fold.alert_bytes() for partition in served) <= budget:
            return
        hot = alert_spilling.hot_records(budget, len(served))
        refused: DiskError | None = None
        for partition in served:
            try:
                await self._spill_alerts(partition, hot)
            except DiskError as error:
                refused = error
            except UnavailableError as error:
                self._gave_up(partition, error)
        if refused is not None:
            raise refused

    def _gave_up(self, partition: Partition, error: UnavailableError) -> None:
        if isinstance(error, DamagedError):
            self._on_damage(partition, error)
        else:
            _log.info("partition %d: nothing is spilled: %s", partition.partition, error)

    async def merge(self) -> None:
        """Merge neighbours of about one size, while there are enough of them, the smallest first.

        Where the disk refuses, it is tried again later, the later the more often that has failed; smaller files are
        merged meanwhile. Spilling goes on in any case.
        """
        self._turns += 1
        for partition in self._served():
            for kind, work in (("cells", self._merge), ("alerts", self._merge_alerts)):
                key = (partition.partition, kind)
                try:
                    await work(partition, key)
                except DiskError as error:
                    _log.warning("partition %d: %s could not be merged: %s", partition.partition, kind, error)
                except UnavailableError as error:
                    self._gave_up(partition, error)

    def _may_merge(self, key: tuple[int, str], records: int) -> bool:
        """Whether a merge of so many records, or a smaller one, has not just failed."""
        turn, _, least = self._failures.get(key, (0, 0, 0))
        return self._turns >= turn or records < least

    def _merge_failed(self, key: tuple[int, str], records: int) -> None:
        _, count, _ = self._failures.get(key, (0, 0, 0))
        self._failures[key] = (
            self._turns + min(RETRY_TURNS << count, RETRY_TURNS_MAX),
            min(count + 1, 16),
            records,
        )

    async def _spill_alerts(self, partition: Partition, hot: int) -> None:
        self._check(partition)
        fold = partition.fold
        start = fold.alert_files.end
        count = fold.alert_count - start - hot
        if count <= 0 or len(fold.alert_files.files) >= checkpoint.ALERT_FILES_MAX:
            return
        rows = fold.oldest_alerts(count)
        file, key = await self._write_alerts(partition, start, in_pieces(rows), count)
        fold.forget_alerts(file)
        self._writing.discard(key)
        self.spilled_alerts += count

    async def _merge_alerts(self, partition: Partition, key: tuple[int, str]) -> None:
        fold = partition.fold
        while old := alert_spilling.mergeable(fold.alert_files.files):
            count = old[-1].end - old[0].start
            if not self._may_merge(key, count):
                return
            parts = alert_spilling.merged_parts(old)
            try:
                file, written = await self._write_alerts(partition, old[0].start, parts, count)
            except DiskError:
                self._merge_failed(key, count)
                raise
            fold.alert_files.replace(old, file)
            self._writing.discard(written)
            self._failures.pop(key, None)
            self.merges += 1

    async def _write_alerts(
        self, partition: Partition, start: int, parts: Iterator[Ints], count: int
    ) -> tuple[AlertFile, tuple[int, str]]:
        """Write a file of alert records; as `_written`."""
        self._count += 1
        name = checkpoint.alerts_name(self._token, self._count)
        return await self._written(partition, name, alert_spilling.write_alerts, start, parts, count)

    def _taken(self) -> tuple[int, int]:
        """Bytes of memory that cells and sets take."""
        folds = [partition.fold for partition in self._served()]
        return sum(fold.cell_bytes() for fold in folds), sum(fold.set_bytes() for fold in folds)

    def _served(self) -> list[Partition]:
        return [partition for partition in self._store.partitions.values() if partition.error is None]

    def _check(self, partition: Partition) -> None:
        """See that a partition still is the one that is here, after an await.

        Raises:
            UnavailableError: its copy was discarded or replaced.
        """
        if self._store.partitions.get(partition.partition) is not partition or partition.error is not None:
            raise UnavailableError(f"this copy of partition {partition.partition} was discarded")

    async def _may_change(self, partition: Partition) -> None:
        """Wait until a partition's totals may change. Raises as `_check`."""
        await partition.hold.wait()
        self._check(partition)

    def _folder(self, number: int) -> Disk:
        return self._disk.at(folder(number))

    async def spill(self, partition: Partition, fraction: float) -> None:
        """Take about a fraction of a partition's cells out of memory, the coldest.

        Raises:
            DiskError: the disk refused.
            UnavailableError: the copy was discarded meanwhile.
        """
        fold = partition.fold
        cut = fold.coldest(fraction, partition.last_append_ns)
        set_sizes = np.zeros(0, dtype=np.int32)
        for counted in fold.set_sizes():
            set_sizes = counted
            await asyncio.sleep(0)
            self._check(partition)
        row = 0
        while row < fold.cell_rows:
            if len(fold.spilled.files) >= checkpoint.CELL_FILES_MAX:
                # More could not be sent to another copy. The next turn goes on, with fewer files if they could be merged.
                self._is_short = True
                return
            piece = Piece(cut, fold.cell_rows, self._piece_records)
            while row < fold.cell_rows:
                end = min(row + SLICE_ROWS, fold.cell_rows)
                row = fold.collect(piece, row, end, set_sizes)
                await asyncio.sleep(0)
                self._check(partition)
                if row < end:
                    break  # the piece is full
            if not piece.unit_count:
                continue
            for _ in fold.collect_sets(piece):
                await asyncio.sleep(0)
                self._check(partition)
            file, key = await self._write(
                partition, piece.sorted_records(), piece.record_count, piece.unit_count
            )
            fold.add_spilled(file)
            self._writing.discard(key)
            # Rankings wait for the whole of it: behind each of them, memory would only shrink slice by slice.
            async with partition.hold.taken():
                first = 0
                while first < piece.unit_count:
                    self._check(partition)
                    end = piece.end_of_slice(first, SLICE_RECORDS)
                    self.spilled_units += fold.evict(piece, first, end)
                    first = end
                    await asyncio.sleep(0)
            self._check(partition)

    async def _write(
        self, partition: Partition, records: Iterator[Ints], record_count: int, unit_count: int
    ) -> tuple[SpilledFile, tuple[int, str]]:
        """Write a file of units; as `_written`."""
        self._count += 1
        name = checkpoint.cells_name(self._token, self._count)
        return await self._written(partition, name, write_file, records, record_count, unit_count)

    async def _written(
        self, partition: Partition, name: str, write: Callable[..., F], *args: Any
    ) -> tuple[F, tuple[int, str]]:
        """Write a file; it is counted as being written until the caller has given it to the fold."""
        number = partition.partition
        key = (number, name)
        self._writing.add(key)
        try:
            file: F = await self._offload(write, self._folder(number), name, number, *args, self._room)
            await self._may_change(partition)
        except DamagedError:
            # Files are also missing because the copy began anew meanwhile: that is no damage, least of all to the new one.
            self._writing.discard(key)
            self._check(partition)
            raise
        except BaseException:
            self._writing.discard(key)
            raise
        return file, key

    async def _merge(self, partition: Partition, key: tuple[int, str]) -> None:
        fold = partition.fold
        while old := _mergeable(fold.spilled.files):
            count = sum(part.records for part in old)
            if not self._may_merge(key, count):
                return
            records = merged_records(partition.partition, old)
            try:
                file, written = await self._write(partition, records, count, sum(part.units for part in old))
            except DiskError:
                self._merge_failed(key, count)
                raise
            fold.replace_spilled(old, file)
            self._writing.discard(written)
            self._failures.pop(key, None)
            self.merges += 1

    async def tidy(self, partition: Partition, kept: Iterable[str]) -> None:
        """Remove files of cells and alerts that nobody needs: neither the fold nor who keeps some.

        The lock that checkpoints are taken under is held.

        Raises:
            DiskError: the disk refused.
        """
        number = partition.partition
        disk = self._folder(number)
        names: list[str] = await self._offload(
            disk.list
        )  # before anything else: what is created later is not in it
        needed = {*kept, *partition.fold.spilled.names, *partition.fold.alert_files.names}
        needed |= {name for of, name in self._writing if of == number}
        if self._store.partitions.get(number) is not partition:
            return
        await self._offload(
            _remove,
            disk,
            [name for name in names if name.startswith(checkpoint.SPILLED) and name not in needed],
        )


def _mergeable(files: list[SpilledFile]) -> list[SpilledFile]:
    """Neighbours, the newest first, that are to be merged; none where there are not enough of one size.

    Every file has about as many records as those before it or more, so that each record is written again once for each
    power of `MERGED_FILES` that there are.
    """
    runs = [files[first : first + MERGED_FILES] for first in range(len(files) - MERGED_FILES + 1)]
    alike = [run for run in runs if _is_alike([file.records for file in run])]
    # However sizes fall, there are never many files.
    if not alike and len(files) >= checkpoint.CELL_FILES_MAX // 2:
        alike = runs
    # The smallest: where the disk has too little room for a large one, it goes on.
    return min(alike, key=lambda run: sum(file.records for file in run), default=[])


def _is_alike(sizes: list[int]) -> bool:
    return max(sizes) <= _SIZES * max(min(sizes), 1)


def write_file(
    disk: Disk,
    name: str,
    partition: int,
    records: Iterator[Ints],
    record_count: int,
    unit_count: int,
    room: Room = NO_RESERVE,
) -> SpilledFile:
    """Write and sync a file of units, and look at it. Of one that could not be written nothing stays.

    Raises:
        DiskError: the disk refuses.
        DamagedError: what is merged is damaged.
    """
    room.check(disk, name, file_bytes_max(record_count, unit_count))
    with room.removed_on_failure(disk, name):
        file = disk.create(name)
        try:
            packer = Packer(partition, records_max=record_count, units_max=unit_count)
            for part in records:
                place, data = packer.add(part)
                if len(data):
                    file.write(place, [data])
                    file.sync()
            *parts, header = packer.finish()
            for place, data in parts:
                file.write(place, [data])
            file.sync()
            file.write(header[0], [header[1]])
            file.sync()
        finally:
            file.close()
        disk.sync_dir()
        try:
            return open_file(disk, name, name, partition)
        except checkpoint.CheckpointError as error:
            raise DamagedError(f"partition {partition}: {error}", partition=partition) from error


def open_file(disk: Disk, place: str, name: str, partition: int) -> SpilledFile:
    """The file of units that lies at a place, under the name that it has or will have.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    try:
        file = disk.open(place)
    except FileMissingError:
        raise checkpoint.CheckpointError(f"checkpoint file {place} is missing") from None
    try:
        return SpilledFile(name, file.map(), partition)
    except SpilledFileError as error:
        raise checkpoint.CheckpointError(str(error)) from None
    finally:
        file.close()


def remove_unlisted(disk: Disk, manifest: checkpoint.Manifest | None) -> None:
    """Remove what a life before has left: files of cells and alerts that its last checkpoint doesn't list.

    Only before anybody spills. What can't be removed stays for `tidy`.
    """
    listed = set() if manifest is None else set(checkpoint.files_of(manifest))
    try:
        names = [name for name in disk.list() if name.startswith(checkpoint.SPILLED) and name not in listed]
        _remove(disk, names)
    except DiskError as error:
        _log.warning("files that were left over could not be removed: %s", error)


def _remove(disk: Disk, names: list[str]) -> None:
    for name in names:
        try:
            disk.remove(name)
        except FileMissingError:
            continue
    if names:
        disk.sync_dir()
