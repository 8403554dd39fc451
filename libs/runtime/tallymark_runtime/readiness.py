"""Whether a process serves: what health endpoints answer, whatever protocol they speak.

Owns no figures, only the question. Every part of a process adds a **check**: a function that says in a sentence why
that part cannot serve right now, or "" where it can. A process is ready when it has checks, none of them objects,
and it is not about to stop; it is alive as long as nothing has failed for good.
"""

from __future__ import annotations

from collections.abc import Callable

Check = Callable[[], str]


class Readiness:
    """The readiness of one process.

    Attributes:
        is_stopping: set as soon as the process was told to stop: who balances load is to look elsewhere, while what
            is under way is still answered.
    """

    def __init__(self) -> None:
        self.is_stopping = False
        self._checks: dict[str, Check] = {}
        self._fatal: dict[str, Check] = {}

    def add(self, part: str, check: Check) -> None:
        """Ask this check from now on, in place of one that was added under the same name."""
        self._checks[part] = check

    def starting(self, part: str) -> None:
        """A part is about to start: not ready until it adds its check."""
        self.add(part, lambda: "is starting")

    def add_fatal(self, part: str, check: Check) -> None:
        """Ask this check from now on whether the part has failed for good: only a new process helps."""
        self._fatal[part] = check

    def problems(self) -> list[str]:
        """Why the process does not serve, a line for each part; empty when it is ready."""
        found = self.failures()
        if self.is_stopping:
            found.append("the process is stopping")
        elif not self._checks:
            found.append("nothing has started yet")
        return found + _asked(self._checks)

    def failures(self) -> list[str]:
        """What has failed for good, a line for each part; empty while the process is alive."""
        return _asked(self._fatal)


def _asked(checks: dict[str, Check]) -> list[str]:
    return [f"{part}: {problem}" for part, check in checks.items() if (problem := check())]
