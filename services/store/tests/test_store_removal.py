"""Copies that leaders have removed: discarded once nobody counts on them, and never else; and keys nobody leads by."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from tallymark_protocol.identifiers import encode_event_id
from tallymark_runtime.assignments import Copy, copy_key
from tallymark_runtime.catalog import Leader, decode_value, leader_key
from tallymark_runtime.coordinator import Delete, Put
from tallymark_store import coordination as coordination_module
from tallymark_store import warmup
from tallymark_store.coordination import Coordination
from tallymark_store.copies import Copies
from tallymark_store.replication.effects import Discarded, Role
from tallymark_store.wal import LogBusyError

from .cluster_driver import Cluster
from .payload_builder import event


@pytest.fixture(scope="module", autouse=True)
def kernels() -> None:
    """Loaded before anything has a deadline, as a store does it."""
    warmup.warm_up()


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    """Four stores of which three hold the partition; `d` is not started yet."""
    cluster = Cluster(("a", "b", "c", "d"))
    await cluster.create()
    await cluster.start("a", "b", "c")
    leader = await cluster.wait_leader()
    await cluster.append(leader, ids(10), (1, 0))
    yield cluster
    await cluster.close()


def ids(n: int, first: int = 0) -> list[dict[str, Any]]:
    return [event(1, "sum", value=i, id=encode_event_id(first + i)) for i in range(n)]


def registration(cluster: Cluster, name: str) -> Copy | None:
    item = cluster.coordinator._state.get(copy_key(0, name))
    return None if item is None else decode_value(Copy, item)


def is_marked(cluster: Cluster, name: str) -> bool:
    copy = registration(cluster, name)
    return copy is not None and copy.is_removed


def key_holder(cluster: Cluster) -> str:
    item = cluster.coordinator._state.get(leader_key(0))
    return "" if item is None else msgspec.msgpack.decode(item.value, type=Leader).node_id


async def wait_members(cluster: Cluster, *names: str) -> None:
    """The leader's log has these members, and that is committed."""

    def there() -> bool:
        leader = cluster.leader()
        replica = cluster.nodes[leader].store.replicas[0] if leader else None
        return (
            replica is not None
            and {member.node_id for member in replica.membership.members} == set(names)
            and replica.membership.offset < replica.high_watermark
        )

    await cluster.until(there)


async def mark(cluster: Cluster, name: str, copy: Copy) -> None:
    await cluster.coordinator.put(copy_key(0, name), msgspec.msgpack.encode(copy))


async def removed_while_down(cluster: Cluster) -> tuple[str, list[str], str]:
    """One follower's copy is removed and marked while its node is down; (it, the others, its copy id)."""
    leader = await cluster.wait_leader()
    leaving = next(name for name in "abc" if name != leader)
    staying = [name for name in "abc" if name != leaving]
    copy_id = cluster.nodes[leaving].store.replicas[0].copy_id
    await cluster.start("d")
    cluster.kill(leaving)
    await cluster.assign(0, *staying, "d")
    await cluster.until(lambda: is_marked(cluster, leaving))
    return leaving, staying, copy_id


async def test_a_copy_that_is_a_member_again_is_kept(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was marked while its node was down, and is wished and counted again before the node reads the mark."""
    leaving, staying, copy_id = await removed_while_down(cluster)
    await cluster.assign(0, *staying, leaving)
    may_settle = asyncio.Event()
    settle = Copies._settle_removal

    async def late(self: Copies, number: int) -> bool:
        await may_settle.wait()
        return await settle(self, number)

    monkeypatch.setattr(Copies, "_settle_removal", late)
    await cluster.start(leaving)
    replica = cluster.nodes[leaving].store.replicas[0]
    await wait_members(cluster, *staying, leaving)
    await cluster.append_anywhere(ids(10, 100), (1, 1))
    assert is_marked(cluster, leaving)
    may_settle.set()
    await cluster.until(lambda: not is_marked(cluster, leaving))
    assert registration(cluster, leaving) == Copy(copy_id)
    assert cluster.nodes[leaving].store.replicas[0] is replica
    assert replica.copy_id == copy_id
    await cluster.until(lambda: 0 not in cluster.nodes["d"].store.replicas)
    await cluster.check_digests()


async def test_a_copy_that_nobody_wishes_still_is_discarded_after_its_node_was_down(cluster: Cluster) -> None:
    """The mark stands: by the last leader that the copy knows, under the wish of today."""
    leaving, staying, _ = await removed_while_down(cluster)
    await cluster.start(leaving)
    await cluster.until(lambda: 0 not in cluster.nodes[leaving].store.replicas)
    await cluster.until(lambda: registration(cluster, leaving) is None)
    assert cluster.nodes[leaving].store.partitions[0].log_end == 0
    await wait_members(cluster, *staying, "d")
    await cluster.check_digests()


async def test_a_mark_of_an_earlier_leader_is_taken_back(cluster: Cluster) -> None:
    """The copy has promised a later epoch since: its leader may count on it, whatever the wish."""
    leader = await cluster.wait_leader()
    name = next(name for name in "abc" if name != leader)
    replica = cluster.nodes[name].store.replicas[0]
    cluster.cut |= {(leader, name)}  # so that no later message of the leader changes what it knows
    await cluster.assign(0, *(other for other in "abc" if other != name))
    await mark(cluster, name, Copy(replica.copy_id, True, replica.promised - 1))
    await cluster.until(lambda: not is_marked(cluster, name))
    assert registration(cluster, name) == Copy(replica.copy_id)
    assert cluster.nodes[name].store.replicas[0] is replica


async def test_a_mark_from_before_the_wish_is_taken_back(cluster: Cluster) -> None:
    """Wished again and dropped again since: the leader of the mark may have made it a member in between."""
    leaving, staying, copy_id = await removed_while_down(cluster)
    before = registration(cluster, leaving)
    assert before is not None
    await cluster.assign(0, *staying, leaving)
    await cluster.assign(0, *staying, "d")
    taken_back: list[str] = []
    take_back = Coordination.take_back_removal

    async def spy(self: Coordination, removal: Any, registered: str) -> bool:
        taken_back.append(registered)
        return await take_back(self, removal, registered)

    Coordination.take_back_removal = spy  # type: ignore[method-assign]
    try:
        await cluster.start(leaving)
        # The leader, which knows that it is no member, marks it anew, and that mark stands.
        await cluster.until(lambda: registration(cluster, leaving) is None)
    finally:
        Coordination.take_back_removal = take_back  # type: ignore[method-assign]
    assert taken_back == [copy_id]


async def test_a_copy_says_nothing_while_it_is_asked_whether_it_may_go(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the check to the end nothing is acknowledged; where the mark does not stand it goes on as before."""
    leader = await cluster.wait_leader()
    name = next(name for name in "abc" if name != leader)
    replica = cluster.nodes[name].store.replicas[0]
    asked, may_answer = asyncio.Event(), asyncio.Event()

    async def confirm(self: Coordination, removal: Any) -> bool:
        asked.set()
        await may_answer.wait()
        return False

    monkeypatch.setattr(Coordination, "confirm_removal", confirm)
    original = cluster.nodes[name]._coordination.removal  # type: ignore[union-attr]

    async def removal(partition: int) -> Any:
        found = await original(partition)
        return found and found._replace(wish=found.item)

    monkeypatch.setattr(cluster.nodes[name]._coordination, "removal", removal)
    await mark(cluster, name, Copy(replica.copy_id, True, replica.promised))
    await asked.wait()
    before = replica.log.log_end
    await cluster.append(leader, ids(10, 100), (1, 1))
    progress = cluster.nodes[leader].store.replicas[0].followers[name]
    assert (replica.log.log_end, progress.match_end) == (before, before)
    monkeypatch.undo()
    may_answer.set()
    await cluster.until(lambda: progress.match_end > before)
    await cluster.until(lambda: not is_marked(cluster, name))
    await cluster.check_digests()


async def test_only_the_leader_of_today_removes_copies(cluster: Cluster) -> None:
    """One that was deposed, or has not heard of the wish, would go by members of yesterday."""
    leader = await cluster.wait_leader()
    node = cluster.nodes[leader]
    replica = node.store.replicas[0]
    coordination = node._coordination
    assert coordination is not None
    await mark(cluster, "d", Copy("fresh"))
    await cluster.until(lambda: coordination._copies.item(copy_key(0, "d")) is not None)
    await coordination.remove_copies(0, epoch=replica.epoch - 1, members=replica.membership)
    assert not is_marked(cluster, "d")
    # Its key goes, and the wish changes, before the transaction: what it knows is of a moment ago.
    txn = cluster.coordinator.txn
    for change in (
        Put(b"assignments/0", msgspec.msgpack.encode({"nodes": ["a", "b", "c", "d"]})),
        Delete(leader_key(0)),
    ):
        epoch = replica.epoch

        async def overtaken(*args: Any, change: Any = change) -> Any:
            cluster.coordinator.txn = txn  # type: ignore[method-assign]
            await txn([], [change])
            return await txn(*args)

        cluster.coordinator.txn = overtaken  # type: ignore[method-assign]
        await coordination.remove_copies(0, epoch=epoch, members=replica.membership)
        assert not is_marked(cluster, "d")
        await cluster.assign(0, "a", "b", "c")
        wished = await cluster.coordinator.get(b"assignments/0")
        await cluster.until(lambda wished=wished: coordination._assignments.item(b"assignments/0") == wished)


async def test_a_key_without_a_replica_is_given_up(cluster: Cluster) -> None:
    """Of an earlier life, or created for a copy that was removed meanwhile: nobody could lead while it is there."""
    await cluster.start("d")
    await cluster.wait_leader()
    node = cluster.nodes["d"]
    coordination = node._coordination
    assert coordination is not None
    assert 0 not in node.store.replicas
    old = cluster.leader()
    epoch = cluster.nodes[old].store.replicas[0].epoch
    await cluster.coordinator.delete(leader_key(0))
    coordination.create(0)
    await cluster.until(
        lambda: cluster.leader() and cluster.nodes[cluster.leader()].store.replicas[0].epoch > epoch
    )
    value = msgspec.msgpack.encode(Leader("d", "d:1", "earlier"))
    await cluster.coordinator.txn([], [Delete(leader_key(0))])
    await cluster.coordinator.txn([], [Put(leader_key(0), value)])
    await cluster.until(lambda: key_holder(cluster) not in ("", "d"))
    await cluster.append_anywhere(ids(10, 100), (1, 1))


async def test_a_copy_is_not_removed_while_it_asks_for_the_key(cluster: Cluster) -> None:
    """The key would be nobody's, and would be held for as long as the node lives."""
    await cluster.start("d")
    leader = await cluster.wait_leader()
    leaving = next(name for name in "abc" if name != leader)
    staying = [name for name in "abc" if name != leaving]
    node = cluster.nodes[leaving]
    cluster.isolate(leaving)  # from the others: it goes on to take itself for a member
    replica = node.store.replicas[0]
    coordination = node._coordination
    assert coordination is not None
    creating: list[int] = []
    coordination.create = creating.append  # type: ignore[method-assign]
    replica._creating_key = True
    await cluster.assign(0, *staying, "d")
    await cluster.until(lambda: is_marked(cluster, leaving))
    assert node._copies is not None
    assert not await node._copies._settle_removal(0)
    assert node.store.replicas[0] is replica
    # It gets the key, just when the leader has given it up: it can't lead, and lets go of it in the end.
    del coordination.create  # type: ignore[method-assign]
    await cluster.coordinator.delete(leader_key(0))
    coordination.create(0)
    await cluster.until(lambda: 0 not in node.store.replicas)
    await cluster.until(lambda: key_holder(cluster) not in ("", leaving))
    await cluster.append_anywhere(ids(10, 100), (1, 1))


async def test_a_contending_copy_gives_up_before_it_is_removed(cluster: Cluster) -> None:
    """A candidate of the epoch of the mark, or of an earlier one, resigns first."""
    leader = await cluster.wait_leader()
    name = next(name for name in "abc" if name != leader)
    node = cluster.nodes[name]
    cluster.isolate(name)
    replica = node.store.replicas[0]
    await cluster.assign(0, *(other for other in "abc" if other != name))
    node.store.replicating.call(0, replica.key_created, replica.promised + 1)
    assert replica.role is Role.CANDIDATE
    await mark(cluster, name, Copy(replica.copy_id, True, replica.promised))
    assert node._copies is not None
    assert not await node._copies._settle_removal(0)
    assert replica.role is Role.FOLLOWER
    assert node.store.replicas[0] is replica
    await cluster.until(lambda: 0 not in node.store.replicas)


async def test_a_failed_creation_is_always_answered(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever goes wrong: the replica would wait for ever, and could not give up a key either."""
    leader = await cluster.wait_leader()
    name = next(name for name in "abc" if name != leader)
    replica = cluster.nodes[name].store.replicas[0]
    coordination = cluster.nodes[name]._coordination
    assert coordination is not None

    async def defect(*_: Any) -> int:
        raise OSError("a codec's defect")

    monkeypatch.setattr(coordination_module, "create_leader_key", defect)
    replica._creating_key = True
    coordination.create(0)
    await cluster.until(lambda: not replica._creating_key)


async def test_news_reach_a_copy_whose_log_cannot_be_emptied_yet(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A discarded copy waits for room: what the coordinator tells only once must not be lost meanwhile."""
    leader = await cluster.wait_leader()
    name = next(name for name in "abc" if name != leader)
    node = cluster.nodes[name]
    replicating, replica = node.store.replicating, node.store.replicas[0]
    cluster.isolate(name)

    def busy(*_: Any, **__: Any) -> int:
        raise LogBusyError("no room")

    monkeypatch.setattr(node.store.wal, "reset", busy)
    replicating.call(0, replica.damaged, "for the test")
    replicating._on_discarded(0, Discarded(replica.copy_id))
    replica._creating_key = True
    replicating.call(0, replica.key_refused)
    assert not replica._creating_key
    replicating.call(0, replica.set_wish, ("x", "y"))
    assert replica.wish == ("x", "y")
    log_end = replica.log.log_end
    replicating.call(0, replica.synced, 0)
    assert replica.durable_end == log_end  # what concerns the log waits


async def test_syncs_from_before_a_removal_say_nothing_of_the_next_copy(cluster: Cluster) -> None:
    """A group that was taken before the log was emptied, and is synced after the next copy has written as much."""
    await cluster.start("d")
    node = cluster.nodes["d"]
    store = node.store
    await cluster.wait_leader()
    await cluster.assign(0, "d", "b", "c")
    await cluster.until(lambda: 0 in store.replicas and store.replicas[0].log.log_end >= 10)
    replica = store.replicas[0]
    await cluster.until(lambda: replica.durable_end == replica.log.log_end)
    end = replica.durable_end
    number = store.wal.next_group - 1
    cluster.isolate("d")
    # As a copy that was discarded just now: its log is empty, and that is not on disk yet.
    replicating = store.replicating
    replicating._reset_due[0] = replica.copy_id
    replica.durable_end = 0
    replicating.synced([(number, {0: end})])
    assert replica.log.log_end == 0
    assert replica.durable_end == 0
    state = store.replicating.file.states[0]
    replicating.add(0, state, founding=None, is_damaged=False)
    assert store.replicas[0].log.durable_end(number, end) is None  # type: ignore[attr-defined]


async def test_a_copy_is_registered_only_as_long_as_its_founding_is_not_made(cluster: Cluster) -> None:
    """With the copy that was registered before, it may be named in a founding that is made just now."""
    coordinator = cluster.coordinator
    coordination = cluster.nodes["a"]._coordination
    assert coordination is not None
    before = await coordination.registration(0)
    assert before is not None
    assert not await coordination.register_new_copy(0, "fresh", before, is_founded=False)
    assert not await coordination.register_new_copy(0, "fresh", None, is_founded=True)
    assert await coordination.registration(0) == before
    await coordinator.delete(copy_key(0, "a"))
    assert await coordination.register_new_copy(0, "fresh", None, is_founded=True)
