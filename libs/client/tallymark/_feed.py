"""What a subscription has read and not yet handed out, and how far it is: a pure object without a loop.

Two cursors by partition. The **reading** one is where the next answer goes on; the **covered** one is what
`offsets()` gives: everything below it was handed out and, since its successor was asked for, is done with. Between
the two lies a bounded buffer: alerts in the order in which they came, and after the alerts of an answer a mark with
the positions that the answer reached, so that the covered cursor also moves past alerts that don't match.

One answer is asked for ahead even while there is no room, for there may be by the time that it comes. What then
doesn't fit is let go, together with all that follows it in its partition, and the reading cursor stays before it.
From then on the feed is **behind**: nothing is asked for until half the buffer is free, and only what fits; once an
answer is shorter than what was asked for, it has caught up.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Final

from tallymark_protocol.messages import AlertRecord, AlertsBatch

ASK_MAX: Final = 1_000  # alerts to ask for at once, however large the buffer is


class Feed:
    """The buffer and the cursors of one subscription."""

    def __init__(self, size: int, since: Mapping[int, int] | None) -> None:
        """Begin at `since`; None: at what `pin` will say."""
        assert size >= 1, "a buffer holds an alert at least"
        self.dropped = 0  # how often an alert was let go, to be read again
        self._size = size
        self._items: deque[AlertRecord | dict[int, int]] = deque()  # alerts, and marks
        self._held = 0  # alerts among them, at most `size`
        self._reading: dict[int, int] | None = None if since is None else dict(since)
        self._covered: dict[int, int] | None = None if since is None else dict(since)
        self._handed: AlertRecord | None = None  # handed out last, and not covered yet
        self._is_behind = False

    @property
    def is_pinned(self) -> bool:
        """Whether it is known where to begin."""
        return self._reading is not None

    @property
    def reading(self) -> dict[int, int]:
        """Where the next answer goes on, by partition."""
        assert self._reading is not None, "a feed is pinned before it is read"
        return dict(self._reading)

    @property
    def covered(self) -> dict[int, int]:
        """Where a successor of this feed would go on, by partition."""
        assert self._covered is not None, "a feed is pinned before it is read"
        self._cover()
        return dict(self._covered)

    def pin(self, positions: Mapping[int, int]) -> None:
        """Begin at these positions."""
        assert self._reading is None, "a feed begins once"
        self._reading = dict(positions)
        self._covered = dict(positions)

    def wanted(self) -> int:
        """Return how many alerts to ask for now; 0: none until more were taken."""
        if not self._is_behind:
            return min(self._size, ASK_MAX)
        room = self._size - self._held
        return min(room, ASK_MAX) if 2 * room >= self._size else 0

    def add(self, batch: AlertsBatch, wanted: int) -> None:
        """Take the answer to a question for `wanted` alerts from the reading cursor on."""
        assert self._reading is not None, "a feed is pinned before it is read"
        reached = dict(self._reading)
        cut: set[int] = set()  # partitions of which an alert was let go
        for alert in batch.alerts:
            partition = alert.partition
            if alert.position < reached.get(partition, 0):
                continue  # the service must not answer so; an alert that comes twice would go back in order
            if partition in cut or self._held >= self._size:
                if partition not in cut:
                    cut.add(partition)
                    reached[partition] = alert.position
                self.dropped += 1
                continue
            self._items.append(alert)
            self._held += 1
            reached[partition] = alert.position + 1
        for partition, position in batch.next.items():
            if partition not in cut and position > reached.get(partition, 0):
                reached[partition] = position
            else:
                reached.setdefault(partition, 0)
        if cut:
            self._is_behind = True
        elif len(batch.alerts) < wanted:
            self._is_behind = False
        if reached != self._reading:
            self._reading = reached
            if self._items and isinstance(self._items[-1], dict):
                self._items.pop()  # nothing came since: the new mark says more
            self._items.append(reached)

    def take(self) -> AlertRecord | None:
        """Cover the alert handed out last, and hand out the next; None if there is none yet."""
        handed = self._handed
        if handed is not None:
            assert self._covered is not None, "a feed is pinned before it is read"
            self._covered[handed.partition] = handed.position + 1
            self._handed = None
        self._cover()
        if not self._items:
            return None
        alert = self._items.popleft()
        assert isinstance(alert, AlertRecord), "marks at the front have been passed"
        self._held -= 1
        self._handed = alert
        return alert

    def _cover(self) -> None:
        """Pass the mark at the front, once every alert before it is covered."""
        if self._handed is None:
            while self._items and isinstance(mark := self._items[0], dict):
                self._covered = dict(mark)
                self._items.popleft()
