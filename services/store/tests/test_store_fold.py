"""The fold against its reference: random logs of every kind of metric, in random batches."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from tallymark_protocol.identifiers import encode_text
from tallymark_protocol.model import (
    AggType,
    AlertThreshold,
    DimensionFilter,
    MetricSchema,
    OperationType,
    PeriodType,
    UniqueType,
)
from tallymark_protocol.periods import day_starts
from tallymark_protocol.schema import MetricRecord, make_record, update_record
from tallymark_store.fold import Fold

from .fold_reference import FoldReference, check_alerts
from .payload_builder import Event, build_payload, event, place

DAY = 86_400 * 10**9
BASE = 19_800 * DAY  # 2024-03-18: near a change of DST in New York and London
BIG = 2**63 - 1
ACCOUNTS = (0, 1, 7, 2**63, 2**64 - 1)

SCHEMAS = [
    MetricSchema(code="count", thresholds=[AlertThreshold(code="a", value=3), AlertThreshold(code="b", value=5, recurring=True)]),
    MetricSchema(
        code="sum",
        agg_type=AggType.SUM,
        period_type=PeriodType.CALENDAR,
        billing_cycle_day=19,
        time_zone="America/New_York",
        filters=[DimensionFilter(key="provider", values=["aws", "gcp"]), DimensionFilter(key="region")],
        thresholds=[
            AlertThreshold(code="once", value=10),
            AlertThreshold(code="again", value=7, recurring=True),
            AlertThreshold(code="huge", value=2**62, recurring=True),
        ],
    ),
    MetricSchema(
        code="max",
        agg_type=AggType.MAX,
        period_type=PeriodType.DAY,
        time_zone="Asia/Kathmandu",
        filters=[DimensionFilter(key="region")],
        thresholds=[AlertThreshold(code="m", value=6, recurring=True)],
    ),
    MetricSchema(
        code="latest",
        agg_type=AggType.LATEST,
        period_type=PeriodType.YEAR,
        thresholds=[AlertThreshold(code="l", value=5), AlertThreshold(code="r", value=2, recurring=True)],
    ),
    MetricSchema(
        code="users",
        agg_type=AggType.COUNT_UNIQUE,
        period_type=PeriodType.CALENDAR,
        thresholds=[AlertThreshold(code="u", value=2, recurring=True)],
    ),
    MetricSchema(
        code="signed", agg_type=AggType.COUNT_UNIQUE, unique_type=UniqueType.INT64, period_type=PeriodType.LIFETIME
    ),
    MetricSchema(
        code="names",
        agg_type=AggType.COUNT_UNIQUE,
        unique_type=UniqueType.STRING,
        period_type=PeriodType.DAY,
        time_zone="Europe/London",
        filters=[DimensionFilter(key="region")],
    ),
    MetricSchema(code="plain", agg_type=AggType.SUM, period_type=PeriodType.DAY),
]  # fmt: skip
UPDATED_SUM = MetricSchema(
    code="sum",
    agg_type=AggType.SUM,
    period_type=PeriodType.CALENDAR,
    billing_cycle_day=19,
    time_zone="America/New_York",
    filters=[DimensionFilter(key="provider", values=["aws", "gcp", "ibm"]), DimensionFilter(key="region")],
    thresholds=[*SCHEMAS[1].thresholds, AlertThreshold(code="late", value=4, recurring=True)],
)


def random_event(rng: random.Random) -> Event:
    """An event as the judge would accept it."""
    metric = rng.choice(SCHEMAS)
    fields: dict[str, Any] = {}
    if rng.random() < 0.8:
        fields["time"] = (
            BASE + rng.choice([0, 1, DAY // 4, -(DAY // 24), 10 * DAY]) + rng.randrange(-3, 60) * DAY // 3
        )
    if rng.random() < 0.7:
        keys = {
            "provider": ["aws", "gcp", "ibm", ""],
            "region": ["eu", "us", "", "x" * 30],
            "other": ["y", "z"],
        }
        fields["properties"] = {k: rng.choice(v) for k, v in keys.items() if rng.random() < 0.6}
    if metric.agg_type == AggType.COUNT_UNIQUE:
        fields["operation"] = rng.choice(list(OperationType))
        if metric.unique_type == UniqueType.STRING:
            fields["text"] = encode_text(rng.choice(["", "ann", "bob", "é" * 200]))
        elif metric.unique_type == UniqueType.INT64:
            fields["value"] = rng.choice([0, -1, 5, -(2**63)])
        elif rng.random() < 0.3:
            fields["text"] = b"\x02" + (2**63 + rng.randrange(2)).to_bytes(8, "little")
        else:
            fields["value"] = rng.choice([0, 1, 2, BIG])
    else:
        fields["value"] = (
            rng.choice([1, 2, 3, -1, -4, 0, 9]) if rng.random() < 0.9 else rng.choice([BIG, -BIG - 1])
        )
    return event(rng.choice(ACCOUNTS), metric.code, **fields)


def random_log(seed: int, count: int) -> list[tuple[Any, ...]]:
    """Control and event records: ("schema", offset, record) and ("batch", offset, events, verdicts, append_ns)."""
    rng = random.Random(seed)
    log: list[tuple[Any, ...]] = []
    offset = 0
    records = {}
    for uid, schema in enumerate(SCHEMAS, 10):
        records[schema.code] = make_record(uid, schema)
        log.append(("schema", offset, records[schema.code]))
        offset += 1
    done = 0
    updated = False
    append_ns = BASE + 3 * DAY
    while done < count:
        events = [random_event(rng) for _ in range(rng.randrange(1, 90))]
        verdicts = [rng.choice([0, 0, 0, 1, 20]) for _ in events] if rng.random() < 0.5 else None
        append_ns += rng.randrange(DAY // 4)
        log.append(("batch", offset, events, verdicts, append_ns))
        offset += len(events)
        done += len(events)
        if not updated and done > count // 2:
            updated = True
            log.append(("schema", offset, update_record(records["sum"], UPDATED_SUM)))
            offset += 1
            plain = records["plain"]
            log.append(("schema", offset, MetricRecord(plain.uid, 2, plain.schema, plain.zone, deleted=True)))
            log.append(("schema", offset + 1, make_record(99, SCHEMAS[-1])))
            offset += 2
    return log


def split(log: list[tuple[Any, ...]], rng: random.Random) -> list[tuple[Any, ...]]:
    """The same log in other batches: each cut at random (append times stay)."""
    out: list[tuple[Any, ...]] = []
    for entry in log:
        if entry[0] == "schema":
            out.append(entry)
            continue
        _, offset, events, verdicts, append_ns = entry
        at = 0
        while at < len(events):
            stop = min(len(events), at + rng.choice([1, 3, 64, 65]))
            marks = None if verdicts is None else verdicts[at:stop]
            out.append(("batch", offset + at, events[at:stop], marks, append_ns))
            at = stop
    return out


def run(fold: Fold, log: list[tuple[Any, ...]], *, plain: bool = False) -> Fold:
    """Apply a log."""
    for entry in log:
        if entry[0] == "schema":
            fold.put_schema(entry[2], entry[1])
            continue
        _, offset, events, verdicts, append_ns = entry
        data, columns = place(build_payload(events, plain=plain))
        marks = None if verdicts is None else np.array(verdicts, dtype=np.uint8)
        fold.apply(data, columns, marks, offset, append_ns)
    return fold


def recount(log: list[tuple[Any, ...]]) -> FoldReference:
    """The reference of a log."""
    reference = FoldReference()
    for entry in log:
        if entry[0] == "schema":
            reference.put_schema(entry[2], entry[1])
        else:
            reference.apply(entry[2], entry[3], entry[1], entry[4])
    return reference


def rows_of(
    fold: Fold, account: int, slot: int, first: int, end: int, **kwargs: Any
) -> tuple[dict[Any, Any], list[int]]:
    """Day rows in the reference's form."""
    result = fold.day_rows(account, slot, first, end, **kwargs)
    found = {(row.day_start_ns, *((g.kind, g.value) for g in row.group)): row.stats for row in result.rows}
    assert len(found) == len(result.rows)
    return found, result.overflowed


@pytest.mark.parametrize("seed", range(4))
def test_random_logs_give_the_reference_totals(seed: int) -> None:
    """Period totals, alert records and merged day cells equal a plain recount."""
    log = random_log(seed, 900)
    fold, reference = run(Fold(3), log), recount(log)
    assert fold.applied == log[-1][1] + (len(log[-1][2]) if log[-1][0] == "batch" else 1)
    for uid in [*range(10, 10 + len(SCHEMAS)), 99]:
        slot = fold.schemas.slot_of_uid(uid)
        for account in ACCOUNTS:
            for time in {e.time for e in reference.events if e.account == account}:
                assert fold.period_stats(account, slot, time) == reference.period_stats(account, uid, time)
    assert len(reference.alerts) > 20
    check_alerts(fold.alerts(0), reference, 3)


@pytest.mark.parametrize("seed", range(3))
def test_day_rows_filter_and_group_as_the_reference(seed: int) -> None:
    """Any filter and grouping over a range of days equals the reference, and a breakdown adds up to the total."""
    log = random_log(100 + seed, 700)
    fold, reference = run(Fold(0), log), recount(log)
    cases: list[tuple[str, list[tuple[str, list[str]]], list[int]]] = [
        ("sum", [], []),
        ("sum", [], [0]),
        ("sum", [], [1, 0]),
        ("sum", [("provider", ["aws"])], [1]),
        ("sum", [("provider", ["ibm"])], []),
        ("sum", [("region", ["eu", ""]), ("provider", ["aws", "gcp"])], [0, 1]),
        ("sum", [("region", ["nowhere"])], []),
        ("sum", [("region", [])], []),
        ("max", [("region", ["us"])], [0]),
        ("count", [], []),
        ("latest", [], []),
    ]
    for code, filters, group_by in cases:
        slot = fold.schemas.slot_of(code)
        uid = fold.schemas.record(slot).uid
        starts = [
            d for d in day_starts(fold.schemas.record(slot).zone, BASE + 40 * DAY) if d > BASE - 5 * DAY
        ]
        selection = fold.select(slot, filters)
        for account in ACCOUNTS:
            for first, end in [(starts[0], starts[-1]), (starts[6], starts[9]), (starts[5], starts[5])]:
                for per_day in (False, True):
                    got = rows_of(
                        fold,
                        account,
                        slot,
                        first,
                        end,
                        selection=selection,
                        group_by=group_by,
                        per_day=per_day,
                    )
                    want = reference.day_rows(account, uid, first, end, filters, group_by, per_day=per_day)
                    assert got == want, (code, filters, group_by)


@pytest.mark.parametrize("seed", range(3))
def test_state_does_not_depend_on_batching_encoding_or_hash_seed(seed: int) -> None:
    """FOLD-1: however the log is cut, encoded and hashed, the digest and every answer are the same."""
    log = random_log(200 + seed, 500)
    first = run(Fold(1), log)
    for hash_seed in (0, 1, 2**63):
        other = run(
            Fold(1, hash_seed=hash_seed), split(log, random.Random(seed + hash_seed)), plain=hash_seed == 1
        )
        assert other.digest() == first.digest()
        assert other.alerts(0) == first.alerts(0)
        assert (other.cell_count, other.member_count) == (first.cell_count, first.member_count)


@pytest.mark.parametrize("seed", range(3))
def test_restored_snapshot_goes_on_as_if_nothing_had_happened(seed: int) -> None:
    """A snapshot taken midway, restored and caught up, is the state that never stopped; it is a copy."""
    log = random_log(300 + seed, 500)
    middle = random.Random(seed).randrange(len(SCHEMAS), len(log))
    fold = run(Fold(5), log[:middle])
    parts = fold.snapshot()
    digest = fold.digest()
    run(fold, log[middle:])
    restored = Fold.restore(5, parts, hash_seed=17)
    assert restored.digest() == digest
    assert restored.applied == log[middle - 1][1] + (
        len(log[middle - 1][2]) if log[middle - 1][0] == "batch" else 1
    )
    run(restored, log[middle:])
    assert restored.digest() == fold.digest() != digest
    assert restored.alerts(0) == fold.alerts(0)
    slot = fold.schemas.slot_of("sum")
    for account in ACCOUNTS:
        assert restored.period_stats(account, slot, BASE) == fold.period_stats(account, slot, BASE)
        a, b = (
            f.day_rows(account, slot, *f.schemas.day_of(slot, BASE), group_by=[0, 1])
            for f in (fold, restored)
        )
        assert a == b


def test_arrival_order_changes_no_count_sum_or_max() -> None:
    """FOLD-2: the same events in another order give the same count, sum, min and max, and LATEST by event time."""
    events = [
        event(1, code, value=v, time=BASE + 1000 * v)
        for code in ("plain", "latest", "max")
        for v in (5, -3, 8, 0)
    ]
    folds = []
    for seed in range(3):
        shuffled = events[:]
        random.Random(seed).shuffle(shuffled)
        log = [("schema", i, make_record(i + 1, s)) for i, s in enumerate(SCHEMAS)]
        folds.append(run(Fold(0), [*log, ("batch", 20, shuffled, None, BASE)]))
    for code in ("plain", "latest", "max"):
        slot = folds[0].schemas.slot_of(code)
        stats = [f.period_stats(1, slot, BASE)[0] for f in folds]
        assert len({(s.count, s.sum, s.min, s.max, s.last_value, s.last_event_at) for s in stats if s}) == 1


@pytest.mark.parametrize("seed", range(2))
def test_top_accounts_equal_a_ranking_of_the_reference(seed: int) -> None:
    """Rankings by period and by days list the best first, ties by account id."""
    log = random_log(400 + seed, 600)
    fold, reference = run(Fold(0), log), recount(log)
    for code in ("count", "sum", "max", "latest", "users"):
        slot = fold.schemas.slot_of(code)
        uid = fold.schemas.record(slot).uid
        agg = fold.schemas.record(slot).schema.agg_type

        def value(stats: Any, agg: AggType = agg) -> int:
            total = int.from_bytes(stats.sum, "little", signed=True)
            return {0: stats.count, 1: total, 2: stats.max, 3: stats.last_value, 4: stats.unique}[int(agg)]

        _, start, _ = reference.period_stats(0, uid, BASE)
        totals = [(a, reference.period_stats(a, uid, BASE)[0]) for a in ACCOUNTS]
        want = sorted(((a, s) for a, s in totals if s), key=lambda p: (-value(p[1]), p[0]))
        assert fold.top_period(slot, start, 3).accounts == want[:3]
        if agg == AggType.COUNT_UNIQUE:
            continue
        first, _ = fold.schemas.day_of(slot, BASE)
        end = fold.schemas.day_of(slot, BASE + 4 * DAY)[0]
        filters = [("region", ["eu", "us"])] if code in {"sum", "max"} else []
        days = [(a, reference.day_rows(a, uid, first, end, filters, [], per_day=False)[0]) for a in ACCOUNTS]
        want = sorted(((a, d[0,]) for a, d in days if d), key=lambda p: (-value(p[1]), p[0]))
        assert fold.top_days(slot, first, end, fold.select(slot, filters), 4).accounts == want[:4]
