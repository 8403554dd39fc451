"""gRPC of a role: `grpc.health.v1.Health`, and whatever else the role offers there.

Owns one grpclib server. Health says whether this role serves, in one word for the whole process, the service "";
a role that has more to say names further services. `Watch` gives the present state, then each change, until the
caller leaves or the server closes.

What answers here is no part of the data path: a role says SERVING when it is ready to be used, NOT_SERVING before
that and from the moment it begins to stop, so that balancers leave it before it goes.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Final, Protocol

from grpclib.const import Handler, Status
from grpclib.exceptions import GRPCError
from grpclib.protocol import H2Protocol
from grpclib.server import Server

from tallymark_runtime.framing import join_address, split_address
from tallymark_runtime.generated.grpc.health.v1 import (
    HealthBase,
    HealthCheckRequest,
    HealthCheckResponse,
    HealthCheckResponseServingStatus,
)

WHOLE: Final = ""  # the service that stands for the process

_WATCHERS_MAX: Final = 256
_CLOSE_S: Final = 5.0  # what calls under way get to end in


class Service(Protocol):
    """A generated service: anything with grpclib's mapping of its methods."""

    def __mapping__(self) -> dict[str, Handler]:
        """Its methods by their paths."""
        ...


class Health(HealthBase):
    """The state of services, as gRPC asks for it.

    Args:
        services: the names there are, beside "". All begin as not serving.
    """

    def __init__(self, services: Iterable[str] = ()) -> None:
        self._serving = dict.fromkeys((WHOLE, *services), False)
        self._changed = asyncio.Event()  # set, and replaced, at each change
        self._watchers = 0
        self._left = asyncio.Event()  # set, and replaced, whenever a watch ends
        self._closed = False

    def set_serving(self, serving: bool, service: str = WHOLE) -> None:
        """Say whether a service can be used."""
        assert service in self._serving, "named when this was made"
        if not self._closed and self._serving[service] != serving:
            self._serving[service] = serving
            self._wake()

    async def end(self) -> None:
        """Say that nothing serves any more, and wait until those who watch have been told; their watches end."""
        self._closed = True
        self._serving = dict.fromkeys(self._serving, False)
        self._wake()
        while self._watchers:
            await self._left.wait()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _status(self, service: str) -> HealthCheckResponseServingStatus:
        serving = self._serving.get(service)
        if serving is None:
            return HealthCheckResponseServingStatus.SERVICE_UNKNOWN
        if serving:
            return HealthCheckResponseServingStatus.SERVING
        return HealthCheckResponseServingStatus.NOT_SERVING

    async def check(self, message: HealthCheckRequest) -> HealthCheckResponse:
        """Say whether a service can be used now; NOT_FOUND for one that there is not."""
        status = self._status(message.service)
        if status == HealthCheckResponseServingStatus.SERVICE_UNKNOWN:
            raise GRPCError(Status.NOT_FOUND, "no such service")
        return HealthCheckResponse(status=status)

    async def watch(self, message: HealthCheckRequest) -> AsyncIterator[HealthCheckResponse]:
        """Say whether a service can be used now, and whenever that changes."""
        if self._watchers >= _WATCHERS_MAX:
            raise GRPCError(Status.RESOURCE_EXHAUSTED, f"more than {_WATCHERS_MAX} watch already")
        self._watchers += 1
        try:
            told: HealthCheckResponseServingStatus | None = None
            while True:
                changed = self._changed
                status = self._status(message.service)
                if status != told:
                    told = status
                    yield HealthCheckResponse(status=status)
                    continue  # it may have changed while that was on its way
                if self._closed:
                    return
                await changed.wait()
        finally:
            self._watchers -= 1
            self._left.set()
            self._left = asyncio.Event()


class _TrackingServer(Server):
    """grpclib's server, which also tells its port, and can close the connections of callers that stay."""

    def __init__(self, handlers: Sequence[Service]) -> None:
        super().__init__(handlers)
        self._protocols: list[H2Protocol] = []

    def _protocol_factory(self) -> H2Protocol:
        protocol = super()._protocol_factory()
        self._protocols = [other for other in self._protocols if not _is_gone(other)]
        self._protocols.append(protocol)
        return protocol

    @property
    def port(self) -> int:
        """The one that it listens on."""
        assert self._server is not None, "started"
        sockets = getattr(self._server, "sockets")  # noqa: B009 - loops' servers have them, their base class not
        return int(sockets[0].getsockname()[1])

    def hang_up(self) -> None:
        """Close all connections."""
        for protocol in self._protocols:
            if hasattr(protocol, "connection"):  # it was made
                protocol.connection.close()
        self._protocols = []


def _is_gone(protocol: H2Protocol) -> bool:
    return hasattr(protocol, "connection") and protocol.connection.is_closing()


class HealthServer:
    """The gRPC server of a role; `start` it, `close` it.

    Args:
        listen: "host:port"; port 0 takes a free one.
        services: names of services whose state is told beside the whole process's.
        handlers: generated services to offer beside health.
    """

    def __init__(
        self, listen: str, *, services: Iterable[str] = (), handlers: Sequence[Service] = ()
    ) -> None:
        self._listen = listen
        self._health = Health(services)
        self._server = _TrackingServer([self._health, *handlers])

    def set_serving(self, serving: bool, service: str = WHOLE) -> None:
        """Say whether the role can be used. It begins with no."""
        self._health.set_serving(serving, service)

    async def start(self) -> str:
        """Listen; return the address with the real port.

        Raises:
            OSError: the address can't be listened on.
            ValueError: it is none.
        """
        host, port = split_address(self._listen)
        await self._server.start(host, port)
        return join_address(host, self._server.port)

    async def close(self) -> None:
        """Say that nothing serves any more, end what is under way, and hang up."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_S):
                await self._health.end()
        self._server.close()
        self._server.hang_up()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_S):
                await self._server.wait_closed()
