"""Copies and leaderships moved by `tallymark cluster` while clients write and read, with real processes.

Four stores for three copies of each partition. Whatever moves: no call with time enough fails, nothing that was
acknowledged is lost or doubled, the store that was drained ends empty, a new one gets its share.
"""

import asyncio
import json
import sys

import pytest
from cluster import PARTITIONS, Cluster
from cluster_load import World
from processes import POLL_SECONDS

from tallymark import TallymarkError
from tallymark_protocol.messages import ClusterInfo, ClusterStatus, PartitionStatus, StoreDigest

pytestmark = pytest.mark.timeout(600)  # the first start compiles the kernels

COPIES = 3
MOVE_SECONDS_MAX = 120


class PlacedCluster(Cluster):
    """A cluster in which not every store has a copy of everything."""

    async def tally(self, *arguments: str, status: int = 0) -> dict:
        """Run `tallymark cluster` and return its document."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "tallymark_node.main", "--server", ",".join(self.addresses), "--json", "cluster"),
            *arguments,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        async with asyncio.timeout(MOVE_SECONDS_MAX):
            out, err = await process.communicate()
        assert process.returncode == status, f"{arguments}: {out.decode()}{err.decode()}"
        return json.loads(out)

    async def info(self) -> ClusterInfo:
        """The cluster's status."""
        async with self.peer(self.addresses[0]) as peer:
            return await peer.call(ClusterStatus(), ClusterInfo)

    async def wait_info(self, condition) -> ClusterInfo:
        """Wait until a condition holds of the cluster's status."""
        info = None
        try:
            async with asyncio.timeout(MOVE_SECONDS_MAX):
                while True:
                    info = await self.info()
                    if condition(info):
                        return info
                    await asyncio.sleep(POLL_SECONDS)
        except TimeoutError:
            raise AssertionError(f"the cluster's status is still {info}") from None

    async def wait_empty(self, node_id: str) -> None:
        """Wait until a store has discarded all that it had."""
        held = None
        try:
            async with asyncio.timeout(MOVE_SECONDS_MAX):
                while (held := (await self.status(self.store(node_id))).partitions) != []:  # noqa: ASYNC110
                    await asyncio.sleep(POLL_SECONDS)
        except TimeoutError:
            raise AssertionError(f"{node_id} still has {held}") from None

    async def check_replicas(self) -> None:
        """Check that the members of each partition have the same state at the same offset, and it is what logs say."""
        info = await self.wait_info(lambda info: all(item.is_settled for item in info.partitions))
        for item in info.partitions:
            assert len(item.members) == COPIES
            try:
                async with asyncio.timeout(MOVE_SECONDS_MAX):
                    while len(states := {await self.state(item.partition, n) for n in item.members}) > 1:  # noqa: ASYNC110
                        await asyncio.sleep(POLL_SECONDS)
            except TimeoutError:
                raise AssertionError(f"copies of partition {item.partition} differ: {states}") from None
            assert None not in states

    async def state(self, partition: int, node_id: str) -> tuple[int, str] | None:
        """Offset and digest of a copy; None while it can't say. A recount of its log must give the same."""
        try:
            async with self.peer(self.store(node_id).address) as peer:
                state = await peer.call(StoreDigest(partition), PartitionStatus)
                again = await peer.call(StoreDigest(partition, recount=True), PartitionStatus)
        except TallymarkError:
            return None
        if state.applied == again.applied:
            assert state.digest == again.digest, (
                f"partition {partition} at {node_id} is not what its log says"
            )
        return state.applied, state.digest


@pytest.fixture
async def world(tmp_path):
    """A cluster of four stores that runs."""
    made = World(PlacedCluster(tmp_path, stores=4), 1)
    try:
        await made.start()
        yield made
    finally:
        made.cluster.close()


def loads(info: ClusterInfo) -> dict[str, tuple[int, int]]:
    """Copies and leaderships of each store."""
    return {store.node_id: (store.held, store.led) for store in info.stores}


def assert_even(info: ClusterInfo, count: int) -> None:
    """So many stores share copies and leaderships evenly; the others have none."""
    shares = [share for share in loads(info).values() if share != (0, 0)]
    assert len(shares) == count
    held, led = zip(*shares, strict=True)
    assert sum(held) == PARTITIONS * COPIES
    assert sum(led) == PARTITIONS
    assert max(held) - min(held) <= 1
    assert max(led) - min(led) <= 1


async def test_copies_move_under_load(world):
    """A share for every store, one drained, one added again, one killed and replaced: no call fails."""
    cluster = world.cluster
    async with world.load():
        await cluster.tally("rebalance")
    assert_even(await cluster.info(), 4)

    async with world.load():
        moved = await cluster.tally("drain", "store-2")
        assert {move["from"] for move in moved["moves"]} == {"store-2"}
        assert moved["is_settled"]
    info = await cluster.info()
    assert loads(info)["store-2"] == (0, 0)
    assert_even(info, 3)
    await cluster.wait_empty("store-2")

    async with world.load():
        await cluster.tally("undrain", "store-2")
        moved = await cluster.tally("rebalance")
        assert {move["to"] for move in moved["moves"]} == {"store-2"}
    assert_even(await cluster.info(), 4)

    async with world.load():
        victim = cluster.store("store-3")
        victim.kill()
        await cluster.tally("replace", "store-3")
    info = await cluster.info()
    assert loads(info)["store-3"] == (0, 0)
    assert_even(info, 3)

    await victim.start()  # it comes back to nothing, and discards what it had
    await cluster.wait_empty("store-3")
    async with world.load():
        pass
