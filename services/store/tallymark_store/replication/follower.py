"""Following: appends of a leader, promises to candidates, and the answers to both."""

from __future__ import annotations

import msgspec

from tallymark_protocol.errors import BackpressureError
from tallymark_store.replication.core import ReplicaCore, parting_point
from tallymark_store.replication.effects import Discarded, Install, Persist, Role
from tallymark_store.replication.messages import (
    Announce,
    Append,
    Appended,
    Fetch,
    Fetched,
    Mismatch,
    Offer,
    Promised,
    Rebuild,
    Record,
)
from tallymark_store.replication.ports import Membership


class Following(ReplicaCore):
    """What a copy does for others' leadership."""

    def _on_announce(self, sender: str, message: Announce, now_ns: int) -> None:
        granted = self.role is not Role.DAMAGED and self._may_promise(message.epoch, message.instance)
        if granted:
            if self.role is not Role.FOLLOWER and self.epoch == message.epoch:
                return  # an epoch is one node's: this is no message of ours
            self._promise(message.epoch, message.instance, now_ns)
            # Whom it followed is deposed; records of its epoch are refused from here on.
            self.leader = sender
        self._send_promised(sender, message.epoch, granted=granted)

    def _send_promised(self, to: str, epoch: int, *, granted: bool) -> None:
        self._send(
            to,
            Promised(
                self.partition,
                epoch,
                granted,
                self.promised,
                self.copy_id,
                self.log.log_end,
                self.high_watermark,
                self._tail(),
                self.role is Role.DAMAGED,
                self.log.log_start,
            ),
        )

    def _on_fetch(self, sender: str, message: Fetch, now_ns: int) -> None:
        """A candidate that this copy has promised its epoch to lacks a part of this log."""
        if self.role is Role.DAMAGED or message.epoch != self.promised or sender != self.leader:
            return
        base = parting_point(
            self._tail(), self.log.log_end, message.tail, message.log_end, message.high_watermark
        )
        if base < self.log.log_start:
            self._send_promised(
                sender, message.epoch, granted=True
            )  # it does not know yet that this was dropped
            return
        if base > self.log.log_end or self.log.epoch_before(base) < 0:
            return  # it knows more than this log, so it lacks nothing
        records = self._read(base, self.config.message_bytes, now_ns)
        self._send(
            sender,
            Fetched(self.partition, message.epoch, base, self.log.log_end, len(records)),
            records,
        )

    def _on_append(self, sender: str, message: Append, records: list[Record], now_ns: int) -> None:
        if self.role is Role.DAMAGED or not self._may_promise(message.epoch, message.instance):
            self._refuse(sender, message, is_obeyed=False)
            return
        if self.epoch == message.epoch:
            return  # an epoch is one node's: this is no message of ours
        self._check_records(records, message.base, message.prev_epoch, message.epoch)
        self._promise(message.epoch, message.instance, now_ns)
        self.leader = sender
        end = records[-1].end if records else message.base
        self._leader_end = max(end, message.high_watermark)
        if message.base > self.log.log_end or self.log.epoch_before(message.base) != message.prev_epoch:
            self._refuse(sender, message, is_obeyed=True)
            return
        if self._verified_epoch != message.epoch:
            self._verified_epoch = message.epoch
            self._verified_end = 0
            self._acknowledged_end = -1
        self._verified_end = max(self._verified_end, message.base)
        if records and not self._take(records, message.base, now_ns):
            return
        self._commit(min(message.high_watermark, self._verified_end))
        if self.durable_end >= self._verified_end or not records:
            self._acknowledge()

    def _take(self, records: list[Record], base: int, now_ns: int) -> bool:
        """Bring the log into line with records that follow `base`, up to which it is; False where it can't be."""
        log = self.log
        at = base
        fresh = 0  # the first record that isn't in this log
        for record in records:
            # One leader wrote an epoch: a record of it that ends where this one does is this one.
            if record.end > log.log_end or log.epoch_before(record.end) != record.meta.epoch:
                break
            at = record.end
            fresh += 1
        self._verified_end = max(self._verified_end, at)
        if fresh == len(records):
            return True
        try:
            if at < log.log_end and not self._truncate(at, now_ns):
                return False
            self._append(records[fresh:])
        except BackpressureError:
            # No room now. What it did take counts, the leader sends the rest again later.
            if log.log_end >= at and self._is_written(records, log.log_end):
                self._verified_end = max(self._verified_end, log.log_end)
            return True
        self._verified_end = max(self._verified_end, records[-1].end)
        return True

    def _is_written(self, records: list[Record], end: int) -> bool:
        """Whether the log's end is that of one of these records, and of its epoch."""
        return any(
            record.end == end and self.log.epoch_before(end) == record.meta.epoch for record in records
        )

    def _acknowledge(self) -> None:
        if self.leader and self._verified_epoch == self.promised:
            match_end = min(self.durable_end, self._verified_end)
            self._acknowledged_end = match_end
            self._send(
                self.leader,
                Appended(self.partition, self.promised, self.copy_id, match_end, self.high_watermark),
            )

    def _refuse(self, sender: str, message: Append, *, is_obeyed: bool) -> None:
        self._send(
            sender,
            Mismatch(
                self.partition,
                message.epoch,
                message.base,
                self.promised,
                self.copy_id,
                self.log.log_end,
                self.high_watermark,
                self._tail(),
                is_obeyed,
                self.role is Role.DAMAGED,
            ),
        )

    # ------------------------------------------------------------ snapshots

    def lacks(self, offset: int, epoch: int) -> bool:
        """Whether a checkpoint of what lies below `offset`, where a record of `epoch` ends, is of use to this copy.

        One leader wrote an epoch: with that record in it, the log is the same up to there. Without it, everything
        here that was ever committed lies below `offset`, and what lies above was overwritten by later leaders.
        """
        return (
            self.role is Role.FOLLOWER
            and offset > self.high_watermark
            and self.log.epoch_before(offset) != epoch
        )

    def _on_offer(self, sender: str, message: Offer, now_ns: int) -> None:
        if self.role is Role.DAMAGED or not self._may_promise(message.epoch, message.instance):
            return  # its appends are answered
        if self.epoch == message.epoch:
            return  # an epoch is one node's: this is no message of ours
        self._promise(message.epoch, message.instance, now_ns)
        self.leader = sender
        self._leader_end = max(self._leader_end, message.offset)
        if self.lacks(message.offset, message.last_epoch):
            self._emit(Install(sender, message))
        elif self.role is Role.FOLLOWER and message.offset > self.high_watermark:
            # All of it is here, and committed, which is what the leader could not tell.
            self._commit(message.offset)

    def _on_installed(self, offset: int, membership: Membership, now_ns: int) -> None:
        assert self.role is Role.FOLLOWER, "only who follows is brought up"
        assert self.log.log_start == self.log.log_end == offset, "the log begins at the snapshot"
        assert offset > self.high_watermark, "a high watermark never falls"
        # The emptied log is on disk once that is synced; up to then it is the log before, of which this much counts.
        self.durable_end = min(self.durable_end, self.high_watermark)
        self.high_watermark = offset
        self._verified_epoch = self._verified_end = 0
        self._acknowledged_end = -1
        founding = self._history[:1] if self._history and self._history[0].offset < 0 else []
        self._history = [membership] if membership.offset < 0 else [*founding, membership]
        self.why = f"began with a snapshot of offset {offset}"
        self._consider_candidacy(now_ns)

    def _consider_candidacy(self, now_ns: int) -> None:
        """The concern of candidates."""
        raise NotImplementedError

    def _on_rebuild(self, message: Rebuild) -> None:
        """A leader with a majority has taken this copy for lost: begin anew, as another copy."""
        if self.role is not Role.DAMAGED or message.copy_id != self.copy_id or message.epoch < self.promised:
            return
        # The promises stay: the node gave them, whatever copy it holds.
        self.state = msgspec.structs.replace(
            self.state, copy_id=self._new_copy_id(), high_watermark=0, is_damaged=False
        )
        self._emit(Persist(self.state))
        self._emit(Discarded(self.state.copy_id))
        self.role = Role.FOLLOWER
        self.why = "the damaged copy was discarded"
        self.high_watermark = self.durable_end = 0
        self._verified_epoch = self._verified_end = 0
        self._history = self._history[:1] if self._history and self._history[0].offset < 0 else []
