"""Twins of what webhooks need: alerts in memory, an endpoint on loopback, a sender that is told what to answer."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from aiohttp import web

from tallymark_alerts.webhooks import Webhooks, WebhooksConfig
from tallymark_alerts.webhooks.records import Webhook
from tallymark_alerts.webhooks.schedule import Outcome, OutcomeKind
from tallymark_protocol import int128
from tallymark_protocol.messages import AlertRecord, AlertsBatch
from tallymark_runtime.clock import RealClock

SECOND = 10**9
DELIVERED = Outcome(OutcomeKind.DELIVERED)
SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"  # the specification's own example


def alert_at(partition: int, position: int, *, account: int = 42, metric: str = "calls") -> AlertRecord:
    """An alert record."""
    return AlertRecord(
        id=f"{partition}-{position * 10}-0-7",
        account_id=account,
        metric_code=metric,
        threshold_code="cap",
        threshold_value=100,
        period_start_ns=0,
        period_end_ns=86_400 * SECOND,
        value_at_cross=int128.to_bytes(100 + position),
        first_multiple=int128.to_bytes(1),
        last_multiple=int128.to_bytes(1),
        triggered_at_ns=1_700_000_000 * SECOND,
        event_offset=position * 10,
        partition=partition,
        position=position,
    )


class Alerts:
    """Partitions of alert records in memory; reads as the alerts service does.

    Attributes:
        fault: raised by reads while it is set.
        reads: how many batches were read.
    """

    def __init__(self, partitions: int = 2) -> None:
        self.logs: list[list[AlertRecord]] = [[] for _ in range(partitions)]
        self.fault: Exception | None = None
        self.reads = 0
        self.single_reads = 0
        self._news = asyncio.Event()

    def add(self, partition: int, count: int = 1, *, account: int = 42, metric: str = "calls") -> list[str]:
        """Raise alerts; return their ids."""
        log = self.logs[partition]
        made = [alert_at(partition, len(log) + i, account=account, metric=metric) for i in range(count)]
        log.extend(made)
        self._news.set()
        self._news = asyncio.Event()
        return [alert.id for alert in made]

    async def next_batch(
        self,
        *,
        account_ids: Sequence[int],
        metric_codes: Sequence[str],
        since: Mapping[int, int] | None,
        limit: int,
        wait_s: float,
    ) -> AlertsBatch:
        """As in the port."""
        self.reads += 1
        if self.fault is not None:
            raise self.fault
        if since is None:
            return AlertsBatch([], {number: len(log) for number, log in enumerate(self.logs)})
        try:
            async with asyncio.timeout(wait_s):
                while True:
                    news = self._news
                    batch = self._batch(account_ids, metric_codes, since, limit)
                    if batch.alerts or not wait_s:
                        return batch
                    await news.wait()
        except TimeoutError:
            return self._batch(account_ids, metric_codes, since, limit)

    def _batch(
        self, accounts: Sequence[int], metrics: Sequence[str], since: Mapping[int, int], limit: int
    ) -> AlertsBatch:
        found: list[AlertRecord] = []
        positions: dict[int, int] = {}
        for number, log in enumerate(self.logs):
            position = since.get(number, 0)
            while position < len(log) and len(found) < limit:
                alert = log[position]
                position += 1
                wanted = not accounts or alert.account_id in accounts
                if wanted and (not metrics or alert.metric_code in metrics):
                    found.append(alert)
            positions[number] = position
        return AlertsBatch(found, positions)

    async def alert(self, partition: int, position: int) -> AlertRecord | None:
        """As in the port."""
        self.single_reads += 1
        if self.fault is not None:
            raise self.fault
        log = self.logs[partition]
        return log[position] if position < len(log) else None


class Endpoint:
    """An HTTP endpoint on loopback that notes what it gets. Use as a context manager.

    Attributes:
        got: headers and bodies, in the order of their arrival.
        answer: makes the response; replace it.
    """

    def __init__(self, answer: Callable[[web.Request, int], Any] | None = None) -> None:
        self.got: list[tuple[dict[str, str], bytes]] = []
        self.answer = answer or (lambda request, number: web.Response(status=204))
        self._runner: web.AppRunner | None = None
        self.port = 0

    @property
    def url(self) -> str:
        """Of this endpoint."""
        return f"http://127.0.0.1:{self.port}/hook"

    @property
    def ids(self) -> list[str]:
        """Of the messages that came."""
        return [headers["webhook-id"] for headers, _ in self.got]

    async def __aenter__(self) -> Endpoint:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.01)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.port = self._runner.addresses[0][1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._runner is not None
        await self._runner.cleanup()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        self.got.append(({name.lower(): value for name, value in request.headers.items()}, body))
        result = self.answer(request, len(self.got))
        if asyncio.iscoroutine(result):
            result = await result
        return result


class ScriptedSender:
    """Answers what it is told; notes when it was asked what.

    Attributes:
        got: (time of the loop, alert id) of each attempt.
        answer: makes the outcome of an attempt; may wait.
    """

    def __init__(self, answer: Callable[[str, int], Any] | None = None) -> None:
        self.got: list[tuple[float, str]] = []
        self.answer = answer or (lambda message_id, number: DELIVERED)
        self.under_way = 0
        self.most_under_way = 0
        self.is_closed = False

    @property
    def ids(self) -> list[str]:
        """Of the messages that came."""
        return [message_id for _, message_id in self.got]

    async def post(self, headers: dict[str, str], body: bytes) -> Outcome:
        """As in the port."""
        self.is_closed = False
        self.got.append((asyncio.get_running_loop().time(), headers["webhook-id"]))
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            result = self.answer(headers["webhook-id"], len(self.got))
            if asyncio.iscoroutine(result):
                result = await result
            return result
        finally:
            self.under_way -= 1

    async def close(self) -> None:
        """As in the port."""
        self.is_closed = True


def make_webhooks(
    coordinator: Any, alerts: Alerts, *, node: str = "alerts-1", seed: int = 1, **more: Any
) -> Webhooks:
    """Webhooks of one instance, with everything in memory."""
    clock = more.pop("clock", None) or RealClock()
    make_sender = more.pop("make_sender", None)
    config = WebhooksConfig(node_id=node, **({"allow_private": True} | more))
    return Webhooks(
        config,
        coordinator,
        clock,
        random.Random(seed),
        alerts,
        make_sender=make_sender,
        secrets=random.Random(seed).randbytes,
    )


async def until(condition: Callable[[], Any], seconds: float = 20.0) -> None:
    """Wait until something holds."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - nothing tells of it
            await asyncio.sleep(0.005)


def sender_by_url(senders: dict[str, ScriptedSender]) -> Callable[[Webhook], ScriptedSender]:
    """What makes the sender that belongs to a webhook's URL."""
    return lambda webhook: senders[webhook.url]
