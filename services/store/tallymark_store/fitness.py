"""Whether a store can lead as well as others: by its clock, and by the room in its log.

Owns what is done about it, not the rules (`peer_states`): leaderships that this node can't exercise are given up, and
leaders are told of members that couldn't either.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from tallymark_runtime.clock import Clock
from tallymark_store.links import Standing
from tallymark_store.peer_states import PeerStates, differs, outvoted_by_ns, unfit_to_begin_by_ns
from tallymark_store.replication.effects import Effect, Role
from tallymark_store.replication.replica import Replica
from tallymark_store.wal import Wal

_log = logging.getLogger(__name__)

_NEVER = 2**63 - 1


class Fitness:
    """What this store and others are fit for. Part of `replicating.Replicating`.

    Args:
        wal: the store's log.
        clock: of the store.
        replicas: by partition; looked at again each time.
        node_id: of this store.
        lease_ns: for so long room may be lacking, or the disk hang.
        call: calls a replica's method: `Replicating.call`.
    """

    def __init__(
        self,
        wal: Wal,
        clock: Clock,
        replicas: dict[int, Replica],
        *,
        node_id: str,
        lease_ns: int,
        call: Callable[..., None],
    ) -> None:
        self._wal = wal
        self._clock = clock
        self._replicas = replicas
        self._node_id = node_id
        self._lease_ns = lease_ns
        self._call: Callable[[int, Callable[..., list[Effect]], Any], None] = call
        self._peers = PeerStates()
        self._synced_end = wal.synced_end
        self._synced_ns = clock.monotonic_ns()  # when the log was idle last, or that rose
        self._lacks_room = False  # the log takes no more, or won't for long
        self._lacks_since_ns = _NEVER
        self._some_differ = False  # some peer's clock is far away, or somebody lacks room

    def standing(self) -> Standing:
        """What others are to know of this store now."""
        return Standing(self._clock.now_ns(), self._lacks_room)

    def heard(self, sender: str, standing: Standing) -> None:
        """A bundle of another store came."""
        self._peers.heard(
            sender, wall_ns=standing.wall_ns, is_full=standing.is_full, now_ns=self._clock.monotonic_ns()
        )

    def _differences(self, replica: Replica, wall_ns: int, now_ns: int) -> list[int]:
        """How far the other members' clocks are ahead of this node's, as far as that is known."""
        members = [member.node_id for member in replica.membership.members if member.node_id != self._node_id]
        return list(self._peers.differences(members, wall_ns, now_ns).values())

    def clock_differences(self) -> dict[str, int]:
        """How far other stores' clocks are ahead of this node's, of those that were heard of lately."""
        return self._peers.all_differences(self._clock.now_ns(), self._clock.monotonic_ns())

    def clock_fault(self, number: int, wall_ns: int | None = None) -> str:
        """Why this node's clock, now or at `wall_ns`, must not stamp a partition's records; "" where it may."""
        now_ns = self._clock.monotonic_ns()
        wall_ns = self._clock.now_ns() if wall_ns is None else wall_ns
        if self._peers.none_differs(wall_ns, now_ns):
            return ""
        replica = self._replicas.get(number)
        if replica is None or len(replica.membership.members) == 1:
            return ""
        by_ns = outvoted_by_ns(self._differences(replica, wall_ns, now_ns), len(replica.membership.members))
        return _clock_words(by_ns, "a majority of members")

    def may_begin(self, number: int, *, must_decide: bool) -> bool:
        """Whether this node's clock may stamp the record that begins an epoch; False where that isn't known yet.

        It is more than a leader must be: nothing is stamped yet, and a node that has just started may be wrong by
        any time. As long as some members' clocks differ and others weren't heard of, these are waited for; unless
        it `must_decide`. Where the clock may not, the replica resigns.
        """
        replica = self._replicas[number]
        members = len(replica.membership.members)
        differences = self._differences(replica, self._clock.now_ns(), self._clock.monotonic_ns())
        if not differs(differences):
            return True
        by_ns = outvoted_by_ns(differences, members)
        if not by_ns and len(differences) + 1 < members and not must_decide:
            return False
        by_ns = by_ns or unfit_to_begin_by_ns(differences)
        if by_ns:
            self._call(number, replica.resign, _clock_words(by_ns, "the members that were heard of"))
            return False
        return True

    def others_have_room(self, number: int) -> bool:
        """Whether some other member of a partition has room in its log, by what it last said."""
        now_ns = self._clock.monotonic_ns()
        members = self._replicas[number].membership.members
        return any(
            member.node_id != self._node_id and self._peers.has_room(member.node_id, now_ns)
            for member in members
        )

    def consider(self, now_ns: int) -> None:
        """Give up leaderships that this node can't exercise, and note who else couldn't."""
        self._consider_room(now_ns)
        some_differ = self._lacks_room or not self._peers.all_are_alike(self._clock.now_ns(), now_ns)
        if not some_differ and not self._some_differ:
            return
        self._some_differ = some_differ
        for number, replica in sorted(self._replicas.items()):
            if replica.role not in (Role.STARTING, Role.LEADER):
                continue
            fault = self.clock_fault(number)
            if fault:
                self._call(number, replica.resign, fault)
            elif replica.role is Role.LEADER:
                replica.unfit = self._unfit_members(replica, now_ns)
                if now_ns - self._lacks_since_ns >= self._lease_ns:
                    self._hand_over_for_room(number, replica, now_ns)

    def _consider_room(self, now_ns: int) -> None:
        """Is there no room in the log, or does its disk hang? Then its buffer fills up."""
        end = self._wal.synced_end
        if self._wal.idle or end != self._synced_end:
            self._synced_end, self._synced_ns = end, now_ns
        self._lacks_room = self._wal.full or now_ns - self._synced_ns >= self._lease_ns
        self._lacks_since_ns = min(self._lacks_since_ns, now_ns) if self._lacks_room else _NEVER

    def _unfit_members(self, replica: Replica, now_ns: int) -> frozenset[str]:
        """Members that would give the leadership up again: their log is full, or their clock is far away."""
        nodes = [member.node_id for member in replica.membership.members]
        found = self._peers.differences(nodes, self._clock.now_ns(), now_ns)
        if self._node_id in nodes:
            found[self._node_id] = 0
        unfit = {node for node in nodes if self._peers.is_full(node, now_ns)}
        for node, own_ns in found.items():
            others = [other_ns - own_ns for other, other_ns in found.items() if other != node]
            if outvoted_by_ns(others, len(nodes)) or unfit_to_begin_by_ns(others):
                unfit.add(node)
        return frozenset(unfit)

    def _hand_over_for_room(self, number: int, replica: Replica, now_ns: int) -> None:
        """The log has had no room for a lease time: others may go on, if they have everything, and room."""
        if not replica.accepts_appends:
            return  # it is being handed over
        best, best_end = "", -1
        for node, progress in replica.followers.items():
            if (
                replica.membership.has(node, progress.copy_id)
                and not progress.is_damaged
                and not progress.is_probing
                and progress.next_offset >= replica.log.log_end
                and node not in replica.unfit
                and self._peers.has_room(node, now_ns)
                and progress.match_end > best_end
            ):
                best, best_end = node, progress.match_end
        if best:
            _log.warning("partition %d: there is no room in the log: %s is to lead", number, best)
            self._call(number, replica.hand_over, best)


def _clock_words(by_ns: int, whose: str) -> str:
    if not by_ns:
        return ""
    side = "behind" if by_ns > 0 else "ahead of"
    return f"this node's clock is {abs(by_ns) / 1e9:.1f} s {side} the clocks of {whose}: set it right"
