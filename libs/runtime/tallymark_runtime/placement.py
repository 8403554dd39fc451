"""How a replicated cluster begins: who holds which partition, and who its first members are.

Owns the writing of `assignments/` and `founding/` for a cluster that has none yet; `planner` says where copies go.
Every store calls both functions whenever a node or a copy appears, until they say that nothing is left to do. Any
number of them may run at one time, and each may end at any point: what one has begun another one completes.

    placement              `Placement`: the replication factor, and where every partition began

The plan is made once, in one transaction on the key `placement`; the assignments follow from it, each only where
there is none. Nothing deletes an assignment, so a plan that is completed late never overwrites a newer wish.
Later changes of assignments are the administration's: each of them writes the key `placement` anew, and holds only
if nobody else did meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

import msgspec

from tallymark_protocol import limits
from tallymark_protocol.errors import RemoteProtocolError
from tallymark_runtime.assignments import (
    ASSIGNMENTS,
    COPIES,
    DRAINING,
    FOUNDING,
    Assignment,
    Copy,
    Founding,
    assignment_key,
    copy_key,
    founding_key,
)
from tallymark_runtime.catalog import Node, decode_value, node_key
from tallymark_runtime.coordinator import (
    Coordinator,
    KeyValue,
    Put,
    absent,
    unchanged,
)
from tallymark_runtime.planner import StoreNode, found

PLACEMENT: Final = b"placement"
_STORES: Final = node_key("store", "")


class Placement(msgspec.Struct, frozen=True):
    """The plan that a cluster began with."""

    replication_factor: int
    assignments: tuple[Assignment, ...]  # by partition


async def store_nodes(coordinator: Coordinator) -> tuple[list[StoreNode], dict[str, Node]]:
    """The stores that are registered now, for the planner, and their registrations by node id."""
    registered = await coordinator.range(_STORES)
    draining = {
        item.key[len(DRAINING) :].decode("utf-8", "replace")
        for item in (await coordinator.range(DRAINING)).items
    }
    nodes: dict[str, Node] = {}
    for item in registered.items:
        node = decode_value(Node, item)
        nodes[node.node_id] = node
    stores = [StoreNode(name, zone=nodes[name].zone, is_draining=name in draining) for name in sorted(nodes)]
    gone = sorted(draining - set(nodes))
    stores += [StoreNode(name, is_draining=True, is_alive=False) for name in gone]
    return stores, nodes


async def establish_assignments(
    coordinator: Coordinator, partition_count: int, replication_factor: int
) -> bool:
    """Make the assignments of a new cluster, once enough stores are registered; say whether they are all there.

    Call it again when another store registers, while it answers False.

    Raises:
        UnavailableError: the coordinator can't be reached; call it again.
        RemoteProtocolError: what is there makes no sense, or belongs to another number of partitions.
    """
    plan = await _established_plan(coordinator, partition_count, replication_factor)
    if plan is None:
        return False
    if len(plan.assignments) != partition_count:
        raise RemoteProtocolError(
            f"the cluster was placed with {len(plan.assignments)} partitions, not {partition_count}"
        )
    present = {item.key for item in (await coordinator.range(ASSIGNMENTS)).items}
    missing = [p for p in range(partition_count) if assignment_key(p) not in present]
    for start in range(0, len(missing), limits.COORDINATOR_OPERATIONS_MAX):
        group = missing[start : start + limits.COORDINATOR_OPERATIONS_MAX]
        if not await _put_absent(coordinator, plan, group):
            for partition in group:  # another store has put some of them meanwhile
                await _put_absent(coordinator, plan, [partition])
    return True


async def _established_plan(
    coordinator: Coordinator, partition_count: int, replication_factor: int
) -> Placement | None:
    item = await coordinator.get(PLACEMENT)
    if item is None:
        stores, _ = await store_nodes(coordinator)
        ready = [node for node in stores if node.is_alive and not node.is_draining]
        if len(ready) < replication_factor:
            return None
        plan = Placement(
            replication_factor,
            tuple(found(ready, partition_count=partition_count, replication_factor=replication_factor)),
        )
        await coordinator.txn([absent(PLACEMENT)], [Put(PLACEMENT, msgspec.msgpack.encode(plan))])
        item = await coordinator.get(PLACEMENT)
        if item is None:
            raise RemoteProtocolError("the cluster's placement is gone from the coordinator")
    return decode_value(Placement, item)


async def _put_absent(coordinator: Coordinator, plan: Placement, partitions: Sequence[int]) -> bool:
    puts = [Put(assignment_key(p), msgspec.msgpack.encode(plan.assignments[p])) for p in partitions]
    return (await coordinator.txn([absent(put.key) for put in puts], puts)).succeeded


async def found_partitions(coordinator: Coordinator, partition_count: int) -> list[int]:
    """Found every partition whose assigned nodes have all registered a copy; return those not founded yet.

    Call it again when an assignment or a copy appears, while it returns any. A partition is founded once: by the
    copies that were registered at that moment, under an assignment that had not changed.

    Raises:
        UnavailableError: the coordinator can't be reached; call it again.
        RemoteProtocolError: what is there makes no sense.
    """
    founded = {item.key for item in (await coordinator.range(FOUNDING)).items}
    missing = [p for p in range(partition_count) if founding_key(p) not in founded]
    if not missing:
        return []
    assignments = {item.key: item for item in (await coordinator.range(ASSIGNMENTS)).items}
    copies = {item.key: item for item in (await coordinator.range(COPIES)).items}
    done = await asyncio.gather(*(_found_partition(coordinator, p, assignments, copies) for p in missing))
    return [p for p, is_founded in zip(missing, done, strict=True) if not is_founded]


async def _found_partition(
    coordinator: Coordinator,
    partition: int,
    assignments: dict[bytes, KeyValue],
    copies: dict[bytes, KeyValue],
) -> bool:
    """Found one partition; False if it can't be founded by what is known here, which may be old already."""
    wish = assignments.get(assignment_key(partition))
    if wish is None:
        return False
    compares = [absent(founding_key(partition)), unchanged(wish)]
    members: list[tuple[str, str]] = []
    for node_id in decode_value(Assignment, wish).nodes:
        item = copies.get(copy_key(partition, node_id))
        if item is None:
            return False
        copy = decode_value(Copy, item)
        members.append((node_id, copy.copy_id))
        compares.append(unchanged(item))
    founding = Founding(tuple(members))
    result = await coordinator.txn(compares, [Put(founding_key(partition), msgspec.msgpack.encode(founding))])
    return result.succeeded
