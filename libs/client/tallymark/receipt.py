"""The answer to an ingest call: per event, what became of it, and where it lies.

A `Receipt` is made for every call, so making one costs next to nothing: the outcomes of its chunks are kept as
they came and only read event by event when someone asks for more than the count.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import msgspec

from tallymark_protocol.chunk import BadEvent, Body
from tallymark_protocol.errors import Reason, RemoteProtocolError, sentence
from tallymark_protocol.identifiers import partition_of
from tallymark_protocol.messages import EventOutcome, PartitionRun
from tallymark_protocol.model import Event


class Rejection(msgspec.Struct, frozen=True):
    """An event that was refused. Sending it again as it is can't help.

    `index` is its position in the call's events, `reason` says why in a code and `message` in a sentence.
    `event` is the event itself, None where the call passed columns.
    """

    index: int
    reason: Reason | int  # a plain int from a newer server
    message: str
    event: Event | None = None

    @property
    def code(self) -> Reason | int:
        """The same as `reason`."""
        return self.reason


class Original(msgspec.Struct, frozen=True):
    """An event whose id was stored before: event `index` of the call, and where the first one lies."""

    index: int
    partition: int
    offset: int
    event: Event | None = None


class ChunkState:
    """What is known of one chunk: the sum of all answers to it. Fields are the sender's to change."""

    __slots__ = ("answered", "body", "dropped", "outcomes", "partition_count", "runs", "unresolved")

    def __init__(self, body: Body) -> None:
        self.body = body
        self.partition_count = 0  # 0 until a receipt came
        self.runs: dict[
            int, PartitionRun | None
        ] = {}  # by resolved partition; None: nothing was appended there
        self.outcomes: dict[int, list[EventOutcome]] = {}  # by resolved partition
        self.unresolved: frozenset[int] = frozenset()  # partitions without an outcome; counts once answered
        self.dropped: frozenset[int] = frozenset()  # those of them that certainly stored nothing
        self.answered = False  # whether a receipt came; without one every event is unresolved


class Part(NamedTuple):
    """A chunk's share in a call: which of the call's events its events are."""

    chunk: ChunkState
    indices: Sequence[int] | Mapping[int, int]  # position in the chunk -> index in the call
    sent: bool  # whether it was sent at all: if not, nothing of it is stored


class _Details:
    """A receipt read event by event."""

    def __init__(self) -> None:
        self.offsets: dict[int, tuple[int, int]] = {}
        self.stored = 0
        self.duplicates: list[Original] = []
        self.conflicts: list[Original] = []
        self.rejected: list[Rejection] = []
        self.unknown: list[int] = []
        self.not_stored: list[int] = []


class Receipt:
    """What became of a call's events.

    Each event is in exactly one of: stored, duplicate, conflict, rejected. A receipt that an exception carries
    is partial: its further events are in `unknown` (they may be stored or not) or `not_stored` (they are not);
    the exception's `retry()` settles both.
    """

    __slots__ = ("__dict__", "_bad", "_events", "_parts", "_simple", "n_events")

    def __init__(
        self, n_events: int, parts: list[Part], bad: list[BadEvent], events: Sequence[Event] | None
    ) -> None:
        self.n_events = n_events
        self._parts = parts
        self._bad = bad
        self._events = events
        # Stored altogether: the usual case, in which nothing has to be read.
        self._simple = not bad and all(
            part.chunk.answered and not part.chunk.unresolved and not part.chunk.outcomes for part in parts
        )

    def __repr__(self) -> str:
        counts = (
            f"n_events={self.n_events}, n_stored={self.n_stored}, n_duplicates={self.n_duplicates}, "
            f"n_conflicts={self.n_conflicts}, n_rejected={self.n_rejected}, "
            f"n_unknown={len(self.unknown)}, n_not_stored={len(self.not_stored)}"
        )
        rejected = self.rejected
        first = f", first rejected: {rejected[0].message!r}" if rejected else ""
        return f"<Receipt {counts}{first}>"

    @property
    def n_stored(self) -> int:
        """How many events this call stored (or had stored, at an earlier try of it)."""
        return self.n_events if self._simple else self._details.stored

    @property
    def n_duplicates(self) -> int:
        """How many events were stored before under the same id with the same payload: all is well."""
        return 0 if self._simple else len(self._details.duplicates)

    @property
    def n_conflicts(self) -> int:
        """How many events were stored before under the same id with another payload: somebody is mistaken."""
        return 0 if self._simple else len(self._details.conflicts)

    @property
    def n_rejected(self) -> int:
        """How many events were refused for a fault of their own (conflicts are counted apart)."""
        return 0 if self._simple else len(self._details.rejected)

    @property
    def ok(self) -> bool:
        """Whether every event is in the log, by this call or (duplicates) by an earlier one."""
        return self._simple or self.n_stored + self.n_duplicates == self.n_events

    @property
    def duplicates(self) -> list[Original]:
        """The duplicates, by index, with where the first event lies."""
        return [] if self._simple else self._details.duplicates

    @property
    def conflicts(self) -> list[Original]:
        """The conflicts, by index, with where the first event lies."""
        return [] if self._simple else self._details.conflicts

    @property
    def rejected(self) -> list[Rejection]:
        """The events that were refused, by index, with the reason. Conflicts are in `conflicts`."""
        return [] if self._simple else self._details.rejected

    @property
    def unknown(self) -> list[int]:
        """Indices of events that may be stored or not: only in the receipt of an exception."""
        return [] if self._simple else self._details.unknown

    @property
    def not_stored(self) -> list[int]:
        """Indices of events that are certainly not stored though nothing is wrong with them."""
        return [] if self._simple else self._details.not_stored

    @property
    def offsets(self) -> list[tuple[int, int] | None]:
        """For every event where it lies, as (partition, offset); None for one that this call didn't store."""
        found = self._details.offsets
        return [found.get(index) for index in range(self.n_events)]

    @property
    def partitions(self) -> list[int]:
        """The partitions that stored something, ascending."""
        return sorted({partition for partition, _ in self._details.offsets.values()})

    @cached_property
    def _details(self) -> _Details:
        details = _Details()
        for part in self._parts:
            _read(part, details, self._events)
        for bad in self._bad:
            details.rejected.append(Rejection(bad.index, bad.reason, bad.message, self._event(bad.index)))
        details.duplicates.sort(key=_index)
        details.conflicts.sort(key=_index)
        details.rejected.sort(key=_index)
        details.unknown.sort()
        details.not_stored.sort()
        return details

    def _event(self, index: int) -> Event | None:
        return None if self._events is None else self._events[index]


def _index(entry: Any) -> int:
    index: int = entry.index
    return index


def _read(part: Part, details: _Details, events: Sequence[Event] | None) -> None:
    chunk, indices, sent = part
    count = chunk.body.event_count
    wanted = indices if isinstance(indices, Mapping) else dict(enumerate(indices))
    if not chunk.answered:
        (details.unknown if sent else details.not_stored).extend(wanted.values())
        return
    accounts = chunk.body.accounts()
    partition_count = chunk.partition_count
    exceptions = {outcome.index: outcome for entries in chunk.outcomes.values() for outcome in entries}
    seen: dict[int, int] = {}
    known: dict[int, int] = {}  # partition by account
    for position in range(count):
        account = accounts[position if len(accounts) > 1 else 0]
        partition = known.get(account)
        if partition is None:
            partition = known[account] = partition_of(account, partition_count)
        place = seen.get(partition, 0)
        seen[partition] = place + 1
        index = wanted.get(position)
        if index is None:
            continue
        event = None if events is None else events[index]
        if partition in chunk.unresolved:
            (details.not_stored if partition in chunk.dropped else details.unknown).append(index)
            continue
        outcome = exceptions.get(position)
        if outcome is not None and outcome.reason not in {Reason.ACCEPTED, Reason.REPEAT}:
            _sort_in(details, index, outcome, event)
            continue
        run = chunk.runs.get(partition)
        if run is None or place >= run.count:
            raise RemoteProtocolError(f"the receipt doesn't say where event {index} lies")
        details.stored += 1
        details.offsets[index] = (partition, run.base_offset + place)


def _sort_in(details: _Details, index: int, outcome: EventOutcome, event: Event | None) -> None:
    if outcome.reason == Reason.DUPLICATE:
        details.duplicates.append(Original(index, outcome.partition, outcome.offset, event))
    elif outcome.reason == Reason.CONFLICT:
        details.conflicts.append(Original(index, outcome.partition, outcome.offset, event))
    else:
        reason: Reason | int = outcome.reason
        detail = ""
        with contextlib.suppress(ValueError):  # a reason of a newer server stays a number
            reason = Reason(outcome.reason)
        if event is not None and reason == Reason.UNKNOWN_METRIC:
            detail = event.metric_code
        details.rejected.append(Rejection(index, reason, sentence(reason, index=index, detail=detail), event))
