"""Processes that a test starts, halts, kills and starts again: etcd, and roles of a cluster.

What a process says goes into a file, its standard output too: it is ready once that has the line which says so, and
a process that nobody reads from can't block. Every wait has a bound, and fails with the end of what was said.
"""

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ready_made import ReadyMade

READY_SECONDS_MAX = 280.0  # a first start compiles the kernels
STOP_SECONDS_MAX = 30.0
ETCD_SECONDS_MAX = 30.0
POLL_SECONDS = 0.01


def _is_halted(pid: int) -> bool:
    """Whether all threads of a process are stopped, or there is none any more."""
    try:
        threads = list(Path(f"/proc/{pid}/task").iterdir())
        # The state comes after the name, which is in brackets and may hold anything.
        states = [(thread / "stat").read_text().rpartition(")")[2].split()[0] for thread in threads]
    except (FileNotFoundError, ProcessLookupError):
        return not Path(f"/proc/{pid}").exists()
    return all(state in "TtZX" for state in states)


class Process:
    """One program under one name, through any number of lives.

    Args:
        name: of the process, and of its log.
        command: what to run, once for each life.
        log: where what it says is gathered, over all its lives.
        environment: on top of this process's, without its TALLYMARK_ variables.
        namespace: the network namespace to run it in; empty for this process's own.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        log: Path,
        environment: dict[str, str] | None = None,
        namespace: str = "",
    ) -> None:
        self.name = name
        self.command = list(command)
        self.log = log
        self.environment = environment or {}
        self.namespace = namespace
        self.halted = False
        self.lives = 0
        self._process: subprocess.Popen[bytes] | ReadyMade | None = None
        self._begun = 0  # where the present life begins in the log

    @property
    def pid(self) -> int:
        """Of the present life."""
        assert self._process is not None, "it was started"
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the process exists; it may be halted."""
        return self._process is not None and self._process.poll() is None

    def output(self) -> str:
        """What the present life has said."""
        with self.log.open("rb") as log:
            log.seek(self._begun)
            return log.read().decode(errors="replace")

    def spawn(self) -> None:
        """Begin a life, without waiting for anything."""
        assert not self.alive, "one at a time"
        inherited = {name: text for name, text in os.environ.items() if not name.startswith("TALLYMARK_")}
        environment = inherited | self.environment
        with self.log.open("ab") as log:
            log.write(f"--- {self.name}, life {self.lives}\n".encode())
            log.flush()
            self._begun = log.tell()
            if self.command[0] == sys.executable and not self.namespace:
                self._process = ReadyMade(
                    self.command, env=environment, stdout=log.fileno(), stderr=log.fileno()
                )
            else:
                prefix = ["ip", "netns", "exec", self.namespace] if self.namespace else []
                self._process = subprocess.Popen(
                    prefix + self.command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
                )
        self.halted = False
        self.lives += 1

    async def wait_ready(self) -> None:
        """Wait until it serves; for children."""

    async def start(self) -> None:
        """Begin a life and wait until it serves."""
        self.spawn()
        await self.wait_ready()

    def kill(self) -> None:
        """End it as a power cut would, if it exists: it gets no chance to write or say anything more."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def halt(self) -> None:
        """Stop it in the middle of whatever it does: it keeps its connections and doesn't know."""
        os.kill(self.pid, signal.SIGSTOP)
        # The signal stops one thread after the other: until all of them are, it may still write or answer. It needn't be
        # a child of this process.
        for _ in range(int(STOP_SECONDS_MAX * 1_000)):
            if _is_halted(self.pid):
                break
            time.sleep(0.001)
        else:
            raise self._fail("does not halt")
        self.halted = True

    def go_on(self) -> None:
        """Let a halted process go on as if no time had passed."""
        os.kill(self.pid, signal.SIGCONT)
        self.halted = False

    async def stop(self) -> int:
        """Ask it to stop, wait for its end and return its exit status."""
        assert self._process is not None, "it was started"
        self._process.send_signal(signal.SIGTERM)
        return await asyncio.to_thread(self._process.wait, STOP_SECONDS_MAX)

    def _fail(self, what: str) -> AssertionError:
        return AssertionError(f"{self.name} {what}:\n{self.output()[-4_000:]}")


class Etcd(Process):
    """One etcd member that is a cluster of its own.

    Attributes:
        address: "host:port" that clients connect to.
    """

    def __init__(self, host: str, data: Path, *, log: Path, namespace: str = "") -> None:
        assert shutil.which("etcd"), "etcd isn't there: run .ci/install-etcd"
        self.host, self.port, self.data = host, 2379, data
        self.address = f"{host}:{self.port}"
        clients, peers = f"http://{self.address}", f"http://{host}:2380"
        command = [
            "etcd",
            "--name",
            "etcd-1",
            "--data-dir",
            str(data),
            "--logger",
            "zap",
            "--log-level",
            "warn",
        ]
        command += ["--listen-client-urls", clients, "--advertise-client-urls", clients]
        command += ["--listen-peer-urls", peers, "--initial-advertise-peer-urls", peers]
        command += ["--initial-cluster", f"etcd-1={peers}"]
        super().__init__("etcd", command, log=log, namespace=namespace)

    async def wait_ready(self) -> None:
        """Wait until it has a leader, itself."""
        try:
            async with asyncio.timeout(ETCD_SECONDS_MAX):
                while not await self._healthy():
                    if not self.alive:
                        raise self._fail("ended")
                    await asyncio.sleep(POLL_SECONDS)
        except TimeoutError:
            raise self._fail("didn't become healthy") from None

    async def _healthy(self) -> bool:
        try:
            reader, writer = await asyncio.open_connection(self.host, self.port)
        except OSError:
            return False
        try:
            writer.write(f"GET /health HTTP/1.0\r\nHost: {self.address}\r\n\r\n".encode())
            return b'"health":"true"' in await reader.read()
        except OSError:
            return False
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


class RoleProcess(Process):
    """`tallymark run --role …`.

    Attributes:
        address: "host:port" it is reached by; the same in every life.
    """

    def __init__(
        self,
        role: str,
        node_id: str,
        address: str,
        *,
        log: Path,
        settings: dict[str, object],
        namespace: str = "",
    ) -> None:
        host, port = address.rsplit(":", 1)
        chosen = {"node_id": node_id, "host": host, "port": port} | settings
        environment = {f"TALLYMARK_{name.upper()}": str(value) for name, value in chosen.items()}
        command = [sys.executable, "-m", "tallymark_node.main", "run", "--role", role]
        super().__init__(node_id, command, log=log, environment=environment, namespace=namespace)
        self.node_id = node_id
        self.address = address

    async def wait_ready(self) -> None:
        """Wait until it says that it serves."""
        try:
            async with asyncio.timeout(READY_SECONDS_MAX):
                while not any(line.startswith("ready") for line in self.output().splitlines()):
                    if not self.alive:
                        raise self._fail("ended")
                    await asyncio.sleep(POLL_SECONDS)
        except TimeoutError:
            raise self._fail("didn't become ready") from None
