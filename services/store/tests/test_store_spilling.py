"""Spilling in a store: files beside the checkpoint, whatever ends a process, and within the budget."""

from __future__ import annotations

import asyncio
import errno
import random
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from tallymark_protocol.messages import StoreBackup
from tallymark_protocol.model import AggType, AlertThreshold, DimensionFilter, PeriodType
from tallymark_runtime.disk import DiskError, DiskFullError, MemoryDisk
from tallymark_store import alert_spilling, checkpoint, incoming
from tallymark_store import spilling as spilling_module
from tallymark_store.checkpointer import folder
from tallymark_store.memory_budget import cells_of
from tallymark_store.partition import Partition
from tallymark_store.replication.effects import Role
from tallymark_store.snapshots import Snapshots
from tallymark_store.soundness import UnsoundError, check_files, damage_in_use
from tallymark_store.wal import DamagedError, WalConfig

from .cluster_driver import Cluster
from .payload_builder import event
from .power_cut import CrashAt
from .spilled_driver import SpilledDriver
from .store_driver import BASE, DAY, Driver, metric
from .test_store_snapshots import (  # noqa: F401 - they are run here with everything spilling
    fill,
    recycle,
    settled,
    test_a_crash_while_a_snapshot_is_installed,
    test_a_member_that_is_needed_gets_a_snapshot,
    test_a_member_that_was_away_gets_a_snapshot,
    test_a_new_copy_gets_a_snapshot,
    test_a_snapshot_survives_restarts,
)

SCHEMAS = [
    metric(
        5,
        code="sum",
        agg_type=AggType.SUM,
        period_type=PeriodType.DAY,
        filters=[DimensionFilter(key="k")],
        thresholds=[AlertThreshold(code="t", value=20, recurring=True)],
    ),
    metric(6, code="set", agg_type=AggType.COUNT_UNIQUE, period_type=PeriodType.CALENDAR),
]


@pytest.fixture
async def cluster(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Cluster]:
    monkeypatch.setattr(spilling_module, "POLL_S", 0.02)
    monkeypatch.setattr(spilling_module, "MERGED_FILES", 3)
    monkeypatch.setattr(alert_spilling, "MERGED_FILES", 3)
    # Three stores share this process, and spill all the time: a longer lease than where they do nothing else.
    cluster = Cluster(recycle=True, wal=WalConfig(segment_bytes=8_192), memory_bytes=1, lease_ttl_s=1.5)
    await cluster.create()
    yield cluster
    await cluster.close()


class Spilled(SpilledDriver):
    """With events of its own."""

    def send(self, sequence: int, n: int = 60) -> None:
        """Events of some accounts, days and sets; some late."""
        rng = random.Random(sequence)
        events = [
            event(
                rng.randrange(20),
                "sum",
                value=rng.randrange(50),
                time=BASE - rng.randrange(5) * DAY,
                properties={"k": f"v{rng.randrange(3)}"},
            )
            if rng.random() < 0.7
            else event(rng.randrange(5), "set", value=rng.randrange(30), time=BASE - rng.randrange(60) * DAY)
            for _ in range(n)
        ]
        self.append(0, events, [(7, sequence, BASE, n, sequence)], BASE + sequence * 10**9)


def filled() -> Spilled:
    """A store with cells in two files and in memory, and a checkpoint of it."""
    driver = Spilled()
    for record in SCHEMAS:
        driver.schema(0, record, BASE)
    for sequence in range(3):
        driver.send(sequence)
        driver.sync()
        if sequence < 2:
            driver.spill_cells()
    driver.checkpoint(0)
    driver.wal_start()
    driver.tidy()
    return driver


def test_a_restart_maps_the_files() -> None:
    """A checkpoint is what is in memory and the files; what is spilled after it is forgotten, and folded again."""
    driver = filled()
    fold = driver.partitions[0].fold
    assert fold.spilled_cell_count > 60
    assert len(driver.manifests[0].cell_files) == 2
    assert len(driver.manifests[0].alert_files) == 2
    assert driver.manifests[0].format_version == checkpoint.CELLS_FORMAT_VERSION
    driver.check_digests()
    driver.send(3)
    driver.sync()
    driver.spill_cells()
    assert len(driver.files()) == 6
    assert driver.partitions[0].fold.alert_bytes() == 0
    before = driver.partitions[0].digest()
    driver.crash()
    assert driver.partitions[0].digest() == before
    assert driver.partitions[0].fold.spilled_cell_count > 0
    assert driver.partitions[0].fold.spilled.names == driver.manifests[0].cell_files
    assert driver.partitions[0].fold.alert_files.names == driver.manifests[0].alert_files
    assert driver.reports == []
    driver.check_digests()
    driver.tidy()
    assert driver.files() == driver.listed()


def test_power_may_go_at_every_step_of_spill_merge_and_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """FOLD-1: wherever the disk stops, a start comes to the state that the log says, and goes on spilling."""
    monkeypatch.setattr(spilling_module, "MERGED_FILES", 3)
    monkeypatch.setattr(alert_spilling, "MERGED_FILES", 3)
    for lose_all in (False, True):
        step = 0
        while True:
            driver = filled()
            driver.send(3)
            driver.sync()
            expected = driver.partitions[0].digest()
            driver.calls = [step]
            try:
                assert driver.spill_cells().merges == 2
                driver.checkpoint(0)
                driver.send(4)
                driver.sync()
                expected = driver.partitions[0].digest()
                driver.spill_cells()
                driver.tidy()
                driver.calls = None
            except CrashAt:
                driver.calls = None
                driver.crash(lose_all=lose_all)
                assert driver.partitions[0].digest() == expected
                if step % 5 == 0:
                    driver.check_digests()
                    driver.send(5)
                    driver.sync()
                    driver.spill_cells()
                    driver.checkpoint(0)
                    driver.tidy()
                    assert driver.files() == driver.listed()
                    driver.check_digests()
                step += 1
                continue
            break
        assert step > 40


@pytest.mark.parametrize("operation", ["create", "write", "sync", "sync_dir", "map"])
def test_a_failing_disk_leaves_everything_in_memory(operation: str) -> None:
    """Nothing leaves memory before its file is whole and durable."""
    driver = filled()
    driver.send(3)
    driver.sync()
    before = driver.partitions[0].digest()
    rows = driver.partitions[0].fold.cell_bytes()
    driver.checkpoints(0).fail_next(operation)
    with pytest.raises(DiskError):
        driver.spill_cells()
    assert driver.partitions[0].fold.cell_bytes() == rows
    assert driver.partitions[0].digest() == before
    driver.spill_cells()
    assert driver.partitions[0].fold.cell_bytes() == 0
    assert driver.partitions[0].digest() == before


@pytest.mark.parametrize("operation", ["write", "sync", "sync_dir", "map"])
@pytest.mark.parametrize("kind", ["cells-", "alerts-"])
def test_a_failing_disk_keeps_nothing_of_what_was_tried(operation: str, kind: str) -> None:
    """A file that could not be written to its end goes at once: a full disk is not kept full by it."""
    driver = filled()
    driver.send(3)
    driver.sync()
    before = driver.files()
    name = "" if operation == "sync_dir" else kind
    if kind == "alerts-":
        asyncio.run(driver.spilling().relieve())
        before = driver.files()
    driver.checkpoints(0).fail_next(operation, name=name, number=errno.ENOSPC)
    with pytest.raises(DiskError):
        driver.spill_cells()
    assert {name for name in driver.files() - before if name.startswith(kind)} == set()
    driver.spill_cells()
    assert driver.partitions[0].fold.cell_bytes() == driver.partitions[0].fold.alert_bytes() == 0
    driver.check_digests()


def test_no_file_is_begun_that_may_not_fit() -> None:
    """Where the disk has too little room, nothing is written; where there is some again, cells go."""
    driver = filled()
    driver.send(3)
    driver.sync()
    spilling = driver.spilling(reserve_bytes=1_000_000)
    writes = driver.disk.write_count
    driver.disk.capacity = used(driver) + 1_004_000
    for relieve in (spilling.relieve, spilling.relieve_alerts):
        with pytest.raises(DiskFullError):
            asyncio.run(relieve())
    assert driver.disk.write_count == writes
    driver.disk.capacity += 1_000_000
    asyncio.run(spilling.relieve())
    asyncio.run(spilling.relieve_alerts())
    assert driver.partitions[0].fold.cell_bytes() == driver.partitions[0].fold.alert_bytes() == 0


def used(driver: Spilled) -> int:
    """Bytes on the disk."""
    driver.disk.capacity = 1 << 40
    return (1 << 40) - driver.disk.free_bytes()


@pytest.mark.parametrize("has_checkpoint", [True, False])
def test_a_start_removes_what_a_life_before_has_left(has_checkpoint: bool) -> None:
    """Files that no checkpoint lists, as where the disk was too full for one, don't stay."""
    driver = filled()
    driver.send(3)
    driver.sync()
    driver.spill_cells()
    disk = Driver.checkpoints(driver, 0)
    if not has_checkpoint:
        disk.remove("MANIFEST")
        disk.sync_dir()
    before = driver.partitions[0].digest()
    kept = driver.listed() if has_checkpoint else set()
    assert driver.files() > kept
    driver.crash()
    assert driver.files() == kept
    assert driver.partitions[0].digest() == before


@pytest.mark.parametrize("at", [20, 5_000, -8])
def test_a_damaged_file_only_costs_time_where_the_log_is_whole(at: int) -> None:
    """At a start: whether the damage is found when the file is opened, or when a record needs what is in it."""
    driver = filled()
    for sequence in range(3, 9):
        driver.send(sequence)
    driver.sync()
    before = driver.partitions[0].digest()
    name = driver.manifests[0].cell_files[-1]
    driver.crash()
    disk = Driver.checkpoints(driver, 0)
    file = disk.open(name)
    place = at % file.size()
    file.write_sync(place, [bytes([file.read(place, 1)[0] ^ 4])])
    driver.open()
    assert driver.partitions[0].error is None
    assert driver.partitions[0].digest() == before
    assert len(driver.reports) == 1
    assert "folding the log again" in driver.reports[0]


def test_only_as_much_as_is_too_much_leaves_memory() -> None:
    """Within a budget nothing spills; above it, cells go until they take about 80 % of it; open sets stay."""
    driver = Spilled()
    for record in SCHEMAS:
        driver.schema(0, record, BASE)
    for sequence in range(30):
        events = [event(1_000 * sequence + i, "sum", value=1, time=BASE) for i in range(500)]
        driver.append(0, events, [(7, sequence, BASE, 500, sequence)], BASE + sequence * 10**9)
    events = [event(1, "set", value=i, time=BASE) for i in range(1_000)]
    driver.append(0, events, [(8, 1, BASE, 1_000, 1)], BASE + 10**11)
    driver.sync()
    fold = driver.partitions[0].fold
    taken = fold.cell_bytes() + fold.set_bytes()
    driver.spill_cells(taken)
    assert fold.spilled_cell_count == 0
    budget = taken // 2
    driver.spill_cells(budget)
    now = fold.cell_bytes() + fold.set_bytes()
    assert 0.7 * budget < now < 0.9 * budget
    assert fold.set_bytes() > 0
    # Those that were touched last are still here.
    copies = {int(copy.cells[i, 0]) for copy in fold.spilled_copies() for i in range(int(copy.counters[0]))}
    assert max(copies) < 25_000
    driver.check_digests()


def test_what_cannot_go_is_not_tried_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """An open set larger than the budget stays; it's tried again when there is more, or after a while."""
    driver = Spilled()
    for record in SCHEMAS:
        driver.schema(0, record, BASE)
    driver.append(
        0, [event(1, "set", value=i, time=BASE) for i in range(5_000)], [(8, 1, BASE, 5_000, 1)], BASE
    )
    driver.append(0, [event(i, "sum", value=i, time=BASE) for i in range(200)], [(8, 2, BASE, 200, 2)], BASE)
    driver.sync()
    fold = driver.partitions[0].fold
    spilling = driver.spilling(fold.set_bytes() // 2)
    tried = []
    monkeypatch.setattr(fold, "coldest", lambda *args: tried.append(args) or type(fold).coldest(fold, *args))
    monkeypatch.setattr(spilling_module, "WAITS_MAX", 3)
    for _ in range(6):
        asyncio.run(spilling.relieve())
    assert len(tried) == 2
    assert fold.set_bytes() > 0
    driver.append(0, [event(2, "set", value=i, time=BASE) for i in range(900)], [(8, 3, BASE, 900, 3)], BASE)
    driver.sync()
    asyncio.run(spilling.relieve())
    assert len(tried) == 3
    driver.check_digests()


def test_files_of_a_discarded_copy_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy that is replaced while its cells are written to a file goes on without them."""
    driver = filled()
    driver.send(3)
    driver.sync()
    spilling = driver.spilling()
    partition = driver.partitions[0]

    async def replaced(work: Any, *args: Any) -> Any:
        driver.partitions[0] = SimpleNamespace(error="gone", partition=0)  # type: ignore[assignment]
        return work(*args)

    monkeypatch.setattr(spilling, "_offload", replaced)
    files = list(partition.fold.spilled.files)
    asyncio.run(spilling.relieve())
    assert partition.fold.spilled.files == files


@pytest.mark.parametrize("kind", ["cells-", "alerts-"])
def test_a_copy_that_begins_anew_has_no_damage(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file that is being written goes with the old copy: nobody is told that it is missing, least of all of the new."""
    driver = filled()
    driver.send(3)
    driver.sync()
    if kind == "alerts-":
        asyncio.run(driver.spilling().relieve())
    spilling = driver.spilling()
    fresh = Partition(0, dedup_window_ns=1, indexes=driver.wal.partitions, salt=1)

    def begins_anew(disk: Any, place: str, name: str, number: int) -> Any:
        checkpoint.discard(Driver.checkpoints(driver, 0))
        driver.partitions[0] = fresh
        raise checkpoint.CheckpointError(f"checkpoint file {place} is missing")

    monkeypatch.setattr(spilling_module, "open_file", begins_anew)
    monkeypatch.setattr(alert_spilling, "open_alerts", begins_anew)
    asyncio.run(spilling.relieve() if kind == "cells-" else spilling.relieve_alerts())
    assert driver.partitions[0] is fresh
    assert fresh.error is None


async def test_damage_of_a_copy_that_is_gone_says_nothing_of_the_new_one(cluster: Cluster) -> None:
    """A copy is refused, not whichever has its number by then."""
    await cluster.start()
    await cluster.wait_leader()
    store = next(iter(cluster.nodes.values())).store
    there = store.partitions[0]
    gone = Partition(0, dedup_window_ns=1, indexes=store.wal.partitions, salt=1)
    store.refuse(gone, DamagedError("partition 0: gone", partition=0))
    assert store.partitions[0] is there
    assert there.error is None
    assert store.replicas[0].role is not Role.DAMAGED


def test_a_merge_that_fails_stops_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells and alerts go on leaving memory, smaller files are merged, and it's tried again later."""
    monkeypatch.setattr(spilling_module, "MERGED_FILES", 3)
    monkeypatch.setattr(alert_spilling, "MERGED_FILES", 3)
    monkeypatch.setattr(spilling_module, "RETRY_TURNS", 2)
    driver = filled()
    spilling = driver.spilling()
    real, tries = spilling_module.write_file, []

    def write(disk: Any, name: str, number: int, records: Any, count: int, *args: Any) -> Any:
        if spilling._turns == turn:
            tries.append(count)
            raise DiskFullError("write", name, errno.ENOSPC)
        return real(disk, name, number, records, count, *args)

    turn = 1
    monkeypatch.setattr(spilling_module, "write_file", write)
    driver.send(3)
    driver.sync()
    fold = driver.partitions[0].fold

    async def once() -> None:
        await spilling.relieve()
        await spilling.relieve_alerts()
        await spilling.merge()

    asyncio.run(once())
    assert len(tries) == 1
    assert spilling.merges == 1  # of alerts
    assert fold.cell_bytes() == fold.alert_bytes() == 0
    assert len(fold.spilled.files) == 3
    turn = 99
    asyncio.run(spilling.merge())
    assert len(fold.spilled.files) == 3
    asyncio.run(spilling.merge())
    assert len(fold.spilled.files) == 1
    driver.check_digests()


def test_one_partition_that_the_disk_refuses_does_not_stop_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The others' cells leave memory all the same."""
    driver = filled()
    driver.send(3)
    driver.sync()
    spilling = driver.spilling()
    partitions = {7: SimpleNamespace(**vars_of(driver, 7)), 0: driver.partitions[0]}
    monkeypatch.setattr(spilling, "_store", SimpleNamespace(partitions=partitions))
    real = spilling.spill

    async def spill(partition: Any, fraction: float) -> None:
        if partition.partition == 7:
            raise DiskFullError("write", "x", errno.ENOSPC)
        await real(partition, fraction)

    monkeypatch.setattr(spilling, "spill", spill)
    with pytest.raises(DiskFullError):
        asyncio.run(spilling.relieve())
    assert driver.partitions[0].fold.cell_bytes() == 0


def vars_of(driver: Spilled, number: int) -> dict[str, Any]:
    """Of a partition that looks like another one."""
    return {"partition": number, "error": None, "fold": driver.partitions[0].fold}


def test_the_smallest_files_are_merged_first() -> None:
    """So that a merge that is too large for the disk keeps no other back."""
    large = [SimpleNamespace(records=10_000, start=10_000 * n, end=10_000 * (n + 1)) for n in range(8)]
    small = [SimpleNamespace(records=10, start=80_000 + 10 * n, end=80_010 + 10 * n) for n in range(8)]
    files: list[Any] = [*large, *small]
    assert alert_spilling.mergeable(files) == small
    assert spilling_module._mergeable(files) == small
    assert spilling_module._mergeable(list(reversed(files))) == small[::-1]
    assert spilling_module._mergeable(files[:12]) == large
    assert spilling_module._mergeable(files[4:12]) == []


def test_there_are_never_more_files_than_can_be_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where merges fail, cells and alerts stay in memory at some point."""
    driver = filled()
    monkeypatch.setattr(checkpoint, "CELL_FILES_MAX", 2)
    monkeypatch.setattr(checkpoint, "ALERT_FILES_MAX", 2)
    driver.send(3)
    driver.sync()
    spilling = driver.spilling()
    asyncio.run(spilling.relieve())
    asyncio.run(spilling.relieve_alerts())
    fold = driver.partitions[0].fold
    assert len(fold.spilled.files) == len(fold.alert_files.files) == 2
    assert fold.cell_bytes() > 0
    assert fold.alert_bytes() > 0
    driver.check_digests()


@pytest.mark.parametrize("kind", ["cell_files", "alert_files"])
def test_rot_does_not_come_in_with_a_snapshot(kind: str) -> None:
    """Files that were offered as they had become are not taken, though their checksums are those of the offer."""
    driver = filled()
    manifest = driver.manifests[0]
    disk = Driver.checkpoints(driver, 0)
    check_files(disk, manifest)
    name = getattr(manifest, kind)[-1]
    disk.flip_bit(name, 4_200 if kind != "alert_files" else 100)
    with pytest.raises(UnsoundError, match=name) as found:
        check_files(disk, manifest)
    assert damage_in_use(driver.partitions[0], found.value) is not None
    files = []
    for place, listed in enumerate(checkpoint.files_of(manifest)):
        disk.rename(listed, f"in-{place}")
        size = incoming.file_size(disk, f"in-{place}")
        files.append((listed, size, incoming.checksum(disk, f"in-{place}", size)))
    transfer: Any = SimpleNamespace(
        number=0, manifest=manifest, offer=SimpleNamespace(files=files, offset=manifest.offset)
    )
    taker: Any = SimpleNamespace(
        _dedup_window_ns=1, _store=SimpleNamespace(wal=driver.wal), _salt=5, _id_bytes=0
    )
    with pytest.raises(UnsoundError):
        Snapshots._load(taker, transfer, disk)


async def test_rot_is_neither_sent_nor_backed_up(cluster: Cluster) -> None:
    """Who leads looks at the files before they are offered or backed up; and counts for nothing if it reads from them."""
    await cluster.start()
    await fill(cluster, 0, batches=3)
    await settled(cluster)
    await recycle(cluster)
    node = cluster.nodes[await cluster.wait_leader()]
    store = node.store
    manifest = node._manifests[0]
    node._disk.at("checkpoints").at(folder(0)).flip_bit(manifest.cell_files[0], 4_200)
    partition = store.partitions[0]
    assert node._backups is not None
    with pytest.raises(DamagedError, match=manifest.cell_files[0]):
        await node._backups.begin(StoreBackup(0))
    assert partition.error is not None


def test_the_setting_is_a_budget() -> None:
    """Half of it is for cells; none by default; 0 stands for half of the machine's memory."""
    assert cells_of(-1) is None
    assert cells_of(1_000) == 500
    assert (cells_of(0) or 0) > 10_000_000


def test_names_are_what_an_offer_may_hold() -> None:
    """Names differ by the life of a store and by number, and sort nowhere else."""
    assert checkpoint.cells_name(2**64 - 1, 12) == "cells-ffffffffffffffff-00000012"
    assert folder(3) == "p-0003"
    assert MemoryDisk().at(folder(3)).list() == []


async def test_what_is_left_over_goes_where_nothing_is_new(cluster: Cluster) -> None:
    """A checkpoint that has nothing to write still removes files that nobody needs."""
    await cluster.start()
    await fill(cluster, 0, batches=1)
    await settled(cluster)
    await recycle(cluster)
    node = next(iter(cluster.nodes.values()))
    assert node.checkpointer is not None
    name = checkpoint.cells_name(1, 1)
    disk = node._disk.at("checkpoints").at(folder(0))
    disk.create(name)
    await node.checkpointer.take()
    assert name not in disk.list()


async def test_a_cluster_spills_and_agrees(cluster: Cluster) -> None:
    """Three copies with everything spilling come to one state, which is what their logs say, also after restarts."""
    cluster.config = cluster.config.__class__(
        **{**{f: getattr(cluster.config, f) for f in cluster.config.__struct_fields__}, "recycle": False}
    )
    await cluster.start()
    sequence = await fill(cluster, 0, batches=3)
    await cluster.until(
        lambda: all(node.spilling.spilled_units for node in cluster.nodes.values())  # type: ignore[union-attr]
    )
    await settled(cluster)
    await recycle(cluster)
    sequence = await fill(cluster, sequence, batches=3)
    await cluster.check_digests()
    for name in sorted(cluster.nodes):
        cluster.kill(name)
    await cluster.start()
    sequence = await fill(cluster, sequence, batches=2)
    await cluster.check_digests()
    assert await cluster.count(await cluster.wait_leader(), 1) == 120 * sequence
