"""The one pass of the fold over a payload.

Events are taken in log order, in blocks. For a block the kernel first works out every event's cells and asks for
the cache lines of their index entries, then for the lines of the cells themselves, and only then updates them, one
event after the other: with a million cold cells the waits for memory overlap instead of adding up.

A kernel that finds an index FULL stops between two events and says where to go on.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numba as nb
import numpy as np
import numpy.typing as npt

from tallymark_protocol import limits
from tallymark_protocol.kernels.intrinsics import prefetch
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
    head_of,
    next_of,
    prefetch_cell,
    set_links,
)
from tallymark_store.fold.dimensions import resolve_set
from tallymark_store.fold.index import FULL, SHARDS, entry_position, insert
from tallymark_store.fold.schemas import (
    S_AGG,
    S_DIMENSIONS,
    S_THRESHOLDS,
    day_bounds,
    period_bounds,
)
from tallymark_store.fold.thresholds import check
from tallymark_store.fold.uniques import apply_operation, member_hash, unique_value

Ints = npt.NDArray[np.int64]

# Counters of a state: rows in use.
N_CELLS = 0
N_MEMBERS = 1
N_ROWS = 2
N_ALERTS = 3
COUNTERS = 4

BLOCK = 64

# Columns of the scratch array, one row per event of a block.
_SLOT = 0  # -1: the event doesn't count
_TIME = 1
_PERIOD_START = 2
_PERIOD_END = 3
_DAY_START = 4
_COMBO = 5  # -1: not numbered yet
_PERIOD_HASH = 6
_DAY_HASH = 7
SCRATCH_FIELDS = 8

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
    table: npt.NDArray[np.uint64]  # the cells' index
    shards: Ints
    members: Ints  # int64[n, MEMBER_WORDS]
    member_table: npt.NDArray[np.uint64]
    member_shards: Ints
    rows: Ints  # int64[n, 2]: totals at which thresholds fire next
    alerts: Ints  # int64[n, ALERT_WORDS]
    counters: Ints


class Scratch(NamedTuple):
    """Memory that a kernel needs while it runs; its content means nothing between runs."""

    block: Ints  # int64[BLOCK, SCRATCH_FIELDS]
    memo: Ints  # int64[2^k, 2]: (metric, set), combination; -1 everywhere at the start
    codes: Ints  # int64[8]
    work: npt.NDArray[np.uint64]  # blake2b's


@nb.njit(nogil=True, cache=True)
def names_unknown(data: Any, columns: Any, verdicts: Any, metric_slots: Any) -> bool:
    """Whether an accepted event names a metric that has no slot."""
    for i in range(columns[C_EVENTS]):
        if (len(verdicts) == 0 or verdicts[i] == 0) and metric_slots[metric_at(data, columns, i)] < 0:
            return True
    return False


@nb.njit(nogil=True, cache=True)
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


@nb.njit(nogil=True, cache=True)
def _combo_of(
    data: Any, columns: Any, i: Any, slot: Any, width: Any, offset: Any, dims: Any, scratch: Any
) -> Any:
    """The combination of event i as far as it has a number, -1 if it has none."""
    metric = metric_at(data, columns, i)
    k = properties_at(data, columns, i)
    memo = scratch.memo
    at = (metric * 31 + k) & (len(memo) - 1)
    key = (metric << 32) | k
    if memo[at, 0] == key:
        return memo[at, 1]
    combo = _resolve(data, columns, i, slot, width, offset, False, dims, scratch.codes)
    if combo >= 0:
        memo[at, 0] = key
        memo[at, 1] = combo
    return combo


@nb.njit(nogil=True, cache=True)
def _new_cell(state: Any, h: Any, account: Any, start: Any, key: Any) -> Any:
    row = state.counters[N_CELLS]
    cells = state.cells
    # Fresh rows are zero.
    cells[row, W_ACCOUNT] = account
    cells[row, W_START] = start
    cells[row, W_KEY] = key
    state.counters[N_CELLS] = row + 1
    insert(state.table, state.shards, h, row)
    return row


@nb.njit(nogil=True, cache=True)
def _day_cell(
    data: Any,
    columns: Any,
    i: Any,
    slot: Any,
    width: Any,
    offset: Any,
    account: Any,
    start: Any,
    dims: Any,
    state: Any,
    scratch: Any,
    seed: Any,
) -> Any:
    """The day cell of an event whose metric has dimensions; -1 when its day has too many combinations."""
    combo = _combo_of(data, columns, i, slot, width, offset, dims, scratch)
    if combo >= 0:
        key = cell_key(slot, combo)
        h = cell_hash(account, start, key, seed)
        row = find_cell(state.table, state.shards, state.cells, h, account, start, key)
        if row >= 0:
            return row
    head_hash = cell_hash(account, start, cell_key(slot, HEAD_KEY), seed)
    head = find_head(state.table, state.shards, state.cells, head_hash, account, start, slot)
    if head >= 0:
        aux = head_of(state.cells, head)
        if aux & LENGTH_MASK >= _COMBINATIONS_MAX:
            set_links(state.cells, head, next_of(state.cells, head), aux | OVERFLOW)
            return np.int64(-1)
    if combo < 0:
        combo = _resolve(data, columns, i, slot, width, offset, True, dims, scratch.codes)
    key = cell_key(slot, combo)
    row = _new_cell(state, cell_hash(account, start, key, seed), account, start, key)
    if head < 0:
        insert(state.table, state.shards, head_hash, row)
        set_links(state.cells, row, np.int64(-1), HEAD | 1)
    else:
        set_links(state.cells, row, next_of(state.cells, head), np.int64(0))
        set_links(state.cells, head, row, head_of(state.cells, head) + 1)
    return row


@nb.njit(nogil=True, cache=True)
def _plan_block(
    data: Any,
    columns: Any,
    verdicts: Any,
    first: Any,
    last: Any,
    base_offset: Any,
    append_ns: Any,
    metric_slots: Any,
    schemas: Any,
    dims: Any,
    state: Any,
    scratch: Any,
    seed: Any,
) -> None:
    block = scratch.block
    for i in range(first, last):
        j = i - first
        block[j, _SLOT] = -1
        if len(verdicts) != 0 and verdicts[i] != 0:
            continue
        slot = metric_slots[metric_at(data, columns, i)]
        time = time_at(data, columns, i)
        if time == _TIME_ABSENT:
            time = append_ns
        account = np.int64(account_at(data, columns, i))
        period_start, period_end = period_bounds(schemas, slot, time)
        block[j, _SLOT] = slot
        block[j, _TIME] = time
        block[j, _PERIOD_START] = period_start
        block[j, _PERIOD_END] = period_end
        h = cell_hash(account, period_start, cell_key(slot, PERIOD), seed)
        block[j, _PERIOD_HASH] = np.int64(h)
        prefetch(state.table, entry_position(state.shards, h))
        if schemas.slots[slot, S_AGG] == _COUNT_UNIQUE:
            continue
        day_start, _ = day_bounds(schemas, slot, time)
        combo = np.int64(NO_COMBO)
        width = schemas.slots[slot, S_DIMENSIONS]
        if width > 0:
            combo = _combo_of(data, columns, i, slot, width, base_offset + i, dims, scratch)
        block[j, _DAY_START] = day_start
        block[j, _COMBO] = combo
        if combo >= 0:
            h = cell_hash(account, day_start, cell_key(slot, combo), seed)
            block[j, _DAY_HASH] = np.int64(h)
            prefetch(state.table, entry_position(state.shards, h))
    for j in range(last - first):
        slot = block[j, _SLOT]
        if slot < 0:
            continue
        prefetch_cell(state.table, state.shards, state.cells, np.uint64(block[j, _PERIOD_HASH]))
        if schemas.slots[slot, S_AGG] != _COUNT_UNIQUE and block[j, _COMBO] >= 0:
            prefetch_cell(state.table, state.shards, state.cells, np.uint64(block[j, _DAY_HASH]))


@nb.njit(nogil=True, cache=True)
def _check_thresholds(
    state: Any, cell: Any, slot: Any, plan: Any, schemas: Any, offset: Any, append_ns: Any
) -> None:
    agg = schemas.slots[slot, S_AGG]
    cells = state.cells
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
    rows, alerts = check(
        cells,
        cell,
        slot,
        schemas.thresholds,
        slot * _THRESHOLDS_MAX,
        schemas.slots[slot, S_THRESHOLDS],
        state.rows,
        state.counters[N_ROWS],
        state.alerts,
        state.counters[N_ALERTS],
        lo,
        hi,
        plan[_PERIOD_START],
        plan[_PERIOD_END],
        offset,
        append_ns,
    )
    state.counters[N_ROWS] = rows
    state.counters[N_ALERTS] = alerts


@nb.njit(nogil=True, cache=True)
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
) -> int:
    """Fold a payload's accepted events from event `first` on. Returns the event to go on with; at the end, n.

    `verdicts` is uint8[n], or empty when all are accepted. Dense arrays must have room for everything the payload
    can add (see `Fold.apply`).
    """
    n = columns[C_EVENTS]
    cells = state.cells
    block = scratch.block
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
            schemas,
            dims,
            state,
            scratch,
            seed,
        )
        for i in range(first, last):
            plan = block[i - first]
            slot = plan[_SLOT]
            if slot < 0:
                continue
            if (
                state.shards[SHARDS, FULL]
                | state.member_shards[SHARDS, FULL]
                | dims.combo_shards[SHARDS, FULL]
                | dims.value_shards[SHARDS, FULL]
            ) != 0:
                return i
            account = np.int64(account_at(data, columns, i))
            offset = base_offset + i
            time = plan[_TIME]
            agg = schemas.slots[slot, S_AGG]
            h = np.uint64(plan[_PERIOD_HASH])
            key = cell_key(slot, PERIOD)
            cell = find_cell(state.table, state.shards, cells, h, account, plan[_PERIOD_START], key)
            if cell < 0:
                cell = _new_cell(state, h, account, plan[_PERIOD_START], key)
            if agg == _COUNT_UNIQUE:
                lo, hi = unique_value(data, columns, i, schemas.uids[slot], scratch.work)
                change, added = apply_operation(
                    state.member_table,
                    state.member_shards,
                    state.members,
                    state.counters[N_MEMBERS],
                    member_hash(cell, lo, hi, seed),
                    cell,
                    lo,
                    hi,
                    time,
                    offset,
                    operation_at(data, columns, i),
                )
                state.counters[N_MEMBERS] += added
                cells[cell, W_LO] += change
                cells[cell, W_COUNT] += 1
            elif agg == _COUNT:
                add_count(cells, cell, time, offset)
            else:
                add_values(cells, cell, value_at(data, columns, i), time, offset)
            if schemas.slots[slot, S_THRESHOLDS] > 0:
                _check_thresholds(state, cell, slot, plan, schemas, offset, append_ns)
            if agg == _COUNT_UNIQUE:
                continue
            width = schemas.slots[slot, S_DIMENSIONS]
            if width == 0:
                key = cell_key(slot, NO_COMBO)
                h = np.uint64(plan[_DAY_HASH])
                day = find_cell(state.table, state.shards, cells, h, account, plan[_DAY_START], key)
                if day < 0:
                    day = _new_cell(state, h, account, plan[_DAY_START], key)
                    set_links(cells, day, np.int64(-1), HEAD | 1)
            else:
                day = np.int64(-1)
                if plan[_COMBO] >= 0:
                    key = cell_key(slot, plan[_COMBO])
                    h = np.uint64(plan[_DAY_HASH])
                    day = find_cell(state.table, state.shards, cells, h, account, plan[_DAY_START], key)
                if day < 0:
                    day = _day_cell(
                        data,
                        columns,
                        i,
                        slot,
                        width,
                        offset,
                        account,
                        plan[_DAY_START],
                        dims,
                        state,
                        scratch,
                        seed,
                    )
                if day < 0:
                    continue
            if agg == _COUNT:
                add_count(cells, day, time, offset)
            else:
                add_values(cells, day, value_at(data, columns, i), time, offset)
        first = last
    return n


@nb.njit(nogil=True, cache=True)
def reindex_cells(state: Any, seed: Any) -> None:
    """Fill the cells' empty index. The heads' own entries follow from who is head of a chain with combinations."""
    cells = state.cells
    for row in range(state.counters[N_CELLS]):
        account = cells[row, W_ACCOUNT]
        start = cells[row, W_START]
        key = cells[row, W_KEY]
        insert(state.table, state.shards, cell_hash(account, start, key, seed), row)
        combo = (key >> 32) & 0xFFFFFFFF
        if combo != PERIOD and combo != NO_COMBO and head_of(cells, row) & HEAD != 0:
            h = cell_hash(account, start, cell_key(key & 0xFFFFFFFF, HEAD_KEY), seed)
            insert(state.table, state.shards, h, row)
