"""Ingest: whatever happens on the way, an event is counted once, and the receipt says so."""

import asyncio
import random

import fake_gateway as fake
import numpy as np
import pytest
from fake_gateway import FakeCluster, FakeGateway, until

from tallymark import (
    AsyncClient,
    BackpressureError,
    DeliveryMode,
    Event,
    IngestError,
    InvalidRequestError,
    OutcomeUnknownError,
    Reason,
    ServerError,
    UnavailableError,
)
from tallymark_protocol import layout as lay
from tallymark_protocol.errors import ErrorCode
from tallymark_protocol.identifiers import partition_of


@pytest.fixture
async def gateway():
    """One gateway of a cluster of four partitions."""
    async with FakeGateway() as running:
        yield running


@pytest.fixture
async def client(gateway):
    """A client connected to it."""
    async with AsyncClient([gateway.address], timeout=5, _rng=random.Random(1)) as connected:
        yield connected


def events(*accounts, **fields):
    """An event for each account."""
    return [Event(account, "m", **fields) for account in accounts]


async def test_stored(client, gateway):
    """A receipt counts and places every event."""
    receipt = await client.ingest(events(*range(20)))
    assert (receipt.n_stored, receipt.n_duplicates, receipt.n_conflicts, receipt.rejected) == (20, 0, 0, [])
    assert receipt.ok
    for account, (partition, offset) in enumerate(receipt.offsets):
        assert partition == partition_of(account, 4)
        assert gateway.cluster.logs[partition][offset] == account
    assert receipt.partitions == sorted({partition_of(account, 4) for account in range(20)})


async def test_single_event_generator_and_nothing(client, gateway):
    """One event, an iterator and an empty list are all taken."""
    assert (await client.ingest(Event(5, "m"))).n_stored == 1
    assert (await client.ingest(Event(i, "m") for i in range(3))).n_stored == 3
    empty = await client.ingest([])
    assert (empty.n_stored, empty.offsets, empty.ok) == (0, [], True)
    assert gateway.cluster.n_stored == 4


async def test_bad_events_do_not_fail_the_rest(client, gateway):
    """What can't be sent and what the leader refuses is rejected with a reason; the rest is stored."""
    gateway.cluster.reject[7] = Reason.UNKNOWN_METRIC
    sent = [Event(1, "m"), Event(2, "m", 1.5), Event(7, "m"), Event(3, "m")]
    receipt = await client.ingest(sent)
    assert receipt.n_stored == 2
    assert not receipt.ok
    assert [(r.index, r.code) for r in receipt.rejected] == [
        (1, Reason.VALUE_NOT_NUMBER),
        (2, Reason.UNKNOWN_METRIC),
    ]
    assert [r.event for r in receipt.rejected] == [sent[1], sent[2]]
    assert "scale()" in receipt.rejected[0].message
    assert receipt.rejected[1].message.startswith("event 2: no metric has this code")
    assert [offset is None for offset in receipt.offsets] == [False, True, True, False]
    only_bad = await client.ingest(Event(-1, "m"))
    assert (only_bad.n_stored, only_bad.n_rejected) == (0, 1)


async def test_a_receipt_prints_what_is_wrong(client):
    """Counts, and the first rejection's sentence."""
    assert repr(await client.ingest(events(1, 2))).startswith("<Receipt n_events=2, n_stored=2, ")
    receipt = await client.ingest([Event(1, "m"), Event(1, "m", 1.5), Event(-1, "m")])
    assert "n_stored=1" in repr(receipt)
    assert "n_rejected=2" in repr(receipt)
    assert receipt.rejected[0].message in repr(receipt)
    assert receipt.rejected[1].message not in repr(receipt)


async def test_duplicates_name_the_original(client, gateway):
    """An id that is known is a duplicate, with where the first event lies."""
    first = await client.ingest(events(1, id="job-1"))
    second = await client.ingest([*events(2), *events(1, id="job-1")])
    assert (second.n_stored, second.n_duplicates) == (1, 1)
    assert second.ok
    original = second.duplicates[0]
    assert (original.index, (original.partition, original.offset)) == (1, first.offsets[0])
    assert second.offsets[1] is None
    assert gateway.cluster.counted() == [1, 2]


async def test_not_events(client):
    """Something else than events is the caller's error."""
    with pytest.raises(InvalidRequestError, match="no Event"):
        await client.ingest([{"account_id": 1}])
    with pytest.raises(InvalidRequestError, match="DeliveryMode"):
        await client.ingest(events(1), delivery="sync")


@pytest.mark.parametrize(
    ("call", "modes", "expected"),
    [
        (None, [None], 0),
        (None, [DeliveryMode.ASYNC], 0),
        (DeliveryMode.SYNC, [DeliveryMode.ASYNC], 0),
        (DeliveryMode.ASYNC, [None, DeliveryMode.ASYNC], lay.FLAG_ASYNC),
        (DeliveryMode.ASYNC, [None, DeliveryMode.SYNC], 0),
    ],
)
async def test_delivery(client, gateway, call, modes, expected):
    """ASYNC only where the call asks for it and no event says SYNC."""
    flags = []

    def note(gateway, peer, frame):
        flags.append(fake.FakeChunk(frame.body).flags)
        gateway.store(gateway, peer, frame)

    gateway.default = note
    await client.ingest([Event(1, "m", delivery_mode=mode) for mode in modes], delivery=call)
    assert flags == [expected]


@pytest.mark.parametrize("loss", [fake.drop_before, fake.drop_after])
async def test_lost_connection_is_retried_under_the_same_identity(client, gateway, loss):
    """A connection lost before or after storing costs nothing and doubles nothing."""
    gateway.script.extend([loss, loss])
    receipt = await client.ingest(events(1, 2, 3))
    assert receipt.n_stored == 3
    assert gateway.cluster.counted() == [1, 2, 3]
    assert len(gateway.requests) == 3


async def test_many_calls_through_a_bad_network(client, gateway):
    """Dropped connections, refusals and lost answers, at random: each event counts once."""
    rng = random.Random(7)
    actions = [
        fake.drop_before,
        fake.drop_after,
        fake.error(ErrorCode.OVERLOADED, retry_after_ms=1),
        fake.error(ErrorCode.PARTITION_UNAVAILABLE),
        fake.fail_partition(0, 1),
        fake.fail_partition(2, not_stored=False, stored=True),
        *[gateway.store] * 12,
    ]

    def anything(gateway, peer, frame):
        rng.choice(actions)(gateway, peer, frame)

    gateway.default = anything
    receipts = await asyncio.gather(
        *[client.ingest(events(*range(n, n + 5)), timeout=30) for n in range(0, 400, 5)]
    )
    assert all(receipt.n_stored == 5 for receipt in receipts)
    assert gateway.cluster.counted() == list(range(400))


@pytest.mark.parametrize("seed", range(3))
async def test_back_off_and_call_again(client, gateway, seed):
    """Callers that give up early, are cancelled, and call again with the same events, by either way: once each."""
    rng = random.Random(seed)
    actions = [
        fake.drop_before,
        fake.drop_after,
        fake.silent,
        fake.silent_after,
        fake.error(ErrorCode.INTERNAL, retriable=False),
        fake.fail_partition(0, 3, code=ErrorCode.PARTITION_DAMAGED, retriable=False),
        fake.fail_partition(1, code=ErrorCode.INTERNAL, retriable=False, not_stored=False, stored=True),
        gateway.store,
        gateway.store,
    ]

    def anything(gateway, peer, frame):
        rng.choice(actions)(gateway, peer, frame)

    gateway.default = anything

    async def caller(number):
        sent = events(*range(number * 10, number * 10 + rng.randrange(1, 10)))
        attempt = client.ingest(sent, timeout=0.03)
        while True:
            try:
                receipt = await attempt
            except IngestError as error:
                timeout = rng.choice([0.0, 0.01, 0.05])
                again = error.retry(timeout) if rng.random() < 0.5 else client.ingest(sent, timeout=timeout)
                attempt = asyncio.create_task(again)
                if rng.random() < 0.2:
                    attempt.cancel()
            except asyncio.CancelledError:
                attempt = client.ingest(sent, timeout=0.05)
            else:
                assert receipt.n_stored == len(sent)
                return sent

    done = await asyncio.gather(*[caller(number) for number in range(40)])
    assert gateway.cluster.counted() == [event.account_id for sent in done for event in sent]


async def test_other_gateway_takes_over():
    """When a gateway is gone, the next one gets the same chunk."""
    cluster = FakeCluster()
    async with FakeGateway(cluster) as one, FakeGateway(cluster) as two:
        addresses = [one.address, two.address]
        async with AsyncClient(addresses, timeout=5, _rng=random.Random(3)) as client:
            await client.ingest(events(1))
            used, other = (one, two) if one.requests else (two, one)
            used.script.append(fake.silent_after)
            call = asyncio.create_task(client.ingest(events(2)))
            await until(lambda: len(used.requests) == 2)
            await used.stop()
            assert (await call).n_stored == 1
            assert len(other.requests) == 1
            assert cluster.counted() == [1, 2]
            await used.start(used.port)


async def test_goaway_moves_on_and_still_answers(client, gateway):
    """A draining gateway answers what it has; new chunks take a new connection."""
    gateway.script.append(fake.hold)
    held = asyncio.create_task(client.ingest(events(1)))
    await until(lambda: gateway.held)
    draining = gateway.peers[0]
    draining.go_away()
    assert (await client.ingest(events(2))).n_stored == 1
    assert len(gateway.peers) == 2
    gateway.release()
    assert (await held).n_stored == 1
    await until(lambda: draining not in gateway.peers)
    assert len(gateway.requests) == 2


async def test_partition_failures_are_resent_until_resolved(client, gateway):
    """Only the failed partition is unresolved: the others answer as before, and all is stored once."""
    gateway.script.extend([fake.fail_partition(0), fake.fail_partition(1, 2), fake.fail_partition(0, 3)])
    receipt = await client.ingest(events(*range(40)))
    assert receipt.n_stored == 40
    assert gateway.cluster.counted() == list(range(40))
    for account, (partition, offset) in enumerate(receipt.offsets):
        assert gateway.cluster.logs[partition][offset] == account


async def test_partial_receipt_and_retry(client, gateway):
    """A partition that fails for good leaves a receipt of the rest; retry() brings it in, once."""
    damaged = fake.fail_partition(0, code=ErrorCode.PARTITION_DAMAGED, retriable=False, not_stored=True)
    gateway.script.append(damaged)
    with pytest.raises(UnavailableError) as caught:
        await client.ingest(events(*range(40)))
    error = caught.value
    assert isinstance(error, IngestError)
    assert not error.retriable
    missing = [account for account in range(40) if partition_of(account, 4) == 0]
    assert error.receipt.not_stored == missing
    assert error.receipt.unknown == []
    assert error.receipt.n_stored == 40 - len(missing)
    receipt = await error.retry(timeout=5)
    assert receipt.n_stored == 40
    assert gateway.cluster.counted() == list(range(40))


async def test_partial_receipt_with_unknown(client, gateway):
    """Where the leader doesn't vouch for it, the partition's events are unknown, not missing."""
    gateway.script.append(
        fake.fail_partition(1, code=ErrorCode.INTERNAL, retriable=False, not_stored=False, stored=True)
    )
    sent = events(*range(40))
    with pytest.raises(ServerError) as caught:
        await client.ingest(sent)
    assert caught.value.receipt.unknown == [a for a in range(40) if partition_of(a, 4) == 1]
    assert (await client.ingest(sent)).n_stored == 40
    assert gateway.cluster.counted() == list(range(40))


async def test_timeout_then_same_events_again(client, gateway):
    """After a timeout the very same events resume their chunk; equal ones would be new."""
    gateway.script.append(fake.silent_after)
    sent = events(1, 2, 3)
    with pytest.raises(UnavailableError) as caught:
        await client.ingest(sent, timeout=0.02)
    assert caught.value.receipt.unknown == [0, 1, 2]
    receipt = await client.ingest(sent)
    assert receipt.n_stored == 3
    assert gateway.cluster.counted() == [1, 2, 3]
    assert (await client.ingest(sent)).n_stored == 3  # settled before: these are new
    assert gateway.cluster.counted() == [1, 1, 2, 2, 3, 3]


async def test_some_known_events_among_new_ones(client, gateway):
    """Unresolved events resume their chunk, wherever they stand; the others get a new one."""
    gateway.script.append(fake.silent_after)
    old = events(1, 2, 3)
    with pytest.raises(UnavailableError):
        await client.ingest(old, timeout=0.02)
    receipt = await client.ingest([Event(10, "m"), old[2], Event(-1, "m"), old[0], Event(11, "m")])
    assert receipt.n_stored == 4
    assert [(r.index, r.message[:8]) for r in receipt.rejected] == [(2, "event 2:")]
    logs = gateway.cluster.logs
    assert [logs[place[0]][place[1]] for place in receipt.offsets if place] == [10, 3, 1, 11]
    assert gateway.cluster.counted() == [1, 2, 3, 10, 11]
    assert (await client.ingest([old[1]])).n_stored == 1
    assert gateway.cluster.counted() == [1, 2, 3, 10, 11]


async def test_a_wrong_call_forgets_nothing(client, gateway):
    """A call that is refused for its arguments leaves unresolved events as they were."""
    gateway.script.append(fake.silent_after)
    sent = events(1)
    with pytest.raises(UnavailableError) as caught:
        await client.ingest(sent, timeout=0.02)
    wrong = (
        client.ingest([*sent, "event"]),
        client.ingest(sent, delivery="sync"),
        client.ingest(sent, timeout=-1),
        caught.value.retry(timeout=-1),
    )
    for call in wrong:
        with pytest.raises(InvalidRequestError):
            await call
    assert (await client.ingest(sent)).n_stored == 1
    assert gateway.cluster.counted() == [1]


async def test_one_object_many_times(client, gateway):
    """An object that stands for several events is resumed as often as it was sent, and no more often."""
    gateway.script.append(fake.silent_after)
    tick = Event(1, "m")
    with pytest.raises(UnavailableError):
        await client.ingest([tick, tick], timeout=0.02)
    receipt = await client.ingest([tick, tick, tick])
    assert receipt.n_stored == 3
    assert len(set(receipt.offsets)) == 3
    assert gateway.cluster.counted() == [1, 1, 1]


async def test_retry_settles_what_passing_again_would(client, gateway):
    """After retry() the same objects stand for new events."""
    gateway.script.append(fake.silent_after)
    sent = events(1)
    with pytest.raises(UnavailableError) as caught:
        await client.ingest(sent, timeout=0.02)
    assert (await caught.value.retry()).n_stored == 1
    assert (await client.ingest(sent)).n_stored == 1
    assert gateway.cluster.counted() == [1, 1]
    assert (await caught.value.retry()).n_stored == 1
    assert gateway.cluster.counted() == [1, 1]


async def test_retry_that_fails_again(client, gateway):
    """retry() raises as the call did, and can be called again."""
    gateway.script.extend([fake.silent, fake.silent])
    with pytest.raises(UnavailableError) as caught:
        await client.ingest(events(1), timeout=0.02)
    with pytest.raises(UnavailableError) as again:
        await caught.value.retry(timeout=0.02)
    assert (await again.value.retry()).n_stored == 1
    assert gateway.cluster.counted() == [1]


async def test_late_answer_settles_a_parked_chunk(client, gateway):
    """An answer that comes after the timeout is taken: asking again needs no request."""
    gateway.script.append(fake.hold)
    sent = events(1)
    with pytest.raises(UnavailableError):
        await client.ingest(sent, timeout=0.02)
    gateway.release()
    await client.ingest(events(2))  # its answer comes after the held one
    assert (await client.ingest(sent)).n_stored == 1
    assert len(gateway.requests) == 2
    assert gateway.cluster.counted() == [1, 2]


async def test_cancelled_call_stays_resolvable(client, gateway):
    """A cancelled call may have been stored: the same events don't count twice."""
    gateway.script.append(fake.silent_after)
    sent = events(1, 2)
    call = asyncio.create_task(client.ingest(sent))
    await until(lambda: gateway.requests)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert (await client.ingest(sent)).n_stored == 2
    assert gateway.cluster.counted() == [1, 2]


@pytest.mark.parametrize("code", [ErrorCode.OVERLOADED, ErrorCode.DISK_FULL])
async def test_backpressure(client, gateway, code):
    """A service that is full is retried until the timeout, then the caller is told to back off."""
    gateway.default = fake.error(code, retry_after_ms=5)
    sent = events(1)
    with pytest.raises(BackpressureError) as caught:
        await client.ingest(sent, timeout=0.3)
    assert caught.value.code == code
    assert len(gateway.requests) > 1
    gateway.default = gateway.store
    assert (await client.ingest(sent)).n_stored == 1
    assert gateway.cluster.counted() == [1]


async def test_last_try_cut_short(client, gateway):
    """A last try that the deadline cuts short doesn't hide that the service refused the ones before it."""
    gateway.script.append(fake.error(ErrorCode.DISK_FULL, retry_after_ms=5))
    gateway.default = fake.just_in_time
    with pytest.raises(BackpressureError) as caught:
        await client.ingest(events(1), timeout=0.3)
    assert caught.value.code == ErrorCode.DISK_FULL
    assert caught.value.receipt.unknown == [0]
    assert len(gateway.requests) > 1


async def test_never_sent_is_not_unknown(gateway):
    """With no gateway to send to, nothing is stored, and the receipt knows it."""
    async with AsyncClient([gateway.address], timeout=5) as client:
        await gateway.stop()
        await until(lambda: client._gateways.link is None)
        with pytest.raises(UnavailableError) as caught:
            await client.ingest(events(1, 2), timeout=0.05)
        assert (caught.value.receipt.not_stored, caught.value.receipt.unknown) == ([0, 1], [])
        await gateway.start(gateway.port)
        assert (await caught.value.retry()).n_stored == 2
    assert gateway.cluster.counted() == [1, 2]


async def test_refused_chunk(client, gateway):
    """A chunk refused whole raises at once, nothing stored."""
    gateway.script.append(fake.error(ErrorCode.MALFORMED, retriable=False))
    with pytest.raises(InvalidRequestError) as caught:
        await client.ingest(events(1))
    assert isinstance(caught.value, IngestError)
    assert len(gateway.requests) == 1


async def test_outcome_unknown_is_final(client, gateway):
    """OUTCOME_UNKNOWN is passed on; the same objects are not sent anew behind the caller's back."""
    gateway.script.append(fake.error(ErrorCode.OUTCOME_UNKNOWN, retriable=False))
    sent = events(1)
    with pytest.raises(OutcomeUnknownError) as caught:
        await client.ingest(sent)
    assert caught.value.receipt.unknown == [0]
    for again in (client.ingest(sent), caught.value.retry(), client.ingest(sent)):
        with pytest.raises(OutcomeUnknownError):
            await again
    assert len(gateway.requests) == 1
    assert (await client.ingest(events(1))).n_stored == 1


async def test_chunk_expires(client, gateway, monkeypatch):
    """A chunk isn't retried for longer than a store remembers it."""
    monkeypatch.setattr("tallymark._sender.RETRY_SECONDS_MAX", 0.03)
    gateway.script.append(fake.silent_after)
    sent = events(1)
    with pytest.raises(UnavailableError) as caught:
        await client.ingest(sent, timeout=0.05)
    for again in (caught.value.retry(), client.ingest(sent)):
        with pytest.raises(OutcomeUnknownError, match="safely"):
            await again
    assert len(gateway.requests) == 1


async def test_unreadable_receipt_is_no_outcome(client, gateway):
    """A receipt that makes no sense leaves the chunk unresolved."""

    def nonsense(gateway, peer, frame):
        gateway.cluster.store(fake.FakeChunk(frame.body))
        peer.answer(fake.FrameType.RECEIPT, b"\xff", frame.request_id)

    gateway.script.append(nonsense)
    sent = events(1)
    with pytest.raises(ServerError) as caught:
        await client.ingest(sent)
    assert caught.value.receipt.unknown == [0]
    assert (await client.ingest(sent)).n_stored == 1
    assert gateway.cluster.counted() == [1]


async def test_receipt_must_be_complete(client, gateway):
    """A receipt that leaves events out is not taken for one that stored them."""

    def short(gateway, peer, frame):
        receipt = gateway.cluster.store(fake.FakeChunk(frame.body))
        less = fake.Receipt(receipt.partition_count, receipt.runs[1:])
        peer.answer(fake.FrameType.RECEIPT, fake.encode(less), frame.request_id)

    gateway.script.append(short)
    sent = events(*range(10))
    with pytest.raises(ServerError, match="of 10 events") as caught:
        await client.ingest(sent)
    assert caught.value.receipt.unknown == list(range(10))
    assert (await client.ingest(sent)).n_stored == 10
    assert gateway.cluster.counted() == list(range(10))


async def test_refusal_is_forgotten_by_the_next_try(client, gateway):
    """A partition that refused once is unknown again as soon as another try is under way."""
    gateway.script.extend([fake.fail_partition(0, 1, 2, 3), fake.silent_after])
    sent = events(1, 2)
    with pytest.raises(UnavailableError) as caught:
        await client.ingest(sent, timeout=0.1)
    await until(lambda: len(gateway.requests) == 2)
    assert (caught.value.receipt.unknown, caught.value.receipt.not_stored) == ([0, 1], [])
    assert (await client.ingest(sent)).n_stored == 2
    assert gateway.cluster.counted() == [1, 2]


async def test_refusal_says_nothing_about_an_earlier_try(client, gateway):
    """A partition that refuses a repeat may have stored the first try, whose answer was lost."""
    refused = fake.fail_partition(0, 1, 2, 3, code=ErrorCode.PARTITION_DAMAGED, retriable=False)
    gateway.script.extend([fake.drop_after, refused])
    with pytest.raises(UnavailableError) as caught:
        await client.ingest(events(1, 2))
    assert (caught.value.receipt.unknown, caught.value.receipt.not_stored) == ([0, 1], [])


async def test_lost_then_nobody_there(client, gateway):
    """A chunk that was sent once is unknown, however often it couldn't be sent since."""
    gateway.script.append(fake.silent_after)
    call = asyncio.create_task(client.ingest(events(1), timeout=0.1))
    await until(lambda: gateway.requests)
    await gateway.stop()
    with pytest.raises(UnavailableError) as caught:
        await call
    assert (caught.value.receipt.unknown, caught.value.receipt.not_stored) == ([0], [])
    await gateway.start(gateway.port)
    assert (await caught.value.retry()).n_stored == 1
    assert gateway.cluster.counted() == [1]


async def test_resumed_by_two_callers(client, gateway):
    """Two callers may wait for one chunk; when one leaves, the other still gets its receipt."""
    gateway.script.extend([fake.silent, fake.hold])
    sent = events(1, 2)
    with pytest.raises(UnavailableError) as caught:
        await client.ingest(sent, timeout=0.02)
    one = asyncio.create_task(client.ingest(sent))
    await until(lambda: gateway.held)
    two = asyncio.create_task(caught.value.retry())
    await asyncio.sleep(0)
    one.cancel()
    with pytest.raises(asyncio.CancelledError):
        await one
    gateway.release()
    assert (await two).n_stored == 2
    assert gateway.cluster.counted() == [1, 2]


async def test_timeouts_that_are_none(client):
    """A timeout must be a number of seconds."""
    for timeout in (-1, float("nan")):
        with pytest.raises(InvalidRequestError, match="timeout"):
            await client.ingest(events(1), timeout=timeout)
    assert (await client.ingest(events(1), timeout=float("inf"))).n_stored == 1


async def test_columns(client, gateway):
    """Columns are stored like events, bad rows reported, large ones split."""
    accounts = np.arange(100_050, dtype=np.int64)
    accounts[3] = -1
    receipt = await client.ingest_columns(
        "m", account_ids=accounts, values=np.ones(100_050, dtype=np.int64), timeout=60.0
    )
    assert receipt.n_stored == 100_049
    assert [(r.index, r.code, r.event) for r in receipt.rejected] == [(3, Reason.INVALID_ACCOUNT, None)]
    assert gateway.cluster.n_stored == 100_049
    partition, offset = receipt.offsets[100_049]
    assert gateway.cluster.logs[partition][offset] == 100_049
    assert len(gateway.requests) == 2


async def test_columns_retry(client, gateway):
    """Columns are resumed by retry()."""
    gateway.script.append(fake.silent_after)
    with pytest.raises(UnavailableError) as caught:
        await client.ingest_columns("m", account_ids=[1, 2], timeout=0.02)
    assert (await caught.value.retry()).n_stored == 2
    assert gateway.cluster.counted() == [1, 2]


async def test_first_sent_is_server_time(client, gateway):
    """Chunks carry the server's time, whatever the client's clock says."""
    await client.ingest(events(1))
    chunk = fake.FakeChunk(next(iter(gateway.cluster.first.values()))[0])
    assert 0 <= chunk.first_sent_ns - fake.NOW_NS < 60 * 10**9


async def test_timeout_travels(client, gateway):
    """The gateway is told how long the caller will wait."""
    await client.ingest(events(1), timeout=2)
    assert 1_000 < gateway.requests[0] <= 2_000
