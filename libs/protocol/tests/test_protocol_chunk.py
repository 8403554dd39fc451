"""Chunks: what the encoder writes, the server's kernels accept and read back as the same events."""

import datetime as dt
import uuid
from array import array

import google_crc32c
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tallymark_protocol import chunk, limits, payload
from tallymark_protocol import layout as lay
from tallymark_protocol.errors import InvalidRequestError, Reason
from tallymark_protocol.identifiers import decode_event_id
from tallymark_protocol.model import Event, OperationType

UTC = dt.UTC
SHIFT = dt.timezone(dt.timedelta(hours=-5, minutes=-30))


def unpack_set(data):
    """Decode a property set."""
    result, position = {}, 0
    while position < len(data):
        key_end = position + 1 + data[position]
        value_end = key_end + 2 + int.from_bytes(data[key_end : key_end + 2], "little")
        result[data[position + 1 : key_end].decode()] = data[key_end + 2 : value_end].decode()
        position = value_end
    return result


def decode(data):
    """Validate a chunk as a server does, and return its events as tuples."""
    assert len(data) <= limits.REQUEST_BYTES_MAX
    assert int.from_bytes(data[4:8], "little") == google_crc32c.value(data[8:])
    buffer = np.frombuffer(data, dtype=np.uint8)
    columns = np.zeros(payload.COLUMNS, dtype=np.int64)
    assert payload.validate_chunk(buffer, 0, len(data), columns) == payload.OK

    def table(ends, content, k):
        start = payload.table_start(buffer, columns[ends], columns[content], k)
        return data[start : payload.table_end(buffer, columns[ends], columns[content], k)]

    events = []
    for i in range(int(columns[payload.C_EVENTS])):
        code = table(payload.C_METRIC_ENDS, payload.C_METRIC_BYTES, payload.metric_at(buffer, columns, i))
        value = int(payload.value_at(buffer, columns, i))
        if columns[payload.C_TEXT_ENCODING] == lay.PLAIN:
            text = table(payload.C_TEXT_ENDS, payload.C_TEXT_BYTES, i)
            if text:
                assert value == 0
                value = text[1:].decode() if text[0] == 1 else int.from_bytes(text[1:], "little")
        time = int(payload.time_at(buffer, columns, i))
        number = int(payload.properties_at(buffer, columns, i))
        properties = {}
        if number:
            properties = unpack_set(table(payload.C_PROPERTY_ENDS, payload.C_PROPERTY_BYTES, number - 1))
        event_id = None
        if columns[payload.C_ID_ENCODING] == lay.PLAIN:
            raw = table(payload.C_ID_ENDS, payload.C_ID_BYTES, i)
            event_id = decode_event_id(raw) if raw else None
        events.append(
            (
                int(payload.account_at(buffer, columns, i)),
                code.decode(),
                value,
                None if time == lay.TIME_ABSENT else time,
                properties,
                int(payload.operation_at(buffer, columns, i)),
                event_id,
            )
        )
    return events


def nanoseconds(value):
    """A timestamp in nanoseconds, by another way than the encoder's."""
    if isinstance(value, dt.datetime):
        return (value - dt.datetime(1970, 1, 1, tzinfo=UTC)) // dt.timedelta(microseconds=1) * 1_000
    return value


def expected(event):
    """What decoding must give for an event."""
    return (
        event.account_id,
        event.metric_code,
        event.value,
        nanoseconds(event.timestamp),
        event.properties,
        int(event.operation_type),
        event.id,
    )


def encode(events):
    """Encode with a fixed identity."""
    return chunk.encode_events(events, 7, 1, 1_000)


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
identifiers = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8),
    st.binary(min_size=1, max_size=8),
    st.uuids(),
    st.integers(-(2**200), 2**200),
)
events_strategy = st.builds(
    Event,
    account_id=st.one_of(st.integers(0, 3), st.integers(0, 2**64 - 1)),
    metric_code=st.sampled_from(["a", "api.calls", "x" * 64, "A_b-c:1"]),
    value=st.one_of(st.just(1), st.integers(-(2**63), 2**63 - 1), st.integers(2**63, 2**64 - 1), text),
    timestamp=st.one_of(
        st.none(),
        st.integers(0, 2**63 - 1),
        st.datetimes(
            dt.datetime(1971, 1, 1),  # noqa: DTZ001
            dt.datetime(2261, 1, 1),  # noqa: DTZ001
            timezones=st.sampled_from([UTC, SHIFT]),
        ),
    ),
    properties=st.dictionaries(st.text("kyé", min_size=1, max_size=2), text, max_size=3),
    operation_type=st.sampled_from(OperationType),
    id=st.none() | identifiers,
)
quick = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


@quick
@given(st.lists(events_strategy, min_size=1, max_size=20))
def test_round_trip(events):
    """Every event comes back as it went in, in order."""
    encoded = encode(events)
    assert encoded.bad == []
    assert [e for part in encoded.chunks for e in decode(part.data)] == [expected(event) for event in events]


BAD = [
    (Event(-1, "m"), Reason.INVALID_ACCOUNT),
    (Event(2**64, "m"), Reason.INVALID_ACCOUNT),
    (Event(True, "m"), Reason.INVALID_ACCOUNT),
    (Event(1.0, "m"), Reason.INVALID_ACCOUNT),
    (Event("1", "m"), Reason.INVALID_ACCOUNT),
    (Event(1, ""), Reason.INVALID_METRIC_CODE),
    (Event(1, "m\n"), Reason.INVALID_METRIC_CODE),
    (Event(1, "x" * 65), Reason.INVALID_METRIC_CODE),
    (Event(1, ["m"]), Reason.INVALID_METRIC_CODE),
    (Event(1, 5), Reason.INVALID_METRIC_CODE),
    (Event(1, "m", 1.5), Reason.VALUE_NOT_NUMBER),
    (Event(1, "m", 1.0), Reason.VALUE_NOT_NUMBER),
    (Event(1, "m", True), Reason.VALUE_NOT_NUMBER),
    (Event(1, "m", None), Reason.VALUE_NOT_NUMBER),
    (Event(1, "m", b"x"), Reason.VALUE_NOT_NUMBER),
    (Event(1, "m", 2**64), Reason.VALUE_OUT_OF_RANGE),
    (Event(1, "m", -(2**63) - 1), Reason.VALUE_OUT_OF_RANGE),
    (Event(1, "m", 10**6000), Reason.VALUE_OUT_OF_RANGE),
    (Event(1, "m", "x" * 1024), Reason.VALUE_TEXT_TOO_LARGE),
    (Event(1, "m", "\ud800"), Reason.VALUE_NOT_TEXT),
    (Event(1, "m", 1, dt.datetime(2026, 1, 1)), Reason.INVALID_TIMESTAMP),  # noqa: DTZ001
    (Event(1, "m", 1, -1), Reason.TIME_BEFORE_EPOCH),
    (Event(1, "m", 1, lay.TIME_ABSENT), Reason.TIME_BEFORE_EPOCH),
    (Event(1, "m", 1, 2**63), Reason.INVALID_TIMESTAMP),
    (Event(1, "m", 1, 1.5), Reason.INVALID_TIMESTAMP),
    (Event(1, "m", 1, dt.datetime(1969, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC)), Reason.TIME_BEFORE_EPOCH),
    (
        Event(1, "m", 1, dt.datetime(1970, 1, 1, tzinfo=dt.timezone(dt.timedelta(hours=1)))),
        Reason.TIME_BEFORE_EPOCH,
    ),
    (Event(1, "m", 1, dt.datetime(2262, 4, 12, tzinfo=UTC)), Reason.INVALID_TIMESTAMP),
    (Event(1, "m", 1, True), Reason.INVALID_TIMESTAMP),
    (Event(1, "m", 1, None, {"k": 1}), Reason.INVALID_PROPERTY),
    (Event(1, "m", 1, None, {1: "v"}), Reason.INVALID_PROPERTY),
    (Event(1, "m", 1, None, {"": "v"}), Reason.INVALID_PROPERTY),
    (Event(1, "m", 1, None, {"k": "\ud800"}), Reason.INVALID_PROPERTY),
    (Event(1, "m", 1, None, {"k": ["v"]}), Reason.INVALID_PROPERTY),
    (Event(1, "m", 1, None, None), Reason.INVALID_PROPERTY),
    (Event(1, "m", 1, None, {"k" * 129: "v"}), Reason.INVALID_PROPERTY),
    (Event(1, "m", 1, None, {"k": "v" * 1025}), Reason.INVALID_PROPERTY),
    (Event(1, "m", 1, None, {f"{i}": "v" * 1000 for i in range(66)}), Reason.PROPERTIES_TOO_LARGE),
    (Event(1, "m", operation_type=3), Reason.BAD_OPERATION),
    (Event(1, "m", operation_type=False), Reason.BAD_OPERATION),
    (Event(1, "m", operation_type="ADD"), Reason.BAD_OPERATION),
    (Event(1, "m", id=""), Reason.INVALID_EVENT_ID),
    (Event(1, "m", id=b""), Reason.INVALID_EVENT_ID),
    (Event(1, "m", id="x" * 256), Reason.INVALID_EVENT_ID),
    (Event(1, "m", id="\ud800"), Reason.INVALID_EVENT_ID),
    (Event(1, "m", id=1.5), Reason.INVALID_EVENT_ID),
    (Event(1, "m", id=True), Reason.INVALID_EVENT_ID),
]


@pytest.mark.parametrize(("event", "reason"), BAD)
def test_bad_event_is_taken_out(event, reason):
    """A bad event is reported under its index with its reason; its neighbours are encoded."""
    good = [Event(1, "m", 5), Event(2, "n", id="x")]
    encoded = encode([good[0], event, good[1]])
    assert [(bad.index, bad.reason) for bad in encoded.bad] == [(1, reason)]
    assert encoded.bad[0].message.startswith("event 1: ")
    assert [list(part.body.indices) for part in encoded.chunks] == [[0, 2]]
    assert decode(encoded.chunks[0].data) == [expected(event) for event in good]
    alone = encode([event])
    assert alone.chunks == []
    assert alone.bad[0].reason == reason


def test_float_is_refused_with_a_hint():
    """A float value names the way out."""
    assert "scale()" in encode([Event(1, "m", 1.5)]).bad[0].message


@quick
@given(st.lists(st.one_of(events_strategy, st.sampled_from([event for event, _ in BAD])), max_size=12))
def test_good_and_bad_mixed(events):
    """Each event is either encoded or reported, never both, never neither."""
    encoded = encode(events)
    bad = {problem.index for problem in encoded.bad}
    sent = [index for part in encoded.chunks for index in part.body.indices]
    assert sorted([*bad, *sent]) == list(range(len(events)))
    decoded = [event for part in encoded.chunks for event in decode(part.data)]
    assert decoded == [expected(events[index]) for index in sent]


def test_no_event_at_all():
    """Nothing gives no chunk, and something else than an event is the caller's error."""
    assert encode([]) == ([], [])
    with pytest.raises(InvalidRequestError, match="event 1 is no Event"):
        encode([Event(1, "m"), {"account_id": 1}])


def test_header_carries_identity():
    """Producer, sequence, time and flags stand where the layout says."""
    data = chunk.encode_events([Event(1, "m")], 2**64 - 1, 9, 123, lay.FLAG_ASYNC).chunks[0].data
    fields = lay.CHUNK_HEADER.unpack_from(data)
    assert fields[2:7] == (len(data), 1, 2**64 - 1, 9, 123)
    assert fields[8] == lay.FLAG_ASYNC


def test_usual_events_cost_their_accounts():
    """Events without anything special carry 8 bytes each and nothing else."""
    data = encode([Event(i, "m") for i in range(100)]).chunks[0].data
    assert len(data) == lay.CHUNK_HEADER_BYTES + 4 + 1 + 800


def test_equal_sets_have_one_entry():
    """The order in which properties stand in a dict makes no difference."""
    events = [Event(1, "m", properties={"a": "1", "b": "2"}), Event(1, "m", properties={"b": "2", "a": "1"})]
    body = chunk.prepare_events(events).bodies[0]
    assert body.property_count == 1
    assert body.encodings >> 4 * lay.COLUMN_PROPERTIES & 15 in {lay.CONSTANT, lay.PLAIN}
    assert decode(encode(events).chunks[0].data) == [expected(event) for event in events]


def test_splits_by_events():
    """More events than a request may have become several chunks with sequences in order."""
    n = limits.REQUEST_EVENTS_MAX + 1
    encoded = chunk.encode_columns(
        "m", np.arange(n, dtype=np.uint64), producer_id=1, sequence=5, first_sent_ns=1
    )
    assert [part.sequence for part in encoded.chunks] == [5, 6]
    assert [i for part in encoded.chunks for i in part.body.indices] == list(range(n))
    assert max(part.body.event_count for part in encoded.chunks) <= limits.REQUEST_EVENTS_MAX


def test_splits_by_bytes():
    """Chunks stay below the limit in bytes, whatever their events weigh."""
    heavy = {f"key{i:02}": "v" * 1000 for i in range(60)}
    events = [Event(i, "m", properties={**heavy, "n": str(i)}) for i in range(300)]
    encoded = encode(events)
    assert len(encoded.chunks) > 1
    assert all(len(part.data) <= limits.REQUEST_BYTES_MAX for part in encoded.chunks)
    assert [event[0] for part in encoded.chunks for event in decode(part.data)] == list(range(300))


def test_splits_by_metric_codes():
    """A chunk holds a bounded number of distinct codes."""
    events = [Event(1, f"m{i}") for i in range(limits.CHUNK_METRICS_MAX + 1)]
    encoded = encode(events)
    assert len(encoded.chunks) == 2
    assert [event[1] for part in encoded.chunks for event in decode(part.data)] == [
        e.metric_code for e in events
    ]


def columns(*args, **kwargs):
    """Encode columns with a fixed identity."""
    return chunk.encode_columns(*args, **kwargs, producer_id=1, sequence=1, first_sent_ns=1)


@pytest.mark.parametrize(
    "make",
    [
        np.array,
        lambda values: np.array(values, dtype=np.uint64)[::1],
        lambda values: np.array([v for v in values for _ in range(2)], dtype=np.uint32)[::2],
        lambda values: np.array(values, dtype=">i8"),
        lambda values: array("q", values),
        lambda values: memoryview(array("i", values)),
        list,
        tuple,
        iter,
        lambda values: np.array(values, dtype=object),
    ],
)
@pytest.mark.parametrize("values", [[5, 6, 7], [4, 4, 4], [1, 1, 1]])
def test_columns_of_any_kind(make, values):
    """The same numbers give the same events, whatever holds them."""
    encoded = columns("m", make(values), make(values), make(values))
    assert encoded.bad == []
    assert decode(encoded.chunks[0].data) == [(v, "m", v, v, {}, 0, None) for v in values]


def test_columns_with_everything():
    """Ids, properties and operations are encoded row by row, None meaning missing."""
    identifier = uuid.UUID(int=5)
    encoded = columns(
        "m",
        [1, 2, 3],
        values=9,
        ids=["a", None, identifier],
        properties={"p": ["x", None, "x"], "q": "all"},
        operations=np.array([0, 1, 2]),
        timestamps_ns=[None, 7, dt.datetime(1970, 1, 1, tzinfo=UTC)],
    )
    assert decode(encoded.chunks[0].data) == [
        (1, "m", 9, None, {"p": "x", "q": "all"}, 0, "a"),
        (2, "m", 9, 7, {"q": "all"}, 1, None),
        (3, "m", 9, 0, {"p": "x", "q": "all"}, 2, identifier),
    ]


def test_columns_constant_properties_and_text():
    """What is the same for all events is written once, or read as if it were."""
    encoded = columns("m", [1, 2], values="u", properties={"k": "v"})
    assert decode(encoded.chunks[0].data) == [(i, "m", "u", None, {"k": "v"}, 0, None) for i in (1, 2)]
    body = encoded.chunks[0].body
    assert body.encodings >> 4 * lay.COLUMN_PROPERTIES & 15 == lay.CONSTANT


def test_columns_unsigned_values():
    """Values of 2^63 and above travel as texts."""
    big = np.array([1, 2**63, 2**64 - 1], dtype=np.uint64)
    assert [e[2] for e in decode(columns("m", 5, big).chunks[0].data)] == [1, 2**63, 2**64 - 1]


def test_columns_report_bad_rows():
    """A bad row is taken out of a column as a bad event is out of a list."""
    encoded = columns("m", np.array([1, -2, 3]), [1, 2, 2**64], timestamps_ns=np.array([4, 5, 6]))
    assert [(bad.index, bad.reason) for bad in encoded.bad] == [
        (1, Reason.INVALID_ACCOUNT),
        (2, Reason.VALUE_OUT_OF_RANGE),
    ]
    assert decode(encoded.chunks[0].data) == [(1, "m", 1, 4, {}, 0, None)]
    missing = np.array([7, lay.TIME_ABSENT])
    assert columns("m", [1, 2], timestamps_ns=missing).bad[0].reason == Reason.TIME_BEFORE_EPOCH


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"values": np.array([1.5, 2.5])}, "scale"),
        ({"values": 1.5}, "scale"),
        ({"values": array("d", [1, 2])}, "scale"),
        ({"values": np.array([True, False])}, "bool"),
        ({"values": [1, 2, 3]}, "differ in length"),
        ({"values": np.ones((2, 2), dtype=int)}, "one dimension"),
        ({"timestamps_ns": np.array(["2026-01-01", "2026-01-02"], dtype="datetime64[ns]")}, "datetime64"),
        ({"ids": "same"}, "duplicates"),
        ({"properties": {"k": ["v"]}}, "differ in length"),
    ],
)
def test_columns_that_cannot_be(arguments, words):
    """A column that no event could come from fails the call with a hint."""
    with pytest.raises(InvalidRequestError, match=words):
        columns("m", [1, 2], **arguments)
    with pytest.raises(InvalidRequestError, match="metric code"):
        columns("not a code", [1])


def test_columns_empty():
    """No rows give no chunk."""
    assert columns("m", np.array([], dtype=np.int64)) == ([], [])
    assert columns("m", []) == ([], [])


def test_numpy_scalars_are_numbers():
    """Single numpy integers count as integers, in events and in columns."""
    assert decode(encode([Event(np.uint64(5), "m", np.int32(7))]).chunks[0].data)[0][:3] == (5, "m", 7)
    assert decode(columns("m", np.uint64(5), np.int64(3)).chunks[0].data)[0][:3] == (5, "m", 3)


@quick
@given(events_strategy)
def test_lone_events_are_encoded_alike(event):
    """The short way of a lone event gives the bytes of the long way."""
    body = chunk.prepare_events([event]).bodies[0]
    two = chunk.prepare_events([event, Event(-1, "m")]).bodies[0]  # a bad neighbour: the long way
    assert chunk.seal(body, producer_id=1, sequence=1, first_sent_ns=1) == chunk.seal(
        two, producer_id=1, sequence=1, first_sent_ns=1
    )


def test_accounts_are_read_back():
    """A body gives its accounts, once if they are equal."""
    assert list(
        chunk.prepare_events([Event(i, "m", properties={"a": "b"}) for i in (3, 4)]).bodies[0].accounts()
    ) == [3, 4]
    assert list(chunk.prepare_events([Event(6, "m")] * 3).bodies[0].accounts()) == [6]
