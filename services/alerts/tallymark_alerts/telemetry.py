"""What an instance of the alerts role tells about itself, read from its counters when it is asked."""

from __future__ import annotations

from tallymark_alerts.service import AlertsService
from tallymark_runtime.telemetry import NS, Family, Scrape, add_codes

_CODE = ("code",)

TAILED = Family("tallymark_alerts_tailed_total", "counter", "Alert records that the tail has brought.")
AGE = Family(
    "tallymark_alerts_age_seconds",
    "histogram",
    "From the crossing event's append to its record's arrival here, of the newest record of each answer of the tail.",
    scale=NS,
)
LAG = Family(
    "tallymark_alerts_lag_records",
    "gauge",
    "Records that a partition's leader had beyond those that were taken, as of its last answer.",
    ("partition",),
)
TAIL_FAILURES = Family(
    "tallymark_alerts_tail_failures_total",
    "counter",
    "Calls of the tail that failed, and partitions that were refused, by the error's code.",
    _CODE,
)
GAPS = Family(
    "tallymark_alerts_gaps_total",
    "counter",
    "Answers of the tail that did not go on where they should; they were asked for again.",
)
UNREACHED = Family(
    "tallymark_alerts_unreached_partitions",
    "gauge",
    "Partitions whose leader this instance has not reached since its start.",
)
WINDOW = Family("tallymark_alerts_window_records", "gauge", "Newest records that are kept in memory.")
DELIVERED = Family(
    "tallymark_alerts_delivered_total", "counter", "Alerts handed to subscribers, repeats included."
)
ANSWERS = Family(
    "tallymark_alerts_answers_total", "counter", "Fetches that were answered, with alerts or without."
)
FAILURES = Family(
    "tallymark_alerts_failures_total",
    "counter",
    "Fetches that were refused or failed, by the error's code.",
    _CODE,
)
WAITING = Family("tallymark_alerts_waiting", "gauge", "Readers that wait for alerts, webhooks included.")
CATCH_UP = Family(
    "tallymark_alerts_catch_up_reads_total",
    "counter",
    "Pages read from stores for readers that are further behind than memory reaches.",
)
CATCH_UP_FAILURES = Family(
    "tallymark_alerts_catch_up_failures_total",
    "counter",
    "Such pages that could not be read, by the error's code.",
    _CODE,
)
CONNECTIONS = Family("tallymark_alerts_connections", "gauge", "Connections of callers.")


class AlertsTelemetry:
    """Reads an instance. Give it to `Telemetry.add`."""

    def __init__(self, service: AlertsService) -> None:
        self._service = service

    def __call__(self, scrape: Scrape) -> None:
        """Add what there is to tell now."""
        service = self._service
        counters, tail = service.counters, service.tail
        scrape.add(TAILED, counters.tailed)
        scrape.add_histogram(AGE, counters.age_ns)
        for partition, lag in tail.lags.items():
            scrape.add(LAG, lag, str(partition))
        add_codes(scrape, TAIL_FAILURES, counters.tail_failures)
        scrape.add(GAPS, counters.gaps)
        scrape.add(UNREACHED, len(tail.missing()))
        scrape.add(WINDOW, sum(len(window) for window in tail.windows.values()))
        scrape.add(DELIVERED, counters.delivered)
        scrape.add(ANSWERS, counters.answers)
        add_codes(scrape, FAILURES, counters.failures)
        scrape.add(WAITING, service.source.waiting_count)
        scrape.add(CATCH_UP, counters.catch_up_reads)
        add_codes(scrape, CATCH_UP_FAILURES, counters.catch_up_failures)
        scrape.add(CONNECTIONS, service.connection_count)
