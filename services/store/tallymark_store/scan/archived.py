"""What a scan asks of an archive: rows as columns, and pages of events. The types only; `archive.reading` has them.

Apart from the reader so that a store without an archive loads nothing of it. A view is taken where the log's index may
be read, in the same turn of the loop as the rest of what a read is made of; what it gives may then be stepped
anywhere, one thread at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from tallymark_protocol.errors import UnavailableError
from tallymark_protocol.messages import EventRecord
from tallymark_store.scan.source import RecordSource
from tallymark_store.wal import DamagedError

ByteArray = npt.NDArray[np.uint8]
IntArray = npt.NDArray[np.int64]


class ArchiveDamagedError(DamagedError):
    """A file of the archive isn't what was written, or is gone."""


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
    """An archive as of one moment: every accepted event at offsets of [start_offset, end_offset)."""

    @property
    def start_offset(self) -> int:
        """Inclusive."""
        ...

    @property
    def end_offset(self) -> int:
        """Exclusive."""
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
