"""The server under measurement: a process of its own, in a directory of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

READY_SECONDS_MAX = 600.0  # the very first start compiles the kernels


class Target:
    """A running server.

    Attributes:
        address: of its gateway.
        start_s: how long it took from the process's start to its `ready` line.
    """

    def __init__(self, process: subprocess.Popen[str], address: str, start_s: float) -> None:
        self.process = process
        self.address = address
        self.start_s = start_s

    def peak_memory_bytes(self) -> int:
        """The largest resident size the process has had."""
        return peak_memory_bytes(self.process.pid)

    def stop(self, *, kill: bool = False) -> None:
        """End the process: gracefully, or at once."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL if kill else signal.SIGTERM)
        self.process.wait(60)


def peak_memory_bytes(pid: int) -> int:
    """The largest resident size that a process has had."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def start(data_dir: Path, **settings: object) -> Target:
    """Start a server on a free port and wait until it serves. `settings` are those of `config.Settings`.

    Raises:
        RuntimeError: it ended before it served.
    """
    environment = dict(os.environ)
    environment.update({f"TALLYMARK_{name.upper()}": str(value) for name, value in settings.items()})
    command = [sys.executable, "-m", "tallymark_node.main", "dev", "--port", "0", "--data-dir", str(data_dir)]
    begun = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("ready"):
            words = dict(word.split("=", 1) for word in line.split() if "=" in word)
            address = words["gateway"]
            return Target(process, address, time.perf_counter() - begun)
        if time.perf_counter() - begun > READY_SECONDS_MAX:
            break
    process.kill()
    raise RuntimeError(f"the server did not start (exit status {process.wait()})")


@contextlib.contextmanager
def fresh(**settings: object) -> Iterator[Target]:
    """A server with an empty data directory, which is removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="tallymark-bench-") as folder:
        target = start(Path(folder), **settings)
        try:
            yield target
        finally:
            target.stop()


def sync_time_us(samples: int = 300) -> float:
    """The median time of a durable write of 4 KiB into a preallocated file, in microseconds."""
    block = os.urandom(4096)
    taken = []
    with tempfile.NamedTemporaryFile(prefix="tallymark-bench-") as file:
        descriptor = file.fileno()
        os.pwrite(descriptor, bytes(4096 * samples), 0)
        os.fsync(descriptor)
        for i in range(samples):
            begun = time.perf_counter()
            os.pwrite(descriptor, block, 4096 * i)
            os.fdatasync(descriptor)
            taken.append(time.perf_counter() - begun)
    return sorted(taken)[samples // 2] * 1e6
