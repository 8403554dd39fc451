"""ALERT-1 at the fold and in the log: each crossing has exactly one record, at the very event that caused it.

Any history of thresholds and events, cut into any batches, with restarts anywhere, against a model that adds
everything up anew after each event.
"""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tallymark_protocol import limits
from tallymark_protocol.model import (
    AggType,
    AlertThreshold,
    MetricSchema,
    OperationType,
    PeriodType,
)
from tallymark_protocol.schema import MetricRecord, make_record, update_record
from tallymark_store.fold import Fold

from .fold_reference import FoldReference, check_alerts
from .payload_builder import event
from .store_driver import Driver
from .test_store_fold import BASE, BIG, DAY, recount, run, split

MINUTE = 60 * 10**9
MONTH = 31 * DAY
ALERTS_MAX = 100_000  # more than any history here can have

thresholds = st.builds(
    AlertThreshold,
    code=st.just(""),  # given by its position
    value=st.one_of(st.integers(1, 12), st.sampled_from([2**31, 2**62, BIG])),
    recurring=st.booleans(),
)


class Metric(NamedTuple):
    """What a metric is made of."""

    agg: AggType
    period: PeriodType
    zone: str
    thresholds: list[AlertThreshold]


metrics = st.builds(
    Metric,
    agg=st.sampled_from(list(AggType)),
    period=st.sampled_from(list(PeriodType)),
    zone=st.sampled_from(["UTC", "America/New_York", "Asia/Kathmandu"]),
    thresholds=st.lists(thresholds, max_size=limits.THRESHOLDS_MAX),
)
# Of an event: metric, account, value, periods back (None: at append time), operation, verdict.
events = st.tuples(
    st.integers(0, 2),
    st.sampled_from([1, 2, 2**64 - 1]),
    st.one_of(st.integers(-9, 12), st.sampled_from([2**62, BIG, -BIG - 1, 0])),
    st.sampled_from([None, None, 0, 0, 1, 13]),
    st.sampled_from(list(OperationType)),
    st.sampled_from([0, 0, 0, 0, 1]),
)
steps = st.one_of(
    st.tuples(st.just("events"), st.lists(events, min_size=1, max_size=12)),
    st.tuples(st.just("events"), st.lists(events, min_size=1, max_size=12)),
    st.tuples(st.just("add"), st.integers(0, 2), st.lists(thresholds, min_size=1, max_size=3)),
    st.tuples(st.just("anew"), st.integers(0, 2)),
)


def coded(found: list[AlertThreshold]) -> list[AlertThreshold]:
    """Thresholds with codes that tell them apart."""
    return [msgspec.structs.replace(t, code=f"t{i}") for i, t in enumerate(found)]


def history(chosen: list[Metric], drawn: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """The log of some metrics and steps, in the form of `test_store_fold.random_log`."""
    records: list[MetricRecord] = []
    log: list[tuple[Any, ...]] = []
    offset = 0
    append_ns = BASE + 40 * DAY

    def put(record: MetricRecord) -> None:
        nonlocal offset
        log.append(("schema", offset, record))
        offset += 1

    for number, metric in enumerate(chosen):
        schema = MetricSchema(
            code=f"m{number}", agg_type=metric.agg, period_type=metric.period, time_zone=metric.zone,
            thresholds=coded(metric.thresholds),
        )  # fmt: skip
        records.append(make_record(100 + number, schema))
        put(records[-1])
    for kind, *rest in drawn:
        append_ns += MINUTE
        if kind == "events":
            batch, verdicts = [], []
            for number, account, value, back, operation, verdict in rest[0]:
                metric = chosen[number % len(chosen)]
                fields: dict[str, Any] = {"value": value}
                if metric.agg == AggType.COUNT_UNIQUE:
                    fields = {"value": abs(value) % 2**62, "operation": operation}
                if back is not None:
                    fields["time"] = append_ns - back * MONTH - abs(value) % 7
                batch.append(event(account, f"m{number % len(chosen)}", **fields))
                verdicts.append(verdict)
            log.append(("batch", offset, batch, verdicts if any(verdicts) else None, append_ns))
            offset += len(batch)
        elif kind == "add":
            number = rest[0] % len(chosen)
            schema = records[number].schema
            more = coded([*schema.thresholds, *rest[1]])[: limits.THRESHOLDS_MAX]
            if len(more) > len(schema.thresholds):
                changed = msgspec.structs.replace(schema, thresholds=more)
                records[number] = update_record(records[number], changed)
                put(records[number])
        else:
            number = rest[0] % len(chosen)
            old = records[number]
            put(MetricRecord(old.uid, old.version + 1, old.schema, old.zone, deleted=True))
            records[number] = make_record(old.uid + 10, old.schema)
            put(records[number])
    return log


def run_with_restarts(log: list[tuple[Any, ...]], rng: random.Random) -> Fold:
    """Apply a log in other batches, and go on from a snapshot now and then."""
    fold = Fold(3)
    for entry in split(log, rng):
        run(fold, [entry])
        if rng.random() < 0.3:
            fold = Fold.restore(3, fold.snapshot(), hash_seed=rng.getrandbits(64))
    return fold


def check_history(log: list[tuple[Any, ...]], seed: int = 0) -> FoldReference:
    """Compare all records of a log with the reference's, however it is cut."""
    reference = recount(log)
    fold = run(Fold(3), log)
    check_alerts(fold.alerts(0, limit=ALERTS_MAX), reference, 3)
    other = run_with_restarts(log, random.Random(seed))
    assert other.alerts(0, limit=ALERTS_MAX) == fold.alerts(0, limit=ALERTS_MAX)
    assert other.digest() == fold.digest()
    return reference


RISING = Metric(AggType.SUM, PeriodType.LIFETIME, "UTC", [])


@settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    st.lists(metrics, min_size=1, max_size=3), st.lists(steps, min_size=1, max_size=14), st.integers(0, 2**32)
)
@example(  # one value that passes more multiples than 64 bits count, then falls and rises again
    [RISING._replace(thresholds=[AlertThreshold(code="", value=1, recurring=True)])],
    [("events", [(0, 1, v, None, OperationType.NONE, 0) for v in (BIG, BIG, BIG, -BIG, -BIG, BIG, BIG, 1)])],
    1,
)
def test_any_history_of_thresholds_agrees_with_the_model(
    chosen: list[Metric], drawn: list[tuple[Any, ...]], seed: int
) -> None:
    """ALERT-1: record by record, whatever is counted, added, deleted, refused, cut and restarted."""
    check_history(history(chosen, drawn), seed)


@pytest.mark.parametrize("agg", list(AggType))
@pytest.mark.parametrize("seed", range(2))
def test_long_histories_agree_with_the_model(agg: AggType, seed: int) -> None:
    """Hundreds of crossings of one metric with eight thresholds, in several periods at once."""
    rng = random.Random(1_000 * seed + agg)
    values = [1, 2, 3, 5, 7, 11, 2**40, 4]
    metric = Metric(
        agg, PeriodType.CALENDAR, "UTC",
        [AlertThreshold(code="", value=v, recurring=i % 2 == 0) for i, v in enumerate(values[:5])],
    )  # fmt: skip
    drawn: list[tuple[Any, ...]] = []
    for i in range(40):
        batch = [
            (
                0,
                rng.choice([1, 2, 2**64 - 1]),
                rng.choice([1, 1, 2, 3, -1, -2, 4, 9, 17, -20]),
                rng.choice([None, 0, 0, 1, 2]),
                rng.choice(list(OperationType)),
                rng.choice([0, 0, 0, 0, 0, 1]),
            )
            for _ in range(rng.choice([1, 4, 20, 70]))
        ]
        drawn.append(("events", batch))
        if i in (10, 20):
            drawn.append(
                ("add", 0, [AlertThreshold(code="", value=values[5 + i // 20], recurring=i == 20), *metric.thresholds[:1]])
            )  # fmt: skip
    reference = check_history(history([metric], drawn), seed)
    assert len(reference.alerts) > 20
    assert len({alert["index"] for alert in reference.alerts}) > 4
    assert len({alert["period"] for alert in reference.alerts}) > 2


def test_a_total_that_falls_and_rises_repeats_no_record() -> None:
    """The highest multiple reached never falls within a period; the next period begins anew."""
    metric = Metric(
        AggType.SUM, PeriodType.CALENDAR, "UTC",
        [AlertThreshold(code="", value=10), AlertThreshold(code="", value=10, recurring=True)],
    )  # fmt: skip
    values = [10, -10, 10, -30, 35, 5, -40, 44, 1]
    this = [("events", [(0, 1, v, 0, OperationType.NONE, 0)]) for v in values]
    before = [("events", [(0, 1, v, 1, OperationType.NONE, 0)]) for v in values]
    reference = check_history(history([metric], this))
    assert [(a["index"], a["first"], a["last"]) for a in reference.alerts] == [
        (0, 1, 1),
        (1, 1, 1),
        (1, 2, 2),
    ]
    assert len(check_history(history([metric], [*this, *before])).alerts) == 6


# ---------------------------------------------------------------- through the log, checkpoints and restarts


@pytest.mark.parametrize("seed", range(6))
def test_records_survive_restarts_and_checkpoints(seed: int) -> None:
    """A store that is killed at any time, with checkpoints or without, has the model's records, and no other."""
    rng = random.Random(seed)
    driver = Driver(seed=seed)
    reference = FoldReference()
    records: dict[str, MetricRecord] = {}
    now = BASE

    def declare(record: MetricRecord) -> None:
        reference.put_schema(record, driver.schema(0, record, now))
        records[record.schema.code] = record

    for uid, agg in enumerate(AggType, 5):
        found = [
            AlertThreshold(code=f"t{i}", value=v, recurring=i % 2 == 1) for i, v in enumerate((2, 3, 6, 7))
        ]
        schema = MetricSchema(
            code=agg.name.lower(), agg_type=agg, thresholds=found[: rng.randrange(1, 5)],
            period_type=rng.choice(list(PeriodType)),
        )  # fmt: skip
        declare(make_record(uid, schema))
    for sequence in range(30):
        now += 3 * MINUTE
        batch = []
        for _ in range(rng.randrange(1, 25)):
            code = rng.choice(list(records))
            is_unique = records[code].schema.agg_type == AggType.COUNT_UNIQUE
            batch.append(
                event(
                    rng.choice([1, 2, 3]), code, value=rng.randrange(9) if is_unique else rng.choice([1, 2, 5, -4]),
                    operation=rng.choice(list(OperationType)) if is_unique else 0,
                    time=now - rng.choice([0, 1, DAY, MONTH]) if rng.random() < 0.7 else None,
                )
            )  # fmt: skip
        prepared = driver.append(0, batch, [(9, sequence, now, len(batch), sequence)], now)
        reference.apply(batch, None, prepared.answer.base_offset, prepared.append_ns)
        if rng.random() < 0.2:
            code = rng.choice(list(records))
            found = records[code].schema.thresholds
            more = AlertThreshold(
                code=f"t{len(found)}", value=rng.choice([1, 4]), recurring=rng.random() < 0.5
            )
            if len(found) < limits.THRESHOLDS_MAX:
                changed = msgspec.structs.replace(records[code].schema, thresholds=[*found, more])
                declare(update_record(records[code], changed))
        driver.sync()
        if rng.random() < 0.25:
            driver.checkpoint(0)
            if rng.random() < 0.5:
                driver.wal_start()
        if rng.random() < 0.3:
            driver.crash(lose_all=rng.random() < 0.5)
        check_alerts(driver.partitions[0].fold.alerts(0, limit=ALERTS_MAX), reference, 0)
    assert len(reference.alerts) > 30
    driver.check_digests()
