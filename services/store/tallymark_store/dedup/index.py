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

Entries below `spilled_end` are looked up in files (`id_file`) instead of the table, which has them no more, or as
spent ones: the files hold every entry of [keep_offset, spilled_end). To no result does it matter where an entry is.
"""

import itertools
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from tallymark_store.dedup import index_kernels as kernels
from tallymark_store.dedup.arena import ShardArena, TableFullError
from tallymark_store.dedup.id_file import ENTRY_DTYPE, IdFile

SHARD_COUNT = 64

_LOAD_MAX = 0.82
_GROWTH = 1.25
_REFILL_MAX = 0.92
_SLOTS_MAX = 2**31  # 64 GiB of address space; it costs nothing until it is used
_SWEEP_SPENT_MIN = 16  # a shard is swept when one in this many of its entries is spent
_OFFSET_WORD = 3  # of a slot, as of an entry of `ENTRY_DTYPE`: the offset

U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]
U8 = npt.NDArray[np.uint8]
_Scalar = TypeVar("_Scalar", bound=np.generic)


class DedupIndex:
    """The event ids that a partition remembers: at most 48 bytes of memory each, from 100,000 on.

    `salt` (any 64 bits, random in production) decides where keys lie, so that nobody can choose event ids
    that collide; no result depends on it. `slots_max` bounds the reserved address range.
    """

    def __init__(self, *, salt: int = 0, slots_max: int = _SLOTS_MAX) -> None:
        self._arena = ShardArena(
            shards=SHARD_COUNT,
            slot_words=kernels.SLOT_WORDS,
            load_max=_LOAD_MAX,
            growth=_GROWTH,
            refill_max=_REFILL_MAX,
            slots_max=slots_max,
        )
        self._salt = np.uint64(salt)
        self._keep_offset = 0
        self._spilled_end = 0
        self._files: tuple[IdFile, ...] = ()  # by what they cover, ascending
        self._scratch: U64 = np.empty(0, dtype=np.uint64)  # see `_scratch_for`
        self._sweep_next = 0  # the shard that the next sweep begins with

    @property
    def keep_offset(self) -> int:
        """Entries below this offset are spent: they may be gone. It only rises."""
        return self._keep_offset

    @property
    def spilled_end(self) -> int:
        """Entries below this offset are in `files` only; exclusive. It only rises."""
        return self._spilled_end

    @property
    def files(self) -> tuple[IdFile, ...]:
        """The files in which entries are looked up, by what they cover, ascending."""
        return self._files

    @property
    def _table_low(self) -> int:
        """Entries below this offset in the table count for nothing."""
        return max(self._keep_offset, self._spilled_end)

    def spill(self, end: int, files: Sequence[IdFile]) -> None:
        """Look entries below `end` up in `files` from now on; `sweep` gives their memory back.

        The files hold every entry of [keep_offset, end), all of them committed; they may hold entries from `end` on
        as well. To exchange files for others that hold the same, call it with the end that there is.
        """
        assert end >= self._spilled_end, "what is in files only does not come back"
        assert all(a.end <= b.start for a, b in itertools.pairwise(files)), "each id is in one file"
        self._files = tuple(files)
        self._spilled_end = end

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

        `wants[i]` is 0 for an event to be passed over, `LOOK_UP_AND_REMEMBER` (1), or `LOOK_UP_ONLY` (2) for one
        that will be rejected unless it repeats an earlier event. Where an entry of the key is live (its offset is
        at least `floor_offset`), also one from this same batch, `verdict[i]` becomes `DUPLICATE` or `CONFLICT`
        and `original[i]` the entry's offset; otherwise both stay as they are, and with the wish for it the
        id is remembered.

        `base_offset` is the log end. The floor must not be below `keep_offset`. To back out, call
        `truncate(base_offset)`.

        Raises:
            TableFullError: the reserved range is exhausted; nothing of the batch is remembered, but
                `verdict` and `original` may have been written.
            IdFileError: a file is damaged; likewise.
        """
        assert floor_offset >= self._keep_offset, "a floor below what has been swept"
        assert base_offset >= floor_offset
        n = len(wants)
        keys_lo, keys_hi, fingerprints = _plain(keys_lo), _plain(keys_hi), _plain(fingerprints)
        wants = _plain(wants)
        assert len(keys_lo) == len(keys_hi) == len(fingerprints) == n
        assert len(verdict) == len(original) == n
        table_low = self._table_low
        if floor_offset < self._spilled_end and n:
            # Of a key one entry is live at most, here or there: what is found in a file is no matter of the table.
            wants = wants.copy()
            chosen = np.empty(n, dtype=np.int64)
            for file in self._files:
                if file.end > floor_offset:
                    file.judge(keys_lo, keys_hi, fingerprints, wants, floor_offset, verdict, original, chosen)
        arena = self._arena
        done = 0
        while True:
            done = kernels.judge(
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
                max(floor_offset, table_low),
                table_low,
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
            done = kernels.apply(
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
                self._table_low,
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
        assert log_end >= self._spilled_end, "what is in files is committed"
        arena = self._arena
        lowest = np.uint64(max(log_end, 0) + kernels.MARK_BIAS)
        return sum(
            int(kernels.truncate(arena.table, arena.base(shard), int(arena.capacity[shard]), lowest))
            for shard in range(SHARD_COUNT)
        )

    def sweep(self, floor_offset: int, max_shards: int) -> int:
        """Drop spent and spilled entries from the next `max_shards` shards and give memory back; return how many.

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
            if used == 0:
                continue
            kept = self._count(shard, self._table_low, None)
            if (used - kept) * _SWEEP_SPENT_MIN >= max(used, 1):
                self._rebuild(shard)
                dropped += used - kept
        return dropped

    def entries(self, shard: int, min_offset: int, max_offset: int) -> npt.NDArray[Any]:
        """The shard's entries with `min_offset <= offset < max_offset`, as `ENTRY_DTYPE`, in no fixed order.

        Entries never change, so reading shard by shard while ingest goes on yields exactly the entries as of
        `max_offset`, as long as `keep_offset` does not pass `min_offset` meanwhile. What has been spilled is not
        there to be read.
        """
        assert min_offset >= self._spilled_end, "these entries are in files"
        arena = self._arena
        if not arena.used[shard]:
            return np.empty(0, dtype=ENTRY_DTYPE)
        first, capacity = arena.base(shard), int(arena.capacity[shard])
        low, past = _mark(max(min_offset, self._keep_offset)), _mark(max(max_offset, 0))
        count = int(kernels.count(arena.table, first, capacity, low, past))
        words = np.empty(count * kernels.SLOT_WORDS, dtype=np.uint64)
        if count:
            kernels.collect(arena.table, first, capacity, low, past, words)
            words[_OFFSET_WORD :: kernels.SLOT_WORDS] -= np.uint64(kernels.MARK_BIAS)
        return words.view(ENTRY_DTYPE)

    def load(self, entries: npt.NDArray[Any]) -> None:
        """Remember entries that `entries` returned, here or on another replica, whatever the shard.

        The array comes from a checkpoint whose checksum the caller has verified.
        """
        self.reserve(len(entries))
        self.apply(entries["lo"], entries["hi"], entries["fingerprint"], entries["offset"])

    def digest(self, floor_offset: int, end_offset: int) -> int:
        """A 128-bit digest of the entries with `floor_offset <= offset < end_offset`, wherever they are.

        Raises:
            IdFileError: a file is damaged.
        """
        arena = self._arena
        low = _mark(max(floor_offset, self._table_low))
        past = _mark(max(end_offset, 0))
        a = b = 0
        for file in self._files:
            sums = file.digest(max(floor_offset, self._keep_offset), min(end_offset, self._spilled_end))
            a += sums[0]
            b += sums[1]
        for shard in range(SHARD_COUNT):
            sums = kernels.digest(arena.table, arena.base(shard), int(arena.capacity[shard]), low, past)
            a += int(sums[0])
            b += int(sums[1])
        return (a % 2**64) << 64 | b % 2**64

    @property
    def memory_bytes(self) -> int:
        """Bytes of memory in use, whole pages; what of files is mapped is not counted."""
        return self._arena.memory_bytes + self._scratch.nbytes + self.file_memory_bytes

    @property
    def file_memory_bytes(self) -> int:
        """Bytes of memory that the files take."""
        return sum(file.memory_bytes for file in self._files)

    @property
    def spilled_count(self) -> int:
        """How many entries the files hold, such as have left the window and such as are in the table included."""
        return sum(file.count for file in self._files)

    def __len__(self) -> int:
        """How many entries the table holds, spent ones that have not been swept included."""
        return int(self._arena.used.sum())

    def _shard(self, lo: int) -> int:
        return int(kernels.shard_of(np.uint64(lo), self._salt))

    def _count(self, shard: int, min_offset: int, max_offset: int | None) -> int:
        arena = self._arena
        past = np.uint64(2**64 - 1) if max_offset is None else _mark(max(max_offset, 0))
        return int(
            kernels.count(arena.table, arena.base(shard), int(arena.capacity[shard]), _mark(min_offset), past)
        )

    def _rebuild(self, shard: int, room: int = 1) -> None:
        """Write the shard anew without its spent entries, in the size that fits what is left."""
        arena = self._arena
        first = arena.base(shard)
        kept = self._scratch_for(int(arena.used[shard]))
        count = int(
            kernels.collect(
                arena.table,
                first,
                int(arena.capacity[shard]),
                _mark(self._table_low),
                np.uint64(2**64 - 1),
                kept,
            )
        )
        step = arena.size_for(shard, count, room)
        arena.resize(shard, step)
        kernels.refill(arena.table, first, int(arena.capacity[shard]), self._salt, kept, count)
        arena.used[shard] = count

    def _scratch_for(self, entries: int) -> U64:
        """A buffer for a shard's entries, kept: touching fresh pages would take longer than the rebuild."""
        if len(self._scratch) < entries * kernels.SLOT_WORDS:
            self._scratch = np.empty(int(entries * 1.1) * kernels.SLOT_WORDS, dtype=np.uint64)
        return self._scratch


def _plain(array: npt.NDArray[_Scalar]) -> npt.NDArray[_Scalar]:
    """The array, or a copy if it is read-only or strided: a kernel is compiled once more for every kind."""
    flags = array.flags
    return array if flags.c_contiguous and flags.writeable else array.copy()


def _mark(offset: int) -> np.uint64:
    return np.uint64(offset + kernels.MARK_BIAS)
