"""The gRPC endpoint of a process: health by its readiness, and the cluster's administration at a gateway."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
from grpclib.client import Channel
from grpclib.exceptions import GRPCError

from tallymark_node.config import Settings
from tallymark_node.grpc_endpoint import grpc_served
from tallymark_protocol.errors import InvalidRequestError
from tallymark_runtime.framing import split_address
from tallymark_runtime.generated.grpc.health.v1 import (
    HealthCheckRequest,
    HealthCheckResponseServingStatus,
    HealthStub,
)
from tallymark_runtime.generated.tallymark.cluster.v1 import ClusterStub, StatusRequest, StatusResponse
from tallymark_runtime.readiness import Readiness

SERVING = HealthCheckResponseServingStatus.SERVING
NOT_SERVING = HealthCheckResponseServingStatus.NOT_SERVING
LOOPBACK = Settings(grpc="127.0.0.1:0")


@contextlib.asynccontextmanager
async def channel_to(address):
    """A channel to an address."""
    channel = Channel(*split_address(address))
    try:
        yield channel
    finally:
        channel.close()


async def test_without_the_setting_there_is_none():
    """Nothing listens, nothing is imported that nobody asked for."""
    async with grpc_served(Settings(), Readiness()) as address:
        assert address == ""


async def test_health_follows_the_readiness():
    """Not serving while a part objects, serving when none does, and told at once of the end."""
    readiness = Readiness()
    readiness.starting("store")
    async with contextlib.AsyncExitStack() as stack:
        served = contextlib.AsyncExitStack()
        address = await served.enter_async_context(grpc_served(LOOPBACK, readiness))
        stub = HealthStub(await stack.enter_async_context(channel_to(address)))
        watch = stub.watch(HealthCheckRequest())
        async with asyncio.timeout(30):
            assert (await anext(watch)).status == NOT_SERVING
            readiness.add("store", lambda: "")
            assert (await anext(watch)).status == SERVING
            ending = asyncio.create_task(served.aclose())
            assert (await anext(watch)).status == NOT_SERVING
            with pytest.raises(StopAsyncIteration):
                await anext(watch)
            await ending


async def test_a_role_that_is_no_gateway_administers_nothing():
    """The cluster's administration is a gateway's."""
    async with grpc_served(LOOPBACK, Readiness()) as address, channel_to(address) as channel:
        with pytest.raises(GRPCError):
            await ClusterStub(channel).status(StatusRequest())


async def test_a_gateway_answers_beside_health():
    """The service is that of the gateway's own administration."""

    class Admin:
        async def status(self):
            raise InvalidRequestError("asked the gateway")

    class Gateway:
        cluster = Admin()

    async with grpc_served(LOOPBACK, Readiness(), Gateway()) as address, channel_to(address) as channel:
        with pytest.raises(GRPCError, match="asked the gateway"):
            await ClusterStub(channel).status(StatusRequest())
        assert (await HealthStub(channel).check(HealthCheckRequest())).status == NOT_SERVING
        assert StatusResponse().is_settled is False


async def test_an_address_that_is_taken_is_an_error_that_names_the_setting():
    """The process doesn't start, and says which of its addresses it was."""
    async with grpc_served(LOOPBACK, Readiness()) as address:
        with pytest.raises(InvalidRequestError, match=f"grpc = '{address}'"):
            async with grpc_served(Settings(grpc=address), Readiness()):
                pass
