"""The HTTP endpoint for machines that watch this one: `/metrics`, `/healthz`, `/readyz`.

Owns the sockets and nothing that is told on them. The protocol is h11's, a sans-I/O HTTP/1.1 that is strict about
what it takes; this is the shell, and everything about it is bounded: one request a connection, a few kilobytes long,
without a body, done within one deadline that covers reading, answering and closing, on a limited number of
connections. So neither garbage nor slowness costs more than one small object for some seconds.

    GET /metrics    200  telemetry, in Prometheus's text format
    GET /healthz    200 while the process is alive, else 503 and why: it should be started again
    GET /readyz     200 while the process serves, else 503 and why: send it no traffic

It runs on the role's own event loop: a loop that is stuck doesn't answer, and that is the truth about it. There is
no authentication: listen on an address that only the monitoring reaches.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final, cast

import h11

from tallymark_runtime.framing import join_address, split_address
from tallymark_runtime.readiness import Readiness
from tallymark_runtime.telemetry import CONTENT_TYPE, Telemetry

_log = logging.getLogger(__name__)

CONNECTIONS_MAX: Final = 64
REQUEST_BYTES_MAX: Final = 8 * 1024
DISCARDED_BYTES_MAX: Final = 256 * 1024  # of what comes after the request, read only to close in peace
DEADLINE_S: Final = 10.0  # of a connection, from its first byte to its end
_TEXT: Final = "text/plain; charset=utf-8"
_REASONS: Final = {
    200: b"OK",
    400: b"Bad Request",
    404: b"Not Found",
    405: b"Method Not Allowed",
    431: b"Request Header Fields Too Large",
    500: b"Internal Server Error",
    503: b"Service Unavailable",
}


class Endpoint:
    """The endpoint; `start` it, `close` it.

    Args:
        telemetry: answers /metrics.
        readiness: answers the other two.
        deadline_s: of a connection.
        connections_max: more are cut off at once.

    Attributes:
        address: "host:port" it listens on.
        connections: that stand now.
    """

    def __init__(
        self,
        telemetry: Telemetry,
        readiness: Readiness,
        *,
        deadline_s: float = DEADLINE_S,
        connections_max: int = CONNECTIONS_MAX,
    ) -> None:
        self.address = ""
        self.connections: set[_Connection] = set()
        self.deadline_s = deadline_s
        self.connections_max = connections_max
        self._telemetry = telemetry
        self._readiness = readiness
        self._server: asyncio.Server | None = None

    async def start(self, address: str) -> str:
        """Listen on "host:port" (port 0 takes a free one); return it with the real port.

        Raises:
            OSError: the address can't be listened on.
        """
        host, port = split_address(address)
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Connection(self, loop), host, port, backlog=128)
        self.address = join_address(host, self._server.sockets[0].getsockname()[1])
        return self.address

    async def close(self) -> None:
        """Stop listening and cut what stands."""
        if self._server is None:
            return
        self._server.close()
        for connection in list(self.connections):
            connection.abort()
        await self._server.wait_closed()

    def answer(self, path: bytes) -> tuple[int, str, bytes]:
        """What a GET of `path` is answered: status, content type, body."""
        routes: dict[bytes, Callable[[], tuple[int, str, bytes]]] = {
            b"/metrics": lambda: (200, CONTENT_TYPE, self._telemetry.text()),
            b"/healthz": lambda: _health(self._readiness.failures(), "alive"),
            b"/readyz": lambda: _health(self._readiness.problems(), "ready"),
        }
        route = routes.get(path)
        if route is None:
            return 404, _TEXT, b"there are /metrics, /healthz and /readyz\n"
        try:
            return route()
        except Exception:
            # What is broken here must not look like a machine that can't be reached.
            _log.exception("a request for %r could not be answered", path)
            return 500, _TEXT, b"internal error\n"


def _health(problems: list[str], good: str) -> tuple[int, str, bytes]:
    lines = problems or [good]
    text = "".join(line.replace("\n", " ") + "\n" for line in lines)
    return 503 if problems else 200, _TEXT, text.encode("utf-8", "backslashreplace")


class _Connection(asyncio.Protocol):
    """One connection: one request, one answer, the end."""

    def __init__(self, endpoint: Endpoint, loop: asyncio.AbstractEventLoop) -> None:
        self._endpoint = endpoint
        self._loop = loop
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=REQUEST_BYTES_MAX)
        self._transport: asyncio.Transport | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._received = 0
        self._answered = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Asyncio: connected."""
        self._transport = transport = cast("asyncio.Transport", transport)  # uvloop's is no subclass
        endpoint = self._endpoint
        if len(endpoint.connections) >= endpoint.connections_max:
            transport.abort()
            return
        endpoint.connections.add(self)
        self._deadline = self._loop.call_later(endpoint.deadline_s, self.abort)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        """Asyncio: the connection is gone."""
        self._endpoint.connections.discard(self)
        if self._deadline is not None:
            self._deadline.cancel()

    def data_received(self, data: bytes) -> None:
        """Asyncio: bytes came."""
        self._received += len(data)
        if self._answered:
            if self._received > DISCARDED_BYTES_MAX:
                self.abort()
            return
        if self._received > REQUEST_BYTES_MAX:
            self._answer(431, _TEXT, b"the request is too long\n")
            return
        try:
            self._http.receive_data(data)
            event = self._http.next_event()
        except h11.RemoteProtocolError as error:
            status = error.error_status_hint
            self._answer(status if status in _REASONS else 400, _TEXT, b"this is no request of HTTP/1.1\n")
            return
        if isinstance(event, h11.Request):
            self._on_request(event)

    def eof_received(self) -> bool:
        """Asyncio: the other side sends no more. It may still read its answer; the transport closes after that."""
        return False

    def abort(self) -> None:
        """Cut the connection."""
        if self._transport is not None:
            self._transport.abort()

    def _on_request(self, request: h11.Request) -> None:
        if request.method not in {b"GET", b"HEAD"}:
            self._answer(405, _TEXT, b"only GET and HEAD are answered\n")
            return
        path = request.target.partition(b"?")[0]
        self._answer(*self._endpoint.answer(path), with_body=request.method == b"GET")

    def _answer(self, status: int, content_type: str, body: bytes, *, with_body: bool = True) -> None:
        """Send the only answer, then the end of our side; the other side closes, or the deadline does."""
        assert self._transport is not None, "an answer has a connection"
        assert not self._answered, "there is one answer"
        self._answered = True
        headers = [
            ("Content-Type", content_type),
            ("Content-Length", str(len(body))),
            ("Cache-Control", "no-store"),
            ("Connection", "close"),
        ]
        if status == 405:
            headers.append(("Allow", "GET, HEAD"))
        head = self._http.send(h11.Response(status_code=status, headers=headers, reason=_REASONS[status]))
        assert head is not None, "a response has a head"
        self._transport.write(head + body if with_body else head)
        # Not close(): with bytes of the request still unread that would reset the connection, and the answer might
        # be lost with it.
        if self._transport.can_write_eof():
            self._transport.write_eof()
        else:
            self._transport.close()
