"""gRPC health: what is answered, what is told to those who watch, and how it ends."""

import asyncio

import pytest
from grpclib.client import Channel
from grpclib.const import Status
from grpclib.exceptions import GRPCError, StreamTerminatedError
from grpclib.testing import ChannelFor

from tallymark_runtime import health
from tallymark_runtime.framing import split_address
from tallymark_runtime.generated.grpc.health.v1 import (
    HealthCheckRequest,
    HealthCheckResponseServingStatus,
    HealthStub,
)
from tallymark_runtime.health import Health, HealthServer

SERVING = HealthCheckResponseServingStatus.SERVING
NOT_SERVING = HealthCheckResponseServingStatus.NOT_SERVING
SERVICE_UNKNOWN = HealthCheckResponseServingStatus.SERVICE_UNKNOWN


async def status_of(stub, service=""):
    """The state of a service by `Check`."""
    return (await stub.check(HealthCheckRequest(service=service))).status


async def next_of(iterator):
    """The next item, within a bound that only a defect reaches."""
    async with asyncio.timeout(10):
        return await anext(iterator)


async def test_a_role_serves_when_it_says_so():
    """Not before, and not after it says no again."""
    state = Health()
    async with ChannelFor([state]) as channel:
        stub = HealthStub(channel)
        assert await status_of(stub) == NOT_SERVING
        state.set_serving(True)
        assert await status_of(stub) == SERVING
        state.set_serving(False)
        assert await status_of(stub) == NOT_SERVING


async def test_services_have_states_of_their_own():
    """One that was not named is not found."""
    state = Health(["admin"])
    async with ChannelFor([state]) as channel:
        stub = HealthStub(channel)
        state.set_serving(True, "admin")
        assert await status_of(stub, "admin") == SERVING
        assert await status_of(stub) == NOT_SERVING
        with pytest.raises(GRPCError) as caught:
            await status_of(stub, "other")
        assert caught.value.status is Status.NOT_FOUND


async def test_watching_tells_the_present_and_each_change():
    """At once the state as it is; an equal one is not told again."""
    state = Health()
    watch = state.watch(HealthCheckRequest())
    assert (await next_of(watch)).status == NOT_SERVING
    waiting = asyncio.create_task(next_of(watch))
    await asyncio.sleep(0)
    state.set_serving(False)
    state.set_serving(True)
    assert (await waiting).status == SERVING
    state.set_serving(False)
    assert (await next_of(watch)).status == NOT_SERVING
    await watch.aclose()


async def test_watching_what_is_not_there_is_no_error():
    """The protocol has a state for it."""
    watch = Health().watch(HealthCheckRequest(service="other"))
    assert (await next_of(watch)).status == SERVICE_UNKNOWN
    await watch.aclose()


async def test_the_number_of_watches_is_bounded(monkeypatch):
    """One more than allowed is refused, and room is made by one that leaves."""
    monkeypatch.setattr(health, "_WATCHERS_MAX", 1)
    state = Health()
    first = state.watch(HealthCheckRequest())
    await next_of(first)
    with pytest.raises(GRPCError) as caught:
        await next_of(state.watch(HealthCheckRequest()))
    assert caught.value.status is Status.RESOURCE_EXHAUSTED
    await first.aclose()
    again = state.watch(HealthCheckRequest())
    assert (await next_of(again)).status == NOT_SERVING
    await again.aclose()


async def test_a_server_answers_on_its_port_and_tells_watchers_of_its_end():
    """A watcher hears that it stops, then the connection ends."""
    server = HealthServer("127.0.0.1:0")
    host, port = split_address(await server.start())
    server.set_serving(True)
    channel = Channel(host, port)
    stub = HealthStub(channel)
    assert await status_of(stub) == SERVING
    watch = stub.watch(HealthCheckRequest())
    assert (await next_of(watch)).status == SERVING
    waiting = asyncio.create_task(next_of(watch))
    await server.close()
    assert (await waiting).status == NOT_SERVING
    with pytest.raises((StopAsyncIteration, GRPCError, StreamTerminatedError)):
        await next_of(watch)
    with pytest.raises((OSError, StreamTerminatedError)):
        await status_of(stub)
    channel.close()


async def test_a_server_closes_while_callers_stay_connected():
    """A caller that holds its connection open keeps nobody from stopping."""
    server = HealthServer("127.0.0.1:0")
    host, port = split_address(await server.start())
    channel = Channel(host, port)
    assert await status_of(HealthStub(channel)) == NOT_SERVING
    async with asyncio.timeout(4):
        await server.close()
    channel.close()


async def test_an_address_that_is_taken_is_an_error():
    """It says so when it starts."""
    first = HealthServer("127.0.0.1:0")
    address = await first.start()
    second = HealthServer(address)
    with pytest.raises(OSError):
        await second.start()
    await first.close()
