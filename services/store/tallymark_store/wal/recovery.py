"""Opening a log: from the files that a crash, or anything else, left behind to a log that can go on.

Nothing of what was synced is changed here. In this order, each step durable before the next: good groups that
may not be durable are written again where they are (their bytes may be in the page cache only, and are about
to be relied upon), files behind the log's end are removed, a torn tail is overwritten with zeros. A crash at
any point leaves a log that recovers to the same state.

Nothing is removed or overwritten on the word of files that may belong to another log: a `WalStart` counts only
where the segments bear its log's id, and where they bear several, or none can be read, what isn't understood stays.
"""

from __future__ import annotations

from collections import Counter

import msgspec
import numpy as np

from tallymark_protocol.errors import ServerError
from tallymark_runtime.disk import Disk, File
from tallymark_store.wal.errors import LogVersionError
from tallymark_store.wal.format import (
    SEGMENT_HEADER_BYTES,
    VERSION,
    ByteArray,
    Position,
    SegmentHeader,
    parse_segment_header,
    segment_name,
    segment_number,
)
from tallymark_store.wal.index import IntArray, PartitionIndex
from tallymark_store.wal.replay import Damage, Replay
from tallymark_store.wal.scan import Scan, ScanEnd, end_of_nonzero

_ZEROS = bytes(1024 * 1024)


class MixedLogError(ServerError):
    """The folder holds segments of more than one log, and opening one could cost the other. Nothing was changed."""


class WalStart(msgspec.Struct):
    """A log's state at one place, from which recovery can start instead of at the log's beginning.

    Good once the log is synced up to `position`; not to be kept before.
    """

    log_id: bytes
    position: Position
    number: int  # of the group that begins there
    partitions: dict[int, PartitionIndex]
    unproven: bool = False  # partitions may have been in the log that `partitions` doesn't name

    def to_arrays(self) -> dict[str, IntArray]:
        """Return everything as arrays, for a checkpoint."""
        state = (*self.position, self.number, int(self.unproven), *self.log_id)
        arrays = {"wal": np.array(state, np.int64)}
        for partition, index in self.partitions.items():
            for name, column in index.to_arrays().items():
                arrays[f"{partition}.{name}"] = column
        return arrays

    @classmethod
    def from_arrays(cls, arrays: dict[str, IntArray]) -> WalStart:
        """Rebuild what `to_arrays` gave. Raises ValueError if it can't be that."""
        grouped: dict[int, dict[str, IntArray]] = {}
        try:
            segment, position, number, unproven, *log_id = (int(value) for value in arrays["wal"])
            for name, column in arrays.items():
                if name != "wal":
                    partition, _, inner = name.partition(".")
                    grouped.setdefault(int(partition), {})[inner] = column
            partitions = {number: PartitionIndex.from_arrays(columns) for number, columns in grouped.items()}
            return cls(bytes(log_id), Position(segment, position), number, partitions, bool(unproven))
        except (KeyError, TypeError) as error:
            raise ValueError(f"not the state of a log: {error}") from error


class Recovery(msgspec.Struct, frozen=True):
    """What recovery found. See `is_damaged` before relying on a partition's copy."""

    damages: dict[int, Damage]  # by partition
    findings: list[Damage]  # bad bytes by which no partition lost anything
    unproven: bool  # partitions that the log doesn't know of may have been lost from it
    known: frozenset[int]  # partitions in the log
    end: Position  # where the log goes on
    tail_bytes: int  # of a torn tail that were dropped; none of them was ever acknowledged
    start_ignored: bool = False  # it was another log's

    def is_damaged(self, partition: int) -> bool:
        """Say whether this log's copy of a partition must not be relied upon."""
        return partition in self.damages or (self.unproven and partition not in self.known)


class Recovered(msgspec.Struct):
    """What the log is built from again."""

    log_id: bytes
    replay: Replay
    recovery: Recovery
    sizes: dict[int, int]  # of all segment files
    ready: list[int]  # segments that hold nothing yet
    next_segment: int
    end: Position  # everything below is durable
    room: int  # size of the segment that goes on at `end`; SEGMENT_HEADER_BYTES if a new one is needed
    number: int  # of the next group
    marker_due: bool


class _Segment(msgspec.Struct):
    """A segment file as found."""

    number: int
    size: int
    front: SegmentHeader | None  # the header, if it is right
    back: SegmentHeader | None  # its copy at the end, if it is right

    @property
    def header(self) -> SegmentHeader | None:
        return self.front or self.back

    @property
    def good(self) -> bool:
        """Whether the file is as long as it was made, with both headers."""
        return self.front is not None and self.back is not None and self.front.size == self.size

    @property
    def limit(self) -> int:
        """Where groups end at the latest."""
        return self.size if self.header is None else min(self.size, self.header.size - SEGMENT_HEADER_BYTES)


def recover(disk: Disk, *, new_log_id: bytes, start: WalStart | None = None) -> Recovered:
    """Read the log in `disk`, make it ready to go on, and say what was found.

    `new_log_id` is the id of the log if there is none yet. `start`, from a checkpoint, is taken over; the log is
    read from there on, and has to have everything that `start` refers to. A `start` of another log is ignored.
    Raises DiskError when the disk fails, LogVersionError, and MixedLogError.
    """
    segments = _list(disk)
    ids = _log_ids(segments)
    foreign = start is not None and bool(ids) and start.log_id not in ids
    if foreign:
        start = None
    log_id = start.log_id if start is not None else max(ids, key=ids.__getitem__, default=new_log_id)
    # Whose files these are is not sure: some bear another id, or may.
    headers = [segment.header for segment in segments.values()]
    mixed = any(header.log_id != log_id for header in headers if header) or (foreign and None in headers)
    unnamed = bool(segments) and not ids
    for segment in segments.values():
        segment.front = _own(segment.front, segment.number, log_id)
        segment.back = _own(segment.back, segment.number, log_id)
    limits = {number: segment.limit for number, segment in segments.items()}
    replay = Replay({} if start is None else start.partitions, unproven=start is not None and start.unproven)
    if start is None:
        place, number = Position(min(segments, default=0), SEGMENT_HEADER_BYTES), 0
    else:
        place, number = start.position, start.number
        _check_rows(replay, limits)
    end = Scan(disk, log_id, limits, place, number, replay).run()
    if unnamed and not end.damaged and (end.dirty or start is not None):
        # Not one header can be read: what lies there may be a whole log. Leave it, and trust nothing.
        replay.gap(place, "no segment's header is readable")
        replay.finish()
        end = msgspec.structs.replace(end, damaged=True)
    if mixed and not end.damaged:
        _refuse_to_remove(segments, log_id, end)
    if foreign:
        where = Position(min(segments), 0)
        replay.finding(where, "the kept start of the log is another log's; the whole log was read instead")
    for segment in segments.values():
        broken = segment.number < end.end.segment or (
            segment.number == end.end.segment
            and end.end.position > SEGMENT_HEADER_BYTES
            and segment.front is None
        )
        if broken and segment.number >= place.segment and not segment.good:
            replay.finding(Position(segment.number, 0), "the segment's header is bad, or its length")
    recovered = _settle(disk, log_id, segments, replay, end)
    recovered.recovery = msgspec.structs.replace(recovered.recovery, start_ignored=foreign)
    return recovered


def _list(disk: Disk) -> dict[int, _Segment]:
    segments: dict[int, _Segment] = {}
    for name in disk.list():
        number = segment_number(name)
        if number is None:
            if name.startswith("wal-") and name.endswith(".tmp"):
                disk.remove(name)  # its preparation was interrupted
            continue
        file = disk.open(name)
        try:
            size = file.size()
            front = parse_segment_header(file.read(0, SEGMENT_HEADER_BYTES))
            back = None
            if size >= 2 * SEGMENT_HEADER_BYTES:
                back = parse_segment_header(file.read(size - SEGMENT_HEADER_BYTES, SEGMENT_HEADER_BYTES))
        finally:
            file.close()
        segments[number] = _Segment(number, size, front, back)
    return segments


def _log_ids(segments: dict[int, _Segment]) -> Counter[bytes]:
    """Return the logs' ids that the segments bear, and how many bear each."""
    votes: Counter[bytes] = Counter()
    for segment in segments.values():
        header = segment.header
        if header is not None and header.segment == segment.number:
            if header.version != VERSION:
                raise LogVersionError(f"the log is of version {header.version}, this is version {VERSION}")
            votes[header.log_id] += 1
    return votes


def _refuse_to_remove(segments: dict[int, _Segment], log_id: bytes, end: ScanEnd) -> None:
    """Raise MixedLogError if what lies behind the log's end, to be removed or overwritten, may be another log's."""
    # Headers that aren't this log's have been taken out (`_own`).
    strange = [number for number, segment in segments.items() if segment.header is None]
    if end.dirty or any(number >= end.end.segment for number in strange):
        names = ", ".join(segment_name(number) for number in sorted(strange)[:10])
        raise MixedLogError(
            f"the folder of the log {log_id.hex()} holds segments of another log, or such that cannot be told: "
            f"{names or 'none of them whole'}; nothing was changed: move those that do not belong here elsewhere, "
            "and start again"
        )


def _own(header: SegmentHeader | None, number: int, log_id: bytes) -> SegmentHeader | None:
    """Return the header if it belongs to this segment of this log."""
    return header if header is not None and (header.segment, header.log_id) == (number, log_id) else None


def _check_rows(replay: Replay, limits: dict[int, int]) -> None:
    """Damage the partitions of which a checkpoint names records in files that are gone or cut."""
    for index in replay.partitions.values():
        rows = index.column("segment")
        ends = index.column("position") + index.column("length")
        gone = np.zeros(len(index), np.bool_)
        for segment in np.unique(rows).tolist():
            gone |= (rows == segment) & (ends > limits.get(segment, 0))
        if gone.any():
            row = index.row(int(gone.argmax()))
            index.truncate(row.base_offset)
            place = Position(row.segment, row.position)
            replay.damage(index, place, "the file is missing or cut that holds its records")


def _settle(
    disk: Disk, log_id: bytes, segments: dict[int, _Segment], replay: Replay, end: ScanEnd
) -> Recovered:
    """Make the files fit what was found; see the module's docstring for the order."""
    for segment, first, last in end.kept:
        file = disk.open(segment_name(segment))
        try:
            file.write(first, [file.read(first, last - first)])
            file.sync()
        finally:
            file.close()
    last_segment = segments.get(end.end.segment)
    tail_bytes = 0
    if end.damaged:
        ready = _trailing_empty(segments, end)
    else:
        ready = _remove_behind(disk, segments, end)
        if end.dirty and last_segment is not None:
            tail_bytes = _wipe(disk, end.end, last_segment)
    used = [number for number in segments if number not in ready]
    goes_on = (
        last_segment is not None and last_segment.good and last_segment.number in used and not end.damaged
    )
    place, number = end.end, end.number
    if end.damaged:
        # Behind the damage, and by a number that keeps it visible to every later recovery.
        place = Position(max([place.segment, *used]) + 1, 0)
        number += 2
    return Recovered(
        log_id=log_id,
        replay=replay,
        recovery=Recovery(
            damages=dict(replay.damages),
            findings=list(replay.findings),
            unproven=replay.unproven,
            known=frozenset(replay.partitions),
            end=place,
            tail_bytes=tail_bytes,
        ),
        sizes={number: segment.size for number, segment in segments.items()},
        ready=ready,
        next_segment=max([end.end.segment if end.damaged else -1, *segments]) + 1,
        end=place,
        room=last_segment.size if last_segment is not None and goes_on else SEGMENT_HEADER_BYTES,
        number=number,
        marker_due=end.damaged or (end.number > 0 and (bool(replay.damages) or not end.marker_last)),
    )


def _trailing_empty(segments: dict[int, _Segment], end: ScanEnd) -> list[int]:
    """Return the whole, empty segments with nothing behind them."""
    ready: list[int] = []
    for number in sorted(segments, reverse=True):
        if number <= end.end.segment or number not in end.empty or not segments[number].good:
            break
        ready.insert(0, number)
    return ready


def _remove_behind(disk: Disk, segments: dict[int, _Segment], end: ScanEnd) -> list[int]:
    """Remove the files behind the log's end, but for the whole, empty ones right behind it: return those."""
    ready: list[int] = []
    following = end.end.segment + 1
    if end.number == 0 and end.end.segment in segments and end.end.segment in end.empty:
        following = end.end.segment  # nothing was ever written
    while following in end.empty and segments[following].good:
        ready.append(following)
        following += 1
    # From the last one down, one by one: a crash between must not leave a hole in the row.
    for number in sorted(segments, reverse=True):
        if number >= following:
            disk.remove(segment_name(number))
            disk.sync_dir()
            del segments[number]
    return ready


def _wipe(disk: Disk, end: Position, segment: _Segment) -> int:
    """Overwrite a torn tail with zeros, durably; return its length."""
    file = disk.open(segment_name(segment.number))
    try:
        behind = _tail_end(file, end.position, segment.limit)
        for at in range(end.position, behind, len(_ZEROS)):
            file.write(at, [_ZEROS[: min(len(_ZEROS), behind - at)]])
        if behind > end.position:
            file.sync()
        return max(0, behind - end.position)
    finally:
        file.close()


def _tail_end(file: File, start: int, limit: int) -> int:
    data: ByteArray = file.read(start, max(0, limit - start))
    return start + end_of_nonzero(data, 0, len(data))
