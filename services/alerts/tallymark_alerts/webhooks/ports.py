"""What webhooks need of others: where alerts come from, and what carries them away."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from tallymark_alerts.webhooks.schedule import Outcome
from tallymark_protocol.messages import AlertRecord, AlertsBatch


class AlertReader(Protocol):
    """Gives alerts, from memory or from the stores. Raises `TallymarkError` where it can't now."""

    async def next_batch(
        self,
        *,
        account_ids: Sequence[int],
        metric_codes: Sequence[str],
        since: Mapping[int, int] | None,
        limit: int,
        wait_s: float,
    ) -> AlertsBatch:
        """The next matching alerts from these positions on; None: from now on. Its `next` names every partition."""
        ...

    async def alert(self, partition: int, position: int) -> AlertRecord | None:
        """The alert at a position of a partition; None where there is none."""
        ...


class Sender(Protocol):
    """Carries one webhook's messages to its URL."""

    async def post(self, headers: dict[str, str], body: bytes) -> Outcome:
        """Post a body once; whatever goes wrong is an outcome."""
        ...

    async def close(self) -> None:
        """Close its connections."""
        ...
