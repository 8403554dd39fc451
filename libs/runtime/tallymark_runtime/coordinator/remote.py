"""The coordinator port over frames: `RemoteCoordinator` asks, `CoordinatorService` answers.

An operation travels as a `CoordinatorCall`: its name and its arguments in MessagePack. A watch is a series of long
polls, each naming the revision to go on from, so a lost connection loses no event.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from typing import Final, Protocol, TypeVar

import msgspec

from tallymark_protocol.codec import decode, encode
from tallymark_protocol.errors import ErrorCode, InvalidRequestError, UnavailableError
from tallymark_protocol.messages import CoordinatorCall, CoordinatorResult
from tallymark_runtime.coordinator.port import (
    CompactedError,
    Compare,
    Coordinator,
    Delete,
    KeyValue,
    Operation,
    Put,
    RangeResult,
    TxnResult,
    WatchEvent,
)
from tallymark_runtime.peer import PeerClient

T = TypeVar("T")

_POLL_S: Final = 20.0  # how long the server holds a poll without events
_POLL_MAX_S: Final = 60.0  # how long it does so at most, whatever is asked for


class _TxnArguments(msgspec.Struct, frozen=True, array_like=True):
    compares: list[Compare]
    success: list[Operation]
    failure: list[Operation]


class _PollArguments(msgspec.Struct, frozen=True, array_like=True):
    prefix: bytes
    from_revision: int  # 0: from now on
    timeout_s: float


class _PollResult(msgspec.Struct, frozen=True, array_like=True):
    events: list[WatchEvent]
    next_revision: int  # where to go on
    compacted: int | None = None  # set: the events asked for are gone, up to this revision


class PollableCoordinator(Coordinator, Protocol):
    """A coordinator whose watches can be polled: what `CoordinatorService` needs."""

    @property
    def revision(self) -> int:
        """The revision of the last change."""
        ...

    async def poll(
        self, prefix: bytes, from_revision: int, timeout_s: float | None
    ) -> tuple[list[WatchEvent], int]:
        """Wait for changes; see `MemoryCoordinator.poll`."""
        ...


class CoordinatorService:
    """Answers the calls of `RemoteCoordinator`s with a coordinator of this process."""

    def __init__(self, coordinator: PollableCoordinator) -> None:
        self._coordinator = coordinator

    async def on_call(self, call: CoordinatorCall) -> CoordinatorResult:
        """Execute one operation. Raises what the coordinator raises, and RemoteProtocolError for garbage."""
        return CoordinatorResult(await self._execute(call.operation, call.body))

    async def _execute(self, operation: str, body: bytes) -> bytes:
        coordinator = self._coordinator
        if operation == "get":
            return encode(await coordinator.get(decode(bytes, body)))
        if operation == "range":
            return encode(await coordinator.range(decode(bytes, body)))
        if operation == "txn":
            txn = decode(_TxnArguments, body)
            return encode(await coordinator.txn(txn.compares, txn.success, txn.failure))
        if operation == "poll":
            return encode(await self._poll(decode(_PollArguments, body)))
        if operation == "lease_grant":
            return encode(await coordinator.lease_grant(decode(float, body)))
        if operation == "lease_keepalive":
            return encode(await coordinator.lease_keepalive(decode(int, body)))
        if operation == "lease_revoke":
            await coordinator.lease_revoke(decode(int, body))
            return encode(None)
        raise InvalidRequestError(f"the coordinator has no operation {operation!r}")

    async def _poll(self, poll: _PollArguments) -> _PollResult:
        from_revision = poll.from_revision if poll.from_revision > 0 else self._coordinator.revision + 1
        timeout_s = min(max(poll.timeout_s, 0.0), _POLL_MAX_S)
        try:
            events, following = await self._coordinator.poll(poll.prefix, from_revision, timeout_s)
        except CompactedError as error:
            return _PollResult([], from_revision, error.details.get("compact_revision", 0))
        return _PollResult(events, following)


def serve_coordinator(coordinator: PollableCoordinator) -> CoordinatorService:
    """The service that a `FrameHandler.on_call` hands its `CoordinatorCall`s to."""
    return CoordinatorService(coordinator)


class RemoteCoordinator:
    """The coordinator of another process.

    Reads and watches go on over lost connections until `timeout_s` has passed without an answer. A mutation is
    sent once: UnavailableError from it leaves open whether it took effect, unless its code is CLOSED and it was
    raised for want of a connection.

    Args:
        address: "host:port" of the process that hosts it.
        rng: for the jitter of reconnecting.
        timeout_s: for every operation; for watches, without an answer to a poll.
    """

    def __init__(self, address: str, *, rng: random.Random, timeout_s: float = 5.0) -> None:
        self._peer = PeerClient(address, rng=rng, software="tallymark-coordinator-client")
        self._timeout_s = timeout_s

    async def get(self, key: bytes) -> KeyValue | None:
        """Read one key; see the port."""
        return decode(KeyValue | None, await self._read("get", encode(key)))  # type: ignore[arg-type]

    async def range(self, prefix: bytes) -> RangeResult:
        """Read a prefix; see the port."""
        return decode(RangeResult, await self._read("range", encode(prefix)))

    async def put(self, key: bytes, value: bytes, *, lease: int = 0) -> int:
        """Set a key; see the port."""
        return (await self.txn([], [Put(key, value, lease)])).revision

    async def delete(self, key: bytes) -> bool:
        """Delete a key; see the port."""
        return bool((await self.txn([], [Delete(key)])).results[0])

    async def txn(
        self, compares: Sequence[Compare], success: Sequence[Operation], failure: Sequence[Operation] = ()
    ) -> TxnResult:
        """Execute a transaction; see the port."""
        body = encode(_TxnArguments(list(compares), list(success), list(failure)))
        return decode(TxnResult, await self._write("txn", body))

    async def watch(self, prefix: bytes, from_revision: int = 0) -> AsyncIterator[list[WatchEvent]]:
        """Iterate over changes; see the port."""
        following = from_revision
        while True:
            # The first poll of a watch from "now" returns at once: it pins what now is, before anything else.
            wait_s = _POLL_S if following > 0 else 0.0
            body = encode(_PollArguments(prefix, following, wait_s))
            result = decode(_PollResult, await self._read("poll", body, wait_s=wait_s))
            if result.compacted is not None:
                raise CompactedError(
                    f"revision {following} is compacted: the history begins after {result.compacted}",
                    details={"compact_revision": result.compacted},
                )
            following = result.next_revision
            if result.events:
                yield result.events

    async def lease_grant(self, ttl_s: float) -> int:
        """Make a lease; see the port."""
        return decode(int, await self._write("lease_grant", encode(float(ttl_s))))

    async def lease_keepalive(self, lease: int) -> float:
        """Renew a lease; see the port."""
        return decode(float, await self._read("lease_keepalive", encode(lease)))

    async def lease_revoke(self, lease: int) -> None:
        """End a lease; see the port."""
        await self._write("lease_revoke", encode(lease))

    async def close(self) -> None:
        """Close the connection; see the port. Leases run on."""
        await self._peer.close()

    # ------------------------------------------------------------ calls

    async def _call(self, operation: str, body: bytes, timeout_s: float) -> bytes:
        call = CoordinatorCall(operation, body)
        result = await self._peer.call(call, CoordinatorResult, timeout_s=timeout_s)
        return result.body

    async def _write(self, operation: str, body: bytes) -> bytes:
        """Connect, trying again until time is up, then send once."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._timeout_s
        while True:
            try:
                await self._peer.connect(max(deadline - loop.time(), 0.001))
                break
            except UnavailableError as error:
                if not error.retriable or loop.time() >= deadline:
                    raise
        return await self._call(operation, body, max(deadline - loop.time(), 0.001))

    async def _read(self, operation: str, body: bytes, *, wait_s: float = 0.0) -> bytes:
        """Ask until an answer comes or time is up: for operations that may be executed twice.

        Args:
            operation: its name.
            body: its arguments.
            wait_s: how long the server may take beyond our timeout; a poll's time begins with its first failure.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._timeout_s if wait_s == 0 else None
        while True:
            left_s = self._timeout_s if deadline is None else max(deadline - loop.time(), 0.001)
            try:
                return await self._call(operation, body, left_s + wait_s)
            except UnavailableError as error:
                if not error.retriable or error.code not in _CONNECTION_CODES:
                    raise
                if deadline is None:
                    deadline = loop.time() + self._timeout_s
                elif loop.time() >= deadline:
                    raise


_CONNECTION_CODES: Final = (ErrorCode.CLOSED, ErrorCode.TIMEOUT)
