"""An archive that comes with a snapshot may begin later than the one that is here: nothing older is lost silently."""

from __future__ import annotations

from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from tallymark_protocol.errors import TallymarkError
from tallymark_protocol.messages import StoreEvents
from tallymark_protocol.zones import TIME_END_NS
from tallymark_runtime.disk import MemoryDisk
from tallymark_store import checkpoint, recovery
from tallymark_store.archive import archiver as archiver_module
from tallymark_store.archive import incoming, policy
from tallymark_store.archive import manifest as manifests
from tallymark_store.archive.manifest import ArchiveError, ArchiveFile, Manifest
from tallymark_store.calls import Calls
from tallymark_store.reads import Reads
from tallymark_store.scan.archived import ArchiveDamagedError
from tallymark_store.scan.source import WalSource
from tallymark_store.sending import Sending
from tallymark_store.wal import WalConfig

from .cluster_driver import Cluster
from .test_store_archive_snapshots import (
    BATCH,
    archive_and_recycle,
    archive_folder,
    archived_offsets,
    archiver,
    behind,
    caught_up,
    check,
    fill,
    installed,
    log_start,
    manifest_of,
)
from .test_store_archiver import World


@pytest.fixture
async def late(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Cluster]:
    monkeypatch.setattr(archiver_module, "SLICE_EVENTS", 200)
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


def begin_late(cluster: Cluster, start: int) -> None:
    """The archives of those that run begin at the first file from an offset on, as if they had never had more."""
    for name in cluster.nodes:
        manifest = manifest_of(cluster, name)
        kept = tuple(file for file in manifest.files if file.start_offset >= start)
        manifests.publish(
            archive_folder(cluster, name),
            msgspec.structs.replace(manifest, files=kept, start_offset=kept[0].start_offset),
        )
        archiver(cluster, name).reopen(0)


def checkpoint_of(cluster: Cluster, name: str) -> int:
    """The offset of a copy's newest checkpoint."""
    found = checkpoint.load_manifest(cluster.disks[name].at("checkpoints").at("p-0000"))
    assert found is not None
    return found.offset


def all_events(cluster: Cluster, name: str, from_offset: int = 0) -> list[int]:
    """Offsets of the events that a copy answers with."""
    store = cluster.nodes[name].store
    reads = Reads(
        store.partitions[0].fold,
        WalSource(store.wal, 0),
        archive=lambda: archiver(cluster, name).view(0),
    )
    found: list[int] = []
    following: int | None = from_offset
    while following is not None:
        page = reads.events(StoreEvents(0, None, None, 0, TIME_END_NS, following, 1_000))
        found += [event.offset for event in page.events]
        following = page.next_offset
    return found


@pytest.mark.parametrize(("back", "is_archived"), [(0, True), (150, True), (150, False)])
async def test_what_is_offered_begins_later_than_what_is_here(
    late: Cluster, back: int, is_archived: bool
) -> None:
    """This copy's own older files stay, cut where those begin that came; what its log has is archived before it goes."""
    cluster = late
    _, name, sequence = await behind(cluster, is_archived=is_archived)
    own_end = manifest_of(cluster, name).end_offset if is_archived else checkpoint_of(cluster, name)
    begin_late(cluster, own_end - back - 200)
    for other in cluster.nodes:
        assert 0 < manifest_of(cluster, other).start_offset <= own_end
    await cluster.start(name)
    await installed(cluster, name)
    manifest = manifest_of(cluster, name)
    assert (manifest.start_offset, manifest.gaps) == (0, ())
    assert manifest.end_offset == log_start(cluster, name) > own_end
    check(cluster, name, sequence)
    sequence = await fill(cluster, sequence, batches=3)
    await caught_up(cluster)
    await archive_and_recycle(cluster, name)
    check(cluster, name, sequence)
    assert len(all_events(cluster, name)) == len(archived_offsets(cluster, name))


async def test_a_gap_between_both_is_told(late: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """What neither side has is in the manifest, and in what the store says; reads that need it are refused."""
    cluster = late
    _, name, sequence = await behind(cluster)
    own = manifest_of(cluster, name)
    begin_late(cluster, own.end_offset + 150)
    offered = manifest_of(cluster, next(iter(cluster.nodes)))
    await cluster.start(name)
    await installed(cluster, name)
    manifest = manifest_of(cluster, name)
    ((gap_start, gap_end),) = manifest.gaps
    assert manifest.start_offset == 0
    assert own.end_offset <= gap_start < gap_end == offered.start_offset
    assert manifest.end_offset == log_start(cluster, name)
    assert any(f"neither has offsets {gap_start} up to {gap_end}" in report for report in cluster.reports)
    offsets = archived_offsets(cluster, name)
    assert [offset for offset in offsets if offset < gap_start]
    assert not [offset for offset in offsets if gap_start <= offset < gap_end]
    with pytest.raises(TallymarkError, match=f"from {gap_start} up to {gap_end}"):
        all_events(cluster, name)
    assert all_events(cluster, name, gap_end)[0] == min(o for o in offsets if o >= gap_end)
    # Merging never reaches across, and the gap stays through restarts.
    monkeypatch.setattr(policy, "FAN_IN", 2)
    for _ in range(8):
        await archiver(cluster, name).take_all()
    cluster.kill(name)
    await cluster.start(name)
    await caught_up(cluster)
    sequence = await fill(cluster, sequence, batches=2)
    await caught_up(cluster)
    await archive_and_recycle(cluster, name)
    manifest = manifest_of(cluster, name)
    assert manifest.gaps == ((gap_start, gap_end),)
    assert manifest.end_offset == cluster.nodes[name].store.partitions[0].log_end
    assert not [
        file for file in manifest.files if file.start_offset < gap_end and file.end_offset > gap_start
    ]


async def test_a_damaged_file_of_ones_own_is_a_gap(late: Cluster) -> None:
    """What can't be read any more isn't kept, and its offsets are told."""
    cluster = late
    _, name, _ = await behind(cluster)
    own = manifest_of(cluster, name)
    begin_late(cluster, own.end_offset)
    archive_folder(cluster, name).flip_bit(own.files[-1].name, 100)
    await cluster.start(name)
    await installed(cluster, name)
    manifest = manifest_of(cluster, name)
    assert manifest.start_offset == 0
    assert manifest.gaps[0][0] == own.files[-1].start_offset
    assert manifest.gaps[0][1] >= own.end_offset
    assert own.files[0] in manifest.files


def send_the_state_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No snapshot has an archive with it from now on."""
    hold = Sending._hold

    def alone(self: Any, number: int, copy_id: str) -> Any:
        self.archiver = None
        return hold(self, number, copy_id)

    monkeypatch.setattr(Sending, "_hold", alone)


async def test_what_a_log_has_is_archived_before_it_goes(
    late: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A snapshot comes without an archive, and this copy has archived nothing: its raw events are in its log only."""
    cluster = late
    _, name, _ = await behind(cluster, is_archived=False)
    committed = checkpoint_of(cluster, name)
    send_the_state_alone(monkeypatch)
    await cluster.start(name)
    await installed(cluster, name)
    manifest = manifest_of(cluster, name)
    assert (manifest.start_offset, manifest.end_offset) == (0, committed)
    assert manifest.rows == 4 * (BATCH - 1)
    assert log_start(cluster, name) > committed
    assert any("its archive is left as it is" in report for report in cluster.reports)


async def test_what_a_try_before_has_left_is_forgotten(
    late: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A snapshot without an archive: one that came in for another snapshot is neither put in force, nor in the way."""
    cluster = late
    _, name, _ = await behind(cluster)
    before = manifest_of(cluster, name)
    incoming.complete(
        archive_folder(cluster, name), Manifest(0, before.copy_id, before.end_offset + 3, before.files)
    )
    send_the_state_alone(monkeypatch)
    await cluster.start(name)
    await installed(cluster, name)
    folder = archive_folder(cluster, name)
    assert not [file for file in folder.list() if file.startswith(manifests.INCOMING)]
    assert manifest_of(cluster, name) == before
    assert not [report for report in cluster.reports if "left out" in report]


def archive_of(*ranges: tuple[int, int], start: int = 0, end: int = 0, gaps: Any = ()) -> Manifest:
    files = tuple(ArchiveFile(manifests.file_name(a, b), a, b, b - a, 100, 1, 0, 9) for a, b in ranges)
    return Manifest(0, "x", end, files, start_offset=start, gaps=gaps)


def test_holes_are_filled_from_what_is_here() -> None:
    """Before the beginning of what is offered, and in its gaps; everything else comes from there."""
    own = archive_of((0, 10), (12, 40), (40, 60), start=0, end=70)
    offered = archive_of((20, 30), (50, 90), start=20, end=100, gaps=((30, 50),))
    parts = incoming.own_parts(own, offered, 80)
    assert [(p.file.start_offset, p.first, p.last) for p in parts] == [
        (0, 0, 10), (12, 12, 20), (12, 30, 40), (40, 40, 50),
    ]  # fmt: skip
    made = incoming.joined(offered, own, (), 80)
    assert (made.start_offset, made.end_offset, made.gaps) == (0, 80, ())
    made = incoming.joined(offered, own, parts[:1], 80)
    assert (made.start_offset, made.gaps) == (10, ())
    made = incoming.joined(offered, own, parts[2:3], 80)
    assert made.gaps == ((30, 40),)
    made = incoming.joined(offered, archive_of((0, 5), end=8), (), 80)
    assert (made.start_offset, made.gaps) == (0, ((8, 20), (30, 50)))
    made = incoming.joined(offered, None, (), 40)
    assert (made.start_offset, made.end_offset, made.gaps) == (20, 40, ((30, 40),))
    made = incoming.joined(archive_of(start=40, end=40), None, (), 40)
    assert (made.start_offset, made.gaps) == (40, ())


def test_gaps_are_written_and_looked_at() -> None:
    """A manifest with gaps has a version that earlier software refuses; gaps that cannot be are damage."""
    good = archive_of((0, 10), (20, 30), end=40, gaps=((10, 15), (30, 40)))
    data = manifests.encode(good)
    assert manifests.decode(data) == good
    assert b'"format_version":2' in data
    assert b'"format_version":1' in manifests.encode(archive_of((0, 10), end=10))
    for gaps in (((10, 10),), ((15, 12),), ((12, 15), (13, 16)), ((9, 12),), ((35, 41),)):
        with pytest.raises(ArchiveError, match="makes no sense"):
            manifests.decode(manifests.encode(msgspec.structs.replace(good, gaps=gaps)))


def test_no_merge_reaches_across_a_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files on both sides of it stay apart, whatever their sizes."""
    monkeypatch.setattr(policy, "FAN_IN", 3)
    files = archive_of((0, 10), (10, 20), (30, 40), (40, 50), end=50).files
    assert policy.next_merge(files) == (0, 3)
    assert policy.next_merge(files, ((20, 30),)) is None
    more = (*files, *archive_of((50, 60), end=60).files)
    assert policy.next_merge(more, ((20, 30),)) == (2, 5)
    assert policy.next_merge(more, ((20, 25),)) == (2, 5)


def test_a_stale_archive_on_its_way_in_damages_nothing_at_a_start() -> None:
    """One that came with another snapshot is left out and cleared; the archive that is in force stays as it is."""
    root = MemoryDisk()
    disk = root.at("archive").at("p-0000")
    good = Manifest(0, "x", 40, start_offset=40)
    manifests.publish(disk, good)
    incoming.complete(disk, Manifest(0, "x", 30))
    reports: list[str] = []
    recovery._finish_archive(root, 0, 40, reports.append)
    assert disk.list() == [manifests.NAME]
    assert manifests.load(disk) == good
    assert "left out: the archive that has come in ends at offset 30" in reports[0]


async def test_a_late_readers_error_does_not_condemn_a_new_archive() -> None:
    """It is told by which reader it was found: one of an archive that was replaced since only has its read begun anew."""
    world = World()
    world.send(12)
    await world.archiver.take_all()
    earlier = world.archiver.archives[0].reader
    world.archiver.reopen(0)
    await world.archiver.open_all()
    error = earlier.damaged(world.manifest().files[0], "it is missing")  # type: ignore[union-attr]
    assert error.reader is earlier
    assert not world.archiver.damaged(0, error.message, error.reader)
    assert world.archiver.end_offset(0) == world.end
    calls: Any = SimpleNamespace(
        _store=SimpleNamespace(folding=SimpleNamespace(check_kept=lambda _: None)),
        archive_damaged=world.archiver.damaged,
    )
    reads = iter([error, "answer"])

    async def in_steps(*_: Any) -> Any:
        found = next(reads)
        if isinstance(found, Exception):
            raise found
        return found

    calls._in_steps = in_steps
    partition: Any = SimpleNamespace(partition=0, index=SimpleNamespace(log_start=7))
    assert await Calls._stepped(calls, partition, lambda: None) == "answer"  # type: ignore[arg-type,return-value]
    present = world.archiver.archives[0].reader.damaged(world.manifest().files[0], "it is missing")  # type: ignore[union-attr]
    reads = iter([present])
    with pytest.raises(ArchiveDamagedError):
        await Calls._stepped(calls, partition, lambda: None)  # type: ignore[arg-type,return-value]
    assert world.archiver.end_offset(0) == 0


async def test_nothing_is_offered_before_the_archive_is_at_hand(late: Cluster) -> None:
    """A store may lead again before it has started altogether: what it offered then would go without its archive."""
    _, name, _ = await behind(late)
    leader = await late.wait_leader()
    snapshots: Any = late.nodes[leader].snapshots
    epoch = late.nodes[leader].store.replicas[0].epoch
    lock, snapshots._checkpoint_lock = snapshots._checkpoint_lock, None
    snapshots.offer(0, name, epoch)
    assert not snapshots.sending._held
    snapshots._checkpoint_lock = lock
    snapshots.offer(0, name, epoch)
    assert snapshots.sending._held
