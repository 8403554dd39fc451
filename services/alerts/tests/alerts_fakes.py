"""Stores that exist in memory only: partitions' records, who leads them, and what goes wrong with asking."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from tallymark_protocol.errors import ErrorCode, TallymarkError, UnavailableError, to_wire
from tallymark_protocol.messages import (
    AlertRecord,
    AlertsResult,
    StoreAlerts,
    StoreTail,
    TailPart,
    TailResult,
)


def record(partition: int, position: int, account: int = 1, metric: str = "m") -> AlertRecord:
    """An alert record that says where it lies."""
    one = (1).to_bytes(16, "little")
    offset = 10 * position
    return AlertRecord(
        id=f"{partition}-{offset}-0-5",
        account_id=account,
        metric_code=metric,
        threshold_code="t",
        threshold_value=1,
        period_start_ns=0,
        period_end_ns=10**18,
        value_at_cross=one,
        first_multiple=one,
        last_multiple=one,
        triggered_at_ns=1_000 + position,
        event_offset=offset,
        partition=partition,
        position=position,
    )


async def until(condition: Callable[[], Any], seconds: float = 60.0) -> Any:
    """Let virtual time pass until something is so."""
    async with asyncio.timeout(seconds):
        while not (found := condition()):  # noqa: ASYNC110 - time passes by that only
            await asyncio.sleep(0.001)
    return found


class FakeStores:
    """The port `Stores`. A held call is answered when `write`, `lead` or `release` make it so.

    Attributes:
        records: of every partition, as all copies have them.
        leaders: the address of each partition's leader, as the catalog tells it; None where there is none.
        failing: by address: what calls to it raise.
        unreadable: by partition: what reads of it raise.
        mangle: changes the answers of tails.
        tails: every tail call: (address, call).
        reads: every read.
        doubts: how often leaders were asked for again.
    """

    def __init__(self, partition_count: int, address: str = "s0") -> None:
        self.on_news: Callable[[int], None] = lambda _: None
        self.records: dict[int, list[AlertRecord]] = {number: [] for number in range(partition_count)}
        self.leaders: dict[int, str | None] = dict.fromkeys(range(partition_count), address)
        self.deposed: set[tuple[int, str]] = set()  # leaders by the catalog that refuse the partition
        self.failing: dict[str, TallymarkError] = {}
        self.unreadable: dict[int, TallymarkError] = {}
        self.mangle: Callable[[TailResult], TailResult] = lambda result: result
        self.tails: list[tuple[str, StoreTail]] = []
        self.reads: list[StoreAlerts] = []
        self.doubts = 0
        self.held: dict[str, int] = {}  # calls that are held, by address
        self.held_most = 0  # at one address at one time
        self.tail_max = 1_000  # records of a partition in one answer
        self.delay_s = 0.0  # before a tail call looks
        self.gate = asyncio.Event()  # reads wait for it
        self.gate.set()
        self._news = asyncio.Event()

    # ------------------------------------------------------------ what tests do

    def write(self, partition: int, count: int = 1, *, account: int = 1, metric: str = "m") -> None:
        """The partition has more records."""
        records = self.records[partition]
        for _ in range(count):
            records.append(record(partition, len(records), account, metric))
        self.wake()

    def lead(self, partition: int, address: str | None) -> None:
        """It has another leader; everybody hears of it."""
        self.leaders[partition] = address
        self.wake()
        self.on_news(partition)

    def wake(self) -> None:
        """Have held calls look again."""
        self._news.set()
        self._news = asyncio.Event()

    # ------------------------------------------------------------ the port

    def leader(self, partition: int) -> str | None:
        return self.leaders[partition]

    def doubt(self) -> None:
        self.doubts += 1

    async def tail(self, address: str, call: StoreTail, timeout_s: float) -> TailResult:
        self.tails.append((address, call))
        self.held[address] = self.held.get(address, 0) + 1
        self.held_most = max(self.held_most, self.held[address])
        try:
            async with asyncio.timeout(call.wait_ms / 1000):
                while True:
                    news = self._news
                    await asyncio.sleep(self.delay_s)
                    if address in self.failing:
                        raise self.failing[address]
                    result = self._look(address, call)
                    if result.parts or result.refused:
                        return self.mangle(result)
                    await news.wait()
        except TimeoutError:
            return TailResult([])
        finally:
            self.held[address] -= 1

    def _look(self, address: str, call: StoreTail) -> TailResult:
        parts, refused = [], {}
        for number, position in call.positions.items():
            if self.leaders[number] != address or (number, address) in self.deposed:
                refused[number] = to_wire(UnavailableError("not led here", code=ErrorCode.NOT_LEADER))
                continue
            found = self.records[number][position : position + self.tail_max]
            if found:
                parts.append(TailPart(number, found, len(self.records[number])))
        return TailResult(parts, refused)

    async def read(self, call: StoreAlerts, deadline: float) -> AlertsResult:
        self.reads.append(call)
        await asyncio.sleep(0)
        await self.gate.wait()
        if call.partition in self.unreadable:
            raise self.unreadable[call.partition]
        records = self.records[call.partition]
        if call.start_ns > 10**17:
            return AlertsResult([], max(len(records), call.from_position), more=False)
        found = [
            one
            for one in records[call.from_position :]
            if (not call.account_ids or one.account_id in call.account_ids)
            and (not call.metric_codes or one.metric_code in call.metric_codes)
        ][: call.limit]
        is_full = len(found) == call.limit
        position = found[-1].position + 1 if is_full else max(len(records), call.from_position)
        return AlertsResult(found, position, more=position < len(records))
