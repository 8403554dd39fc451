"""Even spreading with as few changes as possible: each choice takes some of its candidates, none is overloaded.

Owns the arithmetic of placement and knows nothing of partitions, nodes or the coordinator. It is a flow: from each
choice over its groups to the takers, at most one unit from a choice to a taker, within bounds for each group. The
cost of a taker's load is convex, so that the cheapest flow is the most even one there is; what a choice takes
beyond what it prefers costs a little, so that of all most even flows one with the fewest changes is found. A first
flow is made from what is preferred; then cycles of negative cost are cancelled until there is none, and a flow
without any is a cheapest one. All ties are broken by order: the same input gives the same answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

_SINK: Final = 0  # the vertex through which load moves from one taker to another


class Choice(msgspec.Struct, frozen=True):
    """Something that takes `count` of its candidates, from each group within bounds."""

    count: int
    candidates: tuple[str, ...]
    group_of: dict[str, str]  # of every candidate
    bounds: dict[str, tuple[int, int]]  # of every group: least and most taken, both inclusive
    preferred: frozenset[str] = frozenset()  # taking one of these changes nothing


class _Flow:
    """A flow while it is improved. Vertices are numbers: the sink, the takers, the choices, and their groups."""

    def __init__(self, choices: Sequence[Choice], loads: dict[str, int]) -> None:
        self.choices = choices
        self.takers = sorted(loads)
        self.number = {name: 1 + i for i, name in enumerate(self.takers)}
        self.base = loads
        self.loads = dict(loads)
        self.taken: list[set[str]] = []
        self.counts: list[dict[str, int]] = []  # by choice: how many are taken of each group
        self.groups: list[list[str]] = [sorted(choice.bounds) for choice in choices]
        # What one unit of load weighs against all changes there can be.
        self.weight = 1 + sum(choice.count for choice in choices)
        self.first_choice = 1 + len(self.takers)
        self.vertices = self.first_choice + sum(1 + len(groups) for groups in self.groups)

    def begin(self) -> None:
        """A flow that keeps the bounds, near what is preferred."""
        for i, choice in enumerate(self.choices):
            self.taken.append(set())
            self.counts.append(dict.fromkeys(self.groups[i], 0))
            counts = self.counts[i]
            for group in self.groups[i]:
                while counts[group] < choice.bounds[group][0]:
                    self._take(i, {group})
            while len(self.taken[i]) < choice.count:
                self._take(i, {group for group in counts if counts[group] < choice.bounds[group][1]})

    def _take(self, i: int, groups: set[str]) -> None:
        """Add what is preferred, or else least loaded, of some groups."""
        choice, taken = self.choices[i], self.taken[i]
        fitting = [n for n in choice.candidates if choice.group_of[n] in groups and n not in taken]
        best = min(fitting, key=lambda n: (n not in choice.preferred, self.loads[n], n))
        taken.add(best)
        self.loads[best] += 1
        self.counts[i][choice.group_of[best]] += 1

    def arcs(self) -> list[tuple[int, int, int, int, str]]:
        """What can still flow: (from, to, cost, choice or -1, taker or group or "")."""
        arcs: list[tuple[int, int, int, int, str]] = []
        for name in self.takers:
            vertex, load = self.number[name], self.loads[name]
            arcs.append((vertex, _SINK, load * self.weight, -1, name))
            if load > self.base[name]:
                arcs.append((_SINK, vertex, (1 - load) * self.weight, -1, name))
        vertex = self.first_choice
        for i, choice in enumerate(self.choices):
            own = vertex
            vertices = {}
            for group in self.groups[i]:
                vertex += 1
                vertices[group] = vertex
                least, most = choice.bounds[group]
                if self.counts[i][group] < most:
                    arcs.append((own, vertex, 0, i, group))
                if self.counts[i][group] > least:
                    arcs.append((vertex, own, 0, i, group))
            vertex += 1
            taken = self.taken[i]
            for name in choice.candidates:
                cost = 0 if name in choice.preferred else 1
                group_vertex = vertices[choice.group_of[name]]
                if name in taken:
                    arcs.append((self.number[name], group_vertex, -cost, i, name))
                else:
                    arcs.append((group_vertex, self.number[name], cost, i, name))
        return arcs

    def cancel(self) -> bool:
        """Cancel one cycle of negative cost; False if there is none. Bellman and Ford's search, from everywhere."""
        arcs = self.arcs()
        distance = [0] * self.vertices
        parent: list[tuple[int, int, int, int, str] | None] = [None] * self.vertices
        changed = True
        while changed:
            changed = False
            for arc in arcs:
                reached = distance[arc[0]] + arc[2]
                if reached < distance[arc[1]]:
                    distance[arc[1]] = reached
                    parent[arc[1]] = arc
                    changed = True
            if changed and (start := _vertex_on_cycle(parent)) >= 0:
                self._apply(start, parent)
                return True
        return False

    def _apply(self, start: int, parent: list[tuple[int, int, int, int, str] | None]) -> None:
        vertex = start
        while True:
            arc = parent[vertex]
            assert arc is not None, "every vertex of a cycle was reached from another"
            begin, end, _, choice, name = arc
            if choice < 0:
                self.loads[name] += 1 if end == _SINK else -1
            elif begin < self.first_choice:  # a taker gives back
                self.taken[choice].remove(name)
                self.counts[choice][self.choices[choice].group_of[name]] -= 1
            elif end < self.first_choice:
                self.taken[choice].add(name)
                self.counts[choice][self.choices[choice].group_of[name]] += 1
            vertex = begin
            if vertex == start:
                return


def _vertex_on_cycle(parent: Sequence[tuple[int, int, int, int, str] | None]) -> int:
    """A vertex of a cycle among the parents, the first there is; -1 if there is none."""
    seen = [0] * len(parent)  # by which walk
    for first in range(len(parent)):
        vertex = first
        while not seen[vertex]:
            seen[vertex] = first + 1
            arc = parent[vertex]
            if arc is None:
                break
            vertex = arc[0]
        else:
            if seen[vertex] == first + 1:
                return vertex
    return -1


def spread(choices: Sequence[Choice], loads: dict[str, int]) -> list[frozenset[str]]:
    """Take for every choice what leaves the takers as evenly loaded as can be, with as few changes as possible.

    Args:
        choices: what must be taken; each can be satisfied within its bounds.
        loads: of every taker, what it carries already whatever is chosen.
    """
    flow = _Flow(choices, loads)
    flow.begin()
    while flow.cancel():
        pass
    return [frozenset(taken) for taken in flow.taken]
