"""Gateways while partitions change their leaders: nothing is lost or doubled, and nobody waits for a lost store."""

from __future__ import annotations

import asyncio

import pytest

from tallymark_ingest import server as server_module
from tallymark_protocol.errors import BackpressureError, ErrorCode, UnavailableError
from tallymark_protocol.messages import FrameType

from .ingest_cluster import P, account, ingest, new_cluster
from .ingest_helpers import Ev, encode_chunk


@pytest.fixture
async def cluster():
    """A cluster of fake stores; a test that hangs fails."""
    async with asyncio.timeout(60), new_cluster() as made:
        yield made


async def wait_until(condition):
    """Let the loop run until something holds."""
    loop = asyncio.get_running_loop()
    while not condition():
        turn = loop.create_future()
        loop.call_later(0.001, turn.set_result, None)
        await turn


@pytest.mark.parametrize("how", ["hangs", "is killed", "loses its answers", "resigns"])
async def test_a_leader_that_moves_under_load_loses_and_doubles_nothing(cluster, how):
    """Hundreds of chunks are under way when all partitions move: each is stored once, and its receipt says where."""
    await cluster.start()
    old, new = cluster.stores
    await cluster.lead(old, *range(P))
    gateway = await cluster.gateway()
    clients = [await cluster.client(gateway) for _ in range(3)]
    chunks = {k: [Ev(account=a, value=k) for a in range(20, 30)] for k in range(400)}

    def send(numbers):
        return {
            k: asyncio.ensure_future(ingest(clients[k % 3], chunks[k], producer=k % 7, sequence=k))
            for k in numbers
        }

    calls = send(range(100))
    await wait_until(lambda: cluster.events > 0)
    old.is_hung = how == "hangs"
    old.answers = how != "loses its answers"
    if how == "resigns":
        cluster.depose(*range(P))
    calls |= send(range(100, 300))
    if how == "is killed":
        await old.kill()
    await wait_until(lambda: gateway.core.open_requests > 100)
    await cluster.lead(new, *range(P))
    calls |= send(range(300, 400))
    for k, call in calls.items():
        cluster.check(await call, chunks[k])
    assert cluster.events == 400 * 10
    assert new.appends
    # What comes to itself again finds that it leads nothing, and takes nothing.
    old.wake()
    assert cluster.events == 400 * 10
    assert gateway.core.pending_bytes == gateway.core.open_requests == 0


async def test_a_store_that_hangs_holds_no_other_partition(cluster):
    """Calls to the other partitions are answered one after the other; the hung one's are, once it has moved."""
    await cluster.start()
    hung, fine = cluster.stores
    await cluster.lead(hung, 0)
    await cluster.lead(fine, 1, 2, 3)
    # Coalescing would take for ever: a request that waits for a round of the hung store never returns.
    gateway = await cluster.gateway(coalesce_ns_max=10**12, patience_ns=50_000_000)
    client, other = await cluster.client(gateway), await cluster.client(gateway)
    hung.is_hung = True
    stuck = []
    for k in range(40):
        stuck.append(
            asyncio.ensure_future(ingest(other, [Ev(account=account(0, k))], producer=2, sequence=k))
        )
        await wait_until(lambda: len(hung.unread) >= min(len(stuck), 3))
    for k in range(60):
        events = [Ev(account=account(1 + k % 3))]
        cluster.check(await ingest(client, events, sequence=k), events)
    assert not any(call.done() for call in stuck)
    await cluster.lead(fine, 0)
    for k, call in enumerate(stuck):
        cluster.check(await call, [Ev(account=account(0, k))])
    assert cluster.events == 100


async def test_a_partition_without_a_leader_is_waited_for(cluster):
    """Its key is gone for a while; events wait, and go to whoever appears, also before it can be connected to."""
    await cluster.start(stores=1)
    (store,) = cluster.stores
    gateway = await cluster.gateway()
    client = await cluster.client(gateway)
    calls = [
        asyncio.ensure_future(ingest(client, [Ev(account=account(k % P))], sequence=k)) for k in range(100)
    ]
    await wait_until(lambda: gateway.core.open_requests == 100)
    await asyncio.gather(*(asyncio.sleep(0) for _ in range(10)))
    assert cluster.events == 0
    await cluster.lead(store, *range(P))
    for k, call in enumerate(calls):
        cluster.check(await call, [Ev(account=account(k % P))])
    assert cluster.events == 100


async def test_what_cannot_be_written_in_time_says_why(cluster):
    """At the caller's deadline the receipt names the partition and what is wrong with it; it may be sent again."""
    await cluster.start(stores=1)
    (store,) = cluster.stores
    await cluster.lead(store, 1)
    # The gateway's bound is what ends it: the caller waits long enough to hear of it on a slow machine.
    hasty = await cluster.client(await cluster.gateway(request_timeout_ns_max=300_000_000))
    events = [Ev(account=account(0)), Ev(account=account(1))]
    receipt = await ingest(hasty, events)
    assert [run.partition for run in receipt.runs] == [1]
    (failure,) = receipt.failures
    assert (failure.partition, failure.error.retriable) == (0, True)
    assert failure.error.message == "partition 0 did not answer in time: partition 0 has no leader"
    await cluster.lead(store, 0)
    client = await cluster.client(await cluster.gateway())
    cluster.check(await ingest(client, events), events)
    assert cluster.events == 2


async def test_a_directory_that_is_behind_is_corrected(cluster, monkeypatch):
    """The watch says nothing, the store says that it leads no more: the coordinator is asked."""
    monkeypatch.setattr(server_module, "CATCH_UP_S", 0.001)

    class Deaf:
        def __getattr__(self, name):
            return getattr(cluster.coordinator, name)

        async def watch(self, prefix, from_revision=0):
            await asyncio.Event().wait()
            yield []

    await cluster.start()
    old, new = cluster.stores
    await cluster.lead(old, *range(P))
    client = await cluster.client(await cluster.gateway(Deaf()))
    events = [Ev(account=a) for a in range(20)]
    cluster.check(await ingest(client, events), events)
    await cluster.lead(new, *range(P))
    cluster.check(await ingest(client, events, sequence=2), events)
    assert old.refusals
    assert new.appends
    assert cluster.events == 40


async def test_two_gateways_take_the_same_chunk(cluster):
    """A caller that tries another gateway, while the leader moves, has its events stored once."""
    await cluster.start()
    old, new = cluster.stores
    await cluster.lead(old, *range(P))
    clients = [await cluster.client(await cluster.gateway()) for _ in range(2)]
    events = [Ev(account=a) for a in range(20)]
    old.answers = False
    calls = [asyncio.ensure_future(ingest(clients[k % 2], events, sequence=k // 2)) for k in range(100)]
    await wait_until(lambda: cluster.events > 0)
    await cluster.lead(new, *range(P))
    for first, second in zip(calls[::2], calls[1::2], strict=True):
        cluster.check(await first, events)
        assert (await second) == (await first)
    assert cluster.events == 50 * 20


async def test_what_waits_for_a_partition_is_bounded(cluster):
    """Beyond its share callers are told to come again; the other partitions go on, and memory stays in bounds."""
    await cluster.start(stores=1)
    (store,) = cluster.stores
    await cluster.lead(store, 1, 2, 3)
    gateway = await cluster.gateway(pending_bytes_max=1_000_000)
    client, other = await cluster.client(gateway), await cluster.client(gateway)
    lost = [Ev(account=account(0, k % 50), value=k << 40) for k in range(500)]
    calls = [asyncio.ensure_future(ingest(client, lost, producer=2, sequence=k)) for k in range(150)]
    await wait_until(lambda: sum(call.done() for call in calls) >= 50)
    assert gateway.core.pending_bytes <= 1_000_000
    for k in range(20):
        events = [Ev(account=account(2))]
        cluster.check(await ingest(other, events, sequence=k), events)
    await cluster.lead(store, 0)
    stored = 0
    told = set()
    for outcome in await asyncio.gather(*calls, return_exceptions=True):
        if isinstance(outcome, BackpressureError):  # refused before it was looked at
            told.add(outcome.message)
        elif outcome.failures:
            (failure,) = outcome.failures
            assert failure.error.code == ErrorCode.OVERLOADED
            assert failure.error.details["retry_after_ms"] > 0
            told.add(failure.error.message)
        else:
            stored += len(lost)
            cluster.check(outcome, lost)
    assert "partition 0 can't be written to, and too much waits for it: partition 0 has no leader" in told
    assert stored
    assert cluster.events == 20 + stored


async def test_stores_are_connected_to_before_they_lead(cluster):
    """And let go when they are gone."""
    await cluster.start(stores=3)
    gateway = await cluster.gateway()
    await wait_until(lambda: all(len(store.server.connections) == 1 for store in cluster.stores))
    gone = cluster.stores[2]
    await cluster.coordinator.delete(b"nodes/store/" + gone.name.encode())
    await wait_until(lambda: not gone.server.connections)
    assert sorted(gateway._peers.addresses()) == sorted(s.server.address for s in cluster.stores[:2])


async def test_a_connection_that_breaks_is_made_again(cluster):
    """Without anything to send over it."""
    await cluster.start(stores=1)
    (store,) = cluster.stores
    await cluster.gateway()
    await wait_until(lambda: len(store.server.connections) == 1)
    (first,) = store.server.connections
    first.abort_transport()
    await wait_until(lambda: store.server.connections and store.server.connections != [first])


async def test_a_caller_that_goes_away_during_a_failover_changes_nothing(cluster):
    """Its events are stored once by the new leader, and a repeat through another connection gets their places."""
    await cluster.start()
    old, new = cluster.stores
    await cluster.lead(old, *range(P))
    gateway = await cluster.gateway()
    leaver, stayer = await cluster.client(gateway), await cluster.client(gateway)
    old.is_hung = True
    events = [Ev(account=a) for a in range(20)]
    call = leaver.submit(FrameType.INGEST, encode_chunk(events), timeout_s=20.0)
    await wait_until(lambda: old.unread)
    await leaver.close()
    with pytest.raises(UnavailableError):
        await call
    await cluster.lead(new, *range(P))
    cluster.check(await ingest(stayer, events), events)
    assert cluster.events == 20
