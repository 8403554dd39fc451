"""A process's clocks, which go a little fast or slow; the wall clock can be set."""

from __future__ import annotations

from .loop import World

EPOCH_NS = 1_710_000_000 * 10**9  # wall time at the start of a simulation


class SimClock:
    """The clock port on virtual time.

    Args:
        world: the scheduler.
        drift_ppm: by how many millionths both clocks go fast.
        offset_ns: by how much the wall clock is ahead.
    """

    def __init__(self, world: World, *, drift_ppm: int = 0, offset_ns: int = 0) -> None:
        self._world = world
        self.drift_ppm = drift_ppm
        self.offset_ns = offset_ns

    def now_ns(self) -> int:
        """Wall time."""
        return EPOCH_NS + self.monotonic_ns() + self.offset_ns

    def monotonic_ns(self) -> int:
        """Time since the simulation began, as this clock has it."""
        now = self._world.now_ns
        return now + now * self.drift_ppm // 1_000_000

    def due_ns(self, monotonic_ns: int) -> int:
        """When this clock will read a time, in the world's time; never early."""
        return -(-monotonic_ns * 1_000_000 // (1_000_000 + self.drift_ppm))

    def jump(self, by_ns: int) -> None:
        """Set the wall clock."""
        self.offset_ns += by_ns
