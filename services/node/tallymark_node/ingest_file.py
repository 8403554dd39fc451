"""Loading a file of usage: CSV or JSON lines, row by row into events, many requests in flight.

Owns how a row becomes an event (`Columns`, `Converter`), how a row without an id of its own gets one (`RowIds`), and
the loop that sends batches and settles them in the order of the file (`load`). It is given a client and open
streams; it prints nothing.

**Running again is safe.** Every event carries an id. Where the file has none, it is a hash of the row's content and
the row's number among those of the same content: the second of two identical rows is `…:2`. So a file that is loaded
again, from the start, after an interruption, after it has grown or was put into another order, stores only what is
missing, for as long as the server remembers ids (35 days unless set otherwise). The columns that a file of rejected
rows adds take no part in the hash, so that such a file can be corrected and loaded itself: rows that weren't touched
keep their ids. What follows from it: the same row in two *different* files counts once, unless the files are told
apart by a source name or the rows by an id column. That holds for a corrected row that has become the same as
another one, too.

**Order.** Rows of a batch are stored in their order, batches in flight may overtake each other. That matters only to
LATEST and COUNT_UNIQUE metrics, and there only to rows of the same time; for those, load with one batch in flight.
"""

from __future__ import annotations

import asyncio
import contextlib
import csv
import gzip
import hashlib
import io
import re
import sqlite3
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import IO, Any, BinaryIO, Final, NamedTuple, cast

import msgspec

from tallymark import (
    AggType,
    AsyncClient,
    Event,
    IngestError,
    InvalidRequestError,
    MetricSchema,
    OperationType,
    Receipt,
    TallymarkError,
    UniqueType,
    scale,
)
from tallymark_node.cli import parse

LINE_BYTES_MAX: Final = 1024 * 1024
RETRIES_MAX: Final = 5  # of a batch, each for as long as the client's timeout
COUNTED_ROWS_MAX: Final = 1_000_000  # distinct rows whose number is kept in memory; then they go to a file

REJECTED_COLUMNS: Final = ("rejected_line", "rejected_reason")  # what a file of rejected rows adds in front

TIME_UNITS: Final = {"s": 10**9, "ms": 10**6, "us": 10**3, "ns": 1}
OPERATIONS: Final = {
    "": OperationType.NONE,
    "none": OperationType.NONE,
    "add": OperationType.ADD,
    "remove": OperationType.REMOVE,
}

_INTEGER = re.compile(r"[+-]?[0-9]{1,40}")
_DECIMAL = re.compile(r"[+-]?[0-9]{1,40}(?:\.[0-9]{1,40})?")


class Columns(msgspec.Struct, frozen=True, kw_only=True):
    """Which column holds what. One of `metric` and `metric_column` is set."""

    account: str
    metric: str | None = None  # a code for all rows
    metric_column: str | None = None
    value: str | None = None  # None: every row's value is 1
    time: str | None = None  # None: the time at which the server stores the row
    time_unit: str | None = None  # of TIME_UNITS, or "iso"; None: ISO 8601, and numbers are seconds
    id: str | None = None  # None: ids are derived from the rows
    operation: str | None = None
    properties: tuple[tuple[str, str], ...] = ()  # (key, column)
    scaled: bool = False  # values are decimals
    source: str = ""  # makes derived ids differ from those of the same rows under another source

    def names(self) -> list[str | None]:
        """The columns in the order of `Row.cells`."""
        fixed = [self.account, self.metric_column, self.value, self.time, self.id, self.operation]
        return [*fixed, *(column for _, column in self.properties)]


class Row(NamedTuple):
    """A row of the file."""

    line: int  # its first line, from 1
    cells: Sequence[Any]  # in the order of `Columns.names()`; None where there is none
    content: bytes  # what its derived id is made of
    raw: Sequence[str]  # for the file of rejected rows, in the order of its reader's `header`
    problem: str = ""  # why it can't be read, when it can't


class RowError(Exception):
    """A row can't become an event; the message says why."""


# --- reading -------------------------------------------------------------------------------------------------


def open_stream(raw: io.BufferedReader) -> BinaryIO:
    """Return a stream of the plain bytes of a file that may be gzipped."""
    if raw.peek(2)[:2] == b"\x1f\x8b":
        # Buffered, because reading single lines out of a GzipFile is slow.
        return io.BufferedReader(cast("io.RawIOBase", gzip.GzipFile(fileobj=raw)), LINE_BYTES_MAX)
    return raw


def _lines(stream: BinaryIO) -> Iterator[bytes]:
    number = 0
    while True:
        try:
            line = stream.readline(LINE_BYTES_MAX + 1)
        except (EOFError, OSError) as error:
            raise InvalidRequestError(f"line {number + 1}: the file can't be read on: {error}") from error
        if not line:
            return
        number += 1
        if number == 1:
            if line.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise InvalidRequestError("the file is UTF-16; convert it to UTF-8 first")
            line = line.removeprefix(b"\xef\xbb\xbf")
        if len(line) > LINE_BYTES_MAX:
            raise InvalidRequestError(
                f"line {number} is longer than {LINE_BYTES_MAX} bytes: is it such a file?"
            )
        yield line


class CsvReader:
    """Rows of a CSV file with a header line.

    Columns named as in `REJECTED_COLUMNS` come from an earlier run: they are part neither of what a row is known by
    nor of what is written when it is rejected again.

    Attributes:
        header: the columns' names, those left out.

    Raises:
        InvalidRequestError: there is no header, or it lacks a column that is asked for.
    """

    def __init__(self, stream: BinaryIO, columns: Columns, delimiter: str = ",") -> None:
        # Bytes that aren't UTF-8 survive decoding, so that their row can be refused by itself.
        decoded = (line.decode("utf-8", "surrogateescape") for line in _lines(stream))
        self._reader = csv.reader(decoded, delimiter=delimiter, strict=True)
        try:
            self._names = [name.strip() for name in next(self._reader, [])]
        except csv.Error as error:
            raise InvalidRequestError(f"the header line can't be read: {error}") from None
        if not any(self._names):
            raise InvalidRequestError("the file is empty: a CSV file starts with a line of column names")
        added = {number for number, name in enumerate(self._names) if name in REJECTED_COLUMNS}
        self._added = frozenset(added)
        self.header = self._own(self._names)
        self._positions = [None if name is None else self._position(name) for name in columns.names()]

    def _position(self, name: str) -> int:
        found = self._names.count(name)
        if found == 1:
            return self._names.index(name)
        if found:
            raise InvalidRequestError(f"the file has {found} columns named {name!r:.80}")
        raise InvalidRequestError(f"the file has no column {name!r:.80}{parse.closest(name, self.header)}")

    def _own(self, fields: list[str]) -> list[str]:
        """Leave out what an earlier run added."""
        if not self._added:
            return fields
        return [field for number, field in enumerate(fields) if number not in self._added]

    def __iter__(self) -> Iterator[Row]:
        reader, positions, width = self._reader, self._positions, len(self._names)
        while True:
            line = reader.line_num + 1
            try:
                fields = next(reader, None)
            except csv.Error as error:
                until = f" (read up to line {reader.line_num})" if reader.line_num > line else ""
                yield Row(line, (), b"", (), f"not a row of CSV: {error}{until}")
                continue
            if fields is None:
                return
            if not fields:
                continue  # an empty line
            own = self._own(fields)
            if len(fields) != width:
                yield Row(line, (), b"", own, f"it has {len(fields)} fields, the header has {width}")
                continue
            try:
                # The fields and where they end: quoting and line ends don't make another row.
                content = msgspec.json.encode(own)
            except UnicodeEncodeError:
                yield Row(line, (), b"", own, "it isn't UTF-8 text")
                continue
            cells = [None if position is None else fields[position] for position in positions]
            yield Row(line, cells, content, own)


class JsonReader:
    """Rows of a file with one JSON object a line. A column may be a path into nested objects: `usage.tokens`.

    Args:
        stream: the file.
        columns: which member holds what.
        rejected: it is a file of rejected rows (`is_rejected_json`), which has the objects in a column of a CSV file.
    """

    header: Final = ["row"]

    def __init__(self, stream: BinaryIO, columns: Columns, *, rejected: bool = False) -> None:
        self._lines = _rejected_lines(stream) if rejected else enumerate(_lines(stream), 1)
        self._names = columns.names()
        # Decimals keep every digit; a float would not.
        self._decoder = msgspec.json.Decoder(dict[str, Any], float_hook=Decimal)

    def __iter__(self) -> Iterator[Row]:
        for number, line in self._lines:
            if isinstance(line, Row):
                yield line
                continue
            content = line.strip()
            if not content:
                continue
            raw = (content.decode("utf-8", "backslashreplace"),)
            try:
                document = self._decoder.decode(content)
            except (msgspec.DecodeError, UnicodeDecodeError, InvalidOperation, RecursionError) as error:
                yield Row(number, (), b"", raw, f"not a JSON object: {error!s:.200}")
                continue
            cells = [None if name is None else _member(document, name) for name in self._names]
            yield Row(number, cells, content, raw)


_REJECTED_JSON: Final = ",".join((*REJECTED_COLUMNS, *JsonReader.header)).encode()


def is_rejects_file(stream: BinaryIO) -> bool:
    """Whether a file begins as `Rejects` writes it, with commas whatever the first file had; nothing of it is read."""
    begin = ",".join(REJECTED_COLUMNS).encode() + b","
    head = cast("io.BufferedReader", stream).peek(len(begin) + 3)
    return head.removeprefix(b"\xef\xbb\xbf").startswith(begin)


def is_rejected_json(stream: BinaryIO, columns: Columns) -> bool:
    """Whether a file begins as one of rejected JSON rows does; nothing of it is read."""
    head = cast("io.BufferedReader", stream).peek(len(_REJECTED_JSON) + 4).removeprefix(b"\xef\xbb\xbf")
    names_it = JsonReader.header[0] in columns.names()  # then it was a CSV file with a column of that name
    return not names_it and re.match(re.escape(_REJECTED_JSON) + rb"\r?\n", head) is not None


def _rejected_lines(stream: BinaryIO) -> Iterator[tuple[int, bytes | Row]]:
    for row in CsvReader(stream, Columns(account=JsonReader.header[0])):
        yield row.line, row if row.problem else cast("str", row.cells[0]).encode()


def _member(document: Mapping[str, Any], name: str) -> Any:
    if name in document:
        return document[name]
    found: Any = document
    for part in name.split("."):
        if not isinstance(found, dict) or part not in found:
            return None
        found = found[part]
    return found


# --- ids -----------------------------------------------------------------------------------------------------


class RowIds:
    """Ids for rows that have none: a hash of the content, and which of the rows of that content it is.

    The counts are kept in memory for up to `rows_max` distinct rows and beyond that in a temporary file.
    """

    def __init__(self, source: str = "", *, rows_max: int = COUNTED_ROWS_MAX) -> None:
        self._source = source.encode() + b"\0" if source else b""
        self._counts: dict[bytes, int] = {}
        self._rows_max = rows_max
        self._spilled: sqlite3.Connection | None = None

    def next(self, content: bytes) -> str:
        """Return the id of the next row with this content."""
        digest = hashlib.blake2b(self._source + content, digest_size=16).digest()
        number = self._counts.get(digest)
        if number is None:
            number = self._stored(digest)
            if len(self._counts) >= self._rows_max:
                self._spill()
        number += 1
        self._counts[digest] = number
        return f"{digest.hex()}:{number}"

    def _stored(self, digest: bytes) -> int:
        if self._spilled is None:
            return 0
        found = self._spilled.execute("SELECT number FROM seen WHERE digest = ?", (digest,)).fetchone()
        return 0 if found is None else int(found[0])

    def _spill(self) -> None:
        if self._spilled is None:
            # An empty name is a private file that vanishes with the connection.
            self._spilled = sqlite3.connect("", isolation_level=None)
            self._spilled.execute("PRAGMA journal_mode = OFF")
            self._spilled.execute("PRAGMA synchronous = OFF")
            self._spilled.execute("CREATE TABLE seen (digest BLOB PRIMARY KEY, number INTEGER) WITHOUT ROWID")
        self._spilled.execute("BEGIN")
        self._spilled.executemany("INSERT OR REPLACE INTO seen VALUES (?, ?)", sorted(self._counts.items()))
        self._spilled.execute("COMMIT")
        self._counts.clear()

    def close(self) -> None:
        """Give the temporary file up."""
        if self._spilled is not None:
            self._spilled.close()
            self._spilled = None


# --- rows to events ------------------------------------------------------------------------------------------


class Converter:
    """Makes events of rows.

    Args:
        columns: which column holds what.
        schemas: the metrics that exist, by code; a value is read as its metric needs it.
        ids: gives rows their ids, where no column does.
    """

    def __init__(self, columns: Columns, schemas: Mapping[str, MetricSchema], ids: RowIds) -> None:
        self._columns = columns
        self._schemas = schemas
        self._ids = ids
        self._keys = [key for key, _ in columns.properties]

    def event(self, row: Row) -> Event:
        """Make a row's event.

        Raises:
            RowError: with the reason for a row that can't be one.
        """
        if row.problem:
            raise RowError(row.problem)
        columns = self._columns
        # Counted whatever comes of the row, so that the numbers depend on the file alone.
        derived = self._ids.next(row.content) if columns.id is None else None
        account, metric, value, time, event_id, operation, *properties = row.cells
        code = columns.metric if columns.metric is not None else _text(metric, columns.metric_column)
        return Event(
            account_id=_account(account, columns.account),
            metric_code=code,
            value=1 if columns.value is None else self._value(value, self._schemas.get(code)),
            timestamp=None if columns.time is None else _time(time, columns.time, columns.time_unit),
            properties={
                key: _property(cell, key)
                for key, cell in zip(self._keys, properties, strict=True)
                if cell is not None and cell != ""
            },
            operation_type=_operation(operation, columns.operation),
            id=derived if derived is not None else _event_id(event_id, columns.id),
        )

    def _value(self, cell: Any, schema: MetricSchema | None) -> int | str:
        name = self._columns.value
        if schema is not None:
            if schema.agg_type is AggType.COUNT:
                return 1  # it is ignored, so whatever the column holds will do
            if schema.agg_type is AggType.COUNT_UNIQUE and schema.unique_type is UniqueType.STRING:
                return _text(cell, name)
        if _missing(cell):
            raise RowError(f"{name} is empty")
        scaled = self._columns.scaled and (schema is None or schema.agg_type is not AggType.COUNT_UNIQUE)
        if not scaled:
            return _whole(cell, name, "; with --scaled it may have decimals")
        if isinstance(cell, bool) or not isinstance(cell, str | int | Decimal):
            raise RowError(f"{name} {cell!r:.60} is no number")
        try:
            return scale(cell.strip() if isinstance(cell, str) else cell)
        except InvalidRequestError as error:
            raise RowError(f"{name}: {error.message}") from None


def _missing(cell: Any) -> bool:
    return cell is None or (isinstance(cell, str) and not cell.strip())


def _whole(cell: Any, name: str | None, hint: str = "") -> int:
    if isinstance(cell, int) and not isinstance(cell, bool):
        return cell
    if isinstance(cell, str):
        text = cell.strip()
        if _INTEGER.fullmatch(text):
            return int(text)
    shown = str(cell) if isinstance(cell, Decimal) else repr(cell)
    raise RowError(f"{name} {shown:.60} is no whole number{hint}")


def _account(cell: Any, name: str) -> int:
    if _missing(cell):
        raise RowError(f"{name} is empty")
    number = _whole(cell, name)
    if not 0 <= number < 2**64:
        raise RowError(f"{name} {number} is no account id: a whole number from 0 to 2^64-1")
    return number


def _text(cell: Any, name: str | None) -> str:
    if isinstance(cell, str) and cell:
        return cell
    if isinstance(cell, int) and not isinstance(cell, bool):
        return str(cell)
    raise RowError(f"{name} is empty" if _missing(cell) else f"{name} {cell!r:.60} is no text")


def _property(cell: Any, key: str) -> str:
    if isinstance(cell, str):
        return cell
    if isinstance(cell, bool):
        return "true" if cell else "false"
    if isinstance(cell, int | Decimal):
        return str(cell)
    raise RowError(f"property {key} {cell!r:.60} is neither text nor a number")


def _event_id(cell: Any, name: str | None) -> str | int:
    if isinstance(cell, str) and cell:
        return cell
    if isinstance(cell, int) and not isinstance(cell, bool):
        return cell
    raise RowError(
        f"{name} is empty" if _missing(cell) else f"{name} {cell!r:.60} is no id: text or a whole number"
    )


def _operation(cell: Any, name: str | None) -> OperationType:
    if cell is None:
        return OperationType.NONE
    found = OPERATIONS.get(cell.strip().lower()) if isinstance(cell, str) else None
    if found is None:
        raise RowError(f"{name} {cell!r:.60} is no operation: add or remove")
    return found


def _time(cell: Any, name: str, unit: str | None) -> int:
    if _missing(cell):
        raise RowError(f"{name} is empty")
    text = str(cell).strip()
    if unit != "iso" and isinstance(cell, str | int | Decimal) and _DECIMAL.fullmatch(text):
        factor = TIME_UNITS[unit or "s"]
        if "." not in text:
            return _bounded_time(int(text) * factor, name, text)
        whole, _, fraction = text.lstrip("+-").partition(".")
        time_ns, rest = divmod(int(whole + fraction) * factor, 10 ** len(fraction))
        if rest:
            raise RowError(f"{name} {text:.60} is finer than a nanosecond")
        return _bounded_time(-time_ns if text.startswith("-") else time_ns, name, text)
    if unit not in {None, "iso"} or not isinstance(cell, str):
        raise RowError(f"{name} {cell!r:.60} is no number of {unit or 's'}")
    try:
        return parse.instant_ns(cell)
    except InvalidRequestError as error:
        raise RowError(f"{name}: {error.message}") from None


def _bounded_time(time_ns: int, name: str, text: str) -> int:
    if not 0 <= time_ns < 2**63:
        raise RowError(f"{name} {text:.60} is outside 1970-01-01 to 2262-04-11: is --time-unit right?")
    return time_ns


# --- rejected rows -------------------------------------------------------------------------------------------


class Rejects:
    """The file of rejected rows: CSV, with `REJECTED_COLUMNS` before the row's own. Made when the first comes.

    Attributes:
        path: where it is, or would be.
        count: how many rows were rejected.
        first: the first few, as (line, reason).
    """

    def __init__(self, path: str, header: Sequence[str]) -> None:
        self.path = path
        self.count = 0
        self.first: list[tuple[int, str]] = []  # (line, reason) of the first few
        self._header = header
        self._file: IO[str] | None = None
        self._writer: Any = None

    def add(self, row: Row, reason: str) -> None:
        """Write a row.

        Raises:
            InvalidRequestError: the file can't be written.
        """
        self.count += 1
        if len(self.first) < _FIRST_REJECTS:
            self.first.append((row.line, reason))
        try:
            if self._file is None:
                self._file = open(  # noqa: SIM115  # `close` does
                    self.path, "w", encoding="utf-8", errors="backslashreplace", newline=""
                )
                self._writer = csv.writer(self._file)
                self._writer.writerow([*REJECTED_COLUMNS, *self._header])
            self._writer.writerow([row.line, reason, *row.raw])
        except OSError as error:
            raise InvalidRequestError(
                f"can't write rejected rows to {self.path}: {error.strerror}"
            ) from error

    def close(self) -> None:
        """Close the file, if there is one."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def remove_stale(self) -> None:
        """After a run that rejected nothing: remove the file of an earlier one, which would seem to be of this one.

        A file that doesn't begin as ours do is left alone.
        """
        assert self.count == 0, "the file is of this run"
        path = Path(self.path)
        begin = ",".join(REJECTED_COLUMNS).encode()
        # A file that can't be looked at or removed is no reason for a run that stored everything to fail.
        with contextlib.suppress(OSError):
            if path.is_file():
                with path.open("rb") as file:
                    head = file.read(len(begin) + 1)
                if head.startswith(begin) and head[len(begin) :] in {b",", b"\r", b"\n"}:
                    path.unlink()


_FIRST_REJECTS = 5


# --- loading -------------------------------------------------------------------------------------------------


class Tally(msgspec.Struct):
    """What became of the rows so far."""

    rows: int = 0  # read
    stored: int = 0  # by this run
    duplicates: int = 0  # stored before
    rejected: int = 0

    @property
    def settled(self) -> int:
        """How many rows have come to an end."""
        return self.stored + self.duplicates + self.rejected


class _Batch(NamedTuple):
    rows: list[Row]  # those that became events
    rejected: list[tuple[Row, str]]  # those that didn't
    task: asyncio.Task[Receipt] | None  # None without events


async def load(
    client: AsyncClient,
    reader: CsvReader | JsonReader,
    converter: Converter,
    rejects: Rejects,
    *,
    tally: Tally,
    batch_rows: int,
    in_flight: int,
    on_progress: Callable[[], None] = lambda: None,
) -> None:
    """Send every row, in batches, and count in `tally` what became of them.

    Batches are settled in the order of the file, so rejected rows are written in order. However it ends, what was
    in flight is waited for and counted first.

    Raises:
        TallymarkError: a batch couldn't be stored after several tries, or the file can't be read on. What `tally`
            counts is settled; loading again stores the rest and counts nothing twice.
    """
    batches: deque[_Batch] = deque()
    rows = iter(reader)
    try:
        while True:
            batch = _next_batch(client, rows, converter, batch_rows, tally)
            if batch is None:
                break
            batches.append(batch)
            while len(batches) >= in_flight:
                await _settle(batches.popleft(), tally, rejects)
                on_progress()
        while batches:
            await _settle(batches.popleft(), tally, rejects)
            on_progress()
    except asyncio.CancelledError:
        # Somebody can't wait: what is in flight may be stored or not, and loading again finds out.
        for batch in batches:
            if batch.task is not None:
                batch.task.cancel()
        raise
    except Exception:
        while batches:
            # The first failure is the one to tell.
            with contextlib.suppress(TallymarkError):
                await _settle(batches.popleft(), tally, rejects)
        raise
    finally:
        on_progress()


def _next_batch(
    client: AsyncClient, rows: Iterator[Row], converter: Converter, batch_rows: int, tally: Tally
) -> _Batch | None:
    events: list[Event] = []
    sent: list[Row] = []
    rejected: list[tuple[Row, str]] = []
    for row in rows:
        tally.rows += 1
        try:
            events.append(converter.event(row))
        except RowError as error:
            rejected.append((row, str(error)))
        else:
            sent.append(row)
        if len(sent) + len(rejected) >= batch_rows:
            break
    if not sent and not rejected:
        return None
    task = asyncio.get_running_loop().create_task(_send(client, events)) if events else None
    return _Batch(sent, rejected, task)


async def _send(client: AsyncClient, events: list[Event]) -> Receipt:
    """Store a batch; a failure that may pass is waited out, under the same identities."""
    try:
        return await client.ingest(events)
    except IngestError as error:
        failed = error
    for _ in range(RETRIES_MAX):
        if not failed.retriable:
            break
        try:
            return cast("Receipt", await failed.retry())
        except IngestError as error:
            failed = error
    raise failed


async def _settle(batch: _Batch, tally: Tally, rejects: Rejects) -> None:
    refused = list(batch.rejected)
    if batch.task is not None:
        receipt = await batch.task
        tally.stored += receipt.n_stored
        tally.duplicates += receipt.n_duplicates
        refused += [(batch.rows[item.index], reason_text(item.message)) for item in receipt.rejected]
        refused += [
            (batch.rows[item.index], "an event with this id but other content is stored already")
            for item in receipt.conflicts
        ]
    for row, reason in sorted(refused, key=lambda entry: entry[0].line):
        tally.rejected += 1
        rejects.add(row, reason)


def reason_text(message: str) -> str:
    """Return a rejection's sentence without the event's position in its request, which means nothing here."""
    return re.sub(r"\Aevent \d+: ", "", message)
