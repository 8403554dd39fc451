"""Stores for tests of failover: several processes' worth of leaders over logs that they share, as if replicated."""

from __future__ import annotations

import contextlib
import random

import msgspec

from tallymark_ingest import GatewayConfig, ServerConfig, serve
from tallymark_protocol.codec import decode, decode_receipt, encode
from tallymark_protocol.errors import ErrorCode, WireError
from tallymark_protocol.identifiers import partition_of
from tallymark_protocol.messages import PROTOCOL_VERSION, AppendHeader, FrameType, Welcome
from tallymark_runtime.catalog import Leader, Node, leader_key, node_key
from tallymark_runtime.clock import RealClock
from tallymark_runtime.coordinator import MemoryCoordinator
from tallymark_runtime.peer import PeerClient
from tallymark_runtime.transport import FrameServer, HandlerBase

from .ingest_helpers import encode_chunk
from .ingest_leader import Leader as Log

P = 4
NOT_LEADER = WireError(int(ErrorCode.NOT_LEADER), True, "not the leader")


class Store(HandlerBase):
    """One store. It appends to the cluster's logs where the cluster says that it leads.

    Attributes:
        is_hung: whether it answers nothing; what it was sent stays in `unread`.
        answers: whether what it appends is answered; else the append takes effect and its answer is lost.
    """

    def __init__(self, name, logs):
        self.name = name
        self.logs = logs
        self.leads = set()
        self.is_hung = False
        self.answers = True
        self.unread = []
        self.refusals = 0
        self.appends = 0
        self.server = FrameServer(self, lambda: Welcome(PROTOCOL_VERSION, name, "store", 0))

    def on_frames(self, connection, frames):
        for frame in frames:
            if self.is_hung:
                self.unread.append((connection, frame))
            else:
                self.take(connection, frame)

    def take(self, connection, frame):
        header = decode(AppendHeader, frame.body[2 : 2 + int.from_bytes(frame.body[:2], "little")])
        if header.partition not in self.leads:
            self.refusals += 1
            connection.respond_error(frame.request_id, NOT_LEADER)
            return
        self.appends += 1
        appended = self.logs[header.partition].append(frame.body)
        if self.answers:
            connection.respond(frame.request_id, FrameType.APPENDED, encode(appended))

    def wake(self):
        """Go on after a hang with what came meanwhile."""
        self.is_hung = False
        unread, self.unread = self.unread, []
        for connection, frame in unread:
            self.take(connection, frame)

    async def kill(self):
        """End without a word: connections are reset, nobody listens any more."""
        self.leads = set()
        for connection in self.server.connections:
            connection.abort_transport()
        await self.server.close(deadline_s=0.0)


class Cluster:
    """A coordinator, stores, and gateways and clients as asked for."""

    def __init__(self, stack):
        self.stack = stack
        self.logs = [Log(p) for p in range(P)]
        self.stores = []
        self.coordinator = MemoryCoordinator(RealClock())

    async def start(self, stores=2):
        self.stack.push_async_callback(self.coordinator.close)
        for number in range(stores):
            store = Store(f"store-{number}", self.logs)
            await store.server.start()
            self.stack.push_async_callback(store.server.close, deadline_s=0.0)
            self.stores.append(store)
            node = Node(store.name, store.server.address, "store")
            await self.coordinator.put(node_key("store", store.name), msgspec.msgpack.encode(node))
        return self

    async def gateway(self, coordinator=None, **core):
        config = ServerConfig(node_id="gateway", partition_count=P, core=GatewayConfig(**core))
        gateway = await serve(config, coordinator or self.coordinator, RealClock(), random.Random(1))
        self.stack.push_async_callback(gateway.close, deadline_s=0.5)
        return gateway

    async def client(self, gateway):
        client = PeerClient(gateway.address, rng=random.Random(2))
        self.stack.push_async_callback(client.close)
        await client.connect()
        return client

    def depose(self, *partitions):
        """Nobody leads these any more, as far as the stores are concerned."""
        for store in self.stores:
            store.leads -= set(partitions)

    async def lead(self, store, *partitions):
        """Make a store the leader, and tell everybody."""
        self.depose(*partitions)
        store.leads |= set(partitions)
        await self.tell(store, *partitions)

    async def tell(self, store, *partitions):
        for partition in partitions:
            leader = Leader(store.name, store.server.address, "i")
            await self.coordinator.put(leader_key(partition), msgspec.msgpack.encode(leader))

    def check(self, receipt, events):
        """The receipt's runs are the events' places in the logs, and no event is missing from it."""
        assert receipt.failures == []
        assert sum(run.count for run in receipt.runs) == len(events)
        for run in receipt.runs:
            mine = [e for e in events if partition_of(e.account, P) == run.partition]
            assert self.logs[run.partition].log[run.base_offset : run.base_offset + run.count] == mine

    @property
    def events(self):
        return sum(len(log.log) for log in self.logs)


@contextlib.asynccontextmanager
async def new_cluster():
    async with contextlib.AsyncExitStack() as stack:
        yield Cluster(stack)


def account(partition, k=0):
    """The k-th account of a partition; none of those that the fake log treats in a special way."""
    return [a for a in range(600) if partition_of(a, P) == partition and a != 13][k]


async def ingest(client, events, *, producer=1, sequence=1, timeout_s=20.0):
    chunk = encode_chunk(events, producer=producer, sequence=sequence)
    frame = await client.request(FrameType.INGEST, chunk, timeout_s=timeout_s)
    return decode_receipt(frame.body)
