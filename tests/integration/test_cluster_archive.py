"""A real cluster that archives all the time and drops its logs, while its processes are killed and lose their disks.

After each fault everything is read again and compared with what was acknowledged, as in `test_cluster_faults`: by now
most of it is in archives only. A store that has lost its disk gets what the others' logs no longer have as snapshots,
with the archive files that belong to them.
"""

import asyncio

import pytest
from cluster import PARTITIONS, Cluster, Store
from cluster_load import World

from tallymark import AsyncClient, MetricSchema
from tallymark_store.archive.manifest import NAME, Manifest, decode

pytestmark = pytest.mark.timeout(900)  # the first start compiles the kernels

ARCHIVING = {"archive": "on", "archive_events": 50, "archive_interval_seconds": 0.3, "memory_bytes": 1}
WAIT_SECONDS_MAX = 120.0
POLL_SECONDS = 0.05
FILLER_ACCOUNTS = range(10**6, 10**6 + 1_000)  # none that the load has
FILLER_CALLS = 4


def first_segment(store: Store) -> int:
    """The lowest segment that a store's log has."""
    names = [path.name for path in (store.data / "store" / "wal").glob("wal-*.seg")]
    return min((int(name.removeprefix("wal-").removesuffix(".seg")) for name in names), default=0)


def archives(store: Store) -> list[Manifest]:
    """A store's archives."""
    found = sorted((store.data / "store" / "archive").glob(f"p-*/{NAME}"))
    return [decode(path.read_bytes()) for path in found]


async def drop_logs(cluster: Cluster, client: AsyncClient) -> int:
    """Send until every store has dropped some more of its log; return how many events that took."""
    before = {store.node_id: first_segment(store) for store in cluster.stores}
    sent = 0
    try:
        async with asyncio.timeout(WAIT_SECONDS_MAX):
            while any(first_segment(store) <= before[store.node_id] for store in cluster.stores):
                for _ in range(FILLER_CALLS):
                    receipt = await client.ingest_columns(
                        "filler",
                        account_ids=list(FILLER_ACCOUNTS),
                        properties={"text": "x" * 500},
                        ids=[f"{sent}-{account}" for account in FILLER_ACCOUNTS],
                        timeout=WAIT_SECONDS_MAX,
                    )
                    assert receipt.n_stored == len(FILLER_ACCOUNTS)
                    sent += receipt.n_stored
                await asyncio.sleep(POLL_SECONDS)  # checkpoints and archiving go on beside it
    except TimeoutError:
        raise AssertionError(f"logs are not dropped: {before}") from None
    return sent


async def check_filler(client: AsyncClient, sent: int) -> None:
    """Every account has its events, each once, whether they are in logs or in archives by now."""
    for account in FILLER_ACCOUNTS[::100]:
        events = [event async for event in client.list_events(account, 0, 2**62, page_size=10_000)]
        assert sorted(event.id for event in events) == sorted(
            f"{first}-{account}" for first in range(0, sent, len(FILLER_ACCOUNTS))
        )


async def test_archiving_and_recycling_under_faults(tmp_path):
    """Logs dropped, a leader killed, a disk lost: what is read afterwards comes from archives, and is all there."""
    cluster = Cluster(tmp_path, settings=ARCHIVING)
    world = World(cluster, 300)
    try:
        await world.start()
        async with world.load(), AsyncClient(cluster.addresses) as client:
            await client.metrics.create(MetricSchema(code="filler"))
            sent = await drop_logs(cluster, client)

        async with world.load():
            victim = await cluster.busiest()
            victim.kill()
            await world.wait_acknowledged()
            await cluster.wait_deposed(victim)
            await victim.start()

        async with world.load():
            victim = await cluster.busiest()
            victim.kill()
            victim.wipe()
            await victim.start()
            await world.wait_acknowledged()
        # Its archives are whole, though nobody's log was: what was dropped came along, and nothing was left out.
        assert victim.output().count("began with the snapshot of offset") >= PARTITIONS
        found = archives(victim)
        assert len(found) == PARTITIONS
        assert all(manifest.files for manifest in found)
        assert all(manifest.start_offset == 0 for manifest in found)

        # Now a majority needs it, and it leads some of the partitions.
        async with world.load(), AsyncClient(cluster.addresses) as client:
            other = next(store for store in cluster.stores if store is not victim)
            other.kill()
            await cluster.wait_deposed(other)
            await world.wait_acknowledged()
            await check_filler(client, sent)
            await other.start()
    finally:
        cluster.close()
