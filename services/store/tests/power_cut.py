"""Disks that lose power at a chosen call: for tests that try every step."""

from __future__ import annotations

from typing import Any


class CrashAt(Exception):
    """Raised at the step at which the power goes."""


class CountingDisk:
    """A disk that loses power at its n-th call, of the folders and files it gives, too."""

    def __init__(self, disk: Any, calls: list[int]) -> None:
        self._disk = disk
        self._calls = calls

    def __getattr__(self, name: str) -> Any:
        inner = getattr(self._disk, name)
        if not callable(inner):
            return inner

        def call(*args: Any, **kwargs: Any) -> Any:
            self._calls[0] -= 1
            if self._calls[0] < 0:
                raise CrashAt
            found = inner(*args, **kwargs)
            return CountingDisk(found, self._calls) if name in ("create", "open", "at") else found

        return call
