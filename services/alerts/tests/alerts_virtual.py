"""Virtual time for tests that wait for hours: a loop that moves its clock to the next timer when nothing else is to do."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

BASE_NS = 1_700_000_000 * 10**9


class _Selector(selectors.SelectSelector):
    """Never waits: time moves instead."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(0)
        if not ready:
            if timeout is None:
                raise AssertionError("everybody waits, and nothing will ever happen")
            self.now += max(timeout, 0)
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop without I/O, in virtual time."""

    def __init__(self) -> None:
        self.virtual = _Selector()
        super().__init__(self.virtual)

    def time(self) -> float:
        return self.virtual.now


class LoopClock:
    """Both clocks follow the running loop's time."""

    def now_ns(self) -> int:
        return BASE_NS + self.monotonic_ns()

    def monotonic_ns(self) -> int:
        return int(asyncio.get_running_loop().time() * 1e9)


def run_virtual(main: Coroutine[Any, Any, T]) -> T:
    """Run something to its end in virtual time."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)
