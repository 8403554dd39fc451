"""The archive is what docs/archive.md says: anyone can count a customer's month from its files alone."""

from __future__ import annotations

import asyncio
import json
import re
import uuid
from pathlib import Path
from typing import Any

import duckdb
import pytest
from numba.core.dispatcher import Dispatcher
from prometheus_client.parser import text_string_to_metric_families

from tallymark import (
    AggType,
    AsyncClient,
    DimensionFilter,
    Event,
    MetricSchema,
    OperationType,
    Period,
    PeriodType,
    UniqueType,
)
from tallymark_node import dev
from tallymark_node.config import Settings
from tallymark_store.archive import kernels, policy
from tallymark_store.archive.archiver import Archive

WAIT_S = 60.0
PAGE = Path(__file__).parents[2] / "docs" / "archive.md"
START = 1_761_955_200 * 10**9  # 2025-11-01, UTC
END = 1_764_547_200 * 10**9  # 2025-12-01
NOVEMBER = Period(START, END)
ALWAYS = Period(0, 2**62)


def figures(node: dev.Node) -> dict[str, float]:
    """The sums of families over their labels."""
    assert node.monitor.telemetry is not None
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(node.monitor.telemetry.render().decode()):
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, 0) + sample.value
    return found


def compiled() -> dict[str, int]:
    """How many forms of each of the archive's kernels there are."""
    return {
        name: len(kernel.signatures)
        for name, kernel in vars(kernels).items()
        if isinstance(kernel, Dispatcher)
    }


def archives(node: dev.Node) -> list[Archive]:
    archiver = node._store.archiver
    assert archiver is not None
    return list(archiver.archives.values())


async def wait_archived(node: dev.Node) -> dict[str, float]:
    """Wait until the archive holds everything that is in the totals."""
    async with asyncio.timeout(WAIT_S):
        while True:
            now = figures(node)
            archived = now.get("tallymark_partition_archived", 0)
            is_all = archived == now["tallymark_partition_applied"] == now["tallymark_partition_log_end"]
            # A merge under way would take files away from whoever reads them.
            if is_all and all(policy.next_merge(one.manifest.files) is None for one in archives(node)):
                return figures(node)
            await asyncio.sleep(0.05)


def events_of_round(number: int) -> list[Event]:
    """Some of everything: at the edges of the month, late, with ids of every kind, dimensions and properties."""
    events = []
    for i in range(120):
        time = [START, START - 1, END - 1, END, START + i * 10**12 + number, None][i % 6]
        properties = [{"provider": "aws", "zone": f"z{i % 5}"}, {"provider": 'Ã¥"\\\n'}, {"zone": ""}, {}][
            i % 4
        ]
        event_id: Any = [
            None,
            f"{number}-{i}",
            b"%d-%d" % (number, i),
            uuid.UUID(int=number << 64 | i),
            -(i << 70) - number,
        ][i % 5]
        account = 42 if i % 3 else 2**64 - 1 - i
        events.append(Event(account, "compute_seconds", i * 7 - 50, time, properties, id=event_id))
    events += [
        Event(42, "users", f"user-{i % 9}", START + i, operation_type=OperationType(i % 3)) for i in range(20)
    ]
    events += [Event(42, "numbers", 2**64 - 1 - i % 4) for i in range(20)]
    # What is refused: a duplicate, a conflict, an unknown metric, a time before 1970.
    events += [
        events[1],
        Event(42, "compute_seconds", 9, id="0-1"),
        Event(42, "nothing"),
        Event(42, "users", "x", -5),
    ]
    return events


def sizes(data: Path) -> list[int]:
    """Of the files of all archives."""
    return [file.stat().st_size for file in data.glob("store/archive/*/events-*.parquet")]


async def compare(client: AsyncClient, connection: duckdb.DuckDBPyConnection) -> None:
    """Totals, breakdowns and events of the store against what DuckDB finds in the files."""
    sql = re.search(r"```sql\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert sql is not None
    lines = sql[1].strip().splitlines()
    assert len(lines) == 3
    connection.execute("DROP VIEW IF EXISTS events")
    for line in lines[:2]:
        connection.execute(line)
    (found,) = connection.execute(lines[2]).fetchall()
    usage = await client.query(42, "compute_seconds", NOVEMBER)
    assert usage.value.count > 0
    assert found == (usage.value.count, usage.value.sum)

    rows = await client.breakdown(42, "compute_seconds", NOVEMBER, group_by=["provider"])
    grouped = connection.execute(
        "SELECT dimensions ->> 'provider', count(*), sum(value) FROM events WHERE account = 42 "
        f"AND metric = 'compute_seconds' AND time_ns >= {START} AND time_ns < {END} GROUP BY 1"
    ).fetchall()
    assert {value: numbers for value, *numbers in grouped} == {
        row.group["provider"]: [row.value.count, row.value.sum] for row in rows
    }

    for account in (42, 2**64 - 1):
        expected = [
            (
                event.offset, event.metric_code, str(event.value), event.timestamp_ns, event.properties,
                None if event.id is None else _text(event.id),
            )
            async for event in client.list_events(account, 0, 2**62)
        ]  # fmt: skip
        in_files = connection.execute(
            'SELECT "offset", metric, coalesce(value_text, value::VARCHAR), time_ns, dimensions, properties, id '
            'FROM events WHERE account = ? ORDER BY "offset"',
            [account],
        ).fetchall()
        assert expected == [
            (*row[:4], {**json.loads(row[4] or "{}"), **json.loads(row[5] or "{}")}, row[6])
            for row in in_files
        ]


def _text(event_id: Any) -> str:
    return event_id.hex() if isinstance(event_id, bytes) else str(event_id)


async def test_a_month_is_counted_from_the_files_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the page's own lines, while the store runs, over merges, a metric made again, and a restart."""
    monkeypatch.setattr(policy, "FAN_IN", 3)
    monkeypatch.chdir(tmp_path)
    settings = Settings(
        port=0,
        data_dir=str(tmp_path),
        partition_count=2,
        telemetry="127.0.0.1:0",
        archive="on",
        archive_events=1,
        archive_interval_seconds=0.01,
    )
    schemas = [
        MetricSchema(
            code="compute_seconds", agg_type=AggType.SUM, period_type=PeriodType.CALENDAR,
            filters=[DimensionFilter(key="provider")],
        ),
        MetricSchema(code="users", agg_type=AggType.COUNT_UNIQUE, unique_type=UniqueType.STRING),
        MetricSchema(code="numbers", agg_type=AggType.COUNT_UNIQUE),
    ]  # fmt: skip
    connection = duckdb.connect()
    sent = 0
    before: dict[str, int] = {}
    for life in range(2):
        async with dev.running(settings) as node, AsyncClient([node.address]) as client:
            before = before or compiled()
            for schema in schemas if life == 0 else []:
                await client.metrics.create(schema)
            for _ in range(4):
                receipt = await client.ingest(events_of_round(sent))
                assert receipt.n_stored >= 120
                assert len(receipt.rejected) > 0
                sent += 1
                await wait_archived(node)
                await compare(client, connection)
            told = await wait_archived(node)
            assert told["tallymark_store_archive_failures_total"] == 0
            assert told["tallymark_store_archived_events_total"] > 400
            assert told["tallymark_store_archive_seconds_count"] > 2
            assert told["tallymark_partition_archive_files"] < 8
            assert told["tallymark_partition_archive_bytes"] == sum(sizes(tmp_path))
            if life == 1:
                # A code that is made again: its events are apart from those of the metric that had it.
                await client.metrics.delete("users")
                await client.metrics.create(schemas[1])
                await client.ingest([Event(42, "users", "again", START)])
                await wait_archived(node)
                await compare(client, connection)
                uids = connection.execute(
                    "SELECT metric_uid, count(*) FROM events WHERE metric = 'users' GROUP BY 1 ORDER BY 1"
                ).fetchall()
                assert [count for _, count in uids] == [20 * sent, 1]
    assert compiled() == before, "nothing is compiled while serving"
    assert len(sizes(tmp_path)) < 2 * sent, "files were merged"


async def test_without_the_setting_there_is_no_archive(tmp_path: Path) -> None:
    """No folder, and no figures that say otherwise."""
    async with dev.running(Settings(port=0, data_dir=str(tmp_path), telemetry="127.0.0.1:0")) as node:
        async with AsyncClient([node.address]) as client:
            await client.metrics.create(MetricSchema(code="m"))
            await client.ingest([Event(1, "m")])
        assert not any("archive" in name for name in figures(node))
    assert not (tmp_path / "store" / "archive").exists()
