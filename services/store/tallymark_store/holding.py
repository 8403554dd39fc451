"""Times in which a thread looks at all of a partition's totals, and nothing changes them.

What is to be told of one offset and takes long (a copy of the state, a digest, a ranking of all accounts) would stall the
loop; a copy of everything beforehand would, too. So nothing is folded for that time, of that partition, while its log
and its judge go on: writes don't notice, and reads wait. One at a time, and each read folds first what is committed:
however many of them follow each other, the fold gets on. Whoever waits for the end of one doesn't wait for the next.

The threads are these' own, and no more are asked for than there are: totals aren't held while something waits for a thread.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

if TYPE_CHECKING:
    from tallymark_store.partition import Partition

T = TypeVar("T")

HOLDS_MAX: Final = 2  # at once, of all partitions: each keeps a processor busy


class Hold:
    """A partition's, to be taken by one after the other.

    Args:
        partition: whose.
    """

    def __init__(self, partition: Partition) -> None:
        self._partition = partition
        self._lock = asyncio.Lock()
        self._released = asyncio.Event()  # of the present hold

    @contextlib.asynccontextmanager
    async def taken(self) -> AsyncIterator[None]:
        """Nobody else holds the totals in the block; they do change, until `run`."""
        async with self._lock:
            yield

    async def run(self, running: Awaitable[T]) -> T:
        """Hold the totals until something has ended, with the hold taken; also where the caller is cancelled meanwhile."""
        assert self._lock.locked(), "it is taken"
        self._partition.fold.held = True
        self._released.clear()
        try:
            return await to_the_end(running)
        finally:
            self._partition.fold.held = False
            self._released.set()  # those who wait come before whoever takes it next

    async def wait(self) -> None:
        """Wait until the totals may change; they may in the rest of this turn of the loop."""
        while self._partition.fold.held:
            await self._released.wait()


class HoldThreads:
    """Threads for nothing but what holds totals: a function runs as soon as it is handed over, of HOLDS_MAX at once."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(HOLDS_MAX, "totals")

    async def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run a function in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, partial(function, *args))

    def close(self) -> None:
        """Let the threads end."""
        self._executor.shutdown(wait=False)


async def to_the_end(running: Awaitable[T], on_cancel: Callable[[], None] = lambda: None) -> T:
    """Wait for what a thread does; cancelled, only end when that has ended, as nothing can stop it."""
    task: asyncio.Future[T] = asyncio.ensure_future(running)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        on_cancel()
        while not task.done():
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await asyncio.shield(task)
        raise
