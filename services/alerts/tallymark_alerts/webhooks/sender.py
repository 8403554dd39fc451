"""Posting to an endpoint over HTTP: bounded in time, bytes and connections, and only to addresses that were checked.

Each webhook has a client session of its own, so that no endpoint can use up another's connections. A host's name is
looked up for each connection; all of its addresses must be public, and the socket is made only for an address that is
checked once more at that moment (`socket_factory`): there is no second lookup in which the name could lead elsewhere.
Certificates are verified by the system's authorities. Redirects are not followed, cookies and proxies not used.

Lookups run in threads (the C library's wait for seconds where a name server is silent). The event loop's own pool is
small, and other parts of the process need it; so lookups have threads of their own, in two groups: names whose last
lookup was slow or failed queue for a few, so that they can't take those of the others.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable
from typing import Any, Final

import aiohttp
import yarl
from aiohttp.abc import AbstractResolver, ResolveResult

from tallymark_alerts.webhooks.addresses import is_public
from tallymark_alerts.webhooks.schedule import Outcome, OutcomeKind, failure, outcome_of_status

TIMEOUT_S: Final = 15.0  # of an attempt, from the lookup to the status
_BODY_S: Final = 1.0  # what the rest of an answer may take; the status has said everything
_BODY_BYTES_MAX: Final = 64 * 1024  # of an answer that are read to keep its connection
_KEEPALIVE_S: Final = 4.0  # less than servers commonly have: they should not close while a message is sent
_LOOKUPS_MAX: Final = 32
_SUSPECT_LOOKUPS_MAX: Final = 8
_SLOW_S: Final = 1.0

AddressInfo = tuple[Any, Any, Any, Any, Any]  # what getaddrinfo gives
Lookup = Callable[[str, int], list[AddressInfo]]


class AddressRefusedError(OSError):
    """An address that may not be connected to."""


def system_lookup(host: str, port: int) -> list[AddressInfo]:
    """Ask the system's resolver; blocks. Raises OSError."""
    return list(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))


class Lookups:
    """Looks hosts up in threads, for all webhooks of a process. Use it on one event loop."""

    def __init__(self, lookup: Lookup = system_lookup) -> None:
        self._lookup = lookup
        self._slots = asyncio.Semaphore(_LOOKUPS_MAX)
        self._suspect_slots = asyncio.Semaphore(_SUSPECT_LOOKUPS_MAX)

    async def find(self, host: str, port: int, *, is_suspect: bool) -> list[AddressInfo]:
        """The addresses of a host. A slot is taken until the lookup has ended, however early its caller gives up."""
        slots = self._suspect_slots if is_suspect else self._slots
        await slots.acquire()
        loop = asyncio.get_running_loop()
        future: asyncio.Future[list[AddressInfo]] = loop.create_future()

        def settle(found: list[AddressInfo], error: Exception | None) -> None:
            slots.release()
            if future.done():
                return
            if error is None:
                future.set_result(found)
            else:
                future.set_exception(error)

        def work() -> None:
            found: list[AddressInfo] = []
            error: Exception | None = None
            try:
                found = self._lookup(host, port)
            except Exception as raised:  # whatever it is: the slot must come back
                error = raised
            with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
                loop.call_soon_threadsafe(settle, found, error)

        # A daemon: a name server that never answers must not keep the process from ending.
        try:
            threading.Thread(target=work, name="webhook-lookup", daemon=True).start()
        except BaseException:  # no thread can be had now: there will be no `settle`
            slots.release()
            raise
        return await future


class _Resolver(AbstractResolver):
    """Looks up the one host of a webhook."""

    def __init__(self, lookups: Lookups, *, allow_private: bool) -> None:
        self._lookups = lookups
        self._allow_private = allow_private
        self._is_suspect = False

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        loop = asyncio.get_running_loop()
        began = loop.time()
        was_suspect, self._is_suspect = self._is_suspect, True
        found = await self._lookups.find(host, port, is_suspect=was_suspect)
        self._is_suspect = loop.time() - began > _SLOW_S
        results: list[ResolveResult] = []
        for kind, _, proto, _, address in found:
            if family not in (socket.AF_UNSPEC, kind) or kind not in (socket.AF_INET, socket.AF_INET6):
                continue
            ip = address[0]
            if kind == socket.AF_INET6 and len(address) > 3 and address[3] and "%" not in ip:
                ip = f"{ip}%{address[3]}"
            check_address(ip, allow_private=self._allow_private)
            results.append(
                ResolveResult(
                    hostname=host,
                    host=ip,
                    port=port,
                    family=kind,
                    proto=proto,
                    flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
                )
            )
        if not results:
            raise OSError(f"{host} has no address")
        return results

    async def close(self) -> None:
        """Nothing is held."""


def check_address(address: str, *, allow_private: bool) -> None:
    """Refuse an address that isn't public.

    Raises:
        AddressRefusedError: it isn't.
    """
    if not allow_private and not is_public(address):
        raise AddressRefusedError(f"the address {address} is not public")


class _Attempt:
    """What is noted of one request while it runs."""

    __slots__ = ("is_reused",)

    def __init__(self) -> None:
        self.is_reused = False  # it went over a connection that had been used before


async def _on_reuse(session: aiohttp.ClientSession, context: Any, params: Any) -> None:  # noqa: ARG001
    context.trace_request_ctx.is_reused = True


class HttpSender:
    """Posts to one URL. `close` it.

    Args:
        url: checked before.
        lookups: of the process.
        allow_private: connect to any address.
        connections: at most so many at a time.
        timeout_s: of an attempt.
    """

    def __init__(
        self,
        url: str,
        lookups: Lookups,
        *,
        allow_private: bool,
        connections: int,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self._url = yarl.URL(url)
        self._lookups = lookups
        self._allow_private = allow_private
        self._connections = connections
        self._timeout_s = timeout_s
        self._session: aiohttp.ClientSession | None = None  # made when it is first needed

    async def post(self, headers: dict[str, str], body: bytes) -> Outcome:
        """Post a body once; whatever goes wrong is an outcome."""
        try:
            async with asyncio.timeout(self._timeout_s) as deadline:
                attempt = _Attempt()
                try:
                    return await self._post(headers, body, attempt, deadline)
                except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError, ConnectionError):
                    if not attempt.is_reused:
                        raise
                # The endpoint closed a connection that had been idle, at the moment it was to be used again.
                return await self._post(headers, body, _Attempt(), deadline)
        except TimeoutError:
            return failure(OutcomeKind.TIMEOUT, f"no answer within {self._timeout_s:g} s")
        except aiohttp.ClientConnectorCertificateError as error:
            return failure(OutcomeKind.CONNECTION, f"its certificate is not valid: {error.certificate_error}")
        except (aiohttp.ClientError, OSError, ValueError, RuntimeError) as error:
            refused = _refusal_in(error)
            if refused is not None:
                return failure(OutcomeKind.ADDRESS, str(refused))
            return failure(OutcomeKind.CONNECTION, f"{type(error).__name__}: {error}")

    async def _post(
        self, headers: dict[str, str], body: bytes, attempt: _Attempt, deadline: asyncio.Timeout
    ) -> Outcome:
        request = self._opened().post(
            self._url, data=body, headers=headers, allow_redirects=False, trace_request_ctx=attempt
        )
        async with request as response:
            deadline.reschedule(None)  # the answer is there: what follows of it has a bound of its own
            outcome = outcome_of_status(response.status)
            if not await _is_read_to_end(response):
                response.close()
            return outcome

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is not None:
            return self._session
        trace = aiohttp.TraceConfig()
        trace.on_connection_reuseconn.append(_on_reuse)
        connector = aiohttp.TCPConnector(
            limit=self._connections,
            use_dns_cache=False,
            resolver=_Resolver(self._lookups, allow_private=self._allow_private),
            keepalive_timeout=_KEEPALIVE_S,
            socket_factory=self._make_socket,
        )
        self._session = aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=False,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=None),  # ours is around all of it
            trace_configs=[trace],
        )
        return self._session

    def _make_socket(self, info: AddressInfo) -> socket.socket:
        """Make the socket for an address that is about to be connected to; the last place to refuse it."""
        family, kind, proto, _, address = info
        check_address(str(address[0]), allow_private=self._allow_private)
        return socket.socket(family, kind, proto)

    async def close(self) -> None:
        """Close its connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None


async def _is_read_to_end(response: aiohttp.ClientResponse) -> bool:
    """Whether an answer's body ends within bounds: only then its connection can be used again."""
    left = _BODY_BYTES_MAX
    try:
        async with asyncio.timeout(_BODY_S):
            async for chunk in response.content.iter_any():
                left -= len(chunk)
                if left < 0:
                    return False
    except TimeoutError:
        return False
    except (aiohttp.ClientError, OSError):
        return False
    return True


def _refusal_in(error: BaseException) -> AddressRefusedError | None:
    """The refusal that an error comes from, through whatever wrapped it."""
    seen: set[int] = set()
    queue: list[BaseException | None] = [error]
    while queue:
        one = queue.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, AddressRefusedError):
            return one
        queue += [one.__cause__, one.__context__, getattr(one, "os_error", None)]
    return None
