"""Room for what is counted again: cells and alert records that memory has no place for go to files of verify's own.

A recount of a large store takes as much as the store's totals do. It is spilled as a store spills (`spilling`), but at
once, and into a folder that nobody keeps.
"""

from __future__ import annotations

import contextlib
from collections.abc import Coroutine
from typing import Any, NoReturn

from tallymark_runtime.disk import Disk
from tallymark_store.partition import Partition
from tallymark_store.spilling import Spilling
from tallymark_store.wal import DamagedError


class Scratch:
    """Keeps partitions that are counted within a budget.

    Args:
        disk: an empty folder that may be written to.
        cell_bytes: for the cells and sets of one partition.
        alert_bytes: for its alert records.
    """

    def __init__(self, disk: Disk, *, cell_bytes: int, alert_bytes: int) -> None:
        self._disk = disk
        self._cell_bytes = cell_bytes
        self._alert_bytes = alert_bytes
        self._lives = 0  # of partitions: names of files differ by it
        self._counted: _Counted | None = None

    def relieve(self, partition: Partition) -> None:
        """Take the coldest out of memory, if the partition takes more than it may.

        Raises:
            DiskError: the folder can't be written to.
            DamagedError: what was written there isn't what is read.
        """
        if self._counted is None or self._counted.partition is not partition:
            self._lives += 1
            self._counted = _Counted(partition, self)
        fold = partition.fold
        if fold.cell_bytes() + fold.set_bytes() > self._cell_bytes or fold.alert_bytes() > self._alert_bytes:
            _finish(self._counted.relieve())

    def spilling(self, counted: _Counted) -> Spilling:
        """One for a partition that is counted."""
        return Spilling(
            counted,
            self._disk,
            budget_bytes=self._cell_bytes,
            alert_budget_bytes=self._alert_bytes,
            token=self._lives,
            offload=_inline,
            on_damage=_refuse,
        )


class _Counted:
    """The only partition of a store that is none."""

    def __init__(self, partition: Partition, scratch: Scratch) -> None:
        self.partition = partition
        self.partitions = {partition.partition: partition}
        self._spilling = scratch.spilling(self)

    async def relieve(self) -> None:
        await self._spilling.relieve()
        await self._spilling.relieve_alerts()
        await self._spilling.merge()
        await self._spilling.tidy(self.partition, [])


def _finish(work: Coroutine[Any, Any, None]) -> None:
    """Run to its end what lets others have a turn and waits for nothing."""
    with contextlib.suppress(StopIteration):
        while True:
            work.send(None)


async def _inline(function: Any, *args: Any) -> Any:
    return function(*args)


def _refuse(_: Partition, error: DamagedError) -> NoReturn:
    raise error
