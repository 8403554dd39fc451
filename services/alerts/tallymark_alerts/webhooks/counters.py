"""What an instance counts while it delivers; `telemetry` tells it when it is asked."""

from __future__ import annotations

from tallymark_alerts.webhooks.schedule import OutcomeKind
from tallymark_runtime.instruments import Histogram


class WebhookCounters:
    """An instance's numbers since its start.

    Attributes:
        attempts: ended, by how.
        letters: deliveries given up.
        attempt_ns: how long attempts took.
        delivered_ns: from an alert's raising to its delivery, by the servers' clocks.
        writes: of progress.
        write_failures: attempts to write progress that failed.
        lost: times it turned out, at a write, that this instance was not the owner any more.
    """

    __slots__ = (
        "attempt_ns",
        "attempts",
        "delivered_ns",
        "letters",
        "lost",
        "write_failures",
        "writes",
    )

    def __init__(self) -> None:
        self.attempts: dict[OutcomeKind, int] = dict.fromkeys(OutcomeKind, 0)
        self.letters = 0
        self.attempt_ns = Histogram()
        self.delivered_ns = Histogram()
        self.writes = 0
        self.write_failures = 0
        self.lost = 0
