"""Which event loops the runtime's tests run on, and where their helpers are.

Both loops for sockets, as servers use uvloop and callers either. The helpers lie beside the tests; importlib mode
doesn't put them on the path.
"""

import asyncio
import sys
from pathlib import Path

import pytest
import uvloop

sys.path.insert(0, str(Path(__file__).parent))
pytest.register_assert_rewrite("etcd_process")


@pytest.fixture(scope="module")
def shared_etcd(tmp_path_factory):
    """An etcd of one member for all tests of a module: each takes a prefix of its own, none compacts."""
    from etcd_process import EtcdCluster

    with EtcdCluster(tmp_path_factory.mktemp("etcd")) as etcd:
        yield etcd


def pytest_asyncio_loop_factories(config, item):
    """Asyncio's loop for everything, uvloop as well for the transport, and alone for etcd's own tests."""
    if item.path.name == "test_runtime_etcd.py":
        return {"uvloop": uvloop.new_event_loop}
    factories = {"asyncio": asyncio.new_event_loop}
    if item.path.name == "test_runtime_transport.py":
        factories["uvloop"] = uvloop.new_event_loop
    return factories
