"""The cluster of plain processes of docs/deploy.md comes up by the page's own lines, and counts."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import sys
from pathlib import Path

import pytest
from snippets import blocks_of, run_command, run_python

from tallymark_node.config import load

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
QUICKSTART = next(
    text for kind, text in blocks_of((ROOT / "README.md").read_text(encoding="utf-8")) if kind == "python"
)
READY = 6  # three stores, a gateway, a query node, an instance of the alerts role


def shell_blocks() -> list[str]:
    """What the page has a reader type: the lines that start everything, and the look at it."""
    section = PAGE.split("## On one machine, without containers", 1)[1].split("\n## ", 1)[0]
    return [text for kind, text in blocks_of(section) if kind == "sh"]


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody has at this moment."""
    held = [socket.socket() for _ in range(count)]
    try:
        for one in held:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in held]
    finally:
        for one in held:
            one.close()


def test_the_file_of_settings_is_one(tmp_path: Path) -> None:
    """The page's TOML is read, with every key known."""
    (text,) = [text for kind, text in blocks_of(PAGE) if kind == "toml"]
    file = tmp_path / "store.toml"
    file.write_text(text, encoding="utf-8")
    settings = load(file, {})
    assert (settings.node_id, settings.port, settings.replication_factor) == ("store-a", 7021, 3)


@pytest.mark.timeout(300)
async def test_a_cluster_of_plain_processes(tmp_path: Path) -> None:
    """The page's lines as they are, on ports that are free: six times ready, all in place, the quickstart counts."""
    assert shutil.which("etcd"), "etcd isn't there: run .ci/install-etcd"
    starting, looking = shell_blocks()
    clients, peers, gateway, query, alerts = free_ports(5)
    starting = starting.replace("127.0.0.1:2379", f"127.0.0.1:{clients}")
    assert "TALLYMARK_PORT=702$n" in starting
    starting = starting.replace("702$n", "0")  # stores tell one another theirs
    for port, other in (("7001", gateway), ("7011", query), ("7031", alerts)):
        assert port in starting
        starting = starting.replace(port, str(other))
    address = f"127.0.0.1:{gateway}"
    assert f"TALLYMARK_SERVER={address}\n" in starting
    environment = {name: text for name, text in os.environ.items() if not name.startswith("TALLYMARK_")}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    environment["ETCD_LISTEN_CLIENT_URLS"] = f"http://127.0.0.1:{clients}"
    environment["ETCD_ADVERTISE_CLIENT_URLS"] = f"http://127.0.0.1:{clients}"
    environment["ETCD_LISTEN_PEER_URLS"] = f"http://127.0.0.1:{peers}"
    environment["ETCD_INITIAL_ADVERTISE_PEER_URLS"] = f"http://127.0.0.1:{peers}"
    environment["ETCD_INITIAL_CLUSTER"] = f"default=http://127.0.0.1:{peers}"
    process = await asyncio.create_subprocess_exec(
        "bash",
        "-c",
        f"{starting}\nwait",
        env=environment,
        cwd=tmp_path,
        stdout=asyncio.subprocess.PIPE,
        start_new_session=True,  # a group of its own, which ends as one
    )
    try:
        assert process.stdout is not None
        for _ in range(READY):
            line = (await process.stdout.readline()).decode()
            assert line.startswith("ready"), line
        await run_command(looking.strip(), address, tmp_path)
        await run_python(QUICKSTART, address)
        await run_command(
            "tallymark cluster rebalance", address, tmp_path
        )  # looks on until all is in its place
        await run_command("tallymark cluster status --check", address, tmp_path)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
