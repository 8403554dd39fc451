"""Every example runs against a server and counts what it says it counts."""

import asyncio
import importlib.util
import os
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import pytest

from tallymark_node import dev
from tallymark_node.config import Settings

FOLDER = Path(__file__).resolve().parents[1]

EXPECTED = {
    "enforcement": {
        "below the cap": [200, 200, 200, 200, 200],
        "at the cap": [429, 200],
        "after a restart": [429, 429],
        "next period": [200, 200],
    },
    "request_metering": {
        ("/users/{id}", "2xx"): 700,
        ("/orders", "2xx"): 20,
        ("/orders", "4xx"): 3,
        (None, "4xx"): 2,
    },
    # 31 days of UTC from 1 March; in Berlin's March the last of them ends two hours early, the first is whole.
    "infrastructure": {"aws": Decimal(1484), "gcp": Decimal("77.5"), "other": Decimal("23.25")},
    "seats": {"now": 3, "mid_february": 1, "february_active": 2},
    "queue_consumer": {"first": 400, "second": 600, "known": 100, "dead": 1, "left": 0, "emails": 1_999},
    "prepaid_credits": {"left": Decimal("89.500001"), "refused": 1, "reminders": 1},
}
PRINTED = {
    "enforcement": "at the cap:      [429, 200]",
    "request_metering": ": 725 requests this month, 0 lost",
    "infrastructure": "March: 1584.750000 hours",
    "seats": "seats taken now:              3",
    "queue_consumer": "second consumer: 600 stored, 100 known already",
    "prepaid_credits": "refused:         job job-3 needs 40, 29.500001 are left",
}


def load(name):
    """Import an example by its file."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[spec.name]
    return module


def settings(folder):
    """A server of its own, on a free port."""
    return Settings(port=0, data_dir=str(folder))


def test_every_example_is_run():
    """A new example needs its numbers here."""
    assert sorted(path.stem for path in FOLDER.glob("*.py")) == sorted(EXPECTED)


@pytest.mark.parametrize("name", sorted(EXPECTED))
async def test_example_counts_what_it_says(name, tmp_path, capsys):
    """The numbers returned and printed are right."""
    async with dev.running(settings(tmp_path)) as node:
        found = await asyncio.to_thread(load(name).main, node.address)
    printed, complaints = capsys.readouterr()
    assert found == EXPECTED[name]
    assert PRINTED[name] in printed
    assert complaints == ""


@pytest.mark.parametrize("name", ["enforcement", "prepaid_credits", "request_metering"])
async def test_example_runs_again(name, tmp_path):
    """A second run against the same server shows the same numbers: each has customers of its own."""
    async with dev.running(settings(tmp_path)) as node:
        for _ in range(2):
            assert await asyncio.to_thread(load(name).main, node.address) == EXPECTED[name]


@pytest.mark.parametrize("by_argument", [True, False])
async def test_example_runs_as_a_script(by_argument, tmp_path):
    """The server's address comes from the command line or from TALLYMARK_SERVER."""
    async with dev.running(settings(tmp_path)) as node:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            str(FOLDER / "seats.py"),
            *([node.address] if by_argument else []),
            env=os.environ | {"TALLYMARK_SERVER": "" if by_argument else node.address},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        out, _ = await process.communicate()
    assert process.returncode == 0, out.decode()
    assert PRINTED["seats"] in out.decode()
