"""What happened in a run, one line a thing, kept as values and put into words only when somebody reads it."""

from __future__ import annotations

from collections import deque
from typing import Any

from .loop import World

LINES_MAX = 6_000


class Trace:
    """The last lines of a run."""

    def __init__(self, world: World, *, lines_max: int = LINES_MAX) -> None:
        self._world = world
        self._lines: deque[tuple[int, str, str, tuple[Any, ...]]] = deque(maxlen=lines_max)

    def __call__(self, who: str, what: str, *args: Any) -> None:
        """Note something: `what` is a %-format for `args`."""
        self._lines.append((self._world.now_ns, who, what, args))

    def text(self, last: int | None = None) -> str:
        """The lines."""
        lines = list(self._lines)[-last:] if last else list(self._lines)
        return "\n".join(
            f"{at / 1e6:11.3f} ms  {who:<8} {what % args if args else what}" for at, who, what, args in lines
        )
