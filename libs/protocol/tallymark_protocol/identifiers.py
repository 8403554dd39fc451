"""Identifiers in their canonical bytes: event ids, unique text values, and an account's partition.

An event id is a tag byte and the content, so that `1`, `"1"` and `b"1"` are three different ids on every client
in every language:

    01  str     UTF-8, as given (no Unicode normalisation: what looks alike may still differ)
    02  bytes   as given
    03  UUID    its 16 bytes, most significant first
    04  int     two's complement, least significant byte first, as few bytes as keep the sign (0 is one byte)

The encoding is one to one: `decode_event_id` refuses what `encode_event_id` wouldn't have written.
"""

from __future__ import annotations

import operator
import uuid

from tallymark_protocol import limits
from tallymark_protocol.errors import InvalidRequestError, RemoteProtocolError
from tallymark_protocol.model import EventId

TAG_STR = 1
TAG_BYTES = 2
TAG_UUID = 3
TAG_INT = 4

_MASK = 2**64 - 1
_CONTENT_BITS_MAX = (limits.EVENT_ID_BYTES_MAX - 1) * 8


def encode_event_id(event_id: EventId) -> bytes:
    """Return an event id's canonical bytes: 2 to `EVENT_ID_BYTES_MAX`, tag included.

    Raises:
        InvalidRequestError: of another type (a bool, too), empty, too long, or text that UTF-8 can't say.
    """
    if isinstance(event_id, str):
        encoded = b"\x01" + _utf8(event_id, "an event id")
    elif isinstance(event_id, bytes):
        encoded = b"\x02" + event_id
    elif isinstance(event_id, uuid.UUID):
        return b"\x03" + event_id.bytes
    else:
        return b"\x04" + _int_bytes(event_id)
    if len(encoded) == 1:
        raise InvalidRequestError("an event id must not be empty: pass None for no id")
    if len(encoded) > limits.EVENT_ID_BYTES_MAX:
        raise InvalidRequestError(
            f"an event id of {len(encoded) - 1} bytes is too long: at most {limits.EVENT_ID_BYTES_MAX - 1}"
        )
    return encoded


def decode_event_id(data: bytes) -> str | bytes | uuid.UUID | int:
    """Return the event id of its canonical bytes.

    Raises:
        RemoteProtocolError: `encode_event_id` makes no such bytes.
    """
    if not 2 <= len(data) <= limits.EVENT_ID_BYTES_MAX:
        raise RemoteProtocolError(f"an event id can't have {len(data)} bytes")
    tag, content = data[0], bytes(data[1:])
    if tag == TAG_STR:
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise RemoteProtocolError("an event id's text isn't UTF-8") from error
    if tag == TAG_BYTES:
        return content
    if tag == TAG_UUID:
        if len(content) != 16:
            raise RemoteProtocolError(f"a UUID can't have {len(content)} bytes")
        return uuid.UUID(bytes=content)
    if tag == TAG_INT:
        number = int.from_bytes(content, "little", signed=True)
        if len(content) != _int_length(number):
            raise RemoteProtocolError("an event id's number isn't in its shortest form")
        return number
    raise RemoteProtocolError(f"event id tag {tag} isn't known")


def encode_text(value: str) -> bytes:
    """Return a COUNT_UNIQUE STRING value's canonical bytes: the tag of text and UTF-8. May be empty.

    Raises:
        InvalidRequestError: not a str, too long, or text that UTF-8 can't say.
    """
    if not isinstance(value, str):
        raise InvalidRequestError(f"a unique string value must be a str, not {type(value).__name__}")
    encoded = b"\x01" + _utf8(value, "a unique string value")
    if len(encoded) > limits.VALUE_TEXT_BYTES_MAX:
        raise InvalidRequestError(
            f"a unique string value of {len(encoded) - 1} bytes is too long: "
            f"at most {limits.VALUE_TEXT_BYTES_MAX - 1}"
        )
    return encoded


def mix64(value: int) -> int:
    """Scramble 64 bits: splitmix64's finaliser, the same as `kernels.intrinsics.mix64`. One to one."""
    z = value & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def partition_of(account_id: int, count: int) -> int:
    """Return the partition, 0 to `count` - 1, that holds all of an account's usage.

    Raises:
        InvalidRequestError: the account id isn't a whole number from 0 to 2^64-1.
    """
    assert count >= 1, "a cluster has at least one partition"
    return mix64(check_account_id(account_id)) % count


def check_account_id(account_id: int) -> int:
    """Return an account id as a plain int, or raise InvalidRequestError if it is none (a bool is none)."""
    try:
        number = -1 if isinstance(account_id, bool) else operator.index(account_id)
    except TypeError:
        number = -1
    if not 0 <= number <= limits.ACCOUNT_ID_MAX:
        # Cut, and by its repr only if that can be had: an int of very many digits can't be printed.
        wide = isinstance(account_id, int) and account_id.bit_length() > 128
        shown = "a larger int" if wide else f"{account_id!r:.60}"
        raise InvalidRequestError(f"account_id must be a whole number from 0 to 2^64-1, not {shown}")
    return number


def _utf8(text: str, what: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidRequestError(
            f"{what} has a lone surrogate at position {error.start}, which UTF-8 can't say"
        ) from None


def _int_length(number: int) -> int:
    """Return the least number of bytes that hold a number and its sign."""
    return (number if number >= 0 else ~number).bit_length() // 8 + 1


def _int_bytes(value: object) -> bytes:
    if isinstance(value, bool):
        raise InvalidRequestError("an event id can't be a bool")
    try:
        number = operator.index(value)  # type: ignore[arg-type]  # anything that isn't one raises
    except TypeError:
        raise InvalidRequestError(
            f"an event id must be a str, bytes, UUID or int, not {type(value).__name__}"
        ) from None
    length = _int_length(number)
    if length * 8 > _CONTENT_BITS_MAX:
        raise InvalidRequestError(
            f"an event id of {length} bytes is too long: at most {_CONTENT_BITS_MAX // 8}"
        )
    return number.to_bytes(length, "little", signed=True)
