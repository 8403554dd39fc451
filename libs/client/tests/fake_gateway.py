"""A cluster in memory behind real sockets: gateways that do as they are told, over one exactly-once log.

`FakeCluster` keeps what is stored; `FakeGateway` is one address of it. A test scripts what happens to the next
chunks with `gateway.script.append(action)`; without a script every chunk is stored and answered.
"""

import asyncio
from collections import deque

import google_crc32c

from tallymark_protocol import layout as lay
from tallymark_protocol.codec import decode_call, encode
from tallymark_protocol.connection import Connection, Role, State
from tallymark_protocol.errors import ErrorCode, Reason, WireError
from tallymark_protocol.identifiers import partition_of
from tallymark_protocol.messages import (
    EventOutcome,
    FrameType,
    GetTopology,
    PartitionFailure,
    PartitionRun,
    Receipt,
    Topology,
    Welcome,
)

WIDTHS = (8, 2, 8, 8, 1, 4)
NOW_NS = 1_800_000_000 * 10**9


class FakeChunk:
    """A chunk's header, accounts and ids."""

    def __init__(self, data):
        header = lay.CHUNK_HEADER.unpack_from(data)
        assert header[0] == lay.CHUNK_MAGIC
        assert header[1] == google_crc32c.value(data[8:])
        self.data = data
        self.count, self.producer, self.sequence, self.first_sent_ns, encodings, self.flags = header[3:9]
        position = lay.CHUNK_HEADER_BYTES + 4 * header[9] + header[10] + 4 * header[11] + header[12]
        codings = [encodings >> 4 * column & 15 for column in range(8)]
        self.accounts = []
        for column, width in enumerate(WIDTHS):
            size = {lay.ABSENT: 0, lay.CONSTANT: width, lay.PLAIN: width * self.count}[codings[column]]
            if column == lay.COLUMN_ACCOUNT:
                section = data[position : position + size]
                self.accounts = [int.from_bytes(section[i : i + 8], "little") for i in range(0, size, 8)]
                if codings[column] == lay.CONSTANT:
                    self.accounts *= self.count
            position += size
        self.ids = [b""] * self.count
        if codings[lay.COLUMN_ID] == lay.PLAIN:
            content = position + 4 * self.count
            start = 0
            for i in range(self.count):
                end = int.from_bytes(data[position + 4 * i : position + 4 * i + 4], "little")
                self.ids[i] = data[content + start : content + end]
                start = end


class FakeCluster:
    """What is stored: per partition the accounts of its events in order, and each chunk's first outcome."""

    def __init__(self, partition_count=4):
        self.partition_count = partition_count
        self.logs = [[] for _ in range(partition_count)]
        self.first = {}  # (producer, sequence, partition) -> (data, run, outcomes)
        self.by_id = {}  # (account, id) -> (partition, offset, payload)
        self.repeats = 0  # times a chunk came again for a partition that had it
        self.reject = {}  # account -> Reason

    @property
    def n_stored(self):
        """How many events are in the log."""
        return sum(len(log) for log in self.logs)

    def store(self, chunk, failing=()):
        """Take a chunk, but for the partitions that fail (partition -> error, not_stored)."""
        count = self.partition_count
        if count == 1:
            places = {0: range(chunk.count)}
        else:
            places = {}
            for index, account in enumerate(chunk.accounts):
                places.setdefault(partition_of(account, count), []).append(index)
        runs, outcomes, failures = [], [], []
        for partition, indices in places.items():
            if partition in failing:
                error, not_stored = failing[partition]
                failures.append(PartitionFailure(partition, len(indices), error, not_stored))
                continue
            run, found = self._append(chunk, partition, indices)
            runs.append(run)
            outcomes += found
        return Receipt(count, runs, outcomes, failures)

    def _append(self, chunk, partition, indices):
        key = (chunk.producer, chunk.sequence, partition)
        if key in self.first:
            data, run, outcomes = self.first[key]
            assert data == chunk.data, "a sequence came again with other content"
            self.repeats += 1
            return run, outcomes
        log = self.logs[partition]
        run = PartitionRun(partition, len(log), len(indices))
        outcomes = []
        for index in indices:
            account, event_id = chunk.accounts[index], chunk.ids[index]
            offset = len(log)
            if account in self.reject:
                log.append(None)
                outcomes.append(EventOutcome(index, self.reject[account], partition, -1))
            elif event_id and (account, event_id) in self.by_id:
                log.append(None)
                outcomes.append(
                    EventOutcome(index, Reason.DUPLICATE, partition, self.by_id[account, event_id])
                )
            else:
                log.append(account)
                if event_id:
                    self.by_id[account, event_id] = offset
        self.first[key] = (chunk.data, run, outcomes)
        return run, outcomes

    def counted(self):
        """The accounts of all counted events, sorted."""
        return sorted(account for log in self.logs for account in log if account is not None)


# Actions: what a gateway does with a chunk.
def drop_before(gateway, peer, frame):
    """Lose the connection before the chunk is stored."""
    peer.transport.abort()


def drop_after(gateway, peer, frame):
    """Store the chunk, and lose the connection instead of answering."""
    gateway.cluster.store(FakeChunk(frame.body))
    peer.transport.abort()


def silent_after(gateway, peer, frame):
    """Store the chunk and never answer."""
    gateway.cluster.store(FakeChunk(frame.body))


def silent(gateway, peer, frame):
    """Neither store nor answer."""


def just_in_time(gateway, peer, frame):
    """Say, just before the caller stops waiting, that a partition did not answer in time."""
    wire = WireError(
        code=int(ErrorCode.TIMEOUT), retriable=True, message="partition 0 did not answer in time"
    )
    seconds = max(frame.timeout_ms / 1_000 - 0.01, 0)
    asyncio.get_running_loop().call_later(
        seconds, peer.answer, FrameType.ERROR, encode(wire), frame.request_id
    )


def hold(gateway, peer, frame):
    """Keep the chunk until `gateway.release()`."""
    gateway.held.append((peer, frame))


def error(code, *, retriable=True, **details):
    """Answer with an error, nothing stored."""

    def act(gateway, peer, frame):
        wire = WireError(code=int(code), retriable=retriable, message="told to fail", details=details or None)
        peer.answer(FrameType.ERROR, encode(wire), frame.request_id)

    return act


def fail_partition(*partitions, code=ErrorCode.NOT_LEADER, retriable=True, not_stored=True, stored=False):
    """Answer with a receipt in which partitions failed (after all, with `stored`, they have it)."""
    wire = WireError(code=int(code), retriable=retriable, message="told to fail")

    def act(gateway, peer, frame):
        chunk = FakeChunk(frame.body)
        if stored:
            gateway.cluster.store(chunk)
        receipt = gateway.cluster.store(chunk, dict.fromkeys(partitions, (wire, not_stored)))
        peer.answer(FrameType.RECEIPT, encode(receipt), frame.request_id)

    return act


class Peer(asyncio.Protocol):
    """One connection to a gateway."""

    def __init__(self, gateway):
        self.gateway = gateway
        self.connection = Connection(Role.SERVER)
        self.transport = None
        self.out = []

    def connection_made(self, transport):
        self.transport = transport
        self.gateway.peers.append(self)

    def connection_lost(self, exc):
        self.gateway.peers.remove(self)

    def answer(self, kind, body, request_id):
        """Write a frame, together with the others of this tick."""
        if self.transport.is_closing():
            return
        if not self.out:
            asyncio.get_running_loop().call_soon(self.flush)
        self.out.append(self.connection.send(kind, body, request_id=request_id))

    def flush(self):
        data, self.out = b"".join(self.out), []
        if not self.transport.is_closing():
            self.transport.write(data)

    def data_received(self, data):
        gateway = self.gateway
        for frame in self.connection.receive_data(data):
            if frame.type == FrameType.HELLO:
                self.transport.write(self.connection.accept(gateway.welcome()))
            elif frame.type == FrameType.INGEST:
                gateway.requests.append(frame.timeout_ms)
                act = gateway.script.popleft() if gateway.script else gateway.default
                act(gateway, self, frame)
            elif frame.type == FrameType.CALL:
                gateway.call(self, frame)
        own = self.connection.data_to_send()
        if own:
            self.transport.write(own)

    def go_away(self):
        """Take no more requests on this connection."""
        if self.connection.state is State.OPEN:
            self.transport.write(self.connection.send(FrameType.GOAWAY))


class FakeGateway:
    """One gateway (and query node) of a cluster: `async with FakeGateway(cluster) as gateway`."""

    def __init__(self, cluster=None):
        self.cluster = cluster or FakeCluster()
        self.script = deque()
        self.default = self.store
        self.held = []
        self.peers = []
        self.requests = []  # timeout_ms of each chunk received
        self.calls = []  # CALLs received
        self.answers = {}  # by type of call: a result, an error, or a function of the call
        self.server = None
        self.address = ""
        self.query_addresses = []
        self.alerts_addresses = []
        self.now_ns = NOW_NS
        self.refresh_seconds = 30

    async def __aenter__(self):
        await self.start()
        return self

    async def start(self, port=0):
        """Listen."""
        loop = asyncio.get_running_loop()
        self.server = await loop.create_server(lambda: Peer(self), "127.0.0.1", port)
        self.address = f"127.0.0.1:{self.server.sockets[0].getsockname()[1]}"

    async def __aexit__(self, *_):
        await self.stop()

    async def stop(self):
        """Lose all connections and listen no more."""
        self.server.close()
        for peer in [*self.peers]:
            peer.transport.abort()
        await self.server.wait_closed()

    @property
    def port(self):
        """Where it listens."""
        return int(self.address.rpartition(":")[2])

    def topology(self):
        return Topology(
            self.cluster.partition_count,
            [self.address],
            self.query_addresses,
            self.alerts_addresses,
            self.refresh_seconds,
        )

    def welcome(self):
        return Welcome(1, "fake", "ingest", self.now_ns, [], self.topology(), 100_000, 16 << 20)

    @staticmethod
    def store(gateway, peer, frame):
        """The default: store and answer."""
        receipt = gateway.cluster.store(FakeChunk(frame.body))
        peer.answer(FrameType.RECEIPT, encode(receipt), frame.request_id)

    def release(self):
        """Store and answer what was held."""
        held, self.held = self.held, []
        for peer, frame in held:
            self.store(self, peer, frame)

    def call(self, peer, frame):
        """Answer a CALL."""
        call = decode_call(frame.body)
        self.calls.append(call)
        if isinstance(call, GetTopology):
            peer.answer(FrameType.RESULT, encode(self.topology()), frame.request_id)
            return
        answer = self.answers[type(call)]
        if callable(answer):
            answer = answer(call)
        if answer is None:
            peer.transport.abort()
            return
        kind = FrameType.ERROR if isinstance(answer, WireError) else FrameType.RESULT
        peer.answer(kind, encode(answer), frame.request_id)


async def until(condition):
    """Let the loop run until a condition holds; bounded by the test's own timeout."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110  # no one thing to wait for
            await asyncio.sleep(0)
