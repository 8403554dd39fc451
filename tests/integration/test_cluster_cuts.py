"""Cuts in the network between stores, and between a leader and etcd, one way and both ways, under load.

Who is cut off from a majority loses its leadership, wherever it still has its key; who can talk to a majority takes
writes. After each cut has healed everything holds that `test_cluster_faults` asks for.
"""

import pytest
from cluster_load import Worlds
from network import Network

pytestmark = pytest.mark.timeout(600)  # the first start compiles the kernels

STORES = ("store-1", "store-2", "store-3")


@pytest.fixture(scope="module")
def network():
    """A network of this module's own."""
    network = Network(("etcd", *STORES))
    yield network
    network.close()


@pytest.fixture(scope="module")
def worlds(tmp_path_factory, network):
    """Clusters in that network."""
    worlds = Worlds(tmp_path_factory, places=network.places)
    yield worlds
    worlds.close()


@pytest.fixture
async def world(worlds, network):
    """A cluster in which everyone reaches everyone."""
    network.heal()
    return await worlds.take()


@pytest.mark.parametrize("deaf", ["both ways", "unheard", "deaf"])
async def test_leader_cut_off_from_the_other_stores(world, network, deaf):
    """A leader that still has etcd and its clients, but no majority: it gives its keys up, and others lead.

    Unheard: what it sends is lost. Deaf: what it is sent is lost.
    """
    async with world.load():
        victim = await world.cluster.busiest()
        for other in STORES:
            if other != victim.node_id:
                if deaf != "deaf":
                    network.cut(victim.node_id, other)
                if deaf != "unheard":
                    network.cut(other, victim.node_id)
        await world.cluster.wait_deposed(victim)
        await world.wait_acknowledged()
        network.heal()


@pytest.mark.parametrize("deaf", ["both ways", "unheard", "deaf"])
async def test_leader_cut_off_from_etcd(world, network, deaf):
    """A leader that can't renew its lease: others lead once it has ended, and it follows them."""
    async with world.load():
        victim = await world.cluster.busiest()
        if deaf != "deaf":
            network.cut(victim.node_id, "etcd")
        if deaf != "unheard":
            network.cut("etcd", victim.node_id)
        await world.cluster.wait_deposed(victim)
        await world.wait_acknowledged()
        network.heal()


async def test_two_stores_apart(world, network):
    """Two stores that can't reach one another, while both reach the third: every partition takes writes."""
    async with world.load():
        network.separate("store-1", "store-2")
        await world.wait_acknowledged(600)
        network.heal()


async def test_everyone_apart(world, network):
    """No store reaches another: nothing is acknowledged that a majority doesn't have; healed, all goes on."""
    async with world.load():
        for one in STORES:
            for other in STORES:
                if one != other:
                    network.cut(one, other)
        await world.wait_refused()
        network.heal()


async def test_etcd_cut_off_from_all(world, network):
    """etcd out of every store's reach until the leases have ended."""
    async with world.load():
        for store in STORES:
            network.separate("etcd", store)
        await world.wait_refused()
        network.heal()
