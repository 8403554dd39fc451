"""Kernels of the producer windows: lookups, the rules, rebuilding, over one `ShardArena`'s words.

A slot is six words: producer, sequence, checksum | count << 32, mark, record base offset, append time. The
mark is 0 in an empty slot, else the first event's offset + 2. A **head** is a slot of the same size, one per
producer with entries: producer, highest as of the producer's latest append, scratch word, latest append
time + 2, -1, append time of the highest.

They check no bounds and grow nothing: where a shard is full they stop and say so, and `producers` makes room and
calls again. The rules are stated in `producers`.
"""

from typing import Any

import numba as nb
import numpy as np

from tallymark_protocol.kernels import intrinsics
from tallymark_protocol.kernels.intrinsics import mix64
from tallymark_protocol.limits import CHUNK_RETRY_NS_MAX, PRODUCER_RETENTION_NS, PRODUCER_WINDOW

NEW = 0
"""The chunk is not in the log: append it, then `ProducerWindows.insert` it."""
REPEAT = 1
"""The chunk is in the log already, the same: answer what it was answered."""
REUSED = 2
"""The producer has used this sequence for another chunk: an error of the client."""
UNKNOWN = 3
"""The chunk may have been in the log, but that is no longer remembered: never a guess."""

SHARD_COUNT = 16
SLOT_WORDS = 6
MARK_BIAS = 2
_AHEAD = 8  # chunks between the prefetch of a slot and its use
_NONE = np.int64(-1)
_HEAD = ~np.uint64(0)  # the fifth word of a head: no record begins at offset -1

_W1 = np.uint64(1)
_W2 = np.uint64(2)
_W3 = np.uint64(3)
_W4 = np.uint64(4)
_W5 = np.uint64(5)
_SLOT = np.uint64(SLOT_WORDS)

# Called from kernels only, which leave out the typing context that its Python signature shows.
_touch: Any = intrinsics.prefetch


@nb.njit(nogil=True, cache=True, forceinline=True)
def _producer_hash(producer: Any, salt: Any) -> Any:
    return mix64(producer ^ salt)


@nb.njit(nogil=True, cache=True, forceinline=True)
def _home(hashed: Any, slots: Any) -> Any:
    return ((hashed >> np.uint64(32)) * np.uint64(slots)) >> np.uint64(32)


@nb.njit(nogil=True, cache=True, forceinline=True)
def shard_of(producer: Any, salt: Any) -> Any:
    """The shard that holds the producer's head and all its entries."""
    return np.int64(_producer_hash(producer, salt) & np.uint64(SHARD_COUNT - 1))


@nb.njit(nogil=True, cache=True, forceinline=True)
def _head_home(producer: Any, slots: Any, salt: Any) -> Any:
    """The slot, counted from the shard's first, with which the search for a head begins."""
    return _home(mix64(_producer_hash(producer, salt) + np.uint64(1)), slots)


@nb.njit(nogil=True, cache=True, forceinline=True)
def _entry_home(producer: Any, sequence: Any, slots: Any, salt: Any) -> Any:
    """The slot, counted from the shard's first, with which the search for an entry begins."""
    hashed = mix64(_producer_hash(producer, salt) ^ mix64(sequence + np.uint64(0x9E3779B97F4A7C15)))
    return _home(hashed, slots)


@nb.njit(nogil=True, cache=True, forceinline=True)
def _prefetch(table: Any, stride: Any, capacity: Any, producer: Any, sequence: Any, salt: Any) -> None:
    """Ask for the lines that a chunk's head and entry begin and end in."""
    shard = shard_of(producer, salt)
    first = np.uint64(shard * stride)
    head = np.int64(first + _head_home(producer, capacity[shard], salt) * _SLOT)
    entry = np.int64(first + _entry_home(producer, sequence, capacity[shard], salt) * _SLOT)
    _touch(table, head)
    _touch(table, head + (SLOT_WORDS - 1))
    _touch(table, entry)
    _touch(table, entry + (SLOT_WORDS - 1))


@nb.njit(nogil=True, cache=True)
def _find_head(table: Any, first: Any, slots: Any, producer: Any, salt: Any) -> Any:
    """(found, word): the producer's head, or the empty slot for it."""
    past = first + np.uint64(slots) * _SLOT
    at = first + _head_home(producer, slots, salt) * _SLOT
    while table[at + _W3] != np.uint64(0):
        if table[at] == producer and table[at + _W4] == _HEAD:
            return True, at
        at += _SLOT
        if at == past:
            at = first
    return False, at


@nb.njit(nogil=True, cache=True)
def _find_entry(
    table: Any, first: Any, slots: Any, producer: Any, sequence: Any, salt: Any, cut_ns: Any
) -> Any:
    """(found, word): the chunk's entry appended at `cut_ns` or later, or the empty slot for one."""
    past = first + np.uint64(slots) * _SLOT
    at = first + _entry_home(producer, sequence, slots, salt) * _SLOT
    while table[at + _W3] != np.uint64(0):
        if (
            table[at + _W1] == sequence
            and table[at] == producer
            and table[at + _W4] != _HEAD
            and np.int64(table[at + _W5]) >= cut_ns
        ):
            return True, at
        at += _SLOT
        if at == past:
            at = first
    return False, at


@nb.njit(nogil=True, cache=True)
def _highest(table: Any, first: Any, slots: Any, head: Any, salt: Any, cut_ns: Any) -> Any:
    """(found, sequence, append_ns) of the highest entry of the head's producer appended at `cut_ns` or later.

    Mostly the head has it. When that entry has expired, any other one that hasn't lies within a window below
    it: the rest was appended before it, see the module's docstring.
    """
    highest = table[head + _W1]
    highest_ns = np.int64(table[head + _W5])
    if highest_ns >= cut_ns:
        return True, highest, highest_ns
    if np.int64(table[head + _W3]) - MARK_BIAS < cut_ns:
        return False, np.uint64(0), _NONE
    producer = table[head]
    for back in range(1, PRODUCER_WINDOW):
        if highest < np.uint64(back):
            break
        sequence = highest - np.uint64(back)
        found, at = _find_entry(table, first, slots, producer, sequence, salt, cut_ns)
        if found:
            return True, sequence, np.int64(table[at + _W5])
    return False, np.uint64(0), _NONE


@nb.njit(nogil=True, cache=True, forceinline=True)
def _below_window(sequence: Any, highest: Any) -> Any:
    return highest >= np.uint64(PRODUCER_WINDOW) and sequence <= highest - np.uint64(PRODUCER_WINDOW)


@nb.njit(nogil=True, cache=True, forceinline=True)
def _put(
    table: Any,
    at: Any,
    producer: Any,
    sequence: Any,
    packed: Any,
    mark: Any,
    record_base: Any,
    append_ns: Any,
) -> None:
    table[at] = producer
    table[at + _W1] = sequence
    table[at + _W2] = packed
    table[at + _W3] = mark
    table[at + _W4] = np.uint64(record_base)
    table[at + _W5] = np.uint64(append_ns)


@nb.njit(nogil=True, cache=True)
def _raise_head(
    table: Any,
    first: Any,
    slots: Any,
    found: Any,
    head: Any,
    producer: Any,
    sequence: Any,
    salt: Any,
    append_ns: Any,
    undo: Any,
    row: Any,
) -> Any:
    """Bring the producer's head up to an entry just appended; return whether the head is a new one.

    `found` and `head` are what `_find_head` said before the entry was put in. With `row >= 0`, what was there
    goes to `undo[row, 1:]`: head, whether it is new, highest, latest, time.
    """
    if not found:
        # The entry may have taken the empty slot.
        _, head = _find_head(table, first, slots, producer, salt)
    if row >= 0:
        undo[row, 1] = head
        undo[row, 2] = np.uint64(0 if found else 1)
        undo[row, 3] = table[head + _W1]
        undo[row, 4] = table[head + _W3]
        undo[row, 5] = table[head + _W5]
    latest = np.uint64(append_ns + MARK_BIAS)
    if not found:
        _put(table, head, producer, sequence, np.uint64(0), latest, _NONE, append_ns)
        return not found
    known, highest, highest_ns = _highest(
        table, first, slots, head, salt, append_ns - np.int64(PRODUCER_RETENTION_NS)
    )
    if not known or sequence >= highest:
        highest = sequence
        highest_ns = append_ns
    table[head + _W1] = highest
    table[head + _W3] = latest
    table[head + _W5] = np.uint64(highest_ns)
    return not found


@nb.njit(nogil=True, cache=True)
def judge(
    table: Any,
    stride: Any,
    capacity: Any,
    limit: Any,
    used: Any,
    salt: Any,
    chunks: Any,
    now_ns: Any,
    record_base: Any,
    verdict: Any,
    first_offset: Any,
    original_base: Any,
    undo: Any,
) -> Any:
    """Judge chunks (rows: producer, sequence, checksum | count << 32, first sent) in order.

    New ones are put into the table so that later ones of the call see them; row by row of `undo` it says what
    was there. Returns (how many rows, the shard that has no room for the next one or -1).
    """
    n = len(chunks)
    cut_ns = now_ns - np.int64(PRODUCER_RETENTION_NS)
    rows = 0
    next_offset = record_base
    for i in range(n):
        if i + _AHEAD < n:
            _prefetch(table, stride, capacity, chunks[i + _AHEAD, 0], chunks[i + _AHEAD, 1], salt)
        producer = chunks[i, 0]
        sequence = chunks[i, 1]
        packed = chunks[i, 2]
        shard = shard_of(producer, salt)
        first = np.uint64(shard * stride)
        slots = capacity[shard]
        first_offset[i] = _NONE
        original_base[i] = _NONE
        head_found, head = _find_head(table, first, slots, producer, salt)
        if head_found:
            known, highest, _ = _highest(table, first, slots, head, salt, cut_ns)
            if known and _below_window(sequence, highest):
                verdict[i] = UNKNOWN
                continue
        found, at = _find_entry(table, first, slots, producer, sequence, salt, cut_ns)
        if found:
            verdict[i] = REPEAT if table[at + _W2] == packed else REUSED
            first_offset[i] = np.int64(table[at + _W3]) - MARK_BIAS
            original_base[i] = np.int64(table[at + _W4])
            continue
        if np.int64(chunks[i, 3]) < now_ns - np.int64(CHUNK_RETRY_NS_MAX):
            verdict[i] = UNKNOWN
            continue
        if used[shard] + 2 > limit[shard]:
            return rows, shard
        verdict[i] = NEW
        first_offset[i] = next_offset
        original_base[i] = record_base
        _put(table, at, producer, sequence, packed, np.uint64(next_offset + MARK_BIAS), record_base, now_ns)
        undo[rows, 0] = at
        made = _raise_head(
            table, first, slots, head_found, head, producer, sequence, salt, now_ns, undo, rows
        )
        undo[rows, 6] = np.uint64(shard)
        used[shard] += 2 if made else 1
        rows += 1
        next_offset += np.int64(packed >> np.uint64(32))
    return rows, np.int64(-1)


@nb.njit(nogil=True, cache=True)
def undo(table: Any, used: Any, undo: Any, rows: Any) -> None:
    """Take out what `judge` has put in, last first, which leaves every probe chain as it was."""
    for row in range(rows - 1, -1, -1):
        head = undo[row, 1]
        shard = np.int64(undo[row, 6])
        if undo[row, 2] != np.uint64(0):
            table[head + _W3] = np.uint64(0)
            used[shard] -= 1
        else:
            table[head + _W1] = undo[row, 3]
            table[head + _W3] = undo[row, 4]
            table[head + _W5] = undo[row, 5]
        table[undo[row, 0] + _W3] = np.uint64(0)
        used[shard] -= 1


@nb.njit(nogil=True, cache=True)
def insert(
    table: Any,
    stride: Any,
    capacity: Any,
    limit: Any,
    used: Any,
    salt: Any,
    entries: Any,
    begin: Any,
    undo: Any,
) -> Any:
    """Remember chunks, rows of six words in log order, from `begin` on; return the first whose shard is full, or n."""
    n = len(entries)
    for i in range(begin, n):
        if i + _AHEAD < n:
            _prefetch(table, stride, capacity, entries[i + _AHEAD, 0], entries[i + _AHEAD, 1], salt)
        producer = entries[i, 0]
        sequence = entries[i, 1]
        append_ns = np.int64(entries[i, 5])
        shard = shard_of(producer, salt)
        first = np.uint64(shard * stride)
        slots = capacity[shard]
        # The same entry, not merely a live one: an older one of the same name may have expired.
        found, at = _find_entry(table, first, slots, producer, sequence, salt, append_ns)
        if found:
            continue
        if used[shard] + 2 > limit[shard]:
            return i
        head_found, head = _find_head(table, first, slots, producer, salt)
        _put(
            table,
            at,
            producer,
            sequence,
            entries[i, 2],
            entries[i, 3] + np.uint64(MARK_BIAS),
            np.int64(entries[i, 4]),
            append_ns,
        )
        made = _raise_head(
            table, first, slots, head_found, head, producer, sequence, salt, append_ns, undo, np.int64(-1)
        )
        used[shard] += 2 if made else 1
    return n


@nb.njit(nogil=True, cache=True)
def collect(
    table: Any,
    first_word: Any,
    slots: Any,
    salt: Any,
    committed_end: Any,
    committed_ns: Any,
    log_end: Any,
    out: Any,
) -> Any:
    """Copy the entries that may matter yet to `out`, as rows in slot order.

    Returns (how many, how many heads the shard has). Left out: entries expired at `committed_ns`, those
    below `committed_end` and below the window of a highest there, and those of records at or above `log_end`.
    """
    first = np.uint64(first_word)
    cut_ns = committed_ns - np.int64(PRODUCER_RETENTION_NS)
    heads = 0
    for slot in range(slots):
        at = first + np.uint64(slot) * _SLOT
        if table[at + _W3] != np.uint64(0) and table[at + _W4] == _HEAD:
            table[at + _W2] = np.uint64(0)  # the scratch word: the producer's committed highest
            heads += 1
    for slot in range(slots):
        at = first + np.uint64(slot) * _SLOT
        if table[at + _W3] == np.uint64(0) or table[at + _W4] == _HEAD:
            continue
        if np.int64(table[at + _W4]) < committed_end and np.int64(table[at + _W5]) >= cut_ns:
            _, head = _find_head(table, first, slots, table[at], salt)
            table[head + _W2] = max(table[head + _W2], table[at + _W1])
    rows = 0
    for slot in range(slots):
        at = first + np.uint64(slot) * _SLOT
        if table[at + _W3] == np.uint64(0) or table[at + _W4] == _HEAD:
            continue
        if np.int64(table[at + _W5]) < cut_ns or np.int64(table[at + _W4]) >= log_end:
            continue
        _, head = _find_head(table, first, slots, table[at], salt)
        # Only what is committed itself: a later entry may be below the window of a highest that had expired
        # when it was appended, and is live.
        if np.int64(table[at + _W4]) < committed_end and _below_window(table[at + _W1], table[head + _W2]):
            continue
        for word in range(SLOT_WORDS):
            out[rows, word] = table[at + np.uint64(word)]
        rows += 1
    return rows, heads


@nb.njit(nogil=True, cache=True)
def refill(table: Any, first_word: Any, slots: Any, salt: Any, entries: Any, count: Any) -> Any:
    """Write a whole shard anew: its entries, and a head for each producer; return how many slots are used."""
    first = np.uint64(first_word)
    table[first_word : first_word + slots * SLOT_WORDS] = np.uint64(0)
    used = count
    never = np.int64(2**63 - 1)  # nothing was appended that late, so this finds an empty slot
    for i in range(count):
        producer = entries[i, 0]
        _, at = _find_entry(table, first, slots, producer, entries[i, 1], salt, never)
        for word in range(SLOT_WORDS):
            table[at + np.uint64(word)] = entries[i, word]
        found, head = _find_head(table, first, slots, producer, salt)
        latest = entries[i, 5] + np.uint64(MARK_BIAS)
        if not found:
            used += 1
            _put(table, head, producer, np.uint64(0), np.uint64(0), latest, _NONE, _NONE)
        else:
            table[head + _W3] = max(table[head + _W3], latest)
    for i in range(count):
        _, head = _find_head(table, first, slots, entries[i, 0], salt)
        latest_ns = np.int64(table[head + _W3]) - MARK_BIAS
        append_ns = np.int64(entries[i, 5])
        if append_ns < latest_ns - np.int64(PRODUCER_RETENTION_NS):
            continue
        unset = np.int64(table[head + _W5]) == _NONE
        if unset or entries[i, 1] >= table[head + _W1]:
            later = append_ns
            if not unset and entries[i, 1] == table[head + _W1]:
                later = max(append_ns, np.int64(table[head + _W5]))
            table[head + _W1] = entries[i, 1]
            table[head + _W5] = np.uint64(later)
    return used


@nb.njit(nogil=True, cache=True)
def digest(rows: Any) -> Any:
    """Two sums of hashes over the rows: they don't depend on order."""
    sum_a = np.uint64(0)
    sum_b = np.uint64(0)
    for i in range(len(rows)):
        state = np.uint64(0x9E3779B97F4A7C15)
        for word in range(SLOT_WORDS):
            state = mix64(state ^ rows[i, word])
        sum_a += state
        sum_b += mix64(state + np.uint64(0xD1B54A32D192ED03))
    return sum_a, sum_b
