"""Which part of the log nobody needs any more, and who keeps more of it than the checkpoints do.

Pure. A log is dropped by segments, which all partitions share: what lies in a segment goes when no partition needs
any of it. A partition needs what lies above its newest durable checkpoint; and whoever is sending an older checkpoint,
or counting the log again, holds it from there on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

from tallymark_store.wal import PartitionIndex


def recycle_floor(indexes: Mapping[int, PartitionIndex], needed: Mapping[int, int], end: int) -> int:
    """The lowest segment that is needed.

    Args:
        indexes: of all partitions in the log.
        needed: by partition, the lowest offset that is; all of a partition's that isn't named.
        end: the segment that is written to.
    """
    floor = end
    for number, index in indexes.items():
        offset = max(needed.get(number, 0), index.log_start)
        row = index.find(offset)
        if row >= 0:
            floor = min(floor, index.row(row).segment)
    return floor


class Holds:
    """Who keeps which partition's log, and checkpoint files, for a while."""

    def __init__(self) -> None:
        self._holds: dict[object, tuple[int, int, frozenset[str]]] = {}  # partition, offset, names of files

    def take(self, who: object, number: int, offset: int, files: frozenset[str] = frozenset()) -> None:
        """Keep a partition's log from `offset` on, and these files of its checkpoints, until `release`."""
        self._holds[who] = number, offset, files

    def release(self, who: object) -> None:
        """Keep it no longer; nothing where nothing is held."""
        self._holds.pop(who, None)

    @contextlib.contextmanager
    def held(self, number: int, offset: int) -> Iterator[None]:
        """Keep a partition's log for the time of a block."""
        who = object()
        self.take(who, number, offset)
        try:
            yield
        finally:
            self.release(who)

    def lowest(self, number: int, offset: int) -> int:
        """The lowest offset of a partition that is held, or `offset` if that is lower."""
        return min([offset, *(at for held, at, _ in self._holds.values() if held == number)])

    def files(self, number: int) -> frozenset[str]:
        """The names of a partition's checkpoint files that are held."""
        return frozenset().union(*(names for held, _, names in self._holds.values() if held == number))
