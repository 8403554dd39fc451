"""What a gateway tells about itself, read from its counters and its core when it is asked."""

from __future__ import annotations

from tallymark_ingest.server import GatewayServer
from tallymark_runtime.telemetry import NS, Family, Scrape, add_codes, add_outcomes

CHUNKS = Family("tallymark_ingest_chunks_total", "counter", "Chunks taken from callers.")
EVENTS = Family("tallymark_ingest_events_total", "counter", "Events in those chunks.")
BYTES = Family("tallymark_ingest_bytes_total", "counter", "Bytes of those chunks.")
RECEIPTS = Family("tallymark_ingest_receipts_total", "counter", "Receipts sent.")
OUTCOMES = Family(
    "tallymark_ingest_outcomes_total",
    "counter",
    'Events by the outcome that receipts gave: "stored", "duplicate", "conflict", or why rejected.',
    ("outcome",),
)
UNRESOLVED = Family(
    "tallymark_ingest_unresolved_events_total",
    "counter",
    "Events that receipts gave no outcome for, by the error's code.",
    ("code",),
)
REFUSALS = Family(
    "tallymark_ingest_refusals_total",
    "counter",
    "Requests that got an error and no receipt, by its code.",
    ("code",),
)
RECEIPT_SECONDS = Family(
    "tallymark_ingest_receipt_seconds", "histogram", "From a chunk's arrival to its receipt.", scale=NS
)
APPEND_SECONDS = Family(
    "tallymark_ingest_append_seconds",
    "histogram",
    "From an append's sending to its leader's answer.",
    scale=NS,
)
APPEND_FAILURES = Family(
    "tallymark_ingest_append_failures_total",
    "counter",
    "Attempts to append that got no answer, or an error, by its code. Most are sent again.",
    ("code",),
)
PENDING_BYTES = Family(
    "tallymark_ingest_pending_bytes", "gauge", "Memory held by requests and appends under way."
)
OPEN_REQUESTS = Family("tallymark_ingest_open_requests", "gauge", "Requests without an answer.")
FULL = Family("tallymark_ingest_full", "gauge", "1 while so much is pending that callers are not read from.")
CONNECTIONS = Family("tallymark_ingest_connections", "gauge", "Connections of callers.")
LEADERLESS = Family(
    "tallymark_ingest_leaderless_partitions", "gauge", "Partitions whose leader this gateway doesn't know."
)


class IngestTelemetry:
    """Reads a gateway. Give it to `Telemetry.add`."""

    def __init__(self, server: GatewayServer) -> None:
        self._server = server

    def __call__(self, scrape: Scrape) -> None:
        """Add what there is to tell now."""
        core = self._server.core
        counters = core.counters
        scrape.add(CHUNKS, counters.chunks)
        scrape.add(EVENTS, counters.events)
        scrape.add(BYTES, counters.bytes)
        scrape.add(RECEIPTS, counters.receipts)
        add_outcomes(scrape, OUTCOMES, counters.stored, counters.outcomes)
        add_codes(scrape, UNRESOLVED, counters.failures)
        add_codes(scrape, REFUSALS, counters.refusals)
        scrape.add_histogram(RECEIPT_SECONDS, counters.receipt_ns)
        scrape.add_histogram(APPEND_SECONDS, counters.append_ns)
        add_codes(scrape, APPEND_FAILURES, counters.append_failures)
        scrape.add(PENDING_BYTES, core.pending_bytes)
        scrape.add(OPEN_REQUESTS, core.open_requests)
        scrape.add(FULL, core.is_full)
        scrape.add(CONNECTIONS, self._server.connection_count)
        scrape.add(LEADERLESS, len(self._server.leaderless()))
