"""Cells: the running statistics of an account's metric in a billing period, or in a day for one combination.

A cell is 96 bytes, twelve 64-bit words, in one dense array in order of creation::

    0   account          u64                6   min           i64
    1   start            i64 ns: of the     7   max           i64
                         period, or day     8   last value    i64
    2   slot u32, combination u32           9   last time     i64 ns
    3   count            i64               10   last offset   i64
    4   sum, low word    u64               11   next u32, aux u32
    5   sum, high word   i64

and found through an `Index`, by a hash of words 0 to 2.

A **period cell** has the combination PERIOD. Its last word belongs to the thresholds: low half: bit i set once
threshold i has fired, and in bits 8 to 15 how many thresholds its row knows; high half: one plus the position of
that row. In a period cell of a COUNT_UNIQUE metric `count` is the number of operations, `sum` that of members.

A **day cell** has the combination's number (0 for metrics without dimensions). The first cell of an account's
metric and day is the **head** of a chain through `next` (one plus a row number) that holds all combinations of
that day; aux of the head has the flag HEAD, the length of the chain, and OVERFLOW once a combination was refused
because the chain was full. Metrics with dimensions have a second index entry for the head, under the combination
HEAD_KEY, so that a day is enumerated without knowing its combinations.

COUNT ignores the value: of its cells only the words 0 to 3, 9, 10 and 11 are meaningful.

A row whose cell has gone to a file (see `units`) is **freed**: word 2 is FREE, word 0 one plus the next freed row, 0 at
the end of the list; the others are zero.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tallymark_protocol.kernels import intrinsics
from tallymark_store.fold.compiling import inlined, kernel, prefetch
from tallymark_store.fold.counters import N_CELLS, N_FREE_CELL, N_FREE_CELLS
from tallymark_store.fold.index import CAPACITY, LOW32, SHARDS, STRIDE, U32, ZERO, home_of, shard_of, tag_of

fold_multiply: Any = intrinsics.fold_multiply

W_ACCOUNT = 0
W_START = 1
W_KEY = 2
W_COUNT = 3
W_LO = 4
W_HI = 5
W_MIN = 6
W_MAX = 7
W_LAST_VALUE = 8
W_LAST_TIME = 9
W_LAST_OFFSET = 10
W_LINKS = 11
CELL_WORDS = 12
CELL_BYTES = 8 * CELL_WORDS

NO_COMBO = 0
HEAD_KEY = 0xFFFFFFFE  # in hashes only
PERIOD = 0xFFFFFFFF
FREE = -1  # a key of no slot

HEAD = 1 << 30  # in aux
OVERFLOW = 1 << 31
LENGTH_MASK = HEAD - 1

_MASK32 = 0xFFFFFFFF
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@inlined
def cell_key(slot: Any, combo: Any) -> Any:
    """Word 2 of a cell (int64)."""
    return np.int64(slot) | (np.int64(combo) << 32)


@inlined
def cell_hash(account: Any, start: Any, key: Any, seed: Any) -> Any:
    """Hash of words 0 to 2. The seed keeps callers from choosing accounts that collide."""
    inner = fold_multiply(np.uint64(start) ^ np.uint64(seed), np.uint64(key) ^ _GOLDEN)
    return fold_multiply(np.uint64(account) ^ inner, _GOLDEN ^ (np.uint64(seed) | np.uint64(1)))


@kernel
def find_cell(table: Any, shards: Any, cells: Any, h: Any, account: Any, start: Any, key: Any) -> Any:
    """Row of a cell, -1 if there is none."""
    shard = shard_of(h)
    capacity = shards[shard, CAPACITY]
    base = shard * shards[SHARDS, STRIDE]
    tag = tag_of(h)
    position = home_of(tag, capacity)
    while True:
        entry = table[base + position]
        if entry == ZERO:
            return np.int64(-1)
        if (entry >> U32) == tag:
            row = np.int64(entry & LOW32) - 1
            if cells[row, W_KEY] == key and cells[row, W_START] == start and cells[row, W_ACCOUNT] == account:
                return row
        position += 1
        if position == capacity:
            position = 0


@kernel
def find_head(table: Any, shards: Any, cells: Any, h: Any, account: Any, start: Any, slot: Any) -> Any:
    """Row of the head of a day's chain, -1 if there is none. `h` hashes HEAD_KEY."""
    shard = shard_of(h)
    capacity = shards[shard, CAPACITY]
    base = shard * shards[SHARDS, STRIDE]
    tag = tag_of(h)
    position = home_of(tag, capacity)
    while True:
        entry = table[base + position]
        if entry == ZERO:
            return np.int64(-1)
        if (entry >> U32) == tag:
            row = np.int64(entry & LOW32) - 1
            # The same day's other cells, and its period's, may lie here under the same tag.
            if (
                cells[row, W_ACCOUNT] == account
                and cells[row, W_START] == start
                and cells[row, W_KEY] & _MASK32 == slot
                and (cells[row, W_KEY] >> 32) & _MASK32 != PERIOD
                and (cells[row, W_LINKS] >> 32) & HEAD != 0
            ):
                return row
        position += 1
        if position == capacity:
            position = 0


@inlined
def is_cell(cells: Any, row: Any, account: Any, start: Any, key: Any) -> Any:
    """Whether a row is the cell with this identity."""
    return cells[row, W_ACCOUNT] == account and cells[row, W_START] == start and cells[row, W_KEY] == key


@kernel
def guess_cell(table: Any, shards: Any, flat: Any, h: Any) -> Any:
    """The first row whose tag matches, most probably the cell, and ask for its cache lines; -1 if there is none.

    Its index entries should be in cache by now. `flat` is the array of cells as one row of words.
    """
    shard = shard_of(h)
    capacity = shards[shard, CAPACITY]
    base = shard * shards[SHARDS, STRIDE]
    tag = tag_of(h)
    position = home_of(tag, capacity)
    while True:
        entry = table[base + position]
        if entry == ZERO:
            return np.int64(-1)
        if (entry >> U32) == tag:
            row = np.int64(entry & LOW32) - 1
            prefetch(flat, row * CELL_WORDS)
            prefetch(flat, row * CELL_WORDS + CELL_WORDS - 1)
            return row
        position += 1
        if position == capacity:
            position = 0


@inlined
def add_values(cells: Any, row: Any, value: Any, time: Any, offset: Any) -> None:
    """Add an event's value to a cell that counts values; `offset` is above all before it."""
    count = cells[row, W_COUNT]
    low = np.uint64(cells[row, W_LO]) + np.uint64(value)
    carry = np.int64(1) if low < np.uint64(value) else np.int64(0)
    cells[row, W_LO] = np.int64(low)
    cells[row, W_HI] += (value >> 63) + carry
    if count == 0:
        cells[row, W_MIN] = value
        cells[row, W_MAX] = value
    else:
        cells[row, W_MIN] = min(cells[row, W_MIN], value)
        cells[row, W_MAX] = max(cells[row, W_MAX], value)
    if count == 0 or time >= cells[row, W_LAST_TIME]:
        cells[row, W_LAST_VALUE] = value
        cells[row, W_LAST_TIME] = time
        cells[row, W_LAST_OFFSET] = offset
    cells[row, W_COUNT] = count + 1


@inlined
def add_count(cells: Any, row: Any, time: Any, offset: Any) -> None:
    """Count an event whose value is ignored."""
    count = cells[row, W_COUNT]
    if count == 0 or time >= cells[row, W_LAST_TIME]:
        cells[row, W_LAST_TIME] = time
        cells[row, W_LAST_OFFSET] = offset
    cells[row, W_COUNT] = count + 1


@kernel
def head_of(cells: Any, row: Any) -> Any:
    """The aux half of a cell's links (int64, 0 to 2^32-1)."""
    return (cells[row, W_LINKS] >> 32) & _MASK32


@kernel
def next_of(cells: Any, row: Any) -> Any:
    """The next row of a day's chain, -1 at its end."""
    return (cells[row, W_LINKS] & _MASK32) - 1


@kernel
def set_links(cells: Any, row: Any, next_row: Any, aux: Any) -> None:
    """Write both halves of a cell's links."""
    cells[row, W_LINKS] = ((next_row + 1) & _MASK32) | (aux << 32)


@inlined
def new_row(cells: Any, counters: Any) -> Any:
    """A row for a cell; all but its key is zero."""
    row = counters[N_FREE_CELL] - 1
    if row >= 0:
        counters[N_FREE_CELL] = cells[row, W_ACCOUNT]
        counters[N_FREE_CELLS] -= 1
    else:
        row = counters[N_CELLS]  # fresh rows are zero
        counters[N_CELLS] = row + 1
    return row


@inlined
def free_row(cells: Any, counters: Any, row: Any) -> None:
    """Give back a cell's row; its index entries are gone."""
    for word in range(CELL_WORDS):
        cells[row, word] = 0
    cells[row, W_KEY] = FREE
    cells[row, W_ACCOUNT] = counters[N_FREE_CELL]
    counters[N_FREE_CELL] = row + 1
    counters[N_FREE_CELLS] += 1
