"""`kill -9` of a real server at random moments, under load: what was acknowledged is there, once, and nothing else."""

import asyncio
import contextlib
import functools
import random
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from ledger import Ledger, Load, Repeater, create_metrics
from server import Server, wait_until

from tallymark import AsyncClient

pytestmark = pytest.mark.timeout(600)  # the first start compiles the kernels

PARKED_SECONDS = 0.25  # a call's timeout, so that a death is the caller's to survive
RIDING_SECONDS = 60.0  # so that the SDK survives it by itself


class Trial:
    """A server with a load and a ledger, and its deaths."""

    def __init__(self, server: Server, seed: int) -> None:
        self.server = server
        self.rng = random.Random(seed)
        self.ledger = Ledger(seed)
        self.load: Load
        self.repeater = Repeater(server, self.ledger)

    @contextlib.asynccontextmanager
    async def running(self):
        """Start everything; in the end stop the server in peace."""
        await self.server.start()
        async with AsyncClient([self.server.address]) as client:
            await create_metrics(client)
        self.load = Load(self.server.address, self.ledger)
        async with self.load.running():
            yield self
        assert await self.server.stop() == 0

    async def check(self, *, settled: bool) -> None:
        """Compare everything that the server says with the ledger."""
        async with AsyncClient([self.server.address]) as client:
            await self.ledger.check(client, settled=settled)

    async def die(self, moment: Callable[[], Awaitable[object]], *, riding: bool) -> None:
        """Send; kill the server at a moment; start it again; compare."""
        self.load.timeout = RIDING_SECONDS if riding else PARKED_SECONDS
        self.load.resume()
        sending = asyncio.create_task(self.repeater.send())
        await moment()
        self.server.kill()
        await sending
        if not riding:
            await self.load.pause()
        await self.server.start()
        if not riding:
            # Before anyone has repeated anything: what was open may be there, what was acknowledged must be.
            await self.check(settled=False)
        await self.load.settle()
        await self.repeater.repeat()
        await self.check(settled=True)
        await self.server.check_digests()

    async def after_acknowledgements(self) -> None:
        """A moment: anywhere between two answers."""
        await self.load.wait_acknowledged(self.rng.randrange(400))


@pytest.mark.parametrize("seed", [1, 2])
async def test_kill_under_load(server, seed):
    """Killed anywhere between two answers, with callers that wait and callers that come back."""
    async with Trial(server, seed).running() as trial:
        for round_ in range(6):
            await trial.die(trial.after_acknowledgements, riding=round_ % 3 == 2)
        assert trial.load.failures, "some caller saw the server die"


async def test_kill_while_files_are_written(server):
    """Killed at each step of a checkpoint, and while a segment is prepared."""
    files = [
        "checkpoints/p-*/state-*",
        "checkpoints/p-*/ids-*",
        "checkpoints/p-*/MANIFEST.new",
        "checkpoints/wal-start.new",
        "wal/*.tmp",
    ]
    async with Trial(server, 3).running() as trial:
        for steps, name in enumerate(files):
            pattern = f"{server.data}/store/{name}"
            await trial.die(functools.partial(server.die_writing, pattern, steps), riding=False)


async def test_kill_while_archiving(server):
    """Killed at each step of archiving, merging and dropping the log: raw events are read from what is left."""
    server.environment |= {
        "TALLYMARK_ARCHIVE": "on",
        "TALLYMARK_ARCHIVE_EVENTS": "20",
        "TALLYMARK_ARCHIVE_INTERVAL_SECONDS": "0.05",
    }
    files = [
        "archive/p-*/events-*",
        "archive/p-*/MANIFEST.json.new",
        "archive/p-*/MANIFEST.json.new",
        "checkpoints/wal-start.new",
        "checkpoints/wal-start.new",
        "wal/*.tmp",
    ]
    async with Trial(server, 7).running() as trial:
        for round_, name in enumerate(files):
            pattern = f"{server.data}/store/{name}"
            steps = 3 * round_ + trial.rng.randrange(3)
            await trial.die(functools.partial(server.die_writing, pattern, steps), riding=False)
        for _ in range(3):
            await trial.die(trial.after_acknowledgements, riding=False)
        assert server.recycled, "some log was dropped"


async def test_kill_while_ids_are_spilled(server):
    """Killed at any step of writing, spilling and merging files of ids, with no memory for ids: all are remembered.

    A process with memory for all of them then comes to the same state.
    """
    server.environment["TALLYMARK_MEMORY_BYTES"] = "4"
    async with Trial(server, 7).running() as trial:
        for steps, name in enumerate(("ids-*", "ids-*", "ids-*", "MANIFEST.new", "MANIFEST.new")):
            pattern = f"{server.data}/store/checkpoints/p-*/{name}"
            moment = functools.partial(server.die_writing, pattern, 7 * steps)
            await trial.die(moment, riding=False)
        digests = await server.check_digests()
        server.kill()
        server.environment["TALLYMARK_MEMORY_BYTES"] = "-1"
        await server.start()
        assert await server.check_digests() == digests
        await trial.repeater.repeat()
        await trial.check(settled=True)


async def test_kill_while_starting(server):
    """Killed while it starts, over and over, then started: recovery can be interrupted anywhere."""
    async with Trial(server, 4).running() as trial:
        await trial.die(trial.after_acknowledgements, riding=False)
        for _ in range(2):
            server.kill()
            for _ in range(4):
                await begin_recovery(server)
                # The whole of recovery and of taking the leadership is some tens of milliseconds.
                await asyncio.sleep(trial.rng.uniform(0, 0.08))
                server.kill()
            await server.start()
            await trial.check(settled=True)
            await trial.repeater.repeat()
            await server.check_digests()


async def begin_recovery(server: Server) -> None:
    """Begin a start, and return once the process has opened its data directory."""
    server.spawn()

    def opened() -> bool:
        with contextlib.suppress(FileNotFoundError):
            for link in _descriptors(server.pid):
                if link.startswith(str(server.data)):
                    return True
        return not server.alive

    assert await wait_until(opened)
    assert server.alive


def _descriptors(pid: int) -> list[str]:
    links = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            links.append(str(entry.readlink()))
    return links


async def test_kill_when_idle(server):
    """Killed when everything has been answered, right after the answer or later: nothing at all changes."""
    async with Trial(server, 5).running() as trial:
        await trial.die(trial.after_acknowledgements, riding=True)
        for _ in range(4):
            trial.load.resume()
            await trial.load.wait_acknowledged(100)
            await trial.load.settle()
            if trial.rng.random() < 0.5:
                digests = await server.check_digests()
                server.kill()
                await server.start()
                assert await server.check_digests() == digests
            else:
                server.kill()
                await server.start()
            await trial.check(settled=True)
            await trial.repeater.repeat()


async def test_stop_under_load(server):
    """SIGTERM under load: status 0, soon, and nothing that was acknowledged is lost."""
    async with Trial(server, 6).running() as trial:
        for riding in (False, True):
            trial.load.timeout = RIDING_SECONDS if riding else PARKED_SECONDS
            trial.load.resume()
            await trial.load.wait_acknowledged(200)
            assert await server.stop() == 0
            if not riding:
                await trial.load.pause()
            await server.start()
            if not riding:
                await trial.check(settled=False)
            await trial.load.settle()
            await trial.check(settled=True)
            await server.check_digests()
