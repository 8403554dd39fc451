"""The disk port: the few file operations that durable state is made of, with a real and an in-memory twin.

A `Disk` is a folder. Names are file names inside it; `at(folder)` is the same port one folder down. What is
durable when, and nothing more than that, is what callers may rely on:

- bytes: after `File.sync`, or after the return of `File.write_sync` for the bytes of that call;
- names (create, rename, remove): after `Disk.sync_dir`;
- everything else may survive a crash wholly, partly or not at all.

`RealDisk` is POSIX; `MemoryDisk` keeps what is durable apart from what is merely written, so that `crash`
can lose or tear the difference, and can be told to fail, to be full, or to rot. Both pass the same contract
tests. Every `OSError` leaves here as a `DiskError`: callers tell a full disk (`DiskFullError`) from a
missing file (`FileMissingError`) from everything else, after which a file's content is unknown.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np
import numpy.typing as npt

BytesLike = bytes | bytearray | memoryview | npt.NDArray[np.uint8]
"""What can be written: any contiguous run of bytes. It isn't copied, so it mustn't change until written."""

ByteArray = npt.NDArray[np.uint8]

IOV_MAX = 1_000  # buffers in one pwritev; Linux allows 1,024
SECTOR_BYTES = 512  # `MemoryDisk.crash` tears writes at these, and at any byte when asked to


class DiskError(Exception):
    """A file operation failed; `errno` says how. After a failed write or sync the file's content is unknown."""

    def __init__(self, operation: str, name: str, number: int) -> None:
        super().__init__(f"{operation} {name!r}: {os.strerror(number)}")
        self.operation = operation
        self.name = name
        self.errno = number


class DiskFullError(DiskError):
    """There is no room (or no quota) left."""


class FileMissingError(DiskError):
    """The named file does not exist."""


_KINDS: dict[int | None, type[DiskError]] = {
    errno.ENOSPC: DiskFullError,
    errno.EDQUOT: DiskFullError,
    errno.ENOENT: FileMissingError,
}


def _raise(operation: str, name: str, number: int, cause: OSError | None = None) -> NoReturn:
    raise _KINDS.get(number, DiskError)(operation, name, number) from cause


@contextlib.contextmanager
def _mapped(operation: str, name: str) -> Iterator[None]:
    """Turn an `OSError` inside into the `DiskError` that callers know."""
    try:
        yield
    except OSError as error:
        _raise(operation, name, error.errno or errno.EIO, error)


class File(Protocol):
    """An open file. Positions and lengths are bytes."""

    @property
    def name(self) -> str:
        """The name it was opened by."""
        ...

    def size(self) -> int:
        """Return the file's length."""
        ...

    def write(self, position: int, parts: Sequence[BytesLike]) -> None:
        """Write all of `parts`, one after the other, from `position` on; durable after `sync`."""
        ...

    def write_sync(self, position: int, parts: Sequence[BytesLike]) -> None:
        """Write like `write`, and return only when these bytes are durable."""
        ...

    def sync(self) -> None:
        """Make the content written so far durable (and the length, as far as reading it back needs it)."""
        ...

    def truncate(self, size: int) -> None:
        """Cut the file to `size` bytes, or extend it with zeros."""
        ...

    def read(self, position: int, length: int) -> ByteArray:
        """Read up to `length` bytes; fewer only at the end of the file."""
        ...

    def map(self) -> ByteArray:
        """Return a read-only view of the whole file as it is long now; later writes show in it.

        The view stays valid after `close` and after the file's removal.
        """
        ...

    def close(self) -> None:
        """Give the descriptor back; closing twice is allowed."""
        ...


class Disk(Protocol):
    """A folder of files."""

    def at(self, folder: str) -> Disk:
        """Return the port for a folder inside this one, which is created (durably) when it is missing."""
        ...

    def list(self) -> list[str]:
        """Return the names of the files here, sorted."""
        ...

    def create(self, name: str) -> File:
        """Create a file, or empty an existing one, for reading and writing."""
        ...

    def open(self, name: str) -> File:
        """Open an existing file for reading and writing."""
        ...

    def rename(self, old: str, new: str) -> None:
        """Give a file another name, replacing what had it; atomic, durable after `sync_dir`."""
        ...

    def remove(self, name: str) -> None:
        """Remove a file; durable after `sync_dir`."""
        ...

    def sync_dir(self) -> None:
        """Make creations, renames and removals in this folder durable."""
        ...

    def free_bytes(self) -> int:
        """Return how many bytes can still be written."""
        ...

    def lock(self, name: str) -> None:
        """Take the folder for this process, through a file of that name, until the process ends.

        Raises `DiskError` (EWOULDBLOCK) when another process has it.
        """
        ...

    def unlock(self) -> None:
        """Let go of what `lock` took before the process ends; nothing where nothing was taken."""
        ...


class RealFile:
    """A file of the operating system."""

    def __init__(self, descriptor: int, name: str) -> None:
        self._descriptor = descriptor
        self._name = name

    @property
    def name(self) -> str:
        """The name it was opened by."""
        return self._name

    def size(self) -> int:
        """Return the file's length."""
        with _mapped("stat", self._name):
            return os.fstat(self._descriptor).st_size

    def write(self, position: int, parts: Sequence[BytesLike]) -> None:
        """Write all of `parts` from `position` on."""
        self._write(position, parts, 0)

    def write_sync(self, position: int, parts: Sequence[BytesLike]) -> None:
        """Write `parts` durably.

        RWF_DSYNC makes one system call of the write and its sync, so a thread that does nothing else gives
        the interpreter lock away once instead of twice.
        """
        self._write(position, parts, os.RWF_DSYNC)

    def _write(self, position: int, parts: Sequence[BytesLike], flags: int) -> None:
        if flags and len(parts) > IOV_MAX:
            buffers: Sequence[Any] = parts
            parts = [b"".join(buffers)]  # one sync, not one for each call
        with _mapped("write", self._name):
            for first in range(0, len(parts), IOV_MAX):
                batch: Sequence[Any] = parts[first : first + IOV_MAX]
                total = sum(len(part) for part in batch)
                written = os.pwritev(self._descriptor, batch, position, flags)
                position += written
                while written < total:  # rare: a signal, or the kernel's limit of 2 GiB a call
                    rest = _skip(batch, written)
                    step = os.pwritev(self._descriptor, rest, position, flags)
                    position += step
                    written += step

    def sync(self) -> None:
        """Make the content written so far durable."""
        with _mapped("sync", self._name):
            os.fdatasync(self._descriptor)

    def truncate(self, size: int) -> None:
        """Cut or extend the file."""
        with _mapped("truncate", self._name):
            os.ftruncate(self._descriptor, size)

    def read(self, position: int, length: int) -> ByteArray:
        """Read up to `length` bytes."""
        with _mapped("read", self._name):
            length = max(0, min(length, os.fstat(self._descriptor).st_size - position))
            data = np.empty(length, np.uint8)
            done = 0
            while done < length:
                step = os.preadv(self._descriptor, [data[done:].data], position + done)
                if step == 0:
                    break  # cut by somebody meanwhile
                done += step
            return data[:done]

    def map(self) -> ByteArray:
        """Return a read-only view of the whole file."""
        size = self.size()
        if size == 0:
            return np.empty(0, np.uint8)
        with _mapped("map", self._name):
            return np.frombuffer(mmap.mmap(self._descriptor, size, access=mmap.ACCESS_READ), np.uint8)

    def close(self) -> None:
        """Give the descriptor back."""
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            with _mapped("close", self._name):
                os.close(descriptor)


def _skip(parts: Sequence[Any], count: int) -> list[memoryview]:
    """Return what is left of `parts` without the first `count` bytes."""
    rest: list[memoryview] = []
    for part in parts:
        size = len(part)
        if count >= size:
            count -= size
            continue
        rest.append(memoryview(part)[count:])
        count = 0
    return rest


class RealDisk:
    """A folder of the operating system; created when it is missing."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._lock_descriptor = -1
        with _mapped("create", str(root)):
            missing = [folder for folder in (root, *root.parents) if not folder.exists()]
            root.mkdir(parents=True, exist_ok=True)
            for folder in missing:
                _sync_folder(folder.parent)

    def at(self, folder: str) -> RealDisk:
        """Return the port for a folder inside this one."""
        return RealDisk(self._root / folder)

    def list(self) -> list[str]:
        """Return the names of the files here, sorted."""
        with _mapped("list", str(self._root)):
            return sorted(entry.name for entry in self._root.iterdir() if entry.is_file())

    def create(self, name: str) -> RealFile:
        """Create or empty a file."""
        return self._open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC)

    def open(self, name: str) -> RealFile:
        """Open an existing file."""
        return self._open(name, os.O_RDWR)

    def _open(self, name: str, flags: int) -> RealFile:
        with _mapped("open", name):
            return RealFile(os.open(self._root / name, flags | os.O_CLOEXEC, 0o640), name)

    def rename(self, old: str, new: str) -> None:
        """Give a file another name."""
        with _mapped("rename", old):
            (self._root / old).replace(self._root / new)

    def remove(self, name: str) -> None:
        """Remove a file."""
        with _mapped("remove", name):
            (self._root / name).unlink()

    def sync_dir(self) -> None:
        """Make creations, renames and removals durable."""
        with _mapped("sync", str(self._root)):
            _sync_folder(self._root)

    def free_bytes(self) -> int:
        """Return how many bytes can still be written."""
        with _mapped("stat", str(self._root)):
            status = os.statvfs(self._root)
            return status.f_bavail * status.f_frsize

    def lock(self, name: str) -> None:
        """Take the folder for this process."""
        with _mapped("lock", name):
            descriptor = os.open(self._root / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(descriptor)
                raise
            self._lock_descriptor = descriptor  # closed, and so released, by the process's end

    def unlock(self) -> None:
        """Let go of the folder."""
        if self._lock_descriptor >= 0:
            descriptor, self._lock_descriptor = self._lock_descriptor, -1
            os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _Inode:
    """A file's bytes: as written, as durable, and the changes between the two."""

    def __init__(self) -> None:
        self.data = np.zeros(0, np.uint8)  # what reads see
        self.durable = np.zeros(0, np.uint8)  # what surely survives
        self.pending: list[tuple[int, bytes] | int] = []  # writes (position, bytes) and new lengths, in order

    def apply(self, change: tuple[int, bytes] | int) -> None:
        if isinstance(change, int):
            self.durable = _resized(self.durable, change)
            return
        position, content = change
        if len(self.durable) < position + len(content):
            self.durable = _resized(self.durable, position + len(content))
        self.durable[position : position + len(content)] = np.frombuffer(content, np.uint8)

    def settle(self) -> None:
        for change in self.pending:
            self.apply(change)
        self.pending.clear()


def _overlap(change: tuple[int, bytes], position: int, length: int) -> bool:
    return change[0] < position + length and position < change[0] + len(change[1])


def _resized(data: ByteArray, size: int) -> ByteArray:
    """Return `data` cut or zero-filled to `size`; in a new array, as views of the old one may exist."""
    fresh = np.zeros(size, np.uint8)
    keep = min(size, len(data))
    fresh[:keep] = data[:keep]
    return fresh


class _Memory:
    """What all the folders of one `MemoryDisk` share."""

    def __init__(self, capacity: int | None) -> None:
        self.capacity = capacity
        self.names: dict[str, _Inode] = {}  # what is seen
        self.durable_names: dict[str, _Inode] = {}  # what surely survives
        self.pending: list[tuple[str, str, _Inode | None]] = []  # (folder, path, new inode or None), in order
        self.faults: list[tuple[str, str, int]] = []  # (operation, part of a name, errno), each used once
        self.locks: set[str] = set()
        self.writes = 0  # calls of write and write_sync, for tests that crash at a certain one

    def used(self) -> int:
        return sum(len(inode.data) for inode in {id(i): i for i in self.names.values()}.values())

    def check(self, operation: str, name: str) -> None:
        for index, (wanted, part, number) in enumerate(self.faults):
            if wanted == operation and part in name:
                del self.faults[index]
                _raise(operation, name, number)


class MemoryFile:
    """A file of a `MemoryDisk`."""

    def __init__(self, memory: _Memory, inode: _Inode, name: str) -> None:
        self._memory = memory
        self._inode = inode
        self._name = name

    @property
    def name(self) -> str:
        """The name it was opened by."""
        return self._name

    def size(self) -> int:
        """Return the file's length."""
        return len(self._inode.data)

    def write(self, position: int, parts: Sequence[BytesLike]) -> None:
        """Write all of `parts` from `position` on."""
        self._memory.check("write", self._name)
        content = bytes(parts[0]) if len(parts) == 1 else b"".join(map(bytes, parts))
        self._memory.writes += 1
        inode = self._inode
        end = position + len(content)
        if end > len(inode.data):
            self._grow(end)
        inode.data[position:end] = np.frombuffer(content, np.uint8)
        inode.pending.append((position, content))

    def _grow(self, size: int) -> None:
        capacity = self._memory.capacity
        if capacity is not None and self._memory.used() - len(self._inode.data) + size > capacity:
            _raise("write", self._name, errno.ENOSPC)
        self._inode.data = _resized(self._inode.data, size)

    def write_sync(self, position: int, parts: Sequence[BytesLike]) -> None:
        """Write `parts` durably; earlier writes elsewhere in the file that weren't synced stay so."""
        self._memory.check("sync", self._name)
        self.write(position, parts)
        inode = self._inode
        _, content = written = inode.pending.pop()  # type: ignore[misc]
        # What lies under the new bytes has reached the disk before them, or never will.
        under = [c for c in inode.pending if isinstance(c, int) or _overlap(c, position, len(content))]
        inode.pending = [change for change in inode.pending if change not in under]
        for change in [*under, written]:
            inode.apply(change)

    def sync(self) -> None:
        """Make the content written so far durable."""
        self._memory.check("sync", self._name)
        self._inode.settle()

    def truncate(self, size: int) -> None:
        """Cut or extend the file."""
        if size > len(self._inode.data):
            self._grow(size)
        else:
            self._inode.data = _resized(self._inode.data, size)
        self._inode.pending.append(size)

    def read(self, position: int, length: int) -> ByteArray:
        """Read up to `length` bytes."""
        self._memory.check("read", self._name)
        return self._inode.data[position : position + max(0, length)].copy()

    def map(self) -> ByteArray:
        """Return a read-only view of the whole file."""
        self._memory.check("map", self._name)
        view = self._inode.data[:]
        view.flags.writeable = False
        return view

    def close(self) -> None:
        """Do nothing: there is no descriptor."""


class MemoryDisk:
    """A disk in memory that can crash, fill up, fail and rot.

    `capacity` bounds the bytes of all its files; None means no bound, and can be changed at any time.
    """

    def __init__(self, capacity: int | None = None) -> None:
        self._memory = _Memory(capacity)
        self._folder = ""
        self._lock = ""  # what `lock` took here

    @property
    def capacity(self) -> int | None:
        """How many bytes fit on the disk."""
        return self._memory.capacity

    @capacity.setter
    def capacity(self, value: int | None) -> None:
        self._memory.capacity = value

    @property
    def write_count(self) -> int:
        """How many writes there have been."""
        return self._memory.writes

    def at(self, folder: str) -> MemoryDisk:
        """Return the port for a folder inside this one, on the same memory."""
        inner = MemoryDisk.__new__(MemoryDisk)
        inner._memory = self._memory
        inner._folder = f"{self._folder}{folder}/"
        inner._lock = ""
        return inner

    def list(self) -> list[str]:
        """Return the names of the files here, sorted."""
        skip = len(self._folder)
        inside = (path[skip:] for path in self._memory.names if path.startswith(self._folder))
        return sorted(name for name in inside if "/" not in name)

    def create(self, name: str) -> MemoryFile:
        """Create or empty a file."""
        self._memory.check("create", name)
        path = self._folder + name
        inode = self._memory.names.get(path)
        if inode is None:
            inode = _Inode()
            self._change(path, inode)
        else:
            inode.data = np.zeros(0, np.uint8)
            inode.pending.append(0)
        return MemoryFile(self._memory, inode, name)

    def open(self, name: str) -> MemoryFile:
        """Open an existing file."""
        self._memory.check("open", name)
        return MemoryFile(self._memory, self._inode(name, "open"), name)

    def rename(self, old: str, new: str) -> None:
        """Give a file another name."""
        self._memory.check("rename", old)
        inode = self._inode(old, "rename")
        # One change in the journal: a crash between the two halves would show the file twice or not at all.
        del self._memory.names[self._folder + old]
        self._memory.names[self._folder + new] = inode
        self._memory.pending.append((self._folder, f"{self._folder}{old}\0{self._folder}{new}", inode))

    def remove(self, name: str) -> None:
        """Remove a file."""
        self._memory.check("remove", name)
        self._inode(name, "remove")
        self._change(self._folder + name, None)

    def sync_dir(self) -> None:
        """Make creations, renames and removals in this folder durable."""
        self._memory.check("sync_dir", self._folder)
        memory = self._memory
        for folder, path, inode in memory.pending:
            if folder == self._folder:
                self._settle(path, inode)
        memory.pending = [change for change in memory.pending if change[0] != self._folder]

    def free_bytes(self) -> int:
        """Return how many bytes can still be written."""
        capacity = self._memory.capacity
        return 1 << 60 if capacity is None else max(0, capacity - self._memory.used())

    def lock(self, name: str) -> None:
        """Take the folder until the next crash."""
        if self._folder + name in self._memory.locks:
            _raise("lock", name, errno.EWOULDBLOCK)
        self._memory.locks.add(self._folder + name)
        self._lock = self._folder + name

    def unlock(self) -> None:
        """Let go of the folder."""
        self._memory.locks.discard(self._lock)

    def fail_next(self, operation: str, *, name: str = "", number: int = errno.EIO) -> None:
        """Make the next such operation on a file whose name contains `name` fail.

        Operations: create, open, write, sync, read, map, rename, remove, sync_dir.
        """
        self._memory.faults.append((operation, name, number))

    def flip_bit(self, name: str, position: int, bit: int = 0) -> None:
        """Let one stored bit rot."""
        inode = self._inode(name, "open")
        inode.settle()
        inode.durable[position] ^= 1 << bit
        inode.data[position] ^= 1 << bit

    def overwrite(self, name: str, position: int, content: bytes) -> None:
        """Replace stored bytes behind everybody's back."""
        inode = self._inode(name, "open")
        inode.settle()
        inode.apply((position, content))
        inode.data[position : position + len(content)] = np.frombuffer(content, np.uint8)

    def cut(self, name: str, size: int) -> None:
        """Shorten a stored file behind everybody's back."""
        inode = self._inode(name, "open")
        inode.settle()
        inode.data = _resized(inode.data, size)
        inode.durable = _resized(inode.durable, size)

    def crash(self, rng: random.Random, *, torn: bool = True, lose_all: bool = False) -> None:
        """Lose power: what was durable survives, of the rest any part may.

        Unsynced writes survive whole or not at all, each by itself and in no order, or with `torn` also in
        part (any set of their sectors, or up to any byte). Names survive up to some point of their history.
        With `lose_all` nothing survives but what was durable. Open files must not be used any more.
        """
        memory = self._memory
        memory.locks.clear()
        memory.faults.clear()
        keep = 0 if lose_all else rng.randint(0, len(memory.pending))
        for _, path, inode in memory.pending[:keep]:
            self._settle(path, inode)
        memory.pending.clear()
        memory.names = dict(memory.durable_names)
        for inode in {id(i): i for i in memory.names.values()}.values():
            for change in [] if lose_all else inode.pending:
                self._survive(inode, change, rng, torn)
            inode.pending.clear()
            inode.data = inode.durable.copy()

    @staticmethod
    def _survive(inode: _Inode, change: tuple[int, bytes] | int, rng: random.Random, torn: bool) -> None:
        fate = rng.randrange(4 if torn else 2)
        if fate == 0:
            return
        if fate == 1 or isinstance(change, int):
            inode.apply(change)
            return
        position, content = change
        if fate == 2:
            inode.apply((position, content[: rng.randint(0, len(content))]))
            return
        first = 0
        while first < len(content):
            last = min(len(content), first + SECTOR_BYTES - (position + first) % SECTOR_BYTES)
            if rng.random() < 0.5:
                inode.apply((position + first, content[first:last]))
            first = last

    def _inode(self, name: str, operation: str) -> _Inode:
        inode = self._memory.names.get(self._folder + name)
        if inode is None:
            _raise(operation, name, errno.ENOENT)
        return inode

    def _change(self, path: str, inode: _Inode | None) -> None:
        if inode is None:
            del self._memory.names[path]
        else:
            self._memory.names[path] = inode
        self._memory.pending.append((self._folder, path, inode))

    def _settle(self, path: str, inode: _Inode | None) -> None:
        names = self._memory.durable_names
        if "\0" in path:
            old, path = path.split("\0")
            names.pop(old, None)
        if inode is None:
            names.pop(path, None)
        else:
            names[path] = inode
