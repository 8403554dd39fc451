"""Bundles: what goes in comes out, and nothing else is ever let in."""

from __future__ import annotations

import random

import msgspec
import numpy as np
import pytest

from tallymark_protocol import limits
from tallymark_protocol.errors import RemoteProtocolError
from tallymark_store import links
from tallymark_store.links import Outgoing
from tallymark_store.replication.messages import (
    Announce,
    Append,
    Appended,
    Ask,
    Fetched,
    HandOver,
    Offer,
    Piece,
    Promised,
    Record,
)
from tallymark_store.wal import RecordKind, RecordMeta


def record(base: int, payload: bytes, *, kind: int = RecordKind.EVENTS, partition: int = 2) -> Record:
    parts = (payload[: len(payload) // 2], np.frombuffer(payload[len(payload) // 2 :], np.uint8))
    return Record(RecordMeta(partition, kind, 7, base, 3, 1_000, -5, 2**62), parts)


def joined(parts: list[links.BytesLike]) -> bytes:
    return b"".join(bytes(part) for part in parts)


def packed(outgoing: list[Outgoing]) -> list[bytes]:
    return [joined(parts) for parts in links.encode("cluster", "a", "b", outgoing)]


RECORDS = [record(3, b"payload" * 9), record(6, b"", kind=RecordKind.SCHEMA), record(9, b"z")]
MESSAGES = [
    Outgoing(Announce(1, 9, "instance", "copy"), []),
    Outgoing(Append(2, 9, "instance", 7, 3, 3, len(RECORDS)), RECORDS),
    Outgoing(Promised(4, 9, True, 9, "copy", 12, 10, [(3, 7), (9, 12)]), []),
    Outgoing(Fetched(2, 9, 3, 12, 1), RECORDS[:1]),
    Outgoing(Appended(2, 9, "copy", 12, 11), []),
    Outgoing(Offer(2, 9, "i", "copy-40", 40, 7, 1_000, [("a", "a1")], -1, [("state-40", 9, 2**32 - 1)]), []),
    Outgoing(Ask(2, "copy-40", -1, 0), []),
    Outgoing(Piece(2, "copy-40", 0, 512, bytes(range(256)), 7), []),
]


def test_what_goes_in_comes_out() -> None:
    """Messages in order, each with its records, their bytes and all that the log knows of them."""
    (data,) = packed(MESSAGES)
    bundle = links.decode(data)
    assert (bundle.cluster_id, bundle.sender, bundle.receiver) == ("cluster", "a", "b")
    assert [message for message, _ in bundle.messages] == [item.message for item in MESSAGES]
    for (_, records), item in zip(bundle.messages, MESSAGES, strict=True):
        assert [x.meta for x in records] == [x.meta for x in item.records]
        assert [joined(list(x.parts)) for x in records] == [joined(list(x.parts)) for x in item.records]


def test_payloads_are_not_copied() -> None:
    """What is sent are the parts that the log was given; what is received are views of the frame."""
    parts = links.encode("cluster", "a", "b", MESSAGES[1:2])[0]
    assert parts[1] is RECORDS[0].parts[0]
    (_, records) = links.decode(joined(parts)).messages[0]
    assert isinstance(records[0].parts[0], np.ndarray)
    assert not records[0].parts[0].flags.owndata


def test_pieces_of_snapshots_go_out_in_several_bundles() -> None:
    """Their bytes travel in the head, which has its own bound."""
    outgoing = [Outgoing(Piece(2, "x", 0, 524_288 * k, bytes(524_288), 7), []) for k in range(32)]
    bundles = packed(outgoing)
    assert 8 <= len(bundles) <= 16
    found = [message for data in bundles for message, _ in links.decode(data).messages]
    assert found == [item.message for item in outgoing]


def test_numbers_of_snapshots_that_cannot_be_are_refused() -> None:
    """Negative offsets and positions, like all others."""
    good = Offer(2, 9, "i", "x", 40, 7, 1_000, [("a", "a1")], -1, [("state-40", 9, 1)])
    wrong = [
        msgspec.structs.replace(good, offset=-1),
        msgspec.structs.replace(good, last_epoch=-1),
        msgspec.structs.replace(good, append_ns=-1),
        Ask(2, "x", 0, -1),
        Piece(2, "x", 0, -512, b"", 0),
        Piece(2, "x", 0, 0, b"", -1),
        Promised(4, 9, True, 9, "copy", 12, 10, [], False, -3),
    ]
    for message in wrong:
        (data,) = packed([Outgoing(message, [])])
        with pytest.raises(RemoteProtocolError):
            links.decode(data)


def test_much_goes_out_in_several_bundles() -> None:
    """None of them is larger than need be; the order stays."""
    large = [record(3, bytes(3 * 1024 * 1024)) for _ in range(8)]
    outgoing = [Outgoing(Append(2, 9, "i", 7, k, 3, 1), [large[k]]) for k in range(8)]
    bundles = packed(outgoing)
    assert len(bundles) == 4
    found = [message for data in bundles for message, _ in links.decode(data).messages]
    assert found == [item.message for item in outgoing]
    assert all(len(data) <= links.BUNDLE_BYTES_MAX for data in bundles)


def test_the_largest_record_fits() -> None:
    """Whatever was taken into a log can be sent."""
    from tallymark_store.wal.format import PAYLOAD_BYTES_MAX

    (data,) = packed([Outgoing(Append(2, 9, "i", 7, 3, 3, 1), [record(3, bytes(PAYLOAD_BYTES_MAX))])])
    assert len(data) <= limits.REPLICATE_FRAME_BYTES_MAX
    assert len(links.decode(data).messages[0][1][0].parts[0]) == PAYLOAD_BYTES_MAX


def test_every_flipped_bit_is_found() -> None:
    """In the head as well as in the payloads."""
    (data,) = packed(MESSAGES)
    for position in range(len(data)):
        spoilt = bytearray(data)
        spoilt[position] ^= 1 << (position % 8)
        with pytest.raises(RemoteProtocolError):
            links.decode(bytes(spoilt))


def test_every_cut_is_found() -> None:
    """And so is everything that is appended."""
    (data,) = packed(MESSAGES)
    for length in range(len(data)):
        with pytest.raises(RemoteProtocolError):
            links.decode(data[:length])
    with pytest.raises(RemoteProtocolError):
        links.decode(data + b"\0")


def test_noise_is_refused() -> None:
    """Whatever it is, also under a checksum that fits."""
    rng = random.Random(5)
    for _ in range(300):
        with pytest.raises(RemoteProtocolError):
            links.decode(rng.randbytes(rng.randrange(200)))
        head = rng.randbytes(rng.randrange(1, 60))
        with pytest.raises(RemoteProtocolError):
            links.decode(sealed(head))


def sealed(head: bytes) -> bytes:
    import google_crc32c

    length = len(head).to_bytes(4, "little")
    checksum = google_crc32c.extend(google_crc32c.value(length), head)
    return checksum.to_bytes(4, "little") + length + head


def test_numbers_that_cannot_be_are_refused() -> None:
    """A peer's bytes never reach an assert."""
    wrong = [
        Announce(-1, 9, "i", "c"),
        Announce(limits.PARTITIONS_MAX, 9, "i", "c"),
        Announce(1, -9, "i", "c"),
        Appended(1, 9, "c", -1),
        Promised(1, 9, True, 9, "c", -1, 0, []),
        Promised(1, 9, True, 9, "c", 1, 0, [(-1, 1)]),
        Promised(1, 9, True, 9, "c", 1, 0, [(1, 1)] * 5_000),
        Append(1, 9, "i", 0, 0, 0, 1),
        Append(1, 9, "i", 0, 0, 0, -1),
    ]
    for message in wrong:
        (data,) = packed([Outgoing(message, [])])
        with pytest.raises(RemoteProtocolError):
            links.decode(data)


@pytest.mark.parametrize(
    "changes",
    [
        {"epoch": -1},
        {"base_offset": -1},
        {"count": 0},
        {"kind": int(RecordKind.TRUNCATION)},
        {"kind": int(RecordKind.RESET)},
        {"kind": 200},
        {"append_ns": -1},
        {"base_offset": 2**63 - 2, "count": 3},
    ],
)
def test_records_that_cannot_be_are_refused(changes: dict[str, int]) -> None:
    """The log acts on some kinds by itself: nobody sends these."""
    meta = msgspec.structs.replace(RECORDS[0].meta, **changes)
    (data,) = packed([Outgoing(Append(2, 9, "i", 7, 3, 3, 1), [Record(meta, (b"x",))])])
    with pytest.raises(RemoteProtocolError):
        links.decode(data)


def test_records_belong_to_a_message() -> None:
    """As many as it says."""
    for count in (0, 2):
        (data,) = packed([Outgoing(Append(2, 9, "i", 7, 3, 3, count), RECORDS[:1])])
        with pytest.raises(RemoteProtocolError):
            links.decode(data)
    (data,) = packed([Outgoing(HandOver(2, 9), RECORDS[:1])])
    with pytest.raises(RemoteProtocolError):
        links.decode(data)
