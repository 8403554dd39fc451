"""The client side of the frame protocol between roles: `PeerClient`, one address, many requests in flight.

Owns a connection to one peer: it connects (again) when a request needs it, matches answers to requests, times
requests out, bounds what is in flight and maps whatever goes wrong to the project's errors. It never sends a
request twice: whether that is safe is the caller's to know. It never stops reading: a server that is short of room
stops reading us, and if both sides stopped, neither would ever go on.

A connection that fails takes its requests with it: they fail with `UnavailableError`, and a request may have been
executed all the same. After a failed attempt to connect the next one waits, with jitter, up to a second.

A peer that owes an answer and is silent is sent a PING; if neither anything comes nor anything more is taken by it,
it is given up: a process that was stopped, or a host behind a broken network, ends no connection by itself.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, Protocol, TypeVar

import msgspec

from tallymark_protocol.codec import decode, decode_error, encode
from tallymark_protocol.connection import Connection, Role, State
from tallymark_protocol.errors import (
    BackpressureError,
    ErrorCode,
    LocalProtocolError,
    RemoteProtocolError,
    TallymarkError,
    UnavailableError,
    error_from_wire,
)
from tallymark_protocol.frames import REQUEST_ID_MAX, Frame
from tallymark_protocol.messages import (
    PROTOCOL_VERSION,
    PROTOCOL_VERSION_MIN,
    Call,
    FrameType,
    Hello,
    Welcome,
)
from tallymark_runtime.framing import FramedProtocol, Part, split_address

T = TypeVar("T")

_ERROR: Final = int(FrameType.ERROR)
_FIRST_PAIRED: Final = int(FrameType.INGEST)


class PeerOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How a client behaves."""

    connect_timeout_s: float = 5.0  # of one attempt, handshake included
    backoff_min_s: float = 0.02  # after the first failed attempt
    backoff_max_s: float = 1.0
    in_flight_bytes_max: int = 64 * 1024 * 1024
    requests_max: int = 65_536  # in flight
    ping_after_s: float = 1.0  # how long a peer that owes an answer may be silent before it is sent a PING
    silence_max_s: float = 3.0  # how long it may take to answer that, or to take more of what is being sent
    write_buffer_high_bytes: int = 1024 * 1024


_DEFAULT_OPTIONS: Final = PeerOptions()


class Waiter(Protocol):
    """Whoever waits for the answer to a request. Exactly one of the two is called, once; neither may raise."""

    def answered(self, frame: Frame) -> None:
        """Take the answer: a frame of the type that answers the request."""

    def failed(self, error: TallymarkError) -> None:
        """Take the error that the peer answered, or notice that no answer will come."""


class _Reply:
    """A waiter for code that awaits."""

    __slots__ = ("future",)

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.future: asyncio.Future[Frame] = loop.create_future()

    def answered(self, frame: Frame) -> None:
        """Give the frame to whoever awaits it."""
        if not self.future.done():  # it is, if it was cancelled
            self.future.set_result(frame)

    def failed(self, error: TallymarkError) -> None:
        """Raise the error where the answer is awaited."""
        if not self.future.done():
            self.future.set_exception(error)


# A request in flight: who waits, the type of the frame that answers it, the bytes counted as in flight for it, the
# loop time at which it times out, the loop time at which it was sent. A plain tuple: one is made for every request.
_Pending = tuple[Waiter, int, int, float, float]


class _Link(FramedProtocol):
    """One connection of a client, from its handshake to its end."""

    def __init__(self, client: PeerClient, hello: Hello, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(
            Connection(Role.CLIENT), loop, write_buffer_high_bytes=client.options.write_buffer_high_bytes
        )
        self.pending: dict[int, _Pending] = {}  # by request id, in the order in which they were sent
        self.greeted: asyncio.Future[None] = loop.create_future()  # done with the handshake
        self.lost: asyncio.Future[None] = loop.create_future()  # done when the connection is gone
        self._client = client
        self._hello = hello
        self._next_id = 1
        self._fault: TallymarkError | None = None  # why the connection ends, if we know
        self._sweeper: asyncio.TimerHandle | None = None
        self._sweep_at = 0.0  # when the sweeper will run, loop time
        self._pinged: float | None = None  # when a silent peer was sent a PING, or last took something
        self._unwritten = 0  # bytes that it had not taken then

    # ------------------------------------------------------------ asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Asyncio: connected."""
        super().connection_made(transport)
        self.write(self.connection.initiate(self._hello))

    def connection_lost(self, exc: Exception | None) -> None:
        """Asyncio: the connection is gone."""
        super().connection_lost(exc)
        if self._sweeper is not None:
            self._sweeper.cancel()
        fault = self._fault
        if fault is None:
            why = f": {exc}" if exc is not None else ""
            fault = UnavailableError(
                f"the connection to {self._client.address} was lost{why}", code=ErrorCode.CLOSED
            )
        self._fault = fault
        if not self.greeted.done():
            self.greeted.set_exception(fault)
        self.fail_pending(fault)
        if not self.lost.done():
            self.lost.set_result(None)
        self._client.on_lost(self)

    def on_received(self, frames: list[Frame]) -> None:
        """Match answers to their requests."""
        self._pinged = None
        pending = self.pending
        freed = answered = 0
        try:
            for frame in frames:
                kind = frame[0]
                if kind < _FIRST_PAIRED and (kind != _ERROR or not frame[2]):
                    self._on_control(frame)
                    continue
                entry = pending.pop(frame[2], None)
                if entry is None:
                    continue  # it timed out
                waiter, answer, size, _, _ = entry
                freed += size
                answered += 1
                if kind == answer:
                    waiter.answered(frame)
                elif kind == _ERROR:
                    try:
                        waiter.failed(decode_error(frame.body))
                    except RemoteProtocolError as error:
                        waiter.failed(error)
                        raise
                else:
                    fault = RemoteProtocolError(f"a request was answered by a frame of type {kind}")
                    waiter.failed(fault)
                    raise fault
        except RemoteProtocolError as error:
            self.on_broken(error)
        finally:
            if answered:
                self._client.on_freed(freed, requests=answered)
        if answered:
            self._client.on_answers()
            if not pending and self.connection.state is State.DRAINING:
                self.close_transport()

    def on_broken(self, error: RemoteProtocolError) -> None:
        """Cut the connection: what the peer says makes no sense."""
        self._fault = self._fault or error
        self.abort_transport()

    def _on_control(self, frame: Frame) -> None:
        state = self.connection.state
        if frame.type == FrameType.WELCOME:
            if not self.greeted.done():
                self.greeted.set_result(None)
        elif state is State.CLOSED:
            refusal = self.connection.refusal
            assert refusal is not None, "an ERROR closed the connection"
            self._fault = error_from_wire(refusal.code, refusal.retriable, refusal.message, refusal.details)
            self.close_transport()
        elif state is State.DRAINING:
            self._client.on_draining(self)
            if not self.pending:
                self.close_transport()

    # ------------------------------------------------------------ requests

    @property
    def is_usable(self) -> bool:
        """Whether requests can be sent on it."""
        transport = self._transport
        return self.connection.state is State.OPEN and transport is not None and not transport.is_closing()

    def send_request(
        self, kind: int, parts: Sequence[Part], size: int, timeout_s: float, waiter: Waiter
    ) -> None:
        """Send a request whose bytes are counted already."""
        pending = self.pending
        request_id = self._next_id
        while request_id in pending:
            request_id = request_id + 1 if request_id < REQUEST_ID_MAX else 1
        header = self.connection.send_header(
            kind, size, request_id=request_id, timeout_ms=max(1, int(timeout_s * 1000))
        )
        self._next_id = request_id + 1 if request_id < REQUEST_ID_MAX else 1
        now = self._loop.time()
        deadline = now + timeout_s
        pending[request_id] = (waiter, kind + 1, size, deadline, now)
        self.write(header, *parts)
        if self._sweeper is None or deadline < self._sweep_at:
            self._schedule_sweep(min(deadline, now + self._client.options.ping_after_s))

    def fail_pending(self, error: TallymarkError) -> None:
        """Fail every request in flight."""
        entries = list(self.pending.values())
        self.pending.clear()
        freed = 0
        for waiter, _, size, _, _ in entries:
            freed += size
            # An exception instance collects tracebacks where it is raised: each waiter gets its own.
            waiter.failed(_copy(error))
        self._client.on_freed(freed, requests=len(entries))
        if entries:
            self._client.on_answers()

    def _schedule_sweep(self, at: float) -> None:
        if self._sweeper is not None:
            self._sweeper.cancel()
        self._sweep_at = at
        self._sweeper = self._loop.call_at(at, self._sweep)

    def _sweep(self) -> None:
        """Time out what is due, and look whether the peer is alive. Runs once in a while."""
        self._sweeper = None
        now = self._loop.time()
        options = self._client.options
        if self._pinged is not None and self._is_gone(now):
            self._fault = UnavailableError(
                f"{self._client.address} has stopped answering", code=ErrorCode.TIMEOUT
            )
            self.abort_transport()
            return
        due = [(request_id, entry) for request_id, entry in self.pending.items() if entry[3] <= now]
        freed = 0
        for request_id, (waiter, _, size, _, _) in due:
            del self.pending[request_id]
            freed += size
            waiter.failed(_timed_out(self._client.address))
        # Nothing at all came since a request was sent that has timed out, or for long: the peer may be gone.
        silent = bool(due) and self.last_received <= max(entry[4] for _, entry in due)
        wanted = [entry[3] for entry in self.pending.values()]
        if wanted:
            oldest_sent = next(iter(self.pending.values()))[4]
            ping_at = max(oldest_sent, self.last_received) + options.ping_after_s
            silent = silent or ping_at <= now
            wanted.append(ping_at)
        if silent and self._pinged is None:
            self._pinged = now
            if self.connection.state in (State.OPEN, State.DRAINING):
                self.write(self.connection.send(FrameType.PING))
            self._unwritten = self.unwritten_bytes
        if due:
            self._client.on_freed(freed, requests=len(due))
            self._client.on_answers()
        if self._pinged is not None:
            wanted.append(now + options.silence_max_s / 4)
        if wanted:
            self._schedule_sweep(max(min(wanted), now + _SWEEP_STEP_S))
        elif self.connection.state is State.DRAINING:
            self.close_transport()

    def _is_gone(self, now: float) -> bool:
        """Whether a peer that was sent a PING is to be given up. One that takes what we send is alive."""
        assert self._pinged is not None
        unwritten = self.unwritten_bytes
        if unwritten < self._unwritten:
            self._pinged = now
        self._unwritten = unwritten
        return now - self._pinged > self._client.options.silence_max_s


_SWEEP_STEP_S: Final = 0.005  # the least time between two sweeps


class PeerClient:
    """A connection to one peer that is made anew when it breaks.

    Args:
        address: "host:port".
        rng: for the jitter of reconnecting.
        software: what to introduce ourselves as.
        features: what this side can do beyond the version.
        options: how it behaves.

    Use it on one event loop; close it at the end.
    """

    def __init__(
        self,
        address: str,
        *,
        rng: random.Random,
        software: str = "tallymark",
        features: Sequence[str] = (),
        options: PeerOptions = _DEFAULT_OPTIONS,
    ) -> None:
        self.address = address
        self.options = options
        self._host, self._port = split_address(address)
        self._rng = rng
        self._hello = Hello(PROTOCOL_VERSION_MIN, PROTOCOL_VERSION, software, list(features))
        self._link: _Link | None = None  # requests go here; None while not connected
        self._links: set[_Link] = set()  # all that stand, with those that only finish what is under way
        self._connecting: asyncio.Task[_Link] | None = None
        self._failures = 0  # attempts to connect that failed since the last that didn't
        self._retry_at = 0.0  # loop time before which no attempt is made
        self._in_flight_bytes = 0  # of requests sent and not answered, and of those about to be sent
        self._in_flight = 0  # requests, likewise
        self._waiters: deque[tuple[asyncio.Future[None], int]] = deque()  # (granted, bytes), first come first
        self._closed = False
        self._drained: asyncio.Future[None] | None = None  # set while closing: done with nothing in flight
        self.on_answers: Callable[[], None] = _nothing  # called after waiters were told, once for all of them
        self.on_disconnect: Callable[[], None] = _nothing  # called when the link in use is lost, or drains

    # ------------------------------------------------------------ state

    @property
    def is_connected(self) -> bool:
        """Whether a request would go out at once."""
        return self._link is not None and self._link.is_usable

    @property
    def welcome(self) -> Welcome | None:
        """What the peer said of itself on the present connection; None while not connected."""
        return self._link.connection.welcome if self._link is not None else None

    @property
    def in_flight_bytes(self) -> int:
        """Bytes of requests that are not answered yet."""
        return self._in_flight_bytes

    # ------------------------------------------------------------ connecting

    async def connect(self, timeout_s: float | None = None) -> Welcome:
        """Connect, if that is not done yet, and return what the peer said of itself.

        Raises:
            UnavailableError: one attempt failed or took too long. Further calls try again.
            TallymarkError: the peer refused us, for instance with UNSUPPORTED_VERSION.
        """
        link = await self._wait_link(self.options.connect_timeout_s if timeout_s is None else timeout_s)
        welcome = link.connection.welcome
        assert welcome is not None, "the handshake is done"
        return welcome

    async def _wait_link(self, timeout_s: float) -> _Link:
        """The link, connecting first where needed; fails with the attempt that is under way."""
        if self._link is not None and self._link.is_usable:
            return self._link
        task = self._start_connecting()
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.shield(task)
        except TimeoutError:
            raise _timed_out(self.address) from None
        except asyncio.CancelledError:
            if task.cancelled() and self._closed:
                raise _closed() from None
            raise

    def _start_connecting(self) -> asyncio.Task[_Link]:
        if self._closed:
            raise _closed()
        if self._connecting is None:
            self._connecting = asyncio.get_running_loop().create_task(self._connect())
            self._connecting.add_done_callback(self._connected)
        return self._connecting

    def _connected(self, task: asyncio.Task[_Link]) -> None:
        self._connecting = None
        if not task.cancelled():
            task.exception()  # those who waited have it; where nobody did, nobody wants it

    async def _connect(self) -> _Link:
        loop = asyncio.get_running_loop()
        delay_s = self._retry_at - loop.time()
        if delay_s > 0:
            await asyncio.sleep(delay_s)
        link = _Link(self, self._hello, loop)
        try:
            async with asyncio.timeout(self.options.connect_timeout_s):
                await loop.create_connection(lambda: link, self._host, self._port)
                self._links.add(link)
                await link.greeted
        except BaseException as error:
            link.abort_transport()
            self._back_off(loop.time())
            if isinstance(error, TimeoutError):
                raise UnavailableError(
                    f"can't connect to {self.address}: no answer in {self.options.connect_timeout_s:g} s",
                    code=ErrorCode.TIMEOUT,
                ) from error
            if isinstance(error, OSError):
                raise UnavailableError(
                    f"can't connect to {self.address}: {error}", code=ErrorCode.CLOSED
                ) from error
            raise
        finally:
            if link.greeted.done() and not link.greeted.cancelled():
                link.greeted.exception()  # retrieved, whether or not we got as far as waiting for it
        self._failures = 0
        self._link = link
        return link

    def _back_off(self, now: float) -> None:
        options = self.options
        longest = min(options.backoff_max_s, options.backoff_min_s * 2.0 ** min(self._failures, 30))
        self._failures += 1
        self._retry_at = now + longest * self._rng.uniform(0.5, 1.0)

    # ------------------------------------------------------------ requests

    def submit(self, kind: int, *parts: Part, timeout_s: float) -> asyncio.Future[Frame]:
        """Send a request now and return the future of its answer, without waiting for anything.

        The future gives the answering frame or raises, as `request` does. Cancelling it only stops waiting. Raises
        what `send` does.
        """
        reply = _Reply(asyncio.get_running_loop())
        self.send(kind, *parts, timeout_s=timeout_s, waiter=reply)
        return reply.future

    def send(self, kind: int, *parts: Part, timeout_s: float, waiter: Waiter) -> None:
        """Send a request now; `waiter` is told the outcome later.

        Parts are not copied: don't change them before the answer has come.

        Raises:
            UnavailableError: not connected; an attempt to connect is begun. Nothing was sent.
            BackpressureError: too much is in flight. Nothing was sent.
            LocalProtocolError: the body is too large (TOO_LARGE).
        """
        if self._closed:
            raise _closed()
        link = self._link
        if link is None or not link.is_usable:
            self._start_connecting()
            raise UnavailableError(f"not connected to {self.address}", code=ErrorCode.CLOSED)
        size = 0
        for part in parts:
            size += len(part)
        if self._waiters or not self._fits(size):
            raise BackpressureError(f"too much is in flight to {self.address}")
        self._in_flight_bytes += size
        self._in_flight += 1
        try:
            link.send_request(kind, parts, size, timeout_s, waiter)
        except LocalProtocolError:
            self.on_freed(size, requests=1)
            raise

    async def request(self, kind: int, *parts: Part, timeout_s: float = 30.0) -> Frame:
        """Send a request and wait for its answer; connects first where needed.

        Waits while too much is in flight, in the order of the calls.

        Raises:
            UnavailableError: the peer can't be reached, the connection broke, or time ran out. Unless connecting
                failed, the request may have been executed.
            TallymarkError: what the peer answered.
        """
        size = sum(len(part) for part in parts)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        if self._link is None or not self._link.is_usable:
            await self._wait_link(timeout_s)
        await self._wait_room(size, timeout_s)
        link = self._link
        if link is None or not link.is_usable:
            self.on_freed(size, requests=1)
            raise (
                _closed()
                if self._closed
                else UnavailableError(f"the connection to {self.address} was lost", code=ErrorCode.CLOSED)
            )
        reply = _Reply(loop)
        try:
            link.send_request(kind, parts, size, max(deadline - loop.time(), 0.001), reply)
        except LocalProtocolError:
            self.on_freed(size, requests=1)
            raise
        return await reply.future

    async def call(self, call: Call, kind: type[T], *, timeout_s: float = 30.0) -> T:
        """Make a call and decode its result as `kind`. Raises what `request` does."""
        frame = await self.request(FrameType.CALL, encode(call), timeout_s=timeout_s)
        return decode(kind, frame.body)

    # ------------------------------------------------------------ room

    def _fits(self, size: int) -> bool:
        """Whether a request of `size` may be sent; a single one always may."""
        options = self.options
        if self._in_flight == 0:
            return True
        return self._in_flight < options.requests_max and (
            self._in_flight_bytes + size <= options.in_flight_bytes_max
        )

    async def _wait_room(self, size: int, timeout_s: float) -> None:
        """Wait for room and take it: one request of `size` bytes is then counted as in flight."""
        if not self._waiters and self._fits(size):
            self._in_flight_bytes += size
            self._in_flight += 1
            return
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (granted, size)
        self._waiters.append(entry)
        try:
            async with asyncio.timeout(timeout_s):
                await granted
        except BaseException as error:
            if granted.done() and not granted.cancelled() and granted.exception() is None:
                self.on_freed(size, requests=1)  # it was granted while we were being cancelled
            elif entry in self._waiters:
                self._waiters.remove(entry)
                self._grant()
            if isinstance(error, TimeoutError):
                raise _timed_out(self.address) from None
            raise

    def _grant(self) -> None:
        while self._waiters:
            granted, size = self._waiters[0]
            if not granted.done():
                if not self._fits(size):
                    return
                self._in_flight_bytes += size
                self._in_flight += 1
                granted.set_result(None)
            self._waiters.popleft()

    # ------------------------------------------------------------ for links

    def on_freed(self, size: int, *, requests: int) -> None:
        """Requests of `size` bytes in all are no longer in flight."""
        self._in_flight_bytes -= size
        self._in_flight -= requests
        if self._waiters:
            self._grant()
        if self._drained is not None and not self._in_flight and not self._drained.done():
            self._drained.set_result(None)

    def on_draining(self, link: _Link) -> None:
        """The peer takes nothing new on this link; the next request connects anew."""
        if self._link is link:
            self._link = None
            self.on_disconnect()

    def on_lost(self, link: _Link) -> None:
        """A link is gone."""
        self._links.discard(link)
        if self._link is link:
            self._link = None
            self.on_disconnect()

    # ------------------------------------------------------------ closing

    async def close(self, *, drain_s: float = 0.0) -> None:
        """Close: wait up to `drain_s` for answers under way, fail the rest, and take nothing new.

        May be called again; use after it raises UnavailableError (CLOSED).
        """
        self._closed = True
        if self._connecting is not None:
            self._connecting.cancel()
        for granted, _ in list(self._waiters):
            if not granted.done():
                granted.set_exception(_closed())
        self._waiters.clear()
        if self._in_flight and drain_s > 0:
            self._drained = asyncio.get_running_loop().create_future()
            try:
                async with asyncio.timeout(drain_s):
                    await self._drained
            except TimeoutError:
                pass
        for link in list(self._links):
            link.fail_pending(_closed())
            link.close_transport()
        for link in list(self._links):
            try:
                async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                    await asyncio.shield(link.lost)
            except TimeoutError:
                link.abort_transport()
                await link.lost
        self._link = None


_CLOSE_TIMEOUT_S: Final = 1.0  # for writing out what is queued


def _nothing() -> None:
    """Take the place of a callback that was not given."""


def _closed() -> UnavailableError:
    return UnavailableError("the client is closed", code=ErrorCode.CLOSED, retriable=False)


def _timed_out(address: str) -> UnavailableError:
    return UnavailableError(f"no answer from {address} in time", code=ErrorCode.TIMEOUT)


def _copy(error: TallymarkError) -> TallymarkError:
    return type(error)(error.message, code=error.code, retriable=error.retriable, details=error.details)
