"""Files of units, as the fold sees them: what it keeps of each in memory, the pieces they are made of, and scans.

Pure: a file comes in as its bytes (mapped, so that only what is looked at is read) and goes out as buffers with their
places. Who has a disk writes them, and keeps them until nobody needs them (`spilling`).

A file's header::

    0   8 bytes  magic "TMKCELLS"        40  u64      filter blocks
    8   u32      version                 48  4 i64    lowest start of days, of periods; highest, likewise
    12  u32      partition               80  u32      CRC-32C of the index
    16  u64      records                 84  u32      CRC-32C of the filter
    24  u64      blocks                  88  u32      CRC-32C of the header so far
    32  u64      units

It is written last: a file without one is none.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

import google_crc32c
import numpy as np
import numpy.typing as npt

from tallymark_store.fold import checking, packing
from tallymark_store.fold.cells import CELL_WORDS
from tallymark_store.fold.evicting import CUT_FIELDS, U_ACCOUNT, U_FIRST, U_KIND, U_START, UNIT_FIELDS
from tallymark_store.fold.units import (
    BLOCK_BYTES,
    BLOCK_RECORDS,
    BLOCK_WORDS,
    F_BLOCKS,
    F_COUNT,
    F_FILTER,
    F_FILTER_BLOCKS,
    F_FIRST,
    F_INDEX,
    F_LAST,
    F_RECORDS,
    FILE_FIELDS,
)
from tallymark_store.wal.errors import DamagedError

Ints = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]

VERSION = 1
UNIT_RECORDS_MAX = 1 << 16  # of the largest unit: a set of 130,000 entries; larger ones stay in memory
PIECE_RECORDS = 1 << 18  # that leave memory together: 24 MiB
_WRITTEN_RECORDS = 1 << 17  # packed at a time
_CHECKED_BLOCKS = 1 << 12  # looked at, at a time
_FILTER_BITS = 12  # a unit
_HEADER = struct.Struct("<8sIIQQQQqqqqII")
_CRC = struct.Struct("<I")
_MAGIC = b"TMKCELLS"
_HIGHEST = 2**63 - 1


class SpilledFileError(Exception):
    """The bytes are not a whole file of units; the message says what is wrong."""


class SpilledFile:
    """A file of units that may be looked at.

    Attributes:
        name: what it is called where it lies.
        records: how many there are.
        units: likewise.
        file_bytes: its length.
        memory_bytes: what of it is kept in memory.
        row: of the table that kernels see.
    """

    def __init__(self, name: str, data: Bytes, partition: int) -> None:
        """Take a file's bytes, which must not change, nor go.

        Raises:
            SpilledFileError: it is damaged, or of another version or partition.
        """
        head = data[: _HEADER.size + _CRC.size].tobytes()
        if len(data) < BLOCK_BYTES or google_crc32c.value(head[: _HEADER.size]) != _CRC.unpack(head[-4:])[0]:
            raise SpilledFileError(f"file {name}: the header is damaged")
        magic, version, number, records, blocks, units, filters, *rest = _HEADER.unpack(head[: _HEADER.size])
        *starts, index_crc, filter_crc = rest
        if magic != _MAGIC or version != VERSION or number != partition:
            raise SpilledFileError(f"file {name} is none of partition {partition} in version {VERSION}")
        index_at = BLOCK_BYTES * (1 + blocks)
        filter_at = index_at + 24 * blocks
        if len(data) != filter_at + 64 * filters or not 0 < records <= blocks * BLOCK_RECORDS or filters < 1:
            raise SpilledFileError(f"file {name} has {len(data)} bytes, which is not what its header says")
        # Copies: looked at all the time, and not to be read from the disk for it.
        self._index: Ints = np.frombuffer(data[index_at:filter_at].tobytes(), dtype=np.int64).reshape(-1, 3)
        self._filter = np.frombuffer(data[filter_at:].tobytes(), dtype=np.uint64)
        if google_crc32c.value(self._index.tobytes()) != index_crc:
            raise SpilledFileError(f"file {name}: the index is damaged")
        if google_crc32c.value(self._filter.tobytes()) != filter_crc:
            raise SpilledFileError(f"file {name}: the filter is damaged")
        self._data = data  # addresses lead into it
        self.name = name
        self.records: int = records
        self.units: int = units
        self.file_bytes = len(data)
        self.memory_bytes = self._index.nbytes + self._filter.nbytes
        self.row: Ints = np.zeros(FILE_FIELDS, dtype=np.int64)
        self.row[F_RECORDS] = data.ctypes.data + BLOCK_BYTES
        self.row[F_COUNT] = records
        self.row[F_BLOCKS] = blocks
        self.row[F_INDEX] = self._index.ctypes.data
        self.row[F_FILTER] = self._filter.ctypes.data
        self.row[F_FILTER_BLOCKS] = filters
        self.row[F_FIRST : F_FIRST + 4] = starts
        assert F_LAST == F_FIRST + 2

    def damage(self) -> Iterator[int]:
        """Look at every byte that was not looked at when the file was opened: where damage is, -1 for parts without."""
        head = _HEADER.size + _CRC.size
        yield head if self._data[head:BLOCK_BYTES].any() else -1
        table = self.row.reshape(1, -1)
        for first in range(0, int(self.row[F_BLOCKS]), _CHECKED_BLOCKS):
            block = int(checking.unsound_block(table, 0, first, first + _CHECKED_BLOCKS))
            yield -1 if block < 0 else BLOCK_BYTES * (1 + block)

    def records_of(self, kind: int) -> tuple[int, int]:
        """Records [first, end) among which all are that belong to units of a kind; some others may be there."""
        kinds = self._index[:, 0]
        first = max(int(kinds.searchsorted(kind, side="left")) - 1, 0)
        end = int(kinds.searchsorted(kind, side="right"))
        return first * BLOCK_RECORDS, min(end * BLOCK_RECORDS, self.records)


class SpilledFiles:
    """The files of a partition, the newest first."""

    def __init__(self, partition: int, files: Sequence[SpilledFile] = ()) -> None:
        self.partition = partition
        self.files = list(files)
        self.table: Ints = self._table()

    def _table(self) -> Ints:
        rows = [file.row for file in self.files]
        return np.array(rows, dtype=np.int64).reshape(-1, FILE_FIELDS)

    @property
    def names(self) -> list[str]:
        """The files' names, the newest first."""
        return [file.name for file in self.files]

    @property
    def memory_bytes(self) -> int:
        """Bytes of memory that filters and indexes take."""
        return sum(file.memory_bytes for file in self.files)

    def add(self, file: SpilledFile) -> None:
        """There is a new file, newer than all others."""
        self.files.insert(0, file)
        self.table = self._table()

    def replace(self, old: Sequence[SpilledFile], new: SpilledFile) -> None:
        """Some files, neighbours, have been merged."""
        at = self.files.index(old[0])
        assert self.files[at : at + len(old)] == list(old)
        self.files[at : at + len(old)] = [new]
        self.table = self._table()

    def damaged(self, number: int) -> DamagedError:
        """The error that one of the files is damaged."""
        name = self.files[number].name if 0 <= number < len(self.files) else "one of its files of cells"
        return damage(self.partition, name)


def damage(partition: int, name: str) -> DamagedError:
    """The error that a file is damaged."""
    return DamagedError(f"partition {partition}: {name} is damaged", partition=partition)


class Piece:
    """Units that are on their way out of memory: copies of their records, in no order."""

    def __init__(self, cut: Ints, rows: int, records: int = PIECE_RECORDS) -> None:
        """Room for so many records; `cut` says what is cold, `rows` how many rows of cells may have a set."""
        assert len(cut) == CUT_FIELDS
        self.cut = cut
        records = max(records, UNIT_RECORDS_MAX)
        self.records: Ints = np.empty((records, CELL_WORDS), dtype=np.int64)
        self.units: Ints = np.empty((records, UNIT_FIELDS), dtype=np.int64)
        self.entry_rows: Ints = np.empty(
            (records, 2), dtype=np.int64
        )  # of sets: where the entries of a record lie
        self.set_units: Ints = np.zeros(rows, dtype=np.int64)  # by row of a cell: its unit plus one
        self.record_count = 0
        self.unit_count = 0

    def end_of_slice(self, first: int, records: int) -> int:
        """The unit up to which those from `first` on have about so many records, one unit at least."""
        starts = self.units[: self.unit_count, U_FIRST]
        return max(int(starts.searchsorted(starts[first] + records)), first + 1)

    def sorted_records(self) -> Iterator[Ints]:
        """The records in the order of files, some at a time."""
        units = self.units[: self.unit_count]
        order = np.lexsort((units[:, U_START], units[:, U_ACCOUNT].view(np.uint64), units[:, U_KIND]))
        out = np.empty((max(_WRITTEN_RECORDS, UNIT_RECORDS_MAX), CELL_WORDS), dtype=np.int64)
        at = 0
        while at < self.unit_count:
            at, count = packing.gather(units, order, at, self.unit_count, self.records, out)
            yield out[:count]


def merged_records(partition: int, files: Sequence[SpilledFile]) -> Iterator[Ints]:
    """The records of several files, the newest first, as one; some at a time.

    Raises:
        DamagedError: one of them is.
    """
    table = np.array([file.row for file in files], dtype=np.int64)
    cursors = np.zeros(len(files), dtype=np.int64)
    lengths = np.full(len(files), -1, dtype=np.int64)
    checked = np.full(len(files), -1, dtype=np.int64)
    out = np.empty((max(_WRITTEN_RECORDS, UNIT_RECORDS_MAX), CELL_WORDS), dtype=np.int64)
    while True:
        count = int(packing.merge_units(table, cursors, lengths, checked, out))
        if count < 0:
            raise damage(partition, "one of the files of cells that are merged")
        if count == 0:
            if (cursors < table[:, F_COUNT]).any():
                raise damage(partition, "one of the files of cells that are merged")
            return
        yield out[:count]


class Packer:
    """A file in the making: `add` sorted records, then `finish`; both say what is to be written where."""

    def __init__(self, partition: int, *, records_max: int, units_max: int) -> None:
        blocks = records_max // BLOCK_RECORDS + 1
        self._partition = partition
        self._index: Ints = np.zeros((blocks, 3), dtype=np.int64)
        filters = max(1, -(-units_max * _FILTER_BITS // 512))
        self._filter = np.zeros((filters, 8), dtype=np.uint64)
        self._figures: Ints = np.zeros(packing.P_FIELDS, dtype=np.int64)
        self._figures[packing.P_KIND] = -1
        self._figures[packing.P_FIRST : packing.P_FIRST + 2] = _HIGHEST
        self._figures[packing.P_LAST : packing.P_LAST + 2] = -_HIGHEST - 1
        self._blocks: Ints = np.zeros((1, BLOCK_WORDS), dtype=np.int64)
        self._first = 0  # the number of the first of `_blocks`

    @property
    def records(self) -> int:
        """How many have been added."""
        return int(self._figures[packing.P_RECORDS])

    def add(self, records: Ints) -> tuple[int, Bytes]:
        """Append records; returns a place and the blocks that belong there, which are full."""
        used = self.records - self._first * BLOCK_RECORDS  # in the block that is not full
        blocks = np.empty(((used + len(records)) // BLOCK_RECORDS + 1, BLOCK_WORDS), dtype=np.int64)
        blocks[0] = self._blocks[0]
        packing.pack(
            records,
            len(records),
            blocks,
            blocks.ctypes.data,
            self._first,
            self._figures,
            self._index,
            self._filter,
        )
        full = self.records // BLOCK_RECORDS - self._first
        place = BLOCK_BYTES * (1 + self._first)
        self._first += full
        self._blocks = blocks[full : full + 1].copy()
        return place, blocks[:full].reshape(-1).view(np.uint8)

    def finish(self) -> list[tuple[int, Bytes]]:
        """What is left to be written; the header, which comes last, is to be written after all else is durable."""
        out: list[tuple[int, Bytes]] = []
        if self.records % BLOCK_RECORDS:
            packing.seal_last(self._blocks, self._blocks.ctypes.data, self._first, self._figures)
            out.append((BLOCK_BYTES * (1 + self._first), self._blocks.reshape(-1).view(np.uint8)))
            self._first += 1
        blocks = self._first
        index = self._index[:blocks].reshape(-1).view(np.uint8)
        filters = self._filter.reshape(-1).view(np.uint8)
        at = BLOCK_BYTES * (1 + blocks)
        out.append((at, index))
        out.append((at + len(index), filters))
        figures = self._figures.tolist()
        header = _HEADER.pack(
            _MAGIC, VERSION, self._partition, figures[packing.P_RECORDS], blocks, figures[packing.P_UNITS],
            len(self._filter), *figures[packing.P_FIRST : packing.P_FIRST + 4],
            google_crc32c.value(index.tobytes()), google_crc32c.value(filters.tobytes()),
        )  # fmt: skip
        header += _CRC.pack(google_crc32c.value(header))
        out.append((0, np.frombuffer(header.ljust(BLOCK_BYTES, b"\0"), dtype=np.uint8)))
        return out


def file_bytes_max(records: int, units: int) -> int:
    """How long a file of so many records and units can be."""
    return (BLOCK_BYTES + 24) * (records // BLOCK_RECORDS + 2) + 64 * (units * _FILTER_BITS // 512 + 1)


def pack_in_memory(partition: int, records: Iterator[Ints], records_max: int, units_max: int) -> Bytes:
    """A file's bytes, all at once: for tests, and to compile what makes them."""
    packer = Packer(partition, records_max=records_max, units_max=units_max)
    parts = [packer.add(part) for part in records]
    parts += packer.finish()
    data = np.zeros(max(place + len(part) for place, part in parts), dtype=np.uint8)
    for place, part in parts:
        data[place : place + len(part)] = part
    return data
