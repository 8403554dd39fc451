"""Which node to talk to, in each role: links, topology, server time, and calls over them.

Owns every link of a client. Chunks go over one gateway link at a time; where it is lost or drains, a connector
takes the next address, with jittered backoff, until one answers. Links to query nodes and alerts instances are opened
on demand and kept. The topology comes with the handshake and is asked for again every `refresh_seconds`, and when
none of a role's nodes answers; a link that owes an answer and is silent for too long is given up.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from typing import Any, Final, Literal, TypeVar

from tallymark._link import Answer, Link, open_link, split_address
from tallymark_protocol.codec import decode, encode
from tallymark_protocol.errors import ErrorCode, InvalidRequestError, TallymarkError, UnavailableError
from tallymark_protocol.messages import FrameType, GetTopology, Message, Topology

CONNECT_TIMEOUT: Final = 5.0  # seconds for one address
BACKOFF_MIN: Final = 0.02  # seconds before the first retry
BACKOFF_MAX: Final = 1.0
SILENCE_PING: Final = 2.0  # seconds without a byte, while answers are owed, after which a link is asked
SILENCE_MAX: Final = 6.0  # and after which it is given up
TEND_SECONDS: Final = 1.0  # how often links are looked after
REFRESH_SECONDS_MIN: Final = 1.0  # between two questions for the topology, whatever it says
NODE_LINKS_MAX: Final = 16

T = TypeVar("T", bound=Message)

Role = Literal["ingest", "query", "alerts"]
"""Who is to answer a call."""


def backoff_seconds(attempt: int, rng: random.Random) -> float:
    """How long to wait before try `attempt` (1 = the first retry): exponential, with full jitter above a half."""
    ceiling = min(BACKOFF_MAX, BACKOFF_MIN * 2.0 ** min(attempt - 1, 16))
    return ceiling * (0.5 + 0.5 * rng.random())


class Gateways:
    """The links of one client; see the module's docstring."""

    def __init__(
        self,
        addresses: Sequence[str],
        loop: asyncio.AbstractEventLoop,
        rng: random.Random,
        *,
        on_up: Callable[[], None],
    ) -> None:
        if not addresses:
            raise InvalidRequestError("a client needs at least one gateway address")
        for address in addresses:
            split_address(address)
        self.topology: Topology | None = None  # None before the first handshake
        self.error: TallymarkError | None = None  # why the last attempt to connect failed
        self._given = list(dict.fromkeys(addresses))
        self._loop = loop
        self._rng = rng
        self._on_up = on_up  # called when chunks can be sent again
        self._link: Link | None = None  # where chunks go
        self._links: set[Link] = set()  # all that are open, draining ones included
        self._node_links: dict[str, Link] = {}
        self._node_locks: dict[str, asyncio.Lock] = {}
        self._offset_ns = 0  # server time minus the loop's clock
        self._position = rng.randrange(len(self._given))  # where the connector goes on
        self._spread = rng.randrange(1 << 16)  # chooses among a role's nodes, for clients to spread over them
        self._connector: asyncio.Task[None] | None = None
        self._tender: asyncio.Task[None] | None = None
        self._up = asyncio.Event()  # set while there is a usable link
        self._refreshing: asyncio.Task[None] | None = None
        self._refreshed = -REFRESH_SECONDS_MIN  # when a call last asked for the topology, on the loop's clock
        self._closed = False

    # ------------------------------------------------------------ state

    @property
    def link(self) -> Link | None:
        """Where to send chunks, or None: then the connector is at work and `on_up` will be called."""
        link = self._link
        if link is not None and link.usable:
            return link
        self._connect()
        return None

    def now_ns(self) -> int:
        """The server's time. It runs ahead by at most the time the handshake took, and never lags behind."""
        return int(self._loop.time() * 1e9) + self._offset_ns

    async def wait_up(self, deadline: float) -> None:
        """Wait for a usable link.

        Raises:
            UnavailableError: there was none until the deadline.
        """
        if self.link is not None:
            return
        try:
            async with asyncio.timeout_at(deadline):
                await self._up.wait()
        except TimeoutError:
            detail = f": {self.error.message}" if self.error is not None else ""
            raise UnavailableError(
                f"no gateway could be reached{detail}", code=ErrorCode.TIMEOUT
            ) from self.error
        if self._closed:
            raise UnavailableError("the client is closed", code=ErrorCode.CLOSED, retriable=False)

    # ------------------------------------------------------------ links

    def link_draining(self, link: Link) -> None:
        """Use another link from now on."""
        self._leave(link)

    def link_lost(self, link: Link) -> None:
        """Forget a link."""
        self._links.discard(link)
        self._leave(link)

    def _leave(self, link: Link) -> None:
        if self._node_links.get(link.address) is link:
            del self._node_links[link.address]
        if link is self._link:
            self._link = None
            self._up.clear()
            self._connect()

    def _connect(self) -> None:
        if self._connector is None and not self._closed:
            self._connector = self._loop.create_task(self._run_connector())

    async def _run_connector(self) -> None:
        attempt = 0
        try:
            while not self._closed:
                addresses = self._addresses()
                address = addresses[self._position % len(addresses)]
                self._position += 1
                try:
                    link = await open_link(address, self._loop, self, CONNECT_TIMEOUT)
                except TallymarkError as error:
                    self.error = error
                    attempt += 1
                    # The other addresses are tried at once; only a full round without success waits.
                    if attempt % len(addresses) == 0:
                        await asyncio.sleep(backoff_seconds(attempt // len(addresses), self._rng))
                    continue
                if link.usable:
                    self._adopt(link)
                    return
        finally:
            self._connector = None

    def _addresses(self) -> list[str]:
        known = self.topology.gateways if self.topology is not None else []
        return list(dict.fromkeys([*self._given, *known]))

    def _adopt(self, link: Link) -> None:
        welcome = link.welcome
        assert welcome is not None, "a link is usable after its handshake"
        self._link = link
        self._links.add(link)
        # Counted from before HELLO: a chunk is never made out older than it is.
        self._offset_ns = welcome.now_ns - int(link.started * 1e9)
        if welcome.topology is not None:
            self.topology = welcome.topology
        if self._tender is None:
            self._tender = self._loop.create_task(self._tend())
        self._up.set()
        self._on_up()

    async def _tend(self) -> None:
        """Look after the links: silence, and a topology that has grown old."""
        refreshed = self._loop.time()
        while not self._closed:
            await asyncio.sleep(TEND_SECONDS)
            now = self._loop.time()
            for link in [*self._links]:
                # Silence before there was anything to say means nothing.
                silent = now - max(link.last_received, link.waiting_since)
                if not link.waiting:
                    continue
                if silent > SILENCE_MAX:
                    link.abort(f"{link.address} was silent for {silent:.0f} s")
                elif silent > SILENCE_PING:
                    link.ping()
            every = self.topology.refresh_seconds if self.topology is not None else 30
            if now - refreshed >= max(every, REFRESH_SECONDS_MIN) and self._link is not None:
                refreshed = now
                self.refresh()

    # ------------------------------------------------------------ calls

    async def call(self, message: Message, kind: type[T], deadline: float, *, role: Role = "ingest") -> T:
        """Send a CALL to a node of a role and return the answer.

        Retries until the deadline where the service says that it may, and where the connection is lost: for
        calls that can be repeated.
        """
        return (await self.call_counted(message, kind, deadline, role=role))[0]

    async def call_counted(
        self, message: Message, kind: type[T], deadline: float, *, role: Role = "ingest"
    ) -> tuple[T, bool]:
        """As `call`; also whether an earlier try may have taken effect without our seeing its answer.

        An error that the service answers carries the same in its `details["repeated"]`.
        """
        body = encode(message)
        attempt = 0
        repeated = False
        last: TallymarkError | None = None
        while True:
            answer = Answer(self._loop)
            now = self._loop.time()
            if now >= deadline:
                raise UnavailableError(
                    "no answer within the timeout" + (f": {last.message}" if last is not None else ""),
                    code=ErrorCode.TIMEOUT,
                ) from last
            sent = False
            try:
                link = await self._call_link(deadline, attempt, role)
                timeout_ms = max(int((deadline - self._loop.time()) * 1_000), 1)
                link.request(FrameType.CALL, body, answer, timeout_ms)
                sent = True
                async with asyncio.timeout_at(deadline):
                    reply = await answer.future
                return decode(kind, reply), repeated
            except TimeoutError:
                last = last or UnavailableError("the service didn't answer", code=ErrorCode.TIMEOUT)
                continue  # the deadline is over: raised above
            except TallymarkError as error:
                if not error.retriable:
                    if repeated:
                        error.details["repeated"] = True
                    raise
                repeated = repeated or sent
                last = error
            attempt += 1
            if role != "ingest" and self.is_round(attempt, role):
                self.refresh()
            pause = backoff_seconds(attempt, self._rng)
            await asyncio.sleep(min(pause, max(deadline - self._loop.time(), 0)))

    async def call_once(
        self, message: Message, kind: type[T], deadline: float, *, role: Role, attempt: int
    ) -> T:
        """Send a CALL to one node of a role, and return the answer. For callers that try again themselves.

        Args:
            message: what to ask.
            kind: the answer's type.
            deadline: on the loop's clock.
            role: whom to ask.
            attempt: the same number chooses the same node, as long as the topology stays; the next one another.

        Raises:
            UnavailableError: the node couldn't be reached, or didn't answer in time.
        """
        answer = Answer(self._loop)
        link = await self._call_link(deadline, attempt, role)
        timeout_ms = max(int((deadline - self._loop.time()) * 1_000), 1)
        link.request(FrameType.CALL, encode(message), answer, timeout_ms)
        try:
            async with asyncio.timeout_at(deadline):
                reply = await answer.future
        except TimeoutError:
            raise UnavailableError(f"{link.address} didn't answer", code=ErrorCode.TIMEOUT) from None
        return decode(kind, reply)

    def is_round(self, failures: int, role: Role) -> bool:
        """Whether so many failures in a row mean that none of a role's nodes answers: by now there may be others."""
        return failures % max(len(self._nodes(role)), 1) == 0

    def _nodes(self, role: Role) -> list[str]:
        if self.topology is None:
            return []
        return self.topology.query if role == "query" else self.topology.alerts

    async def _call_link(self, deadline: float, attempt: int, role: Role) -> Link:
        if self._closed:
            raise UnavailableError("the client is closed", code=ErrorCode.CLOSED, retriable=False)
        known = [] if role == "ingest" else self._nodes(role)
        if role == "alerts" and not known:
            raise UnavailableError("the cluster has no alerts service at present")
        if not known:
            await self.wait_up(deadline)
            link = self.link
            if link is None:
                raise UnavailableError("the connection was lost", code=ErrorCode.CLOSED)
            return link
        address = known[(self._spread + attempt) % len(known)]
        lock = self._node_locks.setdefault(address, asyncio.Lock())
        async with lock:
            link = self._node_links.get(address)
            if link is not None and link.usable:
                return link
            remaining = max(min(CONNECT_TIMEOUT, deadline - self._loop.time()), 0.001)
            link = await open_link(address, self._loop, self, remaining)
            if self._closed or not link.usable:
                link.abort("the client is closed")
                raise UnavailableError("the connection was lost", code=ErrorCode.CLOSED)
            while len(self._node_links) >= NODE_LINKS_MAX:
                # The topology has changed so often that only old links can be among these.
                self._node_links.pop(next(iter(self._node_links))).close()
            self._node_links[address] = link
            self._links.add(link)
            return link

    def refresh(self) -> None:
        """Have the topology asked for anew: at most once in REFRESH_SECONDS_MIN, however many calls want it."""
        if self._refreshing is None and self._loop.time() - self._refreshed >= REFRESH_SECONDS_MIN:
            self._refreshing = self._loop.create_task(self._ask_topology())

    async def _ask_topology(self) -> None:
        try:
            deadline = self._loop.time() + CONNECT_TIMEOUT
            self.topology = await self.call(GetTopology(), Topology, deadline)
        except TallymarkError as error:
            self.error = error  # the old one stands
        finally:
            self._refreshed = self._loop.time()
            self._refreshing = None

    # ------------------------------------------------------------ the end

    async def close(self) -> None:
        """Close all links; requests under way are lost."""
        self._closed = True
        tasks = [task for task in (self._connector, self._tender, self._refreshing) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for link in [*self._links]:
            link.abort("the client was closed")
        self._links.clear()
        self._node_links.clear()
        self._link = None
        self._up.set()  # whoever waits sees `_closed`

    def abandon(self) -> None:
        """Forget everything without touching it: after a fork the sockets are the parent's."""
        self._closed = True
        for link in self._links:
            link.abandon()
        self._links.clear()
        self._node_links.clear()
        self._link = None
        self._connector = self._tender = self._refreshing = None


def details_repeated(error: TallymarkError) -> bool:
    """Whether an earlier try of the failed call may have taken effect."""
    repeated: Any = error.details.get("repeated")
    return repeated is True
