"""Leading: the followers' progress, what is committed, heartbeats, and changes of the members."""

from __future__ import annotations

from collections import deque

from tallymark_store.replication.core import NEVER, parting_point
from tallymark_store.replication.effects import AppendMembership, OfferSnapshot, Role, Serve
from tallymark_store.replication.election import Candidacy
from tallymark_store.replication.membership import CopyView, next_membership
from tallymark_store.replication.messages import (
    Append,
    Appended,
    HandOver,
    Mismatch,
    Promised,
    Rebuild,
    Record,
)
from tallymark_store.replication.ports import Membership
from tallymark_store.wal import RecordKind

_BURST_NS = 250_000_000  # no longer than this a learner's unused rate is saved up
_CAUGHT_UP_BYTES = 1024 * 1024  # a learner that lacks no more than this may become a member

_Read = dict[
    int, tuple[list[Record], int]
]  # by offset: the records of a message from there on, and their bytes


class Progress:
    """What the leader knows of one other copy."""

    __slots__ = (
        "allowance_bytes",
        "allowance_ns",
        "copy_id",
        "discarded",
        "equal_end",
        "heard_ns",
        "in_flight",
        "in_flight_bytes",
        "is_behind",
        "is_damaged",
        "is_probing",
        "match_end",
        "next_offset",
        "node_id",
        "offered_ns",
        "probe_base",
        "progress_ns",
        "resend_ns",
        "sent_ns",
    )

    def __init__(self, node_id: str, next_offset: int, now_ns: int) -> None:
        self.node_id = node_id
        self.copy_id = ""  # as it last said
        self.discarded: set[str] = set()  # copy ids that it had before: what they acknowledged is gone
        self.match_end = 0  # everything below is on its disk, and the leader's. Rises, but for another copy
        self.equal_end = 0  # its log is the leader's below this, if it has not crashed since; on disk or not
        self.next_offset = next_offset  # of the next record to be sent
        self.in_flight: deque[tuple[int, int]] = deque()  # (end, bytes) of messages sent and not acknowledged
        self.in_flight_bytes = 0
        # Of a learner: what may be sent to it now, and when that was reckoned last. See `Leading._may_send`.
        self.allowance_bytes = 0
        self.allowance_ns = now_ns
        self.is_probing = True  # where its log stands isn't known: one message at a time
        self.probe_base = -1  # of the last message sent while probing
        self.is_behind = False  # by what it said last, it lacks what is no longer in the leader's log
        self.is_damaged = False
        self.heard_ns = 0  # 0 = never
        self.sent_ns = 0
        self.offered_ns = 0  # when a snapshot was offered last; 0 = never
        self.progress_ns = now_ns  # when something was acknowledged, or first sent after that
        self.resend_ns = 0  # the present wait for an acknowledgement; 0 = the configured one

    def rewind(self, offset: int) -> None:
        """Send again from `offset` on."""
        self.next_offset = offset
        self.in_flight.clear()
        self.in_flight_bytes = 0


class Leading(Candidacy):
    """What a copy does as leader."""

    _followers: dict[str, Progress]
    _start_offset: int  # of this epoch's start record; nothing is committed before it is
    _membership_due: Membership | None  # asked of the driver, not appended yet
    _target: str  # node id that the leadership is handed over to, "" = none
    _target_until_ns: int
    _led_since_ns: int
    _preferred_since_ns: int  # since when the preferred leader could take over
    unfit: frozenset[str]  # nodes that would give the leadership up again, as the driver says

    def _init_leading(self) -> None:
        self._followers = {}
        self._start_offset = 0
        self._membership_due = None
        self._target = ""
        self._target_until_ns = 0
        self._led_since_ns = 0
        self._preferred_since_ns = NEVER
        self.unfit = frozenset()

    def _forget_leadership(self) -> None:
        self._init_leading()
        super()._forget_leadership()

    @property
    def accepts_appends(self) -> bool:
        """Whether clients' events may be appended."""
        return self.role is Role.LEADER and not self._target

    @property
    def followers(self) -> dict[str, Progress]:
        """By node id. Only to be read."""
        return self._followers

    # ------------------------------------------------------------ beginning

    def _lead(self, granted: list[tuple[str, Promised]], now_ns: int) -> None:
        self._led_since_ns = now_ns
        self._start_offset = self.log.log_end
        self._followers = {}
        self._update_followers(now_ns)
        own, end = self._tail(), self.log.log_end
        for node, promise in granted:
            progress = self._followers.get(node)
            if progress is not None:
                progress.copy_id = promise.copy_id
                progress.heard_ns = now_ns
                point = parting_point(own, end, promise.tail, promise.log_end, promise.high_watermark)
                progress.equal_end = progress.next_offset = min(point, end)
                progress.is_probing = False
                progress.is_behind = point < self.log.log_start

    def _update_followers(self, now_ns: int) -> None:
        """Everyone who is a member or shall be one is sent the log."""
        wanted = {member.node_id for member in self.membership.members} | set(self.wish)
        wanted.discard(self.node_id)
        for node in sorted(wanted - self._followers.keys()):
            self._followers[node] = Progress(node, self._start_offset, now_ns)
        for node in sorted(self._followers.keys() - wanted):
            del self._followers[node]

    # ------------------------------------------------------------ replicating

    def _replicate_all(self, now_ns: int) -> None:
        read: _Read = {}  # followers side by side are sent the same
        for progress in self._followers.values():
            self._replicate(progress, now_ns, read)

    def _replicate(self, progress: Progress, now_ns: int, read: _Read | None = None) -> None:
        """Send what this follower lacks, as far as its window goes."""
        if progress.is_damaged or (progress.is_probing and progress.in_flight):
            return
        if progress.next_offset < self.log.log_start:
            self._bring_in(progress, now_ns)
            return
        end = self.log.log_end
        config = self.config
        is_member = self.membership.has(progress.node_id, progress.copy_id)
        while progress.next_offset < end and progress.in_flight_bytes < config.window_bytes:
            if not is_member and not self._may_send(progress, now_ns):
                return
            found = None if read is None else read.get(progress.next_offset)
            if found is None:
                records = self._read(progress.next_offset, config.message_bytes, now_ns)
                found = (records, sum([len(part) for record in records for part in record.parts]))
                if read is not None:
                    read[progress.next_offset] = found
            records, size = found
            if not records:
                return
            base, progress.next_offset = progress.next_offset, records[-1].end
            if not progress.in_flight:
                progress.progress_ns = now_ns
            progress.in_flight.append((progress.next_offset, size))
            progress.in_flight_bytes += size
            progress.allowance_bytes -= size
            self._send_append(progress, base, records, now_ns)
            if progress.is_probing:
                return

    def _bring_in(self, progress: Progress, now_ns: int) -> None:
        """What a follower lacks is no longer in this log: offer it a snapshot, now and then, until it has begun with it.

        But for one that has not said so, as what it has acknowledged may be less than what it has: it is asked.
        """
        if not progress.is_behind:
            return
        if not progress.offered_ns or now_ns - progress.offered_ns >= self.config.resend_ns:
            progress.offered_ns = now_ns
            self._emit(OfferSnapshot(progress.node_id, self.epoch))

    def _may_send(self, progress: Progress, now_ns: int) -> bool:
        """Whether a learner may be sent more now: it is brought up at a bounded rate, in bursts of a quarter second."""
        rate = self.config.catch_up_bytes_per_s
        elapsed_ns = min(now_ns - progress.allowance_ns, _BURST_NS)
        progress.allowance_ns = now_ns
        progress.allowance_bytes = min(
            progress.allowance_bytes + rate * elapsed_ns // 1_000_000_000, rate * _BURST_NS // 1_000_000_000
        )
        # Debt is paid first: a message may be larger than what is left.
        return progress.allowance_bytes > 0 or not progress.sent_ns

    def _send_append(self, progress: Progress, base: int, records: list[Record], now_ns: int) -> None:
        progress.sent_ns = now_ns
        if progress.is_probing:
            progress.probe_base = base
        self._send(
            progress.node_id,
            Append(
                self.partition,
                self.epoch,
                self.instance,
                self.log.epoch_before(base),
                base,
                self.high_watermark,
                len(records),
            ),
            records,
        )

    def _on_appended(self, sender: str, message: Appended, now_ns: int) -> None:
        progress = self._heard(sender, message.epoch, message.copy_id, now_ns)
        if progress is None:
            return
        progress.is_damaged = False
        progress.is_probing = False
        progress.is_behind = False
        if message.match_end > progress.match_end:
            progress.match_end = min(message.match_end, self.log.log_end)
            progress.progress_ns = now_ns
            progress.resend_ns = 0
            in_flight = progress.in_flight
            while in_flight and in_flight[0][0] <= progress.match_end:
                progress.in_flight_bytes -= in_flight.popleft()[1]
            if progress.next_offset < progress.match_end:
                progress.rewind(progress.match_end)
            self._advance_commit(now_ns)
        elif progress.next_offset < self.log.log_start <= progress.match_end:
            progress.rewind(progress.match_end)  # late news had it further behind than it is
        if self.role in (Role.STARTING, Role.LEADER):
            self._replicate(progress, now_ns)
            if self._target == sender:
                self._consider_hand_over(now_ns)
            elif not self._is_settled(progress) and self._membership_is_due:
                self._consider_membership(now_ns)

    def _on_mismatch(self, sender: str, message: Mismatch, now_ns: int) -> None:
        if not message.is_obeyed and not message.is_damaged and message.epoch == self.epoch and self.epoch:
            self._step_down(f"{sender} has promised epoch {message.promised}", now_ns)
            return
        progress = self._followers.get(sender)
        if (
            message.is_damaged
            and progress is not None
            and progress.copy_id not in ("", message.copy_id)
            and now_ns - progress.heard_ns <= self.config.lease_ns
        ):
            return  # late news of a copy that was discarded since
        progress = self._heard(sender, message.epoch, message.copy_id, now_ns)
        if progress is None:
            return
        progress.is_damaged = message.is_damaged
        if message.is_damaged:
            self._consider_rebuild(progress, now_ns)
            return
        if progress.is_probing and message.base != progress.probe_base:
            return  # several messages were on their way: each of them brings one of these
        point = parting_point(
            self._tail(), self.log.log_end, message.tail, message.log_end, message.high_watermark
        )
        if progress.is_probing and point == progress.probe_base:
            return  # asked again by the timer
        progress.is_probing = True
        progress.is_behind = point < self.log.log_start
        progress.equal_end = progress.next_offset = min(point, self.log.log_end)
        self._probe(progress, now_ns)

    def _probe(self, progress: Progress, now_ns: int) -> None:
        """Send one message, with or without records, and wait for what comes back."""
        progress.rewind(progress.next_offset)
        self._replicate(progress, now_ns)
        if not progress.in_flight and progress.next_offset >= self.log.log_start:
            self._send_append(progress, progress.next_offset, [], now_ns)

    def _heard(self, sender: str, epoch: int, copy_id: str, now_ns: int) -> Progress | None:
        """Note a sign of life of a follower; None where the message is not for this leadership, or of a dead copy."""
        progress = self._followers.get(sender)
        if progress is None or epoch != self.epoch or copy_id in progress.discarded:
            return None
        progress.heard_ns = now_ns
        if progress.copy_id != copy_id:
            if progress.copy_id:
                progress.discarded.add(progress.copy_id)
                progress.match_end = progress.equal_end = 0
                progress.rewind(0)
                progress.is_probing = True
                progress.is_behind = False
            progress.copy_id = copy_id
        return progress

    # ------------------------------------------------------------ committing

    def _advance_commit(self, now_ns: int) -> None:
        """What a majority has on disk is committed, if it includes this epoch's start (Ongaro, section 5.4.2)."""
        members = self.membership.members
        if len(members) == 1 and members[0].node_id == self.node_id:
            end = self.durable_end
        else:
            ends = []
            for member in members:
                if member.node_id == self.node_id:
                    ends.append(self.durable_end if member.copy_id == self.copy_id else 0)
                    continue
                progress = self._followers.get(member.node_id)
                known = progress is not None and progress.copy_id == member.copy_id
                ends.append(progress.match_end if known and progress is not None else 0)
            ends.sort(reverse=True)
            end = ends[len(members) // 2]
        if end <= self.high_watermark or end <= self._start_offset:
            return
        self._commit(end)
        if self.role is Role.STARTING:
            self.role = Role.LEADER
            self._emit(Serve(self.epoch))
        if self._target:
            self._consider_hand_over(now_ns)

    # ------------------------------------------------------------ time

    def _tick_leader(self, now_ns: int) -> None:
        if not self._hears_majority(now_ns):
            self._step_down(
                "no majority was heard within the lease time",
                now_ns,
                backoff_ns=self.config.lease_ns // 2 * (1 + self._rank() if self.is_member else 1),
            )
            return
        self._note_own_membership(now_ns)
        for progress in list(self._followers.values()):
            self._tick_follower(progress, now_ns)
            if self.role not in (Role.STARTING, Role.LEADER):
                return  # a read found damage
        if self._target:
            self._consider_hand_over(now_ns)
        elif self._membership_is_due:
            self._consider_membership(now_ns)
            self._consider_preference(now_ns)

    def _tick_follower(self, progress: Progress, now_ns: int) -> None:
        config = self.config
        wait_ns = progress.resend_ns or config.resend_ns
        if progress.in_flight and now_ns - progress.progress_ns >= wait_ns:
            # Lost on the way, or the follower is slow: wait longer each time.
            progress.resend_ns = min(wait_ns * 2, config.lease_ns)
            progress.progress_ns = now_ns
            known = max(progress.match_end, progress.equal_end)
            progress.next_offset = progress.probe_base if progress.is_probing else known
            progress.is_probing = True
            self._probe(progress, now_ns)
            return
        is_out_of_reach = progress.next_offset < self.log.log_start
        if (is_out_of_reach or not progress.is_probing) and progress.next_offset < self.log.log_end:
            self._replicate(progress, now_ns)  # a learner whose allowance was used up; or a snapshot is due
        if now_ns - progress.sent_ns >= config.heartbeat_ns:
            if progress.is_probing or progress.is_damaged:
                base = progress.next_offset
            else:
                base = max(progress.match_end, progress.equal_end)
            self._send_append(progress, max(base, self.log.log_start), [], now_ns)

    def _hears_majority(self, now_ns: int) -> bool:
        if now_ns - self._led_since_ns <= self.config.lease_ns:
            return True
        heard = sum(self._is_alive(progress, now_ns) for progress in self._member_copies())
        if any(member.node_id == self.node_id for member in self.membership.members):
            heard += 1
        return heard >= self.membership.quorum

    def _is_alive(self, progress: Progress, now_ns: int) -> bool:
        """Whether a copy was heard of within a lease time, and is undamaged."""
        return (
            not progress.is_damaged
            and progress.heard_ns > 0
            and now_ns - progress.heard_ns <= self.config.lease_ns
        )

    def _member_copies(self) -> list[Progress]:
        """The other members' copies, as far as heard of: another copy of a member's node commits nothing."""
        found = []
        for member in self.membership.members:
            progress = self._followers.get(member.node_id)
            if progress is not None and progress.copy_id == member.copy_id:
                found.append(progress)
        return found

    # ------------------------------------------------------------ members

    @property
    def _membership_is_due(self) -> bool:
        """Whether the wish differs from the fact, and the next change may be made."""
        return (
            self.role is Role.LEADER
            and self._membership_due is None
            and self.membership.offset < self.high_watermark
        )

    def _is_settled(self, progress: Progress) -> bool:
        """Whether nothing about this follower's copy asks for another membership. What else does, the tick finds."""
        membership, wish = self.membership, self.wish
        return (
            len(membership.members) == len(wish)
            and progress.node_id in wish
            and membership.has(progress.node_id, progress.copy_id)
        )

    def _consider_membership(self, now_ns: int) -> None:
        views = {
            node: CopyView(
                progress.copy_id,
                self._is_alive(progress, now_ns),
                not progress.is_probing and self._has_caught_up(progress),
            )
            for node, progress in self._followers.items()
        }
        members = next_membership(self.membership, self.wish, self.node_id, views)
        if members is not None:
            self._membership_due = Membership(members, self.log.log_end)
            self._emit(AppendMembership(self._membership_due))
        elif self.wish and self.node_id not in self.wish:
            # Everyone else is in place: the next leader removes this copy.
            ready = [
                node
                for node in self.wish
                if node in views
                and node not in self.unfit
                and views[node].has_caught_up
                and views[node].is_alive
            ]
            if ready and all(any(m.node_id == node for m in self.membership.members) for node in self.wish):
                self._begin_hand_over(ready[0], now_ns)

    def _has_caught_up(self, progress: Progress) -> bool:
        lacking = self.log.log_end - progress.match_end
        return (
            lacking <= 0
            or progress.match_end >= self.high_watermark
            or (
                progress.match_end > 0
                and progress.in_flight_bytes <= _CAUGHT_UP_BYTES
                and progress.next_offset >= self.log.log_end
            )
        )

    def _note_own_membership(self, now_ns: int) -> None:
        """The driver has appended something: was it the membership record?"""
        due = self._membership_due
        if due is None:
            return
        self._membership_due = None
        if self.log.log_end <= due.offset:
            return
        found = self._read(due.offset, 1, now_ns)
        if found and found[0].meta.kind == RecordKind.MEMBERSHIP and found[0].meta.base_offset == due.offset:
            self._history.append(due)
            self._update_followers(now_ns)

    def _consider_rebuild(self, progress: Progress, now_ns: int) -> None:
        """Let a damaged copy begin anew, if a majority of members is there, with all that is committed, without it.

        Before that, its bytes may be the only other ones of what was acknowledged: better damaged than gone.
        """
        if self.role is not Role.LEADER:
            return
        there = 1 if self.is_member else 0
        for other in self._member_copies():
            if (
                other is not progress
                and other.match_end >= self.high_watermark
                and self._is_alive(other, now_ns)
            ):
                there += 1
        if there >= self.membership.quorum:
            self._send(progress.node_id, Rebuild(self.partition, self.epoch, progress.copy_id))

    # ------------------------------------------------------------ handing over

    def _begin_hand_over(self, target: str, now_ns: int) -> None:
        progress = self._followers.get(target)
        if self.role is not Role.LEADER or self._target or progress is None:
            return
        if not self.membership.has(target, progress.copy_id):
            return
        self._target = target
        self._target_until_ns = now_ns + self.config.lease_ns
        self._consider_hand_over(now_ns)

    def _consider_preference(self, now_ns: int) -> None:
        """Hand over to the preferred leader once it has been there, with everything, for a while."""
        preferred = self._followers.get(self.wish[0]) if self.wish else None
        if (
            self._target
            or self._membership_due is not None
            or preferred is None
            or preferred.node_id in self.unfit
            or not self.membership.has(preferred.node_id, preferred.copy_id)
            or now_ns - preferred.heard_ns > self.config.lease_ns
            or not self._has_caught_up(preferred)
        ):
            self._preferred_since_ns = NEVER
            return
        self._preferred_since_ns = min(self._preferred_since_ns, now_ns)
        if now_ns - self._preferred_since_ns >= self.config.preference_ns:
            self._begin_hand_over(preferred.node_id, now_ns)

    def _consider_hand_over(self, now_ns: int) -> None:
        """Let go as soon as the target has everything and everything is committed; give up after a lease time."""
        progress = self._followers.get(self._target)
        if progress is None or now_ns > self._target_until_ns:
            self._target = ""
            return
        end = self.log.log_end
        if progress.match_end < end or self.high_watermark < end:
            return
        epoch, target = self.epoch, self._target
        self._send(target, HandOver(self.partition, epoch))
        self._step_down(f"handed over to {target}", now_ns, backoff_ns=self.config.lease_ns)
