"""A sorted table to a Parquet file on a disk port, and a file back to row groups.

The encoding of each column is chosen so that the usual event is small: what is sorted or near its neighbours as
differences, words and property sets as dictionaries, text as it is; what may still shrink then under zstd. Row groups
are bounded and carry statistics of what is looked for by them, so a reader fetches the few that may hold an account's
events.

A file is written in pieces with a sync behind each, so that the log's own syncs come in between, and is durable in
content when `close` returns; its name is once the caller has synced the folder.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tallymark_runtime.disk import Disk, File
from tallymark_store.archive.columns import SCHEMA, SORT_KEY

ROW_GROUP_ROWS: Final = 65_536
PIECE_BYTES: Final = 4 * 1024 * 1024  # written between two syncs
FORMAT_VERSION: Final = 1

_DIFFERENCES: Final = ("account", "value", "offset")
_TIMES: Final = ("time_ns", "append_time_ns")  # whichever suits
_WORDS: Final = (
    "metric", "metric_uid", "value_kind", "operation", "id_kind", "dimensions", "properties", "partition",
)  # fmt: skip
_LONG_DICTIONARIES: Final = ("metric", "dimensions", "properties")
# Of what rows are looked for by, and of what merges needn't read where it is the same in all rows.
_STATISTICS: Final = (
    "metric", "metric_uid", "account", "time_ns", "time_given", "append_time_ns", "value", "value_kind", "operation",
    "id_kind", "partition", "offset",
)  # fmt: skip
# Of the others nothing is left to compress: differences of offsets and times are packed bit by bit, and words that
# repeat are a few bits; the attempt costs more than all the rest.
_COMPRESSED: Final = ("account", "time_given", "value", "value_text", "id", "dimensions", "properties")
_REPEATS: Final = 8  # rows for each different value from which on a dictionary is smaller than differences
_COMPACT_FROM: Final = 64  # words of a dictionary that are written whole though not all are used


class Written(NamedTuple):
    """A file that has been written."""

    rows: int
    size: int  # bytes
    crc32c: int  # of all of them
    tail_bytes: int  # that stand behind the pages
    tail_crc32c: int


class _Sink(io.RawIOBase):
    """A file of a disk port as pyarrow writes to it."""

    def __init__(self, file: File) -> None:
        super().__init__()
        self._file = file
        self._waiting: list[bytes] = []
        self._waiting_bytes = 0
        self.position = 0  # of what was handed in
        self.crc32c = 0
        self.tail_start = 0
        self.tail_crc32c = 0  # of what came since `begin_tail`

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        content = bytes(data)  # pyarrow's buffer is its own again afterwards
        self.crc32c = google_crc32c.extend(self.crc32c, content)
        self.tail_crc32c = google_crc32c.extend(self.tail_crc32c, content)
        self._waiting.append(content)
        self._waiting_bytes += len(content)
        self.position += len(content)
        if self._waiting_bytes >= PIECE_BYTES:
            self.flush_piece()
        return len(content)

    def tell(self) -> int:
        return self.position

    def begin_tail(self) -> None:
        """From here on, nothing has a checksum of its own."""
        self.tail_start = self.position
        self.tail_crc32c = 0

    def flush_piece(self) -> None:
        """Write what waits, and sync it."""
        self._file.write(self.position - self._waiting_bytes, self._waiting)
        self._file.sync()
        self._waiting = []
        self._waiting_bytes = 0


class FileWriter:
    """A file in the making: `write` row groups in order, then `close`; or `abandon` it.

    Args:
        disk: the folder.
        name: of the file; what had it is overwritten.
        first: rows that are typical of the file, to choose encodings by.
        metadata: goes into the file's key-value metadata.
    """

    def __init__(self, disk: Disk, name: str, first: pa.Table, metadata: Mapping[str, str]) -> None:
        self._file = disk.create(name)
        self._sink = _Sink(self._file)
        self._rows = 0
        dictionaries = [*_WORDS, *(column for column in _TIMES if _repeats(first[column]))]
        differences = [*_DIFFERENCES, *(column for column in _TIMES if column not in dictionaries)]
        schema = SCHEMA.with_metadata({"tallymark.format": str(FORMAT_VERSION), **metadata})
        self._writer = pq.ParquetWriter(
            pa.PythonFile(self._sink, mode="w"),
            schema,
            version="2.6",
            compression={name: "zstd" if name in _COMPRESSED else "none" for name in SCHEMA.names},
            use_dictionary=dictionaries,
            column_encoding=dict.fromkeys(differences, "DELTA_BINARY_PACKED"),
            write_statistics=list(_STATISTICS),
            # A row group is read as a whole, or not at all: each of more pages would only cost its making.
            write_batch_size=ROW_GROUP_ROWS,
            max_rows_per_page=ROW_GROUP_ROWS,
            write_page_index=True,
            write_page_checksum=True,
            sorting_columns=[pq.SortingColumn(SCHEMA.get_field_index(name)) for name in SORT_KEY],
        )

    def write(self, table: pa.Table) -> None:
        """Write the next rows: in groups of ROW_GROUP_ROWS, the last one what is left."""
        for start in range(0, table.num_rows, ROW_GROUP_ROWS):
            group = table.slice(start, ROW_GROUP_ROWS)
            self._writer.write_table(_compacted(group), row_group_size=ROW_GROUP_ROWS)
            self._rows += group.num_rows

    def close(self) -> Written:
        """End the file and make its content durable."""
        try:
            self._sink.begin_tail()
            self._writer.close()
            self._sink.flush_piece()
        finally:
            self._file.close()
        sink = self._sink
        return Written(
            self._rows, sink.position, sink.crc32c, sink.position - sink.tail_start, sink.tail_crc32c
        )

    def abandon(self) -> None:
        """Leave the file as it is, incomplete: nobody lists it."""
        self._file.close()


def write_file(disk: Disk, name: str, table: pa.Table, metadata: Mapping[str, str]) -> Written:
    """Write a sorted table to a file of its own. Raises DiskError."""
    writer = FileWriter(disk, name, table.slice(0, ROW_GROUP_ROWS), metadata)
    try:
        writer.write(table)
    except BaseException:
        writer.abandon()
        raise
    return writer.close()


def open_file(disk: Disk, name: str) -> pq.ParquetFile:
    """Open a file for reading; nothing of it is copied before it is read. Raises DiskError."""
    file = disk.open(name)
    try:
        data = file.map()
    finally:
        file.close()
    return pq.ParquetFile(pa.BufferReader(pa.py_buffer(data)))


def checksum(disk: Disk, name: str) -> tuple[int, int]:
    """The size and the CRC-32C of a file as it is now. Raises DiskError."""
    file = disk.open(name)
    try:
        data = file.map()
    finally:
        file.close()
    crc = 0
    for start in range(0, len(data), PIECE_BYTES):
        crc = google_crc32c.extend(crc, data[start : start + PIECE_BYTES])
    return len(data), crc


def _repeats(column: pa.ChunkedArray) -> bool:
    values = column.to_numpy()
    return len(np.unique(values)) * _REPEATS <= len(values)


def _compacted(table: pa.Table) -> pa.Table:
    """The same rows, with dictionaries of what they use: each row group would carry the whole ones otherwise."""
    for place, field in enumerate(table.schema):
        if field.name not in _LONG_DICTIONARIES:
            continue
        column = table.column(place).combine_chunks()
        if isinstance(column, pa.ChunkedArray):  # no chunk, or several that have no dictionary in common
            column = column.unify_dictionaries().combine_chunks()
        words = len(column.dictionary)
        if words <= _COMPACT_FROM:
            continue
        indices = column.indices
        filled = indices.fill_null(0).to_numpy()
        is_used = np.zeros(words, np.bool_)
        is_used[filled] = True
        if is_used.all():
            continue
        renumbered = (is_used.cumsum(dtype=np.int32) - np.int32(1))[filled]
        mask = indices.is_null().to_numpy(zero_copy_only=False) if indices.null_count else None
        fresh = pa.DictionaryArray.from_arrays(
            pa.array(renumbered, mask=mask), column.dictionary.take(pa.array(np.flatnonzero(is_used)))
        )
        table = table.set_column(place, field, fresh)
    return table
