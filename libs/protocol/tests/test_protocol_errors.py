"""The error tree, its codes on the wire, and the sentences about events."""

import pickle

import msgspec
import pytest

from tallymark_protocol import errors, limits
from tallymark_protocol.errors import (
    AlreadyExistsError,
    BackpressureError,
    ErrorCode,
    InvalidRequestError,
    LocalProtocolError,
    NotFoundError,
    OutcomeUnknownError,
    ProtocolError,
    Reason,
    RemoteProtocolError,
    ServerError,
    TallymarkError,
    UnavailableError,
    WireError,
    error_from_wire,
    sentence,
    to_wire,
)


def through_the_wire(error: BaseException) -> TallymarkError:
    wire = msgspec.msgpack.decode(msgspec.msgpack.encode(to_wire(error)), type=WireError)
    return error_from_wire(wire.code, wire.retriable, wire.message, wire.details)


def test_every_error_is_a_tallymark_error():
    """One `except TallymarkError` catches them all, and nothing foreign."""
    kinds = [
        value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)
    ]
    assert len(kinds) == 11
    assert all(issubclass(kind, TallymarkError) for kind in kinds)
    assert issubclass(LocalProtocolError, ProtocolError)
    assert issubclass(RemoteProtocolError, ProtocolError)
    for kind in kinds:
        assert kind.__name__ in errors.__doc__.split()


@pytest.mark.parametrize("code", list(ErrorCode))
def test_every_code_comes_back_as_it_was(code):
    """Code, message, details and `retriable` survive the way, whichever the flag is."""
    for retriable in (False, True):
        error = error_from_wire(code, retriable, "what was wrong", {"partition": 3})
        again = through_the_wire(error)
        assert type(again) is type(error)
        assert again.code is code
        assert again.retriable is retriable
        assert str(again) == again.message == "what was wrong"
        assert again.details == {"partition": 3}


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (ErrorCode.MALFORMED, InvalidRequestError),
        (ErrorCode.UNSUPPORTED_VERSION, InvalidRequestError),
        (ErrorCode.UNKNOWN_METRIC, NotFoundError),
        (ErrorCode.METRIC_EXISTS, AlreadyExistsError),
        (ErrorCode.INVALID_SCHEMA, InvalidRequestError),
        (ErrorCode.INVALID_ARGUMENT, InvalidRequestError),
        (ErrorCode.NOT_FOUND, NotFoundError),
        (ErrorCode.TOO_LARGE, InvalidRequestError),
        (ErrorCode.EVENTS_DROPPED, InvalidRequestError),
        (ErrorCode.OVERLOADED, BackpressureError),
        (ErrorCode.DISK_FULL, BackpressureError),
        (ErrorCode.NOT_LEADER, UnavailableError),
        (ErrorCode.PARTITION_DAMAGED, UnavailableError),
        (ErrorCode.PARTITION_UNAVAILABLE, UnavailableError),
        (ErrorCode.OUTCOME_UNKNOWN, OutcomeUnknownError),
        (ErrorCode.SEQUENCE_REUSED, InvalidRequestError),
        (ErrorCode.TIMEOUT, UnavailableError),
        (ErrorCode.CLOSED, UnavailableError),
        (ErrorCode.INTERNAL, ServerError),
    ],
)
def test_the_class_of_each_code(code, kind):
    """What a caller catches for each code."""
    assert type(error_from_wire(code, False, "")) is kind


def test_codes_and_reasons_never_move():
    """These numbers are on the wire and in the log: changing one changes what was said."""
    assert {int(code): code.name for code in ErrorCode} == {
        1: "INTERNAL",
        16: "MALFORMED",
        17: "UNSUPPORTED_VERSION",
        18: "INVALID_ARGUMENT",
        19: "INVALID_SCHEMA",
        20: "TOO_LARGE",
        21: "SEQUENCE_REUSED",
        32: "UNKNOWN_METRIC",
        33: "METRIC_EXISTS",
        34: "NOT_FOUND",
        35: "EVENTS_DROPPED",
        48: "OVERLOADED",
        49: "DISK_FULL",
        50: "NOT_LEADER",
        51: "PARTITION_UNAVAILABLE",
        52: "PARTITION_DAMAGED",
        53: "TIMEOUT",
        54: "CLOSED",
        64: "OUTCOME_UNKNOWN",
    }
    assert [int(reason) for reason in Reason] == [0, 1, 2, 3, *range(16, 31)]
    assert (Reason.REPEAT, Reason.PERIOD_SEALED, Reason.VALUE_TEXT_TOO_LARGE) == (3, 20, 30)


def test_a_code_of_a_newer_server_becomes_a_server_error():
    """Its number and its flag are kept, so that a retry still does the right thing."""
    error = error_from_wire(777, True, "something new")
    assert type(error) is ServerError
    assert (error.code, error.retriable, str(error)) == (777, True, "something new")
    assert through_the_wire(error).code == 777


def test_defaults():
    """Each class brings its usual code and whether trying again can help."""
    assert BackpressureError("x").retriable
    assert UnavailableError("x").retriable
    assert not OutcomeUnknownError("x").retriable
    assert not InvalidRequestError("x").retriable
    assert RemoteProtocolError("x").code is ErrorCode.MALFORMED
    assert LocalProtocolError("x").code is ErrorCode.INTERNAL
    assert UnavailableError("x", code=ErrorCode.CLOSED, retriable=False).retriable is False
    assert str(ServerError()) == "ServerError"


def test_already_exists_tells_an_equal_schema():
    """`identical` is true only when the server said so."""
    assert through_the_wire(AlreadyExistsError("x", details={"identical": True})).identical is True
    assert AlreadyExistsError("x", details={"identical": False}).identical is False
    assert AlreadyExistsError("x", details={"identical": "yes"}).identical is False
    assert AlreadyExistsError("x").identical is False


@pytest.mark.parametrize(
    ("details", "expected"),
    [(None, None), ({"retry_after_ms": 250}, 250), ({"retry_after_ms": 0}, 0)]
    + [({"retry_after_ms": bad}, None) for bad in (-1, True, "soon", 1.5, None)],
)
def test_backpressure_may_say_how_long(details, expected):
    """A peer's nonsense counts as nothing said."""
    assert BackpressureError("x", details=details).retry_after_ms == expected


def test_a_foreign_exception_says_only_its_type():
    """What an unexpected exception holds stays on the server."""
    wire = to_wire(KeyError("secret"))
    assert wire == WireError(code=1, retriable=False, message="internal error (KeyError)")


def test_a_message_is_cut_and_always_encodable():
    """Too long, or quoting what UTF-8 can't say: the error still travels."""
    long = through_the_wire(InvalidRequestError("ü" * limits.ERROR_MESSAGE_BYTES_MAX + "x"))
    assert long.message == "ü" * (limits.ERROR_MESSAGE_BYTES_MAX // 2)
    assert through_the_wire(InvalidRequestError("bad \ud800")).message == "bad \\ud800"


class OddlyBuiltError(UnavailableError):
    def __init__(self, message: str, *, partition: int) -> None:
        super().__init__(message, details={"partition": partition})
        self.partition = partition


def test_errors_pickle():
    """Between processes nothing of an error is lost, whatever its class takes to be built."""
    error = pickle.loads(pickle.dumps(BackpressureError("x", details={"retry_after_ms": 7})))
    assert (type(error), error.retry_after_ms, error.retriable, str(error)) == (
        BackpressureError,
        7,
        True,
        "x",
    )
    odd = pickle.loads(pickle.dumps(OddlyBuiltError("y", partition=4)))
    assert (odd.partition, odd.details, str(odd)) == (4, {"partition": 4}, "y")


@pytest.mark.parametrize("reason", list(Reason))
def test_every_reason_has_a_sentence(reason):
    """It starts with the event, ends without a full stop, and quotes the detail."""
    text = sentence(reason, index=3)
    assert text.startswith("event 3: ")
    assert not text.endswith(".")
    assert "code" not in text or "metric" in text or "code" in reason.name.lower()
    assert sentence(reason, index=3, detail='"cpu"') == f'{text} ("cpu")'


def test_sentences_of_the_unknown_and_the_endless():
    """A newer server's reason keeps its number; a long detail is cut."""
    assert sentence(99, index=0) == "event 0: rejected with code 99, which this version doesn't know"
    assert len(sentence(Reason.UNKNOWN_METRIC, index=0, detail="x" * 10_000)) < 300
    assert len({sentence(reason, index=0) for reason in Reason}) == len(Reason)


def test_which_reasons_are_rejections():
    """A duplicate or a repeat was counted once already; a conflict and every fault were not."""
    assert [reason for reason in Reason if not reason.rejected] == [
        Reason.ACCEPTED,
        Reason.DUPLICATE,
        Reason.REPEAT,
    ]
