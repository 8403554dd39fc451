"""The HTTP endpoint: its three answers, and what garbage, slowness and length get."""

from __future__ import annotations

import asyncio
import contextlib
import random

import pytest
import uvloop

from tallymark_runtime.clock import ManualClock
from tallymark_runtime.readiness import Readiness
from tallymark_runtime.telemetry import Family, Telemetry
from tallymark_runtime.telemetry_endpoint import REQUEST_BYTES_MAX, Endpoint

WAIT_S = 20.0  # bound of what has to happen soon
DEPTH = Family("tallymark_test_depth", "gauge", "Depth.")


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def run(request):
    """Run a coroutine function on each kind of loop, with a bound."""

    def run_on(main, *args):
        with asyncio.Runner(loop_factory=request.param) as runner:
            return runner.run(asyncio.wait_for(main(*args), 3 * WAIT_S))

    return run_on


@contextlib.asynccontextmanager
async def _serving(**options):
    telemetry = Telemetry(ManualClock(), node_id="n", version="v")
    telemetry.add("store", lambda scrape: scrape.add(DEPTH, 7))
    readiness = Readiness()
    readiness.add("store", lambda: "")
    endpoint = Endpoint(telemetry, readiness, **options)
    await endpoint.start("127.0.0.1:0")
    try:
        yield endpoint, readiness
    finally:
        await endpoint.close()


async def _open(endpoint):
    host, _, port = endpoint.address.rpartition(":")
    return await asyncio.open_connection(host, int(port))


async def _ask(endpoint, request, *, eof=False):
    """Send bytes, read to the end: status, headers, body."""
    reader, writer = await _open(endpoint)
    try:
        writer.write(request)
        if eof:
            writer.write_eof()
        answer = await asyncio.wait_for(reader.read(), WAIT_S)
    finally:
        writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    assert lines[0].startswith("HTTP/1.1 ")
    headers = dict(line.lower().split(": ", 1) for line in lines[1:])
    assert headers["connection"] == "close"
    assert headers["content-length"].isdigit()
    return int(lines[0].split()[1]), headers, body


def _get(path):
    return f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()


async def _is_well(endpoint):
    status, _, body = await _ask(endpoint, _get("/healthz"))
    return (status, body) == (200, b"alive\n")


async def _until(condition):
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110 - sockets end when they end
            await asyncio.sleep(0.005)


def test_the_three_answers(run):
    """Telemetry as text, liveness and readiness as a status and the reasons."""

    async def main():
        async with _serving() as (endpoint, readiness):
            status, headers, body = await _ask(endpoint, _get("/metrics"))
            assert status == 200
            assert headers["content-type"].startswith("text/plain; version=0.0.4")
            assert int(headers["content-length"]) == len(body)
            assert b"\ntallymark_test_depth 7.0\n" in body
            assert (await _ask(endpoint, _get("/metrics?x=1")))[0] == 200
            assert (await _ask(endpoint, _get("/readyz")))[::2] == (200, b"ready\n")
            readiness.add("query", lambda: "no leader\nat all")
            assert (await _ask(endpoint, _get("/readyz")))[::2] == (503, b"query: no leader at all\n")
            assert await _is_well(endpoint)
            readiness.add_fatal("store", lambda: "the log failed")
            assert (await _ask(endpoint, _get("/healthz")))[::2] == (503, b"store: the log failed\n")

    run(main)


def test_head_and_older_clients(run):
    """HEAD gets the head alone; a client of HTTP/1.0 and one that half-closes get their answers."""

    async def main():
        async with _serving() as (endpoint, _):
            full = await _ask(endpoint, _get("/metrics"))
            status, headers, body = await _ask(endpoint, b"HEAD /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
            assert (status, body) == (200, b"")
            assert headers["content-length"] == full[1]["content-length"]
            assert (await _ask(endpoint, b"GET /readyz HTTP/1.0\r\n\r\n"))[::2] == (200, b"ready\n")
            assert (await _ask(endpoint, _get("/readyz"), eof=True))[::2] == (200, b"ready\n")

    run(main)


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"POST /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc", 405),
        (b"GET /metrics HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n", 200),
        (b"GET /nothing HTTP/1.1\r\nHost: x\r\n\r\n", 404),
        (b"GET /%2e%2e/etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n", 404),
        (b"GET /metrics HTTP/1.1\r\n\r\n", 400),  # no Host
        (b"GET /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
        (b"GET /metrics\r\n\r\n", 400),
        (b"PRI * HTTP/2.0\r\nHost: x\r\n\r\nSM\r\n\r\n", 405),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00\r\n\r\n", 400),  # TLS
        (b"\r\n\x00\xff garbage \r\n\r\n", 400),
        (b"TMK1" + bytes(64) + b"\n\r\n", 400),
    ],
    ids=[
        "post",
        "body",
        "unknown",
        "escaped",
        "no-host",
        "negative",
        "two-lengths",
        "http09",
        "http2",
        "tls",
        "noise",
        "frames",
    ],
)
def test_what_is_no_request_gets_an_answer_and_does_no_harm(run, request_bytes, status):
    """Each is answered once, with a status that says so, and the next caller is served."""

    async def main():
        async with _serving() as (endpoint, _):
            assert (await _ask(endpoint, request_bytes, eof=True))[0] == status
            assert await _is_well(endpoint)
            await _until(lambda: not endpoint.connections)

    run(main)


def test_half_a_request_and_the_end_get_the_end(run):
    """Nothing is answered to what is no request yet when its sender has finished."""

    async def main():
        async with _serving() as (endpoint, _):
            reader, writer = await _open(endpoint)
            writer.write(b"GET /metrics HTT")
            writer.write_eof()
            assert await asyncio.wait_for(reader.read(), WAIT_S) == b""
            writer.close()
            await _until(lambda: not endpoint.connections)

    run(main)


def test_random_bytes_never_get_more_than_an_answer(run):
    """Noise, and requests with noise in them, get an answer or the end of the connection, never silence."""

    async def main():
        rng = random.Random(7)
        async with _serving(deadline_s=WAIT_S) as (endpoint, _):
            for number in range(60):
                noise = bytearray(_get("/metrics") if number % 2 else rng.randbytes(rng.randrange(1, 400)))
                for _ in range(rng.randrange(1, 6)):
                    noise[rng.randrange(len(noise))] = rng.randrange(256)
                reader, writer = await _open(endpoint)
                writer.write(bytes(noise))
                writer.write_eof()
                answer = await asyncio.wait_for(reader.read(), WAIT_S)
                assert answer == b"" or answer.startswith(b"HTTP/1.1 ")
                writer.close()
            assert await _is_well(endpoint)
            await _until(lambda: not endpoint.connections)

    run(main)


@pytest.mark.parametrize("size", [REQUEST_BYTES_MAX + 1, 200_000])
@pytest.mark.parametrize("shape", [b"GET /%b HTTP/1.1\r\nHost: x\r\n\r\n", b"GET / HTTP/1.1\r\nX: %b", b"%b"])
def test_a_request_that_is_too_long_is_told_so(run, size, shape):
    """In one piece or without an end: the answer comes, though much of the request was never read."""

    async def main():
        async with _serving() as (endpoint, _):
            assert (await _ask(endpoint, shape % (b"a" * size)))[0] == 431
            assert await _is_well(endpoint)

    run(main)


def test_an_endless_request_is_cut(run):
    """Who goes on sending after the answer is read for a while, in order to hear it, and then no more."""

    async def main():
        async with _serving() as (endpoint, _):
            _, writer = await _open(endpoint)

            async def send():
                for _ in range(10_000):
                    writer.write(b"a" * 65_536)
                    await asyncio.wait_for(writer.drain(), WAIT_S)

            with pytest.raises(OSError):
                await send()
            writer.close()
            await _until(lambda: not endpoint.connections)

    run(main)


def test_a_slow_caller_is_cut_at_the_deadline(run):
    """Silence, half a request, and an answer that nobody reads the end of: all end by the same deadline."""

    async def main():
        async with _serving(deadline_s=0.2) as (endpoint, _):
            silent = await _open(endpoint)
            half = await _open(endpoint)
            half[1].write(b"GET /metrics HTTP/1.1\r\nHos")
            lingering = await _open(endpoint)
            lingering[1].write(_get("/metrics"))
            for reader, _ in (silent, half):
                with contextlib.suppress(ConnectionError):
                    assert await asyncio.wait_for(reader.read(), WAIT_S) == b""
            await _until(lambda: not endpoint.connections)
            for _, writer in (silent, half, lingering):
                writer.close()
            assert await _is_well(endpoint)

    run(main)


def test_bytes_one_at_a_time_are_a_request_all_the_same(run):
    """A request in many pieces is answered once it is whole."""

    async def main():
        async with _serving() as (endpoint, _):
            reader, writer = await _open(endpoint)
            for byte in _get("/readyz"):
                writer.write(bytes([byte]))
                await writer.drain()
            assert (await asyncio.wait_for(reader.read(), WAIT_S)).endswith(b"\r\n\r\nready\n")
            writer.close()

    run(main)


def test_pipelined_requests_get_one_answer(run):
    """One request a connection: what follows it is dropped, and can't queue up answers."""

    async def main():
        async with _serving() as (endpoint, _):
            status, _, body = await _ask(endpoint, _get("/healthz") * 50, eof=True)
            assert (status, body) == (200, b"alive\n")

    run(main)


def test_connections_are_bounded(run):
    """Over the bound a connection is cut at once; when others go there is room again."""

    async def main():
        async with _serving(connections_max=3) as (endpoint, _):
            held = [await _open(endpoint) for _ in range(3)]
            await _until(lambda: len(endpoint.connections) == 3)
            reader, writer = await _open(endpoint)
            with contextlib.suppress(ConnectionError):
                assert await asyncio.wait_for(reader.read(), WAIT_S) == b""
            writer.close()
            assert len(endpoint.connections) == 3
            for _, other in held:
                other.close()
            await _until(lambda: not endpoint.connections)
            assert await _is_well(endpoint)

    run(main)


def test_a_check_that_fails_is_an_error_not_a_silence(run, caplog):
    """A defect in a check answers 500 and is logged."""

    async def main():
        async with _serving() as (endpoint, readiness):
            readiness.add("store", lambda: 1 / 0)
            assert (await _ask(endpoint, _get("/readyz")))[0] == 500
            assert await _is_well(endpoint)

    run(main)
    assert "could not be answered" in caplog.text


def test_closing_cuts_what_stands(run):
    """The end waits for no caller, and nobody can connect after it."""

    async def main():
        async with _serving() as (endpoint, _):
            reader, writer = await _open(endpoint)
            await _until(lambda: len(endpoint.connections) == 1)
        with contextlib.suppress(ConnectionError):
            assert await asyncio.wait_for(reader.read(), WAIT_S) == b""
        writer.close()
        with pytest.raises(OSError):
            await _open(endpoint)

    run(main)
