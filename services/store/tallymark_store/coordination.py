"""What a store does at the coordinator: its lease and registration, leader keys, and what it follows there.

Owns the calls and their order; what they mean for a partition is its replica's to decide. Everything that can fail is
tried again for as long as it makes sense: the coordinator may be away at any moment, and comes back without help.

    nodes/store/<node>           under the lease: this store and its address
    leaders/<partition>          under the lease, by `create`; followed: `Replica.key_changed`
    assignments/<partition>      followed: `Replica.set_wish`; a partition assigned to this node is taken up
    epoch_base                   followed: a partition whose epochs had fallen behind may be led again
    founding/<partition>         followed: `Replica.set_founding`
    copies/<partition>/<node>    the copy ids of this node's copies, registered before they take part
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any, NamedTuple, Protocol

import msgspec

from tallymark_protocol.errors import RemoteProtocolError, TallymarkError
from tallymark_runtime.assignments import (
    ASSIGNMENTS,
    COPIES,
    FOUNDING,
    Assignment,
    Copy,
    Founding,
    assignment_key,
    copy_key,
    founding_key,
)
from tallymark_runtime.catalog import (
    EPOCH_BASE,
    LEADERS,
    Catalog,
    EpochBase,
    Leader,
    Node,
    decode_value,
    epoch_of,
    leader_key,
    node_key,
)
from tallymark_runtime.coordinator import (
    Compare,
    Coordinator,
    Delete,
    Get,
    KeyValue,
    Put,
    Target,
    absent,
    unchanged,
)
from tallymark_runtime.epochs import create_leader_key
from tallymark_runtime.lease import LeaseKeeper
from tallymark_runtime.placement import establish_assignments, found_partitions
from tallymark_store.replicating import Identity
from tallymark_store.replication.ports import Member, Membership

_log = logging.getLogger(__name__)

RETRY_S = 0.2  # between attempts
CALL_S = 5.0  # for one call


class Host(Protocol):
    """What the coordination tells: the node."""

    def on_leader(self, partition: int, holder: str, epoch: int) -> None:
        """The leader key is held by this node since this epoch; holder "": it is gone."""
        ...

    def on_assigned(self, partition: int, nodes: tuple[str, ...]) -> None:
        """These nodes shall hold the partition."""
        ...

    def on_founded(self, partition: int, membership: Membership) -> None:
        """The partition was founded with these members."""
        ...

    def on_removed(self, partition: int, copy_id: str) -> None:
        """A leader says that this copy of this node is no member any more, and is not wished: `removed_copies`."""
        ...

    def on_lease_lost(self, reason: str) -> None:
        """All keys under the lease are gone, or may be."""
        ...

    def on_created(self, partition: int, epoch: int, seen: int) -> None:
        """A leader key was created by `create`, when `seen` was seen; epoch 0: it was not."""
        ...

    def seen(self, partition: int) -> int:
        """The highest epoch or metric's uid in a partition's log."""
        ...

    def on_placed(self) -> None:
        """Every partition is assigned and founded."""
        ...

    def on_epoch_base(self) -> None:
        """Epochs are counted from another base now."""
        ...

    async def take_up(self, partition: int) -> None:
        """Take part in a partition that is assigned to this node, if that is not done yet. Raises TallymarkError."""
        ...


class Removal(NamedTuple):
    """A leader's mark on a registration of this node: the copy is to be discarded."""

    item: KeyValue
    copy: Copy
    wish: KeyValue | None  # by which it is not wished since before the mark; None: the mark does not stand


class Watched(Catalog):
    """Follows a prefix whose keys begin with a partition's number."""

    def __init__(
        self,
        coordinator: Coordinator,
        prefix: bytes,
        on_put: Callable[[int, KeyValue], None],
        on_delete: Callable[[int, KeyValue], None],
    ) -> None:
        super().__init__(coordinator, prefix)
        self._skip = len(prefix)
        self._put = on_put
        self._delete = on_delete

    def on_put(self, item: KeyValue) -> None:
        """A key was set."""
        self._tell(self._put, item)

    def on_delete(self, item: KeyValue) -> None:
        """A key was deleted."""
        self._tell(self._delete, item)

    def _tell(self, callback: Callable[[int, KeyValue], None], item: KeyValue) -> None:
        name = item.key[self._skip :].split(b"/")[0]
        if not name.isdigit():
            return
        try:
            callback(int(name), item)
        except RemoteProtocolError as error:
            _log.warning("a record of the coordinator is passed over: %s", error.message)


class _WatchedBase(Catalog):
    """Follows the epoch base."""

    def __init__(self, coordinator: Coordinator, on_change: Callable[[], None]) -> None:
        super().__init__(coordinator, EPOCH_BASE)
        self._on_change = on_change

    def on_put(self, item: KeyValue) -> None:  # noqa: ARG002
        """It was set."""
        self._on_change()


class Coordination:
    """A store at the coordinator. `start` it, `close` it."""

    def __init__(
        self,
        coordinator: Coordinator,
        *,
        identity: Identity,
        node: Node,
        partition_count: int,
        replication_factor: int,
        lease: LeaseKeeper,
        host: Host,
    ) -> None:
        self.lease = lease
        self._coordinator = coordinator
        self._identity = identity
        self._node = node
        self._partition_count = partition_count
        self._replication_factor = replication_factor
        self._host = host
        self._tasks: set[asyncio.Task[Any]] = set()
        self._deleting: dict[int, int] = {}  # leader keys on their way out: partition -> epoch
        self._news = asyncio.Event()  # something changed that the founding may wait for
        self._leaders = Watched(coordinator, LEADERS, self._leader_put, self._leader_deleted)
        self._assignments = Watched(coordinator, ASSIGNMENTS, self._assigned, self._ignore)
        self._foundings = Watched(coordinator, FOUNDING, self._founded, self._ignore)
        self._copies = Watched(coordinator, COPIES, self._copy_put, self._ignore)
        self._base = _WatchedBase(coordinator, host.on_epoch_base)
        self._watched: tuple[Catalog, ...] = (
            self._leaders,
            self._assignments,
            self._foundings,
            self._copies,
            self._base,
        )
        self.is_placed = False  # every partition has its assignment, and is founded

    # ------------------------------------------------------------ start and end

    async def start(self) -> None:
        """Get a lease, register, follow. Returns once all of that is done for the first time."""
        await self.lease.grant()
        await self._register()
        for watched in self._watched:
            await watched.start()
        for partition in range(self._partition_count):
            self.tell_leader(partition)  # a key that is not there was not told of
        self._spawn(self._keep_lease())
        self._spawn(self._settle())

    async def close(self, *, revoke: bool = True) -> None:
        """Stop, and give the lease back."""
        lease = self.lease.lease
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for watched in self._watched:
            await watched.close()
        self.lease.lease = 0
        self.lease.close()
        if lease and revoke:
            await self._revoke(lease)

    def halt(self) -> None:
        """Stop at once."""
        for task in list(self._tasks):
            task.cancel()
        for watched in self._watched:
            watched.halt()
        self.lease.lease = 0
        self.lease.close()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("a task at the coordinator failed", exc_info=error)

    # ------------------------------------------------------------ the lease

    async def _register(self) -> None:
        key = node_key("store", self._node.node_id)
        await self._coordinator.put(key, msgspec.msgpack.encode(self._node), lease=self.lease.lease)

    async def _keep_lease(self) -> None:
        while True:
            lease = self.lease.lease
            reason = await self.lease.keep()
            _log.warning("the lease of this store is lost: %s", reason)
            self._host.on_lease_lost(reason)
            # Its keys may live on at the coordinator; nothing here believes in them any more.
            self._spawn(self._revoke(lease))
            while True:
                try:
                    async with asyncio.timeout(CALL_S):
                        await self.lease.grant()
                        await self._register()
                    break
                except (TallymarkError, TimeoutError) as error:
                    _log.warning("no lease can be had: %s", error)
                    await asyncio.sleep(RETRY_S)

    async def _revoke(self, lease: int) -> None:
        try:
            async with asyncio.timeout(CALL_S):
                await self._coordinator.lease_revoke(lease)
        except (TallymarkError, TimeoutError) as error:
            _log.info("the lease was not given back: %s", error)

    # ------------------------------------------------------------ leader keys

    def create(self, partition: int) -> None:
        """Create the partition's leader key; `Host.on_created` is told."""
        self._spawn(self._create(partition))

    async def _create(self, partition: int) -> None:
        identity = self._identity
        lease = self.lease.lease
        epoch = 0
        seen = self._host.seen(partition)  # before the key is asked for: later epochs may come while it is
        if self.lease.is_valid:
            leader = Leader(identity.node_id, self._node.address, identity.instance)
            try:
                async with asyncio.timeout(CALL_S):
                    epoch = await create_leader_key(self._coordinator, partition, leader, lease)
            except (TallymarkError, TimeoutError) as error:
                # It may be there all the same: then it is seen, and deleted, or runs out with its lease.
                _log.warning("the leader key of partition %d could not be created: %s", partition, error)
            except Exception:
                # A defect. The replica would wait for its answer for ever, and give no key up meanwhile.
                self._host.on_created(partition, 0, seen)
                raise
            if lease != self.lease.lease:
                epoch = 0  # created under a lease that is over
        self._host.on_created(partition, epoch, seen)

    def delete(self, partition: int, epoch: int) -> None:
        """Delete the partition's leader key if it is this node's, of this epoch; tried until it is gone."""
        if self._deleting.get(partition) != epoch:
            self._deleting[partition] = epoch
            self._spawn(self._delete(partition, epoch))

    async def _delete(self, partition: int, epoch: int) -> None:
        key = leader_key(partition)
        try:
            while True:
                try:
                    async with asyncio.timeout(CALL_S):
                        item = await self._coordinator.get(key)
                        if item is None:
                            self._host.on_leader(partition, "", epoch)
                            return
                        found = epoch_of(item)
                        if found != epoch:
                            if found > epoch:
                                self._leader_put(partition, item)
                            return
                        ours = Compare(key, Target.CREATE_REVISION, "=", item.create_revision)
                        if (await self._coordinator.txn([ours], [Delete(key)])).succeeded:
                            self._host.on_leader(partition, "", epoch)
                            return
                except RemoteProtocolError as error:
                    _log.warning("the leader key of partition %d: %s", partition, error.message)
                    return
                except (TallymarkError, TimeoutError) as error:
                    _log.warning("the leader key of partition %d could not be deleted: %s", partition, error)
                    await asyncio.sleep(RETRY_S)
        finally:
            if self._deleting.get(partition) == epoch:
                del self._deleting[partition]

    @property
    def epoch_base(self) -> int:
        """What new epochs are counted from, as far as is known."""
        item = self._base.item(EPOCH_BASE)
        return 0 if item is None else decode_value(EpochBase, item).base

    def _leader_put(self, partition: int, item: KeyValue) -> None:
        leader = decode_value(Leader, item)
        self._host.on_leader(partition, leader.node_id, epoch_of(item))

    def _leader_deleted(self, partition: int, item: KeyValue) -> None:
        self._host.on_leader(partition, "", epoch_of(item))

    def tell_leader(self, partition: int) -> None:
        """Tell the host what is known of the leader key: for a replica that has just been made."""
        item = self._leaders.item(leader_key(partition))
        if item is None:
            self._host.on_leader(partition, "", 0)
        else:
            self._leader_put(partition, item)

    # ------------------------------------------------------------ members

    def _assigned(self, partition: int, item: KeyValue) -> None:
        nodes = decode_value(Assignment, item).nodes
        self._host.on_assigned(partition, nodes)
        self._news.set()
        if self.is_placed and self._identity.node_id in nodes:
            self._spawn(self._take_up(partition))

    async def _take_up(self, partition: int) -> None:
        while True:
            try:
                await self._host.take_up(partition)
            except TallymarkError as error:
                _log.warning("partition %d could not be taken up: %s", partition, error)
                await asyncio.sleep(RETRY_S)
            else:
                return

    def assignment(self, partition: int) -> tuple[str, ...]:
        """The nodes that shall hold a partition, as far as is known."""
        item = self._assignments.item(assignment_key(partition))
        return () if item is None else decode_value(Assignment, item).nodes

    def founding(self, partition: int) -> Membership | None:
        """Who founded a partition, as far as is known."""
        item = self._foundings.item(founding_key(partition))
        return None if item is None else founding_of(item)

    async def know_foundings(self) -> None:
        """Know every founding that there is now. Raises TallymarkError."""
        await self._foundings.catch_up()

    def _founded(self, partition: int, item: KeyValue) -> None:
        self._host.on_founded(partition, founding_of(item))

    def _copy_put(self, partition: int, item: KeyValue) -> None:
        self._news.set()
        copy = decode_value(Copy, item)
        if copy.is_removed and item.key == copy_key(partition, self._identity.node_id):
            self._host.on_removed(partition, copy.copy_id)

    def _ignore(self, partition: int, item: KeyValue) -> None:
        """Nothing follows from it."""

    async def registration(self, partition: int) -> KeyValue | None:
        """This node's registration for a partition. Raises TallymarkError."""
        return await self._coordinator.get(copy_key(partition, self._identity.node_id))

    async def register_new_copy(
        self, partition: int, copy_id: str, before: KeyValue | None, *, is_founded: bool
    ) -> bool:
        """Register a copy that was just begun; False if anything is not as it was seen.

        Args:
            partition: its number.
            copy_id: of the copy.
            before: the registration that it replaces.
            is_founded: whether the partition's founding was seen. If not, this copy may be named in it.

        Raises:
            TallymarkError: the coordinator did not answer.
        """
        key = copy_key(partition, self._identity.node_id)
        compares = [absent(key) if before is None else unchanged(before)]
        if not is_founded:
            compares.append(absent(founding_key(partition)))
        put = Put(key, msgspec.msgpack.encode(Copy(copy_id)))
        return (await self._coordinator.txn(compares, [put])).succeeded

    async def register_copy(self, partition: int, copy_id: str) -> None:
        """Register this node's copy. Raises TallymarkError."""
        key = copy_key(partition, self._identity.node_id)
        await self._coordinator.put(key, msgspec.msgpack.encode(Copy(copy_id)))

    def register_copy_soon(self, partition: int, copy_id: str) -> None:
        """Register it in the background, for as long as it takes."""

        async def register() -> None:
            while True:
                try:
                    await self.register_copy(partition, copy_id)
                except TallymarkError as error:
                    _log.warning("the copy of partition %d could not be registered: %s", partition, error)
                    await asyncio.sleep(RETRY_S)
                else:
                    return

        self._spawn(register())

    async def remove_copies(self, partition: int, *, epoch: int, members: Membership) -> None:
        """As leader, have the nodes discard their copies that neither count nor are wished. Raises TallymarkError.

        They are told by a mark on their registration, of the copy that it names. A registration that is gone says
        nothing: the coordinator's state may be older than the copy.

        The mark is set only if the leader key is still that of this epoch, and the wish still what this node's
        replica has been told: so no other leader can have made the copy a member since, nor this one.
        """
        leader = self._leaders.item(leader_key(partition))
        wish = self._assignments.item(assignment_key(partition))
        if leader is None or epoch_of(leader) != epoch or wish is None:
            return
        staying = {member.node_id for member in members.members} | set(decode_value(Assignment, wish).nodes)
        prefix = COPIES + b"%d/" % partition
        compares = [Compare(leader.key, Target.CREATE_REVISION, "=", leader.create_revision), unchanged(wish)]
        marks: list[Put] = []
        for item in self._copies.items():
            if not item.key.startswith(prefix):
                continue
            copy = decode_value(Copy, item)
            if not copy.is_removed and item.key[len(prefix) :].decode("utf-8", "replace") not in staying:
                mark = msgspec.structs.replace(copy, is_removed=True, removed_at=epoch)
                compares.append(unchanged(item))
                marks.append(Put(item.key, msgspec.msgpack.encode(mark)))
        if marks:
            await self._coordinator.txn(compares, marks)  # where it fails, all that is looked at again

    def removed_copies(self) -> list[int]:
        """Partitions in which this node's registration is marked as removed, as far as is known."""
        found = []
        for partition in range(self._partition_count):
            item = self._copies.item(copy_key(partition, self._identity.node_id))
            if item is not None and decode_value(Copy, item).is_removed:
                found.append(partition)
        return found

    async def removal(self, partition: int) -> Removal | None:
        """The mark on this node's registration, as it is now; None where there is none. Raises TallymarkError."""
        item = await self.registration(partition)
        if item is None or not decode_value(Copy, item).is_removed:
            return None
        wish = await self._coordinator.get(assignment_key(partition))
        stands = (
            wish is not None
            # Whoever wished for something else since may have had this copy made a member again.
            and wish.mod_revision < item.mod_revision
            and self._identity.node_id not in decode_value(Assignment, wish).nodes
        )
        return Removal(item, decode_value(Copy, item), wish if stands else None)

    async def confirm_removal(self, removal: Removal) -> bool:
        """Whether a mark still stands, and nothing that it goes by has changed. Raises TallymarkError."""
        if removal.wish is None:
            return False
        compares = [unchanged(removal.item), unchanged(removal.wish)]
        # With a read in it: a transaction without one may be answered by a member that is behind.
        return (await self._coordinator.txn(compares, [Get(removal.item.key)])).succeeded

    async def take_back_removal(self, removal: Removal, copy_id: str) -> bool:
        """Register this copy in place of a mark that does not stand; whether that was done. Raises TallymarkError."""
        put = Put(removal.item.key, msgspec.msgpack.encode(Copy(copy_id)))
        return (await self._coordinator.txn([unchanged(removal.item)], [put])).succeeded

    async def unregister_copy(self, removal: Removal) -> bool:
        """Delete the registration of a copy that was discarded; whether that was done. Raises TallymarkError."""
        return (await self._coordinator.txn([unchanged(removal.item)], [Delete(removal.item.key)])).succeeded

    # ------------------------------------------------------------ the beginning of a cluster

    def _own_wishes(self) -> dict[int, int]:
        """The partitions that this node shall hold, and the revision of that wish."""
        found = {}
        for partition in range(self._partition_count):
            item = self._assignments.item(assignment_key(partition))
            if item is not None and self._identity.node_id in decode_value(Assignment, item).nodes:
                found[partition] = item.mod_revision
        return found

    async def _settle(self) -> None:
        """See to it that every partition is assigned and founded; every store does, until it is done."""
        while True:
            self._news.clear()
            try:
                if await establish_assignments(
                    self._coordinator, self._partition_count, self._replication_factor
                ):
                    await self._assignments.catch_up()
                    taken_up = self._own_wishes()
                    await asyncio.gather(*(self._host.take_up(partition) for partition in taken_up))
                    if not await found_partitions(self._coordinator, self._partition_count):
                        await self._foundings.catch_up()
                        self.is_placed = True
                        for partition, revision in self._own_wishes().items():
                            if taken_up.get(partition) != revision:  # wished while the others were taken up
                                self._spawn(self._take_up(partition))
                        self._host.on_placed()
                        return
            except TallymarkError as error:
                _log.warning("the partitions could not be placed yet: %s", error)
            try:
                async with asyncio.timeout(RETRY_S):
                    await self._news.wait()
            except TimeoutError:
                continue


def founding_of(item: KeyValue) -> Membership:
    """Who founded a partition, by the coordinator's record. Raises RemoteProtocolError."""
    founding = decode_value(Founding, item)
    return Membership(tuple(Member(node, copy_id) for node, copy_id in founding.members))
