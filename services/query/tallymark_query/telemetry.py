"""What a query node tells about itself, read from its counters when it is asked."""

from __future__ import annotations

from tallymark_query.counters import CANCELLED
from tallymark_query.service import QueryService
from tallymark_runtime.telemetry import NS, Family, Scrape, add_codes

SECONDS = Family(
    "tallymark_query_seconds",
    "histogram",
    "From a query's arrival to its answer, by kind: realtime, totals, top, events, alerts.",
    ("kind",),
    scale=NS,
)
FAILURES = Family(
    "tallymark_query_failures_total",
    "counter",
    'Queries without an answer, by kind and the error\'s code; "cancelled" where their caller gave up.',
    ("kind", "code"),
)
UNDER_WAY = Family("tallymark_query_under_way", "gauge", "Queries that have no answer yet.")
CONNECTIONS = Family("tallymark_query_connections", "gauge", "Connections of callers.")
LEADERLESS = Family(
    "tallymark_query_leaderless_partitions", "gauge", "Partitions whose leader this node doesn't know."
)


class QueryTelemetry:
    """Reads a query node. Give it to `Telemetry.add`."""

    def __init__(self, service: QueryService) -> None:
        self._service = service

    def __call__(self, scrape: Scrape) -> None:
        """Add what there is to tell now."""
        counters = self._service.counters
        for kind, latency in counters.latency_ns.items():
            scrape.add_histogram(SECONDS, latency, kind)
        for kind, failures in counters.failures.items():
            if CANCELLED in failures:
                scrape.add(FAILURES, failures[CANCELLED], kind, "cancelled")
            others = {code: count for code, count in failures.items() if code != CANCELLED}
            add_codes(scrape, FAILURES, others, kind)
        scrape.add(UNDER_WAY, counters.under_way)
        scrape.add(CONNECTIONS, self._service.connection_count)
        scrape.add(LEADERLESS, len(self._service.leaderless()))
