"""Does a store that runs for long stay as it was? `tallymark bench --soak MINUTES`.

One server with archive, recycling, checkpoints and a memory budget, a process of its own; beside it the load that
`soak_load` makes, at a fixed rate or as fast as archiving keeps up. Each minute a line is printed. In the end every
total of a sample of accounts, and each metric's total over all accounts, is compared with what was sent, before and
after the server was ended and started again; then each condition gets a verdict. Wrong numbers make the command fail,
slow ones don't: how fast a machine is isn't known here.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

import click
import msgspec

from tallymark import AsyncClient
from tallymark_node.bench import target
from tallymark_node.bench.load import percentile
from tallymark_node.bench.probe import Probe, Reading, free_port
from tallymark_node.bench.soak_load import (
    BATCH,
    DAY_NS,
    LATE_DAYS,
    SCHEMAS,
    Asker,
    Generator,
    Ledger,
    Sender,
    Wrong,
    check,
)
from tallymark_node.bench.stored import totals_on_disk
from tallymark_store.memory_budget import memory_of

PARTITIONS: Final = 4
_CALLERS: Final = 64
_ASKERS: Final = 2
_PAUSE_S: Final = 0.1  # of each asker between two queries
_TOP_S: Final = 10.0  # between two queries over all accounts
_WATCH_S: Final = 0.5
_LAG_MAX: Final = 8_000_000  # offsets: at "max", senders wait while more than that is not archived
_FIRST: Final = 3  # lines that later ones are compared with
_TIMES_WORSE: Final = 3.0
_GROWTH: Final = 1.10  # of the last third over the middle one, that is still flat
_HANDLES: Final = 8  # more than before that are still the same
_RATE_SHARE: Final = 0.98
_CHECKED: Final = 200  # accounts


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What is soaked, and for how long."""

    minutes: float
    rate: int | None = 300_000  # events a second; None: as many as archiving keeps up with
    accounts: int = 1_000_000
    memory_bytes: int = 0  # as the setting: 0 is half of the machine's
    every_s: float = 60.0  # a line
    seed: int = 1
    settings: dict[str, str] = {}  # further ones, of the server


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """A minute."""

    minute: float
    events_s: float
    receipt_p50_ms: float
    receipt_p99_ms: float
    query_p50_ms: float
    query_p99_ms: float
    top_ms: float  # the slowest query over all accounts
    cores: float  # that the server used
    reading: Reading


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """A condition, and whether it was met."""

    what: str
    wanted: str
    found: str
    is_met: bool
    is_exact: bool = False  # whether the command fails without it


_HEAD = (
    f"{'min':>5} {'events/s':>9} {'memory MiB':>10} {'mapped':>7} {'of budget':>9} {'totals':>7} {'ids M':>6} "
    f"{'on disk':>7} {'log MiB':>8} {'archive':>8} {'B/event':>7} {'files':>5} {'lag K':>6} {'handles':>7} "
    f"{'ckpt MiB':>8} {'files':>5} {'receipt p50':>11} {'p99 ms':>7} {'query p50':>9} {'p99 ms':>7} {'top ms':>7} "
    f"{'cores':>5}"
)


def _show(line: Line, budget: int) -> None:
    r = line.reading
    mib = 2**20
    click.echo(
        f"{line.minute:5.1f} {line.events_s:9,.0f} {r.anonymous_bytes / mib:10,.0f} {r.mapped_bytes / mib:7,.0f} "
        f"{r.anonymous_bytes / budget:9.0%} {r.totals_bytes / mib:7,.0f} {r.remembered_ids / 1e6:6.2f} "
        f"{r.ids_on_disk / 1e6:7.2f} {r.log_bytes / mib:8,.0f} {r.archive_bytes / mib:8,.0f} "
        f"{r.archive_bytes / max(r.archived, 1):7.2f} {r.archive_files:5} {r.archive_lag / 1e3:6,.0f} "
        f"{r.handles:7} {r.checkpoint_bytes / mib:8,.0f} {r.checkpoint_files:5} {line.receipt_p50_ms:11.1f} "
        f"{line.receipt_p99_ms:7.1f} {line.query_p50_ms:9.2f} {line.query_p99_ms:7.1f} {line.top_ms:7.0f} "
        f"{line.cores:5.2f}"
    )


class _Soak:
    """One run."""

    def __init__(self, plan: Plan, client: AsyncClient, probe: Probe, since_ns: int) -> None:
        self.lines: list[Line] = []
        self.ledger = Ledger(plan.accounts)
        self.between_ns = since_ns  # a moment while the load runs
        self.lag_max = 0
        self._plan = plan
        self._probe = probe
        self._sender = Sender(client, Generator(plan.accounts, plan.seed), self.ledger)
        self._asker = Asker(client, self.ledger, since_ns, plan.accounts)
        self._number = 0
        self._over = False
        self._flows = asyncio.Event()
        self._flows.set()

    async def run(self) -> None:
        """Send, ask and watch until the time is over and everything sent is answered.

        Raises:
            ExceptionGroup: of Wrong, or of what calls have failed with.
        """
        begun = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for _ in range(_CALLERS):
                group.create_task(self._send(begun))
            asking = [group.create_task(self._ask()) for _ in range(_ASKERS)]
            asking.append(group.create_task(self._ask_top()))
            if self._plan.rate is None:
                asking.append(group.create_task(self._throttle()))
            await self._watch(begun)
            self._over = True
            self._flows.set()
            for task in asking:
                task.cancel()

    def answered(self) -> Verdict:
        """Whether every query was."""
        failures = self._asker.failures
        told = "; ".join(f"{count} times {what}" for what, count in failures.most_common(3))
        return Verdict(what="queries answered", wanted="all", found=told or "all", is_met=not failures)

    async def _send(self, begun: float) -> None:
        rate = self._plan.rate
        while not self._over:
            await self._flows.wait()
            number, self._number = self._number, self._number + 1
            if rate is not None:
                ahead = begun + number * BATCH / rate - time.perf_counter()
                if ahead > 0:
                    await asyncio.sleep(ahead)
            await self._sender.send(number)

    async def _ask(self) -> None:
        while True:
            await self._asker.ask()
            await asyncio.sleep(_PAUSE_S)

    async def _ask_top(self) -> None:
        while True:
            await asyncio.sleep(_TOP_S)
            await self._asker.ask_top()

    async def _throttle(self) -> None:
        while True:
            await asyncio.sleep(_WATCH_S)
            lag = await asyncio.to_thread(self._probe.archive_lag)
            if lag > _LAG_MAX:
                self._flows.clear()
            else:
                self._flows.set()

    async def _watch(self, begun: float) -> None:
        """Print lines until the time is over."""
        before = await asyncio.to_thread(self._probe.read, begun)
        events = 0
        until = begun + self._plan.minutes * 60
        budget = memory_of(self._plan.memory_bytes) or 1
        click.echo(_HEAD)
        while before.at_s < until:
            await asyncio.sleep(max(min(before.at_s + self._plan.every_s, until) - time.perf_counter(), 0))
            if not self.lines:
                self.between_ns = time.time_ns()
            reading = await asyncio.to_thread(self._probe.read, time.perf_counter())
            took = reading.at_s - before.at_s
            receipts = self._sender.take_times()
            asked = self._asker.take_times()
            top = asked.pop("top", [])
            queries = sorted(taken for times in asked.values() for taken in times)
            line = Line(
                minute=(reading.at_s - begun) / 60,
                events_s=(self.ledger.events - events) / took,
                receipt_p50_ms=percentile(receipts, 0.5) * 1e3,
                receipt_p99_ms=percentile(receipts, 0.99) * 1e3,
                query_p50_ms=percentile(queries, 0.5) * 1e3,
                query_p99_ms=percentile(queries, 0.99) * 1e3,
                top_ms=max(top, default=0.0) * 1e3,
                cores=(reading.cpu_s - before.cpu_s) / took,
                reading=reading,
            )
            self.lines.append(line)
            _show(line, budget)
            events, before = self.ledger.events, reading


def _thirds(lines: Sequence[Line], of: Callable[[Line], float]) -> tuple[float, float]:
    """The largest values in the middle third and in the last one."""
    third = max(len(lines) // 3, 1)
    middle, last = lines[third : 2 * third] or lines, lines[-third:]
    return max(map(of, middle)), max(map(of, last))


def _verdicts(plan: Plan, lines: Sequence[Line]) -> Iterator[Verdict]:
    """What the lines say. Several are needed."""
    budget = memory_of(plan.memory_bytes) or 1
    most = max(line.reading.anonymous_bytes for line in lines)
    yield Verdict(
        what="memory within the budget",
        wanted=f"<= {budget / 2**20:,.0f} MiB",
        found=f"{most / 2**20:,.0f} MiB",
        is_met=most <= budget,
    )
    flat: tuple[tuple[str, Callable[[Line], float], float], ...] = (
        ("memory flat, MiB", lambda line: line.reading.anonymous_bytes / 2**20, 0),
        ("log flat, MiB", lambda line: line.reading.log_bytes / 2**20, PARTITIONS * 64),
        ("archive lag flat, K offsets", lambda line: line.reading.archive_lag / 1e3, 1_000),
        ("checkpoints' files flat", lambda line: line.reading.checkpoint_files, _HANDLES),
        ("handles flat", lambda line: line.reading.handles, _HANDLES),
    )
    for what, of, slack in flat:
        middle, last = _thirds(lines, of)
        bound = max(middle * _GROWTH, middle + slack)
        yield Verdict(
            what=what,
            wanted=f"<= {bound:,.0f} in the last third ({middle:,.0f} in the middle one)",
            found=f"{last:,.0f}",
            is_met=last <= bound,
        )
    slow: tuple[tuple[str, Callable[[Line], float]], ...] = (
        ("p99 of receipts, ms", lambda line: line.receipt_p99_ms),
        ("p99 of queries, ms", lambda line: line.query_p99_ms),
    )
    for what, of in slow:
        first = sorted(map(of, lines[:_FIRST]))[len(lines[:_FIRST]) // 2]
        worst = max(map(of, lines))
        yield Verdict(
            what=what,
            wanted=f"<= {_TIMES_WORSE * first:,.1f} in every minute ({first:,.1f} in the first ones)",
            found=f"{worst:,.1f}",
            is_met=worst <= _TIMES_WORSE * first,
        )
    seconds = plan.minutes * 60
    mean = sum(line.events_s for line in lines) / len(lines)
    wanted = 500_000 if plan.rate is None else plan.rate
    yield Verdict(
        what="events a second, sustained",
        wanted=f">= {wanted:,.0f} for {seconds / 60:g} min",
        found=f"{mean:,.0f} (least in a minute: {min(line.events_s for line in lines):,.0f})",
        is_met=mean >= wanted * (1 if plan.rate is None else _RATE_SHARE),
    )


def _compare_stored(data_dir: Path, ledger: Ledger) -> Verdict:
    """Each metric's total over all accounts, as it is on the disk of the stopped server."""
    totals = totals_on_disk(data_dir, PARTITIONS)
    problems = []
    for code, count in ledger.counts.items():
        found = totals.get(code)
        told = (0, 0) if found is None else (found.count, found.sum)
        if told[0] != count:
            problems.append(f"{code}: {told[0]} events, but {count} were stored")
        if code in ledger.sums and told[1] != ledger.sums[code]:
            problems.append(f"{code}: a sum of {told[1]}, but {ledger.sums[code]} was stored")
    return Verdict(
        what="each metric's total over all accounts",
        wanted=f"what was sent: {ledger.events:,} events",
        found="; ".join(problems) or "the same",
        is_met=not problems,
        is_exact=True,
    )


async def _run(soak: _Soak) -> Verdict | None:
    """Run it; the verdict where an answer was wrong."""
    problem = None
    try:
        await soak.run()
    except* Wrong as wrong:
        problem = "; ".join(str(error) for error in wrong.exceptions[:3])
    if problem is None:
        return None
    return Verdict(
        what="answers while the load ran", wanted="right", found=problem, is_met=False, is_exact=True
    )


async def _checked(address: str, soak: _Soak, since_ns: int, when: str) -> Verdict:
    async with AsyncClient([address]) as client:
        try:
            compared = await check(client, soak.ledger, since_ns, _CHECKED, soak.between_ns)
            found, is_met = f"the same ({compared:,} numbers)", True
        except* Wrong as wrong:
            found, is_met = "; ".join(str(error) for error in wrong.exceptions[:3]), False
    what = f"totals and events of a sample of accounts, {when}"
    return Verdict(what=what, wanted="what was sent", found=found, is_met=is_met, is_exact=True)


async def measure(plan: Plan) -> list[Verdict]:
    """Run it, print lines, and return the verdicts.

    Raises:
        RuntimeError: the server doesn't start, or can't be read back.
        ExceptionGroup: of what calls have failed with.
    """
    with tempfile.TemporaryDirectory(prefix="tallymark-bench-") as folder, contextlib.ExitStack() as stack:
        data_dir = Path(folder)
        telemetry = f"127.0.0.1:{free_port()}"
        settings: dict[str, object] = {
            "archive": "on",
            "memory_bytes": plan.memory_bytes,
            "partition_count": PARTITIONS,
            "telemetry": telemetry,
        } | plan.settings
        server = target.start(data_dir, **settings)

        def stop() -> None:
            server.stop()  # whichever it is by then

        stack.callback(stop)
        since_ns = time.time_ns() // DAY_NS * DAY_NS - (LATE_DAYS + 1) * DAY_NS
        verdicts: list[Verdict] = []
        async with AsyncClient([server.address]) as client:
            for schema in SCHEMAS:
                await client.metrics.create(schema)
            soak = _Soak(plan, client, Probe(server.process.pid, telemetry, data_dir), since_ns)
            problem = await _run(soak)
            if problem is not None:
                return [problem]
        verdicts += _verdicts(plan, soak.lines)
        verdicts.append(soak.answered())
        verdicts.append(await _checked(server.address, soak, since_ns, "at the end"))
        server.stop(kill=True)
        begun = time.perf_counter()
        server = target.start(data_dir, **settings)
        took = time.perf_counter() - begun
        verdicts.append(
            Verdict(what="start after kill -9", wanted="<= 10 s", found=f"{took:.1f} s", is_met=took <= 10)
        )
        verdicts.append(await _checked(server.address, soak, since_ns, "after kill -9 and a start"))
        server.stop()
        verdicts.append(_compare_stored(data_dir, soak.ledger))
    return verdicts


def show(verdicts: Sequence[Verdict]) -> None:
    """Print a line for each condition."""
    click.echo()
    width = max(len(verdict.what) for verdict in verdicts)
    for verdict in verdicts:
        met = "ok   " if verdict.is_met else "WRONG" if verdict.is_exact else "NOT  "
        click.echo(f"{met}  {verdict.what.ljust(width)}  {verdict.found}; wanted {verdict.wanted}")


def is_exact(verdicts: Sequence[Verdict]) -> bool:
    """Whether every number was right, and all of them were looked at."""
    exact = [verdict for verdict in verdicts if verdict.is_exact]
    return bool(exact) and all(verdict.is_met for verdict in exact)
