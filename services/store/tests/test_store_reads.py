"""Answers of `Reads` against a plain recount of the log, whatever they were made of."""

from __future__ import annotations

import random
from typing import Any

import pytest
from numba.core.dispatcher import Dispatcher

from tallymark_protocol import int128
from tallymark_protocol.errors import InvalidRequestError, NotFoundError, UnavailableError
from tallymark_protocol.messages import (
    Filter,
    GroupValue,
    StoreAlerts,
    StoreEvents,
    StoreRealtime,
    StoreTotals,
)
from tallymark_protocol.model import (
    AggType,
    DimensionFilter,
    MetricSchema,
    PeriodType,
)
from tallymark_protocol.periods import day_of, period_of
from tallymark_protocol.schema import make_record
from tallymark_store.fold import Fold
from tallymark_store.reads import Reads, empty_stats, warm_up
from tallymark_store.scan import kernels, plan, ranking

from .payload_builder import event
from .reads_helpers import (
    ACCOUNTS,
    BASE,
    DAY,
    END,
    HOUR,
    PARTITION,
    SCHEMAS,
    Log,
    finish,
    random_buckets,
    random_event,
    random_filters,
    random_log,
    without_flags,
)


@pytest.mark.parametrize("seed", range(10))
def test_totals_equal_a_recount(seed: int) -> None:
    """Every aggregation, zone, range, series, filter and breakdown gives exactly the events timed in it."""
    log = random_log(seed)
    rng = random.Random(seed + 100)
    for _ in range(120):
        record = log.records[rng.choice(SCHEMAS).code]
        keys = [dimension.key for dimension in record.schema.filters]
        request = StoreTotals(
            partition=PARTITION,
            metric_code=record.schema.code,
            account_id=rng.choice((*ACCOUNTS, 555)),
            buckets=random_buckets(rng, record),
            filters=random_filters(rng, record),
            group_by=rng.sample(keys, rng.randrange(len(keys) + 1)) if rng.random() < 0.5 else [],
        )
        result = finish(log.reads.plan_totals(request), rng)
        got = [(row.bucket, row.group, without_flags(row.stats)) for row in result.rows]
        assert got == log.totals(request), request
        assert (result.as_of, result.metric_uid) == (log.fold.applied, record.uid)


@pytest.mark.parametrize("seed", range(6))
def test_rankings_equal_a_recount(seed: int) -> None:
    """The best accounts, by each aggregation, over any range and filter; ties by account id."""
    log = random_log(seed)
    rng = random.Random(seed + 200)
    for _ in range(60):
        record = log.records[rng.choice(SCHEMAS).code]
        agg_type = record.schema.agg_type
        request = StoreTotals(
            partition=PARTITION,
            metric_code=record.schema.code,
            account_id=None,
            buckets=random_buckets(rng, record)[:1],
            filters=random_filters(rng, record) if rng.random() < 0.5 else [],
            top=rng.choice((1, 2, 3, 100)),
        )
        result = finish(log.reads.plan_totals(request), rng)
        expected = []
        for account in ACCOUNTS:
            events = log.wanted(record.schema.code, account, *request.buckets[0], request.filters)
            if events:
                stats = log.reference.stats(events, agg_type)
                aggregate = {
                    AggType.COUNT: stats.count,
                    AggType.SUM: int128.from_bytes(stats.sum),
                    AggType.MAX: stats.max,
                    AggType.LATEST: stats.last_value,
                    AggType.COUNT_UNIQUE: stats.unique,
                }[agg_type]
                assert aggregate is not None
                expected.append((-aggregate, account, stats))
        expected.sort(key=lambda row: row[:2])
        got = [(row.account_id, without_flags(row.stats)) for row in result.rows]
        assert got == [(account, stats) for _, account, stats in expected[: request.top]], request


@pytest.mark.parametrize("zone", ["UTC", "America/New_York", "Asia/Kathmandu"])
def test_every_edge_of_a_day_is_exact(zone: str) -> None:
    """One nanosecond more or less at either end of a range counts exactly the events that it should."""
    log = Log()
    log.put(
        make_record(
            1, MetricSchema(code="d", agg_type=AggType.SUM, period_type=PeriodType.DAY, time_zone=zone)
        )
    )
    log.put(make_record(2, MetricSchema(code="u", agg_type=AggType.COUNT_UNIQUE, time_zone=zone)))
    days = [day_of(BASE + i * DAY, log.records["d"].zone).start_ns for i in range(2, 6)]
    times = [day + shift for day in days for shift in (-1, 0, 1)]
    times = [times[0] - DAY, *times, times[-1] + DAY]
    events = [event(1, code, value=i, time=at) for i, at in enumerate(times) for code in ("d", "u")]
    log.append(events, BASE + 9 * DAY)
    edges = [day + shift for day in (days[0], days[1], days[3]) for shift in (-1, 0, 1, 2)]
    for start in edges:
        for end in edges:
            if start > end:
                continue
            for code in ("d", "u"):
                for account in (1, None):
                    request = StoreTotals(PARTITION, code, account, [(start, end)], top=0 if account else 1)
                    rows = log.reads.totals(request).rows
                    count = rows[0].stats.count if rows else 0
                    assert count == sum(start <= at < end for at in times)


def test_a_read_tells_of_the_offset_it_was_made_at() -> None:
    """What is appended between two steps of a read is in neither of its parts."""
    log = random_log(1)
    rng = random.Random(5)
    for _ in range(20):
        record = log.records[rng.choice(SCHEMAS).code]
        request = StoreTotals(
            partition=PARTITION,
            metric_code=record.schema.code,
            account_id=1,
            buckets=random_buckets(rng, record),
            group_by=[dimension.key for dimension in record.schema.filters],
        )
        expected, as_of = log.totals(request), log.fold.applied
        read = log.reads.plan_totals(request)
        log.append([random_event(rng) for _ in range(30)], BASE + 20 * DAY)
        result = finish(read, rng)
        assert [(row.bucket, row.group, without_flags(row.stats)) for row in result.rows] == expected
        assert result.as_of == as_of


def test_flags_come_with_the_period_only() -> None:
    """A billing period's total says which thresholds were crossed; a part of it doesn't."""
    log = Log()
    log.put(make_record(1, SCHEMAS[1]))
    log.append(
        [event(1, "sum", value=9, time=BASE), event(1, "sum", value=1, time=BASE + 5 * HOUR)], BASE + DAY
    )
    period = period_of(BASE, PeriodType.CALENDAR, 9, log.records["sum"].zone)
    for bounds, flags, total in (
        ((period.start_ns, period.end_ns), 1, 10),
        ((period.start_ns, period.end_ns - 1), 0, 10),
        ((period.start_ns + 1, BASE + HOUR), 0, 9),
    ):
        for account in (1, None):
            request = StoreTotals(PARTITION, "sum", account, [bounds], top=0 if account else 5)
            rows = log.reads.totals(request).rows
            assert [row.stats.alert_flags for row in rows] == [flags]
            assert int128.from_bytes(rows[0].stats.sum) == total


def test_a_day_with_too_many_combinations_is_exact() -> None:
    """Where cells gave up on a day, filters, breakdowns and rankings are answered from raw events."""
    log = Log()
    log.by_reference = False
    schema = MetricSchema(code="m", agg_type=AggType.SUM, filters=[DimensionFilter(key="r")])
    log.put(make_record(1, schema))
    n = 10_050
    crowd = [event(1, "m", value=2, time=BASE + i, properties={"r": f"r{i}"}) for i in range(n)]
    log.append(crowd, BASE + DAY)
    # Late ones of known and of unknown combinations, neighbours, and another account.
    log.append(
        [
            event(1, "m", value=5, time=BASE + 7, properties={"r": "r3"}),
            event(1, "m", value=7, time=BASE + 8, properties={"r": f"r{n - 1}"}),
            event(1, "m", value=11, time=BASE - 1, properties={"r": f"r{n - 1}"}),
            event(1, "m", value=13, time=BASE + DAY, properties={"r": "r3"}),
            event(1, "m", value=17, time=BASE + 2 * DAY),
            event(2, "m", value=20_000, time=BASE + 9, properties={"r": "r3"}),
            event(2, "m", value=1, time=BASE - DAY, properties={"r": "r3"}),
        ],
        BASE + DAY,
    )
    reads = log.reads

    def total(start: int, end: int, value: str | None, account: int = 1) -> tuple[int, int]:
        filters = [] if value is None else [Filter("r", [value])]
        (row,) = reads.totals(StoreTotals(PARTITION, "m", account, [(start, end)], filters)).rows
        return row.stats.count, int128.from_bytes(row.stats.sum)

    assert log.fold.day_rows(1, 0, BASE, BASE + DAY).overflowed == [BASE]
    assert total(BASE, BASE + DAY, None) == (n + 2, 2 * n + 12)
    assert total(BASE - DAY, BASE + 3 * DAY, None) == (n + 5, 2 * n + 53)
    assert total(BASE, BASE + DAY, f"r{n - 1}") == (2, 9)
    assert total(BASE - DAY, BASE + 3 * DAY, f"r{n - 1}") == (3, 20)
    assert total(BASE - DAY, BASE + 3 * DAY, "r3") == (3, 20)
    assert total(BASE - DAY, BASE + 2, "r3") == (0, 0)
    assert total(BASE - DAY, BASE + 3 * DAY, "r3", 2) == (2, 20_001)
    days = [(BASE + i * DAY, BASE + (i + 1) * DAY) for i in range(-9, 9)]
    rows = reads.totals(StoreTotals(PARTITION, "m", 1, days)).rows
    assert [(row.bucket, row.stats.count) for row in rows] == [(8, 1), (9, n + 2), (10, 1), (11, 1)]
    request = StoreTotals(PARTITION, "m", 1, [(BASE - DAY, BASE + 3 * DAY)], group_by=["r"])
    groups = {row.group[0]: row.stats for row in reads.totals(request).rows}
    assert len(groups) == n + 1
    assert sum(stats.count for stats in groups.values()) == n + 5
    assert groups[GroupValue(0, f"r{n - 1}")].count == 3
    assert groups[GroupValue(1)].count == 1
    for filters, expected in (
        ([], [(1, 2 * n + 53 - 11), (2, 20_000)]),
        ([Filter("r", [f"r{n - 1}"])], [(1, 9)]),
        ([Filter("r", ["r3"])], [(2, 20_000), (1, 20)]),
    ):
        request = StoreTotals(PARTITION, "m", None, [(BASE, BASE + 3 * DAY - 1)], filters, top=9)
        got = [(row.account_id, int128.from_bytes(row.stats.sum)) for row in reads.totals(request).rows]
        assert got == expected


def test_today_until_now_needs_no_raw_events() -> None:
    """A range that ends after the last event takes the last day, or period, whole."""
    log = Log()
    log.put(make_record(1, SCHEMAS[3]))
    log.put(make_record(2, SCHEMAS[4]))
    log.append(
        [event(1, "latest", value=4, time=BASE + 5), event(1, "users", value=4, time=BASE + 5)], BASE + 6
    )
    log.source.flip_bit(0, 40)
    for code in ("latest", "users"):
        (row,) = log.reads.totals(StoreTotals(PARTITION, code, 1, [(BASE, BASE + 7)])).rows
        assert row.stats.count == 1


def test_what_is_no_longer_in_the_log_is_said() -> None:
    """Raw events that are gone make an error, not a smaller total; cells still answer."""
    log = Log()
    log.put(make_record(1, SCHEMAS[0]))
    log.append([event(1, "count", time=BASE)], BASE)
    log.source.log_start = 2
    day = day_of(BASE, log.records["count"].zone)
    whole = StoreTotals(PARTITION, "count", 1, [(day.start_ns, day.end_ns)])
    assert log.reads.totals(whole).rows[0].stats.count == 1
    with pytest.raises(UnavailableError, match="no longer in the log"):
        log.reads.totals(StoreTotals(PARTITION, "count", 1, [(day.start_ns, BASE + 1)]))
    with pytest.raises(UnavailableError, match="no longer in the log"):
        log.reads.events(StoreEvents(PARTITION, None, None, 0, END))


def test_requests_that_make_no_sense() -> None:
    """Each gets an error that names what is wrong."""
    log = random_log(3, records=3)
    bounds = [(0, END)]

    def totals(code: str = "sum", account: int | None = 1, spans: Any = None, **more: Any) -> None:
        log.reads.totals(StoreTotals(PARTITION, code, account, bounds if spans is None else spans, **more))

    with pytest.raises(NotFoundError, match="nope"):
        totals("nope")
    with pytest.raises(InvalidRequestError, match="colour"):
        totals(filters=[Filter("colour", ["red"])])
    with pytest.raises(InvalidRequestError, match="colour"):
        totals(group_by=["colour"])
    with pytest.raises(InvalidRequestError, match="azure"):
        totals(filters=[Filter("provider", ["azure"])])
    with pytest.raises(InvalidRequestError, match="twice"):
        totals(group_by=["region", "region"])
    with pytest.raises(InvalidRequestError, match="twice"):
        totals(filters=[Filter("region", ["eu"]), Filter("region", ["us"])])
    with pytest.raises(InvalidRequestError, match="account"):
        totals(account=2**64)
    for spans in ([], [(5, 4)], [(0, 5), (4, 8)], [(8, 9), (0, 2)], [(0, 2**63)]):
        with pytest.raises(InvalidRequestError, match=r"bucket"):
            totals(spans=spans)
    for more in ({"top": 0}, {"top": 1, "group_by": ["region"]}, {"top": 1, "spans": [(0, 1), (1, 2)]}):
        with pytest.raises(InvalidRequestError, match="ranking"):
            totals(account=None, **more)
    for limit in (0, 10_001):
        with pytest.raises(InvalidRequestError, match="limit"):
            log.reads.events(StoreEvents(PARTITION, 1, None, 0, END, limit=limit))
        with pytest.raises(InvalidRequestError, match="limit"):
            log.reads.alerts(StoreAlerts(PARTITION, limit=limit))
    with pytest.raises(InvalidRequestError, match="ends before"):
        log.reads.events(StoreEvents(PARTITION, 1, None, 5, 4))
    with pytest.raises(NotFoundError):
        log.reads.events(StoreEvents(PARTITION, 1, "nope", 0, END))
    with pytest.raises(NotFoundError):
        log.reads.alerts(StoreAlerts(PARTITION, metric_code="nope"))
    with pytest.raises(NotFoundError):
        log.reads.realtime(StoreRealtime(PARTITION, "nope", 1), BASE)
    with pytest.raises(InvalidRequestError, match="at_ns"):
        log.reads.realtime(StoreRealtime(PARTITION, "sum", 1, -1), BASE)


def test_realtime_is_the_period_cell() -> None:
    """The running total of now's period, of another one, and of one without events."""
    log = random_log(4)
    for schema in SCHEMAS:
        record = log.records[schema.code]
        for account in (*ACCOUNTS, 555):
            for at in (BASE, BASE + 4 * DAY, BASE + 400 * DAY):
                stats, start, end = log.reference.period_stats(account, record.uid, at)
                for request, now in (
                    (StoreRealtime(PARTITION, schema.code, account), at),
                    (StoreRealtime(PARTITION, schema.code, account, at), 5),
                ):
                    got = log.reads.realtime(request, now)
                    assert got.stats == (stats or empty_stats(schema.agg_type))
                    assert (got.start_ns, got.end_ns, got.as_of) == (start, end, log.fold.applied)


@pytest.mark.parametrize("seed", range(3))
def test_events_of_a_recreated_metric_are_its_own(seed: int) -> None:
    """By code the living metric's events are listed, without a code everybody's; page after page."""
    log = random_log(seed)
    for code in (None, "max", "sum"):
        offsets: list[int] = []
        at: int | None = 0
        while at is not None:
            page = log.reads.events(StoreEvents(PARTITION, 7, code, BASE, BASE + 4 * DAY, at, 9))
            offsets += [record.offset for record in page.events]
            at = page.next_offset
            assert page.as_of == log.fold.applied
        uid = None if code is None else log.records[code].uid
        assert offsets == [
            e.offset
            for e in log.reference.events
            if e.account == 7 and BASE <= e.time < BASE + 4 * DAY and uid in (None, e.metric.record.uid)
        ]


def test_alerts_page_by_page() -> None:
    """Alert records come in order, each once, and the position to go on from never falls."""
    log = random_log(2)
    everything = log.fold.alerts(0, limit=10_000)
    assert len(everything) > 5
    for account in (None, 7, 555):
        got, position, more = [], 0, True
        while more:
            page = log.reads.alerts(StoreAlerts(PARTITION, account, "sum", position, 2))
            got += page.alerts
            assert page.next_position >= position
            position, more = page.next_position, page.more
        assert got == [alert for alert in everything if account in (None, alert.account_id)]
        assert position == log.fold.alert_count
        ahead = log.reads.alerts(StoreAlerts(PARTITION, account, None, position + 4))
        assert (ahead.alerts, ahead.next_position, ahead.more) == ([], position + 4, False)


def test_reads_after_a_restart() -> None:
    """A restored fold answers as the one it was copied from, codes with two lives included."""
    log = random_log(6)
    restored = Reads(Fold.restore(PARTITION, log.fold.snapshot()), log.source)
    for schema in SCHEMAS:
        request = StoreTotals(PARTITION, schema.code, 1, [(BASE + 1, BASE + 3 * DAY)])
        assert restored.totals(request) == log.reads.totals(request)


def test_warm_up_compiles_what_reads_need() -> None:
    """After it no read, of whatever kind, makes the event loop wait for the compiler."""
    warm_up()
    log = random_log(8, records=6)

    def compiled() -> dict[str, int]:
        return {
            f"{module.__name__}.{name}": len(kernel.signatures)
            for module in (kernels, ranking, plan)
            for name, kernel in vars(module).items()
            if isinstance(kernel, Dispatcher)
        }

    before = compiled()
    everything = [
        StoreTotals(PARTITION, schema.code, None, [(1, BASE + DAY + 1)], top=3) for schema in SCHEMAS
    ]
    everything += [StoreTotals(PARTITION, schema.code, 1, [(BASE, BASE + DAY + 1)]) for schema in SCHEMAS]
    everything.append(
        StoreTotals(PARTITION, "count", 1, [(BASE, BASE + HOUR)], [Filter("region", ["eu"])], ["provider"])
    )
    for request in everything:
        log.reads.totals(request)
    log.reads.events(StoreEvents(PARTITION, None, None, 0, END))
    log.reads.events(StoreEvents(PARTITION, 1, "sum", 0, END))
    assert compiled() == before
    assert before["tallymark_store.scan.kernels.scan_totals"] >= 1
