"""Webhooks from end to end: an endpoint on loopback, alerts in memory, a coordinator in memory."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import standardwebhooks
from aiohttp import web

from tallymark_alerts.webhooks import calls, records, schedule, sender
from tallymark_alerts.webhooks.message import AlertData
from tallymark_protocol import limits
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


PAGE = (Path(__file__).resolve().parents[3] / "docs" / "webhooks.md").read_text(encoding="utf-8")


async def test_the_receiver_of_the_page_works(
    coordinator: MemoryCoordinator, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The snippet takes what is posted, once each, and refuses what is signed by another secret."""
    (snippet,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    scope: dict[str, Any] = {"__name__": "receiver"}
    exec(snippet, scope)
    runner = web.AppRunner(scope["app"], access_log=None, shutdown_timeout=0.01)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}/alerts"
    alerts = Alerts()
    webhooks = make_webhooks(coordinator, alerts)
    await webhooks.start()
    monkeypatch.setenv("WEBHOOK_SECRET", (await webhooks.calls.create(WebhookCreate(url))).secret)
    ids = alerts.add(0, 3)
    await until(lambda: scope["seen"] == set(ids))
    await webhooks.calls.create(WebhookCreate(url))
    alerts.add(1, 1)
    await until(lambda: len(scope["seen"]) == 4)
    listed: list[Any] = []

    async def is_refused() -> bool:
        listed[:] = await webhooks.calls.describe_all()
        return listed[1].last_error == "the endpoint answered 401"

    for _ in range(1_000):
        if await is_refused():
            break
        await asyncio.sleep(0.01)
    assert [one.last_error for one in listed] == ["", "the endpoint answered 401"]
    assert capsys.readouterr().out.count("account 42 reached cap of calls") == 4
    await webhooks.close()
    await runner.cleanup()


def test_the_page_says_what_the_code_does() -> None:
    """Its example has the body's fields, its numbers are the code's."""
    (example,) = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
    message = json.loads(example)
    assert list(message["data"]) == list(AlertData.__struct_fields__)
    kinds = {name: str if kind == "str" else int for name, kind in AlertData.__annotations__.items()}
    assert {name: type(value) for name, value in message["data"].items()} == kinds
    for said in (
        f"{limits.WEBHOOK_PENDING_MAX:,} messages",
        f"{limits.WEBHOOK_DEAD_LETTERS_MAX:,} dead letters",
        f"{records.PENDING_IN_ALL:,} waiting messages and {records.LETTERS_IN_ALL:,} dead letters",
        (
            f"with {limits.WEBHOOKS_MAX:,} webhooks, {records.pending_max(limits.WEBHOOKS_MAX)} and "
            f"{records.letters_max(limits.WEBHOOKS_MAX)} each"
        ),
        f"{records.WEBHOOKS_BYTES_MAX // 2**20} MiB",
        f"within {sender.TIMEOUT_S:g} s",
        f"comes {schedule.Schedule().first_ns / 1e9:g} s after",
        f"up to {schedule.Schedule().most_ns / 3.6e12:g} hours",
        f"{limits.WEBHOOK_RETRY_NS_MAX / 3.6e12:g} hours after",
        f"what follows `{calls.SECRET_PREFIX}`",
    ):
        assert said in " ".join(PAGE.split()), said
