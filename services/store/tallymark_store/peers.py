"""Links to other stores over TCP: one connection to each, for bundles, one way.

Owns the sockets and nothing of what is in the bundles. A link connects when there is something to send, and again
with a growing, jittered wait after it broke. Nothing is kept for later: what is sent while a link is not up, or while
too much waits in it already, is dropped, and the replicas' own timers send again what matters.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Sequence
from typing import Any, Final

from tallymark_protocol.connection import Connection, Role, State
from tallymark_protocol.errors import LocalProtocolError, RemoteProtocolError
from tallymark_protocol.frames import Frame
from tallymark_protocol.messages import PROTOCOL_VERSION, PROTOCOL_VERSION_MIN, FrameType, Hello
from tallymark_runtime.disk import BytesLike
from tallymark_runtime.framing import FramedProtocol, split_address

_log = logging.getLogger(__name__)

UNSENT_BYTES_MAX: Final = 64 * 1024 * 1024  # in a link: what comes on top is dropped
CONNECT_S: Final = 2.0  # for one attempt
BACKOFF_MIN_S: Final = 0.02
BACKOFF_MAX_S: Final = 0.5
SILENCE_S: Final = 4.0  # a peer that answers no PING for so long is connected to anew
PING_S: Final = 1.0

_REPLICATE: Final = int(FrameType.REPLICATE)


class _Link(FramedProtocol):
    """One connection, from its handshake to its end."""

    def __init__(self, hello: Hello, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(Connection(Role.CLIENT), loop, write_buffer_high_bytes=UNSENT_BYTES_MAX)
        self._hello = hello
        self.greeted: asyncio.Future[str] = loop.create_future()  # the peer's node id
        self.lost: asyncio.Future[None] = loop.create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Asyncio: connected."""
        super().connection_made(transport)
        self.write(self.connection.initiate(self._hello))

    def connection_lost(self, exc: Exception | None) -> None:
        """Asyncio: the connection is gone."""
        super().connection_lost(exc)
        if not self.greeted.done():
            self.greeted.cancel()
        if not self.lost.done():
            self.lost.set_result(None)

    def on_received(self, frames: list[Frame]) -> None:
        """Take the greeting; nothing else is expected."""
        connection = self.connection
        for frame in frames:
            if frame.type == FrameType.WELCOME and connection.welcome is not None:
                if not self.greeted.done():
                    self.greeted.set_result(connection.welcome.node_id)
            elif connection.state is not State.OPEN:
                self.close_transport()

    def on_broken(self, error: RemoteProtocolError) -> None:
        """Cut the connection: what the peer says makes no sense."""
        _log.warning("a store speaks nonsense: %s", error.message)
        self.abort_transport()

    def ping(self) -> None:
        """Ask for a sign of life."""
        if self.connection.is_open and self.is_connected:
            self.write(self.connection.send(FrameType.PING))

    def send(self, parts: Sequence[BytesLike]) -> bool:
        """Send a bundle; False where it was dropped."""
        if not self.connection.is_open or not self.is_connected or self.unwritten_bytes > UNSENT_BYTES_MAX:
            return False
        size = sum([len(part) for part in parts])
        try:
            header = self.connection.send_header(_REPLICATE, size)
        except LocalProtocolError as error:
            _log.error("a bundle could not be sent: %s", error.message)
            return False
        self.write(header, *[part if isinstance(part, bytes) else _view(part) for part in parts])
        self.flush()  # the end of the turn has come already
        return True


def _view(part: Any) -> memoryview:
    return memoryview(part)


class Peers:
    """The links of a store; the `Transport` port.

    Args:
        node_id: this store's.
        address_of: where a node is reached now; None where it is not registered.
        rng: for the jitter of reconnecting.

    Attributes:
        dropped: bundles that were not sent, since the start.
    """

    def __init__(self, node_id: str, address_of: Callable[[str], str | None], rng: random.Random) -> None:
        self.dropped = 0
        self._address_of = address_of
        self._rng = rng
        self._hello = Hello(PROTOCOL_VERSION_MIN, PROTOCOL_VERSION, f"tallymark store {node_id}")
        self._links: dict[str, _Link] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._closed = False

    def send(self, node_id: str, parts: Sequence[BytesLike]) -> bool:
        """Send a bundle; see the port."""
        link = self._links.get(node_id)
        if link is not None and link.send(parts):
            return True
        self.dropped += 1
        if link is not None:
            return False
        if node_id not in self._tasks and not self._closed:
            self._tasks[node_id] = asyncio.get_running_loop().create_task(self._keep(node_id))
        return False

    def unsent_bytes(self) -> dict[str, int]:
        """What waits in each link that is up, by node id."""
        return {node_id: link.unwritten_bytes for node_id, link in self._links.items()}

    async def _keep(self, node_id: str) -> None:
        """Keep a link to a node for as long as it is registered."""
        wait_s = BACKOFF_MIN_S
        try:
            while not self._closed:
                address = self._address_of(node_id)
                if address is None:
                    return
                link = await self._connect(node_id, address)
                if link is not None:
                    wait_s = BACKOFF_MIN_S
                    self._links[node_id] = link
                    try:
                        await self._watch(node_id, address, link)
                    finally:
                        self._links.pop(node_id, None)
                        link.abort_transport()
                await asyncio.sleep(wait_s * (0.5 + self._rng.random()))
                wait_s = min(2 * wait_s, BACKOFF_MAX_S)
        finally:
            self._tasks.pop(node_id, None)

    async def _connect(self, node_id: str, address: str) -> _Link | None:
        loop = asyncio.get_running_loop()
        link: _Link | None = None
        try:
            host, port = split_address(address)
            async with asyncio.timeout(CONNECT_S):
                _, link = await loop.create_connection(lambda: _Link(self._hello, loop), host, port)
                found = await link.greeted
        except (OSError, TimeoutError, ValueError) as error:
            _log.debug("%s at %s is not reached: %s", node_id, address, error)
        except asyncio.CancelledError:
            if link is None or not link.lost.done():  # else the link was lost, and not this task cancelled
                if link is not None:
                    link.abort_transport()
                raise
        else:
            if found == node_id:
                return link
            _log.warning("%s was to be at %s, where %s is", node_id, address, found)
        if link is not None:
            link.abort_transport()
        return None

    async def _watch(self, node_id: str, address: str, link: _Link) -> None:
        """Return when a link is lost, dead, or leads to where the node is no more."""
        loop = asyncio.get_running_loop()
        while not link.lost.done():
            link.ping()
            try:
                async with asyncio.timeout(PING_S):
                    await asyncio.shield(link.lost)
            except TimeoutError:
                pass
            if loop.time() - link.last_received > SILENCE_S or self._address_of(node_id) != address:
                return

    async def close(self) -> None:
        """Cut all links."""
        self._closed = True
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
