"""Deliberate defects in how alert records are kept, handed out and followed: the simulator must notice each."""

from __future__ import annotations

from typing import Any

from tallymark._feed import Feed
from tallymark_alerts.source import _Reader
from tallymark_protocol.messages import AlertRecord
from tallymark_store.fold import Fold
from tallymark_store.fold.cells import PERIOD, W_KEY, W_LINKS

from .mutations import Mutation, Patch
from .simulation import Options


def forget_what_has_fired() -> list[Patch]:
    original = Fold.restore.__func__  # type: ignore[attr-defined]

    def restore(cls: Any, *args: Any, **options: Any) -> Fold:
        fold: Fold = original(cls, *args, **options)
        cells = fold._cells.array[: fold.cell_rows]
        is_period = (cells[:, W_KEY] >> 32) & 0xFFFFFFFF == PERIOD
        cells[is_period, W_LINKS] &= 0xFF  # no row: the next event makes a new one
        return fold

    return [(Fold, "restore", classmethod(restore))]


def skip_what_the_window_has_lost() -> list[Patch]:
    original = _Reader.collect

    def collect(self: _Reader, turn: int) -> None:
        for number, window in self._source.windows.items():
            self._positions[number] = max(self._positions[number], window.start)
        original(self, turn)

    return [(_Reader, "collect", collect)]


def cover_when_handed_out() -> list[Patch]:
    original = Feed.take

    def take(self: Feed) -> AlertRecord | None:
        alert = original(self)
        if alert is not None:
            assert self._covered is not None
            self._covered[alert.partition] = alert.position + 1
        return alert

    return [(Feed, "take", take)]


ALL = [
    Mutation(
        "forget_what_has_fired",
        "a checkpoint has all that the fold knows, and so which thresholds have fired",
        Options(kinds=("checkpoint", "kill", "power"), mean_ms=150),
        forget_what_has_fired,
    ),
    Mutation(
        "skip_what_the_window_has_lost",
        "who is behind an instance's window is read from the store",
        Options(kinds=("end_lease", "stop")),
        skip_what_the_window_has_lost,
    ),
    Mutation(
        "cover_when_handed_out",
        "a subscriber's cursor covers an alert only once the next one is asked for",
        Options(kinds=("kill",)),
        cover_when_handed_out,
    ),
]
