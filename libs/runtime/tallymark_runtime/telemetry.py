"""Telemetry: what a process tells Prometheus about itself, gathered only when it is asked.

Owns the bridge between the instruments on hot paths (`instruments`, plain `int` attributes) and the text that is
scraped. Nothing is global: each process makes one `Telemetry` and adds a **source** per role, a function that reads
the role's numbers into a `Scrape`. Roles that share a process share families; a family has each series once.

What is told is declared beside the source that tells it, as `Family` constants; docs/operations.md lists all of
them, and a test compares the two. Label values come from enumerations and from the cluster's own names (partition,
node, kind, reason), never from what callers send; a family that grows beyond `SERIES_MAX` all the same loses its
newest series, and says how many in `tallymark_telemetry_dropped`.

A source that raises takes nothing but itself out of the scrape: that is logged, and counted in
`tallymark_telemetry_failures_total`.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable
from typing import Final, Literal, NamedTuple

from prometheus_client import CollectorRegistry, GCCollector, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from tallymark_protocol.errors import ErrorCode, Reason
from tallymark_runtime.clock import Clock
from tallymark_runtime.instruments import Histogram

_log = logging.getLogger(__name__)

CONTENT_TYPE: Final = CONTENT_TYPE_PLAIN_0_0_4
SERIES_MAX: Final = 4_096  # of one family; a histogram's counts once
TEXT_AGE_NS_MAX: Final = 100_000_000  # scrapes that come faster get the last one's text again
NS: Final = 1e-9  # scale of instruments that count nanoseconds


class Family(NamedTuple):
    """A family of series: declared once, filled by sources."""

    name: str  # with the prefix, without a histogram's suffixes; a counter's ends in _total
    kind: Literal["counter", "gauge", "histogram"]
    documentation: str  # one line
    labels: tuple[str, ...] = ()
    scale: float = 1.0  # what numbers are multiplied by to get to the unit of the name


INFO: Final = Family(
    "tallymark_node_info", "gauge", "Always 1: which node this is.", ("node", "role", "version")
)
DROPPED: Final = Family(
    "tallymark_telemetry_dropped", "gauge", "Series left out of this scrape because a family had too many."
)
FAILURES: Final = Family(
    "tallymark_telemetry_failures_total", "counter", "Times a source could not be read.", ("source",)
)


class Scrape:
    """The families as one scrape gathers them.

    Attributes:
        dropped: series that were left out, over a family's bound.
    """

    def __init__(self) -> None:
        self.dropped = 0
        self._metrics: dict[str, Metric] = {}
        self._series: dict[str, set[tuple[str, ...]]] = {}

    def add(self, family: Family, value: float, *labels: str) -> None:
        """Add one counter's or gauge's series; `labels` are the values of the family's labels, in order.

        A series that is there already is left as it is: two sources of one process may both know it.
        """
        assert family.kind != "histogram", "histograms are added by add_histogram"
        metric = self._place(family, labels)
        if metric is not None:
            values = dict(zip(family.labels, labels, strict=True))
            metric.add_sample(family.name, values, value * family.scale)

    def add_histogram(self, family: Family, histogram: Histogram, *labels: str) -> None:
        """Add one histogram's series."""
        assert family.kind == "histogram", "others are added by add"
        metric = self._place(family, labels)
        if metric is None:
            return
        values = dict(zip(family.labels, labels, strict=True))
        counts = list(histogram.counts)  # one reading: buckets and count agree whatever is observed meanwhile
        total = histogram.total
        bucket = family.name + "_bucket"
        for bound, cumulated in zip((*histogram.bounds, None), itertools.accumulate(counts), strict=True):
            le = "+Inf" if bound is None else f"{bound * family.scale:.9g}"
            metric.add_sample(bucket, {**values, "le": le}, cumulated)
        metric.add_sample(family.name + "_sum", values, total * family.scale)
        metric.add_sample(family.name + "_count", values, sum(counts))

    def metrics(self) -> list[Metric]:
        """What was gathered, by name."""
        return [metric for _, metric in sorted(self._metrics.items())]

    def _place(self, family: Family, labels: tuple[str, ...]) -> Metric | None:
        """The family to add a series to; None where it is there already or too many are."""
        metric = self._metrics.get(family.name)
        if metric is None:
            name = family.name.removesuffix("_total") if family.kind == "counter" else family.name
            metric = self._metrics[family.name] = Metric(name, family.documentation, family.kind)
            self._series[family.name] = set()
        series = self._series[family.name]
        if labels in series:
            return None
        if len(series) >= SERIES_MAX:
            self.dropped += 1
            return None
        series.add(labels)
        return metric


Source = Callable[[Scrape], None]


class Telemetry(Collector):
    """What one process tells. Use it on one event loop.

    Args:
        clock: what the age of a text is measured by.
        node_id: this node's name.
        version: of this software.
    """

    def __init__(self, clock: Clock, *, node_id: str, version: str) -> None:
        self._clock = clock
        self._node_id = node_id
        self._version = version
        self._sources: dict[str, Source] = {}
        self._failures: dict[str, int] = {}
        self._text = b""  # rendered last ...
        self._text_ns = 0  # ... and when
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        ProcessCollector(registry=self._registry)
        GCCollector(registry=self._registry)

    def add(self, role: str, source: Source) -> None:
        """Read `source` with every scrape from now on, under the name of a role (or of another part)."""
        assert role not in self._sources, "each source is added once"
        self._sources[role] = source

    def remove(self, role: str) -> None:
        """Read a source no more: what it reads is about to go."""
        self._sources.pop(role, None)

    def collect(self) -> Iterable[Metric]:
        """Read all sources."""
        scrape = Scrape()
        for role, source in self._sources.items():
            scrape.add(INFO, 1, self._node_id, role, self._version)
            try:
                source(scrape)
            except Exception:
                # The other sources' numbers are what one would look for the cause with.
                _log.exception("the telemetry of %s could not be read", role)
                self._failures[role] = self._failures.get(role, 0) + 1
        for role in self._sources:
            scrape.add(FAILURES, self._failures.get(role, 0), role)
        scrape.add(DROPPED, scrape.dropped)
        return scrape.metrics()

    def render(self) -> bytes:
        """The text of a scrape, read now."""
        return generate_latest(self._registry)

    def text(self) -> bytes:
        """The text of a scrape, at most `TEXT_AGE_NS_MAX` old: asking faster than that costs nothing."""
        now = self._clock.monotonic_ns()
        if not self._text or now - self._text_ns > TEXT_AGE_NS_MAX:
            self._text = self.render()
            self._text_ns = now
        return self._text


_CODE_NAMES: Final = {int(code): code.name.lower() for code in ErrorCode}
_REASON_NAMES: Final = {
    int(reason): reason.name.lower() for reason in Reason if reason is not Reason.ACCEPTED
}


def add_codes(scrape: Scrape, family: Family, counts: dict[int, int], *labels: str) -> None:
    """Add a counter by error code, the family's last label; codes that this version doesn't know are "other"."""
    _add_named(scrape, family, counts, _CODE_NAMES, labels)


def add_outcomes(scrape: Scrape, family: Family, stored: int, others: dict[int, int]) -> None:
    """Add a counter by events' outcome, the family's only label: "stored", and `Reason`s likewise.

    All of them, also those that never came: a rate is blind to a counter's first step if that makes the series.
    """
    scrape.add(family, stored, "stored")
    _add_named(scrape, family, dict.fromkeys(_REASON_NAMES, 0) | others, _REASON_NAMES, ())


def _add_named(
    scrape: Scrape, family: Family, counts: dict[int, int], names: dict[int, str], labels: tuple[str, ...]
) -> None:
    named: dict[str, int] = {}
    for number, count in counts.items():
        name = names.get(number, "other")
        named[name] = named.get(name, 0) + count
    for name, count in sorted(named.items()):
        scrape.add(family, count, *labels, name)
