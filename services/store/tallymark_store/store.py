"""The driver of a store: one loop around its replicas, their logs, their judges and folds.

Owns the order of things, and nothing else: bytes are checked, judged, appended to the log's buffer (`appends`),
replicated (`replicating`) and synced (by the log's own thread) at the same time, committed by a majority, answered,
folded (`folding`). Everything runs on the event loop but the log's writes; a slice of work stays short, so that reads
and lease renewals come in between.

What a request waits for: an append for the commit of what its answer says; a read for the fold to reach the high
watermark as it was when the read came.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from tallymark_protocol.errors import BackpressureError, ErrorCode, UnavailableError, WireError, to_wire
from tallymark_protocol.frames import Frame
from tallymark_protocol.schema import MetricRecord
from tallymark_runtime.catalog import MetricCatalog
from tallymark_runtime.clock import Clock
from tallymark_store.appends import Appends, Requester
from tallymark_store.counters import StoreCounters
from tallymark_store.folding import Folding
from tallymark_store.holding import HoldThreads
from tallymark_store.links import Transport
from tallymark_store.partition import Partition
from tallymark_store.replicas_file import ReplicasFile
from tallymark_store.replicating import Identity, Keys, Replicating
from tallymark_store.replication.effects import Role
from tallymark_store.replication.ports import Membership, ReplicaConfig
from tallymark_store.replication.replica import Replica
from tallymark_store.tail import Tail
from tallymark_store.wal import DamagedError, Group, Position, Wal, WalThreads

_log = logging.getLogger(__name__)

CLOCKS_S = 0.02  # how often it is looked whether all members' clocks are known
MARKER_DELAY_S = 0.05  # an idle log is marked within 100 ms of its last sync
WAY_OUT = (
    "what is on the disk was left as it is. A partition with copies on other stores is brought back by them, by itself; where this is "
    "the only copy, restore the data directory as a whole from a backup. Until then the partition is refused"
)
Offload = Callable[..., Awaitable[Any]]  # runs a function that waits for the disk; `asyncio.to_thread`


class Threads(Protocol):
    """What writes and syncs the log: `WalThreads`, or a simulation of it."""

    def start(self) -> None:
        """Begin."""
        ...

    def wake(self) -> None:
        """Something was appended."""
        ...

    def close(self) -> None:
        """Sync what was accepted, mark the log, end."""
        ...


class ThreadsFactory(Protocol):
    """Makes them."""

    def __call__(
        self, wal: Wal, *, on_synced: Callable[[Group], None], on_failed: Callable[[BaseException], None]
    ) -> Threads:
        """Both callbacks may be called in any thread."""
        ...


class Store:
    """The partitions of one process and their log.

    Args:
        wal: the recovered log.
        partitions: the partitions by number, recovered (see `recovery`).
        catalog: the metrics as the coordinator has them.
        clock: stamps appends, and is what replicas' time runs on.
        identity: who this store is.
        config: of the replicas.
        file: what the replicas must not forget.
        transport: to the other stores.
        keys: the leader keys in the coordinator.
        new_copy_id: gives random ids.
        pause_reading: called with True when the backlog is too large, with False when it has shrunk.
        on_discarded: called when a copy begins anew: its partition is to be replaced in `partitions`.
        threads: makes what syncs the log.
        offload: runs what waits for the disk.
        aside: runs what looks at held totals (`holding`); None: in threads of its own.
    """

    def __init__(
        self,
        *,
        wal: Wal,
        partitions: dict[int, Partition],
        catalog: MetricCatalog,
        clock: Clock,
        identity: Identity,
        config: ReplicaConfig,
        file: ReplicasFile,
        transport: Transport,
        keys: Keys,
        new_copy_id: Callable[[], str],
        pause_reading: Callable[[bool], None],
        on_discarded: Callable[[int, str], None],
        threads: ThreadsFactory = WalThreads,
        offload: Offload = asyncio.to_thread,
        aside: Offload | None = None,
    ) -> None:
        self.wal = wal
        self.partitions = partitions
        self.catalog = catalog
        self.clock = clock
        self.stopped = asyncio.Event()  # set when the log failed: the process must end
        self.generations: dict[
            int, int
        ] = {}  # by partition: how often a leadership, or a copy, has ended here
        self.counters = StoreCounters()
        self._offload = offload
        self._config = config
        self._loop = asyncio.get_running_loop()
        self._flush_due = False
        self._marker: asyncio.TimerHandle | None = None
        self._synced: deque[tuple[int, dict[int, int]]] = deque()  # (group, log ends), from the log's thread
        self._synced_called = False
        self._waiters: list[asyncio.Future[None]] = []  # for the next sync or commit
        self._on_discarded = on_discarded
        self._started = False
        self._halted = False
        self._threads = threads(wal, on_synced=self._synced_in_thread, on_failed=self._failed_in_thread)
        self.replicating = Replicating(
            wal,
            partitions,
            clock,
            identity=identity,
            config=config,
            file=file,
            transport=transport,
            keys=keys,
            leadership=self,
            new_copy_id=new_copy_id,
        )
        self._hold_threads = HoldThreads()
        self.tail = Tail(self.serving, lambda number: self.folding.awaited_soon(number))  # noqa: PLW0108 - it is made below
        self.folding = Folding(
            wal,
            partitions,
            clock,
            pause_reading=pause_reading,
            on_damage=self.refuse,
            on_failed=self.log_failed,
            on_folded=self.tail.folded,
            is_awaited=self.tail.awaits,
            aside=self._hold_threads if aside is None else aside,
        )
        self.appends = Appends(self)
        catalog.on_change = self._on_metric_change

    # ------------------------------------------------------------ requests

    def on_append(self, connection: Requester, frame: Frame) -> None:
        """Take an APPEND frame; it is answered once, now or after its commit."""
        self.appends.on_append(connection, frame)

    @property
    def replicas(self) -> dict[int, Replica]:
        """The replicas by partition; those with a copy here."""
        return self.replicating.replicas

    @property
    def backlog_bytes(self) -> int:
        """Payloads that were appended here and are not folded yet."""
        return self.folding.backlog_bytes

    @property
    def events_folded(self) -> int:
        """Since the start; checkpoints are due by it."""
        return self.folding.events_folded

    def serving(self, number: int) -> Partition:
        """The partition, if this process leads it.

        Raises:
            UnavailableError: it does not, or the partition's copy here is damaged.
        """
        partition = self.partitions.get(number)
        if partition is not None and partition.error is not None:
            error = partition.error
            raise UnavailableError(error.message, code=error.code, retriable=error.retriable)
        if partition is None or partition.epoch == 0:
            raise UnavailableError(f"partition {number} is not led by this store", code=ErrorCode.NOT_LEADER)
        return partition

    def accepts_appends(self, number: int) -> bool:
        """Whether records may be appended by clients: the leadership is neither beginning nor being handed over."""
        replica = self.replicas.get(number)
        return replica is not None and replica.accepts_appends

    def taking_appends(self, number: int) -> Partition:
        """The partition, if this process leads it and may append to it.

        Raises:
            UnavailableError: as `serving`, or the leadership is about to begin or to end.
            BackpressureError: there was no room for the epoch's first record, and there is none yet.
        """
        partition = self.serving(number)
        if partition.epoch_due:
            self.appends.start_epoch(partition, partition.epoch)
            partition.epoch_due = False
        if not self.accepts_appends(number):
            raise UnavailableError(
                f"the leadership of partition {number} is changing", code=ErrorCode.NOT_LEADER
            )
        return partition

    def refuse(self, partition: Partition, error: DamagedError) -> None:
        """A read found damage: this copy counts for nothing from here on, also after a restart."""
        _log.error("%s", error.message)
        if self.partitions.get(partition.partition) is not partition:
            return  # of a copy that began anew meanwhile: the one that is here now has nothing of it
        replica = self.replicas.get(partition.partition)
        if partition.error is None:
            partition.error = self.damage_error(partition.partition, to_wire(error))
        self.tail.changed(partition.partition)
        if replica is not None and replica.role is not Role.DAMAGED:
            self.replicating.call(partition.partition, replica.damaged, error.message)
        self.wal.mark_damaged(partition.partition)
        if self.wal.write_marker():
            self._threads.wake()

    def damage_error(self, number: int, error: WireError) -> WireError:
        """What is told to those who ask a damaged copy: to go elsewhere, if there is another one."""
        replica = self.replicas.get(number)
        if replica is None or len(replica.membership.members) > 1:
            return WireError(int(ErrorCode.NOT_LEADER), True, error.message, error.details)
        message = error.message if WAY_OUT in error.message else f"{error.message}; {WAY_OUT}"
        return WireError(error.code, False, message, error.details)

    def refresh_schemas(self, partition: Partition) -> None:
        """Bring a partition's metrics to what the catalog knows. Raises BackpressureError."""
        self.appends.refresh_schemas(partition)

    def _on_metric_change(self, record: MetricRecord) -> None:
        if not self._halted:
            self.appends.on_metric_change(record)

    # ------------------------------------------------------------ what replicas ask for

    def begin_epoch(self, partition: Partition, epoch: int) -> None:
        """Bring the judge to the log's end, then append the epoch start."""
        number = partition.partition
        decide_ns = self.clock.monotonic_ns() + self._config.lease_ns // 2

        def start() -> None:
            replica = self.replicas.get(number)
            if self._halted or replica is None or replica.role is not Role.STARTING or replica.epoch != epoch:
                return
            must_decide = self.clock.monotonic_ns() >= decide_ns
            if not self.replicating.fitness.may_begin(number, must_decide=must_decide):
                if replica.role is Role.STARTING and replica.epoch == epoch:
                    self._loop.call_later(CLOCKS_S, start)
                return
            try:
                self.appends.start_epoch(partition, epoch)
            except BackpressureError as error:
                self._begin_without_room(partition, replica, epoch, error)

        self.folding.promote(partition, start)

    def _begin_without_room(
        self, partition: Partition, replica: Replica, epoch: int, error: BackpressureError
    ) -> None:
        """There is no room for the epoch's first record; it is tried again with appends, and from time to time."""
        _log.warning(
            "partition %d: there is no room to begin the epoch %d: %s", partition.partition, epoch, error
        )
        if len(replica.membership.members) == 1:
            # The only copy holds everything that was ever acknowledged: what is there can be read all the same.
            partition.epoch = epoch
            partition.epoch_due = True
            self._notify()
        elif self.replicating.fitness.others_have_room(partition.partition):
            self.replicating.call(partition.partition, replica.resign, "there is no room to begin the epoch")
            return

        def again() -> None:
            if replica.role is Role.STARTING and replica.epoch == epoch and not self._halted:
                self.wal.poll_space(self.clock.monotonic_ns())
                if partition.epoch_due or partition.epoch == 0:
                    partition.epoch_due = False
                    self.begin_epoch(partition, epoch)

        self._loop.call_later(1.0, again)

    def append_membership(self, partition: Partition, epoch: int, membership: Membership) -> None:
        """Append a membership record. Raises BackpressureError, DamagedError."""
        self.appends.append_membership(partition, epoch, membership)

    def serve(self, partition: Partition, epoch: int) -> None:
        """The epoch's start is committed: take appends and reads."""
        partition.epoch = epoch
        partition.epoch_due = False
        number = partition.partition
        self.counters.leadership_changed(
            number, "gained", epoch=epoch, reason=self.replicas[number].why, log_end=partition.log_end
        )
        self.appends.try_refresh_schemas(partition)
        self._notify()

    def step_down(self, partition: Partition, epoch: int, reason: str) -> None:
        """Take no more appends; fail what waits; take the judge back to what is applied."""
        number = partition.partition
        self.counters.leadership_changed(
            number, "lost" if partition.epoch else "failed", epoch=epoch, reason=reason
        )
        self.folding.stop_promoting(number)
        self.end_generation(number)
        self.folding.backlog_bytes -= partition.demote()
        for fail in partition.fail_waiting():
            fail()
        self.tail.changed(number)
        self.folding.soon()
        self._notify()

    def committed(self, partition: Partition, high_watermark: int) -> None:
        """Everything below is committed: answer, then fold."""
        events = max(high_watermark - partition.high_watermark, 0)
        for send in partition.commit(high_watermark):
            send()
        behind = partition.high_watermark - partition.applied
        self.folding.later(events, behind=behind, is_awaited=self.tail.awaits(partition))
        if self._waiters:
            self._notify()

    def discarded(self, partition: Partition, copy_id: str) -> None:
        """The copy begins anew."""
        self._on_discarded(partition.partition, copy_id)
        self.tail.changed(partition.partition)
        self._notify()

    # ------------------------------------------------------------ sync and commit

    def poke(self, number: int) -> None:
        """Let the log replicate and sync what was appended in this turn of the loop."""
        self.replicating.mark_appended(number)
        self.sync_soon()

    def sync_soon(self) -> None:
        """Let the log sync what was written to it in this turn of the loop."""
        if not self._flush_due:
            self._flush_due = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_due = False
        if self._halted:
            return
        # The way over the network is the longer one.
        self.replicating.flush()
        self._threads.wake()

    def start(self) -> None:
        """Start the log's threads."""
        self._started = True
        self._threads.start()
        self.folding.soon()

    def _synced_in_thread(self, group: Group) -> None:
        self._synced.append((group.number, group.log_ends))
        # One wake-up takes in every group that was synced by the time it runs.
        if not self._synced_called:
            self._synced_called = True
            self._loop.call_soon_threadsafe(self._take_synced)

    def _failed_in_thread(self, error: BaseException) -> None:
        self._loop.call_soon_threadsafe(self.log_failed, error)

    def _take_synced(self) -> None:
        # Cleared before looking: a group that is added after the look finds it cleared and calls again.
        self._synced_called = False
        if self._halted:
            return
        groups = []
        while self._synced:
            groups.append(self._synced.popleft())
        if groups:
            self.replicating.synced(groups)
            if self._marker is not None:
                self._marker.cancel()
            self._marker = self._loop.call_later(MARKER_DELAY_S, self._mark)
        self._notify()

    def _notify(self) -> None:
        waiting, self._waiters = self._waiters, []
        for future in waiting:
            if not future.done():
                future.set_result(None)

    async def wait_news(self) -> None:
        """Wait for the next sync, commit, or change of a leadership.

        Raises:
            UnavailableError: the log has failed.
        """
        if self.stopped.is_set():
            raise UnavailableError("the log has failed")
        future = self._loop.create_future()
        self._waiters.append(future)
        await future

    async def wait_synced(self, position: Position) -> None:
        """Wait until everything of the log below `position` is durable."""
        while not self.wal.is_synced(position):
            self._threads.wake()
            await self.wait_news()

    def generation(self, number: int) -> int:
        """Rises whenever a leadership of this store, or a copy, ends: what was judged ahead is taken back then."""
        return self.generations.get(number, 0)

    def end_generation(self, number: int) -> None:
        """A leadership, or a copy, has ended."""
        self.generations[number] = self.generations.get(number, 0) + 1

    async def wait_committed(self, partition: Partition, offset: int, generation: int | None = None) -> None:
        """Wait until everything of a partition below `offset` is committed.

        Raises:
            UnavailableError: the leadership ended (since `generation`), and with it the certainty that it ever will be.
        """
        number = partition.partition
        if generation is None:
            generation = self.generation(number)
        self._check_generation(number, generation)
        while partition.high_watermark < offset:
            self._threads.wake()
            await self.wait_news()
            self._check_generation(number, generation)

    async def wait_durable(self, partition: Partition, offset: int) -> None:
        """Wait until everything of a partition below `offset`, which is committed, is on this store's disk as well.

        Raises:
            UnavailableError: the copy was discarded.
        """
        number = partition.partition
        while True:
            if self.partitions.get(number) is not partition:
                raise UnavailableError(f"this copy of partition {number} was discarded")
            replica = self.replicas.get(number)
            if replica is None or replica.durable_end >= offset:
                return
            self._threads.wake()
            await self.wait_news()

    def _check_generation(self, number: int, generation: int) -> None:
        if self.generation(number) != generation:
            raise UnavailableError(
                f"the leadership of partition {number} has ended", code=ErrorCode.NOT_LEADER
            )

    async def wait_applied(self, partition: Partition) -> None:
        """Wait until the fold has reached the high watermark as it is now. Raises DamagedError."""
        await self.folding.wait_applied(partition)

    def log_failed(self, error: BaseException) -> None:
        """The log failed: what is on disk is unknown, so nothing more is answered and the process ends."""
        if self._halted:
            return
        _log.critical("the log failed", exc_info=error)
        wire = to_wire(error)
        for partition in self.partitions.values():
            partition.error = WireError(int(ErrorCode.PARTITION_UNAVAILABLE), True, wire.message)
            partition.fail_waiting()  # nobody is answered: what became of their events is not known
        self.stopped.set()
        self.tail.close()
        self.replicating.close()
        self._notify()  # they look again, and find the log failed

    def _mark(self) -> None:
        self._marker = None
        if not self._halted and self.wal.write_marker():
            self._threads.wake()

    # ------------------------------------------------------------ end

    def halt(self) -> None:
        """Stop at once, as in a crash: nothing is written, sent or answered any more."""
        self._halted = True
        self.folding.close()
        self.appends.cancel()
        self.replicating.close()
        if self._marker is not None:
            self._marker.cancel()

    async def close(self) -> None:
        """Sync what is buffered, mark the log, and stop."""
        self.tail.close()
        if self._marker is not None:
            self._marker.cancel()
        self.appends.cancel()
        if self._started:
            # The thread syncs what is buffered and marks the log; its callbacks still come to this loop.
            await self._offload(self._threads.close)
            self._take_synced()
        if self._marker is not None:
            self._marker.cancel()
        self.replicating.close()
        self.folding.close()
        self.folding.finish(self.partitions.values())
        self._hold_threads.close()
