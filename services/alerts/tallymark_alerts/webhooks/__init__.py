"""Webhooks: alerts posted to endpoints, signed, tried again, and remembered by the coordinator.

`Webhooks` is an instance's part in it: it answers the calls about them (`calls`), owns some of them under its lease
(`owners`), and delivers for those (`delivery`). What is remembered, and where, is `records`'; when what is sent is
decided by pure modules (`schedule`, `outbox`), what is sent by `message`, and to whom it may be sent by `addresses`.
"""

from __future__ import annotations

import importlib.metadata
import random
from collections.abc import Callable
from typing import Final

import msgspec

from tallymark_alerts.webhooks.calls import WebhookCall, WebhookCalls
from tallymark_alerts.webhooks.counters import WebhookCounters
from tallymark_alerts.webhooks.delivery import CONNECTIONS_MAX, Shared
from tallymark_alerts.webhooks.owners import Owners
from tallymark_alerts.webhooks.ports import AlertReader, Sender
from tallymark_alerts.webhooks.records import RequestCatalog, Webhook
from tallymark_alerts.webhooks.schedule import Schedule
from tallymark_alerts.webhooks.sender import HttpSender, Lookups
from tallymark_protocol.messages import (
    Message,
    WebhookCreate,
    WebhookDeadLetters,
    WebhookDelete,
    WebhookList,
    WebhookRedeliver,
)
from tallymark_runtime.clock import Clock
from tallymark_runtime.coordinator import Coordinator
from tallymark_runtime.randomness import secret_bytes

__all__ = ["WEBHOOK_CALLS", "Webhooks", "WebhooksConfig"]

WEBHOOK_CALLS: Final = (
    WebhookCreate,
    WebhookList,
    WebhookDelete,
    WebhookDeadLetters,
    WebhookRedeliver,
)


class WebhooksConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What an instance is told."""

    node_id: str
    allow_private: bool = False  # deliver to addresses that aren't public, too
    lease_ttl_s: float = 2.0  # how long this instance's lease lasts: what a takeover waits for
    retry_first_s: float = 5.0  # from a delivery's first attempt to its second


class Webhooks:
    """An instance's webhooks. `start` it once alerts can be read, and `close` it before they can't.

    Args:
        config: what it is told.
        coordinator: of the cluster.
        clock: of times on messages and of the lease; use one that doesn't jump.
        rng: for jitter, and the name of this process life.
        reader: where alerts are read.
        make_sender: makes what carries a webhook's messages; None: HTTP.
        secrets: gives so many bytes that nobody can guess.

    Attributes:
        calls: answers the calls about webhooks.
        counters: of deliveries.
    """

    def __init__(
        self,
        config: WebhooksConfig,
        coordinator: Coordinator,
        clock: Clock,
        rng: random.Random,
        reader: AlertReader,
        *,
        make_sender: Callable[[Webhook], Sender] | None = None,
        secrets: Callable[[int], bytes] = secret_bytes,
    ) -> None:
        self.counters = WebhookCounters()
        self.calls = WebhookCalls(coordinator, reader, clock, secrets, allow_private=config.allow_private)
        lookups = Lookups()

        def make_http(webhook: Webhook) -> Sender:
            return HttpSender(
                webhook.url, lookups, allow_private=config.allow_private, connections=CONNECTIONS_MAX
            )

        requests = RequestCatalog(coordinator)
        self._shared = Shared(
            coordinator=coordinator,
            clock=clock,
            rng=rng,
            reader=reader,
            requests=requests,
            counters=self.counters,
            schedule=Schedule(first_ns=int(config.retry_first_s * 1e9)),
            make_sender=make_http if make_sender is None else make_sender,
            user_agent=f"tallymark/{importlib.metadata.version('tallymark')}",
        )
        self.owners = Owners(
            node_id=config.node_id,
            life=f"{config.node_id}.{rng.getrandbits(64):016x}",
            coordinator=coordinator,
            requests=requests,
            shared=self._shared,
            clock=clock,
            rng=rng,
            lease_ttl_s=config.lease_ttl_s,
        )

    async def start(self) -> None:
        """Learn of the webhooks; from then on, deliver for those that fall to this instance."""
        await self.owners.start()

    async def close(self) -> None:
        """Write every progress and leave the webhooks to others. Call it once."""
        await self.owners.close()

    async def answer(self, call: WebhookCall) -> Message:
        """Answer a call about webhooks."""
        return await self.calls.answer(call)

    def problem(self) -> str:
        """Why this instance delivers nothing at all, in a sentence; "" where it does."""
        return "" if self.owners.has_lease else "has no lease to deliver to webhooks under"
