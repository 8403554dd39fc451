"""A hash index beside a dense array: hash -> row number, by open addressing.

An entry is one u64: a 32-bit tag of the hash, and the row number plus one (0: empty). The key itself lies in the
row; whoever looks up compares it there when the tag matches, so entries stay at 8 bytes.

The table is 64 shards, chosen by the hash's top 6 bits. The next 32 bits are the tag, and the tag alone gives the
position within a shard (`tag * capacity >> 32`), so a shard is enlarged without looking at rows, nearly in
sequence, by a quarter at a time: loads stay between 0.4 and 0.5, so that most look-ups end at their first entry
(a search of unforeseeable length costs more than the memory), and no single step moves more than a 64th.
Shards lie `stride` entries apart in one reserved range, so they grow in place. Kernels don't grow them (they can't
allocate, see `compiling`): they mark the index FULL and stop between two events, or two rows where an index is filled
anew; the caller makes room and goes on. What is deleted leaves no mark: entries behind it move up.

However keys fall, a shard never runs full: it is at most half full before each event, as a shard due to grow becomes
larger by a quarter, at least by twice STEP_MAX, and one event adds at most STEP_MAX entries.
Lookup loops stand with their keys: see `cells.find_cell`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from tallymark_store.fold.arena import Arena
from tallymark_store.fold.compiling import inlined, kernel

SHARD_BITS = 6
SHARDS = 1 << SHARD_BITS
ROWS_MAX = 2**32 - 2  # row numbers are 32 bits, plus one
STEP_MAX = 8  # entries that a kernel may add between two looks at FULL
_CAPACITY_FIRST = 8 * STEP_MAX  # so that a quarter is room for two steps
_CAPACITY_LARGE = 1 << 16
_STRIDE_RESERVED = 1 << 25  # entries a shard may have where addresses could be reserved: 1.4 G rows in all
_STRIDE_FIRST = 1_024
_HUGE_CAPACITY = 1 << 20  # entries of a shard (8 MiB) from which huge pages pay

# Columns of an index's `shards` array. Row SHARDS holds the whole index's figures.
CAPACITY = 0
COUNT = 1
STRIDE = 0  # in row SHARDS
FULL = 1  # in row SHARDS: 1 when a shard is due to grow

_SHARD_SHIFT = np.uint64(64 - SHARD_BITS)
_TAG_SHIFT = np.uint64(64 - SHARD_BITS - 32)
LOW32 = np.uint64(0xFFFFFFFF)
U32 = np.uint64(32)
ZERO = np.uint64(0)


@inlined
def shard_of(h: Any) -> Any:
    """The shard (int64) of a hash."""
    return np.int64(np.uint64(h) >> _SHARD_SHIFT)


@inlined
def tag_of(h: Any) -> Any:
    """The tag (uint64 below 2^32) of a hash."""
    return (np.uint64(h) >> _TAG_SHIFT) & LOW32


@inlined
def home_of(tag: Any, capacity: Any) -> Any:
    """Where in its shard the search for a tag begins."""
    return np.int64((np.uint64(tag) * np.uint64(capacity)) >> U32)


@inlined
def entry_position(shards: Any, h: Any) -> Any:
    """Where in the table the search for a hash begins: for prefetching."""
    shard = shard_of(h)
    return shard * shards[SHARDS, STRIDE] + home_of(tag_of(h), shards[shard, CAPACITY])


@kernel
def _place(table: Any, base: Any, capacity: Any, entry: Any) -> None:
    position = home_of(entry >> U32, capacity)
    while table[base + position] != ZERO:
        position += 1
        if position == capacity:
            position = 0
    table[base + position] = entry


@kernel
def _fill(table: Any, base: Any, capacity: Any, entries: Any) -> None:
    for i in range(capacity):
        table[base + i] = ZERO
    for i in range(len(entries)):
        if entries[i] != ZERO:
            _place(table, base, capacity, entries[i])


@kernel
def insert(table: Any, shards: Any, h: Any, row: Any) -> None:
    """Add an entry for a row that isn't in yet. Marks the index FULL when a shard is due to grow.

    The caller then stops within STEP_MAX entries; half of the shard is left, four times as much at least.
    """
    shard = shard_of(h)
    capacity = shards[shard, CAPACITY]
    count = shards[shard, COUNT] + 1
    assert count < capacity
    if 2 * count > capacity:
        shards[SHARDS, FULL] = 1
    shards[shard, COUNT] = count
    entry = (tag_of(h) << U32) | np.uint64(row + 1)
    _place(table, shard * shards[SHARDS, STRIDE], capacity, entry)


@kernel
def remove(table: Any, shards: Any, h: Any, row: Any) -> None:
    """Delete the entry of a row, which is in."""
    shard = shard_of(h)
    capacity = shards[shard, CAPACITY]
    base = shard * shards[SHARDS, STRIDE]
    tag = tag_of(h)
    entry = (tag << U32) | np.uint64(row + 1)
    hole = home_of(tag, capacity)
    while table[base + hole] != entry:
        assert table[base + hole] != ZERO
        hole += 1
        if hole == capacity:
            hole = np.int64(0)
    at = hole
    while True:
        at += 1
        if at == capacity:
            at = np.int64(0)
        other = table[base + at]
        if other == ZERO:
            break
        # It may move up unless its search begins behind the hole.
        home = home_of(other >> U32, capacity)
        stays = hole < home <= at if hole <= at else hole < home or home <= at
        if not stays:
            table[base + hole] = other
            hole = at
    table[base + hole] = ZERO
    shards[shard, COUNT] -= 1


@kernel
def _move(old_table: Any, old_stride: Any, table: Any, shards: Any) -> None:
    stride = shards[SHARDS, STRIDE]
    for shard in range(SHARDS):
        for i in range(shards[shard, CAPACITY]):
            table[shard * stride + i] = old_table[shard * old_stride + i]


class Index:
    """The table of an index, for kernels: `table` uint64[], `shards` int64[SHARDS + 1, 2].

    `expected` is how many entries there will be soon, evenly spread: no more than a guess that spares growing.
    """

    def __init__(self, expected: int = 0, *, reserve: bool = True) -> None:
        # Beside the even share room for a shard that gets more than its share.
        capacity = max(_CAPACITY_FIRST, int(expected / SHARDS / 0.45) + _CAPACITY_FIRST if expected else 0)
        self._arena = Arena(
            np.uint64, reserve_rows=_STRIDE_RESERVED * SHARDS if reserve else 0, initial_rows=1
        )
        stride = _STRIDE_RESERVED
        if not self._arena.reserved:
            stride = max(_STRIDE_FIRST, 2 * capacity)
            self._arena.ensure(stride * SHARDS)
        self.shards: npt.NDArray[np.int64] = np.zeros((SHARDS + 1, 2), dtype=np.int64)
        self.shards[:SHARDS, CAPACITY] = capacity
        self.shards[SHARDS, STRIDE] = stride
        self._advised = 0

    @property
    def table(self) -> npt.NDArray[np.uint64]:
        """The entries, shard after shard."""
        return self._arena.array

    @property
    def count(self) -> int:
        """How many entries there are."""
        return int(self.shards[:SHARDS, COUNT].sum())

    @property
    def memory_bytes(self) -> int:
        """Bytes of the entries in use or kept free for growth."""
        return 8 * int(self.shards[:SHARDS, CAPACITY].sum())

    def make_room(self) -> bool:
        """Grow the shards that are due; call it when a kernel has marked the index FULL. Says whether `table` moved."""
        if not self.shards[SHARDS, FULL]:
            return False
        self.shards[SHARDS, FULL] = 0
        moved = False
        for shard, (capacity, count) in enumerate(self.shards[:SHARDS].tolist()):
            # Shards fill alike, so small ones grow together and kernels are interrupted less often.
            load = 0.5 if capacity > _CAPACITY_LARGE else 0.45
            if count <= load * capacity:
                continue
            larger = capacity + capacity // 4
            if larger > self.shards[SHARDS, STRIDE]:
                self._widen()
                moved = True
            base = shard * int(self.shards[SHARDS, STRIDE])
            entries = self.table[base : base + capacity].copy()
            _fill(self.table, base, larger, entries)
            self.shards[shard, CAPACITY] = larger
        return moved

    def _widen(self) -> None:
        """Move all shards apart, to twice the stride."""
        old_table, old_stride = self.table, int(self.shards[SHARDS, STRIDE])
        self._arena = Arena(np.uint64, reserve_rows=0, initial_rows=2 * old_stride * SHARDS)
        self.shards[SHARDS, STRIDE] = 2 * old_stride
        _move(old_table, old_stride, self.table, self.shards)

    def advise(self) -> None:
        """Ask for huge pages once shards are large. Cheap; call it now and then."""
        largest = int(self.shards[:SHARDS, CAPACITY].max())
        if largest < _HUGE_CAPACITY or largest < self._advised:
            return
        self._advised = largest * 2
        stride = int(self.shards[SHARDS, STRIDE])
        for shard in range(SHARDS):
            self._arena.advise_range(shard * stride, shard * stride + min(self._advised, stride))
