"""Files of alert records: the oldest records of a partition, by their positions, where memory is short.

Pure: a file comes in as its bytes (mapped) and goes out as buffers; who has a disk writes them (`spilling`). Records
never change and stand in log order, so a file is a range of positions, and files follow each other without a gap::

    0   8 bytes  magic "TMKALERT"         40  i64  append time of the last record
    8   u32      version                  48  u32  CRC-32C of the sums
    12  u32      partition                52  u32  0
    16  i64      position of the first    56  u32  0
    24  i64      records                  60  u32  CRC-32C of the header so far
    32  i64      append time of the first
    64  records, as the fold has them (`thresholds`)
        sums: u32, the CRC-32C of each 256 records

Sums are in memory; each 256 records are compared with theirs whenever some of them are looked at.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

import google_crc32c
import numpy as np
import numpy.typing as npt

from tallymark_store.fold.spilled import SpilledFileError, damage
from tallymark_store.fold.thresholds import A_APPEND, ALERT_BYTES, ALERT_WORDS

Ints = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]

VERSION = 1
SUMMED_RECORDS = 256
READ_RECORDS = 1 << 14  # handed out at a time
_HEADER = struct.Struct("<8sIIqqqqIII")
_CRC = struct.Struct("<I")
_HEADER_BYTES = _HEADER.size + _CRC.size
_MAGIC = b"TMKALERT"


class AlertFile:
    """A file of alert records.

    Attributes:
        name: what it is called where it lies.
        start: the position of its first record.
        end: the position behind its last one.
        memory_bytes: what of it is kept in memory.
        last_ns: when its last record was raised.
    """

    def __init__(self, name: str, data: Bytes, partition: int) -> None:
        """Take a file's bytes, which must not change, nor go.

        Raises:
            SpilledFileError: it is damaged, or of another version or partition.
        """
        head = data[:_HEADER_BYTES].tobytes()
        if (
            len(head) < _HEADER_BYTES
            or google_crc32c.value(head[: _HEADER.size]) != _CRC.unpack(head[-4:])[0]
        ):
            raise SpilledFileError(f"file {name}: the header is damaged")
        magic, version, number, start, count, _, last_ns, sums_crc, _, _ = _HEADER.unpack(
            head[: _HEADER.size]
        )
        if magic != _MAGIC or version != VERSION or number != partition:
            raise SpilledFileError(f"file {name} is none of partition {partition} in version {VERSION}")
        sums_at = _HEADER_BYTES + ALERT_BYTES * count
        if start < 0 or count < 1 or len(data) != sums_at + 4 * _sum_count(count):
            raise SpilledFileError(f"file {name} has {len(data)} bytes, which is not what its header says")
        sums = data[sums_at:].tobytes()
        if google_crc32c.value(sums) != sums_crc:
            raise SpilledFileError(f"file {name}: the sums are damaged")
        self.name = name
        self.start: int = start
        self.end: int = start + count
        self.last_ns: int = last_ns
        self.memory_bytes = len(sums)
        self._partition = partition
        self._sums = np.frombuffer(sums, dtype="<u4")
        self._records: Bytes = data[_HEADER_BYTES:sums_at]

    def rows(self, start: int, end: int) -> Ints:
        """The records of the positions [start, end), which are all in this file.

        Raises:
            DamagedError: some of them, or of their neighbours, are not as they were written.
        """
        first, stop = start - self.start, end - self.start
        for at in range(first // SUMMED_RECORDS, _sum_count(stop)):
            part = self._records[at * SUMMED_RECORDS * ALERT_BYTES : (at + 1) * SUMMED_RECORDS * ALERT_BYTES]
            if google_crc32c.value(part.tobytes()) != int(self._sums[at]):
                raise damage(self._partition, self.name)
        found = self._records[first * ALERT_BYTES : stop * ALERT_BYTES].tobytes()
        return np.frombuffer(found, dtype="<i8").astype(np.int64, copy=False).reshape(-1, ALERT_WORDS)

    def pieces(self, start: int, end: int) -> Iterator[tuple[int, Ints]]:
        """Those of the records of [start, end) that are in this file, some at a time, with the first one's position.

        Raises:
            DamagedError: as `rows`.
        """
        stop = min(end, self.end)
        for at in range(max(start, self.start), stop, READ_RECORDS):
            yield at, self.rows(at, min(at + READ_RECORDS, stop))

    def damage(self) -> Iterator[int]:
        """Look at every record: where damage is, -1 for parts without."""
        for at in range(_sum_count(self.end - self.start)):
            place = at * SUMMED_RECORDS * ALERT_BYTES
            part = self._records[place : place + SUMMED_RECORDS * ALERT_BYTES]
            is_sound = google_crc32c.value(part.tobytes()) == int(self._sums[at])
            yield -1 if is_sound else _HEADER_BYTES + place


class AlertFiles:
    """The files of a partition, the oldest records first.

    Attributes:
        end: the position behind the last record that is in a file; the first one that is in memory.
    """

    def __init__(self, partition: int, files: Sequence[AlertFile] = ()) -> None:
        """Take files.

        Raises:
            SpilledFileError: they don't begin with the first record, or don't follow each other.
        """
        self.partition = partition
        self.files = list(files)
        self.end = 0
        for file in self.files:
            if file.start != self.end:
                raise SpilledFileError(f"file {file.name} begins at position {file.start}, not {self.end}")
            self.end = file.end

    @property
    def names(self) -> list[str]:
        """The files' names."""
        return [file.name for file in self.files]

    @property
    def memory_bytes(self) -> int:
        """Bytes of memory that sums take."""
        return sum(file.memory_bytes for file in self.files)

    def add(self, file: AlertFile) -> None:
        """There is a new file, of what follows."""
        assert file.start == self.end, "files follow each other"
        self.files.append(file)
        self.end = file.end

    def replace(self, old: Sequence[AlertFile], new: AlertFile) -> None:
        """Some files, neighbours, have been merged."""
        at = self.files.index(old[0])
        assert self.files[at : at + len(old)] == list(old)
        assert (new.start, new.end) == (old[0].start, old[-1].end)
        self.files[at : at + len(old)] = [new]

    def rows(self, start: int, end: int) -> Iterator[tuple[int, Ints]]:
        """The records of [start, end) that are in files, some at a time, each time with the first one's position.

        Raises:
            DamagedError: a file is damaged.
        """
        for file in self.files:
            if file.end > start and file.start < end:
                yield from file.pieces(start, end)

    def at_time(self, time_ns: int) -> int:
        """The position of the first record raised at `time_ns` or later; `end` where there is none in a file.

        Raises:
            DamagedError: a file is damaged.
        """
        for file in self.files:
            if file.last_ns < time_ns:
                continue
            low, high = file.start, file.end - 1  # the last one is late enough
            while low < high:
                middle = (low + high) // 2
                if int(file.rows(middle, middle + 1)[0, A_APPEND]) < time_ns:
                    low = middle + 1
                else:
                    high = middle
            return low
        return self.end


def file_bytes(count: int) -> int:
    """How long a file of so many records is."""
    return _HEADER_BYTES + ALERT_BYTES * count + 4 * _sum_count(count)


def _sum_count(records: int) -> int:
    return -(-records // SUMMED_RECORDS)


def encode(partition: int, start: int, parts: Iterator[Ints], count: int) -> Iterator[tuple[int, Bytes]]:
    """What is to be written where for a file of `count` records from position `start` on.

    The header comes last, and is to be written after all else is durable.
    """
    sums = np.zeros(_sum_count(count), dtype="<u4")
    waiting = np.zeros((0, ALERT_WORDS), dtype=np.int64)
    first_ns = last_ns = done = 0
    for part in parts:
        if not done and not len(waiting):
            first_ns = int(part[0, A_APPEND])
        last_ns = int(part[-1, A_APPEND])
        waiting = np.concatenate([waiting, part])
        whole = len(waiting) // SUMMED_RECORDS * SUMMED_RECORDS
        if done + len(waiting) == count:
            whole = len(waiting)
        data = np.ascontiguousarray(waiting[:whole], dtype="<i8").reshape(-1).view(np.uint8)
        for at in range(0, whole, SUMMED_RECORDS):
            piece = data[at * ALERT_BYTES : (at + SUMMED_RECORDS) * ALERT_BYTES]
            sums[(done + at) // SUMMED_RECORDS] = google_crc32c.value(piece.tobytes())
        yield _HEADER_BYTES + done * ALERT_BYTES, data
        done += whole
        waiting = waiting[whole:]
    assert done == count, "as many records as were announced"
    yield _HEADER_BYTES + count * ALERT_BYTES, sums.view(np.uint8)
    header = _HEADER.pack(
        _MAGIC, VERSION, partition, start, count, first_ns, last_ns, google_crc32c.value(sums.tobytes()), 0, 0
    )
    header += _CRC.pack(google_crc32c.value(header))
    yield 0, np.frombuffer(header, dtype=np.uint8)


def in_pieces(rows: Ints) -> Iterator[Ints]:
    """Rows, some at a time."""
    for at in range(0, len(rows), READ_RECORDS):
        yield rows[at : at + READ_RECORDS]
