"""An archive on its way in, with a snapshot: its files in the partition's archive folder, under names of their own.

A copy that begins with a snapshot of offset X gets the events below X with it: the sender's files, but for those that it
has already. What is offered may reach beyond X, as others archive when they like: the file in which X lies is cut, so
that the archive ends where the log begins. It may also begin later than this copy's own, or have gaps: what this copy has of
that it keeps (`own_parts`), and what nobody has is a gap that the manifest tells of. The archive that results is this
copy's own, and carries its id::

    in-events-<from>-<to>.parquet ...                     of no meaning; kept for another try, removed at a start
    in-events-... in-MANIFEST.json                        whole: put in force once the log that begins at X is on disk
    events-... in-events-... in-MANIFEST.json             the files get their names
    events-... in-MANIFEST.json MANIFEST.json             in force; the mark goes, and what isn't listed

`finish` does all of that, from whichever step on. The checkpoint of the snapshot is published behind it: so a start
that finds a log without a checkpoint finds this undone or done, and does it (again).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import google_crc32c
import msgspec

from tallymark_runtime.disk import Disk, FileMissingError
from tallymark_store.archive import manifest as manifests
from tallymark_store.archive.manifest import INCOMING, ArchiveError, ArchiveFile, Manifest

MANIFEST_BYTES_MAX = 64 * 1024 * 1024  # of one that is offered: some hundred thousand files
_FILE_BYTES_MAX = 1 << 44
_STAGED = INCOMING + manifests.NAME
_READ_BYTES = 4 * 1024 * 1024


def staged_name(name: str) -> str:
    """The name that a file has while it is coming in."""
    return INCOMING + name


def offered(data: bytes, partition: int, offset: int) -> Manifest:
    """The manifest that was sent with a snapshot of `offset`.

    Raises:
        ArchiveError: it is none of this partition that holds everything below.
    """
    manifest = manifests.decode(data)
    if manifest.partition != partition or manifest.end_offset < offset:
        raise ArchiveError(
            f"the archive that is offered is of partition {manifest.partition}, and ends at offset {manifest.end_offset}"
        )
    if any(not 0 < file.bytes <= _FILE_BYTES_MAX for file in manifest.files):
        raise ArchiveError("an archive is offered with a file of a size that cannot be")
    return manifest


def plan(disk: Disk, manifest: Manifest, offset: int) -> list[int]:
    """Which of the offered files with events below `offset` are to be fetched, by their places in the manifest.

    Whatever else is coming in is forgotten. What is here is looked at, byte by byte: files of this copy's archive, and
    of a try before.

    Raises:
        DiskError: the disk can't be read.
    """
    wanted = {file.name: place for place, file in enumerate(manifest.files) if file.start_offset < offset}
    names = set(disk.list())
    if _STAGED in names:
        disk.remove(_STAGED)
        disk.sync_dir()
    for name in names:
        if name.startswith(INCOMING) and name != _STAGED and name[len(INCOMING) :] not in wanted:
            disk.remove(name)
    missing = []
    for name, place in wanted.items():
        file = manifest.files[place]
        # One that reaches beyond is this copy's own under no circumstances.
        is_here = file.end_offset <= offset and is_sound(disk, name, file)
        if not is_here and not is_sound(disk, staged_name(name), file):
            missing.append(place)
    return missing


def is_sound(disk: Disk, name: str, file: ArchiveFile) -> bool:
    """Whether a file's bytes are here under a name. Raises DiskError."""
    try:
        found = disk.open(name)
    except FileMissingError:
        return False
    try:
        if found.size() != file.bytes:
            return False
        crc = 0
        for position in range(0, file.bytes, _READ_BYTES):
            crc = google_crc32c.extend(crc, found.read(position, min(_READ_BYTES, file.bytes - position)))
        return int(crc) == file.crc32c
    finally:
        found.close()


def complete(disk: Disk, manifest: Manifest) -> None:
    """Note durably that all files of an archive are here, synced and sound, under either name."""
    disk.sync_dir()
    new = _STAGED + ".new"
    file = disk.create(new)
    try:
        file.write(0, [manifests.encode(manifest)])
        file.sync()
    finally:
        file.close()
    disk.rename(new, _STAGED)
    disk.sync_dir()


def is_complete(disk: Disk) -> bool:
    """Whether a whole archive waits to be put in force."""
    return _STAGED in disk.list()


def finish(disk: Disk, partition: int, offset: int, kept: frozenset[str] = frozenset()) -> None:
    """Put the archive that came in with a snapshot of `offset` in force, durably, if that is not done yet.

    Files that are `kept` stay, whatever archive they were of.

    Raises:
        ArchiveError: what came in is damaged, or not of this snapshot; nothing has changed.
        DiskError: the disk refused; call it again.
    """
    names = set(disk.list())
    if _STAGED not in names:
        return
    file = disk.open(_STAGED)
    try:
        manifest = manifests.decode(file.read(0, file.size()).tobytes())
    finally:
        file.close()
    if (manifest.partition, manifest.end_offset) != (partition, offset):
        raise ArchiveError(f"the archive that has come in ends at offset {manifest.end_offset}")
    for listed in manifest.files:
        staged = staged_name(listed.name)
        if listed.at_home and staged not in names:
            continue
        _check_size(disk, staged if staged in names else listed.name, listed)
    for listed in manifest.files:
        if staged_name(listed.name) in names:
            disk.rename(staged_name(listed.name), listed.name)
    manifests.publish(disk, manifest, kept)
    clear(disk)


def _check_size(disk: Disk, name: str, listed: ArchiveFile) -> None:
    try:
        file = disk.open(name)
    except FileMissingError:
        raise ArchiveError(f"the archive's file {listed.name} is missing") from None
    try:
        size = file.size()
    finally:
        file.close()
    if size != listed.bytes:
        raise ArchiveError(f"the archive's file {listed.name} has {size} bytes instead of {listed.bytes}")


def clear(disk: Disk) -> None:
    """Remove whatever has come in: the mark first, and durably, so that nothing is ever taken for whole."""
    names = [name for name in disk.list() if name.startswith(INCOMING)]
    if _STAGED in names:
        disk.remove(_STAGED)
        disk.sync_dir()
        names.remove(_STAGED)
    for name in names:
        disk.remove(name)


class Part(NamedTuple):
    """Offsets [first, last) of a file that is here."""

    file: ArchiveFile
    first: int
    last: int


def holes(manifest: Manifest, offset: int) -> list[tuple[int, int]]:
    """The ranges of offsets below `offset` of which an archive has nothing."""
    return manifests.subtract([(0, offset)], manifest.covered(offset))


def own_parts(own: Manifest, offered: Manifest, offset: int) -> list[Part]:
    """What of this copy's own archive lies in the holes of one that is offered."""
    parts = []
    for low, high in holes(offered, min(offset, own.end_offset)):
        parts += [
            Part(file, max(file.start_offset, low), min(file.end_offset, high))
            for file in own.files
            if file.start_offset < high and file.end_offset > low
        ]
    return parts


def joined(offered: Manifest, own: Manifest | None, lost: Sequence[Part], offset: int) -> Manifest:
    """What is known of the offsets below `offset`: what is offered, and in its holes what this copy has itself.

    Args:
        offered: no file of it is looked at here.
        own: this copy's archive, if there is one.
        lost: what can't be read of it.
        offset: exclusive.
    """
    covered = offered.covered(offset)
    dropped = manifests.dropped_within(offered.dropped, [(0, offset)])
    if own is not None:
        kept = manifests.subtract(own.covered(offset), covered)
        kept = manifests.subtract(kept, sorted((part.first, part.last) for part in lost))
        dropped += manifests.dropped_within(own.dropped, kept)
        covered = sorted([*covered, *kept])
    start = covered[0][0] if covered else offset
    gaps = manifests.subtract([(start, offset)], covered)
    return msgspec.structs.replace(
        offered,
        start_offset=start,
        end_offset=offset,
        gaps=tuple(gaps),
        files=(),
        dropped=manifests.added((), dropped),
    )


def own_archive(disk: Disk, partition: int, copy_id: str) -> Manifest | None:
    """The archive that a copy has already; None where there is none that can be made sense of. Raises DiskError."""
    try:
        file = disk.open(manifests.NAME)
    except FileMissingError:
        return None
    try:
        found = manifests.decode(file.read(0, file.size()).tobytes())
    except ArchiveError:
        return None
    finally:
        file.close()
    return found if (found.partition, found.copy_id) == (partition, copy_id) else None


def owned(manifest: Manifest, copy_id: str, offset: int, files: tuple[ArchiveFile, ...]) -> Manifest:
    """What becomes of an archive that was offered: this copy's own, up to where its log begins."""
    return msgspec.structs.replace(manifest, copy_id=copy_id, end_offset=offset, files=files)
