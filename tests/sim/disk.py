"""A process's disk: a `MemoryDisk` that can end the process at any write, and whose syncs take time.

The memory disk knows what is durable. This adds who may write: every change passes a `Gate`, which counts it, ends
the process at the one that was chosen, and lets nothing through from a dead process. A write-ahead log's group is
written at once and synced later (`SimDisk.deferring`): a crash between loses or tears it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tallymark_runtime.disk import BytesLike, MemoryDisk, MemoryFile

from .loop import Crash

ByteArray = npt.NDArray[np.uint8]


class Gate:
    """Between a process life and its disk.

    Attributes:
        is_open: whether the process lives.
        changes_left: it dies at the change after these; None: it doesn't.
        on_crash: called when it does.
    """

    def __init__(self) -> None:
        self.is_open = True
        self.changes_left: int | None = None
        self.on_crash: Any = None
        self.deferred: list[tuple[MemoryFile, int, bytes]] | None = None

    def pass_change(self) -> None:
        """Let a change through, or end the process."""
        if not self.is_open:
            raise Crash
        if self.changes_left is not None:
            self.changes_left -= 1
            if self.changes_left < 0:
                self.changes_left = None
                self.on_crash()
                raise Crash


class SimFile:
    """A file of a `SimDisk`."""

    def __init__(self, inner: MemoryFile, gate: Gate) -> None:
        self._inner = inner
        self._gate = gate

    @property
    def name(self) -> str:
        return self._inner.name

    def size(self) -> int:
        return self._inner.size()

    def write(self, position: int, parts: Sequence[BytesLike]) -> None:
        self._gate.pass_change()
        self._inner.write(position, parts)

    def write_sync(self, position: int, parts: Sequence[BytesLike]) -> None:
        self._gate.pass_change()
        if self._gate.deferred is None:
            self._inner.write_sync(position, parts)
            return
        content = b"".join(bytes(part) for part in parts)
        self._inner.write(position, [content])
        self._gate.deferred.append((self._inner, position, content))

    def sync(self) -> None:
        self._gate.pass_change()
        self._inner.sync()

    def truncate(self, size: int) -> None:
        self._gate.pass_change()
        self._inner.truncate(size)

    def read(self, position: int, length: int) -> ByteArray:
        return self._inner.read(position, length)

    def map(self) -> ByteArray:
        return self._inner.map()

    def close(self) -> None:
        self._inner.close()


class SimDisk:
    """The disk port of one process life; the memory disk behind it outlives it."""

    def __init__(self, inner: MemoryDisk, gate: Gate) -> None:
        self._inner = inner
        self._gate = gate

    def at(self, folder: str) -> SimDisk:
        return SimDisk(self._inner.at(folder), self._gate)

    def list(self) -> list[str]:
        return self._inner.list()

    def create(self, name: str) -> SimFile:
        self._gate.pass_change()
        return SimFile(self._inner.create(name), self._gate)

    def open(self, name: str) -> SimFile:
        return SimFile(self._inner.open(name), self._gate)

    def rename(self, old: str, new: str) -> None:
        self._gate.pass_change()
        self._inner.rename(old, new)

    def remove(self, name: str) -> None:
        self._gate.pass_change()
        self._inner.remove(name)

    def sync_dir(self) -> None:
        self._gate.pass_change()
        self._inner.sync_dir()

    def free_bytes(self) -> int:
        return self._inner.free_bytes()

    def lock(self, name: str) -> None:
        self._inner.lock(name)

    def unlock(self) -> None:
        self._inner.unlock()


class SimWalThreads:
    """What `WalThreads` is, on virtual time: a group is written when its turn comes, and durable a while later.

    Args:
        wal: the log.
        on_synced: called with each group once it is durable.
        on_failed: called once when the log has failed.
        process: whose threads they are: `later(delay_ns, call, *args)`, `gate`, `sync_delay_ns()`,
            `durable(group, recorded_end)`.
    """

    def __init__(self, wal: Any, *, on_synced: Any, on_failed: Any, process: Any) -> None:
        self._wal = wal
        wal.on_failed = on_failed
        self._on_synced = on_synced
        self._process = process
        self._busy = False
        self._called = False
        self._closed = False

    def start(self) -> None:
        self._wal.on_prepare_needed = self._prepare_soon
        self._prepare_soon()
        self.wake()

    def wake(self) -> None:
        if not self._busy and not self._closed:
            self._busy = True
            self._process.later(20_000, self._begin)
        self._called = True

    def close(self) -> None:
        """Sync what was accepted, here and now."""
        self._closed = True
        self._wal.on_prepare_needed = None
        self._finish_writes()
        try:
            for _ in range(2):
                start = self._wal.synced_end
                for group in self._wal.sync_all():
                    self._told(group, start)
                if not self._wal.write_marker():
                    break
        except Crash:
            raise
        except BaseException as error:
            self._wal.fail(error)

    def _told(self, group: Any, recorded_end: Any) -> None:
        self._process.durable(group, recorded_end)
        self._on_synced(group)

    def _prepare_soon(self) -> None:
        self._process.later(100_000, self._prepare)

    def _prepare(self) -> None:
        try:
            self._wal.prepare_ahead()
        except Crash:
            pass
        except BaseException as error:
            self._wal.fail(error)

    _group: Any = None
    _writes: Any = ()
    _recorded_end: Any = None

    def _begin(self) -> None:
        self._called = False
        if self._closed:
            return
        self._recorded_end = self._wal.synced_end
        try:
            group = self._wal.take_group()
            if group is None:
                self._busy = False
                return
            gate = self._process.gate
            gate.deferred = []
            try:
                self._wal.write_group(group)
            finally:
                writes, gate.deferred = gate.deferred, None
        except Crash:
            return
        except BaseException as error:
            self._wal.fail(error)
            return
        self._group, self._writes = group, writes
        self._process.later(self._process.sync_delay_ns(), self._end)

    def _end(self) -> None:
        if self._closed:
            return
        try:
            self._finish_writes()
        except Crash:
            return
        except BaseException as error:
            self._wal.fail(error)
            return
        self._begin()

    def _finish_writes(self) -> None:
        group, self._group = self._group, None
        if group is None:
            return
        for file, position, content in self._writes:
            file.write_sync(position, [content])
        self._writes = ()
        self._wal.synced(group)
        self._told(group, self._recorded_end)
