"""What queries answer with: totals, rows, stored events, alerts; and how they are read from messages."""

from __future__ import annotations

import datetime as dt
import enum
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, Literal, TypeVar

import msgspec

from tallymark_protocol.errors import InvalidRequestError
from tallymark_protocol.identifiers import decode_event_id
from tallymark_protocol.messages import (
    AlertRecord,
    AlertsPage,
    Consistency,
    EventRecord,
    Filter,
    QueryResult,
    Row,
    Stats,
)
from tallymark_protocol.model import AggType, OperationType
from tallymark_protocol.periods import Period, PeriodSpec, from_ns, to_spec

Filters = Mapping[str, str | Sequence[str]]
"""Dimension values to count: by key one value or several. All keys must match."""

PeriodLike = Period | PeriodSpec | tuple[dt.datetime | int | str, dt.datetime | int | str]
"""A period: a `Period`, one by name (`current_month()`, ...), or a pair (start, end)."""


ConsistencyLike = Literal["leader", "stale", "quorum"]
"""Whom a read asks: the leader, any copy, or the leader after it has asked a majority. See `AsyncClient.query`."""

T = TypeVar("T")


class Other(enum.Enum):
    """The type of `OTHER`."""

    OTHER = "other"

    def __repr__(self) -> str:
        return "OTHER"


OTHER: Final = Other.OTHER
"""In a breakdown: the row of all values that the dimension doesn't declare."""


class Totals(msgspec.Struct, frozen=True, kw_only=True):
    """The statistics of a set of events. All numbers are exact; values are in the events' scale."""

    count: int = 0  # how many events; for COUNT_UNIQUE how many operations
    sum: int = 0
    min: int | None = None  # None where there is no event, as with max and last_value
    max: int | None = None
    last_value: int | None = None  # the value with the highest event time
    last_event_at: dt.datetime | None = None  # cut to microseconds
    unique: int | None = None  # how many distinct values; None unless the metric is a COUNT_UNIQUE one
    alert_flags: int = 0  # bit i: threshold i was crossed in this period (whole billing periods only)


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to a query."""

    value: Totals
    period: Period  # the bounds that were used
    as_of: dict[int, int]  # by partition the offset up to which (exclusive) events are counted
    # By partition, of copies that are behind (`consistency="stale"`): how many offsets, as far as the copy knows, and
    # for how long it has heard of no leader, in milliseconds (-1: not since it started). What isn't there is 0.
    lag: dict[int, int] = {}
    silence_ms: dict[int, int] = {}


class Rows(list[T]):
    """The answer to a query of several numbers: a list that says what it is as of.

    `as_of`, `lag` and `silence_ms` are those of `Usage`.
    """

    as_of: dict[int, int]
    lag: dict[int, int]
    silence_ms: dict[int, int]


class BreakdownRow(msgspec.Struct, frozen=True, kw_only=True):
    """One group of a breakdown.

    `group` has by key the dimension's value, None where the property was missing, or `OTHER`.
    """

    group: dict[str, str | Other | None]
    value: Totals


class AccountTotal(msgspec.Struct, frozen=True, kw_only=True):
    """One account of `top_accounts`."""

    account_id: int
    value: Totals


class StoredEvent(msgspec.Struct, frozen=True, kw_only=True):
    """An event as it was stored."""

    account_id: int
    metric_code: str
    value: int | str
    timestamp_ns: int  # the event time
    stored_at_ns: int  # the append time
    operation_type: OperationType
    properties: dict[str, str]
    id: str | bytes | uuid.UUID | int | None
    partition: int
    offset: int

    @property
    def timestamp(self) -> dt.datetime:
        """The event time in UTC, cut to microseconds."""
        return from_ns(self.timestamp_ns)

    @property
    def stored_at(self) -> dt.datetime:
        """When it was stored, in UTC, cut to microseconds."""
        return from_ns(self.stored_at_ns)


class Alert(msgspec.Struct, frozen=True, kw_only=True):
    """A threshold crossing.

    `id` is the same whenever and wherever it is read: keep it to notice repeats. It is made of what is in the
    replicated log: the partition, the event's offset, the threshold's place in the metric's list, the metric's uid.
    """

    id: str
    account_id: int
    metric_code: str
    threshold_code: str
    threshold_value: int
    period: Period
    value_at_cross: int  # the total after the crossing event
    first_multiple: int  # of threshold_value: the first that the event passed; 1 if it doesn't recur
    last_multiple: int
    triggered_at: dt.datetime  # when the event was stored
    event_offset: int
    partition: int
    position: int  # in the partition's sequence of alerts


class Alerts(list[Alert]):
    """A page of alerts, in order within each partition.

    `next` is the `since` that goes on after this page, also when the page is empty. `more` tells whether there
    are further ones already. `as_of`, `lag` and `silence_ms` are those of `Usage`.
    """

    next: dict[int, int]
    more: bool
    as_of: dict[int, int]
    lag: dict[int, int]
    silence_ms: dict[int, int]


def wide(data: bytes) -> int:
    """Read a 128-bit integer of a message."""
    return int.from_bytes(data, "little", signed=True)


def totals_of(stats: Stats | None, agg_type: int) -> Totals:
    """Make totals of a message's statistics; of none at all, those of no event."""
    if stats is None:
        return Totals(unique=0 if agg_type == AggType.COUNT_UNIQUE else None)
    return Totals(
        count=stats.count,
        sum=wide(stats.sum),
        min=stats.min,
        max=stats.max,
        last_value=stats.last_value,
        last_event_at=None if stats.last_event_at is None else from_ns(stats.last_event_at),
        unique=stats.unique,
        alert_flags=stats.alert_flags,
    )


def usage_of(result: QueryResult) -> Usage:
    """Read the answer to a query of one number."""
    stats = result.rows[0].stats if result.rows else None
    return Usage(
        value=totals_of(stats, result.agg_type),
        period=Period(result.start_ns, result.end_ns),
        as_of=result.as_of,
        lag=result.lag,
        silence_ms=result.silence_ms,
    )


def _rows(result: QueryResult, found: Iterable[T]) -> Rows[T]:
    rows = Rows(found)
    rows.as_of, rows.lag, rows.silence_ms = result.as_of, result.lag, result.silence_ms
    return rows


def breakdown_of(result: QueryResult, keys: Sequence[str]) -> Rows[BreakdownRow]:
    """Read the answer to a grouped query."""
    return _rows(
        result,
        (
            BreakdownRow(group=_group(row, keys), value=totals_of(row.stats, result.agg_type))
            for row in result.rows
        ),
    )


def ranking_of(result: QueryResult) -> Rows[AccountTotal]:
    """Read the answer to a ranking."""
    return _rows(
        result,
        (
            AccountTotal(account_id=row.account_id, value=totals_of(row.stats, result.agg_type))
            for row in result.rows
        ),
    )


def _group(row: Row, keys: Sequence[str]) -> dict[str, str | Other | None]:
    group: dict[str, str | Other | None] = {}
    for key, value in zip(keys, row.group, strict=True):
        group[key] = value.value if value.kind == 0 else None if value.kind == 1 else OTHER
    return group


def series_of(result: QueryResult) -> Rows[tuple[Period, Totals]]:
    """Read a time series: every bucket has a place, those without an event as well."""
    by_bucket = {row.bucket: row.stats for row in result.rows}
    return _rows(
        result,
        (
            (Period(start, end), totals_of(by_bucket.get(number), result.agg_type))
            for number, (start, end) in enumerate(result.buckets)
        ),
    )


def alerts_of(page: AlertsPage) -> Alerts:
    """Read a page of alerts."""
    alerts = Alerts(alert_of(record) for record in page.alerts)
    alerts.next, alerts.more = page.next, page.more
    alerts.as_of, alerts.lag, alerts.silence_ms = page.as_of, page.lag, page.silence_ms
    return alerts


def stored_event_of(record: EventRecord) -> StoredEvent:
    """Read a stored event."""
    return StoredEvent(
        account_id=record.account_id,
        metric_code=record.metric_code,
        value=record.value,
        timestamp_ns=record.event_time_ns,
        stored_at_ns=record.append_time_ns,
        operation_type=OperationType(record.operation),
        properties=record.properties,
        id=None if record.event_id is None else decode_event_id(record.event_id),
        partition=record.partition,
        offset=record.offset,
    )


def alert_of(record: AlertRecord) -> Alert:
    """Read an alert."""
    return Alert(
        id=record.id,
        account_id=record.account_id,
        metric_code=record.metric_code,
        threshold_code=record.threshold_code,
        threshold_value=record.threshold_value,
        period=Period(record.period_start_ns, record.period_end_ns),
        value_at_cross=wide(record.value_at_cross),
        first_multiple=wide(record.first_multiple),
        last_multiple=wide(record.last_multiple),
        triggered_at=from_ns(record.triggered_at_ns),
        event_offset=record.event_offset,
        partition=record.partition,
        position=record.position,
    )


def filters_of(filters: Filters | None) -> list[Filter]:
    """Make a message's filters."""
    made = []
    for key, values in (filters or {}).items():
        listed = [values] if isinstance(values, str) else list(values)
        if not isinstance(key, str) or not all(isinstance(value, str) for value in listed):
            raise InvalidRequestError(f"filter {key!r:.60} must be a string with strings to match")
        if not listed:
            raise InvalidRequestError(f"filter {key!r:.60} has no values to match")
        made.append(Filter(key=key, values=listed))
    return made


_CONSISTENCIES: Final = {kind.name.lower(): kind for kind in Consistency}


def consistency_of(name: str) -> Consistency:
    """Make a message's consistency."""
    found = _CONSISTENCIES.get(name) if isinstance(name, str) else None
    if found is None:
        raise InvalidRequestError(f"consistency must be 'leader', 'stale' or 'quorum', not {name!r:.40}")
    return found


def period_of_argument(period: PeriodLike) -> PeriodSpec:
    """Make a message's period."""
    if isinstance(period, tuple) and len(period) == 2:
        period = Period.between(*period)
    if not isinstance(period, (Period, PeriodSpec)):
        raise InvalidRequestError(
            f"a period is a Period, current_month() and the like, or (start, end), not {type(period).__name__}"
        )
    return to_spec(period)
