"""Frames: the header, and how large a body of each type may be.

Every frame is a header of 16 bytes, little-endian, followed by its body::

    0   u32  length of the body         8   u32  request id, 0 where there is none
    4   u8   type (`FrameType`)         12  u32  timeout_ms: how long the sender will wait; 0 = it didn't say
    5   u8   flags, 0 (none is defined)
    6   u16  0

Types from 16 on come in pairs: an even number asks, the odd number after it answers. So a peer knows what to do
with a type of a later version: it answers a request that it doesn't know with an ERROR, and ignores the rest.
REPLICATE is the one frame that carries data and is never answered: it has no request id.
An answer carries the request id of its request; ids are the client's, 1 to 2^32-1, each used once at a time.

This module owns the layout; what may be sent when is `connection`'s.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

from tallymark_protocol import limits
from tallymark_protocol.messages import FrameType

HEADER: Final = struct.Struct("<IBBHII")
HEADER_BYTES: Final = 16
REQUEST_ID_MAX: Final = 2**32 - 1
TIMEOUT_MS_MAX: Final = 2**32 - 1
FIRST_PAIRED_TYPE: Final = 16

assert HEADER.size == HEADER_BYTES


class Frame(NamedTuple):
    """A frame as received."""

    type: int  # a `FrameType`; never one that this version doesn't know
    flags: int
    request_id: int  # 0 where the frame belongs to no request
    timeout_ms: int  # of requests: how long the sender will wait, 0 = it didn't say
    body: bytes


# Bytes that the body of a frame may have at most, by type. Types of later versions get what a request may have:
# they are read over, not kept.
BODY_BYTES_MAX: Final[tuple[int, ...]] = tuple(
    {
        FrameType.HELLO: limits.HANDSHAKE_BYTES_MAX,
        FrameType.WELCOME: limits.HANDSHAKE_BYTES_MAX,
        FrameType.ERROR: limits.HANDSHAKE_BYTES_MAX,
        FrameType.GOAWAY: 0,
        FrameType.PING: 0,
        FrameType.PONG: 0,
        FrameType.CALL: limits.CALL_BYTES_MAX,
        FrameType.APPEND: limits.APPEND_FRAME_BYTES_MAX,
        FrameType.REPLICATE: limits.REPLICATE_FRAME_BYTES_MAX,
    }.get(number, limits.FRAME_BYTES_MAX)  # type: ignore[call-overload]
    for number in range(256)
)


def type_name(number: int) -> str:
    """The name of a frame type, for messages; `type 77` where this version knows none."""
    try:
        return FrameType(number).name
    except ValueError:
        return f"type {number}"


def is_request(number: int) -> bool:
    """Whether a frame of this type asks for an answer, also for types this version doesn't know."""
    return number >= FIRST_PAIRED_TYPE and number % 2 == 0
