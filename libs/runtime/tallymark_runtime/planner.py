"""Where copies shall lie: from the stores and the present assignments to the wished ones. Pure and deterministic.

The rules, the stronger first:

1. A partition lies on as many distinct stores as the replication factor says.
2. A draining store ends empty, and gets nothing.
3. A store that is gone keeps what it holds until somebody says otherwise (`replaced`), and gets nothing.
4. A partition's copies are spread over the zones of stores as evenly as these allow. Stores that name no zone share
   one. So a cluster with as many zones as copies survives the loss of any zone.
5. Stores hold equally many copies, as far as the rules above allow.
6. As few copies move as possible.
7. Stores are the preferred leader (the first of an assignment) of equally many partitions, as far as the copies
   allow; as few leaderships move as possible.

`rebalanced` follows all of them; a new store gets its share by it. `drained` and `replaced` move only what leaves
the stores in question, because every other move would be one that nobody asked for.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import msgspec

from tallymark_protocol.errors import ErrorCode, InvalidRequestError, NotFoundError
from tallymark_runtime.assignments import Assignment
from tallymark_runtime.balance import Choice, spread


class StoreNode(msgspec.Struct, frozen=True):
    """A store as the planner sees it."""

    node_id: str
    zone: str = ""
    is_draining: bool = False
    is_alive: bool = True  # registered now

    @property
    def is_eligible(self) -> bool:
        """Whether it may be given copies."""
        return self.is_alive and not self.is_draining


class Move(msgspec.Struct, frozen=True):
    """One copy that goes from one store to another; "" where it is only added or only taken away."""

    partition: int
    source: str
    target: str


def found(nodes: Sequence[StoreNode], *, partition_count: int, replication_factor: int) -> list[Assignment]:
    """The first assignments of a cluster, by partition.

    Raises:
        InvalidRequestError: there are too few stores.
    """
    wished = _plan(nodes, {p: Assignment(()) for p in range(partition_count)}, replication_factor, None)
    return [wished[p] for p in range(partition_count)]


def rebalanced(
    nodes: Sequence[StoreNode], current: Mapping[int, Assignment], *, replication_factor: int
) -> dict[int, Assignment]:
    """The most even assignments with the fewest moves.

    Raises:
        InvalidRequestError: there are too few stores.
    """
    return _plan(nodes, current, replication_factor, None)


def drained(nodes: Sequence[StoreNode], current: Mapping[int, Assignment]) -> dict[int, Assignment]:
    """The assignments with the copies of draining stores, alive or not, moved to others, and nothing else.

    Raises:
        InvalidRequestError: there are too few stores left.
    """
    leaving = {node.node_id for node in nodes if node.is_draining}
    return _plan(nodes, current, 0, leaving)


def replaced(
    nodes: Sequence[StoreNode], current: Mapping[int, Assignment], node_id: str, successor: str = ""
) -> dict[int, Assignment]:
    """The assignments with one store's copies moved: to its successor, where it has no copy, or to whom they suit.

    Raises:
        NotFoundError: the successor is no store that is there.
        InvalidRequestError: the successor may not be given copies, or there are too few stores left.
    """
    if successor:
        _check_successor(nodes, node_id, successor)
        taken = {p: _swapped(assignment, node_id, successor) for p, assignment in current.items()}
    else:
        taken = dict(current)
    marked = [node for node in nodes if node.node_id != node_id]
    return _plan([*marked, StoreNode(node_id, is_draining=True)], taken, 0, {node_id})


def moves(current: Mapping[int, Assignment], wished: Mapping[int, Assignment]) -> list[Move]:
    """What must be copied and discarded to get from one to the other, by partition."""
    found_moves: list[Move] = []
    for partition in sorted(wished):
        before = current[partition].nodes if partition in current else ()
        after = wished[partition].nodes
        gone = [node for node in before if node not in after]
        new = [node for node in after if node not in before]
        for i in range(max(len(gone), len(new))):
            source = gone[i] if i < len(gone) else ""
            found_moves.append(Move(partition, source, new[i] if i < len(new) else ""))
    return found_moves


def _check_successor(nodes: Sequence[StoreNode], node_id: str, successor: str) -> None:
    known = {node.node_id: node for node in nodes}
    if successor == node_id:
        raise InvalidRequestError(f"store {node_id!r} can't replace itself")
    if successor not in known or not known[successor].is_alive:
        raise NotFoundError(f"there is no store {successor!r} that is up", code=ErrorCode.NOT_FOUND)
    if known[successor].is_draining:
        raise InvalidRequestError(f"store {successor!r} is being drained")


def _swapped(assignment: Assignment, old: str, new: str) -> Assignment:
    if old not in assignment.nodes or new in assignment.nodes:
        return assignment
    return Assignment(tuple(new if node == old else node for node in assignment.nodes), assignment.zones)


def _plan(
    nodes: Sequence[StoreNode],
    current: Mapping[int, Assignment],
    replication_factor: int,
    leaving: Collection[str] | None,
) -> dict[int, Assignment]:
    """Plan all copies; with `leaving`, only those of partitions that lose a copy on one of these stores."""
    known = {node.node_id: node for node in nodes}
    zones = _zones(known, current)
    eligible = sorted(name for name, node in known.items() if node.is_eligible)
    staying: dict[int, list[str]] = {}  # copies that are not to be moved
    counts: dict[int, int] = {}  # copies to find for each partition
    for partition in sorted(current):
        before = current[partition].nodes
        if leaving is not None:
            staying[partition] = [name for name in before if name not in leaving]
            counts[partition] = len(before) - len(staying[partition])
        else:
            gone = [name for name in before if name not in known or not known[name].is_alive]
            stuck = [name for name in gone if name not in known or not known[name].is_draining]
            staying[partition] = stuck[:replication_factor]
            counts[partition] = replication_factor - len(staying[partition])
    choices, changing = [], [partition for partition in sorted(current) if counts[partition]]
    for partition in changing:
        candidates = tuple(name for name in eligible if name not in staying[partition])
        if len(candidates) < counts[partition]:
            lost = [name for name in current[partition].nodes if name in (leaving or ())]
            raise InvalidRequestError(
                _too_few(
                    lost,
                    counts[partition] + len(staying[partition]),
                    len(candidates) + len(staying[partition]),
                )
            )
        choices.append(
            Choice(
                counts[partition],
                candidates,
                {name: zones[name] for name in candidates},
                _bounds(candidates, staying[partition], counts[partition], zones),
                frozenset(current[partition].nodes),
            )
        )
    loads = dict.fromkeys(eligible, 0)
    for names in staying.values():
        for name in names:
            if name in loads:
                loads[name] += 1
    copies = {partition: frozenset(names) for partition, names in staying.items()}
    for partition, taken in zip(changing, spread(choices, loads), strict=True):
        copies[partition] |= taken
    return _with_leaders(current, copies, eligible, zones, changing if leaving is not None else None)


def _too_few(leaving: Sequence[str], copies: int, stores: int) -> str:
    if leaving:
        names = " and ".join(leaving)
        return f"{names} can't be drained: {copies} copies need {copies} other stores, there are {stores}: add stores first"
    return f"{copies} copies need {copies} stores that are not drained, there are {stores}: add stores first"


def _zones(known: Mapping[str, StoreNode], current: Mapping[int, Assignment]) -> dict[str, str]:
    """The zone of every store: what it says, or said when it was given a copy."""
    zones: dict[str, str] = {}
    for assignment in current.values():
        for i, name in enumerate(assignment.nodes):
            zones.setdefault(name, "")
            if i < len(assignment.zones):
                zones[name] = zones[name] or assignment.zones[i]
    for name, node in known.items():
        if node.is_alive:
            zones[name] = node.zone
        zones.setdefault(name, node.zone)
    return zones


def _bounds(
    candidates: Sequence[str], staying: Sequence[str], count: int, zones: Mapping[str, str]
) -> dict[str, tuple[int, int]]:
    """How many copies each zone gets beyond those that stay, so that all copies are spread as evenly as possible.

    The zones are filled like connected vessels: to one level, but for those that have too few stores for it or too
    many copies that stay. Where the level comes out between two whole numbers, either will do for any one zone.
    """
    room: dict[str, int] = {}  # copies a zone can have in all
    held: dict[str, int] = {}  # copies that stay there
    for name in candidates:
        room[zones[name]] = room.get(zones[name], 0) + 1
    for name in staying:
        if zones[name] in room:
            held[zones[name]] = held.get(zones[name], 0) + 1
    for zone, copies in held.items():
        room[zone] += copies

    def filled(level: int) -> dict[str, int]:
        return {z: max(held.get(z, 0), min(level, room[z])) - held.get(z, 0) for z in sorted(room)}

    level = 0
    while sum(filled(level).values()) < count:
        level += 1
    least, most = filled(max(level - 1, 0)), filled(level)
    return {zone: (least[zone], most[zone]) for zone in most}


def _with_leaders(
    current: Mapping[int, Assignment],
    copies: Mapping[int, frozenset[str]],
    eligible: Sequence[str],
    zones: Mapping[str, str],
    changing: Sequence[int] | None,
) -> dict[int, Assignment]:
    """Put the preferred leader in front; with `changing`, another than before only in these partitions."""
    choices, partitions = [], []
    loads = dict.fromkeys(eligible, 0)
    first: dict[int, str] = {}
    for partition in sorted(copies):
        before = current[partition].nodes
        candidates = tuple(name for name in eligible if name in copies[partition])
        stays = changing is not None and bool(before) and before[0] in copies[partition]
        if stays or not candidates:
            kept = [name for name in before if name in copies[partition]]
            first[partition] = (kept or sorted(copies[partition]))[0]
            if first[partition] in loads:
                loads[first[partition]] += 1
            continue
        partitions.append(partition)
        choices.append(
            Choice(1, candidates, dict.fromkeys(candidates, ""), {"": (1, 1)}, frozenset(before[:1]))
        )
    for partition, (name,) in zip(partitions, spread(choices, loads), strict=True):
        first[partition] = name
    return {p: _ordered(current[p].nodes, copies[p], first[p], zones) for p in sorted(copies)}


def _ordered(
    before: Sequence[str],
    copies: frozenset[str],
    first: str,
    zones: Mapping[str, str],
) -> Assignment:
    """An assignment's order: the leader, those that were there as they were, then the new ones.

    New ones come as they follow the leader in the ring of stores, so that when a store goes away, its leaderships
    don't all fall to one other.
    """
    kept = [name for name in before if name in copies and name != first]
    new = sorted(copies - set(kept) - {first})
    after = [name for name in new if name > first] + [name for name in new if name < first]
    names = (first, *kept, *after)
    return Assignment(names, tuple(zones[name] for name in names))
