"""The helpers lie beside the scenarios; importlib mode doesn't put them on the path."""

import asyncio
import sys
from pathlib import Path

from tallymark_runtime.loops import new_event_loop

sys.path.insert(0, str(Path(__file__).parent))


def pytest_asyncio_loop_factories(config, item):
    """The loop that `tallymark dev` runs on for scenarios that start it in this process."""
    if item.path.name in {"test_exact_history.py", "test_exact_spilled.py"}:
        return {"server": new_event_loop}
    return {"asyncio": asyncio.new_event_loop}
