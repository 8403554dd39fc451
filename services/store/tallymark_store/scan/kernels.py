"""Kernels over the raw events of many records at once: selecting them, and adding them up.

A call covers a run of event batches that lie in one buffer (a segment), so that Python costs something per
segment and nothing per event. Per record the order is: header, metric table, account column, and only for the
events that are left verdict, time, properties and value. Property sets are resolved once per record and set.

Sums go to **rows** (`R_` fields), one per (bucket, account, group), found through an open-addressing table. A
**group** is one code per grouped dimension: `CODE_MISSING`, `CODE_OTHER`, or `CODE_VALUES` + the number of a
value. COUNT_UNIQUE keeps a second table, (row, value) -> the operation that counts (`U_` fields).

Kernels never allocate. Where a table is full they return a `NEED_` status, having changed nothing for the event at
hand; `state` says where to go on once the caller has grown the table.
"""

from typing import Any

import numba as nb
import numpy as np

from tallymark_protocol import layout as lay
from tallymark_protocol.kernels.blake2b import blake2b_128
from tallymark_protocol.kernels.intrinsics import (
    copy_bytes,
    equal_bytes,
    hash_bytes,
    load_u8,
    load_u16,
    load_u32,
    load_u64,
    mix64,
)
from tallymark_protocol.payload import (
    C_ACCOUNT,
    C_ACCOUNT_ENCODING,
    C_EVENTS,
    C_ID_BYTES,
    C_ID_ENCODING,
    C_ID_ENDS,
    C_METRIC_BYTES,
    C_METRIC_ENCODING,
    C_METRIC_ENDS,
    C_METRICS,
    C_PROPERTY_BYTES,
    C_PROPERTY_ENDS,
    C_PROPERTY_SETS,
    C_TEXT_BYTES,
    C_TEXT_ENCODING,
    C_TEXT_ENDS,
    account_at,
    metric_at,
    operation_at,
    place_payload,
    properties_at,
    table_end,
    table_start,
    time_at,
    value_at,
)
from tallymark_store.batch import PREFIX_BYTES

# Columns of a records array (int64[n, RECORD_COLUMNS]).
K_BASE = 0  # offset of the first event
K_COUNT = 1
K_APPEND = 2
K_BODY = 3  # position of the body in the buffer
K_LENGTH = 4
RECORD_COLUMNS = 5

# Results of a kernel.
DONE = 0
NEED_ROWS = 1
NEED_GROUPS = 2
NEED_VALUES = 3
NEED_UNIQUES = 4
FULL = 5  # no room for a further hit
MALFORMED = 6  # of the record that `state` points at

# Fields of a state array.
S_RECORD = 0  # where to go on: index in the records array
S_EVENT = 1  # and in that record
S_ROWS = 2  # used entries of each table
S_GROUPS = 3
S_VALUES = 4
S_POOL = 5  # used bytes of the value pool
S_UNIQUES = 6
S_HITS = 7
STATE_FIELDS = 8

# Fields of a request array.
Q_ACCOUNT = 0  # the bits of the account id
Q_ALL_ACCOUNTS = 1
Q_AGGREGATION = 2  # an A_ value
Q_UID = 3
Q_PASS = 4  # COUNT_UNIQUE in several passes: this one takes the values whose hash says so
Q_PASSES = 5
Q_KEEP_ACCOUNTS = 6  # rows are per account
REQUEST_FIELDS = 7

A_COUNT = 0  # the value is ignored
A_VALUES = 1
A_UNIQUE = 2

# Fields of a row (int64[n, ROW_FIELDS]); accounts and sum_lo are the bits of a uint64.
R_BUCKET = 0
R_ACCOUNT = 1
R_GROUP = 2
R_COUNT = 3
R_SUM_LO = 4
R_SUM_HI = 5
R_MIN = 6
R_MAX = 7
R_LAST_VALUE = 8
R_LAST_TIME = 9
R_LAST_OFFSET = 10
R_UNIQUE = 11
ROW_FIELDS = 12

# Fields of an entry of the unique table (int64[n, UNIQUE_FIELDS]).
U_ROW = 0
U_LO = 1
U_HI = 2
U_TIME = 3
U_OFFSET = 4
U_STATE = 5  # 0: free, 1: member, 2: removed
UNIQUE_FIELDS = 6

CODE_MISSING = 0
CODE_OTHER = 1
CODE_VALUES = 2

# Fields of a dimension (int64[n, DIM_FIELDS]).
D_KEY_START = 0  # in the key pool
D_KEY_END = 1
D_ANY = 2  # any value counts as declared
D_FILTERED = 3  # only values that are allowed pass
D_GROUP = 4  # place in the group, -1: not grouped by
DIM_FIELDS = 5

# Fields of a value (int64[n, VALUE_FIELDS]).
V_DIM = 0
V_START = 1  # in the value pool
V_END = 2
V_SINCE = 3  # events below this offset came before the value was declared
V_ALLOWED = 4  # it passes the dimension's filter
VALUE_FIELDS = 5

# Fields of an event (int64[n, EVENT_FIELDS]). Starts and ends are positions in the buffer; equal where there is none.
E_OFFSET = 0
E_APPEND = 1
E_ACCOUNT = 2  # bits of a uint64
E_VALUE = 3
E_TIME = 4
E_OPERATION = 5
E_CODE_START = 6
E_CODE_END = 7
E_SET_START = 8
E_SET_END = 9
E_ID_START = 10
E_ID_END = 11
E_TEXT_START = 12
E_TEXT_END = 13
EVENT_FIELDS = 14

_TIME_ABSENT = lay.TIME_ABSENT
_BLOCK = 256
REFUSED = -1  # a property set that a filter refuses
UNRESOLVED = -2
FULL_GROUPS = -3
FULL_VALUES = -4
_MINUS_ONE = 0xFFFFFFFFFFFFFFFF


@nb.njit(nogil=True, cache=True)
def open_record(data: Any, body: Any, length: Any, count: Any, columns: Any) -> Any:
    """Fill `columns` for an event batch; return the position of its verdicts, -1 for none, -2 if malformed."""
    if length < PREFIX_BYTES:
        return np.int64(-2)
    n = np.int64(load_u32(data, body + 4))
    verdict_bytes = np.int64(load_u32(data, body + 8))
    originals = np.int64(load_u32(data, body + 12))
    if n != count or (verdict_bytes != 0 and verdict_bytes != n) or originals > verdict_bytes:
        return np.int64(-2)
    head = PREFIX_BYTES + verdict_bytes + 8 * originals
    if head > length:
        return np.int64(-2)
    if place_payload(data, body + head, length - head, columns) != 0 or columns[C_EVENTS] != n:
        return np.int64(-2)
    if verdict_bytes == 0:
        return np.int64(-1)
    return np.int64(body + PREFIX_BYTES)


@nb.njit(nogil=True, cache=True)
def match_metrics(data: Any, columns: Any, code: Any, match: Any) -> Any:
    """Mark in `match` which entries of the metric table are `code`; an empty code is every metric.

    Returns 0: none, 1: some, 2: all that events can name. The table may name a code more than once.
    """
    entries = columns[C_METRICS] if columns[C_METRIC_ENCODING] != 0 else 1
    found = 0
    for k in range(entries):
        start = table_start(data, columns[C_METRIC_ENDS], columns[C_METRIC_BYTES], k)
        end = table_end(data, columns[C_METRIC_ENDS], columns[C_METRIC_BYTES], k)
        same = len(code) == 0
        if not same and end - start == len(code):
            same = equal_bytes(data, start, code, np.int64(0), end - start)
        match[k] = 1 if same else 0
        if same:
            found += 1
    if found == 0:
        return 0
    return 2 if found == entries else 1


@nb.njit(nogil=True, cache=True)
def _accounts_in_block(data: Any, position: Any, count: Any, account: Any) -> Any:
    hits = 0
    for i in range(count):
        hits += 1 if load_u64(data, position + 8 * i) == account else 0
    return hits


@nb.njit(nogil=True, cache=True, forceinline=True)
def next_of_account(data: Any, columns: Any, i: Any, account: Any) -> Any:
    """The first event of the account at or after event i; the event count if there is none."""
    n = columns[C_EVENTS]
    position = columns[C_ACCOUNT]
    if columns[C_ACCOUNT_ENCODING] != 2:
        return i if i < n and load_u64(data, position) == account else n
    while i < n:
        # A loop without exits is vectorised; which of the block's events it was is asked for hits only.
        # Blocks begin at multiples so that a resumed scan reads a block's rest and no more.
        stop = min(n, (i // _BLOCK + 1) * _BLOCK)
        if _accounts_in_block(data, position + 8 * i, stop - i, account) != 0:
            while load_u64(data, position + 8 * i) != account:
                i += 1
            return i
        i = stop
    return n


@nb.njit(nogil=True, cache=True, inline="always")
def event_time(data: Any, columns: Any, i: Any, append_ns: Any) -> Any:
    """The event time of event i; its append time where it was sent without one."""
    time = time_at(data, columns, i)
    return append_ns if time == _TIME_ABSENT else time


@nb.njit(nogil=True, cache=True, forceinline=True)
def interval_of(starts: Any, ends: Any, time: Any) -> Any:
    """Which of the sorted disjoint intervals holds `time`; -1 if none."""
    low = 0
    high = len(starts)
    while low < high:
        middle = (low + high) >> 1
        if ends[middle] <= time:
            low = middle + 1
        else:
            high = middle
    if low < len(starts) and starts[low] <= time:
        return low
    return -1


@nb.njit(nogil=True, cache=True)
def find_value(pool: Any, values: Any, index: Any, dim: Any, data: Any, start: Any, end: Any) -> Any:
    """Look a value up; return its number, or the negative of (1 + the free slot of `index`)."""
    mask = len(index) - 1
    slot = np.int64(hash_bytes(data, start, end, np.uint64(dim)) & np.uint64(mask))
    while True:
        v = np.int64(index[slot])
        if v < 0:
            return -1 - slot
        if (
            values[v, V_DIM] == dim
            and values[v, V_END] - values[v, V_START] == end - start
            and equal_bytes(pool, values[v, V_START], data, start, end - start)
        ):
            return v
        slot = (slot + 1) & mask


@nb.njit(nogil=True, cache=True)
def _find_group(groups: Any, group_index: Any, width: Any, state: Any, codes: Any) -> Any:
    """The number of the group `codes[:width]`, made if new."""
    h = np.uint64(width)
    for d in range(width):
        h = mix64(h ^ np.uint64(codes[d])) + np.uint64(0x9E3779B97F4A7C15)
    mask = len(group_index) - 1
    slot = np.int64(mix64(h) & np.uint64(mask))
    while True:
        g = np.int64(group_index[slot])
        if g < 0:
            break
        same = True
        for d in range(width):
            if groups[g, d] != codes[d]:
                same = False
        if same:
            return g
        slot = (slot + 1) & mask
    g = state[S_GROUPS]
    if g == len(groups):
        return FULL_GROUPS
    for d in range(width):
        groups[g, d] = codes[d]
    group_index[slot] = g
    state[S_GROUPS] = g + 1
    return g


@nb.njit(nogil=True, cache=True)
def _value_code(
    data: Any,
    start: Any,
    end: Any,
    base: Any,
    d: Any,
    dims: Any,
    pool: Any,
    values: Any,
    value_index: Any,
    state: Any,
) -> Any:
    """The code of a present value of dimension d; REFUSED by the filter, FULL_VALUES."""
    v = find_value(pool, values, value_index, d, data, start, end)
    if v >= 0 and values[v, V_SINCE] <= base:
        if dims[d, D_FILTERED] != 0 and values[v, V_ALLOWED] == 0:
            return np.int64(REFUSED)
        return np.int64(CODE_VALUES + v)
    if dims[d, D_FILTERED] != 0:
        return np.int64(REFUSED)
    if dims[d, D_ANY] == 0:
        return np.int64(CODE_OTHER)
    if dims[d, D_GROUP] < 0:
        return np.int64(CODE_OTHER)  # nobody asks which
    fresh = state[S_VALUES]
    length = end - start
    if fresh == len(values) or state[S_POOL] + length > len(pool):
        return np.int64(FULL_VALUES)
    copy_bytes(pool, state[S_POOL], data, start, length)
    values[fresh, V_DIM] = d
    values[fresh, V_START] = state[S_POOL]
    values[fresh, V_END] = state[S_POOL] + length
    values[fresh, V_SINCE] = 0
    values[fresh, V_ALLOWED] = 1
    value_index[-1 - v] = fresh
    state[S_POOL] += length
    state[S_VALUES] = fresh + 1
    return np.int64(CODE_VALUES + fresh)


@nb.njit(nogil=True, cache=True)
def resolve_set(
    data: Any,
    start: Any,
    end: Any,
    base: Any,
    dims: Any,
    keys: Any,
    pool: Any,
    values: Any,
    value_index: Any,
    groups: Any,
    group_index: Any,
    state: Any,
    codes: Any,
) -> Any:
    """The group of the property set at [start, end); REFUSED, FULL_GROUPS or FULL_VALUES."""
    count = len(dims)
    width = 0
    missing_filtered = 0
    for d in range(count):
        if dims[d, D_GROUP] >= 0:
            codes[dims[d, D_GROUP]] = CODE_MISSING
            width += 1
        if dims[d, D_FILTERED] != 0:
            missing_filtered += 1
    position = start
    while position < end:
        key_length = np.int64(load_u8(data, position))
        key = position + 1
        value = key + key_length + 2
        value_end = value + np.int64(load_u16(data, key + key_length))
        position = value_end
        for d in range(count):
            if dims[d, D_KEY_END] - dims[d, D_KEY_START] != key_length:
                continue
            if not equal_bytes(keys, dims[d, D_KEY_START], data, key, key_length):
                continue
            code = _value_code(data, value, value_end, base, d, dims, pool, values, value_index, state)
            if code < 0:
                return code
            if dims[d, D_FILTERED] != 0:
                missing_filtered -= 1
            if dims[d, D_GROUP] >= 0:
                codes[dims[d, D_GROUP]] = code
    if missing_filtered != 0:
        return np.int64(REFUSED)
    return np.int64(_find_group(groups, group_index, width, state, codes))


@nb.njit(nogil=True, cache=True, inline="always")
def _row_hash(bucket: Any, account: Any, group: Any) -> Any:
    other = np.uint64(bucket) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(group) * np.uint64(
        0xD6E8FEB86659FD93
    )
    return mix64(np.uint64(account) ^ other)


@nb.njit(nogil=True, cache=True, forceinline=True)
def find_row(rows: Any, row_index: Any, state: Any, bucket: Any, account: Any, group: Any) -> Any:
    """The row of a key (all int64), made empty if new; -1 when there is no room for it."""
    mask = len(row_index) - 1
    slot = np.int64(_row_hash(bucket, account, group) & np.uint64(mask))
    while True:
        row = np.int64(row_index[slot])
        if row < 0:
            break
        if rows[row, R_BUCKET] == bucket and rows[row, R_ACCOUNT] == account and rows[row, R_GROUP] == group:
            return row
        slot = (slot + 1) & mask
    row = state[S_ROWS]
    if row == len(rows):
        return -1
    for field in range(ROW_FIELDS):
        rows[row, field] = 0
    rows[row, R_BUCKET] = bucket
    rows[row, R_ACCOUNT] = account
    rows[row, R_GROUP] = group
    rows[row, R_LAST_OFFSET] = -1
    row_index[slot] = row
    state[S_ROWS] = row + 1
    return row


@nb.njit(nogil=True, cache=True, inline="always")
def add_128(rows: Any, row: Any, lo: Any, hi: Any) -> None:
    """Add a 128-bit number (bits as int64) to a row's sum."""
    before = np.uint64(rows[row, R_SUM_LO])
    after = before + np.uint64(lo)
    rows[row, R_SUM_LO] = np.int64(after)
    rows[row, R_SUM_HI] += hi + (1 if after < before else 0)


@nb.njit(nogil=True, cache=True, inline="always")
def _later(rows: Any, row: Any, time: Any, offset: Any) -> Any:
    last = rows[row, R_LAST_TIME]
    return rows[row, R_LAST_OFFSET] < 0 or time > last or (time == last and offset > rows[row, R_LAST_OFFSET])


@nb.njit(nogil=True, cache=True, forceinline=True)
def add_value(rows: Any, row: Any, aggregation: Any, value: Any, time: Any, offset: Any) -> None:
    """Add an event to a row."""
    if aggregation == A_VALUES:
        if rows[row, R_COUNT] == 0:
            rows[row, R_MIN] = value
            rows[row, R_MAX] = value
        else:
            rows[row, R_MIN] = min(rows[row, R_MIN], value)
            rows[row, R_MAX] = max(rows[row, R_MAX], value)
        add_128(rows, row, value, -1 if value < 0 else 0)
    if _later(rows, row, time, offset):
        rows[row, R_LAST_TIME] = time
        rows[row, R_LAST_OFFSET] = offset
        if aggregation == A_VALUES:
            rows[row, R_LAST_VALUE] = value
    rows[row, R_COUNT] += 1


@nb.njit(nogil=True, cache=True, forceinline=True)
def _unique_value(data: Any, columns: Any, i: Any, uid: Any, work: Any) -> Any:
    """The 128 bits that stand for event i's value in a set, as two int64."""
    if columns[C_TEXT_ENCODING] == 2:
        start = table_start(data, columns[C_TEXT_ENDS], columns[C_TEXT_BYTES], i)
        end = table_end(data, columns[C_TEXT_ENDS], columns[C_TEXT_BYTES], i)
        if end > start:
            if load_u8(data, start) == 2 and end - start == 9:
                return np.int64(load_u64(data, start + 1)), np.int64(0)
            lo, hi = blake2b_128(np.uint64(0), np.uint64(uid), data, start, end, work)
            return np.int64(lo), np.int64(hi)
    return np.int64(value_at(data, columns, i)), np.int64(0)


@nb.njit(nogil=True, cache=True, inline="always")
def _unique_hash(row: Any, lo: Any, hi: Any) -> Any:
    return mix64(mix64(np.uint64(lo) ^ mix64(np.uint64(hi))) + np.uint64(row) * np.uint64(0x9E3779B97F4A7C15))


@nb.njit(nogil=True, cache=True, forceinline=True)
def add_operation(
    rows: Any, row: Any, uniques: Any, state: Any, lo: Any, hi: Any, time: Any, offset: Any, operation: Any
) -> None:
    """Let an operation take effect unless a later one (by time, then offset) has. There is room for it."""
    mask = len(uniques) - 1
    slot = np.int64(_unique_hash(row, lo, hi) & np.uint64(mask))
    while uniques[slot, U_STATE] != 0:
        if uniques[slot, U_ROW] == row and uniques[slot, U_LO] == lo and uniques[slot, U_HI] == hi:
            break
        slot = (slot + 1) & mask
    after = 2 if operation == 2 else 1
    before = uniques[slot, U_STATE]
    if before == 0:
        uniques[slot, U_ROW] = row
        uniques[slot, U_LO] = lo
        uniques[slot, U_HI] = hi
        state[S_UNIQUES] += 1
    elif uniques[slot, U_TIME] > time or (uniques[slot, U_TIME] == time and uniques[slot, U_OFFSET] > offset):
        return
    uniques[slot, U_TIME] = time
    uniques[slot, U_OFFSET] = offset
    uniques[slot, U_STATE] = after
    if after == 1 and before != 1:
        rows[row, R_UNIQUE] += 1
    elif after == 2 and before == 1:
        rows[row, R_UNIQUE] -= 1


@nb.njit(nogil=True, cache=True)
def scan_totals(
    data: Any,
    records: Any,
    request: Any,
    code: Any,
    starts: Any,
    ends: Any,
    buckets: Any,
    dims: Any,
    keys: Any,
    pool: Any,
    values: Any,
    value_index: Any,
    groups: Any,
    group_index: Any,
    memo: Any,
    match: Any,
    rows: Any,
    row_index: Any,
    uniques: Any,
    state: Any,
    columns: Any,
    codes: Any,
    work: Any,
) -> Any:
    """Add the wanted events of `records` (all in `data`) to `rows`, from where `state` says; see the module.

    An event is wanted when it is accepted, of the metric `code`, of the account (or all are wanted), timed in one of
    the intervals (sorted, disjoint; `buckets` says what each counts for) and passed by the dimension filters.
    """
    account = np.uint64(request[Q_ACCOUNT])
    every_account = request[Q_ALL_ACCOUNTS] != 0
    aggregation = request[Q_AGGREGATION]
    use_sets = len(dims) > 0
    interval = 0
    for r in range(state[S_RECORD], len(records)):
        state[S_RECORD] = r
        first = state[S_EVENT]
        state[S_EVENT] = 0
        base = records[r, K_BASE]
        append_ns = records[r, K_APPEND]
        verdicts = open_record(data, records[r, K_BODY], records[r, K_LENGTH], records[r, K_COUNT], columns)
        if verdicts == -2:
            return MALFORMED
        matched = match_metrics(data, columns, code, match)
        if matched == 0:
            continue
        if use_sets:
            memo[: columns[C_PROPERTY_SETS] + 1] = UNRESOLVED
        n = columns[C_EVENTS]
        i = first
        while i < n:
            if not every_account:
                i = next_of_account(data, columns, i, account)
                if i >= n:
                    break
            event = i
            i += 1
            if matched == 1 and match[metric_at(data, columns, event)] == 0:
                continue
            if verdicts >= 0 and load_u8(data, verdicts + event) != 0:
                continue
            time = event_time(data, columns, event, append_ns)
            # Events mostly fall where the one before did.
            if not (starts[interval] <= time and time < ends[interval]):
                found = interval_of(starts, ends, time)
                if found < 0:
                    continue
                interval = found
            group = np.int64(0)
            if use_sets:
                k = properties_at(data, columns, event)
                group = memo[k]
                if group == UNRESOLVED:
                    start = np.int64(0)
                    end = np.int64(0)
                    if k > 0:
                        start = table_start(data, columns[C_PROPERTY_ENDS], columns[C_PROPERTY_BYTES], k - 1)
                        end = table_end(data, columns[C_PROPERTY_ENDS], columns[C_PROPERTY_BYTES], k - 1)
                    group = resolve_set(
                        data,
                        start,
                        end,
                        base,
                        dims,
                        keys,
                        pool,
                        values,
                        value_index,
                        groups,
                        group_index,
                        state,
                        codes,
                    )
                    if group in (FULL_GROUPS, FULL_VALUES):
                        state[S_EVENT] = event
                        return NEED_GROUPS if group == FULL_GROUPS else NEED_VALUES
                    memo[k] = group
                if group == REFUSED:
                    continue
            if aggregation == A_UNIQUE and 4 * (state[S_UNIQUES] + 1) > 3 * len(uniques):
                state[S_EVENT] = event
                return NEED_UNIQUES
            owner = (
                np.int64(account_at(data, columns, event)) if request[Q_KEEP_ACCOUNTS] != 0 else np.int64(0)
            )
            row = find_row(rows, row_index, state, buckets[interval], owner, group)
            if row < 0:
                state[S_EVENT] = event
                return NEED_ROWS
            offset = base + event
            if aggregation != A_UNIQUE:
                add_value(rows, row, aggregation, value_at(data, columns, event), time, offset)
                continue
            lo, hi = _unique_value(data, columns, event, request[Q_UID], work)
            if request[Q_PASS] == 0:
                rows[row, R_COUNT] += 1
            if request[Q_PASSES] > 1:
                part = mix64(mix64(np.uint64(lo)) + np.uint64(hi)) >> np.uint64(32)
                if np.int64(part) % request[Q_PASSES] != request[Q_PASS]:
                    continue
            add_operation(rows, row, uniques, state, lo, hi, time, offset, operation_at(data, columns, event))
    state[S_RECORD] = len(records)
    state[S_EVENT] = 0
    return DONE


@nb.njit(nogil=True, cache=True)
def select_events(
    data: Any,
    records: Any,
    request: Any,
    code: Any,
    start: Any,
    end: Any,
    from_offset: Any,
    match: Any,
    hits: Any,
    state: Any,
    columns: Any,
) -> Any:
    """Collect wanted events in log order as (record, event) in `hits`, until it is FULL or the records are DONE.

    An empty `code` wants every metric.
    """
    account = np.uint64(request[Q_ACCOUNT])
    every_account = request[Q_ALL_ACCOUNTS] != 0
    for r in range(state[S_RECORD], len(records)):
        state[S_RECORD] = r
        first = state[S_EVENT]
        state[S_EVENT] = 0
        append_ns = records[r, K_APPEND]
        verdicts = open_record(data, records[r, K_BODY], records[r, K_LENGTH], records[r, K_COUNT], columns)
        if verdicts == -2:
            return MALFORMED
        matched = match_metrics(data, columns, code, match)
        if matched == 0:
            continue
        n = columns[C_EVENTS]
        i = max(first, from_offset - records[r, K_BASE])
        while i < n:
            if not every_account:
                i = next_of_account(data, columns, i, account)
                if i >= n:
                    break
            event = i
            i += 1
            if matched == 1 and match[metric_at(data, columns, event)] == 0:
                continue
            if verdicts >= 0 and load_u8(data, verdicts + event) != 0:
                continue
            time = event_time(data, columns, event, append_ns)
            if time < start or time >= end:
                continue
            if state[S_HITS] == len(hits):
                state[S_EVENT] = event
                return FULL
            hits[state[S_HITS], 0] = r
            hits[state[S_HITS], 1] = event
            state[S_HITS] += 1
    state[S_RECORD] = len(records)
    state[S_EVENT] = 0
    return DONE


@nb.njit(nogil=True, cache=True)
def describe_events(data: Any, records: Any, hits: Any, columns: Any, out: Any) -> None:
    """Fill `out` (int64[n, EVENT_FIELDS]) with what the events `hits` of `select_events` are."""
    opened = np.int64(-1)
    for h in range(len(hits)):
        r = hits[h, 0]
        i = hits[h, 1]
        if r != opened:
            open_record(data, records[r, K_BODY], records[r, K_LENGTH], records[r, K_COUNT], columns)
            opened = r
        metric = metric_at(data, columns, i)
        k = properties_at(data, columns, i)
        out[h, E_OFFSET] = records[r, K_BASE] + i
        out[h, E_APPEND] = records[r, K_APPEND]
        out[h, E_ACCOUNT] = np.int64(account_at(data, columns, i))
        out[h, E_VALUE] = value_at(data, columns, i)
        out[h, E_TIME] = event_time(data, columns, i, records[r, K_APPEND])
        out[h, E_OPERATION] = operation_at(data, columns, i)
        out[h, E_CODE_START] = table_start(data, columns[C_METRIC_ENDS], columns[C_METRIC_BYTES], metric)
        out[h, E_CODE_END] = table_end(data, columns[C_METRIC_ENDS], columns[C_METRIC_BYTES], metric)
        for field in range(E_SET_START, EVENT_FIELDS):
            out[h, field] = 0
        if k > 0:
            out[h, E_SET_START] = table_start(
                data, columns[C_PROPERTY_ENDS], columns[C_PROPERTY_BYTES], k - 1
            )
            out[h, E_SET_END] = table_end(data, columns[C_PROPERTY_ENDS], columns[C_PROPERTY_BYTES], k - 1)
        if columns[C_ID_ENCODING] == 2:
            out[h, E_ID_START] = table_start(data, columns[C_ID_ENDS], columns[C_ID_BYTES], i)
            out[h, E_ID_END] = table_end(data, columns[C_ID_ENDS], columns[C_ID_BYTES], i)
        if columns[C_TEXT_ENCODING] == 2:
            out[h, E_TEXT_START] = table_start(data, columns[C_TEXT_ENDS], columns[C_TEXT_BYTES], i)
            out[h, E_TEXT_END] = table_end(data, columns[C_TEXT_ENDS], columns[C_TEXT_BYTES], i)


@nb.njit(nogil=True, cache=True)
def rebuild_row_index(rows: Any, used: Any, row_index: Any) -> None:
    """Fill an emptied index (-1 everywhere) from the rows."""
    mask = len(row_index) - 1
    for row in range(used):
        h = _row_hash(rows[row, R_BUCKET], rows[row, R_ACCOUNT], rows[row, R_GROUP])
        slot = np.int64(h & np.uint64(mask))
        while row_index[slot] >= 0:
            slot = (slot + 1) & mask
        row_index[slot] = row


@nb.njit(nogil=True, cache=True)
def rebuild_group_index(groups: Any, used: Any, width: Any, group_index: Any) -> None:
    """Fill an emptied index from the groups."""
    mask = len(group_index) - 1
    for g in range(used):
        h = np.uint64(width)
        for d in range(width):
            h = mix64(h ^ np.uint64(groups[g, d])) + np.uint64(0x9E3779B97F4A7C15)
        slot = np.int64(mix64(h) & np.uint64(mask))
        while group_index[slot] >= 0:
            slot = (slot + 1) & mask
        group_index[slot] = g


@nb.njit(nogil=True, cache=True)
def rebuild_value_index(pool: Any, values: Any, used: Any, value_index: Any) -> None:
    """Fill an emptied index from the values."""
    mask = len(value_index) - 1
    for v in range(used):
        h = hash_bytes(pool, values[v, V_START], values[v, V_END], np.uint64(values[v, V_DIM]))
        slot = np.int64(h & np.uint64(mask))
        while value_index[slot] >= 0:
            slot = (slot + 1) & mask
        value_index[slot] = v


@nb.njit(nogil=True, cache=True)
def rehash_uniques(old: Any, new: Any) -> None:
    """Move every entry into a larger, zeroed table."""
    mask = len(new) - 1
    for k in range(len(old)):
        if old[k, U_STATE] == 0:
            continue
        h = _unique_hash(old[k, U_ROW], old[k, U_LO], old[k, U_HI])
        slot = np.int64(h & np.uint64(mask))
        while new[slot, U_STATE] != 0:
            slot = (slot + 1) & mask
        for field in range(UNIQUE_FIELDS):
            new[slot, field] = old[k, field]
