"""How much memory remembered ids may take in a store, and what has to go to disk so that they do.

Pure. The budget is for all partitions together: tables, and what files of spilled ids keep in memory. When it is
exceeded, every partition gives up the same part of what it has, down to four fifths of the budget; what files keep in
memory can't be given up.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tallymark_store.dedup import DedupIndex

_TABLE_BYTES = 48  # of an id in a table, at most
_DUE_BYTES_MIN = 48 * 1024 * 1024  # of tables: for less than that no checkpoint is taken early


class IdBudget:
    """What may be used, and what follows from it. `limit_bytes` None: there is no bound."""

    def __init__(self, limit_bytes: int | None) -> None:
        self.limit_bytes = limit_bytes

    def is_full(self, indexes: Iterable[DedupIndex]) -> bool:
        """Whether a checkpoint is due, after which ids can be spilled."""
        if self.limit_bytes is None:
            return False
        table = files = 0
        for index in indexes:
            table += len(index) * _TABLE_BYTES
            files += index.file_memory_bytes
        return table > max(self.limit_bytes - files, _DUE_BYTES_MIN)

    def is_exceeded(self, indexes: Iterable[DedupIndex]) -> bool:
        """Whether something has to be spilled."""
        return self.limit_bytes is not None and sum(x.memory_bytes for x in indexes) > self.limit_bytes

    def spill_end(
        self, index: DedupIndex, indexes: Iterable[DedupIndex], files: Sequence[tuple[int, int]]
    ) -> int:
        """Up to which offset a partition's ids are to be spilled.

        Args:
            index: the partition's.
            indexes: of all partitions, this one's included.
            files: of its checkpoint, ascending: where each ends, and about how many ids it holds.
        """
        end = index.spilled_end
        if self.limit_bytes is None:
            return end
        total = sum(x.memory_bytes for x in indexes)
        if total <= self.limit_bytes:
            return end
        target = self.limit_bytes * 4 // 5 * index.memory_bytes // max(total, 1) - index.file_memory_bytes
        held = len(index)
        for file_end, count in files:
            if file_end <= end:
                continue
            if held * _TABLE_BYTES <= target:
                break
            held -= count
            end = file_end
        return end


def resident_from(limit_bytes: int, files: Sequence[int]) -> int:
    """Which of a checkpoint's files a start takes into memory: those from the returned place on.

    `files` is about how many ids each holds, ascending by age: the newest are last.
    """
    held = 0
    for place in range(len(files) - 1, -1, -1):
        held += files[place] * _TABLE_BYTES
        if held > limit_bytes:
            return place + 1
    return 0
