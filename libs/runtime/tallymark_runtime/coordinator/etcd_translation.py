"""Between the coordinator port's words and etcd's: keys under a prefix, transactions, events and errors.

Pure. Every key here lies under the cluster's prefix in etcd; callers know nothing of it. What etcd sends is
checked: an answer that makes no sense is a `RemoteProtocolError`.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

from grpclib.const import Status
from grpclib.exceptions import GRPCError, ProtocolError, StreamTerminatedError
from h2.exceptions import H2Error

from tallymark_protocol.errors import (
    ErrorCode,
    InvalidRequestError,
    NotFoundError,
    RemoteProtocolError,
    ServerError,
    TallymarkError,
    UnavailableError,
)
from tallymark_runtime.coordinator.port import (
    CompactedError,
    Compare,
    Delete,
    EventKind,
    Get,
    KeyValue,
    Operation,
    Put,
    Target,
    WatchEvent,
)
from tallymark_runtime.generated import etcdserverpb as etcd
from tallymark_runtime.generated import mvccpb

Kvs = Sequence[mvccpb.KeyValue]


class Keys:
    """Where a cluster's keys lie in etcd.

    Args:
        prefix: what all of them begin with; not empty, so that clusters can share an etcd.
    """

    __slots__ = ("prefix",)

    def __init__(self, prefix: bytes) -> None:
        assert prefix, "an empty prefix would take all of etcd for this cluster's"
        self.prefix = prefix

    def outer(self, key: bytes) -> bytes:
        """A key as etcd knows it."""
        return self.prefix + key

    def span(self, prefix: bytes) -> tuple[bytes, bytes]:
        """The half-open range of etcd's keys for all keys that begin with `prefix`."""
        start = self.prefix + prefix
        return start, after_prefix(start)

    def item(self, kv: mvccpb.KeyValue) -> KeyValue:
        """A key of ours, of one as etcd knows it."""
        if not kv.key.startswith(self.prefix):
            raise RemoteProtocolError(f"etcd answered with the key {kv.key!r}, which nobody asked for")
        return KeyValue(
            kv.key[len(self.prefix) :], kv.value, kv.create_revision, kv.mod_revision, kv.version, kv.lease
        )

    def event(self, event: mvccpb.Event) -> WatchEvent:
        """A change of ours, of one as etcd tells it."""
        if event.kv is None:
            raise RemoteProtocolError("etcd sent a change without its key")
        item = self.item(event.kv)
        if event.type == mvccpb.EventEventType.PUT:
            return WatchEvent(EventKind.PUT, item)
        if event.type != mvccpb.EventEventType.DELETE:
            raise RemoteProtocolError(f"etcd sent a change of the unknown kind {int(event.type)}")
        return WatchEvent(EventKind.DELETE, KeyValue(item.key, b"", 0, item.mod_revision, 0))

    def txn(
        self, compares: Sequence[Compare], success: Sequence[Operation], failure: Sequence[Operation]
    ) -> etcd.TxnRequest:
        """A transaction; it must be within the limits."""
        return etcd.TxnRequest(
            compare=[self._compare(compare) for compare in compares],
            success=[self._operation(operation) for operation in success],
            failure=[self._operation(operation) for operation in failure],
        )

    def _compare(self, compare: Compare) -> etcd.Compare:
        made = etcd.Compare(
            result=_RESULTS[compare.relation],
            target=etcd.CompareCompareTarget(int(compare.target)),
            key=self.outer(compare.key),
        )
        setattr(made, _OPERAND_FIELDS[Target(compare.target)], compare.operand)
        return made

    def _operation(self, operation: Operation) -> etcd.RequestOp:
        if isinstance(operation, Put):
            return etcd.RequestOp(
                request_put=etcd.PutRequest(
                    key=self.outer(operation.key), value=operation.value, lease=operation.lease
                )
            )
        start, end = self.span(operation.key) if operation.is_prefix else (self.outer(operation.key), b"")
        if isinstance(operation, Get):
            return etcd.RequestOp(request_range=etcd.RangeRequest(key=start, range_end=end))
        return etcd.RequestOp(
            request_delete_range=etcd.DeleteRangeRequest(key=start, range_end=end, prev_kv=True)
        )

    def results(
        self, operations: Sequence[Operation], responses: Sequence[etcd.ResponseOp]
    ) -> list[list[KeyValue]]:
        """What each operation of the branch that was executed gave."""
        if len(responses) != len(operations):
            raise RemoteProtocolError(f"etcd answered {len(responses)} of {len(operations)} operations")
        results: list[list[KeyValue]] = []
        for operation, response in zip(operations, responses, strict=True):
            kvs: Kvs
            if isinstance(operation, Put):
                kvs = []
            elif isinstance(operation, Get):
                if response.response_range is None:
                    raise RemoteProtocolError("etcd answered a read with something else")
                kvs = response.response_range.kvs
            else:
                if response.response_delete_range is None:
                    raise RemoteProtocolError("etcd answered a deletion with something else")
                kvs = response.response_delete_range.prev_kvs
            results.append([self.item(kv) for kv in kvs])
        return results


_RESULTS: Final = {
    "=": etcd.CompareCompareResult.EQUAL,
    "!=": etcd.CompareCompareResult.NOT_EQUAL,
    "<": etcd.CompareCompareResult.LESS,
    ">": etcd.CompareCompareResult.GREATER,
}

_OPERAND_FIELDS: Final = {
    Target.VERSION: "version",
    Target.CREATE_REVISION: "create_revision",
    Target.MOD_REVISION: "mod_revision",
    Target.VALUE: "value",
}


def after_prefix(prefix: bytes) -> bytes:
    r"""The first key above all that begin with `prefix`; b"\0", etcd's word for no end, where there is none."""
    stem = prefix.rstrip(b"\xff")
    return stem[:-1] + bytes([stem[-1] + 1]) if stem else b"\0"


def check_changes(operations: Sequence[Operation]) -> None:
    """Refuse a branch that may change a key twice, which etcd allows where both are deletions.

    Raises:
        InvalidRequestError: it may.
    """
    keys: set[bytes] = set()
    prefixes = [op.key for op in operations if isinstance(op, Delete) and op.is_prefix]
    for operation in operations:
        if isinstance(operation, Get):
            continue
        of_prefix = isinstance(operation, Delete) and operation.is_prefix
        others = list(prefixes)
        if of_prefix:
            others.remove(operation.key)
        if (not of_prefix and operation.key in keys) or any(
            operation.key.startswith(other) for other in others
        ):
            raise InvalidRequestError(f"the transaction changes key {operation.key!r} more than once")
        if not of_prefix:
            keys.add(operation.key)


def revision_of(header: etcd.ResponseHeader | None) -> int:
    """The revision in an answer's header.

    Raises:
        RemoteProtocolError: there is none.
    """
    if header is None or header.revision <= 0:
        raise RemoteProtocolError("etcd answered without a revision")
    return header.revision


# ---------------------------------------------------------------- errors

# What gRPC, HTTP/2, sockets and decoding raise. `TimeoutError` and all of sockets' errors are OSErrors.
FOREIGN_ERRORS: Final = (
    GRPCError,
    ProtocolError,
    StreamTerminatedError,
    H2Error,
    OSError,
    EOFError,
    AssertionError,  # of the generated code, for an answer without a message
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    struct.error,
)

# etcd says this before it does anything: the same request may be sent to another member.
_NO_LEADER: Final = "etcdserver: no leader"


class NoLeaderError(UnavailableError):
    """A member that sees no leader has refused a request; it had no effect."""


def error_of(error: BaseException, address: str) -> TallymarkError:
    """The error of our tree for a foreign one; the caller raises it.

    Args:
        error: one of FOREIGN_ERRORS.
        address: the endpoint it came from.
    """
    if isinstance(error, GRPCError):
        return _error_of_status(error.status, error.message or error.status.name.lower(), address)
    if isinstance(error, TimeoutError):
        return UnavailableError(f"etcd at {address} did not answer in time", code=ErrorCode.TIMEOUT)
    if isinstance(error, OSError):
        return UnavailableError(f"etcd at {address} can't be reached: {error}", code=ErrorCode.CLOSED)
    if isinstance(error, StreamTerminatedError | H2Error):
        return UnavailableError(f"the connection to etcd at {address} was lost", code=ErrorCode.CLOSED)
    return RemoteProtocolError(
        f"the answer of etcd at {address} makes no sense: {type(error).__name__}: {error}"
    )


def _error_of_status(status: Status, message: str, address: str) -> TallymarkError:
    text = f"etcd at {address}: {message}"
    if status is Status.NOT_FOUND:
        return NotFoundError(text)
    if status is Status.OUT_OF_RANGE and "compacted" in message:
        return CompactedError(text)
    if status is Status.INVALID_ARGUMENT and "too large" in message:
        return InvalidRequestError(text, code=ErrorCode.TOO_LARGE)
    if status in (Status.INVALID_ARGUMENT, Status.OUT_OF_RANGE):
        return InvalidRequestError(text)
    if status is Status.RESOURCE_EXHAUSTED:
        if "larger than max" in message:
            return InvalidRequestError(text, code=ErrorCode.TOO_LARGE)
        full = "space" in message
        return UnavailableError(text, code=ErrorCode.DISK_FULL if full else ErrorCode.OVERLOADED)
    if status in (Status.UNAUTHENTICATED, Status.PERMISSION_DENIED):
        return UnavailableError(text, retriable=False)
    if status in (Status.UNIMPLEMENTED, Status.DATA_LOSS):
        return ServerError(text)
    if message == _NO_LEADER:
        return NoLeaderError(text)
    # Unavailable, not the leader, cancelled, aborted, internal, unknown: whatever it was, it may pass.
    return UnavailableError(text)
