"""Memory for a sharded hash table: one reserved address range in which every shard grows in place.

Owns the mapping and each shard's capacity; what the slots mean belongs to the table on top. The range is
reserved once and pages cost nothing until they are touched, so kernels get one plain array that never
moves, a shard grows without touching the others, and memory follows the shards' capacities to the page.

Capacities are staggered: shard i's are `BASE * growth^(k + i / shards)`. Shards fill evenly (they are
chosen by hash), so at any moment some are freshly grown and some nearly full: the average load hardly
depends on the number of entries, and the pauses for growing come one by one instead of all at once.
"""

import functools
import mmap
import sys

import numpy as np
import numpy.typing as npt

WORD_BYTES = 8
_BASE_SLOTS = 64
_HUGE_BYTES = 2 * 1024 * 1024
# Named in `mmap` since Python 3.13 only; the value of Linux on x86-64 and arm64.
_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
_MADV_COLLAPSE = 25 if sys.platform == "linux" else None  # since Linux 6.1; `mmap` has no name for it


class TableFullError(MemoryError):
    """A shard would outgrow the address range reserved for it."""


class ShardArena:
    """Reserved memory for `shards` tables of fixed-size slots.

    `table` is the whole range as uint64 words: shard `s` begins at word `s * stride_words` and has
    `capacity[s]` slots of `slot_words` words. Of these at most `limit[s]` may be filled; `used[s]` is kept by
    the table's kernels. A shard is rebuilt into a size that it fills to `refill_max` of that limit at most, so that
    the next rebuild is a good many inserts away.
    """

    def __init__(
        self,
        *,
        shards: int,
        slot_words: int,
        load_max: float,
        growth: float,
        refill_max: float,
        slots_max: int,
    ) -> None:
        assert shards & (shards - 1) == 0
        assert growth > 1.0
        assert 0.0 < load_max < 1.0
        self.shards = shards
        self.slot_words = slot_words
        slot_bytes = slot_words * WORD_BYTES
        stride_bytes = -(-max(slots_max // shards, 2 * _BASE_SLOTS) * slot_bytes // _HUGE_BYTES) * _HUGE_BYTES
        self._map = _reserve(stride_bytes * shards)
        self.stride_words = stride_bytes // WORD_BYTES
        self.table: npt.NDArray[np.uint64] = np.frombuffer(self._map, dtype=np.uint64)
        self._slots = _capacities(shards, growth, max(slots_max // shards, 2 * _BASE_SLOTS))
        self._load_max = load_max
        self._refill_max = refill_max
        self._huge_end = [0] * shards  # bytes from the shard's start that lie in huge pages
        self.capacity = np.array([sizes[0] for sizes in self._slots], dtype=np.int64)
        self.limit = (self.capacity * load_max).astype(np.int64)
        self.used = np.zeros(shards, dtype=np.int64)

    def base(self, shard: int) -> int:
        """The word at which the shard begins."""
        return shard * self.stride_words

    def size_for(self, shard: int, entries: int, room: int) -> int:
        """The smallest step at which the shard holds `entries` with some slack, and `room` more.

        Raises:
            TableFullError: the reserved range has no room for that.
        """
        for step, slots in enumerate(self._slots[shard]):
            limit = int(slots * self._load_max)
            if entries + room <= limit and entries <= limit * self._refill_max:
                return step
        raise TableFullError(f"{entries + room} entries do not fit into one shard of the table")

    def resize(self, shard: int, step: int) -> None:
        """Set the shard's capacity; the caller has saved its slots and writes all of the new ones."""
        slot_bytes = self.slot_words * WORD_BYTES
        start = shard * self.stride_words * WORD_BYTES
        old_end = _round_up(int(self.capacity[shard]) * slot_bytes, mmap.PAGESIZE)
        slots = self._slots[shard][step]
        new_end = _round_up(slots * slot_bytes, mmap.PAGESIZE)
        if new_end < old_end:
            self._advise(getattr(mmap, "MADV_DONTNEED", None), start + new_end, old_end - new_end)
        # Whole huge pages only: a partly used one would cost memory that nobody asked for.
        huge_end = new_end // _HUGE_BYTES * _HUGE_BYTES
        if huge_end > self._huge_end[shard]:
            fresh = start + self._huge_end[shard]
            length = huge_end - self._huge_end[shard]
            self._advise(getattr(mmap, "MADV_HUGEPAGE", None), fresh, length)
            # The range's old part was touched as small pages, and would stay so for minutes.
            self._advise(_MADV_COLLAPSE, fresh, length)
        self._huge_end[shard] = huge_end
        self.capacity[shard] = slots
        self.limit[shard] = int(slots * self._load_max)

    def _advise(self, option: int | None, start: int, length: int) -> None:
        _advise(self._map, option, start, length)

    @property
    def memory_bytes(self) -> int:
        """Bytes of memory that the slots take when all are touched, whole pages."""
        slot_bytes = self.slot_words * WORD_BYTES
        return sum(_round_up(int(slots) * slot_bytes, mmap.PAGESIZE) for slots in self.capacity)


@functools.lru_cache(maxsize=8)  # two kinds of table in a process
def _capacities(shards: int, growth: float, slots_max: int) -> tuple[tuple[int, ...], ...]:
    """The capacities of each shard, by step, ascending: the same for all tables of one kind."""
    found = []
    for shard in range(shards):
        sizes = []
        size = _BASE_SLOTS * growth ** (shard / shards)
        while size <= slots_max:
            sizes.append(int(size))
            size *= growth
        found.append(tuple(sizes))
    return tuple(found)


def _reserve(length: int) -> mmap.mmap:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    mapping = mmap.mmap(-1, length, flags=flags)
    # Where huge pages are given out unasked, a shard of a few kilobytes would take two megabytes.
    _advise(mapping, getattr(mmap, "MADV_NOHUGEPAGE", None), 0, length)
    return mapping


def _advise(mapping: mmap.mmap, option: int | None, start: int, length: int) -> None:
    """Give the kernel a hint about a range: no result depends on it."""
    if option is None:
        return
    try:
        mapping.madvise(option, start, length)
    except OSError:
        return  # a kernel without this advice, or without a huge page to spare


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
