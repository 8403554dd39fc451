"""The calls about webhooks: what is refused and why, at any instance, however often they are repeated."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from tallymark_alerts.webhooks import WEBHOOK_CALLS, Webhooks, calls, records
from tallymark_alerts.webhooks.calls import check_secret, is_id
from tallymark_alerts.webhooks.records import Letter, Owner, Progress, Total
from tallymark_protocol import limits
from tallymark_protocol.errors import InvalidRequestError, NotFoundError, UnavailableError
from tallymark_protocol.messages import (
    DeadLettersResult,
    WebhookCreate,
    WebhookDeadLetters,
    WebhookDelete,
    WebhookList,
    WebhookRedeliver,
    WebhooksResult,
)
from tallymark_runtime.clock import RealClock
from tallymark_runtime.coordinator import MemoryCoordinator

from .alerts_webhook_fakes import SECRET, Alerts, make_webhooks

URL = "https://example.org/hook"


class Place:
    """Instances that answer calls and deliver nothing: what is at the coordinator stays as it is put there."""

    def __init__(self) -> None:
        self.coordinator = MemoryCoordinator(RealClock())
        self.alerts = Alerts(2)
        self.one = make_webhooks(self.coordinator, self.alerts, node="one", allow_private=False)
        self.other = make_webhooks(self.coordinator, self.alerts, node="other", seed=2, allow_private=False)

    async def put(self, key: bytes, value: msgspec.Struct) -> None:
        await self.coordinator.put(key, msgspec.msgpack.encode(value))

    async def letters(self, webhook_id: str, count: int) -> list[str]:
        ids = self.alerts.add(0, count)
        for position, alert_id in enumerate(ids):
            await self.put(
                records.letter_key(webhook_id, (0, position)),
                Letter(alert_id, 29, 1_000 - position, 2_000, "the endpoint answered 500"),
            )
        return ids


@pytest.fixture
async def place() -> AsyncIterator[Place]:
    made = Place()
    yield made
    await made.coordinator.close()


async def create(webhooks: Webhooks, url: str = URL, **more: Any) -> Any:
    result = await webhooks.answer(WebhookCreate(url, **more))
    assert isinstance(result, WebhooksResult)
    (info,) = result.webhooks
    return info


async def test_a_secret_is_made_and_told_once(place: Place) -> None:
    """32 bytes after the prefix; no other answer has it."""
    info = await create(place.one, description="billing", metric_codes=["b", "a", "b"], account_ids=[9, 3, 9])
    key = base64.b64decode(info.secret.removeprefix("whsec_"), validate=True)
    assert info.secret.startswith("whsec_")
    assert len(key) == 32
    assert is_id(info.id)
    assert (info.metric_codes, info.account_ids, info.description) == (["a", "b"], [3, 9], "billing")
    second = await create(place.one)
    assert second.id != info.id
    assert second.secret != info.secret
    listed = await place.other.answer(WebhookList())
    assert isinstance(listed, WebhooksResult)
    assert [one.id for one in listed.webhooks] == [info.id, second.id]
    assert [one.secret for one in listed.webhooks] == ["", ""]
    assert listed.webhooks[0] == msgspec.structs.replace(info, secret="")


async def test_a_repeated_creation_finds_the_first(place: Place) -> None:
    """At any instance, also at the same time: one webhook, with its secret; another filter is another one."""
    made = await asyncio.gather(
        *(
            create(webhooks, secret=SECRET, metric_codes=["a"])
            for webhooks in (place.one, place.other, place.one, place.other)
        )
    )
    assert {one.id for one in made} == {made[0].id}
    assert {one.secret for one in made} == {SECRET}
    assert (await create(place.one, secret=SECRET, metric_codes=["b"])).id != made[0].id
    total = await place.coordinator.get(records.TOTAL)
    assert total is not None
    assert msgspec.msgpack.decode(total.value, type=Total).count == 2


async def test_it_begins_at_the_ends_as_they_are(place: Place) -> None:
    """Pinned before the call is answered; or at the first alert."""
    place.alerts.add(0, 5)
    fresh, whole = await create(place.one), await create(place.one, from_start=True)
    for info, positions in ((fresh, {0: 5, 1: 0}), (whole, {})):
        item = await place.coordinator.get(records.progress_key(info.id))
        assert item is not None
        assert msgspec.msgpack.decode(item.value, type=Progress) == Progress(positions)


async def test_nothing_is_made_where_the_ends_are_not_known(place: Place) -> None:
    """A partition that can't say where it ends: no webhook that would begin anywhere."""
    place.alerts.fault = UnavailableError("no leader")
    with pytest.raises(UnavailableError):
        await create(place.one)
    assert (await place.coordinator.range(b"webhook")).items == []


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"url": "http://127.0.0.1/"}, "not public"),
        ({"url": "ftp://example.org/"}, "begins with https"),
        ({"secret": "secret"}, "24 to 64 random bytes"),
        ({"account_ids": [-1]}, "not -1"),
        ({"account_ids": [2**64]}, "not 18446744073709551616"),
        ({"account_ids": list(range(1_001))}, "at most 1000 accounts, not 1001"),
        ({"metric_codes": [f"m{i}" for i in range(101)]}, "at most 100 metrics, not 101"),
        ({"metric_codes": [""]}, "1 to 64 characters"),
        ({"metric_codes": ["not/a/code"]}, "1 to 64 characters"),
        ({"description": "x" * 1_025}, "at most 1024 bytes"),
        ({"description": "ü" * 513}, "at most 1024 bytes"),
    ],
)
async def test_what_is_refused(place: Place, more: dict[str, Any], reason: str) -> None:
    """With a sentence that says why; nothing is made."""
    with pytest.raises(InvalidRequestError, match=reason):
        await create(place.one, **more)
    assert (await place.coordinator.range(b"webhook")).items == []


@pytest.mark.parametrize(
    "secret",
    [
        "",
        "whsec_",
        "whsec_" + base64.b64encode(bytes(23)).decode(),
        "whsec_" + base64.b64encode(bytes(65)).decode(),
        base64.b64encode(bytes(32)).decode(),
        "whsec_" + base64.b64encode(bytes(32)).decode().rstrip("="),
        "whsec_" + base64.urlsafe_b64encode(b"\xff" * 32).decode(),
        "whsec_ü" + base64.b64encode(bytes(32)).decode(),
        "whpk_" + base64.b64encode(bytes(32)).decode(),
        "whsec_" + base64.b64encode(bytes(32)).decode() + "\n",
    ],
)
def test_secrets_that_are_none(secret: str) -> None:
    """Refused, and not repeated in the message."""
    with pytest.raises(InvalidRequestError) as caught:
        check_secret(secret)
    assert len(secret) <= 6 or secret not in str(caught.value)


@pytest.mark.parametrize("count", [24, 32, 64])
def test_secrets_of_the_specification(count: int) -> None:
    """24 to 64 bytes."""
    check_secret("whsec_" + base64.b64encode(bytes(range(count))).decode())


async def test_there_are_never_more_than_allowed(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactly the limit, also when two instances make the last one at the same time; a deletion makes room."""
    monkeypatch.setattr(limits, "WEBHOOKS_MAX", 3)
    results = await asyncio.gather(
        *(create((place.one, place.other)[i % 2], f"https://example.org/{i}") for i in range(6)),
        return_exceptions=True,
    )
    made = [one for one in results if not isinstance(one, BaseException)]
    assert len(made) == 3
    assert all(isinstance(one, InvalidRequestError) for one in results if one not in made)
    await place.one.answer(WebhookDelete(made[0].id))
    await create(place.other, "https://example.org/another")
    with pytest.raises(InvalidRequestError, match="3 webhooks already"):
        await create(place.one, "https://example.org/more")


async def test_their_records_have_a_bound_together(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large filters are counted by their bytes."""
    monkeypatch.setattr(calls, "WEBHOOKS_BYTES_MAX", 10_000)
    await create(place.one, account_ids=[2**63 + i for i in range(1_000)])
    with pytest.raises(InvalidRequestError, match="at most 10000 bytes"):
        await create(place.one, account_ids=[2**62 + i for i in range(1_000)])


async def test_deletion_leaves_nothing_and_other_webhooks_alone(place: Place) -> None:
    """Progress, owner, letters, requests: all gone in one step; a second deletion finds nothing."""
    info, other = await create(place.one), await create(place.one, "https://example.org/other")
    for one in (info, other):
        await place.letters(one.id, 2)
        await place.put(records.owner_key(one.id), Owner("one", "one.1"))
        await place.coordinator.put(records.request_key(one.id, None), b"")
    before = (await place.coordinator.range(b"webhook")).items
    result = await place.other.answer(WebhookDelete(info.id))
    assert isinstance(result, WebhooksResult)
    assert result.webhooks[0].id == info.id
    assert result.webhooks[0].dead == 2
    left = {item.key for item in (await place.coordinator.range(b"webhook")).items}
    assert left == {item.key for item in before if info.id.encode() not in item.key}
    with pytest.raises(NotFoundError, match="no webhook"):
        await place.one.answer(WebhookDelete(info.id))


@pytest.mark.parametrize(
    "webhook_id", ["", "wh_", "wh_../../metrics", "wh_0123456789abcdef01234567", "x" * 5_000]
)
async def test_ids_that_are_of_no_webhook(place: Place, webhook_id: str) -> None:
    """Not found, whatever they look like; no other key is touched."""
    await place.put(b"metrics/a", Total(1, 1))
    for call in (
        WebhookDelete(webhook_id),
        WebhookDeadLetters(webhook_id),
        WebhookRedeliver(webhook_id),
    ):
        assert isinstance(call, WEBHOOK_CALLS)
        with pytest.raises(NotFoundError):
            await place.one.answer(call)
    assert [item.key for item in (await place.coordinator.range(b"")).items] == [b"metrics/a"]


async def test_dead_letters_are_told_the_oldest_first(place: Place) -> None:
    """With their alerts read from the stores; the count is of all of them."""
    info = await create(place.one)
    ids = await place.letters(info.id, 5)
    result = await place.other.answer(WebhookDeadLetters(info.id, limit=3))
    assert isinstance(result, DeadLettersResult)
    assert [letter.alert.id for letter in result.letters] == list(reversed(ids))[:3]
    assert result.count == 5
    assert result.letters[0].attempts == 29
    for limit in (0, -1, limits.WEBHOOK_DEAD_LETTERS_MAX + 1):
        with pytest.raises(InvalidRequestError, match="limit is 1 to 1000"):
            await place.one.answer(WebhookDeadLetters(info.id, limit=limit))


async def test_when_one_letter_cannot_be_read_no_others_are(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The call fails with that error itself; what was being read ends, and nothing more is asked for."""
    info = await create(place.one)
    await place.letters(info.id, 200)
    under_way, asked = 0, 0

    async def alert(partition: int, position: int) -> None:
        nonlocal under_way, asked
        asked += 1
        under_way += 1
        try:
            if position == 199:  # the oldest: it is asked for first
                await asyncio.sleep(0)
                raise UnavailableError("no leader")
            await asyncio.Event().wait()
        finally:
            under_way -= 1

    monkeypatch.setattr(place.alerts, "alert", alert)
    with pytest.raises(UnavailableError, match="no leader"):
        await place.one.answer(WebhookDeadLetters(info.id, limit=200))
    assert under_way == 0
    before = asked
    for _ in range(50):
        await asyncio.sleep(0)
    assert asked == before <= 17


async def test_letters_become_requests_in_one_step_each(place: Place) -> None:
    """More than fit into one transaction; each letter is either still one or a request; repeated, nothing changes."""
    info = await create(place.one)
    ids = await place.letters(info.id, 130)
    result = await place.one.answer(WebhookRedeliver(info.id, [*ids[:3], "unknown"]))
    assert isinstance(result, WebhooksResult)
    assert result.webhooks[0].dead == 127
    results = await asyncio.gather(
        place.one.answer(WebhookRedeliver(info.id)), place.other.answer(WebhookRedeliver(info.id))
    )
    assert all(isinstance(one, WebhooksResult) and one.webhooks[0].dead == 0 for one in results)
    prefix = records.requests_prefix(info.id)
    asked = [item.key[len(prefix) :] for item in (await place.coordinator.range(prefix)).items]
    assert sorted(asked) == sorted([b"0/%d" % i for i in range(130)] + [b"resume"])
    assert (await place.coordinator.range(records.LETTERS)).items == []


async def test_what_is_told_of_a_webhook(place: Place) -> None:
    """Pending deliveries are those that failed; paused by the endpoint or by letters; who delivers."""
    info = await create(place.one)
    pending = [records.Pending(0, 1, 0, 0, 0), records.Pending(0, 2, 3, 1, 2), records.Pending(1, 2, 1, 1, 2)]
    progress = Progress(
        {0: 3}, pending, 0, "the endpoint answered 410 Gone", "the endpoint answered 410 Gone"
    )
    await place.put(records.progress_key(info.id), progress)
    await place.put(records.owner_key(info.id), Owner("alerts-2", "alerts-2.1"))

    async def told() -> Any:
        return (await place.other.calls.describe_all())[0]

    described = await told()
    assert (described.pending, described.owner) == (2, "alerts-2")
    assert described.paused == described.last_error == "the endpoint answered 410 Gone"
    await place.put(records.progress_key(info.id), Progress({0: 3}, [], limits.WEBHOOK_DEAD_LETTERS_MAX))
    assert (await told()).paused == "there are 1000 dead letters; redeliver them to go on"
    await place.coordinator.put(records.progress_key(info.id), b"nonsense")
    assert (await told()).paused == "its progress can't be read"
    await place.coordinator.put(records.webhook_key("wh_" + "0" * 24), b"nonsense")
    assert [one.id for one in await place.other.calls.describe_all()] == [info.id]
