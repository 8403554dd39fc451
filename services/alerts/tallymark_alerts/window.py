"""The newest alert records of one partition, in memory: pure.

Owns the records at positions [start, end), without a gap, and finds among them what a filter wants without looking at
all: by account, or by metric. It is bounded in records; the oldest go, some at a time, so that what each costs stays
small. Whoever wants older ones reads them from the store.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Final, TypeVar

from tallymark_alerts.matching import Filter
from tallymark_protocol.messages import AlertRecord

K = TypeVar("K", int, str)

_CHUNK_SHARE: Final = 8  # of the window, that is let go at once


class Window:
    """See the module.

    Args:
        partition: whose records these are.
        start: the position of the first record that will be given to it.
        records_max: how many it keeps.

    Attributes:
        start: the position of the first record that is kept.
        end: the position of the next one that will be; exclusive.
    """

    __slots__ = (
        "_base",
        "_by_account",
        "_by_metric",
        "_records",
        "_records_max",
        "end",
        "partition",
        "start",
    )

    def __init__(self, partition: int, start: int, records_max: int) -> None:
        assert records_max >= 1, "a window keeps something"
        self.partition = partition
        self.start = start
        self.end = start
        self._records_max = records_max
        self._records: list[AlertRecord] = []  # from `start` on
        self._by_account: dict[int, list[int]] = {}  # positions, ascending
        self._by_metric: dict[str, list[int]] = {}  # likewise

    def __len__(self) -> int:
        return len(self._records)

    def missing(self, records: Sequence[AlertRecord]) -> Sequence[AlertRecord] | None:
        """Those of some consecutive records that are not here yet; None where they leave a gap, or have one."""
        for position, record in enumerate(records, start=records[0].position if records else 0):
            if record.position != position or record.partition != self.partition:
                return None
        if not records:
            return records
        first = records[0].position
        return None if first > self.end else records[self.end - first :]

    def append(self, records: Sequence[AlertRecord]) -> None:
        """Take the next records."""
        by_account, by_metric = self._by_account, self._by_metric
        position = self.end
        for record in records:
            assert record.position == position, "there is no gap: see `missing`"
            by_account.setdefault(record.account_id, []).append(position)
            by_metric.setdefault(record.metric_code, []).append(position)
            position += 1
        self._records.extend(records)
        self.end = position
        if len(self._records) > self._records_max:
            chunk = max(self._records_max // _CHUNK_SHARE, 1)
            self._drop(min(len(self._records) - self._records_max + chunk - 1, len(self._records)))

    def _drop(self, count: int) -> None:
        """Let the oldest go."""
        gone = self._records[:count]
        del self._records[:count]
        self.start += count
        for account in {record.account_id for record in gone}:
            _cut(self._by_account, account, self.start)
        for metric in {record.metric_code for record in gone}:
            _cut(self._by_metric, metric, self.start)

    def record(self, position: int) -> AlertRecord:
        """The record at a position in [start, end)."""
        assert self.start <= position < self.end, "it is in the window"
        return self._records[position - self.start]

    def find(self, wanted: Filter, position: int, limit: int) -> tuple[list[AlertRecord], int]:
        """At most `limit` records from a position in [start, end] on that a filter wants; and where to go on."""
        assert self.start <= position <= self.end, "it is in the window"
        records, start = self._records, self.start
        if wanted.is_all:
            first = position - start
            found = records[first : first + limit]
            return found, position + len(found)
        found = []
        for candidate in self._candidates(wanted, position):
            record = records[candidate - start]
            if wanted.matches(record):
                found.append(record)
                if len(found) == limit:
                    return found, candidate + 1
        return found, self.end

    def _candidates(self, wanted: Filter, position: int) -> Sequence[int]:
        """Positions from one on that hold all that the filter wants, and maybe more, ascending."""
        if wanted.accounts:
            return self._listed(self._by_account, wanted.accounts, position)
        return self._listed(self._by_metric, wanted.metrics, position)

    def _listed(self, index: dict[K, list[int]], keys: frozenset[K], position: int) -> Sequence[int]:
        """The positions from one on of some keys of an index, ascending; all there are where the keys are more."""
        if self.end - position <= len(keys):
            return range(position, self.end)
        parts = []
        for key in keys:
            found = index.get(key)
            if found is not None and found[-1] >= position:
                parts.append(found[bisect_left(found, position) :])
        if len(parts) == 1:
            return parts[0]
        return sorted(position for part in parts for position in part)


def _cut(index: dict[K, list[int]], key: K, start: int) -> None:
    """Forget a key's positions below `start`."""
    positions = index[key]
    del positions[: bisect_left(positions, start)]
    if not positions:
        del index[key]
