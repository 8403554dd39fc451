"""The server side of the frame protocol: `FrameServer` and its connections.

Owns listening sockets, handshakes, the dispatch of calls, back-pressure and graceful stops; what requests mean is
the handler's. INGEST and APPEND frames go to the handler synchronously, all that came with one read in one call,
so that it can join them; a CALL becomes a task that the server bounds, times out and answers. Answers are written
with `ServerConnection.respond`; those of one tick of the loop go out in one write.

What is bounded, and what happens beyond it (`ServerLimits`):

- connections: a further one is refused with OVERLOADED;
- calls under way, per connection and in all: a further one is answered with OVERLOADED;
- requests of the data plane: by the handler, which pauses a connection or the whole server;
- answers that a peer does not read: the connection is not read while they pile up, and is cut beyond a bound;
- incomplete frames, of all connections: the one that goes beyond is refused with OVERLOADED;
- silence: before the handshake is done, within a frame, and between requests.

The client side is `peer.PeerClient`.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable
from contextvars import ContextVar
from typing import Final, Protocol, overload

import msgspec

from tallymark_protocol.codec import decode_call, encode
from tallymark_protocol.connection import Connection, Role, State
from tallymark_protocol.errors import (
    BackpressureError,
    ErrorCode,
    LocalProtocolError,
    RemoteProtocolError,
    UnavailableError,
    WireError,
    to_wire,
)
from tallymark_protocol.frames import Frame
from tallymark_protocol.messages import Call, FrameType, Message, Welcome
from tallymark_runtime.framing import FramedProtocol, Hold, Part, join_address, split_address

_log = logging.getLogger(__name__)

_CALL: Final = int(FrameType.CALL)
_RESULT: Final = int(FrameType.RESULT)
_ERROR: Final = int(FrameType.ERROR)
_PONG: Final = int(FrameType.PONG)
_REPLICATE: Final = int(FrameType.REPLICATE)


_deadline: Final[ContextVar[float]] = ContextVar("deadline")


@overload
def call_deadline() -> float: ...
@overload
def call_deadline(default: None) -> float | None: ...
def call_deadline(default: float | None = 0.0) -> float | None:
    """When the caller of the call under way gives up, on the loop's clock. For code that `on_call` runs.

    `default` is for code that others run, too.
    """
    return _deadline.get(default) if default is None else _deadline.get()


class ServerLimits(msgspec.Struct, frozen=True, kw_only=True):
    """The bounds of one server."""

    connections_max: int = 4_096
    calls_per_connection_max: int = 256  # under way
    calls_max: int = 4_096  # under way, of all connections
    call_timeout_s: float = 120.0  # for calls that don't say how long they wait, and at most
    handshake_timeout_s: float = 10.0  # from the connection's start to its HELLO
    frame_timeout_s: float = 60.0  # without a byte, while a frame is incomplete
    idle_timeout_s: float = 900.0  # without a byte, while nothing is under way
    partial_bytes_max: int = 512 * 1024 * 1024  # of incomplete frames, of all connections
    sweep_interval_s: float = 5.0  # how often the two are looked at
    write_buffer_high_bytes: int = 1024 * 1024  # unread answers from which on a connection is not read
    write_buffer_max_bytes: int = 128 * 1024 * 1024  # unread answers at which it is cut
    linger_s: float = 0.5  # at a stop, how long clients have to close by themselves


_DEFAULT_LIMITS: Final = ServerLimits()
_ROLE_NAMES: Final = {
    "ingest": "gateway",
    "store": "store",
    "query": "query node",
    "alerts": "alerts instance",
}


class FrameHandler(Protocol):
    """What a server does with requests. `HandlerBase` has defaults."""

    def on_frames(self, connection: ServerConnection, frames: list[Frame]) -> None:
        """Take INGEST and APPEND frames, all that one read brought, in order.

        Each must be answered once, now or later, with `connection.respond` or `respond_error`.
        """
        ...

    def on_call_now(self, connection: ServerConnection, request_id: int, call: Call, deadline: float) -> bool:
        """Take a call without a task of its own, which is a good part of what a small one costs; False: `on_call` does.

        Who takes it answers it once, now or later, or hands it on with `connection.run_call`. `deadline` is when its
        caller gives up, on the loop's clock. A raised error is the answer.
        """
        ...

    async def on_call(self, connection: ServerConnection, call: Call) -> Message:
        """Answer a call; a raised error travels as such. Cancelled when the caller's time is up or it is gone."""
        ...

    def on_replicate(self, connection: ServerConnection, frame: Frame) -> None:
        """Take a one-way frame; it is never answered."""
        ...

    def on_disconnect(self, connection: ServerConnection) -> None:
        """Take notice that a connection is gone: what is not answered yet needs no answer any more."""
        ...


class HandlerBase:
    """A handler that refuses everything; servers override what they serve."""

    def on_frames(self, connection: ServerConnection, frames: list[Frame]) -> None:
        """Refuse all of them."""
        text = f"{connection.server_name()} doesn't take such requests; clients talk to gateways"
        error = WireError(int(ErrorCode.INVALID_ARGUMENT), False, text)
        for frame in frames:
            connection.respond_error(frame.request_id, error)

    def on_call_now(
        self,
        connection: ServerConnection,  # noqa: ARG002
        request_id: int,  # noqa: ARG002
        call: Call,  # noqa: ARG002
        deadline: float,  # noqa: ARG002
    ) -> bool:
        """Take none."""
        return False

    async def on_call(self, connection: ServerConnection, call: Call) -> Message:
        """Refuse it."""
        raise UnavailableError(
            f"{connection.server_name()} doesn't answer calls of type {type(call).__name__}; clients talk to gateways",
            code=ErrorCode.INVALID_ARGUMENT,
            retriable=False,
        )

    def on_replicate(self, connection: ServerConnection, frame: Frame) -> None:
        """Pass over it."""

    def on_disconnect(self, connection: ServerConnection) -> None:
        """Do nothing."""


class ServerConnection(FramedProtocol):
    """One client's connection, as a handler sees it.

    Attributes:
        id: unique within the server, for dictionaries and logs.
        in_flight: requests received and not yet answered.
    """

    def __init__(self, server: FrameServer, connection_id: int, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(
            Connection(Role.SERVER), loop, write_buffer_high_bytes=server.limits.write_buffer_high_bytes
        )
        self.id = connection_id
        self.in_flight = 0
        self._server = server
        self._calls: set[asyncio.Task[None]] = set()
        self._started = loop.time()
        self._partial_bytes = 0  # kept of a frame that is not complete, as the server has counted it
        self._watched = False  # whether the server wants to know when everything is answered

    # ------------------------------------------------------------ for handlers

    def respond(self, request_id: int, kind: int, body: Part, *more: Part) -> None:
        """Answer a request with a frame of type `kind`; `more` are further parts of its body.

        Parts are not copied: don't change them afterwards. Does nothing when the connection is gone.
        """
        self.in_flight -= 1
        if self._transport is not None:
            size = len(body)
            for part in more:
                size += len(part)
            try:
                header = self.connection.send_header(kind, size, request_id=request_id)
            except LocalProtocolError as error:
                if error.code != ErrorCode.TOO_LARGE:
                    if self.connection.state in (State.CLOSED, State.BROKEN):
                        return  # refused meanwhile; its requests need no answers
                    raise
                header, body, more = self._too_large(request_id, error), b"", ()
            if size <= _COPY_BYTES and not more:
                self.write(header + body)
            else:
                self.write(header, body, *more)
            if self._parts_bytes > self._write_buffer_high_bytes:
                self.flush()
                self._check_unread()
        if self._watched and self.in_flight <= 0:
            self._server.on_answered()

    def respond_error(self, request_id: int, error: BaseException | WireError) -> None:
        """Answer a request with an error."""
        wire = error if isinstance(error, WireError) else to_wire(error)
        self.respond(request_id, _ERROR, encode(wire))

    def server_name(self) -> str:
        """Say which server this is, for an error: its role, its name and where this client reached it."""
        welcome = self._server.make_welcome()
        kind = " and ".join(_ROLE_NAMES.get(role, role) for role in welcome.role.split("+"))
        where = self._transport.get_extra_info("sockname") if self._transport is not None else None
        address = f"{join_address(*where[:2])}, " if isinstance(where, tuple) else ""
        return f"{address}the {kind} {welcome.node_id!r},"

    def pause(self) -> None:
        """Read nothing more from this connection until `resume`."""
        self.hold(Hold.HANDLER)

    def resume(self) -> None:
        """Read on."""
        self.release(Hold.HANDLER)

    def close(self) -> None:
        """Write what was answered, then close the connection."""
        self.close_transport()

    # ------------------------------------------------------------ asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Asyncio: a client connected."""
        super().connection_made(transport)
        self._server.on_connected(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Asyncio: the client is gone, or we closed."""
        super().connection_lost(exc)
        for task in self._calls:
            task.cancel()
        self._server.partial_bytes -= self._partial_bytes
        self._partial_bytes = 0
        self._server.on_lost(self)

    def data_received(self, data: bytes) -> None:
        """Asyncio: bytes came."""
        super().data_received(data)
        partial_bytes = self.connection.buffered_bytes
        if partial_bytes != self._partial_bytes and self._transport is not None:
            server = self._server
            server.partial_bytes += partial_bytes - self._partial_bytes
            self._partial_bytes = partial_bytes
            if partial_bytes and server.partial_bytes > server.limits.partial_bytes_max:
                self._refuse(to_wire(BackpressureError("the server has too many incomplete requests")))

    def pause_writing(self) -> None:
        """Asyncio: the client reads its answers more slowly than we write them; take no more work from it.

        Only a server may do so: if clients held their reading as well, both could wait for each other for ever.
        """
        self.hold(Hold.WRITE)
        self._check_unread()

    def resume_writing(self) -> None:
        """Asyncio: the client has caught up."""
        self.release(Hold.WRITE)

    def _check_unread(self) -> None:
        if self.unwritten_bytes > self._server.limits.write_buffer_max_bytes:
            _log.warning("cut a connection that doesn't read its answers", extra={"peer": self.peer_name()})
            self.abort_transport()

    def _too_large(self, request_id: int, error: LocalProtocolError) -> bytes:
        wire = WireError(int(ErrorCode.TOO_LARGE), False, f"the answer is too large: {error.message}")
        return self.connection.send(_ERROR, encode(wire), request_id=request_id)

    # ------------------------------------------------------------ frames

    def on_received(self, frames: list[Frame]) -> None:
        """Dispatch what came."""
        connection = self.connection
        first = frames[0]
        if first.type == FrameType.HELLO:
            self._greet()
            return  # the protocol allows nothing behind HELLO before its answer
        if connection.state is not State.OPEN:
            self._refuse_crossed(frames)
            return
        data_plane: list[Frame] = []
        for frame in frames:
            kind = frame[0]
            if kind == _CALL:
                self._dispatch(frame)
            elif kind == _REPLICATE:
                self._server.handler.on_replicate(self, frame)
                if self._transport is None or self._transport.is_closing():
                    return  # the handler has cut it
            elif kind != _PONG:
                data_plane.append(frame)
        if data_plane:
            self.in_flight += len(data_plane)
            self._server.handler.on_frames(self, data_plane)

    def on_broken(self, error: RemoteProtocolError) -> None:
        """Tell the client what was wrong, then close."""
        self._refuse(to_wire(error))

    def _refuse(self, error: WireError) -> None:
        self.write(self.connection.refuse(error))
        self.close_transport()

    def _greet(self) -> None:
        if self._server.is_closing:
            self._refuse(WireError(int(ErrorCode.CLOSED), True, "the server is stopping"))
            return
        self.write(self.connection.accept(self._server.make_welcome()))
        if not self.connection.is_open:
            self.close_transport()

    def _refuse_crossed(self, frames: list[Frame]) -> None:
        """Refuse requests that the client sent before it saw our GOAWAY: they had no effect."""
        error = UnavailableError("the server is stopping", code=ErrorCode.CLOSED)
        for frame in frames:
            if frame.type not in (_PONG, _REPLICATE):
                self.in_flight += 1
                self.respond_error(frame.request_id, error)

    # ------------------------------------------------------------ calls

    def _dispatch(self, frame: Frame) -> None:
        self.in_flight += 1
        server = self._server
        timeout_s = server.limits.call_timeout_s
        if frame.timeout_ms:
            timeout_s = min(timeout_s, frame.timeout_ms / 1000)
        deadline = self._loop.time() + timeout_s
        request_id = frame.request_id
        try:
            call = decode_call(frame.body)
            taken = server.handler.on_call_now(self, request_id, call, deadline)
        except Exception as error:
            self._call_failed(request_id, error)
        else:
            if not taken:
                self.run_call(request_id, call, deadline)

    def run_call(self, request_id: int, call: Call, deadline: float) -> None:
        """Have the handler's `on_call` answer a call, in a task; refuse it if there are too many."""
        server = self._server
        bounds = server.limits
        if self._transport is None:
            self.respond_error(request_id, UnavailableError("the caller is gone"))  # nobody hears it
            return
        if len(self._calls) >= bounds.calls_per_connection_max or server.calls >= bounds.calls_max:
            self.respond_error(request_id, BackpressureError("too many calls are under way"))
            return
        server.calls += 1
        task = self._loop.create_task(self._run_call(request_id, call, deadline))
        self._calls.add(task)
        task.add_done_callback(self._call_done)

    def _call_done(self, task: asyncio.Task[None]) -> None:
        self._calls.discard(task)
        self._server.calls -= 1

    def _call_failed(self, request_id: int, error: Exception) -> None:
        if to_wire(error).code == ErrorCode.INTERNAL:
            _log.error("a call failed", exc_info=error, extra={"peer": self.peer_name()})
        self.respond_error(request_id, error)

    async def _run_call(self, request_id: int, call: Call, deadline: float) -> None:
        begun = self._loop.time()
        try:
            _deadline.set(deadline)
            async with asyncio.timeout_at(deadline):
                result = await self._server.handler.on_call(self, call)
            body = encode(result)
        except TimeoutError:
            self.respond_error(
                request_id,
                UnavailableError(
                    f"the call took more than {max(deadline - begun, 0.0):.3g} s", code=ErrorCode.TIMEOUT
                ),
            )
        except Exception as error:
            self._call_failed(request_id, error)
        else:
            self.respond(request_id, _RESULT, body)

    # ------------------------------------------------------------ for the server

    def sweep(self, now: float) -> None:
        """Close the connection if it has been silent for too long."""
        bounds = self._server.limits
        if self.connection.state in (State.START, State.GREETING):
            if now - self._started > bounds.handshake_timeout_s:
                self._refuse(WireError(int(ErrorCode.TIMEOUT), True, "no HELLO came in time"))
            return
        if self._held:
            # We don't read it, so its silence means nothing, unless it doesn't read us either.
            if self._held == Hold.WRITE and now - self.last_received > bounds.idle_timeout_s:
                self.abort_transport()
            return
        silent_s = now - self.last_received
        if self.connection.buffered_bytes and silent_s > bounds.frame_timeout_s:
            self._refuse(WireError(int(ErrorCode.TIMEOUT), True, "a frame was not completed in time"))
        elif not self.in_flight and silent_s > bounds.idle_timeout_s:
            self.close_transport()

    def go_away(self) -> None:
        """Tell the client that nothing new is taken."""
        self._watched = True
        if self.connection.state is State.OPEN:
            self.write(self.connection.send(FrameType.GOAWAY))
        elif self.connection.state is not State.DRAINING:
            self.close_transport()


_COPY_BYTES: Final = 16 * 1024  # bodies up to this size are joined with their header at once


class FrameServer:
    """Serves the frame protocol on one or more addresses.

    Args:
        handler: what to do with requests.
        welcome: makes the answer to a HELLO; version and features are negotiated from it.
        limits: the bounds.

    Attributes:
        addresses: "host:port" of every listening socket, once started.
        calls: CALLs under way.
        partial_bytes: kept of incomplete frames, of all connections.
        is_closing: whether `close` has been called.
    """

    def __init__(
        self,
        handler: FrameHandler,
        welcome: Callable[[], Welcome],
        *,
        limits: ServerLimits = _DEFAULT_LIMITS,
    ) -> None:
        self.handler = handler
        self.limits = limits
        self.addresses: list[str] = []
        self.calls = 0
        self.partial_bytes = 0
        self.is_closing = False
        self.make_welcome = welcome
        self._connections: dict[int, ServerConnection] = {}
        self._ids = itertools.count(1)
        self._servers: list[asyncio.Server] = []
        self._paused = False
        self._sweeper: asyncio.TimerHandle | None = None
        self._changed: asyncio.Event = asyncio.Event()  # set while closing, when a connection answers or goes
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def address(self) -> str:
        """The first address it listens on."""
        assert self.addresses, "start() comes first"
        return self.addresses[0]

    @property
    def connections(self) -> list[ServerConnection]:
        """The connections that stand."""
        return list(self._connections.values())

    async def start(self, address: str = "127.0.0.1:0") -> str:
        """Listen on `address` ("host:port"; port 0 takes a free one); return it with the real port.

        Raises:
            OSError: the address can't be listened on.
        """
        host, port = split_address(address)
        loop = self._loop = asyncio.get_running_loop()
        server = await loop.create_server(
            lambda: ServerConnection(self, next(self._ids), loop), host, port, backlog=1_024
        )
        self._servers.append(server)
        bound = join_address(host, server.sockets[0].getsockname()[1])
        self.addresses.append(bound)
        if self._sweeper is None:
            self._sweeper = loop.call_later(self.limits.sweep_interval_s, self._sweep)
        return bound

    def pause(self) -> None:
        """Read from no connection until `resume`. New connections can greet, and are not read after that."""
        self._paused = True
        for connection in self._connections.values():
            connection.hold(Hold.SERVER)

    def resume(self) -> None:
        """Read from connections again."""
        self._paused = False
        for connection in self._connections.values():
            connection.release(Hold.SERVER)

    async def close(self, *, deadline_s: float = 10.0) -> None:
        """Stop: take no new connections and requests, answer what is under way, then close.

        What is not answered after `deadline_s` is dropped. Call it once.
        """
        self.is_closing = True
        if self._sweeper is not None:
            self._sweeper.cancel()
        for server in self._servers:
            server.close()
        for connection in self.connections:
            connection.go_away()
            connection.release(Hold.SERVER | Hold.HANDLER)
        await self._wait_until(lambda: all(c.in_flight <= 0 for c in self._connections.values()), deadline_s)
        # A close now could reset connections whose clients still have requests on the way, and with them the
        # answers: clients that know GOAWAY close by themselves.
        await self._wait_until(lambda: not self._connections, min(self.limits.linger_s, deadline_s))
        for connection in self.connections:
            connection.close()
        await self._wait_until(lambda: not self._connections, self.limits.linger_s)
        for connection in self.connections:
            connection.abort_transport()
        await self._wait_until(lambda: not self._connections, self.limits.linger_s)
        for server in self._servers:
            await server.wait_closed()

    async def _wait_until(self, condition: Callable[[], bool], timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                while not condition():
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            pass

    # ------------------------------------------------------------ for connections

    def on_connected(self, connection: ServerConnection) -> None:
        """A connection stands."""
        full = len(self._connections) >= self.limits.connections_max
        self._connections[connection.id] = connection
        if full:
            error = BackpressureError("the server has too many connections")
            connection.write(connection.connection.refuse(to_wire(error)))
            connection.close_transport()
        elif self._paused:
            connection.hold(Hold.SERVER)

    def on_lost(self, connection: ServerConnection) -> None:
        """A connection is gone."""
        self._connections.pop(connection.id, None)
        self._changed.set()
        if connection.connection.hello is not None:
            self.handler.on_disconnect(connection)

    def on_answered(self) -> None:
        """Everything that came on some connection is answered; told of while the server closes."""
        self._changed.set()

    def _sweep(self) -> None:
        assert self._loop is not None
        now = self._loop.time()
        for connection in self.connections:
            connection.sweep(now)
        self._sweeper = self._loop.call_later(self.limits.sweep_interval_s, self._sweep)
