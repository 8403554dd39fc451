"""The one-way frame: from a client to a server, without a request id and without an answer."""

from __future__ import annotations

import pytest

from tallymark_protocol import limits
from tallymark_protocol.connection import Connection, Role, State
from tallymark_protocol.errors import ErrorCode, LocalProtocolError, RemoteProtocolError
from tallymark_protocol.frames import BODY_BYTES_MAX, HEADER, is_request
from tallymark_protocol.messages import FrameType, Hello, Welcome


def pair() -> tuple[Connection, Connection]:
    client, server = Connection(Role.CLIENT), Connection(Role.SERVER)
    server.receive_data(client.initiate(Hello(1, 1)))
    client.receive_data(server.accept(Welcome(version=1, node_id="s", role="store", now_ns=0)))
    return client, server


def test_it_is_delivered_as_it_was_sent() -> None:
    """Whatever its bytes are, in one piece or many."""
    client, server = pair()
    body = bytes(range(256)) * 5
    data = client.send(FrameType.REPLICATE, body)
    for step in (len(data), 1, 7):
        frames = []
        for at in range(0, len(data), step):
            frames += server.receive_data(data[at : at + step])
        assert [(x.type, x.request_id, x.body) for x in frames] == [(int(FrameType.REPLICATE), 0, body)]
        assert server.data_to_send() == b""
    assert not is_request(FrameType.REPLICATE)


def test_only_clients_send_it_and_only_while_open() -> None:
    """A server is told so, and so is a client that has been told to go."""
    client, server = pair()
    with pytest.raises(LocalProtocolError):
        server.send(FrameType.REPLICATE, b"x")
    crossing = client.send(FrameType.REPLICATE, b"x")
    client.receive_data(server.send(FrameType.GOAWAY))
    assert [x.body for x in server.receive_data(crossing)] == [b"x"]
    with pytest.raises(LocalProtocolError):
        client.send(FrameType.REPLICATE, b"x")
    fresh, _ = pair()
    with pytest.raises(RemoteProtocolError):
        fresh.receive_data(HEADER.pack(1, FrameType.REPLICATE, 0, 0, 0, 0) + b"x")
    assert fresh.state is State.BROKEN


def test_it_is_not_taken_before_the_handshake() -> None:
    """Nobody has said who speaks."""
    server = Connection(Role.SERVER)
    with pytest.raises(RemoteProtocolError):
        server.receive_data(HEADER.pack(1, FrameType.REPLICATE, 0, 0, 0, 0) + b"x")


def test_its_size_is_bounded() -> None:
    """By a limit of its own, into which the largest record fits; judged by the header alone."""
    client, server = pair()
    most = limits.REPLICATE_FRAME_BYTES_MAX
    assert BODY_BYTES_MAX[FrameType.REPLICATE] == most > limits.APPEND_FRAME_BYTES_MAX
    client.send_header(FrameType.REPLICATE, most)
    with pytest.raises(LocalProtocolError) as caught:
        client.send_header(FrameType.REPLICATE, most + 1)
    assert caught.value.code == ErrorCode.TOO_LARGE
    with pytest.raises(RemoteProtocolError) as refused:
        server.receive_data(HEADER.pack(most + 1, FrameType.REPLICATE, 0, 0, 0, 0))
    assert refused.value.code == ErrorCode.TOO_LARGE
