"""The driver of the replicas: messages, time, syncs and keys in; their effects carried out, in order.

One for all partitions of a process. Calls into a replica go through `call`, one at a time: what a call asks for is
carried out before the next call. Messages that leave in one turn of the loop are gathered by peer and go out together
at its end (`links`). One timer of the loop serves all replicas.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import msgspec

from tallymark_protocol.errors import (
    BackpressureError,
    ErrorCode,
    RemoteProtocolError,
    UnavailableError,
    WireError,
)
from tallymark_runtime.clock import Clock
from tallymark_runtime.disk import DiskError
from tallymark_store import links
from tallymark_store.fitness import Fitness
from tallymark_store.links import Outgoing, Transport
from tallymark_store.partition import Partition
from tallymark_store.replicas_file import ReplicasFile
from tallymark_store.replication.effects import (
    AppendMembership,
    BeginEpoch,
    Committed,
    CreateKey,
    DeleteKey,
    Discarded,
    Effect,
    Fault,
    Install,
    OfferSnapshot,
    Persist,
    Role,
    Send,
    Serve,
    StepDown,
    Truncated,
)
from tallymark_store.replication.messages import AnyMessage, Ask, Offer, Piece
from tallymark_store.replication.ports import DurableState, Membership, ReplicaConfig
from tallymark_store.replication.replica import Replica
from tallymark_store.replication.wal_log import WalLog
from tallymark_store.wal import DamagedError, LogFailedError, Wal

_log = logging.getLogger(__name__)

RETRY_NS = 1_000_000_000  # of what found no room
_TIMER_MIN_S = 0.001
_OUTBOX_MAX = 100_000  # messages to one peer in one turn; far more than any turn makes


class Identity(msgspec.Struct, frozen=True):
    """Who a store is."""

    node_id: str
    instance: str  # of this process life
    cluster_id: str


class Keys(Protocol):
    """What replicas ask of the coordinator. Nothing here waits; results come through `Replicating.call`."""

    def create(self, partition: int) -> None:
        """Create the leader key; then call `key_created` or `key_refused`."""
        ...

    def delete(self, partition: int, epoch: int) -> None:
        """Delete the leader key that was created at this epoch; tried again until it is gone."""
        ...


class Leadership(Protocol):
    """What the rest of the store does when replicas change: `store.Store`."""

    def begin_epoch(self, partition: Partition, epoch: int) -> None:
        """Bring the judge to the log's end, then append the epoch start."""
        ...

    def append_membership(self, partition: Partition, epoch: int, membership: Membership) -> None:
        """Append a membership record. Raises BackpressureError, DamagedError."""
        ...

    def serve(self, partition: Partition, epoch: int) -> None:
        """Take appends and reads."""
        ...

    def step_down(self, partition: Partition, epoch: int, reason: str) -> None:
        """Take no more appends; fail what waits; take the judge back."""
        ...

    def committed(self, partition: Partition, high_watermark: int) -> None:
        """Everything below is committed."""
        ...

    def discarded(self, partition: Partition, copy_id: str) -> None:
        """Forget all state of the partition; its log is empty."""
        ...

    def log_failed(self, error: BaseException) -> None:
        """What is on disk is unknown: the process must end."""
        ...

    def sync_soon(self) -> None:
        """Something was written to the log: sync it."""
        ...

    def damage_error(self, number: int, error: WireError) -> WireError:
        """What is told to those who ask a damaged copy."""
        ...


class SnapshotPort(Protocol):
    """Who sends and takes in snapshots: `snapshots.Snapshots`. Nothing here waits."""

    def offer(self, number: int, to: str, epoch: int) -> None:
        """Offer a node the newest checkpoint of a partition."""
        ...

    def install(self, number: int, leader: str, offer: Offer) -> None:
        """Get a snapshot, and put it in the place of log and state; asked for again and again."""
        ...

    def take(self, sender: str, message: Ask | Piece) -> None:
        """Take a message that is about the bytes of a snapshot."""
        ...


class Replicating:
    """All replicas of a process. Part of `store.Store`.

    Attributes:
        replicas: by partition; those with a copy here.
        logs: their logs.
        fitness: whether this store can lead as well as others.
        identity: who this store is.
        snapshots: who sends and takes in snapshots, once there is somebody.
    """

    def __init__(
        self,
        wal: Wal,
        partitions: dict[int, Partition],
        clock: Clock,
        *,
        identity: Identity,
        config: ReplicaConfig,
        file: ReplicasFile,
        transport: Transport,
        keys: Keys,
        leadership: Leadership,
        new_copy_id: Callable[[], str],
    ) -> None:
        self.replicas: dict[int, Replica] = {}
        self.logs: dict[int, WalLog] = {}
        self.identity = identity
        self.keys = keys
        self.snapshots: SnapshotPort | None = None
        self.file = file
        self.heard_ns: dict[int, int] = {}  # by partition, when a leader was last heard of
        self.fitness = Fitness(
            wal, clock, self.replicas, node_id=identity.node_id, lease_ns=config.lease_ns, call=self.call
        )
        self._wal = wal
        self._partitions = partitions
        self._clock = clock
        self._config = config
        self._transport = transport
        self._leadership = leadership
        self._new_copy_id = new_copy_id
        self._loop = asyncio.get_running_loop()
        self._calls: deque[tuple[int, Callable[..., list[Effect]], tuple[Any, ...]]] = deque()
        self._calling = False
        self._dirty: dict[int, None] = {}  # partitions that a leader has appended to; in order
        self._outbox: dict[str, list[Outgoing]] = {}
        self._outbox_due = False
        self._timer: asyncio.TimerHandle | None = None
        self._timer_ns = 2**63 - 1  # when it fires
        self._silent: set[int] = set()  # replicas that hear and say nothing
        self._reset_due: dict[int, str] = {}  # discarded copies whose log could not be reset yet
        self._emptying: set[int] = set()  # discarded copies whose log's reset is not synced yet
        self._closed = False

    # ------------------------------------------------------------ replicas

    def add(
        self,
        number: int,
        state: DurableState,
        *,
        founding: Membership | None,
        earlier: Sequence[Membership] = (),
        is_damaged: bool,
    ) -> None:
        """Take up a partition's copy, as it was recovered; `earlier` memberships are those that a checkpoint knows."""
        log = self.logs[number] = WalLog(self._wal, number, self._leadership.sync_soon)
        history = [founding] if founding is not None else []
        history += [m for m in earlier if (m.offset >= 0 or not history) and m.offset < log.log_start]
        try:
            history += log.memberships()
        except (DamagedError, RemoteProtocolError) as error:
            _log.error("partition %d: %s", number, error)
            is_damaged = True
        self.replicas[number] = Replica(
            number,
            node_id=self.identity.node_id,
            instance=self.identity.instance,
            log=log,
            state=state,
            config=self._config,
            history=history,
            new_copy_id=self._new_copy_id,
            is_damaged=is_damaged,
            now_ns=self._clock.monotonic_ns(),
        )
        self._arm(number)

    def silence(self, number: int) -> None:
        """Have a replica hear and say nothing, as if it were cut off, and try for nothing, until it may `speak`."""
        self._silent.add(number)

    def speak(self, number: int) -> None:
        """Take a `silence` back."""
        self._silent.discard(number)

    def remove(self, number: int) -> bool:
        """Take part in a partition no more, and empty its log; False where there is no room to write that down now.

        The rest of its state is the caller's to forget.
        """
        try:
            self.logs[number].reset()
        except BackpressureError as error:
            _log.warning("partition %d: its copy cannot be removed now: %s", number, error.message)
            return False
        self.persist(number, None)
        for where in (self.replicas, self.logs, self.heard_ns, self._reset_due, self._dirty):
            where.pop(number, None)
        self._emptying.discard(number)
        return True

    def persist(self, number: int, state: DurableState | None) -> None:
        """Make a copy's state durable.

        Raises:
            DiskError: it may or may not be; the process must end.
        """
        known = self.file.states.get(number)
        if state is not None and known is not None:
            if known.copy_id == state.copy_id:
                # Recorded beside the replica, from time to time: what was known once stays known.
                state = msgspec.structs.replace(
                    state,
                    high_watermark=max(state.high_watermark, known.high_watermark),
                    is_damaged=state.is_damaged or known.is_damaged,
                )
            else:
                # Until the log is empty on disk, too, the bytes in it are those of the discarded copy.
                state = msgspec.structs.replace(state, is_damaged=True)
        self._save(number, state)

    def _save(self, number: int, state: DurableState | None) -> None:
        try:
            self.file.save(number, state)
        except DiskError as error:
            self._leadership.log_failed(error)
            raise

    # ------------------------------------------------------------ calls and effects

    def call(self, number: int, method: Callable[..., list[Effect]], *args: Any) -> None:
        """Call a method of a partition's replica, with the time as its last argument; carry out what it asks for."""
        self._calls.append((number, method, args))
        if self._calling:
            return
        self._calling = True
        try:
            while self._calls and not self._closed:
                number, method, args = self._calls.popleft()
                self._call(number, method, args)
        finally:
            self._calling = False

    def _call(self, number: int, method: Callable[..., list[Effect]], args: tuple[Any, ...]) -> None:
        if number in self._reset_due and not self._reset(number) and not _is_news(method):
            return
        try:
            effects = method(*args, self._clock.monotonic_ns())
            for effect in effects:
                _HANDLERS[type(effect)](self, number, effect)
        except DamagedError as error:
            self._damaged(number, error.message)
        except LogFailedError:
            return  # the store has been told, and ends
        except RemoteProtocolError as error:
            _log.warning("partition %d: a message was dropped: %s", number, error.message)
        except Exception as error:
            self._leadership.log_failed(
                error
            )  # a defect: what is believed here is not to be acted upon any more
            raise
        self._arm(number)

    def _damaged(self, number: int, reason: str) -> None:
        replica = self.replicas[number]
        if replica.role is not Role.DAMAGED:
            self._calls.appendleft((number, replica.damaged, (reason,)))

    def send(self, number: int, to: str, message: AnyMessage) -> None:
        """Send a message about a partition, with the others of this turn of the loop."""
        self._on_send(number, Send(to, message, []))

    def _on_send(self, number: int, effect: Send) -> None:
        if number in self._silent:
            return
        waiting = self._outbox.get(effect.to)
        if waiting is None:
            waiting = self._outbox[effect.to] = []
        if len(waiting) < _OUTBOX_MAX:
            waiting.append(Outgoing(effect.message, effect.records))
        if not self._outbox_due:
            self._outbox_due = True
            self._loop.call_soon(self.flush_outbox)

    def _on_persist(self, number: int, effect: Persist) -> None:
        self.persist(number, effect.state)

    def _on_create_key(self, number: int, effect: CreateKey) -> None:  # noqa: ARG002
        if number in self._silent or self.fitness.clock_fault(number):
            # It would be given up again: as if the coordinator were away.
            self._calls.append((number, self.replicas[number].key_refused, ()))
            return
        self.keys.create(number)

    def _on_delete_key(self, number: int, effect: DeleteKey) -> None:
        self.keys.delete(number, effect.epoch)

    def _on_begin_epoch(self, number: int, effect: BeginEpoch) -> None:
        self._leadership.begin_epoch(self._partitions[number], effect.epoch)

    def _on_serve(self, number: int, effect: Serve) -> None:
        self._leadership.serve(self._partitions[number], effect.epoch)

    def _on_step_down(self, number: int, effect: StepDown) -> None:
        self._dirty.pop(number, None)
        self._leadership.step_down(self._partitions[number], effect.epoch, effect.reason)

    def _on_append_membership(self, number: int, effect: AppendMembership) -> None:
        replica = self.replicas[number]
        try:
            self._leadership.append_membership(self._partitions[number], replica.epoch, effect.membership)
        except (BackpressureError, UnavailableError) as error:
            # The replica looks, finds nothing appended, and asks again later.
            _log.warning("partition %d: its members cannot be changed now: %s", number, error.message)
            self._dirty[number] = None
            self._leadership.sync_soon()

    def _on_truncated(self, number: int, effect: Truncated) -> None:
        # Nothing above the high watermark is in any state here but the log's own.
        partition = self._partitions[number]
        assert effect.log_end >= partition.high_watermark, "what is committed is never cut off"
        assert partition.judged_end <= effect.log_end, "only a leader's judge goes ahead of what is committed"

    def _on_committed(self, number: int, effect: Committed) -> None:
        self._leadership.committed(self._partitions[number], effect.high_watermark)

    def _on_fault(self, number: int, effect: Fault) -> None:
        partition = self._partitions[number]
        message = f"partition {number}: this copy cannot be trusted: {effect.reason}"
        _log.error("%s", message)
        if partition.error is None:
            error = WireError(int(ErrorCode.PARTITION_DAMAGED), False, message)
            partition.error = self._leadership.damage_error(number, error)
        self._wal.mark_damaged(number)
        self._leadership.sync_soon()
        # The log's own mark comes with its next marker, which waits until the log is idle.
        state = self.file.states.get(number)
        if state is not None and state.copy_id == self.replicas[number].copy_id:
            self.persist(number, msgspec.structs.replace(state, is_damaged=True))

    def _on_offer_snapshot(self, number: int, effect: OfferSnapshot) -> None:
        if self.snapshots is not None:
            self.snapshots.offer(number, effect.to, effect.epoch)

    def _on_install(self, number: int, effect: Install) -> None:
        if self.snapshots is not None:
            self.snapshots.install(number, effect.leader, effect.offer)

    def _on_discarded(self, number: int, effect: Discarded) -> None:
        self._reset_due[number] = effect.copy_id
        self._reset(number)

    def _reset(self, number: int) -> bool:
        """Empty the log of a discarded copy; whether that is done."""
        try:
            self._leadership.discarded(self._partitions[number], self._reset_due[number])
            self.logs[number].reset()
        except BackpressureError as error:
            _log.warning("partition %d: the discarded copy cannot be emptied now: %s", number, error.message)
            return False
        del self._reset_due[number]
        self._emptying.add(number)
        return True

    def _emptied(self, number: int) -> None:
        """The log of a discarded copy is empty on disk: what comes now is the new copy's."""
        self._emptying.discard(number)
        state = self.file.states.get(number)
        if state is not None and state.copy_id == self.replicas[number].copy_id:
            self._save(number, msgspec.structs.replace(state, is_damaged=False))

    # ------------------------------------------------------------ the log

    def mark_appended(self, number: int) -> None:
        """A leader's log has grown; `flush` tells its replica."""
        self._dirty[number] = None

    def flush(self) -> None:
        """Replicate what was appended in this turn of the loop."""
        if self._dirty:
            dirty, self._dirty = self._dirty, {}
            for number in dirty:
                replica = self.replicas.get(number)
                if replica is not None and replica.role in (Role.STARTING, Role.LEADER):
                    self.call(number, replica.appended)
            self.flush_outbox()

    def synced(self, groups: Sequence[tuple[int, dict[int, int]]]) -> None:
        """Groups of the log are on disk: (number, log ends by partition), in order."""
        latest: dict[int, tuple[int, int]] = {}
        for group, log_ends in groups:
            for number, end in log_ends.items():
                latest[number] = (group, end)
        for number, (group, end) in latest.items():
            if number in self.replicas:
                self.call(number, self._synced, number, group, end)
        self.flush_outbox()

    def _synced(self, number: int, group: int, end: int, now_ns: int) -> list[Effect]:
        # Looked at only now: a discarded copy's log may have been emptied just before this call.
        replica = self.replicas.get(number)
        durable = None if replica is None else self.logs[number].durable_end(group, end)
        if replica is None or durable is None:
            return []
        if number in self._emptying and replica.role is not Role.DAMAGED:
            self._emptied(number)
        return replica.synced(durable, now_ns)

    # ------------------------------------------------------------ messages

    def on_bundle(self, sender: str, data: bytes) -> None:
        """Take what another store sent.

        Raises:
            RemoteProtocolError: it makes no sense, or is not meant for this store.
        """
        bundle = links.decode(data)
        identity = self.identity
        if bundle.cluster_id != identity.cluster_id:
            raise RemoteProtocolError("the other store belongs to another cluster")
        if bundle.receiver != identity.node_id:
            raise RemoteProtocolError(f"this is {identity.node_id!r}, not {bundle.receiver!r}")
        if (sender and bundle.sender != sender) or bundle.sender == identity.node_id or not bundle.sender:
            raise RemoteProtocolError(f"{bundle.sender!r} cannot be who speaks here")
        self.fitness.heard(bundle.sender, bundle.standing)
        for message, records in bundle.messages:
            replica = self.replicas.get(message.partition)
            if isinstance(message, Ask | Piece):
                if replica is not None and self.snapshots is not None:
                    self.snapshots.take(bundle.sender, message)
            elif replica is not None and message.partition not in self._silent:
                self.call(message.partition, replica.step, bundle.sender, message, records)
                if replica.leader == bundle.sender:
                    self.heard_ns[message.partition] = self._clock.monotonic_ns()

    def flush_outbox(self) -> None:
        """Send what waits, one bundle a peer."""
        self._outbox_due = False
        if not self._outbox or self._closed:
            return
        outbox, self._outbox = self._outbox, {}
        identity = self.identity
        standing = self.fitness.standing()
        packed: links.Packed = {}
        for node_id, outgoing in outbox.items():
            for parts in links.encode(
                identity.cluster_id, identity.node_id, node_id, outgoing, standing, packed
            ):
                if not self._transport.send(node_id, parts):
                    break  # what follows would be out of order, and most likely be dropped as well

    # ------------------------------------------------------------ time

    def _arm(self, number: int) -> None:
        """See to it that the timer fires when this replica is due."""
        replica = self.replicas.get(number)
        if replica is None or self._closed:
            return
        due_ns = replica.next_deadline()
        if due_ns < self._timer_ns:
            self._set_timer(due_ns)

    def _set_timer(self, due_ns: int) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._timer_ns = due_ns
        if due_ns < 2**63 - 1:
            delay_s = (due_ns - self._clock.monotonic_ns()) / 1e9
            self._timer = self._loop.call_later(max(delay_s, _TIMER_MIN_S), self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self._timer_ns = 0  # nothing is armed while this goes on
        now_ns = self._clock.monotonic_ns()
        self._wal.poll_space(now_ns)
        self.fitness.consider(now_ns)
        for number in sorted(self.replicas):
            replica = self.replicas[number]
            if replica.next_deadline() <= now_ns or number in self._reset_due:
                self.call(number, replica.tick)
        self.flush_outbox()
        if not self._closed:
            due_ns = min((replica.next_deadline() for replica in self.replicas.values()), default=2**63 - 1)
            if self._reset_due:
                due_ns = min(due_ns, now_ns + RETRY_NS)
            self._set_timer(due_ns)

    def close(self) -> None:
        """Do nothing more."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._outbox.clear()


_HANDLERS: dict[type, Callable[[Replicating, int, Any], None]] = {
    Send: Replicating._on_send,
    Persist: Replicating._on_persist,
    CreateKey: Replicating._on_create_key,
    DeleteKey: Replicating._on_delete_key,
    BeginEpoch: Replicating._on_begin_epoch,
    Serve: Replicating._on_serve,
    StepDown: Replicating._on_step_down,
    AppendMembership: Replicating._on_append_membership,
    Truncated: Replicating._on_truncated,
    Committed: Replicating._on_committed,
    Discarded: Replicating._on_discarded,
    OfferSnapshot: Replicating._on_offer_snapshot,
    Install: Replicating._on_install,
    Fault: Replicating._on_fault,
}


# What the coordinator tells does not touch the log, and is told only once.
_NEWS = (
    Replica.key_created,
    Replica.key_refused,
    Replica.key_changed,
    Replica.lease_lost,
    Replica.set_founding,
    Replica.set_wish,
)


def _is_news(method: Callable[..., list[Effect]]) -> bool:
    return getattr(method, "__func__", None) in _NEWS
