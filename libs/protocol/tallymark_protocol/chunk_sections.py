"""The parts that chunks are made of: single columns, tables, the body that joins them, and the seal.

Owns the bytes of `layout`'s sections as a client writes them; which events go into which chunk, and what is said
about bad ones, is `chunk`'s. Columns are made of whole lists at once. A function here that is given a bad entry
raises one of `GIVE_UP`, and doesn't say which entry it was.
"""

from __future__ import annotations

import re
import sys
from array import array
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import Any, Final

import google_crc32c
import msgspec

from tallymark_protocol import layout as lay
from tallymark_protocol import limits
from tallymark_protocol.errors import InvalidRequestError
from tallymark_protocol.identifiers import check_account_id, encode_event_id, encode_text
from tallymark_protocol.model import OperationType
from tallymark_protocol.periods import to_ns

_CODE = re.compile(limits.METRIC_CODE_PATTERN)
_INTS: Final = {int}
_OPERATION_TYPES: Final = {int, OperationType}
_OPERATION_MAX = max(OperationType)
_UNSIGNED_MIN = 2**63
_UNSIGNED_MAX = 2**64 - 1
_BIG_ENDIAN = sys.byteorder == "big"
# What a bad event makes the quick path raise; which event it was, and why, is found out afterwards.
GIVE_UP = (InvalidRequestError, TypeError, ValueError, OverflowError, AttributeError)


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


class TooLarge(Exception):
    """The events don't fit into one chunk: `split` takes care of it."""


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


# --- single columns, of lists --------------------------------------------------------------------------------


def little_endian(column: array[int]) -> bytes:
    """Return an array's bytes in the byte order of the wire. The array is used up."""
    if _BIG_ENDIAN:
        column.byteswap()
    return column.tobytes()


def whole(value: Any) -> int:
    """Return a whole number as an int; anything that isn't one (a bool, too) raises TypeError."""
    if isinstance(value, bool):
        raise TypeError
    return int(value.__index__())


def account_column(accounts: list[Any]) -> tuple[int, bytes]:
    """Encode account ids; as with every column the encoding and the section are returned."""
    if set(map(type, accounts)) != _INTS:
        accounts = [check_account_id(account) for account in accounts]
    constant = accounts.count(accounts[0]) == len(accounts)
    column = array("Q", accounts[:1] if constant else accounts)  # OverflowError: out of range
    return lay.CONSTANT if constant else lay.PLAIN, little_endian(column)


def number_column(numbers: list[int], default: int) -> tuple[int, bytes]:
    """Encode i64 numbers; a column of nothing but `default` is absent. OverflowError: one is out of range."""
    first = numbers[0]
    if numbers.count(first) != len(numbers):
        return lay.PLAIN, little_endian(array("q", numbers))
    if first == default:
        return lay.ABSENT, b""
    return lay.CONSTANT, little_endian(array("q", (first,)))


def value_columns(values: list[Any]) -> tuple[int, bytes, list[bytes] | None]:
    """Encode the value column, and give the texts if any value needs one."""
    if set(map(type, values)) == _INTS:
        try:
            return *number_column(values, 1), None
        except OverflowError:
            pass  # perhaps u64 values of a COUNT_UNIQUE metric
    numbers = []
    texts = []
    for value in values:
        if isinstance(value, str):
            numbers.append(0)
            texts.append(encode_text(value))
            continue
        number = whole(value)
        if _UNSIGNED_MIN <= number <= _UNSIGNED_MAX:
            numbers.append(0)
            texts.append(b"\x02" + number.to_bytes(8, "little"))
        else:
            numbers.append(number)
            texts.append(b"")
    return *number_column(numbers, 1), texts if any(texts) else None


def time_column(times: list[Any]) -> tuple[int, bytes]:
    """Encode event times: nanoseconds, aware datetimes, or None."""
    if times.count(None) == len(times):
        return lay.ABSENT, b""
    if set(map(type, times)) != _INTS:
        times = [lay.TIME_ABSENT if time is None else to_ns(time) for time in times]
    elif min(times) < 0:
        raise OverflowError  # also keeps TIME_ABSENT from being sent as a time
    return number_column(times, lay.TIME_ABSENT)


def operation_column(operations: list[Any]) -> tuple[int, bytes]:
    """Encode operations."""
    if not set(map(type, operations)) <= _OPERATION_TYPES:
        operations = [whole(operation) for operation in operations]
    if operations.count(OperationType.NONE) == len(operations):
        return lay.ABSENT, b""
    column = bytes(operations)  # ValueError: outside 0..255
    if max(column) > _OPERATION_MAX:
        raise OverflowError
    if column.count(column[0]) != len(column):
        return lay.PLAIN, column
    return lay.CONSTANT, column[:1]


def identifier(event_id: Any) -> bytes:
    """Encode an event id; None gives no bytes."""
    if type(event_id) is str:
        encoded = b"\x01" + event_id.encode()
        if not 1 < len(encoded) <= limits.EVENT_ID_BYTES_MAX:
            raise ValueError
        return encoded
    return b"" if event_id is None else encode_event_id(event_id)


def ends(entries: Iterable[bytes]) -> bytes:
    """Encode where the entries of a table end."""
    return little_endian(array("I", accumulate(map(len, entries))))


def property_set(items: Iterable[tuple[Any, Any]]) -> bytes:
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


def property_column(
    rows: list[Any], items_of: Callable[[Any], Iterable[tuple[Any, Any]]] = lambda row: row
) -> tuple[int, bytes, list[bytes]]:
    """Encode the properties column. Returns the table's entries as well.

    A row is whatever tells property sets apart, the fewer parts the better, as each is hashed; `items_of` gives its
    items. It is called once for each different row.
    """
    table: dict[bytes, int] = {b"": 0}
    numbers: dict[Any, int] = dict.fromkeys(rows, 0)
    for row in numbers:
        # Differently ordered items are different rows, but one set.
        numbers[row] = table.setdefault(property_set(items_of(row)), len(table))
    entries = list(table)[1:]
    if len(numbers) == 1:
        return (lay.CONSTANT, little_endian(array("I", (1,))), entries) if entries else (lay.ABSENT, b"", [])
    return lay.PLAIN, little_endian(array("I", map(numbers.__getitem__, rows))), entries


def check_code(code: Any) -> bytes:
    """Return a metric code's bytes. ValueError: it is none."""
    if not isinstance(code, str) or _CODE.fullmatch(code) is None:
        raise ValueError
    return code.encode()


def assemble(
    indices: Sequence[int],
    codes: list[bytes],
    property_table: list[bytes],
    columns: tuple[tuple[int, bytes], ...],
    identifiers: list[bytes] | None,
    texts: list[bytes] | None,
) -> Body:
    """Join the sections of a chunk: tables, the six columns up to properties, ids and texts (None: absent).

    Raises:
        TooLarge: they don't fit into one chunk.
    """
    code_bytes = b"".join(codes)
    property_bytes = b"".join(property_table)
    parts = [ends(codes), code_bytes]
    if property_table:
        parts += (ends(property_table), property_bytes)
    encodings = 0
    for number, (encoding, section) in enumerate(columns):
        encodings |= encoding << 4 * number
        parts.append(section)
    id_length = text_length = 0
    if identifiers is not None:
        encodings |= lay.PLAIN << 4 * lay.COLUMN_ID
        parts += (ends(identifiers), *identifiers)
        id_length = sum(map(len, identifiers))
    if texts is not None:
        encodings |= lay.PLAIN << 4 * lay.COLUMN_TEXT
        parts += (ends(texts), *texts)
        text_length = sum(map(len, texts))
    content = b"".join(parts)
    if lay.CHUNK_HEADER_BYTES + len(content) > limits.REQUEST_BYTES_MAX:
        raise TooLarge
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


def split(build: Callable[[Any, Any], Body], events: Any, indices: Sequence[int]) -> list[Body]:
    """Build one body if the events fit, else split them by halves, in order."""
    count = len(indices)
    if not count:
        return []
    if count <= limits.REQUEST_EVENTS_MAX:
        try:
            return [build(events, indices)]
        except TooLarge:
            assert count > 1, "a single event fits into a chunk"
    half = (count + 1) // 2
    return [
        *split(build, events[:half], indices[:half]),
        *split(build, events[half:], indices[half:]),
    ]
