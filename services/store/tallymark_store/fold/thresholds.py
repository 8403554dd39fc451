"""Threshold crossings, found at the very event that causes them.

A period cell of a metric with thresholds owns a **row**: for each threshold the total (128 bits) at which it fires
next. After an event the cell's aggregate is compared with that, and only where it is reached anything more happens:
an alert record is written and the next total is set, for a recurring threshold the next multiple, otherwise one
that no total reaches. So the highest multiple reached never falls, whatever the total does.

Rows are as long as the metric had thresholds when they were made. A threshold that is added later makes the cell's
next event move its row to a longer one; a total that is past the new threshold already fires at that event, once.

Aggregates are below 2^126 (fewer than 2^63 events of at most 2^63), so NEVER = 2^127-1 is out of reach, as is a
multiple that would not fit.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tallymark_store.fold.cells import W_LINKS
from tallymark_store.fold.compiling import inlined, kernel
from tallymark_store.fold.counters import N_ALERTS, N_FREE_ROWS, N_ROWS
from tallymark_store.fold.index import ZERO
from tallymark_store.fold.schemas import T_HI, T_LO, T_RECURRING

# Words of an alert record.
A_ACCOUNT = 0
A_SLOT = 1  # u32, threshold index u32
A_START = 2
A_END = 3
A_VALUE_LO = 4
A_VALUE_HI = 5
A_FIRST_LO = 6
A_FIRST_HI = 7
A_LAST_LO = 8
A_LAST_HI = 9
A_OFFSET = 10
A_APPEND = 11
ALERT_WORDS = 12
ALERT_BYTES = 8 * ALERT_WORDS

_MASK32 = 0xFFFFFFFF
_ONE = np.uint64(1)
_TOP = np.uint64(63)
_NEVER_LO = np.int64(-1)
_NEVER_HI = np.int64(2**63 - 1)


@inlined
def _less(a_lo: Any, a_hi: Any, b_lo: Any, b_hi: Any) -> Any:
    return a_hi < b_hi or (a_hi == b_hi and np.uint64(a_lo) < np.uint64(b_lo))


@kernel
def divide(n_lo: Any, n_hi: Any, d_lo: Any, d_hi: Any) -> Any:
    """Divide unsigned 128-bit numbers below 2^127: (quotient lo, hi, remainder lo, hi), uint64 words. d > 0."""
    n_lo = np.uint64(n_lo)
    n_hi = np.uint64(n_hi)
    d_lo = np.uint64(d_lo)
    d_hi = np.uint64(d_hi)
    if n_hi == ZERO and d_hi == ZERO:
        return n_lo // d_lo, ZERO, n_lo % d_lo, ZERO
    q_lo = ZERO
    q_hi = ZERO
    r_lo = ZERO
    r_hi = ZERO
    # One bit at a time; this runs at crossings of totals beyond 64 bits only. r stays below d < 2^127.
    for step in range(128):
        bit = np.uint64(127 - step)
        digit = (n_hi >> (bit - np.uint64(64))) & _ONE if bit > _TOP else (n_lo >> bit) & _ONE
        r_hi = (r_hi << _ONE) | (r_lo >> _TOP)
        r_lo = (r_lo << _ONE) | digit
        q_hi = (q_hi << _ONE) | (q_lo >> _TOP)
        q_lo = q_lo << _ONE
        if r_hi > d_hi or (r_hi == d_hi and r_lo >= d_lo):
            borrow = _ONE if r_lo < d_lo else ZERO
            r_lo = r_lo - d_lo
            r_hi = r_hi - d_hi - borrow
            q_lo = q_lo | _ONE
    return q_lo, q_hi, r_lo, r_hi


@kernel
def next_multiple(lo: Any, hi: Any, r_lo: Any, r_hi: Any, d_lo: Any, d_hi: Any) -> Any:
    """`total - remainder + divisor` as int64 words, NEVER where that is 2^127 or more."""
    base_lo = np.uint64(lo) - r_lo
    base_hi = np.uint64(hi) - r_hi - (_ONE if np.uint64(lo) < r_lo else ZERO)
    next_lo = base_lo + np.uint64(d_lo)
    next_hi = base_hi + np.uint64(d_hi) + (_ONE if next_lo < base_lo else ZERO)
    if (next_hi >> _TOP) != ZERO:
        return _NEVER_LO, _NEVER_HI
    return np.int64(next_lo), np.int64(next_hi)


@kernel
def new_threshold_rows(rows: Any, counters: Any, count: Any) -> Any:
    """The first of `count` rows that nobody uses."""
    first = counters[N_FREE_ROWS + count - 1] - 1
    if first >= 0:
        counters[N_FREE_ROWS + count - 1] = rows[first, 0]
    else:
        first = counters[N_ROWS]
        counters[N_ROWS] = first + count
    return first


@kernel
def free_threshold_rows(rows: Any, counters: Any, first: Any, count: Any) -> None:
    """Give back the rows of a cell."""
    rows[first, 0] = counters[N_FREE_ROWS + count - 1]
    counters[N_FREE_ROWS + count - 1] = first + 1


@kernel
def _new_row(
    cells: Any, cell: Any, thresholds: Any, first: Any, count: Any, rows: Any, counters: Any
) -> None:
    word = cells[cell, W_LINKS]
    have = (word >> 8) & 0xFF
    old = ((word >> 32) & _MASK32) - 1
    used = new_threshold_rows(rows, counters, count)
    for t in range(count):
        if t < have:
            rows[used + t, 0] = rows[old + t, 0]
            rows[used + t, 1] = rows[old + t, 1]
        else:
            rows[used + t, 0] = thresholds[first + t, T_LO]
            rows[used + t, 1] = thresholds[first + t, T_HI]
    if have > 0:
        free_threshold_rows(rows, counters, old, have)
    cells[cell, W_LINKS] = ((used + 1) << 32) | (count << 8) | (word & 0xFF)


@inlined
def threshold_row(cells: Any, cell: Any) -> Any:
    """The first row that a period cell's thresholds have, -1 if they have none yet."""
    return ((cells[cell, W_LINKS] >> 32) & _MASK32) - 1


@kernel
def check(
    cells: Any,
    cell: Any,
    slot: Any,
    thresholds: Any,
    first: Any,
    count: Any,
    rows: Any,
    alerts: Any,
    counters: Any,
    lo: Any,
    hi: Any,
    start: Any,
    end: Any,
    offset: Any,
    append_ns: Any,
) -> None:
    """Compare a period cell's aggregate (int64 words) with its thresholds after the event at `offset`.

    The metric's thresholds are `thresholds[first:first + count]`.
    """
    if (cells[cell, W_LINKS] >> 8) & 0xFF != count:
        _new_row(cells, cell, thresholds, first, count, rows, counters)
    row = threshold_row(cells, cell)
    for t in range(count):
        next_lo = rows[row + t, 0]
        next_hi = rows[row + t, 1]
        if _less(lo, hi, next_lo, next_hi):
            continue
        first_lo = np.int64(1)
        first_hi = np.int64(0)
        last_lo = np.int64(1)
        last_hi = np.int64(0)
        rows[row + t, 0] = _NEVER_LO
        rows[row + t, 1] = _NEVER_HI
        if thresholds[first + t, T_RECURRING] != 0:
            d_lo = thresholds[first + t, T_LO]
            d_hi = thresholds[first + t, T_HI]
            q_lo, q_hi, _, _ = divide(next_lo, next_hi, d_lo, d_hi)
            first_lo = np.int64(q_lo)
            first_hi = np.int64(q_hi)
            q_lo, q_hi, r_lo, r_hi = divide(lo, hi, d_lo, d_hi)
            last_lo = np.int64(q_lo)
            last_hi = np.int64(q_hi)
            rows[row + t, 0], rows[row + t, 1] = next_multiple(lo, hi, r_lo, r_hi, d_lo, d_hi)
        cells[cell, W_LINKS] |= 1 << t
        alerts_used = counters[N_ALERTS]
        alerts[alerts_used, A_ACCOUNT] = cells[cell, 0]
        alerts[alerts_used, A_SLOT] = slot | (t << 32)
        alerts[alerts_used, A_START] = start
        alerts[alerts_used, A_END] = end
        alerts[alerts_used, A_VALUE_LO] = lo
        alerts[alerts_used, A_VALUE_HI] = hi
        alerts[alerts_used, A_FIRST_LO] = first_lo
        alerts[alerts_used, A_FIRST_HI] = first_hi
        alerts[alerts_used, A_LAST_LO] = last_lo
        alerts[alerts_used, A_LAST_HI] = last_hi
        alerts[alerts_used, A_OFFSET] = offset
        alerts[alerts_used, A_APPEND] = append_ns
        counters[N_ALERTS] = alerts_used + 1
