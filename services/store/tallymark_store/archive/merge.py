"""Several sorted files of adjacent offset ranges to one, in bounded memory.

One row group of each file is held at a time. What is known to come before everything that is not held is taken,
sorted and written; so there are at most a row group of each file and some of the result in memory, however large the
files are. Checksums of the files are verified before anything is read from them.

Most columns of usual events say the same in every row, of a group and of all of them: nothing of a kind that isn't used,
one metric, one partition. What statistics tell to be constant isn't read, and what is constant isn't put in order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from tallymark_runtime.disk import Disk, FileMissingError
from tallymark_store.archive.columns import SCHEMA, SORT_KEY
from tallymark_store.archive.manifest import ArchiveError, ArchiveFile
from tallymark_store.archive.merge_kernels import merge_runs
from tallymark_store.archive.writer import ROW_GROUP_ROWS, FileWriter, Written, checksum, open_file

_WAITING_MAX: Final = 64  # pieces of a row group: more are joined

_REPEATED_MAX: Final = 64  # arrays of one value that are kept
# What goes without a value where another column does.
_TOGETHER: Final = (("id", "id_kind"), ("value_text", "value_kind"))

Key = tuple[int, ...]
Ints = npt.NDArray[np.int64]
Constants = dict[str, object]  # by column, what all rows have there; None: nothing


class Piece(NamedTuple):
    """Rows, and what is the same in all of them."""

    table: pa.Table
    constants: Constants


class _Repeated:
    """Arrays of one value, made once."""

    def __init__(self) -> None:
        self._made: dict[tuple[str, object], pa.Array] = {}

    def array(self, name: str, value: object, rows: int) -> pa.Array:
        """A column of so many rows that all have `value`."""
        made = self._made.get((name, value))
        if made is None or len(made) < rows:
            if len(self._made) >= _REPEATED_MAX:
                self._made.clear()
            made = self._made[name, value] = _repeated(
                SCHEMA.field(name).type, value, max(rows, ROW_GROUP_ROWS)
            )
        return made.slice(0, rows)

    def table(
        self, columns: Mapping[str, pa.Array | pa.ChunkedArray], constants: Constants, rows: int
    ) -> pa.Table:
        """All columns, of those that there are and of those that are constant."""
        arrays = [
            columns[name] if name in columns else self.array(name, constants[name], rows)
            for name in SCHEMA.names
        ]
        return pa.Table.from_arrays(arrays, schema=SCHEMA)


def _repeated(kind: pa.DataType, value: object, rows: int) -> pa.Array:
    if not pa.types.is_dictionary(kind):
        return pa.nulls(rows, kind) if value is None else pa.repeat(pa.scalar(value, kind), rows)
    words = pa.array([] if value is None else [value], kind.value_type)
    if value is None:
        return pa.DictionaryArray.from_arrays(pa.nulls(rows, kind.index_type), words)
    return pa.DictionaryArray.from_arrays(pa.repeat(pa.scalar(0, kind.index_type), rows), words)


def _told_constants(footer: pq.FileMetaData, number: int) -> Constants:
    """What the statistics of a row group say is the same in all of its rows."""
    group = footer.row_group(number)
    found: Constants = {}
    for place in range(group.num_columns):
        column = group.column(place)
        told = column.statistics
        if told is None or not told.has_null_count:
            continue
        if told.null_count == group.num_rows:
            found[column.path_in_schema] = None
        elif told.null_count == 0 and told.has_min_max and told.min == told.max:
            found[column.path_in_schema] = told.min
    for name, other in _TOGETHER:
        if other in found and found[other] is None:
            found[name] = None
    return found


def _seen_constants(table: pa.Table) -> Constants:
    """What is seen at a glance to be the same in all rows."""
    found: Constants = {}
    for name, column in zip(table.column_names, table.columns, strict=True):
        if column.null_count == len(column):
            found[name] = None
        elif column.null_count == 0 and column.num_chunks == 1 and pa.types.is_dictionary(column.type):
            words = column.chunk(0).dictionary
            if len(words) == 1:
                found[name] = words[0].as_py()
    return found


def _shared(pieces: Sequence[Piece]) -> Constants:
    """What is the same in all rows of all pieces."""
    first = pieces[0].constants
    return {
        name: value
        for name, value in first.items()
        if all(name in piece.constants and piece.constants[name] == value for piece in pieces[1:])
    }


class _Input:
    """A file that is read in order."""

    def __init__(self, disk: Disk, name: str, repeated: _Repeated) -> None:
        self._file = open_file(disk, name)
        self._repeated = repeated
        self._next_group = 0
        self._held = pa.table({})
        self._constants: Constants = {}
        self._keys: list[npt.NDArray[np.generic]] = []
        self._at = 0  # rows of the group that were taken

    @property
    def has_more(self) -> bool:
        """Whether there are groups that aren't held."""
        return self._next_group < int(self._file.num_row_groups)

    @property
    def rows(self) -> int:
        """Held, and not taken."""
        return int(self._held.num_rows) - self._at

    def fill(self) -> None:
        """Hold the next group, if nothing is held."""
        while not self.rows and self.has_more:
            told = _told_constants(self._file.metadata, self._next_group)
            wanted = [name for name in SCHEMA.names if name not in told]
            rows = self._file.metadata.row_group(self._next_group).num_rows
            read = self._file.read_row_group(self._next_group, columns=wanted, use_threads=False)
            self._constants = told | _seen_constants(read)
            self._held = self._repeated.table(
                dict(zip(read.column_names, read.columns, strict=True)), told, rows
            )
            self._keys = [self._held.column(name).to_numpy() for name in SORT_KEY]
            self._next_group += 1
            self._at = 0

    @property
    def last(self) -> Key:
        """The key of the last row that is held."""
        return self._key(int(self._held.num_rows) - 1)

    def _key(self, row: int) -> Key:
        return tuple(int(column[row]) for column in self._keys)

    def take(self, bound: Key | None) -> Piece:
        """The rows up to a key, inclusive; None: all that are held."""
        low, high = self._at, int(self._held.num_rows)
        while bound is not None and low < high:
            middle = (low + high) // 2
            if self._key(middle) <= bound:
                low = middle + 1
            else:
                high = middle
        taken = self._held.slice(self._at, high - self._at)
        self._at = high
        return Piece(taken, self._constants)


def merge(
    disk: Disk,
    files: Sequence[ArchiveFile],
    name: str,
    metadata: Mapping[str, str],
    check: Callable[[], None] = lambda: None,
) -> Written:
    """Write one file of what several hold; they are left as they are.

    Args:
        disk: the folder.
        files: in offset order, which is kept among equal keys.
        name: of the new file.
        metadata: of the new file.
        check: called between pieces; what it raises ends the merge.

    Raises:
        ArchiveError: a file is damaged.
        DiskError: the disk refused.
    """
    assert len(files) >= 2, "there is something to merge"
    for file in files:
        verify(disk, file)
        check()
    repeated = _Repeated()
    inputs = [_Input(disk, file.name, repeated) for file in files]
    output = _Output(disk, name, metadata, repeated)
    sorter = _Sorter(len(files), repeated)
    try:
        while True:
            for held in inputs:
                held.fill()
            active = [held for held in inputs if held.rows]
            if not active:
                break
            # Beyond the least of these, a group that isn't held may have rows.
            bound = min([held.last for held in active if held.has_more], default=None)
            parts = [part for part in (held.take(bound) for held in active) if part.table.num_rows]
            for piece in sorter.sorted(parts, output):
                output.add(piece)
                check()
        written = output.close()
    except BaseException:
        output.abandon()
        raise
    if written.rows != sum(file.rows for file in files):
        raise ArchiveError(f"merging gave {written.rows} rows instead of {sum(file.rows for file in files)}")
    return written


def verify(disk: Disk, file: ArchiveFile) -> None:
    """Look at a file's bytes.

    Raises:
        ArchiveError: they are not as they were written.
        DiskError: the disk can't be read.
    """
    try:
        found = checksum(disk, file.name)
    except FileMissingError:
        raise ArchiveError(f"the archive's file {file.name} is missing") from None
    if found != (file.bytes, file.crc32c):
        raise ArchiveError(f"the archive's file {file.name} is damaged: its checksum doesn't match")


def joined(tables: list[pa.Table]) -> pa.Table:
    """One table of several, in one chunk, with one dictionary for each column that has any."""
    return tables[0] if len(tables) == 1 else pa.concat_tables(tables).unify_dictionaries().combine_chunks()


def _joined_pieces(pieces: list[Piece], repeated: _Repeated, order: pa.Array | None = None) -> Piece:
    """One piece of several, in another order where that is given. What is constant is neither copied nor moved."""
    if len(pieces) == 1:
        return pieces[0]
    constants = _shared(pieces)
    varying = [name for name in SCHEMA.names if name not in constants]
    rows = sum(piece.table.num_rows for piece in pieces)
    table = joined([piece.table.select(varying) for piece in pieces])
    if order is not None:
        table = table.take(order)
    columns = dict(zip(varying, table.columns, strict=True))
    return Piece(repeated.table(columns, constants, rows), constants)


class _Output:
    """The file in the making: rows gather until they fill a row group."""

    def __init__(self, disk: Disk, name: str, metadata: Mapping[str, str], repeated: _Repeated) -> None:
        self._disk = disk
        self._name = name
        self._metadata = metadata
        self._repeated = repeated
        self._writer: FileWriter | None = None
        self._waiting: list[Piece] = []
        self._rows = 0

    @property
    def room(self) -> int:
        """Rows until the row group is full."""
        return ROW_GROUP_ROWS - self._rows

    def add(self, piece: Piece) -> None:
        """Take the next rows, no more than there is room for."""
        self._waiting.append(piece)
        self._rows += piece.table.num_rows
        if not self.room:
            self._write()
        elif len(self._waiting) == _WAITING_MAX:
            self._waiting = [_joined_pieces(self._waiting, self._repeated)]

    def _write(self) -> None:
        table = _joined_pieces(self._waiting, self._repeated).table
        self._writer = self._writer or FileWriter(self._disk, self._name, table, self._metadata)
        self._writer.write(table)
        self._waiting = []
        self._rows = 0

    def close(self) -> Written:
        """Write what is left, and make it durable."""
        if self._rows:
            self._write()
        assert self._writer is not None, "a file has rows"
        return self._writer.close()

    def abandon(self) -> None:
        """Leave it incomplete."""
        if self._writer is not None:
            self._writer.abandon()


class _Sorter:
    """Puts rows of several files in order, a row group at a time.

    Rows of a file are taken one after the other, so what becomes a row group is a slice of each: no table is ever made of
    more. Memory that is new to the process costs more than what is done with it: keys and order have theirs for good.
    """

    def __init__(self, files: int, repeated: _Repeated) -> None:
        self._repeated = repeated
        self._keys = np.empty((len(SORT_KEY) - 1, files * ROW_GROUP_ROWS), np.uint64)
        self._order: npt.NDArray[np.int32] = np.empty(ROW_GROUP_ROWS, np.int32)

    def sorted(self, parts: list[Piece], output: _Output) -> Iterator[Piece]:
        """The rows of all parts in order, in pieces that the output has room for."""
        ends = np.cumsum([part.table.num_rows for part in parts], dtype=np.int64)
        starts = ends - [part.table.num_rows for part in parts]
        if len(parts) > 1:
            self._hold(parts, starts, ends)
        at = starts.copy()
        left = int(ends[-1])
        while left:
            count = min(left, output.room)
            left -= count
            if len(parts) == 1:
                yield Piece(parts[0].table.slice(int(at[0]), count), parts[0].constants)
                at += count
                continue
            before = at - starts
            order = self._order[:count]
            # Files are in offset order and so are equal keys within each: a stable merge needs no offsets.
            uids, accounts, times = self._keys
            merge_runs(uids, accounts, times, at, ends, order)
            taken = zip(parts, before.tolist(), (at - starts).tolist(), strict=True)
            pieces = [
                Piece(part.table.slice(first, last - first), part.constants)
                for part, first, last in taken
                if last > first
            ]
            yield _joined_pieces(pieces, self._repeated, pa.array(order))

    def _hold(self, parts: list[Piece], starts: Ints, ends: Ints) -> None:
        if ends[-1] > self._keys.shape[1]:  # a file of another writer may have larger row groups
            self._keys = np.empty((len(SORT_KEY) - 1, int(ends[-1])), np.uint64)
        for keys, name in zip(self._keys, SORT_KEY, strict=False):
            for part, start, end in zip(parts, starts.tolist(), ends.tolist(), strict=True):
                keys[start:end] = part.table.column(name).to_numpy().view(np.uint64)
