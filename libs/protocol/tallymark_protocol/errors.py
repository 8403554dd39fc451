"""Every error of the system, its code on the wire, and the verdicts on single events.

    TallymarkError                 code, retriable, message, details
     ├─ ServerError                the service failed, or sent a code this version doesn't know
     ├─ BackpressureError          too much for now, or no room: back off (`retry_after_ms`) and call again
     ├─ AlreadyExistsError         the metric's code is taken (`identical`: by an equal schema)
     ├─ NotFoundError              no such metric, or nothing under that name
     ├─ InvalidRequestError        the request can never succeed as it is
     ├─ UnavailableError           nobody could serve it now: no leader, damaged copies, timeout, closed
     ├─ OutcomeUnknownError        it may or may not have taken effect; assume neither
     └─ ProtocolError
         ├─ LocalProtocolError     this side was about to break the protocol (a defect here)
         └─ RemoteProtocolError    the other side's bytes make no sense

An error travels as a `WireError`: a code of `ErrorCode`, whether the same request may be sent again, a sentence,
and a few details. `to_wire` makes one of any exception, `error_from_wire` makes the exception of one. Codes are
never renumbered; a code that the receiver doesn't know becomes a `ServerError` that keeps the number.

A request can succeed while single events in it do not. What became of an event is a `Reason`: the leader's
verdict, stored in the log beside the event, so these numbers are part of the disk format. `sentence` says it in
English.
"""

from __future__ import annotations

import enum
from typing import Any, ClassVar

import msgspec

from tallymark_protocol import limits


class ErrorCode(enum.IntEnum):
    """Codes of errors on the wire; numbers are for ever."""

    INTERNAL = 1

    # The request is wrong, and stays wrong.
    MALFORMED = 16
    UNSUPPORTED_VERSION = 17
    INVALID_ARGUMENT = 18
    INVALID_SCHEMA = 19
    TOO_LARGE = 20
    SEQUENCE_REUSED = 21  # a producer's sequence came again with other content

    # The request names something that is, or isn't, there.
    UNKNOWN_METRIC = 32
    METRIC_EXISTS = 33
    NOT_FOUND = 34
    EVENTS_DROPPED = 35  # raw events that are needed were kept for their time, and dropped

    # The request may succeed later, or elsewhere.
    OVERLOADED = 48
    DISK_FULL = 49
    NOT_LEADER = 50
    PARTITION_UNAVAILABLE = 51
    PARTITION_DAMAGED = 52  # too few undamaged copies: needs an operator, retrying doesn't help
    TIMEOUT = 53
    CLOSED = 54

    OUTCOME_UNKNOWN = 64


class WireError(msgspec.Struct, frozen=True):
    """An error as it travels."""

    code: int  # an `ErrorCode`, or one of a newer version
    retriable: bool  # whether the very same request may be sent again
    message: str
    details: dict[str, Any] | None = None


class TallymarkError(Exception):
    """The root of the tree: everything this project raises on purpose.

    Attributes:
        code: an `ErrorCode`, or a plain int from a newer server.
        retriable: whether the very same request may be sent again, and might then succeed.
        message: a sentence, lower-case, without a full stop.
        details: further values, by name; of types that MessagePack carries.
    """

    default_code: ClassVar[ErrorCode] = ErrorCode.INTERNAL
    default_retriable: ClassVar[bool] = False

    def __init__(
        self,
        message: str = "",
        *,
        code: int | None = None,
        retriable: bool | None = None,
        details: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code: int = self.default_code if code is None else code
        self.retriable = self.default_retriable if retriable is None else retriable
        self.details: dict[str, Any] = dict(details) if details else {}

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions pickle by `args` alone, which would drop the keyword-only rest.
        return _rebuild, (type(self), self.args, self.__dict__)

    def __str__(self) -> str:
        return self.message or type(self).__name__


def _rebuild(kind: type[TallymarkError], args: tuple[Any, ...], state: dict[str, Any]) -> TallymarkError:
    # Past __init__, whose arguments a subclass may have changed.
    error = kind.__new__(kind, *args)
    error.__dict__.update(state)
    return error


class ServerError(TallymarkError):
    """The service failed in a way that says nothing about the request."""


class BackpressureError(TallymarkError):
    """More than can be taken now. Wait, for `retry_after_ms` if it is given, and call again."""

    default_code = ErrorCode.OVERLOADED
    default_retriable = True

    @property
    def retry_after_ms(self) -> int | None:
        """How long to wait before the next try, if the server said so."""
        value = self.details.get("retry_after_ms")
        # `type`, not `isinstance`: details come from a peer, and True is no duration.
        return value if type(value) is int and value >= 0 else None


class AlreadyExistsError(TallymarkError):
    """A metric of that code exists. `identical` tells whether it has this very schema."""

    default_code = ErrorCode.METRIC_EXISTS

    @property
    def identical(self) -> bool:
        """Whether the existing metric's schema equals the one sent: then nothing is left to do."""
        return self.details.get("identical") is True


class NotFoundError(TallymarkError):
    """Nothing exists under that name."""

    default_code = ErrorCode.NOT_FOUND


class InvalidRequestError(TallymarkError):
    """The request breaks a rule or a limit. The message says which; sending it again can't help."""

    default_code = ErrorCode.INVALID_ARGUMENT


class UnavailableError(TallymarkError):
    """Nobody could serve the request now. It had no effect, or is safe to repeat under its identity."""

    default_code = ErrorCode.PARTITION_UNAVAILABLE
    default_retriable = True


class OutcomeUnknownError(TallymarkError):
    """The request may have taken effect or not, and can't be repeated under its identity. Assume neither."""

    default_code = ErrorCode.OUTCOME_UNKNOWN


class ProtocolError(TallymarkError):
    """The protocol was broken, by one side or the other. The connection can't be used any further."""

    default_code = ErrorCode.MALFORMED


class LocalProtocolError(ProtocolError):
    """This side was asked to do what the protocol doesn't allow in this state: a defect of the caller."""

    default_code = ErrorCode.INTERNAL


class RemoteProtocolError(ProtocolError):
    """Bytes from a peer, or from a disk, aren't what the protocol says."""


_CLASS_OF_CODE: dict[int, type[TallymarkError]] = {
    ErrorCode.INTERNAL: ServerError,
    ErrorCode.MALFORMED: InvalidRequestError,
    ErrorCode.UNSUPPORTED_VERSION: InvalidRequestError,
    ErrorCode.INVALID_ARGUMENT: InvalidRequestError,
    ErrorCode.INVALID_SCHEMA: InvalidRequestError,
    ErrorCode.TOO_LARGE: InvalidRequestError,
    ErrorCode.SEQUENCE_REUSED: InvalidRequestError,
    ErrorCode.UNKNOWN_METRIC: NotFoundError,
    ErrorCode.METRIC_EXISTS: AlreadyExistsError,
    ErrorCode.NOT_FOUND: NotFoundError,
    ErrorCode.EVENTS_DROPPED: InvalidRequestError,
    ErrorCode.OVERLOADED: BackpressureError,
    ErrorCode.DISK_FULL: BackpressureError,
    ErrorCode.NOT_LEADER: UnavailableError,
    ErrorCode.PARTITION_UNAVAILABLE: UnavailableError,
    ErrorCode.PARTITION_DAMAGED: UnavailableError,
    ErrorCode.TIMEOUT: UnavailableError,
    ErrorCode.CLOSED: UnavailableError,
    ErrorCode.OUTCOME_UNKNOWN: OutcomeUnknownError,
}


def error_from_wire(
    code: int, retriable: bool, message: str, details: dict[str, Any] | None = None
) -> TallymarkError:
    """Make the exception of a `WireError`'s fields; the caller raises it.

    An unknown code gives a `ServerError` that keeps code, message and `retriable`.
    """
    kind = _CLASS_OF_CODE.get(code, ServerError)
    known = ErrorCode(code) if code in _CLASS_OF_CODE else code
    return kind(message, code=known, retriable=retriable, details=details)


def to_wire(error: BaseException) -> WireError:
    """Make a `WireError` of any exception.

    One that isn't of this tree becomes INTERNAL and keeps only its type's name: its text may hold what a
    client must not see.
    """
    if not isinstance(error, TallymarkError):
        return WireError(
            code=int(ErrorCode.INTERNAL), retriable=False, message=f"internal error ({type(error).__name__})"
        )
    # Replacing what UTF-8 can't say: an error about a bad string must not fail for quoting it.
    encoded = error.message.encode("utf-8", "backslashreplace")[: limits.ERROR_MESSAGE_BYTES_MAX]
    return WireError(
        code=int(error.code),
        retriable=error.retriable,
        message=encoded.decode("utf-8", "ignore"),
        details=error.details or None,
    )


class Reason(enum.IntEnum):
    """What became of one event. Part of the log's format: numbers are for ever."""

    ACCEPTED = 0
    DUPLICATE = 1  # its event id is stored already, with the same payload
    CONFLICT = 2  # its event id is stored already, with another payload
    REPEAT = 3  # event of a chunk that is in the log already; never counted again

    UNKNOWN_METRIC = 16
    BAD_OPERATION = 17
    TIME_IN_FUTURE = 18
    TIME_BEFORE_EPOCH = 19
    PERIOD_SEALED = 20
    VALUE_OUT_OF_RANGE = 21
    VALUE_NOT_TEXT = 22
    VALUE_NOT_NUMBER = 23
    PROPERTIES_TOO_LARGE = 24
    INVALID_PROPERTY = 25
    INVALID_EVENT_ID = 26
    INVALID_ACCOUNT = 27
    INVALID_TIMESTAMP = 28
    INVALID_METRIC_CODE = 29
    VALUE_TEXT_TOO_LARGE = 30

    @property
    def rejected(self) -> bool:
        """Whether the event was refused for a fault of its own (a duplicate or a repeat was not)."""
        return self is Reason.CONFLICT or self >= Reason.UNKNOWN_METRIC


_SENTENCES: dict[int, str] = {
    Reason.ACCEPTED: "stored",
    Reason.DUPLICATE: "an event with this id and the same content is stored already",
    Reason.CONFLICT: "an event with this id but other content is stored already",
    Reason.REPEAT: "its chunk is stored already",
    Reason.UNKNOWN_METRIC: "no metric has this code",
    Reason.BAD_OPERATION: "the metric's aggregation doesn't allow this operation",
    Reason.TIME_IN_FUTURE: "its timestamp is more than one hour ahead of the server's clock",
    Reason.TIME_BEFORE_EPOCH: "its timestamp is before 1970-01-01T00:00:00Z",
    Reason.PERIOD_SEALED: "the billing period of its timestamp is sealed",
    Reason.VALUE_OUT_OF_RANGE: "its value is outside the range of the metric's values",
    Reason.VALUE_NOT_TEXT: "the metric counts unique strings, so the value must be a string",
    Reason.VALUE_NOT_NUMBER: "the metric's values are whole numbers, so the value can't be a string",
    Reason.PROPERTIES_TOO_LARGE: f"its properties exceed {limits.PROPERTIES_BYTES_MAX} bytes",
    Reason.INVALID_PROPERTY: (
        f"a property key must be a string of 1 to {limits.PROPERTY_KEY_BYTES_MAX} bytes, "
        f"a property value a string of at most {limits.PROPERTY_VALUE_BYTES_MAX}"
    ),
    Reason.INVALID_EVENT_ID: (
        "its id must be a non-empty str or bytes, a UUID or an int, "
        f"of at most {limits.EVENT_ID_BYTES_MAX - 1} bytes"
    ),
    Reason.INVALID_ACCOUNT: "its account id must be a whole number from 0 to 2^64-1",
    Reason.INVALID_TIMESTAMP: "its timestamp must be an aware datetime or whole nanoseconds since 1970 (UTC)",
    Reason.INVALID_METRIC_CODE: "a metric code is 1 to 64 characters of a-z A-Z 0-9 _ . : -",
    Reason.VALUE_TEXT_TOO_LARGE: f"its value is a string of more than {limits.VALUE_TEXT_BYTES_MAX - 1} bytes",
}


def sentence(reason: int, *, index: int, detail: str = "") -> str:
    """Say in English what became of an event: `event 3: no metric has this code ("cpu")`.

    Args:
        reason: a `Reason`, or a number from a newer server.
        index: the event's position in the caller's list, from 0.
        detail: what the sentence is about (a code, a key, a value), quoted in brackets when not empty.
    """
    text = _SENTENCES.get(reason, f"rejected with code {int(reason)}, which this version doesn't know")
    if detail:
        quoted = detail if len(detail) <= _DETAIL_CHARACTERS_MAX else detail[:_DETAIL_CHARACTERS_MAX] + "…"
        return f"event {index}: {text} ({quoted})"
    return f"event {index}: {text}"


_DETAIL_CHARACTERS_MAX = 200
