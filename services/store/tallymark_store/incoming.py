"""A snapshot on its way in: its files in the partition's checkpoint folder, under names of their own.

Files arrive as `in-<place>`, in pieces. When all of them are there, synced, and have been looked at, `in-COMPLETE` is
written, a container with the manifest to be: from then on a start can finish what is left to do (`finish`). Publishing
gives the files the names that the manifest lists, writes the manifest and removes everything else::

    in-0 in-1 ...                         discarded by the next start
    in-0 in-1 ... in-COMPLETE             the log is emptied to begin at the snapshot, and synced
    state-<X> in-1 ... in-COMPLETE        a log that begins at X, and no checkpoint that reaches it: finished
    state-<X> ids-... in-COMPLETE MANIFEST
    state-<X> ids-... MANIFEST

Nothing of a peer is trusted: its names only have to say what a checkpoint's names say.
"""

from __future__ import annotations

import re

import google_crc32c
import msgspec

from tallymark_protocol.errors import RemoteProtocolError
from tallymark_runtime.disk import Disk, File, FileMissingError
from tallymark_store import checkpoint
from tallymark_store.archive.incoming import MANIFEST_BYTES_MAX as ARCHIVE_MANIFEST_BYTES_MAX
from tallymark_store.replication.membership import MEMBERS_MAX
from tallymark_store.replication.messages import Offer

FILES_MAX = 2 * checkpoint.ID_FILES_MAX + 2 + checkpoint.CELL_FILES_MAX + checkpoint.ALERT_FILES_MAX
FILE_BYTES_MAX = 1 << 44
PREFIX = checkpoint.INCOMING
_COMPLETE = f"{PREFIX}COMPLETE"
_READ_BYTES = 4 * 1024 * 1024
_IDS = re.compile(r"ids-(\d{20})-(\d{20})")
_CELLS = re.compile(r"cells-[0-9a-f]{16}-\d{8,19}")
_ALERTS = re.compile(r"alerts-[0-9a-f]{16}-\d{8,19}")


class _Complete(msgspec.Struct, frozen=True):
    manifest: checkpoint.Manifest
    files: list[tuple[str, int, int]]  # in the order of their places


def manifest_of(offer: Offer) -> checkpoint.Manifest:
    """The manifest of the checkpoint that is offered.

    Raises:
        RemoteProtocolError: it is none.
    """
    if not 0 < len(offer.files) <= FILES_MAX or not offer.members or offer.offset <= 0:
        raise RemoteProtocolError("a snapshot is offered without files or members, or with too many")
    if (
        len(offer.members) > MEMBERS_MAX
        or len({node for node, _ in offer.members}) != len(offer.members)
        or not -1 <= offer.members_offset < offer.offset
    ):
        raise RemoteProtocolError("a snapshot is offered with members that cannot be")
    if any(not 0 < size <= FILE_BYTES_MAX or not 0 <= crc < 2**32 for _, size, crc in offer.files):
        raise RemoteProtocolError("a snapshot is offered with a file of a size or checksum that cannot be")
    if offer.archive is not None:
        size, crc = offer.archive
        if not 0 < size <= ARCHIVE_MANIFEST_BYTES_MAX or not 0 <= crc < 2**32:
            raise RemoteProtocolError(
                "a snapshot is offered with an archive of a size or checksum that cannot be"
            )
    (state, _, _), *others = offer.files
    if state != checkpoint.state_name(offer.offset):
        raise RemoteProtocolError(f"a snapshot of offset {offer.offset} is offered without its state")
    id_files = []
    since = 0
    cell_files: list[str] = []
    alert_files: list[str] = []
    for name, _, _ in others:
        if _CELLS.fullmatch(name) and not alert_files and name not in cell_files:
            cell_files.append(name)
            continue
        if _ALERTS.fullmatch(name) and name not in alert_files:
            alert_files.append(name)
            continue
        found = None if cell_files or alert_files else _IDS.fullmatch(name)
        start, end = (int(digits) for digits in found.groups()) if found else (0, 0)
        if not since <= start < end <= offer.offset:
            raise RemoteProtocolError(f"a snapshot of offset {offer.offset} is offered with {name[:80]!r}")
        id_files.append((checkpoint.ids_name(start, end), start, end))
        since = end
    return checkpoint.Manifest(
        checkpoint.CELLS_FORMAT_VERSION if cell_files or alert_files else checkpoint.FORMAT_VERSION,
        offer.partition,
        offer.offset,
        offer.append_ns,
        state,
        id_files,
        offer.last_epoch,
        [(offer.members_offset, list(offer.members))],
        cell_files,
        alert_files,
    )


def clear(disk: Disk) -> None:
    """Remove whatever has come in."""
    # The mark goes first, and durably: without it nothing here is ever taken for whole.
    names = [name for name in disk.list() if name.startswith(PREFIX)]
    for name in sorted(names, key=lambda name: name != _COMPLETE):
        try:
            disk.remove(name)
        except FileMissingError:
            continue
        if name == _COMPLETE:
            disk.sync_dir()
    if names:
        disk.sync_dir()


def create(disk: Disk, place: int) -> File:
    """The file at a place of the offer, to be filled."""
    return disk.create(f"{PREFIX}{place}")


def file_size(disk: Disk, name: str) -> int:
    """The bytes of a file that is sent. Raises DiskError."""
    file = disk.open(name)
    try:
        return file.size()
    finally:
        file.close()


def read_piece(disk: Disk, name: str, position: int, length: int) -> bytes:
    """A piece of a file that is sent. Raises DiskError."""
    file = disk.open(name)
    try:
        return file.read(position, length).tobytes()
    finally:
        file.close()


def checksum(disk: Disk, name: str, size: int) -> int:
    """The CRC-32C of a file of `size` bytes.

    Raises:
        CheckpointError: it is of another size, or gone.
    """
    try:
        file = disk.open(name)
    except FileMissingError:
        raise checkpoint.CheckpointError(f"checkpoint file {name} is missing") from None
    try:
        if file.size() != size:
            raise checkpoint.CheckpointError(f"checkpoint file {name} has {file.size()} bytes, not {size}")
        crc = 0
        for position in range(0, size, _READ_BYTES):
            crc = google_crc32c.extend(crc, file.read(position, min(_READ_BYTES, size - position)))
        return int(crc)
    finally:
        file.close()


def staged(manifest: checkpoint.Manifest) -> checkpoint.Manifest:
    """The manifest with the names that the files have while they are coming in: to look at them."""
    names = (f"{PREFIX}{place}" for place, _ in enumerate(checkpoint.files_of(manifest)))
    return msgspec.structs.replace(
        manifest,
        state_file=next(names),
        id_files=[(next(names), start, end) for _, start, end in manifest.id_files],
        cell_files=[next(names) for _ in manifest.cell_files],
        alert_files=[next(names) for _ in manifest.alert_files],
    )


def complete(disk: Disk, manifest: checkpoint.Manifest, offer: Offer) -> None:
    """Note durably that all files are here, synced and sound."""
    note = msgspec.msgpack.encode(_Complete(manifest, list(offer.files)))
    temporary = f"{_COMPLETE}.new"
    checkpoint.write_container(disk, temporary, {"complete": note})
    disk.rename(temporary, _COMPLETE)
    disk.sync_dir()


def is_complete(disk: Disk, manifest: checkpoint.Manifest) -> bool:
    """Whether all of a snapshot is still here, noted as complete; its bytes have been looked at before."""
    names = set(disk.list())
    return _COMPLETE in names and all(
        f"{PREFIX}{place}" in names for place, _ in enumerate(checkpoint.files_of(manifest))
    )


def is_noted(disk: Disk) -> bool:
    """Whether a snapshot is here that was noted as complete."""
    return _COMPLETE in disk.list()


def finish(disk: Disk, partition: int, offset: int) -> checkpoint.Manifest | None:
    """Publish the snapshot of `offset` that is here, complete; None if it isn't.

    Does what a process did not get to between emptying the log and publishing, or does it again.
    """
    if _COMPLETE not in disk.list():
        return None
    try:
        part = checkpoint.read_container(disk, _COMPLETE).get("complete")
        found = msgspec.msgpack.decode(part if isinstance(part, bytes) else b"", type=_Complete)
        if (found.manifest.partition, found.manifest.offset) != (partition, offset):
            return None
        names = disk.list()
        for place, (name, size, crc) in enumerate(found.files):
            incoming = f"{PREFIX}{place}"
            if checksum(disk, incoming if incoming in names else name, size) != crc:
                return None
        publish(disk, found.manifest)
    except (checkpoint.CheckpointError, msgspec.DecodeError):
        return None
    return found.manifest


def publish(disk: Disk, manifest: checkpoint.Manifest) -> None:
    """Make a complete snapshot the partition's newest checkpoint, durably.

    Raises:
        DiskError: the disk refuses; `finish` does it later.
        CheckpointError: a file is neither there as it came in nor under its name; nothing is published.
    """
    names = disk.list()
    for place, name in enumerate(checkpoint.files_of(manifest)):
        if f"{PREFIX}{place}" in names:
            disk.rename(f"{PREFIX}{place}", name)
        elif name not in names:
            raise checkpoint.CheckpointError(f"checkpoint file {name} is missing")
    disk.sync_dir()
    checkpoint.publish(disk, manifest)
    clear(disk)
