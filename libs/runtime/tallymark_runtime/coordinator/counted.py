"""A coordinator that counts: another one behind it does the work.

Owns the numbers of what one role asks of the coordinator: how often, how long it took, what failed. Everything goes
through unchanged, errors included.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Sequence
from typing import Final, TypeVar

from tallymark_protocol.errors import ErrorCode, TallymarkError
from tallymark_runtime.clock import Clock
from tallymark_runtime.coordinator.port import (
    Compare,
    Coordinator,
    KeyValue,
    Operation,
    RangeResult,
    TxnResult,
    WatchEvent,
)
from tallymark_runtime.instruments import Histogram, count_in

T = TypeVar("T")

WATCH: Final = "watch"
# Fewer than elsewhere: there are many operations, and none is on a hot path.
BOUNDS_NS: Final = tuple(int(seconds * 1e9) for seconds in (0.001, 0.003, 0.01, 0.03, 0.1, 0.5, 2, 10))
OPERATIONS: Final = (
    "get",
    "range",
    "put",
    "delete",
    "txn",
    "lease_grant",
    "lease_keepalive",
    "lease_revoke",
)


class CoordinatorCounters:
    """What was asked of a coordinator since the start.

    Attributes:
        latency_ns: of calls that were answered, by operation.
        failures: calls that were not, and watches that broke, by operation and `ErrorCode`.
        watches: how many began.
        events: that they told.
    """

    __slots__ = ("events", "failures", "latency_ns", "watches")

    def __init__(self) -> None:
        self.latency_ns = {operation: Histogram(BOUNDS_NS) for operation in OPERATIONS}
        self.failures: dict[str, dict[int, int]] = {operation: {} for operation in (*OPERATIONS, WATCH)}
        self.watches = 0
        self.events = 0

    def failed(self, operation: str, error: BaseException) -> None:
        """An operation ended with an error."""
        code = error.code if isinstance(error, TallymarkError) else int(ErrorCode.INTERNAL)
        count_in(self.failures[operation], code)


class CountedCoordinator:
    """The port, counted; see there for what the operations do.

    Args:
        inner: does the work. It is closed with this one.
        clock: what calls are timed by.
        counters: the numbers to go on with, of one before it; None for new ones.

    Attributes:
        counters: the numbers.
    """

    def __init__(self, inner: Coordinator, clock: Clock, counters: CoordinatorCounters | None = None) -> None:
        self.counters = CoordinatorCounters() if counters is None else counters
        self._inner = inner
        self._clock = clock

    async def _counted(self, operation: str, call: Awaitable[T]) -> T:
        began_ns = self._clock.monotonic_ns()
        try:
            result = await call
        except asyncio.CancelledError:
            raise  # its caller's doing, not the coordinator's
        except BaseException as error:
            self.counters.failed(operation, error)
            raise
        self.counters.latency_ns[operation].observe(self._clock.monotonic_ns() - began_ns)
        return result

    async def get(self, key: bytes) -> KeyValue | None:
        """Read one key."""
        return await self._counted("get", self._inner.get(key))

    async def range(self, prefix: bytes) -> RangeResult:
        """Read a prefix."""
        return await self._counted("range", self._inner.range(prefix))

    async def put(self, key: bytes, value: bytes, *, lease: int = 0) -> int:
        """Set a key."""
        return await self._counted("put", self._inner.put(key, value, lease=lease))

    async def delete(self, key: bytes) -> bool:
        """Delete a key."""
        return await self._counted("delete", self._inner.delete(key))

    async def txn(
        self, compares: Sequence[Compare], success: Sequence[Operation], failure: Sequence[Operation] = ()
    ) -> TxnResult:
        """Execute a transaction."""
        return await self._counted("txn", self._inner.txn(compares, success, failure))

    async def watch(self, prefix: bytes, from_revision: int = 0) -> AsyncIterator[list[WatchEvent]]:
        """Iterate over changes."""
        self.counters.watches += 1
        changes = self._inner.watch(prefix, from_revision)
        try:
            async for events in changes:
                self.counters.events += len(events)
                yield events
        except TallymarkError as error:
            self.counters.failed(WATCH, error)
            raise
        finally:
            close = getattr(changes, "aclose", None)
            if close is not None:
                await close()

    async def lease_grant(self, ttl_s: float) -> int:
        """Make a lease."""
        return await self._counted("lease_grant", self._inner.lease_grant(ttl_s))

    async def lease_keepalive(self, lease: int) -> float:
        """Renew a lease."""
        return await self._counted("lease_keepalive", self._inner.lease_keepalive(lease))

    async def lease_revoke(self, lease: int) -> None:
        """End a lease."""
        await self._counted("lease_revoke", self._inner.lease_revoke(lease))

    async def close(self) -> None:
        """Close the one behind."""
        await self._inner.close()
