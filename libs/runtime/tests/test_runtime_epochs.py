"""Epochs and uids: from revisions and a base, never twice, also after the coordinator was put back to an old state."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from tallymark_protocol.errors import InvalidRequestError, RemoteProtocolError, UnavailableError
from tallymark_protocol.model import MetricSchema
from tallymark_protocol.schema import encode_record, make_record
from tallymark_runtime.catalog import Leader, MetricCatalog, leader_key, metric_key, metric_of
from tallymark_runtime.clock import ManualClock
from tallymark_runtime.coordinator import KeyValue, MemoryCoordinator
from tallymark_runtime.epochs import (
    EPOCH_BASE,
    EPOCH_BASE_MAX,
    EpochBase,
    create_leader_key,
    epoch_of,
    raise_base,
    read_base,
)

ME = Leader("n", "n:1", "life")
NOW_NS = 1_800_000_000 * 10**9  # some time in 2027
BASE = NOW_NS // 1000


@pytest.fixture
async def coordinator() -> AsyncIterator[MemoryCoordinator]:
    made = MemoryCoordinator(ManualClock())
    yield made
    await made.close()


async def lead(coordinator: Any, partition: int = 0) -> int:
    return await create_leader_key(coordinator, partition, ME, await coordinator.lease_grant(10.0))


async def stored(coordinator: Any, key: bytes) -> KeyValue:
    item = await coordinator.get(key)
    assert item is not None
    return item


async def put_metric(coordinator: Any, code: str, base: int) -> int:
    record = msgspec.structs.replace(make_record(0, MetricSchema(code=code)), uid=base)
    return int(await coordinator.put(metric_key(code), encode_record(record)))


async def test_without_a_loss_an_epoch_is_a_revision(coordinator: MemoryCoordinator) -> None:
    """Nothing was ever lost: the epoch is the leader key's create revision, for everybody who looks."""
    epoch = await lead(coordinator)
    item = await stored(coordinator, leader_key(0))
    assert epoch == item.create_revision == epoch_of(item)
    assert (await read_base(coordinator)).base == 0


async def test_a_key_that_is_there_is_not_taken(coordinator: MemoryCoordinator) -> None:
    """Zero tells that somebody else has the key, which stays as it is."""
    assert await lead(coordinator) > 0
    before = await stored(coordinator, leader_key(0))
    assert await lead(coordinator) == 0
    assert await stored(coordinator, leader_key(0)) == before


async def test_a_raised_base_is_above_whatever_was_given(coordinator: MemoryCoordinator) -> None:
    """A key made before keeps its epoch; one made afterwards gets a higher one, read alike from the key."""
    old = await lead(coordinator, 0)
    assert await raise_base(coordinator, NOW_NS, seen=old) == (0, BASE)
    assert epoch_of(await stored(coordinator, leader_key(0))) == old
    new = await lead(coordinator, 1)
    item = await stored(coordinator, leader_key(1))
    assert new == epoch_of(item) == BASE + item.create_revision
    assert new > old


async def test_a_lost_base_is_exceeded_all_the_same() -> None:
    """The backup is older than the last recovery: the next base is above that one, though nobody knows of it."""
    first = MemoryCoordinator(ManualClock())
    await raise_base(first, NOW_NS)
    for i in range(100):
        await first.put(b"x", str(i).encode())
    lost = await lead(first)
    await first.close()
    restored = MemoryCoordinator(ManualClock())
    _, base = await raise_base(restored, NOW_NS + 60 * 10**9)
    assert base > lost
    assert await lead(restored) > lost
    await restored.close()


@pytest.mark.parametrize("seen", [BASE, BASE + 1, 2**61])
async def test_a_clock_that_is_behind_is_refused(coordinator: MemoryCoordinator, seen: int) -> None:
    """A store knows of a higher epoch than the clock would give: the clock is wrong, and nothing is changed."""
    with pytest.raises(InvalidRequestError, match="clock is wrong"):
        await raise_base(coordinator, NOW_NS, seen=seen)
    assert await coordinator.get(EPOCH_BASE) is None


async def test_a_base_never_falls_or_stays(coordinator: MemoryCoordinator) -> None:
    """Two recoveries at one moment, or one by a clock behind: the second is refused."""
    await raise_base(coordinator, NOW_NS)
    for now_ns in (NOW_NS, NOW_NS - 10**9):
        with pytest.raises(InvalidRequestError, match="clock is wrong"):
            await raise_base(coordinator, now_ns)
    assert (await read_base(coordinator)).base == BASE
    with pytest.raises(InvalidRequestError, match="clock is wrong"):
        await raise_base(coordinator, (EPOCH_BASE_MAX + 1) * 1000)


class Racing:
    """A coordinator where the base is raised just before the next transactions."""

    def __init__(self, inner: MemoryCoordinator, times: int) -> None:
        self.inner = inner
        self.times = times

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    async def txn(self, *arguments: Any) -> Any:
        if self.times:
            self.times -= 1
            base = BASE + (await self.inner.txn([], [])).revision
            await self.inner.put(EPOCH_BASE, msgspec.msgpack.encode(EpochBase(base)))
        return await self.inner.txn(*arguments)


async def test_a_key_is_never_created_under_an_old_base(coordinator: MemoryCoordinator) -> None:
    """The base is raised between reading it and creating the key: the key gets the new one."""
    epoch = await lead(Racing(coordinator, 3))
    base = (await read_base(coordinator)).base
    assert epoch > base > BASE
    with pytest.raises(UnavailableError, match="keeps changing"):
        await lead(Racing(coordinator, 1_000), 1)
    assert await coordinator.get(leader_key(1)) is None


async def test_two_who_raise_at_once_raise_once_or_twice(coordinator: MemoryCoordinator) -> None:
    """Concurrent recoveries: whoever is second is judged by what the first one wrote."""
    results = await asyncio.gather(
        *(raise_base(coordinator, NOW_NS + i * 1_000) for i in range(3)), return_exceptions=True
    )
    raised = [result[1] for result in results if isinstance(result, tuple)]
    assert raised
    assert (await read_base(coordinator)).base == max(raised)
    refused = [result for result in results if not isinstance(result, tuple)]
    assert all(isinstance(error, InvalidRequestError) for error in refused)


async def test_what_is_no_leader_has_no_epoch(coordinator: MemoryCoordinator) -> None:
    """A value that makes no sense is an error, not epoch so-and-so."""
    await coordinator.put(leader_key(0), b"\xc1")
    with pytest.raises(RemoteProtocolError):
        epoch_of(await stored(coordinator, leader_key(0)))


async def test_a_leader_of_an_earlier_version_has_base_zero(coordinator: MemoryCoordinator) -> None:
    """A key without a base, as written before there were bases, counts from zero."""
    old = {"node_id": "n", "address": "n:1", "instance": "i"}
    revision = await coordinator.put(leader_key(0), msgspec.msgpack.encode(old))
    assert epoch_of(await stored(coordinator, leader_key(0))) == revision


async def test_metrics_made_after_a_loss_have_uids_above_all_before(coordinator: MemoryCoordinator) -> None:
    """A metric keeps its uid when the base is raised; one made afterwards is above, also for a catalog."""
    old = await put_metric(coordinator, "old", 0)
    metrics = MetricCatalog(coordinator)
    await metrics.start()
    _, base = await raise_base(coordinator, NOW_NS)
    revision = await put_metric(coordinator, "new", base)
    found = await metrics.fetch("new")
    assert found is not None
    assert found.uid == base + revision == metric_of(await stored(coordinator, metric_key("new"))).uid
    kept = metrics.get("old")
    assert kept is not None
    assert kept.uid == old
    assert metrics.newest_uid >= found.uid
    await metrics.close()


async def test_a_catalog_knows_what_it_has_missed(coordinator: MemoryCoordinator) -> None:
    """`newest_uid` tells deleted metrics from those not heard of, on either side of a base."""
    _, base = await raise_base(coordinator, NOW_NS)
    gone = base + await put_metric(coordinator, "gone", base)
    await coordinator.delete(metric_key("gone"))
    metrics = MetricCatalog(coordinator)
    await metrics.start()
    assert metrics.get("gone") is None
    assert gone <= metrics.newest_uid < gone + 1_000
    await metrics.close()


async def test_waiting_for_a_uid_waits_for_its_revision(coordinator: MemoryCoordinator) -> None:
    """A uid of an older base is known at once, one of the present base when its key was seen, others never."""
    metrics = MetricCatalog(coordinator)
    await metrics.start()
    _, base = await raise_base(coordinator, NOW_NS)  # after the catalog read it
    uid = base + await put_metric(coordinator, "m", base)
    await metrics.wait_uid(uid)
    assert metrics.get("m") is not None
    await metrics.wait_uid(base - 5)
    with pytest.raises(UnavailableError):
        await metrics.wait_uid(base + 10**6)
    await metrics.close()
