"""One role in a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from tallymark_node.config import ROLES, Settings
from tallymark_node.dev import (
    end,
    open_coordinator,
    start_gateway,
    start_query,
    store_config,
)
from tallymark_protocol.errors import InvalidRequestError, UnavailableError
from tallymark_runtime.catalog import CLUSTER
from tallymark_runtime.clock import RealClock, SteadyClock
from tallymark_runtime.coordinator import Coordinator, CoordinatorService, RemoteCoordinator
from tallymark_runtime.disk import RealDisk
from tallymark_runtime.framing import join_address
from tallymark_runtime.randomness import new_random
from tallymark_store import service as store

START_WAIT_S = 60.0  # how long a role waits for the store that embeds the coordinator
START_RETRY_S = 0.2


class Role:
    """A running role.

    Attributes:
        address: "host:port" it is reached by.
        failed: set when the process must end.
    """

    def __init__(self, address: str, failed: asyncio.Event) -> None:
        self.address = address
        self.failed = failed


@contextlib.asynccontextmanager
async def running(
    role: str, settings: Settings, report: Callable[[str], None] = lambda _: None
) -> AsyncIterator[Role]:
    """Start one role; stop it at the end.

    Raises:
        TallymarkError, OSError, DiskError: what keeps it from starting.
    """
    if role not in ROLES:
        raise InvalidRequestError(f"there is no role {role!r}; there are: {', '.join(ROLES)}")
    rng = new_random()
    clock = SteadyClock(RealClock(), report)
    listen = join_address(settings.host, settings.port)
    async with contextlib.AsyncExitStack() as stack:
        if role == "store":
            coordinator, hosted = _store_coordinator(settings)
            stack.push_async_callback(coordinator.close)
            stores = await store.serve(
                store_config(settings, listen),
                RealDisk(Path(settings.data_dir) / "store"),
                coordinator,
                clock,
                rng,
                report=report,
                hosted=hosted,
            )
            stack.push_async_callback(stores.close)
            yield Role(stores.address, stores.failed)
            return
        coordinator = _remote(settings)
        stack.push_async_callback(coordinator.close)
        await _wait_coordinator(coordinator, settings, report)
        if role == "query":
            queries, task = await start_query(settings, coordinator, clock, rng, listen)
            stack.push_async_callback(queries.close)
            address = queries.address
        else:
            gateway, task = await start_gateway(settings, coordinator, clock, rng, listen)
            stack.push_async_callback(gateway.close)
            address = gateway.address
        stack.push_async_callback(end, task)
        yield Role(address, asyncio.Event())


async def _wait_coordinator(
    coordinator: RemoteCoordinator, settings: Settings, report: Callable[[str], None]
) -> None:
    """Wait for the process that hosts the coordinator, which may be starting, too.

    Raises:
        UnavailableError: it did not answer within START_WAIT_S.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + START_WAIT_S
    told = False
    while True:
        try:
            if await coordinator.get(CLUSTER) is not None:  # its store makes the cluster, nobody else
                return
            error = UnavailableError(f"the store at {settings.coordinator} has not made its cluster yet")
        except UnavailableError as problem:
            error = problem
        if loop.time() > deadline:
            raise error
        if not told:
            report(f"waiting for the coordinator at {settings.coordinator}: {error.message}")
            told = True
        await asyncio.sleep(START_RETRY_S)


def _store_coordinator(settings: Settings) -> tuple[Coordinator, CoordinatorService | None]:
    if settings.coordinator != "embedded":
        return _remote(settings), None
    coordinator = open_coordinator(settings)
    return coordinator, CoordinatorService(coordinator)


def _remote(settings: Settings) -> RemoteCoordinator:
    if not settings.coordinator.startswith("tcp://"):
        raise InvalidRequestError(
            'this role needs coordinator = "tcp://host:port", the address of the store that embeds the '
            f"coordinator; it is {settings.coordinator!r}"
        )
    return RemoteCoordinator(settings.coordinator.removeprefix("tcp://"), rng=new_random())
