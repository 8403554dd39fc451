"""Reading an archive: which row groups may hold what is asked for, and these as columns or as events.

An `ArchiveReader` belongs to the archive of one copy. A `view` is taken on the loop, and shows one manifest; what it gives
is stepped anywhere, a row group or a footer at a time. A merge pulls nothing away from under it: what it removes is
mapped before (`keep`), and stays in its mapping for as long as somebody has a view from before (`_Generation`).

Three things narrow down what is decoded: the manifest's offsets and times say which files, statistics in their footers
which row groups, and of these only the columns that are needed are. Footers are parsed once and kept: their statistics
as small arrays (`FileIndex`), and of the files that were used last all that Arrow has to know of them.

Everything is verified when it is read: a footer by its checksum in the manifest, when it is parsed, and each page of a
column by its own. So rot makes an `ArchiveDamagedError` and no wrong answer.
"""

from __future__ import annotations

import collections
import threading
import uuid
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import google_crc32c
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from tallymark_protocol.errors import TallymarkError, UnavailableError
from tallymark_protocol.identifiers import encode_event_id
from tallymark_protocol.messages import EventRecord
from tallymark_runtime.disk import Disk, DiskError, FileMissingError
from tallymark_store.archive.columns import ID_KINDS, OPERATIONS, VALUE_KINDS
from tallymark_store.archive.manifest import ArchiveFile, Manifest
from tallymark_store.scan import column_kernels as k
from tallymark_store.scan.archived import ArchiveDamagedError, ByteArray, Columns, IntArray
from tallymark_store.scan.column_kernels import read_only
from tallymark_store.scan.events import parse_properties, text_value

FILES_MAX: Final = 64  # that are kept mapped, each with a file handle
INDEXES_MAX: Final = 4_096  # files whose statistics are kept: some 10 KB each at most
FOOTERS_MAX_BYTES: Final = 32 * 1024 * 1024  # of footers that are kept parsed, as they are in their files
DECODED_MAX_BYTES: Final = 32 * 1024 * 1024  # of decoded row groups that a page of events keeps
HITS: Final = 1_024  # events made in one step

_NO_ARRAY: Final = read_only(np.zeros(1, np.int64))
_NO_BYTES: Final = read_only(np.zeros(1, np.int8))
_NO_PLACES: Final = read_only(np.zeros(1, np.int32))
_NO_DATA: Final = read_only(np.empty(0, np.uint8))
_KEYS: Final = ("metric_uid", "account", "time_ns", "offset")
_EVENT_COLUMNS: Final = (
    "metric", "account", "time_ns", "append_time_ns", "value", "value_text", "value_kind", "operation", "id", "id_kind",
    "dimensions", "properties", "offset",
)  # fmt: skip


class FileIndex(NamedTuple):
    """What a file's footer says of its row groups: the least and the greatest of what is looked for, inclusive."""

    rows: IntArray
    uid_low: npt.NDArray[np.uint64]
    uid_high: npt.NDArray[np.uint64]
    account_low: npt.NDArray[np.uint64]
    account_high: npt.NDArray[np.uint64]
    time_low: IntArray
    time_high: IntArray
    offset_low: IntArray
    offset_high: IntArray

    def groups(
        self,
        uid: int | None,
        account: int | None,
        starts: IntArray,
        ends: IntArray,
        first: int,
        last: int,
    ) -> IntArray:
        """The row groups that may hold what is wanted; see `ArchiveView.rows`."""
        wanted = (self.offset_low < last) & (self.offset_high >= first)
        if uid is not None:
            wanted &= (self.uid_low <= np.uint64(uid)) & (self.uid_high >= np.uint64(uid))
        if account is not None:
            wanted &= (self.account_low <= np.uint64(account)) & (self.account_high >= np.uint64(account))
        wanted &= are_timed_in(self.time_low, self.time_high, starts, ends)
        return np.flatnonzero(wanted).astype(np.int64)


def are_timed_in(low: IntArray, high: IntArray, starts: IntArray, ends: IntArray) -> npt.NDArray[np.bool_]:
    """Which of the inclusive ranges [low, high] meet one of the sorted, disjoint intervals [start, end)."""
    first = ends.searchsorted(low, side="right")
    met = first < len(ends)
    met[met] = starts[first[met]] <= high[met]
    return met


class _File:
    """A file of an archive, mapped."""

    def __init__(self, listed: ArchiveFile, data: pa.Buffer) -> None:
        self.listed = listed
        self.data = data


class _Generation:
    """What views of one manifest can rely on: files that were removed since are kept, while any such view is."""

    def __init__(self) -> None:
        self.kept: dict[str, _File] = {}  # removed when the next generation began
        self.next: _Generation | None = None

    def find(self, name: str) -> _File | None:
        """A file that was removed since."""
        at: _Generation | None = self
        while at is not None:
            if name in at.kept:
                return at.kept[name]
            at = at.next
        return None


class ArchiveReader:
    """Opens the files of one copy's archive, and remembers what their footers say."""

    def __init__(self, disk: Disk, partition: int) -> None:
        self.partition = partition
        self._disk = disk
        self._generation = _Generation()
        self._lock = threading.Lock()  # of what follows
        self._mapped: collections.OrderedDict[str, _File] = collections.OrderedDict()
        self._indexes: collections.OrderedDict[str, FileIndex] = collections.OrderedDict()
        self._footers: collections.OrderedDict[str, pq.FileMetaData] = collections.OrderedDict()
        self._footer_bytes = 0

    def view(self, manifest: Manifest) -> ArchiveView:
        """The archive as a manifest says; the one in force. On the loop."""
        return ArchiveView(self, manifest, self._generation)

    def keep(self, files: Sequence[ArchiveFile]) -> None:
        """Files are about to be removed: those who have views, or take some before `switch`, go on reading them.

        Raises:
            ArchiveDamagedError: one is gone already, or cut short.
            UnavailableError: it can't be opened.
        """
        for listed in files:
            if listed.at_home and listed.name not in self._mapped:
                continue  # nothing is fetched here: whoever needs it asks again
            self._generation.kept[listed.name] = self.map(listed, self._generation)

    def switch(self, manifest: Manifest) -> None:
        """Another manifest is in force: forget what it doesn't list. Views of the one before keep what they need."""
        self._generation.next = _Generation()
        self._generation = self._generation.next
        kept = {listed.name for listed in manifest.files}
        with self._lock:
            for name in self._mapped.keys() - kept:
                del self._mapped[name]
            for name in self._indexes.keys() - kept:
                del self._indexes[name]
            for name in self._footers.keys() - kept:
                self._footer_bytes -= self._footers.pop(name).serialized_size

    # ------------------------------------------------------------ in any thread

    def release(self, name: str) -> None:
        """Keep a file mapped no longer than those who read it now."""
        with self._lock:
            self._mapped.pop(name, None)

    def map(self, listed: ArchiveFile, generation: _Generation) -> _File:
        """A file's bytes, as a view of a generation finds them. Raises as `keep`."""
        with self._lock:
            found = self._mapped.get(listed.name)
            if found is not None:
                self._mapped.move_to_end(listed.name)
                return found
        try:
            file = self._disk.open(listed.name)
            try:
                data = file.map()
            finally:
                file.close()
        except FileMissingError as error:
            found = generation.find(listed.name)
            if found is not None:
                return found
            if listed.at_home:
                raise UnavailableError(
                    f"partition {self.partition}: the archive's file {listed.name} was written again meanwhile: ask again"
                ) from error
            raise self.damaged(listed, "it is missing") from error
        except DiskError as error:
            raise UnavailableError(
                f"partition {self.partition}: its archive can't be read: {error}"
            ) from error
        if len(data) != listed.bytes:
            raise self.damaged(listed, f"it has {len(data)} bytes instead of {listed.bytes}")
        found = _File(listed, pa.py_buffer(data))
        with self._lock:
            self._mapped[listed.name] = found
            while len(self._mapped) > FILES_MAX:
                self._mapped.popitem(last=False)
        return found

    def damaged(self, listed: ArchiveFile, why: str) -> ArchiveDamagedError:
        """Make the error for a file that can't be read."""
        return ArchiveDamagedError(
            f"partition {self.partition}: the archive's file {listed.name} is damaged: {why}",
            partition=self.partition,
            reader=self,
        )

    def _failed(self, listed: ArchiveFile, error: Exception, why: str) -> TallymarkError:
        """Make the error for a file that Arrow can't read: lack of memory is no damage."""
        if isinstance(error, (MemoryError, pa.ArrowCapacityError)):
            return UnavailableError(f"there is no memory to read the archive's file {listed.name}: {error}")
        return self.damaged(listed, why)

    def index(self, file: _File) -> FileIndex:
        """What a file's footer says. Raises ArchiveDamagedError."""
        name = file.listed.name
        with self._lock:
            found = self._indexes.get(name)
            if found is not None:
                self._indexes.move_to_end(name)
                return found
        try:
            found = _index_of(self.footer(file))
        except (pa.ArrowException, OSError, ValueError) as error:
            raise self._failed(file.listed, error, str(error)) from error
        if int(found.rows.sum()) != file.listed.rows:
            raise self.damaged(file.listed, "its footer doesn't tell of all rows")
        with self._lock:
            self._indexes[name] = found
            while len(self._indexes) > INDEXES_MAX:
                self._indexes.popitem(last=False)
        return found

    def footer(self, file: _File) -> pq.FileMetaData:
        """A file's footer, verified and parsed. Raises ArchiveDamagedError."""
        name = file.listed.name
        with self._lock:
            found = self._footers.get(name)
            if found is not None:
                self._footers.move_to_end(name)
                return found
        self._verify(file)
        try:
            found = pq.read_metadata(pa.BufferReader(file.data))
        except (pa.ArrowException, OSError, ValueError) as error:
            raise self._failed(file.listed, error, str(error)) from error
        with self._lock:
            if name not in self._footers:
                self._footers[name] = found
                self._footer_bytes += found.serialized_size
            while self._footer_bytes > FOOTERS_MAX_BYTES and len(self._footers) > 1:
                self._footer_bytes -= self._footers.popitem(last=False)[1].serialized_size
        return found

    def _verify(self, file: _File) -> None:
        """Compare what stands behind a file's pages with its checksum; all of the file where that has none."""
        listed, data = file.listed, np.frombuffer(file.data, np.uint8)
        if listed.tail_bytes:
            is_right = google_crc32c.value(data[-listed.tail_bytes :]) == listed.tail_crc32c
        else:
            is_right = google_crc32c.value(data) == listed.crc32c
        if not is_right:
            raise self.damaged(listed, "its checksum doesn't match")

    def open(self, file: _File) -> pq.ParquetFile:
        """A file to read row groups of: for one thread at a time. Raises ArchiveDamagedError."""
        footer = self.footer(file)
        try:
            return pq.ParquetFile(
                pa.BufferReader(file.data), metadata=footer, page_checksum_verification=True
            )
        except (pa.ArrowException, OSError, ValueError) as error:
            raise self._failed(file.listed, error, str(error)) from error

    def read(self, file: _File, opened: pq.ParquetFile, group: int, columns: Sequence[str]) -> pa.Table:
        """Columns of a row group. Raises ArchiveDamagedError."""
        try:
            table = opened.read_row_group(group, columns=list(columns), use_threads=False)
        except (pa.ArrowException, OSError, ValueError, KeyError) as error:
            raise self._failed(file.listed, error, f"row group {group}: {error}") from error
        if table.num_rows != opened.metadata.row_group(group).num_rows:
            raise self.damaged(file.listed, f"row group {group} has {table.num_rows} rows")
        return table


def _index_of(footer: pq.FileMetaData) -> FileIndex:
    places = {footer.schema.column(at).path: at for at in range(footer.num_columns)}
    rows, bounds = [], []
    for number in range(footer.num_row_groups):
        group = footer.row_group(number)
        rows.append(group.num_rows)
        found: list[int] = []
        for name in _KEYS:
            statistics = group.column(places[name]).statistics
            if statistics is None or not statistics.has_min_max:
                raise ValueError(f"row group {number} doesn't say which {name} it has")
            found += (statistics.min, statistics.max)
        bounds.append(found)
    columns = [[row[at] for row in bounds] for at in range(2 * len(_KEYS))]
    ids = [np.array(values, np.uint64) for values in columns[:4]]
    numbers = [np.array(values, np.int64) for values in columns[4:]]
    return FileIndex(np.array(rows, np.int64), ids[0], ids[1], ids[2], ids[3], *numbers)


class ArchiveView:
    """An archive as of one manifest (`scan.archived.Archived`)."""

    def __init__(self, reader: ArchiveReader, manifest: Manifest, generation: _Generation) -> None:
        self.start_offset = manifest.start_offset
        self.end_offset = manifest.end_offset
        self.gaps = manifest.gaps
        self.dropped = manifest.dropped
        self._reader = reader
        self._files = manifest.files
        self._generation = generation

    def time_bounds(self, first: int, last: int) -> tuple[int, int] | None:
        """Half-open bounds of the times of what it may hold at offsets of [first, last); None for nothing."""
        files = self._between(first, last)
        if not files:
            return None
        return min(file.min_time_ns for file in files), max(file.max_time_ns for file in files) + 1

    def _between(self, first: int, last: int) -> list[ArchiveFile]:
        return [file for file in self._files if file.start_offset < last and file.end_offset > first]

    def _timed(self, starts: IntArray, ends: IntArray, first: int, last: int) -> _Files:
        files = self._between(first, last)
        low = np.array([file.min_time_ns for file in files], np.int64)
        high = np.array([file.max_time_ns for file in files], np.int64)
        timed = are_timed_in(low, high, starts, ends).tolist()
        chosen = [file for file, is_timed in zip(files, timed, strict=True) if is_timed]
        return _Files(self._reader, self._generation, chosen)

    def rows(
        self,
        *,
        uid: int,
        account: int | None,
        starts: IntArray,
        ends: IntArray,
        first: int,
        last: int,
        has_texts: bool,
        has_operations: bool,
        has_numbers: bool,
        has_sets: bool,
    ) -> RowsCursor:
        """See `Archived.rows`."""
        wanted = _Wanted(uid, account, starts, ends, first, last)
        names = []
        if has_numbers:
            names.append("value")
        if has_texts:
            names += ["value_kind", "value_text"]
        if has_operations:
            names.append("operation")
        if has_sets:
            names.append("dimensions")
        return RowsCursor(self._reader, self._timed(starts, ends, first, last), wanted, names)

    def events(
        self,
        *,
        uid: int | None,
        account: int | None,
        start_ns: int,
        end_ns: int,
        first: int,
        last: int,
        count: int,
    ) -> EventsCursor:
        """See `Archived.events`."""
        starts, ends = np.array([start_ns], np.int64), np.array([end_ns], np.int64)
        wanted = _Wanted(uid, account, starts, ends, first, last)
        return EventsCursor(self._reader, self._timed(starts, ends, first, last), wanted, count)


class _Wanted(NamedTuple):
    """What is asked for."""

    uid: int | None
    account: int | None
    starts: IntArray
    ends: IntArray
    first: int
    last: int


class _Files:
    """Files of a view, opened one after the other: neither many handles at a time, nor any on the loop."""

    def __init__(self, reader: ArchiveReader, generation: _Generation, files: list[ArchiveFile]) -> None:
        self._reader = reader
        self._generation = generation
        self._files = files

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, place: int) -> _File:
        return self._reader.map(self._files[place], self._generation)


class RowsCursor:
    """Walks over row groups (`scan.archived.ArchivedRows`)."""

    def __init__(self, reader: ArchiveReader, files: _Files, wanted: _Wanted, names: Sequence[str]) -> None:
        self.columns: Columns | None = None
        self._reader = reader
        self._files = files
        self._wanted = wanted
        self._names = list(names)
        self._next_file = 0
        self._file: _File | None = None  # the one before
        self._groups: list[int] = []  # of it, still to be read
        self._opened: pq.ParquetFile | None = None
        self._index: FileIndex | None = None

    def rewind(self) -> None:
        """Begin again."""
        self._next_file = 0
        self._groups = []
        self.columns = None

    def advance(self) -> bool:
        """Look into the next file, or read its next row group; False when there is nothing more."""
        self.columns = None
        if not self._groups:
            if self._next_file == len(self._files):
                self._opened = self._file = None
                return False
            file = self._file = self._files[self._next_file]
            self._next_file += 1
            self._index = self._reader.index(file)
            self._groups = self._index.groups(*self._wanted).tolist()[::-1]
            self._opened = self._reader.open(file) if self._groups else None
            return True
        assert self._index is not None, "groups are of a file"
        assert self._file is not None, "they are of this one"
        assert self._opened is not None, "it is open"
        group = self._groups.pop()
        self.columns = read_columns(
            self._reader, self._file, self._opened, group, self._index, self._names, uid=self._wanted.uid
        )
        return True


def read_columns(
    reader: ArchiveReader,
    file: _File,
    opened: pq.ParquetFile,
    group: int,
    index: FileIndex,
    names: Sequence[str],
    *,
    uid: int | None,
) -> Columns:
    """A row group as kernels want it; of uid and account only what isn't known. Raises ArchiveDamagedError."""
    wanted = ["time_ns", "offset", *names]
    uid_array = account_array = _NO_ARRAY
    if index.uid_low[group] == index.uid_high[group]:
        uid_array = read_only(index.uid_low[group : group + 1].view(np.int64))
    elif uid is not None:
        wanted.append("metric_uid")
    if index.account_low[group] == index.account_high[group]:
        account_array = read_only(index.account_low[group : group + 1].view(np.int64))
    else:
        wanted.append("account")
    table = reader.read(file, opened, group, wanted)
    if "metric_uid" in wanted:
        uid_array = _numbers(table, "metric_uid")
    if "account" in wanted:
        account_array = _numbers(table, "account")
    kinds, texts, text_bounds = _NO_BYTES, _NO_DATA, np.zeros((1, 2), np.int64)
    if "value_kind" in names:
        kinds = _words(reader, file, table, "value_kind", VALUE_KINDS, 1)
        if len(kinds) > 1 or kinds[0]:
            texts, text_bounds = _tagged(reader, file, table, kinds)
    set_of, sets, set_bounds = _NO_PLACES, _NO_DATA, np.zeros((1, 2), np.int64)
    if "dimensions" in names:
        set_of, sets, set_bounds = _sets(reader, file, table, "dimensions")
    return Columns(
        rows=table.num_rows,
        uid=uid_array,
        account=account_array,
        time_ns=_numbers(table, "time_ns"),
        offset=_numbers(table, "offset"),
        number=_numbers(table, "value") if "value" in names else _NO_ARRAY,
        operation=_words(reader, file, table, "operation", OPERATIONS, 0) if "operation" in names else _NO_BYTES,
        kind=kinds,
        texts=texts,
        text_bounds=text_bounds,
        set_of=set_of,
        sets=sets,
        set_bounds=set_bounds,
    )  # fmt: skip


def _whole(table: pa.Table, name: str) -> pa.Array:
    """A column as one array."""
    column = table.column(name)
    if pa.types.is_dictionary(column.type) and column.num_chunks != 1:
        column = column.unify_dictionaries()
    found = column.combine_chunks()
    return found.chunk(0) if isinstance(found, pa.ChunkedArray) else found


def _numbers(table: pa.Table, name: str) -> IntArray:
    """A column of whole numbers, 0 where there is none; unsigned ones as their bits."""
    array = _whole(table, name)
    if array.null_count:
        array = array.fill_null(0)
    return read_only(array.to_numpy(zero_copy_only=False).view(np.int64))


def _places(array: pa.DictionaryArray, absent: int) -> npt.NDArray[Any]:
    indices = array.indices
    if indices.null_count:
        indices = indices.fill_null(absent)
    places: npt.NDArray[Any] = indices.to_numpy(zero_copy_only=False)
    return places


def _words(
    reader: ArchiveReader, file: _File, table: pa.Table, name: str, words: Sequence[str], base: int
) -> npt.NDArray[np.int8]:
    """A column of words as their places in `words`, `base` added; 0 for no word. One entry where all are the same."""
    array = _whole(table, name)
    if array.null_count == len(array):
        return _NO_BYTES
    known = array.dictionary.to_pylist()
    try:
        # The last entry is what stands for no word.
        numbers = np.array([*(words.index(word) + base for word in known), 0], np.int8)
    except ValueError:
        raise reader.damaged(file.listed, f"{name} has words that are none of it") from None
    places = _places(array, -1)
    found = numbers[places]
    if len(found) and (found == found[0]).all() and not found[0]:
        return _NO_BYTES
    return read_only(found)


def _text(array: pa.Array) -> tuple[ByteArray, npt.NDArray[np.int32]]:
    """The bytes of a column of strings, and where each ends behind the one before: one entry more than rows."""
    _, ends, data = array.buffers()
    count, offset = len(array), array.offset
    if ends is None or not count:
        return _NO_DATA, read_only(np.zeros(count + 1, np.int32))
    bounds = np.frombuffer(ends, np.int32)[offset : offset + count + 1]
    return (_NO_DATA if data is None else read_only(np.frombuffer(data, np.uint8))), read_only(bounds)


def _tagged(
    reader: ArchiveReader, file: _File, table: pa.Table, kinds: npt.NDArray[np.int8]
) -> tuple[ByteArray, IntArray]:
    """Values that are texts, in the log's form."""
    data, ends = _text(_whole(table, "value_text"))
    rows = table.num_rows
    if len(kinds) != rows:
        kinds = read_only(np.repeat(kinds, rows))
    out: ByteArray = np.empty(int(ends[-1]) - int(ends[0]) + 9 * rows, np.uint8)
    bounds = np.empty((max(rows, 1), 2), np.int64)
    if k.tag_texts(kinds, data, ends, out, bounds) < 0:
        raise reader.damaged(file.listed, "value_text has numbers that are none")
    return read_only(out), bounds


def _sets(
    reader: ArchiveReader, file: _File, table: pa.Table, name: str
) -> tuple[npt.NDArray[np.int32], ByteArray, IntArray]:
    """Property sets in the log's form, and which of them each row has; the first is that of no properties."""
    array = _whole(table, name)
    if array.null_count == len(array):
        return _NO_PLACES, _NO_DATA, np.zeros((1, 2), np.int64)
    data, ends = _text(array.dictionary)
    out: ByteArray = np.empty(len(data), np.uint8)
    bounds = np.empty((len(ends), 2), np.int64)
    if k.parse_sets(data, ends, out, bounds) < 0:
        raise reader.damaged(file.listed, f"{name} has sets that are none")
    places = _places(array, -1).astype(np.int32) + np.int32(1)
    return read_only(places), read_only(out), bounds


class EventsCursor:
    """Finds the first wanted events of an archive (`scan.archived.ArchivedEvents`), file by file.

    In a file rows are not in the order of offsets. So its row groups are asked for the offsets of wanted rows first,
    those with the lowest ones first, until no other group can have a lower one than those found; then the events
    of these rows are made, in order.
    """

    def __init__(self, reader: ArchiveReader, files: _Files, wanted: _Wanted, count: int) -> None:
        self.found: list[tuple[int, EventRecord]] = []
        self._reader = reader
        self._files = files
        self._wanted = wanted
        self._left = count
        self._next_file = 0
        self._file: _File | None = None
        self._opened: pq.ParquetFile | None = None
        self._index: FileIndex | None = None
        self._groups: list[int] = []  # to be asked, the one with the lowest offset last
        self._hits: IntArray = np.empty((0, 3), np.int64)  # offset, row, group; by offset once all are there
        self._made = 0  # of the hits, events
        self._is_selecting = False
        self._decoded: collections.OrderedDict[int, pa.Table] = collections.OrderedDict()
        self._decoded_bytes = 0

    def advance(self) -> bool:
        """Do a bounded piece of work; False when there is nothing more."""
        self.found = []
        if self._is_selecting:
            self._select()
            return True
        if self._made < len(self._hits):
            self._make()
            return True
        if self._next_file == len(self._files) or self._left <= 0:
            self._opened = self._file = None
            self._decoded.clear()
            return False
        file = self._file = self._files[self._next_file]
        self._next_file += 1
        index = self._index = self._reader.index(file)
        groups = index.groups(*self._wanted)
        self._groups = groups[np.argsort(-index.offset_low[groups], kind="stable")].tolist()
        self._hits, self._made = self._hits[:0], 0
        self._decoded.clear()
        self._decoded_bytes = 0
        if self._groups:
            self._opened = self._reader.open(file)
            self._is_selecting = True
        return True

    def _select(self) -> None:
        """Ask the next row group for offsets."""
        assert self._file is not None, "a file is being looked at"
        assert self._opened is not None, "it is open"
        assert self._index is not None, "its index is known"
        group = self._groups.pop()
        wanted = self._wanted
        columns = read_columns(self._reader, self._file, self._opened, group, self._index, (), uid=wanted.uid)
        found = np.empty((columns.rows, 2), np.int64)
        count = k.select_rows(
            columns.uid,
            columns.account,
            columns.time_ns,
            columns.offset,
            columns.rows,
            int(np.uint64(wanted.uid or 0).view(np.int64)),
            int(np.uint64(wanted.account or 0).view(np.int64)),
            wanted.uid is None,
            wanted.account is None,
            int(wanted.starts[0]),
            int(wanted.ends[0]),
            wanted.first,
            wanted.last,
            found,
        )
        hits = np.column_stack((found[:count], np.full(count, group, np.int64)))
        hits = np.concatenate((self._hits, hits))
        hits = hits[hits[:, 0].argsort(kind="stable")][: self._left]
        self._hits = hits
        if self._groups and len(hits) == self._left:
            next_low = int(self._index.offset_low[self._groups[-1]])
            if next_low > int(hits[-1, 0]):
                self._groups = []
        if not self._groups:
            self._is_selecting = False
            self._left -= len(hits)

    def _make(self) -> None:
        """Make the next events."""
        hits = self._hits[self._made : self._made + HITS]
        self._made += len(hits)
        made: list[tuple[int, EventRecord] | None] = [None] * len(hits)
        for group in np.unique(hits[:, 2]).tolist():
            places = np.flatnonzero(hits[:, 2] == group)
            table = self._table(group).take(pa.array(hits[places, 1]))
            assert self._file is not None, "hits are of a file"
            events = _events(self._reader, self._file, table)
            for place, event in zip(places.tolist(), events, strict=True):
                made[place] = event
        self.found = [event for event in made if event is not None]
        assert len(self.found) == len(hits), "each hit is a row"

    def _table(self, group: int) -> pa.Table:
        found = self._decoded.get(group)
        if found is not None:
            self._decoded.move_to_end(group)
            return found
        assert self._file is not None, "hits are of a file"
        assert self._opened is not None, "it is open"
        found = self._decoded[group] = self._reader.read(self._file, self._opened, group, _EVENT_COLUMNS)
        self._decoded_bytes += found.nbytes
        while self._decoded_bytes > DECODED_MAX_BYTES and len(self._decoded) > 1:
            self._decoded_bytes -= self._decoded.popitem(last=False)[1].nbytes
        return found


def _events(reader: ArchiveReader, file: _File, table: pa.Table) -> list[tuple[int, EventRecord]]:
    """Rows as the events that they were, and how many bytes each has of sets, ids and texts."""
    rows = table.num_rows
    kinds = _words(reader, file, table, "value_kind", VALUE_KINDS, 1)
    texts, text_bounds = _tagged(reader, file, table, kinds)
    sets = [_sets(reader, file, table, name) for name in ("dimensions", "properties")]
    operations = np.broadcast_to(_words(reader, file, table, "operation", OPERATIONS, 0), rows).tolist()
    id_kinds = np.broadcast_to(_words(reader, file, table, "id_kind", ID_KINDS, 1), rows).tolist()
    id_data, id_ends = _text(_whole(table, "id"))
    codes = _whole(table, "metric").to_pylist()
    values, times, appends, offsets = (
        _numbers(table, name).tolist() for name in ("value", "time_ns", "append_time_ns", "offset")
    )
    accounts = _numbers(table, "account").view(np.uint64).tolist()
    of_sets = [np.broadcast_to(places, rows).tolist() for places, _, _ in sets]
    known: dict[tuple[int, int], tuple[int, dict[str, str]]] = {}
    events = []
    for row in range(rows):
        pair = (of_sets[0][row], of_sets[1][row])
        found = known.get(pair)
        if found is None:
            parts = [
                data[bounds[place, 0] : bounds[place, 1]].tobytes()
                for place, (_, data, bounds) in zip(pair, sets, strict=True)
            ]
            encoded = parts[0] or parts[1] if not (parts[0] and parts[1]) else _joined(*parts)
            found = known[pair] = (len(encoded), parse_properties(encoded))
        size, properties = found
        event_id = None
        if id_kinds[row]:
            text = id_data[id_ends[row] : id_ends[row + 1]].tobytes()
            try:
                event_id = _ID_OF[id_kinds[row] - 1](text)
            except ValueError as error:
                raise reader.damaged(file.listed, f"an id is none: {error}") from error
        start, end = text_bounds[row].tolist()
        events.append(
            (
                size + (len(event_id) if event_id else 0) + end - start,
                EventRecord(
                    account_id=accounts[row],
                    metric_code=codes[row],
                    value=text_value(texts[start:end].tobytes()) if start < end else values[row],
                    event_time_ns=times[row],
                    append_time_ns=appends[row],
                    operation=operations[row],
                    properties=dict(properties),
                    event_id=event_id,
                    partition=reader.partition,
                    offset=offsets[row],
                ),
            )
        )
    return events


def _joined(declared: bytes, other: bytes) -> bytes:
    """Two property sets as the one that they were: keys are in the order of their bytes."""
    entries = [*_entries(declared), *_entries(other)]
    entries.sort()
    return b"".join(entry for _, entry in entries)


def _entries(encoded: bytes) -> list[tuple[bytes, bytes]]:
    entries = []
    at = 0
    while at < len(encoded):
        key_end = at + 1 + encoded[at]
        end = key_end + 2 + int.from_bytes(encoded[key_end : key_end + 2], "little")
        entries.append((encoded[at + 1 : key_end], encoded[at:end]))
        at = end
    return entries


# By `ID_KINDS`: an id in its canonical bytes.
_ID_OF: Final[tuple[Callable[[bytes], bytes], ...]] = (
    lambda text: b"\x01" + text,
    lambda text: b"\x02" + bytes.fromhex(text.decode("ascii")),
    lambda text: b"\x03" + uuid.UUID(text.decode("ascii")).bytes,
    lambda text: encode_event_id(int(text)),
)
