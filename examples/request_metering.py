"""Meter a web application's requests: middleware for any ASGI application, with no framework to depend on.

Every finished request becomes an event: one per customer, with route, method and status class as dimensions. The
request never waits for the meter: events gather in memory and leave in batches, from a task of their own.

    app = RequestMetering(app, ["localhost:7001"], account_of=customer_of_request)

Run it against a server (`tallymark dev`): python examples/request_metering.py [host:port]
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, MutableMapping
from typing import Any

from tallymark import (
    AggType,
    AlreadyExistsError,
    AsyncClient,
    DimensionFilter,
    Event,
    IngestError,
    MetricSchema,
    PeriodType,
    current_month,
)

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Coroutine[Any, Any, None]]

REQUESTS = MetricSchema(
    code="http_requests",
    agg_type=AggType.COUNT,
    period_type=PeriodType.CALENDAR,
    filters=[
        # The route's pattern, not the path: "/users/{id}" is one value, "/users/1", "/users/2", ... are many.
        DimensionFilter(key="route"),
        DimensionFilter(key="method", values=["GET", "POST", "PUT", "PATCH", "DELETE"]),
        DimensionFilter(key="status", values=["2xx", "3xx", "4xx", "5xx"]),
    ],
)

FLUSH_EVENTS = 500  # in one batch; waking the sender before its second is over
FLUSH_SECONDS = 1.0
PENDING_MAX = 100_000  # while the meter is away; requests beyond are counted in `n_lost`, never silently


class RequestMetering:
    """Counts the requests of an ASGI application.

    Args:
        app: the application.
        addresses: Tallymark gateways.
        account_of: whose request it is, by its scope; None for requests that nobody pays for.
    """

    def __init__(
        self, app: Application, addresses: list[str], *, account_of: Callable[[Scope], int | None]
    ) -> None:
        self.n_lost = 0
        self._app = app
        self._account_of = account_of
        self._client = AsyncClient(addresses)
        self._pending: list[Event] = []
        self._wake = asyncio.Event()
        self._stopping = False
        self._sender: asyncio.Task[None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application; count its request when it has been answered."""
        if scope["type"] == "lifespan":
            await self._app(scope, self._lifespan(receive), send)
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 500  # what a server answers with when the application raises

        async def watched(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            self._count(scope, status)

    def _count(self, scope: Scope, status: int) -> None:
        account_id = self._account_of(scope)
        if account_id is None:
            return
        if len(self._pending) >= PENDING_MAX:
            self.n_lost += 1
            return
        properties = {"method": scope["method"], "status": f"{status // 100}xx"}
        if (route := scope.get("route_pattern")) is not None:
            properties["route"] = route
        # The time of the request, not of the batch: a request of 23:59:59 belongs to the month that ends then.
        event = Event(
            account_id=account_id,
            metric_code=REQUESTS.code,
            timestamp=time.time_ns(),
            properties=properties,
        )
        self._pending.append(event)
        if len(self._pending) >= FLUSH_EVENTS:
            self._wake.set()

    def _lifespan(self, receive: Receive) -> Receive:
        """Start and stop with the application."""

        async def watched() -> MutableMapping[str, Any]:
            message = await receive()
            if message["type"] == "lifespan.startup":
                await self.start()
            elif message["type"] == "lifespan.shutdown":
                await self.stop()
            return message

        return watched

    async def start(self) -> None:
        """Connect, make sure that the metric exists, and begin to send."""
        await self._client.connect()
        try:
            await self._client.metrics.create(REQUESTS)
        except AlreadyExistsError as error:
            if not error.identical:
                raise
        self._sender = asyncio.create_task(self._send())

    async def stop(self) -> None:
        """Send what is left, and close."""
        self._stopping = True
        self._wake.set()
        if self._sender is not None:
            await self._sender
        await self._client.close()

    async def _send(self) -> None:
        while not (self._stopping and not self._pending):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(None if self._stopping else FLUSH_SECONDS):
                    await self._wake.wait()
            if not self._stopping:
                self._wake.clear()
            if not self._pending:
                continue
            batch = self._pending[:FLUSH_EVENTS]
            try:
                receipt = await self._client.ingest(batch)
            except IngestError as error:
                if self._stopping or not error.retriable:
                    self.n_lost += len(error.receipt.unknown) + len(error.receipt.not_stored)
                else:
                    # The same Event objects go out again in the next round, under the identity that the client
                    # gave them: those that were stored after all aren't counted twice.
                    continue
            else:
                for rejection in receipt.rejected:
                    print(f"not metered: {rejection.message}", file=sys.stderr)
            del self._pending[: len(batch)]


# ---------------------------------------------------------------- an application to try it with


async def shop(scope: Scope, receive: Receive, send: Send) -> None:
    """A small application: /users/{id} answers, /orders takes POST only, everything else is not found."""
    if scope["type"] == "lifespan":
        while (await receive())["type"] == "lifespan.startup":
            await send({"type": "lifespan.startup.complete"})
        await send({"type": "lifespan.shutdown.complete"})
        return
    path, method, status = scope["path"], scope["method"], 404
    if path.startswith("/users/"):
        scope["route_pattern"], status = "/users/{id}", 200
    elif path == "/orders":
        scope["route_pattern"], status = "/orders", 201 if method == "POST" else 405
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": b""})


def customer_of_request(scope: Scope) -> int | None:
    """The customer, from a header that a gateway in front has checked."""
    for name, value in scope["headers"]:
        if name == b"x-customer-id":
            return int(value)
    return None


async def serve(app: Application, requests: list[tuple[str, str, int | None]]) -> None:
    """Do what an ASGI server does: start the application, pass it requests, stop it."""
    messages: asyncio.Queue[MutableMapping[str, Any]] = asyncio.Queue()
    started = asyncio.Event()

    async def answer(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "lifespan.startup.complete":
            started.set()

    life = asyncio.create_task(app({"type": "lifespan"}, messages.get, answer))
    messages.put_nowait({"type": "lifespan.startup"})
    await started.wait()
    for method, path, customer in requests:
        headers = [] if customer is None else [(b"x-customer-id", str(customer).encode())]
        scope: Scope = {"type": "http", "method": method, "path": path, "headers": headers}
        await app(scope, messages.get, answer)
    messages.put_nowait({"type": "lifespan.shutdown"})
    await life


async def run(address: str) -> dict[tuple[str | None, str], int]:
    """Serve some requests, and return one customer's by route (None: no route matched) and status."""
    # New customers, so that another run starts from nothing, too.
    customer, another = secrets.randbits(63), secrets.randbits(63)
    app = RequestMetering(shop, [address], account_of=customer_of_request)
    requests: list[tuple[str, str, int | None]] = [("GET", f"/users/{n}", customer) for n in range(700)]
    requests += [("POST", "/orders", customer)] * 20 + [("GET", "/orders", customer)] * 3
    requests += [("GET", "/favicon.ico", customer)] * 2
    requests += [("GET", "/users/1", another)] * 5 + [("GET", "/users/1", None)] * 4
    await serve(app, requests)

    async with AsyncClient([address]) as client:
        usage = await client.query(customer, REQUESTS.code, current_month())
        print(f"customer {customer}: {usage.value.count} requests this month, {app.n_lost} lost")
        found: dict[tuple[str | None, str], int] = {}
        for row in await client.breakdown(
            customer, REQUESTS.code, current_month(), group_by=["route", "status"]
        ):
            # None where the property was missing: no route matched.
            route = None if row.group["route"] is None else str(row.group["route"])
            status = str(row.group["status"])
            found[route, status] = row.value.count
            print(f"  {route or '(no route)':<12} {status}  {row.value.count:>5}")
    return found


def main(address: str) -> dict[tuple[str | None, str], int]:
    """Run the example against the server at `address`."""
    return asyncio.run(run(address))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else os.environ.get("TALLYMARK_SERVER", "localhost:7001"))
