"""What a load has measured: calls, events, latencies and errors, by kind of call; and the report of it.

Latencies go into buckets whose bounds grow by 2 %, so figures of many processes add up and a percentile is right to
that, from a microsecond to hours. Everything here is plain data: a process writes its `Figures` as a line of JSON,
another adds them to its own.
"""

from __future__ import annotations

import math
from collections import Counter

import msgspec

_GROWTH = math.log(1.02)


def bucket_of(seconds: float) -> int:
    """The bucket of a latency; a microsecond and less is bucket 0."""
    return max(0, math.ceil(math.log(max(seconds, 1e-6) * 1e6) / _GROWTH - 1e-9))


def seconds_of(bucket: int) -> float:
    """The upper bound of a bucket."""
    return math.exp(bucket * _GROWTH) / 1e6


class Kind(msgspec.Struct):
    """The figures of one kind of call."""

    calls: int = 0  # that were answered as hoped
    events: int = 0  # that they stored or listed
    seconds: float = 0.0  # in all
    longest: float = 0.0  # seconds
    buckets: dict[int, int] = {}  # answered calls, by `bucket_of` their latency
    errors: dict[str, int] = {}  # calls that failed, by kind of error

    def percentile(self, share: float) -> float:
        """The latency in seconds that this share of the answered calls stayed within; 0 without any."""
        rank = math.ceil(share * self.calls)
        for bucket in sorted(self.buckets):
            rank -= self.buckets[bucket]
            if rank <= 0:
                return min(seconds_of(bucket), self.longest)
        return self.longest

    def add(self, other: Kind) -> None:
        """Add what another process, or another second, has measured."""
        self.calls += other.calls
        self.events += other.events
        self.seconds += other.seconds
        self.longest = max(self.longest, other.longest)
        self.buckets = dict(Counter(self.buckets) + Counter(other.buckets))
        self.errors = dict(Counter(self.errors) + Counter(other.errors))


class Figures(msgspec.Struct):
    """Figures of all kinds of calls, by name."""

    kinds: dict[str, Kind] = {}

    def answered(self, kind: str, seconds: float, events: int) -> None:
        """Count a call that was answered as hoped."""
        entry = self.kinds.setdefault(kind, Kind())
        entry.calls += 1
        entry.events += events
        entry.seconds += seconds
        entry.longest = max(entry.longest, seconds)
        bucket = bucket_of(seconds)
        entry.buckets[bucket] = entry.buckets.get(bucket, 0) + 1

    def failed(self, kind: str, error: str) -> None:
        """Count a call that failed."""
        errors = self.kinds.setdefault(kind, Kind()).errors
        errors[error] = errors.get(error, 0) + 1

    def add(self, other: Figures) -> None:
        """Add what another process, or another second, has measured."""
        for name, kind in other.kinds.items():
            self.kinds.setdefault(name, Kind()).add(kind)

    def take(self) -> Figures:
        """The figures so far; counting begins anew."""
        taken = Figures(self.kinds)
        self.kinds = {}
        return taken


def summary(figures: Figures, seconds: float) -> dict[str, object]:
    """The report as a document: by kind, and errors by kind of error over all."""
    kinds = {}
    errors: Counter[str] = Counter()
    for name, kind in sorted(figures.kinds.items()):
        errors.update(kind.errors)
        kinds[name] = {
            "calls": kind.calls,
            "calls_per_second": round(kind.calls / seconds, 1),
            "events": kind.events,
            "events_per_second": round(kind.events / seconds, 1),
            "p50_ms": round(kind.percentile(0.50) * 1e3, 3),
            "p99_ms": round(kind.percentile(0.99) * 1e3, 3),
            "max_ms": round(kind.longest * 1e3, 3),
            "errors": dict(sorted(kind.errors.items())),
        }
    return {
        "seconds": round(seconds, 3),
        "calls": sum(kind.calls for kind in figures.kinds.values()),
        "failed": errors.total(),
        "errors": dict(errors.most_common()),
        "kinds": kinds,
    }


def table(figures: Figures, seconds: float) -> str:
    """The report for people."""
    head = ("what", "calls", "calls/s", "events/s", "p50 ms", "p99 ms", "max ms", "errors")
    rows = [head]
    errors: Counter[str] = Counter()
    for name, kind in sorted(figures.kinds.items()):
        errors.update(kind.errors)
        times = (kind.percentile(0.50), kind.percentile(0.99), kind.longest)
        rows.append(
            (
                name,
                f"{kind.calls:,}",
                f"{kind.calls / seconds:,.0f}",
                f"{kind.events / seconds:,.0f}",
                *(f"{time * 1e3:.2f}" for time in times),
                f"{sum(kind.errors.values()):,}",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = [
        "  ".join(text.ljust(width) if i == 0 else text.rjust(width) for i, (text, width) in enumerate(cells))
        for cells in (list(zip(row, widths, strict=True)) for row in rows)
    ]
    lines += [f"{count:,} x {error}" for error, count in errors.most_common()]
    return "\n".join(lines)
