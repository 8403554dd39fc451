"""The clock port: wall time for stamping, boot time for deadlines.

Owns the only calls of the project that read a clock. `RealClock` reads the machine's; `SteadyClock` shields servers
from its jumps; `ManualClock` is a twin that moves only when told to.

Deadlines of leases count on CLOCK_BOOTTIME, which goes on while the machine is suspended: on CLOCK_MONOTONIC a
machine that slept would believe in a lease that has long run out.
"""

from __future__ import annotations

import time
from collections.abc import Callable
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


class SteadyClock:
    """Wall time that does not jump: what servers stamp events and judge repeats by.

    It follows the wall clock as long as that keeps step with CLOCK_BOOTTIME, slewing included. Once the two part by
    more than `STEP_NS`, somebody has set the wall clock, and what it says cannot be told from a mistake: this clock
    then goes on from where it was, at the pace of CLOCK_BOOTTIME, until the wall clock comes back or the process is
    started again. Log time never decreases, so a false hour, once stamped, could not be taken back.

    Args:
        clock: the clock behind it.
        report: told once of each parting, in a sentence.
    """

    STEP_NS = 10_000_000_000

    def __init__(self, clock: Clock, report: Callable[[str], None] = lambda _: None) -> None:
        self._clock = clock
        self._report = report
        self._wall_ns = clock.now_ns()  # what was told last ...
        self._boot_ns = clock.monotonic_ns()  # ... and when
        self._parted = False

    def now_ns(self) -> int:
        """Wall time in nanoseconds since the Unix epoch, without its jumps."""
        wall_ns = self._clock.now_ns()
        boot_ns = self._clock.monotonic_ns()
        expected_ns = self._wall_ns + boot_ns - self._boot_ns
        parted = abs(wall_ns - expected_ns) > self.STEP_NS
        if parted and not self._parted:
            self._report(
                f"the machine's clock jumped by {(wall_ns - expected_ns) / 1e9:+.1f} s; time goes on as before until "
                f"it is set back or the process is started again"
            )
        self._parted = parted
        self._wall_ns = expected_ns if parted else wall_ns
        self._boot_ns = boot_ns
        return self._wall_ns

    def monotonic_ns(self) -> int:
        """CLOCK_BOOTTIME in nanoseconds."""
        return self._clock.monotonic_ns()


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
