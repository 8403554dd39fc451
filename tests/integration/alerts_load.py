"""A load that crosses thresholds by the thousand, and those who follow it; compared with the log in the end.

`Spending` sends events, each with an id, until every one is acknowledged, so that what is in the log is known in the
end; what it crosses is then counted in plain Python, event by event. `Follower` is a subscriber in this process that
drops everything now and then and goes on from offsets that it has saved; `FollowerProcess` is one that is killed.
Each life of a follower must have got a piece of what there is without a gap, and all of them together everything.
"""

import asyncio
import contextlib
import json
import random
import sys
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from processes import Process

from tallymark import (
    AggType,
    AlertThreshold,
    AsyncClient,
    Event,
    IngestError,
    MetricSchema,
    OperationType,
    PeriodType,
)

ALWAYS = (0, 2**62)
ACCOUNTS = 40
CALL_EVENTS = 20
PAUSE_SECONDS = 0.02  # between a sender's calls: the load is steady, not as high as it can be
RIDING_SECONDS = 60.0
POLL_SECONDS = 0.05
WAIT_SECONDS_MAX = 60.0
LIFE_ALERTS_MAX = 150  # a follower has crashed before it got more
STEP = 10
ONCE = 150

SPENT = MetricSchema(
    code="spent",
    agg_type=AggType.SUM,
    period_type=PeriodType.LIFETIME,
    thresholds=[
        AlertThreshold(code="once", value=ONCE),
        AlertThreshold(code="step", value=STEP, recurring=True),
    ],
)
USERS = MetricSchema(
    code="users",
    agg_type=AggType.COUNT_UNIQUE,
    period_type=PeriodType.LIFETIME,
    thresholds=[AlertThreshold(code="each", value=1, recurring=True)],
)


class Crossing(NamedTuple):
    """An alert, as far as the log says what it must be."""

    partition: int
    offset: int
    account: int
    metric: str
    threshold: str
    value: int
    first: int
    last: int


def crossing_of(alert) -> Crossing:
    """What an alert says."""
    return Crossing(
        alert.partition,
        alert.event_offset,
        alert.account_id,
        alert.metric_code,
        alert.threshold_code,
        alert.value_at_cross,
        alert.first_multiple,
        alert.last_multiple,
    )


class Spending:
    """Clients that send, and what they were told."""

    def __init__(self, addresses: list[str], seed: int, *, senders: int = 3) -> None:
        self.addresses = addresses
        self.rng = random.Random(seed)
        self.acknowledged = 0
        self._sent: set[str] = set()
        self._senders = senders

    @contextlib.asynccontextmanager
    async def running(self):
        """Send until the block ends and everything has its answer."""
        enough = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            for _ in range(self._senders):
                group.create_task(self._send(enough))
            try:
                yield self
            finally:
                enough.set()

    async def _send(self, enough: asyncio.Event) -> None:
        async with AsyncClient(self.addresses) as client:
            while not enough.is_set():
                events = [self._event() for _ in range(self.rng.randrange(1, CALL_EVENTS))]
                receipt = await self._settle(client, events)
                assert not receipt.rejected
                self.acknowledged += len(events)
                await asyncio.sleep(PAUSE_SECONDS)

    async def _settle(self, client: AsyncClient, events: list[Event]):
        failure = None
        while True:
            try:
                if failure is not None:
                    return await failure.retry(timeout=RIDING_SECONDS)
                return await client.ingest(events, timeout=RIDING_SECONDS)
            except IngestError as error:
                failure = error
            assert failure.retriable, f"no way to go on: {failure!r}"

    def _event(self) -> Event:
        rng = self.rng
        number = f"n{len(self._sent)}"
        self._sent.add(number)
        account = rng.randrange(ACCOUNTS)
        properties = {"number": number}
        if rng.random() < 0.2:
            operation = rng.choice((OperationType.ADD, OperationType.REMOVE))
            return Event(
                account,
                "users",
                rng.randrange(30),
                properties=properties,
                operation_type=operation,
                id=number,
            )
        return Event(account, "spent", rng.choice((1, 4, 9, 25, 60, -7)), properties=properties, id=number)

    async def wait_acknowledged(self, more: int) -> None:
        """Wait until `more` events than now are acknowledged."""
        await self.wait_until_acknowledged(self.acknowledged + more)

    async def wait_until_acknowledged(self, target: int) -> None:
        """Wait until `target` events are acknowledged in all."""
        async with asyncio.timeout(WAIT_SECONDS_MAX):
            while self.acknowledged < target:  # noqa: ASYNC110 - the senders tell nobody
                await asyncio.sleep(POLL_SECONDS)

    async def crossings(self, client: AsyncClient) -> list[Crossing]:
        """What the events in the log cross. They are the events that were sent, each once."""
        crossings: list[Crossing] = []
        numbers: list[str] = []
        for account in range(ACCOUNTS):
            total, is_past, highest, members, most = 0, False, 0, set(), 0
            events = [event async for event in client.list_events(account, *ALWAYS, page_size=10_000)]
            numbers += [event.properties["number"] for event in events]
            for event in sorted(events, key=lambda event: event.offset):
                place = (event.partition, event.offset, account, event.metric_code)
                if event.metric_code == "spent":
                    total += event.value
                    if total >= ONCE and not is_past:
                        is_past = True
                        crossings.append(Crossing(*place, "once", total, 1, 1))
                    if total // STEP > highest:
                        crossings.append(Crossing(*place, "step", total, highest + 1, total // STEP))
                        highest = total // STEP
                elif event.operation_type is OperationType.REMOVE:
                    members.discard(event.value)
                else:
                    members.add(event.value)
                    if len(members) > most:
                        most += 1
                        crossings.append(Crossing(*place, "each", most, most, most))
        assert sorted(numbers) == sorted(self._sent), "what is stored isn't what was acknowledged"
        return crossings


class Life(NamedTuple):
    """What a follower got from one start to its end."""

    since: dict[str, int]
    alerts: list[tuple[int, int, str]]  # partition, position, id


class Expected:
    """All alerts there are, checked against the log."""

    def __init__(self, alerts: list, crossings: list[Crossing]) -> None:
        self.alerts = alerts
        found = [crossing_of(alert) for alert in alerts]
        assert sorted(found) == sorted(crossings), "not exactly one alert for each crossing"
        assert len({alert.id for alert in alerts}) == len(alerts)
        positions = defaultdict(list)
        for alert in alerts:
            positions[alert.partition].append((alert.position, alert.event_offset))
        for pairs in positions.values():
            assert [position for position, _ in pairs] == list(range(len(pairs)))
            assert pairs == sorted(pairs), "alerts are in the order of their events"

    def matching(self, account_ids: list[int], metric_codes: list[str]) -> list[tuple[int, int, str]]:
        """Those that a filter wants."""
        return [
            (alert.partition, alert.position, alert.id)
            for alert in self.alerts
            if (not account_ids or alert.account_id in account_ids)
            and (not metric_codes or alert.metric_code in metric_codes)
        ]

    def check(self, name: str, wanted: list[tuple[int, int, str]], lives: list[Life]) -> None:
        """Each life is a piece without a gap, in order; together they have everything."""
        by_partition = defaultdict(list)
        for alert in wanted:
            by_partition[alert[0]].append(alert)
        for number, life in enumerate(lives):
            got = defaultdict(list)
            for alert in life.alerts:
                got[alert[0]].append(alert)
            for partition, alerts in got.items():
                start = life.since.get(str(partition), 0)
                piece = [a for a in by_partition[partition] if start <= a[1] <= alerts[-1][1]]
                assert alerts == piece, f"{name}, life {number}, partition {partition} from {start}"
        missing = set(wanted) - {alert for life in lives for alert in life.alerts}
        assert not missing, f"{name} has missed {len(missing)}: {sorted(missing)[:5]}"


async def all_alerts(client: AsyncClient) -> list:
    """Every alert, in order within each partition."""
    found, since = [], {}
    while True:
        page = await client.list_alerts(since=since, limit=1_000)
        found += page
        since = page.next
        if not page.more:
            return found


class Follower:
    """A subscriber that crashes."""

    def __init__(self, name: str, addresses: list[str], seed: int, account_ids=(), metric_codes=()) -> None:
        self.name = name
        self.account_ids = list(account_ids)
        self.metric_codes = list(metric_codes)
        self.lives: list[Life] = []
        self.seen: set[str] = set()  # ids
        self._addresses = addresses
        self._rng = random.Random(seed)

    async def run(self) -> None:
        """Follow until cancelled."""
        saved = "{}"
        rng = self._rng
        while True:
            life = Life(json.loads(saved), [])
            self.lives.append(life)
            crash_at = rng.randrange(20, LIFE_ALERTS_MAX)
            async with AsyncClient(self._addresses) as client:
                sub = client.alerts.subscribe(
                    account_ids=self.account_ids or None,
                    metric_codes=self.metric_codes or None,
                    since=life.since,
                    buffer=rng.choice((1, 7, 64)),
                )
                async with sub:
                    async for alert in sub:
                        if rng.random() < 0.2:
                            saved = json.dumps(sub.offsets())
                        if len(life.alerts) == crash_at:
                            break  # this one is in its hands, and not handled
                        life.alerts.append((alert.partition, alert.position, alert.id))
                        self.seen.add(alert.id)


class FollowerProcess(Process):
    """A subscriber that is a process of its own; it notes what it got, and its offsets, in files."""

    def __init__(self, folder: Path, addresses: list[str]) -> None:
        self.notes = folder / "notes"
        script = Path(__file__).with_name("alerts_follower.py")
        command = [sys.executable, str(script), ",".join(addresses), str(self.notes), str(folder / "offsets")]
        super().__init__("follower", command, log=folder / "follower.log")

    def lives_noted(self) -> list[Life]:
        """What each life got."""
        lives: list[Life] = []
        text = self.notes.read_text() if self.notes.exists() else ""
        for line in text.splitlines():
            noted = json.loads(line)
            if isinstance(noted, dict):
                lives.append(Life(noted, []))
            else:
                lives[-1].alerts.append(tuple(noted))
        return lives

    def seen(self) -> set[str]:
        """Ids of what it got."""
        return {alert[2] for life in self.lives_noted() for alert in life.alerts}
