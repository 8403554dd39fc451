"""Alert records that leave memory: how many, to which files, and which of those are merged.

Records never change, and the newest are those that are asked for. So when a store's records take more memory than they
may, all of a partition's but the newest go to a file; who looks further back reads it from there (ADR 12).
"""

from __future__ import annotations

from collections.abc import Iterator

from tallymark_runtime.disk import Disk, FileMissingError
from tallymark_store import checkpoint
from tallymark_store.fold.alert_files import AlertFile, Ints, encode, file_bytes
from tallymark_store.fold.spilled import SpilledFileError
from tallymark_store.fold.thresholds import ALERT_BYTES
from tallymark_store.room import NO_RESERVE, Room
from tallymark_store.wal import DamagedError

HOT_RECORDS = 1 << 16  # of a partition, the newest: they stay, if they fit
MERGED_FILES = 8  # of about one size: merged then
MERGED_RECORDS_MAX = 1 << 24
_SIZES = 8  # files are of about one size up to this factor
_WRITE_BYTES = 4 * 1024 * 1024  # at a time, so that ingest's own syncs get between


def hot_records(budget_bytes: int, partitions: int) -> int:
    """How many of its newest records a partition keeps when some have to go."""
    return min(HOT_RECORDS, budget_bytes // (2 * max(partitions, 1) * ALERT_BYTES))


def mergeable(files: list[AlertFile]) -> list[AlertFile]:
    """Neighbours that are to be merged; none where there are not enough of one size."""
    runs = [files[first : first + MERGED_FILES] for first in range(len(files) - MERGED_FILES + 1)]
    alike = [run for run in runs if _is_alike([file.end - file.start for file in run])]
    # However sizes fall, there are never many files.
    if not alike and len(files) >= checkpoint.ALERT_FILES_MAX // 2:
        alike = runs
    # The smallest: where the disk has too little room for a large one, it goes on.
    return min(alike, key=lambda run: run[-1].end - run[0].start, default=[])


def _is_alike(sizes: list[int]) -> bool:
    return max(sizes) <= _SIZES * min(sizes) and sum(sizes) <= MERGED_RECORDS_MAX


def merged_parts(files: list[AlertFile]) -> Iterator[Ints]:
    """The records of neighbouring files, some at a time.

    Raises:
        DamagedError: one of them is.
    """
    for file in files:
        for _, rows in file.pieces(file.start, file.end):
            yield rows


def write_alerts(
    disk: Disk,
    name: str,
    partition: int,
    start: int,
    parts: Iterator[Ints],
    count: int,
    room: Room = NO_RESERVE,
) -> AlertFile:
    """Write and sync a file of records, and look at it. Of one that could not be written nothing stays.

    Raises:
        DiskError: the disk refuses.
        DamagedError: what is merged is damaged.
    """
    room.check(disk, name, file_bytes(count))
    with room.removed_on_failure(disk, name):
        file = disk.create(name)
        try:
            waiting = 0
            for place, data in encode(partition, start, parts, count):
                if place == 0:
                    file.sync()  # the header is what makes it one
                file.write(place, [data])
                waiting += len(data)
                if waiting >= _WRITE_BYTES:
                    file.sync()
                    waiting = 0
            file.sync()
        finally:
            file.close()
        disk.sync_dir()
        try:
            return open_alerts(disk, name, name, partition)
        except checkpoint.CheckpointError as error:
            raise DamagedError(f"partition {partition}: {error}", partition=partition) from error


def open_alerts(disk: Disk, place: str, name: str, partition: int) -> AlertFile:
    """The file of records that lies at a place, under the name that it has or will have.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    try:
        file = disk.open(place)
    except FileMissingError:
        raise checkpoint.CheckpointError(f"checkpoint file {place} is missing") from None
    try:
        return AlertFile(name, file.map(), partition)
    except SpilledFileError as error:
        raise checkpoint.CheckpointError(str(error)) from None
    finally:
        file.close()
