"""A folder of the operating system that is only looked at.

The twin of `RealDisk` for whoever inspects a data directory: nothing is created, not even a folder that is missing,
files are opened for reading, and whatever would change something raises a `DiskError` (EROFS).
"""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

from tallymark_runtime.disk import DiskError, RealDisk, RealFile, _mapped


class ReadOnlyDisk(RealDisk):
    """A folder, present or not; without files where it is missing."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._lock_descriptor = -1

    def at(self, folder: str) -> ReadOnlyDisk:
        """Return the port for a folder inside this one."""
        return ReadOnlyDisk(self._root / folder)

    def list(self) -> list[str]:
        """Return the names of the files here, sorted; none where there is no such folder."""
        return super().list() if self._root.is_dir() else []

    def open(self, name: str) -> RealFile:
        """Open a file for reading."""
        return self._open(name, os.O_RDONLY)

    def create(self, name: str) -> RealFile:
        """Refuse."""
        raise DiskError("create", name, errno.EROFS)

    def rename(self, old: str, new: str) -> None:  # noqa: ARG002
        """Refuse."""
        raise DiskError("rename", old, errno.EROFS)

    def remove(self, name: str) -> None:
        """Refuse."""
        raise DiskError("remove", name, errno.EROFS)

    def lock(self, name: str) -> None:
        """Take the folder for this process, if there is a file to take it by: without one nobody has it.

        Raises `DiskError` (EWOULDBLOCK) when another process has it.
        """
        if name not in self.list():
            return
        with _mapped("lock", name):
            descriptor = os.open(self._root / name, os.O_RDONLY | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(descriptor)
                raise
            self._lock_descriptor = descriptor
