"""Times in which a thread looks at all of a partition's totals, and nothing changes them.

What is to be told of one offset and takes long (a copy of the state, a digest, a ranking of all accounts) would stall the
loop; a copy of everything beforehand would, too. So nothing is folded for that time, of that partition, while its log
and its judge go on: writes don't notice, and reads wait. One at a time, and each read looks whether it has to fold first:
however many of them follow each other, the fold gets on.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from tallymark_store.partition import Partition

T = TypeVar("T")


class Hold:
    """A partition's, to be taken by one after the other.

    Args:
        partition: whose.
    """

    def __init__(self, partition: Partition) -> None:
        self._partition = partition
        self._lock = asyncio.Lock()

    @contextlib.asynccontextmanager
    async def taken(self) -> AsyncIterator[None]:
        """Nobody else holds the totals in the block; they do change, until `run`."""
        async with self._lock:
            yield

    async def run(self, running: Awaitable[T]) -> T:
        """Hold the totals until something has ended, with the hold taken; also where the caller is cancelled meanwhile."""
        assert self._lock.locked(), "it is taken"
        self._partition.fold.held = True
        try:
            return await to_the_end(running)
        finally:
            self._partition.fold.held = False

    async def wait(self) -> None:
        """Wait until the totals may change; they may in the rest of this turn of the loop."""
        while self._partition.fold.held:
            async with self._lock:
                pass


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
