"""Writing chunks: a call's events become columns, and columns the bytes of `layout`.

Owns the client's side of the chunk layout; `payload` reads it. Pure, and hot: no event is touched more often
than there are columns, and a column that is absent or constant is found out by `list.count`, which compares
identities first. Columns that numpy holds are checked by their least and greatest entry, never one by one
(numpy isn't imported: whatever has a `dtype` is asked).

Two steps. `prepare_events` and `prepare_columns` make **bodies**: all of a chunk but who sent it and when.
`seal` puts the header before a body once the sender has a sequence for it, which makes the chunk's bytes final:
a retry sends the very same ones. `encode_events` and `encode_columns` do both.

An event that no chunk can hold is taken out and reported as a `BadEvent`; the others go on, and a body's
`indices` say which of the caller's events it holds. The quick path assumes that all are good and gives up at the
first that isn't; only then is each looked at on its own. What is too large for one chunk is split by halves.
"""

from __future__ import annotations

import re
import struct
import sys
from array import array
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any, Final, NamedTuple

import google_crc32c
import msgspec

from tallymark_protocol import layout as lay
from tallymark_protocol import limits
from tallymark_protocol.errors import InvalidRequestError, Reason, sentence
from tallymark_protocol.identifiers import check_account_id, encode_event_id, encode_text
from tallymark_protocol.model import Event, OperationType
from tallymark_protocol.periods import to_ns

_CODE = re.compile(limits.METRIC_CODE_PATTERN)
_INTS: Final = {int}
_OPERATION_TYPES: Final = {int, OperationType}
_OPERATION_MAX = max(OperationType)
_UNSIGNED_MIN = 2**63
_UNSIGNED_MAX = 2**64 - 1
_SHOWN_CHARACTERS_MAX = 60
_SINGLE = struct.Struct("<Qq")  # account and value of a lone event
_SINGLE_DEFAULT = lay.CONSTANT << 4 * lay.COLUMN_ACCOUNT
_SINGLE_VALUE = _SINGLE_DEFAULT | lay.CONSTANT << 4 * lay.COLUMN_VALUE
_FIRST = range(1)
_BIG_ENDIAN = sys.byteorder == "big"
# What a bad event makes the quick path raise; which event it was, and why, is found out afterwards.
_GIVE_UP = (InvalidRequestError, TypeError, ValueError, OverflowError, AttributeError)


class BadEvent(msgspec.Struct, frozen=True):
    """An event that was taken out before anything was sent."""

    index: int  # in the caller's events
    reason: Reason
    message: str  # a sentence that begins with "event <index>: "


class Body(msgspec.Struct, frozen=True, gc=False):
    """A chunk without its identity; `seal` completes it."""

    event_count: int
    encodings: int
    metric_count: int
    metric_bytes: int
    property_count: int
    property_bytes: int
    id_bytes: int
    text_bytes: int
    content: bytes  # the sections
    indices: Sequence[int]  # which of the caller's events, in order; as many as `event_count`

    @property
    def chunk_bytes(self) -> int:
        """How many bytes the sealed chunk has."""
        return lay.CHUNK_HEADER_BYTES + len(self.content)

    def accounts(self) -> Sequence[int]:
        """The account ids, one an event; or a single one if all are equal."""
        start = 4 * self.metric_count + self.metric_bytes + 4 * self.property_count + self.property_bytes
        plain = self.encodings >> 4 * lay.COLUMN_ACCOUNT & 15 == lay.PLAIN
        column = array("Q")
        column.frombytes(self.content[start : start + 8 * (self.event_count if plain else 1)])
        if _BIG_ENDIAN:
            column.byteswap()
        return column


class Prepared(NamedTuple):
    """What a call's events became."""

    bodies: list[Body]
    bad: list[BadEvent]  # by ascending index


class Chunk(NamedTuple):
    """A chunk ready to be sent."""

    data: bytes
    sequence: int
    body: Body


class Encoded(NamedTuple):
    """A call's chunks, with sequences from the given one upwards, and the events left out."""

    chunks: list[Chunk]
    bad: list[BadEvent]


class _TooLarge(Exception):
    """The events don't fit into one chunk; never leaves this module."""


# --- sealing -------------------------------------------------------------------------------------------------


def seal(body: Body, *, producer_id: int, sequence: int, first_sent_ns: int, flags: int = 0) -> bytes:
    """Return the chunk's bytes. Keep them: a retry must send the same.

    Args:
        body: what to send.
        producer_id: the sender's random identity, 0 to 2^64-1.
        sequence: never used before by this producer for other content, 0 to 2^64-1.
        first_sent_ns: when the chunk is sent for the first time, in the server's time.
        flags: `layout.FLAG_ASYNC` or 0.
    """
    content = body.content
    header = lay.CHUNK_HEADER.pack(
        lay.CHUNK_MAGIC,
        0,
        lay.CHUNK_HEADER_BYTES + len(content),
        body.event_count,
        producer_id,
        sequence,
        first_sent_ns,
        body.encodings,
        flags,
        body.metric_count,
        body.metric_bytes,
        body.property_count,
        body.property_bytes,
        body.id_bytes,
        body.text_bytes,
        0,
    )
    covered = header[8:]
    checksum: int = google_crc32c.extend(google_crc32c.value(covered), content)
    return b"".join((header[:4], checksum.to_bytes(4, "little"), covered, content))


def encode_events(
    events: Sequence[Event], producer_id: int, sequence: int, first_sent_ns: int, flags: int = 0
) -> Encoded:
    """Encode events as chunks; those that can't be encoded are reported, the others go on.

    Raises:
        InvalidRequestError: one of them is no `Event`.
    """
    return _sealed(prepare_events(events), producer_id, sequence, first_sent_ns, flags)


def encode_columns(
    metric_code: str,
    account_ids: Any,
    values: Any = 1,
    timestamps_ns: Any = None,
    ids: Any = None,
    properties: dict[str, Any] | None = None,
    operations: Any = None,
    *,
    producer_id: int,
    sequence: int,
    first_sent_ns: int,
    flags: int = 0,
) -> Encoded:
    """Encode columns of one metric's events as chunks; see `prepare_columns` for what a column may be."""
    prepared = prepare_columns(metric_code, account_ids, values, timestamps_ns, ids, properties, operations)
    return _sealed(prepared, producer_id, sequence, first_sent_ns, flags)


def _sealed(prepared: Prepared, producer_id: int, sequence: int, first_sent_ns: int, flags: int) -> Encoded:
    chunks = [
        Chunk(
            seal(body, producer_id=producer_id, sequence=number, first_sent_ns=first_sent_ns, flags=flags),
            number,
            body,
        )
        for number, body in enumerate(prepared.bodies, sequence)
    ]
    return Encoded(chunks, prepared.bad)


# --- single columns, of lists --------------------------------------------------------------------------------


def _bytes(column: array[int]) -> bytes:
    if _BIG_ENDIAN:
        column.byteswap()
    return column.tobytes()


def _whole(value: Any) -> int:
    """Return a whole number as an int; anything that isn't one (a bool, too) raises TypeError."""
    if isinstance(value, bool):
        raise TypeError
    return int(value.__index__())


def _account_column(accounts: list[Any]) -> tuple[int, bytes]:
    if set(map(type, accounts)) != _INTS:
        accounts = [check_account_id(account) for account in accounts]
    constant = accounts.count(accounts[0]) == len(accounts)
    column = array("Q", accounts[:1] if constant else accounts)  # OverflowError: out of range
    return lay.CONSTANT if constant else lay.PLAIN, _bytes(column)


def _number_column(numbers: list[int], default: int) -> tuple[int, bytes]:
    first = numbers[0]
    if numbers.count(first) != len(numbers):
        return lay.PLAIN, _bytes(array("q", numbers))
    if first == default:
        return lay.ABSENT, b""
    return lay.CONSTANT, _bytes(array("q", (first,)))


def _value_columns(values: list[Any]) -> tuple[int, bytes, list[bytes] | None]:
    """Encode the value column, and give the texts if any value needs one."""
    if set(map(type, values)) == _INTS:
        try:
            return *_number_column(values, 1), None
        except OverflowError:
            pass  # perhaps u64 values of a COUNT_UNIQUE metric
    numbers = []
    texts = []
    for value in values:
        if isinstance(value, str):
            numbers.append(0)
            texts.append(encode_text(value))
            continue
        number = _whole(value)
        if _UNSIGNED_MIN <= number <= _UNSIGNED_MAX:
            numbers.append(0)
            texts.append(b"\x02" + number.to_bytes(8, "little"))
        else:
            numbers.append(number)
            texts.append(b"")
    return *_number_column(numbers, 1), texts if any(texts) else None


def _time_column(times: list[Any]) -> tuple[int, bytes]:
    if times.count(None) == len(times):
        return lay.ABSENT, b""
    if set(map(type, times)) != _INTS:
        times = [lay.TIME_ABSENT if time is None else to_ns(time) for time in times]
    elif min(times) < 0:
        raise OverflowError  # also keeps TIME_ABSENT from being sent as a time
    return _number_column(times, lay.TIME_ABSENT)


def _operation_column(operations: list[Any]) -> tuple[int, bytes]:
    if not set(map(type, operations)) <= _OPERATION_TYPES:
        operations = [_whole(operation) for operation in operations]
    if operations.count(OperationType.NONE) == len(operations):
        return lay.ABSENT, b""
    column = bytes(operations)  # ValueError: outside 0..255
    if max(column) > _OPERATION_MAX:
        raise OverflowError
    if column.count(column[0]) != len(column):
        return lay.PLAIN, column
    return lay.CONSTANT, column[:1]


def _identifier(event_id: Any) -> bytes:
    if type(event_id) is str:
        encoded = b"\x01" + event_id.encode()
        if not 1 < len(encoded) <= limits.EVENT_ID_BYTES_MAX:
            raise ValueError
        return encoded
    return b"" if event_id is None else encode_event_id(event_id)


def _ends(entries: Iterable[bytes]) -> bytes:
    return _bytes(array("I", accumulate(map(len, entries))))


def _property_set(items: Iterable[tuple[Any, Any]]) -> bytes:
    """Encode a property set canonically. TypeError: a key or value that is no str; ValueError: out of bounds."""
    encoded = sorted([(str.encode(key), str.encode(value)) for key, value in items])
    parts: list[bytes] = []
    for key, value in encoded:
        if not 1 <= len(key) <= limits.PROPERTY_KEY_BYTES_MAX or len(value) > limits.PROPERTY_VALUE_BYTES_MAX:
            raise ValueError
        parts += (len(key).to_bytes(1, "little"), key, len(value).to_bytes(2, "little"), value)
    result = b"".join(parts)
    if len(result) > limits.PROPERTIES_BYTES_MAX:
        raise OverflowError
    return result


def _property_column(rows: list[Any]) -> tuple[int, bytes, list[bytes]]:
    """Encode the properties column; a row is a tuple of items. Returns the table's entries as well."""
    table: dict[bytes, int] = {b"": 0}
    numbers: dict[Any, int] = {}
    for row in dict.fromkeys(rows):
        # Differently ordered items are different rows, but one set.
        numbers[row] = table.setdefault(_property_set(row), len(table))
    entries = list(table)[1:]
    if len(numbers) == 1:
        return (lay.CONSTANT, _bytes(array("I", (1,))), entries) if entries else (lay.ABSENT, b"", [])
    return lay.PLAIN, _bytes(array("I", [numbers[row] for row in rows])), entries


def _check_code(code: Any) -> bytes:
    if not isinstance(code, str) or _CODE.fullmatch(code) is None:
        raise ValueError
    return code.encode()


# --- events --------------------------------------------------------------------------------------------------


def prepare_events(events: Sequence[Event]) -> Prepared:
    """Make bodies of events.

    Bad ones are left out: an account id that is no whole number of 0..2^64-1, a value that is a bool, a float or
    out of range, a naive or impossible timestamp, and whatever exceeds its limit.

    Raises:
        InvalidRequestError: one of them is no `Event`.
    """
    if not events:
        return Prepared([], [])
    bad: list[BadEvent] = []
    indices: Sequence[int] = range(len(events))
    try:
        if len(events) == 1:
            single = _single_body(events[0])
            if single is not None:
                return Prepared([single], bad)
        bodies = _split(_event_body, events, indices)
    except _GIVE_UP:
        good = []
        for index, event in enumerate(events):
            problem = _problem(index, event)
            if problem is None:
                good.append(index)
            else:
                bad.append(problem)
        if len(good) == len(events):
            raise  # not the events' fault: a defect here, or a lack of memory
        bodies = _split(_event_body, [events[index] for index in good], good)
    return Prepared(bodies, bad)


def _split(build: Callable[[Any, Any], Body], events: Any, indices: Sequence[int]) -> list[Body]:
    """Build one body if the events fit, else split them by halves, in order."""
    count = len(indices)
    if not count:
        return []
    if count <= limits.REQUEST_EVENTS_MAX:
        try:
            return [build(events, indices)]
        except _TooLarge:
            assert count > 1, "a single event fits into a chunk"
    half = (count + 1) // 2
    return [
        *_split(build, events[:half], indices[:half]),
        *_split(build, events[half:], indices[half:]),
    ]


@lru_cache(maxsize=1_024)
def _code_section(code: str) -> bytes:
    """The metric table of a single code."""
    encoded = _check_code(code)
    return len(encoded).to_bytes(4, "little") + encoded


def _single_body(event: Event) -> Body | None:
    """Encode a lone event of the plainest kind, to the same bytes in a fraction of the time; None: it isn't one."""
    account, value, code = event.account_id, event.value, event.metric_code
    if (
        type(account) is not int
        or type(value) is not int
        or type(code) is not str
        or event.timestamp is not None
        or event.id is not None
        or event.operation_type is not OperationType.NONE
        or event.properties != {}
        or not 0 <= account <= _UNSIGNED_MAX
        or not limits.VALUE_MIN <= value <= limits.VALUE_MAX
    ):
        return None
    table = _code_section(code)
    if value == 1:
        encodings, content = _SINGLE_DEFAULT, table + account.to_bytes(8, "little")
    else:
        encodings, content = _SINGLE_VALUE, table + _SINGLE.pack(account, value)
    return Body(1, encodings, 1, len(table) - 4, 0, 0, 0, 0, content, _FIRST)


def _event_body(events: Sequence[Event], indices: Sequence[int]) -> Body:
    account_encoding, accounts = _account_column([event.account_id for event in events])
    codes = [event.metric_code for event in events]
    metric_encoding, metrics = lay.ABSENT, b""
    if codes.count(codes[0]) == len(codes):
        code_table = [_check_code(codes[0])]
    else:
        distinct = {code: number for number, code in enumerate(dict.fromkeys(codes))}
        if len(distinct) > limits.CHUNK_METRICS_MAX:
            raise _TooLarge
        code_table = [_check_code(code) for code in distinct]
        metric_encoding, metrics = lay.PLAIN, _bytes(array("H", [distinct[code] for code in codes]))
    value_encoding, values, texts = _value_columns([event.value for event in events])
    time_encoding, times = _time_column([event.timestamp for event in events])
    operation_encoding, operations = _operation_column([event.operation_type for event in events])
    rows = [event.properties for event in events]
    property_table: list[bytes] = []
    property_encoding, properties = lay.ABSENT, b""
    # An empty dict is what nearly every event has; anything else that is false is not a property set.
    if rows.count({}) != len(rows):
        items: list[Any] = [tuple(dict.items(row)) for row in rows]
        property_encoding, properties, property_table = _property_column(items)
    ids = [event.id for event in events]
    identifiers = None if ids.count(None) == len(ids) else [_identifier(event_id) for event_id in ids]
    return _assemble(
        indices,
        code_table,
        property_table,
        (
            (account_encoding, accounts),
            (metric_encoding, metrics),
            (value_encoding, values),
            (time_encoding, times),
            (operation_encoding, operations),
            (property_encoding, properties),
        ),
        identifiers,
        texts,
    )


def _assemble(
    indices: Sequence[int],
    codes: list[bytes],
    property_table: list[bytes],
    columns: tuple[tuple[int, bytes], ...],
    identifiers: list[bytes] | None,
    texts: list[bytes] | None,
) -> Body:
    code_bytes = b"".join(codes)
    property_bytes = b"".join(property_table)
    parts = [_ends(codes), code_bytes]
    if property_table:
        parts += (_ends(property_table), property_bytes)
    encodings = 0
    for number, (encoding, section) in enumerate(columns):
        encodings |= encoding << 4 * number
        parts.append(section)
    id_length = text_length = 0
    if identifiers is not None:
        encodings |= lay.PLAIN << 4 * lay.COLUMN_ID
        parts += (_ends(identifiers), *identifiers)
        id_length = sum(map(len, identifiers))
    if texts is not None:
        encodings |= lay.PLAIN << 4 * lay.COLUMN_TEXT
        parts += (_ends(texts), *texts)
        text_length = sum(map(len, texts))
    content = b"".join(parts)
    if lay.CHUNK_HEADER_BYTES + len(content) > limits.REQUEST_BYTES_MAX:
        raise _TooLarge
    return Body(
        len(indices),
        encodings,
        len(codes),
        len(code_bytes),
        len(property_table),
        len(property_bytes),
        id_length,
        text_length,
        content,
        indices,
    )


# --- what is wrong with an event -----------------------------------------------------------------------------


def _problem(index: int, event: Any) -> BadEvent | None:
    """Find what is wrong with an event, if anything is: whatever `_event_body` gives up at is found here."""
    if not isinstance(event, Event):
        raise InvalidRequestError(f"event {index} is no Event but of type {type(event).__name__}")
    checks: tuple[tuple[Reason, Callable[[Any], object], Any], ...] = (
        (Reason.INVALID_ACCOUNT, lambda account: _account_column([account]), event.account_id),
        (Reason.INVALID_METRIC_CODE, _check_code, event.metric_code),
        (Reason.VALUE_OUT_OF_RANGE, lambda value: _value_columns([value]), event.value),
        (Reason.INVALID_TIMESTAMP, lambda time: _time_column([time]), event.timestamp),
        (Reason.BAD_OPERATION, lambda operation: _operation_column([operation]), event.operation_type),
        (Reason.INVALID_PROPERTY, lambda row: _property_column([tuple(dict.items(row))]), event.properties),
        (Reason.INVALID_EVENT_ID, _identifier, event.id),
    )
    for reason, check, value in checks:
        try:
            check(value)
        except _GIVE_UP as error:
            return _explain(index, reason, value, error)
    return None


def _explain(index: int, reason: Reason, value: Any, error: Exception) -> BadEvent:
    detail = _shown(value)
    if reason == Reason.VALUE_OUT_OF_RANGE:
        if isinstance(value, str):
            too_long = len(value.encode("utf-8", "surrogatepass")) >= limits.VALUE_TEXT_BYTES_MAX
            reason = Reason.VALUE_TEXT_TOO_LARGE if too_long else Reason.VALUE_NOT_TEXT
            detail = str(error)
        elif not isinstance(error, OverflowError):
            reason = Reason.VALUE_NOT_NUMBER
            hint = "use scale() for decimals" if hasattr(value, "__float__") else "pass an int"
            message = f"its value must be a whole number, not {detail} of type {type(value).__name__}: {hint}"
            return BadEvent(index, reason, f"event {index}: {message}")
    elif reason == Reason.INVALID_PROPERTY and isinstance(error, OverflowError):
        reason = Reason.PROPERTIES_TOO_LARGE
    elif (
        reason == Reason.INVALID_TIMESTAMP
        and isinstance(value, int)
        and not isinstance(value, bool)
        and value < 0
    ):
        reason = Reason.TIME_BEFORE_EPOCH
    return BadEvent(index, reason, sentence(reason, index=index, detail=detail))


def _shown(value: object) -> str:
    try:
        text = repr(value)
    except Exception:  # a foreign repr; an int of very many digits has none either
        return f"a {type(value).__name__}"
    return text if len(text) <= _SHOWN_CHARACTERS_MAX else text[:_SHOWN_CHARACTERS_MAX] + "…"


# --- columns -------------------------------------------------------------------------------------------------


class _Columns:
    """Columns of equal length, each a list, an integer array with a `dtype`, or one value for all events."""

    __slots__ = ("accounts", "code", "count", "ids", "operations", "properties", "times", "values")

    def __init__(
        self,
        code: str,
        count: int,
        accounts: Any,
        values: Any,
        times: Any,
        operations: Any,
        ids: Any,
        properties: dict[str, Any],
    ) -> None:
        self.code = code
        self.count = count
        self.accounts = accounts
        self.values = values
        self.times = times
        self.operations = operations
        self.ids = ids
        self.properties = properties

    def __getitem__(self, part: slice) -> _Columns:
        """Cut all columns alike: `_split` slices what it builds from."""
        return _Columns(
            self.code,
            len(range(self.count)[part]),
            _cut(self.accounts, part),
            _cut(self.values, part),
            _cut(self.times, part),
            _cut(self.operations, part),
            _cut(self.ids, part),
            {key: _cut(column, part) for key, column in self.properties.items()},
        )


def prepare_columns(
    metric_code: str,
    account_ids: Any,
    values: Any = 1,
    timestamps_ns: Any = None,
    ids: Any = None,
    properties: dict[str, Any] | None = None,
    operations: Any = None,
) -> Prepared:
    """Make bodies of columns.

    A column is a numpy array of an integer type, an `array.array`, a memoryview, a list, anything else that can
    be iterated, or a single value that holds for all events. All columns have the same length.

    Args:
        metric_code: all events' metric.
        account_ids: integers.
        values: integers; strings for a COUNT_UNIQUE metric of strings.
        timestamps_ns: nanoseconds since the Unix epoch; None for the time of storing. Lists may hold datetimes.
        ids: event ids; None, alone or in a list, for none.
        properties: by key a string for all events, or a list of strings with None where it is missing.
        operations: of `OperationType`.

    Raises:
        InvalidRequestError: a column is of another length or of a type that no event could have.
    """
    try:
        _check_code(metric_code)
    except ValueError:
        raise InvalidRequestError(
            f"a metric code is 1 to 64 characters of a-z A-Z 0-9 _ . : -, not {_shown(metric_code)}"
        ) from None
    named = {
        "account_ids": _column("account_ids", account_ids),
        "values": _column("values", values),
        "timestamps_ns": _column("timestamps_ns", timestamps_ns),
        "ids": _column("ids", ids),
        "operations": _column("operations", operations),
    }
    by_key = {key: _column(f"properties[{key!r}]", column) for key, column in (properties or {}).items()}
    lengths = {name: len(column) for name, column in named.items() if _is_column(column)}
    lengths.update(
        (f"properties[{key!r}]", len(column)) for key, column in by_key.items() if _is_column(column)
    )
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{name} has {length}" for name, length in lengths.items())
        raise InvalidRequestError(f"columns differ in length: {listed}")
    count = next(iter(lengths.values()), 1)
    if count == 0:
        return Prepared([], [])
    if count > 1 and named["ids"] is not None and not _is_column(named["ids"]):
        raise InvalidRequestError(
            "one id for several events would make all but the first duplicates: pass a list"
        )
    columns = _Columns(
        metric_code,
        count,
        named["account_ids"],
        named["values"],
        named["timestamps_ns"],
        named["operations"],
        _listed(named["ids"], count),
        {key: column.tolist() if hasattr(column, "dtype") else column for key, column in by_key.items()},
    )
    try:
        return Prepared(_split(_column_body, columns, range(count)), [])
    except _GIVE_UP:
        # Some event is bad: the way of single events finds out which, and sends the others.
        return prepare_events(_events(columns))


def _column_body(columns: _Columns, indices: Sequence[int]) -> Body:
    count = columns.count
    value_encoding, values, texts = _integers(columns.values, "<i8", count)
    time_encoding, times = lay.ABSENT, b""
    if columns.times is not None:
        time_encoding, times, _ = _integers(columns.times, "<i8", count, is_time=True)
    account_encoding, accounts, _ = _integers(columns.accounts, "<u8", count)
    operation_encoding, operations = lay.ABSENT, b""
    if columns.operations is not None:
        operation_encoding, operations = _operation_column(_listed(columns.operations, count))
    property_encoding, properties, property_table = _properties_of(columns)
    ids = columns.ids
    identifiers = None
    if ids is not None and ids.count(None) != len(ids):
        identifiers = [_identifier(event_id) for event_id in ids]
    return _assemble(
        indices,
        [columns.code.encode()],
        property_table,
        (
            (account_encoding, accounts),
            (lay.ABSENT, b""),
            (value_encoding, values),
            (time_encoding, times),
            (operation_encoding, operations),
            (property_encoding, properties),
        ),
        identifiers,
        texts,
    )


def _integers(
    column: Any, kind: str, count: int, *, is_time: bool = False
) -> tuple[int, bytes, list[bytes] | None]:
    """Encode a column of numbers; `kind` is its numpy type on the wire."""
    if not hasattr(column, "dtype"):
        # One value for all is encoded once, and then stands for all.
        entries = column if isinstance(column, list) else [column]
        if kind == "<u8":
            return *_account_column(entries), None
        if is_time:
            return *_time_column(entries), None
        encoding, section, texts = _value_columns(entries)
        return encoding, section, texts * count if texts is not None and len(entries) < count else texts
    least, greatest = int(column.min()), int(column.max())
    if kind == "<u8" or is_time:
        if least < 0 or (is_time and greatest > limits.VALUE_MAX):
            raise OverflowError
    elif greatest > limits.VALUE_MAX:
        return _value_columns(column.tolist())
    if least != greatest:
        return lay.PLAIN, column.astype(kind).tobytes(), None
    if kind == "<i8" and not is_time and least == 1:
        return lay.ABSENT, b"", None
    return lay.CONSTANT, (least & _UNSIGNED_MAX).to_bytes(8, "little"), None


def _properties_of(columns: _Columns) -> tuple[int, bytes, list[bytes]]:
    keys = list(columns.properties)
    several = [column for column in columns.properties.values() if isinstance(column, list)]
    if not several:
        single = [(key, value) for key, value in columns.properties.items() if value is not None]
        return _property_column([tuple(single)])
    full = [
        column if isinstance(column, list) else [column] * columns.count
        for column in columns.properties.values()
    ]
    rows = list(zip(*full, strict=True))
    items = {
        row: tuple((key, value) for key, value in zip(keys, row, strict=True) if value is not None)
        for row in dict.fromkeys(rows)
    }
    return _property_column([items[row] for row in rows])


def _events(columns: _Columns) -> list[Event]:
    count = columns.count
    accounts = _listed(columns.accounts, count)
    values = _listed(columns.values, count)
    times = _listed(columns.times, count) or [None] * count
    operations = _listed(columns.operations, count) or [OperationType.NONE] * count
    ids = columns.ids or [None] * count
    by_key = {key: _listed(column, count) or [None] * count for key, column in columns.properties.items()}
    return [
        Event(
            accounts[i],
            columns.code,
            values[i],
            times[i],
            {key: column[i] for key, column in by_key.items() if column[i] is not None},
            operations[i],
            None,
            ids[i],
        )
        for i in range(count)
    ]


def _listed(column: Any, count: int) -> Any:
    """Return a column as a list of plain Python values; None stays None (an absent column)."""
    if column is None or isinstance(column, list):
        return column
    return column.tolist() if hasattr(column, "dtype") else [column] * count


def _cut(column: Any, part: slice) -> Any:
    return column[part] if _is_column(column) else column


def _is_column(column: Any) -> bool:
    return isinstance(column, list) or hasattr(column, "dtype")


def _column(name: str, value: Any) -> Any:
    """Bring an argument into one of the three forms of `_Columns`."""
    if value is None or isinstance(value, (list, str, bytes)):
        return value
    if hasattr(value, "to_numpy"):
        value = value.to_numpy()
    kind = getattr(getattr(value, "dtype", None), "kind", None)
    if kind is not None:
        if value.ndim > 1:
            raise InvalidRequestError(f"{name} must have one dimension, not {value.ndim}")
        if kind not in "iuOUST" or not value.ndim:
            return _checked_kind(name, kind, value)
        return value if kind in "iu" and len(value) else value.tolist()
    if isinstance(value, (array, memoryview)):
        form = value.typecode if isinstance(value, array) else value.format
        if form in {"f", "d", "?"}:
            _checked_kind(name, "b" if form == "?" else "f", value)
        return value.tolist()
    if isinstance(value, float):
        return _checked_kind(name, "f", value)
    if hasattr(value, "__index__") or not isinstance(value, Iterable):
        return value
    return list(value)


def _checked_kind(name: str, kind: str, value: Any) -> Any:
    """Refuse what no integer column may be, with a hint; a numpy scalar becomes a plain value."""
    if kind == "f":
        raise InvalidRequestError(f"{name} must hold whole numbers, not floats: use scale() for decimals")
    if kind == "M":
        raise InvalidRequestError(
            f"{name} must hold whole nanoseconds: use .astype('datetime64[ns]').astype('int64')"
        )
    if kind not in "iuOUST":
        raise InvalidRequestError(f"{name} can't hold values of type {getattr(value, 'dtype', 'bool')}")
    return value.item()
