"""When a store's events are archived, and what holds whatever happens in between."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from tallymark_protocol.identifiers import encode_event_id
from tallymark_protocol.model import AggType
from tallymark_runtime.clock import ManualClock
from tallymark_runtime.disk import DiskError, DiskFullError, MemoryDisk
from tallymark_store.archive import archiver as module
from tallymark_store.archive import manifest as manifests
from tallymark_store.archive import policy
from tallymark_store.archive.archiver import Archiver
from tallymark_store.archive.manifest import Manifest
from tallymark_store.archive.writer import open_file
from tallymark_store.checkpointer import folder
from tallymark_store.replication.effects import Role
from tallymark_store.scan.events import EventsScan
from tallymark_store.scan.source import WalSource

from .payload_builder import event
from .power_cut import CountingDisk, CrashAt
from .store_driver import BASE, Driver, metric

SECOND = 10**9
SUM = metric(5, code="sum", agg_type=AggType.SUM)


async def inline(function: Any, *args: Any) -> Any:
    return function(*args)


class World:
    """A store's log and partitions on a disk in memory, and their archiver, life after life."""

    def __init__(self, partitions: int = 1, **others: Any) -> None:
        self.driver = Driver(partition_count=partitions)
        self.clock = ManualClock(BASE)
        self.copies = dict.fromkeys(range(partitions), "first")
        self.others = others
        self.reports: list[str] = []
        self.refused: list[tuple[int, str]] = []
        for number in range(partitions):
            self.driver.schema(number, SUM, BASE)
        self.driver.sync()
        self.sequence = 0
        self.start()

    def start(self, disk: Any = None) -> None:
        """Begin a life of the archiver."""
        self.store = SimpleNamespace(
            wal=self.driver.wal,
            partitions=self.driver.partitions,
            replicas={
                number: SimpleNamespace(copy_id=copy_id, role=Role.FOLLOWER, durable_end=2**62)
                for number, copy_id in self.copies.items()
            },
            stopped=asyncio.Event(),
            refuse=lambda partition, error: self.refused.append((partition.partition, error.message)),
        )
        self.archiver = Archiver(
            self.store,  # type: ignore[arg-type]
            disk or self.driver.disk.at("archive"),
            self.clock,
            report=self.reports.append,
            **{"events": 10, "interval_s": 60.0, "offload": inline, **self.others},
        )

    def send(self, n: int, number: int = 0, *, repeat: bool = False) -> None:
        """Append n events, of which one is a duplicate where there was an event before, and sync."""
        events = [
            event(
                i % 3, "sum", value=i + 1, id=encode_event_id(f"{self.sequence}-{i}"), properties={"z": "1"}
            )
            for i in range(n)
        ]
        if repeat:
            events[0] = event(0, "sum", value=1, id=encode_event_id("0-0"), properties={"z": "1"})
        now = BASE + self.sequence * SECOND
        self.driver.append(number, events, [(7, self.sequence, BASE, n, self.sequence)], now)
        self.sequence += 1
        self.driver.sync()

    def folder(self, number: int = 0) -> MemoryDisk:
        return self.driver.disk.at("archive").at(folder(number))

    def manifest(self, number: int = 0) -> Manifest | None:
        return manifests.load(self.folder(number))

    def in_log(self, number: int = 0, end: int | None = None) -> list[tuple[int, int, int]]:
        """The accepted events below an offset: offset, account, value."""
        scan = EventsScan(
            WalSource(self.driver.wal, number), account=None, metric=None, start_ns=0, end_ns=2**62,
            applied=self.driver.partitions[number].applied if end is None else end,
        )  # fmt: skip
        scan.run()
        return [(e.offset, e.account_id, int(e.value)) for e in scan.events]

    def in_archive(self, number: int = 0) -> list[tuple[int, int, int]]:
        manifest = self.manifest(number)
        found = []
        for file in manifest.files if manifest else ():
            table = open_file(self.folder(number), file.name).read()
            columns = [table.column(name).to_pylist() for name in ("offset", "account", "value")]
            found += list(zip(*columns, strict=True))
        return sorted(found)

    def check(self, number: int = 0) -> None:
        """The archive holds just the accepted events below its end, and the folder nothing else."""
        manifest = self.manifest(number)
        assert manifest is not None
        assert manifest.copy_id == self.copies[number]
        assert self.in_archive(number) == self.in_log(number, manifest.end_offset)
        assert sum(file.rows for file in manifest.files) == len(self.in_archive(number))
        assert set(self.folder(number).list()) == {"MANIFEST.json", *(file.name for file in manifest.files)}

    @property
    def end(self) -> int:
        return self.driver.partitions[0].log_end


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices of a record or two, files that are merged by threes."""
    monkeypatch.setattr(module, "SLICE_EVENTS", 8)
    monkeypatch.setattr(policy, "FAN_IN", 3)
    monkeypatch.setattr(policy, "BASE_ROWS", 10)
    monkeypatch.setattr(policy, "ROWS_MAX", 90)


async def test_what_is_due_is_archived() -> None:
    """So many offsets, or any after so long; until then nothing is written."""
    world = World()
    await world.archiver.take_due()
    world.send(5)
    await world.archiver.take_due()
    assert world.manifest() is None
    world.send(5, repeat=True)
    await world.archiver.take_due()
    assert world.manifest().end_offset == world.end  # type: ignore[union-attr]
    assert len(world.in_archive()) == 9
    world.check()
    world.send(1)
    world.clock.advance(59 * SECOND)
    await world.archiver.take_due()
    assert len(world.in_archive()) == 9
    world.clock.advance(SECOND)
    await world.archiver.take_due()
    assert len(world.in_archive()) == 10
    world.check()
    assert world.archiver.events_archived == 10
    assert sum(world.archiver.took_ns.counts) == 2
    before = world.folder().list()
    world.clock.advance(1_000 * SECOND)
    await world.archiver.take_due()
    assert world.folder().list() == before


async def test_only_what_is_folded_and_on_the_own_disk_is_archived() -> None:
    """An archive that knew more than its log would be another's."""
    world = World()
    world.send(6)
    world.send(6)
    world.store.replicas[0].durable_end = 7
    await world.archiver.take_all()
    assert world.manifest().end_offset == 7  # type: ignore[union-attr]
    world.store.replicas[0].durable_end = 2**62
    events = [event(1, "sum") for _ in range(3)]
    world.driver.append(0, events, [(9, 0, BASE, 3, 1)], BASE + 100 * SECOND)
    await world.archiver.take_all()
    assert world.manifest().end_offset == world.end - 3 == world.driver.partitions[0].applied  # type: ignore[union-attr]
    world.check()


@pytest.mark.parametrize("lose_all", [False, True])
async def test_power_may_go_at_every_step(small: None, lose_all: bool) -> None:
    """Of slices, switches, removals and merges: what is listed is whole, and all is archived once in the end."""
    step = 0
    while True:
        world = World()
        for n in (6, 5, 4, 3):
            world.send(n, repeat=n < 6)
        await world.archiver.take_all()
        world.check()
        for n in (4, 7, 2):
            world.send(n)
        calls = [step]
        world.start(CountingDisk(world.driver.disk.at("archive"), calls))
        try:
            for _ in range(3):
                await world.archiver.take_all()
        except CrashAt:
            world.driver.crash(lose_all=lose_all)
            world.start()
            world.check()  # whatever it was at that moment
            world.send(2)
            for _ in range(3):
                await world.archiver.take_all()
            world.check()
            assert world.manifest().end_offset == world.end  # type: ignore[union-attr]
            step += 1
            continue
        assert world.archiver.merges > 0
        world.driver.crash(lose_all=lose_all)
        world.check()
        break
    assert step > 60
    assert world.reports == []


async def test_small_files_become_larger_ones(small: None) -> None:
    """And hold the same events; no more than a few are left."""
    world = World()
    for _ in range(30):
        world.send(3)
        await world.archiver.take_due()
        world.clock.advance(60 * SECOND)
    for _ in range(9):
        await world.archiver.take_all()
    world.check()
    assert len(world.manifest().files) <= 4  # type: ignore[union-attr]
    assert max(file.rows for file in world.manifest().files) > 40  # type: ignore[union-attr]
    assert world.archiver.merges >= 10


async def test_a_copy_that_begins_anew_discards_its_archive() -> None:
    """Also where that was not noticed before the process ended; a removed copy's goes, too."""
    world = World()
    world.send(12)
    await world.archiver.take_all()
    before = world.manifest()
    world.copies[0] = "second"
    world.store.replicas[0].copy_id = "second"
    await world.archiver.take_all()
    assert world.manifest().copy_id == "second"  # type: ignore[union-attr]
    assert world.manifest().files == before.files  # type: ignore[union-attr]
    world.copies[0] = "third"
    world.start()
    await world.archiver.take_due()
    assert world.manifest().copy_id == "third"  # type: ignore[union-attr]
    world.check()
    del world.store.replicas[0]
    await world.archiver.take_due()
    assert world.folder().list() == []
    assert world.archiver.archives == {}


async def test_a_copy_may_begin_anew_while_it_is_archived() -> None:
    """At any moment: nothing of the copy before is ever listed as the new one's."""
    for moment in range(12):
        world = World()
        world.send(12)
        calls = 0

        async def offload(function: Any, *args: Any, world: World = world, moment: int = moment) -> Any:
            nonlocal calls
            calls += 1
            if calls == moment:
                world.copies[0] = world.store.replicas[0].copy_id = "second"
            found = function(*args)
            if calls == -moment:
                world.copies[0] = world.store.replicas[0].copy_id = "second"
            return found

        world.others["offload"] = offload
        world.start()
        calls = 0
        await world.archiver.take_all()
        for _ in range(2):
            await world.archiver.take_all()
        world.check()
        assert world.manifest().end_offset == world.end  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["flip manifest", "cut", "remove", "flip when merged"])
async def test_a_damaged_archive_is_made_anew_from_the_log(small: None, kind: str) -> None:
    """The log is whole: it only costs time, and it is said."""
    world = World()
    world.send(9)
    world.send(9)
    await world.archiver.take_all()
    name = world.manifest().files[0].name  # type: ignore[union-attr]
    disk = world.folder()
    if kind == "flip manifest":
        disk.flip_bit("MANIFEST.json", 30)
    elif kind == "cut":
        disk.cut(name, 90)
    elif kind == "remove":
        disk.remove(name)
    else:
        disk.flip_bit(name, 90)
        world.send(9)
    world.start()
    for _ in range(3):
        await world.archiver.take_all()
    world.check()
    assert world.manifest().end_offset == world.end  # type: ignore[union-attr]
    assert len(world.reports) == 1
    assert "archiving from the beginning" in world.reports[0]


async def test_an_archive_that_the_log_cannot_replace_is_left_alone() -> None:
    """It is damaged and the log begins later, or it holds more than the log: its files stay as they are."""
    world = World()
    world.send(12)
    await world.archiver.take_all()
    world.folder().flip_bit("MANIFEST.json", 30)
    world.driver.partitions[0].index.log_start = 1
    before = world.folder().list()
    world.start()
    for _ in range(3):
        await world.archiver.take_all()
    assert world.folder().list() == before
    assert len(world.reports) == 1
    assert "left as it is" in world.reports[0]
    assert world.archiver.archives == {}

    world = World()
    world.send(12)
    await world.archiver.take_all()
    longer = world.manifest()
    assert longer is not None
    manifests.publish(world.folder(), Manifest(0, "first", longer.end_offset + 5, longer.files))
    before = world.folder().list()
    world.start()
    for _ in range(3):
        await world.archiver.take_all()
    assert world.folder().list() == before
    assert len(world.reports) == 1
    assert "holds more than the log" in world.reports[0]


async def test_damage_in_the_log_refuses_the_copy() -> None:
    """As a read that finds it does; the other partitions are archived."""
    world = World(partitions=2)
    world.send(12)
    world.send(12, number=1)
    row = world.driver.wal.partitions[0].row(1)
    wal = world.driver.disk.at("wal")
    wal.flip_bit(wal.list()[0], row.position + 100)
    await world.archiver.take_all()
    assert [number for number, _ in world.refused] == [0]
    assert "damaged" in world.refused[0][1]
    world.driver.partitions[0].error = object()  # type: ignore[assignment]
    await world.archiver.take_all()
    assert len(world.refused) == 1
    world.check(1)
    assert world.manifest(0) is None


async def test_a_damaged_copy_is_not_archived() -> None:
    """What it has is left as it is."""
    world = World()
    world.send(12)
    world.store.replicas[0].role = Role.DAMAGED
    await world.archiver.take_all()
    assert world.manifest() is None


@pytest.mark.parametrize("operation", ["create", "write", "sync", "rename", "sync_dir", "remove"])
async def test_a_disk_that_refuses_is_tried_again(small: None, operation: str) -> None:
    """What was archived stays, and the rest comes later."""
    world = World()
    for n in (6, 6, 6, 6):
        world.send(n)
    await world.archiver.take_all()
    world.send(9)
    world.folder().fail_next(operation, number=28)

    async def take_thrice() -> None:
        for _ in range(3):
            await world.archiver.take_all()

    with pytest.raises(DiskFullError):
        await take_thrice()
    for _ in range(3):
        await world.archiver.take_all()
    world.check()
    assert world.manifest().end_offset == world.end  # type: ignore[union-attr]


async def test_it_goes_on_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """The task never ends in silence: what fails is counted and tried again."""
    monkeypatch.setattr(module, "POLL_S", 0.0)
    monkeypatch.setattr(module, "RETRY_S", 0.0)
    world = World()
    world.send(12)
    for error in (DiskError("write", "x", 5), ValueError("a defect")):
        failing = [error]

        async def offload(function: Any, *args: Any, failing: list[Exception] = failing) -> Any:
            if failing:
                raise failing.pop()
            return function(*args)

        world.others["offload"] = offload
        world.start()
        task = asyncio.get_running_loop().create_task(world.archiver.run())

        def archived_end(archiver: Archiver) -> int:
            archive = archiver.archives.get(0)
            return 0 if archive is None else archive.manifest.end_offset

        async with asyncio.timeout(30):
            while archived_end(world.archiver) < world.end:  # noqa: ASYNC110 - it is there when it is
                await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert world.archiver.failures == 1
    world.check()


async def test_closing_waits_for_the_thread() -> None:
    """Which stops at the next piece of work; what it had written is not listed, and goes with the next start."""
    world = World()
    world.send(12)
    begun, go_on = asyncio.Event(), asyncio.Event()
    ended: list[str] = []

    async def offload(function: Any, *args: Any) -> Any:
        if function is not module.write_slice:
            return function(*args)
        begun.set()
        await go_on.wait()
        try:
            return function(*args)
        except module.Stopped:
            ended.append("stopped")
            raise

    world.others["offload"] = offload
    world.start()
    task = asyncio.get_running_loop().create_task(world.archiver.take_all())
    await begun.wait()
    task.cancel()
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.sleep(0)
    assert not task.done()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended == ["stopped"]
    assert world.manifest() is None
    world.others["offload"] = inline
    world.start()
    await world.archiver.take_all()
    world.check()


async def test_metrics_that_are_made_again_keep_their_events_apart() -> None:
    """A code that has another uid from some offset on, between slices and within one."""
    world = World()
    world.send(4)
    await world.archiver.take_all()
    world.driver.schema(0, metric(9, code="sum", agg_type=AggType.SUM), BASE + 50 * SECOND)
    world.driver.sync()
    world.sequence = 60
    world.send(4)
    await world.archiver.take_all()
    world.check()
    uids = [
        open_file(world.folder(), file.name).read(columns=["metric_uid"]).column(0).to_pylist()
        for file in world.manifest().files  # type: ignore[union-attr]
    ]
    assert uids == [[5] * 4, [9] * 4]
    manifests.discard(world.folder())
    world.start()
    await world.archiver.take_all()
    (file,) = world.manifest().files  # type: ignore[union-attr]
    table = open_file(world.folder(), file.name).read()
    assert table.column("metric_uid").to_pylist() == [5] * 4 + [9] * 4
    assert set(table.column("metric").to_pylist()) == {"sum"}


# ------------------------------------------------------------ what reads and the log rely on


async def test_the_log_is_needed_up_to_what_is_published() -> None:
    """Not what is being written, nor what was: only what a manifest on the disk lists, of the copy that is here."""
    world = World()
    assert (world.archiver.end_offset(0), world.archiver.view(0)) == (0, None)
    world.send(12)
    await world.archiver.take_all()
    first = world.end
    assert world.archiver.end_offset(0) == first
    world.send(5)
    world.folder().fail_next("rename")
    with pytest.raises(DiskError):
        await world.archiver.take_all()
    assert world.archiver.end_offset(0) == first  # and reads still have what was there before
    view = world.archiver.view(0)
    assert view is not None
    assert view.end_offset == first
    await world.archiver.take_all()
    assert world.archiver.end_offset(0) == world.end
    world.store.replicas[0].copy_id = "second"
    assert (world.archiver.end_offset(0), world.archiver.view(0)) == (0, None)


async def test_archives_are_open_from_the_start() -> None:
    """Before anything is due, reads find what was archived in earlier lives."""
    world = World()
    world.send(12)
    await world.archiver.take_all()
    world.start()
    assert world.archiver.view(0) is None
    await world.archiver.open_all()
    assert world.archiver.end_offset(0) == world.end


async def test_damage_that_a_read_finds_holds_the_log() -> None:
    """The archive is made anew from a whole log; else it is left alone, and the log is dropped no further."""
    world = World()
    world.send(12)
    await world.archiver.take_all()
    world.archiver.damaged(0, "a read has found it")
    assert (world.archiver.end_offset(0), world.archiver.view(0)) == (0, None)
    await world.archiver.take_all()
    await world.archiver.take_all()
    assert world.archiver.end_offset(0) == world.end
    assert "archiving from the beginning: a read has found it" in world.reports[0]
    world.driver.partitions[0].index.log_start = 1
    before = world.folder().list()
    world.archiver.damaged(0, "again")
    for _ in range(2):
        world.send(12)
        await world.archiver.take_all()
    assert (world.archiver.end_offset(0), world.folder().list()) == (0, before)
    assert "left as it is" in world.reports[1]


async def test_a_copy_that_began_with_a_snapshot_says_from_where_on_it_has_events() -> None:
    """Its archive begins where its log does; one that ends before that is never gone on with."""
    world = World()
    world.send(12)
    world.driver.partitions[0].index.log_start = 1
    await world.archiver.take_all()
    manifest = world.manifest()
    assert manifest is not None
    assert (manifest.start_offset, manifest.end_offset) == (1, world.end)
    world.driver.partitions[0].index.log_start = world.end + 3
    world.send(12)
    await world.archiver.take_all()
    assert world.manifest() == manifest
    assert (world.archiver.end_offset(0), world.archiver.view(0)) == (0, None)
    assert "it ends at offset" in world.reports[0]
    world.start()
    await world.archiver.take_all()
    assert world.manifest() == manifest
    assert world.archiver.archives == {}


async def test_a_snapshot_may_come_in_while_a_slice_is_written(small: None) -> None:
    """What lies between the archive's end and the new log's start is never taken for nothing."""
    world = World()
    for _ in range(4):
        world.send(8)
    start = world.end + 5

    async def offload(function: Any, *args: Any) -> Any:
        found = function(*args)
        if function is module.write_slice:
            world.driver.partitions[0].index.log_start = start
        return found

    world.others["offload"] = offload
    world.start()
    for _ in range(3):
        await world.archiver.take_all()
    manifest = world.manifest()
    assert manifest is not None
    assert manifest.end_offset <= 9
    assert "the log begins at offset" in world.reports[0]


async def test_what_is_merged_away_is_kept_for_views(small: None) -> None:
    """A view that is taken while the manifest is switched reads the files that are removed by then."""
    world = World()
    found: list[tuple[int, Any]] = []

    def look() -> None:
        view = world.archiver.view(0)
        if view is not None:
            end = view.end_offset
            cursor = view.events(
                uid=5, account=None, start_ns=0, end_ns=2**62, first=0, last=end, count=1_000
            )
            found.append((end, cursor))

    async def offload(function: Any, *args: Any) -> Any:
        look()
        result = function(*args)
        look()
        return result

    world.others["offload"] = offload
    world.start()
    for _ in range(12):
        world.send(9)
        await world.archiver.take_all()
    assert world.archiver.merges > 3
    everything = world.in_archive()
    sizes = set()
    for end, cursor in found:
        events = []
        while cursor.advance():
            events += [(e.offset, e.account_id, e.value) for _, e in cursor.found]
        assert events == [row for row in everything if row[0] < end]
        sizes.add(len(events))
    assert max(sizes) >= 81
