"""A disk on which nothing is ever changed, whatever is done to it: so that recovery itself can be asked what it finds.

What is created lives in memory, what is removed or renamed is so for whoever looks through here, and what is written
to a file that was there before is dropped: recovery writes the bytes that are there already, zeros over a torn tail,
and markers, and reads none of them back.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence

from tallymark_runtime.disk import ByteArray, BytesLike, Disk, File, FileMissingError, MemoryDisk


class _Frozen:
    """A file that keeps its bytes."""

    def __init__(self, file: File) -> None:
        self._file = file
        self.name = file.name

    def size(self) -> int:
        return self._file.size()

    def read(self, position: int, length: int) -> ByteArray:
        return self._file.read(position, length)

    def map(self) -> ByteArray:
        return self._file.map()

    def write(self, position: int, parts: Sequence[BytesLike]) -> None:
        """Drop it."""

    def write_sync(self, position: int, parts: Sequence[BytesLike]) -> None:
        """Drop it."""

    def sync(self) -> None:
        """There is nothing to do."""

    def truncate(self, size: int) -> None:
        """Drop it."""

    def close(self) -> None:
        self._file.close()


class OverlayDisk:
    """A folder of another disk, seen through changes that are in memory only."""

    def __init__(self, base: Disk) -> None:
        self._base = base
        self._memory = MemoryDisk()
        self._names: dict[str, str] = {name: name for name in base.list()}  # what is seen, by the real name
        self._inner: dict[str, OverlayDisk] = {}

    def at(self, folder: str) -> OverlayDisk:
        """Return the port for a folder inside this one."""
        if folder not in self._inner:
            self._inner[folder] = OverlayDisk(self._base.at(folder))
        return self._inner[folder]

    def list(self) -> list[str]:
        """Return the names of the files here, sorted."""
        return sorted({*self._names, *self._memory.list()})

    def create(self, name: str) -> File:
        """Create a file in memory."""
        self._names.pop(name, None)
        return self._memory.create(name)

    def open(self, name: str) -> File:
        """Open a file."""
        if name in self._names:
            return _Frozen(self._base.open(self._names[name]))
        return self._memory.open(name)

    def rename(self, old: str, new: str) -> None:
        """Give a file another name."""
        if old in self._names:
            if new in self._memory.list():
                self._memory.remove(new)
            self._names[new] = self._names.pop(old)
            return
        self._memory.rename(old, new)
        self._names.pop(new, None)

    def remove(self, name: str) -> None:
        """Hide a file."""
        if name in self._names:
            del self._names[name]
        elif name in self._memory.list():
            self._memory.remove(name)
        else:
            raise FileMissingError("remove", name, errno.ENOENT)

    def sync_dir(self) -> None:
        """There is nothing to do."""

    def free_bytes(self) -> int:
        """Return how many bytes can still be written."""
        return self._memory.free_bytes()

    def lock(self, name: str) -> None:
        """There is nothing to do: who looks has locked what is below."""

    def unlock(self) -> None:
        """There is nothing to do."""
