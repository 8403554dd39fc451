"""One framed connection to a gateway or query node: the asyncio shell around a `Connection`.

Owns the transport and which request id belongs to whom. It knows nothing of chunks, retries or other links. All
that is written in one tick of the loop goes out in one write; answers are handed to their `Exchange` as they
come. A link that is lost says so to each exchange that still waits, once.
"""

from __future__ import annotations

import asyncio
from typing import Final, Protocol, cast

from tallymark_protocol.codec import decode_error
from tallymark_protocol.connection import Connection, Role, State
from tallymark_protocol.errors import (
    ErrorCode,
    InvalidRequestError,
    RemoteProtocolError,
    TallymarkError,
    UnavailableError,
    error_from_wire,
)
from tallymark_protocol.frames import REQUEST_ID_MAX
from tallymark_protocol.messages import (
    PROTOCOL_VERSION,
    PROTOCOL_VERSION_MIN,
    FrameType,
    Hello,
    Welcome,
)

_JOIN_BYTES: Final = 128 * 1024  # parts up to this size in all are joined, larger ones go out as a vector
_ERROR: Final = int(FrameType.ERROR)
_ANSWERS: Final = frozenset({int(FrameType.RECEIPT), int(FrameType.RESULT), _ERROR})


class Exchange(Protocol):
    """Whoever waits for an answer. Exactly one of the two methods is called, once."""

    def answered(self, kind: int, body: bytes) -> None:
        """Take the answer: RECEIPT, RESULT or ERROR."""

    def lost(self, error: TallymarkError) -> None:
        """Take notice that no answer will come: the request may have taken effect or not."""


class LinkOwner(Protocol):
    """Whoever opened a link."""

    def link_draining(self, link: Link) -> None:
        """Send nothing more over this link; answers under way still come."""

    def link_lost(self, link: Link) -> None:
        """Forget this link."""


class Link(asyncio.Protocol):
    """A connection after its handshake. `open_link` makes one."""

    def __init__(self, address: str, loop: asyncio.AbstractEventLoop, owner: LinkOwner) -> None:
        self.address = address
        self.ready: asyncio.Future[None] = loop.create_future()
        self.welcome: Welcome | None = None  # set once `ready` is done
        self.started = 0.0  # when HELLO was sent, on the loop's clock
        self.last_received = 0.0  # when bytes last came, on the loop's clock
        self.waiting_since = 0.0  # when it last began to owe an answer, on the loop's clock
        self._loop = loop
        self._owner = owner
        self._connection = Connection(Role.CLIENT)
        self._transport: asyncio.Transport | None = None
        self._exchanges: dict[int, Exchange] = {}  # by request id; each is told once
        self._next_id = 1
        self._parts: list[bytes] = []  # written in this tick, not yet handed to the transport
        self._parts_bytes = 0
        self._last_parts = 0  # how many were handed over at once the last time; a request is two

    # ------------------------------------------------------------ asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Asyncio: the connection stands."""
        self._transport = cast("asyncio.Transport", transport)
        self.started = self.last_received = self._loop.time()
        hello = Hello(
            version_min=PROTOCOL_VERSION_MIN, version_max=PROTOCOL_VERSION, software="tallymark-python"
        )
        self._transport.write(self._connection.initiate(hello))

    def data_received(self, data: bytes) -> None:
        """Asyncio: bytes came."""
        self.last_received = self._loop.time()
        connection = self._connection
        try:
            frames = connection.receive_data(data)
        except RemoteProtocolError as error:
            self._fail(error)
            return
        own = connection.data_to_send()
        if own:
            self._write(own)
        exchanges = self._exchanges
        for frame in frames:
            if frame.type in _ANSWERS and frame.request_id:
                exchange = exchanges.pop(frame.request_id, None)
                if exchange is not None:
                    exchange.answered(frame.type, frame.body)
            elif frame.type == FrameType.WELCOME:
                self.welcome = connection.welcome
                if not self.ready.done():
                    self.ready.set_result(None)
            elif frame.type == FrameType.GOAWAY:
                self._owner.link_draining(self)
        if connection.state is State.CLOSED:
            refusal = connection.refusal
            assert refusal is not None, "only a refusal closes a connection from the other side"
            self._fail(error_from_wire(refusal.code, refusal.retriable, refusal.message, refusal.details))
        elif connection.state is State.DRAINING and not exchanges:
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Asyncio: the connection is gone."""
        detail = f": {exc}" if exc is not None else ""
        self._fail(
            UnavailableError(f"the connection to {self.address} was lost{detail}", code=ErrorCode.CLOSED)
        )

    # ------------------------------------------------------------ requests

    @property
    def usable(self) -> bool:
        """Whether requests can be sent."""
        return self._transport is not None and self._connection.state is State.OPEN

    @property
    def waiting(self) -> int:
        """How many requests have no answer yet."""
        return len(self._exchanges)

    def request(self, kind: FrameType, body: bytes, exchange: Exchange, timeout_ms: int) -> None:
        """Send a request. The link must be usable; `exchange` is told the answer, or that there won't be one.

        Raises:
            LocalProtocolError: the body is larger than a frame may be; nothing was sent.
        """
        assert self._transport is not None, "a request needs a usable link"
        request_id = self._next_id
        while request_id in self._exchanges:
            request_id = request_id % REQUEST_ID_MAX + 1
        header = self._connection.send_header(kind, len(body), request_id=request_id, timeout_ms=timeout_ms)
        self._next_id = request_id % REQUEST_ID_MAX + 1
        exchanges = self._exchanges
        is_alone = False
        if not exchanges:
            self.waiting_since = self._loop.time()
            is_alone = not self._parts and self._last_parts <= 2
        exchanges[request_id] = exchange
        if is_alone:
            # A lone caller's request waits for no other. Where several call at once, the first of them would go
            # alone each time, so this is done only while requests have been coming one by one.
            self._last_parts = 2
            self._transport.write(header + body if len(body) <= _JOIN_BYTES else header)
            if len(body) > _JOIN_BYTES:
                self._transport.write(body)
            return
        self._write(header)
        self._write(body)

    def ping(self) -> None:
        """Ask for a sign of life: `last_received` moves when it comes."""
        if self.usable:
            self._write(self._connection.send(FrameType.PING))

    def _write(self, data: bytes) -> None:
        if not self._parts:
            self._loop.call_soon(self._flush)
        self._parts.append(data)
        self._parts_bytes += len(data)

    def _flush(self) -> None:
        parts = self._parts
        size = self._parts_bytes
        self._parts = []
        self._parts_bytes = 0
        self._last_parts = len(parts)
        transport = self._transport
        if transport is None or not parts:
            return
        if size <= _JOIN_BYTES:
            transport.write(b"".join(parts))
        else:
            transport.writelines(parts)

    # ------------------------------------------------------------ the end

    def close(self) -> None:
        """Write out what is queued, then close."""
        self._flush()
        if self._transport is not None:
            self._transport.close()

    def abort(self, reason: str) -> None:
        """Close at once."""
        self._fail(UnavailableError(reason, code=ErrorCode.CLOSED))

    def abandon(self) -> None:
        """Forget the transport without touching it: after a fork it is the parent's."""
        self._transport = None
        self._exchanges.clear()
        self._parts.clear()

    def _fail(self, error: TallymarkError) -> None:
        transport, self._transport = self._transport, None
        if transport is None:
            if not self.ready.done():
                self.ready.set_exception(error)
            return
        transport.abort()
        if not self.ready.done():
            self.ready.set_exception(error)
        exchanges, self._exchanges = self._exchanges, {}
        # The owner first: whoever sends again at once must not choose this link.
        self._owner.link_lost(self)
        for exchange in exchanges.values():
            exchange.lost(error)


class Answer:
    """An exchange that a coroutine awaits."""

    __slots__ = ("future",)

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.future: asyncio.Future[bytes] = loop.create_future()

    def answered(self, kind: int, body: bytes) -> None:
        """Give the body to whoever awaits it, or raise the ERROR there."""
        if self.future.done():
            return
        if kind == _ERROR:
            try:
                self.future.set_exception(decode_error(body))
            except RemoteProtocolError as error:
                self.future.set_exception(error)
        else:
            self.future.set_result(body)

    def lost(self, error: TallymarkError) -> None:
        """Raise the loss where the answer is awaited."""
        if not self.future.done():
            self.future.set_exception(error)


async def open_link(address: str, loop: asyncio.AbstractEventLoop, owner: LinkOwner, timeout: float) -> Link:
    """Connect to `host:port` and shake hands.

    Raises:
        UnavailableError: nobody there, or no answer within `timeout` seconds.
        InvalidRequestError: `address` is none, or the server speaks no common version.
    """
    host, port = split_address(address)
    link = Link(address, loop, owner)
    try:
        async with asyncio.timeout(timeout):
            await loop.create_connection(lambda: link, host, port)
            await link.ready
    except TimeoutError:
        link.abort("the handshake took too long")
        _consume(link.ready)
        raise UnavailableError(
            f"{address} didn't answer within {timeout:.1f} s", code=ErrorCode.TIMEOUT
        ) from None
    except (OSError, ValueError) as error:  # ValueError: a host name that can't be one
        _consume(link.ready)
        raise UnavailableError(f"can't connect to {address}: {error}", code=ErrorCode.CLOSED) from error
    except BaseException:
        link.abort("given up")
        _consume(link.ready)
        raise
    return link


def _consume(future: asyncio.Future[None]) -> None:
    """Mark a future's exception as seen."""
    if not future.done():
        future.cancel()
    elif not future.cancelled():
        future.exception()


def split_address(address: str) -> tuple[str, int]:
    """Split `host:port` or `[v6 host]:port`.

    Raises:
        InvalidRequestError: it is neither.
    """
    host, colon, port = address.rpartition(":")
    if not colon or not host or not (port.isascii() and port.isdigit()) or int(port) > 65_535:
        raise InvalidRequestError(f"{address!r} is no address of the form host:port")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    return host, int(port)
