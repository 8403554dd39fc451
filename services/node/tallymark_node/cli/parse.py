"""What people type, as values: instants, durations, dimensions, thresholds, filters.

Pure functions from text to values. Whatever can't be read raises `InvalidRequestError` with the text itself and an
example of what would do.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tallymark_protocol.errors import InvalidRequestError
    from tallymark_protocol.model import AlertThreshold, DimensionFilter

INSTANT_HELP = "a date or time of ISO 8601: 2026-01-31, 2026-01-31T10:00+01:00; without a zone it is UTC"

_INSTANT = re.compile(
    r"(?P<date>\d{4}-\d\d-\d\d)"
    r"(?:[Tt ](?P<hour>\d\d):(?P<minute>\d\d)(?::(?P<second>\d\d)(?:[.,](?P<fraction>\d{1,9}))?)?)?"
    r"\s?(?P<zone>[Zz]|UTC|[+-]\d\d(?::?\d\d)?)?",
    re.ASCII,
)
_INTEGER = re.compile(r"[+-]?\d{1,40}", re.ASCII)
_GROUPED = re.compile(r"[+-]?\d{1,40}(?:_\d{1,40}){0,12}", re.ASCII)
_DURATION = re.compile(r"(\d{1,12})\s*([a-z]*)", re.ASCII)
_UNIT_SECONDS = {"": 1, "s": 1, "m": 60, "min": 60, "h": 3_600, "d": 86_400, "w": 604_800}


def _invalid(message: str) -> InvalidRequestError:
    from tallymark_protocol.errors import InvalidRequestError

    return InvalidRequestError(message)


def instant_ns(text: str) -> int:
    """Read a date or a time of ISO 8601 as nanoseconds since the Unix epoch, exactly. Without a zone it is UTC.

    Raises:
        InvalidRequestError: it is none, such a day doesn't exist, or it lies outside 1970-01-01 to 2262-04-11.
    """
    from tallymark_protocol.errors import InvalidRequestError
    from tallymark_protocol.periods import to_ns

    match = _INSTANT.fullmatch(text.strip())
    if match is None:
        raise _invalid(f"{text!r:.60} is no date: write {INSTANT_HELP}")
    zone = (match["zone"] or "Z").upper()
    if zone in {"Z", "UTC"}:
        zone = "Z"
    else:
        digits = zone[1:].replace(":", "").ljust(4, "0")
        zone = f"{zone[0]}{digits[:2]}:{digits[2:]}"
    fraction = f".{match['fraction']}" if match["fraction"] else ""
    clock = f"{match['hour'] or '00'}:{match['minute'] or '00'}:{match['second'] or '00'}{fraction}"
    try:
        return to_ns(f"{match['date']}T{clock}{zone}")
    except InvalidRequestError as error:
        if error.message.endswith("is outside 1970-01-01 to 2262-04-11"):
            side = "before 1970 (UTC)" if match["date"] < "1971" else "after 2262-04-11"
            raise _invalid(f"{text!r:.60} is {side}: times go from 1970-01-01 to 2262-04-11") from None
        reason = error.message.rpartition(": ")[2] if ": " in error.message else error.message
        raise _invalid(f"{text!r:.60} is no date: {reason}; write {INSTANT_HELP}") from None


def check_range(start_ns: int, end_ns: int) -> None:
    """Check that a range doesn't end before it starts.

    Raises:
        InvalidRequestError: it does; both ends are given as dates.
    """
    if end_ns < start_ns:
        from tallymark_node import output

        raise _invalid(
            f"--to {output.moment(end_ns)} lies before --from {output.moment(start_ns)} (both UTC)"
        )


def whole(text: str) -> int:
    """Read a whole number.

    Raises:
        InvalidRequestError: it is none.
    """
    text = text.strip()
    if not _INTEGER.fullmatch(text):
        raise _invalid(f"{text!r:.60} is no whole number")
    return int(text)


def account(text: str) -> int:
    """Read an account id.

    Raises:
        InvalidRequestError: it isn't a whole number from 0 to 2^64-1.
    """
    number = whole(text) if _INTEGER.fullmatch(text.strip()) else -1
    if not 0 <= number < 2**64:
        raise _invalid(f"{text!r:.60} is no account id: a whole number from 0 to 2^64-1")
    return number


def amount(text: str, *, scaled: bool) -> int:
    """Read a value: a whole number (1_000 will do), or with `scaled` a decimal, times 1,000,000.

    Raises:
        InvalidRequestError: it is none, or has more than six decimals.
    """
    text = text.strip()
    if scaled:
        from tallymark_protocol.scale import scale

        return scale(text.replace("_", ""))
    if not _GROUPED.fullmatch(text):
        hint = (
            "; with --scaled it may have decimals" if re.fullmatch(r"[+-]?\d*\.\d+", text, re.ASCII) else ""
        )
        raise _invalid(f"{text!r:.60} is no whole number{hint}")
    return int(text)


def duration_seconds(text: str) -> int:
    """Read a duration such as `3d`, `36h`, `90m`, `2w` or `45s` as seconds.

    Raises:
        InvalidRequestError: it is none.
    """
    match = _DURATION.fullmatch(text.strip().lower())
    if match is None or match[2] not in _UNIT_SECONDS:
        raise _invalid(f"{text!r:.60} is no duration: write 3d, 36h, 90m, 2w or a number of seconds")
    return int(match[1]) * _UNIT_SECONDS[match[2]]


def pairs(items: Iterable[str], *, example: str) -> list[tuple[str, str]]:
    """Read `key=value` items; the value may hold further equals signs.

    Raises:
        InvalidRequestError: an item has no key or no equals sign.
    """
    found = []
    for item in items:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise _invalid(f"{item!r:.80} must be of the form {example}")
        found.append((key, value))
    return found


def filters(items: Iterable[str]) -> dict[str, list[str]]:
    """Read filters: `provider=aws`. Several values of one key are alternatives.

    Raises:
        InvalidRequestError: one isn't of the form key=value.
    """
    found: dict[str, list[str]] = {}
    for key, value in pairs(items, example="key=value, such as provider=aws"):
        values = found.setdefault(key, [])
        if value not in values:
            values.append(value)
    return found


def dimensions(items: Iterable[str]) -> list[DimensionFilter]:
    """Read dimensions: `region` takes any value, `provider=aws,gcp` tells these apart.

    A key given several times with values has them all.

    Raises:
        InvalidRequestError: a list has an empty entry, or a key is given with and without values.
    """
    from tallymark_protocol.model import DimensionFilter

    found: dict[str, list[str]] = {}
    for item in items:
        key, equals, text = item.partition("=")
        values = text.split(",") if equals else []
        if not key or "" in values:
            raise _invalid(f"{item!r:.80} is no dimension: write region (any value) or provider=aws,gcp")
        if key in found and (not values or not found[key]):
            raise _invalid(f"dimension {key!r:.80} is given twice")
        found.setdefault(key, []).extend(values)
    return [DimensionFilter(key=key, values=values) for key, values in found.items()]


def added_dimension_values(items: Iterable[str]) -> dict[str, list[str]]:
    """Read additions to dimensions: `provider=+azure,+ibm`.

    Raises:
        InvalidRequestError: one isn't of that form.
    """
    found: dict[str, list[str]] = {}
    for key, text in pairs(items, example="provider=+azure"):
        values = text.split(",")
        if not all(value.startswith("+") and len(value) > 1 for value in values):
            raise _invalid(f"{key}={text!r:.80}: values can only be added: write {key}=+NAME")
        found.setdefault(key, []).extend(value[1:] for value in values)
    return found


def thresholds(items: Iterable[str], *, scaled: bool) -> list[AlertThreshold]:
    """Read thresholds: `free_tier=10000`, or `every_1000=1000:recurring`.

    Raises:
        InvalidRequestError: one isn't of that form, or its value isn't positive.
    """
    from tallymark_protocol.model import AlertThreshold

    found = []
    for code, text in pairs(items, example="free_tier=10000 or every_1000=1000:recurring"):
        number, colon, word = text.partition(":")
        if colon and word != "recurring":
            raise _invalid(f"{code}={text!r:.80}: after the colon comes recurring, or nothing")
        value = amount(number, scaled=scaled)
        if value <= 0:
            raise _invalid(f"{code}={text!r:.80}: a threshold's value is positive")
        found.append(AlertThreshold(code=code, value=value, recurring=bool(colon)))
    return found


def closest(name: str, known: Sequence[str]) -> str:
    """Say which known name may have been meant: `; did you mean 'x'?`, or what there is, or nothing."""
    import difflib

    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]!r}?"
    if not known:
        return "; there are none yet"
    shown = ", ".join(known[:10]) + (", …" if len(known) > 10 else "")
    return f"; there are: {shown}"
