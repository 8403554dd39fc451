"""The write-ahead log's files, byte by byte.

Every byte of a segment belongs to something that is checked: to one of the two headers, to a group (its header, its
records' headers and payloads, a marker's table, each with a checksum), to the zeros between them, or to the zeros that
follow the last group. What the records add up to is for recovery to say (`directory`); here, bytes are looked at, in
every segment, also in those that a start needn't read.
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from tallymark_runtime.disk import Disk
from tallymark_store.verify.findings import Report
from tallymark_store.wal.format import (
    ALIGN,
    GROUP_HEADER_BYTES,
    GROUP_MAGIC,
    RECORD_HEADER_BYTES,
    SEGMENT_HEADER_BYTES,
    VERSION,
    ByteArray,
    SegmentHeader,
    align,
    parse_segment_header,
    record_bytes,
    salt_of,
    segment_name,
    segment_number,
)
from tallymark_store.wal.scan import FoundGroup, first_nonzero, read_group


class LogFiles:
    """One pass over all segments.

    Args:
        disk: the log's folder.
        folder: its path in the data directory, for findings.
        report: takes the findings.
    """

    def __init__(self, disk: Disk, folder: str, report: Report) -> None:
        self._disk = disk
        self._folder = folder
        self._report = report
        self._expected = -1  # number of the next group; -1: not known
        # Bytes at the end of what was read that are no group: a torn tail, unless a group follows.
        self._open_end: tuple[str, int] | None = None

    def check(self) -> None:
        """Look at every byte. Raises DiskError when the disk can't be read."""
        numbers = []
        for name in self._disk.list():
            number = segment_number(name)
            if number is None:
                self._report.note(f"{self._folder}/{name} is no segment of the log, and means nothing")
            else:
                numbers.append(number)
        numbers.sort()
        log_id = self._log_id(numbers)
        for place, number in enumerate(numbers):
            if place and number != numbers[place - 1] + 1:
                self._find(
                    number, 0, f"the segments from {numbers[place - 1] + 1} up to {number} are missing"
                )
            self._report.progress(f"log: segment {place + 1} of {len(numbers)}")
            self._segment(number, log_id)
            self._report.looked_at("segments")
        if self._open_end is not None:
            name, position = self._open_end
            self._report.find(
                "bytes at the end of the log are no whole group: a write that a crash cut short (then nothing "
                "acknowledged is in them, and the next start drops them), or damage",
                file=name,
                position=position,
            )

    def _find(self, segment: int, position: int, sentence: str) -> None:
        self._report.find(sentence, file=f"{self._folder}/{segment_name(segment)}", position=position)

    def _map(self, number: int) -> ByteArray:
        file = self._disk.open(segment_name(number))
        try:
            return file.map()
        finally:
            file.close()

    def _headers(self, data: ByteArray) -> tuple[SegmentHeader | None, SegmentHeader | None]:
        front = parse_segment_header(data[:SEGMENT_HEADER_BYTES])
        back = None
        if len(data) >= 2 * SEGMENT_HEADER_BYTES:
            back = parse_segment_header(data[len(data) - SEGMENT_HEADER_BYTES :])
        return front, back

    def _log_id(self, numbers: list[int]) -> bytes:
        votes: Counter[bytes] = Counter()
        for number in numbers:
            for header in self._headers(self._map(number)):
                if header is not None:
                    votes[header.log_id] += 1
        return max(votes, key=votes.__getitem__, default=bytes(16))

    def _segment(self, number: int, log_id: bytes) -> None:
        data = self._map(number)
        size = len(data)
        front, back = self._headers(data)
        for header, position in ((front, 0), (back, max(size - SEGMENT_HEADER_BYTES, 0))):
            if header is None:
                self._find(number, position, "the segment's header is bad")
            elif header.version != VERSION:
                self._find(number, position, f"the segment is of version {header.version}, not {VERSION}")
                return
            elif (header.segment, header.log_id, header.size) != (number, log_id, size):
                self._find(number, position, "the segment's header is of another segment, log or length")
        known = front or back
        limit = size if known is None else min(size, known.size - SEGMENT_HEADER_BYTES)
        salt = salt_of(log_id, number)
        position = SEGMENT_HEADER_BYTES
        while True:
            group = read_group(salt, data, number, position, limit)
            if group is None:
                bad = first_nonzero(data, position, limit)
                if bad == limit:
                    return
                group = self._next(salt, data, number, max(position + ALIGN, bad // ALIGN * ALIGN), limit)
                self._closed()
                if group is None:
                    # In the header of the group that begins there, most probably.
                    self._open_end = (f"{self._folder}/{segment_name(number)}", bad)
                    return
                self._find(
                    number,
                    bad,
                    f"what lies between position {position} and the group at {group.header.position} cannot be read",
                )
            self._closed()
            self._group(number, data, group)
            position = group.header.end

    def _closed(self) -> None:
        """Something follows what could not be read: so that was no tail."""
        if self._open_end is not None:
            name, position = self._open_end
            self._report.find("the rest of the segment cannot be read", file=name, position=position)
            self._open_end = None

    @staticmethod
    def _next(salt: int, data: ByteArray, number: int, start: int, limit: int) -> FoundGroup | None:
        usable = max(0, limit - start) // ALIGN * ALIGN
        words = data[start : start + usable].view("<u4")[:: ALIGN // 4]
        for word in np.flatnonzero(words == GROUP_MAGIC).tolist():
            group = read_group(salt, data, number, start + word * ALIGN, limit)
            if group is not None:
                return group
        return None

    def _group(self, number: int, data: ByteArray, group: FoundGroup) -> None:
        header = group.header
        if self._expected >= 0 and header.number != self._expected:
            # Left by damage that an earlier start has gone past; whose copies it damaged is for recovery to say.
            self._report.note(
                f"{self._folder}/{segment_name(number)} at {header.position}: group {header.number} follows group "
                f"{self._expected - 1}"
            )
        self._expected = header.number + 1
        self._report.looked_at("groups")
        self._report.looked_at("records", len(group.records))
        for record, at in group.records:
            end = at + RECORD_HEADER_BYTES + record.payload_bytes
            self._zeros(number, data, end, at + record_bytes(record.payload_bytes))
        end = header.position + GROUP_HEADER_BYTES + header.body_bytes
        self._zeros(number, data, end, align(end))

    def _zeros(self, number: int, data: ByteArray, start: int, end: int) -> None:
        if start < end and data[start:end].any():
            self._find(number, first_nonzero(data, start, end), "a byte between records is not zero")
