"""A process that the nursery begins is one like any other: the program's own, from its first line to its status."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from ready_made import ReadyMade

SCRIPT = """
import os, signal, sys
print(__name__, os.getpid(), sys.argv[1:], sorted(os.environ), os.getcwd(), flush=True)
print("on standard error", file=sys.stderr)
if sys.argv[1] == "wait":
    signal.pause()
sys.exit(int(sys.argv[1]))
"""


@pytest.fixture
def begin(tmp_path):
    """Begins the script with some arguments; what it begins is killed in the end."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    begun = []

    def begin(*arguments: str) -> ReadyMade:
        with (tmp_path / "err").open("ab") as err:
            command = [sys.executable, str(script), *arguments]
            begun.append(ReadyMade(command, env={"MARK": "1"}, stdout=None, stderr=err.fileno()))
        return begun[-1]

    yield begin
    for process in begun:
        process.kill()
        process.wait()
        process.stdout.close()


def test_ready_made_runs_the_program(begin, tmp_path):
    """It has its own pid, arguments, environment and streams, and its status is told."""
    process = begin("3", "and more")
    expected = f"__main__ {process.pid} ['3', 'and more'] ['MARK'] {os.getcwd()}\n"
    assert process.stdout.read() == expected
    assert process.wait(30) == 3
    assert process.poll() == 3
    assert (tmp_path / "err").read_text() == "on standard error\n"


def test_ready_made_takes_signals(begin):
    """It runs until it is killed, and its end tells by what."""
    process, other = begin("wait"), begin("wait")
    for one in (process, other):
        assert one.stdout.readline().startswith("__main__")
        assert one.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == -signal.SIGTERM
    process.kill()  # as with `Popen`: of one that has ended it is none
    assert other.poll() is None
    other.kill()
    assert other.wait(30) == -signal.SIGKILL


def test_ready_made_begins_without_threads(begin):
    """Nothing runs beside the program: what was loaded for it has begun nothing."""
    process = begin("wait")
    process.stdout.readline()
    assert len(list(Path(f"/proc/{process.pid}/task").iterdir())) == 1
