"""Webhooks: what is asked, how answers are read, and that a repeated call makes no second one."""

import base64
import datetime as dt

import pytest
from fake_alerts import AlertLog, FakeAlerts
from fake_gateway import FakeGateway

from tallymark import AsyncClient, InvalidRequestError, NotFoundError, ServerError
from tallymark_protocol import messages as m
from tallymark_protocol.errors import ErrorCode, WireError


@pytest.fixture
async def instance():
    """An alerts instance."""
    async with FakeAlerts(AlertLog()) as running:
        yield running


@pytest.fixture
async def client(instance):
    """A client of a cluster that has it."""
    async with FakeGateway() as gateway:
        gateway.alerts_addresses = [instance.address]
        async with AsyncClient([gateway.address], timeout=5) as connected:
            yield connected


INFO = m.WebhookInfo(
    "w1", "https://example.com/a", [1], ["m"], "note", 5_000, pending=2, dead=3, paused="why", last_error="500",
    owner="a1",
)  # fmt: skip


async def test_create(client, instance):
    """Sorted filters, a secret of its own where none is given, and the answer as it is."""
    instance.answers[m.WebhookCreate] = lambda call: m.WebhooksResult(
        [m.WebhookInfo("w1", call.url, call.account_ids, call.metric_codes, "", 5_000, call.secret)]
    )
    made = await client.webhooks.create("https://example.com/a", account_ids=[3, 1], metric_codes=["n", "m"])
    assert (made.account_ids, made.metric_codes) == ([1, 3], ["m", "n"])
    assert made.created_at == dt.datetime(1970, 1, 1, 0, 0, 0, 5, tzinfo=dt.UTC)
    assert len(base64.b64decode(made.secret.removeprefix("whsec_"), validate=True)) == 32
    assert made.secret not in repr(made)
    other = await client.webhooks.create("https://example.com/a")
    assert other.secret != made.secret
    await client.webhooks.create("https://example.com/a", "whsec_mine", description="d", from_start=True)
    assert instance.calls[-1] == m.WebhookCreate(
        "https://example.com/a", "whsec_mine", [], [], "d", from_start=True
    )


async def test_a_repeated_call_is_the_same_call(client, instance):
    """After a lost answer the same secret is sent again: the service knows it by that."""
    replies = [None, WireError(int(ErrorCode.CLOSED), True, "moving"), m.WebhooksResult([INFO])]
    instance.answers[m.WebhookCreate] = lambda call: replies.pop(0)
    await client.webhooks.create("https://example.com/a")
    assert len({call.secret for call in instance.calls}) == 1
    assert len(instance.calls) == 3


async def test_list_and_get(client, instance):
    """Every field arrives."""
    instance.answers[m.WebhookList] = m.WebhooksResult([INFO])
    (webhook,) = await client.webhooks.list()
    assert (webhook.id, webhook.description, webhook.pending, webhook.dead) == ("w1", "note", 2, 3)
    assert (webhook.paused, webhook.last_error, webhook.owner) == ("why", "500", "a1")
    assert await client.webhooks.get("w1") == webhook
    with pytest.raises(NotFoundError, match="no webhook 'w2'"):
        await client.webhooks.get("w2")


async def test_delete(client, instance):
    """One that isn't there is an error; one that an earlier try of the same call deleted is not."""
    gone = WireError(int(ErrorCode.NOT_FOUND), False, "there is none")
    instance.answers[m.WebhookDelete] = gone
    with pytest.raises(NotFoundError):
        await client.webhooks.delete("w1")
    replies = [None, gone]
    instance.answers[m.WebhookDelete] = lambda call: replies.pop(0)
    await client.webhooks.delete("w1")
    assert replies == []


async def test_dead_letters(client, instance):
    """Letters carry the alert; a page says how many there are."""
    log = AlertLog()
    log.add(7)
    letter = m.DeadLetter(log.partitions[0][0], 30, 1_000, 2_000, "500")
    instance.answers[m.WebhookDeadLetters] = m.DeadLettersResult([letter], 12)
    letters = await client.webhooks.dead_letters("w1", limit=1)
    assert (len(letters), letters.total) == (1, 12)
    assert (letters[0].alert.account_id, letters[0].attempts, letters[0].error) == (7, 30, "500")
    assert letters[0].last_at > letters[0].first_at
    instance.answers[m.WebhookRedeliver] = m.WebhooksResult([INFO])
    await client.webhooks.redeliver("w1", [letters[0].alert.id])
    assert instance.calls[-1] == m.WebhookRedeliver("w1", ["0-0"])
    await client.webhooks.redeliver("w1", "0-0")
    assert instance.calls[-1].alert_ids == ["0-0"]
    await client.webhooks.redeliver("w1")
    assert instance.calls[-1].alert_ids == []


async def test_bad_arguments_are_not_sent(client, instance):
    """An empty list of alerts is not all alerts."""
    for call in (
        client.webhooks.create(None),
        client.webhooks.create("https://example.com", 7),
        client.webhooks.create("https://example.com", account_ids=[-1]),
        client.webhooks.create("https://example.com", metric_codes=[""]),
        client.webhooks.delete(""),
        client.webhooks.delete(None),
        client.webhooks.dead_letters(7),
        client.webhooks.redeliver("w1", []),
        client.webhooks.redeliver("w1", [7]),
    ):
        with pytest.raises(InvalidRequestError):
            await call
    assert instance.calls == []


async def test_an_answer_without_a_webhook(client, instance):
    """Is the service's failure."""
    instance.answers[m.WebhookCreate] = m.WebhooksResult([])
    with pytest.raises(ServerError):
        await client.webhooks.create("https://example.com")
