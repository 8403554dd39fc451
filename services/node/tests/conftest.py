"""A server for the tests of the command, and the command."""

import asyncio
import threading

import pytest
from click.testing import CliRunner

from tallymark_node import dev
from tallymark_node.config import Settings
from tallymark_node.main import cli


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The address of a server that runs on a thread of its own for all tests of the module."""
    settings = Settings(port=0, data_dir=str(tmp_path_factory.mktemp("node")))
    started = threading.Event()
    found = {}

    async def serve():
        stop = found["stop"] = asyncio.Event()
        found["loop"] = asyncio.get_running_loop()
        async with dev.running(settings) as node:
            found["address"] = node.address
            started.set()
            await stop.wait()

    def run():
        try:
            asyncio.run(serve())
        except BaseException as error:
            found["error"] = error
            raise
        finally:
            started.set()

    thread = threading.Thread(target=run)
    thread.start()
    started.wait()
    assert "address" in found, found.get("error")
    yield found["address"]
    found["loop"].call_soon_threadsafe(found["stop"].set)
    thread.join()


@pytest.fixture
def tally(server):
    """Run the command; returns its result."""

    def run(*arguments, status=0, stdin=None, address=server):
        result = CliRunner().invoke(cli, [*map(str, arguments), "--server", address], input=stdin)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == status, result.output
        return result

    return run
