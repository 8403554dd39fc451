"""Final files of an archive go elsewhere, and come back when they are read; nothing of them is lost on the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tallymark_protocol.errors import UnavailableError
from tallymark_protocol.messages import StoreEvents
from tallymark_protocol.zones import TIME_END_NS
from tallymark_runtime.disk import DiskError, MemoryDisk
from tallymark_runtime.objects import ArrowTarget, FolderTarget, open_target
from tallymark_store.archive import archiver as archiver_module
from tallymark_store.archive import manifest as manifests
from tallymark_store.archive import policy, retention
from tallymark_store.archive.home import Home
from tallymark_store.archive.manifest import Manifest
from tallymark_store.reads import Reads
from tallymark_store.scan.source import WalSource
from tallymark_store.wal import WalConfig

from .cluster_driver import Cluster
from .power_cut import CrashAt
from .test_store_archive_snapshots import BATCH, archiver, behind, installed, manifest_of
from .test_store_archiver import World
from .test_store_retention import DAY_NS, Kept


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three files become one, which is final."""
    monkeypatch.setattr(policy, "FAN_IN", 3)
    monkeypatch.setattr(policy, "BASE_ROWS", 10)
    monkeypatch.setattr(policy, "ROWS_MAX", 40)


class Wrong:
    """A target that fails, or ends the process, at its n-th call."""

    def __init__(self, target: Any, calls: int, error: type[Exception] = OSError) -> None:
        self._target = target
        self._error = error
        self.calls = calls

    def __getattr__(self, name: str) -> Any:
        inner = getattr(self._target, name)
        if name == "abort":
            return inner

        def call(*args: Any) -> Any:
            self.calls -= 1
            if self.calls < 0:
                raise self._error("here")
            found = inner(*args)
            return Wrong(found, self.calls, self._error) if name == "create" else found

        return call


def homed(world: World, target: Any, cache_bytes: int = 1) -> None:
    """Begin a life with a home."""
    world.others["home"] = Home(target, cache_bytes)
    world.others["cache"] = world.driver.disk.at("archive-cache")
    world.start()


async def settle(world: World) -> None:
    for _ in range(8):
        await world.archiver.take_all()
    while await world.archiver.send_home():
        pass


def own_manifest(world: World) -> Manifest:
    found = manifests.load(world.folder(), has_home=True)
    assert found is not None
    return found


def told(target: Any) -> Manifest:
    return manifests.decode(b"".join(target.read("p-0000/MANIFEST.json")))


def events(world: World) -> list[tuple[int, int, int]]:
    """As a read answers."""
    reads = Reads(
        world.driver.partitions[0].fold,
        WalSource(world.driver.wal, 0),
        archive=lambda: world.archiver.view(0),
    )
    page = reads.events(StoreEvents(0, None, None, 0, TIME_END_NS, 0, 1_000))
    return [(event.offset, event.account_id, int(event.value)) for event in page.events]


@pytest.fixture(params=["folder", "url"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    place = tmp_path / "home"
    if request.param == "folder":
        return open_target(str(place), "node")
    return ArrowTarget(f"file://{place}", "node")


async def test_final_files_go_home_and_are_read_from_there(target: Any) -> None:
    """Here is what isn't final, and one file of the others; there is a whole archive up to the first that isn't there."""
    world = World()
    homed(world, target)
    for _ in range(12):
        world.send(9)
        await settle(world)
    manifest = own_manifest(world)
    away = [file for file in manifest.files if file.at_home]
    assert len(away) >= 3
    assert all(policy.is_full(file) == file.at_home for file in manifest.files)
    here = set(world.folder().list())
    assert len([file for file in away if file.name in here]) <= 1
    assert set(target.names("p-0000")) == {"MANIFEST.json", *(file.name for file in away)}
    there = told(target)
    assert [file.name for file in there.files] == [file.name for file in away]
    assert there.end_offset == away[-1].end_offset
    assert b'"format_version":2' in manifests.encode(manifest)
    before = world.others["home"].fetched_bytes
    assert events(world) == world.in_log()
    assert world.others["home"].fetched_bytes > before
    cached = world.driver.disk.at("archive-cache").at("p-0000").list()
    assert len(cached) + len(set(world.folder().list()) & {file.name for file in away}) <= 1
    # A life later, with room for all: each is fetched once.
    homed(world, target, 10**9)
    await world.archiver.open_all()
    for _ in range(3):
        assert events(world) == world.in_log()
    assert world.others["home"].fetched_bytes <= sum(file.bytes for file in away)
    assert world.reports == []


async def test_without_its_home_an_archive_is_not_taken_for_whole(target: Any) -> None:
    """A store that isn't told where the files are reads none of it; the log has everything here, and it begins anew."""
    world = World()
    homed(world, target)
    for _ in range(6):
        world.send(9)
        await settle(world)
    world.driver.partitions[0].index.log_start = 1
    del world.others["home"], world.others["cache"]
    before = own_manifest(world)
    world.start()
    await world.archiver.open_all()
    assert world.archiver.view(0) is None
    assert "is at its home, and none is set" in world.reports[0]
    assert own_manifest(world) == before


async def test_what_is_there_is_looked_at(target: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy that isn't what was sent is no reason to remove the file here; one that rots later is an error to read."""
    world = World()
    homed(world, target)
    for _ in range(4):
        world.send(9)
        await world.archiver.take_all()
    for _ in range(4):
        await world.archiver.take_all()
    read = type(target).read
    with monkeypatch.context() as patch:
        patch.setattr(type(target), "read", lambda self, name: iter([b"x", *read(self, name)]))
        with pytest.raises(DiskError, match="not there what it is here"):
            await world.archiver.send_home()
    assert not [file for file in own_manifest(world).files if file.at_home]
    assert events(world) == world.in_log()
    await settle(world)
    for _ in range(6):
        world.send(9)
        await settle(world)
    with monkeypatch.context() as patch:
        patch.setattr(type(target), "read", lambda self, name: iter([b"x", *read(self, name)]))
        with pytest.raises(UnavailableError, match="can't be read") as caught:
            events(world)
        assert caught.value.retriable
    assert events(world) == world.in_log()


async def test_a_manifest_whose_fate_is_unknown_stays(target: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk refuses while a merge is put in force: the home writes no older manifest over it, which would lose files."""
    world = World()
    homed(world, target, 10**9)
    for _ in range(3):
        world.send(9)
        await world.archiver.take_all()
    for _ in range(4):
        await world.archiver.take_all()
    with monkeypatch.context() as patch:
        patch.setattr(policy, "next_merge", lambda *_: None)
        for _ in range(3):
            world.send(9)
            await world.archiver.take_all()
    assert any(policy.is_full(file) for file in own_manifest(world).files)
    removed: list[str] = []
    inner = MemoryDisk.remove

    def remove(disk: MemoryDisk, name: str) -> None:
        if name.startswith("events-"):
            removed.append(name)
            if len(removed) == 2:
                raise DiskError("remove", name, 5)
        inner(disk, name)

    with monkeypatch.context() as patch:
        patch.setattr(MemoryDisk, "remove", remove)
        with pytest.raises(DiskError):
            await world.archiver.take_all()
    await world.archiver.send_home()
    assert {file.name for file in own_manifest(world).files} <= set(world.folder().list())
    await settle(world)
    assert events(world) == world.in_log()
    assert [file for file in own_manifest(world).files if file.at_home]
    assert world.reports == []


async def test_a_home_that_fails_holds_up_nothing(target: Any) -> None:
    """At any call: archiving goes on, reads of what is here, too, and the rest is made up for later."""
    for calls in range(0, 40, 3):
        world = World()
        homed(world, Wrong(target, calls))
        for _ in range(6):
            world.send(9)
            await world.archiver.take_all()
            try:
                await world.archiver.send_home()
            except DiskError:
                continue
        for _ in range(4):
            await world.archiver.take_all()
        assert own_manifest(world).end_offset == world.end
        homed(world, target)
        await settle(world)
        assert events(world) == world.in_log()
        away = {file.name for file in own_manifest(world).files if file.at_home}
        assert away <= set(target.names("p-0000"))


async def test_a_crash_on_the_way_home(target: Any) -> None:
    """What the manifest says is at home is there."""
    for calls in range(0, 30, 2):
        world = World()
        homed(world, Wrong(target, calls, CrashAt))
        try:
            for _ in range(5):
                world.send(9)
                await settle(world)
        except CrashAt:
            world.driver.crash(lose_all=bool(calls % 4))
        homed(world, target)
        await world.archiver.open_all()
        assert events(world) == world.in_log()
        await settle(world)
        assert events(world) == world.in_log()


async def test_files_at_home_are_written_again_when_events_are_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are fetched for it; what they were is removed there, once its new manifest is."""
    target = FolderTarget(tmp_path / "home")
    monkeypatch.setattr(retention, "DAY_NS", 10**9 * DAY_NS)
    world = Kept()
    homed(world, target)
    for day in range(12):
        world.send_day(day, 9)
        await settle(world)
    before = {file.name for file in own_manifest(world).files if file.at_home}
    assert before
    monkeypatch.setattr(retention, "DAY_NS", DAY_NS)
    failing = Wrong(target, 0)
    homed(world, failing)
    for _ in range(3):
        await world.archiver.take_all()  # they can't be had now
    assert world.archiver.failures > 0
    assert world.reports == []
    homed(world, target)
    for _ in range(6):
        for _ in range(6):
            await world.archiver.take_all()
        while await world.archiver.send_home():
            pass
    world.driver.sync()
    manifest = own_manifest(world)
    assert manifest.dropped[0].events == 4 * 9  # of days that are over
    after = {file.name for file in manifest.files if file.at_home}
    await world.archiver.send_home()
    assert set(target.names("p-0000")) <= {"MANIFEST.json", *after, *before}
    assert not after & before or after - before or before - after
    listed = {event[0] for event in world.in_log()}
    assert sum(file.rows for file in manifest.files) + manifest.dropped[0].events == len(listed)


async def test_a_snapshot_brings_what_is_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its bytes, as the receiver's home is another one; its own files there are taken up again by the next life."""
    monkeypatch.setattr(archiver_module, "SLICE_EVENTS", 200)
    monkeypatch.setattr(archiver_module, "HOME_POLL_S", 0.01)
    monkeypatch.setattr(policy, "BASE_ROWS", 300)
    monkeypatch.setattr(policy, "ROWS_MAX", 900)
    cluster = Cluster(
        recycle=True, wal=WalConfig(segment_bytes=8_192), archive="on", archive_events=10**9,
        archive_interval_s=1e6, archive_url=str(tmp_path), archive_cache_bytes=1,
    )  # fmt: skip
    await cluster.create()
    try:
        _, name, sequence = await behind(cluster)
        for other in cluster.nodes:
            for _ in range(4):
                await archiver(cluster, other).take_all()
            await cluster.until(
                lambda other=other: any(file.at_home for file in manifest_of(cluster, other).files)
            )
        await cluster.start(name)
        await installed(cluster, name)
        reads = Reads(
            cluster.nodes[name].store.partitions[0].fold,
            WalSource(cluster.nodes[name].store.wal, 0),
            archive=lambda: archiver(cluster, name).view(0),
        )
        found: list[int] = []
        at: int | None = 0
        while at is not None:
            page = reads.events(StoreEvents(0, None, None, 0, TIME_END_NS, at, 1_000))
            found += [event.offset for event in page.events]
            at = page.next_offset
        assert len(found) == len(set(found)) == (BATCH - 1) * sequence
        assert not [report for report in cluster.reports if "archive" in report]
    finally:
        await cluster.close()
