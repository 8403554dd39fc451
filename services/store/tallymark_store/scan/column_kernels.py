"""Kernels over columns of archived events: adding them up, selecting them, and their texts in the log's form.

The counterpart of `kernels` for rows of the archive (`archived.Columns`), which holds accepted events only: they go into
the same rows, groups and sets, by the same rules, so that a scan may begin in the archive and end in the log. A column
is an array with an entry per row, or with a single entry that stands for all rows (`_at`).

Property sets and texts are brought to the form that they have in the log first, so that everything behind is shared.
Every byte has passed a checksum; what makes no sense nevertheless is reported and never read beyond its bounds.
"""

from typing import Any

import numba as nb
import numpy as np
import numpy.typing as npt

from tallymark_protocol.kernels.blake2b import WORK_WORDS, blake2b_128
from tallymark_protocol.kernels.intrinsics import copy_bytes, load_u8, load_u64, mix64
from tallymark_store.scan.kernels import (
    A_UNIQUE,
    DIM_FIELDS,
    DONE,
    FULL_GROUPS,
    FULL_VALUES,
    NEED_GROUPS,
    NEED_ROWS,
    NEED_UNIQUES,
    NEED_VALUES,
    Q_ACCOUNT,
    Q_AGGREGATION,
    Q_ALL_ACCOUNTS,
    Q_KEEP_ACCOUNTS,
    Q_PASS,
    Q_PASSES,
    Q_UID,
    R_COUNT,
    REFUSED,
    REQUEST_FIELDS,
    ROW_FIELDS,
    S_EVENT,
    S_UNIQUES,
    STATE_FIELDS,
    UNIQUE_FIELDS,
    UNRESOLVED,
    VALUE_FIELDS,
    add_operation,
    add_value,
    find_row,
    interval_of,
    resolve_set,
)

# What a value is (`archived.Columns.kind`), by the tags of `layout`.
KIND_NUMBER = 0
KIND_TEXT = 1
KIND_U64 = 2

_KEY_BYTES_MAX = 255  # a set's key has a length of one byte, its value one of two
_VALUE_BYTES_MAX = 65_535
_QUOTE = 34
_BACKSLASH = 92
_COMMA = 44
_COLON = 58
_OPEN = 123
_CLOSE = 125
_U = 117


@nb.njit(nogil=True, cache=True, inline="always")
def _at(column: Any, i: Any) -> Any:
    return column[i] if len(column) > 1 else column[0]


@nb.njit(nogil=True, cache=True)
def scan_columns(
    uids: Any,
    accounts: Any,
    times: Any,
    offsets: Any,
    numbers: Any,
    operations: Any,
    kinds: Any,
    texts: Any,
    text_bounds: Any,
    set_of: Any,
    sets: Any,
    set_bounds: Any,
    sinces: Any,
    total: Any,
    request: Any,
    starts: Any,
    ends: Any,
    buckets: Any,
    first: Any,
    last: Any,
    dims: Any,
    keys: Any,
    pool: Any,
    values: Any,
    value_index: Any,
    groups: Any,
    group_index: Any,
    memo: Any,
    rows: Any,
    row_index: Any,
    uniques: Any,
    state: Any,
    codes: Any,
    work: Any,
) -> Any:
    """Add the wanted ones of `total` archived events to `rows`, from where `state` says; see `kernels.scan_totals`.

    An event is wanted when it is of the metric, at an offset of [first, last), of the account (or all are wanted),
    timed in one of the intervals and passed by the dimension filters. `sinces` are the offsets, sorted, at which a
    declared value began to be one: `memo` holds the group of each set (the first one is that of no properties) as
    it is looked at in between.
    """
    account = request[Q_ACCOUNT]
    every_account = request[Q_ALL_ACCOUNTS] != 0
    aggregation = request[Q_AGGREGATION]
    uid = request[Q_UID]
    use_sets = len(dims) > 0
    epochs = len(sinces) + 1
    interval = 0
    for i in range(state[S_EVENT], total):
        if _at(uids, i) != uid:
            continue
        own = _at(accounts, i)
        if not every_account and own != account:
            continue
        offset = offsets[i]
        if offset < first or offset >= last:
            continue
        time = times[i]
        if not (starts[interval] <= time and time < ends[interval]):
            found = interval_of(starts, ends, time)
            if found < 0:
                continue
            interval = found
        group = np.int64(0)
        if use_sets:
            number = np.int64(_at(set_of, i))
            place = number * epochs
            if epochs > 1:
                place += np.searchsorted(sinces, offset, side="right")
            group = memo[place]
            if group == UNRESOLVED:
                group = resolve_set(
                    sets,
                    set_bounds[number, 0],
                    set_bounds[number, 1],
                    offset,
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
                    state[S_EVENT] = i
                    return NEED_GROUPS if group == FULL_GROUPS else NEED_VALUES
                memo[place] = group
            if group == REFUSED:
                continue
        if aggregation == A_UNIQUE and 4 * (state[S_UNIQUES] + 1) > 3 * len(uniques):
            state[S_EVENT] = i
            return NEED_UNIQUES
        owner = own if request[Q_KEEP_ACCOUNTS] != 0 else np.int64(0)
        row = find_row(rows, row_index, state, buckets[interval], owner, group)
        if row < 0:
            state[S_EVENT] = i
            return NEED_ROWS
        if aggregation != A_UNIQUE:
            add_value(rows, row, aggregation, np.int64(_at(numbers, i)), time, offset)
            continue
        lo = np.int64(_at(numbers, i))
        hi = np.int64(0)
        kind = _at(kinds, i)
        if kind == KIND_U64:
            lo = np.int64(load_u64(texts, text_bounds[i, 0] + 1))
        elif kind == KIND_TEXT:
            low, high = blake2b_128(
                np.uint64(0), np.uint64(uid), texts, text_bounds[i, 0], text_bounds[i, 1], work
            )
            lo = np.int64(low)
            hi = np.int64(high)
        if request[Q_PASS] == 0:
            rows[row, R_COUNT] += 1
        if request[Q_PASSES] > 1:
            part = mix64(mix64(np.uint64(lo)) + np.uint64(hi)) >> np.uint64(32)
            if np.int64(part) % request[Q_PASSES] != request[Q_PASS]:
                continue
        add_operation(rows, row, uniques, state, lo, hi, time, offset, np.int64(_at(operations, i)))
    state[S_EVENT] = 0
    return DONE


@nb.njit(nogil=True, cache=True)
def select_rows(
    uids: Any,
    accounts: Any,
    times: Any,
    offsets: Any,
    total: Any,
    uid: Any,
    account: Any,
    every_metric: Any,
    every_account: Any,
    start: Any,
    end: Any,
    first: Any,
    last: Any,
    found: Any,
) -> Any:
    """Collect the wanted ones of `total` rows as (offset, row) in `found` (int64[total, 2]); return how many."""
    n = 0
    for i in range(total):
        offset = offsets[i]
        if offset < first or offset >= last:
            continue
        time = times[i]
        if time < start or time >= end:
            continue
        if not every_account and _at(accounts, i) != account:
            continue
        if not every_metric and _at(uids, i) != uid:
            continue
        found[n, 0] = offset
        found[n, 1] = i
        n += 1
    return n


@nb.njit(nogil=True, cache=True)
def _unquote(data: Any, at: Any, end: Any, out: Any, to: Any) -> Any:
    """Copy the JSON string that begins at `at` to `out[to:]`; return where it ends in both, -1 if it is none."""
    if at >= end or load_u8(data, at) != _QUOTE:
        return np.int64(-1), np.int64(0)
    at += 1
    while at < end:
        c = np.int64(load_u8(data, at))
        if c == _QUOTE:
            return np.int64(at + 1), np.int64(to)
        if c == _BACKSLASH:
            at += 1
            if at >= end:
                break
            c = np.int64(load_u8(data, at))
            if c == _U:
                if at + 5 > end:
                    break
                c = np.int64(0)
                for p in range(at + 1, at + 5):
                    digit = np.int64(load_u8(data, p))
                    if 48 <= digit <= 57:
                        digit -= 48
                    elif 97 <= digit <= 102:
                        digit -= 87
                    else:
                        return np.int64(-1), np.int64(0)
                    c = 16 * c + digit
                if c >= 32:  # nothing else is written like that
                    return np.int64(-1), np.int64(0)
                at += 4
            elif c not in (_QUOTE, _BACKSLASH):
                return np.int64(-1), np.int64(0)
        if to >= len(out):
            break
        out[to] = c
        to += 1
        at += 1
    return np.int64(-1), np.int64(0)


@nb.njit(nogil=True, cache=True)
def parse_sets(data: Any, ends: Any, out: Any, bounds: Any) -> Any:
    """Bring property sets from JSON (`archive.kernels.write_sets`) back to the log's form.

    Text k ends at ends[k + 1] of `data`, where the one before ended. Set k + 1 is at `bounds[k + 1]` in `out`, which is
    as long as `data`; set 0 is that of no properties. Returns the bytes written, -1 where a text is none of ours.
    """
    bounds[0, 0] = 0
    bounds[0, 1] = 0
    to = np.int64(0)
    for k in range(len(ends) - 1):
        at = np.int64(ends[k])
        end = np.int64(ends[k + 1])
        bounds[k + 1, 0] = to
        bounds[k + 1, 1] = to
        if at == end:  # stands among the words for those that have none
            continue
        opening = _OPEN
        while at < end and load_u8(data, at) == opening:
            key = to + 1
            at, key_end = _unquote(data, at + 1, end, out, key)
            if at < 0 or key_end - key > _KEY_BYTES_MAX or at >= end or load_u8(data, at) != _COLON:
                return np.int64(-1)
            value = key_end + 2
            at, value_end = _unquote(data, at + 1, end, out, value)
            if at < 0 or value_end - value > _VALUE_BYTES_MAX:
                return np.int64(-1)
            out[to] = key_end - key
            out[key_end] = (value_end - value) & 255
            out[key_end + 1] = (value_end - value) >> 8
            to = value_end
            opening = _COMMA
        if opening == _OPEN or at != end - 1 or load_u8(data, at) != _CLOSE:
            return np.int64(-1)
        bounds[k + 1, 1] = to
    return to


@nb.njit(nogil=True, cache=True)
def tag_texts(kinds: Any, data: Any, ends: Any, out: Any, bounds: Any) -> Any:
    """Bring values that are texts to the log's form: a tag, and text or eight bytes. As `parse_sets`, for rows.

    `out` has room for `data` and nine bytes more per row. Returns the bytes written, -1 where digits make no number.
    """
    to = np.int64(0)
    for i in range(len(ends) - 1):
        start = np.int64(ends[i])
        end = np.int64(ends[i + 1])
        bounds[i, 0] = to
        kind = kinds[i]
        if kind != KIND_NUMBER:
            out[to] = kind
            to += 1
        if kind == KIND_TEXT:
            copy_bytes(out, to, data, start, end - start)
            to += end - start
        elif kind == KIND_U64:
            number = np.uint64(0)
            if not 1 <= end - start <= 20:
                return np.int64(-1)
            for p in range(start, end):
                digit = np.int64(load_u8(data, p)) - 48
                if digit < 0 or digit > 9:
                    return np.int64(-1)
                number = number * np.uint64(10) + np.uint64(digit)
            for b in range(8):
                out[to + b] = np.int64((number >> np.uint64(8 * b)) & np.uint64(255))
            to += 8
        bounds[i, 1] = to
    return to


def warm_up() -> None:
    """Compile every kernel here, or load it from the cache, for the arrays that the archive's reader gives."""
    words = read_only(np.zeros(1, np.int64))
    small = read_only(np.zeros(1, np.int8))
    which = read_only(np.zeros(1, np.int32))
    data = read_only(np.zeros(16, np.uint8))
    table = np.zeros((1, 2), np.int64)
    none = np.empty(0, np.int64)
    state = np.zeros(STATE_FIELDS, np.int64)
    index = np.full(16, -1, np.int32)
    scan_columns(
        words, words, words, words, words, small, small, data, table, which, data, table, none, 0,
        np.zeros(REQUEST_FIELDS, np.int64), none, none, none, 0, 0, np.zeros((0, DIM_FIELDS), np.int64), data,
        np.zeros(1, np.uint8), np.zeros((1, VALUE_FIELDS), np.int64), index, np.zeros((1, 1), np.int64), index, none,
        np.zeros((1, ROW_FIELDS), np.int64), index, np.zeros((16, UNIQUE_FIELDS), np.int64), state, none,
        np.zeros(WORK_WORDS, np.uint64),
    )  # fmt: skip
    select_rows(words, words, words, words, 0, 0, 0, False, False, 0, 0, 0, 0, table)
    ends = read_only(np.zeros(1, np.int32))
    parse_sets(data, ends, np.zeros(16, np.uint8), table)
    tag_texts(small, data, ends, np.zeros(16, np.uint8), table)


def read_only(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The array, as it is: kernels are compiled for one kind, and what comes from files can't be written to."""
    array.setflags(write=False)
    return array
