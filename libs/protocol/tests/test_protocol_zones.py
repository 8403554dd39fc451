"""Zone tables against zoneinfo, reading the same files."""

import datetime as dt
import struct
import zoneinfo
from importlib import resources

import pytest

from tallymark_protocol import zones
from tallymark_protocol.errors import ErrorCode, InvalidRequestError
from tallymark_protocol.zones import HORIZON_S, UTC, ZoneTable, table_from_tzif, transitions

ROOT = resources.files("tzdata.zoneinfo")
NAMES = resources.files("tzdata").joinpath("zones").read_text().split()
EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)


def zone_data(name: str) -> bytes:
    return ROOT.joinpath(*name.split("/")).read_bytes()


def reference(name: str) -> zoneinfo.ZoneInfo:
    """Return the standard library's zone of the same file that `transitions` reads."""
    with ROOT.joinpath(*name.split("/")).open("rb") as file:
        return zoneinfo.ZoneInfo.from_file(file, key=name)


def reference_offset(zone: zoneinfo.ZoneInfo, seconds: int) -> int:
    offset = (EPOCH + dt.timedelta(seconds=seconds)).astimezone(zone).utcoffset()
    return offset.days * 86_400 + offset.seconds


def distinct_names() -> list[str]:
    """One name for each different file."""
    return list({zone_data(name): name for name in NAMES}.values())


def test_every_zone_agrees_with_zoneinfo_around_its_transitions_and_in_between():
    """Each change lies exactly where zoneinfo has it, and steps of 80 days find no other."""
    names = distinct_names()
    assert len(names) > 300
    for name in names:
        table, zone = transitions(name), reference(name)
        assert table.problem() is None
        for index, instant in enumerate(table.instants):
            assert reference_offset(zone, instant) == table.offsets[index + 1], (name, instant)
            if instant:
                assert reference_offset(zone, instant - 1) == table.offsets[index], (name, instant)
        for seconds in range(0, HORIZON_S, 80 * 86_400):
            assert reference_offset(zone, seconds) == table.offset_at(seconds), (name, seconds)


@pytest.mark.parametrize(
    "name",
    ["Africa/Casablanca", "Africa/El_Aaiun", "Africa/Cairo", "America/Argentina/San_Luis", "Asia/Gaza"],
)
def test_no_transition_is_missed_where_they_lie_close_together(name):
    """Twelve-hour steps through a century: zones that change four times a year, with days in between."""
    table, zone = transitions(name), reference(name)
    for seconds in range(0, 4_102_444_800, 12 * 3_600):
        assert reference_offset(zone, seconds) == table.offset_at(seconds), seconds


def test_the_last_years_before_the_horizon_follow_the_footer():
    """New York changes twice a year up to 2262, and the last change before April is the one of March."""
    table = transitions("America/New_York")
    last = EPOCH + dt.timedelta(seconds=table.instants[-1])
    assert last == dt.datetime(2262, 3, 9, 7, tzinfo=dt.UTC)
    assert table.offsets[-1] == -4 * 3_600
    assert len(table.instants) == 2 * 292 + 1


def test_utc_has_no_transitions():
    """UTC and its aliases are one offset for ever."""
    assert transitions("UTC") == UTC == ZoneTable(name="UTC", instants=[], offsets=[0])
    assert transitions("Etc/GMT+5") == ZoneTable(name="Etc/GMT+5", instants=[], offsets=[-5 * 3_600])


def test_known_zones():
    """Spot checks by hand: Kathmandu's quarter of an hour, Apia's lost day, Dublin's winter-time footer."""
    assert transitions("Asia/Kathmandu") == ZoneTable("Asia/Kathmandu", [504_901_800], [19_800, 20_700])
    apia = transitions("Pacific/Apia")
    skipped = apia.instants.index(int(dt.datetime(2011, 12, 30, 10, tzinfo=dt.UTC).timestamp()))
    assert apia.offsets[skipped : skipped + 2] == [-10 * 3_600, 14 * 3_600]
    dublin = transitions("Europe/Dublin")
    july, january = (int(dt.datetime(2200, month, 1, tzinfo=dt.UTC).timestamp()) for month in (7, 1))
    assert (dublin.offset_at(july), dublin.offset_at(january)) == (3_600, 0)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "Mars/Olympus",
        "Europe",
        "europe london",
        "../UTC",
        "Europe/../UTC",
        "/etc/passwd",
        "Europe/London\n",
        "zone.tab",
        "tzdata.zi",
        "leapseconds",
        "__init__",
        "localtime",
        "right/UTC",
        "posix/UTC",
        "posixrules",
        "a\x00b",
        "\ud800",
        "x" * 1_000,
        None,
        5,
    ],
)
def test_an_unknown_zone_is_refused_by_name(name):
    """Only IANA names pass; nothing outside the folder is ever opened."""
    with pytest.raises(InvalidRequestError, match="time_zone") as caught:
        transitions(name)
    assert caught.value.code == ErrorCode.INVALID_SCHEMA
    if isinstance(name, str) and name.isprintable():
        assert name[:50] in str(caught.value)


def test_a_machine_without_the_tzdata_distribution_uses_the_paths_of_zoneinfo(monkeypatch, tmp_path):
    """The fallback finds a zone in the second folder, and no view of this machine's own setting."""
    folder = tmp_path / "second" / "Asia"
    folder.mkdir(parents=True)
    (folder / "Kathmandu").write_bytes(zone_data("Asia/Kathmandu"))
    (tmp_path / "second" / "localtime").write_bytes(zone_data("Asia/Kathmandu"))

    def missing(package):
        raise ModuleNotFoundError(package)

    monkeypatch.setattr(zones.resources, "files", missing)
    monkeypatch.setattr(zones.zoneinfo, "TZPATH", (str(tmp_path / "first"), str(tmp_path / "second")))
    assert transitions("Asia/Kathmandu").offsets == [19_800, 20_700]
    for name in ("localtime", "Asia/Tokyo"):
        with pytest.raises(InvalidRequestError):
            transitions(name)


def tzif(times: list[tuple[int, int]], offsets: list[int], footer: bytes, *, leaps: int = 0) -> bytes:
    """Write a version 3 file with an empty first block."""
    header = struct.Struct(">4sc15x6I")
    body = struct.pack(f">{len(times)}q{len(times)}B", *(t for t, _ in times), *(i for _, i in times))
    body += b"".join(struct.pack(">iBB", offset, 0, 0) for offset in offsets) + b"X\0" + bytes(12 * leaps)
    first = header.pack(b"TZif", b"3", 0, 0, 0, 0, 1, 1) + struct.pack(">iBB", 0, 0, 0) + b"\0"
    second = header.pack(b"TZif", b"3", 0, 0, leaps, len(times), len(offsets), 2)
    return first + second + body + b"\n" + footer + b"\n"


def test_changes_of_name_alone_and_before_1970_are_left_out():
    """What remains are real changes of offset since 1970; the first offset is the one of 1970."""
    data = tzif([(-500, 1), (100, 2), (200, 0), (300, 0)], [0, 60, 60], b"")
    assert table_from_tzif("X", data) == ZoneTable("X", [200], [60, 0])


def test_a_change_at_the_epoch_is_kept():
    """Instant 0 is a transition like any other: the period before it has the older offset."""
    assert table_from_tzif("X", tzif([(0, 1)], [0, 60], b"")) == ZoneTable("X", [0], [0, 60])


def test_a_footer_without_transitions_speaks_for_all_times():
    """RFC 9636: with no transition in the file, the footer's offset is in force from the beginning."""
    assert table_from_tzif("X", tzif([], [7], b"<+01>-1")) == ZoneTable("X", [], [3_600])


def test_a_footer_may_count_days_of_the_year():
    """`Jn` never counts 29 February, so J60 is always 1 March; `n` counts it, from 0, so 300 moves."""
    table = table_from_tzif("X", tzif([], [0], b"AAA0BBB,J60/0,300/0"))
    changes = [EPOCH + dt.timedelta(seconds=instant) for instant in table.instants]
    assert [change for change in changes if change.year in (2023, 2024)] == [
        dt.datetime(2023, 3, 1, tzinfo=dt.UTC),
        dt.datetime(2023, 10, 27, 23, tzinfo=dt.UTC),
        dt.datetime(2024, 3, 1, tzinfo=dt.UTC),
        dt.datetime(2024, 10, 26, 23, tzinfo=dt.UTC),
    ]


def test_summer_time_all_year_round_has_no_transitions():
    """RFC 9636's example: a DST that ends where it starts again never ends."""
    table = table_from_tzif("X", tzif([(-10, 1)], [0, -14_400], b"XXX3EDT4,0/0,J365/23"))
    assert table.instants == []
    assert table.offsets == [-14_400]


@pytest.mark.parametrize(
    "data",
    [
        b"TZif",
        b"TZif" + bytes(40),  # version 1
        tzif([], [0], b"XXX3EDT4"),  # no rule for when
        tzif([], [0], b"nonsense"),
        tzif([], [0], b"UTC0", leaps=1),
        tzif([], [], b"UTC0"),
        tzif([], [0], b"UTC0")[:-5],
        tzif([(5, 9)], [0], b"UTC0"),
        tzif([(1, 1)], [0, 26 * 3_600], b"UTC0"),
    ],
)
def test_damaged_data_is_refused(data):
    """Cut, of an old version, counting leap seconds, or out of bounds: never a wrong table."""
    with pytest.raises((ValueError, IndexError, struct.error)):
        table_from_tzif("X", data)


@pytest.mark.parametrize(
    ("instants", "offsets"),
    [
        ([1], [0]),
        ([], []),
        ([2, 1], [0, 1, 2]),
        ([1, 1], [0, 1, 2]),
        ([-1], [0, 1]),
        ([HORIZON_S + 1], [0, 1]),
        ([1], [0, 26 * 3_600]),
        ([1], [5, 5]),
        (list(range(5_000)), list(range(5_001))),
    ],
)
def test_a_bad_table_has_a_problem(instants, offsets):
    """A table from a peer is checked for everything that the arithmetic relies on."""
    assert ZoneTable("X", instants, offsets).problem()
