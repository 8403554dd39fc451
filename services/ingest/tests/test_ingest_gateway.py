"""The gateway's core: coalescing, receipts, retries, deadlines, bounds; and a seeded simulation of all of it."""

from __future__ import annotations

import random

import pytest

from tallymark_ingest.gateway import Gateway, GatewayConfig
from tallymark_protocol.codec import decode, decode_receipt
from tallymark_protocol.errors import ErrorCode, Reason, WireError
from tallymark_protocol.identifiers import partition_of
from tallymark_protocol.messages import Appended, ChunkOutcome, FrameType

from .ingest_helpers import Ev, encode_chunk
from .ingest_leader import Leader

MS = 1_000_000
GONE = WireError(int(ErrorCode.CLOSED), True, "the connection was lost")
P = 4


def _gateway(**options):
    return Gateway(P, GatewayConfig(**options), random.Random(1))


def _account(partition, k=0):
    """The k-th account of a partition."""
    found = [a for a in range(200) if partition_of(a, P) == partition and a not in {13, 666 % 200}]
    return found[k]


def _serve(gateway, leaders, appends, now=0):
    for append in appends:
        gateway.answered(append, leaders[append.partition].append(append.body), now)


def _leaders():
    return [Leader(p) for p in range(P)]


def _receipts(gateway):
    out = {}
    for answer in gateway.take_answers():
        assert answer.request_id not in out, "one answer a request"
        kind = decode_receipt if answer.kind == FrameType.RECEIPT else lambda body: decode(WireError, body)
        out[answer.request_id] = kind(answer.body)
    return out


def test_one_request_goes_out_at_the_next_tick():
    """A single caller waits for nobody, and its receipt says where its events are."""
    gateway, leaders = _gateway(), _leaders()
    gateway.ingest("c", 1, encode_chunk([Ev(account=_account(2))]), 0, 0)
    assert gateway.take_appends() == []
    gateway.tick(0)
    (append,) = gateway.take_appends()
    _serve(gateway, leaders, [append])
    receipt = _receipts(gateway)[1]
    assert receipt.partition_count == P
    assert [(r.partition, r.base_offset, r.count) for r in receipt.runs] == [(2, 0, 1)]
    assert receipt.outcomes == receipt.failures == []
    assert gateway.open_requests == gateway.pending_bytes == 0
    assert gateway.next_deadline() is None or not gateway.tick(10**12)


def test_requests_of_one_tick_share_appends():
    """A hundred callers' chunks make one append per partition, in the order they came."""
    gateway, leaders = _gateway(), _leaders()
    for k in range(100):
        gateway.ingest(f"c{k}", k + 1, encode_chunk([Ev(account=k)], producer=k), 0, 0)
    gateway.tick(0)
    appends = gateway.take_appends()
    assert sorted(a.partition for a in appends) == list(range(P))
    _serve(gateway, leaders, appends)
    receipts = _receipts(gateway)
    assert len(receipts) == 100
    for k in range(100):
        (run,) = receipts[k + 1].runs
        assert leaders[run.partition].log[run.base_offset].account == k


def test_requests_wait_while_rounds_are_under_way_but_not_for_long():
    """Beyond the rounds allowed, requests gather until one returns or their time is up."""
    gateway, leaders = _gateway(appends_in_flight_max=2, coalesce_ns_max=2 * MS), _leaders()
    account = _account(1)

    def send(number, now):
        gateway.ingest("c", number, encode_chunk([Ev(account=account)], sequence=number), 0, now)
        gateway.tick(now)
        return gateway.take_appends()

    (first,) = send(1, 0)
    (second,) = send(2, 0)
    assert send(3, 0) == []
    assert send(4, MS) == []
    assert gateway.next_deadline() == 2 * MS
    _serve(gateway, leaders, [first])
    gateway.tick(MS)
    (both,) = gateway.take_appends()
    assert len(both.requests) == 2
    assert send(5, 3 * MS) == []
    gateway.tick(5 * MS)  # its time is up: split, but its partition is busy
    assert gateway.take_appends() == []
    _serve(gateway, leaders, [second])
    (last,) = gateway.take_appends()
    _serve(gateway, leaders, [both, last])
    assert sorted(_receipts(gateway)) == [1, 2, 3, 4, 5]
    assert gateway.pending_bytes == 0


def _lone(gateway, number):
    gateway.ingest("c", number, encode_chunk([Ev(account=_account(1))], sequence=number), 0, 0)
    gateway.tick(0)
    return gateway.take_appends()


def test_a_small_round_goes_out_once_it_carries_as_many_requests_as_are_under_way():
    """Few callers don't wait for each other; beyond that the rounds grow, and there are two of them."""
    gateway, leaders = _gateway(), _leaders()
    (first,) = _lone(gateway, 1)
    (second,) = _lone(gateway, 2)  # one, as under way
    assert _lone(gateway, 3) == []  # there are two rounds
    _serve(gateway, leaders, [first])
    gateway.tick(0)
    (third,) = gateway.take_appends()
    for number in (4, 5, 6):
        assert _lone(gateway, number) == []
    _serve(gateway, leaders, [second])
    gateway.tick(0)
    (three,) = gateway.take_appends()
    assert len(three.requests) == 3
    _serve(gateway, leaders, [third])
    for number in (7, 8):
        assert _lone(gateway, number) == []  # fewer than the three under way
    (also_three,) = _lone(gateway, 9)
    _serve(gateway, leaders, [three, also_three])
    assert sorted(_receipts(gateway)) == list(range(1, 10))
    assert gateway.pending_bytes == 0
    assert (gateway._round_requests, gateway._waiting_events, gateway._waiting_bytes) == (0, 0, 0)


@pytest.mark.parametrize("full", [{"full_round_events": 10}, {"full_round_bytes": 150}])
def test_a_full_round_waits_only_for_as_many_as_may_be_under_way(full):
    """More in one round would save nothing."""
    gateway, leaders = _gateway(**full), _leaders()

    def send(number, events):
        chunk = encode_chunk([Ev(account=_account(1), value=k + 2) for k in range(events)], sequence=number)
        gateway.ingest("c", number, chunk, 0, 0)
        gateway.tick(0)
        return gateway.take_appends()

    sent = [send(number, 10) for number in (1, 2, 3)]
    assert [len(appends) for appends in sent] == [1, 1, 1]
    assert send(4, 10) == []
    _serve(gateway, leaders, sent[0])
    gateway.tick(0)
    (fourth,) = gateway.take_appends()
    _serve(gateway, leaders, [*sent[1], *sent[2], fourth])
    assert sorted(_receipts(gateway)) == [1, 2, 3, 4]


def test_async_and_sync_never_share_an_append():
    """Each kind has payloads of its own, and says so in the header."""
    gateway, leaders = _gateway(), _leaders()
    for k in range(20):
        gateway.ingest("c", k + 1, encode_chunk([Ev(account=k)], sequence=k, flags=k % 2), 0, 0)
    gateway.tick(0)
    appends = gateway.take_appends()
    assert {a.is_async for a in appends} == {True, False}
    _serve(gateway, leaders, appends)  # the leader asserts that flags and header agree
    assert len(_receipts(gateway)) == 20


def test_a_malformed_chunk_is_refused_alone():
    """Bad checksums and bad contents cost their senders only."""
    gateway, leaders = _gateway(), _leaders()
    good = encode_chunk([Ev(account=1)])
    gateway.ingest("c", 1, good, 0, 0)
    gateway.ingest("c", 2, good[:-1] + bytes([good[-1] ^ 1]), 0, 0)
    bad = encode_chunk([Ev(account=1, metric=b"not a code")])
    gateway.ingest("c", 3, bad, 0, 0)
    gateway.ingest("c", 4, b"nonsense", 0, 0)
    gateway.tick(0)
    _serve(gateway, leaders, gateway.take_appends())
    receipts = _receipts(gateway)
    assert receipts[1].runs[0].count == 1
    assert {receipts[k].code for k in (2, 3, 4)} == {ErrorCode.MALFORMED}
    assert not any(receipts[k].retriable for k in (2, 3, 4))
    assert "checksum" in receipts[2].message
    assert "metric table" in receipts[3].message
    assert gateway.pending_bytes == gateway.open_requests == 0


def test_outcomes_carry_the_callers_indexes():
    """Rejected events and duplicates are found again in a chunk that went to every partition."""
    gateway, leaders = _gateway(), _leaders()
    accounts = [5, 666, 13, 7, 666, 8, 13, 9, 10, 13]
    gateway.ingest("c", 1, encode_chunk([Ev(account=a) for a in accounts]), 0, 0)
    gateway.tick(0)
    _serve(gateway, leaders, gateway.take_appends())
    receipt = _receipts(gateway)[1]
    rejected = [(o.index, o.offset) for o in receipt.outcomes if o.reason == Reason.UNKNOWN_METRIC]
    duplicates = [o for o in receipt.outcomes if o.reason == Reason.DUPLICATE]
    assert rejected == [(1, -1), (4, -1)]
    assert [o.index for o in duplicates] == [6, 9]
    assert all(leaders[o.partition].log[o.offset].account == 13 for o in duplicates)
    assert [o.index for o in receipt.outcomes] == sorted(o.index for o in receipt.outcomes)
    assert sum(run.count for run in receipt.runs) == len(accounts)


@pytest.mark.parametrize("reached", [False, True])
def test_a_lost_append_is_sent_again_and_counts_once(reached):
    """Whether or not the leader had it when the connection broke, the events are stored once."""
    gateway, leaders = _gateway(), _leaders()
    account = _account(0)
    gateway.ingest("c", 1, encode_chunk([Ev(account=account)] * 3), 0, 0)
    gateway.tick(0)
    (append,) = gateway.take_appends()
    body = append.body
    if reached:
        leaders[0].append(append.body)
    gateway.failed(append, GONE, 0, sent=True)
    assert gateway.take_appends() == gateway.take_answers() == []
    due = gateway.next_deadline()
    gateway.tick(due)
    (again,) = gateway.take_appends()
    assert again.body == body
    _serve(gateway, leaders, [again])
    receipt = _receipts(gateway)[1]
    assert (receipt.runs[0].base_offset, receipt.runs[0].count) == (0, 3)
    assert len(leaders[0].log) == 3
    assert gateway.pending_bytes == 0


def test_a_new_leader_gets_what_failed_at_once():
    """No backoff is waited out once there is somebody to ask."""
    gateway, leaders = _gateway(), _leaders()
    gateway.ingest("c", 1, encode_chunk([Ev(account=_account(3))]), 0, 0)
    gateway.tick(0)
    (append,) = gateway.take_appends()
    for _ in range(6):
        gateway.failed(append, GONE, 0, sent=True)
        gateway.leader_changed(3, 0)
        gateway.leader_changed(2, 0)
        gateway.leader_changed(99, 0)
        gateway.tick(0)
        assert gateway.take_appends() == [append]
    _serve(gateway, leaders, [append])
    assert len(_receipts(gateway)) == 1
    gateway.tick(10**12)
    assert gateway.take_appends() == []


def test_one_partition_fails_and_the_rest_is_stored():
    """At the deadline the receipt says what is stored and what is open."""
    gateway, leaders = _gateway(), _leaders()
    gateway.ingest("c", 1, encode_chunk([Ev(account=a) for a in range(40)]), 1_000, 0)
    gateway.tick(0)
    appends = gateway.take_appends()
    _serve(gateway, leaders, [a for a in appends if a.partition != 2])
    (stuck,) = (a for a in appends if a.partition == 2)
    assert gateway.take_answers() == []
    assert gateway.next_deadline() == 900 * MS
    gateway.tick(900 * MS)
    receipt = _receipts(gateway)[1]
    assert [run.partition for run in receipt.runs] == [0, 1, 3]
    (failure,) = receipt.failures
    assert (failure.partition, failure.error.code, failure.not_stored) == (2, ErrorCode.TIMEOUT, False)
    assert failure.error.retriable
    assert failure.count + sum(run.count for run in receipt.runs) == 40
    # An answer that comes too late is nobody's; a failure is not retried for nobody.
    gateway.failed(stuck, GONE, 901 * MS, sent=True)
    gateway.tick(10**12)
    assert gateway.take_appends() == gateway.take_answers() == []
    assert gateway.pending_bytes == 0


def test_a_late_answer_changes_nothing():
    """The receipt is out; the answer only frees the append."""
    gateway, leaders = _gateway(), _leaders()
    gateway.ingest("c", 1, encode_chunk([Ev(account=1)]), 100, 0)
    gateway.tick(0)
    appends = gateway.take_appends()
    gateway.tick(90 * MS)
    assert len(_receipts(gateway)) == 1
    _serve(gateway, leaders, appends, 95 * MS)
    assert gateway.take_answers() == []
    assert gateway.pending_bytes == 0


def test_disk_full_is_passed_on_at_once():
    """The caller backs off; nothing is stored, and nothing waits in the gateway."""
    gateway, _ = _gateway(), _leaders()
    full = WireError(int(ErrorCode.DISK_FULL), True, "the log is full")
    gateway.ingest("c", 1, encode_chunk([Ev(account=_account(0))]), 0, 0)
    gateway.tick(0)
    (append,) = gateway.take_appends()
    gateway.failed(append, full, 0, sent=True)
    (failure,) = _receipts(gateway)[1].failures
    assert failure.error == full
    assert failure.not_stored
    assert gateway.pending_bytes == 0


def test_a_refusal_after_a_lost_attempt_does_not_claim_that_nothing_is_stored():
    """The first attempt may be in the log, whatever the second is told."""
    gateway, _ = _gateway(), _leaders()
    gateway.ingest("c", 1, encode_chunk([Ev(account=_account(0))]), 0, 0)
    gateway.tick(0)
    (append,) = gateway.take_appends()
    gateway.failed(append, GONE, 0, sent=True)
    gateway.tick(10**9)
    (append,) = gateway.take_appends()
    gateway.failed(append, WireError(int(ErrorCode.DISK_FULL), True, "full"), 10**9, sent=True)
    (failure,) = _receipts(gateway)[1].failures
    assert not failure.not_stored


def test_chunk_errors_become_failures_of_their_request_only():
    """A reused sequence fails its own request; its neighbours in the append are stored."""
    gateway, leaders = _gateway(), _leaders()
    account = _account(1)
    gateway.ingest("c", 1, encode_chunk([Ev(account=account)], sequence=1), 0, 0)
    gateway.ingest("c", 2, encode_chunk([Ev(account=account, value=9)], sequence=1), 0, 0)
    gateway.ingest("c", 3, encode_chunk([Ev(account=account)], sequence=2), 0, 0)
    gateway.tick(0)
    _serve(gateway, leaders, gateway.take_appends())
    receipts = _receipts(gateway)
    assert receipts[1].runs[0].base_offset == 0
    assert receipts[2].runs == []
    (failure,) = receipts[2].failures
    assert failure.error.code == ErrorCode.SEQUENCE_REUSED
    assert failure.not_stored
    assert receipts[3].runs[0].base_offset == 1


@pytest.mark.parametrize(
    "nonsense",
    [
        Appended(None, -1),
        Appended([]),
        Appended([ChunkOutcome(0), ChunkOutcome(1)]),
        Appended([ChunkOutcome(-1)]),
        Appended([ChunkOutcome(0, [(5, 17, -1)])]),
        Appended([ChunkOutcome(0, [(-1, 17, -1)])]),
        Appended([ChunkOutcome(0, [(1, 17, -1), (0, 17, -1)])]),
        Appended([ChunkOutcome(0, [(0, 0, -1)])]),
    ],
)
def test_nonsense_from_a_leader_is_never_a_receipt(nonsense):
    """An answer that does not fit fails its requests, with their outcome open."""
    gateway = _gateway()
    gateway.ingest("c", 1, encode_chunk([Ev(account=_account(0))] * 2), 0, 0)
    gateway.tick(0)
    (append,) = gateway.take_appends()
    gateway.answered(append, nonsense, 0)
    receipt = _receipts(gateway)[1]
    assert receipt.runs == receipt.outcomes == []
    (failure,) = receipt.failures
    assert (failure.error.code, failure.not_stored, failure.count) == (ErrorCode.INTERNAL, False, 2)


def test_memory_is_bounded_and_refused_requests_are_told_so():
    """Three quarters asks for a pause, the bound itself refuses; all is given back in the end."""
    gateway, leaders = _gateway(pending_bytes_max=64 * 1024), _leaders()
    chunk = encode_chunk([Ev(account=_account(0)) for _ in range(200)], plain=True)
    sent = 0
    while not gateway.is_full:
        sent += 1
        gateway.ingest("c", sent, chunk[:16] + chunk[16:], 0, 0)
    refused = 0
    while not refused:
        sent += 1
        gateway.ingest("c", sent, chunk, 0, 0)
        refused = len(gateway.take_answers())
        assert gateway.pending_bytes <= 64 * 1024
    gateway.tick(0)
    answers = 0
    while appends := gateway.take_appends():
        _serve(gateway, leaders, appends)
    answers = len(_receipts(gateway))
    assert answers == sent - refused
    assert gateway.is_relieved
    assert gateway.pending_bytes == 0


def test_a_partition_without_leader_does_not_take_all_the_room():
    """Its appends pile up to half of the bound; requests of others keep being served."""
    gateway, leaders = _gateway(pending_bytes_max=256 * 1024, appends_in_flight_max=2), _leaders()
    dead, alive = _account(0), _account(1)
    stuck, now, number, told = [], 0, 0, {}
    for _ in range(300):
        number += 1
        now += 3 * MS
        gateway.ingest(
            "c", number, encode_chunk([Ev(account=dead)] * 100, sequence=number, plain=True), 0, now
        )
        number += 1
        gateway.ingest("c", number, encode_chunk([Ev(account=alive)], sequence=number), 0, now)
        gateway.tick(now)
        for append in gateway.take_appends():
            if append.partition == 0:
                stuck.append(append)
                gateway.failed(append, GONE, now, sent=False)
            else:
                _serve(gateway, leaders, [append], now)
        told.update(_receipts(gateway))
        assert not gateway.is_full
    assert gateway.is_relieved
    assert all(told[k].runs for k in range(2, number + 1, 2))
    overloaded = [told[k] for k in range(1, number, 2) if k in told]
    assert overloaded
    assert all(r.failures[0].error.code == ErrorCode.OVERLOADED for r in overloaded)
    gateway.tick(now + 60 * 10**9)
    gateway.take_appends()
    told.update(_receipts(gateway))
    assert len(told) == number


def test_a_partition_that_begins_to_fail_gives_room_back():
    """What had queued up behind a slow leader is cut down once it fails; the rest is sent when it is back."""
    gateway, leaders = (
        _gateway(pending_bytes_max=400_000, appends_in_flight_max=1, coalesce_ns_max=0),
        _leaders(),
    )
    number = 0
    while not gateway.is_full:
        number += 1
        gateway.ingest("c", number, encode_chunk([Ev(account=_account(0))], sequence=number), 0, 0)
        gateway.tick(0)
    (append,) = gateway.take_appends()
    gateway.failed(append, GONE, 0, sent=True)
    assert gateway.is_relieved
    told = _receipts(gateway)
    assert told
    assert max(told) == number  # the newest gave way
    assert all(r.failures[0].error.code == ErrorCode.OVERLOADED for r in told.values())
    gateway.leader_changed(0, 0)
    gateway.tick(0)
    while appends := gateway.take_appends():
        _serve(gateway, leaders, appends)
    told.update(_receipts(gateway))
    assert len(told) == number
    assert len(leaders[0].log) == sum(bool(r.runs) for r in told.values()) > 0
    assert gateway.pending_bytes == 0


def test_deadlines_of_answered_requests_are_forgotten():
    """A gateway that answers in a millisecond does not remember requests for thirty seconds."""
    gateway, leaders = _gateway(), _leaders()
    chunk = encode_chunk([Ev(account=1)])
    gateway.ingest("c", 1_000_000, chunk, 500, 0)
    gateway.tick(0)
    (kept,) = gateway.take_appends()
    for number in range(1, 4_000):
        gateway.ingest("c", number, chunk, 60_000, 0)
        if number % 100 == 0:
            gateway.tick(0)
            _serve(gateway, leaders, gateway.take_appends())
            gateway.take_answers()
            assert len(gateway._deadlines) < 1_500
    assert gateway.next_deadline() <= 450 * MS
    gateway.tick(450 * MS)
    assert 1_000_000 in _receipts(gateway)
    _serve(gateway, leaders, [kept])


def test_an_unsplit_request_expires():
    """One that waited for others until its deadline is told that it was not sent."""
    gateway = _gateway(appends_in_flight_max=1, coalesce_ns_max=10**10)
    gateway.ingest("c", 1, encode_chunk([Ev(account=1)], sequence=1), 0, 0)
    gateway.tick(0)
    assert len(gateway.take_appends()) == 1
    gateway.ingest("c", 2, encode_chunk([Ev(account=1)], sequence=2), 10, 0)
    gateway.tick(0)
    gateway.tick(9 * MS)
    error = _receipts(gateway)[2]
    assert (error.code, error.retriable) == (ErrorCode.TIMEOUT, True)


def test_what_the_old_leader_owes_is_sent_to_the_new_one_in_time():
    """After `recall_ns` from its sending, and not at all while the leader stays the same."""
    gateway, leaders = _gateway(recall_ns=100 * MS), _leaders()
    gateway.ingest("c", 1, encode_chunk([Ev(account=_account(2))]), 0, 0)
    gateway.tick(0)
    (append,) = gateway.take_appends()
    append.target = "old"
    gateway.leader_changed(2, 10 * MS, "old")
    gateway.tick(500 * MS)
    assert gateway.take_appends() == []
    gateway.leader_changed(2, 20 * MS, "new")
    assert gateway.next_deadline() == 100 * MS
    gateway.tick(99 * MS)
    assert gateway.take_appends() == []
    gateway.tick(100 * MS)
    (again,) = gateway.take_appends()
    assert again is append
    assert again.attempts == 2
    # What becomes of the first attempt changes nothing, ...
    gateway.failed(append, GONE, 110 * MS, sent=True, attempt=1)
    gateway.tick(10**10)
    assert gateway.take_appends() == []
    # ... unless it was answered: then nothing more is waited for, and the second answer is passed over.
    appended = leaders[2].append(append.body)
    gateway.answered(append, appended, 120 * MS)
    gateway.answered(append, leaders[2].append(append.body), 130 * MS)
    assert [run.count for run in _receipts(gateway)[1].runs] == [1]
    assert gateway.pending_bytes == 0
    assert gateway.next_deadline() is None or not gateway.tick(10**12)


def test_a_refusal_by_the_new_leader_does_not_say_that_nothing_is_stored():
    """The old one may have stored it."""
    gateway = _gateway(recall_ns=0)
    gateway.ingest("c", 1, encode_chunk([Ev(account=_account(2))]), 0, 0)
    gateway.tick(0)
    (append,) = gateway.take_appends()
    gateway.leader_changed(2, MS, "new")
    gateway.tick(MS)
    assert gateway.take_appends() == [append]
    gateway.failed(append, WireError(int(ErrorCode.DISK_FULL), True, "full"), 2 * MS, sent=True)
    (failure,) = _receipts(gateway)[1].failures
    assert not failure.not_stored


def test_rounds_that_are_out_for_long_hold_nobody():
    """A partition that doesn't answer stops counting after `patience_ns`, and fails after `stall_ns`."""
    gateway, leaders = (
        _gateway(coalesce_ns_max=10**11, full_round_events=1, patience_ns=100 * MS, stall_ns=300 * MS),
        _leaders(),
    )

    def send(number, partition, now):
        chunk = encode_chunk([Ev(account=_account(partition))], sequence=number)
        gateway.ingest("c", number, chunk, 0, now)
        gateway.tick(now)
        return gateway.take_appends()

    for number in (1, 2, 3):
        assert len(send(number, 0, 0)) == 1
    assert send(4, 1, MS) == []
    assert gateway.next_deadline() <= 125 * MS
    for now in range(2, 99):
        gateway.tick(now * MS)
    assert gateway.take_appends() == []
    gateway.tick(130 * MS)
    _serve(gateway, leaders, gateway.take_appends())
    assert sorted(_receipts(gateway)) == [4]
    for number in range(5, 20):
        _serve(
            gateway, leaders, send(number, number % 2, 131 * MS)
        )  # what is for the other waits in its queue
    assert sorted(_receipts(gateway)) == list(range(5, 20, 2))
    assert gateway._failing[0] == 0
    gateway.tick(500 * MS)
    assert gateway._failing[0] == 3


@pytest.mark.parametrize("seed", range(12))
def test_simulation(seed):
    """Random chunks, losses, refusals, delays and resends: one answer a request, no event lost or doubled."""
    rng = random.Random(seed)
    gateway = Gateway(
        P,
        GatewayConfig(
            appends_in_flight_max=rng.choice([1, 3]),
            pending_bytes_max=rng.choice([200_000, 64 << 20]),
            append_timeout_ns=500 * MS,
            recall_ns=rng.choice([0, 5 * MS]),
            patience_ns=rng.choice([MS, 250 * MS]),
            stall_ns=rng.choice([2 * MS, 1_000 * MS]),
        ),
        random.Random(seed),
    )
    leaders = _leaders()
    leading = ["a"] * P  # who leads; both share a log, as if replicated
    sent, answered, in_flight = {}, {}, []
    now, number = 0, 0

    def collect():
        for answer in gateway.take_answers():
            assert answer.request_id in sent
            assert answer.request_id not in answered, "one answer a request"
            answered[answer.request_id] = answer
        for append in gateway.take_appends():
            append.target = leading[append.partition]
            in_flight.append((append, append.attempts))

    def check_receipts():
        for request_id, answer in answered.items():
            body, events, _ = sent[request_id]
            if answer.kind != FrameType.RECEIPT:
                continue
            receipt = decode_receipt(answer.body)
            counts = [[e for e in events if partition_of(e.account, P) == p] for p in range(P)]
            claimed = {run.partition: run for run in receipt.runs}
            failed = {failure.partition: failure for failure in receipt.failures}
            assert not claimed.keys() & failed.keys()
            assert claimed.keys() | failed.keys() == {p for p in range(P) if counts[p]}
            for p, run in claimed.items():
                assert leaders[p].log[run.base_offset : run.base_offset + run.count] == counts[p]
            assert all(failure.count == len(counts[p]) for p, failure in failed.items())
            identity = (body[1], body[2])
            if sum(other[0][1:] == identity for other in sent.values()) > 1:
                continue  # another request with this chunk may have stored it
            for p, failure in failed.items():
                if failure.not_stored:
                    assert identity not in leaders[p].chunks

    steps = 400
    for step in range(steps + 400):
        calm = step >= steps
        now += rng.randrange(0, 3 * MS) if not calm else 20 * MS
        for _ in range(rng.randrange(3) if not calm else 0):
            number += 1
            again = sent and rng.random() < 0.2
            if again:  # a caller's retry of some chunk, on another connection
                (chunk, producer, sequence), events, _ = sent[rng.choice(list(sent))]
            else:
                producer, sequence = number, rng.randrange(2**32)
                events = [
                    Ev(account=rng.randrange(60), value=rng.randrange(5), metric=rng.choice([b"a", b"b"]))
                    for _ in range(rng.choice([1, 1, 5, 40]))
                ]
                flags = int(rng.random() < 0.3)
                chunk = encode_chunk(events, producer=producer, sequence=sequence, flags=flags)
            sent[number] = ((chunk, producer, sequence), events, again)
            timeout_ms = rng.choice([0, 50, 1_000])
            gateway.ingest("c", number, chunk, timeout_ms, now)
        gateway.tick(now)
        collect()
        rng.shuffle(in_flight)
        for _ in range(rng.randrange(len(in_flight) + 1) if not calm else len(in_flight)):
            append, attempt = in_flight.pop()
            leader = leaders[append.partition]
            fate = rng.random() if not calm else 1.0
            if fate < 0.1:
                gateway.failed(append, GONE, now, sent=True, attempt=attempt)
            elif fate < 0.2:
                leader.append(append.body)
                gateway.failed(append, GONE, now, sent=True, attempt=attempt)
            elif fate < 0.25:
                error = WireError(int(ErrorCode.NOT_LEADER), True, "not the leader")
                gateway.failed(append, error, now, sent=True, attempt=attempt)
            elif fate < 0.28:
                error = WireError(int(ErrorCode.DISK_FULL), True, "full")
                gateway.failed(append, error, now, sent=True, attempt=attempt)
            else:
                gateway.answered(append, leader.append(append.body), now)
            if rng.random() < 0.1:
                if rng.random() < 0.5:
                    leading[append.partition] = rng.choice("ab")
                gateway.leader_changed(append.partition, now, leading[append.partition])
        collect()
        if calm and len(answered) == number and not in_flight:
            break
    assert answered.keys() == sent.keys()
    check_receipts()
    assert gateway.open_requests == 0
    while (deadline := gateway.next_deadline()) is not None:
        gateway.tick(max(now, deadline))  # what nobody wants any more is dropped when it is due
        assert gateway.take_appends() == gateway.take_answers() == []
    assert gateway.pending_bytes == 0
