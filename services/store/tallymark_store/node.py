"""A store without sockets: its data, its replicas, and what it does at the coordinator.

Everything that is not the same on every machine comes in through a port: disk, clock, randomness, coordinator,
transport, the log's threads. So the same object serves behind real sockets (`service.StoreService`) and in a
simulation.

Starting: the data directory is checked and recovered; the lease is granted and the node registered; partitions that
are assigned to it are taken up; from then on its replicas do what messages, keys and time ask of them. A store that
holds the only copies waits until it leads them.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING

import msgspec

from tallymark_protocol import limits
from tallymark_protocol.errors import ErrorCode, RemoteProtocolError, UnavailableError, WireError
from tallymark_protocol.frames import Frame
from tallymark_protocol.messages import Call, Message, StoreRealtime
from tallymark_runtime.assignments import FOUNDING, Assignment, Life, assignment_key, life_key
from tallymark_runtime.catalog import (
    CLUSTER,
    Cluster,
    MetricCatalog,
    Node,
    decode_value,
    establish_cluster,
    node_key,
)
from tallymark_runtime.clock import Clock
from tallymark_runtime.coordinator import Coordinator, Get
from tallymark_runtime.disk import Disk
from tallymark_runtime.epochs import read_base
from tallymark_runtime.lease import LeaseKeeper, LeaseThread
from tallymark_runtime.objects import open_target
from tallymark_store import checkpoint, id_budget, memory_budget, recovery, spilling
from tallymark_store.appends import Requester
from tallymark_store.backups import Backups
from tallymark_store.belonging import check_cluster
from tallymark_store.calls import Calls
from tallymark_store.checkpointer import Checkpointer
from tallymark_store.coordination import Coordination, founding_of
from tallymark_store.copies import Copies, checkpointed_memberships
from tallymark_store.links import Transport
from tallymark_store.recycling import Holds
from tallymark_store.replicas_file import ReplicasFile, ReplicasFileError
from tallymark_store.replicating import Identity
from tallymark_store.replication.effects import Role
from tallymark_store.replication.ports import Member, Membership, ReplicaConfig
from tallymark_store.replication.replica import Replica
from tallymark_store.replication.wal_log import WalLog
from tallymark_store.snapshots import Snapshots
from tallymark_store.store import Offload, Store, ThreadsFactory
from tallymark_store.wal import DamagedError, Wal, WalConfig, WalThreads

if TYPE_CHECKING:
    from tallymark_store.archive.archiver import Archiver

_log = logging.getLogger(__name__)

_START_S = 30.0  # how long a store that holds the only copies waits until it leads them
_HAND_OVER_S = 1.0  # how long a stop waits for others to take over


class StoreConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What a store process is told."""

    node_id: str
    partition_count: int
    replication_factor: int = 1
    # Whether constants of the cluster were asked for: where they differ from the cluster's own, that is said then.
    is_partition_count_set: bool = True
    is_dedup_window_set: bool = True
    zone: str = ""  # what may fail as one
    listen: str = "127.0.0.1:0"
    advertise: str = ""  # the address by which others reach it, if not the one it listens on
    wal: WalConfig = WalConfig()
    checkpoint_interval_s: float = 60.0
    checkpoint_events: int = 5_000_000
    archive: str = ""  # "on", or "": no archive
    archive_events: int = 500_000
    archive_interval_s: float = 300.0
    archive_url: str = ""  # where final files of the archive go; empty: they stay
    archive_cache_bytes: int = 8 << 30  # of those, so much is here as well
    dedup_window_ns: int = limits.DEDUP_WINDOW_NS
    # Of memory, for what can also be on disk; 0: half of the machine's; negative: no bound.
    memory_bytes: int = memory_budget.UNBOUNDED
    lease_ttl_s: float = 2.0
    replication: ReplicaConfig | None = None  # None: as follows from the lease
    # Whether the log below the checkpoints is dropped: as far as the archive has its events, if there is one. Without
    # one raw events have no other home.
    recycle: bool = False


def replica_config(config: StoreConfig) -> ReplicaConfig:
    """The replicas' times, as they follow from the lease."""
    if config.replication is not None:
        return config.replication
    lease_ns = int(config.lease_ttl_s * 1e9)
    return ReplicaConfig(
        lease_ns=lease_ns,
        heartbeat_ns=lease_ns // 8,
        resend_ns=max(lease_ns // 7, 20_000_000),
        candidacy_step_ns=max(lease_ns // 20, 10_000_000),
    )


class StoreNode:
    """One store; see the module. `start` it, then `close` it, or `halt` it.

    Args:
        config: what it is told.
        disk: its folder.
        coordinator: of the cluster.
        clock: stamps events; its monotonic time is what deadlines run on.
        rng: for ids and salts.
        transport: to other stores.
        address: "host:port" by which it is reached.
        report: told, in sentences, what takes time or needs attention.
        threads: makes what writes and syncs the log.
        offload: runs what waits for the disk.
        aside: runs what looks at held totals (`holding`); None: in threads of its own.
        pause_reading: called with True when clients must wait, with False when they need not any more.
        lease_coordinator: makes a connection of the lease's own; None: the lease is renewed from the loop.

    Attributes:
        failed: set when the process must end, because its log cannot be trusted any more.
    """

    def __init__(
        self,
        config: StoreConfig,
        *,
        disk: Disk,
        coordinator: Coordinator,
        clock: Clock,
        rng: random.Random,
        transport: Transport,
        address: str,
        report: Callable[[str], None],
        threads: ThreadsFactory = WalThreads,
        offload: Offload = asyncio.to_thread,
        aside: Offload | None = None,
        pause_reading: Callable[[bool], None] = lambda _: None,
        lease_coordinator: Callable[[], Coordinator] | None = None,
    ) -> None:
        self.failed = asyncio.Event()
        self.address = address
        self.catalog = MetricCatalog(coordinator)
        self.checkpointer: Checkpointer | None = None
        self.spilling: spilling.Spilling | None = None
        self.archiver: Archiver | None = None  # where there is to be an archive
        self._config = config
        self.memory_bytes = memory_budget.memory_of(config.memory_bytes)
        self._disk = disk
        self._coordinator = coordinator
        self._clock = clock
        self._rng = rng
        self._transport = transport
        self._report = report
        self._threads = threads
        self._offload = offload
        self._aside = aside
        self._pause_reading = pause_reading
        self._lease_coordinator = lease_coordinator
        self._token = 0  # of this life: part of the names of files of cells
        self._locked = False
        self._closing = False
        self._file: ReplicasFile | None = None
        self._store: Store | None = None
        self._calls: Calls | None = None
        self._coordination: Coordination | None = None
        self._manifests: dict[int, checkpoint.Manifest] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._copies: Copies | None = None
        self._outdated: dict[int, WireError] = {}  # partitions whose leader key had an epoch that was passed
        self._holds = Holds()
        self._snapshots: Snapshots | None = None
        self._backups: Backups | None = None

    @property
    def store(self) -> Store:
        """The driver, once it runs.

        Raises:
            UnavailableError: it does not, or not any more.
        """
        if self._store is None or self.failed.is_set():
            raise UnavailableError("the store is not ready")
        return self._store

    @property
    def driver(self) -> Store | None:
        """The driver, whatever state it is in; None before there is one."""
        return self._store

    @property
    def snapshots(self) -> Snapshots | None:
        """Who sends and takes in snapshots, for telemetry; None before it runs."""
        return self._snapshots

    @property
    def lease_deadline_ns(self) -> int:
        """Until when this node relies on its lease, on the clock's monotonic time; 0 while it has none."""
        lease = None if self._coordination is None else self._coordination.lease
        return 0 if lease is None or not lease.lease else lease.deadline_ns

    # ------------------------------------------------------------ start

    async def start(self) -> None:
        """Recover, register, take part."""
        config = self._config
        warning = memory_budget.warning_of(config.memory_bytes)
        if warning:
            self._report(warning)
        wanted = Cluster(
            config.partition_count,
            cluster_id=f"{self._rng.getrandbits(128):032x}",
            dedup_window_ns=config.dedup_window_ns,
        )
        cluster = await establish_cluster(self._coordinator, wanted)
        self._disk.lock("LOCK")  # recovery writes; two processes on one log would destroy it
        self._locked = True
        check_cluster(self._disk, cluster)
        if cluster.partition_count != wanted.partition_count and config.is_partition_count_set:
            self._report(
                f"this cluster was created with {cluster.partition_count} partitions, and keeps them: the setting "
                f"of {wanted.partition_count} is ignored"
            )
        if cluster.dedup_window_ns != wanted.dedup_window_ns and config.is_dedup_window_set:
            self._report(
                f"this cluster was created to remember event ids for {cluster.dedup_window_ns // 10**9} s, and does: "
                f"the setting of {wanted.dedup_window_ns // 10**9} s is ignored"
            )
        await self.catalog.start()
        identity = Identity(config.node_id, f"{self._rng.getrandbits(64):016x}", cluster.cluster_id)
        await self._wait_for_namesake()
        store = await self._recover(cluster, identity)
        await self._check_history(store)
        assert self._coordination is not None
        assert self._copies is not None
        assert self._snapshots is not None
        if config.archive:
            # Before anything is answered: it may be the only place that has old raw events.
            self.archiver = self._make_archiver(store)
            assert self._calls is not None
            self._calls.archive_view = self.archiver.view
            self._calls.archive_damaged = self.archiver.damaged
            await self.archiver.open_all()
        store.start()
        await self._coordination.start()
        loop = asyncio.get_running_loop()
        budget_bytes = memory_budget.cells_of(config.memory_bytes)
        self.spilling = spilling.Spilling(
            store,
            self._disk.at("checkpoints"),
            budget_bytes=budget_bytes,
            alert_budget_bytes=memory_budget.alerts_of(config.memory_bytes),
            token=self._token,
            on_damage=store.refuse,
            offload=self._offload,
            reserve_bytes=config.wal.segment_bytes,
        )
        self.checkpointer = Checkpointer(
            store,
            self._disk.at("checkpoints"),
            self._manifests,
            self._clock,
            interval_s=config.checkpoint_interval_s,
            events_max=config.checkpoint_events,
            holds=self._holds,
            expire_holds=self._expire_holds,
            recycle=config.recycle,
            id_budget=id_budget.IdBudget(memory_budget.ids_of(config.memory_bytes)),
            archiver=self.archiver,
            spilling=self.spilling,
            offload=self._offload,
        )
        if budget_bytes is not None:
            self._tasks.append(loop.create_task(self.spilling.run()))
        self._snapshots.start(self.checkpointer.lock, self.archiver)
        self._tasks += [
            loop.create_task(self.checkpointer.run()),
            loop.create_task(self.checkpointer.merger.run()),
            loop.create_task(self._copies.tidy()),
        ]
        if self.archiver is not None:
            self._tasks.append(loop.create_task(self.archiver.run()))
            if config.archive_url:
                self._tasks.append(loop.create_task(self.archiver.run_home()))
        if config.replication_factor == 1:
            await self._wait_leading(store)

    def _make_archiver(self, store: Store) -> Archiver:
        from tallymark_store.archive.archiver import (
            Archiver,
        )  # and with it pyarrow: not for those without an archive
        from tallymark_store.archive.home import Home

        home = None
        if self._config.archive_url:
            target = open_target(self._config.archive_url, self._config.node_id)
            home = Home(target, self._config.archive_cache_bytes)
        return Archiver(
            store,
            self._disk.at("archive"),
            self._clock,
            events=self._config.archive_events,
            interval_s=self._config.archive_interval_s,
            report=self._report,
            offload=self._offload,
            home=home,
            cache=self._disk.at("archive-cache") if home is not None else None,
        )

    async def _wait_for_namesake(self) -> None:
        """An empty data directory under a name that is registered: another process, or the last life of this one.

        The lease of a process that has died runs out. One that lives would be disturbed.
        """
        if self._disk.at("wal").list():
            return
        key = node_key("store", self._config.node_id)
        deadline = asyncio.get_running_loop().time() + 1.5 * self._config.lease_ttl_s
        while await self._coordinator.get(key) is not None:
            if asyncio.get_running_loop().time() > deadline:
                raise UnavailableError(
                    f"the partitions of the node {self._config.node_id!r} are led by another store of that name: give "
                    f"this one another node_id",
                    retriable=False,
                )
            await asyncio.sleep(self._config.lease_ttl_s / 20)

    async def _recover(self, cluster: Cluster, identity: Identity) -> Store:
        config = self._config
        foundings: dict[int, Membership] = {}
        for item in (await self._coordinator.range(FOUNDING)).items:
            foundings[int(item.key[len(FOUNDING) :])] = founding_of(item)
        try:
            file = self._file = ReplicasFile(self._disk)
        except ReplicasFileError as error:
            # Whatever was promised here is not known: every copy has to begin anew, or the file to be restored.
            raise UnavailableError(
                f"{error}; restore it, or the data directory as a whole", retriable=False
            ) from error
        salt = self._rng.getrandbits(63)
        id_bytes = memory_budget.ids_of(config.memory_bytes)
        # It gets into names that others see, and the salt is nobody's business.
        self._token = int.from_bytes(hashlib.blake2b(salt.to_bytes(8), digest_size=8).digest())

        def committed_end(wal: Wal, number: int, manifest: checkpoint.Manifest | None) -> int:
            log = WalLog(wal, number)
            state = file.states.get(number)
            memberships = checkpointed_memberships(manifest) + log.memberships()
            current = memberships[-1] if memberships else foundings.get(number)
            if state is None or current is None:
                return log.log_end if state is None and current is None else 0
            if current.members == (Member(config.node_id, state.copy_id),):
                return log.log_end
            return min(state.high_watermark, log.log_end)

        found = recovery.recover(
            self._disk,
            partition_count=cluster.partition_count,
            dedup_window_ns=cluster.dedup_window_ns,
            wal_config=config.wal,
            new_log_id=self._rng.randbytes(16),
            salt=salt,
            report=self._report,
            committed_end=committed_end,
            id_bytes=id_bytes,
        )
        self._manifests = found.manifests
        file.use_log(found.wal.log_id)
        older = await self._begin_life(file, found, foundings)
        node = Node(config.node_id, self.address, "store", zone=config.zone)
        self._coordination = Coordination(
            self._coordinator,
            identity=identity,
            node=node,
            partition_count=cluster.partition_count,
            replication_factor=config.replication_factor,
            lease=self._make_lease(),
            host=self,
        )
        store = Store(
            wal=found.wal,
            partitions=found.partitions,
            catalog=self.catalog,
            clock=self._clock,
            identity=identity,
            config=replica_config(config),
            file=file,
            transport=self._transport,
            keys=self._coordination,
            new_copy_id=self._new_copy_id,
            pause_reading=self._pause_reading,
            on_discarded=self._on_discarded,
            threads=self._threads,
            offload=self._offload,
            aside=self._aside,
        )
        store.stopped = self.failed
        self._store = store
        self._calls = Calls(
            store,
            self.catalog,
            self._clock,
            node_id=config.node_id,
            check_lease=self._check_lease,
            offload=self._offload,
        )
        self._calls.checkpoint_count = self._checkpoint_count
        self._calls.hold_log = self._holds.held
        self._backups = self._calls.backups = Backups(
            store,
            self._disk,
            found.manifests,
            lambda: self.archiver,
            self._clock,
            self._holds,
            new_token=self._new_copy_id,
            offload=self._offload,
        )
        self._copies = Copies(
            store,
            self._coordination,
            node_id=config.node_id,
            checkpoints=self._disk.at("checkpoints"),
            manifests=found.manifests,
            salt=salt,
            new_copy_id=self._new_copy_id,
            report=self._report,
        )
        self._copies.adopt(foundings, older)
        self._snapshots = Snapshots(
            store,
            self._disk.at("checkpoints"),
            found.manifests,
            self._copies,
            self._clock,
            self._holds,
            config=replica_config(config),
            salt=salt,
            dedup_window_ns=cluster.dedup_window_ns,
            id_bytes=None if id_bytes is None else id_bytes // cluster.partition_count,
            offload=self._offload,
        )
        self._copies.on_forgotten = self._snapshots.forget
        return store

    async def _begin_life(
        self, file: ReplicasFile, found: recovery.Recovered, foundings: dict[int, Membership]
    ) -> frozenset[int]:
        """Count this start; return the copies that may have acknowledged more than this disk knows of.

        The number is raised on the disk first, then at the coordinator. So a disk with a lower one than is known
        there is one from before the last start: put back from a backup, or forgotten and found again. Whatever its
        copies acknowledged since is not on it, and others may count on that. They begin anew.
        """
        key = life_key(self._config.node_id)
        item = await self._coordinator.get(key)
        known = 0
        if item is not None:
            life = decode_value(Life, item)
            known = life.number
        older: set[int] = set()
        if not file.is_new and file.life < known:
            for number in sorted(file.states):
                if await self._is_only_copy(number, file, found, foundings):
                    self._report(
                        f"partition {number}: the data directory is older than this store's last start; there is no "
                        f"other copy, so what was acknowledged since is lost"
                    )
                else:
                    older.add(number)
        states = {
            number: msgspec.structs.replace(state, is_damaged=True) if number in older else state
            for number, state in file.states.items()
        }
        file.begin_life(max(file.life, known) + 1, states)
        await self._coordinator.put(key, msgspec.msgpack.encode(Life(file.life)))
        return frozenset(older)

    async def _is_only_copy(
        self, number: int, file: ReplicasFile, found: recovery.Recovered, foundings: dict[int, Membership]
    ) -> bool:
        """Whether nobody else has ever held a partition, as far as this log says, nor shall."""
        log = WalLog(found.wal, number)
        try:
            history = log.memberships()
        except (DamagedError, RemoteProtocolError):
            return False
        if log.log_start:
            before = checkpointed_memberships(found.manifests.get(number))
            if not before or before[0].offset >= 0:
                return False  # who the first members were is not known any more
            history = before + history
        if number in foundings:
            history.insert(0, foundings[number])
        own = (Member(self._config.node_id, file.states[number].copy_id),)
        wish = await self._coordinator.get(assignment_key(number))
        return (
            bool(history)
            and all(membership.members == own for membership in history)
            and wish is not None
            and decode_value(Assignment, wish).nodes == (self._config.node_id,)
        )

    def _make_lease(self) -> LeaseKeeper:
        connect, ttl_s = self._lease_coordinator, self._config.lease_ttl_s
        if connect is None:
            return LeaseKeeper(self._coordinator, self._clock, ttl_s)
        return LeaseThread(self._coordinator, connect, self._clock, ttl_s)

    async def _check_history(self, store: Store) -> None:
        """Refuse a coordinator that has seen less than the log: its state was lost, or restored from a backup.

        Revisions only rise, so metrics' uids from it would stand for other metrics than those in the log.
        """
        seen = max((self.seen(number) for number in store.partitions), default=0)
        # With a read in it: a transaction without one may be answered by a member that is behind.
        now = await self._coordinator.txn([], [Get(CLUSTER)])
        revision = now.revision + (await read_base(self._coordinator)).base
        if revision < seen:
            raise UnavailableError(
                f"the coordinator is at revision {revision}, but the log has seen {seen}: the coordinator's state was "
                f"lost or belongs to another store; restore it, or run `tallymark cluster recover`",
                retriable=False,
            )

    async def _wait_leading(self, store: Store) -> None:
        """Wait until all that this store alone holds is led here, or refused."""
        assert self._coordination is not None
        try:
            async with asyncio.timeout(max(_START_S, 3 * self._config.lease_ttl_s)):
                while not (self._coordination.is_placed and self._leads_all(store)):
                    if self.failed.is_set():
                        raise UnavailableError("the log has failed")
                    await asyncio.sleep(0.002)
        except TimeoutError:
            waiting = [number for number in sorted(store.replicas) if not self._leads(store, number)]
            reasons = [f"partition {number}: {store.replicas[number].why}" for number in waiting]
            raise UnavailableError(
                f"not every partition could be led: {'; '.join(reasons) or 'they are not placed'}"
            ) from None

    def _leads_all(self, store: Store) -> bool:
        return all(self._leads(store, number) for number in store.replicas)

    def _leads(self, store: Store, number: int) -> bool:
        partition, replica = store.partitions[number], store.replicas[number]
        alone = replica.membership.members == (Member(self._config.node_id, replica.copy_id),)
        return partition.epoch > 0 or partition.error is not None or not alone

    def _new_copy_id(self) -> str:
        return f"{self._rng.getrandbits(128):032x}"

    # ------------------------------------------------------------ end

    async def hand_over(self) -> None:
        """Have other members take over what this store leads, as far as that takes no longer than a moment."""
        store = self._store
        if store is None or self.failed.is_set():
            return
        self._closing = True
        try:
            async with asyncio.timeout(_HAND_OVER_S):
                while True:
                    leading = [
                        (number, replica)
                        for number, replica in sorted(store.replicas.items())
                        if replica.role is Role.LEADER and len(replica.membership.members) > 1
                    ]
                    if not leading:
                        break
                    for number, replica in leading:
                        target = _successor(replica, self._config.node_id)
                        if replica.accepts_appends and target:
                            store.replicating.call(number, replica.hand_over, target)
                    await store.wait_news()
        except (TimeoutError, UnavailableError) as error:
            _log.warning("not every leadership was handed over: %s", error)

    async def close(self) -> None:
        """Give the leaderships up, sync the log, stop. Call it once."""
        self._closing = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._snapshots is not None:
            await self._snapshots.close()
        store = self._store
        if store is not None:
            await store.close()
            if self._copies is not None and not self.failed.is_set():
                self._copies.save_watermarks()
        await self.catalog.close()
        if self._coordination is not None:
            await self._coordination.close()
        if store is not None:
            store.wal.close()
        if self._file is not None:
            self._file.close()
        if self._locked:
            self._disk.unlock()

    def halt(self) -> None:
        """Stop at once, as in a crash."""
        self._closing = True
        for task in self._tasks:
            task.cancel()
        if self._snapshots is not None:
            self._snapshots.halt()
        if self._store is not None:
            self._store.halt()
        if self._coordination is not None:
            self._coordination.halt()
        self.catalog.halt()
        if self._locked:
            self._disk.unlock()

    # ------------------------------------------------------------ requests

    def on_append(self, connection: Requester, frame: Frame) -> None:
        """Take an APPEND frame; it is answered once, now or later."""
        try:
            store = self.store
        except UnavailableError as error:
            connection.respond_error(frame.request_id, error)
            return
        store.on_append(connection, frame)

    def on_bundle(self, sender: str, data: bytes) -> None:
        """Take what another store sent; `sender` is who is known to speak, "" if that is not known.

        Raises:
            RemoteProtocolError: it makes no sense, or is not meant for this store.
        """
        if self._store is not None and not self.failed.is_set():
            self._store.replicating.on_bundle(sender, data)

    async def call(self, call: Call, caller: Hashable = None) -> Message | None:
        """Answer a call of a caller, if it is known who; None where it is none to a store. Raises TallymarkError."""
        _ = self.store
        assert self._calls is not None
        return await self._calls.call(call, caller)

    def end_tails(self) -> None:
        """Answer the calls that are held for alert records, and hold none any more."""
        if self._store is not None:
            self._store.tail.close()

    def call_now(self, call: StoreRealtime) -> Message | None:
        """Answer a call if nothing has to be waited for; None: `call` is to answer it. Raises TallymarkError."""
        _ = self.store
        assert self._calls is not None
        return self._calls.call_now(call)

    def _check_lease(self) -> None:
        assert self._coordination is not None
        if not self._coordination.lease.is_valid:
            raise UnavailableError("the lease of this store has run out", code=ErrorCode.NOT_LEADER)

    def _on_discarded(self, partition: int, copy_id: str) -> None:
        assert self._copies is not None
        self._copies.on_discarded(partition, copy_id)

    def _expire_holds(self) -> None:
        if self._snapshots is not None:
            self._snapshots.sending.expire()
        if self._backups is not None:
            self._backups.expire()

    def _checkpoint_count(self) -> int:
        return self.checkpointer.count if self.checkpointer is not None else 0

    # ------------------------------------------------------------ what the coordinator tells

    def _replica(self, partition: int) -> Replica | None:
        store = self._store
        return None if store is None or self.failed.is_set() else store.replicas.get(partition)

    def on_leader(self, partition: int, holder: str, epoch: int) -> None:
        """The leader key is held by a node, or is gone."""
        replica = self._replica(partition)
        if replica is None:
            if holder == self._config.node_id:
                self._give_up_key(partition, epoch)
            return
        self.store.replicating.call(partition, replica.key_changed, holder, epoch)
        if holder == self._config.node_id:
            self.store.replicating.call(
                partition, replica.tick
            )  # of an earlier life: the sooner it goes the better
        if not holder and self._speaks_for(replica):
            # It serves nothing; but without a leader nobody would be told what is wrong with it.
            assert self._coordination is not None
            self._coordination.create(partition)

    def _give_up_key(self, partition: int, epoch: int) -> None:
        """Delete a leader key of this node that no replica knows of: nobody could lead for as long as it is there."""
        if self._store is not None and not self.failed.is_set() and self._coordination is not None:
            self._coordination.delete(partition, epoch)

    def _speaks_for(self, replica: Replica) -> bool:
        """Whether this is a partition's only copy, and damaged."""
        return replica.role is Role.DAMAGED and replica.membership.members == (
            Member(self._config.node_id, replica.copy_id),
        )

    def seen(self, partition: int) -> int:
        """The highest epoch or metric's uid in a partition's log."""
        assert self._store is not None
        held = self._store.partitions[partition]
        return max(held.index.last_epoch(), *(int(uid) for uid in held.schemas.uids), 0)

    def on_created(self, partition: int, epoch: int, seen: int) -> None:
        """A leader key was created, when the log had seen `seen`, or (epoch 0) was not."""
        replica = self._replica(partition)
        if replica is None:
            if epoch:
                self._give_up_key(partition, epoch)
            return
        if self._speaks_for(replica):
            return
        replicating = self.store.replicating
        if not epoch:
            replicating.call(partition, replica.key_refused)
            return
        assert self._coordination is not None
        if epoch <= seen and epoch < self._coordination.epoch_base:
            # The base was raised while the key was created under the one before.
            self._coordination.delete(partition, epoch)
            replicating.call(partition, replica.key_refused)
            return
        if epoch <= seen:
            # Not tried again: revisions rise with every attempt, and would get there in the end.
            message = (
                f"partition {partition}: the leader key has epoch {epoch}, but the log had seen {seen}: the coordinator's "
                f"state was lost; restore it, or run `tallymark cluster recover`"
            )
            _log.critical("%s", message)
            held = self.store.partitions[partition]
            held.error = self._outdated[partition] = WireError(
                int(ErrorCode.PARTITION_UNAVAILABLE), False, message
            )
            self._coordination.delete(partition, epoch)
            return
        replicating.call(partition, replica.key_created, epoch)

    def on_epoch_base(self) -> None:
        """Epochs are counted from another base: what was below all that the logs had seen may be above it now."""
        outdated, self._outdated = self._outdated, {}
        for partition, error in sorted(outdated.items()):
            replica = self._replica(partition)
            if replica is None:
                continue
            held = self.store.partitions[partition]
            if replica.role is Role.DAMAGED:  # found meanwhile, and not said
                damage = WireError(int(ErrorCode.PARTITION_DAMAGED), False, replica.why)
                held.error = self.store.damage_error(partition, damage)
                continue
            if held.error is error:
                held.error = None
            self.store.replicating.call(partition, replica.key_refused)  # which has it try again

    def on_assigned(self, partition: int, nodes: tuple[str, ...]) -> None:
        """These nodes shall hold the partition."""
        replica = self._replica(partition)
        if replica is not None:
            self.store.replicating.call(partition, replica.set_wish, nodes)

    def on_founded(self, partition: int, membership: Membership) -> None:
        """The partition was founded."""
        replica = self._replica(partition)
        if replica is not None:
            self.store.replicating.call(partition, replica.set_founding, membership)

    def on_placed(self) -> None:
        """Every partition is assigned and founded."""

    def on_removed(self, partition: int, copy_id: str) -> None:  # noqa: ARG002
        """A leader has removed this copy, and nobody wishes it here any more."""
        if self._copies is not None:
            self._copies.on_removed()

    def on_lease_lost(self, reason: str) -> None:  # noqa: ARG002
        """The leader keys are gone, or may be."""
        if self._store is None or self.failed.is_set():
            return
        for number in sorted(self._store.replicas):
            self._store.replicating.call(number, self._store.replicas[number].lease_lost)

    async def take_up(self, partition: int) -> None:
        """Take part in a partition that is assigned to this node."""
        assert self._copies is not None
        await self._copies.take_up(partition)


def _successor(replica: Replica, own_node: str) -> str:
    """The member that can lead best; "" where none is heard of.

    One whose clock or disk is fit goes before one with more of the log, that before node ids.
    """
    best, best_rank = "", (False, -1)
    for node_id, progress in sorted(replica.followers.items()):
        if node_id == own_node or progress.is_damaged or not progress.heard_ns:
            continue
        rank = (node_id not in replica.unfit, progress.match_end)
        if replica.membership.has(node_id, progress.copy_id) and rank > best_rank:
            best, best_rank = node_id, rank
    return best
