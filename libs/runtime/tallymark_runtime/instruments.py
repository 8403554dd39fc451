"""What hot paths count with: plain numbers that whoever is asked reads later.

Owns the one shape that telemetry needs beyond an `int`: a histogram that costs a binary search and two additions an
observation. Nothing here locks, allocates or knows who reads it: an instrument is written by one thread, and a reader
in another may see the newest observation in one of its numbers and not yet in the other.

Counters are plain `int` attributes of the objects that count. `telemetry` reads all of them when it is asked.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Final

_US: Final = 1_000
_MS: Final = 1_000_000
_S: Final = 1_000_000_000

# Upper ends of buckets, inclusive, in nanoseconds.
LATENCY_BOUNDS_NS: Final = (
    50 * _US,
    100 * _US,
    200 * _US,
    300 * _US,
    500 * _US,
    750 * _US,
    1 * _MS,
    2 * _MS,
    3 * _MS,
    5 * _MS,
    10 * _MS,
    20 * _MS,
    50 * _MS,
    100 * _MS,
    250 * _MS,
    500 * _MS,
    1 * _S,
    2 * _S,
    4 * _S,
    10 * _S,
    30 * _S,
)


class Histogram:
    """How many observations fell into each bucket, and their sum.

    Attributes:
        bounds: upper ends of the buckets, inclusive, ascending; one more bucket takes what is above.
        counts: observations by bucket, not cumulated; one longer than `bounds`.
        total: sum of all observations.
    """

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[int] = LATENCY_BOUNDS_NS) -> None:
        self.bounds = tuple(bounds)
        assert self.bounds, "a histogram has a bucket"
        assert all(low < high for low, high in zip(self.bounds, self.bounds[1:], strict=False)), "ascending"
        self.counts = [0] * (len(self.bounds) + 1)
        self.total = 0

    def observe(self, value: int) -> None:
        """Take one observation; the unit is that of the bounds."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    @property
    def count(self) -> int:
        """How many observations there were."""
        return sum(self.counts)


def count_in(counts: dict[int, int], key: int, n: int = 1) -> None:
    """Add `n` under a key, for paths that are rare. Keys are codes, but maybe a peer's: further ones go under -1."""
    if key not in counts and len(counts) >= _KEYS_MAX:
        key = -1
    counts[key] = counts.get(key, 0) + n


_KEYS_MAX: Final = 64
