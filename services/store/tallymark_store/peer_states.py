"""What a store knows of other stores besides their logs: how far their clocks are from its own, and who has no room.

Owns the rule of log time (design, section 4). Appends are stamped with the leader's wall time, and what was stamped
once is never taken back: windows of ids and producers go by it, and periods are sealed by it. So a leader whose clock
is more than `CLOCK_DIFFERENCE_MAX_NS` from those of a majority stamps nothing, and lets others lead.

A peer's clock is kept as its distance from this node's monotonic time, so a step of the own wall clock shows at
once. What a bundle says is late by its way: of what was heard within a second the largest is believed, as it was the
quickest. Pure: time is an argument.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

CLOCK_DIFFERENCE_MAX_NS: Final = 10_000_000_000
HEARD_NS: Final = 5_000_000_000  # what was last heard longer ago says nothing
_BEST_NS: Final = 1_000_000_000  # a distance gives way to a smaller one when it is as old as this
_ANY_NS: Final = 2**63
_PEERS_MAX: Final = 1_024


class _Peer:
    __slots__ = ("distance_ns", "distance_since_ns", "heard_ns", "is_full")

    def __init__(self) -> None:
        self.distance_ns = 0  # its wall time less this node's monotonic time
        self.distance_since_ns = -1  # when that was heard; -1 = never
        self.heard_ns = 0
        self.is_full = False


class PeerStates:
    """What was heard of each peer lately, by node id."""

    def __init__(self) -> None:
        self._peers: dict[str, _Peer] = {}
        # Own distances (as `_Peer.distance_ns`) for which no clock that is kept is far away.
        self._low_ns = -_ANY_NS
        self._high_ns = _ANY_NS

    def heard(self, node_id: str, *, wall_ns: int, is_full: bool, now_ns: int) -> None:
        """A bundle came: its sender's wall time when it was made (0 = it didn't say), and whether it has room."""
        peer = self._peers.get(node_id)
        if peer is None:
            if len(self._peers) >= _PEERS_MAX:
                self._peers = {
                    node: other for node, other in self._peers.items() if now_ns - other.heard_ns <= HEARD_NS
                }
                if len(self._peers) >= _PEERS_MAX:
                    return
            peer = self._peers[node_id] = _Peer()
        peer.heard_ns = now_ns
        peer.is_full = is_full
        distance_ns = wall_ns - now_ns
        if wall_ns and (
            peer.distance_since_ns < 0
            or distance_ns >= peer.distance_ns
            or now_ns - peer.distance_since_ns > _BEST_NS
        ):
            peer.distance_ns = distance_ns
            peer.distance_since_ns = now_ns
            known = [other.distance_ns for other in self._peers.values() if other.distance_since_ns >= 0]
            self._low_ns = max(known) - CLOCK_DIFFERENCE_MAX_NS
            self._high_ns = min(known) + CLOCK_DIFFERENCE_MAX_NS

    def none_differs(self, wall_ns: int, now_ns: int) -> bool:
        """Whether no clock, of whoever was ever heard of, is far from this node's: the usual case, found quickly."""
        return self._low_ns <= wall_ns - now_ns <= self._high_ns

    def difference_ns(self, node_id: str, wall_ns: int, now_ns: int) -> int | None:
        """How far a peer's clock is ahead of this node's; None if it wasn't heard of lately.

        Args:
            node_id: the peer.
            wall_ns: this node's wall time now.
            now_ns: its monotonic time.
        """
        peer = self._peers.get(node_id)
        if peer is None or peer.distance_since_ns < 0 or now_ns - peer.distance_since_ns > HEARD_NS:
            return None
        return peer.distance_ns + now_ns - wall_ns

    def differences(self, node_ids: Iterable[str], wall_ns: int, now_ns: int) -> dict[str, int]:
        """How far the clocks of those who were heard of lately are ahead of this node's."""
        found = {}
        for node_id in node_ids:
            difference_ns = self.difference_ns(node_id, wall_ns, now_ns)
            if difference_ns is not None:
                found[node_id] = difference_ns
        return found

    def all_differences(self, wall_ns: int, now_ns: int) -> dict[str, int]:
        """The same, of everyone, by node id in order."""
        return self.differences(sorted(self._peers), wall_ns, now_ns)

    def has_room(self, node_id: str, now_ns: int) -> bool:
        """Whether a peer was heard of lately, and said that its log has room."""
        peer = self._peers.get(node_id)
        return peer is not None and now_ns - peer.heard_ns <= HEARD_NS and not peer.is_full

    def is_full(self, node_id: str, now_ns: int) -> bool:
        """Whether a peer was heard of lately, and said that its log has no room."""
        peer = self._peers.get(node_id)
        return peer is not None and now_ns - peer.heard_ns <= HEARD_NS and peer.is_full

    def all_are_alike(self, wall_ns: int, now_ns: int) -> bool:
        """Whether nobody who was heard of lately is full, or has a clock far from this node's: the usual case."""
        for node_id, peer in self._peers.items():
            difference_ns = self.difference_ns(node_id, wall_ns, now_ns)
            if difference_ns is not None and abs(difference_ns) > CLOCK_DIFFERENCE_MAX_NS:
                return False
            if peer.is_full and now_ns - peer.heard_ns <= HEARD_NS:
                return False
        return True


def outvoted_by_ns(differences: Iterable[int], member_count: int) -> int:
    """By how much a majority of all members has clocks ahead of the own one (below 0: behind it); 0 if none has.

    Args:
        differences: of the other members' clocks, as far as they are known, to the own one.
        member_count: how many members there are, this node among them.
    """
    ahead, behind = _far(differences)
    quorum = member_count // 2 + 1
    if len(ahead) >= quorum:
        return min(ahead)
    if len(behind) >= quorum:
        return max(behind)
    return 0


def unfit_to_begin_by_ns(differences: Iterable[int]) -> int:
    """As `outvoted_by_ns`, for a leadership that is about to begin: by the members that are known, however few.

    Where two halves differ, the clocks that are behind are believed: log time that went too slowly is made up for,
    log time that has gone ahead can't be taken back. So there is always somebody who may begin.
    """
    known = list(differences)
    ahead, behind = _far(known)
    if 2 * len(behind) >= len(known) + 1:
        return max(behind)
    if 2 * len(ahead) > len(known) + 1:
        return min(ahead)
    return 0


def differs(differences: Iterable[int]) -> bool:
    """Whether any of the clocks is far from the own one."""
    return any(abs(difference) > CLOCK_DIFFERENCE_MAX_NS for difference in differences)


def _far(differences: Iterable[int]) -> tuple[list[int], list[int]]:
    ahead, behind = [], []
    for difference in differences:
        if difference > CLOCK_DIFFERENCE_MAX_NS:
            ahead.append(difference)
        elif difference < -CLOCK_DIFFERENCE_MAX_NS:
            behind.append(difference)
    return ahead, behind
