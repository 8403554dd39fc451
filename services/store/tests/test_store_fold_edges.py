"""Edges of the fold: overflowing days, extreme thresholds, schema changes, growth, damaged snapshots."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from tallymark_protocol import int128
from tallymark_protocol.errors import InvalidRequestError, RemoteProtocolError
from tallymark_protocol.messages import GroupValue
from tallymark_protocol.model import AggType, AlertThreshold, DimensionFilter, MetricSchema, PeriodType
from tallymark_protocol.periods import day_of, period_of
from tallymark_protocol.schema import MetricRecord, make_record, update_record
from tallymark_protocol.zones import UTC, ZoneTable
from tallymark_runtime.disk import DiskError
from tallymark_store import checkpoint
from tallymark_store.fold import Fold, SchemaTable
from tallymark_store.fold.arena import Arena
from tallymark_store.fold.cells import HEAD_KEY, PERIOD, cell_hash
from tallymark_store.fold.dimensions import VALUES, WIDTH, combo_hash, intern_value, value_hash
from tallymark_store.fold.index import CAPACITY, COUNT, FULL, SHARDS
from tallymark_store.fold.thresholds import divide
from tallymark_store.fold.uniques import member_hash
from tallymark_store.wal import DamagedError

from .payload_builder import build_payload, event, place
from .store_driver import Driver, metric
from .test_store_fold import BASE, DAY, random_log, run

BIG = 2**63 - 1


def fold_of(schema: MetricSchema, events: list[dict[str, Any]], *, base: int = 1) -> Fold:
    """A fold of one metric and one batch."""
    return run(Fold(0), [("schema", 0, make_record(1, schema)), ("batch", base, events, None, BASE)])


def multiples(fold: Fold) -> list[tuple[int, int, int, int]]:
    """(offset, value, first, last) of each alert record."""
    return [
        (
            a.event_offset,
            *(int128.from_bytes(x) for x in (a.value_at_cross, a.first_multiple, a.last_multiple)),
        )
        for a in fold.alerts(0)
    ]


def test_combinations_beyond_the_limit_stay_in_the_total_and_flag_their_day() -> None:
    """The 10,001st combination makes no cell and no number; total exact, day listed, other days unharmed."""
    schema = MetricSchema(code="m", agg_type=AggType.SUM, filters=[DimensionFilter(key="k")])
    limit = 10_000
    events = [event(1, value=2, time=BASE, properties={"k": str(i)}) for i in range(limit)]
    fold = fold_of(schema, events)
    slot = fold.schemas.slot_of("m")
    day = fold.schemas.day_of(slot, BASE)
    assert fold.day_rows(1, slot, *day).overflowed == []
    assert len(fold.day_rows(1, slot, *day, group_by=[0]).rows) == limit
    assert fold.dimensions.combo_count == limit + 1
    more = [
        event(1, value=2, time=BASE, properties={"k": "new"}),
        event(1, value=2, time=BASE, properties={"k": "7"}),
        event(1, value=2, time=BASE + DAY, properties={"k": "new2"}),
        event(2, value=2, time=BASE, properties={"k": "new"}),
    ]
    before = fold.digest()
    run(fold, [("batch", limit + 1, more, None, BASE)])
    assert fold.digest() != before
    assert fold.period_stats(1, slot, BASE)[0].sum == int128.to_bytes(2 * limit + 6)  # type: ignore[union-attr]
    rows = fold.day_rows(1, slot, day[0], day[1] + DAY)
    assert rows.overflowed == [day[0]]
    assert [r.stats.count for r in rows.rows] == [1]
    assert fold.day_rows(2, slot, *day).rows[0].stats.count == 1
    top = fold.top_days(slot, day[0], day[1] + DAY, None, 5)
    assert (top.overflowed, [a for a, _ in top.accounts]) == ([1], [2])
    restored = Fold.restore(0, fold.snapshot())
    assert restored.day_rows(1, slot, day[0], day[1] + DAY) == rows


def test_one_event_passes_many_multiples_in_one_record() -> None:
    """Recurring: first and last multiple in one record; falling and rising again repeats none."""
    schema = MetricSchema(
        code="m", agg_type=AggType.SUM, thresholds=[AlertThreshold(code="t", value=10, recurring=True)]
    )
    values = [9, 1, 25, -40, 38, 6, 1, -100, 200]
    fold = fold_of(schema, [event(1, value=v) for v in values])
    assert multiples(fold) == [(2, 10, 1, 1), (3, 35, 2, 3), (7, 40, 4, 4), (9, 140, 5, 14)]
    assert fold.period_stats(1, 0, BASE)[0].alert_flags == 1  # type: ignore[union-attr]


def test_thresholds_beyond_64_bits_are_exact() -> None:
    """Totals and multiples of 2^62 steps and of more than 64 bits; the largest threshold never fires."""
    schema = MetricSchema(
        code="m",
        agg_type=AggType.SUM,
        thresholds=[
            AlertThreshold(code="a", value=2**62, recurring=True),
            AlertThreshold(code="b", value=2**64 + 1, recurring=True),
            AlertThreshold(code="c", value=2**127 - 1),
            AlertThreshold(code="d", value=2**126, recurring=True),
            AlertThreshold(code="e", value=1, recurring=True),
        ],
    )
    # Not through `make_record`: what its rules allow today is no reason to be wrong beyond it.
    log = [
        ("schema", 0, MetricRecord(1, 1, schema, UTC)),
        ("batch", 1, [event(1, value=BIG) for _ in range(9)], None, BASE),
    ]
    fold = run(Fold(0), log)
    found: dict[str, int] = {}
    for alert in fold.alerts(0):
        total = int128.from_bytes(alert.value_at_cross)
        first, last = int128.from_bytes(alert.first_multiple), int128.from_bytes(alert.last_multiple)
        assert total == BIG * alert.event_offset
        assert last == total // alert.threshold_value
        assert first == found.get(alert.threshold_code, 0) + 1
        found[alert.threshold_code] = last
    assert found == {c: 9 * BIG // v for c, v in (("a", 2**62), ("b", 2**64 + 1), ("e", 1))}
    assert fold.period_stats(1, 0, BASE)[0].alert_flags == 0b10011  # type: ignore[union-attr]


def test_division_of_128_bits_equals_python() -> None:
    """`divide` at the edges of words."""
    numbers = [
        1,
        2,
        3,
        10,
        2**62,
        2**63 - 1,
        2**63,
        2**64 - 1,
        2**64,
        2**64 + 1,
        2**100 + 7,
        2**126,
        2**127 - 1,
    ]
    for n in numbers:
        for d in numbers:
            q_lo, q_hi, r_lo, r_hi = divide(*int128.to_words(n), *int128.to_words(d))
            got = (int128.from_words(int(q_lo), int(q_hi)), int128.from_words(int(r_lo), int(r_hi)))
            assert got == divmod(n, d)


def test_threshold_added_to_a_total_past_it_fires_once_at_the_next_event() -> None:
    """A new threshold covers all multiples so far in one record, and old ones aren't repeated."""
    old = AlertThreshold(code="a", value=5)
    schema = MetricSchema(code="m", thresholds=[old])
    record = make_record(1, schema)
    fold = fold_of(schema, [event(1), *[event(2) for _ in range(12)]])
    assert multiples(fold) == [(6, 5, 1, 1)]
    added = [old, AlertThreshold(code="b", value=4, recurring=True), AlertThreshold(code="c", value=3)]
    fold.put_schema(update_record(record, msgspec.structs.replace(schema, thresholds=added)), 14)
    run(fold, [("batch", 15, [event(1), event(2), event(2)], None, BASE)])
    assert multiples(fold) == [(6, 5, 1, 1), (16, 13, 1, 3), (16, 13, 1, 1)]
    assert [a.threshold_code for a in fold.alerts(0)] == ["a", "b", "c"]
    assert fold.period_stats(2, 0, BASE)[0].alert_flags == 0b111  # type: ignore[union-attr]
    assert fold.alerts(1, account=2, slot=0, limit=1) == fold.alerts(0)[1:2]
    assert fold.alerts(3) == fold.alerts(0, account=9) == []


def test_negative_max_and_latest_never_fire() -> None:
    """Thresholds are positive; an aggregate below zero is below them all, and empty MAX is None."""
    for agg in (AggType.MAX, AggType.LATEST):
        schema = MetricSchema(
            code="m", agg_type=agg, thresholds=[AlertThreshold(code="t", value=1, recurring=True)]
        )
        fold = fold_of(schema, [event(1, value=-(2**63), time=BASE), event(1, value=-1, time=BASE + 1)])
        assert fold.alerts(0) == []
        assert fold.period_stats(1, 0, BASE)[0].last_value == -1  # type: ignore[union-attr]
        assert fold.period_stats(3, 0, BASE)[0] is None


def test_undeclared_keys_and_values_are_refused_by_name() -> None:
    """Filters and groupings on what isn't declared say what is."""
    schema = MetricSchema(
        code="m", filters=[DimensionFilter(key="k", values=["a"]), DimensionFilter(key="any")]
    )
    fold = fold_of(schema, [event(1, properties={"k": "a", "any": ""}), event(1, properties={"k": "b"})])
    with pytest.raises(InvalidRequestError, match=r"'region'.*'k', 'any'"):
        fold.select(0, [("region", ["eu"])])
    with pytest.raises(InvalidRequestError, match="'nope'"):
        fold.dimension(0, "nope")
    with pytest.raises(InvalidRequestError, match="'b'"):
        fold.select(0, [("k", ["b"])])
    with pytest.raises(InvalidRequestError, match="twice"):
        fold.select(0, [("k", ["a"]), ("k", ["a"])])
    rows = fold.day_rows(1, 0, *fold.schemas.day_of(0, BASE), group_by=[0, 1]).rows
    assert [r.group for r in rows] == [
        [GroupValue(0, "a"), GroupValue(0, "")],
        [GroupValue(2), GroupValue(1)],
    ]
    mask = fold.dimensions.mask(fold.select(0, [("k", ["a"])]))
    assert mask.tolist()[1:] == [True, False]


def test_log_without_reserved_addresses_gives_the_same_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrays that must be copied to grow, and indexes that must be moved apart, hold the same."""
    log = random_log(7, 600)
    usual = run(Fold(0), log)
    monkeypatch.setattr(Arena, "_reserve", lambda self, rows: False)
    many = [("batch", 10_000, [event(i, "plain", time=BASE) for i in range(30_000)], None, BASE)]
    fallback = run(Fold(0), log)
    assert fallback.digest() == usual.digest()
    run(usual, many)
    run(fallback, many)
    assert not fallback._cells.reserved
    assert fallback.digest() == usual.digest() == Fold.restore(0, fallback.snapshot()).digest()


def test_a_cell_takes_at_most_128_bytes() -> None:
    """Cells and their index, at sizes where the empty index no longer counts."""
    fold = fold_of(MetricSchema(code="m"), [event(i) for i in range(20_000)])
    for size in range(20_000, 100_000, 8_000):
        run(fold, [("batch", size + 1, [event(i) for i in range(size, size + 8_000)], None, BASE)])
        assert fold.cell_count == 2 * (size + 8_000)
        assert fold.memory_bytes() / fold.cell_count <= 128


def test_batch_naming_an_unknown_metric_is_refused_whole() -> None:
    """An accepted event of a metric that was never put is damage; a rejected one is nothing."""
    fold = fold_of(MetricSchema(code="m"), [event(1)])
    digest = fold.digest()
    with pytest.raises(RemoteProtocolError):
        run(fold, [("batch", 2, [event(1), event(1, "gone")], None, BASE)])
    assert (fold.digest(), fold.applied) == (digest, 2)
    run(fold, [("batch", 2, [event(1), event(1, "gone")], [0, 16], BASE)])
    assert fold.period_stats(1, 0, BASE)[0].count == 2  # type: ignore[union-attr]


def test_damaged_snapshots_are_refused() -> None:
    """Missing parts, another partition, and references that lead nowhere raise; nothing crashes."""
    fold = run(Fold(4), random_log(1, 200))
    parts = fold.snapshot()
    with pytest.raises(RemoteProtocolError):
        Fold.restore(5, parts)
    for name in parts:
        with pytest.raises(RemoteProtocolError):
            Fold.restore(4, {k: v for k, v in parts.items() if k != name})
    for name, column in (("cells", 2), ("members", 0)):
        table = np.array(parts[name])
        table[3, column] = (1 << 40) + 60_000
        with pytest.raises(RemoteProtocolError):
            Fold.restore(4, {**parts, name: table})


@pytest.mark.parametrize("zone", ["UTC", "America/Asuncion", "Pacific/Apia", "Australia/Lord_Howe"])
@pytest.mark.parametrize("period_type", list(PeriodType))
def test_period_lookups_equal_the_calendar(zone: str, period_type: PeriodType) -> None:
    """Kernel lookups of periods and days agree with `periods`, at boundaries too."""
    cycle_day = 28 if period_type == PeriodType.CALENDAR else 1
    schema = MetricSchema(code="m", period_type=period_type, time_zone=zone, billing_cycle_day=cycle_day)
    record = make_record(1, schema)
    table = SchemaTable()
    slot = table.put(record, 0)
    times = {0, 1, BASE, 253_402_300_799 * 10**7, BIG - 1, 1_325_239_200 * 10**9, 1_325_246_400 * 10**9}
    for time in list(times):
        day, period = day_of(time, record.zone), period_of(time, period_type, cycle_day, record.zone)
        edges = (day.start_ns, day.end_ns, period.start_ns, period.end_ns)
        times |= {t + d for t in edges for d in (-1, 0) if 0 <= t + d < BIG}
    for time in times:
        day, period = day_of(time, record.zone), period_of(time, period_type, cycle_day, record.zone)
        assert table.day_of(slot, time) == (day.start_ns, day.end_ns)
        assert table.period_of(slot, time) == (period.start_ns, period.end_ns)


def test_schema_table_keeps_uids_apart_and_boundaries_still() -> None:
    """A code created again is another slot; new zone data and older versions change nothing."""
    table = SchemaTable()
    schema = MetricSchema(code="m", time_zone="Europe/London", grace_seconds=5)
    record = make_record(7, schema)
    assert table.put(record, 3) == 0
    moved = ZoneTable(name="Europe/London", instants=[], offsets=[3_600])
    table.put(MetricRecord(7, 2, schema, moved), 4)
    assert table.record(0).zone == record.zone
    table.put(MetricRecord(7, 3, schema, record.zone, deleted=True), 5)
    assert (table.slot_of("m"), table.record(0).deleted) == (-1, True)
    assert table.put(MetricRecord(8, 1, MetricSchema(code="m", agg_type=AggType.SUM), UTC), 6) == 1
    assert table.resolve_codes(["m", "x"]).tolist() == [1, -1]
    assert (table.slot_of_uid(7), table.uids.tolist(), table.has_grace) == (0, [7, 8], True)
    with pytest.raises(RemoteProtocolError):
        table.put(MetricRecord(8, 2, MetricSchema(code="m"), UTC), 7)


def test_int128_round_trips() -> None:
    """All forms of the extremes."""
    for n in (0, 1, -1, 2**63, -(2**63), 2**64, int128.MAX, int128.MIN):
        assert int128.from_bytes(int128.to_bytes(n)) == n
        assert int128.from_words(*int128.to_words(n)) == n
    with pytest.raises(ValueError, match="16"):
        int128.from_bytes(b"1")
    with pytest.raises(OverflowError):
        int128.to_bytes(2**127)


def test_sums_are_exact_beyond_64_bits() -> None:
    """Carry and borrow across the words, both signs."""
    schema = MetricSchema(code="m", agg_type=AggType.SUM)
    values = [BIG, BIG, BIG, -1, -(2**63), -(2**63), -(2**63), -(2**63), 5, -7]
    total = 0
    fold = Fold(0)
    fold.put_schema(make_record(1, schema), 0)
    for i, value in enumerate(values):
        total += value
        data, columns = place(build_payload([event(1, value=value)]))
        fold.apply(data, columns, None, 1 + i, BASE)
        assert fold.period_stats(1, 0, BASE)[0].sum == int128.to_bytes(total)  # type: ignore[union-attr]


def test_driver_moves_the_applied_offset_over_control_records() -> None:
    """Offsets only rise."""
    fold = fold_of(MetricSchema(code="m"), [event(1)])
    fold.advance(9)
    assert fold.applied == 9
    with pytest.raises(AssertionError):
        fold.advance(8)


def members_hashed_to_shard(seed: int, n: int, *, cell: int = 0) -> list[int]:
    """Values of a COUNT_UNIQUE metric that all fall into shard 0 of the members' index."""
    return _search(lambda i: member_hash(cell, i, 0, np.uint64(seed)), n)


def accounts_hashed_to_shard(seed: int, n: int, start: int, combo: int) -> list[int]:
    """Accounts of which the cells of slot 0 that start then fall into shard 0 of the cells' index."""
    key = (combo << 32) - 2**64 if combo >= 2**31 else combo << 32
    return _search(lambda i: cell_hash(i, start, key, np.uint64(seed)), n)


def values_hashed_to_shard(seed: int, n: int, owner: int = 0) -> list[str]:
    """Values of a dimension that all fall into shard 0 of the values' index."""

    def hash_of(i: int) -> Any:
        text = f"v{i}".encode()
        return value_hash(np.frombuffer(text, dtype=np.uint8), 0, len(text), owner, np.uint64(seed))

    return [f"v{i}" for i in _search(hash_of, n)]


def _search(hash_of: Any, n: int) -> list[int]:
    found: list[int] = []
    i = 0
    while len(found) < n:
        i += 1
        if int(hash_of(i)) >> 58 == 0:
            found.append(i)
    return found


def check_shard(index: Any, least: int) -> None:
    """Shard 0 holds at least so many entries, and no shard is more than half full."""
    assert index.shards[0, COUNT] >= least
    assert (2 * index.shards[:SHARDS, COUNT] <= index.shards[:SHARDS, CAPACITY]).all()
    assert index.shards[SHARDS, FULL] == 0


RESTORE_SEEDS = (0, 2**63 + 5)


@pytest.mark.parametrize("seed", RESTORE_SEEDS)
@pytest.mark.parametrize("reserved", [True, False])
def test_values_of_one_shard_are_restored(seed: int, reserved: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """300 values in one shard of their index: folded, restored by the same seed and by another, and folded on."""
    if not reserved:
        monkeypatch.setattr(Arena, "_reserve", lambda self, rows: False)
    values = values_hashed_to_shard(seed, 300)
    schema = MetricSchema(code="m", agg_type=AggType.COUNT, filters=[DimensionFilter(key="k")])
    log: list[tuple[Any, ...]] = [
        ("schema", 0, make_record(1, schema)),
        ("batch", 1, [event(1, time=BASE, properties={"k": v}) for v in values], None, BASE),
    ]
    fold = run(Fold(0, hash_seed=seed), log)
    check_shard(fold.dimensions._value_index, 300)
    for other in (seed, 77):
        restored = Fold.restore(0, fold.snapshot(), hash_seed=other)
        assert restored.digest() == fold.digest()
        again = [event(1, time=BASE, properties={"k": v}) for v in [*values, "new"]]
        run(restored, [("batch", 301, again, None, BASE)])
        rows = restored.day_rows(1, 0, *restored.schemas.day_of(0, BASE), group_by=[0]).rows
        counts = {row.group[0].value: row.stats.count for row in rows}
        assert counts == {**dict.fromkeys(values, 2), "new": 1}
        if other == seed:
            check_shard(restored.dimensions._value_index, 300)


@pytest.mark.parametrize("seed", RESTORE_SEEDS)
def test_combinations_of_one_shard_are_restored(seed: int) -> None:
    """Combinations are numbered by their codes: 300 in one shard of their index, made by choosing values."""
    codes = np.zeros(WIDTH, dtype=np.int64)
    values: list[int] = []
    # The value interned as number v has the code VALUES + v, and only some of the combinations matter.
    for value in range(40_000):
        codes[0] = VALUES + value
        if int(combo_hash(np.int64(0), codes, np.uint64(seed))) >> 58 == 0:
            values.append(value)
        if len(values) == 300:
            break
    assert len(values) == 300
    names = [str(i) for i in range(values[-1] + 1)]
    schema = MetricSchema(code="m", filters=[DimensionFilter(key="k")])
    fold = run(Fold(0, hash_seed=seed), [("schema", 0, make_record(1, schema))])
    # Numbers without combinations.
    dimensions = fold.dimensions
    for name in names:
        data = np.frombuffer(name.encode(), dtype=np.uint8)
        dimensions.ensure(0, 1, len(data))
        intern_value(dimensions.arrays, data, 0, len(data), 0, 0)
    events = [event(1, time=BASE, properties={"k": names[v]}) for v in values]
    run(fold, [("batch", 1, events, None, BASE)])
    check_shard(dimensions._combo_index, 300)
    restored = Fold.restore(0, fold.snapshot(), hash_seed=seed)
    check_shard(restored.dimensions._combo_index, 300)
    run(restored, [("batch", 301, events, None, BASE)])
    assert restored.dimensions.combo_count == fold.dimensions.combo_count == 301
    rows = restored.day_rows(1, 0, *restored.schemas.day_of(0, BASE), group_by=[0]).rows
    assert [row.stats.count for row in rows] == [2] * 300


@pytest.mark.parametrize("seed", RESTORE_SEEDS)
@pytest.mark.parametrize("reserved", [True, False])
def test_unique_values_of_one_shard_are_restored(
    seed: int, reserved: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """300 members of one set in one shard of their index."""
    if not reserved:
        monkeypatch.setattr(Arena, "_reserve", lambda self, rows: False)
    members = members_hashed_to_shard(seed, 300)
    schema = MetricSchema(code="m", agg_type=AggType.COUNT_UNIQUE)
    log: list[tuple[Any, ...]] = [
        ("schema", 0, make_record(1, schema)),
        ("batch", 1, [event(1, value=v, time=BASE) for v in members], None, BASE),
    ]
    fold = run(Fold(0, hash_seed=seed), log)
    check_shard(fold._member_index, 300)
    for other in (seed, 77):
        restored = Fold.restore(0, fold.snapshot(), hash_seed=other)
        assert restored.digest() == fold.digest()
        run(restored, [("batch", 301, [event(1, value=v, time=BASE) for v in members], None, BASE)])
        assert restored.period_stats(1, 0, BASE)[0].unique == 300  # type: ignore[union-attr]
        if other == seed:
            check_shard(restored._member_index, 300)


@pytest.mark.parametrize("seed", RESTORE_SEEDS)
@pytest.mark.parametrize("reserved", [True, False])
@pytest.mark.parametrize("kind", ["period", "day", "head"])
def test_accounts_of_one_shard_are_restored(
    seed: int, reserved: bool, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """300 accounts of which the period's cells, the day's, or the days' heads lie in one shard of the index."""
    if not reserved:
        monkeypatch.setattr(Arena, "_reserve", lambda self, rows: False)
    schema = MetricSchema(
        code="m", agg_type=AggType.COUNT, filters=[DimensionFilter(key="k")], period_type=PeriodType.CALENDAR
    )
    probe = Fold(0)
    probe.put_schema(make_record(1, schema), 0)
    start = (probe.schemas.period_of if kind == "period" else probe.schemas.day_of)(0, BASE)[0]
    combo = {"period": PERIOD, "day": 1, "head": HEAD_KEY}[kind]
    accounts = accounts_hashed_to_shard(seed, 300, start, combo)
    events = [event(a, time=BASE, properties={"k": "v"}) for a in accounts]
    log: list[tuple[Any, ...]] = [("schema", 0, make_record(1, schema)), ("batch", 1, events, None, BASE)]
    fold = run(Fold(0, hash_seed=seed), log)
    check_shard(fold._cell_index, 300)
    for other in (seed, 77):
        restored = Fold.restore(0, fold.snapshot(), hash_seed=other)
        assert restored.digest() == fold.digest()
        run(restored, [("batch", 301, events, None, BASE)])
        assert restored.cell_count == fold.cell_count
        for account in accounts:
            assert restored.period_stats(account, 0, BASE)[0].count == 2  # type: ignore[union-attr]
            rows = restored.day_rows(account, 0, *restored.schemas.day_of(0, BASE)).rows
            assert [row.stats.count for row in rows] == [2]
        if other == seed:
            check_shard(restored._cell_index, 300)


def test_an_event_of_eight_new_values_always_finds_room_in_one_shard() -> None:
    """Each event adds as many values as one can, all to the same shard; nothing of it overflows."""
    owners = [values_hashed_to_shard(3, 60, owner) for owner in range(WIDTH)]
    schema = MetricSchema(code="m", filters=[DimensionFilter(key=f"k{d}") for d in range(WIDTH)])
    events = [
        event(1, time=BASE, properties={f"k{d}": owners[d][i] for d in range(WIDTH)}) for i in range(60)
    ]
    log: list[tuple[Any, ...]] = [("schema", 0, make_record(1, schema)), ("batch", 1, events, None, BASE)]
    fold = run(Fold(0, hash_seed=3), log)
    check_shard(fold.dimensions._value_index, 60 * WIDTH)
    one_by_one = run(Fold(0, hash_seed=3), [log[0]])
    for i, single in enumerate(events):
        run(one_by_one, [("batch", 1 + i, [single], None, BASE)])
        check_shard(one_by_one.dimensions._value_index, (i + 1) * WIDTH)
    restored = Fold.restore(0, fold.snapshot(), hash_seed=3)
    check_shard(restored.dimensions._value_index, 60 * WIDTH)
    assert restored.digest() == fold.digest() == one_by_one.digest()


def test_declared_values_of_one_shard_are_taken_in() -> None:
    """A schema's own values, put one after the other, grow their shard as well."""
    values = values_hashed_to_shard(0, 100)
    schema = MetricSchema(code="m", filters=[DimensionFilter(key="k", values=values)])
    fold = fold_of(schema, [event(1, time=BASE, properties={"k": v}) for v in values])
    check_shard(fold.dimensions._value_index, 100)
    restored = Fold.restore(0, fold.snapshot())
    assert restored.digest() == fold.digest()


def test_shards_depend_on_the_seed() -> None:
    """What was chosen to share a shard under one seed is spread evenly under another, for every kind of key."""
    values = values_hashed_to_shard(1, 300)
    schema = MetricSchema(code="m", agg_type=AggType.COUNT, filters=[DimensionFilter(key="k")])
    fold = run(
        Fold(0, hash_seed=2),
        [
            ("schema", 0, make_record(1, schema)),
            (
                "batch",
                1,
                [event(i, time=BASE, properties={"k": v}) for i, v in enumerate(values)],
                None,
                BASE,
            ),
        ],
    )
    assert fold.dimensions._value_index.shards[:SHARDS, COUNT].max() < 25
    members = members_hashed_to_shard(1, 300)
    unique = MetricSchema(code="m", agg_type=AggType.COUNT_UNIQUE)
    log: list[tuple[Any, ...]] = [
        ("schema", 0, make_record(1, unique)),
        ("batch", 1, [event(1, value=v, time=BASE) for v in members], None, BASE),
    ]
    assert run(Fold(0, hash_seed=2), log)._member_index.shards[:SHARDS, COUNT].max() < 25


@pytest.mark.parametrize("error", [AssertionError(), KeyError("x"), OverflowError("y"), ZeroDivisionError()])
def test_a_checkpoint_that_cannot_be_restored_only_costs_time(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever goes wrong while a checkpoint is taken in: the log is folded again, with a report."""
    driver = Driver()
    driver.schema(0, metric(5, code="m"), BASE)
    driver.append(0, [event(1), event(2)], [(7, 0, BASE, 2, 1)], BASE)
    driver.sync()
    driver.checkpoint(0)
    before = driver.partitions[0].digest()

    def fail(*args: Any, **kwargs: Any) -> Fold:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(Fold, "restore", fail)
        driver.crash()
    assert driver.partitions[0].error is None
    assert driver.partitions[0].digest() == before
    assert driver.manifests == {}
    assert len(driver.reports) == 1
    assert type(error).__name__ in driver.reports[0]
    driver.checkpoint(0)
    driver.crash()
    assert (driver.reports, driver.partitions[0].digest()) == ([], before)


def test_a_checkpoint_is_kept_when_something_else_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk, the memory or the log: that says nothing about the checkpoint."""
    driver = Driver()
    driver.schema(0, metric(5, code="m"), BASE)
    driver.append(0, [event(1), event(2)], [(7, 0, BASE, 2, 1)], BASE)
    driver.sync()
    driver.checkpoint(0)
    for error in (MemoryError(), DiskError("read", "state", 5), DamagedError("x", partition=0)):

        def fail(*args: Any, error: Exception = error, **kwargs: Any) -> Fold:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(Fold, "restore", fail)
            if isinstance(error, DamagedError):
                driver.crash()
                assert driver.partitions[0].error is not None
                continue
            with pytest.raises(type(error)):
                driver.crash()
    assert checkpoint.load_manifest(driver.checkpoints(0)) is not None


def test_partitions_key_their_tables_by_their_salt() -> None:
    """New, and restored from a checkpoint, as its values and accounts come from callers."""
    driver = Driver()
    driver.schema(0, metric(5, code="m", filters=[DimensionFilter(key="k")]), BASE)
    values = values_hashed_to_shard(0, 200)
    events = [event(1, properties={"k": value}) for value in values]
    driver.append(0, events, [(7, 0, BASE, len(events), 1)], BASE)
    driver.sync()
    driver.checkpoint(0)
    before = driver.partitions[0].digest()
    for _ in range(2):
        counts = driver.partitions[0].fold.dimensions._value_index.shards[:SHARDS, COUNT]
        assert (counts.sum(), counts.max() < 20) == (200, True)
        driver.crash()
        assert (driver.reports, list(driver.manifests)) == ([], [0])
        assert driver.partitions[0].digest() == before
