"""Calls of several chunks of which only some come through: whoever calls again counts nothing twice."""

import asyncio

import pytest
from fake_gateway import FakeGateway, silent, until

from tallymark import AsyncClient, Event, IngestError
from tallymark_protocol import limits

COUNT = limits.CHUNK_METRICS_MAX + 10  # events, each of its own metric: two chunks


def events_of_two_chunks():
    """Events that don't fit into one chunk."""
    return [Event(account_id=i % 10, metric_code=f"m{i}", value=i) for i in range(COUNT)]


@pytest.mark.parametrize("again", ["retry", "same events", "same events, twice"])
async def test_half_answered(again):
    """The first chunk is stored, the second gets no answer: the second call settles it all, once."""
    async with FakeGateway() as gateway, AsyncClient([f"127.0.0.1:{gateway.port}"]) as client:
        events = events_of_two_chunks()
        gateway.script += [FakeGateway.store, silent]
        with pytest.raises(IngestError) as failed:
            await client.ingest(events, timeout=0.3)
        assert 0 < failed.value.receipt.n_stored == gateway.cluster.n_stored < COUNT
        if again == "same events, twice":
            gateway.script.append(silent)
            with pytest.raises(IngestError) as failed:
                await client.ingest(events, timeout=0.3)
        gateway.script.clear()
        receipt = await (failed.value.retry() if again == "retry" else client.ingest(events))
        assert receipt.n_stored == COUNT == gateway.cluster.n_stored
        assert len(set(receipt.offsets)) == COUNT
        # What has been settled is over: the same objects now say something new.
        assert (await client.ingest(events)).n_stored == COUNT
        assert gateway.cluster.n_stored == 2 * COUNT


async def test_half_answered_and_cancelled():
    """The same for a call that was cancelled."""
    async with FakeGateway() as gateway, AsyncClient([f"127.0.0.1:{gateway.port}"]) as client:
        events = events_of_two_chunks()
        gateway.script += [FakeGateway.store, silent]
        call = asyncio.create_task(client.ingest(events))
        await until(lambda: gateway.cluster.n_stored and not gateway.script)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        receipt = await client.ingest(events)
        assert receipt.n_stored == COUNT == gateway.cluster.n_stored
