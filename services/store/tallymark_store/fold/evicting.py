"""Kernels that take units out of memory: first copied, and later, if nothing has touched them meanwhile, removed.

In between the copies get into a file (`packing`), which takes a thread some time, while the fold goes on.

The entries of a set lie anywhere among those of all sets. How many each has is counted before; where they are is found
by another look at all of them, once for all sets of a piece. Nothing of a set that changes meanwhile goes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tallymark_protocol.model import AggType
from tallymark_store.fold.cells import (
    CELL_WORDS,
    FREE,
    HEAD,
    HEAD_KEY,
    LENGTH_MASK,
    NO_COMBO,
    PERIOD,
    W_ACCOUNT,
    W_COUNT,
    W_KEY,
    W_LAST_OFFSET,
    W_LINKS,
    W_START,
    cell_hash,
    cell_key,
    free_row,
    head_of,
    next_of,
)
from tallymark_store.fold.compiling import kernel
from tallymark_store.fold.counters import N_SPILLED, N_SPILLED_MEMBERS
from tallymark_store.fold.index import remove
from tallymark_store.fold.schemas import S_AGG, find_day, find_period
from tallymark_store.fold.thresholds import free_threshold_rows
from tallymark_store.fold.uniques import (
    FREE_MEMBER,
    M_HI,
    M_LO,
    M_OFFSET,
    M_OWNER,
    M_TIME,
    free_member,
    member_hash,
)
from tallymark_store.fold.units import (
    MEMBERS,
    MEMBERS_A_RECORD,
    THRESHOLDS,
    THRESHOLDS_A_RECORD,
    find_in_memory,
)

# Columns of a list of units.
U_KIND = 0
U_ACCOUNT = 1
U_START = 2
U_FIRST = 3  # its first record
U_LENGTH = 4
U_ENTRIES = 5  # of a set, as counted before
U_FOUND = 6  # of them so far
U_MEMBERS = 7  # the first record of entries
UNIT_FIELDS = 8

# What is cold: touched last below an offset, which is another one for what is over by log time.
CUT_TIME = 0  # log time
CUT_OVER = 1  # the offset for what has ended by then
CUT_OPEN = 2  # for everything else
CUT_FIELDS = 3

_MASK32 = 0xFFFFFFFF
_COUNT_UNIQUE = int(AggType.COUNT_UNIQUE)
EVERYTHING = 2**63 - 1  # an offset: all is cold


@kernel
def _is_cold(is_set: Any, ends: Any, touched: Any, cut: Any) -> Any:
    if is_set:  # they don't say when they were touched; one that is open may well be in use
        return cut[CUT_OVER] > 0 if ends <= cut[CUT_TIME] else cut[CUT_OPEN] == EVERYTHING
    return touched < (cut[CUT_OVER] if ends <= cut[CUT_TIME] else cut[CUT_OPEN])


@kernel
def _copy_cell(cells: Any, row: Any, records: Any, at: Any, links: Any) -> None:
    for word in range(W_LINKS):
        records[at, word] = cells[row, word]
    records[at, W_LINKS] = links


@kernel
def ends_of(state: Any, schemas: Any, sample: Any, ends: Any, touched: Any) -> None:
    """For some rows, when what they count is over, and which offset touched them last; -1 where they can't leave."""
    cells = state.cells
    slots = schemas.slots
    for i in range(len(sample)):
        row = sample[i]
        key = cells[row, W_KEY]
        ends[i] = -1
        if key == FREE:
            continue
        slot = key & _MASK32
        if slots[slot, S_AGG] == _COUNT_UNIQUE:
            continue
        if (key >> 32) & _MASK32 == PERIOD:
            _, ends[i] = find_period(slots, schemas.bounds, schemas.cache, slot, cells[row, W_START])
        else:
            _, ends[i] = find_day(slots, schemas.bounds, schemas.cache, slot, cells[row, W_START])
        touched[i] = cells[row, W_LAST_OFFSET]


@kernel
def collect_units(
    state: Any,
    schemas: Any,
    first: Any,
    end: Any,
    cut: Any,
    records: Any,
    record_count: Any,
    units: Any,
    unit_count: Any,
    unit_records_max: Any,
    set_sizes: Any,
    set_units: Any,
) -> Any:
    """Copy the cold units whose first cell is in the rows [first, end).

    Of sets it is only noted in `set_units` which unit a row's is, plus one; `set_sizes` says how many entries each has.
    Units of more than `unit_records_max` records stay.

    Returns the row to go on with (before `end` when there is no room for the next unit), and the counts of records and
    units with what was added. A unit is no longer than `records` is.
    """
    cells = state.cells
    rows = state.rows
    slots = schemas.slots
    for row in range(first, end):
        key = cells[row, W_KEY]
        if key == FREE:
            continue
        slot = key & _MASK32
        links = cells[row, W_LINKS]
        start = cells[row, W_START]
        is_set = slots[slot, S_AGG] == _COUNT_UNIQUE
        entries = np.int64(0)
        is_period = (key >> 32) & _MASK32 == PERIOD
        if is_period:
            _, ends = find_period(slots, schemas.bounds, schemas.cache, slot, start)
            threshold_count = (links >> 8) & 0xFF
            extra = (threshold_count + THRESHOLDS_A_RECORD - 1) // THRESHOLDS_A_RECORD
            if is_set:
                if row >= len(set_sizes):
                    continue  # a set that began after they were counted
                entries = np.int64(set_sizes[row])
            length = 1 + extra + (entries + MEMBERS_A_RECORD - 1) // MEMBERS_A_RECORD
            touched = cells[row, W_LAST_OFFSET]
        else:
            if head_of(cells, row) & HEAD == 0:
                continue
            _, ends = find_day(slots, schemas.bounds, schemas.cache, slot, start)
            length = head_of(cells, row) & LENGTH_MASK
            touched = np.int64(0)
            member = np.int64(row)
            while member >= 0:
                touched = max(touched, cells[member, W_LAST_OFFSET])
                member = next_of(cells, member)
        if not _is_cold(is_set, ends, touched, cut) or length > unit_records_max:
            continue
        if record_count + length > len(records) or unit_count == len(units):
            return np.int64(row), record_count, unit_count
        units[unit_count, U_KIND] = (slot << 1) | (1 if is_period else 0)
        units[unit_count, U_ACCOUNT] = cells[row, W_ACCOUNT]
        units[unit_count, U_START] = start
        units[unit_count, U_FIRST] = record_count
        units[unit_count, U_LENGTH] = length
        units[unit_count, U_ENTRIES] = entries
        units[unit_count, U_FOUND] = 0
        unit_count += 1
        if is_period:
            _copy_cell(cells, row, records, record_count, links & 0xFFFF)
            record_count += 1
            first_row = ((links >> 32) & _MASK32) - 1
            for part in range(extra):
                for word in range(CELL_WORDS):
                    records[record_count, word] = 0
                records[record_count, W_ACCOUNT] = cells[row, W_ACCOUNT]
                records[record_count, W_START] = start
                records[record_count, W_KEY] = cell_key(slot, THRESHOLDS)
                records[record_count, W_LINKS] = part
                for q in range(THRESHOLDS_A_RECORD):
                    t = part * THRESHOLDS_A_RECORD + q
                    if t < threshold_count:
                        records[record_count, W_COUNT + 2 * q] = rows[first_row + t, 0]
                        records[record_count, W_COUNT + 2 * q + 1] = rows[first_row + t, 1]
                record_count += 1
            if is_set:
                set_units[row] = unit_count
                units[unit_count - 1, U_MEMBERS] = record_count
                while record_count < units[unit_count - 1, U_FIRST] + length:
                    for word in range(CELL_WORDS):
                        records[record_count, word] = 0
                    records[record_count, W_ACCOUNT] = cells[row, W_ACCOUNT]
                    records[record_count, W_START] = start
                    records[record_count, W_KEY] = cell_key(slot, MEMBERS)
                    record_count += 1
            continue
        _copy_cell(cells, row, records, record_count, head_of(cells, row) << 32)
        record_count += 1
        member = next_of(cells, row)
        while member >= 0:
            _copy_cell(cells, member, records, record_count, np.int64(0))
            record_count += 1
            member = next_of(cells, member)
    return np.int64(end), record_count, unit_count


@kernel
def count_entries(members: Any, first: Any, end: Any, sizes: Any) -> None:
    """Count the entries [first, end) for the rows of cells whose sets they are in."""
    for e in range(first, end):
        owner = members[e, M_OWNER]
        if owner != FREE_MEMBER and owner & _MASK32 < len(sizes):
            sizes[owner & _MASK32] += 1


@kernel
def copy_entries(
    members: Any, first: Any, end: Any, set_units: Any, units: Any, records: Any, entry_rows: Any
) -> None:
    """Copy those of the entries [first, end) whose sets are among the units; `entry_rows` says where each lies."""
    for e in range(first, end):
        owner = members[e, M_OWNER]
        if owner == FREE_MEMBER or owner & _MASK32 >= len(set_units):
            continue
        i = set_units[owner & _MASK32] - 1
        if i < 0:
            continue
        found = units[i, U_FOUND]
        units[i, U_FOUND] = found + 1
        if found >= units[i, U_ENTRIES]:
            continue  # it has grown, and will stay
        at = units[i, U_MEMBERS] + found // MEMBERS_A_RECORD
        q = found % MEMBERS_A_RECORD
        records[at, W_COUNT + 4 * q] = members[e, M_LO]
        records[at, W_COUNT + 4 * q + 1] = members[e, M_HI]
        records[at, W_COUNT + 4 * q + 2] = members[e, M_TIME]
        records[at, W_COUNT + 4 * q + 3] = members[e, M_OFFSET]
        records[at, W_LINKS] |= ((owner >> 32) + 1) << (8 * q)
        entry_rows[at, q] = e


@kernel
def _evict_set(
    members: Any,
    table: Any,
    shards: Any,
    counters: Any,
    row: Any,
    first: Any,
    count: Any,
    entry_rows: Any,
    seed: Any,
) -> None:
    for k in range(count):
        e = entry_rows[first + k // MEMBERS_A_RECORD, k % MEMBERS_A_RECORD]
        remove(table, shards, member_hash(row, members[e, M_LO], members[e, M_HI], seed), e)
        free_member(members, counters, e)
        counters[N_SPILLED_MEMBERS] += 1


@kernel
def evict_units(
    state: Any, slots: Any, units: Any, first: Any, end: Any, records: Any, entry_rows: Any, seed: Any
) -> Any:
    """Take the units [first, end) of a list out of memory that are still as they were copied; returns how many.

    Whatever happens to a unit raises a count, but for a combination that is refused: that sets a flag of the head.
    """
    cells = state.cells
    table = state.table
    shards = state.shards
    counters = state.counters
    evicted = 0
    for i in range(first, end):
        kind = units[i, U_KIND]
        account = units[i, U_ACCOUNT]
        start = units[i, U_START]
        at = units[i, U_FIRST]
        row = find_in_memory(cells, table, shards, slots, kind, account, start, seed)
        if row < 0:
            continue
        if kind & 1:
            links = cells[row, W_LINKS]
            if cells[row, W_COUNT] != records[at, W_COUNT] or links & 0xFFFF != records[at, W_LINKS]:
                continue
            if slots[kind >> 1, S_AGG] == _COUNT_UNIQUE:
                # Nothing was done to the set since its cell was copied, so the entries are where they were found.
                if units[i, U_FOUND] != units[i, U_ENTRIES]:
                    continue
                _evict_set(
                    state.members, state.member_table, state.member_shards, counters, row, units[i, U_MEMBERS],
                    units[i, U_ENTRIES], entry_rows, seed,
                )  # fmt: skip
            count = (links >> 8) & 0xFF
            if count > 0:
                free_threshold_rows(state.rows, counters, ((links >> 32) & _MASK32) - 1, count)
            h = cell_hash(account, start, cells[row, W_KEY], seed)
            remove(table, shards, h, row)
            free_row(cells, counters, row)
            counters[N_SPILLED] += 1
            evicted += 1
            continue
        if head_of(cells, row) != (records[at, W_LINKS] >> 32) & _MASK32:
            continue
        # The flags hold the chain's length, so it has the same cells in the same order.
        member = row
        is_same = True
        while member >= 0 and is_same:
            is_same = (
                cells[member, W_COUNT] == records[at, W_COUNT] and cells[member, W_KEY] == records[at, W_KEY]
            )
            at += 1
            member = next_of(cells, member)
        if not is_same:
            continue
        key = cells[row, W_KEY]
        if (key >> 32) & _MASK32 != NO_COMBO:
            h = cell_hash(account, start, cell_key(key & _MASK32, HEAD_KEY), seed)
            remove(table, shards, h, row)
        member = row
        while member >= 0:
            following = next_of(cells, member)
            remove(table, shards, cell_hash(account, start, cells[member, W_KEY], seed), member)
            free_row(cells, counters, member)
            counters[N_SPILLED] += 1
            member = following
        evicted += 1
    return evicted
