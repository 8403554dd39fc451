"""Bounds: the sequence window, chunks under way, closing, forking, and the table of unresolved events."""

import asyncio
import os
import random

import fake_gateway as fake
import pytest
from fake_gateway import FakeGateway, until

from tallymark import (
    AsyncClient,
    Event,
    IngestError,
    InvalidRequestError,
    UnavailableError,
)
from tallymark import _sender as sender_module
from tallymark._sender import SPAN_MAX, Flight, FlightState, Sender
from tallymark._unresolved import SECONDS_MAX, UnresolvedEvents
from tallymark_protocol.chunk import prepare_events


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


def identities(gateway):
    """(producer, sequence) of all chunks stored."""
    return {(producer, sequence) for producer, sequence, _ in gateway.cluster.first}


async def test_span_of_unresolved_sequences_is_bounded(client, gateway):
    """While one chunk is unresolved, only so many sequences follow it; the next ones have another identity."""
    gateway.script.append(fake.hold)
    first = asyncio.create_task(client.ingest(Event(1, "m")))
    await until(lambda: gateway.held)
    await asyncio.gather(*[client.ingest(Event(i, "m")) for i in range(SPAN_MAX + 9)])
    gateway.release()
    assert (await first).n_stored == 1
    stored = identities(gateway)
    assert len(stored) == SPAN_MAX + 10
    producers = {producer for producer, _ in stored}
    assert len(producers) == 2
    for producer in producers:
        sequences = [sequence for known, sequence in stored if known == producer]
        assert max(sequences) - min(sequences) < SPAN_MAX


async def test_abandoned_chunk_does_not_block(client, gateway):
    """A chunk whose caller has left is passed by under a new producer id, and can still be resumed."""
    gateway.script.append(fake.silent_after)
    left = Event(1, "m")
    with pytest.raises(UnavailableError):
        await client.ingest(left, timeout=0.02)
    for i in range(SPAN_MAX + 5):
        assert (await client.ingest(Event(i, "m"))).n_stored == 1
    assert len({producer for producer, _ in identities(gateway)}) == 2
    assert (await client.ingest(left)).n_stored == 1
    assert gateway.cluster.n_stored == SPAN_MAX + 6
    assert gateway.cluster.repeats == 1


async def test_chunks_under_way_are_bounded_and_fair(client, gateway, monkeypatch):
    """Beyond the bound callers wait, first come first served."""
    monkeypatch.setattr(sender_module, "FLIGHTS_MAX", 2)
    gateway.default = fake.hold
    calls = [asyncio.create_task(client.ingest(Event(i, "m"))) for i in range(6)]
    order = []
    for number in range(6):
        calls[number].add_done_callback(lambda _, number=number: order.append(number))
    for done in (2, 4, 6):
        await until(lambda: len(gateway.held) == 2)
        gateway.release()
        await until(lambda done=done: len(order) == done)
    assert order == list(range(6))


async def test_bytes_under_way_are_bounded(client, gateway, monkeypatch):
    """A chunk larger than what is left waits, but one alone always goes."""
    monkeypatch.setattr(sender_module, "FLIGHT_BYTES_MAX", 100)
    gateway.default = fake.hold
    calls = [asyncio.create_task(client.ingest([Event(i, "m") for i in range(50)])) for _ in range(2)]
    await until(lambda: gateway.held)
    assert len(gateway.requests) == 1
    gateway.release()
    await until(lambda: gateway.held)
    gateway.release()
    assert [(await call).n_stored for call in calls] == [50, 50]


async def test_cancelled_while_waiting_for_room(client, gateway, monkeypatch):
    """A caller that gives up in the queue leaves no trace, and the next one gets its turn."""
    monkeypatch.setattr(sender_module, "FLIGHTS_MAX", 1)
    gateway.script.append(fake.hold)
    first = asyncio.create_task(client.ingest(Event(1, "m")))
    await until(lambda: gateway.held)
    second = asyncio.create_task(client.ingest(Event(2, "m")))
    third = asyncio.create_task(client.ingest(Event(3, "m")))
    await until(lambda: len(client._sender._admissions) == 2)
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    gateway.release()
    assert (await first).n_stored == (await third).n_stored == 1
    assert gateway.cluster.counted() == [1, 3]


async def test_close_finishes_what_is_under_way(gateway):
    """close() waits for answers that come in time."""
    client = await AsyncClient([gateway.address]).connect()
    gateway.script.append(fake.hold)
    call = asyncio.create_task(client.ingest(Event(1, "m")))
    await until(lambda: gateway.held)
    closing = asyncio.create_task(client.close())
    await asyncio.sleep(0)
    with pytest.raises(UnavailableError, match="closed"):
        await client.ingest(Event(2, "m"))
    gateway.release()
    await closing
    assert (await call).n_stored == 1


async def test_close_does_not_wait_for_ever(gateway):
    """What isn't answered in time is unresolved, and its caller is told."""
    client = await AsyncClient([gateway.address]).connect()
    gateway.script.append(fake.silent)
    call = asyncio.create_task(client.ingest(Event(1, "m")))
    await until(lambda: gateway.requests)
    await client.close(timeout=0.02)
    with pytest.raises(UnavailableError, match="closed") as caught:
        await call
    assert caught.value.receipt.unknown == [0]
    await client.close()


async def test_use_outside_its_life(gateway):
    """Before connecting and after closing, every call says what is wrong."""
    client = AsyncClient(gateway.address)
    with pytest.raises(InvalidRequestError, match="isn't connected"):
        await client.ingest(Event(1, "m"))
    async with client:
        await client.ingest(Event(1, "m"))
    for call in (client.ingest(Event(1, "m")), client.metrics.list(), client.connect()):
        with pytest.raises(UnavailableError, match="closed"):
            await call
    with pytest.raises(InvalidRequestError, match="host:port"):
        await AsyncClient("nowhere").connect()


async def test_nobody_there(gateway):
    """Connecting to nobody fails after the timeout, and can be tried again."""
    await gateway.stop()
    client = AsyncClient(gateway.address)
    with pytest.raises(UnavailableError, match="no gateway could be reached"):
        await client.connect(timeout=0.05)
    await gateway.start(gateway.port)
    await client.connect()
    assert (await client.ingest(Event(1, "m"))).n_stored == 1
    await client.close()


async def test_another_loop(client):
    """A client says so when it is used from a loop that isn't its own."""

    def elsewhere():
        with asyncio.Runner() as runner, pytest.raises(InvalidRequestError, match="another event loop"):
            runner.run(client.ingest(Event(1, "m")))
        return True

    assert await asyncio.to_thread(elsewhere)


async def test_fork_renews_the_identity(client, gateway):
    """A forked child gets a new producer id, and leaves the parent's connection alone."""
    await client.ingest(Event(1, "m"))
    producer = client._sender._producer.producer_id
    unresolved = Event(2, "m")
    gateway.script.append(fake.silent_after)
    with pytest.raises(UnavailableError):
        await client.ingest(unresolved, timeout=0.02)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        # Only what needs no loop: this process has the test runner's in it.
        ok = client._loop is None and client._forked and len(client._unresolved) == 1
        ok = ok and not any(link.usable for link in client._inherited[1]._links)
        os.write(write, b"%d %d" % (ok, client._rng.getrandbits(64)))
        os._exit(0)
    os.waitpid(child, 0)  # noqa: ASYNC222  # the child does nothing but write
    ok, number = os.read(read, 100).split()
    os.close(read)
    os.close(write)
    assert ok == b"1"
    assert int(number) != producer
    assert client._sender._producer.producer_id == producer
    assert (await client.ingest(Event(3, "m"))).n_stored == 1
    assert len(gateway.peers) == 1


async def test_child_connects_anew(client, gateway):
    """What a child does with its copy: a new connection and identity, and unresolved chunks keep theirs."""
    gateway.script.append(fake.silent_after)
    unresolved = Event(2, "m")
    with pytest.raises(UnavailableError):
        await client.ingest(unresolved, timeout=0.02)
    before = client._sender
    client._after_fork()  # as in the child; the parent's part is over here
    assert (await client.ingest(Event(3, "m"))).n_stored == 1
    assert (await client.ingest(unresolved)).n_stored == 1
    assert client._sender is not before
    assert gateway.cluster.counted() == [2, 3]
    assert len({producer for producer, _ in identities(gateway)}) == 2
    before.close()
    for task in [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]:
        if task is not client._gateways._tender:
            task.cancel()


async def test_silent_gateway_is_left(client, gateway, monkeypatch):
    """A connection that gives no sign of life while it owes an answer is given up, and the chunk sent anew."""
    monkeypatch.setattr("tallymark._gateways.SILENCE_MAX", -1.0)
    monkeypatch.setattr("tallymark._gateways.TEND_SECONDS", 0.001)
    client._gateways._tender.cancel()
    client._gateways._tender = asyncio.create_task(client._gateways._tend())
    gateway.script.append(fake.silent_after)
    first = client._gateways.link
    call = asyncio.create_task(client.ingest(Event(1, "m")))
    await until(lambda: not first.usable)
    monkeypatch.setattr("tallymark._gateways.SILENCE_MAX", 15.0)
    assert (await call).n_stored == 1
    assert client._gateways.link is not first
    assert gateway.cluster.counted() == [1]


async def test_a_link_that_was_idle_for_long_is_not_taken_for_silent(client, gateway, monkeypatch):
    """Silence counts from when an answer is owed."""
    monkeypatch.setattr("tallymark._gateways.TEND_SECONDS", 0.001)
    client._gateways._tender.cancel()
    client._gateways._tender = asyncio.create_task(client._gateways._tend())
    gateway.script.append(fake.hold)
    first = client._gateways.link
    first.last_received -= 1_000.0
    call = asyncio.create_task(client.ingest(Event(1, "m")))
    await until(lambda: gateway.held)
    for _ in range(5):
        await asyncio.sleep(0.001)  # the tender looks after its links
    assert first.usable
    gateway.release()
    assert (await call).n_stored == 1
    assert client._gateways.link is first


async def test_slow_gateway_is_not_left(client, gateway, monkeypatch):
    """A gateway that answers pings may take its time."""
    monkeypatch.setattr("tallymark._gateways.SILENCE_PING", -1.0)
    monkeypatch.setattr("tallymark._gateways.TEND_SECONDS", 0.001)
    client._gateways._tender.cancel()
    client._gateways._tender = asyncio.create_task(client._gateways._tend())
    gateway.script.append(fake.hold)
    first = client._gateways.link
    call = asyncio.create_task(client.ingest(Event(1, "m")))
    await until(lambda: gateway.held)
    received = first.last_received
    await until(lambda: first.last_received > received)  # a PONG: nothing else is sent
    gateway.release()
    assert (await call).n_stored == 1
    assert client._gateways.link is first


async def test_topology_is_refreshed(client, gateway, monkeypatch):
    """New query nodes are found without a new connection."""
    monkeypatch.setattr("tallymark._gateways.REFRESH_SECONDS_MIN", 0.0)
    monkeypatch.setattr("tallymark._gateways.TEND_SECONDS", 0.001)
    gateway.refresh_seconds = 0
    client._gateways.topology = gateway.topology()
    gateway.query_addresses = ["127.0.0.1:1"]
    client._gateways._tender.cancel()
    client._gateways._tender = asyncio.create_task(client._gateways._tend())
    await until(lambda: client._gateways.topology.query == ["127.0.0.1:1"])


async def test_parked_chunks_are_freed(client, gateway):
    """The window remembers that a sequence is unresolved, not the chunk."""
    gateway.script.append(fake.error(fake.ErrorCode.INTERNAL, retriable=False))
    with pytest.raises(IngestError):
        await client.ingest_columns("m", account_ids=[1])
    assert list(client._sender._producer.unresolved) == [1]
    assert not client._sender._active


def flights(count):
    """Sent flights of one event each, and their events."""
    loop = asyncio.new_event_loop()
    sender = Sender(loop, random.Random(1))
    loop.close()
    made = []
    for number in range(count):
        event = Event(number, "m")
        flight = Flight(sender, prepare_events([event]).bodies[0], 0)
        flight.state = FlightState.PARKED
        made.append((flight, event))
    return made


def test_table_forgets_the_oldest():
    """The table of unresolved events is bounded in number and in age."""
    table = UnresolvedEvents(flights_max=2)
    made = flights(3)
    for now, (flight, event) in enumerate(made):
        table.add(flight, {0: event}, float(now))
    assert len(table) == 2
    assert table.claim(made[0][1]) is None
    assert table.claim(made[1][1]) == (made[1][0], 0)
    assert table.claim(made[1][1]) is None
    table.expire(2 + SECONDS_MAX - 1)
    assert len(table) == 1
    table.expire(2 + SECONDS_MAX)
    assert len(table) == 0
    assert table.claim(made[2][1]) is None


def test_table_knows_objects_not_equals():
    """An equal event is another event."""
    table = UnresolvedEvents()
    flight, event = flights(1)[0]
    table.add(flight, {0: event}, 0.0)
    assert table.claim(Event(0, "m")) is None
    assert table.claim(event) == (flight, 0)


def test_table_is_bounded_in_bytes():
    """Large chunks are forgotten earlier, but never the one just added."""
    table = UnresolvedEvents(bytes_max=1)
    made = flights(2)
    for flight, event in made:
        table.add(flight, {0: event}, 0.0)
    assert len(table) == 1
    assert table.claim(made[1][1]) is not None
