"""One copy of a partition: who leads, what it follows, what is committed. Pure; see docs/replication.md.

The public surface, which drivers and the simulator rely on. Every method that takes `now_ns` (monotonic) returns
the effects to be carried out, in order, before the next call.
"""

from __future__ import annotations

from tallymark_store.replication.effects import Effect
from tallymark_store.replication.messages import AnyMessage, Record
from tallymark_store.replication.ports import DurableState, Log, Membership, ReplicaConfig


class Replica:
    """The state machine of one copy.

    Attributes:
        role: what it is doing.
        epoch: of its own leadership or candidacy; 0 while it follows.
        leader: node id of whom it follows, "" if it knows none.
        high_watermark: everything below is committed and in this log; never falls.
        membership: who makes the quorum, by this copy's log.
    """

    def __init__(
        self,
        partition: int,
        *,
        node_id: str,
        instance: str,  # of this process life
        log: Log,
        state: DurableState,
        config: ReplicaConfig,
        membership: Membership | None,  # by the log, or the founding one; None: not founded, or not a member of it
        history: list[Membership],  # all memberships in the log, ascending by offset, the founding one first
        is_damaged: bool,
        now_ns: int,
    ) -> None: ...

    # What the driver tells it.

    def step(self, sender: str, message: AnyMessage, records: list[Record], now_ns: int) -> list[Effect]:
        """A message from another node's replica."""
        raise NotImplementedError

    def tick(self, now_ns: int) -> list[Effect]:
        """Time has passed; due at `next_deadline()` at the latest."""
        raise NotImplementedError

    def next_deadline(self) -> int:
        """When `tick` is due."""
        raise NotImplementedError

    def synced(self, durable_end: int, now_ns: int) -> list[Effect]:
        """Everything of this log below `durable_end` is on disk, truncations before it included."""
        raise NotImplementedError

    def appended(self, now_ns: int) -> list[Effect]:
        """The leader's driver has appended records to the log: replicate them."""
        raise NotImplementedError

    def key_created(self, epoch: int, now_ns: int) -> list[Effect]:
        """The leader key is ours."""
        raise NotImplementedError

    def key_refused(self, now_ns: int) -> list[Effect]:
        """The key could not be created: somebody has it, or the coordinator is away."""
        raise NotImplementedError

    def key_changed(self, holder: str, epoch: int, now_ns: int) -> list[Effect]:
        """The coordinator's leader key is held by this node ("" = absent), created at this revision."""
        raise NotImplementedError

    def lease_lost(self, now_ns: int) -> list[Effect]:
        """The node's lease is gone, and its keys with it."""
        raise NotImplementedError

    def set_founding(self, membership: Membership, now_ns: int) -> list[Effect]:
        """The partition was founded with these members."""
        raise NotImplementedError

    def set_wish(self, nodes: tuple[str, ...], now_ns: int) -> list[Effect]:
        """The nodes that shall hold the partition, the preferred leader first."""
        raise NotImplementedError

    def hand_over(self, target: str, now_ns: int) -> list[Effect]:
        """Give the leadership to this member as soon as it has everything; appends are refused from now on."""
        raise NotImplementedError

    def damaged(self, reason: str, now_ns: int) -> list[Effect]:
        """A read found damage in this copy."""
        raise NotImplementedError
