"""Three stores: writing, losing the leader, taking over, coming back, and ending in the same state everywhere."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from tallymark_protocol.errors import ErrorCode, RemoteProtocolError, UnavailableError
from tallymark_protocol.identifiers import encode_event_id
from tallymark_protocol.messages import Consistency, RealtimeResult, StoreRealtime
from tallymark_runtime.assignments import copy_key
from tallymark_runtime.epochs import raise_base
from tallymark_store import folding, warmup
from tallymark_store.links import Outgoing
from tallymark_store.links import encode as encode_bundle
from tallymark_store.replication.effects import Role
from tallymark_store.replication.messages import HandOver

from .cluster_driver import Cluster
from .payload_builder import event


@pytest.fixture(scope="module", autouse=True)
def kernels() -> None:
    """Loaded before anything has a deadline, as a store does it."""
    warmup.warm_up()


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    cluster = Cluster()
    await cluster.create()
    yield cluster
    await cluster.close()


def ids(n: int, first: int = 0) -> list[dict[str, Any]]:
    return [event(1, "sum", value=i, id=encode_event_id(first + i)) for i in range(n)]


async def test_writes_are_on_every_copy(cluster: Cluster) -> None:
    """What is acknowledged is committed; followers fold it from their own logs to the same state."""
    await cluster.start()
    leader = await cluster.wait_leader()
    for i in range(5):
        answer = await cluster.append(leader, ids(10, 10 * i), (1, i))
        assert answer.chunks is None
    assert await cluster.count(leader, 1) == 50
    await cluster.check_digests()


async def test_a_killed_leader_is_followed_by_another(cluster: Cluster) -> None:
    """Nothing acknowledged is lost, repeats are known, ids are known; the old leader comes back as a follower."""
    await cluster.start()
    first = await cluster.wait_leader()
    events = ids(20)
    answer = await cluster.append(first, events, (1, 0))
    cluster.kill(first)
    second = await cluster.wait_leader(other_than=first)
    again = await cluster.append_anywhere(events, (1, 0))
    assert again.chunks is not None
    assert again.chunks[0].base_offset == answer.base_offset
    assert again.chunks[0].exceptions == []
    duplicates = await cluster.append_anywhere(events, (2, 0))
    assert duplicates.chunks is not None
    assert len(duplicates.chunks[0].exceptions) == 20
    await cluster.append_anywhere(ids(5, 100), (1, 1))
    await cluster.start(first)
    await cluster.append_anywhere(ids(5, 200), (1, 2))
    assert await cluster.count(await cluster.wait_leader(), 1) == 30
    await cluster.check_digests()
    assert second != first


async def test_a_cut_off_leader_keeps_nothing_that_was_not_committed(cluster: Cluster) -> None:
    """Its suffix is truncated, and with it what the judge had taken from it; its clients are told to go elsewhere."""
    await cluster.start()
    first = await cluster.wait_leader()
    await cluster.append(first, ids(10), (1, 0))
    cluster.isolate(first)
    lost = cluster.send(first, ids(10, 500), (7, 0))
    second = await cluster.until(
        lambda: next((name for name in cluster.nodes if name != first and cluster.leads(name)), "")
    )
    answer = await cluster.until(lambda: cluster.answer(lost))
    assert answer.retriable
    fresh = await cluster.append(second, ids(10, 1_000), (1, 1))
    assert fresh.chunks is None
    cluster.cut.clear()
    stored = await cluster.append_anywhere(ids(10, 500), (7, 0))
    assert stored.chunks is None or stored.chunks[0].exceptions == []
    assert await cluster.count(await cluster.wait_leader(), 1) == 30
    await cluster.check_digests()


async def test_all_stores_at_once(cluster: Cluster) -> None:
    """Killed together and started again: everything that was acknowledged is there, once."""
    await cluster.start()
    leader = await cluster.wait_leader()
    for i in range(3):
        await cluster.append(leader, ids(10, 10 * i), (1, i))
    for name in sorted(cluster.nodes):
        cluster.kill(name)
    await cluster.start()
    answer = await cluster.append_anywhere(ids(10, 20), (1, 2))
    assert answer.chunks is not None
    assert answer.chunks[0].exceptions == []
    assert await cluster.count(await cluster.wait_leader(), 1) == 30
    await cluster.check_digests()


async def test_a_wiped_store_begins_anew(cluster: Cluster) -> None:
    """Its copy counts for nothing until a leader has it begin anew; then it becomes a member under another id."""
    await cluster.start()
    leader = await cluster.wait_leader()
    await cluster.append(leader, ids(10), (1, 0))
    name = next(name for name in sorted(cluster.nodes) if name != leader)
    before = cluster.nodes[name].store.replicas[0].copy_id
    cluster.kill(name)
    cluster.wipe(name)
    await cluster.append_anywhere(ids(10, 100), (1, 1))
    await cluster.start(name)
    replica = await cluster.until(lambda: cluster.nodes[name].store.replicas.get(0))
    await cluster.until(lambda: replica.copy_id != before and replica.membership.has(name, replica.copy_id))
    await cluster.append_anywhere(ids(10, 200), (1, 2))
    await cluster.check_digests()
    assert len(replica.membership.members) == 3


async def test_a_stop_hands_over(cluster: Cluster) -> None:
    """Another one leads before the first is gone."""
    await cluster.start()
    first = await cluster.wait_leader()
    await cluster.append(first, ids(10), (1, 0))
    await cluster.nodes[first].hand_over()
    second = await cluster.wait_leader(other_than=first)
    await cluster.nodes.pop(first).close()
    await cluster.append(second, ids(10, 100), (1, 1))
    assert await cluster.count(second, 1) == 20
    await cluster.check_digests()


async def test_a_copy_that_is_moved_leaves_nothing_behind() -> None:
    """A new store gets its copy and becomes a member; the one that leaves ends empty, also after a restart."""
    cluster = Cluster(("a", "b", "c", "d"))
    try:
        await cluster.create()
        await cluster.start("a", "b", "c")
        leader = await cluster.wait_leader()
        await cluster.append(leader, ids(10), (1, 0))
        await cluster.start("d")
        leaving = next(name for name in "abc" if name != leader)
        staying = [name for name in "abc" if name != leaving]
        await cluster.assign(0, *staying, "d")
        await cluster.until(lambda: 0 in cluster.nodes["d"].store.replicas)
        replica = cluster.nodes["d"].store.replicas[0]
        await cluster.until(lambda: replica.membership.has("d", replica.copy_id))
        await cluster.until(lambda: 0 not in cluster.nodes[leaving].store.replicas)
        await cluster.until(lambda: leaving not in cluster.registered(0))
        await cluster.append_anywhere(ids(10, 100), (1, 1))
        await cluster.check_digests()
        assert await cluster.statuses(leaving) == []
        assert cluster.nodes[leaving].store.partitions[0].log_end == 0
        cluster.kill(leaving)
        await cluster.start(leaving)
        assert await cluster.statuses(leaving) == []
        await cluster.assign(0, leaving, *staying[:1], "d")
        back = await cluster.until(lambda: cluster.nodes[leaving].store.replicas.get(0))
        await cluster.until(lambda: back.membership.has(leaving, back.copy_id))
        await cluster.append_anywhere(ids(10, 200), (1, 2))
        await cluster.check_digests()
    finally:
        await cluster.close()


async def test_stale_reads_are_answered_by_every_copy(cluster: Cluster) -> None:
    """With how far behind they are; other reads by the leader only, and not after its lease has run out."""
    await cluster.start()
    leader = await cluster.wait_leader()
    await cluster.append(leader, ids(10), (1, 0))
    await cluster.check_digests()
    for name in sorted(cluster.nodes):
        assert await cluster.count(name, 1, consistency=Consistency.STALE) == 10
        if name != leader:
            for consistency in (Consistency.LEADER, Consistency.QUORUM):
                with pytest.raises(UnavailableError) as caught:
                    await cluster.count(name, 1, consistency=consistency)
                assert caught.value.code == ErrorCode.NOT_LEADER
                assert caught.value.retriable
    assert await cluster.count(leader, 1, consistency=Consistency.QUORUM) == 10
    cluster.nodes[leader]._coordination.lease.deadline_ns = 0  # type: ignore[union-attr]
    with pytest.raises(UnavailableError) as caught:
        await cluster.count(leader, 1)
    assert caught.value.code == ErrorCode.NOT_LEADER


async def test_a_running_total_is_answered_at_once_where_nothing_is_to_be_waited_for(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is committed is in it; whoever does not lead, or not for sure, says so; all else is left to `call`."""
    monkeypatch.setattr(folding, "FOLD_DELAY_S", 3_600.0)  # only reads fold
    await cluster.start()
    leader = await cluster.wait_leader()
    node = cluster.nodes[leader]
    await cluster.append(leader, ids(10), (1, 0))
    await cluster.append(leader, ids(10, 50), (1, 1))
    monkeypatch.setattr(folding, "CATCH_UP_NS", 10**12)  # however busy the machine is
    ask = StoreRealtime(0, "sum", 1)
    found = node.call_now(ask)
    assert isinstance(found, RealtimeResult)
    assert (found.stats.count, found.as_of) == (20, node.store.partitions[0].high_watermark)
    assert found == await node.call(ask)
    for other in (
        msgspec.structs.replace(ask, consistency=Consistency.QUORUM),
        msgspec.structs.replace(ask, consistency=Consistency.STALE),
        msgspec.structs.replace(ask, metric_code="unheard_of"),
        msgspec.structs.replace(ask, at_ns=-1),
    ):
        assert node.call_now(other) is None
    await cluster.append(leader, ids(1, 100), (1, 2))
    with monkeypatch.context() as patched:
        patched.setattr(folding, "CATCH_UP_NS", -1)
        assert node.call_now(ask) is None  # it would take longer
        await asyncio.sleep(0)  # what this turn of the loop had for it is used up
    follower = next(name for name in sorted(cluster.nodes) if name != leader)
    with pytest.raises(UnavailableError) as caught:
        cluster.nodes[follower].call_now(ask)
    assert caught.value.code == ErrorCode.NOT_LEADER
    node._coordination.lease.deadline_ns = 0  # type: ignore[union-attr]
    with pytest.raises(UnavailableError) as caught:
        node.call_now(ask)
    assert caught.value.code == ErrorCode.NOT_LEADER


async def test_a_cut_off_leader_confirms_nothing(cluster: Cluster) -> None:
    """A quorum read waits for a majority, and fails with the leadership."""
    await cluster.start()
    leader = await cluster.wait_leader()
    await cluster.append(leader, ids(10), (1, 0))
    assert await cluster.count(leader, 1, consistency=Consistency.QUORUM) == 10
    cluster.isolate(leader)
    with pytest.raises(UnavailableError):
        await cluster.count(leader, 1, consistency=Consistency.QUORUM)


async def test_quorum_reads_at_one_time_share_a_confirmation(cluster: Cluster) -> None:
    """Those that come while a record is on its way wait for the next one, all for the same."""
    await cluster.start()
    leader = await cluster.wait_leader()
    await cluster.append(leader, ids(10), (1, 0))
    partition = cluster.nodes[leader].store.partitions[0]
    end = partition.log_end
    reads = [cluster.count(leader, 1, consistency=Consistency.QUORUM) for _ in range(50)]
    assert await asyncio.gather(*reads) == [10] * 50
    assert 1 <= partition.log_end - end <= 2


async def test_a_lost_lease_is_replaced(cluster: Cluster) -> None:
    """The leader steps down, somebody leads again, and the store takes part without being started again."""
    await cluster.start()
    leader = await cluster.wait_leader()
    await cluster.append(leader, ids(10), (1, 0))
    lease = cluster.nodes[leader]._coordination.lease.lease  # type: ignore[union-attr]
    epoch = cluster.nodes[leader].store.replicas[0].epoch
    await cluster.coordinator.lease_revoke(lease)
    await cluster.until(
        lambda: cluster.leader() and cluster.nodes[cluster.leader()].store.replicas[0].epoch > epoch
    )
    await cluster.until(lambda: cluster.nodes[leader]._coordination.lease.lease not in (0, lease))  # type: ignore[union-attr]
    await cluster.append_anywhere(ids(10, 100), (1, 1))
    await cluster.check_digests()


async def test_bundles_of_others_are_refused(cluster: Cluster) -> None:
    """Of another cluster, for another node, or from nobody who could be meant."""
    await cluster.start()
    await cluster.wait_leader()
    node = cluster.nodes["a"]
    message = [Outgoing(HandOver(0, 1), [])]
    own = node.store.replicating.identity.cluster_id
    for cluster_id, sender, receiver in (("x", "b", "a"), (own, "b", "c"), (own, "a", "a"), (own, "", "a")):
        data = b"".join(bytes(part) for part in encode_bundle(cluster_id, sender, receiver, message)[0])
        with pytest.raises(RemoteProtocolError):
            node.on_bundle("", data)
    data = b"".join(bytes(part) for part in encode_bundle(own, "b", "a", message)[0])
    with pytest.raises(RemoteProtocolError):
        node.on_bundle("c", data)
    node.on_bundle("b", data)


async def test_a_lost_log_is_never_taken_for_an_empty_one(cluster: Cluster) -> None:
    """With REPLICAS there and the log begun anew, the copy begins anew as well."""
    await cluster.start()
    leader = await cluster.wait_leader()
    await cluster.append(leader, ids(10), (1, 0))
    name = next(name for name in sorted(cluster.nodes) if name != leader)
    before = cluster.nodes[name].store.replicas[0].copy_id
    cluster.kill(name)
    wal = cluster.disks[name].at("wal")
    for file in wal.list():
        wal.remove(file)
    wal.sync_dir()
    await cluster.start(name)
    replica = cluster.nodes[name].store.replicas[0]
    await cluster.until(lambda: replica.copy_id != before and replica.membership.has(name, replica.copy_id))
    await cluster.append_anywhere(ids(10, 100), (1, 1))
    await cluster.check_digests()


async def test_checkpoints_are_taken_of_every_copy(cluster: Cluster) -> None:
    """Leaders and followers, and what is folded beyond them after a restart is the same."""
    await cluster.start()
    leader = await cluster.wait_leader()
    for i in range(3):
        await cluster.append(leader, ids(10, 10 * i), (1, i))
        await cluster.check_digests()
        for name in sorted(cluster.nodes):
            await cluster.nodes[name].checkpointer.take()  # type: ignore[union-attr]
    await cluster.append(leader, ids(10, 50), (1, 3))
    for name in sorted(cluster.nodes):
        cluster.kill(name)
    await cluster.start()
    await cluster.append_anywhere(ids(10, 90), (1, 4))
    assert await cluster.count(await cluster.wait_leader(), 1) == 50
    await cluster.check_digests()
    assert not [report for report in cluster.reports if "checkpoint" in report]


async def test_a_key_that_was_overtaken_is_given_up(cluster: Cluster) -> None:
    """Its epoch is below what the log has seen since it was asked for: nothing is wrong with the coordinator.

    Below what the log had seen before, it is: then the partition is refused, with what to do.
    """
    await cluster.start()
    leader = await cluster.wait_leader()
    await cluster.append(leader, ids(10), (1, 0))
    name = next(name for name in sorted(cluster.nodes) if name != leader)
    node = cluster.nodes[name]
    node.on_created(0, 1, 0)
    assert node.store.partitions[0].error is None
    await cluster.append(leader, ids(10, 100), (1, 1))
    await cluster.check_digests()
    node.on_created(0, 1, node.seen(0))
    error = node.store.partitions[0].error
    assert error is not None
    assert not error.retriable
    assert "recover" in error.message
    # It is tried again once epochs are counted from a base above.
    cluster.kill(leader)
    await raise_base(cluster.coordinator, 10**18)
    await cluster.until(lambda: node.store.partitions[0].error is None)
    successor = await cluster.wait_leader()
    await cluster.append(successor, ids(10, 200), (1, 2))
    assert cluster.nodes[successor].store.replicas[0].epoch > 10**15


async def test_a_key_of_the_base_before_is_tried_again(cluster: Cluster) -> None:
    """The base was raised while the key was created: the key is given up, and nothing is refused."""
    await cluster.start()
    leader = await cluster.wait_leader()
    node = cluster.nodes[leader]
    await raise_base(cluster.coordinator, 10**18)
    coordination = node._coordination
    assert coordination is not None
    await cluster.until(lambda: coordination.epoch_base > 0)
    node.on_created(0, 1, node.seen(0))
    assert node.store.partitions[0].error is None
    await cluster.append_anywhere(ids(10), (1, 0))
    await cluster.check_digests()


async def test_a_raised_base_hides_no_damage(cluster: Cluster) -> None:
    """A copy that was found damaged while its epochs were outdated says so afterwards."""
    await cluster.start()
    leader = await cluster.wait_leader()
    node = cluster.nodes[next(name for name in sorted(cluster.nodes) if name != leader)]
    node.on_created(0, 1, node.seen(0))
    replica = node.store.replicas[0]
    cluster.isolate(node._config.node_id)  # or it would begin anew
    node.store.replicating.call(0, replica.damaged, "a bit has rotted")
    await raise_base(cluster.coordinator, 10**18)
    await cluster.until(
        lambda: (
            (error := node.store.partitions[0].error) is not None
            and error.code == ErrorCode.NOT_LEADER  # another copy can be asked
            and "a bit has rotted" in error.message
        )
    )


async def test_all_copies_remember_ids_as_long_as_the_first_store_was_told(cluster: Cluster) -> None:
    """How long ids are remembered is a part of what the log means: a setting that differs later is said, not obeyed."""
    await cluster.start()
    name = min(cluster.nodes)
    window_ns = cluster.nodes[name].store.partitions[0].dedup_window_ns
    cluster.kill(name)
    cluster.config = msgspec.structs.replace(cluster.config, dedup_window_ns=7 * 10**9)
    await cluster.start(name)
    assert cluster.nodes[name].store.partitions[0].dedup_window_ns == window_ns
    assert [report for report in cluster.reports if "setting of 7 s is ignored" in report]


async def test_a_copy_is_registered_again_where_its_registration_is_missing(cluster: Cluster) -> None:
    """The process ended between the two writes: without it a partition would never be founded."""
    await cluster.start()
    leader = await cluster.wait_leader()
    await cluster.append(leader, ids(10), (1, 0))
    name = next(name for name in sorted(cluster.nodes) if name != leader)
    copy_id = cluster.nodes[name].store.replicas[0].copy_id
    cluster.kill(name)
    await cluster.coordinator.delete(copy_key(0, name))
    await cluster.start(name)
    await cluster.until(lambda: name in cluster.registered(0))
    assert cluster.nodes[name].store.replicas[0].copy_id == copy_id
    await cluster.check_digests()


async def test_copies_that_were_rebuilt_are_there_after_every_restart(cluster: Cluster) -> None:
    """One store after the other loses its log; what was begun after that lies in the new one, and counts."""
    await cluster.start()
    leader = await cluster.wait_leader()
    await cluster.append(leader, ids(10), (1, 0))
    for name in sorted(cluster.nodes):
        before = cluster.nodes[name].store.replicas[0].copy_id
        cluster.kill(name)
        wal = cluster.disks[name].at("wal")
        for file in wal.list():
            wal.remove(file)
        wal.sync_dir()
        await cluster.wait_leader()
        await cluster.start(name)
        replica = cluster.nodes[name].store.replicas[0]
        await cluster.until(
            lambda before=before, name=name, replica=replica: (
                replica.copy_id != before
                and replica.membership.has(name, replica.copy_id)
                and replica.membership.offset < replica.high_watermark
            )
        )
    await cluster.append_anywhere(ids(10, 100), (1, 1))
    await cluster.check_digests()
    for name in sorted(cluster.nodes):
        cluster.kill(name)
    await cluster.start()
    assert [node.store.replicas[0].role for node in cluster.nodes.values()].count(Role.DAMAGED) == 0
    await cluster.append_anywhere(ids(10, 200), (1, 2))
    assert await cluster.count(await cluster.wait_leader(), 1) == 30
    await cluster.check_digests()


async def test_a_disk_from_a_backup_is_another_copy(cluster: Cluster) -> None:
    """It lacks what the copy acknowledged since: with it, a majority would go on with less, and say nothing."""
    await cluster.start()
    leader = await cluster.wait_leader()
    await cluster.append(leader, ids(10), (1, 0))
    name, other = (name for name in sorted(cluster.nodes) if name != leader)
    await cluster.check_digests()
    await cluster.nodes.pop(name).close()
    backup = copy.deepcopy(cluster.disks[name])
    await cluster.start(name)
    cluster.isolate(other)
    await cluster.append(leader, ids(10, 100), (1, 1))
    replica = cluster.nodes[name].store.replicas[0]
    copy_id, end = replica.copy_id, cluster.nodes[leader].store.partitions[0].log_end
    await cluster.until(lambda: replica.durable_end >= end)
    cluster.kill(name)
    cluster.kill(leader)
    cluster.disks[name] = backup
    await cluster.start(name)
    for _ in range(2):  # also after another start it counts for nothing
        restored = cluster.nodes[name].store.replicas[0]
        assert restored.role is Role.DAMAGED
        assert restored.copy_id == copy_id
        cluster.kill(name)
        await cluster.start(name)
    cluster.cut.clear()
    await cluster.start(leader)
    await cluster.until(lambda: cluster.nodes[name].store.replicas[0].copy_id != copy_id)
    await cluster.append_anywhere(ids(10, 200), (1, 2))
    restored = cluster.nodes[name].store.replicas[0]
    await cluster.until(lambda: restored.is_member and restored.membership.offset < restored.high_watermark)
    assert await cluster.count(await cluster.wait_leader(), 1) == 30
    await cluster.check_digests()
    cluster.kill(name)
    await cluster.start(name)
    assert cluster.nodes[name].store.replicas[0].role is not Role.DAMAGED


async def test_the_only_copy_may_come_from_a_backup() -> None:
    """Nobody else has what it lacks; it is said."""
    cluster = Cluster(("a",), replication_factor=1)
    try:
        await cluster.create()
        await cluster.start()
        await cluster.append("a", ids(10), (1, 0))
        await cluster.nodes.pop("a").close()
        backup = copy.deepcopy(cluster.disks["a"])
        await cluster.start()
        await cluster.append("a", ids(10, 100), (1, 1))
        cluster.kill("a")
        cluster.disks["a"] = backup
        await cluster.start()
        assert await cluster.count("a", 1) == 10
        assert [report for report in cluster.reports if "is lost" in report]
    finally:
        await cluster.close()
