"""The connection: framing however the stream is split, the handshake, who may say what when."""

import contextlib
import random
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tallymark_protocol import limits
from tallymark_protocol.codec import decode, decode_error, encode
from tallymark_protocol.connection import Connection, Role, State, negotiate
from tallymark_protocol.errors import (
    ErrorCode,
    InvalidRequestError,
    LocalProtocolError,
    RemoteProtocolError,
    WireError,
)
from tallymark_protocol.frames import (
    BODY_BYTES_MAX,
    HEADER,
    HEADER_BYTES,
    REQUEST_ID_MAX,
    Frame,
    is_request,
    type_name,
)
from tallymark_protocol.messages import FrameType, Hello, Welcome

HELLO = Hello(1, 1, "test 1.0", ["a", "b"])
WELCOME = Welcome(0, "node-1", "store", 5, ["b", "c"])


def pair():
    """A client and a server that have greeted each other."""
    client, server = Connection(Role.CLIENT), Connection(Role.SERVER)
    server.receive_data(client.initiate(HELLO))
    client.receive_data(server.accept(WELCOME))
    assert client.is_open
    assert server.is_open
    return client, server


def raw(kind, body=b"", request_id=0, *, flags=0, reserved=0, timeout_ms=0, length=None):
    """A frame as bytes, valid or not."""
    return (
        HEADER.pack(len(body) if length is None else length, kind, flags, reserved, request_id, timeout_ms)
        + body
    )


# ---------------------------------------------------------------- handshake


def test_handshake_agrees_on_version_and_common_features():
    """Both sides end up with the same Welcome."""
    client, server = Connection(Role.CLIENT), Connection(Role.SERVER)
    (hello,) = server.receive_data(client.initiate(HELLO))
    assert hello.type == FrameType.HELLO
    assert server.hello == HELLO
    (welcome,) = client.receive_data(server.accept(WELCOME))
    assert welcome.type == FrameType.WELCOME
    assert client.welcome == server.welcome == Welcome(1, "node-1", "store", 5, ["b"])
    assert client.state is server.state is State.OPEN


@pytest.mark.parametrize(
    ("theirs", "ours", "agreed"),
    [((1, 1), (1, 1), 1), ((1, 5), (2, 3), 3), ((2, 3), (1, 5), 3), ((3, 9), (1, 3), 3), ((1, 2), (2, 2), 2)],
)
def test_the_highest_common_version_is_chosen(theirs, ours, agreed):
    """The lower of the two highest, where the ranges overlap."""
    assert negotiate(Hello(*theirs), version_min=ours[0], version_max=ours[1]) == agreed


@pytest.mark.parametrize(("theirs", "ours"), [((1, 1), (2, 3)), ((4, 9), (2, 3)), ((3, 2), (2, 3))])
def test_no_common_version_is_an_error_that_names_both_ranges(theirs, ours):
    """The client learns what each side speaks."""
    with pytest.raises(InvalidRequestError) as caught:
        negotiate(Hello(*theirs), version_min=ours[0], version_max=ours[1])
    assert caught.value.code == ErrorCode.UNSUPPORTED_VERSION
    assert f"{theirs[0]}-{theirs[1]}" in caught.value.message
    assert f"{ours[0]}-{ours[1]}" in caught.value.message


def test_a_client_without_common_version_is_refused():
    """It gets the error, and both sides are closed."""
    client, server = Connection(Role.CLIENT), Connection(Role.SERVER)
    server.receive_data(client.initiate(Hello(7, 9)))
    answer = server.accept(WELCOME)
    assert server.state is State.CLOSED
    client.receive_data(answer)
    assert client.state is State.CLOSED
    assert client.refusal == server.refusal
    assert client.refusal.code == ErrorCode.UNSUPPORTED_VERSION
    with pytest.raises(LocalProtocolError):
        client.send(FrameType.CALL, b"", request_id=1)


def test_a_version_that_was_not_offered_is_refused_by_the_client():
    """A server that chooses freely is broken."""
    client = Connection(Role.CLIENT)
    client.initiate(HELLO)
    with pytest.raises(RemoteProtocolError, match="version 2"):
        client.receive_data(raw(FrameType.WELCOME, encode(Welcome(2, "n", "store", 0))))
    assert client.state is State.BROKEN


def test_a_hello_with_more_fields_than_we_know_is_read():
    """A newer client appends fields."""
    server = Connection(Role.SERVER)
    server.receive_data(raw(FrameType.HELLO, encode([1, 9, "next", ["x"], "new", 7])))
    assert server.hello.version_max == 9
    server.accept(WELCOME)
    assert server.is_open


def test_a_server_can_refuse_before_and_after_the_hello():
    """Too many connections: the client sees the error wherever its HELLO is."""
    error = WireError(int(ErrorCode.OVERLOADED), True, "too many connections")
    for greeted in (False, True):
        client, server = Connection(Role.CLIENT), Connection(Role.SERVER)
        hello = client.initiate(HELLO)
        if greeted:
            server.receive_data(hello)
        client.receive_data(server.refuse(error))
        assert client.state is server.state is State.CLOSED
        assert client.refusal == error
        assert server.refuse(error) == b""
        assert server.receive_data(b"whatever comes") == []


@pytest.mark.parametrize(
    "data",
    [
        raw(FrameType.INGEST, b"x", 1),
        raw(FrameType.WELCOME, encode(WELCOME)),
        raw(FrameType.PING),
        raw(FrameType.HELLO, b"\xc1"),
        raw(FrameType.HELLO, b""),
        raw(FrameType.HELLO, length=limits.HANDSHAKE_BYTES_MAX + 1),
        raw(FrameType.HELLO, encode(HELLO)) + raw(FrameType.CALL, b"", 1),
        raw(77, b"", 1),
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 a TLS hello",
    ],
)
def test_a_server_takes_nothing_but_a_hello_first(data):
    """Anything else, also a request that doesn't wait for the answer, ends the connection."""
    server = Connection(Role.SERVER)
    with pytest.raises(RemoteProtocolError):
        server.receive_data(data)
    assert server.state is State.BROKEN
    with pytest.raises(RemoteProtocolError):
        server.receive_data(b"")


def test_a_broken_connection_can_still_be_told_why():
    """The server's last words are an error."""
    server = Connection(Role.SERVER)
    with pytest.raises(RemoteProtocolError):
        server.receive_data(raw(FrameType.PING))
    client = Connection(Role.CLIENT)
    client.initiate(HELLO)
    client.receive_data(server.refuse(WireError(int(ErrorCode.MALFORMED), False, "no HELLO")))
    assert client.refusal.message == "no HELLO"


# ---------------------------------------------------------------- framing


def _stream(rng, client):
    """A valid stream of requests and the frames it must give."""
    frames, data = [], []
    for _ in range(rng.randint(1, 30)):
        kind = rng.choice([FrameType.INGEST, FrameType.APPEND, FrameType.CALL])
        body = rng.randbytes(rng.choice([0, 1, 15, 16, 17, 200, 5_000]))
        request_id = rng.randint(1, REQUEST_ID_MAX)
        timeout_ms = rng.choice([0, 1, 30_000, 2**32 - 1])
        flags = rng.randint(0, 255)
        frames.append(Frame(kind, flags, request_id, timeout_ms, body))
        data.append(client.send(kind, body, request_id=request_id, flags=flags, timeout_ms=timeout_ms))
    return b"".join(data), frames


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32), st.lists(st.integers(1, 300), max_size=200))
def test_any_split_of_the_stream_gives_the_same_frames(seed, sizes):
    """Frames don't depend on how TCP cuts them."""
    rng = random.Random(seed)
    client, server = pair()
    data, expected = _stream(rng, client)
    found = []
    position = 0
    for size in sizes:
        found += server.receive_data(data[position : position + size])
        position += size
    found += server.receive_data(data[position:])
    assert found == expected
    assert server.buffered_bytes == 0


def test_a_stream_in_single_bytes_gives_the_same_frames():
    """The smallest pieces there are, from the first byte of the connection."""
    client, server = Connection(Role.CLIENT), Connection(Role.SERVER)
    frames = [frame for byte in client.initiate(HELLO) for frame in server.receive_data(bytes([byte]))]
    assert [frame.type for frame in frames] == [FrameType.HELLO]
    for byte in server.accept(WELCOME):
        client.receive_data(bytes([byte]))
    data, expected = _stream(random.Random(1), client)
    assert [frame for byte in data for frame in server.receive_data(bytes([byte]))] == expected


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 8), st.booleans())
def test_mutated_streams_raise_nothing_but_remote_protocol_errors(seed, changes, greeted):
    """Flipped, cut, doubled and inserted bytes: frames, or the error for bad peers, on both sides."""
    rng = random.Random(seed)
    for role in Role:
        client, server = pair()
        if role is Role.SERVER:
            data, _ = _stream(rng, client)
            target = server if greeted else Connection(Role.SERVER)
            data = data if greeted else raw(FrameType.HELLO, encode(HELLO)) + data
        else:
            data = b"".join(
                server.send(kind, encode(WireError(1, True, "no")), request_id=rng.randint(1, 9))
                for kind in (FrameType.ERROR, FrameType.RESULT, FrameType.RECEIPT)
            ) + server.send(FrameType.GOAWAY)
            target = client
            if not greeted:
                target = Connection(Role.CLIENT)
                target.initiate(HELLO)
                data = raw(FrameType.WELCOME, encode(Welcome(1, "n", "store", 0))) + data
        mutated = bytearray(data)
        for _ in range(changes):
            at = rng.randrange(len(mutated))
            match rng.randrange(4):
                case 0:
                    mutated[at] = rng.randrange(256)
                case 1:
                    del mutated[at : at + rng.randint(1, 20)]
                case 2:
                    mutated[at:at] = rng.randbytes(rng.randint(1, 20))
                case _:
                    mutated[at:at] = mutated[at : at + rng.randint(1, 60)]
            if not mutated:
                mutated = bytearray(b"\0")
        position = 0
        while position < len(mutated):
            size = rng.randint(1, 400)
            try:
                frames = target.receive_data(bytes(mutated[position : position + size]))
            except RemoteProtocolError:
                assert target.state is State.BROKEN
                break
            assert all(isinstance(frame, Frame) for frame in frames)
            target.data_to_send()
            if target.state is State.GREETING and target.role is Role.SERVER:
                target.accept(WELCOME)
            position += size
        assert target.buffered_bytes <= len(mutated)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.sampled_from(list(Role)), st.booleans())
def test_random_bytes_raise_nothing_but_remote_protocol_errors(data, role, greeted):
    """Whatever comes, in any state."""
    target = dict(zip((Role.CLIENT, Role.SERVER), pair(), strict=True))[role] if greeted else Connection(role)
    try:
        target.receive_data(data)
    except RemoteProtocolError:
        assert target.state is State.BROKEN


@pytest.mark.parametrize("length", [0xFFFFFFFF, limits.APPEND_FRAME_BYTES_MAX + 1])
def test_an_announced_length_above_the_limit_is_refused_at_the_header(length):
    """Without waiting for the body."""
    _, server = pair()
    with pytest.raises(RemoteProtocolError) as caught:
        server.receive_data(raw(FrameType.APPEND, request_id=1, length=length))
    assert caught.value.code == ErrorCode.TOO_LARGE
    assert server.buffered_bytes == 0


def test_an_announced_length_allocates_nothing():
    """A thousand connections that announce the largest frame and send nothing of it cost next to nothing."""
    servers = [pair()[1] for _ in range(1_000)]
    header = raw(FrameType.APPEND, request_id=1, length=limits.APPEND_FRAME_BYTES_MAX)
    tracemalloc.start()
    try:
        for server in servers:
            assert server.receive_data(header + b"x" * 100) == []
        assert tracemalloc.get_traced_memory()[0] < 1_000_000
    finally:
        tracemalloc.stop()


def test_a_large_frame_in_small_pieces_is_not_copied_for_each():
    """Memory stays near the frame's size, and the work is linear: 2 MiB in 64-byte pieces is done at once."""
    client, server = pair()
    body = random.Random(2).randbytes(2 * 1024 * 1024)
    data = client.send(FrameType.INGEST, body, request_id=1) + client.send(
        FrameType.CALL, b"next", request_id=2
    )
    tracemalloc.start()
    frames = []
    try:
        for position in range(0, len(data), 64):
            frames += server.receive_data(data[position : position + 64])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert [frame.request_id for frame in frames] == [1, 2]
    assert frames[0].body == body
    assert peak < 4 * len(body)
    assert server.buffered_bytes == 0


def test_the_largest_bodies_pass():
    """A body of exactly the limit is a frame, one byte more is none."""
    client, server = pair()
    most = limits.FRAME_BYTES_MAX
    (frame,) = server.receive_data(client.send(FrameType.INGEST, bytes(most), request_id=1))
    assert len(frame.body) == most
    with pytest.raises(LocalProtocolError) as caught:
        client.send(FrameType.INGEST, bytes(most + 1), request_id=1)
    assert caught.value.code == ErrorCode.TOO_LARGE


# ---------------------------------------------------------------- who may say what


def test_every_type_is_refused_where_it_does_not_belong():
    """A client doesn't answer and a server doesn't ask."""
    for kind in FrameType:
        for role in Role:
            client, server = pair()
            target = server if role is Role.SERVER else client
            body = b"" if BODY_BYTES_MAX[kind] == 0 else encode(WireError(1, False, "x"))
            belongs = {
                Role.SERVER: {FrameType.INGEST, FrameType.APPEND, FrameType.CALL, FrameType.REPLICATE},
                Role.CLIENT: {
                    FrameType.RECEIPT,
                    FrameType.APPENDED,
                    FrameType.RESULT,
                    FrameType.ERROR,
                    FrameType.GOAWAY,
                },
            }[role] | {FrameType.PING, FrameType.PONG}
            if kind in belongs:
                target.receive_data(raw(kind, body, 5))
                assert target.state is not State.BROKEN
            else:
                with pytest.raises(RemoteProtocolError, match=kind.name):
                    target.receive_data(raw(kind, body, 5))


def test_what_one_side_can_send_the_other_takes():
    """The tables of both directions agree in every state."""
    bodies = {
        FrameType.HELLO: encode(HELLO),
        FrameType.WELCOME: encode(Welcome(1, "n", "s", 0)),
        FrameType.ERROR: encode(WireError(1, False, "x")),
    }

    def stages():
        client, server = Connection(Role.CLIENT), Connection(Role.SERVER)
        yield client, server
        client, server = Connection(Role.CLIENT), Connection(Role.SERVER)
        server.receive_data(client.initiate(HELLO))
        yield client, server
        yield pair()
        client, server = pair()
        client.receive_data(server.send(FrameType.GOAWAY))
        yield client, server

    for stage in range(4):
        for kind in FrameType:
            for from_client in (True, False):
                client, server = list(stages())[stage]
                sender, receiver = (client, server) if from_client else (server, client)
                try:
                    data = sender.send(kind, bodies.get(kind, b""), request_id=1)
                except LocalProtocolError:
                    continue
                receiver.receive_data(data)
                assert sender.state is receiver.state


@pytest.mark.parametrize("kind", [FrameType.INGEST, FrameType.APPEND, FrameType.CALL])
def test_requests_need_an_id(kind):
    """Both to send and to receive."""
    client, server = pair()
    with pytest.raises(LocalProtocolError, match="request id"):
        client.send(kind, b"")
    with pytest.raises(LocalProtocolError, match="request id"):
        client.send(kind, b"", request_id=REQUEST_ID_MAX + 1)
    with pytest.raises(RemoteProtocolError, match="request id"):
        server.receive_data(raw(kind, b"", 0))


def test_reserved_bytes_must_be_zero():
    """They are kept for what a version may need."""
    _, server = pair()
    with pytest.raises(RemoteProtocolError, match="reserved"):
        server.receive_data(raw(FrameType.CALL, b"", 1, reserved=1))


def test_pings_are_answered_by_the_connection():
    """With their request id, on both sides, and are not delivered."""
    client, server = pair()
    assert server.receive_data(client.send(FrameType.PING, request_id=9)) == []
    (pong,) = client.receive_data(server.data_to_send())
    assert (pong.type, pong.request_id) == (FrameType.PONG, 9)
    assert server.data_to_send() == b""
    client.receive_data(server.send(FrameType.PING))
    (pong,) = server.receive_data(client.data_to_send())
    assert pong.type == FrameType.PONG


def test_unknown_requests_are_refused_and_other_unknown_frames_ignored():
    """A newer peer is answered where it waits for an answer, and the connection goes on."""
    client, server = pair()
    data = raw(78, b"new request", 3) + raw(79, b"new answer", 4) + raw(9, b"", 5)
    frames = server.receive_data(data + client.send(FrameType.CALL, b"", request_id=6))
    assert [frame.request_id for frame in frames] == [6]
    (answer,) = client.receive_data(server.data_to_send())
    assert answer.request_id == 3
    assert decode_error(answer.body).code == ErrorCode.UNSUPPORTED_VERSION
    assert client.receive_data(raw(78, b"", 1) + raw(79, b"", 1)) == []
    assert client.data_to_send() == b""
    with pytest.raises(RemoteProtocolError):
        client.receive_data(raw(0, b"", 1))


def test_goaway_ends_requests_but_not_answers():
    """What crossed it still arrives, to be refused; what was under way is answered."""
    client, server = pair()
    first = client.send(FrameType.CALL, b"", request_id=1)
    crossing = client.send(FrameType.CALL, b"", request_id=2)
    server.receive_data(first)
    (goaway,) = client.receive_data(server.send(FrameType.GOAWAY))
    assert goaway.type == FrameType.GOAWAY
    assert client.state is State.DRAINING
    with pytest.raises(LocalProtocolError):
        client.send(FrameType.CALL, b"", request_id=3)
    assert [frame.request_id for frame in server.receive_data(crossing)] == [2]
    (answer,) = client.receive_data(server.send(FrameType.RESULT, b"r", request_id=1))
    assert answer.body == b"r"
    with pytest.raises(LocalProtocolError):
        server.send(FrameType.GOAWAY)


def test_an_error_without_request_id_closes_the_connection():
    """It concerns the connection; what follows it is dropped."""
    client, server = pair()
    data = server.send(FrameType.RESULT, b"", request_id=1)
    data += server.refuse(WireError(int(ErrorCode.MALFORMED), False, "bad frame"))
    frames = client.receive_data(data + b"rest")
    assert [frame.type for frame in frames] == [FrameType.RESULT, FrameType.ERROR]
    assert client.state is State.CLOSED
    assert client.refusal.message == "bad frame"


def test_send_header_and_send_agree():
    """For bodies that the caller writes itself."""
    client, _ = pair()
    one = client.send(FrameType.APPEND, b"body", request_id=3, flags=1, timeout_ms=2**40)
    two = client.send_header(FrameType.APPEND, 4, request_id=3, flags=1, timeout_ms=2**40) + b"body"
    assert one == two
    assert len(one) == HEADER_BYTES + 4


def test_types_have_names_and_pairs():
    """From 16 on, even asks and odd answers."""
    assert type_name(FrameType.INGEST) == "INGEST"
    assert type_name(200) == "type 200"
    asked = {kind for kind in FrameType if is_request(kind)}
    assert asked == {FrameType.INGEST, FrameType.APPEND, FrameType.CALL}
    assert {kind + 1 for kind in asked} <= set(FrameType)


# ---------------------------------------------------------------- codec


@settings(max_examples=300, deadline=None)
@given(
    st.binary(max_size=100), st.sampled_from([Hello, Welcome, WireError, list[int], dict[str, int], bytes])
)
def test_decoding_raises_nothing_but_remote_protocol_errors(data, kind):
    """Whatever the bytes."""
    with contextlib.suppress(RemoteProtocolError):
        decode(kind, data)


def test_deeply_nested_and_lying_bodies_are_refused():
    """No recursion error, no allocation of what a length announces."""
    for body in (
        b"\x91" * 100_000,
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
    ):
        for kind in (Hello, list[object], object):
            with pytest.raises(RemoteProtocolError):
                decode(kind, body)
