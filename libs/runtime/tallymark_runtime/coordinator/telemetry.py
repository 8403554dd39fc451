"""What a role tells about its calls to the coordinator, read from `counted` when it is asked."""

from __future__ import annotations

from tallymark_runtime.coordinator.counted import CoordinatorCounters
from tallymark_runtime.telemetry import NS, Family, Scrape, add_codes

SECONDS = Family(
    "tallymark_coordinator_seconds",
    "histogram",
    "Calls to the coordinator that were answered, by operation.",
    ("role", "operation"),
    scale=NS,
)
FAILURES = Family(
    "tallymark_coordinator_failures_total",
    "counter",
    "Calls to the coordinator that were not answered, or with an error, and watches that broke.",
    ("role", "operation", "code"),
)
WATCHES = Family("tallymark_coordinator_watches_total", "counter", "Watches begun.", ("role",))
EVENTS = Family("tallymark_coordinator_events_total", "counter", "Changes that watches told.", ("role",))


class CoordinatorTelemetry:
    """Reads a role's counted coordinator. Give it to `Telemetry.add`."""

    def __init__(self, role: str, counters: CoordinatorCounters) -> None:
        self._role = role
        self._counters = counters

    def __call__(self, scrape: Scrape) -> None:
        """Add what there is to tell now; operations that were never asked for are left out."""
        counters = self._counters
        for operation, latency in counters.latency_ns.items():
            if latency.count:
                scrape.add_histogram(SECONDS, latency, self._role, operation)
        for operation, failures in counters.failures.items():
            add_codes(scrape, FAILURES, failures, self._role, operation)
        scrape.add(WATCHES, counters.watches, self._role)
        scrape.add(EVENTS, counters.events, self._role)
