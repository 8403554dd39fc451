"""Frame server and peer client over real loopback sockets."""

import asyncio
import random
from contextlib import asynccontextmanager

import pytest

from tallymark_protocol import limits
from tallymark_protocol.codec import decode_error, encode
from tallymark_protocol.connection import Connection, Role, State
from tallymark_protocol.errors import (
    BackpressureError,
    ErrorCode,
    InvalidRequestError,
    LocalProtocolError,
    NotFoundError,
    RemoteProtocolError,
    ServerError,
    TallymarkError,
    UnavailableError,
)
from tallymark_protocol.messages import (
    CoordinatorCall,
    CoordinatorResult,
    FrameType,
    GetTopology,
    Hello,
    StatusResult,
    StoreStatus,
    Topology,
    Welcome,
)
from tallymark_runtime.framing import join_address, split_address
from tallymark_runtime.peer import PeerClient, PeerOptions
from tallymark_runtime.transport import FrameServer, HandlerBase, ServerLimits

WAIT_S = 10.0  # a bound that only a defect reaches


async def until(condition):
    """Let the loop run until a condition holds that nobody announces."""
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0)


class Recorder(HandlerBase):
    """Keeps what comes; answers INGEST at once unless told to hold."""

    def __init__(self):
        self.reads = []  # request ids, by read
        self.waiting = []  # (connection, frame) not answered
        self.holding = False
        self.gone = []
        self.arrived = asyncio.Event()
        self.cancelled = 0
        self.go_on = asyncio.Event()

    def on_frames(self, connection, frames):
        self.reads.append([frame.request_id for frame in frames])
        for frame in frames:
            if self.holding:
                self.waiting.append((connection, frame))
            else:
                connection.respond(frame.request_id, frame.type + 1, frame.body)
        self.arrived.set()

    async def on_call(self, connection, call):
        if isinstance(call, StoreStatus):
            return StatusResult("node", [], 1, False)
        if isinstance(call, CoordinatorCall):
            match call.operation:
                case "wait":
                    self.arrived.set()
                    try:
                        await self.go_on.wait()
                    except asyncio.CancelledError:
                        self.cancelled += 1
                        raise
                    return CoordinatorResult(b"done")
                case "large":
                    return CoordinatorResult(bytes(limits.FRAME_BYTES_MAX + 1))
                case "missing":
                    raise NotFoundError("nothing there", details={"name": "x"})
                case "defect":
                    raise KeyError("secret")
        return await super().on_call(connection, call)

    def on_disconnect(self, connection):
        self.gone.append(connection.id)
        self.arrived.set()

    async def wait(self, condition):
        async with asyncio.timeout(WAIT_S):
            while not condition():
                self.arrived.clear()
                await self.arrived.wait()


def welcome():
    return Welcome(0, "node-1", "ingest", 123, ["a"], Topology(4, ["x:1"]), 100_000, 1 << 24)


@asynccontextmanager
async def serving(*, limits=None, options=None):
    """A server with its recorder, and a client of it."""
    recorder = Recorder()
    server = FrameServer(recorder, welcome, limits=limits or ServerLimits())
    client = PeerClient(await server.start(), rng=random.Random(1), options=options or PeerOptions())
    try:
        yield server, recorder, client
    finally:
        recorder.go_on.set()
        await client.close()
        await server.close(deadline_s=2)


class RawClient(asyncio.Protocol):
    """A socket with a Connection and no manners."""

    def __init__(self):
        self.connection = Connection(Role.CLIENT)
        self.frames = []
        self.changed = asyncio.Event()
        self.is_lost = False

    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, data):
        self.frames += self.connection.receive_data(data)
        self.changed.set()

    def connection_lost(self, exc):
        self.is_lost = True
        self.changed.set()

    async def wait(self, condition):
        async with asyncio.timeout(WAIT_S):
            while not condition():
                self.changed.clear()
                await self.changed.wait()


@asynccontextmanager
async def raw_client(address, *, greet=True):
    host, port = split_address(address)
    transport, client = await asyncio.get_running_loop().create_connection(RawClient, host, port)
    try:
        if greet:
            transport.write(client.connection.initiate(Hello(1, 1, "raw")))
            await client.wait(lambda: client.connection.is_open)
        yield client
    finally:
        transport.abort()
        await client.wait(lambda: client.is_lost)


# ---------------------------------------------------------------- requests


async def test_requests_are_answered():
    """A round trip of each kind, with the handshake done on the way."""
    async with serving() as (_, _, client):
        assert not client.is_connected
        frame = await client.request(FrameType.INGEST, b"chunk")
        assert (frame.type, frame.body) == (FrameType.RECEIPT, b"chunk")
        frame = await client.request(FrameType.APPEND, b"pay", bytearray(b"lo"), memoryview(b"ad"))
        assert (frame.type, frame.body) == (FrameType.APPENDED, b"payload")
        assert await client.call(StoreStatus(), StatusResult) == StatusResult("node", [], 1, False)
        assert client.is_connected
        assert client.welcome.node_id == "node-1"
        assert client.welcome.topology.partition_count == 4
        assert client.in_flight_bytes == 0


async def test_requests_of_one_tick_arrive_in_one_read():
    """Both sides join what is written in one tick of the loop, so the handler sees them together."""
    async with serving() as (_, recorder, client):
        await client.connect()
        futures = [client.submit(FrameType.INGEST, b"%d" % i, timeout_s=WAIT_S) for i in range(100)]
        frames = await asyncio.gather(*futures)
        assert [frame.body for frame in frames] == [b"%d" % i for i in range(100)]
        assert len(recorder.reads) == 1


async def test_answers_find_their_requests_in_any_order():
    """They are matched by id."""
    async with serving() as (_, recorder, client):
        await client.connect()
        recorder.holding = True
        futures = [client.submit(FrameType.INGEST, b"%d" % i, timeout_s=WAIT_S) for i in range(50)]
        await recorder.wait(lambda: len(recorder.waiting) == 50)
        random.Random(4).shuffle(recorder.waiting)
        for connection, frame in recorder.waiting:
            connection.respond(frame.request_id, FrameType.RECEIPT, frame.body, b"!")
        assert [f.body for f in await asyncio.gather(*futures)] == [b"%d!" % i for i in range(50)]


async def test_large_bodies_pass_both_ways():
    """Beyond every buffer on the way."""
    async with serving() as (_, _, client):
        body = random.Random(5).randbytes(8 * 1024 * 1024)
        frames = await asyncio.gather(*(client.request(FrameType.INGEST, body) for _ in range(3)))
        assert all(frame.body == body for frame in frames)


async def test_errors_arrive_as_exceptions():
    """With code, message and details; a defect's text stays inside."""
    async with serving() as (_, recorder, client):
        with pytest.raises(NotFoundError, match="nothing there") as caught:
            await client.call(CoordinatorCall("missing", b""), CoordinatorResult)
        assert caught.value.details == {"name": "x"}
        with pytest.raises(ServerError) as caught:
            await client.call(CoordinatorCall("defect", b""), CoordinatorResult)
        assert "secret" not in caught.value.message
        with pytest.raises(InvalidRequestError, match="GetTopology"):
            await client.call(GetTopology(), Topology)
        with pytest.raises(InvalidRequestError, match="malformed call"):
            await client.request(FrameType.CALL, b"\xc1")
        recorder.holding = True
        future = client.submit(FrameType.INGEST, b"x", timeout_s=WAIT_S)
        await recorder.wait(lambda: recorder.waiting)
        connection, frame = recorder.waiting[0]
        connection.respond_error(frame.request_id, BackpressureError("full"))
        with pytest.raises(BackpressureError, match="full"):
            await future


async def test_an_answer_that_is_too_large_is_an_error():
    """Of that request, and the connection goes on."""
    async with serving() as (_, _, client):
        with pytest.raises(InvalidRequestError, match="too large") as caught:
            await client.call(CoordinatorCall("large", b""), CoordinatorResult)
        assert caught.value.code == ErrorCode.TOO_LARGE
        with pytest.raises(LocalProtocolError):
            await client.request(FrameType.CALL, bytes(limits.CALL_BYTES_MAX + 1))
        assert client.in_flight_bytes == 0
        await client.call(StoreStatus(), StatusResult)


async def test_a_handler_that_takes_no_requests_refuses_them():
    """The base class answers each with an error."""
    server = FrameServer(HandlerBase(), welcome)
    client = PeerClient(await server.start(), rng=random.Random(1))
    with pytest.raises(InvalidRequestError, match="doesn't take"):
        await client.request(FrameType.INGEST, b"")
    await client.close()
    await server.close()


# ---------------------------------------------------------------- time


async def test_a_request_times_out_and_its_late_answer_is_ignored():
    """The connection goes on, and the id's answer meets nobody."""
    async with serving() as (_, recorder, client):
        await client.connect()
        recorder.holding = True
        with pytest.raises(UnavailableError) as caught:
            await client.request(FrameType.INGEST, b"late", timeout_s=0.03)
        assert caught.value.code == ErrorCode.TIMEOUT
        assert client.in_flight_bytes == 0
        connection, frame = recorder.waiting[0]
        assert frame.timeout_ms in range(1, 31)
        recorder.holding = False
        connection.respond(frame.request_id, FrameType.RECEIPT, b"late")
        assert (await client.request(FrameType.INGEST, b"next")).body == b"next"
        assert client.is_connected


async def test_deadlines_are_kept_whatever_their_order():
    """A short one behind a long one is not late."""
    async with serving() as (_, recorder, client):
        await client.connect()
        recorder.holding = True
        long = client.submit(FrameType.INGEST, b"long", timeout_s=WAIT_S)
        short = [client.submit(FrameType.INGEST, b"short", timeout_s=0.01 * i) for i in (3, 1, 2)]
        for future in short:
            with pytest.raises(UnavailableError):
                await future
        assert not long.done()
        connection, frame = recorder.waiting[0]
        connection.respond(frame.request_id, FrameType.RECEIPT, b"")
        await long


async def test_a_peer_that_says_nothing_at_all_is_given_up():
    """After a timeout it is pinged, and cut when it stays silent; the next request connects anew."""

    class Mute(asyncio.Protocol):
        def connection_made(self, transport):
            self.connection = Connection(Role.SERVER)
            self.transport = transport

        def data_received(self, data):
            if self.connection.hello is None:
                self.connection.receive_data(data)
                self.transport.write(self.connection.accept(welcome()))

    loop = asyncio.get_running_loop()
    server = await loop.create_server(Mute, "127.0.0.1", 0)
    address = join_address(*server.sockets[0].getsockname()[:2])
    client = PeerClient(address, rng=random.Random(1), options=PeerOptions(silence_max_s=0.02))
    await client.connect()
    long = client.submit(FrameType.INGEST, b"", timeout_s=WAIT_S)
    with pytest.raises(UnavailableError):
        await client.request(FrameType.INGEST, b"", timeout_s=0.01)
    with pytest.raises(UnavailableError, match="stopped answering"):
        await long
    assert not client.is_connected
    await client.close()
    server.close()
    await server.wait_closed()


class Deaf(asyncio.Protocol):
    """A server that greets, and from then on reads and answers nothing, like a process that was stopped."""

    def __init__(self):
        self.connection = Connection(Role.SERVER)
        self.bytes_read = 0

    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, data):
        if self.connection.hello is None:
            self.connection.receive_data(data)
            self.transport.write(self.connection.accept(welcome()))
            self.transport.pause_reading()
            return
        self.bytes_read += len(data)
        self.transport.pause_reading()


@asynccontextmanager
async def deaf_server():
    loop = asyncio.get_running_loop()
    made = []

    def make():
        made.append(Deaf())
        return made[-1]

    server = await loop.create_server(make, "127.0.0.1", 0)
    yield join_address(*server.sockets[0].getsockname()[:2]), made
    for one in made:
        one.transport.abort()
    server.close()
    await server.wait_closed()


async def test_a_silent_peer_is_given_up_long_before_its_answers_time_out():
    """A request that is out for `ping_after_s` has it pinged, whatever time the request has."""
    options = PeerOptions(ping_after_s=0.01, silence_max_s=0.02)
    async with deaf_server() as (address, _):
        client = PeerClient(address, rng=random.Random(1), options=options)
        lost = []
        client.on_disconnect = lambda: lost.append(1)
        await client.connect()
        with pytest.raises(UnavailableError, match="stopped answering") as caught:
            await client.request(FrameType.INGEST, b"x", timeout_s=3_600.0)
        assert caught.value.code == ErrorCode.TIMEOUT
        assert lost == [1]
        assert client.in_flight_bytes == 0
        await client.close()


async def test_a_peer_that_takes_what_it_is_sent_is_alive():
    """A large request over a slow network is not cut for lack of an answer."""
    options = PeerOptions(ping_after_s=0.01, silence_max_s=0.1)
    async with deaf_server() as (address, made):
        client = PeerClient(address, rng=random.Random(1), options=options)
        await client.connect()
        future = client.submit(FrameType.INGEST, bytes(limits.REQUEST_BYTES_MAX), timeout_s=WAIT_S)
        (peer,) = made
        link = client._link
        loop = asyncio.get_running_loop()
        began = loop.time()
        while loop.time() - began < 0.5 and peer.bytes_read < limits.REQUEST_BYTES_MAX // 2:
            peer.transport.resume_reading()  # one read at a time
            await asyncio.sleep(0.001)
        assert client._link is link
        assert not future.done()
        with pytest.raises(UnavailableError, match="stopped answering"):
            await future
        await client.close()


async def test_waiters_are_told_and_then_their_client_once():
    """Answers, refusals and losses go to the waiter of each; `on_answers` follows all that came together."""
    told = []

    class Waiter:
        def __init__(self, name):
            self.name = name

        def answered(self, frame):
            told.append((self.name, "answered"))

        def failed(self, error):
            told.append((self.name, error.code))

    async with serving() as (_, recorder, client):
        client.on_answers = lambda: told.append("all")
        await client.connect()
        recorder.holding = True
        for name in "abcd":
            client.send(FrameType.INGEST, b"x", timeout_s=WAIT_S, waiter=Waiter(name))
        await recorder.wait(lambda: len(recorder.waiting) == 4)
        (connection, first), (_, second), *_ = recorder.waiting
        connection.respond(first.request_id, FrameType.RECEIPT, b"")
        connection.respond_error(second.request_id, BackpressureError("busy"))
        await until(lambda: "all" in told)
        assert told == [("a", "answered"), ("b", ErrorCode.OVERLOADED), "all"]
        told.clear()
        connection.abort_transport()
        await until(lambda: told)
        assert told == [("c", ErrorCode.CLOSED), ("d", ErrorCode.CLOSED), "all"]
        assert client.in_flight_bytes == 0


async def test_closing_waits_for_answers_and_no_longer():
    """`drain_s` ends with the last answer."""
    async with serving() as (_, recorder, client):
        await client.connect()
        recorder.holding = True
        futures = [client.submit(FrameType.INGEST, b"x", timeout_s=WAIT_S) for _ in range(2)]
        await recorder.wait(lambda: len(recorder.waiting) == 2)
        closing = asyncio.ensure_future(client.close(drain_s=3_600.0))
        for connection, frame in recorder.waiting:
            await asyncio.sleep(0)
            assert not closing.done()
            connection.respond(frame.request_id, FrameType.RECEIPT, b"")
        await closing
        assert [(await future).type for future in futures] == [FrameType.RECEIPT] * 2


async def test_a_call_is_cancelled_when_its_time_is_up():
    """The server stops working for a caller that has stopped waiting."""
    async with serving() as (_, recorder, client):
        with pytest.raises(UnavailableError):
            await client.call(CoordinatorCall("wait", b""), CoordinatorResult, timeout_s=0.03)
        await client.call(StoreStatus(), StatusResult)
        await until(lambda: recorder.cancelled)


async def test_the_servers_own_bound_on_calls_is_an_answer():
    """A caller that waits longer than the server allows is told."""
    async with serving(limits=ServerLimits(call_timeout_s=0.02)) as (_, _, client):
        with pytest.raises(UnavailableError, match="took more than"):
            await client.call(CoordinatorCall("wait", b""), CoordinatorResult)


# ---------------------------------------------------------------- connections that end


async def test_a_lost_connection_fails_its_requests_and_the_next_connects():
    """Each waiter gets an error of its own."""
    async with serving() as (server, recorder, client):
        await client.connect()
        recorder.holding = True
        futures = [client.submit(FrameType.INGEST, b"x", timeout_s=WAIT_S) for _ in range(3)]
        await recorder.wait(lambda: len(recorder.waiting) == 3)
        server.connections[0].abort_transport()
        errors = await asyncio.gather(*futures, return_exceptions=True)
        assert {type(error) for error in errors} == {UnavailableError}
        assert len({id(error) for error in errors}) == 3
        assert {error.code for error in errors} == {ErrorCode.CLOSED}
        assert client.in_flight_bytes == 0
        await recorder.wait(lambda: recorder.gone)
        connection, frame = recorder.waiting[0]
        connection.respond(frame.request_id, FrameType.RECEIPT, b"nobody is there")
        recorder.holding = False
        assert (await client.request(FrameType.INGEST, b"again")).body == b"again"


async def test_submit_needs_a_connection_and_begins_one():
    """It never waits; nothing is sent where it raises."""
    async with serving() as (_, recorder, client):
        with pytest.raises(UnavailableError, match="not connected"):
            client.submit(FrameType.INGEST, b"x", timeout_s=1)
        await client.connect()
        assert recorder.reads == []
        await client.submit(FrameType.INGEST, b"x", timeout_s=WAIT_S)


async def test_an_unreachable_peer_fails_every_waiter_of_an_attempt():
    """With the reason, and each attempt is made once for all who wait."""
    server = FrameServer(HandlerBase(), welcome)
    address = await server.start()
    await server.close()
    client = PeerClient(address, rng=random.Random(1))
    errors = await asyncio.gather(
        *(client.request(FrameType.INGEST, b"") for _ in range(5)), return_exceptions=True
    )
    assert all(isinstance(error, UnavailableError) for error in errors)
    assert all(f"can't connect to {address}" in str(error) for error in errors)
    assert client.in_flight_bytes == 0
    with pytest.raises(UnavailableError):
        await client.connect()
    await client.close()


async def test_a_refused_handshake_is_the_servers_error(monkeypatch):
    """No common version: the client learns why."""
    async with serving() as (_, _, client):
        monkeypatch.setattr(client, "_hello", Hello(8, 9))
        with pytest.raises(InvalidRequestError, match="8-9") as caught:
            await client.request(FrameType.INGEST, b"")
        assert caught.value.code == ErrorCode.UNSUPPORTED_VERSION
        assert not client.is_connected


@pytest.mark.parametrize(
    "answer",
    [b"\xff" * 40, b"HTTP/1.1 400 Bad Request\r\n\r\n", b""],
)
async def test_a_peer_that_speaks_something_else_is_an_error(answer):
    """Garbage, or the end of the connection, instead of a WELCOME."""

    class Other(asyncio.Protocol):
        def connection_made(self, transport):
            transport.write(answer)
            transport.close()

    server = await asyncio.get_running_loop().create_server(Other, "127.0.0.1", 0)
    client = PeerClient(join_address(*server.sockets[0].getsockname()[:2]), rng=random.Random(1))
    with pytest.raises((RemoteProtocolError, UnavailableError)):
        await client.connect()
    await client.close()
    server.close()
    await server.wait_closed()


@pytest.mark.parametrize("answer", ["wrong type", "bad error", "garbage"])
async def test_wrong_answers_break_the_connection(answer):
    """An answer of another type, an ERROR that is none, a frame that is none."""
    async with serving() as (_, recorder, client):
        await client.connect()
        recorder.holding = True
        futures = [client.submit(FrameType.INGEST, b"", timeout_s=WAIT_S) for _ in range(2)]
        await recorder.wait(lambda: len(recorder.waiting) == 2)
        connection, frame = recorder.waiting[0]
        match answer:
            case "wrong type":
                connection.respond(frame.request_id, FrameType.APPENDED, b"")
            case "bad error":
                connection.respond(frame.request_id, FrameType.ERROR, b"\xc1")
            case "garbage":
                connection.write(b"\xff" * 64)
        errors = await asyncio.gather(*futures, return_exceptions=True)
        assert {type(error) for error in errors} == {RemoteProtocolError}
        assert not client.is_connected


async def test_garbage_is_answered_with_an_error_before_the_connection_ends():
    """The client's log can then say what it did wrong."""
    async with serving() as (server, _, _), raw_client(server.address) as client:
        client.transport.write(b"\x00\x00\x00\x00\x10\x00\x01\x00" + bytes(8))
        await client.wait(lambda: client.is_lost)
        assert client.connection.state is State.CLOSED
        assert "reserved" in client.connection.refusal.message


async def test_calls_of_a_lost_connection_are_cancelled():
    """Nobody waits for their answers any more."""
    async with serving() as (_, recorder, client):
        call = asyncio.create_task(client.call(CoordinatorCall("wait", b""), CoordinatorResult))
        await recorder.arrived.wait()
        await client.close()
        with pytest.raises(UnavailableError):
            await call
        await recorder.wait(lambda: recorder.gone)
        await until(lambda: recorder.cancelled)


async def test_a_closed_client_says_so():
    """To whoever uses it afterwards; closing twice is fine."""
    async with serving() as (_, _, client):
        await client.connect()
        await client.close()
        await client.close()
        for use in (client.connect(), client.request(FrameType.INGEST, b"")):
            with pytest.raises(UnavailableError, match="closed") as caught:
                await use
            assert not caught.value.retriable
        with pytest.raises(UnavailableError, match="closed"):
            client.submit(FrameType.INGEST, b"", timeout_s=1)


async def test_closing_a_client_can_wait_for_its_answers():
    """Those that come in time are given, the rest fails."""
    async with serving() as (_, recorder, client):
        await client.connect()
        recorder.holding = True
        first = client.submit(FrameType.INGEST, b"1", timeout_s=WAIT_S)
        second = client.submit(FrameType.INGEST, b"2", timeout_s=WAIT_S)
        await recorder.wait(lambda: len(recorder.waiting) == 2)
        connection, frame = recorder.waiting[0]
        connection.respond(frame.request_id, FrameType.RECEIPT, b"")
        await client.close(drain_s=0.05)
        await first
        with pytest.raises(UnavailableError, match="closed"):
            await second


# ---------------------------------------------------------------- bounds


async def test_calls_beyond_the_bound_are_refused():
    """With an error that says to back off; others go on."""
    async with serving(limits=ServerLimits(calls_per_connection_max=2)) as (server, recorder, client):
        calls = [
            asyncio.create_task(client.call(CoordinatorCall("wait", b""), CoordinatorResult))
            for _ in range(5)
        ]
        await until(lambda: sum(call.done() for call in calls) == 3)
        for call in calls:
            if call.done():
                with pytest.raises(BackpressureError):
                    await call
        recorder.go_on.set()
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert sum(isinstance(result, CoordinatorResult) for result in results) == 2
        assert server.calls == 0


async def test_connections_beyond_the_bound_are_refused():
    """With an error that says why."""
    async with serving(limits=ServerLimits(connections_max=1)) as (server, _, client):
        await client.connect()
        other = PeerClient(server.address, rng=random.Random(2))
        with pytest.raises(BackpressureError, match="too many connections"):
            await other.connect()
        await other.close()
        await client.request(FrameType.INGEST, b"")


async def test_requests_wait_their_turn_when_too_much_is_in_flight():
    """In order, and never more than the bound at once; submit refuses instead."""
    options = PeerOptions(in_flight_bytes_max=10)
    async with serving(options=options) as (_, recorder, client):
        await client.connect()
        recorder.holding = True
        tasks = [asyncio.create_task(client.request(FrameType.INGEST, b"%d" % i * 4)) for i in range(5)]
        await recorder.wait(lambda: len(recorder.waiting) == 2)
        assert client.in_flight_bytes == 8
        with pytest.raises(BackpressureError):
            client.submit(FrameType.INGEST, b"", timeout_s=1)
        tasks[2].cancel()
        for answered in range(4):
            await recorder.wait(lambda least=answered + 1: len(recorder.waiting) >= least)
            connection, frame = recorder.waiting[answered]
            connection.respond(frame.request_id, FrameType.RECEIPT, frame.body)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [getattr(r, "body", None) for r in results] == [b"0000", b"1111", None, b"3333", b"4444"]
        assert client.in_flight_bytes == 0
        assert [frame.body for _, frame in recorder.waiting] == [b"0000", b"1111", b"3333", b"4444"]


async def test_a_request_larger_than_the_bound_is_sent_alone():
    """It can't wait for room that there never is."""
    async with serving(options=PeerOptions(in_flight_bytes_max=10)) as (_, _, client):
        frames = await asyncio.gather(*(client.request(FrameType.INGEST, b"x" * 100) for _ in range(3)))
        assert [len(frame.body) for frame in frames] == [100, 100, 100]


async def test_waiting_for_room_ends_with_the_timeout():
    """And takes no room with it."""
    async with serving(options=PeerOptions(requests_max=1)) as (_, recorder, client):
        await client.connect()
        recorder.holding = True
        first = client.submit(FrameType.INGEST, b"x", timeout_s=WAIT_S)
        with pytest.raises(UnavailableError) as caught:
            await client.request(FrameType.INGEST, b"y", timeout_s=0.02)
        assert caught.value.code == ErrorCode.TIMEOUT
        await recorder.wait(lambda: recorder.waiting)
        connection, frame = recorder.waiting[0]
        connection.respond(frame.request_id, FrameType.RECEIPT, b"")
        await first
        assert client.in_flight_bytes == 0
        recorder.holding = False
        await client.request(FrameType.INGEST, b"z")


async def test_a_paused_connection_is_not_read():
    """Until it is resumed; and the same for the whole server. Reasons add up."""
    async with serving() as (server, recorder, client):
        await client.request(FrameType.INGEST, b"first")
        (connection,) = server.connections
        connection.pause()
        server.pause()
        future = client.submit(FrameType.INGEST, b"second", timeout_s=WAIT_S)
        async with raw_client(server.address, greet=False) as other:
            # Another connection is accepted meanwhile: the loop has run, and read nothing from the first.
            other.transport.write(other.connection.initiate(Hello(1, 1)))
            connection.resume()
            for _ in range(20):
                await asyncio.sleep(0)
            assert len(recorder.reads) == 1
            assert not future.done()
            server.resume()
            assert (await future).body == b"second"
            await other.wait(lambda: other.connection.is_open)


async def test_a_peer_that_reads_no_answers_is_not_read_and_then_cut():
    """It can't make the server buffer without bound."""
    bounds = ServerLimits(write_buffer_high_bytes=64 * 1024, write_buffer_max_bytes=32 * 1024 * 1024)
    async with serving(limits=bounds) as (server, recorder, _), raw_client(server.address) as other:
        other.transport.pause_reading()
        body = bytes(1024 * 1024)
        sent = 0
        async with asyncio.timeout(WAIT_S):
            while not server.connections[0]._held:
                sent += 1
                other.transport.write(other.connection.send(FrameType.INGEST, body, request_id=sent))
                await asyncio.sleep(0)
        (connection,) = server.connections
        assert connection.unwritten_bytes <= bounds.write_buffer_max_bytes
        # A handler that answers all the same (it had the requests already) reaches the hard bound.
        while connection.is_connected:
            connection.in_flight += 1
            connection.respond(1, FrameType.RECEIPT, body)
        await recorder.wait(lambda: recorder.gone)


async def test_incomplete_frames_of_all_connections_are_bounded():
    """The connection that goes beyond is refused, the others go on, and what is complete doesn't count."""
    async with (
        serving(limits=ServerLimits(partial_bytes_max=1_000)) as (server, _, client),
        raw_client(server.address) as first,
        raw_client(server.address) as second,
    ):
        whole = first.connection.send(FrameType.INGEST, bytes(800), request_id=1)
        first.transport.write(whole[:-1])
        await until(lambda: server.partial_bytes > 0)
        second.transport.write(second.connection.send(FrameType.INGEST, bytes(800), request_id=1)[:-1])
        await second.wait(lambda: second.is_lost)
        assert second.connection.refusal.code == ErrorCode.OVERLOADED
        first.transport.write(whole[-1:])
        await first.wait(lambda: first.frames[-1].request_id == 1)
        assert server.partial_bytes == 0
        await client.request(FrameType.INGEST, bytes(5_000))


async def test_silent_connections_are_closed():
    """Before the HELLO, within a frame, and idle; not while something is under way or held."""
    bounds = ServerLimits(handshake_timeout_s=1, frame_timeout_s=2, idle_timeout_s=3, sweep_interval_s=1_000)
    async with (
        serving(limits=bounds) as (server, recorder, _),
        raw_client(server.address, greet=False) as mute,
        raw_client(server.address) as half,
        raw_client(server.address) as idle,
        raw_client(server.address) as busy,
    ):
        recorder.holding = True
        half.transport.write(half.connection.send(FrameType.INGEST, b"whole", request_id=1)[:-1])
        busy.transport.write(busy.connection.send(FrameType.INGEST, b"whole", request_id=1))
        await recorder.wait(lambda: recorder.waiting)
        await until(lambda: any(c.connection.buffered_bytes for c in server.connections))
        now = asyncio.get_running_loop().time()
        for after_s, lost in ((0.5, []), (1.5, [mute]), (2.5, [mute, half]), (3.5, [mute, half, idle])):
            for connection in server.connections:
                connection.sweep(now + after_s)
            for client in lost:
                await client.wait(lambda client=client: client.is_lost)
            assert [c.is_lost for c in (mute, half, idle, busy)] == [
                c in lost for c in (mute, half, idle, busy)
            ]
        assert half.connection.refusal.code == ErrorCode.TIMEOUT


# ---------------------------------------------------------------- stopping


async def test_a_graceful_stop_answers_what_is_under_way():
    """GOAWAY, the answers, then the end; nothing new is taken."""
    async with serving() as (server, recorder, client), raw_client(server.address) as crossing:
        await client.connect()
        recorder.holding = True
        data = client.submit(FrameType.INGEST, b"data", timeout_s=WAIT_S)
        call = asyncio.create_task(client.call(CoordinatorCall("wait", b""), CoordinatorResult))
        crossing.transport.write(crossing.connection.send(FrameType.INGEST, b"held", request_id=1))
        await recorder.wait(lambda: len(recorder.waiting) == 2 and server.calls == 1)
        late = crossing.connection.send(FrameType.INGEST, b"late", request_id=2)
        closing = asyncio.create_task(server.close(deadline_s=WAIT_S))
        await crossing.wait(lambda: crossing.connection.state is State.DRAINING)
        crossing.transport.write(late)
        await crossing.wait(lambda: any(frame.request_id == 2 for frame in crossing.frames))
        refusal = decode_error(next(f for f in crossing.frames if f.request_id == 2).body)
        assert (refusal.code, refusal.retriable) == (ErrorCode.CLOSED, True)
        assert not closing.done()
        for connection, frame in recorder.waiting:
            connection.respond(frame.request_id, FrameType.RECEIPT, frame.body)
        recorder.go_on.set()
        assert (await data).body == b"data"
        assert (await call).body == b"done"
        await closing
        await crossing.wait(lambda: crossing.is_lost)
        assert [f.body for f in crossing.frames if f.request_id == 1] == [b"held"]
        with pytest.raises(UnavailableError):
            await client.request(FrameType.INGEST, b"")


async def test_a_stop_does_not_wait_beyond_its_deadline():
    """What is not answered by then is dropped, and the waiter gets an error."""
    async with serving(limits=ServerLimits(linger_s=0.02)) as (server, recorder, client):
        await client.connect()
        recorder.holding = True
        future = client.submit(FrameType.INGEST, b"", timeout_s=WAIT_S)
        await recorder.wait(lambda: recorder.waiting)
        await server.close(deadline_s=0.02)
        with pytest.raises(UnavailableError):
            await future


async def test_a_client_moves_on_when_its_server_goes_away():
    """Answers under way still come on the old connection; new requests use another one."""
    async with serving() as (server, recorder, client):
        await client.connect()
        recorder.holding = True
        held = client.submit(FrameType.INGEST, b"held", timeout_s=WAIT_S)
        await recorder.wait(lambda: recorder.waiting)
        (old,) = server.connections
        old.go_away()
        await until(lambda: not client.is_connected)
        recorder.holding = False
        assert (await client.request(FrameType.INGEST, b"new")).body == b"new"
        assert not held.done()
        connection, frame = recorder.waiting[0]
        connection.respond(frame.request_id, FrameType.RECEIPT, b"held")
        assert (await held).body == b"held"
        await recorder.wait(lambda: recorder.gone == [old.id])


# ---------------------------------------------------------------- addresses


@pytest.mark.parametrize(
    ("address", "parts"),
    [("localhost:7001", ("localhost", 7001)), ("127.0.0.1:0", ("127.0.0.1", 0)), ("[::1]:80", ("::1", 80))],
)
def test_addresses_split_and_join(address, parts):
    """Names, IPv4 and IPv6."""
    assert split_address(address) == parts
    assert join_address(*parts) == address


@pytest.mark.parametrize(
    "address", ["", "host", "host:", ":80", "host:http", "host:65536", "host:-1", "host:١"]
)
def test_bad_addresses_are_refused(address):
    """With an error that shows the address."""
    with pytest.raises(ValueError, match="no address"):
        split_address(address)


def test_encode_is_what_the_wire_carries():
    """A call decodes to what it was."""
    assert encode(StoreStatus()) == b"\x91\xacstore_status"


# ---------------------------------------------------------------- calls without a task


class Prompt(Recorder):
    """Takes calls as it is told."""

    def __init__(self):
        super().__init__()
        self.take = lambda connection, request_id, call: False
        self.deadlines = []

    def on_call_now(self, connection, request_id, call, deadline):
        self.deadlines.append(deadline)
        return self.take(connection, request_id, call)


@asynccontextmanager
async def prompt():
    handler = Prompt()
    server = FrameServer(handler, welcome)
    client = PeerClient(await server.start(), rng=random.Random(1))
    try:
        yield server, handler, client
    finally:
        handler.go_on.set()
        await client.close()
        await server.close(deadline_s=2)


async def test_a_handler_answers_a_call_without_a_task():
    """Nothing is under way then; what it doesn't take, and what it hands on, `on_call` answers."""
    async with prompt() as (server, handler, client):

        def answer(connection, request_id, call):
            assert server.calls == 0
            connection.respond(request_id, FrameType.RESULT, encode(StatusResult("at once", [], 1, False)))
            return True

        def hand_on(connection, request_id, call):
            connection.run_call(request_id, call, handler.deadlines[-1])
            return True

        assert (await client.call(StoreStatus(), StatusResult)).node_id == "node"
        handler.take = answer
        before = asyncio.get_running_loop().time()
        assert (await client.call(StoreStatus(), StatusResult, timeout_s=5)).node_id == "at once"
        assert before <= handler.deadlines[-1] - 4.9 <= before + WAIT_S
        handler.take = hand_on
        assert (await client.call(StoreStatus(), StatusResult)).node_id == "node"
        (connection,) = server.connections
        assert connection.in_flight == 0


async def test_an_error_of_a_call_that_was_to_be_answered_at_once_is_its_answer():
    """Of ours, and of the handler's own doing."""
    async with prompt() as (server, handler, client):
        for error, code in ((UnavailableError("no"), None), (ZeroDivisionError(), ErrorCode.INTERNAL)):

            def fail(connection, request_id, call, error=error):
                raise error

            handler.take = fail
            with pytest.raises(TallymarkError) as caught:
                await client.call(StoreStatus(), StatusResult)
            assert code is None or caught.value.code == code
        assert server.calls == 0


async def test_a_call_that_is_handed_on_when_its_caller_is_gone_begins_no_task():
    """There is nobody to answer."""
    async with prompt() as (server, handler, client):
        kept = []

        def keep(connection, request_id, call):
            kept.append((connection, request_id, call))
            handler.arrived.set()
            return True

        handler.take = keep
        asked = asyncio.ensure_future(client.call(StoreStatus(), StatusResult))
        await handler.wait(lambda: kept)
        ((connection, request_id, call),) = kept
        await client.close()
        with pytest.raises(TallymarkError):
            await asked
        await until(lambda: not server.connections)
        connection.run_call(request_id, call, handler.deadlines[-1])
        assert (server.calls, connection.in_flight) == (0, 0)


async def test_a_node_of_another_role_says_which_it_is():
    """Who asks the wrong node learns its address, its role and its name, and whom to ask instead."""
    server = FrameServer(HandlerBase(), lambda: Welcome(1, "query-1", "query", 0))
    client = PeerClient(await server.start(), rng=random.Random(1))
    reason = f"{server.address}, the query node 'query-1', doesn't answer calls of type GetTopology; clients talk to"
    with pytest.raises(InvalidRequestError, match=reason):
        await client.call(GetTopology(), Topology)
    await client.close()
    await server.close()
