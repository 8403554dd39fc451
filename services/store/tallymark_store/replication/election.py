"""Candidacy: when to try for the leader key, and how a candidate with a majority becomes a leader.

Sections 4.1 to 4.3 of the design: the key gives the epoch, the promises exclude every lower one, and the most
advanced log of a majority holds everything that was ever committed.
"""

from __future__ import annotations

from tallymark_store.replication.core import NEVER, parting_point
from tallymark_store.replication.effects import BeginEpoch, CreateKey, DeleteKey, Role
from tallymark_store.replication.follower import Following
from tallymark_store.replication.messages import Announce, Fetch, Fetched, HandOver, Promised, Record

_RETRY_KEY_NS = 50_000_000  # after a refused creation, before the next


class Candidacy(Following):
    """What a copy does to become leader."""

    _promises: dict[str, Promised]
    _candidate_since_ns: int
    _announce_due_ns: int
    _fetching: str  # node id that the candidate fetches from; "" = from nobody
    _fetch_due_ns: int  # when the request is repeated
    _resumed_key_ns: int  # when to ask again for the deletion of a key that we hold but don't lead by

    def _init_candidacy(self) -> None:
        self._promises = {}
        self._candidate_since_ns = 0
        self._announce_due_ns = NEVER
        self._fetching = ""
        self._fetch_due_ns = NEVER
        self._resumed_key_ns = 0

    def _forget_leadership(self) -> None:
        self._promises = {}
        self._announce_due_ns = self._fetch_due_ns = NEVER
        self._fetching = ""
        super()._forget_leadership()

    # ------------------------------------------------------------ the key

    def _consider_candidacy(self, now_ns: int) -> None:
        """Set, or clear, the time at which this copy tries for the key."""
        can_try = (
            self._key_holder == ""
            and self.role is Role.FOLLOWER
            and self.is_member
            and not self._creating_key
        )
        if not can_try:
            self._candidacy_ns = NEVER
            return
        if self._candidacy_ns == NEVER:
            if now_ns < self._invited_until_ns:
                wait_ns = 0
            else:
                wait_ns = self._rank() * self.config.candidacy_step_ns
                if self.log.log_end < self._leader_end:
                    wait_ns += self.config.candidacy_step_ns  # others are likely to be further
            self._candidacy_ns = max(now_ns + wait_ns, self._not_before_ns)

    def _rank(self) -> int:
        """The place among those who may try: the preferred leader first."""
        if self.node_id in self.wish:
            return self.wish.index(self.node_id)
        nodes = sorted(member.node_id for member in self.membership.members)
        return len(self.wish) + nodes.index(self.node_id)

    def _tick_candidacy(self, now_ns: int) -> None:
        if self.role is Role.DAMAGED and len(self.membership.members) == 1:
            return  # nobody else could lead; by its key, readers find out what is wrong with it
        if self.role is not Role.CANDIDATE and self._key_holder == self.node_id and not self._creating_key:
            # Of an earlier life, or given up while the coordinator was away: nobody leads by it.
            if now_ns >= self._resumed_key_ns:
                self._resumed_key_ns = now_ns + self.config.lease_ns // 2
                self._emit(DeleteKey(self._key_epoch))
            return
        if self.role is Role.FOLLOWER:
            self._consider_candidacy(now_ns)
            if now_ns >= self._candidacy_ns:
                self._candidacy_ns = NEVER
                self._creating_key = True
                self._emit(CreateKey())
        elif self.role is Role.CANDIDATE:
            self._tick_candidate(now_ns)

    def _tick_candidate(self, now_ns: int) -> None:
        if now_ns - self._candidate_since_ns > self.config.lease_ns:
            others = [m.node_id for m in self.membership.members if m.node_id != self.node_id]
            missing = [node for node in others if node not in self._promises]
            self._step_down(
                f"no majority answered within the lease time; missing: {', '.join(missing) or 'none'}",
                now_ns,
                backoff_ns=self.config.lease_ns // 2 * (1 + self._rank()),
            )
            return
        if now_ns >= self._announce_due_ns:
            self._announce(now_ns)
        if now_ns >= self._fetch_due_ns:
            self._fetching = ""
            self._evaluate(now_ns)

    def _on_hand_over(self, sender: str, message: HandOver, now_ns: int) -> None:
        if message.epoch != self.promised or sender != self.leader:
            return
        self._invited_until_ns = now_ns + self.config.lease_ns
        self._candidacy_ns = NEVER
        self._consider_candidacy(now_ns)

    def _on_key_created(self, epoch: int, now_ns: int) -> None:
        self._creating_key = False
        self._key_holder, self._key_epoch = self.node_id, epoch
        if self.role is not Role.FOLLOWER or not self.is_member:
            self._emit(DeleteKey(epoch))
            return
        if epoch <= self.promised:
            # Some replica was promised more: only a key that is created later can be above it.
            self.why = f"the epoch {epoch} of the key is not above the promised {self.promised}"
            self._not_before_ns = now_ns + _RETRY_KEY_NS
            self._emit(DeleteKey(epoch))
            return
        self._promise(epoch, self.instance, now_ns)
        self.role = Role.CANDIDATE
        self.epoch = epoch
        self.leader = ""
        self.why = "the leader key was created"
        self._candidate_since_ns = now_ns
        self._promises = {}
        self._verified_epoch = self._verified_end = 0
        self._announce(now_ns)
        self._evaluate(now_ns)

    def _on_key_refused(self, now_ns: int) -> None:
        self._creating_key = False
        self._not_before_ns = max(self._not_before_ns, now_ns + _RETRY_KEY_NS)
        self._consider_candidacy(now_ns)

    def _on_key_changed(self, holder: str, epoch: int, now_ns: int) -> None:
        if epoch < self._key_epoch:
            return  # late news of what happened before
        self._key_holder, self._key_epoch = holder, epoch
        if self.epoch and holder != self.node_id and epoch > self.epoch:
            self._step_down(f"{holder or 'another node'} has the leader key now", now_ns)
        elif self.epoch and holder == "" and epoch >= self.epoch:
            self._step_down("the leader key was deleted", now_ns)
        elif self.epoch and holder == self.node_id and epoch > self.epoch:
            self._step_down("the leader key was created anew", now_ns)
        if holder:
            self._candidacy_ns = NEVER
        else:
            self._consider_candidacy(now_ns)

    # ------------------------------------------------------------ the majority

    def _announce(self, now_ns: int) -> None:
        self._announce_due_ns = now_ns + self.config.resend_ns
        for member in self.membership.members:
            if member.node_id != self.node_id and member.node_id not in self._promises:
                self._send(member.node_id, Announce(self.partition, self.epoch, self.instance, self.copy_id))

    def _on_promised(self, sender: str, message: Promised, now_ns: int) -> None:
        if self.role is not Role.CANDIDATE or message.epoch != self.epoch:
            return
        if not message.granted:
            if not message.is_damaged:
                self._step_down(
                    f"{sender} has promised epoch {message.promised}", now_ns, backoff_ns=_RETRY_KEY_NS
                )
            return
        if not self.membership.has(sender, message.copy_id):
            return  # a copy that is no member, such as a wiped one, never votes
        before = self._promises.get(sender)
        if sender == self._fetching and before is not None and message.log_start > before.log_start:
            self._fetching = ""  # what it was asked for is not there any more
            self._fetch_due_ns = NEVER
        self._promises[sender] = message
        self._evaluate(now_ns)

    def _evaluate(self, now_ns: int) -> None:
        """With promises from a majority: fetch what the own log lacks, then begin."""
        while self.role is Role.CANDIDATE and not self._fetching:
            membership = self.membership
            if not membership.has(self.node_id, self.copy_id):
                self._step_down("by the most advanced log, this copy is no member", now_ns)
                return
            granted = [
                (node, promise)
                for node, promise in self._promises.items()
                if membership.has(node, promise.copy_id)
            ]
            if len(granted) + 1 < membership.quorum:
                # After a fetch that brought a newer membership: ask those who weren't asked.
                if any(m.node_id not in self._promises for m in membership.members):
                    self._announce_due_ns = min(self._announce_due_ns, now_ns)
                return
            own = (self.log.epoch_before(self.log.log_end), self.log.log_end)
            best, best_at = "", own
            for node, promise in granted:
                at = (promise.tail[-1][0] if promise.tail else 0, promise.log_end)
                if at > best_at:
                    best, best_at = node, at
            if not best:
                self._begin(granted, now_ns)
                return
            promise = self._promises[best]
            point = parting_point(
                self._tail(), self.log.log_end, promise.tail, promise.log_end, self.high_watermark
            )
            if point < promise.log_start:
                self._step_down(
                    f"what this log lacks from {point} on is no longer in that of {best}, which begins at "
                    f"{promise.log_start}: it has to lead",
                    now_ns,
                    backoff_ns=self.config.lease_ns,
                )
                return
            self._fetching = best
            self._fetch_due_ns = now_ns + self.config.resend_ns
            self._send(
                best,
                Fetch(self.partition, self.epoch, self.log.log_end, self.high_watermark, self._tail()),
            )

    def _begin(self, granted: list[tuple[str, Promised]], now_ns: int) -> None:
        known = max((promise.high_watermark for _, promise in granted), default=0)
        if known > self.log.log_end:
            # A majority lacks what was committed: to go on would lose it silently.
            self._fault(
                f"the log of a majority ends at {self.log.log_end}, below what was committed, {known}", now_ns
            )
            return
        self._announce_due_ns = self._fetch_due_ns = NEVER
        self.role = Role.STARTING
        self.leader = self.node_id
        self.why = f"{len(granted) + 1} of {len(self.membership.members)} members have promised"
        self._lead(granted, now_ns)
        self._emit(BeginEpoch(self.epoch))

    def _lead(self, granted: list[tuple[str, Promised]], now_ns: int) -> None:
        """The leader's concern takes over."""
        raise NotImplementedError

    def _on_fetched(self, sender: str, message: Fetched, records: list[Record], now_ns: int) -> None:
        if self.role is not Role.CANDIDATE or message.epoch != self.epoch or sender != self._fetching:
            return
        base = message.base
        if base > self.log.log_end or self.log.epoch_before(base) < 0:
            return  # of an earlier request; the present one is repeated
        self._check_records(records, base, self.log.epoch_before(base), self.epoch)
        if not records:
            return  # asked again when it is due
        end = self.log.log_end
        if not self._take(records, base, now_ns):
            return
        self._fetching = ""
        self._fetch_due_ns = NEVER
        if self.log.log_end == end and self.log.log_end < records[-1].end:
            self._step_down(
                "there is no room for what this log lacks", now_ns, backoff_ns=self.config.lease_ns
            )
            return
        self._evaluate(now_ns)
