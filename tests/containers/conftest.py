"""Containers are made here and removed here; their helpers lie beside the tests.

The images are built by `.ci/build-images`; `make integration` does everything in order.
"""

import os
import sys
from pathlib import Path

# Before testcontainers is imported: nothing is pulled, so there is no reaper, and ports are on loopback.
os.environ["TESTCONTAINERS_RYUK_DISABLED"] = "true"
os.environ["TESTCONTAINERS_CONNECTION_MODE"] = "docker_host"
os.environ["TC_HOST"] = "127.0.0.1"

import pytest

sys.path.insert(0, str(Path(__file__).parent))
pytest.register_assert_rewrite("engine", "smoke")


@pytest.fixture(scope="session", autouse=True)
def clean_engine():
    """What an earlier run was kept from removing would be in the way of this one."""
    from engine import remove_leftovers

    remove_leftovers()
    yield
    remove_leftovers()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Show what the containers said when a test has failed."""
    report = yield
    if report.failed:
        from engine import logs_of_all

        report.sections += logs_of_all()
    return report
