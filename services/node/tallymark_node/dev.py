"""All roles in one process, over real loopback sockets, with an embedded coordinator.

The same code paths as on separate machines; only the wiring is here.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec

from tallymark_alerts import service as alerts
from tallymark_ingest import server as ingest
from tallymark_ingest import split
from tallymark_ingest.gateway import GatewayConfig
from tallymark_node.config import ROLES, Settings
from tallymark_node.grpc_endpoint import grpc_served
from tallymark_node.monitor import Monitor, monitored
from tallymark_query import service as query
from tallymark_runtime.catalog import read_cluster, register
from tallymark_runtime.clock import Clock, RealClock, SteadyClock
from tallymark_runtime.coordinator import Coordinator, CoordinatorService, FileCoordinator
from tallymark_runtime.disk import RealDisk
from tallymark_runtime.framing import join_address
from tallymark_runtime.randomness import new_random
from tallymark_store import service as store
from tallymark_store import warmup
from tallymark_store.wal import WalConfig

LEASE_TTL_S = 10.0
_DEFAULTS = Settings()


class Node:
    """Everything that runs in this process.

    Attributes:
        address: "host:port" of the gateway; what SDKs connect to.
        query_address: of the query node.
        alerts_address: of the alerts instance.
        store_address: of the store.
        failed: set when the process must end.
        monitor: what the process tells about itself.
        grpc_address: of gRPC health and administration; "" without them.
    """

    def __init__(
        self,
        gateway: ingest.GatewayServer,
        queries: query.QueryService,
        stores: store.StoreService,
        alerting: alerts.AlertsService,
        monitor: Monitor,
        grpc_address: str = "",
    ) -> None:
        self.monitor = monitor
        self.grpc_address = grpc_address
        self.address = gateway.address
        self.query_address = queries.address
        self.alerts_address = alerting.address
        self.store_address = stores.address
        self.failed = stores.failed
        self._store = stores

    async def checkpoint(self) -> None:
        """Take a checkpoint now."""
        await self._store.checkpoint()


def store_config(settings: Settings, listen: str) -> store.StoreConfig:
    """What a store is told."""
    return store.StoreConfig(
        node_id=settings.node_id,
        partition_count=settings.partition_count,
        listen=listen,
        advertise=settings.advertise,
        wal=WalConfig(
            segment_bytes=settings.wal_segment_bytes,
            log_bytes_max=settings.log_bytes_max or None,
        ),
        checkpoint_interval_s=settings.checkpoint_interval_seconds,
        checkpoint_events=settings.checkpoint_events,
        archive="on" if settings.archive == "on" else "",
        recycle=settings.archive == "on",
        archive_events=settings.archive_events,
        archive_interval_s=settings.archive_interval_seconds,
        memory_bytes=settings.memory_bytes,
        dedup_window_ns=settings.dedup_window_seconds * 10**9,
        # What is at its default was not asked for: nobody needs to hear that it is ignored.
        is_partition_count_set=settings.partition_count != _DEFAULTS.partition_count,
        is_dedup_window_set=settings.dedup_window_seconds != _DEFAULTS.dedup_window_seconds,
        replication_factor=settings.replication_factor,
        zone=settings.zone,
        # A coordinator in the same process has nobody to give a silent leader's partitions to.
        lease_ttl_s=max(settings.lease_ttl_seconds, LEASE_TTL_S)
        if settings.coordinator == "embedded"
        else settings.lease_ttl_seconds,
    )


def gateway_config(settings: Settings, partition_count: int, listen: str) -> ingest.ServerConfig:
    """What a gateway is told."""
    return ingest.ServerConfig(
        node_id=settings.node_id,
        partition_count=partition_count,
        listen=listen,
        advertise=settings.advertise,
        core=GatewayConfig(
            pending_bytes_max=settings.pending_bytes_max, coalesce_ns_max=int(settings.coalesce_ms * 1e6)
        ),
    )


async def start_query(
    settings: Settings, coordinator: Coordinator, clock: Clock, rng: random.Random, listen: str
) -> tuple[query.QueryService, asyncio.Task[None]]:
    """Start a query node and register it."""
    cluster = await read_cluster(coordinator)
    config = query.QueryConfig(
        node_id=settings.node_id,
        partition_count=cluster.partition_count,
        listen=listen,
        advertise=settings.advertise,
    )
    service = await query.serve(config, coordinator, clock, rng)
    task = await register(coordinator, "query", settings.node_id, service.address, LEASE_TTL_S)
    return service, task


async def start_alerts(
    settings: Settings, coordinator: Coordinator, clock: Clock, rng: random.Random, listen: str
) -> tuple[alerts.AlertsService, asyncio.Task[None]]:
    """Start an instance of the alerts role and register it."""
    cluster = await read_cluster(coordinator)
    config = alerts.AlertsConfig(
        node_id=settings.node_id,
        partition_count=cluster.partition_count,
        listen=listen,
        advertise=settings.advertise,
        lease_ttl_s=settings.lease_ttl_seconds,
        webhook_allow_private=settings.webhook_allow_private,
        webhook_retry_s=settings.webhook_retry_s,
    )
    service = await alerts.serve(config, coordinator, clock, rng)
    task = await register(coordinator, "alerts", settings.node_id, service.address, LEASE_TTL_S)
    return service, task


async def start_gateway(
    settings: Settings, coordinator: Coordinator, clock: Clock, rng: random.Random, listen: str
) -> tuple[ingest.GatewayServer, asyncio.Task[None]]:
    """Start a gateway and register it."""
    cluster = await read_cluster(coordinator)
    config = gateway_config(settings, cluster.partition_count, listen)
    server = await ingest.serve(config, coordinator, clock, rng)
    task = await register(
        coordinator, "ingest", settings.node_id, settings.advertise or server.address, LEASE_TTL_S
    )
    return server, task


async def end(task: asyncio.Task[None]) -> None:
    """Cancel a background task and wait for its end."""
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def open_coordinator(settings: Settings) -> FileCoordinator:
    """The coordinator that is embedded in a store's data directory.

    Raises:
        UnavailableError: another process has the directory.
    """
    return FileCoordinator(Path(settings.data_dir) / "coordinator", RealClock())


def warm_up() -> None:
    """Compile the kernels of all roles, or load them from the cache."""
    split.warm_up()
    warmup.warm_up()


@contextlib.asynccontextmanager
async def running(settings: Settings, report: Callable[[str], None] = lambda _: None) -> AsyncIterator[Node]:
    """Start all roles; stop them at the end, the gateway first.

    Raises:
        TallymarkError, OSError, DiskError: what keeps it from starting.
    """
    split.warm_up()  # the store's kernels are compiled before it takes a lease; the gateway's must be by then
    rng = new_random()
    clock = SteadyClock(RealClock(), report)
    data = Path(settings.data_dir)
    coordinator = open_coordinator(settings)
    # Inner roles listen on loopback; only the gateway's address is the user's choice.
    inner = "127.0.0.1:0"
    alone = msgspec.structs.replace(settings, advertise="")
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(coordinator.close)
        monitor = await stack.enter_async_context(monitored(settings, clock))
        for role in ROLES:
            monitor.readiness.starting(role)
        stores = await store.serve(
            store_config(alone, inner),
            RealDisk(data / "store"),
            monitor.counted("store", coordinator),
            clock,
            rng,
            report=report,
            hosted=CoordinatorService(coordinator),
        )
        stack.push_async_callback(stores.close)
        monitor.watch_store(stores)
        counted = monitor.counted("query", coordinator)
        queries, query_task = await start_query(alone, counted, clock, rng, inner)
        stack.push_async_callback(queries.close)
        monitor.watch_query(queries)
        stack.push_async_callback(end, query_task)
        counted = monitor.counted("alerts", coordinator)
        alerting, alerts_task = await start_alerts(alone, counted, clock, rng, inner)
        stack.push_async_callback(alerting.close)
        monitor.watch_alerts(alerting)
        stack.push_async_callback(end, alerts_task)
        listen = join_address(settings.host, settings.port)
        counted = monitor.counted("ingest", coordinator)
        gateway, gateway_task = await start_gateway(settings, counted, clock, rng, listen)
        stack.push_async_callback(gateway.close)
        stack.push_async_callback(end, gateway_task)
        monitor.watch_ingest(gateway)
        grpc = await stack.enter_async_context(grpc_served(settings, monitor.readiness, gateway))
        stack.callback(monitor.stopping)
        yield Node(gateway, queries, stores, alerting, monitor, grpc)
