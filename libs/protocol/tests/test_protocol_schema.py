"""What a metric's schema may be, what may change in it, and its bytes."""

import msgspec
import pytest

from tallymark_protocol import limits
from tallymark_protocol.errors import ErrorCode, InvalidRequestError, RemoteProtocolError
from tallymark_protocol.model import (
    AggType,
    AlertThreshold,
    DimensionFilter,
    MetricSchema,
    PeriodType,
    UniqueType,
)
from tallymark_protocol.schema import (
    MetricRecord,
    canonical,
    check_metric_code,
    check_update,
    decode_record,
    decode_schema,
    encode_record,
    make_record,
    update_record,
    validate,
)
from tallymark_protocol.zones import ZoneTable, transitions

FULL = MetricSchema(
    code="compute_seconds",
    agg_type=AggType.SUM,
    filters=[DimensionFilter(key="provider", values=["aws", "gcp"]), DimensionFilter(key="region")],
    thresholds=[
        AlertThreshold(code="free", value=1),
        AlertThreshold(code="huge", value=limits.THRESHOLD_VALUE_MAX, recurring=True),
    ],
    period_type=PeriodType.CALENDAR,
    billing_cycle_day=28,
    time_zone="America/Asuncion",
    grace_seconds=3_600,
    description="Seconds of compute, as billed",
)


def changed(**fields: object) -> MetricSchema:
    return msgspec.structs.replace(FULL, **fields)


def dimension(*values: str, key: str = "k") -> list[DimensionFilter]:
    return [DimensionFilter(key=key, values=list(values))]


def threshold(value: object, code: str = "t") -> list[AlertThreshold]:
    return [AlertThreshold(code=code, value=value)]


@pytest.mark.parametrize(
    "schema",
    [
        FULL,
        MetricSchema(code="a"),
        MetricSchema(code="aZ0_.:-" + "x" * 57),
        MetricSchema(code="u", agg_type=AggType.COUNT_UNIQUE, unique_type=UniqueType.STRING),
        MetricSchema(code="l", period_type=PeriodType.LIFETIME, agg_type=AggType.LATEST),
        MetricSchema(code="g", grace_seconds=0),
        MetricSchema(code="c", thresholds=threshold(1)),
        changed(filters=dimension(*(str(i) for i in range(1_000)))),
        changed(filters=[DimensionFilter(key=str(i)) for i in range(8)]),
        changed(filters=dimension("", "v" * 1_024, key="k" * 128)),
        changed(thresholds=[AlertThreshold(code=str(i), value=5) for i in range(8)]),
        changed(description="d" * 1_024),
        changed(retain_raw_days=1),
        changed(retain_raw_days=limits.RETAIN_RAW_DAYS_MAX),
    ],
)
def test_valid_schemas_pass(schema):
    """Each at its limits; and their bytes come back as they were."""
    validate(schema)
    assert decode_schema(canonical(schema)) == schema


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (changed(code=""), "code '' must be 1 to 64"),
        (changed(code="x" * 65), "code"),
        (changed(code="a b"), "code"),
        (changed(code="a\n"), "code"),
        (changed(code="é"), "code"),
        (changed(code=5), r"\$.code"),
        (changed(agg_type=7), "agg_type"),
        (changed(agg_type=1), "agg_type must be one of AggType"),
        (changed(period_type=2), "period_type must be one of PeriodType"),
        (changed(unique_type=0), "unique_type must be one of UniqueType"),
        (changed(filters=[DimensionFilter(key=str(i)) for i in range(9)]), "9 dimensions, more than 8"),
        (changed(filters=dimension() + dimension()), "the key 'k' is given twice"),
        (changed(filters=dimension(key="")), r"filters\[0\].key must not be empty"),
        (changed(filters=dimension(key="k" * 129)), r"filters\[0\].key .* 129 bytes, more than 128"),
        (changed(filters=dimension(key="é" * 65)), "130 bytes, more than 128"),
        (changed(filters=dimension("a", "b", "a")), r"filters\[0\] value 'a' is given twice"),
        (changed(filters=dimension("v" * 1_025)), "1025 bytes, more than 1024"),
        (changed(filters=dimension("\ud800")), "surrogate"),
        (changed(filters=dimension(*(str(i) for i in range(1_001)))), "1001 values, more than 1000"),
        (changed(filters=[{"key": "k", "values": []}]), "filters holds DimensionFilter, not dict"),
        (changed(filters=None), r"\$.filters"),
        (changed(filters=[DimensionFilter(key="k", values=[1])]), r"\$.filters\[0\].values\[0\]"),
        (
            changed(thresholds=[AlertThreshold(code=str(i), value=5) for i in range(9)]),
            "9 entries, more than 8",
        ),
        (changed(thresholds=threshold(1) + threshold(2)), "the code 't' is given twice"),
        (changed(thresholds=threshold(0)), "from 1 to 2\\^63-1"),
        (changed(thresholds=threshold(-5)), "from 1 to"),
        (changed(thresholds=threshold(2**127)), "from 1 to"),
        (changed(thresholds=threshold(1.5)), r"\$.thresholds\[0\].value"),
        (changed(thresholds=threshold(True)), r"\$.thresholds\[0\].value"),
        (changed(thresholds=threshold(1, code="")), r"thresholds\[0\].code must not be empty"),
        (changed(thresholds=threshold(1, code="t" * 65)), "65 bytes, more than 64"),
        (changed(thresholds=[{"code": "t", "value": 1}]), "thresholds holds AlertThreshold, not dict"),
        (changed(billing_cycle_day=0), "billing_cycle_day must be 1 to 28, not 0"),
        (changed(billing_cycle_day=29), "not 29"),
        (changed(billing_cycle_day=True), r"\$.billing_cycle_day"),
        (changed(period_type=PeriodType.DAY), "billing_cycle_day is for period_type CALENDAR, not DAY"),
        (changed(unique_type=UniqueType.INT64), "unique_type is for agg_type COUNT_UNIQUE, not SUM"),
        (changed(grace_seconds=-1), "grace_seconds must be 0 to"),
        (changed(grace_seconds=limits.GRACE_SECONDS_MAX + 1), "grace_seconds"),
        (
            changed(period_type=PeriodType.LIFETIME, billing_cycle_day=1),
            "grace_seconds can't be set with period_type LIFETIME",
        ),
        (changed(time_zone="Mars/Olympus"), "time_zone 'Mars/Olympus'"),
        (changed(time_zone=""), "time_zone must not be empty"),
        (changed(time_zone="z" * 129), "time_zone .* 129 bytes"),
        (changed(retain_raw_days=0), "retain_raw_days must be 1 to"),
        (changed(retain_raw_days=limits.RETAIN_RAW_DAYS_MAX + 1), "retain_raw_days must be 1 to"),
        (changed(description="d" * 1_025), "description .* 1025 bytes"),
        (changed(description=None), r"\$.description"),
        ("schema", "must be a MetricSchema, not str"),
    ],
)
def test_bad_schemas_are_refused_by_field(schema, message):
    """The message names what is wrong; the code says that it was the schema."""
    with pytest.raises(InvalidRequestError, match=message) as caught:
        validate(schema)
    assert caught.value.code is ErrorCode.INVALID_SCHEMA


def test_a_schema_fits_into_one_request_of_the_coordinator():
    """Each value within its limit, all of them together too large."""
    schema = changed(
        filters=[
            DimensionFilter(key=str(i), values=[f"{j:04}" + "v" * 1_020 for j in range(1_000)])
            for i in range(2)
        ]
    )
    with pytest.raises(InvalidRequestError, match="bytes encoded, more than 1048576"):
        validate(schema)


def test_the_zone_is_looked_up_only_when_asked():
    """The SDK has no zone data, and leaves that to the server."""
    validate(changed(time_zone="Mars/Olympus"), check_zone=False)


def test_a_metric_code_alone():
    """The same rule for a code in a query."""
    check_metric_code("cpu")
    for bad in ("", "a/b", None, 5):
        with pytest.raises(InvalidRequestError, match="code"):
            check_metric_code(bad)


# --- updates -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "new",
    [
        FULL,
        changed(description="another"),
        changed(thresholds=FULL.thresholds + threshold(7)),
        changed(filters=[DimensionFilter(key="provider", values=["aws", "gcp", "azure"]), FULL.filters[1]]),
        changed(thresholds=tuple(FULL.thresholds), filters=tuple(FULL.filters)),
        changed(retain_raw_days=30),
    ],
)
def test_updates_that_may_be(new):
    """Thresholds and dimension values are added at the end; the description is free."""
    check_update(FULL, new)


@pytest.mark.parametrize(
    ("new", "message"),
    [
        (changed(code="other"), "code of a metric can't change: compute_seconds to other"),
        (changed(agg_type=AggType.MAX), "agg_type of a metric can't change: SUM to MAX"),
        (changed(period_type=PeriodType.DAY), "period_type"),
        (changed(billing_cycle_day=1), "billing_cycle_day"),
        (changed(time_zone="UTC"), "time_zone"),
        (changed(unique_type=UniqueType.STRING), "unique_type"),
        (changed(grace_seconds=None), "grace_seconds"),
        (changed(filters=FULL.filters[:1]), "dimensions"),
        (changed(filters=FULL.filters + dimension()), "dimensions"),
        (changed(filters=FULL.filters[::-1]), "dimensions"),
        (changed(filters=[DimensionFilter(key="provider"), FULL.filters[1]]), "opened to any value"),
        (
            changed(filters=[FULL.filters[0], DimensionFilter(key="region", values=["eu"])]),
            "'region' takes any value: it can't be narrowed",
        ),
        (
            changed(filters=[DimensionFilter(key="provider", values=["aws"]), FULL.filters[1]]),
            "value 'gcp' can't be removed",
        ),
        (
            changed(filters=[DimensionFilter(key="provider", values=["gcp", "aws"]), FULL.filters[1]]),
            "values keep their order",
        ),
        (changed(thresholds=FULL.thresholds[:1]), "threshold 'huge' can't be removed"),
        (
            changed(thresholds=[AlertThreshold(code="free", value=2), FULL.thresholds[1]]),
            "threshold 'free' can't change: add one under another code",
        ),
        (
            changed(thresholds=[AlertThreshold(code="free", value=1, recurring=True), FULL.thresholds[1]]),
            "threshold 'free' can't change",
        ),
        (changed(thresholds=threshold(7) + FULL.thresholds), "thresholds keep their order"),
    ],
)
def test_updates_that_may_not_be(new, message):
    """Whatever would count past events otherwise is refused, and so is what would move positions."""
    with pytest.raises(InvalidRequestError, match=message):
        check_update(FULL, new)


# --- records and bytes ---------------------------------------------------------------------------------------


def test_canonical_bytes_tell_schemas_apart():
    """Equal schemas have equal bytes; any difference shows."""
    variants = [
        FULL,
        changed(code="x"),
        changed(agg_type=AggType.MAX),
        changed(filters=FULL.filters[::-1]),
        changed(thresholds=FULL.thresholds[::-1]),
        changed(period_type=PeriodType.YEAR, billing_cycle_day=1),
        changed(billing_cycle_day=27),
        changed(time_zone="UTC"),
        changed(grace_seconds=None),
        changed(grace_seconds=0),
        changed(description=""),
        changed(retain_raw_days=7),
    ]
    assert len({canonical(schema) for schema in variants}) == len(variants)
    for schema in variants:
        assert canonical(decode_schema(canonical(schema))) == canonical(schema)


def test_canonical_bytes_never_change():
    """Stored digests depend on them."""
    assert canonical(MetricSchema(code="a", thresholds=threshold(258))) == (
        b"\x8a\xa4code\xa1a\xa8agg_type\x00\xa7filters\x90\xaathresholds\x91"
        b"\x83\xa4code\xa1t\xa5value\xc4\x10\x02\x01" + bytes(14) + b"\xa9recurring\xc2"
        b"\xabperiod_type\x00\xb1billing_cycle_day\x01\xa9time_zone\xa3UTC"
        b"\xabunique_type\x00\xadgrace_seconds\xc0\xabdescription\xa0"
    )


def test_a_record_carries_its_zone():
    """What is made from a schema has all that a replica needs, and survives its bytes."""
    record = make_record(77, FULL)
    assert record == MetricRecord(uid=77, version=1, schema=FULL, zone=transitions("America/Asuncion"))
    for variant in (record, msgspec.structs.replace(record, deleted=True, version=2**40)):
        assert decode_record(encode_record(variant)) == variant
    with pytest.raises(InvalidRequestError, match="time_zone"):
        make_record(77, changed(time_zone="Mars/Olympus"))


def test_the_next_version_keeps_identity_and_zone():
    """An update changes the schema and the version; new zone data would be another change."""
    old_zone = ZoneTable("America/Asuncion", [], [-14_400])
    record = MetricRecord(uid=77, version=4, schema=FULL, zone=old_zone)
    schema = changed(thresholds=FULL.thresholds + threshold(7))
    assert update_record(record, schema) == MetricRecord(uid=77, version=5, schema=schema, zone=old_zone)
    with pytest.raises(InvalidRequestError, match="code of a metric"):
        update_record(record, changed(code="x"))
    with pytest.raises(InvalidRequestError, match="from 1 to"):
        update_record(record, changed(thresholds=FULL.thresholds + threshold(0)))


def wire_record(**fields: object) -> bytes:
    """Encode a record's plain form with some of its fields replaced."""
    plain = msgspec.msgpack.decode(
        encode_record(make_record(77, MetricSchema(code="a", time_zone="Asia/Kathmandu")))
    )
    for path, value in fields.items():
        *parents, last = path.split("__")
        target = plain
        for parent in parents:
            target = target[parent]
        target[last] = value
    return msgspec.msgpack.encode(plain)


def test_a_record_is_refused_when_cut_anywhere():
    """No prefix of a record is one, and neither is a record with more behind it."""
    data = wire_record()
    assert decode_record(data).uid == 77
    for length in range(len(data)):
        with pytest.raises(RemoteProtocolError):
            decode_record(data[:length])
    with pytest.raises(RemoteProtocolError):
        decode_record(data + b"\x00")


@pytest.mark.parametrize(
    "fields",
    [
        {"uid": -1},
        {"uid": "77"},
        {"version": 0},
        {"deleted": 1},
        {"unknown": 1},
        {"schema": None},
        {"schema__unknown": 1},
        {"schema__code": ""},
        {"schema__agg_type": 9},
        {"schema__billing_cycle_day": 29},
        {"schema__time_zone": "UTC"},
        {"schema__filters": [{"key": "k", "values": ["a", "a"]}]},
        {"schema__thresholds": [{"code": "t", "value": b"\x01", "recurring": False}]},
        {"schema__thresholds": [{"code": "t", "value": bytes(16), "recurring": False}]},
        {"schema__thresholds": [{"code": "t", "value": b"\xff" * 16, "recurring": False}]},
        {"zone__instants": [5, 4]},
        {"zone__instants": []},
        {"zone__instants": [-1]},
        {"zone__instants": [2**63]},
        {"zone__offsets": [0]},
        {"zone__offsets": [0, 10**6]},
        {"zone__name": "UTC"},
        {"zone__instants": "text"},
    ],
)
def test_a_record_that_breaks_a_rule_is_refused(fields):
    """Bytes from a peer or a disk reach no assert: they are checked as a whole."""
    with pytest.raises(RemoteProtocolError):
        decode_record(wire_record(**fields))


@pytest.mark.parametrize(
    "data", [b"", b"\xc1", b"\x80", b"garbage", canonical(FULL)[:-1], b"\x81\xa4code\xa1\xff"]
)
def test_garbage_is_no_schema(data):
    """Nor a record."""
    with pytest.raises(RemoteProtocolError):
        decode_schema(data)
    with pytest.raises(RemoteProtocolError):
        decode_record(data)


def test_bytes_nested_without_end_are_refused():
    """A field to be skipped may be nested deeper than any stack: that is garbage too."""
    data = wire_record(zone__extra=0)
    nested = data.replace(b"\xa5extra\x00", b"\xa5extra" + b"\x91" * 100_000 + b"\x00")
    assert len(nested) > 100_000
    with pytest.raises(RemoteProtocolError):
        decode_record(nested)
