"""Where alerts come from for whoever reads on from a cursor: subscribers, and the webhooks of this instance.

Owns the wait for news. A reader brings its filter and its positions with every call and is forgotten after the answer.
Positions in the windows (`tail`) are answered from there; older ones are read from their partition's leader with the
filter, page by page, until they get to the window (`pages`). Both count the same positions, so there is no gap between
them. A partition that can't be read holds no others up, and one that has alerts at every call keeps no others from being
read: a read goes on when its reader is answered, and its page is there at the next call.

Under load, answers are paced (`pacing`): a reader whose alerts are there waits for its turn, and gets what has come by
then, unless its answer is full already.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, Final, TypeVar

from tallymark_alerts.counters import AlertsCounters
from tallymark_alerts.matching import Filter, Matching
from tallymark_alerts.pacing import Pacer
from tallymark_alerts.pages import READ_S, Page, Pages
from tallymark_alerts.stores import Stores
from tallymark_alerts.window import Window
from tallymark_protocol.errors import TallymarkError, UnavailableError
from tallymark_protocol.messages import AlertRecord, AlertsBatch, StoreAlerts
from tallymark_protocol.zones import TIME_END_NS

T = TypeVar("T")

ANSWERS_PER_S: Final = 2_000  # beyond that they are paced
ANSWERS_BURST: Final = 200
LOST_WAIT_S: Final = 1.0  # for news, where others may know more
ENDS_S: Final = 2.0  # for leaders to say where their partitions end
RELEASE_S: Final = 0.002  # between two looks at those who wait for their turn
_FILTERS_MAX: Final = 10_000  # that are remembered by what they were made of
_FILTER_NAMES_MAX: Final = 500_000  # accounts and codes in them


class Waiter:
    """A reader that waits; made for one call.

    Attributes:
        news: done when it is to look again.
        is_late: whether its wait is over.
        is_queued: whether it has its place among those who wait for their turn.
        has_turn: whether its answer may go out.
    """

    __slots__ = ("has_turn", "is_late", "is_queued", "news")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.news: asyncio.Future[None] = loop.create_future()
        self.is_late = False
        self.is_queued = False
        self.has_turn = False

    def end_wait(self) -> None:
        """Its wait is over."""
        self.is_late = True
        self.wake()

    def wake(self) -> None:
        """Have it look again."""
        if not self.news.done():
            self.news.set_result(None)


class AlertSource:
    """See the module. Close it before the tail.

    Args:
        stores: who has what is not in the windows.
        windows: the newest records, by partition; absent ones have never been reached.
        partition_count: of the cluster.
        counters: of the instance.
        is_lost: whether a partition's leader has given no word for long.
        answers_per_s: beyond so many they are paced.
    """

    def __init__(
        self,
        stores: Stores,
        windows: Mapping[int, Window],
        *,
        partition_count: int,
        counters: AlertsCounters,
        is_lost: Callable[[int], bool] = lambda _: False,
        answers_per_s: float = ANSWERS_PER_S,
    ) -> None:
        self.partition_count = partition_count
        self.partitions = tuple(range(partition_count))
        self.beginning = dict.fromkeys(self.partitions, 0)
        self.counters = counters
        self.windows = windows
        self.stores = stores
        self.is_lost = is_lost
        self.is_closed = False
        self.pages = Pages(stores, partition_count=partition_count, counters=counters, is_lost=is_lost)
        self._loop = asyncio.get_running_loop()
        self._matching: Matching[Waiter] = Matching()
        self._pacer = Pacer(answers_per_s, ANSWERS_BURST, self._loop.time())
        self._queue: deque[Waiter] = deque()  # alerts of theirs are there; they wait for their turn
        self._release_timer: asyncio.TimerHandle | None = None
        self._filters: dict[tuple[tuple[int, ...], tuple[str, ...]], Filter] = {}
        self._filter_names = 0
        self._turns = itertools.count()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._ends: asyncio.Task[dict[int, int]] | None = None  # a question that is not asked yet: see `ends`
        self._asking_ends = asyncio.Lock()

    def end_waits(self) -> None:
        """Have those who wait answered with what there is, and let nobody wait any more."""
        self.is_closed = True
        for waiter in list(self._matching.everybody()):
            waiter.wake()
        for waiter in self._queue:
            waiter.wake()

    async def close(self) -> None:
        """Stop."""
        self.end_waits()
        if self._release_timer is not None:
            self._release_timer.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(self.pages.close(), *self._tasks, return_exceptions=True)

    @property
    def waiting_count(self) -> int:
        """Readers that wait for alerts."""
        return len(self._matching)

    # ------------------------------------------------------------ for readers

    async def next_batch(
        self,
        *,
        account_ids: Sequence[int],
        metric_codes: Sequence[str],
        since: Mapping[int, int] | None,
        limit: int,
        wait_s: float,
    ) -> AlertsBatch:
        """The next matching alerts from a cursor on, as soon as there are any, or the wait is over.

        Accounts and codes: none of a kind means all. `since` is by partition, absent ones begin at the first record;
        None stands for the end as it is now, and is answered at once. `next` names every partition.

        Raises:
            UnavailableError: nothing was found, and a partition that had to be read from its leader could not be, or one
            is not followed here any more: another instance may know more.
            BackpressureError: those who wait name too much in all.
        """
        if since is None:
            return AlertsBatch([], await self.ends())
        reader = _Reader(self, self._filter(account_ids, metric_codes), since, limit)
        try:
            return await self._next(reader, self._loop.time() + wait_s)
        finally:
            reader.close()

    async def alert(self, partition: int, position: int) -> AlertRecord | None:
        """The alert at a position of a partition; None where there is none.

        Raises:
            UnavailableError: the partition's leader can't be asked.
        """
        window = self.windows.get(partition)
        if window is not None and window.start <= position < window.end:
            return window.record(position)
        question = StoreAlerts(partition, from_position=position, limit=1)
        answer = await self.stores.read(question, self._loop.time() + READ_S)
        found = answer.alerts
        return found[0] if found and found[0].position == position else None

    async def ends(self) -> dict[int, int]:
        """Where every partition's records end: nothing that is raised after the answer lies below.

        Callers at one time share one question. Where a leader doesn't say, the end is where the tail has come, which
        may be too early, never too late.

        Raises:
            UnavailableError: neither is known of some partition.
        """
        if self._ends is None:
            self._ends = self.task(self._ask_ends())
        return dict(await asyncio.shield(self._ends))

    async def _ask_ends(self) -> dict[int, int]:
        async with self._asking_ends:
            self._ends = None  # whoever comes from now on needs an answer of a later moment
            numbers = range(self.partition_count)
            return dict(zip(numbers, await asyncio.gather(*map(self._end, numbers)), strict=True))

    async def _end(self, partition: int) -> int:
        # No record is of that time; the answer says where to go on.
        question = StoreAlerts(partition, start_ns=TIME_END_NS, end_ns=TIME_END_NS, limit=1)
        try:
            answer = await self.stores.read(question, self._loop.time() + ENDS_S)
        except TallymarkError as error:
            window = self.windows.get(partition)
            if window is None:
                raise UnavailableError(
                    f"the leader of partition {partition} could not be reached yet: {error.message}"
                ) from error
            return window.end
        return answer.next_position

    def _filter(self, account_ids: Sequence[int], metric_codes: Sequence[str]) -> Filter:
        """The filter; made once for those who come with the same over and over."""
        key = tuple(account_ids), tuple(metric_codes)
        found = self._filters.get(key)
        if found is None:
            found = Filter(account_ids, metric_codes, self.partition_count)
            self._filter_names += len(key[0]) + len(key[1])
            if len(self._filters) >= _FILTERS_MAX or self._filter_names > _FILTER_NAMES_MAX:
                self._filters.clear()
                self._filter_names = len(key[0]) + len(key[1])
            self._filters[key] = found
        return found

    # ------------------------------------------------------------ waiting

    async def _next(self, reader: _Reader, deadline: float) -> AlertsBatch:
        waiter = reader.waiter
        is_first = True
        if reader.is_lost():
            deadline = min(deadline, self._loop.time() + LOST_WAIT_S)
        while True:
            # No await between looking and waiting: what comes in between would be missed.
            reader.collect(next(self._turns))
            now = self._loop.time()
            is_late = waiter.is_late or now >= deadline
            if not self.is_closed and (is_first or not is_late):
                reader.start_reads()  # whatever was found: a busy partition must not keep others from being read
            if reader.found:
                is_full = len(reader.found) >= reader.limit
                is_due = is_full or waiter.has_turn or is_late or self.is_closed
                if is_due or (not self._queue and self._pacer.take(now)):
                    return reader.batch()
                self._enqueue(waiter)
                self._release_later()
            else:
                # Reading is no waiting: a page that is on its way is waited for, and it comes or fails in time. One
                # that is in line is not: it may take long, and is found by the next call.
                if self.is_closed or (is_late and not reader.is_reading):
                    reader.raise_if_stuck()
                    return reader.batch()
                self._register(reader)
            is_first = False
            if reader.timer is None and not is_late:
                reader.timer = self._loop.call_at(deadline, waiter.end_wait)
            waiter.news = self._loop.create_future()
            await waiter.news

    def _register(self, reader: _Reader) -> None:
        if not reader.is_registered:
            self._matching.add(reader.wanted, reader.waiter)
            reader.is_registered = True

    def forget(self, reader: _Reader) -> None:
        """It waits no more."""
        if reader.is_registered:
            self._matching.remove(reader.wanted, reader.waiter)
            reader.is_registered = False

    def task(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run something whose outcome may be nobody's any more; it ends with this object."""
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)
        return task

    def _task_done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # whoever waits for it is told; if nobody does, it is of no interest

    # ------------------------------------------------------------ news

    def on_begun(self, partition: int) -> None:  # noqa: ARG002
        """A partition has a window from now on: what lies before it can be read."""
        for waiter in list(self._matching.everybody()):
            waiter.wake()

    def on_records(self, partition: int, records: Sequence[AlertRecord]) -> None:  # noqa: ARG002
        """New records are in the window."""
        for waiter in self._matching.waiting(records):
            self._enqueue(waiter)
        self._release()

    def _enqueue(self, waiter: Waiter) -> None:
        if not waiter.is_queued:
            waiter.is_queued = True
            self._queue.append(waiter)

    def _release(self) -> None:
        """Give turns to those who wait for theirs."""
        queue = self._queue
        now = self._loop.time()
        while queue:
            waiter = queue[0]
            if not waiter.news.done():  # else it looks again by itself, or is gone
                if not self._pacer.take(now):
                    self._release_later()
                    return
                waiter.has_turn = True
                waiter.wake()
            waiter.is_queued = False
            queue.popleft()

    def _release_later(self) -> None:
        if self._release_timer is None and not self.is_closed:
            wait_s = max(self._pacer.wait_s(), RELEASE_S)
            self._release_timer = self._loop.call_later(wait_s, self._on_release)

    def _on_release(self) -> None:
        self._release_timer = None
        self._release()


class _Reader:
    """One call: where it is, what it has found, and what it reads from stores.

    Attributes:
        found: in order within each partition; at most `limit`.
        is_registered: whether its waiter is told of new records.
        timer: what ends its wait; None before that has begun.
    """

    __slots__ = (
        "_asked",
        "_failed",
        "_positions",
        "_source",
        "_wants",
        "found",
        "is_registered",
        "limit",
        "timer",
        "waiter",
        "wanted",
    )

    def __init__(self, source: AlertSource, wanted: Filter, since: Mapping[int, int], limit: int) -> None:
        self.found: list[AlertRecord] = []
        self.is_registered = False
        self.limit = limit
        self.timer: asyncio.TimerHandle | None = None
        self.waiter = Waiter(asyncio.get_running_loop())
        self.wanted = wanted
        self._source = source
        self._positions = (
            {**source.beginning, **since} if len(since) < source.partition_count else dict(since)
        )
        self._asked: dict[int, Page] = {}  # by partition: from its position on
        self._failed: dict[int, TallymarkError] = {}  # by partition: why its last read has failed
        self._wants: set[int] = set()  # partitions that are before their window

    @property
    def is_reading(self) -> bool:
        """Whether a page is on its way that will come or fail soon."""
        is_lost = self._source.is_lost
        return any(page.is_under_way and not is_lost(number) for number, page in self._asked.items())

    def batch(self) -> AlertsBatch:
        """The answer."""
        positions, partitions = self._positions, self.wanted.partitions
        if partitions:
            for number, window in self._source.windows.items():
                if positions[number] < window.end and number not in partitions:
                    positions[number] = window.end  # nothing of it matches
        return AlertsBatch(self.found, positions)

    def close(self) -> None:
        """The call has its answer, or needs none any more."""
        if self.timer is not None:
            self.timer.cancel()
        self._source.forget(self)
        self.waiter.wake()
        for page in self._asked.values():
            self._source.pages.leave(page, self.waiter)

    def collect(self, turn: int) -> None:
        """Take what is there, beginning with another partition each turn so that none is always the last."""
        windows, positions, wanted = self._source.windows, self._positions, self.wanted
        order = wanted.partitions or self._source.partitions
        if len(order) > 1:
            first = turn % len(order)
            order = order[first:] + order[:first]
        for number in order:
            room = self.limit - len(self.found)
            if room <= 0:
                return
            window = windows.get(number)
            if window is None or positions[number] >= window.end:
                continue
            if positions[number] < window.start:
                room -= self._take_page(number, room)
                if room <= 0:
                    return
            position = positions[number]
            if position < window.start:
                self._wants.add(number)
                continue
            if position >= window.end:
                continue
            found, positions[number] = window.find(wanted, position, room)
            self.found += found

    def _take_page(self, number: int, room: int) -> int:
        """Take of a page that is there what there is room for; returns how many alerts that were."""
        pages, position = self._source.pages, self._positions[number]
        page = self._asked.get(number) or pages.find(number, position, self.wanted)
        if page is None or page.answer is None:
            return 0
        self._asked.pop(number, None)
        self._failed.pop(number, None)
        taken = pages.take(page, self.waiter, room)
        self._positions[number] = taken.next_position
        self.found += taken.alerts
        return len(taken.alerts)

    # ------------------------------------------------------------ reads

    def start_reads(self) -> None:
        """Read on where the windows don't reach back to."""
        pages, asked = self._source.pages, self._asked
        for number in sorted(self._wants):
            page = asked.get(number)
            if page is not None and page.is_over and page.error is not None:
                self._failed[number] = page.error
            if page is None or page.is_over:
                asked[number] = pages.ask(
                    number, self._positions[number], self.wanted, self.limit, self.waiter
                )
        self._wants.clear()

    def is_lost(self) -> bool:
        """Whether some partition that it concerns is not followed here: another instance may know more."""
        is_lost = self._source.is_lost
        return any(is_lost(number) for number in self.wanted.partitions or self._source.partitions)

    def raise_if_stuck(self) -> None:
        """Say so where partitions can't be read that have to be, or are not followed.

        Raises:
            UnavailableError: they can't, or aren't.
        """
        if self.is_lost():
            raise UnavailableError("this instance has lost the leaders of some partitions")
        failed = dict(self._failed)
        failed.update((number, page.error) for number, page in self._asked.items() if page.error is not None)
        for number, error in sorted(failed.items()):
            raise UnavailableError(
                f"alerts of partition {number} could not be read: {error.message}", code=error.code
            ) from error
