"""The command: which scenarios, how long, and the table."""

from __future__ import annotations

import asyncio
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

import click
import msgspec

from tallymark_node.bench import kernels, target
from tallymark_node.bench.scenarios import SCENARIOS, Figure, Options
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


def _machine() -> str:
    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{model}, {os.cpu_count()} cores, {memory:.0f} GiB, Python {platform.python_version()}"


def _show(figures: Sequence[Figure]) -> None:
    rows = [_TITLES, *(tuple(getattr(figure, name) for name in _COLUMNS) for figure in figures)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_TITLES))]
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


@click.command("bench")
@click.option(
    "--only", multiple=True, type=click.Choice([*SCENARIOS, "kernels"]), help="Just these; repeatable."
)
@click.option("--seconds", type=float, default=None, help="Length of each load (default 30).")
@click.option("--quick", is_flag=True, help="Small sizes and short loads: to see that it runs, not to quote.")
@click.option("--json", "as_json", is_flag=True, help="Rows as JSON.")
def main(only: tuple[str, ...], seconds: float | None, *, quick: bool, as_json: bool) -> None:
    """Measure this machine and print the performance table."""
    options = _QUICK if quick else Options()
    if seconds is not None:
        options = msgspec.structs.replace(options, seconds=seconds)
    sync_us = target.sync_time_us()
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        figures = runner.run(_measure(only or [*SCENARIOS, "kernels"], options))
    if as_json:
        click.echo(msgspec.json.encode(figures).decode())
        return
    click.echo(_machine())
    click.echo(
        f"durable 4 KiB write beside it: {sync_us:.0f} us (median); one replica, every write synced before its "
        f"receipt; client and server share the machine; {options.seconds:g} s a load"
    )
    click.echo()
    _show(figures)
