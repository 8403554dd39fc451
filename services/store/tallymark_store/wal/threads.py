"""The threads of a log: one that writes and syncs groups, one that prepares segments.

The syncing thread takes whatever has arrived while the last sync ran, so the busier the log the larger the
groups. It is woken by `wake`, which costs next to nothing while it is busy anyway. Its callbacks run in it:
`on_synced(group)` for every group in order, `on_failed(error)` once, after which the log takes nothing more
and the process is to end. Both would usually go through `loop.call_soon_threadsafe`.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from tallymark_runtime.clock import Clock, RealClock
from tallymark_store.wal.log import Wal
from tallymark_store.wal.writer import Group

JOIN_SECONDS_MAX = 30.0  # for a last sync on a slow disk


class WalThreads:
    """Runs a `Wal`; see the module's docstring. `start` it, `wake` it after appends, `close` it."""

    def __init__(
        self,
        wal: Wal,
        *,
        on_synced: Callable[[Group], None],
        on_failed: Callable[[BaseException], None],
        clock: Clock | None = None,  # what syncs are timed by
    ) -> None:
        self._wal = wal
        self._clock: Clock = RealClock() if clock is None else clock
        wal.on_failed = on_failed
        self._on_synced = on_synced
        # True: there may be work. False: end. At most one True waits in each, so they are bounded.
        self._sync_calls: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._prepare_calls: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._sync_called = False
        self._prepare_called = False
        self._threads = [
            threading.Thread(target=self._run_sync, name="wal-sync", daemon=True),
            threading.Thread(target=self._run_prepare, name="wal-prepare", daemon=True),
        ]

    def start(self) -> None:
        """Start the threads."""
        self._wal.on_prepare_needed = self._wake_prepare
        for thread in self._threads:
            thread.start()
        self._wake_prepare()
        self.wake()

    def wake(self) -> None:
        """Say that something was appended, or a marker queued. Call it once after a row of appends."""
        if not self._sync_called:
            self._sync_called = True
            self._sync_calls.put(True)

    def close(self) -> None:
        """Sync what was accepted, write a marker, end the threads. The log stays open for reading."""
        self._wal.on_prepare_needed = None
        self._sync_calls.put(False)
        self._prepare_calls.put(False)
        for thread in self._threads:
            if thread.ident is not None:  # it was started
                thread.join(JOIN_SECONDS_MAX)

    def _wake_prepare(self) -> None:
        if not self._prepare_called:
            self._prepare_called = True
            self._prepare_calls.put(True)

    def _run_sync(self) -> None:
        try:
            while self._sync_calls.get():
                # Cleared before looking: an append after the look finds it cleared and calls again.
                self._sync_called = False
                self._sync()
            self._sync()
            if self._wal.write_marker():
                self._sync()
        except BaseException as error:  # whatever it is, nobody would sync any more
            self._wal.fail(error)  # tells nobody if this only is the echo of an earlier failure

    def _sync(self) -> None:
        while (group := self._wal.take_group()) is not None:
            began_ns = self._clock.monotonic_ns()
            self._wal.write_group(group)
            self._wal.sync_ns.observe(self._clock.monotonic_ns() - began_ns)
            self._wal.synced_bytes += group.size
            self._wal.synced(group)
            self._on_synced(group)

    def _run_prepare(self) -> None:
        try:
            while self._prepare_calls.get():
                self._prepare_called = False
                self._wal.prepare_ahead()
        except BaseException as error:  # no room is no error; this is one
            self._wal.fail(error)
