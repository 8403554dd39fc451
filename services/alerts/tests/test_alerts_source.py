"""Reading on from a cursor, in virtual time: from memory and from stores, without a gap, at a pace."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import pytest

from tallymark_alerts.counters import AlertsCounters
from tallymark_alerts.matching import Filter
from tallymark_alerts.pages import READS_MAX
from tallymark_alerts.source import ANSWERS_BURST, ANSWERS_PER_S, AlertSource
from tallymark_alerts.tail import Tail
from tallymark_protocol.errors import BackpressureError, ErrorCode, UnavailableError
from tallymark_protocol.identifiers import partition_of
from tallymark_protocol.messages import AlertRecord, AlertsBatch, AlertsResult, StoreAlerts

from .alerts_fakes import FakeStores, until
from .alerts_virtual import LoopClock, run_virtual

COUNT = 4
NO_LEADER = UnavailableError("no leader", code=ErrorCode.PARTITION_UNAVAILABLE)


class Scene:
    """A source, the tail that feeds it, and their stores."""

    def __init__(self, *, answers_per_s: float = ANSWERS_PER_S, **tail: Any) -> None:
        self.stores = FakeStores(COUNT)
        self.counters = AlertsCounters()
        self.tail = Tail(
            self.stores,
            partition_count=COUNT,
            clock=LoopClock(),
            rng=random.Random(1),
            counters=self.counters,
            **tail,
        )
        self.source = AlertSource(
            self.stores,
            self.tail.windows,
            partition_count=COUNT,
            counters=self.counters,
            is_lost=self.tail.is_lost,
            answers_per_s=answers_per_s,
        )
        self.tail.on_records = self.source.on_records
        self.tail.on_begun = self.source.on_begun

    async def begin(self) -> None:
        """Start, and wait until everything there is has come."""
        self.tail.start()
        await until(lambda: not self.tail.missing())
        await self.wait_tailed()

    async def wait_tailed(self) -> None:
        """Wait until the windows have all there is."""
        windows, records = self.tail.windows, self.stores.records
        await until(lambda: all(windows[k].end == len(records[k]) for k in windows))

    async def next(
        self,
        since: dict[int, int] | None,
        *,
        accounts: Sequence[int] = (),
        metrics: Sequence[str] = (),
        limit: int = 100,
        wait_s: float = 0.0,
    ) -> AlertsBatch:
        """One batch."""
        batch = await self.source.next_batch(
            account_ids=accounts, metric_codes=metrics, since=since, limit=limit, wait_s=wait_s
        )
        assert sorted(batch.next) == list(range(COUNT)), "it names every partition"
        assert all(batch.next[number] >= position for number, position in (since or {}).items())
        assert len(batch.alerts) <= limit
        return batch

    def ask(self, since: dict[int, int] | None, **more: Any) -> asyncio.Task[AlertsBatch]:
        """One batch, later."""
        return asyncio.get_running_loop().create_task(self.next(since, **more))

    def write(self, account: int, count: int = 1, metric: str = "m") -> None:
        """Records of an account, in the partition where it belongs."""
        self.stores.write(partition_of(account, COUNT), count, account=account, metric=metric)

    def ends(self) -> dict[int, int]:
        """Where the partitions' records end."""
        return {number: len(records) for number, records in self.stores.records.items()}


def scene(body: Callable[[Scene], Coroutine[Any, Any, None]], **config: Any) -> None:
    """Play a scene to its end; nothing is left running or waiting."""

    async def main() -> None:
        played = Scene(**config)
        try:
            await body(played)
        finally:
            await played.source.close()
            await played.tail.close()
            await asyncio.sleep(60)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert played.source.waiting_count == 0

    run_virtual(main())


def account_in(partition: int) -> int:
    """An account of a partition."""
    return next(account for account in range(1_000) if partition_of(account, COUNT) == partition)


def keys(alerts: Sequence[AlertRecord]) -> list[tuple[int, int]]:
    """Where alerts lie."""
    return [(alert.partition, alert.position) for alert in alerts]


# ------------------------------------------------------------ from now on


def test_from_now_on_begins_at_the_leaders_ends() -> None:
    """Also where the tail has not come so far: what was raised before is not delivered, what is raised after is."""

    async def body(s: Scene) -> None:
        s.write(1, 3)
        await s.begin()
        s.stores.delay_s = 5.0
        s.write(1, 2)
        s.write(2, 4)
        batch = await s.next(None, wait_s=20)
        assert (batch.alerts, batch.next) == ([], s.ends())
        s.write(1)
        found = await s.next(batch.next, wait_s=20)
        assert keys(found.alerts) == [(partition_of(1, COUNT), 5)]

    scene(body)


def test_callers_at_one_time_share_the_question() -> None:
    """A thousand subscribers that come at once are no thousand questions; who comes later has one of its own."""

    async def body(s: Scene) -> None:
        await s.begin()
        s.stores.reads.clear()
        s.stores.gate.clear()
        early = [s.ask(None) for _ in range(50)]
        await asyncio.sleep(0.1)
        s.write(1)
        late = [s.ask(None) for _ in range(50)]
        await asyncio.sleep(0.1)
        s.stores.gate.set()
        await asyncio.gather(*early)
        assert {tuple(sorted((await one).next.items())) for one in late} == {tuple(s.ends().items())}
        assert len(s.stores.reads) == 2 * COUNT

    scene(body)


def test_without_a_leader_it_begins_where_the_tail_is() -> None:
    """Too early is safe; and a partition that was never reached is a reason to go elsewhere."""

    async def body(s: Scene) -> None:
        s.write(1, 3)
        await s.begin()
        s.stores.unreadable[partition_of(1, COUNT)] = NO_LEADER
        assert (await s.next(None)).next == s.ends()
        del s.tail.windows[partition_of(1, COUNT)]
        with pytest.raises(UnavailableError, match="could not be reached yet"):
            await s.next(None)

    scene(body)


def test_a_caller_that_goes_takes_nobody_along() -> None:
    """The question it shared with others goes on."""

    async def body(s: Scene) -> None:
        await s.begin()
        s.stores.gate.clear()
        one, other = s.ask(None), s.ask(None)
        await asyncio.sleep(0.1)
        one.cancel()
        await asyncio.sleep(0.1)
        s.stores.gate.set()
        assert (await other).next == s.ends()

    scene(body)


# ------------------------------------------------------------ from memory


def test_what_is_there_is_answered_at_once() -> None:
    """In order within each partition; nothing is read from stores."""

    async def body(s: Scene) -> None:
        for account in range(20):
            s.write(account)
        await s.begin()
        s.stores.reads.clear()
        batch = await s.next({}, wait_s=20)
        assert sorted(keys(batch.alerts)) == sorted(
            (number, position) for number, end in s.ends().items() for position in range(end)
        )
        assert batch.next == s.ends()
        assert not s.stores.reads

    scene(body)


def test_a_reader_waits_for_what_it_wants_only() -> None:
    """Others' records don't end its wait, and it is past them when its own comes, or when its wait is over."""

    async def body(s: Scene) -> None:
        await s.begin()
        by_account = s.ask({}, accounts=[1], wait_s=20)
        by_metric = s.ask({}, metrics=["x"], wait_s=20)
        by_both = s.ask({}, accounts=[1], metrics=["x"], wait_s=20)
        patient = s.ask({}, accounts=[999], wait_s=20)
        await asyncio.sleep(0.1)
        assert s.source.waiting_count == 4
        s.write(2, 5)
        await asyncio.sleep(0.1)
        assert not by_account.done()
        s.write(1)
        assert keys((await by_account).alerts) == [
            (partition_of(1, COUNT), s.ends()[partition_of(1, COUNT)] - 1)
        ]
        s.write(2, metric="x")
        assert [alert.account_id for alert in (await by_metric).alerts] == [2]
        assert not by_both.done()
        s.write(1, metric="x")
        assert [alert.metric_code for alert in (await by_both).alerts] == ["x"]
        batch = await patient
        assert (batch.alerts, batch.next) == ([], s.ends())

    scene(body)


def test_a_cursor_that_is_ahead_waits() -> None:
    """It comes from an instance that is further: nothing is told twice."""

    async def body(s: Scene) -> None:
        s.write(1, 3)
        await s.begin()
        number = partition_of(1, COUNT)
        ahead = s.ends() | {number: 5}
        waiting = s.ask(ahead, wait_s=20)
        for _ in range(2):
            s.write(1)
            await asyncio.sleep(0.1)
            assert not waiting.done()
        s.write(1)
        assert keys((await waiting).alerts) == [(number, 5)]

    scene(body)


def test_a_small_limit_starves_no_partition() -> None:
    """A busy one isn't always the first."""

    async def body(s: Scene) -> None:
        for number in range(COUNT):
            s.write(account_in(number), 50)
        await s.begin()
        since: dict[int, int] = {}
        seen: Counter[int] = Counter()
        for _ in range(2 * COUNT):
            batch = await s.next(since, limit=5)
            since = batch.next
            seen.update(alert.partition for alert in batch.alerts)
        assert set(seen.values()) == {10}

    scene(body)


def test_a_reader_that_goes_leaves_nothing_behind() -> None:
    """A lost connection cancels its call."""

    async def body(s: Scene) -> None:
        await s.begin()
        waiting = s.ask({}, accounts=[1], wait_s=20)
        await asyncio.sleep(0.1)
        waiting.cancel()
        await asyncio.sleep(0.1)
        assert s.source.waiting_count == 0
        s.write(1)
        await s.wait_tailed()

    scene(body)


def test_readers_that_name_too_much_are_refused() -> None:
    """What those who wait name is bounded in all; what can be answered at once is."""

    async def body(s: Scene) -> None:
        s.write(1)
        await s.begin()
        s.source._matching._names_max = 10
        first = s.ask({}, accounts=range(100, 108), wait_s=20)
        await asyncio.sleep(0.1)
        with pytest.raises(BackpressureError):
            await s.next({}, accounts=range(200, 208), wait_s=20)
        assert len((await s.next({}, accounts=range(8), wait_s=20)).alerts) == 1
        s.write(103)
        assert len((await first).alerts) == 1

    scene(body)


# ------------------------------------------------------------ from stores


def test_what_is_older_than_memory_is_read_from_the_leader() -> None:
    """With the filter, of the partitions that can have it, page by page up to the window."""

    async def body(s: Scene) -> None:
        for number in range(COUNT):
            s.write(account_in(number), 40)
        s.write(1, 3, metric="x")
        for number in range(COUNT):
            s.write(account_in(number), 40)
        await s.begin()
        s.stores.reads.clear()
        batch = await s.next({}, accounts=[1], metrics=["x"], limit=2)
        number = partition_of(1, COUNT)
        expected = [one for one in s.stores.records[number] if one.metric_code == "x"]
        assert batch.alerts == expected[:2]
        batch = await s.next(batch.next, accounts=[1], metrics=["x"], limit=2)
        assert batch.alerts == expected[2:]
        while batch.next != s.ends():
            batch = await s.next(batch.next, accounts=[1], metrics=["x"], limit=2)
            assert not batch.alerts
        assert {call.partition for call in s.stores.reads} == {number}
        assert all(call.account_ids == [1] and call.metric_codes == ["x"] for call in s.stores.reads)

    scene(body, window_records=64, window_records_min=1, behind_records=4)


def test_a_partition_that_cannot_be_read_holds_no_other_up() -> None:
    """Its records are missing from the answer, not passed over; once it can be read they come."""

    async def body(s: Scene) -> None:
        for number in range(COUNT):
            s.write(account_in(number), 40)
        await s.begin()
        s.stores.unreadable[2] = NO_LEADER
        since: dict[int, int] = {}
        got: list[tuple[int, int]] = []
        while len(got) < 120:
            batch = await s.next(since, wait_s=20)
            got += keys(batch.alerts)
            since = batch.next
            assert since[2] == 0
        waiting = s.ask(since, wait_s=20)
        await asyncio.sleep(0.1)
        s.write(account_in(3))
        batch = await waiting
        assert keys(batch.alerts) == [(3, 40)]
        waiting = s.ask(batch.next, wait_s=20)
        await asyncio.sleep(5)
        assert not waiting.done()
        s.stores.unreadable.clear()
        batch = await waiting
        assert keys(batch.alerts) == [(2, position) for position in range(40)]

    scene(body, window_records=32, window_records_min=1, behind_records=2)


@pytest.mark.parametrize("wait_s", [0.0, 7.0])
def test_a_reader_that_is_stuck_is_told(wait_s: float) -> None:
    """When its wait is over, and with an error that sends it elsewhere."""

    async def body(s: Scene) -> None:
        s.write(1, 40)
        await s.begin()
        s.stores.unreadable[partition_of(1, COUNT)] = UnavailableError(
            "damaged", code=ErrorCode.PARTITION_DAMAGED, retriable=False
        )
        with pytest.raises(UnavailableError, match="could not be read") as raised:
            await s.next({}, accounts=[1], wait_s=wait_s)
        assert raised.value.retriable
        assert 1 <= len([call for call in s.stores.reads if call.account_ids]) <= 4 * wait_s + 1

    scene(body, window_records=16, window_records_min=1, behind_records=2)


def test_where_a_leader_is_lost_others_are_asked() -> None:
    """A reader it concerns is told, soon; its alerts come all the same if they are there, and others wait on."""

    async def body(s: Scene) -> None:
        await s.begin()
        s.stores.lead(2, None)
        early = s.ask({}, accounts=[account_in(2)], wait_s=20)
        other = s.ask({}, accounts=[account_in(1)], wait_s=20)
        await asyncio.sleep(10)
        assert not early.done()
        began = asyncio.get_running_loop().time()
        with pytest.raises(UnavailableError, match="lost"):
            await s.next({}, accounts=[account_in(2)], wait_s=20)
        with pytest.raises(UnavailableError, match="lost"):
            await s.next({}, wait_s=20)
        assert asyncio.get_running_loop().time() - began < 3
        s.write(account_in(1))
        assert len((await other).alerts) == 1
        assert len((await s.next({}, wait_s=20)).alerts) == 1
        with pytest.raises(UnavailableError, match="lost"):
            await early
        s.stores.lead(2, "s1")
        await asyncio.sleep(1)
        waiting = s.ask({}, accounts=[account_in(2)], wait_s=20)
        await asyncio.sleep(10)
        s.write(account_in(2))
        assert len((await waiting).alerts) == 1

    scene(body)


def test_a_reader_that_comes_before_the_tail_waits_for_it() -> None:
    """An instance that starts: what lies before its window is read as soon as there is one."""

    async def body(s: Scene) -> None:
        s.write(1, 40)
        s.write(2, 1)
        waiting = s.ask({}, accounts=[1], limit=5, wait_s=20)
        s.stores.gate.clear()
        s.tail.start()
        await asyncio.sleep(1)
        assert not waiting.done()
        s.stores.gate.set()
        began = asyncio.get_running_loop().time()
        assert len((await waiting).alerts) == 5
        assert asyncio.get_running_loop().time() - began < 0.1

    scene(body, window_records=16, window_records_min=1, behind_records=0)


def test_a_page_that_does_not_go_on_is_a_failure() -> None:
    """A leader that has less than was read before: asked again, not in a circle without end."""

    async def body(s: Scene) -> None:
        s.write(1, 40)
        await s.begin()

        async def nothing(call: StoreAlerts, deadline: float) -> AlertsResult:
            s.stores.reads.append(call)
            return AlertsResult([], call.from_position, more=False)

        s.stores.read = nothing  # type: ignore[method-assign]
        s.stores.reads.clear()
        with pytest.raises(UnavailableError, match="could not be read"):
            await s.next({}, accounts=[1], wait_s=3)
        assert len(s.stores.reads) <= 13

    scene(body, window_records=16, window_records_min=1, behind_records=2)


def test_few_pages_are_read_at_one_time() -> None:
    """Readers that are far behind don't fall upon the stores together."""

    async def body(s: Scene) -> None:
        for number in range(COUNT):
            s.write(account_in(number), 40)
        await s.begin()
        s.stores.gate.clear()
        s.stores.reads.clear()
        readers = [s.ask({}, metrics=["m", f"n{reader}"], limit=1, wait_s=20) for reader in range(30)]
        await asyncio.sleep(1)
        assert len(s.stores.reads) == COUNT * READS_MAX
        s.stores.gate.set()
        assert [len(batch.alerts) for batch in await asyncio.gather(*readers)] == [1] * 30

    scene(body, window_records=16, window_records_min=1, behind_records=2)


def test_a_partition_that_hangs_keeps_no_reader_of_others_waiting() -> None:
    """However many wait for it."""

    async def body(s: Scene) -> None:
        for number in range(COUNT):
            s.write(account_in(number), 40)
        await s.begin()
        read = s.stores.read
        hanging = asyncio.Event()

        async def hang(call: StoreAlerts, deadline: float) -> AlertsResult:
            if call.partition == 2:
                await hanging.wait()
            return await read(call, deadline)

        s.stores.read = hang  # type: ignore[method-assign]
        account = account_in(2)
        stuck = [
            s.ask({}, accounts=[account], metrics=["m", f"n{reader}"], wait_s=20) for reader in range(50)
        ]
        await asyncio.sleep(0.1)
        for number in (0, 1, 3):
            assert len((await s.next({}, accounts=[account_in(number)])).alerts) == 40
        hanging.set()
        assert [len(batch.alerts) for batch in await asyncio.gather(*stuck)] == [40] * 50

    scene(body, window_records=16, window_records_min=1, behind_records=2)


def read_slowly(s: Scene, seconds: float) -> None:
    """Have every read take so long."""
    read = s.stores.read

    async def slow(call: StoreAlerts, deadline: float) -> AlertsResult:
        await asyncio.sleep(seconds)
        return await read(call, deadline)

    s.stores.read = slow  # type: ignore[method-assign]


async def load(s: Scene, per_s: float) -> None:
    """A record in partition 1, so many times a second."""
    while True:
        s.stores.write(1)
        await asyncio.sleep(1 / per_s)


@pytest.mark.parametrize(
    ("read_s", "per_s", "rest_s", "limit"),
    [
        (0.005, 300, 0.0003, 64),  # a page comes at about the pace of the alerts
        (0.05, 50, 0.0003, 64),  # none comes before the next alert
        (1.0, 50, 0.0003, 64),
        (0.05, 50, 5.0, 64),  # a reader that is slow itself, and whose answers are full
        (0.05, 300, 0.02, 4),
    ],
)
def test_a_busy_partition_keeps_no_other_from_being_read(
    read_s: float, per_s: float, rest_s: float, limit: int
) -> None:
    """It has an alert at each call, before the page of the one that is behind can have come."""

    async def body(s: Scene) -> None:
        s.stores.write(0, 2_000)
        await s.begin()
        read_slowly(s, read_s)
        loading = asyncio.get_running_loop().create_task(load(s, per_s))
        since: dict[int, int] = {}
        got: dict[int, list[int]] = {0: [], 1: []}
        calls = 0
        while since.get(0, 0) < 8 * limit:
            batch = await s.next(since, limit=limit, wait_s=20)
            for alert in batch.alerts:
                got[alert.partition].append(alert.position)
            since = batch.next
            calls += 1
            assert calls < 4_000
            await asyncio.sleep(rest_s)
        loading.cancel()
        assert all(positions == list(range(len(positions))) for positions in got.values())
        assert got[1]

    scene(body)


def test_a_busy_partition_keeps_no_crowd_from_being_read() -> None:
    """Each of those who are behind gets its page, though all are answered again and again before it comes."""

    async def body(s: Scene) -> None:
        s.stores.write(0, 2_000)
        await s.begin()
        read_slowly(s, 0.005)
        loading = asyncio.get_running_loop().create_task(load(s, 50))

        async def read(reader: int) -> None:
            since: dict[int, int] = {}
            while since.get(0, 0) < 2_000:
                since = (await s.next(since, metrics=["m", f"n{reader}"], limit=64, wait_s=0.5)).next
                await asyncio.sleep(0.0003)

        async with asyncio.timeout(10):
            await asyncio.gather(*(read(reader) for reader in range(100)))
        loading.cancel()

    scene(body)


def test_who_waits_for_its_turn_is_read_for() -> None:
    """Its answer carries what has come of older alerts, too."""

    async def body(s: Scene) -> None:
        s.stores.write(0, 640)
        s.stores.write(1)
        await s.begin()
        read_slowly(s, 0.05)
        while s.source._pacer.take(asyncio.get_running_loop().time()):
            pass
        batch = await s.next({}, wait_s=2.0)
        assert Counter(alert.partition for alert in batch.alerts) == {0: 99, 1: 1}

    scene(body, answers_per_s=0.01)


def test_behind_a_lost_leader_all_are_told_soon() -> None:
    """However many there are: who can't be read for yet doesn't stand in line first."""

    async def body(s: Scene) -> None:
        s.stores.write(0, 640)
        await s.begin()
        read = s.stores.read

        async def hang(call: StoreAlerts, deadline: float) -> AlertsResult:
            if s.stores.leaders[call.partition] is not None:
                return await read(call, deadline)
            await asyncio.sleep(deadline - loop.time())
            raise NO_LEADER

        loop = asyncio.get_running_loop()
        s.stores.read = hang  # type: ignore[method-assign]
        s.stores.lead(0, None)
        told: list[float] = []

        async def tell(reader: int, wait_s: float) -> None:
            began = loop.time()
            with pytest.raises(UnavailableError, match="lost") as raised:
                await s.next({}, metrics=["m", f"n{reader}"], wait_s=wait_s)
            assert raised.value.retriable
            told.append(loop.time() - began)

        early = [loop.create_task(tell(reader, 8)) for reader in range(40)]
        await asyncio.sleep(10)
        assert len(told) == 40, "they were in line when it was lost"
        await asyncio.gather(*early)
        assert max(told) < 8.1
        told.clear()
        await asyncio.gather(*(tell(reader, 20) for reader in range(100, 140)))
        assert max(told) < 1.1
        s.stores.lead(0, "s1")
        await asyncio.sleep(6)
        batches = await asyncio.gather(
            *(s.next({}, metrics=["m", f"n{reader}"], wait_s=20) for reader in range(100, 140))
        )
        assert all(len(batch.alerts) == 100 for batch in batches)

    scene(body)


def test_an_alert_is_found_by_its_position() -> None:
    """In memory, at the leader, or nowhere."""

    async def body(s: Scene) -> None:
        s.write(1, 40)
        await s.begin()
        number = partition_of(1, COUNT)
        for position in (0, 39):
            found = await s.source.alert(number, position)
            assert found == s.stores.records[number][position]
        assert await s.source.alert(number, 40) is None

    scene(body, window_records=16, window_records_min=1, behind_records=2)


@pytest.mark.parametrize("seed", range(25))
def test_cursors_pass_over_nothing(seed: int) -> None:
    """Readers of any filter, limit and wait, through evictions, failures and moves: each match once, in order."""

    async def body(s: Scene) -> None:
        rng = random.Random(seed)
        done = asyncio.Event()

        async def read(reader: int) -> None:
            own = random.Random(f"{seed} {reader}")
            accounts = own.sample(range(12), own.choice([0, 0, 1, 3]))
            metrics = own.sample(["a", "b"], own.choice([0, 0, 1]))
            wanted = Filter(accounts, metrics, COUNT)
            since: dict[int, int] = {}
            got: dict[int, list[int]] = {number: [] for number in range(COUNT)}
            while not (done.is_set() and since == s.ends()):
                try:
                    batch = await s.next(
                        since,
                        accounts=accounts,
                        metrics=metrics,
                        limit=own.choice([1, 2, 7, 1_000]),
                        wait_s=own.choice([0, 0.001, 3]),
                    )
                except UnavailableError:
                    continue
                for alert in batch.alerts:
                    assert alert == s.stores.records[alert.partition][alert.position]
                    got[alert.partition].append(alert.position)
                since = batch.next
                if own.random() < 0.2:
                    await asyncio.sleep(own.choice([0.01, 2]))
            for number, records in s.stores.records.items():
                assert got[number] == [one.position for one in records if wanted.matches(one)]

        s.tail.start()
        readers = [asyncio.get_running_loop().create_task(read(reader)) for reader in range(6)]
        for _ in range(300):
            s.write(rng.randrange(12), rng.choice([1, 1, 2, 30]), rng.choice(["a", "b"]))
            match rng.randrange(8):
                case 0:
                    s.stores.unreadable[rng.randrange(COUNT)] = NO_LEADER
                case 1:
                    s.stores.unreadable.clear()
                case 2:
                    s.stores.lead(rng.randrange(COUNT), rng.choice(["s0", "s1", None]))
                case 3:
                    s.stores.delay_s = rng.choice([0, 0, 0.05, 1])
                case 4:
                    s.stores.tail_max = rng.choice([1, 5, 1_000])
            await asyncio.sleep(rng.choice([0, 0.001, 0.01, 0.3]))
        s.stores.unreadable.clear()
        s.stores.delay_s = 0
        s.stores.tail_max = 1_000
        for number in range(COUNT):
            s.stores.lead(number, "s0")
        done.set()
        async with asyncio.timeout(60):
            await asyncio.gather(*readers)

    scene(body, window_records=COUNT * 20, window_records_min=1, behind_records=3, answers_per_s=50)


# ------------------------------------------------------------ pace


def test_a_lone_alert_is_not_held_up() -> None:
    """Below the rate nothing waits for its turn."""

    async def body(s: Scene) -> None:
        await s.begin()
        loop = asyncio.get_running_loop()
        since = s.ends()
        for _ in range(20):
            waiting = s.ask(since, wait_s=20)
            await asyncio.sleep(1)
            began = loop.time()
            s.write(1)
            since = (await waiting).next
            assert loop.time() - began < 0.001

    scene(body)


def test_under_load_answers_are_paced_and_carry_more() -> None:
    """Many readers, many alerts: all of them in time, in fewer answers than there are alerts; nobody is left out."""

    async def body(s: Scene) -> None:
        await s.begin()
        loop = asyncio.get_running_loop()
        began, seconds, rate = loop.time(), 5.0, 100.0
        answers = 0
        got: Counter[int] = Counter()

        async def read(account: int) -> None:
            nonlocal answers
            since = dict.fromkeys(range(COUNT), 0)
            while True:
                batch = await s.next(since, accounts=[account], wait_s=20)
                since = batch.next
                answers += bool(batch.alerts)
                got[account] += len(batch.alerts)

        readers = [loop.create_task(read(account)) for account in range(200)]
        for _ in range(int(seconds / 0.05)):
            for account in range(200):
                s.write(account)
            await asyncio.sleep(0.05)
        await until(lambda: sum(got.values()) == 200 * 100, 10)
        assert set(got.values()) == {100}
        assert answers <= ANSWERS_BURST + rate * (loop.time() - began) + 1
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)

    scene(body, answers_per_s=100)


def test_a_full_answer_does_not_wait() -> None:
    """It can't carry more than it has."""

    async def body(s: Scene) -> None:
        for _ in range(500):
            s.write(1)
        await s.begin()
        loop = asyncio.get_running_loop()
        began = loop.time()
        since: dict[int, int] = {}
        for _ in range(500):
            since = (await s.next(since, limit=1, wait_s=20)).next
        assert loop.time() - began < 1

    scene(body, answers_per_s=1)


def test_an_answer_waits_no_longer_than_its_caller() -> None:
    """What was found goes out when the wait is over, turn or not."""

    async def body(s: Scene) -> None:
        s.write(1)
        await s.begin()
        while s.source._pacer.take(asyncio.get_running_loop().time()):
            pass
        began = asyncio.get_running_loop().time()
        assert len((await s.next({}, wait_s=2.0)).alerts) == 1
        assert 1.9 <= asyncio.get_running_loop().time() - began <= 2.1

    scene(body, answers_per_s=0.01)


# ------------------------------------------------------------ the end


def test_at_the_end_those_who_wait_are_answered() -> None:
    """With what there is, at once; and nobody who comes then waits."""

    async def body(s: Scene) -> None:
        s.write(1)
        await s.begin()
        while s.source._pacer.take(asyncio.get_running_loop().time()):
            pass
        idle = s.ask(s.ends(), wait_s=20)
        queued = s.ask({}, wait_s=20)
        s.stores.unreadable[0] = NO_LEADER
        await asyncio.sleep(0.1)
        began = asyncio.get_running_loop().time()
        s.source.end_waits()
        assert (await idle).alerts == []
        assert len((await queued).alerts) == 1
        assert (await s.next(s.ends(), wait_s=20)).next == s.ends()
        assert asyncio.get_running_loop().time() == began

    scene(body, answers_per_s=0.01)
