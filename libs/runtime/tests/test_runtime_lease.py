"""The lease: until when it is relied upon, and who renews it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from tallymark_protocol.errors import NotFoundError, UnavailableError
from tallymark_runtime.clock import ManualClock, RealClock
from tallymark_runtime.lease import LeaseKeeper, LeaseThread, deadline_of, renew

SECOND = 10**9


class Grantor:
    """A coordinator that only knows leases; time passes while it answers."""

    def __init__(self, clock: ManualClock | None = None, takes_ns: int = 0) -> None:
        self.clock = clock
        self.takes_ns = takes_ns
        self.renewals = 0
        self.fault: Exception | None = None
        self.is_closed = False

    def _answer(self) -> None:
        if self.clock is not None:
            self.clock.advance(self.takes_ns)
        if self.fault is not None:
            raise self.fault

    async def lease_grant(self, ttl_s: float) -> int:
        self._answer()
        return 7

    async def lease_keepalive(self, lease: int) -> float:
        self.renewals += 1
        self._answer()
        return 2.0

    async def close(self) -> None:
        self.is_closed = True


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - threads and sockets set no event
            await asyncio.sleep(0.002)


async def test_a_deadline_counts_from_when_the_request_was_sent() -> None:
    """Less a tenth; however long the answer took."""
    clock = ManualClock()
    keeper = LeaseKeeper(Grantor(clock, SECOND), clock, 2.0)  # type: ignore[arg-type]
    await keeper.grant()
    assert clock.monotonic_ns() == SECOND
    assert keeper.deadline_ns == 18 * SECOND // 10
    assert keeper.is_valid
    clock.advance(8 * SECOND // 10)
    assert not keeper.is_valid


async def test_a_renewal_counts_likewise() -> None:
    """One that failed moves nothing; one that says the lease is gone says so."""
    clock = ManualClock()
    grantor: Any = Grantor(clock, SECOND)
    assert await renew(grantor, clock, 7, 2.0) == deadline_of(0, 2.0)
    grantor.fault = UnavailableError("away")
    assert await renew(grantor, clock, 7, 2.0) == 0
    grantor.fault = NotFoundError("gone")
    assert await renew(grantor, clock, 7, 2.0) is None


async def test_a_coordinator_that_is_silent_is_no_renewal() -> None:
    """It is waited for a part of the lease only."""

    class Silent(Grantor):
        async def lease_keepalive(self, lease: int) -> float:
            await asyncio.Event().wait()
            raise AssertionError

    assert await renew(Silent(), ManualClock(), 7, 0.04) == 0  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [(NotFoundError("gone"), "run out at the coordinator"), (UnavailableError("away"), "not be renewed")],
)
async def test_a_lease_ends_when_it_is_gone_or_overdue(fault: Exception, reason: str) -> None:
    """And is no lease from then on."""
    clock = RealClock()
    grantor: Any = Grantor()
    keeper = LeaseKeeper(grantor, clock, 0.08)
    await keeper.grant()
    kept = asyncio.ensure_future(keeper.keep())
    await until(lambda: grantor.renewals >= 2)
    assert keeper.lease == 7
    grantor.fault = fault
    async with asyncio.timeout(20):
        assert reason in await kept
    assert not keeper.is_valid


async def test_a_thread_renews_while_the_loop_ticks() -> None:
    """Over a connection of its own; a loop that hangs loses the lease."""
    made: list[Grantor] = []

    def connect() -> Any:
        made.append(Grantor())
        return made[-1]

    keeper = LeaseThread(Grantor(), connect, RealClock(), 0.1)  # type: ignore[arg-type]
    await keeper.grant()
    kept = asyncio.ensure_future(keeper.keep())
    await until(lambda: made and made[0].renewals >= 4)
    assert keeper.is_valid
    kept.cancel()
    await asyncio.gather(kept, return_exceptions=True)
    keeper.close()
    assert made[0].is_closed


async def test_a_thread_stops_renewing_for_a_loop_that_does_not_tick() -> None:
    """Half a lease of silence is enough; the lease then runs out, as if the process had died."""
    clock = ManualClock()
    grantor = Grantor()
    keeper = LeaseThread(grantor, lambda: grantor, clock, 0.04)  # type: ignore[arg-type, return-value]
    await keeper.grant()
    await until(lambda: grantor.renewals >= 2)  # time stands still: the loop has just ticked
    clock.advance(int(0.03 * SECOND))
    before = grantor.renewals + 1  # one may have been under way
    for _ in range(5):
        await asyncio.sleep(0.02)
    assert grantor.renewals <= before
    keeper.close()


async def test_a_thread_tells_that_the_lease_is_gone() -> None:
    """The loop hears of it at its next tick."""
    grantor = Grantor()
    keeper = LeaseThread(grantor, lambda: grantor, RealClock(), 0.1)  # type: ignore[arg-type, return-value]
    await keeper.grant()
    kept = asyncio.ensure_future(keeper.keep())
    await until(lambda: grantor.renewals >= 1)
    grantor.fault = NotFoundError("gone")
    async with asyncio.timeout(20):
        assert "run out" in await kept
    keeper.close()
