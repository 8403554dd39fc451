"""Subscriptions and webhooks of the blocking client: from any thread, interruptible, closable from another."""

import asyncio
import os
import signal
import threading

import pytest
from fake_alerts import AlertLog, FakeAlerts
from fake_gateway import FakeGateway

from tallymark import Client, InvalidRequestError, UnavailableError
from tallymark_protocol import messages as m


class Served:
    """A gateway and an alerts instance on a loop of their own, in a thread."""

    def __init__(self):
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        self.log = AlertLog()
        self.instance = FakeAlerts(self.log)
        self.gateway = FakeGateway()
        self.run(self.instance.start())
        self.run(self.gateway.start())
        self.gateway.alerts_addresses = [self.instance.address]

    def run(self, work):
        """Run a coroutine there."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()

    def add(self, *accounts, **place):
        """Raise alerts."""

        async def add():
            self.log.add(*accounts, **place)

        self.run(add())

    def end(self):
        """Stop all."""
        self.run(self.gateway.stop())
        self.run(self.instance.stop())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


@pytest.fixture
def served():
    """A cluster that says little."""
    running = Served()
    yield running
    running.end()


@pytest.fixture
def client(served):
    """A client connected to it."""
    with Client([served.gateway.address], timeout=5) as connected:
        yield connected


def test_iteration(client, served):
    """Alerts in order, offsets that cover what is done with, and going on from there."""
    served.add(*range(200))
    found = []
    with client.alerts.subscribe(since={}) as sub:
        for alert in sub:
            found.append(alert.account_id)
            if len(found) == 200:
                break
        assert sub.offsets()["0"] == 199
        assert sub.next(timeout=0) is None
        assert sub.offsets() == {"0": 200, "1": 0, "2": 0, "3": 0}
        assert sub.error is None
    assert found == list(range(200))
    with client.alerts.subscribe(since={"0": 198}) as sub:
        assert [sub.next(timeout=5).account_id for _ in range(2)] == [198, 199]


def test_what_is_raised_after_entering_is_delivered(client, served):
    """The end is pinned when the subscription is entered."""
    served.add(1)
    with client.alerts.subscribe() as sub:
        served.add(2)
        assert sub.next(timeout=5).account_id == 2


def test_a_consumer_that_falls_behind(client, served):
    """Reading stops, and goes on when the thread takes alerts again."""
    with client.alerts.subscribe(buffer=3) as sub:
        for account in range(60):
            served.add(account)
        assert [sub.next(timeout=5).account_id for _ in range(60)] == list(range(60))
        assert sub.dropped() > 0
        served.add(60)
        assert sub.next(timeout=5).account_id == 60


def test_closed_from_another_thread(client, served):
    """An iteration ends, a single wait says why."""
    with client.alerts.subscribe() as sub:
        threading.Timer(0.05, sub.close).start()
        assert list(sub) == []
        with pytest.raises(UnavailableError, match="subscription is closed"):
            sub.next()
    sub.close()
    never = client.alerts.subscribe()
    never.close()
    assert list(never) == []


def test_closing_the_client_ends_subscriptions(client, served):
    """From another thread, while one waits."""
    sub = client.alerts.subscribe().__enter__()
    threading.Timer(0.05, client.close).start()
    with pytest.raises(UnavailableError, match="client is closed"):
        sub.next()
    sub.close()
    with pytest.raises(UnavailableError, match="client is closed"):
        client.alerts.subscribe().__enter__()


def test_interrupted(client, served):
    """Ctrl-C ends a wait, and loses nothing."""
    served.add(*range(5))

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with client.alerts.subscribe(since={}) as sub:
            assert [sub.next(timeout=5).account_id for _ in range(5)] == list(range(5))
            timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGUSR1))
            timer.start()
            with pytest.raises(KeyboardInterrupt):
                sub.next()
            served.add(5)
            assert sub.next(timeout=5).account_id == 5
            assert sub.offsets()["0"] == 5
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_one_thread_iterates(client, served):
    """Two would not know which alert is done with."""
    with client.alerts.subscribe() as sub:
        found = []
        thread = threading.Thread(target=lambda: found.append(sub.next()))
        thread.start()
        while not sub._is_taking:
            thread.join(0.001)
        with pytest.raises(InvalidRequestError, match="another thread"):
            sub.next(timeout=0)
        served.add(1)
        thread.join()
        assert found[0].account_id == 1


def test_threads_have_subscriptions_of_their_own(client, served):
    """One client serves them all."""
    found = {}

    def work(account):
        with client.alerts.subscribe(account_ids=[account], since={}) as sub:
            found[account] = [sub.next(timeout=5).position for _ in range(10)]

    threads = [threading.Thread(target=work, args=(account,)) for account in range(8)]
    for thread in threads:
        thread.start()
    for _ in range(10):
        served.add(*range(8))
    for thread in threads:
        thread.join()
    assert found == {account: list(range(account, 80, 8)) for account in range(8)}


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_fork(client, served):
    """A child's copy says whose it is; its client goes on; the parent's subscription doesn't notice."""
    served.add(1)
    with client.alerts.subscribe(since={}) as sub:
        assert sub.next(timeout=5).account_id == 1
        child = os.fork()
        if child == 0:
            status = 1
            try:
                try:
                    sub.next(timeout=0)
                except UnavailableError as error:
                    status = 0 if "parent process" in error.message else 2
                sub.close()
                with client.alerts.subscribe(since={}) as own:
                    status = status or (0 if own.next(timeout=5).account_id == 1 else 3)
            finally:
                os._exit(status)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        served.add(2)
        assert sub.next(timeout=5).account_id == 2


def test_webhooks(client, served):
    """The same calls as with the asynchronous client."""
    info = m.WebhookInfo("w1", "https://example.com/a", [], ["m"], "", 5_000, secret="whsec_x")
    served.instance.answers[m.WebhookCreate] = m.WebhooksResult([info])
    served.instance.answers[m.WebhookList] = m.WebhooksResult([info])
    served.instance.answers[m.WebhookDelete] = m.WebhooksResult([info])
    served.instance.answers[m.WebhookDeadLetters] = m.DeadLettersResult([], 0)
    served.instance.answers[m.WebhookRedeliver] = m.WebhooksResult([info])
    assert client.webhooks.create("https://example.com/a", metric_codes="m").secret == "whsec_x"
    assert client.webhooks.list()[0].id == "w1"
    assert client.webhooks.get("w1").url == "https://example.com/a"
    assert client.webhooks.dead_letters("w1") == []
    assert client.webhooks.redeliver("w1").id == "w1"
    client.webhooks.delete("w1")
    assert [type(call) for call in served.instance.calls] == [
        m.WebhookCreate,
        m.WebhookList,
        m.WebhookList,
        m.WebhookDeadLetters,
        m.WebhookRedeliver,
        m.WebhookDelete,
    ]
