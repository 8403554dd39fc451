"""The copies of partitions on a store: taken up, begun anew, removed.

Owns what must never be mixed up: a copy's id, its log, its checkpoint and its state in memory belong together, and
whatever of them is lost takes the others along. What becomes of a copy is decided by replicas and leaders.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import defaultdict
from collections.abc import Callable, Collection

import msgspec

from tallymark_protocol.errors import ErrorCode, TallymarkError, UnavailableError, WireError
from tallymark_runtime.assignments import Copy
from tallymark_runtime.catalog import decode_value
from tallymark_runtime.disk import Disk, DiskError
from tallymark_store import checkpoint
from tallymark_store.checkpointer import folder
from tallymark_store.coordination import Coordination
from tallymark_store.partition import Partition
from tallymark_store.replication.effects import Role
from tallymark_store.replication.ports import DurableState, Member, Membership
from tallymark_store.store import WAY_OUT, Store

_log = logging.getLogger(__name__)

TIDY_S = 1.0  # how often it is looked whether copies were removed
WATERMARKS_EVERY = 5  # times of these the high watermarks are recorded as well


class Copies:
    """The copies on one store.

    Args:
        store: the driver.
        coordination: where copies are registered.
        node_id: of this store.
        checkpoints: the folder that holds a folder for each partition.
        manifests: of the checkpoints in force; shared with who takes them.
        salt: of this process's tables.
        new_copy_id: gives random ids.
        report: told, in sentences, what needs attention.
    """

    def __init__(
        self,
        store: Store,
        coordination: Coordination,
        *,
        node_id: str,
        checkpoints: Disk,
        manifests: dict[int, checkpoint.Manifest],
        salt: int,
        new_copy_id: Callable[[], str],
        report: Callable[[str], None],
    ) -> None:
        self._store = store
        self._coordination = coordination
        self._node_id = node_id
        self._checkpoints = checkpoints
        self._manifests = manifests
        self._salt = salt
        self._new_copy_id = new_copy_id
        self._report = report
        self._changing: defaultdict[int, asyncio.Lock] = defaultdict(asyncio.Lock)  # taken up, or removed
        self._wake = asyncio.Event()  # a copy of this node was removed by a leader
        # Called when all that a copy had is forgotten: what was on its way to it is of no use.
        self.on_forgotten: Callable[[int], None] = lambda _: None

    # ------------------------------------------------------------ beginning

    def adopt(self, foundings: dict[int, Membership], older: Collection[int] = ()) -> None:
        """Take up the copies that were found; those in `older` are known to have been further than they are."""
        store = self._store
        file = store.replicating.file
        if not file.is_new:
            for number in sorted(store.wal.partitions):
                if number not in file.states and store.wal.log_end(number):
                    # Removed, and the process ended before its log was emptied.
                    store.wal.reset(number, 0, epoch=0, append_ns=0)
                    self._forget(number)
        for number, state in sorted(file.states.items()):
            # What was begun after the log was lost is as good as any: it lies in the present one.
            damage = ""
            if file.is_lost(number):
                damage = "its log is gone: another one was begun in its place"
            elif number in older:
                damage = (
                    "the data directory is older than this store's last start: it was put back from a backup"
                )
            self._add(number, state, foundings.get(number), damage)

    def _add(self, number: int, state: DurableState, founding: Membership | None, damage: str) -> None:
        store = self._store
        partition = store.partitions[number]
        if damage and partition.error is None:
            self._refuse(partition, damage)
        known = msgspec.structs.replace(
            state, high_watermark=max(state.high_watermark, partition.high_watermark)
        )
        store.replicating.add(
            number,
            known,
            founding=founding,
            earlier=checkpointed_memberships(self._manifests.get(number)),
            is_damaged=partition.error is not None,
        )
        replica = store.replicas[number]
        if replica.role is Role.DAMAGED:
            if partition.error is None:
                self._refuse(partition, replica.why)
            assert partition.error is not None
            partition.error = store.damage_error(number, partition.error)

    def _refuse(self, partition: Partition, why: str) -> None:
        message = f"partition {partition.partition}: {why}; {WAY_OUT}"
        partition.error = WireError(int(ErrorCode.PARTITION_DAMAGED), False, message)
        self._report(message)

    async def take_up(self, number: int) -> None:
        """Take part in a partition, under a copy id that is durable and registered.

        Raises:
            TallymarkError: the coordinator did not answer, or something is on its way; call it again.
        """
        async with self._changing[number]:
            await self._take_up(number)

    async def _take_up(self, number: int) -> None:
        store, coordination = self._store, self._coordination
        if number in store.replicas and not await self._settle_removal(number):
            raise UnavailableError(f"partition {number}: the copy that was removed is still there")
        item = await coordination.registration(number)
        copy = None if item is None else decode_value(Copy, item)
        registered = "" if copy is None or copy.is_removed else copy.copy_id
        replica = store.replicas.get(number)
        if replica is not None:
            if registered != replica.copy_id:  # it was not done when the process ended
                await coordination.register_copy(number, replica.copy_id)
            return
        await coordination.know_foundings()
        founding = coordination.founding(number)
        damage = ""
        # Of an attempt before this one, which may have registered it without being told, or may do so yet.
        begun = store.replicating.file.states.get(number)
        if begun is not None and begun.copy_id == registered:
            state = begun
        elif registered and founding is not None:
            # What was kept under this id is gone. It is not replaced before a majority of others is there: the
            # disk may only have been forgotten.
            state = DurableState(registered)
            damage = "its files are gone, though the copy is registered"
        else:
            state = begun or DurableState(self._new_copy_id())
            store.replicating.persist(number, state)
            if not await coordination.register_new_copy(
                number, state.copy_id, item, is_founded=founding is not None
            ) and not await self._is_registered(number, state.copy_id):
                store.replicating.persist(number, None)
                raise UnavailableError(f"partition {number}: its founding or its copies have just changed")
        self._add(number, state, founding, damage)
        replica = store.replicas[number]
        store.replicating.call(number, replica.set_wish, coordination.assignment(number))
        late = coordination.founding(number)
        if late is not None and founding is None:
            store.replicating.call(number, replica.set_founding, late)
        coordination.tell_leader(number)

    def changing(self, number: int) -> asyncio.Lock:
        """Held while a partition's copy is taken up, removed, or brought up by a snapshot."""
        return self._changing[number]

    def replace_state(self, number: int, partition: Partition) -> None:
        """A snapshot takes the place of a copy's state; its checkpoint, of the discarded log, is of no use any more."""
        self._manifests.pop(number, None)
        self._store.partitions[number] = partition
        self._store.end_generation(number)

    async def _is_registered(self, number: int, copy_id: str) -> bool:
        item = await self._coordination.registration(number)
        return item is not None and decode_value(Copy, item) == Copy(copy_id)

    # ------------------------------------------------------------ ending

    def on_discarded(self, number: int, copy_id: str) -> None:
        """A copy begins anew: nothing of what it was may be found again."""
        self._report(f"partition {number}: this copy begins anew")
        self._forget(number)
        self._coordination.register_copy_soon(number, copy_id)

    def _forget(self, number: int) -> None:
        """Forget all state of a partition but its log: its copy is discarded."""
        store = self._store
        self.on_forgotten(number)
        checkpoint.discard(self._checkpoints.at(folder(number)))
        self._manifests.pop(number, None)
        before = store.partitions[number]
        fresh = Partition(
            number, dedup_window_ns=before.dedup_window_ns, indexes=store.wal.partitions, salt=self._salt
        )
        fresh.high_watermark = 0
        store.partitions[number] = fresh
        store.end_generation(number)

    def on_removed(self) -> None:
        """A leader has removed a copy of this node, and nobody wishes it here any more: `tidy` sees to it."""
        self._wake.set()

    async def tidy(self) -> None:
        """For ever: have nodes discard copies that were removed, discard those of this node, record watermarks."""
        turns = 0
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TIDY_S):
                    await self._wake.wait()
            self._wake.clear()
            if self._store.stopped.is_set():
                return
            turns += 1
            if turns % WATERMARKS_EVERY == 0:
                self.save_watermarks()
            try:
                for number, replica in sorted(self._store.replicas.items()):
                    settled = replica.membership.offset < replica.high_watermark
                    if replica.role is Role.LEADER and settled:
                        await self._coordination.remove_copies(
                            number, epoch=replica.epoch, members=replica.membership
                        )
                for number in self._coordination.removed_copies():
                    async with self._changing[number]:
                        await self._settle_removal(number)
            except TallymarkError as error:
                _log.warning("removed copies are left where they are for now: %s", error)

    async def _settle_removal(self, number: int) -> bool:
        """Discard a copy that a leader has removed, or take the mark back; False if it must be tried again.

        A mark says that the copy was no member, by the log of the leader of its epoch, and that nobody wished it. It
        may be old when it is read: the copy may have become a member again, and what it acknowledged may count. That
        takes a later wish, or a later leader, whose epoch the copy has then promised before it counted. With neither
        there, nobody counts on it; and from that check on it says nothing more, under this id, until it is gone.
        """
        store, coordination = self._store, self._coordination
        removal = await coordination.removal(number)
        if removal is None:
            return True
        replica = store.replicas.get(number)
        if replica is None:  # it was discarded before the process ended, or before the coordinator was away
            return await coordination.unregister_copy(removal)
        if (
            removal.wish is None
            or replica.copy_id != removal.copy.copy_id
            or replica.promised > removal.copy.removed_at
        ):
            return await coordination.take_back_removal(removal, replica.copy_id)
        if replica.is_contending:
            store.replicating.call(number, replica.resign, "this copy was removed")
            return False
        store.replicating.silence(number)
        try:
            if not await coordination.confirm_removal(removal) or not store.replicating.remove(number):
                return False
        finally:
            store.replicating.speak(number)
        self._forget(number)
        self._report(f"partition {number}: this copy was removed")
        coordination.tell_leader(number)  # a key that this node holds has nobody to give it up any more
        return await coordination.unregister_copy(removal)

    # ------------------------------------------------------------ watermarks

    def save_watermarks(self) -> None:
        """Record the high watermarks: a log that ends below one has lost something."""
        file = self._store.replicating.file
        states = dict(file.states)
        for number, replica in sorted(self._store.replicas.items()):
            state = states.get(number)
            if state is None or replica.role is Role.DAMAGED or state.copy_id != replica.copy_id:
                continue
            known = min(replica.high_watermark, replica.durable_end)
            if known > state.high_watermark:
                states[number] = msgspec.structs.replace(state, high_watermark=known)
        if states != file.states:
            try:
                file.save_all(states)
            except DiskError as error:
                self._store.log_failed(error)


def checkpointed_memberships(manifest: checkpoint.Manifest | None) -> list[Membership]:
    """The memberships that a checkpoint knows of, ascending: those of the log before it."""
    if manifest is None:
        return []
    return [
        Membership(tuple(Member(*pair) for pair in members), offset)
        for offset, members in manifest.memberships
    ]
