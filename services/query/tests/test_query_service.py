"""A query node between the SDK's calls and stores: which store it asks, and when it asks again."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import pytest

from tallymark_protocol.errors import (
    ErrorCode,
    InvalidRequestError,
    NotFoundError,
    TallymarkError,
    UnavailableError,
)
from tallymark_protocol.identifiers import partition_of
from tallymark_protocol.messages import (
    PROTOCOL_VERSION,
    AlertsResult,
    EventsPage,
    EventsResult,
    QueryAlerts,
    QueryEvents,
    QueryRealtime,
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
from tallymark_protocol.model import AggType, MetricSchema
from tallymark_protocol.periods import Period
from tallymark_protocol.schema import encode_record, make_record
from tallymark_query import service as query
from tallymark_runtime import asking as asking_module
from tallymark_runtime.catalog import Leader, leader_key, metric_key
from tallymark_runtime.clock import ManualClock
from tallymark_runtime.coordinator import MemoryCoordinator
from tallymark_runtime.peer import PeerClient
from tallymark_runtime.transport import FrameServer, HandlerBase

COUNT = 2
ACCOUNT = 42
AT = partition_of(ACCOUNT, COUNT)


class Store(HandlerBase):
    """Answers as it is told; remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.answer: Callable[[Any], Any] = self.answer_as_usual
        self.uid = 0
        self.server = FrameServer(
            self, lambda: Welcome(version=PROTOCOL_VERSION, node_id="s", role="store", now_ns=0)
        )

    async def on_call(self, connection: Any, call: Any) -> Any:
        self.asked.append(call)
        return self.answer(call)

    def answer_as_usual(self, call: Any) -> Any:
        match call:
            case StoreRealtime():
                return RealtimeResult(Stats(count=3), 5, 9, 70, call.partition)
            case StoreTotals():
                return TotalsResult(
                    [Row(Stats(count=4), account_id=call.partition)], 71, call.partition, self.uid
                )
            case StoreEvents():
                return EventsResult([], 80 if call.from_offset < 80 else None, 72)
            case StoreAlerts():
                return AlertsResult([], 6, more=False)


class World:
    """A coordinator, one store that leads both partitions, a query node and a client of it."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.coordinator = MemoryCoordinator(self.clock)
        self.store = Store()
        self.client: PeerClient
        self.service: query.QueryService

    async def start(self) -> None:
        await self.store.server.start()
        for partition in range(COUNT):
            await self.lead(partition, self.store.server.address)
        self.store.uid = await self.create()
        config = query.QueryConfig(node_id="q", partition_count=COUNT)
        self.service = await query.serve(config, self.coordinator, self.clock, random.Random(1))
        self.client = PeerClient(self.service.address, rng=random.Random(2))

    async def close(self) -> None:
        await self.client.close()
        await self.service.close()
        await self.store.server.close()
        await self.coordinator.close()

    async def create(self, agg: AggType = AggType.COUNT) -> int:
        schema = MetricSchema(code="m", agg_type=agg)
        return await self.coordinator.put(metric_key("m"), encode_record(make_record(0, schema)))

    async def lead(self, partition: int, address: str) -> None:
        await self.coordinator.put(leader_key(partition), msgspec.msgpack.encode(Leader("s", address, "i")))

    async def ask(self, call: Any, timeout_s: float = 20) -> Any:
        kinds = {
            QueryEvents: EventsPage,
            QueryAlerts: query.plan.AlertsPage,
        }
        return await self.client.call(
            call, kinds.get(type(call), query.plan.QueryResult), timeout_s=timeout_s
        )


@pytest.fixture
async def world() -> AsyncIterator[World]:
    world = World()
    await world.start()
    yield world
    await world.close()


async def test_each_question_goes_to_the_stores_concerned(world: World) -> None:
    """One partition for an account, all for a ranking; answers carry what they are as of."""
    realtime = await world.ask(QueryRealtime(ACCOUNT, "m"))
    assert (realtime.rows[0].stats.count, realtime.as_of) == (3, {AT: 70})
    totals = await world.ask(QueryTotals(ACCOUNT, "m", Period(5, 9)))
    assert (totals.rows[0].stats.count, totals.as_of) == (4, {AT: 71})
    events = await world.ask(QueryEvents(ACCOUNT, 5, 9, "m"))
    assert (await world.ask(QueryEvents(ACCOUNT, 5, 9, "m", events.cursor))).cursor == ""
    assert [call.partition for call in world.store.asked] == [AT] * 4
    world.store.asked.clear()
    top = await world.ask(QueryTop("m", Period(5, 9)))
    assert [row.account_id for row in top.rows] == [0, 1]
    alerts = await world.ask(QueryAlerts())
    assert alerts.next == {0: 6, 1: 6}
    assert sorted(call.partition for call in world.store.asked) == [0, 0, 1, 1]


async def test_what_is_wrong_with_a_question_is_said_at_once(world: World) -> None:
    """And no store is asked."""
    for call in (
        QueryTotals(ACCOUNT, "none", Period(5, 9)),
        QueryRealtime(ACCOUNT, "none"),
        QueryTop("none", Period(5, 9)),
        QueryEvents(ACCOUNT, 5, 9, "none"),
        QueryAlerts(metric_code="none"),
    ):
        with pytest.raises(NotFoundError, match="no metric 'none'") as caught:
            await world.ask(call)
        assert caught.value.code == ErrorCode.UNKNOWN_METRIC
    with pytest.raises(InvalidRequestError):
        await world.ask(QueryTotals(ACCOUNT, "m", Period(5, 9), group_by=["x"]))
    with pytest.raises(InvalidRequestError):
        await world.ask(QueryEvents(ACCOUNT, 5, 9, cursor="x"))
    assert world.store.asked == []


async def test_a_lost_leader_is_asked_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until it is there, or another one, whose address the coordinator tells."""
    monkeypatch.setattr(asking_module, "RETRY_S", 0.001)
    other = Store()
    await other.server.start()
    refused: list[Any] = []

    def refuse(call: Any) -> Any:
        refused.append(call)
        if len(refused) == 3:
            moved.set()
        raise UnavailableError("not me", code=ErrorCode.NOT_LEADER)

    moved = asyncio.Event()
    world.store.answer = refuse
    asking = asyncio.ensure_future(world.ask(QueryRealtime(ACCOUNT, "m")))
    async with asyncio.timeout(20):
        await moved.wait()
    assert not asking.done()
    await world.lead(AT, other.server.address)
    assert (await asking).rows[0].stats.count == 3
    assert len(other.asked) == 1
    await other.server.close()


async def test_an_error_that_stays_is_the_callers(world: World) -> None:
    """A damaged partition is not asked twice."""

    def refuse(call: Any) -> Any:
        raise UnavailableError("damaged", code=ErrorCode.PARTITION_DAMAGED, retriable=False)

    world.store.answer = refuse
    with pytest.raises(TallymarkError, match="damaged") as caught:
        await world.ask(QueryTotals(ACCOUNT, "m", Period(5, 9)))
    assert caught.value.code == ErrorCode.PARTITION_DAMAGED
    assert len(world.store.asked) == 1


async def test_a_metric_made_again_is_not_answered_with_the_other_ones_numbers(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither by the old definition nor from a store that has not heard of the new one."""
    monkeypatch.setattr(query, "RETRY_S", 0.001)
    await world.coordinator.delete(metric_key("m"))
    old = world.store.uid
    new = await world.create(AggType.MAX)
    answered: list[int] = []

    def answer(call: Any) -> Any:
        answered.append(1)
        uid = old if len(answered) < 4 else new
        return TotalsResult([], 1, call.partition, uid)

    world.store.answer = answer
    found = await world.ask(QueryTotals(ACCOUNT, "m", Period(5, 9)))
    assert found.agg_type == AggType.MAX
    answered.clear()
    found = await world.ask(QueryTop("m", Period(5, 9)))
    assert found.agg_type == AggType.MAX
    assert len(answered) >= 4


async def test_a_cache_that_is_behind_catches_up(world: World) -> None:
    """The store's answer shows that there is a newer metric: the question is planned anew, by that one."""
    before = world.service._metrics.get("m")
    assert before is not None
    await world.coordinator.delete(metric_key("m"))
    world.store.uid = await world.create(AggType.SUM)
    await world.service._metrics.wait_revision(world.store.uid)
    world.service._metrics._records["m"] = before
    asked = len(world.store.asked)
    waits: list[int] = []
    wait = world.service._metrics.wait_uid

    async def wait_uid(uid: int) -> None:
        waits.append(uid)
        world.service._metrics._records.pop("m", None)
        await wait(uid)
        world.service._metrics._records["m"] = msgspec.structs.replace(
            make_record(world.store.uid, MetricSchema(code="m", agg_type=AggType.SUM))
        )

    world.service._metrics.wait_uid = wait_uid  # type: ignore[method-assign]
    found = await world.ask(QueryTotals(ACCOUNT, "m", Period(5, 9)))
    assert found.agg_type == AggType.SUM
    assert waits == [world.store.uid]
    assert len(world.store.asked) == asked + 2


async def test_other_calls_are_refused(world: World) -> None:
    """A query node answers queries only."""
    with pytest.raises(TallymarkError, match="doesn't answer"):
        await world.ask(StoreRealtime(0, "m", 1))


async def test_a_question_for_a_running_total_is_passed_on(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a task, as long as not too many are; a failure that may pass has one begin, and all are counted once."""
    tasks: list[Any] = []
    answer = world.service.on_call

    async def on_call(connection: Any, call: Any) -> Any:
        tasks.append(call)
        return await answer(connection, call)

    monkeypatch.setattr(world.service, "on_call", on_call)
    latency = world.service.counters.latency_ns["realtime"]
    for _ in range(3):
        assert (await world.ask(QueryRealtime(ACCOUNT, "m"))).rows[0].stats.count == 3
    assert (tasks, latency.count) == ([], 3)
    assert len(world.store.asked) == 3

    def refuse_once(call: Any) -> Any:
        world.store.answer = world.store.answer_as_usual
        raise UnavailableError("not now", code=ErrorCode.NOT_LEADER)

    world.store.answer = refuse_once
    assert (await world.ask(QueryRealtime(ACCOUNT, "m"))).rows[0].stats.count == 3
    assert (len(tasks), latency.count) == (1, 4)
    monkeypatch.setattr(query, "PASSED_ON_MAX", 0)
    assert (await world.ask(QueryRealtime(ACCOUNT, "m"))).rows[0].stats.count == 3
    assert (len(tasks), latency.count) == (2, 5)
    assert world.service.counters.under_way == 0
    assert world.service._passed_on == 0
    assert all(not out for out in world.service._asking._out.values())


async def test_an_answer_to_a_question_passed_on_that_makes_no_sense_is_an_error(world: World) -> None:
    """It is counted as a failure."""
    world.store.answer = lambda call: AlertsResult([], 6, more=False)
    with pytest.raises(TallymarkError):
        await world.ask(QueryRealtime(ACCOUNT, "m"))
    assert sum(world.service.counters.failures["realtime"].values()) == 1
    assert world.service.counters.under_way == 0
