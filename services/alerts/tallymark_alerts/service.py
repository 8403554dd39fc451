"""An instance of the alerts role: hands alert records on to whoever asks.

Puts the parts together: the tail brings new records from the stores' leaders into windows, the source answers readers
from there and from the stores, webhooks read from the source as any subscriber does. An instance remembers nothing of
its subscribers between two calls, so any number of instances run side by side, and each can answer any call.
"""

from __future__ import annotations

import asyncio
import random
from typing import Final

import msgspec

from tallymark_alerts.checking import check_fetch
from tallymark_alerts.counters import AlertsCounters
from tallymark_alerts.source import AlertSource
from tallymark_alerts.stores import AskedStores
from tallymark_alerts.tail import Tail
from tallymark_alerts.webhooks import WEBHOOK_CALLS, Webhooks, WebhooksConfig
from tallymark_protocol.errors import TallymarkError
from tallymark_protocol.messages import PROTOCOL_VERSION, AlertsBatch, AlertsFetch, Call, Message, Welcome
from tallymark_runtime.asking import less_margin
from tallymark_runtime.clock import Clock
from tallymark_runtime.coordinator import Coordinator
from tallymark_runtime.instruments import count_in
from tallymark_runtime.transport import (
    FrameServer,
    HandlerBase,
    ServerConnection,
    ServerLimits,
    call_deadline,
)

# A subscriber has a call under way nearly all the time, and one process may hold many subscribers.
SERVER_LIMITS: Final = ServerLimits(calls_per_connection_max=4_096, calls_max=16_384)


class AlertsConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What an instance is told."""

    node_id: str
    partition_count: int
    listen: str = "127.0.0.1:0"
    advertise: str = ""
    lease_ttl_s: float = 2.0  # how long a silent instance keeps its webhooks
    webhook_allow_private: bool = False  # deliver to addresses that aren't public, too
    webhook_retry_s: float = 5.0  # before a delivery is tried again for the first time


class AlertsService(HandlerBase):
    """An instance that serves. Made by `serve`.

    Attributes:
        address: "host:port" it is reached by.
        counters: its numbers.
        tail: what it has reached.
        source: what its readers read from.
        webhooks: what it delivers.
    """

    def __init__(
        self, config: AlertsConfig, coordinator: Coordinator, clock: Clock, rng: random.Random
    ) -> None:
        self.address = ""
        self.counters = AlertsCounters()
        self._config = config
        self._clock = clock
        self._stores = AskedStores(coordinator, config.node_id, rng)
        self.tail = Tail(
            self._stores,
            partition_count=config.partition_count,
            clock=clock,
            rng=rng,
            counters=self.counters,
        )
        self.source = AlertSource(
            self._stores,
            self.tail.windows,
            partition_count=config.partition_count,
            counters=self.counters,
            is_lost=self.tail.is_lost,
        )
        self.tail.on_records = self.source.on_records
        self.tail.on_begun = self.source.on_begun
        self.webhooks = Webhooks(
            WebhooksConfig(
                node_id=config.node_id,
                allow_private=config.webhook_allow_private,
                lease_ttl_s=config.lease_ttl_s,
                retry_first_s=config.webhook_retry_s,
            ),
            coordinator,
            clock,
            rng,
            self.source,
        )
        self._server = FrameServer(self, self._welcome, limits=SERVER_LIMITS)

    async def start(self) -> None:
        """Learn of the cluster, listen, begin to follow."""
        await self._stores.start()
        self.tail.start()
        bound = await self._server.start(self._config.listen)
        self.address = self._config.advertise or bound
        await self.webhooks.start()

    async def close(self) -> None:
        """Answer what is held, write down what was delivered, then stop. Call it once."""
        self.source.end_waits()
        await self._server.close()
        await self.webhooks.close()
        await self.source.close()
        await self.tail.close()
        await self._stores.close()

    def _welcome(self) -> Welcome:
        return Welcome(
            version=PROTOCOL_VERSION, node_id=self._config.node_id, role="alerts", now_ns=self._clock.now_ns()
        )

    @property
    def partition_count(self) -> int:
        """Of the cluster."""
        return self._config.partition_count

    @property
    def connection_count(self) -> int:
        """Connections of callers."""
        return len(self._server.connections)

    def problem(self) -> str:
        """Why subscribers can't be served from here yet, in a sentence; "" where they can."""
        missing = self.tail.missing()
        if missing:
            return (
                f"the leaders of {len(missing)} of {self.partition_count} partitions have not been reached yet, "
                f"partition {missing[0]} among them"
            )
        return self.webhooks.problem()

    # ------------------------------------------------------------ calls

    async def on_call(self, connection: ServerConnection, call: Call) -> Message:
        """Answer a subscriber, or an administrator of webhooks."""
        if isinstance(call, AlertsFetch):
            try:
                batch = await self._fetch(call)
            except TallymarkError as error:
                count_in(self.counters.failures, int(error.code))
                raise
            self.counters.answers += 1
            self.counters.delivered += len(batch.alerts)
            return batch
        if isinstance(call, WEBHOOK_CALLS):
            return await self.webhooks.answer(call)
        return await super().on_call(connection, call)

    async def _fetch(self, call: AlertsFetch) -> AlertsBatch:
        check_fetch(call, self._config.partition_count)
        left = less_margin(call_deadline() - asyncio.get_running_loop().time())
        return await self.source.next_batch(
            account_ids=call.account_ids,
            metric_codes=call.metric_codes,
            since=call.since,
            limit=call.limit,
            wait_s=min(call.wait_ms / 1000, left),
        )


async def serve(
    config: AlertsConfig, coordinator: Coordinator, clock: Clock, rng: random.Random
) -> AlertsService:
    """Start an instance; close it at the end.

    Raises:
        OSError: the address can't be listened on.
    """
    service = AlertsService(config, coordinator, clock, rng)
    try:
        await service.start()
    except BaseException:
        await service.close()
        raise
    return service
