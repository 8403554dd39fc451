"""Administration of the cluster: planned and written whole, whoever else writes, and shown as the stores tell it."""

from __future__ import annotations

import asyncio
import contextlib
import random
from typing import Any

import msgspec
import pytest
from grpclib.const import Status
from grpclib.exceptions import GRPCError
from grpclib.testing import ChannelFor

from tallymark_ingest import ServerConfig, serve
from tallymark_ingest.cluster_admin import ClusterAdmin
from tallymark_ingest.cluster_grpc import ClusterService
from tallymark_protocol.errors import InvalidRequestError, NotFoundError, UnavailableError
from tallymark_protocol.messages import (
    PROTOCOL_VERSION,
    ClusterChange,
    ClusterDrain,
    ClusterInfo,
    ClusterRebalance,
    ClusterRecover,
    ClusterReplace,
    ClusterStatus,
    PartitionStatus,
    StatusResult,
    StoreStatus,
    Welcome,
)
from tallymark_runtime.assignments import ASSIGNMENTS, DRAINING, Assignment, assignment_key
from tallymark_runtime.catalog import EPOCH_BASE, Node, decode_value, node_key
from tallymark_runtime.clock import RealClock
from tallymark_runtime.coordinator import MemoryCoordinator
from tallymark_runtime.generated.tallymark.cluster import v1 as grpc
from tallymark_runtime.generated.tallymark.cluster.v1 import ClusterStub
from tallymark_runtime.peer import PeerClient
from tallymark_runtime.placement import (
    PLACEMENT,
    Placement,
    establish_assignments,
)
from tallymark_runtime.transport import FrameServer, HandlerBase

encode = msgspec.msgpack.encode


class FakeStore(HandlerBase):
    """Answers StoreStatus by what the fake cluster says it holds."""

    def __init__(self, cluster: FakeCluster, name: str) -> None:
        self.cluster = cluster
        self.name = name
        self.server = FrameServer(self, lambda: Welcome(PROTOCOL_VERSION, name, "store", 0))

    async def on_call(self, connection: Any, call: Any) -> Any:
        assert isinstance(call, StoreStatus)
        held = [p for p, members in self.cluster.members.items() if self.name in members]
        return StatusResult(self.name, [self.status(p) for p in held], log_bytes=7, log_full=False)

    def status(self, p: int) -> PartitionStatus:
        cluster = self.cluster
        leads = cluster.leaders[p] == self.name
        members = [(name, f"{name}{p}") for name in cluster.members[p]]
        return PartitionStatus(
            partition=p,
            epoch=cluster.epochs.get((p, self.name), 5),
            log_end=10 + leads,
            high_watermark=9,
            applied=8,
            error=cluster.errors.get((p, self.name), ""),
            role="leader" if leads or (p, self.name) in cluster.epochs else "follower",
            leader=cluster.leaders[p],
            members=members,
            lags={name: 3 for name, _ in members if name != self.name} if leads else {},
        )


class FakeCluster:
    """A coordinator and some stores that do what is wished when told to."""

    def __init__(self, stack: contextlib.AsyncExitStack) -> None:
        self.stack = stack
        self.coordinator = MemoryCoordinator(RealClock())
        self.admin = self.make_admin()
        self.stores: dict[str, FakeStore] = {}
        self.members: dict[int, list[str]] = {}
        self.leaders: dict[int, str] = {}
        self.epochs: dict[tuple[int, str], int] = {}  # of stores that believe to lead
        self.errors: dict[tuple[int, str], str] = {}

    def make_admin(self, coordinator: Any = None) -> ClusterAdmin:
        admin = ClusterAdmin(
            coordinator or self.coordinator, RealClock(), random.Random(1), software="gateway"
        )
        self.stack.push_async_callback(admin.close)
        return admin

    async def add(self, name: str, zone: str = "") -> None:
        store = self.stores[name] = FakeStore(self, name)
        address = await store.server.start()
        self.stack.push_async_callback(store.server.close, deadline_s=0.0)
        await self.coordinator.put(
            node_key("store", name), encode(Node(name, address, "store", zone)), lease=0
        )

    async def remove(self, name: str) -> None:
        await self.coordinator.delete(node_key("store", name))

    async def place(self, partitions: int, copies: int) -> None:
        assert await establish_assignments(self.coordinator, partitions, copies)
        await self.obey()

    async def wishes(self) -> dict[int, Assignment]:
        items = (await self.coordinator.range(ASSIGNMENTS)).items
        return {int(item.key[len(ASSIGNMENTS) :]): decode_value(Assignment, item) for item in items}

    async def obey(self) -> None:
        """The partitions' leaders carry the wishes out."""
        for p, wish in (await self.wishes()).items():
            self.members[p] = list(wish.nodes)
            self.leaders[p] = wish.nodes[0]

    async def draining(self) -> list[str]:
        items = (await self.coordinator.range(DRAINING)).items
        return [item.key[len(DRAINING) :].decode() for item in items]


@pytest.fixture
async def cluster():
    """A fake cluster without stores."""
    async with contextlib.AsyncExitStack() as stack:
        made = FakeCluster(stack)
        stack.push_async_callback(made.coordinator.close)
        yield made


async def test_a_cluster_that_is_not_placed_is_unavailable(cluster):
    """Before there are enough stores nothing can be said or changed, but that may pass."""
    for call in (ClusterStatus(), ClusterDrain("a"), ClusterRebalance(), ClusterReplace("a")):
        with pytest.raises(UnavailableError, match="not been placed") as caught:
            await cluster.admin.answer(call)
        assert caught.value.retriable


async def test_status_is_what_leaders_say(cluster):
    """Stores with their loads, partitions with their leader's word; everything in its place."""
    for name in "abc":
        await cluster.add(name, f"z{name}")
    await cluster.place(6, 2)
    info = await cluster.admin.status()
    assert [(s.node_id, s.zone, s.is_up, s.is_draining, s.wished, s.held, s.led) for s in info.stores] == [
        (name, f"z{name}", True, False, 4, 4, 2) for name in "abc"
    ]
    assert info.replication_factor == 2
    assert info.epoch_base == 0
    assert all(item.is_settled for item in info.partitions)
    first = info.partitions[0]
    (follower,) = set(first.members) - {first.leader}
    assert (first.epoch, first.log_end, first.high_watermark, first.lags) == (5, 11, 9, {follower: 3})
    assert {s.log_bytes for s in info.stores} == {7}


async def test_of_two_who_say_to_lead_the_higher_epoch_does(cluster):
    """A deposed leader that doesn't know it yet is not believed."""
    for name in "ab":
        await cluster.add(name)
    await cluster.place(1, 2)
    other = "ab".replace(cluster.leaders[0], "")
    cluster.epochs[0, other] = 4
    assert (await cluster.admin.status()).partitions[0].leader == cluster.leaders[0]
    cluster.epochs[0, other] = 6
    assert (await cluster.admin.status()).partitions[0].leader == other


async def test_stores_that_are_away_or_silent_are_said_to_be(cluster):
    """One that isn't registered is down; one that doesn't answer says why; a partition without leader says so."""
    for name in "ab":
        await cluster.add(name, f"z{name}")
    await cluster.place(2, 2)
    await cluster.stores["a"].server.close(deadline_s=0.0)
    await cluster.remove("b")
    info = await cluster.admin.status()
    a, b = info.stores
    assert a.is_up
    assert "can't connect" in a.error
    assert not b.is_up
    assert b.address == ""
    assert b.zone == "zb"
    assert b.wished == 2
    assert [(p.leader, p.members, p.is_placed) for p in info.partitions] == [("", [], False)] * 2
    assert "no store that is up" in info.partitions[0].error


async def test_errors_of_copies_are_told_with_the_store(cluster):
    """What is wrong with a copy stands at its partition."""
    for name in "ab":
        await cluster.add(name)
    await cluster.place(1, 2)
    cluster.errors[0, "b"] = "bytes 5 to 9 are damaged"
    assert (await cluster.admin.status()).partitions[0].error == "b: bytes 5 to 9 are damaged"


async def test_a_drained_store_ends_empty(cluster):
    """The wish names it nowhere, the mark keeps it so, and status shows the way."""
    for name in "abcd":
        await cluster.add(name)
    await cluster.place(8, 3)
    change = await cluster.admin.drain("b")
    assert len(change.moves) == 6
    assert {source for _, source, _ in change.moves} == {"b"}
    assert {source for _, source, _ in change.leaders} == {"b"}
    before = next(s for s in (await cluster.admin.status()).stores if s.node_id == "b")
    assert (before.is_draining, before.wished, before.held) == (True, 0, 6)
    await cluster.obey()
    after = await cluster.admin.status()
    assert [(s.wished, s.held) for s in after.stores] == [(8, 8), (0, 0), (8, 8), (8, 8)]
    assert (await cluster.admin.rebalance()).moves == []
    assert (await cluster.admin.drain("b")).moves == []  # again is nothing, and no error
    assert await cluster.draining() == ["b"]


async def test_an_undrained_store_gets_its_share_by_a_rebalance(cluster):
    """Undrain moves nothing; the rebalance after it does."""
    for name in "abcd":
        await cluster.add(name)
    await cluster.place(8, 3)
    await cluster.admin.drain("b")
    undone = await cluster.admin.undrain("b")
    assert undone.moves == []
    assert undone.leaders == []
    assert await cluster.draining() == []
    change = await cluster.admin.rebalance()
    assert len(change.moves) == 6
    assert {target for _, _, target in change.moves} == {"b"}


async def test_a_drain_that_would_leave_too_few_is_refused_whole(cluster):
    """Neither the wish nor the mark is written, and the next call finds everything as it was."""
    for name in "abc":
        await cluster.add(name)
    await cluster.place(4, 3)
    before = await cluster.wishes()
    for call in (ClusterDrain("a"), ClusterReplace("a"), ClusterRebalance(4), ClusterReplace("a", "a")):
        with pytest.raises(InvalidRequestError):
            await cluster.admin.answer(call)
    with pytest.raises(InvalidRequestError, match="1 to 7 copies"):
        await cluster.admin.rebalance(8)
    assert await cluster.wishes() == before
    assert await cluster.draining() == []


async def test_an_unknown_store_is_not_found(cluster):
    """The error names those that may have been meant."""
    for name in ("store-1", "store-2"):
        await cluster.add(name)
    await cluster.place(2, 1)
    for call in (
        ClusterDrain("store-3"),
        ClusterDrain("store-3", undo=True),
        ClusterReplace("store-3"),
    ):
        with pytest.raises(NotFoundError, match="did you mean 'store-2' or 'store-1'"):
            await cluster.admin.answer(call)
    with pytest.raises(NotFoundError, match="'other'"):
        await cluster.admin.replace("store-1", "other")
    assert await cluster.draining() == []


async def test_a_store_that_is_gone_can_be_replaced(cluster):
    """Its copies go to the successor; it gets nothing more if it comes back."""
    for name in "abc":
        await cluster.add(name)
    await cluster.place(6, 3)
    await cluster.remove("b")
    assert (await cluster.admin.rebalance()).moves == []  # it might come back
    await cluster.add("d")
    change = await cluster.admin.replace("b", "d")
    assert sorted(change.moves) == [(p, "b", "d") for p in range(6)]
    await cluster.obey()
    names = {s.node_id: (s.is_up, s.is_draining, s.held) for s in (await cluster.admin.status()).stores}
    assert names == {
        "a": (True, False, 6),
        "b": (False, True, 0),
        "c": (True, False, 6),
        "d": (True, False, 6),
    }
    await cluster.add("b")
    assert (await cluster.admin.rebalance()).moves == []
    await cluster.admin.undrain("b")
    assert len((await cluster.admin.rebalance()).moves) == 4


async def test_the_number_of_copies_is_remembered(cluster):
    """A rebalance with a number keeps it for the next ones."""
    for name in "abc":
        await cluster.add(name)
    await cluster.place(4, 1)
    assert len((await cluster.admin.rebalance(3)).moves) == 8
    assert {len(wish.nodes) for wish in (await cluster.wishes()).values()} == {3}
    assert (await cluster.admin.rebalance()).moves == []
    assert (await cluster.admin.status()).replication_factor == 3
    assert await establish_assignments(cluster.coordinator, 4, 1)  # a store that starts changes nothing
    assert (await cluster.admin.status()).replication_factor == 3


async def test_more_partitions_than_a_transaction_holds(cluster):
    """256 partitions of which all change: written in parts, all of them."""
    for name in "ab":
        await cluster.add(name)
    await cluster.place(256, 1)
    await cluster.admin.drain("a")
    assert {wish.nodes for wish in (await cluster.wishes()).values()} == {("b",)}


class Interrupting:
    """A coordinator in which something happens before the n-th transaction, or which is away from then on."""

    def __init__(self, inner: MemoryCoordinator, at: int, what: Any) -> None:
        self.inner = inner
        self.left = at
        self.what = what

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    async def txn(self, *arguments: Any) -> Any:
        self.left -= 1
        if self.left == 0:
            await self.what()
        return await self.inner.txn(*arguments)


@pytest.mark.parametrize("at", [1, 2, 3])
async def test_changes_exclude_each_other(cluster, at):
    """Another gateway drains another store in the middle: both end empty, whatever was written when."""
    for name in "abcd":
        await cluster.add(name)
    await cluster.place(256, 1)
    other = cluster.make_admin()
    done = []

    async def meanwhile():
        done.append(await other.drain("b"))

    admin = cluster.make_admin(Interrupting(cluster.coordinator, at, meanwhile))
    await admin.drain("a")
    if not done:
        await other.drain("b")
    used = {name for wish in (await cluster.wishes()).values() for name in wish.nodes}
    assert used == {"c", "d"}
    assert await cluster.draining() == ["a", "b"]


async def test_two_drains_never_leave_too_few_stores(cluster):
    """Each alone would be possible; the second is refused, and its store isn't marked."""
    for name in "abc":
        await cluster.add(name)
    await cluster.place(4, 2)
    other = cluster.make_admin()
    admin = cluster.make_admin(Interrupting(cluster.coordinator, 1, lambda: other.drain("b")))
    with pytest.raises(InvalidRequestError, match="add stores first"):
        await admin.drain("a")
    assert await cluster.draining() == ["b"]
    assert all(sorted(wish.nodes) == ["a", "c"] for wish in (await cluster.wishes()).values())


async def test_a_gateway_that_ends_in_the_middle_leaves_a_wish_to_complete(cluster):
    """Half of the wishes are written when the coordinator goes away; the same call again completes them."""
    for name in "abc":
        await cluster.add(name)
    await cluster.place(256, 2)

    async def away():
        raise UnavailableError("away")

    with pytest.raises(UnavailableError):
        await cluster.make_admin(Interrupting(cluster.coordinator, 2, away)).drain("a")
    left = [p for p, wish in (await cluster.wishes()).items() if "a" in wish.nodes]
    assert 0 < len(left) < 171
    assert await cluster.draining() == ["a"]
    change = await cluster.admin.drain("a")
    assert [p for p, _, _ in change.moves] == left
    assert not any("a" in wish.nodes for wish in (await cluster.wishes()).values())


async def test_a_change_others_keep_getting_in_the_way_of_ends(cluster):
    """Bounded: an error that may pass, and the number of copies as it was."""
    for name in "ab":
        await cluster.add(name)
    await cluster.place(4, 1)

    async def touch():
        interrupting.left = 1
        item = await cluster.coordinator.get(PLACEMENT)
        await cluster.coordinator.put(PLACEMENT, item.value)

    interrupting = Interrupting(cluster.coordinator, 1, touch)
    with pytest.raises(UnavailableError, match="by others"):
        await cluster.make_admin(interrupting).rebalance(2)
    assert decode_value(Placement, await cluster.coordinator.get(PLACEMENT)).replication_factor == 1
    assert {len(wish.nodes) for wish in (await cluster.wishes()).values()} == {1}


async def test_recovery_raises_the_base(cluster):
    """By the clock, above what stores know, with or without stores; a store ahead of the clock stops it."""
    change = await cluster.admin.recover()
    assert 2**50 < change.epoch_base < 2**52
    for name in "ab":
        await cluster.add(name)
    await cluster.place(1, 2)
    again = await cluster.admin.recover()
    assert again.epoch_base > change.epoch_base
    assert (await cluster.admin.status()).epoch_base == again.epoch_base
    cluster.epochs[0, "a"] = 2**60
    item = await cluster.coordinator.get(EPOCH_BASE)
    with pytest.raises(InvalidRequestError, match="clock is wrong"):
        await cluster.admin.recover()
    assert await cluster.coordinator.get(EPOCH_BASE) == item


async def test_an_assignment_is_never_lost_to_a_late_founding(cluster):
    """A store that starts after a change completes nothing that was changed."""
    for name in "abc":
        await cluster.add(name)
    await cluster.place(6, 1)
    await cluster.admin.drain("a")
    before = await cluster.wishes()
    await establish_assignments(cluster.coordinator, 6, 1)
    assert await cluster.wishes() == before
    await cluster.coordinator.delete(assignment_key(3))
    with pytest.raises(UnavailableError, match="being placed"):
        await cluster.admin.rebalance()


async def test_a_gateway_answers_the_calls(cluster):
    """Over sockets, as the command sends them: status, a change, an error."""
    for name in "abcd":
        await cluster.add(name)
    await cluster.place(4, 3)
    config = ServerConfig(node_id="gateway-1", partition_count=4)
    gateway = await serve(config, cluster.coordinator, RealClock(), random.Random(2))
    cluster.stack.push_async_callback(gateway.close, deadline_s=0.0)
    client = PeerClient(gateway.address, rng=random.Random(3))
    cluster.stack.push_async_callback(client.close)
    assert len((await client.call(ClusterStatus(), ClusterInfo)).stores) == 4
    assert len((await client.call(ClusterDrain("a"), ClusterChange)).moves) == 3
    assert (await client.call(ClusterDrain("a", undo=True), ClusterChange)).moves == []
    assert len((await client.call(ClusterRebalance(), ClusterChange)).moves) == 3
    with pytest.raises(NotFoundError):
        await client.call(ClusterReplace("x"), ClusterChange)
    assert (await client.call(ClusterRecover(), ClusterChange)).epoch_base > 2**50


async def test_grpc_tells_the_same(cluster):
    """Each call over gRPC gives what the frame call gives, errors by their gRPC status."""
    for name in "abcd":
        await cluster.add(name, "z")
    await cluster.place(4, 3)
    async with ChannelFor([ClusterService(cluster.admin)]) as channel:
        stub = ClusterStub(channel)
        told = await stub.status(grpc.StatusRequest())
        assert told.is_settled
        assert told.replication_factor == 3
        info = await cluster.admin.status()
        for mine, theirs in zip(info.stores + info.partitions, told.stores + told.partitions, strict=True):
            for field in mine.__struct_fields__:
                assert getattr(mine, field) == getattr(theirs, field)
        change = await stub.drain(grpc.DrainRequest(node_id="a"))
        wishes = await cluster.wishes()
        assert [m.source for m in change.moves] == ["a"] * 3
        assert all(m.target in wishes[m.partition].nodes for m in change.moves)
        assert [m.source for m in change.leaders] == ["a"]
        assert not (await stub.status(grpc.StatusRequest())).is_settled
        assert (await stub.drain(grpc.DrainRequest(node_id="a", undo=True))).moves == []
        assert len((await stub.rebalance(grpc.RebalanceRequest())).moves) == 3
        assert (await stub.replace(grpc.ReplaceRequest(node_id="b", successor="a"))).moves
        assert (await stub.recover(grpc.RecoverRequest())).epoch_base > 2**50
        refused = {
            Status.NOT_FOUND: grpc.DrainRequest(node_id="x"),
            Status.FAILED_PRECONDITION: grpc.DrainRequest(node_id="c"),
        }
        for status, request in refused.items():
            with pytest.raises(GRPCError) as caught:
                await stub.drain(request)
            assert caught.value.status is status
        await cluster.coordinator.delete(PLACEMENT)
        with pytest.raises(GRPCError) as caught:
            await stub.status(grpc.StatusRequest())
        assert caught.value.status is Status.UNAVAILABLE


async def test_many_ask_at_once(cluster):
    """Lookers-on share connections to the stores, and a store that went away is let go of."""
    for name in "ab":
        await cluster.add(name)
    await cluster.place(2, 1)
    infos = await asyncio.gather(*(cluster.admin.status() for _ in range(20)))
    assert all(info == infos[0] for info in infos)
    await cluster.remove("a")
    info = await cluster.admin.status()
    assert [store.is_up for store in info.stores] == [False, True]


async def test_without_a_majority_the_stores_that_are_missing_are_named(cluster):
    """What a lone copy tries matters to nobody; damage does. With a majority, what keeps it from leading does."""
    for name in "abc":
        await cluster.add(name)
    await cluster.place(1, 3)
    cluster.leaders[0] = ""
    cluster.errors[0, "c"] = "no leader is known: the leader key was created"
    assert (await cluster.admin.status()).partitions[0].error == f"c: {cluster.errors[0, 'c']}"
    await cluster.remove("a")
    await cluster.stores["b"].server.close(deadline_s=0.0)
    found = (await cluster.admin.status()).partitions[0]
    assert (found.leader, found.error) == ("", "2 of 3 copies needed; down: a, b")
    cluster.errors[0, "c"] = "bytes 5 to 9 are damaged"
    found = (await cluster.admin.status()).partitions[0]
    assert found.error == "2 of 3 copies needed; down: a, b; c: bytes 5 to 9 are damaged"


async def test_a_coordinator_that_is_away_is_told_while_the_caller_listens(cluster, monkeypatch):
    """Whether it refuses or keeps silent: the answer is an error that may pass, and says what is away."""
    await cluster.add("a")
    await cluster.place(1, 1)
    config = ServerConfig(node_id="gateway-1", partition_count=1)
    gateway = await serve(config, cluster.coordinator, RealClock(), random.Random(2))
    cluster.stack.push_async_callback(gateway.close, deadline_s=0.0)
    client = PeerClient(gateway.address, rng=random.Random(3))
    cluster.stack.push_async_callback(client.close)

    async def refuse(key: bytes) -> Any:
        raise UnavailableError("no member answers")

    async def keep_silent(key: bytes) -> Any:
        await asyncio.Event().wait()

    monkeypatch.setattr(cluster.coordinator, "get", refuse)
    for call, answer in ((ClusterStatus(), ClusterInfo), (ClusterDrain("a"), ClusterChange)):
        with pytest.raises(UnavailableError, match="the coordinator can't be reached: no member") as caught:
            await client.call(call, answer)
        assert caught.value.retriable
    monkeypatch.setattr(cluster.coordinator, "get", keep_silent)
    with pytest.raises(UnavailableError, match="the coordinator can't be reached: no answer") as caught:
        await client.call(ClusterStatus(), ClusterInfo, timeout_s=2.0)
    assert caught.value.retriable
