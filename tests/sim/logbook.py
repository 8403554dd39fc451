"""Reading logs without the engine's judge: what every record of a partition holds, and what it should hold.

`parse_batch` takes an event batch apart by the layout's own words. `Model` says what the verdicts must be: a plain
dictionary of ids and of chunks, in log order.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import numpy as np

from tallymark_protocol import layout
from tallymark_protocol.errors import Reason
from tallymark_protocol.payload import (
    C_ACCOUNT,
    C_ACCOUNT_ENCODING,
    C_CHUNK_TABLE,
    C_CHUNKS,
    C_EVENTS,
    C_ID_BYTES,
    C_ID_ENCODING,
    C_ID_ENDS,
    C_METRIC,
    C_METRIC_ENCODING,
    C_OPERATION,
    C_OPERATION_ENCODING,
    C_VALUE,
    C_VALUE_ENCODING,
    COLUMNS,
    OK,
    metric_codes,
    place_payload,
)
from tallymark_store import batch

from .loop import SimulationError

ACCEPTED = int(Reason.ACCEPTED)
DUPLICATE = int(Reason.DUPLICATE)
CONFLICT = int(Reason.CONFLICT)
REPEAT = int(Reason.REPEAT)
SEATS = "seats"  # the metric that counts unique values


class LoggedChunk(NamedTuple):
    """An entry of a batch's chunk table."""

    producer: int
    sequence: int
    start: int  # of its events in the batch
    count: int


class LoggedEvent(NamedTuple):
    """One event of a batch."""

    offset: int
    account: int
    metric: str
    value: int
    id: bytes
    verdict: int
    original: int  # offset of the first one, of a duplicate or a conflict; else -1
    operation: int = 0


class LoggedBatch(NamedTuple):
    """An event batch."""

    base: int
    chunks: list[LoggedChunk]
    events: list[LoggedEvent]


def _column(
    data: np.ndarray, columns: np.ndarray, at: int, encoding: int, letter: str, absent: int
) -> list[int]:
    n = int(columns[C_EVENTS])
    start = int(columns[at])
    size = struct.calcsize(letter)
    if columns[encoding] == layout.ABSENT:
        return [absent] * n
    if columns[encoding] == layout.CONSTANT:
        return list(struct.unpack_from(f"<{letter}", data[start : start + size].tobytes())) * n
    return list(struct.unpack(f"<{n}{letter}", data[start : start + n * size].tobytes()))


def parse_batch(base: int, body: np.ndarray) -> LoggedBatch:
    """Take a logged event batch apart."""
    view = batch.parse(body, 0, len(body))
    columns = np.zeros(COLUMNS, dtype=np.int64)
    if place_payload(view.data, view.payload_base, view.payload_length, columns) != OK:
        raise SimulationError(f"the batch at {base} is malformed")
    data = view.data
    n = int(columns[C_EVENTS])
    accounts = _column(data, columns, C_ACCOUNT, C_ACCOUNT_ENCODING, "Q", 0)
    values = _column(data, columns, C_VALUE, C_VALUE_ENCODING, "q", 1)
    operations = _column(data, columns, C_OPERATION, C_OPERATION_ENCODING, "B", 0)
    codes = metric_codes(data, columns)
    metrics = _column(data, columns, C_METRIC, C_METRIC_ENCODING, "H", 0)
    ids = [b""] * n
    if columns[C_ID_ENCODING] == layout.PLAIN:
        ends = _column(data, columns, C_ID_ENDS, C_ID_ENCODING, "I", 0)
        start = int(columns[C_ID_BYTES])
        ids = [
            data[start + first : start + last].tobytes()
            for first, last in zip([0, *ends[:-1]], ends, strict=True)
        ]
    verdicts = [ACCEPTED] * n if view.verdicts is None else view.verdicts.tolist()
    originals = iter(view.originals.tolist())
    events = [
        LoggedEvent(
            base + i,
            accounts[i],
            codes[metrics[i]],
            values[i],
            ids[i],
            verdicts[i],
            next(originals) if verdicts[i] in (DUPLICATE, CONFLICT) else -1,
            operations[i],
        )
        for i in range(n)
    ]
    table = data[int(columns[C_CHUNK_TABLE]) :][: layout.CHUNK_ENTRY_BYTES * int(columns[C_CHUNKS])].tobytes()
    chunks = []
    start = 0
    for entry in layout.CHUNK_ENTRY.iter_unpack(table):
        chunks.append(LoggedChunk(entry[0], entry[1], start, entry[4]))
        start += entry[4]
    return LoggedBatch(base, chunks, events)


class Model:
    """What a partition's log must say of each event, and what its accepted events add up to."""

    def __init__(self, partition: int) -> None:
        self.partition = partition
        self.chunks: dict[tuple[int, int], tuple[int, tuple[tuple[int, int, int], ...]]] = {}
        self.totals: dict[tuple[int, str], tuple[int, int]] = {}  # (account, metric) -> count, sum
        self._ids: dict[tuple[int, str, bytes], LoggedEvent] = {}

    def take(self, logged: LoggedBatch) -> None:
        """Check the next batch against what was before it.

        Raises:
            SimulationError: it says what it must not.
        """
        repeats: set[int] = set()
        fresh: list[LoggedChunk] = []
        for chunk in logged.chunks:
            events = logged.events[chunk.start : chunk.start + chunk.count]
            known = (chunk.producer, chunk.sequence) in self.chunks or any(
                (chunk.producer, chunk.sequence) == (c.producer, c.sequence) for c in fresh
            )
            marked = [event.verdict == REPEAT for event in events]
            if all(marked) != known or any(marked) != known:
                raise SimulationError(
                    f"DEDUP-1: partition {self.partition} holds chunk {chunk.producer % 10_000}/{chunk.sequence} at "
                    f"{logged.base + chunk.start}, which {'was' if known else 'was not'} there before, as "
                    f"{'a repeat' if any(marked) else 'a new one'}"
                )
            if known:
                repeats.update(range(chunk.start, chunk.start + chunk.count))
            else:
                fresh.append(chunk)
        for i, event in enumerate(logged.events):
            if i not in repeats:
                self._judge(event)
        for chunk in fresh:
            events = logged.events[chunk.start : chunk.start + chunk.count]
            exceptions = tuple(
                (k, event.verdict, event.original)
                for k, event in enumerate(events)
                if event.verdict != ACCEPTED
            )
            self.chunks[chunk.producer, chunk.sequence] = (logged.base + chunk.start, exceptions)

    def _judge(self, event: LoggedEvent) -> None:
        key = (event.account, event.metric, event.id)
        first = self._ids.get(key) if event.id else None
        verdict, original = ACCEPTED, -1
        if first is not None:
            verdict = DUPLICATE if first.value == event.value else CONFLICT
            original = first.offset
        if (event.verdict, event.original) != (verdict, original):
            raise SimulationError(
                f"DEDUP-1: partition {self.partition} says {event.verdict} of {event.original} about the event at "
                f"{event.offset}, which is {verdict} of {original}"
            )
        if verdict == ACCEPTED:
            if event.id:
                self._ids[key] = event
            count, total = self.totals.get((event.account, event.metric), (0, 0))
            if event.metric != SEATS:
                total += event.value  # of others, only how many there are is told by a sum
            self.totals[event.account, event.metric] = (count + 1, total)
