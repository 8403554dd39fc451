"""What a query node counts while it works; `telemetry` tells it when it is asked."""

from __future__ import annotations

import asyncio

from tallymark_protocol.errors import ErrorCode, TallymarkError
from tallymark_protocol.messages import Call, QueryAlerts, QueryEvents, QueryRealtime, QueryTop, QueryTotals
from tallymark_runtime.instruments import Histogram, count_in

CANCELLED = 0  # stands for the code of a query that its caller gave up, or its connection

KINDS: dict[type[Call], str] = {
    QueryRealtime: "realtime",
    QueryTotals: "totals",
    QueryTop: "top",
    QueryEvents: "events",
    QueryAlerts: "alerts",
}


class QueryCounters:
    """A query node's numbers since its start.

    Attributes:
        latency_ns: of queries that were answered, by kind; retries at other leaders are part of it.
        failures: of those that were not, by kind and `ErrorCode`.
        under_way: queries that have no answer yet.
    """

    __slots__ = ("_latency", "failures", "latency_ns", "under_way")

    def __init__(self) -> None:
        self._latency = {kind: Histogram() for kind in KINDS}
        self.latency_ns = {name: self._latency[kind] for kind, name in KINDS.items()}
        self.failures: dict[str, dict[int, int]] = {name: {} for name in KINDS.values()}
        self.under_way = 0

    def answered(self, call: Call, took_ns: int) -> None:
        """A call was answered; calls that are no queries are not counted."""
        latency = self._latency.get(type(call))
        if latency is not None:
            latency.observe(took_ns)

    def failed(self, call: Call, error: BaseException) -> None:
        """A call got an error, or nobody waits for it any more."""
        name = KINDS.get(type(call))
        if name is None:
            return
        if isinstance(error, asyncio.CancelledError):
            code = CANCELLED
        else:
            code = error.code if isinstance(error, TallymarkError) else int(ErrorCode.INTERNAL)
        count_in(self.failures[name], code)
