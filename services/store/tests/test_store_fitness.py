"""Three stores, of which one can't lead well: its clock is wrong, its log is full, or its copy is damaged."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from tallymark_protocol.errors import ErrorCode, UnavailableError
from tallymark_protocol.identifiers import encode_event_id
from tallymark_protocol.messages import Appended, Consistency, StoreDigest
from tallymark_protocol.schema import make_record
from tallymark_runtime.disk import DiskError
from tallymark_store import folding, warmup
from tallymark_store.node import replica_config
from tallymark_store.replication.effects import Role
from tallymark_store.replication.messages import Rebuild
from tallymark_store.replication.ports import DurableState
from tallymark_store.wal import Group, WalConfig

from .cluster_driver import SUM, Cluster
from .payload_builder import event

S = 1_000_000_000
MONTH = 30 * 86_400 * S


@pytest.fixture(scope="module", autouse=True)
def kernels() -> None:
    """Loaded before anything has a deadline, as a store does it."""
    warmup.warm_up()


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    """With a preferred leader that takes over soon, though not before clocks are known anew."""
    cluster = Cluster()
    prefer_after(cluster, 3 * S // 2)
    await cluster.create()
    yield cluster
    await cluster.close()


def ids(n: int, first: int = 0) -> list[dict[str, Any]]:
    return [event(1, "sum", value=i, id=encode_event_id(first + i)) for i in range(n)]


def prefer_after(cluster: Cluster, preference_ns: int, lease_ttl_s: float = 0.5) -> None:
    config = msgspec.structs.replace(cluster.config, lease_ttl_s=lease_ttl_s, replication=None)
    times = msgspec.structs.replace(replica_config(config), preference_ns=preference_ns)
    cluster.config = msgspec.structs.replace(config, replication=times)


def gained(cluster: Cluster, name: str) -> int:
    """How often a store has begun to lead."""
    return cluster.nodes[name].store.counters.leadership.get((0, "gained"), 0)


def newest_stamp(cluster: Cluster) -> int:
    """Of any copy's log, committed or not."""
    return max(node.store.partitions[0].index.last_append_ns() for node in cluster.nodes.values())


async def lead_by(cluster: Cluster, name: str, *others: str) -> None:
    """Have a store preferred, and leading."""
    await cluster.assign(0, name, *others)

    def leads() -> bool:
        leader = cluster.leader()
        if leader and leader != name:
            store = cluster.nodes[leader].store
            store.replicating.call(0, store.replicas[0].hand_over, name)
        return leader == name

    await cluster.until(leads)


def unfit(cluster: Cluster) -> frozenset[str]:
    """Who shall not lead, as the leader has it."""
    return cluster.nodes[cluster.leader()].store.replicas[0].unfit


async def heartbeats(cluster: Cluster, name: str, count: int = 20) -> None:
    """Wait until so many bundles came to a store."""
    node = cluster.nodes[name]
    seen = 0
    real = node.on_bundle

    def counted(sender: str, data: bytes) -> None:
        nonlocal seen
        seen += 1
        real(sender, data)

    node.on_bundle = counted  # type: ignore[method-assign]
    await cluster.until(lambda: seen >= count)
    del node.on_bundle


@pytest.mark.parametrize("ahead_ns", [MONTH, -MONTH, 11 * S])
async def test_a_leader_whose_clock_is_wrong_stamps_nothing(cluster: Cluster, ahead_ns: int) -> None:
    """From the moment on in which it goes wrong; others lead until it is right again, though it is preferred."""
    await cluster.start()
    await lead_by(cluster, "a", "b", "c")
    await cluster.append("a", ids(10), (1, 0))
    await cluster.check_digests()
    store = cluster.nodes["a"].store
    cluster.clocks["a"].ahead_ns = ahead_ns
    refused = await cluster.append("a", ids(10, 100), (1, 1))
    assert refused.retriable
    assert refused.code == ErrorCode.NOT_LEADER
    assert "clock" in refused.message
    with pytest.raises(UnavailableError, match="clock"):
        store.appends.append_schema(store.partitions[0], make_record(0, SUM))
    with pytest.raises(UnavailableError, match="clock"):
        await cluster.count("a", 1, consistency=Consistency.QUORUM)
    second = await cluster.wait_leader(other_than="a")
    answer = await cluster.append_anywhere(ids(10, 100), (1, 1))
    assert answer.chunks is None
    assert newest_stamp(cluster) < cluster.clock.now_ns() + S
    assert await cluster.count(await cluster.wait_leader(), 1) == 20
    await cluster.until(lambda: cluster.leader() and "a" in unfit(cluster))
    before = gained(cluster, "a")
    await heartbeats(cluster, second, 100)
    assert gained(cluster, "a") == before
    cluster.clocks["a"].ahead_ns = 0
    await cluster.until(lambda: cluster.leader() == "a")
    await cluster.append_anywhere(ids(10, 200), (1, 2))
    assert await cluster.count("a", 1) == 30
    await cluster.check_digests()


async def test_a_store_that_starts_with_a_wrong_clock_never_begins(cluster: Cluster) -> None:
    """Preferred, and the first to try: it hears the others before anything is stamped."""
    cluster.clocks["a"].ahead_ns = MONTH
    await cluster.assign(0, "a", "b", "c")
    await cluster.start()
    leader = await cluster.wait_leader()
    assert leader != "a"
    await cluster.append_anywhere(ids(10), (1, 0))
    assert newest_stamp(cluster) < cluster.clock.now_ns() + S
    await cluster.check_digests()


async def test_of_two_clocks_the_one_behind_is_believed(cluster: Cluster) -> None:
    """With one store away nobody can tell which is right: time that has gone ahead can't be taken back."""
    await cluster.start()
    await lead_by(cluster, "a", "b", "c")
    await cluster.append("a", ids(10), (1, 0))
    await cluster.check_digests()
    for name in "abc":
        cluster.kill(name)
    cluster.clocks["a"].ahead_ns = MONTH
    await cluster.start("a", "b")
    assert await cluster.wait_leader() == "b"
    await cluster.append_anywhere(ids(10, 100), (1, 1))
    assert newest_stamp(cluster) < cluster.clock.now_ns() + S
    assert await cluster.count(await cluster.wait_leader(), 1) == 20


async def test_a_leader_goes_on_where_nobody_can_tell(cluster: Cluster) -> None:
    """Its clock was right when all were there; then one comes back with a wrong clock, and another one goes."""
    prefer_after(cluster, 100 * S, lease_ttl_s=3.0)
    await cluster.start()
    await lead_by(cluster, "a", "b", "c")
    await cluster.append("a", ids(10), (1, 0))
    epoch = cluster.nodes["a"].store.replicas[0].epoch
    cluster.kill("b")
    cluster.clocks["b"].ahead_ns = -MONTH
    await cluster.start("b")
    peers = cluster.nodes["a"].store.replicating.fitness.clock_differences
    await cluster.until(lambda: peers().get("b", 0) < -S)
    cluster.kill("c")
    await heartbeats(cluster, "a")
    answer = await cluster.append("a", ids(10, 100), (1, 1))
    assert isinstance(answer, Appended)
    assert cluster.nodes["a"].store.replicas[0].epoch == epoch


async def test_somebody_leads_though_no_two_clocks_agree(cluster: Cluster) -> None:
    """The one in the middle."""
    cluster.clocks["a"].ahead_ns = 60 * S
    cluster.clocks["b"].ahead_ns = -60 * S
    await cluster.start()
    await cluster.until(lambda: cluster.leader() == "c")
    await cluster.append_anywhere(ids(10), (1, 0))
    await cluster.check_digests()


async def test_a_leader_without_room_lets_others_lead(cluster: Cluster) -> None:
    """Writes go on at a member that has room, and the full one doesn't get the leadership back, though preferred."""
    roomy = cluster.config
    small = WalConfig(segment_bytes=256 * 1024, log_bytes_max=3 * 256 * 1024)
    for name in "abc":
        cluster.config = msgspec.structs.replace(roomy, wal=small) if name == "a" else roomy
        await cluster.start(name)
    await lead_by(cluster, "a", "b", "c")
    written = 0
    while not cluster.nodes["a"].store.wal.full:
        await cluster.append_anywhere(ids(200, 1_000 * written), (1, written))
        written += 1
        assert written < 1_000
    await cluster.until(lambda: cluster.leader() not in ("", "a"))
    for _ in range(100):
        await cluster.append_anywhere(ids(200, 1_000 * written), (1, written))
        written += 1
    second = cluster.leader()
    assert second in ("b", "c")
    await cluster.until(lambda: cluster.leader() and "a" in unfit(cluster))
    before = gained(cluster, "a")
    await heartbeats(cluster, second, 100)
    assert gained(cluster, "a") == before
    assert await cluster.count(await cluster.wait_leader(), 1) == 200 * written


async def test_damage_that_was_found_is_not_forgotten(cluster: Cluster) -> None:
    """On an idle log, and before any marker of it is written."""
    await cluster.start()
    leader = await cluster.wait_leader()
    await cluster.append(leader, ids(10), (1, 0))
    await cluster.check_digests()
    name = next(name for name in sorted(cluster.nodes) if name != leader)
    cluster.isolate(name)
    node = cluster.nodes[name]
    copy_id = node.store.replicas[0].copy_id
    node.store.wal.write_marker = lambda: False  # type: ignore[method-assign]
    node.store.replicating.call(0, node.store.replicas[0].damaged, "its log parts below the high watermark")
    cluster.kill(name)
    await cluster.start(name)
    replica = cluster.nodes[name].store.replicas[0]
    assert replica.role is Role.DAMAGED
    assert replica.copy_id == copy_id
    assert cluster.nodes[name].store.partitions[0].error is not None
    cluster.cut.clear()
    await cluster.until(lambda: replica.copy_id != copy_id and replica.membership.has(name, replica.copy_id))
    await cluster.check_digests()
    copy_id = replica.copy_id
    cluster.kill(name)
    await cluster.start(name)
    replica = cluster.nodes[name].store.replicas[0]
    assert replica.role is not Role.DAMAGED
    assert replica.copy_id == copy_id


async def test_a_copy_that_begins_anew_is_not_taken_for_the_old_one(cluster: Cluster) -> None:
    """The process ends when the new copy id is on disk and the log is not emptied yet: it begins anew once more."""
    await cluster.start()
    leader = await cluster.wait_leader()
    await cluster.append(leader, ids(10), (1, 0))
    await cluster.check_digests()
    name = next(name for name in sorted(cluster.nodes) if name != leader)
    replicating = cluster.nodes[name].store.replicating
    replica = replicating.replicas[0]
    before = replica.copy_id
    saved: list[DurableState] = []
    save = replicating.file.save

    def save_and_end(number: int, state: DurableState | None) -> None:
        save(number, state)
        if state is not None and state.copy_id != before:
            saved.append(state)
            replicating.close()
            raise DiskError("REPLICAS", "write", 5)

    replicating.file.save = save_and_end  # type: ignore[method-assign]
    replicating.call(0, replica.damaged, "its log parts below the high watermark")
    with pytest.raises(DiskError):
        replicating.call(0, replica.step, leader, Rebuild(0, replica.promised, before), [])
    assert [state.is_damaged for state in saved] == [True]
    cluster.kill(name)
    await cluster.start(name)
    replica = cluster.nodes[name].store.replicas[0]
    await cluster.until(lambda: replica.copy_id != saved[0].copy_id)
    await cluster.until(lambda: replica.membership.has(name, replica.copy_id))
    state = cluster.nodes[name].store.replicating.file.states[0]
    assert state.copy_id == replica.copy_id
    assert not state.is_damaged
    await cluster.append_anywhere(ids(10, 100), (1, 1))
    await cluster.check_digests()


async def test_a_leader_whose_disk_hangs_lets_others_lead(cluster: Cluster) -> None:
    """Its buffer would fill up, and then it would refuse everything for ever."""
    await cluster.start()
    await lead_by(cluster, "a", "b", "c")
    await cluster.append("a", ids(10), (1, 0))
    going_on = threading.Event()
    wal = cluster.nodes["a"].store.wal
    write_group = wal.write_group

    def hang(group: Group) -> None:
        going_on.wait(30)
        write_group(group)

    wal.write_group = hang  # type: ignore[method-assign]
    try:
        await cluster.append("a", ids(10, 100), (1, 1))  # the others commit it
        second = await cluster.wait_leader(other_than="a")
        await cluster.append_anywhere(ids(10, 200), (1, 2))
        await cluster.until(lambda: cluster.leader() and "a" in unfit(cluster))
    finally:
        going_on.set()
    assert second in ("b", "c")
    assert await cluster.count(await cluster.wait_leader(), 1) == 30
    await cluster.check_digests()


@pytest.mark.parametrize("recount", [False, True])
async def test_what_was_asked_of_a_discarded_copy_is_refused(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, *, recount: bool
) -> None:
    """A digest that waits for the fold while the copy is discarded; the process goes on."""
    await cluster.start()
    leader = await cluster.wait_leader()
    for i in range(10):
        await cluster.append(leader, ids(5, 10 * i), (1, i))
    await cluster.check_digests()
    name = next(name for name in sorted(cluster.nodes) if name != leader)
    node = cluster.nodes[name]
    store = node.store
    monkeypatch.setattr(folding, "FOLD_SLICE_NS", 0)
    if not recount:
        monkeypatch.setattr(folding, "RUN_RECORDS_MAX", 1)
        monkeypatch.setattr(store.folding, "soon", lambda: None)
        monkeypatch.setattr(store.folding, "later", lambda _, behind, is_awaited: None)
        await cluster.append(leader, ids(5, 1_000), (2, 0))
        await cluster.append(leader, ids(5, 2_000), (2, 1))
        end = cluster.nodes[leader].store.partitions[0].log_end
        await cluster.until(lambda: store.partitions[0].high_watermark == end)
    copy_id = store.replicas[0].copy_id

    async def discarded_meanwhile(function: Any, *args: Any) -> Any:
        discard()
        return function(*args)

    def discard() -> None:
        replica = store.replicas[0]
        store.replicating.call(0, replica.damaged, "its log parts below the high watermark")
        store.replicating.call(0, replica.step, leader, Rebuild(0, replica.promised, replica.copy_id), [])

    monkeypatch.setattr(node._calls, "_offload", discarded_meanwhile)
    asked = asyncio.ensure_future(node.call(StoreDigest(partition=0, recount=recount)))
    if not recount:
        for _ in range(2):
            await asyncio.sleep(0)
        assert not asked.done()
        discard()
    with pytest.raises(UnavailableError, match="discarded"):
        await asked
    assert not node.failed.is_set()
    monkeypatch.undo()
    store.folding.soon()
    replica = store.replicas[0]
    assert replica.copy_id != copy_id
    await cluster.until(lambda: replica.membership.has(name, replica.copy_id))
    await cluster.check_digests()
