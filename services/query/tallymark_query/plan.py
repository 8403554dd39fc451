"""What to ask which store, and how answers merge: pure functions from requests to requests and back.

An account lives in one partition, so a question about one account is one request; only questions about all
accounts are asked everywhere and merged. Symbolic periods are resolved here, with the metric's own zone and
the time given; the store then counts exactly the events timed in the bounds it is given.
"""

from __future__ import annotations

import base64
import binascii

from tallymark_protocol import limits
from tallymark_protocol.errors import InvalidRequestError
from tallymark_protocol.identifiers import partition_of
from tallymark_protocol.int128 import from_bytes
from tallymark_protocol.messages import (
    AlertRecord,
    AlertsPage,
    AlertsResult,
    EventsPage,
    EventsResult,
    QueryAlerts,
    QueryEvents,
    QueryRealtime,
    QueryResult,
    QueryTop,
    QueryTotals,
    RealtimeResult,
    Row,
    Stats,
    StoreAlerts,
    StoreEvents,
    StoreRealtime,
    StoreTotals,
    TotalsResult,
)
from tallymark_protocol.model import AggType
from tallymark_protocol.periods import Period, PeriodSpec, buckets, resolve
from tallymark_protocol.schema import MetricRecord

TOP_LIMIT_MAX = 10_000
_CURSOR_VERSION = 1


def bounds(period: PeriodSpec | Period, record: MetricRecord, now_ns: int) -> Period:
    """The instants that a period means for a metric."""
    schema = record.schema
    return resolve(period, now_ns, schema.period_type, schema.billing_cycle_day, record.zone)


def check_dimensions(record: MetricRecord, keys: list[str]) -> None:
    """Refuse dimensions that the metric does not declare."""
    declared = [dimension.key for dimension in record.schema.filters]
    for key in keys:
        if key not in declared:
            known = ", ".join(repr(name) for name in declared) or "none"
            raise InvalidRequestError(
                f"metric {record.schema.code!r} declares no dimension {key!r}; it declares {known}"
            )
    if len(set(keys)) != len(keys):
        raise InvalidRequestError("a dimension is named twice")


def totals(
    request: QueryTotals, record: MetricRecord, now_ns: int, partition_count: int
) -> tuple[StoreTotals, Period]:
    """The one store request for an account's usage, breakdown or series, and the bounds it covers."""
    check_dimensions(record, [item.key for item in request.filters])
    check_dimensions(record, list(request.group_by))
    period = bounds(request.period, record, now_ns)
    parts = [period]
    if request.unit is not None:
        parts = buckets(period.start_ns, period.end_ns, request.unit, record.zone, limits.QUERY_BUCKETS_MAX)
    return (
        StoreTotals(
            partition=partition_of(request.account_id, partition_count),
            metric_code=request.metric_code,
            account_id=request.account_id,
            buckets=[(part.start_ns, part.end_ns) for part in parts],
            filters=request.filters,
            group_by=request.group_by,
            consistency=request.consistency,
        ),
        period,
    )


def totals_result(
    request: StoreTotals, period: Period, record: MetricRecord, answer: TotalsResult
) -> QueryResult:
    """The caller's answer from the store's."""
    return QueryResult(
        rows=answer.rows,
        start_ns=period.start_ns,
        end_ns=period.end_ns,
        buckets=request.buckets,
        as_of={request.partition: answer.as_of},
        agg_type=int(record.schema.agg_type),
        lag=nonzero({request.partition: answer.lag}),
        silence_ms=nonzero({request.partition: answer.silence_ms}),
    )


def realtime(request: QueryRealtime, partition_count: int) -> StoreRealtime:
    """The store request for a running total."""
    return StoreRealtime(
        partition=partition_of(request.account_id, partition_count),
        metric_code=request.metric_code,
        account_id=request.account_id,
        consistency=request.consistency,
    )


def realtime_result(partition: int, agg_type: int, answer: RealtimeResult) -> QueryResult:
    """The caller's answer from the store's."""
    return QueryResult(
        rows=[Row(answer.stats)],
        start_ns=answer.start_ns,
        end_ns=answer.end_ns,
        buckets=[(answer.start_ns, answer.end_ns)],
        as_of={partition: answer.as_of},
        agg_type=agg_type,
        lag=nonzero({partition: answer.lag}),
        silence_ms=nonzero({partition: answer.silence_ms}),
    )


def top(
    request: QueryTop, record: MetricRecord, now_ns: int, partition_count: int
) -> tuple[list[StoreTotals], Period]:
    """One request a partition for the accounts with the highest aggregate."""
    if not 1 <= request.limit <= TOP_LIMIT_MAX:
        raise InvalidRequestError(f"limit must be 1 to {TOP_LIMIT_MAX}, not {request.limit}")
    check_dimensions(record, [item.key for item in request.filters])
    period = bounds(request.period, record, now_ns)
    asked = [
        StoreTotals(
            partition=partition,
            metric_code=request.metric_code,
            account_id=None,
            buckets=[(period.start_ns, period.end_ns)],
            filters=request.filters,
            top=request.limit,
            consistency=request.consistency,
        )
        for partition in range(partition_count)
    ]
    return asked, period


def aggregate(stats: Stats, agg_type: int) -> int | None:
    """The one number that a metric is about; None where there is none."""
    match AggType(agg_type):
        case AggType.COUNT:
            return stats.count
        case AggType.SUM:
            return from_bytes(stats.sum)
        case AggType.MAX:
            return stats.max
        case AggType.LATEST:
            return stats.last_value
        case AggType.COUNT_UNIQUE:
            return stats.unique


def merge_top(
    request: QueryTop, period: Period, record: MetricRecord, answers: list[TotalsResult]
) -> QueryResult:
    """The best of all partitions; an account is in one of them only."""
    agg_type = int(record.schema.agg_type)

    def rank(row: Row) -> tuple[bool, int, int]:
        value = aggregate(row.stats, agg_type)
        return (value is None, -(value or 0), row.account_id)

    rows = sorted((row for answer in answers for row in answer.rows), key=rank)[: request.limit]
    return QueryResult(
        rows=rows,
        start_ns=period.start_ns,
        end_ns=period.end_ns,
        buckets=[(period.start_ns, period.end_ns)],
        as_of={answer.partition: answer.as_of for answer in answers},
        agg_type=agg_type,
        lag=nonzero({answer.partition: answer.lag for answer in answers}),
        silence_ms=nonzero({answer.partition: answer.silence_ms for answer in answers}),
    )


def encode_cursor(offset: int) -> str:
    """A page's cursor: opaque to callers, stable while events are."""
    return base64.urlsafe_b64encode(f"{_CURSOR_VERSION}:{offset}".encode()).decode().rstrip("=")


def decode_cursor(cursor: str) -> int:
    """The offset to go on from.

    Raises:
        InvalidRequestError: when it is not a cursor.
    """
    if not cursor:
        return 0
    try:
        text = base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)).decode("ascii")
        version, offset = text.split(":")
        if int(version) == _CURSOR_VERSION and 0 <= int(offset) < 2**63:
            return int(offset)
    except (binascii.Error, UnicodeDecodeError, ValueError):
        pass
    raise InvalidRequestError(f"{cursor!r} is not a cursor")


def events(request: QueryEvents, partition_count: int) -> StoreEvents:
    """The one store request for a page of an account's events."""
    if not 1 <= request.limit <= limits.PAGE_EVENTS_MAX:
        raise InvalidRequestError(f"limit must be 1 to {limits.PAGE_EVENTS_MAX}, not {request.limit}")
    if not 0 <= request.start_ns <= request.end_ns < 2**63:
        raise InvalidRequestError(f"the range [{request.start_ns}, {request.end_ns}) is not one of times")
    return StoreEvents(
        partition=partition_of(request.account_id, partition_count),
        account_id=request.account_id,
        metric_code=request.metric_code,
        start_ns=request.start_ns,
        end_ns=request.end_ns,
        from_offset=decode_cursor(request.cursor),
        limit=request.limit,
        consistency=request.consistency,
    )


def events_page(partition: int, answer: EventsResult) -> EventsPage:
    """The caller's page from the store's."""
    return EventsPage(
        events=answer.events,
        cursor="" if answer.next_offset is None else encode_cursor(answer.next_offset),
        as_of={partition: answer.as_of},
        lag=nonzero({partition: answer.lag}),
        silence_ms=nonzero({partition: answer.silence_ms}),
    )


def alerts(request: QueryAlerts, partition_count: int) -> list[StoreAlerts]:
    """One request for each partition concerned."""
    if not 1 <= request.limit <= limits.PAGE_EVENTS_MAX:
        raise InvalidRequestError(f"limit must be 1 to {limits.PAGE_EVENTS_MAX}, not {request.limit}")
    for partition, position in request.since.items():
        if not 0 <= partition < partition_count or not 0 <= position < 2**63:
            raise InvalidRequestError(f"since: there is no position {position} in partition {partition}")
    if not 0 <= request.start_ns <= request.end_ns < 2**63:
        raise InvalidRequestError(f"the range [{request.start_ns}, {request.end_ns}) is not one of times")
    partitions = range(partition_count)
    if request.account_id is not None:
        at = partition_of(request.account_id, partition_count)
        partitions = range(at, at + 1)
    return [
        StoreAlerts(
            partition=partition,
            account_id=request.account_id,
            metric_code=request.metric_code,
            from_position=request.since.get(partition, 0),
            limit=request.limit,
            consistency=request.consistency,
            start_ns=request.start_ns,
            end_ns=request.end_ns,
        )
        for partition in partitions
    ]


def merge_alerts(request: QueryAlerts, asked: list[StoreAlerts], answers: list[AlertsResult]) -> AlertsPage:
    """One page, in order of time, that never passes over an alert: the cursor of a partition stops at what is shown."""
    found: list[AlertRecord] = [alert for answer in answers for alert in answer.alerts]
    found.sort(key=lambda alert: (alert.triggered_at_ns, alert.partition, alert.position))
    shown = found[: request.limit]
    cursor = dict(request.since)
    more = len(found) > len(shown)
    for question, answer in zip(asked, answers, strict=True):
        left = [alert.position for alert in found[request.limit :] if alert.partition == question.partition]
        after = min(left) if left else answer.next_position
        # A copy that is behind may not have come as far as its caller.
        cursor[question.partition] = max(after, question.from_position)
        more = more or answer.more
    by_partition = [(q.partition, a) for q, a in zip(asked, answers, strict=True)]
    return AlertsPage(
        alerts=shown,
        next=cursor,
        more=more,
        as_of={partition: answer.as_of for partition, answer in by_partition if answer.as_of >= 0},
        lag=nonzero({partition: answer.lag for partition, answer in by_partition}),
        silence_ms=nonzero({partition: answer.silence_ms for partition, answer in by_partition}),
    )


def nonzero(by_partition: dict[int, int]) -> dict[int, int]:
    """What says nothing is left out: leaders never lag."""
    return {partition: value for partition, value in by_partition.items() if value}
