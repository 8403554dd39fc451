"""Alerts under measurement: how soon a subscriber and a webhook have them, and how many an instance hands out.

A cluster with one instance of the alerts role. A process of its own keeps up a load of events while single ones, one
after the other, cross a threshold each; what is measured is the time from such an event's receipt to the alert, which
may be there first. Then a thousand subscribers, each with a filter of its own, in processes of their own, are given ten
alerts a second each.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

import numpy as np
from aiohttp import web

from tallymark import AlertThreshold, AsyncClient, Event, MetricSchema, TallymarkError
from tallymark_node.bench import cluster
from tallymark_node.bench.load import percentile
from tallymark_node.bench.scenarios import Figure, Options
from tallymark_runtime.loops import new_event_loop

_LOAD_EVENTS_S: Final = 200_000
_BATCH: Final = 1_000
_LOAD_IN_FLIGHT: Final = 64
_PROBE_S: Final = 0.02  # between two events that cross
_LOST_S: Final = 10.0  # for an alert that must come
_SUBSCRIBERS: Final = 1_000
_ALERTS_S: Final = 12_000  # raised for all of them: more than what is wanted
_SUBSCRIBER_PROCESSES: Final = 2
_SUBSCRIPTIONS: Final = 50  # on one connection
_ACCOUNT_BASE: Final = 10_000_000  # of subscribers' accounts

_PROBED = MetricSchema(code="probed", thresholds=[AlertThreshold(code="each", value=1, recurring=True)])
_LOADED = MetricSchema(code="api_calls", thresholds=[AlertThreshold(code="far", value=10**15)])


async def measure(options: Options) -> AsyncIterator[Figure]:
    """Measure all of it, against one cluster.

    Raises:
        RuntimeError: the cluster doesn't start, or an alert doesn't come.
    """
    with cluster.fresh(alerts=1, webhook_allow_private=True) as target:
        async with AsyncClient([target.address]) as client:
            for schema in (_PROBED, _LOADED):
                await client.metrics.create(schema)
            for events_s in (0, _LOAD_EVENTS_S):
                with _loading(target.address, events_s) as load:
                    async for figure in _prompt(client, options, events_s, load):
                        yield figure
            yield await _many(target, client, options)


# ---------------------------------------------------------------- how soon


class _Arrivals:
    """When alerts have come, by where their events lie."""

    def __init__(self) -> None:
        self.at: dict[tuple[int, int], float] = {}
        self._news = asyncio.Event()

    def came(self, partition: int, offset: int) -> None:
        """An alert is there."""
        self.at.setdefault((partition, offset), time.perf_counter())
        self._news.set()

    async def wait(self, place: tuple[int, int]) -> float:
        """Wait until an alert has come; when it did."""
        try:
            async with asyncio.timeout(_LOST_S):
                while place not in self.at:
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError:
            raise RuntimeError(f"the alert of the event at {place} does not come") from None
        return self.at[place]


async def _prompt(
    client: AsyncClient, options: Options, events_s: int, load: Callable[[], float]
) -> AsyncIterator[Figure]:
    subscribed, posted = _Arrivals(), _Arrivals()
    async with _receiver(posted) as url:
        hook = await client.webhooks.create(url, metric_codes=["probed"])
        async with client.alerts.subscribe(metric_codes=["probed"]) as sub:

            async def follow() -> None:
                async for alert in sub:
                    subscribed.came(alert.partition, alert.event_offset)

            following = asyncio.create_task(follow())
            try:
                receipts = await _probe(client, subscribed, posted, options.seconds)
            finally:
                following.cancel()
                await asyncio.gather(following, return_exceptions=True)
        await client.webhooks.delete(hook.id)
    rate = load()
    loaded = f"{rate / 1e3:.0f} K events/s beside it" if events_s else "no load beside it"
    for name, arrivals, wanted in (
        ("subscriber", subscribed, "p50 <= 5 ms, p99 <= 50 ms"),
        ("webhook", posted, "p99 <= 200 ms"),
    ):
        times = sorted(max(arrivals.at[place] - at, 0.0) for place, at in receipts)
        p50, p99 = (f"{1e3 * percentile(times, share):.1f} ms" for share in (0.50, 0.99))
        yield Figure(
            name=f"receipt to {name}",
            figure=p99,
            wanted=wanted,
            p50=p50,
            p99=p99,
            note=f"{loaded}, {len(times)} alerts",
        )


async def _probe(
    client: AsyncClient, subscribed: _Arrivals, posted: _Arrivals, seconds: float
) -> list[tuple[tuple[int, int], float]]:
    """Events that cross, one after the other: where each lies, and when its receipt was there."""
    receipts: list[tuple[tuple[int, int], float]] = []
    # Whoever begins now is known to be connected once it has had its first alert.
    for warm in (True, False):
        until = time.perf_counter() + (0.0 if warm else seconds)
        account = 0
        while True:
            receipt = await client.ingest([Event(account_id=account, metric_code="probed")])
            at = time.perf_counter()
            place = receipt.offsets[0]
            assert place is not None, "it was stored"
            if warm:
                await subscribed.wait(place)
                await posted.wait(place)
            else:
                receipts.append((place, at))
            account += 1
            if at >= until:
                break
            await asyncio.sleep(_PROBE_S)
    await subscribed.wait(receipts[-1][0])
    for place, _ in receipts:
        await posted.wait(place)
        await subscribed.wait(place)
    return receipts


@contextlib.asynccontextmanager
async def _receiver(arrivals: _Arrivals) -> AsyncIterator[str]:
    """An endpoint that takes everything; gives its URL."""

    async def handle(request: web.Request) -> web.Response:
        data = (await request.json())["data"]
        arrivals.came(data["partition"], data["event_offset"])
        return web.Response(status=204)

    app = web.Application()
    app.router.add_post("/", handle)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        _, port = runner.addresses[0]
        yield f"http://127.0.0.1:{port}/"
    finally:
        await runner.cleanup()


# ---------------------------------------------------------------- a load beside it


@contextlib.contextmanager
def _loading(address: str, events_s: int) -> Iterator[Callable[[], float]]:
    """Have a process send `events_s`; what is given tells how many a second were acknowledged so far."""
    if not events_s:
        yield lambda: 0.0
        return
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_load, args=(address, events_s, there), daemon=True)
    process.start()

    def rate() -> float:
        here.send(None)
        return float(here.recv())

    try:
        here.recv()  # it has begun
        yield rate
    finally:
        process.kill()
        process.join()


def _load(address: str, events_s: int, pipe: Connection) -> None:
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(_send_load(address, events_s, pipe))


async def _send_load(address: str, events_s: int, pipe: Connection) -> None:
    """Send batches at their times, as long as not too many are under way."""
    rng = np.random.default_rng(1)
    pool = [rng.integers(0, 10_000, _BATCH, dtype=np.uint64) for _ in range(64)]
    under_way: set[asyncio.Task[None]] = set()
    stored = 0
    async with AsyncClient([address]) as client:

        async def send(number: int) -> None:
            nonlocal stored
            with contextlib.suppress(TallymarkError):
                receipt = await client.ingest_columns("api_calls", account_ids=pool[number % 64])
                stored += receipt.n_stored

        begun = time.perf_counter()
        number = 0
        pipe.send(None)
        while True:
            now = time.perf_counter()
            while number * _BATCH < (now - begun) * events_s and len(under_way) < _LOAD_IN_FLIGHT:
                task = asyncio.create_task(send(number))
                under_way.add(task)
                task.add_done_callback(under_way.discard)
                number += 1
            if pipe.poll():
                pipe.recv()
                pipe.send(stored / (now - begun))
            await asyncio.sleep(_BATCH / events_s)


# ---------------------------------------------------------------- how many


async def _many(target: cluster.ClusterTarget, client: AsyncClient, options: Options) -> Figure:
    """Some ten alerts a second to each of a thousand subscribers of one instance."""
    context = multiprocessing.get_context("spawn")
    share = _SUBSCRIBERS // _SUBSCRIBER_PROCESSES
    pipes: list[Any] = []
    processes = []
    for part in range(_SUBSCRIBER_PROCESSES):
        here, there = context.Pipe()
        first = _ACCOUNT_BASE + part * share
        process = context.Process(target=_follow, args=(target.address, first, share, there), daemon=True)
        process.start()
        pipes.append(here)
        processes.append(process)
    try:
        for pipe in pipes:
            await asyncio.to_thread(pipe.recv)  # all of its subscriptions have begun
        accounts = np.arange(_ACCOUNT_BASE, _ACCOUNT_BASE + _SUBSCRIBERS, dtype=np.uint64)
        alerts = target.alerts[0].process
        assert alerts is not None, "it runs"
        cpu, begun = _cpu_seconds(alerts.pid), time.perf_counter()
        rounds = 0
        under_way: set[asyncio.Task[Any]] = set()
        while time.perf_counter() - begun < options.seconds:
            task = asyncio.create_task(client.ingest_columns("probed", account_ids=accounts))
            under_way.add(task)
            task.add_done_callback(under_way.discard)
            rounds += 1
            await asyncio.sleep(max(rounds * _SUBSCRIBERS / _ALERTS_S - (time.perf_counter() - begun), 0.0))
        await asyncio.gather(*under_way)
        ended = time.perf_counter()
        for pipe in pipes:
            pipe.send(rounds)
        found = [await asyncio.to_thread(pipe.recv) for pipe in pipes]
        took, cpu = time.perf_counter() - begun, _cpu_seconds(alerts.pid) - cpu
    finally:
        for process in processes:
            process.kill()
            process.join()
    delays = sorted(delay for _, part in found for delay in part)
    count = sum(number for number, _ in found)
    if count != rounds * _SUBSCRIBERS:
        raise RuntimeError(f"{rounds * _SUBSCRIBERS} alerts were raised, and {count} delivered")
    return Figure(
        name=f"{_SUBSCRIBERS} subscribers of one instance",
        figure=f"{count / took / 1e3:.1f} K alerts/s",
        wanted=">= 10.0 K alerts/s",
        p50=f"{1e3 * percentile(delays, 0.50):.0f} ms",
        p99=f"{1e3 * percentile(delays, 0.99):.0f} ms",
        note=(
            f"raised at {count / (ended - begun) / 1e3:.1f} K/s; {1e6 * cpu / count:.0f} us of the instance's CPU an "
            f"alert, {cpu / took:.2f} cores"
        ),
    )


def _follow(address: str, first: int, count: int, pipe: Connection) -> None:
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(_subscribe(address, first, count, pipe))


async def _subscribe(address: str, first: int, count: int, pipe: Connection) -> None:
    """Subscriptions of `count` accounts from `first` on; in the end, how many alerts came, and how long after they were raised."""
    got = 0
    delays: list[float] = []
    async with contextlib.AsyncExitStack() as stack:
        tasks = []

        async def follow(sub: Any) -> None:
            nonlocal got
            async for alert in sub:
                got += 1
                delays.append(time.time_ns() / 1e9 - alert.triggered_at.timestamp())

        for start in range(0, count, _SUBSCRIPTIONS):
            client = await stack.enter_async_context(AsyncClient([address]))
            for account in range(first + start, first + min(start + _SUBSCRIPTIONS, count)):
                sub = await stack.enter_async_context(client.alerts.subscribe(account_ids=[account]))
                tasks.append(asyncio.create_task(follow(sub)))
        pipe.send(None)
        rounds = await asyncio.to_thread(pipe.recv)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(3 * _LOST_S):
                while got < rounds * count:  # noqa: ASYNC110 - all of them are waited for
                    await asyncio.sleep(0.01)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        pipe.send((got, delays[-1_000_000:]))


def _cpu_seconds(pid: int) -> float:
    """The CPU time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rsplit(") ", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
