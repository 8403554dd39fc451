"""The log's writer: gives every record its place at once, gathers records into groups, tracks what is synced.

Pure but for `take_segment`, which hands out prepared segment files. The life of a group::

    append ... append        take_group            (write, sync)          synced
    open ------------------> in flight ----------------------------------> gone
              a record that doesn't fit closes it: pending

Places are given at append, in prepared files, with room kept for a marker behind every record: what has been
accepted can't fail for lack of space. A record that can't surely be stored is refused before anything has
changed. One group is one write and one sync, wholly inside a segment.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import google_crc32c

from tallymark_runtime.disk import BytesLike
from tallymark_store.wal.errors import DamagedError, LogBusyError, LogFailedError, LogFullError
from tallymark_store.wal.format import (
    ENTRY_DAMAGED,
    FLAG_COMPLETE,
    FLAG_MARKER,
    GROUP_BYTES_MAX,
    GROUP_HEADER_BYTES,
    INTERNAL_KINDS,
    PAYLOAD_BYTES_MAX,
    RECORD_HEADER_BYTES,
    SEGMENT_HEADER_BYTES,
    GroupHeader,
    MarkerEntry,
    Position,
    RecordKind,
    RecordMeta,
    align,
    crc_of_parts,
    marker_bytes,
    pack_group_header,
    pack_marker,
    pack_record_header,
    padding,
    record_bytes,
    salt_of,
)
from tallymark_store.wal.index import PartitionIndex

BUFFER_BYTES_MAX = 256 * 1024 * 1024  # accepted and not yet synced
MARKER_SLACK = 8  # partitions that may turn up between an append and its marker
_PADS = tuple(bytes(count) for count in range(8))


class Group:
    """Records (or a marker) that are written and synced together.

    `parts` are the bytes, to be written from `start.position` of segment `start.segment` on. `log_ends` are the
    log ends of the partitions that it touches, once it is synced. `truncated` holds the partitions of which it
    contains a truncation or reset.
    """

    __slots__ = (
        "count",
        "end",
        "flags",
        "header_pending",
        "keys",
        "log_ends",
        "number",
        "parts",
        "start",
        "table_crc",
        "truncated",
    )

    def __init__(self, number: int, start: Position) -> None:
        self.number = number
        self.start = start
        self.end = start.position + GROUP_HEADER_BYTES  # of its bytes, before alignment
        self.flags = 0
        self.table_crc = 0
        self.count = 0
        self.parts: list[BytesLike] = [b""]  # the header's place
        self.keys: list[tuple[int, int]] = []  # (segment, position) of its records
        self.log_ends: dict[int, int] = {}
        self.truncated: set[int] = set()

    @property
    def is_marker(self) -> bool:
        """Whether it holds no records."""
        return bool(self.flags & FLAG_MARKER)

    @property
    def size(self) -> int:
        """How many bytes it takes on disk."""
        return self.end - self.start.position


class WalWriter:
    """The writing end of a log; see the module's docstring for the order of calls.

    `partitions` is shared with the readers of the log: rows appear at append, before the record is durable.
    """

    def __init__(
        self,
        log_id: bytes,
        *,
        take_segment: Callable[[int], tuple[int, int]],
        partitions: dict[int, PartitionIndex],
        end: Position,
        segment_size: int,
        next_number: int = 0,
        unproven: bool = False,
        marker_due: bool = False,
        buffer_bytes_max: int = BUFFER_BYTES_MAX,
    ) -> None:
        self._log_id = log_id
        self._take_segment = take_segment
        self.partitions = partitions
        self._segment = end.segment
        self._position = end.position  # where the next byte goes
        self._limit = segment_size - SEGMENT_HEADER_BYTES  # exclusive: the header's copy follows
        self._salt = salt_of(log_id, end.segment)
        self._next_number = next_number
        self.synced_end = end  # everything below is durable
        self.unproven = unproven  # partitions that the log doesn't know of may have been lost from it
        self._marker_due = marker_due  # the last synced group holds records
        self._damage_due = False  # a partition was marked as damaged since the last marker
        self._buffer_bytes_max = buffer_bytes_max
        self.buffer_bytes = 0  # of groups that aren't synced yet
        self.failure: BaseException | None = None
        self._open: Group | None = None
        self._pending: deque[Group] = deque()  # closed, in order
        self._in_flight: deque[Group] = deque()  # taken, in order
        # What isn't synced, for readers: the row's (segment, position) -> its bytes.
        self.unsynced: dict[tuple[int, int], tuple[RecordMeta, Sequence[BytesLike]]] = {}

    @property
    def end(self) -> Position:
        """Where the next group would begin."""
        return Position(self._segment, align(self._position))

    def append(self, meta: RecordMeta, parts: Sequence[BytesLike]) -> None:
        """Take a record into the log; `parts` are its payload and must not change until it is synced.

        The caller gives `base_offset` as the partition's log end. Raises LogFullError or LogBusyError (nothing
        was taken: back off), DamagedError (of this copy: `reset` it) or LogFailedError.
        """
        assert meta.kind not in INTERNAL_KINDS, "truncate and reset write these"
        assert meta.count > 0, "a record takes an offset"
        index = self._writable(meta.partition)
        log_end = 0 if index is None else index.log_end
        assert meta.base_offset == log_end, f"record at {meta.base_offset}, log end is {log_end}"
        segment, position, length = self._store(meta, parts, index)
        index = self.partitions[meta.partition]
        index.append(meta, segment=segment, position=position, length=length)
        self._group().log_ends[meta.partition] = index.log_end

    def truncate(self, partition: int, new_end: int, *, epoch: int, append_ns: int) -> int:
        """Cut a partition's log to end at `new_end`, between two records. Raises as `append` does.

        Returns the number of the group that holds the truncation. Only the log ends of this group and of later ones
        say anything of the partition: an earlier group's sync is about bytes that are no longer in the log.
        """
        index = self._writable(partition)
        assert index is not None, "only a log that exists can be cut"
        assert index.log_start <= new_end <= index.log_end, "a log is cut inside itself"
        assert index.is_boundary(new_end), "a log is cut between records"
        self._store(RecordMeta(partition, RecordKind.TRUNCATION, epoch, new_end, 0, append_ns), (), index)
        index.truncate(new_end)
        group = self._group()
        group.log_ends[partition] = new_end
        group.truncated.add(partition)
        return group.number

    def reset(self, partition: int, log_start: int, *, epoch: int, append_ns: int) -> int:
        """Discard a partition's copy, damaged or not: a new one begins, empty, at `log_start`.

        `epoch` and `append_ns` are those of the record that ended there; 0 at offset 0.

        Returns a group's number, as `truncate` does. Raises as `append` does, but for DamagedError.
        """
        self._check_alive()
        index = self.partitions.get(partition)
        self._store(RecordMeta(partition, RecordKind.RESET, epoch, log_start, 0, append_ns), (), index)
        self.partitions[partition].reset(log_start, epoch=epoch, append_ns=append_ns)
        group = self._group()
        group.log_ends[partition] = log_start
        group.truncated.add(partition)
        return group.number

    def mark_damaged(self, partition: int) -> None:
        """Refuse appends to a partition from now on; the next marker makes that durable."""
        index = self.partitions.get(partition)
        if index is None:
            index = self.partitions[partition] = PartitionIndex(partition)
        index.damaged = True
        self._damage_due = True

    def take_group(self) -> Group | None:
        """Return what is to be written and synced next, None if nothing is; the caller then calls `synced`.

        Groups may be taken ahead; they are to be synced in order.
        """
        self._check_alive()
        if not self._pending:
            self._close()
            if not self._pending:
                return None
        group = self._pending.popleft()
        body = group.end - group.start.position - GROUP_HEADER_BYTES
        header = GroupHeader(
            group.number,
            group.flags,
            group.start.position,
            body,
            self.synced_end,
            group.count,
            group.table_crc,
        )
        group.parts[0] = pack_group_header(salt_of(self._log_id, group.start.segment), header)
        self._in_flight.append(group)
        return group

    def synced(self, group: Group) -> None:
        """Note that a taken group is durable: the oldest one."""
        assert self._in_flight, "a group was taken"
        assert self._in_flight[0] is group, "groups are synced in order"
        self._in_flight.popleft()
        self.synced_end = Position(group.start.segment, align(group.end))
        self.buffer_bytes -= group.size
        for key in group.keys:
            del self.unsynced[key]
        self._marker_due = not group.is_marker

    def fail(self, error: BaseException) -> bool:
        """Refuse everything from now on; return whether this was the first failure."""
        first = self.failure is None
        if first:
            self.failure = error
        return first

    @property
    def idle(self) -> bool:
        """Whether everything that was accepted is durable."""
        return self._open is None and not self._pending and not self._in_flight

    @property
    def needs_marker(self) -> bool:
        """Whether the log is idle and its last group isn't covered by a marker yet."""
        return (self._marker_due or self._damage_due) and self.idle and self.failure is None

    def write_marker(self) -> bool:
        """Queue a marker, to be taken as the next group; return False if none was needed (or none fits)."""
        if not self.needs_marker:
            return False
        entries = [
            MarkerEntry(
                index.partition, ENTRY_DAMAGED if index.damaged else 0, index.log_end, index.next_sequence
            )
            for _, index in sorted(self.partitions.items())
        ]
        table = pack_marker(entries)
        self._marker_due = self._damage_due = False
        try:
            group = self._open_group(GROUP_HEADER_BYTES + len(table))
        except LogFullError:
            return False  # records since the last marker have kept room for one: nothing is uncovered
        group.flags = FLAG_MARKER | (0 if self.unproven else FLAG_COMPLETE)
        group.count = len(entries)
        group.table_crc = google_crc32c.extend(self._salt, table)
        group.parts.append(table)
        group.end = self._position = group.end + len(table)
        self.buffer_bytes += len(table)
        self._close()
        return True

    @property
    def next_group(self) -> int:
        """The number of the group that the next record goes into, or one before it."""
        return self._next_number if self._open is None else self._open.number

    def cut(self) -> tuple[Position, int]:
        """Close the open group; return where the next one begins at the earliest, and its number."""
        self._close()
        return self.end, self._next_number

    def _check_alive(self) -> None:
        if self.failure is not None:
            raise LogFailedError(f"the log has failed: {self.failure}") from self.failure

    def _writable(self, partition: int) -> PartitionIndex | None:
        self._check_alive()
        index = self.partitions.get(partition)
        if index.damaged if index is not None else self.unproven:
            raise DamagedError(f"this copy of partition {partition} is damaged", partition=partition)
        return index

    def _store(
        self, meta: RecordMeta, parts: Sequence[BytesLike], index: PartitionIndex | None
    ) -> tuple[int, int, int]:
        """Place a record and add its bytes to the open group; return (segment, position, payload length)."""
        length = sum([len(part) for part in parts])
        assert length <= PAYLOAD_BYTES_MAX, f"payload of {length} bytes"
        if self.buffer_bytes + length > self._buffer_bytes_max and self.buffer_bytes:
            raise LogBusyError(f"{self.buffer_bytes} bytes wait for the log's disk")
        group = self._room(record_bytes(length))
        position = self._position
        header = pack_record_header(
            self._salt,
            meta,
            position=position,
            sequence=0 if index is None else index.next_sequence,
            payload_bytes=length,
            payload_crc=crc_of_parts(self._salt, parts),
        )
        if index is None:
            index = self.partitions[meta.partition] = PartitionIndex(meta.partition)
        index.next_sequence += 1
        group.parts.append(header)
        group.parts.extend(parts)
        pad = padding(length)
        if pad:
            group.parts.append(_PADS[pad])
        size = RECORD_HEADER_BYTES + length + pad
        group.end = self._position = position + size
        group.count += 1
        group.keys.append((self._segment, position))
        self.buffer_bytes += size
        self.unsynced[self._segment, position] = (meta, parts)
        return self._segment, position, length

    def fits(self, payload_bytes: int) -> bool:
        """Say whether a record with such a payload surely has room in the present segment."""
        reserve = marker_bytes(len(self.partitions) + MARKER_SLACK)
        start = align(self._position) + GROUP_HEADER_BYTES
        return start + record_bytes(payload_bytes) + reserve <= self._limit

    def _room(self, size: int) -> Group:
        """Return the open group after making sure that a record of `size`, and then a marker, fit behind it."""
        reserve = marker_bytes(len(self.partitions) + MARKER_SLACK)
        group = self._open
        if (
            group is not None
            and (group.size + size <= GROUP_BYTES_MAX or group.count == 0)
            and self._position + size + reserve <= self._limit
        ):
            return group
        return self._open_group(GROUP_HEADER_BYTES + size + reserve)

    def _open_group(self, room: int) -> Group:
        """Close the open group and begin the next, in a new segment if `room` bytes aren't left in this one."""
        start = align(self._position)
        if start + room > self._limit:
            segment, segment_size = self._take_segment(2 * SEGMENT_HEADER_BYTES + room)
            self._close()
            self._segment, self._limit = segment, segment_size - SEGMENT_HEADER_BYTES
            self._salt = salt_of(self._log_id, segment)
            start = SEGMENT_HEADER_BYTES
        self._close()
        group = self._open = Group(self._next_number, Position(self._segment, start))
        self._next_number += 1
        self._position = group.end
        self.buffer_bytes += GROUP_HEADER_BYTES
        return group

    def _close(self) -> None:
        if self._open is not None:
            self._pending.append(self._open)
            self._open = None

    def _group(self) -> Group:
        assert self._open is not None, "a record was just added"
        return self._open
