"""Asking stores: which store a question goes to, and when it is asked again.

Owns the connections to the stores and what the coordinator tells of them. A question about a partition goes to its
leader, or, with `Consistency.STALE`, to any copy: to a follower rather than to the leader, which has enough to do.
Reads can be repeated, so whatever may pass is a retry within the caller's time and not the caller's error: a leader
that is lost, or answers that it is none, and one that was replaced while it was asked. A retry waits for news of the
partition (another leader, a connection that stands), and no longer than a backoff that grows.

Whoever talks to leaders in another way than by questions (a tail) shares connections and news: `call`, `doubt`,
`on_news`.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable
from typing import Any, Final, TypeVar

from tallymark_protocol.codec import decode, encode
from tallymark_protocol.errors import ErrorCode, TallymarkError, UnavailableError
from tallymark_protocol.frames import Frame
from tallymark_protocol.messages import (
    Call,
    Consistency,
    FrameType,
    StoreAlerts,
    StoreEvents,
    StoreRealtime,
    StoreTotals,
)
from tallymark_runtime.catalog import AssignmentCatalog, LeaderCatalog, NodeCatalog
from tallymark_runtime.coordinator import Coordinator
from tallymark_runtime.pool import PeerPool
from tallymark_runtime.transport import call_deadline

T = TypeVar("T")
Question = StoreTotals | StoreRealtime | StoreEvents | StoreAlerts

RETRY_S: Final = 0.02  # between attempts to reach a partition's leader; doubled up to ...
RETRY_MAX_S: Final = 0.5
STALE_ATTEMPT_S: Final = 2.0  # for one copy to answer before the next is asked
CATCH_UP_S: Final = 0.25  # between two questions to the coordinator for who leads
MARGIN_S = 0.25  # an answer of ours is on the way this long before its caller gives up, or ...
MARGIN_SHARE = 0.1  # ... this share of the time it has, if that is less
# Codes of errors that are no final answer though the request may not be repeated as it is: of one connection, and of
# one copy where others can be asked.
_MAY_PASS: Final = {
    False: frozenset({ErrorCode.CLOSED}),
    True: frozenset({ErrorCode.CLOSED, ErrorCode.PARTITION_DAMAGED}),
}
_DOUBTS: Final = frozenset({ErrorCode.NOT_LEADER, ErrorCode.PARTITION_UNAVAILABLE, ErrorCode.CLOSED})


def less_margin(left_s: float) -> float:
    """How much of the time that a caller has left may be spent, so that its answer is there before it gives up."""
    return left_s - min(MARGIN_S, left_s * MARGIN_SHARE)


class _Direct:
    """A question to a leader that nobody awaits: its answer calls back. Looks like a future to who ends it early."""

    __slots__ = ("_end", "_is_done", "_on_answer", "_on_failure")

    def __init__(
        self,
        on_answer: Callable[[bytes], None],
        on_failure: Callable[[], None],
        end: Callable[[_Direct], None],
    ) -> None:
        self._on_answer = on_answer
        self._on_failure = on_failure
        self._end = end
        self._is_done = False

    def answered(self, frame: Frame) -> None:
        """The store answered."""
        if not self._is_done:
            self._is_done = True
            self._end(self)
            self._on_answer(frame.body)

    def failed(self, error: TallymarkError) -> None:  # noqa: ARG002 - whoever asks again finds out
        """It refused, or can't answer any more."""
        if not self._is_done:
            self._is_done = True
            self._end(self)
            self._on_failure()

    def done(self) -> bool:
        """Whether its outcome is known."""
        return self._is_done

    def set_exception(self, error: TallymarkError) -> None:
        """Wait no longer."""
        self.failed(error)


class Asking:
    """Asks stores; see the module's docstring. Use it on one event loop; close it at the end.

    Attributes:
        leaders: who leads, as far as is known here.
        on_news: called with a partition that has another leader, or none, or whose leader is connected to again.
    """

    def __init__(self, coordinator: Coordinator, node_id: str, rng: random.Random) -> None:
        self.on_news: Callable[[int], None] = _ignore
        self._rng = rng
        self.leaders = LeaderCatalog(coordinator)
        self.leaders.on_change = self._on_leader
        self._nodes = NodeCatalog(coordinator)
        self._nodes.on_change = self._renew_peers
        self._assignments = AssignmentCatalog(coordinator)
        self._peers = PeerPool(rng=rng, software=node_id)
        self._peers.on_connected = self._on_connected
        # By partition: questions that are out to its leader, with its address; and retries that wait for news.
        self._out: dict[int, dict[asyncio.Future[Any] | _Direct, str]] = {}
        self._waiting: dict[int, dict[asyncio.Future[None], None]] = {}
        self._catching_up: asyncio.Task[None] | None = None
        self._turn = 0  # where the next question to any copy begins
        self._is_renewing = False  # whether `_do_renew_peers` is about to be called
        self._is_closed = False

    async def start(self) -> None:
        """Learn who leads, and who holds copies."""
        for catalog in (self.leaders, self._nodes, self._assignments):
            await catalog.start()

    async def close(self) -> None:
        """Stop following, and close the connections."""
        self._is_closed = True
        if self._catching_up is not None:
            self._catching_up.cancel()
            await asyncio.gather(self._catching_up, return_exceptions=True)
        for catalog in (self.leaders, self._nodes, self._assignments):
            await catalog.close()
        await self._peers.close()

    def peers(self) -> list[str]:
        """The addresses of the stores that connections are kept to."""
        return self._peers.addresses()

    # ------------------------------------------------------------ questions

    async def ask(
        self, partition: int, question: Question, kind: type[T], *, deadline: float | None = None
    ) -> T:
        """Ask about a partition, again after a failure that may pass, until the caller's time is nearly up.

        `deadline` is when the caller gives up, on the loop's clock; None: that of the call under way.

        Raises:
            UnavailableError: nobody answered in time; says what went wrong last.
            TallymarkError: what a store answered and would answer again.
        """
        loop = asyncio.get_running_loop()
        if deadline is None:
            deadline = call_deadline()
        deadline = loop.time() + less_margin(deadline - loop.time())
        body = encode(question)
        is_stale = question.consistency is Consistency.STALE
        delay = RETRY_S
        error: TallymarkError = UnavailableError("no time was left", code=ErrorCode.TIMEOUT)
        while True:
            left = deadline - loop.time()
            for address in self._copies(partition) if is_stale else [self.leaders.address(partition)]:
                if left <= 0:
                    break
                try:
                    return decode(
                        kind, await self._attempt(partition, address, body, left, is_stale=is_stale)
                    )
                except TallymarkError as failure:
                    # Of several copies one may be damaged and another one not.
                    may_pass = failure.retriable or failure.code in _MAY_PASS[is_stale]
                    if not may_pass:
                        raise
                    error = failure
                left = deadline - loop.time()
            if error.code in _DOUBTS:
                self.doubt()
            wait = min(delay * (0.5 + self._rng.random()), left)
            if wait <= 0:
                raise UnavailableError(
                    f"partition {partition} could not be read in time: {error.message}",
                    code=error.code,
                    details=error.details,
                ) from error
            await self._wait_news(partition, wait)
            delay = min(delay * 2, RETRY_MAX_S)

    def ask_now(
        self,
        partition: int,
        question: Question,
        deadline: float,
        *,
        on_answer: Callable[[bytes], None],
        on_failure: Callable[[], None],
    ) -> bool:
        """Ask a partition's leader, once and without waiting; False where that can't be done now.

        One of the two is called later: with the answer's bytes, or where there will be none, for whatever reason, and
        `ask` is to be tried.
        """
        if question.consistency is Consistency.STALE:
            return False
        address = self.leaders.address(partition)
        peer = None if address is None else self._peers.get(address)
        left = deadline - asyncio.get_running_loop().time()
        left = less_margin(left)
        if peer is None or address is None or left <= 0:
            return False
        out = self._out.setdefault(partition, {})
        direct = _Direct(on_answer, on_failure, out.__delitem__)
        out[direct] = address
        try:
            peer.send(FrameType.CALL, encode(question), timeout_s=left, waiter=direct)
        except TallymarkError:
            del out[direct]
            return False
        return True

    async def call(self, address: str, call: Call, kind: type[T], timeout_s: float) -> T:
        """Make a call to the store at an address, once.

        Raises:
            UnavailableError: it isn't connected to, or was lost, or did not answer in time.
            TallymarkError: what it answered.
        """
        peer = self._peers.get(address)
        if peer is None:
            raise UnavailableError(f"there is no store at {address!r:.60}", code=ErrorCode.CLOSED)
        return decode(kind, (await peer.submit(FrameType.CALL, encode(call), timeout_s=timeout_s)).body)

    def _copies(self, partition: int) -> list[str | None]:
        """The addresses of all copies, in the order in which they are to be asked: the leader last."""
        leader = self.leaders.address(partition)
        known = [self._nodes.address("store", node) for node in self._assignments.nodes(partition)]
        followers = [address for address in known if address is not None and address != leader]
        self._turn += 1
        first = self._turn % len(followers) if followers else 0
        return [*followers[first:], *followers[:first], leader]

    async def _attempt(
        self, partition: int, address: str | None, body: bytes, left: float, *, is_stale: bool
    ) -> bytes:
        if address is None:
            raise UnavailableError(
                f"partition {partition} has no leader", code=ErrorCode.PARTITION_UNAVAILABLE
            )
        peer = self._peers.get(address)
        if peer is None:
            raise UnavailableError(f"there is no store at {address!r:.60}", code=ErrorCode.CLOSED)
        timeout_s = min(left, STALE_ATTEMPT_S) if is_stale else left
        future = peer.submit(FrameType.CALL, body, timeout_s=timeout_s)
        if is_stale:
            return (await future).body
        out = self._out.setdefault(partition, {})
        out[future] = address
        try:
            return (await future).body
        finally:
            del out[future]

    async def _wait_news(self, partition: int, seconds: float) -> None:
        """Wait until something has changed about a partition, or for some time."""
        news: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiting = self._waiting.setdefault(partition, {})  # woken in the order in which they came
        waiting[news] = None
        try:
            async with asyncio.timeout(seconds):
                await news
        except TimeoutError:
            pass
        finally:
            del waiting[news]

    # ------------------------------------------------------------ news

    def _on_leader(self, partition: int) -> None:
        self._renew_peers()
        address = self.leaders.address(partition)
        if self._is_closed:
            return
        if address is None:
            self.on_news(partition)
            return
        self._peers.add(address)
        self.on_news(partition)
        for future, asked in list(self._out.get(partition, {}).items()):
            if asked != address and not future.done():
                future.set_exception(
                    UnavailableError("its leader was replaced while it was asked", code=ErrorCode.NOT_LEADER)
                )
        self._tell(partition)

    def _on_connected(self, address: str) -> None:
        if self._is_closed:
            return
        for partition in self.leaders.led_by(address):
            self._tell(partition)
            self.on_news(partition)

    def _tell(self, partition: int) -> None:
        for news in self._waiting.get(partition, ()):
            if not news.done():
                news.set_result(None)

    def _renew_peers(self) -> None:
        if not self._is_renewing:
            self._is_renewing = True
            asyncio.get_running_loop().call_soon(self._do_renew_peers)

    def _do_renew_peers(self) -> None:
        """Be connected to all stores there are, and to all that lead; forget those that are gone."""
        self._is_renewing = False
        if not self._is_closed:
            self._peers.keep({*self.leaders.addresses(), *self._nodes.addresses("store")})

    def doubt(self) -> None:
        """Ask the coordinator who leads: what the watch has told may be behind."""
        if self._catching_up is None and not self._is_closed:
            self._catching_up = asyncio.get_running_loop().create_task(self._catch_up())

    async def _catch_up(self) -> None:
        with contextlib.suppress(TallymarkError):  # the coordinator is away: what was known stays
            await self.leaders.catch_up()
        await asyncio.sleep(CATCH_UP_S)
        self._catching_up = None


def _ignore(partition: int) -> None:
    """Take the place of a callback that was not given."""
