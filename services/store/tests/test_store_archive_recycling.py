"""Real nodes that drop their logs below what the archive holds: what is answered from then on, and what is refused."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from tallymark_protocol.errors import ErrorCode, UnavailableError
from tallymark_protocol.identifiers import encode_event_id
from tallymark_protocol.messages import (
    Consistency,
    EventsResult,
    StoreDigest,
    StoreEvents,
    StoreTotals,
    TotalsResult,
)
from tallymark_store.archive.archiver import Archiver
from tallymark_store.wal import DamagedError, WalConfig

from .cluster_driver import Cluster
from .payload_builder import event

BATCH = 120
TIME = 1_763_000_000 * 10**9
ARCHIVED = {
    "recycle": True,
    "archive": "on",
    "archive_events": 10**9,  # when the test says so
    "archive_interval_s": 3_600.0,
    "wal": WalConfig(segment_bytes=8_192),
}


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    cluster = Cluster(("a",), replication_factor=1, **ARCHIVED)
    await cluster.create()
    await cluster.start()
    yield cluster
    await cluster.close()


async def fill(cluster: Cluster, sequence: int, batches: int) -> int:
    """Events of rising times; returns the next sequence."""
    for i in range(sequence, sequence + batches):
        events = [
            event(1, "sum", value=1, time=TIME + i * BATCH + n, id=encode_event_id(i * BATCH + n))
            for n in range(BATCH)
        ]
        await cluster.append_anywhere(events, (1, i))
    return sequence + batches


def archiver(cluster: Cluster, name: str = "a") -> Archiver:
    found = cluster.nodes[name].archiver
    assert found is not None
    return found


async def archive(cluster: Cluster, name: str = "a") -> None:
    """Everything that is committed."""
    store = cluster.nodes[name].store
    await store.wait_applied(store.partitions[0])
    await archiver(cluster, name).take_all()


async def checkpoint(cluster: Cluster, name: str = "a") -> int:
    """Take one, and drop what may be dropped; returns where the log begins."""
    await cluster.nodes[name].checkpointer.take()  # type: ignore[union-attr]
    return cluster.nodes[name].store.partitions[0].index.log_start


async def raw_count(cluster: Cluster, first: int, last: int, name: str = "a", **fields: Any) -> int:
    """How many events are timed in a range that no cell answers."""
    call = StoreTotals(0, "sum", 1, [(TIME + first, TIME + last)], **fields)
    result = await cluster.nodes[name].call(call)
    assert isinstance(result, TotalsResult)
    return result.rows[0].stats.count


async def page(cluster: Cluster, at: int = 0, name: str = "a") -> EventsResult:
    result = await cluster.nodes[name].call(StoreEvents(0, 1, None, 0, 2**62, at, 50))
    assert isinstance(result, EventsResult)
    return result


async def test_the_log_goes_when_archive_and_checkpoint_have_it(cluster: Cluster) -> None:
    """Neither alone; raw events, pages and totals are the same before and after, and after a start."""
    sequence = await fill(cluster, 0, 12)
    assert await checkpoint(cluster) == 0
    first = await page(cluster)
    assert first.next_offset is not None
    cluster.kill("a")
    await cluster.start()
    await archive(cluster)
    end = archiver(cluster).end_offset(0)
    sequence = await fill(cluster, sequence, 12)
    assert 0 < await checkpoint(cluster) <= end  # the checkpoint reaches further
    await archive(cluster)
    sequence = await fill(cluster, sequence, 2)
    for life in range(2):
        if life:
            cluster.kill("a")
            await cluster.start()
            assert archiver(cluster).end_offset(0) > end  # before anything is due
        assert await raw_count(cluster, 5, 26 * BATCH - 1) == 26 * BATCH - 6
        assert await cluster.count("a", 1, at_ns=TIME) == 26 * BATCH
        again = await page(cluster)
        assert (again.events, again.next_offset) == (first.events, first.next_offset)
        offsets: list[int] = []
        at: int | None = 0
        while at is not None:
            found = await page(cluster, at)
            offsets += [record.offset for record in found.events]
            at = found.next_offset
        assert len(offsets) == len(set(offsets)) == 26 * BATCH
        assert offsets == sorted(offsets)
    assert cluster.nodes["a"].checkpointer.recycled_bytes == 0  # type: ignore[union-attr]
    assert await checkpoint(cluster) > end
    assert cluster.nodes["a"].checkpointer.recycled_bytes > 0  # type: ignore[union-attr]
    with pytest.raises(UnavailableError, match="its log begins at offset"):
        await cluster.nodes["a"].call(StoreDigest(0, recount=True))
    assert cluster.reports == []


async def test_a_damaged_archive_holds_the_log_and_totals_go_on(cluster: Cluster) -> None:
    """The only copy says what it has lost, whenever it is needed, and goes on with everything else."""
    sequence = await fill(cluster, 0, 12)
    await archive(cluster)
    start = await checkpoint(cluster)
    assert start > 0
    files = archiver(cluster).archives[0].manifest.files
    cluster.disks["a"].at("archive").at("p-0000").flip_bit(
        files[0].name, files[0].bytes - files[0].tail_bytes // 2
    )
    with pytest.raises(DamagedError, match=files[0].name):
        await raw_count(cluster, 5, 90)
    for _ in range(2):
        with pytest.raises(UnavailableError, match="no longer in the log"):
            await raw_count(cluster, 5, 90)
        await fill(cluster, sequence, 4)
        sequence += 4
        await archive(cluster)
        assert await cluster.count("a", 1, at_ns=TIME) == sequence * BATCH
        assert await checkpoint(cluster) == start
    assert "left as it is" in cluster.reports[0]


async def test_a_damaged_archive_is_not_missed_while_the_log_is_whole(cluster: Cluster) -> None:
    """The question that finds it is answered from the log, and the archive is made anew."""
    await fill(cluster, 0, 6)
    await archive(cluster)
    (file,) = archiver(cluster).archives[0].manifest.files
    cluster.disks["a"].at("archive").at("p-0000").flip_bit(file.name, file.bytes - 9)
    assert await raw_count(cluster, 5, 90) == 85
    assert archiver(cluster).archives == {}
    for _ in range(2):
        await archive(cluster)
    assert archiver(cluster).end_offset(0) > 6 * BATCH
    assert await raw_count(cluster, 5, 90) == 85
    assert "archiving from the beginning" in cluster.reports[0]


async def test_a_copy_made_of_a_snapshot_never_answers_for_what_it_lacks() -> None:
    """It has no raw events from before, and says so; from there on it has them all, archived or not."""
    cluster = Cluster(**ARCHIVED)
    await cluster.create()
    try:
        await cluster.start()
        leader = await cluster.wait_leader()
        name = next(name for name in sorted(cluster.nodes) if name != leader)
        cluster.kill(name)
        sequence = await fill(cluster, 0, 16)
        leader = await cluster.wait_leader()
        await archive(cluster, leader)
        assert await checkpoint(cluster, leader) > 0
        for node in cluster.nodes.values():
            if node.snapshots is not None:
                node.snapshots.sending.archiver = None  # as of one that has no archive
        await cluster.start(name)
        await cluster.until(lambda: cluster.nodes[name].snapshots.installed)  # type: ignore[union-attr]
        start = cluster.nodes[name].store.partitions[0].index.log_start
        sequence = await fill(cluster, sequence, 3)
        leader = await cluster.wait_leader()
        end = cluster.nodes[leader].store.partitions[0].log_end
        partition = cluster.nodes[name].store.partitions[0]
        await cluster.until(lambda: partition.high_watermark >= end)
        stale: Any = {"consistency": Consistency.STALE}
        for archived in (False, True):
            if archived:
                await archive(cluster, name)
            with pytest.raises(UnavailableError, match="are no longer in the") as caught:
                await raw_count(cluster, 5, 90, name, **stale)
            assert caught.value.code != ErrorCode.NOT_LEADER
            call = StoreEvents(0, 1, None, 0, 2**62, start, 1_000, **stale)
            found = await cluster.nodes[name].call(call)
            assert isinstance(found, EventsResult)
            assert [e.event_time_ns for e in found.events][-3 * BATCH :] == [
                TIME + n for n in range(16 * BATCH, 19 * BATCH)
            ]
        assert await raw_count(cluster, 5, 90, leader) == 85
    finally:
        await cluster.close()
