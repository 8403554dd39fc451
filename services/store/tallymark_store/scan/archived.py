"""What a scan asks of an archive: rows as columns, and pages of events. The types only; `archive.reading` has them.

Apart from the reader so that a store without an archive loads nothing of it. A view is taken where the log's index may
be read, in the same turn of the loop as the rest of what a read is made of; what it gives may then be stepped
anywhere, one thread at a time.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from tallymark_protocol.errors import ErrorCode, InvalidRequestError, UnavailableError
from tallymark_protocol.messages import EventRecord
from tallymark_store.archive.manifest import Dropped
from tallymark_store.scan.source import RecordSource
from tallymark_store.wal import DamagedError

ByteArray = npt.NDArray[np.uint8]
IntArray = npt.NDArray[np.int64]


_BEGINNING = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)


class ArchiveDamagedError(DamagedError):
    """A file of the archive isn't what was written, or is gone.

    Attributes:
        reader: who has found it: an archive that has taken the place of that one since isn't meant. None: not known.
    """

    def __init__(self, message: str, *, partition: int, reader: object = None) -> None:
        super().__init__(message, partition=partition)
        self.reader = reader


class Columns(NamedTuple):
    """Archived events as kernels want them: an entry per row, or one for all rows; read-only.

    What wasn't asked for is a single 0.
    """

    rows: int
    uid: IntArray  # bits of a uint64
    account: IntArray  # likewise
    time_ns: IntArray
    offset: IntArray
    number: IntArray  # 0 where the value is a text
    operation: npt.NDArray[np.int8]
    kind: npt.NDArray[np.int8]  # a `column_kernels.KIND_` value
    texts: ByteArray  # values that are texts, in the log's form
    text_bounds: IntArray  # [rows, 2]
    set_of: npt.NDArray[np.int32]  # which set of dimensions; 0: none
    sets: ByteArray  # in the log's form
    set_bounds: IntArray  # [sets, 2]


class ArchivedRows(Protocol):
    """The rows that may hold wanted events, a row group at a time; in no order that matters."""

    @property
    def columns(self) -> Columns | None:
        """What the last `advance` found, if anything."""
        ...

    def advance(self) -> bool:
        """Go on by one bounded piece of work; False when there is nothing more.

        Raises:
            ArchiveDamagedError: what is stored isn't what was written.
        """
        ...

    def rewind(self) -> None:
        """Begin again."""
        ...


class ArchivedEvents(Protocol):
    """Wanted events, in the order of their offsets."""

    @property
    def found(self) -> Sequence[tuple[int, EventRecord]]:
        """What the last `advance` found: events, and how many bytes each has of sets, ids and texts."""
        ...

    def advance(self) -> bool:
        """As `ArchivedRows.advance`."""
        ...


class Archived(Protocol):
    """An archive as of one moment: every accepted event at offsets of [start_offset, end_offset), but for gaps."""

    @property
    def start_offset(self) -> int:
        """Inclusive."""
        ...

    @property
    def end_offset(self) -> int:
        """Exclusive."""
        ...

    @property
    def gaps(self) -> Sequence[tuple[int, int]]:
        """Ranges of offsets [from, to) in between that it lacks."""
        ...

    @property
    def dropped(self) -> Sequence[Dropped]:
        """Events that it had, and that were dropped."""
        ...

    def time_bounds(self, first: int, last: int) -> tuple[int, int] | None:
        """Half-open bounds of the times of what it may hold at offsets of [first, last); None for nothing."""
        ...

    def rows(
        self,
        *,
        uid: int,
        account: int | None,
        starts: IntArray,
        ends: IntArray,
        first: int,
        last: int,
        has_texts: bool,
        has_operations: bool,
        has_numbers: bool,
        has_sets: bool,
    ) -> ArchivedRows:
        """Rows of a metric, of an account (None: all), timed in sorted intervals, at offsets of [first, last).

        Others come along: who asks looks at each row. To be called when the view is taken.
        """
        ...

    def events(
        self,
        *,
        uid: int | None,
        account: int | None,
        start_ns: int,
        end_ns: int,
        first: int,
        last: int,
        count: int,
    ) -> ArchivedEvents:
        """The first `count` events, likewise, and only those wanted; None stands for all metrics."""
        ...


def usable(archived: Archived | None, log_start: int) -> Archived | None:
    """The archive, if it and a log that begins at `log_start` have no gap between them; else the log is all there is."""
    if archived is None or not archived.start_offset <= log_start <= archived.end_offset:
        return None
    return archived


def check_covered(source: RecordSource, archived: Archived | None, first: int, last: int) -> None:
    """See that all events at offsets of [first, last) can be read, of a usable archive and the log.

    Raises:
        UnavailableError: those at the beginning can't.
    """
    start = source.log_start if archived is None else archived.start_offset
    if first < min(last, start):
        where = "log" if archived is None else "archive"
        raise UnavailableError(
            f"events below offset {start} are no longer in the {where} of partition {source.partition}",
            retriable=False,
        )
    for start, end in () if archived is None else archived.gaps:
        if start < last and end > first:
            raise UnavailableError(
                f"events at offsets from {start} up to {end} are neither in the archive of partition "
                f"{source.partition} nor in its log",
                retriable=False,
            )


def check_not_dropped(
    archived: Archived | None,
    uid: int | None,
    starts: IntArray,
    ends: IntArray,
    offsets: tuple[int, int],
    *,
    else_ask: str,
) -> None:
    """See that no event was dropped that may be wanted.

    Args:
        archived: what is read.
        uid: of the metric; None: all metrics.
        starts: of sorted, disjoint intervals of event time.
        ends: of them, exclusive.
        offsets: half-open bounds of what is wanted.
        else_ask: what can be asked instead.

    Raises:
        InvalidRequestError: some may be.
    """
    for item in () if archived is None else archived.dropped:
        if uid is not None and item.metric_uid != uid:
            continue
        if item.start_offset >= offsets[1] or item.end_offset <= offsets[0]:
            continue
        first = int(ends.searchsorted(item.start_ns, side="right"))
        if first == len(ends) or starts[first] >= item.end_ns:
            continue
        raise InvalidRequestError(
            f"this needs raw events that were dropped: metric {item.metric!r} keeps them for a time only, and "
            f"{'at most ' if item.is_at_most else ''}{item.events} events timed from {_utc(item.start_ns)} up to "
            f"{_utc(item.end_ns)} are gone; {else_ask}; what is timed from then on (`--from {_utc(item.end_ns)}`), or of "
            f"another metric, needs none of them",
            code=ErrorCode.EVENTS_DROPPED,
            details={
                "metric_code": item.metric,
                "start_ns": item.start_ns,
                "end_ns": item.end_ns,
                "events": item.events,
            },
        )


def _utc(time_ns: int) -> str:
    """A time as RFC 3339 has it, exact, without digits that say nothing."""
    seconds, ns = divmod(time_ns, 10**9)
    text = (_BEGINNING + dt.timedelta(seconds=seconds)).replace(tzinfo=None).isoformat()
    return f"{text}.{ns:09d}".rstrip("0") + "Z" if ns else f"{text}Z"


def is_covered(source: RecordSource, archived: Archived | None, first: int, last: int) -> bool:
    """Whether all events at offsets of [first, last) can be read, of a usable archive and the log."""
    try:
        check_covered(source, archived, first, last)
    except UnavailableError:
        return False
    return True
