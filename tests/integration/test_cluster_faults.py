"""Real processes of a cluster killed, halted, restarted and robbed of their disks, under load.

After each fault: nothing that was acknowledged is lost or has moved, nothing is doubled, every total is what was
acknowledged, no read has shown less than was acknowledged before it, no call with time enough has failed, and all
copies of a partition have the same state, which is what their logs say. Invariants LOG-1, LOG-2, DEDUP-1, FOLD-1,
READ-1 and LIVE-1, from outside.
"""

import asyncio
import shutil
from pathlib import Path

import pytest
from cluster import Cluster

from tallymark_runtime.assignments import COPIES
from tallymark_runtime.disk import RealDisk
from tallymark_store.wal import RECORD_HEADER_BYTES, open_wal
from tallymark_store.wal.format import segment_name

pytestmark = pytest.mark.timeout(600)  # the first start compiles the kernels

# A start reads what lies beyond the last checkpoint.
NO_CHECKPOINTS = {
    "TALLYMARK_CHECKPOINT_INTERVAL_SECONDS": "1e9",
    "TALLYMARK_CHECKPOINT_EVENTS": str(10**12),
}


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


async def test_disk_rotted(world, tmp_path):
    """A store starts with a bit of its log flipped: the copy it concerns begins anew, and the others don't."""
    victim = world.cluster.stores[0]
    suffix = b"/" + victim.node_id.encode()
    before = await copies(world.cluster, suffix)
    settings, victim.environment = victim.environment, victim.environment | NO_CHECKPOINTS
    victim.kill()
    async with world.load():
        await victim.start()
        await world.wait_acknowledged()
    # Nothing is being sent, and an idle log says so: no byte of it can be taken for a torn end.
    victim.kill()
    rot(victim.data / "store" / "wal", tmp_path / "wal")
    victim.environment = settings
    async with world.load():
        await victim.start()
        await world.wait_acknowledged()
    after = await copies(world.cluster, suffix)
    assert [key for key, copy_id in after.items() if copy_id != before[key]] == [COPIES + b"0" + suffix]


def rot(wal_folder: Path, scratch: Path) -> None:
    """Flip a bit in the last record of partition 0."""
    shutil.copytree(wal_folder, scratch)  # opening a log writes to it
    wal, _ = open_wal(RealDisk(scratch), new_log_id=bytes(16))
    index = wal.partitions[0]
    row = index.row(len(index) - 1)
    wal.close()
    path = wal_folder / segment_name(row.segment)
    content = bytearray(path.read_bytes())
    content[row.position + RECORD_HEADER_BYTES // 2] ^= 1
    path.write_bytes(content)


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
