"""What the right answers are, worked out without any of the engine's code.

`Oracle` keeps the events that were sent in DuckDB and answers queries by SQL over all of them: no cells, no
periods, no increments. `Calendar` finds days, billing periods and hours by asking `zoneinfo` what the local clock
reads. `read_history` gives the usage that is metered: a real history where its file lies beside the repository,
otherwise a seeded one of the same shape.
"""

from __future__ import annotations

import csv
import dataclasses
import datetime as dt
import functools
import gzip
import io
import random
import zoneinfo
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import numpy as np

HISTORY_FILE = Path(__file__).resolve().parents[3] / "shared" / "data" / "uv-history.csv.gz"
SECOND = 10**9
TIME_END = 2**63 - 1
OTHER = "\0other"  # no property value has a zero byte

ADD, REMOVE = 1, 2


# --- usage ---------------------------------------------------------------------------------------------------


class Change(NamedTuple):
    """One file in one commit, as in the history's file."""

    event_id: str
    account_id: int
    ts: int
    added: int
    deleted: int
    area: str
    kind: str
    path_hash: int


def read_history() -> list[Change]:
    """Return the real history, or a synthetic one where there is no such file."""
    if HISTORY_FILE.exists():
        with gzip.open(HISTORY_FILE, "rt", encoding="utf-8", newline="") as lines:
            rows = csv.reader(lines)
            assert next(rows) == list(Change._fields)
            return [
                Change(r[0], int(r[1]), int(r[2]), int(r[3]), int(r[4]), r[5], r[6], int(r[7])) for r in rows
            ]
    return synthetic_history(seed=1)


def synthetic_history(*, seed: int, rows: int = 58_000, accounts: int = 612) -> list[Change]:
    """Make a history of the real one's shape: few busy authors, many files with one time, years, out of order."""
    rng = random.Random(seed)
    authors = [rng.getrandbits(64) for _ in range(accounts)]
    weights = [1 / (rank + 1) ** 1.6 for rank in range(accounts)]
    areas = [
        "crates",
        "(root)",
        "docs",
        ".github",
        "scripts",
        "test",
        "vendor",
        "agents",
        "python",
        "ecosystem",
    ]
    kinds = ["rs", "toml", "md", "lock", "yml", "snap", "py", "json", "(none)", "sh"]
    paths = [
        (rng.getrandbits(64), rng.choices(areas, [80, 8, 6, 3, 2, 1, 1, 1, 1, 1])[0], rng.choice(kinds))
        for _ in range(3_300)
    ]
    first, last = 1_600_000_000, 1_690_000_000
    changes: list[Change] = []
    while len(changes) < rows:
        commit = f"{rng.getrandbits(64):016x}"
        author = rng.choices(authors, weights)[0]
        ts = rng.randrange(first, last)
        files = min(int(rng.paretovariate(0.9)), 450, rows - len(changes))
        for path, area, kind in rng.sample(paths, files):
            added, deleted = (int(rng.paretovariate(0.6)) % 36_000 - 1 for _ in range(2))
            changes.append(
                Change(f"{commit}:{path:016x}", author, ts, max(added, 0), max(deleted, 0), area, kind, path)
            )
    return changes


# --- calendar ------------------------------------------------------------------------------------------------


@functools.cache
def _zone(name: str) -> zoneinfo.ZoneInfo:
    # From the pinned distribution, as the server's: the system's own data may be of another year.
    data = resources.files("tzdata.zoneinfo").joinpath(*name.split("/")).read_bytes()
    return zoneinfo.ZoneInfo.from_file(io.BytesIO(data), key=name)


_EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
# Offsets have been multiples of a quarter of an hour, and have changed at such times, since the seventies.
_STEP = 900


class Calendar:
    """Days, hours and billing periods of a zone, in nanoseconds, found by reading the local clock."""

    def __init__(self, zone: str) -> None:
        self._zone = _zone(zone)
        self._days: dict[dt.date, int] = {}

    def clock(self, seconds: int) -> dt.datetime:
        """Return what the local clock reads."""
        return (_EPOCH + dt.timedelta(seconds=seconds)).astimezone(self._zone)

    def day_start(self, day: dt.date) -> int:
        """Return the first instant at which the local clock reads the day's midnight or later."""
        found = self._days.get(day)
        if found is None:
            midnight = dt.datetime.combine(day, dt.time())
            utc = int((midnight.replace(tzinfo=dt.UTC) - _EPOCH).total_seconds())
            # The clock can't have got there before the highest offset around would have it there.
            around = (self.clock(utc + hours * 3600).utcoffset() for hours in range(-15, 16, 3))
            seconds = utc - int(max(offset.total_seconds() for offset in around if offset is not None))
            while self.clock(seconds).replace(tzinfo=None) < midnight:
                seconds += _STEP
            found = self._days[day] = seconds * SECOND
        return found

    def day(self, time_ns: int) -> dt.date:
        """Return the day that an instant belongs to: the last that has started."""
        day = self.clock(time_ns // SECOND).date() + dt.timedelta(days=1)
        while self.day_start(day) > time_ns:
            day -= dt.timedelta(days=1)
        return day

    def _month(self, time_ns: int, cycle_day: int) -> tuple[dt.date, dt.date]:
        day = self.day(time_ns)
        first = day.replace(day=cycle_day)
        if day.day < cycle_day:
            first = (first.replace(day=1) - dt.timedelta(days=1)).replace(day=cycle_day)
        return first, (first.replace(day=1) + dt.timedelta(days=32)).replace(day=cycle_day)

    def period(self, time_ns: int, kind: str, cycle_day: int = 1) -> tuple[int, int]:
        """Return the billing period of an instant; `kind` is the name of a period type."""
        if kind == "LIFETIME":
            return 0, TIME_END
        if kind == "FIXED_30_DAYS":
            length = 30 * 86_400 * SECOND
            return time_ns // length * length, (time_ns // length + 1) * length
        if kind == "CALENDAR":
            first, after = self._month(time_ns, cycle_day)
        elif kind == "YEAR":
            first = self.day(time_ns).replace(month=1, day=1)
            after = first.replace(year=first.year + 1)
        else:
            assert kind == "DAY"
            first = self.day(time_ns)
            after = first + dt.timedelta(days=1)
        return self.day_start(first), self.day_start(after)

    def starts(self, start: int, end: int, unit: str) -> list[int]:
        """Return the starts of the buckets that `[start, end)` is cut into; the first is `start` itself."""
        found = [start]
        if unit == "hour":
            seconds = start // SECOND // _STEP * _STEP
            before = self._hour(seconds)
            while (seconds := seconds + _STEP) * SECOND < end:
                if (hour := self._hour(seconds)) != before:
                    found.append(seconds * SECOND)
                    before = hour
            return found
        following = self.day(start)
        while True:
            if unit == "day":
                following += dt.timedelta(days=1)
            else:
                following = (following.replace(day=1) + dt.timedelta(days=32)).replace(day=1)
            at = self.day_start(following)
            if at >= end:
                return found
            if at > found[-1]:  # a day that a zone skipped doesn't exist
                found.append(at)

    def _hour(self, seconds: int) -> tuple[Any, ...]:
        clock = self.clock(seconds)
        return clock.utcoffset(), clock.date(), clock.hour


# --- answers -------------------------------------------------------------------------------------------------


class Fact(NamedTuple):
    """An event as it is to be counted. `text` is the value of a unique metric, whatever its type."""

    id: str
    metric: str
    account_id: int
    time_ns: int
    value: int
    text: str | None
    operation: int
    area: str | None
    kind: str | None


@dataclasses.dataclass(frozen=True)
class Answer:
    """The statistics of some events, those that the kind of metric doesn't have left at their defaults."""

    count: int = 0
    sum: int = 0
    min: int | None = None
    max: int | None = None
    last_value: int | None = None
    last_event_us: int | None = None
    unique: int | None = None


class Oracle:
    """All events in one table, and the questions as SQL. `declared` has by dimension the values told apart."""

    def __init__(self, facts: Sequence[Fact], declared: Mapping[str, Sequence[str]]) -> None:
        self._declared = declared
        self._db = duckdb.connect(config={"threads": 1})
        columns = {
            "number": np.arange(len(facts), dtype=np.int64),
            "metric": np.array([fact.metric for fact in facts], dtype=object),
            "account": np.array([fact.account_id for fact in facts], dtype=np.uint64),
            "time": np.array([fact.time_ns for fact in facts], dtype=np.int64),
            "value": np.array([fact.value for fact in facts], dtype=np.int64),
            "text": np.array([fact.text for fact in facts], dtype=object),
            "operation": np.array([fact.operation for fact in facts], dtype=np.int64),
            "area": np.array([fact.area for fact in facts], dtype=object),
            "kind": np.array([fact.kind for fact in facts], dtype=object),
        }
        self._db.register("columns", columns)
        self._db.execute("CREATE TABLE sent AS SELECT * FROM columns")
        self._db.unregister("columns")

    def close(self) -> None:
        """Let go of the table."""
        self._db.close()

    def place(self, offsets: Sequence[int | None]) -> None:
        """Tell which events count, and in which order each account's were stored: by fact, None for not yet."""
        columns = {
            "place": np.array([-1 if offset is None else offset for offset in offsets], dtype=np.int64)
        }
        self._db.register("columns", columns)
        self._db.execute(
            "CREATE OR REPLACE TABLE events AS SELECT sent.*, place FROM sent POSITIONAL JOIN columns "
            "WHERE place >= 0 ORDER BY metric, account, number"
        )
        self._db.unregister("columns")

    def rows(self, sql: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Ask anything of the table `events`."""
        return self._db.execute(sql, parameters).fetchall()

    def ask(
        self,
        agg: str,
        metric: str,
        start: int,
        end: int,
        *,
        account: int | None = None,
        filters: Mapping[str, Sequence[str]] | None = None,
        group_by: Iterable[str] = (),
        starts: Sequence[int] | None = None,
    ) -> dict[tuple[Any, ...], Answer]:
        """Return the statistics of the events timed in `[start, end)`, by group; groups without any are absent.

        A group is (account, if none was asked for; start of the bucket, if `starts` is given; values of the
        dimensions in `group_by`).
        """
        where, parameters = ["metric = ?", "time >= ?", "time < ?"], [metric, start, end]
        if account is not None:
            where.append("account = ?")
            parameters.append(account)
        for key, values in (filters or {}).items():
            where.append(f"{key} IN ({', '.join('?' * len(values))})")
            parameters += values
        selected = f"SELECT * FROM events WHERE {' AND '.join(where)}"
        groups = ["account"] if account is None else []
        if starts is not None:
            selected = (
                f"SELECT s.*, b.bucket FROM ({selected}) s ASOF JOIN (SELECT unnest(?::BIGINT[]) AS bucket) b "
                "ON s.time >= b.bucket"
            )
            parameters.append(list(starts))
            groups.append("bucket")
        for key in group_by:
            known = self._declared[key]
            column = key
            if known:
                listed = ", ".join("'" + value.replace("'", "''") + "'" for value in known)
                column = (
                    f"CASE WHEN {key} IS NULL OR {key} IN ({listed}) THEN {key} ELSE chr(0) || 'other' END"
                )
            groups.append(column)
        keys = "".join(f"{column} AS g{i}, " for i, column in enumerate(groups))
        names = [f"g{i}" for i in range(len(groups))]
        by = f" GROUP BY {', '.join(names)}" if names else ""
        if agg == "COUNT":
            statistics = "count(*), max(time)"
        elif agg == "COUNT_UNIQUE":
            inner = ", ".join([*names, "text"])
            latest = "arg_max(operation, {'t': time, 'p': place})"
            sql = (
                f"SELECT {inner}, count(*) AS n, {latest} AS last FROM (SELECT {keys}* FROM ({selected})) "
                f"GROUP BY {inner}"
            )
            sql = f"SELECT {', '.join([*names, 'sum(n)', f'count(*) FILTER (last <> {REMOVE})'])} FROM ({sql}){by}"
            found = self.rows(sql, parameters)
            return {row[:-2]: Answer(count=int(row[-2]), unique=row[-1]) for row in found if row[-2]}
        else:
            statistics = (
                "count(*), sum(value::HUGEINT), min(value), max(value), arg_max(value, {'t': time, 'p': place}), "
                "max(time)"
            )
        sql = f"SELECT {', '.join([*names, statistics])} FROM (SELECT {keys}* FROM ({selected})){by}"
        found = self.rows(sql, parameters)
        size = len(names)
        if agg == "COUNT":
            return {
                row[:size]: Answer(count=row[size], last_event_us=row[size + 1] // 1000)
                for row in found
                if row[size]
            }
        return {
            row[:size]: Answer(
                count=row[size],
                sum=int(row[size + 1]),
                min=row[size + 2],
                max=row[size + 3],
                last_value=row[size + 4],
                last_event_us=row[size + 5] // 1000,
            )
            for row in found
            if row[size]
        }
