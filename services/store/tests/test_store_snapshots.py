"""Stores whose log no longer reaches back: snapshots across real nodes, and what a crash in between leaves."""

from __future__ import annotations

import asyncio
import copy
import errno
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import google_crc32c
import pytest

from tallymark_protocol.errors import ErrorCode, Reason, RemoteProtocolError, UnavailableError
from tallymark_protocol.identifiers import encode_event_id
from tallymark_protocol.messages import Appended, StoreDigest, StoreEvents
from tallymark_runtime.clock import ManualClock
from tallymark_runtime.disk import DiskError, MemoryDisk
from tallymark_store import checkpoint, incoming
from tallymark_store import snapshots as snapshots_module
from tallymark_store.recycling import Holds
from tallymark_store.replication.effects import Role
from tallymark_store.replication.messages import Ask, Offer, Piece
from tallymark_store.replication.ports import ReplicaConfig
from tallymark_store.sending import HOLD_NS, PIECE_BYTES
from tallymark_store.snapshots import WINDOW, Snapshots, _Transfer
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
    assert sum(node.snapshots.sending.sent for node in cluster.nodes.values() if node.snapshots) == 1
    leader = await cluster.wait_leader()
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


def partition_folder(cluster: Cluster, name: str) -> MemoryDisk:
    return cluster.disks[name].at("checkpoints").at("p-0000")


async def test_a_snapshot_whose_files_have_gone_is_not_begun_with(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the last look at them and the exchange: the log stays as it is, and the next one is taken."""
    _, name, sequence = await behind(cluster)
    real = incoming.complete
    calls = []

    def complete(disk: Any, manifest: Any, offered: Any) -> None:
        real(disk, manifest, offered)
        calls.append(offered.snapshot)
        if len(calls) == 1:
            disk.remove("in-0")

    monkeypatch.setattr(incoming, "complete", complete)
    await cluster.start(name)
    await cluster.until(lambda: cluster.nodes[name].snapshots.installed)  # type: ignore[union-attr]
    assert len(calls) == 2
    assert [file for file in partition_folder(cluster, name).list() if file.startswith("state-")]
    cluster.kill(name)
    await cluster.start(name)
    assert cluster.nodes[name].store.replicas[0].role is not Role.DAMAGED
    await fill(cluster, sequence)
    await settled(cluster)


async def test_a_late_checkpoint_of_a_discarded_copy_leaves_what_is_coming_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It takes itself away, and nothing else."""
    cluster = Cluster(("a",), replication_factor=1)
    try:
        await cluster.create()
        await cluster.start()
        await fill(cluster, 0, batches=1)
        status: Any = await cluster.nodes["a"].call(StoreDigest(partition=0))
        assert status.applied
        folder = partition_folder(cluster, "a")
        for file in ("in-0", "in-COMPLETE"):
            checkpoint.write_container(folder, file, {"x": b"y"})
        partitions = cluster.nodes["a"].store.partitions
        before = partitions[0]
        real = checkpoint.publish

        def publish(*args: Any) -> None:
            real(*args)
            partitions[0] = copy.copy(before)  # as if it had begun anew

        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "publish", publish)
            await cluster.nodes["a"].checkpointer.take()  # type: ignore[union-attr]
        partitions[0] = before
        assert sorted(folder.list()) == ["in-0", "in-COMPLETE"]
        checkpoint.discard(folder)
        assert folder.list() == []
    finally:
        await cluster.close()


async def test_a_snapshot_is_not_published_without_its_files() -> None:
    """A manifest never lists what is not there."""
    disk = MemoryDisk()
    manifest = incoming.manifest_of(offer())
    for place in (0, 2):
        incoming.create(disk, place).close()
    assert not incoming.is_complete(disk, manifest)
    with pytest.raises(checkpoint.CheckpointError, match="missing"):
        incoming.publish(disk, manifest)
    assert checkpoint.load_manifest(disk) is None
    incoming.create(disk, 1).close()
    incoming.publish(disk, manifest)
    assert checkpoint.load_manifest(disk) == manifest


def rename_is_refused_once(patch: pytest.MonkeyPatch) -> list[str]:
    """The disk refuses to give a snapshot's second file its name; the first one has its own by then."""
    rename = MemoryDisk.rename
    refused: list[str] = []

    def refuse(self: MemoryDisk, old: str, new: str) -> None:
        if old == "in-1" and not refused:
            refused.append(old)
            raise DiskError("rename", old, errno.EIO)
        rename(self, old, new)

    patch.setattr(MemoryDisk, "rename", refuse)
    return refused


async def published_late(cluster: Cluster, name: str) -> None:
    """A start finds the snapshot that is in force, published, and nothing of it under another name."""
    manifest = checkpoint.load_manifest(partition_folder(cluster, name))
    assert manifest is not None
    assert manifest.offset >= log_start(cluster, name) > 0
    cluster.kill(name)
    await cluster.start(name)
    assert cluster.nodes[name].store.replicas[0].role is not Role.DAMAGED
    assert not [report for report in cluster.reports if "the log begins at" in report]


async def test_the_next_offer_does_not_remove_what_was_not_published(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is all that the copy has on disk, beside a log that begins there."""
    leader, name, sequence = await behind(cluster)
    refused = rename_is_refused_once(monkeypatch)
    await cluster.start(name)
    snapshots: Any = cluster.nodes[name].snapshots
    await cluster.until(lambda: snapshots.installed)
    assert refused
    await cluster.until(lambda: not snapshots._transfers)
    assert checkpoint.load_manifest(partition_folder(cluster, name)) is None
    replica = cluster.nodes[name].store.replicas[0]
    snapshots.install(0, leader, offer(epoch=replica.epoch, offset=40))
    await cluster.until(lambda: 0 in cluster.nodes[name].snapshots._manifests)  # type: ignore[union-attr]
    await published_late(cluster, name)
    await fill(cluster, sequence)
    await settled(cluster)


async def test_a_checkpoint_publishes_first_what_was_not(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own files may have the same names."""
    _, name, sequence = await behind(cluster)
    refused = rename_is_refused_once(monkeypatch)
    await cluster.start(name)
    await cluster.until(lambda: cluster.nodes[name].snapshots.installed)  # type: ignore[union-attr]
    assert refused

    def write(*_: Any, **__: Any) -> None:
        raise DiskError("write", "state", errno.ENOSPC)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write", write)
        await fill(cluster, sequence, batches=1)
        node = cluster.nodes[name]
        await cluster.until(lambda: node.store.partitions[0].applied > log_start(cluster, name))
        with pytest.raises(DiskError):
            await node.checkpointer.take()  # type: ignore[union-attr]
    await published_late(cluster, name)
    await fill(cluster, sequence + 1)
    await settled(cluster)


@pytest.mark.parametrize("error", [KeyError("windows"), ValueError("a shape"), MemoryError()])
async def test_a_snapshot_that_cannot_be_loaded_is_not_fetched_without_end(
    cluster: Cluster, error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever the reason: it is logged, and the next is taken after a while; then it is as if nothing had been."""
    _, name, sequence = await behind(cluster)

    def restore(*_: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(snapshots_module, "restore", restore)
        patch.setattr(snapshots_module, "BACK_OFF_NS", 10**15)
        patch.setattr(snapshots_module, "BACK_OFF_NS_MAX", 10**15)
        await cluster.start(name)
        snapshots: Any = cluster.nodes[name].snapshots
        await cluster.until(lambda: snapshots._failed)
        await cluster.until(lambda: not snapshots._transfers)
        assert "no snapshot was installed" in caplog.text
        assert type(error).__name__ in caplog.text
        received = snapshots.received_bytes
        snapshots.install(0, "a", offer())
        assert not snapshots._transfers
        assert snapshots.received_bytes == received
    failures, until_ns = snapshots._failed[0]
    assert failures == 1
    snapshots._failed[0] = (failures, until_ns - 10**15)
    await cluster.until(lambda: snapshots.installed)
    assert not snapshots._failed
    await fill(cluster, sequence)
    await settled(cluster)


# ------------------------------------------------------------ dropping the log


def at_the_start_of_the_log(stop: Stop, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(checkpoint, "write_wal_start", stop)


def behind_the_start_of_the_log(stop: Stop, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(checkpoint, "write_wal_start", after(checkpoint.write_wal_start, stop))


def between_two_files(stop: Stop, patch: pytest.MonkeyPatch) -> None:
    remove = MemoryDisk.remove
    gone = []

    def remove_one(self: MemoryDisk, name: str) -> None:
        if name.startswith("wal-"):
            if gone:
                stop()
            gone.append(name)
        remove(self, name)

    patch.setattr(MemoryDisk, "remove", remove_one)


@pytest.mark.parametrize("step", [at_the_start_of_the_log, behind_the_start_of_the_log, between_two_files])
async def test_a_crash_while_the_log_is_dropped(step: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is gone by then, log and checkpoints together hold everything; and the next time it goes on."""
    cluster = Cluster(("a",), replication_factor=1, recycle=True, wal=WalConfig(segment_bytes=8_192))
    try:
        await cluster.create()
        await cluster.start()
        await fill(cluster, 0, batches=20)
        status: Any = await cluster.nodes["a"].call(StoreDigest(partition=0))
        stop = Stop()
        with monkeypatch.context() as patch:
            step(stop, patch)
            with pytest.raises(DiskError):
                await recycle(cluster)
            assert stop.is_reached
            cluster.kill("a")
        await cluster.start()
        assert cluster.reports == []
        again: Any = await cluster.nodes["a"].call(StoreDigest(partition=0))
        assert again.digest.split("-")[:2] == status.digest.split("-")[:2]
        assert await cluster.count("a", 1) == 20 * 120
        sequence = await fill(cluster, 20, batches=4)
        before = len(cluster.disks["a"].at("wal").list())
        await recycle(cluster)
        assert log_start(cluster, "a") > 120 * 16
        assert len(cluster.disks["a"].at("wal").list()) < min(before, 8)
        cluster.kill("a")
        await cluster.start()
        repeats = await cluster.append_anywhere(ids(120, 0), (3, 0))
        assert len(repeats.chunks[0].exceptions) == 120
        assert await cluster.count("a", 1) == sequence * 120
    finally:
        await cluster.close()


async def test_what_is_sent_keeps_the_log(cluster: Cluster) -> None:
    """As long as somebody asks, and no longer."""
    leader, name, sequence = await behind(cluster)
    snapshots = cluster.nodes[leader].snapshots
    assert snapshots is not None
    sending = snapshots.sending
    replica = cluster.nodes[leader].store.replicas[0]
    snapshots.offer(0, name, replica.epoch)
    (held,) = sending._held.values()
    await cluster.until(lambda: held.files)
    await fill(cluster, sequence, batches=12)
    await settled(cluster)
    await recycle(cluster)
    offset = held.manifest.offset
    assert log_start(cluster, leader) <= offset
    folder = cluster.disks[leader].at("checkpoints").at("p-0000")
    assert {file for file, _, _ in held.files} <= set(folder.list())
    held.asked_ns -= HOLD_NS + 1
    await fill(cluster, sequence + 12, batches=2)
    await settled(cluster)  # folded: else there is nothing to take a checkpoint of
    await recycle(cluster, leader)
    await fill(cluster, sequence + 14, batches=1)
    await settled(cluster)
    await recycle(cluster, leader)
    assert not sending._held
    assert log_start(cluster, leader) > offset
    assert held.files[0][0] not in folder.list()
    await cluster.start(name)
    await settled(cluster)


# ------------------------------------------------------------ bytes of a peer


def offer(**changes: Any) -> Offer:
    fields: dict[str, Any] = {
        "partition": 0,
        "epoch": 5,
        "instance": "a-1",
        "snapshot": "x",
        "offset": 40,
        "last_epoch": 5,
        "append_ns": 7,
        "members": [("a", "a1"), ("b", "b1")],
        "members_offset": -1,
        "files": [
            (checkpoint.state_name(40), 2_000_000, 1),
            (checkpoint.ids_name(3, 30), 10, 2),
            (checkpoint.ids_name(30, 40), 10, 2),
        ],
    }
    return Offer(**{**fields, **changes})


def test_an_offer_is_a_manifest() -> None:
    """With names of this side's own making."""
    manifest = incoming.manifest_of(offer())
    assert (manifest.partition, manifest.offset, manifest.epoch, manifest.last_append_ns) == (0, 40, 5, 7)
    assert manifest.id_files == [(checkpoint.ids_name(3, 30), 3, 30), (checkpoint.ids_name(30, 40), 30, 40)]
    assert manifest.memberships == [(-1, [("a", "a1"), ("b", "b1")])]


STATE = (checkpoint.state_name(40), 9, 1)


@pytest.mark.parametrize(
    "changes",
    [
        {"files": []},
        {"files": [STATE, *[(checkpoint.ids_name(k, k + 1), 9, 1) for k in range(incoming.FILES_MAX)]]},
        {"files": [("../../etc/passwd", 9, 1)]},
        {"files": [(checkpoint.state_name(41), 9, 1)]},
        {"files": [STATE, ("MANIFEST", 9, 1)]},
        {"files": [STATE, ("../" + checkpoint.ids_name(1, 2), 9, 1)]},
        {"files": [STATE, (checkpoint.ids_name(1, 2) + "\n", 9, 1)]},
        {"files": [STATE, (checkpoint.ids_name(5, 5), 9, 1)]},
        {"files": [STATE, (checkpoint.ids_name(5, 41), 9, 1)]},
        {"files": [STATE, (checkpoint.ids_name(5, 9), 9, 1), (checkpoint.ids_name(8, 12), 9, 1)]},
        {"files": [(STATE[0], 0, 1)]},
        {"files": [(STATE[0], -4, 1)]},
        {"files": [(STATE[0], 1 << 60, 1)]},
        {"files": [(STATE[0], 9, 2**32)]},
        {"members": []},
        {"members": [("a", "1"), ("a", "2")]},
        {"members": [(f"n{k}", "1") for k in range(65)]},
        {"members_offset": -2},
        {"members_offset": 40},
        {"offset": 0},
    ],
)
def test_an_offer_that_makes_no_sense_is_refused(changes: dict[str, Any]) -> None:
    """Before anything is written, asked for, or believed."""
    with pytest.raises(RemoteProtocolError):
        incoming.manifest_of(offer(**changes))


def getting(rate: int) -> tuple[Snapshots, list[Any], ManualClock]:
    """The receiving side alone, and what it sends."""
    sent: list[Any] = []
    clock = ManualClock(monotonic_ns=10**12)
    replicating = SimpleNamespace(send=lambda number, to, message: sent.append(message), snapshots=None)
    store: Any = SimpleNamespace(replicating=replicating)
    nothing: Any = None
    snapshots = Snapshots(
        store, nothing, {}, nothing, clock, Holds(),
        config=ReplicaConfig(catch_up_bytes_per_s=rate), salt=1, dedup_window_ns=1, offload=nothing,
    )  # fmt: skip
    return snapshots, sent, clock


def piece(ask: Ask, data: bytes, **changes: Any) -> Piece:
    fields = {"snapshot": ask.snapshot, "file": ask.file, "position": ask.position, "data": data}
    return Piece(0, **{**fields, "checksum": google_crc32c.value(data), **changes})  # type: ignore[arg-type]


def test_pieces_are_asked_for_a_few_at_a_time_at_a_rate_and_again() -> None:
    """And only what was asked for is taken, once, whole."""
    rate = 4 * PIECE_BYTES
    snapshots, sent, clock = getting(rate)
    offered = offer(files=[(checkpoint.state_name(40), 40 * PIECE_BYTES + 5, 1)])
    transfer = _Transfer(0, "a", offered, incoming.manifest_of(offered), clock.monotonic_ns())
    snapshots._transfers[0] = transfer
    assert transfer.left == 41
    snapshots._ask(transfer)
    assert 0 < len(sent) <= WINDOW
    snapshots._ask(transfer)
    first = len(sent)
    clock.advance(ReplicaConfig().resend_ns)
    snapshots._ask(transfer)
    assert sent[first] == sent[0], "what does not come is asked for again"
    data = bytes(PIECE_BYTES)
    ask = sent[0]
    for wrong in (
        piece(ask, data[1:]),
        piece(ask, data, checksum=1),
        piece(ask, data, snapshot="y"),
        piece(ask, data, file=7),
        piece(ask, data, position=ask.position + 1),
        piece(ask, data, position=30 * PIECE_BYTES),
    ):
        snapshots.take("a", wrong)
        assert not transfer.arrived
    snapshots.take("a", piece(ask, data))
    snapshots.take("a", piece(ask, data))
    assert len(transfer.arrived) == 1
    began = clock.monotonic_ns()
    asked: set[tuple[int, int]] = set()
    while clock.monotonic_ns() < began + 3 * 10**9:
        transfer.arrived.clear()
        for place in list(transfer.asked):
            snapshots.take("a", piece(Ask(0, "x", *place), bytes(transfer.piece_bytes(place))))
        clock.advance(10_000_000)
        snapshots._ask(transfer)
        asked |= {(message.file, message.position) for message in sent}
        assert len(transfer.asked) + len(transfer.arrived) <= WINDOW
    assert 3 * 4 * 0.8 <= len(asked) <= 3 * 4 + WINDOW + 2
