"""Queries and metrics: what is asked, how answers are read, and what is repeated."""

import asyncio
import datetime as dt
import uuid

import pytest
from fake_gateway import FakeGateway, until

from tallymark import (
    OTHER,
    AlertThreshold,
    AlreadyExistsError,
    AsyncClient,
    InvalidRequestError,
    MetricSchema,
    NotFoundError,
    Period,
    UnavailableError,
    current_month,
)
from tallymark_protocol import messages as m
from tallymark_protocol.errors import ErrorCode, WireError
from tallymark_protocol.identifiers import encode_event_id


@pytest.fixture
async def gateway():
    """A gateway that also answers queries."""
    async with FakeGateway() as running:
        yield running


@pytest.fixture
async def client(gateway):
    """A client connected to it."""
    async with AsyncClient([gateway.address], timeout=5) as connected:
        yield connected


def wide(number):
    """A 128-bit number of a message."""
    return number.to_bytes(16, "little", signed=True)


def stats(**fields):
    """Statistics with a sum beyond 64 bits."""
    return m.Stats(count=2, sum=wide(-(2**100)), **fields)


async def test_query(client, gateway):
    """A query carries its arguments, and its answer is read exactly."""
    answer = m.QueryResult(
        [m.Row(stats(min=-5, max=9, last_value=9, last_event_at=1_500, alert_flags=3))], 10, 20, as_of={1: 7}
    )
    gateway.answers[m.QueryTotals] = answer
    usage = await client.query(42, "m", current_month(), filters={"p": "aws", "q": ["a", "b"]})
    assert usage.value.sum == -(2**100)
    assert (usage.value.count, usage.value.min, usage.value.max, usage.value.last_value) == (2, -5, 9, 9)
    assert usage.value.last_event_at == dt.datetime(1970, 1, 1, 0, 0, 0, 1, tzinfo=dt.UTC)
    assert (usage.value.alert_flags, usage.value.unique) == (3, None)
    assert (usage.period, usage.as_of) == (Period(10, 20), {1: 7})
    call = gateway.calls[-1]
    assert (call.account_id, call.metric_code, call.period) == (42, "m", current_month())
    assert [(f.key, f.values) for f in call.filters] == [("p", ["aws"]), ("q", ["a", "b"])]


async def test_query_of_nothing(client, gateway):
    """No events: counts are 0, extremes None; uniques 0 where the metric counts them."""
    gateway.answers[m.QueryTotals] = m.QueryResult([], 0, 1)
    value = (await client.query(1, "m", Period(0, 1))).value
    assert (value.count, value.sum, value.min, value.max, value.last_value, value.unique) == (
        0,
        0,
        None,
        None,
        None,
        None,
    )
    gateway.answers[m.QueryRealtime] = m.QueryResult([], 0, 1, agg_type=4)
    assert (await client.query_realtime(1, "m")).value.unique == 0


async def test_period_arguments(client, gateway):
    """Explicit periods travel as ranges."""
    gateway.answers[m.QueryTotals] = m.QueryResult([], 0, 1)
    start = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
    end = start + dt.timedelta(days=1)
    await client.query(1, "m", (start, end))
    period = gateway.calls[-1].period
    assert (period.kind, period.end_ns - period.start_ns) == ("range", 86_400 * 10**9)
    for wrong in ("month", (end, start), 5):
        with pytest.raises(InvalidRequestError):
            await client.query(1, "m", wrong)
    with pytest.raises(InvalidRequestError, match="consistency"):
        await client.query(1, "m", current_month(), consistency="eventual")
    with pytest.raises(InvalidRequestError, match="no values"):
        await client.query(1, "m", current_month(), filters={"p": []})
    with pytest.raises(InvalidRequestError):
        await client.query(-1, "m", current_month())


async def test_breakdown(client, gateway):
    """Groups tell a value, a missing property and undeclared values apart."""
    groups = [m.GroupValue(0, "aws"), m.GroupValue(1), m.GroupValue(2), m.GroupValue(0, "")]
    gateway.answers[m.QueryTotals] = m.QueryResult([m.Row(stats(), group=[group]) for group in groups], 0, 1)
    rows = await client.breakdown(1, "m", current_month(), group_by=["p"])
    assert [row.group for row in rows] == [{"p": "aws"}, {"p": None}, {"p": OTHER}, {"p": ""}]
    assert gateway.calls[-1].group_by == ["p"]


async def test_series(client, gateway):
    """Every bucket has a place, also without events."""
    gateway.answers[m.QueryTotals] = m.QueryResult(
        [m.Row(stats(), bucket=1)], 0, 30, buckets=[(0, 10), (10, 20), (20, 30)]
    )
    series = await client.series(1, "m", Period(0, 30), unit="hour")
    assert [(period.start_ns, totals.count) for period, totals in series] == [(0, 0), (10, 2), (20, 0)]
    assert gateway.calls[-1].unit == "hour"


async def test_top_accounts(client, gateway):
    """The ranking comes back in order."""
    gateway.answers[m.QueryTop] = m.QueryResult([m.Row(stats(), account_id=a) for a in (9, 4)], 0, 1)
    assert [row.account_id for row in await client.top_accounts("m", current_month(), limit=2)] == [9, 4]
    assert gateway.calls[-1].limit == 2


def record(offset, event_id=None):
    """A stored event of a message."""
    return m.EventRecord(1, "m", offset, 2_000, 3_000, 0, {"k": "v"}, event_id, 3, offset)


async def test_list_events(client, gateway):
    """Pages are fetched until there is no cursor; ids come back as they were sent."""
    identifier = uuid.UUID(int=7)
    pages = {
        "": m.EventsPage([record(0, encode_event_id(identifier)), record(1)], "next"),
        "next": m.EventsPage([record(2, encode_event_id(-5))], ""),
    }
    gateway.answers[m.QueryEvents] = lambda call: pages[call.cursor]
    start = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
    events = [event async for event in client.list_events(1, start, 10**10, page_size=2)]
    assert [(event.offset, event.id, event.value) for event in events] == [
        (0, identifier, 0),
        (1, None, 1),
        (2, -5, 2),
    ]
    assert events[0].timestamp == start + dt.timedelta(microseconds=2)
    assert (events[0].properties, events[0].partition) == ({"k": "v"}, 3)
    assert [(c.start_ns, c.end_ns, c.limit) for c in gateway.calls] == [(0, 10**10, 2)] * 2
    with pytest.raises(InvalidRequestError, match="page_size"):
        await anext(client.list_events(1, 0, 1, page_size=0))


async def test_list_alerts(client, gateway):
    """Alerts carry where to go on."""
    alert = m.AlertRecord("id-1", 42, "m", "free", 100, 0, 50, wide(2**70), wide(1), wide(3), 5_000, 8, 1, 0)
    gateway.answers[m.QueryAlerts] = m.AlertsPage([alert], {1: 1}, True)
    alerts = await client.list_alerts(42, since={1: 0})
    assert (alerts.next, alerts.more) == ({1: 1}, True)
    assert (alerts[0].id, alerts[0].value_at_cross, alerts[0].last_multiple) == ("id-1", 2**70, 3)
    assert (alerts[0].period, alerts[0].event_offset, alerts[0].partition) == (Period(0, 50), 8, 1)
    assert gateway.calls[-1].since == {1: 0}
    assert (gateway.calls[-1].start_ns, gateway.calls[-1].end_ns) == (0, 2**63 - 1)
    start = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
    await client.list_alerts(since={"1": 1}, start=start, end="2026-01-02T00:00:00Z")
    asked = gateway.calls[-1]
    assert asked.since == {1: 1}
    assert (asked.start_ns, asked.end_ns - asked.start_ns) == (int(start.timestamp()) * 10**9, 86_400 * 10**9)


async def test_queries_go_to_query_nodes(gateway):
    """The topology says where; where a query node fails, the next is asked."""
    async with FakeGateway(gateway.cluster) as node:
        dead = FakeGateway()
        await dead.start()
        await dead.stop()
        gateway.query_addresses = [node.address, dead.address]
        node.answers[m.QueryRealtime] = m.QueryResult([], 0, 1)
        async with AsyncClient([gateway.address], timeout=5) as client:
            for _ in range(3):
                await client.query_realtime(1, "m")
        assert len(node.calls) == 3
        assert gateway.calls == []


async def test_reads_are_repeated(client, gateway):
    """A read is repeated after a lost connection and after an error that may pass."""
    replies = [None, WireError(int(ErrorCode.NOT_LEADER), True, "moving"), m.QueryResult([], 0, 1)]
    gateway.answers[m.QueryRealtime] = lambda call: replies.pop(0)
    assert (await client.query_realtime(1, "m")).value.count == 0
    # In between the client looks where queries are answered by now.
    assert [type(call) for call in gateway.calls].count(m.QueryRealtime) == 3


async def test_errors_of_queries(client, gateway):
    """Errors come as their class, and a silent service ends at the timeout."""
    gateway.answers[m.QueryRealtime] = WireError(int(ErrorCode.UNKNOWN_METRIC), False, "no such metric")
    with pytest.raises(NotFoundError, match="no such metric"):
        await client.query_realtime(1, "m")
    gateway.answers[m.QueryRealtime] = WireError(int(ErrorCode.NOT_LEADER), True, "moving")
    with pytest.raises(UnavailableError, match="timeout: moving"):
        await client.query_realtime(1, "m", timeout=0.05)


async def test_close_ends_queries(client, gateway):
    """A query under way when the client closes is told so."""
    release = asyncio.Event()
    gateway.answers[m.QueryRealtime] = WireError(int(ErrorCode.NOT_LEADER), True, "moving")
    call = asyncio.create_task(client.query_realtime(1, "m"))
    await until(lambda: gateway.calls)
    await client.close()
    with pytest.raises(UnavailableError):
        await call
    assert not release.is_set()


SCHEMA = MetricSchema(code="m")


async def test_metrics(client, gateway):
    """Metrics are created, listed by code, read, changed and deleted."""
    info = m.MetricInfo(5, 1, SCHEMA)
    one = m.MetricsResult([info])
    gateway.answers.update({m.MetricCreate: one, m.MetricUpdate: one, m.MetricDelete: m.MetricsResult([])})
    gateway.answers[m.MetricList] = m.MetricsResult([info, m.MetricInfo(6, 1, MetricSchema(code="a"))])
    assert await client.metrics.create(SCHEMA) == SCHEMA
    assert await client.metrics.update(SCHEMA) == SCHEMA
    assert [schema.code for schema in await client.metrics.list()] == ["a", "m"]
    assert await client.metrics.get("m") == SCHEMA
    with pytest.raises(NotFoundError):
        await client.metrics.get("z")
    await client.metrics.delete("m")
    assert [type(call) for call in gateway.calls[:2]] == [m.MetricCreate, m.MetricUpdate]
    with pytest.raises(InvalidRequestError):
        await client.metrics.create("m")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"thresholds": [AlertThreshold(code="a", value=2**63)]}, r"thresholds\[0\].*2\^63-1"),
        ({"thresholds": [AlertThreshold(code="a", value=2**200)]}, r"thresholds\[0\].*2\^63-1"),
        ({"thresholds": [AlertThreshold(code="a", value=1.5)]}, r"thresholds\[0\].value"),
        ({"agg_type": "SUM"}, "agg_type"),
        ({"filters": ["region"]}, "filters"),
        ({"billing_cycle_day": 5}, "billing_cycle_day"),
    ],
)
async def test_bad_schemas_are_not_sent(client, gateway, fields, words):
    """What can't be a schema is said here, by field, before anything is encoded."""
    schema = MetricSchema(**{"code": "m", **fields})
    for call in (client.metrics.create, client.metrics.update):
        with pytest.raises(InvalidRequestError, match=words):
            await call(schema)
    assert gateway.calls == []


async def test_create_tells_equal_from_different(client, gateway):
    """AlreadyExistsError says whether the schema is the same."""
    gateway.answers[m.MetricCreate] = WireError(
        int(ErrorCode.METRIC_EXISTS), False, "exists", {"identical": True}
    )
    with pytest.raises(AlreadyExistsError) as caught:
        await client.metrics.create(SCHEMA)
    assert caught.value.identical


async def test_changes_are_not_mistaken_for_someone_elses(client, gateway):
    """A create or delete whose answer was lost succeeds when the repeat finds it done."""
    exists = WireError(int(ErrorCode.METRIC_EXISTS), False, "exists", {"identical": True})
    missing = WireError(int(ErrorCode.NOT_FOUND), False, "gone")
    created, deleted = [None, exists], [None, missing]
    gateway.answers[m.MetricCreate] = lambda call: created.pop(0)
    gateway.answers[m.MetricDelete] = lambda call: deleted.pop(0)
    assert await client.metrics.create(SCHEMA) == SCHEMA
    await client.metrics.delete("m")
    gateway.answers[m.MetricDelete] = missing
    with pytest.raises(NotFoundError):
        await client.metrics.delete("m")


@pytest.mark.parametrize("consistency", ["leader", "stale", "quorum"])
async def test_consistency_travels_and_the_answer_says_how_far_it_is_behind(client, gateway, consistency):
    """With every query, as a number; `lag` and `silence_ms` are with every answer that has a place for them."""
    facts = {"as_of": {1: 7}, "lag": {1: 3}, "silence_ms": {1: -1}}
    gateway.answers[m.QueryTotals] = m.QueryResult([], 0, 1, **facts)
    gateway.answers[m.QueryRealtime] = gateway.answers[m.QueryTop] = gateway.answers[m.QueryTotals]
    gateway.answers[m.QueryEvents] = m.EventsPage([], "", **facts)
    gateway.answers[m.QueryAlerts] = m.AlertsPage([], {}, False, **facts)
    month = current_month()
    answers = [
        await client.query(1, "m", month, consistency=consistency),
        await client.query_realtime(1, "m", consistency=consistency),
        await client.breakdown(1, "m", month, group_by="p", consistency=consistency),
        await client.series(1, "m", month, consistency=consistency),
        await client.top_accounts("m", month, consistency=consistency),
        await client.list_alerts(consistency=consistency),
    ]
    assert [event async for event in client.list_events(1, 0, 5, consistency=consistency)] == []
    for answer in answers:
        assert (answer.as_of, answer.lag, answer.silence_ms) == ({1: 7}, {1: 3}, {1: -1})
    asked = [call.consistency for call in gateway.calls if hasattr(call, "consistency")]
    assert asked == [m.Consistency[consistency.upper()]] * 7
