"""Locust users that call the SDK, and generator processes beside them; `make load HOST=… SECONDS=…`.

Locust is made of greenlets, the SDK of coroutines. They meet in `Bridge`: an asyncio loop in a native thread of its
own, to which a greenlet hands a call and waits, without keeping the other greenlets from running. That carries some
hundred calls a second. What a cluster can bear comes from `load_generator.py`, plain asyncio in processes of their own;
locust starts them with the test, adds their figures up every second, and stops them with it.

The report at the end is from our own figures, whose latencies are right to 2 % (locust's are rounded to milliseconds).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import secrets
import signal
import sys
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import gevent
import msgspec
from gevent import subprocess
from gevent.hub import Waiter
from locust import User, between, events
from locust.stats import StatsEntry

sys.path.insert(0, str(Path(__file__).parent))

from load_calls import Caller, prepare
from load_figures import Figures, seconds_of, summary, table

from tallymark import AsyncClient
from tallymark_runtime.loops import new_event_loop

T = TypeVar("T")

CALL_SECONDS = 30.0
STOP_SECONDS_MAX = 60.0  # a generator waits for its last answers
# What an application does how often.
WEIGHTS = {
    "ingest one event": 20,
    "ingest events": 5,
    "ingest columns": 1,
    "query realtime": 20,
    "query month": 5,
    "breakdown": 3,
    "series": 1,
    "top accounts": 1,
    "list events": 2,
    "list alerts": 1,
}


class Bridge:
    """An asyncio loop in a native thread, for greenlets."""

    def __init__(self) -> None:
        self._hub = gevent.get_hub()
        self._loop = new_event_loop()
        # gevent has replaced the threads that `threading` makes; its pool's are real ones.
        self._thread = self._hub.threadpool.spawn(self._loop.run_forever)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine there; the calling greenlet waits, others go on.

        It is run to its end, also where the greenlet is killed meanwhile: what it stores is to be counted.
        """
        waker = self._hub.loop.async_()  # its `send` is the one thing of gevent that any thread may call
        ended = Waiter(self._hub)
        waker.start(ended.switch, None)  # before the work begins: until then what is sent is lost
        tasks: list[asyncio.Task[T]] = []

        def start() -> None:
            tasks.append(self._loop.create_task(work))
            tasks[0].add_done_callback(lambda _: waker.send())

        self._loop.call_soon_threadsafe(start)
        try:
            ended.get()
        except BaseException:
            waker.stop()  # but it stays open for the call that will still use it
            raise
        waker.close()
        return tasks[0].result()

    def close(self) -> None:
        """Stop the loop and its thread."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.get()
        self._loop.close()


class Load:
    """What one run of locust shares between its users: the bridge, the figures, the generators."""

    def __init__(self, environment: Any) -> None:
        self.options = environment.parsed_options
        self.bridge = Bridge()
        # Two threads count, so each has figures of its own.
        self.users_figures = Figures()  # the bridge's
        self._generators_figures = Figures()  # locust's
        self.seed = secrets.randbits(48)
        self.users = 0
        self.begun = time.perf_counter()
        self._stats = environment.stats
        self._generators: list[Any] = []
        self._readers: list[Any] = []

    def prepare(self, host: str) -> None:
        """Create the metrics, once before everything else, and start the generators."""

        async def create() -> None:
            async with AsyncClient(addresses(host), timeout=CALL_SECONDS) as client:
                await prepare(client)

        self.bridge.run(create())
        for i in range(self.options.generators):
            command = [sys.executable, str(Path(__file__).with_name("load_generator.py")), "--host", host]
            command += ["--accounts", str(self.options.accounts), "--batch", str(self.options.batch)]
            command += ["--seed", str(self.seed + 1 + i)]
            process = subprocess.Popen(command, stdout=subprocess.PIPE)
            self._generators.append(process)
            self._readers.append(gevent.spawn(self._read, process))
        self.begun = time.perf_counter()

    def _read(self, process: Any) -> None:
        for line in process.stdout:
            figures = msgspec.json.decode(line, type=Figures)
            self._generators_figures.add(figures)
            self._show(figures)

    def _show(self, figures: Figures) -> None:
        """Add a generator's figures to locust's own, which its console and its pages show."""
        now = time.time()  # noqa: TID251  # of locust's clock, to be compared with its own
        for name, kind in figures.kinds.items():
            entry = StatsEntry(self._stats, name, "generator")
            entry.num_requests = kind.calls + sum(kind.errors.values())
            entry.num_failures = sum(kind.errors.values())
            entry.total_response_time = round(kind.seconds * 1000)
            entry.start_time = entry.last_request_timestamp = now
            entry.max_response_time = round(kind.longest * 1000)
            entry.num_reqs_per_sec = {int(now): entry.num_requests}
            entry.num_fail_per_sec = {int(now): entry.num_failures} if entry.num_failures else {}
            for bucket, count in kind.buckets.items():
                milliseconds = round(seconds_of(bucket) * 1000)
                entry.response_times[milliseconds] = entry.response_times.get(milliseconds, 0) + count
            entry.min_response_time = min(entry.response_times, default=None)
            self._stats.entries[name, "generator"].extend(entry)
            self._stats.total.extend(entry)

    def figures(self) -> Figures:
        """All that was measured. The bridge must be closed, and the generators stopped."""
        total = Figures()
        total.add(self.users_figures)
        total.add(self._generators_figures)
        return total

    def stop_generators(self) -> list[int]:
        """Have them end; return their exit statuses."""
        for process in self._generators:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
        gevent.joinall(self._readers, timeout=STOP_SECONDS_MAX)
        statuses = []
        for process in self._generators:
            if process.poll() is None and gevent.with_timeout(5.0, process.wait, timeout_value=None) is None:
                process.kill()
            statuses.append(process.wait())
        self._generators.clear()
        return statuses


LOADS: dict[int, Load] = {}  # by environment: locust makes users of nothing but that


def addresses(host: str) -> list[str]:
    """The gateways that `--host` names."""
    return [address.strip() for address in host.split(",") if address.strip()]


@events.init_command_line_parser.add_listener
def _arguments(parser: Any) -> None:
    group = parser.add_argument_group("Tallymark")
    group.add_argument("--generators", type=int, default=1, help="heavy processes beside the users")
    group.add_argument("--accounts", type=int, default=10_000, help="that usage is spread over")
    group.add_argument("--batch", type=int, default=1000, help="events in a call of columns")
    group.add_argument("--report", default="", help="a file for the report, as JSON")


@events.test_start.add_listener
def _start(environment: Any, **_: Any) -> None:
    load = LOADS[id(environment)] = Load(environment)
    host = environment.host or ""
    if not addresses(host):
        raise SystemExit("--host names no gateway: write HOST:PORT, or several separated by commas")
    load.prepare(host)


@events.test_stop.add_listener
def _stop(environment: Any, **_: Any) -> None:
    load = LOADS.pop(id(environment), None)
    if load is None:
        return
    statuses = load.stop_generators()
    seconds = time.perf_counter() - load.begun
    load.bridge.close()
    figures = load.figures()
    document = summary(figures, seconds)
    document["generators"] = statuses
    if any(statuses) or document["failed"]:
        environment.process_exit_code = 1
    if load.options.report:
        Path(load.options.report).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(f"\n{seconds:.1f} s against {environment.host}")
    print(table(figures, seconds))


def _task(kind: str) -> Callable[[Application], None]:
    return lambda user: user.make(kind)


class Application(User):
    """An application: sends usage as it happens, and asks about it."""

    wait_time = between(0.0, 0.02)
    tasks = {_task(kind): weight for kind, weight in WEIGHTS.items()}  # noqa: RUF012  # as locust wants it

    def on_start(self) -> None:
        """Connect."""
        load = self._load = LOADS[id(self.environment)]
        load.users += 1
        name = f"{load.seed}-u{load.users}"

        async def connect() -> AsyncClient:
            client = AsyncClient(addresses(self.environment.host), timeout=CALL_SECONDS)
            await client.connect()
            return client

        self._client = load.bridge.run(connect())
        self._calling = asyncio.Lock()
        self._caller = Caller(
            self._client,
            load.users_figures,
            random.Random(name),
            name=name,
            accounts=load.options.accounts,
            batch=load.options.batch,
        )

    def on_stop(self) -> None:
        """Disconnect, once the call is answered in which locust may have stopped this user."""

        async def leave() -> None:
            async with self._calling:
                await self._client.close()

        self._load.bridge.run(leave())

    def make(self, kind: str) -> None:
        """Make one call and report it to locust."""

        async def call() -> tuple[float, BaseException | None]:
            async with self._calling:
                return await self._caller.make(kind)

        seconds, error = self._load.bridge.run(call())
        self.environment.events.request.fire(
            request_type="sdk",
            name=kind,
            response_time=seconds * 1000,
            response_length=0,
            exception=error,
            context={},
        )
