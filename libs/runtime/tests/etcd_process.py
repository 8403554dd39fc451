"""Real etcd processes on loopback, for tests: one member or several, killed, stopped and restarted at will.

    with EtcdCluster(folder, members=3) as etcd:
        coordinator = EtcdCoordinator(etcd.addresses, rng=random.Random(1))

Elections are quicker than by default, so that the shortest lease is one second. Ports are chosen beforehand, as a
member must be known to the others before it starts; where another process takes one in between, starting fails.
"""

import os
import platform
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

START_WAIT_S = 30.0
ELECTION_MS = 500
HEARTBEAT_MS = 50


def free_ports(count):
    """Ports of loopback that nobody has just now, all different."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def etcd_binary():
    """The path of etcd. Without it, the tests fail: `.ci/install-etcd` installs it."""
    found = shutil.which("etcd")
    assert found is not None, "etcd is not installed: run .ci/install-etcd"
    return found


class EtcdMember:
    """One etcd process.

    Attributes:
        name: within its cluster.
        address: "host:port" for clients.
        peer: "host:port" for the other members.
        folder: where its data and its log are.
    """

    def __init__(self, name, folder, client_port, peer_port):
        self.name = name
        self.folder = folder
        self.address = f"127.0.0.1:{client_port}"
        self.peer = f"127.0.0.1:{peer_port}"
        self.process = None
        self.initial_cluster = ""

    @property
    def running(self):
        """Whether the process exists (it may be stopped by SIGSTOP)."""
        return self.process is not None and self.process.poll() is None

    def start(self):
        """Start the process, without waiting for it to serve. Its data are those of its last life."""
        assert not self.running, "started once at a time"
        self.folder.mkdir(parents=True, exist_ok=True)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("ETCD_")}
        if platform.machine() == "aarch64":
            environment["ETCD_UNSUPPORTED_ARCH"] = "arm64"  # older releases run there only when told to
        with (self.folder / "etcd.log").open("ab") as log:
            self.process = subprocess.Popen(
                [
                    etcd_binary(),
                    f"--name={self.name}",
                    f"--data-dir={self.folder / 'data'}",
                    f"--listen-client-urls=http://{self.address}",
                    f"--advertise-client-urls=http://{self.address}",
                    f"--listen-peer-urls=http://{self.peer}",
                    f"--initial-advertise-peer-urls=http://{self.peer}",
                    f"--initial-cluster={self.initial_cluster}",
                    f"--heartbeat-interval={HEARTBEAT_MS}",
                    f"--election-timeout={ELECTION_MS}",
                    "--log-level=warn",
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
            )

    def wait_ready(self):
        """Wait until it serves: it has a leader then."""
        deadline = time.monotonic() + START_WAIT_S  # noqa: TID251 - real processes run on real time
        host, port = self.address.rsplit(":", 1)
        request = b"GET /health HTTP/1.0\r\n\r\n"
        while time.monotonic() < deadline:  # noqa: TID251
            assert self.running, f"etcd ended: {(self.folder / 'etcd.log').read_text()[-2000:]}"
            try:
                with socket.create_connection((host, int(port)), timeout=1.0) as connection:
                    connection.sendall(request)
                    answer = b""
                    while piece := connection.recv(4096):
                        answer += piece
                if b'"health":"true"' in answer:
                    return
            except OSError:
                pass
            time.sleep(0.02)
        raise AssertionError(f"etcd doesn't serve: {(self.folder / 'etcd.log').read_text()[-2000:]}")

    def kill(self):
        """End it as a power cut would, and wait for its end."""
        if self.running:
            self.process.kill()
        if self.process is not None:
            self.process.wait()
            self.process = None

    def pause(self):
        """Stop it: it keeps its connections, accepts new ones, and answers nothing."""
        self.process.send_signal(signal.SIGSTOP)
        # The signal stops one thread after the other: until all of them are, a request may still be answered.
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def resume(self):
        """Let it go on."""
        self.process.send_signal(signal.SIGCONT)


class EtcdCluster:
    """An etcd cluster; `start` it (or use it in `with`), `close` it.

    Attributes:
        members: its `EtcdMember`s.
        addresses: theirs for clients, in the same order.
        url: what the setting `coordinator` takes.
    """

    def __init__(self, folder, members=1):
        ports = free_ports(2 * members)
        self.members = [
            EtcdMember(f"etcd-{i}", Path(folder) / f"etcd-{i}", ports[2 * i], ports[2 * i + 1])
            for i in range(members)
        ]
        initial = ",".join(f"{member.name}=http://{member.peer}" for member in self.members)
        for member in self.members:
            member.initial_cluster = initial
        self.addresses = [member.address for member in self.members]
        self.url = "etcd://" + ",".join(self.addresses)

    def start(self):
        """Start all members and wait until they serve."""
        for member in self.members:
            member.start()
        for member in self.members:
            member.wait_ready()

    def member(self, address):
        """The member with this client address."""
        return next(member for member in self.members if member.address == address)

    def kill(self):
        """Kill all members; `start` starts them again with their data."""
        for member in self.members:
            member.kill()

    close = kill

    def __enter__(self):
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_):
        self.close()
