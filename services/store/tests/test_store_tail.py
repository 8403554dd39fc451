"""Calls that are held for alert records: what they are answered with, when, and what ends them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tallymark_protocol import limits
from tallymark_protocol.errors import BackpressureError, ErrorCode, InvalidRequestError, UnavailableError
from tallymark_protocol.messages import StoreTail, TailResult
from tallymark_protocol.model import AggType, AlertThreshold, MetricSchema, PeriodType
from tallymark_store import folding, warmup
from tallymark_store.tail import HELD_MAX, Tail, share_out

from .cluster_driver import Cluster
from .payload_builder import event

EACH = MetricSchema(
    code="sum",
    agg_type=AggType.SUM,
    period_type=PeriodType.LIFETIME,
    thresholds=[AlertThreshold(code="each", value=1, recurring=True)],
)
LONG_MS = 20_000


class Records:
    """A partition that has so many alert records: their positions stand for them."""

    def __init__(self, partition: int, count: int = 0) -> None:
        self.partition = partition
        self.fold = self
        self.alert_count = count
        self.looked = 0
        self.may_alert = False

    def alerts_at(self, positions: Any) -> list[Any]:
        self.looked += 1
        assert max(positions) < self.alert_count, "only what is there is asked for"
        return list(positions)


class World:
    """A store's partitions, and its tail."""

    def __init__(self, **counts: int) -> None:
        self.led = {int(name[1:]): Records(int(name[1:]), count) for name, count in counts.items()}
        self.folds: list[int] = []  # of which partitions the fold was asked for
        self.tail = Tail(self.serving, self.fold)  # type: ignore[arg-type]

    def fold(self, number: int) -> None:
        self.folds.append(number)

    def serving(self, number: int) -> Records:
        if number not in self.led:
            raise UnavailableError(f"partition {number} is not led here", code=ErrorCode.NOT_LEADER)
        return self.led[number]

    def ask(self, caller: Any = None, *, limit: int = 100, wait_ms: int = LONG_MS, **positions: int) -> Any:
        by_partition = {int(name[1:]): position for name, position in positions.items()}
        return asyncio.ensure_future(self.tail.answer(StoreTail(by_partition, limit, wait_ms), caller))

    def write(self, number: int, count: int = 1) -> None:
        """The fold writes records."""
        self.led[number].alert_count += count
        self.tail.folded(self.led[number])  # type: ignore[arg-type]

    def depose(self, number: int) -> None:
        """The leadership ends."""
        del self.led[number]
        self.tail.changed(number)


def told(result: TailResult) -> dict[int, tuple[list[int], int]]:
    """What an answer tells, by partition: the records, and how many there are."""
    return {part.partition: (part.alerts, part.end) for part in result.parts}  # type: ignore[misc]


async def turns(count: int = 5) -> None:
    """Let everything run that can."""
    for _ in range(count):
        await asyncio.sleep(0)


# ------------------------------------------------------------ answers


async def test_what_is_there_is_answered_at_once() -> None:
    """From the position asked for on; partitions without news are left out."""
    world = World(p0=5, p3=2, p4=7)
    assert told(await world.ask(p0=3, p3=2, p4=0)) == {0: ([3, 4], 5), 4: ([0, 1, 2, 3, 4, 5, 6], 7)}


async def test_a_call_is_held_until_a_record_is_written() -> None:
    """It is answered with that record, whichever of its partitions has it, and nothing is left of it."""
    world = World(p0=5, p1=1)
    call = world.ask(p0=5, p1=1)
    await turns()
    assert not call.done()
    assert world.tail.held_count == 1
    world.write(1)
    assert told(await call) == {1: ([1], 2)}
    assert world.tail.held_count == 0
    assert not world.tail._watching


async def test_what_nobody_watched_is_folded_for_a_new_call() -> None:
    """Committed records may wait a while for their fold; not where a call would wait with them."""
    world = World(p0=5, p1=5)
    call = world.ask(p0=5)
    await turns()
    assert world.folds == []
    world.led[1].may_alert = True
    other = world.ask(p1=5)
    await turns()
    assert world.folds == [1]
    world.write(0)
    world.write(1)
    assert [*told(await call), *told(await other)] == [0, 1]


async def test_records_below_the_position_wake_nobody() -> None:
    """Whoever is ahead of this copy waits until it has come so far; nothing is looked at before."""
    world = World(p0=5)
    call = world.ask(p0=8)
    await turns()
    for _ in range(3):
        world.write(0)
        await turns()
        assert not call.done()
    assert world.led[0].looked == 0
    world.write(0, 2)
    assert told(await call) == {0: ([8, 9], 10)}


async def test_records_of_one_step_come_together() -> None:
    """What is written before the call is looked at again is in one answer."""
    world = World(p0=0, p1=0)
    call = world.ask(p0=0, p1=0)
    await turns()
    world.write(0)
    world.write(1)
    world.write(0)
    assert told(await call) == {0: ([0, 1], 2), 1: ([0], 1)}


async def test_a_wait_that_is_over_gets_nothing() -> None:
    """As does a call that doesn't wait."""
    world = World(p0=2)
    for wait_ms in (0, 1):
        assert await world.ask(p0=2, wait_ms=wait_ms) == TailResult([])
    assert world.tail.held_count == 0


async def test_a_call_about_nothing_is_not_held() -> None:
    """There is nothing that could wake it."""
    assert await World().ask() == TailResult([])


async def test_many_calls_are_answered_alike() -> None:
    """Each instance of the alerts role gets every record."""
    world = World(p0=0)
    calls = [world.ask(caller, p0=0) for caller in range(3)]
    await turns()
    world.write(0)
    assert [told(await call) for call in calls] == [{0: ([0], 1)}] * 3


# ------------------------------------------------------------ limits


async def test_the_limit_is_of_all_partitions_and_shared() -> None:
    """No partition keeps others from being told of; what is left is at the next call, begun elsewhere."""
    world = World(p0=100, p1=2, p2=100)
    positions = {"p0": 0, "p1": 0, "p2": 0}
    seen: dict[int, list[int]] = {0: [], 1: [], 2: []}
    while any(len(seen[k]) < world.led[k].alert_count for k in seen):
        answer = await world.ask(limit=10, **positions)
        assert sum(len(part.alerts) for part in answer.parts) <= 10
        for part in answer.parts:
            assert part.end == world.led[part.partition].alert_count
            seen[part.partition] += part.alerts
            positions[f"p{part.partition}"] = len(seen[part.partition])
    assert seen == {k: list(range(world.led[k].alert_count)) for k in seen}


async def test_a_limit_of_one_starves_nobody() -> None:
    """The first record goes to another partition each time."""
    world = World(p0=50, p1=50, p2=50)
    first = {next(iter(told(await world.ask(limit=1, p0=0, p1=0, p2=0)))) for _ in range(3)}
    assert first == {0, 1, 2}


@given(st.lists(st.integers(0, 50), max_size=12), st.integers(1, 200))
def test_shares_are_even_and_waste_nothing(counts: list[int], limit: int) -> None:
    """They sum to the limit or to all there is; who has less than another got all of its own."""
    shares = share_out(counts, limit)
    assert sum(shares) == min(limit, sum(counts))
    for share, count in zip(shares, counts, strict=True):
        assert 0 <= share <= count
        assert share == count or share >= max(shares) - 1


async def test_too_many_calls_are_refused() -> None:
    """The bound is on those held; what can be answered at once is."""
    world = World(p0=1)
    calls = [world.ask(p0=1) for _ in range(HELD_MAX)]
    await turns()
    with pytest.raises(BackpressureError):
        await world.ask(p0=1)
    assert told(await world.ask(p0=0)) == {0: ([0], 1)}
    world.tail.close()
    await asyncio.gather(*calls, return_exceptions=True)
    assert world.tail.held_count == 0


@pytest.mark.parametrize(
    "call",
    [
        StoreTail({0: 0}, 0),
        StoreTail({0: 0}, limits.PAGE_EVENTS_MAX + 1),
        StoreTail({0: -1}),
        StoreTail({0: 0}, 1, -1),
        StoreTail({0: 0}, 1, limits.ALERTS_WAIT_MS_MAX + 1),
        StoreTail(dict.fromkeys(range(limits.PARTITIONS_MAX + 1), 0)),
    ],
    ids=["no limit", "limit", "position", "negative wait", "wait", "partitions"],
)
async def test_what_makes_no_sense_is_refused(call: StoreTail) -> None:
    """At once, and with a sentence."""
    with pytest.raises(InvalidRequestError):
        await World(p0=1).tail.answer(call)


# ------------------------------------------------------------ ends


async def test_a_partition_that_is_not_led_is_refused_at_once() -> None:
    """Beside the others' records, and without a wait if there are none."""
    world = World(p0=1)
    answer = await world.ask(p0=0, p9=0)
    assert told(answer) == {0: ([0], 1)}
    assert {k: error.code for k, error in answer.refused.items()} == {9: ErrorCode.NOT_LEADER}
    assert list((await world.ask(p0=1, p9=0)).refused) == [9]


async def test_a_leadership_that_ends_ends_the_wait() -> None:
    """Its caller is to look for the new leader; the other partitions' callers wait on."""
    world = World(p0=1, p1=1)
    both, other = world.ask(p0=1, p1=1), world.ask(p1=1)
    await turns()
    world.depose(0)
    assert list((await both).refused) == [0]
    assert not other.done()
    world.write(1)
    assert told(await other) == {1: ([1], 2)}


async def test_a_caller_that_asks_anew_ends_its_last_call() -> None:
    """It has lost interest in that one; other callers' calls are held on."""
    world = World(p0=0, p1=0)
    first, other = world.ask("a", p0=0), world.ask("b", p0=0)
    await turns()
    second = world.ask("a", p0=0, p1=0)
    assert await first == TailResult([])
    await turns()
    assert world.tail.held_count == 2
    world.write(0)
    assert told(await second) == told(await other) == {0: ([0], 1)}
    assert not world.tail._by_caller


async def test_a_caller_that_goes_leaves_nothing_behind() -> None:
    """A lost connection cancels its call."""
    world = World(p0=0)
    call = world.ask("a", p0=0)
    await turns()
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    assert world.tail.held_count == 0
    assert not world.tail._watching
    assert not world.tail._by_caller


async def test_a_store_that_stops_holds_nothing() -> None:
    """Those who wait are told, and those who come."""
    world = World(p0=0)
    call = world.ask(p0=0)
    await turns()
    world.tail.close()
    with pytest.raises(UnavailableError, match="stopping"):
        await call
    with pytest.raises(UnavailableError, match="stopping"):
        await world.ask(p0=0)


# ------------------------------------------------------------ real stores


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    """Three stores that hold one partition, and a metric whose every event crosses a threshold."""
    warmup.warm_up()
    cluster = Cluster()
    await cluster.start()
    await cluster.create(EACH)
    yield cluster
    await cluster.close()


def ask(cluster: Cluster, name: str, position: int, wait_ms: int = LONG_MS) -> asyncio.Future[Any]:
    """Ask one store for the partition's records."""
    return asyncio.ensure_future(cluster.nodes[name].call(StoreTail({0: position}, wait_ms=wait_ms)))


async def test_the_fold_does_not_let_a_held_call_wait(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Records are folded together, a while after their commit, but where a held call waits for what they cross."""
    monkeypatch.setattr(folding, "FOLD_DELAY_S", 3_600.0)
    leader = await cluster.wait_leader()
    call = ask(cluster, leader, 0)
    await turns()
    await cluster.append_anywhere([event(7, "sum")], (1, 1))
    assert [alert.account_id for part in (await call).parts for alert in part.alerts] == [7]
    # Nor does what was committed while no call was held.
    await cluster.append_anywhere([event(8, "sum")], (1, 2))
    (part,) = (await ask(cluster, leader, 1)).parts
    assert [alert.account_id for alert in part.alerts] == [8]


async def test_records_follow_the_leadership(cluster: Cluster) -> None:
    """A held call ends with the leadership; the new leader goes on at the very next position."""
    leader = await cluster.wait_leader()
    for follower in sorted(cluster.nodes.keys() - {leader}):
        assert list((await ask(cluster, follower, 0)).refused) == [0]
    call = ask(cluster, leader, 0)
    await cluster.append_anywhere([event(7, "sum"), event(8, "sum")], (1, 1))
    (part,) = (await call).parts
    assert [(alert.position, alert.account_id, alert.event_offset) for alert in part.alerts] == [
        (0, 7, part.alerts[0].event_offset),
        (1, 8, part.alerts[0].event_offset + 1),
    ]
    assert part.end == 2
    call = ask(cluster, leader, 2)
    await turns()
    cluster.kill(leader)
    successor = await cluster.wait_leader(other_than=leader)
    await cluster.append_anywhere([event(9, "sum")], (1, 2))
    (part,) = (await ask(cluster, successor, 1)).parts
    assert [(alert.position, alert.account_id) for alert in part.alerts] == [(1, 8), (2, 9)]
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)


async def test_a_leader_that_is_deposed_ends_what_it_holds(cluster: Cluster) -> None:
    """It is cut off and finds out by itself; its caller is not left waiting."""
    leader = await cluster.wait_leader()
    await cluster.append_anywhere([event(7, "sum")], (1, 1))
    call = ask(cluster, leader, 1)
    await turns()
    cluster.isolate(leader)
    await cluster.wait_leader(other_than=leader)
    cluster.cut.clear()
    assert list((await call).refused) == [0]


async def test_what_is_not_committed_is_not_told(cluster: Cluster) -> None:
    """A leader that is alone takes an event and can't commit it; a caller hears nothing of it, there or elsewhere."""
    leader = await cluster.wait_leader()
    await cluster.append_anywhere([event(7, "sum")], (1, 1))
    call = ask(cluster, leader, 1)
    await turns()
    cluster.isolate(leader)
    request = cluster.send(leader, [event(66, "sum")], (2, 1))
    successor = await cluster.wait_leader(other_than=leader)
    answer = await call
    assert not answer.parts
    assert list(answer.refused) == [0]
    await cluster.append_anywhere([event(8, "sum")], (1, 2))
    (part,) = (await ask(cluster, successor, 0)).parts
    assert [alert.account_id for alert in part.alerts] == [7, 8]
    cluster.cut.clear()
    await cluster.until(lambda: cluster.answer(request) is not None)
    await cluster.check_digests()
    assert cluster.nodes[leader].store.partitions[0].fold.alert_count == 2


async def test_a_store_that_closes_answers_what_it_holds(cluster: Cluster) -> None:
    """Whoever waits there is sent elsewhere before the process ends."""
    leader = await cluster.wait_leader()
    call = ask(cluster, leader, 0)
    await turns()
    node = cluster.nodes.pop(leader)
    await node.hand_over()
    node.end_tails()
    await node.close()
    result = (await asyncio.gather(call, return_exceptions=True))[0]
    assert isinstance(result, UnavailableError) or list(result.refused) == [0]
