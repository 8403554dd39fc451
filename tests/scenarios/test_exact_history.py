"""Exact: a real history through the SDK, disordered, repeated, over failing connections, equals an oracle's counts.

Invariants LOG-1, DEDUP-1, FOLD-1, FOLD-2 and READ-1, from the outside: the SDK in front, the oracle behind.
"""

import asyncio
import functools
import random

import msgspec
import pytest
from chaos_proxy import ChaosProxy
from metering import Check, Meter, cut, twice
from oracle import ADD, REMOVE, Calendar, Fact, Oracle, read_history, synthetic_history

from tallymark import (
    AggType,
    AlertThreshold,
    AsyncClient,
    DimensionFilter,
    MetricSchema,
    PeriodType,
    UniqueType,
)
from tallymark_node import dev
from tallymark_node.config import Settings

SECOND = 10**9
AREAS = ["crates", "docs", ".github", "scripts", "test"]
DECLARED = {"area": AREAS, "kind": []}
DIMENSIONS = [DimensionFilter(key="area", values=AREAS), DimensionFilter(key="kind")]
ZONES = ("UTC", "America/New_York", "Asia/Kolkata", "America/Asuncion")

HISTORY_METRICS = [
    MetricSchema(
        code="files_changed",
        agg_type=AggType.COUNT,
        filters=DIMENSIONS,
        period_type=PeriodType.CALENDAR,
        thresholds=[AlertThreshold(code="hundred", value=100), AlertThreshold(code="one", value=1)],
    ),
    MetricSchema(
        code="lines_added",
        agg_type=AggType.SUM,
        filters=DIMENSIONS,
        period_type=PeriodType.CALENDAR,
        billing_cycle_day=15,
        time_zone="America/New_York",
        thresholds=[AlertThreshold(code="busy", value=5_000)],
    ),
    MetricSchema(code="largest_change", agg_type=AggType.MAX, filters=DIMENSIONS, time_zone="Asia/Kolkata"),
    MetricSchema(
        code="last_change",
        agg_type=AggType.LATEST,
        filters=DIMENSIONS,
        period_type=PeriodType.DAY,
        time_zone="America/Asuncion",
    ),
    MetricSchema(
        code="files_touched",
        agg_type=AggType.COUNT_UNIQUE,
        filters=DIMENSIONS,
        period_type=PeriodType.LIFETIME,
    ),
    MetricSchema(
        code="places_grown",
        agg_type=AggType.COUNT_UNIQUE,
        unique_type=UniqueType.STRING,
        filters=DIMENSIONS,
        period_type=PeriodType.YEAR,
        time_zone="America/New_York",
    ),
]


@functools.cache
def history_facts():
    """Every change counted by every metric. Some dimensions are missing, some values aren't declared."""
    facts = []
    for change in read_history():
        base = Fact(
            id=change.event_id,
            metric="",
            account_id=change.account_id,
            time_ns=change.ts * SECOND,
            value=1,
            text=None,
            operation=0,
            area=None if change.area == "(root)" else change.area,
            kind=None if change.kind == "(none)" else change.kind,
        )
        grown = ADD if change.added >= change.deleted else REMOVE
        facts += [
            base._replace(metric="files_changed"),
            base._replace(metric="lines_added", value=change.added),
            base._replace(metric="largest_change", value=change.added + change.deleted),
            base._replace(metric="last_change", value=change.added - change.deleted),
            base._replace(metric="files_touched", text=str(change.path_hash)),
            base._replace(metric="places_grown", text=f"{change.area}/{change.kind}", operation=grown),
        ]
    return facts


class Scene:
    """A server in a folder behind a proxy that loses connections; it can be restarted.

    With `spills` it has no memory for what can also be on disk, and takes checkpoints all the time.
    """

    def __init__(self, folder, seed, partition_count, *, archive="off", spills=False):
        self.proxy = ChaosProxy(seed)
        self._folder = folder
        self._partition_count = partition_count
        self._archive = archive
        self._spills = spills

    def running(self):
        """Start the server on a free port; it tells clients the proxy's address as its own."""
        settings = Settings(
            port=0,
            advertise=self.proxy.address,
            data_dir=str(self._folder),
            partition_count=self._partition_count,
            wal_segment_bytes=4 * 1024 * 1024,
            checkpoint_interval_seconds=0.3 if self._spills else 3600.0,
            memory_bytes=1 if self._spills else -1,
        )
        if self._archive == "on":  # all the time, and nothing is left in the log for long
            settings = msgspec.structs.replace(
                settings,
                archive="on",
                archive_events=500,
                archive_interval_seconds=0.05,
                wal_segment_bytes=128 * 1024,
                checkpoint_interval_seconds=0.2,
            )
        return dev.running(settings)


async def run(scene, schemas, facts, numbers, sizes, rng, *, questions, numeric):
    """Send everything with a checkpoint and restarts in between; compare, restart, compare again."""
    meter = Meter(facts, numeric)
    oracle = Oracle(facts, DECLARED)
    half = len(numbers) * 3 // 5
    sent = twice(numbers[:half], rng, 0.2)
    batches = cut(sent, rng, sizes)
    await scene.proxy.start()
    n_compared = 0
    try:
        async with scene.running() as node:
            scene.proxy.target = node.address
            client = await AsyncClient(scene.proxy.address, timeout=60.0, _rng=rng).connect()
            for schema in schemas:
                await client.metrics.create(schema)
            # A checkpoint while events come in, and everything at rest.
            sending = asyncio.create_task(meter.send(client, batches, rng))
            await meter.wait_sent(len(sent) // 2)
            await node.checkpoint()
            await sending
            meter.check()
            oracle.place(meter.offsets)
            check = Check(client, oracle, schemas, facts, rng)
            await check.random_questions(questions // 4)
            assert check.differences == []
            n_compared += check.n_compared
            scene.proxy.target = ""
        # The same client goes on with the restarted server; what was sent before is sent again among the rest. The
        # server stops again while requests are under way.
        rest = twice(numbers[half:], rng, 0.2) + rng.sample(numbers[:half], half // 20)
        rng.shuffle(rest)
        sending = asyncio.create_task(meter.send(client, cut(rest, rng, sizes), rng))
        async with scene.running() as node:
            scene.proxy.target = node.address
            await meter.wait_sent(len(rest) // 3)
        async with scene.running() as node:
            scene.proxy.target = node.address
            await sending
            await meter.send_what_must_not_count(client, rng)
            meter.check()
            assert all(meter.places[number] is not None for number in numbers)
            oracle.place(meter.offsets)
            check = Check(client, oracle, schemas, facts, rng)
            n_compared += await compare_all(check, meter, questions)
            scene.proxy.target = ""
        async with scene.running() as node:
            scene.proxy.target = node.address
            check = Check(client, oracle, schemas, facts, rng)
            n_compared += await compare_all(check, meter, questions // 2)
            starts = [partition.index.log_start for partition in node._store.driver.partitions.values()]
            await assert_differences_are_noticed(client, meter, oracle, schemas, facts, rng)
            await client.close()
    finally:
        await scene.proxy.close()
        oracle.close()
    return meter, n_compared, starts


async def assert_differences_are_noticed(client, meter, oracle, schemas, facts, rng):
    """Against an oracle that lacks a single event, the answers must differ."""
    offsets = meter.offsets
    lacking = next(n for n, offset in enumerate(offsets) if offset is not None and facts[n].text is None)
    oracle.place([None if number == lacking else offset for number, offset in enumerate(offsets)])
    check = Check(client, oracle, schemas, facts, rng)
    await check.everything()
    assert any(facts[lacking].metric in difference for difference in check.differences)


async def compare_all(check, meter, questions):
    """Ask everything; nothing may differ."""
    await check.everything()
    await check.random_questions(questions)
    await check.realtime(10)
    await check.listings(meter.events, meter.places, 4)
    await check.alerts()
    assert check.differences == []
    assert check.n_events > 0
    return check.n_compared


@pytest.mark.parametrize(
    ("order", "sizes", "partition_count", "archive", "spills"),
    [
        ("shuffled", "large", 4, "off", False),
        ("backwards", "mixed", 1, "off", False),
        ("blocks", "small", 7, "off", False),
        ("blocks", "mixed", 3, "on", False),
        ("blocks", "large", 2, "off", True),
        ("shuffled", "large", 2, "on", True),
    ],
)
async def test_history_is_counted_exactly(tmp_path, order, sizes, partition_count, archive, spills):
    """Every answer over the history equals the oracle's, in every order and batching, with repeats and cuts."""
    rng = random.Random(f"{order} {sizes}")
    facts = history_facts()
    numbers = list(range(len(facts)))
    if order == "shuffled":
        rng.shuffle(numbers)
    elif order == "backwards":
        numbers.sort(key=lambda number: -facts[number].time_ns + rng.randrange(-(10**14), 10**14))
    else:
        # Small batches take longest: every other block is enough.
        blocks = [numbers[at : at + 3_000] for at in range(0, len(numbers), 6_000)]
        rng.shuffle(blocks)
        numbers = [number for block in blocks for number in block]
    scene = Scene(tmp_path, partition_count, partition_count, archive=archive, spills=spills)
    meter, n_compared, log_starts = await run(
        scene, HISTORY_METRICS, facts, numbers, sizes, rng, questions=40, numeric=frozenset({"files_touched"})
    )
    assert meter.n_duplicates >= len(numbers) // 5
    assert scene.proxy.n_cuts >= 10
    assert meter.n_retried > 0
    assert n_compared > 400
    assert (min(log_starts) > 0) == (archive == "on")


def zone_metrics():
    """A metric of every period type in every zone; every kind of aggregation with every period type or zone."""
    kinds = list(AggType)
    metrics = []
    for z, zone in enumerate(ZONES):
        for p, period_type in enumerate(PeriodType):
            agg_type = kinds[(z + p) % len(kinds)]
            metrics.append(
                MetricSchema(
                    code=f"{zone.rpartition('/')[2]}.{period_type.name}.{agg_type.name}",
                    agg_type=agg_type,
                    filters=DIMENSIONS,
                    period_type=period_type,
                    billing_cycle_day=(1, 28, 15, 5)[z] if period_type is PeriodType.CALENDAR else 1,
                    time_zone=zone,
                    unique_type=UniqueType(z % 3) if agg_type is AggType.COUNT_UNIQUE else UniqueType.UINT64,
                )
            )
    return metrics


def zone_facts(schemas, rng):
    """Events on, just before and just after the bounds of days, hours and periods, with extreme values."""
    facts = []
    calendars = {zone: Calendar(zone) for zone in ZONES}
    changes = synthetic_history(seed=7, rows=900, accounts=9)
    for schema in schemas:
        calendar = calendars[schema.time_zone]
        seen = []
        for number, change in enumerate(changes):
            time_ns = change.ts * SECOND
            near = rng.choice(("day", "period", "hour", "none", "same"))
            if near == "day":
                time_ns = calendar.day_start(calendar.day(time_ns))
            elif near == "period":
                time_ns = calendar.period(time_ns, schema.period_type.name, schema.billing_cycle_day)[0]
            elif near == "hour":
                time_ns = calendar.starts(time_ns, time_ns + 3 * 3600 * SECOND, "hour")[-1]
            elif seen:
                time_ns = rng.choice(seen)
            seen.append(time_ns)
            time_ns = max(time_ns + rng.choice((-1, 0, 0, 1, rng.randrange(SECOND))), 0)
            value = rng.choice((change.added - change.deleted, 0, 2**63 - 1, -(2**63), rng.randrange(-9, 9)))
            text, operation = None, 0
            if schema.agg_type is AggType.COUNT_UNIQUE:
                low, high = (-(2**63), 2**63) if schema.unique_type is UniqueType.INT64 else (0, 2**64)
                text = str(rng.choice((low, high - 1, rng.randrange(low, high), *range(1, 9))))
                operation = rng.choice((0, ADD, REMOVE))
                value = 1
            facts.append(
                Fact(
                    id=f"{number}",
                    metric=schema.code,
                    account_id=change.account_id,
                    time_ns=time_ns,
                    value=value,
                    text=text,
                    operation=operation,
                    area=rng.choice((change.area, None, "")),
                    kind=rng.choice((change.kind, None, "")),
                )
            )
    return facts


@pytest.mark.parametrize("archive", ["off", "on"])
async def test_zones_and_periods_are_counted_exactly(tmp_path, archive):
    """Every answer equals the oracle's for every period type in zones with and without changes of the clock."""
    rng = random.Random("zones")
    schemas = zone_metrics()
    facts = zone_facts(schemas, rng)
    numbers = list(range(len(facts)))
    rng.shuffle(numbers)
    numeric = frozenset(
        schema.code
        for schema in schemas
        if schema.agg_type is AggType.COUNT_UNIQUE and schema.unique_type is not UniqueType.STRING
    )
    scene = Scene(tmp_path, seed=99, partition_count=3, archive=archive)
    meter, n_compared, log_starts = await run(
        scene, schemas, facts, numbers, "mixed", rng, questions=150, numeric=numeric
    )
    assert meter.n_duplicates >= len(facts) // 5
    assert n_compared > 1_000
    assert (min(log_starts) > 0) == (archive == "on")


@pytest.mark.parametrize("archive", ["off", "on"])
async def test_days_of_very_many_combinations_are_counted_exactly(tmp_path, archive):
    """A day of more dimension values than cells are kept for is as exact, beside days that aren't, and restarted."""
    rng = random.Random("combinations")
    schemas = [HISTORY_METRICS[1], HISTORY_METRICS[4]]
    day = 1_700_006_400  # a midnight in UTC; in New York the events lie on two days
    facts = []
    for number in range(14_000):
        busy = number < 11_500
        base = Fact(
            id=f"{number}",
            metric="",
            account_id=5 if busy or number % 2 else 6,
            time_ns=(day + rng.randrange(0 if busy else -86_400 * 3, 86_400 if busy else 86_400 * 3))
            * SECOND,
            value=1,
            text=None,
            operation=0,
            area=rng.choice((*AREAS, "elsewhere", None)),
            kind=f"kind-{number}" if busy and number % 50 else rng.choice(("rs", None, "")),
        )
        facts += [
            base._replace(metric="lines_added", value=number),
            base._replace(metric="files_touched", text=str(number % 999)),
        ]
    numbers = list(range(len(facts)))
    rng.shuffle(numbers)
    scene = Scene(tmp_path, seed=5, partition_count=2, archive=archive)
    meter, _, _ = await run(
        scene, schemas, facts, numbers, "mixed", rng, questions=12, numeric=frozenset({"files_touched"})
    )
    assert meter.n_duplicates >= len(facts) // 5


def test_synthetic_history_has_the_real_ones_shape():
    """A clone without the file meters as much: size, skew, repeated times, years, disorder; always the same."""
    changes = synthetic_history(seed=1)
    assert len(changes) == 58_000
    assert len({change.event_id for change in changes}) == len(changes)
    busiest = {}
    for change in changes:
        busiest[change.account_id] = busiest.get(change.account_id, 0) + 1
    assert max(busiest.values()) > len(changes) / 10
    times = [change.ts for change in changes]
    assert max(times) - min(times) > 2 * 365 * 86_400
    assert len(set(times)) < len(times) / 2
    assert times != sorted(times)
    assert synthetic_history(seed=1)[:100] == changes[:100]
