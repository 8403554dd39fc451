"""A store with a large archive: how soon it answers, what an event takes on disk, how long it takes to start.

`tallymark bench --archive EVENTS` fills an archive through the SDK, as fast as the engine allows and archiving keeps up:
usual events (value 1, no properties, no ids) of many accounts, one of which has a hundredth of all, spread over three
months: their times go on with the load, as those of a store that has run so long. Then the archive is let come to rest,
and asked. In the end, what was sent is compared with what there is.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import itertools
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Final

import click
import msgspec
import numpy as np

from tallymark import AsyncClient, MetricSchema, Period, TallymarkError
from tallymark_node.bench import target
from tallymark_node.bench.load import closed_loop
from tallymark_node.bench.probe import Probe, free_port, tree_bytes
from tallymark_node.bench.scenarios import Figure

PARTITIONS: Final = 4
DAYS: Final = 92
_BATCH: Final = 10_000
_LARGEST: Final = _BATCH // 100  # events of a batch that are the largest account's
_CALLERS: Final = 16
_POOL: Final = 256
_LAG_MAX: Final = 8_000_000  # offsets: senders wait while more than that is not archived
_WATCH_S: Final = 0.5
_SAID_S: Final = 30.0
_QUIET_S: Final = 5.0  # without a merge, nothing is to be merged
_BYTES_MAX: Final = 20  # of disk that an event may take, log and checkpoints and all
_SPARE_BYTES: Final = 4 * 2**30
_DAY_NS: Final = 86_400 * 10**9
_METRIC: Final = "api_calls"


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What is filled and asked."""

    events: int
    accounts: int = 100_000
    seconds: float = 10.0  # of each kind of question
    settings: dict[str, str] = {}  # further ones, of the server


class _Fill:
    """The load: batch after batch, and how many events the largest account has."""

    def __init__(self, plan: Plan, client: AsyncClient, probe: Probe, since_ns: int, until_ns: int) -> None:
        self.batches = -(-plan.events // _BATCH)
        self._client = client
        self._probe = probe
        self._since_ns = since_ns
        self._step_ns = (until_ns - since_ns) // self.batches
        rng = np.random.default_rng(1)
        self._pool = [rng.integers(1, plan.accounts, _BATCH, dtype=np.uint64) for _ in range(_POOL)]
        for accounts in self._pool:
            accounts[:_LARGEST] = 0
        self._numbers = iter(range(self.batches))
        self._sent = 0
        self._flows = asyncio.Event()
        self._flows.set()

    @property
    def events(self) -> int:
        """All of them."""
        return self.batches * _BATCH

    @property
    def largest(self) -> int:
        """Those of the largest account."""
        return self.batches * _LARGEST

    async def run(self) -> None:
        """Send all."""
        async with asyncio.TaskGroup() as group:
            throttle = group.create_task(self._throttle())
            senders = [group.create_task(self._send()) for _ in range(_CALLERS)]
            await asyncio.gather(*senders)
            throttle.cancel()

    async def _send(self) -> None:
        for number in self._numbers:
            await self._flows.wait()
            receipt = await self._client.ingest_columns(
                _METRIC,
                account_ids=self._pool[number % _POOL],
                timestamps_ns=self._since_ns + number * self._step_ns,
                timeout=600.0,
            )
            if receipt.n_stored != _BATCH:
                raise RuntimeError(f"of batch {number} {receipt.n_stored} events were stored: {receipt}")
            self._sent += _BATCH

    async def _throttle(self) -> None:
        begun = said = time.perf_counter()
        while True:
            await asyncio.sleep(_WATCH_S)
            lag = await asyncio.to_thread(self._probe.archive_lag)
            if lag > _LAG_MAX:
                self._flows.clear()
            else:
                self._flows.set()
            now = time.perf_counter()
            if now - said >= _SAID_S:
                said = now
                rate = self._sent / (now - begun)
                click.echo(f"  {self._sent:,} events, {rate:,.0f} a second, {lag:,} not archived", err=True)


async def _rest(probe: Probe) -> None:
    """Wait until all is archived, and nothing was merged for a while."""
    merges, since = -1, time.perf_counter()
    while True:
        reading = await asyncio.to_thread(probe.read, time.perf_counter())
        # What isn't an event, such as a metric's schema, isn't archived before the next event is due.
        if reading.merges != merges or reading.archive_lag > 1_000:
            merges, since = reading.merges, reading.at_s
        elif reading.at_s - since >= _QUIET_S:
            return
        await asyncio.sleep(_WATCH_S)


def _month(since_ns: int) -> Period:
    """The first calendar month that begins after `since_ns`."""
    at = dt.datetime.fromtimestamp(since_ns / 1e9, dt.UTC)
    first = (at.replace(day=1) + dt.timedelta(days=32)).replace(
        day=1, hour=0, minute=0, second=0, microsecond=0
    )
    after = (first + dt.timedelta(days=32)).replace(day=1)
    return Period(int(first.timestamp()) * 10**9, int(after.timestamp()) * 10**9)


async def _asked(client: AsyncClient, plan: Plan, since_ns: int, until_ns: int) -> AsyncIterator[Figure]:
    """All questions, one after the other."""
    accounts = itertools.count(1)
    month = _month(since_ns)
    # Begins and ends anywhere within a day.
    begin = since_ns + 20 * _DAY_NS + 7 * 3_600 * 10**9 + 1_234_567_891
    ragged = Period(begin, begin + 30 * _DAY_NS)

    async def of_largest(_: int) -> int:
        return (await client.query(0, _METRIC, month)).value.count

    async def of_one(_: int) -> int:
        return (await client.query(next(accounts) % plan.accounts, _METRIC, ragged)).value.count

    async def of_largest_ragged(_: int) -> int:
        return (await client.query(0, _METRIC, ragged)).value.count

    async def first_page(_: int) -> int:
        account = next(accounts) % plan.accounts
        async for _event in client.list_events(account, since_ns, until_ns, page_size=100):
            return 1
        return 0

    async def first_page_ragged(_: int) -> int:
        account = next(accounts) % plan.accounts
        async for _event in client.list_events(account, ragged.start_ns, ragged.end_ns, page_size=100):
            return 1
        return 0

    questions: tuple[tuple[str, str, Callable[[int], object]], ...] = (
        ("month total, the largest account", "<= 5 ms", of_largest),
        ("30 days from anywhere to anywhere, one account", "<= 50 ms", of_one),
        ("30 days from anywhere to anywhere, the largest account", "", of_largest_ragged),
        ("list_events, first page, all of the time", "<= 50 ms", first_page),
        ("list_events, first page, 30 days", "<= 50 ms", first_page_ragged),
    )
    for name, wanted, call in questions:
        load = await closed_loop(call, callers=1, seconds=plan.seconds)  # type: ignore[arg-type]
        yield Figure(
            name=name,
            figure=f"{load.p50_ms:.2f} ms",
            wanted=wanted,
            p50=f"{load.p50_ms:.2f} ms",
            p99=f"{load.p99_ms:.2f} ms",
            note=f"{load.calls} calls",
        )


def check_room(events: int, folder: Path) -> None:
    """Raise `click.UsageError` where the disk hasn't the room for so many events."""
    free = shutil.disk_usage(folder).free
    wanted = events * _BYTES_MAX + _SPARE_BYTES
    if free < wanted:
        raise click.UsageError(
            f"{events:,} events need up to {wanted / 2**30:.0f} GiB below {folder}, where {free / 2**30:.0f} GiB are "
            f"free; TMPDIR names another folder"
        )


async def measure(plan: Plan) -> AsyncIterator[Figure]:
    """Fill, ask, start again. Raises RuntimeError where a number isn't right, or the server doesn't start."""
    with tempfile.TemporaryDirectory(prefix="tallymark-bench-") as folder:
        data_dir = Path(folder)
        telemetry = f"127.0.0.1:{free_port()}"
        settings: dict[str, object] = {
            "archive": "on",
            "archive_interval_seconds": 5,
            "memory_bytes": 0,
            "partition_count": PARTITIONS,
            "telemetry": telemetry,
        } | plan.settings
        server = target.start(data_dir, **settings)
        try:
            until_ns = time.time_ns()
            since_ns = until_ns - DAYS * _DAY_NS
            whole = Period(since_ns, until_ns + 1)
            probe = Probe(server.process.pid, telemetry, data_dir)
            async with AsyncClient([server.address]) as client:
                await client.metrics.create(MetricSchema(code=_METRIC))
                fill = _Fill(plan, client, probe, since_ns, until_ns)
                begun = time.perf_counter()
                await fill.run()
                took = time.perf_counter() - begun
                await _rest(probe)
                rested = time.perf_counter() - begun
                reading = await asyncio.to_thread(probe.read, time.perf_counter())
                yield Figure(
                    name=f"filled: {fill.events:,} events over {DAYS} days, {plan.accounts:,} accounts",
                    figure=f"{fill.events / took / 1e3:,.0f} K events/s",
                    memory=f"{server.peak_memory_bytes() / 2**20:.0f} MiB",
                    note=f"{took:.0f} s, archive at rest after {rested:.0f} s, {reading.cpu_s:.0f} s of CPU",
                )
                yield Figure(
                    name="an event on disk",
                    figure=f"{reading.archive_bytes / fill.events:.2f} bytes",
                    wanted="<= 16 bytes",
                    note=f"{reading.archive_files} files; with log and checkpoints {tree_bytes(data_dir) / fill.events:.2f}",
                )
                async for figure in _asked(client, plan, since_ns, until_ns):
                    yield figure
                await _check(client, fill, whole, "before the end")
            server.stop(kill=True)
            server = target.start(data_dir, **settings)
            yield Figure(name="start after kill -9", figure=f"{server.start_s:.2f} s", wanted="<= 10 s")
            async with AsyncClient([server.address]) as client:
                await _check(client, fill, whole, "after a start")
        finally:
            server.stop()


async def _check(client: AsyncClient, fill: _Fill, whole: Period, when: str) -> None:
    """The largest account's total, by days and by raw events, is what was sent."""
    try:
        found = (await client.query(0, _METRIC, whole, timeout=600.0)).value.count
    except TallymarkError as error:
        raise RuntimeError(f"the largest account's total can't be had {when}: {error}") from error
    if found != fill.largest:
        raise RuntimeError(f"{when} the largest account has {found} events, but {fill.largest} were stored")
