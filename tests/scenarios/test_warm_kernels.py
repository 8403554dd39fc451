"""A node that serves has compiled everything: no request waits for a compiler."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from numba.core.dispatcher import Dispatcher

from tallymark import (
    AggType,
    AlertThreshold,
    AsyncClient,
    DeliveryMode,
    DimensionFilter,
    Event,
    MetricSchema,
    OperationType,
    Period,
    PeriodType,
    UniqueType,
    current_month,
)
from tallymark_node import dev
from tallymark_node.config import Settings

HOUR = 3_600 * 10**9
DAY = 24 * HOUR
SCHEMAS = [
    MetricSchema(code="plain"),
    MetricSchema(
        code="sum",
        agg_type=AggType.SUM,
        filters=[DimensionFilter(key="p", values=["aws", "gcp"]), DimensionFilter(key="r")],
        thresholds=[AlertThreshold(code="t", value=100), AlertThreshold(code="r", value=50, recurring=True)],
        grace_seconds=400 * 86_400,
        time_zone="Europe/Berlin",
        period_type=PeriodType.CALENDAR,
    ),
    MetricSchema(code="max", agg_type=AggType.MAX, filters=[DimensionFilter(key="r")]),
    MetricSchema(code="latest", agg_type=AggType.LATEST, period_type=PeriodType.LIFETIME),
    MetricSchema(code="users", agg_type=AggType.COUNT_UNIQUE),
    MetricSchema(code="names", agg_type=AggType.COUNT_UNIQUE, unique_type=UniqueType.STRING),
]


def compiled() -> dict[str, list[str]]:
    """The signatures of every kernel of ours that has been loaded."""
    found: dict[str, list[str]] = {}
    for name, module in list(sys.modules.items()):
        if name.startswith("tallymark"):
            for kernel in vars(module).values():
                if isinstance(kernel, Dispatcher):
                    key = f"{kernel.py_func.__module__}.{kernel.py_func.__name__}"
                    found[key] = sorted(map(str, kernel.signatures))
    return found


async def ingest(client: AsyncClient, now: int, round_: int) -> None:
    """Every shape of event: repeated ids, rejected and late ones, texts, values that need 64 bits, columns."""
    work = [
        Event(
            account_id=i % 10,
            metric_code="sum",
            value=i,
            properties={"p": "aws" if i % 2 else "x", "r": str(i % 7)} if i % 3 else {},
            id=f"e{i // 2}",
            timestamp=now - i * 1_000 * 10**9,
        )
        for i in range(600)
    ]
    await client.ingest(work)
    await client.ingest(work[:300], delivery=DeliveryMode.ASYNC)
    await client.ingest([Event(account_id=i % 10, metric_code="plain") for i in range(500)])
    await client.ingest([Event(account_id=3, metric_code="latest", value=round_)])
    await client.ingest([Event(account_id=i % 5, metric_code="max", value=-i, id=i) for i in range(100)])
    await client.ingest(
        [
            Event(
                account_id=i % 10,
                metric_code="users",
                value=i if i % 2 else 2**64 - 1 - i,
                operation_type=OperationType(i % 3),
            )
            for i in range(300)
        ]
    )
    await client.ingest([Event(account_id=i % 10, metric_code="names", value=f"v{i}") for i in range(300)])
    await client.ingest(
        [
            Event(account_id=3, metric_code="unknown"),
            Event(account_id=3, metric_code="sum", timestamp=now + 3 * HOUR),
            Event(account_id=3, metric_code="sum", timestamp=0),
            Event(account_id=3, metric_code="plain"),
        ]
    )


async def ask(client: AsyncClient, now: int) -> None:
    """Every kind of read: whole periods, ragged ones, series, groups, filters, rankings, events, alerts."""
    ragged = Period(now - 12 * DAY, now - 12_345)
    for schema in SCHEMAS:
        for period in (current_month(), ragged, Period(now - HOUR, now)):
            await client.query(3, schema.code, period)
        await client.query_realtime(3, schema.code)
        for unit in ("hour", "day"):
            await client.series(3, schema.code, ragged, unit=unit)
        for period in (current_month(), ragged):
            await client.top_accounts(schema.code, period, limit=2)
        async for _ in client.list_events(4, now - DAY, now, metric_code=schema.code):
            break
    await client.query(3, "sum", current_month(), filters={"p": "aws"})
    await client.query(3, "sum", ragged, filters={"p": ["aws", "gcp"], "r": "1"})
    for group_by in (["p"], ["r", "p"]):
        await client.breakdown(4, "sum", ragged, group_by=group_by)
        await client.breakdown(4, "sum", current_month(), group_by=group_by, filters={"r": "2"})
    await client.series(4, "sum", ragged, unit="day", filters={"r": "2"})
    await client.top_accounts("sum", ragged, limit=3, filters={"p": "aws"})
    await client.list_alerts(4)
    async for _ in client.list_events(4, 0, 2**62):
        pass


async def test_nothing_is_compiled_once_a_node_serves(tmp_path: Path) -> None:
    """In a first life, over a checkpoint, and in a second one that recovers from it."""
    settings = Settings(port=0, data_dir=str(tmp_path / "data"))
    for life in range(2):
        async with dev.running(settings) as node:
            before = compiled()
            now = time.time_ns()
            async with AsyncClient([node.address]) as client:
                for schema in SCHEMAS if life == 0 else []:
                    await client.metrics.create(schema)
                await ingest(client, now, life)
                await ask(client, now)
                await node.checkpoint()
                await ingest(client, now, life + 10)
                await ask(client, now)
                await client.metrics.list()
            after = compiled()
        late = [
            f"{name}{one}"
            for name, signatures in after.items()
            for one in signatures
            if one not in before.get(name, [])
        ]
        assert not late, "compiled while serving:\n" + "\n".join(late)
    assert len(compiled()) > 50
