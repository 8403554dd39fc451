"""A process's gRPC endpoint, at the setting `grpc`: health, and at a gateway the administration of the cluster.

It starts once the roles of the process have, and says that the process serves as long as its readiness has no
objection; it is the first to hear that the process stops, so that who balances load looks elsewhere in time.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Final

from tallymark_node.config import Settings
from tallymark_protocol.errors import InvalidRequestError
from tallymark_runtime.readiness import Readiness

if TYPE_CHECKING:
    from tallymark_ingest.server import GatewayServer
    from tallymark_runtime.health import HealthServer, Service

_LOOK_S: Final = 0.25  # between two looks at the readiness


@contextlib.asynccontextmanager
async def grpc_served(
    settings: Settings, readiness: Readiness, gateway: GatewayServer | None = None
) -> AsyncIterator[str]:
    """Serve gRPC, if the setting is there; gives the address, "" without one.

    Raises:
        InvalidRequestError: the address can't be listened on, or is none.
    """
    if not settings.grpc:
        yield ""
        return
    # Late: a process without the setting needs none of it.
    from tallymark_runtime.health import HealthServer

    handlers: Sequence[Service] = ()
    if gateway is not None:
        from tallymark_ingest.cluster_grpc import ClusterService

        handlers = [ClusterService(gateway.cluster)]
    server = HealthServer(settings.grpc, handlers=handlers)
    try:
        address = await server.start()
    except (OSError, ValueError) as error:
        # An error of its own: it must not be taken for one about the address that the role listens on.
        raise InvalidRequestError(f"grpc = {settings.grpc!r}: can't listen there: {error}") from error
    task = asyncio.get_running_loop().create_task(_tell(server, readiness))
    try:
        yield address
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await server.close()


async def _tell(server: HealthServer, readiness: Readiness) -> None:
    while True:
        server.set_serving(not readiness.problems())
        await asyncio.sleep(_LOOK_S)
