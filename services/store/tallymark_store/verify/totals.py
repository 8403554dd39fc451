"""The totals of billing periods, recounted from archived events, and compared with a fold's cells.

For logs that no longer begin with a partition's first record: what lies below is in the archive, sorted. The rows come
in tables in the order of an archive file; each table is cut where metric, account or period change, and what it says of
each of those is merged with what was known. So memory is bounded by the totals themselves, and by `passes` those of one
part of the accounts at a time, however many events there are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from tallymark_protocol.model import AggType
from tallymark_store.archive.manifest import Dropped
from tallymark_store.fold import Fold
from tallymark_store.fold import cells as c
from tallymark_store.fold.counters import N_CELLS
from tallymark_store.fold.schemas import (
    K_FIXED,
    K_LIFETIME,
    S_PERIOD,
    S_PERIOD_COUNT,
    S_PERIOD_FIRST,
    SchemaTable,
)

Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]

# A total: (slot, account, start), what is counted, and the words of a cell; the sum in halves of 32 bits until it is told.
TOTAL: Final = np.dtype(
    [
        ("slot", "<i8"), ("account", "<u8"), ("start", "<i8"), ("count", "<i8"), ("low", "<i8"), ("high", "<i8"),
        ("min", "<i8"), ("max", "<i8"), ("value", "<i8"), ("time", "<i8"), ("offset", "<i8"),
    ]
)  # fmt: skip
MEMBER: Final = np.dtype(
    [
        ("slot", "<i8"), ("account", "<u8"), ("start", "<i8"), ("lo", "<i8"), ("hi", "<i8"), ("time", "<i8"),
        ("offset", "<i8"), ("removed", "<i8"),
    ]
)  # fmt: skip
_MERGE_FROM: Final = 1 << 16  # rows that wait before they are merged into what is known
_GOLDEN: Final = np.uint64(0x9E3779B97F4A7C15)


class Difference:
    """A total that is not what its events say."""

    def __init__(self, code: str, account: int, start_ns: int, running: str, recounted: str) -> None:
        self.code = code
        self.account = account
        self.start_ns = start_ns
        self.running = running
        self.recounted = recounted


class PeriodTotals:
    """Counts events of one partition below an offset.

    Args:
        schemas: the metrics, as of that offset.
        upto: events at and above it don't count.
        share: which part of the accounts is counted, and of how many.
    """

    def __init__(self, schemas: SchemaTable, upto: int, share: tuple[int, int] = (0, 1)) -> None:
        self._schemas = schemas
        self._upto = upto
        self._share = share
        self._slots = {int(uid): slot for slot, uid in enumerate(schemas.uids[: schemas.count].tolist())}
        self._totals: list[npt.NDArray[Any]] = []
        self._members: list[npt.NDArray[Any]] = []
        self.unknown: set[int] = set()  # uids of metrics that are not among the schemas

    def take(self, table: pa.Table) -> None:
        """Count the rows of a table, which is sorted as archive files are."""
        offsets = table.column("offset").to_numpy()
        accounts = table.column("account").to_numpy()
        counted = (offsets < self._upto) & is_share(accounts, self._share)
        if not counted.any():
            return
        if not counted.all():
            table = table.filter(pa.array(counted))
            offsets, accounts = table.column("offset").to_numpy(), table.column("account").to_numpy()
        uids = table.column("metric_uid").to_numpy()
        edges = np.flatnonzero(np.diff(uids)) + 1
        for first, last in zip([0, *edges.tolist()], [*edges.tolist(), len(uids)], strict=True):
            slot = self._slots.get(int(uids[first]))
            if slot is None:
                self.unknown.add(int(uids[first]))
                continue
            self._take_metric(
                slot, table.slice(first, last - first), accounts[first:last], offsets[first:last]
            )

    def _take_metric(self, slot: int, table: pa.Table, accounts: Words, offsets: Ints) -> None:
        times = table.column("time_ns").to_numpy()
        starts = period_starts(self._schemas, slot, times)
        is_first = np.ones(len(times), np.bool_)
        is_first[1:] = (np.diff(starts) != 0) | (accounts[1:] != accounts[:-1])
        first = np.flatnonzero(is_first)
        last = np.append(first[1:], len(times)) - 1
        totals = np.zeros(len(first), TOTAL)
        totals["slot"] = slot
        totals["account"] = accounts[first]
        totals["start"] = starts[first]
        totals["count"] = last - first + 1
        totals["time"], totals["offset"] = times[last], offsets[last]
        agg = AggType(int(self._schemas.agg_types[slot]))
        if agg == AggType.COUNT_UNIQUE:
            members = np.zeros(len(times), MEMBER)
            members["slot"], members["account"], members["start"] = slot, accounts, starts
            members["lo"], members["hi"] = _members_of(table, int(self._schemas.uids[slot]))
            members["time"], members["offset"] = times, offsets
            removed = table.column("operation").combine_chunks()
            words = removed.cast(pa.string()) if pa.types.is_dictionary(removed.type) else removed
            members["removed"] = pc.equal(words, "remove").to_numpy(zero_copy_only=False)
            self._members.append(_newest(members))
        elif agg != AggType.COUNT:
            values = table.column("value").to_numpy()
            totals["low"] = np.add.reduceat(values & 0xFFFFFFFF, first)
            totals["high"] = np.add.reduceat(values >> 32, first)
            totals["min"] = np.minimum.reduceat(values, first)
            totals["max"] = np.maximum.reduceat(values, first)
            totals["value"] = values[last]
        self._totals.append(totals)
        self._settle()

    def _settle(self) -> None:
        """Merge what waits, once it is as much as what is known."""
        for parts, merge in ((self._totals, _merged), (self._members, _newest)):
            waiting = sum(len(part) for part in parts[1:])
            if len(parts) > 1 and waiting >= max(len(parts[0]), _MERGE_FROM):
                parts[:] = [merge(np.concatenate(parts))]

    def result(self) -> npt.NDArray[Any]:
        """All totals, by slot, account and period; `low` and `high` are the words of the sum, or of the set's size."""
        totals = _merged(np.concatenate([np.zeros(0, TOTAL), *self._totals]))
        low, high = totals["low"].copy(), totals["high"].copy()
        wide = (high.view(np.uint64) << np.uint64(32)) + low.view(np.uint64)
        # `low` is a sum of numbers below 2^32: what is above its low half is carried.
        totals["low"] = wide.view(np.int64)
        totals["high"] = (high + (low >> 32)) >> 32
        members = _newest(np.concatenate([np.zeros(0, MEMBER), *self._members]))
        present = members[members["removed"] == 0]
        if len(members):
            keys, counts = np.unique(present[["slot", "account", "start"]], return_counts=True)
            sizes = dict(zip(keys.tolist(), counts.tolist(), strict=True))
            for row in np.flatnonzero(
                self._schemas.agg_types[totals["slot"]] == AggType.COUNT_UNIQUE
            ).tolist():
                key = tuple(int(totals[name][row]) for name in ("slot", "account", "start"))
                totals["low"][row] = sizes.get(key, 0)
        return totals


class Gone:
    """What can't be counted again, as raw events were dropped: totals of periods that may have had some.

    Attributes:
        skipped: totals that were left out.
    """

    def __init__(self, schemas: SchemaTable, dropped: Sequence[Dropped], upto: int) -> None:
        self.skipped = 0
        self._upto = upto  # offsets from here on were not counted
        self._periods: dict[
            int, tuple[Dropped, int, int]
        ] = {}  # by slot: starts of the first and the last period
        self._missing: dict[int, int] = {}
        slots = {int(uid): slot for slot, uid in enumerate(schemas.uids[: schemas.count].tolist())}
        for item in dropped:
            slot = slots.get(item.metric_uid)
            if slot is not None:
                times = np.array([item.start_ns, item.end_ns - 1], np.int64)
                first, last = period_starts(schemas, slot, times).tolist()
                self._periods[slot] = item, first, last
                self._missing[slot] = 0

    def _is_gone(self, totals: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        gone = np.zeros(len(totals), np.bool_)
        for slot, (_, first, last) in self._periods.items():
            gone |= (totals["slot"] == slot) & (totals["start"] >= first) & (totals["start"] <= last)
        return gone

    def count(self, running: npt.NDArray[Any], recounted: npt.NDArray[Any]) -> None:
        """See how many events are missing."""
        for slot in self._missing:
            for sign, totals in ((1, running), (-1, recounted)):
                self._missing[slot] += sign * int(totals["count"][totals["slot"] == slot].sum())
        self.skipped += int(self._is_gone(running).sum())

    def without(self, totals: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The others."""
        return totals[~self._is_gone(totals)]

    def differences(self) -> list[tuple[Dropped, int]]:
        """Where not so many events are missing as were written down: and how many are.

        More never may be. Fewer may where not all of what was dropped lies in what was counted, or where what was written
        down is an upper bound.
        """
        found = []
        for slot, (item, _, _) in sorted(self._periods.items()):
            missing = self._missing[slot]
            is_all = not item.is_at_most and item.end_offset <= self._upto
            if missing > item.events or (is_all and missing < item.events):
                found.append((item, missing))
        return found


def period_starts(schemas: SchemaTable, slot: int, times: Ints) -> Ints:
    """Where the billing periods begin that contain these instants."""
    arrays = schemas.arrays
    kind, first, count = arrays.slots[slot, [S_PERIOD, S_PERIOD_FIRST, S_PERIOD_COUNT]].tolist()
    if kind == K_FIXED:
        multiples: Ints = times // first * first
        return multiples
    if kind == K_LIFETIME:
        return np.zeros(len(times), np.int64)
    bounds = arrays.bounds[first : first + count]
    starts: Ints = bounds[np.maximum(np.searchsorted(bounds, times, side="right") - 1, 0)]
    return starts


def running_totals(fold: Fold, share: tuple[int, int] = (0, 1)) -> npt.NDArray[Any]:
    """The period cells of a fold, those that only files have included, as `PeriodTotals.result` gives them.

    Raises:
        DamagedError: a file is damaged.
    """
    parts = []
    for cells in all_cells(fold):
        chosen = (cells[:, c.W_KEY] >> 32) & 0xFFFFFFFF == c.PERIOD
        chosen &= is_share(cells[:, c.W_ACCOUNT].view(np.uint64), share)
        parts.append(cells[chosen])
    cells = np.concatenate(parts)
    totals = np.zeros(len(cells), TOTAL)
    totals["slot"] = cells[:, c.W_KEY] & 0xFFFFFFFF
    totals["account"] = cells[:, c.W_ACCOUNT].view(np.uint64)
    for name, word in (
        ("start", c.W_START), ("count", c.W_COUNT), ("low", c.W_LO), ("high", c.W_HI), ("min", c.W_MIN),
        ("max", c.W_MAX), ("value", c.W_LAST_VALUE), ("time", c.W_LAST_TIME), ("offset", c.W_LAST_OFFSET),
    ):  # fmt: skip
        totals[name] = cells[:, word]
    aggs = fold.schemas.agg_types[totals["slot"]]
    for agg, ignored in _MEANINGLESS.items():
        for name in ignored:
            totals[name][aggs == agg] = 0
    return _ordered(totals)


def all_cells(fold: Fold) -> Iterator[Ints]:
    """All cells of a fold, some at a time, each array valid until the next: those in memory, then what only files have.

    Raises:
        DamagedError: a file is damaged.
    """
    state = fold._state  # read-only, and as bulky as it is
    cells = state.cells[: int(state.counters[N_CELLS])]
    yield cells[cells[:, c.W_KEY] != c.FREE]
    for copy in fold.spilled_copies():
        yield copy.cells[: int(copy.counters[N_CELLS])]


# What cells of an aggregation don't tell.
_MEANINGLESS: Final = {
    AggType.COUNT: ("low", "high", "min", "max", "value"),
    AggType.COUNT_UNIQUE: ("high", "min", "max", "value", "time", "offset"),
}


def compare(schemas: SchemaTable, running: npt.NDArray[Any], recounted: npt.NDArray[Any]) -> list[Difference]:
    """The totals that are not the same on both sides."""
    aggs = schemas.agg_types[recounted["slot"]]
    for name in _MEANINGLESS[AggType.COUNT_UNIQUE]:
        recounted[name][aggs == AggType.COUNT_UNIQUE] = 0
    running = running[running["count"] != 0]
    if len(running) == len(recounted) and (running == recounted).all():
        return []
    sides: dict[tuple[int, int, int], list[str]] = {}
    for side, totals in enumerate((running, recounted)):
        other = recounted if side == 0 else running
        for row in totals[~np.isin(totals, other)].tolist():
            sides.setdefault(row[:3], ["none", "none"])[side] = _told(
                AggType(int(schemas.agg_types[row[0]])), row
            )
    return [
        Difference(schemas.record(slot).schema.code, account, start, *told)
        for (slot, account, start), told in sorted(sides.items())
    ]


def _told(agg: AggType, row: tuple[int, ...]) -> str:
    _, _, _, count, low, high, least, most, value, time, offset = row
    if agg == AggType.COUNT:
        return f"count {count}, last event at {time} ns, offset {offset}"
    if agg == AggType.COUNT_UNIQUE:
        return f"{count} operations, {low} members"
    total = (high << 64) + (low & (2**64 - 1))
    return f"count {count}, sum {total}, min {least}, max {most}, last value {value} at {time} ns, offset {offset}"


def is_share(accounts: Words, share: tuple[int, int]) -> npt.NDArray[np.bool_]:
    """Which of some accounts belong to a part of all of them: (which, of how many)."""
    part, of = share
    if of == 1:
        return np.ones(len(accounts), np.bool_)
    chosen: npt.NDArray[np.bool_] = (accounts * _GOLDEN >> np.uint64(33)) % np.uint64(of) == np.uint64(part)
    return chosen


def _ordered(totals: npt.NDArray[Any]) -> npt.NDArray[Any]:
    ordered: npt.NDArray[Any] = totals[np.lexsort((totals["start"], totals["account"], totals["slot"]))]
    return ordered


def _groups(rows: npt.NDArray[Any], names: tuple[str, ...]) -> npt.NDArray[np.bool_]:
    """Whether each row is the first with its key, of rows in order."""
    is_first = np.ones(len(rows), np.bool_)
    is_first[1:] = False
    for name in names:
        is_first[1:] |= rows[name][1:] != rows[name][:-1]
    return is_first


def _merged(totals: npt.NDArray[Any]) -> npt.NDArray[Any]:
    if not len(totals):
        return totals
    order = np.lexsort((totals["offset"], totals["time"], totals["start"], totals["account"], totals["slot"]))
    totals = totals[order]
    first = np.flatnonzero(_groups(totals, ("slot", "account", "start")))
    merged: npt.NDArray[Any] = totals[
        np.append(first[1:], len(totals)) - 1
    ].copy()  # the last one has the last event
    for name, reduce in (
        ("count", np.add), ("low", np.add), ("high", np.add), ("min", np.minimum), ("max", np.maximum)
    ):  # fmt: skip
        merged[name] = reduce.reduceat(totals[name], first)
    # Sums of low halves would grow with every merge.
    merged["high"] += merged["low"] >> 32
    merged["low"] &= 0xFFFFFFFF
    return merged


def _newest(members: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The operation that counts, of each member of each set."""
    order = np.lexsort(
        tuple(members[name] for name in ("offset", "time", "hi", "lo", "start", "account", "slot"))
    )
    members = members[order]
    if not len(members):
        return members
    first = np.flatnonzero(_groups(members, ("slot", "account", "start", "lo", "hi")))
    newest: npt.NDArray[Any] = members[np.append(first[1:], len(members)) - 1]
    return newest


def _members_of(table: pa.Table, uid: int) -> tuple[Ints, Ints]:
    """The two words that stand for the value of each row, as the fold has them."""
    plain = table.column("value").fill_null(0).to_numpy()
    lo, hi = plain.copy(), np.zeros(len(plain), np.int64)
    texts = table.column("value_text")
    if texts.null_count == len(plain):
        return lo, hi
    kinds = table.column("value_kind").to_pylist()
    prefix = bytes(8) + uid.to_bytes(8, "little") + b"\x01"
    for row, text in enumerate(texts.to_pylist()):
        if kinds[row] == "uint64":
            lo[row] = int(text) - 2**64 if int(text) >= 2**63 else int(text)
        elif kinds[row] == "text":
            digest = hashlib.blake2b(prefix + text.encode(), digest_size=16).digest()
            lo[row] = int.from_bytes(digest[:8], "little", signed=True)
            hi[row] = int.from_bytes(digest[8:], "little", signed=True)
    return lo, hi
