"""The gateway over real sockets: a fake store behind it, framed clients in front of it."""

from __future__ import annotations

import asyncio
import contextlib
import random

import msgspec
import pytest

from tallymark_ingest import GatewayConfig, ServerConfig, serve
from tallymark_protocol.codec import decode, decode_receipt, encode
from tallymark_protocol.errors import (
    AlreadyExistsError,
    BackpressureError,
    ErrorCode,
    InvalidRequestError,
    NotFoundError,
    UnavailableError,
    WireError,
)
from tallymark_protocol.identifiers import partition_of
from tallymark_protocol.messages import (
    PROTOCOL_VERSION,
    AppendHeader,
    FrameType,
    GetTopology,
    MetricCreate,
    MetricDelete,
    MetricList,
    MetricsResult,
    MetricUpdate,
    StoreStatus,
    Topology,
    Welcome,
)
from tallymark_protocol.model import AggType, AlertThreshold, MetricSchema
from tallymark_runtime.catalog import Leader, Node, leader_key, metric_of, node_key
from tallymark_runtime.clock import RealClock
from tallymark_runtime.coordinator import MemoryCoordinator
from tallymark_runtime.peer import PeerClient
from tallymark_runtime.transport import FrameServer, HandlerBase

from .ingest_helpers import Ev, encode_chunk
from .ingest_leader import Leader as FakeLeader

P = 4


async def wait_until(condition):
    """Let the loop run until something holds; the test's own timeout bounds it."""
    loop = asyncio.get_running_loop()
    while not condition():
        turn = loop.create_future()
        loop.call_soon(turn.set_result, None)
        await turn


class FakeStore(HandlerBase):
    """Leads every partition. `fate` decides what becomes of each append."""

    def __init__(self):
        self.leaders = [FakeLeader(p) for p in range(P)]
        self.fate = lambda number, partition: "answer"
        self.number = 0
        self.held = []
        self.came = asyncio.Event()
        self.server = FrameServer(self, lambda: Welcome(PROTOCOL_VERSION, "store-1", "store", 0))

    def on_frames(self, connection, frames):
        for frame in frames:
            assert frame.type == FrameType.APPEND
            header = decode(AppendHeader, frame.body[2 : 2 + int.from_bytes(frame.body[:2], "little")])
            self.number += 1
            self.came.set()
            fate = self.fate(self.number, header.partition)
            if fate == "drop before":
                connection.abort_transport()
                return
            if isinstance(fate, WireError):
                connection.respond_error(frame.request_id, fate)
                continue
            if fate == "hold":
                self.held.append((connection, frame, header.partition))
                continue
            appended = self.leaders[header.partition].append(frame.body)
            if fate == "drop after":
                connection.abort_transport()
                return
            connection.respond(frame.request_id, FrameType.APPENDED, encode(appended))

    def release(self):
        held, self.held = self.held, []
        for connection, frame, partition in held:
            appended = self.leaders[partition].append(frame.body)
            connection.respond(frame.request_id, FrameType.APPENDED, encode(appended))

    @property
    def events(self):
        return sum(len(leader.log) for leader in self.leaders)


class Cluster:
    """A gateway, its store, and as many clients as asked for."""

    def __init__(self, stack):
        self.stack = stack

    async def start(self, leaders=range(P), **core):
        self.coordinator = MemoryCoordinator(RealClock())
        self.stack.push_async_callback(self.coordinator.close)
        self.store = FakeStore()
        await self.store.server.start()
        self.stack.push_async_callback(self.store.server.close, deadline_s=0.0)
        for partition in leaders:
            await self.lead(partition)
        config = ServerConfig(
            node_id="gateway-1", partition_count=P, query=["q:1"], core=GatewayConfig(**core)
        )
        self.gateway = await serve(config, self.coordinator, RealClock(), random.Random(1))
        self.stack.push_async_callback(self.gateway.close, deadline_s=0.5)
        return self

    async def lead(self, partition, address=None):
        leader = Leader("store-1", address or self.store.server.address, "a")
        await self.coordinator.put(leader_key(partition), msgspec.msgpack.encode(leader))

    async def client(self):
        client = PeerClient(self.gateway.address, rng=random.Random(2))
        self.stack.push_async_callback(client.close)
        await client.connect()
        return client


@pytest.fixture
async def cluster():
    async with contextlib.AsyncExitStack() as stack:
        yield Cluster(stack)


async def _ingest(client, events, *, producer=1, sequence=1, flags=0, timeout_s=20.0):
    chunk = encode_chunk(events, producer=producer, sequence=sequence, flags=flags)
    frame = await client.request(FrameType.INGEST, chunk, timeout_s=timeout_s)
    return decode_receipt(frame.body)


def _stored_once(cluster, receipt, events):
    """The receipt's runs are the events' places in the logs."""
    assert receipt.failures == []
    assert sum(run.count for run in receipt.runs) == len(events)
    for run in receipt.runs:
        mine = [e for e in events if partition_of(e.account, P) == run.partition]
        assert cluster.store.leaders[run.partition].log[run.base_offset : run.base_offset + run.count] == mine


async def test_events_are_stored_and_the_receipt_says_where(cluster):
    """One call over all partitions, SYNC and ASYNC."""
    await cluster.start()
    client = await cluster.client()
    for flags in (0, 1):
        events = [Ev(account=k, value=k) for k in range(100)]
        receipt = await _ingest(client, events, sequence=flags, flags=flags)
        _stored_once(cluster, receipt, events)
    assert cluster.store.events == 200


async def test_many_connections_share_appends(cluster):
    """Requests of many connections are joined; each connection gets its own answers."""
    await cluster.start()
    clients = [await cluster.client() for _ in range(8)]
    calls = [_ingest(clients[k % 8], [Ev(account=k)], producer=k, sequence=k) for k in range(400)]
    receipts = await asyncio.gather(*calls)
    for k, receipt in enumerate(receipts):
        _stored_once(cluster, receipt, [Ev(account=k)])
    assert cluster.store.events == 400
    assert cluster.store.number < 200


async def test_a_malformed_chunk_is_refused_alone(cluster):
    """Its neighbour on the same connection is stored."""
    await cluster.start()
    client = await cluster.client()
    good = encode_chunk([Ev(account=1)])
    bad = client.submit(FrameType.INGEST, good[:-1] + bytes([good[-1] ^ 1]), timeout_s=10.0)
    fine = client.submit(FrameType.INGEST, good, timeout_s=10.0)
    with pytest.raises(InvalidRequestError) as caught:
        await bad
    assert caught.value.code == ErrorCode.MALFORMED
    assert decode_receipt((await fine).body).runs[0].count == 1
    assert cluster.store.events == 1


@pytest.mark.parametrize("fate", ["drop before", "drop after"])
async def test_a_dropped_connection_neither_loses_nor_doubles(cluster, fate):
    """The store's connection breaks around an append, and then again."""
    await cluster.start()
    cluster.store.fate = lambda number, partition: fate if number in {1, 3} else "answer"
    client = await cluster.client()
    for sequence in range(5):
        events = [Ev(account=k) for k in range(20)]
        _stored_once(cluster, await _ingest(client, events, sequence=sequence), events)
    assert cluster.store.events == 100


async def test_a_partition_that_fails_leaves_the_others_stored(cluster):
    """The receipt names the partition, at the caller's deadline."""
    await cluster.start()
    error = WireError(int(ErrorCode.PARTITION_UNAVAILABLE), True, "no quorum")
    cluster.store.fate = lambda number, partition: error if partition == 1 else "answer"
    client = await cluster.client()
    receipt = await _ingest(client, [Ev(account=k) for k in range(40)], timeout_s=2.0)
    assert [run.partition for run in receipt.runs] == [0, 2, 3]
    assert [failure.partition for failure in receipt.failures] == [1]
    assert receipt.failures[0].error.retriable
    cluster.store.fate = lambda number, partition: "answer"
    events = [Ev(account=k) for k in range(40)]
    _stored_once(cluster, await _ingest(client, events), events)
    assert cluster.store.events == 40


async def test_damage_is_passed_on_at_once(cluster):
    """What retrying can't help is not retried."""
    await cluster.start()
    error = WireError(int(ErrorCode.PARTITION_DAMAGED), False, "damaged")
    cluster.store.fate = lambda number, partition: error
    client = await cluster.client()
    receipt = await _ingest(client, [Ev(account=1)])
    assert receipt.failures[0].error == error
    assert not receipt.failures[0].not_stored
    assert cluster.store.number == 1


async def test_without_a_leader_requests_wait_for_one(cluster):
    """A leader that appears is asked at once; one that moves is followed."""
    await cluster.start(leaders=())
    client = await cluster.client()
    call = asyncio.ensure_future(_ingest(client, [Ev(account=1)]))
    await wait_until(lambda: cluster.gateway.core.open_requests)
    for partition in range(P):
        await cluster.lead(partition, "127.0.0.1:1")  # nobody listens there
    for partition in range(P):
        await cluster.lead(partition)
    _stored_once(cluster, await call, [Ev(account=1)])


async def test_an_unreadable_leader_key_is_no_leader(cluster):
    """Garbage in the coordinator is survived, and corrected by what comes after."""
    await cluster.start(leaders=())
    nonsense = Leader("n", "nonsense", "i")
    for value in (b"", b"{", b"\xc1", b"\xa1\xff", msgspec.msgpack.encode(nonsense)):
        for partition in range(P):
            await cluster.coordinator.put(b"leaders/%d" % partition, value)
    await cluster.coordinator.put(b"leaders/x", b"1")
    client = await cluster.client()
    receipt = await _ingest(client, [Ev(account=1)], timeout_s=0.2)
    assert receipt.failures[0].error.retriable
    for partition in range(P):
        await cluster.lead(partition)
    _stored_once(cluster, await _ingest(client, [Ev(account=1)]), [Ev(account=1)])


async def test_a_coordinator_that_is_away_is_waited_for(cluster):
    """The gateway starts without it, and learns of the leaders once it is back."""

    class Away(MemoryCoordinator):
        failures = 2

        async def range(self, prefix):
            if self.failures:
                self.failures -= 1
                raise UnavailableError("the coordinator is away")
            return await super().range(prefix)

    await cluster.start()
    away = Away(RealClock())
    for partition in range(P):
        item = await cluster.coordinator.get(b"leaders/%d" % partition)
        await away.put(item.key, item.value)
    config = ServerConfig(node_id="gateway-2", partition_count=P)
    gateway = await serve(config, away, RealClock(), random.Random(1))
    client = PeerClient(gateway.address, rng=random.Random(2))
    _stored_once(cluster, await _ingest(client, [Ev(account=1)]), [Ev(account=1)])
    await client.close()
    await gateway.close()
    await away.close()


async def test_back_pressure_pauses_reading_and_refuses_nothing(cluster):
    """A store that doesn't answer fills the gateway up to its pause, not beyond; everything is stored later."""
    await cluster.start(pending_bytes_max=2_000_000)
    cluster.store.fate = lambda number, partition: "hold"
    events = [Ev(account=k, value=k * 2**40) for k in range(1_000)]
    clients = [await cluster.client() for _ in range(4)]
    calls = [
        asyncio.ensure_future(_ingest(clients[k % 4], events, producer=k, sequence=k)) for k in range(200)
    ]
    await wait_until(lambda: cluster.gateway.core.is_full)
    cluster.store.fate = lambda number, partition: "answer"
    cluster.store.release()
    results = await asyncio.gather(*calls, return_exceptions=True)
    stored = [r for r in results if not isinstance(r, BaseException)]
    refused = [r for r in results if isinstance(r, BaseException)]
    # One read of a socket can bring more than the quarter that is left: those are told to come again.
    assert all(isinstance(r, BackpressureError) and r.retry_after_ms for r in refused)
    full = sum(sum(run.count for run in r.runs) for r in stored)
    assert cluster.store.events == full
    assert full >= 40 * 1_000
    assert cluster.gateway.core.pending_bytes == 0
    # Reading goes on.
    assert (await _ingest(clients[0], [Ev(account=1)], producer=999)).failures == []


async def test_a_caller_that_leaves_costs_nobody_else_anything(cluster):
    """Its events are stored all the same; its answer has nowhere to go."""
    await cluster.start()
    cluster.store.fate = lambda number, partition: "hold"
    leaver, stayer = await cluster.client(), await cluster.client()
    first = asyncio.ensure_future(_ingest(leaver, [Ev(account=1)], producer=1))
    second = asyncio.ensure_future(_ingest(stayer, [Ev(account=1)], producer=2))
    await wait_until(lambda: cluster.store.held and cluster.gateway.core.open_requests == 2)
    await leaver.close()
    with pytest.raises(UnavailableError):
        await first
    cluster.store.fate = lambda number, partition: "answer"
    cluster.store.release()
    assert (await second).failures == []
    assert cluster.store.events == 2


async def test_close_answers_what_is_under_way(cluster):
    """A graceful stop loses no answer."""
    await cluster.start()
    cluster.store.fate = lambda number, partition: "hold"
    client = await cluster.client()
    call = asyncio.ensure_future(_ingest(client, [Ev(account=1)]))
    await cluster.store.came.wait()
    closing = asyncio.ensure_future(cluster.gateway.close())
    await asyncio.sleep(0)
    cluster.store.release()
    assert (await call).failures == []
    await closing
    cluster.stack.pop_all()  # the gateway is closed; close the rest here
    await client.close()
    await cluster.store.server.close(deadline_s=0.0)
    await cluster.coordinator.close()


async def test_topology_and_welcome(cluster):
    """Clients learn limits, the partition count and where to query."""
    await cluster.start()
    for role, name in (("query", "a"), ("ingest", "b"), ("alerts", "c")):
        node = Node(name, f"h:{ord(name)}", role)
        await cluster.coordinator.put(node_key(role, name), msgspec.msgpack.encode(node))
    await cluster.coordinator.put(b"nodes/query/d", b"garbage")
    client = await cluster.client()
    while True:
        topology = await client.call(GetTopology(), Topology)
        if topology.alerts:
            break
    assert topology.partition_count == P
    assert topology.gateways == [cluster.gateway.address, "h:98"]
    assert topology.query == ["q:1", "h:97"]
    assert topology.alerts == ["h:99"]
    assert client.welcome.role == "ingest"
    assert client.welcome.request_events_max == 100_000
    with pytest.raises(InvalidRequestError):
        await client.call(StoreStatus(), Topology)


async def test_metrics_through_the_gateway(cluster):
    """Create, again, differently, update, list, delete, re-create: with the uids and versions they must have."""
    await cluster.start()
    client = await cluster.client()

    async def call(message):
        return (await client.call(message, MetricsResult)).metrics

    schema = MetricSchema(code="api_calls", agg_type=AggType.SUM)
    (created,) = await call(MetricCreate(schema))
    assert created.schema == schema
    assert created.version == 1
    item = await cluster.coordinator.get(b"metrics/api_calls")
    assert created.uid == item.create_revision > 0
    assert metric_of(item).uid == created.uid
    with pytest.raises(AlreadyExistsError) as caught:
        await call(MetricCreate(schema))
    assert caught.value.identical
    with pytest.raises(AlreadyExistsError) as caught:
        await call(MetricCreate(MetricSchema(code="api_calls")))
    assert not caught.value.identical
    with pytest.raises(InvalidRequestError):
        await call(MetricCreate(MetricSchema(code="not a code")))
    with pytest.raises(InvalidRequestError):
        await call(MetricUpdate(MetricSchema(code="api_calls", agg_type=AggType.MAX)))
    more = msgspec.structs.replace(schema, thresholds=[AlertThreshold(code="t", value=5)])
    (updated,) = await call(MetricUpdate(more))
    assert (updated.uid, updated.version) == (created.uid, 2)
    (same,) = await call(MetricUpdate(more))
    assert same.version == 2
    assert [m.schema for m in await call(MetricList())] == [more]
    with pytest.raises(NotFoundError) as missing:
        await call(MetricUpdate(MetricSchema(code="api_cals")))
    assert "did you mean 'api_calls'?" in missing.value.message
    with pytest.raises(NotFoundError):
        await call(MetricDelete("nothing_like_it"))
    await call(MetricDelete("api_calls"))
    assert await call(MetricList()) == []
    (again,) = await call(MetricCreate(schema))
    assert again.uid > created.uid
    assert again.version == 1


async def test_concurrent_updates_are_both_kept_or_refused(cluster):
    """Two administrators add a threshold each: neither is overwritten."""
    await cluster.start()
    client = await cluster.client()
    schema = MetricSchema(code="m")
    await client.call(MetricCreate(schema), MetricsResult)
    calls = [
        client.call(
            MetricUpdate(
                msgspec.structs.replace(schema, thresholds=[AlertThreshold(code=f"t{k}", value=k + 1)])
            ),
            MetricsResult,
        )
        for k in range(2)
    ]
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert sorted(isinstance(r, InvalidRequestError) for r in results) == [False, True]
