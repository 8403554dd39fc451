"""etcd put back to an old state, as from a backup: what it forgot is never given a second time.

Epochs and metrics' identities come from its revisions, which start again lower. The stores notice, say what to do and
don't start; `tallymark cluster recover` raises the base, and everything that was ever acknowledged is still there.
"""

import asyncio
import json
import shutil
import sys

import pytest
from cluster_load import World
from processes import POLL_SECONDS

from tallymark import AsyncClient, MetricSchema
from tallymark_runtime.catalog import METRICS, metric_of

pytestmark = pytest.mark.timeout(600)  # the first start compiles the kernels

NOTICE_SECONDS_MAX = 60


async def recover(address: str) -> int:
    """Run `tallymark cluster recover`; return the new base."""
    command = ("-m", "tallymark_node.main", "--server", address, "--json", "cluster", "recover", "--yes")
    process = await asyncio.create_subprocess_exec(
        sys.executable, *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    return json.loads(out)["epoch_base"]


async def uids(world: World) -> dict[str, int]:
    """The identity of every metric."""
    return {
        (record := metric_of(item)).schema.code: record.uid
        for item in await world.cluster.coordinated(METRICS)
    }


async def wait_refused(world: World) -> None:
    """Wait until every store has ended, and has said why and what to do."""
    try:
        async with asyncio.timeout(NOTICE_SECONDS_MAX):
            while any(store.alive for store in world.cluster.stores):  # noqa: ASYNC110
                await asyncio.sleep(POLL_SECONDS)
    except TimeoutError:
        raise AssertionError("a store runs, though etcd has forgotten what its log knows") from None
    for store in world.cluster.stores:
        assert "ready" not in store.output()
        assert "`tallymark cluster recover`" in store.output()


async def test_etcd_put_back_to_an_old_state(world):
    """A backup, then more epochs and a metric, then the backup again: refused, recovered, and nothing is lost."""
    cluster = world.cluster
    backup = world.folder / "etcd-backup"
    async with world.load():
        cluster.etcd.kill()
        shutil.copytree(cluster.etcd.data, backup)
        await cluster.etcd.start()
    async with AsyncClient(cluster.addresses) as client:
        await client.metrics.create(MetricSchema(code="lost"))
    known = await uids(world)
    async with world.load():
        for store in cluster.stores:  # each leads something, so epochs rise
            store.kill()
            await cluster.wait_deposed(store)
            await store.start()
    highest = max(epoch for _, epoch in (await cluster.epochs()).values())

    world.sound = False
    for process in cluster.processes:
        process.kill()
    shutil.rmtree(cluster.etcd.data)
    shutil.copytree(backup, cluster.etcd.data)
    await cluster.etcd.start()
    for store in cluster.stores:
        store.spawn()
    await wait_refused(world)

    await cluster.gateways[0].start()
    base = await recover(cluster.gateways[0].address)
    assert base > max(highest, *known.values())
    for process in (*cluster.stores, cluster.gateways[1], cluster.query):
        process.spawn()
    await asyncio.gather(*(p.wait_ready() for p in (*cluster.stores, cluster.gateways[1], cluster.query)))
    await cluster.wait_writable()
    assert all(epoch > base for _, epoch in (await cluster.epochs()).values())
    async with AsyncClient(cluster.addresses) as client:
        await client.metrics.create(MetricSchema(code="new"))
    now = await uids(world)
    assert now.pop("new") > base
    assert now == {code: uid for code, uid in known.items() if code != "lost"}
    async with world.load():
        pass
