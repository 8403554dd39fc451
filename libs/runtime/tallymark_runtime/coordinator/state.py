"""The embedded coordinator's state as pure objects: keys with their revisions, and leases.

Owns the meaning of transactions, revisions and leases; knows no file, no clock and no waiting. `CoordinatorState`
is what is durable. A mutation is made on a `clone`, which replaces the visible state once it is written, so nobody
reads what could still be lost. `Leases` are apart: they live in the process only, and time comes in as an argument.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

import msgspec

from tallymark_protocol import limits
from tallymark_protocol.errors import BackpressureError, ErrorCode, InvalidRequestError, NotFoundError
from tallymark_runtime.coordinator.port import (
    CompactedError,
    Compare,
    Delete,
    EventKind,
    Get,
    KeyValue,
    Operation,
    Put,
    RangeResult,
    Target,
    TxnResult,
    WatchEvent,
)

# What a key costs beyond its bytes, when the state's size is counted.
_ITEM_BYTES = 64


class Image(msgspec.Struct, frozen=True, array_like=True):
    """The durable part of a state."""

    revision: int
    incarnation: int
    items: list[KeyValue]


class CoordinatorState:
    """Keys, values and the history of their changes.

    Attributes:
        revision: of the last change; 1 before any, as in etcd.
        compacted: changes up to this revision (inclusive) are not in the history any more; never above revision.
        incarnation: how many processes have opened this state, this one included; 1 or more.
    """

    __slots__ = ("_bytes", "_history", "_items", "_sorted", "compacted", "incarnation", "revision")

    def __init__(self, *, revision: int = 1, incarnation: int = 1) -> None:
        self.revision = revision
        self.compacted = revision
        self.incarnation = incarnation
        self._items: dict[bytes, KeyValue] = {}
        self._sorted: list[bytes] | None = []  # the keys in order; None where that must be made anew
        self._history: list[WatchEvent] = []  # changes above `compacted`, in order
        self._bytes = 0  # what the items count for against the limit

    # ------------------------------------------------------------ images

    def image(self) -> Image:
        """What must be written."""
        return Image(self.revision, self.incarnation, [self._items[key] for key in self._keys()])

    @classmethod
    def restart(cls, image: Image) -> CoordinatorState:
        """The state of the next process: every lease of the last one has ended, its keys are deleted.

        The history is empty. Write the image of the result before using it.
        """
        state = cls(revision=image.revision, incarnation=image.incarnation + 1)
        for item in image.items:
            state._set(item)
        bound = [item.key for item in image.items if item.lease]
        if bound:
            state.txn([], [Delete(key) for key in bound], [], leases=None, unbounded=True)
            state.compacted = state.revision
            state._history = []
        return state

    def clone(self) -> CoordinatorState:
        """A copy to mutate."""
        other = CoordinatorState(revision=self.revision, incarnation=self.incarnation)
        other.compacted = self.compacted
        other._items = dict(self._items)
        other._sorted = self._sorted
        other._history = list(self._history)
        other._bytes = self._bytes
        return other

    # ------------------------------------------------------------ reading

    def get(self, key: bytes) -> KeyValue | None:
        """One key, None where it doesn't exist."""
        return self._items.get(key)

    def range(self, prefix: bytes) -> RangeResult:
        """All keys that begin with `prefix`, sorted."""
        return RangeResult(self._range(prefix), self.revision)

    def _range(self, prefix: bytes) -> list[KeyValue]:
        keys = self._keys()
        found = []
        for i in range(bisect_left(keys, prefix), len(keys)):
            if not keys[i].startswith(prefix):
                break
            found.append(self._items[keys[i]])
        return found

    def bound_to(self, lease: int) -> list[bytes]:
        """The keys bound to a lease, sorted."""
        return [key for key in self._keys() if self._items[key].lease == lease]

    def events(self, prefix: bytes, from_revision: int) -> list[WatchEvent]:
        """Changes of keys that begin with `prefix`, at `from_revision` or later, in order.

        Raises:
            CompactedError: some of them are not kept any more.
        """
        if from_revision <= self.compacted:
            raise CompactedError(
                f"revision {from_revision} is compacted: the history begins after {self.compacted}",
                details={"compact_revision": self.compacted},
            )
        history = self._history
        if not history or history[-1].item.mod_revision < from_revision:
            return []  # whoever follows has seen all there is, most often
        start = bisect_left(history, from_revision, key=lambda event: event.item.mod_revision)
        return [event for event in history[start:] if event.item.key.startswith(prefix)]

    def _keys(self) -> list[bytes]:
        keys = self._sorted
        if keys is None:
            keys = self._sorted = sorted(self._items)
        return keys

    # ------------------------------------------------------------ transactions

    def txn(
        self,
        compares: Sequence[Compare],
        success: Sequence[Operation],
        failure: Sequence[Operation],
        *,
        leases: Leases | None,
        unbounded: bool = False,
    ) -> TxnResult:
        """Execute a transaction on this object.

        Args:
            compares: the conditions.
            success: what to do where all of them hold.
            failure: what to do otherwise.
            leases: where leases named by Puts must be; None where there are no Puts with one.
            unbounded: don't limit the number of operations: for deletions of the coordinator's own.

        Raises:
            InvalidRequestError: it breaks a limit, or changes a key twice. Nothing was changed.
            NotFoundError: a Put names a lease that is not. Nothing was changed.
            BackpressureError: the state would become too large. Nothing was changed.
        """
        if not unbounded:
            check_limits(compares, success, failure)
        succeeded = all(self._holds(compare) for compare in compares)
        operations = success if succeeded else failure
        self._check(operations, leases)
        revision = self.revision + 1
        results: list[list[KeyValue]] = []
        changes: list[WatchEvent] = []
        for operation in operations:
            if isinstance(operation, Get):
                results.append(self._found(operation))
            elif isinstance(operation, Put):
                changes.append(self._put(operation, revision))
                results.append([])
            else:
                deleted = self._found(operation)
                changes.extend(self._delete(item.key, revision) for item in deleted)
                results.append(deleted)
        if changes:
            self.revision = revision
            self._remember(changes)
        return TxnResult(succeeded, self.revision, results)

    def _found(self, operation: Get | Delete) -> list[KeyValue]:
        if operation.is_prefix:
            return self._range(operation.key)
        item = self._items.get(operation.key)
        return [] if item is None else [item]

    def _holds(self, compare: Compare) -> bool:
        item = self._items.get(compare.key)
        actual: Any
        if item is None:
            if compare.target == Target.VALUE:
                return False  # as in etcd, whatever the relation
            actual = 0
        elif compare.target == Target.VALUE:
            actual = item.value
        elif compare.target == Target.VERSION:
            actual = item.version
        elif compare.target == Target.CREATE_REVISION:
            actual = item.create_revision
        else:
            actual = item.mod_revision
        operand: Any = compare.operand
        if compare.relation == "=":
            return bool(actual == operand)
        if compare.relation == "!=":
            return bool(actual != operand)
        return bool(actual < operand if compare.relation == "<" else actual > operand)

    def _check(self, operations: Sequence[Operation], leases: Leases | None) -> None:
        """Refuse what may not be executed, before anything is."""
        changed: set[bytes] = set()
        added = 0
        for operation in operations:
            if isinstance(operation, Get):
                continue
            keys = [operation.key]
            if isinstance(operation, Put):
                if operation.lease and (leases is None or not leases.exists(operation.lease)):
                    raise NotFoundError(f"lease {operation.lease} doesn't exist (any more)")
                old = self._items.get(operation.key)
                added += _size(operation.key, operation.value)
                added -= 0 if old is None else _size(old.key, old.value)
            elif operation.is_prefix:
                keys = [item.key for item in self._range(operation.key)]
            for key in keys:
                if key in changed:
                    raise InvalidRequestError(f"the transaction changes key {key!r} more than once")
                changed.add(key)
        # A Put under a prefix that the same transaction deletes would depend on their order.
        prefixes = [op.key for op in operations if isinstance(op, Delete) and op.is_prefix]
        for operation in operations:
            if isinstance(operation, Put) and any(operation.key.startswith(p) for p in prefixes):
                raise InvalidRequestError(f"the transaction changes key {operation.key!r} more than once")
        if added > 0 and self._bytes + added > limits.COORDINATOR_STATE_BYTES_MAX:
            raise BackpressureError(
                f"the coordinator's state would exceed {limits.COORDINATOR_STATE_BYTES_MAX} bytes",
                code=ErrorCode.TOO_LARGE,
                retriable=False,
            )

    def _put(self, operation: Put, revision: int) -> WatchEvent:
        old = self._items.get(operation.key)
        item = KeyValue(
            operation.key,
            operation.value,
            create_revision=revision if old is None else old.create_revision,
            mod_revision=revision,
            version=1 if old is None else old.version + 1,
            lease=operation.lease,
        )
        self._set(item)
        return WatchEvent(EventKind.PUT, item)

    def _set(self, item: KeyValue) -> None:
        old = self._items.get(item.key)
        if old is None:
            self._sorted = None
        else:
            self._bytes -= _size(old.key, old.value)
        self._bytes += _size(item.key, item.value)
        self._items[item.key] = item

    def _delete(self, key: bytes, revision: int) -> WatchEvent:
        item = self._items.pop(key)
        self._sorted = None
        self._bytes -= _size(item.key, item.value)
        return WatchEvent(EventKind.DELETE, KeyValue(key, b"", 0, revision, 0))

    def _remember(self, changes: list[WatchEvent]) -> None:
        history = self._history
        history.extend(changes)
        excess = len(history) - limits.COORDINATOR_HISTORY_EVENTS_MAX
        if excess > 0:
            # Whole revisions only: a watcher never gets a part of one.
            self.compacted = history[excess - 1].item.mod_revision
            keep = bisect_left(history, self.compacted + 1, key=lambda event: event.item.mod_revision)
            del history[:keep]


def _size(key: bytes, value: bytes) -> int:
    return len(key) + len(value) + _ITEM_BYTES


_RELATIONS = ("=", "!=", "<", ">")


def check_limits(
    compares: Sequence[Compare], success: Sequence[Operation], failure: Sequence[Operation]
) -> None:
    """Refuse a transaction that is outside the limits, whatever the state.

    Raises:
        InvalidRequestError: it is.
    """
    most = limits.COORDINATOR_OPERATIONS_MAX
    if max(len(compares), len(success), len(failure)) > most:
        raise InvalidRequestError(f"a transaction has at most {most} comparisons and operations")
    for compare in compares:
        _check_key(compare.key)
        if compare.relation not in _RELATIONS:
            raise InvalidRequestError(f"a comparison can't have the relation {compare.relation!r}")
        if isinstance(compare.operand, bytes) != (compare.target == Target.VALUE):
            raise InvalidRequestError("a value is compared with bytes, everything else with a number")
    for operation in (*success, *failure):
        if isinstance(operation, Put):
            _check_key(operation.key)
            if len(operation.value) > limits.COORDINATOR_VALUE_BYTES_MAX:
                raise InvalidRequestError(
                    f"a value of {len(operation.value)} bytes: "
                    f"at most {limits.COORDINATOR_VALUE_BYTES_MAX} are allowed",
                    code=ErrorCode.TOO_LARGE,
                )
        elif not operation.is_prefix:
            _check_key(operation.key)


def _check_key(key: bytes) -> None:
    if not 1 <= len(key) <= limits.COORDINATOR_KEY_BYTES_MAX:
        raise InvalidRequestError(
            f"a key has 1 to {limits.COORDINATOR_KEY_BYTES_MAX} bytes, this one has {len(key)}"
        )


class _Lease:
    """One lease."""

    __slots__ = ("deadline_ns", "ttl_ns")

    def __init__(self, ttl_ns: int, deadline_ns: int) -> None:
        self.ttl_ns = ttl_ns
        self.deadline_ns = deadline_ns  # it has run out when now >= deadline_ns


class Leases:
    """The leases of this process.

    Ids hold the incarnation of the state in their upper half: one of an earlier process never means a lease of
    this one.
    """

    __slots__ = ("_leases", "_next_id")

    def __init__(self, incarnation: int) -> None:
        self._next_id = (incarnation << 32) + 1
        self._leases: dict[int, _Lease] = {}

    def exists(self, lease: int) -> bool:
        """Whether keys can be bound to it."""
        return lease in self._leases

    def grant(self, ttl_ns: int, now_ns: int) -> int:
        """Make a lease; return its id.

        Raises:
            InvalidRequestError: the ttl is not above zero, or too long.
            BackpressureError: there are too many leases.
        """
        if not 0 < ttl_ns <= limits.COORDINATOR_LEASE_SECONDS_MAX * 10**9:
            raise InvalidRequestError(
                f"a lease's ttl is above 0 and at most {limits.COORDINATOR_LEASE_SECONDS_MAX} s"
            )
        if len(self._leases) >= limits.COORDINATOR_LEASES_MAX:
            raise BackpressureError(f"there are {len(self._leases)} leases already")
        lease = self._next_id
        self._next_id += 1
        self._leases[lease] = _Lease(ttl_ns, now_ns + ttl_ns)
        return lease

    def keepalive(self, lease: int, now_ns: int) -> int:
        """Renew a lease; return its ttl in ns. NotFoundError where it has run out."""
        entry = self._leases.get(lease)
        if entry is None or now_ns >= entry.deadline_ns:
            raise NotFoundError(f"lease {lease} doesn't exist (any more)")
        entry.deadline_ns = now_ns + entry.ttl_ns
        return entry.ttl_ns

    def remove(self, lease: int) -> None:
        """Forget a lease; its keys must be deleted by the caller. NotFoundError where it is not."""
        if self._leases.pop(lease, None) is None:
            raise NotFoundError(f"lease {lease} doesn't exist (any more)")

    def take_expired(self, now_ns: int) -> list[int]:
        """Forget the leases that have run out and return them; their keys must be deleted by the caller."""
        expired = [lease for lease, entry in self._leases.items() if now_ns >= entry.deadline_ns]
        for lease in expired:
            del self._leases[lease]
        return expired

    def next_deadline(self) -> int | None:
        """When the next lease runs out, in ns; None where there is none."""
        return min((entry.deadline_ns for entry in self._leases.values()), default=None)
