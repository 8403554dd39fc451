"""A store process: recovery, leadership, the server, and a graceful end.

`serve` puts the parts together in this order: the socket is bound (its address goes into the leader keys), the data
directory is recovered, leader keys are taken, an epoch-start record is committed in every partition, and only then
is anything answered but calls to the coordinator that this process may host.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import random
from collections.abc import Callable

import msgspec

from tallymark_protocol import limits
from tallymark_protocol.errors import (
    BackpressureError,
    ErrorCode,
    InvalidRequestError,
    NotFoundError,
    UnavailableError,
)
from tallymark_protocol.frames import Frame
from tallymark_protocol.messages import (
    PROTOCOL_VERSION,
    AlertsResult,
    Call,
    CoordinatorCall,
    EventsResult,
    FrameType,
    Message,
    PartitionStatus,
    RealtimeResult,
    Row,
    StatusResult,
    StoreAlerts,
    StoreDigest,
    StoreEvents,
    StoreRealtime,
    StoreStatus,
    StoreTotals,
    TotalsResult,
    Welcome,
)
from tallymark_protocol.periods import period_of
from tallymark_runtime.catalog import (
    Cluster,
    Leader,
    MetricCatalog,
    Node,
    establish_cluster,
    leader_key,
    node_key,
)
from tallymark_runtime.clock import Clock
from tallymark_runtime.coordinator import Coordinator, CoordinatorService, Put, absent
from tallymark_runtime.disk import Disk
from tallymark_runtime.transport import FrameServer, HandlerBase, ServerConnection
from tallymark_store import recovery, store, warmup
from tallymark_store.checkpointer import Checkpointer
from tallymark_store.partition import Partition
from tallymark_store.reads import EventsRead, Reads, TotalsRead, empty_stats
from tallymark_store.scan.source import WalSource
from tallymark_store.wal import DamagedError, WalConfig

_log = logging.getLogger(__name__)

_APPEND = int(FrameType.APPEND)
_CLUSTER_FILE = "CLUSTER"  # in the store's folder: the id of the cluster that its data belongs to


class StoreConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What a store process is told."""

    node_id: str
    partition_count: int
    listen: str = "127.0.0.1:0"
    advertise: str = ""  # the address by which others reach it, if not the one it listens on
    wal: WalConfig = WalConfig()
    checkpoint_interval_s: float = 60.0
    checkpoint_events: int = 5_000_000
    dedup_window_ns: int = limits.DEDUP_WINDOW_NS
    lease_ttl_s: float = 10.0


class StoreService(HandlerBase):
    """A store that serves. Made by `serve`.

    Attributes:
        address: "host:port" it is reached by.
        failed: set when the process must end, because its log cannot be trusted any more.
    """

    def __init__(
        self,
        config: StoreConfig,
        disk: Disk,
        coordinator: Coordinator,
        clock: Clock,
        rng: random.Random,
        report: Callable[[str], None],
        hosted: CoordinatorService | None,
    ) -> None:
        self.address = ""
        self.failed = asyncio.Event()
        self._config = config
        self._disk = disk
        self._coordinator = coordinator
        self._clock = clock
        self._rng = rng
        self._report = report
        self._hosted = hosted
        self._catalog = MetricCatalog(coordinator)
        self._server = FrameServer(self, self._welcome)
        self._instance = f"{rng.getrandbits(64):016x}"
        self._tasks: list[asyncio.Task[None]] = []
        self._lease = 0
        self._locked = False
        self._store: store.Store | None = None
        self._reads: dict[int, Reads] = {}
        self._checkpointer: Checkpointer | None = None

    # ------------------------------------------------------------ start and stop

    async def start(self) -> None:
        """Recover, take the leadership, serve."""
        warmup.warm_up()  # before anything has a deadline: the first time it compiles for a minute
        bound = await self._server.start(self._config.listen)
        self.address = self._config.advertise or bound
        wanted = Cluster(self._config.partition_count, cluster_id=f"{self._rng.getrandbits(128):032x}")
        cluster = await establish_cluster(self._coordinator, wanted)
        self._disk.lock("LOCK")  # recovery writes; two processes on one log would destroy it
        self._locked = True
        self._check_cluster(cluster)
        if cluster.partition_count != wanted.partition_count:
            self._report(
                f"this cluster was created with {cluster.partition_count} partitions, and keeps them: the setting "
                f"of {wanted.partition_count} is ignored"
            )
        await self._catalog.start()
        found = recovery.recover(
            self._disk,
            partition_count=cluster.partition_count,
            dedup_window_ns=self._config.dedup_window_ns,
            wal_config=self._config.wal,
            new_log_id=self._rng.randbytes(16),
            salt=self._rng.getrandbits(63),
            report=self._report,
        )
        self._store = store.Store(
            wal=found.wal,
            partitions=found.partitions,
            catalog=self._catalog,
            clock=self._clock,
            pause_reading=self._pause_reading,
        )
        self._store.stopped = self.failed
        self._store.start()
        for number, partition in found.partitions.items():
            self._reads[number] = Reads(partition.fold, WalSource(found.wal, number))
        await self._lead()
        self._checkpointer = Checkpointer(
            self._store,
            self._disk.at("checkpoints"),
            found.manifests,
            self._clock,
            interval_s=self._config.checkpoint_interval_s,
            events_max=self._config.checkpoint_events,
        )
        loop = asyncio.get_running_loop()
        self._tasks += [loop.create_task(self._checkpointer.run()), loop.create_task(self._keep_lease())]

    def _check_cluster(self, cluster: Cluster) -> None:
        """Refuse a data directory of another cluster, or one whose coordinator's state is gone, before any write.

        Metrics' uids and epochs are revisions of one coordinator; under another one they would stand for others.
        """
        mark = cluster.cluster_id.encode()
        if _CLUSTER_FILE not in self._disk.list():
            if self._disk.at("wal").list():
                raise UnavailableError(
                    f"the store's data has no file {_CLUSTER_FILE}; restore it", retriable=False
                )
            temporary = _CLUSTER_FILE + ".new"
            file = self._disk.create(temporary)
            file.write_sync(0, [mark])
            file.close()
            self._disk.rename(temporary, _CLUSTER_FILE)
            self._disk.sync_dir()
            return
        file = self._disk.open(_CLUSTER_FILE)
        found = file.read(0, file.size()).tobytes()
        file.close()
        if found != mark:
            raise UnavailableError(
                "the store's data belongs to another cluster than the coordinator's state: one of the two was lost or "
                "replaced. Restore both from one backup; nothing was changed",
                retriable=False,
            )

    async def _lead(self) -> None:
        assert self._store is not None
        self._lease = await self._coordinator.lease_grant(self._config.lease_ttl_s)
        node = Node(self._config.node_id, self.address, "store")
        await self._coordinator.put(
            node_key("store", self._config.node_id), msgspec.msgpack.encode(node), lease=self._lease
        )
        for number, partition in self._store.partitions.items():
            await self._take_leadership(number, partition)

    async def _take_leadership(self, number: int, partition: Partition) -> None:
        """Create the partition's leader key; its create revision is the epoch of this process life."""
        assert self._store is not None
        key = leader_key(number)
        leader = Leader(self._config.node_id, self.address, self._instance)
        result = await self._coordinator.txn(
            [absent(key)], [Put(key, msgspec.msgpack.encode(leader), self._lease)]
        )
        if not result.succeeded:
            raise UnavailableError(f"partition {number} is led by another store already")
        if partition.error is not None:
            return  # it serves nothing; but without a leader nobody would be told what is wrong with it
        # Revisions only rise, so a lower one than the log has seen comes from another history: its metrics' uids
        # would stand for other metrics than those in the log.
        seen = max(partition.index.last_epoch(), *(int(uid) for uid in partition.schemas.uids), 0)
        if result.revision <= seen:
            raise UnavailableError(
                f"partition {number}: the coordinator is at revision {result.revision}, but the log has seen {seen}: "
                f"the coordinator's state was lost or belongs to another store; restore it",
                retriable=False,
            )
        try:
            self._store.start_epoch(partition, result.revision)
        except BackpressureError as error:  # what is there can be read all the same
            _log.warning("partition %d only answers reads: %s", number, error)
            partition.epoch_due = True
        await self._store.wait_committed(partition, partition.log_end)
        partition.epoch = result.revision
        try:
            self._store.refresh_schemas(partition)
        except BackpressureError as error:  # due before the next append; reads can be answered
            _log.warning("changes of metrics wait to be written: %s", error)

    async def _keep_lease(self) -> None:
        while True:
            await asyncio.sleep(self._config.lease_ttl_s / 3)
            try:
                await self._coordinator.lease_keepalive(self._lease)
            except NotFoundError:
                _log.critical("the lease of this store has run out")
                self.failed.set()
                return
            except UnavailableError as error:
                _log.warning("the coordinator cannot be reached: %s", error)

    async def close(self) -> None:
        """Answer what is under way, give the leadership up, sync the log, stop. Call it once."""
        await self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._store is not None:
            await self._store.close()
        await self._catalog.close()
        if self._lease:
            try:
                await self._coordinator.lease_revoke(self._lease)
            except (NotFoundError, UnavailableError) as error:
                _log.info("the lease was gone already: %s", error)
        if self._store is not None:
            self._store.wal.close()
        if self._locked:
            self._disk.unlock()

    async def checkpoint(self) -> None:
        """Take a checkpoint now."""
        assert self._checkpointer is not None, "start() comes first"
        await self._checkpointer.take()

    def _pause_reading(self, paused: bool) -> None:
        if paused:
            self._server.pause()
        else:
            self._server.resume()

    # ------------------------------------------------------------ requests

    def _running(self) -> store.Store:
        if self._store is None or self.failed.is_set():
            raise UnavailableError("the store is not ready")
        return self._store

    def on_frames(self, connection: ServerConnection, frames: list[Frame]) -> None:
        """Take appends."""
        for frame in frames:
            if frame.type != _APPEND:
                connection.respond_error(
                    frame.request_id, UnavailableError("a store takes appends only: send chunks to a gateway")
                )
                continue
            try:
                running = self._running()
            except UnavailableError as error:
                connection.respond_error(frame.request_id, error)
                continue
            running.on_append(connection, frame)

    async def on_call(self, connection: ServerConnection, call: Call) -> Message:
        """Answer reads, status, and the coordinator's calls if this process hosts it."""
        if isinstance(call, CoordinatorCall):
            if self._hosted is None:
                raise UnavailableError("this store hosts no coordinator", retriable=False)
            return await self._hosted.on_call(call)
        running = self._running()
        if isinstance(call, StoreStatus):
            return self._status(running)
        if isinstance(call, StoreTotals | StoreRealtime | StoreEvents | StoreAlerts):
            partition = running.serving(call.partition)
            await running.wait_applied(partition)
            if call.metric_code is not None and not self._knows(partition, call.metric_code):
                return await self._read_nothing(partition, call, call.metric_code)
            try:
                try:
                    return await self._read(self._reads[call.partition], call)
                except InvalidRequestError:
                    # It may name what was declared a moment ago, at another node: look again, once.
                    await self._catalog.catch_up()
                    await running.wait_committed(partition, partition.log_end)
                    await running.wait_applied(partition)
                    return await self._read(self._reads[call.partition], call)
            except DamagedError as error:
                running.refuse(partition, error)
                raise
        if isinstance(call, StoreDigest):
            return await self._digest(running, call)
        return await super().on_call(connection, call)

    def _knows(self, partition: Partition, code: str) -> bool:
        """Whether the metric that has this code now, not an older one under the same code, is in the partition."""
        slot = partition.fold.schemas.slot_of(code)
        if slot < 0:
            return False
        current = self._catalog.get(code)
        return current is None or current.uid == partition.fold.schemas.record(slot).uid

    async def _read_nothing(
        self,
        partition: Partition,
        call: StoreTotals | StoreRealtime | StoreEvents | StoreAlerts,
        code: str,
    ) -> Message:
        """Answer about a metric of which this partition has no event: nothing, if there is such a metric.

        A metric gets into a partition's log with its first batch; reads write nothing, also on a full disk.
        """
        record = await self._catalog.fetch(code)
        if record is None:
            raise NotFoundError(f"there is no metric {code!r}", code=ErrorCode.UNKNOWN_METRIC)
        schema = record.schema
        as_of = partition.applied
        empty = empty_stats(schema.agg_type)
        match call:
            case StoreTotals():
                single = call.account_id is not None and len(call.buckets) == 1 and not call.group_by
                rows = [Row(empty)] if single else []
                return TotalsResult(rows, as_of, call.partition, record.uid)
            case StoreRealtime():
                at_ns = self._clock.now_ns() if call.at_ns is None else call.at_ns
                period = period_of(at_ns, schema.period_type, schema.billing_cycle_day, record.zone)
                return RealtimeResult(empty, period.start_ns, period.end_ns, as_of, call.partition)
            case StoreEvents():
                return EventsResult([], None, as_of)
            case StoreAlerts():
                position = max(partition.fold.alert_count, call.from_position)
                return AlertsResult([], position, more=False)

    async def _read(
        self, reads: Reads, call: StoreTotals | StoreRealtime | StoreEvents | StoreAlerts
    ) -> Message:
        match call:
            case StoreRealtime():
                return reads.realtime(call, self._clock.now_ns())
            case StoreTotals():
                return await _stepped(reads.plan_totals(call))
            case StoreEvents():
                return await _stepped(reads.plan_events(call))
            case StoreAlerts():
                return reads.alerts(call)

    def _status(self, running: store.Store) -> StatusResult:
        return StatusResult(
            node_id=self._config.node_id,
            partitions=[
                PartitionStatus(
                    partition=number,
                    epoch=partition.epoch,
                    log_end=partition.log_end,
                    high_watermark=partition.high_watermark,
                    applied=partition.applied,
                    error=partition.error.message if partition.error else "",
                )
                for number, partition in running.partitions.items()
            ],
            log_bytes=running.wal.total_bytes,
            log_full=running.wal.full,
            details={
                "ids": sum(len(p.dedup) for p in running.partitions.values()),
                "id_bytes": sum(p.dedup.memory_bytes for p in running.partitions.values()),
                "cells": sum(p.fold.cell_count for p in running.partitions.values()),
                "fold_bytes": sum(p.fold.memory_bytes() for p in running.partitions.values()),
                "checkpoints": self._checkpointer.count if self._checkpointer else 0,
            },
        )

    async def _digest(self, running: store.Store, call: StoreDigest) -> PartitionStatus:
        """The digest of the applied state; or of a recount of the log from its first record to the same offset."""
        partition = running.serving(call.partition)
        # Of the applied offset, so nothing committed may lie beyond it, and no await comes before the digest.
        while partition.applied < partition.high_watermark:
            await running.wait_applied(partition)
        counted = partition
        if call.recount:
            upto = partition.applied
            counted = Partition(
                call.partition, dedup_window_ns=partition.dedup_window_ns, indexes=running.wal.partitions
            )
            await asyncio.to_thread(functools.partial(store.replay, running.wal, counted, upto))
        return PartitionStatus(
            partition=call.partition,
            epoch=partition.epoch,
            log_end=partition.log_end,
            high_watermark=partition.high_watermark,
            applied=counted.applied,
            digest=counted.digest(),
        )

    def _welcome(self) -> Welcome:
        return Welcome(
            version=PROTOCOL_VERSION, node_id=self._config.node_id, role="store", now_ns=self._clock.now_ns()
        )


async def _stepped(read: TotalsRead | EventsRead) -> Message:
    """Do a read's scan in steps, with the loop running in between."""
    while not read.step():  # noqa: ASYNC110 - the loop works, it does not wait
        await asyncio.sleep(0)
    return read.result()


async def serve(
    config: StoreConfig,
    disk: Disk,
    coordinator: Coordinator,
    clock: Clock,
    rng: random.Random,
    *,
    report: Callable[[str], None],
    hosted: CoordinatorService | None = None,
) -> StoreService:
    """Start a store; close it at the end. `report` is told, in sentences, what takes time or needs attention.

    Raises:
        OSError: the address cannot be listened on.
        DiskError: the data directory cannot be used.
        UnavailableError: another store leads already.
    """
    service = StoreService(config, disk, coordinator, clock, rng, report, hosted)
    try:
        await service.start()
    except BaseException:
        await service.close()
        raise
    return service
