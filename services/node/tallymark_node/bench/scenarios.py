"""What is measured, each against a fresh server, or a fresh cluster."""

from __future__ import annotations

import contextlib
import datetime as dt
import itertools
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from tallymark import (
    AggType,
    AlertThreshold,
    AsyncClient,
    DimensionFilter,
    Event,
    MetricSchema,
    Period,
    current_month,
)
from tallymark_node.bench import cluster as clusters
from tallymark_node.bench import target
from tallymark_node.bench.load import Load, closed_loop

Ints = npt.NDArray[np.uint64]

BATCH = 1_000
PROVIDERS = ("aws", "gcp", "azure")
REGIONS = ("eu", "us", "ap", "sa")
_DAY_NS = 86_400 * 10**9


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """How much is measured. The defaults are the table's; smaller ones are for trying things out."""

    seconds: float = 30.0
    ids: int = 20_000_000  # remembered before ingest with ids is measured
    events: int = 100_000_000  # in the log before raw reads are measured
    account_events: int = 10_000_000  # of the one account whose month is asked for
    replay_events: int = 10_000_000  # beyond the checkpoint at a restart
    accounts: int = 1_000_000
    cluster: bool = False  # measure a cluster with three copies of everything instead of `tallymark dev`

    def fresh(self) -> contextlib.AbstractContextManager[target.Target | clusters.ClusterTarget]:
        """Start what is measured, with an empty disk."""
        return clusters.fresh() if self.cluster else target.fresh()


class Figure(msgspec.Struct, kw_only=True):
    """One row of the table."""

    name: str
    figure: str
    wanted: str = ""
    batch: str = ""
    in_flight: str = ""
    p50: str = ""
    p99: str = ""
    memory: str = ""
    note: str = ""


def _rate(value: float, unit: str) -> str:
    if value >= 1e6:
        return f"{value / 1e6:.2f} M {unit}/s"
    return f"{value / 1e3:.1f} K {unit}/s"


def _row(name: str, load: Load, wanted: str, batch: int, callers: int, memory: int, *, per: str) -> Figure:
    rate = load.events_per_second if per == "events" else load.calls_per_second
    return Figure(
        name=name,
        figure=_rate(rate, per),
        wanted=wanted,
        batch=str(batch),
        in_flight=str(callers),
        p50=f"{load.p50_ms:.2f} ms",
        p99=f"{load.p99_ms:.2f} ms",
        memory=f"{memory / 2**20:.0f} MiB",
    )


def _pool(accounts: int, count: int = 64, batch: int = BATCH) -> list[Ints]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, accounts, batch, dtype=np.uint64) for _ in range(count)]


async def columns(options: Options) -> AsyncIterator[Figure]:
    """Columns of the usual event: value 1, no time of its own."""
    for callers, wanted in ((16, ">= 1.0 M"), (64, ">= 1.5 M")):
        with options.fresh() as server:
            async with AsyncClient([server.address]) as client:
                await client.metrics.create(MetricSchema(code="api_calls"))
                pool = _pool(10_000)

                async def call(number: int, client: AsyncClient = client, pool: list[Ints] = pool) -> int:
                    receipt = await client.ingest_columns("api_calls", account_ids=pool[number % 64])
                    return receipt.n_stored

                load = await closed_loop(call, callers=callers, seconds=options.seconds)
                memory = server.peak_memory_bytes()
        yield _row("columns, 10,000 accounts", load, wanted, BATCH, callers, memory, per="events")


async def columns_wide(options: Options) -> AsyncIterator[Figure]:
    """Columns with many accounts at random, two dimensions and a threshold."""
    schema = MetricSchema(
        code="compute",
        agg_type=AggType.SUM,
        filters=[
            DimensionFilter(key="provider", values=list(PROVIDERS)),
            DimensionFilter(key="region", values=list(REGIONS)),
        ],
        thresholds=[AlertThreshold(code="limit", value=100_000)],
    )
    with options.fresh() as server:
        async with AsyncClient([server.address]) as client:
            await client.metrics.create(schema)
            rng = np.random.default_rng(2)
            pool = _pool(options.accounts, 1024)
            values = [rng.integers(1, 100, BATCH, dtype=np.int64) for _ in range(64)]
            properties = [
                {
                    "provider": [PROVIDERS[i] for i in rng.integers(0, 3, BATCH)],
                    "region": [REGIONS[i] for i in rng.integers(0, 4, BATCH)],
                }
                for _ in range(64)
            ]

            async def call(number: int) -> int:
                receipt = await client.ingest_columns(
                    "compute",
                    account_ids=pool[number % 1024],
                    values=values[number % 64],
                    properties=properties[number % 64],
                )
                return receipt.n_stored

            load = await closed_loop(call, callers=64, seconds=options.seconds)
            memory = server.peak_memory_bytes()
    name = f"columns, {options.accounts:,} accounts, two dimensions, a threshold"
    yield _row(name, load, ">= 500 K", BATCH, 64, memory, per="events")


async def event_lists(options: Options) -> AsyncIterator[Figure]:
    """Lists of `Event`, built and encoded in the measured time."""
    with options.fresh() as server:
        async with AsyncClient([server.address]) as client:
            await client.metrics.create(MetricSchema(code="api_calls", agg_type=AggType.SUM))
            accounts = [array.tolist() for array in _pool(10_000)]

            async def call(number: int) -> int:
                events = [
                    Event(account_id=account, metric_code="api_calls", value=7)
                    for account in accounts[number % 64]
                ]
                return (await client.ingest(events)).n_stored

            load = await closed_loop(call, callers=16, seconds=options.seconds)
            memory = server.peak_memory_bytes()
    yield _row("lists of Event", load, ">= 500 K", BATCH, 16, memory, per="events")


async def event_ids(options: Options) -> AsyncIterator[Figure]:
    """Lists of `Event` with an id each, beside many remembered ids."""
    with options.fresh() as server:
        async with AsyncClient([server.address]) as client:
            await client.metrics.create(MetricSchema(code="jobs"))
            accounts = [array.tolist() for array in _pool(10_000)]
            loaded = itertools.count()

            async def preload(_: int) -> int:
                first = next(loaded) * 10_000
                if first >= options.ids:
                    return 0
                ids = list(range(first, first + 10_000))
                receipt = await client.ingest_columns("jobs", account_ids=list(range(10_000)), ids=ids)
                return receipt.n_stored

            while (await closed_loop(preload, callers=8, seconds=1.0, warm_seconds=0.0)).events:
                pass

            async def call(number: int) -> int:
                events = [
                    Event(account_id=account, metric_code="jobs", id=f"{number}-{i}")
                    for i, account in enumerate(accounts[number % 64])
                ]
                return (await client.ingest(events)).n_stored

            load = await closed_loop(call, callers=16, seconds=options.seconds)
            memory = server.peak_memory_bytes()
    name = f"lists of Event with ids, {options.ids / 1e6:g} M remembered"
    yield _row(name, load, ">= 250 K", BATCH, 16, memory, per="events")


async def single_events(options: Options) -> AsyncIterator[Figure]:
    """One event a call."""
    wanted = {1: "p50 <= 0.6 ms, p99 <= 2 ms", 64: ">= 15 K calls"}
    for callers in (1, 64):
        with options.fresh() as server:
            async with AsyncClient([server.address]) as client:
                await client.metrics.create(MetricSchema(code="api_calls"))

                async def call(number: int, client: AsyncClient = client) -> int:
                    event = Event(account_id=number % 10_000, metric_code="api_calls")
                    return (await client.ingest([event])).n_stored

                load = await closed_loop(call, callers=callers, seconds=options.seconds)
                memory = server.peak_memory_bytes()
        yield _row("one event a call", load, wanted[callers], 1, callers, memory, per="calls")


async def queries(options: Options) -> AsyncIterator[Figure]:
    """Totals: the running one, and a filtered month of an account with many events."""
    with options.fresh() as server:
        async with AsyncClient([server.address]) as client:
            dimension = DimensionFilter(key="provider", values=list(PROVIDERS))
            await client.metrics.create(
                MetricSchema(code="compute", agg_type=AggType.SUM, filters=[dimension])
            )
            now = time.time_ns()
            month = dt.datetime.fromtimestamp(now / 1e9, dt.UTC).replace(
                day=1, hour=0, minute=0, second=0, microsecond=0
            )
            since = int(month.timestamp()) * 10**9
            rng = np.random.default_rng(3)
            left = options.account_events

            async def load(number: int) -> int:
                nonlocal left
                size = min(20_000, left)
                left -= size
                if size <= 0:
                    return 0
                times = rng.integers(since, now, size, dtype=np.int64)
                receipt = await client.ingest_columns(
                    "compute",
                    account_ids=np.full(size, 42, dtype=np.uint64),
                    timestamps_ns=times,
                    properties={"provider": PROVIDERS[number % 3]},
                )
                return receipt.n_stored

            while (await closed_loop(load, callers=8, seconds=1.0, warm_seconds=0.0)).events:
                pass
            size = f"{options.account_events / 1e6:g} M events"
            seconds = max(options.seconds / 3, 2.0)

            async def realtime(_: int) -> int:
                await client.query_realtime(42, "compute")
                return 0

            async def filtered(_: int) -> int:
                await client.query(42, "compute", current_month(), filters={"provider": "aws"})
                return 0

            asked: list[tuple[str, str, Callable[[int], object]]] = [
                ("realtime total", "p50 <= 0.3 ms", realtime),
                (f"this month, filtered, an account with {size}", "<= 5 ms", filtered),
            ]
            for name, wanted, call in asked:
                answered = await closed_loop(call, callers=1, seconds=seconds)  # type: ignore[arg-type]
                yield _row(name, answered, wanted, 1, 1, server.peak_memory_bytes(), per="calls")


async def raw_reads(options: Options) -> AsyncIterator[Figure]:
    """Raw events and ragged ranges, beside many other events."""
    with options.fresh() as server:
        async with AsyncClient([server.address]) as client:
            await client.metrics.create(MetricSchema(code="api_calls"))
            now = time.time_ns()
            since = now // _DAY_NS * _DAY_NS - 10 * _DAY_NS
            pool = _pool(100_000, 64, 50_000)
            loaded = itertools.count()
            rounds = max(options.events // 50_000, 1)

            async def load(number: int) -> int:
                turn = next(loaded)
                if turn >= rounds:
                    return 0
                # Time goes on as it does in life, with some disorder.
                at = since + (now - since) * turn // rounds
                times = at + np.arange(50_000, dtype=np.int64) * 1_000
                receipt = await client.ingest_columns(
                    "api_calls", account_ids=pool[number % 64], timestamps_ns=times
                )
                return receipt.n_stored

            while (await closed_loop(load, callers=8, seconds=1.0, warm_seconds=0.0)).events:
                pass
            accounts = itertools.count(1)
            seconds = max(options.seconds / 3, 2.0)

            async def first_page(_: int) -> int:
                async for _event in client.list_events(next(accounts) % 100_000, since, now, page_size=100):
                    return 1
                return 0

            hour = since + 5 * _DAY_NS + 7 * 3_600 * 10**9 + 1_234_567_890

            async def ragged(_: int) -> int:
                await client.query(next(accounts) % 100_000, "api_calls", Period(hour, hour + 3_600 * 10**9))
                return 0

            size = f"{rounds * 50_000 / 1e6:g} M events in the log"
            for name, call in (("list_events, first page", first_page), ("an unaligned hour", ragged)):
                answered = await closed_loop(call, callers=1, seconds=seconds)
                memory = server.peak_memory_bytes()
                yield _row(f"{name}, {size}", answered, "<= 100 ms", 1, 1, memory, per="calls")


async def restart(options: Options) -> AsyncIterator[Figure]:
    """A start with many events in the log beyond the checkpoint; and one with nothing to do."""
    with tempfile.TemporaryDirectory(prefix="tallymark-bench-") as folder:
        quiet = {"checkpoint_interval_seconds": 1e9, "checkpoint_events": 10**12}
        server = target.start(Path(folder), **quiet)
        empty = server.start_s
        async with AsyncClient([server.address]) as client:
            await client.metrics.create(MetricSchema(code="api_calls"))
            pool = _pool(10_000)
            left = options.replay_events // BATCH

            async def load(number: int) -> int:
                nonlocal left
                left -= 1
                if left < 0:
                    return 0
                return (await client.ingest_columns("api_calls", account_ids=pool[number % 64])).n_stored

            while (await closed_loop(load, callers=64, seconds=1.0, warm_seconds=0.0)).events:
                pass
        server.stop(kill=True)
        server = target.start(Path(folder), **quiet)
        full = server.start_s
        memory = f"{server.peak_memory_bytes() / 2**20:.0f} MiB"
        server.stop()
    yield Figure(name="warm start, empty", figure=f"{empty:.2f} s", wanted="<= 2 s")
    size = f"{options.replay_events / 1e6:g} M"
    yield Figure(
        name=f"restart, {size} events beyond the checkpoint",
        figure=f"{full:.2f} s",
        wanted="<= 5 s",
        memory=memory,
    )


async def realtime(options: Options) -> AsyncIterator[Figure]:
    """The running total of one account."""
    with options.fresh() as server:
        async with AsyncClient([server.address]) as client:
            await client.metrics.create(MetricSchema(code="compute", agg_type=AggType.SUM))
            for accounts in _pool(10_000):
                await client.ingest_columns("compute", account_ids=accounts)

            async def call(number: int) -> int:
                await client.query_realtime(number % 10_000, "compute")
                return 0

            load = await closed_loop(call, callers=1, seconds=max(options.seconds / 3, 2.0))
            memory = server.peak_memory_bytes()
    yield _row("realtime total", load, "", 1, 1, memory, per="calls")


SCENARIOS: dict[str, Callable[[Options], AsyncIterator[Figure]]] = {
    "columns": columns,
    "columns-wide": columns_wide,
    "lists": event_lists,
    "ids": event_ids,
    "single": single_events,
    "queries": queries,
    "raw": raw_reads,
    "restart": restart,
}

# Measured of a cluster, and beside it of `tallymark dev`; with what is wanted of the cluster, row by row.
COMPARED: dict[str, tuple[Callable[[Options], AsyncIterator[Figure]], tuple[str, ...]]] = {
    "columns": (columns, (">= 1.0 M", ">= 1.5 M")),
    "lists": (event_lists, (">= 400 K",)),
    "single": (single_events, ("p50 <= 1.2 ms", ">= 10 K calls")),
    "realtime": (realtime, ("p50 <= 0.35 ms",)),
}
