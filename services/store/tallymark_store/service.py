"""A store process: a `StoreNode` behind real sockets, and a graceful end.

`serve` puts the parts together in this order: the socket is bound (its address goes into the leader keys), the node
starts (see `node`), and only what it is ready for is answered meanwhile: calls to the coordinator that this process
may host, and messages of other stores.
"""

from __future__ import annotations

import importlib
import logging
import random
from collections.abc import Callable
from typing import TYPE_CHECKING

from tallymark_protocol.codec import encode
from tallymark_protocol.errors import RemoteProtocolError, UnavailableError
from tallymark_protocol.frames import Frame
from tallymark_protocol.messages import (
    PROTOCOL_VERSION,
    Call,
    CoordinatorCall,
    FrameType,
    Message,
    StoreRealtime,
    Welcome,
)
from tallymark_runtime.catalog import MetricCatalog, NodeCatalog
from tallymark_runtime.clock import Clock
from tallymark_runtime.coordinator import Coordinator, CoordinatorService
from tallymark_runtime.disk import Disk
from tallymark_runtime.transport import FrameServer, HandlerBase, ServerConnection
from tallymark_store import warmup
from tallymark_store.checkpointer import Checkpointer
from tallymark_store.node import StoreConfig, StoreNode
from tallymark_store.peers import Peers
from tallymark_store.store import Store

if TYPE_CHECKING:
    from tallymark_store.archive.archiver import Archiver

__all__ = ["StoreConfig", "StoreService", "serve"]

_log = logging.getLogger(__name__)

_APPEND = int(FrameType.APPEND)
_RESULT = int(FrameType.RESULT)


class StoreService(HandlerBase):
    """A store that serves. Made by `serve`.

    Attributes:
        address: "host:port" it is reached by.
        failed: set when the process must end, because its log cannot be trusted any more.
    """

    def __init__(
        self,
        config: StoreConfig,
        disk: Disk,
        coordinator: Coordinator,
        clock: Clock,
        rng: random.Random,
        report: Callable[[str], None],
        hosted: CoordinatorService | None,
        lease_coordinator: Callable[[], Coordinator] | None,
    ) -> None:
        self.address = ""
        self._config = config
        self._clock = clock
        self._hosted = hosted
        self._server = FrameServer(self, self._welcome)
        self._nodes = NodeCatalog(coordinator)
        self._peers = Peers(config.node_id, self._address_of, rng)
        self._appenders: dict[ServerConnection, None] = {}  # connections that appends came on, in order
        self._paused = False
        self.node = StoreNode(
            config,
            disk=disk,
            coordinator=coordinator,
            clock=clock,
            rng=rng,
            transport=self._peers,
            address="",
            report=report,
            pause_reading=self._pause_reading,
            lease_coordinator=lease_coordinator,
        )
        self.failed = self.node.failed

    @property
    def driver(self) -> Store | None:
        """The driver, for telemetry; None before it runs."""
        return self.node.driver

    @property
    def checkpointer(self) -> Checkpointer | None:
        """Likewise."""
        return self.node.checkpointer

    @property
    def archiver(self) -> Archiver | None:
        """Likewise; None also where there is no archive."""
        return self.node.archiver

    @property
    def peers(self) -> Peers:
        """The links to other stores, for telemetry."""
        return self._peers

    @property
    def catalog(self) -> MetricCatalog:
        """The metrics as this store knows them."""
        return self.node.catalog

    def _address_of(self, node_id: str) -> str | None:
        return self._nodes.address("store", node_id)

    # ------------------------------------------------------------ start and stop

    async def start(self) -> None:
        """Listen, then start the node."""
        # Before anything has a deadline: the first time it compiles for a minute.
        warmup.warm_up(archive=bool(self._config.archive))
        if self._config.archive:
            importlib.import_module("tallymark_store.archive.archiver")  # pyarrow alone takes half a second
        bound = await self._server.start(self._config.listen)
        self.address = self.node.address = self._config.advertise or bound
        await self._nodes.start()
        await self.node.start()

    async def close(self) -> None:
        """Hand the leaderships over, answer what is under way, sync the log, stop. Call it once."""
        await self.node.hand_over()
        self.node.end_tails()
        await self._server.close()
        await self.node.close()
        await self._peers.close()
        await self._nodes.close()

    async def checkpoint(self) -> None:
        """Take a checkpoint now."""
        assert self.node.checkpointer is not None, "start() comes first"
        await self.node.checkpointer.take()

    def _pause_reading(self, paused: bool) -> None:
        """Hold the gateways. Other stores are read on: without their acknowledgements nothing would ever shrink."""
        self._paused = paused
        for connection in self._appenders:
            if paused:
                connection.pause()
            else:
                connection.resume()

    # ------------------------------------------------------------ requests

    def on_frames(self, connection: ServerConnection, frames: list[Frame]) -> None:
        """Take appends."""
        if connection not in self._appenders:
            self._appenders[connection] = None
            if self._paused:
                connection.pause()
        for frame in frames:
            if frame.type != _APPEND:
                connection.respond_error(
                    frame.request_id, UnavailableError("a store takes appends only: send chunks to a gateway")
                )
                continue
            self.node.on_append(connection, frame)

    def on_replicate(self, connection: ServerConnection, frame: Frame) -> None:
        """Take what another store sends."""
        try:
            self.node.on_bundle("", frame.body)
        except RemoteProtocolError as error:
            _log.warning(
                "cut a store's connection: %s", error.message, extra={"peer": connection.peer_name()}
            )
            connection.abort_transport()

    def on_disconnect(self, connection: ServerConnection) -> None:
        """Forget the connection."""
        self._appenders.pop(connection, None)

    def on_call_now(self, connection: ServerConnection, request_id: int, call: Call, deadline: float) -> bool:
        """Answer a read that waits for nothing."""
        if type(call) is not StoreRealtime:
            return super().on_call_now(connection, request_id, call, deadline)
        answer = self.node.call_now(call)
        if answer is None:
            return False
        connection.respond(request_id, _RESULT, encode(answer))
        return True

    async def on_call(self, connection: ServerConnection, call: Call) -> Message:
        """Answer reads, status, and the coordinator's calls if this process hosts it."""
        if isinstance(call, CoordinatorCall):
            if self._hosted is None:
                raise UnavailableError("this store hosts no coordinator", retriable=False)
            return await self._hosted.on_call(call)
        answer = await self.node.call(call, connection)
        return await super().on_call(connection, call) if answer is None else answer

    def _welcome(self) -> Welcome:
        return Welcome(
            version=PROTOCOL_VERSION, node_id=self._config.node_id, role="store", now_ns=self._clock.now_ns()
        )


async def serve(
    config: StoreConfig,
    disk: Disk,
    coordinator: Coordinator,
    clock: Clock,
    rng: random.Random,
    *,
    report: Callable[[str], None],
    hosted: CoordinatorService | None = None,
    lease_coordinator: Callable[[], Coordinator] | None = None,
) -> StoreService:
    """Start a store; close it at the end. `report` is told, in sentences, what takes time or needs attention.

    `lease_coordinator` makes a connection to the coordinator for a thread that renews the lease; without it a task
    of the loop does.

    Raises:
        OSError: the address cannot be listened on.
        DiskError: the data directory cannot be used.
        UnavailableError: another store has this node's name, or its data cannot be used.
    """
    service = StoreService(config, disk, coordinator, clock, rng, report, hosted, lease_coordinator)
    try:
        await service.start()
    except BaseException:
        await service.close()
        raise
    return service
