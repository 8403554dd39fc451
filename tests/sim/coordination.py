"""The coordinator: the real state machine of keys and leases, and each process's way to it.

`Etcd` holds the state and runs leases on the world's time. It can be away: nothing is answered then, no lease runs
out, and when it comes back every lease has its full time again, as after a change of etcd's own leader.

`SimCoordinator` is the port as one process sees it: every call takes a way there and a way back over the network's
links, either of which may be cut; then the call fails when its deadline passes, and a mutation may have taken effect
all the same. A watch is a stream that stalls while the link is cut, and loses nothing.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from tallymark_protocol.errors import ErrorCode, TallymarkError, UnavailableError
from tallymark_runtime.coordinator import (
    Compare,
    Delete,
    KeyValue,
    Operation,
    Put,
    RangeResult,
    TxnResult,
    WatchEvent,
)
from tallymark_runtime.coordinator.state import CoordinatorState, Leases

from .loop import MILLISECOND, ProcessLoop, World
from .network import Network
from .trace import Trace

NAME = "etcd"
TIMEOUT_NS = 1_000 * MILLISECOND
STALL_NS = 50 * MILLISECOND  # between attempts to get a watch's news through


class Etcd:
    """The coordinator's own process.

    Attributes:
        is_away: nothing is answered.
        on_key: called with each change of a key: (key, value or None).
    """

    def __init__(self, world: World, network: Network, rng: random.Random, trace: Trace) -> None:
        self.world = world
        self.network = network
        self.rng = rng
        self.is_away = False
        self.flaky = 0.0  # how many calls are swallowed, before or after they took effect
        self.state = CoordinatorState()
        self.leases = Leases(1)
        self.watches: dict[int, Watch] = {}
        self.on_key: Callable[[bytes, bytes | None], None] = lambda key, value: None
        self._trace = trace
        self._wake: Any = None
        self._next_watch = 0

    # ------------------------------------------------------------ faults

    def go_away(self) -> None:
        """Answer nothing."""
        self.is_away = True

    def come_back(self) -> None:
        """Answer again; leases have their whole time from now on."""
        self.is_away = False
        for lease in self.leases._leases.values():
            lease.deadline_ns = max(lease.deadline_ns, self.world.now_ns + lease.ttl_ns)
        self._arm()
        self._pump_all()

    def end_lease(self, lease: int) -> None:
        """Have a lease run out at once."""
        if lease in self.leases._leases and not self.is_away:
            self.leases.remove(lease)
            self._trace(NAME, "lease %x ends before its time", lease)
            self._delete_bound(lease)

    def compact(self) -> None:
        """Forget the history of changes: watches that are behind must list again."""
        self.state.compacted = self.state.revision
        self.state._history = []

    # ------------------------------------------------------------ operations

    def txn(
        self, compares: Sequence[Compare], success: Sequence[Operation], failure: Sequence[Operation]
    ) -> TxnResult:
        result = self.state.txn(compares, success, failure, leases=self.leases)
        for operation in success if result.succeeded else failure:
            if isinstance(operation, Put):
                self.on_key(operation.key, operation.value)
            elif isinstance(operation, Delete):
                self.on_key(operation.key, None)
        self._pump_all()
        return result

    def lease_grant(self, ttl_ns: int) -> int:
        lease = self.leases.grant(ttl_ns, self.world.now_ns)
        self._arm()
        return lease

    def lease_keepalive(self, lease: int) -> float:
        return self.leases.keepalive(lease, self.world.now_ns) / 1e9

    def lease_revoke(self, lease: int) -> None:
        self.leases.remove(lease)
        self._delete_bound(lease)

    def _delete_bound(self, lease: int) -> None:
        keys = self.state.bound_to(lease)
        if keys:
            self.state.txn([], [Delete(key) for key in keys], [], leases=None, unbounded=True)
            for key in keys:
                self._trace(NAME, "%s is deleted with its lease", key.decode())
                self.on_key(key, None)
            self._pump_all()

    def _arm(self) -> None:
        if self._wake is not None:
            self._wake.cancel()
        deadline = self.leases.next_deadline()
        self._wake = None if deadline is None else self.world.at(deadline, self._expire)

    def _expire(self) -> None:
        self._wake = None
        if self.is_away:
            return
        for lease in self.leases.take_expired(self.world.now_ns):
            self._trace(NAME, "lease %x has run out", lease)
            self._delete_bound(lease)
        self._arm()

    # ------------------------------------------------------------ watches

    def watch(self, watch: Watch) -> None:
        """Begin to tell a process of changes."""
        self._next_watch += 1
        watch.number = self._next_watch
        self.watches[watch.number] = watch
        self.pump(watch)

    def _pump_all(self) -> None:
        for watch in list(self.watches.values()):
            self.pump(watch)

    def pump(self, watch: Watch) -> None:
        """Send a watch what it has not been sent, one message at a time."""
        if watch.is_sending or self.is_away or watch.number not in self.watches:
            return
        if not watch.loop.is_alive:
            del self.watches[watch.number]
            return
        try:
            events = []
            if watch.following <= self.state.revision:
                # What was looked through before has nothing of this prefix; but for the part that may be forgotten.
                is_kept = watch.following > self.state.compacted
                events = self.state.events(watch.prefix, watch.looked if is_kept else watch.following)
                watch.looked = self.state.revision + 1
        except TallymarkError as error:
            del self.watches[watch.number]
            self.world.after(self.network.delay_ns(), watch.loop.post, watch.failed, error)
            return
        if events:
            watch.following = watch.looked
            watch.is_sending = True
            self.world.after(self.network.delay_ns(), self._deliver, watch, events)

    def _deliver(self, watch: Watch, events: list[WatchEvent]) -> None:
        if watch.number not in self.watches:
            return
        if self.is_away or not self.network.is_open(NAME, watch.owner):
            self.world.after(STALL_NS, self._deliver, watch, events)
            return
        watch.is_sending = False
        watch.loop.post(watch.received, events)
        self.pump(watch)


class Watch:
    """One stream of changes to one process."""

    def __init__(self, owner: str, loop: ProcessLoop, prefix: bytes, following: int) -> None:
        self.number = 0
        self.owner = owner
        self.loop = loop
        self.prefix = prefix
        self.following = following
        self.looked = following  # from here on, changes were not looked at yet; at least `following`
        self.is_sending = False
        self._news: list[list[WatchEvent]] = []
        self._error: TallymarkError | None = None
        self._changed = asyncio.Event()

    def received(self, events: list[WatchEvent]) -> None:
        self._news.append(events)
        self._changed.set()

    def failed(self, error: TallymarkError) -> None:
        self._error = error
        self._changed.set()

    async def next(self) -> list[WatchEvent]:
        """Wait for the next changes."""
        while not self._news:
            if self._error is not None:
                raise self._error
            self._changed.clear()
            await self._changed.wait()
        return self._news.pop(0)


class SimCoordinator:
    """The coordinator port of one process life.

    Args:
        etcd: what it reaches.
        name: the process's name in the network.
        loop: the process's loop.
    """

    def __init__(self, etcd: Etcd, name: str, loop: ProcessLoop) -> None:
        self.leases: list[int] = []  # granted to this process
        self._etcd = etcd
        self._name = name
        self._loop = loop
        self._watches: list[Watch] = []
        self._closed = False

    async def get(self, key: bytes) -> KeyValue | None:
        return await self._call(lambda: self._etcd.state.get(key))

    async def range(self, prefix: bytes) -> RangeResult:
        return await self._call(lambda: self._etcd.state.range(prefix))

    async def put(self, key: bytes, value: bytes, *, lease: int = 0) -> int:
        return (await self.txn([], [Put(key, value, lease)])).revision

    async def delete(self, key: bytes) -> bool:
        return bool((await self.txn([], [Delete(key)])).results[0])

    async def txn(
        self, compares: Sequence[Compare], success: Sequence[Operation], failure: Sequence[Operation] = ()
    ) -> TxnResult:
        return await self._call(lambda: self._etcd.txn(list(compares), list(success), list(failure)))

    async def watch(self, prefix: bytes, from_revision: int = 0) -> AsyncIterator[list[WatchEvent]]:
        if from_revision <= 0:
            from_revision = await self._call(lambda: self._etcd.state.revision) + 1
        watch = Watch(self._name, self._loop, prefix, from_revision)
        self._watches.append(watch)
        await self._call(lambda: self._etcd.watch(watch))
        try:
            while True:
                yield await watch.next()
        finally:
            self._etcd.watches.pop(watch.number, None)

    async def lease_grant(self, ttl_s: float) -> int:
        lease: int = await self._call(lambda: self._etcd.lease_grant(int(ttl_s * 1e9)))
        self.leases.append(lease)
        return lease

    async def lease_keepalive(self, lease: int) -> float:
        return await self._call(lambda: self._etcd.lease_keepalive(lease))

    async def lease_revoke(self, lease: int) -> None:
        await self._call(lambda: self._etcd.lease_revoke(lease))

    async def close(self) -> None:
        self._closed = True
        for watch in self._watches:
            watch.failed(
                UnavailableError("the coordinator is closed", code=ErrorCode.CLOSED, retriable=False)
            )

    # ------------------------------------------------------------ calls

    async def _call(self, execute: Callable[[], Any]) -> Any:
        if self._closed:
            raise UnavailableError("the coordinator is closed", code=ErrorCode.CLOSED, retriable=False)
        future = self._loop.create_future()
        etcd, world = self._etcd, self._etcd.world
        if etcd.is_away and etcd.rng.random() < 0.5:  # refused, rather than swallowed
            world.after(etcd.network.delay_ns(), self._answer, future, None, _away())
        else:
            etcd.network.send(self._name, NAME, self._execute, future, execute, is_datagram=False)
        timer = self._loop.call_later(TIMEOUT_NS / 1e9, self._resolve, future, None, _away())
        try:
            return await future
        finally:
            timer.cancel()

    def _execute(self, future: asyncio.Future[Any], execute: Callable[[], Any]) -> None:
        etcd = self._etcd
        if etcd.is_away or not self._loop.is_alive:
            return
        swallowed = etcd.flaky and etcd.rng.random() < etcd.flaky
        if swallowed and etcd.rng.random() < 0.5:
            return
        result, error = None, None
        try:
            result = execute()
        except TallymarkError as raised:
            error = raised
        if swallowed:
            return
        etcd.network.send(NAME, self._name, self._answer, future, result, error, is_datagram=False)

    def _answer(self, future: asyncio.Future[Any], result: Any, error: TallymarkError | None) -> None:
        self._loop.post(self._resolve, future, result, error)

    @staticmethod
    def _resolve(future: asyncio.Future[Any], result: Any, error: TallymarkError | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)


def _away() -> UnavailableError:
    return UnavailableError("the coordinator does not answer", code=ErrorCode.TIMEOUT)
