"""Webhooks of receivers that fail, hang, reset, answer 500 and are away, while instances and leaders are killed.

Every receiver ends with every alert of its filter, signed, as the log says it must be; nothing is a dead letter.
"""

import asyncio
import random

import pytest
from alerts_load import POLL_SECONDS, SPENT, USERS, WAIT_SECONDS_MAX, Expected, Spending, all_alerts
from cluster import Cluster
from server import own_host
from webhook_receivers import Receiver, Receivers

from tallymark import AsyncClient

pytestmark = pytest.mark.timeout(600)  # the first start compiles the kernels

KINDS = ("good", "500", "reset", "hang", "mixed")
ROUNDS = 2
BETWEEN_EVENTS = 150  # acknowledged between two deaths
SETTINGS = {"webhook_allow_private": True, "webhook_retry_s": 0.05}


async def test_every_receiver_ends_with_every_alert(tmp_path):
    """`kill -9` of instances and leaders, receivers of all kinds, one of them away at first: all alerts arrive."""
    rng = random.Random(1)
    cluster = Cluster(tmp_path, alerts=2, settings=SETTINGS)
    late = Receiver("good", "", 9)
    receivers = {kind: Receiver(kind, "", seed) for seed, kind in enumerate(KINDS)}
    host = own_host()
    server, late_server = Receivers(host, 7500, receivers), Receivers(host, 7501, {"late": late})
    try:
        await server.start()
        await cluster.start()
        async with AsyncClient(cluster.addresses) as client:
            for schema in (SPENT, USERS):
                await client.metrics.create(schema)
            ids = {}
            for name, receiver in receivers.items():
                made = await client.webhooks.create(server.url(name), metric_codes=["spent"], from_start=True)
                receiver.secret, ids[name] = made.secret, made.id
            made = await client.webhooks.create(
                late_server.url("late"), metric_codes=["users"], from_start=True
            )
            late.secret, ids["late"] = made.secret, made.id
            spending = Spending(cluster.addresses, 2, senders=1)
            async with spending.running():
                for _ in range(ROUNDS):
                    await spending.wait_acknowledged(BETWEEN_EVENTS)
                    dying = [rng.choice(cluster.alerts), await cluster.busiest()]
                    for victim in dying:
                        victim.kill()
                    await spending.wait_acknowledged(BETWEEN_EVENTS)
                    await asyncio.gather(*(victim.start() for victim in dying))
            await late_server.start()
            expected = Expected(await all_alerts(client), await spending.crossings(client))
            wanted = {alert.id: alert for alert in expected.alerts}
            everyone = receivers | {"late": late}
            codes = {name: "users" if name == "late" else "spent" for name in everyone}
            missing: dict[str, set[str]] = {}
            try:
                async with asyncio.timeout(WAIT_SECONDS_MAX):
                    while True:
                        for name, receiver in everyone.items():
                            due = {a.id for a in expected.alerts if a.metric_code == codes[name]}
                            assert receiver.acknowledged.keys() <= due
                            missing[name] = due - receiver.acknowledged.keys()
                        if not any(missing.values()):
                            break
                        await asyncio.sleep(POLL_SECONDS)
            except TimeoutError:
                hooks = await client.webhooks.list()
                raise AssertionError(
                    f"missing: { {k: len(v) for k, v in missing.items()} }; {hooks}"
                ) from None
            for name, receiver in everyone.items():
                for alert_id, data in receiver.acknowledged.items():
                    alert = wanted[alert_id]
                    assert int(data["value_at_cross"]) == alert.value_at_cross
                    assert int(data["account_id"]) == alert.account_id
                    assert (data["partition"], data["position"]) == (alert.partition, alert.position)
                    assert data["threshold_code"] == alert.threshold_code
                letters = await client.webhooks.dead_letters(ids[name])
                assert not list(letters), f"{name} has dead letters"
            for kind in KINDS[1:]:
                assert receivers[kind].faults, f"the {kind} receiver took everything at once"
    finally:
        await server.close()
        await late_server.close()
        cluster.close()
