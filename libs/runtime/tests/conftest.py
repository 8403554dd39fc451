"""Which event loops the runtime's tests run on: both for sockets, as servers use uvloop and callers either."""

import asyncio

import uvloop


def pytest_asyncio_loop_factories(config, item):
    """Asyncio's loop for everything, uvloop as well for the transport."""
    factories = {"asyncio": asyncio.new_event_loop}
    if item.path.name == "test_runtime_transport.py":
        factories["uvloop"] = uvloop.new_event_loop
    return factories
