"""Subscriptions: where they begin, what they survive, and how they end."""

import asyncio
import json
import random

import pytest
from fake_alerts import AlertLog, FakeAlerts
from fake_gateway import FakeGateway, until

from tallymark import AsyncClient, InvalidRequestError, ServerError, UnavailableError, _reader
from tallymark_protocol import limits
from tallymark_protocol import messages as m
from tallymark_protocol.errors import ErrorCode, WireError


@pytest.fixture
def log():
    """The alerts of a cluster of four partitions."""
    return AlertLog()


@pytest.fixture
async def instance(log):
    """An alerts instance."""
    async with FakeAlerts(log) as running:
        yield running


@pytest.fixture
async def gateway(instance):
    """A gateway that names it."""
    async with FakeGateway() as running:
        running.alerts_addresses = [instance.address]
        yield running


@pytest.fixture
async def client(gateway):
    """A client connected to it."""
    async with AsyncClient([gateway.address], timeout=5) as connected:
        yield connected


async def take(sub, count):
    """The accounts of the next alerts."""
    return [(await sub.next(timeout=5)).account_id for _ in range(count)]


async def test_what_is_raised_after_entering_is_delivered(client, log):
    """Without a start, the end is pinned when the subscription is entered; what was before isn't delivered."""
    log.add(1, 2)
    async with client.alerts.subscribe() as sub:
        log.add(3)
        log.add(4, partition=3)
        assert sorted(await take(sub, 2)) == [3, 4]
        assert await sub.next(timeout=0) is None
        assert sub.offsets() == {"0": 3, "1": 0, "2": 0, "3": 1}


async def test_pinned_though_nobody_reads_yet(client, log, instance):
    """An alert that is raised before the first question of the reader is delivered, too."""
    sub = client.alerts.subscribe()
    await sub.__aenter__()
    log.add(7)
    async for alert in sub:
        assert alert.account_id == 7
        break
    await sub.close()
    assert instance.fetches[0].since is None


async def test_from_the_first_alert(client, log):
    """An empty cursor reads everything there is, in order within a partition."""
    log.add(*range(200), partition=1)
    log.add(*range(1000, 1100), partition=2)
    async with client.alerts.subscribe(since={}) as sub:
        found = await take(sub, 300)
        assert [account for account in found if account < 1000] == list(range(200))
        assert [account for account in found if account >= 1000] == list(range(1000, 1100))
        assert await sub.next(timeout=0) is None
        assert sub.offsets() == {"0": 0, "1": 200, "2": 100, "3": 0}


async def test_without_entering(client, log):
    """A subscription that wasn't entered begins at the first alert that is asked for, and can be closed."""
    sub = client.alerts.subscribe()
    with pytest.raises(InvalidRequestError, match="hasn't begun"):
        sub.offsets()
    log.add(1)
    assert await sub.next(timeout=0.05) is None
    log.add(2)
    assert (await sub.next()).account_id == 2
    await sub.close()
    await sub.close()
    assert [alert async for alert in sub] == []
    with pytest.raises(UnavailableError, match="subscription is closed"):
        await sub.next()


async def test_resumed_from_offsets_that_went_through_json(client, log):
    """What was being handled comes again, the rest once."""
    log.add(*range(10))
    async with client.alerts.subscribe(since={}) as sub:
        assert await take(sub, 4) == [0, 1, 2, 3]
        saved = json.dumps(sub.offsets())
    async with client.alerts.subscribe(since=json.loads(saved)) as sub:
        assert await take(sub, 7) == [3, 4, 5, 6, 7, 8, 9]


async def test_filters_travel(client, log, instance):
    """Sorted and each once; text alone is one code, a number alone is one account; none means all."""
    log.add(1, 2, 3)
    log.add(2, metric="n")
    async with client.alerts.subscribe(account_ids={3, 2}, metric_codes="n", since={}) as sub:
        assert await take(sub, 1) == [2]
        assert (instance.fetches[-1].account_ids, instance.fetches[-1].metric_codes) == ([2, 3], ["n"])
    async with client.alerts.subscribe(account_ids=1, metric_codes=iter(["n", "m", "m"]), since={}) as sub:
        assert await take(sub, 1) == [1]
        assert (instance.fetches[-1].account_ids, instance.fetches[-1].metric_codes) == ([1], ["m", "n"])
    async with client.alerts.subscribe(account_ids=[], metric_codes=[], since={}) as sub:
        assert await take(sub, 4) == [1, 2, 3, 2]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"account_ids": [-1]}, "account_id must be a whole number from 0 to 2^64-1, not -1"),
        ({"account_ids": [True]}, "not True"),
        ({"account_ids": 1.5}, "account_ids must be account ids, not float"),
        ({"account_ids": range(limits.SUBSCRIPTION_ACCOUNTS_MAX + 1)}, "names 1001 accounts: at most 1000"),
        ({"metric_codes": [""]}, "'' is no metric code"),
        ({"metric_codes": "a b"}, "'a b' is no metric code"),
        ({"metric_codes": [b"m"]}, "is no metric code"),
        ({"metric_codes": 7}, "metric_codes must be metric codes, not int"),
        ({"metric_codes": [str(n) for n in range(101)]}, "names 101 metrics: at most 100"),
        ({"since": [1]}, "since must be offsets: positions by partition, not list"),
        ({"since": 7}, "not int"),
        ({"since": {"x": 1}}, "'x' is no partition"),
        ({"since": {-1: 1}}, "-1 is no partition"),
        ({"since": {"-1": 1}}, "'-1' is no partition"),
        ({"since": {256: 1}}, "256 is no partition"),
        ({"since": {10**5000: 1}}, "a larger int is no partition"),
        ({"since": {1: 1, "1": 1}}, "partition 1 is there twice"),
        ({"since": {True: 1}}, "True is no partition"),
        ({"since": {1: -1}}, "partition 1 must be a whole number from 0, not -1"),
        ({"since": {1: "7"}}, "not '7'"),
        ({"since": {1: 1.0}}, "not 1.0"),
        ({"since": {1: 2**63}}, "not 9223372036854775808"),
        ({"since": {1: False}}, "not False"),
        ({"buffer": 0}, "buffer must be a whole number from 1"),
        ({"buffer": 10**6}, "buffer must be"),
        ({"buffer": None}, "buffer must be"),
    ],
)
async def test_bad_arguments_are_named(client, instance, arguments, words):
    """At once, and nothing is asked."""
    with pytest.raises(InvalidRequestError, match=words.replace("^", r"\^")):
        client.alerts.subscribe(**arguments)
    if "since" in arguments:
        with pytest.raises(InvalidRequestError):
            await client.list_alerts(since=arguments["since"])
    assert instance.fetches == []


async def test_a_partition_that_the_cluster_has_not(client):
    """Known only once the client is connected."""
    with pytest.raises(InvalidRequestError, match="no partition 4 among the cluster's 4"):
        async with client.alerts.subscribe(since={"4": 0}):
            pass


async def test_a_consumer_that_falls_behind(client, log, instance):
    """Reading stops, what didn't fit is read again, and nothing is lost or out of order."""
    async with client.alerts.subscribe(buffer=4) as sub:
        for account in range(100):
            log.add(account)
        await until(lambda: sub.dropped() > 0)
        n_asked = len(instance.fetches)
        log.add(*range(100, 200))
        found = await take(sub, 200)
        assert found == list(range(200))
        assert n_asked <= 8
        assert await sub.next(timeout=0) is None
        assert sub.offsets()["0"] == 200
    dropped = sub.dropped()
    assert 0 < dropped <= 8


async def test_reading_stops_while_nobody_takes(client, log, instance):
    """However many alerts come: the instance isn't asked for what nobody can take."""
    async with client.alerts.subscribe(buffer=2, since={}) as sub:
        log.add(*range(10))
        await until(lambda: sub.dropped() > 0)
        asked = len(instance.fetches)
        for account in range(10, 1_000):
            log.add(account)
        for _ in range(50):
            await asyncio.sleep(0)
        assert len(instance.fetches) == asked
        assert await take(sub, 1_000) == list(range(1_000))


async def test_long_polls_that_end_without_a_match_go_on_from_where_they_came(client, log, instance):
    """The cursor moves past what doesn't match, also while the consumer waits."""
    async with client.alerts.subscribe(account_ids=[1]) as sub:
        waiting = asyncio.create_task(sub.next())
        log.add(9, 9, 9)
        await until(lambda: instance.waiting)
        instance.release()
        await until(lambda: instance.fetches[-1].since.get(0) == 3)
        assert sub.offsets()["0"] == 3
        log.add(1)
        assert (await waiting).account_id == 1


async def test_another_instance_goes_on(gateway, log, instance):
    """When an instance dies, the next answers from the cursor; when all are gone, the first that is back does."""
    async with FakeAlerts(log) as other, AsyncClient([gateway.address], timeout=5) as client:
        gateway.alerts_addresses = [instance.address, other.address]
        log.add(1)
        async with client.alerts.subscribe(since={}) as sub:
            assert await take(sub, 1) == [1]
            await until(lambda: instance.waiting or other.waiting)
            first = instance if instance.waiting else other
            port = first.port
            await first.stop()
            log.add(2)
            assert await take(sub, 1) == [2]
            await until(lambda: sub.error is None)
            second = other if first is instance else instance
            await second.stop()
            log.add(3)
            await until(lambda: sub.error is not None)
            await first.start(port)
            assert await take(sub, 1) == [3]
            assert sub.error is None
            await first.stop()
            await until(lambda: sub.error is not None)
            await first.start(port)
            await until(lambda: sub.error is None)  # though no alert comes


async def test_an_instance_at_a_new_address_is_found(gateway, log, instance, client):
    """When none that is known answers, the gateway is asked who is there by now."""
    async with client.alerts.subscribe(since={}) as sub:
        await until(lambda: instance.waiting)
        await instance.stop()
        async with FakeAlerts(log) as fresh:
            gateway.alerts_addresses = [fresh.address]
            log.add(5)
            assert await take(sub, 1) == [5]


async def test_gateways_that_are_gone_delay_nobody(gateway, log, instance, client):
    """Once connected, subscriptions need the alerts service only."""
    async with client.alerts.subscribe(since={}) as sub:
        await until(lambda: instance.waiting)
        port = instance.port
        await gateway.stop()
        await instance.stop()
        await until(lambda: sub.error is not None)
        await instance.start(port)
        for account in range(5):
            log.add(account)
            assert await take(sub, 1) == [account]


async def test_clients_spread_over_instances(gateway, log, instance):
    """Though all know the same gateway."""
    async with FakeAlerts(log) as other:
        gateway.alerts_addresses = [instance.address, other.address]
        for seed in range(20):
            client = AsyncClient([gateway.address], _rng=random.Random(seed))
            async with client, client.alerts.subscribe():
                pass
        assert len(instance.fetches) > 3
        assert len(other.fetches) > 3


async def test_errors_that_pass_are_waited_out(client, log, instance):
    """Lost connections, retriable errors, partitions without a leader, an overloaded service."""
    instance.script.extend(
        [
            None,
            WireError(int(ErrorCode.NOT_LEADER), True, "moving"),
            WireError(int(ErrorCode.PARTITION_DAMAGED), False, "damaged"),
            WireError(int(ErrorCode.OVERLOADED), True, "too many", {"retry_after_ms": 30}),
            m.AlertsBatch([], {}),
        ]
    )
    async with client.alerts.subscribe(since={}) as sub:
        log.add(1)
        assert await take(sub, 1) == [1]
        assert not instance.script


async def test_errors_that_stay_are_raised(client, log, instance):
    """After what was read before; and again whenever asked."""
    log.add(1)
    async with client.alerts.subscribe(since={}) as sub:
        await until(lambda: instance.waiting)
        instance.script.append(WireError(int(ErrorCode.INVALID_ARGUMENT), False, "no such thing"))
        log.add(2)
        await until(lambda: sub.error is not None)
        assert await take(sub, 2) == [1, 2]
        for _ in range(2):
            with pytest.raises(InvalidRequestError, match="no such thing"):
                await sub.next()
        with pytest.raises(InvalidRequestError):
            async for _ in sub:
                pass
        assert sub.offsets()["0"] == 2


async def test_a_bad_filter_is_refused_when_entering(client, instance):
    """Where entering asks the service."""
    instance.script.append(WireError(int(ErrorCode.INVALID_ARGUMENT), False, "no such thing"))
    with pytest.raises(InvalidRequestError, match="no such thing"):
        async with client.alerts.subscribe():
            pass


async def test_no_service(gateway, client):
    """Without a cursor there is nothing to begin with; with one the subscription waits for a service."""
    gateway.alerts_addresses = []
    async with AsyncClient([gateway.address], timeout=0.1) as hasty:
        with pytest.raises(UnavailableError, match="has no alerts service"):
            await hasty.alerts.subscribe().__aenter__()
        async with hasty.alerts.subscribe(since={}) as sub:
            assert await sub.next(timeout=0.05) is None
            assert "no alerts service" in sub.error.message


async def test_closing_the_client_ends_subscriptions(client, log):
    """At once, with an error that says so, whatever was read ahead."""
    log.add(1, 2, 3)
    sub = client.alerts.subscribe(since={})
    idle = client.alerts.subscribe()
    await idle.__aenter__()
    waiting = asyncio.create_task(idle.next())
    assert await take(sub, 1) == [1]
    await client.close()
    with pytest.raises(UnavailableError, match="client is closed"):
        await waiting
    with pytest.raises(UnavailableError, match="client is closed"):
        await sub.next()
    assert sub.offsets() == {}
    await sub.close()
    with pytest.raises(UnavailableError, match="client is closed"):
        await client.alerts.subscribe(since={}).next()


async def test_closing_ends_an_iteration(client, log):
    """From another task; what was read ahead isn't given out any more."""
    sub = client.alerts.subscribe(since={})

    async def collect():
        return [alert.account_id async for alert in sub]

    task = asyncio.create_task(collect())
    log.add(1)
    await until(lambda: sub.offsets().get("0") == 1)
    await sub.close()
    assert await task == [1]


async def test_a_wait_that_is_cancelled_loses_nothing(client, log, instance):
    """Neither by a timeout nor by a cancelled task."""
    async with client.alerts.subscribe() as sub:
        await until(lambda: instance.waiting)
        for account in range(50):
            task = asyncio.create_task(sub.next())
            await asyncio.sleep(0)
            log.add(account)
            for _ in range(account % 7):
                await asyncio.sleep(0)
            task.cancel()
            found = await asyncio.gather(task, return_exceptions=True)
            alert = found[0]
            if isinstance(alert, asyncio.CancelledError):
                alert = await sub.next()
            assert alert.account_id == account


async def test_one_task_iterates(client, log):
    """Two would not know which alert is done with."""
    async with client.alerts.subscribe() as sub:
        task = asyncio.create_task(sub.next())
        await asyncio.sleep(0)
        with pytest.raises(InvalidRequestError, match="another task"):
            await sub.next()
        log.add(1)
        assert (await task).account_id == 1


async def test_a_silent_instance_is_given_up(gateway, log, instance, monkeypatch):
    """One that takes the question, answers pings and says no more: another one is asked."""
    monkeypatch.setattr(_reader, "WAIT_SECONDS", 0.02)
    monkeypatch.setattr(_reader, "ANSWER_SECONDS", 0.02)
    async with FakeAlerts(log) as other, AsyncClient([gateway.address], timeout=5) as client:
        gateway.alerts_addresses = [instance.address, other.address]
        instance.answer_held = instance.release = lambda: None
        async with client.alerts.subscribe(since={}) as sub:
            await until(lambda: instance.waiting)
            await until(lambda: other.waiting)
            log.add(1)
            assert await take(sub, 1) == [1]


async def test_held_questions_are_no_silence(gateway, log, instance, monkeypatch):
    """A link that only waits for alerts is pinged, answered, and kept."""
    monkeypatch.setattr("tallymark._gateways.SILENCE_PING", 0.01)
    monkeypatch.setattr("tallymark._gateways.SILENCE_MAX", 0.2)
    monkeypatch.setattr("tallymark._gateways.TEND_SECONDS", 0.01)
    async with AsyncClient([gateway.address], timeout=5) as client, client.alerts.subscribe(since={}) as sub:
        assert await sub.next(timeout=0.5) is None
        assert len(instance.fetches) == 1
        assert sub.error is None


async def test_a_defect_of_the_reader_reaches_the_consumer(client, log, instance):
    """Nobody waits for ever."""
    async with client.alerts.subscribe(since={}) as sub:
        sub._reader._feed = None
        with pytest.raises(ServerError, match="the subscription failed"):
            await sub.next()


async def test_many_subscriptions_share_a_connection(client, log, instance):
    """Each with its own filter and cursor."""
    subs = [client.alerts.subscribe(account_ids=[n], since={}) for n in range(200)]
    for sub in subs:
        await sub.__aenter__()
    await until(lambda: len(instance.waiting) == 200)
    log.add(*range(200))
    assert [(await sub.next(timeout=5)).account_id for sub in subs] == list(range(200))
    assert len(instance.peers) == 1
    for sub in subs:
        await sub.close()


async def test_an_instance_that_goes_away(client, log, instance):
    """It says so, its held questions are answered, and the next question finds it gone without a storm."""
    async with client.alerts.subscribe(since={}) as sub:
        await until(lambda: instance.waiting)
        instance.script.extend([lambda call: m.AlertsBatch([], call.since)] * 5)
        instance.release()
        await until(lambda: not instance.script)
        log.add(1)
        assert await take(sub, 1) == [1]
