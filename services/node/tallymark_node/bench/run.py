"""The command: which scenarios, how long, and the table."""

from __future__ import annotations

import asyncio
import os
import platform
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import click
import msgspec

from tallymark_node.bench import alerts, archived, failover, kernels, soak, target
from tallymark_node.bench.cluster import LEASE_TTL_S
from tallymark_node.bench.scenarios import COMPARED, SCENARIOS, Figure, Options
from tallymark_node.config import Settings
from tallymark_runtime.loops import new_event_loop

_QUICK = Options(
    seconds=3.0,
    ids=200_000,
    events=2_000_000,
    account_events=200_000,
    replay_events=500_000,
    accounts=100_000,
)
_COLUMNS = ("name", "figure", "wanted", "batch", "in_flight", "p50", "p99", "memory", "note")
_TITLES = ("what", "measured", "wanted", "batch", "in flight", "p50", "p99", "peak memory", "")
_COMPARED_TITLES = (
    *("what", "batch", "in flight", "cluster", "wanted", "on dev", "p50", "on dev", "p99", "on dev"),
    "peak memory",
)
_ALERTS_TITLES = ("what", "measured", "wanted", "p50", "p99", "")
_ARCHIVE_TITLES = ("what", "measured", "wanted", "p99", "peak memory", "")
_FAILOVER_TITLES = ("what", "longest", "wanted", "median", "")


class _Comparison(msgspec.Struct, frozen=True):
    """The same of a cluster and of `dev`."""

    cluster: Figure
    dev: Figure

    def row(self) -> tuple[str, ...]:
        one, other = self.cluster, self.dev
        return (
            *(one.name, one.batch, one.in_flight, one.figure, one.wanted, other.figure),
            *(one.p50, other.p50, one.p99, other.p99, one.memory),
        )


def _machine() -> str:
    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{model}, {os.cpu_count()} cores, {memory:.0f} GiB, Python {platform.python_version()}"


def _show(titles: tuple[str, ...], body: Sequence[tuple[str, ...]]) -> None:
    rows = [titles, *body]
    widths = [max(len(row[i]) for row in rows) for i in range(len(titles))]
    for number, row in enumerate(rows):
        sys.stdout.write(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )
        sys.stdout.write("\n")
        if number == 0:
            sys.stdout.write("  ".join("-" * width for width in widths) + "\n")
    sys.stdout.flush()


async def _measure(names: Sequence[str], options: Options) -> list[Figure]:
    figures: list[Figure] = []
    for name in names:
        if name == "kernels":
            figures += kernels.measure(options.accounts)
            continue
        async for figure in SCENARIOS[name](options):
            click.echo(f"  {figure.name}: {figure.figure} {figure.p50} {figure.p99}", err=True)
            figures.append(figure)
    return figures


async def _alerts(options: Options) -> list[Figure]:
    figures = []
    async for figure in alerts.measure(options):
        click.echo(f"  {figure.name}: {figure.figure} {figure.p50} {figure.p99} {figure.note}", err=True)
        figures.append(figure)
    return figures


async def _compare(names: Sequence[str], options: Options) -> list[_Comparison]:
    """Measure a cluster and `dev`, one right after the other."""
    compared = []
    for name in names:
        scenario, wanted = COMPARED[name]
        found = []
        for cluster in (True, False):
            found.append([f async for f in scenario(msgspec.structs.replace(options, cluster=cluster))])
            for figure in found[-1]:
                where = "cluster" if cluster else "dev"
                click.echo(f"  {figure.name} ({where}): {figure.figure} {figure.p50} {figure.p99}", err=True)
        for one, other, text in zip(*found, wanted, strict=True):
            compared.append(_Comparison(msgspec.structs.replace(one, wanted=text), other))
    return compared


def _end_all_on_sigterm() -> None:
    """Whoever ends a long measurement means the server and its data, too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def _rate_of(text: str) -> int | None:
    if text == "max":
        return None
    try:
        rate = int(text.replace("_", ""))
    except ValueError:
        rate = 0
    if rate <= 0:
        raise click.BadParameter('it is a number of events a second, or "max"', param_hint="--rate")
    return rate


def _settings_of(pairs: Sequence[str]) -> dict[str, str]:
    settings = dict(pair.partition("=")[::2] for pair in pairs)
    unknown = sorted(settings.keys() - set(Settings.__struct_fields__))
    if unknown:
        raise click.BadParameter(f"there is no setting {unknown[0]!r}", param_hint="--set")
    return settings


def _archive(plan: archived.Plan, *, as_json: bool) -> None:
    async def measured() -> list[Figure]:
        figures = []
        async for figure in archived.measure(plan):
            click.echo(f"  {figure.name}: {figure.figure} {figure.note}", err=True)
            figures.append(figure)
        return figures

    _end_all_on_sigterm()
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        figures = runner.run(measured())
    if as_json:
        click.echo(msgspec.json.encode(figures).decode())
        return
    click.echo(_machine())
    click.echo()
    _show(_ARCHIVE_TITLES, [(f.name, f.figure, f.wanted, f.p99, f.memory, f.note) for f in figures])


def _soak(plan: soak.Plan, *, as_json: bool) -> None:
    click.echo(_machine(), err=as_json)
    _end_all_on_sigterm()
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        verdicts = runner.run(soak.measure(plan))
    if as_json:
        click.echo(msgspec.json.encode(verdicts).decode())
    else:
        soak.show(verdicts)
    if not soak.is_exact(verdicts):
        sys.exit(1)


@click.command("bench")
@click.option(
    "--only",
    multiple=True,
    type=click.Choice([*dict.fromkeys((*SCENARIOS, "kernels", *COMPARED))]),
    help="Just these; repeatable.",
)
@click.option("--cluster", is_flag=True, help="Measure a cluster on this machine, and `dev` beside it.")
@click.option(
    "--failover",
    "trials",
    type=click.IntRange(1, 1_000),
    is_flag=False,
    flag_value=20,
    help="End leaders of a cluster so many times (default 20) and measure until writes succeed again.",
)
@click.option(
    "--alerts",
    "is_alerts",
    is_flag=True,
    help="How soon alerts are there, and how many an instance hands out.",
)
@click.option(
    "--soak",
    "minutes",
    type=click.FloatRange(min=0.05),
    metavar="MINUTES",
    help="Run for long with archive, recycling and a memory budget: does everything stay as it was?",
)
@click.option(
    "--archive",
    "archive_events",
    type=click.IntRange(10_000),
    metavar="EVENTS",
    help="Fill an archive with so many events, over three months, and ask it.",
)
@click.option(
    "--rate",
    default="300000",
    metavar="N|max",
    help='Of --soak: events a second, or "max": as fast as archiving keeps up.  [default: 300000]',
)
@click.option(
    "--accounts", type=click.IntRange(1_000), default=1_000_000, help="Of --soak.  [default: 1000000]"
)
@click.option(
    "--memory-bytes", type=int, default=0, help="Of --soak: the setting.  [default: half of the machine's]"
)
@click.option("--every", type=float, default=60.0, help="Of --soak: seconds between two lines.")
@click.option(
    "--set", "settings", multiple=True, metavar="NAME=VALUE", help="Of --soak and --archive: a setting."
)
@click.option("--seconds", type=float, default=None, help="Length of each load (default 30).")
@click.option("--quick", is_flag=True, help="Small sizes and short loads: to see that it runs, not to quote.")
@click.option("--json", "as_json", is_flag=True, help="Rows as JSON.")
def main(
    only: tuple[str, ...],
    trials: int | None,
    seconds: float | None,
    *,
    cluster: bool,
    is_alerts: bool,
    minutes: float | None,
    rate: str,
    archive_events: int | None,
    accounts: int | None,
    memory_bytes: int,
    every: float,
    settings: tuple[str, ...],
    quick: bool,
    as_json: bool,
) -> None:
    """Measure this machine and print the performance table."""
    if minutes is not None:
        plan = soak.Plan(
            minutes=minutes,
            rate=_rate_of(rate),
            accounts=accounts or 1_000_000,
            memory_bytes=memory_bytes,
            every_s=every,
            settings=_settings_of(settings),
        )
        _soak(plan, as_json=as_json)
        return
    if archive_events is not None:
        archived.check_room(archive_events, Path(tempfile.gettempdir()))
        filled = archived.Plan(
            events=archive_events,
            accounts=accounts or 100_000,
            seconds=seconds or 10.0,
            settings=_settings_of(settings),
        )
        _archive(filled, as_json=as_json)
        return
    options = _QUICK if quick else Options()
    if seconds is not None:
        options = msgspec.structs.replace(options, seconds=seconds)
    offered = COMPARED if cluster else (*SCENARIOS, "kernels")
    strange = [name for name in only if name not in offered]
    if strange:
        raise click.UsageError(f"{strange[0]} is not measured {'with' if cluster else 'without'} --cluster")
    sync_us = target.sync_time_us()
    figures: Sequence[msgspec.Struct]
    titles: tuple[str, ...]
    rows: list[tuple[str, ...]]
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        if trials is not None:
            figures = found = runner.run(failover.measure(trials))
            titles = _FAILOVER_TITLES
            rows = [(f.name, f.figure, f.wanted, f.p50, f.note) for f in found]
            about = f"{trials} trials each way; three copies of everything, a lease of {LEASE_TTL_S:g} s"
        elif is_alerts:
            figures = found = runner.run(_alerts(options))
            titles = _ALERTS_TITLES
            rows = [(f.name, f.figure, f.wanted, f.p50, f.p99, f.note) for f in found]
            about = "a cluster with one instance of the alerts role, a majority synced before every receipt"
        elif cluster:
            figures = pairs = runner.run(_compare(only or [*COMPARED], options))
            titles = _COMPARED_TITLES
            rows = [pair.row() for pair in pairs]
            about = (
                "cluster: etcd, three stores with three copies of everything, a gateway, a query node; a majority "
                "synced before every receipt"
            )
        else:
            figures = found = runner.run(_measure(only or [*SCENARIOS, "kernels"], options))
            titles = _TITLES
            rows = [tuple(getattr(figure, name) for name in _COLUMNS) for figure in found]
            about = "one replica, every write synced before its receipt"
    if as_json:
        click.echo(msgspec.json.encode(figures).decode())
        return
    click.echo(_machine())
    length = "" if trials is not None else f"; {options.seconds:g} s a load"
    click.echo(
        f"durable 4 KiB write beside it: {sync_us:.0f} us (median); {about}; client and server share the "
        f"machine{length}"
    )
    click.echo()
    _show(titles, rows)
