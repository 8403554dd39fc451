"""Links to other stores over real sockets: found, lost, found again, and never a byte too much."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from tallymark_protocol.frames import Frame
from tallymark_protocol.messages import Welcome
from tallymark_runtime.transport import FrameServer, HandlerBase, ServerConnection
from tallymark_store import peers
from tallymark_store.peers import Peers


class Receiver(HandlerBase):
    """Another store, as far as its socket."""

    def __init__(self, node_id: str) -> None:
        self.bodies: list[bytes] = []
        self.connections: list[ServerConnection] = []
        self.server = FrameServer(self, lambda: Welcome(version=1, node_id=node_id, role="store", now_ns=0))

    def on_replicate(self, connection: ServerConnection, frame: Frame) -> None:
        self.bodies.append(frame.body)
        self.connections.append(connection)


class Net:
    """Who is where."""

    def __init__(self) -> None:
        self.addresses: dict[str, str] = {}
        self.receivers: list[Receiver] = []
        self.peers = Peers("a", self.addresses.get, random.Random(1))

    async def listen(self, node_id: str, *, under: str | None = None) -> Receiver:
        receiver = Receiver(node_id)
        self.receivers.append(receiver)
        self.addresses[under or node_id] = await receiver.server.start()
        return receiver

    async def arrives(self, receiver: Receiver, body: bytes, *more: Any) -> None:
        """Sent again and again, as replicas do, until it is there."""

        def there() -> bool:
            self.peers.send("b", [body, *more])
            return bool(receiver.bodies)

        await until(there)


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - threads and sockets set no event
            await asyncio.sleep(0.005)


@pytest.fixture
async def net() -> AsyncIterator[Net]:
    net = Net()
    yield net
    await net.peers.close()
    for receiver in net.receivers:
        await receiver.server.close(deadline_s=0.1)


async def test_bundles_arrive_whole(net: Net) -> None:
    """In the parts they were given in, one frame each, whatever their size."""
    receiver = await net.listen("b")
    assert not net.peers.send("b", [b"lost: nothing is kept for later"])
    large = bytearray(3_000_000)
    await net.arrives(receiver, b"head", memoryview(b"middle"), large)
    assert receiver.bodies[0] == b"headmiddle" + large


async def test_a_broken_link_is_made_anew(net: Net) -> None:
    """Also where the store has come back at another address."""
    first = await net.listen("b")
    await net.arrives(first, b"one")
    first.connections[0].abort_transport()
    first.bodies.clear()
    await net.arrives(first, b"two")
    second = await net.listen("b")
    await net.arrives(second, b"three")
    assert second.bodies[0] == b"three"


async def test_a_store_that_is_not_registered_is_not_sought(net: Net) -> None:
    """It is as soon as it is."""
    assert not net.peers.send("b", [b"x"])
    await until(lambda: not net.peers._tasks)
    receiver = await net.listen("b")
    await net.arrives(receiver, b"x")


async def test_nothing_is_said_to_another_store(net: Net) -> None:
    """Addresses are used again by others."""
    stranger = await net.listen("c", under="b")
    for _ in range(20):
        net.peers.send("b", [b"x"])
        await asyncio.sleep(0.005)
    assert stranger.bodies == []


async def test_what_does_not_fit_is_dropped(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the peer reads too slowly, or not at all."""
    monkeypatch.setattr(peers, "UNSENT_BYTES_MAX", 1_000_000)
    receiver = await net.listen("b")
    await net.arrives(receiver, b"x")
    receiver.connections[0].pause()
    body = bytes(400_000)
    await until(lambda: not net.peers.send("b", [body]))
    link = net.peers._links["b"]
    assert link.unwritten_bytes < 1_000_000 + 2 * len(body)
    receiver.connections[0].resume()
    await until(lambda: net.peers.send("b", [b"again"]))
    await until(lambda: receiver.bodies[-1] == b"again")


async def test_a_silent_peer_is_connected_to_anew(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be gone without a word; a new connection finds the way if there is one."""
    monkeypatch.setattr(peers, "SILENCE_S", 0.1)
    monkeypatch.setattr(peers, "PING_S", 0.02)
    receiver = await net.listen("b")
    await net.arrives(receiver, b"x")
    before = receiver.connections[0]
    before.pause()
    receiver.bodies.clear()
    await net.arrives(receiver, b"y")
    assert receiver.connections[-1] is not before
