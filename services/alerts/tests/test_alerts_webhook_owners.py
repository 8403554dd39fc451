"""Who delivers: takeover, spreading, lost leases, lost answers; whatever happens, every alert is delivered."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgspec
import pytest

from tallymark_alerts.webhooks import Webhooks, records
from tallymark_alerts.webhooks.delivery import Endpoint
from tallymark_alerts.webhooks.owners import rank, surplus
from tallymark_alerts.webhooks.records import Instance, Owner, Progress
from tallymark_alerts.webhooks.schedule import Outcome, Schedule, outcome_of_status
from tallymark_protocol.errors import UnavailableError
from tallymark_protocol.messages import WebhookCreate, WebhookRedeliver
from tallymark_runtime.catalog import decode_value
from tallymark_runtime.coordinator import Compare, MemoryCoordinator, Operation, Put, TxnResult

from .alerts_virtual import LoopClock, run_virtual
from .alerts_webhook_fakes import DELIVERED, SECOND, Alerts, ScriptedSender, make_webhooks

FAILED = outcome_of_status(503)


class Line:
    """An instance's way to the coordinator: it can be cut, and answers can be lost on it.

    Attributes:
        is_cut: nothing goes through and nothing comes back.
        is_dead: the process is; it posts nothing either.
        losses: how likely a transaction is lost on its way, or its answer on the way back.
    """

    def __init__(self, inner: MemoryCoordinator, rng: random.Random) -> None:
        self.inner = inner
        self.rng = rng
        self.is_cut = False
        self.is_dead = False
        self.losses = 0.0

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.inner, name)
        if name == "watch":
            return self._watch

        async def call(*args: Any, **more: Any) -> Any:
            await self._go()
            result = await found(*args, **more)
            await self._go()
            return result

        return call

    async def _watch(self, prefix: bytes, from_revision: int = 0) -> Any:
        async for events in self.inner.watch(prefix, from_revision):
            await self._go()
            yield events

    async def txn(
        self, compares: Sequence[Compare], success: Sequence[Operation], failure: Sequence[Operation] = ()
    ) -> TxnResult:
        await self._go()
        if self.rng.random() < self.losses:
            raise UnavailableError("the request was lost")
        result = await self.inner.txn(compares, success, failure)
        await self._go()
        if self.rng.random() < self.losses:
            raise UnavailableError("the answer was lost")
        return result

    async def _go(self) -> None:
        await asyncio.sleep(self.rng.random() * 0.003)
        while self.is_cut:  # noqa: ASYNC110 - nothing ends it but the end of the test, or of the cut
            await asyncio.sleep(0.5)


class Fleet:
    """Instances on one coordinator, and endpoints that all of them post to."""

    def __init__(self, seed: int = 1) -> None:
        self.rng = random.Random(seed)
        self.clock = LoopClock()
        self.coordinator = MemoryCoordinator(self.clock)
        self.alerts = Alerts(3)
        self.got: dict[str, list[str]] = {}  # by URL: ids of what was delivered
        self.by: dict[str, list[str]] = {}  # by node: URLs of attempts
        self.outcome: Callable[[str], Awaitable[Outcome]] = self._deliver
        self.lines: dict[str, Line] = {}
        self.instances: dict[str, Webhooks] = {}
        self.made = 0
        self.schedule = Schedule()

    async def _deliver(self, url: str) -> Outcome:
        return DELIVERED

    async def start(self, node: str) -> Webhooks:
        self.made += 1
        line = self.lines[node] = Line(self.coordinator, random.Random(self.made))
        self.by.setdefault(node, [])

        def make_sender(webhook: records.Webhook) -> ScriptedSender:
            async def answer(message_id: str, number: int) -> Outcome:
                if line.is_dead:
                    await asyncio.Event().wait()
                self.by[node].append(webhook.url)
                outcome = await self.outcome(webhook.url)
                if outcome.is_delivered:
                    self.got.setdefault(webhook.url, []).append(message_id)
                return outcome

            return ScriptedSender(answer)

        made = make_webhooks(
            line, self.alerts, node=node, seed=self.made, clock=self.clock, make_sender=make_sender
        )
        made._shared.schedule = self.schedule
        self.instances[node] = made
        await made.start()
        return made

    async def kill(self, node: str) -> None:
        """As by kill -9: nothing of it is heard again."""
        self.lines[node].is_cut = self.lines[node].is_dead = True
        dead = self.instances.pop(node)
        # Its tasks are taken off this test's loop; the cut makes sure that nothing they do on the way counts.
        await end(dead)

    async def owners(self) -> dict[str, str]:
        listed = await self.coordinator.range(records.OWNERS)
        return {
            item.key[len(records.OWNERS) :].decode(): decode_value(Owner, item).node_id
            for item in listed.items
        }

    async def close(self) -> None:
        for line in self.lines.values():
            line.is_cut = False
        for webhooks in self.instances.values():
            await webhooks.close()
        await self.coordinator.close()


async def end(webhooks: Webhooks) -> None:
    """Take an instance's tasks off the loop without a word to anybody."""
    owners = webhooks.owners
    tasks = [*owners._tasks.values()]
    tasks += [task for endpoint in owners.endpoints.values() for task in endpoint._under_way]
    if owners._main is not None:
        tasks.append(owners._main)
    for catalog in (owners.webhooks, owners.owners, owners._instances, owners._requests):
        if catalog._task is not None:
            tasks.append(catalog._task)
    for task in tasks:
        task.cancel()


def fleet(body: Callable[[Fleet], Awaitable[None]], seed: int = 1) -> None:
    async def play() -> None:
        made = Fleet(seed)
        try:
            await body(made)
        finally:
            await made.close()

    run_virtual(play())


async def create(webhooks: Webhooks, count: int) -> list[str]:
    return [(await webhooks.calls.create(WebhookCreate(f"https://example.org/{i}"))).id for i in range(count)]


def test_rank_and_surplus() -> None:
    """Who holds fewer goes first; a part is rounded up; an instance that isn't listed yet counts."""
    held = {"a": 3, "b": 1}
    assert rank("a", held, {"a", "b", "c"}) == 2
    assert rank("b", held, {"a", "b", "c"}) == 1
    assert rank("c", held, {"a", "b", "c"}) == 0
    assert rank("a", {}, {"a", "b"}) == 0
    assert surplus("a", held, {"a", "b"}, 4) == 1
    assert surplus("a", held, {"a", "b", "c"}, 4) == 1
    assert surplus("b", held, {"a", "b"}, 4) == 0
    assert surplus("a", {"a": 5}, set(), 5) == 0


def test_webhooks_are_spread_over_instances_also_over_those_that_come_later() -> None:
    """Each has its part, soon; and when one stops, the others take its webhooks at once."""

    async def body(made: Fleet) -> None:
        first = await made.start("a")
        ids = await create(first, 30)
        await asyncio.sleep(3)
        assert set((await made.owners()).values()) == {"a"}
        await made.start("b")
        await made.start("c")
        await asyncio.sleep(30)
        owners = await made.owners()
        assert sorted(owners) == sorted(ids)
        assert [list(owners.values()).count(node) for node in "abc"] == [10, 10, 10]
        stopped = made.instances.pop("b")
        await stopped.close()
        await asyncio.sleep(2)
        assert sorted(await made.owners()) == sorted(ids)
        await asyncio.sleep(10)
        owners = await made.owners()
        assert sorted(owners) == sorted(ids)
        assert sorted(list(owners.values()).count(node) for node in "ac") == [15, 15]

    fleet(body)


def test_a_stop_leaves_nothing_to_be_delivered_again() -> None:
    """What was delivered has been written before the webhooks are left: the next owner repeats nothing."""

    async def body(made: Fleet) -> None:
        first = await made.start("a")
        await create(first, 5)
        await made.start("b")
        await asyncio.sleep(10)
        for i in range(20):
            made.alerts.add(i % 3)
            await asyncio.sleep(0.1)
        made.instances.pop("a")
        await first.close()
        await asyncio.sleep(5)
        for i in range(5):
            ids = made.got[f"https://example.org/{i}"]
            assert len(ids) == 20
            assert len(set(ids)) == 20

    fleet(body)


def test_a_killed_instance_is_taken_over_and_nothing_is_missed() -> None:
    """Within about a lease; what it had not written is repeated, and no alert is missing."""

    async def body(made: Fleet) -> None:
        first = await made.start("a")
        urls = [f"https://example.org/{i}" for i in range(8)]
        await create(first, 8)
        await made.start("b")
        await asyncio.sleep(10)
        ids: list[str] = []
        for step in range(100):
            ids += made.alerts.add(step % 3)
            await asyncio.sleep(0.05)
            if step == 50:
                await made.kill("a")
        await asyncio.sleep(10)
        for url in urls:
            assert sorted(set(made.got[url])) == sorted(ids)
            assert len(made.got[url]) <= len(ids) + 50  # about a second's worth was delivered and not written
        assert set((await made.owners()).values()) == {"b"}

    fleet(body)


def test_an_instance_that_lost_the_coordinator_delivers_nothing_when_its_lease_may_have_run_out() -> None:
    """It is silent before the other one begins; when it is back, it has a new lease and its part again."""

    async def body(made: Fleet) -> None:
        first = await made.start("a")
        await create(first, 6)
        await made.start("b")
        await asyncio.sleep(10)
        line = made.lines["a"]
        line.is_cut = True
        await asyncio.sleep(1.95)  # a lease lasts 2 s from a renewal before the cut, and is trusted for 1.8 s
        before = len(made.by["a"])
        ids = made.alerts.add(0, 5)
        await asyncio.sleep(5)
        assert len(made.by["a"]) == before
        for i in range(6):
            assert sorted(made.got[f"https://example.org/{i}"]) == sorted(ids)
        assert set((await made.owners()).values()) == {"b"}
        line.is_cut = False
        await asyncio.sleep(10)
        owners = list((await made.owners()).values())
        assert sorted(owners) == ["a", "a", "a", "b", "b", "b"]
        more = made.alerts.add(1, 5)
        await asyncio.sleep(5)
        for i in range(6):
            assert sorted(made.got[f"https://example.org/{i}"]) == sorted(ids + more)

    fleet(body)


def test_what_an_old_owner_writes_late_is_refused() -> None:
    """The progress belongs to the owner key that is there: a write under an earlier one changes nothing."""

    async def body(made: Fleet) -> None:
        first = await made.start("a")
        (webhook_id,) = await create(first, 1)
        await asyncio.sleep(5)
        endpoint = first.owners.endpoints[webhook_id]
        outbox = endpoint.outbox
        assert outbox is not None
        made.alerts.add(0, 3)
        await asyncio.sleep(0.1)
        # Somebody else becomes the owner behind its back.
        key = records.owner_key(webhook_id)
        await made.coordinator.delete(key)
        await made.coordinator.put(key, b"\x82\xa7node_id\xa1x\xa8instance\xa1x")
        written = Progress({0: 77, 1: 0, 2: 0})
        await made.coordinator.put(records.progress_key(webhook_id), msgspec.msgpack.encode(written))
        await asyncio.sleep(10)
        item = await made.coordinator.get(records.progress_key(webhook_id))
        assert item is not None
        assert decode_value(Progress, item) == written
        assert webhook_id not in first.owners.endpoints
        assert first.owners.endpoints == {}

    fleet(body)


def test_a_webhook_that_cannot_be_left_disturbs_no_other() -> None:
    """Several are given up at once and one of them fails at once: the rest end before the next round begins."""

    async def body(made: Fleet) -> None:
        first = await made.start("a")
        ids = await create(first, 24)
        await asyncio.sleep(3)
        owners = first.owners
        lives = owners._instance
        finishing: list[str] = []
        most = dict.fromkeys(ids, 0)

        def slow(webhook_id: str, endpoint: Endpoint) -> Callable[[float], Awaitable[None]]:
            real = endpoint.finish

            async def finish(wait_s: float) -> None:
                finishing.append(webhook_id)
                most[webhook_id] = max(most[webhook_id], finishing.count(webhook_id))
                try:
                    await asyncio.sleep(4)  # attempts that are under way
                    await real(wait_s)
                finally:
                    finishing.remove(webhook_id)

            return finish

        async def fail(_: float) -> None:
            raise UnavailableError("the coordinator was away for a moment")

        for number, (webhook_id, endpoint) in enumerate(sorted(owners.endpoints.items())):
            endpoint.finish = fail if number % 3 == 0 else slow(webhook_id, endpoint)  # type: ignore[method-assign]
        for number in range(5):
            value = msgspec.msgpack.encode(Instance("x"))
            await made.coordinator.put(records.instance_key(f"other{number}"), value)
        for _ in range(80):
            await asyncio.sleep(0.5)
            assert owners.has_lease
        assert owners._instance == lives, "ownership was dropped and begun anew"
        assert set(most.values()) <= {0, 1}, "one webhook was left twice at a time"
        delivered = made.alerts.add(0)
        await asyncio.sleep(20)
        assert all(made.got.get(f"https://example.org/{number}") == delivered for number in range(24))

    fleet(body)


class SlowAnswers:
    """A coordinator on which one write arrives late, and the read after it is answered later still."""

    def __init__(self, inner: MemoryCoordinator) -> None:
        self.inner = inner
        self.is_slow = False
        self.late: list[asyncio.Task[Any]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    async def get(self, key: bytes) -> Any:
        item = await self.inner.get(key)
        if self.late and key.startswith(records.PROGRESS):
            await self.late.pop()
            await asyncio.sleep(0.5)
        return item

    async def txn(self, *args: Any) -> TxnResult:
        is_write = any(isinstance(one, Put) and one.key.startswith(records.PROGRESS) for one in args[1])
        if not self.is_slow or not is_write:
            return await self.inner.txn(*args)
        self.is_slow = False

        async def arrive() -> TxnResult:
            await asyncio.sleep(3)
            return await self.inner.txn(*args)

        task = asyncio.get_running_loop().create_task(arrive())
        self.late.append(task)
        return await asyncio.shield(task)


def test_a_write_of_its_own_that_arrives_late_is_not_written_over() -> None:
    """Delivering failed and was begun anew while a write was on its way: what that granted is not lost."""

    async def play() -> None:
        clock = LoopClock()
        coordinator, alerts = SlowAnswers(MemoryCoordinator(clock)), Alerts(2)
        is_up = False
        sender = ScriptedSender(lambda *_: DELIVERED if is_up else FAILED)
        webhooks = make_webhooks(
            coordinator, alerts, clock=clock, lease_ttl_s=60.0, make_sender=lambda _: sender
        )
        webhooks._shared.schedule = Schedule(total_ns=1)
        await webhooks.start()
        (webhook_id,) = await create(webhooks, 1)
        (lost,) = alerts.add(0)
        await asyncio.sleep(30)
        assert len((await coordinator.range(records.LETTERS)).items) == 1
        outbox = webhooks.owners.endpoints[webhook_id].outbox
        assert outbox is not None
        webhooks._shared.schedule = outbox._schedule = Schedule()
        coordinator.is_slow = True
        await webhooks.calls.redeliver(WebhookRedeliver(webhook_id))
        await asyncio.sleep(0.5)
        alerts.fault = RuntimeError("a defect of a reader")
        alerts.add(1)
        await asyncio.sleep(0.5)
        alerts.fault = None
        await asyncio.sleep(20)
        is_up = True
        sender.got.clear()
        await asyncio.sleep(600)
        assert lost in sender.ids
        await webhooks.close()
        await coordinator.close()

    run_virtual(play())


@pytest.mark.parametrize("seed", range(12))
def test_whatever_happens_every_alert_is_delivered(seed: int) -> None:
    """Instances killed, cut off and stopped at random, answers lost, endpoints that fail, letters redelivered."""

    async def body(made: Fleet) -> None:
        rng = made.rng
        troubled = True

        async def outcome(url: str) -> Outcome:
            await asyncio.sleep(rng.random() * 0.1)
            return FAILED if troubled and rng.random() < 0.3 else DELIVERED

        made.outcome = outcome
        made.schedule = Schedule(
            total_ns=rng.choice([12, 30, 3_600]) * SECOND
        )  # the first of them make letters
        nodes = [f"n{i}" for i in range(3)]
        for node in nodes:
            await made.start(node)
        urls = [f"https://example.org/{i}" for i in range(6)]
        await create(made.instances[nodes[0]], len(urls))
        for line in made.lines.values():
            line.losses = 0.1
        ids: list[str] = []
        for _ in range(60):
            ids += made.alerts.add(rng.randrange(3), rng.randrange(1, 6))
            await asyncio.sleep(rng.random())
            action = rng.random()
            if action < 0.1 and len(made.instances) > 1:
                await made.kill(rng.choice(sorted(made.instances)))
            elif action < 0.15 and len(made.instances) > 1:
                stopped = made.instances.pop(rng.choice(sorted(made.instances)))
                await stopped.close()
            elif action < 0.25:
                node = f"n{made.made}"
                await made.start(node)
                made.lines[node].losses = 0.1
            elif action < 0.35:
                line = made.lines[rng.choice(sorted(made.instances))]
                line.is_cut = True
                asyncio.get_running_loop().call_later(rng.random() * 4, setattr, line, "is_cut", False)
            elif action < 0.4 and made.instances:
                webhooks = made.instances[rng.choice(sorted(made.instances))]
                for info in await webhooks.calls.describe_all():
                    try:
                        await webhooks.calls.redeliver(WebhookRedeliver(info.id))
                    except UnavailableError:
                        break
        troubled = False
        for line in made.lines.values():
            line.losses = 0.0
        if not made.instances:
            await made.start("last")
        await asyncio.sleep(600)
        (webhooks, *_) = made.instances.values()
        for info in await webhooks.calls.describe_all():
            await webhooks.calls.redeliver(WebhookRedeliver(info.id))
        await asyncio.sleep(60)
        for url in urls:
            assert sorted(set(made.got[url])) == sorted(ids)
        listed = await made.coordinator.range(records.PROGRESS)
        ends = {number: len(log) for number, log in enumerate(made.alerts.logs)}
        for item in listed.items:
            progress = decode_value(Progress, item)
            assert progress.positions == ends
            assert progress.pending == []
        for prefix in (records.REQUESTS, records.LETTERS):
            assert (await made.coordinator.range(prefix)).items == []
        assert len(await made.owners()) == len(urls)

    fleet(body, seed)
