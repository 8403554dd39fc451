"""Folding: the slices of the loop's time in which committed records get into the cells.

Owns the backlog (what was appended here and is not folded yet) and back-pressure by it, and the judge's way to the
log's end when a leadership begins. A slice stays short, so that reads, acknowledgements and lease renewals come in
between; what is left waits for the next turn of the loop.

Small records are folded in runs (`runs`), so there is a moment between their commit and their fold.

Records that this process has appended as leader come from the partition's queue; all others are read from the log
when their turn comes, so that memory stays bounded however far behind a copy is.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from functools import partial
from typing import Any, TypeVar

import numpy as np

from tallymark_protocol.errors import ErrorCode, UnavailableError
from tallymark_protocol.payload import COLUMNS
from tallymark_runtime.clock import Clock
from tallymark_store.holding import HOLDS_MAX
from tallymark_store.partition import Partition, joined_digest
from tallymark_store.prepared import Bytes, Ints
from tallymark_store.runs import RUN_BODY_BYTES_MAX, RUN_BYTES_MAX, RUN_RECORDS_MAX
from tallymark_store.wal import DamagedError, RecordKind, RecordMeta, Wal

FOLD_SLICE_NS = 15_000_000  # of the loop's time at once
OTHERS_SLICE_NS = 2_000_000  # likewise, where somebody waits for what the slice has found before
CATCH_UP_NS = 2_000_000  # likewise, for a read that would else have to wait
FOLD_DELAY_S = 0.1  # what is committed meanwhile is folded together
FOLD_EVENTS = 65_536  # so many are not waited with
BEHIND_EVENTS = 16_384  # nor so many of one partition: a read folds them in a moment
BACKLOG_HIGH_BYTES = 192 * 1024 * 1024  # appended and not folded: above it, nothing more is read
BACKLOG_LOW_BYTES = 96 * 1024 * 1024
_EVENTS = int(RecordKind.EVENTS)

T = TypeVar("T")


class Folding:
    """Folds for all partitions of a process.

    Args:
        wal: where records are read from.
        partitions: by number; looked at again in each slice.
        clock: measures slices.
        pause_reading: called with True when the backlog is too large, with False when it has shrunk.
        on_damage: called when a record that is to be folded, or judged, cannot be read.
        on_failed: called when the fold itself fails: totals that lack a record must not be told to anybody.
        on_folded: called with a partition after each of its records that was folded.
        is_awaited: whether somebody waits for what the fold of a partition finds: it comes before the others.
        aside: runs what looks at held totals, HOLDS_MAX at once, without waiting for anything else.

    Attributes:
        events_folded: since the start; checkpoints are due by it.
        backlog_bytes: of payloads appended here and not folded.
    """

    def __init__(
        self,
        wal: Wal,
        partitions: dict[int, Partition],
        clock: Clock,
        *,
        pause_reading: Callable[[bool], None],
        on_damage: Callable[[Partition, DamagedError], None],
        on_failed: Callable[[BaseException], None],
        on_folded: Callable[[Partition], None] = lambda _: None,
        is_awaited: Callable[[Partition], bool] = lambda _: False,
        aside: Callable[..., Awaitable[Any]] = asyncio.to_thread,
    ) -> None:
        self.events_folded = 0
        self.backlog_bytes = 0
        self._wal = wal
        self._partitions = partitions
        self._clock = clock
        self._pause_reading = pause_reading
        self._on_damage = on_damage
        self._on_failed = on_failed
        self._on_folded = on_folded
        self._is_awaited = is_awaited
        self._aside = aside
        self._slots = asyncio.Semaphore(HOLDS_MAX)
        self._loop = asyncio.get_running_loop()
        self._due = False
        self._timer: asyncio.TimerHandle | None = None  # of the next slice
        self._awaited_due = False
        self._asked: set[int] = set()  # numbers of partitions to be folded with what is waited for
        self._unfolded = 0  # events committed since the last slice, but for those that were waited for
        self._catch_up_until_ns = 0  # of this turn of the loop; 0: no read has had to catch up in it yet
        self._closed = False
        self._paused = False
        self._columns: Ints = np.zeros(COLUMNS, dtype=np.int64)
        # Partitions whose judge is on its way to the log's end, with what is to be called there.
        self._promoting: dict[int, Callable[[], None]] = {}

    # ------------------------------------------------------------ slices

    def soon(self) -> None:
        """Fold what is committed, beginning in the next turn of the loop."""
        if not self._due and not self._closed:
            self._due = True
            self._loop.call_soon(self._slice)

    def awaited_soon(self, number: int | None = None) -> None:
        """Fold what is committed and waited for, likewise, and that partition; the rest at its time."""
        if number is not None:
            self._asked.add(number)
        if not self._awaited_due and not self._closed:
            self._awaited_due = True
            self._loop.call_soon(self._awaited_slice)

    def later(self, events: int, *, behind: int = 0, is_awaited: bool = False) -> None:
        """So many events more were committed: fold them in a moment, together with what is committed by then.

        `behind` is how many offsets of their partition are not folded.

        That costs less, and mostly nobody waits for it: a read folds what it needs by itself. Whoever waits for alerts
        can't know that there is one, so then it is folded in the next turn of the loop; but nothing else with it, as the
        others would cost more than without anybody waiting.
        """
        if self._closed:
            return
        if is_awaited:
            self.awaited_soon()
        else:
            self._unfolded += events
            if self._unfolded >= FOLD_EVENTS or behind >= BEHIND_EVENTS:
                self.soon()
        if self._timer is None and not self._due:
            self._timer = self._loop.call_later(FOLD_DELAY_S, self._slice)

    def _slice(self) -> None:
        self._due = False
        self._unfolded = 0
        self._cancel_timer()
        if self._closed:
            return
        deadline = self._clock.monotonic_ns() + FOLD_SLICE_NS
        # Who is about to lead comes first: its clients wait.
        behind = bool(self._promoting) and self._promote(deadline)
        waiting = self._behind()
        awaited = self._awaited_of(waiting)
        for partition in awaited:
            behind = self._fold_until(partition, deadline) or behind
        if awaited:
            waiting = [partition for partition in waiting if partition not in awaited]
            # Those who wait are told in the next turn of the loop; however much there is for them, the others go on, too.
            deadline = self._clock.monotonic_ns() + OTHERS_SLICE_NS
        for partition in waiting:
            behind = self._fold_until(partition, deadline) or behind
        if behind:
            self.soon()
        self._check_backlog()

    def _awaited_slice(self) -> None:
        self._awaited_due = False
        if self._closed or self._due:
            return  # a slice of all of them, which begins with these, comes in this turn or the next
        deadline = self._clock.monotonic_ns() + FOLD_SLICE_NS
        behind = False
        for partition in self._awaited_of(self._behind()):
            if self._fold_until(partition, deadline):
                behind = True
                self._asked.add(partition.partition)
        if behind:
            self.awaited_soon()
        self._check_backlog()

    def _awaited_of(self, partitions: list[Partition]) -> list[Partition]:
        """Those that somebody waits for, or has asked for."""
        asked, self._asked = self._asked, set()
        return [p for p in partitions if p.partition in asked or self._is_awaited(p)]

    def _behind(self) -> list[Partition]:
        return [p for p in self._partitions.values() if p.error is None and p.fold_behind]

    def _fold_until(self, partition: Partition, deadline: int) -> bool:
        """Fold what is committed, for as long as there is time; whether something is left that can be folded."""
        while partition.fold_behind:
            if self._clock.monotonic_ns() >= deadline:
                return True
            if not self.fold_some(partition):
                return False
        return False

    def _check_backlog(self) -> None:
        if self.backlog_bytes > BACKLOG_HIGH_BYTES and not self._paused:
            self._paused = True
            self._pause_reading(True)
        elif self._paused and self.backlog_bytes < BACKLOG_LOW_BYTES:
            self._paused = False
            self._pause_reading(False)

    def fold_some(self, partition: Partition) -> bool:
        """Fold the next committed record, or those that make a run with it; False where it is damaged."""
        try:
            if not partition.folds_from_log:
                events, size = partition.fold_steps()
                self.backlog_bytes -= size
            else:
                events, _ = partition.apply_logged_run(
                    read_run(self._wal, partition, partition.high_watermark), self._columns
                )
        except DamagedError as error:
            self._on_damage(partition, error)
            return False
        except Exception as error:
            self._on_failed(error)
            raise
        self.events_folded += events
        self._on_folded(partition)
        return True

    def catch_up(self, partition: Partition) -> bool:
        """Fold up to the high watermark, if that is done in a moment; whether it is.

        All reads of one turn of the loop share that moment: many may come in it.
        """
        if partition.applied >= partition.high_watermark:
            return True
        if not self._catch_up_until_ns:
            self._catch_up_until_ns = self._clock.monotonic_ns() + CATCH_UP_NS
            self._loop.call_soon(self._end_catch_up)
        while partition.applied < partition.high_watermark:
            if self._clock.monotonic_ns() > self._catch_up_until_ns or partition.fold.held:
                return False
            if not self.fold_some(partition):
                return False
        return True

    def _end_catch_up(self) -> None:
        self._catch_up_until_ns = 0

    async def wait_applied(self, partition: Partition) -> None:
        """Wait until the fold has reached the high watermark as it is now.

        Raises:
            DamagedError: a record on the way there cannot be read.
            UnavailableError: the copy was discarded meanwhile.
        """
        target = partition.high_watermark
        deadline = self._clock.monotonic_ns() + FOLD_SLICE_NS
        while partition.applied < target:
            if partition.fold.held:
                await partition.hold.wait()
                self.check_kept(partition)
                deadline = self._clock.monotonic_ns() + FOLD_SLICE_NS  # now, before somebody else holds them
                continue
            if not self.fold_some(partition):
                raise DamagedError(
                    f"partition {partition.partition} has a damaged record at offset {partition.applied}",
                    partition=partition.partition,
                )
            if self._clock.monotonic_ns() > deadline:
                await asyncio.sleep(0)
                self.check_kept(partition)
                deadline = self._clock.monotonic_ns() + FOLD_SLICE_NS

    @contextlib.asynccontextmanager
    async def held(
        self, partition: Partition, *, fold_s: float | None = 0.0
    ) -> AsyncIterator[Callable[[Callable[[], T]], Awaitable[T]]]:
        """Have a thread look at all totals of a partition, by what is yielded: nothing is folded meanwhile.

        What is computed in the block before that is of the same offset, if no other await comes between. See `holding`.

        Args:
            partition: whose.
            fold_s: what is committed is folded before, as others may have held the totals, for so many seconds at most;
                None: however long that takes.

        Raises:
            DamagedError: a record on the way there cannot be read.
            UnavailableError: the copy was discarded before the block began, or while the thread ran.
        """
        async with partition.hold.taken():
            # Before there is a thread for it, as that may take long where a copy is far behind; and then the rest.
            await self._fold_first(partition, fold_s)
            async with self._slots:
                await self._fold_first(partition, fold_s)
                self.check_kept(partition)
                yield partial(self._run_held, partition)

    async def _fold_first(self, partition: Partition, seconds: float | None) -> None:
        if seconds == 0.0:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.wait_applied(partition)

    async def _run_held(self, partition: Partition, function: Callable[[], T]) -> T:
        try:
            found: T = await partition.hold.run(self._aside(function))
        finally:
            self.soon()
        self.check_kept(partition)
        return found

    async def digest(self, partition: Partition) -> tuple[str, int]:
        """The digest of all that is replicated, as of the high watermark, and the offset that it is of.

        Raises:
            DamagedError: a record on the way there, or a file of the totals, cannot be read.
            UnavailableError: the copy was discarded meanwhile.
        """
        async with self.held(partition, fold_s=None) as run:
            while partition.applied < partition.high_watermark:
                await self.wait_applied(partition)
            applied, judge = partition.applied, partition.judge_digests()
            return joined_digest(await run(partition.fold.digest), judge), applied

    def check_kept(self, partition: Partition) -> None:
        """See that a partition's copy is still the one that is here, after an await: its log may be another one's.

        Raises:
            UnavailableError: it was discarded, or removed.
        """
        if self._partitions.get(partition.partition) is not partition:
            raise UnavailableError(
                f"this copy of partition {partition.partition} was discarded", code=ErrorCode.NOT_LEADER
            )

    # ------------------------------------------------------------ promotion

    def promote(self, partition: Partition, then: Callable[[], None]) -> None:
        """Bring the judge to the log's end, in slices, then call `then`; nothing else may write to the log meanwhile."""
        self._promoting[partition.partition] = then
        if not self._promote(self._clock.monotonic_ns() + FOLD_SLICE_NS):
            return
        self.soon()

    def stop_promoting(self, number: int) -> None:
        """The leadership ended before it began."""
        self._promoting.pop(number, None)

    def _promote(self, deadline: int) -> bool:
        """Judge what is in the logs; whether some of it is left."""
        for number in sorted(self._promoting):
            partition = self._partitions[number]
            while partition.judged_end < partition.log_end:
                if self._clock.monotonic_ns() >= deadline:
                    return True
                if not self._judge_one(partition):
                    self._promoting.pop(number, None)
                    break
            else:
                self._promoting.pop(number)()
        return bool(self._promoting)

    def _judge_one(self, partition: Partition) -> bool:
        try:
            found = self._wal.read(partition.partition, partition.judged_end)
            assert found is not None, "the log holds everything up to its end"
            partition.judge_logged(*found, self._columns)
        except DamagedError as error:
            self._on_damage(partition, error)
            return False
        except Exception as error:
            self._on_failed(error)
            raise
        return True

    def close(self) -> None:
        """Fold nothing more by itself."""
        self._closed = True
        self._cancel_timer()

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def finish(self, partitions: Iterable[Partition]) -> None:
        """At the end: fold all that is committed and came from here, so that nothing of it is left in memory only."""
        for partition in partitions:
            while partition.error is None and partition.fold_behind and self.fold_some(partition):
                pass


def replay(wal: Wal, partition: Partition, upto: int | None = None) -> int:
    """Fold what the log holds of a partition from `applied` up to `upto` (None: its end); returns how many records.

    Raises:
        DamagedError: a record cannot be trusted.
        RemoteProtocolError: a record makes no sense to this version.
    """
    count = 0
    end = partition.index.log_end if upto is None else upto
    columns = np.zeros(COLUMNS, dtype=np.int64)
    while partition.applied < end:
        records = read_run(wal, partition, end)
        partition.apply_logged_run(records, columns)
        count += len(records)
    return count


def read_run(wal: Wal, partition: Partition, end: int) -> list[tuple[RecordMeta, Bytes]]:
    """The record of the log at `applied`, with those behind it, below `end`, if they make a run.

    Raises:
        DamagedError: of the first of them.
    """
    number = partition.partition
    index = partition.index
    row = index.find(partition.applied)
    assert row >= 0, "what is to be folded is in the log"
    if partition.judged_end > partition.applied:
        end = min(end, partition.judged_end)  # a run is judged already, or not at all
    last = index.find(end - 1) + 1
    last = min(last, row + RUN_RECORDS_MAX)
    lengths = index.column("length", row, last).tolist()
    kinds = index.column("kind", row, last).tolist()
    assert last > row, "what is to be folded is in the log"
    records: list[tuple[RecordMeta, Bytes]] = []
    size = 0
    for kind, length in zip(kinds, lengths, strict=True):
        size += length
        fits = kind == _EVENTS and length <= RUN_BODY_BYTES_MAX and size <= RUN_BYTES_MAX
        if records and not fits:
            break
        try:
            records.append(wal.read_record(number, row))
        except DamagedError:
            if not records:
                raise
            break  # it is found again when its turn comes
        row += 1
        if not fits:
            break
    return records
