"""The load runs, without a screen, against a server: every kind of call is answered and counted."""

import asyncio
import json
import sys
from pathlib import Path

import pytest
from load_calls import CALLS, KINDS, SEATS, USAGE
from load_generator import CALLERS

from tallymark import AsyncClient
from tallymark_node import dev
from tallymark_node.config import Settings

FOLDER = Path(__file__).resolve().parents[1]
SECONDS = 6
ALWAYS = (0, 2**62)


async def run(*command: object) -> tuple[int, str]:
    """Run a program to its end; its exit status and what it said."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, *map(str, command), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, output.decode()


async def stored(address: str) -> int:
    """How many of the load's events the server has."""
    count = 0
    async with AsyncClient([address]) as client:
        for code in (USAGE, CALLS, SEATS):
            for row in await client.top_accounts(code, ALWAYS, limit=100):
                usage = await client.query(row.account_id, code, ALWAYS)
                count += usage.value.count
    return count


@pytest.mark.timeout(300)
async def test_locust_runs_headless(tmp_path: Path) -> None:
    """Users and a generator make all their calls, none fails, and the server has every event that was counted."""
    report = tmp_path / "report.json"
    async with dev.running(Settings(port=0, data_dir=str(tmp_path / "data"))) as node:
        command = ["-m", "locust", "-f", FOLDER / "locustfile.py", "--headless", "--host", node.address]
        command += ["-t", f"{SECONDS}s", "-u", 4, "-r", 4, "--stop-timeout", 60, "--generators", 1]
        command += ["--accounts", 50, "--batch", 200, "--report", report]
        status, output = await run(*command)
        assert status == 0, output
        document = json.loads(report.read_text())
        assert (document["failed"], document["errors"], document["generators"]) == (0, {}, [0]), output
        assert set(CALLERS) <= set(document["kinds"]) <= set(KINDS)
        assert all(kind["calls"] > 0 for kind in document["kinds"].values())
        counted = sum(kind["events"] for name, kind in document["kinds"].items() if name.startswith("ingest"))
        assert await stored(node.address) == counted > 0


async def test_a_generator_says_when_nobody_answers(tmp_path: Path) -> None:
    """Without a server there is one line that says so, and an exit status."""
    status, output = await run(FOLDER / "load_generator.py", "--host", "127.0.0.1:1", "--timeout", 0.5)
    assert status == 1
    assert output.startswith("no gateway could be reached")
    assert len(output.splitlines()) == 1


async def test_work_that_ends_before_the_greenlet_waits() -> None:
    """A call that is answered while its greenlet is held up wakes it all the same."""
    script = f"""
import sys
sys.path.insert(0, {str(FOLDER)!r})
import locustfile
from gevent import monkey

bridge = locustfile.Bridge()
ended, over = (monkey.get_original("threading", "Event")() for _ in range(2))

class Held:  # the loop, as a thread sees it that is not given the processor for a while
    def __init__(self, loop):
        self.create_task = loop.create_task
        self._loop = loop

    def call_soon_threadsafe(self, callback):
        self._loop.call_soon_threadsafe(callback)
        assert ended.wait(60)
        # What the work's end calls comes before what is queued from here on, one turn later.
        self._loop.call_soon_threadsafe(lambda: self._loop.call_soon(over.set))
        assert over.wait(60)

async def work():
    ended.set()
    return "woken"

loop, bridge._loop = bridge._loop, Held(bridge._loop)
print(bridge.run(work()))
bridge._loop = loop
bridge.close()
"""
    async with asyncio.timeout(60):
        assert await run("-c", script) == (0, "woken\n")
