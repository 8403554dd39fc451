"""Stores whose log no longer reaches back: snapshots across real nodes, and what a crash in between leaves."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from tallymark_protocol.errors import ErrorCode, Reason, UnavailableError
from tallymark_protocol.identifiers import encode_event_id
from tallymark_protocol.messages import Appended, StoreDigest, StoreEvents
from tallymark_runtime.disk import DiskError
from tallymark_store import checkpoint, incoming
from tallymark_store.replication.effects import Role
from tallymark_store.snapshots import Snapshots
from tallymark_store.wal import WalConfig

from .cluster_driver import WAIT_S, Cluster
from .payload_builder import event


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    cluster = Cluster(recycle=True, wal=WalConfig(segment_bytes=8_192))
    await cluster.create()
    yield cluster
    await cluster.close()


def ids(n: int, start: int = 0) -> list[dict[str, Any]]:
    return [event(1, "sum", value=1, id=encode_event_id(start + i)) for i in range(n)]


def mixed() -> list[dict[str, Any]]:
    """Three events that are stored, and in between what is not."""
    return [event(1, "sum", value=1, id=encode_event_id(-i)) for i in (1, 1, 2, 2, 3, 1)]


async def fill(cluster: Cluster, sequence: int, *, batches: int = 6) -> int:
    """Some segments full of events; returns the next sequence."""
    for i in range(sequence, sequence + batches):
        answer = await cluster.append_anywhere(ids(120, 120 * i), (1, i))
        assert isinstance(answer, Appended)
    return sequence + batches


async def recycle(cluster: Cluster, *names: str) -> None:
    """Checkpoints, and the log below them dropped."""
    for name in names or sorted(cluster.nodes):
        await cluster.nodes[name].checkpointer.take()  # type: ignore[union-attr]


def log_start(cluster: Cluster, name: str) -> int:
    return cluster.nodes[name].store.partitions[0].index.log_start


async def settled(cluster: Cluster, *names: str) -> None:
    """Copies hold the same state at the same offset."""
    async with asyncio.timeout(WAIT_S):
        while True:
            leader = await cluster.wait_leader()
            end = cluster.nodes[leader].store.partitions[0].log_end
            copies = [cluster.nodes[name].store for name in names or sorted(cluster.nodes)]
            await cluster.until(
                lambda end=end, copies=copies: all(s.partitions[0].high_watermark >= end for s in copies)
            )
            found = set()
            for name in names or sorted(cluster.nodes):
                status: Any = await cluster.nodes[name].call(StoreDigest(partition=0))
                found.add((status.applied, status.digest))
            if len({applied for applied, _ in found}) == 1:  # else a record came in between
                break
    assert len(found) == 1, found


async def behind(cluster: Cluster) -> tuple[str, str, int]:
    """A member that is down, of which the others' logs begin behind its end; leader, member, next sequence."""
    if not cluster.nodes:
        await cluster.start()
    leader = await cluster.wait_leader()
    sequence = await fill(cluster, 0, batches=2)
    name = next(name for name in sorted(cluster.nodes) if name != leader)
    await settled(cluster)
    end = cluster.nodes[name].store.partitions[0].log_end
    cluster.kill(name)
    sequence = await fill(cluster, sequence)
    await settled(cluster)
    await recycle(cluster)
    assert all(log_start(cluster, other) > end for other in cluster.nodes)
    return leader, name, sequence


async def test_a_member_that_was_away_gets_a_snapshot(cluster: Cluster) -> None:
    """In the place of what it has, under its copy id; and what it remembers is all that anyone remembers."""
    await cluster.start()
    first = await cluster.append_anywhere(mixed(), (9, 0))
    leader, name, sequence = await behind(cluster)
    await cluster.start(name)
    copy_id = cluster.nodes[name].store.replicas[0].copy_id
    await cluster.until(lambda: cluster.nodes[name].snapshots.installed)  # type: ignore[union-attr]
    await settled(cluster)
    assert cluster.nodes[name].store.replicas[0].copy_id == copy_id
    assert log_start(cluster, name) > 0
    assert cluster.nodes[leader].snapshots.sent == 1  # type: ignore[union-attr]
    # It leads: ids and chunks from before its log's start are known to it, and answered as they were first.
    replica = cluster.nodes[leader].store.replicas[0]
    cluster.nodes[leader].store.replicating.call(0, replica.hand_over, name)
    await cluster.until(lambda: cluster.leads(name))
    again = await cluster.append_anywhere(ids(120, 0), (2, 0))
    assert [reason for _, reason, _ in again.chunks[0].exceptions] == [int(Reason.DUPLICATE)] * 120
    repeat = await cluster.append_anywhere(mixed(), (9, 0))
    assert repeat.chunks == first.chunks
    assert cluster.leads(name)
    sequence = await fill(cluster, sequence)
    await settled(cluster)
    assert await cluster.count(name, 1) == 120 * sequence + 3


async def test_a_snapshot_survives_restarts(cluster: Cluster) -> None:
    """It is the checkpoint that a start begins from; the next one adds to it."""
    _, name, sequence = await behind(cluster)
    await cluster.start(name)
    await cluster.until(lambda: cluster.nodes[name].snapshots.installed)  # type: ignore[union-attr]
    await settled(cluster)
    for _ in range(2):
        cluster.kill(name)
        await cluster.start(name)
        await settled(cluster)
        sequence = await fill(cluster, sequence, batches=1)
        await recycle(cluster)
    assert cluster.nodes[name].store.replicas[0].role is not Role.DAMAGED
    assert not [report for report in cluster.reports if "cannot be used" in report]


async def test_a_new_copy_gets_a_snapshot(cluster: Cluster) -> None:
    """A wiped disk begins anew as another copy, and becomes a member with what it was sent."""
    _, name, sequence = await behind(cluster)
    cluster.wipe(name)
    await cluster.start(name)
    await cluster.until(
        lambda: (
            0 in cluster.nodes[name].store.replicas
            and cluster.nodes[name].store.replicas[0].is_member
            and cluster.nodes[name].snapshots.installed  # type: ignore[union-attr]
        )
    )
    await fill(cluster, sequence)
    await settled(cluster)


async def test_a_member_that_is_needed_gets_a_snapshot(cluster: Cluster) -> None:
    """With the third one gone for good nothing would ever be committed again without it."""
    leader, name, sequence = await behind(cluster)
    third = next(x for x in cluster.nodes if x != leader)
    cluster.kill(third)
    await cluster.start(name)
    await fill(cluster, sequence)
    await settled(cluster)


async def test_what_was_recycled_is_refused_and_not_left_out(cluster: Cluster) -> None:
    """Raw events, and a recount, of what lies before the log's start: an error that says so."""
    await cluster.start()
    await fill(cluster, 0, batches=12)
    await settled(cluster)
    await recycle(cluster)
    leader = await cluster.wait_leader()
    start = log_start(cluster, leader)
    assert start > 0
    for call in (
        StoreEvents(partition=0, account_id=1, metric_code=None, start_ns=0, end_ns=2**62),
        StoreDigest(partition=0, recount=True),
    ):
        with pytest.raises(UnavailableError) as caught:
            await cluster.nodes[leader].call(call)
        assert str(start) in caught.value.message
        assert not caught.value.retriable
        assert caught.value.code != ErrorCode.NOT_LEADER
    assert await cluster.count(leader, 1) == 1_440


# ------------------------------------------------------------ crashes


class Stop:
    """Lets nothing go on from a certain call: as if the process had ended there."""

    def __init__(self) -> None:
        self.is_reached = False

    def __call__(self, *_: Any, **__: Any) -> Any:
        self.is_reached = True
        raise DiskError("end", "here", errno.EIO)


def after(call: Callable[..., Any], stop: Stop) -> Callable[..., Any]:
    """Stop behind a call."""

    def wrapped(*args: Any, **options: Any) -> Any:
        call(*args, **options)
        return stop()

    return wrapped


def at_complete(stop: Stop, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(incoming, "complete", stop)


def before_the_reset(stop: Stop, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Snapshots, "_replace", stop)


def at_the_reset(stop: Stop, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Snapshots, "_publish", stop)


def at_publishing(stop: Stop, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(incoming, "publish", stop)


def before_the_manifest(stop: Stop, patch: pytest.MonkeyPatch) -> None:
    def publish(disk: Any, manifest: Any, kept: Any = None) -> None:
        if kept is None:  # of an installation; checkpoints are kept from going on
            stop()

    patch.setattr(checkpoint, "publish", publish)


def behind_the_manifest(stop: Stop, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(incoming, "publish", after(incoming.publish, stop))


STEPS = (
    at_complete,
    before_the_reset,
    at_the_reset,
    at_publishing,
    before_the_manifest,
    behind_the_manifest,
)


@pytest.mark.parametrize("is_wiped", [False, True])
@pytest.mark.parametrize("step", STEPS)
async def test_a_crash_while_a_snapshot_is_installed(
    cluster: Cluster, step: Any, is_wiped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the emptied log is on disk the copy is what it was; behind that it is what was installed."""
    _, name, sequence = await behind(cluster)
    if is_wiped:
        cluster.wipe(name)
    stop = Stop()
    with monkeypatch.context() as patch:
        step(stop, patch)
        await cluster.start(name)
        await cluster.until(lambda: stop.is_reached)
        await asyncio.sleep(0)
        # Until it was said to be on disk, it may be or not.
        copy_id = cluster.nodes[name].store.replicas[0].copy_id
        cluster.kill(name)
    await cluster.start(name)
    replica = cluster.nodes[name].store.replicas[0]
    assert replica.copy_id == copy_id
    assert replica.role is not Role.DAMAGED
    has_come_in = any("had come in" in report for report in cluster.reports)
    if step in (at_publishing, before_the_manifest):
        assert has_come_in
        assert log_start(cluster, name) > 0
    elif step is not at_the_reset:
        assert not has_come_in
    if step in (at_complete, before_the_reset):
        assert log_start(cluster, name) == 0
    await fill(cluster, sequence)
    await settled(cluster)
    assert await cluster.count(await cluster.wait_leader(), 1) == 120 * (sequence + 6)
    folder = cluster.disks[name].at("checkpoints").at("p-0000")
    await cluster.until(lambda: not [file for file in folder.list() if file.startswith(checkpoint.INCOMING)])


async def test_a_snapshot_that_is_lost_in_between_damages_the_copy(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A log that begins where nothing reaches is never taken for a whole one: it begins anew."""
    _, name, sequence = await behind(cluster)
    stop = Stop()
    with monkeypatch.context() as patch:
        at_publishing(stop, patch)
        await cluster.start(name)
        await cluster.until(lambda: stop.is_reached)
        copy_id = cluster.nodes[name].store.replicas[0].copy_id
        cluster.kill(name)
    folder = cluster.disks[name].at("checkpoints").at("p-0000")
    folder.flip_bit("in-0", 100)
    await cluster.start(name)
    assert any("the log begins at offset" in report for report in cluster.reports)
    await cluster.until(lambda: cluster.nodes[name].store.replicas[0].copy_id != copy_id)
    await cluster.until(lambda: cluster.nodes[name].store.replicas[0].is_member)
    await fill(cluster, sequence)
    await settled(cluster)


async def test_a_checkpoint_is_needed_where_the_log_does_not_begin(cluster: Cluster) -> None:
    """With a whole log its loss only costs time; without, the copy counts for nothing."""
    await cluster.start()
    await fill(cluster, 0, batches=12)
    await settled(cluster)
    await recycle(cluster)
    name = next(name for name in sorted(cluster.nodes) if not cluster.leads(name))
    before = cluster.nodes[name].store.replicas[0].copy_id
    assert log_start(cluster, name) > 0
    cluster.kill(name)
    folder = cluster.disks[name].at("checkpoints").at("p-0000")
    folder.flip_bit(next(file for file in folder.list() if file.startswith("state-")), 100)
    await cluster.start(name)
    assert any("the checkpoint cannot be used" in report for report in cluster.reports)
    await cluster.until(lambda: cluster.nodes[name].store.replicas[0].copy_id != before)
    await settled(cluster)
