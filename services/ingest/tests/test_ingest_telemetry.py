"""What a gateway counts: exactly what was asked of it and what it answered."""

from __future__ import annotations

import random

import pytest

from tallymark_ingest.gateway import Gateway, GatewayConfig
from tallymark_protocol.errors import ErrorCode, Reason, WireError
from tallymark_protocol.identifiers import partition_of
from tallymark_protocol.messages import Appended, ChunkOutcome

from .ingest_helpers import Ev, encode_chunk
from .ingest_leader import Leader

MS = 1_000_000
P = 4
GONE = WireError(int(ErrorCode.CLOSED), True, "the connection was lost")
FULL = WireError(int(ErrorCode.DISK_FULL), True, "no room")


@pytest.fixture
def gateway():
    """A gateway that splits whatever came at each tick."""
    return Gateway(P, GatewayConfig(coalesce_ns_max=0), random.Random(1))


def _account(partition, k=0):
    return [a for a in range(200) if partition_of(a, P) == partition and a not in {13, 66}][k]


def _chunk(*partitions, sequence=1):
    return encode_chunk([Ev(account=_account(partition)) for partition in partitions], sequence=sequence)


def test_chunks_events_and_bytes_are_counted_as_taken(gateway):
    """Each chunk that is taken counts once; the receipt counts its events as stored, with the time it took."""
    bodies = [_chunk(0, 0, 1), _chunk(2, sequence=2)]
    for number, body in enumerate(bodies):
        gateway.ingest("c", number, body, 0, 10 * MS)
    gateway.tick(11 * MS)
    leaders = [Leader(p) for p in range(P)]
    for append in gateway.take_appends():
        gateway.answered(append, leaders[append.partition].append(append.body), 14 * MS)
    counters = gateway.counters
    assert (counters.chunks, counters.events, counters.bytes) == (2, 4, sum(map(len, bodies)))
    assert (counters.receipts, counters.stored) == (2, 4)
    assert (counters.outcomes, counters.failures, counters.refusals) == ({}, {}, {})
    assert (counters.receipt_ns.count, counters.receipt_ns.total) == (2, 8 * MS)
    assert (counters.append_ns.count, counters.append_ns.total) == (3, 9 * MS)


def test_outcomes_are_counted_by_reason(gateway):
    """Duplicates, conflicts and rejections are counted as such, the rest of the receipt as stored."""
    gateway.ingest("c", 1, _chunk(0, 0, 0, 0, 0), 0, 0)
    gateway.tick(0)
    (append,) = gateway.take_appends()
    told = [
        (0, int(Reason.DUPLICATE), 5),
        (1, int(Reason.CONFLICT), 6),
        (3, int(Reason.UNKNOWN_METRIC), -1),
        (4, int(Reason.UNKNOWN_METRIC), -1),
    ]
    gateway.answered(append, Appended([ChunkOutcome(100, told)], 100), 0)
    counters = gateway.counters
    assert counters.stored == 1
    assert counters.outcomes == {Reason.DUPLICATE: 1, Reason.CONFLICT: 1, Reason.UNKNOWN_METRIC: 2}


def test_what_is_unresolved_is_counted_by_code(gateway):
    """Events that a receipt leaves open are neither stored nor rejected; the other partitions' are stored."""
    gateway.ingest("c", 1, _chunk(0, 0, 1), 0, 0)
    gateway.tick(0)
    leaders = [Leader(p) for p in range(P)]
    for append in gateway.take_appends():
        if append.partition == 0:
            gateway.failed(append, FULL, 5 * MS, sent=True)
        else:
            gateway.answered(append, leaders[append.partition].append(append.body), 5 * MS)
    counters = gateway.counters
    assert (counters.receipts, counters.stored) == (1, 1)
    assert counters.failures == {ErrorCode.DISK_FULL: 2}
    assert counters.append_failures == {ErrorCode.DISK_FULL: 1}
    assert counters.append_ns.count == 1


def test_attempts_that_fail_are_counted_and_the_receipt_once(gateway):
    """An append that is sent three times counts two failures and one answer, timed from its last attempt."""
    gateway.ingest("c", 1, _chunk(0), 0, 0)
    gateway.tick(0)
    now = 0
    for _ in range(2):
        (append,) = gateway.take_appends()
        gateway.failed(append, GONE, now, sent=True)
        now = gateway.next_deadline()
        gateway.tick(now)
    (append,) = gateway.take_appends()
    gateway.answered(append, Leader(0).append(append.body), now + MS)
    counters = gateway.counters
    assert counters.append_failures == {ErrorCode.CLOSED: 2}
    assert (counters.append_ns.count, counters.append_ns.total) == (1, MS)
    assert (counters.receipts, counters.stored) == (1, 1)
    assert counters.receipt_ns.total == now + MS


def test_refusals_are_counted_and_take_nothing_in(gateway):
    """What is refused at once is no chunk taken: garbage, a bad checksum, too much."""
    body = _chunk(0)
    gateway.ingest("c", 1, b"garbage", 0, 0)
    gateway.ingest("c", 2, body[:-1] + bytes([body[-1] ^ 1]), 0, 0)
    full = Gateway(P, GatewayConfig(pending_bytes_max=10), random.Random(1))
    full.ingest("c", 3, body, 0, 0)
    assert gateway.counters.refusals == {ErrorCode.MALFORMED: 2}
    assert full.counters.refusals == {ErrorCode.OVERLOADED: 1}
    for counters in (gateway.counters, full.counters):
        assert (counters.chunks, counters.events, counters.bytes, counters.receipts) == (0, 0, 0, 0)


def test_an_expired_request_is_counted_as_a_timeout(gateway):
    """One that was split gets a receipt whose events are unresolved; the late answer changes nothing."""
    gateway.ingest("c", 1, _chunk(0, 0), 100, 0)
    gateway.tick(0)
    (append,) = gateway.take_appends()
    gateway.tick(100 * MS)
    counters = gateway.counters
    assert counters.failures == {ErrorCode.TIMEOUT: 2}
    gateway.answered(append, Leader(0).append(append.body), 101 * MS)
    assert (counters.receipts, counters.stored) == (1, 0)
    assert counters.append_ns.count == 1
