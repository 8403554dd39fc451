"""Whom a query node asks while partitions move, by the consistency that the caller wants."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from tallymark_protocol.errors import ErrorCode, TallymarkError, UnavailableError
from tallymark_protocol.identifiers import partition_of
from tallymark_protocol.messages import (
    PROTOCOL_VERSION,
    AlertsPage,
    AlertsResult,
    Consistency,
    EventsPage,
    EventsResult,
    QueryAlerts,
    QueryEvents,
    QueryRealtime,
    QueryResult,
    QueryTop,
    QueryTotals,
    RealtimeResult,
    Row,
    Stats,
    StoreAlerts,
    StoreEvents,
    StoreRealtime,
    StoreTotals,
    TotalsResult,
    Welcome,
)
from tallymark_protocol.model import MetricSchema
from tallymark_protocol.periods import Period
from tallymark_protocol.schema import encode_record, make_record
from tallymark_query import service as query
from tallymark_runtime import asking as asking_module
from tallymark_runtime.assignments import Assignment, assignment_key
from tallymark_runtime.catalog import Leader, Node, leader_key, metric_key, node_key
from tallymark_runtime.clock import ManualClock
from tallymark_runtime.coordinator import MemoryCoordinator
from tallymark_runtime.peer import PeerClient
from tallymark_runtime.transport import FrameServer, HandlerBase

COUNT = 2
ACCOUNT = 42
AT = partition_of(ACCOUNT, COUNT)


class Copy(HandlerBase):
    """A store with a copy of every partition: answers at `lag` behind, hangs, or fails, as it is told."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.asked: list[Any] = []
        self.error: TallymarkError | None = None
        self.lag = 0
        self.uid = 0
        self.awake = asyncio.Event()
        self.awake.set()
        self.server = FrameServer(
            self, lambda: Welcome(version=PROTOCOL_VERSION, node_id=name, role="store", now_ns=0)
        )

    async def on_call(self, connection: Any, call: Any) -> Any:
        self.asked.append(call)
        await self.awake.wait()
        if self.error is not None:
            raise self.error
        as_of, lag, silence = 100 - self.lag, self.lag, 7 if self.lag else 0
        match call:
            case StoreRealtime():
                return RealtimeResult(Stats(count=3), 5, 9, as_of, call.partition, lag, silence)
            case StoreTotals():
                rows = [Row(Stats(count=4), account_id=call.partition)]
                return TotalsResult(rows, as_of, call.partition, self.uid, lag, silence)
            case StoreEvents():
                return EventsResult([], None, as_of, lag, silence)
            case StoreAlerts():
                return AlertsResult([], 6, False, as_of, lag, silence)


class World:
    """A coordinator, three stores with a copy each, a query node and a client of it."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.coordinator = MemoryCoordinator(self.clock)
        self.stores = [Copy(f"s{k}") for k in range(3)]
        self.uid = 0

    async def start(self) -> None:
        for store in self.stores:
            await store.server.start()
            await self.register(store)
        schema = MetricSchema(code="m")
        uid = await self.coordinator.put(metric_key("m"), encode_record(make_record(0, schema)))
        for partition in range(COUNT):
            await self.lead(self.stores[0], partition)
            value = msgspec.msgpack.encode(Assignment(tuple(store.name for store in self.stores)))
            await self.coordinator.put(assignment_key(partition), value)
        for store in self.stores:
            store.uid = uid
        config = query.QueryConfig(node_id="q", partition_count=COUNT)
        self.service = await query.serve(config, self.coordinator, self.clock, random.Random(1))
        self.client = PeerClient(self.service.address, rng=random.Random(2))

    async def close(self) -> None:
        await self.client.close()
        await self.service.close()
        for store in self.stores:
            store.awake.set()
            await store.server.close(deadline_s=0.0)
        await self.coordinator.close()

    async def register(self, store: Copy) -> None:
        node = Node(store.name, store.server.address, "store")
        await self.coordinator.put(node_key("store", store.name), msgspec.msgpack.encode(node))

    async def lead(self, store: Copy, partition: int) -> None:
        leader = Leader(store.name, store.server.address, "i")
        await self.coordinator.put(leader_key(partition), msgspec.msgpack.encode(leader))

    async def realtime(
        self, consistency: Consistency = Consistency.LEADER, timeout_s: float = 20.0
    ) -> QueryResult:
        call = QueryRealtime(ACCOUNT, "m", consistency)
        return await self.client.call(call, QueryResult, timeout_s=timeout_s)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    world = World()
    async with asyncio.timeout(60):
        await world.start()
        yield world
        await world.close()


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have questions given up after a tenth of a call's time, so that the error arrives on a slow machine, too."""
    monkeypatch.setattr(asking_module, "MARGIN_S", 1_000.0)
    monkeypatch.setattr(asking_module, "MARGIN_SHARE", 0.9)


async def wait_until(condition: Any) -> None:
    loop = asyncio.get_running_loop()
    while not condition():
        turn = loop.create_future()
        loop.call_later(0.001, turn.set_result, None)
        await turn


async def test_the_leader_answers_unless_a_stale_answer_will_do(world: World) -> None:
    """A stale answer comes from the followers in turn, and says how far behind it is."""
    leader, *followers = world.stores
    for store in followers:
        store.lag = 40
    for consistency in (Consistency.LEADER, Consistency.QUORUM):
        found = await world.realtime(consistency)
        assert (found.as_of, found.lag, found.silence_ms) == ({AT: 100}, {}, {})
        assert leader.asked[-1].consistency is consistency
    assert not any(store.asked for store in followers)
    for _ in range(4):
        found = await world.realtime(Consistency.STALE)
        assert (found.as_of, found.lag, found.silence_ms) == ({AT: 60}, {AT: 40}, {AT: 7})
    assert [len(store.asked) for store in world.stores] == [2, 2, 2]


async def test_every_kind_of_question_carries_its_consistency(world: World) -> None:
    """To the store, and the lag back; of several partitions only those that lag are named."""
    world.stores[0].error = UnavailableError("dead")
    for store in world.stores[1:]:
        store.lag = 40
    calls: list[tuple[Any, Any]] = [
        (QueryTotals(ACCOUNT, "m", Period(5, 9), consistency=Consistency.STALE), QueryResult),
        (QueryTop("m", Period(5, 9), consistency=Consistency.STALE), QueryResult),
        (QueryEvents(ACCOUNT, 5, 9, consistency=Consistency.STALE), EventsPage),
        (QueryAlerts(consistency=Consistency.STALE), AlertsPage),
    ]
    for call, kind in calls:
        found: Any = await world.client.call(call, kind)
        every = isinstance(call, QueryTop | QueryAlerts)
        partitions = range(COUNT) if every else [AT]
        assert found.as_of == dict.fromkeys(partitions, 60)
        assert found.lag == dict.fromkeys(partitions, 40)
        assert found.silence_ms == dict.fromkeys(partitions, 7)
    asked = [call for store in world.stores for call in store.asked]
    assert {type(call) for call in asked} == {StoreTotals, StoreEvents, StoreAlerts}
    assert all(call.consistency is Consistency.STALE for call in asked)


@pytest.mark.usefixtures("hasty")
async def test_a_stale_answer_needs_no_leader(world: World) -> None:
    """Copies that fail, are damaged or gone are passed over, down to the last one."""
    for partition in range(COUNT):
        await world.coordinator.delete(leader_key(partition))
    world.stores[0].error = UnavailableError("damaged", code=ErrorCode.PARTITION_DAMAGED, retriable=False)
    world.stores[1].error = UnavailableError("I have no copy", code=ErrorCode.NOT_LEADER)
    for _ in range(3):
        assert (await world.realtime(Consistency.STALE)).as_of == {AT: 100}
    with pytest.raises(UnavailableError, match=f"partition {AT} could not be read in time") as caught:
        await world.realtime(timeout_s=5.0)
    assert "has no leader" in caught.value.message
    assert caught.value.retriable


async def test_a_stale_answer_of_a_copy_that_knows_another_metric_is_not_taken(world: World) -> None:
    """The leader is asked then."""
    for store in world.stores[1:]:
        store.uid += 1
    call = QueryTotals(ACCOUNT, "m", Period(5, 9), consistency=Consistency.STALE)
    await world.coordinator.put(b"unrelated", b"so that such a revision exists")
    found = await world.client.call(call, QueryResult)
    assert found.as_of == {AT: 100}
    assert [call.consistency for call in world.stores[0].asked] == [Consistency.LEADER]


async def test_a_leader_that_hangs_is_left_for_the_next(world: World) -> None:
    """Questions that are out to it are asked of the new leader as soon as there is one."""
    old, new, _ = world.stores
    old.awake.clear()
    asking = [asyncio.ensure_future(world.realtime()) for _ in range(50)]
    await wait_until(lambda: len(old.asked) == 50)
    await world.lead(new, AT)
    for call in asking:
        assert (await call).as_of == {AT: 100}
    assert len(new.asked) == 50


@pytest.mark.parametrize("how", ["refuses", "is gone"])
async def test_news_end_the_wait_for_a_leader(
    world: World, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """However long the backoff would be."""
    monkeypatch.setattr(asking_module, "RETRY_S", 1_000.0)
    monkeypatch.setattr(asking_module, "RETRY_MAX_S", 1_000.0)
    old, new, _ = world.stores
    if how == "refuses":
        old.error = UnavailableError("not me", code=ErrorCode.NOT_LEADER)
    else:
        await world.coordinator.delete(leader_key(AT))
        await world.service._asking.leaders.wait_revision(world.coordinator.revision)
    asking = asyncio.ensure_future(world.realtime())
    await wait_until(lambda: world.service._asking._waiting.get(AT))
    await world.lead(new, AT)
    assert (await asking).as_of == {AT: 100}


async def test_stores_that_are_gone_are_forgotten(world: World) -> None:
    """Whoever neither leads nor is registered is no peer any more."""
    await wait_until(lambda: len(world.service._asking.peers()) == 3)
    gone = world.stores[2]
    await world.coordinator.delete(node_key("store", gone.name))
    await wait_until(lambda: len(world.service._asking.peers()) == 2)
    await wait_until(lambda: not gone.server.connections)
    await world.register(gone)
    await wait_until(lambda: len(gone.server.connections) == 1)


@pytest.mark.usefixtures("hasty")
async def test_an_answer_that_no_copy_gives_is_an_error_in_time(world: World) -> None:
    """The last error is named, whatever the consistency."""
    for store in world.stores:
        store.error = UnavailableError("recovering", code=ErrorCode.PARTITION_UNAVAILABLE)
    for consistency in Consistency:
        with pytest.raises(UnavailableError, match="could not be read in time: recovering"):
            await world.realtime(consistency, timeout_s=5.0)
