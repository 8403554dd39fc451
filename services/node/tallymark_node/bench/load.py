"""Closed loops of callers, and the times of their calls."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import msgspec

WARM_SECONDS = 1.0  # not counted


class Load(msgspec.Struct):
    """What a load did."""

    calls: int
    events: int
    seconds: float
    p50_ms: float
    p99_ms: float

    @property
    def events_per_second(self) -> float:
        """The rate of events."""
        return self.events / self.seconds

    @property
    def calls_per_second(self) -> float:
        """The rate of calls."""
        return self.calls / self.seconds


def percentile(sorted_values: list[float], share: float) -> float:
    """The value below which a share of the values lies; 0 for none."""
    if not sorted_values:
        return 0.0
    return sorted_values[min(len(sorted_values) - 1, int(share * len(sorted_values)))]


async def closed_loop(
    call: Callable[[int], Awaitable[int]], *, callers: int, seconds: float, warm_seconds: float = WARM_SECONDS
) -> Load:
    """Let `callers` call `call(number)`, each again as soon as it has its answer, for `seconds`.

    `call` returns how many events it stored. What begins in the first `warm_seconds` is not counted.
    """
    clock = time.perf_counter
    counted_from = clock() + warm_seconds
    until = counted_from + seconds
    times: list[float] = []
    events = 0
    number = 0
    last = counted_from

    async def caller() -> None:
        nonlocal events, number, last
        while True:
            begun = clock()
            if begun >= until:
                return
            number += 1
            stored = await call(number)
            ended = clock()
            if begun >= counted_from:
                times.append(ended - begun)
                events += stored
                last = max(last, ended)

    await asyncio.gather(*(caller() for _ in range(callers)))
    times.sort()
    return Load(
        calls=len(times),
        events=events,
        seconds=max(last - counted_from, 1e-9),
        p50_ms=percentile(times, 0.50) * 1e3,
        p99_ms=percentile(times, 0.99) * 1e3,
    )
