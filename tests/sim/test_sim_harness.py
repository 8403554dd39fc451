"""The simulator's own parts: time, processes, network, disk and coordinator do what runs rely on."""

from __future__ import annotations

import asyncio
import random

import pytest

from tallymark_protocol.errors import NotFoundError, UnavailableError
from tallymark_runtime.coordinator import CompactedError, Put, absent
from tallymark_runtime.disk import MemoryDisk
from tallymark_store.wal import PartitionIndex, RecordKind, RecordMeta

from .checkers import Checkers, Gone, epochs_of
from .clients import Ledger
from .clock import SimClock
from .coordination import Etcd, SimCoordinator
from .disk import Gate, SimDisk
from .loop import MILLISECOND, SECOND, Crash, ProcessLoop, SimulationError, World
from .network import Network, Weather
from .trace import Trace


class Machine:
    """A world with one process or two."""

    def __init__(self, seed: int = 1) -> None:
        self.world = World()
        self.trace = Trace(self.world)
        self.network = Network(self.world, random.Random(seed), self.trace)
        self.etcd = Etcd(self.world, self.network, random.Random(seed + 1), self.trace)
        self.errors: list[BaseException | None] = []

    def loop(self, name: str, clock: SimClock | None = None) -> ProcessLoop:
        clock = clock or SimClock(self.world)
        return ProcessLoop(
            self.world,
            name,
            monotonic_ns=clock.monotonic_ns,
            due_ns=clock.due_ns,
            on_error=lambda what, error: self.errors.append(error),
        )

    def coordinator(self, name: str) -> tuple[ProcessLoop, SimCoordinator]:
        loop = self.loop(name)
        return loop, SimCoordinator(self.etcd, name, loop)

    def result(self, loop: ProcessLoop, coro, within_ns: int = 10 * SECOND):
        task = loop.create_task(coro)
        assert self.world.run(self.world.now_ns + within_ns, task.done), "it never ended"
        return task.result()


def test_sim_time_passes_only_by_events() -> None:
    """Sleeping costs nothing and takes exactly as long as asked, in the order of the deadlines."""
    machine = Machine()
    loop = machine.loop("a")
    order: list[tuple[str, float]] = []

    async def sleep(name: str, seconds: float) -> None:
        await asyncio.sleep(seconds)
        order.append((name, loop.time()))

    tasks = [loop.create_task(sleep(name, s)) for name, s in (("c", 3600.0), ("a", 0.5), ("b", 0.5))]
    machine.world.run(2 * 3600 * SECOND)
    assert [name for name, _ in order] == ["a", "b", "c"]
    assert [round(at, 3) for _, at in order] == [0.5, 0.5, 3600.0]
    assert all(task.done() for task in tasks)


def test_sim_clocks_drift() -> None:
    """A timer of a process with a quick clock is early by the world's time, never by its own."""
    machine = Machine()
    clock = SimClock(machine.world, drift_ppm=50_000)
    loop = machine.loop("a", clock)
    machine.result(loop, asyncio.sleep(10.5), 20 * SECOND)
    assert clock.monotonic_ns() >= 10_500_000_000
    assert machine.world.now_ns == pytest.approx(10 * SECOND, rel=0.001)


def test_sim_frozen_process_does_nothing() -> None:
    """What is due while a process is frozen happens when it goes on."""
    machine = Machine()
    loop = machine.loop("a")
    seen: list[float] = []
    loop.call_later(1.0, lambda: seen.append(loop.time()))
    loop.freeze()
    loop.post(lambda: seen.append(-1.0))
    machine.world.run(5 * SECOND)
    assert seen == []
    loop.thaw()
    machine.world.run(6 * SECOND)
    assert seen[0] == -1.0
    assert seen[1] == pytest.approx(5.0, abs=0.001)


def test_sim_killed_process_never_runs_again() -> None:
    """A kill ends a process where it is: neither its tasks nor its timers nor its cleaning up run on."""
    machine = Machine()
    loop = machine.loop("a")
    seen: list[str] = []

    async def work() -> None:
        try:
            while True:
                await asyncio.sleep(0.1)
                seen.append("work")
        finally:
            seen.append("cleaned up")

    loop.create_task(work())
    machine.world.run(SECOND)
    assert len(seen) in (9, 10)
    count = len(seen)
    loop.kill()
    machine.world.run(2 * SECOND)
    assert len(seen) == count
    machine.world.graveyard.clear()


def test_sim_defects_are_told() -> None:
    """An assertion that fails in a callback or in a task that nobody awaits does not go unnoticed."""
    machine = Machine()
    loop = machine.loop("a")

    async def wrong() -> None:
        raise AssertionError("wrong")

    def wrong_callback() -> None:
        raise ValueError("wrong")

    loop.create_task(wrong())
    loop.call_soon(wrong_callback)
    machine.world.run(SECOND)
    assert sorted(type(error).__name__ for error in machine.errors) == ["AssertionError", "ValueError"]


def test_sim_endless_polling_is_noticed() -> None:
    """A loop that never waits moves time on, and in the end fails the run."""
    world = World(events_max=1_000)
    loop = ProcessLoop(
        world, "a", monotonic_ns=lambda: world.now_ns, due_ns=lambda ns: ns, on_error=lambda what, error: None
    )

    async def poll() -> None:
        while True:  # noqa: ASYNC110 - what it must not do
            await asyncio.sleep(0)

    loop.create_task(poll())
    with pytest.raises(SimulationError, match="never rests"):
        world.run(3600 * SECOND)
    loop.kill()


def test_sim_network_loses_doubles_and_reorders() -> None:
    """Bad weather does all of it; a cut link lets nothing through, in its direction only."""
    machine = Machine()
    network = machine.network
    network.weather = Weather(loss=0.2, doubled=0.2, slow=0.3)
    seen: list[int] = []
    for i in range(500):
        network.send("a", "b", seen.append, i)
    machine.world.run(SECOND)
    assert 300 < len(set(seen)) < 470
    assert len(seen) > len(set(seen))
    assert seen != sorted(seen)
    network.weather = Weather()
    seen.clear()
    network.send("a", "b", seen.append, 1)
    network.cut("a", "b")  # what is on its way is lost, too
    network.send("b", "a", seen.append, 2)
    machine.world.run(2 * SECOND)
    assert seen == [2]
    network.mend_all()
    network.send("a", "b", seen.append, 3)
    machine.world.run(3 * SECOND)
    assert seen == [2, 3]


def test_sim_one_seed_is_one_history() -> None:
    """The same seed gives the same deliveries at the same times, another seed others."""

    def history(seed: int) -> list[tuple[int, int]]:
        machine = Machine(seed)
        machine.network.weather = Weather(loss=0.1, doubled=0.1, slow=0.1)
        seen: list[tuple[int, int]] = []
        for i in range(100):
            machine.network.send("a", "b", lambda i: seen.append((machine.world.now_ns, i)), i)
        machine.world.run(SECOND)
        return seen

    assert history(5) == history(5)
    assert history(5) != history(6)


def test_sim_disk_ends_the_process_at_a_change() -> None:
    """The process dies at the chosen change, which does not happen, and changes nothing any more."""
    inner = MemoryDisk()
    gate = Gate()
    died: list[bool] = []

    def crash() -> None:
        died.append(True)
        gate.is_open = False

    gate.on_crash = crash
    gate.changes_left = 2
    disk = SimDisk(inner, gate).at("folder")
    file = disk.create("x")
    file.write(0, [b"one"])
    with pytest.raises(Crash):
        file.write(3, [b"two"])
    assert died == [True]
    with pytest.raises(Crash):
        disk.create("y")
    assert inner.at("folder").open("x").read(0, 10).tobytes() == b"one"
    assert inner.at("folder").list() == ["x"]


def test_sim_deferred_group_is_lost_or_torn() -> None:
    """A group that was written and not synced survives a crash wholly, partly or not at all."""
    outcomes = set()
    for seed in range(40):
        inner = MemoryDisk()
        gate = Gate()
        disk = SimDisk(inner, gate)
        file = disk.create("x")
        file.write_sync(0, [bytes(4096)])
        disk.sync_dir()
        gate.deferred = []
        file.write_sync(0, [b"x" * 4096])
        assert file.read(0, 1).tobytes() == b"x"
        inner.crash(random.Random(seed))
        left = inner.open("x").read(0, 4096).tobytes().count(b"x")
        outcomes.add("none" if left == 0 else "all" if left == 4096 else "some")
    assert outcomes == {"none", "some", "all"}


def test_sim_coordinator_leases_and_watches() -> None:
    """A key goes with its lease, and a watch tells of both changes, in order."""
    machine = Machine()
    loop, coordinator = machine.coordinator("a")

    async def main() -> list[tuple[str, bytes]]:
        changes = coordinator.watch(b"k/", 2)
        lease = await coordinator.lease_grant(2.0)
        result = await coordinator.txn([absent(b"k/1")], [Put(b"k/1", b"v", lease)])
        assert result.succeeded
        assert not (await coordinator.txn([absent(b"k/1")], [Put(b"k/1", b"w")])).succeeded
        found = []
        for _ in range(2):
            found += [(event.kind.name, event.item.key) for event in await anext(changes)]
        with pytest.raises(NotFoundError):
            await coordinator.lease_keepalive(lease)
        return found

    assert machine.result(loop, main()) == [("PUT", b"k/1"), ("DELETE", b"k/1")]
    assert machine.world.now_ns == pytest.approx(2 * SECOND, rel=0.05)


def test_sim_coordinator_away() -> None:
    """While it is away calls fail, no lease runs out, and watches go on afterwards without a gap."""
    machine = Machine()
    loop, coordinator = machine.coordinator("a")

    async def main() -> None:
        lease = await coordinator.lease_grant(2.0)
        await coordinator.put(b"k", b"1", lease=lease)
        changes = coordinator.watch(b"k", 3)
        machine.etcd.go_away()
        machine.world.after(5 * SECOND, machine.etcd.come_back)
        failures = 0
        while True:
            try:
                await coordinator.put(b"k", b"2", lease=lease)
                break
            except UnavailableError:
                failures += 1
                await asyncio.sleep(0.05)
        assert failures > 3
        assert await coordinator.lease_keepalive(lease) == 2.0
        (event,) = await anext(changes)
        assert event.item.value == b"2"

    machine.result(loop, main(), 20 * SECOND)


def test_sim_coordinator_answer_lost() -> None:
    """A mutation whose answer is lost has taken effect all the same."""
    machine = Machine()
    loop, coordinator = machine.coordinator("a")
    machine.network.cut("etcd", "a")

    async def main() -> None:
        with pytest.raises(UnavailableError):
            await coordinator.put(b"k", b"1")

    machine.result(loop, main())
    item = machine.etcd.state.get(b"k")
    assert item is not None
    assert item.value == b"1"


def test_sim_coordinator_compaction() -> None:
    """A watch from before the compaction says so."""
    machine = Machine()
    loop, coordinator = machine.coordinator("a")

    async def main() -> None:
        for _ in range(3):
            await coordinator.put(b"k", b"1")
        machine.etcd.compact()
        with pytest.raises(CompactedError):
            await anext(coordinator.watch(b"k", 2))

    machine.result(loop, main())


def test_sim_lease_ends_when_told() -> None:
    """A lease can be ended at the worst moment: its keys are gone at once."""
    machine = Machine()
    loop, coordinator = machine.coordinator("a")

    async def main() -> None:
        lease = await coordinator.lease_grant(60.0)
        await coordinator.put(b"k", b"1", lease=lease)
        machine.etcd.end_lease(lease)
        assert await coordinator.get(b"k") is None

    machine.result(loop, main())
    assert machine.world.now_ns < 100 * MILLISECOND


def test_a_copy_that_is_gone_counts_for_what_it_had_only() -> None:
    """Not for another record that ends at the same offset, nor for long, nor under another id."""
    machine = Machine()
    checkers = Checkers(machine.world, random.Random(1), machine.trace, Ledger(), {}, 1)
    index = PartitionIndex(0, 10)
    index.start_epoch = 3
    for epoch, count in ((3, 5), (4, 1), (4, 4), (7, 2)):
        meta = RecordMeta(0, RecordKind.EVENTS, epoch, index.log_end, count, 1)
        index.append(meta, segment=0, position=0, length=1)
    epochs = epochs_of(index)
    checkers._gone[0, "old"] = Gone(20, machine.world.now_ns, epochs)
    assert epochs == {10: 3, 15: 3, 16: 4, 20: 4, 22: 7}
    for end, epoch, had in (
        (5, 9, True), (10, 3, True), (10, 2, False), (15, 3, True), (15, 4, False), (17, 4, False), (20, 4, True),
        (20, 7, False), (22, 7, False),
    ):  # fmt: skip
        assert checkers._had(0, "old", end, epoch) is had, (end, epoch)
    assert not checkers._had(0, "new", 15, 3)
    checkers._gone[0, "other"] = Gone(20, machine.world.now_ns, {})
    assert not checkers._had(0, "other", 15, 3)
    machine.world.run(machine.world.now_ns + 4 * SECOND, lambda: False)
    assert not checkers._had(0, "old", 15, 3)
