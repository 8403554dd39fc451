"""The sets of COUNT_UNIQUE metrics: one table of (period cell, value) -> the operation that counts.

Of several operations on one value in one period the one with the highest event time counts, ties going to the
later offset; ADD (and NONE) make it a member, REMOVE doesn't. So late and reordered operations end in the same set,
and a removed value keeps its entry: an older ADD may still arrive.

An entry is 40 bytes, five 64-bit words, in one dense array::

    0   row of the period cell u32, operation u32     3   event time i64
    1   value, low word                               4   offset i64
    2   value, high word (0 but for strings)

Values are numbers as they are (of UINT64 the bits), strings as BLAKE2b-128 over the metric's uid and the text with
its tag.

A freed entry (its set has gone to a file, see `units`) has the owner FREE_MEMBER; word 1 is one plus the next freed one.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tallymark_protocol.kernels.blake2b import blake2b_128
from tallymark_protocol.kernels.intrinsics import load_u8, load_u64, mix64
from tallymark_protocol.model import OperationType
from tallymark_protocol.payload import (
    C_TEXT_BYTES,
    C_TEXT_ENCODING,
    C_TEXT_ENDS,
    table_end,
    table_start,
    value_at,
)
from tallymark_store.fold.compiling import inlined, kernel
from tallymark_store.fold.counters import N_FREE_MEMBER, N_FREE_MEMBERS, N_MEMBERS
from tallymark_store.fold.index import (
    CAPACITY,
    FULL,
    LOW32,
    SHARDS,
    STRIDE,
    U32,
    ZERO,
    home_of,
    insert,
    shard_of,
    tag_of,
)

M_OWNER = 0
M_LO = 1
M_HI = 2
M_TIME = 3
M_OFFSET = 4
MEMBER_WORDS = 5
MEMBER_BYTES = 8 * MEMBER_WORDS
FREE_MEMBER = -1

_MASK32 = 0xFFFFFFFF
_REMOVE = int(OperationType.REMOVE)
_TEXT_STRING = 1


@kernel
def unique_value(data: Any, columns: Any, i: Any, uid: Any, work: Any) -> Any:
    """The value of event i as two int64 words. `work` is `blake2b_128`'s."""
    if columns[C_TEXT_ENCODING] == 2:
        start = table_start(data, columns[C_TEXT_ENDS], columns[C_TEXT_BYTES], i)
        end = table_end(data, columns[C_TEXT_ENDS], columns[C_TEXT_BYTES], i)
        if end > start:
            if load_u8(data, start) == _TEXT_STRING:
                lo, hi = blake2b_128(np.uint64(0), uid, data, start, end, work)
                return np.int64(lo), np.int64(hi)
            return np.int64(load_u64(data, start + 1)), np.int64(0)
    return value_at(data, columns, i), np.int64(0)


@inlined
def member_hash(row: Any, lo: Any, hi: Any, seed: Any) -> Any:
    """Hash of an entry's key."""
    return mix64(mix64(np.uint64(row) + np.uint64(seed)) ^ mix64(np.uint64(lo) ^ mix64(np.uint64(hi))))


@inlined
def new_member(members: Any, counters: Any) -> Any:
    """A row for an entry, whatever is in it."""
    e = counters[N_FREE_MEMBER] - 1
    if e >= 0:
        counters[N_FREE_MEMBER] = members[e, M_LO]
        counters[N_FREE_MEMBERS] -= 1
    else:
        e = counters[N_MEMBERS]
        counters[N_MEMBERS] = e + 1
    return e


@inlined
def free_member(members: Any, counters: Any, e: Any) -> None:
    """Give back an entry's row; its index entry is gone."""
    members[e, M_OWNER] = FREE_MEMBER
    members[e, M_LO] = counters[N_FREE_MEMBER]
    counters[N_FREE_MEMBER] = e + 1
    counters[N_FREE_MEMBERS] += 1


@kernel
def apply_operation(
    table: Any,
    shards: Any,
    members: Any,
    counters: Any,
    h: Any,
    row: Any,
    lo: Any,
    hi: Any,
    time: Any,
    offset: Any,
    operation: Any,
) -> Any:
    """Apply one operation on a value of the set of period cell `row`; `offset` is above all before it.

    Returns the change of the number of members.
    """
    added = np.int64(0) if operation == _REMOVE else np.int64(1)
    shard = shard_of(h)
    capacity = shards[shard, CAPACITY]
    base = shard * shards[SHARDS, STRIDE]
    tag = tag_of(h)
    position = home_of(tag, capacity)
    while True:
        entry = table[base + position]
        if entry == ZERO:
            break
        if (entry >> U32) == tag:
            e = np.int64(entry & LOW32) - 1
            if members[e, M_LO] == lo and members[e, M_HI] == hi and members[e, M_OWNER] & _MASK32 == row:
                if time < members[e, M_TIME]:
                    return np.int64(0)
                before = np.int64(0) if members[e, M_OWNER] >> 32 == _REMOVE else np.int64(1)
                members[e, M_OWNER] = row | (operation << 32)
                members[e, M_TIME] = time
                members[e, M_OFFSET] = offset
                return added - before
        position += 1
        if position == capacity:
            position = 0
    e = new_member(members, counters)
    members[e, M_OWNER] = row | (operation << 32)
    members[e, M_LO] = lo
    members[e, M_HI] = hi
    members[e, M_TIME] = time
    members[e, M_OFFSET] = offset
    insert(table, shards, h, e)
    return added


@kernel
def reindex_members(table: Any, shards: Any, members: Any, first: Any, count: Any, seed: Any) -> Any:
    """Add the entries from row `first` on to their index. Returns the row to go on with; at the end, `count`."""
    for e in range(first, count):
        if shards[SHARDS, FULL] != 0:
            return np.int64(e)
        if members[e, M_OWNER] == FREE_MEMBER:
            continue
        h = member_hash(members[e, M_OWNER] & _MASK32, members[e, M_LO], members[e, M_HI], seed)
        insert(table, shards, h, e)
    return count
