"""Real processes of a cluster killed, halted, restarted and robbed of their disks, under load.

After each fault: nothing that was acknowledged is lost or has moved, nothing is doubled, every total is what was
acknowledged, no read has shown less than was acknowledged before it, no call with time enough has failed, and all
copies of a partition have the same state, which is what their logs say. Invariants LOG-1, LOG-2, DEDUP-1, FOLD-1,
READ-1 and LIVE-1, from outside.
"""

import asyncio

import pytest
from cluster import Cluster
from cluster_load import World

from tallymark_runtime.assignments import COPIES

pytestmark = pytest.mark.timeout(600)  # the first start compiles the kernels


async def test_leaders_killed(world):
    """`kill -9` of the store that leads most, again and again: the others take over, and it comes back."""
    for _ in range(2):
        async with world.load():
            victim = await world.cluster.busiest()
            victim.kill()
            await world.wait_acknowledged()
            await world.cluster.wait_deposed(victim)
            await victim.start()


async def test_all_stores_killed(world):
    """`kill -9` of all stores at once: every acknowledged event is on the disks they start from."""
    async with world.load():
        for store in world.cluster.stores:
            store.kill()
        await world.wait_refused()
        await asyncio.gather(*(store.start() for store in world.cluster.stores))


async def test_halted_for_longer_than_the_lease(world):
    """SIGSTOP of a leader until others lead in its place, then SIGCONT: it finds itself deposed and harms nothing."""
    async with world.load():
        victim = await world.cluster.busiest()
        victim.halt()
        await world.cluster.wait_deposed(victim)
        await world.wait_acknowledged()
        victim.go_on()


async def test_etcd_killed_and_restarted(world):
    """etcd gone for so long that every lease has ended: writes stop, and go on without help once it is back."""
    async with world.load():
        world.cluster.etcd.kill()
        await world.wait_acknowledged()  # the leases are still good
        await world.wait_refused()  # now they aren't
        await world.cluster.etcd.start()


async def test_etcd_restarted_at_once(world):
    """etcd killed and back before a lease has ended."""
    async with world.load():
        world.cluster.etcd.kill()
        await world.cluster.etcd.start()


async def test_disk_wiped(world):
    """A store comes back with an empty disk: as new copies, which count for nothing until they have everything."""
    async with world.load():
        victim = await world.cluster.busiest()
        suffix = b"/" + victim.node_id.encode()
        before = await copies(world.cluster, suffix)
        victim.kill()
        victim.wipe()
        await victim.start()
        await world.wait_acknowledged()
    after = await copies(world.cluster, suffix)
    assert after.keys() == before.keys()
    assert not set(after.values()) & set(before.values()), "a wiped copy has come back under its old id"
    # Now a majority needs it: nothing of the load below is acknowledged without it.
    async with world.load():
        other = next(store for store in world.cluster.stores if store is not victim)
        other.kill()
        await world.wait_acknowledged()
        await other.start()


async def copies(cluster: Cluster, suffix: bytes) -> dict[bytes, bytes]:
    """The copy ids registered for a node, by key."""
    found = await cluster.coordinated(COPIES)
    return {item.key: item.value for item in found if item.key.endswith(suffix)}


async def test_graceful_stop(world):
    """SIGTERM of each store in turn: status 0, leadership handed over, and nobody notices but by waiting."""
    async with world.load():
        for store in world.cluster.stores:
            assert await store.stop() == 0
            await world.wait_acknowledged()
            await store.start()


async def test_gateways_killed(world):
    """`kill -9` of one gateway, then of the other: callers go on through the one that lives."""
    async with world.load():
        for gateway in world.cluster.gateways:
            gateway.kill()
            await world.wait_acknowledged()
            await gateway.start()


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
