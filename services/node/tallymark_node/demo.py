"""`tallymark demo`: a git repository's history, metered and looked at.

Starts a server of its own, loads the history through the SDK over loopback as any application would, with several
requests under way, then asks it what a billing page would ask. Every (commit, file) is an event of each metric,
authors are accounts. The totals are compared with a recount of the history before they are shown.
"""

from __future__ import annotations

import asyncio
import itertools
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from tallymark import (
    AccountTotal,
    AggType,
    AlertThreshold,
    AlreadyExistsError,
    AsyncClient,
    DimensionFilter,
    InvalidRequestError,
    MetricSchema,
    Period,
    PeriodType,
    Receipt,
)
from tallymark_node import history, output
from tallymark_node.cli.alerts import ALERT_COLUMNS, alert_row, all_alerts
from tallymark_node.cli.serve import until
from tallymark_node.cli.usage import group_text
from tallymark_node.config import Settings
from tallymark_node.history import Change
from tallymark_protocol.zones import TIME_END_NS
from tallymark_runtime.clock import RealClock

BATCH_CHANGES: Final = 2_000
BATCHES_IN_FLIGHT: Final = 4
ACCOUNTS_SHOWN: Final = 8
MONTHS_SHOWN: Final = 12
GROUPS_SHOWN: Final = 10
ALERTS_SHOWN: Final = 6
ALERTS_READ_MAX: Final = 50_000
RECOUNT_ACCOUNTS_MAX: Final = 10_000  # the most that one ranking can return
ALL_TIME: Final = Period(0, TIME_END_NS)
_BAR_WIDTH: Final = 30
_PLAIN_SECONDS: Final = 2  # between two lines of progress where there is no terminal

COUNT, LINES, LARGEST, LAST, DISTINCT = (
    "files_changed",
    "lines_added",
    "largest_change",
    "last_change",
    "files_touched",
)


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What to do."""

    path: Path  # in the repository, as `repository` gives it
    port: int = 0  # 0: a free one
    data_dir: str | None = None  # None: a temporary folder
    limit: int | None = None  # only the newest changes
    stay: bool = False  # leave the server up until told to stop
    timeout: float = 30.0  # seconds for each request


class Loaded(msgspec.Struct):
    """What was read and stored, and a recount in plain Python."""

    changes: int = 0
    events: int = 0
    stored: int = 0
    duplicates: int = 0
    refused: int = 0
    names: dict[int, str] = {}  # author by account: the newest name
    lines: Counter[int] = msgspec.field(default_factory=Counter)  # added, by account
    first_s: int = 0  # times of the oldest and the newest change
    last_s: int = 0


async def run(plan: Plan, stop: asyncio.Event, report: Callable[[str], None]) -> int:
    """Load, show, and with `stay` wait; return the exit status.

    Raises:
        InvalidRequestError: there is no history.
    """
    from tallymark_node import dev  # late: what comes before needs no kernel

    path = plan.path
    changes: Iterator[Change] = history.read(path)
    if plan.limit is not None:
        changes = itertools.islice(changes, plan.limit)
    first = await asyncio.to_thread(_take, changes)
    if not first:
        raise InvalidRequestError(f"the repository at {path} has no changes to meter")
    with tempfile.TemporaryDirectory(prefix="tallymark-demo-") as temporary:
        settings = Settings(node_id="demo", port=plan.port, data_dir=plan.data_dir or temporary)
        async with dev.running(settings, report) as node:
            output.line(f"a server runs at {node.address}; metering the history of {path}")
            async with AsyncClient([node.address], timeout=plan.timeout) as client:
                schemas = [await _create(client, schema) for schema in metric_schemas(first)]
                loaded = await _load(client, itertools.chain(first, changes), stop)
                if stop.is_set():
                    return 0
                status = await _check(client, loaded, fresh=plan.data_dir is None)
                best = await _show(client, loaded, schemas)
            if not plan.stay:
                output.line(
                    "The server ends with the demo. For one that stays, run `tallymark demo` in a terminal, "
                    "or `tallymark dev`."
                )
                return status
            _show_commands(node.address, best)
            output.line("the server stays up until Ctrl-C")
            sys.stdout.flush()
            return await until(stop, node.failed) or status


# --- what to meter -------------------------------------------------------------------------------------------


def repository(path: Path | None) -> Path:
    """Return the top folder of the repository that holds `path`; of this package's own or the current one for None.

    Raises:
        InvalidRequestError: there is none.
    """
    if path is None:
        package = Path(__file__).resolve()
        path = next((folder for folder in package.parents if (folder / ".git").exists()), Path())
    try:
        found = subprocess.run(
            ["git", "-C", str(path), "rev-parse", "--show-toplevel"], capture_output=True, check=False
        )
    except FileNotFoundError:
        raise InvalidRequestError(
            "git is not installed; the demo reads a repository's history with it"
        ) from None
    if found.returncode != 0:
        said = found.stderr.decode("utf-8", "replace").strip().splitlines()[-1:]
        detail = f" ({said[0]})" if said else ""
        raise InvalidRequestError(
            f"{path.absolute()} is not in a git repository: give one with --git PATH{detail}"
        )
    # A bare repository has no top folder; git reads its history all the same.
    return Path(found.stdout.decode("utf-8", "surrogateescape").rstrip("\n") or path)


def metric_schemas(sample: list[Change]) -> list[MetricSchema]:
    """Return the metrics, with thresholds that a history like the sample reaches, however small it is."""
    dimensions = [DimensionFilter(key="area"), DimensionFilter(key="kind")]
    files: Counter[tuple[int, int]] = Counter()
    lines: Counter[tuple[int, int]] = Counter()
    for change in sample:
        month = change.account_id, change.time_s // (30 * 86_400)
        files[month] += 1
        lines[month] += change.added
    many_files = power_of_ten(max(files.values()))
    many_lines = power_of_ten(max(lines.values()))

    def schema(code: str, agg_type: AggType, description: str, *thresholds: AlertThreshold) -> MetricSchema:
        return MetricSchema(
            code=code,
            agg_type=agg_type,
            filters=dimensions,
            thresholds=list(thresholds),
            period_type=PeriodType.CALENDAR,
            description=description,
        )

    return [
        schema(
            COUNT,
            AggType.COUNT,
            "files changed, once per commit",
            AlertThreshold(code=f"every_{many_files}_files", value=many_files, recurring=True),
        ),
        schema(
            LINES,
            AggType.SUM,
            "lines added",
            AlertThreshold(code=f"first_{many_lines}_lines", value=many_lines),
        ),
        schema(LARGEST, AggType.MAX, "lines touched in one file by one commit, at most"),
        schema(LAST, AggType.LATEST, "lines touched by the last change"),
        schema(DISTINCT, AggType.COUNT_UNIQUE, "distinct files touched"),
    ]


def power_of_ten(value: int) -> int:
    """Return the greatest power of ten that isn't above a value, at least 1."""
    return int(10 ** (len(str(max(value, 1))) - 1))


async def _create(client: AsyncClient, schema: MetricSchema) -> MetricSchema:
    try:
        return await client.metrics.create(schema)
    except AlreadyExistsError:
        return await client.metrics.get(schema.code)  # a data folder that was used before


# --- loading -------------------------------------------------------------------------------------------------


def _take(changes: Iterator[Change]) -> list[Change]:
    return list(itertools.islice(changes, BATCH_CHANGES))


async def _load(client: AsyncClient, changes: Iterator[Change], stop: asyncio.Event) -> Loaded:
    """Store every change as an event of each metric; several batches are under way at once."""
    loaded = Loaded()
    # Of several changes at one time the last one stored is the latest, so those go out in their order.
    in_order = asyncio.Lock()
    under_way: list[asyncio.Task[Sequence[Receipt]]] = []
    with _Progress(loaded) as progress:
        while not stop.is_set():
            batch = await asyncio.to_thread(_take, changes)
            if not batch:
                break
            _count(loaded, batch)
            under_way.append(asyncio.create_task(_store(client, batch, in_order)))
            if len(under_way) >= BATCHES_IN_FLIGHT:
                _settle(loaded, await under_way.pop(0))
                progress.update()
        for task in under_way:
            _settle(loaded, await task)
            progress.update()
    return loaded


async def _store(client: AsyncClient, batch: list[Change], in_order: asyncio.Lock) -> Sequence[Receipt]:
    accounts = [change.account_id for change in batch]
    common: dict[str, Any] = {
        "account_ids": accounts,
        "timestamps_ns": [change.time_s * 10**9 for change in batch],
        "ids": [change.event_id for change in batch],
        "properties": {"area": [change.area for change in batch], "kind": [change.kind for change in batch]},
    }
    sizes = [change.added + change.deleted for change in batch]

    async def last() -> Receipt:
        async with in_order:
            return await client.ingest_columns(LAST, values=sizes, **common)

    return await asyncio.gather(
        last(),
        client.ingest_columns(COUNT, **common),
        client.ingest_columns(LINES, values=[change.added for change in batch], **common),
        client.ingest_columns(LARGEST, values=sizes, **common),
        client.ingest_columns(DISTINCT, values=[change.path_hash for change in batch], **common),
    )


def _count(loaded: Loaded, batch: list[Change]) -> None:
    loaded.changes += len(batch)
    for change in batch:
        loaded.names.setdefault(change.account_id, change.author or change.email or "(unknown)")
        loaded.lines[change.account_id] += change.added
    times = [change.time_s for change in batch]
    loaded.first_s = min(times) if loaded.changes == len(batch) else min(loaded.first_s, *times)
    loaded.last_s = max(loaded.last_s, *times)


def _settle(loaded: Loaded, receipts: Sequence[Receipt]) -> None:
    for receipt in receipts:
        loaded.events += receipt.n_events
        loaded.stored += receipt.n_stored
        loaded.duplicates += receipt.n_duplicates
        loaded.refused += receipt.n_rejected + receipt.n_conflicts


class _Progress:
    """How many events are stored: a moving line in a terminal, now and then a line elsewhere."""

    def __init__(self, loaded: Loaded) -> None:
        self._loaded = loaded
        self._clock = RealClock()
        self._started = self._told = self._clock.monotonic_ns()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> _Progress:
        if sys.stdout.isatty():
            from rich.progress import Progress, SpinnerColumn, TextColumn

            self._bar = Progress(
                SpinnerColumn(), TextColumn("{task.description}"), console=output.console(), transient=True
            )
            self._task = self._bar.add_task(self._text(), total=None)
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        output.line(self._text())

    def update(self) -> None:
        """Show how far it is."""
        now = self._clock.monotonic_ns()
        if self._bar is not None:
            self._bar.update(self._task, description=self._text())
        elif now - self._told >= _PLAIN_SECONDS * 10**9:
            self._told = now
            output.line(self._text())

    def _text(self) -> str:
        loaded = self._loaded
        seconds = (self._clock.monotonic_ns() - self._started) / 1e9
        text = (
            f"{_many(loaded.changes, 'change')} by {_many(len(loaded.names), 'author')} "
            f"as {loaded.events:,} events (five metrics each), stored in {seconds:.1f} s"
        )
        if loaded.duplicates:
            text += f"; {loaded.duplicates:,} of them were stored before"
        if loaded.refused:
            text += f"; {loaded.refused:,} of them refused (their time is before 1970 or ahead of now)"
        return text


# --- looking -------------------------------------------------------------------------------------------------


async def _check(client: AsyncClient, loaded: Loaded, *, fresh: bool) -> int:
    """Compare every account's total with the recount; return the exit status."""
    if not fresh or loaded.refused or loaded.duplicates or len(loaded.names) > RECOUNT_ACCOUNTS_MAX:
        return 0
    rows = await client.top_accounts(LINES, ALL_TIME, limit=RECOUNT_ACCOUNTS_MAX)
    if {row.account_id: row.value.sum for row in rows} == dict(loaded.lines):
        which = (
            "the account's total equals" if len(rows) == 1 else f"all {len(rows):,} accounts' totals equal"
        )
        output.line(f"{which} a recount of the history")
        return 0
    output.line("ERROR: totals differ from a recount of the history")
    return 1


async def _show(client: AsyncClient, loaded: Loaded, schemas: list[MetricSchema]) -> int:
    """Print the tables; return the account that used most."""
    best = await client.top_accounts(LINES, ALL_TIME, limit=ACCOUNTS_SHOWN)
    output.line()
    await _show_accounts(client, loaded, best)
    # A data folder that was used before may know accounts that this history doesn't.
    account = best[0].account_id if best else next(iter(loaded.names))
    output.line()
    await _show_months(client, loaded, account)
    output.line()
    await _show_breakdown(client, loaded, account)
    output.line()
    await _show_alerts(client, schemas)
    output.line()
    return account


async def _show_accounts(client: AsyncClient, loaded: Loaded, best: list[AccountTotal]) -> None:
    rows = []
    for entry in best:
        account = entry.account_id
        files, largest, last, distinct = await asyncio.gather(
            *(client.query(account, code, ALL_TIME) for code in (COUNT, LARGEST, LAST, DISTINCT))
        )
        rows.append(
            (
                _name(loaded, account),
                str(account),
                output.number(entry.value.sum),
                output.number(files.value.count),
                output.number(distinct.value.unique),
                output.number(largest.value.max),
                output.number(last.value.last_value),
            )
        )
    output.table(
        ("author", "account", LINES, COUNT, DISTINCT, LARGEST, LAST),
        rows,
        title="Accounts by lines added, all time",
        numbers={1, 2, 3, 4, 5, 6},
    )


async def _show_months(client: AsyncClient, loaded: Loaded, account: int) -> None:
    end_ns = min((loaded.last_s + 1) * 10**9, TIME_END_NS)
    bounds = Period(max(0, loaded.first_s) * 10**9, max(end_ns, 10**9))
    series = await client.series(account, LINES, bounds, unit="month")
    used = [(period, stats) for period, stats in series if stats.count][-MONTHS_SHOWN:]
    most = max((stats.sum for _, stats in used), default=0)
    output.table(
        ("month", LINES, "files", ""),
        [
            (
                output.moment(period.start_ns)[:7],
                output.number(stats.sum),
                output.number(stats.count),
                "█" * (-(-stats.sum * _BAR_WIDTH // most) if most > 0 and stats.sum > 0 else 0),
            )
            for period, stats in used
        ],
        title=f"{_name(loaded, account)}: the last {len(used)} months with changes"
        if len(used) > 1
        else f"{_name(loaded, account)}: the month with changes",
        numbers={1, 2},
    )


async def _show_breakdown(client: AsyncClient, loaded: Loaded, account: int) -> None:
    rows = await client.breakdown(account, LINES, ALL_TIME, group_by=["area", "kind"])
    rows.sort(key=lambda row: (-row.value.sum, -row.value.count))
    shown = [
        (
            group_text(row.group["area"]),
            group_text(row.group["kind"]),
            output.number(row.value.sum),
            output.number(row.value.count),
        )
        for row in rows[:GROUPS_SHOWN]
    ]
    rest = rows[GROUPS_SHOWN:]
    if rest:
        lines, files = sum(row.value.sum for row in rest), sum(row.value.count for row in rest)
        shown.append((f"({len(rest):,} more)", "", output.number(lines), output.number(files)))
    output.table(
        ("area", "kind", LINES, "files"),
        shown,
        title=f"{_name(loaded, account)}: by top folder and file type, all time",
        numbers={2, 3},
    )


async def _show_alerts(client: AsyncClient, schemas: list[MetricSchema]) -> None:
    alerts = await all_alerts(client, None, None, ALERTS_READ_MAX)
    zones = {schema.code: schema.time_zone for schema in schemas}
    # Those of the latest periods, the greatest of a period first.
    alerts.sort(key=lambda alert: (-alert.period.start_ns, -alert.value_at_cross, alert.id))
    at_least = "at least " if len(alerts) >= ALERTS_READ_MAX else ""
    crossed = "1 threshold was crossed" if len(alerts) == 1 else f"{len(alerts):,} thresholds were crossed"
    some = "; those of the latest months" if len(alerts) > ALERTS_SHOWN else ""
    output.table(
        ALERT_COLUMNS,
        [alert_row(alert, zones) for alert in alerts[:ALERTS_SHOWN]],
        title=f"Alerts: {at_least}{crossed} in a month{some}",
        numbers={0, 4},
    )


def _many(count: int, name: str) -> str:
    return f"{count:,} {name}" if count == 1 else f"{count:,} {name}s"


def _name(loaded: Loaded, account: int) -> str:
    return loaded.names.get(account, str(account))


def _show_commands(address: str, account: int) -> None:
    program = sys.argv[0] if Path(sys.argv[0]).name == "tallymark" else "tallymark"
    if shutil.which("tallymark") is not None:
        program = "tallymark"
    output.line("Ask more, in another terminal:")
    for command in (
        "metrics list",
        f"usage {account} {LINES} --period all --unit month",
        f"usage {account} {DISTINCT} --period all",
        f"usage {account} {COUNT} --period all --by kind",
        f"top {COUNT} --period all",
        f"events {account} --limit 5 --json",
    ):
        output.line(f"  {program} --server {address} {command}")
