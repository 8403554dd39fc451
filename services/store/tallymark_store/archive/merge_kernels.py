"""Sorted runs to one order, in compiled code: what merging files of the archive is, but for the copying.

A tournament: each run's next row plays against the winner of its neighbours, and the loser stays where they met. So a row
costs as many comparisons as there are rounds, four among sixteen runs, on keys that are next to each other in memory.
"""

from __future__ import annotations

from typing import Any

import numba as nb
import numpy as np


@nb.njit(nogil=True, cache=True, inline="always")
def _comes_first(a: Any, b: Any, left: Any, uids: Any, accounts: Any, times: Any) -> bool:
    """Whether run `a` has its next row before run `b` has; where both are equal, the one before."""
    if not left[b]:
        return True
    if not left[a]:
        return False
    if uids[a] != uids[b]:
        return uids[a] < uids[b]  # type: ignore[no-any-return]
    if accounts[a] != accounts[b]:
        return accounts[a] < accounts[b]  # type: ignore[no-any-return]
    if times[a] != times[b]:
        return times[a] < times[b]  # type: ignore[no-any-return]
    return a < b  # type: ignore[no-any-return]


@nb.njit(nogil=True, cache=True)
def merge_runs(uid: Any, account: Any, time: Any, at: Any, ends: Any, order: Any) -> None:
    """Merge the next rows of runs that are sorted, each by itself, by (uid, account, time), stably.

    Args:
        uid: of each row of all runs, one run behind the other (uint64[n]).
        account: likewise.
        time: likewise.
        at: where each run's next row is (int64[runs]); moved on.
        ends: where each run ends.
        order: as many rows are taken as it has room for, and there must be so many; written (int32[m]). Row numbers
            are among the rows that are taken, one run's behind the other's.
    """
    runs = len(at)
    seats = 1
    while seats < runs:
        seats *= 2
    next_row = np.zeros(seats, np.int64)
    left = np.zeros(seats, np.int64)
    uids = np.zeros(seats, np.uint64)
    accounts = np.zeros(seats, np.uint64)
    times = np.zeros(seats, np.uint64)
    for run in range(runs):
        row = next_row[run] = at[run]
        left[run] = ends[run] - row
        if left[run]:
            uids[run], accounts[run], times[run] = uid[row], account[row], time[row]
    # The first games: winners by node, leaves behind them; then who lost where.
    winners = np.zeros(2 * seats, np.int64)
    losers = np.zeros(seats, np.int64)
    for seat in range(seats):
        winners[seats + seat] = seat
    for node in range(seats - 1, 0, -1):
        a, b = winners[2 * node], winners[2 * node + 1]
        if _comes_first(a, b, left, uids, accounts, times):
            winners[node], losers[node] = a, b
        else:
            winners[node], losers[node] = b, a
    best = winners[1]
    for place in range(len(order)):
        order[place] = best
        row = next_row[best] + 1
        next_row[best] = row
        left[best] -= 1
        if left[best]:
            uids[best], accounts[best], times[best] = uid[row], account[row], time[row]
        node = (seats + best) >> 1
        while node:
            if not _comes_first(best, losers[node], left, uids, accounts, times):
                best, losers[node] = losers[node], best
            node >>= 1
    # Which run a row comes from says which row it is: a run's are taken one after the other.
    taken = np.int64(0)
    for run in range(runs):
        count = next_row[run] - at[run]
        at[run] = next_row[run]
        next_row[run] = taken
        taken += count
    for place in range(len(order)):
        run = order[place]
        order[place] = next_row[run]
        next_row[run] += 1


def warm_up() -> None:
    """Compile, or load from the cache."""
    key = np.zeros(1, np.uint64)
    merge_runs(key, key, key, np.zeros(1, np.int64), np.ones(1, np.int64), np.zeros(1, np.int32))
