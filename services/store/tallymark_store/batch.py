"""The body of an event-batch record: what the leader adds to a gateway's payload.

The fields every record has (partition, epoch, base offset, count, append time, ...) are in the log's record
header. The body of an event batch is, little-endian::

    0   u32 payload checksum (CRC-32C, the gateway's)
    4   u32 event count, n
    8   u32 verdict_bytes: n, or 0 when every event is accepted
    12  u32 original_count
    16  verdicts   u8[verdict_bytes], an `errors.Reason` per event
        originals  i64[original_count]: for each DUPLICATE and CONFLICT, in order, the first event's offset
        payload    the gateway's bytes, to the end

Verdicts are written once by the leader, at first append, and never judged again.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tallymark_protocol.errors import RemoteProtocolError

PREFIX = struct.Struct("<IIII")
PREFIX_BYTES = 16


_NO_OFFSETS: npt.NDArray[np.int64] = np.zeros(0, dtype=np.int64)
_NO_OFFSETS.setflags(write=False)


class BatchView(NamedTuple):
    """An event batch in a buffer, nothing copied. Positions are absolute in `data`."""

    data: npt.NDArray[np.uint8]
    checksum: int
    event_count: int
    verdicts: npt.NDArray[np.uint8] | None  # None: all accepted
    originals: npt.NDArray[np.int64]
    payload_base: int
    payload_length: int


def encode_prefix(
    checksum: int,
    event_count: int,
    verdicts: npt.NDArray[np.uint8] | None,
    originals: npt.NDArray[np.int64] | None,
) -> bytes:
    """The bytes that stand before the payload."""
    if verdicts is None:
        return PREFIX.pack(checksum, event_count, 0, 0)
    assert len(verdicts) == event_count
    tail = b"" if originals is None else originals.astype("<i8").tobytes()
    head = PREFIX.pack(checksum, event_count, event_count, len(tail) // 8)
    return head + verdicts.tobytes() + tail


def encoded_bytes_max(payload_bytes: int, event_count: int) -> int:
    """How long the body of a batch with such a payload can be, whatever its verdicts."""
    return PREFIX_BYTES + 9 * event_count + payload_bytes


def parse(data: npt.NDArray[np.uint8], base: int, length: int) -> BatchView:
    """Read the body at `data[base:base+length]`.

    Raises:
        RemoteProtocolError: when the lengths do not add up.
    """
    if length < PREFIX_BYTES:
        raise RemoteProtocolError("malformed event batch: it is shorter than its prefix")
    checksum, n, verdict_bytes, original_count = PREFIX.unpack_from(data.data, base)
    start = base + PREFIX_BYTES
    payload_base = start + verdict_bytes + 8 * original_count
    if verdict_bytes not in {0, n} or original_count > verdict_bytes or payload_base > base + length:
        raise RemoteProtocolError("malformed event batch: its verdict column does not add up")
    verdicts = data[start : start + verdict_bytes] if verdict_bytes else None
    originals = _NO_OFFSETS
    if original_count:
        originals = np.frombuffer(data[start + verdict_bytes : payload_base].tobytes(), dtype="<i8")
    return BatchView(data, checksum, n, verdicts, originals, payload_base, base + length - payload_base)
