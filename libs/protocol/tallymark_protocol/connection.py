"""One connection as a pure object: bytes in, frames out, and who may say what when.

It owns framing, the handshake and the connection's state; it knows no socket, no clock and no meaning of a body
other than those of the handshake. Client, gateways and stores all drive the same class: `receive_data(bytes)`
gives the frames that are complete, `send(...)` gives the bytes to write, `data_to_send()` gives what the
connection answers by itself (PONG to a PING, ERROR to a request of a later version) and must be asked for after
every `receive_data`.

The state changes with these frames, on both sides alike; every other frame leaves it as it is::

    state       frame    from     next
    START       HELLO    client   GREETING
    START       ERROR    server   CLOSED      refused unseen (too many connections)
    GREETING    WELCOME  server   OPEN
    GREETING    ERROR    server   CLOSED      refused: no common version, ...
    OPEN        GOAWAY   server   DRAINING    no new requests; answers under way still come
    any         anything that isn't allowed   BROKEN

While OPEN the client sends requests and one-way frames, and the server answers (an ERROR with request id 0 concerns the connection
and closes it: CLOSED); both may PING. While DRAINING the client may send none of its requests, but the server
still receives those that crossed its GOAWAY and must refuse them. Both sides drop what arrives while CLOSED.

Memory is bounded by what has arrived and by one frame's limit: an announced length reserves nothing. Data is
copied a constant number of times, however it is split.
"""

from __future__ import annotations

import enum
from typing import Final

from tallymark_protocol import limits
from tallymark_protocol.codec import decode, encode
from tallymark_protocol.errors import (
    ErrorCode,
    InvalidRequestError,
    LocalProtocolError,
    RemoteProtocolError,
    WireError,
    to_wire,
)
from tallymark_protocol.frames import (
    BODY_BYTES_MAX,
    HEADER,
    HEADER_BYTES,
    REQUEST_ID_MAX,
    TIMEOUT_MS_MAX,
    Frame,
    is_request,
    type_name,
)
from tallymark_protocol.messages import PROTOCOL_VERSION, PROTOCOL_VERSION_MIN, FrameType, Hello, Welcome


class Role(enum.Enum):
    """Which side of the connection this is."""

    CLIENT = "client"
    SERVER = "server"


class State(enum.Enum):
    """Where the connection stands; see the module's table."""

    START = "start"
    GREETING = "greeting"
    OPEN = "open"
    DRAINING = "draining"
    CLOSED = "closed"
    BROKEN = "broken"


_CLIENT, _SERVER = Role.CLIENT, Role.SERVER

_TRANSITIONS: Final = {
    (State.START, FrameType.HELLO): State.GREETING,
    (State.START, FrameType.ERROR): State.CLOSED,
    (State.GREETING, FrameType.WELCOME): State.OPEN,
    (State.GREETING, FrameType.ERROR): State.CLOSED,
    (State.OPEN, FrameType.GOAWAY): State.DRAINING,
}

_REQUESTS: Final = frozenset({FrameType.INGEST, FrameType.APPEND, FrameType.CALL})
_ANSWERS: Final = frozenset({FrameType.RECEIPT, FrameType.APPENDED, FrameType.RESULT, FrameType.ERROR})
_EITHER: Final = frozenset({FrameType.PING, FrameType.PONG})
_ONE_WAY: Final = frozenset({FrameType.REPLICATE})
_NOTHING: Final[frozenset[FrameType]] = frozenset()

# What each side may send in each state.
_MAY_SEND: Final = {
    (_CLIENT, State.START): frozenset({FrameType.HELLO}),
    (_SERVER, State.START): frozenset({FrameType.ERROR}),
    (_CLIENT, State.GREETING): _NOTHING,
    (_SERVER, State.GREETING): frozenset({FrameType.WELCOME, FrameType.ERROR}),
    (_CLIENT, State.OPEN): _REQUESTS | _ONE_WAY | _EITHER,
    (_SERVER, State.OPEN): _ANSWERS | _EITHER | {FrameType.GOAWAY},
    (_CLIENT, State.DRAINING): _EITHER,
    (_SERVER, State.DRAINING): _ANSWERS | _EITHER,
}

# What to do with a frame of each type as it arrives.
_REFUSE, _EXCHANGE, _HANDSHAKE, _GOAWAY, _PING, _DELIVER, _SKIP, _UNKNOWN_REQUEST = range(8)


def _actions(role: Role, state: State) -> bytes:
    """The action for each of the 256 types that the peer of `role` may send while in `state`."""
    peer = _SERVER if role is _CLIENT else _CLIENT
    allowed = set(_MAY_SEND.get((peer, state), _NOTHING))
    if role is _SERVER and state is State.DRAINING:
        allowed |= _REQUESTS | _ONE_WAY  # they crossed our GOAWAY
    if role is _CLIENT and state is State.GREETING:
        allowed |= {FrameType.WELCOME, FrameType.ERROR}
    established = state in (State.OPEN, State.DRAINING)
    actions = bytearray(256)
    for number in range(256):
        try:
            kind = FrameType(number)
        except ValueError:
            if established and number != 0:
                asked = role is _SERVER and is_request(number)
                actions[number] = _UNKNOWN_REQUEST if asked else _SKIP
            continue
        if kind not in allowed:
            continue
        if kind in (FrameType.HELLO, FrameType.WELCOME) or not established:
            actions[number] = _HANDSHAKE
        elif kind in _REQUESTS or kind in _ANSWERS:
            actions[number] = _EXCHANGE
        else:
            actions[number] = {
                FrameType.GOAWAY: _GOAWAY,
                FrameType.PING: _PING,
                FrameType.PONG: _DELIVER,
                FrameType.REPLICATE: _DELIVER,
            }[kind]
    return bytes(actions)


# Whether a side may send a type: no; yes; yes, with a request id; yes, and the state changes.
_NO, _YES, _WITH_ID, _AND_CHANGE = range(4)


def _sendable(role: Role, state: State) -> bytes:
    table = bytearray(256)
    for kind in _MAY_SEND.get((role, state), _NOTHING):
        if (state, kind) in _TRANSITIONS:
            table[kind] = _AND_CHANGE
        elif (kind in _REQUESTS or kind in _ANSWERS) and kind is not FrameType.ERROR:
            table[kind] = _WITH_ID
        else:
            table[kind] = _YES
    return bytes(table)


_ACTIONS: Final = {(role, state): _actions(role, state) for role in Role for state in State}
_SENDABLE: Final = {(role, state): _sendable(role, state) for role in Role for state in State}
_HANDSHAKE_LIMITS: Final = tuple(min(limits.HANDSHAKE_BYTES_MAX, most) for most in BODY_BYTES_MAX)
# Half-done frames up to this size are kept as they are; beyond it their buffer is given back when they are done.
_KEEP_BUFFER_BYTES: Final = 64 * 1024


class Connection:
    """The protocol's state on one side of one connection. See the module's docstring.

    Attributes:
        role: this side.
        state: where the connection stands.
        hello: on a server, what the client introduced itself with; None before.
        welcome: what was agreed, with the version and features both sides have; None before.
        refusal: the error that closed the connection, sent or received.
    """

    __slots__ = (
        "_actions",
        "_buffer",
        "_limits",
        "_needed",
        "_output",
        "_sendable",
        "hello",
        "refusal",
        "role",
        "state",
        "welcome",
    )

    def __init__(self, role: Role) -> None:
        self.role = role
        self.state = State.START
        self.hello: Hello | None = None
        self.welcome: Welcome | None = None
        self.refusal: WireError | None = None
        self._buffer = bytearray()  # of the one frame that is incomplete; begins with its header
        self._needed = HEADER_BYTES  # size of _buffer from which on looking into it is worth while
        self._output: list[bytes] = []  # answers of our own, not yet taken by data_to_send
        self._limits = _HANDSHAKE_LIMITS
        self._actions = _ACTIONS[role, State.START]
        self._sendable = _SENDABLE[role, State.START]

    # ------------------------------------------------------------ state

    @property
    def is_open(self) -> bool:
        """Whether the handshake is done and requests may be sent (client) or are expected (server)."""
        return self.state is State.OPEN

    @property
    def buffered_bytes(self) -> int:
        """Bytes kept of a frame that is not complete."""
        return len(self._buffer)

    def _become(self, state: State) -> None:
        self.state = state
        self._actions = _ACTIONS[self.role, state]
        self._sendable = _SENDABLE[self.role, state]
        self._limits = BODY_BYTES_MAX if state in (State.OPEN, State.DRAINING) else _HANDSHAKE_LIMITS

    def _poison(self, message: str, code: ErrorCode = ErrorCode.MALFORMED) -> RemoteProtocolError:
        self._become(State.BROKEN)
        self._buffer = bytearray()
        return RemoteProtocolError(message, code=code)

    # ------------------------------------------------------------ receiving

    def receive_data(self, data: bytes) -> list[Frame]:
        """Take bytes from the peer; return the frames that are now complete, in order.

        HELLO is among them: the server must call `accept` or `refuse` before it reads on. So are WELCOME,
        GOAWAY and the ERROR that closes the connection: look at `state` when frames of these types come.

        Raises:
            RemoteProtocolError: the peer broke the protocol. The connection is BROKEN from then on: close the
                transport. Frames of the same data that came before the fault are dropped.
        """
        if self.state is State.CLOSED:
            return []
        if self.state is State.BROKEN:
            raise RemoteProtocolError("the peer broke the protocol before, and the connection is closed")
        buffer = self._buffer
        if not buffer:
            return self._parse(data)
        buffer += data
        if len(buffer) < self._needed:
            return []
        # The buffer held one incomplete frame, so what lies behind that frame came with this data.
        data = bytes(buffer)
        if len(buffer) > _KEEP_BUFFER_BYTES:
            self._buffer = bytearray()
        else:
            buffer.clear()
        return self._parse(data)

    def _parse(self, data: bytes) -> list[Frame]:
        """Cut `data`, which begins with a header, into frames; keep the incomplete rest."""
        frames: list[Frame] = []
        append = frames.append
        unpack = HEADER.unpack_from
        new = tuple.__new__
        actions = self._actions
        sizes = self._limits
        position = 0
        end = len(data)
        while end - position >= HEADER_BYTES:
            length, kind, flags, reserved, request_id, timeout_ms = unpack(data, position)
            action = actions[kind]
            # Judged by the header alone, so that a bad frame is refused before its body has come.
            if length > sizes[kind] or reserved or not action:
                raise self._bad_header(length, kind, reserved)
            body_start = position + HEADER_BYTES
            stop = body_start + length
            if stop > end:
                self._needed = HEADER_BYTES + length
                self._buffer += memoryview(data)[position:]
                return frames
            position = stop
            if action == _EXCHANGE:
                if not request_id:
                    if kind != FrameType.ERROR:
                        raise self._poison(f"{type_name(kind)} without a request id")
                    self._refused(data[body_start:stop])
                append(new(Frame, (kind, flags, request_id, timeout_ms, data[body_start:stop])))
                if self.state is State.CLOSED:
                    return frames
            else:
                frame = Frame(kind, flags, request_id, timeout_ms, data[body_start:stop])
                if self._take(action, frame):
                    append(frame)
                if self.state is State.CLOSED:
                    return frames
                actions = self._actions
                sizes = self._limits
        if position < end:
            self._needed = HEADER_BYTES
            self._buffer += memoryview(data)[position:]
        return frames

    def _bad_header(self, length: int, kind: int, reserved: int) -> RemoteProtocolError:
        name = type_name(kind)
        if not self._actions[kind]:
            return self._poison(f"{name} is not allowed from the {self._peer} while {self.state.value}")
        if reserved:
            return self._poison(f"the reserved bytes in the header of {name} are not 0")
        most = self._limits[kind]
        return self._poison(f"{name} of {length} bytes: at most {most} are allowed", ErrorCode.TOO_LARGE)

    @property
    def _peer(self) -> str:
        return "server" if self.role is _CLIENT else "client"

    def _take(self, action: int, frame: Frame) -> bool:
        """Handle a frame of the connection itself; whether it is delivered as well."""
        if action == _PING:
            self._output.append(HEADER.pack(0, FrameType.PONG, 0, 0, frame.request_id, 0))
            return False
        if action == _SKIP:
            return False
        if action == _UNKNOWN_REQUEST:
            error = WireError(
                code=int(ErrorCode.UNSUPPORTED_VERSION),
                retriable=False,
                message=f"frames of {type_name(frame.type)} are not known to version {PROTOCOL_VERSION}",
            )
            body = encode(error)
            self._output.append(HEADER.pack(len(body), FrameType.ERROR, 0, 0, frame.request_id, 0) + body)
            return False
        if action == _GOAWAY:
            self._become(State.DRAINING)
        elif action == _HANDSHAKE:
            self._take_handshake(frame)
        return True

    def _take_handshake(self, frame: Frame) -> None:
        try:
            if frame.type == FrameType.HELLO:
                self.hello = decode(Hello, frame.body)
            elif frame.type == FrameType.WELCOME:
                self.welcome = decode(Welcome, frame.body)
            else:
                self.refusal = decode(WireError, frame.body)
        except RemoteProtocolError as error:
            raise self._poison(error.message) from error
        welcome = self.welcome
        if welcome is not None and not PROTOCOL_VERSION_MIN <= welcome.version <= PROTOCOL_VERSION:
            raise self._poison(
                f"the server chose version {welcome.version}, "
                f"outside the range {PROTOCOL_VERSION_MIN}-{PROTOCOL_VERSION} offered",
                ErrorCode.UNSUPPORTED_VERSION,
            )
        self._become(_TRANSITIONS[self.state, FrameType(frame.type)])

    def _refused(self, body: bytes) -> None:
        try:
            self.refusal = decode(WireError, body)
        except RemoteProtocolError as error:
            raise self._poison(error.message) from error
        self._become(State.CLOSED)

    def data_to_send(self) -> bytes:
        """What the connection has to say by itself since the last call: write it, if it is not empty."""
        if not self._output:
            return b""
        data = b"".join(self._output)
        self._output.clear()
        return data

    # ------------------------------------------------------------ sending

    def send(
        self, kind: int, body: bytes = b"", *, request_id: int = 0, flags: int = 0, timeout_ms: int = 0
    ) -> bytes:
        """The bytes of a frame, to be written in the order of the calls.

        Raises:
            LocalProtocolError: this side may not send that now, or the body is too large (TOO_LARGE).
        """
        return self.send_header(
            kind, len(body), request_id=request_id, flags=flags, timeout_ms=timeout_ms
        ) + bytes(body)

    def send_header(
        self, kind: int, body_bytes: int, *, request_id: int = 0, flags: int = 0, timeout_ms: int = 0
    ) -> bytes:
        """The header of a frame whose body, of `body_bytes`, the caller writes right after it. See `send`."""
        rule = self._sendable[kind]
        if rule == _NO:
            raise LocalProtocolError(
                f"the {self.role.value} can't send {type_name(kind)} while {self.state.value}"
            )
        if body_bytes > self._limits[kind]:
            raise LocalProtocolError(
                f"{type_name(kind)} of {body_bytes} bytes: at most {self._limits[kind]} are allowed",
                code=ErrorCode.TOO_LARGE,
            )
        if not 0 <= request_id <= REQUEST_ID_MAX:
            raise LocalProtocolError(f"request id {request_id} is outside 0..{REQUEST_ID_MAX}")
        if rule == _WITH_ID and not request_id:
            raise LocalProtocolError(f"{type_name(kind)} needs a request id")
        header = HEADER.pack(body_bytes, kind, flags, 0, request_id, min(timeout_ms, TIMEOUT_MS_MAX))
        if rule == _AND_CHANGE:
            self._become(_TRANSITIONS[self.state, FrameType(kind)])
        return header

    # ------------------------------------------------------------ handshake

    def initiate(self, hello: Hello) -> bytes:
        """On a client: the bytes that begin the connection. Then read until `state` is OPEN or CLOSED."""
        return self.send(FrameType.HELLO, encode(hello))

    def accept(
        self,
        mine: Welcome,
        *,
        version_min: int = PROTOCOL_VERSION_MIN,
        version_max: int = PROTOCOL_VERSION,
    ) -> bytes:
        """On a server, after HELLO: the bytes to answer with, a WELCOME or the ERROR that refuses.

        The version and features of the answer are agreed from the client's and the server's; those in `mine`
        are replaced (`mine.features` are all the server has). Where `is_open` is False afterwards, the client
        was refused: write the bytes, then close.
        """
        hello = self.hello
        if hello is None:
            raise LocalProtocolError("there is no HELLO to accept yet")
        try:
            version = negotiate(hello, version_min=version_min, version_max=version_max)
        except InvalidRequestError as error:
            return self.refuse(to_wire(error))
        features = [name for name in mine.features if name in set(hello.features)]
        welcome = Welcome(
            version=version,
            node_id=mine.node_id,
            role=mine.role,
            now_ns=mine.now_ns,
            features=features,
            topology=mine.topology,
            request_events_max=mine.request_events_max,
            request_bytes_max=mine.request_bytes_max,
        )
        data = self.send(FrameType.WELCOME, encode(welcome))
        self.welcome = welcome
        return data

    def refuse(self, error: WireError) -> bytes:
        """On a server: the bytes that end the connection with an error, also when it is BROKEN.

        Write them, then close the transport. Empty when the connection is closed already.
        """
        if self.role is not _SERVER:
            raise LocalProtocolError("only a server refuses a connection")
        if self.state is State.CLOSED:
            return b""
        body = encode(error)
        self.refusal = error
        self._become(State.CLOSED)
        self._buffer = bytearray()
        return HEADER.pack(len(body), FrameType.ERROR, 0, 0, 0, 0) + body


def negotiate(
    hello: Hello, *, version_min: int = PROTOCOL_VERSION_MIN, version_max: int = PROTOCOL_VERSION
) -> int:
    """The highest version that both sides speak.

    Raises:
        InvalidRequestError: UNSUPPORTED_VERSION; the ranges don't overlap, and the message names both.
    """
    if hello.version_min <= hello.version_max:
        version = min(hello.version_max, version_max)
        if version >= max(hello.version_min, version_min):
            return version
    raise InvalidRequestError(
        f"no common protocol version: the client speaks {hello.version_min}-{hello.version_max}, "
        f"this server {version_min}-{version_max}",
        code=ErrorCode.UNSUPPORTED_VERSION,
    )
