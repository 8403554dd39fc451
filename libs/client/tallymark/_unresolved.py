"""Which event objects belong to calls that are not resolved yet.

When an ingest call fails, the caller's natural answer is to call it again with the same events. This table knows
events by identity (the very same object, which it keeps alive, so that no other can take its place) and gives
the flight each was part of, so that it is resumed instead of being sent, and counted, a second time. That goes
for the call's flights that are done, too: of them the outcome is known already.

An object may stand for several events: each of its occurrences is an entry of its own, and is claimed once. The
table is bounded in chunks, bytes and age; the oldest are forgotten first.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Final, NamedTuple

from tallymark._sender import Flight, FlightState
from tallymark_protocol import limits
from tallymark_protocol.model import Event

FLIGHTS_MAX: Final = 4_096
BYTES_MAX: Final = 8 * limits.REQUEST_BYTES_MAX
# Well beyond the time for which a chunk may be retried: asking for an event of an expired one must still fail.
SECONDS_MAX: Final = 2 * limits.CHUNK_RETRY_NS_MAX / 1e9


class Claim(NamedTuple):
    """An event's place: entry `position` of a flight's chunk."""

    flight: Flight
    position: int


class _Entry(NamedTuple):
    events: dict[int, Event]  # by position, those not claimed
    since: float  # on the loop's clock


class UnresolvedEvents:
    """The table; see the module's docstring."""

    def __init__(self, *, flights_max: int = FLIGHTS_MAX, bytes_max: int = BYTES_MAX) -> None:
        self._flights_max = flights_max
        self._bytes_max = bytes_max
        self._entries: dict[Flight, _Entry] = {}  # oldest first
        self._claims: dict[int, deque[Claim]] = {}  # by id() of the event, oldest first
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, flight: Flight, events: Mapping[int, Event], now: float) -> None:
        """Remember events of a flight, by their positions in its chunk."""
        if flight.state is FlightState.FAILED and not flight.sent:
            return
        entry = self._entries.get(flight)
        if entry is None:
            entry = self._entries[flight] = _Entry({}, now)
            self._bytes += flight.chunk.body.chunk_bytes
        for position, event in events.items():
            if position not in entry.events:
                entry.events[position] = event
                self._claims.setdefault(id(event), deque()).append(Claim(flight, position))
        while len(self._entries) > 1 and (
            len(self._entries) > self._flights_max or self._bytes > self._bytes_max
        ):
            self._forget(next(iter(self._entries)))

    def claim(self, event: Event) -> Claim | None:
        """Take an event's oldest entry, if it has one.

        An entry of a flight that failed stays: asking again must fail again, not count twice.
        """
        claims = self._claims.get(id(event))
        if claims is None:
            return None
        claim = claims[0]
        if claim.flight.state is not FlightState.FAILED:
            self.release(claim.flight, [claim.position])
        elif len(claims) > 1:
            claims.rotate(-1)  # so that several occurrences of one object get their own places
        return claim

    def release(self, flight: Flight, positions: list[int]) -> None:
        """Forget entries of a flight: their caller has asked for them."""
        entry = self._entries.get(flight)
        if entry is None:
            return
        for position in positions:
            event = entry.events.pop(position, None)
            if event is not None:
                self._unlink(event, flight, position)
        if not entry.events:
            self._drop(flight)

    def expire(self, now: float) -> None:
        """Forget what is too old."""
        while self._entries:
            flight, entry = next(iter(self._entries.items()))
            if now - entry.since < SECONDS_MAX:
                return
            self._forget(flight)

    def _forget(self, flight: Flight) -> None:
        for position, event in self._entries[flight].events.items():
            self._unlink(event, flight, position)
        self._drop(flight)

    def _drop(self, flight: Flight) -> None:
        del self._entries[flight]
        self._bytes -= flight.chunk.body.chunk_bytes

    def _unlink(self, event: Event, flight: Flight, position: int) -> None:
        claims = self._claims[id(event)]
        claims.remove(Claim(flight, position))
        if not claims:
            del self._claims[id(event)]
