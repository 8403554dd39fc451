"""Where the records of one partition lie in the log: columns in offset order, for binary search and for kernels.

An index is what a partition's log *is* to the rest of the process: its rows tile `[log_start, log_end)` without
gaps. It holds no bytes of records and does no I/O. A row number is good until the next `trim` or `truncate`.

A log that has been trimmed, or that began with a snapshot, still knows of the last record before its start what
whoever goes on from there has to know: its epoch and its append time.
"""

from __future__ import annotations

import msgspec
import numpy as np
import numpy.typing as npt

from tallymark_store.wal.format import RecordMeta

IntArray = npt.NDArray[np.int64]

_COLUMNS = (
    "base_offset",
    "count",
    "append_ns",
    "segment",
    "position",
    "length",
    "kind",
    "epoch",
    "min_time_ns",
    "max_time_ns",
)
_ROWS_MIN = 64


class Row(msgspec.Struct, frozen=True, gc=False):
    """One record's place."""

    base_offset: int  # of the first offset it takes
    count: int
    append_ns: int
    segment: int
    position: int  # of the record's header, from the segment's start
    length: int  # of its payload, which begins RECORD_HEADER_BYTES behind `position`
    kind: int
    epoch: int
    min_time_ns: int
    max_time_ns: int


class PartitionIndex:
    """The rows of one partition, growable at the end, trimmable at both."""

    def __init__(self, partition: int, log_start: int = 0) -> None:
        self.partition = partition
        self.log_start = log_start  # offset of the first record kept (== log_end when there is none)
        self.log_end = log_start  # next offset to be written, exclusive; rises by append, falls by truncate
        # Of the record that ended at `log_start`; 0 at offset 0, where none did.
        self.start_epoch = 0
        self.start_append_ns = 0
        self.next_sequence = 0  # of the partition's next record in the log, of whatever kind
        self.damaged = False  # bytes of this copy can't be trusted: nothing is appended before a reset
        self._first = 0  # rows [_first, _last) of the columns are in use
        self._last = 0
        self._columns: list[IntArray] = [np.empty(_ROWS_MIN, np.int64) for _ in _COLUMNS]
        self._bases = self._columns[0]

    def __len__(self) -> int:
        return self._last - self._first

    def append(self, meta: RecordMeta, *, segment: int, position: int, length: int) -> None:
        """Add the record that begins at `log_end`."""
        assert meta.base_offset == self.log_end, "records tile the log"
        assert meta.count > 0, "a record takes an offset"
        last = self._last
        if last == len(self._bases):
            self._grow()
            last = self._last
        columns = self._columns
        columns[0][last] = meta.base_offset
        columns[1][last] = meta.count
        columns[2][last] = meta.append_ns
        columns[3][last] = segment
        columns[4][last] = position
        columns[5][last] = length
        columns[6][last] = meta.kind
        columns[7][last] = meta.epoch
        columns[8][last] = meta.min_time_ns
        columns[9][last] = meta.max_time_ns
        self._last = last + 1
        self.log_end += meta.count

    def _grow(self) -> None:
        used = len(self)
        fresh = [np.empty(max(_ROWS_MIN, used * 2), np.int64) for _ in _COLUMNS]
        for new, old in zip(fresh, self._columns, strict=True):
            new[:used] = old[self._first : self._last]
        self._columns = fresh  # in new arrays: slices handed out earlier keep what they showed
        self._bases = fresh[0]
        self._first, self._last = 0, used

    def find(self, offset: int) -> int:
        """Return the row of the record that takes `offset`; -1 if there is none."""
        if not self.log_start <= offset < self.log_end:
            return -1
        # Most questions are about one of the last two records.
        # A thread that counts again asks while records are appended: the columns that are there once `_last` was read
        # have at least so many rows, those that were there before it may have fewer.
        last = self._last - 1
        bases = self._bases
        if offset >= bases.item(last):
            return last - self._first
        if last > self._first and offset >= bases.item(last - 1):
            return last - 1 - self._first
        rows = bases[self._first : last]
        return int(rows.searchsorted(offset, side="right")) - 1

    def row(self, number: int) -> Row:
        """Return one row, 0 <= number < len."""
        assert 0 <= number < len(self), "row in range"
        at = self._first + number
        return Row(*[column.item(at) for column in self._columns])

    def meta(self, number: int) -> RecordMeta:
        """Return what the index knows of a record."""
        row = self.row(number)
        return RecordMeta(
            self.partition,
            row.kind,
            row.epoch,
            row.base_offset,
            row.count,
            row.append_ns,
            row.min_time_ns,
            row.max_time_ns,
        )

    def column(self, name: str, start: int = 0, end: int | None = None) -> IntArray:
        """Return rows [start, end) of one column of `Row`: a view, to be read before anything changes."""
        last = len(self) if end is None else end
        assert 0 <= start <= last, "rows in order"
        assert last <= len(self), "rows in range"
        return self._columns[_COLUMNS.index(name)][self._first + start : self._first + last]

    def rows_of(self, start: int, end: int) -> tuple[int, int]:
        """Return the half-open range of rows that hold offsets of [start, end)."""
        start = max(start, self.log_start)
        end = min(end, self.log_end)
        if start >= end:
            return 0, 0
        return self.find(start), self.find(end - 1) + 1

    def last_epoch(self) -> int:
        """Return the epoch of the record that ends at `log_end`; 0 at offset 0."""
        return self._columns[7].item(self._last - 1) if self._last > self._first else self.start_epoch

    def last_append_ns(self) -> int:
        """Return the append time of the record that ends at `log_end`; 0 at offset 0."""
        return int(self._columns[2][self._last - 1]) if len(self) else self.start_append_ns

    def append_ns_before(self, offset: int) -> int:
        """Return the append time of the last record that begins below `offset`, which is not below `log_start`."""
        assert offset >= self.log_start, "what lies before the log's start is not known"
        row = self.find(offset - 1)
        return int(self._columns[2][self._first + row]) if row >= 0 else self.start_append_ns

    def epoch_before(self, offset: int) -> int:
        """Return the epoch of the record that ends at `offset`; 0 at offset 0; -1 if none is known to end there."""
        if offset == self.log_start:
            return self.start_epoch
        if offset == self.log_end:
            return self.last_epoch()
        row = self.find(offset - 1)
        if row < 0:
            return -1
        at = self._first + row
        ends_there = int(self._bases[at]) + int(self._columns[1][at]) == offset
        return int(self._columns[7][at]) if ends_there else -1

    def is_boundary(self, offset: int) -> bool:
        """Say whether a record begins or ends at `offset`: whether the log can be cut there."""
        if offset in (self.log_start, self.log_end):
            return True
        row = self.find(offset)
        return row >= 0 and int(self._bases[self._first + row]) == offset

    def truncate(self, new_end: int) -> None:
        """Forget the records at and above `new_end`, which must be a boundary."""
        assert self.is_boundary(new_end), "a log is cut between records"
        if new_end < self.log_end:
            self._last = self._first + self.find(new_end)
            self.log_end = new_end

    def trim(self, segment_floor: int) -> None:
        """Forget the records in segments below `segment_floor`; they are the first rows."""
        gone = int(self.column("segment").searchsorted(segment_floor, side="left"))
        if gone:
            last = self._first + gone - 1
            self.start_epoch = int(self._columns[7][last])
            self.start_append_ns = int(self._columns[2][last])
            self._first += gone
            self.log_start = int(self._bases[self._first]) if len(self) else self.log_end

    def reset(self, log_start: int, *, epoch: int = 0, append_ns: int = 0) -> None:
        """Forget everything; the log is empty and begins at `log_start`, where a record of this epoch and time ended."""
        self._first = self._last = 0
        self.log_start = self.log_end = log_start
        self.start_epoch, self.start_append_ns = epoch, append_ns
        self.damaged = False

    def to_arrays(self) -> dict[str, IntArray]:
        """Return a copy of everything, for a checkpoint."""
        arrays = {name: self.column(name).copy() for name in _COLUMNS}
        state = (
            self.partition,
            self.log_start,
            self.log_end,
            self.next_sequence,
            int(self.damaged),
            self.start_epoch,
            self.start_append_ns,
        )
        arrays["state"] = np.array(state, np.int64)
        return arrays

    @classmethod
    def from_arrays(cls, arrays: dict[str, IntArray]) -> PartitionIndex:
        """Rebuild what `to_arrays` gave. Raises ValueError if it can't be an index."""
        try:
            partition, log_start, log_end, next_sequence, damaged, epoch, append_ns = map(
                int, arrays["state"]
            )
            columns = [np.array(arrays[name], np.int64, ndmin=1) for name in _COLUMNS]
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a partition's index: {error}") from error
        index = cls(partition, log_start)
        bases, counts = columns[0], columns[1]
        if any(column.shape != bases.shape or column.ndim != 1 for column in columns):
            raise ValueError(f"the index of partition {partition} has columns of different lengths")
        edges = np.concatenate((bases, [log_end]))
        if edges[0] != log_start or (counts <= 0).any() or (np.diff(edges) != counts).any():
            raise ValueError(f"the index of partition {partition} has a gap")
        index.log_end = log_end
        index.next_sequence = next_sequence
        index.damaged = bool(damaged)
        index.start_epoch, index.start_append_ns = epoch, append_ns
        index._last = len(bases)
        if len(bases):
            index._columns = columns
            index._bases = bases
        return index
