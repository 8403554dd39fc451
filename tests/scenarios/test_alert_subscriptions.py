"""Subscriptions against a server: nothing missed over crashes of the consumer and restarts of the server."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path

import pytest

from tallymark import (
    Alert,
    AlertThreshold,
    AsyncClient,
    Client,
    Event,
    MetricSchema,
    UnavailableError,
)
from tallymark_node import dev
from tallymark_node.config import Settings

CODE = "watched"
EACH = MetricSchema(code=CODE, thresholds=[AlertThreshold(code="each", value=1, recurring=True)])


async def everything(client: AsyncClient, **filters: object) -> list[Alert]:
    """All alerts there are, in order within each partition."""
    found: list[Alert] = []
    since: dict[int, int] = {}
    while True:
        page = await client.list_alerts(since=since, limit=97, **filters)  # type: ignore[arg-type]
        found += page
        if not page.more:
            return sorted(found, key=lambda alert: (alert.partition, alert.position))
        since = page.next


async def ends(client: AsyncClient) -> dict[str, int]:
    """How many alerts each partition has, as offsets."""
    positions = [alert.partition for alert in await everything(client)]
    return {str(partition): positions.count(partition) for partition in range(4)}


def check_order(alerts: list[Alert]) -> None:
    """Positions only rise within a partition."""
    for partition in {alert.partition for alert in alerts}:
        positions = [alert.position for alert in alerts if alert.partition == partition]
        assert positions == sorted(set(positions))


@pytest.mark.parametrize("seed", range(3))
async def test_a_consumer_that_crashes_misses_nothing(tmp_path: Path, seed: int) -> None:
    """It saves its offsets now and then, dies anywhere, and goes on from what it had saved, while alerts are raised."""
    rng = random.Random(seed)
    accounts = [rng.randrange(2**64) for _ in range(40)]
    seen: list[Alert] = []
    handled: dict[str, int] = {}  # by alert id: how often

    async with (
        dev.running(Settings(port=0, data_dir=str(tmp_path / "data"))) as node,
        AsyncClient([node.address]) as client,
    ):
        await client.metrics.create(EACH)

        async def load() -> None:
            for _ in range(60):
                events = [Event(rng.choice(accounts), CODE) for _ in range(rng.randrange(40))]
                await client.ingest(events)
                await asyncio.sleep(0)

        loading = asyncio.create_task(load())
        saved = "{}"
        while True:
            life: list[Alert] = []
            crash_at = rng.randrange(1, 200)
            finished = False
            async with client.alerts.subscribe(since=json.loads(saved), buffer=rng.choice((1, 5, 64))) as sub:
                while len(life) < crash_at:
                    alert = await sub.next(timeout=0.05)
                    if alert is None:
                        finished = loading.done() and sub.offsets() == await ends(client)
                        if finished:
                            break
                        continue
                    life.append(alert)
                    if rng.random() < 0.3:
                        saved = json.dumps(sub.offsets())
                    if len(life) < crash_at:  # dies while handling the last one
                        handled[alert.id] = handled.get(alert.id, 0) + 1
            check_order(life)
            seen += life
            if finished:
                break
        await loading
        expected = await everything(client)
        assert len(expected) > 900
        assert {alert.id for alert in expected} == set(handled)
        by_id = {alert.id: alert for alert in expected}
        assert all(by_id[alert.id] == alert for alert in seen)


async def test_positions_and_ids_last_over_restarts(tmp_path: Path) -> None:
    """The same alerts at the same positions; a subscription of the same client goes on by itself."""
    settings = Settings(port=0, data_dir=str(tmp_path / "data"))
    accounts = list(range(30))
    async with dev.running(settings) as node:
        address = node.address
        async with AsyncClient([address]) as client:
            await client.metrics.create(EACH)
            await client.ingest([Event(account, CODE) for account in accounts])
            before = await everything(client)
            page = await client.list_alerts(limit=11)
            async with client.alerts.subscribe(since={}) as sub:
                first = [await sub.next(timeout=10) for _ in accounts]
                offsets = sub.offsets()
    port = int(address.rpartition(":")[2])
    client = AsyncClient([address])
    settings = Settings(port=port, data_dir=str(tmp_path / "data"))
    async with dev.running(settings) as node:
        await node.checkpoint()
        await client.connect()
        assert await everything(client) == before
        rest = await client.list_alerts(since=page.next)
        assert {alert.id for alert in [*page, *rest]} == {alert.id for alert in before}
        sub = client.alerts.subscribe(since=offsets)
        again = await sub.next(timeout=10)
        assert again == first[-1]  # it was the one being handled
        assert await sub.next(timeout=0) is None
    with pytest.raises(UnavailableError):
        await client.list_alerts(timeout=0.2)
    async with dev.running(settings):  # from the checkpoint
        await client.ingest([Event(7, CODE)])
        alert = await sub.next(timeout=30)
        assert alert is not None
        assert (alert.account_id, alert.first_multiple) == (7, 2)
        assert [a for a in await everything(client) if a.id != alert.id] == before
        await sub.close()
        await client.close()


async def test_filters_and_ranges(tmp_path: Path) -> None:
    """What a filtered subscription gives, from the start or live, is what the list gives; so with times."""
    async with (
        dev.running(Settings(port=0, data_dir=str(tmp_path / "data"))) as node,
        AsyncClient([node.address]) as client,
    ):
        for code in ("a", "b"):
            await client.metrics.create(
                MetricSchema(code=code, thresholds=[AlertThreshold(code="each", value=1, recurring=True)])
            )
        async with client.alerts.subscribe(account_ids=[3, 5], metric_codes="b") as live:
            events = [Event(account % 8, "ab"[account % 3 == 0]) for account in range(400)]
            for start in range(0, 400, 40):
                await client.ingest(events[start : start + 40])
            expected = [
                alert for alert in await everything(client, metric_code="b") if alert.account_id in {3, 5}
            ]
            assert len(expected) > 20
            ids = {alert.id for alert in expected}
            assert {(await live.next(timeout=10)).id for _ in expected} == ids  # type: ignore[union-attr]
            assert await live.next(timeout=0) is None
        async with client.alerts.subscribe(account_ids=[5, 3], metric_codes="b", since={}) as past:
            assert {(await past.next(timeout=10)).id for _ in expected} == ids  # type: ignore[union-attr]
            async with asyncio.timeout(30):
                while past.offsets() != await ends(client):  # also past what doesn't match
                    assert await past.next(timeout=0.05) is None
        middle = sorted(alert.triggered_at for alert in expected)[len(expected) // 2]
        early = await everything(client, metric_code="b", end=middle)
        late = await everything(client, metric_code="b", start=middle)
        assert [a for a in await everything(client, metric_code="b") if a in early] == early
        assert all(alert.triggered_at < middle for alert in early)
        assert all(alert.triggered_at >= middle for alert in late)
        assert len(early) + len(late) == len(await everything(client, metric_code="b"))
        assert early
        assert late


async def test_a_blocking_consumer_far_behind(tmp_path: Path) -> None:
    """Thousands of alerts into a buffer of three: all of them, in order, and what was dropped came again."""
    async with (
        dev.running(Settings(port=0, data_dir=str(tmp_path / "data"))) as node,
        AsyncClient([node.address]) as client,
    ):
        await client.metrics.create(EACH)
        subscribed = asyncio.Event()
        loaded = asyncio.Event()
        loop = asyncio.get_running_loop()

        def consume() -> tuple[list[Alert], int]:
            with Client([node.address]) as own, own.alerts.subscribe(buffer=3) as sub:
                loop.call_soon_threadsafe(subscribed.set)
                asyncio.run_coroutine_threadsafe(loaded.wait(), loop).result()
                found = [sub.next(timeout=30) for _ in range(2_000)]
                assert sub.next(timeout=0) is None
                return [alert for alert in found if alert is not None], sub.dropped()

        task = asyncio.create_task(asyncio.to_thread(consume))
        await subscribed.wait()
        for start in range(0, 2_000, 50):
            await client.ingest([Event(account % 17, CODE) for account in range(start, start + 50)])
        loaded.set()
        found, dropped = await task
        check_order(found)
        assert sorted(found, key=lambda alert: (alert.partition, alert.position)) == await everything(client)
        assert len(found) == 2_000
        assert dropped > 0
