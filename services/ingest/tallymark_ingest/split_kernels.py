"""The kernel that splits chunks by partition and writes one payload per partition; `split` is its face.

One call for any number of chunks: it counts (`split_plan`), then allocates exactly and writes all payloads side
by side. Work per chunk and partition is a handful of instructions, work per event a few passes over the columns
that are there. All arithmetic is on validated chunks: `validate_chunk` runs first, and a chunk that fails it is
touched no more.
"""

from __future__ import annotations

from typing import Any

import numba as nb
import numpy as np

from tallymark_ingest.split_plan import (
    PLAN_SLOTS,
    T_CHUNKS,
    T_CONSTANTS,
    T_ENCODINGS,
    T_END,
    T_EVENTS,
    T_ID_BYTES,
    T_ID_CONTENT,
    T_METRIC_BYTES,
    T_METRIC_ENDS,
    T_METRICS,
    T_POSITIONS,
    T_SET_BYTES,
    T_SET_ENDS,
    T_SETS,
    T_START,
    T_TEXT_BYTES,
    T_TEXT_CONTENT,
    WIDTHS,
    assign,
    count_content,
    count_metrics,
    count_sets,
    note_column,
    partition_at,
    place,
    unite,
)
from tallymark_protocol import layout as lay
from tallymark_protocol.kernels.intrinsics import (
    copy_bytes,
    load_u16,
    load_u32,
    load_u64,
    store_i64,
    store_u8,
    store_u16,
    store_u32,
    store_u64,
)
from tallymark_protocol.payload import (
    C_ACCOUNT,
    C_ACCOUNT_ENCODING,
    C_EVENTS,
    C_ID_BYTES,
    C_ID_ENCODING,
    C_ID_ENDS,
    C_METRIC_BYTES,
    C_METRIC_ENDS,
    C_METRICS,
    C_PROPERTIES_ENCODING,
    C_PROPERTY_BYTES,
    C_PROPERTY_ENDS,
    C_PROPERTY_SETS,
    C_TEXT_BYTES,
    C_TEXT_ENCODING,
    C_TEXT_ENDS,
    COLUMNS,
    OK,
    metric_at,
    operation_at,
    properties_at,
    validate_chunk,
)

_ENTRY = lay.CHUNK_ENTRY_BYTES
_PAYLOAD_HEADER = lay.PAYLOAD_HEADER_BYTES
_PAYLOAD_MAGIC = lay.PAYLOAD_MAGIC
_TIME_ABSENT_BITS = lay.TIME_ABSENT & (2**64 - 1)


@nb.njit(nogil=True, cache=True)
def _write_table(data: Any, out: Any, position: Any, count: Any, order: Any, spans: Any) -> None:
    content = position + 4 * count
    end = np.int64(0)
    for k in range(count):
        number = np.int64(order[k])
        length = spans[number, 1] - spans[number, 0]
        copy_bytes(out, content + end, data, spans[number, 0], length)
        end += length
        store_u32(out, position + 4 * k, np.uint32(end))


@nb.njit(nogil=True, cache=True)
def _write_head(
    data: Any, out: Any, row: Any, metric_order: Any, codes: Any, set_order: Any, sets: Any
) -> None:
    """A payload's header, its tables and its constants."""
    at = row[T_START]
    encodings = np.int64(0)
    for column in range(8):
        encodings |= row[T_ENCODINGS + column] << (4 * column)
    store_u32(out, at, np.uint32(_PAYLOAD_MAGIC))
    store_u32(out, at + 4, np.uint32(row[T_END] - at))
    store_u32(out, at + 8, np.uint32(row[T_EVENTS]))
    store_u32(out, at + 12, np.uint32(row[T_CHUNKS]))
    store_u32(out, at + 16, np.uint32(encodings))
    store_u16(out, at + 20, np.uint16(row[T_METRICS]))
    store_u16(out, at + 22, np.uint16(0))
    store_u32(out, at + 24, np.uint32(row[T_METRIC_BYTES]))
    store_u32(out, at + 28, np.uint32(row[T_SETS]))
    store_u32(out, at + 32, np.uint32(row[T_SET_BYTES]))
    store_u32(out, at + 36, np.uint32(row[T_ID_BYTES]))
    store_u32(out, at + 40, np.uint32(row[T_TEXT_BYTES]))
    store_u32(out, at + 44, np.uint32(0))
    _write_table(data, out, row[T_METRIC_ENDS], row[T_METRICS], metric_order, codes)
    _write_table(data, out, row[T_SET_ENDS], row[T_SETS], set_order, sets)
    if row[T_ENCODINGS + 2] == 1:
        store_i64(out, row[T_POSITIONS + 2], row[T_CONSTANTS + 2])
    if row[T_ENCODINGS + 3] == 1:
        store_i64(out, row[T_POSITIONS + 3], row[T_CONSTANTS + 3])
    if row[T_ENCODINGS + 4] == 1:
        store_u8(out, row[T_POSITIONS + 4], np.uint8(row[T_CONSTANTS + 4]))
    if row[T_ENCODINGS + 5] == 1:
        store_u32(out, row[T_POSITIONS + 5], np.uint32(row[T_CONSTANTS + 5]))


@nb.njit(nogil=True, cache=True)
def _write_words(
    data: Any,
    columns: Any,
    out: Any,
    part: Any,
    first: Any,
    counts: Any,
    row: Any,
    plan: Any,
    sole: Any,
    column: Any,
    to: Any,
) -> None:
    """One chunk's accounts, values or times: columns of 8 bytes. `row` holds each payload's next event."""
    n = columns[C_EVENTS]
    source = columns[C_ACCOUNT + column]
    if columns[C_ACCOUNT_ENCODING + column] != 2:
        word = np.uint64(1)
        if columns[C_ACCOUNT_ENCODING + column] == 1:
            word = load_u64(data, source)
        elif column == 3:
            word = np.uint64(_TIME_ABSENT_BITS)
        for p in range(len(counts)):
            if plan[p, T_ENCODINGS + column] == 2:
                position = plan[p, T_POSITIONS + column] + 8 * row[p]
                for i in range(counts[p]):
                    store_u64(out, position + 8 * i, word)
        return
    if sole >= 0:
        if plan[sole, T_ENCODINGS + column] == 2:
            copy_bytes(out, plan[sole, T_POSITIONS + column] + 8 * row[sole], data, source, 8 * n)
        return
    for p in range(len(counts)):
        to[p] = plan[p, T_POSITIONS + column] + 8 * row[p] if plan[p, T_ENCODINGS + column] == 2 else -1
    for i in range(n):
        p = partition_at(part, first + i)
        position = to[p]
        if position >= 0:
            store_u64(out, position, load_u64(data, source + 8 * i))
            to[p] = position + 8


@nb.njit(nogil=True, cache=True)
def _write_small(
    data: Any,
    columns: Any,
    out: Any,
    part: Any,
    first: Any,
    row: Any,
    plan: Any,
    metric_to: Any,
    metric_base: Any,
    metric_used: Any,
    set_to: Any,
    set_base: Any,
    set_used: Any,
    column: Any,
    to: Any,
) -> None:
    """One chunk's metric indexes, operations or property indexes."""
    width = WIDTHS[column]
    for p in range(len(row)):
        to[p] = plan[p, T_POSITIONS + column] + width * row[p] if plan[p, T_ENCODINGS + column] == 2 else -1
    for i in range(columns[C_EVENTS]):
        p = partition_at(part, first + i)
        position = to[p]
        if position < 0:
            continue
        to[p] = position + width
        if column == 1:
            number = np.int64(metric_to[metric_base + metric_at(data, columns, i)])
            store_u16(out, position, np.uint16(metric_used[p, number] - 1))
        elif column == 4:
            store_u8(out, position, np.uint8(operation_at(data, columns, i)))
        else:
            k = properties_at(data, columns, i)
            index = np.uint32(0)
            if k > 0:
                index = np.uint32(set_used[p, np.int64(set_to[set_base + k - 1])])
            store_u32(out, position, index)


@nb.njit(nogil=True, cache=True)
def _write_content(
    data: Any,
    columns: Any,
    out: Any,
    part: Any,
    first: Any,
    counts: Any,
    row: Any,
    plan: Any,
    column: Any,
    done: Any,
    to: Any,
) -> None:
    """One chunk's ids or texts. `done` holds the bytes that each payload has of them so far."""
    ends = columns[C_ID_ENDS] if column == 6 else columns[C_TEXT_ENDS]
    source = columns[C_ID_BYTES] if column == 6 else columns[C_TEXT_BYTES]
    content = T_ID_CONTENT if column == 6 else T_TEXT_CONTENT
    if columns[C_ACCOUNT_ENCODING + column] != 2:
        for p in range(len(counts)):
            if plan[p, T_ENCODINGS + column] == 2:
                position = plan[p, T_POSITIONS + column] + 4 * row[p]
                for i in range(counts[p]):
                    store_u32(out, position + 4 * i, np.uint32(done[p]))
        return
    for p in range(len(counts)):
        to[p] = plan[p, T_POSITIONS + column] + 4 * row[p] if plan[p, T_ENCODINGS + column] == 2 else -1
    start = np.int64(0)
    for i in range(columns[C_EVENTS]):
        p = partition_at(part, first + i)
        end = np.int64(load_u32(data, ends + 4 * i))
        # Without a column in the payload, no event of this partition has any.
        if to[p] >= 0:
            copy_bytes(out, plan[p, content] + done[p], data, source + start, end - start)
            done[p] += end - start
            store_u32(out, to[p], np.uint32(done[p]))
            to[p] += 4
        start = end


@nb.njit(nogil=True, cache=True)
def _write_entry(data: Any, base: Any, out: Any, position: Any, count: Any) -> None:
    """A chunk table entry, from the chunk's header at `base`."""
    store_u64(out, position, load_u64(data, base + 16))
    store_u64(out, position + 8, load_u64(data, base + 24))
    store_u64(out, position + 16, load_u64(data, base + 32))
    store_u32(out, position + 24, load_u32(data, base + 4))
    store_u32(out, position + 28, np.uint32(count))
    store_u32(out, position + 32, np.uint32(load_u16(data, base + 44)))
    store_u32(out, position + 36, np.uint32(0))


@nb.njit(nogil=True, cache=True)
def _power_of_two(least: Any) -> Any:
    size = 2
    while size < least:
        size *= 2
    return size


@nb.njit(nogil=True, cache=True)
def _write_events(
    data: Any,
    bounds: Any,
    columns: Any,
    status: Any,
    part: Any,
    firsts: Any,
    counts: Any,
    soles: Any,
    plan: Any,
    metric_to: Any,
    metric_bases: Any,
    metric_used: Any,
    set_to: Any,
    set_bases: Any,
    set_used: Any,
    out: Any,
    entry_chunks: Any,
    entry_counts: Any,
) -> None:
    """Chunk by chunk, the chunk table entries and the columns of every payload."""
    chunks = len(status)
    partition_count = len(plan)
    entry_bases = np.empty(partition_count, dtype=np.int64)
    wanted = np.zeros(8, dtype=np.uint8)  # the columns that some payload has in full
    entry = 0
    for p in range(partition_count):
        for column in range(8):
            if plan[p, T_ENCODINGS + column] == 2:
                wanted[column] = 1
        entry_bases[p] = entry
        entry += plan[p, T_CHUNKS]
    written = np.zeros(partition_count, dtype=np.int64)
    written_chunks = np.zeros(partition_count, dtype=np.int64)
    id_bytes = np.zeros(partition_count, dtype=np.int64)
    text_bytes = np.zeros(partition_count, dtype=np.int64)
    to = np.empty(partition_count, dtype=np.int64)
    for c in range(chunks):
        if status[c] != OK:
            continue
        row = columns[c]
        first = firsts[c]
        for p in range(partition_count):
            if counts[c, p] > 0:
                at = plan[p, T_START] + _PAYLOAD_HEADER + _ENTRY * written_chunks[p]
                _write_entry(data, bounds[c], out, at, counts[c, p])
                entry_chunks[entry_bases[p] + written_chunks[p]] = c
                entry_counts[entry_bases[p] + written_chunks[p]] = counts[c, p]
                written_chunks[p] += 1
        for column in (0, 2, 3):
            if wanted[column]:
                _write_words(data, row, out, part, first, counts[c], written, plan, soles[c], column, to)
        for column in (1, 4, 5):
            if wanted[column]:
                _write_small(
                    data, row, out, part, first, written, plan, metric_to, metric_bases[c], metric_used,
                    set_to, set_bases[c], set_used, column, to,
                )  # fmt: skip
        if wanted[6]:
            _write_content(data, row, out, part, first, counts[c], written, plan, 6, id_bytes, to)
        if wanted[7]:
            _write_content(data, row, out, part, first, counts[c], written, plan, 7, text_bytes, to)
        for p in range(partition_count):
            written[p] += counts[c, p]


@nb.njit(nogil=True, cache=True)
def split_chunks(data: Any, bounds: Any, partition_count: Any, seed: Any) -> Any:
    """Split the chunks `data[bounds[c]:bounds[c+1]]` into a payload per partition.

    Returns:
        facts: int64, one after another: per chunk its status (OK or a BAD_ code of `payload`; one that isn't OK
            is in no payload); chunks+1 positions where each chunk's events begin in `part`; per partition event
            count, entry count and [start, end) of its payload in `out`; per chunk table entry, payload after
            payload, the chunk's number; likewise how many of its events are in that payload.
        part: uint16, the partition of each event, chunk after chunk.
        out: the payloads, side by side.

    One array for all small facts, because every array costs most of a microsecond on its way back to Python.
    """
    chunks = len(bounds) - 1
    columns = np.empty((chunks, COLUMNS), dtype=np.int64)
    status = np.empty(chunks, dtype=np.uint8)
    firsts = np.empty(chunks + 1, dtype=np.int64)
    metric_bases = np.empty(chunks, dtype=np.int64)
    set_bases = np.empty(chunks, dtype=np.int64)
    events = np.int64(0)
    metrics = np.int64(0)
    sets = np.int64(0)
    has_sets = False
    for c in range(chunks):
        state = validate_chunk(data, bounds[c], bounds[c + 1] - bounds[c], columns[c])
        status[c] = state
        firsts[c] = events
        metric_bases[c] = metrics
        set_bases[c] = sets
        if state == OK:
            events += columns[c, C_EVENTS]
            metrics += columns[c, C_METRICS]
            if columns[c, C_PROPERTIES_ENCODING] != 0:
                has_sets = True
                sets += columns[c, C_PROPERTY_SETS]
    firsts[chunks] = events

    part = np.empty(events, dtype=np.uint16)
    counts = np.zeros((chunks, partition_count), dtype=np.int64)
    soles = np.empty(chunks, dtype=np.int64)
    plan = np.zeros((partition_count, PLAN_SLOTS), dtype=np.int64)
    entries = 0
    for c in range(chunks):
        if status[c] != OK:
            continue
        soles[c] = assign(data, columns[c], partition_count, part, firsts[c], counts[c])
        for p in range(partition_count):
            if counts[c, p] > 0:
                plan[p, T_EVENTS] += counts[c, p]
                plan[p, T_CHUNKS] += 1
                entries += 1

    # Metric codes and property sets, numbered across all chunks.
    metric_slots = np.full(_power_of_two(2 * metrics), -1, dtype=np.int32)
    codes = np.empty((metrics, 2), dtype=np.int64)
    metric_to = np.empty(metrics, dtype=np.int32)
    known_metrics = 0
    set_slots = np.full(_power_of_two(2 * sets), -1, dtype=np.int32)
    spans = np.empty((sets, 2), dtype=np.int64)
    set_to = np.empty(sets, dtype=np.int32)
    known_sets = 0
    for c in range(chunks):
        if status[c] != OK:
            continue
        row = columns[c]
        known_metrics = unite(
            data, row[C_METRIC_ENDS], row[C_METRIC_BYTES], row[C_METRICS], metric_slots, codes, known_metrics,
            metric_to, metric_bases[c], seed,
        )  # fmt: skip
        if row[C_PROPERTIES_ENCODING] != 0:
            known_sets = unite(
                data, row[C_PROPERTY_ENDS], row[C_PROPERTY_BYTES], row[C_PROPERTY_SETS], set_slots, spans,
                known_sets, set_to, set_bases[c], seed,
            )  # fmt: skip

    # What each partition uses of them, and which columns it needs.
    metric_used = np.zeros((partition_count, known_metrics), dtype=np.int32)
    metric_order = np.empty((partition_count, known_metrics), dtype=np.int32)
    set_used = np.zeros((partition_count, known_sets), dtype=np.int32)
    set_order = np.empty((partition_count, known_sets), dtype=np.int32)
    for c in range(chunks):
        if status[c] != OK:
            continue
        row = columns[c]
        count_metrics(
            data,
            row,
            part,
            firsts[c],
            counts[c],
            plan,
            metric_to,
            metric_bases[c],
            codes,
            metric_used,
            metric_order,
        )
        if has_sets:
            count_sets(
                data, row, part, firsts[c], counts[c], plan, set_to, set_bases[c], spans, set_used, set_order
            )
        for column in range(2, 5):
            note_column(data, row, part, firsts[c], counts[c], plan, column)
        if row[C_ID_ENCODING] == 2:
            count_content(data, row, C_ID_ENDS, part, firsts[c], plan, T_ID_BYTES)
        if row[C_TEXT_ENCODING] == 2:
            count_content(data, row, C_TEXT_ENDS, part, firsts[c], plan, T_TEXT_BYTES)

    out = np.empty(place(plan), dtype=np.uint8)
    for p in range(partition_count):
        if plan[p, T_EVENTS] > 0:
            _write_head(data, out, plan[p], metric_order[p], codes, set_order[p], spans)
    facts = np.empty(2 * chunks + 1 + 4 * partition_count + 2 * entries, dtype=np.int64)
    for c in range(chunks):
        facts[c] = status[c]
        facts[chunks + c] = firsts[c]
    facts[2 * chunks] = events
    at = 2 * chunks + 1
    for p in range(partition_count):
        facts[at] = plan[p, T_EVENTS]
        facts[at + 1] = plan[p, T_CHUNKS]
        facts[at + 2] = plan[p, T_START]
        facts[at + 3] = plan[p, T_END]
        at += 4
    _write_events(
        data, bounds, columns, status, part, firsts, counts, soles, plan, metric_to, metric_bases, metric_used,
        set_to, set_bases, set_used, out, facts[at : at + entries], facts[at + entries :],
    )  # fmt: skip
    return facts, part, out
