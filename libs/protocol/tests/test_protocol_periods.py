"""Periods against a brute-force reading of zoneinfo's clock, and their laws."""

import datetime as dt
import itertools
import zoneinfo
from bisect import bisect_right
from functools import cache
from importlib import resources

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tallymark_protocol import periods
from tallymark_protocol.errors import InvalidRequestError
from tallymark_protocol.model import PeriodType
from tallymark_protocol.periods import (
    DAY_NS,
    HOUR_NS,
    SECOND_NS,
    Period,
    PeriodKind,
    PeriodSpec,
    buckets,
    day_of,
    day_starts,
    hour_of,
    month_of,
    period_of,
    period_starts,
    resolve,
    to_ns,
)
from tallymark_protocol.zones import TIME_END_NS, UTC, ZoneTable, transitions

ZONES = [
    "UTC",
    "Africa/Casablanca",
    "Africa/Monrovia",
    "America/Asuncion",
    "America/Havana",
    "America/New_York",
    "America/Sao_Paulo",
    "America/St_Johns",
    "Asia/Beirut",
    "Asia/Kathmandu",
    "Asia/Kolkata",
    "Australia/Lord_Howe",
    "Europe/London",
    "Pacific/Apia",
    "Pacific/Kwajalein",
]
EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
FAR_S = 3_000_000_000  # 2065: every zone's transitions of both kinds, and some of the footer's

zone_names = st.sampled_from(ZONES)


def seeded(max_examples: int) -> settings:
    """The same examples in every run, and none kept on disk."""
    return settings(max_examples=max_examples, derandomize=True, deadline=None, database=None)


@cache
def table(name: str) -> ZoneTable:
    return transitions(name)


@cache
def clock(name: str) -> zoneinfo.ZoneInfo:
    with resources.files("tzdata.zoneinfo").joinpath(*name.split("/")).open("rb") as file:
        return zoneinfo.ZoneInfo.from_file(file, key=name)


def local(seconds: int, name: str) -> dt.datetime:
    """What a clock on the wall reads at a UTC second."""
    return (EPOCH + dt.timedelta(seconds=seconds)).astimezone(clock(name)).replace(tzinfo=None)


def utc(*parts: int) -> int:
    return int((dt.datetime(*parts, tzinfo=dt.UTC) - EPOCH).total_seconds()) * SECOND_NS


@cache
def first_second_at(date: dt.date, name: str) -> int:
    """Find, by looking at the clock every 20 seconds and then every one, when it first reads a date or later."""
    midnight = dt.datetime.combine(date, dt.time())
    guess = int((midnight.replace(tzinfo=dt.UTC) - EPOCH).total_seconds())
    # No zone here is more than 14 hours from UTC.
    step = next(s for s in range(guess - 15 * 3_600, guess + 15 * 3_600, 20) if local(s, name) >= midnight)
    return next(s for s in range(step - 20, step + 1) if local(s, name) >= midnight)


def instants(name: str) -> st.SearchStrategy[int]:
    """Nanoseconds anywhere, and close to the zone's transitions, where all the trouble is."""
    early = 86_400 * 400  # so that the period before, whatever its type, is one of 1970 too
    changes = [instant for instant in table(name).instants if early < instant < FAR_S] or [early]
    near = st.builds(
        lambda instant, away, ns: (instant + away) * SECOND_NS + ns,
        st.sampled_from(changes),
        st.one_of(st.integers(-90_000, 90_000), st.sampled_from([-3_600, -60, -1, 0, 1, 60, 3_600])),
        st.sampled_from([0, 0, 1, 999_999_999]),
    )
    return st.one_of(near, st.integers(early * SECOND_NS, FAR_S * SECOND_NS))


zones_and_instants = zone_names.flatmap(lambda name: st.tuples(st.just(name), instants(name)))


# --- days, by brute force ------------------------------------------------------------------------------------


@seeded(80)
@given(zones_and_instants)
@example(("America/Asuncion", utc(2023, 10, 1, 4)))
@example(("Pacific/Apia", utc(2011, 12, 30, 9, 59, 59)))
@example(("Pacific/Apia", utc(2011, 12, 30, 10)))
@example(("America/St_Johns", utc(2006, 10, 29, 2, 30, 30)))
@example(("America/Havana", utc(2023, 11, 5, 5, 30)))
def test_a_day_starts_when_the_clock_first_reads_its_date(case):
    """Both ends of any day agree with a brute-force look at the clock."""
    name, time_ns = case
    period = day_of(time_ns, table(name))
    assert time_ns in period
    start, end = period.start_ns // SECOND_NS, period.end_ns // SECOND_NS
    assert period.start_ns % SECOND_NS == 0
    assert period.end_ns % SECOND_NS == 0
    for edge in (start, end):
        date = local(edge, name).date()
        assert first_second_at(date, name) == edge
    # Nothing starts in between: the dates that have begun by the end's eve had all begun at the start.
    after = local(start, name).date() + dt.timedelta(days=1)
    assert first_second_at(after, name) >= end


@pytest.mark.parametrize(
    ("name", "date", "start", "hours"),
    [
        # Midnight is missing: the clock goes from 24:00 to 01:00, and the day is an hour shorter.
        ("America/Asuncion", (2023, 10, 1), utc(2023, 10, 1, 4), 23),
        ("Asia/Beirut", (2022, 3, 27), utc(2022, 3, 26, 22), 23),
        ("America/Sao_Paulo", (2018, 11, 4), utc(2018, 11, 4, 3), 23),
        ("America/Havana", (2023, 3, 12), utc(2023, 3, 12, 5), 23),
        # At 01:00 back to 00:00: midnight strikes twice, and the first one counts.
        ("America/Havana", (2023, 11, 5), utc(2023, 11, 5, 4), 25),
        # At 24:00 back to 23:00: midnight strikes once, an hour later; the day before has 25 hours.
        ("America/Asuncion", (2023, 3, 25), utc(2023, 3, 25, 3), 25),
        ("America/Asuncion", (2023, 3, 26), utc(2023, 3, 26, 4), 24),
        # At 00:01 back to 23:01: midnight has struck, and the hour that follows stays with the new day.
        ("America/St_Johns", (2006, 10, 29), utc(2006, 10, 29, 2, 30), 25),
        # The days around the one that never was.
        ("Pacific/Apia", (2011, 12, 29), utc(2011, 12, 29, 10), 24),
        ("Pacific/Apia", (2011, 12, 31), utc(2011, 12, 30, 10), 24),
        ("Asia/Kathmandu", (1986, 1, 1), utc(1985, 12, 31, 18, 30), 23.75),
        ("Australia/Lord_Howe", (2024, 10, 6), utc(2024, 10, 5, 13, 30), 23.5),
        ("Australia/Lord_Howe", (2024, 4, 7), utc(2024, 4, 6, 13), 24.5),
        ("Africa/Monrovia", (1972, 1, 7), utc(1972, 1, 7, 0, 44, 30), 24 - 44.5 / 60),
        ("UTC", (2024, 2, 29), utc(2024, 2, 29), 24),
    ],
)
def test_days_worth_knowing(name, date, start, hours):
    """Days around odd changes, by hand."""
    period = day_of(start, table(name))
    assert period == Period(start, start + round(hours * 3_600) * SECOND_NS)
    assert first_second_at(dt.date(*date), name) * SECOND_NS == start
    assert day_of(start - 1, table(name)).end_ns == start
    assert day_of(period.end_ns - 1, table(name)) == period


def test_a_clock_put_back_a_whole_day_makes_one_long_day():
    """Crossing the date line eastwards repeats a date: its second run belongs to the same day."""
    zone = ZoneTable("X", [10 * 86_400], [12 * 3_600, -12 * 3_600])
    # The clock reads 11 January 12:00 at the change, then 10 January 12:00.
    long = day_of(10 * DAY_NS, zone)
    assert long == Period(9 * DAY_NS + 12 * HOUR_NS, 11 * DAY_NS + 12 * HOUR_NS)
    assert day_of(long.end_ns, zone) == Period(long.end_ns, long.end_ns + DAY_NS)
    assert buckets(long.start_ns, long.end_ns + 1, "day", zone, 2) == [
        long,
        Period(long.end_ns, long.end_ns + 1),
    ]


# --- every type of period: laws -----------------------------------------------------------------------------

period_types = st.sampled_from(list(PeriodType))
cycle_days = st.integers(1, 28)


@seeded(300)
@given(zones_and_instants, period_types, cycle_days)
def test_periods_tile_the_line(case, period_type, cycle_day):
    """A period contains its instant; its neighbours begin and end exactly at its ends."""
    name, time_ns = case
    zone = table(name)
    period = period_of(time_ns, period_type, cycle_day, zone)
    assert time_ns in period
    assert period_of(period.start_ns, period_type, cycle_day, zone) == period
    assert period_of(period.end_ns - 1, period_type, cycle_day, zone) == period
    if period_type is PeriodType.LIFETIME:
        assert period == Period(0, TIME_END_NS)
    else:
        assert period_of(period.end_ns, period_type, cycle_day, zone).start_ns == period.end_ns
        assert period_of(period.start_ns - 1, period_type, cycle_day, zone).end_ns == period.start_ns


@seeded(40)
@given(zones_and_instants, cycle_days)
@example(("Pacific/Apia", utc(2011, 12, 30, 12)), 1)
@example(("America/Asuncion", utc(2023, 10, 1, 12)), 1)
def test_months_and_years_start_with_their_first_day(case, cycle_day):
    """Calendar starts agree with the brute-force start of their first date."""
    name, time_ns = case
    zone = table(name)
    # The date of the day that the instant belongs to, by the days' own brute-force test.
    date = local(day_of(time_ns, zone).start_ns // SECOND_NS, name).date()

    def month_start(year: int, month: int, day: int) -> int:
        year, month = year + (month - 1) // 12, (month - 1) % 12 + 1
        return first_second_at(dt.date(year, month, day), name) * SECOND_NS

    back = 0 if date.day >= cycle_day else 1
    assert period_of(time_ns, PeriodType.CALENDAR, cycle_day, zone) == Period(
        month_start(date.year, date.month - back, cycle_day),
        month_start(date.year, date.month - back + 1, cycle_day),
    )
    assert month_of(time_ns, zone) == Period(
        month_start(date.year, date.month, 1), month_start(date.year, date.month + 1, 1)
    )
    assert period_of(time_ns, PeriodType.YEAR, 1, zone) == Period(
        month_start(date.year, 1, 1), month_start(date.year + 1, 1, 1)
    )


def test_a_cycle_day_on_a_missing_midnight_and_on_a_skipped_day():
    """The period starts at the first instant after the midnight that never was."""
    asuncion = period_of(utc(2023, 10, 15), PeriodType.CALENDAR, 1, table("America/Asuncion"))
    assert asuncion == Period(utc(2023, 10, 1, 4), utc(2023, 11, 1, 3))
    # A zone that skips the 15th: a cycle from the 15th starts with the 16th, and none is empty.
    change = int(dt.datetime(2020, 1, 15, tzinfo=dt.UTC).timestamp())
    zone = ZoneTable("X", [change], [0, 86_400])
    period = period_of(change * SECOND_NS, PeriodType.CALENDAR, 15, zone)
    assert period == Period(change * SECOND_NS, utc(2020, 2, 14))
    assert period_of(change * SECOND_NS - 1, PeriodType.CALENDAR, 15, zone).end_ns == change * SECOND_NS
    starts = period_starts(PeriodType.DAY, 1, zone, utc(2020, 1, 17))
    assert starts[-3:] == [utc(2020, 1, 14), utc(2020, 1, 15), utc(2020, 1, 16)]


@pytest.mark.parametrize("zone", ["UTC", "America/New_York", "Asia/Kolkata", "Africa/Monrovia"])
def test_the_period_of_instant_zero_keeps_its_true_start(zone):
    """West of Greenwich the first day begins in 1970, east of it in 1969."""
    day = day_of(0, table(zone))
    offset = table(zone).offset_at(0)
    start = (0 - offset % 86_400) % 86_400 - 86_400 if offset % 86_400 else 0
    assert day.start_ns == start * SECOND_NS
    assert 0 in day


def test_fixed_periods_ignore_the_zone():
    """Windows of 30 times 24 hours from the epoch, whatever the zone's clock does."""
    for name in ZONES:
        assert period_of(31 * DAY_NS, PeriodType.FIXED_30_DAYS, 1, table(name)) == Period(
            30 * DAY_NS, 60 * DAY_NS
        )


@pytest.mark.parametrize("period_type", list(PeriodType))
@pytest.mark.parametrize("name", ["UTC", "America/New_York", "Pacific/Apia"])
def test_time_ends_where_64_bits_do(period_type, name):
    """The last period of every type ends at TIME_END_NS, and its bounds fit into 64 bits."""
    period = period_of(
        TIME_END_NS - 1, period_type, 15 if period_type is PeriodType.CALENDAR else 1, table(name)
    )
    assert period.end_ns == TIME_END_NS
    assert period.end is None
    for bad in (TIME_END_NS, -1):
        for function in (day_of, month_of, hour_of):
            with pytest.raises(InvalidRequestError, match="outside"):
                function(bad, table(name))
        with pytest.raises(InvalidRequestError, match="outside"):
            period_of(bad, period_type, 1, table(name))


# --- tables of starts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ZONES)
def test_day_starts_are_the_days(name):
    """Through every transition of seven decades, the table and `day_of` agree at each edge."""
    zone = table(name)
    until_ns = utc(2040, 1, 1)
    starts = day_starts(zone, until_ns)
    assert starts[0] == day_of(0, zone).start_ns
    for start_ns, end_ns in itertools.pairwise(starts):
        assert start_ns < end_ns
    for instant in zone.instants:
        for away in range(-3, 4):
            time_ns = instant * SECOND_NS + away * DAY_NS // 2
            if 0 <= time_ns < starts[-1]:
                index = bisect_right(starts, time_ns) - 1
                assert Period(starts[index], starts[index + 1]) == day_of(time_ns, zone)
    assert starts[-1] < until_ns <= day_of(starts[-1], zone).end_ns


@seeded(120)
@given(zone_names, period_types, cycle_days, st.integers(1, FAR_S * SECOND_NS))
def test_the_table_of_starts_finds_the_period_of_every_instant(name, period_type, cycle_day, until_ns):
    """`bisect_right - 1` in the table is `period_of`, up to the very last instant before `until_ns`."""
    zone = table(name)
    starts = period_starts(period_type, cycle_day, zone, until_ns)
    assert starts[0] <= 0
    assert all(0 < start_ns < until_ns for start_ns in starts[1:])
    for time_ns in (0, until_ns // 3, until_ns // 2, until_ns - 1):
        period = period_of(time_ns, period_type, cycle_day, zone)
        index = bisect_right(starts, time_ns) - 1
        assert starts[index] == period.start_ns
        if index + 1 < len(starts):
            assert starts[index + 1] == period.end_ns
        else:
            assert period.end_ns >= until_ns


@pytest.mark.parametrize(
    ("period_type", "count"),
    [
        (PeriodType.LIFETIME, 1),
        (PeriodType.FIXED_30_DAYS, 3_559),
        (PeriodType.CALENDAR, 3_508),
        (PeriodType.YEAR, 293),
        (PeriodType.DAY, 106_752),
    ],
)
def test_tables_reach_the_end_of_time(period_type, count):
    """All periods of 292 years are there, and each bound fits into 64 bits."""
    starts = period_starts(period_type, 1, UTC, TIME_END_NS)
    assert len(starts) == count
    assert starts == sorted(set(starts))
    assert period_of(TIME_END_NS - 1, period_type, 1, UTC).start_ns == starts[-1]


def test_a_table_until_the_beginning_has_the_first_period_only():
    """With nothing before `until_ns`, what remains is the period of instant 0."""
    zone = table("Asia/Kolkata")
    for period_type in PeriodType:
        first = period_of(0, period_type, 1, zone).start_ns
        assert period_starts(period_type, 1, zone, 0) == [first]
        assert period_starts(period_type, 1, zone, 1) == [first]
    assert day_starts(table("America/New_York"), 5 * HOUR_NS) == [-19 * HOUR_NS]
    assert day_starts(table("America/New_York"), 5 * HOUR_NS + 1) == [-19 * HOUR_NS, 5 * HOUR_NS]


# --- hours and buckets ---------------------------------------------------------------------------------------


@seeded(200)
@given(zones_and_instants)
def test_an_hour_is_a_run_of_one_reading_and_one_offset(case):
    """Within an hour the clock shows one hour of one date, at one offset; just outside, something else."""
    name, time_ns = case
    zone = table(name)
    hour = hour_of(time_ns, zone)
    assert time_ns in hour
    assert hour.end_ns - hour.start_ns <= HOUR_NS

    def reading(at_ns: int) -> tuple[str, int]:
        seconds = at_ns // SECOND_NS
        shown = local(seconds, name)
        return f"{shown:%Y-%m-%d %H}", round((shown - local(0, "UTC")).total_seconds()) - seconds

    inside = reading(time_ns)
    assert reading(hour.start_ns) == reading(hour.end_ns - 1) == inside
    assert reading(hour.start_ns - 1) != inside
    assert reading(hour.end_ns) != inside
    assert hour_of(hour.end_ns, zone).start_ns == hour.end_ns
    assert hour_of(hour.start_ns - 1, zone).end_ns == hour.start_ns
    # Days are made of whole hours.
    day = day_of(time_ns, zone)
    assert day.start_ns <= hour.start_ns
    assert hour.end_ns <= day.end_ns


@pytest.mark.parametrize(
    ("name", "day", "lengths"),
    [
        ("America/New_York", utc(2024, 11, 3, 12), [60] * 25),
        ("America/New_York", utc(2024, 3, 10, 12), [60] * 23),
        ("Asia/Kolkata", utc(2024, 3, 10, 12), [60] * 24),
        ("Australia/Lord_Howe", utc(2024, 4, 7, 2), [60, 60, 30] + [60] * 22),
        ("Australia/Lord_Howe", utc(2024, 10, 6, 2), [60, 60, 30] + [60] * 21),
        ("Asia/Kathmandu", utc(1986, 1, 1, 2), [45] + [60] * 23),
        ("America/St_Johns", utc(2006, 10, 29, 12), [1, 59] + [60] * 24),
    ],
)
def test_the_hours_of_days_worth_knowing(name, day, lengths):
    """Repeated hours are two buckets; half ones stand where the clock changes by half an hour."""
    zone = table(name)
    period = day_of(day, zone)
    hours = buckets(period.start_ns, period.end_ns, "hour", zone, 30)
    assert [(hour.end_ns - hour.start_ns) // (60 * SECOND_NS) for hour in hours] == lengths
    for hour in hours:
        assert hour_of(hour.start_ns, zone) == hour


@seeded(200)
@given(
    zones_and_instants, st.sampled_from(["hour", "day", "month"]), st.integers(0, 60), st.integers(0, 10**14)
)
def test_buckets_tile_the_range(case, unit, count, extra):
    """The buckets are the units that the range touches, clipped at its ends, and nothing else."""
    name, start_ns = case
    zone = table(name)
    function = {"hour": hour_of, "day": day_of, "month": month_of}[unit]
    end_ns = start_ns + count * {"hour": HOUR_NS, "day": DAY_NS, "month": 30 * DAY_NS}[unit] + extra
    expected = []
    at = start_ns
    while at < end_ns:
        whole = function(at, zone)
        expected.append(Period(max(whole.start_ns, start_ns), min(whole.end_ns, end_ns)))
        at = whole.end_ns
    assert buckets(start_ns, end_ns, unit, zone, max(len(expected), 1)) == expected
    if expected:
        with pytest.raises(InvalidRequestError, match=f"more than {len(expected) - 1} {unit}"):
            buckets(start_ns, end_ns, unit, zone, len(expected) - 1)


def test_buckets_refuse_what_is_no_range():
    """A reversed range, an unknown unit and all of time in hours are refused at once; an empty range is empty."""
    assert buckets(5, 5, "hour", UTC, 1) == []
    with pytest.raises(InvalidRequestError, match="before its start"):
        buckets(6, 5, "hour", UTC, 1)
    with pytest.raises(InvalidRequestError, match="week"):
        buckets(5, 6, "week", UTC, 1)
    with pytest.raises(InvalidRequestError, match="50000 hour"):
        buckets(0, TIME_END_NS, "hour", UTC, 50_000)
    for bad in ((0, TIME_END_NS + 1), (-(2**63) - 1, 0)):
        with pytest.raises(InvalidRequestError, match="out of bounds"):
            buckets(*bad, "month", UTC, 50_000)
    months = buckets(0, TIME_END_NS, "month", UTC, 50_000)
    assert len(months) == 3_508
    assert months[-1].end_ns == TIME_END_NS


# --- instants and periods as values --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, 0),
        (TIME_END_NS, TIME_END_NS),
        (EPOCH, 0),
        (dt.datetime(2262, 4, 11, 23, 47, 16, 854775, tzinfo=dt.UTC), TIME_END_NS - 807),
        (dt.datetime(2024, 2, 29, 12, 0, 0, 123_457, tzinfo=dt.UTC), 1_709_208_000_123_457_000),
        (dt.datetime(1970, 1, 1, 2, tzinfo=dt.timezone(dt.timedelta(hours=2))), 0),
        ("1970-01-01T00:00:00Z", 0),
        ("1970-01-01t00:00:00.000000001z", 1),
        ("1970-01-01 05:30:00.5+05:30", 500_000_000),
        ("2262-04-11T23:47:16.854775807Z", TIME_END_NS),
    ],
)
def test_to_ns_is_exact(value, expected):
    """No float is on the way: the last nanosecond survives."""
    assert to_ns(value) == expected


def test_to_ns_reads_both_sides_of_a_repeated_hour():
    """`fold` tells the two apart, as datetime means it to."""
    first = dt.datetime(2024, 11, 3, 1, 30, tzinfo=clock("America/New_York"))
    assert to_ns(first) == utc(2024, 11, 3, 5, 30)
    assert to_ns(first.replace(fold=1)) == utc(2024, 11, 3, 6, 30)


@pytest.mark.parametrize(
    "value",
    [
        dt.datetime(2024, 1, 1),  # noqa: DTZ001
        dt.datetime(1969, 12, 31, 23, 59, 59, 999_999, tzinfo=dt.UTC),
        dt.datetime(2262, 4, 11, 23, 47, 16, 854776, tzinfo=dt.UTC),
        dt.date(2024, 1, 1),
        -1,
        TIME_END_NS + 1,
        1 << 20_000,
        1.5,
        True,
        None,
        "",
        "2024-01-01",
        "2024-01-01T00:00:00",
        "2024-13-01T00:00:00Z",
        "2024-01-01T00:00:00.0000000001Z",
        "2024-01-01T00:00:00+99:00",
        "1969-12-31T23:59:59Z",
        "٢٠٢٤-01-01T00:00:00Z",
    ],
    ids=lambda value: type(value).__name__,  # an int of that size can't be printed
)
def test_to_ns_refuses_what_is_no_instant(value):
    """Naive, out of bounds, of another type, or text that would lose digits."""
    with pytest.raises(InvalidRequestError, match="time"):
        to_ns(value)


def test_a_period_shows_datetimes_and_knows_its_instants():
    """Half-open: the start belongs to it, the end doesn't."""
    period = Period.between("2024-01-01T00:00:00Z", dt.datetime(2024, 2, 1, tzinfo=dt.UTC))
    assert period.start == dt.datetime(2024, 1, 1, tzinfo=dt.UTC)
    assert period.end == dt.datetime(2024, 2, 1, tzinfo=dt.UTC)
    assert period.start_ns in period
    assert period.end_ns - 1 in period
    assert period.end_ns not in period
    assert period.start_ns - 1 not in period
    assert Period(0, TIME_END_NS).end is None
    assert Period(-DAY_NS, 0).start == dt.datetime(1969, 12, 31, tzinfo=dt.UTC)
    with pytest.raises(InvalidRequestError, match="before its start"):
        Period.between(5, 4)


# --- symbolic periods ----------------------------------------------------------------------------------------


def test_symbols_come_to_periods_of_the_metrics_zone():
    """The same spec is another period in another zone: New York is still in February."""
    now_ns = utc(2024, 3, 1, 2)
    new_york = table("America/New_York")

    def months(spec: PeriodSpec, zone: ZoneTable) -> Period:
        return resolve(spec, now_ns, PeriodType.DAY, 1, zone)

    assert months(periods.current_month(), UTC) == Period(utc(2024, 3, 1), utc(2024, 4, 1))
    assert months(periods.last_month(), UTC) == Period(utc(2024, 2, 1), utc(2024, 3, 1))
    assert months(periods.current_month(), new_york) == Period(utc(2024, 2, 1, 5), utc(2024, 3, 1, 5))
    assert months(periods.last_month(), new_york) == Period(utc(2024, 1, 1, 5), utc(2024, 2, 1, 5))


@seeded(60)
@given(zones_and_instants, period_types, cycle_days)
def test_billing_periods_are_the_metrics_own(case, period_type, cycle_day):
    """The current one contains now, the last one ends where it starts; a lifetime has no last one."""
    name, now_ns = case
    zone = table(name)
    current = resolve(periods.current_billing_period(), now_ns, period_type, cycle_day, zone)
    assert current == resolve(periods.current_period(), now_ns, period_type, cycle_day, zone)
    assert current == period_of(now_ns, period_type, cycle_day, zone)
    if period_type is PeriodType.LIFETIME:
        with pytest.raises(InvalidRequestError, match="LIFETIME"):
            resolve(periods.last_billing_period(), now_ns, period_type, cycle_day, zone)
    else:
        last = resolve(periods.last_billing_period(), now_ns, period_type, cycle_day, zone)
        assert last == period_of(current.start_ns - 1, period_type, cycle_day, zone)


def test_an_explicit_period_stays_as_it_is():
    """A Period, and the range spec that stands for it, resolve to themselves, if they are ranges at all."""
    period = Period(3, 9)
    spec = periods.to_spec(period)
    assert spec == PeriodSpec(PeriodKind.RANGE, 3, 9)
    assert periods.to_spec(spec) is spec
    for given_period in (period, spec):
        assert resolve(given_period, 0, PeriodType.DAY, 1, UTC) == period
    for bad in (
        PeriodSpec(PeriodKind.RANGE),
        PeriodSpec(PeriodKind.RANGE, 3),
        PeriodSpec(PeriodKind.RANGE, 9, 3),
        PeriodSpec(PeriodKind.CURRENT_MONTH, 3, 9),
        Period(0, 2**63),
    ):
        with pytest.raises(InvalidRequestError):
            resolve(bad, 0, PeriodType.DAY, 1, UTC)


def test_the_period_before_the_first_one_lies_before_1970():
    """In January 1970 last month is December 1969: empty, but no error."""
    assert resolve(periods.last_month(), 5, PeriodType.DAY, 1, UTC) == Period(-31 * DAY_NS, 0)


def test_specs_travel():
    """A spec survives MessagePack, and an unknown kind is refused there."""
    for spec in (periods.last_month(), PeriodSpec(PeriodKind.RANGE, 1, 2)):
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(spec), type=PeriodSpec) == spec
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(msgspec.msgpack.encode({"kind": "next_month"}), type=PeriodSpec)


def test_a_field_may_hold_a_period_or_a_spec():
    """Their tags tell them apart, so messages take either where a period is wanted."""
    for value in (Period(1, 2), periods.last_month()):
        data = msgspec.msgpack.encode(value)
        assert msgspec.msgpack.decode(data, type=PeriodSpec | Period) == value
