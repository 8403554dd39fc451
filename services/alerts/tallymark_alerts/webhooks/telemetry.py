"""What an instance tells about its webhooks, read from its counters when it is asked."""

from __future__ import annotations

from tallymark_alerts.webhooks import Webhooks
from tallymark_runtime.telemetry import NS, Family, Scrape

ATTEMPTS = Family(
    "tallymark_webhook_attempts_total",
    "counter",
    "Attempts to deliver, by outcome: delivered, gone, status, timeout, connection, address, missing.",
    ("outcome",),
)
ATTEMPT_SECONDS = Family(
    "tallymark_webhook_attempt_seconds", "histogram", "How long attempts took.", scale=NS
)
DELIVERED_SECONDS = Family(
    "tallymark_webhook_delivered_seconds",
    "histogram",
    "From an alert's raising to its delivery; by the leader's clock and this instance's.",
    scale=NS,
)
LETTERS = Family(
    "tallymark_webhook_dead_letters_total", "counter", "Deliveries that were given up at this instance."
)
OWNED = Family("tallymark_webhook_owned", "gauge", "Webhooks that this instance delivers for.")
UNOWNED = Family(
    "tallymark_webhook_unowned", "gauge", "Webhooks that nobody delivers for, as far as this instance knows."
)
PENDING = Family(
    "tallymark_webhook_pending", "gauge", "Deliveries of owned webhooks that failed and are tried again."
)
OUTSTANDING = Family(
    "tallymark_webhook_outstanding",
    "gauge",
    "Alerts that were read for owned webhooks and are not delivered, pending ones included.",
)
DEAD = Family("tallymark_webhook_dead_letters", "gauge", "Dead letters of owned webhooks.")
PAUSED = Family("tallymark_webhook_paused", "gauge", "Owned webhooks for which nothing is tried.")
WRITES = Family(
    "tallymark_webhook_progress_writes_total", "counter", "Times a webhook's progress was written."
)
WRITE_FAILURES = Family(
    "tallymark_webhook_progress_failures_total",
    "counter",
    "Attempts to write a webhook's progress that failed. They are repeated.",
)
LOST = Family(
    "tallymark_webhook_lost_total",
    "counter",
    "Times this instance found, when it wrote, that it was not a webhook's owner any more.",
)
LEASE = Family(
    "tallymark_webhook_lease", "gauge", "1 while this instance has the lease under which it delivers."
)


class WebhooksTelemetry:
    """Reads an instance's webhooks. Give it to `Telemetry.add`."""

    def __init__(self, webhooks: Webhooks) -> None:
        self._webhooks = webhooks

    def __call__(self, scrape: Scrape) -> None:
        """Add what there is to tell now."""
        counters, owners = self._webhooks.counters, self._webhooks.owners
        for kind, count in counters.attempts.items():
            scrape.add(ATTEMPTS, count, kind.value)
        scrape.add_histogram(ATTEMPT_SECONDS, counters.attempt_ns)
        scrape.add_histogram(DELIVERED_SECONDS, counters.delivered_ns)
        scrape.add(LETTERS, counters.letters)
        endpoints = list(owners.endpoints.values())
        outboxes = [endpoint.outbox for endpoint in endpoints if endpoint.outbox is not None]
        scrape.add(OWNED, len(endpoints))
        scrape.add(UNOWNED, sum(owners.owners.is_free(one) for one in owners.webhooks.ids()))
        scrape.add(PENDING, sum(outbox.failed for outbox in outboxes))
        scrape.add(OUTSTANDING, sum(outbox.outstanding for outbox in outboxes))
        scrape.add(DEAD, sum(outbox.letters for outbox in outboxes))
        scrape.add(PAUSED, sum(endpoint.is_paused for endpoint in endpoints))
        scrape.add(WRITES, counters.writes)
        scrape.add(WRITE_FAILURES, counters.write_failures)
        scrape.add(LOST, counters.lost)
        scrape.add(LEASE, int(owners.has_lease))
