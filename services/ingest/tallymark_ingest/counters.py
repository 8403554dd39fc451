"""What a gateway counts while it works, in plain numbers; `telemetry` tells them when it is asked.

A number that callers are told (stored, duplicates, ...) is counted with the receipt that tells it, so a chunk that is
sent again counts again: a store's own numbers say what is in the log.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tallymark_runtime.instruments import Histogram, count_in

if TYPE_CHECKING:
    from tallymark_ingest.work import Request


class IngestCounters:
    """A gateway's numbers since its start.

    Attributes:
        chunks: taken from callers, with their ...
        events: ... events and ...
        bytes: ... bytes. What is refused at once is not among them.
        receipts: sent.
        stored: events that receipts called stored.
        outcomes: events that receipts gave another outcome, by `Reason`.
        failures: events that receipts left open or gave up, by `ErrorCode`.
        refusals: requests that got an error and no receipt, by `ErrorCode`.
        receipt_ns: from a chunk's arrival to its receipt.
        append_ns: from an append's sending to its leader's answer, of those that were answered.
        append_failures: attempts that ended otherwise, by `ErrorCode`.
    """

    __slots__ = (
        "append_failures",
        "append_ns",
        "bytes",
        "chunks",
        "events",
        "failures",
        "outcomes",
        "receipt_ns",
        "receipts",
        "refusals",
        "stored",
    )

    def __init__(self) -> None:
        self.chunks = 0
        self.events = 0
        self.bytes = 0
        self.receipts = 0
        self.stored = 0
        self.outcomes: dict[int, int] = {}
        self.failures: dict[int, int] = {}
        self.refusals: dict[int, int] = {}
        self.receipt_ns = Histogram()
        self.append_ns = Histogram()
        self.append_failures: dict[int, int] = {}

    def answered(self, request: Request, now_ns: int) -> None:
        """A receipt goes out."""
        self.receipts += 1
        self.receipt_ns.observe(now_ns - request.arrived_ns)
        if not request.outcomes and not request.failures:
            self.stored += request.events
            return
        stored = request.events
        for outcome in request.outcomes:
            stored -= 1
            count_in(self.outcomes, outcome.reason)
        for failure in request.failures:
            stored -= failure.count
            count_in(self.failures, failure.error.code, failure.count)
        self.stored += stored
