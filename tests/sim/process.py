"""One store as a process that lives, dies and starts again: the real node between simulated ports.

What outlives a process is its disk, its name, and how fast its clock goes. Everything else is of one life: the loop,
the gate before the disk, the way to the coordinator, the `StoreNode`.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Final

import msgspec

from tallymark_protocol.errors import ErrorCode, RemoteProtocolError, TallymarkError, UnavailableError
from tallymark_protocol.frames import Frame
from tallymark_runtime.disk import BytesLike, DiskError, MemoryDisk
from tallymark_store.node import StoreConfig, StoreNode
from tallymark_store.store import Store
from tallymark_store.wal import Position

from .clients import Connection
from .clock import SimClock
from .coordination import Etcd, SimCoordinator
from .disk import Gate, SimDisk, SimWalThreads
from .loop import MILLISECOND, Crash, Event, ProcessLoop, World
from .network import Network
from .trace import Trace

_SLOW: Final = (
    "tallymark_store.archive.",
    "tallymark_store.fold.",
    "tallymark_store.reads",
)  # modules of what takes long


class Process:
    """A store's process.

    Attributes:
        name: its node id, and its name in the network.
        disk: what survives it.
        life: how many times it was started.
        node: of the present life; None while it is down.
        is_serving: `start` has returned in this life.
        durable_ends: by partition, where the log ended with the last group that was synced.
        is_tainted: bits on its disk have rotted or were lost since it was last seen whole.
        recorded_end: up to where the log's own groups say that it is durable: bad bytes below are damage.
    """

    def __init__(
        self,
        name: str,
        world: World,
        network: Network,
        etcd: Etcd,
        rng: random.Random,
        trace: Trace,
        *,
        config: StoreConfig,
        clock: SimClock,
        on_turn: Callable[[Process], None],
        on_recovered: Callable[[Process, Any], None],
        on_defect: Callable[[str, BaseException | None], None],
        archive_rng: random.Random | None = None,
    ) -> None:
        self.name = name
        self.disk = MemoryDisk()
        self.clock = clock
        self.config = msgspec.structs.replace(config, node_id=name)
        self.peers: dict[str, Process] = {}
        self.life = 0
        self.node: StoreNode | None = None
        self.loop: ProcessLoop | None = None
        self.coordinator: SimCoordinator | None = None
        self.gate = Gate()
        self.is_serving = False
        self.is_stopping = False
        self.is_tainted = False
        self.wiped = 0  # how often its disk was lost
        self.recorded_end = Position(0, 0)  # of the log: the last group on disk says that this is durable
        self.ended = False  # by itself: it is to be started again
        self.durable_ends: dict[int, int] = {}
        self.lost_ends: dict[int, int] = {}  # the same of a disk that was lost ...
        self.lost_ns = 0  # ... and when
        self.sync_ns = (100_000, 400_000)
        self.slow_syncs = 0.0
        self.reports: list[str] = []
        self.recycled_bytes = 0  # of log that was dropped, in lives that have ended
        self.installed = 0  # snapshots, likewise
        self.archived = 0  # events, likewise
        self.merges = 0  # of archived files, likewise
        self.spilled = 0  # units of cells, and alert records, that left memory, likewise
        self.dropped = 0  # events that were kept for their time, likewise
        self._archive_rng = archive_rng
        self._world = world
        self._network = network
        self._etcd = etcd
        self._rng = rng
        self._trace = trace
        self._on_turn = on_turn
        self._on_recovered = on_recovered
        self._on_defect = on_defect

    def __repr__(self) -> str:
        return self.name

    @property
    def is_up(self) -> bool:
        """Whether it runs, or is frozen."""
        return self.loop is not None

    @property
    def is_frozen(self) -> bool:
        return self.loop is not None and self.loop.is_frozen

    @property
    def store(self) -> Store | None:
        """The driver of the present life, while it runs and its log can be relied upon."""
        node = self.node
        if node is None or not self.is_serving or node.failed.is_set():
            return None
        return node.driver

    # ------------------------------------------------------------ life

    def start(self) -> None:
        """Begin a life."""
        assert self.loop is None
        self.life += 1
        self.is_serving = self.is_stopping = self.ended = False
        self._trace(self.name, "starts its life %d", self.life)
        self.gate = gate = Gate()
        gate.on_crash = lambda: self.crash("in the middle of a change on its disk", is_power_lost=True)
        self.loop = loop = ProcessLoop(
            self._world,
            f"{self.name}.{self.life}",
            monotonic_ns=self.clock.monotonic_ns,
            due_ns=self.clock.due_ns,
            on_error=self._failed,
            after_turn=self._after_turn,
        )
        self.coordinator = SimCoordinator(self._etcd, self.name, loop)
        loop.create_task(self._main(loop, self.coordinator))

    async def _main(self, loop: ProcessLoop, coordinator: SimCoordinator) -> None:
        node = StoreNode(
            self.config,
            disk=SimDisk(self.disk, self.gate),
            coordinator=coordinator,
            clock=self.clock,
            rng=random.Random(self._rng.getrandbits(64)),
            transport=self,
            address=f"{self.name}:1",
            report=self._report,
            threads=self._threads,
            offload=self._offload,
            aside=self._offload,
        )
        self.node = node
        try:
            await node.start()
        except (TallymarkError, DiskError) as error:
            self._trace(self.name, "cannot start: %s", error)
            self.ended = True
            return
        self.is_serving = True
        self._trace(self.name, "serves")

    def _threads(self, wal: Any, **callbacks: Any) -> SimWalThreads:
        # Recovery has synced and marked all of it.
        self._on_recovered(self, wal)
        self.durable_ends = {number: index.log_end for number, index in wal.partitions.items()}
        return SimWalThreads(wal, process=self, **callbacks)

    def _report(self, sentence: str) -> None:
        self.reports.append(sentence)
        self._trace(self.name, "reports: %s", sentence)

    def crash(self, why: str, *, is_power_lost: bool) -> None:
        """End the life at once. Without power, what was not synced is lost, torn or there."""
        if self.loop is None:
            return
        self._trace(self.name, "dies%s: %s", " with its machine" if is_power_lost else "", why)
        self.loop.kill()
        self.loop = None
        self.gate.is_open = False
        self._world.graveyard.append((self.node, self.coordinator))
        if self.node is not None and self.node.checkpointer is not None and self.node.snapshots is not None:
            self.recycled_bytes += self.node.checkpointer.recycled_bytes
            self.installed += self.node.snapshots.installed
            if self.node.archiver is not None:
                self.archived += self.node.archiver.events_archived
                self.merges += self.node.archiver.merges
                self.dropped += self.node.archiver.events_dropped
            if self.node.spilling is not None:
                self.spilled += self.node.spilling.spilled_units + self.node.spilling.spilled_alerts
        if self.node is not None and self.node.driver is not None:
            # They reserve a lot of address space, which a run of many lives would use up.
            for partition in self.node.driver.partitions.values():
                del partition.fold, partition.dedup, partition.windows
        self.node = self.coordinator = None
        self.is_serving = False
        if is_power_lost:
            self.disk.crash(self._rng, lose_all=self._rng.random() < 0.3)
        else:
            self.disk._memory.locks.clear()

    def stop(self) -> None:
        """End the life gracefully."""
        if self.loop is None or self.node is None or self.is_stopping or not self.is_serving:
            return
        self.is_stopping = True
        self._trace(self.name, "is told to stop")
        loop, node = self.loop, self.node

        async def close() -> None:
            try:
                await node.hand_over()
                await node.close()
            except (TallymarkError, DiskError) as error:
                self._trace(self.name, "has stopped with an error: %s", error)
            else:
                self._trace(self.name, "has stopped")
            self.ended = True  # a process ends with its main coroutine, however that does

        loop.post(lambda: loop.create_task(close()))

    def freeze(self) -> None:
        """Let nothing of it run."""
        if self.loop is not None and not self.loop.is_frozen:
            self._trace(self.name, "freezes")
            self.loop.freeze()

    def thaw(self) -> None:
        """Let it run on."""
        if self.loop is not None and self.loop.is_frozen:
            self._trace(self.name, "goes on")
            self.loop.thaw()

    def _after_turn(self) -> None:
        if not self.ended and self.node is not None and self.node.failed.is_set():
            self._trace(self.name, "has failed by its own word")
            self.ended = True
        self._on_turn(self)

    def _failed(self, what: str, error: BaseException | None) -> None:
        if isinstance(error, Crash):
            return
        self._on_defect(f"{self.name}: {what}", error)

    # ------------------------------------------------------------ ports

    def later(self, delay_ns: int, call: Callable[..., object], *args: Any) -> Event:
        """Have one of this life's threads do something."""
        loop = self.loop

        def due() -> None:
            if loop is not None and loop.is_alive:
                loop.post(call, *args)

        return self._world.after(delay_ns, due)

    def sync_delay_ns(self) -> int:
        """How long the next sync takes."""
        low, high = self.sync_ns
        if self.slow_syncs and self._rng.random() < self.slow_syncs:
            return self._rng.randint(50 * MILLISECOND, 1_500 * MILLISECOND)
        return self._rng.randint(low, high)

    def durable(self, group: Any, recorded_end: Position) -> None:
        """A group is on the disk; it says up to where the log was durable before it."""
        self.durable_ends.update(group.log_ends)
        self.recorded_end = recorded_end

    def checkpoint(self) -> object:
        """Have the node take a checkpoint now."""
        if self.loop is None or self.node is None or self.node.checkpointer is None:
            return False
        loop, node = self.loop, self.node

        async def take() -> None:
            try:
                await node.checkpointer.take()
            except TallymarkError as error:
                self._trace(self.name, "no checkpoint: %s", error)

        loop.post(lambda: loop.create_task(take()))
        return None

    async def _offload(self, call: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """What a thread does: of archive and totals in its time, so that there is much in between; all else at once."""
        rng = self._archive_rng
        if rng is None or not call.__module__.startswith(_SLOW):
            return call(*args, **options)
        await asyncio.sleep(rng.choice((0.0, 0.002, 0.02, 0.1)))
        result = call(*args, **options)
        await asyncio.sleep(rng.choice((0.0, 0.001, 0.01)))
        return result

    def send(self, node_id: str, parts: Sequence[BytesLike]) -> bool:
        """The transport of bundles."""
        if self.loop is None:
            return False
        target = self.peers.get(node_id)
        if target is None or target is self:
            return False
        data = b"".join(bytes(part) for part in parts)
        self._network.send(self.name, node_id, target.take_bundle, self.name, data)
        return True

    def take_bundle(self, sender: str, data: bytes) -> None:
        """What another node's transport was given has come."""
        if self.loop is not None:
            self.loop.post(self._on_bundle, self.node, sender, data)

    def _on_bundle(self, node: StoreNode | None, sender: str, data: bytes) -> None:
        if node is None or node.driver is None:
            return
        try:
            node.on_bundle(sender, data)
        except RemoteProtocolError as error:
            self._on_defect(f"{self.name} does not understand {sender}", error)

    def take_append(self, connection: Connection, frame: Frame) -> None:
        """A gateway's request has come."""
        if self.loop is None or not self.is_serving or self.is_stopping:
            refusal = UnavailableError("the store is not ready", code=ErrorCode.CLOSED)
            connection.respond_error(frame.request_id, refusal)
        else:
            self.loop.post(self._on_append, self.node, connection, frame)

    @staticmethod
    def _on_append(node: StoreNode, connection: Connection, frame: Frame) -> None:
        node.on_append(connection, frame)

    def call(
        self, call: Any, answer: Callable[[Any, BaseException | None], None], caller: Hashable = None
    ) -> None:
        """Ask the node; `answer(result, error)` is called once, if it lives."""
        if self.loop is None or self.node is None or not self.is_serving:
            answer(None, UnavailableError("the store is not ready", code=ErrorCode.CLOSED))
            return
        loop, node = self.loop, self.node

        async def ask() -> None:
            try:
                result = await node.call(call, caller)
            except TallymarkError as error:
                answer(None, error)
            else:
                answer(result, None)

        loop.post(lambda: loop.create_task(ask()))
