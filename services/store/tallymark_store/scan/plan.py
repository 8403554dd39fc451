"""How a bucket is answered: from a period cell, from day cells and raw edges, or from raw events alone.

Only what lies between the earliest and the latest event of the partition matters. A bucket that reaches beyond them
takes the first or last day (or period) whole, so "this month until now" needs no raw events.
"""

from typing import Any

import numba as nb

from tallymark_store.fold.schemas import day_bounds, period_bounds

# Columns of a plan, one row per bucket.
P_PERIOD = 0  # 1: the period cell at P_PERIOD_START holds exactly the bucket's events
P_PERIOD_START = 1
P_DAYS_START = 2  # whole days begin in [P_DAYS_START, P_DAYS_END); equal when there are none
P_DAYS_END = 3
P_HEAD_START = 4  # raw events of [P_HEAD_START, P_HEAD_END) before the days
P_HEAD_END = 5
P_TAIL_START = 6  # and behind them
P_TAIL_END = 7
PLAN_FIELDS = 8


@nb.njit(nogil=True, cache=True)
def plan_buckets(
    arrays: Any,
    slot: Any,
    starts: Any,
    ends: Any,
    low: Any,
    high: Any,
    use_period: Any,
    use_days: Any,
    plan: Any,
) -> None:
    """Fill `plan` (int64[n, PLAN_FIELDS], zeros) for buckets [starts, ends).

    All events lie in [low, high), 0 <= low; `use_period` where neither filters nor groups ask for more than period
    cells have, `use_days` where the metric has day cells.
    """
    for i in range(len(starts)):
        start = starts[i]
        end = ends[i]
        first = max(start, low)
        last = min(end, high)
        if first >= last:
            continue
        if use_period:
            period_start, period_end = period_bounds(arrays, slot, first)
            complete = (start <= period_start or start <= low) and (end >= period_end or end >= high)
            if complete and last <= period_end:
                plan[i, P_PERIOD] = 1
                plan[i, P_PERIOD_START] = period_start
                continue
        if not use_days:
            plan[i, P_HEAD_START] = first
            plan[i, P_HEAD_END] = last
            continue
        first_day, first_day_end = day_bounds(arrays, slot, first)
        last_day, last_day_end = day_bounds(arrays, slot, last - 1)
        days_start = first_day
        if start > first_day and start > low:
            days_start = first_day_end
        days_end = last_day_end
        if end < last_day_end and end < high:
            days_end = last_day
        if days_start >= days_end:
            plan[i, P_HEAD_START] = first
            # No whole day between the edges: they touch, or the bucket lies within one day.
            plan[i, P_HEAD_END] = last
            continue
        plan[i, P_DAYS_START] = days_start
        plan[i, P_DAYS_END] = days_end
        if days_start > first_day:
            plan[i, P_HEAD_START] = first
            plan[i, P_HEAD_END] = days_start
        if days_end == last_day:
            plan[i, P_TAIL_START] = last_day
            plan[i, P_TAIL_END] = last
