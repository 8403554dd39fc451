"""Which store is asked what, and how answers merge."""

from __future__ import annotations

import base64
from typing import Any

import msgspec
import pytest

from tallymark_protocol import int128, limits
from tallymark_protocol.errors import InvalidRequestError
from tallymark_protocol.identifiers import partition_of
from tallymark_protocol.messages import (
    AlertRecord,
    AlertsResult,
    Filter,
    QueryAlerts,
    QueryEvents,
    QueryRealtime,
    QueryTop,
    QueryTotals,
    RealtimeResult,
    Row,
    Stats,
    StoreTotals,
    TotalsResult,
)
from tallymark_protocol.model import AggType, DimensionFilter, MetricSchema, PeriodType
from tallymark_protocol.periods import Period, current_billing_period, current_month, to_ns
from tallymark_protocol.schema import MetricRecord, make_record
from tallymark_query import plan

NOW = to_ns("2024-03-20T12:00:00Z")
COUNT = 4


def metric(**fields: Any) -> MetricRecord:
    return make_record(5, MetricSchema(code="m", **fields))


DIMENSIONS = [DimensionFilter(key="p", values=["a"]), DimensionFilter(key="r")]
SUM = metric(
    agg_type=AggType.SUM,
    filters=DIMENSIONS,
    period_type=PeriodType.CALENDAR,
    billing_cycle_day=15,
    time_zone="Europe/Berlin",
)


# ---------------------------------------------------------------- totals


def test_symbolic_periods_are_the_metrics_own() -> None:
    """In its zone, from its cycle day."""
    request = QueryTotals(42, "m", current_month())
    asked, period = plan.totals(request, SUM, NOW, COUNT)
    bounds = (to_ns("2024-02-29T23:00:00Z"), to_ns("2024-03-31T22:00:00Z"))
    assert (period.start_ns, period.end_ns) == bounds
    assert asked.buckets == [bounds]
    assert asked.partition == partition_of(42, COUNT)
    billing = plan.bounds(current_billing_period(), SUM, NOW)
    assert billing == Period(to_ns("2024-03-14T23:00:00Z"), to_ns("2024-04-14T22:00:00Z"))


def test_a_series_tiles_its_period() -> None:
    """Hours of the day on which clocks change; the ends are those asked for."""
    start, end = to_ns("2024-03-30T22:10:00Z"), to_ns("2024-03-31T22:30:00Z")
    request = QueryTotals(42, "m", Period(start, end), unit="hour")
    asked, period = plan.totals(request, SUM, NOW, COUNT)
    assert asked.buckets[0][0] == start
    assert asked.buckets[-1][1] == end
    assert all(a[1] == b[0] for a, b in zip(asked.buckets, asked.buckets[1:], strict=False))
    assert len(asked.buckets) == 25
    result = plan.totals_result(asked, period, SUM, TotalsResult([], 77, asked.partition))
    assert result.buckets == asked.buckets
    assert (result.start_ns, result.end_ns) == (start, end)
    assert result.as_of == {asked.partition: 77}
    assert result.agg_type == AggType.SUM


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"filters": [Filter("x", ["1"])]}, "no dimension 'x'; it declares 'p', 'r'"),
        ({"group_by": ["x"]}, "no dimension 'x'"),
        ({"group_by": ["p", "p"]}, "named twice"),
        ({"filters": [Filter("p", ["1"]), Filter("p", ["2"])]}, "named twice"),
    ],
)
def test_dimensions_must_be_declared(fields: dict[str, Any], message: str) -> None:
    """With a sentence that says which there are; filtering and grouping by one is fine."""
    with pytest.raises(InvalidRequestError, match=message):
        plan.totals(QueryTotals(1, "m", current_month(), **fields), SUM, NOW, COUNT)
    both = QueryTotals(1, "m", current_month(), filters=[Filter("p", ["a"])], group_by=["p", "r"])
    asked, _ = plan.totals(both, SUM, NOW, COUNT)
    assert (asked.filters, asked.group_by) == (both.filters, ["p", "r"])
    with pytest.raises(InvalidRequestError, match="declares none"):
        plan.totals(QueryTotals(1, "m", current_month(), group_by=["p"]), metric(), NOW, COUNT)


def test_too_many_buckets_are_refused() -> None:
    """Before anything is computed from them."""
    request = QueryTotals(1, "m", Period(0, 10**18), unit="hour")
    with pytest.raises(InvalidRequestError):
        plan.totals(request, SUM, NOW, COUNT)


def test_a_running_total_is_one_row() -> None:
    """Of the account's partition, with the bounds that the store used."""
    asked = plan.realtime(QueryRealtime(2**64 - 1, "m"), COUNT)
    assert asked.partition == partition_of(2**64 - 1, COUNT)
    answer = RealtimeResult(Stats(count=3), 5, 9, 70, asked.partition)
    result = plan.realtime_result(asked.partition, int(AggType.MAX), answer)
    assert (result.start_ns, result.end_ns, result.buckets) == (5, 9, [(5, 9)])
    assert [row.stats.count for row in result.rows] == [3]
    assert result.agg_type == AggType.MAX


# ---------------------------------------------------------------- rankings


def test_a_ranking_asks_everywhere() -> None:
    """Each partition for as many as are wanted: the best may all lie in one."""
    asked, period = plan.top(QueryTop("m", Period(5, 9), 7), SUM, NOW, COUNT)
    assert [question.partition for question in asked] == [0, 1, 2, 3]
    assert all(question.account_id is None and question.top == 7 for question in asked)
    assert all(question.buckets == [(5, 9)] for question in asked)
    assert period == Period(5, 9)
    for limit in (0, -1, plan.TOP_LIMIT_MAX + 1):
        with pytest.raises(InvalidRequestError, match="limit must be"):
            plan.top(QueryTop("m", Period(5, 9), limit), SUM, NOW, COUNT)


@pytest.mark.parametrize(
    ("agg", "make"),
    [
        (AggType.COUNT, lambda x: Stats(count=x)),
        (AggType.SUM, lambda x: Stats(sum=int128.to_bytes(x))),
        (AggType.MAX, lambda x: Stats(max=x)),
        (AggType.LATEST, lambda x: Stats(last_value=x)),
        (AggType.COUNT_UNIQUE, lambda x: Stats(unique=x)),
    ],
)
def test_the_best_of_all_partitions(agg: AggType, make: Any) -> None:
    """Largest first by the metric's own aggregate, ties by account; whoever has none comes last."""
    record = metric(agg_type=agg)
    answers = [
        TotalsResult([Row(make(9), account_id=4), Row(make(1), account_id=2)], 10, 0),
        TotalsResult([Row(make(9), account_id=3), Row(make(0), account_id=7)], 11, 1),
        TotalsResult([], 12, 2),
    ]
    request = QueryTop("m", Period(5, 9), 3)
    result = plan.merge_top(request, Period(5, 9), record, answers)
    assert [row.account_id for row in result.rows] == [3, 4, 2]
    assert result.as_of == {0: 10, 1: 11, 2: 12}
    if agg in (AggType.MAX, AggType.LATEST):
        answers.append(TotalsResult([Row(Stats(), account_id=1), Row(make(-5), account_id=9)], 1, 3))
        result = plan.merge_top(msgspec.structs.replace(request, limit=10), Period(5, 9), record, answers)
        assert [row.account_id for row in result.rows] == [3, 4, 2, 7, 9, 1]


def test_sums_rank_as_numbers_of_128_bits() -> None:
    """Also beyond 64 bits, and below zero."""
    rows = [
        Row(Stats(sum=int128.to_bytes(value)), account_id=i)
        for i, value in enumerate((2**64, -(2**70), 2**90, 0, -1))
    ]
    result = plan.merge_top(QueryTop("m", Period(5, 9)), Period(5, 9), SUM, [TotalsResult(rows, 1, 0)])
    assert [row.account_id for row in result.rows] == [2, 0, 3, 4, 1]


# ---------------------------------------------------------------- events


@pytest.mark.parametrize("offset", [0, 1, 2**63 - 1])
def test_cursors_come_back(offset: int) -> None:
    """As the offset that they were made of."""
    assert plan.decode_cursor(plan.encode_cursor(offset)) == offset


@pytest.mark.parametrize(
    "cursor",
    [
        "x",
        "!!!!",
        "1:5",
        "\xff",
        base64.urlsafe_b64encode(b"2:5").decode(),
        base64.urlsafe_b64encode(b"1:-5").decode(),
        base64.urlsafe_b64encode(b"1:5:5").decode(),
        base64.urlsafe_b64encode(f"1:{2**63}".encode()).decode(),
        base64.urlsafe_b64encode(b"\xff\xfe").decode(),
    ],
)
def test_other_strings_are_no_cursors(cursor: str) -> None:
    """With an error that shows it."""
    with pytest.raises(InvalidRequestError, match="is not a cursor"):
        plan.decode_cursor(cursor)


def test_a_page_of_events_is_asked_of_one_store() -> None:
    """From the cursor on."""
    asked = plan.events(QueryEvents(42, 5, 9, "m", plan.encode_cursor(70), 3), COUNT)
    assert (asked.partition, asked.from_offset, asked.limit) == (partition_of(42, COUNT), 70, 3)
    assert (asked.start_ns, asked.end_ns, asked.metric_code) == (5, 9, "m")
    assert plan.events(QueryEvents(42, 5, 9), COUNT).from_offset == 0


@pytest.mark.parametrize(
    "fields",
    [
        {"limit": 0},
        {"limit": limits.PAGE_EVENTS_MAX + 1},
        {"start_ns": -1},
        {"start_ns": 10},
        {"end_ns": 2**63},
    ],
)
def test_bad_pages_are_refused(fields: dict[str, int]) -> None:
    """Limits, and ranges that are none."""
    with pytest.raises(InvalidRequestError):
        plan.events(msgspec.structs.replace(QueryEvents(42, 5, 9), **fields), COUNT)


# ---------------------------------------------------------------- alerts


def alert(partition: int, position: int, at: int) -> AlertRecord:
    return AlertRecord(
        f"{partition}-{position}", 1, "m", "t", 1, 0, 9, bytes(16), bytes(16), bytes(16), at, 0, partition, position
    )  # fmt: skip


def test_alerts_of_one_account_are_asked_of_its_partition() -> None:
    """Those of all, everywhere; each from its own position."""
    asked = plan.alerts(QueryAlerts(since={1: 5, 3: 7}), COUNT)
    assert [(question.partition, question.from_position) for question in asked] == [
        (0, 0),
        (1, 5),
        (2, 0),
        (3, 7),
    ]
    at = partition_of(42, COUNT)
    asked = plan.alerts(QueryAlerts(account_id=42, since={at: 9}), COUNT)
    assert [(question.partition, question.from_position) for question in asked] == [(at, 9)]


@pytest.mark.parametrize("since", [{4: 0}, {-1: 0}, {0: -1}, {0: 2**63}, {3: 2**64 - 1}])
def test_positions_that_cannot_be_are_refused(since: dict[int, int]) -> None:
    """Before any store is asked."""
    with pytest.raises(InvalidRequestError, match="since"):
        plan.alerts(QueryAlerts(since=since), COUNT)
    with pytest.raises(InvalidRequestError, match="limit"):
        plan.alerts(QueryAlerts(limit=0), COUNT)


def test_alerts_of_a_range_are_asked_for_it() -> None:
    """Every partition concerned; without a range for all of time. A range that is none is refused."""
    for account, partitions in ((None, COUNT), (42, 1)):
        asked = plan.alerts(QueryAlerts(account_id=account, start_ns=5, end_ns=9), COUNT)
        assert [(one.start_ns, one.end_ns) for one in asked] == [(5, 9)] * partitions
    assert {(one.start_ns, one.end_ns) for one in plan.alerts(QueryAlerts(), COUNT)} == {(0, 2**63 - 1)}
    for start_ns, end_ns in ((-1, 5), (6, 5), (0, 2**63)):
        with pytest.raises(InvalidRequestError, match="not one of times"):
            plan.alerts(QueryAlerts(start_ns=start_ns, end_ns=end_ns), COUNT)


@pytest.mark.parametrize("limit", [1, 2, 3, 5, 100])
def test_pages_show_every_alert_once(limit: int) -> None:
    """Whatever the size of pages, in order of time, and no partition is passed over."""
    held = {
        0: [alert(0, i, 10 * i) for i in range(7)],
        1: [alert(1, i, 5) for i in range(4)],
        2: [],
        3: [alert(3, i, 100 - 0 * i) for i in range(3)],
    }
    since: dict[int, int] = {}
    shown: list[AlertRecord] = []
    for _ in range(50):
        request = QueryAlerts(since=since, limit=limit)
        asked = plan.alerts(request, COUNT)
        answers = []
        for question in asked:
            rest = held[question.partition][question.from_position :]
            page = rest[: question.limit]
            answers.append(AlertsResult(page, question.from_position + len(page), more=len(rest) > len(page)))
        page = plan.merge_alerts(request, asked, answers)
        assert len(page.alerts) <= limit
        times = [one.triggered_at_ns for one in page.alerts]
        assert times == sorted(times)
        shown += page.alerts
        since = page.next
        if not page.more:
            break
    assert not page.more
    assert sorted(one.id for one in shown) == sorted(one.id for part in held.values() for one in part)
    assert [one.triggered_at_ns for one in shown] == sorted(one.triggered_at_ns for one in shown)


def test_partitions_that_were_not_asked_keep_their_position() -> None:
    """One account's page does not move the others' cursors."""
    at = partition_of(42, COUNT)
    since = dict.fromkeys(range(COUNT), 3)
    request = QueryAlerts(account_id=42, since=since)
    asked = plan.alerts(request, COUNT)
    page = plan.merge_alerts(request, asked, [AlertsResult([], 8, more=False)])
    assert page.next == since | {at: 8}


def test_store_requests_carry_what_was_asked() -> None:
    """A filter on a dimension goes to the store as it is."""
    filters = [Filter("r", ["x", "y"])]
    asked, _ = plan.totals(QueryTotals(1, "m", Period(0, 5), filters=filters), SUM, NOW, COUNT)
    assert asked == StoreTotals(partition_of(1, COUNT), "m", 1, [(0, 5)], filters, [])


def test_a_copy_that_is_behind_does_not_take_a_cursor_back() -> None:
    """Its end of the alerts may lie before where the caller has been already."""
    request = QueryAlerts(account_id=42, since=dict.fromkeys(range(COUNT), 9))
    asked = plan.alerts(request, COUNT)
    page = plan.merge_alerts(request, asked, [AlertsResult([], 5, more=False, as_of=70, lag=2)])
    assert page.next == request.since
    at = partition_of(42, COUNT)
    assert (page.as_of, page.lag, page.silence_ms) == ({at: 70}, {at: 2}, {})
