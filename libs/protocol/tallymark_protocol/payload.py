"""Reading chunks and payloads in kernels: validation, and columns by position.

Owns the server's side of the byte layouts in `layout`. Bytes from a peer go through `validate_chunk` or
`validate_payload` once; those fill a **columns** array (int64[COLUMNS]) with where everything lies, after
which the accessors (`account_at`, `value_at`, ...) read without checks. A hostile count or length is refused
by arithmetic on the header before anything is touched or allocated.

`base` is the position in the buffer of the chunk's or payload's first byte; all positions in a columns array
are absolute in that buffer.
"""

from typing import Any

import numba as nb
import numpy as np
import numpy.typing as npt

from tallymark_protocol import layout as lay
from tallymark_protocol import limits
from tallymark_protocol.errors import RemoteProtocolError
from tallymark_protocol.kernels.intrinsics import load_i64, load_u8, load_u16, load_u32, load_u64

Bytes = npt.NDArray[np.uint8]
Columns = npt.NDArray[np.int64]

# Slots of a columns array.
C_EVENTS = 0
C_CHUNKS = 1  # payloads only; a chunk counts as 1
C_METRICS = 2  # entries of the metric table
C_PROPERTY_SETS = 3
C_CHUNK_TABLE = 4  # position of the chunk table; for a chunk, of its header
C_METRIC_ENDS = 5
C_METRIC_BYTES = 6
C_PROPERTY_ENDS = 7
C_PROPERTY_BYTES = 8
C_ACCOUNT = 9
C_METRIC = 10
C_VALUE = 11
C_TIME = 12
C_OPERATION = 13
C_PROPERTIES = 14
C_ID_ENDS = 15
C_ID_BYTES = 16
C_TEXT_ENDS = 17
C_TEXT_BYTES = 18
C_END = 19
C_ACCOUNT_ENCODING = 20  # eight encodings, in column order
C_METRIC_ENCODING = 21
C_VALUE_ENCODING = 22
C_TIME_ENCODING = 23
C_OPERATION_ENCODING = 24
C_PROPERTIES_ENCODING = 25
C_ID_ENCODING = 26
C_TEXT_ENCODING = 27
COLUMNS = 28

OK = 0
BAD_MAGIC = 1
BAD_LENGTH = 2
BAD_COUNT = 3
BAD_ENCODING = 4
BAD_METRIC_TABLE = 5
BAD_PROPERTY_TABLE = 6
BAD_METRIC_INDEX = 7
BAD_PROPERTY_INDEX = 8
BAD_ID = 9
BAD_TEXT = 10
BAD_CHUNK_TABLE = 11

_SENTENCES = {
    BAD_MAGIC: "it does not begin with the expected magic number",
    BAD_LENGTH: "its length does not match what its header announces",
    BAD_COUNT: "a count in its header is zero or above the limits",
    BAD_ENCODING: "a column has an encoding that it cannot have",
    BAD_METRIC_TABLE: "its metric table is malformed",
    BAD_PROPERTY_TABLE: "its property table is malformed",
    BAD_METRIC_INDEX: "an event names a metric outside the metric table",
    BAD_PROPERTY_INDEX: "an event names a property set outside the property table",
    BAD_ID: "an event id is malformed",
    BAD_TEXT: "a text value is malformed",
    BAD_CHUNK_TABLE: "its chunk table does not add up to its events",
}

_CHUNK_EVENTS_MAX = limits.REQUEST_EVENTS_MAX
_CHUNK_BYTES_MAX = limits.REQUEST_BYTES_MAX
_PAYLOAD_EVENTS_MAX = limits.APPEND_EVENTS_MAX
_PAYLOAD_BYTES_MAX = limits.APPEND_BYTES_MAX
_PAYLOAD_CHUNKS_MAX = limits.APPEND_CHUNKS_MAX
_METRICS_MAX = limits.CHUNK_METRICS_MAX
_METRIC_CODE_BYTES_MAX = limits.METRIC_CODE_BYTES_MAX
_PROPERTIES_BYTES_MAX = limits.PROPERTIES_BYTES_MAX
_KEY_BYTES_MAX = limits.PROPERTY_KEY_BYTES_MAX
_VALUE_BYTES_MAX = limits.PROPERTY_VALUE_BYTES_MAX
_ID_BYTES_MAX = limits.EVENT_ID_BYTES_MAX
_TEXT_BYTES_MAX = limits.VALUE_TEXT_BYTES_MAX
_CHUNK_MAGIC = lay.CHUNK_MAGIC
_PAYLOAD_MAGIC = lay.PAYLOAD_MAGIC
_CHUNK_HEADER_BYTES = lay.CHUNK_HEADER_BYTES
_PAYLOAD_HEADER_BYTES = lay.PAYLOAD_HEADER_BYTES
_CHUNK_ENTRY_BYTES = lay.CHUNK_ENTRY_BYTES
_TIME_ABSENT = lay.TIME_ABSENT

# For each column the largest encoding, and whether each of 0, 1, 2 is allowed (bit mask).
_ALLOWED = np.array([0b110, 0b101, 0b111, 0b111, 0b111, 0b111, 0b101, 0b101], dtype=np.int64)
_WIDTH = np.array([8, 2, 8, 8, 1, 4, 4, 4], dtype=np.int64)


@nb.njit(nogil=True, cache=True, inline="always")
def account_at(data: Any, columns: Any, i: Any) -> Any:
    """The account id (uint64) of event i."""
    if columns[C_ACCOUNT_ENCODING] == 2:
        return load_u64(data, columns[C_ACCOUNT] + 8 * i)
    return load_u64(data, columns[C_ACCOUNT])


@nb.njit(nogil=True, cache=True, inline="always")
def metric_at(data: Any, columns: Any, i: Any) -> Any:
    """The index (int64) of event i's code in the metric table."""
    if columns[C_METRIC_ENCODING] == 2:
        return np.int64(load_u16(data, columns[C_METRIC] + 2 * i))
    return np.int64(0)


@nb.njit(nogil=True, cache=True, inline="always")
def value_at(data: Any, columns: Any, i: Any) -> Any:
    """The value (int64) of event i; for UINT64 uniques the same bits."""
    encoding = columns[C_VALUE_ENCODING]
    if encoding == 2:
        return load_i64(data, columns[C_VALUE] + 8 * i)
    if encoding == 1:
        return load_i64(data, columns[C_VALUE])
    return np.int64(1)


@nb.njit(nogil=True, cache=True, inline="always")
def time_at(data: Any, columns: Any, i: Any) -> Any:
    """The event time (int64 ns) of event i as sent; TIME_ABSENT where it had none."""
    encoding = columns[C_TIME_ENCODING]
    if encoding == 2:
        return load_i64(data, columns[C_TIME] + 8 * i)
    if encoding == 1:
        return load_i64(data, columns[C_TIME])
    return np.int64(_TIME_ABSENT)


@nb.njit(nogil=True, cache=True, inline="always")
def operation_at(data: Any, columns: Any, i: Any) -> Any:
    """The operation byte (int64) of event i; it may be no `OperationType`."""
    encoding = columns[C_OPERATION_ENCODING]
    if encoding == 2:
        return np.int64(load_u8(data, columns[C_OPERATION] + i))
    if encoding == 1:
        return np.int64(load_u8(data, columns[C_OPERATION]))
    return np.int64(0)


@nb.njit(nogil=True, cache=True, inline="always")
def properties_at(data: Any, columns: Any, i: Any) -> Any:
    """0 where event i has no properties, else 1 + the index of its set in the property table (int64)."""
    encoding = columns[C_PROPERTIES_ENCODING]
    if encoding == 2:
        return np.int64(load_u32(data, columns[C_PROPERTIES] + 4 * i))
    if encoding == 1:
        return np.int64(load_u32(data, columns[C_PROPERTIES]))
    return np.int64(0)


@nb.njit(nogil=True, cache=True, inline="always")
def table_start(data: Any, ends: Any, content: Any, k: Any) -> Any:
    """Where entry k of a table begins: `ends` and `content` are the positions of its two parts."""
    if k == 0:
        return np.int64(content)
    return content + np.int64(load_u32(data, ends + 4 * (k - 1)))


@nb.njit(nogil=True, cache=True, inline="always")
def table_end(data: Any, ends: Any, content: Any, k: Any) -> Any:
    """Where entry k of a table ends (exclusive)."""
    return content + np.int64(load_u32(data, ends + 4 * k))


@nb.njit(nogil=True, cache=True)
def _check_ends(data: Any, ends: Any, count: Any, total: Any, least: Any, most: Any) -> bool:
    previous = np.int64(0)
    for k in range(count):
        end = np.int64(load_u32(data, ends + 4 * k))
        if end < previous or end > total:
            return False
        length = end - previous
        if length < least or length > most:
            return False
        previous = end
    return bool(previous == total)


@nb.njit(nogil=True, cache=True)
def _check_codes(data: Any, columns: Any) -> bool:
    position = columns[C_METRIC_BYTES]
    last = columns[C_PROPERTY_ENDS]
    for p in range(position, last):
        c = load_u8(data, p)
        digit = c >= 48 and c <= 58  # 0-9 and :
        upper = c >= 65 and c <= 90
        lower = c >= 97 and c <= 122
        if not (digit or upper or lower or c == 95 or c == 46 or c == 45):
            return False
    return True


@nb.njit(nogil=True, cache=True)
def _key_less(data: Any, a: Any, a_length: Any, b: Any, b_length: Any) -> bool:
    shorter = min(a_length, b_length)
    for i in range(shorter):
        x = load_u8(data, a + i)
        y = load_u8(data, b + i)
        if x != y:
            return bool(x < y)
    return bool(a_length < b_length)


@nb.njit(nogil=True, cache=True)
def _is_utf8(data: Any, start: Any, end: Any) -> bool:
    """Whether `data[start:end]` is UTF-8 as in RFC 3629: no overlong forms, no surrogates, up to U+10FFFF."""
    i = np.int64(start)
    while i < end:
        if i + 8 <= end and load_u64(data, i) & np.uint64(0x8080808080808080) == 0:
            i += 8
            continue
        c = np.int64(load_u8(data, i))
        i += 1
        if c < 0x80:
            continue
        if c < 0xC2 or c > 0xF4:
            return False
        following = 1 if c < 0xE0 else (2 if c < 0xF0 else 3)
        if i + following > end:
            return False
        second = np.int64(load_u8(data, i))
        low = 0xA0 if c == 0xE0 else (0x90 if c == 0xF0 else 0x80)
        high = 0x9F if c == 0xED else (0x8F if c == 0xF4 else 0xBF)
        if second < low or second > high:
            return False
        for k in range(1, following):
            if load_u8(data, i + k) & 0xC0 != 0x80:
                return False
        i += following
    return True


@nb.njit(nogil=True, cache=True)
def _check_property_set(data: Any, start: Any, end: Any) -> bool:
    position = start
    previous = np.int64(-1)
    previous_length = np.int64(0)
    while position < end:
        key_length = np.int64(load_u8(data, position))
        key = position + 1
        if key_length == 0 or key_length > _KEY_BYTES_MAX or key + key_length + 2 > end:
            return False
        value_length = np.int64(load_u16(data, key + key_length))
        position = key + key_length + 2 + value_length
        if value_length > _VALUE_BYTES_MAX or position > end:
            return False
        if not _is_utf8(data, key, key + key_length) or not _is_utf8(data, position - value_length, position):
            return False
        if previous >= 0 and not _key_less(data, previous, previous_length, key, key_length):
            return False
        previous = key
        previous_length = key_length
    return True


@nb.njit(nogil=True, cache=True)
def _is_event_id(data: Any, start: Any, end: Any) -> bool:
    """Whether `data[start:end]` is an id as `identifiers.encode_event_id` writes it, and only so."""
    tag = load_u8(data, start)
    length = end - start - 1
    if length < 1:
        return False
    if tag == 1:
        return bool(_is_utf8(data, start + 1, end))
    if tag == 2:
        return True
    if tag == 3:
        return bool(length == 16)
    if tag != 4:
        return False
    if length == 1:
        return True
    # Two's complement is shortest when its last byte says more than the sign.
    last = load_u8(data, end - 1)
    negative = load_u8(data, end - 2) & 0x80 != 0
    return bool(not (last == 0 and not negative) and not (last == 0xFF and negative))


@nb.njit(nogil=True, cache=True)
def _is_text(data: Any, start: Any, end: Any) -> bool:
    """Whether `data[start:end]` is a text value: tag 1 and UTF-8, or tag 2 and a u64 of at least 2^63."""
    tag = load_u8(data, start)
    if tag == 1:
        return bool(_is_utf8(data, start + 1, end))
    return bool(tag == 2 and end - start == 9 and load_u8(data, end - 1) >= 0x80)


@nb.njit(nogil=True, cache=True)
def _check_event_ids(data: Any, columns: Any) -> bool:
    start = columns[C_ID_BYTES]
    for k in range(columns[C_EVENTS]):
        end = table_end(data, columns[C_ID_ENDS], columns[C_ID_BYTES], k)
        if end > start and not _is_event_id(data, start, end):
            return False
        start = end
    return True


@nb.njit(nogil=True, cache=True)
def _check_texts(data: Any, columns: Any) -> bool:
    start = columns[C_TEXT_BYTES]
    for k in range(columns[C_EVENTS]):
        end = table_end(data, columns[C_TEXT_ENDS], columns[C_TEXT_BYTES], k)
        if end > start and not _is_text(data, start, end):
            return False
        start = end
    return True


@nb.njit(nogil=True, cache=True)
def _place_sections(position: Any, encodings: Any, sizes: Any, columns: Any) -> int:
    """Fill `columns` from a header's numbers. `sizes`: metric, property, id and text bytes."""
    n = columns[C_EVENTS]
    for column in range(8):
        encoding = (encodings >> (4 * column)) & 15
        if encoding > 2 or (_ALLOWED[column] >> encoding) & 1 == 0:
            return BAD_ENCODING
        columns[C_ACCOUNT_ENCODING + column] = encoding
    if columns[C_ID_ENCODING] == 0 and sizes[2] != 0:
        return BAD_LENGTH
    if columns[C_TEXT_ENCODING] == 0 and sizes[3] != 0:
        return BAD_LENGTH
    columns[C_METRIC_ENDS] = position
    position += 4 * columns[C_METRICS]
    columns[C_METRIC_BYTES] = position
    position += sizes[0]
    columns[C_PROPERTY_ENDS] = position
    position += 4 * columns[C_PROPERTY_SETS]
    columns[C_PROPERTY_BYTES] = position
    position += sizes[1]
    for column in range(6):
        columns[C_ACCOUNT + column] = position
        encoding = columns[C_ACCOUNT_ENCODING + column]
        if encoding == 1:
            position += _WIDTH[column]
        elif encoding == 2:
            position += _WIDTH[column] * n
    columns[C_ID_ENDS] = position
    if columns[C_ID_ENCODING] == 2:
        position += 4 * n
    columns[C_ID_BYTES] = position
    position += sizes[2]
    columns[C_TEXT_ENDS] = position
    if columns[C_TEXT_ENCODING] == 2:
        position += 4 * n
    columns[C_TEXT_BYTES] = position
    position += sizes[3]
    columns[C_END] = position
    return OK


@nb.njit(nogil=True, cache=True)
def _check_sections(data: Any, columns: Any, sizes: Any) -> int:
    n = columns[C_EVENTS]
    if not _check_ends(
        data, columns[C_METRIC_ENDS], columns[C_METRICS], sizes[0], 1, _METRIC_CODE_BYTES_MAX
    ) or not _check_codes(data, columns):
        return BAD_METRIC_TABLE
    sets = columns[C_PROPERTY_SETS]
    if not _check_ends(data, columns[C_PROPERTY_ENDS], sets, sizes[1], 1, _PROPERTIES_BYTES_MAX):
        return BAD_PROPERTY_TABLE
    for k in range(sets):
        start = table_start(data, columns[C_PROPERTY_ENDS], columns[C_PROPERTY_BYTES], k)
        end = table_end(data, columns[C_PROPERTY_ENDS], columns[C_PROPERTY_BYTES], k)
        if not _check_property_set(data, start, end):
            return BAD_PROPERTY_TABLE
    if columns[C_METRIC_ENCODING] == 2:
        for i in range(n):
            if metric_at(data, columns, i) >= columns[C_METRICS]:
                return BAD_METRIC_INDEX
    if columns[C_PROPERTIES_ENCODING] != 0:
        for i in range(n if columns[C_PROPERTIES_ENCODING] == 2 else 1):
            if properties_at(data, columns, i) > sets:
                return BAD_PROPERTY_INDEX
    if columns[C_ID_ENCODING] == 2 and (
        not _check_ends(data, columns[C_ID_ENDS], n, sizes[2], 0, _ID_BYTES_MAX)
        or not _check_event_ids(data, columns)
    ):
        return BAD_ID
    if columns[C_TEXT_ENCODING] == 2 and (
        not _check_ends(data, columns[C_TEXT_ENDS], n, sizes[3], 0, _TEXT_BYTES_MAX)
        or not _check_texts(data, columns)
    ):
        return BAD_TEXT
    return OK


@nb.njit(nogil=True, cache=True)
def validate_chunk(data: Any, base: Any, length: Any, columns: Any) -> int:
    """Check the chunk at `data[base:base+length]` and fill `columns`. Returns OK or a BAD_ code.

    The caller has checked the checksum (it covers bytes [8, length) of the chunk).
    """
    if length < _CHUNK_HEADER_BYTES or length > _CHUNK_BYTES_MAX or base < 0 or base + length > data.size:
        return BAD_LENGTH
    if load_u32(data, base) != _CHUNK_MAGIC:
        return BAD_MAGIC
    if np.int64(load_u32(data, base + 8)) != length:
        return BAD_LENGTH
    n = np.int64(load_u32(data, base + 12))
    metrics = np.int64(load_u16(data, base + 46))
    property_sets = np.int64(load_u32(data, base + 52))
    if n < 1 or n > _CHUNK_EVENTS_MAX or metrics < 1 or metrics > _METRICS_MAX or property_sets > n:
        return BAD_COUNT
    columns[C_EVENTS] = n
    columns[C_CHUNKS] = 1
    columns[C_METRICS] = metrics
    columns[C_PROPERTY_SETS] = property_sets
    columns[C_CHUNK_TABLE] = base
    sizes = (
        np.int64(load_u32(data, base + 48)),
        np.int64(load_u32(data, base + 56)),
        np.int64(load_u32(data, base + 60)),
        np.int64(load_u32(data, base + 64)),
    )
    encodings = np.int64(load_u32(data, base + 40))
    status = _place_sections(np.int64(base + _CHUNK_HEADER_BYTES), encodings, sizes, columns)
    if status != OK:
        return status
    if columns[C_END] != base + length:
        return BAD_LENGTH
    return _check_sections(data, columns, sizes)


@nb.njit(nogil=True, cache=True)
def _place_payload(data: Any, base: Any, length: Any, columns: Any) -> int:
    """The part of `validate_payload` that reads the header only; enough once a checksum vouches for the rest."""
    if length < _PAYLOAD_HEADER_BYTES or length > _PAYLOAD_BYTES_MAX or base < 0 or base + length > data.size:
        return BAD_LENGTH
    if load_u32(data, base) != _PAYLOAD_MAGIC:
        return BAD_MAGIC
    if np.int64(load_u32(data, base + 4)) != length:
        return BAD_LENGTH
    n = np.int64(load_u32(data, base + 8))
    chunks = np.int64(load_u32(data, base + 12))
    metrics = np.int64(load_u16(data, base + 20))
    property_sets = np.int64(load_u32(data, base + 28))
    if n < 1 or n > _PAYLOAD_EVENTS_MAX or metrics < 1 or property_sets > n:
        return BAD_COUNT
    if chunks < 1 or chunks > _PAYLOAD_CHUNKS_MAX or chunks > n:
        return BAD_COUNT
    columns[C_EVENTS] = n
    columns[C_CHUNKS] = chunks
    columns[C_METRICS] = metrics
    columns[C_PROPERTY_SETS] = property_sets
    columns[C_CHUNK_TABLE] = base + _PAYLOAD_HEADER_BYTES
    sizes = (
        np.int64(load_u32(data, base + 24)),
        np.int64(load_u32(data, base + 32)),
        np.int64(load_u32(data, base + 36)),
        np.int64(load_u32(data, base + 40)),
    )
    encodings = np.int64(load_u32(data, base + 16))
    start = np.int64(base + _PAYLOAD_HEADER_BYTES + chunks * _CHUNK_ENTRY_BYTES)
    status = _place_sections(start, encodings, sizes, columns)
    if status != OK:
        return status
    if columns[C_END] != base + length:
        return BAD_LENGTH
    return OK


@nb.njit(nogil=True, cache=True)
def place_payload(data: Any, base: Any, length: Any, columns: Any) -> int:
    """Fill `columns` for a payload that was validated before it was written and whose checksum holds."""
    return _place_payload(data, base, length, columns)


@nb.njit(nogil=True, cache=True)
def validate_payload(data: Any, base: Any, length: Any, columns: Any) -> int:
    """Check the payload at `data[base:base+length]` and fill `columns`. Returns OK or a BAD_ code."""
    status = _place_payload(data, base, length, columns)
    if status != OK:
        return status
    total = np.int64(0)
    for c in range(columns[C_CHUNKS]):
        count = np.int64(load_u32(data, columns[C_CHUNK_TABLE] + c * _CHUNK_ENTRY_BYTES + 28))
        if count < 1:
            return BAD_CHUNK_TABLE
        total += count
    if total != columns[C_EVENTS]:
        return BAD_CHUNK_TABLE
    sizes = (
        np.int64(load_u32(data, base + 24)),
        np.int64(load_u32(data, base + 32)),
        np.int64(load_u32(data, base + 36)),
        np.int64(load_u32(data, base + 40)),
    )
    return _check_sections(data, columns, sizes)


def explain(status: int, what: str) -> RemoteProtocolError:
    """The error for a BAD_ status; `what` names the thing refused ("chunk", "payload")."""
    return RemoteProtocolError(f"malformed {what}: {_SENTENCES[status]}")


def metric_codes(data: Bytes, columns: Columns) -> list[str]:
    """The metric table of a validated chunk or payload."""
    count = int(columns[C_METRICS])
    ends = data[columns[C_METRIC_ENDS] : columns[C_METRIC_ENDS] + 4 * count].view("<u4").tolist()
    text = data[columns[C_METRIC_BYTES] : columns[C_METRIC_BYTES] + ends[-1]].tobytes().decode("ascii")
    return [text[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True)]
