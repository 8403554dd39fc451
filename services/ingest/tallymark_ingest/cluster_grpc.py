"""Cluster administration over gRPC: the calls of `cluster_admin` for tools that don't speak frames.

Owns the translation of messages and errors; what a call does is `ClusterAdmin`'s. The service is offered beside gRPC
health, at the address of the setting `grpc`.
"""

from __future__ import annotations

from collections.abc import Awaitable
from typing import TypeVar

from grpclib.const import Status
from grpclib.exceptions import GRPCError

from tallymark_ingest.cluster_admin import ClusterAdmin
from tallymark_protocol import messages
from tallymark_protocol.errors import (
    BackpressureError,
    InvalidRequestError,
    NotFoundError,
    TallymarkError,
    UnavailableError,
)
from tallymark_runtime.generated.tallymark.cluster.v1 import (
    ChangeResponse,
    ClusterBase,
    DrainRequest,
    Move,
    Partition,
    RebalanceRequest,
    RecoverRequest,
    RecoverResponse,
    ReplaceRequest,
    StatusRequest,
    StatusResponse,
    Store,
)

T = TypeVar("T")


class ClusterService(ClusterBase):
    """The generated service over a `ClusterAdmin`."""

    def __init__(self, admin: ClusterAdmin) -> None:
        self._admin = admin

    async def status(self, message: StatusRequest) -> StatusResponse:  # noqa: ARG002
        """See `ClusterAdmin.status`."""
        info = await _mapped(self._admin.status())
        return StatusResponse(
            stores=[_store(store) for store in info.stores],
            partitions=[_partition(item) for item in info.partitions],
            replication_factor=info.replication_factor,
            epoch_base=info.epoch_base,
            is_settled=all(item.is_settled for item in info.partitions),
        )

    async def drain(self, message: DrainRequest) -> ChangeResponse:
        """See `ClusterAdmin.drain` and `undrain`."""
        call = messages.ClusterDrain(message.node_id, undo=message.undo)
        return _change(await _mapped(self._admin.answer(call)))

    async def rebalance(self, message: RebalanceRequest) -> ChangeResponse:
        """See `ClusterAdmin.rebalance`."""
        return _change(await _mapped(self._admin.rebalance(message.replication_factor)))

    async def replace(self, message: ReplaceRequest) -> ChangeResponse:
        """See `ClusterAdmin.replace`."""
        return _change(await _mapped(self._admin.replace(message.node_id, message.successor)))

    async def recover(self, message: RecoverRequest) -> RecoverResponse:  # noqa: ARG002
        """See `ClusterAdmin.recover`."""
        return RecoverResponse(epoch_base=(await _mapped(self._admin.recover())).epoch_base)


async def _mapped(call: Awaitable[T]) -> T:
    """A call's result; its errors become gRPC's."""
    try:
        return await call
    except TallymarkError as error:
        status = Status.INTERNAL
        if isinstance(error, NotFoundError):
            status = Status.NOT_FOUND
        elif isinstance(error, InvalidRequestError):
            status = Status.FAILED_PRECONDITION
        elif isinstance(error, UnavailableError | BackpressureError):
            status = Status.UNAVAILABLE
        raise GRPCError(status, error.message) from error


def _store(store: messages.StoreInfo) -> Store:
    return Store(
        node_id=store.node_id,
        address=store.address,
        zone=store.zone,
        is_up=store.is_up,
        is_draining=store.is_draining,
        wished=store.wished,
        held=store.held,
        led=store.led,
        error=store.error,
        log_bytes=store.log_bytes,
        is_full=store.is_full,
    )


def _partition(item: messages.PartitionInfo) -> Partition:
    return Partition(
        partition=item.partition,
        wished=item.wished,
        members=item.members,
        leader=item.leader,
        epoch=item.epoch,
        log_end=item.log_end,
        high_watermark=item.high_watermark,
        lags=item.lags,
        error=item.error,
        is_settled=item.is_settled,
    )


def _change(change: messages.ClusterInfo | messages.ClusterChange) -> ChangeResponse:
    assert isinstance(change, messages.ClusterChange), "what a change is answered with"
    return ChangeResponse(
        moves=[Move(partition=p, source=source, target=target) for p, source, target in change.moves],
        leaders=[Move(partition=p, source=source, target=target) for p, source, target in change.leaders],
    )
