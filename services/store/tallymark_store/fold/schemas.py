"""The metrics of one partition as of one point of its log, as arrays that kernels can use.

Each metric uid has a **slot**, numbered in log order and kept for ever; a code that is deleted and created again is
another uid in another slot, so its events never meet. A new version of a uid updates its slot: thresholds are
appended, declared dimension values gain the offset from which they count as declared.

What may never change under a uid stays as it was first put, the zone table too: totals lie in cells by the start of
their period, and moving boundaries (new time zone data) would part a total from its cell. New zone data therefore
takes effect for metrics created after it.

Periods and days whose boundaries follow from arithmetic (UTC days, fixed 30 days, lifetime) need no table; for the
others all boundaries up to the end of 64-bit time are computed once per (zone, period type, cycle day) and shared.
A lookup guesses by average length and walks the step or two that it is off; the last hit of each slot is kept.

The leader's judge and the fold have a table each: one stands at the log's end, the other at the applied offset.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from tallymark_protocol import int128, limits, payload
from tallymark_protocol.errors import RemoteProtocolError
from tallymark_protocol.model import AlertThreshold, PeriodType
from tallymark_protocol.periods import day_starts, period_starts
from tallymark_protocol.schema import MetricRecord
from tallymark_protocol.zones import TIME_END_NS, ZoneTable
from tallymark_store.fold.compiling import inlined, kernel

Ints = npt.NDArray[np.int64]

DAY_NS = 86_400 * 10**9
FIXED_PERIOD_NS = 30 * DAY_NS

# Columns of `SchemaArrays.slots`.
S_AGG = 0
S_UNIQUE = 1
S_DIMENSIONS = 2  # how many
S_THRESHOLDS = 3  # how many
S_GRACE = 4  # ns, -1: a period is never sealed
S_PERIOD = 5  # a K_ kind
S_PERIOD_FIRST = 6  # arithmetic: length in ns; table: position of its first boundary in `bounds`
S_PERIOD_COUNT = 7  # table: number of starts
S_PERIOD_STEP = 8  # table: average length, to guess by
S_DAY = 9
S_DAY_FIRST = 10
S_DAY_COUNT = 11
S_DAY_STEP = 12
SLOT_FIELDS = 13

K_FIXED = 0  # multiples of a length since 1970
K_LIFETIME = 1
K_TABLE = 2

# Columns of `SchemaArrays.thresholds`, 8 rows a slot.
T_LO = 0  # the low 64 bits' pattern
T_HI = 1
T_RECURRING = 2
THRESHOLD_FIELDS = 3

_END = TIME_END_NS
_RESOLVED_MAX = 1_024  # metric tables of payloads that are remembered
_RESOLVED_BYTES_MAX = 4_096  # of one of them


class SchemaArrays(NamedTuple):
    """What kernels take. `cache` is scratch: two threads must not share it (see `SchemaTable.with_own_cache`)."""

    slots: Ints  # int64[n, SLOT_FIELDS]
    bounds: Ints  # int64[]: tables of boundaries: starts, then the exclusive end of the last
    cache: Ints  # int64[n, 4]: last period start, end; last day start, end
    uids: npt.NDArray[np.uint64]
    thresholds: Ints  # int64[n * 8, THRESHOLD_FIELDS]


@kernel
def _bounds(kind: Any, first: Any, count: Any, step: Any, bounds: Any, time: Any) -> Any:
    if kind == K_FIXED:
        start = time // first * first
        return start, (start + first if start <= _END - first else np.int64(_END))
    if kind == K_LIFETIME:
        return np.int64(0), np.int64(_END)
    i = (time - bounds[first]) // step
    i = min(max(i, 0), count - 1)
    while i > 0 and bounds[first + i] > time:
        i -= 1
    while i < count - 1 and bounds[first + i + 1] <= time:
        i += 1
    return bounds[first + i], bounds[first + i + 1]


@inlined
def find_period(slots: Any, bounds: Any, cache: Any, slot: Any, time: Any) -> Any:
    """`period_bounds` on the arrays it needs, for loops over events: handing tuples on costs more than the lookup."""
    if time < cache[slot, 0] or time >= cache[slot, 1]:
        start, end = _bounds(
            slots[slot, S_PERIOD],
            slots[slot, S_PERIOD_FIRST],
            slots[slot, S_PERIOD_COUNT],
            slots[slot, S_PERIOD_STEP],
            bounds,
            time,
        )
        cache[slot, 0] = start
        cache[slot, 1] = end
    return cache[slot, 0], cache[slot, 1]


@inlined
def find_day(slots: Any, bounds: Any, cache: Any, slot: Any, time: Any) -> Any:
    """`day_bounds` on the arrays it needs."""
    if time < cache[slot, 2] or time >= cache[slot, 3]:
        start, end = _bounds(
            slots[slot, S_DAY],
            slots[slot, S_DAY_FIRST],
            slots[slot, S_DAY_COUNT],
            slots[slot, S_DAY_STEP],
            bounds,
            time,
        )
        cache[slot, 2] = start
        cache[slot, 3] = end
    return cache[slot, 2], cache[slot, 3]


@kernel
def period_bounds(arrays: Any, slot: Any, time: Any) -> Any:
    """The billing period [start, end) of a slot that contains `time` (0 <= time)."""
    return find_period(arrays.slots, arrays.bounds, arrays.cache, slot, time)


@kernel
def day_bounds(arrays: Any, slot: Any, time: Any) -> Any:
    """The day [start, end) of a slot's zone that contains `time` (0 <= time)."""
    return find_day(arrays.slots, arrays.bounds, arrays.cache, slot, time)


# A zone's 107,000 days take 0.1 s to compute, and every partition asks for the same ones.
@functools.lru_cache(maxsize=64)
def _table(
    period: tuple[PeriodType, int] | None, name: str, instants: tuple[int, ...], offsets: tuple[int, ...]
) -> Ints:
    zone = ZoneTable(name=name, instants=list(instants), offsets=list(offsets))
    starts = day_starts(zone, _END) if period is None else period_starts(period[0], period[1], zone, _END)
    table = np.array([*starts, _END], dtype=np.int64)
    table.setflags(write=False)
    return table


class SchemaTable:
    """See the module. `arrays` must be read anew after every `put`."""

    def __init__(self) -> None:
        self.count = 0  # slots
        self.has_grace = False  # whether any metric seals its periods
        self.agg_types: Ints = np.zeros(0, dtype=np.int64)
        self.unique_types: Ints = np.zeros(0, dtype=np.int64)
        self.uids: npt.NDArray[np.uint64] = np.zeros(0, dtype=np.uint64)
        self.arrays = SchemaArrays(
            np.zeros((0, SLOT_FIELDS), dtype=np.int64),
            np.zeros(0, dtype=np.int64),
            np.zeros((0, 4), dtype=np.int64),
            self.uids,
            np.zeros((0, THRESHOLD_FIELDS), dtype=np.int64),
        )
        self._records: list[MetricRecord] = []  # as in force; zone and unchangeable fields as first put
        self._declared: list[
            list[dict[str, int]]
        ] = []  # per slot and dimension: value -> offset it counts from
        self._first_offsets: list[int] = []  # per slot: of the record that made it
        self._slot_of_uid: dict[int, int] = {}
        self._slot_of_code: dict[str, int] = {}  # live metrics only
        self._tables: dict[tuple[Any, ...], tuple[int, int, int]] = {}  # what lies where in `bounds`
        self._resolved: dict[bytes, Ints] = {}  # metric tables of payloads, as bytes, to slots
        self._widths: dict[bytes, tuple[int, int, bool]] = {}  # see `widths`; by slots, as bytes

    # ------------------------------------------------------------ writing

    def put(self, record: MetricRecord, offset: int) -> int:
        """Take in the schema record at `offset`; returns its slot. An older version than known changes nothing.

        Raises:
            RemoteProtocolError: a version that no `schema.check_update` lets pass.
        """
        self._resolved.clear()
        self._widths.clear()
        slot = self._slot_of_uid.get(record.uid, -1)
        if slot < 0:
            slot = self._add(record, offset)
        elif record.deleted:
            self._records[slot] = msgspec.structs.replace(self._records[slot], deleted=True)
        elif record.version >= self._records[slot].version:
            self._update(slot, record, offset)
        else:
            return slot
        code = record.schema.code
        if not record.deleted:
            # uids are create revisions: of two under one code the higher is the living one.
            other = self._slot_of_code.get(code, -1)
            if other < 0 or self._records[other].uid <= record.uid:
                self._slot_of_code[code] = slot
        elif self._slot_of_code.get(code) == slot:
            del self._slot_of_code[code]
        return slot

    def _add(self, record: MetricRecord, offset: int) -> int:
        schema = record.schema
        slot = self.count
        row = np.zeros(SLOT_FIELDS, dtype=np.int64)
        row[S_AGG] = int(schema.agg_type)
        row[S_UNIQUE] = int(schema.unique_type)
        row[S_DIMENSIONS] = len(schema.filters)
        row[S_GRACE] = -1 if schema.grace_seconds is None else schema.grace_seconds * 10**9
        utc = not record.zone.instants and record.zone.offsets == [0]
        if schema.period_type == PeriodType.LIFETIME:
            row[S_PERIOD] = K_LIFETIME
        elif schema.period_type == PeriodType.FIXED_30_DAYS:
            row[S_PERIOD_FIRST] = FIXED_PERIOD_NS
        elif schema.period_type == PeriodType.DAY and utc:
            row[S_PERIOD_FIRST] = DAY_NS
        else:
            row[S_PERIOD] = K_TABLE
            days = schema.period_type == PeriodType.DAY
            period = None if days else (PeriodType(schema.period_type), schema.billing_cycle_day)
            row[S_PERIOD_FIRST : S_PERIOD_STEP + 1] = self._place_table(period, record.zone)
        if utc:
            row[S_DAY_FIRST] = DAY_NS
        else:
            row[S_DAY] = K_TABLE
            row[S_DAY_FIRST : S_DAY_STEP + 1] = self._place_table(None, record.zone)
        arrays = self.arrays
        self.uids = np.append(self.uids, np.uint64(record.uid))
        self.agg_types = np.append(self.agg_types, row[S_AGG])
        self.unique_types = np.append(self.unique_types, row[S_UNIQUE])
        no_thresholds = np.zeros((limits.THRESHOLDS_MAX, THRESHOLD_FIELDS), dtype=np.int64)
        self.arrays = arrays._replace(
            slots=np.vstack((arrays.slots, row)),
            cache=np.vstack((arrays.cache, np.zeros((1, 4), dtype=np.int64))),
            uids=self.uids,
            thresholds=np.vstack((arrays.thresholds, no_thresholds)),
        )
        self.count += 1
        self.has_grace = self.has_grace or schema.grace_seconds is not None
        self._slot_of_uid[record.uid] = slot
        self._records.append(
            msgspec.structs.replace(record, schema=msgspec.structs.replace(schema, thresholds=[]))
        )
        self._declared.append([dict.fromkeys(f.values, offset) for f in schema.filters])
        self._first_offsets.append(offset)
        self._put_thresholds(slot, schema.thresholds)
        self._records[slot] = record
        return slot

    def _update(self, slot: int, record: MetricRecord, offset: int) -> None:
        first = self._records[slot]
        old, new = first.schema, record.schema
        fixed = (
            old.code,
            old.agg_type,
            old.period_type,
            old.billing_cycle_day,
            old.unique_type,
            old.grace_seconds,
        )
        kept = (
            new.code,
            new.agg_type,
            new.period_type,
            new.billing_cycle_day,
            new.unique_type,
            new.grace_seconds,
        )
        if fixed != kept or [f.key for f in old.filters] != [f.key for f in new.filters]:
            raise RemoteProtocolError(
                f"metric {record.uid} changed what can't change in version {record.version}"
            )
        if any(bool(a.values) != bool(b.values) for a, b in zip(old.filters, new.filters, strict=True)):
            raise RemoteProtocolError(f"metric {record.uid} changed a dimension to or from any value")
        self._put_thresholds(slot, new.thresholds)
        for declared, dimension in zip(self._declared[slot], new.filters, strict=True):
            for value in dimension.values:
                declared.setdefault(value, offset)
        self._records[slot] = msgspec.structs.replace(record, zone=first.zone)

    def _put_thresholds(self, slot: int, thresholds: list[AlertThreshold]) -> None:
        """Append what is new: totals refer to thresholds by position, so those known must come first, unchanged."""
        known = self._records[slot].schema.thresholds
        if list(thresholds[: len(known)]) != list(known) or len(thresholds) > limits.THRESHOLDS_MAX:
            raise RemoteProtocolError(f"metric {self._records[slot].uid} changed its existing thresholds")
        for i, threshold in enumerate(thresholds):
            if not 0 < threshold.value <= int128.MAX:
                raise RemoteProtocolError(f"threshold {threshold.code!r} isn't positive and below 2^127")
            low = threshold.value & (2**64 - 1)
            row = self.arrays.thresholds[slot * limits.THRESHOLDS_MAX + i]
            row[T_LO] = low - 2**64 if low >= 2**63 else low
            row[T_HI] = threshold.value >> 64
            row[T_RECURRING] = int(threshold.recurring)
        self.arrays.slots[slot, S_THRESHOLDS] = len(thresholds)

    def _place_table(self, period: tuple[PeriodType, int] | None, zone: ZoneTable) -> tuple[int, int, int]:
        key = (period, zone.name, tuple(zone.instants), tuple(zone.offsets))
        if key not in self._tables:
            table = _table(*key)
            count = len(table) - 1
            # The last period is cut off by the end of time, so it says nothing about lengths.
            step = (int(table[-2]) - int(table[0])) // max(count - 1, 1)
            self._tables[key] = (len(self.arrays.bounds), count, max(step, 1))
            self.arrays = self.arrays._replace(bounds=np.concatenate((self.arrays.bounds, table)))
        return self._tables[key]

    # ------------------------------------------------------------ reading

    def slot_of(self, code: str) -> int:
        """The slot of the living metric with this code, -1 if there is none."""
        return self._slot_of_code.get(code, -1)

    def slot_of_uid(self, uid: int) -> int:
        """The slot of a metric, deleted or not, -1 if it was never put."""
        return self._slot_of_uid.get(uid, -1)

    def resolve_codes(self, codes: list[str]) -> Ints:
        """Slots of codes, -1 where there is no living metric."""
        return np.array([self._slot_of_code.get(code, -1) for code in codes], dtype=np.int64)

    def slots_of(self, data: npt.NDArray[np.uint8], columns: Ints) -> Ints:
        """Slots of the metric table of a validated payload. Do not write to the result: it is remembered."""
        start, end = int(columns[payload.C_METRIC_ENDS]), int(columns[payload.C_PROPERTY_ENDS])
        # Ends and codes; with the count before them no two tables have equal bytes.
        key = int(columns[payload.C_METRICS]).to_bytes(4, "little") + data[start:end].tobytes()
        slots = self._resolved.get(key)
        if slots is None:
            slots = self.resolve_codes(payload.metric_codes(data, columns))
            if len(self._resolved) >= _RESOLVED_MAX:
                self._resolved.clear()
            if len(key) <= _RESOLVED_BYTES_MAX:
                self._resolved[key] = slots
        return slots

    def widths(self, metric_slots: Ints) -> tuple[int, int, bool]:
        """Of the metrics of a payload: the most thresholds, the most dimensions, and whether one is unknown."""
        key = metric_slots.tobytes()
        found = self._widths.get(key)
        if found is None:
            used = self.arrays.slots[metric_slots[metric_slots >= 0]]
            found = (
                int(used[:, S_THRESHOLDS].max(initial=0)),
                int(used[:, S_DIMENSIONS].max(initial=0)),
                bool(metric_slots.min() < 0),
            )
            if len(self._widths) >= _RESOLVED_MAX:
                self._widths.clear()
            if len(key) <= _RESOLVED_BYTES_MAX:
                self._widths[key] = found
        return found

    def record(self, slot: int) -> MetricRecord:
        """The metric in a slot, as in force; its zone is the one its totals are kept by."""
        return self._records[slot]

    def declared(self, slot: int) -> list[dict[str, int]]:
        """Per dimension its declared values with the offset since which each counts; empty: any value counts."""
        return self._declared[slot]

    def offsets_of(self, slot: int) -> tuple[int, int]:
        """The offsets [first, end) at which a slot's code means this slot; the next uid of the code ends it."""
        first = self._first_offsets[slot]
        code = self._records[slot].schema.code
        later = [
            offset
            for offset, record in zip(self._first_offsets, self._records, strict=True)
            if offset > first and record.schema.code == code
        ]
        return first, min(later, default=_END)

    def with_own_cache(self) -> SchemaArrays:
        """`arrays` for a thread of its own."""
        return self.arrays._replace(cache=np.zeros_like(self.arrays.cache))

    def period_of(self, slot: int, time_ns: int) -> tuple[int, int]:
        """The billing period [start, end) that contains an instant."""
        start, end = period_bounds(self.arrays, slot, time_ns)
        return int(start), int(end)

    def day_of(self, slot: int, time_ns: int) -> tuple[int, int]:
        """The day [start, end) in the metric's zone that contains an instant."""
        start, end = day_bounds(self.arrays, slot, time_ns)
        return int(start), int(end)
