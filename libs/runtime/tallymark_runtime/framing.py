"""What both ends of a framed TCP connection share: the asyncio shell around a `Connection`.

Owns the transport: it feeds what is read into the pure `Connection`, joins what is written during one turn into one
write, and holds reading while anyone has a reason to. What the frames mean is for its two children:
`transport.ServerConnection` and `peer._Link`.

A **turn** begins when bytes come and ends when all that they caused has been done: what is written meanwhile, to
whichever connection of the loop, goes out at its end, without another round of the loop. What is written outside of
a turn goes out with the loop's next round.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Callable
from typing import Any, Final, cast
from weakref import WeakKeyDictionary

from tallymark_protocol.connection import Connection
from tallymark_protocol.errors import RemoteProtocolError
from tallymark_protocol.frames import Frame

Part = bytes | bytearray | memoryview

# Parts up to this size in all are joined (one copy, one system call); larger ones go out as a vector.
_JOIN_BYTES: Final = 128 * 1024


class Turn:
    """What collects while the bytes of one read are dealt with, by any of the loop's connections.

    Attributes:
        depth: reads being dealt with; what is written or deferred while it is not 0 waits for the turn's end.
        dirty: connections that have something to flush then.
    """

    __slots__ = ("_late", "_loop", "depth", "dirty")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.depth = 0
        self.dirty: list[FramedProtocol] = []
        self._loop = loop
        self._late: list[Callable[[], None]] = []

    def defer(self, callback: Callable[[], None]) -> None:
        """Call `callback` at the turn's end, before anything is flushed; or in the loop's next round."""
        if self.depth:
            self._late.append(callback)
        else:
            self._loop.call_soon(callback)

    def __enter__(self) -> None:
        """Begin a turn, for code that is called by the loop and answers to several connections."""
        self.depth += 1

    def __exit__(self, *_: object) -> None:
        self.depth -= 1
        if not self.depth:
            self.end()

    def end(self) -> None:
        """Do what was deferred, then flush. For whoever began the turn."""
        late = self._late
        if late:
            self.depth = 1  # what the callbacks write is part of the turn
            for callback in late:  # also those that are deferred by these
                try:
                    callback()
                except Exception as error:  # it is none of the connection's whose turn it is
                    self._loop.call_exception_handler(
                        {"message": "a deferred callback failed", "exception": error}
                    )
            late.clear()
            self.depth = 0
        dirty = self.dirty
        if dirty:
            for connection in dirty:
                connection.flush()
            dirty.clear()


_turns: WeakKeyDictionary[asyncio.AbstractEventLoop, Turn] = WeakKeyDictionary()


def turn_of(loop: asyncio.AbstractEventLoop) -> Turn:
    """The loop's turn: one object for as long as the loop lives."""
    turn = _turns.get(loop)
    if turn is None:
        turn = _turns[loop] = Turn(loop)
    return turn


class Hold(enum.IntFlag):
    """Reasons not to read from a connection; it is read while there is none."""

    HANDLER = 1  # the handler asked for it
    SERVER = 2  # the whole server is paused
    WRITE = 4  # the peer doesn't read what we write


class FramedProtocol(asyncio.Protocol):
    """One end of a connection; see the module's docstring."""

    def __init__(
        self, connection: Connection, loop: asyncio.AbstractEventLoop, *, write_buffer_high_bytes: int
    ) -> None:
        self.connection = connection
        self.last_received = loop.time()  # when data last came, on the loop's clock
        self._loop = loop
        self._turn = turn_of(loop)
        self._transport: asyncio.Transport | None = (
            None  # None before connection_made and after connection_lost
        )
        self._write_buffer_high_bytes = write_buffer_high_bytes
        self._parts: list[Part] = []  # written in this turn, not yet handed to the transport
        self._parts_bytes = 0  # their size
        self._held = 0  # reasons not to read, of Hold

    # ------------------------------------------------------------ asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Asyncio: the connection stands."""
        # uvloop's transports are none of asyncio's classes, only shaped like them.
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=self._write_buffer_high_bytes)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        """Asyncio: the connection is gone."""
        self._transport = None
        self._parts.clear()
        self._parts_bytes = 0

    def data_received(self, data: bytes) -> None:
        """Asyncio: bytes came."""
        self.last_received = self._loop.time()
        connection = self.connection
        turn = self._turn
        turn.depth += 1
        try:
            try:
                frames = connection.receive_data(data)
            except RemoteProtocolError as error:
                self.on_broken(error)
                return
            answers = connection.data_to_send()
            if answers:
                self.write(answers)
            if frames:
                self.on_received(frames)
        finally:
            turn.depth -= 1
            if not turn.depth:
                turn.end()

    # ------------------------------------------------------------ for the children

    def on_received(self, frames: list[Frame]) -> None:
        """Take complete frames, at least one."""
        raise NotImplementedError

    def on_broken(self, error: RemoteProtocolError) -> None:
        """Take notice that the peer broke the protocol; the connection must be closed."""
        raise NotImplementedError

    # ------------------------------------------------------------ writing

    @property
    def is_connected(self) -> bool:
        """Whether there is a transport that takes writes."""
        return self._transport is not None and not self._transport.is_closing()

    @property
    def unwritten_bytes(self) -> int:
        """Bytes that the peer has not taken yet."""
        transport = self._transport
        return self._parts_bytes + (transport.get_write_buffer_size() if transport is not None else 0)

    def write(self, *parts: Part) -> None:
        """Write parts in order, together with everything else written in this turn, or round of the loop."""
        if self._transport is None:
            return
        if not self._parts:
            if self._turn.depth:
                self._turn.dirty.append(self)
            else:
                self._loop.call_soon(self.flush)
        for part in parts:
            self._parts.append(part)
            self._parts_bytes += len(part)

    def flush(self) -> None:
        """Hand what was written to the transport now."""
        parts = self._parts
        if not parts:
            return
        size = self._parts_bytes
        self._parts = []
        self._parts_bytes = 0
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        if len(parts) == 1:
            transport.write(parts[0])
        elif size <= _JOIN_BYTES:
            transport.write(b"".join(parts))
        else:
            transport.writelines(parts)

    # ------------------------------------------------------------ holding

    def hold(self, reason: Hold) -> None:
        """Read no more until every reason given is released."""
        before = self._held
        self._held = before | reason
        if not before and self.is_connected:
            assert self._transport is not None
            self._transport.pause_reading()

    def release(self, reason: Hold) -> None:
        """Take a reason back; reading goes on when it was the last."""
        before = self._held
        self._held = before & ~reason
        if before and not self._held and self.is_connected:
            assert self._transport is not None
            self._transport.resume_reading()

    # ------------------------------------------------------------ closing

    def close_transport(self) -> None:
        """Write out what is queued, then close."""
        self.flush()
        if self._transport is not None:
            self._transport.close()

    def abort_transport(self) -> None:
        """Close at once; what is queued is dropped."""
        self._parts.clear()
        self._parts_bytes = 0
        if self._transport is not None:
            self._transport.abort()

    def peer_name(self) -> str:
        """The peer's address, for messages."""
        name: Any = self._transport.get_extra_info("peername") if self._transport is not None else None
        return f"{name[0]}:{name[1]}" if isinstance(name, tuple) and len(name) >= 2 else "unknown"


def split_address(address: str) -> tuple[str, int]:
    """Split `host:port` or `[v6 host]:port`. Raises ValueError."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65_535:
        raise ValueError(f"{address!r} is no address of the form host:port")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    return host, int(port)


def join_address(host: str, port: int) -> str:
    """Make an address of the form that `split_address` takes."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
