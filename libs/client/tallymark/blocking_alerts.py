"""Subscriptions and webhooks of the blocking client.

A blocking subscription is read ahead by the client's own thread; alerts are taken, and waited for, in the caller's.
So an interrupted wait loses none, and `close` from another thread ends it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Self

from tallymark._feed import Feed
from tallymark._reader import Reader
from tallymark.alerts import (
    BUFFER,
    Positions,
    accounts_of,
    again,
    buffer_of,
    check_timeout,
    closed,
    metrics_of,
    offsets_of,
    positions_of,
)
from tallymark.results import Alert, alert_of
from tallymark.webhooks import DeadLetters, Webhook
from tallymark_protocol.errors import InvalidRequestError, TallymarkError, UnavailableError
from tallymark_protocol.messages import AlertRecord

if TYPE_CHECKING:
    from tallymark.blocking import Client


class BlockingAlerts:
    """Alerts as they are raised: `client.alerts` of a `Client`. See `AsyncAlerts`."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def subscribe(
        self,
        account_ids: Iterable[int] | int | None = None,
        metric_codes: Iterable[str] | str | None = None,
        *,
        since: Positions | None = None,
        buffer: int = BUFFER,
    ) -> BlockingAlertSubscription:
        """Subscribe to alerts: use it as `with … as sub:` and `for alert in sub:`. See `AsyncAlerts.subscribe`."""
        feed = Feed(buffer_of(buffer), positions_of(since))
        return BlockingAlertSubscription(
            self._client, feed, accounts_of(account_ids), metrics_of(metric_codes)
        )


class BlockingAlertSubscription:
    """What `AlertSubscription` is, for code without an event loop. One thread may iterate; any may close it."""

    def __init__(self, client: Client, feed: Feed, accounts: list[int], metrics: list[str]) -> None:
        self._client = client
        self._feed = feed
        self._news = threading.Condition()  # over the feed and the fields below
        self._reader = Reader(client._client, feed, accounts, metrics, self._news, self._wake)
        self._closed = False
        self._is_taking = False
        self._found: AlertRecord | None = None  # taken, on its way to the caller

    def __enter__(self) -> Self:
        self._start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self) -> None:
        if self._reader.loop is None:
            self._client._run(lambda _: self._reader.start())

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Alert:
        alert = self._take(None)
        if alert is None:
            raise StopIteration
        return alert

    def next(self, *, timeout: float | None = None) -> Alert | None:
        """Return the next alert, or None if there was none within `timeout` seconds. See `AlertSubscription.next`."""
        check_timeout(timeout)
        alert = self._take(timeout)
        if alert is None and self._closed:
            raise closed()
        return alert

    def _take(self, timeout: float | None) -> Alert | None:
        """Wait for the next alert; None after the timeout, and once the subscription was closed."""
        # Before any lock: a fork may have copied one that a thread held, and that thread isn't here.
        reader = self._reader
        reader.check()
        if not self._closed:
            self._start()
        with self._news:
            if self._is_taking:
                raise InvalidRequestError("another thread waits for this subscription's next alert")
            self._is_taking = True
            try:
                # What it found was taken under the lock that is still held, so no interrupt comes between.
                self._news.wait_for(self._look, timeout)
                record, self._found = self._found, None
            finally:
                self._is_taking = False
            if record is None and not self._closed and reader.end is not None:
                raise again(reader.end)
        return None if record is None else alert_of(record)

    def _look(self) -> bool:
        """Take the next alert if there is one; true where nothing is left to wait for."""
        if self._closed or (self._reader.end is not None and self._reader.at_once):
            return True
        if self._found is not None:
            return True  # an interrupt came before the caller had it
        was_full = not self._feed.wanted()
        self._found = self._feed.take()
        if was_full and self._feed.wanted():
            self._read_on()
        return self._found is not None or self._reader.end is not None

    def _read_on(self) -> None:
        loop = self._reader.loop
        if loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(self._reader.wake)

    def _wake(self) -> None:
        with self._news:
            self._news.notify_all()

    def offsets(self) -> dict[str, int]:
        """Return where a subscription would go on after this one. See `AlertSubscription.offsets`."""
        self._reader.check()
        with self._news:
            return offsets_of(self._feed)

    def dropped(self) -> int:
        """Return how often an alert came while the buffer was full, and was let go, to be read again later."""
        return self._feed.dropped

    @property
    def error(self) -> TallymarkError | None:
        """Why no alerts can be read at present; None while all is well."""
        return self._reader.end or self._reader.error

    def close(self) -> None:
        """End the subscription, from any thread: an iteration over it ends."""
        if self._reader.is_inherited:
            return  # it is the parent process's
        with self._news:
            self._closed = True
            self._news.notify_all()
        loop = self._reader.loop
        if loop is None or self._reader.end is not None:
            return  # it has never begun, or its client was closed
        with contextlib.suppress(UnavailableError):  # the client was closed meanwhile
            self._client._run(lambda _: self._stop())

    async def _stop(self) -> None:
        self._reader.stop(closed())
        await self._reader.stopped()


class Webhooks:
    """The webhooks of a cluster: `client.webhooks` of a `Client`. See `AsyncWebhooks`."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def create(
        self,
        url: str,
        secret: str | None = None,
        *,
        account_ids: Iterable[int] | int | None = None,
        metric_codes: Iterable[str] | str | None = None,
        description: str = "",
        from_start: bool = False,
        timeout: float | None = None,
    ) -> Webhook:
        """Have alerts posted to a URL. See `AsyncWebhooks.create`."""
        return self._client._run(
            lambda c: c.webhooks.create(
                url,
                secret,
                account_ids=account_ids,
                metric_codes=metric_codes,
                description=description,
                from_start=from_start,
                timeout=timeout,
            )
        )

    def list(self, *, timeout: float | None = None) -> list[Webhook]:
        """Return all webhooks, by their age."""
        return self._client._run(lambda c: c.webhooks.list(timeout=timeout))

    def get(self, webhook_id: str, *, timeout: float | None = None) -> Webhook:
        """Return a webhook; raises NotFoundError."""
        return self._client._run(lambda c: c.webhooks.get(webhook_id, timeout=timeout))

    def delete(self, webhook_id: str, *, timeout: float | None = None) -> None:
        """Forget a webhook; raises NotFoundError."""
        self._client._run(lambda c: c.webhooks.delete(webhook_id, timeout=timeout))

    def dead_letters(self, webhook_id: str, *, limit: int = 100, timeout: float | None = None) -> DeadLetters:
        """Return what could not be delivered to a webhook, the oldest first; raises NotFoundError."""
        return self._client._run(lambda c: c.webhooks.dead_letters(webhook_id, limit=limit, timeout=timeout))

    def redeliver(
        self, webhook_id: str, alert_ids: Iterable[str] | str | None = None, *, timeout: float | None = None
    ) -> Webhook:
        """Try dead letters again, as if they were new. See `AsyncWebhooks.redeliver`."""
        return self._client._run(lambda c: c.webhooks.redeliver(webhook_id, alert_ids, timeout=timeout))
