"""What a store counts while it works, and the log line of each change of leadership.

`telemetry` tells the numbers when it is asked. They are about this process's life as leader: what it judged. What
is in a partition, at whatever replica, is read from the partition itself.
"""

from __future__ import annotations

import logging

import numpy as np

from tallymark_protocol.errors import Reason
from tallymark_runtime.instruments import count_in
from tallymark_runtime.logs import LeadershipChange, leadership_changed
from tallymark_store.prepared import Prepared

_log = logging.getLogger(__name__)

_REPEAT = int(Reason.REPEAT)


class StoreCounters:
    """A store's numbers since its start.

    Attributes:
        appends: payloads that were judged.
        stored: events that were accepted into the log.
        outcomes: events that were not, by `Reason`; REPEAT stands for those of chunks that were not judged again.
        leadership: changes of leadership at this node, by partition and change.
    """

    __slots__ = ("appends", "leadership", "outcomes", "stored")

    def __init__(self) -> None:
        self.appends = 0
        self.stored = 0
        self.outcomes: dict[int, int] = {}
        self.leadership: dict[tuple[int, LeadershipChange], int] = {}

    def judged(self, prepared: Prepared, events: int) -> None:
        """A payload of so many events was judged, and what is new of it is in the log."""
        self.appends += 1
        item = prepared.item
        if item is None:
            count_in(self.outcomes, _REPEAT, events)
            return
        if item.verdicts is None:
            self.stored += events
            return
        stored, *others = np.bincount(item.verdicts).tolist()
        self.stored += stored
        for reason, count in enumerate(others, start=1):
            if count:
                count_in(self.outcomes, reason, count)

    def leadership_changed(
        self, partition: int, change: LeadershipChange, *, epoch: int, reason: str, **fields: str | int
    ) -> None:
        """Count a change of leadership at this node, and log it; the arguments are those of `logs`."""
        key = partition, change
        self.leadership[key] = self.leadership.get(key, 0) + 1
        leadership_changed(_log, partition=partition, change=change, epoch=epoch, reason=reason, **fields)
