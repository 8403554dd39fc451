"""The one pass of the fold over a payload.

Events are taken in log order, in blocks. For a block the kernel first works out every event's cells and asks for
the cache lines of their index entries, then for the lines of the cells themselves, and only then updates them, one
event after the other: with a million cold cells the waits for memory overlap instead of adding up.

A kernel that finds an index FULL stops between two events and says where to go on.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tallymark_protocol import limits
from tallymark_protocol.layout import TIME_ABSENT
from tallymark_protocol.model import AggType
from tallymark_protocol.payload import (
    C_EVENTS,
    C_PROPERTY_BYTES,
    C_PROPERTY_ENDS,
    account_at,
    metric_at,
    operation_at,
    properties_at,
    table_end,
    table_start,
    time_at,
    value_at,
)
from tallymark_store.fold.cells import (
    FREE,
    HEAD,
    HEAD_KEY,
    LENGTH_MASK,
    NO_COMBO,
    OVERFLOW,
    PERIOD,
    W_ACCOUNT,
    W_COUNT,
    W_HI,
    W_KEY,
    W_LAST_VALUE,
    W_LO,
    W_MAX,
    W_START,
    add_count,
    add_values,
    cell_hash,
    cell_key,
    find_cell,
    find_head,
    guess_cell,
    head_of,
    is_cell,
    new_row,
    next_of,
    set_links,
)
from tallymark_store.fold.compiling import inlined, kernel, prefetch
from tallymark_store.fold.counters import N_CELLS, N_NEED, N_NEED_FILE, N_NEED_RECORD
from tallymark_store.fold.dimensions import N_COMBOS, resolve_set
from tallymark_store.fold.index import FULL, SHARDS, entry_position, insert
from tallymark_store.fold.schemas import (
    S_AGG,
    S_DIMENSIONS,
    S_THRESHOLDS,
    find_day,
    find_period,
)
from tallymark_store.fold.thresholds import check, threshold_row
from tallymark_store.fold.uniques import apply_operation, member_hash, unique_value
from tallymark_store.fold.units import DAMAGED, find_in_memory, find_unit, load_unit, unit_length

Ints = npt.NDArray[np.int64]

BLOCK = 64
_REINDEX_AHEAD = 16  # rows whose index entries are asked for in time

# Columns of the scratch array, one row per event of a block.
_SLOT = 0  # -1: the event doesn't count
_TIME = 1
_PERIOD_START = 2
_PERIOD_END = 3
_DAY_START = 4
_COMBO = 5  # -1: not numbered yet
_PERIOD_HASH = 6
_DAY_HASH = 7
_AGG = 8
_ACCOUNT = 9
_PERIOD_ROW = 10  # the cells, where they were there before the block; else -1
_DAY_ROW = 11
SCRATCH_FIELDS = 12

_COUNT = int(AggType.COUNT)
_SUM = int(AggType.SUM)
_MAX = int(AggType.MAX)
_LATEST = int(AggType.LATEST)
_COUNT_UNIQUE = int(AggType.COUNT_UNIQUE)
_TIME_ABSENT = TIME_ABSENT
_THRESHOLDS_MAX = limits.THRESHOLDS_MAX
_COMBINATIONS_MAX = limits.DIMENSION_COMBINATIONS_MAX


class StateArrays(NamedTuple):
    """The state that events change, beside the interned dimensions."""

    cells: Ints  # int64[n, CELL_WORDS]
    flat: Ints  # the same words as one row, for prefetching
    table: npt.NDArray[np.uint64]  # the cells' index
    shards: Ints
    members: Ints  # int64[n, MEMBER_WORDS]
    member_table: npt.NDArray[np.uint64]
    member_shards: Ints
    rows: Ints  # int64[n, 2]: totals at which thresholds fire next
    alerts: Ints  # int64[n, ALERT_WORDS]
    counters: Ints
    files: Ints  # int64[n, FILE_FIELDS]: see `units`


class Scratch(NamedTuple):
    """Memory that a kernel needs while it runs; its content means nothing between runs."""

    block: Ints  # int64[BLOCK, SCRATCH_FIELDS]
    memo: Ints  # int64[2^k, 2]: (metric, set), combination; -1 everywhere at the start
    codes: Ints  # int64[8]
    work: npt.NDArray[np.uint64]  # blake2b's


@kernel
def names_unknown(data: Any, columns: Any, verdicts: Any, metric_slots: Any) -> bool:
    """Whether an accepted event names a metric that has no slot."""
    for i in range(columns[C_EVENTS]):
        if (len(verdicts) == 0 or verdicts[i] == 0) and metric_slots[metric_at(data, columns, i)] < 0:
            return True
    return False


@kernel
def _resolve(
    data: Any, columns: Any, i: Any, slot: Any, width: Any, offset: Any, intern: Any, dims: Any, codes: Any
) -> Any:
    k = properties_at(data, columns, i)
    start = np.int64(0)
    end = np.int64(0)
    if k > 0:
        start = table_start(data, columns[C_PROPERTY_ENDS], columns[C_PROPERTY_BYTES], k - 1)
        end = table_end(data, columns[C_PROPERTY_ENDS], columns[C_PROPERTY_BYTES], k - 1)
    return resolve_set(dims, slot, width, data, start, end, offset, intern, codes)


@kernel
def _new_cell(
    cells: Any, table: Any, shards: Any, counters: Any, h: Any, account: Any, start: Any, key: Any
) -> Any:
    row = new_row(cells, counters)
    cells[row, W_ACCOUNT] = account
    cells[row, W_START] = start
    cells[row, W_KEY] = key
    insert(table, shards, h, row)
    return row


@kernel
def _day_cell(
    data: Any,
    columns: Any,
    i: Any,
    slot: Any,
    width: Any,
    offset: Any,
    account: Any,
    start: Any,
    combo: Any,
    dims: Any,
    cells: Any,
    table: Any,
    shards: Any,
    counters: Any,
    codes: Any,
    seed: Any,
) -> Any:
    """The day cell of an event whose metric has dimensions; -1 when its day has too many combinations.

    Where `combo` is known, there is no such cell yet.
    """
    if combo < 0:  # it may have been numbered since
        combo = _resolve(data, columns, i, slot, width, offset, False, dims, codes)
        if combo >= 0:
            key = cell_key(slot, combo)
            h = cell_hash(account, start, key, seed)
            row = find_cell(table, shards, cells, h, account, start, key)
            if row >= 0:
                return row
    head_hash = cell_hash(account, start, cell_key(slot, HEAD_KEY), seed)
    head = find_head(table, shards, cells, head_hash, account, start, slot)
    if head >= 0:
        aux = head_of(cells, head)
        if aux & LENGTH_MASK >= _COMBINATIONS_MAX:
            set_links(cells, head, next_of(cells, head), aux | OVERFLOW)
            return np.int64(-1)
    if combo < 0:
        combo = _resolve(data, columns, i, slot, width, offset, True, dims, codes)
    key = cell_key(slot, combo)
    h = cell_hash(account, start, key, seed)
    row = _new_cell(cells, table, shards, counters, h, account, start, key)
    if head < 0:
        insert(table, shards, head_hash, row)
        set_links(cells, row, np.int64(-1), HEAD | 1)
    else:
        set_links(cells, row, next_of(cells, head), np.int64(0))
        set_links(cells, head, row, head_of(cells, head) + 1)
    return row


@kernel
def _plan_block(
    data: Any,
    columns: Any,
    verdicts: Any,
    first: Any,
    last: Any,
    base_offset: Any,
    append_ns: Any,
    metric_slots: Any,
    slots: Any,
    bounds: Any,
    cache: Any,
    dims: Any,
    flat: Any,
    table: Any,
    shards: Any,
    cells: Any,
    rows: Any,
    block: Any,
    memo: Any,
    codes: Any,
    seed: Any,
) -> None:
    for i in range(first, last):
        j = i - first
        block[j, _SLOT] = -1
        if len(verdicts) != 0 and verdicts[i] != 0:
            continue
        metric = metric_at(data, columns, i)
        slot = metric_slots[metric]
        time = time_at(data, columns, i)
        if time == _TIME_ABSENT:
            time = append_ns
        account = np.int64(account_at(data, columns, i))
        period_start, period_end = find_period(slots, bounds, cache, slot, time)
        agg = slots[slot, S_AGG]
        block[j, _SLOT] = slot
        block[j, _TIME] = time
        block[j, _PERIOD_START] = period_start
        block[j, _PERIOD_END] = period_end
        block[j, _AGG] = agg
        block[j, _ACCOUNT] = account
        h = cell_hash(account, period_start, cell_key(slot, PERIOD), seed)
        block[j, _PERIOD_HASH] = np.int64(h)
        prefetch(table, entry_position(shards, h))
        block[j, _COMBO] = -1
        if agg == _COUNT_UNIQUE:
            continue
        day_start, _ = find_day(slots, bounds, cache, slot, time)
        combo = np.int64(NO_COMBO)
        width = slots[slot, S_DIMENSIONS]
        if width > 0:
            k = properties_at(data, columns, i)
            at = (metric * 31 + k) & (len(memo) - 1)
            combo = memo[at, 1]
            if memo[at, 0] != (metric << 32) | k:
                combo = _resolve(data, columns, i, slot, width, base_offset + i, False, dims, codes)
                if combo >= 0:
                    memo[at, 0] = (metric << 32) | k
                    memo[at, 1] = combo
        block[j, _DAY_START] = day_start
        block[j, _COMBO] = combo
        if combo >= 0:
            h = cell_hash(account, day_start, cell_key(slot, combo), seed)
            block[j, _DAY_HASH] = np.int64(h)
            prefetch(table, entry_position(shards, h))
    for j in range(last - first):
        slot = block[j, _SLOT]
        if slot < 0:
            continue
        h = np.uint64(block[j, _PERIOD_HASH])
        block[j, _PERIOD_ROW] = guess_cell(table, shards, flat, h)
        combo = block[j, _COMBO]
        if combo >= 0:
            row = guess_cell(table, shards, flat, np.uint64(block[j, _DAY_HASH]))
            block[j, _DAY_ROW] = row
            if row < 0 and slots[slot, S_DIMENSIONS] > 0:  # a new cell goes into the chain of its day
                h = cell_hash(block[j, _ACCOUNT], block[j, _DAY_START], cell_key(slot, HEAD_KEY), seed)
                prefetch(table, entry_position(shards, h))
    for j in range(last - first):
        slot = block[j, _SLOT]
        if slot < 0:
            continue
        if slots[slot, S_THRESHOLDS] > 0 and block[j, _PERIOD_ROW] >= 0:
            row = threshold_row(cells, block[j, _PERIOD_ROW])
            if row >= 0:
                prefetch(rows[row], 0)
        if block[j, _COMBO] >= 0 and block[j, _DAY_ROW] < 0 and slots[slot, S_DIMENSIONS] > 0:
            h = cell_hash(block[j, _ACCOUNT], block[j, _DAY_START], cell_key(slot, HEAD_KEY), seed)
            guess_cell(table, shards, flat, h)


@kernel
def _check_thresholds(
    cells: Any,
    cell: Any,
    slot: Any,
    agg: Any,
    thresholds: Any,
    count: Any,
    rows: Any,
    alerts: Any,
    counters: Any,
    start: Any,
    end: Any,
    offset: Any,
    append_ns: Any,
) -> None:
    lo = cells[cell, W_LO]  # SUM, and the members of COUNT_UNIQUE
    hi = cells[cell, W_HI]
    if agg == _COUNT:
        lo = cells[cell, W_COUNT]
        hi = np.int64(0)
    elif agg == _MAX:
        lo = cells[cell, W_MAX]
        hi = lo >> 63
    elif agg == _LATEST:
        lo = cells[cell, W_LAST_VALUE]
        hi = lo >> 63
    check(
        cells,
        cell,
        slot,
        thresholds,
        slot * _THRESHOLDS_MAX,
        count,
        rows,
        alerts,
        counters,
        lo,
        hi,
        start,
        end,
        offset,
        append_ns,
    )


@kernel
def _bring_unit(
    cells: Any,
    table: Any,
    shards: Any,
    members: Any,
    member_table: Any,
    member_shards: Any,
    rows: Any,
    counters: Any,
    files: Any,
    is_set: Any,
    kind: Any,
    account: Any,
    start: Any,
    combo_count: Any,
    seed: Any,
) -> Any:
    """Bring back a unit that isn't in memory, if a file has it; False where the caller of the kernel has to.

    What is to be done then is in the counters from N_NEED on.
    """
    f, record = find_unit(files, 0, len(files), kind, account, start)
    if f == DAMAGED:
        counters[N_NEED] = -1
        counters[N_NEED_FILE] = record
        return False
    if f < 0:
        return True
    length = unit_length(files, f, record)
    if length > 0 and (length <= 2 or (kind & 1 and not is_set)):
        done = load_unit(
            cells, table, shards, members, member_table, member_shards, rows, counters, files, f, record, length, 0,
            combo_count, True, seed,
        )  # fmt: skip
        if done == length:
            return True
        length = np.int64(-1)
    counters[N_NEED] = length if length > 0 else -1
    counters[N_NEED_FILE] = f
    counters[N_NEED_RECORD] = record
    return False


@inlined
def _is_here(block: Any, j: Any, slot: Any, cells: Any) -> Any:
    """Whether an event's cells are in memory where they were guessed to be: most are, and no file need be asked."""
    account = block[j, _ACCOUNT]
    row = block[j, _PERIOD_ROW]
    if row < 0 or not is_cell(cells, row, account, block[j, _PERIOD_START], cell_key(slot, PERIOD)):
        return False
    if block[j, _AGG] == _COUNT_UNIQUE:
        return True
    combo = block[j, _COMBO]
    row = block[j, _DAY_ROW]
    return (
        combo >= 0 and row >= 0 and is_cell(cells, row, account, block[j, _DAY_START], cell_key(slot, combo))
    )


@kernel
def _bring_back(
    block: Any,
    j: Any,
    slot: Any,
    slots: Any,
    cells: Any,
    table: Any,
    shards: Any,
    members: Any,
    member_table: Any,
    member_shards: Any,
    rows: Any,
    counters: Any,
    files: Any,
    combo_count: Any,
    seed: Any,
) -> Any:
    """Have in memory what files have of an event's period and day; False as `_bring_unit`."""
    account = block[j, _ACCOUNT]
    start = block[j, _PERIOD_START]
    key = cell_key(slot, PERIOD)
    row = block[j, _PERIOD_ROW]
    if row < 0 or not is_cell(cells, row, account, start, key):
        row = find_cell(table, shards, cells, np.uint64(block[j, _PERIOD_HASH]), account, start, key)
        block[j, _PERIOD_ROW] = row
        if row < 0 and not _bring_unit(
            cells, table, shards, members, member_table, member_shards, rows, counters, files,
            block[j, _AGG] == _COUNT_UNIQUE, (slot << 1) | 1, account, start, combo_count, seed,
        ):  # fmt: skip
            return False
    if block[j, _AGG] == _COUNT_UNIQUE:
        return True
    start = block[j, _DAY_START]
    combo = block[j, _COMBO]
    if combo >= 0:
        key = cell_key(slot, combo)
        row = block[j, _DAY_ROW]
        if row < 0 or not is_cell(cells, row, account, start, key):
            row = find_cell(table, shards, cells, np.uint64(block[j, _DAY_HASH]), account, start, key)
            block[j, _DAY_ROW] = row
        if row >= 0:
            return True
    if find_in_memory(cells, table, shards, slots, slot << 1, account, start, seed) >= 0:
        return True
    return _bring_unit(
        cells, table, shards, members, member_table, member_shards, rows, counters, files, False, slot << 1, account,
        start, combo_count, seed,
    )  # fmt: skip


@kernel
def fold_events(
    data: Any,
    columns: Any,
    verdicts: Any,
    first: Any,
    base_offset: Any,
    append_ns: Any,
    metric_slots: Any,
    schemas: Any,
    dims: Any,
    state: Any,
    scratch: Any,
    seed: Any,
) -> Any:
    """Fold a payload's accepted events from event `first` on. Returns the event to go on with; at the end, n.

    Where it stops with a number in the counter N_NEED, a unit has to be brought back first.

    `verdicts` is uint8[n], or empty when all are accepted. Dense arrays must have room for everything the payload
    can add (see `Fold.apply`).
    """
    # Taken out of their tuples once: each access, and each tuple handed to a function, counts references.
    slots = schemas.slots
    bounds = schemas.bounds
    cache = schemas.cache
    uids = schemas.uids
    thresholds = schemas.thresholds
    cells = state.cells
    flat = state.flat
    table = state.table
    shards = state.shards
    members = state.members
    member_table = state.member_table
    member_shards = state.member_shards
    rows = state.rows
    alerts = state.alerts
    counters = state.counters
    files = state.files
    has_files = len(files) > 0
    combo_shards = dims.combo_shards
    value_shards = dims.value_shards
    block = scratch.block
    memo = scratch.memo
    codes = scratch.codes
    work = scratch.work
    n = columns[C_EVENTS]
    while first < n:
        last = min(first + BLOCK, n)
        _plan_block(
            data,
            columns,
            verdicts,
            first,
            last,
            base_offset,
            append_ns,
            metric_slots,
            slots,
            bounds,
            cache,
            dims,
            flat,
            table,
            shards,
            cells,
            rows,
            block,
            memo,
            codes,
            seed,
        )
        for i in range(first, last):
            j = i - first
            slot = block[j, _SLOT]
            if slot < 0:
                continue
            if (
                shards[SHARDS, FULL]
                | member_shards[SHARDS, FULL]
                | combo_shards[SHARDS, FULL]
                | value_shards[SHARDS, FULL]
            ) != 0:
                return i
            if has_files and not _is_here(block, j, slot, cells):
                combo_count = dims.counters[N_COMBOS]
                if not _bring_back(
                    block, j, slot, slots, cells, table, shards, members, member_table, member_shards, rows, counters,
                    files, combo_count, seed,
                ):  # fmt: skip
                    return i
            account = block[j, _ACCOUNT]
            offset = base_offset + i
            time = block[j, _TIME]
            agg = block[j, _AGG]
            start = block[j, _PERIOD_START]
            h = np.uint64(block[j, _PERIOD_HASH])
            key = cell_key(slot, PERIOD)
            cell = block[j, _PERIOD_ROW]
            if cell < 0 or not is_cell(cells, cell, account, start, key):
                cell = find_cell(table, shards, cells, h, account, start, key)
            if cell < 0:
                cell = _new_cell(cells, table, shards, counters, h, account, start, key)
            if agg == _COUNT_UNIQUE:
                lo, hi = unique_value(data, columns, i, uids[slot], work)
                cells[cell, W_LO] += apply_operation(
                    member_table,
                    member_shards,
                    members,
                    counters,
                    member_hash(cell, lo, hi, seed),
                    cell,
                    lo,
                    hi,
                    time,
                    offset,
                    operation_at(data, columns, i),
                )
                cells[cell, W_COUNT] += 1
            elif agg == _COUNT:
                add_count(cells, cell, time, offset)
            else:
                add_values(cells, cell, value_at(data, columns, i), time, offset)
            count = slots[slot, S_THRESHOLDS]
            if count > 0:
                _check_thresholds(
                    cells,
                    cell,
                    slot,
                    agg,
                    thresholds,
                    count,
                    rows,
                    alerts,
                    counters,
                    start,
                    block[j, _PERIOD_END],
                    offset,
                    append_ns,
                )
            if agg == _COUNT_UNIQUE:
                continue
            width = slots[slot, S_DIMENSIONS]
            start = block[j, _DAY_START]
            cell = np.int64(-1)
            if block[j, _COMBO] >= 0:
                h = np.uint64(block[j, _DAY_HASH])
                key = cell_key(slot, block[j, _COMBO])
                cell = block[j, _DAY_ROW]
                if cell < 0 or not is_cell(cells, cell, account, start, key):
                    cell = find_cell(table, shards, cells, h, account, start, key)
            if cell < 0 and width == 0:
                cell = _new_cell(cells, table, shards, counters, h, account, start, key)
                set_links(cells, cell, np.int64(-1), HEAD | 1)
            elif cell < 0:
                cell = _day_cell(
                    data,
                    columns,
                    i,
                    slot,
                    width,
                    offset,
                    account,
                    start,
                    block[j, _COMBO],
                    dims,
                    cells,
                    table,
                    shards,
                    counters,
                    codes,
                    seed,
                )
                if cell < 0:
                    continue
            if agg == _COUNT:
                add_count(cells, cell, time, offset)
            else:
                add_values(cells, cell, value_at(data, columns, i), time, offset)
        first = last
    return n


@kernel
def reindex_cells(state: Any, first: Any, seed: Any) -> Any:
    """Add the cells from row `first` on to their index. Returns the row to go on with; at the end, their number.

    The heads' own entries follow from who is head of a chain with combinations.
    """
    cells = state.cells
    table = state.table
    shards = state.shards
    n = state.counters[N_CELLS]
    for row in range(first, n):
        if shards[SHARDS, FULL] != 0:
            return np.int64(row)
        ahead = row + _REINDEX_AHEAD
        if ahead < n:
            h = cell_hash(cells[ahead, W_ACCOUNT], cells[ahead, W_START], cells[ahead, W_KEY], seed)
            prefetch(table, entry_position(shards, h))
        account = cells[row, W_ACCOUNT]
        start = cells[row, W_START]
        key = cells[row, W_KEY]
        if key == FREE:
            continue
        insert(table, shards, cell_hash(account, start, key, seed), row)
        combo = (key >> 32) & 0xFFFFFFFF
        if combo != PERIOD and combo != NO_COMBO and head_of(cells, row) & HEAD != 0:
            h = cell_hash(account, start, cell_key(key & 0xFFFFFFFF, HEAD_KEY), seed)
            insert(table, shards, h, row)
    return n
