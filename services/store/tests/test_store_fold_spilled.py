"""The fold with its cells in files: the same totals, whatever is where."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from tallymark_protocol import limits
from tallymark_protocol.model import AggType, AlertThreshold, DimensionFilter, MetricSchema, PeriodType
from tallymark_protocol.periods import day_starts
from tallymark_protocol.schema import make_record
from tallymark_store.fold import Fold
from tallymark_store.fold import spilled as spilled_module
from tallymark_store.fold.spilled import (
    Piece,
    SpilledFile,
    SpilledFileError,
    merged_records,
    pack_in_memory,
)
from tallymark_store.fold.units import BLOCK_BYTES, BLOCK_RECORDS
from tallymark_store.wal.errors import DamagedError

from .fold_reference import check_alerts
from .payload_builder import build_payload, event, place
from .test_store_fold import ACCOUNTS, BASE, DAY, SCHEMAS, random_log, recount, rows_of, run


def make_file(fold: Fold, piece: Piece, name: str = "f") -> SpilledFile:
    """The file of a piece, in memory."""
    data = pack_in_memory(fold.partition, piece.sorted_records(), piece.record_count, piece.unit_count)
    return SpilledFile(name, data, fold.partition)


def spill(fold: Fold, fraction: float = 1.0, log_time_ns: int = 0, piece_records: int = 1) -> int:
    """Take a fraction of the cells out of memory, all of what is cold in pieces; returns how many units went."""
    cut = fold.coldest(fraction, log_time_ns)
    *_, set_sizes = fold.set_sizes()
    row = evicted = 0
    while row < fold.cell_rows:
        piece = Piece(cut, fold.cell_rows, piece_records)
        row = fold.collect(piece, row, fold.cell_rows, set_sizes)
        for _ in fold.collect_sets(piece):
            pass
        if piece.unit_count:
            fold.add_spilled(make_file(fold, piece, f"f{len(fold.spilled.files)}"))
            evicted += fold.evict(piece, 0, piece.unit_count)
    return evicted


def merge(fold: Fold, first: int, end: int) -> None:
    """Merge some of the files."""
    old = fold.spilled.files[first:end]
    records = sum(file.records for file in old)
    data = pack_in_memory(
        fold.partition, merged_records(fold.partition, old), records, sum(file.units for file in old)
    )
    fold.replace_spilled(old, SpilledFile("merged", data, fold.partition))


def run_spilling(fold: Fold, log: list[tuple[Any, ...]], rng: random.Random, *, all_of_it: bool) -> Fold:
    """Apply a log, spilling after every record, all or some, and merging now and then."""
    for entry in log:
        run(fold, [entry])
        spill(fold, 1.0 if all_of_it else rng.random(), BASE + 10 * DAY)
        while len(fold.spilled.files) > 5:
            first = rng.randrange(len(fold.spilled.files) - 1)
            merge(fold, first, rng.randrange(first + 2, len(fold.spilled.files) + 1))
    return fold


@pytest.mark.parametrize("all_of_it", [True, False])
@pytest.mark.parametrize("seed", range(2))
def test_totals_equal_the_reference_while_everything_spills(seed: int, all_of_it: bool) -> None:
    """FOLD-1: with all cells, or any of them, going to files after every record, every answer is the reference's."""
    log = random_log(500 + seed, 700)
    fold, reference = Fold(3), recount(log)
    run_spilling(fold, log, random.Random(seed), all_of_it=all_of_it)
    assert fold.spilled_cell_count > 0
    for uid in [*range(10, 10 + len(SCHEMAS)), 99]:
        slot = fold.schemas.slot_of_uid(uid)
        for account in ACCOUNTS:
            for time in {e.time for e in reference.events if e.account == account}:
                assert fold.period_stats(account, slot, time) == reference.period_stats(account, uid, time)
    assert len(reference.alerts) > 20
    check_alerts(fold.alerts(0), reference, 3)


@pytest.mark.parametrize("seed", range(3))
def test_digest_and_counts_are_a_twins(seed: int) -> None:
    """The digest, and how many cells there are, don't tell where they are; a snapshot with files restores to them."""
    log = random_log(520 + seed, 500)
    twin = run(Fold(1), log)
    rng = random.Random(seed)
    half = len(log) // 2
    fold = run_spilling(Fold(1, hash_seed=7), log[:half], rng, all_of_it=seed == 0)
    half_twin = run(Fold(1), log[:half])
    assert fold.digest() == half_twin.digest()
    files = list(fold.spilled.files)
    restored = Fold.restore(1, fold.snapshot(), hash_seed=3, spilled=files)
    assert restored.digest() == half_twin.digest()
    for one in (fold, restored):
        run_spilling(one, log[half:], rng, all_of_it=False)
        assert one.digest() == twin.digest()
        assert one.alerts(0) == twin.alerts(0)
        assert (one.cell_count, one.member_count) == (twin.cell_count, twin.member_count)
        merge(one, 0, len(one.spilled.files))
        assert one.digest() == twin.digest()
    with pytest.raises(Exception, match="files of cells are missing"):
        Fold.restore(1, fold.snapshot())


@pytest.mark.parametrize("seed", range(2))
def test_ranges_filters_and_rankings_see_what_has_spilled(seed: int) -> None:
    """Day rows with filters and groups, and rankings, equal those of a fold that keeps everything in memory."""
    log = random_log(540 + seed, 600)
    twin = run(Fold(0), log)
    fold = run_spilling(Fold(0), log, random.Random(seed), all_of_it=False)
    for code, filters, group_by in [
        ("sum", [], []),
        ("sum", [("provider", ["aws"])], [1]),
        ("sum", [("region", ["eu", ""]), ("provider", ["aws", "gcp"])], [0, 1]),
        ("max", [("region", ["us"])], [0]),
        ("count", [], []),
        ("latest", [], []),
    ]:
        slot = fold.schemas.slot_of(code)
        starts = [
            d for d in day_starts(fold.schemas.record(slot).zone, BASE + 40 * DAY) if d > BASE - 5 * DAY
        ]
        selection = fold.select(slot, filters)
        for account in ACCOUNTS:
            for first, end in [(starts[0], starts[-1]), (starts[6], starts[9])]:
                for per_day in (False, True):
                    asked = {"selection": selection, "group_by": group_by, "per_day": per_day}
                    assert rows_of(fold, account, slot, first, end, **asked) == rows_of(
                        twin, account, slot, first, end, **asked
                    )
        first, end = starts[2], starts[20]
        assert fold.top_days(slot, first, end, selection, 4) == twin.top_days(slot, first, end, selection, 4)
        for day in (0, 12):
            start, _ = fold.schemas.period_of(slot, BASE + day * DAY)
            assert fold.top_period(slot, start, 3) == twin.top_period(slot, start, 3)


def many_combinations(fold: Fold, count: int, offset: int, first: int = 0) -> int:
    """Events of one account and day with so many combinations; returns the offset after them."""
    for at in range(0, count, 500):
        events = [
            event(1, "wide", value=i, time=BASE, properties={"k": f"v{i}"})
            for i in range(first + at, first + min(at + 500, count))
        ]
        data, columns = place(build_payload(events))
        fold.apply(data, columns, None, offset, BASE)
        offset += len(events)
    return offset


WIDE = MetricSchema(
    code="wide", agg_type=AggType.SUM, filters=[DimensionFilter(key="k")], period_type=PeriodType.DAY
)


def test_day_with_many_combinations_comes_back_whole() -> None:
    """A day of more combinations than one block holds, or than may be, goes and comes back, its overflow with it."""
    folds = Fold(0), Fold(0)
    for fold in folds:
        fold.put_schema(make_record(1, WIDE), 0)
    offsets = [many_combinations(fold, 3_000, 1) for fold in folds]
    assert spill(folds[0]) == 2
    assert folds[0].spilled_cell_count == folds[0].cell_count == 3_001
    assert folds[0].digest() == folds[1].digest()
    for fold, offset in zip(folds, offsets, strict=True):
        many_combinations(fold, limits.DIMENSION_COMBINATIONS_MAX, offset, first=2_500)
    assert folds[0].spilled_cell_count == 0
    assert folds[0].digest() == folds[1].digest()
    slot = folds[0].schemas.slot_of("wide")
    day, end = folds[0].schemas.day_of(slot, BASE)
    spill(folds[0])
    found = folds[0].day_rows(1, slot, day, end)
    assert found == folds[1].day_rows(1, slot, day, end)
    assert found.overflowed == [day]
    assert folds[0].digest() == folds[1].digest()


def test_what_is_touched_between_copy_and_eviction_stays() -> None:
    """A unit that changed after it was copied stays in memory, and its copy in the file means nothing."""
    log = random_log(560, 300)
    fold, twin = run(Fold(2), log[:-1]), run(Fold(2), log)
    piece = Piece(fold.coldest(1.0, 0), fold.cell_rows)
    *_, set_sizes = fold.set_sizes()
    assert fold.collect(piece, 0, fold.cell_rows, set_sizes) == fold.cell_rows
    list(fold.collect_sets(piece))
    file = make_file(fold, piece)
    run(fold, log[-1:])
    fold.add_spilled(file)
    assert fold.digest() == twin.digest()
    assert 0 < fold.evict(piece, 0, piece.unit_count) < piece.unit_count
    assert fold.digest() == twin.digest()
    assert fold.evict(piece, 0, piece.unit_count) == 0


def test_coldest_prefers_what_is_over() -> None:
    """Periods and days that are over by log time go before open ones, the longest untouched first."""
    schema = MetricSchema(
        code="m", period_type=PeriodType.DAY, thresholds=[AlertThreshold(code="t", value=2)]
    )
    fold = Fold(0)
    fold.put_schema(make_record(1, schema), 0)
    for day in range(4):
        events = [event(account, "m", time=BASE + day * DAY) for account in range(100)]
        data, columns = place(build_payload(events))
        fold.apply(data, columns, None, 1 + 100 * day, BASE + day * DAY)
    now = BASE + 3 * DAY
    assert spill(fold, 0.25, now) == 200  # the first day's: a period and a day of each account
    slot = fold.schemas.slot_of("m")
    assert all(copy.cells[0, 1] == fold.schemas.day_of(slot, BASE)[0] for copy in fold.spilled_copies())
    assert spill(fold, 0.6, now) == 360
    assert fold.spilled_cell_count == 560
    assert spill(fold, 0.5, now) == 120  # what is left of those that are over, and of the open ones
    assert fold.cell_count == 800
    freed = fold.cell_rows
    events = [event(account, "m", time=BASE + 9 * DAY) for account in range(100)]
    data, columns = place(build_payload(events))
    fold.apply(data, columns, None, 500, BASE + 9 * DAY)
    assert fold.cell_rows == freed  # rows that had been given back were taken again
    assert fold.cell_count == 1_000


def test_damaged_file_is_an_error_and_never_a_total(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any flipped bit of a file is found when it is opened, or when what it holds is asked for."""
    monkeypatch.setattr(spilled_module, "PIECE_RECORDS", 64)
    log = random_log(580, 200)
    twin = run(Fold(2), log)
    fold = run(Fold(2), log)
    piece = Piece(fold.coldest(1.0, 0), fold.cell_rows)
    *_, set_sizes = fold.set_sizes()
    fold.collect(piece, 0, fold.cell_rows, set_sizes)
    list(fold.collect_sets(piece))
    good = pack_in_memory(2, piece.sorted_records(), piece.record_count, piece.unit_count)
    blocks = -(-piece.record_count // BLOCK_RECORDS)
    rng = random.Random(5)
    meaningless = 0
    for at in [rng.randrange(len(good)) for _ in range(300)]:
        bad = good.copy()
        bad[at] ^= 1 << rng.randrange(8)
        other = run(Fold(2), log)
        try:
            other.add_spilled(SpilledFile("f", bad, 2))
        except SpilledFileError:
            continue
        assert other.evict(piece, 0, piece.unit_count) == piece.unit_count
        try:
            assert other.digest() == twin.digest()
        except DamagedError:
            assert BLOCK_BYTES <= at < BLOCK_BYTES * (1 + blocks)
        else:  # padding
            meaningless += 1
            place_in_block = at % BLOCK_BYTES
            assert (at < BLOCK_BYTES and at >= 92) or place_in_block >= 8 * (BLOCK_RECORDS * 12 + 2)
    assert meaningless < 100
    with pytest.raises(SpilledFileError, match="partition 3"):
        SpilledFile("f", good, 3)
    with pytest.raises(SpilledFileError):
        SpilledFile("f", good[:-64], 2)
    with pytest.raises(SpilledFileError):
        SpilledFile("f", np.zeros(0, dtype=np.uint8), 2)


def test_damaged_file_stops_the_fold() -> None:
    """An event for a unit whose block is damaged is an error, not a new cell."""
    fold = Fold(0)
    fold.put_schema(make_record(1, WIDE), 0)
    offset = many_combinations(fold, 10, 1)
    piece = Piece(fold.coldest(1.0, 0), fold.cell_rows)
    fold.collect(piece, 0, fold.cell_rows)
    data = pack_in_memory(0, piece.sorted_records(), piece.record_count, piece.unit_count)
    fold.add_spilled(SpilledFile("f", data, 0))
    assert fold.evict(piece, 0, piece.unit_count) == 2
    data[BLOCK_BYTES + 700] ^= 1
    with pytest.raises(DamagedError):
        many_combinations(fold, 10, offset)
    with pytest.raises(DamagedError):
        fold.period_stats(1, fold.schemas.slot_of("wide"), BASE)
    with pytest.raises(DamagedError):
        fold.digest()
