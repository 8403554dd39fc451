"""Asking stores from outside of a call: deadlines of one's own, single calls, and news of leaders."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import pytest

from tallymark_protocol.errors import ErrorCode, UnavailableError
from tallymark_protocol.messages import (
    PROTOCOL_VERSION,
    AlertsResult,
    StoreAlerts,
    StoreTail,
    TailResult,
    Welcome,
)
from tallymark_runtime.asking import Asking
from tallymark_runtime.catalog import Leader, leader_key
from tallymark_runtime.clock import RealClock
from tallymark_runtime.coordinator import MemoryCoordinator
from tallymark_runtime.transport import FrameServer, HandlerBase

WAIT_S = 20.0


class Store(HandlerBase):
    """A store that answers everything about every partition."""

    def __init__(self) -> None:
        self.server = FrameServer(
            self, lambda: Welcome(version=PROTOCOL_VERSION, node_id="s", role="store", now_ns=0)
        )

    async def on_call(self, connection: Any, call: Any) -> Any:
        if isinstance(call, StoreTail):
            return TailResult([])
        return AlertsResult([], 7, more=False)


class World:
    """A coordinator, stores, and whoever asks them."""

    def __init__(self) -> None:
        self.coordinator = MemoryCoordinator(RealClock())
        self.stores = [Store(), Store()]
        self.asking = Asking(self.coordinator, "a", random.Random(1))
        self.news: list[int] = []
        self.asking.on_news = self.news.append

    async def start(self) -> None:
        for store in self.stores:
            await store.server.start()
        await self.asking.start()

    async def lead(self, partition: int, store: int | None) -> None:
        if store is None:
            await self.coordinator.delete(leader_key(partition))
            return
        address = self.stores[store].server.address
        value = msgspec.msgpack.encode(Leader("s", address, "i"))
        await self.coordinator.put(leader_key(partition), value)

    async def until(self, condition: Callable[[], Any]) -> None:
        async with asyncio.timeout(WAIT_S):
            while not condition():  # noqa: ASYNC110 - what is waited for sets no event
                await asyncio.sleep(0.002)

    async def close(self) -> None:
        await self.asking.close()
        for store in self.stores:
            await store.server.close(deadline_s=0.0)
        await self.coordinator.close()


@pytest.fixture
async def world() -> AsyncIterator[World]:
    """Two stores that lead nothing yet."""
    world = World()
    await world.start()
    yield world
    await world.close()


async def test_a_question_has_a_deadline_of_its_own(world: World) -> None:
    """Whoever asks is no call under way; a leader that comes in time answers, otherwise the question fails."""
    loop = asyncio.get_running_loop()
    with pytest.raises(UnavailableError, match="has no leader"):
        await world.asking.ask(0, StoreAlerts(0), AlertsResult, deadline=loop.time() + 0.2)
    question = asyncio.ensure_future(
        world.asking.ask(0, StoreAlerts(0), AlertsResult, deadline=loop.time() + WAIT_S)
    )
    await asyncio.sleep(0)
    await world.lead(0, 0)
    assert (await question).next_position == 7


async def test_a_call_is_made_once(world: World) -> None:
    """To an address that is connected to; what is unknown, or gone, fails at once."""
    await world.lead(0, 0)
    address = world.stores[0].server.address
    await world.until(lambda: address in world.asking.peers())
    peer = world.asking._peers.get(address)
    assert peer is not None
    await world.until(lambda: peer.is_connected)
    assert await world.asking.call(address, StoreTail({0: 0}), TailResult, WAIT_S) == TailResult([])
    with pytest.raises(UnavailableError, match="there is no store") as raised:
        await world.asking.call("127.0.0.1:1", StoreTail({0: 0}), TailResult, WAIT_S)
    assert raised.value.code == ErrorCode.CLOSED


async def test_news_of_leaders_are_told(world: World) -> None:
    """Another one, none, and one that can be reached again: about the partitions concerned, once it can be asked."""
    await world.lead(0, 0)
    await world.lead(2, 0)
    await world.until(lambda: {0, 2} <= set(world.news))
    address = world.stores[0].server.address
    assert world.asking.leaders.led_by(address) == [0, 2]
    assert world.asking.leaders.led_by("127.0.0.1:1") == []
    peer = world.asking._peers.get(address)
    assert peer is not None
    await world.until(lambda: peer.is_connected)
    world.news.clear()
    # The connection is lost, and made again.
    for connection in world.stores[0].server.connections:
        connection.abort_transport()
    await world.until(lambda: world.news == [0, 2])
    assert peer.is_connected
    world.news.clear()
    await world.lead(2, 1)
    await world.until(lambda: 2 in world.news)
    assert world.asking.leaders.address(2) == world.stores[1].server.address
    assert world.stores[1].server.address in world.asking.peers()
    await world.lead(0, None)
    await world.until(lambda: 0 in world.news)
    assert world.asking.leaders.address(0) is None


async def test_nothing_is_told_after_the_end(world: World) -> None:
    """What the coordinator and connections do then concerns nobody."""
    await world.lead(0, 0)
    await world.until(lambda: 0 in world.news)
    await world.asking.close()
    world.news.clear()
    world.asking._on_leader(0)
    world.asking._on_connected(world.stores[0].server.address)
    assert world.news == []
