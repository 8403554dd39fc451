"""Queries at the store: exact answers from cells where they hold the answer, from raw events where they don't.

`Reads` looks at one partition as of the fold's applied offset. What a read takes from cells it takes at once, when
it is made; what it takes from raw events are those below that same offset, so both parts tell of one state although
the scan comes after, in steps (`step`, for an event loop) or in a thread of its own (`run`). Stepping touches
neither the fold nor the log's index.

How a bucket `[start, end)` is answered, for exactly the events timed in it:

    a billing period, no filter, no group      the period cell
    whole days of the metric's zone            day cells, merged
    the rest of it: ragged edges, hours        raw events
    a day with too many combinations           raw events
    COUNT_UNIQUE, other than a period          raw events: operations netted within the bucket

Raw events are those of the archive below its end, where there is one, and those of the log from there on.

Reads know no clock: what depends on the present takes `now_ns`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt

from tallymark_protocol import int128, limits
from tallymark_protocol import layout as lay
from tallymark_protocol.errors import ErrorCode, InvalidRequestError, NotFoundError
from tallymark_protocol.messages import (
    AlertsResult,
    EventsResult,
    Filter,
    GroupValue,
    RealtimeResult,
    Row,
    Stats,
    StoreAlerts,
    StoreEvents,
    StoreRealtime,
    StoreTotals,
    TotalsResult,
)
from tallymark_protocol.model import AggType, DimensionFilter, MetricSchema
from tallymark_protocol.payload import COLUMNS, OK, place_payload
from tallymark_protocol.schema import make_record
from tallymark_protocol.zones import TIME_END_NS
from tallymark_store import batch
from tallymark_store.fold.fold import NO_SELECTION, AlertChoice, Fold
from tallymark_store.fold.schemas import DAY_NS
from tallymark_store.scan import kernels as k
from tallymark_store.scan import plan as p
from tallymark_store.scan import ranking
from tallymark_store.scan.archived import Archived, is_covered, usable
from tallymark_store.scan.events import EventsScan
from tallymark_store.scan.metric import GroupKey, ScanDimension, ScanMetric
from tallymark_store.scan.source import MemorySource, RecordRows, RecordSource, rows_between
from tallymark_store.scan.totals import (
    RUN_EVENTS,
    UNIQUES_MAX,
    Interval,
    TotalsScan,
    offsets_in_log,
    too_many_rows,
)

IntArray = npt.NDArray[np.int64]

_SERIES_MIN: Final = 8  # buckets from which a series of days is read as one
ALERTS_SCANNED_MAX: Final = 1 << 20  # alert records looked at for one page: a slice of the loop's time
_SERIES_DAYS_MAX: Final = 2  # days in each of its buckets
STEP_EVENTS: Final = 250_000  # a step of this size stays far below 50 ms

_RANKED_BY = {
    AggType.COUNT: ranking.BY_COUNT,
    AggType.SUM: ranking.BY_SUM,
    AggType.MAX: ranking.BY_MAX,
    AggType.LATEST: ranking.BY_LATEST,
    AggType.COUNT_UNIQUE: ranking.BY_UNIQUE,
}


class _Totals(msgspec.Struct):
    """Statistics that still grow by merging."""

    count: int = 0
    total: int = 0
    low: int | None = None
    high: int | None = None
    last_value: int | None = None
    last_event_at: int | None = None
    last_offset: int = -1
    unique: int | None = None
    alert_flags: int = 0

    def add(self, other: Stats) -> None:
        """Take in the statistics of further events; sets can't be merged."""
        if not other.count:
            return
        self.alert_flags |= other.alert_flags
        if other.unique is not None:
            assert self.count == 0, "a set comes from one place"
            self.count, self.unique = other.count, other.unique
            return
        self.count += other.count
        self.total += int128.from_bytes(other.sum)
        if other.min is not None and other.max is not None:
            self.low = other.min if self.low is None else min(self.low, other.min)
            self.high = other.max if self.high is None else max(self.high, other.max)
        assert other.last_event_at is not None, "an event has a time"
        mine = (-1 if self.last_event_at is None else self.last_event_at, self.last_offset)
        if (other.last_event_at, other.last_offset) > mine:
            self.last_value = other.last_value
            self.last_event_at = other.last_event_at
            self.last_offset = other.last_offset

    def stats(self) -> Stats:
        """Return what it has become."""
        return Stats(
            count=self.count,
            sum=int128.to_bytes(self.total),
            min=self.low,
            max=self.high,
            last_value=self.last_value,
            last_event_at=self.last_event_at,
            last_offset=self.last_offset,
            unique=self.unique,
            alert_flags=self.alert_flags,
        )


def empty_stats(agg_type: AggType) -> Stats:
    """Return the statistics of no events."""
    return Stats(unique=0) if agg_type is AggType.COUNT_UNIQUE else Stats()


def stats_of(agg_type: AggType, row: list[int]) -> Stats:
    """Make statistics of a row (`kernels.R_`), the same as cells give."""
    if agg_type is AggType.COUNT_UNIQUE:
        return Stats(count=row[k.R_COUNT], unique=row[k.R_UNIQUE])
    if agg_type is AggType.COUNT:
        return Stats(count=row[k.R_COUNT], last_event_at=row[k.R_LAST_TIME], last_offset=row[k.R_LAST_OFFSET])
    return Stats(
        count=row[k.R_COUNT],
        sum=int128.to_bytes(int128.from_words(row[k.R_SUM_LO], row[k.R_SUM_HI])),
        min=row[k.R_MIN],
        max=row[k.R_MAX],
        last_value=row[k.R_LAST_VALUE],
        last_event_at=row[k.R_LAST_TIME],
        last_offset=row[k.R_LAST_OFFSET],
    )


class TotalsRead:
    """A totals answer in the making: step it until it is done, then take the result."""

    def __init__(self, metric: ScanMetric, request: StoreTotals, as_of: int, scan: TotalsScan | None) -> None:
        self._metric = metric
        self._request = request
        self._as_of = as_of
        self._scan = scan
        self.cells: dict[tuple[int, GroupKey], _Totals] = {}
        self.ranking: Callable[[], list[Row]] | None = None  # gives the answer, where cells have it
        self._ranked: list[Row] | None = None

    @property
    def done(self) -> bool:
        """Whether `result` may be called."""
        return self.ranking is None and (self._scan is None or self._scan.done)

    @property
    def looks_at_all(self) -> bool:
        """Whether the next step looks at the cells of all accounts: for a thread, while they are held."""
        return self.ranking is not None

    def step(self, events_max: int = STEP_EVENTS) -> bool:
        """Do a piece of the work; return whether it is done. Raises what `TotalsScan.step` raises."""
        if self.ranking is not None:
            self._ranked, self.ranking = self.ranking(), None
        return self._scan is None or self._scan.step(events_max)

    @property
    def reads_files(self) -> bool:
        """Whether the next step may read the archive: that is for a thread."""
        return self._scan is not None and self._scan.reads_files

    def run(self) -> TotalsResult:
        """Do what is left, all at once."""
        while not self.step(RUN_EVENTS):
            pass
        return self.result()

    def result(self) -> TotalsResult:
        """Return the answer of a read that is done.

        Raises:
            InvalidRequestError: when it has too many rows.
        """
        assert self.done, "a result is asked for when it is there"
        if self._ranked is not None:
            rows = self._ranked
        elif self._request.account_id is None:
            rows = self._ranking()
        else:
            rows = self._rows()
        if len(rows) > limits.QUERY_ROWS_MAX:
            raise too_many_rows(limits.QUERY_ROWS_MAX)
        return TotalsResult(
            rows=rows, as_of=self._as_of, partition=self._request.partition, metric_uid=self._metric.uid
        )

    def _rows(self) -> list[Row]:
        merged = self.cells
        if self._scan is not None:
            tables = self._scan.tables
            groups: dict[int, GroupKey] = {}
            for row in self._scan.rows.tolist():
                number = row[k.R_GROUP]
                group = groups.get(number)
                if group is None:
                    group = groups[number] = tables.group(number)
                _add(merged, row[k.R_BUCKET], group, stats_of(self._metric.agg_type, row))
        if not self._request.group_by and len(self._request.buckets) == 1 and not merged:
            return [Row(stats=empty_stats(self._metric.agg_type))]
        return [
            Row(
                stats=totals.stats(),
                bucket=bucket,
                group=[GroupValue(kind=kind, value=value) for kind, value in group],
            )
            for (bucket, group), totals in sorted(merged.items(), key=_in_order)
        ]

    def _ranking(self) -> list[Row]:
        assert self._scan is not None, "a ranking that cells didn't answer has a scan"
        rows = self._scan.rows
        heap = np.empty(min(self._request.top, len(rows)), np.int64)
        agg_type = self._metric.agg_type
        count = int(ranking.rank_rows(rows, len(rows), _RANKED_BY[agg_type], heap))
        return [
            Row(stats=stats_of(agg_type, row), account_id=row[k.R_ACCOUNT] & (2**64 - 1))
            for row in rows[heap[:count]].tolist()
        ]


def _in_order(item: tuple[tuple[int, GroupKey], _Totals]) -> tuple[int, GroupKey]:
    return item[0]


def _add(merged: dict[tuple[int, GroupKey], _Totals], bucket: int, group: GroupKey, stats: Stats) -> None:
    totals = merged.get((bucket, group))
    if totals is None:
        totals = merged[bucket, group] = _Totals()
    totals.add(stats)


class EventsRead:
    """A page of events in the making: step it until it is done, then take the result."""

    def __init__(self, scan: EventsScan, as_of: int) -> None:
        self._scan = scan
        self._as_of = as_of

    @property
    def done(self) -> bool:
        """Whether `result` may be called."""
        return self._scan.done

    def step(self, events_max: int = STEP_EVENTS) -> bool:
        """Do a piece of the work; return whether it is done. Raises what `EventsScan.step` raises."""
        return self._scan.step(events_max)

    @property
    def reads_files(self) -> bool:
        """Whether the next step may read the archive: that is for a thread."""
        return self._scan.reads_files

    def run(self) -> EventsResult:
        """Do what is left, all at once."""
        self._scan.run()
        return self.result()

    def result(self) -> EventsResult:
        """Return the page of a read that is done."""
        assert self.done, "a result is asked for when it is there"
        return EventsResult(events=self._scan.events, next_offset=self._scan.next_offset, as_of=self._as_of)


class Reads:
    """The queries of one partition. Cheap to make; it keeps no state of its own."""

    def __init__(
        self,
        fold: Fold,
        source: RecordSource,
        *,
        uniques_max: int = UNIQUES_MAX,
        archive: Callable[[], Archived | None] = lambda: None,
    ) -> None:
        """Read from a fold, the log that it was folded from, and the archive of that log as it is when asked for."""
        self._fold = fold
        self._source = source
        self._uniques_max = uniques_max
        self._archive = archive

    # ------------------------------------------------------------ totals

    def totals(self, request: StoreTotals) -> TotalsResult:
        """Answer at once. Raises what `plan_totals` and `TotalsRead.step` raise."""
        return self.plan_totals(request).run()

    def plan_totals(self, request: StoreTotals) -> TotalsRead:
        """Take from the cells what they have, and prepare the scan for the rest.

        Raises:
            NotFoundError: no metric has this code here (yet).
            InvalidRequestError: a dimension that isn't declared, or a request that makes no sense.
        """
        slot = self._slot(request.metric_code)
        metric = self._metric(slot)
        starts, ends = _check_buckets(request.buckets)
        if request.account_id is None:
            if request.top < 1 or len(request.buckets) != 1 or request.group_by:
                raise InvalidRequestError("a ranking has one bucket, no group_by, and top of at least 1")
            if request.top > limits.QUERY_ROWS_MAX:
                raise InvalidRequestError(
                    f"top must be at most {limits.QUERY_ROWS_MAX}", code=ErrorCode.TOO_LARGE
                )
        else:
            _check_account(request.account_id)
        # These refuse what isn't declared, or is named twice.
        selection = self._fold.select(slot, [(item.key, item.values) for item in request.filters])
        group_by = [self._fold.dimension(slot, key) for key in request.group_by]
        if len(set(group_by)) != len(group_by):
            raise InvalidRequestError("a dimension is grouped by twice")
        filters = [(metric.dimension(item.key), frozenset(item.values)) for item in request.filters]

        # Once, and all of this in one turn of the loop: a part of the log is in the one or in the other.
        archived = usable(self._archive(), self._source.log_start)
        rows = rows_between(self._source, *offsets_in_log(metric, archived, self._fold.applied))
        low, high = self._time_bounds(metric, rows, archived)
        plan = np.zeros((len(starts), p.PLAN_FIELDS), np.int64)
        p.plan_buckets(
            self._fold.schemas.arrays,
            slot,
            starts,
            ends,
            low,
            high,
            not request.filters and not request.group_by,
            metric.agg_type is not AggType.COUNT_UNIQUE,
            plan,
        )
        if request.account_id is None:
            return self._plan_ranking(request, slot, metric, rows, plan[0], selection, filters, archived)

        cells: dict[tuple[int, GroupKey], _Totals] = {}
        # A long series of hours is raw events throughout: no Python for each of its buckets.
        in_cells = (plan[:, p.P_PERIOD] != 0) | (plan[:, p.P_DAYS_START] != plan[:, p.P_DAYS_END])
        raw = np.flatnonzero(~in_cells & (plan[:, p.P_HEAD_START] < plan[:, p.P_HEAD_END]))
        heads = plan[raw][:, [p.P_HEAD_START, p.P_HEAD_END]]
        intervals: list[Interval] = list(
            zip(heads[:, 0].tolist(), heads[:, 1].tolist(), raw.tolist(), strict=True)
        )
        series = self._day_series(cells, request.account_id, slot, plan, selection, group_by)
        for bucket in np.flatnonzero(in_cells).tolist():
            part = plan[bucket].tolist()
            if part[p.P_PERIOD]:
                exact = request.buckets[bucket]
                self._add_period(cells, bucket, request.account_id, slot, part[p.P_PERIOD_START], exact)
                continue
            if series is None:
                days = self._add_days(cells, bucket, request.account_id, slot, part, selection, group_by)
            else:
                days = series.get(bucket, [])
            intervals += self._intervals(slot, bucket, request.buckets[bucket], part, days)
        intervals.sort()
        scan = TotalsScan(
            self._source,
            metric,
            account=request.account_id,
            intervals=intervals,
            applied=self._fold.applied,
            rows=rows,
            filters=filters,
            group_by=group_by,
            uniques_max=self._uniques_max,
            archived=archived,
        )
        read = TotalsRead(metric, request, self._fold.applied, scan)
        read.cells = cells
        return read

    def _time_bounds(
        self, metric: ScanMetric, rows: RecordRows, archived: Archived | None
    ) -> tuple[int, int]:
        """The half-open range outside which the metric has no event."""
        if not is_covered(self._source, archived, metric.first_offset, metric.end_offset):
            return 0, TIME_END_NS
        bounds = []
        if archived is not None:
            last = min(metric.end_offset, self._fold.applied)
            found = archived.time_bounds(metric.first_offset, last)
            bounds += [] if found is None else [found]
            # What was dropped is in cells: days before what is left aren't empty.
            bounds += [
                (item.start_ns, item.end_ns) for item in archived.dropped if item.metric_uid == metric.uid
            ]
        if len(rows.base_offset):
            bounds.append((int(rows.min_time_ns.min()), int(rows.max_time_ns.max()) + 1))
        if not bounds:
            return 0, 0
        return max(min(low for low, _ in bounds), 0), max(high for _, high in bounds)

    def _add_period(
        self,
        cells: dict[tuple[int, GroupKey], _Totals],
        bucket: int,
        account: int,
        slot: int,
        period_start: int,
        exact: tuple[int, int],
    ) -> None:
        stats, start, end = self._fold.period_stats(account, slot, max(period_start, 0))
        if stats is None:
            return
        if tuple(exact) != (start, end):
            # It holds just the bucket's events by chance; flags are the whole period's.
            stats = msgspec.structs.replace(stats, alert_flags=0)
        _add(cells, bucket, (), stats)

    def _day_series(
        self,
        cells: dict[tuple[int, GroupKey], _Totals],
        account: int,
        slot: int,
        plan: IntArray,
        selection: IntArray,
        group_by: list[int],
    ) -> dict[int, list[int]] | None:
        """Add all buckets' whole days in one look, if they are many and short; return days cells don't hold.

        None: they are few or long, and each is better merged by itself.
        """
        buckets = np.flatnonzero(plan[:, p.P_DAYS_START] != plan[:, p.P_DAYS_END])
        starts, ends = plan[buckets, p.P_DAYS_START], plan[buckets, p.P_DAYS_END]
        if len(buckets) < _SERIES_MIN or int((ends - starts).max()) > _SERIES_DAYS_MAX * DAY_NS:
            return None
        found = self._fold.day_rows(
            account, slot, int(starts[0]), int(ends[-1]), selection, group_by, per_day=True
        )

        def bucket_of(day: int) -> int:
            at = int(starts.searchsorted(day, side="right")) - 1
            return int(buckets[at]) if at >= 0 and day < ends[at] else -1

        for row in found.rows:
            bucket = bucket_of(row.day_start_ns)
            if bucket >= 0:
                _add(cells, bucket, tuple((value.kind, value.value) for value in row.group), row.stats)
                if len(cells) > limits.QUERY_ROWS_MAX:
                    raise too_many_rows(limits.QUERY_ROWS_MAX)
        overflowed: dict[int, list[int]] = {}
        for day in found.overflowed:
            overflowed.setdefault(bucket_of(day), []).append(day)
        return overflowed

    def _add_days(
        self,
        cells: dict[tuple[int, GroupKey], _Totals],
        bucket: int,
        account: int,
        slot: int,
        part: list[int],
        selection: IntArray,
        group_by: list[int],
    ) -> list[int]:
        """Add the whole days' cells; return the days that cells don't hold."""
        start, end = part[p.P_DAYS_START], part[p.P_DAYS_END]
        if start == end:
            return []
        found = self._fold.day_rows(account, slot, start, end, selection, group_by)
        for row in found.rows:
            _add(cells, bucket, tuple((value.kind, value.value) for value in row.group), row.stats)
            if len(cells) > limits.QUERY_ROWS_MAX:
                raise too_many_rows(limits.QUERY_ROWS_MAX)
        return found.overflowed

    def _intervals(
        self, slot: int, bucket: int, bounds: tuple[int, int], part: list[int], days: Sequence[int]
    ) -> list[Interval]:
        """What of a bucket is to be counted from raw events."""
        edges = [(part[p.P_HEAD_START], part[p.P_HEAD_END])]
        # A day taken whole may reach beyond the bucket, where there are no events; intervals may not.
        edges += [(max(day, bounds[0]), min(self._day_end(slot, day), bounds[1])) for day in days]
        edges.append((part[p.P_TAIL_START], part[p.P_TAIL_END]))
        return [(start, end, bucket) for start, end in edges if start < end]

    def _day_end(self, slot: int, day: int) -> int:
        return self._fold.schemas.day_of(slot, max(day, 0))[1]

    def _plan_ranking(
        self,
        request: StoreTotals,
        slot: int,
        metric: ScanMetric,
        rows: RecordRows,
        part: IntArray,
        selection: IntArray,
        filters: Sequence[tuple[int, frozenset[str]]],
        archived: Archived | None,
    ) -> TotalsRead:
        plan = part.tolist()
        if plan[p.P_PERIOD]:
            read = TotalsRead(metric, request, self._fold.applied, None)
            start = plan[p.P_PERIOD_START]
            exact = tuple(request.buckets[0]) == self._fold.schemas.period_of(slot, max(start, 0))

            def rank() -> list[Row]:
                ranked = self._fold.top_period(slot, start, request.top).accounts
                return [
                    Row(
                        stats=stats if exact else msgspec.structs.replace(stats, alert_flags=0),
                        account_id=account,
                    )
                    for account, stats in ranked
                ]

            read.ranking = rank
            return read
        overflowed = np.empty(0, np.int64)
        days = plan[p.P_DAYS_START], plan[p.P_DAYS_END]
        if days[0] < days[1]:
            overflowed = self._overflowed_days(slot, *days, selection)
        scan = TotalsScan(
            self._source,
            metric,
            account=None,
            intervals=self._intervals(slot, 0, request.buckets[0], plan, overflowed.tolist()),
            applied=self._fold.applied,
            rows=rows,
            filters=filters,
            uniques_max=self._uniques_max,
            archived=archived,
        )
        if days[0] < days[1]:
            for cells, found in self._day_cells(slot, *days, selection):
                if len(found):
                    scan.add_cells(cells, found, overflowed)
        return TotalsRead(metric, request, self._fold.applied, scan)

    def _day_cells(
        self, slot: int, first: int, end: int, selection: IntArray
    ) -> Iterator[tuple[IntArray, IntArray]]:
        """All accounts' cells of whole days, see `Fold.day_cells`."""
        return self._fold.day_cells(slot, first, end, selection if len(selection) else NO_SELECTION)

    def _overflowed_days(self, slot: int, first: int, end: int, selection: IntArray) -> IntArray:
        """The whole days that overflowed for any account."""
        days = []
        for cells, found in self._day_cells(slot, first, end, selection):
            marked = np.empty(len(found), np.int64)
            days.append(np.unique(marked[: ranking.overflowed_days(cells, found, marked)]))
        return np.unique(np.concatenate(days))

    # ------------------------------------------------------------ the rest

    def realtime(self, request: StoreRealtime, now_ns: int) -> RealtimeResult:
        """Answer with the running total of a billing period.

        Raises:
            NotFoundError: no metric has this code here (yet).
        """
        slot = self._slot(request.metric_code)
        _check_account(request.account_id)
        at_ns = now_ns if request.at_ns is None else request.at_ns
        if not 0 <= at_ns < TIME_END_NS:
            raise InvalidRequestError("at_ns is outside of time")
        stats, start, end = self._fold.period_stats(request.account_id, slot, at_ns)
        if stats is None:
            stats = empty_stats(AggType(int(self._fold.schemas.agg_types[slot])))
        return RealtimeResult(
            stats=stats, start_ns=start, end_ns=end, as_of=self._fold.applied, partition=request.partition
        )

    def events(self, request: StoreEvents) -> EventsResult:
        """Answer at once. Raises what `plan_events` and `EventsRead.step` raise."""
        return self.plan_events(request).run()

    def plan_events(self, request: StoreEvents) -> EventsRead:
        """Prepare a page of raw events.

        Raises:
            NotFoundError: no metric has this code here (yet).
            InvalidRequestError: a limit or bounds that make no sense.
        """
        if not 1 <= request.limit <= limits.PAGE_EVENTS_MAX:
            raise InvalidRequestError(f"limit must be 1 to {limits.PAGE_EVENTS_MAX}, not {request.limit}")
        if request.from_offset < 0:
            raise InvalidRequestError("from_offset must not be negative")
        if request.start_ns > request.end_ns:
            raise InvalidRequestError("the range ends before it begins")
        if request.account_id is not None:
            _check_account(request.account_id)
        metric = None if request.metric_code is None else self._metric(self._slot(request.metric_code))
        scan = EventsScan(
            self._source,
            account=request.account_id,
            metric=metric,
            start_ns=request.start_ns,
            end_ns=request.end_ns,
            applied=self._fold.applied,
            from_offset=request.from_offset,
            limit=request.limit,
            archived=self._archive(),
        )
        return EventsRead(scan, self._fold.applied)

    def alerts(self, request: StoreAlerts) -> AlertsResult:
        """Answer with a page of alert records; it may be short, or empty, with more to come.

        Raises:
            NotFoundError: no metric has this code here (yet).
            InvalidRequestError: a limit, range or position that makes no sense.
        """
        if not 1 <= request.limit <= limits.PAGE_EVENTS_MAX:
            raise InvalidRequestError(f"limit must be 1 to {limits.PAGE_EVENTS_MAX}, not {request.limit}")
        if not 0 <= request.from_position < 2**63:
            raise InvalidRequestError(f"there is no position {request.from_position}")
        if request.start_ns > request.end_ns:
            raise InvalidRequestError("the range ends before it begins")
        if request.account_id is not None:
            _check_account(request.account_id)
        for account in request.account_ids:
            _check_account(account)
        if len(request.account_ids) > limits.SUBSCRIPTION_ACCOUNTS_MAX:
            raise InvalidRequestError(f"account_ids names more than {limits.SUBSCRIPTION_ACCOUNTS_MAX}")
        if len(request.metric_codes) > limits.SUBSCRIPTION_METRICS_MAX:
            raise InvalidRequestError(f"metric_codes names more than {limits.SUBSCRIPTION_METRICS_MAX}")
        slot = None if request.metric_code is None else self._slot(request.metric_code)
        choice = None
        if request.account_ids or request.metric_codes:
            choice = AlertChoice(request.account_ids, request.metric_codes)
        fold = self._fold
        end = fold.alert_count
        if request.end_ns < TIME_END_NS:
            # What was raised later is not passed over: it may be asked for by a next call.
            end = fold.alert_at_time(request.end_ns)
        start = request.from_position
        if request.start_ns > 0:
            start = max(start, fold.alert_at_time(request.start_ns))
        scanned = min(end, start + ALERTS_SCANNED_MAX)
        found = fold.find_alerts(start, scanned, request.account_id, slot, request.limit, choice=choice)
        position = found[-1] + 1 if len(found) == request.limit else scanned
        # A position beyond the end stays: whoever asks is ahead of this replica, not behind.
        position = max(position, request.from_position)
        return AlertsResult(alerts=fold.alerts_at(found), next_position=position, more=position < end)

    def _slot(self, code: str) -> int:
        slot = self._fold.schemas.slot_of(code)
        if slot < 0:
            raise NotFoundError(
                f'no metric has the code "{code:.80}"',
                code=ErrorCode.UNKNOWN_METRIC,
                details={"metric_code": code},
            )
        return slot

    def _metric(self, slot: int) -> ScanMetric:
        schemas = self._fold.schemas
        record = schemas.record(slot)
        first, end = schemas.offsets_of(slot)
        dimensions = tuple(
            ScanDimension(dimension.key, not dimension.values, dict(since))
            for dimension, since in zip(record.schema.filters, schemas.declared(slot), strict=True)
        )
        return ScanMetric(
            record.schema.code, record.uid, AggType(record.schema.agg_type), first, end, dimensions
        )


def _check_account(account: int) -> None:
    if not 0 <= account <= limits.ACCOUNT_ID_MAX:
        raise InvalidRequestError("an account id is a whole number from 0 to 2^64-1")


def _check_buckets(buckets: list[tuple[int, int]]) -> tuple[IntArray, IntArray]:
    """Return starts and ends of buckets that are sorted and disjoint."""
    if not 1 <= len(buckets) <= limits.QUERY_BUCKETS_MAX:
        raise InvalidRequestError(f"a query has 1 to {limits.QUERY_BUCKETS_MAX} buckets")
    try:
        table = np.array(buckets, np.int64).reshape(len(buckets), 2)
    except OverflowError as error:
        raise InvalidRequestError("a bucket's bound is outside of time") from error
    starts, ends = np.ascontiguousarray(table[:, 0]), np.ascontiguousarray(table[:, 1])
    if (starts > ends).any() or (ends[:-1] > starts[1:]).any():
        raise InvalidRequestError("buckets must be sorted and disjoint, each ending after it begins")
    return starts, ends


def warm_up() -> None:
    """Compile every kernel of reads, on a log of one event: to be called before there is anything to be late for."""
    event = b"w" + bytes(8)  # the metric's code, then the account; the rest of the columns is absent
    body = lay.CHUNK_ENTRY.pack(0, 0, 0, 0, 1, 0, 0) + (1).to_bytes(4, "little") + event
    length = lay.PAYLOAD_HEADER_BYTES + len(body)
    header = lay.PAYLOAD_HEADER.pack(
        lay.PAYLOAD_MAGIC, length, 1, 1, lay.CONSTANT << (4 * lay.COLUMN_ACCOUNT), 1, 0, 1, 0, 0, 0, 0, 0
    )
    payload = np.frombuffer(header + body, np.uint8)
    columns = np.zeros(COLUMNS, np.int64)
    status = place_payload(payload, 0, length, columns)
    assert status == OK, "the event is well-formed"
    stored = batch.encode_prefix(0, 1, None, None) + header + body
    for agg_type in (AggType.SUM, AggType.COUNT_UNIQUE):
        fold = Fold(0)
        schema = MetricSchema(code="w", agg_type=agg_type, filters=[DimensionFilter(key="d")])
        fold.put_schema(make_record(1, schema), 0)
        source = MemorySource(0)
        source.append(stored, base_offset=1, count=1, append_ns=9, min_time_ns=0, max_time_ns=20)
        fold.apply(payload, columns, None, 1, 9)
        reads = Reads(fold, source)
        for bounds in ((0, 10), (0, TIME_END_NS)):
            for request in (
                StoreTotals(0, "w", 0, [bounds]),
                StoreTotals(0, "w", 0, [bounds], [Filter("d", ["v"])], ["d"]),
                StoreTotals(0, "w", None, [bounds], top=1),
                StoreTotals(0, "w", None, [bounds], [Filter("d", ["v"])], top=1),
            ):
                reads.totals(request)
        reads.events(StoreEvents(0, 0, "w", 0, 20))
        reads.realtime(StoreRealtime(0, "w", 0), 0)
    TotalsScan.warm_up()
