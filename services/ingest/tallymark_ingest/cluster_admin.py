"""Administration of the cluster's stores: what they hold, and where copies shall lie.

Answers the Cluster calls. A change is planned here (`tallymark_runtime.planner`) and written as a wish, to
`assignments/<partition>`; the leaders of the partitions carry it out, one copy at a time, and `status` shows how far
they are. So a gateway that ends in the middle, or the caller who goes away, leaves nothing half done but the writing
of the wish, and the same call again completes that.

Changes exclude each other: each begins with a transaction that requires the key `placement` to be as it was read,
and writes it anew; the rest of its transactions, where one has no room for everything, require what the first one
wrote. A change that loses is planned again from what is there now.
"""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import logging
import random
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Final

import msgspec

from tallymark_protocol import limits
from tallymark_protocol.errors import (
    InvalidRequestError,
    NotFoundError,
    TallymarkError,
    UnavailableError,
)
from tallymark_protocol.messages import (
    ClusterChange,
    ClusterDrain,
    ClusterInfo,
    ClusterRebalance,
    ClusterRecover,
    ClusterReplace,
    ClusterStatus,
    PartitionInfo,
    PartitionStatus,
    StatusResult,
    StoreInfo,
    StoreStatus,
)
from tallymark_runtime.assignments import (
    ASSIGNMENTS,
    NO_LEADER,
    Assignment,
    Draining,
    assignment_key,
    draining_key,
)
from tallymark_runtime.catalog import Node, decode_value
from tallymark_runtime.clock import Clock
from tallymark_runtime.coordinator.port import Coordinator, Delete, KeyValue, Operation, Put, unchanged
from tallymark_runtime.epochs import raise_base, read_base
from tallymark_runtime.peer import PeerClient
from tallymark_runtime.placement import PLACEMENT, Placement, store_nodes
from tallymark_runtime.planner import StoreNode, drained, moves, rebalanced, replaced
from tallymark_runtime.transport import call_deadline

_log = logging.getLogger(__name__)

_ATTEMPTS_MAX: Final = 8  # of a change that others keep getting in the way of
_NEAR_MAX: Final = 3  # similar names that an error tells
_ASK_S: Final = 2.0  # how long a store may take to say what it holds
_SPARE: Final = 0.25  # of a caller's time: kept for telling it that the coordinator took the rest
_SPARE_S_MAX: Final = 1.0
_PER_TXN: Final = limits.COORDINATOR_OPERATIONS_MAX - 2  # assignments, beside the placement and a mark

ClusterCall = ClusterStatus | ClusterDrain | ClusterRebalance | ClusterReplace | ClusterRecover


class _Picture(msgspec.Struct, frozen=True):
    """The cluster as the coordinator has it. Read in this order, so that what is older can't overwrite newer."""

    placement_item: KeyValue
    placement: Placement
    current: dict[int, Assignment]
    stores: list[StoreNode]
    nodes: dict[str, Node]  # registered stores

    @property
    def names(self) -> list[str]:
        """Every store that there is, or that holds something, or that is to hold nothing."""
        assigned = {name for item in self.current.values() for name in item.nodes}
        return sorted(assigned | {store.node_id for store in self.stores})


class _Change(msgspec.Struct, frozen=True):
    """A change that was planned."""

    wished: dict[int, Assignment]
    mark: Operation | None = None  # of a store, as draining or not
    replication_factor: int = 0  # 0: as it was


class ClusterAdmin:
    """Answers the Cluster calls. Close it at the end."""

    def __init__(self, coordinator: Coordinator, clock: Clock, rng: random.Random, *, software: str) -> None:
        self._coordinator = coordinator
        self._clock = clock
        self._rng = rng
        self._software = software
        self._peers: dict[str, PeerClient] = {}  # by address

    async def close(self) -> None:
        """Let go of the connections to stores."""
        peers, self._peers = list(self._peers.values()), {}
        for peer in peers:
            await peer.close()

    async def answer(self, call: ClusterCall) -> ClusterInfo | ClusterChange:
        """Carry out one call. Raises what the methods below raise."""
        match call:
            case ClusterStatus():
                return await self.status()
            case ClusterDrain():
                return await (self.undrain(call.node_id) if call.undo else self.drain(call.node_id))
            case ClusterRebalance():
                return await self.rebalance(call.replication_factor)
            case ClusterReplace():
                return await self.replace(call.node_id, call.successor)
            case ClusterRecover():
                return await self.recover()

    # ------------------------------------------------------------ looking

    async def status(self) -> ClusterInfo:
        """What the stores say, beside what is wished.

        Raises:
            UnavailableError: the coordinator can't be reached, or the cluster was not placed yet.
        """
        picture = await self._read()
        async with _coordinating():
            base = (await read_base(self._coordinator)).base
        answers = await self._ask_stores(picture)
        partitions = [
            _partition(
                p, picture.current[p], {n: a for n, a in answers.items() if isinstance(a, StatusResult)}
            )
            for p in sorted(picture.current)
        ]
        known = {store.node_id: store for store in picture.stores}
        zones = {
            n: z for item in picture.current.values() for n, z in zip(item.nodes, item.zones, strict=False)
        }
        stores = []
        for name in picture.names:
            store = known.get(name, StoreNode(name, is_alive=False))
            answer = answers.get(name)
            told = answer if isinstance(answer, StatusResult) else None
            stores.append(
                StoreInfo(
                    node_id=name,
                    address=picture.nodes[name].address if name in picture.nodes else "",
                    zone=store.zone if store.is_alive else zones.get(name, ""),
                    is_up=store.is_alive,
                    is_draining=store.is_draining,
                    wished=sum(name in item.nodes for item in picture.current.values()),
                    held=sum(name in item.members for item in partitions),
                    led=sum(name == item.leader for item in partitions),
                    error=answer if isinstance(answer, str) else "",
                    log_bytes=told.log_bytes if told else 0,
                    is_full=bool(told and told.log_full),
                )
            )
        return ClusterInfo(stores, partitions, picture.placement.replication_factor, base)

    async def _ask_stores(self, picture: _Picture) -> dict[str, StatusResult | str]:
        """What every registered store holds, or why it didn't say."""
        addresses = {node.address for node in picture.nodes.values()}
        for address in [address for address in self._peers if address not in addresses]:
            await self._peers.pop(address).close()
        names = sorted(picture.nodes)
        answers = await asyncio.gather(*(self._ask(picture.nodes[name].address) for name in names))
        return dict(zip(names, answers, strict=True))

    async def _ask(self, address: str) -> StatusResult | str:
        try:
            if address not in self._peers:
                self._peers[address] = PeerClient(address, rng=self._rng, software=self._software)
            return await self._peers[address].call(StoreStatus(), StatusResult, timeout_s=_ASK_S)
        except (TallymarkError, ValueError) as error:
            return str(error)

    # ------------------------------------------------------------ changing

    async def drain(self, node_id: str) -> ClusterChange:
        """Move everything off a store and give it nothing more, until `undrain`.

        Raises:
            NotFoundError: there is no such store.
            InvalidRequestError: the other stores are too few for all copies; nothing was changed.
            UnavailableError: the coordinator can't be reached, others keep changing the cluster, or it was not placed
                yet.
        """

        def plan(picture: _Picture) -> _Change:
            _check_known(picture, node_id)
            mark = Put(draining_key(node_id), msgspec.msgpack.encode(Draining()))
            return _Change(drained(_marked(picture, node_id), picture.current), mark)

        return await self._change(plan)

    async def undrain(self, node_id: str) -> ClusterChange:
        """Let a store be given copies again; it gets them by the next rebalance. Raises what `drain` does."""

        def plan(picture: _Picture) -> _Change:
            if not any(store.node_id == node_id and store.is_draining for store in picture.stores):
                _check_known(picture, node_id)
            return _Change(picture.current, Delete(draining_key(node_id)))

        return await self._change(plan)

    async def rebalance(self, replication_factor: int = 0) -> ClusterChange:
        """Spread copies and leaderships evenly, and with a number change how many copies each partition has.

        Raises what `drain` does.
        """
        if not 0 <= replication_factor <= limits.REPLICAS_MAX:
            raise InvalidRequestError(
                f"a partition has 1 to {limits.REPLICAS_MAX} copies, not {replication_factor}"
            )

        def plan(picture: _Picture) -> _Change:
            copies = replication_factor or picture.placement.replication_factor
            wished = rebalanced(picture.stores, picture.current, replication_factor=copies)
            return _Change(wished, replication_factor=copies)

        return await self._change(plan)

    async def replace(self, node_id: str, successor: str = "") -> ClusterChange:
        """Move a store's copies to a successor, or to whom they suit; the store, up or gone, gets nothing more.

        Raises what `drain` does; NotFoundError also where the successor isn't up.
        """

        def plan(picture: _Picture) -> _Change:
            _check_known(picture, node_id)
            mark = Put(draining_key(node_id), msgspec.msgpack.encode(Draining(successor)))
            return _Change(replaced(picture.stores, picture.current, node_id, successor), mark)

        return await self._change(plan)

    async def recover(self) -> ClusterChange:
        """Raise the epoch base, after the coordinator was restored from a backup; see `epochs`.

        Raises:
            InvalidRequestError: this gateway's clock can't be right.
            UnavailableError: the coordinator can't be reached.
        """
        seen = 0
        try:
            answers = await self._ask_stores(await self._read())
        except UnavailableError:
            answers = {}  # nothing needs to be known of the stores; what they know is a check of the clock
        for answer in answers.values():
            if isinstance(answer, StatusResult):
                seen = max([seen, *(partition.epoch for partition in answer.partitions)])
        before, after = await raise_base(self._coordinator, self._clock.now_ns(), seen=seen)
        _log.warning("the epoch base was raised from %d to %d", before, after)
        return ClusterChange([], epoch_base=after)

    async def _change(self, plan: Callable[[_Picture], _Change]) -> ClusterChange:
        """Plan a change and write it; again where somebody else changed something meanwhile."""
        for _ in range(_ATTEMPTS_MAX):
            picture = await self._read()
            # Of a large cluster it takes a while: the loop has other things to do meanwhile.
            change = await asyncio.to_thread(plan, picture)
            if await self._write(picture, change):
                found = moves(picture.current, change.wished)
                leaders = [
                    (p, before.nodes[0], change.wished[p].nodes[0])
                    for p, before in sorted(picture.current.items())
                    if before.nodes[0] != change.wished[p].nodes[0]
                ]
                _log.info("%d copies and %d leaderships will move", len(found), len(leaders))
                return ClusterChange([(m.partition, m.source, m.target) for m in found], leaders)
        raise UnavailableError("the cluster is being changed by others at the same time")

    async def _write(self, picture: _Picture, change: _Change) -> bool:
        """Write a change; False if somebody else was faster.

        What was written of it until then is a wish like any other: the next plan starts from there.
        """
        placement = picture.placement
        if change.replication_factor:
            placement = msgspec.structs.replace(placement, replication_factor=change.replication_factor)
        changed = [p for p in sorted(change.wished) if change.wished[p] != picture.current[p]]
        fence = unchanged(picture.placement_item)
        first: list[Operation] = [Put(PLACEMENT, msgspec.msgpack.encode(placement))]
        if change.mark is not None:
            first.append(change.mark)
        while True:
            group, changed = changed[:_PER_TXN], changed[_PER_TXN:]
            puts = [Put(assignment_key(p), msgspec.msgpack.encode(change.wished[p])) for p in group]
            result = await self._coordinator.txn([fence], [*first, *puts])
            if not result.succeeded:
                return False
            if not changed:
                return True
            if first:
                fence = msgspec.structs.replace(fence, operand=result.revision)
                first = []

    async def _read(self) -> _Picture:
        async with _coordinating():
            # The placement comes first: whatever changes after it was read makes the transactions fail.
            item = await self._coordinator.get(PLACEMENT)
            wishes = (await self._coordinator.range(ASSIGNMENTS)).items
            stores, nodes = await store_nodes(self._coordinator)
        if item is None:
            raise UnavailableError("the cluster has not been placed yet: too few of its stores are up")
        placement = decode_value(Placement, item)
        current = {}
        for wish in wishes:
            name = wish.key[len(ASSIGNMENTS) :]
            if name.isdigit():
                current[int(name)] = decode_value(Assignment, wish)
        if len(current) != len(placement.assignments):
            raise UnavailableError("the cluster is being placed: not every partition is assigned yet")
        return _Picture(item, placement, current, stores, nodes)


@contextlib.asynccontextmanager
async def _coordinating() -> AsyncIterator[None]:
    """Read from the coordinator; if it can't be reached, say so while the caller still listens.

    Raises:
        UnavailableError: it can't be reached, or takes so long that the caller's time is nearly up.
    """
    now = asyncio.get_running_loop().time()
    deadline = call_deadline(default=None)
    until = None if deadline is None else deadline - min((deadline - now) * _SPARE, _SPARE_S_MAX)
    try:
        async with asyncio.timeout_at(until):
            yield
    except TimeoutError:
        raise UnavailableError("the coordinator can't be reached: no answer in time") from None
    except UnavailableError as error:
        raise UnavailableError(
            f"the coordinator can't be reached: {error}", code=error.code, retriable=error.retriable
        ) from error


def _marked(picture: _Picture, node_id: str) -> list[StoreNode]:
    """The stores with one of them draining, whether it is registered or not."""
    others = [store for store in picture.stores if store.node_id != node_id]
    own = next((store for store in picture.stores if store.node_id == node_id), None)
    return [*others, StoreNode(node_id, own.zone if own else "", True, own is not None and own.is_alive)]


def _check_known(picture: _Picture, node_id: str) -> None:
    names = picture.names
    if node_id not in names:
        near = difflib.get_close_matches(node_id, names, n=_NEAR_MAX)
        hint = f"; did you mean {' or '.join(repr(name) for name in near)}?" if near else ""
        raise NotFoundError(f"there is no store {node_id!r:.80}{hint}", details={"near": near})


def _partition(number: int, wish: Assignment, answers: dict[str, StatusResult]) -> PartitionInfo:
    """A partition as its leader tells; where nobody leads, as the copy tells that knows most."""
    told: list[tuple[str, PartitionStatus]] = [
        (name, status)
        for name, answer in sorted(answers.items())
        for status in answer.partitions
        if status.partition == number
    ]
    leading = [item for item in told if item[1].role == "leader"]
    best = _most_advanced(leading) or _most_advanced(told)
    if best is None:
        return PartitionInfo(number, list(wish.nodes), [], "", error="no store that is up has a copy of it")
    name, status = best
    members = [member for member, _ in status.members]
    down = sorted(member for member in members if member not in answers)
    majority = len(members) // 2 + 1
    lacks_majority = not leading and bool(members) and len(members) - len(down) < majority
    errors = [
        f"{other}: {item.error}"
        for other, item in told
        # What becomes of each candidacy changes with every try; that the majority is missing is the reason of all.
        if item.error and not (lacks_majority and item.error.startswith(NO_LEADER))
    ]
    if lacks_majority:
        errors.insert(0, f"{majority} of {len(members)} copies needed; down: {', '.join(down)}")
    return PartitionInfo(
        partition=number,
        wished=list(wish.nodes),
        members=members,
        leader=name if leading else "",
        epoch=status.epoch,
        log_end=status.log_end,
        high_watermark=status.high_watermark,
        lags=dict(status.lags),
        error="; ".join(errors),
    )


def _most_advanced(told: Sequence[tuple[str, PartitionStatus]]) -> tuple[str, PartitionStatus] | None:
    """Of two that both say to lead, the one of the higher epoch does."""
    return max(told, key=lambda item: (item[1].epoch, item[1].high_watermark, item[1].log_end), default=None)
