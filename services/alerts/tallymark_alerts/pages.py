"""Pages of alerts that are older than the windows, read from their partitions' leaders.

Owns the reads: a few of a partition at one time, the others in line. A page is known by its partition, the position at
which it begins and the filter; readers that want the same share it. It belongs to no call: under load a reader is
answered with alerts of other partitions before its page is there, and comes again. So what nobody waits for any more is
kept for a while, a place in line too, and found by the reader's next call. That is bounded; what was left longest ago
goes first.

Where a partition's leader has given no word for long, nobody stands in line: who would is told at once.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Final, Protocol

from tallymark_alerts.counters import AlertsCounters
from tallymark_alerts.matching import Filter
from tallymark_alerts.stores import Stores
from tallymark_protocol.errors import TallymarkError, UnavailableError
from tallymark_protocol.identifiers import partition_of
from tallymark_protocol.messages import AlertsResult, StoreAlerts
from tallymark_runtime.instruments import count_in

PAGE_RECORDS: Final = 1_000  # read from a store at once
READS_MAX: Final = 2  # of one partition, at one time: one that can't be read must not hold up the others
READ_S: Final = 5.0  # for one of them
READ_AGAIN_S: Final = 0.25  # after one that failed
LINE_AGAIN_S: Final = 1.0  # after a line was broken up
KEPT_S: Final = 60.0  # what nobody waits for: a slow reader comes again in that time
KEPT_WEIGHT_MAX: Final = 500_000  # of all that nobody waits for: a name in a filter weighs 1
RECORD_WEIGHT: Final = 8  # what a record takes, in names


class Waking(Protocol):
    """Who waits for a page."""

    def wake(self) -> None:
        """Have it look again."""
        ...


class Page:
    """One page, from the moment at which somebody wants it.

    Attributes:
        number: its partition.
        position: where it begins.
        answer: what was read; None before that.
        error: why it could not be read; it is over soon, and may be asked for anew then.
        is_over: nothing comes of it any more.
        read: the read that is under way; None before and after.
        waiters: who is to be told.
    """

    __slots__ = (
        "answer",
        "error",
        "is_over",
        "limit",
        "number",
        "position",
        "read",
        "timer",
        "waiters",
        "wanted",
        "weight",
    )

    def __init__(self, number: int, position: int, wanted: Filter, limit: int) -> None:
        self.answer: AlertsResult | None = None
        self.error: TallymarkError | None = None
        self.is_over = False
        self.limit = limit
        self.number = number
        self.position = position
        self.read: asyncio.Task[None] | None = None
        self.timer: asyncio.TimerHandle | None = None  # ends what has failed, and what nobody waits for
        self.waiters: dict[Waking, None] = {}
        self.wanted = wanted
        self.weight = 0  # as counted among those that nobody waits for

    @property
    def is_under_way(self) -> bool:
        """Whether it is being read: it comes or fails in time."""
        return self.read is not None and self.answer is None

    @property
    def key(self) -> tuple[int, int, Any]:
        """What it is known by. Not the limit: a reader may come again with another one."""
        return self.number, self.position, self.wanted.key


class Pages:
    """See the module. Close it at the end.

    Args:
        stores: whom to ask.
        partition_count: of the cluster.
        counters: of the instance.
        is_lost: whether a partition's leader has given no word for long.
        kept_weight_max: of all pages that nobody waits for.
    """

    def __init__(
        self,
        stores: Stores,
        *,
        partition_count: int,
        counters: AlertsCounters,
        is_lost: Callable[[int], bool],
        kept_weight_max: int = KEPT_WEIGHT_MAX,
    ) -> None:
        self._stores = stores
        self._partition_count = partition_count
        self._counters = counters
        self._is_lost = is_lost
        self._kept_weight_max = kept_weight_max
        self._loop = asyncio.get_running_loop()
        self._pages: dict[tuple[int, int, Any], Page] = {}  # by key; none that is over
        self._lines: list[dict[Page, None]] = [{} for _ in range(partition_count)]  # wait for their read
        self._read_counts = [0] * partition_count  # reads under way
        self._kept: OrderedDict[Page, None] = OrderedDict()  # nobody waits for them, the longest left first
        self._kept_weight = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_closed = False

    def __len__(self) -> int:
        """How many there are: kept, failed a moment ago, in line, and under way."""
        return len(self._pages)

    async def close(self) -> None:
        """Stop reading, and forget everything."""
        self._is_closed = True
        tasks = list(self._tasks)
        for page in list(self._pages.values()):
            self._end(page)
        await asyncio.gather(*tasks, return_exceptions=True)

    # ------------------------------------------------------------ for readers

    def find(self, number: int, position: int, wanted: Filter) -> Page | None:
        """A page that somebody asked for before."""
        return self._pages.get((number, position, wanted.key)) if self._pages else None

    def ask(self, number: int, position: int, wanted: Filter, limit: int, waiter: Waking) -> Page:
        """Have a page read, unless it is there already, and tell somebody when it comes or fails; then `leave` it."""
        page = self.find(number, position, wanted)
        if page is None:
            page = Page(number, position, wanted, min(limit, PAGE_RECORDS))
            self._pages[page.key] = page
            page.waiters[waiter] = None
            self._lines[number][page] = None
            self._go_on(number)
        else:
            self._use(page)
            page.waiters[waiter] = None
        return page

    def leave(self, page: Page, waiter: Waking) -> None:
        """Somebody waits for it no more, but may come again."""
        page.waiters.pop(waiter, None)
        if not page.waiters and not page.is_over and page.error is None:
            self._keep(page)

    def take(self, page: Page, waiter: Waking, count: int) -> AlertsResult:
        """What somebody takes of a page that is there: the first `count` alerts at most; the others are kept.

        Where it goes on is in the result.
        """
        answer = page.answer
        assert answer is not None, "it was read"
        page.waiters.pop(waiter, None)
        if not page.waiters:
            self._end(page)
        if count >= len(answer.alerts):
            return answer
        assert count > 0, "something is taken"
        taken = answer.alerts[:count]
        position = taken[-1].position + 1
        if self.find(page.number, position, page.wanted) is None:
            rest = Page(page.number, position, page.wanted, page.limit)
            rest.answer = AlertsResult(answer.alerts[count:], answer.next_position, more=answer.more)
            self._pages[rest.key] = rest
            self._keep(rest)
        return AlertsResult(taken, position, more=True)

    # ------------------------------------------------------------ what is kept

    def _keep(self, page: Page) -> None:
        """Nobody waits for it."""
        page.timer = self._loop.call_later(KEPT_S, self._end, page)
        self._kept[page] = None
        self._weigh(page)

    def _weigh(self, page: Page) -> None:
        """Count what a page takes that nobody waits for, and let go of others where that is too much."""
        records = len(page.answer.alerts) if page.answer is not None else 0
        weight = 1 + page.wanted.name_count + RECORD_WEIGHT * records
        self._kept_weight += weight - page.weight
        page.weight = weight
        while self._kept_weight > self._kept_weight_max:
            self._end(next(iter(self._kept)))

    def _use(self, page: Page) -> None:
        """It is wanted again, or is over."""
        if page in self._kept:
            del self._kept[page]
            self._kept_weight -= page.weight
            page.weight = 0
            if page.timer is not None:
                page.timer.cancel()
                page.timer = None

    def _end(self, page: Page) -> None:
        """It is over; who waits for it looks again."""
        if page.is_over:
            return
        self._use(page)
        if page.timer is not None:
            page.timer.cancel()
        page.is_over = True
        del self._pages[page.key]
        self._lines[page.number].pop(page, None)
        if page.read is not None:
            page.read.cancel()
        self._wake(page)

    def _wake(self, page: Page) -> None:
        for waiter in page.waiters:
            waiter.wake()

    # ------------------------------------------------------------ reads

    def _go_on(self, number: int) -> None:
        """Begin reads of a partition, as many as may be."""
        line = self._lines[number]
        while line and self._read_counts[number] < READS_MAX and not self._is_closed:
            page = next(iter(line))
            del line[page]
            self._read_counts[number] += 1
            page.read = self._loop.create_task(self._read(page))
            self._tasks.add(page.read)
            page.read.add_done_callback(self._read_done(page))
        if line and self._is_lost(number):
            error = UnavailableError(f"this instance has lost the leader of partition {number}")
            for page in list(line):
                del line[page]
                self._fail(page, error, LINE_AGAIN_S)

    def _read_done(self, page: Page) -> Callable[[asyncio.Task[None]], None]:
        def done(task: asyncio.Task[None]) -> None:
            # Here and not in the task: one that is cancelled before it begins never runs.
            page.read = None
            self._tasks.discard(task)
            self._read_counts[page.number] -= 1
            if not task.cancelled() and (error := task.exception()) is not None:
                if not isinstance(error, TallymarkError):
                    error = UnavailableError(f"{type(error).__name__}: {error}")
                count_in(self._counters.catch_up_failures, int(error.code))
                self._fail(page, error, READ_AGAIN_S)
            elif page.answer is None:
                self._end(page)
            self._go_on(page.number)

        return done

    async def _read(self, page: Page) -> None:
        number = page.number
        accounts = [
            account
            for account in page.wanted.accounts
            if partition_of(account, self._partition_count) == number
        ]
        question = StoreAlerts(
            number,
            from_position=page.position,
            limit=page.limit,
            account_ids=sorted(accounts),
            metric_codes=sorted(page.wanted.metrics),
        )
        answer = await self._stores.read(question, self._loop.time() + READ_S)
        self._counters.catch_up_reads += 1
        if answer.next_position <= page.position:
            raise UnavailableError(f"partition {number} ends before position {page.position}")
        page.answer = answer
        if page in self._kept:
            self._weigh(page)
        self._wake(page)

    def _fail(self, page: Page, error: TallymarkError, rest_s: float) -> None:
        """It can't be read; for a moment it is not tried again."""
        if page.is_over:
            return
        self._use(page)
        page.error = error
        page.timer = self._loop.call_later(rest_s, self._end, page)
        self._wake(page)
