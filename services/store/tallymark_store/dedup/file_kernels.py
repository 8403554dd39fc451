"""Kernels over the entries of id files: filters, lookups, merging and digests.

Entries are four words each (key lo, key hi, fingerprint, offset), sorted by key lo, in blocks of `BLOCK_ENTRIES`. A
filter is lines of eight words, 512 bits: a key's line follows from its lo, so that building one in the order of the
file writes through memory in order, and seven bits in it from its hi. Keys are hashes, so both are as good as random;
whoever picks ids such that they aren't gains false positives, each of which costs a look at one block.
"""

from typing import Any

import numba as nb
import numpy as np

from tallymark_protocol.kernels import intrinsics
from tallymark_protocol.kernels.intrinsics import mix64
from tallymark_store.dedup.index_kernels import CONFLICT, DUPLICATE, MARK_BIAS

ENTRY_WORDS = 4
BLOCK_ENTRIES = 128
LINE_WORDS = 8
_HASHES = 7  # nine bits of the key's hi each
_AHEAD = 16  # events between the prefetch of a filter's line and its use

_touch: Any = intrinsics.prefetch

_W1 = np.uint64(1)
_W2 = np.uint64(2)
_W3 = np.uint64(3)
_W6 = np.uint64(6)
_W9 = np.uint64(9)
_W32 = np.uint64(32)
_LINE = np.uint64(LINE_WORDS)
_LOW6 = np.uint64(63)
_LOW9 = np.uint64(511)


@nb.njit(nogil=True, cache=True, forceinline=True)
def _line(lo: Any, lines: Any) -> Any:
    """The first word of a key's line: the key's upper half scaled to the number of lines."""
    return (((lo >> _W32) * lines) >> _W32) * _LINE


@nb.njit(nogil=True, cache=True)
def fill_filter(bits: Any, entries: Any, count: Any) -> None:
    """Put the keys of entries into a filter."""
    lines = np.uint64(len(bits) // LINE_WORDS)
    for i in range(count):
        at = np.uint64(i * ENTRY_WORDS)
        first = _line(entries[at], lines)
        rest = entries[at + _W1]
        for _ in range(_HASHES):
            bits[first + ((rest & _LOW9) >> _W6)] |= _W1 << (rest & _LOW6)
            rest >>= _W9


@nb.njit(nogil=True, cache=True)
def pass_filter(bits: Any, keys_lo: Any, keys_hi: Any, wants: Any, chosen: Any) -> Any:
    """Write which of the wanted events may be in the file to `chosen`; return how many."""
    n = len(wants)
    lines = np.uint64(len(bits) // LINE_WORDS)
    for j in range(min(_AHEAD, n)):
        _touch(bits, np.int64(_line(keys_lo[j], lines)))
    many = 0
    for i in range(n):
        j = i + _AHEAD
        if j < n:
            _touch(bits, np.int64(_line(keys_lo[j], lines)))
        if not wants[i]:
            continue
        first = _line(keys_lo[i], lines)
        rest = keys_hi[i]
        is_in = True
        for _ in range(_HASHES):
            if not (bits[first + ((rest & _LOW9) >> _W6)] >> (rest & _LOW6)) & _W1:
                is_in = False
                break
            rest >>= _W9
        if is_in:
            chosen[many] = i
            many += 1
    return many


@nb.njit(nogil=True, cache=True)
def locate(fences: Any, keys_lo: Any, chosen: Any, many: Any, blocks: Any) -> None:
    """Write for each of `chosen[:many]` the first block in which its key can be to `blocks`.

    Keys are spread evenly, mostly: the search begins where a key should be, and doubles its steps from there.
    """
    n = len(fences)
    for c in range(many):
        lo = keys_lo[chosen[c]]
        guess: Any = np.int64(((lo >> _W32) * np.uint64(n)) >> _W32)
        pace = 1
        if fences[guess] < lo:
            low = guess + 1
            high = low
            while high < n and fences[high] < lo:
                low = high + 1
                high += pace
                pace += pace
            high = min(high, n)
        else:
            high = guess
            low = high - 1
            while low >= 0 and fences[low] >= lo:
                high = low
                low -= pace
                pace += pace
            low = max(low + 1, 0)
        # The first block that begins at or above the key; the key may begin in the one before.
        while low < high:
            middle = (low + high) >> 1
            if fences[middle] < lo:
                low = middle + 1
            else:
                high = middle
        blocks[c] = max(low - 1, 0)


@nb.njit(nogil=True, cache=True)
def judge_found(
    entries: Any,
    count: Any,
    fences: Any,
    blocks: Any,
    verified: Any,
    keys_lo: Any,
    keys_hi: Any,
    fingerprints: Any,
    wants: Any,
    chosen: Any,
    begin: Any,
    many: Any,
    floor_offset: Any,
    verdict: Any,
    original: Any,
) -> Any:
    """Judge those of `chosen[begin:many]` that have an entry at or above the floor, and take their wish away.

    Returns (how far it got, -1), or (where it goes on, the block that has to be verified first).
    """
    past = len(fences)
    floor = np.uint64(floor_offset)
    for c in range(begin, many):
        i = chosen[c]
        lo = keys_lo[i]
        hi = keys_hi[i]
        block = blocks[c]
        if not verified[block]:
            return c, block
        at = block * BLOCK_ENTRIES
        end = min(at + BLOCK_ENTRIES, count)
        high = end
        while at < high:
            middle = (at + high) >> 1
            if entries[middle * ENTRY_WORDS] < lo:
                at = middle + 1
            else:
                high = middle
        while True:
            if at == end:
                block += 1
                if block == past or fences[block] != lo:
                    break
                if not verified[block]:
                    return c, block
                end = min(at + BLOCK_ENTRIES, count)
            word = np.uint64(at * ENTRY_WORDS)
            if entries[word] != lo:
                break
            if entries[word + _W1] == hi and entries[word + _W3] >= floor:
                verdict[i] = DUPLICATE if entries[word + _W2] == fingerprints[i] else CONFLICT
                original[i] = np.int64(entries[word + _W3])
                wants[i] = 0
                break
            at += 1
    return many, -1


@nb.njit(nogil=True, cache=True)
def merge(source: Any, heads: Any, ends: Any, floor_offset: Any, out: Any) -> Any:
    """Merge the sorted runs `source[heads[r]:ends[r]]` (in entries) into `out`; return how many entries it got.

    Entries below the floor are left behind. Moves `heads`.
    """
    runs = len(heads)
    floor = np.uint64(floor_offset)
    done = 0
    while True:
        best = -1
        best_lo = np.uint64(0)
        for r in range(runs):
            if heads[r] < ends[r]:
                lo = source[np.uint64(heads[r] * ENTRY_WORDS)]
                if best < 0 or lo < best_lo:
                    best = r
                    best_lo = lo
        if best < 0:
            return done
        at = np.uint64(heads[best] * ENTRY_WORDS)
        heads[best] += 1
        if source[at + _W3] < floor:
            continue
        to = np.uint64(done * ENTRY_WORDS)
        out[to] = best_lo
        out[to + _W1] = source[at + _W1]
        out[to + _W2] = source[at + _W2]
        out[to + _W3] = source[at + _W3]
        done += 1


@nb.njit(nogil=True, cache=True)
def digest(entries: Any, count: Any, low: Any, past: Any) -> Any:
    """What `index_kernels.digest` sums up, of the entries with `low <= offset < past`."""
    sum_a = np.uint64(0)
    sum_b = np.uint64(0)
    for i in range(count):
        at = np.uint64(i * ENTRY_WORDS)
        offset = np.int64(entries[at + _W3])
        if offset >= low and offset < past:
            state = mix64(entries[at] + np.uint64(0x9E3779B97F4A7C15))
            state = mix64(state ^ entries[at + _W1])
            state = mix64(state ^ entries[at + _W2])
            state = mix64(state ^ np.uint64(offset + MARK_BIAS))
            sum_a += state
            sum_b += mix64(state + np.uint64(0xD1B54A32D192ED03))
    return sum_a, sum_b
