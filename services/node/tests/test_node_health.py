"""The health check says what the role's own endpoint says."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator

import pytest

from tallymark_node import dev, health
from tallymark_node.config import Settings


@contextlib.asynccontextmanager
async def answering(answer: bytes) -> AsyncIterator[str]:
    """A server that says this to everybody and hangs up; with an empty answer, one that says nothing."""
    said = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        if not answer:
            await said.wait()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        said.set()
        server.close()
        await server.wait_closed()


@pytest.mark.parametrize(
    ("answer", "status", "sentence"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nready\n", health.READY, "ready"),
        (b"HTTP/1.1 200 OK\r\n\r\n", health.READY, "ready"),
        (
            b"HTTP/1.1 503 Service Unavailable\r\n\r\nstore: is starting\n",
            health.NOT_READY,
            "store: is starting",
        ),
        (b"HTTP/1.1 404 Not Found\r\n\r\n", health.NOT_READY, "status 404"),
        (b"HTTP/1.1 200", health.READY, "ready"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", health.NO_ANSWER, "does not speak HTTP"),
        (b"HTTP/1.1\r\n\r\n", health.NO_ANSWER, "does not speak HTTP"),
        (b"\r\n\r\n", health.NO_ANSWER, "does not speak HTTP"),
        (b"\xff" * 200_000, health.NO_ANSWER, "does not speak HTTP"),
    ],
)
async def test_answers(answer: bytes, status: int, sentence: str) -> None:
    """200 is ready; another status is not, with the reason; anything else is no answer."""
    async with answering(answer) as address:
        found, said = await asyncio.to_thread(health.check, address)
    assert found == status
    assert sentence in said


async def test_silence_is_no_answer() -> None:
    """A role whose loop is stuck takes the connection and says nothing."""
    async with answering(b"") as address:
        status, said = await asyncio.to_thread(health.check, address, 0.05)
    assert status == health.NO_ANSWER
    assert address in said


@pytest.mark.parametrize("address", ["", "here", "here:", "here:http", "here:70000", ":"])
def test_what_is_no_address(address: str) -> None:
    """Told as such, and with another status than a role that doesn't answer."""
    assert health.check(address)[0] == health.NO_ADDRESS


def test_nobody_there() -> None:
    """Nothing listens on port 1."""
    assert health.check("127.0.0.1:1")[0] == health.NO_ANSWER


async def test_addresses_that_mean_every_address() -> None:
    """A server that listens everywhere is asked on loopback."""
    async with answering(b"HTTP/1.1 200 OK\r\n\r\n") as address:
        port = address.rsplit(":", 1)[1]
        for host in ("0.0.0.0", ""):
            assert await asyncio.to_thread(health.check, f"{host}:{port}") == (health.READY, "ready")


async def test_as_a_command() -> None:
    """It asks its argument, or else what TALLYMARK_TELEMETRY names."""
    async with answering(b"HTTP/1.1 200 OK\r\n\r\n") as address:
        for arguments, environment in (([address], {}), ([], {"TALLYMARK_TELEMETRY": address})):
            status = await asyncio.to_thread(health.main, arguments, environment)
            assert status == health.READY
    assert health.main([], {}) == health.NO_ADDRESS


def test_it_starts_without_the_rest_of_the_program() -> None:
    """It runs every few seconds on every node."""
    heavy = {"click", "msgspec", "numba", "asyncio"}
    script = f"import sys, tallymark_node.health; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.timeout(300)
async def test_a_real_server(tmp_path) -> None:
    """A server that serves is ready; one that has ended isn't there."""
    settings = Settings(port=0, data_dir=str(tmp_path), telemetry="127.0.0.1:0")
    async with dev.running(settings) as node:
        assert await asyncio.to_thread(health.check, node.monitor.address) == (health.READY, "ready")
        address = node.monitor.address
    assert (await asyncio.to_thread(health.check, address))[0] == health.NO_ANSWER
