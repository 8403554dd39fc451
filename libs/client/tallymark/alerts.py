"""Alerts as they are raised: `client.alerts.subscribe`, and reading its arguments.

A subscription gives every matching alert from its position on, in order within each partition, **at least once**:
`offsets()` covers an alert only once the next one was asked for, so whoever dies while handling one gets it again.
How it reads ahead is `_reader`'s and `_feed`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

from tallymark._feed import Feed
from tallymark._reader import Reader
from tallymark.results import Alert, alert_of
from tallymark_protocol import limits
from tallymark_protocol.errors import ErrorCode, InvalidRequestError, TallymarkError, UnavailableError
from tallymark_protocol.identifiers import check_account_id

if TYPE_CHECKING:
    from tallymark.client import AsyncClient

Positions = Mapping[int, int] | Mapping[str, int]
"""Where to go on, by partition: the position of the next alert. What `offsets()` and `Alerts.next` give."""

BUFFER: Final = 64
BUFFER_MAX: Final = 100_000
POSITION_MAX: Final = 2**63 - 1
_CODE: Final = re.compile(limits.METRIC_CODE_PATTERN)


class AsyncAlerts:
    """Alerts as they are raised: `client.alerts`. Those raised before are `client.list_alerts`'."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    def subscribe(
        self,
        account_ids: Iterable[int] | int | None = None,
        metric_codes: Iterable[str] | str | None = None,
        *,
        since: Positions | None = None,
        buffer: int = BUFFER,
    ) -> AlertSubscription:
        """Subscribe to alerts: use it as `async with … as sub:` and `async for alert in sub:`.

        Args:
            account_ids: of these accounts; None or none: of all.
            metric_codes: of these metrics; None or none: of all.
            since: None: those raised from now on; `{}`: from the first one on; `offsets()` of an earlier
                subscription: go on after it.
            buffer: how many alerts to read ahead.

        Raises:
            InvalidRequestError: an argument is none.
        """
        feed = Feed(buffer_of(buffer), positions_of(since))
        return AlertSubscription(self._client, feed, accounts_of(account_ids), metrics_of(metric_codes))


class AlertSubscription:
    """A standing request for alerts. `client.alerts.subscribe` makes one; one task may iterate over it.

    It begins when it is entered (`async with`), or else at the first alert that is asked for. With `since=None` its
    position is pinned then: what is raised after that is delivered. It goes on by itself when the connection or the
    instance is lost, for as long as it takes; `error` tells. An alert's `id` tells repeats.
    """

    def __init__(self, client: AsyncClient, feed: Feed, accounts: list[int], metrics: list[str]) -> None:
        self._feed = feed
        self._reader = Reader(client, feed, accounts, metrics, contextlib.nullcontext(), self._wake)
        self._client = client
        self._waiter: asyncio.Future[None] | None = None  # of the task that waits for an alert
        self._closed = False
        self._is_taking = False

    async def __aenter__(self) -> Self:
        if self._reader.loop is None:
            await self._reader.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Alert:
        alert = await self._take()
        if alert is None:
            raise StopAsyncIteration
        return alert

    async def next(self, *, timeout: float | None = None) -> Alert | None:
        """Return the next alert, or None if there was none within `timeout` seconds (None: wait for one).

        As the iteration does, this says that the alert before has been dealt with.

        Raises:
            UnavailableError: the subscription or its client was closed; where it begins could not be found out.
            InvalidRequestError, NotFoundError, ServerError: the service refused; asking again can't help.
        """
        check_timeout(timeout)
        try:
            async with asyncio.timeout(timeout) as limit:
                alert = await self._take()
        except TimeoutError:
            if limit.expired():
                return None
            raise
        if alert is None:
            raise closed()
        return alert

    async def _take(self) -> Alert | None:
        """Wait for the next alert; None once the subscription was closed."""
        if self._is_taking:
            raise InvalidRequestError("another task waits for this subscription's next alert")
        self._is_taking = True
        try:
            return await self._take_alone()
        finally:
            self._is_taking = False

    async def _take_alone(self) -> Alert | None:
        reader = self._reader
        reader.check()
        if reader.loop is None and not self._closed:
            await reader.start()
        loop = asyncio.get_running_loop()
        if reader.loop is not None and loop is not reader.loop:
            raise InvalidRequestError("the subscription belongs to another event loop")
        while True:
            if self._closed:
                return None
            if reader.end is not None and reader.at_once:
                raise again(reader.end)
            was_full = not self._feed.wanted()
            record = self._feed.take()
            if was_full and self._feed.wanted():
                reader.wake()
            if record is not None:
                # Nothing is awaited from here on: a cancelled task never takes an alert along.
                return alert_of(record)
            if reader.end is not None:
                raise again(reader.end)
            self._waiter = loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def offsets(self) -> dict[str, int]:
        """Return where a subscription would go on after this one, by partition: for `since=`, and fit for JSON.

        An alert is covered once the next one was asked for.

        Raises:
            InvalidRequestError: it hasn't begun, and begins with what is raised from then on.
        """
        return offsets_of(self._feed)

    def dropped(self) -> int:
        """Return how often an alert came while the buffer was full, and was let go, to be read again later."""
        return self._feed.dropped

    @property
    def error(self) -> TallymarkError | None:
        """Why no alerts can be read at present; None while all is well."""
        return self._reader.end or self._reader.error

    async def close(self) -> None:
        """End the subscription: an iteration over it ends. What was not taken is not covered by `offsets()`."""
        if self._reader.is_inherited:
            return  # it is the parent process's
        self._closed = True
        self._reader.stop(closed())
        await self._reader.stopped()


# ---------------------------------------------------------------- arguments


def accounts_of(given: Iterable[int] | int | None) -> list[int]:
    """Read a filter by accounts: sorted, each once; empty for all."""
    if given is None:
        return []
    try:
        listed = [given] if isinstance(given, int) else list(given)
    except TypeError:
        raise InvalidRequestError(f"account_ids must be account ids, not {type(given).__name__}") from None
    accounts = sorted({check_account_id(account) for account in listed})
    if len(accounts) > limits.SUBSCRIPTION_ACCOUNTS_MAX:
        raise InvalidRequestError(
            f"account_ids names {len(accounts)} accounts: at most {limits.SUBSCRIPTION_ACCOUNTS_MAX}, or none for all"
        )
    return accounts


def metrics_of(given: Iterable[str] | str | None) -> list[str]:
    """Read a filter by metrics: sorted, each once; empty for all."""
    if given is None:
        return []
    try:
        listed: list[Any] = [given] if isinstance(given, str) else list(given)
    except TypeError:
        raise InvalidRequestError(f"metric_codes must be metric codes, not {type(given).__name__}") from None
    for code in listed:
        if not isinstance(code, str) or not _CODE.fullmatch(code):
            raise InvalidRequestError(
                f"metric_codes: {code!r:.80} is no metric code: 1 to 64 characters of a-z A-Z 0-9 _ . : -"
            )
    metrics = sorted(set(listed))
    if len(metrics) > limits.SUBSCRIPTION_METRICS_MAX:
        raise InvalidRequestError(
            f"metric_codes names {len(metrics)} metrics: at most {limits.SUBSCRIPTION_METRICS_MAX}, or none for all"
        )
    return metrics


def positions_of(since: Positions | None) -> dict[int, int] | None:
    """Read positions by partition; the partitions are ints, or text as JSON makes it of them."""
    if since is None:
        return None
    if not isinstance(since, Mapping):
        raise InvalidRequestError(
            f"since must be offsets: positions by partition, not {type(since).__name__}"
        )
    positions: dict[int, int] = {}
    for key, position in since.items():
        partition = _partition(key)
        if not 0 <= partition < limits.PARTITIONS_MAX:
            raise InvalidRequestError(f"since: {_shown(key)} is no partition")
        if partition in positions:
            raise InvalidRequestError(f"since: partition {partition} is there twice")
        if type(position) is not int or not 0 <= position <= POSITION_MAX:
            raise InvalidRequestError(
                f"since: the position in partition {partition} must be a whole number from 0, not {_shown(position)}"
            )
        positions[partition] = position
    return positions


def _partition(key: Any) -> int:
    if type(key) is int:
        return key
    if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) <= 4:
        return int(key)
    return -1


def _shown(value: Any) -> str:
    # An int of very many digits can't be printed.
    wide = isinstance(value, int) and value.bit_length() > 128
    return "a larger int" if wide else f"{value!r:.40}"


def buffer_of(size: int) -> int:
    """Check a buffer's size."""
    if type(size) is not int or not 1 <= size <= BUFFER_MAX:
        raise InvalidRequestError(f"buffer must be a whole number from 1 to {BUFFER_MAX}, not {_shown(size)}")
    return size


def check_timeout(timeout: float | None) -> None:
    """Refuse a timeout that is no number of seconds."""
    if timeout is not None and not timeout >= 0:  # nor is NaN
        raise InvalidRequestError(f"timeout must be a number of seconds from 0, not {timeout!r:.40}")


def offsets_of(feed: Feed) -> dict[str, int]:
    """What `offsets()` gives."""
    if not feed.is_pinned:
        raise InvalidRequestError("the subscription hasn't begun: enter it first, with `with`")
    return {str(partition): position for partition, position in sorted(feed.covered.items())}


def closed() -> UnavailableError:
    """Say that the subscription was closed."""
    return UnavailableError("the subscription is closed", code=ErrorCode.CLOSED, retriable=False)


def again(error: TallymarkError) -> TallymarkError:
    """Return an error to raise each time anew, so that no traceback grows."""
    return type(error)(error.message, code=error.code, retriable=error.retriable, details=error.details)
