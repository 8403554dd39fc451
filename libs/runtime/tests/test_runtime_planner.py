"""Where copies shall lie: the planner's rules on random clusters, against counting and against trying everything."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tallymark_protocol.errors import InvalidRequestError, NotFoundError
from tallymark_runtime.assignments import Assignment
from tallymark_runtime.planner import Move, StoreNode, drained, found, moves, rebalanced, replaced

Wish = Mapping[int, Assignment]


def loads(wish: Wish, names: Sequence[str]) -> list[int]:
    """How many copies each of the stores has."""
    counted = Counter(name for item in wish.values() for name in item.nodes)
    return [counted[name] for name in names]


def leads(wish: Wish, names: Sequence[str]) -> list[int]:
    """How many partitions each of the stores is the preferred leader of."""
    counted = Counter(item.nodes[0] for item in wish.values() if item.nodes)
    return [counted[name] for name in names]


def gap(numbers: Sequence[int]) -> int:
    """The difference between the most and the least."""
    return max(numbers) - min(numbers)


def zone_counts(assignment: Assignment, zone_of: Mapping[str, str]) -> dict[str, int]:
    """How many of a partition's copies lie in each zone."""
    return dict(Counter(zone_of[name] for name in assignment.nodes))


def most_even(sizes: Mapping[str, int], count: int) -> list[int]:
    """Copies by zone, sorted, when they are dealt one after the other to the zone that has the fewest."""
    dealt = dict.fromkeys(sizes, 0)
    for _ in range(count):
        open_zones = [zone for zone in sorted(sizes) if dealt[zone] < sizes[zone]]
        dealt[min(open_zones, key=lambda zone: dealt[zone])] += 1
    return sorted(n for n in dealt.values() if n)


def stores(count: int, zones: Sequence[str] = ("",)) -> list[StoreNode]:
    """Some stores, spread over zones in turn."""
    return [StoreNode(f"n{i}", zones[i % len(zones)]) for i in range(count)]


def founded(nodes: Sequence[StoreNode], partitions: int, copies: int) -> dict[int, Assignment]:
    """The first assignments, by partition."""
    return dict(enumerate(found(nodes, partition_count=partitions, replication_factor=copies)))


@st.composite
def clusters(draw: st.DrawFn, *, zoned: bool) -> tuple[list[StoreNode], int, int]:
    """Stores, partitions, copies of each."""
    count = draw(st.integers(1, 7))
    zones = draw(st.lists(st.sampled_from("abc" if zoned else [""]), min_size=count, max_size=count))
    nodes = [StoreNode(f"n{i}", zone) for i, zone in enumerate(zones)]
    return nodes, draw(st.integers(1, 14)), draw(st.integers(1, count))


@given(clusters(zoned=False))
@settings(max_examples=150, deadline=None)
def test_a_new_cluster_is_even(cluster: tuple[list[StoreNode], int, int]) -> None:
    """Distinct stores, as many as wished; copies and leaderships differ by one at most."""
    nodes, partitions, copies = cluster
    wish = founded(nodes, partitions, copies)
    names = [node.node_id for node in nodes]
    assert all(len(set(item.nodes)) == len(item.nodes) == copies for item in wish.values())
    assert gap(loads(wish, names)) <= 1
    assert gap(leads(wish, names)) <= 1
    assert rebalanced(nodes, wish, replication_factor=copies) == wish
    assert founded(list(reversed(nodes)), partitions, copies) == wish


@given(clusters(zoned=True))
@settings(max_examples=150, deadline=None)
def test_zones_share_the_copies_of_each_partition(cluster: tuple[list[StoreNode], int, int]) -> None:
    """Every partition lies in its zones as evenly as the numbers of stores allow, so in as many as possible."""
    nodes, partitions, copies = cluster
    wish = founded(nodes, partitions, copies)
    zone_of = {node.node_id: node.zone for node in nodes}
    best = most_even(Counter(zone_of.values()), copies)
    for item in wish.values():
        assert sorted(zone_counts(item, zone_of).values()) == best
        assert item.zones == tuple(zone_of[name] for name in item.nodes)
    for zone in set(zone_of.values()):  # within a zone nothing keeps stores from being even
        assert gap(loads(wish, [name for name in zone_of if zone_of[name] == zone])) <= 1
    assert rebalanced(nodes, wish, replication_factor=copies) == wish


@st.composite
def histories(draw: st.DrawFn) -> tuple[list[tuple[str, int, str]], int, int]:
    """What happens to a cluster: (what, which store, zone)."""
    kinds = st.sampled_from(["join", "drain", "undrain", "die", "return", "replace", "rebalance"])
    steps = draw(st.lists(st.tuples(kinds, st.integers(0, 9), st.sampled_from("ab")), max_size=12))
    return steps, draw(st.integers(1, 8)), draw(st.integers(1, 3))


def is_most_even(nodes: Sequence[StoreNode], wish: Wish, copies: int) -> bool:
    """Whether no single move makes the stores' loads more even within the rules."""
    known = {node.node_id: node for node in nodes}
    eligible = [node.node_id for node in nodes if node.is_eligible]
    zone_of = {name: known[name].zone for name in known}
    counted = dict(zip(eligible, loads(wish, eligible), strict=True))
    for item in wish.values():
        for old, new in itertools.product(item.nodes, eligible):
            if new in item.nodes or not known[old].is_eligible or counted[new] + 1 >= counted[old]:
                continue
            swapped = [new if name == old else name for name in item.nodes]
            before = sorted(Counter(zone_of[name] for name in item.nodes).values())
            if sorted(Counter(zone_of[name] for name in swapped).values()) == before:
                return False
    return len({len(item.nodes) for item in wish.values()} | {copies}) == 1


@given(histories())
@settings(max_examples=200, deadline=None)
def test_rules_hold_whatever_happens(history: tuple[list[tuple[str, int, str]], int, int]) -> None:
    """Joins, drains, failures and returns in any order: each plan keeps the rules, and is stable."""
    steps, partitions, copies = history
    nodes = {f"n{i}": StoreNode(f"n{i}", "ab"[i % 2]) for i in range(copies + 1)}
    wish: dict[int, Assignment] = founded(list(nodes.values()), partitions, copies)
    for what, which, zone in steps:
        name = sorted(nodes)[which % len(nodes)]
        node = nodes[name]
        before = dict(wish)
        changed = dict(nodes)
        if what == "join":
            changed[f"n{len(nodes)}"] = StoreNode(f"n{len(nodes)}", zone)
        elif what in {"drain", "undrain", "replace"}:
            changed[name] = StoreNode(name, node.zone, what != "undrain", node.is_alive)
        elif what in {"die", "return"}:
            changed[name] = StoreNode(name, node.zone, node.is_draining, what == "return")
        now = sorted(changed.values(), key=lambda n: n.node_id)
        up = [n.node_id for n in now if n.is_eligible]
        try:
            if what == "drain":
                wish = drained(now, wish)
            elif what == "replace":
                wish = replaced(list(nodes.values()), wish, name)
            elif what == "rebalance":
                wish = rebalanced(now, wish, replication_factor=copies)
        except InvalidRequestError:
            assert len(up) < copies or any(not n.is_alive or n.is_draining for n in now)
            wish = before
            continue  # refused as a whole: the store isn't marked either
        nodes = changed
        assert all(len(set(item.nodes)) == len(item.nodes) == copies for item in wish.values())
        if what in {"drain", "replace"}:
            assert all(name not in item.nodes for item in wish.values())
            moved = [move for move in moves(before, wish) if move.source != name]
            assert {move.source for move in moved} <= {n.node_id for n in now if n.is_draining}
            assert drained(now, wish) == wish
        if what == "rebalance":
            gone = {n.node_id for n in now if not n.is_alive and not n.is_draining}
            for p, item in wish.items():  # a store that is gone keeps what it has, and gets nothing
                assert gone & set(item.nodes) == gone & set(before[p].nodes)
            assert not any(n.is_draining and n.node_id in item.nodes for n in now for item in wish.values())
            assert rebalanced(now, wish, replication_factor=copies) == wish
            if not gone:
                assert is_most_even(now, wish, copies)


def cheapest(nodes: Sequence[StoreNode], wish: Wish, copies: int) -> tuple[int, int]:
    """(sum of squared loads, moves) of the best of all assignments whose zones are as even as can be."""
    zone_of = {node.node_id: node.zone for node in nodes}
    even = most_even(Counter(zone_of.values()), copies)
    sets = [
        chosen
        for chosen in itertools.combinations(zone_of, copies)
        if sorted(Counter(zone_of[name] for name in chosen).values()) == even
    ]
    best = (10**9, 10**9)
    for all_chosen in itertools.product(sets, repeat=len(wish)):
        counted = Counter(itertools.chain.from_iterable(all_chosen))
        moved = sum(len(set(chosen) - set(wish[p].nodes)) for p, chosen in enumerate(all_chosen))
        best = min(best, (sum(n * n for n in counted.values()), moved))
    return best


def cheapest_leaders(names: Sequence[str], before: Wish, plan: Wish) -> tuple[int, int]:
    """(sum of squared leaderships, changes) of the best of all choices of a leader among each one's copies."""
    best = (10**9, 10**9)
    for chosen in itertools.product(*(plan[p].nodes for p in sorted(plan))):
        counted = Counter(chosen)
        changed = sum(name != before[p].nodes[0] for p, name in enumerate(chosen))
        best = min(best, (sum(counted[name] ** 2 for name in names), changed))
    return best


@given(st.data(), st.sampled_from(["", "ab", "abc"]), st.integers(2, 4), st.integers(1, 4), st.integers(1, 3))
@settings(max_examples=120, deadline=None)
def test_no_plan_is_more_even_or_moves_less(
    data: st.DataObject, zones: str, count: int, partitions: int, copies: int
) -> None:
    """From any assignments whatever: the best of all, copies first and then leaders, by trying everything."""
    copies = min(copies, count)
    zone = st.sampled_from(zones) if zones else st.just("")
    nodes = [StoreNode(f"n{i}", data.draw(zone)) for i in range(count)]
    names = [node.node_id for node in nodes]
    sets = st.permutations(names).map(lambda order: Assignment(tuple(order[:copies])))
    wish = dict(enumerate(data.draw(st.lists(sets, min_size=partitions, max_size=partitions))))
    plan = rebalanced(nodes, wish, replication_factor=copies)
    squares = sum(n * n for n in loads(plan, names))
    assert (squares, len(moves(wish, plan))) == cheapest(nodes, wish, copies)
    led = sum(n * n for n in leads(plan, names))
    changed = sum(plan[p].nodes[0] != wish[p].nodes[0] for p in plan)
    assert (led, changed) == cheapest_leaders(names, wish, plan)
    if not zones:
        assert gap(loads(plan, names)) <= 1
        assert gap(leads(plan, names)) <= 1


def test_a_new_store_gets_its_share_and_no_more_moves() -> None:
    """Three stores hold everything; a fourth gets a quarter, by exactly so many moves, all to itself."""
    wish = founded(stores(3), 12, 3)
    plan = rebalanced(stores(4), wish, replication_factor=3)
    changes = moves(wish, plan)
    assert loads(plan, ["n0", "n1", "n2", "n3"]) == [9, 9, 9, 9]
    assert leads(plan, ["n0", "n1", "n2", "n3"]) == [3, 3, 3, 3]
    assert len(changes) == 9
    assert {move.target for move in changes} == {"n3"}


def test_a_new_store_alone_in_its_zone_gets_a_copy_of_everything() -> None:
    """Zones come before evenness: each partition gets a copy in the third zone."""
    two = [StoreNode("a1", "a"), StoreNode("a2", "a"), StoreNode("b1", "b"), StoreNode("b2", "b")]
    wish = founded(two, 6, 3)
    plan = rebalanced([*two, StoreNode("c1", "c")], wish, replication_factor=3)
    zone_of = {"a1": "a", "a2": "a", "b1": "b", "b2": "b", "c1": "c"}
    assert all(zone_counts(item, zone_of) == {"a": 1, "b": 1, "c": 1} for item in plan.values())
    assert len(moves(wish, plan)) == 6


def test_a_drain_that_leaves_too_few_stores_is_refused() -> None:
    """Three copies don't fit on two stores; the error says how to go on."""
    nodes = stores(3)
    wish = founded(nodes, 4, 3)
    nodes[1] = StoreNode("n1", is_draining=True)
    reason = "n1 can't be drained: 3 copies need 3 other stores, there are 2: add stores first"
    with pytest.raises(InvalidRequestError, match=reason):
        drained(nodes, wish)
    with pytest.raises(
        InvalidRequestError, match=r"4 copies need 4 stores that are .*there are 3: add stores first"
    ):
        rebalanced(stores(3), wish, replication_factor=4)


def test_a_drain_keeps_zones_apart_where_it_can() -> None:
    """What leaves a store goes to another of its zone, when the others of the partition are elsewhere."""
    nodes = stores(6, "abc")
    wish = founded(nodes, 12, 3)
    nodes[0] = StoreNode("n0", "a", is_draining=True)
    plan = drained(nodes, wish)
    assert {move.target for move in moves(wish, plan)} == {"n3"}
    assert all(move.source == "n0" for move in moves(wish, plan))


def test_the_zone_of_a_store_that_is_gone_is_remembered() -> None:
    """A drain while another store is away puts no second copy into that one's zone."""
    nodes = [StoreNode(n, z) for n, z in (("a1", "a"), ("a2", "a"), ("b1", "b"), ("c1", "c"), ("c2", "c"))]
    wish = {0: Assignment(("a1", "b1", "c1"), ("a", "b", "c"))}
    now = [node for node in nodes if node.node_id not in {"a1", "c1"}]  # a1 is not registered at all
    plan = drained([*now, StoreNode("c1", "c", is_draining=True)], wish)
    assert plan[0].nodes == ("a1", "b1", "c2")
    assert plan[0].zones == ("a", "b", "c")


def test_a_replacement_goes_to_the_successor_in_place() -> None:
    """Only the replaced store's copies move, all to the one that was named, leaderships included."""
    wish = founded(stores(4), 8, 3)
    nodes = stores(5)
    plan = replaced(nodes, wish, "n1", "n4")
    assert all(move == Move(move.partition, "n1", "n4") for move in moves(wish, plan))
    for p, item in plan.items():
        assert item.nodes == tuple("n4" if name == "n1" else name for name in wish[p].nodes)


def test_a_replacement_that_is_there_already_is_helped_by_others() -> None:
    """Where the successor has a copy, another store takes the one that leaves."""
    wish = {0: Assignment(("n0", "n1")), 1: Assignment(("n0", "n2"))}
    plan = replaced(stores(3), wish, "n0", "n1")
    assert {p: set(item.nodes) for p, item in plan.items()} == {0: {"n1", "n2"}, 1: {"n1", "n2"}}


def test_a_successor_must_be_a_store_that_may_have_copies() -> None:
    """Unknown, gone, draining, or the same store: refused, each with its reason."""
    wish = founded(stores(3), 3, 2)
    nodes = [*stores(3), StoreNode("away", is_alive=False), StoreNode("leaving", is_draining=True)]
    with pytest.raises(NotFoundError, match="no store 'other'"):
        replaced(nodes, wish, "n0", "other")
    with pytest.raises(NotFoundError, match="no store 'away'"):
        replaced(nodes, wish, "n0", "away")
    with pytest.raises(InvalidRequestError, match="being drained"):
        replaced(nodes, wish, "n0", "leaving")
    with pytest.raises(InvalidRequestError, match="itself"):
        replaced(nodes, wish, "n0", "n0")


def test_the_number_of_copies_can_be_changed() -> None:
    """A rebalance with another replication factor adds, or takes away, just what it must."""
    wish = founded(stores(4), 8, 2)
    more = rebalanced(stores(4), wish, replication_factor=3)
    added = moves(wish, more)
    assert len(added) == 8
    assert all(move.source == "" for move in added)
    less = rebalanced(stores(4), more, replication_factor=1)
    assert all(move.target == "" for move in moves(more, less))
    assert loads(less, ["n0", "n1", "n2", "n3"]) == [2, 2, 2, 2]


def test_leaderships_return_without_moving_a_copy() -> None:
    """After failures left all leaderships on one store, a rebalance only changes who is preferred."""
    wish = {p: Assignment(("n0", "n1", "n2")) for p in range(6)}
    plan = rebalanced(stores(3), wish, replication_factor=3)
    assert moves(wish, plan) == []
    assert leads(plan, ["n0", "n1", "n2"]) == [2, 2, 2]
    assert sum(plan[p].nodes[0] != "n0" for p in plan) == 4


def test_a_store_that_is_gone_is_no_preferred_leader_after_a_rebalance() -> None:
    """Its copies stay wished; its leaderships go to those that are there."""
    wish = founded(stores(3), 6, 3)
    nodes = [StoreNode("n0", is_alive=False), *stores(3)[1:]]
    plan = rebalanced(nodes, wish, replication_factor=3)
    assert moves(wish, plan) == []
    assert leads(plan, ["n0", "n1", "n2"]) == [0, 3, 3]
