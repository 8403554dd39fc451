"""What a soak sends and asks, and the ledger of what must come of it.

Batch `n` is made of `n` alone, so nothing that was sent has to be kept. Of ten batches seven are usual events (a million
accounts, two dimensions, no time of their own), one has ids, one is late, one is of members. Some batches with ids are
sent a second time, which must store nothing. One account has a hundredth of all events.

The ledger has each metric's totals, and of a sample of accounts everything by dimension values: what receipts said was
stored, no less and no more.
"""

from __future__ import annotations

import asyncio
import collections
import itertools
import time
from collections.abc import Awaitable, Callable

import msgspec
import numpy as np
import numpy.typing as npt

from tallymark import (
    AggType,
    AlertThreshold,
    AsyncClient,
    DimensionFilter,
    MetricSchema,
    Period,
    TallymarkError,
    current_month,
)

BATCH = 1_000
PROVIDERS = ("aws", "gcp", "azure")
REGIONS = ("eu", "us", "ap", "sa")
COMBINATIONS = tuple(itertools.product(PROVIDERS, REGIONS))
DAY_NS = 86_400 * 10**9
LATE_DAYS = 7

_SAMPLES = 1_000
_LARGEST = BATCH // 100  # events of a batch that are the largest account's, which is account 0
_LATE_ACCOUNTS = 20_000
_MEMBER_ACCOUNTS = 10_000
_MEMBERS = 100
_TEN = ("used",) * 7 + ("jobs", "late", "seats")  # kinds of ten batches
_REPEATED = 5  # one in so many batches with ids is followed by an old one
_POOL = 64
_TIMEOUT_S = 600.0  # of a call: it is tried again until then
_CHECKERS = 8

Ints = npt.NDArray[np.int64]

SCHEMAS = (
    MetricSchema(
        code="used",
        agg_type=AggType.SUM,
        filters=[
            DimensionFilter(key="provider", values=list(PROVIDERS)),
            DimensionFilter(key="region", values=list(REGIONS)),
        ],
        thresholds=[AlertThreshold(code="each", value=100_000, recurring=True)],
    ),
    MetricSchema(code="jobs"),
    MetricSchema(code="seats", agg_type=AggType.COUNT_UNIQUE),
)


class Wrong(Exception):
    """An answer that cannot be right."""


class Batch(msgspec.Struct, frozen=True):
    """What one call sends."""

    kind: str
    metric: str
    accounts: npt.NDArray[np.uint64]
    values: Ints
    combinations: Ints | None  # places in COMBINATIONS
    properties: dict[str, list[str]] | None
    times: Ints | None
    ids: Ints | None


class Generator:
    """Makes batches by their numbers.

    Args:
        accounts: how many there are.
        seed: of everything random.
    """

    def __init__(self, accounts: int, seed: int) -> None:
        self.accounts = accounts
        self._seed = seed
        rng = np.random.default_rng(seed)
        self._combinations = [rng.integers(0, len(COMBINATIONS), BATCH) for _ in range(_POOL)]
        self._properties = [
            {
                "provider": [COMBINATIONS[place][0] for place in places.tolist()],
                "region": [COMBINATIONS[place][1] for place in places.tolist()],
            }
            for places in self._combinations
        ]

    def batch(self, number: int, now_ns: int) -> Batch:
        """Batch `number`; the times of late events are before `now_ns`, and the only thing that depends on it."""
        rng = np.random.default_rng((self._seed, number))
        kind = _TEN[number % len(_TEN)]
        among = {"late": _LATE_ACCOUNTS, "seats": _MEMBER_ACCOUNTS}.get(kind, self.accounts)
        accounts = rng.integers(0, min(among, self.accounts), BATCH, dtype=np.uint64)
        accounts[:_LARGEST] = 0
        if kind == "jobs":
            ids = number * BATCH + np.arange(BATCH, dtype=np.int64)
            return Batch(kind, "jobs", accounts, np.ones(BATCH, np.int64), None, None, None, ids)
        if kind == "seats":
            values = rng.integers(0, _MEMBERS, BATCH, dtype=np.int64)
            return Batch(kind, "seats", accounts, values, None, None, None, None)
        values = rng.integers(1, 100, BATCH, dtype=np.int64)
        place = number % _POOL
        times = None
        if kind == "late":
            times = now_ns - rng.integers(3_600 * 10**9, LATE_DAYS * DAY_NS, BATCH, dtype=np.int64)
        return Batch(
            kind, "used", accounts, values, self._combinations[place], self._properties[place], times, None
        )


class Ledger:
    """What was stored, as receipts have said."""

    def __init__(self, accounts: int) -> None:
        self._stride = max(accounts // _SAMPLES, 1)
        self.sampled = [sample * self._stride for sample in range(min(_SAMPLES, accounts))]
        count = len(self.sampled)
        self.counts = dict.fromkeys(("used", "jobs", "seats"), 0)
        self.sums = dict.fromkeys(("used",), 0)
        # By sample, and within each by combination.
        self.used_counts: Ints = np.zeros(count * len(COMBINATIONS), np.int64)
        self.used_sums: Ints = np.zeros(count * len(COMBINATIONS), np.int64)
        self.jobs: Ints = np.zeros(count, np.int64)
        self.seats: Ints = np.zeros(count, np.int64)
        self.members: npt.NDArray[np.bool_] = np.zeros((count, _MEMBERS), np.bool_)

    @property
    def events(self) -> int:
        """All that were stored."""
        return sum(self.counts.values())

    def used(self, sample: int) -> list[tuple[int, int]]:
        """A sampled account's count and sum of `used`, by combination."""
        rows = slice(sample * len(COMBINATIONS), (sample + 1) * len(COMBINATIONS))
        return list(zip(self.used_counts[rows].tolist(), self.used_sums[rows].tolist(), strict=True))

    def stored(self, batch: Batch) -> None:
        """All of a batch was."""
        self.counts[batch.metric] += BATCH
        if batch.metric == "used":
            self.sums["used"] += int(batch.values.sum())
        accounts = batch.accounts.view(np.int64)
        chosen = np.flatnonzero(
            (accounts % self._stride == 0) & (accounts < self._stride * len(self.sampled))
        )
        samples = accounts[chosen] // self._stride
        if batch.combinations is not None:
            places = batch.combinations[chosen]
            rows = samples * len(COMBINATIONS) + places
            np.add.at(self.used_counts, rows, 1)
            np.add.at(self.used_sums, rows, batch.values[chosen])
        elif batch.metric == "jobs":
            np.add.at(self.jobs, samples, 1)
        else:
            np.add.at(self.seats, samples, 1)
            self.members[samples, batch.values[chosen]] = True


class Sender:
    """Sends batches and keeps the ledger.

    Attributes:
        times_s: of receipts since `take_times`.
        repeated: events that were sent a second time.
    """

    def __init__(self, client: AsyncClient, generator: Generator, ledger: Ledger) -> None:
        self.times_s: list[float] = []
        self.repeated = 0
        self._client = client
        self._generator = generator
        self._ledger = ledger
        self._acknowledged: collections.deque[int] = collections.deque(maxlen=1_000_000)  # batches with ids
        self._rng = np.random.default_rng(1)

    async def send(self, number: int) -> None:
        """Send batch `number`, and maybe an old one again."""
        batch = self._generator.batch(number, time.time_ns())
        stored, duplicates = await self._ingest(batch)
        if (stored, duplicates) != (BATCH, 0):
            raise Wrong(f"batch {number}: {stored} of {BATCH} events were stored")
        self._ledger.stored(batch)
        if batch.kind == "jobs":
            if self._acknowledged and self._below(_REPEATED) == 0:
                await self._repeat(self._acknowledged[self._below(len(self._acknowledged))])
            self._acknowledged.append(number)

    async def _repeat(self, number: int) -> None:
        stored, duplicates = await self._ingest(self._generator.batch(number, 0))
        self.repeated += BATCH
        if (stored, duplicates) != (0, BATCH):
            raise Wrong(f"batch {number} again: {stored} events were stored, {duplicates} were duplicates")

    async def _ingest(self, batch: Batch) -> tuple[int, int]:
        begun = time.perf_counter()
        receipt = await self._client.ingest_columns(
            batch.metric,
            account_ids=batch.accounts,
            values=batch.values,
            properties=batch.properties,
            timestamps_ns=batch.times,
            ids=batch.ids,
            timeout=_TIMEOUT_S,
        )
        self.times_s.append(time.perf_counter() - begun)
        return receipt.n_stored, receipt.n_duplicates

    def _below(self, bound: int) -> int:
        return int(self._rng.integers(bound))

    def take_times(self) -> list[float]:
        """The times since the last call, sorted."""
        times, self.times_s = sorted(self.times_s), []
        return times


class Asker:
    """Asks queries of all kinds, and looks at those answers that the ledger knows bounds of.

    Attributes:
        times_s: by kind, since `take_times`.
        failures: how often what was not answered, by kind and error.
    """

    def __init__(self, client: AsyncClient, ledger: Ledger, since_ns: int, accounts: int) -> None:
        self.times_s: dict[str, list[float]] = {}
        self.failures: collections.Counter[str] = collections.Counter()
        self._client = client
        self._ledger = ledger
        self._since_ns = since_ns
        self._accounts = accounts
        self._rng = np.random.default_rng(2)
        kinds = {
            "realtime": (8, self._realtime),
            "month": (4, self._month),
            "breakdown": (2, self._breakdown),
            "series": (2, self._series),
            "ragged": (2, self._ragged),
            "events": (2, self._events),
            "alerts": (1, self._alerts),
        }
        self._kinds: list[tuple[str, Callable[[], Awaitable[None]]]] = [
            (name, ask) for name, (weight, ask) in kinds.items() for _ in range(weight)
        ]

    async def ask(self) -> None:
        """One query, of whatever kind."""
        await self._timed(*self._kinds[self._below(len(self._kinds))])

    async def ask_top(self) -> None:
        """The one that looks at all accounts."""
        await self._timed("top", self._top)

    async def _timed(self, name: str, ask: Callable[[], Awaitable[None]]) -> None:
        begun = time.perf_counter()
        try:
            await ask()
        except TallymarkError as error:
            # What takes too long, or is refused, is told in the end; nothing that is right or wrong follows from it.
            self.failures[f"{name}: {error}"] += 1
        self.times_s.setdefault(name, []).append(time.perf_counter() - begun)

    def _below(self, bound: int) -> int:
        return int(self._rng.integers(bound))

    def _account(self) -> int:
        return self._below(self._accounts)

    async def _realtime(self) -> None:
        await self._client.query_realtime(self._account(), "used")

    async def _month(self) -> None:
        provider = PROVIDERS[self._below(len(PROVIDERS))]
        await self._client.query(0, "used", current_month(), filters={"provider": provider})

    async def _breakdown(self) -> None:
        await self._client.breakdown(
            self._account(), "used", current_month(), group_by=["provider", "region"]
        )

    async def _series(self) -> None:
        now = time.time_ns()
        await self._client.series(self._account(), "used", Period(now - 7 * DAY_NS, now), unit="day")

    async def _ragged(self) -> None:
        """All of an account's events, by a range that begins and ends anywhere: no less than is acknowledged."""
        sample = 1 + self._below(len(self._ledger.sampled) - 1)
        least = sum(count for count, _ in self._ledger.used(sample))
        account = self._ledger.sampled[sample]
        start = self._since_ns + 1 + self._below(3_600 * 10**9)
        usage = await self._client.query(account, "used", Period(start, time.time_ns() + 60 * 10**9))
        if usage.value.count < least:
            raise Wrong(
                f"account {account} has {usage.value.count} events, and {least} had been acknowledged"
            )

    async def _events(self) -> None:
        account, now = self._account(), time.time_ns()
        async for _ in self._client.list_events(account, self._since_ns, now, page_size=100):
            return

    async def _alerts(self) -> None:
        await self._client.list_alerts(self._account(), limit=100)

    async def _top(self) -> None:
        await self._client.top_accounts("used", current_month(), limit=10)

    def take_times(self) -> dict[str, list[float]]:
        """The times since the last call, by kind."""
        times, self.times_s = self.times_s, {}
        return times


async def check(client: AsyncClient, ledger: Ledger, since_ns: int, samples: int, between_ns: int) -> int:
    """Compare answers with the ledger, when nothing is under way: of so many of the accounts it knows.

    Args:
        client: of the server.
        ledger: what was stored.
        since_ns: before the first event's time.
        samples: how many accounts.
        between_ns: a moment while the load ran: usage before and after it add up.

    Returns:
        How many numbers were compared.

    Raises:
        Wrong: a number that is not right.
    """
    start = since_ns // DAY_NS * DAY_NS
    end = (time.time_ns() // DAY_NS + 1) * DAY_NS
    whole = Period(start, end)
    step = max(len(ledger.sampled) // samples, 1)
    waiting = list(range(0, len(ledger.sampled), step))
    compared = 0

    def same(what: str, found: object, wanted: object) -> None:
        nonlocal compared
        compared += 1
        if found != wanted:
            raise Wrong(f"{what}: {found}, but {wanted} is right")

    async def one(sample: int) -> None:
        account = ledger.sampled[sample]
        wanted = ledger.used(sample)
        rows = await client.breakdown(account, "used", whole, group_by=["provider", "region"])
        found = {
            (row.group["provider"], row.group["region"]): (row.value.count, row.value.sum) for row in rows
        }
        for place, combination in enumerate(COMBINATIONS):
            same(f"account {account}, {combination}", found.pop(combination, (0, 0)), wanted[place])
        same(f"account {account}, other combinations", {key: v for key, v in found.items() if v[0]}, {})
        count, total = sum(pair[0] for pair in wanted), sum(pair[1] for pair in wanted)
        parts = [
            await client.query(account, "used", period)
            for period in (Period(start, between_ns), Period(between_ns, end))
        ]
        same(f"account {account}, two parts: count", sum(part.value.count for part in parts), count)
        same(f"account {account}, two parts: sum", sum(part.value.sum for part in parts), total)
        jobs = await client.query(account, "jobs", whole)
        same(f"account {account}, jobs", jobs.value.count, int(ledger.jobs[sample]))
        seats = await client.query(account, "seats", whole)
        unique = int(ledger.members[sample].sum())
        same(
            f"account {account}, seats",
            (seats.value.count, seats.value.unique),
            (int(ledger.seats[sample]), unique),
        )
        if sample and sample % 50 == 0:
            listed: collections.Counter[str] = collections.Counter()
            async for event in client.list_events(account, start, end, page_size=10_000):
                listed[event.metric_code] += 1
            events = {"used": count, "jobs": int(ledger.jobs[sample]), "seats": int(ledger.seats[sample])}
            same(f"account {account}, its events", dict(listed), {key: n for key, n in events.items() if n})

    async def worker() -> None:
        while waiting:
            await one(waiting.pop())

    async with asyncio.TaskGroup() as group:
        for _ in range(_CHECKERS):
            group.create_task(worker())
    return compared
