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
    start_alerts,
    start_gateway,
    start_query,
    store_config,
)
from tallymark_node.grpc_endpoint import grpc_served
from tallymark_node.monitor import Monitor, monitored
from tallymark_protocol.errors import InvalidRequestError, UnavailableError
from tallymark_runtime.catalog import CLUSTER
from tallymark_runtime.clock import RealClock, SteadyClock
from tallymark_runtime.coordinator import Coordinator, CoordinatorService, open_remote
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
        monitor: what it tells about itself.
        grpc_address: of gRPC health and administration; "" without them.
    """

    def __init__(self, address: str, failed: asyncio.Event, monitor: Monitor, grpc_address: str = "") -> None:
        self.grpc_address = grpc_address
        self.address = address
        self.failed = failed
        self.monitor = monitor


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
        monitor = await stack.enter_async_context(monitored(settings, clock))
        monitor.readiness.starting(role)
        if role == "store":
            coordinator, hosted = _store_coordinator(settings)
            stack.push_async_callback(coordinator.close)
            stores = await store.serve(
                store_config(settings, listen),
                RealDisk(Path(settings.data_dir) / "store"),
                monitor.counted(role, coordinator),
                clock,
                rng,
                report=report,
                hosted=hosted,
                # Renewals go their own way: neither a busy loop nor what it waits for holds them up.
                lease_coordinator=None if hosted is not None else _lease_coordinator(settings, monitor),
            )
            stack.push_async_callback(stores.close)
            monitor.watch_store(stores)
            grpc = await stack.enter_async_context(grpc_served(settings, monitor.readiness))
            stack.callback(monitor.stopping)
            yield Role(stores.address, stores.failed, monitor, grpc)
            return
        coordinator = monitor.counted(role, _remote(settings))
        stack.push_async_callback(coordinator.close)
        await _wait_coordinator(coordinator, settings, report)
        if role == "query":
            queries, task = await start_query(settings, coordinator, clock, rng, listen)
            stack.push_async_callback(queries.close)
            monitor.watch_query(queries)
            address = queries.address
            served = grpc_served(settings, monitor.readiness)
        elif role == "alerts":
            alerting, task = await start_alerts(settings, coordinator, clock, rng, listen)
            stack.push_async_callback(alerting.close)
            monitor.watch_alerts(alerting)
            address = alerting.address
            served = grpc_served(settings, monitor.readiness)
        else:
            gateway, task = await start_gateway(settings, coordinator, clock, rng, listen)
            stack.push_async_callback(gateway.close)
            monitor.watch_ingest(gateway)
            address = gateway.address
            served = grpc_served(settings, monitor.readiness, gateway)
        stack.push_async_callback(end, task)
        grpc = await stack.enter_async_context(served)
        stack.callback(monitor.stopping)
        yield Role(address, asyncio.Event(), monitor, grpc)


async def _wait_coordinator(
    coordinator: Coordinator, settings: Settings, report: Callable[[str], None]
) -> None:
    """Wait for the process that hosts the coordinator, which may be starting, too.

    Raises:
        UnavailableError: it did not answer within START_WAIT_S.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + START_WAIT_S
    told = ""  # what is waited for, once it was said
    while True:
        try:
            if await coordinator.get(CLUSTER) is not None:  # stores make the cluster, nobody else
                if told:
                    report("the cluster is there: starting")
                return
            error = UnavailableError(
                f"no cluster at {settings.coordinator} yet: waiting for its first stores"
            )
            what, text = "cluster", error.message
        except UnavailableError as problem:
            error = problem
            what = "coordinator"
            text = f"waiting for the coordinator at {settings.coordinator}: {error.message}"
        if loop.time() > deadline:
            raise error
        if what != told:
            report(text)
            told = what
        await asyncio.sleep(START_RETRY_S)


def _store_coordinator(settings: Settings) -> tuple[Coordinator, CoordinatorService | None]:
    if settings.coordinator != "embedded":
        return _remote(settings), None
    coordinator = open_coordinator(settings)
    return coordinator, CoordinatorService(coordinator)


def _lease_coordinator(settings: Settings, monitor: Monitor) -> Callable[[], Coordinator]:
    """What makes the lease's own connection, in the lease's thread."""
    counting = monitor.counting("store_lease")
    return lambda: counting(_remote(settings))


def _remote(settings: Settings) -> Coordinator:
    return open_remote(settings.coordinator, new_random(), prefix=settings.coordinator_prefix)
