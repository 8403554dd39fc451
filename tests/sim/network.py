"""The network: one-way links that lose, delay, double and reorder what is sent, and can be cut one by one.

A link is an ordered pair of names. Bytes between stores are datagrams as far as anybody may rely on it. Requests of
clients and to the coordinator are only lost where a link is cut: what a lost connection does to them, a retry under
the same identity, their senders do of themselves.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from .loop import MILLISECOND, World
from .trace import Trace


class Weather:
    """How a network behaves; probabilities are of a single message."""

    def __init__(
        self,
        *,
        loss: float = 0.0,
        doubled: float = 0.0,
        slow: float = 0.0,
        delay_ns: tuple[int, int] = (MILLISECOND // 10, MILLISECOND),
        slow_ns: tuple[int, int] = (5 * MILLISECOND, 400 * MILLISECOND),
    ) -> None:
        self.loss = loss
        self.doubled = doubled
        self.slow = slow
        self.delay_ns = delay_ns
        self.slow_ns = slow_ns


class Network:
    """All links. `weather` may be replaced at any time."""

    def __init__(self, world: World, rng: random.Random, trace: Trace) -> None:
        self.weather = Weather()
        self.sent = 0
        self.lost = 0
        self._world = world
        self._rng = rng
        self._trace = trace
        self._cut: set[tuple[str, str]] = set()

    def cut(self, source: str, target: str) -> None:
        """Let nothing through from one to the other, what is on its way included."""
        self._cut.add((source, target))

    def mend(self, source: str, target: str) -> None:
        """Take back `cut`."""
        self._cut.discard((source, target))

    def mend_all(self) -> None:
        """Take back every cut."""
        self._cut.clear()

    def is_open(self, source: str, target: str) -> bool:
        """Whether the link is not cut."""
        return (source, target) not in self._cut

    def delay_ns(self) -> int:
        """How long a message takes."""
        weather, rng = self.weather, self._rng
        low, high = weather.slow_ns if weather.slow and rng.random() < weather.slow else weather.delay_ns
        return low + int(rng.random() * (high - low))

    def send(
        self, source: str, target: str, deliver: Callable[..., object], *args: Any, is_datagram: bool = True
    ) -> None:
        """Have `deliver(*args)` called when the message arrives, if it does.

        Datagrams may be lost and doubled one by one, everything else only where a link is cut.
        """
        self.sent += 1
        weather = self.weather
        if not self.is_open(source, target) or (
            is_datagram and weather.loss and self._rng.random() < weather.loss
        ):
            self.lost += 1
            return
        self._world.after(self.delay_ns(), self._arrive, source, target, deliver, args)
        if is_datagram and weather.doubled and self._rng.random() < weather.doubled:
            self._world.after(self.delay_ns(), self._arrive, source, target, deliver, args)

    def _arrive(
        self, source: str, target: str, deliver: Callable[..., object], args: tuple[Any, ...]
    ) -> None:
        if self.is_open(source, target):
            deliver(*args)
        else:
            self.lost += 1
