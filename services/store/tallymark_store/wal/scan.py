"""Reading a log from its files: finds the groups, tells a torn tail from damage, salvages what it can.

The rule: bytes below the highest synced end that any later group records were once durable. If they are bad
now, that is damage, and `Replay` finds out whose. Above it, everything from the first bad group on is a torn
tail: it was never acknowledged, and is dropped, whole groups at a time.

So what follows a bad spot decides what it is. From there the scan looks for the next group at every multiple
of 64 bytes, through the rest of the segment and all later ones (a group is known by its salted checksum, its
own position, and a number that is not behind). If its number is the next one, nothing was lost: the spot lay
in unused room. Otherwise the spot is held back until a group's synced end covers it (damage) or the log has
ended (tail). Inside damage, records are looked for one by one, as each has its own checksum and position.
"""

from __future__ import annotations

from collections.abc import Sequence

import google_crc32c
import msgspec
import numpy as np

from tallymark_runtime.disk import Disk
from tallymark_store.wal.format import (
    ALIGN,
    FLAG_COMPLETE,
    FLAG_MARKER,
    GROUP_HEADER_BYTES,
    GROUP_MAGIC,
    RECORD_ALIGN,
    RECORD_HEADER_BYTES,
    RECORD_MAGIC,
    SEGMENT_HEADER_BYTES,
    ByteArray,
    GroupHeader,
    MarkerEntry,
    Position,
    RecordHeader,
    align,
    parse_group_header,
    parse_marker,
    parse_record_header,
    record_bytes,
    salt_of,
    segment_name,
)
from tallymark_store.wal.replay import Replay

_CHUNK_BYTES = 1024 * 1024


class Region(msgspec.Struct, frozen=True):
    """Bytes [start, end) of a segment, not all zero, that are no group; or that should be there and aren't."""

    segment: int
    start: int
    end: int
    missing: bool = False


class Gap(msgspec.Struct):
    """The stretch from where a group was expected to the next one."""

    start: Position
    number: int  # of the group that was expected
    regions: list[Region] = []

    @property
    def missing(self) -> bool:
        """Whether a file (or its end) is gone that must have been there."""
        return any(region.missing for region in self.regions)


class FoundGroup(msgspec.Struct, frozen=True):
    """A group of which every byte is right."""

    segment: int
    header: GroupHeader
    records: list[tuple[RecordHeader, int]]  # with their positions
    entries: list[MarkerEntry]


class ScanEnd(msgspec.Struct, frozen=True):
    """Where the log ends, and how.

    With `damaged`, bytes behind `end` were durable once: they must stay as they are, and nothing may be written
    among them. Otherwise the next group goes to `end`, and what lies behind it is tail, to be wiped if `dirty`.
    """

    end: Position
    number: int  # of the next group
    damaged: bool
    dirty: bool  # something lies behind `end`
    marker_last: bool  # the last group is a marker
    kept: list[tuple[int, int, int]]  # (segment, start, end) of good groups that may not be durable yet
    empty: set[int]  # segments that hold nothing at all


def first_nonzero(data: ByteArray, start: int, end: int) -> int:
    """Return the position of the first byte of [start, end) that isn't zero; `end` if all are."""
    for at in range(start, end, _CHUNK_BYTES):
        piece = data[at : min(end, at + _CHUNK_BYTES)]
        if piece.max() != 0:
            return at + int((piece != 0).argmax())
    return end


def end_of_nonzero(data: ByteArray, start: int, end: int) -> int:
    """Return the position behind the last byte of [start, end) that isn't zero; `start` if all are."""
    at = end
    while at > start:
        low = max(start, at - _CHUNK_BYTES)
        piece = data[low:at]
        if piece.max() != 0:
            return low + int(np.flatnonzero(piece)[-1]) + 1
        at = low
    return start


def read_group(salt: int, data: ByteArray, segment: int, position: int, limit: int) -> FoundGroup | None:
    """Return the group at `position`; None unless every byte of it is right."""
    header = parse_group_header(salt, data, position)
    if header is None:
        return None
    at = position + GROUP_HEADER_BYTES
    end = at + header.body_bytes
    if end > limit:
        return None
    if header.flags & FLAG_MARKER:
        entries = parse_marker(salt, data, header)
        return None if entries is None else FoundGroup(segment, header, [], entries)
    records: list[tuple[RecordHeader, int]] = []
    extend = google_crc32c.extend
    for _ in range(header.entries):
        record = parse_record_header(salt, data, at, own=at)
        if record is None:
            return None
        body = at + RECORD_HEADER_BYTES
        behind = at + record_bytes(record.payload_bytes)
        if behind > end:
            return None
        if extend(salt, data[body : body + record.payload_bytes]) != record.payload_crc:
            return None
        records.append((record, at))
        at = behind
    return FoundGroup(segment, header, records, []) if at == end else None


def salvage(salt: int, data: ByteArray, start: int, end: int) -> list[tuple[RecordHeader, int, bool]]:
    """Return the records with good headers in [start, end): header, position, whether the payload is good."""
    usable = (end - start) // RECORD_ALIGN * RECORD_ALIGN
    words = data[start : start + usable].view("<u4")[:: RECORD_ALIGN // 4]
    found: list[tuple[RecordHeader, int, bool]] = []
    at = start
    for word in np.flatnonzero(words == RECORD_MAGIC).tolist():
        position = start + word * RECORD_ALIGN
        if position < at:
            continue  # inside the payload of the one before
        header = parse_record_header(salt, data, position, own=position)
        if header is None:
            continue
        body = position + RECORD_HEADER_BYTES
        behind = body + header.payload_bytes
        good = behind <= end and google_crc32c.extend(salt, data[body:behind]) == header.payload_crc
        found.append((header, position, good))
        at = position + record_bytes(header.payload_bytes)
    return found


class Scan:
    """One pass over the segments of a log, feeding a `Replay`.

    `limits` gives, for each segment file that exists, where its groups end at the latest. `start` is where
    group `number` is expected: everything before it was durable when that was noted.
    """

    def __init__(
        self, disk: Disk, log_id: bytes, limits: dict[int, int], start: Position, number: int, replay: Replay
    ) -> None:
        self._disk = disk
        self._log_id = log_id
        self._limits = limits
        self._replay = replay
        self._start = start
        self._number = number  # of the group that is expected next
        self._synced = start  # the highest synced end that was seen
        self._gap = Gap(start, number)  # behind the last good group
        self._held: list[tuple[Gap | None, FoundGroup]] = []  # the first waits for its gap to be judged
        self._marker_last = False
        self._kept: list[tuple[int, int, int]] = []
        self._empty: set[int] = set()

    def run(self) -> ScanEnd:
        """Read everything. Raises DiskError when the disk can't be read: that is not damage."""
        first = self._start.segment
        # Group 0 doesn't need its file yet; a later one was expected in a file that was there.
        last = max([first if self._number else first - 1, *self._limits])
        for segment in range(first, last + 1):
            position = self._start.position if segment == first else SEGMENT_HEADER_BYTES
            limit = self._limits.get(segment, 0)
            if segment not in self._limits or (segment == first and limit < position and self._number):
                self._gap.regions.append(Region(segment, limit, position, missing=True))
            else:
                self._segment(segment, position, limit)
        return self._finish()

    def _read(self, segment: int) -> ByteArray:
        file = self._disk.open(segment_name(segment))
        try:
            return file.read(0, self._limits[segment])
        finally:
            file.close()

    def _segment(self, segment: int, position: int, limit: int) -> None:
        data = self._read(segment)
        salt = salt_of(self._log_id, segment)
        while True:
            group = read_group(salt, data, segment, position, limit)
            if group is None or group.header.number < self._number:
                group = self._search(salt, data, segment, position, limit)
            if group is None:
                return
            self._found(group)
            position = group.header.end

    def _search(self, salt: int, data: ByteArray, segment: int, start: int, limit: int) -> FoundGroup | None:
        """Return the next good group behind the bad one at `start`; note what lies between."""
        bad = first_nonzero(data, start, limit)
        if bad == limit:
            if start == SEGMENT_HEADER_BYTES:
                self._empty.add(segment)
            return None
        first = max(start + ALIGN, bad // ALIGN * ALIGN)  # `start` is a multiple of ALIGN itself
        usable = max(0, limit - first) // ALIGN * ALIGN
        words = data[first : first + usable].view("<u4")[:: ALIGN // 4]
        for word in np.flatnonzero(words == GROUP_MAGIC).tolist():
            position = first + word * ALIGN
            group = read_group(salt, data, segment, position, limit)
            if group is not None and group.header.number >= self._number:
                if bad < position:
                    self._gap.regions.append(Region(segment, start, position))
                return group
        self._gap.regions.append(Region(segment, start, limit))
        return None

    def _found(self, group: FoundGroup) -> None:
        number = group.header.number
        # Whatever lies between: the next number means that no group did.
        gap = None if number == self._number else self._gap
        self._held.append((gap, group))
        self._number = number + 1
        self._gap = Gap(Position(group.segment, group.header.end), self._number)
        self._synced = max(self._synced, group.header.synced_end)
        while self._held:
            gap, waiting = self._held[0]
            if gap is not None:
                if not self._is_damage(gap):
                    break
                self._damaged(gap, waiting)
            self._apply(waiting)
            del self._held[0]

    def _is_damage(self, gap: Gap) -> bool:
        return gap.missing or gap.start < self._synced

    def _apply(self, group: FoundGroup) -> None:
        segment, header = group.segment, group.header
        for record, position in group.records:
            self._replay.record(record, Position(segment, position), payload_good=True)
        self._marker_last = bool(header.flags & FLAG_MARKER)
        if self._marker_last:
            place = Position(segment, header.position)
            self._replay.marker(group.entries, place, complete=bool(header.flags & FLAG_COMPLETE))
        self._kept = [kept for kept in self._kept if Position(*kept[:2]) >= self._synced]
        self._kept.append((segment, header.position, header.end))

    def _damaged(self, gap: Gap, following: FoundGroup | None) -> None:
        """Feed what can be had of a damaged stretch, and note whether more may have been in it."""
        whole = len(gap.regions) == 1 and following is not None and following.header.number == gap.number + 1
        place, what = gap.start, f"nothing is left at position {gap.start.position}"
        for region in gap.regions:
            if place is gap.start:
                place = Position(region.segment, region.start)
            if region.missing:
                what = f"the file is missing from position {region.start} on"
                whole = False
                continue
            what = f"the file is unreadable from position {region.start} on"
            data = self._read(region.segment)
            salt = salt_of(self._log_id, region.segment)
            records = salvage(salt, data, region.start, region.end)
            whole = whole and _is_whole(
                parse_group_header(salt, data, region.start), records, region, following
            )
            for record, position, good in records:
                self._replay.record(record, Position(region.segment, position), payload_good=good)
        sentence = f"{segment_name(place.segment)}: {what}"
        if whole:
            self._replay.finding(place, f"{sentence}, and all records there are accounted for")
        else:
            self._replay.gap(place, sentence)

    def _finish(self) -> ScanEnd:
        gaps = [gap for gap, _ in self._held if gap is not None]
        if any(self._is_damage(gap) for gap in (*gaps, self._gap)):
            for gap, group in self._held:
                if gap is not None:
                    self._damaged(gap, group)
                self._apply(group)
            gaps = []
        last = gaps[0] if gaps else self._gap
        damaged = self._is_damage(last)
        if damaged:
            self._damaged(last, None)
        self._replay.finish()
        return ScanEnd(
            end=last.start,
            number=last.number,
            damaged=damaged,
            dirty=bool(gaps or last.regions),
            marker_last=self._marker_last,
            kept=[kept for kept in self._kept if Position(*kept[:2]) >= self._synced],
            empty=self._empty,
        )


def _is_whole(
    header: GroupHeader | None,
    records: Sequence[tuple[RecordHeader, int, bool]],
    region: Region,
    following: FoundGroup | None,
) -> bool:
    """Say whether all records, good or bad, were found of the one group that a region held."""
    if header is not None and header.flags & FLAG_MARKER:
        return True
    at = region.start + GROUP_HEADER_BYTES
    for record, position, _ in records:
        if position != at:
            return False
        at += record_bytes(record.payload_bytes)
    if header is not None:
        return len(records) == header.entries
    # Without the header only the next group's place says where this one ended.
    adjacent = following is not None and following.segment == region.segment
    return bool(records) and adjacent and align(at) == region.end
