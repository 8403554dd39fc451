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

import datetime as dt
import struct
from array import array
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import msgspec

from tallymark_protocol import layout as lay
from tallymark_protocol import limits
from tallymark_protocol.chunk_sections import (
    GIVE_UP,
    Body,
    TooLarge,
    account_column,
    assemble,
    check_code,
    identifier,
    little_endian,
    operation_column,
    property_column,
    seal,
    split,
    time_column,
    value_columns,
)
from tallymark_protocol.errors import InvalidRequestError, Reason, sentence
from tallymark_protocol.model import Event, OperationType

__all__ = [
    "BadEvent",
    "Body",
    "Chunk",
    "Encoded",
    "Prepared",
    "encode_columns",
    "encode_events",
    "prepare_columns",
    "prepare_events",
    "seal",
]

_UNSIGNED_MAX = 2**64 - 1
_SHOWN_CHARACTERS_MAX = 60
_SINGLE = struct.Struct("<Qq")  # account and value of a lone event
_SINGLE_DEFAULT = lay.CONSTANT << 4 * lay.COLUMN_ACCOUNT
_SINGLE_VALUE = _SINGLE_DEFAULT | lay.CONSTANT << 4 * lay.COLUMN_VALUE
_FIRST = range(1)
_EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)


class BadEvent(msgspec.Struct, frozen=True):
    """An event that was taken out before anything was sent."""

    index: int  # in the caller's events
    reason: Reason
    message: str  # a sentence that begins with "event <index>: "


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


# --- both steps in one ------------------------------------------------------------------------------------------


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
        bodies = split(_event_body, events, indices)
    except GIVE_UP:
        good = []
        for index, event in enumerate(events):
            problem = _problem(index, event)
            if problem is None:
                good.append(index)
            else:
                bad.append(problem)
        if len(good) == len(events):
            raise  # not the events' fault: a defect here, or a lack of memory
        bodies = split(_event_body, [events[index] for index in good], good)
    return Prepared(bodies, bad)


@lru_cache(maxsize=1_024)
def _code_section(code: str) -> bytes:
    """The metric table of a single code."""
    encoded = check_code(code)
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
    account_encoding, accounts = account_column([event.account_id for event in events])
    codes = [event.metric_code for event in events]
    metric_encoding, metrics = lay.ABSENT, b""
    if codes.count(codes[0]) == len(codes):
        code_table = [check_code(codes[0])]
    else:
        distinct = {code: number for number, code in enumerate(dict.fromkeys(codes))}
        if len(distinct) > limits.CHUNK_METRICS_MAX:
            raise TooLarge
        code_table = [check_code(code) for code in distinct]
        metric_encoding, metrics = lay.PLAIN, little_endian(array("H", [distinct[code] for code in codes]))
    value_encoding, values, texts = value_columns([event.value for event in events])
    time_encoding, times = time_column([event.timestamp for event in events])
    operation_encoding, operations = operation_column([event.operation_type for event in events])
    rows = [event.properties for event in events]
    property_table: list[bytes] = []
    property_encoding, properties = lay.ABSENT, b""
    # An empty dict is what nearly every event has; anything else that is false is not a property set.
    if rows.count({}) != len(rows):
        items: list[Any] = [tuple(dict.items(row)) for row in rows]
        property_encoding, properties, property_table = property_column(items)
    ids = [event.id for event in events]
    identifiers = None if ids.count(None) == len(ids) else [identifier(event_id) for event_id in ids]
    return assemble(
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


# --- what is wrong with an event -----------------------------------------------------------------------------


def _problem(index: int, event: Any) -> BadEvent | None:
    """Find what is wrong with an event, if anything is: whatever `_event_body` gives up at is found here."""
    if not isinstance(event, Event):
        raise InvalidRequestError(f"event {index} is no Event but of type {type(event).__name__}")
    checks: tuple[tuple[Reason, Callable[[Any], object], Any], ...] = (
        (Reason.INVALID_ACCOUNT, lambda account: account_column([account]), event.account_id),
        (Reason.INVALID_METRIC_CODE, check_code, event.metric_code),
        (Reason.VALUE_OUT_OF_RANGE, lambda value: value_columns([value]), event.value),
        (Reason.INVALID_TIMESTAMP, lambda time: time_column([time]), event.timestamp),
        (Reason.BAD_OPERATION, lambda operation: operation_column([operation]), event.operation_type),
        (Reason.INVALID_PROPERTY, lambda row: property_column([tuple(dict.items(row))]), event.properties),
        (Reason.INVALID_EVENT_ID, identifier, event.id),
    )
    for reason, check, value in checks:
        try:
            check(value)
        except GIVE_UP as error:
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
    elif reason == Reason.INVALID_TIMESTAMP and _before_epoch(value):
        reason = Reason.TIME_BEFORE_EPOCH
    return BadEvent(index, reason, sentence(reason, index=index, detail=detail))


def _before_epoch(value: Any) -> bool:
    """Whether a time that was refused is an instant, and before 1970."""
    if isinstance(value, dt.datetime):
        try:
            return value.utcoffset() is not None and value < _EPOCH
        except GIVE_UP:  # a zone that can't say where it is at that time
            return False
    return isinstance(value, int) and not isinstance(value, bool) and value < 0


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
        """Cut all columns alike: `split` slices what it builds from."""
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
        check_code(metric_code)
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
        return Prepared(split(_column_body, columns, range(count)), [])
    except GIVE_UP:
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
        operation_encoding, operations = operation_column(_listed(columns.operations, count))
    property_encoding, properties, property_table = _properties_of(columns)
    ids = columns.ids
    identifiers = None
    if ids is not None and ids.count(None) != len(ids):
        identifiers = [identifier(event_id) for event_id in ids]
    return assemble(
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
            return *account_column(entries), None
        if is_time:
            return *time_column(entries), None
        encoding, section, texts = value_columns(entries)
        return encoding, section, texts * count if texts is not None and len(entries) < count else texts
    least, greatest = int(column.min()), int(column.max())
    if kind == "<u8" or is_time:
        if least < 0 or (is_time and greatest > limits.VALUE_MAX):
            raise OverflowError
    elif greatest > limits.VALUE_MAX:
        return value_columns(column.tolist())
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
        return property_column([tuple(single)])
    full = [
        column if isinstance(column, list) else [column] * columns.count
        for column in columns.properties.values()
    ]
    return property_column(
        list(zip(*full, strict=True)),
        lambda row: [(key, value) for key, value in zip(keys, row, strict=True) if value is not None],
    )


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
