"""The coordinator port: keys, transactions, watches and leases, as etcd v3 has them.

Keys and values are bytes. Every transaction that changes something has a **revision**, one more than the one
before; a key carries the revision it was created at, the one of its last change, and a version that starts at 1
and is counted up by each put. Reads see every change that was answered before them.

Whoever needs a consistent picture and what happens after it lists a prefix, then watches it from the revision
after the list's; `follow` does that, and lists again where a watch has fallen behind the history kept.

Errors: `InvalidRequestError` for keys, values and transactions outside the limits; `NotFoundError` for leases that
are not (any more); `UnavailableError` when the coordinator can't be reached, and then a mutation may have taken
effect all the same.
"""

from __future__ import annotations

import enum
from collections.abc import AsyncIterator, Sequence
from typing import Protocol

import msgspec

from tallymark_protocol.errors import ErrorCode, TallymarkError


class KeyValue(msgspec.Struct, frozen=True, array_like=True):
    """A key as it is. In the event of a deletion: value empty, version 0, mod_revision that of the deletion."""

    key: bytes
    value: bytes
    create_revision: int
    mod_revision: int
    version: int
    lease: int = 0  # the key goes with this lease; 0 = with none


class Target(enum.IntEnum):
    """What a comparison looks at. An absent key has 0 everywhere, and no value: a comparison of that never holds."""

    VERSION = 0
    CREATE_REVISION = 1
    MOD_REVISION = 2
    VALUE = 3


class Compare(msgspec.Struct, frozen=True, array_like=True):
    """A condition of a transaction: `target of key  relation  operand`."""

    key: bytes
    target: Target
    relation: str  # one of = != < >
    operand: int | bytes  # bytes for VALUE, else int


class Put(msgspec.Struct, frozen=True, array_like=True, tag="put"):
    """Set a key. `lease` binds it to a lease, 0 unbinds it."""

    key: bytes
    value: bytes
    lease: int = 0


class Delete(msgspec.Struct, frozen=True, array_like=True, tag="delete"):
    """Delete a key, or all keys that begin with it."""

    key: bytes
    is_prefix: bool = False


class Get(msgspec.Struct, frozen=True, array_like=True, tag="get"):
    """Read a key, or all keys that begin with it."""

    key: bytes
    is_prefix: bool = False


Operation = Put | Delete | Get


class TxnResult(msgspec.Struct, frozen=True, array_like=True):
    """What a transaction did."""

    succeeded: bool  # all comparisons held, so `success` was executed; else `failure` was
    revision: int  # the coordinator's after the transaction; the transaction's own where it changed something
    results: list[
        list[KeyValue]
    ] = []  # one per operation: what a Get read, what a Delete deleted, [] for a Put


class RangeResult(msgspec.Struct, frozen=True, array_like=True):
    """Keys in order, and the revision at which they were read."""

    items: list[KeyValue]
    revision: int


class EventKind(enum.IntEnum):
    """What happened to a key."""

    PUT = 0
    DELETE = 1


class WatchEvent(msgspec.Struct, frozen=True, array_like=True):
    """One change; `item.mod_revision` is the revision it happened at."""

    kind: EventKind
    item: KeyValue


class CompactedError(TallymarkError):
    """A watch asks for events that are no longer kept: list again, and watch from there."""

    default_code = ErrorCode.INVALID_ARGUMENT


def absent(key: bytes) -> Compare:
    """The condition that a key does not exist."""
    return Compare(key, Target.CREATE_REVISION, "=", 0)


def unchanged(item: KeyValue) -> Compare:
    """The condition that a key is still as it was read."""
    return Compare(item.key, Target.MOD_REVISION, "=", item.mod_revision)


class Coordinator(Protocol):
    """The port; see the module's docstring for what all operations share."""

    async def get(self, key: bytes) -> KeyValue | None:
        """Read one key; None where it doesn't exist."""
        ...

    async def range(self, prefix: bytes) -> RangeResult:
        """Read all keys that begin with `prefix`, sorted."""
        ...

    async def put(self, key: bytes, value: bytes, *, lease: int = 0) -> int:
        """Set a key; return the revision of the change."""
        ...

    async def delete(self, key: bytes) -> bool:
        """Delete a key; return whether it existed."""
        ...

    async def txn(
        self, compares: Sequence[Compare], success: Sequence[Operation], failure: Sequence[Operation] = ()
    ) -> TxnResult:
        """Execute `success` if all comparisons hold, else `failure`, in one step. A key may be changed once."""
        ...

    def watch(self, prefix: bytes, from_revision: int = 0) -> AsyncIterator[list[WatchEvent]]:
        """Iterate over changes of keys that begin with `prefix`, in order, from `from_revision` on.

        0 means: those after the first step of the iteration. Each item holds all changes of one or more revisions, never a part of
        one. Ends only by `aclose`, cancellation or an error; CompactedError: list again.
        """
        ...

    async def lease_grant(self, ttl_s: float) -> int:
        """Make a lease that runs out `ttl_s` after its last renewal; keys bound to it are then deleted."""
        ...

    async def lease_keepalive(self, lease: int) -> float:
        """Renew a lease; return its ttl in seconds. NotFoundError: it has run out, and its keys are gone."""
        ...

    async def lease_revoke(self, lease: int) -> None:
        """End a lease and delete its keys. NotFoundError where it is not."""
        ...

    async def close(self) -> None:
        """Let go of everything; watches end with UnavailableError. Leases run on until they run out."""
        ...


class Snapshot(msgspec.Struct, frozen=True):
    """All keys of a prefix: forget what you knew before."""

    items: list[KeyValue]
    revision: int


async def follow(coordinator: Coordinator, prefix: bytes) -> AsyncIterator[Snapshot | list[WatchEvent]]:
    """Iterate over the state of a prefix and what happens to it afterwards.

    Gives a `Snapshot` first, then lists of changes, and a new snapshot whenever the history between could not be
    had. Errors other than CompactedError come through.
    """
    while True:
        listed = await coordinator.range(prefix)
        yield Snapshot(listed.items, listed.revision)
        changes = coordinator.watch(prefix, listed.revision + 1)
        try:
            async for events in changes:
                yield events
        except CompactedError:
            continue
        finally:
            close = getattr(changes, "aclose", None)
            if close is not None:
                await close()
