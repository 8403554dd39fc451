"""The gateway's shell: sockets on both sides of the core, and the calls a gateway answers.

Everything that arrives with one read goes into the core first; then one `_run` lets it do what is due and carries out
what it wants sent: at once while nothing is under way, so that a lone caller waits for nothing, and else in the loop's
next round, so that what other connections bring meanwhile joins it. There is no task and no future per request: an
append's answer calls back, deadlines are one timer.

Leaders and nodes are followed from the coordinator. Every store is connected to, whether or not it leads anything,
so that a partition's next leader can be written to at once. Where a store's answer says that what is known of the
leaders is old, the coordinator is asked, at most every CATCH_UP_S.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from typing import Final

import msgspec

from tallymark_ingest import split
from tallymark_ingest.cluster_admin import ClusterAdmin
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
)
from tallymark_protocol.frames import Frame
from tallymark_protocol.messages import (
    PROTOCOL_VERSION,
    Call,
    ClusterDrain,
    ClusterRebalance,
    ClusterRecover,
    ClusterReplace,
    ClusterStatus,
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
from tallymark_runtime.catalog import Catalog, LeaderCatalog, NodeCatalog
from tallymark_runtime.clock import Clock
from tallymark_runtime.coordinator.port import Coordinator
from tallymark_runtime.framing import turn_of
from tallymark_runtime.peer import PeerOptions
from tallymark_runtime.pool import POOL_OPTIONS, PeerPool
from tallymark_runtime.transport import FrameServer, HandlerBase, ServerConnection, ServerLimits

_INGEST: Final = int(FrameType.INGEST)
_APPEND: Final = int(FrameType.APPEND)
CATCH_UP_S: Final = 0.25  # between two questions to the coordinator for who leads

# Codes by which an attempt says that the leader we know may be one no longer.
_DOUBTS: Final = frozenset({ErrorCode.NOT_LEADER, ErrorCode.PARTITION_UNAVAILABLE, ErrorCode.CLOSED})


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
    peer: PeerOptions = POOL_OPTIONS


class GatewayServer(HandlerBase):
    """A gateway that serves. Made by `serve`.

    Attributes:
        address: "host:port" it listens on.
        core: what it is doing, for telemetry and tests.
        cluster: administration of the cluster's stores.
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
        self.cluster = ClusterAdmin(coordinator, clock, rng, software=config.node_id)
        self._leaders = LeaderCatalog(coordinator)
        self._leaders.on_change = self._on_leader
        self._nodes = NodeCatalog(coordinator)
        self._nodes.on_change = self._renew_peers
        self._server = FrameServer(self, self._welcome, limits=config.server)
        self._peers = PeerPool(rng=rng, software=config.node_id, options=config.peer)
        self._peers.on_connected = self._on_connected
        self._peers.on_answers = self._schedule
        self._is_renewing = False  # whether `_do_renew_peers` is about to be called
        self._catching_up: asyncio.Task[None] | None = None
        self._loop = asyncio.get_running_loop()
        self._turn = turn_of(self._loop)
        self._is_scheduled = False
        self._turn_ns = 0  # the time as this turn knows it; 0 outside of one
        self._is_paused = False
        self._timer: asyncio.TimerHandle | None = None
        self._timer_ns = 0  # when it goes off, on our clock
        self._is_closed = False

    async def start(self) -> None:
        """Learn of the cluster, then listen."""
        split.warm_up()
        for catalog in (self._leaders, self._nodes):
            await _start(catalog)
        self.address = await self._server.start(self._config.listen)

    async def close(self, *, deadline_s: float = 10.0) -> None:
        """Take nothing new, answer everything under way (up to the deadline), then stop. Call it once."""
        await self._server.close(deadline_s=deadline_s)
        self._is_closed = True
        if self._timer is not None:
            self._timer.cancel()
        if self._catching_up is not None:
            self._catching_up.cancel()
            await asyncio.gather(self._catching_up, return_exceptions=True)
        await self._leaders.close()
        await self._nodes.close()
        await self._peers.close()
        await self.cluster.close()

    @property
    def connection_count(self) -> int:
        """Connections of callers."""
        return len(self._server.connections)

    def leaderless(self) -> list[int]:
        """Partitions whose leader isn't known here, in order."""
        address = self._leaders.address
        return [number for number in range(self._config.partition_count) if address(number) is None]

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
        if not self._is_scheduled:
            if self.core.is_busy:
                self._is_scheduled = True
                self._loop.call_soon(self._run)
            else:
                self._schedule(now)

    async def on_call(self, connection: ServerConnection, call: Call) -> Message:
        """Answer topology and metrics calls."""
        if isinstance(call, GetTopology):
            return self._topology()
        if isinstance(call, MetricCreate | MetricUpdate | MetricDelete | MetricList):
            answer = await self._admin.answer(call)
            # What its caller sends next is to be judged by the metric as it now is.
            self.core.metrics_revision = self._admin.revision
            return answer
        if isinstance(
            call, ClusterStatus | ClusterDrain | ClusterRebalance | ClusterReplace | ClusterRecover
        ):
            return await self.cluster.answer(call)
        if isinstance(call, QueryTotals | QueryRealtime | QueryTop | QueryEvents | QueryAlerts):
            raise UnavailableError("queries go to a query node, and none has registered with the cluster yet")
        return await super().on_call(connection, call)

    # ------------------------------------------------------------ driving the core

    def _schedule(self, now_ns: int = 0) -> None:
        """Have `_run` called at this turn's end; `now_ns` is the time, if it was just read."""
        if not self._is_scheduled:
            self._is_scheduled = True
            if self._turn.depth:
                self._turn_ns = now_ns
            self._turn.defer(self._run)

    def _run(self) -> None:
        """Let the core do what is due, and send what it wants sent."""
        self._is_scheduled = False
        now = self._turn_ns or self._clock.monotonic_ns()
        self._turn_ns = 0
        if self._is_closed:
            return
        core = self.core
        core.tick(now)
        while True:
            appends = core.take_appends()
            for append in appends:
                self._send(append, now)
            for connection, request_id, kind, body in core.take_answers():
                connection.respond(request_id, kind, body)
            if not appends:  # only one that can't be sent makes more to do
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
        address = self._leaders.address(append.partition)
        if address is None:
            error = WireError(
                int(ErrorCode.PARTITION_UNAVAILABLE), True, f"partition {append.partition} has no leader"
            )
            self.core.failed(append, error, now_ns, sent=False)
            return
        append.target = address
        peer = self._peers.get(address)
        try:
            if peer is None:
                raise UnavailableError(
                    f"partition {append.partition} is led from {address!r:.60}, no address"
                )
            peer.send(_APPEND, append.body, timeout_s=append.timeout_ns / 1e9, waiter=_Attempt(self, append))
        except TallymarkError as error:
            self.core.failed(append, _as_wire(error), now_ns, sent=False)
            if error.code == ErrorCode.CLOSED:
                self._doubt()

    def on_appended(self, append: Append, attempt: int, frame: Frame) -> None:
        """The leader answered an attempt."""
        now = self._turn_ns
        if not now:
            # One reading of the clock for all answers of a turn, and for what `_run` does at its end.
            now = self._clock.monotonic_ns()
            self._schedule(now)
        try:
            appended = decode_appended(frame.body)
        except RemoteProtocolError as fault:
            wire = WireError(int(ErrorCode.INTERNAL), False, fault.message)
            self.core.failed(append, wire, now, sent=True, attempt=attempt)
        else:
            self.core.answered(append, appended, now)

    def on_append_failed(self, append: Append, attempt: int, error: TallymarkError) -> None:
        """An attempt was refused, or its answer won't come."""
        if error.code in _DOUBTS:
            self._doubt()
        now = self._clock.monotonic_ns()
        self.core.failed(append, _as_wire(error), now, sent=True, attempt=attempt)

    # ------------------------------------------------------------ leaders

    def _on_leader(self, partition: int) -> None:
        address = self._leaders.address(partition)
        self._renew_peers()
        if address is not None and not self._is_closed:
            self._peers.add(address)
            self.core.leader_changed(partition, self._clock.monotonic_ns(), address)
            self._schedule()

    def _on_connected(self, address: str) -> None:
        """What failed for lack of a connection needs not wait its backoff out."""
        now = self._clock.monotonic_ns()
        for partition in range(self._config.partition_count):
            if self._leaders.address(partition) == address:
                self.core.leader_changed(partition, now, address)
        self._schedule()

    def _renew_peers(self) -> None:
        if not self._is_renewing:
            self._is_renewing = True
            self._loop.call_soon(self._do_renew_peers)

    def _do_renew_peers(self) -> None:
        """Be connected to all stores there are, and to all that lead."""
        self._is_renewing = False
        if not self._is_closed:
            self._peers.keep({*self._leaders.addresses(), *self._nodes.addresses("store")})

    def _doubt(self) -> None:
        """Ask the coordinator who leads: what the watch has told may be behind."""
        if self._catching_up is None and not self._is_closed:
            self._catching_up = self._loop.create_task(self._catch_up())

    async def _catch_up(self) -> None:
        with contextlib.suppress(TallymarkError):  # the coordinator is away: what was known stays
            await self._leaders.catch_up()
        await asyncio.sleep(CATCH_UP_S)
        self._catching_up = None

    # ------------------------------------------------------------ what clients are told

    def _topology(self) -> Topology:
        config = self._config
        own = config.advertise or self.address

        def merged(configured: list[str], role: str) -> list[str]:
            return list(dict.fromkeys([*configured, *self._nodes.addresses(role)]))

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


class _Attempt:
    """An append on its way to a leader: tells the server what became of it."""

    __slots__ = ("_append", "_attempt", "_server")

    def __init__(self, server: GatewayServer, append: Append) -> None:
        self._server = server
        self._append = append
        self._attempt = append.attempts

    def answered(self, frame: Frame) -> None:
        """The leader answered."""
        self._server.on_appended(self._append, self._attempt, frame)

    def failed(self, error: TallymarkError) -> None:
        """It refused, or can't answer any more."""
        self._server.on_append_failed(self._append, self._attempt, error)


async def _start(catalog: Catalog) -> None:
    """Begin to follow, also while the coordinator is away: the gateway learns of the cluster once it is back."""
    with contextlib.suppress(UnavailableError):
        await catalog.start()


def _as_wire(error: TallymarkError) -> WireError:
    """An append's failure as the core takes it.

    A connection that ended, here or there, says nothing about the append, which may be sent again; and bytes from
    a leader that make no sense are no verdict of MALFORMED by it.
    """
    if isinstance(error, RemoteProtocolError):
        return WireError(int(ErrorCode.CLOSED), True, f"a leader broke the protocol: {error.message}")
    retriable = error.retriable or error.code in {ErrorCode.CLOSED, ErrorCode.TIMEOUT}
    return WireError(int(error.code), retriable, error.message, error.details or None)


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
