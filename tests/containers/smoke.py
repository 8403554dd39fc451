"""What every cluster must be able to do: the README's quickstart, writes and reads through every node.

A `Ledger` writes without a pause and knows exactly what the totals must be: each event has an id and is passed to
`ingest` until there is a definite answer, so in the end every event is stored once, or something is wrong.
"""

import asyncio
import contextlib
import re
from collections import Counter
from pathlib import Path

from tallymark import (
    AggType,
    AlertThreshold,
    AlreadyExistsError,
    AsyncClient,
    Event,
    MetricSchema,
    PeriodType,
    TallymarkError,
)
from tallymark_protocol.identifiers import partition_of

ROOT = Path(__file__).resolve().parents[2]
METRIC = "container_events"
CALL_SECONDS = 10.0
TOGETHER = 3  # events a call
SCHEMA = MetricSchema(code=METRIC, agg_type=AggType.SUM, period_type=PeriodType.LIFETIME)
# Every event crosses its account's next multiple.
LIMITED = MetricSchema(
    code="container_alerts",
    agg_type=AggType.COUNT,
    period_type=PeriodType.LIFETIME,
    thresholds=[AlertThreshold(code="each", value=1, recurring=True)],
)


async def quickstart(address: str) -> None:
    """Run the README's first Python snippet against a gateway."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    snippet = re.search(r"^```python\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)
    assert snippet is not None, "the README has a quickstart"
    source = snippet.group(1).replace("localhost:7001", address)
    await asyncio.to_thread(
        exec, compile(source, "README.md", "exec"), {}
    )  # a program, with a loop of its own


def accounts_of_partitions(partition_count: int, first: int = 1) -> list[int]:
    """An account for every partition, in the partitions' order; none below the first."""
    found: dict[int, int] = {}
    account = first
    while len(found) < partition_count:
        found.setdefault(partition_of(account, partition_count), account)
        account += 1
    return [found[partition] for partition in range(partition_count)]


class Ledger:
    """Writers and what they were told.

    Attributes:
        stored: acknowledged events, by account.
        values: the sum of their values, by account.
        troubles: what failed calls said, before they were repeated.
    """

    def __init__(self, addresses: list[str], accounts: list[int]) -> None:
        self.stored: Counter[int] = Counter()
        self.values: Counter[int] = Counter()
        self.troubles: Counter[str] = Counter()
        self._addresses = addresses
        self._accounts = accounts
        self._stopping = False

    async def _write(self, account: int, position: int) -> None:
        # Each writer begins at another gateway.
        turned = self._addresses[position % len(self._addresses) :] + self._addresses
        async with AsyncClient(turned, timeout=CALL_SECONDS) as client:
            serial = 0
            while not self._stopping:
                events = [
                    Event(
                        account_id=account, metric_code=METRIC, value=serial + i, id=f"{account}-{serial + i}"
                    )
                    for i in range(TOGETHER)
                ]
                serial += TOGETHER
                await self._settle(client, events)
                self.stored[account] += len(events)
                self.values[account] += sum(event.value for event in events)

    async def _settle(self, client: AsyncClient, events: list[Event]) -> None:
        """Pass events to `ingest` until it says that each is stored."""
        while True:
            try:
                receipt = await client.ingest(events)
            except TallymarkError as error:
                if not error.retriable:
                    raise
                self.troubles[f"{type(error).__name__}: {error.message}"] += 1
                continue
            assert receipt.n_rejected == 0, receipt.rejected
            assert receipt.n_stored + receipt.n_duplicates == len(events)
            return

    @contextlib.asynccontextmanager
    async def writing(self):
        """Writers at work, one for each account; at the end each finishes what it has begun."""
        async with AsyncClient(self._addresses) as client:
            await client.metrics.create(SCHEMA)
        async with asyncio.TaskGroup() as group:
            self._stopping = False
            for position, account in enumerate(self._accounts):
                group.create_task(self._write(account, position))
            try:
                yield self
            finally:
                self._stopping = True

    def marks(self) -> Counter[int]:
        """How many events each account has now."""
        return Counter(self.stored)

    def all_beyond(self, marks: Counter[int], count: int = 10 * TOGETHER) -> bool:
        """Whether every account has had so many more acknowledged since."""
        return all(self.stored[account] >= marks[account] + count for account in self._accounts)

    async def check(self) -> None:
        """Every total is what was acknowledged, event for event. The writers must have ended."""
        async with AsyncClient(self._addresses) as client:
            for account in self._accounts:
                totals = (await client.query_realtime(account, METRIC)).value
                assert (totals.count, totals.sum) == (self.stored[account], self.values[account]), account
            account = self._accounts[0]
            values = [event.value async for event in client.list_events(account, 0, 2**62)]
            assert sorted(values) == list(range(self.stored[account]))


async def alerts_arrive(addresses: list[str]) -> None:
    """A subscriber is told of every crossing, whichever instance it is connected to, and so is the history."""
    async with AsyncClient(addresses) as client:
        with contextlib.suppress(AlreadyExistsError):
            await client.metrics.create(LIMITED)
        accounts = accounts_of_partitions(
            12, first=1_000_000
        )  # not the ledger's: it knows all events of its own
        for _ in range(4):  # each subscription begins at another instance
            seen = len(await client.list_alerts(accounts[0]))
            async with client.alerts.subscribe(metric_codes=[LIMITED.code]) as subscription:
                await client.ingest(
                    [Event(account_id=account, metric_code=LIMITED.code) for account in accounts]
                )
                told = [await anext(subscription) for _ in accounts]
            assert sorted(alert.account_id for alert in told) == sorted(accounts)
            assert {alert.threshold_code for alert in told} == {"each"}
            assert len(await client.list_alerts(accounts[0])) == seen + 1


async def smoke(addresses: list[str]) -> None:
    """The quickstart through each gateway, a total that both of them have added to, and alerts."""
    await alerts_arrive(addresses)
    for address in addresses:
        await quickstart(address)
    total = 0
    for address in addresses:
        async with AsyncClient([address]) as client:
            receipt = await client.ingest(
                [
                    Event(account_id=7, metric_code="compute_seconds", value=3),
                    Event(account_id=8, metric_code="no"),
                ]
            )
            assert (receipt.n_stored, receipt.n_rejected) == (1, 1), receipt.rejected
            total += 3
            # A client asks the query nodes in turn: so each of them has answered.
            for _ in range(4):
                assert (await client.query_realtime(7, "compute_seconds")).value.sum == total
