"""Every byte of a checkpoint's files of cells, alerts and event ids, looked at before they become somebody else's.

These files are read where they lie, and of each only the block that is needed is compared with its checksum. A copy of
such a file would be as good as the file: what rots in one would be in all of them, and in each backup, before anybody
reads it. So whoever hands a checkpoint on looks at its files first, and so does who takes one.
"""

from __future__ import annotations

from tallymark_runtime.disk import Disk
from tallymark_store import checkpoint
from tallymark_store.alert_spilling import open_alerts
from tallymark_store.dedup import IdFileError
from tallymark_store.partition import Partition
from tallymark_store.spilling import open_file
from tallymark_store.wal import DamagedError


class UnsoundError(checkpoint.CheckpointError):
    """A file of a checkpoint is not as it was written.

    Attributes:
        name: of the file.
    """

    def __init__(self, name: str, message: str) -> None:
        super().__init__(message)
        self.name = name


def check_files(disk: Disk, manifest: checkpoint.Manifest) -> None:
    """See that a checkpoint's files of cells, alerts and ids are as they were written. It reads all of them.

    Raises:
        UnsoundError: one isn't, or is missing.
        DiskError: one can't be read.
    """
    number = manifest.partition
    for open_one, names in ((open_file, manifest.cell_files), (open_alerts, manifest.alert_files)):
        for name in names:
            try:
                file = open_one(disk, name, name, number)
            except checkpoint.CheckpointError as error:
                raise UnsoundError(name, str(error)) from None
            for position in file.damage():
                if position >= 0:
                    raise UnsoundError(name, f"checkpoint file {name} is damaged at byte {position}")
    for entry in manifest.id_files:
        try:
            (ids,) = checkpoint.open_ids(disk, [entry])
            ids.verify(0, len(ids.fences))
        except (checkpoint.CheckpointError, IdFileError) as error:
            raise UnsoundError(entry[0], str(error)) from None


def damage_in_use(partition: Partition, error: checkpoint.CheckpointError) -> DamagedError | None:
    """What unsoundness means for a copy: damage, if it reads from that very file; else its next checkpoint has none of it."""
    if not isinstance(error, UnsoundError):
        return None
    fold = partition.fold
    used = {*fold.spilled.names, *fold.alert_files.names, *(file.name for file in partition.dedup.files)}
    if error.name not in used:
        return None
    return DamagedError(f"partition {partition.partition}: {error}", partition=partition.partition)
