"""The helpers lie beside the tests; importlib mode doesn't put them on the path."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
pytest.register_assert_rewrite(
    "alerts_load", "webhook_receivers", "cluster", "cluster_load", "ledger", "network", "server"
)


@pytest.fixture
def server(tmp_path):
    """A server process, not started yet; killed at the test's end."""
    from server import Server

    server = Server(tmp_path / "data", log=tmp_path / "server.log")
    yield server
    server.kill()


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """The clusters of a module's tests; killed at its end."""
    from cluster_load import Worlds

    worlds = Worlds(tmp_path_factory)
    yield worlds
    worlds.close()


@pytest.fixture
async def world(worlds):
    """A cluster that runs, with what it was told and has said in earlier tests; a fresh one after a failure."""
    return await worlds.take()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Show what the server processes said when a test has failed."""
    report = yield
    if report.when == "call" and report.failed:
        folders = [item.funcargs.get("tmp_path"), getattr(item.funcargs.get("world"), "folder", None)]
        for folder in folders:
            for log in sorted(folder.glob("*.log")) if folder is not None else ():
                report.sections.append((f"{log.name}, its end", log.read_text(errors="replace")[-8_000:]))
    return report
