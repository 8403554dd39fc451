"""The calls that a load makes: what applications do all day, each through the SDK, against metrics of the load's own.

A `Caller` makes calls and counts them. It decides by its own seeded random numbers; event ids carry a prefix of its
own, so that runs and processes don't repeat each other's. A call that is answered but stores less than it sent has
failed: nothing that a load sends is to be rejected.
"""

from __future__ import annotations

import random
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing

from load_figures import Figures

from tallymark import (
    AggType,
    AlertThreshold,
    AlreadyExistsError,
    AsyncClient,
    DimensionFilter,
    Event,
    MetricSchema,
    OperationType,
    PeriodType,
    TallymarkError,
    current_month,
)
from tallymark.receipt import Receipt
from tallymark_protocol.errors import ErrorCode

USAGE = "load_usage"
CALLS = "load_calls"
SEATS = "load_seats"
PROVIDERS = ["aws", "gcp", "azure"]
SCHEMAS = [
    MetricSchema(
        code=USAGE,
        agg_type=AggType.SUM,
        period_type=PeriodType.CALENDAR,
        filters=[DimensionFilter(key="provider", values=PROVIDERS)],
        thresholds=[AlertThreshold(code="load_step", value=1_000_000, recurring=True)],
    ),
    MetricSchema(code=CALLS, agg_type=AggType.COUNT),
    MetricSchema(code=SEATS, agg_type=AggType.COUNT_UNIQUE),
]
EVENTS = 50  # in a list
PAGE = 100  # listed events that are read


async def prepare(client: AsyncClient) -> None:
    """Create the load's metrics; those of an earlier run are the same."""
    for schema in SCHEMAS:
        try:
            await client.metrics.create(schema)
        except AlreadyExistsError as error:
            if not error.identical:
                raise


def name_of(error: BaseException) -> str:
    """The kind of an error: its class, and its code where it has one."""
    if isinstance(error, TallymarkError):
        try:
            return f"{type(error).__name__} {ErrorCode(error.code).name}"
        except ValueError:
            return f"{type(error).__name__} {error.code}"
    return type(error).__name__


class NotStored(Exception):
    """A receipt that says less than was hoped."""


def _stored(receipt: Receipt, count: int) -> int:
    if receipt.n_stored != count:
        reasons = sorted({str(rejection.reason) for rejection in receipt.rejected})
        raise NotStored(f"{receipt.n_stored} of {count} stored, {receipt.n_duplicates} duplicates, {reasons}")
    return count


class Caller:
    """Makes calls through one client.

    Args:
        client: connected; not closed by this.
        figures: counts every call.
        rng: decides about accounts, values and everything else.
        name: differs between callers, in all processes and runs.
        accounts: how many there are to choose from.
        batch: events in a call of columns.
    """

    def __init__(
        self,
        client: AsyncClient,
        figures: Figures,
        rng: random.Random,
        *,
        name: str,
        accounts: int = 1000,
        batch: int = 1000,
    ) -> None:
        self._client = client
        self._figures = figures
        self._rng = rng
        self._name = name
        self._accounts = accounts
        self._batch = batch
        self._serial = 0

    async def make(self, kind: str) -> tuple[float, BaseException | None]:
        """Make one call of a kind (a key of `KINDS`); return its seconds and what it failed with."""
        begun = time.perf_counter()
        try:
            events = await KINDS[kind](self)
        except (TallymarkError, NotStored) as error:
            self._figures.failed(kind, name_of(error))
            return time.perf_counter() - begun, error
        seconds = time.perf_counter() - begun
        self._figures.answered(kind, seconds, events)
        return seconds, None

    def _account(self) -> int:
        return 1 + self._rng.randrange(self._accounts)

    def _id(self) -> str:
        self._serial += 1
        return f"{self._name}-{self._serial}"

    async def one_event(self) -> int:
        """A single event, as a request handler sends it."""
        return _stored(await self._client.ingest([Event(account_id=self._account(), metric_code=CALLS)]), 1)

    async def events(self) -> int:
        """A list of events with ids and properties."""
        rng = self._rng
        made = [
            Event(
                account_id=self._account(),
                metric_code=USAGE,
                value=rng.randrange(1, 1000),
                properties={"provider": rng.choice(PROVIDERS), "job": "nightly"},
                id=self._id(),
            )
            for _ in range(EVENTS - 1)
        ]
        kind = rng.choice((OperationType.ADD, OperationType.REMOVE))
        made.append(
            Event(account_id=self._account(), metric_code=SEATS, value=rng.randrange(50), operation_type=kind)
        )
        return _stored(await self._client.ingest(made), EVENTS)

    async def columns(self) -> int:
        """Many events of one metric."""
        rng = self._rng
        count = self._batch
        receipt = await self._client.ingest_columns(
            USAGE,
            account_ids=rng.choices(range(1, self._accounts + 1), k=count),
            values=[1] * count,
            properties={"provider": [rng.choice(PROVIDERS)] * count},
        )
        return _stored(receipt, count)

    async def realtime(self) -> int:
        """What has an account used in this period?"""
        await self._client.query_realtime(self._account(), USAGE)
        return 0

    async def month(self) -> int:
        """The month's total with one provider."""
        filters = {"provider": self._rng.choice(PROVIDERS)}
        await self._client.query(self._account(), USAGE, current_month(), filters=filters)
        return 0

    async def breakdown(self) -> int:
        """The month by provider."""
        await self._client.breakdown(self._account(), USAGE, current_month(), group_by=["provider"])
        return 0

    async def series(self) -> int:
        """The month by day."""
        await self._client.series(self._account(), USAGE, current_month(), unit="day")
        return 0

    async def top(self) -> int:
        """Who uses most?"""
        await self._client.top_accounts(USAGE, current_month(), limit=10)
        return 0

    async def listing(self) -> int:
        """A page of raw events."""
        found = 0
        async with aclosing(self._client.list_events(self._account(), 0, 2**62, page_size=PAGE)) as listed:
            async for _ in listed:
                found += 1
                if found == PAGE:
                    break
        return found

    async def alerts(self) -> int:
        """What has crossed its threshold?"""
        await self._client.list_alerts(self._account(), limit=PAGE)
        return 0


KINDS: dict[str, Callable[[Caller], Awaitable[int]]] = {
    "ingest one event": Caller.one_event,
    "ingest events": Caller.events,
    "ingest columns": Caller.columns,
    "query realtime": Caller.realtime,
    "query month": Caller.month,
    "breakdown": Caller.breakdown,
    "series": Caller.series,
    "top accounts": Caller.top,
    "list events": Caller.listing,
    "list alerts": Caller.alerts,
}
