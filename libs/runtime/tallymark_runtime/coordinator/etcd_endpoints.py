"""The connections to etcd's members: which one is asked, when another is, and how long each may take.

Owns endpoint rotation, deadlines and the mapping of foreign errors; knows nothing of keys. One member is `current`
and gets all new calls; a call that fails for want of an answer makes the next one current. Every call has a
deadline of its own, because a process that is stopped accepts connections and never answers.

Ways to ask:

- `repeat`: for what may be executed twice. Each attempt is short, and goes to the next member after a failure.
- `once`: for changes. The member must have shown within the last second that it reaches a quorum, then the request
  is sent, once. Where no answer comes, it may have taken effect.
- `hold`, for watches and for the time that a change takes: the member is asked for a sign of life every second; one
  that gives none has its connection closed, which ends everything on it.

grpclib wakes a call whose connection is lost by cancelling its task, and never takes that back, so that a later
`asyncio.timeout` in the same task would take its own expiry for a cancellation. Hence `isolated`: every call runs
in a task of its own.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final, TypeVar

from grpclib.client import Channel
from h2.exceptions import H2Error

from tallymark_protocol.errors import ErrorCode, TallymarkError, UnavailableError
from tallymark_runtime.coordinator.etcd_translation import FOREIGN_ERRORS, NoLeaderError, error_of
from tallymark_runtime.framing import split_address
from tallymark_runtime.generated import etcdserverpb as etcd

T = TypeVar("T")

# A member without a leader refuses instead of waiting, and ends its watches.
METADATA: Final = (("hasleader", "true"),)

ATTEMPT_S: Final = 1.0  # one attempt of a call that may be repeated
_FRESH_S: Final = 1.0  # how long an answer proves that a member is alive
_PULSE_TIMEOUT_S: Final = 1.5  # how long a member may take to give a sign of life
_IMPATIENT_S: Final = 0.1  # a call that was cancelled after that long counts as one without an answer
_BACK_OFF_S: Final = 0.02  # after each member has failed once; doubled up to ...
_BACK_OFF_MAX_S: Final = 0.5
# The smallest question to a quorum, and the same to a member alone.
PROBE: Final = etcd.RangeRequest(key=b"\0", count_only=True)
_PULSE: Final = etcd.RangeRequest(key=b"\0", count_only=True, serializable=True)


async def isolated(call: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine of grpclib's in a task of its own; cancelling the caller cancels it."""
    caller = asyncio.current_task()
    assert caller is not None, "a coroutine runs in a task"
    cancelled_before = caller.cancelling()
    try:
        return await asyncio.get_running_loop().create_task(call)
    except asyncio.CancelledError:
        if caller.cancelling() > cancelled_before:
            raise
        # Nobody cancelled the caller: grpclib's way to end a call, come to light outside of its own guard.
        raise ConnectionAbortedError("the connection was lost") from None
    except BaseException:
        if caller.cancelling() > cancelled_before:
            raise asyncio.CancelledError from None
        raise


class Endpoint:
    """One member of etcd.

    Attributes:
        address: "host:port".
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self._host, self._port = split_address(address)
        self._channel: Channel | None = None
        self._answered_at = float("-inf")  # when it last gave an answer, in the loop's time
        self._proven_at = float("-inf")  # when it was last asked something that takes a quorum, and answered
        self._held = 0  # streams and changes under way
        self._pulse: asyncio.Task[None] | None = None  # under way while anything is held
        self._closed = False

    def channel(self) -> Channel:
        """The connection, which is made with its first call."""
        if self._channel is None:
            self._channel = Channel(self._host, self._port)
        return self._channel

    async def call(self, ask: Callable[[Channel], Coroutine[Any, Any, T]], timeout_s: float) -> T:
        """Ask it something that takes a quorum.

        Raises:
            TallymarkError: whatever went wrong.
        """
        began_at = asyncio.get_running_loop().time()
        try:
            answer = await self._ask(ask, timeout_s)
        except UnavailableError:
            self._proven_at = float("-inf")
            raise
        self._proven_at = began_at
        return answer

    async def prove(self, timeout_s: float) -> None:
        """Make sure that it reached a quorum within the last second.

        Raises:
            UnavailableError: it does not.
        """
        if asyncio.get_running_loop().time() - self._proven_at > _FRESH_S:
            await self.call(lambda channel: etcd.KvStub(channel).range(PROBE, metadata=METADATA), timeout_s)

    async def _ask(self, ask: Callable[[Channel], Coroutine[Any, Any, T]], timeout_s: float) -> T:
        channel = self.channel()
        try:
            async with asyncio.timeout(timeout_s):
                answer = await isolated(ask(channel))
        except FOREIGN_ERRORS as error:
            if isinstance(error, TimeoutError):
                self.suspect()
            elif isinstance(error, H2Error):
                self.drop()  # nobody knows what it would do next
            raise error_of(error, self.address) from error
        finally:
            self._settle(channel)
        self._answered_at = asyncio.get_running_loop().time()
        return answer

    def _settle(self, channel: Channel) -> None:
        """Close a connection that was dropped while something was under way on it, perhaps its making."""
        if self._channel is not channel:
            channel.close()

    def hold(self) -> None:
        """Something long is under way on it: feel its pulse."""
        self._held += 1
        self.suspect()

    def release(self, channel: Channel) -> None:
        """What was under way on a connection has ended."""
        assert self._held > 0, "as many as were held"
        self._held -= 1
        self._settle(channel)

    def heard(self) -> None:
        """A stream brought something."""
        self._answered_at = asyncio.get_running_loop().time()

    def suspect(self) -> None:
        """It may have fallen silent: feel its pulse."""
        if self._pulse is None and not self._closed:
            self._pulse = asyncio.get_running_loop().create_task(self._feel_pulse())

    async def _feel_pulse(self) -> None:
        """Ask for signs of life while anything is held, at least once; close a connection that gives none."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                if loop.time() - self._answered_at >= _FRESH_S:
                    try:
                        # A member without a leader still lives, so nothing is said of one here.
                        await self._ask(lambda channel: etcd.KvStub(channel).range(_PULSE), _PULSE_TIMEOUT_S)
                    except TallymarkError:
                        self.drop()
                if not self._held:
                    return
                await asyncio.sleep(_FRESH_S)
        finally:
            self._pulse = None

    def drop(self) -> None:
        """Close the connection: calls and streams on it fail, the next call makes a new one."""
        self._proven_at = float("-inf")
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    async def close(self) -> None:
        """Close the connection for good."""
        self._closed = True
        pulse = self._pulse
        if pulse is not None:
            pulse.cancel()
            await asyncio.gather(pulse, return_exceptions=True)
        self.drop()


class Endpoints:
    """All members of an etcd cluster.

    Args:
        addresses: "host:port" of one or more members.
        rng: picks the first one, and the jitter of waiting.
        timeout_s: for every operation, all its attempts together.
    """

    def __init__(self, addresses: Sequence[str], *, rng: random.Random, timeout_s: float) -> None:
        assert addresses, "an etcd cluster has a member"
        self._endpoints = [Endpoint(address) for address in addresses]
        self._rng = rng
        self._index = rng.randrange(len(self._endpoints))
        self._closed = False
        self.timeout_s = timeout_s

    @property
    def current(self) -> Endpoint:
        """The member to ask.

        Raises:
            UnavailableError: everything is closed.
        """
        self.check_open()
        return self._endpoints[self._index]

    def check_open(self) -> None:
        """Raise UnavailableError where everything is closed."""
        if self._closed:
            raise UnavailableError("the coordinator is closed", code=ErrorCode.CLOSED, retriable=False)

    def rotate(self, failed: Endpoint) -> None:
        """Ask another member from now on, unless that is so already."""
        if self._endpoints[self._index] is failed:
            self._index = (self._index + 1) % len(self._endpoints)

    async def back_off(self, failures: int) -> None:
        """Wait before the next attempt, if each member has failed since the last wait.

        Args:
            failures: how many attempts have failed so far, this one included.
        """
        rounds, rest = divmod(failures, len(self._endpoints))
        if rest == 0:
            limit_s = min(_BACK_OFF_S * 2 ** min(rounds, 10), _BACK_OFF_MAX_S)
            await asyncio.sleep(limit_s * self._rng.uniform(0.5, 1.0))

    async def repeat(
        self, ask: Callable[[Channel], Coroutine[Any, Any, T]], *, attempt_s: float = ATTEMPT_S
    ) -> T:
        """Ask until an answer comes or time is up: for what may be executed twice.

        Args:
            ask: the call.
            attempt_s: how long an attempt may take; twice as long after each round in which all members failed, as
                it may be the answer that takes long.

        Raises:
            TallymarkError: the answer is an error, or none came.
        """
        attempts = 0

        async def attempt(endpoint: Endpoint, left_s: float) -> T:
            nonlocal attempts
            rounds = attempts // len(self._endpoints)
            attempts += 1
            return await endpoint.call(ask, min(attempt_s * 2 ** min(rounds, 10), left_s))

        return await self._repeat(attempt)

    async def once(self, ask: Callable[[Channel], Coroutine[Any, Any, T]]) -> T:
        """Find a member that reaches a quorum, then ask it, once.

        Raises:
            UnavailableError: no answer came; it may have taken effect.
            TallymarkError: the answer is an error.
        """

        async def prove(endpoint: Endpoint, left_s: float) -> Endpoint:
            await endpoint.prove(min(ATTEMPT_S, left_s))
            return endpoint

        deadline = asyncio.get_running_loop().time() + self.timeout_s
        failures = 0
        while True:
            endpoint = await self._repeat(prove, deadline)
            left_s = max(deadline - asyncio.get_running_loop().time(), 0.001)
            channel = endpoint.channel()
            endpoint.hold()
            try:
                return await endpoint.call(ask, left_s)
            except NoLeaderError:
                if asyncio.get_running_loop().time() >= deadline:
                    raise
                self.rotate(endpoint)
                failures += 1
            except UnavailableError as error:
                self.check_open()
                if error.retriable:
                    self.rotate(endpoint)
                raise
            finally:
                endpoint.release(channel)
            await self.back_off(failures)

    async def _repeat(
        self, attempt: Callable[[Endpoint, float], Coroutine[Any, Any, T]], deadline: float | None = None
    ) -> T:
        loop = asyncio.get_running_loop()
        if deadline is None:
            deadline = loop.time() + self.timeout_s
        failures = 0
        while True:
            endpoint = self.current
            began_at = loop.time()
            try:
                return await attempt(endpoint, max(deadline - began_at, 0.001))
            except asyncio.CancelledError:
                # Perhaps by a deadline of the caller's, shorter than the attempt's: the next call goes elsewhere.
                if loop.time() - began_at > _IMPATIENT_S:
                    endpoint.suspect()
                    self.rotate(endpoint)
                raise
            except UnavailableError as error:
                self.check_open()
                if not error.retriable or loop.time() >= deadline:
                    raise
            self.rotate(endpoint)
            failures += 1
            await self.back_off(failures)

    async def close(self) -> None:
        """Close all connections; everything under way fails."""
        self._closed = True
        for endpoint in self._endpoints:
            await endpoint.close()
