"""What people type, as values; and values as what is printed."""

import re

import pytest

from tallymark import AggType, AlertThreshold, DimensionFilter, InvalidRequestError, Totals
from tallymark_node import output
from tallymark_node.cli import parse
from tallymark_node.cli.usage import choose_period, heard_text
from tallymark_protocol.zones import TIME_END_NS

DAY_NS = 86_400 * 10**9


@pytest.mark.parametrize(
    ("text", "time_ns"),
    [
        ("1970-01-01", 0),
        ("1970-01-02", DAY_NS),
        ("1970-01-01T00:01", 60 * 10**9),
        ("1970-01-01 00:00:01", 10**9),
        ("1970-01-01T00:00:01Z", 10**9),
        ("1970-01-01t00:00:01z", 10**9),
        ("1970-01-01T01:00+01:00", 0),
        ("1970-01-01T01:00+01", 0),
        ("1970-01-01T05:30+0530", 0),
        ("1970-01-01-01:00", 3_600 * 10**9),
        ("1970-01-01T00:00:00.000000001", 1),
        ("1970-01-01T00:00:00.123456789Z", 123_456_789),
        ("1970-01-01T00:00 UTC", 0),
        (" 2026-01-31 ", 1_769_817_600 * 10**9),
    ],
)
def test_instants(text, time_ns):
    """Dates and times of ISO 8601 are exact to the nanosecond, and UTC without a zone."""
    assert parse.instant_ns(text) == time_ns


@pytest.mark.parametrize(
    "text",
    [
        "",
        "yesterday",
        "2026-02-30",
        "2026-13-01",
        "2026-1-1",
        "31.01.2026",
        "2026-01-31T25:00",
        "2026",
    ],
)
def test_bad_instants_are_quoted_with_an_example(text):
    """What is no date is named as typed, with what would do."""
    with pytest.raises(InvalidRequestError) as caught:
        parse.instant_ns(text)
    assert repr(text) in caught.value.message
    assert "2026-01-31" in caught.value.message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1969-12-31", "is before 1970"),
        ("0001-01-01", "is before 1970"),
        ("1970-01-01T00:30+01:00", "is before 1970"),
        ("2262-04-12", "is after 2262-04-11"),
        ("9999-12-31T23:59:59-12:00", "is after 2262-04-11"),
    ],
)
def test_dates_out_of_range(text, words):
    """What is a date, but none that an event can have, isn't called no date."""
    with pytest.raises(InvalidRequestError, match=f"^{re.escape(repr(text))} {words}"):
        parse.instant_ns(text)


def test_accounts():
    """Account ids are whole numbers of 64 bits without a sign."""
    assert parse.account("0") == 0
    assert parse.account(str(2**64 - 1)) == 2**64 - 1
    for text in ("", "-1", str(2**64), "1.0", "abc", "1_000", "１"):
        with pytest.raises(InvalidRequestError):
            parse.account(text)


def test_amounts():
    """Values are whole numbers, or with scaled decimals times a million."""
    assert parse.amount("10_000", scaled=False) == 10_000
    assert parse.amount("-5", scaled=False) == -5
    assert parse.amount("45.1", scaled=True) == 45_100_000
    assert parse.amount("10_000", scaled=True) == 10_000_000_000
    with pytest.raises(InvalidRequestError, match="--scaled"):
        parse.amount("1.5", scaled=False)
    with pytest.raises(InvalidRequestError, match="decimals"):
        parse.amount("0.0000001", scaled=True)


def test_durations():
    """Durations have a unit, seconds without."""
    cases = {
        "3d": 259_200,
        "36h": 129_600,
        "90m": 5_400,
        "2w": 1_209_600,
        "45s": 45,
        "45": 45,
        "0": 0,
        "1 D": 86_400,
    }
    for text, seconds in cases.items():
        assert parse.duration_seconds(text) == seconds
    for text in ("", "d", "3 days", "-1d", "1.5h", "3y"):
        with pytest.raises(InvalidRequestError):
            parse.duration_seconds(text)


def test_dimensions():
    """A bare key takes any value, a list tells values apart, repeated lists add up."""
    assert parse.dimensions(["provider=aws,gcp", "region", "provider=azure"]) == [
        DimensionFilter(key="provider", values=["aws", "gcp", "azure"]),
        DimensionFilter(key="region"),
    ]
    for items in (["provider="], ["=aws"], [""], ["a=x,,y"], ["a", "a"], ["a", "a=x"], ["a=x", "a"]):
        with pytest.raises(InvalidRequestError):
            parse.dimensions(items)


def test_added_dimension_values():
    """Values can only be added."""
    assert parse.added_dimension_values(["p=+azure,+ibm", "p=+x", "q=+y"]) == {
        "p": ["azure", "ibm", "x"],
        "q": ["y"],
    }
    for item in ("p", "p=azure", "p=-aws", "p=+", "p=+a,b", "=+a"):
        with pytest.raises(InvalidRequestError):
            parse.added_dimension_values([item])


def test_thresholds():
    """Thresholds are codes with positive values that may recur."""
    assert parse.thresholds(["free=10000", "every=1_000:recurring"], scaled=False) == [
        AlertThreshold(code="free", value=10_000),
        AlertThreshold(code="every", value=1_000, recurring=True),
    ]
    assert parse.thresholds(["free=1.5"], scaled=True) == [AlertThreshold(code="free", value=1_500_000)]
    for item in ("free", "free=", "free=0", "free=-1", "free=1:often", "free=1:", "=1", "free=1.5"):
        with pytest.raises(InvalidRequestError):
            parse.thresholds([item], scaled=False)


def test_filters():
    """Several values of a key are alternatives; a value may hold equals signs or be empty."""
    assert parse.filters(["a=1", "a=2", "a=1", "b=x=y", "c="]) == {"a": ["1", "2"], "b": ["x=y"], "c": [""]}
    for item in ("a", "=1"):
        with pytest.raises(InvalidRequestError):
            parse.filters([item])


def test_closest():
    """A misspelt name gets a suggestion, another one a list."""
    assert parse.closest("lines_aded", ["lines_added", "x"]) == "; did you mean 'lines_added'?"
    assert parse.closest("q", ["lines_added", "x"]) == "; there are: lines_added, x"
    assert "none" in parse.closest("q", [])


def test_choose_period():
    """Periods by name and ranges, open ones included, but not both."""
    assert choose_period("all", None, None, with_units=False).end_ns == TIME_END_NS
    assert choose_period(None, 5, None, with_units=False).start_ns == 5
    assert choose_period(None, None, 5, with_units=False).start_ns == 0
    assert choose_period(None, None, None, with_units=False).kind == "current_period"
    assert choose_period("last", None, None, with_units=False).kind == "last_billing_period"
    assert choose_period("month", None, None, with_units=False).kind == "current_month"
    assert choose_period("last-month", None, None, with_units=False).kind == "last_month"
    assert choose_period("all", None, None, with_units=True).end_ns < 2 * 10**18 * 2
    assert choose_period(None, TIME_END_NS - 1, None, with_units=True).end_ns == TIME_END_NS
    with pytest.raises(InvalidRequestError, match="don't go together"):
        choose_period("last", 5, None, with_units=False)
    with pytest.raises(InvalidRequestError, match="before"):
        choose_period(None, 5, 4, with_units=False)


def test_numbers():
    """Numbers are exact at any size, in groups of three, and decimals lose only their last zeros."""
    assert output.number(1_234_567) == "1,234,567"
    assert output.number(-1_234) == "-1,234"
    assert output.number(2**100) == f"{2**100:,}"
    assert output.number(None) == output.NOTHING
    assert output.number("text") == "text"
    assert output.number(45_100_000, scaled=True) == "45.1"
    assert output.number(-1_234_500_000, scaled=True) == "-1,234.5"
    assert output.number(-1, scaled=True) == "-0.000001"
    assert output.number(0, scaled=True) == "0"
    assert output.number(100_000_000, scaled=True) == "100"
    assert output.plain(45_100_000, scaled=True) == "45.1"
    assert output.plain(45, scaled=False) == 45


def test_totals():
    """Each aggregation shows its own number; empty MAX and LATEST show none."""
    stats = Totals(count=3, sum=10, min=1, max=7, last_value=2, unique=2)
    assert [output.total(kind, stats) for kind in AggType] == [3, 10, 7, 2, 2]
    assert [output.total(kind, Totals()) for kind in AggType] == [0, 0, None, None, 0]


def test_times():
    """Instants are shown as exactly as they are, in the zone asked for."""
    assert output.moment(0) == "1970-01-01 00:00"
    assert output.moment(10**9) == "1970-01-01 00:00:01"
    assert output.moment(1_500_000_000) == "1970-01-01 00:00:01.5"
    assert output.moment(0, "Asia/Kolkata") == "1970-01-01 05:30"
    assert output.utc_offset(0, "Asia/Kolkata") == "+05:30"
    assert output.utc_offset(0, "UTC") == "+00:00"
    assert output.iso(1) == "1970-01-01T00:00:00.000000001Z"
    assert output.span(0, DAY_NS) == "1970-01-01 to 1970-01-02 (UTC)"
    assert output.span(0, 60 * 10**9) == "1970-01-01 00:00 to 1970-01-01 00:01 (UTC)"
    assert output.span(DAY_NS, TIME_END_NS).startswith("1970-01-02 to the end")
    assert output.span(0, TIME_END_NS) == "all time"
    assert output.period_json(0, TIME_END_NS) == {"start": "1970-01-01T00:00:00Z", "end": None}
    assert output.zone_here("Nowhere/Land") == "UTC"


def test_control_characters_are_escaped():
    """Text from outside can't steer the terminal."""
    assert output.printable("a\x1b[31mb\n") == "a\\x1b[31mb\\n"
    assert output.printable("naïve 数") == "naïve 数"


def test_an_answer_of_copies_says_how_old_it_may_be():
    """The oldest of its copies counts; a leader's answer says nothing."""
    assert heard_text({}) == ""
    assert heard_text({1: 20, 4: 1_177}) == "from a copy that heard from its leader 1,177 ms ago"
    assert "since it started" in heard_text({1: 20, 4: -1})
