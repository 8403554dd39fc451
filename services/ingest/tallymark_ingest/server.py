"""The gateway's shell: sockets on both sides of the core, and the calls a gateway answers.

Everything that arrives within one tick of the loop goes into the core first; then one scheduled `_run` lets it do
what is due and carries out what it wants sent. There is no task per request: an append is a future with a callback,
deadlines are one timer.
"""

from __future__ import annotations

import asyncio
import functools
import random
from typing import Final

import msgspec

from tallymark_ingest import split
from tallymark_ingest.directory import Directory
from tallymark_ingest.gateway import Gateway, GatewayConfig
from tallymark_ingest.metrics_admin import MetricsAdmin
from tallymark_ingest.work import Append
from tallymark_protocol import limits
from tallymark_protocol.codec import decode_appended
from tallymark_protocol.errors import (
    ErrorCode,
    InvalidRequestError,
    RemoteProtocolError,
    TallymarkError,
    UnavailableError,
    WireError,
    to_wire,
)
from tallymark_protocol.frames import Frame
from tallymark_protocol.messages import (
    PROTOCOL_VERSION,
    Call,
    FrameType,
    GetTopology,
    Message,
    MetricCreate,
    MetricDelete,
    MetricList,
    MetricUpdate,
    QueryAlerts,
    QueryEvents,
    QueryRealtime,
    QueryTop,
    QueryTotals,
    Topology,
    Welcome,
)
from tallymark_runtime.clock import Clock
from tallymark_runtime.coordinator.port import Coordinator
from tallymark_runtime.peer import PeerClient, PeerOptions
from tallymark_runtime.transport import FrameServer, HandlerBase, ServerConnection, ServerLimits

_INGEST: Final = int(FrameType.INGEST)


class ServerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What a gateway process is told."""

    node_id: str
    partition_count: int  # of the cluster; fixed when it was created
    listen: str = "127.0.0.1:0"
    advertise: str = ""  # the address by which clients reach this gateway, if not the one it listens on
    gateways: list[str] = []  # further addresses for clients, beside those registered with the coordinator
    query: list[str] = []
    alerts: list[str] = []
    topology_refresh_s: int = 30
    core: GatewayConfig = GatewayConfig()
    server: ServerLimits = ServerLimits()
    peer: PeerOptions = PeerOptions()


class GatewayServer(HandlerBase):
    """A gateway that serves. Made by `serve`.

    Attributes:
        address: "host:port" it listens on.
        core: what it is doing, for telemetry and tests.
    """

    def __init__(
        self, config: ServerConfig, coordinator: Coordinator, clock: Clock, rng: random.Random
    ) -> None:
        self.address = ""
        self.core = Gateway(config.partition_count, config.core, rng)
        self._config = config
        self._clock = clock
        self._rng = rng
        self._admin = MetricsAdmin(coordinator)
        self._directory = Directory(coordinator, self._on_leader)
        self._server = FrameServer(self, self._welcome, limits=config.server)
        self._peers: dict[str, PeerClient] = {}  # by address
        self._tasks: dict[str, asyncio.Task[None]] = {}  # attempts to connect, by address
        self._closing: set[asyncio.Task[None]] = set()  # peers that are let go
        self._loop = asyncio.get_running_loop()
        self._is_scheduled = False
        self._is_paused = False
        self._timer: asyncio.TimerHandle | None = None
        self._timer_ns = 0  # when it goes off, on our clock
        self._is_closed = False

    async def start(self) -> None:
        """Learn of the cluster, then listen."""
        split.warm_up()
        await self._directory.start()
        self.address = await self._server.start(self._config.listen)

    async def close(self, *, deadline_s: float = 10.0) -> None:
        """Take nothing new, answer everything under way (up to the deadline), then stop. Call it once."""
        await self._server.close(deadline_s=deadline_s)
        self._is_closed = True
        if self._timer is not None:
            self._timer.cancel()
        await self._directory.close()
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), *self._closing, return_exceptions=True)
        for peer in self._peers.values():
            await peer.close()

    # ------------------------------------------------------------ requests

    def on_frames(self, connection: ServerConnection, frames: list[Frame]) -> None:
        """Take chunks; the answers come from `_run`."""
        now = self._clock.monotonic_ns()
        ingest = self.core.ingest
        for frame in frames:
            if frame.type == _INGEST:
                ingest(connection, frame.request_id, frame.body, frame.timeout_ms, now)
            else:
                connection.respond_error(
                    frame.request_id,
                    InvalidRequestError("a gateway takes no appends: send them to the leader"),
                )
        self._schedule()

    async def on_call(self, connection: ServerConnection, call: Call) -> Message:
        """Answer topology and metrics calls."""
        if isinstance(call, GetTopology):
            return self._topology()
        if isinstance(call, MetricCreate | MetricUpdate | MetricDelete | MetricList):
            answer = await self._admin.answer(call)
            # What its caller sends next is to be judged by the metric as it now is.
            self.core.metrics_revision = self._admin.revision
            return answer
        if isinstance(call, QueryTotals | QueryRealtime | QueryTop | QueryEvents | QueryAlerts):
            raise UnavailableError("queries go to a query node, and none has registered with the cluster yet")
        return await super().on_call(connection, call)

    # ------------------------------------------------------------ driving the core

    def _schedule(self) -> None:
        if not self._is_scheduled:
            self._is_scheduled = True
            self._loop.call_soon(self._run)

    def _run(self) -> None:
        """Let the core do what is due, and send what it wants sent."""
        self._is_scheduled = False
        if self._is_closed:
            return
        core = self.core
        now = self._clock.monotonic_ns()
        core.tick(now)
        while True:
            answers = core.take_answers()
            for answer in answers:
                answer.connection.respond(answer.request_id, answer.kind, answer.body)
            appends = core.take_appends()
            for append in appends:
                self._send(append, now)
            if not answers and not appends:
                break
        if core.is_full and not self._is_paused:
            self._is_paused = True
            self._server.pause()
        elif self._is_paused and core.is_relieved:
            self._is_paused = False
            self._server.resume()
        self._arm(now)

    def _arm(self, now_ns: int) -> None:
        """Have `_run` called at the core's next deadline."""
        due = self.core.next_deadline()
        if due is None or (self._timer is not None and self._timer_ns <= due):
            return  # a timer that goes off too early does no harm
        if self._timer is not None:
            self._timer.cancel()
        self._timer_ns = due
        self._timer = self._loop.call_later(max(due - now_ns, 0) / 1e9, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self._schedule()

    # ------------------------------------------------------------ appends

    def _send(self, append: Append, now_ns: int) -> None:
        leader = self._directory.leaders.get(append.partition)
        if leader is None:
            error = WireError(
                int(ErrorCode.PARTITION_UNAVAILABLE), True, f"partition {append.partition} has no leader"
            )
            self.core.failed(append, error, now_ns, sent=False)
            return
        try:
            peer = self._peer(leader.address)
            future = peer.submit(FrameType.APPEND, append.body, timeout_s=append.timeout_ns / 1e9)
        except TallymarkError as error:
            self.core.failed(append, _as_wire(error), now_ns, sent=False)
            self._connect(leader.address)
            return
        future.add_done_callback(functools.partial(self._on_append_done, append))

    def _on_append_done(self, append: Append, future: asyncio.Future[Frame]) -> None:
        """The leader answered, or can't any more."""
        now = self._clock.monotonic_ns()
        error = future.exception() if not future.cancelled() else UnavailableError("the append was dropped")
        if error is None:
            try:
                appended = decode_appended(future.result().body)
            except RemoteProtocolError as fault:
                wire = WireError(int(ErrorCode.INTERNAL), False, fault.message)
                self.core.failed(append, wire, now, sent=True)
            else:
                self.core.answered(append, appended, now)
        else:
            self.core.failed(append, _as_wire(error), now, sent=True)
        self._schedule()

    # ------------------------------------------------------------ leaders

    def _peer(self, address: str) -> PeerClient:
        peer = self._peers.get(address)
        if peer is None:
            try:
                peer = PeerClient(
                    address, rng=self._rng, software=self._config.node_id, options=self._config.peer
                )
            except ValueError as error:
                raise RemoteProtocolError(f"a leader gave an address that is none: {error}") from error
            self._peers[address] = peer
        return peer

    def _connect(self, address: str) -> None:
        """Begin to connect to a leader, unless that is under way."""
        peer = self._peers.get(address)
        if peer is None or peer.is_connected or address in self._tasks or self._is_closed:
            return
        task = self._loop.create_task(self._connect_peer(address, peer))
        self._tasks[address] = task
        task.add_done_callback(lambda _: self._tasks.pop(address, None))

    async def _connect_peer(self, address: str, peer: PeerClient) -> None:
        try:
            await peer.connect()
        except TallymarkError:
            return  # the next append tries again, after its backoff
        # What failed for lack of a connection needs not wait its backoff out.
        now = self._clock.monotonic_ns()
        for partition, leader in self._directory.leaders.items():
            if leader.address == address:
                self.core.leader_changed(partition, now)
        self._schedule()

    def _on_leader(self, partition: int) -> None:
        leader = self._directory.leaders.get(partition)
        if leader is not None:
            try:
                self._peer(leader.address)
            except RemoteProtocolError:
                return  # its appends fail by it, and say so
            self._connect(leader.address)
            self.core.leader_changed(partition, self._clock.monotonic_ns())
            self._schedule()
        leading = {known.address for known in self._directory.leaders.values()}
        for address in [address for address in self._peers if address not in leading]:
            # It may still answer what it was sent; whoever leads next is asked again otherwise.
            task = self._loop.create_task(self._peers.pop(address).close(drain_s=_DRAIN_S))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    # ------------------------------------------------------------ what clients are told

    def _topology(self) -> Topology:
        config = self._config
        own = config.advertise or self.address

        def merged(configured: list[str], role: str) -> list[str]:
            return list(dict.fromkeys([*configured, *self._directory.addresses(role)]))

        return Topology(
            partition_count=config.partition_count,
            gateways=list(dict.fromkeys([own, *merged(config.gateways, "ingest")])),
            query=merged(config.query, "query"),
            alerts=merged(config.alerts, "alerts"),
            refresh_seconds=config.topology_refresh_s,
        )

    def _welcome(self) -> Welcome:
        return Welcome(
            version=PROTOCOL_VERSION,
            node_id=self._config.node_id,
            role="ingest",
            now_ns=self._clock.now_ns(),
            topology=self._topology(),
            request_events_max=limits.REQUEST_EVENTS_MAX,
            request_bytes_max=limits.REQUEST_BYTES_MAX,
        )


_DRAIN_S: Final = 1.0  # for answers of a store that leads nothing any more


def _as_wire(error: BaseException) -> WireError:
    """An append's failure as the core takes it.

    A connection that ended, here or there, says nothing about the append, which may be sent again; and bytes from
    a leader that make no sense are no verdict of MALFORMED by it.
    """
    if isinstance(error, RemoteProtocolError):
        return WireError(int(ErrorCode.CLOSED), True, f"a leader broke the protocol: {error.message}")
    if isinstance(error, TallymarkError):
        retriable = error.retriable or error.code in {ErrorCode.CLOSED, ErrorCode.TIMEOUT}
        return WireError(int(error.code), retriable, error.message, error.details or None)
    return to_wire(error)


async def serve(
    config: ServerConfig, coordinator: Coordinator, clock: Clock, rng: random.Random
) -> GatewayServer:
    """Start a gateway; close it at the end. Must be called on the loop it is to run on.

    Raises:
        OSError: the address can't be listened on.
    """
    server = GatewayServer(config, coordinator, clock, rng)
    try:
        await server.start()
    except BaseException:
        await server.close(deadline_s=0.0)
        raise
    return server
