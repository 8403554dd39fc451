"""Where scans find a partition's records: which there are, their bytes, and that the bytes are what was written.

A scan holds the copy of the index that it began with (`RecordRows`) and reads committed records only. Those never
change and never leave while somebody may read them, so a scan in slices, or in a thread of its own, sees one state
of the log whatever is appended meanwhile.

Every record is checked against its checksum each time before its bytes are used: a damaged account column would
otherwise hide events without a word.
"""

from __future__ import annotations

import bisect
import struct
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import google_crc32c
import numpy as np
import numpy.typing as npt

from tallymark_runtime.disk import FileMissingError
from tallymark_store.wal import RECORD_HEADER_BYTES, DamagedError, RecordKind, Wal
from tallymark_store.wal.format import salt_of, segment_name

ByteArray = npt.NDArray[np.uint8]
IntArray = npt.NDArray[np.int64]

TAIL_SEGMENT = 2**62  # stands for records that weren't in their segment's file yet
RUN_BYTES_MAX = 64 * 1024 * 1024  # checked and scanned in one go


class RecordRows(NamedTuple):
    """Event batches in offset order, as columns (int64, one entry per record)."""

    base_offset: IntArray
    event_count: IntArray
    append_ns: IntArray
    segment: IntArray
    body: IntArray  # position of the body (`batch`) in its segment
    length: IntArray  # of the body
    min_time_ns: IntArray  # event times of its events, inclusive; absent ones count as `append_ns`
    max_time_ns: IntArray

    def take(self, wanted: npt.NDArray[np.bool_]) -> RecordRows:
        """Return only the wanted rows."""
        return RecordRows(*(column[wanted] for column in self))


class Pinned(NamedTuple):
    """Rows whose bytes can be read from any thread at any later time."""

    rows: RecordRows
    tail: ByteArray  # holds the bodies of rows in TAIL_SEGMENT


class RecordSource(Protocol):
    """A partition's committed event batches."""

    @property
    def partition(self) -> int:
        """The partition's number."""
        ...

    @property
    def log_start(self) -> int:
        """The first offset that is still in the log: what lies below can't be scanned."""
        ...

    def rows(self, start_offset: int, end_offset: int) -> RecordRows:
        """Return the batches that hold offsets of [start_offset, end_offset), in copies of the columns."""
        ...

    def pin(self, rows: RecordRows) -> Pinned:
        """Make rows that `rows` returned readable later; to be called before anything else happens to the log."""
        ...

    def segment(self, number: int) -> ByteArray:
        """Return a segment's bytes, read-only."""
        ...

    def check(self, number: int, data: ByteArray, bodies: list[int], lengths: list[int]) -> None:
        """Raise DamagedError unless the checksum of each body holds."""
        ...


def rows_between(source: RecordSource, first: int, last: int) -> RecordRows:
    """The batches that hold offsets of [first, last); none where that is empty."""
    rows = source.rows(first, max(first, last))
    return rows if first < last else rows.take(np.zeros(len(rows.base_offset), np.bool_))


class RecordCursor:
    """Walks over rows in runs of records that lie in one segment, checking each before it is handed out."""

    def __init__(self, source: RecordSource, rows: RecordRows) -> None:
        rows, tail = source.pin(rows)
        self._source = source
        self._next = 0  # row
        self.segment = -1  # of the last run
        self._segments: list[int] = rows.segment.tolist()
        self._bodies: list[int] = rows.body.tolist()
        self._lengths: list[int] = rows.length.tolist()
        self._events: list[int] = rows.event_count.cumsum().tolist()
        self._bytes: list[int] = rows.length.cumsum().tolist()
        self._records = np.ascontiguousarray(
            np.stack((rows.base_offset, rows.event_count, rows.append_ns, rows.body, rows.length), axis=1)
        )
        # All of them now: a segment may be recycled before its turn comes, but not from under a view of it.
        self._views = {
            number: tail if number == TAIL_SEGMENT else source.segment(number)
            for number in np.unique(rows.segment).tolist()
        }

    def __len__(self) -> int:
        return len(self._segments)

    def rewind(self) -> None:
        """Begin again."""
        self._next = 0

    def next_run(self, events_max: int) -> tuple[ByteArray, IntArray] | None:
        """Return a segment's bytes and the records (`kernels.K_` columns) to scan in it; None at the end.

        A run has at most `events_max` events, or one record.
        """
        first = self._next
        if first == len(self._segments):
            return None
        number = self._segments[first]
        events = self._events[first - 1] if first else 0
        length = self._bytes[first - 1] if first else 0
        last = min(
            bisect.bisect_right(self._segments, number, first),
            bisect.bisect_right(self._events, events + events_max, first),
            bisect.bisect_right(self._bytes, length + RUN_BYTES_MAX, first),
        )
        last = max(last, first + 1)
        data = self._views[number]
        if number != TAIL_SEGMENT:
            self._source.check(number, data, self._bodies[first:last], self._lengths[first:last])
        self._next = last
        self.segment = number
        return data, self._records[first:last]


class WalSource:
    """The records of one partition in the write-ahead log.

    Rows come from the log's index, bytes from its segment files. What is committed without having been written here
    yet (other replicas were faster) is copied from the writer's memory when it is pinned.
    """

    def __init__(self, wal: Wal, partition: int) -> None:
        self.partition = partition
        self._wal = wal

    @property
    def log_start(self) -> int:
        """The first offset that is still in the log."""
        index = self._wal.partitions.get(self.partition)
        return 0 if index is None else index.log_start

    def rows(self, start_offset: int, end_offset: int) -> RecordRows:
        """Return the batches that hold offsets of [start_offset, end_offset), in copies of the columns."""
        index = self._wal.partitions.get(self.partition)
        first, last = (0, 0) if index is None else index.rows_of(start_offset, end_offset)
        if index is None or first == last:
            return RecordRows(*(np.empty(0, np.int64) for _ in RecordRows._fields))
        batches = index.column("kind", first, last) == int(RecordKind.EVENTS)
        columns = {name: index.column(name, first, last)[batches] for name in _WAL_COLUMNS}
        columns["event_count"] = columns.pop("count")
        columns["body"] = columns.pop("position") + RECORD_HEADER_BYTES
        return RecordRows(**columns)

    def pin(self, rows: RecordRows) -> Pinned:
        """Copy the bodies that aren't on disk yet."""
        synced = self._wal.synced_end
        position = rows.body - RECORD_HEADER_BYTES
        waiting = rows.segment > synced.segment
        waiting |= (rows.segment == synced.segment) & (position >= synced.position)
        if not waiting.any():
            return Pinned(rows, np.empty(0, np.uint8))
        parts: list[ByteArray] = []
        at = 0
        segments, bodies = rows.segment.copy(), rows.body.copy()
        for number in np.flatnonzero(waiting).tolist():
            found = self._wal.read(self.partition, int(rows.base_offset[number]))
            assert found is not None, "the index holds the row"
            segments[number], bodies[number] = TAIL_SEGMENT, at
            parts.append(found[1])
            at += len(found[1])
        tail = np.concatenate(parts)
        tail.setflags(write=False)  # as segments are: kernels are compiled for one kind of array
        return Pinned(rows._replace(segment=segments, body=bodies), tail)

    def segment(self, number: int) -> ByteArray:
        """Return a segment's bytes, read-only."""
        try:
            return self._wal.open_segment_map(number)
        except FileMissingError as error:
            raise damaged(self.partition, number, 0, "its file is missing") from error

    def check(self, number: int, data: ByteArray, bodies: list[int], lengths: list[int]) -> None:
        """Raise DamagedError unless the checksum of each body holds."""
        # The file's own header names the log. Where that is damaged no checksum holds, which is as it should be.
        salt = salt_of(data[_LOG_ID].tobytes(), number)
        size = len(data)
        view = data.data
        extend = google_crc32c.extend
        read_crc = _PAYLOAD_CRC.unpack_from
        for body, length in zip(bodies, lengths, strict=True):
            end = body + length
            if end > size or extend(salt, data[body:end]) != read_crc(view, body - _CRC_BEFORE_BODY)[0]:
                raise damaged(self.partition, number, body)


_WAL_COLUMNS = (
    "base_offset",
    "count",
    "append_ns",
    "segment",
    "position",
    "length",
    "min_time_ns",
    "max_time_ns",
)
_LOG_ID = slice(24, 40)  # in a segment's header, see `wal.format`
_PAYLOAD_CRC = struct.Struct("<I")
_CRC_BEFORE_BODY = 8  # see `wal.format`: payload checksum and header checksum end the record's header


class MemorySource:
    """Records in memory: the in-memory twin of the log's reader."""

    def __init__(self, partition: int, *, segment_bytes: int = 64 * 1024) -> None:
        self.partition = partition
        self.log_start = 0
        self._segment_bytes = segment_bytes
        self._segments: list[bytearray] = [bytearray()]
        self._arrays: dict[int, ByteArray] = {}
        self._crcs: dict[tuple[int, int], int] = {}
        self._rows: list[tuple[int, ...]] = []

    def append(
        self, body: bytes, *, base_offset: int, count: int, append_ns: int, min_time_ns: int, max_time_ns: int
    ) -> None:
        """Add an event batch; control records just leave a gap between offsets."""
        if self._segments[-1] and len(self._segments[-1]) + len(body) > self._segment_bytes:
            self._segments.append(bytearray())
        number = len(self._segments) - 1
        position = len(self._segments[-1])
        self._segments[-1] += body
        self._arrays.pop(number, None)
        self._crcs[number, position] = google_crc32c.value(body)
        self._rows.append(
            (base_offset, count, append_ns, number, position, len(body), min_time_ns, max_time_ns)
        )

    def rows(self, start_offset: int, end_offset: int) -> RecordRows:
        """Return the batches that hold offsets of [start_offset, end_offset)."""
        kept = [row for row in self._rows if row[0] < end_offset and row[0] + row[1] > start_offset]
        table = np.array(kept, np.int64).reshape(len(kept), len(RecordRows._fields))
        return RecordRows(*(np.ascontiguousarray(table[:, k]) for k in range(table.shape[1])))

    def pin(self, rows: RecordRows) -> Pinned:
        """Return the rows: memory stays."""
        return Pinned(rows, np.empty(0, np.uint8))

    def segment(self, number: int) -> ByteArray:
        """Return a segment's bytes."""
        if number not in self._arrays:
            self._arrays[number] = np.frombuffer(bytes(self._segments[number]), np.uint8)
        return self._arrays[number]

    def check(self, number: int, data: ByteArray, bodies: list[int], lengths: list[int]) -> None:
        """Raise DamagedError unless the checksum of each body holds."""
        for body, length in zip(bodies, lengths, strict=True):
            if google_crc32c.value(data[body : body + length]) != self._crcs[number, body]:
                raise damaged(self.partition, number, body)

    def drop(self, offset: int) -> None:
        """Forget the batches that lie below an offset."""
        self._rows = [row for row in self._rows if row[0] + row[1] > offset]
        self.log_start = self._rows[0][0] if self._rows and self._rows[0][0] < offset else offset

    def flip_bit(self, row: int, byte: int, bit: int = 0) -> None:
        """Damage a stored body."""
        number, position = self._rows[row][3:5]
        self._segments[number][position + byte] ^= 1 << bit
        self._arrays.pop(number, None)

    def bodies(self) -> Iterator[tuple[int, bytes]]:
        """Yield (base offset, body) of every batch."""
        for base, _, _, number, position, length, _, _ in self._rows:
            yield base, bytes(self._segments[number][position : position + length])


def damaged(
    partition: int, segment: int, position: int, why: str = "its checksum doesn't match"
) -> DamagedError:
    """Make the error for a record that can't be read."""
    return DamagedError(
        f"partition {partition}: the event batch at byte {position} of {segment_name(segment)} is damaged: {why}",
        partition=partition,
        segment=segment,
        position=position,
    )
