"""Kernels of the event-id index: probing, judging, rebuilding, over one `ShardArena`'s words.

A slot is four words: key lo, key hi, fingerprint, mark. The mark is 0 in an empty slot, 1 in a truncated
one (spent, but still part of its probe chain), else offset + 2.

They check no bounds and grow nothing: where a shard is full they stop and say at which event, and the index in
`index` makes room and calls again.
"""

from typing import Any

import numba as nb
import numpy as np

from tallymark_protocol.kernels import intrinsics
from tallymark_protocol.kernels.intrinsics import mix64

LOOK_UP_AND_REMEMBER = 1
"""Wish of an event in `DedupIndex.judge`: it will be stored unless its id is known."""
LOOK_UP_ONLY = 2
"""Wish of an event in `DedupIndex.judge`: it will not be stored, and its id must not be remembered."""

DUPLICATE = 1
"""Verdict of `DedupIndex.judge`: the id is remembered, with the same payload."""
CONFLICT = 2
"""Verdict of `DedupIndex.judge`: the id is remembered, with another payload."""

SLOT_WORDS = 4
_AHEAD = 16  # events between the prefetch of a slot and its use

_EMPTY = 0
_TRUNCATED = 1
MARK_BIAS = 2

# Word positions are uint64 throughout: numba checks signed indexes for being negative, which in these loops
# costs as much as the probing itself.
_W1 = np.uint64(1)
_W2 = np.uint64(2)
_W3 = np.uint64(3)
_SLOT = np.uint64(SLOT_WORDS)
_LINE = np.int64(8)  # words of a cache line

_FREE = 0  # outcomes of `_probe`
_REUSABLE = 1
_FOUND = 2


# Called from kernels only, which leave out the typing context that its Python signature shows.
_touch: Any = intrinsics.prefetch


@nb.njit(nogil=True, cache=True, forceinline=True)
def shard_of(lo: Any, salt: Any) -> Any:
    """The shard of a key, for callers in Python."""
    return np.int64(mix64(lo ^ salt) >> np.uint64(58))


@nb.njit(nogil=True, cache=True, forceinline=True)
def _home(hashed: Any, capacity: Any) -> Any:
    """The first slot to probe: 32 hash bits below the shard's, scaled to the capacity (Lemire's fast range)."""
    fraction = (hashed >> np.uint64(26)) & np.uint64(0xFFFFFFFF)
    return (fraction * np.uint64(capacity)) >> np.uint64(32)


@nb.njit(nogil=True, cache=True, forceinline=True)
def _prefetch(table: Any, stride: Any, capacity: Any, salt: Any, lo: Any) -> None:
    """Ask for the two lines with which the probing for a key begins."""
    hashed = mix64(lo ^ salt)
    shard = hashed >> np.uint64(58)
    at = np.int64(shard * np.uint64(stride) + _home(hashed, capacity[shard]) * _SLOT)
    _touch(table, at)
    _touch(table, at + _LINE)


@nb.njit(nogil=True, cache=True, forceinline=True)
def _probe(
    table: Any,
    first: Any,
    slots: Any,
    hashed: Any,
    lo: Any,
    hi: Any,
    mark_low: Any,
    marks: Any,
    kept_mark: Any,
) -> Any:
    """Find the key's entry with `mark_low <= mark < mark_low + marks`; return (outcome, its word).

    `_FOUND`: it is there. Otherwise where to put it: `_REUSABLE`, over a spent entry, or `_FREE`, an empty slot.
    """
    past = first + np.uint64(slots) * _SLOT
    at = first + _home(hashed, slots) * _SLOT
    spent = past
    while True:
        mark = table[at + _W3]
        if mark == np.uint64(_EMPTY):
            break
        if table[at] == lo and table[at + _W1] == hi and mark - mark_low < marks:
            return _FOUND, at
        if mark < kept_mark and spent == past:
            spent = at
        at += _SLOT
        if at == past:
            at = first
    if spent != past:
        return _REUSABLE, spent
    return _FREE, at


@nb.njit(nogil=True, cache=True)
def judge(
    table: Any,
    stride: Any,
    capacity: Any,
    limit: Any,
    used: Any,
    salt: Any,
    keys_lo: Any,
    keys_hi: Any,
    fingerprints: Any,
    wants: Any,
    begin: Any,
    base_offset: Any,
    floor_offset: Any,
    keep_offset: Any,
    verdict: Any,
    original: Any,
) -> Any:
    """Judge events from `begin` on; return the first one not judged because its shard is full, or n."""
    n = len(wants)
    live_mark = np.uint64(floor_offset + MARK_BIAS)
    marks = ~np.uint64(0) - live_mark
    kept_mark = np.uint64(keep_offset + MARK_BIAS)
    for j in range(begin, min(begin + _AHEAD, n)):
        if wants[j]:
            _prefetch(table, stride, capacity, salt, keys_lo[j])
    for i in range(begin, n):
        j = i + _AHEAD
        if j < n and wants[j]:
            _prefetch(table, stride, capacity, salt, keys_lo[j])
        if not wants[i]:
            continue
        lo = keys_lo[i]
        hi = keys_hi[i]
        hashed = mix64(lo ^ salt)
        shard = hashed >> np.uint64(58)
        first = shard * np.uint64(stride)
        outcome, at = _probe(table, first, capacity[shard], hashed, lo, hi, live_mark, marks, kept_mark)
        if outcome == _FOUND:
            verdict[i] = DUPLICATE if table[at + _W2] == fingerprints[i] else CONFLICT
            original[i] = np.int64(table[at + _W3]) - MARK_BIAS
            continue
        if wants[i] != LOOK_UP_AND_REMEMBER:
            continue
        if outcome == _FREE:
            if used[shard] >= limit[shard]:
                return i
            used[shard] += 1
        table[at] = lo
        table[at + _W1] = hi
        table[at + _W2] = fingerprints[i]
        table[at + _W3] = np.uint64(base_offset + i + MARK_BIAS)
    return n


@nb.njit(nogil=True, cache=True)
def apply(
    table: Any,
    stride: Any,
    capacity: Any,
    limit: Any,
    used: Any,
    salt: Any,
    keys_lo: Any,
    keys_hi: Any,
    fingerprints: Any,
    offsets: Any,
    begin: Any,
    keep_offset: Any,
) -> Any:
    """Remember entries from `begin` on; return the first one whose shard is full, or n."""
    n = len(offsets)
    kept_mark = np.uint64(keep_offset + MARK_BIAS)
    for i in range(begin, n):
        j = i + _AHEAD
        if j < n:
            _prefetch(table, stride, capacity, salt, keys_lo[j])
        if offsets[i] < keep_offset:
            continue  # spent before it is here: nobody will ask for it
        lo = keys_lo[i]
        hi = keys_hi[i]
        mark = np.uint64(offsets[i] + MARK_BIAS)
        hashed = mix64(lo ^ salt)
        shard = hashed >> np.uint64(58)
        first = shard * np.uint64(stride)
        outcome, at = _probe(table, first, capacity[shard], hashed, lo, hi, mark, np.uint64(1), kept_mark)
        if outcome == _FOUND:
            continue
        if outcome == _FREE:
            if used[shard] >= limit[shard]:
                return i
            used[shard] += 1
        table[at] = lo
        table[at + _W1] = hi
        table[at + _W2] = fingerprints[i]
        table[at + _W3] = mark
    return n


@nb.njit(nogil=True, cache=True)
def count(table: Any, first: Any, slots: Any, lowest: Any, past: Any) -> Any:
    """How many slots have `lowest <= mark < past`."""
    count = 0
    for slot in range(slots):
        mark = table[np.uint64(first + slot * SLOT_WORDS) + _W3]
        if mark >= lowest and mark < past:
            count += 1
    return count


@nb.njit(nogil=True, cache=True)
def collect(table: Any, first: Any, slots: Any, lowest: Any, past: Any, out: Any) -> Any:
    """Copy the slots with `lowest <= mark < past` to `out`; return how many."""
    count = 0
    for slot in range(slots):
        at = np.uint64(first + slot * SLOT_WORDS)
        mark = table[at + _W3]
        if mark >= lowest and mark < past:
            to = np.uint64(count * SLOT_WORDS)
            out[to] = table[at]
            out[to + _W1] = table[at + _W1]
            out[to + _W2] = table[at + _W2]
            out[to + _W3] = mark
            count += 1
    return count


@nb.njit(nogil=True, cache=True)
def refill(table: Any, first: Any, slots: Any, salt: Any, entries: Any, count: Any) -> None:
    """Write a whole shard anew: empty it, then put the entries in.

    Entries come in the order of their old slots, which is nearly that of their hashes, so the writes run
    through memory in order.
    """
    table[first : first + slots * SLOT_WORDS] = np.uint64(0)
    start = np.uint64(first)
    past = start + np.uint64(slots) * _SLOT
    for i in range(count):
        source = np.uint64(i * SLOT_WORDS)
        at = start + _home(mix64(entries[source] ^ salt), slots) * _SLOT
        while table[at + _W3] != np.uint64(_EMPTY):
            at += _SLOT
            if at == past:
                at = start
        table[at] = entries[source]
        table[at + _W1] = entries[source + _W1]
        table[at + _W2] = entries[source + _W2]
        table[at + _W3] = entries[source + _W3]


@nb.njit(nogil=True, cache=True)
def truncate(table: Any, first: Any, slots: Any, lowest: Any) -> Any:
    """Mark the slots with `mark >= lowest` truncated; return how many."""
    count = 0
    for slot in range(slots):
        at = np.uint64(first + slot * SLOT_WORDS) + _W3
        if table[at] >= lowest:
            table[at] = np.uint64(_TRUNCATED)
            count += 1
    return count


@nb.njit(nogil=True, cache=True)
def digest(table: Any, first: Any, slots: Any, lowest: Any, past: Any) -> Any:
    """Two sums of hashes over the entries with `lowest <= mark < past`: they don't depend on order."""
    sum_a = np.uint64(0)
    sum_b = np.uint64(0)
    for slot in range(slots):
        at = np.uint64(first + slot * SLOT_WORDS)
        mark = table[at + _W3]
        if mark >= lowest and mark < past:
            state = mix64(table[at] + np.uint64(0x9E3779B97F4A7C15))
            state = mix64(state ^ table[at + _W1])
            state = mix64(state ^ table[at + _W2])
            state = mix64(state ^ mark)
            sum_a += state
            sum_b += mix64(state + np.uint64(0xD1B54A32D192ED03))
    return sum_a, sum_b
