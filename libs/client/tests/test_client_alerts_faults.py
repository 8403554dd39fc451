"""Subscriptions while everything around them fails: each alert at least once, in order, and once in each life."""

import asyncio
import json
import random

import pytest
from fake_alerts import AlertLog, FakeAlerts
from fake_gateway import FakeGateway

from tallymark import AsyncClient, _gateways
from tallymark_protocol import messages as m
from tallymark_protocol.errors import ErrorCode, WireError

FAULTS = (
    None,
    WireError(int(ErrorCode.CLOSED), True, "going away"),
    WireError(int(ErrorCode.PARTITION_UNAVAILABLE), True, "no leader"),
    WireError(int(ErrorCode.OVERLOADED), True, "busy", {"retry_after_ms": 1}),
)


def stale(log):
    """An answer of an instance that is behind: fewer alerts than there are, and never a position too far."""

    def answer(call):
        batch = log.batch(call)
        kept = batch.alerts[: len(batch.alerts) // 2]
        reached = dict(call.since)
        for alert in kept:
            reached[alert.partition] = alert.position + 1
        return m.AlertsBatch(kept, {partition: reached.get(partition, 0) for partition in batch.next})

    return answer


async def fail(rng, log, instances, stop):
    """Kill and restart instances, and have them answer badly, until told to stop."""
    ports = {}
    while not stop.is_set():
        instance = rng.choice(instances)
        kind = rng.randrange(6)
        if instance in ports:
            if kind < 3:
                await instance.start(ports.pop(instance))
        elif kind == 0:
            ports[instance] = instance.port
            await instance.stop()
        elif kind < 4:
            if len(instance.script) < 2:
                instance.script.append(rng.choice((*FAULTS, stale(log), stale(log))))
        elif kind == 4:
            for peer in [*instance.peers]:
                peer.go_away()
        else:
            instance.release()
        await asyncio.sleep(rng.random() * 0.01)
    for instance, port in ports.items():
        await instance.start(port)


@pytest.mark.parametrize("seed", range(8))
async def test_nothing_is_missed(seed, monkeypatch):
    """Instances die, lag and answer badly; the consumer dies at any alert and goes on from what it saved."""
    monkeypatch.setattr(_gateways, "BACKOFF_MIN", 0.001)
    monkeypatch.setattr(_gateways, "BACKOFF_MAX", 0.01)
    rng = random.Random(seed)
    log = AlertLog()
    async with FakeAlerts(log) as one, FakeAlerts(log) as two, FakeGateway() as gateway:
        gateway.alerts_addresses = [one.address, two.address]
        accounts = rng.choice(([], [1, 2]))
        stop = asyncio.Event()

        async def raise_alerts():
            for _ in range(150):
                log.add(*rng.choices([1, 2, 3], k=rng.randrange(1, 12)), partition=rng.randrange(4))
                await asyncio.sleep(rng.random() * 0.005)

        async with AsyncClient([gateway.address], timeout=30, _rng=random.Random(seed)) as client:
            tasks = [
                asyncio.create_task(fail(rng, log, [one, two], stop)),
                asyncio.create_task(raise_alerts()),
            ]
            wanted = set()
            handled = set()
            saved = "{}"
            while not (wanted and wanted <= handled):  # `wanted` is known once all are raised
                life = []
                crash_at = rng.randrange(1, 150)
                since = json.loads(saved)
                async with client.alerts.subscribe(
                    accounts, since=since, buffer=rng.choice((1, 3, 64))
                ) as sub:
                    while len(life) < crash_at:
                        alert = await sub.next(timeout=0.02)
                        if tasks[1].done():
                            wanted = {
                                (record.partition, record.position)
                                for records in log.partitions
                                for record in records
                                if not accounts or record.account_id in accounts
                            }
                            if wanted <= handled:
                                break
                        if alert is None:
                            continue
                        if rng.random() < 0.1:
                            await asyncio.sleep(0.01)  # slow for a moment: the buffer runs over
                        life.append((alert.partition, alert.position))
                        if rng.random() < 0.2:
                            saved = json.dumps(sub.offsets())
                        if len(life) < crash_at or rng.random() < 0.5:
                            handled.add(life[-1])
                assert all(since.get(str(p), 0) <= position for p, position in life)
                for partition in range(4):
                    positions = [position for p, position in life if p == partition]
                    assert positions == sorted(set(positions))
            stop.set()
            await asyncio.gather(*tasks)
        assert handled == wanted
        assert len(wanted) > 300
