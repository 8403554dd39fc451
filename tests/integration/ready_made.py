"""Processes of this project's programs that begin where others have finished importing: a start takes no second.

A process of `python -m tallymark_node.main` spends most of its start, and more than a second of a processor, on
importing numba and on loading kernels, each time the same. Tests that kill and start servers over and over would
do little else. So a nursery does that once: a process with one thread, which has everything loaded and nothing begun,
and forks for each start. What is forked is a process like any other, with a pid, descriptors, environment, arguments
and memory of its own, and runs the very program, from its first line, in a `__main__` of its own.

The nursery forks a keeper for each process, and the keeper the process itself, to wait for its end and to tell it:
`ReadyMade` is `subprocess.Popen` as far as tests need it. Everything is gone with this process: the nursery ends when
its socket does.

Programs started as a user starts them are in `test_cluster_cuts`, the tests of the command, of the README and of the
examples.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_REQUEST_BYTES_MAX = 64 * 1024  # a start's arguments and environment
_FIRST_SECONDS_MAX = 300.0  # kernels may have to be compiled


class ReadyMade:
    """A process begun by the nursery.

    Args:
        command: `[sys.executable, "-m", module, …]` or `[sys.executable, script, …]`.
        env: all of its environment.
        stdout: a descriptor, or None for a pipe, whose end is then `stdout`, as text.
        stderr: a descriptor.
    """

    def __init__(
        self, command: Sequence[str], *, env: dict[str, str], stdout: int | None, stderr: int
    ) -> None:
        assert command[0] == sys.executable
        self.returncode: int | None = None
        self.stdout: Any = None
        self._told = threading.Lock()  # several may wait for the end
        target, pipe = stdout, -1
        if target is None:
            pipe, target = os.pipe()
            self.stdout = os.fdopen(pipe, "r")
        self._keeper, theirs = socket.socketpair()
        with theirs:
            nursery = _nursery()
            request = json.dumps([list(command[1:]), env, os.getcwd()]).encode()
            assert len(request) < _REQUEST_BYTES_MAX
            socket.send_fds(nursery, [request], [theirs.fileno(), target, stderr])
        if stdout is None:
            os.close(target)
        self._keeper.settimeout(_FIRST_SECONDS_MAX)
        self.pid = int(self._line())
        self._keeper.settimeout(None)
        self._pidfd = -1
        with contextlib.suppress(ProcessLookupError):  # it has ended already
            self._pidfd = os.pidfd_open(self.pid)

    def _line(self) -> str:
        found = b""
        while not found.endswith(b"\n"):
            more = self._keeper.recv(64)
            assert more, "the nursery has ended"
            found += more
        return found.decode()

    def poll(self) -> int | None:
        """The exit status; None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; return the exit status, negative for a signal.

        Raises:
            TimeoutExpired: it has not ended.
        """
        try:
            if self.returncode is None and not select.select([self._keeper], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
        except (OSError, ValueError):
            assert self.returncode is not None, "closed by who else waited"
        with self._told:
            if self.returncode is None:
                self.returncode = os.waitstatus_to_exitcode(int(self._line()))
                self._keeper.close()
                if self._pidfd >= 0:
                    os.close(self._pidfd)
                    self._pidfd = -1
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, if it has not ended."""
        if self.poll() is None and self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)


_known: list[tuple[subprocess.Popen[bytes], socket.socket]] = []  # this process's nursery, and the way to it


def _nursery() -> socket.socket:
    """The way to this process's nursery, which is begun if there is none."""
    if _known and _known[0][0].poll() is not None:
        _end()  # it was killed; whoever it has begun lives on
    if not _known:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            inherited = {name: text for name, text in os.environ.items() if not name.startswith("TALLYMARK_")}
            nursery = subprocess.Popen(
                [sys.executable, str(Path(__file__)), str(theirs.fileno())],
                env=inherited | {"OPENBLAS_NUM_THREADS": "1"},  # it forks: there must be one thread
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        _known.append((nursery, ours))
    return _known[0][1]


@atexit.register
def _end() -> None:
    for nursery, way in _known:
        way.close()
        nursery.wait()
    _known.clear()


# ---------------------------------------------------------------- in the nursery


def _serve(requests: socket.socket) -> list[str] | None:
    """Fork for each request; return the arguments in a process that is to run, None at the end."""
    while True:
        request, descriptors, _, _ = socket.recv_fds(requests, _REQUEST_BYTES_MAX, 3)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:  # keepers that are done
                pass
        if not request:
            return None
        if os.fork() == 0:
            requests.close()
            return _keep(json.loads(request), *descriptors)
        for descriptor in descriptors:
            os.close(descriptor)


def _keep(request: tuple[list[str], dict[str, str], str], told: int, stdout: int, stderr: int) -> list[str]:
    """Fork the process; the keeper tells its pid and its end, and never returns."""
    pid = os.fork()
    if pid:
        os.close(stdout)
        os.close(stderr)
        with contextlib.suppress(BrokenPipeError):
            os.write(told, b"%d\n" % pid)
            _, status = os.waitpid(pid, 0)
            os.write(told, b"%d\n" % status)
        os._exit(0)
    arguments, environment, folder = request
    os.close(told)
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    os.close(stdout)
    os.close(stderr)
    # The nursery's own know of other files: whether one can seek in them, for example.
    sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    return arguments


def _load() -> None:
    """Import and load whatever a role needs."""
    # All but `tallymark_node.main`, which the process runs itself.
    for name in ("cluster", "common", "events", "ingest", "metrics", "serve", "usage"):
        importlib.import_module(f"tallymark_node.cli.{name}")
    for name in ("tallymark_runtime.logs", "tallymark_runtime.process", "tallymark_node.run", "uvloop"):
        importlib.import_module(name)
    importlib.import_module("tallymark_node.dev").warm_up()


def _main() -> None:
    _load()
    assert len(list(Path("/proc/self/task").iterdir())) == 1, "a process with threads must not fork"
    gc.collect()
    gc.freeze()  # so that collections in the children don't copy its pages
    arguments = _serve(socket.socket(fileno=int(sys.argv[1])))
    if arguments is None:
        return
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path[0] = str(Path(arguments[0]).parent)
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    _main()
