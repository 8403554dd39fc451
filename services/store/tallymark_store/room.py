"""Room on the disk for files that are written beside the log: it is asked for before, and given back where it fails.

The log stops taking events when its disk is full. So what can wait is not begun where it might not fit, and leaves
nothing behind that nobody lists.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

import msgspec

from tallymark_runtime.disk import Disk, DiskError, DiskFullError


class Room(msgspec.Struct, frozen=True):
    """How much of a disk is left to others."""

    reserve_bytes: int

    def check(self, disk: Disk, name: str, size: int) -> None:
        """See that a file of `size` bytes fits.

        Raises:
            DiskFullError: it doesn't, or would take of what is left to others.
        """
        if disk.free_bytes() < size + self.reserve_bytes:
            raise DiskFullError("make room for", name, errno.ENOSPC)

    @contextlib.contextmanager
    def removed_on_failure(self, disk: Disk, name: str) -> Iterator[None]:
        """Remove a file that is not written to its end."""
        try:
            yield
        except BaseException:
            # What can't be removed either is left to the next who tidies.
            with contextlib.suppress(DiskError):
                disk.remove(name)
            raise


NO_RESERVE = Room(0)
