"""Time zones as plain lists of UTC instants.

A metric's zone is looked up once, when its schema is made; the record that holds the schema carries the
resulting `ZoneTable`, and all calendar arithmetic (`periods`) uses nothing else. So two replicas with different
time zone data still fold alike, and a database update moves no bill by itself.

`transitions` reads the TZif file (RFC 9636) itself rather than sampling offsets: every transition in the file is
taken, and the POSIX rule in its footer is unrolled for the years after the last one, so none can be missed,
however close together two of them lie. The files come from the `tzdata` distribution where it is installed
(pinned, so the same on every node), else from where `zoneinfo` looks. This is the only module that reads them.
"""

from __future__ import annotations

import datetime as dt
import itertools
import re
import struct
import zoneinfo
from bisect import bisect_right
from importlib import resources
from pathlib import Path

import msgspec

from tallymark_protocol.errors import ErrorCode, InvalidRequestError

TIME_END_NS = 2**63 - 1  # exclusive end of time: no event can lie at or beyond it
HORIZON_S = TIME_END_NS // 10**9  # 2262-04-11T23:47:16Z, the last second that nanoseconds in 64 bits reach
OFFSET_S_MAX = 26 * 3_600  # RFC 9636: no offset is 26 hours or more from UTC
TRANSITIONS_MAX = 4_096  # in one table; two a year make 584

_NAME = re.compile(r"[A-Za-z0-9_+-]{1,32}(/[A-Za-z0-9_+-]{1,32}){0,3}", re.ASCII)
# Not zones but views of this machine's setting, or counts of leap seconds.
_FOREIGN = re.compile(r"localtime|posixrules|(posix|right)/.*")


class ZoneTable(msgspec.Struct, frozen=True):
    """The offsets of a time zone from 1970-01-01 to the end of 64-bit nanoseconds.

    `offsets[0]` is in force before `instants[0]` (and before 1970), `offsets[i + 1]` from `instants[i]` on.
    """

    name: str
    instants: list[int]  # UTC seconds at which the offset changes; strictly rising, 0..HORIZON_S
    offsets: list[int]  # seconds east of UTC; one more than `instants`; neighbours differ

    def offset_at(self, seconds: int) -> int:
        """Return the offset in force at a UTC second."""
        return self.offsets[bisect_right(self.instants, seconds)]

    def problem(self) -> str | None:
        """Say what is wrong with the table, or None. Calendar arithmetic relies on nothing else."""
        if len(self.instants) > TRANSITIONS_MAX:
            return f"a zone has at most {TRANSITIONS_MAX} transitions"
        if len(self.offsets) != len(self.instants) + 1:
            return "a zone has one offset more than transitions"
        if any(a >= b for a, b in itertools.pairwise(self.instants)):
            return "a zone's transitions must rise"
        if self.instants and not (self.instants[0] >= 0 and self.instants[-1] <= HORIZON_S):
            return "a zone's transitions must lie between 1970 and 2262"
        if any(abs(offset) >= OFFSET_S_MAX for offset in self.offsets):
            return "a zone's offsets must be below 26 hours"
        if any(a == b for a, b in itertools.pairwise(self.offsets)):
            return "a zone's neighbouring offsets must differ"
        return None


UTC = ZoneTable(name="UTC", instants=[], offsets=[0])


def transitions(zone_name: str) -> ZoneTable:
    """Read an IANA zone's offset changes from the time zone data.

    Raises:
        InvalidRequestError: no such zone, or its data can't be used.
    """
    data = _read(zone_name) if isinstance(zone_name, str) and _NAME.fullmatch(zone_name) else None
    if data is None or not data.startswith(b"TZif") or _FOREIGN.fullmatch(zone_name):
        raise InvalidRequestError(
            f"time_zone {zone_name!r:.100} is no IANA time zone", code=ErrorCode.INVALID_SCHEMA
        )
    try:
        table = table_from_tzif(zone_name, data)
    except (struct.error, ValueError, IndexError) as error:
        raise InvalidRequestError(
            f"the time zone data of {zone_name!r} can't be used: {error}", code=ErrorCode.INVALID_SCHEMA
        ) from error
    return table


def _read(name: str) -> bytes | None:
    """Return the TZif file of a zone, or None. The name has been matched: it can't leave the folder."""
    try:
        root = resources.files("tzdata.zoneinfo")
    except ModuleNotFoundError:
        folders = [Path(path) for path in zoneinfo.TZPATH]
    else:
        try:
            return root.joinpath(*name.split("/")).read_bytes()
        except OSError:
            return None
    for folder in folders:
        try:
            return folder.joinpath(name).read_bytes()
        except OSError:
            continue
    return None


# A TZif block (RFC 9636, section 3): this header, then transition times, the type of each, the types, and the rest.
#   0      4        5         20        24        28       32       36       40       44
#   | TZif | version| reserved | isutcnt | isstdcnt| leapcnt| timecnt| typecnt| charcnt|
_HEADER = struct.Struct(">4sc15x6I")
_TYPE = struct.Struct(">iBB")  # offset, is DST, index of the abbreviation


def table_from_tzif(name: str, data: bytes) -> ZoneTable:
    """Make a table from the bytes of a TZif file of version 2 or later.

    Raises:
        ValueError, IndexError, struct.error: the file isn't one, or counts leap seconds.
    """
    magic, version, *counts = _HEADER.unpack_from(data)
    if magic != b"TZif" or version < b"2":
        raise ValueError("not a TZif file of version 2 or later")
    isut, isstd, leaps, times, types, characters = counts
    # The first block holds 32-bit times for old readers; the second says it all again in 64 bits.
    start = _HEADER.size + times * 5 + types * 6 + characters + leaps * 8 + isstd + isut
    magic, _, *counts = _HEADER.unpack_from(data, start)
    isut, isstd, leaps, times, types, characters = counts
    if magic != b"TZif" or types == 0:
        raise ValueError("no 64-bit data")
    if leaps:
        raise ValueError("it counts leap seconds")
    start += _HEADER.size
    instants = struct.unpack_from(f">{times}q", data, start)
    indexes = struct.unpack_from(f">{times}B", data, start + times * 8)
    start += times * 9
    offsets = [_TYPE.unpack_from(data, start + i * _TYPE.size)[0] for i in range(types)]
    start += types * _TYPE.size + characters + isstd + isut
    footer = data[start:]
    if len(footer) < 2 or not (footer.startswith(b"\n") and footer.endswith(b"\n")):
        raise ValueError("no footer")
    rule = footer[1:-1].decode("ascii")

    changes = [(instant, offsets[index]) for instant, index in zip(instants, indexes, strict=True)]
    first = offsets[0]
    if rule:
        standard, unrolled = _unroll(rule)
        if not changes:
            first = standard  # with no transition in the file, the footer speaks for all times
        changes += [change for change in unrolled if not instants or change[0] > instants[-1]]
    return _make_table(name, first, changes)


def _make_table(name: str, first: int, changes: list[tuple[int, int]]) -> ZoneTable:
    """Keep the changes from 1970 to the horizon at which the offset really becomes another."""
    kept_instants: list[int] = []
    kept_offsets = [first]
    for instant, offset in changes:
        if instant > HORIZON_S:
            break
        if instant < 0:
            kept_offsets = [offset]
        elif offset != kept_offsets[-1]:
            kept_instants.append(instant)
            kept_offsets.append(offset)
    table = ZoneTable(name=name, instants=kept_instants, offsets=kept_offsets)
    problem = table.problem()
    if problem:
        raise ValueError(problem)
    return table


# --- the footer: a POSIX TZ string (RFC 9636, section 3.3.1) -------------------------------------------------

_ZONE = r"(?:<[A-Za-z0-9+-]+>|[A-Za-z]{3,})"
_CLOCK = r"[+-]?\d{1,3}(?::\d\d(?::\d\d)?)?"
_DAY = r"(?:M\d{1,2}\.\d\.\d|J\d{1,3}|\d{1,3})"
_RULE = re.compile(
    rf"{_ZONE}({_CLOCK})(?:{_ZONE}({_CLOCK})?,({_DAY})(?:/({_CLOCK}))?,({_DAY})(?:/({_CLOCK}))?)?", re.ASCII
)
_EPOCH_DAY = dt.date(1970, 1, 1).toordinal()
_LAST_YEAR = 2262


def _unroll(rule: str) -> tuple[int, list[tuple[int, int]]]:
    """Return a rule's standard offset, and its changes (instant, offset) from 1969 to the horizon, rising."""
    match = _RULE.fullmatch(rule)
    if match is None:
        raise ValueError(f"rule {rule!r} isn't understood")
    standard_text, dst_text, start_day, start_clock, end_day, end_clock = match.groups()
    standard = -_seconds(standard_text)  # POSIX counts west of Greenwich as positive
    if start_day is None:
        # One offset for ever: from the last transition on, which is of this offset already.
        return standard, []
    dst = standard + 3_600 if dst_text is None else -_seconds(dst_text)
    start_second = _seconds(start_clock or "2")
    end_second = _seconds(end_clock or "2")
    changes: list[tuple[int, bool]] = []
    for year in range(1969, _LAST_YEAR + 1):
        # Each in the local time that is in force until then.
        changes.append((_day_number(start_day, year) * 86_400 + start_second - standard, True))
        changes.append((_day_number(end_day, year) * 86_400 + end_second - dst, False))
    # Where one year's end of DST falls on the next one's start, DST goes on: the start sorts last and wins.
    changes.sort()
    latest = dict(changes)
    return standard, [(instant, dst if is_dst else standard) for instant, is_dst in latest.items()]


def _seconds(clock: str) -> int:
    """Return the seconds of `[+-]h[:mm[:ss]]`; version 3 allows -167 to 167 hours."""
    sign = -1 if clock.startswith("-") else 1
    hours, minutes, seconds = [*clock.lstrip("+-").split(":"), "0", "0"][:3]
    return sign * (int(hours) * 3_600 + int(minutes) * 60 + int(seconds))


def _day_number(day: str, year: int) -> int:
    """Return the day since the epoch on which a rule's `Mm.w.d`, `Jn` or `n` falls in a year."""
    january_1 = dt.date(year, 1, 1).toordinal() - _EPOCH_DAY
    if day.startswith("J"):
        # 1-365, 29 February never counted: find it in a year without one.
        date = dt.date.fromordinal(dt.date(1970, 1, 1).toordinal() + int(day[1:]) - 1)
        return dt.date(year, date.month, date.day).toordinal() - _EPOCH_DAY
    if not day.startswith("M"):
        return january_1 + int(day)
    month, week, weekday = (int(part) for part in day[1:].split("."))
    first = dt.date(year, month, 1)
    # Rules count Sunday as 0; isoweekday() % 7 does too.
    number = 1 + (weekday - first.isoweekday()) % 7 + (week - 1) * 7
    days = (dt.date(year + month // 12, month % 12 + 1, 1) - first).days
    if number > days:
        number -= 7  # week 5 means the last one
    return first.toordinal() - _EPOCH_DAY + number - 1
