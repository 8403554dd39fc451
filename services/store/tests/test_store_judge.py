"""What is judged by an event's own fields, keys and fingerprints, seals, and the range of times."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest

from tallymark_protocol import limits
from tallymark_protocol.errors import Reason
from tallymark_protocol.identifiers import encode_event_id, encode_text
from tallymark_protocol.model import AggType, MetricSchema, PeriodType, UniqueType
from tallymark_protocol.schema import make_record
from tallymark_protocol.zones import TIME_END_NS
from tallymark_store import judge
from tallymark_store.fold.schemas import SchemaTable

from .payload_builder import build_payload, event, place

NOW = 1_700_000_000 * 10**9
SECOND = 10**9
U64_TEXT = b"\x02" + (2**63).to_bytes(8, "little")
SCHEMAS = [
    MetricSchema(code="count"),
    MetricSchema(code="sum", agg_type=AggType.SUM),
    MetricSchema(code="max", agg_type=AggType.MAX),
    MetricSchema(code="u", agg_type=AggType.COUNT_UNIQUE),
    MetricSchema(code="i", agg_type=AggType.COUNT_UNIQUE, unique_type=UniqueType.INT64),
    MetricSchema(code="s", agg_type=AggType.COUNT_UNIQUE, unique_type=UniqueType.STRING),
    MetricSchema(code="day", period_type=PeriodType.DAY, grace_seconds=10),
    MetricSchema(code="now", period_type=PeriodType.DAY, grace_seconds=0),
    MetricSchema(code="year", period_type=PeriodType.YEAR, grace_seconds=limits.GRACE_SECONDS_MAX),
    MetricSchema(code="life", period_type=PeriodType.LIFETIME),
]


@pytest.fixture(scope="module")
def schemas() -> SchemaTable:
    table = SchemaTable()
    for uid, schema in enumerate(SCHEMAS):
        table.put(make_record(uid + 1, schema), uid)
    return table


def judged(
    schemas: SchemaTable, events: list[dict[str, Any]], *, plain: bool = False, now: int = NOW
) -> list[int]:
    data, columns = place(build_payload(events, plain=plain))
    verdicts = np.zeros(len(events), dtype=np.uint8)
    slots = schemas.slots_of(data, columns)
    left = judge.judge_events(data, columns, slots, schemas.agg_types, schemas.unique_types, now, verdicts)
    assert left == np.count_nonzero(verdicts == 0)
    return [int(x) for x in verdicts]


CASES = [
    ({"metric": "nothing"}, Reason.UNKNOWN_METRIC),
    ({"metric": "sum", "operation": 1}, Reason.BAD_OPERATION),
    ({"metric": "u", "operation": 3}, Reason.BAD_OPERATION),
    ({"metric": "u", "operation": 2}, Reason.ACCEPTED),
    ({"metric": "u", "operation": 255}, Reason.BAD_OPERATION),
    ({"metric": "sum", "time": 0}, Reason.ACCEPTED),
    ({"metric": "sum", "time": -1}, Reason.TIME_BEFORE_EPOCH),
    ({"metric": "sum", "time": -(2**63) + 1}, Reason.TIME_BEFORE_EPOCH),
    ({"metric": "sum", "time": NOW + limits.TIME_FUTURE_NS_MAX}, Reason.ACCEPTED),
    ({"metric": "sum", "time": NOW + limits.TIME_FUTURE_NS_MAX + 1}, Reason.TIME_IN_FUTURE),
    ({"metric": "sum", "time": 2**63 - 1}, Reason.TIME_IN_FUTURE),
    ({"metric": "sum", "value": -(2**63)}, Reason.ACCEPTED),
    ({"metric": "sum", "text": b"\x01ada"}, Reason.VALUE_NOT_NUMBER),
    ({"metric": "sum", "text": U64_TEXT}, Reason.VALUE_OUT_OF_RANGE),
    ({"metric": "max", "text": U64_TEXT}, Reason.VALUE_OUT_OF_RANGE),
    ({"metric": "count", "value": -5}, Reason.ACCEPTED),
    ({"metric": "count", "text": b"\x01ada"}, Reason.ACCEPTED),
    ({"metric": "u", "value": -1}, Reason.VALUE_OUT_OF_RANGE),
    ({"metric": "u", "value": 2**63 - 1}, Reason.ACCEPTED),
    ({"metric": "u", "text": U64_TEXT}, Reason.ACCEPTED),
    ({"metric": "u", "text": b"\x01ada"}, Reason.VALUE_NOT_NUMBER),
    ({"metric": "i", "value": -1}, Reason.ACCEPTED),
    ({"metric": "i", "text": U64_TEXT}, Reason.VALUE_OUT_OF_RANGE),
    ({"metric": "i", "text": b"\x01ada"}, Reason.VALUE_NOT_NUMBER),
    ({"metric": "s", "text": b"\x01ada"}, Reason.ACCEPTED),
    ({"metric": "s", "text": U64_TEXT}, Reason.VALUE_NOT_TEXT),
    ({"metric": "s", "value": 5}, Reason.VALUE_NOT_TEXT),
    # The first check that fails gives the reason.
    ({"metric": "nothing", "operation": 9, "time": -1}, Reason.UNKNOWN_METRIC),
    ({"metric": "sum", "operation": 1, "time": -1, "text": b"\x01x"}, Reason.BAD_OPERATION),
    ({"metric": "sum", "time": -1, "text": b"\x01x"}, Reason.TIME_BEFORE_EPOCH),
]


@pytest.mark.parametrize("plain", [False, True])
def test_each_fault_has_its_reason(schemas: SchemaTable, plain: bool) -> None:
    """Alone in a payload, where columns are constant or absent, and beside all others."""
    for fields, reason in CASES:
        assert judged(schemas, [event(**fields)], plain=plain) == [int(reason)], fields
    events = [event(**fields) for fields, _ in CASES]
    assert judged(schemas, events, plain=plain) == [int(reason) for _, reason in CASES]


def test_what_is_decided_stays_decided(schemas: SchemaTable) -> None:
    """An event of a repeated chunk is not looked at."""
    data, columns = place(build_payload([event(1, "sum"), event(1, "nothing"), event(1, "sum")]))
    verdicts = np.array([3, 3, 0], dtype=np.uint8)
    slots = schemas.slots_of(data, columns)
    left = judge.judge_events(data, columns, slots, schemas.agg_types, schemas.unique_types, NOW, verdicts)
    assert left == 1
    assert verdicts.tolist() == [3, 3, 0]


# ---------------------------------------------------------------- keys


def keys(schemas: SchemaTable, events: list[dict[str, Any]], verdicts: list[int] | None = None) -> Any:
    data, columns = place(build_payload(events))
    n = len(events)
    marks = np.array(verdicts or [0] * n, dtype=np.uint8)
    wants = np.full(n, 9, dtype=np.uint8)
    lo, hi, fingerprints = (np.zeros(n, dtype=np.uint64) for _ in range(3))
    count = judge.event_keys(
        data, columns, schemas.slots_of(data, columns), schemas.uids, marks, wants, lo, hi, fingerprints,
        np.zeros(32, dtype=np.uint64),
    )  # fmt: skip
    assert count == np.count_nonzero(wants)
    return wants.tolist(), lo.tolist(), hi.tolist(), fingerprints.tolist()


def test_the_key_is_a_hash_of_account_metric_and_typed_id(schemas: SchemaTable) -> None:
    """BLAKE2b-128, as Python's own."""
    typed = encode_event_id("job-1")
    wants, lo, hi, _ = keys(schemas, [event(2**64 - 1, "sum", id=typed)])
    message = (2**64 - 1).to_bytes(8, "little") + (2).to_bytes(8, "little") + typed
    digest = hashlib.blake2b(message, digest_size=16).digest()
    assert wants == [judge.WANTS_INSERT]
    assert (lo[0], hi[0]) == (
        int.from_bytes(digest[:8], "little"),
        int.from_bytes(digest[8:], "little"),
    )


def test_only_accepted_events_with_an_id_want_one(schemas: SchemaTable) -> None:
    """Neither rejected ones nor those of repeats, nor in a payload without the column."""
    typed = encode_event_id(1)
    events = [
        event(1, "sum", id=typed),
        event(1, "sum"),
        event(1, "sum", id=typed),
        event(1, "nothing", id=typed),
    ]
    assert keys(schemas, events, [0, 0, 3, 16])[0] == [1, 0, 0, 0]
    assert keys(schemas, [event(1, "sum")])[0] == [0]


def test_a_fingerprint_covers_what_was_sent_and_nothing_else(schemas: SchemaTable) -> None:
    """Every field of the payload changes it; who else is in the payload doesn't."""
    typed = encode_event_id("x")
    base = {"metric": "s", "id": typed, "text": encode_text("ada"), "time": 5, "properties": {"a": "b"}}
    variants = [
        base,
        base | {"text": encode_text("adb")},
        base | {"text": encode_text("ad")},
        base | {"text": None, "value": 0},
        base | {"text": None, "value": 1},
        base | {"time": None},
        base | {"time": 6},
        base | {"operation": 1},
        base | {"operation": 2},
        base | {"properties": {}},
        base | {"properties": {"a": "c"}},
        base | {"properties": {"b": "b"}},
        base | {"properties": {"a": "b", "b": ""}},
    ]
    together = keys(schemas, [event(**fields) for fields in variants])[3]
    assert len(set(together)) == len(variants)
    for fields, fingerprint in zip(variants, together, strict=True):
        assert keys(schemas, [event(**fields)])[3] == [fingerprint]


# ---------------------------------------------------------------- seals


def sealed(schemas: SchemaTable, events: list[dict[str, Any]], now: int) -> list[int]:
    data, columns = place(build_payload(events))
    marks = np.full(len(events), 7, dtype=np.uint8)
    verdicts = np.zeros(len(events), dtype=np.uint8)
    count = judge.sealed_events(
        data, columns, schemas.slots_of(data, columns), schemas.arrays, now, verdicts, marks
    )
    assert count == np.count_nonzero(marks)
    return marks.tolist()


def test_a_period_is_sealed_once_append_time_has_passed_end_and_grace(schemas: SchemaTable) -> None:
    """To the nanosecond; absent times are append times, and metrics without grace never seal."""
    day = 86_400 * SECOND
    end = 100 * day
    for code, grace in (("day", 10 * SECOND), ("now", 0)):
        events = [event(1, code, time=end - 1), event(1, code, time=end), event(1, code)]
        assert sealed(schemas, events, end + grace) == [0, 0, 0]
        assert sealed(schemas, events, end + grace + 1) == [1, 0, 0]
    assert sealed(schemas, [event(1, "sum", time=0)], NOW) == [0]
    assert sealed(schemas, [event(1, "life", time=0)], TIME_END_NS - 1) == [0]


def test_the_end_of_time_does_not_overflow(schemas: SchemaTable) -> None:
    """Where end + grace lies beyond 64 bits, the period is never sealed."""
    late = TIME_END_NS - 1
    assert sealed(schemas, [event(1, "year", time=late), event(1, "day", time=late)], late) == [0, 0]
    assert sealed(schemas, [event(1, "year", time=0)], late) == [1]


def test_a_rejected_event_is_not_marked_as_sealed(schemas: SchemaTable) -> None:
    """Its own reason stands."""
    data, columns = place(build_payload([event(1, "now", time=0), event(1, "nothing", time=0)]))
    marks = np.zeros(2, dtype=np.uint8)
    verdicts = np.array([3, 16], dtype=np.uint8)
    slots = schemas.slots_of(data, columns)
    assert judge.sealed_events(data, columns, slots, schemas.arrays, NOW, verdicts, marks) == 0
    assert marks.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("times", "verdicts", "expected"),
    [
        ([None, None], [0, 0], (NOW, NOW)),
        ([5, 9], [0, 0], (5, 9)),
        ([5, 9, None], [0, 0, 0], (5, NOW)),
        ([5, 9, 7], [16, 3, 0], (7, 7)),
        ([5, 9], [16, 16], (NOW, NOW)),
        ([0, 0], [0, 0], (0, 0)),
        ([NOW + 5, None], [0, 0], (NOW, NOW + 5)),
    ],
)
def test_the_range_of_times_is_that_of_stored_events(
    times: list[int | None], verdicts: list[int], expected: tuple[int, int]
) -> None:
    """A read leaves out records whose range it doesn't touch: the range must cover all that counts."""
    data, columns = place(build_payload([event(1, "sum", time=time) for time in times]))
    found = judge.time_range(data, columns, NOW, np.array(verdicts, dtype=np.uint8))
    assert tuple(int(x) for x in found) == expected
