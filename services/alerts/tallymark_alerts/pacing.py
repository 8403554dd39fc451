"""How fast answers go out under load: pure.

Every answer costs the same, however many alerts it carries. So when more are due in a second than the rate, further
ones wait for their turn, and carry more by then. Below the rate nothing waits.
"""

from __future__ import annotations


class Pacer:
    """A bucket of `burst` answers that fills at `rate` a second.

    Args:
        rate: answers a second.
        burst: answers that may go out at once.
        now: seconds, by any clock that goes on from there.
    """

    __slots__ = ("_burst", "_filled", "_level", "_rate")

    def __init__(self, rate: float, burst: float, now: float) -> None:
        assert rate > 0, "something goes out"
        assert burst >= 1, "an answer fits into the bucket"
        self._rate = rate
        self._burst = burst
        self._level = burst
        self._filled = now

    def take(self, now: float) -> bool:
        """Whether an answer may go out now; it counts as gone then."""
        self._level = min(self._level + max(now - self._filled, 0.0) * self._rate, self._burst)
        self._filled = now
        if self._level < 1:
            return False
        self._level -= 1
        return True

    def wait_s(self) -> float:
        """From the last `take` on: how long until one may go out."""
        return max(1 - self._level, 0.0) / self._rate
