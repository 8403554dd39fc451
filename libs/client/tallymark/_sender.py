"""Chunks under way: identities, the window, retries, and how a chunk comes to its end.

Owns every **flight**: one chunk from the moment it is made to the moment its outcome is known. A flight's states::

    NEW       has no identity yet                              -> SENT | WAITING
    SENT      a gateway has it and will answer                  -> DONE | FAILED | WAITING | PARKED
    WAITING   for a link, or for its backoff                    -> SENT | PARKED
    PARKED    its caller has stopped waiting; it is unresolved  -> DONE | FAILED | SENT | WAITING (resumed)
    DONE      every event's outcome is known                    end
    FAILED    it can never be resolved                          end

Once a flight has an identity (producer id, sequence) its bytes never change, and each retry sends the same: the
store counts them once. A parked flight keeps its identity, so that whoever asks again resumes it. No flight has
a task of its own: links and timers call it, and its callers wait on futures.

**The window.** A partition remembers `PRODUCER_WINDOW` sequences of a producer. The sender keeps the span from
its oldest unresolved sequence to its newest below half of that, and goes on under a new producer id beyond it: chunks
for a partition that is without a leader for a moment must not hold up those for the others.
"""

from __future__ import annotations

import asyncio
import enum
import random
from collections import deque
from typing import Final

from tallymark._gateways import Gateways, backoff_seconds
from tallymark._link import Link
from tallymark.receipt import ChunkState
from tallymark_protocol import limits
from tallymark_protocol.chunk import Body, seal
from tallymark_protocol.codec import decode_error, decode_receipt
from tallymark_protocol.errors import (
    BackpressureError,
    ErrorCode,
    LocalProtocolError,
    OutcomeUnknownError,
    RemoteProtocolError,
    ServerError,
    TallymarkError,
    UnavailableError,
    error_from_wire,
)
from tallymark_protocol.messages import FrameType, PartitionFailure, PartitionRun, Receipt

SPAN_MAX: Final = limits.PRODUCER_WINDOW // 2
FLIGHTS_MAX: Final = 4_096  # under way at once
FLIGHT_BYTES_MAX: Final = 4 * limits.REQUEST_BYTES_MAX  # of all under way
# Stop retrying a little before the stores would forget, by a clock that isn't theirs.
RETRY_SECONDS_MAX: Final = limits.CHUNK_RETRY_NS_MAX / 1e9 - 5.0

_RECEIPT: Final = int(FrameType.RECEIPT)
_FINAL: Final = frozenset(
    {ErrorCode.OUTCOME_UNKNOWN, ErrorCode.SEQUENCE_REUSED, ErrorCode.MALFORMED, ErrorCode.TOO_LARGE}
)
_PRESSURE: Final = frozenset({ErrorCode.OVERLOADED, ErrorCode.DISK_FULL})


class FlightState(enum.IntEnum):
    """Where a flight stands; see the module's table. Integers, because those are found in sets at once."""

    NEW = enum.auto()
    SENT = enum.auto()
    WAITING = enum.auto()
    PARKED = enum.auto()
    DONE = enum.auto()
    FAILED = enum.auto()


_ENDED: Final = frozenset({FlightState.DONE, FlightState.FAILED})
_ACTIVE: Final = frozenset({FlightState.SENT, FlightState.WAITING})


class Producer:
    """An identity: a random id, and the sequences used under it."""

    __slots__ = ("next_sequence", "producer_id", "unresolved")

    def __init__(self, producer_id: int) -> None:
        self.producer_id = producer_id
        self.next_sequence = 1
        # Sequences, ascending. No flights, so that those that nobody else holds are freed.
        self.unresolved: dict[int, None] = {}

    def has_room(self) -> bool:
        """Whether the next sequence is within the span."""
        return not self.unresolved or self.next_sequence - next(iter(self.unresolved)) < SPAN_MAX


class Flight:
    """One chunk on its way. An exchange of the link it was sent over."""

    __slots__ = (
        "ambiguous",
        "attempts",
        "chunk",
        "data",
        "deadline",
        "error",
        "expires",
        "flags",
        "link_tries",
        "producer",
        "sender",
        "sequence",
        "size",
        "state",
        "timer",
        "waiters",
    )

    def __init__(self, sender: Sender, body: Body, flags: int) -> None:
        self.sender = sender
        self.chunk = ChunkState(body)
        self.size = body.chunk_bytes
        self.flags = flags
        self.state = FlightState.NEW
        self.producer: Producer | None = None  # None while NEW
        self.sequence = 0
        self.data = b""  # the sealed chunk; empty while NEW
        self.deadline = 0.0  # on the loop's clock: when the caller stops waiting
        self.expires = 0.0  # on the loop's clock: when it may be sent no more
        self.attempts = 0  # failed tries since the caller last asked
        self.link_tries = 0  # requests that no answer came to yet
        self.ambiguous = False  # whether some try may have taken effect without our seeing its answer
        self.error: TallymarkError | None = None  # why the last try failed
        self.timer: asyncio.TimerHandle | None = None  # of the backoff
        self.waiters: list[asyncio.Future[None]] = []

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen."""
        return self.state in _ENDED

    @property
    def sent(self) -> bool:
        """Whether anything was sent: if not, nothing is stored."""
        return self.ambiguous or self.link_tries > 0 or self.chunk.answered

    @property
    def under_way(self) -> bool:
        """Whether it is being sent, answered or retried."""
        return self.state in _ACTIVE

    def answered(self, kind: int, body: bytes) -> None:
        """The link: the answer is here."""
        self.sender.answered(self, kind, body)

    def lost(self, error: TallymarkError) -> None:
        """The link: no answer will come."""
        self.link_tries -= 1
        self.ambiguous = True
        if self.state is FlightState.SENT:
            self.sender.again(self, error)


class Sender:
    """All chunks of one client; see the module's docstring."""

    def __init__(self, loop: asyncio.AbstractEventLoop, rng: random.Random) -> None:
        self.gateways: Gateways  # set right after: each needs the other
        self._loop = loop
        self._rng = rng
        self._producer = Producer(rng.getrandbits(64))
        self._active: dict[Flight, None] = {}  # SENT and WAITING, in the order in which they were admitted
        self._active_bytes = 0
        self._admissions: deque[tuple[asyncio.Future[None], Flight]] = deque()  # first come, first served
        self._queue: dict[Flight, None] = {}  # WAITING for a link, in order
        self._sweep: asyncio.TimerHandle | None = (
            None  # at the earliest deadline of an active flight, or before
        )
        self._sweep_at = 0.0
        self._idle: asyncio.Future[None] | None = None  # set by `wait_idle`
        self._closed = False

    # ------------------------------------------------------------ admission

    def _fits(self, size: int) -> bool:
        if len(self._active) >= FLIGHTS_MAX:
            return False
        return not self._active or self._active_bytes + size <= FLIGHT_BYTES_MAX

    def _producer_with_room(self) -> Producer:
        if not self._producer.has_room():
            self._producer = Producer(self._rng.getrandbits(64))
        return self._producer

    def _admit(self, flight: Flight) -> None:
        """Count a flight among those under way, give it an identity, and send it."""
        self._active[flight] = None
        self._active_bytes += flight.size
        if flight.producer is None:
            producer = self._producer_with_room()
            flight.producer = producer
            flight.sequence = producer.next_sequence
            producer.next_sequence += 1
            producer.unresolved[flight.sequence] = None
        flight.state = FlightState.WAITING
        if self._sweep is None or flight.deadline < self._sweep_at:
            self._arm(flight.deadline)
        if flight.data and self._loop.time() >= flight.expires:
            self._end(flight, FlightState.FAILED, _expired())
            return
        self._send(flight)

    def start_now(self, flight: Flight, deadline: float) -> bool:
        """Send a flight that is NEW or PARKED if there is room; whether that is done.

        True as well where nothing is to do: it has ended, or someone else has resumed it.

        Raises:
            UnavailableError: the client is closed.
        """
        if self._closed:
            raise UnavailableError("the client is closed", code=ErrorCode.CLOSED, retriable=False)
        if flight.state in _ENDED:
            return True
        if flight.state in _ACTIVE:
            flight.deadline = max(flight.deadline, deadline)
            return True
        flight.sender = self  # it may be resumed by another one: after a fork
        flight.deadline = deadline
        flight.attempts = 0
        flight.error = None
        if self._admissions or not self._fits(flight.size):
            return False
        self._admit(flight)
        return True

    async def start(self, flight: Flight, deadline: float) -> None:
        """Wait for room, and send a flight for which `start_now` found none.

        Raises:
            BackpressureError: there was no room until the deadline; the flight is as it was.
        """
        granted: asyncio.Future[None] = self._loop.create_future()
        entry = (granted, flight)
        self._admissions.append(entry)
        try:
            async with asyncio.timeout_at(deadline):
                await granted
        except TimeoutError:
            raise BackpressureError(
                "too much is under way already: no room for another chunk until the timeout"
            ) from flight.error
        finally:
            if not granted.done() or granted.cancelled():
                if entry in self._admissions:
                    self._admissions.remove(entry)
                self._grant()

    def _grant(self) -> None:
        """Let in whoever has waited longest, as long as there is room."""
        while self._admissions:
            granted, flight = self._admissions[0]
            if granted.done() or flight.under_way or flight.ended:
                # Given up, or resumed and perhaps even ended by someone else meanwhile.
                self._admissions.popleft()
                if not granted.done():
                    granted.set_result(None)
                continue
            if not self._fits(flight.size):
                return
            self._admissions.popleft()
            granted.set_result(None)
            self._admit(flight)

    # ------------------------------------------------------------ sending

    def _send(self, flight: Flight) -> None:
        link = self.gateways.link
        if link is None:
            self._queue[flight] = None
            return
        self._send_over(flight, link)

    def _send_over(self, flight: Flight, link: Link) -> None:
        now = self._loop.time()
        if not flight.data:
            assert flight.producer is not None, "an admitted flight has an identity"
            flight.expires = now + RETRY_SECONDS_MAX
            flight.data = seal(
                flight.chunk.body,
                producer_id=flight.producer.producer_id,
                sequence=flight.sequence,
                first_sent_ns=self.gateways.now_ns(),
                flags=flight.flags,
            )
        elif now >= flight.expires:
            self._end(flight, FlightState.FAILED, _expired())
            return
        flight.state = FlightState.SENT
        flight.link_tries += 1
        flight.chunk.dropped = frozenset()  # what was refused before may be stored by this try
        timeout_ms = max(int((flight.deadline - now) * 1_000), 1)
        try:
            link.request(FrameType.INGEST, flight.data, flight, timeout_ms)
        except LocalProtocolError as error:
            flight.link_tries -= 1
            self._end(flight, FlightState.FAILED, error)

    def link_up(self) -> None:
        """Send what waited for a link."""
        queue, self._queue = self._queue, {}
        for flight in queue:
            if flight.state is FlightState.WAITING and flight.timer is None:
                self._send(flight)

    def again(self, flight: Flight, error: TallymarkError) -> None:
        """Plan another try of a flight that is under way."""
        flight.attempts += 1
        flight.state = FlightState.WAITING
        pause = backoff_seconds(flight.attempts, self._rng)
        if isinstance(error, BackpressureError) and error.retry_after_ms is not None:
            pause = max(pause, min(error.retry_after_ms / 1_000, 30.0))
        # A last try that the caller's own deadline cut short says less than the refusal before it.
        cut_short = error.code == ErrorCode.TIMEOUT and self._loop.time() + pause >= flight.deadline
        if not cut_short or flight.error is None or flight.error.code not in _PRESSURE:
            flight.error = error
        flight.timer = self._loop.call_later(pause, self._retry, flight)

    def _retry(self, flight: Flight) -> None:
        flight.timer = None
        if flight.state is FlightState.WAITING:
            self._send(flight)

    # ------------------------------------------------------------ answers

    def answered(self, flight: Flight, kind: int, body: bytes) -> None:
        """Take the answer to one try of a flight; it may be parked, or ended by another try, by now."""
        flight.link_tries -= 1
        if flight.state in _ENDED:
            return
        try:
            if kind != _RECEIPT:
                self._refused(flight, decode_error(body))
                return
            receipt = decode_receipt(body)
            failures = receipt.failures
            if not failures and not receipt.outcomes and not flight.chunk.answered:
                chunk = flight.chunk
                chunk.answered = True
                chunk.partition_count = receipt.partition_count
                for run in receipt.runs:
                    chunk.runs[run.partition] = run
            else:
                _merge(flight, receipt)
            _check_complete(flight.chunk)
        except RemoteProtocolError as error:
            flight.ambiguous = True
            self.park(flight, ServerError(f"the answer can't be read: {error.message}"))
            return
        if not flight.chunk.unresolved:
            self._end(flight, FlightState.DONE, None)
            return
        self._partly(flight, failures)

    def _partly(self, flight: Flight, failures: list[PartitionFailure]) -> None:
        """Some partitions gave no outcome."""
        if not all(failure.not_stored for failure in failures):
            flight.ambiguous = True
        errors = [
            error_from_wire(f.error.code, f.error.retriable, f.error.message, f.error.details)
            for f in failures
            if f.partition in flight.chunk.unresolved
        ]
        retriable = [error for error in errors if error.retriable]
        if retriable:
            self._failed(flight, retriable[0])
            return
        lost = next((error for error in errors if error.code in _FINAL), None)
        if lost is not None and len(errors) == sum(error.code in _FINAL for error in errors):
            self._end(flight, FlightState.FAILED, lost)
        else:
            self.park(flight, errors[0] if errors else ServerError("the receipt names no error"))

    def _refused(self, flight: Flight, error: TallymarkError) -> None:
        """The whole chunk was answered with an error."""
        # Only these say that nothing was done; any other leaves open what a partition may have stored.
        if error.code not in {ErrorCode.OVERLOADED, ErrorCode.MALFORMED, ErrorCode.TOO_LARGE}:
            flight.ambiguous = True
        if error.retriable:
            self._failed(flight, error)
        elif error.code in _FINAL:
            self._end(flight, FlightState.FAILED, error)
        else:
            self.park(flight, error)

    def _failed(self, flight: Flight, error: TallymarkError) -> None:
        if flight.state is FlightState.SENT:
            self.again(flight, error)
        else:
            flight.error = error  # parked, or waiting after another try: no reason for one more

    # ------------------------------------------------------------ ends

    def _end(self, flight: Flight, state: FlightState, error: TallymarkError | None) -> None:
        flight.error = error
        self._leave(flight, state)
        producer = flight.producer
        if producer is not None:
            producer.unresolved.pop(flight.sequence, None)
        flight.data = b""
        self._wake(flight)

    def park(self, flight: Flight, error: TallymarkError | None) -> None:
        """Stop trying; the flight stays unresolved and may be resumed."""
        if flight.state in _ENDED or flight.state is FlightState.NEW:
            return
        if error is not None:
            flight.error = error
        self._leave(flight, FlightState.PARKED)
        self._wake(flight)

    def abandon(self, flight: Flight) -> None:
        """Park a flight whose caller has gone, unless another caller waits for it as well."""
        if all(waiter.done() for waiter in flight.waiters):
            self.park(flight, None)

    def _leave(self, flight: Flight, state: FlightState) -> None:
        flight.state = state
        if flight.timer is not None:
            flight.timer.cancel()
            flight.timer = None
        if flight in self._active:
            del self._active[flight]
            self._active_bytes -= flight.size

    def _wake(self, flight: Flight) -> None:
        for waiter in flight.waiters:
            if not waiter.done():
                waiter.set_result(None)
        flight.waiters.clear()
        if self._admissions:
            self._grant()
        if self._idle is not None and not self._active and not self._idle.done():
            self._idle.set_result(None)

    def waiter(self, flight: Flight) -> asyncio.Future[None] | None:
        """What to await until a flight is no longer under way (ended, or parked by its deadline), then ask again."""
        if flight.state not in _ACTIVE:
            return None
        waiter: asyncio.Future[None] = self._loop.create_future()
        flight.waiters.append(waiter)
        return waiter

    # ------------------------------------------------------------ deadlines

    def _arm(self, at: float) -> None:
        if self._sweep is not None:
            self._sweep.cancel()
        self._sweep_at = at
        self._sweep = self._loop.call_at(at, self._sweep_deadlines)

    def _sweep_deadlines(self) -> None:
        self._sweep = None
        now = self._loop.time()
        for flight in [flight for flight in self._active if flight.deadline <= now]:
            self.park(flight, timeout_error(flight.error))
        if self._active and self._sweep is None:
            self._arm(min(flight.deadline for flight in self._active))

    # ------------------------------------------------------------ the end

    async def wait_idle(self, deadline: float) -> None:
        """Wait until nothing is under way, or until the deadline."""
        if self._active:
            self._idle = self._loop.create_future()
            try:
                async with asyncio.timeout_at(deadline):
                    await self._idle
            except TimeoutError:
                pass

    def close(self) -> None:
        """Park what is under way; nothing can be started any more."""
        self._closed = True
        error = UnavailableError("the client was closed", code=ErrorCode.CLOSED, retriable=False)
        for flight in [*self._active]:
            self.park(flight, error)
        for granted, _ in self._admissions:
            if not granted.done():
                granted.set_exception(error)
        self._admissions.clear()
        if self._sweep is not None:
            self._sweep.cancel()
            self._sweep = None


def _merge(flight: Flight, receipt: Receipt) -> None:
    """Add a receipt to what is known of a chunk: a partition that was resolved once stays as it was."""
    chunk = flight.chunk
    count = chunk.body.event_count
    if chunk.answered and receipt.partition_count != chunk.partition_count:
        raise RemoteProtocolError("the number of partitions has changed")
    if any(not 0 <= outcome.index < count for outcome in receipt.outcomes):
        raise RemoteProtocolError("an outcome is of no event of the chunk")
    failing = {failure.partition for failure in receipt.failures}
    before = chunk.unresolved if chunk.answered else None
    fresh: dict[int, PartitionRun | None] = {run.partition: run for run in receipt.runs}
    for outcome in receipt.outcomes:
        fresh.setdefault(outcome.partition, None)
    for partition, run in fresh.items():
        if partition in failing or partition in chunk.runs:
            continue
        chunk.runs[partition] = run
        chunk.outcomes[partition] = [o for o in receipt.outcomes if o.partition == partition]
    chunk.outcomes = {partition: entries for partition, entries in chunk.outcomes.items() if entries}
    still = frozenset(failing - chunk.runs.keys())
    if before is not None:
        # What failed before and is not named now was not said to be resolved either.
        still |= before - chunk.runs.keys()
    chunk.unresolved = still
    certain = not flight.ambiguous and not flight.link_tries  # no other try can have stored anything
    chunk.dropped = frozenset(
        failure.partition
        for failure in receipt.failures
        if failure.partition in still and failure.not_stored and certain
    )
    chunk.partition_count = receipt.partition_count
    chunk.answered = True


def _check_complete(chunk: ChunkState) -> None:
    """Refuse a receipt that says nothing about some event: it would be taken for stored."""
    if chunk.partition_count < 1:
        raise RemoteProtocolError("the receipt names no number of partitions")
    if chunk.unresolved:
        return
    told = 0
    for partition, run in chunk.runs.items():
        told += run.count if run is not None else len(chunk.outcomes[partition])
    if told != chunk.body.event_count:
        # Nothing of it is believed, so that the next answer is read afresh.
        chunk.answered = False
        chunk.runs, chunk.outcomes = {}, {}
        raise RemoteProtocolError(f"the receipt is for {told} of {chunk.body.event_count} events")


def timeout_error(last: TallymarkError | None) -> TallymarkError:
    """The error for a chunk that wasn't resolved in time, by why its last try failed."""
    if last is None:
        return UnavailableError("no receipt within the timeout", code=ErrorCode.TIMEOUT)
    message = f"no receipt within the timeout: {last.message}"
    kind = BackpressureError if last.code in _PRESSURE else UnavailableError
    return kind(message, code=last.code, details=last.details)


def _expired() -> TallymarkError:
    return OutcomeUnknownError(
        f"a chunk that was first sent over {RETRY_SECONDS_MAX / 60:.0f} minutes ago can't be retried safely any more"
    )
