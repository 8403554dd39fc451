"""The cluster under measurement: etcd, three stores, a gateway and a query node, maybe alerts, all on this machine.

Every role is a process of its own, started as a user would. Everything listens on one loopback address that nothing
else uses, so that a store that was killed finds its port free.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tallymark_node.bench.target import READY_SECONDS_MAX, peak_memory_bytes

STORES = 3
PARTITIONS = 12
LEASE_TTL_S = 2.0
_POLL_S = 0.005
_STOP_S = 60.0


class Member:
    """One process of the cluster, through any number of lives.

    Attributes:
        name: its node id.
        address: "host:port".
    """

    def __init__(
        self, name: str, address: str, command: list[str], settings: dict[str, object], log: Path
    ) -> None:
        self.name = name
        self.address = address
        self.process: subprocess.Popen[bytes] | None = None
        self._command = command
        self._settings = settings
        self._log = log
        self._begun = 0  # where the present life begins in the log

    def spawn(self) -> None:
        """Begin a life."""
        environment = dict(os.environ)
        environment.update(
            {f"TALLYMARK_{name.upper()}": str(value) for name, value in self._settings.items()}
        )
        with self._log.open("ab") as log:
            self._begun = log.tell()
            self.process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
            )

    def wait_ready(self) -> None:
        """Wait until it says that it serves.

        Raises:
            RuntimeError: it ended before, or takes too long.
        """
        assert self.process is not None, "it was started"
        begun = time.perf_counter()
        while time.perf_counter() - begun < READY_SECONDS_MAX:
            if any(line.startswith("ready") for line in self._said().splitlines()):
                return
            if self.process.poll() is not None:
                break
            time.sleep(_POLL_S)
        raise RuntimeError(f"{self.name} did not start:\n{self._said()[-4_000:]}")

    def end(self, number: int = signal.SIGTERM) -> None:
        """Send a signal, without waiting for what comes of it."""
        assert self.process is not None, "it was started"
        self.process.send_signal(number)

    def stop(self, *, kill: bool = False) -> None:
        """End it, if it was started: gracefully, or at once."""
        if self.process is None:
            return
        if self.process.poll() is None:
            self.end(signal.SIGKILL if kill else signal.SIGTERM)
        try:
            self.process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _said(self) -> str:
        with self._log.open("rb") as log:
            log.seek(self._begun)
            return log.read().decode(errors="replace")


class ClusterTarget:
    """A running cluster.

    Attributes:
        address: of its gateway.
        coordinator: "etcd://host:port".
        stores: its store processes.
        alerts: its instances of the alerts role.
    """

    def __init__(self, folder: Path, *, alerts: int = 0, **settings: object) -> None:
        if shutil.which("etcd") is None:
            raise RuntimeError("a cluster needs etcd on the PATH: .ci/install-etcd puts it there")
        host = f"127.{128 + (os.getpid() >> 14) % 64}.{(os.getpid() >> 6) % 256}.{1 + (os.getpid() & 63)}"
        self.coordinator = f"etcd://{host}:2379"
        self._etcd = _etcd(host, folder)
        common = {
            "coordinator": self.coordinator,
            "partition_count": PARTITIONS,
            "replication_factor": STORES,
            "lease_ttl_seconds": LEASE_TTL_S,
        } | settings
        self.stores = [
            _role("store", f"store-{n}", f"{host}:{7100 + n}", common, folder) for n in range(1, STORES + 1)
        ]
        self._gateway = _role("ingest", "gateway-1", f"{host}:7001", common, folder)
        self._query = _role("query", "query-1", f"{host}:7201", common, folder)
        self.alerts = [
            _role("alerts", f"alerts-{n}", f"{host}:{7300 + n}", common, folder) for n in range(1, alerts + 1)
        ]
        self.address = self._gateway.address

    def start(self) -> None:
        """Start everything and wait until it says that it serves.

        Raises:
            RuntimeError: a part of it does not start.
        """
        self._etcd.spawn()
        _wait_open(self._etcd)
        # Stores first: the others wait a minute for them, and a first start compiles the kernels.
        for roles in (self.stores, [self._gateway, self._query, *self.alerts]):
            for member in roles:
                member.spawn()
            for member in roles:
                member.wait_ready()

    def peak_memory_bytes(self) -> int:
        """The largest resident sizes that its processes have had, together, without etcd's."""
        members = (*self.stores, self._gateway, self._query, *self.alerts)
        return sum(peak_memory_bytes(m.process.pid) for m in members if m.process is not None)

    def stop(self) -> None:
        """End it all."""
        for member in (*self.alerts, self._gateway, self._query, *self.stores, self._etcd):
            member.stop(kill=True)


def _etcd(host: str, folder: Path) -> Member:
    clients, peers = f"http://{host}:2379", f"http://{host}:2380"
    command = ["etcd", "--name", "etcd-1", "--data-dir", str(folder / "etcd"), "--log-level", "warn"]
    command += ["--logger", "zap", "--listen-client-urls", clients, "--advertise-client-urls", clients]
    command += ["--listen-peer-urls", peers, "--initial-advertise-peer-urls", peers]
    command += ["--initial-cluster", f"etcd-1={peers}"]
    return Member("etcd-1", f"{host}:2379", command, {}, folder / "etcd.log")


def _role(role: str, name: str, address: str, common: dict[str, object], folder: Path) -> Member:
    host, port = address.rsplit(":", 1)
    settings = common | {"node_id": name, "host": host, "port": port, "data_dir": folder / name}
    command = [sys.executable, "-m", "tallymark_node.main", "run", "--role", role]
    return Member(name, address, command, settings, folder / f"{name}.log")


def _wait_open(member: Member) -> None:
    """Wait until it can be connected to."""
    host, port = member.address.rsplit(":", 1)
    begun = time.perf_counter()
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=1.0).close()
        except OSError:
            assert member.process is not None, "it was started"
            if member.process.poll() is not None or time.perf_counter() - begun > READY_SECONDS_MAX:
                raise RuntimeError(f"{member.name} did not start") from None
            time.sleep(_POLL_S)
        else:
            return


@contextlib.contextmanager
def fresh(*, alerts: int = 0, **settings: object) -> Iterator[ClusterTarget]:
    """A cluster with empty disks, which is removed afterwards; with as many instances of the alerts role."""
    with tempfile.TemporaryDirectory(prefix="tallymark-bench-") as folder:
        target = ClusterTarget(Path(folder), alerts=alerts, **settings)
        try:
            target.start()
            yield target
        finally:
            target.stop()
