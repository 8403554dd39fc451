"""What a process tells about itself while it runs: its telemetry, whether it is ready, whether it is alive.

Owns the wiring between the roles of a process and the endpoint of the setting `telemetry`. The endpoint is the first
thing to start and the last to stop, so that a start that takes long, or a stop, can be watched. Without the setting
nothing is gathered; readiness is kept all the same, for whoever else asks.

**Ready** means that what one sends here will be served, as far as this process can know:

    store   its log is recovered, and it leads or follows in every partition that it has a copy of
    ingest  it has seen a leader for every partition once, and knows at least one now: a gateway that is sent nothing
            because one partition has no leader would take the others' callers along
    query   likewise
    alerts  it has reached the leader of every partition once, and can deliver webhooks
"""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING

from tallymark_node.config import Settings
from tallymark_protocol.errors import InvalidRequestError
from tallymark_runtime.clock import Clock
from tallymark_runtime.coordinator import Coordinator
from tallymark_runtime.readiness import Check, Readiness

if TYPE_CHECKING:
    from tallymark_alerts.service import AlertsService
    from tallymark_ingest.server import GatewayServer
    from tallymark_query.service import QueryService
    from tallymark_runtime.telemetry import Telemetry
    from tallymark_store.service import StoreService


class Monitor:
    """What one process tells. Made by `monitored`.

    Attributes:
        readiness: whether it serves.
        telemetry: what it counts; None where nobody asks.
        address: "host:port" of the endpoint; "" without one.
    """

    def __init__(self, settings: Settings, clock: Clock, telemetry: Telemetry | None) -> None:
        self.readiness = Readiness()
        self.telemetry = telemetry
        self.address = ""
        self._settings = settings
        self._clock = clock

    def counted(self, role: str, coordinator: Coordinator) -> Coordinator:
        """The coordinator for a role: its calls are counted, if anybody asks."""
        return self.counting(role)(coordinator)

    def counting(self, role: str) -> Callable[[Coordinator], Coordinator]:
        """What makes a role's coordinator a counted one, for connections that are made later or in another thread.

        Such a thread has a name of its own: numbers are written by one thread only.
        """
        if self.telemetry is None:
            return lambda coordinator: coordinator
        from tallymark_runtime.coordinator.counted import CoordinatorCounters, CountedCoordinator
        from tallymark_runtime.coordinator.telemetry import CoordinatorTelemetry

        counters, clock = CoordinatorCounters(), self._clock
        self.telemetry.add(f"{role}_coordinator", CoordinatorTelemetry(role, counters))
        return lambda coordinator: CountedCoordinator(coordinator, clock, counters)

    def watch_store(self, service: StoreService) -> None:
        """A store serves."""
        from tallymark_store.telemetry import StoreTelemetry, store_problem

        self.readiness.add("store", lambda: store_problem(service.driver))
        self.readiness.add_fatal("store", lambda: "its log has failed" if service.failed.is_set() else "")
        if self.telemetry is not None:
            self.telemetry.add("store", StoreTelemetry(service, self._clock))

    def watch_ingest(self, server: GatewayServer) -> None:
        """A gateway serves."""
        self.readiness.add("ingest", _routes(server.leaderless, server.core.partition_count))
        if self.telemetry is not None:
            from tallymark_ingest.telemetry import IngestTelemetry

            self.telemetry.add("ingest", IngestTelemetry(server))

    def watch_query(self, service: QueryService) -> None:
        """A query node serves."""
        self.readiness.add("query", _routes(service.leaderless, service.partition_count))
        if self.telemetry is not None:
            from tallymark_query.telemetry import QueryTelemetry

            self.telemetry.add("query", QueryTelemetry(service))

    def watch_alerts(self, service: AlertsService) -> None:
        """An instance of the alerts role serves."""
        self.readiness.add("alerts", service.problem)
        if self.telemetry is not None:
            from tallymark_alerts.telemetry import AlertsTelemetry
            from tallymark_alerts.webhooks.telemetry import WebhooksTelemetry

            self.telemetry.add("alerts", AlertsTelemetry(service))
            self.telemetry.add("alerts_webhooks", WebhooksTelemetry(service.webhooks))

    def stopping(self) -> None:
        """The process was told to stop."""
        self.readiness.is_stopping = True


@contextlib.asynccontextmanager
async def monitored(settings: Settings, clock: Clock) -> AsyncIterator[Monitor]:
    """Start to tell, on the setting `telemetry` if it is there; stop at the end.

    Raises:
        InvalidRequestError: the endpoint's address can't be listened on, or is none.
    """
    if not settings.telemetry:
        yield Monitor(settings, clock, None)
        return
    # Late: a process that tells nobody needs none of it.
    from tallymark_runtime.telemetry import Telemetry
    from tallymark_runtime.telemetry_endpoint import Endpoint

    telemetry = Telemetry(clock, node_id=settings.node_id, version=_version())
    monitor = Monitor(settings, clock, telemetry)
    endpoint = Endpoint(telemetry, monitor.readiness)
    try:
        monitor.address = await endpoint.start(settings.telemetry)
    except (OSError, ValueError) as error:
        # An error of its own: it must not be taken for one about the address that the role listens on.
        raise InvalidRequestError(
            f"telemetry = {settings.telemetry!r}: can't listen there: {error}"
        ) from error
    try:
        yield monitor
    finally:
        await endpoint.close()


def _routes(leaderless: Callable[[], list[int]], partition_count: int) -> Check:
    """The readiness of what sends requests to partitions' leaders; see the module's docstring."""
    has_seen_all = False

    def check() -> str:
        nonlocal has_seen_all
        missing = leaderless()
        has_seen_all = has_seen_all or not missing
        if len(missing) == partition_count:
            return "no partition has a leader"
        if not has_seen_all:
            return f"{len(missing)} of {partition_count} partitions have no leader yet, partition {missing[0]} among them"
        return ""

    return check


def _version() -> str:
    try:
        return importlib.metadata.version("tallymark")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
