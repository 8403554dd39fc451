"""A TCP proxy that loses connections: after a seeded, random number of bytes in either direction it cuts them.

A cut falls anywhere: in the handshake, in the middle of a request, or after a request has gone through and before
its answer has come back. Bytes up to the cut are passed on, so both ends see torn frames.
"""

from __future__ import annotations

import asyncio
import contextlib
import random

READ_BYTES = 64 * 1024
# Classes of connections: weight, and the range of bytes that each direction carries before the cut. The first
# ends most handshakes, the last lets whole batches through, without which nothing would ever get done.
UPWARD = ((1, 1, 600), (4, 600, 80_000), (5, 80_000, 4_000_000))
DOWNWARD = ((1, 1, 400), (4, 400, 6_000), (5, 6_000, 400_000))


class ChaosProxy:
    """Passes connections on to `target` ("host:port", may change while it runs; empty refuses) and cuts them.

    Attributes:
        address: "host:port" to connect to.
        n_connections: how many were accepted.
        n_cuts: how many were cut by their count of bytes.
    """

    def __init__(self, seed: int) -> None:
        self.target = ""
        self.address = ""
        self.n_connections = 0
        self.n_cuts = 0
        self.gentle = False  # cut no more
        self._rng = random.Random(seed)
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Listen on a free port."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        host, port = self._server.sockets[0].getsockname()[:2]
        self.address = f"{host}:{port}"

    async def close(self) -> None:
        """Cut everything and stop listening."""
        if self._server is not None:
            self._server.close()
        for task in [*self._tasks]:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _budget(self, classes: tuple[tuple[int, int, int], ...]) -> int:
        _, low, high = self._rng.choices(classes, [weight for weight, _, _ in classes])[0]
        return self._rng.randrange(low, high)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.n_connections += 1
        upward, downward = self._budget(UPWARD), self._budget(DOWNWARD)
        onward = None
        try:
            host, _, port = self.target.rpartition(":")
            if not port:
                return
            source, onward = await asyncio.open_connection(host, int(port))
            ways = [
                asyncio.ensure_future(self._pass(reader, onward, upward)),
                asyncio.ensure_future(self._pass(source, writer, downward)),
            ]
            self._tasks.update(ways)
            ended = asyncio.Event()
            for way in ways:
                way.add_done_callback(lambda _: ended.set())
            try:
                await ended.wait()
            finally:
                for way in ways:
                    way.cancel()
                await asyncio.gather(*ways, return_exceptions=True)
                self._tasks.difference_update(ways)
        except (OSError, asyncio.CancelledError):
            pass  # as good as a cut
        finally:
            for end in (writer, onward):
                if end is not None:
                    end.transport.abort()
            self._tasks.discard(task)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, budget: int) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(READ_BYTES):
                if budget <= len(data) and not self.gentle:
                    writer.write(data[:budget])
                    self.n_cuts += 1
                    # What came before the cut gets through: give the kernel the chance to take it.
                    await asyncio.sleep(0)
                    return
                budget -= len(data)
                writer.write(data)
                await writer.drain()
