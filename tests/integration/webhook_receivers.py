"""Endpoints of webhooks on a loopback address: good ones, and such as fail in every way."""

import asyncio
import json
import random

import standardwebhooks
from aiohttp import web

HANG_SECONDS = 60.0  # longer than anybody waits


class Receiver:
    """One endpoint. What it has acknowledged is in `acknowledged`, what ever came in `seen`.

    Args:
        kind: what it does to a request that it doesn't take: "good" takes all, "500" answers so, "reset" breaks the
            connection, "hang" doesn't answer, "mixed" does any of these.
        share: of the requests that it doesn't take.
        hangs_max: how many it leaves without an answer, in all: each costs the sender its timeout.
    """

    def __init__(self, kind: str, secret: str, seed: int, *, share: float = 0.3, hangs_max: int = 3) -> None:
        self.kind = kind
        self.secret = secret
        self.acknowledged: dict[str, dict] = {}  # by the message's id
        self.seen = 0
        self.faults = 0
        self._rng = random.Random(seed)
        self._share = share
        self._hangs_left = hangs_max

    async def handle(self, request: web.Request) -> web.Response:
        """Take an alert, or not."""
        body = await request.read()
        self.seen += 1
        # Raises where the signature, or its time, isn't right: the sender would be told 500.
        standardwebhooks.Webhook(self.secret).verify(body, dict(request.headers))
        kind = self._rng.choice(("500", "reset", "hang")) if self.kind == "mixed" else self.kind
        if kind != "good" and self._rng.random() < self._share:
            self.faults += 1
            if kind == "reset":
                assert request.transport is not None
                request.transport.abort()
                await asyncio.sleep(0)
            elif kind == "hang" and self._hangs_left:
                self._hangs_left -= 1
                await asyncio.sleep(HANG_SECONDS)
            return web.Response(status=500)
        message = json.loads(body)
        assert message["type"] == "alert.raised"
        assert message["data"]["id"] == request.headers["webhook-id"]
        self.acknowledged[request.headers["webhook-id"]] = message["data"]
        return web.Response(status=204)


class Receivers:
    """A web server with an endpoint for each receiver, at `url(name)`."""

    def __init__(self, host: str, port: int, receivers: dict[str, Receiver]) -> None:
        self._host, self._port = host, port
        self._receivers = receivers
        self._runner: web.AppRunner | None = None

    def url(self, name: str) -> str:
        """Where alerts are posted for a receiver."""
        return f"http://{self._host}:{self._port}/{name}"

    async def start(self) -> None:
        """Listen."""
        app = web.Application()
        for name, receiver in self._receivers.items():
            app.router.add_post(f"/{name}", receiver.handle)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, self._host, self._port, reuse_address=True).start()

    async def close(self) -> None:
        """Stop at once: nobody gets an answer any more."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None
