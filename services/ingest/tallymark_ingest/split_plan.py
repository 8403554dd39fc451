"""The counting half of the split kernels: what each partition's payload will hold, before anything is written.

The **plan** is an int64 table with a row per partition (slots `T_`). The functions here fill it chunk by chunk:
which partition each event belongs to, which metric codes and property sets each partition uses and under which
index, which columns can be absent or constant, how many bytes of ids and texts there are. `place` turns the
counts into positions.
"""

from __future__ import annotations

from typing import Any

import numba as nb
import numpy as np

from tallymark_protocol import layout as lay
from tallymark_protocol.kernels.intrinsics import (
    equal_bytes,
    hash_bytes,
    load_u32,
    load_u64,
    mix64,
)
from tallymark_protocol.payload import (
    C_ACCOUNT,
    C_ACCOUNT_ENCODING,
    C_EVENTS,
    C_METRIC_ENCODING,
    C_PROPERTIES_ENCODING,
    account_at,
    metric_at,
    operation_at,
    properties_at,
    table_end,
    table_start,
    time_at,
    value_at,
)

# Slots of a row of the plan: one row per partition.
T_EVENTS = 0
T_CHUNKS = 1
T_METRICS = 2
T_METRIC_BYTES = 3
T_SETS = 4
T_SET_BYTES = 5
T_ID_BYTES = 6
T_TEXT_BYTES = 7
T_START = 8  # of the payload in the output
T_END = 9
T_ENCODINGS = 10  # eight, in column order
T_CONSTANTS = 18  # eight; those of accounts, ids and texts are unused
T_POSITIONS = 26  # where each column begins in the output; for ids and texts, their ends
T_ID_CONTENT = 34
T_TEXT_CONTENT = 35
T_METRIC_ENDS = 36
T_SET_ENDS = 37
PLAN_SLOTS = 38

# States of a column while it is counted, kept in T_ENCODINGS.
_NOTHING = 0
_ALL_EQUAL = 1
_MIXED = 2

_ENTRY = lay.CHUNK_ENTRY_BYTES
_PAYLOAD_HEADER = lay.PAYLOAD_HEADER_BYTES
_TIME_ABSENT = lay.TIME_ABSENT
WIDTHS = np.array([8, 2, 8, 8, 1, 4, 4, 4], dtype=np.int64)


@nb.njit(nogil=True, cache=True, inline="always")
def partition_at(part: Any, i: Any) -> Any:
    """The partition (int64) of the call's event i."""
    return np.int64(part[i])


@nb.njit(nogil=True, cache=True)
def assign(data: Any, columns: Any, partition_count: Any, part: Any, first: Any, counts: Any) -> Any:
    """Write each event's partition to `part[first:]` and count them. Returns the partition if it is only one.

    Returns -1 where the events are of several partitions.
    """
    n = columns[C_EVENTS]
    count = np.uint64(partition_count)
    if columns[C_ACCOUNT_ENCODING] == 1:
        p = np.int64(mix64(account_at(data, columns, 0)) % count)
        for i in range(n):
            part[first + i] = p
        counts[p] = n
        return p
    accounts = columns[C_ACCOUNT]
    if count & (count - np.uint64(1)) == np.uint64(0):
        mask = count - np.uint64(1)
        for i in range(n):
            p = np.int64(mix64(load_u64(data, accounts + 8 * i)) & mask)
            part[first + i] = p
            counts[p] += 1
    else:
        for i in range(n):
            p = np.int64(mix64(load_u64(data, accounts + 8 * i)) % count)
            part[first + i] = p
            counts[p] += 1
    last = np.int64(part[first + n - 1])
    return last if counts[last] == n else -1


@nb.njit(nogil=True, cache=True)
def unite(
    data: Any,
    ends: Any,
    content: Any,
    count: Any,
    slots: Any,
    spans: Any,
    known: Any,
    to: Any,
    base: Any,
    seed: Any,
) -> Any:
    """Number a table's entries across chunks: equal bytes, equal number. Returns how many are known now.

    `slots` is an open-addressing table (a power of two, at most half full) of numbers, -1 where free; `spans`
    holds each number's (start, end); `to[base + k]` becomes the number of entry k.
    """
    mask = np.int64(len(slots) - 1)
    for k in range(count):
        start = table_start(data, ends, content, k)
        end = table_end(data, ends, content, k)
        slot = np.int64(hash_bytes(data, start, end, seed)) & mask
        while True:
            number = np.int64(slots[slot])
            if number < 0:
                slots[slot] = known
                spans[known, 0] = start
                spans[known, 1] = end
                to[base + k] = known
                known += 1
                break
            if spans[number, 1] - spans[number, 0] == end - start and equal_bytes(
                data, spans[number, 0], data, start, end - start
            ):
                to[base + k] = number
                break
            slot = (slot + 1) & mask
    return known


@nb.njit(nogil=True, cache=True, inline="always")
def _use(used: Any, order: Any, spans: Any, p: Any, number: Any, row: Any, slot: Any) -> Any:
    """1 + the index that `number` has in partition p's own table; the first use gives it the next one.

    `row[slot]` counts the table's entries, `row[slot + 1]` their bytes.
    """
    index = np.int64(used[p, number])
    if index == 0:
        order[p, row[slot]] = number
        row[slot] += 1
        row[slot + 1] += spans[number, 1] - spans[number, 0]
        index = row[slot]
        used[p, number] = index
    return index


@nb.njit(nogil=True, cache=True, inline="always")
def _note(row: Any, column: Any, value: Any) -> None:
    """Take a value into account for whether the column's values are all equal."""
    state = row[T_ENCODINGS + column]
    if state == _NOTHING:
        row[T_ENCODINGS + column] = _ALL_EQUAL
        row[T_CONSTANTS + column] = value
    elif state == _ALL_EQUAL and row[T_CONSTANTS + column] != value:
        row[T_ENCODINGS + column] = _MIXED


@nb.njit(nogil=True, cache=True)
def note_column(data: Any, columns: Any, part: Any, first: Any, counts: Any, plan: Any, column: Any) -> None:
    """`_note` for one chunk's value, time or operation column."""
    n = columns[C_EVENTS]
    if columns[C_ACCOUNT_ENCODING + column] != 2:
        n = 1
        if column == 2:
            constant = value_at(data, columns, 0)
        elif column == 3:
            constant = time_at(data, columns, 0)
        else:
            constant = operation_at(data, columns, 0)
        for p in range(len(counts)):
            if counts[p] > 0:
                _note(plan[p], column, constant)
        return
    undecided = 0
    for p in range(len(counts)):
        if counts[p] > 0 and plan[p, T_ENCODINGS + column] != _MIXED:
            undecided += 1
    for i in range(n):
        if undecided == 0:
            return
        p = partition_at(part, first + i)
        if plan[p, T_ENCODINGS + column] == _MIXED:
            continue
        if column == 2:
            value = value_at(data, columns, i)
        elif column == 3:
            value = time_at(data, columns, i)
        else:
            value = operation_at(data, columns, i)
        _note(plan[p], column, value)
        if plan[p, T_ENCODINGS + column] == _MIXED:
            undecided -= 1


@nb.njit(nogil=True, cache=True)
def count_metrics(
    data: Any,
    columns: Any,
    part: Any,
    first: Any,
    counts: Any,
    plan: Any,
    to: Any,
    base: Any,
    spans: Any,
    used: Any,
    order: Any,
) -> None:
    """Number the metric codes that one chunk's events use, per partition, in the order of their first use."""
    n = columns[C_EVENTS]
    if columns[C_METRIC_ENCODING] != 2:
        for p in range(len(counts)):
            if counts[p] > 0:
                _use(used, order, spans, p, np.int64(to[base]), plan[p], T_METRICS)
        return
    for i in range(n):
        p = partition_at(part, first + i)
        _use(used, order, spans, p, np.int64(to[base + metric_at(data, columns, i)]), plan[p], T_METRICS)


@nb.njit(nogil=True, cache=True)
def count_sets(
    data: Any,
    columns: Any,
    part: Any,
    first: Any,
    counts: Any,
    plan: Any,
    to: Any,
    base: Any,
    spans: Any,
    used: Any,
    order: Any,
) -> None:
    """Number the property sets that one chunk's events use, and see whether a partition's are all the same."""
    n = columns[C_EVENTS]
    if columns[C_PROPERTIES_ENCODING] != 2:
        k = properties_at(data, columns, 0)
        for p in range(len(counts)):
            if counts[p] > 0:
                index = np.int64(0)
                if k > 0:
                    index = _use(used, order, spans, p, np.int64(to[base + k - 1]), plan[p], T_SETS)
                _note(plan[p], 5, index)
        return
    for i in range(n):
        p = partition_at(part, first + i)
        k = properties_at(data, columns, i)
        index = np.int64(0)
        if k > 0:
            index = _use(used, order, spans, p, np.int64(to[base + k - 1]), plan[p], T_SETS)
        _note(plan[p], 5, index)


@nb.njit(nogil=True, cache=True)
def count_content(data: Any, columns: Any, ends: Any, part: Any, first: Any, plan: Any, slot: Any) -> None:
    """Add up the bytes of ids or texts (their ends at `columns[ends]`) in `plan[p, slot]`."""
    position = columns[ends]
    previous = np.int64(0)
    for i in range(columns[C_EVENTS]):
        end = np.int64(load_u32(data, position + 4 * i))
        plan[partition_at(part, first + i), slot] += end - previous
        previous = end


@nb.njit(nogil=True, cache=True)
def place(plan: Any) -> Any:
    """Decide encodings and positions of every payload, from the counts. Returns the output's length."""
    position = np.int64(0)
    for p in range(len(plan)):
        row = plan[p]
        row[T_START] = position
        if row[T_EVENTS] == 0:
            row[T_END] = position
            continue
        row[T_ENCODINGS + 0] = 2
        row[T_ENCODINGS + 1] = 2 if row[T_METRICS] > 1 else 0
        for column in range(2, 6):
            if row[T_ENCODINGS + column] == _ALL_EQUAL:
                neutral = np.int64(0)
                if column == 2:
                    neutral = np.int64(1)
                elif column == 3:
                    neutral = np.int64(_TIME_ABSENT)
                if row[T_CONSTANTS + column] == neutral:
                    row[T_ENCODINGS + column] = 0
        row[T_ENCODINGS + 6] = 2 if row[T_ID_BYTES] > 0 else 0
        row[T_ENCODINGS + 7] = 2 if row[T_TEXT_BYTES] > 0 else 0
        position += _PAYLOAD_HEADER + _ENTRY * row[T_CHUNKS]
        row[T_METRIC_ENDS] = position
        position += 4 * row[T_METRICS] + row[T_METRIC_BYTES]
        row[T_SET_ENDS] = position
        position += 4 * row[T_SETS] + row[T_SET_BYTES]
        for column in range(8):
            row[T_POSITIONS + column] = position
            encoding = row[T_ENCODINGS + column]
            if encoding == 1:
                position += WIDTHS[column]
            elif encoding == 2:
                position += WIDTHS[column] * row[T_EVENTS]
            if column == 6:
                row[T_ID_CONTENT] = position
                position += row[T_ID_BYTES]
            elif column == 7:
                row[T_TEXT_CONTENT] = position
                position += row[T_TEXT_BYTES]
        row[T_END] = position
    return position
