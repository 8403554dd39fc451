"""The public value types: events, metric schemas, their enums.

These are what the SDK exports and what travels in messages. They hold data and no rules: `schema`
validates a `MetricSchema`, `chunk` encodes `Event`s, `periods` does the calendar.
"""

from __future__ import annotations

import datetime as dt
import enum
import uuid

import msgspec

SCALE = 1_000_000  # `scale(1)`: values carry six decimals


class AggType(enum.IntEnum):
    """How a metric's events become one number."""

    COUNT = 0  # how many events; the value is ignored
    SUM = 1
    MAX = 2
    LATEST = 3  # the value with the highest event time; ties go to the later offset
    COUNT_UNIQUE = 4  # distinct values


class PeriodType(enum.IntEnum):
    """How a metric's time divides into billing periods."""

    FIXED_30_DAYS = 0  # windows of 30 days (of 24 h) from 1970-01-01T00:00Z
    CALENDAR = 1  # months from `billing_cycle_day`, in the metric's time zone
    DAY = 2
    YEAR = 3
    LIFETIME = 4


class UniqueType(enum.IntEnum):
    """What the values of a COUNT_UNIQUE metric are."""

    UINT64 = 0
    INT64 = 1
    STRING = 2  # hashed to 128 bits; the event's `value` is then a string


class OperationType(enum.IntEnum):
    """What an event does to a COUNT_UNIQUE set. NONE means ADD."""

    NONE = 0
    ADD = 1
    REMOVE = 2


class DeliveryMode(enum.IntEnum):
    """When a receipt is sent."""

    SYNC = 0  # once the events are on a majority's disks
    ASYNC = 1  # once the leader has them in its buffer: a crash can lose them


class DimensionFilter(msgspec.Struct, frozen=True, kw_only=True):
    """A dimension of a metric: a property key, and the values that are told apart.

    `values=[]` means any value. Values outside a declared list are counted in the `other` row.
    """

    key: str
    values: list[str] = []


class AlertThreshold(msgspec.Struct, frozen=True, kw_only=True):
    """An alert is recorded when the metric's total first reaches `value` in a billing period.

    With `recurring`, again at every further multiple of `value`.
    """

    code: str
    value: int
    recurring: bool = False


class MetricSchema(msgspec.Struct, frozen=True, kw_only=True):
    """What to count, and how. See `schema.validate` for what is allowed."""

    code: str
    agg_type: AggType = AggType.COUNT
    filters: list[DimensionFilter] = []
    thresholds: list[AlertThreshold] = []
    period_type: PeriodType = PeriodType.FIXED_30_DAYS
    billing_cycle_day: int = 1  # 1-28, CALENDAR only
    time_zone: str = "UTC"  # an IANA name
    unique_type: UniqueType = UniqueType.UINT64  # COUNT_UNIQUE only
    grace_seconds: int | None = None  # None: a period is never sealed
    description: str = ""
    # Raw events are kept for at least so many days, and are then dropped; totals never are. None: for ever.
    retain_raw_days: int | None = None


EventId = str | bytes | uuid.UUID | int
"""An idempotency key: `1`, `"1"` and `b"1"` are three different ids."""


# Not tracked by the garbage collector, which would otherwise look at every event of a large list again and again: an
# event holds strings, numbers and a dictionary of strings, and so is never part of a cycle.
class Event(msgspec.Struct, frozen=True, gc=False):
    """One usage fact.

    `value` is a whole number of -2^63..2^63-1 (0..2^64-1 for COUNT_UNIQUE of UINT64; a string for COUNT_UNIQUE
    of STRING); use `scale` for decimals. `timestamp` is an aware datetime or Unix time in whole nanoseconds;
    None means the time at which the leader stores the event. Property keys and values are strings.
    """

    account_id: int
    metric_code: str
    value: int | str = 1
    timestamp: dt.datetime | int | None = None
    properties: dict[str, str] = {}
    operation_type: OperationType = OperationType.NONE
    delivery_mode: DeliveryMode | None = None
    id: EventId | None = None
