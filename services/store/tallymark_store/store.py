"""The driver of a store process: one loop around the partitions' cores, the log and the fold.

Owns the order of things, and nothing else: bytes are checked, judged, appended to the log's buffer, synced (by the
log's own thread), answered, folded. Everything runs on the event loop but the log's writes; a slice of work stays
short, so that reads and lease renewals come in between.

What a request waits for: an append for the commit of what its answer says; a read for the fold to reach the high
watermark as it was when the read came.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections import deque
from collections.abc import Callable

import google_crc32c
import msgspec
import numpy as np

from tallymark_protocol.codec import decode, encode
from tallymark_protocol.errors import (
    ErrorCode,
    RemoteProtocolError,
    TallymarkError,
    UnavailableError,
    WireError,
    to_wire,
)
from tallymark_protocol.frames import Frame
from tallymark_protocol.messages import AppendHeader, FrameType
from tallymark_protocol.payload import C_EVENTS, COLUMNS, OK, explain, place_payload, validate_payload
from tallymark_protocol.schema import MetricRecord, decode_record, encode_record
from tallymark_runtime.catalog import MetricCatalog
from tallymark_runtime.clock import Clock
from tallymark_runtime.transport import ServerConnection
from tallymark_store import batch
from tallymark_store.partition import Bytes, Ints, LoggedVerdicts, Partition
from tallymark_store.wal import (
    DamagedError,
    Group,
    Position,
    RecordKind,
    RecordMeta,
    Wal,
    WalThreads,
)

_log = logging.getLogger(__name__)

_APPENDED = int(FrameType.APPENDED)
WAY_OUT = (
    "nothing was dropped. Restore the data directory as a whole from a backup, or this partition from a healthy "
    "copy; until then the partition is refused"
)
FOLD_SLICE_NS = 15_000_000  # of the loop's time at once
BACKLOG_HIGH_BYTES = 192 * 1024 * 1024  # appended and not folded: above it, nothing more is read
BACKLOG_LOW_BYTES = 96 * 1024 * 1024
MARKER_DELAY_S = 0.05  # an idle log is marked within 100 ms of its last sync


class Store:
    """The partitions of one process and their log.

    Args:
        wal: the recovered log.
        partitions: the partitions by number, recovered (see `recovery`).
        catalog: the metrics as the coordinator has them.
        clock: stamps appends.
        pause_reading: called with True when the backlog is too large, with False when it has shrunk.
    """

    def __init__(
        self,
        *,
        wal: Wal,
        partitions: dict[int, Partition],
        catalog: MetricCatalog,
        clock: Clock,
        pause_reading: Callable[[bool], None],
    ) -> None:
        self.wal = wal
        self.partitions = partitions
        self.catalog = catalog
        self.clock = clock
        self.events_folded = 0  # since the start; checkpoints are due by it
        self._pause_reading = pause_reading
        self._paused = False
        self._loop = asyncio.get_running_loop()
        self._flush_due = False
        self._fold_due = False
        self._marker: asyncio.TimerHandle | None = None
        self._backlog_bytes = 0
        self._resolving: set[asyncio.Task[None]] = set()
        self._synced: deque[dict[int, int]] = deque()  # log ends by group, from the log's thread
        self._synced_called = False
        self._sync_waiters: list[asyncio.Future[None]] = []
        self._threads = WalThreads(wal, on_synced=self._synced_in_thread, on_failed=self._failed_in_thread)
        self.stopped = asyncio.Event()  # set when the log failed: the process must end
        catalog.on_change = self._on_metric_change

    # ------------------------------------------------------------ append

    def on_append(self, connection: ServerConnection, frame: Frame) -> None:
        """Take an APPEND frame; it is answered once, now or after its commit."""
        self.wal.poll_space(self.clock.monotonic_ns())
        try:
            self._append(connection, frame.request_id, frame.body, resolved=False)
        except TallymarkError as error:
            connection.respond_error(frame.request_id, error)
        except (
            Exception
        ) as error:  # whatever it is, it must not keep the frames behind this one from their answers
            _log.exception("an append failed")
            connection.respond_error(frame.request_id, error)

    def serving(self, number: int) -> Partition:
        """The partition, if this process leads it.

        Raises:
            UnavailableError: it does not, or the partition's copy here is damaged.
        """
        partition = self.partitions.get(number)
        if partition is None or (partition.epoch == 0 and partition.error is None):
            raise UnavailableError(f"partition {number} is not led by this store", code=ErrorCode.NOT_LEADER)
        if partition.error is not None:
            error = partition.error
            raise UnavailableError(error.message, code=error.code, retriable=error.retriable)
        return partition

    def _append(self, connection: ServerConnection, request_id: int, body: bytes, *, resolved: bool) -> None:
        header_length = int.from_bytes(body[:2], "little")
        header = decode(AppendHeader, body[2 : 2 + header_length])
        partition = self.serving(header.partition)
        payload = np.frombuffer(body, dtype=np.uint8, offset=min(2 + header_length, len(body)))
        if len(payload) == 0 or google_crc32c.value(payload) != header.checksum:
            raise RemoteProtocolError("malformed payload: its checksum does not match")
        columns = np.zeros(COLUMNS, dtype=np.int64)
        status = validate_payload(payload, 0, len(payload), columns)
        if status != OK:
            raise explain(status, "payload")
        if partition.schemas_stale:
            self.refresh_schemas(partition)  # before the codes are looked up: a deleted metric takes no event
        slots = partition.schemas.slots_of(payload, columns)
        if not resolved and (header.metrics_revision > self.catalog.revision or bool((slots < 0).any())):
            self._resolve(connection, request_id, body, partition, payload, columns, header.metrics_revision)
            return
        self._append_judged(connection, request_id, header, partition, payload, columns, slots)

    def _append_judged(
        self,
        connection: ServerConnection,
        request_id: int,
        header: AppendHeader,
        partition: Partition,
        payload: Bytes,
        columns: Ints,
        slots: Ints,
    ) -> None:
        self._begin_epoch(partition)
        # Judging first and finding no room then would mean to take every id out of the index again.
        self.wal.check_room(batch.encoded_bytes_max(len(payload), int(columns[C_EVENTS])))
        base = partition.log_end
        read = functools.partial(self.read_verdicts, partition.partition)
        try:
            prepared = partition.prepare(payload, columns, header.checksum, slots, self.clock.now_ns(), read)
            if prepared.record is not None:
                meta = RecordMeta(
                    partition.partition,
                    RecordKind.EVENTS,
                    partition.epoch,
                    base,
                    prepared.event_count,
                    prepared.append_ns,
                    prepared.min_time_ns,
                    prepared.max_time_ns,
                )
                self.wal.append(meta, prepared.record)
        except BaseException:
            # Whatever it was, the log does not hold these events: their ids must not stand for anything.
            partition.back_out(base, columns)
            raise
        if prepared.record is not None:
            partition.appended(prepared)
            self._backlog_bytes += len(payload)
            self._poke()
        answer = encode(prepared.answer)
        if header.is_async and not prepared.relies_on_commit:
            connection.respond(request_id, _APPENDED, answer)
            return
        partition.wait_commit(
            prepared.commit_offset, functools.partial(connection.respond, request_id, _APPENDED, answer)
        )

    def _resolve(
        self,
        connection: ServerConnection,
        request_id: int,
        body: bytes,
        partition: Partition,
        payload: Bytes,
        columns: Ints,
        revision: int,
    ) -> None:
        """Have the codes that the partition lacks read from the coordinator, then judge."""

        async def resolve() -> None:
            try:
                await self.catalog.wait_revision(revision)
                await self.catalog.catch_up()
                for code in partition.missing_codes(payload, columns):
                    record = self.catalog.get(code)
                    if record is not None and partition.schemas.slot_of(code) < 0:
                        self.append_schema(self.serving(partition.partition), record)
                self._append(connection, request_id, body, resolved=True)
            except TallymarkError as error:
                connection.respond_error(request_id, error)
            except Exception as error:
                _log.exception("an append failed")
                connection.respond_error(request_id, error)

        task = self._loop.create_task(resolve())
        self._resolving.add(task)
        task.add_done_callback(self._resolving.discard)

    def read_verdicts(self, partition: int, offset: int) -> LoggedVerdicts:
        """The verdict column of the batch at `offset`, to answer a repeat as it was answered first."""
        try:
            found = self.wal.read(partition, offset)
        except DamagedError as error:
            self.refuse(self.partitions[partition], error)
            raise
        assert found is not None, "the producer windows know only what the log holds"
        meta, body = found
        view = batch.parse(body, 0, len(body))
        return LoggedVerdicts(meta.base_offset, view.verdicts, view.originals)

    def refuse(self, partition: Partition, error: DamagedError) -> None:
        """A read found damage: serve the partition no more, now and after a restart."""
        _log.error("%s", error.message)
        self.wal.mark_damaged(partition.partition)
        wire = to_wire(error)
        if partition.error is None:
            partition.error = WireError(wire.code, False, f"{wire.message}; {WAY_OUT}", wire.details)
        if self.wal.write_marker():
            self._threads.wake()

    # ------------------------------------------------------------ control records

    def append_schema(self, partition: Partition, record: MetricRecord) -> None:
        """Write a metric's schema into a partition: from here on it is judged and folded by it."""
        self._begin_epoch(partition)
        offset = partition.log_end
        append_ns = partition.stamp(self.clock.now_ns())
        meta = RecordMeta(
            partition.partition,
            RecordKind.SCHEMA,
            partition.epoch,
            offset,
            1,
            append_ns,
            append_ns,
            append_ns,
        )
        self.wal.append(meta, [encode_record(record)])
        partition.appended_schema(record, offset, append_ns)
        self._poke()

    def start_epoch(self, partition: Partition, epoch: int) -> None:
        """Begin to lead: the epoch's first record. The partition serves once it is committed."""
        offset = partition.log_end
        append_ns = partition.stamp(self.clock.now_ns())
        meta = RecordMeta(
            partition.partition, RecordKind.EPOCH_START, epoch, offset, 1, append_ns, append_ns, append_ns
        )
        self.wal.append(meta, [encode({"epoch": epoch})])
        partition.appended_control(offset, append_ns)
        self._poke()

    def _begin_epoch(self, partition: Partition) -> None:
        """Write the epoch's first record, if there was no room for it when the epoch began."""
        if partition.epoch_due:
            self.start_epoch(partition, partition.epoch)
            partition.epoch_due = False

    def _on_metric_change(self, record: MetricRecord) -> None:
        """A metric was changed or deleted: every partition that knows it learns of it now."""
        for partition in self.partitions.values():
            if partition.error is None and partition.epoch:
                try:
                    self._update_schema(partition, record)
                except TallymarkError as error:
                    # No room, or the log is failing: it is due before the next append. The other partitions
                    # must learn of the change all the same.
                    _log.warning("a metric's change waits to be written: %s", error)
                    partition.schemas_stale = True

    def _update_schema(self, partition: Partition, record: MetricRecord) -> None:
        slot = partition.schemas.slot_of_uid(record.uid)
        if slot < 0:
            return  # written before the first batch that is judged by it
        known = partition.schemas.record(slot)
        if not known.deleted and (record.deleted or known.version < record.version):
            self.append_schema(partition, record)

    def refresh_schemas(self, partition: Partition) -> None:
        """Bring a partition's metrics to what the catalog knows: changes made while nobody led it, or no room was.

        Raises:
            LogFullError, LogBusyError: there is no room now.
        """
        partition.schemas_stale = True
        current = {record.uid: record for record in self.catalog.all()}
        for slot in range(partition.schemas.count):
            known = partition.schemas.record(slot)
            if known.uid in current:
                self._update_schema(partition, current[known.uid])
            elif known.uid <= self.catalog.revision:  # else the catalog has not heard of it yet
                self._update_schema(partition, msgspec.structs.replace(known, deleted=True))
        partition.schemas_stale = False

    # ------------------------------------------------------------ sync and commit

    def _poke(self) -> None:
        """Let the log sync what was appended in this tick of the loop."""
        if not self._flush_due:
            self._flush_due = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_due = False
        self._threads.wake()

    def start(self) -> None:
        """Start the log's threads."""
        self._threads.start()

    def _synced_in_thread(self, group: Group) -> None:
        self._synced.append(group.log_ends)
        # One wake-up takes in every group that was synced by the time it runs.
        if not self._synced_called:
            self._synced_called = True
            self._loop.call_soon_threadsafe(self._take_synced)

    def _failed_in_thread(self, error: BaseException) -> None:
        self._loop.call_soon_threadsafe(self._on_failed, error)

    def _take_synced(self) -> None:
        # Cleared before looking: a group that is added after the look finds it cleared and calls again.
        self._synced_called = False
        while self._synced:
            self._on_synced(self._synced.popleft())
        waiting, self._sync_waiters = self._sync_waiters, []
        for future in waiting:
            if not future.done():
                future.set_result(None)

    async def _wait_sync(self) -> None:
        if self.stopped.is_set():
            raise UnavailableError("the log has failed")
        future = self._loop.create_future()
        self._sync_waiters.append(future)
        self._threads.wake()
        await future

    async def wait_synced(self, position: Position) -> None:
        """Wait until everything of the log below `position` is durable."""
        while not self.wal.is_synced(position):
            await self._wait_sync()

    async def wait_committed(self, partition: Partition, offset: int) -> None:
        """Wait until everything of a partition below `offset` is committed."""
        while partition.high_watermark < offset:
            await self._wait_sync()

    def _on_synced(self, log_ends: dict[int, int]) -> None:
        """Everything of these partitions below these offsets is durable."""
        for number, end in log_ends.items():
            partition = self.partitions.get(number)
            if partition is None:
                continue
            for send in partition.commit(min(end, partition.log_end)):
                send()
        if self._marker is not None:
            self._marker.cancel()
        self._marker = self._loop.call_later(MARKER_DELAY_S, self._mark)
        self._fold_soon()

    def _on_failed(self, error: BaseException) -> None:
        """The log failed: what is on disk is unknown, so nothing more is answered and the process ends."""
        _log.critical("the log failed", exc_info=error)
        wire = to_wire(error)
        for partition in self.partitions.values():
            partition.error = WireError(int(ErrorCode.PARTITION_UNAVAILABLE), True, wire.message)
            partition.fail_waiting()
        self.stopped.set()
        waiting, self._sync_waiters = self._sync_waiters, []
        for future in waiting:
            if not future.done():
                future.set_result(None)  # they look again, and find the log failed

    def _mark(self) -> None:
        self._marker = None
        if self.wal.write_marker():
            self._threads.wake()

    # ------------------------------------------------------------ fold

    def _fold_soon(self) -> None:
        if not self._fold_due:
            self._fold_due = True
            self._loop.call_soon(self._fold_slice)

    def _fold_slice(self) -> None:
        self._fold_due = False
        deadline = self.clock.monotonic_ns() + FOLD_SLICE_NS
        behind = False
        for partition in self.partitions.values():
            while partition.fold_behind and self.clock.monotonic_ns() < deadline:
                self._fold_one(partition)
            behind = behind or partition.fold_behind
        if behind:
            self._fold_soon()
        if self._backlog_bytes > BACKLOG_HIGH_BYTES and not self._paused:
            self._paused = True
            self._pause_reading(True)
        elif self._paused and self._backlog_bytes < BACKLOG_LOW_BYTES:
            self._paused = False
            self._pause_reading(False)

    def _fold_one(self, partition: Partition) -> None:
        try:
            events, size = partition.fold_step()
        except Exception as error:
            self._on_failed(error)  # totals that lack a record must not be told to anybody
            raise
        self.events_folded += events
        self._backlog_bytes -= size

    async def wait_applied(self, partition: Partition) -> None:
        """Wait until the fold has reached the high watermark as it is now."""
        target = partition.high_watermark
        deadline = self.clock.monotonic_ns() + FOLD_SLICE_NS
        while partition.fold.applied < target:
            self._fold_one(partition)
            if self.clock.monotonic_ns() > deadline:
                await asyncio.sleep(0)
                deadline = self.clock.monotonic_ns() + FOLD_SLICE_NS

    # ------------------------------------------------------------ end

    async def close(self) -> None:
        """Sync what is buffered, mark the log, and stop."""
        if self._marker is not None:
            self._marker.cancel()
        for task in list(self._resolving):
            task.cancel()
        # The thread syncs what is buffered and marks the log; its callbacks still come to this loop.
        await asyncio.to_thread(self._threads.close)
        self._take_synced()
        if self._marker is not None:
            self._marker.cancel()
        for partition in self.partitions.values():
            while partition.error is None and partition.fold_behind:
                self._fold_one(partition)


def replay(wal: Wal, partition: Partition, upto: int | None = None) -> int:
    """Fold what the log holds of a partition from `fold.applied` on; returns the number of records.

    Raises:
        DamagedError: a record cannot be trusted.
    """
    count = 0
    index = partition.index
    end = index.log_end if upto is None else upto
    columns = np.zeros(COLUMNS, dtype=np.int64)
    while partition.fold.applied < end:
        found = wal.read(partition.partition, partition.fold.applied)
        assert found is not None, "the log holds everything from the checkpoint on"
        meta, body = found
        replay_record(partition, meta, body, columns)
        count += 1
    return count


def replay_record(partition: Partition, meta: RecordMeta, body: Bytes, columns: Ints) -> None:
    """Put one logged record's effect into a partition's state."""
    if meta.kind == RecordKind.EVENTS:
        view = batch.parse(body, 0, len(body))
        status = place_payload(view.data, view.payload_base, view.payload_length, columns)
        if status != OK:
            raise explain(status, "logged payload")
        partition.replay_batch(view, columns, meta.base_offset, meta.append_ns)
        return
    if meta.kind == RecordKind.SCHEMA:
        record = decode_record(body.tobytes())
        partition.schemas.put(record, meta.base_offset)
        partition.fold.put_schema(record, meta.base_offset)
    partition.last_append_ns = max(partition.last_append_ns, meta.append_ns)
    partition.fold.advance(meta.base_offset + meta.count)
