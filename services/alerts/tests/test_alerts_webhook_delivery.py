"""Delivering in virtual time: retries, isolation, pauses, dead letters, bounds."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from tallymark_alerts.webhooks import Webhooks, records
from tallymark_alerts.webhooks.records import Progress
from tallymark_alerts.webhooks.schedule import Outcome, OutcomeKind, outcome_of_status
from tallymark_alerts.webhooks.telemetry import WebhooksTelemetry
from tallymark_protocol import limits
from tallymark_protocol.errors import UnavailableError
from tallymark_protocol.messages import WebhookCreate, WebhookDeadLetters, WebhookInfo, WebhookRedeliver
from tallymark_runtime.catalog import decode_value
from tallymark_runtime.coordinator import MemoryCoordinator
from tallymark_runtime.telemetry import Telemetry

from .alerts_virtual import LoopClock, run_virtual
from .alerts_webhook_fakes import DELIVERED, Alerts, ScriptedSender, make_webhooks, sender_by_url

HOUR = 3_600.0
FAILED = outcome_of_status(500)
TIMED_OUT = Outcome(OutcomeKind.TIMEOUT, "no answer within 15 s")


class Scene:
    """One instance with webhooks at scripted endpoints."""

    def __init__(self, **config: Any) -> None:
        self.clock = LoopClock()
        self.coordinator = MemoryCoordinator(self.clock)
        self.alerts = Alerts()
        self.senders: dict[str, ScriptedSender] = {}
        self.webhooks: Webhooks = make_webhooks(
            self.coordinator,
            self.alerts,
            clock=self.clock,
            make_sender=sender_by_url(self.senders),
            **({"lease_ttl_s": 3_600.0} | config),
        )

    async def create(
        self, url: str, answer: Callable[[str, int], Any] | None = None, **more: Any
    ) -> tuple[WebhookInfo, ScriptedSender]:
        self.senders[url] = ScriptedSender(answer)
        return await self.webhooks.calls.create(WebhookCreate(url, **more)), self.senders[url]

    async def info(self, webhook_id: str) -> WebhookInfo:
        return next(one for one in await self.webhooks.calls.describe_all() if one.id == webhook_id)

    async def progress(self, webhook_id: str) -> Progress:
        item = await self.coordinator.get(records.progress_key(webhook_id))
        assert item is not None
        return decode_value(Progress, item)


def scene(body: Callable[[Scene], Awaitable[None]], **config: Any) -> None:
    """Play a scene in virtual time."""

    async def play() -> None:
        made = Scene(**config)
        await made.webhooks.start()
        try:
            await body(made)
        finally:
            await made.webhooks.close()
            await made.coordinator.close()

    run_virtual(play())


async def hang(seconds: float, outcome: Outcome) -> Outcome:
    await asyncio.sleep(seconds)
    return outcome


def test_what_fails_is_tried_again_later_and_later() -> None:
    """5 s, 10 s, 20 s … between attempts, each with up to a fifth more; then it is delivered, and not again."""

    async def body(made: Scene) -> None:
        info, sender = await made.create("https://a.example/", lambda _, n: FAILED if n < 8 else DELIVERED)
        made.alerts.add(0)
        await asyncio.sleep(HOUR)
        assert len(sender.got) == 8
        times = [moment for moment, _ in sender.got]
        for i, (earlier, later) in enumerate(itertools.pairwise(times)):
            wanted = 5 * 2**i
            assert wanted <= later - earlier <= wanted * 1.2 + 0.01
        assert (await made.info(info.id)).pending == 0
        assert (await made.progress(info.id)).positions == {0: 1, 1: 0}

    scene(body)


def test_after_72_hours_it_is_a_dead_letter_that_can_be_redelivered() -> None:
    """The last attempt is made at the end of the time; the letter tells of it; redelivered, it starts anew."""

    async def body(made: Scene) -> None:
        info, sender = await made.create("https://a.example/", lambda *_: FAILED)
        ids = made.alerts.add(1, 2)
        await asyncio.sleep(80 * HOUR)
        letters = await made.webhooks.calls.dead_letters(WebhookDeadLetters(info.id))
        assert letters.count == 2
        assert [letter.alert.id for letter in letters.letters] == ids
        for letter in letters.letters:
            assert letter.attempts == sender.ids.count(letter.alert.id)
            assert letter.last_ns - letter.first_ns == limits.WEBHOOK_RETRY_NS_MAX
            assert letter.error == "the endpoint answered 500"
        described = await made.info(info.id)
        assert (described.dead, described.pending) == (2, 0)
        assert described.last_error == "the endpoint answered 500"

        sender.answer = lambda *_: DELIVERED
        sender.got.clear()
        await made.webhooks.calls.redeliver(WebhookRedeliver(info.id, [ids[1], "no such id"]))
        await asyncio.sleep(5)
        assert sender.ids == [ids[1]]
        assert (await made.webhooks.calls.dead_letters(WebhookDeadLetters(info.id))).count == 1
        assert (await made.info(info.id)).dead == 1
        await made.webhooks.calls.redeliver(WebhookRedeliver(info.id))
        await asyncio.sleep(5)
        assert sender.ids == [ids[1], ids[0]]
        assert (await made.info(info.id)).dead == 0
        assert (await made.coordinator.range(b"webhook_redeliver/")).items == []

    scene(body)


def test_a_redelivery_that_fails_has_72_hours_again() -> None:
    """As if it were new: it becomes the same letter again, with its own times."""

    async def body(made: Scene) -> None:
        info, sender = await made.create("https://a.example/", lambda *_: FAILED)
        made.alerts.add(0)
        await asyncio.sleep(73 * HOUR)
        first = await made.webhooks.calls.dead_letters(WebhookDeadLetters(info.id))
        before = len(sender.got)
        await made.webhooks.calls.redeliver(WebhookRedeliver(info.id))
        await asyncio.sleep(71 * HOUR)
        assert (await made.webhooks.calls.dead_letters(WebhookDeadLetters(info.id))).count == 0
        await asyncio.sleep(2 * HOUR)
        again = await made.webhooks.calls.dead_letters(WebhookDeadLetters(info.id))
        assert again.letters[0].alert == first.letters[0].alert
        assert again.letters[0].first_ns > first.letters[0].last_ns
        assert len(sender.got) > before

    scene(body)


@pytest.mark.parametrize("trouble", ["hangs", "fails", "raises"])
def test_no_endpoint_delays_another(trouble: str) -> None:
    """Twenty endpoints that hang, fail or break at every attempt; one that works has every alert at once."""

    def answer(message_id: str, number: int) -> Any:
        if trouble == "hangs":
            return hang(15.0, TIMED_OUT)
        if trouble == "raises":
            raise RuntimeError("a defect of a sender")
        return FAILED

    async def body(made: Scene) -> None:
        for i in range(20):
            await made.create(f"https://bad.example/{i}", answer)
        _, good = await made.create("https://good.example/")
        await asyncio.sleep(5)
        began = asyncio.get_running_loop().time()
        ids = made.alerts.add(0, 60) + made.alerts.add(1, 60)
        await asyncio.sleep(2)
        assert sorted(good.ids) == sorted(ids)
        assert max(moment for moment, _ in good.got) - began < 0.5
        bad = made.senders["https://bad.example/7"]
        assert bad.most_under_way <= 8

    scene(body)


def test_pending_deliveries_are_bounded_and_the_rest_waits_in_the_store(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No more is read than may be pending; when the endpoint is back, everything comes, each alert."""
    monkeypatch.setattr(limits, "WEBHOOK_PENDING_MAX", 100)

    async def body(made: Scene) -> None:
        is_up = False
        info, sender = await made.create("https://a.example/", lambda *_: DELIVERED if is_up else FAILED)
        ids = made.alerts.add(0, 3 * limits.WEBHOOK_PENDING_MAX)
        await asyncio.sleep(10 * HOUR)
        progress = await made.progress(info.id)
        assert len(progress.pending) == limits.WEBHOOK_PENDING_MAX
        assert progress.positions[0] == limits.WEBHOOK_PENDING_MAX
        assert (await made.info(info.id)).pending == limits.WEBHOOK_PENDING_MAX
        is_up = True
        sender.got.clear()
        await asyncio.sleep(5 * HOUR)
        assert sorted(set(sender.ids)) == sorted(ids)
        assert len(sender.ids) == len(ids)

    scene(body)


def test_when_an_endpoint_is_back_what_waits_is_not_left_to_wait() -> None:
    """After an outage, the first success brings the others forward, although they were due hours later."""

    async def body(made: Scene) -> None:
        is_up = False
        _, sender = await made.create("https://a.example/", lambda *_: DELIVERED if is_up else FAILED)
        early = made.alerts.add(0, 50)
        await asyncio.sleep(30 * HOUR)
        is_up = True
        sender.got.clear()
        late = made.alerts.add(1, 1)
        await asyncio.sleep(2)
        assert sorted(sender.ids) == sorted(early + late)

    scene(body)


def test_gone_pauses_until_it_is_asked_to_go_on() -> None:
    """410: nothing is tried or read any more; redeliver goes on, and nothing that came meanwhile is missing."""

    async def body(made: Scene) -> None:
        gone = True
        info, sender = await made.create(
            "https://a.example/", lambda *_: outcome_of_status(410) if gone else DELIVERED
        )
        first = made.alerts.add(0, 1)
        await asyncio.sleep(HOUR)
        assert len(sender.got) == 1
        described = await made.info(info.id)
        assert described.paused == "the endpoint answered 410 Gone"
        later = made.alerts.add(0, 100) + made.alerts.add(1, 100)
        await asyncio.sleep(100 * HOUR)
        assert (
            len(sender.got) <= 1 + 64
        )  # what had been asked for before the pause may still be read, not tried
        assert len(sender.got) == 1
        assert described.dead == 0
        gone = False
        sender.got.clear()
        await made.webhooks.calls.redeliver(WebhookRedeliver(info.id))
        await asyncio.sleep(5)
        assert sorted(sender.ids) == sorted(first + later)
        assert (await made.info(info.id)).paused == ""

    scene(body)


def test_too_many_dead_letters_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the bound nothing is tried; all of them redelivered, it goes on with what came meanwhile."""
    monkeypatch.setattr(limits, "WEBHOOK_DEAD_LETTERS_MAX", 120)

    async def body(made: Scene) -> None:
        is_up = False
        info, sender = await made.create("https://a.example/", lambda *_: DELIVERED if is_up else FAILED)
        ids = made.alerts.add(0, limits.WEBHOOK_DEAD_LETTERS_MAX + 80)
        await asyncio.sleep(100 * HOUR)
        described = await made.info(info.id)
        assert limits.WEBHOOK_DEAD_LETTERS_MAX <= described.dead <= limits.WEBHOOK_DEAD_LETTERS_MAX + 8
        assert described.paused == f"there are {described.dead} dead letters; redeliver them to go on"
        before = len(sender.got)
        await asyncio.sleep(100 * HOUR)
        assert len(sender.got) == before
        is_up = True
        sender.got.clear()
        await made.webhooks.calls.redeliver(WebhookRedeliver(info.id))
        await asyncio.sleep(HOUR)
        assert sorted(set(sender.ids)) == sorted(ids)
        described = await made.info(info.id)
        assert (described.dead, described.pending, described.paused) == (0, 0, "")

    scene(body)


def test_filters_move_past_what_does_not_match() -> None:
    """Only the accounts and metrics asked for; positions go on past the others."""

    async def body(made: Scene) -> None:
        info, sender = await made.create(
            "https://a.example/", account_ids=[7, 8], metric_codes=["storage"], from_start=True
        )
        made.alerts.add(0, 5, account=7, metric="calls")
        made.alerts.add(0, 5, account=9, metric="storage")
        wanted = made.alerts.add(0, 2, account=8, metric="storage")
        made.alerts.add(0, 5, account=9, metric="storage")
        await asyncio.sleep(30)
        assert sender.ids == wanted
        assert (await made.progress(info.id)).positions == {0: 17, 1: 0}

    scene(body)


def test_a_webhook_begins_where_it_was_made_or_at_the_first_alert() -> None:
    """What was raised before is delivered only where that was asked for."""

    async def body(made: Scene) -> None:
        before = made.alerts.add(0, 3)
        _, fresh = await made.create("https://fresh.example/")
        _, whole = await made.create("https://whole.example/", from_start=True)
        after = made.alerts.add(0, 2)
        await asyncio.sleep(5)
        assert fresh.ids == after
        assert whole.ids == before + after

    scene(body)


def test_alerts_that_cannot_be_read_now_are_waited_for() -> None:
    """A store that doesn't answer is no failure of the endpoint: no attempt is counted."""

    async def body(made: Scene) -> None:
        info, sender = await made.create("https://a.example/")
        made.alerts.fault = UnavailableError("no leader")
        await asyncio.sleep(60)
        ids = made.alerts.add(0, 3)
        await asyncio.sleep(HOUR)
        assert sender.got == []
        made.alerts.fault = None
        await asyncio.sleep(10)
        assert sender.ids == ids
        assert (await made.info(info.id)).last_error == ""

    scene(body)


@pytest.mark.parametrize("count", [3, 100, 900])
def test_pending_alerts_that_cannot_be_read_hold_up_no_others(count: int) -> None:
    """After a takeover, with one partition's leader gone: the others' alerts are posted at once, old and new."""

    async def play() -> None:
        made = Scene()
        await made.webhooks.start()
        is_up, is_led = False, True
        info, sender = await made.create("https://a.example/", lambda *_: DELIVERED if is_up else FAILED)
        lost, old = made.alerts.add(0, count), made.alerts.add(1, 20)
        await asyncio.sleep(60)
        await made.webhooks.close()
        assert len((await made.progress(info.id)).pending) == count + 20
        reading: list[int] = []
        most = 0
        real = made.alerts.alert

        async def alert(partition: int, position: int) -> Any:
            nonlocal most
            reading.append(partition)
            most = max(most, reading.count(partition))
            try:
                await asyncio.sleep(0.001)
                if partition == 0 and not is_led:
                    await asyncio.sleep(5)
                    raise UnavailableError("partition 0 has no leader")
                return await real(partition, position)
            finally:
                reading.remove(partition)

        made.alerts.alert = alert  # type: ignore[method-assign]
        is_up, is_led = True, False
        sender.got.clear()
        await asyncio.sleep(4 * HOUR)  # the former owner's lease is over, and everything pending is due
        second = make_webhooks(
            made.coordinator,
            made.alerts,
            clock=made.clock,
            make_sender=sender_by_url(made.senders),
            lease_ttl_s=3_600.0,
        )
        await second.start()
        await asyncio.sleep(2)
        assert sorted(sender.ids) == sorted(old)
        for _ in range(20):
            sender.got.clear()
            began = asyncio.get_running_loop().time()
            (new,) = made.alerts.add(1)
            await asyncio.sleep(1.7)
            assert sender.ids == [new]
            assert sender.got[0][0] - began < 0.1
        assert most == 1
        assert made.alerts.single_reads < 100
        assert (await made.info(info.id)).last_error == ""
        assert len((await made.progress(info.id)).pending) == count
        is_led = True
        sender.got.clear()
        await asyncio.sleep(20)
        assert sorted(sender.ids) == sorted(lost)
        assert (await made.progress(info.id)).pending == []
        await second.close()
        await made.coordinator.close()

    run_virtual(play())


def test_one_alert_that_cannot_be_read_holds_up_no_others_of_its_partition() -> None:
    """The other ones are delivered; one that is gone from its store is a failed attempt, and no more."""

    async def body(made: Scene) -> None:
        info, sender = await made.create("https://a.example/", lambda *_: FAILED)
        ids = made.alerts.add(0, 10)
        await asyncio.sleep(80 * HOUR)
        real = made.alerts.alert

        async def alert(partition: int, position: int) -> Any:
            if position == 3:
                raise UnavailableError("its page can't be read")
            if position == 4:
                raise ValueError("a defect of a reader")
            return None if position == 5 else await real(partition, position)

        made.alerts.alert = alert  # type: ignore[method-assign]
        sender.answer = lambda *_: DELIVERED
        sender.got.clear()
        await made.webhooks.calls.redeliver(
            WebhookRedeliver(info.id)
        )  # what has become a letter is read again
        await asyncio.sleep(30)
        assert sorted(sender.ids) == sorted(ids[:3] + ids[6:])
        left = (await made.progress(info.id)).pending
        assert sorted((one.position, one.attempts > 0) for one in left) == [(3, False), (4, True), (5, True)]
        made.alerts.alert = real  # type: ignore[method-assign]
        await asyncio.sleep(60)
        assert sorted(sender.ids) == sorted(ids)
        assert (await made.info(info.id)).pending == 0

    scene(body)


def test_alerts_that_are_gone_from_their_store_fail_only_while_something_may_be_tried() -> None:
    """Paused, nothing is read or given up, so letters keep their bound; resumed, each is a failed attempt."""

    async def body(made: Scene) -> None:
        info, sender = await made.create("https://a.example/", lambda *_: FAILED)
        made.alerts.add(0, 20)
        await asyncio.sleep(80 * HOUR)
        asked = 0

        async def gone(partition: int, position: int) -> None:
            nonlocal asked
            asked += 1
            await asyncio.sleep(1)

        made.alerts.alert = gone  # type: ignore[method-assign]
        sender.answer = lambda *_: outcome_of_status(410)
        made.alerts.add(1)
        await made.webhooks.calls.redeliver(WebhookRedeliver(info.id))
        await asyncio.sleep(60)
        counters = made.webhooks.counters
        assert (await made.info(info.id)).paused
        assert counters.attempts[OutcomeKind.MISSING] == 0
        assert asked <= 1
        sender.answer = lambda *_: DELIVERED
        await made.webhooks.calls.redeliver(WebhookRedeliver(info.id))
        await asyncio.sleep(30)
        assert counters.attempts[OutcomeKind.MISSING] >= 20
        described = await made.info(info.id)
        assert (described.pending, described.dead, described.paused) == (20, 0, "")
        assert described.last_error == "the alert is not in its store any more"

    scene(body)


def test_a_coordinator_that_is_away_while_a_request_is_looked_at_again() -> None:
    """The endpoint goes on waiting: to begin anew would be to deliver again."""

    async def body(made: Scene) -> None:
        info, sender = await made.create("https://a.example/", lambda *_: DELIVERED)
        await asyncio.sleep(5)
        endpoint = made.webhooks.owners.endpoints[info.id]
        requests, real_txn = made.webhooks._shared.requests, made.coordinator.txn
        real_catch_up = requests.catch_up
        key = records.request_key(info.id, (0, 0))
        remade, refusals = 0, 0

        async def txn(compares: Any, operations: Any, *more: Any) -> Any:
            nonlocal remade
            if not remade and any(getattr(one, "key", b"") == key for one in compares):
                remade += 1
                await made.coordinator.put(key, b"")  # it is asked for once more at this moment
            return await real_txn(compares, operations, *more)

        async def catch_up() -> None:
            nonlocal refusals
            if refusals < 3:
                refusals += 1
                raise UnavailableError("the coordinator was away for a moment")
            await real_catch_up()

        made.coordinator.txn = txn  # type: ignore[method-assign]
        requests.catch_up = catch_up  # type: ignore[method-assign]
        ids = made.alerts.add(0)
        await made.coordinator.put(key, b"")
        await asyncio.sleep(30)
        assert (remade, refusals) == (1, 3)
        assert made.webhooks.owners.endpoints[info.id] is endpoint
        assert set(sender.ids) == set(ids)
        assert (await made.progress(info.id)).pending == []
        assert (await made.coordinator.range(b"webhook_redeliver/")).items == []

    scene(body)


def test_progress_is_written_at_most_once_a_second() -> None:
    """However many alerts there are; and at the end everything is in it."""

    async def body(made: Scene) -> None:
        info, sender = await made.create("https://a.example/")
        await asyncio.sleep(5)
        before = made.webhooks.counters.writes
        for _ in range(1_000):
            made.alerts.add(0)
            await asyncio.sleep(0.01)
        assert made.webhooks.counters.writes - before <= 11
        await asyncio.sleep(2)
        assert len(sender.got) == 1_000
        progress = await made.progress(info.id)
        assert (progress.positions, progress.pending) == ({0: 1_000, 1: 0}, [])

    scene(body)


def test_a_deleted_webhook_gets_nothing_more() -> None:
    """Neither new alerts nor what was pending; nothing of it is left at the coordinator."""

    async def body(made: Scene) -> None:
        info, sender = await made.create("https://a.example/", lambda *_: FAILED)
        made.alerts.add(0, 3)
        await asyncio.sleep(3)
        assert len(sender.got) == 3
        await made.webhooks.calls.delete(info.id)
        made.alerts.add(0, 3)
        await asyncio.sleep(HOUR)
        assert len(sender.got) == 3
        left = [item.key for item in (await made.coordinator.range(b"webhook")).items]
        assert [key for key in left if info.id.encode() in key] == []
        assert sender.is_closed

    scene(body)


def test_counters_tell_what_became_of_attempts() -> None:
    """By outcome; letters, and the time from raising to delivery."""

    async def body(made: Scene) -> None:
        await made.create("https://a.example/", lambda _, n: TIMED_OUT if n == 1 else DELIVERED)
        made.alerts.add(0)
        await asyncio.sleep(60)
        counters = made.webhooks.counters
        assert counters.attempts[OutcomeKind.TIMEOUT] == 1
        assert counters.attempts[OutcomeKind.DELIVERED] == 1
        assert counters.attempt_ns.count == 2
        assert counters.delivered_ns.count == 1
        assert counters.letters == 0

    scene(body)


def test_telemetry_tells_of_owned_webhooks() -> None:
    """How many, how many of them paused, and what waits for them."""

    async def body(made: Scene) -> None:
        await made.create("https://gone.example/", lambda *_: outcome_of_status(410))
        await made.create("https://failing.example/", lambda *_: FAILED)
        made.alerts.add(0, 3)
        await asyncio.sleep(60)
        telemetry = Telemetry(made.clock, node_id="alerts-1", version="1")
        telemetry.add("alerts", WebhooksTelemetry(made.webhooks))
        lines = telemetry.render().decode().splitlines()
        told = dict(line.rsplit(" ", 1) for line in lines if line.startswith("tallymark_webhook_"))
        assert float(told["tallymark_webhook_owned"]) == 2
        assert float(told["tallymark_webhook_unowned"]) == 0
        assert float(told["tallymark_webhook_paused"]) == 1
        assert float(told["tallymark_webhook_outstanding"]) == 6
        assert float(told["tallymark_webhook_pending"]) == 6
        assert float(told["tallymark_webhook_dead_letters"]) == 0
        assert float(told["tallymark_webhook_lease"]) == 1
        assert float(told['tallymark_webhook_attempts_total{outcome="gone"}']) == 3
        assert float(told["tallymark_webhook_progress_failures_total"]) == 0

    scene(body)
