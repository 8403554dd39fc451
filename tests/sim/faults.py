"""What goes wrong in a run: a schedule drawn from the seed.

Each seed enables some kinds of faults and leaves out the others (schedules that do a little of everything hide what
takes a lot of one thing), and draws how often they come. Damage is bounded: as long as the profile doesn't say that
unavailability is right, a majority of each partition's members keeps its copy.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import msgspec

from tallymark_runtime.assignments import Assignment, assignment_key
from tallymark_runtime.coordinator import Put
from tallymark_runtime.disk import MemoryDisk
from tallymark_store.replication.effects import Role
from tallymark_store.wal import Position
from tallymark_store.wal.format import segment_name

from .loop import MILLISECOND, SECOND
from .network import Weather
from .process import Process

KINDS = (
    "power",
    "kill",
    "kill_in_write",
    "kill_all",
    "stop",
    "freeze",
    "cut_one_way",
    "isolate",
    "cut_from_etcd",
    "jump",
    "slow_disk",
    "sync_error",
    "rot",
    "wipe",
    "etcd_away",
    "etcd_flaky",
    "compact",
    "end_lease",
    "end_lease_at_creation",
    "kill_at_creation",
    "storm",
    "move",
    "checkpoint",
)
# How often each comes, against the others.
WEIGHTS = {
    "power": 3,
    "kill": 2,
    "kill_in_write": 3,
    "freeze": 3,
    "cut_one_way": 3,
    "isolate": 3,
    "move": 2,
    "wipe": 2,
}


class Faults:
    """Makes things go wrong, and right again.

    Args:
        simulation: what it happens to (see `simulation.Simulation`).
        rng: draws everything.
        is_destructive: damage may go beyond what a majority survives.
    """

    def __init__(
        self, simulation: Any, rng: random.Random, *, kinds: tuple[str, ...], is_destructive: bool
    ) -> None:
        self._s = simulation
        self._rng = rng
        self.kinds = kinds
        self.is_destructive = is_destructive
        self.counts: dict[str, int] = {}
        self._weights = [WEIGHTS.get(kind, 1) for kind in kinds]
        self._old_copies: dict[str, dict[int, str]] = {}  # of tainted processes, their copy ids before
        self._at_creation: list[Callable[[Process], None]] = []
        self.is_healed = False
        simulation.etcd.on_key = self._on_key

    def plan(self, end_ns: int, mean_ns: int) -> None:
        """Draw when something happens, up to a time."""
        at = 0
        while self.kinds:
            at += int(self._rng.expovariate(1 / mean_ns)) + 20 * MILLISECOND
            if at >= end_ns:
                return
            self._s.world.at(at, self._happen)

    def _happen(self) -> None:
        if self.is_healed:
            return
        (kind,) = self._rng.choices(self.kinds, self._weights)
        if getattr(self, f"_{kind}")() is not False:
            self.counts[kind] = self.counts.get(kind, 0) + 1

    # ------------------------------------------------------------ choosing

    def _process(self, *, up: bool = True) -> Process | None:
        found = [p for p in self._s.processes.values() if p.is_up == up]
        if not found:
            return None
        if up and self._rng.random() < 0.6:
            leading = [p for p in found if self._leads(p)]
            found = leading or found
        return self._rng.choice(found)

    @staticmethod
    def _leads(process: Process) -> bool:
        store = process.store
        return store is not None and any(
            replica.role in (Role.LEADER, Role.STARTING, Role.CANDIDATE)
            for replica in store.replicas.values()
        )

    def _later(self, low_ms: int, high_ms: int, call: Callable[..., object], *args: Any) -> None:
        self._s.world.after(self._rng.randint(low_ms, high_ms) * MILLISECOND, call, *args)

    def _restart_later(self, process: Process) -> None:
        """Within the lease, or well after."""
        if self._rng.random() < 0.5:
            self._later(5, 400, self._s.restart, process)
        else:
            self._later(400, 6_000, self._s.restart, process)

    # ------------------------------------------------------------ processes

    def _power(self) -> object:
        process = self._process()
        if process is None:
            return False
        process.crash("power failure", is_power_lost=True)
        return self._restart_later(process)

    def _kill(self) -> object:
        process = self._process()
        if process is None:
            return False
        process.crash("killed", is_power_lost=False)
        return self._restart_later(process)

    def _kill_in_write(self) -> object:
        process = self._process()
        if process is None:
            return False
        process.gate.changes_left = self._rng.randint(0, 12)
        return None

    def _kill_all(self) -> object:
        power = self._rng.random() < 0.5
        for process in self._s.processes.values():
            if process.is_up:
                process.crash("all at once", is_power_lost=power)
                self._restart_later(process)
        return None

    def _stop(self) -> object:
        process = self._process()
        if process is None:
            return False
        return process.stop()

    def _freeze(self) -> object:
        process = self._process()
        if process is None or process.is_frozen:
            return False
        process.freeze()
        if self._rng.random() < 0.4:
            return self._later(20, 1_500, process.thaw)
        return self._later(1_500, 7_000, process.thaw)

    def _kill_at_creation(self) -> object:
        power = self._rng.random() < 0.5

        def kill(process: Process) -> None:
            process.crash("right after it got a leader key", is_power_lost=power)
            self._restart_later(process)

        self._at_creation.append(kill)
        return None

    # ------------------------------------------------------------ network

    def _cut_one_way(self) -> object:
        network = self._s.network
        names = [*self._s.processes, "etcd", "gateway0", "gateway1"]
        source, target = self._rng.sample(names, 2)
        network.cut(source, target)
        self._s.trace("faults", "cuts %s -> %s", source, target)
        return self._later(100, 5_000, network.mend, source, target)

    def _isolate(self) -> object:
        process = self._process()
        if process is None:
            return False
        others = [name for name in self._s.processes if name != process.name]
        keep_etcd = self._rng.random() < 0.5
        self._s.trace("faults", "isolates %s%s", process, " but from etcd" if keep_etcd else "")
        pairs = [(process.name, other) for other in [*others, *([] if keep_etcd else ["etcd"])]]
        pairs += [(b, a) for a, b in pairs]
        for a, b in pairs:
            self._s.network.cut(a, b)

        def mend() -> None:
            self._s.trace("faults", "%s is back in the network", process)
            for a, b in pairs:
                self._s.network.mend(a, b)

        return self._later(200, 6_000, mend)

    def _cut_from_etcd(self) -> object:
        process = self._process()
        if process is None:
            return False
        pairs = [(process.name, "etcd"), ("etcd", process.name)]
        for a, b in pairs if self._rng.random() < 0.6 else pairs[self._rng.randrange(2) :][:1]:
            self._s.network.cut(a, b)
            self._later(300, 6_000, self._s.network.mend, a, b)
            self._s.trace("faults", "cuts %s -> %s", a, b)
        return None

    def _storm(self) -> object:
        rng = self._rng
        self._s.network.weather = Weather(
            loss=rng.choice((0.0, 0.05, 0.2)),
            doubled=rng.choice((0.0, 0.1, 0.3)),
            slow=rng.choice((0.02, 0.1, 0.3)),
        )
        self._s.trace("faults", "bad weather")

        def clear() -> None:
            self._s.network.weather = self._s.weather

        return self._later(200, 4_000, clear)

    # ------------------------------------------------------------ clocks and disks

    def _jump(self) -> object:
        process = self._process()
        if process is None:
            return False
        by_ms = self._rng.choice((-90_000, -5_000, -200, 200, 5_000, 90_000))
        process.clock.jump(by_ms * MILLISECOND)
        return self._s.trace("faults", "sets the clock of %s by %d ms", process, by_ms)

    def _slow_disk(self) -> object:
        process = self._process()
        if process is None:
            return False
        process.slow_syncs = 0.5
        self._s.trace("faults", "%s has a slow disk", process)

        def quick() -> None:
            process.slow_syncs = self._s.slow_syncs

        return self._later(300, 4_000, quick)

    def _sync_error(self) -> object:
        process = self._process()
        if process is None:
            return False
        process.disk.fail_next("sync", name="wal-")
        return self._s.trace("faults", "the next sync of %s will fail", process)

    def _checkpoint(self) -> object:
        process = self._process()
        if process is None or not process.is_serving:
            return False
        return process.checkpoint()

    def _rot(self) -> object:
        process = self._process(up=self._rng.random() < 0.7)
        if process is None or not self.may_damage(process):
            return False
        end: Position = process.recorded_end
        log = process.disk.at("wal")
        places = []
        for name in log.list():
            for segment in range(end.segment + 1):
                if name == segment_name(segment):
                    data = log.open(name).read(0, 1 << 30)
                    limit = end.position if segment == end.segment else len(data)
                    places += [(name, int(at)) for at in data[:limit].nonzero()[0][64:]]
        if not places:
            return False
        self._taint(process)
        name, at = self._rng.choice(places)
        log.flip_bit(name, at, self._rng.randrange(8))
        self._s.trace("faults", "a bit rots on the disk of %s: %s at %d", process, name, at)
        if self._rng.random() < 0.7 and process.is_up:
            process.crash("after its disk has rotted", is_power_lost=True)
            self._restart_later(process)
        return None

    def _wipe(self) -> object:
        process = self._process(up=self._rng.random() < 0.8)
        if process is None or not self.may_damage(process):
            return False
        self._taint(process)
        process.crash("its disk is lost", is_power_lost=True)
        process.disk = MemoryDisk()
        for number, end in process.durable_ends.items():
            process.lost_ends[number] = max(end, process.lost_ends.get(number, 0))
        process.durable_ends = {}
        process.lost_ns = self._s.world.now_ns
        process.wiped += 1
        self._s.trace("faults", "%s has an empty disk", process)
        return self._restart_later(process)

    def _taint(self, process: Process) -> None:
        process.is_tainted = True
        self._old_copies[process.name] = self._s.copy_ids(process)

    def may_damage(self, victim: Process) -> bool:
        """Whether a majority of every partition's members is whole without this one."""
        if self.is_destructive:
            return True
        processes = self._s.processes
        for process in processes.values():
            if process.is_tainted and self._is_whole(process):
                process.is_tainted = False
        for number in range(self._s.partition_count):
            members = self._s.members(number)
            if not members:
                return False
            whole = [
                m
                for m in members
                if m.node_id in processes and not processes[m.node_id].is_tainted and m.node_id != victim.name
            ]
            if len(whole) <= len(members) // 2:
                return False
        return True

    def _is_whole(self, process: Process) -> bool:
        """Whether everything that was on a disk when it was damaged has been discarded, and is there again.

        Bits that nobody reads, as in the head of a group, are noticed by a later start: a copy that was not discarded
        may still turn out to be damaged.
        """
        store = process.store
        if store is None:
            return False
        old = self._old_copies.get(process.name, {})
        for number in range(self._s.partition_count):
            members = self._s.members(number)
            if not members:
                return False  # nobody can say so now
            if process.name not in {member.node_id for member in members}:
                continue
            replica = store.replicas.get(number)
            if replica is None or replica.role is Role.DAMAGED or replica.high_watermark == 0:
                return False
            if replica.copy_id == old.get(number) or replica.copy_id not in self._s.member_copy_ids(number):
                return False
        return True

    # ------------------------------------------------------------ coordinator

    def _etcd_away(self) -> object:
        etcd = self._s.etcd
        if etcd.is_away:
            return False
        etcd.go_away()
        self._s.trace("faults", "etcd is away")

        def back() -> None:
            self._s.trace("faults", "etcd is back")
            etcd.come_back()

        return self._later(50, 5_000, back)

    def _etcd_flaky(self) -> object:
        self._s.etcd.flaky = 0.2

        def fine() -> None:
            self._s.etcd.flaky = 0.0

        return self._later(500, 4_000, fine)

    def _compact(self) -> object:
        return self._s.etcd.compact()

    def _end_lease(self) -> object:
        process = self._process()
        if process is None or process.coordinator is None or not process.coordinator.leases:
            return False
        return self._s.etcd.end_lease(process.coordinator.leases[-1])

    def _end_lease_at_creation(self) -> object:
        def end(process: Process) -> None:
            if process.coordinator is not None and process.coordinator.leases:
                self._s.etcd.end_lease(process.coordinator.leases[-1])

        self._at_creation.append(end)
        return None

    def _on_key(self, key: bytes, value: bytes | None) -> None:
        self._s.key_changed(key, value)
        if value is None or not key.startswith(b"leaders/") or not self._at_creation or self.is_healed:
            return
        holder = msgspec.msgpack.decode(value)["node_id"]
        process = self._s.processes.get(holder)
        what = self._at_creation.pop(0)
        if process is not None:
            self._later(0, 30, what, process)

    # ------------------------------------------------------------ members

    def _move(self) -> object:
        number = self._rng.randrange(self._s.partition_count)
        item = self._s.etcd.state.get(assignment_key(number))
        if item is None or self._s.etcd.is_away:
            return False
        nodes = list(msgspec.msgpack.decode(item.value, type=Assignment).nodes)
        spare = [name for name in self._s.processes if name not in nodes]
        if spare and self._rng.random() < 0.7:
            nodes[self._rng.randrange(len(nodes))] = self._rng.choice(spare)
        else:
            self._rng.shuffle(nodes)
        self._s.trace("faults", "partition %d shall be held by %s", number, nodes)
        value = msgspec.msgpack.encode(Assignment(tuple(nodes)))
        self._s.etcd.txn([], [Put(assignment_key(number), value)], [])
        return None

    # ------------------------------------------------------------ healing

    def heal(self) -> None:
        """Everything is well from now on."""
        self.is_healed = True
        simulation = self._s
        simulation.trace("faults", "everything heals")
        simulation.network.mend_all()
        simulation.network.weather = Weather()
        simulation.etcd.flaky = 0.0
        if simulation.etcd.is_away:
            simulation.etcd.come_back()
        self._at_creation.clear()
        for process in simulation.processes.values():
            process.slow_syncs = 0.0
            process.clock.offset_ns = 0
            process.gate.changes_left = None
            process.disk._memory.faults.clear()
            process.thaw()
            simulation.restart(process)


def draw_kinds(rng: random.Random) -> tuple[str, ...]:
    """Which kinds of faults a run has: few, several, or nearly all."""
    count = rng.choice((0, 1, 2, 3, 4, 6, 8, 12, len(KINDS)))
    chosen = set(rng.sample(KINDS, count))
    return tuple(kind for kind in KINDS if kind in chosen)


HORIZON_NS = 12 * SECOND
