"""Connections to peers that come, go, and come back."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable

import pytest

from tallymark_protocol.messages import PROTOCOL_VERSION, Welcome
from tallymark_runtime.peer import PeerOptions
from tallymark_runtime.pool import PeerPool
from tallymark_runtime.transport import FrameServer, HandlerBase

OPTIONS = PeerOptions(backoff_min_s=0.001, backoff_max_s=0.002)


async def until(condition: Callable[[], object]) -> None:
    """Let the loop run until a condition holds that nobody announces."""
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


def new_server() -> FrameServer:
    return FrameServer(
        HandlerBase(), lambda: Welcome(version=PROTOCOL_VERSION, node_id="n", role="store", now_ns=0)
    )


@pytest.fixture
async def servers() -> AsyncIterator[list[FrameServer]]:
    made = [new_server() for _ in range(3)]
    for server in made:
        await server.start()
    yield made
    for server in made:
        await server.close(deadline_s=0.0)


async def test_all_that_are_wanted_are_connected_and_no_others(servers: list[FrameServer]) -> None:
    """Whatever was wanted before."""
    pool = PeerPool(rng=random.Random(1), software="me", options=OPTIONS)
    connected: list[str] = []
    pool.on_connected = connected.append
    first, second, third = (server.address for server in servers)
    pool.keep([first, second])
    await until(lambda: len(connected) == 2)
    kept = pool.get(second)
    pool.keep([second, third])
    assert pool.get(first) is None
    assert pool.get(second) is kept
    assert sorted(pool.addresses()) == sorted([second, third])
    await until(lambda: connected[2:] == [third])
    await until(lambda: not servers[0].connections)
    pool.keep([first])
    await until(lambda: connected[3:] == [first])
    await pool.close()
    await until(lambda: not any(server.connections for server in servers))
    pool.add(second)
    assert pool.addresses() == []


async def test_a_peer_that_is_not_there_is_tried_until_it_is() -> None:
    """And a lost connection is made anew, without a request that needs it."""
    server = new_server()
    address = await server.start()
    await server.close(deadline_s=0.0)
    pool = PeerPool(rng=random.Random(1), software="me", options=OPTIONS)
    connected: list[str] = []
    pool.on_connected = connected.append
    pool.add(address)
    client = pool.get(address)
    assert client is not None
    await until(lambda: client._failures >= 2)
    again = new_server()
    await again.start(address)
    await until(lambda: connected == [address])
    again.connections[0].abort_transport()
    await until(lambda: connected == [address, address])
    await pool.close()
    await again.close(deadline_s=0.0)


async def test_what_is_no_address_is_passed_over(servers: list[FrameServer]) -> None:
    """A node may register anything."""
    pool = PeerPool(rng=random.Random(1), software="me", options=OPTIONS)
    pool.keep(["nonsense", "", servers[0].address])
    assert pool.addresses() == [servers[0].address]
    assert pool.get("nonsense") is None
    await pool.close()


async def test_one_that_is_let_go_while_it_is_connected_to_is_forgotten() -> None:
    """Though the attempt is under way."""
    server = new_server()
    address = await server.start()
    pool = PeerPool(rng=random.Random(1), software="me", options=OPTIONS)
    connected: list[str] = []
    pool.on_connected = connected.append
    pool.add(address)
    await asyncio.sleep(0)
    pool.keep([])
    pool.add(address)
    await until(lambda: connected == [address])
    await until(lambda: len(server.connections) == 1)
    await pool.close()
    await server.close(deadline_s=0.0)
