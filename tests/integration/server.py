"""A real `tallymark dev` process: started, killed, stopped, and asked what only a store can tell.

It listens on a loopback address of this test process's own, so that its port stays free while it is down: what
others bind or connect from on 127.0.0.1 can't take it, and a client that knocks can't meet itself there.
"""

import asyncio
import contextlib
import itertools
import os
import random
import signal
import sys
import time
from pathlib import Path

from ready_made import ReadyMade

from tallymark_protocol.errors import UnavailableError
from tallymark_protocol.messages import (
    PartitionStatus,
    StatusResult,
    StoreDigest,
    StoreStatus,
)
from tallymark_runtime.peer import PeerClient

PARTITIONS = 4
READY_SECONDS_MAX = 280.0  # a first start compiles the kernels
STOP_SECONDS_MAX = 30.0
POLL_SECONDS = 0.001
WAIT_SECONDS_MAX = 60.0

# Everything that happens rarely happens all the time: new segments, checkpoints.
ENVIRONMENT = {
    "TALLYMARK_WAL_SEGMENT_BYTES": str(1024 * 1024),
    "TALLYMARK_CHECKPOINT_EVENTS": "150",
    "TALLYMARK_CHECKPOINT_INTERVAL_SECONDS": "0.5",
}

_hosts = itertools.count()


def own_host() -> str:
    """A loopback address that no other test process, and no other server of this one, uses."""
    pid = os.getpid()
    return f"127.{64 + (pid >> 14) % 128}.{(pid >> 6) % 256}.{1 + ((pid & 63) << 2 | next(_hosts) & 3) % 254}"


class Server:
    """One server and its data directory, through any number of lives.

    Attributes:
        address: the gateway's; it stays the same.
        store: the store's, of the present life.
        starts: seconds that each start took, to its `ready` line.
    """

    def __init__(self, data: Path, *, log: Path, environment: dict[str, str] | None = None) -> None:
        self.data = data
        self.log = log
        self.environment = ENVIRONMENT | (environment or {})
        self.address = ""
        self.store = ""
        self.starts: list[float] = []
        self.recycled: set[int] = set()  # partitions whose log was found not to begin at 0
        self._host = own_host()
        self._port = 0
        self._death = log.with_suffix(".death")
        self._process: ReadyMade | None = None

    @property
    def pid(self) -> int:
        """Of the present life."""
        assert self._process is not None, "it was started"
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process is not None and self._process.poll() is None

    def output(self) -> str:
        """What it has said on standard error, in all its lives."""
        return self.log.read_text(errors="replace")

    def spawn(self) -> None:
        """Begin a start, without waiting for anything."""
        assert not self.alive, "one at a time"
        inherited = {name: text for name, text in os.environ.items() if not name.startswith("TALLYMARK_")}
        command = [sys.executable, str(Path(__file__).parent / "dying_server.py"), str(self._death)]
        command += ["dev", "--host", self._host, "--port", str(self._port)]
        command += ["--data-dir", str(self.data), "--partitions", str(PARTITIONS)]
        with self.log.open("a") as log:
            log.write(f"--- start {len(self.starts)}\n")
            log.flush()
            self._process = ReadyMade(
                command, env=inherited | self.environment, stdout=None, stderr=log.fileno()
            )

    async def start(self) -> None:
        """Start it and wait until it serves."""
        begun = time.perf_counter()
        self.spawn()
        assert self._process is not None
        assert self._process.stdout is not None
        reading = asyncio.ensure_future(asyncio.to_thread(self._process.stdout.readline))
        try:
            async with asyncio.timeout(READY_SECONDS_MAX):
                line = await asyncio.shield(reading)
        except BaseException:
            self.kill()  # which ends the reading, too
            await reading
            raise
        if not line.startswith("ready"):
            self.kill()
            raise AssertionError(f"the server did not start:\n{self.output()[-4_000:]}")
        self.starts.append(time.perf_counter() - begun)
        names = dict(word.split("=", 1) for word in line.split()[1:])
        self.address, self.store = names["gateway"], names["store"]
        self._port = int(self.address.rsplit(":", 1)[1])

    async def die_writing(self, pattern: str, steps: int) -> None:
        """Have it kill itself this many steps after it begins to open a file of such a path, and wait for that."""
        order = self._death.with_suffix(".new")
        order.write_text(f"{steps} {pattern}")
        order.rename(self._death)
        try:
            assert await wait_until(lambda: not self.alive), f"it opens nothing like {pattern}"
            assert await self.ended() == -signal.SIGKILL
        finally:
            self._death.unlink()

    def kill(self) -> None:
        """End it as a power cut would, if it runs: it gets no chance to write or say anything more."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._close()

    async def stop(self) -> int:
        """Ask it to stop and return its exit status."""
        assert self._process is not None, "it was started"
        self._process.send_signal(signal.SIGTERM)
        return await self.ended()

    async def ended(self) -> int:
        """Wait for its end and return its exit status."""
        assert self._process is not None, "it was started"
        status = await asyncio.to_thread(self._process.wait, STOP_SECONDS_MAX)
        self._close()
        return status

    def _close(self) -> None:
        if self._process is not None and self._process.stdout is not None:
            with contextlib.suppress(ValueError):  # a reader is just being told of its end
                self._process.stdout.close()

    @contextlib.asynccontextmanager
    async def peer(self, address: str = ""):
        """A bare connection to the store (or another role), for what the SDK doesn't offer."""
        client = PeerClient(address or self.store, rng=random.Random(1))
        try:
            yield client
        finally:
            await client.close()

    async def status(self) -> StatusResult:
        """What the store holds."""
        async with self.peer() as peer:
            return await peer.call(StoreStatus(), StatusResult)

    async def check_digests(self) -> list[str]:
        """Check that each partition's state equals a recount of its log; return the digests.

        A log that was dropped below the archive's end can't be counted again, and has to say so.
        """
        digests = []
        async with self.peer() as peer:
            for partition in range(PARTITIONS):
                state = await peer.call(StoreDigest(partition), PartitionStatus)
                assert state.applied == state.high_watermark == state.log_end
                digests.append(state.digest)
                try:
                    again = await peer.call(StoreDigest(partition, recount=True), PartitionStatus)
                except UnavailableError as error:
                    if self.environment.get("TALLYMARK_ARCHIVE") != "on" or "its log begins" not in str(
                        error
                    ):
                        raise
                    self.recycled.add(partition)
                    continue
                assert state.applied == again.applied
                assert state.digest == again.digest, f"partition {partition} is not what its log says"
        return digests


async def wait_until(condition, *, seconds: float = WAIT_SECONDS_MAX) -> bool:
    """Wait until `condition()` holds; whether it did within the time."""
    try:
        async with asyncio.timeout(seconds):
            while not condition():  # noqa: ASYNC110 - of other processes there are no events
                await asyncio.sleep(POLL_SECONDS)
    except TimeoutError:
        return False
    return True
