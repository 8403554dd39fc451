"""Runs of records: small event batches of one partition that are folded together.

Owns what may go into a run, and how one is put together: its records' bytes lie behind each other in one buffer, and
each step of the judge and the fold takes all of them in one call. What comes of it is the same as record by record.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np

from tallymark_protocol.errors import RemoteProtocolError
from tallymark_protocol.payload import C_CHUNKS, C_EVENTS, COLUMNS, OK, explain
from tallymark_store import batch
from tallymark_store.fold.runs import (
    P_APPEND_NS,
    P_BASE,
    P_PAYLOAD,
    P_PAYLOAD_BYTES,
    P_VERDICTS,
    P_VERDICTS_END,
    PLACE_FIELDS,
    ROW_WORDS,
    chunks_of_run,
    place_run,
)
from tallymark_store.prepared import Bytes, FoldItem, Ints, Words
from tallymark_store.wal import RecordMeta

RUN_RECORDS_MAX: Final = 64
RUN_BYTES_MAX: Final = 256 * 1024  # of bodies; folding so much takes a few milliseconds
RUN_BODY_BYTES_MAX: Final = 32 * 1024  # of one: above it, there is nothing to be saved


class Run(NamedTuple):
    """A run, its batches placed."""

    data: Bytes
    columns: Ints  # a row for each batch
    places: Ints  # likewise; see `fold.runs`
    end_offset: int
    append_ns: int  # of the last batch
    events: int
    payload_bytes: int
    originals: Sequence[Ints] = ()  # of each batch, in order; not of batches that were appended here

    def chunks(self) -> Words:
        """What the producer windows are to remember of it.

        Raises:
            RemoteProtocolError: a chunk table does not add up.
        """
        rows = np.empty((int(self.columns[:, C_CHUNKS].sum()), ROW_WORDS), dtype=np.uint64)
        count = int(chunks_of_run(self.data, self.places, self.columns, rows))
        if count < 0:
            raise RemoteProtocolError("malformed logged payload: its chunk table does not add up")
        return rows[:count]

    def verdicts(self, number: int) -> Bytes | None:
        """A copy of the verdicts of a batch; None: all its events are accepted."""
        _, _, start, end = self.places[number, : P_VERDICTS_END + 1].tolist()
        return None if start == end else self.data[start:end].copy()


def of_records(records: Sequence[tuple[RecordMeta, Bytes]]) -> Run:
    """Make a run of records of event batches, as they lie in the log.

    Raises:
        RemoteProtocolError: one of them makes no sense to this version.
    """
    places: list[tuple[int, ...]] = []
    start = 0
    counts = []
    originals = []
    for meta, body in records:
        view = batch.parse(body, 0, len(body))
        if view.event_count != meta.count:
            raise RemoteProtocolError(
                f"the batch at offset {meta.base_offset} does not hold {meta.count} events"
            )
        counts.append(meta.count)
        originals.append(view.originals)
        marks = start + batch.PREFIX_BYTES
        marks_end = marks if view.verdicts is None else marks + view.event_count
        places.append(
            (start + view.payload_base, view.payload_length, marks, marks_end, *_stamp(meta)),
        )
        start += len(body)
    return _place(b"".join([body.data for _, body in records]), places, counts)._replace(originals=originals)


def of_items(items: Sequence[FoldItem]) -> Run:
    """Make a run of batches that were appended here."""
    places: list[tuple[int, ...]] = []
    parts: list[bytes | memoryview] = []
    start = 0
    counts = []
    for item in items:
        size = len(item.data)
        parts.append(item.data.data)
        marks = marks_end = start + size
        if item.verdicts is not None:
            parts.append(item.verdicts.data)
            marks_end = marks + len(item.verdicts)
        places.append((start, size, marks, marks_end, *_stamp(item)))
        counts.append(item.end_offset - item.base_offset)
        start = marks_end
    return _place(b"".join(parts), places, counts)


def _stamp(record: RecordMeta | FoldItem) -> tuple[int, int, int, int]:
    """The later fields of a place."""
    return record.base_offset, record.append_ns, 0, 0


def _place(data: bytes, places: list[tuple[int, ...]], counts: list[int]) -> Run:
    table = np.array(places, dtype=np.int64)
    assert table.shape[1] == PLACE_FIELDS
    columns = np.zeros((len(places), COLUMNS), dtype=np.int64)
    buffer = np.frombuffer(data, dtype=np.uint8)
    status = int(place_run(buffer, table, columns))
    if status != OK:
        raise explain(status, "logged payload")
    if columns[:, C_EVENTS].tolist() != counts:
        raise RemoteProtocolError(
            f"the batches from offset {places[0][P_BASE]} on do not hold the events that their records say"
        )
    return Run(
        buffer,
        columns,
        table,
        places[-1][P_BASE] + counts[-1],
        places[-1][P_APPEND_NS],
        sum(counts),
        sum([place[P_PAYLOAD_BYTES] for place in places]),
    )


assert (P_PAYLOAD, P_PAYLOAD_BYTES, P_VERDICTS, P_VERDICTS_END) == (0, 1, 2, 3)
