"""Merging id files beside checkpoints: the old list or the new one at every step, and nobody's files but one's own."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import numpy as np
import pytest

from tallymark_protocol.identifiers import encode_event_id
from tallymark_protocol.messages import Appended
from tallymark_runtime.disk import MemoryDisk
from tallymark_store import checkpoint, memory_budget
from tallymark_store.dedup import DedupIndex
from tallymark_store.id_budget import IdBudget, resident_from
from tallymark_store.id_merging import MERGED_IDS_MAX, plan_merge
from tallymark_store.wal import WalConfig

from .cluster_driver import Cluster
from .payload_builder import event
from .power_cut import CountingDisk, CrashAt
from .store_driver import BASE, Driver, metric

SUM = metric(5, code="sum")
SECOND = 10**9


# ---------------------------------------------------------------- which files


def test_four_files_of_about_a_size_become_one() -> None:
    """Neither a large one for the sake of small ones, nor too many ids in one."""
    big = 1 << 20
    assert plan_merge([]) == plan_merge([big] * 3) == -1
    assert plan_merge([big] * 4) == 0
    assert plan_merge([4 * big, big, big, big]) == -1
    assert plan_merge([3 * big, big, big, big]) == 0
    assert plan_merge([big] * 4 + [big // 2] * 4) == 4
    assert plan_merge([8 * big, 1, 2, 3, 4]) == 1
    assert plan_merge([MERGED_IDS_MAX // 4] * 4) == 0
    assert plan_merge([MERGED_IDS_MAX // 4 + 1] * 4) == -1


def test_few_files_are_left_and_ids_are_written_again_a_few_times() -> None:
    """Whatever checkpoints write: the number of files, and of times an id is written, grow with the logarithm."""
    rng = random.Random(1)
    for draw in (lambda: 100, lambda: 500_000, lambda: rng.choice((10, 1_000, 400_000)), lambda: 5_000_000):
        files: list[int] = []
        total = rewritten = most = 0
        while total < 100_000_000 and most < 100:
            files.append(draw())
            total += files[-1]
            while (place := plan_merge(files)) >= 0:
                rewritten += sum(files[place : place + 4])
                files[place : place + 4] = [sum(files[place : place + 4])]
            most = max(most, len(files))
            if len(files) > 10_000 or (total > 2_000_000 and files[-1] < 1_000):
                break
        assert most <= 20
        assert rewritten <= 8 * total or total <= 3_000_000


# ---------------------------------------------------------------- how much memory


def test_the_setting() -> None:
    """Negative: no bound; 0: half of the machine's; ids get a quarter of it."""
    assert memory_budget.memory_of(-1) is None
    assert memory_budget.ids_of(-1) is None
    assert memory_budget.ids_of(4_000) == 1_000
    half = memory_budget.memory_of(0)
    assert half is not None
    assert half > 2**27
    assert memory_budget.ids_of(0) == half // 4


def index_of(n: int) -> DedupIndex:
    words = np.random.default_rng(n).integers(0, 2**64, (3, n), dtype=np.uint64)
    index = DedupIndex()
    index.apply(words[0], words[1], words[2], np.arange(n))
    return index


def test_what_is_too_much_is_spilled_oldest_first() -> None:
    """Down to four fifths of the budget, each partition its part; nothing while the budget is kept."""
    a, b = index_of(100_000), index_of(50_000)
    total = a.memory_bytes + b.memory_bytes
    files = [(20_000 * i, 20_000) for i in range(1, 6)]
    assert IdBudget(None).spill_end(a, [a, b], files) == 0
    assert IdBudget(total).spill_end(a, [a, b], files) == 0
    assert not IdBudget(total).is_exceeded([a, b])
    budget = IdBudget(total - 1)
    assert budget.is_exceeded([a, b])
    end = budget.spill_end(a, [a, b], files)
    assert 0 < end < 100_000
    assert (100_000 - end) * 48 <= (total - 1) * 4 // 5 * a.memory_bytes // total < (120_000 - end) * 48
    assert IdBudget(0).spill_end(a, [a, b], files) == 100_000
    assert not IdBudget(0).is_full([a, b]), "a few ids are not worth a checkpoint"
    assert not IdBudget(None).is_full([a, b])


def test_a_start_takes_the_newest_ids_into_memory() -> None:
    """Whole files, as many as fit."""
    assert resident_from(0, []) == 0
    assert resident_from(0, [5, 5]) == 2
    assert resident_from(48 * 5, [5, 5]) == 1
    assert resident_from(48 * 10 - 1, [5, 5]) == 1
    assert resident_from(48 * 10, [5, 5]) == 0
    assert resident_from(48 * 10, [50, 5, 5]) == 1


# ---------------------------------------------------------------- at every step


def filled(id_bytes: int | None) -> Driver:
    """A partition with five id files, the oldest of which has half left the window."""
    driver = Driver(id_bytes=id_bytes)
    driver.schema(0, SUM, BASE)
    for i in range(5):
        send(driver, i)
        driver.sync()
        driver.checkpoint(0)
    return driver


def send(driver: Driver, sequence: int, *, again: bool = False) -> int:
    """Twenty events with ids of their own; returns how many of them are stored."""
    events = [event(1, "sum", value=1, id=encode_event_id(100 * sequence + i)) for i in range(20)]
    chunk = (8 if again else 7, sequence, BASE, 20, sequence)
    return driver.append(0, events, [chunk], BASE + 10 * SECOND).stored


@pytest.mark.parametrize(("id_bytes", "lose_all"), [(0, False), (None, True)])
def test_power_may_go_at_every_step_of_a_merge(id_bytes: int | None, lose_all: bool) -> None:
    """And of the checkpoint after it, with ids on disk only or also in memory: nothing is lost, nothing new."""
    step = 0
    while True:
        driver = filled(id_bytes)
        digest = driver.partitions[0].digest()
        calls = [step]
        folder = driver.checkpoints(0)
        driver.checkpoints = lambda _, folder=folder, calls=calls: CountingDisk(folder, calls)  # type: ignore[method-assign, misc]
        try:
            assert driver.merge(0)
            send(driver, 5)
            driver.sync()
            driver.checkpoint(0)
            crashed = False
        except CrashAt:
            crashed = True
        del driver.checkpoints
        driver.crash(lose_all=lose_all)
        assert driver.reports == []
        partition = driver.partitions[0]
        if partition.applied == 1 + 5 * 20:
            assert partition.digest() == digest
        driver.check_digests()
        for sequence in range(5):
            assert send(driver, sequence, again=True) == 0
        driver.sync()
        driver.checkpoint(0)
        driver.merge(0)
        listed = {name for name, _, _ in driver.manifests[0].id_files}
        assert {name for name in driver.checkpoints(0).list() if name.startswith("ids-")} == listed
        driver.crash(lose_all=lose_all)
        driver.check_digests()
        if not crashed:
            break
        step += 1
    assert step > 40


# ---------------------------------------------------------------- in a store


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    cluster = Cluster(
        ("a",), replication_factor=1, memory_bytes=1, lease_ttl_s=20.0, wal=WalConfig(segment_bytes=64 * 1024)
    )
    await cluster.create()
    yield cluster
    await cluster.close()


async def append(cluster: Cluster, sequence: int, *, producer: int = 1) -> Any:
    events = [event(1, "sum", value=1, id=encode_event_id(1_000 * sequence + i)) for i in range(50)]
    answer = await cluster.append_anywhere(events, (producer, sequence))
    assert isinstance(answer, Appended)
    return answer


def folder_of(cluster: Cluster) -> MemoryDisk:
    return cluster.disks["a"].at("checkpoints").at("p-0000")


async def checkpointed(cluster: Cluster, sequences: range) -> None:
    for sequence in sequences:
        await append(cluster, sequence)
        node = cluster.nodes["a"]
        await node.store.wait_applied(node.store.partitions[0])
        await node.checkpointer.take()  # type: ignore[union-attr]


async def check_repeats(cluster: Cluster, sequences: range, producer: int) -> None:
    """Nothing is stored again."""
    for sequence in sequences:
        answer = await append(cluster, sequence, producer=producer)
        assert answer.chunks is not None
        assert len(answer.chunks[0].exceptions) > 0
        assert sum(count for _, count, *_ in answer.chunks[0].exceptions) == 50


async def test_files_are_merged_beside_checkpoints(cluster: Cluster) -> None:
    """By the store itself; what it has in memory is next to nothing, and all repeats are found, also after restarts."""
    await cluster.start()
    await checkpointed(cluster, range(24))
    node = cluster.nodes["a"]
    await cluster.until(lambda: node.checkpointer.merger.count >= 4)  # type: ignore[union-attr]
    dedup = node.store.partitions[0].dedup
    assert len(dedup) == 0
    assert dedup.spilled_count == 24 * 50
    await check_repeats(cluster, range(24), 2)
    cluster.kill("a")
    await cluster.start()
    dedup = cluster.nodes["a"].store.partitions[0].dedup
    assert dedup.spilled_count >= 24 * 50 - 50
    await check_repeats(cluster, range(24), 3)


async def test_a_merge_is_not_published_over_what_has_changed(cluster: Cluster) -> None:
    """Where the copy was discarded meanwhile, or its files are others; and what it wrote goes with the next checkpoint."""
    await cluster.start()
    node = cluster.nodes["a"]
    assert node.checkpointer is not None
    merger = node.checkpointer.merger
    running = next(task for task in node._tasks if "IdMerger" in repr(task.get_coro()))
    running.cancel()
    await checkpointed(cluster, range(4))
    manifests: dict[int, checkpoint.Manifest] = merger._manifests
    before = manifests[0]
    exchange: Callable[..., Any] = merger._exchange

    async def late(*args: Any) -> None:
        manifests[0] = msgspec.structs.replace(before, id_files=before.id_files[1:])
        await exchange(*args)
        manifests[0] = before

    merger._exchange = late  # type: ignore[method-assign]
    assert await merger.merge(0)
    assert merger.count == 0
    assert checkpoint.load_manifest(folder_of(cluster)) == before
    assert len([name for name in folder_of(cluster).list() if name.startswith("ids-")]) == 5
    merger._exchange = exchange  # type: ignore[method-assign]
    await checkpointed(cluster, range(4, 5))
    assert len([name for name in folder_of(cluster).list() if name.startswith("ids-")]) == 5
    assert await merger.merge(0)
    assert merger.count == 1
    await check_repeats(cluster, range(5), 2)


async def test_a_checkpoint_during_a_merge_leaves_its_file(cluster: Cluster) -> None:
    """Though no manifest lists it yet; and the merge is published in the manifest that is in force by then."""
    await cluster.start()
    node = cluster.nodes["a"]
    assert node.checkpointer is not None
    merger = node.checkpointer.merger
    next(task for task in node._tasks if "IdMerger" in repr(task.get_coro())).cancel()
    await checkpointed(cluster, range(4))
    offload = merger._offload
    is_first = True

    async def slow(call: Any, *args: Any) -> Any:
        nonlocal is_first
        if call is checkpoint.merge_step and is_first:
            is_first = False
            await checkpointed(cluster, range(4, 6))
        return await offload(call, *args)

    merger._offload = slow
    assert await merger.merge(0)
    assert merger.count == 1
    manifest = checkpoint.load_manifest(folder_of(cluster))
    assert manifest is not None
    assert len(manifest.id_files) == 3
    assert manifest.offset == node.store.partitions[0].applied
    await check_repeats(cluster, range(6), 2)
    cluster.kill("a")
    await cluster.start()
    await check_repeats(cluster, range(6), 3)


async def test_damage_of_a_file_refuses_the_partition(cluster: Cluster) -> None:
    """An append that needs the block is answered with an error that says so; no id is taken for new."""
    await cluster.start()
    await checkpointed(cluster, range(3))
    cluster.kill("a")
    folder = folder_of(cluster)
    for name in folder.list():
        if name.startswith("ids-"):
            folder.flip_bit(name, 4_096 + 9)
    await cluster.start()
    events = [event(1, "sum", value=1, id=encode_event_id(i)) for i in range(50)]
    async with asyncio.timeout(20):
        answer = await cluster.append("a", events, (5, 0))
    assert not isinstance(answer, Appended)
    assert "event ids is damaged" in answer.message
    assert cluster.nodes["a"].store.partitions[0].error is not None
