"""What a role knows of the cluster: caught up when waited for, told of every end, registered again when lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from tallymark_protocol.errors import NotFoundError, RemoteProtocolError, UnavailableError
from tallymark_protocol.model import MetricSchema
from tallymark_protocol.schema import MetricRecord, encode_record, make_record
from tallymark_runtime import catalog
from tallymark_runtime.assignments import Assignment, assignment_key
from tallymark_runtime.catalog import (
    Cluster,
    Leader,
    LeaderCatalog,
    MetricCatalog,
    NodeCatalog,
    establish_cluster,
    leader_key,
    metric_key,
    node_key,
    read_cluster,
    register,
)
from tallymark_runtime.clock import ManualClock
from tallymark_runtime.coordinator import MemoryCoordinator

Change = tuple[str, int, bool]  # code, uid, deleted


class Deaf:
    """A coordinator whose watches say nothing: what is learned is learned by asking."""

    def __init__(self, inner: MemoryCoordinator) -> None:
        self.inner = inner
        self.failing: type[Exception] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    async def range(self, prefix: bytes) -> Any:
        if self.failing is not None:
            raise self.failing("asked in vain")
        return await self.inner.range(prefix)

    async def watch(self, prefix: bytes, from_revision: int = 0) -> AsyncIterator[Any]:
        await asyncio.Event().wait()
        yield []


@pytest.fixture
async def coordinator() -> AsyncIterator[MemoryCoordinator]:
    made = MemoryCoordinator(ManualClock())
    yield made
    await made.close()


async def put(coordinator: Any, code: str, version: int = 1) -> int:
    record = msgspec.structs.replace(make_record(0, MetricSchema(code=code)), version=version)
    return int(await coordinator.put(metric_key(code), encode_record(record)))


def watched(metrics: MetricCatalog) -> list[Change]:
    seen: list[Change] = []

    def on_change(record: MetricRecord) -> None:
        seen.append((record.schema.code, record.uid, record.deleted))

    metrics.on_change = on_change
    return seen


async def test_metrics_are_followed(coordinator: MemoryCoordinator) -> None:
    """Creation, change, deletion and creation again, each told once, in order."""
    first = await put(coordinator, "a")
    metrics = MetricCatalog(coordinator)
    seen = watched(metrics)
    await metrics.start()
    assert seen == [("a", first, False)]
    await put(coordinator, "a", 2)
    second = await put(coordinator, "b")
    await coordinator.delete(metric_key("a"))
    third = await put(coordinator, "a")
    await metrics.wait_revision(third)
    assert seen == [
        ("a", first, False),
        ("a", first, False),
        ("b", second, False),
        ("a", first, True),
        ("a", third, False),
    ]
    assert [record.uid for record in metrics.all()] == [third, second]
    assert metrics.get("a") is not None
    assert metrics.get("c") is None
    await metrics.close()


async def test_what_a_watch_never_said_is_found_by_waiting(coordinator: MemoryCoordinator) -> None:
    """A metric replaced in between ends first; revisions of other prefixes count as known."""
    first = await put(coordinator, "a")
    metrics = MetricCatalog(Deaf(coordinator))  # type: ignore[arg-type]
    seen = watched(metrics)
    await metrics.start()
    await coordinator.delete(metric_key("a"))
    third = await put(coordinator, "a")
    other = await coordinator.put(b"leaders/0", b"x")
    await metrics.wait_revision(other)
    assert seen == [("a", first, False), ("a", first, True), ("a", third, False)]
    assert metrics.revision == other
    await coordinator.delete(metric_key("a"))
    await metrics.wait_revision(coordinator.revision)
    assert seen[-1] == ("a", third, True)
    assert metrics.all() == []
    await metrics.close()


async def test_a_revision_that_nobody_has_seen_is_not_waited_for(coordinator: MemoryCoordinator) -> None:
    """Who claims it is wrong, and the one who waits must not wait for ever."""
    metrics = MetricCatalog(coordinator)
    await metrics.start()
    with pytest.raises(UnavailableError, match="before 1000000"):
        await metrics.wait_revision(1_000_000)
    await metrics.close()


async def test_fetch_finds_what_was_made_a_moment_ago(coordinator: MemoryCoordinator) -> None:
    """And its end is told as of any other metric, though no watch ever said that it was there."""
    metrics = MetricCatalog(Deaf(coordinator))  # type: ignore[arg-type]
    seen = watched(metrics)
    await metrics.start()
    uid = await put(coordinator, "a")
    found = await metrics.fetch("a")
    assert found is not None
    assert found.uid == uid
    assert await metrics.fetch("b") is None
    await coordinator.delete(metric_key("a"))
    assert await metrics.fetch("a") is None
    await metrics.wait_revision(coordinator.revision)
    assert seen == [("a", uid, False), ("a", uid, True)]
    await metrics.close()


async def test_fetch_does_not_bring_back_what_has_ended(coordinator: MemoryCoordinator) -> None:
    """An answer that was on its way when the deletion was told is too old."""
    uid = await put(coordinator, "a")
    deaf = Deaf(coordinator)
    metrics = MetricCatalog(deaf)  # type: ignore[arg-type]
    await metrics.start()
    asked = deaf.txn

    async def txn(*arguments: Any) -> Any:
        answer = await asked(*arguments)
        await coordinator.delete(metric_key("a"))
        await metrics.wait_revision(coordinator.revision)
        return answer

    deaf.txn = txn  # type: ignore[attr-defined]
    known = metrics.get("a")
    assert known is not None
    assert known.uid == uid
    assert await metrics.fetch("a") is None
    await metrics.close()


async def test_callers_at_one_time_share_a_question(coordinator: MemoryCoordinator) -> None:
    """Each knows what was there when it asked, and a hundred of them ask twice at most."""
    deaf = Deaf(coordinator)
    metrics = MetricCatalog(deaf)  # type: ignore[arg-type]
    await metrics.start()
    await put(coordinator, "late")
    asked = deaf.txn
    questions = 0

    async def txn(*arguments: Any) -> Any:
        nonlocal questions
        questions += 1
        return await asked(*arguments)

    deaf.txn = txn  # type: ignore[attr-defined]
    await asyncio.gather(*(metrics.catch_up() for _ in range(100)))
    assert metrics.get("late") is not None
    assert 1 <= questions <= 2
    await metrics.close()


async def test_following_goes_on_after_a_failure(
    coordinator: MemoryCoordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when what was told of a change refused it: it is told once, and later ones come through."""
    monkeypatch.setattr(catalog, "RETRY_S", 0.001)
    metrics = MetricCatalog(coordinator)
    await metrics.start()
    told: list[str] = []

    def refuse(record: MetricRecord) -> None:
        told.append(record.schema.code)
        if record.schema.code == "a":
            raise UnavailableError("not now")

    metrics.on_change = refuse
    await put(coordinator, "a")
    await metrics.wait_revision(await put(coordinator, "b"))
    assert told == ["a", "b"]
    assert [record.schema.code for record in metrics.all()] == ["a", "b"]
    await metrics.close()


async def test_who_waits_is_told_that_nobody_can_be_asked(coordinator: MemoryCoordinator) -> None:
    """The coordinator's error comes through, and no task is left behind."""
    deaf = Deaf(coordinator)
    metrics = MetricCatalog(deaf)  # type: ignore[arg-type]
    await metrics.start()
    deaf.failing = UnavailableError
    with pytest.raises(UnavailableError, match="in vain"):
        await metrics.wait_revision(100)
    await metrics.close()


async def test_the_clusters_constants_are_fixed_by_the_first(coordinator: MemoryCoordinator) -> None:
    """Later nodes get those, whatever they wanted; a newer format is refused."""
    with pytest.raises(UnavailableError, match="no store has made"):
        await read_cluster(coordinator)
    assert await establish_cluster(coordinator, Cluster(4)) == Cluster(4)
    assert await read_cluster(coordinator) == Cluster(4)
    assert await establish_cluster(coordinator, Cluster(12)) == Cluster(4)
    await coordinator.put(b"cluster", msgspec.msgpack.encode(Cluster(4, format_version=9)))
    with pytest.raises(RemoteProtocolError, match="version 9"):
        await establish_cluster(coordinator, Cluster(4))
    await coordinator.put(b"cluster", b"\xc1")
    with pytest.raises(RemoteProtocolError, match="malformed"):
        await establish_cluster(coordinator, Cluster(4))


async def test_leaders_and_nodes_by_key(coordinator: MemoryCoordinator) -> None:
    """Of one partition, of one role; gone when their key is."""
    leaders, nodes = LeaderCatalog(coordinator), NodeCatalog(coordinator)
    await leaders.start()
    await nodes.start()
    assert leaders.address(1) is None
    await coordinator.put(leader_key(1), msgspec.msgpack.encode(Leader("n", "h:1", "i")))
    await coordinator.put(leader_key(11), msgspec.msgpack.encode(Leader("n", "h:11", "i")))
    for name in ("b", "a"):
        value = msgspec.msgpack.encode(catalog.Node(name, f"{name}:1", "query"))
        await coordinator.put(node_key("query", name), value)
    for found in (leaders, nodes):
        await found.wait_revision(coordinator.revision)
    assert (leaders.address(1), leaders.address(11), leaders.address(2)) == ("h:1", "h:11", None)
    assert nodes.addresses("query") == ["a:1", "b:1"]
    assert nodes.addresses("ingest") == []
    await coordinator.delete(leader_key(1))
    await leaders.wait_revision(coordinator.revision)
    assert leaders.address(1) is None
    await leaders.close()
    await nodes.close()


async def test_a_node_is_registered_again_after_its_lease_ran_out(coordinator: MemoryCoordinator) -> None:
    """Though the coordinator can't be reached the first time it tries; cancelled, it takes its key along."""
    calls: list[str] = []

    class Flaky:
        def __getattr__(self, name: str) -> Any:
            return getattr(coordinator, name)

        async def lease_keepalive(self, lease: int) -> float:
            calls.append("keepalive")
            raise NotFoundError("run out")

        async def lease_grant(self, ttl_s: float) -> int:
            calls.append("grant")
            if calls.count("grant") == 2:
                raise UnavailableError("not now")
            if calls.count("grant") == 4:
                done.set()
            return await coordinator.lease_grant(ttl_s)

    done = asyncio.Event()
    task = await register(Flaky(), "query", "n", "h:1", 0.003)  # type: ignore[arg-type]
    key = node_key("query", "n")
    assert await coordinator.get(key) is not None
    async with asyncio.timeout(20):
        await done.wait()
    assert not task.done()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_changed_leader_is_told_and_what_cannot_be_read_is_no_leader(
    coordinator: MemoryCoordinator,
) -> None:
    """Each change of a partition's key calls back, also to none; garbage under it or beside it does no harm."""
    leaders = LeaderCatalog(coordinator)
    told: list[tuple[int, str | None]] = []
    leaders.on_change = lambda partition: told.append((partition, leaders.address(partition)))
    await coordinator.put(leader_key(3), msgspec.msgpack.encode(Leader("a", "h:1", "i")))
    await leaders.start()
    await coordinator.put(leader_key(3), msgspec.msgpack.encode(Leader("b", "h:2", "j")))
    for garbage in (b"", b"\xc1", b"\xa1\xff", msgspec.msgpack.encode({"address": "h:3"})):
        await coordinator.put(leader_key(3), garbage)
    await coordinator.put(b"leaders/x", msgspec.msgpack.encode(Leader("b", "h:2", "j")))
    await coordinator.put(leader_key(3), msgspec.msgpack.encode(Leader("c", "h:4", "k")))
    await coordinator.delete(leader_key(3))
    await leaders.wait_revision(coordinator.revision)
    assert told == [(3, "h:1"), (3, "h:2"), (3, None), (3, "h:4"), (3, None)]
    assert leaders.addresses() == set()
    assert leaders.leader(3) is None
    await leaders.close()


async def test_assignments_are_followed(coordinator: MemoryCoordinator) -> None:
    """Nodes by partition; none where nothing is assigned, or nothing that can be read."""
    assignments = catalog.AssignmentCatalog(coordinator)
    await assignments.start()
    await coordinator.put(assignment_key(1), msgspec.msgpack.encode(Assignment(("a", "b"))))
    await coordinator.put(assignment_key(2), b"garbage")
    await assignments.wait_revision(coordinator.revision)
    assert [assignments.nodes(partition) for partition in range(3)] == [(), ("a", "b"), ()]
    await coordinator.delete(assignment_key(1))
    await assignments.wait_revision(coordinator.revision)
    assert assignments.nodes(1) == ()
    await assignments.close()


async def test_nodes_that_come_and_go_are_told(coordinator: MemoryCoordinator) -> None:
    """One call back for each; one that can't be read is not there."""
    nodes = NodeCatalog(coordinator)
    told: list[list[str]] = []
    nodes.on_change = lambda: told.append(nodes.addresses("store"))
    await nodes.start()
    await coordinator.put(node_key("store", "a"), msgspec.msgpack.encode(catalog.Node("a", "h:1", "store")))
    await coordinator.put(node_key("store", "b"), b"garbage")
    await coordinator.delete(node_key("store", "a"))
    await nodes.wait_revision(coordinator.revision)
    assert told == [["h:1"], ["h:1"], []]
    assert nodes.address("store", "a") is None
    await nodes.close()
