"""Enforce a hard cap: a small web API that stops serving an account when its alert arrives, until the next period.

Every request is counted as usage; the metric has a threshold at the cap. The API subscribes to alerts and keeps who is
over the cap in memory, so a request costs one look into a dictionary and no query. The cache and the subscription's
offsets are saved together: after a restart, accounts are blocked from the first request on, and what was raised
meanwhile is read before serving. Each alert may come twice, and blocking twice is blocking.

An alert takes milliseconds from the event that crosses, and what is served in that time is served beyond the cap. While
the server can't be reached, no alert comes, and the API goes on serving: it prefers that to refusing paying customers.

Run it against a server (`tallymark dev`): python examples/enforcement.py [host:port]
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import json
import os
import secrets
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from aiohttp import ClientSession, web

from tallymark import (
    Alert,
    AlertThreshold,
    AlreadyExistsError,
    AsyncClient,
    Event,
    MetricSchema,
    PeriodType,
)

CAP = 5
METRIC = MetricSchema(
    code="capped_calls",
    period_type=PeriodType.DAY,
    thresholds=[AlertThreshold(code="hard_cap", value=CAP)],
)
Clock = Callable[[], dt.datetime]


class Gate:
    """Who is over the cap, and until when; with the offsets of the alerts that it knows of, in a file."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._until: dict[int, dt.datetime] = {}  # by account: the end of the period whose cap it has reached
        self.offsets: dict[str, int] = {}  # none: from the first alert on
        with contextlib.suppress(FileNotFoundError):
            saved = json.loads(file.read_text())
            self.offsets = saved["offsets"]
            self._until = {int(key): dt.datetime.fromisoformat(text) for key, text in saved["until"].items()}

    def blocked_until(self, account: int, now: dt.datetime) -> dt.datetime | None:
        """When the account is served again; None: it is served now."""
        until = self._until.get(account)
        return until if until is not None and now < until else None

    def apply(self, alert: Alert) -> None:
        """Block an account until its period ends. Twice the same does nothing more."""
        if alert.threshold_code == "hard_cap":
            known = self._until.get(alert.account_id, alert.period.end)
            # The alert of a late event, for a period long gone, must not free an account that is blocked now.
            self._until[alert.account_id] = max(known, alert.period.end)

    def save(self, offsets: dict[str, int], now: dt.datetime) -> None:
        """Write it down, whole or not at all, without what is over."""
        self._until = {account: until for account, until in self._until.items() if now < until}
        until = {str(account): moment.isoformat() for account, moment in self._until.items()}
        draft = self._file.with_suffix(".tmp")
        draft.write_text(json.dumps({"offsets": offsets, "until": until}))
        draft.replace(self._file)
        self.offsets = offsets


async def catch_up(client: AsyncClient, gate: Gate, clock: Clock) -> None:
    """Read all alerts that there are: afterwards the gate knows everybody who is over the cap."""
    more = True
    while more:
        page = await client.list_alerts(metric_code=METRIC.code, since=gate.offsets)
        for alert in page:
            gate.apply(alert)
        gate.save({str(partition): position for partition, position in page.next.items()}, clock())
        more = page.more


async def follow(client: AsyncClient, gate: Gate, clock: Clock) -> None:
    """Go on from there, without a gap, for as long as the API runs."""
    async with client.alerts.subscribe(metric_codes=METRIC.code, since=gate.offsets) as sub:
        async for alert in sub:
            gate.apply(alert)
            gate.save(sub.offsets(), clock())  # covers the alerts before this one; this one may come again


@contextlib.asynccontextmanager
async def api(client: AsyncClient, gate: Gate, clock: Clock) -> AsyncIterator[str]:
    """Serve on a free port of loopback; yields the URL."""

    async def work(request: web.Request) -> web.Response:
        account = int(request.headers["X-Account"])
        now = clock()
        until = gate.blocked_until(account, now)
        if until is not None:
            seconds = int((until - now).total_seconds()) + 1
            return web.Response(status=429, text="over the cap\n", headers={"Retry-After": str(seconds)})
        if following.done():  # it only ends by an error that can't pass
            return web.Response(status=503, text="enforcement has failed\n")
        receipt = await client.ingest(Event(account, METRIC.code, timestamp=now))
        return web.Response(status=200 if receipt.ok else 500, text="done\n")

    await catch_up(client, gate, clock)
    following = asyncio.create_task(follow(client, gate, clock))
    app = web.Application()
    app.router.add_get("/work", work)
    runner = web.AppRunner(app, handle_signals=False)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        yield f"http://{host}:{port}/work"
    finally:
        await runner.cleanup()
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)


async def call(url: str, account: int) -> int:
    """Make a request as an account; returns the status."""
    async with ClientSession() as session, session.get(url, headers={"X-Account": str(account)}) as response:
        return response.status


async def blocked(gate: Gate, account: int, clock: Clock) -> None:
    """Wait until the account's alert has arrived."""
    async with asyncio.timeout(30):
        while gate.blocked_until(account, clock()) is None:  # noqa: ASYNC110  # a demonstration may look often
            await asyncio.sleep(0.002)


async def demonstrate(address: str, folder: Path, midnight: dt.datetime) -> dict[str, list[int]]:
    """Run two accounts into the cap, across a restart of the API, and into the next period."""
    # The API lives yesterday, so that the next period is today. (A real one uses the time that it is.)
    times = [midnight - dt.timedelta(hours=12)]
    first, second = (
        secrets.randbits(63),
        secrets.randbits(63),
    )  # another run has others: it starts from nothing
    found: dict[str, list[int]] = {}

    def clock() -> dt.datetime:
        return times[-1]

    async with AsyncClient([address]) as client:
        try:
            await client.metrics.create(METRIC)
        except AlreadyExistsError as error:
            if not error.identical:
                raise
        gate = Gate(folder / "enforcement.json")
        async with api(client, gate, clock) as url:
            found["below the cap"] = [await call(url, first) for _ in range(CAP)]
            await blocked(gate, first, clock)
            found["at the cap"] = [await call(url, first), await call(url, second)]
        # While the API is down, the other account comes to its cap as well.
        await client.ingest([Event(second, METRIC.code, timestamp=clock()) for _ in range(CAP)])
        gate = Gate(folder / "enforcement.json")
        async with api(client, gate, clock) as url:
            found["after a restart"] = [await call(url, first), await call(url, second)]
            times.append(midnight)
            found["next period"] = [await call(url, first), await call(url, second)]
    return found


def main(address: str) -> dict[str, list[int]]:
    """Run the example against the server at `address`; return the statuses that it prints."""
    midnight = dt.datetime.fromtimestamp(time.time_ns() // 10**9 // 86_400 * 86_400, dt.UTC)
    with tempfile.TemporaryDirectory() as folder:
        found = asyncio.run(demonstrate(address, Path(folder), midnight))
    for when, statuses in found.items():
        print(f"{when + ':':<17}{statuses}")
    return found


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else os.environ.get("TALLYMARK_SERVER", "localhost:7001"))
