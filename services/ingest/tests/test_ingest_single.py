"""Single events split by remembered shapes: the kernel's payloads, byte for byte, or none at all."""

from __future__ import annotations

import random
import struct

import google_crc32c
import pytest

from tallymark_ingest import single
from tallymark_ingest.single import Singles
from tallymark_ingest.split import split
from tallymark_protocol import layout as lay
from tallymark_protocol.chunk import prepare_events, seal
from tallymark_protocol.model import Event
from tallymark_protocol.payload import OK

from .ingest_helpers import Ev, encode_chunk, property_set

P = 7


def by_kernel(body):
    """What the kernel makes of a chunk: (partition, payload), or None where it refuses it."""
    result = split([body], P)
    if result.status != [OK]:
        return None
    (payload,) = result.payloads
    return payload


def check(singles, body):
    """Split both ways and compare; returns whether the shape was known."""
    expected = by_kernel(body)
    found = singles.split(body)
    if found is not None:
        assert expected is not None, "what the kernel refuses is refused"
        assert (found.partition, found.event_count, found.chunks, found.counts) == (
            expected.partition,
            1,
            expected.chunks,
            expected.counts,
        )
        assert found.data == bytes(expected.data)
    elif expected is not None:
        singles.learn(body, expected)
    return found is not None


def random_event(rng):
    return Ev(
        account=rng.choice([0, 1, 2**64 - 1, rng.getrandbits(64)]),
        metric=rng.choice([b"m", b"api_calls", b"x" * 64]),
        value=rng.choice([0, 1, -1, 2**63 - 1, -(2**63), rng.randrange(1000)]),
        time=rng.choice([lay.TIME_ABSENT, 0, rng.getrandbits(62)]),
    )


@pytest.mark.parametrize("seed", range(4))
def test_known_shapes_give_what_the_kernel_gives(seed):
    """Over random events, in all encodings that a chunk of one event can have."""
    rng = random.Random(seed)
    singles = Singles(P)
    known = 0
    for k in range(400):
        body = encode_chunk(
            [random_event(rng)],
            producer=rng.getrandbits(64),
            sequence=k,
            first_sent_ns=rng.getrandbits(62),
            flags=k % 2,
            plain=rng.random() < 0.2,
        )
        known += check(singles, body)
    assert known > 100


def test_the_clients_own_chunks_have_shapes():
    """One event as the SDK encodes it is known from the second on."""
    singles = Singles(P)
    for k in range(4):
        (body,) = prepare_events([Event(account_id=k, metric_code="api_calls", value=k + 5)]).bodies
        chunk = seal(body, producer_id=9, sequence=k, first_sent_ns=1, flags=0)
        assert check(singles, chunk) == (k > 0)


@pytest.mark.parametrize(
    "event",
    [
        Ev(properties=property_set(a="b")),
        Ev(id=b"\x01abc"),
        Ev(operation=1),
        Ev(value=0, text=b"\x01abc"),
    ],
)
def test_other_events_have_none(event):
    """What has more than account, value and time goes to the kernel, always."""
    singles = Singles(P)
    for sequence in range(3):
        assert not check(singles, encode_chunk([event], sequence=sequence))
    assert singles._shapes == {}


def test_several_events_have_none():
    """Nor do chunks of several events."""
    singles = Singles(P)
    for sequence in range(3):
        body = encode_chunk([Ev(), Ev()], sequence=sequence)
        assert singles.split(body) is None
        singles.learn(body, by_kernel(body))
    assert singles._shapes == {}


@pytest.mark.parametrize("seed", range(4))
def test_what_the_kernel_refuses_has_no_shape(seed):
    """A chunk of a known shape with any of its bytes changed, cut or extended is split as the kernel says."""
    rng = random.Random(seed)
    singles = Singles(P)
    body = encode_chunk([Ev(account=5, value=9, time=77)])
    assert not check(singles, body)
    assert check(singles, body)
    for _ in range(600):
        changed = bytearray(body)
        for _ in range(rng.choice([1, 1, 2])):
            changed[rng.randrange(len(changed))] = rng.choice([0, 1, 255, rng.randrange(256)])
        if rng.random() < 0.2:
            changed = changed[: rng.randrange(lay.CHUNK_HEADER_BYTES, len(changed))]
        elif rng.random() < 0.2:
            changed += rng.randbytes(rng.randrange(1, 12))
        changed[4:8] = struct.pack("<I", google_crc32c.value(bytes(changed[8:])))
        check(singles, bytes(changed))


def test_shapes_are_bounded(monkeypatch):
    """Whoever sends ever new metric codes makes them be forgotten, no more."""
    monkeypatch.setattr(single, "SHAPES_MAX", 10)
    singles = Singles(P)
    for k in range(35):
        check(singles, encode_chunk([Ev(metric=b"m%d" % k)]))
        assert len(singles._shapes) <= 10
