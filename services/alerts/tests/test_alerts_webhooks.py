"""Webhooks from end to end: an endpoint on loopback, alerts in memory, a coordinator in memory."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import pytest
import standardwebhooks

from tallymark_protocol.messages import WebhookCreate
from tallymark_runtime.clock import RealClock
from tallymark_runtime.coordinator import MemoryCoordinator

from .alerts_webhook_fakes import Alerts, Endpoint, make_webhooks, until


@pytest.fixture
async def coordinator() -> AsyncIterator[MemoryCoordinator]:
    made = MemoryCoordinator(RealClock())
    yield made
    await made.close()


async def test_an_alert_is_posted_with_a_signature_that_verifies(coordinator: MemoryCoordinator) -> None:
    """Only alerts raised after the webhook was made; the receiver verifies by the specification's own library."""
    alerts = Alerts()
    alerts.add(0, 3)
    webhooks = make_webhooks(coordinator, alerts)
    await webhooks.start()
    async with Endpoint() as endpoint:
        made = await webhooks.calls.create(WebhookCreate(endpoint.url))
        ids = alerts.add(0, 2) + alerts.add(1, 1)
        await until(lambda: len(endpoint.got) >= 3)
        assert sorted(endpoint.ids) == sorted(ids)
        verifier = standardwebhooks.Webhook(made.secret)
        for headers, body in endpoint.got:
            message = verifier.verify(body, headers)
            assert message["type"] == "alert.raised"
            assert message["data"]["id"] == headers["webhook-id"]
            assert headers["content-type"] == "application/json"
            assert json.loads(body) == message
        await webhooks.close()
