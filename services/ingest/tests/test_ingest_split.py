"""The split kernel against a plain-Python reading of the layout."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tallymark_ingest.split import (
    ROUND_BYTES_MAX,
    ROUND_EVENTS_MAX,
    checksum_holds,
    glance,
    split,
)
from tallymark_protocol import layout as lay
from tallymark_protocol import limits, payload
from tallymark_protocol.identifiers import partition_of

from .ingest_helpers import Ev, decode_payload, encode_chunk, property_set


def _check(bodies, chunk_events, result, partition_count, bad=()):
    """Every event of every good chunk is in exactly one payload, where and in which order it must be."""
    seen = {}
    for part in result.payloads:
        data = part.data.tobytes()
        columns = np.zeros(payload.COLUMNS, dtype=np.int64)
        assert payload.validate_payload(part.data.copy(), 0, len(data), columns) == payload.OK
        decoded = decode_payload(data)
        assert part.event_count == len(decoded.events) > 0
        assert len(decoded.entries) == len(part.chunks) == len(part.counts)
        assert part.chunks == sorted(part.chunks)
        assert set(decoded.codes) == {e.metric for e in decoded.events}
        assert len(set(decoded.codes)) == len(decoded.codes)
        assert set(decoded.sets) == {e.properties for e in decoded.events} - {b""}
        assert len(set(decoded.sets)) == len(decoded.sets)
        at = 0
        for entry, chunk, count in zip(decoded.entries, part.chunks, part.counts, strict=True):
            head = lay.CHUNK_HEADER.unpack_from(bodies[chunk])
            assert entry == (head[4], head[5], head[6], head[1], count, head[8])
            indexes = result.indexes(chunk, part.partition).tolist()
            assert len(indexes) == count > 0
            assert indexes == sorted(indexes)
            for index, event in zip(indexes, decoded.events[at : at + count], strict=True):
                assert event == chunk_events[chunk][index]
                assert partition_of(event.account, partition_count) == part.partition
                assert (chunk, index) not in seen
                seen[chunk, index] = True
            at += count
        assert at == len(decoded.events)
        _check_encodings(decoded)
    expected = {(c, i) for c, events in enumerate(chunk_events) if c not in bad for i in range(len(events))}
    assert set(seen) == expected


def _check_encodings(decoded):
    """Columns are no larger than they must be."""
    for column, (name, neutral) in {
        2: ("value", 1),
        3: ("time", lay.TIME_ABSENT),
        4: ("operation", 0),
        5: ("properties", b""),
    }.items():
        values = {getattr(e, name) for e in decoded.events}
        expected = lay.ABSENT if values == {neutral} else lay.CONSTANT if len(values) == 1 else lay.PLAIN
        assert decoded.encodings[column] == expected
    assert decoded.encodings[0] == lay.PLAIN
    assert decoded.encodings[1] == (lay.PLAIN if len({e.metric for e in decoded.events}) > 1 else lay.ABSENT)
    assert decoded.encodings[6] == (lay.PLAIN if any(e.id for e in decoded.events) else lay.ABSENT)
    assert decoded.encodings[7] == (lay.PLAIN if any(e.text for e in decoded.events) else lay.ABSENT)


_event = st.builds(
    Ev,
    account=st.one_of(st.integers(0, 5), st.integers(0, 2**64 - 1)),
    metric=st.sampled_from([b"m", b"api_calls", b"a.b:c-d_E9", b"x" * 64]),
    value=st.one_of(st.just(1), st.integers(-(2**63), 2**63 - 1)),
    time=st.one_of(st.just(lay.TIME_ABSENT), st.integers(0, 2**63 - 1)),
    operation=st.integers(0, 2),
    properties=st.sampled_from([b"", property_set(a="1"), property_set(a="2", b="x" * 300)]),
    id=st.sampled_from([b"", b"\x01a", b"\x01b", b"\x04\x07", b"\x02" + b"z" * 200]),
    text=st.sampled_from([b"", b"\x01", b"\x01hello", b"\x02" + b"\xff" * 8]),
)
_chunk = st.tuples(
    st.lists(_event, min_size=1, max_size=12), st.booleans(), st.booleans(), st.integers(0, 2**64 - 1)
)


@settings(max_examples=100, deadline=None)
@given(st.lists(_chunk, min_size=1, max_size=6), st.sampled_from([1, 2, 3, 4, 12]), st.data())
def test_payloads_hold_exactly_the_chunks_events(chunks, partition_count, data):
    """Union, order, identities, encodings, tables; some chunks are damaged and stay out alone."""
    bodies, bad = [], set()
    for number, (events, plain, dedup_sets, producer) in enumerate(chunks):
        body = encode_chunk(
            events, producer=producer, sequence=number, plain=plain, dedup_sets=dedup_sets, flags=number % 2
        )
        if data.draw(st.integers(0, 4)) == 0:
            body = body[:8] + struct.pack("<I", len(body) + 1) + body[12:]
            bad.add(number)
        bodies.append(body)
    result = split(bodies, partition_count)
    assert [status != payload.OK for status in result.status] == [n in bad for n in range(len(bodies))]
    _check(bodies, [chunk[0] for chunk in chunks], result, partition_count, bad)


def test_all_chunks_malformed_gives_no_payload():
    """A call of nothing but garbage is no error of the call."""
    result = split([b"\x00" * 72, b"\xff" * 100], 4)
    assert result.payloads == []
    assert all(status != payload.OK for status in result.status)


def test_one_event_chunks_with_equal_properties_share_an_entry():
    """Coalescing pays: sixty-four small chunks make one table entry of code and properties."""
    events = [[Ev(account=7, value=5, properties=property_set(region="eu"))] for _ in range(64)]
    bodies = [encode_chunk(e, sequence=k) for k, e in enumerate(events)]
    result = split(bodies, 4)
    (only,) = result.payloads
    decoded = decode_payload(only.data.tobytes())
    assert len(decoded.sets) == len(decoded.codes) == 1
    assert decoded.encodings[2] == decoded.encodings[5] == lay.CONSTANT
    _check(bodies, events, result, 4)


def test_the_split_is_a_function_of_the_chunk():
    """A chunk falls into the same parts whatever it is joined with."""
    mine = [Ev(account=k * 977, value=k) for k in range(50)]
    body = encode_chunk(mine, sequence=9)
    alone = split([body], 4)
    joined = split([encode_chunk([Ev(account=1)]), body, encode_chunk([Ev(account=2, value=9)])], 4)
    for partition in range(4):
        assert alone.indexes(0, partition).tolist() == joined.indexes(1, partition).tolist()


def test_the_largest_chunk_fits_into_an_append():
    """A request at its limits, with the account constant, never outgrows a payload."""
    events = limits.REQUEST_EVENTS_MAX
    text = b"\x01" + b"t" * 120
    ends = np.arange(1, events + 1, dtype="<u4") * len(text)
    body = struct.pack("<I", 1) + b"m" + struct.pack("<Q", 3) + ends.tobytes() + text * events
    encodings = 1 | 2 << 28
    head = lay.CHUNK_HEADER.pack(
        lay.CHUNK_MAGIC,
        0,
        72 + len(body),
        events,
        1,
        1,
        0,
        encodings,
        0,
        1,
        1,
        0,
        0,
        0,
        len(text) * events,
        0,
    )
    chunk = head + body
    assert len(chunk) <= limits.REQUEST_BYTES_MAX
    result = split([chunk], 4)
    assert result.status == [payload.OK]
    (only,) = result.payloads
    assert only.event_count == events
    assert len(only.data) <= limits.APPEND_BYTES_MAX
    columns = np.zeros(payload.COLUMNS, dtype=np.int64)
    assert payload.validate_payload(only.data, 0, len(only.data), columns) == payload.OK


def test_widest_round_fits_into_an_append():
    """The bounds of a round keep its worst payload below the limit."""
    worst = ROUND_EVENTS_MAX * 39 + ROUND_BYTES_MAX + limits.APPEND_CHUNKS_MAX * lay.CHUNK_ENTRY_BYTES
    assert worst < limits.APPEND_BYTES_MAX
    assert limits.APPEND_BYTES_MAX < limits.APPEND_FRAME_BYTES_MAX


def test_many_codes_across_chunks_are_united():
    """Codes of different chunks get one index each, and each partition only those it uses."""
    events = [[Ev(account=k, metric=b"code%d" % ((k * 7 + c) % 40)) for k in range(60)] for c in range(5)]
    bodies = [encode_chunk(e, sequence=k) for k, e in enumerate(events)]
    _check(bodies, events, split(bodies, 3), 3)


@pytest.mark.parametrize("body", [b"", b"x" * 71, b"\x00" * 72])
def test_glance_refuses_what_cannot_be_a_chunk(body):
    """Too short, or without events."""
    assert glance(body) is None


def test_glance_and_checksum_of_a_chunk():
    """The header's sizes, and a checksum that sees every flipped bit, for small and large chunks."""
    for count in (3, 20_000):
        body = encode_chunk([Ev(account=k) for k in range(count)], flags=1)
        assert glance(body) == (count, 1, 1)
        assert checksum_holds(body)
        for position in (4, 8, 40, len(body) - 1):
            assert not checksum_holds(body[:position] + bytes([body[position] ^ 1]) + body[position + 1 :])


def test_the_seed_changes_nothing():
    """It spreads hashes; the payloads are the same bytes whatever it is."""
    events = [
        [Ev(account=k, metric=b"c%d" % (k % 9), properties=property_set(k=str(k % 5))) for k in range(90)]
    ]
    bodies = [encode_chunk(events[0])]
    first = split(bodies, 3)
    for seed in (1, 2**62, 2**63 - 1):
        again = split(bodies, 3, seed)
        assert [p.data.tobytes() for p in again.payloads] == [p.data.tobytes() for p in first.payloads]
