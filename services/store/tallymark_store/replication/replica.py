"""One copy of a partition: who leads, what it follows, what is committed. Pure; see docs/replication.md.

What drivers and the simulator rely on. Every method that takes `now_ns` (monotonic, of this process life) returns
the effects, which are to be carried out in order before the next call. The concerns are in `follower`, `election`
and `leader`; transitions of the role:

    FOLLOWER --key created--> CANDIDATE --majority, most advanced log--> STARTING --start committed--> LEADER
        ^                         |                                         |                            |
        +-----<--- higher epoch, no majority within the lease, key or lease lost, handed over ---<-------+
    any --damage--> DAMAGED --Rebuild of a leader--> FOLLOWER, as another copy, a learner
"""

from __future__ import annotations

from collections.abc import Callable

from tallymark_protocol.errors import RemoteProtocolError
from tallymark_store.replication.effects import Effect, Role
from tallymark_store.replication.leader import Leading
from tallymark_store.replication.messages import (
    Announce,
    AnyMessage,
    Append,
    Appended,
    Fetch,
    Fetched,
    HandOver,
    Mismatch,
    Offer,
    Promised,
    Rebuild,
    Record,
)
from tallymark_store.replication.ports import DurableState, Log, Membership, ReplicaConfig


class Replica(Leading):
    """The state machine of one copy.

    Args:
        partition: its number.
        node_id: of this node.
        instance: of this process life.
        log: as it was recovered: everything in it is on disk.
        state: as it was persisted.
        config: times and sizes.
        history: all memberships, ascending: the founding one first if there is one, then those in the log.
        new_copy_id: gives random ids.
        is_damaged: recovery found damage.
        now_ns: the present.
    """

    def __init__(
        self,
        partition: int,
        *,
        node_id: str,
        instance: str,
        log: Log,
        state: DurableState,
        config: ReplicaConfig,
        history: list[Membership],
        new_copy_id: Callable[[], str],
        is_damaged: bool,
        now_ns: int,
    ) -> None:
        super().__init__(
            partition,
            node_id=node_id,
            instance=instance,
            log=log,
            state=state,
            config=config,
            history=history,
            new_copy_id=new_copy_id,
            is_damaged=is_damaged,
        )
        self._init_candidacy()
        self._init_leading()
        self._ticked_ns = now_ns

    # ------------------------------------------------------------ messages

    def step(self, sender: str, message: AnyMessage, records: list[Record], now_ns: int) -> list[Effect]:
        """Take a message from another node's replica.

        Raises:
            RemoteProtocolError: it makes no sense; nothing has changed.
        """
        if message.partition != self.partition:
            raise RemoteProtocolError(f"a message for partition {message.partition} came to {self.partition}")
        if records and not isinstance(message, Append | Fetched):
            raise RemoteProtocolError("records came with a message that has none")
        match message:
            case Append():
                self._on_append(sender, message, records, now_ns)
            case Appended():
                self._on_appended(sender, message, now_ns)
            case Mismatch():
                self._on_mismatch(sender, message, now_ns)
            case Announce():
                self._on_announce(sender, message, now_ns)
            case Promised():
                self._on_promised(sender, message, now_ns)
            case Fetch():
                self._on_fetch(sender, message, now_ns)
            case Fetched():
                self._on_fetched(sender, message, records, now_ns)
            case Rebuild():
                self._on_rebuild(message)
            case HandOver():
                self._on_hand_over(sender, message, now_ns)
            case Offer():
                self._on_offer(sender, message, now_ns)
            case _:
                raise RemoteProtocolError("a message that is not for a replica")
        return self._take_effects()

    # ------------------------------------------------------------ time

    def tick(self, now_ns: int) -> list[Effect]:
        """Time has passed. Due at `next_deadline()`; earlier and later calls do no harm."""
        self._ticked_ns = now_ns
        if self.role in (Role.STARTING, Role.LEADER):
            self._tick_leader(now_ns)
        else:
            self._tick_candidacy(now_ns)
        return self._take_effects()

    def next_deadline(self) -> int:
        """When `tick` is due."""
        pace_ns = self.config.heartbeat_ns // 2
        if self.role in (Role.FOLLOWER, Role.DAMAGED):
            return min(self._candidacy_ns, self._ticked_ns + 4 * pace_ns)
        return min(self._ticked_ns + pace_ns, self._announce_due_ns, self._fetch_due_ns)

    # ------------------------------------------------------------ the own log

    def synced(self, durable_end: int, now_ns: int) -> list[Effect]:
        """Everything of this log below `durable_end` is on disk, the truncations before it included."""
        assert durable_end <= self.log.log_end, "nothing is durable that is not in the log"
        self.durable_end = durable_end
        if self.role in (Role.STARTING, Role.LEADER):
            self._advance_commit(now_ns)
        elif self.role is Role.FOLLOWER and min(durable_end, self._verified_end) > self._acknowledged_end:
            self._acknowledge()
        return self._take_effects()

    def appended(self, now_ns: int) -> list[Effect]:
        """The driver has appended what leaders append: events, schemas, an epoch start, a membership."""
        assert self.role in (Role.STARTING, Role.LEADER), "only a leader's log grows by itself"
        if self._membership_due is not None:
            self._note_own_membership(now_ns)
        self._replicate_all(now_ns)
        return self._take_effects()

    def installed(self, offset: int, membership: Membership, now_ns: int) -> list[Effect]:
        """A snapshot of everything below `offset` has taken the place of log and state: `Install` is done.

        The log is empty and begins there. `membership` is the one in force there. Only if `lacks` still says so.
        """
        self._on_installed(offset, membership, now_ns)
        return self._take_effects()

    def memberships_below(self, offset: int) -> list[Membership]:
        """All memberships that records below `offset` brought, as far as they are known; the founding one included."""
        return [membership for membership in self._history if membership.offset < offset]

    def damaged(self, reason: str, now_ns: int) -> list[Effect]:
        """A read found damage in this copy."""
        self._fault(reason, now_ns)
        return self._take_effects()

    def resign(self, reason: str, now_ns: int) -> list[Effect]:
        """Stop leading, or trying to, for at least a lease time: this node can't do what leaders must."""
        if self.epoch:
            self._step_down(reason, now_ns, backoff_ns=self.config.lease_ns)
        return self._take_effects()

    # ------------------------------------------------------------ the coordinator

    def key_created(self, epoch: int, now_ns: int) -> list[Effect]:
        """`CreateKey` succeeded, at this revision."""
        self._on_key_created(epoch, now_ns)
        return self._take_effects()

    def key_refused(self, now_ns: int) -> list[Effect]:
        """`CreateKey` did not succeed: somebody has the key, or the coordinator is away."""
        self._on_key_refused(now_ns)
        return self._take_effects()

    def key_changed(self, holder: str, revision: int, now_ns: int) -> list[Effect]:
        """The leader key is held by this node since this revision, its epoch; or "", absent, as of this revision.

        To be called with what is there at the start, too, and after the watch had to begin anew.
        """
        self._on_key_changed(holder, revision, now_ns)
        return self._take_effects()

    def lease_lost(self, now_ns: int) -> list[Effect]:
        """The node's lease is gone, and the leader key with it."""
        if self.epoch:
            self._step_down("the node's lease was lost", now_ns)
        return self._take_effects()

    def set_founding(self, membership: Membership, now_ns: int) -> list[Effect]:
        """The partition was founded with these members (offset -1)."""
        if not self._history or self._history[0].offset >= 0:
            self._history.insert(0, membership)
            if self.role is Role.FOLLOWER:
                self._consider_candidacy(now_ns)
        return self._take_effects()

    def set_wish(self, nodes: tuple[str, ...], now_ns: int) -> list[Effect]:
        """The nodes that shall hold the partition, the preferred leader first."""
        self.wish = nodes
        if self.role in (Role.STARTING, Role.LEADER):
            self._update_followers(now_ns)
            self._replicate_all(now_ns)
        return self._take_effects()

    def hand_over(self, target: str, now_ns: int) -> list[Effect]:
        """Give the leadership to this member once it has everything; appends are refused from now on.

        Given up, and appends are taken again, if that takes longer than a lease time.
        """
        self._begin_hand_over(target, now_ns)
        return self._take_effects()
