"""A real cluster on this machine: etcd, stores, gateways, a query node, and alerts, each a process of its own.

It lives on a loopback address of this test process's own, so that every port stays free while its process is down;
or, in `network.Network`, each part in a network namespace, so that they can be cut off from one another. Everything
that happens rarely happens all the time: new log segments, checkpoints.
"""

import asyncio
import contextlib
import random
import shutil
from collections import Counter
from pathlib import Path

import msgspec
from processes import Etcd, Process, RoleProcess
from server import own_host

from tallymark import AsyncClient, Event, TallymarkError
from tallymark_protocol.identifiers import partition_of
from tallymark_protocol.messages import PartitionStatus, StatusResult, StoreDigest, StoreStatus
from tallymark_runtime.catalog import LEADERS, Leader, epoch_of
from tallymark_runtime.coordinator import KeyValue, open_remote
from tallymark_runtime.peer import PeerClient

PARTITIONS = 6
LEASE_SECONDS = 2.0
WAIT_SECONDS_MAX = 60.0
CALL_SECONDS = 5.0  # of one question to a store; a halted one never answers
POLL_SECONDS = 0.05

STORE_SETTINGS: dict[str, object] = {
    "wal_segment_bytes": 1024 * 1024,
    "checkpoint_events": 150,
    "checkpoint_interval_seconds": 0.5,
}


class Place(msgspec.Struct, frozen=True):
    """Where a part of the cluster runs: its address, and its network namespace, if it has one of its own."""

    host: str
    namespace: str = ""


class Store(RoleProcess):
    """A store process and its data directory."""

    data: Path

    def wipe(self) -> None:
        """Lose the disk with everything on it. The process must be dead."""
        assert not self.alive, "its files are open"
        shutil.rmtree(self.data)


class Cluster:
    """All processes of one cluster; `close` it in the end.

    Args:
        folder: for data and logs.
        places: where etcd, the stores and the others run, by "etcd", "store-1" …, and "" for the rest.
    """

    def __init__(
        self,
        folder: Path,
        *,
        stores: int = 3,
        gateways: int = 2,
        alerts: int = 0,
        places: dict[str, Place] | None = None,
        settings: dict[str, object] | None = None,
        embedded: bool = False,
    ) -> None:
        rest = Place(own_host()) if places is None else places[""]
        where = places or {}
        self.folder = folder
        place = where.get("etcd", rest)
        self.etcd = Etcd(place.host, folder / "etcd", log=folder / "etcd.log", namespace=place.namespace)
        self.embedded = embedded
        self.coordinator = f"etcd://{self.etcd.address}"
        if embedded:
            self.coordinator = f"tcp://{rest.host}:7101"
        common: dict[str, object] = {
            "coordinator": self.coordinator,
            "partition_count": PARTITIONS,
            "replication_factor": min(stores, 3),
            "lease_ttl_seconds": LEASE_SECONDS,
        } | (settings or {})
        # What a log has dropped can't be counted again by its store.
        self.counts_again = common.get("archive") != "on"
        self.stores: list[Store] = []
        for number in range(1, stores + 1):
            name = f"store-{number}"
            place = where.get(name, rest)
            data = folder / name
            store = Store(
                "store",
                name,
                f"{place.host}:{7100 + number}",
                log=folder / f"{name}.log",
                settings=common
                | STORE_SETTINGS
                | {"data_dir": data}
                | ({"coordinator": "embedded"} if embedded else {}),
                namespace=place.namespace,
            )
            store.data = data
            self.stores.append(store)
        self.gateways = [
            RoleProcess(
                "ingest",
                f"gateway-{number}",
                f"{rest.host}:{7000 + number}",
                log=folder / f"gateway-{number}.log",
                settings=common,
                namespace=rest.namespace,
            )
            for number in range(1, gateways + 1)
        ]
        self.query = RoleProcess(
            "query",
            "query-1",
            f"{rest.host}:7201",
            log=folder / "query-1.log",
            settings=common,
            namespace=rest.namespace,
        )
        self.alerts = [
            RoleProcess(
                "alerts",
                f"alerts-{number}",
                f"{rest.host}:{7300 + number}",
                log=folder / f"alerts-{number}.log",
                settings=common,
                namespace=rest.namespace,
            )
            for number in range(1, alerts + 1)
        ]

    # ------------------------------------------------------------ life

    @property
    def processes(self) -> list[Process]:
        """All of them."""
        return [self.etcd, *self.stores, *self.gateways, self.query, *self.alerts]

    @property
    def addresses(self) -> list[str]:
        """Of the gateways."""
        return [gateway.address for gateway in self.gateways]

    def store(self, node_id: str) -> Store:
        """The store of that name."""
        return next(store for store in self.stores if store.node_id == node_id)

    async def start(self) -> None:
        """Start everything and wait until every partition takes writes."""
        if not self.embedded:
            await self.etcd.start()
        # Stores first, as one would: the others wait a minute for them, and a first start compiles for longer.
        for roles in (self.stores, [*self.gateways, self.query, *self.alerts]):
            for process in roles:
                process.spawn()
            await asyncio.gather(*(process.wait_ready() for process in roles))
        await self.wait_writable()

    def close(self) -> None:
        """Kill what is alive."""
        for process in self.processes:
            process.kill()

    async def wait_writable(self) -> None:
        """Wait until each partition has a leader that judges events. It stores none."""
        accounts: dict[int, int] = {}
        account = 0
        while len(accounts) < PARTITIONS:
            accounts.setdefault(partition_of(account, PARTITIONS), account)
            account += 1
        events = [Event(account_id=account, metric_code="nothing") for account in accounts.values()]
        async with AsyncClient(self.addresses) as client:
            receipt = await client.ingest(events, timeout=WAIT_SECONDS_MAX)
        assert len(receipt.rejected) == PARTITIONS

    # ------------------------------------------------------------ asking

    @contextlib.asynccontextmanager
    async def peer(self, address: str):
        """A bare connection to a role, for what the SDK doesn't offer."""
        client = PeerClient(address, rng=random.Random(1))
        try:
            yield client
        finally:
            await client.close()

    async def status(self, store: Store) -> StatusResult:
        """What a store holds."""
        async with self.peer(store.address) as peer:
            return await peer.call(StoreStatus(), StatusResult, timeout_s=CALL_SECONDS)

    async def leaders(self) -> dict[int, str]:
        """By partition, the node that holds the leader key."""
        return {number: node for number, (node, _) in (await self.epochs()).items()}

    async def epochs(self) -> dict[int, tuple[str, int]]:
        """By partition, the node that holds the leader key, and the epoch."""
        found = {}
        for item in await self.coordinated(LEADERS):
            leader = msgspec.msgpack.decode(item.value, type=Leader)
            found[int(item.key.removeprefix(LEADERS))] = (leader.node_id, epoch_of(item))
        return found

    async def coordinated(self, prefix: bytes) -> list[KeyValue]:
        """Everything under a prefix of the cluster's keys in etcd."""
        coordinator = open_remote(self.coordinator, random.Random(1))
        try:
            return (await coordinator.range(prefix)).items
        finally:
            await coordinator.close()

    async def wait_leaders(self, condition=lambda leaders: True) -> dict[int, str]:
        """Wait until every partition has a leader key, and `condition(leaders)` holds; return them."""
        leaders: dict[int, str] = {}
        try:
            async with asyncio.timeout(WAIT_SECONDS_MAX):
                while not (len(leaders) == PARTITIONS and condition(leaders)):
                    await asyncio.sleep(POLL_SECONDS)
                    with contextlib.suppress(TallymarkError):
                        leaders = await self.leaders()
        except TimeoutError:
            raise AssertionError(f"the leaders are still {leaders}") from None
        return leaders

    async def wait_deposed(self, store: Store) -> None:
        """Wait until others lead everything."""
        await self.wait_leaders(lambda leaders: store.node_id not in leaders.values())

    async def busiest(self) -> Store:
        """The store that leads most partitions."""
        leaders = await self.wait_leaders()
        return self.store(Counter(sorted(leaders.values())).most_common(1)[0][0])

    # ------------------------------------------------------------ replicas

    async def wait_equal(self) -> None:
        """Wait until every store has a copy of every partition that is a member and has applied everything."""
        state: object = None
        try:
            async with asyncio.timeout(WAIT_SECONDS_MAX):
                while True:
                    try:
                        statuses = [await self.status(store) for store in self.stores]
                    except TallymarkError as error:
                        state = error
                    else:
                        state = [(s.node_id, s.partitions) for s in statuses]
                        if _equal(statuses):
                            return
                    await asyncio.sleep(POLL_SECONDS)
        except TimeoutError:
            raise AssertionError(f"the copies don't become equal: {state}") from None

    async def check_replicas(self) -> None:
        """Check that all copies have the same state at the same offset, and that it is what their logs say, if whole.

        No event may be sent meanwhile. A leadership may change: then a copy can be asked before and another after
        the record that begins the epoch, and all are asked again.
        """
        try:
            async with asyncio.timeout(WAIT_SECONDS_MAX):
                for number in range(PARTITIONS):
                    await self.wait_equal()
                    while not await self._check_copies(number):  # noqa: ASYNC110 - others are waited for
                        await asyncio.sleep(POLL_SECONDS)
        except TimeoutError:
            raise AssertionError("the copies don't come to rest") from None

    async def _check_copies(self, number: int) -> bool:
        """Compare a partition's copies and their recounts; whether all were asked at one offset."""
        digests: dict[int, dict[str, str]] = {}  # by applied offset, by who says so
        for store in self.stores:
            async with self.peer(store.address) as peer:
                for recount in (False, True) if self.counts_again else (False,):
                    state = await peer.call(StoreDigest(number, recount=recount), PartitionStatus)
                    assert state.digest
                    said_by = f"{store.node_id}{' by a recount' if recount else ''}"
                    digests.setdefault(state.applied, {})[said_by] = state.digest
        for applied, found in digests.items():
            assert len(set(found.values())) == 1, f"partition {number} at {applied}: {found}"
        return len(digests) == 1


def _equal(statuses: list[StatusResult]) -> bool:
    for number in range(PARTITIONS):
        parts = [part for status in statuses for part in status.partitions if part.partition == number]
        if len(parts) != len(statuses) or any(part.error for part in parts):
            return False
        offsets = {offset for part in parts for offset in (part.log_end, part.high_watermark, part.applied)}
        memberships = {tuple(sorted(part.members)) for part in parts}
        copies = tuple(sorted((s.node_id, part.copy_id) for s, part in zip(statuses, parts, strict=True)))
        if len(offsets) != 1 or memberships != {copies}:
            return False
    return True
