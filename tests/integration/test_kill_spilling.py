"""`kill -9` of a server that has no room for cells in memory: at each step of a spill, a merge and what lists them."""

import functools
import random

import pytest
from server import Server
from test_kill import Trial

pytestmark = pytest.mark.timeout(600)  # the first start compiles the kernels


@pytest.fixture
def server(tmp_path):
    """A server that keeps as few cells in memory as it can."""
    server = Server(
        tmp_path / "data", log=tmp_path / "server.log", environment={"TALLYMARK_MEMORY_BYTES": "1"}
    )
    yield server
    server.kill()


async def test_kill_while_cells_are_spilled(server):
    """Killed at steps of writing a file of cells, and a checkpoint that lists some, under load."""
    rng = random.Random(5)
    files = ["checkpoints/p-*/cells-*", "checkpoints/p-*/MANIFEST.new", "checkpoints/p-*/state-*"]
    async with Trial(server, 6).running() as trial:
        for round_ in range(9):
            pattern = f"{server.data}/store/{files[round_ % 3 if round_ % 2 else 0]}"
            steps = rng.randrange(12)
            await trial.die(functools.partial(server.die_writing, pattern, steps), riding=False)
        assert list((server.data / "store" / "checkpoints").glob("p-*/cells-*"))
