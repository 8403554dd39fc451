"""Instruments, and the text that is made of them."""

from __future__ import annotations

import asyncio
import logging

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tallymark_protocol.errors import ErrorCode, NotFoundError, Reason, UnavailableError
from tallymark_runtime.clock import ManualClock
from tallymark_runtime.coordinator.counted import CountedCoordinator
from tallymark_runtime.coordinator.local import MemoryCoordinator
from tallymark_runtime.coordinator.port import CompactedError, Put, Snapshot, absent, follow
from tallymark_runtime.coordinator.telemetry import CoordinatorTelemetry
from tallymark_runtime.instruments import LATENCY_BOUNDS_NS, Histogram, count_in
from tallymark_runtime.readiness import Readiness
from tallymark_runtime.telemetry import (
    NS,
    SERIES_MAX,
    TEXT_AGE_NS_MAX,
    Family,
    Telemetry,
    add_codes,
    add_outcomes,
)

REQUESTS = Family("tallymark_test_requests_total", "counter", "Requests.", ("kind",))
DEPTH = Family("tallymark_test_depth", "gauge", "Depth.")
SECONDS = Family("tallymark_test_seconds", "histogram", "Seconds.", ("kind",), NS)


def _telemetry(clock=None):
    return Telemetry(clock or ManualClock(), node_id="n1", version="1.2.3")


def _samples(telemetry, prefix="tallymark_"):
    """Every sample of a scrape: name and sorted labels -> value; none comes twice."""
    found = {}
    for family in text_string_to_metric_families(telemetry.render().decode()):
        for sample in family.samples:
            if sample.name.startswith(prefix):
                key = sample.name, tuple(sorted(sample.labels.items()))
                assert key not in found
                found[key] = sample.value
    return found


# ------------------------------------------------------------ instruments


def test_a_bucket_holds_its_upper_end():
    """Bounds are inclusive, as Prometheus has them, and what is above them all has a bucket, too."""
    histogram = Histogram((10, 20))
    for value in (0, 10, 11, 20, 21, 10**18):
        histogram.observe(value)
    assert histogram.counts == [2, 2, 2]
    assert histogram.count == 6
    assert histogram.total == 0 + 10 + 11 + 20 + 21 + 10**18


def test_a_histogram_has_ascending_bounds():
    """Bounds that don't ascend are a defect of whoever gave them."""
    for bounds in ((), (2, 1), (1, 1)):
        with pytest.raises(AssertionError):
            Histogram(bounds)
    assert list(LATENCY_BOUNDS_NS) == sorted(set(LATENCY_BOUNDS_NS))


def test_counts_by_key_are_bounded():
    """A peer that makes codes up takes no memory: after some keys the rest goes under one."""
    counts = {}
    for key in range(10_000):
        count_in(counts, key)
    count_in(counts, 3, 5)
    assert len(counts) <= 65
    assert counts[3] == 6
    assert sum(counts.values()) == 10_005


# ------------------------------------------------------------ the text


def test_text_holds_what_sources_tell():
    """Counters, gauges and histograms come out with their labels, units and cumulated buckets."""
    telemetry, histogram = _telemetry(), Histogram((1_000_000, 2_000_000_000))
    for value in (500_000, 1_000_000, 1_500_000, 3_000_000_000):
        histogram.observe(value)

    def source(scrape):
        scrape.add(REQUESTS, 3, "read")
        scrape.add(REQUESTS, 4, 'wr"ite\n\\')
        scrape.add(DEPTH, 7.5)
        scrape.add_histogram(SECONDS, histogram, "read")

    telemetry.add("store", source)
    found = _samples(telemetry)
    assert found["tallymark_test_requests_total", (("kind", "read"),)] == 3
    assert found["tallymark_test_requests_total", (("kind", 'wr"ite\n\\'),)] == 4
    assert found["tallymark_test_depth", ()] == 7.5
    buckets = {
        dict(labels)["le"]: value
        for (name, labels), value in found.items()
        if name == "tallymark_test_seconds_bucket"
    }
    assert buckets == {"0.001": 2, "2": 3, "+Inf": 4}
    assert found["tallymark_test_seconds_count", (("kind", "read"),)] == 4
    assert found["tallymark_test_seconds_sum", (("kind", "read"),)] == pytest.approx(3.003)
    info = (("node", "n1"), ("role", "store"), ("version", "1.2.3"))
    assert found["tallymark_node_info", info] == 1
    assert found["tallymark_telemetry_failures_total", (("source", "store"),)] == 0
    assert found["tallymark_telemetry_dropped", ()] == 0


def test_the_process_tells_of_itself():
    """Memory, time and descriptors of the process are there under their usual names."""
    names = {name for name, _ in _samples(_telemetry(), "process_")}
    assert {"process_resident_memory_bytes", "process_cpu_seconds_total", "process_open_fds"} <= names


def test_roles_of_one_process_share_families():
    """Two sources that tell the same family make one of it, and a series that both know comes once."""
    telemetry = _telemetry()
    telemetry.add("store", lambda scrape: (scrape.add(REQUESTS, 1, "a"), scrape.add(REQUESTS, 2, "b")))
    telemetry.add("query", lambda scrape: (scrape.add(REQUESTS, 9, "a"), scrape.add(REQUESTS, 3, "c")))
    text = telemetry.render().decode()
    assert text.count("# TYPE tallymark_test_requests_total counter") == 1
    found = _samples(telemetry)
    assert [found["tallymark_test_requests_total", (("kind", kind),)] for kind in "abc"] == [1, 2, 3]


def test_a_source_that_fails_takes_nothing_along(caplog):
    """The other sources are told all the same; the failure is logged and counted."""
    telemetry = _telemetry()

    def broken(scrape):
        raise ZeroDivisionError("broken")

    telemetry.add("store", broken)
    telemetry.add("query", lambda scrape: scrape.add(DEPTH, 1))
    with caplog.at_level(logging.ERROR):
        _samples(telemetry)
        found = _samples(telemetry)
    assert found["tallymark_test_depth", ()] == 1
    assert found["tallymark_telemetry_failures_total", (("source", "store"),)] == 2
    assert "the telemetry of store could not be read" in caplog.text
    telemetry.remove("store")
    assert ("tallymark_telemetry_failures_total", (("source", "store"),)) not in _samples(telemetry)


def test_a_family_is_bounded():
    """Too many series of one family are left out and counted; other families don't suffer."""
    telemetry = _telemetry()

    def source(scrape):
        for number in range(SERIES_MAX + 10):
            scrape.add(REQUESTS, 1, str(number))
        scrape.add(DEPTH, 1)

    telemetry.add("store", source)
    found = _samples(telemetry)
    assert sum(name == REQUESTS.name for name, _ in found) == SERIES_MAX
    assert found["tallymark_telemetry_dropped", ()] == 10
    assert found["tallymark_test_depth", ()] == 1


def test_fast_scrapes_get_the_same_text():
    """Asking again within a moment costs nothing; after it, the text is new."""
    clock, calls = ManualClock(), []
    telemetry = _telemetry(clock)
    telemetry.add("store", lambda scrape: calls.append(1))
    first = telemetry.text()
    clock.advance(TEXT_AGE_NS_MAX)
    assert telemetry.text() is first
    assert len(calls) == 1
    clock.advance(1)
    telemetry.text()
    assert len(calls) == 2


def test_codes_and_reasons_have_names():
    """Numbers become names; what this version doesn't know is added up as one series."""
    telemetry = _telemetry()
    codes = Family("tallymark_test_codes_total", "counter", "Codes.", ("kind", "code"))

    def source(scrape):
        add_codes(scrape, codes, {int(ErrorCode.NOT_LEADER): 2, 9_999: 3, -1: 4}, "x")
        add_outcomes(scrape, REQUESTS, 8, {int(Reason.PERIOD_SEALED): 5, 200: 1, 201: 1})

    telemetry.add("store", source)
    found = _samples(telemetry)
    assert found["tallymark_test_codes_total", (("code", "not_leader"), ("kind", "x"))] == 2
    assert found["tallymark_test_codes_total", (("code", "other"), ("kind", "x"))] == 7
    assert found["tallymark_test_requests_total", (("kind", "period_sealed"),)] == 5
    assert found["tallymark_test_requests_total", (("kind", "other"),)] == 2
    assert found["tallymark_test_requests_total", (("kind", "stored"),)] == 8
    assert found["tallymark_test_requests_total", (("kind", "duplicate"),)] == 0
    assert ("tallymark_test_requests_total", (("kind", "accepted"),)) not in found


# ------------------------------------------------------------ the coordinator, counted


async def test_coordinator_calls_are_counted():
    """Each operation is counted once, by what became of it, and goes through unchanged."""
    clock = ManualClock()
    inner = MemoryCoordinator(clock)
    counted = CountedCoordinator(inner, clock)
    revision = await counted.put(b"a/1", b"x")
    assert (await counted.get(b"a/1")).value == b"x"
    assert [item.key for item in (await counted.range(b"a/")).items] == [b"a/1"]
    assert (await counted.txn([absent(b"a/2")], [Put(b"a/2", b"y")])).succeeded
    assert await counted.delete(b"a/2")
    lease = await counted.lease_grant(5.0)
    assert await counted.lease_keepalive(lease) == 5.0
    await counted.lease_revoke(lease)
    with pytest.raises(NotFoundError):
        await counted.lease_keepalive(lease)
    counts = {name: histogram.count for name, histogram in counted.counters.latency_ns.items()}
    assert counts == dict.fromkeys(counts, 1)
    assert counted.counters.failures["lease_keepalive"] == {int(ErrorCode.NOT_FOUND): 1}

    changes = follow(counted, b"a/")
    first = await anext(changes)
    assert isinstance(first, Snapshot)
    waiting = asyncio.ensure_future(anext(changes))
    await counted.put(b"a/3", b"z")
    assert [event.item.key for event in await waiting] == [b"a/3"]
    await changes.aclose()
    assert (counted.counters.watches, counted.counters.events) == (1, 1)
    assert revision > 0

    telemetry = _telemetry()
    telemetry.add("store", CoordinatorTelemetry("store", counted.counters))
    found = _samples(telemetry)
    assert found["tallymark_coordinator_seconds_count", (("operation", "put"), ("role", "store"))] == 2
    failed = (("code", "not_found"), ("operation", "lease_keepalive"), ("role", "store"))
    assert found["tallymark_coordinator_failures_total", failed] == 1
    await counted.close()
    with pytest.raises(UnavailableError):
        await counted.get(b"a/1")
    assert counted.counters.failures["get"] != {}


async def test_a_cancelled_call_is_no_failure_and_a_broken_watch_is_one():
    """Who gives up waiting says nothing about the coordinator; a watch that ends by an error does."""

    class Broken:
        async def get(self, key):
            await asyncio.Event().wait()

        async def watch(self, prefix, from_revision=0):
            raise CompactedError("too old")
            yield []

    counted = CountedCoordinator(Broken(), ManualClock())
    call = asyncio.ensure_future(counted.get(b"a"))
    await asyncio.sleep(0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert counted.counters.failures["get"] == {}
    with pytest.raises(CompactedError):
        await anext(counted.watch(b"a"))
    assert sum(counted.counters.failures["watch"].values()) == 1


# ------------------------------------------------------------ readiness


def test_readiness_needs_every_part():
    """Not before something runs, not while a part objects, not once it stops; a fatal part makes it dead, too."""
    readiness, problem, dead = Readiness(), [""], [""]
    assert readiness.problems() == ["nothing has started yet"]
    readiness.starting("store")
    assert readiness.problems() == ["store: is starting"]
    readiness.add("store", lambda: problem[0])
    readiness.add("query", lambda: "")
    readiness.add_fatal("store", lambda: dead[0])
    assert readiness.problems() == []
    problem[0] = "no leader"
    assert readiness.problems() == ["store: no leader"]
    assert readiness.failures() == []
    problem[0] = ""
    readiness.is_stopping = True
    assert readiness.problems() == ["the process is stopping"]
    assert readiness.failures() == []
    dead[0] = "the log failed"
    assert readiness.failures() == ["store: the log failed"]
    assert readiness.problems() == ["store: the log failed", "the process is stopping"]
