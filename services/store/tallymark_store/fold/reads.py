"""Kernels for queries: enumerating day cells, merging them by group, and scanning for the largest.

An **accumulator** is one row of int64[MERGED_FIELDS]: statistics that were merged from cells, with the row of one
cell of the group, to read the group's values from.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tallymark_protocol.kernels.intrinsics import mix64
from tallymark_store.fold.cells import (
    HEAD,
    HEAD_KEY,
    NO_COMBO,
    OVERFLOW,
    PERIOD,
    W_ACCOUNT,
    W_COUNT,
    W_HI,
    W_KEY,
    W_LAST_OFFSET,
    W_LAST_TIME,
    W_LAST_VALUE,
    W_LO,
    W_MAX,
    W_MIN,
    W_START,
    cell_hash,
    cell_key,
    find_cell,
    find_head,
    head_of,
    next_of,
)
from tallymark_store.fold.compiling import kernel
from tallymark_store.fold.counters import N_CELLS
from tallymark_store.fold.dimensions import C_CODES, selected
from tallymark_store.fold.schemas import S_DIMENSIONS, find_day

# Fields of an accumulator.
G_ROW = 0  # of one cell of the group
G_DAY = 1  # start of the day, where days are kept apart
G_COUNT = 2
G_LO = 3
G_HI = 4
G_MIN = 5
G_MAX = 6
G_LAST_VALUE = 7
G_LAST_TIME = 8
G_LAST_OFFSET = 9
MERGED_FIELDS = 10

_MASK32 = 0xFFFFFFFF


@kernel
def find_period(state: Any, account: Any, slot: Any, start: Any, seed: Any) -> Any:
    """Row of a period cell, -1 if there is none."""
    key = cell_key(slot, PERIOD)
    return find_cell(
        state.table, state.shards, state.cells, cell_hash(account, start, key, seed), account, start, key
    )


@kernel
def collect_days(
    state: Any,
    schemas: Any,
    combos: Any,
    account: Any,
    slot: Any,
    first: Any,
    end: Any,
    selection: Any,
    seed: Any,
    found: Any,
    overflowed: Any,
) -> Any:
    """Rows of an account's day cells in the days that begin in [first, end); `first` is the start of a day.

    Days that overflowed are listed instead. Returns (cells, overflowed days) found; what exceeds `found` or
    `overflowed` is counted, not written.
    """
    has_dimensions = schemas.slots[slot, S_DIMENSIONS] > 0
    key = cell_key(slot, HEAD_KEY if has_dimensions else NO_COMBO)
    n = 0
    n_overflowed = 0
    day = first
    cells = state.cells
    table = state.table
    shards = state.shards
    slots = schemas.slots
    bounds = schemas.bounds
    cache = schemas.cache
    while day < end:
        _, day_end = find_day(slots, bounds, cache, slot, day)
        h = cell_hash(account, day, key, seed)
        if has_dimensions:
            row = find_head(table, shards, cells, h, account, day, slot)
        else:
            row = find_cell(table, shards, cells, h, account, day, key)
        if row >= 0 and head_of(cells, row) & OVERFLOW != 0:
            if n_overflowed < len(overflowed):
                overflowed[n_overflowed] = day
            n_overflowed += 1
            row = np.int64(-1)
        while row >= 0:
            if selected(combos, (cells[row, W_KEY] >> 32) & _MASK32, selection):
                if n < len(found):
                    found[n] = row
                n += 1
            row = next_of(cells, row)
        day = day_end
    return n, n_overflowed


@kernel
def _merge_cell(merged: Any, g: Any, cells: Any, row: Any) -> None:
    low = np.uint64(merged[g, G_LO]) + np.uint64(cells[row, W_LO])
    carry = np.int64(1) if low < np.uint64(cells[row, W_LO]) else np.int64(0)
    merged[g, G_LO] = np.int64(low)
    merged[g, G_HI] += cells[row, W_HI] + carry
    merged[g, G_COUNT] += cells[row, W_COUNT]
    merged[g, G_MIN] = min(merged[g, G_MIN], cells[row, W_MIN])
    merged[g, G_MAX] = max(merged[g, G_MAX], cells[row, W_MAX])
    time = cells[row, W_LAST_TIME]
    offset = cells[row, W_LAST_OFFSET]
    if time > merged[g, G_LAST_TIME] or (
        time == merged[g, G_LAST_TIME] and offset > merged[g, G_LAST_OFFSET]
    ):
        merged[g, G_LAST_VALUE] = cells[row, W_LAST_VALUE]
        merged[g, G_LAST_TIME] = time
        merged[g, G_LAST_OFFSET] = offset


@kernel
def _begin(merged: Any, g: Any, cells: Any, row: Any, day: Any) -> None:
    merged[g, G_ROW] = row
    merged[g, G_DAY] = day
    merged[g, G_COUNT] = cells[row, W_COUNT]
    merged[g, G_LO] = cells[row, W_LO]
    merged[g, G_HI] = cells[row, W_HI]
    merged[g, G_MIN] = cells[row, W_MIN]
    merged[g, G_MAX] = cells[row, W_MAX]
    merged[g, G_LAST_VALUE] = cells[row, W_LAST_VALUE]
    merged[g, G_LAST_TIME] = cells[row, W_LAST_TIME]
    merged[g, G_LAST_OFFSET] = cells[row, W_LAST_OFFSET]


@kernel
def merge_days(
    state: Any, combos: Any, found: Any, n: Any, dimensions: Any, per_day: Any, groups: Any, merged: Any
) -> int:
    """Merge the cells `found[:n]` by the given dimensions, and by day if asked to. Returns how many groups.

    `groups` is int64[2^k], at least 2n long, -1 everywhere; `merged` has n rows.
    """
    cells = state.cells
    mask = len(groups) - 1
    count = 0
    for i in range(n):
        row = found[i]
        combo = (cells[row, W_KEY] >> 32) & _MASK32
        day = cells[row, W_START] if per_day else np.int64(0)
        h = mix64(np.uint64(day))
        for d in range(len(dimensions)):
            h = mix64(h ^ np.uint64(combos[combo, C_CODES + dimensions[d]])) + np.uint64(0x9E3779B97F4A7C15)
        at = np.int64(h & np.uint64(mask))
        while True:
            g = groups[at]
            if g < 0:
                groups[at] = count
                _begin(merged, count, cells, row, day)
                count += 1
                break
            other = (cells[merged[g, G_ROW], W_KEY] >> 32) & _MASK32
            same = merged[g, G_DAY] == day
            for d in range(len(dimensions)):
                at_dimension = C_CODES + dimensions[d]
                same = same and combos[combo, at_dimension] == combos[other, at_dimension]
            if same:
                _merge_cell(merged, g, cells, row)
                break
            at = (at + 1) & mask
    return count


@kernel
def _ranks_before(cells: Any, a: Any, b: Any, lo: Any, hi: Any) -> bool:
    """Whether cell a has the larger number, or an equal one and the lower account id."""
    low_a = cells[a, lo]
    low_b = cells[b, lo]
    if hi >= 0:
        high_a = cells[a, hi]
        high_b = cells[b, hi]
        if high_a != high_b:
            return bool(high_a > high_b)
        if low_a != low_b:
            return bool(np.uint64(low_a) > np.uint64(low_b))
    elif low_a != low_b:
        return bool(low_a > low_b)
    return bool(np.uint64(cells[a, W_ACCOUNT]) < np.uint64(cells[b, W_ACCOUNT]))


@kernel
def rank_period(state: Any, slot: Any, start: Any, lo: Any, hi: Any, heap: Any) -> int:
    """Rows of the cells of one period with the largest numbers, as many as `heap` has room for; how many there are.

    The number is in the words `lo` and `hi` (-1: `lo` alone, signed). The heap's root ranks last; a cell that ranks
    behind it costs a look, so nothing is sorted but what is returned.
    """
    cells = state.cells
    key = cell_key(slot, PERIOD)
    n = 0
    for row in range(state.counters[N_CELLS]):
        if cells[row, W_KEY] != key or cells[row, W_START] != start:
            continue
        if n < len(heap):
            at = n
            n += 1
            while at > 0 and _ranks_before(cells, heap[(at - 1) >> 1], row, lo, hi):
                heap[at] = heap[(at - 1) >> 1]
                at = (at - 1) >> 1
            heap[at] = row
        elif n > 0 and _ranks_before(cells, row, heap[0], lo, hi):
            at = 0
            while 2 * at + 1 < n:
                child = 2 * at + 1
                if child + 1 < n and _ranks_before(cells, heap[child], heap[child + 1], lo, hi):
                    child += 1
                if _ranks_before(cells, heap[child], row, lo, hi):
                    break
                heap[at] = heap[child]
                at = child
            heap[at] = row
    return n


@kernel
def scan_days(state: Any, combos: Any, slot: Any, first: Any, end: Any, selection: Any, found: Any) -> Any:
    """Rows of all accounts' day cells of the days in [first, end) that pass, and of heads of overflowed days.

    Returns the number of rows. A head of an overflowed day is listed as -1 - row, its chain's cells are listed too.
    """
    cells = state.cells
    n = 0
    for row in range(state.counters[N_CELLS]):
        key = cells[row, W_KEY]
        start = cells[row, W_START]
        combo = (key >> 32) & _MASK32
        if key & _MASK32 != slot or combo == PERIOD or start < first or start >= end:
            continue
        aux = head_of(cells, row)
        if aux & HEAD != 0 and aux & OVERFLOW != 0:
            if n < len(found):
                found[n] = -1 - row
            n += 1
        if selected(combos, combo, selection):
            if n < len(found):
                found[n] = row
            n += 1
    return n


@kernel
def merge_accounts(state: Any, found: Any, n: Any, groups: Any, merged: Any, overflowed: Any) -> int:
    """Merge cells by account. Returns how many accounts; `overflowed[g]` is set where a day of it overflowed.

    Entries -1 - row mark an overflowed day of that row's account; such an account may have no cell that passed,
    then its count is 0. Arrays are as for `merge_days`.
    """
    cells = state.cells
    mask = len(groups) - 1
    count = 0
    for i in range(n):
        marks = found[i] < 0
        row = -1 - found[i] if marks else found[i]
        account = cells[row, W_ACCOUNT]
        at = np.int64(mix64(np.uint64(account)) & np.uint64(mask))
        while groups[at] >= 0 and cells[merged[groups[at], G_ROW], W_ACCOUNT] != account:
            at = (at + 1) & mask
        g = groups[at]
        if g < 0:
            g = np.int64(count)
            groups[at] = g
            count += 1
            merged[g, G_ROW] = row
            merged[g, G_COUNT] = 0
            overflowed[g] = False
        if marks:
            overflowed[g] = True
        elif merged[g, G_COUNT] == 0:
            _begin(merged, g, cells, row, np.int64(0))
        else:
            _merge_cell(merged, g, cells, row)
    return count
