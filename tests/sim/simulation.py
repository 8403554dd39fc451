"""A whole run from one seed: stores, coordinator, clients, what goes wrong, and whoever looks on.

Safety first: faults for some virtual seconds while clients write and read, all invariants looked at after every turn.
Then everything heals, and the cluster has to be alive: writes succeed, everything that waits is answered, copies
come to agree. Then the ledger, the log and the totals are compared.
"""

from __future__ import annotations

import contextlib
import gc
import random
import sys
import traceback
import warnings
from collections.abc import Iterator
from typing import Any
from unittest import mock

import msgspec

from tallymark_protocol.frames import Frame
from tallymark_protocol.schema import encode_record, make_record
from tallymark_runtime.assignments import Assignment, Copy, assignment_key, copy_key
from tallymark_runtime.catalog import Leader, leader_key, metric_key
from tallymark_runtime.coordinator import Put
from tallymark_store.archive import archiver, policy, retention
from tallymark_store.node import StoreConfig
from tallymark_store.replication.effects import Role
from tallymark_store.replication.ports import Member
from tallymark_store.wal import WalConfig

from .alerts import SCHEMAS, Alerts
from .checkers import Checkers
from .clients import Clients, Connection, Ledger, Part
from .clock import EPOCH_NS, SimClock
from .coordination import Etcd
from .faults import Faults, draw_kinds
from .logbook import SEATS
from .loop import MILLISECOND, SECOND, SimulationError, World
from .network import Network, Weather
from .process import Process
from .readers import Readers
from .subscribers import DONE_NS, Subscribers
from .trace import Trace

LEASE_S = 2.0
LIVE_NS = 8 * SECOND  # after healing, by when a new write must be answered: twice the lease, and starting up
DAY_NS = SECOND  # that raw events are kept for, where they are
RETAINED = ("m0", SEATS)  # metrics of which they are, in some runs
REST_NS = 40 * SECOND  # by when everything must have come to rest


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What a run is told beside its seed; the rest is drawn."""

    kinds: tuple[str, ...] | None = None  # of faults
    safety_ns: int = 7 * SECOND
    nodes: int = 0  # 0: drawn
    partitions: int = 0  # 0: drawn
    is_destructive: bool = False
    chunks: int = 36
    reads: int = 18
    mean_ms: int = 0  # between faults; 0: drawn
    recycle: bool | None = None  # whether stores drop their log below checkpoints; None: drawn
    retains: bool | None = (
        None  # whether metrics keep raw events for a time only; None: drawn; with `recycle`
    )
    spills: bool | None = None  # whether stores have no memory for what can also be on disk; None: drawn


class Result(msgspec.Struct, frozen=True):
    """What happened, in numbers."""

    seed: int
    events: int
    acknowledged: int
    commits: int
    epochs: int
    faults: dict[str, int]
    live_ms: int  # from healing to the last of the first new writes
    recycled_bytes: int = 0  # of log that was dropped
    installed: int = 0  # snapshots
    archived: int = 0  # events, by all copies
    merges: int = 0  # of archived files
    spilled: int = 0  # units of cells, and alert records, by all copies
    dropped: int = 0  # events that were kept for their time, by all copies


class Failure(SimulationError):
    """A run that found something: which one, what and where, and what led to it."""

    def __init__(self, seed: int, what: str, where: str, trace: str) -> None:
        super().__init__(f"seed {seed}: {what}")
        self.seed = seed
        self.what = what
        self.where = where  # the traceback
        self.trace = trace


class Simulation:
    """One run. `run` it once."""

    def __init__(self, seed: int, options: Options | None = None) -> None:
        self.seed = seed
        self.options = options = options or Options()
        rng = random.Random(seed)
        self.rng = rng
        self.world = World()
        self.trace = Trace(self.world)
        self.network = Network(self.world, random.Random(rng.getrandbits(64)), self.trace)
        self.etcd = Etcd(self.world, self.network, random.Random(rng.getrandbits(64)), self.trace)
        self.partition_count = options.partitions or rng.choice((1, 2, 2, 3))
        count = options.nodes or rng.choice((3, 3, 3, 4, 5))
        factor = 5 if count == 5 and rng.random() < 0.4 else 3
        self.ledger = Ledger()
        self.processes: dict[str, Process] = {}
        self._defect: BaseException | None = None
        names = [f"s{i}" for i in range(1, count + 1)]
        self.checkers = Checkers(
            self.world,
            random.Random(rng.getrandbits(64)),
            self.trace,
            self.ledger,
            self.processes,
            self.partition_count,
        )
        config = StoreConfig(
            node_id="",
            partition_count=self.partition_count,
            replication_factor=factor,
            lease_ttl_s=LEASE_S,
            wal=WalConfig(segment_bytes=rng.choice((16, 64, 256)) * 1024),
            checkpoint_interval_s=rng.choice((1.5, 600.0, 600.0)),
        )
        # Drawn beside the rest, so that everything else of a seed is the same with and without.
        recycle_rng = random.Random(seed ^ 0x5EED)
        does_recycle = recycle_rng.random() < 0.4 if options.recycle is None else options.recycle
        if does_recycle:
            config = msgspec.structs.replace(
                config,
                recycle=True,
                wal=WalConfig(segment_bytes=recycle_rng.choice((4, 8, 16)) * 1024),
                checkpoint_interval_s=recycle_rng.choice((0.2, 0.5, 1.5)),
                archive="on",
                archive_events=recycle_rng.choice((20, 100, 400)),
                archive_interval_s=recycle_rng.choice((0.3, 1.0)),
            )
        retain_rng = random.Random(seed ^ 0xDA75)
        self.retains = does_recycle and (
            retain_rng.random() < 0.5 if options.retains is None else options.retains
        )
        spill_rng = random.Random(seed ^ 0xD15C)
        does_spill = spill_rng.random() < 0.4 if options.spills is None else options.spills
        if does_spill:
            interval_s = spill_rng.choice((0.2, 0.5, 1.5))
            config = msgspec.structs.replace(config, memory_bytes=1, checkpoint_interval_s=interval_s)
        for name in names:
            clock = SimClock(
                self.world,
                drift_ppm=rng.choice((0, 0, rng.randint(-20_000, 20_000))),
                offset_ns=rng.randint(-300, 300) * MILLISECOND,
            )
            self.processes[name] = Process(
                name,
                self.world,
                self.network,
                self.etcd,
                random.Random(rng.getrandbits(64)),
                self.trace,
                config=config,
                clock=clock,
                on_turn=self._turn,
                on_recovered=self.checkers.recovered,
                on_defect=self._found,
                archive_rng=random.Random(recycle_rng.getrandbits(64)) if does_recycle else None,
            )
        for process in self.processes.values():
            process.peers = self.processes
        self.faults = Faults(
            self,
            random.Random(rng.getrandbits(64)),
            kinds=draw_kinds(rng) if options.kinds is None else options.kinds,
            is_destructive=options.is_destructive,
        )
        self.weather = Weather(
            loss=rng.choice((0.0, 0.0, 0.01, 0.05)),
            doubled=rng.choice((0.0, 0.0, 0.02, 0.1)),
            slow=rng.choice((0.0, 0.01, 0.05)),
        )
        self.slow_syncs = rng.choice((0.0, 0.0, 0.02, 0.1))
        self.network.weather = self.weather
        for process in self.processes.values():
            process.slow_syncs = self.slow_syncs
        self._holders = ["" for _ in range(self.partition_count)]
        self._held_before = ["" for _ in range(self.partition_count)]
        self._belief_rng = random.Random(rng.getrandbits(64))
        self.clients = Clients(
            self.world,
            self.network,
            random.Random(rng.getrandbits(64)),
            self.trace,
            self.ledger,
            partition_count=self.partition_count,
            targets=names,
            deliver=self._deliver,
            believed=self._believed,
            on_answer=self._answered,
            now_ns=lambda: EPOCH_NS + self.world.now_ns,
            metrics_revision=lambda: self._metrics_revision,
            is_async=rng.choice((0.0, 0.0, 0.0, 0.2)),
        )
        self.readers = Readers(self, random.Random(rng.getrandbits(64)))
        self._metrics_revision = 0
        self.live_ms = 0
        self.alerts = Alerts(self, random.Random(rng.getrandbits(64)))
        self.subscribers = Subscribers(self, random.Random(rng.getrandbits(64)))

    # ------------------------------------------------------------ what the parts ask for

    def _deliver(self, name: str, connection: Connection, frame: Frame) -> None:
        self.processes[name].take_append(connection, frame)

    def _believed(self, partition: int) -> str:
        if self._belief_rng.random() < 0.15:
            return self._held_before[partition]
        return self._holders[partition]

    def key_changed(self, key: bytes, value: bytes | None) -> None:
        """A key of the coordinator was changed."""
        for number in range(self.partition_count):
            if key == leader_key(number):
                self._held_before[number] = self._holders[number]
                self._holders[number] = (
                    "" if value is None else msgspec.msgpack.decode(value, type=Leader).node_id
                )
                self.trace(
                    "etcd",
                    "partition %d: the leader key is held by %s",
                    number,
                    self._holders[number] or "nobody",
                )

    def members(self, number: int) -> tuple[Member, ...]:
        """Who is a member by the most advanced log that can be seen."""
        best: tuple[int, tuple[Member, ...]] = (-1, ())
        for process in self.processes.values():
            if process.store is not None:
                replica = process.store.replicas.get(number)
                if replica is not None and replica.high_watermark > best[0]:
                    best = (replica.high_watermark, replica.membership.members)
        return best[1]

    def member_copy_ids(self, number: int) -> set[str]:
        return {member.copy_id for member in self.members(number)}

    def copy_ids(self, process: Process) -> dict[int, str]:
        """The copy ids that a process has registered."""
        found = {}
        for number in range(self.partition_count):
            item = self.etcd.state.get(copy_key(number, process.name))
            if item is not None:
                found[number] = msgspec.msgpack.decode(item.value, type=Copy).copy_id
        return found

    def restart(self, process: Process) -> None:
        """Start a process that is down."""
        if not process.is_up:
            process.start()

    def _turn(self, process: Process) -> None:
        store = process.store
        if store is not None and self.checkers.after_turn(process, store):
            self.alerts.after_turn(process, store)
        if process.ended:
            process.ended = False
            self.world.after(1, self._end, process, process.life)

    def _end(self, process: Process, life: int) -> None:
        if process.life == life and process.is_up:
            process.crash("it has ended", is_power_lost=False)
            self.world.after(self.rng.randint(20, 1_000) * MILLISECOND, self.restart, process)

    @property
    def defect(self) -> BaseException | None:
        """What was found first by somebody who could not raise it; the run ends with it."""
        return self._defect

    @defect.setter
    def defect(self, error: BaseException) -> None:
        self._defect = error
        self.world.is_halted = True

    def _found(self, what: str, error: BaseException | None) -> None:
        if self.defect is None:
            defect = SimulationError(f"{what}: {type(error).__name__}: {error}")
            defect.__cause__ = error
            self.defect = defect

    def _answered(self, part: Part) -> None:
        self.checkers.answered(part)

    # ------------------------------------------------------------ running

    def run(self) -> Result:
        """Run to the end.

        Raises:
            Failure: something must not be.
        """
        try:
            # Files of a few events, so that they are merged over and over, and some are full.
            with (
                mock.patch.multiple(policy, FAN_IN=3, BASE_ROWS=40, ROWS_MAX=360),
                mock.patch.object(retention, "DAY_NS", DAY_NS),
                mock.patch.object(archiver, "RULES_NS", DAY_NS // 4),
            ):
                self._run()
        except BaseException as error:
            cause = self.defect or error
            if isinstance(cause, KeyboardInterrupt):
                raise
            where = "".join(traceback.format_exception(cause))
            what = str(cause) or repr(cause)
            raise Failure(self.seed, what, where, self.trace.text()) from None
        finally:
            self.subscribers.end()
            for process in self.processes.values():
                if process.is_up:
                    process.crash("the simulation ends", is_power_lost=False)
        return Result(
            self.seed,
            self.world.events,
            self.ledger.acknowledged,
            self.checkers.commits,
            sum(len(epochs) for epochs in self.checkers.leaderships),
            self.faults.counts,
            self.live_ms,
            sum(process.recycled_bytes for process in self.processes.values()),
            sum(process.installed for process in self.processes.values()),
            sum(process.archived for process in self.processes.values()),
            sum(process.merges for process in self.processes.values()),
            sum(process.spilled for process in self.processes.values()),
            sum(process.dropped for process in self.processes.values()),
        )

    def _run(self) -> None:
        rng, world, options = self.rng, self.world, self.options
        for schema in SCHEMAS:
            if self.retains and schema.code in RETAINED:
                schema = msgspec.structs.replace(schema, retain_raw_days=1)
            put = Put(metric_key(schema.code), encode_record(make_record(0, schema)))
            self._metrics_revision = self.etcd.txn([], [put], []).revision
        for process in self.processes.values():
            world.after(rng.randint(0, 200) * MILLISECOND, self.restart, process)
        mean_ms = rng.choice((200, 500, 1_200))
        self.faults.plan(options.safety_ns, (options.mean_ms or mean_ms) * MILLISECOND)
        for _ in range(options.chunks):
            world.at(rng.randint(300 * MILLISECOND, options.safety_ns), self.clients.send, rng.randrange(3))
        for _ in range(options.chunks // 4):
            world.at(rng.randint(SECOND, options.safety_ns), self.clients.repeat)
        self.readers.plan(options.safety_ns, options.reads)
        self.alerts.plan(options.safety_ns)
        self.subscribers.plan(options.safety_ns, is_disturbed=bool(self.faults.kinds))
        self._go(options.safety_ns, None)
        self.faults.heal()
        self.subscribers.heal()
        healed_ns = world.now_ns
        fresh: list[Part] = []
        while {part.partition for part in fresh} != set(range(self.partition_count)):
            fresh += self.clients.send(rng.randrange(3)).parts.values()
        alive = self._go(healed_ns + LIVE_NS, lambda: all(part.outcome is not None for part in fresh))
        self.live_ms = (world.now_ns - healed_ns) // MILLISECOND
        if options.is_destructive:
            self._go(healed_ns + LIVE_NS, None)
            return
        if not alive:
            waiting = [part for part in fresh if part.outcome is None]
            raise SimulationError(f"LIVE-1: {LIVE_NS / 1e9} s after healing {waiting} have no answer")
        self.clients.is_calm = True
        if not self._go(healed_ns + REST_NS, self._is_at_rest):
            raise SimulationError(f"LIVE-1: not at rest {REST_NS / 1e9} s after healing: {self._unrest()}")
        while self._go(world.now_ns + 300 * MILLISECOND, None) or self._unrest():
            if not self._go(healed_ns + REST_NS, self._is_at_rest):  # a member was still to come, or to go
                raise SimulationError(
                    f"LIVE-1: not at rest {REST_NS / 1e9} s after healing: {self._unrest()}"
                )
        self.checkers.at_rest(list(self._copies()), salt=rng.getrandbits(62))
        self.alerts.at_rest(list(self._copies()))
        self.readers.check_totals()
        self._go(world.now_ns + 5 * SECOND, self.readers.is_done)
        if not self._go(world.now_ns + DONE_NS, self.subscribers.is_done):
            raise SimulationError(f"ALERT-1: {DONE_NS / 1e9} s after that {self.subscribers.unfinished()}")
        if not self.readers.is_done():
            raise SimulationError("LIVE-1: reads were not answered after healing")
        if self.ledger.acknowledged < self.ledger.asked:
            raise SimulationError("not everything was answered")

    def _go(self, until_ns: int, condition: Any) -> bool:
        found = self.world.run(until_ns, condition)
        if self.defect is not None:
            raise self.defect
        return found

    def _copies(self) -> Iterator[tuple[Process, int]]:
        """All members' copies."""
        for number in range(self.partition_count):
            for member in self.members(number):
                yield self.processes[member.node_id], number

    def _is_at_rest(self) -> bool:
        if self.world.events % 50:
            return False
        return not self._unrest()

    def _unrest(self) -> str:
        """What is not as it will be; "" where nothing is."""
        if pending := self.ledger.pending():
            return f"{pending} have no answer"
        for number in range(self.partition_count):
            end = self.checkers.ends[number]
            members = self.members(number)
            if not members:
                return f"nobody knows the members of partition {number}"
            wish = self.etcd.state.get(assignment_key(number))
            wished = set() if wish is None else set(msgspec.msgpack.decode(wish.value, type=Assignment).nodes)
            if wished != {member.node_id for member in members}:
                return f"partition {number} is held by {members}, and shall be held by {sorted(wished)}"
            leaders = 0
            for member in members:
                process = self.processes[member.node_id]
                if process.store is None:
                    return f"{process} is down"
                replica = process.store.replicas.get(number)
                partition = process.store.partitions.get(number)
                if replica is None or partition is None or replica.copy_id != member.copy_id:
                    return f"{process} has another copy of partition {number}"
                if partition.applied != end or replica.high_watermark != end or replica.log.log_end != end:
                    return (
                        f"{process} partition {number} has applied {partition.applied}, committed "
                        f"{replica.high_watermark}, written {replica.log.log_end} of {end}; it is {replica.role.value}"
                    )
                archiver = None if process.node is None else process.node.archiver
                if archiver is not None and number in archiver._awaited:
                    return f"{process} has a snapshot of partition {number} whose archive is not in force yet"
                leaders += replica.role is Role.LEADER
            if leaders != 1:
                return f"partition {number} has {leaders} leaders"
        return ""


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Collect what dead processes left only where nobody is disturbed by it: between runs, and silently.

    A killed process's tasks end where they are; their collection closes coroutines in the middle, or before they
    ever ran, which Python tells about.
    """
    was_enabled = gc.isenabled()
    hook = sys.unraisablehook
    gc.disable()
    gc.freeze()  # what was there before this run is none of its garbage, and takes long to look through
    sys.unraisablehook = lambda _: None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                yield
            finally:
                gc.collect()
                gc.collect()  # what was cut off in the middle may do something more when it is closed
    finally:
        gc.unfreeze()
        sys.unraisablehook = hook
        if was_enabled:
            gc.enable()


def run_seed(seed: int, options: Options | None = None) -> Result:
    """Run one seed, and leave nothing of it behind.

    Raises:
        Failure: it found something.
    """
    with undisturbed():
        try:
            return Simulation(seed, options).run()
        except Failure as failure:
            # A new one, without the frames that hold the whole simulation.
            found = Failure(failure.seed, failure.what, failure.where, failure.trace)
    raise found


def run_seeds(seeds: range, options: Options | None = None) -> list[Result]:
    """Run seeds one after another.

    Raises:
        Failure: of the first that fails.
    """
    return [run_seed(seed, options) for seed in seeds]
