"""Posting over HTTP: what endpoints may do is an outcome, and nobody is reached who may not be."""

from __future__ import annotations

import asyncio
import socket
import ssl
import struct
import subprocess
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from tallymark_alerts.webhooks.schedule import OutcomeKind
from tallymark_alerts.webhooks.sender import AddressInfo, HttpSender, Lookups, system_lookup

from .alerts_webhook_fakes import Endpoint

HEADERS = {"webhook-id": "a", "content-type": "application/json"}
BODY = b'{"type":"alert.raised"}'


def answers(*addresses: str, port: int | None = None) -> Callable[[str, int], list[AddressInfo]]:
    """A resolver that knows one answer."""

    def lookup(host: str, asked: int) -> list[AddressInfo]:
        found: list[AddressInfo] = []
        for address in addresses:
            if ":" in address:
                found.append((socket.AF_INET6, socket.SOCK_STREAM, 6, "", (address, port or asked, 0, 0)))
            else:
                found.append((socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port or asked)))
        return found

    return lookup


@pytest.fixture
async def make() -> AsyncIterator[Callable[..., HttpSender]]:
    """Makes senders, and closes them."""
    made: list[HttpSender] = []

    def make_sender(url: str, lookup: Any = system_lookup, **more: Any) -> HttpSender:
        options = {"allow_private": True, "connections": 4} | more
        made.append(HttpSender(url, Lookups(lookup), **options))
        return made[-1]

    yield make_sender
    for sender in made:
        await sender.close()


@pytest.mark.parametrize("status", [200, 201, 202, 204, 299])
async def test_2xx_is_delivered(make: Callable[..., HttpSender], status: int) -> None:
    """Any of them; the request is a POST with the headers and the body as they were given."""
    async with Endpoint(lambda request, number: web.Response(status=status)) as endpoint:
        outcome = await make(endpoint.url).post(HEADERS, BODY)
        assert (outcome.kind, outcome.error) == (OutcomeKind.DELIVERED, "")
        ((headers, body),) = endpoint.got
        assert body == BODY
        assert headers["webhook-id"] == "a"
        assert headers["content-type"] == "application/json"


@pytest.mark.parametrize("status", [400, 401, 404, 429, 500, 503])
async def test_other_statuses_are_failures(make: Callable[..., HttpSender], status: int) -> None:
    """The outcome says which."""
    async with Endpoint(lambda request, number: web.Response(status=status, text="x" * 1_000)) as endpoint:
        outcome = await make(endpoint.url).post(HEADERS, BODY)
        assert (outcome.kind, outcome.error) == (OutcomeKind.STATUS, f"the endpoint answered {status}")


async def test_gone_is_told_apart(make: Callable[..., HttpSender]) -> None:
    """410 pauses the webhook."""
    async with Endpoint(lambda request, number: web.Response(status=410)) as endpoint:
        assert (await make(endpoint.url).post(HEADERS, BODY)).is_gone


async def test_redirects_are_not_followed(make: Callable[..., HttpSender]) -> None:
    """Nothing is asked of where they lead, whatever the kind of redirect."""
    async with Endpoint() as target:
        for status in (301, 302, 303, 307, 308):

            def answer(request: web.Request, number: int, status: int = status) -> web.Response:
                return web.Response(status=status, headers={"location": target.url})

            async with Endpoint(answer) as endpoint:
                outcome = await make(endpoint.url).post(HEADERS, BODY)
                assert outcome.kind is OutcomeKind.STATUS
                assert outcome.error == f"the endpoint answered {status}, and redirects are not followed"
                assert len(endpoint.got) == 1
        assert target.got == []


async def test_an_endpoint_that_hangs_times_out(make: Callable[..., HttpSender]) -> None:
    """Before it answers at all; the connection is given up."""

    async def answer() -> web.Response:
        await asyncio.Event().wait()
        raise AssertionError("never")

    async with Endpoint(lambda request, number: answer()) as endpoint:
        outcome = await make(endpoint.url, timeout_s=0.2).post(HEADERS, BODY)
        assert (outcome.kind, outcome.error) == (OutcomeKind.TIMEOUT, "no answer within 0.2 s")


async def serve_raw(answer: bytes, *, reset: bool = False, hold: bool = False) -> tuple[asyncio.Server, str]:
    """A server that says something to every request, and then ends, resets or holds the connection."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        if hold:
            await reader.read()
        elif reset:
            connection = writer.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
            return
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    return server, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"


@pytest.mark.parametrize(
    ("answer", "reset"),
    [
        (b"", True),
        (b"", False),
        (b"HTTP/1.1 2", True),
        (b"nonsense\r\n\r\n", False),
        (b"HTTP/1.1 200 OK\r\n" + b"x: " + b"y" * 100_000 + b"\r\n\r\n", False),
        (b"HTTP/1.1 99999 OK\r\n\r\n", False),
        (b"\x16\x03\x01\x00\x00", False),
    ],
)
async def test_what_is_no_answer_is_a_failure(
    make: Callable[..., HttpSender], answer: bytes, reset: bool
) -> None:
    """Resets, ends, nonsense, headers without end: all of them failures of the connection."""
    server, url = await serve_raw(answer, reset=reset)
    async with server:
        outcome = await make(url).post(HEADERS, BODY)
        assert outcome.kind is OutcomeKind.CONNECTION
        assert 0 < len(outcome.error) <= 200


async def test_the_status_counts_however_the_body_goes_on(make: Callable[..., HttpSender]) -> None:
    """A body that never ends, or drips, or is cut off after its status: delivered, and read within bounds."""
    for answer, hold in (
        (b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nx", True),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nx", False),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 100000000\r\n\r\n" + b"x" * 1_000_000, True),
    ):
        server, url = await serve_raw(answer, hold=hold)
        async with server:
            assert (await make(url, timeout_s=10).post(HEADERS, BODY)).is_delivered


async def test_nobody_listens(make: Callable[..., HttpSender]) -> None:
    """A refused connection is a failure, also where a name leads there."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    for host in ("127.0.0.1", "nobody.example"):
        outcome = await make(f"http://{host}:{port}/", answers("127.0.0.1")).post(HEADERS, BODY)
        assert outcome.kind is OutcomeKind.CONNECTION


async def test_a_connection_is_used_again(make: Callable[..., HttpSender]) -> None:
    """One after the other over the same; a closed one in between is no failure."""
    ports: list[Any] = []

    def answer(request: web.Request, number: int) -> web.Response:
        assert request.transport is not None
        ports.append(request.transport.get_extra_info("peername"))
        response = web.Response(text="fine")
        if number == 3:
            response.force_close()
        return response

    async with Endpoint(answer) as endpoint:
        sender = make(endpoint.url)
        for _ in range(5):
            assert (await sender.post(HEADERS, BODY)).is_delivered
        assert len(ports) == 5
        assert len(set(ports)) == 2


async def test_an_idle_connection_that_its_server_closes_costs_no_attempt(
    make: Callable[..., HttpSender],
) -> None:
    """The server ends it instead of answering the second request: that is posted again over a new one, at once."""
    requests: list[int] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for number in (1, 2):
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
            await reader.readexactly(length)
            requests.append(number)
            if number == 2:
                break
            writer.write(b"HTTP/1.1 204 No Content\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with server:
        sender = make(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/")
        assert (await sender.post(HEADERS, BODY)).is_delivered
        assert (await sender.post(HEADERS, BODY)).is_delivered
        assert requests == [1, 2, 1]


# ------------------------------------------------------------ addresses


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "intern.example", "mixed.example"])
async def test_private_addresses_are_refused_at_the_connection(
    make: Callable[..., HttpSender], host: str
) -> None:
    """By a literal, by a name, and by a name of which one address of several is private. Nothing is sent."""
    lookups = {
        "localhost": answers("127.0.0.1"),
        "intern.example": answers("10.0.0.1"),
        "mixed.example": answers("8.8.8.8", "127.0.0.1"),
    }
    async with Endpoint() as endpoint:
        sender = make(
            f"http://{host}:{endpoint.port}/", lookups.get(host, system_lookup), allow_private=False
        )
        outcome = await sender.post(HEADERS, BODY)
        assert outcome.kind is OutcomeKind.ADDRESS
        assert "is not public" in outcome.error
        assert endpoint.got == []


@pytest.mark.parametrize(
    "address", ["::ffff:127.0.0.1", "64:ff9b::7f00:1", "fe80::1", "169.254.169.254", "0.0.0.0"]
)
async def test_disguised_addresses_are_refused(make: Callable[..., HttpSender], address: str) -> None:
    """IPv4 inside IPv6, link-local, a cloud's metadata, the unspecified address."""
    sender = make("http://a.example/", answers(address), allow_private=False)
    assert (await sender.post(HEADERS, BODY)).kind is OutcomeKind.ADDRESS


async def test_other_forms_of_loopback_lead_nowhere(make: Callable[..., HttpSender]) -> None:
    """What C libraries take for 127.0.0.1 reaches nobody."""
    async with Endpoint() as endpoint:
        for host in ("127.1", "2130706433", "0x7f000001", "0177.0.0.1"):
            sender = make(f"http://{host}:{endpoint.port}/", allow_private=False)
            outcome = await sender.post(HEADERS, BODY)
            assert outcome.kind in (OutcomeKind.ADDRESS, OutcomeKind.CONNECTION)
        assert endpoint.got == []


async def test_the_address_that_was_checked_is_the_one_connected_to(make: Callable[..., HttpSender]) -> None:
    """A name that leads elsewhere at every lookup is looked up once for a connection."""
    calls: list[str] = []
    async with Endpoint() as endpoint:

        def rebinding(host: str, port: int) -> list[AddressInfo]:
            calls.append(host)
            return answers("192.0.2.1" if len(calls) == 1 else "127.0.0.1")(host, port)

        sender = make(f"http://rebind.example:{endpoint.port}/", rebinding, allow_private=False)
        for _ in range(3):
            assert (await sender.post(HEADERS, BODY)).kind is OutcomeKind.ADDRESS
        assert len(calls) == 3
        assert endpoint.got == []


async def test_a_socket_is_made_for_no_address_that_is_not_public(make: Callable[..., HttpSender]) -> None:
    """The last check stands by itself: where the lookup's check were passed, the socket's refuses."""
    sender = make("http://a.example/", allow_private=False)
    with pytest.raises(OSError, match=r"127\.0\.0\.1 is not public"):
        sender._make_socket((socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 80)))
    sender._make_socket((socket.AF_INET, socket.SOCK_STREAM, 6, "", ("8.8.8.8", 80))).close()


# ------------------------------------------------------------ lookups


async def test_a_lookup_that_hangs_delays_no_other(make: Callable[..., HttpSender]) -> None:
    """Names whose lookups hang, more of them than there are threads for such; a good name is found at once."""
    release = threading.Event()

    def lookup(host: str, port: int) -> list[AddressInfo]:
        if host.startswith("dead"):
            release.wait(30)
            raise socket.gaierror(socket.EAI_AGAIN, "no answer")
        return answers("127.0.0.1")(host, port)

    lookups = Lookups(lookup)
    async with Endpoint() as endpoint:
        dead = [
            HttpSender(
                f"http://dead{i}.example:{endpoint.port}/",
                lookups,
                allow_private=True,
                connections=1,
                timeout_s=0.3,
            )
            for i in range(20)
        ]
        good = HttpSender(
            f"http://good.example:{endpoint.port}/", lookups, allow_private=True, connections=1, timeout_s=10
        )
        for _ in range(3):  # after the first time they are suspect, and have few threads for all of them
            outcomes = await asyncio.gather(*(sender.post(HEADERS, BODY) for sender in dead))
            assert {outcome.kind for outcome in outcomes} == {OutcomeKind.TIMEOUT}
        assert (await good.post(HEADERS, BODY)).is_delivered
        assert sum(thread.name == "webhook-lookup" for thread in threading.enumerate()) <= 32 + 8
        release.set()
        for sender in (*dead, good):
            await sender.close()


@pytest.mark.parametrize(
    "error", [socket.gaierror(socket.EAI_NONAME, "unknown"), UnicodeError("label too long")]
)
async def test_a_name_that_is_not_found_is_a_failure(
    make: Callable[..., HttpSender], error: Exception
) -> None:
    """Of the connection; the next attempt asks again."""

    def lookup(host: str, port: int) -> list[AddressInfo]:
        raise error

    sender = make("http://unknown.example/", lookup)
    for _ in range(2):
        assert (await sender.post(HEADERS, BODY)).kind is OutcomeKind.CONNECTION
    assert (await make("http://empty.example/", answers()).post(HEADERS, BODY)).kind is OutcomeKind.CONNECTION


# ------------------------------------------------------------ TLS


async def test_certificates_are_verified(make: Callable[..., HttpSender], tmp_path: Path) -> None:
    """One that no authority has signed is refused before anything is sent."""
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    command += ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    await asyncio.to_thread(
        subprocess.run,
        [*command, "-keyout", str(key), "-out", str(certificate)],
        check=True,
        capture_output=True,
    )
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    got: list[bytes] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        got.append(await reader.read(1))
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0, ssl=context)
    async with server:
        url = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
        outcome = await make(url).post(HEADERS, BODY)
        assert outcome.kind is OutcomeKind.CONNECTION
        assert outcome.error.startswith("its certificate is not valid")
        assert got == []


async def test_lookups_go_on_after_threads_could_not_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    """However often one couldn't be started: no slot is taken for a lookup that never began."""

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    lookups = Lookups(answers("127.0.0.1"))
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        for number in range(100):
            with pytest.raises(RuntimeError, match="new thread"):
                await lookups.find("example.org", 80, is_suspect=number % 2 == 0)
    async with asyncio.timeout(20):
        for is_suspect in (False, True):
            assert len(await lookups.find("example.org", 80, is_suspect=is_suspect)) == 1


async def test_a_lookup_that_breaks_gives_its_slot_back() -> None:
    """Whatever it raises, the caller hears of it, and the next ones are looked up."""
    is_broken = True

    def lookup(host: str, port: int) -> list[AddressInfo]:
        if is_broken:
            raise ValueError("a defect of a resolver")
        return answers("127.0.0.1")(host, port)

    lookups = Lookups(lookup)
    async with asyncio.timeout(20):
        for number in range(100):
            with pytest.raises(ValueError, match="a defect"):
                await lookups.find("example.org", 80, is_suspect=number % 2 == 0)
        is_broken = False
        for is_suspect in (False, True):
            assert len(await lookups.find("example.org", 80, is_suspect=is_suspect)) == 1
