"""What stores say to each other, in bytes: bundles of replicas' messages with the records that travel along.

A bundle holds everything that one store has to say to another at the end of one turn of its loop, for all partitions,
and is the body of one REPLICATE frame. Little-endian::

    0   u32  CRC-32C of everything behind it up to the records' payloads
    4   u32  length of the head
    8        the head: MessagePack of `Envelope` (who speaks to whom, in which cluster, and how it
            stands with its clock and its room; the messages)
        records' payloads, one after another, in the order of the head

Beside each message the head carries its records' metas, `_META.size` bytes each::

    0   i64  epoch               40  i64  highest event time
    8   i64  base offset         48  u32  length of the payload
    16  u32  offsets taken       52  u32  CRC-32C of the payload
    20  u32  kind
    24  i64  append time
    32  i64  lowest event time

Pure: no socket, no clock. Whatever the bytes of a peer are, `decode` gives a bundle that makes sense or raises
`RemoteProtocolError`. `Transport` is the port by which bundles travel: one way, and never surely.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final, NamedTuple, Protocol, get_args

import google_crc32c
import msgspec
import numpy as np

from tallymark_protocol import limits
from tallymark_protocol.errors import RemoteProtocolError
from tallymark_runtime.disk import BytesLike
from tallymark_store.replication.messages import AnyMessage, Offer, Piece, Record
from tallymark_store.wal import RecordKind, RecordMeta
from tallymark_store.wal.format import INTERNAL_KINDS, PAYLOAD_BYTES_MAX, as_crc_input, crc_of_parts

MESSAGES_MAX: Final = 65_536  # in one bundle
BUNDLE_BYTES_MAX: Final = limits.REPLICATE_FRAME_BYTES_MAX
HEAD_BYTES_MAX: Final = 4 * 1024 * 1024
# A bundle is closed when it has reached this: the rest goes into the next, so that no frame holds up others for long.
BUNDLE_BYTES_SOFT: Final = 8 * 1024 * 1024

_PREFIX = struct.Struct("<II")
_META = struct.Struct("<qqIIqqqII")
_MESSAGE_BYTES: Final = 512  # room in the head that is reckoned with for a message, tails included below
_COUNT_MAX: Final = 2**32 - 1

assert PAYLOAD_BYTES_MAX + HEAD_BYTES_MAX <= BUNDLE_BYTES_MAX, "the largest record fits into a bundle"


class Transport(Protocol):
    """How bundles get to other stores. What is sent may be lost, late, doubled, or overtake what was sent before."""

    def send(self, node_id: str, parts: Sequence[BytesLike]) -> bool:
        """Send one bundle, `parts` one after the other; they are not copied, and must not change. Never waits.

        Returns False where it was dropped at once: the peer is not reached, or too much waits for it already.
        """
        ...


class Outgoing(NamedTuple):
    """A message on its way out, with its records."""

    message: AnyMessage
    records: Sequence[Record]


# By identity of a message's records: their metas, the length of their payloads, and the records, to keep the identity.
Packed = dict[int, tuple[bytes, int, Sequence[Record]]]


class Standing(msgspec.Struct, frozen=True, array_like=True):
    """What a store tells of itself in every bundle."""

    wall_ns: int = 0  # its wall time when the bundle was made; 0 = it doesn't say
    is_full: bool = False  # its log has no room


class Envelope(msgspec.Struct, frozen=True, array_like=True):
    """The head of a bundle."""

    cluster_id: str
    sender: str  # node id
    receiver: str  # node id: addresses are reused, names are not
    standing: Standing
    messages: list[tuple[AnyMessage, bytes]]  # each with its records' metas


class Bundle(NamedTuple):
    """A bundle as received."""

    cluster_id: str
    sender: str
    receiver: str
    standing: Standing
    messages: list[tuple[AnyMessage, list[Record]]]


def encode(
    cluster_id: str,
    sender: str,
    receiver: str,
    outgoing: Sequence[Outgoing],
    standing: Standing = Standing(),  # noqa: B008 - it is frozen
    packed: Packed | None = None,
) -> list[list[BytesLike]]:
    """Pack messages into bundles, in order; each bundle is a list of parts that follow each other.

    `packed` is shared by bundles that carry the same records to several stores: these are then packed once.
    """
    if packed is None:
        packed = {}
    bundles: list[list[BytesLike]] = []
    entries: list[tuple[AnyMessage, bytes]] = []
    payloads: list[BytesLike] = []
    head_bytes = body_bytes = 0
    for message, records in outgoing:
        metas = b""
        payload_bytes = 0
        if records:
            known = packed.get(id(records))
            if known is None:
                known = packed[id(records)] = (*_pack(records), records)
            metas, payload_bytes, _ = known
        room = _MESSAGE_BYTES + len(metas) + 32 * len(getattr(message, "tail", ()))
        if isinstance(message, Piece):
            room += len(message.data)
        elif isinstance(message, Offer):
            room += 128 * (len(message.files) + len(message.members))
        if entries and (
            body_bytes + payload_bytes > BUNDLE_BYTES_SOFT
            or head_bytes + room > HEAD_BYTES_MAX // 2
            or len(entries) >= MESSAGES_MAX
        ):
            bundles.append(_close(cluster_id, sender, receiver, standing, entries, payloads))
            entries, payloads, head_bytes, body_bytes = [], [], 0, 0
        entries.append((message, metas))
        for record in records:
            payloads.extend(record.parts)
        head_bytes += room
        body_bytes += payload_bytes
    if entries:
        bundles.append(_close(cluster_id, sender, receiver, standing, entries, payloads))
    return bundles


def _pack(records: Sequence[Record]) -> tuple[bytes, int]:
    """The metas of a message's records, and the length of their payloads."""
    metas = []
    payload_bytes = 0
    for record in records:
        length = sum([len(part) for part in record.parts])
        meta = record.meta
        metas.append(
            _META.pack(
                meta.epoch,
                meta.base_offset,
                meta.count,
                meta.kind,
                meta.append_ns,
                meta.min_time_ns,
                meta.max_time_ns,
                length,
                crc_of_parts(0, record.parts),
            )
        )
        payload_bytes += length
    return b"".join(metas), payload_bytes


_encode_head = msgspec.msgpack.Encoder().encode
_decode_head = msgspec.msgpack.Decoder(Envelope).decode


def _close(
    cluster_id: str,
    sender: str,
    receiver: str,
    standing: Standing,
    entries: list[tuple[AnyMessage, bytes]],
    payloads: list[BytesLike],
) -> list[BytesLike]:
    head = _encode_head(Envelope(cluster_id, sender, receiver, standing, entries))
    length = len(head).to_bytes(4, "little")
    checksum = google_crc32c.extend(google_crc32c.value(length), head)
    return [_PREFIX.pack(checksum, len(head)) + head, *payloads]


def decode(data: bytes) -> Bundle:
    """Read a bundle; payloads are views of `data`.

    Raises:
        RemoteProtocolError: it is none, or something in it makes no sense.
    """
    if len(data) < _PREFIX.size:
        raise RemoteProtocolError("malformed bundle: it is shorter than its prefix")
    checksum, head_length = _PREFIX.unpack_from(data)
    at = _PREFIX.size + head_length
    if head_length > HEAD_BYTES_MAX or at > len(data):
        raise RemoteProtocolError("malformed bundle: its head does not fit")
    view = np.frombuffer(data, dtype=np.uint8)
    if google_crc32c.value(view[4:at]) != checksum:
        raise RemoteProtocolError("malformed bundle: its checksum does not match")
    try:
        envelope = _decode_head(memoryview(data)[_PREFIX.size : at])
    except (ValueError, RecursionError, TypeError, OverflowError) as error:
        raise RemoteProtocolError(f"malformed bundle: {error}") from error
    if len(envelope.messages) > MESSAGES_MAX:
        raise RemoteProtocolError("malformed bundle: it holds too many messages")
    if not 0 <= envelope.standing.wall_ns < 2**63:
        raise RemoteProtocolError(f"malformed bundle: the sender's clock is at {envelope.standing.wall_ns}")
    messages: list[tuple[AnyMessage, list[Record]]] = []
    for message, metas in envelope.messages:
        _check(message, metas)
        records: list[Record] = []
        for fields in _META.iter_unpack(metas):
            record, at = _record(message.partition, fields, view, at)
            records.append(record)
        messages.append((message, records))
    if at != len(data):
        raise RemoteProtocolError("malformed bundle: it is longer than its records")
    return Bundle(envelope.cluster_id, envelope.sender, envelope.receiver, envelope.standing, messages)


def _check(message: AnyMessage, metas: bytes) -> None:
    """Refuse a message whose numbers cannot be any replica's."""
    count, rest = divmod(len(metas), _META.size)
    if rest or count != getattr(message, "record_count", 0):
        raise RemoteProtocolError("malformed bundle: a message's records do not add up")
    if not 0 <= message.partition < limits.PARTITIONS_MAX:
        raise RemoteProtocolError(f"malformed bundle: there is no partition {message.partition}")
    for name in _OFFSETS_OF[type(message)]:
        value = getattr(message, name)
        if not 0 <= value < 2**63:
            raise RemoteProtocolError(f"malformed bundle: {name} is {value}")
    tail = getattr(message, "tail", ())
    if len(tail) > _TAIL_MAX or any(not 0 <= x < 2**63 for pair in tail for x in pair):
        raise RemoteProtocolError("malformed bundle: a tail is too long, or makes no sense")


# Fields of messages that are epochs or offsets, and so from 0 to 2^63-1.
_OFFSETS: Final = (
    "epoch",
    "promised",
    "log_end",
    "high_watermark",
    "base",
    "prev_epoch",
    "match_end",
    "applied",
    "record_count",
    "log_start",
    "offset",
    "last_epoch",
    "append_ns",
    "position",
    "checksum",
)
_OFFSETS_OF: Final = {
    kind: tuple(name for name in _OFFSETS if name in kind.__struct_fields__) for kind in get_args(AnyMessage)
}
_TAIL_MAX: Final = 1_024
_KINDS: Final = frozenset(RecordKind) - INTERNAL_KINDS


def _record(
    partition: int, fields: tuple[int, ...], view: np.ndarray[tuple[int], np.dtype[np.uint8]], at: int
) -> tuple[Record, int]:
    epoch, base, count, kind, append_ns, low_ns, high_ns, length, checksum = fields
    end = at + length
    if length > PAYLOAD_BYTES_MAX or end > len(view):
        raise RemoteProtocolError("malformed bundle: a record is longer than what is left, or than allowed")
    if epoch < 0 or base < 0 or append_ns < 0 or not 0 < count <= _COUNT_MAX or base + count >= 2**63:
        raise RemoteProtocolError("malformed bundle: a record's numbers make no sense")
    if kind not in _KINDS:
        raise RemoteProtocolError(f"malformed bundle: there are no records of kind {kind}")
    payload = view[at:end]
    if google_crc32c.value(as_crc_input(payload)) != checksum:
        raise RemoteProtocolError(f"malformed bundle: the record at offset {base} fails its checksum")
    meta = RecordMeta(partition, kind, epoch, base, count, append_ns, low_ns, high_ns)
    return Record(meta, (payload,)), end
