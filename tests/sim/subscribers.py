"""The alerts role, and who follows it: ALERT-1 from end to end.

Instances run the real tail, windows and source on loops of their own; they ask the stores through the simulated
network and learn of leaders from the coordinator. They keep nothing: one that dies comes back empty. Subscribers ask
any of them, with the SDK's own buffer and cursors, and die now and then, to go on from the offsets they saved last.

Every answer is held to `alerts.Crossings`: between the cursor that was asked with and the one that came back lie
exactly the records that were handed out, in order. At the end everybody has come to the end of every partition.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from tallymark._feed import Feed
from tallymark_alerts.counters import AlertsCounters
from tallymark_alerts.source import AlertSource
from tallymark_alerts.stores import AskedStores
from tallymark_alerts.tail import Tail
from tallymark_protocol.codec import decode, encode
from tallymark_protocol.errors import ErrorCode, TallymarkError, UnavailableError
from tallymark_protocol.messages import AlertRecord, AlertsBatch, AlertsFetch, Call

from .clients import ACCOUNTS
from .clock import SimClock
from .coordination import SimCoordinator
from .logbook import SEATS
from .loop import MILLISECOND, SECOND, ProcessLoop, SimulationError
from .loop import Event as Timer
from .process import Process

SILENCE_NS = 2 * SECOND  # after which a connection whose other end is gone counts as lost
LATE_NS = 2 * SECOND  # beyond the wait it asked for: a subscriber asks another instance
DONE_NS = 20 * SECOND  # at rest, by when every subscriber has seen everything
_METRICS = ("m0", "m1", "m2", SEATS)


class _Peer:
    """A connection to a store."""

    is_connected = True

    def __init__(self, instance: Instance, process: Process) -> None:
        self._instance = instance
        self._life = instance.life
        self._process = process

    def submit(self, kind: int, *parts: Any, timeout_s: float) -> asyncio.Future[Any]:
        """Send a call; the future gives what is answered."""
        instance, process = self._instance, self._process
        loop = instance.loop
        assert loop is not None
        future = loop.create_future()
        call = decode(Call, b"".join(bytes(part) for part in parts))
        caller = (instance.name, self._life)

        def answer(result: Any, error: BaseException | None) -> None:
            body = b"" if result is None else encode(result)
            instance.network.send(process.name, instance.name, come, body, error, is_datagram=False)

        def come(body: bytes, error: BaseException | None) -> None:
            loop.post(_resolve, future, body, error)

        def look(life: int) -> None:
            if future.done() or not loop.is_alive:
                return
            network = instance.network
            is_there = process.life == life and process.is_up and not process.is_frozen
            if is_there and network.is_open(process.name, instance.name):
                instance.world.after(SILENCE_NS, look, life)
            else:
                loop.post(_resolve, future, b"", _lost("was lost"))

        instance.network.send(
            instance.name, process.name, process.call, call, answer, caller, is_datagram=False
        )
        instance.world.after(SILENCE_NS, look, process.life)
        loop.call_later(timeout_s, _resolve, future, b"", _lost("does not answer", ErrorCode.TIMEOUT))
        return future


class _Pool:
    """What `AskedStores` has connections from."""

    def __init__(self, instance: Instance) -> None:
        self.on_connected: Callable[[str], None] = lambda address: None
        self._instance = instance
        self._peers: dict[str, _Peer] = {}

    def get(self, address: str) -> _Peer | None:
        return self._peers.get(address)

    def addresses(self) -> list[str]:
        return list(self._peers)

    def add(self, address: str) -> None:
        process = self._instance.processes.get(address.partition(":")[0])
        if process is not None and address not in self._peers:
            self._peers[address] = _Peer(self._instance, process)

    def keep(self, addresses: Any) -> None:
        wanted = sorted(set(addresses))
        for address in [address for address in self._peers if address not in wanted]:
            del self._peers[address]
        for address in wanted:
            self.add(address)

    async def close(self) -> None:
        self._peers.clear()


class Instance:
    """A process of the alerts role. `simulation` is what it belongs to."""

    def __init__(self, simulation: Any, name: str, rng: random.Random) -> None:
        self.name = name
        self.world = simulation.world
        self.network = simulation.network
        self.processes: dict[str, Process] = simulation.processes
        self.life = 0
        self.loop: ProcessLoop | None = None
        self.source: AlertSource | None = None  # while it serves
        self._s = simulation
        self._rng = rng

    def start(self) -> None:
        """Begin a life, unless one is under way."""
        if self.loop is not None:
            return
        self.life += 1
        self._s.trace(self.name, "starts its life %d", self.life)
        clock = SimClock(self.world)
        self.loop = loop = ProcessLoop(
            self.world,
            f"{self.name}.{self.life}",
            monotonic_ns=clock.monotonic_ns,
            due_ns=clock.due_ns,
            on_error=self._failed,
        )
        loop.create_task(self._main(loop, clock))

    async def _main(self, loop: ProcessLoop, clock: SimClock) -> None:
        rng = random.Random(self._rng.getrandbits(64))
        count = self._s.partition_count
        stores = AskedStores(SimCoordinator(self._s.etcd, self.name, loop), self.name, rng)
        pool = _Pool(self)
        pool.on_connected = stores._asking._on_connected
        stores._asking._peers = pool  # type: ignore[assignment]
        counters = self.counted = AlertsCounters()
        tail = Tail(
            stores,
            partition_count=count,
            clock=clock,
            rng=rng,
            counters=counters,
            window_records=rng.choice((2, 6, 30, 10_000)) * count,
            window_records_min=1,
            behind_records=rng.choice((0, 2, 500)),
        )
        source = AlertSource(
            stores,
            tail.windows,
            partition_count=count,
            counters=counters,
            answers_per_s=rng.choice((20, 2_000)),
        )
        tail.on_records = source.on_records
        while True:
            try:
                await stores.start()
                break
            except TallymarkError as error:
                self._s.trace(self.name, "does not reach the coordinator: %s", error)
                await asyncio.sleep(0.2)
        tail.start()
        self.source = source

    def crash(self) -> None:
        """End the life at once."""
        if self.loop is not None:
            self._s.trace(self.name, "is killed")
            self.loop.kill()
            self.world.graveyard.append((self.source, self.counted))
            self.loop = self.source = None

    def fetch(self, fetch: AlertsFetch, answer: Callable[[Any, BaseException | None], None]) -> None:
        """A subscriber's call has come; `answer` is called once, if it lives."""
        source, loop = self.source, self.loop
        if source is None or loop is None:
            answer(None, _lost("is not there"))
            return

        async def ask() -> None:
            try:
                batch = await source.next_batch(
                    account_ids=fetch.account_ids,
                    metric_codes=fetch.metric_codes,
                    since=fetch.since,
                    limit=fetch.limit,
                    wait_s=fetch.wait_ms / 1000,
                )
            except TallymarkError as error:
                answer(None, error)
            else:
                answer(batch, None)

        loop.post(lambda: loop.create_task(ask()))

    def _failed(self, what: str, error: BaseException | None) -> None:
        self._s._defect(f"{self.name}: {what}", error)


class Subscriber:
    """Follows the alerts of some accounts and metrics, with the SDK's own buffer and cursors."""

    def __init__(self, owner: Subscribers, name: str, rng: random.Random) -> None:
        self.name = name
        wants_all = rng.random() < 0.4
        self.account_ids = sorted(rng.sample(range(ACCOUNTS), 0 if wants_all else rng.choice((0, 1, 4))))
        self.metric_codes = sorted(rng.sample(_METRICS, 0 if wants_all else rng.choice((0, 1, 2))))
        self.handled: set[str] = set()  # ids of alerts that it is done with
        self.repeated = 0
        self.deaths = 0
        self.is_calm = False  # it is quick, and dies no more
        self._owner = owner
        self._rng = rng
        self._size = rng.choice((1, 2, 5, 64))
        self._begin: dict[int, int] | None = (
            {} if rng.random() < 0.8 else None
        )  # None: at the end, once it knows it
        self._feed = Feed(self._size, self._begin)
        self._saved = self._begin  # offsets, as JSON would have them
        self._next: dict[int, int] = {}  # by partition: where what it has got since it came back ends
        self._since = self._begin or {}  # what it came back with
        self._in_hands: AlertRecord | None = None
        self._request = 0
        self._is_asking = False
        self._timer: Timer | None = None

    def start(self) -> None:
        """Begin."""
        self._ask()
        self._work()

    # ------------------------------------------------------------ reading

    def _ask(self) -> None:
        """Ask whichever instance, where there is room for an answer."""
        owner, rng, feed = self._owner, self._rng, self._feed
        wanted = feed.wanted() if feed.is_pinned else 1
        if self._timer is not None:
            self._timer.cancel()
        self._is_asking = bool(wanted)
        if not wanted:
            return
        self._request += 1
        request = self._request
        instance = rng.choice(owner.instances)
        fetch = AlertsFetch(
            account_ids=self.account_ids,
            metric_codes=self.metric_codes,
            since=feed.reading if feed.is_pinned else None,
            limit=wanted,
            wait_ms=rng.choice((0, 20, 500, 3_000)),
        )

        def answer(batch: AlertsBatch | None, error: BaseException | None) -> None:
            owner.network.send(
                instance.name, self.name, self._come, request, fetch, batch, error, is_datagram=False
            )

        self._timer = owner.world.after(fetch.wait_ms * MILLISECOND + LATE_NS, self._ask)
        owner.network.send(self.name, instance.name, instance.fetch, fetch, answer, is_datagram=False)

    def _come(
        self, request: int, fetch: AlertsFetch, batch: AlertsBatch | None, error: BaseException | None
    ) -> None:
        if request != self._request:
            return  # it was given up
        wait_ms = self._rng.randint(20, 300)
        if batch is not None:
            self._owner.check(self.name, fetch, batch)
            if fetch.since is None:
                self._feed.pin(batch.next)
                self._begin = self._saved = self._since = dict(batch.next)
            else:
                self._feed.add(batch, fetch.limit)
            if batch.alerts or fetch.wait_ms:
                wait_ms = 0
        elif not isinstance(error, TallymarkError) or not error.retriable:
            raise SimulationError(f"ALERT-1: {self.name} was told {error!r}")
        assert self._timer is not None
        self._timer.cancel()
        self._timer = self._owner.world.after(wait_ms * MILLISECOND + 1_000, self._ask)

    # ------------------------------------------------------------ handling

    def _work(self) -> None:
        """Be done with one alert, and take the next; or die."""
        rng, feed = self._rng, self._feed
        if feed.is_pinned:
            if rng.random() < 0.03 and not self.is_calm:
                self._die()
            else:
                self._step(feed)
        pause_ms = 5 if self.is_calm else rng.choice((0, 0, 1, 20, 200))
        self._owner.world.after(pause_ms * MILLISECOND + 1_000, self._work)

    def _step(self, feed: Feed) -> None:
        if self._in_hands is not None:
            self.handled.add(self._in_hands.id)
        alert = self._in_hands = feed.take()
        if self._rng.random() < 0.7:
            self._saved = feed.covered
        if alert is not None:
            self.repeated += alert.id in self.handled
            self._check_order(alert)
        if not self._is_asking:
            self._ask()

    def _die(self) -> None:
        """Come back with what was saved: everything below must have been handled."""
        self.deaths += 1
        self._owner.trace(self.name, "dies, and goes on from %s", self._saved)
        self._check_handled(self._saved or {})
        self._in_hands = None
        self._feed = Feed(self._size, self._saved)
        self._since, self._next = self._saved or {}, {}
        self._ask()

    # ------------------------------------------------------------ checking

    def _matching(self, number: int, start: int, end: int) -> list[AlertRecord]:
        return [
            record
            for record in self._owner.records(number)[start:end]
            if (not self.account_ids or record.account_id in self.account_ids)
            and (not self.metric_codes or record.metric_code in self.metric_codes)
        ]

    def _check_order(self, alert: AlertRecord) -> None:
        """Nothing that matches lies between this one and the one before it."""
        start = self._next.get(alert.partition, self._since.get(alert.partition, 0))
        if self._matching(alert.partition, start, alert.position + 1) != [alert]:
            raise SimulationError(f"ALERT-1: {self.name} was handed {alert} after position {start}")
        self._next[alert.partition] = alert.position + 1

    def _check_handled(self, offsets: dict[int, int]) -> None:
        begin = self._begin or {}
        for number, end in offsets.items():
            for record in self._matching(number, begin.get(number, 0), end):
                if record.id not in self.handled:
                    raise SimulationError(
                        f"ALERT-1: {self.name} goes on at {end} in partition {number}, and has not handled {record}"
                    )

    def unfinished(self) -> str:
        """What it has not come to yet; "" where it has everything."""
        if not self._feed.is_pinned:
            return f"{self.name} doesn't know where to begin"
        covered = self._feed.covered
        for number in range(self._owner.partition_count):
            end = len(self._owner.records(number))
            if covered.get(number, 0) != end:
                return f"{self.name} is at {covered.get(number, 0)} of {end} in partition {number}"
        self._check_handled(covered)
        return ""


class Subscribers:
    """All instances and subscribers of a run. `simulation` is what they follow."""

    def __init__(self, simulation: Any, rng: random.Random) -> None:
        self.world = simulation.world
        self.network = simulation.network
        self.trace = simulation.trace
        self.partition_count: int = simulation.partition_count
        self._s = simulation
        self._rng = rng
        self.instances = [
            Instance(simulation, f"a{number}", random.Random(rng.getrandbits(64))) for number in (1, 2)
        ]
        self.subscribers = [
            Subscriber(self, f"subscriber{number}", random.Random(rng.getrandbits(64)))
            for number in range(rng.choice((1, 2, 3)))
        ]
        self._is_healed = False

    # ------------------------------------------------------------ schedule

    def plan(self, end_ns: int, *, is_disturbed: bool) -> None:
        """Draw when they begin, and when instances die or are cut off."""
        rng, world = self._rng, self.world
        for instance in self.instances:
            world.after(rng.randint(0, SECOND), instance.start)
        for subscriber in self.subscribers:
            world.after(rng.randint(0, 2 * SECOND), subscriber.start)
        for _ in range(rng.choice((0, 2, 5)) if is_disturbed else 0):
            world.at(rng.randint(SECOND, end_ns), self._disturb)

    def _disturb(self) -> None:
        if self._is_healed:
            return
        rng, world = self._rng, self.world
        instance = rng.choice(self.instances)
        kind = rng.random()
        if kind < 0.4:
            instance.crash()
            world.after(rng.randint(10, 1_500) * MILLISECOND, instance.start)
        elif kind < 0.6:
            loop = instance.loop
            if loop is not None:
                self.trace(instance.name, "freezes")
                loop.freeze()
                world.after(rng.randint(50, 4_000) * MILLISECOND, loop.thaw)
        else:
            other = rng.choice([*self._s.processes, *self._s.processes, "etcd", self.subscribers[0].name])
            pair = (instance.name, other) if rng.random() < 0.5 else (other, instance.name)
            self.trace("faults", "cuts %s -> %s", *pair)
            self.network.cut(*pair)
            world.after(rng.randint(100, 4_000) * MILLISECOND, self.network.mend, *pair)

    def heal(self) -> None:
        """Everything is well from now on."""
        self._is_healed = True
        for subscriber in self.subscribers:
            subscriber.is_calm = True
        for instance in self.instances:
            if instance.loop is not None:
                instance.loop.thaw()
            instance.start()

    def end(self) -> None:
        """The run is over."""
        for instance in self.instances:
            instance.crash()

    # ------------------------------------------------------------ checking

    def records(self, number: int) -> list[AlertRecord]:
        """What a partition's committed events have crossed so far."""
        found: list[AlertRecord] = self._s.checkers.crossings[number].records
        return found

    def check(self, who: str, fetch: AlertsFetch, batch: AlertsBatch) -> None:
        """Between two cursors lie exactly the records that were handed out."""
        for number in range(self.partition_count):
            records = self.records(number)
            end = batch.next.get(number, -1)
            if not 0 <= end <= len(records):
                raise SimulationError(
                    f"ALERT-1: {who} is to go on at {end} in partition {number}, which has {len(records)} records"
                )
            if fetch.since is None:
                continue
            start = fetch.since.get(number, 0)
            found = [alert for alert in batch.alerts if alert.partition == number]
            expected = [
                record
                for record in records[start:end]
                if (not fetch.account_ids or record.account_id in fetch.account_ids)
                and (not fetch.metric_codes or record.metric_code in fetch.metric_codes)
            ]
            if end < start or found != expected:
                raise SimulationError(
                    f"ALERT-1: {who} got {[alert.id for alert in found]} of partition {number} from {start} to {end}, "
                    f"where {[record.id for record in expected]} are"
                )
        if fetch.since is None and batch.alerts:
            raise SimulationError(f"ALERT-1: {who} got alerts, and began at the end")

    def unfinished(self) -> str:
        """Who has not come to the end of every partition; "" where everybody has."""
        return next(filter(None, (subscriber.unfinished() for subscriber in self.subscribers)), "")

    def is_done(self) -> bool:
        """Whether everybody has seen everything; not looked at each time."""
        return self.world.events % 20 == 0 and not self.unfinished()


def _resolve(future: asyncio.Future[Any], body: bytes, error: BaseException | None) -> None:
    if future.done():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(SimpleNamespace(body=body))


def _lost(what: str, code: ErrorCode = ErrorCode.CLOSED) -> UnavailableError:
    return UnavailableError(f"the other end {what}", code=code)
