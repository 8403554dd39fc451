"""While a thread looks at all totals of a partition: writes go on, and what it sees is of one offset."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import pytest

from tallymark_protocol.messages import PartitionStatus, StoreDigest, StoreTotals, TotalsResult
from tallymark_protocol.model import AggType, MetricSchema
from tallymark_store import checkpoint, warmup
from tallymark_store.checkpointer import folder
from tallymark_store.fold import Fold
from tallymark_store.holding import HOLDS_MAX, to_the_end

from .cluster_driver import Cluster
from .payload_builder import event

PERIOD_NS = 30 * 86_400 * 10**9


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    """Leases are not to run out while kernels are compiled."""
    warmup.warm_up()


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    """One store with one partition, which it leads."""
    made = Cluster(["a"], replication_factor=1)
    await made.start()
    await made.create()
    await made.wait_leader()
    yield made
    await made.close()


class Gate:
    """An offload whose threads begin only when they are let."""

    def __init__(self) -> None:
        self.waiting = 0
        self.opened = asyncio.Event()

    async def __call__(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Wait for the gate, then do it."""
        self.waiting += 1
        await self.opened.wait()
        return await asyncio.to_thread(function, *args, **options)


def sums(count: int, account: int = 7) -> list[dict[str, Any]]:
    """Events of 1."""
    return [event(account, "sum", value=1) for _ in range(count)]


def month(cluster: Cluster) -> tuple[int, int]:
    """The billing period of now."""
    start = cluster.clock.now_ns() // PERIOD_NS * PERIOD_NS
    return start, start + PERIOD_NS


def ranking(cluster: Cluster) -> StoreTotals:
    """All accounts by the month's sum."""
    return StoreTotals(partition=0, metric_code="sum", account_id=None, buckets=[month(cluster)], top=5)


async def count_of(cluster: Cluster, account: int) -> int:
    """An account's events, by cells or not."""
    call = StoreTotals(partition=0, metric_code="sum", account_id=account, buckets=[month(cluster)])
    answer = await cluster.nodes["a"].call(call)
    assert isinstance(answer, TotalsResult)
    return answer.rows[0].stats.count


@pytest.mark.parametrize("what", ["checkpoint", "digest", "ranking"])
async def test_writes_go_on_while_totals_are_held(cluster: Cluster, what: str) -> None:
    """They are acknowledged, reads wait for them, and what was held is of the offset at which that began."""
    node = cluster.nodes["a"]
    partition = node.store.partitions[0]
    await cluster.append("a", sums(3), (1, 0))
    await cluster.append("a", sums(5, account=8), (1, 1))
    assert await count_of(cluster, 7) == 3
    before = await node.call(StoreDigest(partition=0, recount=True))
    assert isinstance(before, PartitionStatus)
    gate = Gate()
    node.store.folding._aside = gate
    if what == "checkpoint":
        holding = asyncio.ensure_future(node.checkpointer.take())  # type: ignore[union-attr]
    else:
        call = ranking(cluster) if what == "ranking" else StoreDigest(partition=0)
        holding = asyncio.ensure_future(node.call(call))
    await cluster.until(lambda: gate.waiting)

    assert partition.fold.held
    applied = partition.applied
    for sequence in range(2, 6):
        await cluster.append("a", sums(2), (1, sequence))  # acknowledged
    assert partition.high_watermark > partition.applied == applied
    reading = asyncio.ensure_future(count_of(cluster, 7))
    realtime = asyncio.ensure_future(cluster.count("a", 7))
    for _ in range(20):
        await asyncio.sleep(0)
    assert not reading.done()
    assert not realtime.done()
    gate.opened.set()
    result: Any = await holding
    assert await reading == 11
    assert await realtime == 11

    if what == "checkpoint":
        disk = cluster.disks["a"].at("checkpoints").at(folder(0))
        manifest = checkpoint.load_manifest(disk)
        assert manifest is not None
        assert manifest.offset == applied
        parts = checkpoint.load_state(disk, manifest)
        fold = Fold.restore(
            0, {n.removeprefix("fold."): p for n, p in parts.items() if n.startswith("fold.")}
        )
        assert (fold.applied, fold.digest()) == (applied, int(before.digest.split("-")[0], 16))
    elif what == "digest":
        assert (result.applied, result.digest) == (applied, before.digest)
    else:
        assert [(row.account_id, row.stats.count) for row in result.rows] == [(8, 5), (7, 3)]
    await cluster.check_digests()


async def test_holds_come_one_after_the_other_and_the_fold_gets_on_between(cluster: Cluster) -> None:
    """However many rankings there are, each has everything that was committed before its turn."""
    node = cluster.nodes["a"]
    await cluster.append("a", sums(1), (1, 0))
    gate = Gate()
    node.store.folding._aside = gate
    asked = [asyncio.ensure_future(node.call(ranking(cluster))) for _ in range(4)]
    await cluster.until(lambda: gate.waiting)
    assert gate.waiting == 1
    await cluster.append("a", sums(1), (1, 1))
    gate.opened.set()
    answers = [await one for one in asked]
    counts = [answer.rows[0].stats.count for answer in answers if isinstance(answer, TotalsResult)]
    assert counts == [1, 2, 2, 2]


async def test_who_waits_for_a_hold_does_not_wait_for_the_next(cluster: Cluster) -> None:
    """A plain read comes between two rankings, though the second one was asked for before."""
    node = cluster.nodes["a"]
    await cluster.append("a", sums(1), (1, 0))
    gate = Gate()
    node.store.folding._aside = gate
    order: list[str] = []
    first = asyncio.ensure_future(node.call(ranking(cluster)))
    await cluster.until(lambda: gate.waiting)
    second = asyncio.ensure_future(node.call(ranking(cluster)))
    await cluster.append("a", sums(1), (1, 1))
    read = asyncio.ensure_future(count_of(cluster, 7))
    second.add_done_callback(lambda _: order.append("second"))
    read.add_done_callback(lambda _: order.append("read"))
    for _ in range(20):
        await asyncio.sleep(0)
    assert not order
    gate.opened.set()
    await asyncio.gather(first, second, read)
    assert order == ["read", "second"]


async def test_a_far_behind_copy_keeps_no_thread_from_others(cluster: Cluster) -> None:
    """What has to be folded before a ranking is, while the threads are free."""
    node = cluster.nodes["a"]
    await cluster.append("a", sums(1), (1, 0))
    folding, partition = node.store.folding, node.store.partitions[0]
    begun = asyncio.Event()
    go_on = asyncio.Event()
    wait_applied = folding.wait_applied

    async def slow(of: Any) -> None:
        begun.set()
        await go_on.wait()
        await wait_applied(of)

    folding.wait_applied = slow
    try:
        entering = asyncio.ensure_future(enter(folding.held(partition, fold_s=None)))
        await begun.wait()
        assert folding._slots._value == HOLDS_MAX
        # Who has only so much time goes on with what there is.
        assert await folding._fold_first(partition, 0.001) is None
    finally:
        go_on.set()
        folding.wait_applied = wait_applied
    await entering
    assert partition.applied == partition.high_watermark


async def enter(block: Any) -> None:
    """Go through a block."""
    async with block:
        pass


async def test_a_hold_waits_for_a_thread_without_holding(cluster: Cluster) -> None:
    """Where as many totals are held as there are threads, the next partition's are folded as ever."""
    node = cluster.nodes["a"]
    await cluster.append("a", sums(1), (1, 0))
    folding = node.store.folding
    for _ in range(HOLDS_MAX):
        await folding._slots.acquire()
    asked = asyncio.ensure_future(node.call(ranking(cluster)))
    for _ in range(20):
        await asyncio.sleep(0)
    assert not node.store.partitions[0].fold.held
    await cluster.append("a", sums(1), (1, 1))
    assert await cluster.count("a", 7) == 2
    folding._slots.release()
    answer = await asked
    assert isinstance(answer, TotalsResult)
    assert answer.rows[0].stats.count == 2


async def test_totals_stay_held_until_the_thread_has_ended(cluster: Cluster) -> None:
    """Who asked may be gone; what it began still looks at them."""
    node = cluster.nodes["a"]
    partition = node.store.partitions[0]
    await cluster.append("a", sums(1), (1, 0))
    gate = Gate()
    node.store.folding._aside = gate
    asked = asyncio.ensure_future(node.call(ranking(cluster)))
    await cluster.until(lambda: gate.waiting)
    asked.cancel()
    asked.cancel()
    for _ in range(20):
        await asyncio.sleep(0)
    assert partition.fold.held
    assert not asked.done()
    gate.opened.set()
    with pytest.raises(asyncio.CancelledError):
        await asked
    assert not partition.fold.held
    await cluster.append("a", sums(1), (1, 1))
    assert await cluster.count("a", 7) == 2


async def test_nothing_goes_to_files_while_totals_are_held() -> None:
    """A file that is written meanwhile is taken up afterwards, and nothing is lost by it."""
    cluster = Cluster(["a"], replication_factor=1, memory_bytes=1)
    await cluster.start()
    await cluster.create()
    await cluster.wait_leader()
    node = cluster.nodes["a"]
    spilling = node.spilling
    assert spilling is not None
    partition = node.store.partitions[0]
    for sequence in range(4):
        await cluster.append("a", [event(account, "sum") for account in range(50)], (1, sequence))
    assert await cluster.count("a", 7) == 4
    gate = Gate()
    node.store.folding._aside = gate
    holding = asyncio.ensure_future(node.call(ranking(cluster)))
    await cluster.until(lambda: gate.waiting)
    assert not partition.fold.spilled.files
    spilled = asyncio.ensure_future(spilling.spill(partition, 1.0))
    await cluster.until(lambda: spilling._writing or spilled.done())
    for _ in range(20):
        await asyncio.sleep(0)
    assert not spilled.done()
    assert not partition.fold.spilled.files
    gate.opened.set()
    answer = await holding
    assert isinstance(answer, TotalsResult)
    assert [row.stats.count for row in answer.rows] == [4] * 5
    await spilled
    assert partition.fold.spilled_cell_count > 0
    assert await cluster.count("a", 7) == 4
    await cluster.check_digests()
    await cluster.close()


async def test_a_thread_that_fails_is_told_once() -> None:
    """Also where its caller was cancelled: then only that is told."""

    async def fails() -> None:
        await asyncio.sleep(0)
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await to_the_end(fails())
    seen: list[str] = []
    task = asyncio.ensure_future(to_the_end(fails(), lambda: seen.append("cancelled")))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert seen == ["cancelled"]


async def test_rankings_are_the_same_as_sorting(cluster: Cluster) -> None:
    """Ties go by the account, a short list is all there is, and negative sums come last."""
    schema = MetricSchema(code="high", agg_type=AggType.MAX)
    await cluster.create(schema)
    values = [(account, (account * 37) % 11 - 5) for account in range(1, 60)]
    events = [event(account, "high", value=value) for account, value in values]
    await cluster.append("a", events, (1, 0))
    call = msgspec.structs.replace(ranking(cluster), metric_code="high")
    for top in (1, 3, 58, 59, 60):
        answer = await cluster.nodes["a"].call(msgspec.structs.replace(call, top=top))
        assert isinstance(answer, TotalsResult)
        best = sorted(values, key=lambda item: (-item[1], item[0]))[:top]
        assert [(row.account_id, row.stats.max) for row in answer.rows] == best
