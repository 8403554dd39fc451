"""Fetching ahead for one subscription: asks an alerts instance, long poll by long poll, and fills the feed.

Runs on the client's event loop; the consumer may be there or on another thread, so the feed is only touched under
`guard`. Any instance can answer any question, because the question carries the cursor: after an error that may pass
the next instance is asked, with backoff, for as long as it takes. An error that can't pass ends the reading.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Final

from tallymark._feed import Feed
from tallymark._gateways import backoff_seconds
from tallymark_protocol.errors import (
    BackpressureError,
    ErrorCode,
    InvalidRequestError,
    ServerError,
    TallymarkError,
    UnavailableError,
)
from tallymark_protocol.messages import AlertsBatch, AlertsFetch

if TYPE_CHECKING:
    from tallymark.client import AsyncClient

WAIT_SECONDS: Final = 20.0  # for which an instance is asked to wait for an alert
ANSWER_SECONDS: Final = 10.0  # and then for its answer
RETRY_AFTER_SECONDS_MAX: Final = 10.0  # that an instance can ask for


class Reader:
    """The reading side of a subscription.

    Args:
        client: through which to ask.
        feed: what to fill.
        accounts: the filter; none: all.
        metrics: likewise.
        guard: is held while the feed is touched.
        news: called, on the loop and without the guard, when there may be something to take or the end has come.
    """

    def __init__(
        self,
        client: AsyncClient,
        feed: Feed,
        accounts: list[int],
        metrics: list[str],
        guard: AbstractContextManager[Any],
        news: Callable[[], None],
    ) -> None:
        self.end: TallymarkError | None = None  # why nothing more will be read
        self.at_once = False  # whether the end also holds for what is still in the feed
        self.error: TallymarkError | None = None  # why nothing can be read at present
        self.loop: asyncio.AbstractEventLoop | None = None  # None until it is started
        self._client = client
        self._feed = feed
        self._accounts = accounts
        self._metrics = metrics
        self._guard = guard
        self._news = news
        self._process_id = os.getpid()
        self._task: asyncio.Task[None] | None = None
        self._room = asyncio.Event()  # set when the consumer has made room
        self._attempt = 0  # chooses the instance
        self._is_early = False  # whether the last answer came long before the wait was over

    async def start(self) -> None:
        """Find out where to begin, and begin.

        Raises:
            UnavailableError: nobody could say where the alerts end, within the client's timeout.
            InvalidRequestError: a position in what is no partition; the filter breaks a rule.
        """
        assert self.loop is None, "a reader starts once"
        loop = await self._client._ready()
        if self.end is None and not self._feed.is_pinned:
            question = AlertsFetch(self._accounts, self._metrics, None, 1, 0)
            deadline = self._client._deadline(None)
            batch = await self._client._gateways.call(question, AlertsBatch, deadline, role="alerts")
            if not self._feed.is_pinned:
                self._feed.pin(batch.next)
        topology = self._client._gateways.topology
        if topology is not None:
            for partition in self._feed.reading:
                if partition >= topology.partition_count:
                    raise InvalidRequestError(
                        f"since: there is no partition {partition} among the cluster's {topology.partition_count}"
                    )
        if self.loop is None and self.end is None:
            self.loop = loop
            self._client._readers.add(self)
            self._task = loop.create_task(self._run())
            self._task.add_done_callback(self._ended)

    @property
    def is_inherited(self) -> bool:
        """Whether another process, of which this is a fork, made it."""
        return self._process_id != os.getpid()

    def check(self) -> None:
        """Refuse to be used in another process than the one that made it."""
        if self.is_inherited:
            raise UnavailableError(
                "the subscription is the parent process's: subscribe anew, since its offsets()",
                code=ErrorCode.CLOSED,
                retriable=False,
            )

    def wake(self) -> None:
        """Read on: there is room. To be called on the loop."""
        self._room.set()

    def stop(self, end: TallymarkError) -> None:
        """Read no more, and give nothing out that was read. To be called on the loop."""
        if self.end is None or not self.at_once:
            self.end = end
            self.at_once = True
        self._client._readers.discard(self)
        if self._task is not None:
            self._task.cancel()
        self._news()

    async def stopped(self) -> None:
        """Wait until its task has ended."""
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """Whoever waits for an alert must hear of a defect of ours, too."""
        if not task.cancelled() and (error := task.exception()) is not None and self.end is None:
            self.end = ServerError(f"the subscription failed: {error!r:.200}")
            self.end.__cause__ = error
            self._client._readers.discard(self)
            self._news()

    async def _run(self) -> None:
        failures = 0  # in a row
        while True:
            with self._guard:
                wanted = self._feed.wanted()
                since = self._feed.reading
            if not wanted:
                self._room.clear()
                await self._room.wait()
                continue
            try:
                batch = await self._ask(since, wanted)
            except TallymarkError as error:
                if not (error.retriable or isinstance(error, UnavailableError | BackpressureError)):
                    self.end = self.error = error
                    self._client._readers.discard(self)
                    self._news()
                    return
                self.error = error
                failures += 1
                self._attempt += 1
                if self._client._gateways.is_round(failures, "alerts"):
                    self._client._gateways.refresh()
                await asyncio.sleep(self._pause(failures, error))
                continue
            if not batch.alerts and batch.next == since and self._is_early:
                # An instance that is about to end answers at once, and perhaps takes further questions.
                failures += 1
                self._attempt += 1
                await asyncio.sleep(self._pause(failures, None))
            else:
                failures = 0
            self.error = None
            with self._guard:
                self._feed.add(batch, wanted)
            self._news()

    async def _ask(self, since: dict[int, int], wanted: int) -> AlertsBatch:
        # After a failure an answer is wanted at once, to know that all is well again.
        wait = WAIT_SECONDS if self.error is None else 0.0
        question = AlertsFetch(self._accounts, self._metrics, since, wanted, int(wait * 1_000))
        assert self.loop is not None, "a reader that runs has a loop"
        began = self.loop.time()
        batch = await self._client._gateways.call_once(
            question, AlertsBatch, began + wait + ANSWER_SECONDS, role="alerts", attempt=self._attempt
        )
        self._is_early = self.loop.time() - began < wait / 2
        return batch

    def _pause(self, failures: int, error: TallymarkError | None) -> float:
        pause = backoff_seconds(failures, self._client._rng)
        asked = error.retry_after_ms if isinstance(error, BackpressureError) else None
        return pause if asked is None else max(pause, min(asked / 1_000, RETRY_AFTER_SECONDS_MAX))
