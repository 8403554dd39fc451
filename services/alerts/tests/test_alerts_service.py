"""An instance over real sockets: calls that are refused, leaders that move, instances side by side, a graceful end."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import pytest

from tallymark_alerts import service as alerts
from tallymark_alerts.telemetry import AlertsTelemetry
from tallymark_protocol import limits
from tallymark_protocol.errors import ErrorCode, InvalidRequestError, TallymarkError, UnavailableError
from tallymark_protocol.identifiers import partition_of
from tallymark_protocol.messages import (
    PROTOCOL_VERSION,
    AlertsBatch,
    AlertsFetch,
    GetTopology,
    StoreAlerts,
    StoreTail,
    Topology,
    Welcome,
)
from tallymark_runtime.catalog import Leader, leader_key
from tallymark_runtime.clock import RealClock
from tallymark_runtime.coordinator import MemoryCoordinator
from tallymark_runtime.peer import PeerClient
from tallymark_runtime.telemetry import Scrape
from tallymark_runtime.transport import FrameServer, HandlerBase

from .alerts_fakes import FakeStores

COUNT = 3
WAIT_S = 20.0
LONG_MS = 20_000


class Store(HandlerBase):
    """A store process; what it holds and leads is in `FakeStores`."""

    def __init__(self, shared: FakeStores) -> None:
        self._shared = shared
        self.server = FrameServer(
            self, lambda: Welcome(version=PROTOCOL_VERSION, node_id="s", role="store", now_ns=0)
        )

    async def on_call(self, connection: Any, call: Any) -> Any:
        if isinstance(call, StoreTail):
            return await self._shared.tail(self.server.address, call, 0)
        assert isinstance(call, StoreAlerts)
        if self._shared.leaders[call.partition] != self.server.address:
            raise UnavailableError("not led here", code=ErrorCode.NOT_LEADER)
        return await self._shared.read(call, 0)


class World:
    """A coordinator, two stores, and instances of the alerts role with a client each."""

    def __init__(self) -> None:
        self.coordinator = MemoryCoordinator(RealClock())
        self.shared = FakeStores(COUNT)
        self.stores = [Store(self.shared) for _ in range(2)]
        self.instances: list[alerts.AlertsService] = []
        self.clients: list[PeerClient] = []

    async def start(self, instances: int = 1) -> None:
        for store in self.stores:
            await store.server.start()
        for number in range(COUNT):
            await self.lead(number, 0)
        for _ in range(instances):
            await self.add()

    async def add(self) -> PeerClient:
        """Another instance."""
        config = alerts.AlertsConfig(node_id=f"a{len(self.instances)}", partition_count=COUNT)
        service = await alerts.serve(config, self.coordinator, RealClock(), random.Random(1))
        self.instances.append(service)
        self.clients.append(PeerClient(service.address, rng=random.Random(2)))
        return self.clients[-1]

    async def lead(self, partition: int, store: int | None) -> None:
        """The partition has another leader, or none."""
        if store is None:
            self.shared.lead(partition, None)
            await self.coordinator.delete(leader_key(partition))
            return
        address = self.stores[store].server.address
        self.shared.lead(partition, address)
        value = msgspec.msgpack.encode(Leader(f"s{store}", address, "i"))
        await self.coordinator.put(leader_key(partition), value)

    async def until(self, condition: Callable[[], Any]) -> None:
        async with asyncio.timeout(WAIT_S):
            while not condition():  # noqa: ASYNC110 - what is waited for sets no event
                await asyncio.sleep(0.005)

    async def ready(self) -> None:
        await self.until(lambda: all(not service.tail.missing() for service in self.instances))

    async def fetch(self, call: AlertsFetch, client: int = 0) -> AlertsBatch:
        return await self.clients[client].call(call, AlertsBatch, timeout_s=WAIT_S)

    async def close(self) -> None:
        for client in self.clients:
            await client.close()
        for service in self.instances:
            await service.close()
        for store in self.stores:
            await store.server.close(deadline_s=0.0)
        await self.coordinator.close()


@pytest.fixture
async def world() -> AsyncIterator[World]:
    """One instance that has reached all leaders."""
    world = World()
    await world.start()
    await world.ready()
    yield world
    await world.close()


async def test_a_subscriber_hears_of_new_alerts(world: World) -> None:
    """From where it begins, by the cursor that each answer gives it."""
    number = partition_of(7, COUNT)
    since = (await world.fetch(AlertsFetch(account_ids=[7]))).next
    assert since == dict.fromkeys(range(COUNT), 0)
    for position in range(3):
        waiting = asyncio.ensure_future(
            world.fetch(AlertsFetch(account_ids=[7], since=since, wait_ms=LONG_MS))
        )
        await world.until(lambda: world.instances[0].source.waiting_count == 1)
        world.shared.write(number, account=7)
        batch = await waiting
        assert [(alert.partition, alert.position) for alert in batch.alerts] == [(number, position)]
        since = batch.next


async def test_any_instance_answers_the_next_call() -> None:
    """A cursor means the same everywhere, also at an instance that has only just started."""
    world = World()
    await world.start(2)
    try:
        await world.ready()
        since: dict[int, int] = {}
        seen = []
        for position in range(6):
            if position == 4:
                await world.add()
            world.shared.write(1, account=5)
            batch = await world.fetch(
                AlertsFetch(since=since, wait_ms=LONG_MS), position % len(world.clients)
            )
            seen += [alert.position for alert in batch.alerts]
            since = batch.next
        assert seen == list(range(6))
    finally:
        await world.close()


async def test_a_leader_that_moves_is_followed(world: World) -> None:
    """By the tail, and by what is read from the stores; nobody notices but by a moment's wait."""
    since: dict[int, int] = {}
    for position in range(6):
        await world.lead(1, position % 2)
        world.shared.write(1)
        batch = await world.fetch(AlertsFetch(since=since, wait_ms=LONG_MS))
        assert [alert.position for alert in batch.alerts] == [position]
        since = batch.next
    assert (await world.fetch(AlertsFetch())).next == since


async def test_a_store_that_is_gone_is_no_more_waited_for(world: World) -> None:
    """Its connection is lost; its partitions are followed at the other store from the position reached."""
    world.shared.write(0, 3)
    since = (await world.fetch(AlertsFetch(since={}, wait_ms=LONG_MS))).next
    await world.stores[0].server.close(deadline_s=0.0)
    for number in range(COUNT):
        await world.lead(number, 1)
    world.shared.write(0)
    batch = await world.fetch(AlertsFetch(since=since, wait_ms=LONG_MS))
    assert [alert.position for alert in batch.alerts] == [3]


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (AlertsFetch(limit=0), "limit must be 1 to"),
        (AlertsFetch(limit=limits.PAGE_EVENTS_MAX + 1), "limit must be 1 to"),
        (AlertsFetch(wait_ms=-1), "wait_ms must be 0 to"),
        (AlertsFetch(wait_ms=limits.ALERTS_WAIT_MS_MAX + 1), "wait_ms must be 0 to"),
        (AlertsFetch(account_ids=[1, -1]), "-1 is none"),
        (AlertsFetch(account_ids=list(range(limits.SUBSCRIPTION_ACCOUNTS_MAX + 1))), "at most 1000 accounts"),
        (AlertsFetch(metric_codes=["m"] * (limits.SUBSCRIPTION_METRICS_MAX + 1)), "at most 100 metrics"),
        (AlertsFetch(metric_codes=["no spaces"]), '"no spaces" can\'t be'),
        (AlertsFetch(metric_codes=[""]), '"" can\'t be'),
        (AlertsFetch(since={0: -1}), "no position -1 in partition 0"),
        (AlertsFetch(since={0: 2**63}), "no position"),
        (AlertsFetch(since={COUNT: 0}), f"no partition {COUNT}"),
        (AlertsFetch(since={-1: 0}), "no partition -1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_what_makes_no_sense_is_refused(world: World, call: AlertsFetch, told: str) -> None:
    """With a sentence that names what is wrong, as an error that no retry helps against."""
    with pytest.raises(TallymarkError, match=told) as raised:
        await world.fetch(call)
    assert not raised.value.retriable
    assert raised.value.code != ErrorCode.INTERNAL


async def test_what_does_not_exist_may_be_waited_for(world: World) -> None:
    """Accounts without an event, metrics that are not there yet."""
    call = AlertsFetch(account_ids=[0, 2**64 - 1], metric_codes=["not-yet"], since={}, wait_ms=1)
    assert (await world.fetch(call)).alerts == []


async def test_a_wait_ends_before_its_caller_gives_up(world: World) -> None:
    """Whatever it asked for: an answer, not a timeout."""
    call = AlertsFetch(since={}, wait_ms=LONG_MS)
    batch = await world.clients[0].call(call, AlertsBatch, timeout_s=0.5)
    assert batch.alerts == []


async def test_other_calls_are_refused(world: World) -> None:
    """This is no gateway."""
    with pytest.raises(TallymarkError, match="GetTopology"):
        await world.clients[0].call(GetTopology(), Topology)


async def test_it_is_ready_once_it_has_reached_every_leader() -> None:
    """Until then it says which partition is missing; a leader that goes away later makes it no less ready."""
    world = World()
    for store in world.stores:
        await store.server.start()
    for number in (0, 2):
        await world.lead(number, 0)
    try:
        await world.add()
        service = world.instances[0]
        await world.until(lambda: service.tail.missing() == [1])
        assert "partition 1 among them" in service.problem()
        await world.lead(1, 1)
        await world.until(lambda: not service.problem())
        await world.lead(1, None)
        await world.until(lambda: service._stores.leader(1) is None)
        assert service.problem() == ""
    finally:
        await world.close()


async def test_a_graceful_end_answers_those_who_wait() -> None:
    """They get their cursor, and go on elsewhere."""
    world = World()
    await world.start()
    await world.ready()
    world.shared.write(1, 2)
    since = (await world.fetch(AlertsFetch(since={}, wait_ms=LONG_MS))).next
    waiting = [
        asyncio.ensure_future(world.fetch(AlertsFetch(account_ids=[k], since=since, wait_ms=LONG_MS)))
        for k in range(20)
    ]
    service = world.instances.pop()
    await world.until(lambda: service.source.waiting_count == 20)
    await service.close()
    batches = await asyncio.gather(*waiting)
    assert all(batch.alerts == [] and batch.next == since for batch in batches)
    await world.close()


async def test_it_tells_what_it_does(world: World) -> None:
    """What the tail brought, what readers got, what went wrong."""
    world.shared.write(1, 2)
    world.shared.write(2, 3)
    since: dict[int, int] = {}
    got = 0
    while got < 5:
        batch = await world.fetch(AlertsFetch(since=since, wait_ms=LONG_MS))
        got, since = got + len(batch.alerts), batch.next
    with pytest.raises(InvalidRequestError):
        await world.fetch(AlertsFetch(limit=0))
    waiting = asyncio.ensure_future(world.fetch(AlertsFetch(since=since, wait_ms=LONG_MS)))
    await world.until(lambda: world.instances[0].source.waiting_count == 1)
    scrape = Scrape()
    AlertsTelemetry(world.instances[0])(scrape)
    found = {
        (sample.name, *sample.labels.values()): sample.value
        for metric in scrape.metrics()
        for sample in metric.samples
    }
    assert found["tallymark_alerts_tailed_total",] == 5
    assert found["tallymark_alerts_delivered_total",] == 5
    assert found["tallymark_alerts_window_records",] == 5
    assert found["tallymark_alerts_waiting",] == 1
    assert found["tallymark_alerts_connections",] == 1
    assert found["tallymark_alerts_unreached_partitions",] == 0
    assert found["tallymark_alerts_gaps_total",] == 0
    assert found["tallymark_alerts_failures_total", "invalid_argument"] == 1
    assert [found["tallymark_alerts_lag_records", str(number)] for number in range(COUNT)] == [0] * COUNT
    assert found["tallymark_alerts_age_seconds_count",] >= 2
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)


async def test_a_taken_port_is_an_error() -> None:
    """What was begun by then is ended again."""
    world = World()
    await world.start()
    first = world.instances.pop()
    config = alerts.AlertsConfig(node_id="b", partition_count=COUNT, listen=first.address)
    await first.tail.close()
    with pytest.raises(OSError, match="address already in use"):
        await alerts.serve(config, world.coordinator, RealClock(), random.Random(1))
    assert not any(task.get_coro().__qualname__.startswith("Tail.") for task in asyncio.all_tasks())
    await first.close()
    await world.close()
