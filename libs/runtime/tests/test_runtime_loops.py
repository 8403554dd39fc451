"""Clocks, randomness and running a loop."""

import asyncio
import os
import signal

import pytest
import uvloop

from tallymark_runtime.clock import ManualClock, RealClock, SteadyClock
from tallymark_runtime.loops import new_event_loop, run
from tallymark_runtime.randomness import new_random


@pytest.mark.parametrize("clock", [RealClock(), ManualClock()])
def test_clocks_give_nanoseconds_that_do_not_go_back(clock):
    """Both twins keep the port's contract."""
    readings = [clock.monotonic_ns() for _ in range(100)]
    assert readings == sorted(readings)
    assert all(type(reading) is int for reading in readings)
    assert clock.now_ns() > 1_600_000_000 * 10**9


def test_the_manual_clock_moves_only_when_told():
    """Both of its clocks move together, and the wall can jump alone."""
    clock = ManualClock(wall_ns=100, monotonic_ns=5)
    clock.advance(10)
    assert (clock.now_ns(), clock.monotonic_ns()) == (110, 15)
    clock.wall_ns = 50
    assert (clock.now_ns(), clock.monotonic_ns()) == (50, 15)


def test_two_generators_differ():
    """Each is seeded anew."""
    assert new_random().getrandbits(128) != new_random().getrandbits(128)


def test_loops_are_uvloops():
    """Where it is installed, as it is with every server."""
    loop = new_event_loop()
    loop.close()
    assert isinstance(loop, uvloop.Loop)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_main_to_stop(number):
    """Its result is what run returns, and the handlers are gone afterwards."""
    before = signal.getsignal(number)

    async def main(stop):
        os.kill(os.getpid(), number)
        await stop.wait()
        return "stopped"

    assert run(main) == "stopped"
    assert signal.getsignal(number) in (before, signal.SIG_DFL, signal.default_int_handler)
    signal.signal(number, before)


def test_a_second_signal_cancels_main():
    """For whoever can't wait."""

    async def main(stop):
        os.kill(os.getpid(), signal.SIGTERM)
        await stop.wait()
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.Event().wait()

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(asyncio.CancelledError):
        run(main)
    signal.signal(signal.SIGTERM, before)


def test_a_steady_clock_follows_slews_and_ignores_jumps() -> None:
    """Within ten seconds of the boot clock it is the wall clock; beyond, it goes on from where it was."""
    behind = ManualClock()
    reports: list[str] = []
    clock = SteadyClock(behind, reports.append)
    start = clock.now_ns()
    behind.advance(5 * 10**9)
    behind.wall_ns += 9 * 10**9  # a slew, or a correction that small
    assert clock.now_ns() == start + 14 * 10**9
    behind.wall_ns += 20 * 60 * 10**9
    behind.advance(10**9)
    assert clock.now_ns() == start + 15 * 10**9
    behind.advance(10**9)
    assert clock.now_ns() == start + 16 * 10**9
    assert len(reports) == 1
    assert "+1200.0 s" in reports[0]
    behind.wall_ns -= 20 * 60 * 10**9
    assert clock.now_ns() == start + 16 * 10**9
    behind.wall_ns -= 36 * 86_400 * 10**9
    behind.advance(10**9)
    assert clock.now_ns() == start + 17 * 10**9
    assert len(reports) == 2
