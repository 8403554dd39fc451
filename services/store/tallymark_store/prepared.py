"""What the judge makes of a payload: values between the partition, the log and the fold. Pure.

Also how a payload's chunk table is read, and how the answer to a repeat is made from what is in the log.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tallymark_protocol.errors import Reason
from tallymark_protocol.layout import CHUNK_ENTRY_BYTES
from tallymark_protocol.messages import Appended
from tallymark_protocol.payload import C_CHUNK_TABLE, C_CHUNKS
from tallymark_protocol.schema import MetricRecord

Bytes = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]

# A chunk table entry as five words: producer, sequence, first sent, checksum | count << 32, flags (see `layout`).
_ENTRY_WORDS = CHUNK_ENTRY_BYTES // 8
HIGH_WORD = np.uint64(32)  # by which the count of the fourth word is shifted
_HAS_ORIGINAL = (int(Reason.DUPLICATE), int(Reason.CONFLICT))


class FoldItem(NamedTuple):
    """A record on its way from the log's end to the cells."""

    end_offset: int
    base_offset: int
    append_ns: int
    data: Bytes
    columns: Ints
    verdicts: Bytes | None
    control: MetricRecord | None


class Prepared(NamedTuple):
    """What the judge made of a payload. `record` is None where nothing is to be appended."""

    answer: Appended
    commit_offset: int  # the answer may go out once everything below is committed
    relies_on_commit: bool  # also an ASYNC answer waits for that
    record: list[bytes | Bytes] | None
    event_count: int
    append_ns: int
    min_time_ns: int
    max_time_ns: int
    item: FoldItem | None
    chunks: Words | None  # table entries, with ...
    chunk_verdicts: Bytes | None  # ... what the windows said of each
    first_offsets: Ints | None
    stored: int
    has_old_chunks: bool = False  # some chunk is not NEW
    originals: Ints | None = None  # of the record's duplicates and conflicts, in order
    may_alert: bool = False  # one of the record's metrics has thresholds


class JudgedChunks(NamedTuple):
    """What the producer windows say of the chunks of a payload."""

    verdicts: Bytes  # NEW, REPEAT, REUSED, UNKNOWN
    # Of a chunk's first event. REPEAT: of the one that is remembered. NEW, and repeats of those: counted as if
    # only the new chunks were in the record, which is not so here (see `_prepare_mixed`).
    first_offsets: Ints
    record_offsets: Ints  # base offset of the record that holds it


class LoggedVerdicts(NamedTuple):
    """The verdict column of a record that is in the log, to answer a repeat with."""

    base_offset: int
    verdicts: Bytes | None
    originals: Ints


def exceptions_of(
    verdicts: Bytes | None, originals: Ints, start: int, count: int
) -> list[tuple[int, int, int]]:
    """The events of [start, start + count) of a batch that were not stored: (index, reason, original or -1)."""
    if verdicts is None:
        return []
    part = verdicts[start : start + count]
    at = np.flatnonzero(part)
    if len(at) == 0:
        return []
    reasons = part[at]
    related = np.full(len(at), -1, dtype=np.int64)
    has_original = (reasons == _HAS_ORIGINAL[0]) | (reasons == _HAS_ORIGINAL[1])
    before = verdicts[:start]
    skip = int(np.count_nonzero((before == _HAS_ORIGINAL[0]) | (before == _HAS_ORIGINAL[1])))
    many = int(np.count_nonzero(has_original))
    related[has_original] = originals[skip : skip + many]
    return list(zip(at.tolist(), reasons.tolist(), related.tolist(), strict=True))


def chunk_words(data: Bytes, columns: Ints) -> Words:
    """The chunk table of a placed payload, a row of words an entry (a copy: payloads are not aligned)."""
    start = int(columns[C_CHUNK_TABLE])
    table = data[start : start + CHUNK_ENTRY_BYTES * int(columns[C_CHUNKS])].tobytes()
    return np.frombuffer(table, dtype=np.uint64).reshape(-1, _ENTRY_WORDS)
