"""No room left, in the middle of everything: writes are refused as back-pressure, reads go on, nothing is lost.

The log's own limit can be tried everywhere. A disk that is really full is a small tmpfs, where mounting one is
allowed; elsewhere that test, too, makes do with the limit.
"""

import asyncio
import subprocess

import pytest
from ledger import ALWAYS
from server import WAIT_SECONDS_MAX, Server

from tallymark import (
    AggType,
    AsyncClient,
    BackpressureError,
    Event,
    MetricSchema,
    PeriodType,
    TallymarkError,
    UnavailableError,
)
from tallymark_protocol.errors import ErrorCode

pytestmark = pytest.mark.timeout(600)  # the first start compiles the kernels

MIB = 1024 * 1024
ACCOUNTS = 8
NOTES = {f"note-{n}": "x" * 1000 for n in range(15)}  # a call is over 100 KB
CALLS_MAX = 400
CALL_SECONDS = 0.5


class Filler:
    """Fills a server, and knows what it has taken.

    Attributes:
        stored: how many events it is known to have stored.
        open: the calls that were refused, at least in part.
    """

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self.stored = 0
        self.open: list[tuple[list[Event], int]] = []  # the call's events, and how many of them are stored

    async def fill(self) -> BackpressureError:
        """Send until the server takes no more, and a little longer; return its refusal."""
        refusals = 0
        for _ in range(CALLS_MAX):
            events = [Event(account_id=n, metric_code="fill", properties=NOTES) for n in range(ACCOUNTS)]
            try:
                self.stored += (await self._client.ingest(events, timeout=CALL_SECONDS)).n_stored
            except BackpressureError as error:
                self.stored += error.receipt.n_stored
                self.open.append((events, error.receipt.n_stored))
                refusals += 1
                if refusals == 3:
                    return error
            except (
                UnavailableError
            ) as error:  # a slow machine: it has what it has taken, and is asked again later
                self.stored += error.receipt.n_stored
                self.open.append((events, error.receipt.n_stored))
        raise AssertionError("it never filled up")

    async def check(self) -> None:
        """Check that reads go on, and count what was stored and no more than was sent."""
        open_ = sum(ACCOUNTS - stored for _, stored in self.open)
        count = 0
        for account in range(ACCOUNTS):
            totals = (await self._client.query(account, "fill", ALWAYS)).value
            running = (await self._client.query_realtime(account, "fill")).value
            listed = [event async for event in self._client.list_events(account, *ALWAYS)]
            assert totals.count == running.count == len(listed)
            count += totals.count
        assert self.stored <= count <= self.stored + open_

    async def finish(self) -> None:
        """Call again with the very same events, as callers do, until everything is stored."""
        async with asyncio.timeout(WAIT_SECONDS_MAX):
            while self.open:
                events, before = self.open[0]
                refusal: TallymarkError | None = None
                try:
                    receipt = await self._client.ingest(events, timeout=CALL_SECONDS)
                except (BackpressureError, UnavailableError) as error:
                    refusal = error
                if refusal is not None:
                    # No room yet; or, after a restart, no connection yet: the client was backing off.
                    assert refusal.retriable
                    continue
                assert receipt.n_stored == ACCOUNTS
                self.stored += ACCOUNTS - before
                self.open.pop(0)


async def create_metric(client: AsyncClient) -> None:
    """Create what is counted."""
    await client.metrics.create(
        MetricSchema(code="fill", agg_type=AggType.COUNT, period_type=PeriodType.LIFETIME)
    )


async def test_the_log_at_its_limit(server):
    """A log as large as it may be: the same through a kill; with a higher limit everything goes on."""
    server.environment["TALLYMARK_LOG_BYTES_MAX"] = str(3 * MIB)
    await server.start()
    async with AsyncClient([server.address]) as client:
        await create_metric(client)
        filler = Filler(client)
        refusal = await filler.fill()
        assert refusal.code == ErrorCode.DISK_FULL
        assert refusal.retriable
        assert (await server.status()).log_full
        await filler.check()
        digests = await server.check_digests()
        server.kill()
        await server.start()
        await filler.check()
        assert (await server.check_digests())[0] == digests[0]
        server.kill()
        server.environment["TALLYMARK_LOG_BYTES_MAX"] = str(6 * MIB)
        await server.start()
        await filler.finish()
        await filler.check()
    await server.check_digests()
    assert await server.stop() == 0


class Tmpfs:
    """A small file system with a file that takes half of it."""

    def __init__(self, folder) -> None:
        self.folder = folder
        self.filler = folder / "filler"

    def mount(self) -> bool:
        """Mount it; whether that was allowed."""
        self.folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", "size=12m", "tallymark-test", str(self.folder)]
        try:
            allowed = subprocess.run(command, capture_output=True).returncode == 0
        except FileNotFoundError:
            allowed = False
        if allowed:
            self.filler.write_bytes(bytes(5 * MIB))
        return allowed

    def unmount(self) -> None:
        """Unmount it."""
        subprocess.run(["umount", str(self.folder)], check=True, capture_output=True)


@pytest.fixture
def small(tmp_path):
    """A server on a small file system, and how to make room there; None where there can be none."""
    disk = Tmpfs(tmp_path / "small")
    mounted = disk.mount()
    server = Server(disk.folder / "data", log=tmp_path / "server.log")
    yield server, disk.filler.unlink if mounted else None
    server.kill()
    if mounted:
        disk.unmount()


async def test_a_full_disk(small):
    """A disk without room: writes go on by themselves as soon as there is some, without a restart."""
    server, make_room = small
    if make_room is None:
        server.environment["TALLYMARK_LOG_BYTES_MAX"] = str(3 * MIB)
    await server.start()
    async with AsyncClient([server.address]) as client:
        await create_metric(client)
        filler = Filler(client)
        refusal = await filler.fill()
        assert refusal.code == ErrorCode.DISK_FULL
        await filler.check()
        await server.check_digests()
        if make_room is None:
            server.kill()
            del server.environment["TALLYMARK_LOG_BYTES_MAX"]
            await server.start()
        else:
            make_room()
        await filler.finish()
        await filler.check()
        digests = await server.check_digests()
        server.kill()
        await server.start()
        await filler.check()
    assert len(digests) == len(await server.check_digests())


async def test_killed_on_a_full_disk(small):
    """A start on a full disk serves at least reads, and loses nothing; with room, everything goes on."""
    server, make_room = small
    if make_room is None:
        server.environment["TALLYMARK_LOG_BYTES_MAX"] = str(3 * MIB)
    await server.start()
    async with AsyncClient([server.address]) as client:
        await create_metric(client)
        filler = Filler(client)
        await filler.fill()
        server.kill()
        await server.start()
        await filler.check()
        if make_room is None:
            server.kill()
            del server.environment["TALLYMARK_LOG_BYTES_MAX"]
            await server.start()
        else:
            make_room()
        await filler.finish()
        await filler.check()
    await server.check_digests()
