"""Calls to a store: reads at every consistency, the tail of alert records, status, digests.

Owns what must be true of this copy before a read is computed, and before its answer is sent: a leader answers while
its lease lasts, looked at after computing; a quorum read has a majority confirm the leader's epoch first; any
undamaged copy answers a stale read, and says how far it is behind.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext

import msgspec

from tallymark_protocol.errors import ErrorCode, InvalidRequestError, NotFoundError, UnavailableError
from tallymark_protocol.messages import (
    AlertsResult,
    Call,
    Consistency,
    EventsResult,
    Message,
    PartitionStatus,
    RealtimeResult,
    Row,
    StatusResult,
    StoreAlerts,
    StoreBackup,
    StoreBackupRead,
    StoreDigest,
    StoreEvents,
    StoreRealtime,
    StoreStatus,
    StoreTail,
    StoreTotals,
    TotalsResult,
)
from tallymark_protocol.periods import period_of
from tallymark_runtime.assignments import NO_LEADER
from tallymark_runtime.catalog import MetricCatalog
from tallymark_runtime.clock import Clock
from tallymark_store.backups import Backups
from tallymark_store.folding import replay
from tallymark_store.partition import Partition, joined_digest
from tallymark_store.reads import EventsRead, Reads, TotalsRead, empty_stats
from tallymark_store.replication.effects import Role
from tallymark_store.scan.archived import Archived, ArchiveDamagedError
from tallymark_store.scan.source import WalSource
from tallymark_store.store import Offload, Store
from tallymark_store.wal import DamagedError

Read = StoreTotals | StoreRealtime | StoreEvents | StoreAlerts
STALE_FOLD_S = 0.2  # that a ranking folds first, which is about as long as it holds the totals

READS = (StoreTotals, StoreRealtime, StoreEvents, StoreAlerts)


class Calls:
    """Answers the calls to one store.

    Args:
        store: the driver.
        catalog: the metrics.
        clock: tells the present, for periods.
        node_id: who answers.
        check_lease: raises UnavailableError unless this node's lease lasts.
        offload: runs what takes long.
    """

    def __init__(
        self,
        store: Store,
        catalog: MetricCatalog,
        clock: Clock,
        *,
        node_id: str,
        check_lease: Callable[[], None],
        offload: Offload,
    ) -> None:
        self.checkpoint_count: Callable[[], int] = lambda: 0
        self.backups: Backups | None = None  # None: it doesn't know where its files are
        # Keeps a partition's log from an offset on while it is counted again.
        self.hold_log: Callable[[int, int], AbstractContextManager[None]] = lambda _, __: nullcontext()
        # The archive of a partition as it is now, and what becomes of one that is damaged.
        self.archive_view: Callable[[int], Archived | None] = lambda _: None
        # Told by whose reader; False where the archive is another one by now.
        self.archive_damaged: Callable[[int, str, object], bool] = lambda _, __, ___: True
        self._store = store
        self._catalog = catalog
        self._clock = clock
        self._node_id = node_id
        self._check_lease = check_lease
        self._offload = offload
        self._reads: dict[int, tuple[Partition, Reads]] = {}
        # Of quorum reads. By (partition, generation): confirmations whose record isn't written yet.
        self._confirmations: dict[tuple[int, int], asyncio.Task[None]] = {}
        self._confirming: dict[int, asyncio.Lock] = {}  # by partition: one record at a time

    async def call(self, call: Call, caller: Hashable = None) -> Message | None:
        """Answer a call of a caller, if it is known who that is; None where it is no call to a store."""
        if isinstance(call, READS):
            return await self._answer(call)
        if isinstance(call, StoreTail):
            return await self._tail(call, caller)
        if isinstance(call, StoreStatus):
            return self._status()
        if isinstance(call, StoreDigest):
            return await self._digest(call)
        if self.backups is not None and isinstance(call, StoreBackup):
            return await self.backups.begin(call)
        if self.backups is not None and isinstance(call, StoreBackupRead):
            return await self.backups.read(call)
        return None

    async def _tail(self, call: StoreTail, caller: Hashable) -> Message:
        try:
            return await self._store.tail.answer(call, caller)
        except DamagedError as error:
            partition = self._store.partitions.get(error.partition)
            if partition is not None:
                self._found_damage(partition, error)
            raise

    def call_now(self, call: StoreRealtime) -> RealtimeResult | None:
        """Answer as `call` does, if nothing has to be waited for; None where it has to, or it is not clear.

        Raises:
            UnavailableError: this store does not lead the partition, or not for sure.
        """
        if call.consistency != Consistency.LEADER:
            return None
        partition = self._store.serving(call.partition)
        # A metric is known here once its first batch is folded, so in this order.
        if not self._store.folding.catch_up(partition) or not self._knows(partition, call.metric_code):
            return None
        try:
            answer = self._reads_of(partition).realtime(call, self._clock.now_ns())
        except (InvalidRequestError, DamagedError):
            return None  # what follows from it, `call` does
        self._check_lease()  # no other turn of the loop has come between, so nothing else can have changed
        return answer

    # ------------------------------------------------------------ reads

    async def _answer(self, call: Read) -> Message:
        if call.consistency == Consistency.STALE:
            return await self._answer_stale(call)
        store = self._store
        partition = store.serving(call.partition)
        generation = store.generation(call.partition)
        if call.consistency == Consistency.QUORUM:
            await self._confirm(partition, generation)
        await store.wait_applied(partition)
        try:
            try:
                answer = await self._compute(partition, call)
            except InvalidRequestError:
                # It may name what was declared a moment ago, at another node: look again, once.
                await self._catalog.catch_up()
                await store.wait_committed(partition, partition.log_end, generation)
                await store.wait_applied(partition)
                answer = await self._compute(partition, call)
        except DamagedError as error:
            self._found_damage(partition, error)
            raise
        # Computed: was this store still the leader, by its own deadline, when it was?
        store.serving(call.partition)
        if store.generation(call.partition) != generation:
            raise UnavailableError(
                f"partition {call.partition} is not led by this store any more", code=ErrorCode.NOT_LEADER
            )
        self._check_lease()
        return answer

    async def _answer_stale(self, call: Read) -> Message:
        store = self._store
        partition = store.partitions.get(call.partition)
        replica = store.replicas.get(call.partition)
        if partition is None or replica is None:
            raise UnavailableError(
                f"this store has no copy of partition {call.partition}", code=ErrorCode.NOT_LEADER
            )
        if partition.error is None and replica.role is not Role.DAMAGED:
            store.folding.catch_up(partition)  # so that no more is missing than is not committed here
        if partition.error is not None or replica.role is Role.DAMAGED:
            raise UnavailableError(f"this copy of partition {call.partition} is damaged")
        silence_ms = 0 if replica.role is Role.LEADER else self._silence_ms(call.partition)
        known = partition.high_watermark
        try:
            answer = await self._compute(partition, call)
        except DamagedError as error:
            self._found_damage(partition, error)
            raise
        store.folding.check_kept(partition)
        assert isinstance(answer, TotalsResult | RealtimeResult | EventsResult | AlertsResult)
        if partition.error is not None:
            raise UnavailableError(f"this copy of partition {call.partition} is damaged")
        return msgspec.structs.replace(answer, lag=max(known - answer.as_of, 0), silence_ms=silence_ms)

    def _found_damage(self, partition: Partition, error: DamagedError) -> None:
        """A read has found damage: this copy is to be made anew from others, if there are any."""
        replica = self._store.replicas.get(partition.partition)
        if isinstance(error, ArchiveDamagedError) and (
            replica is None or len(replica.membership.members) == 1
        ):
            return  # nobody else has what is lost, and totals are as right as before
        self._store.refuse(partition, error)

    def _silence_ms(self, number: int) -> int:
        heard_ns = self._store.replicating.heard_ns.get(number)
        return -1 if heard_ns is None else (self._clock.monotonic_ns() - heard_ns) // 1_000_000

    async def _confirm(self, partition: Partition, generation: int) -> None:
        """Have a majority confirm, from now on, that no higher epoch was promised.

        Reads that come while one confirmation is under way share the next one.
        """
        key = (partition.partition, generation)
        confirmation = self._confirmations.get(key)
        if confirmation is None:
            work = self._commit_record(partition, generation)
            confirmation = self._confirmations[key] = asyncio.get_running_loop().create_task(work)
        await asyncio.shield(confirmation)

    async def _commit_record(self, partition: Partition, generation: int) -> None:
        """Confirm the leader's epoch by committing a record of it."""
        number = partition.partition
        async with self._confirming.setdefault(number, asyncio.Lock()):
            del self._confirmations[
                number, generation
            ]  # who comes from now on is confirmed by a later record
            self._store.taking_appends(number)
            self._store.appends.start_epoch(partition, partition.epoch)
            await self._store.wait_committed(partition, partition.log_end, generation)

    def _reads_of(self, partition: Partition) -> Reads:
        found = self._reads.get(partition.partition)
        if found is None or found[0] is not partition:
            number = partition.partition
            source = WalSource(self._store.wal, number)
            reads = Reads(partition.fold, source, archive=lambda: self.archive_view(number))
            found = self._reads[partition.partition] = (partition, reads)
        return found[1]

    async def _compute(self, partition: Partition, call: Read) -> Message:
        if call.metric_code is not None and not self._knows(partition, call.metric_code):
            return await self._read_nothing(partition, call, call.metric_code)
        reads = self._reads_of(partition)
        match call:
            case StoreRealtime():
                return reads.realtime(call, self._clock.now_ns())
            case StoreTotals() if call.account_id is None:
                return await self._rank(partition, reads, call)
            case StoreTotals():
                return await self._stepped(partition, lambda: reads.plan_totals(call))
            case StoreEvents():
                return await self._stepped(partition, lambda: reads.plan_events(call))
            case StoreAlerts():
                as_of = partition.applied
                return msgspec.structs.replace(reads.alerts(call), as_of=as_of)

    async def _rank(self, partition: Partition, reads: Reads, call: StoreTotals) -> Message:
        """Rank all accounts; by the cells of a billing period in a thread."""
        read = reads.plan_totals(call)
        if read.looks_at_all:
            # A stale one has what there is; but the fold is to get on between two of them.
            fold_s = STALE_FOLD_S if call.consistency == Consistency.STALE else None
            async with self._store.folding.held(partition, fold_s=fold_s) as run:
                read = reads.plan_totals(call)
                if read.looks_at_all:
                    await run(read.step)
        return await self._stepped(partition, lambda: reads.plan_totals(call), read)

    async def _stepped(
        self,
        partition: Partition,
        plan: Callable[[], TotalsRead | EventsRead],
        first: TotalsRead | None = None,
    ) -> Message:
        """Do a planned read, or plan one."""
        try:
            return await self._in_steps(partition, plan() if first is None else first)
        except ArchiveDamagedError as error:
            self._store.folding.check_kept(partition)  # else it was another copy's, and is gone
            is_present = self.archive_damaged(partition.partition, error.message, error.reader)
            if is_present and partition.index.log_start > 0:
                raise
            return await self._in_steps(partition, plan())  # the log has everything, or another archive has

    async def _in_steps(self, partition: Partition, read: TotalsRead | EventsRead) -> Message:
        """Do a read's scan in steps, with the loop running in between; those that read files in a thread."""
        while not (await self._offload(read.step) if read.reads_files else read.step()):
            await asyncio.sleep(0)
            self._store.folding.check_kept(partition)
        return read.result()

    def _knows(self, partition: Partition, code: str) -> bool:
        """Whether the metric that has this code now, not an older one under the same code, is in the partition."""
        slot = partition.fold.schemas.slot_of(code)
        if slot < 0:
            return False
        current = self._catalog.get(code)
        return current is None or current.uid == partition.fold.schemas.record(slot).uid

    async def _read_nothing(self, partition: Partition, call: Read, code: str) -> Message:
        """Answer about a metric of which this partition has no event: nothing, if there is such a metric.

        A metric gets into a partition's log with its first batch; reads write nothing, also on a full disk.
        """
        as_of = partition.applied  # what is folded while the coordinator is asked is not in the answer
        record = await self._catalog.fetch(code)
        if record is None:
            raise NotFoundError(f"there is no metric {code!r}", code=ErrorCode.UNKNOWN_METRIC)
        schema = record.schema
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
                return AlertsResult([], position, more=False, as_of=as_of)

    # ------------------------------------------------------------ status and digests

    def _status(self) -> StatusResult:
        store = self._store
        held = [
            (number, partition)
            for number, partition in sorted(store.partitions.items())
            if number in store.replicas or partition.error is not None
        ]
        return StatusResult(
            node_id=self._node_id,
            partitions=[self._partition_status(number, partition) for number, partition in held],
            log_bytes=store.wal.total_bytes,
            log_full=store.wal.full,
            details={
                "ids": sum(len(p.dedup) for _, p in held),
                "id_bytes": sum(p.dedup.memory_bytes for _, p in held),
                "cells": sum(p.fold.cell_count for _, p in held),
                "fold_bytes": sum(p.fold.memory_bytes() for _, p in held),
                "checkpoints": self.checkpoint_count(),
            },
        )

    def _partition_status(self, number: int, partition: Partition, digest: str = "") -> PartitionStatus:
        replica = self._store.replicas.get(number)
        status = PartitionStatus(
            partition=number,
            epoch=partition.epoch,
            log_end=partition.log_end,
            high_watermark=partition.high_watermark,
            applied=partition.applied,
            error=partition.error.message if partition.error else "",
            digest=digest,
        )
        if replica is None:
            return status
        error = status.error
        if not error and replica.role is Role.DAMAGED:
            error = replica.why
        elif not error and not replica.leader:
            error = f"{NO_LEADER}: {replica.why}" if replica.why else ""
        return msgspec.structs.replace(
            status,
            error=error,
            role=replica.role.value,
            leader=replica.leader,
            members=[(member.node_id, member.copy_id) for member in replica.membership.members],
            copy_id=replica.copy_id,
            lags={
                node: max(partition.log_end - progress.match_end, 0)
                for node, progress in sorted(replica.followers.items())
            },
        )

    async def _digest(self, call: StoreDigest) -> PartitionStatus:
        """The digest of the applied state; or of a recount of the log from its first record to the same offset."""
        store = self._store
        partition = store.partitions.get(call.partition)
        if partition is None or (call.partition not in store.replicas and partition.error is None):
            raise UnavailableError(
                f"this store has no copy of partition {call.partition}", code=ErrorCode.NOT_LEADER
            )
        if partition.error is not None:
            error = partition.error
            raise UnavailableError(error.message, code=error.code, retriable=error.retriable)
        if call.recount:
            while partition.applied < partition.high_watermark:
                await store.wait_applied(partition)
            start = partition.index.log_start
            if start > 0:
                raise UnavailableError(
                    f"partition {call.partition} cannot be counted again: its log begins at offset {start}, what lies "
                    f"before is in checkpoints only",
                    retriable=False,
                )
            upto = partition.applied
            counted = Partition(
                call.partition, dedup_window_ns=partition.dedup_window_ns, indexes=store.wal.partitions
            )
            try:
                with self.hold_log(call.partition, 0):
                    await self._offload(functools.partial(replay, store.wal, counted, upto))
            except DamagedError as error:
                store.folding.check_kept(partition)
                store.refuse(partition, error)  # only a recount has looked at what lies below the checkpoint
                raise
            finally:
                # Whatever was found then, or failed: it was another log's.
                store.folding.check_kept(partition)
            judge = counted.judge_digests()  # of the log as it is now: some of it may be dropped later
            totals = await self._offload(counted.fold.digest)
            store.folding.check_kept(partition)
            digest, applied = joined_digest(totals, judge), counted.applied
        else:
            try:
                digest, applied = await store.folding.digest(partition)
            except DamagedError as error:
                self._found_damage(partition, error)
                raise
        status = self._partition_status(call.partition, partition, digest)
        return msgspec.structs.replace(status, applied=applied)
