"""Message bodies to bytes and back: MessagePack, by encoders and decoders that are made once.

Owns the mapping of msgspec's errors: whatever a peer's bytes are, decoding them gives a value of the type asked
for or a `RemoteProtocolError`. What the messages are is `messages`'.
"""

from __future__ import annotations

from typing import Any, Final, TypeVar

import msgspec

from tallymark_protocol.errors import RemoteProtocolError, TallymarkError, WireError, error_from_wire
from tallymark_protocol.messages import Appended, Call, Receipt

T = TypeVar("T")

encode: Final = msgspec.msgpack.Encoder().encode
"""Encode a message (or any value that msgspec knows): `encode(message) -> bytes`."""

_call_decoder: Final[msgspec.msgpack.Decoder[Call]] = msgspec.msgpack.Decoder(Call)
_receipt_decode: Final = msgspec.msgpack.Decoder(Receipt).decode
_appended_decode: Final = msgspec.msgpack.Decoder(Appended).decode
_decoders: dict[Any, Any] = {}

# What msgspec raises on bad input: its own errors and UnicodeDecodeError are ValueErrors, input that is nested
# too deeply is a RecursionError; the others come from values that their target can't hold.
_DECODE_ERRORS: Final = (ValueError, RecursionError, TypeError, OverflowError)


def decode(kind: type[T], body: bytes | bytearray | memoryview) -> T:
    """Decode a body as `kind`.

    Raises:
        RemoteProtocolError: the bytes are no such message.
    """
    decoder = _decoders.get(kind)
    if decoder is None:
        decoder = _decoders[kind] = msgspec.msgpack.Decoder(kind).decode
    try:
        result: T = decoder(body)
    except _DECODE_ERRORS as error:
        raise _malformed(getattr(kind, "__name__", str(kind)), error) from error
    return result


def decode_call(body: bytes) -> Call:
    """Decode the body of a CALL frame: one struct of the union `Call`. Raises RemoteProtocolError."""
    try:
        call: Call = _call_decoder.decode(body)
    except _DECODE_ERRORS as error:
        raise _malformed("call", error) from error
    return call


def decode_receipt(body: bytes) -> Receipt:
    """Decode the body of a RECEIPT frame. Raises RemoteProtocolError."""
    try:
        return _receipt_decode(body)
    except _DECODE_ERRORS as error:
        raise _malformed("receipt", error) from error


def decode_appended(body: bytes) -> Appended:
    """Decode the body of an APPENDED frame. Raises RemoteProtocolError."""
    try:
        return _appended_decode(body)
    except _DECODE_ERRORS as error:
        raise _malformed("appended", error) from error


def decode_error(body: bytes) -> TallymarkError:
    """Make the exception of an ERROR frame's body; the caller raises it. Raises RemoteProtocolError."""
    wire = decode(WireError, body)
    return error_from_wire(wire.code, wire.retriable, wire.message, wire.details)


def _malformed(what: str, error: BaseException) -> RemoteProtocolError:
    return RemoteProtocolError(f"malformed {what}: {error}")
