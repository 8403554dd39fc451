"""The write-ahead log's bytes on disk: layouts, checksums, and how a single structure is checked.

This module knows structures one at a time; `scan` knows how they follow each other. Everything is
little-endian. Every checksum is CRC-32C.

A log is a row of **segment** files `wal-<16 digits>.seg`, numbered without gaps, each filled with zeros before
it gets its name. The header is written then, at the start and once more in the last 64 bytes, so that one bad
spot can't hide which log this is; it is never written again::

    0   8s   magic "TMWALSEG"      24  16s  log id, random, the same in all segments of a log
    8   u32  version               40  u64  length of the file
    12  u32  0                     48  12s  0
    16  u64  segment number        60  u32  CRC of [0, 60)

Behind it lie **groups**, one for each sync, at multiples of 64 bytes, each right behind the one before::

    0   u32  magic "TMWG"          32  u64  synced_end: segment
    4   u16  flags                 40  u64  synced_end: position
    6   u16  0                     48  u32  number of records (of entries, in a marker)
    8   u64  group number          52  u32  salted CRC of a marker's table, else 0
    16  u64  own position          56  u32  0
    24  u64  length of the body    60  u32  salted CRC of [0, 60)

Groups are numbered through the whole log, so a missing one is noticed. `synced_end` says up to where the log
was on disk before this group was written: bad bytes below it are damage, not a torn tail.

The body is either **records**, each at a multiple of 8 bytes from the group's start::

    0   u32  magic "TMWR"          48  i64  append time, ns
    4   u32  partition             56  i64  lowest event time, ns
    8   u64  own position          64  i64  highest event time, ns
    16  u64  sequence              72  u32  offsets taken
    24  u8   kind, 3 bytes 0       76  u32  length of the payload
    28  u32  0                     80  u32  salted CRC of the payload
    32  i64  epoch                 84  u32  salted CRC of [0, 84)
    40  i64  base offset           88       payload, zeros up to a multiple of 8

or, in a group flagged MARKER, the **table** of all partitions in the log::

    0   u32  partition             8   i64  log end offset
    4   u32  flags                 16  u64  next sequence

`sequence` numbers all records of a partition, truncations and resets included: as long as it has no gap,
nothing is missing, whatever became of the bytes in between. Offsets alone would not show that (a lost
truncation followed by new appends ends where the old log ended).

The salt is the CRC of log id and segment number. So neither bytes of another log, nor of another segment, nor
of this segment at another position (every structure holds its own) ever look valid.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Sequence
from typing import NamedTuple

import google_crc32c
import msgspec
import numpy as np
import numpy.typing as npt

from tallymark_protocol import limits
from tallymark_runtime.disk import BytesLike

ByteArray = npt.NDArray[np.uint8]

ALIGN = 64  # of groups
RECORD_ALIGN = 8
VERSION = 1

SEGMENT_MAGIC = b"TMWALSEG"
GROUP_MAGIC = int.from_bytes(b"TMWG", "little")
RECORD_MAGIC = int.from_bytes(b"TMWR", "little")

_SEGMENT = struct.Struct("<8sIIQ16sQ12s")
_GROUP = struct.Struct("<IHHQQQQQIII")
_RECORD = struct.Struct("<IIQQB3sIqqqqqIII")
_ENTRY = struct.Struct("<IIqQ")
_CRC = struct.Struct("<I")
SEGMENT_HEADER_BYTES = 64
GROUP_HEADER_BYTES = 64
RECORD_HEADER_BYTES = 88
ENTRY_BYTES = 24
LOG_ID_BYTES = 16

assert _SEGMENT.size + 4 == SEGMENT_HEADER_BYTES
assert _GROUP.size + 4 == GROUP_HEADER_BYTES
assert _RECORD.size + 4 == RECORD_HEADER_BYTES
assert _ENTRY.size == ENTRY_BYTES

FLAG_MARKER = 1  # the body is the table of partitions
FLAG_COMPLETE = 2  # the table names every partition that ever was in the log
ENTRY_DAMAGED = 1  # the copy is known to be damaged: its numbers prove nothing

PAYLOAD_BYTES_MAX = limits.APPEND_BYTES_MAX + 4 * 1024 * 1024  # room for verdicts and headers around it
SEGMENT_BYTES_DEFAULT = 64 * 1024 * 1024
GROUP_BYTES_MAX = 16 * 1024 * 1024  # a group that has reached this takes no further record


class RecordKind(enum.IntEnum):
    """What a record is. The log itself acts on TRUNCATION and RESET only; it is they that take no offset."""

    EVENTS = 1
    SCHEMA = 2
    EPOCH_START = 3
    MEMBERSHIP = 4
    TRUNCATION = 5  # the partition's log ends at `base_offset` from here on
    RESET = 6  # the copy is discarded: a new one begins, empty, at `base_offset`


INTERNAL_KINDS = frozenset((RecordKind.TRUNCATION, RecordKind.RESET))


class Position(NamedTuple):
    """A place in the log; in log order."""

    segment: int
    position: int  # bytes from the segment's start


class RecordMeta(msgspec.Struct, frozen=True, gc=False):
    """What the log knows of a record beside its payload."""

    partition: int
    kind: int  # a `RecordKind` or one of a later version
    epoch: int
    base_offset: int  # of the first offset it takes
    count: int  # offsets it takes: [base_offset, base_offset + count)
    append_ns: int
    min_time_ns: int = 0  # of its events; the log only keeps them
    max_time_ns: int = 0


class RecordHeader(NamedTuple):
    """A record's header as it stands on disk, checked."""

    meta: RecordMeta
    sequence: int
    payload_bytes: int
    payload_crc: int


class GroupHeader(NamedTuple):
    """A group's header as it stands on disk, checked."""

    number: int
    flags: int
    position: int
    body_bytes: int
    synced_end: Position
    entries: int  # records, or lines of a marker's table
    table_crc: int

    @property
    def end(self) -> int:
        """Where the next group begins, if it is in the same segment."""
        return align(self.position + GROUP_HEADER_BYTES + self.body_bytes)


class MarkerEntry(NamedTuple):
    """A partition's line in a marker."""

    partition: int
    flags: int
    log_end: int
    next_sequence: int


def align(position: int) -> int:
    """Return the first place for a group at or after `position`."""
    return (position + ALIGN - 1) & -ALIGN


def padding(length: int) -> int:
    """Return how many zeros follow a payload of that length."""
    return -length & (RECORD_ALIGN - 1)


def record_bytes(payload_bytes: int) -> int:
    """Return the room that a record takes inside its group."""
    return RECORD_HEADER_BYTES + payload_bytes + padding(payload_bytes)


def marker_bytes(partition_count: int) -> int:
    """Return the room that a marker takes, wherever the group before it ended."""
    return ALIGN + GROUP_HEADER_BYTES + align(ENTRY_BYTES * partition_count)


def segment_name(segment: int) -> str:
    """Return the file name of a segment."""
    return f"wal-{segment:016d}.seg"


def segment_number(name: str) -> int | None:
    """Return which segment a file is; None for any other file."""
    digits = name[4:-4]
    if name.startswith("wal-") and name.endswith(".seg") and len(digits) == 16 and digits.isdecimal():
        return int(digits)
    return None


def salt_of(log_id: bytes, segment: int) -> int:
    """Return what the checksums in a segment start from."""
    return int(google_crc32c.value(log_id + segment.to_bytes(8, "little")))


def as_crc_input(part: BytesLike) -> bytes | ByteArray:
    """Return `part` as something that `google_crc32c` takes, without a copy."""
    if isinstance(part, bytes):
        return part
    return part if isinstance(part, np.ndarray) else np.frombuffer(part, np.uint8)


def crc_of_parts(salt: int, parts: Sequence[BytesLike]) -> int:
    """Return the salted checksum of parts that follow each other."""
    crc = salt
    for part in parts:
        crc = google_crc32c.extend(crc, as_crc_input(part))
    return int(crc)


def pack_segment_header(log_id: bytes, segment: int, size: int) -> bytes:
    """Lay out a segment's header."""
    head = _SEGMENT.pack(SEGMENT_MAGIC, VERSION, 0, segment, log_id, size, bytes(12))
    return head + _CRC.pack(google_crc32c.value(head))


class SegmentHeader(NamedTuple):
    """A segment's header as it stands on disk, checked."""

    version: int
    segment: int
    log_id: bytes
    size: int


def parse_segment_header(data: ByteArray) -> SegmentHeader | None:
    """Return the header that `data` begins with; None if it isn't a whole one."""
    if len(data) < SEGMENT_HEADER_BYTES:
        return None
    head = data[:SEGMENT_HEADER_BYTES].tobytes()
    if not head.startswith(SEGMENT_MAGIC) or google_crc32c.value(head[:60]) != _CRC.unpack_from(head, 60)[0]:
        return None
    _, version, _, segment, log_id, size, _ = _SEGMENT.unpack_from(head)
    return SegmentHeader(version, segment, log_id, size)


def pack_group_header(salt: int, header: GroupHeader) -> bytes:
    """Lay out a group's header."""
    head = _GROUP.pack(
        GROUP_MAGIC,
        header.flags,
        0,
        header.number,
        header.position,
        header.body_bytes,
        header.synced_end.segment,
        header.synced_end.position,
        header.entries,
        header.table_crc,
        0,
    )
    return head + _CRC.pack(google_crc32c.extend(salt, head))


def parse_group_header(salt: int, data: ByteArray, position: int) -> GroupHeader | None:
    """Return the header of the group at `position` of a segment; None if there isn't a whole one."""
    head = data[position : position + GROUP_HEADER_BYTES].tobytes()
    if len(head) < GROUP_HEADER_BYTES or _CRC.unpack_from(head)[0] != GROUP_MAGIC:
        return None
    if google_crc32c.extend(salt, head[:60]) != _CRC.unpack_from(head, 60)[0]:
        return None
    _, flags, _, number, own, body_bytes, segment, synced, entries, table_crc, _ = _GROUP.unpack_from(head)
    if own != position:
        return None
    return GroupHeader(number, flags, own, body_bytes, Position(segment, synced), entries, table_crc)


def pack_record_header(
    salt: int, meta: RecordMeta, *, position: int, sequence: int, payload_bytes: int, payload_crc: int
) -> bytes:
    """Lay out a record's header."""
    head = _RECORD.pack(
        RECORD_MAGIC,
        meta.partition,
        position,
        sequence,
        meta.kind,
        b"",
        0,
        meta.epoch,
        meta.base_offset,
        meta.append_ns,
        meta.min_time_ns,
        meta.max_time_ns,
        meta.count,
        payload_bytes,
        payload_crc,
    )
    return head + _CRC.pack(google_crc32c.extend(salt, head))


def parse_record_header(salt: int, data: ByteArray, position: int, *, own: int) -> RecordHeader | None:
    """Return the header at `position` of `data`; None if it isn't a whole one.

    `own` is its position in the segment, which `data` may be a part of.
    """
    head = data[position : position + RECORD_HEADER_BYTES].tobytes()
    if len(head) < RECORD_HEADER_BYTES:
        return None
    if google_crc32c.extend(salt, head[:84]) != _CRC.unpack_from(head, 84)[0]:
        return None
    (
        magic,
        partition,
        stored,
        sequence,
        kind,
        _,
        _,
        epoch,
        base_offset,
        append_ns,
        min_time_ns,
        max_time_ns,
        count,
        payload_bytes,
        payload_crc,
    ) = _RECORD.unpack_from(head)
    if magic != RECORD_MAGIC or stored != own:
        return None
    meta = RecordMeta(partition, kind, epoch, base_offset, count, append_ns, min_time_ns, max_time_ns)
    return RecordHeader(meta, sequence, payload_bytes, payload_crc)


def pack_marker(entries: Sequence[MarkerEntry]) -> bytes:
    """Lay out a marker's table."""
    return b"".join(_ENTRY.pack(*entry) for entry in entries)


def parse_marker(salt: int, data: ByteArray, header: GroupHeader) -> list[MarkerEntry] | None:
    """Return a marker's table; None if its bytes are bad."""
    start = header.position + GROUP_HEADER_BYTES
    table = data[start : start + header.body_bytes].tobytes()
    if len(table) != header.entries * ENTRY_BYTES or google_crc32c.extend(salt, table) != header.table_crc:
        return None
    return [MarkerEntry(*values) for values in _ENTRY.iter_unpack(table)]
