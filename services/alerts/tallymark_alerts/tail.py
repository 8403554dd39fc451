"""The tail: new alert records of all partitions, from whoever leads them, into windows.

Owns what has been reached in every partition, and the calls to the leaders: one at a time to each, for all the
partitions it leads. A partition whose leader changes is asked for at the new one, from the position reached: records
are counted the same at every copy, so nothing is missed and nothing comes twice. An answer that does not go on exactly
there is not taken; it is asked for again.

    begin   the leader is asked how many records there are; the window begins a little before
    follow  `StoreTail` is held by the leader until there is news

Under load one answer brings many records, since calls to a leader are spaced.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Sequence
from typing import Final

from tallymark_alerts.counters import AlertsCounters
from tallymark_alerts.stores import Stores
from tallymark_alerts.window import Window
from tallymark_protocol import limits
from tallymark_protocol.errors import ErrorCode, TallymarkError
from tallymark_protocol.messages import AlertRecord, StoreAlerts, StoreTail, TailPart, TailResult
from tallymark_protocol.zones import TIME_END_NS
from tallymark_runtime.clock import Clock
from tallymark_runtime.instruments import count_in

_log = logging.getLogger(__name__)

WINDOW_RECORDS: Final = 65_536  # in all partitions
WINDOW_RECORDS_MIN: Final = 1_024  # in one
BEHIND_RECORDS: Final = (
    512  # before the end, where a window begins: whoever was connected elsewhere finds its place
)
TAIL_RECORDS: Final = 2_000  # asked for at once
WAIT_MS: Final = 10_000  # for which a leader holds a call
GRACE_S: Final = 5.0  # for its answer beyond that
SPACING_S: Final = 0.002  # between the beginnings of two calls to one leader
RETRY_S: Final = 0.02  # after a failure; doubled up to ...
RETRY_MAX_S: Final = 0.5
LOST_S: Final = 5.0  # without word from a partition's leader: longer than a failover takes
PROBE_MS: Final = 100  # for which a call is held that is to show whether a leader answers again
BEGIN_S: Final = 5.0  # for a leader to say how many records there are

_DOUBTS: Final = frozenset({ErrorCode.NOT_LEADER, ErrorCode.PARTITION_UNAVAILABLE, ErrorCode.CLOSED})


class _Leader:
    """The calls to one address.

    Attributes:
        asked: the partitions of the call that is out.
        call: that call; None while there is none.
        timer: what asks next; None while nothing waits for its time.
        delay: before the next call, after a failure.
    """

    __slots__ = ("asked", "call", "delay", "timer")

    def __init__(self) -> None:
        self.asked: frozenset[int] = frozenset()
        self.call: asyncio.Task[None] | None = None
        self.timer: asyncio.TimerHandle | None = None
        self.delay = RETRY_S


class Tail:
    """See the module. Start it, close it.

    Args:
        stores: who is asked.
        partition_count: of the cluster.
        clock: tells how old records are.
        rng: for jitter.
        counters: of the instance.
        window_records: kept in all.
        window_records_min: kept of one partition, whatever the share of all.
        behind_records: before a partition's end, where its window begins.

    Attributes:
        on_records: called with a partition and its new records, which are in the window by then.
        on_begun: called with a partition whose window there is from now on.
        windows: by partition; absent until its leader has been reached.
        lags: by partition: how many records its leader had beyond those that were taken.
    """

    def __init__(
        self,
        stores: Stores,
        *,
        partition_count: int,
        clock: Clock,
        rng: random.Random,
        counters: AlertsCounters,
        window_records: int = WINDOW_RECORDS,
        window_records_min: int = WINDOW_RECORDS_MIN,
        behind_records: int = BEHIND_RECORDS,
    ) -> None:
        self.on_records: Callable[[int, Sequence[AlertRecord]], None] = _ignore
        self.on_begun: Callable[[int], None] = lambda _: None
        self.windows: dict[int, Window] = {}
        self.lags = dict.fromkeys(range(partition_count), 0)
        self._stores = stores
        self._partition_count = partition_count
        self._clock = clock
        self._rng = rng
        self._counters = counters
        self._window_records = max(window_records // partition_count, window_records_min)
        self._behind_records = behind_records
        self._leaders: dict[str, _Leader] = {}
        self._refused: dict[int, float] = {}  # by partition: the delay after which it is asked for again
        self._refused_timers: dict[int, asyncio.TimerHandle] = {}
        self._beginning: dict[int, asyncio.Task[None]] = {}
        self._lost: dict[
            int, float
        ] = {}  # by partition: since when its leader gives no word, on the loop's clock
        self._is_closed = False
        stores.on_news = self._on_news

    def start(self) -> None:
        """Begin; what is to be waited for is in `missing`."""
        loop = asyncio.get_running_loop()
        for partition in range(self._partition_count):
            self._lose(partition)
            self._beginning[partition] = loop.create_task(self._begin(partition))

    async def close(self) -> None:
        """Stop."""
        self._is_closed = True
        for handle in self._refused_timers.values():
            handle.cancel()
        tasks = list(self._beginning.values())
        for leader in self._leaders.values():
            if leader.timer is not None:
                leader.timer.cancel()
            if leader.call is not None:
                tasks.append(leader.call)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def missing(self) -> list[int]:
        """Partitions whose leader has not been reached since the start, in order."""
        return [number for number in range(self._partition_count) if number not in self.windows]

    def is_lost(self, partition: int) -> bool:
        """Whether a partition's leader has given no word for so long that another instance may know more."""
        since = self._lost.get(partition)
        return since is not None and asyncio.get_running_loop().time() - since > LOST_S

    def _lose(self, partition: int) -> None:
        self._lost.setdefault(partition, asyncio.get_running_loop().time())

    # ------------------------------------------------------------ begin

    async def _begin(self, partition: int) -> None:
        """Learn where a partition's records end, as soon as a leader can say so."""
        loop = asyncio.get_running_loop()
        # No record is of that time; the answer says where to go on.
        question = StoreAlerts(partition, start_ns=TIME_END_NS, end_ns=TIME_END_NS, limit=1)
        delay = RETRY_S
        while True:
            try:
                answer = await self._stores.read(question, loop.time() + BEGIN_S)
                break
            except TallymarkError as error:
                _log.debug("the end of partition %d is not known: %s", partition, error.message)
                count_in(self._counters.tail_failures, int(error.code))
            await asyncio.sleep(delay * (0.5 + self._rng.random()))
            delay = min(delay * 2, RETRY_MAX_S)
        start = max(answer.next_position - self._behind_records, 0)
        self.lags[partition] = answer.next_position - start
        self.windows[partition] = Window(partition, start, self._window_records)
        self._lost.pop(partition, None)
        self._beginning.pop(partition, None)
        self.on_begun(partition)
        self._on_news(partition)

    # ------------------------------------------------------------ whom to ask

    def _on_news(self, partition: int) -> None:
        """It has another leader, or its leader can be reached, or it is to be asked for again."""
        if self._is_closed:
            return
        timer = self._refused_timers.pop(partition, None)
        if timer is not None:
            timer.cancel()
        address = self._stores.leader(partition)
        if address is None:
            self._lose(partition)
        elif partition in self.windows:
            leader = self._leaders.get(address)
            if leader is not None and leader.timer is not None and leader.call is None:
                leader.timer.cancel()
                leader.timer = None
            self._ask(address)

    def _led_by(self, address: str) -> frozenset[int]:
        """What an address is to be asked for."""
        leader = self._stores.leader
        waiting = self._refused_timers
        return frozenset(
            number for number in self.windows if leader(number) == address and number not in waiting
        )

    def _ask(self, address: str) -> None:
        """Have a call to an address out that names all it leads."""
        if self._is_closed:
            return
        leader = self._leaders.get(address)
        if leader is None:
            leader = self._leaders[address] = _Leader()
        if leader.timer is not None:
            return  # it asks soon
        wanted = self._led_by(address)
        if leader.call is not None:
            if wanted <= leader.asked:
                return
            # The store ends a call whose caller asks anew; what it may have answered is asked for again.
            leader.call.cancel()
            leader.call = None
        if not wanted:
            del self._leaders[address]
            return
        leader.asked = wanted
        leader.call = asyncio.get_running_loop().create_task(self._call(address, leader, wanted))

    def _ask_later(self, address: str, leader: _Leader, delay: float) -> None:
        assert leader.timer is None, "one timer for each leader"

        def ask() -> None:
            leader.timer = None
            self._ask(address)

        leader.timer = asyncio.get_running_loop().call_later(delay, ask)

    async def _call(self, address: str, leader: _Leader, partitions: frozenset[int]) -> None:
        """One call, from asking to taking the answer in."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        positions = {number: self.windows[number].end for number in sorted(partitions)}
        is_probe = not partitions.isdisjoint(self._lost)
        call = StoreTail(positions, TAIL_RECORDS, PROBE_MS if is_probe else WAIT_MS)
        try:
            result = await self._stores.tail(address, call, WAIT_MS / 1000 + GRACE_S)
        except TallymarkError as error:
            leader.call = None
            for number in partitions:
                if self._stores.leader(number) == address:
                    self._lose(number)
            self._failed(address, leader, error)
            return
        leader.call = None
        leader.delay = RETRY_S
        if self._take(address, positions, result):
            self._ask_later(address, leader, max(SPACING_S - (loop.time() - began), 0.0))
        else:
            self._ask_later(address, leader, RETRY_S)

    def _failed(self, address: str, leader: _Leader, error: TallymarkError) -> None:
        _log.debug("the tail at %s failed: %s", address, error.message)
        count_in(self._counters.tail_failures, int(error.code))
        if error.code in _DOUBTS:
            self._stores.doubt()
        self._ask_later(address, leader, leader.delay * (0.5 + self._rng.random()))
        leader.delay = min(leader.delay * 2, RETRY_MAX_S)

    # ------------------------------------------------------------ answers

    def _take(self, address: str, positions: dict[int, int], result: TailResult) -> bool:
        """Take an answer in; False where a part of it is not what was asked for."""
        unsound = {part.partition for part in result.parts if not self._take_part(positions, part)}
        for partition in positions:
            if self._stores.leader(partition) != address:
                continue  # it has another leader by now: who was it says nothing of that one
            wire = result.refused.get(partition)
            if wire is not None:
                count_in(self._counters.tail_failures, wire.code)
                self._put_off(partition)
            elif partition not in unsound:
                self._refused.pop(partition, None)
                self._lost.pop(partition, None)
                continue
            self._lose(partition)
        if result.refused:
            self._stores.doubt()
        return not unsound

    def _take_part(self, positions: dict[int, int], part: TailPart) -> bool:
        window = self.windows.get(part.partition)
        if part.partition not in positions or window is None:
            return False
        records = window.missing(part.alerts)
        if records is None:
            self._counters.gaps += 1
            _log.warning("records of partition %d do not go on at position %d", part.partition, window.end)
            return False
        if records:
            window.append(records)
            now_ns = self._clock.now_ns()
            self._counters.tailed += len(records)
            self._counters.age_ns.observe(max(now_ns - records[-1].triggered_at_ns, 0))
            self.on_records(part.partition, records)
        self.lags[part.partition] = max(part.end - window.end, 0)
        return True

    def _put_off(self, partition: int) -> None:
        """Ask for a partition again after a while, or when there is news of it: whoever has the key may not lead yet."""
        if partition in self._refused_timers:
            return
        delay = self._refused.get(partition, RETRY_S)
        self._refused[partition] = min(delay * 2, RETRY_MAX_S)
        self._refused_timers[partition] = asyncio.get_running_loop().call_later(
            delay * (0.5 + self._rng.random()), self._on_news, partition
        )


def _ignore(partition: int, records: Sequence[AlertRecord]) -> None:
    """Take the place of a callback that was not given."""


assert TAIL_RECORDS <= limits.PAGE_EVENTS_MAX, "a store gives so many"
assert WAIT_MS <= limits.ALERTS_WAIT_MS_MAX, "a store waits so long"
