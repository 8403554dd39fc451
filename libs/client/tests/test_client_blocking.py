"""The blocking client: the same answers, from threads without a loop."""

import asyncio
import os
import threading

import fake_gateway as fake
import pytest
from fake_gateway import FakeGateway

from tallymark import Client, Event, InvalidRequestError, UnavailableError, current_month
from tallymark_protocol import messages as m


@pytest.fixture
def gateway():
    """A gateway on a loop of its own, in a thread."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    running = FakeGateway()
    asyncio.run_coroutine_threadsafe(running.start(), loop).result()
    yield running
    asyncio.run_coroutine_threadsafe(running.stop(), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.fixture
def client(gateway):
    """A blocking client connected to it."""
    with Client([gateway.address], timeout=5) as connected:
        yield connected


def test_ingest(client, gateway):
    """Events, columns and bad events, as with the asynchronous client."""
    receipt = client.ingest([Event(1, "m"), Event(-1, "m"), Event(2, "m")])
    assert (receipt.n_stored, receipt.n_rejected) == (2, 1)
    assert client.ingest_columns("m", account_ids=[3, 4]).n_stored == 2
    assert client.ingest(Event(i, "m") for i in (5, 6)).n_stored == 2
    assert gateway.cluster.counted() == [1, 2, 3, 4, 5, 6]


def test_many_threads(client, gateway):
    """Threads share one client; each call gets its own answer."""
    counts = []

    def work(first):
        counts.extend(client.ingest([Event(first + i, "m")]).n_stored for i in range(25))

    threads = [threading.Thread(target=work, args=(n * 25,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(counts) == 200
    assert gateway.cluster.counted() == list(range(200))


def test_retry_is_blocking(client, gateway):
    """An exception's retry() returns the receipt itself, or raises again."""
    gateway.script.extend([fake.silent_after, fake.silent])
    with pytest.raises(UnavailableError) as caught:
        client.ingest(Event(1, "m"), timeout=0.02)
    assert caught.value.receipt.unknown == [0]
    with pytest.raises(UnavailableError) as again:
        caught.value.retry(timeout=0.02)
    assert again.value.retry().n_stored == 1
    assert gateway.cluster.counted() == [1]


def test_same_events_again(client, gateway):
    """Calling again with the same objects counts once."""
    gateway.script.append(fake.silent_after)
    sent = [Event(1, "m"), Event(2, "m")]
    with pytest.raises(UnavailableError):
        client.ingest(sent, timeout=0.02)
    assert client.ingest(sent).n_stored == 2
    assert gateway.cluster.counted() == [1, 2]


def test_queries(client, gateway):
    """Queries, metrics and the iterator of events."""
    gateway.answers[m.QueryTotals] = m.QueryResult([], 0, 1)
    gateway.answers[m.MetricList] = m.MetricsResult([])
    records = [m.EventRecord(1, "m", i, 0, 0, 0, {}, None, 0, i) for i in range(5)]

    def page(call):
        start = int(call.cursor or 0)
        end = start + call.limit
        return m.EventsPage(records[start:end], str(end) if end < 5 else "")

    gateway.answers[m.QueryEvents] = page
    assert client.query(1, "m", current_month()).value.count == 0
    assert client.metrics.list() == []
    for size in (1, 2, 5, 10):
        assert [event.offset for event in client.list_events(1, 0, 10, page_size=size)] == list(range(5))
    with pytest.raises(InvalidRequestError, match="page_size"):
        next(client.list_events(1, 0, 10, page_size=0))


def test_life(gateway):
    """Before connecting and after closing, calls say what is wrong; closing twice is fine."""
    client = Client(gateway.address)
    with pytest.raises(InvalidRequestError, match="isn't connected"):
        client.ingest(Event(1, "m"))
    client.connect()
    client.ingest(Event(1, "m"))
    client.close()
    client.close()
    with pytest.raises(UnavailableError, match="closed"):
        client.ingest(Event(1, "m"))
    with pytest.raises(UnavailableError, match="closed"):
        client.connect()


async def test_not_connected_after_a_failed_connect():
    """What to do about it is said for code without an event loop."""
    address = FakeGateway()
    await address.start()
    await address.stop()
    client = Client(address.address)
    with pytest.raises(UnavailableError):
        client.connect(timeout=0.01)
    with pytest.raises(InvalidRequestError, match=r"use `with`, or call connect\(\)"):
        client.ingest(Event(1, "m"))
    client.close()


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_fork(client, gateway):
    """A child uses its copy with a connection, a thread and an identity of its own."""
    client.ingest(Event(1, "m"))
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = 0 if client.ingest(Event(2, "m")).n_stored == 1 else 2
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert client.ingest(Event(3, "m")).n_stored == 1
    assert gateway.cluster.counted() == [1, 2, 3]
    assert len({producer for producer, _, _ in gateway.cluster.first}) == 2
