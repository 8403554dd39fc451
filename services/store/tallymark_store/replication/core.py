"""What all concerns of a replica share: its state, its promises, and the parts of the log it talks about.

The concerns (`follower`, `election`, `leader`) are classes on top of this one, put together by `replica.Replica`.
Nothing here waits: methods change the state and add effects, which the public methods hand out.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from tallymark_protocol.errors import RemoteProtocolError
from tallymark_store.replication.effects import (
    Committed,
    DeleteKey,
    Effect,
    Fault,
    Persist,
    Role,
    Send,
    StepDown,
    Truncated,
)
from tallymark_store.replication.membership import decode_members
from tallymark_store.replication.messages import TAIL_EPOCHS_MAX, AnyMessage, Record, Tail
from tallymark_store.replication.ports import DurableState, Log, Member, Membership, ReplicaConfig
from tallymark_store.wal import DamagedError, RecordKind

NEVER = 2**63 - 1
_NO_MEMBERS = Membership(())


def parting_point(own: Tail, own_end: int, other: Tail, other_end: int, floor: int) -> int:
    """Where two logs part: they are equal below it. `floor`: up to where they are known to be equal anyway.

    Each epoch has one leader, and so one history: of the highest epoch that both logs have, both hold a beginning,
    and everything before it is the same in both (the log matching property; Ongaro, section 5.3).
    """
    ends = dict(other)
    for epoch, end in reversed(own):
        if epoch in ends:
            return max(floor, min(end, ends[epoch], own_end, other_end))
    return max(floor, 0)


def members_of(record: Record) -> tuple[Member, ...]:
    """The members that a membership record names.

    Raises:
        RemoteProtocolError: it is malformed.
    """
    return decode_members(b"".join(bytes(part) for part in record.parts))


class ReplicaCore:
    """State of one copy; see the module."""

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
    ) -> None:
        self.partition = partition
        self.node_id = node_id
        self.instance = instance
        self.log = log
        self.config = config
        self.role = Role.FOLLOWER
        self.epoch = 0  # of its own leadership or candidacy; 0 while it follows
        self.leader = ""  # node id of whom it follows; "" where it knows none
        self.why = ""  # it is in this role: for people
        # Exclusive; committed, and in this log. Never falls. high_watermark <= log_end
        # What lies before the log's start was committed when it was dropped.
        self.high_watermark = max(min(state.high_watermark, log.log_end), log.log_start)
        self.durable_end = log.log_end  # exclusive; on disk. durable_end <= log_end
        self.state = state
        self.wish: tuple[str, ...] = ()  # nodes that shall hold the partition, the preferred leader first
        self._history = list(history)  # memberships, ascending by offset; the founding one at -1
        self._new_copy_id = new_copy_id
        self._effects: list[Effect] = []
        # Of the coordinator's leader key, as last heard: holder "" = absent, None = not heard yet.
        self._key_holder: str | None = None
        self._key_epoch = 0
        self._creating_key = False  # a CreateKey is under way
        self._candidacy_ns = NEVER  # when to try for the key
        self._invited_until_ns = 0  # a leader hands over to this copy: no waiting until then
        self._not_before_ns = 0  # no candidacy before this: backed off
        # Follower: the log below `_verified_end` is that of the leader of `_verified_epoch`.
        self._verified_epoch = 0
        self._verified_end = 0
        self._acknowledged_end = -1  # what the leader was told last
        self._leader_end = 0  # the highest end of a leader's log heard of: for the own lag
        if log.log_end and (last := log.epoch_before(log.log_end)) > state.promised:
            # Records of an epoch got to the disk before the promise to it did.
            self.state = msgspec.structs.replace(state, promised=last, instance="")
        if is_damaged or state.is_damaged or log.log_end < state.high_watermark:
            self.role = Role.DAMAGED
            self.why = (
                "the log is damaged"
                if is_damaged or state.is_damaged
                else f"the log ends at {log.log_end}, below the high watermark {state.high_watermark} recorded before"
            )

    # ------------------------------------------------------------ what everyone may look at

    @property
    def copy_id(self) -> str:
        """Under which this copy takes part."""
        return self.state.copy_id

    @property
    def promised(self) -> int:
        """The highest epoch promised."""
        return self.state.promised

    @property
    def membership(self) -> Membership:
        """Who makes the quorum, by this copy's log; nobody before the founding is known."""
        return self._history[-1] if self._history else _NO_MEMBERS

    @property
    def is_member(self) -> bool:
        """Whether this copy counts, by its own log."""
        return self.membership.has(self.node_id, self.copy_id)

    @property
    def is_contending(self) -> bool:
        """Whether it leads, or tries to: a leader key is its own, or may be in a moment."""
        return bool(self.epoch) or self._creating_key

    # ------------------------------------------------------------ effects

    def _emit(self, effect: Effect) -> None:
        self._effects.append(effect)

    def _send(self, to: str, message: AnyMessage, records: list[Record] | None = None) -> None:
        self._effects.append(Send(to, message, records if records is not None else []))

    def _take_effects(self) -> list[Effect]:
        effects, self._effects = self._effects, []
        return effects

    # ------------------------------------------------------------ promises

    def _may_promise(self, epoch: int, instance: str) -> bool:
        """An equal epoch from another instance is refused: a restarted node never resumes one."""
        state = self.state
        return epoch > state.promised or (epoch == state.promised and instance == state.instance)

    def _promise(self, epoch: int, instance: str, now_ns: int) -> None:
        """Obey this epoch from now on, and no lower one. Persisted before anything that is sent later."""
        if (epoch, instance) == (self.state.promised, self.state.instance):
            return
        if self.epoch and self.epoch < epoch:
            self._step_down(f"epoch {epoch} has begun", now_ns)
        self.state = msgspec.structs.replace(
            self.state,
            promised=epoch,
            instance=instance,
            # Of what is on disk: a log that lacks it after a restart is then known to be damaged.
            high_watermark=max(self.state.high_watermark, min(self.high_watermark, self.durable_end)),
        )
        self._emit(Persist(self.state))

    def _step_down(self, reason: str, now_ns: int, *, backoff_ns: int = 0) -> None:
        """Stop leading, or trying to. The key goes, too: harmless where it is another's by now."""
        epoch, was = self.epoch, self.role
        self.role = Role.FOLLOWER
        self.why = reason
        self.epoch = 0
        self.leader = ""
        self._verified_epoch = self._verified_end = 0
        self._not_before_ns = now_ns + backoff_ns
        self._candidacy_ns = NEVER
        self._forget_leadership()
        if was in (Role.STARTING, Role.LEADER):
            self._emit(StepDown(epoch, reason))
        if epoch:
            self._emit(DeleteKey(epoch))

    def _forget_leadership(self) -> None:
        """What only a candidate or leader knows; the concerns add to it."""

    def _fault(self, reason: str, now_ns: int) -> None:
        """This copy cannot be trusted: it counts for nothing from here on."""
        if self.role is Role.DAMAGED:
            return
        if self.epoch:
            self._step_down(reason, now_ns)
        self.role = Role.DAMAGED
        self.why = reason
        self._candidacy_ns = NEVER
        self._emit(Fault(reason))

    # ------------------------------------------------------------ the log

    def _tail(self) -> Tail:
        return self.log.tail(self.log.log_end, TAIL_EPOCHS_MAX)

    def _commit(self, end: int) -> None:
        if end > self.high_watermark:
            self.high_watermark = end
            self._emit(Committed(end))

    def _read(self, start: int, bytes_max: int, now_ns: int) -> list[Record]:
        """Records of the own log from `start` on; none (and a fault) where it is damaged."""
        try:
            return self.log.read(start, bytes_max)
        except DamagedError as error:
            self._fault(error.message, now_ns)
            return []

    def _append(self, records: list[Record]) -> None:
        """Write records and note what memberships they bring. Raises BackpressureError."""
        try:
            self.log.append(records)
        finally:
            self._note_memberships(records)  # of those that were written

    def _note_memberships(self, records: list[Record]) -> None:
        for record in records:
            if record.meta.kind == RecordKind.MEMBERSHIP and record.end <= self.log.log_end:
                self._history.append(Membership(members_of(record), record.meta.base_offset))

    def _truncate(self, new_end: int, now_ns: int) -> bool:
        """Cut the log; False (and a fault) where that would take what is committed. Raises BackpressureError."""
        if new_end < self.high_watermark:
            self._fault(
                f"the leader's log parts from this one at {new_end}, below the high watermark {self.high_watermark}",
                now_ns,
            )
            return False
        self.log.truncate(new_end)
        self.durable_end = min(self.durable_end, new_end)
        self._verified_end = min(self._verified_end, new_end)
        while self._history and self._history[-1].offset >= new_end:
            self._history.pop()
        self._emit(Truncated(new_end))
        return True

    def _check_records(self, records: list[Record], base: int, epoch: int, epoch_max: int) -> None:
        """Records from a peer follow each other from `base` on, where a record of `epoch` ends.

        Raises:
            RemoteProtocolError: they don't.
        """
        at = base
        for record in records:
            meta = record.meta
            if (
                meta.partition != self.partition
                or meta.base_offset != at
                or meta.count < 1
                or meta.epoch < epoch
            ):
                raise RemoteProtocolError(
                    f"partition {self.partition}: records that do not follow each other"
                )
            if meta.epoch > epoch_max:
                raise RemoteProtocolError(
                    f"partition {self.partition}: a record of a later epoch than its leader's"
                )
            if meta.kind == RecordKind.MEMBERSHIP:
                members_of(record)
            at, epoch = record.end, meta.epoch
