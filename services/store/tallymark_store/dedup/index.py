"""The remembered event ids of one partition.

A set of entries (128-bit key, fingerprint of the payload, offset), sharded by hash, each shard an
open-addressing table with linear probing in a `ShardArena`. It knows nothing of records or time: windows
are offsets, which the caller derives from append times.

Which entries count is decided by offsets, never by what happens to lie in the table, so that replicas
whose tables grew differently agree:

- an entry is **live** for a judgement when its offset is at or above the judgement's floor;
- it is **spent** when it is below `keep_offset`, which only `sweep` raises, to a floor that holds for good
  (that of a committed record). Only spent entries are overwritten or dropped.

Between the two lie entries that have left the window as of an uncommitted record. They stay, beside a newer
entry of the same key if there is one: when that record is truncated, the floor falls back and they are live
again. At most one entry of a key is live at a time.

A slot is four words: key lo, key hi, fingerprint, mark. The mark is 0 in an empty slot, 1 in a truncated
one (spent, but still part of its probe chain), else offset + 2.
"""

from typing import Any, TypeVar

import numba as nb
import numpy as np
import numpy.typing as npt

from tallymark_protocol.kernels import intrinsics
from tallymark_protocol.kernels.intrinsics import mix64
from tallymark_store.dedup.arena import ShardArena, TableFullError

DUPLICATE = 1
"""Verdict of `DedupIndex.judge`: the id is remembered, with the same payload."""
CONFLICT = 2
"""Verdict of `DedupIndex.judge`: the id is remembered, with another payload."""

SHARD_COUNT = 64
ENTRY_DTYPE = np.dtype([("lo", "<u8"), ("hi", "<u8"), ("fingerprint", "<u8"), ("offset", "<i8")])
"""One remembered event id, as checkpoints carry it."""

_SLOT_WORDS = 4
_LOAD_MAX = 0.82
_GROWTH = 1.25
_REFILL_MAX = 0.92
_SLOTS_MAX = 2**31  # 64 GiB of address space; it costs nothing until it is used
_AHEAD = 16  # events between the prefetch of a slot and its use
_SWEEP_SPENT_MIN = 16  # a shard is swept when one in this many of its entries is spent

_EMPTY = 0
_TRUNCATED = 1
_MARK_BIAS = 2

U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]
U8 = npt.NDArray[np.uint8]
_Scalar = TypeVar("_Scalar", bound=np.generic)


# Word positions are uint64 throughout: numba checks signed indexes for being negative, which in these loops
# costs as much as the probing itself.
_W1 = np.uint64(1)
_W2 = np.uint64(2)
_W3 = np.uint64(3)
_SLOT = np.uint64(_SLOT_WORDS)
_LINE = np.int64(8)  # words of a cache line

_FREE = 0  # outcomes of `_probe`
_REUSABLE = 1
_FOUND = 2


# Called from kernels only, which leave out the typing context that its Python signature shows.
_touch: Any = intrinsics.prefetch


@nb.njit(nogil=True, cache=True, forceinline=True)
def _shard_of(lo: Any, salt: Any) -> Any:
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
def _judge(
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
    live_mark = np.uint64(floor_offset + _MARK_BIAS)
    marks = ~np.uint64(0) - live_mark
    kept_mark = np.uint64(keep_offset + _MARK_BIAS)
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
            original[i] = np.int64(table[at + _W3]) - _MARK_BIAS
            continue
        if outcome == _FREE:
            if used[shard] >= limit[shard]:
                return i
            used[shard] += 1
        table[at] = lo
        table[at + _W1] = hi
        table[at + _W2] = fingerprints[i]
        table[at + _W3] = np.uint64(base_offset + i + _MARK_BIAS)
    return n


@nb.njit(nogil=True, cache=True)
def _apply(
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
    kept_mark = np.uint64(keep_offset + _MARK_BIAS)
    for i in range(begin, n):
        j = i + _AHEAD
        if j < n:
            _prefetch(table, stride, capacity, salt, keys_lo[j])
        if offsets[i] < keep_offset:
            continue  # spent before it is here: nobody will ask for it
        lo = keys_lo[i]
        hi = keys_hi[i]
        mark = np.uint64(offsets[i] + _MARK_BIAS)
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
def _count(table: Any, first: Any, slots: Any, lowest: Any, past: Any) -> Any:
    """How many slots have `lowest <= mark < past`."""
    count = 0
    for slot in range(slots):
        mark = table[np.uint64(first + slot * _SLOT_WORDS) + _W3]
        if mark >= lowest and mark < past:
            count += 1
    return count


@nb.njit(nogil=True, cache=True)
def _collect(table: Any, first: Any, slots: Any, lowest: Any, past: Any, out: Any) -> Any:
    """Copy the slots with `lowest <= mark < past` to `out`; return how many."""
    count = 0
    for slot in range(slots):
        at = np.uint64(first + slot * _SLOT_WORDS)
        mark = table[at + _W3]
        if mark >= lowest and mark < past:
            to = np.uint64(count * _SLOT_WORDS)
            out[to] = table[at]
            out[to + _W1] = table[at + _W1]
            out[to + _W2] = table[at + _W2]
            out[to + _W3] = mark
            count += 1
    return count


@nb.njit(nogil=True, cache=True)
def _refill(table: Any, first: Any, slots: Any, salt: Any, entries: Any, count: Any) -> None:
    """Write a whole shard anew: empty it, then put the entries in.

    Entries come in the order of their old slots, which is nearly that of their hashes, so the writes run
    through memory in order.
    """
    table[first : first + slots * _SLOT_WORDS] = np.uint64(0)
    start = np.uint64(first)
    past = start + np.uint64(slots) * _SLOT
    for i in range(count):
        source = np.uint64(i * _SLOT_WORDS)
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
def _truncate(table: Any, first: Any, slots: Any, lowest: Any) -> Any:
    """Mark the slots with `mark >= lowest` truncated; return how many."""
    count = 0
    for slot in range(slots):
        at = np.uint64(first + slot * _SLOT_WORDS) + _W3
        if table[at] >= lowest:
            table[at] = np.uint64(_TRUNCATED)
            count += 1
    return count


@nb.njit(nogil=True, cache=True)
def _digest(table: Any, first: Any, slots: Any, lowest: Any, past: Any) -> Any:
    """Two sums of hashes over the entries with `lowest <= mark < past`: they don't depend on order."""
    sum_a = np.uint64(0)
    sum_b = np.uint64(0)
    for slot in range(slots):
        at = np.uint64(first + slot * _SLOT_WORDS)
        mark = table[at + _W3]
        if mark >= lowest and mark < past:
            state = mix64(table[at] + np.uint64(0x9E3779B97F4A7C15))
            state = mix64(state ^ table[at + _W1])
            state = mix64(state ^ table[at + _W2])
            state = mix64(state ^ mark)
            sum_a += state
            sum_b += mix64(state + np.uint64(0xD1B54A32D192ED03))
    return sum_a, sum_b


class DedupIndex:
    """The event ids that a partition remembers: at most 48 bytes of memory each, from 100,000 on.

    `salt` (any 64 bits, random in production) decides where keys lie, so that nobody can choose event ids
    that collide; no result depends on it. `slots_max` bounds the reserved address range.
    """

    def __init__(self, *, salt: int = 0, slots_max: int = _SLOTS_MAX) -> None:
        self._arena = ShardArena(
            shards=SHARD_COUNT,
            slot_words=_SLOT_WORDS,
            load_max=_LOAD_MAX,
            growth=_GROWTH,
            refill_max=_REFILL_MAX,
            slots_max=slots_max,
        )
        self._salt = np.uint64(salt)
        self._keep_offset = 0
        self._scratch: U64 = np.empty(0, dtype=np.uint64)  # see `_scratch_for`
        self._sweep_next = 0  # the shard that the next sweep begins with

    @property
    def keep_offset(self) -> int:
        """Entries below this offset are spent: they may be gone. It only rises."""
        return self._keep_offset

    def judge(
        self,
        keys_lo: U64,
        keys_hi: U64,
        fingerprints: U64,
        wants: U8,
        base_offset: int,
        floor_offset: int,
        verdict: U8,
        original: I64,
    ) -> None:
        """Look up and remember the ids of one batch, in order; event i has offset `base_offset + i`.

        Only events with `wants[i] != 0` are looked at. Where an entry of the key is live (its offset is at
        least `floor_offset`), also one from this same batch, `verdict[i]` becomes `DUPLICATE` or `CONFLICT`
        and `original[i]` the entry's offset; otherwise the id is remembered and both stay as they are.

        `base_offset` is the log end. The floor must not be below `keep_offset`. To back out, call
        `truncate(base_offset)`.

        Raises:
            TableFullError: the reserved range is exhausted; nothing of the batch is remembered, but
                `verdict` and `original` may have been written.
        """
        assert floor_offset >= self._keep_offset, "a floor below what has been swept"
        assert base_offset >= floor_offset
        n = len(wants)
        keys_lo, keys_hi, fingerprints = _plain(keys_lo), _plain(keys_hi), _plain(fingerprints)
        wants = _plain(wants)
        assert len(keys_lo) == len(keys_hi) == len(fingerprints) == n
        assert len(verdict) == len(original) == n
        arena = self._arena
        done = 0
        while True:
            done = _judge(
                arena.table,
                arena.stride_words,
                arena.capacity,
                arena.limit,
                arena.used,
                self._salt,
                keys_lo,
                keys_hi,
                fingerprints,
                wants,
                done,
                base_offset,
                floor_offset,
                self._keep_offset,
                verdict,
                original,
            )
            if done == n:
                return
            try:
                self._rebuild(self._shard(int(keys_lo[done])))
            except TableFullError:
                self.truncate(base_offset)
                raise

    def apply(self, keys_lo: U64, keys_hi: U64, fingerprints: U64, offsets: I64) -> None:
        """Remember entries whose verdicts are known, from the log. Entries that are there already are no change.

        Only accepted events with an id belong here, in any order.

        Raises:
            TableFullError: the reserved range is exhausted; the entries before are remembered.
        """
        n = len(offsets)
        keys_lo, keys_hi, fingerprints = _plain(keys_lo), _plain(keys_hi), _plain(fingerprints)
        offsets = _plain(offsets)
        assert len(keys_lo) == len(keys_hi) == len(fingerprints) == n
        arena = self._arena
        done = 0
        while True:
            done = _apply(
                arena.table,
                arena.stride_words,
                arena.capacity,
                arena.limit,
                arena.used,
                self._salt,
                keys_lo,
                keys_hi,
                fingerprints,
                offsets,
                done,
                self._keep_offset,
            )
            if done == n:
                return
            self._rebuild(self._shard(int(keys_lo[done])))

    def reserve(self, n: int) -> None:
        """Make room for about `n` more ids at once, before a bulk load; `judge` and `apply` grow by themselves."""
        room = n // SHARD_COUNT
        for shard in range(SHARD_COUNT):
            used = int(self._arena.used[shard])
            if used + room > self._arena.limit[shard]:
                self._rebuild(shard, room=room)

    def truncate(self, log_end: int) -> int:
        """Forget the entries with `offset >= log_end`; return how many. Reads the whole table."""
        arena = self._arena
        lowest = np.uint64(max(log_end, 0) + _MARK_BIAS)
        return sum(
            int(_truncate(arena.table, arena.base(shard), int(arena.capacity[shard]), lowest))
            for shard in range(SHARD_COUNT)
        )

    def sweep(self, floor_offset: int, max_shards: int) -> int:
        """Drop spent entries from the next `max_shards` shards and give memory back; return how many.

        `floor_offset` becomes the new `keep_offset` if it is higher. It must be the floor as of a *committed*
        record: what has been dropped can't come back when an uncommitted one is truncated.
        """
        self._keep_offset = max(self._keep_offset, floor_offset)
        arena = self._arena
        dropped = 0
        for _ in range(min(max_shards, SHARD_COUNT)):
            shard = self._sweep_next
            self._sweep_next = (shard + 1) % SHARD_COUNT
            used = int(arena.used[shard])
            kept = self._count(shard, self._keep_offset, None)
            if (used - kept) * _SWEEP_SPENT_MIN >= max(used, 1):
                self._rebuild(shard)
                dropped += used - kept
        return dropped

    def entries(self, shard: int, min_offset: int, max_offset: int) -> npt.NDArray[Any]:
        """The shard's entries with `min_offset <= offset < max_offset`, as `ENTRY_DTYPE`, in no fixed order.

        Entries never change, so reading shard by shard while ingest goes on yields exactly the entries as of
        `max_offset`, as long as `keep_offset` does not pass `min_offset` meanwhile.
        """
        arena = self._arena
        low = max(min_offset, self._keep_offset)
        count = self._count(shard, low, max_offset)
        out = np.empty(count, dtype=ENTRY_DTYPE)
        words = out.view(np.uint64)
        _collect(
            arena.table,
            arena.base(shard),
            int(arena.capacity[shard]),
            _mark(low),
            _mark(max(max_offset, 0)),
            words,
        )
        out["offset"] -= _MARK_BIAS
        return out

    def load(self, entries: npt.NDArray[Any]) -> None:
        """Remember entries that `entries` returned, here or on another replica, whatever the shard.

        The array comes from a checkpoint whose checksum the caller has verified.
        """
        self.reserve(len(entries))
        self.apply(entries["lo"], entries["hi"], entries["fingerprint"], entries["offset"])

    def digest(self, floor_offset: int, end_offset: int) -> int:
        """A 128-bit digest of the entries with `floor_offset <= offset < end_offset`, whatever the layout."""
        arena = self._arena
        low = _mark(max(floor_offset, self._keep_offset))
        past = _mark(max(end_offset, 0))
        a = b = 0
        for shard in range(SHARD_COUNT):
            sums = _digest(arena.table, arena.base(shard), int(arena.capacity[shard]), low, past)
            a += int(sums[0])
            b += int(sums[1])
        return (a % 2**64) << 64 | b % 2**64

    @property
    def memory_bytes(self) -> int:
        """Bytes of memory in use, whole pages."""
        return self._arena.memory_bytes + self._scratch.nbytes

    def __len__(self) -> int:
        """How many entries the table holds, spent ones that have not been swept included."""
        return int(self._arena.used.sum())

    def _shard(self, lo: int) -> int:
        return int(_shard_of(np.uint64(lo), self._salt))

    def _count(self, shard: int, min_offset: int, max_offset: int | None) -> int:
        arena = self._arena
        past = np.uint64(2**64 - 1) if max_offset is None else _mark(max(max_offset, 0))
        return int(
            _count(arena.table, arena.base(shard), int(arena.capacity[shard]), _mark(min_offset), past)
        )

    def _rebuild(self, shard: int, room: int = 1) -> None:
        """Write the shard anew without its spent entries, in the size that fits what is left."""
        arena = self._arena
        first = arena.base(shard)
        kept = self._scratch_for(int(arena.used[shard]))
        count = int(
            _collect(
                arena.table,
                first,
                int(arena.capacity[shard]),
                _mark(self._keep_offset),
                np.uint64(2**64 - 1),
                kept,
            )
        )
        step = arena.size_for(shard, count, room)
        arena.resize(shard, step)
        _refill(arena.table, first, int(arena.capacity[shard]), self._salt, kept, count)
        arena.used[shard] = count

    def _scratch_for(self, entries: int) -> U64:
        """A buffer for a shard's entries, kept: touching fresh pages would take longer than the rebuild."""
        if len(self._scratch) < entries * _SLOT_WORDS:
            self._scratch = np.empty(int(entries * 1.1) * _SLOT_WORDS, dtype=np.uint64)
        return self._scratch


def _plain(array: npt.NDArray[_Scalar]) -> npt.NDArray[_Scalar]:
    """The array, or a copy if it is read-only or strided: a kernel is compiled once more for every kind."""
    flags = array.flags
    return array if flags.c_contiguous and flags.writeable else array.copy()


def _mark(offset: int) -> np.uint64:
    return np.uint64(offset + _MARK_BIAS)
