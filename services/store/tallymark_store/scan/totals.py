"""Totals from raw events: one account's (or every account's) events of a metric, by interval and group.

`TotalsScan` is an object that is stepped: `step(events)` does a bounded piece of work and says whether it is done, so an
event loop can go on between pieces; or `run` does everything, in a thread if need be (kernels release the GIL).
It reads nothing but records that were committed when it was made: the archive below its end, the log from there on.

COUNT_UNIQUE needs every value at once. Where a table of values would grow beyond `uniques_max` entries, the scan
begins again in several passes, each over the values of one hash class: slower, but exact within the same memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from tallymark_protocol import limits
from tallymark_protocol.errors import ErrorCode, InvalidRequestError
from tallymark_protocol.kernels.blake2b import WORK_WORDS
from tallymark_protocol.model import AggType
from tallymark_protocol.payload import COLUMNS
from tallymark_store.fold.cells import CELL_WORDS
from tallymark_store.scan import column_kernels, ranking
from tallymark_store.scan import kernels as k
from tallymark_store.scan.archived import (
    Archived,
    ArchivedRows,
    Columns,
    check_covered,
    check_not_dropped,
    usable,
)
from tallymark_store.scan.metric import DimensionTables, ScanMetric, doubled, table_size
from tallymark_store.scan.source import RecordCursor, RecordRows, RecordSource, damaged, rows_between

IntArray = npt.NDArray[np.int64]

RUN_EVENTS: Final = 1_000_000  # scanned by one kernel call of `run`
UNIQUES_MAX: Final = 3 << 20  # values held at a time; 48 bytes each
ROWS_MAX: Final = 16 << 20  # of a scan over all accounts; 96 bytes each
_CELLS_PIECE: Final = 65_536
_PASSES_MAX: Final = 4_096
METRIC_INDEXES: Final = 65_536  # that a metric column can name

Interval = tuple[int, int, int]
"""Event times [start, end) and the number of the bucket that they count for."""


def rows_of_intervals(rows: RecordRows, intervals: Sequence[Interval]) -> RecordRows:
    """Return the rows that may hold an event timed in one of the sorted, disjoint intervals."""
    if not intervals:
        return rows.take(np.zeros(len(rows.base_offset), np.bool_))
    starts = np.array([interval[0] for interval in intervals], np.int64)
    ends = np.array([interval[1] for interval in intervals], np.int64)
    # The first interval that isn't over before the record's earliest event: does it begin by its latest?
    first = ends.searchsorted(rows.min_time_ns, side="right")
    wanted = first < len(ends)
    wanted[wanted] = starts[first[wanted]] <= rows.max_time_ns[wanted]
    return rows.take(wanted)


_ELSE_ASK: Final = {
    True: "totals of whole billing periods are kept, and ranges that begin later can be asked for",
    False: (
        "totals of whole days in the metric's time zone and of whole billing periods are kept, and ranges that begin "
        "later can be asked for"
    ),
}


class TotalsScan:
    """Sums over raw events, in the making."""

    def __init__(
        self,
        source: RecordSource,
        metric: ScanMetric,
        *,
        account: int | None,
        intervals: Sequence[Interval],
        applied: int,
        rows: RecordRows | None = None,
        filters: Sequence[tuple[int, frozenset[str]]] = (),
        group_by: Sequence[int] = (),
        uniques_max: int = UNIQUES_MAX,
        rows_max: int | None = None,
        archived: Archived | None = None,
    ) -> None:
        """Prepare to scan the events below offset `applied`.

        Args:
            source: where the records are.
            metric: whose events count.
            account: whose events count; None for every account's, in rows of their own.
            intervals: sorted and disjoint; a bucket may have several.
            applied: the offset of the state that the result is merged with.
            rows: the metric's records below `applied` and from the archive's end on, if the caller has them already.
            filters: (place of a dimension, allowed values), one per dimension.
            group_by: places of dimensions.
            uniques_max: values of COUNT_UNIQUE that are held at a time.
            rows_max: more rows than this are refused.
            archived: what is read in place of the log below its end.
        """
        for (_, before, _), (start, _, _) in itertools.pairwise(intervals):
            assert before <= start, "intervals are sorted and disjoint"
        self._source = source
        archived = usable(archived, source.log_start)
        last = min(metric.end_offset, applied)
        if intervals:
            check_covered(source, archived, metric.first_offset, metric.end_offset)
            check_not_dropped(
                archived,
                metric.uid,
                np.array([interval[0] for interval in intervals], np.int64),
                np.array([interval[1] for interval in intervals], np.int64),
                (metric.first_offset, last),
                else_ask=_ELSE_ASK[metric.agg_type is AggType.COUNT_UNIQUE],
            )
        if rows is None:
            rows = rows_between(source, *offsets_in_log(metric, archived, applied))
        rows = rows_of_intervals(rows, intervals)
        self._cursor = RecordCursor(source, rows)
        self._uniques_max = max(uniques_max, 16)
        self._rows_max = rows_max or (ROWS_MAX if account is None else limits.QUERY_ROWS_MAX)
        self._starts = np.array([interval[0] for interval in intervals], np.int64)
        self._ends = np.array([interval[1] for interval in intervals], np.int64)
        self._buckets = np.array([interval[2] for interval in intervals], np.int64)
        self._code = np.frombuffer(metric.code.encode(), np.uint8)
        self._tables = DimensionTables(metric, filters, group_by)
        request = np.zeros(k.REQUEST_FIELDS, np.int64)
        request[k.Q_ACCOUNT] = bits_of(account or 0)
        request[k.Q_ALL_ACCOUNTS] = request[k.Q_KEEP_ACCOUNTS] = int(account is None)
        request[k.Q_AGGREGATION] = _AGGREGATIONS[metric.agg_type]
        request[k.Q_UID] = metric.uid
        request[k.Q_PASSES] = 1
        self._request = request
        self._state = np.zeros(k.STATE_FIELDS, np.int64)
        sets = int(rows.event_count.max(initial=0)) + 1 if len(self._tables.dims) else 1
        self._memo = np.empty(sets, np.int64)
        self._match = np.zeros(METRIC_INDEXES, np.uint8)
        self._columns = np.zeros(COLUMNS, np.int64)
        self._codes = np.zeros(limits.DIMENSIONS_MAX, np.int64)
        self._work = np.zeros(WORK_WORDS, np.uint64)
        self._rows = np.zeros((64, k.ROW_FIELDS), np.int64)
        self._row_index = np.full(table_size(64), -1, np.int32)
        self._uniques = np.zeros(
            (1024 if metric.agg_type is AggType.COUNT_UNIQUE else 1, k.UNIQUE_FIELDS), np.int64
        )
        self._run: tuple[npt.NDArray[np.uint8], IntArray] | None = None
        self._first = metric.first_offset
        self._last = last if archived is None else min(last, archived.end_offset)
        self._archived: ArchivedRows | None = None
        self._is_archived = False  # what is archived is done in this pass
        since = self._tables.values[: self._tables.values_used, k.V_SINCE]
        self._sinces: IntArray = np.unique(since[since > 0])
        if archived is not None and intervals and self._first < self._last:
            is_unique = metric.agg_type is AggType.COUNT_UNIQUE
            self._archived = archived.rows(
                uid=metric.uid,
                account=account,
                starts=self._starts,
                ends=self._ends,
                first=self._first,
                last=self._last,
                has_texts=is_unique,
                has_operations=is_unique,
                has_numbers=metric.agg_type is not AggType.COUNT,
                has_sets=len(self._tables.dims) > 0,
            )
        self.done = self._archived is None and not len(self._cursor)

    @property
    def tables(self) -> DimensionTables:
        """The groups that rows refer to."""
        return self._tables

    @property
    def rows(self) -> IntArray:
        """The rows so far (`kernels.R_` columns)."""
        return self._rows[: int(self._state[k.S_ROWS])]

    def run(self) -> None:
        """Do what is left, all at once."""
        while not self.step(RUN_EVENTS):
            pass

    def step(self, events_max: int) -> bool:
        """Scan about `events_max` further events, at least one record; return whether the scan is done.

        Raises:
            DamagedError: when a record's bytes aren't what was written.
            InvalidRequestError: when the answer has too many rows.
        """
        if self.done:
            return True
        if self._archived is not None and not self._is_archived:
            self._step_archived(self._archived)
            return False
        if self._run is None:
            run = self._cursor.next_run(events_max)
            if run is None:
                self._next_pass()
                return self.done
            self._run = run
            self._state[k.S_RECORD] = self._state[k.S_EVENT] = 0
        data, records = self._run
        while (status := self._scan(data, records)) != k.DONE:
            if status == k.MALFORMED:
                body = int(records[self._state[k.S_RECORD], k.K_BODY])
                raise damaged(self._source.partition, self._cursor.segment, body, "it is malformed")
            if not self._make_room(status):
                return False
        self._run = None
        return False

    @property
    def reads_files(self) -> bool:
        """Whether the next step may read the archive, which is nothing for an event loop."""
        return self._archived is not None and not self._is_archived and not self.done

    def _step_archived(self, archived: ArchivedRows) -> None:
        """Read the next row group, or whatever comes before that, and add it up."""
        if not archived.advance():
            self._is_archived = True
            return
        columns = archived.columns
        if columns is None:
            return
        memo = self._memo_of(columns)
        self._state[k.S_EVENT] = 0
        while (status := self._scan_columns(columns, memo)) != k.DONE:
            if not self._make_room(status):
                return

    def _memo_of(self, columns: Columns) -> IntArray:
        sets = len(columns.set_bounds) if len(self._tables.dims) else 0
        return np.full(sets * (len(self._sinces) + 1), k.UNRESOLVED, np.int64)

    def _scan_columns(self, columns: Columns, memo: IntArray) -> int:
        tables, state = self._tables, self._state
        state[k.S_GROUPS] = tables.groups_used
        state[k.S_VALUES] = tables.values_used
        state[k.S_POOL] = tables.pool_used
        status = column_kernels.scan_columns(
            columns.uid,
            columns.account,
            columns.time_ns,
            columns.offset,
            columns.number,
            columns.operation,
            columns.kind,
            columns.texts,
            columns.text_bounds,
            columns.set_of,
            columns.sets,
            columns.set_bounds,
            self._sinces,
            columns.rows,
            self._request,
            self._starts,
            self._ends,
            self._buckets,
            self._first,
            self._last,
            tables.dims,
            tables.keys,
            tables.pool,
            tables.values,
            tables.value_index,
            tables.groups,
            tables.group_index,
            memo,
            self._rows,
            self._row_index,
            self._uniques,
            state,
            self._codes,
            self._work,
        )
        tables.groups_used = int(state[k.S_GROUPS])
        tables.values_used = int(state[k.S_VALUES])
        tables.pool_used = int(state[k.S_POOL])
        return int(status)

    def _scan(self, data: npt.NDArray[np.uint8], records: IntArray) -> int:
        tables, state = self._tables, self._state
        state[k.S_GROUPS] = tables.groups_used
        state[k.S_VALUES] = tables.values_used
        state[k.S_POOL] = tables.pool_used
        status = k.scan_totals(
            data,
            records,
            self._request,
            self._code,
            self._starts,
            self._ends,
            self._buckets,
            tables.dims,
            tables.keys,
            tables.pool,
            tables.values,
            tables.value_index,
            tables.groups,
            tables.group_index,
            self._memo,
            self._match,
            self._rows,
            self._row_index,
            self._uniques,
            state,
            self._columns,
            self._codes,
            self._work,
        )
        tables.groups_used = int(state[k.S_GROUPS])
        tables.values_used = int(state[k.S_VALUES])
        tables.pool_used = int(state[k.S_POOL])
        return int(status)

    def _make_room(self, status: int) -> bool:
        """Grow what a kernel found full; False if the scan began again instead."""
        if status == k.NEED_ROWS:
            self.reserve_rows(len(self._rows) + 1)
        elif status == k.NEED_GROUPS:
            if self._tables.groups_used >= self._rows_max:
                raise too_many_rows(self._rows_max)
            self._tables.grow_groups()
        elif status == k.NEED_VALUES:
            if self._tables.values_used >= limits.DIMENSIONS_MAX * self._rows_max:
                raise too_many_rows(self._rows_max)
            self._tables.grow_values()
        else:
            assert status == k.NEED_UNIQUES, "a status of scan_totals"
            if len(self._uniques) >= self._uniques_max:
                self._more_passes()
                return False
            grown = np.zeros((2 * len(self._uniques), k.UNIQUE_FIELDS), np.int64)
            k.rehash_uniques(self._uniques, grown)
            self._uniques = grown
        return True

    @staticmethod
    def warm_up() -> None:
        """Compile the kernels that only large scans need."""
        table = np.zeros((16, k.UNIQUE_FIELDS), np.int64)
        k.rehash_uniques(table, table.copy())
        none = np.empty(0, np.int64)
        rows = np.zeros((1, k.ROW_FIELDS), np.int64)
        cells = np.zeros((1, CELL_WORDS), np.int64)
        index = np.full(16, -1, np.int32)
        ranking.add_cells(cells, none, none, rows, index, np.zeros(k.STATE_FIELDS, np.int64))
        k.rebuild_row_index(rows, 0, index)

    def add_cells(self, cells: IntArray, found: IntArray, skipped_days: IntArray) -> None:
        """Begin with day cells, of a scan over all accounts.

        Args:
            cells: the fold's cells, read at the offset that the scan goes up to.
            found: which of them; negative entries are passed over.
            skipped_days: starts of days whose cells don't count, sorted.
        """
        assert self._request[k.Q_KEEP_ACCOUNTS] == 1, "cells go to the rows of accounts"
        assert self._request[k.Q_AGGREGATION] != k.A_UNIQUE, "sets can't be merged"
        # Piece by piece: a row per cell would be far more than the accounts need.
        at = 0
        while at < len(found):
            piece = found[at : at + _CELLS_PIECE]
            free = len(self._rows) - int(self._state[k.S_ROWS])
            if free < len(piece):
                self.reserve_rows(len(self._rows) + len(piece) - free)
            added = ranking.add_cells(cells, piece, skipped_days, self._rows, self._row_index, self._state)
            assert added, "there was room"
            at += len(piece)

    def reserve_rows(self, total: int) -> None:
        """Make room for `total` rows in all."""
        if total > self._rows_max:
            raise too_many_rows(self._rows_max)
        while len(self._rows) < total:
            self._rows = doubled(self._rows)
        self._row_index = np.full(table_size(len(self._rows)), -1, np.int32)
        k.rebuild_row_index(self._rows, int(self._state[k.S_ROWS]), self._row_index)

    def _next_pass(self) -> None:
        request = self._request
        request[k.Q_PASS] += 1
        self.done = bool(request[k.Q_PASS] >= request[k.Q_PASSES])
        if not self.done:
            self._uniques[:] = 0
            self._state[k.S_UNIQUES] = 0
            self._rewind()

    def _more_passes(self) -> None:
        request = self._request
        passes = int(request[k.Q_PASSES]) * 2
        if passes > _PASSES_MAX:
            raise InvalidRequestError("the range holds too many distinct values", code=ErrorCode.TOO_LARGE)
        request[k.Q_PASSES] = passes
        request[k.Q_PASS] = 0
        self._uniques[:] = 0
        self._state[k.S_UNIQUES] = self._state[k.S_ROWS] = 0
        self._row_index[:] = -1
        self._run = None
        self._rewind()

    def _rewind(self) -> None:
        self._cursor.rewind()
        if self._archived is not None:
            self._archived.rewind()
            self._is_archived = False


def offsets_in_log(metric: ScanMetric, archived: Archived | None, applied: int) -> tuple[int, int]:
    """The offsets [first, last) of a metric's events that are read from the log, of a usable archive and the log."""
    first = metric.first_offset
    if archived is not None:
        first = max(first, min(archived.end_offset, applied))
    return first, min(metric.end_offset, applied)


_AGGREGATIONS = {
    AggType.COUNT: k.A_COUNT,
    AggType.SUM: k.A_VALUES,
    AggType.MAX: k.A_VALUES,
    AggType.LATEST: k.A_VALUES,
    AggType.COUNT_UNIQUE: k.A_UNIQUE,
}


def too_many_rows(rows_max: int) -> InvalidRequestError:
    """Make the error for an answer that would be too long."""
    return InvalidRequestError(
        f"the answer would have more than {rows_max} rows: ask for a shorter range, fewer buckets or fewer groups",
        code=ErrorCode.TOO_LARGE,
    )


def bits_of(account: int) -> int:
    """Return an unsigned 64-bit number's bits as a signed one."""
    return account - 2**64 if account >= 2**63 else account
