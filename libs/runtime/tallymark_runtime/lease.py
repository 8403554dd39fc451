"""A node's lease at the coordinator: until when this node may believe that its keys are there.

Owns the deadline. It is counted from when the last successful renewal was *sent*, on CLOCK_BOOTTIME, less a tenth; so
it runs out here before it does at the coordinator, whatever became of the answer. `LeaseKeeper` renews from a task of
the loop; `LeaseThread` does so from a thread with a loop and a connection of its own, so that a busy loop does not
cost the leaderships, and stops as soon as that loop has not ticked for half a lease, so that a hung one does.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable

from tallymark_protocol.errors import NotFoundError, TallymarkError
from tallymark_runtime.clock import Clock
from tallymark_runtime.coordinator import Coordinator

_log = logging.getLogger(__name__)

_RENEWALS = 4  # attempts within one lease time, answers included
_JOIN_S = 1.0


class LeaseKeeper:
    """Renews one lease after another. Use it on the event loop.

    Attributes:
        lease: the one in force, 0 while there is none.
        deadline_ns: on the clock's monotonic time; nothing that relies on the lease may be said after it.
    """

    def __init__(self, coordinator: Coordinator, clock: Clock, ttl_s: float) -> None:
        self.lease = 0
        self.deadline_ns = 0
        self._coordinator = coordinator
        self._clock = clock
        self._ttl_s = ttl_s

    @property
    def is_valid(self) -> bool:
        """Whether the deadline has not passed."""
        return self.lease != 0 and self._clock.monotonic_ns() < self.deadline_ns

    async def grant(self) -> None:
        """Get a lease.

        Raises:
            UnavailableError: the coordinator cannot be reached.
        """
        sent_ns = self._clock.monotonic_ns()
        lease = await self._coordinator.lease_grant(self._ttl_s)
        self.deadline_ns = deadline_of(sent_ns, self._ttl_s)
        self.lease = lease
        self._begin(lease)

    async def keep(self) -> str:
        """Renew the lease until it is lost; return why. It is not `lease` any more then."""
        lease = self.lease
        try:
            return await self._keep(lease)
        finally:
            self.lease = 0
            self._end()

    async def _keep(self, lease: int) -> str:
        while True:
            await asyncio.sleep(self._ttl_s / _RENEWALS)
            found = await renew(self._coordinator, self._clock, lease, self._ttl_s)
            if found is None:
                return "it has run out at the coordinator"
            self.deadline_ns = max(self.deadline_ns, found)
            if self._clock.monotonic_ns() >= self.deadline_ns:
                return "it could not be renewed in time"

    def _begin(self, lease: int) -> None:
        """A lease was granted; for children."""

    def _end(self) -> None:
        """It is over; for children."""

    def close(self) -> None:
        """Renew nothing more."""


class LeaseThread(LeaseKeeper):
    """Renews in a thread of its own.

    Args:
        coordinator: used on the loop, for grants.
        connect: called in the thread, inside its loop: makes the coordinator that renewals go through.
        clock: of the deadlines.
        ttl_s: how long a lease lasts.
    """

    def __init__(
        self, coordinator: Coordinator, connect: Callable[[], Coordinator], clock: Clock, ttl_s: float
    ) -> None:
        super().__init__(coordinator, clock, ttl_s)
        self._connect = connect
        self._renewing = 0  # the lease that the thread renews; 0: none
        self._lost = 0  # the lease of which it has heard that it is gone
        self._ticked_ns = clock.monotonic_ns()  # when the main loop last ran
        self._ended = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None  # the thread's, while it runs
        self._task: asyncio.Task[None] | None = None
        self._thread = threading.Thread(target=self._run, name="lease", daemon=True)
        self._thread.start()

    async def _keep(self, lease: int) -> str:
        while True:
            self._ticked_ns = self._clock.monotonic_ns()
            await asyncio.sleep(self._ttl_s / (4 * _RENEWALS))
            if self._lost == lease:
                return "it has run out at the coordinator"
            if self._clock.monotonic_ns() >= self.deadline_ns:
                return "it could not be renewed in time"

    def _begin(self, lease: int) -> None:
        self._ticked_ns = self._clock.monotonic_ns()
        self._renewing = lease

    def _end(self) -> None:
        self._renewing = 0

    def _run(self) -> None:
        try:
            asyncio.run(self._renew_all())
        except asyncio.CancelledError:
            return  # closed
        except Exception:  # the loop notices by the deadline, and goes on trying to get a lease
            _log.exception("the thread that renews the lease has ended")

    async def _renew_all(self) -> None:
        self._task = asyncio.current_task()
        self._loop = asyncio.get_running_loop()
        coordinator = self._connect()
        try:
            while not self._ended.is_set():
                await asyncio.sleep(self._ttl_s / _RENEWALS)
                lease = self._renewing
                silent_ns = self._clock.monotonic_ns() - self._ticked_ns
                if not lease or silent_ns > self._ttl_s * 1e9 / 2:
                    continue
                found = await renew(coordinator, self._clock, lease, self._ttl_s)
                if self._renewing != lease:
                    continue
                if found is None:
                    self._lost = lease
                else:
                    self.deadline_ns = max(self.deadline_ns, found)
        finally:
            await coordinator.close()

    def close(self) -> None:
        """End the thread."""
        self._ended.set()
        if self._loop is not None and self._task is not None:
            with contextlib.suppress(RuntimeError):  # it has ended by itself
                self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join(_JOIN_S)


def deadline_of(sent_ns: int, ttl_s: float) -> int:
    """Until when a lease is relied upon whose renewal was sent at `sent_ns`: a tenth less than it lasts."""
    return sent_ns + int(ttl_s * 0.9e9)


async def renew(coordinator: Coordinator, clock: Clock, lease: int, ttl_s: float) -> int | None:
    """Renew a lease; its new deadline, 0 if that did not succeed in time, None if it is gone."""
    sent_ns = clock.monotonic_ns()
    try:
        async with asyncio.timeout(ttl_s / _RENEWALS):
            granted_s = await coordinator.lease_keepalive(lease)
    except NotFoundError:
        return None
    except (TallymarkError, TimeoutError) as error:
        _log.warning("the lease could not be renewed: %s", error)
        return 0
    return deadline_of(sent_ns, min(ttl_s, granted_s))
