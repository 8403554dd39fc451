"""Checkpoints of one partition: everything a restart needs besides the log from one offset on.

A partition's folder holds::

    MANIFEST              which files make up the newest checkpoint (a container of one MessagePack part)
    state-<offset>        cells, sets, thresholds, alerts, schemas, producer windows, recent outcomes, times
    ids-<from>-<to>       remembered event ids whose events lie in [from, to) (`dedup.id_file`); listed by many
    cells-...             cells that are not in memory (`spilling`): as they were at the offset, or too new for that
    alerts-...            the oldest alert records, where they are not in memory (`alert_spilling`); likewise
    in-...                a snapshot of another copy that is coming in (`incoming`)

Remembered ids are by far the largest part and never change once written, so each checkpoint adds only those
since the one before; small files are made one beside that (`id_merging`), and where there are too many all the same,
a checkpoint does so itself. The order is: files written and synced, folder synced,
manifest written under another name, synced, renamed, folder synced, and only then are files removed that the
new manifest doesn't list. A crash at any step leaves the old manifest whole or the new one.

Beside the partitions' folders lies `wal-start`: the log's own state at a synced position, so that recovery reads
only what follows. Its age and the partitions' are independent of each other.

A checkpoint may have seen records beyond its own offset while it was gathered (see `Partition`), so the driver
switches the manifest only once everything that was in the log by then is committed.

The log may end where a checkpoint begins: with it comes whatever else was to be known of the log below, such as who
the members were, and the epoch and time of the last record.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from tallymark_runtime.disk import Disk, DiskError, FileMissingError
from tallymark_store import container
from tallymark_store.dedup import IdFile, IdFileError, IdMerge, open_id_file, write_id_file
from tallymark_store.wal import WalStart

FORMAT_VERSION = 3
CELLS_FORMAT_VERSION = (
    4  # of a manifest that lists files of cells or alerts: who doesn't know them must not go on
)
CELL_FILES_MAX = 128  # of a partition
ALERT_FILES_MAX = 256  # likewise
ID_FILES_MAX = 32  # more are joined into one
ID_FILE_BYTES = 33  # of an id in a file, at least
MEMBERSHIPS_MAX = 16  # in a manifest, the last ones
INCOMING = "in-"  # what names of files begin with that are not to be touched here
CELLS = "cells-"  # likewise, as only who has spilled them knows who needs them
ALERTS = "alerts-"  # likewise
SPILLED = (CELLS, ALERTS)
_MANIFEST = "MANIFEST"
_WAL_START = "wal-start"
_WRITE_BYTES = 4 * 1024 * 1024  # at a time, so that ingest's own syncs get between


class Manifest(msgspec.Struct, frozen=True):
    """What a checkpoint consists of."""

    format_version: int
    partition: int
    offset: int  # state of everything below; exclusive
    last_append_ns: int  # of the last record below `offset`
    state_file: str = ""
    id_files: list[tuple[str, int, int]] = []  # name, from, to
    epoch: int = 0  # of the last record below `offset`
    # Memberships below `offset`, ascending: where the record lies (-1: the founding one), (node id, copy id).
    memberships: list[tuple[int, list[tuple[str, str]]]] = []
    cell_files: list[str] = []  # what of the cells is not in the state file; the newest first
    alert_files: list[str] = []  # what of the alert records is not in the state file; the oldest first


def files_of(manifest: Manifest) -> list[str]:
    """The names of all files that a checkpoint consists of, in the order in which they are sent."""
    return [
        manifest.state_file,
        *(name for name, _, _ in manifest.id_files),
        *manifest.cell_files,
        *manifest.alert_files,
    ]


class CheckpointError(Exception):
    """A checkpoint's files are missing or damaged; the message says which and how."""


class OtherVersionError(CheckpointError):
    """It was written by another version, which can read it."""


def state_name(offset: int) -> str:
    """The name of the state file of a checkpoint."""
    return f"state-{offset:020d}"


def ids_name(start: int, end: int) -> str:
    """The name of a file of event ids."""
    return f"ids-{start:020d}-{end:020d}"


def cells_name(token: int, number: int) -> str:
    """The name of a file of cells: the `number`-th of the life of a store that has this token."""
    return f"{CELLS}{token & (2**64 - 1):016x}-{number:08d}"


def alerts_name(token: int, number: int) -> str:
    """The name of a file of alert records, likewise."""
    return f"{ALERTS}{token & (2**64 - 1):016x}-{number:08d}"


def write_container(disk: Disk, name: str, parts: dict[str, container.Part]) -> None:
    """Write and sync a file of named parts."""
    file = disk.create(name)
    try:
        position = 0
        for buffer in container.encode(parts):
            raw = np.frombuffer(buffer, dtype=np.uint8) if isinstance(buffer, bytes) else buffer
            for start in range(0, len(raw), _WRITE_BYTES):
                piece = raw[start : start + _WRITE_BYTES]
                file.write(position, [piece])
                file.sync()
                position += len(piece)
        file.sync()
    finally:
        file.close()


def read_container(disk: Disk, name: str) -> dict[str, container.Part]:
    """Read such a file.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    try:
        file = disk.open(name)
    except FileMissingError:
        raise CheckpointError(f"checkpoint file {name} is missing") from None
    try:
        return container.decode(file.read(0, file.size()))
    except container.ContainerError as error:
        raise CheckpointError(f"checkpoint file {name}: {error}") from None
    finally:
        file.close()


def load_manifest(disk: Disk) -> Manifest | None:
    """The newest checkpoint's manifest; None where there never was one.

    Raises:
        CheckpointError: when it is damaged or of a format this version does not know.
    """
    if _MANIFEST not in disk.list():
        return None
    raw = read_container(disk, _MANIFEST).get("manifest")
    try:
        manifest = msgspec.msgpack.decode(raw if isinstance(raw, bytes) else b"", type=Manifest)
    except msgspec.DecodeError as error:
        raise CheckpointError(f"the manifest cannot be read: {error}") from None
    if manifest.format_version not in (FORMAT_VERSION, CELLS_FORMAT_VERSION):
        raise OtherVersionError(
            f"the checkpoint has format version {manifest.format_version}; "
            f"this software reads versions {FORMAT_VERSION} and {CELLS_FORMAT_VERSION}"
        )
    return manifest


def load_state(disk: Disk, manifest: Manifest) -> dict[str, container.Part]:
    """The parts of the state file."""
    return read_container(disk, manifest.state_file)


def open_ids(
    disk: Disk, id_files: Iterable[tuple[str, int, int]], known: Iterable[IdFile] = ()
) -> list[IdFile]:
    """Files of remembered ids, opened; of `known` those that cover the same.

    Raises:
        CheckpointError: one is missing, or what of it is read at once is damaged.
    """
    open_files = {(file.start, file.end): file for file in known}
    try:
        return [
            open_files.get((start, end)) or open_id_file(disk, name, start, end)
            for name, start, end in id_files
        ]
    except IdFileError as error:
        raise CheckpointError(str(error)) from None


def id_counts(disk: Disk, id_files: Iterable[tuple[str, int, int]]) -> list[int]:
    """About how many ids each of the files holds, by its length.

    Raises:
        CheckpointError: one is missing.
    """
    counts = []
    for name, _, _ in id_files:
        try:
            file = disk.open(name)
        except FileMissingError:
            raise CheckpointError(f"checkpoint file {name} is missing") from None
        try:
            counts.append(file.size() // ID_FILE_BYTES)
        finally:
            file.close()
    return counts


def load_ids(disk: Disk, manifest: Manifest) -> list[npt.NDArray[Any]]:
    """The remembered ids, one array a file, oldest first."""
    return [read_ids(file) for file in open_ids(disk, manifest.id_files)]


def read_ids(file: IdFile) -> npt.NDArray[Any]:
    """All that a file of ids holds.

    Raises:
        CheckpointError: it is damaged.
    """
    try:
        return file.entries()
    except IdFileError as error:
        raise CheckpointError(str(error)) from None


def begin_merge(
    disk: Disk, id_files: list[tuple[str, int, int]], id_floor: int
) -> tuple[IdMerge, tuple[str, int, int]]:
    """Begin to make one file of several neighbouring ones; returns the work, and what to list instead of them.

    Ids of events below `id_floor` are left behind.

    Raises:
        CheckpointError: one of them is missing or damaged.
    """
    start, end = id_files[0][1], id_files[-1][2]
    name = ids_name(start, end)
    return IdMerge(disk, open_ids(disk, id_files), name, id_floor), (name, start, end)


def merge_step(merge: IdMerge) -> bool:
    """Do a part of the work of a merge; False when it is done.

    Raises:
        CheckpointError: one of the files is damaged.
        DiskError: the disk refuses.
    """
    try:
        return merge.step()
    except IdFileError as error:
        raise CheckpointError(str(error)) from None


def write(
    disk: Disk,
    previous: Manifest | None,
    *,
    manifest: Manifest,
    state: dict[str, container.Part],
    new_ids: npt.NDArray[Any],
    id_floor: int,
) -> Manifest:
    """Write the files of a checkpoint and make them durable; `publish` then makes it the newest.

    Args:
        disk: the partition's folder.
        previous: the checkpoint before; its id files are listed again as far as they are still needed.
        manifest: the new one; its file names are filled in here.
        state: the parts of the state file.
        new_ids: remembered ids of [previous.offset, manifest.offset).
        id_floor: ids of events below it have left the dedup window.

    Returns:
        The manifest to publish.

    Raises:
        DiskError: when the disk refuses; the checkpoint before stays in force.
        CheckpointError: when an id file that was to be joined is damaged; write again with `previous` None and all
            ids.
    """
    since = previous.offset if previous else 0
    listed = [entry for entry in (previous.id_files if previous else []) if entry[2] > id_floor]
    if len(new_ids):
        name = ids_name(since, manifest.offset)
        write_id_file(disk, name, new_ids, since, manifest.offset)
        listed.append((name, since, manifest.offset))
        if len(listed) > ID_FILES_MAX:
            listed = _merged(disk, listed, id_floor)
    state_file = state_name(manifest.offset)
    if previous is not None and previous.state_file == state_file:
        return previous
    write_container(disk, state_file, state)
    disk.sync_dir()
    return msgspec.structs.replace(manifest, state_file=state_file, id_files=listed)


def _merged(disk: Disk, id_files: list[tuple[str, int, int]], id_floor: int) -> list[tuple[str, int, int]]:
    merge, entry = begin_merge(disk, id_files, id_floor)
    try:
        while merge_step(merge):
            pass
    finally:
        merge.close()
    return [entry] if merge.count else []


def publish(disk: Disk, manifest: Manifest, kept: frozenset[str] = frozenset()) -> None:
    """Make a written checkpoint the newest, durably, and remove what neither it lists nor `kept`."""
    temporary = _MANIFEST + ".new"
    write_container(disk, temporary, {"manifest": msgspec.msgpack.encode(manifest)})
    disk.rename(temporary, _MANIFEST)
    disk.sync_dir()
    listed = {_MANIFEST, *files_of(manifest), *kept}
    # The new one is in force: what can't be removed now must not look like a failure of that, and goes with the next.
    with contextlib.suppress(DiskError):
        for name in disk.list():
            if name not in listed and not name.startswith((INCOMING, *SPILLED)):
                disk.remove(name)


def write_wal_start(disk: Disk, start: WalStart) -> None:
    """Make a synced state of the log the one that recovery begins at."""
    temporary = _WAL_START + ".new"
    write_container(disk, temporary, dict(start.to_arrays()))
    disk.rename(temporary, _WAL_START)
    disk.sync_dir()


def load_wal_start(disk: Disk) -> WalStart | None:
    """The state of the log that recovery begins at; None where there is none.

    Raises:
        CheckpointError: when it is damaged.
    """
    if _WAL_START not in disk.list():
        return None
    arrays = {
        name: part for name, part in read_container(disk, _WAL_START).items() if not isinstance(part, bytes)
    }
    try:
        return WalStart.from_arrays(arrays)
    except ValueError as error:
        raise CheckpointError(f"checkpoint file {_WAL_START}: {error}") from None


def discard(disk: Disk, *, keeps_incoming: bool = False, keeps_cells: bool = False) -> None:
    """Forget every checkpoint here (the log is whole, and everything follows from it; or the copy begins anew).

    With `keeps_incoming` without what is coming in, which is for the copy that has begun since; with `keeps_cells`
    without files of cells and alerts, which may be that copy's, too: who has spilled them knows.
    """
    for name in [_MANIFEST, *disk.list()]:
        if (keeps_incoming and name.startswith(INCOMING)) or (keeps_cells and name.startswith(SPILLED)):
            continue
        try:
            disk.remove(name)
        except FileMissingError:
            continue
    disk.sync_dir()
