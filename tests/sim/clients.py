"""Clients behind gateways, and the ledger of what they were told.

A client makes chunks as the SDK does; a gateway splits them by partition with the real splitter, sometimes several
of them together, and sends each payload to whom it believes to lead. Whatever is not answered in time, or is
answered with a retriable error, is sent again: the same chunk, alone or in other company, to the same store or
another. Now and then a chunk that was answered is sent once more, to see whether the answer is the same.

Every event of a sum has a value of its own, so that the log's events can be told apart; values are added to sets and
taken away. Event ids repeat, with the same content and with other content.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, NamedTuple

import google_crc32c

from tallymark_ingest.split import split
from tallymark_protocol.chunk import encode_events
from tallymark_protocol.codec import decode, encode
from tallymark_protocol.errors import ErrorCode, WireError, to_wire
from tallymark_protocol.frames import Frame
from tallymark_protocol.messages import Appended, AppendHeader, FrameType
from tallymark_protocol.model import Event, OperationType

from .logbook import SEATS
from .loop import MILLISECOND, SimulationError, World
from .loop import Event as Timer
from .network import Network
from .trace import Trace

METRIC_COUNT = 3
ACCOUNTS = 12
SEATS_SHARE = 0.15  # of events that add a value to a set, or take it away
SEAT_COUNT = 5
PARTS_MAX = 4  # of chunks in one payload
_APPEND = int(FrameType.APPEND)
_ERROR = int(FrameType.ERROR)


class SimEvent(NamedTuple):
    """One event as it was sent."""

    account: int
    metric: str
    value: int  # of this event alone, unless it repeats another
    id: str | None
    operation: OperationType = OperationType.NONE


class Part:
    """A chunk's events for one partition: what is answered as a whole.

    Attributes:
        outcome: what the first answer said, (first offset, exceptions); None while there is none.
    """

    __slots__ = ("answers", "attempts", "chunk", "events", "is_async", "outcome", "partition")

    def __init__(self, chunk: Chunk, partition: int, events: list[SimEvent], *, is_async: bool) -> None:
        self.chunk = chunk
        self.partition = partition
        self.events = events
        self.is_async = is_async
        self.outcome: tuple[int, tuple[tuple[int, int, int], ...]] | None = None
        self.answers = 0
        self.attempts = 0

    @property
    def identity(self) -> tuple[int, int]:
        """Producer and sequence."""
        return self.chunk.producer, self.chunk.sequence

    def __repr__(self) -> str:
        return f"{self.chunk.producer % 10_000}/{self.chunk.sequence}@{self.partition}"


class Chunk:
    """What one call sends."""

    __slots__ = ("data", "parts", "producer", "sequence")

    def __init__(self, producer: int, sequence: int, data: bytes) -> None:
        self.producer = producer
        self.sequence = sequence
        self.data = data
        self.parts: dict[int, Part] = {}


class Ledger:
    """Everything that was sent, and what was answered."""

    def __init__(self) -> None:
        self.parts: dict[tuple[int, int, int], Part] = {}  # by producer, sequence, partition
        self.acknowledged = 0  # events in parts that were answered
        self.asked = 0
        self.answers = 0
        self.repeats = 0

    def pending(self) -> list[Part]:
        """What has no answer yet."""
        return [part for part in self.parts.values() if part.outcome is None]


class Connection:
    """What a store answers to: one request's way back."""

    def __init__(self, answer: Callable[[int, bytes], None]) -> None:
        self._answer = answer
        self.id = 0
        self.in_flight = 1

    def respond(self, request_id: int, kind: int, body: Any, *more: Any) -> None:
        self._answer(kind, b"".join(bytes(part) for part in (body, *more)))

    def respond_error(self, request_id: int, error: BaseException | WireError) -> None:
        self._answer(_ERROR, encode(error if isinstance(error, WireError) else to_wire(error)))


class Clients:
    """All clients of a run.

    Args:
        targets: the stores' names.
        deliver: hands a store a request: (name, connection, frame).
        believed: who is thought to lead a partition, as one gateway or another has it; "" where nobody is.
        on_answer: told of each part's first answer.
        now_ns: the clients' wall clock.
        metrics_revision: what gateways name in their appends.
    """

    def __init__(
        self,
        world: World,
        network: Network,
        rng: random.Random,
        trace: Trace,
        ledger: Ledger,
        *,
        partition_count: int,
        targets: list[str],
        deliver: Callable[[str, Connection, Frame], None],
        believed: Callable[[int], str],
        on_answer: Callable[[Part], None],
        now_ns: Callable[[], int],
        metrics_revision: Callable[[], int],
        client_count: int = 3,
        is_async: float = 0.0,
    ) -> None:
        self.acknowledged: list[Part] = []  # in the order of their answers
        self.is_calm = False  # every answered chunk stays answered: nothing is sent again to see
        self._world = world
        self._network = network
        self._rng = rng
        self._trace = trace
        self._ledger = ledger
        self._partition_count = partition_count
        self._targets = targets
        self._deliver = deliver
        self._believed = believed
        self._on_answer = on_answer
        self._now_ns = now_ns
        self._metrics_revision = metrics_revision
        self._async = is_async
        self._producers = [rng.getrandbits(64) for _ in range(client_count)]
        self._sequences = [0] * client_count
        self._next_value = 1
        # Payloads by partition and chunks: the same chunks in the same order are split the same way each time.
        self._payloads: dict[tuple[Any, ...], tuple[list[int], bytes, int]] = {}
        self._with_ids: list[SimEvent] = []
        self._request = 0

    # ------------------------------------------------------------ making chunks

    def send(self, client: int) -> Chunk:
        """Make a chunk and begin to send it."""
        rng = self._rng
        events = [self._event() for _ in range(rng.choice((1, 1, 2, 3, 6)))]
        is_async = rng.random() < self._async
        sequence = self._sequences[client]
        self._sequences[client] += 1
        producer = self._producers[client]
        encoded = encode_events(
            [Event(e.account, e.metric, e.value, operation_type=e.operation, id=e.id) for e in events],
            producer,
            sequence,
            self._now_ns(),
            1 if is_async else 0,
        )
        chunk = Chunk(producer, sequence, encoded.chunks[0].data)
        found = split([chunk.data], self._partition_count)
        for payload in found.payloads:
            chosen = [events[i] for i in found.indexes(0, payload.partition).tolist()]
            part = chunk.parts[payload.partition] = Part(chunk, payload.partition, chosen, is_async=is_async)
            self._ledger.parts[producer, sequence, payload.partition] = part
            self._ledger.asked += len(chosen)
        for partition in sorted(chunk.parts):
            self._attempt([chunk], partition, 1)
        return chunk

    def _event(self) -> SimEvent:
        rng = self._rng
        kind = rng.random()
        if rng.random() < SEATS_SHARE:
            operation = rng.choice(list(OperationType))
            return SimEvent(rng.randrange(ACCOUNTS), SEATS, rng.randrange(SEAT_COUNT), None, operation)
        if kind < 0.15 and self._with_ids:
            return rng.choice(self._with_ids)  # the same again: a duplicate, wherever it goes
        event = SimEvent(rng.randrange(ACCOUNTS), f"m{rng.randrange(METRIC_COUNT)}", self._next_value, None)
        self._next_value += 1
        if kind < 0.22 and self._with_ids:
            other = rng.choice(self._with_ids)
            return SimEvent(other.account, other.metric, event.value, other.id)  # a conflict
        if kind < 0.6:
            event = event._replace(id=f"id-{event.value}")
            self._with_ids.append(event)
        return event

    # ------------------------------------------------------------ sending

    def _attempt(self, chunks: list[Chunk], partition: int, own: int) -> None:
        """Send the chunks' parts for a partition in one payload, and look after the first `own` of them.

        The others only come along: somebody else looks after them, so that retries don't multiply.
        """
        rng = self._rng
        owned = [chunk.parts[partition] for chunk in chunks[:own]]
        if len(chunks) > 1:
            chunks = rng.sample(chunks, len(chunks))
        target = self._believed(partition)
        if not target or rng.random() < 0.1:
            target = rng.choice(self._targets)
        order, data, checksum = self._payload(chunks, partition)
        parts = [chunks[i].parts[partition] for i in order]
        for part in owned:
            part.attempts += 1
        header = encode(
            AppendHeader(partition, checksum, all(part.is_async for part in parts), self._metrics_revision())
        )
        body = len(header).to_bytes(2, "little") + header + data
        self._request += 1
        request = self._request
        gateway = f"gateway{request % 2}"
        timer: list[Timer] = []

        def answered(kind: int, body: bytes) -> None:
            self._network.send(
                target, gateway, self._answered, target, parts, owned, kind, body, timer, is_datagram=False
            )

        timeout_ns = int(rng.uniform(150, 900)) * MILLISECOND
        timer.append(self._world.after(timeout_ns, self._late, target, owned))
        frame = Frame(_APPEND, 0, request, 0, body)
        self._trace(gateway, "asks %s to store %s", target, parts)
        self._network.send(
            gateway, target, self._deliver, target, Connection(answered), frame, is_datagram=False
        )

    def _payload(self, chunks: list[Chunk], partition: int) -> tuple[list[int], bytes, int]:
        """The chunks' payload for a partition: the places of the chunks in it, its bytes, their checksum."""
        company = (partition, *chunks)
        known = self._payloads.get(company)
        if known is None:
            found = split([chunk.data for chunk in chunks], self._partition_count)
            payload = next(p for p in found.payloads if p.partition == partition)
            data = payload.data.tobytes()
            known = self._payloads[company] = (payload.chunks, data, google_crc32c.value(data))
        return known

    def _late(self, target: str, parts: list[Part]) -> None:
        self._trace("clients", "no answer of %s about %s in time", target, parts)
        self._again(parts)

    def _again(self, parts: list[Part]) -> None:
        """Send what has no answer again: alone, in the same company, or with others that wait."""
        rng = self._rng
        left = [part for part in parts if part.outcome is None]
        if not left:
            return
        partition = left[0].partition
        groups = [left] if rng.random() < 0.6 else [[part] for part in left]
        for group in groups:
            others: list[Part] = []
            if rng.random() < 0.3:
                others = [
                    part
                    for part in self._ledger.parts.values()
                    if part.partition == partition
                    and part not in group
                    and (part.outcome is None or (not self.is_calm and rng.random() < 0.1))
                ]
                others = rng.sample(others, min(len(others), max(PARTS_MAX - len(group), 0)))
            longest = min(40 * 2 ** max(part.attempts for part in group), 500)
            delay = int(rng.uniform(5, longest)) * MILLISECOND
            chunks = [part.chunk for part in (*group, *others)]
            self._world.after(delay, self._attempt, chunks, partition, len(group))

    def repeat(self) -> None:
        """Send something that was answered once more."""
        answered = [part for part in self._ledger.parts.values() if part.outcome is not None]
        if answered:
            part = self._rng.choice(answered[-40:])
            self._ledger.repeats += 1
            self._attempt([part.chunk], part.partition, 1)

    # ------------------------------------------------------------ answers

    def _answered(
        self,
        target: str,
        parts: list[Part],
        owned: list[Part],
        kind: int,
        body: bytes,
        timer: list[Timer],
    ) -> None:
        is_late = timer[0].call is None  # its part was sent again already
        timer[0].cancel()
        self._ledger.answers += 1
        if kind == _ERROR:
            error = decode(WireError, body)
            self._trace("clients", "%s says of %s: %s", target, parts, error.message)
            self._refused(target, [] if is_late else owned, error)
            return
        answer = decode(Appended, body)
        base = answer.base_offset
        for i, part in enumerate(parts):
            if answer.chunks is None:
                outcome = (base, ())
                base += len(part.events)
            else:
                chunk = answer.chunks[i]
                if chunk.error is not None:
                    self._refused(target, [part] if part in owned and not is_late else [], chunk.error)
                    continue
                outcome = (chunk.base_offset, tuple(tuple(e) for e in chunk.exceptions))
            self._take(target, part, outcome)

    def _take(self, target: str, part: Part, outcome: tuple[int, tuple[Any, ...]]) -> None:
        part.answers += 1
        if part.outcome is None:
            part.outcome = outcome
            self._ledger.acknowledged += len(part.events)
            self._trace(
                "clients", "%s has stored %s at %d, %d otherwise", target, part, outcome[0], len(outcome[1])
            )
            self.acknowledged.append(part)
            self._on_answer(part)
        elif part.is_async:
            part.outcome = outcome  # the first one said that it was taken, not that it was stored
        elif part.outcome != outcome:
            raise SimulationError(
                f"DEDUP-1: {part} was answered {part.outcome} first, and now {outcome} by {target}"
            )

    def _refused(self, target: str, parts: list[Part], error: WireError) -> None:
        if error.code in _NEVER:
            raise SimulationError(
                f"{target} answered {parts or 'something'} with {ErrorCode(error.code).name}, which nothing was done for: {error.message}"
            )
        self._again(parts)


# Nothing that clients do here asks for these.
_NEVER = frozenset(
    int(code)
    for name, code in ErrorCode.__members__.items()
    if name in {"INTERNAL", "SEQUENCE_REUSED", "OUTCOME_UNKNOWN", "MALFORMED", "INVALID_ARGUMENT"}
)
