"""Kernels over several event batches at once: what a call into compiled code costs is then paid once for all.

The batches of a **run** are small, belong to one partition, follow each other in its log, and lie in one buffer.
`places` has a row of `PLACE_FIELDS` numbers a batch.
"""

from __future__ import annotations

from typing import Any

import numba as nb
import numpy as np

from tallymark_protocol.errors import Reason
from tallymark_protocol.kernels.intrinsics import load_u32, load_u64
from tallymark_protocol.layout import CHUNK_ENTRY_BYTES
from tallymark_protocol.payload import C_CHUNK_TABLE, C_CHUNKS, C_EVENTS, OK, place_payload
from tallymark_store.fold.compiling import kernel
from tallymark_store.fold.kernel import fold_events

P_PAYLOAD = 0  # where the payload begins in the buffer
P_PAYLOAD_BYTES = 1
P_VERDICTS = 2  # where the verdicts begin in the buffer
P_VERDICTS_END = 3  # equal to their beginning where all events are accepted
P_BASE = 4  # the base offset
P_APPEND_NS = 5
P_SLOTS = 6  # where the batch's metric slots begin
P_SLOTS_END = 7
PLACE_FIELDS = 8

ROW_WORDS = 6  # of a chunk, as the producer windows take it: producer, sequence, checksum | count << 32, ...
_REPEAT = int(Reason.REPEAT)


@nb.njit(nogil=True, cache=True)
def place_run(data: Any, places: Any, columns: Any) -> Any:
    """Fill a row of `columns` for each batch; returns the first status that is not OK, or OK."""
    for r in range(len(places)):
        status = place_payload(data, places[r, P_PAYLOAD], places[r, P_PAYLOAD_BYTES], columns[r])
        if status != OK:
            return status
    return OK


@nb.njit(nogil=True, cache=True)
def chunks_of_run(data: Any, places: Any, columns: Any, rows: Any) -> Any:
    """Fill a row for each chunk that is no repeat; returns how many there are, or -1 where counts don't add up."""
    found = 0
    for r in range(len(places)):
        marks = places[r, P_VERDICTS]
        marked = places[r, P_VERDICTS_END] > marks
        at = columns[r, C_CHUNK_TABLE]
        first = np.int64(0)
        for _ in range(columns[r, C_CHUNKS]):
            count = np.int64(load_u32(data, at + 28))
            if count < 1 or first + count > columns[r, C_EVENTS]:
                return -1
            if not marked or data[marks + first] != _REPEAT:
                rows[found, 0] = load_u64(data, at)
                rows[found, 1] = load_u64(data, at + 8)
                rows[found, 2] = load_u64(data, at + 24)
                rows[found, 3] = np.uint64(places[r, P_BASE] + first)
                rows[found, 4] = np.uint64(places[r, P_BASE])
                rows[found, 5] = np.uint64(places[r, P_APPEND_NS])
                found += 1
            first += count
            at += CHUNK_ENTRY_BYTES
    return found


@kernel
def fold_run(
    data: Any,
    columns: Any,
    places: Any,
    batch: Any,
    first: Any,
    metric_slots: Any,
    has_dimensions: Any,
    schemas: Any,
    dims: Any,
    state: Any,
    scratch: Any,
    seed: Any,
) -> Any:
    """Fold a run from event `first` of batch `batch` on, as `fold_events` does each of them.

    `has_dimensions` says whether some metric of it has any. Returns the batch and the event in it to go on with; at the end, the number of batches and 0.
    """
    memo = scratch.memo
    while batch < len(places):
        if has_dimensions and first == 0:
            for i in range(len(memo)):  # it knows a payload's sets by their place in it
                memo[i, 0] = -1
                memo[i, 1] = -1
        first = fold_events(
            data,
            columns[batch],
            data[places[batch, P_VERDICTS] : places[batch, P_VERDICTS_END]],
            first,
            places[batch, P_BASE],
            places[batch, P_APPEND_NS],
            metric_slots[places[batch, P_SLOTS] : places[batch, P_SLOTS_END]],
            schemas,
            dims,
            state,
            scratch,
            seed,
        )
        if first < columns[batch, C_EVENTS]:
            break
        first = np.int64(0)
        batch += 1
    return batch, first
