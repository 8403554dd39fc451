"""Instances of the alerts role, leaders and gateways killed under a load that crosses thousands of thresholds.

Invariant ALERT-1 from outside: the log's crossings have exactly one alert each, and every subscriber, however often it
has crashed itself, has seen each at least once, in order within each partition.
"""

import asyncio
import random

import pytest
from alerts_load import (
    LIFE_ALERTS_MAX,
    POLL_SECONDS,
    SPENT,
    USERS,
    WAIT_SECONDS_MAX,
    Expected,
    Follower,
    FollowerProcess,
    Spending,
    all_alerts,
)
from cluster import Cluster

from tallymark import AsyncClient

pytestmark = pytest.mark.timeout(600)  # the first start compiles the kernels

ROUNDS = 4
BETWEEN_EVENTS = 300  # acknowledged between two deaths
EVENTS_MIN = 6_000  # in all: enough to cross thousands of thresholds
CROSSINGS_MIN = 2_000


async def victims(cluster: Cluster, rng: random.Random) -> list:
    """Who dies next: something of each kind, or a few of them."""
    found = [rng.choice(cluster.alerts), rng.choice(cluster.gateways), await cluster.busiest()]
    return rng.sample(found, rng.choice((1, 2, 3)))


async def test_nothing_is_missed_whatever_dies(tmp_path):
    """`kill -9` of alerts instances, leaders, gateways and subscribers: each crossing is seen, in order."""
    rng = random.Random(1)
    cluster = Cluster(tmp_path, alerts=2)
    process = FollowerProcess(tmp_path, cluster.addresses)
    tasks: list[asyncio.Task[None]] = []
    try:
        await cluster.start()
        async with AsyncClient(cluster.addresses) as client:
            for schema in (SPENT, USERS):
                await client.metrics.create(schema)
            followers = [
                Follower("all", cluster.addresses, 1),
                Follower("some accounts", cluster.addresses, 2, account_ids=range(0, 40, 3)),
                Follower("one metric", cluster.addresses, 3, metric_codes=["users"]),
            ]
            tasks = [asyncio.create_task(follower.run()) for follower in followers]
            process.spawn()
            spending = Spending(cluster.addresses, 1)
            async with spending.running():
                for round_ in range(ROUNDS):
                    await spending.wait_acknowledged(BETWEEN_EVENTS)
                    dying = await victims(cluster, rng)
                    for victim in dying:
                        victim.kill()
                    process.kill()
                    await spending.wait_acknowledged(BETWEEN_EVENTS)
                    process.spawn()
                    await asyncio.gather(*(victim.start() for victim in dying))
                    assert process.lives == round_ + 2
                await spending.wait_until_acknowledged(EVENTS_MIN)
            expected = Expected(await all_alerts(client), await spending.crossings(client))
            assert len(expected.alerts) > CROSSINGS_MIN
        wanted = [expected.matching(f.account_ids, f.metric_codes) for f in followers]
        async with asyncio.timeout(WAIT_SECONDS_MAX):
            while [len(f.seen) for f in followers] != [len(w) for w in wanted]:
                assert not any(task.done() for task in tasks), "a follower has failed"
                await asyncio.sleep(POLL_SECONDS)
            while len(process.seen()) < len(expected.alerts):  # noqa: ASYNC110 - it tells nobody
                await asyncio.sleep(POLL_SECONDS)
        for follower, alerts in zip(followers, wanted, strict=True):
            expected.check(follower.name, alerts, follower.lives)
            assert len(alerts) > LIFE_ALERTS_MAX
            assert len(follower.lives) > 1
        expected.check(process.name, expected.matching([], []), process.lives_noted())
    finally:
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        process.kill()
        cluster.close()
    assert all(isinstance(result, asyncio.CancelledError) for result in results), results
