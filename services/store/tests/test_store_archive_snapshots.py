"""Snapshots bring the archive along: what a copy that lacks the log's older part can answer for afterwards."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tallymark_protocol.identifiers import encode_event_id
from tallymark_protocol.messages import Appended
from tallymark_runtime.disk import DiskError, MemoryDisk
from tallymark_store import checkpoint
from tallymark_store import incoming as incoming_checkpoint
from tallymark_store.archive import archiver as archiver_module
from tallymark_store.archive import incoming, policy
from tallymark_store.archive import manifest as manifests
from tallymark_store.archive.archiver import Archiver
from tallymark_store.archive.manifest import ArchiveError, ArchiveFile, Manifest
from tallymark_store.archive.writer import open_file
from tallymark_store.replication.effects import Role
from tallymark_store.sending import Sending
from tallymark_store.wal import WalConfig

from .archive_helpers import events_of, usual_log
from .cluster_driver import WAIT_S, Cluster
from .payload_builder import event

BATCH = 120


@pytest.fixture
async def cluster(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Cluster]:
    monkeypatch.setattr(archiver_module, "SLICE_EVENTS", 200)  # so that there are many files
    cluster = Cluster(
        recycle=True,
        wal=WalConfig(segment_bytes=8_192),
        archive="on",
        archive_events=10**9,
        archive_interval_s=1e6,
    )
    await cluster.create()
    yield cluster
    await cluster.close()


def archiver(cluster: Cluster, name: str) -> Archiver:
    found = cluster.nodes[name].archiver
    assert found is not None
    return found


def archive_folder(cluster: Cluster, name: str) -> MemoryDisk:
    return cluster.disks[name].at("archive").at("p-0000")


def manifest_of(cluster: Cluster, name: str) -> Manifest:
    disk = archive_folder(cluster, name)
    file = disk.open(manifests.NAME)
    return manifests.decode(file.read(0, file.size()).tobytes())


def log_start(cluster: Cluster, name: str) -> int:
    return cluster.nodes[name].store.partitions[0].index.log_start


async def fill(cluster: Cluster, sequence: int, *, batches: int = 6) -> int:
    """Some segments full of events, one of each batch a duplicate; returns the next sequence."""
    for i in range(sequence, sequence + batches):
        events = [event(1, "sum", value=k, id=encode_event_id(f"{i}-{k}")) for k in range(BATCH - 1)]
        answer = await cluster.append_anywhere([*events, events[0]], (1, i))
        assert isinstance(answer, Appended)
    return sequence + batches


async def caught_up(cluster: Cluster, *names: str) -> None:
    """Copies have folded all there is."""
    async with asyncio.timeout(WAIT_S):
        while True:
            leader = await cluster.wait_leader()
            end = cluster.nodes[leader].store.partitions[0].log_end
            stores = [cluster.nodes[name].store for name in names or sorted(cluster.nodes)]
            if all(store.partitions[0].applied >= end for store in stores):
                return
            await asyncio.sleep(0.005)


async def archive_and_recycle(cluster: Cluster, *names: str) -> None:
    for name in names or sorted(cluster.nodes):
        await archiver(cluster, name).take_all()
        await cluster.nodes[name].checkpointer.take()  # type: ignore[union-attr]


def archived_offsets(cluster: Cluster, name: str) -> list[int]:
    """Of the events in the listed files, each of which is as it is listed."""
    disk = archive_folder(cluster, name)
    manifest = manifest_of(cluster, name)
    found: list[int] = []
    for file in manifest.files:
        assert incoming.is_sound(disk, file.name, file)
        table = open_file(disk, file.name).read()
        offsets = table.column("offset").to_pylist()
        times = table.column("time_ns").to_pylist()
        assert (file.rows, file.min_time_ns, file.max_time_ns) == (len(offsets), min(times), max(times))
        assert all(file.start_offset <= offset < file.end_offset for offset in offsets)
        found += offsets
    assert len(found) == len(set(found))
    return sorted(found)


def check(cluster: Cluster, name: str, sequence: int) -> None:
    """A copy's own archive holds every accepted event below its end, which the log reaches back to."""
    store = cluster.nodes[name].store
    manifest = manifest_of(cluster, name)
    assert manifest.copy_id == store.replicas[0].copy_id
    assert log_start(cluster, name) <= manifest.end_offset <= store.partitions[0].log_end
    folder = archive_folder(cluster, name).list()
    assert set(folder) == {manifests.NAME, *(file.name for file in manifest.files)}
    events = archived_offsets(cluster, name)
    if manifest.end_offset == store.partitions[0].log_end:
        assert len(events) == (BATCH - 1) * sequence


async def behind(cluster: Cluster, *, is_archived: bool = True) -> tuple[str, str, int]:
    """A member that is down, of which the others' logs begin behind its end; leader, member, next sequence."""
    await cluster.start()
    leader = await cluster.wait_leader()
    name = next(name for name in sorted(cluster.nodes) if name != leader)
    sequence = await fill(cluster, 0, batches=4)
    await caught_up(cluster)
    if is_archived:
        await archive_and_recycle(cluster)
    else:
        for other in cluster.nodes:
            await cluster.nodes[other].checkpointer.take()  # type: ignore[union-attr]
    end = cluster.nodes[name].store.partitions[0].log_end
    cluster.kill(name)
    sequence = await fill(cluster, sequence)
    await caught_up(cluster)
    await archive_and_recycle(cluster)
    assert all(log_start(cluster, other) > end for other in cluster.nodes)
    return leader, name, sequence


async def installed(cluster: Cluster, name: str) -> None:
    await cluster.until(lambda: cluster.nodes[name].snapshots.installed)  # type: ignore[union-attr]
    await cluster.until(lambda: not cluster.nodes[name].snapshots._transfers)  # type: ignore[union-attr]
    await caught_up(cluster)


@pytest.mark.parametrize("is_wiped", [False, True])
async def test_an_archive_comes_with_a_snapshot(cluster: Cluster, is_wiped: bool) -> None:
    """The copy's own from then on: it goes on with it, recycles by it, and starts with it."""
    _, name, sequence = await behind(cluster)
    if is_wiped:
        cluster.wipe(name)
    await cluster.start(name)
    await installed(cluster, name)
    start = log_start(cluster, name)
    assert manifest_of(cluster, name).end_offset == start > 0
    check(cluster, name, sequence)
    for _ in range(2):
        sequence = await fill(cluster, sequence, batches=3)
        await caught_up(cluster)
        await archive_and_recycle(cluster)
        check(cluster, name, sequence)
        assert archived_offsets(cluster, name) == archived_offsets(cluster, await cluster.wait_leader())
        cluster.kill(name)
        await cluster.start(name)
        await caught_up(cluster)
    assert log_start(cluster, name) > start
    assert not [report for report in cluster.reports if "archive" in report]


async def test_files_that_are_here_are_not_sent_again(cluster: Cluster) -> None:
    """A member that was behind has the older ones, byte by byte: only the others are asked for."""
    leader, name, sequence = await behind(cluster)
    before = {file.name: file for file in manifest_of(cluster, name).files}
    assert set(before.values()) & set(manifest_of(cluster, leader).files)
    sending: Any = cluster.nodes[leader].snapshots.sending  # type: ignore[union-attr]
    asked: set[int] = set()
    on_ask = sending.on_ask

    def listen(sender: str, message: Any) -> None:
        asked.add(message.file)
        on_ask(sender, message)

    sending.on_ask = listen
    await cluster.start(name)
    await installed(cluster, name)
    held = next(iter(sending._held.values()))
    fetched = {held.find(place)[0] for place in asked if place > len(held.files)}
    assert fetched
    assert not fetched & set(before)
    assert {file.name for file in held.archive.files} == fetched | (
        set(before) & {file.name for file in held.archive.files}
    )
    check(cluster, name, sequence)


async def test_an_archive_that_reaches_beyond_the_snapshot_is_cut(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others archive, and merge, behind their checkpoints: the new copy's ends where its log begins."""
    leader, name, sequence = await behind(cluster)
    sequence = await fill(cluster, sequence)
    await caught_up(cluster)
    monkeypatch.setattr(policy, "FAN_IN", 3)
    for other in sorted(cluster.nodes):
        for _ in range(8):
            await archiver(cluster, other).take_all()  # and no checkpoint
    offset = checkpoint.load_manifest(cluster.disks[leader].at("checkpoints").at("p-0000")).offset  # type: ignore[union-attr]
    files = manifest_of(cluster, leader).files
    assert any(file.start_offset < offset < file.end_offset for file in files)
    await cluster.start(name)
    await installed(cluster, name)
    assert manifest_of(cluster, name).end_offset == log_start(cluster, name) == offset
    check(cluster, name, sequence)
    await archiver(cluster, name).take_all()
    check(cluster, name, sequence)
    assert archived_offsets(cluster, name) == archived_offsets(cluster, leader)


async def test_what_is_not_archived_is_archived_first(cluster: Cluster) -> None:
    """A checkpoint may be ahead of the archive: the log below it is there, and goes into the archive that is sent."""
    _, name, sequence = await behind(cluster)
    sequence = await fill(cluster, sequence)
    await caught_up(cluster)
    for other in cluster.nodes:
        end = archiver(cluster, other).end_offset(0)
        await cluster.nodes[other].checkpointer.take()  # type: ignore[union-attr]
        assert log_start(cluster, other) <= end  # whatever the checkpoint covers
    await cluster.start(name)
    await installed(cluster, name)
    assert manifest_of(cluster, name).end_offset == log_start(cluster, name)
    check(cluster, name, sequence)


async def test_lent_files_stay_while_they_are_merged(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is being sent is read to its end; afterwards it goes."""
    leader, _, sequence = await behind(cluster)
    end = archiver(cluster, leader).end_offset(0)
    lent: Any = await archiver(cluster, leader).lend("who", 0, end)
    monkeypatch.setattr(policy, "FAN_IN", 2)
    for _ in range(8):
        await archiver(cluster, leader).take_all()
    folder = archive_folder(cluster, leader)
    assert len(manifest_of(cluster, leader).files) < len(lent.files)
    assert all(incoming.is_sound(folder, file.name, file) for file in lent.files)
    archiver(cluster, leader).give_back("who")
    sequence = await fill(cluster, sequence, batches=1)
    await caught_up(cluster)
    for _ in range(4):
        await archiver(cluster, leader).take_all()
    check(cluster, leader, sequence)


# ------------------------------------------------------------ crashes


class Stop:
    """Lets nothing go on from a certain call: as if the process had ended there."""

    def __init__(self) -> None:
        self.is_reached = False

    def __call__(self, *_: Any, **__: Any) -> Any:
        self.is_reached = True
        raise DiskError("end", "here", errno.EIO)


def _after(call: Any, stop: Stop) -> Any:
    def wrapped(*args: Any, **options: Any) -> Any:
        call(*args, **options)
        return stop()

    return wrapped


def at_the_archive(stop: Stop, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(archiver_module, "complete_incoming", stop)


def behind_the_archive(stop: Stop, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(incoming_checkpoint, "complete", stop)


def at_the_exchange(stop: Stop, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Archiver, "install", stop)


def in_the_renames(stop: Stop, patch: pytest.MonkeyPatch) -> None:
    rename = MemoryDisk.rename

    def refuse(self: MemoryDisk, old: str, new: str) -> None:
        if stop.is_reached or (old.startswith("in-events") and not new.startswith("in-")):
            if stop.is_reached:
                stop()
            stop.is_reached = True
        rename(self, old, new)

    patch.setattr(MemoryDisk, "rename", refuse)


def at_the_manifest(stop: Stop, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(manifests, "publish", stop)


def behind_the_manifest(stop: Stop, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(manifests, "publish", _after(manifests.publish, stop))


def at_the_checkpoint(stop: Stop, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(incoming_checkpoint, "publish", stop)


STEPS = (
    at_the_archive,
    behind_the_archive,
    at_the_exchange,
    in_the_renames,
    at_the_manifest,
    behind_the_manifest,
    at_the_checkpoint,
)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("is_wiped", [False, True])
async def test_a_crash_while_an_archive_comes_in(
    cluster: Cluster, step: Any, is_wiped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start finds the copy before, or the whole new one, archive and all."""
    _, name, sequence = await behind(cluster)
    if is_wiped:
        cluster.wipe(name)
    stop = Stop()
    with monkeypatch.context() as patch:
        step(stop, patch)
        await cluster.start(name)
        await cluster.until(lambda: stop.is_reached)
        copy_id = cluster.nodes[name].store.replicas[0].copy_id
        cluster.kill(name)
    await cluster.start(name)
    replica = cluster.nodes[name].store.replicas[0]
    assert replica.copy_id == copy_id
    assert replica.role is not Role.DAMAGED
    if log_start(cluster, name) == 0:
        await installed(cluster, name)
    await caught_up(cluster)
    sequence = await fill(cluster, sequence, batches=2)
    await caught_up(cluster)
    await archive_and_recycle(cluster)
    check(cluster, name, sequence)
    assert manifest_of(cluster, name).end_offset == cluster.nodes[name].store.partitions[0].log_end
    assert not [report for report in cluster.reports if "its archive is left" in report]


async def test_an_archive_that_was_not_put_in_force_is_so_by_the_next_checkpoint(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk refuses once: nothing is archived behind the gap, nothing of the log dropped, until it is there."""
    _, name, sequence = await behind(cluster)
    stop = Stop()
    with monkeypatch.context() as patch:
        at_the_manifest(stop, patch)
        await cluster.start(name)
        await cluster.until(lambda: cluster.nodes[name].snapshots.installed)  # type: ignore[union-attr]
        assert stop.is_reached
    await archiver(cluster, name).take_all()
    assert 0 not in archiver(cluster, name).archives
    await cluster.nodes[name].checkpointer.take()  # type: ignore[union-attr]
    await archive_and_recycle(cluster, name)
    check(cluster, name, sequence)


# ------------------------------------------------------------ damage, and what is no archive


async def test_a_damaged_archive_is_not_sent(cluster: Cluster) -> None:
    """The state gets through all the same; the copy then says that its archive has a gap, and adds nothing to it."""
    leader, name, sequence = await behind(cluster)
    for other in cluster.nodes:
        folder = archive_folder(cluster, other)
        folder.flip_bit(manifest_of(cluster, other).files[1].name, 100)
    await cluster.start(name)
    await installed(cluster, name)
    before = manifest_of(cluster, name)
    assert before.end_offset < log_start(cluster, name)
    sequence = await fill(cluster, sequence, batches=2)
    await caught_up(cluster)
    await archive_and_recycle(cluster, name)
    start = log_start(cluster, name)
    await fill(cluster, sequence, batches=4)
    await caught_up(cluster)
    await archive_and_recycle(cluster, name)
    assert manifest_of(cluster, name) == before
    assert log_start(cluster, name) == start  # it holds what nobody archives
    assert any("is damaged" in report for report in cluster.reports)
    assert any(f"the log begins at offset {start}" in report for report in cluster.reports)
    assert leader in cluster.nodes


async def test_a_file_that_arrives_otherwise_is_not_installed(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was right when it was looked at may rot before it is read again: the next try is looked at again."""
    leader, name, sequence = await behind(cluster)
    flipped: list[str] = []
    real = Sending._send_piece

    async def send_piece(self: Any, to: str, held: Any, ask: Any, file: str, size: int) -> None:
        if ask.file > len(held.files) and not flipped:
            flipped.append(file)
            archive_folder(cluster, leader).flip_bit(file, 100)
            await real(self, to, held, ask, file, size)
            archive_folder(cluster, leader).flip_bit(file, 100)
            return
        await real(self, to, held, ask, file, size)

    monkeypatch.setattr(Sending, "_send_piece", send_piece)
    await cluster.start(name)
    await installed(cluster, name)
    assert flipped
    check(cluster, name, sequence)


def test_what_is_offered_is_looked_at() -> None:
    """Of another partition, too short, with sizes that cannot be, or damaged: refused."""
    file = ArchiveFile(manifests.file_name(0, 10), 0, 10, 5, 100, 1, 0, 1)
    good = Manifest(0, "x", 10, (file,))
    assert incoming.offered(manifests.encode(good), 0, 10) == good
    for data, number, offset in (
        (manifests.encode(good), 1, 10),
        (manifests.encode(good), 0, 11),
        (manifests.encode(good)[:-3] + b"0}\n", 0, 10),
        (manifests.encode(Manifest(0, "x", 10, (ArchiveFile(file.name, 0, 10, 5, 0, 1, 0, 1),))), 0, 10),
    ):
        with pytest.raises(ArchiveError):
            incoming.offered(data, number, offset)


@pytest.mark.parametrize("offset", [1, 49, 120, 333, 399, 401])
def test_a_file_is_cut_at_any_offset(offset: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The part holds just the events below, as they were, and is listed as it is."""
    from tallymark_store.archive import cut as module

    monkeypatch.setattr(module, "ROW_GROUP_ROWS", 16)
    log = usual_log()
    disk = MemoryDisk()
    (file,) = log.archived(disk)
    found = module.cut(disk, file.name, file, offset, "part", {})
    expected = [row for row in log.rows if row["offset"] < offset]
    if not expected:
        assert found is None
        assert "part" not in disk.list()
        return
    assert found is not None
    assert found.name == manifests.file_name(file.start_offset, offset)
    assert (found.start_offset, found.end_offset, found.rows) == (file.start_offset, offset, len(expected))
    assert incoming.is_sound(disk, "part", found)
    assert events_of(open_file(disk, "part").read()) == expected
    assert found.min_time_ns == min(row["time_ns"] for row in expected)
    assert found.max_time_ns == max(row["time_ns"] for row in expected)
