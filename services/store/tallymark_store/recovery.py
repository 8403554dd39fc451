"""From a data directory to partitions: log, checkpoints, and what the log holds beyond them that is committed.

The log is the truth. Where it is whole, a checkpoint that is missing or damaged only costs time: the partition is
folded again from its first record. Where it begins later, everything before is in the checkpoint only, and without one
that reaches the log's start the copy is damaged; but for a snapshot that had come in whole when the process ended,
which is published now. A damaged log is another matter: the partitions concerned are refused, with a sentence that says where
the damage lies and what to do; the others are served.

What is committed is not in the log itself. A checkpoint shows it, REPLICAS records it now and then; of a partition
whose only copy this is everything is, as it was on a majority's disks when it was on this one. Beyond that, records
stay in the log and out of all state until a leader tells.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable

import msgspec
import numpy as np

from tallymark_protocol.errors import ErrorCode, RemoteProtocolError, WireError
from tallymark_runtime.disk import Disk, DiskError
from tallymark_store import checkpoint, incoming
from tallymark_store.alert_spilling import open_alerts
from tallymark_store.archive import incoming as incoming_archive
from tallymark_store.archive.manifest import ArchiveError
from tallymark_store.checkpointer import folder
from tallymark_store.dedup.producers import ENTRY_DTYPE as WINDOW_DTYPE
from tallymark_store.fold import Fold
from tallymark_store.folding import replay
from tallymark_store.id_budget import resident_from
from tallymark_store.outcomes import Outcomes
from tallymark_store.partition import Partition
from tallymark_store.spilling import open_file, remove_unlisted
from tallymark_store.store import WAY_OUT
from tallymark_store.wal import DamagedError, Recovery, Wal, WalConfig, open_wal
from tallymark_store.window_times import WindowTimes

_log = logging.getLogger(__name__)


class Recovered(msgspec.Struct, frozen=True):
    """What a start found."""

    wal: Wal
    partitions: dict[int, Partition]
    manifests: dict[int, checkpoint.Manifest]
    recovery: Recovery
    records_replayed: int


def recover(
    disk: Disk,
    *,
    partition_count: int,
    dedup_window_ns: int,
    wal_config: WalConfig,
    new_log_id: bytes,
    salt: int,
    report: Callable[[str], None],
    committed_end: Callable[[Wal, int, checkpoint.Manifest | None], int] | None = None,
    id_bytes: int | None = None,
) -> Recovered:
    """Open a store's data directory.

    `id_bytes` is how much memory the remembered ids of all partitions may take; None: as much as they need.
    `committed_end` says of each partition below which offset its log is known to be committed; None: all of it is.

    Raises:
        DiskError: the disk cannot be read or written.
        LogVersionError: the log is of another version.
        MixedLogError: the log's folder holds segments of several logs.
    """
    checkpoints = disk.at("checkpoints")
    try:
        start = checkpoint.load_wal_start(checkpoints)
    except checkpoint.CheckpointError as error:
        report(f"reading the whole log: {error}")
        start = None
    wal, recovery = open_wal(disk.at("wal"), new_log_id=new_log_id, config=wal_config, start=start)
    for finding in recovery.findings:
        report(f"{finding.file} at {finding.position}: {finding.sentence}; no record was lost")
    partitions: dict[int, Partition] = {}
    manifests: dict[int, checkpoint.Manifest] = {}
    replayed = 0
    share = None if id_bytes is None else id_bytes // partition_count
    for number in range(partition_count):
        partition = Partition(number, dedup_window_ns=dedup_window_ns, indexes=wal.partitions, salt=salt)
        if recovery.is_damaged(number):
            partition.error = _damage_error(number, recovery)
            report(partition.error.message)
            partition.high_watermark = 0
            partitions[number] = partition
            continue
        partitions[number] = partition
        try:
            partition, manifest = _load(
                disk,
                partition,
                report,
                wal,
                dedup_window_ns,
                salt,
                foreign=recovery.start_ignored,
                id_bytes=share,
            )
            partitions[number] = partition
            if manifest is not None:
                manifests[number] = manifest
            upto = None
            if committed_end is not None:
                upto = max(committed_end(wal, number, manifest), partition.applied)
            try:
                replayed += replay(wal, partition, upto)
            except DamagedError:
                if manifest is None or not manifest.cell_files or partition.index.log_start > 0:
                    raise
                # Perhaps of a file of cells, of which little is looked at before it is needed. The log has everything.
                report(f"partition {number}: perhaps the checkpoint cannot be used, folding the log again")
                again = Partition(number, dedup_window_ns=dedup_window_ns, indexes=wal.partitions, salt=salt)
                replayed += replay(wal, again, upto)
                # So it was not the log.
                checkpoint.discard(checkpoints.at(folder(number)))
                manifests.pop(number)
                partition = partitions[number] = again
        except DamagedError as error:
            wal.mark_damaged(number)
            partition.error = _error(f"{error.message}; {WAY_OUT}")
            report(partition.error.message)
        except RemoteProtocolError as error:
            # Bytes that are as they were written, and make no sense: of a later version, or of a defect.
            partition.error = _error(f"partition {number} cannot be read back: {error.message}; {WAY_OUT}")
            report(partition.error.message)
        partition.high_watermark = partition.applied
    return Recovered(wal, partitions, manifests, recovery, replayed)


_BELOW = (
    "the state below that offset was in the checkpoint only, and can't be counted again here; raw events from below are "
    "in the archive, if there is one"
)


def _error(message: str) -> WireError:
    return WireError(int(ErrorCode.PARTITION_DAMAGED), False, message)


def _damage_error(number: int, recovery: Recovery) -> WireError:
    damage = recovery.damages.get(number)
    if damage is None:
        return _error(
            f"partition {number} may have been in a part of the log that cannot be read any more; {WAY_OUT}"
        )
    return _error(
        f"partition {number} is damaged from offset {damage.offset} on: {damage.file} at byte "
        f"{damage.position}: {damage.sentence}; {WAY_OUT}"
    )


def _load(
    root: Disk,
    partition: Partition,
    report: Callable[[str], None],
    wal: Wal,
    dedup_window_ns: int,
    salt: int,
    *,
    foreign: bool,
    id_bytes: int | None,
) -> tuple[Partition, checkpoint.Manifest | None]:
    number = partition.partition
    disk = root.at("checkpoints").at(folder(number))
    start = partition.index.log_start
    try:
        manifest = _newest(root, disk, number, start, report)
        if manifest is None:
            remove_unlisted(disk, None)
            return partition, None
        if foreign:
            # It most probably came along with it; a wrong total that goes unnoticed is the worst that can happen.
            raise checkpoint.CheckpointError("the start of the log that is kept beside it is another log's")
        if manifest.offset > partition.log_end:
            # A checkpoint is published only of what is durable, so the log has lost acknowledged records.
            raise DamagedError(
                f"partition {number}: the log ends at offset {partition.log_end}, but a checkpoint shows that "
                f"it held everything below {manifest.offset}",
                partition=number,
            )
        restore(partition, disk, manifest, salt, id_bytes)
        remove_unlisted(disk, manifest)
    except (DamagedError, DiskError, MemoryError):
        raise
    except Exception as error:
        # Whatever is wrong with it, or with the code that reads it: the log has everything.
        sentence = str(error)
        if not isinstance(error, (checkpoint.CheckpointError, RemoteProtocolError)):
            _log.exception("partition %d: restoring the checkpoint failed", number)
            sentence = f"{type(error).__name__} {error}".strip()
        if start > 0:
            raise DamagedError(
                f"partition {number}: the log begins at offset {start}, and the checkpoint cannot be used: {sentence}; "
                f"{_BELOW}",
                partition=number,
            ) from error
        report(f"partition {number}: the checkpoint cannot be used, folding the log again: {sentence}")
        if not isinstance(error, checkpoint.OtherVersionError):
            # What another version can read stays until the next checkpoint: the way back, should the log be damaged.
            checkpoint.discard(disk)
        return Partition(number, dedup_window_ns=dedup_window_ns, indexes=wal.partitions, salt=salt), None
    return partition, manifest


def _newest(
    root: Disk, disk: Disk, number: int, start: int, report: Callable[[str], None]
) -> checkpoint.Manifest | None:
    """The manifest of the newest checkpoint, which reaches the log's start; of a snapshot that had come in, at last."""
    reason = "there is no checkpoint"
    try:
        manifest = checkpoint.load_manifest(disk)
    except checkpoint.CheckpointError as error:
        if start == 0:
            raise
        manifest, reason = None, str(error)
    if manifest is not None and manifest.offset < start:
        reason = f"the checkpoint is of offset {manifest.offset}"
        manifest = None
    if start > 0 and manifest is None:
        if incoming.is_noted(disk):
            _finish_archive(root, number, start, report)
        manifest = incoming.finish(disk, number, start)
        if manifest is None:
            raise DamagedError(
                f"partition {number}: the log begins at offset {start}, and {reason}; {_BELOW}",
                partition=number,
            )
        report(f"partition {number}: the snapshot of offset {start} that had come in is in force now")
    incoming.clear(disk)
    return manifest


def _finish_archive(root: Disk, number: int, start: int, report: Callable[[str], None]) -> None:
    """Put the archive in force that came in with a snapshot, if one did; before the checkpoint, which is the mark."""
    disk = root.at("archive").at(folder(number))
    try:
        incoming_archive.finish(disk, number, start)
    except ArchiveError as error:
        # The state doesn't need it; and nothing is added to an archive that ends below the log.
        report(f"partition {number}: the archive that had come in is left out: {error}")
        incoming_archive.clear(disk)


def restore(
    partition: Partition, disk: Disk, manifest: checkpoint.Manifest, salt: int, id_bytes: int | None = None
) -> None:
    """Load a checkpoint into a new partition.

    Of remembered ids the newest are taken into memory, as far as they fit into `id_bytes` (None: all of them); the others
    are looked up where they are.

    Raises:
        CheckpointError: its files are missing or damaged, or are none of this partition at that offset.
        RemoteProtocolError: what is in them makes no sense.
    """
    state = checkpoint.load_state(disk, manifest)
    fold_parts = {
        name.removeprefix("fold."): part for name, part in state.items() if name.startswith("fold.")
    }
    spilled = [open_file(disk, name, name, partition.partition) for name in manifest.cell_files]
    alert_files = [open_alerts(disk, name, name, partition.partition) for name in manifest.alert_files]
    partition.fold = Fold.restore(
        partition.partition, fold_parts, hash_seed=salt, spilled=spilled, alert_files=alert_files
    )
    # The judge's schemas go ahead of the fold's from here on; at the checkpoint they are the same.
    partition.schemas = copy.deepcopy(partition.fold.schemas)
    windows = state["windows"]
    if not isinstance(windows, np.ndarray) or windows.dtype != WINDOW_DTYPE:
        raise checkpoint.CheckpointError("the state file holds no producer windows")
    partition.windows.load(windows)
    if partition.applied != manifest.offset:
        raise checkpoint.CheckpointError(
            f"the state file is of offset {partition.applied}, not {manifest.offset}"
        )
    partition.outcomes = Outcomes.decode(state["outcomes"])
    times = state["times"]
    if not isinstance(times, np.ndarray) or times.dtype != np.int64 or times.ndim != 2 or times.shape[1] != 2:
        raise checkpoint.CheckpointError("the state file holds no times")
    partition.times = WindowTimes(partition.dedup_window_ns, times)
    _restore_ids(partition, disk, manifest, id_bytes)
    partition.judged_end = manifest.offset
    partition.last_append_ns = manifest.last_append_ns


def _restore_ids(
    partition: Partition, disk: Disk, manifest: checkpoint.Manifest, id_bytes: int | None
) -> None:
    dedup, id_files = partition.dedup, manifest.id_files
    resident = 0
    if id_bytes is not None:
        resident = resident_from(id_bytes, checkpoint.id_counts(disk, id_files))
    if resident:
        dedup.spill(id_files[resident - 1][2], checkpoint.open_ids(disk, id_files[:resident]))
    # One at a time: each is held twice while it is taken in.
    for entry in id_files[resident:]:
        (file,) = checkpoint.open_ids(disk, [entry])
        entries = checkpoint.read_ids(file)
        dedup.reserve(len(entries))
        dedup.load(entries)
