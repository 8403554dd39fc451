"""The clock port: wall time for stamping, boot time for deadlines.

Owns the only calls of the project that read a clock. `RealClock` reads the machine's; `ManualClock` is its twin
that moves only when told to.

Deadlines of leases count on CLOCK_BOOTTIME, which goes on while the machine is suspended: on CLOCK_MONOTONIC a
machine that slept would believe in a lease that has long run out.
"""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """What tells the time."""

    def now_ns(self) -> int:
        """Wall time: nanoseconds since the Unix epoch. It may jump, also backwards."""
        ...

    def monotonic_ns(self) -> int:
        """Nanoseconds since some start: never decreases, and counts time asleep."""
        ...


class RealClock:
    """The machine's clocks."""

    __slots__ = ()

    def now_ns(self) -> int:
        """Wall time in nanoseconds since the Unix epoch."""
        return time.time_ns()

    def monotonic_ns(self) -> int:
        """CLOCK_BOOTTIME in nanoseconds."""
        return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


class ManualClock:
    """A clock that stands still until it is moved.

    Attributes:
        wall_ns: what `now_ns` gives; set it to make the wall clock jump.
    """

    __slots__ = ("_monotonic_ns", "wall_ns")

    def __init__(self, wall_ns: int = 1_700_000_000_000_000_000, monotonic_ns: int = 0) -> None:
        self.wall_ns = wall_ns
        self._monotonic_ns = monotonic_ns

    def now_ns(self) -> int:
        """Wall time in nanoseconds since the Unix epoch."""
        return self.wall_ns

    def monotonic_ns(self) -> int:
        """Nanoseconds moved so far, plus where it started."""
        return self._monotonic_ns

    def advance(self, ns: int) -> None:
        """Move both clocks on by `ns`."""
        assert ns >= 0, "time does not go back; set wall_ns to make the wall clock jump"
        self.wall_ns += ns
        self._monotonic_ns += ns
