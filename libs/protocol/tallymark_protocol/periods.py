"""Billing periods, days and hours, and the instants at which they start.

Everything here is integer arithmetic on nanoseconds since the Unix epoch (UTC) and a `ZoneTable`; no clock, no
time zone database. Intervals are half-open: `[start_ns, end_ns)`.

**Days.** Local day D starts at the first instant at which the local clock reads D 00:00 or later. One rule covers
the odd cases: a missing local midnight gives the first instant after it, a repeated one the first of the two, and
a day that a zone skipped (Apia, 2011-12-30) would be empty and doesn't exist. Where a clock is put back across
midnight just after it struck, the hour that the day before seems to get again belongs to the new day. Months,
years and day periods start where their first day starts, so all of them are made of whole days.

**Hours** are local clock hours, so in Kolkata they start at half past of UTC. A change of offset starts a new one:
each is a maximal run of instants with the same offset and the same hour on the clock. An hour repeated in autumn is
two buckets; next to a change that isn't by whole hours, a bucket is shorter than an hour; none is longer. Days
are made of whole hours.

Time ends at `TIME_END_NS` (exclusive), where 64-bit nanoseconds do: the last period of every type ends there. The
period that contains instant 0 keeps its true start, which may be negative.
"""

from __future__ import annotations

import datetime as dt
import enum
import itertools
import operator
import re
from bisect import bisect_right

import msgspec

from tallymark_protocol.errors import InvalidRequestError
from tallymark_protocol.model import PeriodType
from tallymark_protocol.zones import OFFSET_S_MAX, TIME_END_NS, ZoneTable

SECOND_NS = 10**9
HOUR_S = 3_600
HOUR_NS = HOUR_S * SECOND_NS
DAY_S = 86_400
DAY_NS = DAY_S * SECOND_NS
FIXED_PERIOD_NS = 30 * DAY_NS
BILLING_CYCLE_DAY_MAX = 28  # the last day that every month has

_EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
_EPOCH_ORDINAL = dt.date(1970, 1, 1).toordinal()
_TIME_START_NS = -(2**63)


class Period(msgspec.Struct, frozen=True, tag="period"):
    """A half-open interval of time: `[start_ns, end_ns)` in nanoseconds since the Unix epoch."""

    start_ns: int  # inclusive
    end_ns: int  # exclusive; TIME_END_NS means that it never ends

    @classmethod
    def between(cls, start: dt.datetime | int | str, end: dt.datetime | int | str) -> Period:
        """Make a period of two instants, as `to_ns` takes them.

        Raises:
            InvalidRequestError: one of them is no instant, or the end lies before the start.
        """
        return _checked_range(to_ns(start), to_ns(end))

    @property
    def start(self) -> dt.datetime:
        """The start as an aware datetime in UTC (cut to microseconds)."""
        return from_ns(self.start_ns)

    @property
    def end(self) -> dt.datetime | None:
        """The end, exclusive, as an aware datetime in UTC (cut to microseconds); None if it never ends."""
        return None if self.end_ns == TIME_END_NS else from_ns(self.end_ns)

    def __contains__(self, time_ns: int) -> bool:
        return self.start_ns <= time_ns < self.end_ns


# --- instants ------------------------------------------------------------------------------------------------

# RFC 3339, with up to nine decimals: datetime.fromisoformat would drop those beyond the sixth without a word.
_TIMESTAMP = re.compile(
    r"(\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?([Zz]|[+-]\d\d:\d\d)?", re.ASCII
)


def to_ns(value: dt.datetime | int | str) -> int:
    """Turn an instant into nanoseconds since the Unix epoch, exactly.

    Args:
        value: an aware datetime, whole nanoseconds, or RFC 3339 text with an offset (`2026-03-01T00:00:00Z`).

    Raises:
        InvalidRequestError: naive, of another type, or outside 1970-01-01 to 2262-04-11 (0 to 2^63-1).
    """
    if isinstance(value, dt.datetime):
        return _bounded(_datetime_ns(value), value)
    if isinstance(value, str):
        match = _TIMESTAMP.fullmatch(value)
        if match is None:
            raise InvalidRequestError(f"time {value!r:.100} isn't of the form 2026-03-01T00:00:00Z")
        seconds, fraction, offset = match.groups()
        if offset is None:
            raise InvalidRequestError(f"time {value!r} has no offset: end it with Z or +hh:mm")
        try:
            moment = dt.datetime.fromisoformat(seconds.upper() + offset.upper())
        except ValueError as error:
            raise InvalidRequestError(f"time {value!r}: {error}") from error
        return _bounded(_datetime_ns(moment) + int((fraction or "0").ljust(9, "0")), value)
    if isinstance(value, bool):
        raise InvalidRequestError(f"time {value!r} is no instant")
    try:
        return _bounded(operator.index(value), value)
    except TypeError:
        raise InvalidRequestError(
            f"time {value!r:.100} must be an aware datetime or whole nanoseconds, not {type(value).__name__}"
        ) from None


def from_ns(time_ns: int) -> dt.datetime:
    """Turn nanoseconds since the Unix epoch into an aware datetime in UTC, cut to microseconds."""
    return _EPOCH + dt.timedelta(microseconds=time_ns // 1_000)


def _datetime_ns(value: dt.datetime) -> int:
    if value.utcoffset() is None:
        raise InvalidRequestError(f"time {value.isoformat()} has no time zone: pass an aware datetime")
    since = value - _EPOCH
    return (since.days * DAY_S + since.seconds) * SECOND_NS + since.microseconds * 1_000


def _bounded(time_ns: int, value: object) -> int:
    if not 0 <= time_ns <= TIME_END_NS:
        # Very long ints can't be printed.
        shown = str(value) if time_ns.bit_length() <= 128 else "given"
        raise InvalidRequestError(f"time {shown} is outside 1970-01-01 to 2262-04-11")
    return time_ns


# --- the local calendar --------------------------------------------------------------------------------------


def _day_start_s(day: int, zone: ZoneTable) -> int:
    """Return the first UTC second at which the local clock reads the given day's 00:00 or later.

    `day` counts from 1970-01-01, in local dates. Equal for two days in a row if the first was skipped.
    """
    midnight = day * DAY_S
    instants = zone.instants
    # No offset reaches OFFSET_S_MAX, so before this instant the clock can't have got there.
    index = bisect_right(instants, midnight - OFFSET_S_MAX)
    last = len(instants)
    while True:
        start = midnight - zone.offsets[index]
        if index and start < instants[index - 1]:
            start = instants[index - 1]
        if index == last or start < instants[index]:
            return start
        index += 1


def _day_number(seconds: int, zone: ZoneTable) -> int:
    """Return the local day (counted from 1970-01-01) that a UTC second belongs to: the last one begun."""
    day = (seconds + zone.offset_at(seconds)) // DAY_S
    # The clock may have been put back across midnight: then the day after what it reads has begun already.
    while _day_start_s(day + 1, zone) <= seconds:
        day += 1
    return day


def _date_day(year: int, month: int, day: int) -> int:
    """Return the number of a date, counted from 1970-01-01."""
    return dt.date(year, month, day).toordinal() - _EPOCH_ORDINAL


def _month_day(month_index: int, cycle_day: int) -> int:
    """Return the number of the day that starts a month; months count from year 0."""
    return _date_day(month_index // 12, month_index % 12 + 1, cycle_day)


def _month_index(day: int, cycle_day: int) -> int:
    """Return the month (counted from year 0) from cycle day to cycle day that a day belongs to."""
    date = dt.date.fromordinal(day + _EPOCH_ORDINAL)
    return date.year * 12 + date.month - 1 - (date.day < cycle_day)


def _period(start_s: int, end_s: int) -> Period:
    return Period(start_s * SECOND_NS, min(end_s * SECOND_NS, TIME_END_NS))


def _day_period(seconds: int, zone: ZoneTable) -> Period:
    day = _day_number(seconds, zone)
    return _period(_day_start_s(day, zone), _day_start_s(day + 1, zone))


def _month_period(seconds: int, cycle_day: int, zone: ZoneTable) -> Period:
    month = _month_index(_day_number(seconds, zone), cycle_day)
    return _period(
        _day_start_s(_month_day(month, cycle_day), zone), _day_start_s(_month_day(month + 1, cycle_day), zone)
    )


def _year_period(seconds: int, zone: ZoneTable) -> Period:
    year = dt.date.fromordinal(_day_number(seconds, zone) + _EPOCH_ORDINAL).year
    return _period(_day_start_s(_date_day(year, 1, 1), zone), _day_start_s(_date_day(year + 1, 1, 1), zone))


def _any_period(time_ns: int, period_type: PeriodType, cycle_day: int, zone: ZoneTable) -> Period:
    """Do the work of `period_of`, also for instants shortly before 1970."""
    assert 1 <= cycle_day <= BILLING_CYCLE_DAY_MAX, "a validated schema has a cycle day of 1 to 28"
    seconds = time_ns // SECOND_NS
    match period_type:
        case PeriodType.LIFETIME:
            return Period(0, TIME_END_NS)
        case PeriodType.FIXED_30_DAYS:
            start_ns = time_ns // FIXED_PERIOD_NS * FIXED_PERIOD_NS
            return Period(start_ns, min(start_ns + FIXED_PERIOD_NS, TIME_END_NS))
        case PeriodType.CALENDAR:
            return _month_period(seconds, cycle_day, zone)
        case PeriodType.DAY:
            return _day_period(seconds, zone)
        case PeriodType.YEAR:
            return _year_period(seconds, zone)


def _check_instant(time_ns: int) -> None:
    if not 0 <= time_ns < TIME_END_NS:
        raise InvalidRequestError(f"time {time_ns} ns is outside 1970-01-01 to 2262-04-11")


def period_of(time_ns: int, period_type: PeriodType, billing_cycle_day: int, zone: ZoneTable) -> Period:
    """Return the billing period that contains an instant.

    Raises:
        InvalidRequestError: the instant isn't in `[0, TIME_END_NS)`.
    """
    _check_instant(time_ns)
    return _any_period(time_ns, period_type, billing_cycle_day, zone)


def day_of(time_ns: int, zone: ZoneTable) -> Period:
    """Return the local day that contains an instant; raises as `period_of`."""
    _check_instant(time_ns)
    return _day_period(time_ns // SECOND_NS, zone)


def month_of(time_ns: int, zone: ZoneTable) -> Period:
    """Return the local calendar month (from its first day) that contains an instant; raises as `period_of`."""
    _check_instant(time_ns)
    return _month_period(time_ns // SECOND_NS, 1, zone)


def hour_of(time_ns: int, zone: ZoneTable) -> Period:
    """Return the local clock hour that contains an instant, cut at changes of offset; raises as `period_of`."""
    _check_instant(time_ns)
    seconds = time_ns // SECOND_NS
    index = bisect_right(zone.instants, seconds)
    offset = zone.offsets[index]
    start = (seconds + offset) // HOUR_S * HOUR_S - offset
    end = start + HOUR_S
    if index:
        start = max(start, zone.instants[index - 1])
    if index < len(zone.instants):
        end = min(end, zone.instants[index])
    return _period(start, end)


# --- tables of starts ----------------------------------------------------------------------------------------


def period_starts(
    period_type: PeriodType, billing_cycle_day: int, zone: ZoneTable, until_ns: int
) -> list[int]:
    """Return the starts (ns) of all billing periods from the one that contains instant 0.

    Rising, without repeats, the first `<= 0`, the others below `until_ns`: a lookup table in which
    `bisect_right(starts, time_ns) - 1` finds the period of every instant in `[0, until_ns)`.
    """
    first = _any_period(0, period_type, billing_cycle_day, zone)
    starts = [first.start_ns]
    match period_type:
        case PeriodType.LIFETIME:
            pass
        case PeriodType.FIXED_30_DAYS:
            starts += range(FIXED_PERIOD_NS, until_ns, FIXED_PERIOD_NS)
        case PeriodType.DAY:
            starts = day_starts(zone, until_ns)
        case PeriodType.CALENDAR | PeriodType.YEAR:
            months = 1 if period_type is PeriodType.CALENDAR else 12
            cycle_day = billing_cycle_day if period_type is PeriodType.CALENDAR else 1
            month = _month_index(_day_number(0, zone), cycle_day)
            month -= month % months
            while True:
                month += months
                start_ns = _day_start_s(_month_day(month, cycle_day), zone) * SECOND_NS
                if start_ns >= until_ns:
                    break
                starts.append(start_ns)
    return starts


def day_starts(zone: ZoneTable, until_ns: int) -> list[int]:
    """Return the starts (ns) of all local days from the one that contains instant 0, as `period_starts` does."""
    start = _day_period(0, zone).start_ns
    return _day_starts_between(start, max(until_ns, start + 1), zone)


def _day_starts_between(since_ns: int, until_ns: int, zone: ZoneTable) -> list[int]:
    """Return the day starts in `[start of the day that contains since_ns, until_ns)`."""
    seconds = since_ns // SECOND_NS
    day = _day_number(seconds, zone)
    starts = [_day_start_s(day, zone) * SECOND_NS]
    day += 1
    # Per run of one offset, the days first reached in it are a plain range.
    index = bisect_right(zone.instants, seconds)
    while True:
        offset = zone.offsets[index]
        is_last = index == len(zone.instants)
        run_end_ns = until_ns if is_last else min(zone.instants[index] * SECOND_NS, until_ns)
        if index:
            run_start = zone.instants[index - 1]
            reached = (run_start + offset) // DAY_S
            if reached >= day:
                # Midnight was jumped over, or struck by the jump: the last such day starts with the run, and
                # the ones before it, if any, are skipped days.
                starts.append(run_start * SECOND_NS)
                day = reached + 1
        next_ns = (day * DAY_S - offset) * SECOND_NS
        midnights = range(next_ns, run_end_ns, DAY_NS)
        starts += midnights
        day += len(midnights)
        if is_last or run_end_ns >= until_ns:
            return starts
        index += 1


def _hour_starts_between(since_ns: int, until_ns: int, zone: ZoneTable) -> list[int]:
    """Return the hour starts in `(since_ns, until_ns)`, after `since_ns` itself."""
    starts = [since_ns]
    index = bisect_right(zone.instants, since_ns // SECOND_NS)
    run_start_ns = since_ns
    while True:
        shift = zone.offsets[index] * SECOND_NS
        is_last = index == len(zone.instants)
        run_end_ns = until_ns if is_last else min(zone.instants[index] * SECOND_NS, until_ns)
        starts += range((run_start_ns + shift) // HOUR_NS * HOUR_NS + HOUR_NS - shift, run_end_ns, HOUR_NS)
        if run_end_ns >= until_ns:
            return starts
        starts.append(run_end_ns)
        run_start_ns = run_end_ns
        index += 1


def _month_starts_between(since_ns: int, until_ns: int, zone: ZoneTable) -> list[int]:
    """Return the month starts in `(since_ns, until_ns)`, after `since_ns` itself."""
    starts = [since_ns]
    month = _month_index(_day_number(since_ns // SECOND_NS, zone), 1) + 1
    while (start_ns := _day_start_s(_month_day(month, 1), zone) * SECOND_NS) < until_ns:
        starts.append(start_ns)
        month += 1
    return starts


# The longest that a bucket of a unit can be: gives the least number of buckets before any is made. A day can be
# a good deal longer than 24 hours where a zone crossed the date line.
_LONGEST_NS = {"hour": HOUR_NS, "day": 4 * DAY_NS, "month": 34 * DAY_NS}


def buckets(start_ns: int, end_ns: int, unit: str, zone: ZoneTable, max_buckets: int) -> list[Period]:
    """Cut `[start_ns, end_ns)` into the zone's hours, days or months; the outer ones are clipped to the range.

    The result tiles the range; it is empty when the range is.

    Raises:
        InvalidRequestError: no such unit, no such range, or more than `max_buckets`.
    """
    _checked_range(start_ns, end_ns)
    longest_ns = _LONGEST_NS.get(unit)
    if longest_ns is None:
        raise InvalidRequestError(f"bucket {unit!r:.40} must be hour, day or month")
    if start_ns == end_ns:
        return []
    starts: list[int] = []
    if -(-(end_ns - start_ns) // longest_ns) <= max_buckets:
        match unit:
            case "hour":
                starts = _hour_starts_between(start_ns, end_ns, zone)
            case "day":
                starts = _day_starts_between(start_ns, end_ns, zone)
                starts[0] = start_ns
            case _:
                starts = _month_starts_between(start_ns, end_ns, zone)
    if not starts or len(starts) > max_buckets:
        raise InvalidRequestError(
            f"the range has more than {max_buckets} {unit} buckets: shorten it or take a larger bucket"
        )
    starts.append(end_ns)
    return [Period(a, b) for a, b in itertools.pairwise(starts)]


def _checked_range(start_ns: int, end_ns: int) -> Period:
    if start_ns < _TIME_START_NS:
        raise InvalidRequestError(f"the range's start {start_ns} ns is out of bounds")
    if end_ns > TIME_END_NS:
        raise InvalidRequestError(f"the range's end {end_ns} ns is out of bounds")
    if end_ns < start_ns:
        raise InvalidRequestError(f"the range's end {end_ns} ns lies before its start {start_ns} ns")
    return Period(start_ns, end_ns)


# --- symbolic periods ----------------------------------------------------------------------------------------


class PeriodKind(enum.StrEnum):
    """What a `PeriodSpec` means; resolved in the metric's zone, at the server's time."""

    RANGE = "range"  # the spec's own start and end
    CURRENT_MONTH = "current_month"  # calendar months, from day 1, whatever the metric's periods
    LAST_MONTH = "last_month"
    CURRENT_PERIOD = "current_period"  # the metric's billing period
    CURRENT_BILLING_PERIOD = "current_billing_period"  # the same
    LAST_BILLING_PERIOD = "last_billing_period"


class PeriodSpec(msgspec.Struct, frozen=True, tag="named"):
    """A period by name. What it comes to depends on metric and time, so the server works it out."""

    kind: PeriodKind
    start_ns: int | None = None  # both for RANGE, neither otherwise
    end_ns: int | None = None


def current_month() -> PeriodSpec:
    """Name the calendar month, from its first day, that it is now in the metric's time zone."""
    return PeriodSpec(PeriodKind.CURRENT_MONTH)


def last_month() -> PeriodSpec:
    """Name the calendar month before the current one, in the metric's time zone."""
    return PeriodSpec(PeriodKind.LAST_MONTH)


def current_period() -> PeriodSpec:
    """Name the metric's billing period that it is now."""
    return PeriodSpec(PeriodKind.CURRENT_PERIOD)


def current_billing_period() -> PeriodSpec:
    """Name the metric's billing period that it is now; the same as `current_period`."""
    return PeriodSpec(PeriodKind.CURRENT_BILLING_PERIOD)


def last_billing_period() -> PeriodSpec:
    """Name the metric's billing period before the current one."""
    return PeriodSpec(PeriodKind.LAST_BILLING_PERIOD)


def to_spec(period: Period | PeriodSpec) -> PeriodSpec:
    """Return the spec of an explicit period; a spec as it is. One type for messages to carry."""
    if isinstance(period, PeriodSpec):
        return period
    return PeriodSpec(PeriodKind.RANGE, period.start_ns, period.end_ns)


def resolve(
    spec: PeriodSpec | Period,
    now_ns: int,
    schema_period_type: PeriodType,
    billing_cycle_day: int,
    zone: ZoneTable,
) -> Period:
    """Work out which period is meant, for a metric, at a time. The whole one: its end may lie ahead.

    Raises:
        InvalidRequestError: a range without bounds or that ends before it starts; the period before a lifetime.
    """
    spec = to_spec(spec)
    if spec.kind is PeriodKind.RANGE:
        if spec.start_ns is None or spec.end_ns is None:
            raise InvalidRequestError("a period of kind range needs start_ns and end_ns")
        return _checked_range(spec.start_ns, spec.end_ns)
    if spec.start_ns is not None or spec.end_ns is not None:
        raise InvalidRequestError(f"a period of kind {spec.kind} takes no start_ns and end_ns")
    _check_instant(now_ns)
    match spec.kind:
        case PeriodKind.CURRENT_MONTH:
            return month_of(now_ns, zone)
        case PeriodKind.LAST_MONTH:
            current = month_of(now_ns, zone)
            return _any_period(current.start_ns - 1, PeriodType.CALENDAR, 1, zone)
        case PeriodKind.CURRENT_PERIOD | PeriodKind.CURRENT_BILLING_PERIOD:
            return period_of(now_ns, schema_period_type, billing_cycle_day, zone)
        case PeriodKind.LAST_BILLING_PERIOD:
            if schema_period_type is PeriodType.LIFETIME:
                raise InvalidRequestError(
                    "a metric with period LIFETIME has no billing period before this one"
                )
            current = period_of(now_ns, schema_period_type, billing_cycle_day, zone)
            return _any_period(current.start_ns - 1, schema_period_type, billing_cycle_day, zone)
