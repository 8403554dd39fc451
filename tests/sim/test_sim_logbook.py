"""The model that logs are held against: it accepts what is right and notices each way of being wrong."""

from __future__ import annotations

import google_crc32c
import numpy as np
import pytest

from tallymark_ingest.split import split
from tallymark_protocol.chunk import encode_events
from tallymark_protocol.model import Event
from tallymark_store import batch

from .logbook import ACCEPTED, CONFLICT, DUPLICATE, REPEAT, Model, parse_batch
from .loop import SimulationError


def chunk(sequence: int, *events: Event) -> bytes:
    return encode_events(list(events), 7, sequence, 1_000).chunks[0].data


def logged(
    base: int, chunks: list[bytes], verdicts: list[int] | None = None, originals: tuple[int, ...] = ()
):
    """A record's body as a leader would write it, taken apart again."""
    (payload,) = split(chunks, 1).payloads
    data = payload.data.tobytes()
    column = None if verdicts is None else np.array(verdicts, dtype=np.uint8)
    prefix = batch.encode_prefix(
        google_crc32c.value(data), payload.event_count, column, np.array(originals, dtype=np.int64)
    )
    return parse_batch(base, np.frombuffer(prefix + data, dtype=np.uint8))


A = Event(1, "m", 10, id="a")
B = Event(2, "n", 11)
A_OTHER = Event(1, "m", 12, id="a")


def test_sim_logbook_reads_batches() -> None:
    """Everything that a batch holds is read as it was sent."""
    found = logged(5, [chunk(0, A, B), chunk(1, B)])
    assert [(e.offset, e.account, e.metric, e.value, bool(e.id)) for e in found.events] == [
        (5, 1, "m", 10, True),
        (6, 2, "n", 11, False),
        (7, 2, "n", 11, False),
    ]
    assert [(c.producer, c.sequence, c.start, c.count) for c in found.chunks] == [(7, 0, 0, 2), (7, 1, 2, 1)]


def test_sim_logbook_right_log() -> None:
    """Duplicates, conflicts and repeats, each judged as it should be; totals count the accepted ones."""
    model = Model(0)
    model.take(logged(0, [chunk(0, A, B)]))
    model.take(logged(2, [chunk(1, A, A_OTHER)], [DUPLICATE, CONFLICT], (0, 0)))
    model.take(logged(4, [chunk(1, A, A_OTHER), chunk(2, B)], [REPEAT, REPEAT, ACCEPTED]))
    assert model.totals == {(1, "m"): (1, 10), (2, "n"): (2, 22)}
    assert model.chunks[7, 1] == (2, ((0, DUPLICATE, 0), (1, CONFLICT, 0)))
    assert model.chunks[7, 2] == (6, ())


@pytest.mark.parametrize(
    ("chunks", "verdicts", "originals"),
    [
        pytest.param([chunk(0, A, B)], None, (), id="chunk stored twice"),
        pytest.param([chunk(1, A)], None, (), id="id stored twice"),
        pytest.param([chunk(1, A_OTHER)], [DUPLICATE], (0,), id="conflict taken for a duplicate"),
        pytest.param([chunk(1, A)], [DUPLICATE], (1,), id="wrong original"),
        pytest.param([chunk(1, B)], [REPEAT], (), id="new chunk taken for a repeat"),
        pytest.param([chunk(1, B)], [DUPLICATE], (1,), id="duplicate without an id"),
    ],
)
def test_sim_logbook_wrong_log(
    chunks: list[bytes], verdicts: list[int] | None, originals: tuple[int, ...]
) -> None:
    """What must not be in a log is noticed."""
    model = Model(0)
    model.take(logged(0, [chunk(0, A, B)]))
    with pytest.raises(SimulationError, match="DEDUP-1"):
        model.take(logged(2, chunks, verdicts, originals))
