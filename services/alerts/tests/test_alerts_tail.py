"""Following the leaders, in virtual time: every record once, in order, whatever leaders do."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import msgspec
import pytest

from tallymark_alerts.counters import AlertsCounters
from tallymark_alerts.tail import BEHIND_RECORDS, LOST_S, RETRY_MAX_S, SPACING_S, WAIT_MS, Tail
from tallymark_protocol.errors import BackpressureError, ErrorCode, UnavailableError
from tallymark_protocol.messages import AlertRecord, TailPart, TailResult

from .alerts_fakes import FakeStores, record, until
from .alerts_virtual import LoopClock, run_virtual


class Scene:
    """A tail, its stores, and what it has brought."""

    def __init__(self, partition_count: int = 3, seed: int = 1, **config: Any) -> None:
        self.stores = FakeStores(partition_count)
        self.counters = AlertsCounters()
        self.tail = Tail(
            self.stores,
            partition_count=partition_count,
            clock=LoopClock(),
            rng=random.Random(seed),
            counters=self.counters,
            **config,
        )
        self.brought: dict[int, list[AlertRecord]] = {number: [] for number in range(partition_count)}
        self.tail.on_records = self._on_records

    def _on_records(self, partition: int, records: Sequence[AlertRecord]) -> None:
        assert self.tail.windows[partition].end == records[-1].position + 1, "they are in the window by then"
        self.brought[partition] += records

    def positions(self, partition: int) -> list[int]:
        """Of the records that were brought."""
        return [one.position for one in self.brought[partition]]

    def is_complete(self) -> bool:
        """Whether all there is has been brought."""
        return all(self.positions(k) == list(range(len(self.stores.records[k]))) for k in self.brought)

    async def begin(self) -> None:
        """Start, and wait until every leader has been reached."""
        self.tail.start()
        await until(lambda: not self.tail.missing())


def scene(body: Callable[[Scene], Coroutine[Any, Any, None]], **config: Any) -> None:
    """Play a scene to its end; nothing is left running."""

    async def main() -> None:
        played = Scene(**config)
        try:
            await body(played)
        finally:
            await played.tail.close()
            await asyncio.sleep(0)
        assert not any(played.stores.held.values())
        assert asyncio.all_tasks() == {asyncio.current_task()}
        await asyncio.sleep(60)  # no timer is left that would do anything
        assert asyncio.all_tasks() == {asyncio.current_task()}

    run_virtual(main())


def test_new_records_come_as_they_are_written() -> None:
    """Each once, in order, into the window; one held call asks for all that a leader has."""

    async def body(s: Scene) -> None:
        await s.begin()
        s.stores.held_most = 0
        for round_number in range(5):
            for partition in range(3):
                s.stores.write(partition, 1 + round_number)
            await until(s.is_complete)
        await until(lambda: s.stores.held == {"s0": 1})
        assert s.counters.tailed == 45
        assert s.stores.held_most == 1
        assert set(s.stores.tails[-1][1].positions) == {0, 1, 2}

    scene(body)


def test_it_begins_a_little_before_the_end() -> None:
    """Whoever comes from another instance finds its place in memory; what is older is not read."""

    async def body(s: Scene) -> None:
        s.stores.write(0, BEHIND_RECORDS + 1_000)
        s.stores.write(1, 3)
        await s.begin()
        await until(lambda: s.tail.windows[0].end == BEHIND_RECORDS + 1_000 and s.brought[1])
        assert s.positions(0) == list(range(1_000, BEHIND_RECORDS + 1_000))
        assert s.positions(1) == [0, 1, 2]
        assert s.tail.lags == {0: 0, 1: 0, 2: 0}

    scene(body)


def test_a_partition_whose_leader_is_not_there_yet_begins_later() -> None:
    """The others are followed meanwhile; readiness tells of it."""

    async def body(s: Scene) -> None:
        s.stores.unreadable[1] = UnavailableError("no leader")
        s.stores.lead(1, None)
        s.tail.start()
        s.stores.write(0)
        s.stores.write(1)
        await until(lambda: s.brought[0])
        await asyncio.sleep(30)
        assert s.tail.missing() == [1]
        s.stores.unreadable.clear()
        s.stores.lead(1, "s1")
        await until(s.is_complete)
        assert s.tail.missing() == []

    scene(body)


def test_a_leadership_that_moves_is_followed() -> None:
    """At once, from the position reached; the old leader's call goes on about the others."""

    async def body(s: Scene) -> None:
        await s.begin()
        s.stores.write(0, 4)
        await until(s.is_complete)
        s.stores.lead(0, "s1")
        await until(lambda: s.stores.held.get("s1"))
        assert s.stores.tails[-1] == ("s1", msgspec.structs.replace(s.stores.tails[-1][1], positions={0: 4}))
        s.stores.write(0, 2)
        s.stores.write(1, 2)
        await until(s.is_complete)
        s.stores.lead(0, "s0")
        s.stores.write(0, 2)
        await until(s.is_complete)
        # Sooner or later the address that leads nothing more is not asked any more.
        await until(lambda: s.stores.held == {"s0": 1, "s1": 0})

    scene(body)


def test_a_leader_that_does_not_lead_yet_is_asked_again() -> None:
    """It has the key and no epoch: with a growing delay, while its other partitions are followed."""

    async def body(s: Scene) -> None:
        s.stores.deposed.add((2, "s0"))
        await s.begin()
        for _ in range(40):
            s.stores.write(1)
            s.stores.write(2)
            await asyncio.sleep(0.25)
            assert s.positions(1) == list(range(len(s.stores.records[1])))
        asked = [call for _, call in s.stores.tails if 2 in call.positions]
        assert 10 <= len(asked) <= 60, "neither given up nor asked all the time"
        assert s.stores.doubts >= len(asked) - 1
        assert s.counters.tail_failures[ErrorCode.NOT_LEADER] >= 10
        s.stores.deposed.clear()
        await until(s.is_complete, 2 * RETRY_MAX_S)

    scene(body)


@pytest.mark.parametrize(
    "error",
    [UnavailableError("lost", code=ErrorCode.CLOSED), BackpressureError("too many calls")],
    ids=["lost", "refused"],
)
def test_a_failed_call_is_repeated(error: Exception) -> None:
    """With a growing delay; at once where there is news of the leader."""

    async def body(s: Scene) -> None:
        await s.begin()
        s.stores.failing["s0"] = error  # type: ignore[assignment]
        s.stores.write(0, 3)
        await asyncio.sleep(30)
        assert 30 <= len(s.stores.tails) <= 130
        s.stores.failing.clear()
        s.stores.on_news(0)
        await until(s.is_complete, 0.01)

    scene(body)


def without_first(result: TailResult) -> TailResult:
    """An answer that leaves records out."""
    return TailResult(
        [TailPart(part.partition, part.alerts[1:], part.end) for part in result.parts if part.alerts[1:]],
        result.refused,
    )


def other_partition(result: TailResult) -> TailResult:
    """An answer about a partition that was not asked for."""
    return TailResult([TailPart(77, part.alerts, part.end) for part in result.parts], result.refused)


def shuffled(result: TailResult) -> TailResult:
    """An answer out of order."""
    return TailResult([TailPart(part.partition, part.alerts[::-1], part.end) for part in result.parts])


@pytest.mark.parametrize("mangle", [without_first, other_partition, shuffled])
def test_an_answer_that_does_not_go_on_is_not_taken(mangle: Callable[[TailResult], TailResult]) -> None:
    """Nothing of it; it is asked for again, not too fast, until it does."""

    async def body(s: Scene) -> None:
        await s.begin()
        s.stores.mangle = mangle
        s.stores.write(1, 3)
        await asyncio.sleep(1)
        assert not s.brought[1]
        assert len(s.stores.tails) < 100
        s.stores.mangle = lambda result: result
        await until(s.is_complete)

    scene(body)


def test_records_that_come_twice_are_taken_once() -> None:
    """As from a leader that begins its answer too early."""

    async def body(s: Scene) -> None:
        await s.begin()

        def from_start(result: TailResult) -> TailResult:
            return TailResult(
                [
                    TailPart(part.partition, s.stores.records[part.partition][:], part.end)
                    for part in result.parts
                ]
            )

        s.stores.mangle = from_start
        for _ in range(4):
            s.stores.write(0, 2)
            await until(s.is_complete)

    scene(body)


def test_a_steady_stream_takes_few_calls() -> None:
    """They are spaced, so that under load each brings many records; a lone one is not held up."""

    async def body(s: Scene) -> None:
        await s.begin()
        await asyncio.sleep(1)
        before = len(s.stores.tails)
        for _ in range(5_000):
            s.stores.write(0)
            await asyncio.sleep(0.0001)
        await until(s.is_complete)
        assert len(s.stores.tails) - before <= 0.6 / SPACING_S
        await asyncio.sleep(1)
        s.stores.write(2)
        await until(s.is_complete, SPACING_S)

    scene(body)


def test_the_lag_is_what_the_leader_has_beyond() -> None:
    """As of its last answer."""

    async def body(s: Scene) -> None:
        await s.begin()
        s.stores.tail_max = 10
        s.stores.delay_s = 1.0
        s.stores.write(1, 35)
        seen = []
        while not s.is_complete():
            if s.tail.lags[1] not in seen:
                seen.append(s.tail.lags[1])
            await asyncio.sleep(0.1)
        assert seen == [0, 25, 15, 5]
        assert s.tail.lags[1] == 0

    scene(body)


def test_a_quiet_leader_is_asked_again_when_its_wait_is_over() -> None:
    """One call each time, about the same positions."""

    async def body(s: Scene) -> None:
        await s.begin()
        await asyncio.sleep(10.5 * WAIT_MS / 1000)
        assert 11 <= len(s.stores.tails) <= 16
        assert s.stores.tails[-1][1].positions == {0: 0, 1: 0, 2: 0}

    scene(body)


@pytest.mark.parametrize("seed", range(25))
def test_everything_comes_once_through_any_faults(seed: int) -> None:
    """Leaders that move, refuse, fail, hang, answer late and answer wrongly, at random."""

    async def body(s: Scene) -> None:
        rng = random.Random(seed)
        stores = s.stores
        addresses = ["s0", "s1", "s2"]

        def disturb() -> None:
            partition, address = rng.randrange(4), rng.choice(addresses)
            match rng.randrange(9):
                case 0 | 1:
                    stores.lead(partition, rng.choice([*addresses, None]))
                case 2:
                    # Deposed before the catalog knows.
                    stores.leaders[partition] = address
                    stores.wake()
                case 3:
                    stores.deposed.add((partition, address))
                    stores.wake()
                case 4:
                    stores.deposed.clear()
                case 5:
                    stores.failing[address] = UnavailableError("lost", code=ErrorCode.CLOSED)
                    stores.wake()
                case 6:
                    stores.failing.clear()
                case 7:
                    stores.mangle = rng.choice(
                        [without_first, other_partition, shuffled, lambda result: result]
                    )
                case 8:
                    stores.delay_s = rng.choice([0, 0, 0.001, 0.3])
                    stores.on_news(partition)

        s.tail.start()
        for _ in range(400):
            if rng.random() < 0.5:
                stores.write(rng.randrange(4), rng.randrange(1, 6))
            if rng.random() < 0.4:
                disturb()
            if rng.random() < 0.5:
                await asyncio.sleep(rng.choice([0, 0.001, 0.02, 0.5]))
        stores.failing.clear()
        stores.deposed.clear()
        stores.delay_s = 0.0
        stores.mangle = lambda result: result
        for partition in range(4):
            stores.lead(partition, rng.choice(addresses))
        await until(s.is_complete, 10)
        assert stores.held_most <= 2, "a call that was given up may still be on its way out"

    scene(body, partition_count=4, seed=seed)


def test_what_was_never_asked_for_is_passed_over() -> None:
    """A part about a partition that this instance has not reached, or that another call asked for."""

    async def body(s: Scene) -> None:
        await s.begin()
        window = s.tail.windows[0]
        assert not s.tail._take("s0", {1: 0}, TailResult([TailPart(0, [record(0, 0)], 1)]))
        assert window.end == 0

    scene(body)


def test_a_leader_that_gives_no_word_is_lost() -> None:
    """After longer than a failover takes, and until it answers again, news or none."""

    async def body(s: Scene) -> None:
        await s.begin()
        troubles: list[tuple[Callable[[], Any], Callable[[], Any]]] = [
            (lambda: s.stores.lead(1, None), lambda: s.stores.lead(1, "s1")),
            (lambda: s.stores.deposed.add((1, "s1")), s.stores.deposed.clear),
            (
                lambda: s.stores.failing.update(s1=UnavailableError("lost", code=ErrorCode.CLOSED)),
                s.stores.failing.clear,
            ),
        ]
        for begin, end in troubles:
            begin()
            s.stores.wake()
            await asyncio.sleep(LOST_S - 1)
            assert not s.tail.is_lost(1)
            await asyncio.sleep(2)
            assert s.tail.is_lost(1)
            assert not s.tail.is_lost(0)
            end()
            await until(lambda: not s.tail.is_lost(1), 2)
            await asyncio.sleep(60)
            assert not any(s.tail.is_lost(number) for number in range(3))

    scene(body)


def test_what_an_old_leader_refuses_says_nothing_of_the_new_one() -> None:
    """The partition is followed at once where it is led now."""

    async def body(s: Scene) -> None:
        await s.begin()
        await until(lambda: s.stores.held == {"s0": 1})
        s.stores.leaders[1] = "s1"
        s.tail._on_news(1)
        await until(lambda: s.stores.held.get("s1"))
        s.stores.wake()  # the old one looks, and refuses
        await until(lambda: 1 not in s.stores.tails[-1][1].positions)
        assert not s.tail._refused_timers
        for _ in range(5):
            s.stores.write(1)
            await until(s.is_complete, 0.01)

    scene(body)
