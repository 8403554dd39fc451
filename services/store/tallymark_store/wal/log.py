"""The write-ahead log as a whole: one object per store process, for all its partitions.

`open_wal` recovers what is there and returns a `Wal`. Appending, group commit, reading and recycling meet
here, under one lock that is never held over a write or sync, so that the loop may append while a thread syncs
(`threads.WalThreads`). A driver without threads, such as a simulator, calls `sync_all` instead.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import google_crc32c
import msgspec
import numpy as np

from tallymark_runtime.disk import BytesLike, Disk, DiskError, FileMissingError
from tallymark_runtime.instruments import Histogram
from tallymark_store.wal.errors import DamagedError, LogFailedError, LogFullError
from tallymark_store.wal.format import (
    LOG_ID_BYTES,
    RECORD_HEADER_BYTES,
    SEGMENT_BYTES_DEFAULT,
    SEGMENT_HEADER_BYTES,
    ByteArray,
    Position,
    RecordMeta,
    parse_record_header,
    salt_of,
    segment_name,
)
from tallymark_store.wal.index import PartitionIndex
from tallymark_store.wal.recovery import Recovered, Recovery, WalStart, recover
from tallymark_store.wal.segments import SegmentStore
from tallymark_store.wal.writer import BUFFER_BYTES_MAX, Group, WalWriter

SPACE_RETRY_NS = 1_000_000_000  # between two attempts to find room


class WalConfig(msgspec.Struct, frozen=True):
    """What can be set about a log."""

    segment_bytes: int = SEGMENT_BYTES_DEFAULT
    log_bytes_max: int | None = None  # of all segment files together; None: as the disk allows
    buffer_bytes_max: int = BUFFER_BYTES_MAX  # accepted and not yet synced


def open_wal(
    disk: Disk, *, new_log_id: bytes, config: WalConfig | None = None, start: WalStart | None = None
) -> tuple[Wal, Recovery]:
    """Open the log in a folder of its own, or begin one there; return it and what recovery found.

    `new_log_id` is 16 random bytes, used if the folder is empty. `start` comes from the newest checkpoint, if
    there is one. The caller looks at `Recovery.is_damaged` before it uses a partition's copy. Raises DiskError
    if the disk fails, LogVersionError if the log is of another version.
    """
    assert len(new_log_id) == LOG_ID_BYTES, "a log id has 16 bytes"
    config = config or WalConfig()
    recovered = recover(disk, new_log_id=new_log_id, start=start)
    wal = Wal(disk, recovered, config)
    wal.begin()
    return wal, recovered.recovery


class Wal:
    """An open log. Made by `open_wal`."""

    def __init__(self, disk: Disk, recovered: Recovered, config: WalConfig) -> None:
        self._lock = threading.Lock()
        self._store = SegmentStore(
            disk, recovered.log_id, segment_bytes=config.segment_bytes, log_bytes_max=config.log_bytes_max
        )
        self._store.adopt(recovered.sizes, recovered.ready, recovered.next_segment)
        self._log_id = recovered.log_id
        self._partitions = recovered.replay.partitions
        self._writer = WalWriter(
            recovered.log_id,
            take_segment=self._take_segment,
            partitions=self._partitions,
            end=recovered.end,
            segment_size=recovered.room,
            next_number=recovered.number,
            unproven=recovered.recovery.unproven,
            marker_due=recovered.marker_due,
            buffer_bytes_max=config.buffer_bytes_max,
        )
        self._space_retry_ns = 0  # not before this is room looked for again
        # Called when a segment should be prepared ahead, by whoever holds the lock: must only pass it on.
        self.on_prepare_needed: Callable[[], None] | None = None
        # Called once, in whichever thread it happens, when the log has failed.
        self.on_failed: Callable[[BaseException], None] | None = None
        self._needs_segment = recovered.room == SEGMENT_HEADER_BYTES
        # Written by the thread that syncs, for telemetry.
        self.sync_ns = Histogram()  # of a group's write and sync together
        self.synced_bytes = 0

    def begin(self) -> None:
        """Finish opening: have a segment to write to, and note durably what recovery has relied upon."""
        if self._needs_segment:
            self._store.prepare_ahead()
        self.write_marker()
        self.sync_all()

    # Appending.

    def append(self, meta: RecordMeta, parts: Sequence[BytesLike]) -> None:
        """Take a record; it is readable at once and durable after the sync of its group.

        `meta.base_offset` is the partition's log end. `parts` are kept as they are until then: don't change
        them. Raises LogFullError or LogBusyError (nothing was taken; back off), DamagedError or LogFailedError.
        """
        try:
            with self._lock:
                self._writer.append(meta, parts)
        except DiskError as error:
            self.fail(error)
            raise LogFailedError(f"the log has failed: {error}") from error

    def truncate(self, partition: int, new_end: int, *, epoch: int, append_ns: int) -> int:
        """Cut a partition's log between two records, by a record of its own. Raises as `append` does.

        Returns the number of the group that holds it: groups before it say nothing of this partition any more.
        """
        try:
            with self._lock:
                return self._writer.truncate(partition, new_end, epoch=epoch, append_ns=append_ns)
        except DiskError as error:
            self.fail(error)
            raise LogFailedError(f"the log has failed: {error}") from error

    def reset(self, partition: int, log_start: int, *, epoch: int, append_ns: int) -> int:
        """Discard a partition's copy; a new one begins, empty and undamaged, at `log_start`.

        `epoch` and `append_ns` are those of the record that ended there; 0 at offset 0.

        Returns a group's number, as `truncate` does.
        """
        try:
            with self._lock:
                return self._writer.reset(partition, log_start, epoch=epoch, append_ns=append_ns)
        except DiskError as error:
            self.fail(error)
            raise LogFailedError(f"the log has failed: {error}") from error

    def mark_damaged(self, partition: int) -> None:
        """Refuse appends to a copy that was found damaged later (by a read), also after a restart."""
        with self._lock:
            self._writer.mark_damaged(partition)

    @property
    def buffer_bytes(self) -> int:
        """How much was accepted and isn't durable yet: what back-pressure goes by."""
        return self._writer.buffer_bytes

    @property
    def failed(self) -> bool:
        """Whether a write or sync has failed: nothing is taken any more, and the process is to end."""
        return self._writer.failure is not None

    @property
    def idle(self) -> bool:
        """Whether everything that was accepted is durable."""
        return self._writer.idle

    # Syncing: take a group, write it, note it; by one thread at a time.

    def take_group(self) -> Group | None:
        """Return what arrived since the last call, to be written next; None if nothing did."""
        with self._lock:
            return self._writer.take_group()

    def write_group(self, group: Group) -> None:
        """Write and sync a taken group. On any exception call `fail`."""
        self._store.file(group.start.segment).write_sync(group.start.position, group.parts)

    def synced(self, group: Group) -> None:
        """Note that a group is durable. Its `log_ends` may be acknowledged now."""
        with self._lock:
            self._writer.synced(group)

    def fail(self, error: BaseException) -> bool:
        """Refuse everything from now on; return whether this is the first failure, which `on_failed` is told."""
        with self._lock:
            first = self._writer.fail(error)
        if first and self.on_failed is not None:
            self.on_failed(error)
        return first

    def sync_all(self) -> list[Group]:
        """Write and sync everything that waits, here and now; return the groups. Raises DiskError."""
        groups: list[Group] = []
        while (group := self.take_group()) is not None:
            try:
                self.write_group(group)
            except DiskError as error:
                self.fail(error)
                raise
            self.synced(group)
            groups.append(group)
        return groups

    @property
    def next_group(self) -> int:
        """The number of the group that the next record goes into at the earliest: what is older says nothing of it."""
        with self._lock:
            return self._writer.next_group

    @property
    def synced_end(self) -> Position:
        """Everything below is durable."""
        return self._writer.synced_end

    @property
    def needs_marker(self) -> bool:
        """Whether the log is idle without a marker: due within 100 ms of the last sync."""
        return self._writer.needs_marker

    def write_marker(self) -> bool:
        """Queue a marker if one is needed; return whether it was. It is written like any group."""
        try:
            with self._lock:
                return self._writer.write_marker()
        except DiskError as error:
            self.fail(error)
            raise

    # Space.

    @property
    def full(self) -> bool:
        """Whether there was no room for another segment: appends go on only as far as the present one goes."""
        return self._store.full

    def check_room(self, payload_bytes: int) -> None:
        """Raise LogFullError if the log is full and a record with such a payload may not fit any more.

        `append` finds that out by itself; this is for callers who would do much in vain before.
        """
        if self._store.full:
            with self._lock:
                if not self._writer.fits(payload_bytes):
                    raise LogFullError(self._store.full_reason)

    @property
    def total_bytes(self) -> int:
        """The size of all segment files."""
        return self._store.total_bytes

    def _take_segment(self, bytes_min: int) -> tuple[int, int]:
        taken = self._store.take(bytes_min)
        if self.on_prepare_needed is not None:
            self.on_prepare_needed()
        return taken

    def prepare_ahead(self) -> None:
        """Prepare the next segment, if it isn't there; for a thread that may wait. Raises DiskError."""
        self._store.prepare_ahead()

    def poll_space(self, now_ns: int) -> None:
        """Look for room again if the log is full, at most once a second."""
        if not self._store.full or now_ns < self._space_retry_ns or self.failed:
            return
        self._space_retry_ns = now_ns + SPACE_RETRY_NS
        if self.on_prepare_needed is not None:
            self.on_prepare_needed()
        else:
            self._store.prepare_ahead()

    def trim(self, segment: int) -> None:
        """Forget the records below `segment`: the first step of removing them."""
        with self._lock:
            for index in self._partitions.values():
                index.trim(segment)

    def remove_segments_before(self, segment: int) -> int:
        """Remove segments below `segment`; return the bytes that became free.

        To be called after `trim(segment)`, and when a checkpoint is durable whose `snapshot` was taken after
        that and lies at or behind `segment`: without one, the log can't be read any more. Waits for the disk, and
        holds up nobody else: nothing refers to these files any more.
        """
        with self._lock:
            floor = min(segment, self._writer.synced_end.segment)
            for index in self._partitions.values():
                rows = index.column("segment", 0, min(1, len(index)))
                assert not len(rows) or rows[0] >= floor, "trimmed first"
        return self._store.remove_before(floor)

    # Reading.

    @property
    def partitions(self) -> dict[int, PartitionIndex]:
        """The indexes by partition. Only to be read."""
        return self._partitions

    @property
    def log_id(self) -> bytes:
        """What tells this log from every other one; 16 random bytes, made with its first segment."""
        return self._log_id

    def log_end(self, partition: int) -> int:
        """Return the partition's log end offset; 0 if nothing was ever written."""
        index = self._partitions.get(partition)
        return 0 if index is None else index.log_end

    def read(self, partition: int, offset: int) -> tuple[RecordMeta, ByteArray] | None:
        """Return the record that takes `offset`, synced or not; None if the log doesn't hold it.

        Raises DamagedError as `read_record` does.
        """
        index = self._partitions.get(partition)
        row = -1 if index is None else index.find(offset)
        return None if row < 0 else self.read_record(partition, row)

    def read_record(self, partition: int, row: int) -> tuple[RecordMeta, ByteArray]:
        """Return a record by its row in the partition's index: what is known of it, and its payload.

        The payload is a read-only view, good for as long as it is kept. Its checksum is verified on every read:
        DamagedError if it fails (call `mark_damaged`), DiskError if the disk can't be read.
        """
        meta, parts = self.read_parts(partition, row)
        if len(parts) == 1 and isinstance(parts[0], np.ndarray) and not parts[0].flags.writeable:
            return meta, parts[0]
        return meta, np.frombuffer(b"".join(bytes(part) for part in parts), np.uint8)

    def read_parts(self, partition: int, row: int) -> tuple[RecordMeta, Sequence[BytesLike]]:
        """Return a record as `read_record` does, its payload in pieces: of one that isn't synced those it came in."""
        index = self._partitions[partition]
        place = index.row(row)
        with self._lock:
            waiting = self._writer.unsynced.get((place.segment, place.position))
        if waiting is not None:
            return waiting
        try:
            data = self._store.map(place.segment)
        except FileMissingError as error:
            raise self._damaged(partition, place.segment, place.position, "its file is missing") from error
        salt = salt_of(self._log_id, place.segment)
        header = parse_record_header(salt, data, place.position, own=place.position)
        # Of the right place with a right checksum, it can only be another partition's by a defect of ours.
        if header is None or (header.meta.partition, header.meta.base_offset, header.payload_bytes) != (
            partition,
            place.base_offset,
            place.length,
        ):
            raise self._damaged(partition, place.segment, place.position, "its header is bad")
        start = place.position + RECORD_HEADER_BYTES
        payload = data[start : start + place.length]
        if len(payload) != place.length or google_crc32c.extend(salt, payload) != header.payload_crc:
            raise self._damaged(partition, place.segment, place.position, "its checksum is wrong")
        return header.meta, (payload,)

    @staticmethod
    def _damaged(partition: int, segment: int, position: int, what: str) -> DamagedError:
        return DamagedError(
            f"partition {partition}: a record at {segment_name(segment)}:{position} can't be read: {what}",
            partition=partition,
            segment=segment,
            position=position,
        )

    def open_segment_map(self, segment: int) -> ByteArray:
        """Return a read-only view of a whole segment file, for scans by the columns of an index.

        Nothing in it is verified, and only what is synced is sure to be there.
        """
        return self._store.map(segment)

    def snapshot(self) -> WalStart:
        """Return the log's state for a checkpoint, as of everything appended so far.

        To be kept only once `is_synced(start.position)`.
        """
        with self._lock:
            position, number = self._writer.cut()
            copies = {
                partition: PartitionIndex.from_arrays(index.to_arrays())
                for partition, index in self._partitions.items()
            }
            return WalStart(self._log_id, position, number, copies, self._writer.unproven)

    def is_synced(self, position: Position) -> bool:
        """Say whether everything below `position` is durable."""
        with self._lock:
            return self._writer.synced_end >= position

    def close(self) -> None:
        """Close the files. What isn't synced by now is lost."""
        self._store.close()
