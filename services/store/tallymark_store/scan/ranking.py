"""The accounts with the highest aggregate, of cells and raw events of all accounts: as kernels over rows.

Cells of whole days go into the same rows as raw events (`kernels.R_`); the best rows are then picked by a heap, so a
ranking costs one look at each account, and no sort of them all.
"""

from typing import Any

import numba as nb
import numpy as np

from tallymark_store.fold.cells import (
    W_ACCOUNT,
    W_COUNT,
    W_HI,
    W_LAST_OFFSET,
    W_LAST_TIME,
    W_LAST_VALUE,
    W_LO,
    W_MAX,
    W_MIN,
    W_START,
)
from tallymark_store.scan.kernels import (
    R_ACCOUNT,
    R_COUNT,
    R_LAST_OFFSET,
    R_LAST_TIME,
    R_LAST_VALUE,
    R_MAX,
    R_MIN,
    R_SUM_HI,
    R_SUM_LO,
    R_UNIQUE,
    add_128,
    find_row,
)

BY_COUNT = 0
BY_SUM = 1
BY_MAX = 2
BY_LATEST = 3
BY_UNIQUE = 4


@nb.njit(nogil=True, cache=True)
def overflowed_days(cells: Any, found: Any, out: Any) -> Any:
    """The days of entries that mark an overflowed one (-1 - row); `out` is as long as `found`, with repeats."""
    n = 0
    for i in range(len(found)):
        if found[i] < 0:
            out[n] = cells[-1 - found[i], W_START]
            n += 1
    return n


@nb.njit(nogil=True, cache=True)
def add_cells(cells: Any, found: Any, skipped_days: Any, rows: Any, row_index: Any, state: Any) -> Any:
    """Add day cells to the rows of their accounts, but for those of `skipped_days` (sorted) and of marks.

    Returns False, having added some, when there is no room: `rows` needs one per cell.
    """
    for i in range(len(found)):
        cell = found[i]
        if cell < 0:
            continue
        day = cells[cell, W_START]
        at = np.searchsorted(skipped_days, day)
        if at < len(skipped_days) and skipped_days[at] == day:
            continue
        row = find_row(rows, row_index, state, np.int64(0), cells[cell, W_ACCOUNT], np.int64(0))
        if row < 0:
            return False
        time = cells[cell, W_LAST_TIME]
        offset = cells[cell, W_LAST_OFFSET]
        if rows[row, R_COUNT] == 0:
            rows[row, R_MIN] = cells[cell, W_MIN]
            rows[row, R_MAX] = cells[cell, W_MAX]
        else:
            rows[row, R_MIN] = min(rows[row, R_MIN], cells[cell, W_MIN])
            rows[row, R_MAX] = max(rows[row, R_MAX], cells[cell, W_MAX])
        last = rows[row, R_LAST_TIME]
        if rows[row, R_COUNT] == 0 or time > last or (time == last and offset > rows[row, R_LAST_OFFSET]):
            rows[row, R_LAST_TIME] = time
            rows[row, R_LAST_OFFSET] = offset
            rows[row, R_LAST_VALUE] = cells[cell, W_LAST_VALUE]
        add_128(rows, row, cells[cell, W_LO], cells[cell, W_HI])
        rows[row, R_COUNT] += cells[cell, W_COUNT]
    return True


@nb.njit(nogil=True, cache=True)
def _key(rows: Any, row: Any, by: Any) -> Any:
    """The aggregate as (high word, low word): 128 bits, two's complement."""
    if by == BY_SUM:
        return rows[row, R_SUM_HI], np.uint64(rows[row, R_SUM_LO])
    if by == BY_COUNT:
        value = rows[row, R_COUNT]
    elif by == BY_MAX:
        value = rows[row, R_MAX]
    elif by == BY_LATEST:
        value = rows[row, R_LAST_VALUE]
    else:
        value = rows[row, R_UNIQUE]
    return value >> 63, np.uint64(value)


@nb.njit(nogil=True, cache=True)
def _ahead(rows: Any, a: Any, b: Any, by: Any) -> Any:
    """Whether row a ranks before row b: a higher aggregate, or the lower account id."""
    a_high, a_low = _key(rows, a, by)
    b_high, b_low = _key(rows, b, by)
    if a_high != b_high:
        return a_high > b_high
    if a_low != b_low:
        return a_low > b_low
    return np.uint64(rows[a, R_ACCOUNT]) < np.uint64(rows[b, R_ACCOUNT])


@nb.njit(nogil=True, cache=True)
def _sift_down(rows: Any, heap: Any, count: Any, at: Any, by: Any) -> None:
    while True:
        child = 2 * at + 1
        if child >= count:
            return
        if child + 1 < count and _ahead(rows, heap[child], heap[child + 1], by):
            child += 1
        if not _ahead(rows, heap[at], heap[child], by):
            return
        heap[at], heap[child] = heap[child], heap[at]
        at = child


@nb.njit(nogil=True, cache=True)
def rank_rows(rows: Any, used: Any, by: Any, heap: Any) -> Any:
    """Put the best rows' numbers into `heap` (int64[limit]), the best first; return how many."""
    count = min(used, len(heap))
    # A heap with the worst of the best at its root.
    for row in range(count):
        heap[row] = row
    for at in range(count // 2 - 1, -1, -1):
        _sift_down(rows, heap, count, at, by)
    for row in range(count, used):
        if _ahead(rows, row, heap[0], by):
            heap[0] = row
            _sift_down(rows, heap, count, 0, by)
    for last in range(count - 1, 0, -1):
        heap[0], heap[last] = heap[last], heap[0]
        _sift_down(rows, heap, last, 0, by)
    return count
