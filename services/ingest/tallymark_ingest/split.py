"""Splitting chunks by partition, and joining what many callers sent into one payload per partition.

Owns the step from the layout's chunks to its payloads. A chunk that isn't well formed is left out whole; no
event is judged, none is dropped, and the events of a chunk keep their order in each partition. The split is a
pure function of the chunk's bytes and the partition count: a chunk that is sent again falls into the same parts,
under the same identity.

How much goes into one call is the caller's choice within ROUND_EVENTS_MAX, ROUND_BYTES_MAX, ROUND_METRICS_MAX
and APPEND_CHUNKS_MAX (`glance` reads what counts against them from a chunk's header), so that a payload always
fits into an APPEND frame and its metric index into 16 bits. A single chunk always fits.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

import google_crc32c
import numpy as np
import numpy.typing as npt

from tallymark_ingest.split_kernels import split_chunks
from tallymark_protocol import layout as lay
from tallymark_protocol import limits

PARTITIONS_MAX: Final = limits.PARTITIONS_MAX

# One call's bounds. At 39 bytes an event in the widest columns, the chunks' own bytes and 40 bytes a chunk, a
# payload of several chunks stays below APPEND_BYTES_MAX; a chunk above the bounds goes alone, and grows by
# 8 bytes an event at most (its account column).
ROUND_EVENTS_MAX: Final = 131_072
ROUND_BYTES_MAX: Final = 8 * 1024 * 1024
ROUND_METRICS_MAX: Final = 65_535
assert (
    ROUND_EVENTS_MAX * 39 + ROUND_BYTES_MAX + limits.APPEND_CHUNKS_MAX * lay.CHUNK_ENTRY_BYTES + 4_096
    < limits.APPEND_BYTES_MAX
)
assert limits.REQUEST_BYTES_MAX + limits.REQUEST_EVENTS_MAX * 8 + 4_096 < limits.APPEND_BYTES_MAX
assert ROUND_EVENTS_MAX <= limits.APPEND_EVENTS_MAX

_GLANCE = struct.Struct("<I28xHH")  # at byte 12 of a chunk: event count, flags, metric count
_CHECKSUM = struct.Struct("<I")
_SLICE_BYTES_MAX = 64 * 1024  # above it, looking through numpy is cheaper than copying


class Glance(NamedTuple):
    """What a chunk's header says of its size, before anything of it is believed."""

    events: int
    flags: int
    metrics: int


class Payload(NamedTuple):
    """One partition's share of a call, with where it came from."""

    partition: int
    data: (
        npt.NDArray[np.uint8] | bytes
    )  # where it is an array, a view of the call's output; never written again
    event_count: int
    chunks: list[int]  # the chunks in it, in the order of its chunk table, numbered as they were passed
    counts: list[int]  # how many events of each


class Split(NamedTuple):
    """What became of a call's chunks."""

    status: list[int]  # per chunk `payload.OK` or a BAD_ code; those that aren't OK are in no payload
    payloads: list[Payload]  # of the partitions that have events, ascending
    part: npt.NDArray[np.uint16]  # the partition of each event, chunk after chunk
    firsts: list[int]  # where each chunk's events begin in `part`

    def indexes(self, chunk: int, partition: int) -> npt.NDArray[np.int64]:
        """See `event_indexes`."""
        return event_indexes(self.part, self.firsts, chunk, partition)


def event_indexes(
    part: npt.NDArray[np.uint16], firsts: list[int], chunk: int, partition: int
) -> npt.NDArray[np.int64]:
    """The positions, in the chunk, of its events for a partition: entry k is the payload's k-th of them.

    Args:
        part: of a `Split`.
        firsts: likewise.
        chunk: as it was numbered in the call.
        partition: which one.
    """
    return np.flatnonzero(part[firsts[chunk] : firsts[chunk + 1]] == partition)


def glance(body: bytes) -> Glance | None:
    """Read what counts against the bounds of a call. None where it can't be a chunk."""
    if not lay.CHUNK_HEADER_BYTES <= len(body) <= limits.REQUEST_BYTES_MAX:
        return None
    events, flags, metrics = _GLANCE.unpack_from(body, 12)
    if not 1 <= events <= limits.REQUEST_EVENTS_MAX or not 1 <= metrics <= limits.CHUNK_METRICS_MAX:
        return None
    return Glance(events, flags, metrics)


def checksum_holds(body: bytes) -> bool:
    """Whether the chunk is as its client sent it. It must have the length of a header at least."""
    (sent,) = _CHECKSUM.unpack_from(body, 4)
    if len(body) <= _SLICE_BYTES_MAX:
        return bool(google_crc32c.value(body[8:]) == sent)
    return bool(google_crc32c.value(np.frombuffer(body, dtype=np.uint8, offset=8)) == sent)


def split(bodies: list[bytes], partition_count: int, seed: int = 0) -> Split:
    """Split chunks into a payload per partition.

    Args:
        bodies: the chunks; their checksums have been checked and their total is bounded.
        partition_count: of the cluster.
        seed: 63 bits that callers don't know, so that none can send property sets whose hashes collide. It has no
            influence on the result.
    """
    assert bodies
    assert 1 <= partition_count <= PARTITIONS_MAX
    if len(bodies) == 1:
        data = np.frombuffer(bodies[0], dtype=np.uint8)
        bounds = np.array([0, len(bodies[0])], dtype=np.int64)
    else:
        data = np.frombuffer(b"".join(bodies), dtype=np.uint8)
        bounds = np.zeros(len(bodies) + 1, dtype=np.int64)
        np.cumsum([len(body) for body in bodies], out=bounds[1:])
    result, part, out = split_chunks(data, bounds, partition_count, seed)
    facts = result.tolist()
    count = len(bodies)
    at = 2 * count + 1
    chunks_at = at + 4 * partition_count
    counts_at = (chunks_at + len(facts)) // 2
    payloads = []
    for partition in range(partition_count):
        events, entries, start, end = facts[at : at + 4]
        at += 4
        if events:
            chunks = facts[chunks_at : chunks_at + entries]
            counts = facts[counts_at : counts_at + entries]
            payloads.append(Payload(partition, out[start:end], events, chunks, counts))
            chunks_at += entries
            counts_at += entries
    return Split(facts[:count], payloads, part, facts[count : 2 * count + 1])


def warm_up() -> None:
    """Compile the kernel, so that the first request doesn't wait for it."""
    split([bytes(lay.CHUNK_HEADER_BYTES)], 1)
