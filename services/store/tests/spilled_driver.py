"""A store without a loop, whose cells and alert records go to files when it is told so."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from tallymark_store import checkpoint
from tallymark_store.spilling import Spilling
from tallymark_store.wal import DamagedError

from .power_cut import CountingDisk
from .store_driver import Driver


class SpilledDriver(Driver):
    """See `Driver`."""

    calls: list[int] | None = None  # how many of the disk's are left until the power goes

    def checkpoints(self, number: int) -> Any:
        disk = super().checkpoints(number)
        return disk if self.calls is None else CountingDisk(disk, self.calls)

    def spilling(self, budget_bytes: int = 0, reserve_bytes: int = 0) -> Spilling:
        """One for the partitions as they are now."""
        disk: Any = self.disk.at("checkpoints")

        async def offload(work: Any, *args: Any) -> Any:
            return work(*args)

        def damaged(_: Any, error: DamagedError) -> None:
            raise error

        store: Any = SimpleNamespace(partitions=self.partitions)
        return Spilling(
            store,
            disk if self.calls is None else CountingDisk(disk, self.calls),
            budget_bytes=budget_bytes,
            alert_budget_bytes=budget_bytes,
            token=self.rng.getrandbits(64),
            offload=offload,
            on_damage=damaged,
            reserve_bytes=reserve_bytes,
        )

    def spill_cells(self, budget_bytes: int = 0) -> Spilling:
        """Once."""
        spilling = self.spilling(budget_bytes)

        async def relieve() -> None:
            await spilling.relieve()
            await spilling.relieve_alerts()
            await spilling.merge()

        asyncio.run(relieve())
        return spilling

    def tidy(self) -> None:
        """What follows a checkpoint."""
        spilling = self.spilling()
        for number, partition in self.partitions.items():
            listed = checkpoint.files_of(self.manifests[number]) if number in self.manifests else []
            asyncio.run(spilling.tidy(partition, listed))

    def files(self) -> set[str]:
        """Of cells and alert records, on disk."""
        return {name for name in Driver.checkpoints(self, 0).list() if name.startswith(checkpoint.SPILLED)}

    def listed(self) -> set[str]:
        """By the newest checkpoint, of these."""
        return {
            name for name in checkpoint.files_of(self.manifests[0]) if name.startswith(checkpoint.SPILLED)
        }
