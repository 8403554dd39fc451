"""Appends: from a gateway's request to records in the log, and to the answer once they are committed.

Owns the order in which bytes are checked, judged, written and remembered, and the control records that a leader
writes: epoch starts, schemas, memberships. Nothing here waits but for codes that a partition lacks, which are read
from the coordinator first.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from typing import TYPE_CHECKING, Protocol

import google_crc32c
import msgspec
import numpy as np

from tallymark_protocol.codec import decode, encode
from tallymark_protocol.errors import (
    BackpressureError,
    ErrorCode,
    RemoteProtocolError,
    TallymarkError,
    UnavailableError,
    WireError,
)
from tallymark_protocol.messages import AppendHeader, FrameType
from tallymark_protocol.payload import C_EVENTS, COLUMNS, OK, explain, validate_payload
from tallymark_protocol.schema import MetricRecord, encode_record
from tallymark_store import batch
from tallymark_store.dedup import IdFileError
from tallymark_store.partition import Partition
from tallymark_store.prepared import Bytes, Ints, LoggedVerdicts
from tallymark_store.replication.membership import encode_members
from tallymark_store.replication.ports import Membership
from tallymark_store.wal import DamagedError, RecordKind, RecordMeta

if TYPE_CHECKING:
    from tallymark_protocol.frames import Frame
    from tallymark_store.store import Store

_log = logging.getLogger(__name__)

_APPENDED = int(FrameType.APPENDED)
_DEPOSED = WireError(
    int(ErrorCode.NOT_LEADER),
    True,
    "this store stopped leading the partition before the events were committed: send the same bytes to the leader",
)


class Requester(Protocol):
    """Where an answer goes: a server's connection."""

    def respond(self, request_id: int, kind: int, body: bytes) -> None:
        """Answer a request."""
        ...

    def respond_error(self, request_id: int, error: BaseException | WireError) -> None:
        """Answer a request with an error."""
        ...


class Appends:
    """What a store does with APPEND frames, as leader. Part of `store.Store`."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._wal = store.wal
        self._clock = store.clock
        self._catalog = store.catalog
        self._loop = asyncio.get_running_loop()
        self._resolving: set[asyncio.Task[None]] = set()

    # ------------------------------------------------------------ events

    def on_append(self, connection: Requester, frame: Frame) -> None:
        """Take an APPEND frame; it is answered once, now or after its commit."""
        self._wal.poll_space(self._clock.monotonic_ns())
        try:
            self._append(connection, frame.request_id, frame.body, resolved=False)
        except TallymarkError as error:
            connection.respond_error(frame.request_id, error)
        except (
            Exception
        ) as error:  # whatever it is, it must not keep the frames behind this one from their answers
            _log.exception("an append failed")
            connection.respond_error(frame.request_id, error)

    def _append(self, connection: Requester, request_id: int, body: bytes, *, resolved: bool) -> None:
        header_length = int.from_bytes(body[:2], "little")
        header = decode(AppendHeader, body[2 : 2 + header_length])
        partition = self._store.taking_appends(header.partition)
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
        if not resolved and (header.metrics_revision > self._catalog.revision or bool((slots < 0).any())):
            self._resolve(connection, request_id, body, partition, payload, columns, header.metrics_revision)
            return
        self._append_judged(connection, request_id, header, partition, payload, columns, slots)

    def _append_judged(
        self,
        connection: Requester,
        request_id: int,
        header: AppendHeader,
        partition: Partition,
        payload: Bytes,
        columns: Ints,
        slots: Ints,
    ) -> None:
        # Judging first and finding no room then would mean to take every id out of the index again.
        self._wal.check_room(batch.encoded_bytes_max(len(payload), int(columns[C_EVENTS])))
        now_ns = self._now_ns(partition)
        base = partition.log_end
        read = functools.partial(self.read_verdicts, partition.partition)
        try:
            prepared = partition.prepare(payload, columns, header.checksum, slots, now_ns, read)
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
                self._wal.append(meta, prepared.record)
        except BaseException as error:
            # Whatever it was, the log does not hold these events: their ids must not stand for anything.
            partition.back_out(base, columns)
            if isinstance(error, IdFileError):
                # Without it nobody can say which events are new: others have to, if there are others.
                number = partition.partition
                damage = DamagedError(f"partition {number}: {error}", partition=number)
                self._store.refuse(partition, damage)
                raise damage from error
            raise
        if prepared.record is not None:
            partition.appended(prepared)
            self._store.folding.backlog_bytes += len(payload)
            self._store.poke(partition.partition)
        self._store.counters.judged(prepared, int(columns[C_EVENTS]))
        answer = encode(prepared.answer)
        if header.is_async and not prepared.relies_on_commit:
            connection.respond(request_id, _APPENDED, answer)
            return
        partition.wait_commit(
            prepared.commit_offset,
            functools.partial(connection.respond, request_id, _APPENDED, answer),
            functools.partial(connection.respond_error, request_id, _DEPOSED),
        )

    def _resolve(
        self,
        connection: Requester,
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
                await self._catalog.wait_revision(revision)
                await self._catalog.catch_up()
                for code in partition.missing_codes(payload, columns):
                    record = self._catalog.get(code)
                    if record is not None:
                        # Looked up again each time: the partition may have lost its leadership meanwhile.
                        leading = self._store.taking_appends(partition.partition)
                        if leading.schemas.slot_of(code) < 0:
                            self.append_schema(leading, record)
                self._append(connection, request_id, body, resolved=True)
            except TallymarkError as error:
                connection.respond_error(request_id, error)
            except Exception as error:
                _log.exception("an append failed")
                connection.respond_error(request_id, error)

        task = self._loop.create_task(resolve())
        self._resolving.add(task)
        task.add_done_callback(self._resolving.discard)

    def cancel(self) -> None:
        """Give up what waits for the coordinator."""
        for task in list(self._resolving):
            task.cancel()

    def read_verdicts(self, partition: int, offset: int) -> LoggedVerdicts:
        """The verdict column of the batch at `offset`, to answer a repeat as it was answered first."""
        try:
            found = self._wal.read(partition, offset)
        except DamagedError as error:
            self._store.refuse(self._store.partitions[partition], error)
            raise
        assert found is not None, "the producer windows know only what the log holds"
        meta, body = found
        view = batch.parse(body, 0, len(body))
        return LoggedVerdicts(meta.base_offset, view.verdicts, view.originals)

    def _now_ns(self, partition: Partition) -> int:
        """The wall time to stamp a record with.

        Raises:
            UnavailableError: this node's clock is too far from those of a majority.
        """
        now_ns = self._clock.now_ns()
        fault = self._store.replicating.fitness.clock_fault(partition.partition, now_ns)
        if fault:
            raise UnavailableError(fault, code=ErrorCode.NOT_LEADER)
        return now_ns

    # ------------------------------------------------------------ control records

    def _write(self, partition: Partition, kind: RecordKind, epoch: int, payload: bytes) -> tuple[int, int]:
        """Append a control record of this leadership; returns its offset and append time."""
        offset = partition.log_end
        append_ns = partition.stamp(self._now_ns(partition))
        meta = RecordMeta(partition.partition, kind, epoch, offset, 1, append_ns, append_ns, append_ns)
        self._wal.append(meta, [payload])
        return offset, append_ns

    def append_schema(self, partition: Partition, record: MetricRecord) -> None:
        """Write a metric's schema into a partition: from here on it is judged and folded by it."""
        offset, append_ns = self._write(partition, RecordKind.SCHEMA, partition.epoch, encode_record(record))
        partition.appended_schema(record, offset, append_ns)
        self._store.poke(partition.partition)

    def start_epoch(self, partition: Partition, epoch: int) -> None:
        """Begin to lead: the epoch's first record. The partition serves once it is committed."""
        offset, append_ns = self._write(partition, RecordKind.EPOCH_START, epoch, encode({"epoch": epoch}))
        partition.appended_control(offset, append_ns)
        self._store.poke(partition.partition)

    def append_membership(self, partition: Partition, epoch: int, membership: Membership) -> None:
        """Write who makes the quorum from here on."""
        offset, append_ns = self._write(
            partition, RecordKind.MEMBERSHIP, epoch, encode_members(membership.members)
        )
        partition.appended_control(offset, append_ns)
        self._store.poke(partition.partition)

    # ------------------------------------------------------------ metrics

    def on_metric_change(self, record: MetricRecord) -> None:
        """A metric was changed or deleted: every partition that is led here and knows it learns of it now."""
        for number in sorted(self._store.partitions):
            partition = self._store.partitions[number]
            if partition.error is not None or not partition.epoch:
                continue
            if not self._store.accepts_appends(number):
                partition.schemas_stale = True
                continue
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
            UnavailableError: this node's clock must not stamp.
        """
        partition.schemas_stale = True
        current = {record.uid: record for record in self._catalog.all()}
        for slot in range(partition.schemas.count):
            known = partition.schemas.record(slot)
            if known.uid in current:
                self._update_schema(partition, current[known.uid])
            elif known.uid <= self._catalog.newest_uid:  # else the catalog has not heard of it yet
                self._update_schema(partition, msgspec.structs.replace(known, deleted=True))
        partition.schemas_stale = False

    def try_refresh_schemas(self, partition: Partition) -> None:
        """Likewise, at the beginning of a leadership; where there is no room, before the next append."""
        try:
            self.refresh_schemas(partition)
        except (BackpressureError, UnavailableError) as error:
            _log.warning("changes of metrics wait to be written: %s", error)
