"""What an instance of the alerts role counts while it works; `telemetry` tells it when it is asked."""

from __future__ import annotations

from tallymark_runtime.instruments import Histogram


class AlertsCounters:
    """An instance's numbers since its start.

    Attributes:
        tailed: records that the tail has brought.
        tail_failures: calls of the tail that failed, and partitions that were refused, by `ErrorCode`.
        gaps: answers of the tail that did not go on where they should, and were asked for again.
        delivered: records handed out, repeats included.
        answers: fetches that were answered, with records or without.
        failures: fetches that were not, by `ErrorCode`.
        catch_up_reads: pages read from stores for those who are behind the window.
        catch_up_failures: such pages that could not be read, by `ErrorCode`.
        age_ns: from a record's event (its append time) to its arrival by the tail.
    """

    __slots__ = (
        "age_ns",
        "answers",
        "catch_up_failures",
        "catch_up_reads",
        "delivered",
        "failures",
        "gaps",
        "tail_failures",
        "tailed",
    )

    def __init__(self) -> None:
        self.tailed = 0
        self.tail_failures: dict[int, int] = {}
        self.gaps = 0
        self.delivered = 0
        self.answers = 0
        self.failures: dict[int, int] = {}
        self.catch_up_reads = 0
        self.catch_up_failures: dict[int, int] = {}
        self.age_ns = Histogram()
