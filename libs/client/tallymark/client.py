"""The asynchronous client: ingest, queries, metrics, alerts, webhooks.

Owns what a call means: which of its events go into new chunks and which resume unresolved ones, what its receipt
says, and what it raises. How chunks and calls travel is `_sender`'s and `_gateways`'.
"""

from __future__ import annotations

import asyncio
import os
import random
import weakref
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Final, Self

from tallymark._gateways import Gateways
from tallymark._reader import Reader
from tallymark._sender import Flight, FlightState, Sender, timeout_error
from tallymark._unresolved import UnresolvedEvents
from tallymark.alerts import AsyncAlerts, Positions, positions_of
from tallymark.failures import ingest_error
from tallymark.metrics import AsyncMetrics
from tallymark.receipt import Part, Receipt
from tallymark.results import (
    AccountTotal,
    Alerts,
    BreakdownRow,
    ConsistencyLike,
    Filters,
    PeriodLike,
    Rows,
    StoredEvent,
    Totals,
    Usage,
    alerts_of,
    breakdown_of,
    consistency_of,
    filters_of,
    period_of_argument,
    ranking_of,
    series_of,
    stored_event_of,
    usage_of,
)
from tallymark.webhooks import AsyncWebhooks
from tallymark_protocol import limits
from tallymark_protocol.chunk import BadEvent, prepare_columns, prepare_events
from tallymark_protocol.errors import ErrorCode, InvalidRequestError, TallymarkError, UnavailableError
from tallymark_protocol.identifiers import check_account_id
from tallymark_protocol.layout import FLAG_ASYNC
from tallymark_protocol.messages import (
    AlertsPage,
    EventsPage,
    Message,
    QueryAlerts,
    QueryEvents,
    QueryRealtime,
    QueryResult,
    QueryTop,
    QueryTotals,
)
from tallymark_protocol.model import DeliveryMode, Event
from tallymark_protocol.periods import Period, to_ns

TIMEOUT_SECONDS: Final = 30.0
TIMEOUT_SECONDS_MAX: Final = 86_400.0
CLOSE_SECONDS: Final = 10.0
TIME_MAX_NS: Final = 2**63 - 1
_clients: weakref.WeakSet[AsyncClient] = weakref.WeakSet()


class _Call:
    """An ingest call: its flights, and which of its events each carries."""

    __slots__ = ("bad", "events", "flights", "n_events")

    def __init__(self, n_events: int, bad: list[BadEvent], events: list[Event] | None) -> None:
        self.n_events = n_events
        self.bad = bad
        self.events = events  # None for columns
        # With the call's index of each of a flight's events: all in order, or by position only some of them.
        self.flights: list[tuple[Flight, Sequence[int] | Mapping[int, int]]] = []

    def receipt(self) -> Receipt:
        parts = [Part(flight.chunk, indices, flight.sent) for flight, indices in self.flights]
        return Receipt(self.n_events, parts, self.bad, self.events)


class AsyncClient:
    """A client for code that runs on an event loop.

    Use it as `async with AsyncClient(["localhost:7001"]) as client:`, or `connect()` it and `close()` it in the
    end. It belongs to the event loop that it was connected on. Any number of tasks may use it at once; one client
    per process is enough. After a fork the child's copy connects anew, under a new identity.

    Args:
        addresses: gateways, as "host:port"; any that answers will do.
        timeout: default for every call's `timeout`, in seconds.
    """

    def __init__(
        self,
        addresses: Sequence[str] | str,
        *,
        timeout: float = TIMEOUT_SECONDS,
        _rng: random.Random | None = None,
        _how_to_connect: str = "use `async with`, or await connect()",
    ) -> None:
        self._addresses = [addresses] if isinstance(addresses, str) else list(addresses)
        self._timeout = timeout
        self._how_to_connect = _how_to_connect
        self._rng = _rng if _rng is not None else random.SystemRandom()
        self._loop: asyncio.AbstractEventLoop | None = None  # None before connect, and after a fork
        self._gateways: Gateways
        self._sender: Sender
        self._unresolved = UnresolvedEvents()
        self._closed = False
        self._forked = False
        self._inherited: list[object] = []  # the parent's, kept from being finalised in the child
        self._readers: set[Reader] = set()  # of the subscriptions that go on
        self.metrics = AsyncMetrics(self._call)
        self.alerts = AsyncAlerts(self)
        self.webhooks = AsyncWebhooks(self._call_alerts)
        _clients.add(self)

    # ------------------------------------------------------------ life

    async def connect(self, *, timeout: float | None = None) -> Self:
        """Connect to a gateway. Done by `async with`.

        Raises:
            UnavailableError: none could be reached within `timeout` seconds.
        """
        if self._closed:
            raise _closed()
        if self._loop is None:
            loop = asyncio.get_running_loop()
            sender = Sender(loop, self._rng)
            self._gateways = sender.gateways = Gateways(
                self._addresses, loop, self._rng, on_up=sender.link_up
            )
            self._sender = sender
            self._loop = loop
            self._forked = False
        self._check_loop()
        try:
            await self._gateways.wait_up(self._deadline(timeout))
        except BaseException:
            if self._gateways.topology is None and self._gateways.link is None:
                await self._gateways.close()
                self._sender.close()
                self._loop = None
            raise
        return self

    async def close(self, *, timeout: float = CLOSE_SECONDS) -> None:
        """Wait for what is under way, for at most `timeout` seconds, and close the connections.

        Calls still unfinished then raise `UnavailableError`, as iterations over subscriptions do at once. A closed
        client can't be used again.
        """
        if self._closed:
            return
        self._closed = True
        if self._loop is None:
            return
        readers = list(self._readers)
        for reader in readers:
            reader.stop(_closed())
        try:
            for reader in readers:
                await reader.stopped()
            await self._sender.wait_idle(self._loop.time() + timeout)
        finally:
            self._sender.close()
            await self._gateways.close()

    async def __aenter__(self) -> Self:
        return await self.connect()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    def _check_loop(self) -> None:
        if asyncio.get_running_loop() is not self._loop:
            raise InvalidRequestError("the client belongs to another event loop: make one per loop")

    async def _ready(self) -> asyncio.AbstractEventLoop:
        """Check that the client can be used, and return its loop."""
        if self._closed:
            raise _closed()
        if self._loop is None:
            if not self._forked:
                raise InvalidRequestError(f"the client isn't connected: {self._how_to_connect}")
            await self.connect()
        self._check_loop()
        assert self._loop is not None, "a connected client has a loop"
        return self._loop

    def _deadline(self, timeout: float | None) -> float:
        assert self._loop is not None, "a connected client has a loop"
        seconds = self._timeout if timeout is None else timeout
        if not seconds >= 0:  # nor is NaN
            raise InvalidRequestError(f"timeout must be a number of seconds from 0, not {seconds!r:.40}")
        return self._loop.time() + min(seconds, TIMEOUT_SECONDS_MAX)

    def _after_fork(self) -> None:
        """In the child: the sockets, the loop and the identity are the parent's."""
        # Whatever it was seeded with, parent and child would go on with the same numbers.
        self._rng = random.SystemRandom()
        if self._loop is not None and not self._closed:
            self._inherited += (self._loop, self._gateways, self._sender, self._readers)
            self._readers = set()
            self._gateways.abandon()
            self._loop = None
            self._forked = True

    # ------------------------------------------------------------ ingest

    async def ingest(
        self,
        events: Event | Iterable[Event],
        *,
        delivery: DeliveryMode | None = None,
        timeout: float | None = None,
    ) -> Receipt:
        """Store events and return what became of each.

        Bad events don't fail the others: they are in `receipt.rejected`. Events that the service couldn't be
        asked about make the call raise; then pass the very same `Event` objects again, or await the exception's
        `retry()`: both resume what is unresolved under its identity, so that nothing is counted twice. That also
        holds after a timeout and after this call was cancelled. A resumed chunk keeps the delivery that it was
        first sent with. (The client remembers unresolved events for half
        an hour, up to 4,096 chunks or 128 MiB, by their identity as objects; beyond that, only event ids protect.
        To send an event that is the same but for its identity, make a new `Event`.)

        Args:
            events: one or many; more than a request may hold are sent in several.
            delivery: SYNC (the default): answer once they are on a majority's disks. ASYNC: once a leader has
                them in memory, where a crash can lose them. One event that says SYNC makes the whole call SYNC.
            timeout: seconds for everything, retries included.

        Raises:
            BackpressureError: the service took no more until the timeout; wait and call again.
            UnavailableError: it couldn't be reached, or a partition of it; call again.
            OutcomeUnknownError: events may be stored or not, and can't be retried safely any more.
            ServerError: the service failed; call again, or look at its logs.
            InvalidRequestError: something else than events was passed, or a chunk was refused whole.
            (All but the last, where no `Event` was passed, are `IngestError`s, with `receipt` and `retry()`.)
        """
        loop = self._loop
        if loop is None or self._closed:
            loop = await self._ready()
        self._check_loop()
        listed = [events] if isinstance(events, Event) else list(events)
        deadline = self._deadline(timeout)
        if self._unresolved:
            call = self._resume(listed, delivery, loop.time())
        else:
            prepared = prepare_events(listed)
            call = _Call(len(listed), prepared.bad, listed)
            if prepared.bodies:
                flags = _flags(delivery, listed)
                for body in prepared.bodies:
                    call.flights.append((Flight(self._sender, body, flags), body.indices))
        return await self._settle(call, deadline)

    def _resume(self, events: list[Event], delivery: DeliveryMode | None, now: float) -> _Call:
        """Make a call some of whose events may belong to unresolved flights."""
        # Whatever is wrong with the call must come out before claims are taken: they would be lost.
        for index, event in enumerate(events):
            if not isinstance(event, Event):
                raise InvalidRequestError(f"event {index} is no Event but of type {type(event).__name__}")
        flags = _flags(delivery, events)
        self._unresolved.expire(now)
        fresh: list[int] = []
        resumed: dict[Flight, dict[int, int]] = {}
        for index, event in enumerate(events):
            claim = self._unresolved.claim(event)
            if claim is None:
                fresh.append(index)
            else:
                resumed.setdefault(claim.flight, {})[claim.position] = index
        prepared = prepare_events([events[index] for index in fresh])
        bad = [
            BadEvent(
                fresh[b.index],
                b.reason,
                b.message.replace(f"event {b.index}:", f"event {fresh[b.index]}:", 1),
            )
            for b in prepared.bad
        ]
        call = _Call(len(events), bad, events)
        call.flights.extend(resumed.items())
        for body in prepared.bodies:
            indices = [fresh[index] for index in body.indices]
            call.flights.append((Flight(self._sender, body, flags), indices))
        return call

    async def ingest_columns(
        self,
        metric_code: str,
        *,
        account_ids: Any,
        values: Any = 1,
        timestamps_ns: Any = None,
        ids: Any = None,
        properties: Mapping[str, Any] | None = None,
        operations: Any = None,
        delivery: DeliveryMode | None = None,
        timeout: float | None = None,
    ) -> Receipt:
        """Store many events of one metric, given as columns: several times faster than `Event` objects.

        A column is a numpy array of integers, an `array.array`, a list, or one value for all events; all have the
        same length. Receipt, errors and `delivery` are as with `ingest`, but there are no objects to pass again:
        after an exception, await its `retry()`.

        Args:
            metric_code: all events' metric.
            account_ids: 0 to 2^64-1.
            values: integers (use `scale` for decimals), or strings for COUNT_UNIQUE of strings.
            timestamps_ns: nanoseconds since the Unix epoch; None for the time of storing.
            ids: event ids, None for none.
            properties: by key a string for all events, or a list of strings with None where it is missing.
            operations: of `OperationType`, for COUNT_UNIQUE metrics.
            delivery: as with `ingest`.
            timeout: seconds for everything, retries included.
        """
        await self._ready()
        deadline = self._deadline(timeout)
        prepared = prepare_columns(
            metric_code,
            account_ids,
            values,
            timestamps_ns,
            ids,
            None if properties is None else dict(properties),
            operations,
        )
        count = len(prepared.bad) + sum(body.event_count for body in prepared.bodies)
        call = _Call(count, prepared.bad, None)
        flags = _flags(delivery, [])
        for body in prepared.bodies:
            call.flights.append((Flight(self._sender, body, flags), body.indices))
        return await self._settle(call, deadline)

    async def _settle(self, call: _Call, deadline: float) -> Receipt:
        """Send a call's flights, or go on with them, until each has ended or the deadline is over."""
        sender = self._sender
        cause: TallymarkError | None = None
        try:
            for flight, _ in call.flights:
                if not sender.start_now(flight, deadline):
                    await sender.start(flight, deadline)
            for flight, _ in call.flights:
                while (waiter := sender.waiter(flight)) is not None:
                    await waiter
        except TallymarkError as error:
            cause = error
            self._leave(call)
        except BaseException:
            self._leave(call)
            self._remember(call)
            raise
        unfinished = [flight for flight, _ in call.flights if flight.state is not FlightState.DONE]
        if not unfinished:
            return call.receipt()
        self._remember(call)
        if cause is None:
            errors = [flight.error or timeout_error(None) for flight in unfinished]
            # What can't be helped by trying again comes first: somebody has to know.
            cause = next((error for error in errors if not error.retriable), errors[0])
        raise ingest_error(cause, call.receipt(), lambda timeout: self._retry(call, timeout)) from cause

    async def _retry(self, call: _Call, timeout: float | None) -> Receipt:
        await self._ready()
        deadline = self._deadline(timeout)
        # From here on nothing may raise before `_settle`, which remembers again what stays unresolved.
        if call.events is not None:
            for flight, indices in call.flights:
                if flight.state is not FlightState.FAILED:
                    self._unresolved.release(flight, _positions(indices))
        return await self._settle(call, deadline)

    def _leave(self, call: _Call) -> None:
        for flight, _ in call.flights:
            self._sender.abandon(flight)

    def _remember(self, call: _Call) -> None:
        events = call.events
        if events is None or self._loop is None:
            return
        now = self._loop.time()
        for flight, indices in call.flights:
            # Those that are done as well: passed again, their events are to get the same answer, not to be sent anew.
            placed = indices if isinstance(indices, Mapping) else dict(enumerate(indices))
            by_position = {position: events[index] for position, index in placed.items()}
            self._unresolved.add(flight, by_position, now)

    # ------------------------------------------------------------ queries

    async def _call(self, message: Message, kind: type[Any], timeout: float | None) -> Any:
        await self._ready()
        return await self._gateways.call(message, kind, self._deadline(timeout))

    async def _call_alerts(self, message: Message, kind: type[Any], timeout: float | None) -> Any:
        await self._ready()
        return await self._gateways.call(message, kind, self._deadline(timeout), role="alerts")

    async def _query(self, message: Message, kind: type[Any], timeout: float | None) -> Any:
        await self._ready()
        return await self._gateways.call(message, kind, self._deadline(timeout), role="query")

    async def query(
        self,
        account_id: int,
        metric_code: str,
        period: PeriodLike,
        *,
        filters: Filters | None = None,
        consistency: ConsistencyLike = "leader",
        timeout: float | None = None,
    ) -> Usage:
        """Return an account's usage of a metric: exactly the events timed in the period.

        What a receipt has confirmed before is counted, unless `consistency` is "stale".

        Args:
            account_id: whose usage.
            metric_code: of which metric.
            period: `current_month()` and the like, a `Period`, or (start, end).
            filters: by dimension the value, or values, to count; all must match.
            consistency: "leader": asks the partition's leader, which answers while its lease lasts. "quorum": the
                leader has a majority confirm first that no other has taken its place. "stale": any copy may answer,
                also while there is no leader; what was confirmed may be missing, an answer may be older than the one
                before, and `lag` and `silence_ms` say how far the copy is behind.
            timeout: seconds, retries included.

        Raises:
            NotFoundError: no metric has this code.
            InvalidRequestError: a filter on what is no dimension, an impossible period.
            UnavailableError: no answer within the timeout; call again.
        """
        message = QueryTotals(
            check_account_id(account_id),
            metric_code,
            period_of_argument(period),
            filters_of(filters),
            consistency=consistency_of(consistency),
        )
        return usage_of(await self._query(message, QueryResult, timeout))

    async def query_realtime(
        self,
        account_id: int,
        metric_code: str,
        *,
        consistency: ConsistencyLike = "leader",
        timeout: float | None = None,
    ) -> Usage:
        """Return an account's running total in the metric's current billing period: the cheapest query.

        Raises as `query` does.
        """
        message = QueryRealtime(check_account_id(account_id), metric_code, consistency_of(consistency))
        return usage_of(await self._query(message, QueryResult, timeout))

    async def breakdown(
        self,
        account_id: int,
        metric_code: str,
        period: PeriodLike,
        *,
        group_by: Sequence[str] | str,
        filters: Filters | None = None,
        consistency: ConsistencyLike = "leader",
        timeout: float | None = None,
    ) -> Rows[BreakdownRow]:
        """Return an account's usage by dimension values. The rows add up to the total.

        A row's group has None where the property was missing, and `OTHER` for values not declared. Raises as
        `query` does.
        """
        keys = [group_by] if isinstance(group_by, str) else list(group_by)
        message = QueryTotals(
            check_account_id(account_id),
            metric_code,
            period_of_argument(period),
            filters_of(filters),
            keys,
            consistency=consistency_of(consistency),
        )
        return breakdown_of(await self._query(message, QueryResult, timeout), keys)

    async def series(
        self,
        account_id: int,
        metric_code: str,
        period: PeriodLike,
        *,
        unit: str = "day",
        filters: Filters | None = None,
        consistency: ConsistencyLike = "leader",
        timeout: float | None = None,
    ) -> Rows[tuple[Period, Totals]]:
        """Return an account's usage in each hour, day or month (`unit`, in the metric's zone) of a period.

        The first and last are cut to the period; those without events are there, too. Raises as `query` does.
        """
        message = QueryTotals(
            check_account_id(account_id),
            metric_code,
            period_of_argument(period),
            filters_of(filters),
            unit=unit,
            consistency=consistency_of(consistency),
        )
        return series_of(await self._query(message, QueryResult, timeout))

    async def top_accounts(
        self,
        metric_code: str,
        period: PeriodLike,
        *,
        limit: int = 10,
        filters: Filters | None = None,
        consistency: ConsistencyLike = "leader",
        timeout: float | None = None,
    ) -> Rows[AccountTotal]:
        """Return the accounts that used most of a metric, the greatest first. Raises as `query` does."""
        message = QueryTop(
            metric_code, period_of_argument(period), limit, filters_of(filters), consistency_of(consistency)
        )
        return ranking_of(await self._query(message, QueryResult, timeout))

    async def list_events(
        self,
        account_id: int,
        start: Any,
        end: Any,
        *,
        metric_code: str | None = None,
        page_size: int = 1_000,
        consistency: ConsistencyLike = "leader",
        timeout: float | None = None,
    ) -> AsyncIterator[StoredEvent]:
        """Iterate over an account's stored events timed in `[start, end)`, page by page, in log order.

        Args:
            account_id: whose events.
            start: inclusive; an aware datetime, nanoseconds, or RFC 3339 text.
            end: exclusive.
            metric_code: None for all metrics.
            page_size: how many to ask for at once, 1 to 10,000.
            consistency: as with `query`. With "stale" it may end before events that another copy has.
            timeout: seconds for each page.

        Raises as `query` does, also between pages.
        """
        check_page_size(page_size)
        account_id = check_account_id(account_id)
        start_ns, end_ns = to_ns(start), to_ns(end)
        wanted = consistency_of(consistency)
        cursor = ""
        while True:
            message = QueryEvents(account_id, start_ns, end_ns, metric_code, cursor, page_size, wanted)
            page: EventsPage = await self._query(message, EventsPage, timeout)
            for record in page.events:
                yield stored_event_of(record)
            cursor = page.cursor
            if not cursor:
                return

    async def list_alerts(
        self,
        account_id: int | None = None,
        *,
        since: Positions | None = None,
        metric_code: str | None = None,
        start: Any = None,
        end: Any = None,
        limit: int = 1_000,
        consistency: ConsistencyLike = "leader",
        timeout: float | None = None,
    ) -> Alerts:
        """Return a page of alerts, of all accounts and metrics unless told otherwise.

        Args:
            account_id: of this account.
            since: by partition the position to go on from, absent ones from the first: an earlier page's `next`, or
                a subscription's `offsets()`. Positions stay what they are, over restarts and failovers.
            metric_code: of this metric.
            start: raised from then on, inclusive: when the crossing event was stored. As `list_events` takes it.
            end: raised before.
            limit: at most so many, 1 to 10,000.
            consistency: as with `query`.
            timeout: seconds, retries included.

        Pass the page's `next` as `since` to go on where it ended, now or later. Raises as `query` does.
        """
        account = None if account_id is None else check_account_id(account_id)
        start_ns = 0 if start is None else to_ns(start)
        end_ns = TIME_MAX_NS if end is None else to_ns(end)
        message = QueryAlerts(
            account,
            metric_code,
            positions_of(since) or {},
            limit,
            consistency_of(consistency),
            start_ns,
            end_ns,
        )
        return alerts_of(await self._query(message, AlertsPage, timeout))


def check_page_size(page_size: int) -> None:
    """Refuse a page size that no query node would serve."""
    if not 1 <= page_size <= limits.PAGE_EVENTS_MAX:
        raise InvalidRequestError(f"page_size must be 1 to {limits.PAGE_EVENTS_MAX}, not {page_size}")


def _flags(delivery: DeliveryMode | None, events: list[Event]) -> int:
    """The chunk's flags: ASYNC only where the call asks for it and no event says SYNC."""
    if delivery is None or delivery == DeliveryMode.SYNC:
        return 0
    if delivery != DeliveryMode.ASYNC:
        raise InvalidRequestError(f"delivery must be a DeliveryMode, not {delivery!r:.40}")
    return 0 if any(event.delivery_mode == DeliveryMode.SYNC for event in events) else FLAG_ASYNC


def _positions(indices: Sequence[int] | Mapping[int, int]) -> list[int]:
    return list(indices) if isinstance(indices, Mapping) else list(range(len(indices)))


def _closed() -> UnavailableError:
    return UnavailableError("the client is closed", code=ErrorCode.CLOSED, retriable=False)


def _after_fork() -> None:
    for client in list(_clients):
        client._after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
