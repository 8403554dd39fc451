"""A store that is back before anyone has noticed that it was gone."""

import pytest
from cluster import Cluster
from cluster_load import World

pytestmark = pytest.mark.timeout(600)  # the first start compiles the kernels


async def test_restarted_within_its_lease(tmp_path):
    """A leader killed and back while etcd still holds its key: it leads again only under a new epoch."""
    cluster = Cluster(tmp_path, settings={"lease_ttl_seconds": 20.0})
    world = World(cluster, 100)
    try:
        await world.start()
        async with world.load():
            victim = await cluster.busiest()
            victim.kill()
            before = await cluster.epochs()
            led = [number for number, (node, _) in before.items() if node == victim.node_id]
            assert led, "etcd has not noticed yet"
            await victim.start()
            await world.wait_acknowledged()
        await cluster.wait_leaders()
        after = await cluster.epochs()
        for number in led:
            assert after[number][1] > before[number][1], f"partition {number} goes on in a dead life's epoch"
    finally:
        cluster.close()
