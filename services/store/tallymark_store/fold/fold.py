"""One partition's totals as of an offset of its log: see `Fold`."""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from operator import gt
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from tallymark_protocol import int128, limits
from tallymark_protocol.errors import RemoteProtocolError
from tallymark_protocol.kernels.blake2b import WORK_WORDS
from tallymark_protocol.messages import AlertRecord, GroupValue, Stats
from tallymark_protocol.model import AggType
from tallymark_protocol.payload import C_ACCOUNT, C_EVENTS, C_PROPERTY_BYTES, C_PROPERTY_SETS
from tallymark_protocol.schema import MetricRecord, decode_record, encode_record
from tallymark_store.fold import cells as cell_layout
from tallymark_store.fold import evicting, reads, thresholds, uniques, units
from tallymark_store.fold.alert_files import AlertFile, AlertFiles
from tallymark_store.fold.arena import Arena
from tallymark_store.fold.cells import CELL_WORDS, FREE, W_KEY, W_LINKS
from tallymark_store.fold.counters import (
    COUNTERS,
    N_ALERT_BASE,
    N_ALERTS,
    N_CELLS,
    N_FREE_CELL,
    N_FREE_CELLS,
    N_FREE_MEMBER,
    N_FREE_MEMBERS,
    N_MEMBERS,
    N_NEED,
    N_NEED_FILE,
    N_NEED_RECORD,
    N_ROWS,
    N_SPILLED,
    N_SPILLED_MEMBERS,
)
from tallymark_store.fold.digest import digest_state
from tallymark_store.fold.dimensions import WIDTH, Dimensions
from tallymark_store.fold.index import Index
from tallymark_store.fold.kernel import (
    BLOCK,
    SCRATCH_FIELDS,
    Scratch,
    StateArrays,
    fold_events,
    names_unknown,
    reindex_cells,
)
from tallymark_store.fold.runs import P_BASE, P_SLOTS, P_SLOTS_END, P_VERDICTS, P_VERDICTS_END, fold_run
from tallymark_store.fold.schemas import SchemaTable
from tallymark_store.fold.spilled import (
    UNIT_RECORDS_MAX,
    Piece,
    SpilledFile,
    SpilledFileError,
    SpilledFiles,
    damage,
)
from tallymark_store.fold.thresholds import ALERT_WORDS
from tallymark_store.fold.uniques import MEMBER_WORDS, reindex_members

Ints = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]

SNAPSHOT_VERSION = 1
SPILLED_VERSION = 2  # of a snapshot that is not all: there are files besides

_CELLS_RESERVED = 1 << 30
_MEMBERS_RESERVED = 1 << 31
_ROWS_RESERVED = 1 << 28
_ALERTS_RESERVED = 1 << 27
_ROOM_AHEAD = 1 << 16  # rows
_ENTRIES_AT_ONCE = 1 << 18  # of sets, looked at
_NO_SIZES: npt.NDArray[np.int32] = np.zeros(0, dtype=np.int32)
_INDEX_BYTES = 24  # of the index, a cell: an entry or two at a load of nearly a half
_SAMPLE = 4_096  # cells that are looked at to find out how old the coldest are
_COPIED_RECORDS = 2 * UNIT_RECORDS_MAX  # of files that a scan looks at together
_HIGHEST = 2**63 - 1
_HELD = "nothing changes while a thread looks at it"
_MEMO_MIN = 64
_MEMO_MAX = 1 << 18
_NO_VERDICTS: Bytes = np.zeros(0, dtype=np.uint8)
_NO_VERDICTS.setflags(write=False)
NO_SELECTION: Ints = np.zeros((0, 2), dtype=np.int64)

_RANKED_BY = {  # the fields of a cell, and of an accumulator, that hold an aggregate; None: sign of the other
    AggType.COUNT: (cell_layout.W_COUNT, None, reads.G_COUNT, None),
    AggType.SUM: (cell_layout.W_LO, cell_layout.W_HI, reads.G_LO, reads.G_HI),
    AggType.MAX: (cell_layout.W_MAX, None, reads.G_MAX, None),
    AggType.LATEST: (cell_layout.W_LAST_VALUE, None, reads.G_LAST_VALUE, None),
    AggType.COUNT_UNIQUE: (cell_layout.W_LO, None, reads.G_LO, None),
}


class DayRow(NamedTuple):
    """Statistics of one group, of one day where days are kept apart."""

    group: list[GroupValue]
    stats: Stats
    day_start_ns: int = 0


class DayRows(NamedTuple):
    """What day cells know about a range of days: rows in order of first appearance, and the days to count anew.

    `overflowed` lists starts of days of which the cells don't hold everything; nothing of them is in `rows`.
    """

    rows: list[DayRow]
    overflowed: list[int]


class TopAccounts(NamedTuple):
    """The accounts with the largest aggregate, largest first, ties by account id.

    `overflowed` lists the accounts that cells can't answer for; none of them is in `accounts`.
    """

    accounts: list[tuple[int, Stats]]
    overflowed: list[int]


class AlertChoice:
    """Accounts and metric codes that alert records may be of; none: all.

    A code stands for every metric that ever had it, deleted ones included; it need not exist.
    """

    __slots__ = ("account_words", "accounts", "metric_codes")

    def __init__(self, accounts: Iterable[int] = (), metric_codes: Iterable[str] = ()) -> None:
        self.accounts = frozenset(accounts)
        self.metric_codes = frozenset(metric_codes)
        self.account_words: Ints = np.array([_signed(account) for account in self.accounts], dtype=np.int64)


class Fold:
    """The totals of one partition.

    State changes only by `put_schema`, `apply` and `advance`, called in log order, each record once; it is a pure
    function of them. `apply` doesn't hold the GIL while it works, but nothing else may touch the same fold then.

    Attributes:
        held: a thread looks at the state: nothing may change it, nor move parts of it to files.
    """

    def __init__(self, partition: int, *, hash_seed: int = 0) -> None:
        self.partition = partition
        self.held = False
        self.applied = 0  # exclusive: everything below this offset is in
        self.schemas = SchemaTable()  # as of `applied`
        # Layout of hash tables only, nothing logical: lets a process be unpredictable to who chooses accounts.
        self.dimensions = Dimensions(seed=hash_seed)
        self._seed = np.uint64(hash_seed)
        self._cells = Arena(np.int64, columns=CELL_WORDS, reserve_rows=_CELLS_RESERVED)
        self._members = Arena(np.int64, columns=MEMBER_WORDS, reserve_rows=_MEMBERS_RESERVED)
        self._rows = Arena(np.int64, columns=2, reserve_rows=_ROWS_RESERVED)
        self._alerts = Arena(np.int64, columns=ALERT_WORDS, reserve_rows=_ALERTS_RESERVED)
        self._cell_index = Index()
        self._member_index = Index()
        self._counters: Ints = np.zeros(COUNTERS, dtype=np.int64)
        self._history: list[tuple[int, bytes]] = []  # every schema record: offset, encoded
        self._scratch = Scratch(
            np.zeros((BLOCK, SCRATCH_FIELDS), dtype=np.int64),
            np.full((_MEMO_MIN, 2), -1, dtype=np.int64),
            np.zeros(WIDTH, dtype=np.int64),
            np.zeros(WORK_WORDS, dtype=np.uint64),
        )
        self._room: tuple[int, ...] = (0, 0, 0, 0)  # rows of the four arenas that are sure to be there
        self.spilled = SpilledFiles(partition)
        self.alert_files = AlertFiles(partition)  # of the records before those in memory
        self._state = self._arrays()

    def _arrays(self) -> StateArrays:
        return StateArrays(
            self._cells.array,
            self._cells.array.reshape(-1),
            self._cell_index.table,
            self._cell_index.shards,
            self._members.array,
            self._member_index.table,
            self._member_index.shards,
            self._rows.array,
            self._alerts.array,
            self._counters,
            self.spilled.table,
        )

    # ------------------------------------------------------------ writing

    def put_schema(self, record: MetricRecord, offset: int) -> None:
        """Apply the schema record at `offset`."""
        assert not self.held, _HELD
        assert offset >= self.applied, "records are applied in log order, once"
        slot = self.schemas.put(record, offset)
        self.dimensions.put(self.schemas, slot)
        self._history.append((offset, encode_record(record)))
        self.applied = offset + 1

    def advance(self, offset: int) -> None:
        """Everything below `offset` has been applied, or concerns no totals."""
        assert not self.held, _HELD
        assert offset >= self.applied, "the applied offset never falls"
        self.applied = offset

    def apply(
        self, data: Bytes, columns: Ints, verdicts: Bytes | None, base_offset: int, append_ns: int
    ) -> None:
        """Apply an event batch: its payload placed in `data` (`payload.place_payload`), its verdicts (None: all in).

        Raises:
            RemoteProtocolError: an accepted event names a metric that the log didn't put before it. Nothing of the
                batch is applied then.
        """
        assert not self.held, _HELD
        assert base_offset >= self.applied, "records are applied in log order, once"
        n = int(columns[C_EVENTS])
        assert verdicts is None or len(verdicts) == n
        # One type of array, so that the kernels are compiled once: buffers come both writable and not.
        data = data.view()
        data.setflags(write=False)
        if verdicts is None:
            marks = _NO_VERDICTS
        else:
            marks = verdicts.view()
            marks.setflags(write=False)
        metric_slots = self.schemas.slots_of(data, columns)
        per_event, widest, has_unknown = self.schemas.widths(metric_slots)
        if has_unknown and names_unknown(data, columns, marks, metric_slots):
            raise RemoteProtocolError(
                f"the event batch at offset {base_offset} names a metric that isn't in the log"
            )
        sets, property_bytes = _properties_in(columns, len(metric_slots))
        scratch = self._make_room(n, per_event, widest, sets, property_bytes)
        position = 0
        while True:
            position = fold_events(
                data, columns, marks, position, base_offset, append_ns, metric_slots, self.schemas.arrays,
                self.dimensions.arrays, self._state, scratch, self._seed,
            )  # fmt: skip
            if self._cell_index.make_room() | self._member_index.make_room():
                self._state = self._arrays()
            self.dimensions.make_room()
            if position == n:
                break
            if self._counters[N_NEED]:
                self._bring_back()
                scratch = self._make_room(n, per_event, widest, sets, property_bytes)
        self.applied = base_offset + n

    def apply_run(self, data: Bytes, columns: Ints, places: Ints) -> None:
        """Apply event batches that follow each other in the log and lie in one buffer, as `apply` does each.

        Args:
            data: the buffer, not writable.
            columns: a row for each batch, filled by `runs.place_run`.
            places: a row for each batch; see `runs`. Where its metric slots lie is filled in here.

        Raises:
            RemoteProtocolError: as `apply`; nothing of the run is applied then.
        """
        assert not self.held, _HELD
        assert places[0, P_BASE] >= self.applied, "records are applied in log order, once"
        tables = []
        total = per_event = widest = sets = property_bytes = 0
        known = self.schemas
        for place, row in zip(places, columns, strict=True):
            slots = known.slots_of(data, row)
            place[P_SLOTS] = total
            total += len(slots)
            place[P_SLOTS_END] = total
            tables.append(slots)
            most, width, has_unknown = known.widths(slots)
            marks = data[place[P_VERDICTS] : place[P_VERDICTS_END]]
            if has_unknown and names_unknown(data, row, marks, slots):
                raise RemoteProtocolError(
                    f"the event batch at offset {place[P_BASE]} names a metric that isn't in the log"
                )
            per_event, widest = max(per_event, most), max(widest, width)
            if width:
                more_sets, more_bytes = _properties_in(row, len(slots))
                sets, property_bytes = max(sets, more_sets), property_bytes + more_bytes
        metric_slots = np.concatenate(tables)
        scratch = self._make_room(int(columns[:, C_EVENTS].sum()), per_event, widest, sets, property_bytes)
        count = len(places)
        batch = position = 0
        while True:
            batch, position = fold_run(
                data, columns, places, batch, position, metric_slots, widest > 0, known.arrays,
                self.dimensions.arrays, self._state, scratch, self._seed,
            )  # fmt: skip
            if self._cell_index.make_room() | self._member_index.make_room():
                self._state = self._arrays()
            self.dimensions.make_room()
            if batch == count:
                break
            if self._counters[N_NEED]:
                self._bring_back()
                scratch = self._make_room(
                    int(columns[:, C_EVENTS].sum()), per_event, widest, sets, property_bytes
                )
        self.applied = int(places[-1, P_BASE] + columns[-1, C_EVENTS])

    def _make_room(self, n: int, per_event: int, widest: int, sets: int, property_bytes: int) -> Scratch:
        """Room in dense arrays for all that n events can add: they never run full inside the kernel.

        `per_event` is the most thresholds of a metric in the payloads, `widest` the most dimensions, `sets` the most
        property sets in one payload, `property_bytes` what all of them can add.
        """
        cells, members, rows, alerts = self._counters[: N_ALERTS + 1].tolist()
        needed = (cells + 2 * n, members + n, rows + per_event * n, alerts + per_event * n)
        if self.spilled.files:  # an event may bring back its period, and a small day
            needed = (needed[0] + 3 * n, needed[1] + 2 * n, needed[2] + limits.THRESHOLDS_MAX * n, needed[3])
        if any(map(gt, needed, self._room)):
            arenas = (self._cells, self._members, self._rows, self._alerts)
            # Ahead of need, so that most batches find room: nothing is touched, let alone written, by it.
            self._room = tuple(count + _ROOM_AHEAD for count in needed)
            before = [arena.rows for arena in arenas]
            for arena, count in zip(arenas, self._room, strict=True):
                arena.ensure(count)
            if before != [arena.rows for arena in arenas]:
                self._state = self._arrays()
            self._cell_index.advise()
            self._member_index.advise()
        scratch = self._scratch
        if widest:
            self.dimensions.ensure(
                n, widest * n, min(property_bytes, widest * n * limits.PROPERTY_VALUE_BYTES_MAX)
            )
            entries = 1 << max(2 * (sets + 1) - 1, 1).bit_length()
            entries = min(max(entries, _MEMO_MIN), _MEMO_MAX)
            memo = scratch.memo
            if len(memo) < entries or len(memo) > 16 * entries:
                memo = np.full((entries, 2), -1, dtype=np.int64)
                self._scratch = scratch = scratch._replace(memo=memo)
            else:
                memo.fill(-1)
        return scratch

    # ------------------------------------------------------------ files

    def _bring_back(self) -> None:
        """Bring the unit back that a kernel has stopped for."""
        length, number, record = self._counters[[N_NEED, N_NEED_FILE, N_NEED_RECORD]].tolist()
        self._counters[N_NEED] = 0
        if length < 0:
            raise self.spilled.damaged(number)
        self._cells.ensure(int(self._counters[N_CELLS]) + length)
        self._rows.ensure(int(self._counters[N_ROWS]) + limits.THRESHOLDS_MAX)
        self._members.ensure(self.member_rows + units.MEMBERS_A_RECORD * length)
        self._state = self._arrays()
        done = 0
        while True:
            state = self._state
            done = int(
                units.load_unit(
                    state.cells, state.table, state.shards, state.members, state.member_table, state.member_shards,
                    state.rows, state.counters, state.files, number, record, length, done,
                    self.dimensions.combo_count, True, self._seed,
                )
            )  # fmt: skip
            if done < 0:
                raise self.spilled.damaged(number)
            if self._cell_index.make_room() | self._member_index.make_room():
                self._state = self._arrays()
            if done == length:
                return

    def coldest(self, fraction: float, log_time_ns: int) -> Ints:
        """What is to leave memory so that about a fraction of the cells does: a cut for `Piece`."""
        live = int(self._counters[N_CELLS] - self._counters[N_FREE_CELLS])
        cut = np.array([log_time_ns, 0, 0], dtype=np.int64)
        sample = np.arange(0, self.cell_rows, max(1, self.cell_rows // _SAMPLE), dtype=np.int64)
        if not live or not len(sample):
            return cut
        ends, touched = np.empty_like(sample), np.zeros_like(sample)
        evicting.ends_of(self._state, self.schemas.arrays, sample, ends, touched)
        is_over, is_open = (ends >= 0) & (ends <= log_time_ns), ends > log_time_ns
        total = np.count_nonzero(self._state.cells[sample, W_KEY] != FREE)
        wanted = math.ceil(fraction * total)
        over = np.sort(touched[is_over])
        if wanted <= len(over) and fraction < 1.0:
            cut[evicting.CUT_OVER] = over[max(wanted - 1, 0)] + 1 if len(over) else 0
            return cut
        cut[evicting.CUT_OVER] = _HIGHEST
        still_open = np.sort(touched[is_open])
        wanted = min(wanted - len(over), len(still_open))
        if wanted > 0:
            cut[evicting.CUT_OPEN] = still_open[wanted - 1] + 1
        if fraction >= 1.0:
            cut[evicting.CUT_OPEN] = _HIGHEST
        return cut

    def set_sizes(self) -> Iterator[npt.NDArray[np.int32]]:
        """Count, some at a time, how many entries the set of each row of a cell has; the same array again and again."""
        sizes = np.zeros(self.cell_rows, dtype=np.int32)
        yield sizes
        for first in range(0, self.member_rows, _ENTRIES_AT_ONCE):
            end = min(first + _ENTRIES_AT_ONCE, self.member_rows)
            evicting.count_entries(self._state.members, first, end, sizes)
            yield sizes

    def collect(
        self, piece: Piece, first: int, end: int, set_sizes: npt.NDArray[np.int32] = _NO_SIZES
    ) -> int:
        """Copy the cold units that begin in the rows [first, end) to a piece; returns the row to go on with.

        That is before `end` where the piece is full. See `cell_rows` for where rows end. Sets go that are in
        `set_sizes`; call `collect_sets` then.
        """
        row, piece.record_count, piece.unit_count = evicting.collect_units(
            self._state, self.schemas.arrays, first, min(end, self.cell_rows), piece.cut, piece.records,
            piece.record_count, piece.units, piece.unit_count, UNIT_RECORDS_MAX,
            set_sizes[: len(piece.set_units)], piece.set_units,
        )  # fmt: skip
        return int(row)

    def collect_sets(self, piece: Piece) -> Iterator[None]:
        """Copy the entries of a piece's sets, some at a time."""
        if not piece.set_units.any():
            return
        for first in range(0, self.member_rows, _ENTRIES_AT_ONCE):
            evicting.copy_entries(
                self._state.members, first, min(first + _ENTRIES_AT_ONCE, self.member_rows), piece.set_units,
                piece.units, piece.records, piece.entry_rows,
            )  # fmt: skip
            yield

    def add_spilled(self, file: SpilledFile) -> None:
        """There is a new file, of units that are in memory; `evict` them now."""
        assert not self.held, _HELD
        self.spilled.add(file)
        self._state = self._arrays()

    def replace_spilled(self, old: Sequence[SpilledFile], new: SpilledFile) -> None:
        """Files, neighbours in age, have been merged into a new one."""
        assert not self.held, _HELD
        self.spilled.replace(old, new)
        self._state = self._arrays()

    def evict(self, piece: Piece, first: int, end: int) -> int:
        """Take the units [first, end) of a piece that is in a file out of memory, but those that were touched since.

        Returns how many went.
        """
        assert not self.held, _HELD
        return int(
            evicting.evict_units(
                self._state, self.schemas.arrays.slots, piece.units, first, min(end, piece.unit_count), piece.records,
                piece.entry_rows, self._seed,
            )
        )  # fmt: skip

    def _copy_state(self, cells: int) -> StateArrays:
        """A state without an index, for copies of units that scans are to see, with room for so many records."""
        # Untouched memory costs nothing.
        rows = np.empty((limits.THRESHOLDS_MAX * cells, 2), dtype=np.int64)
        return self._state._replace(
            cells=np.zeros((cells, CELL_WORDS), dtype=np.int64),
            members=np.empty((units.MEMBERS_A_RECORD * cells, MEMBER_WORDS), dtype=np.int64),
            rows=rows,
            counters=np.zeros(COUNTERS, dtype=np.int64),
        )

    def spilled_copies(
        self, kind: int = -1, first: int = -_HIGHEST - 1, end: int = _HIGHEST
    ) -> Iterator[StateArrays]:
        """What only files have, of a kind and with a start in [first, end), some at a time; valid until the next.

        Raises:
            DamagedError: a file is.
        """
        if not self.spilled.files:
            return
        copy = self._copy_state(_COPIED_RECORDS)
        for number, file in enumerate(self.spilled.files):
            record, stop = (0, file.records) if kind < 0 else file.records_of(kind)
            record = self._first_unit(number, record, stop)
            while record < stop:
                copy.counters[:] = 0
                copy.cells[:, W_LINKS] = 0
                record = int(
                    units.copy_units(
                        self._state, self.schemas.arrays.slots, number, record, stop, kind, first, end,
                        self.dimensions.combo_count, self._seed, copy,
                    )
                )  # fmt: skip
                if record < 0:
                    raise self.spilled.damaged(number)
                if copy.counters[N_CELLS]:
                    yield copy

    def _first_unit(self, number: int, record: int, end: int) -> int:
        """The first record from one on that a unit begins with."""
        if record == 0:
            return 0
        found = int(units.next_unit(self.spilled.table, number, record, end))
        if found < 0:
            raise self.spilled.damaged(number)
        return found

    def _copies_of(
        self, kind: int, account: int, starts: Iterable[int], cells: int, *, is_whole: bool = True
    ) -> StateArrays | None:
        """Copies of an account's units of a kind that only files have; None where there are none.

        Not `is_whole`: of their first cells.
        """
        if not self.spilled.files:
            return None
        copy = self._copy_state(cells)
        for start in starts:
            while True:
                needed = int(
                    units.copy_unit(
                        self._state, self.schemas.arrays.slots, kind, account, start, self.dimensions.combo_count,
                        self._seed, is_whole, copy,
                    )
                )  # fmt: skip
                if needed < 0:
                    raise self.spilled.damaged(-1)
                if needed == 0:
                    break
                larger = self._copy_state(2 * (int(copy.counters[N_CELLS]) + needed))
                larger.cells[: len(copy.cells)] = copy.cells
                larger.rows[: len(copy.rows)] = copy.rows
                larger.members[: len(copy.members)] = copy.members
                larger.counters[:] = copy.counters
                copy = larger
        return copy if copy.counters[N_CELLS] else None

    # ------------------------------------------------------------ reading one account

    def period_stats(self, account: int, slot: int, time_ns: int) -> tuple[Stats | None, int, int]:
        """The running total of the billing period that contains `time_ns`, and that period's [start, end)."""
        start, end = self.schemas.period_of(slot, time_ns)
        row = int(reads.find_period(self._state, _signed(account), slot, start, self._seed))
        if row >= 0:
            return self._cell_stats(self._state.cells[row], slot), start, end
        copy = self._copies_of(2 * slot + 1, _signed(account), [start], 16, is_whole=False)
        return (None if copy is None else self._cell_stats(copy.cells[0], slot)), start, end

    def day_rows(
        self,
        account: int,
        slot: int,
        day_start_from: int,
        day_start_to: int,
        selection: Ints | None = None,
        group_by: list[int] | None = None,
        *,
        per_day: bool = False,
    ) -> DayRows:
        """Merge the day cells of the days that begin in [day_start_from, day_start_to).

        Both bounds are starts of days of the metric's zone. `selection` comes from `select`, `group_by` are
        positions of dimensions, the rows' groups are in its order. Not for COUNT_UNIQUE, which has no day cells.
        """
        agg = self._agg(slot)
        assert agg != AggType.COUNT_UNIQUE
        combos = self.dimensions.arrays.combos
        wanted = NO_SELECTION if selection is None else selection
        room, days = 256, 64
        while True:
            found = np.empty(room, dtype=np.int64)
            overflowed = np.empty(days, dtype=np.int64)
            n, n_overflowed = reads.collect_days(
                self._state, self.schemas.arrays, combos, _signed(account), slot, day_start_from, day_start_to,
                wanted, self._seed, found, overflowed,
            )  # fmt: skip
            if n <= room and n_overflowed <= days:
                break
            room, days = max(n, room), max(n_overflowed, days)
        state = self._state
        bad_days = overflowed[:n_overflowed].tolist()
        if self.spilled.files:
            state, found, bad_days = self._with_spilled_days(
                _signed(account), slot, day_start_from, day_start_to, wanted, found[:n], bad_days
            )
            n = len(found)
        if n == 0:
            return DayRows([], bad_days)
        dimensions = np.array(group_by or [], dtype=np.int64)
        merged = np.empty((n, reads.MERGED_FIELDS), dtype=np.int64)
        groups = _table(n)
        count = reads.merge_days(state, combos, found, n, dimensions, per_day, groups, merged)
        rows = []
        for row in merged[:count].tolist():
            combo = int(state.cells[row[reads.G_ROW], W_KEY]) >> 32
            group = self.dimensions.group(combo, group_by) if group_by else []
            rows.append(DayRow(group, _stats(agg, row[reads.G_COUNT :]), row[reads.G_DAY]))
        return DayRows(rows, bad_days)

    def _with_spilled_days(
        self,
        account: int,
        slot: int,
        first: int,
        end: int,
        selection: Ints,
        found: Ints,
        overflowed: list[int],
    ) -> tuple[StateArrays, Ints, list[int]]:
        """What `collect_days` found in memory, and what only files have of the same days, in one array of cells."""
        starts = []
        day = first
        while day < end:
            starts.append(day)
            day = self.schemas.day_of(slot, day)[1]
        copy = self._copies_of(2 * slot, account, starts, 1_024)
        if copy is None:
            return self._state, found, overflowed
        rows = _collect(
            lambda out: reads.scan_days(copy, self.dimensions.arrays.combos, slot, first, end, selection, out)
        )
        bad = sorted({int(copy.cells[-1 - row, cell_layout.W_START]) for row in rows if row < 0})
        cells = copy.cells[rows[rows >= 0]]
        if bad:
            cells = cells[~np.isin(cells[:, cell_layout.W_START], bad)]
        cells = np.concatenate([self._state.cells[found], cells])
        cells = cells[np.argsort(cells[:, cell_layout.W_START], kind="stable")]
        return self._state._replace(cells=cells), np.arange(len(cells)), sorted([*overflowed, *bad])

    def select(self, slot: int, filters: list[tuple[str, list[str]]]) -> Ints:
        """Filters as a selection for the reads; see `Dimensions.selection` for what is refused."""
        return self.dimensions.selection(self.schemas, slot, filters)

    def dimension(self, slot: int, key: str) -> int:
        """The position of a dimension, for `group_by`.

        Raises:
            InvalidRequestError: the metric doesn't declare it.
        """
        return self.dimensions.dimension(self.schemas, slot, key)

    # ------------------------------------------------------------ reading all accounts

    def top_period(self, slot: int, period_start: int, n: int) -> TopAccounts:
        """The n accounts with the largest total in the billing period that begins at `period_start`."""
        agg = self._agg(slot)
        lo, hi, _, _ = _RANKED_BY[agg]
        best: Ints = np.empty((0, CELL_WORDS), dtype=np.int64)
        heap: Ints = np.empty(max(n, 0), dtype=np.int64)
        for state in self._everywhere(2 * slot + 1, period_start, period_start + 1):
            count = reads.rank_period(state, slot, period_start, lo, -1 if hi is None else hi, heap)
            table = np.concatenate([best, state.cells[heap[:count]]])
            best = table[
                _rank(table[:, cell_layout.W_ACCOUNT], table[:, lo], None if hi is None else table[:, hi], n)
            ]
        accounts = [
            (int(cell[cell_layout.W_ACCOUNT]) & (2**64 - 1), self._cell_stats(cell, slot)) for cell in best
        ]
        return TopAccounts(accounts, [])

    def top_days(self, slot: int, first: int, end: int, selection: Ints | None, n: int) -> TopAccounts:
        """The n accounts with the largest aggregate over the days that begin in [first, end). See `day_rows`."""
        agg = self._agg(slot)
        assert agg != AggType.COUNT_UNIQUE
        wanted = NO_SELECTION if selection is None else selection
        parts, marks = [], []
        for cells, rows in self.day_cells(slot, first, end, wanted):
            parts.append(cells[np.where(rows < 0, -1 - rows, rows)])
            marks.append(rows < 0)
        table = np.concatenate(parts)
        found = np.arange(len(table))
        found = np.where(np.concatenate(marks), -1 - found, found)
        state = self._state._replace(cells=table)
        merged = np.empty((len(found), reads.MERGED_FIELDS), dtype=np.int64)
        flags = np.zeros(len(found), dtype=np.bool_)
        count = reads.merge_accounts(state, found, len(found), _table(len(found)), merged, flags)
        merged, flags = merged[:count], flags[:count]
        owners = table[merged[:, reads.G_ROW], cell_layout.W_ACCOUNT]
        overflowed = np.sort(owners[flags].view(np.uint64)).tolist()
        merged, owners = merged[~flags], owners[~flags]
        _, _, lo, hi = _RANKED_BY[agg]
        best = _rank(owners, merged[:, lo], None if hi is None else merged[:, hi], n)
        accounts = [
            (int(owners[i]) & (2**64 - 1), _stats(agg, merged[i, reads.G_COUNT :].tolist())) for i in best
        ]
        return TopAccounts(accounts, overflowed)

    def _everywhere(self, kind: int, first: int, end: int) -> Iterator[StateArrays]:
        """The state, and then copies of what only files have: see `spilled_copies`."""
        yield self._state
        yield from self.spilled_copies(kind, first, end)

    def day_cells(self, slot: int, first: int, end: int, selection: Ints) -> Iterator[tuple[Ints, Ints]]:
        """Day cells of all accounts that pass, of the days that begin in [first, end): arrays, and rows in them.

        The head of a day that overflowed is listed as -1 - row; its chain's cells are listed, too. An array is valid
        until the next one is asked for.
        """
        combos = self.dimensions.arrays.combos
        for state in self._everywhere(2 * slot, first, end):
            # Untouched memory costs nothing; a cell is listed once, a head of an overflowed day twice.
            room = 2 * int(state.counters[N_CELLS])
            scan = partial(reads.scan_days, state, combos, slot, first, end, selection)
            yield state.cells, _collect(scan, room)

    # ------------------------------------------------------------ alerts

    @property
    def alert_count(self) -> int:
        """How many alert records there are; also the position of the next one."""
        return self.alert_files.end + int(self._counters[N_ALERTS])

    @property
    def _alert_table(self) -> Ints:
        """The alert records that are in memory."""
        table: Ints = self._state.alerts[: int(self._counters[N_ALERTS])]
        return table

    def alert_bytes(self) -> int:
        """Bytes of memory that alert records take."""
        return int(self._counters[N_ALERTS]) * thresholds.ALERT_BYTES

    def oldest_alerts(self, count: int) -> Ints:
        """The oldest records in memory, for a file; they stay as they are, whatever is folded."""
        assert 0 < count <= len(self._alert_table), "they are in memory"
        return self._alert_table[:count]

    def forget_alerts(self, file: AlertFile) -> None:
        """The oldest records in memory are in a file now."""
        assert not self.held, _HELD
        # Not in place: somebody may be looking at those that go.
        count = file.end - file.start
        left = self._alert_table[count:].copy()
        self.alert_files.add(file)
        self._alerts.array[: len(left)] = left
        self._counters[N_ALERTS] = len(left)
        self._counters[N_ALERT_BASE] = self.alert_files.end

    def _alert_parts(self, start: int, end: int) -> Iterator[tuple[int, Ints]]:
        """The records of the positions [start, end), some at a time, each time with the first one's position.

        Raises:
            DamagedError: a file is damaged.
        """
        for position, rows in self.alert_files.rows(start, end):
            if int((rows[:, thresholds.A_SLOT] & 0xFFFFFFFF).max()) >= self.schemas.count:
                raise damage(self.partition, "one of its files of alert records")
            yield position, rows
        base = self.alert_files.end
        if end > base:
            first = max(start, base)
            yield first, self._alert_table[first - base : end - base]

    def alerts(
        self,
        from_position: int,
        account: int | None = None,
        slot: int | None = None,
        limit: int = 1_000,
        *,
        choice: AlertChoice | None = None,
    ) -> list[AlertRecord]:
        """At most `limit` alert records from a position on, in log order, of an account and metric (None: all)."""
        found = self.find_alerts(from_position, self.alert_count, account, slot, limit, choice=choice)
        return self.alerts_at(found)

    def find_alerts(
        self,
        start: int,
        end: int,
        account: int | None = None,
        slot: int | None = None,
        limit: int = 1_000,
        *,
        choice: AlertChoice | None = None,
    ) -> list[int]:
        """At most `limit` positions in [start, end), ascending, of alert records that match (None: all do).

        Raises:
            DamagedError: a file is damaged.
        """
        start = max(start, 0)
        end = min(end, self.alert_count)
        limit = max(limit, 0)
        if account is None and slot is None and choice is None:
            return list(range(start, min(start + limit, max(end, start))))
        found: list[int] = []
        for position, table in self._alert_parts(start, end):
            matching = self._matching(table, account, slot, choice)
            found += (position + matching[: limit - len(found)]).tolist()
            if len(found) == limit:
                break
        return found

    def _matching(
        self, table: Ints, account: int | None, slot: int | None, choice: AlertChoice | None
    ) -> Ints:
        """Which rows of a table of alert records match."""
        wanted: npt.NDArray[np.bool_] | None = None
        if account is not None:
            wanted = table[:, thresholds.A_ACCOUNT] == _signed(account)
        if slot is not None:
            wanted = _both(wanted, table[:, thresholds.A_SLOT] & 0xFFFFFFFF == slot)
        if choice is not None and choice.accounts:
            wanted = _both(wanted, np.isin(table[:, thresholds.A_ACCOUNT], choice.account_words))
        if choice is not None and choice.metric_codes:
            slots = [
                slot
                for slot in range(self.schemas.count)
                if self.schemas.record(slot).schema.code in choice.metric_codes
            ]
            wanted = _both(wanted, np.isin(table[:, thresholds.A_SLOT] & 0xFFFFFFFF, slots))
        return np.arange(len(table)) if wanted is None else np.flatnonzero(wanted)

    def alerts_at(self, positions: Sequence[int]) -> list[AlertRecord]:
        """The alert records at these positions, which ascend.

        Raises:
            DamagedError: a file is damaged.
        """
        places: Ints = np.asarray(positions, dtype=np.int64)
        base = self.alert_files.end
        found: list[AlertRecord] = []
        if len(places) and places[0] < base:
            spilled = places[places < base]
            for first, table in self._alert_parts(int(spilled[0]), int(spilled[-1]) + 1):
                here = spilled[(spilled >= first) & (spilled < first + len(table))]
                try:
                    found += self._alerts_of(here, table[here - first])
                except IndexError:
                    raise damage(self.partition, "one of its files of alert records") from None
            places = places[len(spilled) :]
        return found + self._alerts_of(places, self._alert_table[places - base])

    def _alerts_of(self, positions: Ints, rows: Ints) -> list[AlertRecord]:
        # Copied at once, and little-endian: 128-bit numbers are their two words as they lie there.
        rows = rows.astype("<i8", copy=False)
        data = rows.tobytes()
        return [
            self._alert(position, row, data[k * thresholds.ALERT_BYTES : (k + 1) * thresholds.ALERT_BYTES])
            for k, (position, row) in enumerate(zip(positions.tolist(), rows.tolist(), strict=True))
        ]

    def alert_at_time(self, time_ns: int) -> int:
        """The position of the first alert record raised at `time_ns` or later; `alert_count` where there is none.

        Raises:
            DamagedError: a file is damaged.
        """
        # Append times never fall along the log.
        base = self.alert_files.end
        position = self.alert_files.at_time(time_ns)
        if position < base:
            return position
        times = self._alert_table[:, thresholds.A_APPEND]
        return base + bisect_left(range(len(times)), time_ns, key=lambda row: int(times[row]))

    def _alert(self, position: int, row: list[int], data: bytes) -> AlertRecord:
        slot, index = row[thresholds.A_SLOT] & 0xFFFFFFFF, row[thresholds.A_SLOT] >> 32
        record = self.schemas.record(slot)
        threshold = record.schema.thresholds[index]
        offset = row[thresholds.A_OFFSET]
        return AlertRecord(
            id=f"{self.partition}-{offset}-{index}-{record.uid}",
            account_id=row[thresholds.A_ACCOUNT] & (2**64 - 1),
            metric_code=record.schema.code,
            threshold_code=threshold.code,
            threshold_value=threshold.value,
            period_start_ns=row[thresholds.A_START],
            period_end_ns=row[thresholds.A_END],
            value_at_cross=data[8 * thresholds.A_VALUE_LO : 8 * thresholds.A_VALUE_HI + 8],
            first_multiple=data[8 * thresholds.A_FIRST_LO : 8 * thresholds.A_FIRST_HI + 8],
            last_multiple=data[8 * thresholds.A_LAST_LO : 8 * thresholds.A_LAST_HI + 8],
            triggered_at_ns=row[thresholds.A_APPEND],
            event_offset=offset,
            partition=self.partition,
            position=position,
        )

    # ------------------------------------------------------------ the state as a whole

    @property
    def cell_count(self) -> int:
        """Period and day cells, wherever they are."""
        return int(self._counters[N_CELLS] - self._counters[N_FREE_CELLS] + self._counters[N_SPILLED])

    @property
    def cell_rows(self) -> int:
        """Rows of cells that are in use, or have been."""
        return int(self._counters[N_CELLS])

    @property
    def spilled_cell_count(self) -> int:
        """Cells that only files have."""
        return int(self._counters[N_SPILLED])

    def cell_bytes(self) -> int:
        """Bytes of memory that cells take, with their share of the index."""
        return (self.cell_count - self.spilled_cell_count) * (cell_layout.CELL_BYTES + _INDEX_BYTES)

    def set_bytes(self) -> int:
        """Bytes of memory that the entries of sets take, with their share of the index."""
        live = self.member_count - int(self._counters[N_SPILLED_MEMBERS])
        return live * (uniques.MEMBER_BYTES + _INDEX_BYTES)

    @property
    def member_count(self) -> int:
        """Entries of all COUNT_UNIQUE sets, removed ones included, wherever they are."""
        return int(
            self._counters[N_MEMBERS] - self._counters[N_FREE_MEMBERS] + self._counters[N_SPILLED_MEMBERS]
        )

    @property
    def member_rows(self) -> int:
        """Rows of entries that are in use, or have been."""
        return int(self._counters[N_MEMBERS])

    def memory_bytes(self) -> int:
        """Bytes of memory that the state uses."""
        return (
            (self.cell_count - self.spilled_cell_count) * cell_layout.CELL_BYTES
            + self.spilled.memory_bytes
            + (self.member_count - int(self._counters[N_SPILLED_MEMBERS])) * uniques.MEMBER_BYTES
            + int(self._counters[N_ROWS]) * 16
            + self.alert_bytes()
            + self.alert_files.memory_bytes
            + self._cell_index.memory_bytes
            + self._member_index.memory_bytes
            + self.dimensions.memory_bytes
            + self.schemas.arrays.bounds.nbytes
        )

    def digest(self) -> int:
        """A 64-bit digest of the logical state: equal on replicas that applied the same log up to one offset."""
        total = int(digest_state(self._state, self.dimensions.arrays, self.schemas.uids))
        for copy in self.spilled_copies():
            total += int(digest_state(copy, self.dimensions.arrays, self.schemas.uids))
        counters: Ints = np.zeros(COUNTERS, dtype=np.int64)
        for position, rows in self._alert_parts(0, self.alert_files.end):
            counters[[N_ALERT_BASE, N_ALERTS]] = position, len(rows)
            copy = self._state._replace(alerts=np.array(rows), counters=counters)
            total += int(digest_state(copy, self.dimensions.arrays, self.schemas.uids))
        for slot in range(self.schemas.count):
            state = encode_record(self.schemas.record(slot)) + repr(self.schemas.declared(slot)).encode()
            total += int.from_bytes(hashlib.blake2b(state, digest_size=8).digest(), "little")
        return total & (2**64 - 1)

    def snapshot(self) -> dict[str, npt.NDArray[Any] | bytes]:
        """Copy the whole state, at once: what is folded afterwards doesn't show in it."""
        cells, members, rows, alerts = self._counters[: N_ALERTS + 1].tolist()
        is_whole = not self._counters[N_FREE_CELLS] and not self.spilled.files and not self.alert_files.files
        version = SNAPSHOT_VERSION if is_whole else SPILLED_VERSION
        return {
            "fold_meta": np.array(
                [
                    version,
                    self.partition,
                    self.applied,
                    int(self._counters[N_SPILLED]),
                    int(self._counters[N_SPILLED_MEMBERS]),
                    self.alert_files.end,
                ],
                dtype=np.int64,
            ),
            "fold_schemas": msgspec.msgpack.encode(self._history),
            "cells": self._cells.array[:cells].copy(),
            "members": self._members.array[:members].copy(),
            "threshold_rows": self._rows.array[:rows].copy(),
            "alerts": self._alerts.array[:alerts].copy(),
            **self.dimensions.snapshot(),
        }

    @classmethod
    def restore(
        cls,
        partition: int,
        parts: dict[str, Any],
        *,
        hash_seed: int = 0,
        spilled: Sequence[SpilledFile] = (),
        alert_files: Sequence[AlertFile] = (),
    ) -> Fold:
        """Make the fold of a snapshot and the files that there were when it was taken.

        Args:
            partition: whose it is.
            parts: what `snapshot` has returned.
            hash_seed: as of a new one.
            spilled: the files of cells, the newest first.
            alert_files: the files of alert records, the oldest first.

        Raises:
            RemoteProtocolError: the parts aren't a snapshot of this partition.
        """
        try:
            meta = np.asarray(parts["fold_meta"]).tolist()
            history = msgspec.msgpack.decode(bytes(parts["fold_schemas"]), type=list[tuple[int, bytes]])
            tables = [
                np.asarray(parts[name]).reshape(-1, width)
                for name, width in (
                    ("cells", CELL_WORDS), ("members", MEMBER_WORDS), ("threshold_rows", 2), ("alerts", ALERT_WORDS)
                )
            ]  # fmt: skip
            if meta[0] not in (SNAPSHOT_VERSION, SPILLED_VERSION):
                raise ValueError(f"it is of version {meta[0]}")
            if meta[0] == SPILLED_VERSION and meta[3] and not spilled:
                raise ValueError("its files of cells are missing")
            filed = AlertFiles(partition, alert_files)
            if filed.end != (meta[5] if meta[0] == SPILLED_VERSION else 0):
                raise ValueError(f"its files of alert records end at position {filed.end}")
            if meta[1] != partition:
                raise ValueError(f"it is of version and partition {meta[:2]}")
            self = cls(partition, hash_seed=hash_seed)
            for offset, encoded in history:
                self.schemas.put(decode_record(encoded), offset)
            self.dimensions = Dimensions.restore(parts, seed=hash_seed)
        except (
            KeyError,
            ValueError,
            TypeError,
            IndexError,
            msgspec.DecodeError,
            SpilledFileError,
        ) as error:
            raise RemoteProtocolError(f"malformed snapshot of partition {partition}: {error}") from error
        self._history = history
        self.applied = meta[2]
        arenas = self._cells, self._members, self._rows, self._alerts
        for number, (arena, table) in enumerate(zip(arenas, tables, strict=True)):
            arena.ensure(len(table))
            arena.array[: len(table)] = table
            self._counters[number] = len(table)
        if meta[0] == SPILLED_VERSION:
            self._counters[[N_SPILLED, N_SPILLED_MEMBERS]] = meta[3:5]
            self._take_up_freed()
        self.spilled = SpilledFiles(partition, spilled)
        self.alert_files = filed
        self._counters[N_ALERT_BASE] = filed.end
        self._cell_index = Index(2 * len(tables[0]))
        self._member_index = Index(len(tables[1]))
        self._state = self._arrays()
        self._check_references(partition)
        self._reindex()
        return self

    def _take_up_freed(self) -> None:
        """Link the freed rows of cells anew, and move the rows of thresholds together."""
        cells = self._cells.array[: self.cell_rows]
        free = np.flatnonzero(cells[:, W_KEY] == FREE)
        cells[free, cell_layout.W_ACCOUNT] = np.append(free[1:] + 1, 0)[: len(free)]
        self._counters[N_FREE_CELLS] = len(free)
        self._counters[N_FREE_CELL] = int(free[0]) + 1 if len(free) else 0
        members = self._members.array[: self.member_rows]
        free = np.flatnonzero(members[:, uniques.M_OWNER] == uniques.FREE_MEMBER)
        members[free, uniques.M_LO] = np.append(free[1:] + 1, 0)[: len(free)]
        self._counters[N_FREE_MEMBERS] = len(free)
        self._counters[N_FREE_MEMBER] = int(free[0]) + 1 if len(free) else 0
        links = cells[:, W_LINKS]
        owners = np.flatnonzero(
            ((cells[:, W_KEY] >> 32) & 0xFFFFFFFF == cell_layout.PERIOD)
            & (cells[:, W_KEY] != FREE)
            & ((links >> 8) & 0xFF > 0)
        )
        counts = (links[owners] >> 8) & 0xFF
        before = ((links[owners] >> 32) & 0xFFFFFFFF) - 1
        after = np.cumsum(counts) - counts
        total = int(counts.sum())
        places = np.repeat(before - after, counts) + np.arange(total)
        if places.max(initial=-1) >= int(self._counters[N_ROWS]):
            raise RemoteProtocolError(
                f"malformed snapshot of partition {self.partition}: a reference leads nowhere"
            )
        self._rows.array[:total] = self._rows.array[places]
        self._rows.array[total : int(self._counters[N_ROWS])] = 0
        self._counters[N_ROWS] = total
        cells[owners, W_LINKS] = (links[owners] & 0xFFFFFFFF) | ((after + 1) << 32)

    def _reindex(self) -> None:
        """Fill the empty indexes; whenever a shard is due to grow, make room and go on."""
        cell, member = 0, 0
        while cell < self.cell_rows:
            cell = int(reindex_cells(self._state, cell, self._seed))
            if self._cell_index.make_room():
                self._state = self._arrays()
        while member < self.member_rows:
            state = self._state
            member = int(
                reindex_members(
                    state.member_table,
                    state.member_shards,
                    state.members,
                    member,
                    self.member_rows,
                    self._seed,
                )
            )
            if self._member_index.make_room():
                self._state = self._arrays()

    def _check_references(self, partition: int) -> None:
        """Refuse numbers that would send a kernel outside its arrays."""
        cells = self._cells.array[: self.cell_rows]
        owners = self._members.array[: self.member_rows, uniques.M_OWNER]
        owners = owners[owners != uniques.FREE_MEMBER] & 0xFFFFFFFF
        is_sound = owners.max(initial=-1) < len(cells) and not (cells[owners, W_KEY] == FREE).any()
        cells = cells[cells[:, W_KEY] != FREE]
        combos = (cells[:, W_KEY] >> 32) & 0xFFFFFFFF
        is_period = combos == cell_layout.PERIOD
        links = cells[:, W_LINKS]
        row_ends = ((links >> 32) & 0xFFFFFFFF) - 1 + ((links >> 8) & 0xFF)
        slots = self._alerts.array[: int(self._counters[N_ALERTS]), thresholds.A_SLOT] & 0xFFFFFFFF
        sound = (
            (cells[:, W_KEY] & 0xFFFFFFFF).max(initial=-1) < self.schemas.count
            and combos[~is_period].max(initial=-1) < self.dimensions.combo_count
            and row_ends[is_period].max(initial=-1) <= int(self._counters[N_ROWS])
            and (links & 0xFFFFFFFF)[~is_period].max(initial=0) <= self.cell_rows
            and is_sound
            and slots.max(initial=-1) < self.schemas.count
            and self.dimensions.sound
        )
        if not sound:
            raise RemoteProtocolError(
                f"malformed snapshot of partition {partition}: a reference leads nowhere"
            )

    def _agg(self, slot: int) -> AggType:
        return AggType(int(self.schemas.agg_types[slot]))

    def _cell_stats(self, words: Ints, slot: int) -> Stats:
        cell = words.tolist()
        flags = cell[W_LINKS] & 0xFF
        return _stats(self._agg(slot), cell[cell_layout.W_COUNT : W_LINKS], flags)


def _stats(agg: AggType, words: list[int], alert_flags: int = 0) -> Stats:
    """Make Stats of count, sum (two words), min, max, last value, time and offset."""
    count, lo, hi, low, high, last, time, offset = words
    if agg == AggType.COUNT_UNIQUE:
        return Stats(count=count, unique=lo, alert_flags=alert_flags)
    if agg == AggType.COUNT:
        return Stats(count=count, last_event_at=time, last_offset=offset, alert_flags=alert_flags)
    total = int128.to_bytes(int128.from_words(lo, hi))
    return Stats(count, total, low, high, last, time, offset, alert_flags=alert_flags)


def _properties_in(columns: Ints, metrics: int) -> tuple[int, int]:
    """How many property sets a payload has, and how many bytes they can add to the dimensions' values."""
    size = int(columns[C_ACCOUNT] - columns[C_PROPERTY_BYTES]) * metrics
    return int(columns[C_PROPERTY_SETS]), size


def _both(one: npt.NDArray[np.bool_] | None, other: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Where both are true; None is true everywhere."""
    return other if one is None else one & other


def _signed(account: int) -> int:
    """The int64 with an account id's bits."""
    return account - 2**64 if account >= 2**63 else account


def _table(n: int) -> Ints:
    """An empty hash table for n entries."""
    return np.full(1 << max(2 * n - 1, 1).bit_length(), -1, dtype=np.int64)


def _collect(scan: Any, room: int = 4_096) -> Ints:
    """Call a kernel that fills an array and says how many it found, with a larger one if need be."""
    found: Ints = np.empty(room, dtype=np.int64)
    n = scan(found)
    if n > len(found):
        found = np.empty(n, dtype=np.int64)
        scan(found)
    return found[:n]


def _rank(accounts: Ints, lo: Ints, hi: Ints | None, n: int) -> list[int]:
    """Positions of the n largest numbers (hi, lo), largest first, ties by account id; hi None: lo is signed."""
    # Complements turn the order around and can't overflow.
    if hi is None:
        keys: tuple[npt.NDArray[Any], ...] = (accounts.view(np.uint64), ~lo)
    else:
        keys = (accounts.view(np.uint64), ~lo.view(np.uint64), ~hi)
    return np.lexsort(keys)[: max(n, 0)].tolist()  # type: ignore[no-any-return]
