"""The blocking client: the same surface as `AsyncClient`, for code without an event loop.

Owns a thread with an event loop of its own, and the way there and back. Any number of threads may use a client at
once; each call waits for its answer in the caller's thread. After a fork the child's copy starts a thread of its
own at its first call.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

from tallymark.alerts import Positions
from tallymark.blocking_alerts import BlockingAlerts, Webhooks
from tallymark.client import CLOSE_SECONDS, TIMEOUT_SECONDS, AsyncClient, check_page_size
from tallymark.failures import IngestError
from tallymark.receipt import Receipt
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
)
from tallymark_protocol.errors import ErrorCode, InvalidRequestError, UnavailableError
from tallymark_protocol.model import DeliveryMode, Event, MetricSchema
from tallymark_protocol.periods import Period

T = TypeVar("T")
_HOW_TO_CONNECT = "use `with`, or call connect()"


class _LoopThread:
    """A daemon thread that runs an event loop until it is stopped."""

    def __init__(self) -> None:
        self.process_id = os.getpid()
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="tallymark-client", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()
        self.loop.close()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the loop, and wait for it; interrupted, cancel it."""
        if threading.current_thread() is self._thread:
            work.close()
            raise InvalidRequestError("a blocking call on the client's own thread would wait for ever")
        future = asyncio.run_coroutine_threadsafe(work, self.loop)
        try:
            return future.result()
        except BaseException:
            # Ctrl-C, say: what was under way stays resolvable, as after any cancellation.
            future.cancel()
            raise

    def stop(self) -> None:
        """Stop the loop, and wait for the thread."""
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()


class Metrics:
    """The metrics of a cluster: `client.metrics`. See `AsyncMetrics` for what each call does and raises."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def create(self, schema: MetricSchema, *, timeout: float | None = None) -> MetricSchema:
        """Create a metric; raises AlreadyExistsError (`identical`) where its code is taken."""
        return self._client._run(lambda c: c.metrics.create(schema, timeout=timeout))

    def update(self, schema: MetricSchema, *, timeout: float | None = None) -> MetricSchema:
        """Add thresholds or dimension values, or change the description."""
        return self._client._run(lambda c: c.metrics.update(schema, timeout=timeout))

    def get(self, code: str, *, timeout: float | None = None) -> MetricSchema:
        """Return a metric's schema; raises NotFoundError."""
        return self._client._run(lambda c: c.metrics.get(code, timeout=timeout))

    def list(self, *, timeout: float | None = None) -> list[MetricSchema]:
        """Return all metrics' schemas, by code."""
        return self._client._run(lambda c: c.metrics.list(timeout=timeout))

    def delete(self, code: str, *, timeout: float | None = None) -> None:
        """Delete a metric; raises NotFoundError."""
        self._client._run(lambda c: c.metrics.delete(code, timeout=timeout))


class Client:
    """A client for code without an event loop; any number of threads may use it at once.

    Use it as `with Client(["localhost:7001"]) as client:`, or `connect()` it and `close()` it in the end. Every
    method does, takes and raises what the same method of `AsyncClient` does, and returns when it is done.

    Args:
        addresses: gateways, as "host:port"; any that answers will do.
        timeout: default for every call's `timeout`, in seconds.
    """

    def __init__(self, addresses: Sequence[str] | str, *, timeout: float = TIMEOUT_SECONDS) -> None:
        self._client = AsyncClient(addresses, timeout=timeout, _how_to_connect=_HOW_TO_CONNECT)
        self._lock = threading.Lock()  # over the two fields below
        self._thread: _LoopThread | None = None  # None before connect and after close
        self._closed = False
        self.metrics = Metrics(self)
        self.alerts = BlockingAlerts(self)
        self.webhooks = Webhooks(self)

    # ------------------------------------------------------------ life

    def connect(self, *, timeout: float | None = None) -> Self:
        """Connect to a gateway. Done by `with`."""
        self._started(start=True).run(self._client.connect(timeout=timeout))
        return self

    def close(self, *, timeout: float = CLOSE_SECONDS) -> None:
        """Wait for what is under way, for at most `timeout` seconds, and close the connections."""
        with self._lock:
            thread, self._thread = self._thread, None
            self._closed = True
        if thread is None or thread.process_id != os.getpid():
            return
        try:
            thread.run(self._client.close(timeout=timeout))
        finally:
            thread.stop()

    def __enter__(self) -> Self:
        return self.connect()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _started(self, *, start: bool = False) -> _LoopThread:
        thread = self._thread
        if thread is not None and thread.process_id == os.getpid():
            return thread
        # A fork may have copied the lock while another thread held it, and that thread isn't here.
        if thread is not None:
            self._lock = threading.Lock()
        with self._lock:
            if self._closed:
                raise UnavailableError("the client is closed", code=ErrorCode.CLOSED, retriable=False)
            if self._thread is None and not start:
                raise InvalidRequestError(f"the client isn't connected: {_HOW_TO_CONNECT}")
            if self._thread is None or self._thread.process_id != os.getpid():
                self._thread = _LoopThread()
            return self._thread

    def _run(self, call: Callable[[AsyncClient], Coroutine[Any, Any, T]]) -> T:
        return self._started().run(call(self._client))

    # ------------------------------------------------------------ ingest

    def ingest(
        self,
        events: Event | Iterable[Event],
        *,
        delivery: DeliveryMode | None = None,
        timeout: float | None = None,
    ) -> Receipt:
        """Store events and return what became of each. See `AsyncClient.ingest`.

        The exceptions' `retry()` is blocking, too.
        """
        listed = events if isinstance(events, Event) else list(events)
        return self._ingest(self._client.ingest(listed, delivery=delivery, timeout=timeout))

    def ingest_columns(
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
        """Store many events of one metric, given as columns. See `AsyncClient.ingest_columns`."""
        return self._ingest(
            self._client.ingest_columns(
                metric_code,
                account_ids=account_ids,
                values=values,
                timestamps_ns=timestamps_ns,
                ids=ids,
                properties=properties,
                operations=operations,
                delivery=delivery,
                timeout=timeout,
            )
        )

    def _ingest(self, work: Coroutine[Any, Any, Receipt]) -> Receipt:
        try:
            thread = self._started()
        except BaseException:
            work.close()
            raise
        try:
            return thread.run(work)
        except IngestError as error:
            resume = error._retry
            error._retry = lambda timeout: self._ingest(resume(timeout))
            raise

    # ------------------------------------------------------------ queries

    def query(
        self,
        account_id: int,
        metric_code: str,
        period: PeriodLike,
        *,
        filters: Filters | None = None,
        consistency: ConsistencyLike = "leader",
        timeout: float | None = None,
    ) -> Usage:
        """Return an account's usage of a metric in a period. See `AsyncClient.query`."""
        return self._run(
            lambda c: c.query(
                account_id, metric_code, period, filters=filters, consistency=consistency, timeout=timeout
            )
        )

    def query_realtime(
        self,
        account_id: int,
        metric_code: str,
        *,
        consistency: ConsistencyLike = "leader",
        timeout: float | None = None,
    ) -> Usage:
        """Return an account's running total in the current billing period. See `AsyncClient.query_realtime`."""
        return self._run(
            lambda c: c.query_realtime(account_id, metric_code, consistency=consistency, timeout=timeout)
        )

    def breakdown(
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
        """Return an account's usage by dimension values. See `AsyncClient.breakdown`."""
        return self._run(
            lambda c: c.breakdown(
                account_id,
                metric_code,
                period,
                group_by=group_by,
                filters=filters,
                consistency=consistency,
                timeout=timeout,
            )
        )

    def series(
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
        """Return an account's usage in each hour, day or month of a period. See `AsyncClient.series`."""
        return self._run(
            lambda c: c.series(
                account_id,
                metric_code,
                period,
                unit=unit,
                filters=filters,
                consistency=consistency,
                timeout=timeout,
            )
        )

    def top_accounts(
        self,
        metric_code: str,
        period: PeriodLike,
        *,
        limit: int = 10,
        filters: Filters | None = None,
        consistency: ConsistencyLike = "leader",
        timeout: float | None = None,
    ) -> Rows[AccountTotal]:
        """Return the accounts that used most of a metric. See `AsyncClient.top_accounts`."""
        return self._run(
            lambda c: c.top_accounts(
                metric_code, period, limit=limit, filters=filters, consistency=consistency, timeout=timeout
            )
        )

    def list_events(
        self,
        account_id: int,
        start: Any,
        end: Any,
        *,
        metric_code: str | None = None,
        page_size: int = 1_000,
        consistency: ConsistencyLike = "leader",
        timeout: float | None = None,
    ) -> Iterator[StoredEvent]:
        """Iterate over an account's stored events timed in `[start, end)`. See `AsyncClient.list_events`."""
        check_page_size(page_size)
        events = self._client.list_events(
            account_id,
            start,
            end,
            metric_code=metric_code,
            page_size=page_size,
            consistency=consistency,
            timeout=timeout,
        )
        while True:
            # A page at a time, so that a switch of threads isn't paid for every event.
            page = self._run(lambda _: _take(events, page_size))
            yield from page
            if len(page) < page_size:
                return

    def list_alerts(
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
        """Return a page of alerts. See `AsyncClient.list_alerts`."""
        return self._run(
            lambda c: c.list_alerts(
                account_id,
                since=since,
                metric_code=metric_code,
                start=start,
                end=end,
                limit=limit,
                consistency=consistency,
                timeout=timeout,
            )
        )


async def _take(events: Any, count: int) -> list[StoredEvent]:
    """Take up to `count` events; fewer only at the end."""
    taken: list[StoredEvent] = []
    while len(taken) < count:
        event = await anext(events, None)
        if event is None:
            break
        taken.append(event)
    return taken
