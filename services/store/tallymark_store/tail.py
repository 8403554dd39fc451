"""The tail of the alert records: new ones for whoever asked for them, as soon as the fold has written them.

Owns the calls that are held until there is something to answer. A held call is looked at again only when a partition
that it names has more records than it has seen, or is not led here any more; nothing polls, and the fold pays for it
only where such a call watches a partition, once a record of the log.

What is answered is committed, because nothing else is folded: at a leader that is deposed and doesn't know it, too.
It may only be too little, and then whoever asks goes on at the new leader from the position it has reached.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable
from typing import Final

from tallymark_protocol import limits
from tallymark_protocol.errors import (
    BackpressureError,
    ErrorCode,
    InvalidRequestError,
    TallymarkError,
    UnavailableError,
    WireError,
    to_wire,
)
from tallymark_protocol.messages import StoreTail, TailPart, TailResult
from tallymark_store.partition import Partition

HELD_MAX: Final = 64  # calls: one from each instance of the alerts role, and those they have given up


class _Held:
    """A call that waits.

    Attributes:
        positions: by partition, from where on it wants records.
        news: done once it is to be looked at again.
        is_over: whether its caller has asked anew.
    """

    __slots__ = ("is_over", "news", "positions")

    def __init__(self, positions: dict[int, int], news: asyncio.Future[None]) -> None:
        self.positions = positions
        self.news = news
        self.is_over = False

    def wake(self) -> None:
        """Have it looked at."""
        if not self.news.done():
            self.news.set_result(None)


class Tail:
    """Answers `StoreTail` for one store. Use it on one event loop; close it at the end.

    Args:
        serving: gives a partition that this store leads, or raises what tells why it doesn't.
        fold_soon: has what is committed of a partition folded at once.

    Attributes:
        held_count: calls that wait.
    """

    def __init__(self, serving: Callable[[int], Partition], fold_soon: Callable[[int], None]) -> None:
        self.held_count = 0
        self._serving = serving
        self._fold_soon = fold_soon
        self._watching: dict[int, dict[_Held, None]] = {}  # by partition, in the order in which they came
        self._by_caller: dict[Hashable, _Held] = {}
        self._turn = 0  # with which of its partitions the next answer begins
        self._is_closed = False

    # ------------------------------------------------------------ news

    def awaits(self, partition: Partition) -> bool:
        """Whether a held call names a partition in whose committed records an alert can be."""
        return bool(self._watching.get(partition.partition)) and partition.may_alert

    def folded(self, partition: Partition) -> None:
        """A record of the partition was folded."""
        watching = self._watching.get(partition.partition)
        if watching:
            count = partition.fold.alert_count
            for held in watching:
                if count > held.positions[partition.partition]:
                    held.wake()

    def changed(self, number: int) -> None:
        """A leadership, or a copy, has ended here."""
        for held in self._watching.get(number, ()):
            held.wake()

    def close(self) -> None:
        """End what is held, and take nothing more."""
        self._is_closed = True
        for number in self._watching:
            self.changed(number)

    # ------------------------------------------------------------ calls

    async def answer(self, call: StoreTail, caller: Hashable = None) -> TailResult:
        """Answer as soon as there is a record to give or a partition to refuse, or the wait is over.

        A caller, where it is known who that is, has one call at a time: the next one ends the one before.

        Raises:
            InvalidRequestError: a limit, wait or position that makes no sense.
            BackpressureError: too many calls are held.
            UnavailableError: the store is stopping.
        """
        _check(call)
        before = None if caller is None else self._by_caller.get(caller)
        if before is not None:
            before.is_over = True
            before.wake()
        result = self._look(call)
        if result.parts or result.refused or not call.wait_ms or not call.positions:
            return result
        if self.held_count >= HELD_MAX:
            raise BackpressureError("too many calls wait for alert records")
        loop = asyncio.get_running_loop()
        held = _Held(call.positions, loop.create_future())
        self._hold(held, caller)
        try:
            async with asyncio.timeout(call.wait_ms / 1000):
                while not (result.parts or result.refused or held.is_over):
                    await held.news
                    held.news = loop.create_future()
                    if not held.is_over:
                        result = self._look(call)
        except TimeoutError:
            pass
        finally:
            self._let_go(held, caller)
        return result

    def _hold(self, held: _Held, caller: Hashable) -> None:
        self.held_count += 1
        for number in held.positions:
            self._watching.setdefault(number, {})[held] = None
        if caller is not None:
            self._by_caller[caller] = held

    def _let_go(self, held: _Held, caller: Hashable) -> None:
        self.held_count -= 1
        for number in held.positions:
            watching = self._watching[number]
            del watching[held]
            if not watching:
                del self._watching[number]
        if caller is not None and self._by_caller.get(caller) is held:
            del self._by_caller[caller]

    def _look(self, call: StoreTail) -> TailResult:
        """What there is to answer now."""
        if self._is_closed:
            raise UnavailableError("the store is stopping", code=ErrorCode.CLOSED)
        refused: dict[int, WireError] = {}
        led: list[
            tuple[Partition, int, int]
        ] = []  # with where to begin, and how many records there are from there on
        for number, position in call.positions.items():
            try:
                partition = self._serving(number)
            except TallymarkError as error:
                refused[number] = to_wire(error)
                continue
            if partition.may_alert:  # it was committed while nobody watched
                self._fold_soon(number)
            count = partition.fold.alert_count - position
            if count > 0:
                led.append((partition, position, count))
        if not led:
            return TailResult([], refused)
        self._turn += 1
        first = self._turn % len(led)
        led = led[first:] + led[:first]
        shares = share_out([count for _, _, count in led], call.limit)
        parts = []
        for (partition, position, _), share in zip(led, shares, strict=True):
            if share:
                fold = partition.fold
                alerts = fold.alerts_at(range(position, position + share))
                parts.append(TailPart(partition.partition, alerts, fold.alert_count))
        return TailResult(parts, refused)


def share_out(counts: list[int], limit: int) -> list[int]:
    """Shares of a limit for those who have so many, as even as can be; the first ones get what can't be divided.

    They sum to the limit, or to all that there is; each is at most its count.
    """
    shares = [0] * len(counts)
    left = limit
    open_ends = [k for k, count in enumerate(counts) if count]
    while left and open_ends:
        each = left // len(open_ends)
        for k in open_ends if each else open_ends[:left]:
            share = min(max(each, 1), counts[k] - shares[k])
            shares[k] += share
            left -= share
        open_ends = [k for k in open_ends if shares[k] < counts[k]]
    return shares


def _check(call: StoreTail) -> None:
    if not 1 <= call.limit <= limits.PAGE_EVENTS_MAX:
        raise InvalidRequestError(f"limit must be 1 to {limits.PAGE_EVENTS_MAX}, not {call.limit}")
    if not 0 <= call.wait_ms <= limits.ALERTS_WAIT_MS_MAX:
        raise InvalidRequestError(f"wait_ms must be 0 to {limits.ALERTS_WAIT_MS_MAX}, not {call.wait_ms}")
    if len(call.positions) > limits.PARTITIONS_MAX:
        raise InvalidRequestError(f"positions names more than {limits.PARTITIONS_MAX} partitions")
    for partition, position in call.positions.items():
        if position < 0:
            raise InvalidRequestError(f"there is no position {position} in partition {partition}")
