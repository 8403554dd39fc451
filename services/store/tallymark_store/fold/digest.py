"""A digest of the fold's logical state, for comparing replicas.

Every item (cell, set entry, threshold state, alert record) is hashed by what it means: account, metric uid, times,
dimension values, never by row or combination numbers. The item hashes are added up, so neither order nor the layout
of hash tables counts. It finds defects; it is no defence against somebody who wants two states to look alike.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tallymark_protocol.kernels.intrinsics import hash_bytes, mix64
from tallymark_store.fold.cells import (
    CELL_WORDS,
    FREE,
    HEAD,
    OVERFLOW,
    PERIOD,
    W_ACCOUNT,
    W_COUNT,
    W_KEY,
    W_LINKS,
    W_START,
    head_of,
)
from tallymark_store.fold.compiling import inlined, kernel
from tallymark_store.fold.counters import N_ALERT_BASE, N_ALERTS, N_CELLS, N_MEMBERS
from tallymark_store.fold.dimensions import C_CODES, V_END, V_START, VALUES, WIDTH
from tallymark_store.fold.thresholds import A_SLOT, ALERT_WORDS
from tallymark_store.fold.uniques import FREE_MEMBER, M_OWNER, MEMBER_WORDS

_MASK32 = 0xFFFFFFFF
_STEP = np.uint64(0x9E3779B97F4A7C15)
_KIND_CELL = np.uint64(1)
_KIND_OVERFLOW = np.uint64(2)
_KIND_THRESHOLD = np.uint64(3)
_KIND_MEMBER = np.uint64(4)
_KIND_ALERT = np.uint64(5)


@inlined
def _join(h: Any, word: Any) -> Any:
    return mix64(h ^ np.uint64(word)) + _STEP


@inlined
def _cell_identity(cells: Any, uids: Any, row: Any) -> Any:
    key = cells[row, W_KEY]
    h = _join(mix64(np.uint64(uids[key & _MASK32])), cells[row, W_ACCOUNT])
    h = _join(h, cells[row, W_START])
    return _join(h, np.int64(1 if (key >> 32) & _MASK32 == PERIOD else 0))


@kernel
def _combo_digest(combos: Any, values: Any, pool: Any, combo: Any) -> Any:
    h = np.uint64(0)
    for d in range(WIDTH):
        code = np.int64(combos[combo, C_CODES + d])
        if code < VALUES:
            h = _join(h, code)
        else:
            value = code - VALUES
            h = hash_bytes(pool, values[value, V_START], values[value, V_END], _join(h, VALUES))
    return mix64(h)


@kernel
def _digest_cells(cells: Any, count: Any, rows: Any, combos: Any, values: Any, pool: Any, uids: Any) -> Any:
    total = np.uint64(0)
    for row in range(count):
        if cells[row, W_KEY] == FREE:
            continue
        identity = _cell_identity(cells, uids, row)
        combo = (cells[row, W_KEY] >> 32) & _MASK32
        h = identity ^ _KIND_CELL
        if combo != PERIOD:
            h = _join(h, _combo_digest(combos, values, pool, combo))
        for word in range(W_COUNT, CELL_WORDS - 1):
            h = _join(h, cells[row, word])
        links = cells[row, W_LINKS]
        if combo == PERIOD:
            h = _join(h, links & 0xFF)
            first = ((links >> 32) & _MASK32) - 1
            for t in range((links >> 8) & 0xFF):
                threshold = _join(identity ^ _KIND_THRESHOLD, np.int64(t))
                total += _join(_join(threshold, rows[first + t, 0]), rows[first + t, 1])
        elif head_of(cells, row) & HEAD != 0 and head_of(cells, row) & OVERFLOW != 0:
            total += _join(identity, _KIND_OVERFLOW)
        total += mix64(h)
    return total


@kernel
def _digest_members(cells: Any, members: Any, count: Any, uids: Any) -> Any:
    total = np.uint64(0)
    for e in range(count):
        owner = members[e, M_OWNER]
        if owner == FREE_MEMBER:
            continue
        h = _cell_identity(cells, uids, owner & _MASK32) ^ _KIND_MEMBER
        h = _join(h, owner >> 32)
        for word in range(1, MEMBER_WORDS):
            h = _join(h, members[e, word])
        total += mix64(h)
    return total


@kernel
def _digest_alerts(alerts: Any, first: Any, count: Any, uids: Any) -> Any:
    total = np.uint64(0)
    for i in range(count):
        slot = alerts[i, A_SLOT] & _MASK32
        h = _join(_join(_KIND_ALERT, np.int64(first + i)), uids[slot])
        h = _join(h, alerts[i, A_SLOT] >> 32)
        for word in range(ALERT_WORDS):
            if word != A_SLOT:
                h = _join(h, alerts[i, word])
        total += mix64(h)
    return total


@kernel
def digest_state(state: Any, dims: Any, uids: Any) -> Any:
    """Add up the digests of all items (uint64)."""
    counters = state.counters
    total = _digest_cells(
        state.cells, counters[N_CELLS], state.rows, dims.combos, dims.values, dims.pool, uids
    )
    total += _digest_members(state.cells, state.members, counters[N_MEMBERS], uids)
    return total + _digest_alerts(state.alerts, counters[N_ALERT_BASE], counters[N_ALERTS], uids)
