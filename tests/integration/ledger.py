"""What clients were told, and whether the server keeps its word.

A `Ledger` makes events, each with a value of its own, so that a stored event can be told from every other; it notes
what became of each according to the receipts, and compares that with everything the server says afterwards. A
`Load` runs clients against a server and survives its deaths as an application would: by `retry()`, or by passing the
same events again. A `Repeater` sends chunks byte for byte again, for ever, and wants the first answer each time.

Facts and entries: a **fact** is one thing that happened (account, metric, value, operation); an **entry** is one
event object that says so. A fact with an event id may have several entries, of which exactly one is to be stored.
"""

import asyncio
import contextlib
import enum
import random
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field

from tallymark import (
    OTHER,
    AggType,
    AlertThreshold,
    AsyncClient,
    DimensionFilter,
    Event,
    IngestError,
    MetricSchema,
    OperationType,
    PeriodType,
    UnavailableError,
)
from tallymark_protocol.chunk import encode_events
from tallymark_protocol.codec import decode_receipt
from tallymark_protocol.errors import Reason
from tallymark_protocol.identifiers import partition_of
from tallymark_protocol.messages import FrameType

ALWAYS = (0, 2**62)
ACCOUNTS = 12
STEP = 40_000  # of the recurring threshold
LOW = 700
HIGH = 300_000
WAIT_SECONDS_MAX = 60.0
DAY_NS = 86_400 * 10**9
OLD_NS = 1_700_000_000 * 10**9
NOTE = "n" * 900  # fills segments

SCHEMAS = [
    MetricSchema(
        code="used",
        agg_type=AggType.SUM,
        period_type=PeriodType.LIFETIME,
        filters=[DimensionFilter(key="provider", values=["aws", "gcp"])],
        thresholds=[
            AlertThreshold(code="low", value=LOW),
            AlertThreshold(code="high", value=HIGH),
            AlertThreshold(code="step", value=STEP, recurring=True),
        ],
    ),
    MetricSchema(code="peak", agg_type=AggType.MAX, period_type=PeriodType.LIFETIME),
    MetricSchema(code="seats", agg_type=AggType.COUNT_UNIQUE, period_type=PeriodType.LIFETIME),
]

Place = tuple[int, int]  # partition, offset


class Outcome(enum.Enum):
    """What the server said of an entry."""

    OPEN = "open"  # nothing yet: it may be stored or not
    STORED = "stored"
    DUPLICATE = "duplicate"
    CONFLICT = "conflict"
    REJECTED = "rejected"


@dataclass
class Entry:
    """One event object."""

    event: Event
    outcome: Outcome = Outcome.OPEN
    place: Place | None = None  # its own if stored, else the original's


@dataclass
class Fact:
    """Something that happened, with everything that was said about it."""

    entries: list[Entry] = field(default_factory=list)
    seen: Place | None = None  # where a listing has shown it
    original: Event | None = None  # whose id it bears though it says something else: it is to be refused


def key_of(event) -> tuple[int, str, int, int]:
    """Which fact an event, or a stored event, is about."""
    return event.account_id, event.metric_code, event.value, int(event.operation_type)


class Ledger:
    """All facts of one server's life; see the module."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.facts: dict[tuple[int, str, int, int], Fact] = {}
        self.acknowledged = 0  # entries with an outcome
        self.stored: Counter[tuple[int, str]] = Counter()  # acknowledged so, by account and metric
        self.alerts: list[object] = []  # as last seen, in order per partition
        self._serial = 0
        self._ids: list[Event] = []  # sent under an id, to be repeated
        self._seats: list[Event] = []  # added, to be removed

    # ------------------------------------------------------------ making events

    def event(self, *, metric: str = "", bulky: bool = False) -> Event:
        """A new fact."""
        rng = self.rng
        self._serial += 1
        metric = metric or rng.choice(("used", "used", "used", "peak", "seats"))
        account, value, operation = rng.randrange(ACCOUNTS), self._serial, OperationType.NONE
        if metric == "seats":
            operation = rng.choice((OperationType.ADD, OperationType.NONE))
            if self._seats and rng.random() < 0.4:
                added = self._seats.pop(rng.randrange(len(self._seats)))
                account, value, operation = added.account_id, added.value, OperationType.REMOVE
        properties = {"provider": rng.choice(("aws", "gcp", "own"))} if rng.random() < 0.5 else {}
        if bulky:
            properties["note"] = NOTE
        event = Event(
            account_id=account,
            metric_code=metric,
            value=value,
            timestamp=OLD_NS + rng.randrange(90) * DAY_NS if rng.random() < 0.2 else None,
            properties=properties,
            operation_type=operation,
            id=f"id-{self._serial}" if rng.random() < 0.4 else None,
        )
        if metric == "seats" and operation is not OperationType.REMOVE:
            self._seats.append(event)
        return event

    def batch(self, count: int = 0) -> list[Entry]:
        """Some entries: new facts, facts said again under their id, conflicts, unknown metrics."""
        rng = self.rng
        count = count or rng.choice((1, 1, 2, 5, 10, 20, 40))
        bulky = rng.random() < 0.2
        entries = []
        for _ in range(count):
            roll = rng.random()
            if roll < 0.1 and self._ids:
                entries.append(self.enter(_copy(rng.choice(self._ids[-300:]))))
            elif roll < 0.13 and (original := self._stored_under_id()) is not None:
                entries.append(self.enter(self._conflict(original)))
                self.facts[key_of(entries[-1].event)].original = original
            elif roll < 0.15:
                entries.append(Entry(Event(account_id=rng.randrange(ACCOUNTS), metric_code="nothing")))
            else:
                event = self.event(bulky=bulky)
                entries.append(self.enter(event))
                if event.id is not None:
                    # From now on, so that repeats are also sent while the first is under way.
                    self._ids.append(event)
        return entries

    def _stored_under_id(self) -> Event | None:
        """Some event with an id that is known to be stored."""
        if not self._ids:
            return None
        event = self.rng.choice(self._ids)
        return event if any(e.place is not None for e in self.facts[key_of(event)].entries) else None

    def _conflict(self, original: Event) -> Event:
        """An event under the id of another, with another value."""
        self._serial += 1
        return Event(
            account_id=original.account_id,
            metric_code=original.metric_code,
            value=self._serial,
            id=original.id,
        )

    def enter(self, event: Event) -> Entry:
        """Note an event that is about to be sent."""
        entry = Entry(event)
        self.facts.setdefault(key_of(event), Fact()).entries.append(entry)
        return entry

    # ------------------------------------------------------------ noting receipts

    def settle(self, entry: Entry, outcome: Outcome, place: Place | None) -> None:
        """Note what the server said. Whatever it said before it must say again."""
        if entry.outcome is Outcome.OPEN:
            entry.outcome, entry.place = outcome, place
            self.acknowledged += 1
            self.stored[entry.event.account_id, entry.event.metric_code] += outcome is Outcome.STORED
        assert (entry.outcome, entry.place) == (outcome, place), f"another answer about {entry.event}"

    def note(self, entries: list[Entry], receipt) -> None:
        """Note a receipt, whole or partial."""
        open_ = set(receipt.unknown) | set(receipt.not_stored)
        others = {o.index: (Outcome.DUPLICATE, (o.partition, o.offset)) for o in receipt.duplicates}
        others |= {o.index: (Outcome.CONFLICT, (o.partition, o.offset)) for o in receipt.conflicts}
        others |= {r.index: (Outcome.REJECTED, None) for r in receipt.rejected}
        for rejection in receipt.rejected:
            assert rejection.reason is Reason.UNKNOWN_METRIC
            assert entries[rejection.index].event.metric_code == "nothing"
        offsets = receipt.offsets
        for index, entry in enumerate(entries):
            if index in open_:
                assert entry.outcome is Outcome.OPEN, "what was settled became open again"
            elif index in others:
                self.settle(entry, *others[index])
            else:
                assert offsets[index] is not None
                self.settle(entry, Outcome.STORED, offsets[index])

    # ------------------------------------------------------------ comparing

    async def check(self, client: AsyncClient, *, settled: bool) -> None:
        """Compare with everything the server says. `settled`: no entry is open.

        No event may be sent meanwhile.
        """
        stored = defaultdict(list)
        for account in range(ACCOUNTS):
            async for event in client.list_events(account, *ALWAYS, page_size=10_000):
                stored[account].append(event)
        self._check_events([event for events in stored.values() for event in events], settled=settled)
        for account in range(ACCOUNTS):
            await _check_totals(client, account, stored[account])
        alerts = await all_alerts(client)
        assert alerts[: len(self.alerts)] == self.alerts, "alert records changed"
        self.alerts = alerts
        found = {
            (
                alert.account_id,
                alert.threshold_code,
                alert.partition,
                alert.event_offset,
                alert.value_at_cross,
                alert.first_multiple,
                alert.last_multiple,
            )
            for alert in alerts
        }
        assert len(found) == len(alerts), "an alert twice"
        assert found == expected_alerts(stored)

    def _check_events(self, stored, *, settled: bool) -> None:
        places = set()
        seen = set()
        for event in stored:
            key = key_of(event)
            fact = self.facts.get(key)
            assert fact is not None, f"stored, but never sent: {event}"
            assert key not in seen, f"stored twice: {event}"
            seen.add(key)
            place = (event.partition, event.offset)
            assert place not in places, f"two events at {place}"
            places.add(place)
            assert fact.seen in (None, place), f"{event} has moved from {fact.seen}"
            fact.seen = place
        for key, fact in self.facts.items():
            told = {e.place for e in fact.entries if e.outcome in (Outcome.STORED, Outcome.DUPLICATE)}
            assert len(told) <= 1, f"{key} is said to lie at {told}"
            if told:
                assert fact.seen == next(iter(told)), f"acknowledged at {told}, but {key} is at {fact.seen}"
                assert key in seen, f"acknowledged, but missing: {key}"
            else:
                assert key in seen or fact.seen is None, f"{key} was there and is gone"
            outcomes = [e.outcome for e in fact.entries]
            if fact.original is not None:
                assert fact.seen is None, f"stored under the id of another: {key}"
                for entry in fact.entries:
                    if entry.outcome is not Outcome.OPEN:
                        assert entry.outcome is Outcome.CONFLICT
                        assert entry.place == self.facts[key_of(fact.original)].seen
                continue
            assert outcomes.count(Outcome.STORED) <= 1, f"{key} is said to be stored twice"
            if settled:
                assert Outcome.OPEN not in outcomes
                assert outcomes.count(Outcome.STORED) == 1, f"{key}: {outcomes}"


def _copy(event: Event) -> Event:
    """An equal event that is another object."""
    return Event(
        account_id=event.account_id,
        metric_code=event.metric_code,
        value=event.value,
        timestamp=event.timestamp,
        properties=dict(event.properties),
        operation_type=event.operation_type,
        id=event.id,
    )


async def _check_totals(client: AsyncClient, account: int, stored) -> None:
    """Compare running totals and merged cells with a count of the listed events."""
    for metric in ("used", "peak", "seats"):
        events = [event for event in stored if event.metric_code == metric]
        values = [event.value for event in events]
        period = (await client.query(account, metric, ALWAYS)).value
        running = (await client.query_realtime(account, metric)).value
        for totals in (period, running):
            assert totals.count == len(events), f"account {account}, {metric}: {totals}"
            if metric == "seats":
                assert totals.unique == len(_members(events))
            else:
                assert totals.sum == sum(values)
                assert totals.max == max(values, default=None)
                assert totals.min == min(values, default=None)
    rows = await client.breakdown(account, "used", ALWAYS, group_by="provider")
    by_group = {row.group["provider"]: row.value.sum for row in rows}
    expected: dict[object, int] = defaultdict(int)
    for event in stored:
        if event.metric_code == "used":
            provider = event.properties.get("provider")
            expected[OTHER if provider == "own" else provider] += event.value
    assert by_group == expected


def _members(events) -> set[int]:
    members = set()
    for event in sorted(events, key=lambda event: (event.timestamp_ns, event.offset)):
        if event.operation_type is OperationType.REMOVE:
            members.discard(event.value)
        else:
            members.add(event.value)
    return members


def expected_alerts(stored) -> set[tuple]:
    """The crossings, by adding up the listed events in the order of their offsets."""
    crossings = set()
    for account, events in stored.items():
        total = 0
        for event in sorted(events, key=lambda event: event.offset):
            if event.metric_code != "used":
                continue
            before, total = total, total + event.value
            at = (event.partition, event.offset, total)
            for code, value in (("low", LOW), ("high", HIGH)):
                if before < value <= total:
                    crossings.add((account, code, *at, 1, 1))
            if before // STEP < total // STEP:
                crossings.add((account, "step", *at, before // STEP + 1, total // STEP))
    return crossings


async def all_alerts(client: AsyncClient) -> list[object]:
    """All alert records, ordered by when they were recorded as far as there is an order."""
    found, since = [], {}
    while True:
        page = await client.list_alerts(since=since, limit=500)
        found += page
        since = page.next
        if not page.more:
            break
    for alert in found:
        assert alert.id, "an alert has an id"
    positions = defaultdict(list)
    for alert in found:
        positions[alert.partition].append(alert.position)
    assert all(p == sorted(set(p)) for p in positions.values()), "alerts in order, each once"
    return sorted(found, key=lambda alert: (alert.triggered_at, alert.partition, alert.position))


async def create_metrics(client: AsyncClient) -> None:
    """Create what the events are of."""
    for schema in SCHEMAS:
        await client.metrics.create(schema)


class Load:
    """Clients that send, each with several calls at once.

    Two gates: `fresh` lets workers begin a new call, `again` lets them resume one that has failed.
    """

    def __init__(
        self,
        address: str | list[str],
        ledger: Ledger,
        *,
        clients: int = 3,
        calls: int = 3,
        timeout: float = 60.0,
    ) -> None:
        self.ledger = ledger
        self.timeout = timeout  # of the calls: how long the SDK rides out a dead server by itself
        self.failures: list[IngestError] = []  # what callers got to see
        self._clients = [AsyncClient(address, timeout=60.0) for _ in range(clients)]
        self._calls = calls
        self._fresh = asyncio.Event()
        self._again = asyncio.Event()
        self._under_way = 0  # calls
        self._unfinished = 0  # batches with open entries, under way or failed
        self._changed = asyncio.Event()  # set, and replaced, whenever one of these changes

    @contextlib.asynccontextmanager
    async def running(self):
        """Run the clients; stop them at the end. A defect that a worker meets is raised here."""
        for client in self._clients:
            await client.connect()
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._work(c)) for c in self._clients for _ in range(self._calls)]
                yield self
                for task in tasks:
                    task.cancel()
        finally:
            for client in self._clients:
                await client.close(timeout=0)

    def resume(self) -> None:
        """Let the workers send."""
        self._fresh.set()
        self._again.set()

    async def pause(self) -> None:
        """Let the workers begin and resume nothing, and wait until no call is under way."""
        self._fresh.clear()
        self._again.clear()
        await self._wait(lambda: not self._under_way)

    async def settle(self) -> None:
        """Let the workers resume what is open, begin nothing, and wait until nothing is open."""
        self._fresh.clear()
        self._again.set()
        await self._wait(lambda: not self._unfinished)

    async def wait_acknowledged(self, more: int) -> None:
        """Wait until `more` entries than now are acknowledged."""
        target = self.ledger.acknowledged + more
        await self._wait(lambda: self.ledger.acknowledged >= target)

    async def _wait(self, condition) -> None:
        try:
            async with asyncio.timeout(WAIT_SECONDS_MAX):
                while not condition():
                    await self._changed.wait()
        except TimeoutError:
            raise AssertionError(
                f"the callers don't get on; the last failure: {self.failures[-1:]}"
            ) from None

    def _change(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _work(self, client: AsyncClient) -> None:
        while True:
            await self._fresh.wait()
            self._unfinished += 1
            entries = self.ledger.batch()
            failure: IngestError | None = None
            while True:
                try:
                    receipt = await self._call(client, entries, failure)
                except IngestError as error:
                    failure = error
                else:
                    break
                assert failure.retriable, f"no way to go on: {failure!r}"
                self.failures.append(failure)
                self.ledger.note(entries, failure.receipt)
                await self._again.wait()
            self.ledger.note(entries, receipt)
            self._unfinished -= 1
            self._change()

    async def _call(self, client: AsyncClient, entries: list[Entry], failure: IngestError | None):
        self._under_way += 1
        try:
            if failure is not None and self.ledger.rng.random() < 0.5:
                return await failure.retry(timeout=self.timeout)
            return await client.ingest([entry.event for entry in entries], timeout=self.timeout)
        finally:
            self._under_way -= 1
            self._change()


@dataclass
class Sent:
    """A chunk's bytes, and the first answer to them; None until there was one."""

    data: bytes
    entries: list[Entry]
    answer: object = None


class Repeater:
    """Sends chunks as raw bytes, and the same bytes again: every answer must equal the first."""

    def __init__(self, server, ledger: Ledger) -> None:
        self._server = server
        self._ledger = ledger
        self._producer = ledger.rng.getrandbits(64)
        self._chunks: list[Sent] = []

    async def send(self) -> None:
        """Send new chunks, one after the other, until the server dies. The last one's outcome stays open."""
        with contextlib.suppress(UnavailableError):
            async with self._server.peer(self._server.address) as peer:
                while True:
                    self._chunks.append(self._seal(self._ledger.batch(8)))
                    await self._ask(peer, self._chunks[-1])

    async def send_one(self, events: list[Event]) -> None:
        """Send these events as a new chunk."""
        async with self._server.peer(self._server.address) as peer:
            self._chunks.append(self._seal([self._ledger.enter(event) for event in events]))
            await self._ask(peer, self._chunks[-1])

    async def repeat(self, last: int = 60) -> None:
        """Send the last chunks again and compare the answers."""
        async with self._server.peer(self._server.address) as peer:
            for sent in self._chunks[-last:]:
                await self._ask(peer, sent)

    def forget_last(self) -> None:
        """The last chunk is to be sent as if it had never been answered."""
        self._chunks[-1].answer = None
        for entry in self._chunks[-1].entries:
            entry.outcome, entry.place = Outcome.OPEN, None
            fact = self._ledger.facts[key_of(entry.event)]
            self._ledger.alerts = [
                a for a in self._ledger.alerts if (a.partition, a.event_offset) != fact.seen
            ]
            fact.seen = None

    def _seal(self, entries: list[Entry]) -> Sent:
        events = [entry.event for entry in entries]
        encoded = encode_events(events, self._producer, len(self._chunks) + 1, time.time_ns())
        assert len(encoded.chunks) == 1
        assert not encoded.bad
        return Sent(encoded.chunks[0].data, entries)

    async def _ask(self, peer, sent: Sent) -> None:
        frame = await peer.request(FrameType.INGEST, sent.data)
        answer = decode_receipt(frame.body)
        assert not answer.failures
        if sent.answer is None:
            sent.answer = answer
            self._note(sent.entries, answer)
        assert answer == sent.answer, "a repeat was answered otherwise than the first time"

    def _note(self, entries: list[Entry], receipt) -> None:
        """Read a receipt from the bytes up, without the SDK's reading of it."""
        outcomes = {outcome.index: outcome for outcome in receipt.outcomes}
        bases = {run.partition: run.base_offset for run in receipt.runs}
        passed: dict[int, int] = defaultdict(int)
        for index, entry in enumerate(entries):
            partition = partition_of(entry.event.account_id, receipt.partition_count)
            place = (partition, bases[partition] + passed[partition]) if partition in bases else None
            passed[partition] += 1
            outcome = outcomes.get(index)
            if outcome is None:
                self._ledger.settle(entry, Outcome.STORED, place)
            elif outcome.reason == Reason.DUPLICATE:
                self._ledger.settle(entry, Outcome.DUPLICATE, (outcome.partition, outcome.offset))
            elif outcome.reason == Reason.CONFLICT:
                self._ledger.settle(entry, Outcome.CONFLICT, (outcome.partition, outcome.offset))
            else:
                self._ledger.settle(entry, Outcome.REJECTED, None)
