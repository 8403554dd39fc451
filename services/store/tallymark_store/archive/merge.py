"""Several sorted files of adjacent offset ranges to one, in bounded memory.

One row group of each file is held at a time. What is known to come before everything that is not held is taken,
sorted and written; so there are at most a row group of each file and some of the result in memory, however large the
files are. Checksums of the files are verified before anything is read from them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tallymark_runtime.disk import Disk, FileMissingError
from tallymark_store.archive.columns import SORT_KEY, sorted_rows
from tallymark_store.archive.manifest import ArchiveError, ArchiveFile
from tallymark_store.archive.writer import ROW_GROUP_ROWS, FileWriter, Written, checksum, open_file

Key = tuple[int, ...]


class _Input:
    """A file that is read in order."""

    def __init__(self, disk: Disk, name: str) -> None:
        self._file = open_file(disk, name)
        self._next_group = 0
        self._held = pa.table({})
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
            self._held = self._file.read_row_group(self._next_group, use_threads=False)
            self._keys = [self._held.column(name).to_numpy() for name in SORT_KEY]
            self._next_group += 1
            self._at = 0

    @property
    def last(self) -> Key:
        """The key of the last row that is held."""
        return self._key(int(self._held.num_rows) - 1)

    def _key(self, row: int) -> Key:
        return tuple(int(column[row]) for column in self._keys)

    def take(self, bound: Key | None) -> pa.Table:
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
        return taken


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
    inputs = [_Input(disk, file.name) for file in files]
    waiting: pa.Table | None = None  # the last rows in order: too few for a row group
    writer: FileWriter | None = None
    try:
        while True:
            for held in inputs:
                held.fill()
            active = [held for held in inputs if held.rows]
            if not active:
                break
            # Beyond the least of these, a group that isn't held may have rows.
            bound = min([held.last for held in active if held.has_more], default=None)
            parts = [held.take(bound) for held in active]
            for piece in _sorted([part for part in parts if part.num_rows], waiting):
                waiting = piece
                if piece.num_rows == ROW_GROUP_ROWS:
                    writer = writer or FileWriter(disk, name, piece, metadata)
                    writer.write(piece)
                    waiting = None
                    check()
        if waiting is not None:
            writer = writer or FileWriter(disk, name, waiting, metadata)
            writer.write(waiting)
    except BaseException:
        if writer is not None:
            writer.abandon()
        raise
    assert writer is not None, "a file has rows"
    written = writer.close()
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


def _sorted(parts: list[pa.Table], before: pa.Table | None) -> Iterator[pa.Table]:
    """The rows of all parts in order, behind those of `before`: in row groups, the last one what is left.

    In pieces, as one table of everything would be another copy, and one that no cache holds.
    """
    table = joined(parts)
    order: npt.NDArray[np.int32] | None = None
    if len(parts) > 1:
        # Files are in offset order and so are equal keys within each: a stable sort needs no offsets.
        order = sorted_rows(*[table.column(name).to_numpy().view(np.uint64) for name in SORT_KEY[:-1]])
    start = 0
    while start < table.num_rows:
        room = ROW_GROUP_ROWS if before is None else ROW_GROUP_ROWS - before.num_rows
        end = min(start + room, table.num_rows)
        piece = table.slice(start, end - start) if order is None else table.take(pa.array(order[start:end]))
        yield piece if before is None else joined([before, piece])
        before = None
        start = end
