"""How the command shows things: tables for people, JSON for machines, and values, times and sums in either.

Owns the form of all that goes to standard output, and nothing about where it comes from. rich is imported only when
a table is drawn. Numbers are exact in both forms: grouped digits in tables, plain integers in JSON; values that were
scaled are shown as decimals, in JSON as text, because a JSON number would be read as a float.
"""

from __future__ import annotations

import datetime as dt
import json
import sys
import zoneinfo
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from tallymark_protocol.model import AggType

if TYPE_CHECKING:
    from rich.console import Console

NOTHING = "–"
_PLAIN_WIDTH = 200  # columns, where the output is no terminal and has no width of its own


def console(*, stderr: bool = False) -> Console:
    """Make a console for standard output or error that takes text as it is: no markup, no emoji."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else _PLAIN_WIDTH
    return Console(file=stream, width=width, markup=False, emoji=False, highlight=False)


def document(value: Any) -> None:
    """Print one JSON document on one line."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")


def line(text: str = "") -> None:
    """Print a line."""
    sys.stdout.write(text + "\n")


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    title: str = "",
    numbers: frozenset[int] | set[int] = frozenset(),
    to: Console | None = None,
) -> None:
    """Draw a table.

    Args:
        columns: headings.
        rows: cells, as many as there are columns.
        title: a line above it.
        numbers: positions of the columns that are set to the right.
        to: where to; standard output by default.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    for position, heading in enumerate(columns):
        # A number that is broken over two lines is two numbers.
        right = position in numbers
        drawn.add_column(Text(heading), justify="right" if right else "left", overflow="fold", no_wrap=right)
    for row in rows:
        drawn.add_row(*(Text(printable(cell)) for cell in row))
    target = console() if to is None else to
    if title:
        target.print(Text(printable(title), style="bold"))
    target.print(drawn)


def facts(pairs: Iterable[tuple[str, str]]) -> None:
    """Print names and values, a pair a line, the values below each other."""
    shown = list(pairs)
    width = max((len(name) for name, _ in shown), default=0)
    for name, value in shown:
        line(f"{name:<{width}}  {printable(value)}")


def printable(text: str) -> str:
    """Return text from outside with control characters escaped, so that it can't steer a terminal."""
    if text.isprintable():
        return text
    return "".join(
        character
        if character.isprintable()
        else character.encode("unicode_escape", "replace").decode("ascii")
        for character in text
    )


# --- values --------------------------------------------------------------------------------------------------


def decimal(value: int) -> str:
    """Write a scaled value as a decimal, without zeros at its end."""
    from tallymark_protocol.scale import unscale

    text = f"{unscale(value):f}"
    return text.rstrip("0").rstrip(".")


def number(value: int | str | None, *, scaled: bool = False) -> str:
    """Write a value for people: digits in groups of three; text as it is; a dash for none."""
    if value is None:
        return NOTHING
    if isinstance(value, str):
        return value
    if not scaled:
        return f"{value:,}"
    whole, point, fraction = decimal(value).partition(".")
    sign = "-" if whole.startswith("-") else ""
    return f"{sign}{int(whole.lstrip('-')):,}{point}{fraction}"


def plain(value: int | str | None, *, scaled: bool = False) -> int | str | None:
    """Return a value for JSON: a number, or with `scaled` the decimal as text."""
    return decimal(value) if scaled and isinstance(value, int) else value


def total(agg_type: AggType, stats: Any) -> int | None:
    """Return what a metric of this aggregation comes to; None for an empty MAX or LATEST."""
    match agg_type:
        case AggType.COUNT:
            return int(stats.count)
        case AggType.SUM:
            return int(stats.sum)
        case AggType.MAX:
            value = stats.max
        case AggType.LATEST:
            value = stats.last_value
        case AggType.COUNT_UNIQUE:
            return int(stats.unique or 0)
    return None if value is None else int(value)


def has_units(agg_type: AggType) -> bool:
    """Whether a metric's totals are in the unit of its events' values, so that scaling applies to them."""
    return agg_type in {AggType.SUM, AggType.MAX, AggType.LATEST}


# --- times ---------------------------------------------------------------------------------------------------


def moment(time_ns: int | None, zone: str = "UTC") -> str:
    """Write an instant in a zone, as exactly as it is: `2026-01-31 10:00`, seconds and parts where there are any."""
    if time_ns is None:
        return NOTHING
    seconds, fraction = divmod(time_ns, 10**9)
    local = _local(seconds, zone)
    text = f"{local:%Y-%m-%d %H:%M}"
    if local.second or fraction:
        text += f":{local:%S}"
    return text + (f".{fraction:09d}".rstrip("0") if fraction else "")


def utc_offset(time_ns: int, zone: str) -> str:
    """Write how far a zone's clocks are ahead of UTC at an instant: `+02:00`."""
    return _local(time_ns // 10**9, zone).isoformat()[19:]


def iso(time_ns: int | None) -> str | None:
    """Write an instant for JSON: RFC 3339 in UTC, to the nanosecond where it has any."""
    if time_ns is None:
        return None
    seconds, fraction = divmod(time_ns, 10**9)
    text = f"{_local(seconds, 'UTC'):%Y-%m-%dT%H:%M:%S}"
    return text + (f".{fraction:09d}".rstrip("0") if fraction else "") + "Z"


def span(start_ns: int, end_ns: int, zone: str = "UTC") -> str:
    """Write a half-open interval: dates alone where both ends are midnights."""
    from tallymark_protocol.zones import TIME_END_NS

    if start_ns <= 0 and end_ns >= TIME_END_NS:
        return "all time"
    start, end = moment(start_ns, zone), moment(end_ns, zone)
    if start.endswith(" 00:00") and (end.endswith(" 00:00") or end_ns >= TIME_END_NS):
        start, end = start.removesuffix(" 00:00"), end.removesuffix(" 00:00")
    return f"{start} to {end if end_ns < TIME_END_NS else 'the end of time'} ({zone})"


def _local(seconds: int, zone: str) -> dt.datetime:
    moment_utc = dt.datetime(1970, 1, 1, tzinfo=dt.UTC) + dt.timedelta(seconds=seconds)
    if zone == "UTC":
        return moment_utc
    return moment_utc.astimezone(zoneinfo.ZoneInfo(zone))


def zone_here(zone: str) -> str:
    """Return the zone if this machine knows it, else UTC: the server may have newer data."""
    try:
        zoneinfo.ZoneInfo(zone)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        return "UTC"
    return zone


def period_json(start_ns: int, end_ns: int) -> dict[str, Any]:
    """Write an interval for JSON; one that never ends has the end null."""
    from tallymark_protocol.zones import TIME_END_NS

    return {"start": iso(start_ns), "end": None if end_ns >= TIME_END_NS else iso(end_ns)}


def stats_json(agg_type: AggType, stats: Any, *, scaled: bool = False) -> dict[str, Any]:
    """Write totals for JSON."""
    units = scaled and has_units(agg_type)
    if agg_type is AggType.COUNT_UNIQUE:
        return {"total": stats.unique or 0, "count": stats.count}
    return {
        "total": plain(total(agg_type, stats), scaled=units),
        "count": stats.count,
        "sum": plain(stats.sum, scaled=scaled),
        "min": plain(stats.min, scaled=scaled),
        "max": plain(stats.max, scaled=scaled),
        "last_value": plain(stats.last_value, scaled=scaled),
    }
