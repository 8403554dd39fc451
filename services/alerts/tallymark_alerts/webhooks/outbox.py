"""One webhook's deliveries: what is to be sent now, and what must be remembered. Pure; time comes in.

An alert that was read is a **delivery** until the endpoint has it (forgotten then) or it is given up (a dead letter
then). The position of a partition moves as soon as its alerts are read, so what is written (`unsaved`) names every
delivery that isn't finished, those under way and those never tried included: whoever takes over from that record
misses nothing, and repeats what was delivered after it was written.

A letter is `unsaved` until it has been written; up to then the record goes on naming it as pending, so that a takeover in
between tries it once more instead of losing it.

    take() ──> waiting ── due() ──> under way ── finish() ──> delivered: forgotten
                  ^                     │  └──> given up: a letter, `unsaved` until `saved()`
                  └──── next attempt ───┘
    redeliver() of a letter ──> waiting, as if it were new
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterable

import msgspec

from tallymark_alerts.webhooks.records import Letter, Pending, Place, Progress
from tallymark_alerts.webhooks.schedule import Outcome, Schedule
from tallymark_protocol.messages import AlertRecord, AlertsBatch

SAVE_LETTERS_MAX = 50  # that one writing makes: a coordinator's transaction is bounded
_RECOVERY_NS = 60_000_000_000  # between two times that a success brings the waiting ones forward
_FAILURES_OF_OUTAGE = 3  # in a row, of whatever deliveries: it is the endpoint that failed, not they


class Delivery:
    """An alert that the endpoint hasn't got.

    Attributes:
        place: where the alert lies in the store.
        alert: itself; None after a takeover, until it has been read again.
        attempts: made and failed.
        first_ns: when the first was made; 0 before it.
        next_ns: not to be tried before.
        is_under_way: an attempt is.
    """

    __slots__ = ("alert", "attempts", "first_ns", "is_under_way", "next_ns", "place")

    def __init__(
        self, place: Place, alert: AlertRecord | None, *, attempts: int, first_ns: int, next_ns: int
    ) -> None:
        self.place = place
        self.alert = alert
        self.attempts = attempts
        self.first_ns = first_ns
        self.next_ns = next_ns
        self.is_under_way = False

    def pending(self) -> Pending:
        """As it is remembered."""
        return Pending(*self.place, self.attempts, self.first_ns, self.next_ns)


class Unsaved(msgspec.Struct, frozen=True):
    """What is to be written: all of it in one transaction. Tell `saved` afterwards."""

    version: int
    progress: Progress
    letters: dict[Place, Letter]


class Outbox:
    """One webhook's deliveries.

    Args:
        progress: as it was written last.
        schedule: of attempts.
        now_ns: the time.

    Attributes:
        positions: by partition: everything below was read. Absent: nothing was.
        paused: why nothing is tried because the endpoint wants nothing more; "".
        letters: how many dead letters there are, those not written yet included.
        last_error: of the last attempt; "".
    """

    def __init__(self, progress: Progress, schedule: Schedule, now_ns: int) -> None:
        self.positions = dict(progress.positions)
        self.paused = progress.paused
        self.letters = progress.dead
        self.last_error = progress.last_error
        self._schedule = schedule
        self._version = 0  # counted up by each change of what is remembered
        self._saved_version = 0
        self._deliveries: dict[Place, Delivery] = {}
        self._unsaved: dict[Place, tuple[Letter, Delivery]] = {}
        self._waiting: list[
            tuple[int, int, Delivery]
        ] = []  # a heap; entries that are not true any more are left
        self._sequence = 0
        self._failures = 0  # in a row
        self._recovered_ns = 0  # when the waiting ones were brought forward last
        latest_ns = schedule.latest_ns(now_ns)
        for entry in progress.pending:
            self._add(
                Delivery(
                    (entry.partition, entry.position),
                    None,
                    attempts=entry.attempts,
                    # Written by a clock that was ahead: neither wait for that time, nor try for longer.
                    first_ns=min(entry.first_ns, now_ns),
                    next_ns=min(entry.next_ns, latest_ns),
                )
            )

    @property
    def outstanding(self) -> int:
        """Deliveries that are not finished."""
        return len(self._deliveries)

    @property
    def failed(self) -> int:
        """Deliveries that have failed and are tried again."""
        return sum(delivery.attempts > 0 for delivery in self._deliveries.values())

    @property
    def is_failing(self) -> bool:
        """Whether the last attempt failed."""
        return self._failures > 0

    @property
    def is_unsaved(self) -> bool:
        """Whether something must be written."""
        return self._version != self._saved_version

    # ------------------------------------------------------------ what comes in

    def take(self, batch: AlertsBatch, now_ns: int) -> None:
        """Alerts were read from `positions` on: deliver them."""
        for alert in batch.alerts:
            place = alert.partition, alert.position
            if alert.position < self.positions.get(alert.partition, 0) or place in self._deliveries:
                continue
            self._add(Delivery(place, alert, attempts=0, first_ns=0, next_ns=now_ns))
        for partition, position in batch.next.items():
            if position > self.positions.get(partition, -1):
                self.positions[partition] = position
                self._version += 1

    def redeliver(self, places: Iterable[Place], letters: int, now_ns: int) -> None:
        """Dead letters are to be tried again, as if they were new; so many are left that have been written."""
        for place in places:
            self._unsaved.pop(place, None)  # that it can be asked for says that it was written
            delivery = self._deliveries.pop(place, None)
            alert = None if delivery is None else delivery.alert
            if delivery is not None and delivery.is_under_way:
                delivery.attempts = delivery.first_ns = 0
                self._deliveries[place] = delivery
                continue
            self._add(Delivery(place, alert, attempts=0, first_ns=0, next_ns=now_ns))
        self.letters = letters + len(self._unsaved)
        self._version += 1

    def resume(self, now_ns: int) -> None:
        """Go on where the endpoint wanted nothing more, and try now what waits."""
        self.paused = ""
        self._bring_forward(now_ns)
        self._version += 1

    # ------------------------------------------------------------ attempts

    def due(self, now_ns: int, most: int) -> list[Delivery]:
        """At most so many deliveries to try now; they are under way until `finish` is told of them."""
        found: list[Delivery] = []
        while len(found) < most and self._waiting and self._waiting[0][0] <= now_ns:
            next_ns, _, delivery = heapq.heappop(self._waiting)
            if self._is_waiting(next_ns, delivery):
                delivery.is_under_way = True
                found.append(delivery)
        return found

    def next_ns(self) -> int | None:
        """When the next one is due; None: none waits."""
        while self._waiting and not self._is_waiting(self._waiting[0][0], self._waiting[0][2]):
            heapq.heappop(self._waiting)
        return self._waiting[0][0] if self._waiting else None

    def put_back(self, delivery: Delivery, next_ns: int) -> None:
        """An attempt was not made after all; it may be made from then on."""
        delivery.is_under_way = False
        delivery.next_ns = next_ns
        self._wait(delivery)

    def finish(
        self, delivery: Delivery, outcome: Outcome, *, began_ns: int, now_ns: int, rng: random.Random
    ) -> None:
        """An attempt that began at a time has ended."""
        assert delivery.is_under_way, "each attempt ends once"
        delivery.is_under_way = False
        self._version += 1
        if outcome.is_delivered:
            del self._deliveries[delivery.place]
            self.last_error = ""
            if self._failures >= _FAILURES_OF_OUTAGE and now_ns - self._recovered_ns >= _RECOVERY_NS:
                self._recovered_ns = now_ns
                self._bring_forward(now_ns)
            self._failures = 0
            return
        self._failures += 1
        self.last_error = outcome.error
        if outcome.is_gone:
            self.paused = outcome.error
        delivery.attempts += 1
        delivery.first_ns = delivery.first_ns or began_ns
        next_ns = self._schedule.next_attempt_ns(
            attempts=delivery.attempts, first_ns=delivery.first_ns, now_ns=now_ns, rng=rng
        )
        if next_ns is None:
            del self._deliveries[delivery.place]
            alert_id = "" if delivery.alert is None else delivery.alert.id
            letter = Letter(alert_id, delivery.attempts, delivery.first_ns, now_ns, outcome.error)
            self._unsaved[delivery.place] = letter, delivery
            self.letters += 1
            return
        delivery.next_ns = next_ns
        self._wait(delivery)

    # ------------------------------------------------------------ what is remembered

    def unsaved(self) -> Unsaved:
        """What is to be written now; letters beyond `SAVE_LETTERS_MAX` are still pending in it."""
        places = list(self._unsaved)
        writing = {place: self._unsaved[place][0] for place in places[:SAVE_LETTERS_MAX]}
        pending = [delivery.pending() for delivery in self._deliveries.values()]
        pending += [self._unsaved[place][1].pending() for place in places[SAVE_LETTERS_MAX:]]
        progress = Progress(
            positions=dict(self.positions),
            pending=pending,
            dead=self.letters - len(self._unsaved) + len(writing),
            paused=self.paused,
            last_error=self.last_error,
        )
        return Unsaved(self._version, progress, writing)

    def saved(self, unsaved: Unsaved) -> None:
        """It was written."""
        for place in unsaved.letters:
            self._unsaved.pop(place, None)
        self._saved_version = unsaved.version if not self._unsaved else unsaved.version - 1

    # ------------------------------------------------------------ the heap

    def _add(self, delivery: Delivery) -> None:
        self._deliveries[delivery.place] = delivery
        self._version += 1
        self._wait(delivery)

    def _wait(self, delivery: Delivery) -> None:
        self._sequence += 1
        heapq.heappush(self._waiting, (delivery.next_ns, self._sequence, delivery))

    def _is_waiting(self, next_ns: int, delivery: Delivery) -> bool:
        return (
            not delivery.is_under_way
            and delivery.next_ns == next_ns
            and self._deliveries.get(delivery.place) is delivery
        )

    def _bring_forward(self, now_ns: int) -> None:
        """Have all that wait tried now: what they waited for is over."""
        for delivery in self._deliveries.values():
            if not delivery.is_under_way and delivery.next_ns > now_ns:
                delivery.next_ns = now_ns
                self._wait(delivery)
