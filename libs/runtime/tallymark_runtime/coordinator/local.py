"""Coordinators that live in this process: `MemoryCoordinator`, and `FileCoordinator` that keeps a synced file.

Owns the driver around the pure state: mutations queue up, are made together on a clone of the state, written, and
only then answered and shown to readers and watchers. What arrives while a write is under way goes into the next
one. Leases run on the clock's monotonic time and end with the process.

The file is written whole, beside the old one, synced and renamed over it; then the folder is synced. So it is
always the state of one moment, and anything else is damage, which is an error and never an empty state::

    0   8s   magic "TMCOORD1"
    8   u32  CRC-32C of [12, end)
    12  u32  length of the image
    16  ...  the image, MessagePack

A second, empty file records that there has been a state, so that a lost one is noticed. The folder is locked while
it is open: two processes with one state would both answer for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import struct
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Final, Generic, TypeVar

import google_crc32c

from tallymark_protocol.codec import decode, encode
from tallymark_protocol.errors import (
    ErrorCode,
    RemoteProtocolError,
    ServerError,
    TallymarkError,
    UnavailableError,
)
from tallymark_runtime.clock import Clock
from tallymark_runtime.coordinator.port import (
    Compare,
    Delete,
    KeyValue,
    Operation,
    Put,
    RangeResult,
    TxnResult,
    WatchEvent,
)
from tallymark_runtime.coordinator.state import CoordinatorState, Image, Leases

T = TypeVar("T")

_QUEUE_MAX: Final = 10_000  # mutations waiting for the write before them


class _Mutation(Generic[T]):
    """A mutation in the queue."""

    __slots__ = ("apply", "future", "result")

    def __init__(self, apply: Callable[[CoordinatorState], T], future: asyncio.Future[T]) -> None:
        self.apply = apply
        self.future = future
        self.result: T | None = None  # set by the writer once applied, handed out once written


class MemoryCoordinator:
    """A coordinator that forgets everything with its process. Use it on one event loop.

    Args:
        clock: what leases run on.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._start(CoordinatorState())

    def _start(self, state: CoordinatorState) -> None:
        self._state = state  # what readers see: everything in it is written
        self._leases = Leases(state.incarnation)
        self._queue: list[_Mutation[TxnResult]] = []
        self._writer: asyncio.Task[None] | None = None  # under way while the queue is not empty
        self._changed = asyncio.Event()  # set and replaced whenever the state changes
        self._timer: asyncio.TimerHandle | None = None
        self._expiring: set[asyncio.Task[None]] = set()  # deletions of what expired leases held
        self._fault: TallymarkError | None = None  # why nothing is possible any more

    # ------------------------------------------------------------ reading

    @property
    def revision(self) -> int:
        """The revision of the last change that is written."""
        return self._state.revision

    async def get(self, key: bytes) -> KeyValue | None:
        """Read one key; see the port."""
        self._check_usable()
        return self._state.get(key)

    async def range(self, prefix: bytes) -> RangeResult:
        """Read a prefix; see the port."""
        self._check_usable()
        return self._state.range(prefix)

    async def watch(self, prefix: bytes, from_revision: int = 0) -> AsyncIterator[list[WatchEvent]]:
        """Iterate over changes; see the port. Events are read from the history: a slow reader costs nothing."""
        self._check_usable()
        following = from_revision if from_revision > 0 else self._state.revision + 1
        while True:
            events, following = await self.poll(prefix, following, None)
            if events:
                yield events

    async def poll(
        self, prefix: bytes, from_revision: int, timeout_s: float | None
    ) -> tuple[list[WatchEvent], int]:
        """Wait for changes of `prefix` from `from_revision` on, and return them with the revision to go on from.

        The list is empty where none came in time. Raises CompactedError.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while True:
                    self._check_usable()
                    state = self._state
                    if state.revision >= from_revision:
                        events = state.events(prefix, from_revision)
                        from_revision = state.revision + 1
                        if events:
                            return events, from_revision
                    await self._changed.wait()
        return [], from_revision

    # ------------------------------------------------------------ mutations

    async def put(self, key: bytes, value: bytes, *, lease: int = 0) -> int:
        """Set a key; see the port."""
        return (await self.txn([], [Put(key, value, lease)])).revision

    async def delete(self, key: bytes) -> bool:
        """Delete a key; see the port."""
        return bool((await self.txn([], [Delete(key)])).results[0])

    async def txn(
        self, compares: Sequence[Compare], success: Sequence[Operation], failure: Sequence[Operation] = ()
    ) -> TxnResult:
        """Execute a transaction; see the port."""
        compares, success, failure = list(compares), list(success), list(failure)
        leases = self._leases
        return await self._mutate(lambda state: state.txn(compares, success, failure, leases=leases))

    async def _mutate(self, apply: Callable[[CoordinatorState], TxnResult]) -> TxnResult:
        self._check_usable()
        if len(self._queue) >= _QUEUE_MAX:
            raise UnavailableError("too many changes wait to be written", code=ErrorCode.OVERLOADED)
        loop = asyncio.get_running_loop()
        future: asyncio.Future[TxnResult] = loop.create_future()
        self._queue.append(_Mutation(apply, future))
        if self._writer is None:
            self._writer = loop.create_task(self._write_queue())
        # Cancelling the caller cancels the future; the mutation goes on all the same.
        return await future

    async def _write_queue(self) -> None:
        group: list[_Mutation[TxnResult]] = []
        try:
            while self._queue and self._fault is None:
                group, self._queue = self._queue, []
                work = self._state.clone()
                for mutation in group:
                    try:
                        mutation.result = mutation.apply(work)
                    except TallymarkError as error:
                        # Refused before it changed anything, but perhaps because of a change in this group.
                        _fail(mutation.future, error)
                if work.revision != self._state.revision:
                    try:
                        await self._persist(work.image())
                    except TallymarkError as error:
                        for mutation in group:
                            _fail(mutation.future, error)
                        if not error.retriable:
                            self._fault = error
                        continue
                    self._state = work
                    self._wake()
                for mutation in group:
                    if not mutation.future.done():
                        assert mutation.result is not None, "applied above"
                        mutation.future.set_result(mutation.result)
        except BaseException as error:
            self._fault = ServerError(f"the coordinator failed: {error}")
            raise
        finally:
            self._writer = None
            if self._fault is not None:
                for mutation in (*group, *self._queue):
                    _fail(mutation.future, self._fault)
                self._queue = []
                self._wake()

    async def _persist(self, image: Image) -> None:
        """Make a state durable. A retriable error means that nothing of it is; any other ends the coordinator."""

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _check_usable(self) -> None:
        if self._fault is not None:
            fault = self._fault
            raise type(fault)(fault.message, code=fault.code, retriable=fault.retriable)

    # ------------------------------------------------------------ leases

    async def lease_grant(self, ttl_s: float) -> int:
        """Make a lease; see the port."""
        self._check_usable()
        lease = self._leases.grant(int(ttl_s * 1e9), self._clock.monotonic_ns())
        self._arm()
        return lease

    async def lease_keepalive(self, lease: int) -> float:
        """Renew a lease; see the port."""
        self._check_usable()
        return self._leases.keepalive(lease, self._clock.monotonic_ns()) / 1e9

    async def lease_revoke(self, lease: int) -> None:
        """End a lease; see the port."""
        self._check_usable()
        self._leases.remove(lease)
        await self._delete_bound([lease])

    async def expire(self) -> None:
        """End the leases that have run out. A timer does that; call it where the clock is moved by hand."""
        expired = self._leases.take_expired(self._clock.monotonic_ns())
        if expired:
            await self._delete_bound(expired)

    async def _delete_bound(self, leases: list[int]) -> None:
        def apply(state: CoordinatorState) -> TxnResult:
            deletes = [Delete(key) for lease in leases for key in state.bound_to(lease)]
            return state.txn([], deletes, [], leases=None, unbounded=True)

        while True:
            try:
                await self._mutate(apply)
            except UnavailableError as error:
                # The leases are gone already, so their keys must follow, as soon as there is room to write.
                if not error.retriable or self._fault is not None:
                    raise
                await asyncio.sleep(_RETRY_S)
            else:
                return

    def _arm(self) -> None:
        """Set the timer for the lease that runs out first; it looks again, as leases may have been renewed."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        deadline_ns = self._leases.next_deadline()
        if deadline_ns is not None and self._fault is None:
            delay_s = max(0.0, (deadline_ns - self._clock.monotonic_ns()) / 1e9)
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        task = asyncio.get_running_loop().create_task(self.expire())
        self._expiring.add(task)
        task.add_done_callback(self._expired)

    def _expired(self, task: asyncio.Task[None]) -> None:
        self._expiring.discard(task)
        if not task.cancelled():
            task.exception()  # the fault that it met is everyone's, and kept
        self._arm()

    # ------------------------------------------------------------ closing

    async def close(self) -> None:
        """Finish the writes under way, then refuse everything; see the port."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._writer is not None:
            await asyncio.shield(self._writer)
        if self._fault is None:
            self._fault = UnavailableError(
                "the coordinator is closed", code=ErrorCode.CLOSED, retriable=False
            )
        self._wake()


_RETRY_S: Final = 1.0


def _fail(future: asyncio.Future[TxnResult], error: TallymarkError) -> None:
    if not future.done():
        future.set_exception(error)


class DamagedStateError(ServerError):
    """A coordinator's file isn't what was written. It must be restored, or the cluster recovered, by hand."""


class FileCoordinator(MemoryCoordinator):
    """A coordinator whose state is in a file: every change is on disk before it is answered or seen.

    Args:
        folder: where the state lives; made if it doesn't exist. One coordinator at a time.
        clock: what leases run on.

    Raises:
        DamagedStateError: the file isn't what was written.
        UnavailableError: someone has the folder open already.
        OSError: the folder can't be read or written.
    """

    def __init__(self, folder: Path, clock: Clock) -> None:
        super().__init__(clock)
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._lock = os.open(folder / _LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UnavailableError(f"another process has {folder} open", retriable=False) from None
            image = _load(folder)
            state = CoordinatorState() if image is None else CoordinatorState.restart(image)
            # The new incarnation is on disk before a lease is granted under it.
            _store(folder, state.image())
            _make_marker(folder)
        except BaseException:
            os.close(self._lock)
            raise
        self._start(state)

    async def _persist(self, image: Image) -> None:
        try:
            await asyncio.get_running_loop().run_in_executor(None, _store, self._folder, image)
        except _NotStoredError as error:
            raise UnavailableError(
                f"the coordinator's state can't be written: {error}", code=ErrorCode.DISK_FULL
            ) from error
        except OSError as error:
            raise ServerError(f"the coordinator's state may or may not be on disk: {error}") from error

    async def close(self) -> None:
        """Finish the writes under way, then refuse everything and let go of the folder; see the port."""
        await super().close()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


_MAGIC: Final = b"TMCOORD1"
_HEADER: Final = struct.Struct("<8sII")
_STATE_NAME: Final = "coordinator.state"
_NEW_NAME: Final = "coordinator.state.new"
_MARKER_NAME: Final = "coordinator.created"
_LOCK_NAME: Final = "coordinator.lock"


class _NotStoredError(Exception):
    """There is no room; the state on disk is the one before."""


def read_image(folder: Path) -> Image | None:
    """The state in a folder that no coordinator has open, as it is: nothing is changed. None where there is none.

    Raises:
        DamagedStateError: the file isn't what was written.
        UnavailableError: someone has the folder open.
        OSError: the folder can't be read.
    """
    if not (folder / _LOCK_NAME).exists():
        return _load(folder)
    lock = os.open(folder / _LOCK_NAME, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return _load(folder)
    except BlockingIOError:
        raise UnavailableError(f"another process has {folder} open", retriable=False) from None
    finally:
        os.close(lock)


def write_image(folder: Path, image: Image) -> None:
    """Found a coordinator's state in a folder that has none, durably: the next one that is opened there goes on from it.

    Raises:
        UnavailableError: there is one already.
        OSError: the folder can't be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / _STATE_NAME).exists() or (folder / _MARKER_NAME).exists():
        raise UnavailableError(f"{folder} holds a coordinator's state already", retriable=False)
    _store(folder, image)
    _make_marker(folder)


def _store(folder: Path, image: Image) -> None:
    """Write an image durably. OSError leaves open which of the two states is on disk."""
    body = encode(image)
    length = len(body).to_bytes(4, "little")
    crc = google_crc32c.extend(google_crc32c.value(length), body)
    new = folder / _NEW_NAME
    try:
        # A new file each time: nothing is retried on one whose write or sync has failed.
        new.unlink(missing_ok=True)
        _write_file(new, _HEADER.pack(_MAGIC, crc, len(body)) + body)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _NotStoredError(str(error)) from error
        raise
    new.rename(folder / _STATE_NAME)
    _sync_folder(folder)


def _write_file(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _make_marker(folder: Path) -> None:
    marker = folder / _MARKER_NAME
    if not marker.exists():
        _write_file(marker, b"")
        _sync_folder(folder)


def _load(folder: Path) -> Image | None:
    """Read the state; None where there has never been one."""
    path = folder / _STATE_NAME
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        if (folder / _MARKER_NAME).exists():
            raise DamagedStateError(
                f"{path} is missing, though there has been a coordinator in this folder"
            ) from None
        return None
    if len(data) < _HEADER.size:
        raise DamagedStateError(f"{path} is damaged: {len(data)} bytes are too few for its header")
    magic, crc, length = _HEADER.unpack_from(data)
    if magic != _MAGIC:
        raise DamagedStateError(f"{path} is damaged: it doesn't begin as a coordinator's state does")
    if length != len(data) - _HEADER.size:
        raise DamagedStateError(
            f"{path} is damaged: its header announces {length} bytes, {len(data) - _HEADER.size} follow"
        )
    if google_crc32c.value(data[_HEADER.size - 4 :]) != crc:
        raise DamagedStateError(f"{path} is damaged: its checksum is wrong")
    try:
        return decode(Image, data[_HEADER.size :])
    except RemoteProtocolError as error:
        raise DamagedStateError(f"{path} can't be read by this version: {error.message}") from error
