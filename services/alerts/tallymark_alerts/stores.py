"""The stores, as the alerts role needs them: a port, and its real side over connections."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Protocol

from tallymark_protocol.messages import AlertsResult, StoreAlerts, StoreTail, TailResult
from tallymark_runtime.asking import Asking
from tallymark_runtime.coordinator import Coordinator


class Stores(Protocol):
    """Leaders of partitions, by address.

    Attributes:
        on_news: called with a partition that has another leader, or none, or whose leader can be reached again.
    """

    on_news: Callable[[int], None]

    def leader(self, partition: int) -> str | None:
        """The address of a partition's leader, as far as is known; None while there is none."""
        ...

    def doubt(self) -> None:
        """What is known of leaders turned out to be wrong: ask again."""
        ...

    async def tail(self, address: str, call: StoreTail, timeout_s: float) -> TailResult:
        """Ask one store for new records, once. Raises TallymarkError."""
        ...

    async def read(self, call: StoreAlerts, deadline: float) -> AlertsResult:
        """Ask a partition's leader for a page, again after failures that may pass, until the loop's time is `deadline`.

        Raises:
            TallymarkError: nobody answered in time, or what the leader answered.
        """
        ...


class AskedStores:
    """The real stores. Start it, close it."""

    def __init__(self, coordinator: Coordinator, node_id: str, rng: random.Random) -> None:
        self._asking = Asking(coordinator, node_id, rng)
        self._asking.on_news = self._news
        self.on_news: Callable[[int], None] = lambda _: None

    async def start(self) -> None:
        """Learn who leads, and connect."""
        await self._asking.start()

    async def close(self) -> None:
        """Stop following, and close the connections."""
        await self._asking.close()

    def leader(self, partition: int) -> str | None:
        """See `Stores`."""
        return self._asking.leaders.address(partition)

    def doubt(self) -> None:
        """See `Stores`."""
        self._asking.doubt()

    async def tail(self, address: str, call: StoreTail, timeout_s: float) -> TailResult:
        """See `Stores`."""
        return await self._asking.call(address, call, TailResult, timeout_s)

    async def read(self, call: StoreAlerts, deadline: float) -> AlertsResult:
        """See `Stores`."""
        return await self._asking.ask(call.partition, call, AlertsResult, deadline=deadline)

    def _news(self, partition: int) -> None:
        self.on_news(partition)
