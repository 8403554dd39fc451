"""How a cluster begins: assignments made once whoever makes them, founding members that were all there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from tallymark_protocol.errors import RemoteProtocolError, UnavailableError
from tallymark_runtime.assignments import (
    ASSIGNMENTS,
    Assignment,
    Copy,
    Draining,
    Founding,
    assignment_key,
    copy_key,
    draining_key,
    founding_key,
)
from tallymark_runtime.catalog import Node, decode_value, node_key
from tallymark_runtime.clock import ManualClock
from tallymark_runtime.coordinator import MemoryCoordinator
from tallymark_runtime.placement import (
    PLACEMENT,
    establish_assignments,
    found_partitions,
    store_nodes,
)

encode = msgspec.msgpack.encode


class Cut:
    """A coordinator that fails from its n-th transaction on, before or after that took effect."""

    def __init__(self, inner: MemoryCoordinator, txns: int, *, applies_last: bool) -> None:
        self.inner = inner
        self.left = txns
        self.applies_last = applies_last

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    async def txn(self, *arguments: Any) -> Any:
        self.left -= 1
        if self.left < 0:
            raise UnavailableError("away")
        result = await self.inner.txn(*arguments)
        if self.left == 0 and self.applies_last:
            raise UnavailableError("the answer was lost")
        return result


@pytest.fixture
async def coordinator() -> AsyncIterator[MemoryCoordinator]:
    made = MemoryCoordinator(ManualClock())
    yield made
    await made.close()


async def add_store(coordinator: Any, name: str, zone: str = "") -> None:
    await coordinator.put(node_key("store", name), encode(Node(name, f"{name}:1", "store", zone)))


async def wishes(coordinator: Any) -> dict[bytes, Assignment]:
    return {item.key: decode_value(Assignment, item) for item in (await coordinator.range(ASSIGNMENTS)).items}


async def test_assignments_wait_for_enough_stores(coordinator: MemoryCoordinator) -> None:
    """Nothing is assigned before as many stores are there as there are copies of a partition."""
    await coordinator.put(node_key("ingest", "g"), encode(Node("g", "g:1", "ingest")))
    for name in "ab":
        await add_store(coordinator, name)
        assert not await establish_assignments(coordinator, 4, 3)
    assert await coordinator.get(PLACEMENT) is None
    await add_store(coordinator, "c")
    assert await establish_assignments(coordinator, 4, 3)
    found = await wishes(coordinator)
    assert set(found) == {assignment_key(p) for p in range(4)}
    assert all(sorted(item.nodes) == ["a", "b", "c"] for item in found.values())


async def test_a_draining_store_is_not_placed_on(coordinator: MemoryCoordinator) -> None:
    """A store that is to be empty gets nothing from the beginning, and doesn't count as there."""
    for name in "abc":
        await add_store(coordinator, name)
    await coordinator.put(draining_key("b"), encode(Draining()))
    assert not await establish_assignments(coordinator, 2, 3)
    assert await establish_assignments(coordinator, 2, 2)
    assert all(sorted(item.nodes) == ["a", "c"] for item in (await wishes(coordinator)).values())


async def test_all_stores_at_once_make_one_plan(coordinator: MemoryCoordinator) -> None:
    """Many writers at one time: one plan, each assignment written once, more than one transaction holds."""
    for i in range(5):
        await add_store(coordinator, f"s{i}", "xyz"[i % 3])
    done = await asyncio.gather(*(establish_assignments(coordinator, 256, 3) for _ in range(6)))
    assert done == [True] * 6
    items = (await coordinator.range(ASSIGNMENTS)).items
    assert len(items) == 256
    assert {item.version for item in items} == {1}
    before = await wishes(coordinator)
    await add_store(coordinator, "late")
    assert await establish_assignments(coordinator, 256, 3)
    assert await wishes(coordinator) == before


@pytest.mark.parametrize("applies_last", [False, True])
@pytest.mark.parametrize("txns", [1, 2])
async def test_what_one_began_another_completes(
    coordinator: MemoryCoordinator, txns: int, applies_last: bool
) -> None:
    """A store that ends in the middle leaves a plan that others carry out, though they'd have planned otherwise."""
    for name in ("a", "b", "c"):
        await add_store(coordinator, name)
    with pytest.raises(UnavailableError):
        await establish_assignments(Cut(coordinator, txns, applies_last=applies_last), 200, 3)
    began = await coordinator.get(PLACEMENT)
    for name in ("d", "e", "f"):
        await add_store(coordinator, name)
    assert await establish_assignments(coordinator, 200, 3)
    assert await coordinator.get(PLACEMENT) == began
    found = await wishes(coordinator)
    assert len(found) == 200
    assert {name for item in found.values() for name in item.nodes} == {"a", "b", "c"}


async def test_a_late_completion_overwrites_no_newer_wish(coordinator: MemoryCoordinator) -> None:
    """An assignment that was changed since stays as it is."""
    for name in ("a", "b", "c"):
        await add_store(coordinator, name)
    await establish_assignments(coordinator, 3, 1)
    newer = Assignment(("z",))
    await coordinator.put(assignment_key(1), encode(newer))
    await establish_assignments(coordinator, 3, 1)
    assert (await wishes(coordinator))[assignment_key(1)] == newer


async def test_another_partition_count_is_refused(coordinator: MemoryCoordinator) -> None:
    """A store that believes in another number of partitions is told so."""
    await add_store(coordinator, "a")
    assert await establish_assignments(coordinator, 4, 1)
    with pytest.raises(RemoteProtocolError, match="4 partitions, not 8"):
        await establish_assignments(coordinator, 8, 1)


async def test_a_partition_is_founded_when_all_its_copies_are_there(coordinator: MemoryCoordinator) -> None:
    """Each partition waits for all of its own nodes, and no other."""
    for name in ("a", "b", "c"):
        await add_store(coordinator, name)
    assert await found_partitions(coordinator, 2) == [0, 1]
    await establish_assignments(coordinator, 2, 3)
    for name in ("a", "b"):
        for p in range(2):
            await coordinator.put(copy_key(p, name), encode(Copy(f"{name}{p}")))
    assert await found_partitions(coordinator, 2) == [0, 1]
    await coordinator.put(copy_key(1, "c"), encode(Copy("c1")))
    assert await found_partitions(coordinator, 2) == [0]
    item = await coordinator.get(founding_key(1))
    assert item is not None
    members = msgspec.msgpack.decode(item.value, type=Founding).members
    assert sorted(members) == [("a", "a1"), ("b", "b1"), ("c", "c1")]
    await coordinator.put(copy_key(0, "c"), encode(Copy("c0")))
    assert await found_partitions(coordinator, 2) == []


async def test_a_partition_is_founded_once(coordinator: MemoryCoordinator) -> None:
    """Neither many founders at once nor a copy that was renewed later change the founding members."""
    await add_store(coordinator, "a")
    await establish_assignments(coordinator, 3, 1)
    for p in range(3):
        await coordinator.put(copy_key(p, "a"), encode(Copy(f"first{p}")))
    await asyncio.gather(*(found_partitions(coordinator, 3) for _ in range(5)))
    await coordinator.put(copy_key(1, "a"), encode(Copy("second")))
    assert await found_partitions(coordinator, 3) == []
    for p in range(3):
        item = await coordinator.get(founding_key(p))
        assert item is not None
        assert item.version == 1
        assert msgspec.msgpack.decode(item.value, type=Founding).members == (("a", f"first{p}"),)


class Interfering:
    """A coordinator in which something happens between what is read and the transaction."""

    def __init__(self, inner: MemoryCoordinator, key: bytes, value: bytes) -> None:
        self.inner = inner
        self.key = key
        self.value = value

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    async def txn(self, *arguments: Any) -> Any:
        await self.inner.put(self.key, self.value)
        return await self.inner.txn(*arguments)


@pytest.mark.parametrize(
    ("key", "value"),
    [(copy_key(0, "a"), encode(Copy("renewed"))), (assignment_key(0), encode(Assignment(("b",))))],
)
async def test_what_changed_meanwhile_founds_nothing(
    coordinator: MemoryCoordinator, key: bytes, value: bytes
) -> None:
    """A copy that was renewed, or a wish that was changed, between reading and writing: not founded by old news."""
    await add_store(coordinator, "a")
    await establish_assignments(coordinator, 1, 1)
    await coordinator.put(copy_key(0, "a"), encode(Copy("old")))
    assert await found_partitions(Interfering(coordinator, key, value), 1) == [0]
    assert await coordinator.get(founding_key(0)) is None


async def test_stores_are_read_with_what_is_wished_of_them(coordinator: MemoryCoordinator) -> None:
    """Registered stores with their zones; those to be drained, also when they are gone."""
    await add_store(coordinator, "b", "z2")
    await add_store(coordinator, "a", "z1")
    for name in ("b", "gone"):
        await coordinator.put(draining_key(name), encode(Draining()))
    stores, nodes = await store_nodes(coordinator)
    assert [(s.node_id, s.zone, s.is_draining, s.is_alive) for s in stores] == [
        ("a", "z1", False, True),
        ("b", "z2", True, True),
        ("gone", "", True, False),
    ]
    assert sorted(nodes) == ["a", "b"]
