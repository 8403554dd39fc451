"""How long writes stand still when a leader ends.

One writer per partition begins a call every 25 ms, whatever became of those before. A store that leads is ended, at
once (`kill -9`) or gracefully (SIGTERM). A partition that it led takes writes again when the first call that began
after the signal has succeeded; of the other partitions the longest call of that time is looked at.
"""

from __future__ import annotations

import asyncio
import signal
import statistics
import time

import msgspec

from tallymark import AsyncClient, Event, MetricSchema, TallymarkError
from tallymark_node.bench import cluster
from tallymark_node.bench.scenarios import Figure
from tallymark_protocol.identifiers import partition_of
from tallymark_protocol.messages import StatusResult, StoreStatus
from tallymark_runtime.catalog import LEADERS, Leader
from tallymark_runtime.coordinator import open_remote
from tallymark_runtime.peer import PeerClient
from tallymark_runtime.randomness import new_random

_PERIOD_S = 0.025
_BEFORE_S = 1.0  # of quiet, before a leader is ended
_AFTER_S = 0.5  # looked at, after the last partition is back
_GIVE_UP_S = 60.0
_POLL_S = 0.05
_KINDS = ((signal.SIGKILL, "kill -9", "<= 4 s"), (signal.SIGTERM, "a graceful stop", "<= 1 s"))


class _Call(msgspec.Struct):
    """One write."""

    begun: float
    ended: float = 0.0  # 0: not yet, or never
    failed: bool = False


class _Writers:
    """One writer per partition."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self.accounts: dict[int, int] = {}
        account = 0
        while len(self.accounts) < cluster.PARTITIONS:
            self.accounts.setdefault(partition_of(account, cluster.PARTITIONS), account)
            account += 1
        self.calls: dict[int, list[_Call]] = {partition: [] for partition in self.accounts}
        self.flowing = asyncio.Event()
        self._under_way: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Write until cancelled, while `flowing` is set."""
        while True:
            await self.flowing.wait()
            for partition, account in self.accounts.items():
                task = asyncio.get_running_loop().create_task(self._write(partition, account))
                self._under_way.add(task)
                task.add_done_callback(self._under_way.discard)
            await asyncio.sleep(_PERIOD_S)

    async def _write(self, partition: int, account: int) -> None:
        call = _Call(time.perf_counter())
        self.calls[partition].append(call)
        try:
            await self._client.ingest(
                [Event(account_id=account, metric_code="api_calls")], timeout=_GIVE_UP_S
            )
        except TallymarkError:
            call.failed = True
            return
        call.ended = time.perf_counter()

    async def pause(self) -> None:
        """Begin no more calls, and wait for those under way."""
        self.flowing.clear()
        await asyncio.gather(*self._under_way)

    def forget(self) -> None:
        """Begin a new trial."""
        for calls in self.calls.values():
            calls.clear()

    def back_after(self, partition: int, moment: float) -> float | None:
        """How long after `moment` the first call begun since has succeeded; None if none has yet."""
        ends = [call.ended for call in self.calls[partition] if call.begun >= moment and call.ended]
        return min(ends) - moment if ends else None


class _Trial(msgspec.Struct):
    """What one of them showed, in seconds."""

    standstill: float  # until the last of the affected partitions was back
    others_longest: float  # call of the other partitions
    usual_longest: float  # call of any, before
    failed: int  # calls, of all partitions


async def measure(trials: int) -> list[Figure]:
    """Run `trials` trials of each kind against one cluster.

    Raises:
        RuntimeError: the cluster does not start, or does not recover.
    """
    figures = []
    with cluster.fresh() as target:
        async with AsyncClient([target.address]) as client:
            await client.metrics.create(MetricSchema(code="api_calls"))
            writers = _Writers(client)
            task = asyncio.get_running_loop().create_task(writers.run())
            try:
                for number, name, wanted in _KINDS:
                    found = [await _trial(target, writers, number, turn) for turn in range(trials)]
                    figures += _figures(name, wanted, found)
            finally:
                task.cancel()
                await writers.pause()
    return figures


def _figures(name: str, wanted: str, trials: list[_Trial]) -> list[Figure]:
    still = [trial.standstill for trial in trials]
    others = [trial.others_longest for trial in trials]
    usual = statistics.median(trial.usual_longest for trial in trials)
    failed = sum(trial.failed for trial in trials)
    return [
        Figure(
            name=f"writes succeed again after {name} of a leader",
            figure=f"{max(still):.2f} s",
            wanted=wanted,
            p50=f"{statistics.median(still):.2f} s",
            note=f"{failed} calls failed",
        ),
        Figure(
            name="  the other partitions' longest call meanwhile",
            figure=f"{max(others) * 1e3:.0f} ms",
            p50=f"{statistics.median(others) * 1e3:.0f} ms",
            note=f"{usual * 1e3:.0f} ms in the second before",
        ),
    ]


async def _trial(target: cluster.ClusterTarget, writers: _Writers, number: int, turn: int) -> _Trial:
    await _wait_equal(target)
    writers.forget()
    writers.flowing.set()
    await asyncio.sleep(_BEFORE_S)
    leaders = await _leaders(target)
    victim = target.stores[turn % len(target.stores)]
    affected = [partition for partition, leader in leaders.items() if leader == victim.name]
    moment = time.perf_counter()
    victim.end(number)
    while any(writers.back_after(partition, moment) is None for partition in affected):
        if time.perf_counter() - moment > _GIVE_UP_S:
            raise RuntimeError(f"after the end of {victim.name} writes don't succeed again")
        await asyncio.sleep(_PERIOD_S)
    standstill = max(writers.back_after(partition, moment) or 0.0 for partition in affected)
    await asyncio.sleep(_AFTER_S)
    await writers.pause()
    every = [(partition, call) for partition, calls in writers.calls.items() for call in calls]
    usual = [call.ended - call.begun for _, call in every if call.ended and call.ended < moment]
    others = [
        call.ended - call.begun
        for partition, call in every
        if partition not in affected and call.ended > moment and call.begun < moment + standstill
    ]
    victim.stop()
    victim.spawn()
    await asyncio.to_thread(victim.wait_ready)
    return _Trial(
        standstill=standstill,
        others_longest=max(others, default=0.0),
        usual_longest=max(usual, default=0.0),
        failed=sum(call.failed for _, call in every),
    )


async def _leaders(target: cluster.ClusterTarget) -> dict[int, str]:
    """By partition, the node that leads it."""
    coordinator = open_remote(target.coordinator, new_random())
    try:
        items = (await coordinator.range(LEADERS)).items
    finally:
        await coordinator.close()
    return {
        int(item.key.removeprefix(LEADERS)): msgspec.msgpack.decode(item.value, type=Leader).node_id
        for item in items
    }


async def _wait_equal(target: cluster.ClusterTarget) -> None:
    """Wait until every store has everything and each leads its share. Nothing may be written meanwhile."""
    begun = time.perf_counter()
    peers = [PeerClient(store.address, rng=new_random()) for store in target.stores]
    try:
        while not (await _equal(peers) and len(set((await _leaders(target)).values())) == len(peers)):
            if time.perf_counter() - begun > _GIVE_UP_S:
                raise RuntimeError("the stores don't become equal again")
            await asyncio.sleep(_POLL_S)
    finally:
        for peer in peers:
            await peer.close()


async def _equal(peers: list[PeerClient]) -> bool:
    try:
        statuses = [await peer.call(StoreStatus(), StatusResult, timeout_s=5.0) for peer in peers]
    except TallymarkError:
        return False
    for number in range(cluster.PARTITIONS):
        parts = [part for status in statuses for part in status.partitions if part.partition == number]
        if len(parts) != len(peers) or any(part.error for part in parts):
            return False
        if len({end for part in parts for end in (part.log_end, part.high_watermark)}) != 1:
            return False
    return True
