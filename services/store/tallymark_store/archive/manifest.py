"""Which files an archive consists of: one small file of JSON, switched atomically.

A partition's archive folder holds::

    MANIFEST.json                        the archive: files, and up to which offset they hold everything
    events-<from>-<to>.parquet           accepted events at offsets of [from, to)
    events-<from>-<to>-r<n>.parquet      the same, when some were dropped for the n-th time
    in-...                               an archive that is coming in with a snapshot (`archive.incoming`)

Files are written and synced, then the folder is, then the manifest is written under another name, synced, renamed,
and the folder synced again; only then are files removed that the new manifest doesn't list. So a crash at any step
leaves the old archive whole or the new one, and files that are not listed are of no meaning: `load` removes them.

The manifest is JSON so that anyone can read it, on one line that ends with the CRC-32C of what stands before it.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable

import google_crc32c
import msgspec

from tallymark_runtime.disk import Disk, FileMissingError

FORMAT_VERSION = 1
LACKS_VERSION = 2  # of one that lacks events: earlier software would take it for whole
NAME = "MANIFEST.json"
LACKS = "LACKS.json"  # says of a restored partition that it came without the archive that there was
INCOMING = "in-"  # what names of files begin with that are not to be touched here
_NEW = NAME + ".new"
_CHECK = ',"crc32c":"%08x"}\n'  # stands in place of the closing brace
_CHECK_BYTES = len(_CHECK % 0)


class ArchiveFile(msgspec.Struct, frozen=True):
    """One file of an archive."""

    name: str
    start_offset: int
    end_offset: int  # exclusive
    rows: int
    bytes: int
    crc32c: int  # of the whole file
    min_time_ns: int  # event times in it, inclusive
    max_time_ns: int
    tail_bytes: int = 0  # behind its pages: indexes and footer; 0: not known
    tail_crc32c: int = 0  # of these
    at_home: bool = False  # whether it is at the archive's home (`home`): then it needn't be here
    rewritten: int = 0  # how often it was written again without events that were dropped
    # Of ranges of uids of metrics, both ends included: a time that none of their events was both timed and appended before.
    # Of other metrics it has no events. Empty: that was not looked at yet.
    due: tuple[tuple[int, int, int], ...] = ()

    def has_bytes_of(self, other: ArchiveFile) -> bool:
        """Whether these are the same bytes under the same name, whatever else is known of them."""
        return (self.name, self.bytes, self.crc32c) == (other.name, other.bytes, other.crc32c)


class Dropped(msgspec.Struct, frozen=True):
    """Events of one metric that were accepted, were kept for their time, and are in no file any more."""

    metric: str  # its code
    metric_uid: int
    events: int
    start_ns: int  # event times, half-open
    end_ns: int
    start_offset: int  # offsets, half-open: in between there are others, which were not dropped
    end_offset: int
    before_ns: int  # only events were dropped that were timed and appended before
    is_at_most: bool = False  # some may be counted twice, or be there: the archive was put together of two

    def plus(self, other: Dropped) -> Dropped:
        """Both, of one metric."""
        assert self.metric_uid == other.metric_uid, "of one metric"
        return Dropped(
            metric=other.metric,
            metric_uid=self.metric_uid,
            events=self.events + other.events,
            start_ns=min(self.start_ns, other.start_ns),
            end_ns=max(self.end_ns, other.end_ns),
            start_offset=min(self.start_offset, other.start_offset),
            end_offset=max(self.end_offset, other.end_offset),
            before_ns=max(self.before_ns, other.before_ns),
            is_at_most=self.is_at_most or other.is_at_most,
        )


def added(before: Iterable[Dropped], more: Iterable[Dropped]) -> tuple[Dropped, ...]:
    """What was dropped in all: one entry a metric, in the order of uids."""
    found: dict[int, Dropped] = {}
    for item in (*before, *more):
        known = found.get(item.metric_uid)
        found[item.metric_uid] = item if known is None else known.plus(item)
    return tuple(found[uid] for uid in sorted(found))


def dropped_within(dropped: Iterable[Dropped], ranges: Iterable[tuple[int, int]]) -> list[Dropped]:
    """What was dropped at offsets of some ranges; where entries reach beyond one, at most that."""
    found = []
    taken = list(ranges)
    for item in dropped:
        met = [
            (max(low, item.start_offset), min(high, item.end_offset))
            for low, high in taken
            if low < item.end_offset and high > item.start_offset
        ]
        if met == [(item.start_offset, item.end_offset)]:
            found.append(item)
        elif met:
            found.append(
                msgspec.structs.replace(item, start_offset=met[0][0], end_offset=met[-1][1], is_at_most=True)
            )
    return found


class Manifest(msgspec.Struct, frozen=True):
    """An archive of one copy of a partition.

    Its files are in the order of their offsets and have none in common. Where there is room between two of them, or
    behind the last one, no event was accepted.
    """

    partition: int
    copy_id: str  # of the copy whose log it comes from: another one begins anew
    end_offset: int = (
        0  # exclusive; every accepted event below, from `start_offset` on, is in one of the files
    )
    files: tuple[ArchiveFile, ...] = ()
    format_version: int = FORMAT_VERSION
    start_offset: int = 0  # inclusive: what lies below was never in this copy's log, nor in an archive of it
    # Ranges of offsets [from, to) in between of which the archive has nothing: neither did whoever sent it with a
    # snapshot. Sorted, and disjoint. No file reaches from one side of a gap to the other.
    gaps: tuple[tuple[int, int], ...] = ()
    dropped: tuple[Dropped, ...] = ()  # one entry a metric, in the order of uids

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(file.bytes for file in self.files)

    @property
    def rows(self) -> int:
        """Events in all files."""
        return sum(file.rows for file in self.files)

    def covered(self, end: int) -> list[tuple[int, int]]:
        """The ranges of offsets below `end` of which it has everything: sorted, disjoint, none of them empty."""
        return subtract([(self.start_offset, min(self.end_offset, end))], self.gaps)


class Lacks(msgspec.Struct, frozen=True):
    """What is written down where a partition was restored without its archive."""

    from_offset: int  # raw events from before are gone
    why: str


class ArchiveError(Exception):
    """An archive is damaged, or not this copy's; the message says how."""


def subtract(ranges: Iterable[tuple[int, int]], holes: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """What is left of sorted ranges without sorted holes; none of it is empty."""
    left = []
    taken = list(holes)
    for start, end in ranges:
        at = start
        for low, high in taken:
            if low >= end or high <= at:
                continue
            if at < low:
                left.append((at, low))
            at = max(at, high)
        if at < end:
            left.append((at, end))
    return left


def file_name(start_offset: int, end_offset: int, rewritten: int = 0) -> str:
    """The name of the file of a range: names sort as offsets do, and no two files of an archive ever have the same."""
    again = f"-r{rewritten}" if rewritten else ""
    return f"events-{start_offset:020d}-{end_offset:020d}{again}.parquet"


def all_here(manifest: Manifest) -> Manifest:
    """The same for whoever gets the files themselves: none of them has a home."""
    return msgspec.structs.replace(
        manifest, files=tuple(msgspec.structs.replace(file, at_home=False) for file in manifest.files)
    )


def versioned(manifest: Manifest) -> Manifest:
    """A manifest that says which version it is of, to be written."""
    is_whole = not manifest.gaps and not manifest.dropped and not any(file.at_home for file in manifest.files)
    version = FORMAT_VERSION if is_whole else LACKS_VERSION
    return msgspec.structs.replace(manifest, format_version=version)


def encode(manifest: Manifest) -> bytes:
    """A manifest's bytes."""
    body = msgspec.json.encode(versioned(manifest))[:-1]
    return body + _check_of(body)


def _check_of(body: bytes) -> bytes:
    text: str = _CHECK % google_crc32c.value(body)
    return text.encode()


def decode(data: bytes) -> Manifest:
    """The manifest of its bytes.

    Raises:
        ArchiveError: they are damaged, or of a version that this software doesn't know.
    """
    body = data[:-_CHECK_BYTES]
    if data[-_CHECK_BYTES:] != _check_of(body):
        raise ArchiveError("the archive's manifest is damaged: its checksum doesn't match")
    try:
        manifest = msgspec.json.decode(body + b"}", type=Manifest)
    except msgspec.DecodeError as error:
        raise ArchiveError(f"the archive's manifest can't be read: {error}") from None
    if not FORMAT_VERSION <= manifest.format_version <= LACKS_VERSION:
        raise ArchiveError(
            f"the archive has format version {manifest.format_version}; "
            f"this software reads versions up to {LACKS_VERSION}"
        )
    manifest = msgspec.structs.replace(
        manifest, format_version=FORMAT_VERSION
    )  # it says nothing of the archive
    problem = _problem(manifest)
    if problem:
        raise ArchiveError(f"the archive's manifest makes no sense: {problem}")
    return manifest


def _problem(manifest: Manifest) -> str:
    edges = [
        (manifest.start_offset,) * 2,
        *((f.start_offset, f.end_offset) for f in manifest.files),
        (manifest.end_offset,) * 2,
    ]
    for (_, before), (start, _) in itertools.pairwise(edges):
        if before > start:
            return f"offset {start} comes after {before}"
    at = manifest.start_offset
    for start, end in manifest.gaps:
        if not at <= start < end <= manifest.end_offset:
            return f"a gap from {start} to {end}"
        at = end
        if any(file.start_offset < end and file.end_offset > start for file in manifest.files):
            return f"a file reaches into the gap from {start} to {end}"
    for item in manifest.dropped:
        if item.events <= 0 or item.start_ns >= item.end_ns or item.start_offset >= item.end_offset:
            return f"{item.events} events of metric {item.metric!r:.80} were dropped"
    if any(a.metric_uid >= b.metric_uid for a, b in itertools.pairwise(manifest.dropped)):
        return "metrics of which events were dropped are not in order"
    for file in manifest.files:
        if not 0 < file.rows <= file.end_offset - file.start_offset:
            return f"{file.name} has {file.rows} rows"
        if file.name != file_name(file.start_offset, file.end_offset, file.rewritten):
            return f"{file.name!r} is no name of its range"
        if not 0 <= file.tail_bytes <= file.bytes:
            return f"{file.name} has a tail of {file.tail_bytes} bytes"
    return ""


def load(disk: Disk, kept: frozenset[str] = frozenset(), has_home: bool = False) -> Manifest | None:
    """The archive in a folder, once what neither it lists nor `kept` is removed; None where there is none.

    Raises:
        ArchiveError: it is damaged, or a file is missing or cut short.
        DiskError: the disk can't be read.
    """
    if NAME not in disk.list():
        _remove_others(disk, kept)
        return None
    file = disk.open(NAME)
    try:
        manifest = decode(file.read(0, file.size()).tobytes())
    finally:
        file.close()
    disk.sync_dir()  # it may have got its name just before a crash: nothing may rely on it before that is durable
    _remove_others(disk, {NAME, *(listed.name for listed in manifest.files), *kept})
    names = set(disk.list())
    for listed in manifest.files:
        if listed.at_home and listed.name not in names:
            if not has_home:
                raise ArchiveError(f"the archive's file {listed.name} is at its home, and none is set")
            continue
        try:
            found = disk.open(listed.name)
        except FileMissingError:
            raise ArchiveError(f"the archive's file {listed.name} is missing") from None
        try:
            size = found.size()
        finally:
            found.close()
        if size != listed.bytes:
            raise ArchiveError(f"the archive's file {listed.name} has {size} bytes instead of {listed.bytes}")
    return manifest


def publish(disk: Disk, manifest: Manifest, kept: frozenset[str] = frozenset()) -> None:
    """Make a manifest, whose files are written and synced, the one in force, durably; then remove what it doesn't list.

    Files that are `kept` stay: somebody else still reads them.

    Raises:
        DiskError: the disk refused. Which manifest is in force is not known: `load` it again.
    """
    disk.sync_dir()  # names of new files
    file = disk.create(_NEW)
    try:
        file.write(0, [encode(manifest)])
        file.sync()
    finally:
        file.close()
    disk.rename(_NEW, NAME)
    disk.sync_dir()
    _remove_others(disk, {NAME, *(listed.name for listed in manifest.files), *kept})


def write_lacks(disk: Disk, lacks: Lacks) -> None:
    """Note durably, in a partition's archive folder, that an archive is missing; a later archive takes its place.

    Raises:
        DiskError: the disk refused.
    """
    file = disk.create(LACKS)
    try:
        file.write(0, [msgspec.json.encode(lacks) + b"\n"])
        file.sync()
    finally:
        file.close()
    disk.sync_dir()


def discard(disk: Disk) -> None:
    """Remove an archive, its manifest first, so that no step leaves one that lists what is gone.

    What is coming in is for the copy that there is now, and stays.
    """
    if NAME in disk.list():
        disk.remove(NAME)
        disk.sync_dir()
    _remove_others(disk, set())
    disk.sync_dir()


def _remove_others(disk: Disk, kept: Collection[str]) -> None:
    for name in disk.list():
        if name not in kept and not name.startswith(INCOMING):
            disk.remove(name)
