"""Rules for metric schemas, and their bytes.

`validate` says what a schema may be, `check_update` what may change in one. A schema that passed both becomes a
`MetricRecord`: with its identity, its version and its zone's transitions, so that whoever reads it needs neither
a time zone database nor any other lookup. The coordinator stores records and the log carries them; replicas fold
by nothing else.

Schemas and records travel as the bytes made here, never as the plain structs: a threshold's value can need 128
bits and MessagePack's integers stop at 64, so on the wire it is 16 bytes, signed, least significant first. The
same schema always gives the same bytes, so bytes compare and hash in its stead. The order of dimensions, of
their values and of thresholds is part of a schema, because positions in those lists are what totals refer to.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import msgspec

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
from tallymark_protocol.periods import BILLING_CYCLE_DAY_MAX
from tallymark_protocol.zones import ZoneTable, transitions

_CODE = re.compile(limits.METRIC_CODE_PATTERN, re.ASCII)


class MetricRecord(msgspec.Struct, frozen=True):
    """A metric as the coordinator stores it and the log carries it."""

    uid: int  # the create revision of the metric's key: a code created again is another metric
    version: int  # from 1; one more with every change
    schema: MetricSchema
    zone: ZoneTable
    deleted: bool = False


# --- rules ---------------------------------------------------------------------------------------------------


def validate(schema: MetricSchema, *, check_zone: bool = True) -> None:
    """Check everything that a schema must obey.

    Args:
        schema: as the caller built it; its fields may hold anything.
        check_zone: look the time zone up too. The SDK leaves that to the server, which has the data.

    Raises:
        InvalidRequestError: with a sentence that names the field.
    """
    _check_types(schema)
    check_metric_code(schema.code)
    _check_text(schema.description, "description", limits.DESCRIPTION_BYTES_MAX, empty=True)
    _check_text(schema.time_zone, "time_zone", limits.TIME_ZONE_BYTES_MAX)
    _check_dimensions(schema.filters)
    _check_thresholds(schema.thresholds)
    if not 1 <= schema.billing_cycle_day <= BILLING_CYCLE_DAY_MAX:
        raise _invalid(
            f"billing_cycle_day must be 1 to {BILLING_CYCLE_DAY_MAX}, not {schema.billing_cycle_day}"
        )
    if schema.billing_cycle_day != 1 and schema.period_type is not PeriodType.CALENDAR:
        raise _invalid(f"billing_cycle_day is for period_type CALENDAR, not {schema.period_type.name}")
    if schema.unique_type is not UniqueType.UINT64 and schema.agg_type is not AggType.COUNT_UNIQUE:
        raise _invalid(f"unique_type is for agg_type COUNT_UNIQUE, not {schema.agg_type.name}")
    if schema.grace_seconds is not None:
        if schema.period_type is PeriodType.LIFETIME:
            raise _invalid("grace_seconds can't be set with period_type LIFETIME, which never ends")
        if not 0 <= schema.grace_seconds <= limits.GRACE_SECONDS_MAX:
            raise _invalid(
                f"grace_seconds must be 0 to {limits.GRACE_SECONDS_MAX}, not {schema.grace_seconds}"
            )
    if schema.retain_raw_days is not None and not 1 <= schema.retain_raw_days <= limits.RETAIN_RAW_DAYS_MAX:
        raise _invalid(
            f"retain_raw_days must be 1 to {limits.RETAIN_RAW_DAYS_MAX}, or None, not {schema.retain_raw_days}"
        )
    size = len(canonical(schema))
    if size > limits.SCHEMA_BYTES_MAX:
        raise _invalid(f"the schema has {size} bytes encoded, more than {limits.SCHEMA_BYTES_MAX}")
    if check_zone:
        transitions(schema.time_zone)


def check_metric_code(code: str) -> None:
    """Check a metric code alone.

    Raises:
        InvalidRequestError: it isn't 1 to 64 characters of the allowed ones.
    """
    if not isinstance(code, str) or not _CODE.fullmatch(code):
        raise _invalid(f"code {code!r:.100} must be 1 to 64 characters of a-z A-Z 0-9 _ . : -")


def check_update(old: MetricSchema, new: MetricSchema) -> None:
    """Check that a metric's schema may become another: thresholds and dimension values may be added.

    Additions go to the end, because totals refer to positions. The description is free to change, and so is for how
    long raw events are kept, of which no total depends. `new` must have passed `validate`.

    Raises:
        InvalidRequestError: with a sentence that names what can't change.
    """
    for field in (
        "code",
        "agg_type",
        "period_type",
        "billing_cycle_day",
        "time_zone",
        "unique_type",
        "grace_seconds",
    ):
        if getattr(old, field) != getattr(new, field):
            raise _invalid(f"{field} of a metric can't change: {_shown(old, field)} to {_shown(new, field)}")
    if [dimension.key for dimension in old.filters] != [dimension.key for dimension in new.filters]:
        raise _invalid("the dimensions of a metric can't change, nor their order")
    for before, after in zip(old.filters, new.filters, strict=True):
        _check_dimension_update(before.key, list(before.values), list(after.values))
    by_code = {threshold.code: threshold for threshold in new.thresholds}
    for threshold in old.thresholds:
        if threshold.code not in by_code:
            raise _invalid(f"threshold {threshold.code!r} can't be removed")
        if by_code[threshold.code] != threshold:
            raise _invalid(f"threshold {threshold.code!r} can't change: add one under another code")
    if list(new.thresholds)[: len(old.thresholds)] != list(old.thresholds):
        raise _invalid("thresholds keep their order: add new ones at the end")


def _check_dimension_update(key: str, before: list[str], after: list[str]) -> None:
    if before == after:
        return
    name = f"dimension {key!r}"
    if not before:
        raise _invalid(f"{name} takes any value: it can't be narrowed to a list")
    if not after:
        raise _invalid(f"{name} has declared values: it can't be opened to any value")
    kept = set(after)
    for value in before:
        if value not in kept:
            raise _invalid(f"{name}: value {value!r:.100} can't be removed")
    if after[: len(before)] != before:
        raise _invalid(f"{name}: values keep their order: add new ones at the end")


def _check_types(schema: MetricSchema) -> None:
    # Structs take whatever they are built with. A strict conversion of their contents finds what isn't of the
    # declared type, and says where.
    if not isinstance(schema, MetricSchema):
        raise _invalid(f"a metric's schema must be a MetricSchema, not {type(schema).__name__}")
    try:
        msgspec.convert(msgspec.to_builtins(schema), MetricSchema)
    except (msgspec.ValidationError, TypeError, ValueError, OverflowError) as error:
        raise _invalid(f"the schema has a field of the wrong type: {error!s:.300}") from None
    # The conversion lets a dict pass for a struct and a number for an enum's member.
    for dimension in schema.filters:
        if not isinstance(dimension, DimensionFilter):
            raise _invalid(f"filters holds DimensionFilter, not {type(dimension).__name__}")
    for threshold in schema.thresholds:
        if not isinstance(threshold, AlertThreshold):
            raise _invalid(f"thresholds holds AlertThreshold, not {type(threshold).__name__}")
    for field, kind in (("agg_type", AggType), ("period_type", PeriodType), ("unique_type", UniqueType)):
        if not isinstance(getattr(schema, field), kind):
            raise _invalid(f"{field} must be one of {kind.__name__}")


def _check_text(text: str, name: str, bytes_max: int, *, empty: bool = False) -> None:
    if not text and not empty:
        raise _invalid(f"{name} must not be empty")
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise _invalid(f"{name} {text!r:.100} has a lone surrogate, which UTF-8 can't say") from None
    if size > bytes_max:
        raise _invalid(f"{name} {text!r:.100} has {size} bytes, more than {bytes_max}")


def _check_unique(items: Iterable[str], name: str) -> None:
    seen: set[str] = set()
    for item in items:
        if item in seen:
            raise _invalid(f"{name} {item!r:.100} is given twice")
        seen.add(item)


def _check_dimensions(dimensions: list[DimensionFilter]) -> None:
    if len(dimensions) > limits.DIMENSIONS_MAX:
        raise _invalid(f"filters has {len(dimensions)} dimensions, more than {limits.DIMENSIONS_MAX}")
    for index, dimension in enumerate(dimensions):
        name = f"filters[{index}]"
        _check_text(dimension.key, f"{name}.key", limits.PROPERTY_KEY_BYTES_MAX)
        if len(dimension.values) > limits.DIMENSION_VALUES_MAX:
            raise _invalid(
                f"{name} has {len(dimension.values)} values, more than {limits.DIMENSION_VALUES_MAX}"
            )
        for value in dimension.values:
            # The empty string is a value like any other: it isn't the same as a missing property.
            _check_text(value, f"{name} value", limits.PROPERTY_VALUE_BYTES_MAX, empty=True)
        _check_unique(dimension.values, f"{name} value")
    _check_unique((dimension.key for dimension in dimensions), "filters: the key")


def _check_thresholds(thresholds: list[AlertThreshold]) -> None:
    if len(thresholds) > limits.THRESHOLDS_MAX:
        raise _invalid(f"thresholds has {len(thresholds)} entries, more than {limits.THRESHOLDS_MAX}")
    for index, threshold in enumerate(thresholds):
        name = f"thresholds[{index}]"
        _check_text(threshold.code, f"{name}.code", limits.THRESHOLD_CODE_BYTES_MAX)
        if not 1 <= threshold.value <= limits.THRESHOLD_VALUE_MAX:
            raise _invalid(f"{name} ({threshold.code!r}): its value must be from 1 to 2^63-1")
    _check_unique((threshold.code for threshold in thresholds), "thresholds: the code")


def _shown(schema: MetricSchema, field: str) -> str:
    value = getattr(schema, field)
    return value.name if isinstance(value, AggType | PeriodType | UniqueType) else str(value)


def _invalid(message: str) -> InvalidRequestError:
    return InvalidRequestError(message, code=ErrorCode.INVALID_SCHEMA)


# --- records -------------------------------------------------------------------------------------------------


def make_record(uid: int, schema: MetricSchema) -> MetricRecord:
    """Make the first version of a metric: validate its schema and look its zone up.

    Raises:
        InvalidRequestError: as `validate`.
    """
    assert uid >= 0, "a uid is a create revision"
    validate(schema, check_zone=False)
    return MetricRecord(uid=uid, version=1, schema=schema, zone=transitions(schema.time_zone))


def update_record(record: MetricRecord, schema: MetricSchema) -> MetricRecord:
    """Make the next version of a metric with a changed schema; its zone's transitions stay.

    Raises:
        InvalidRequestError: as `validate` and `check_update`.
    """
    validate(schema, check_zone=False)
    check_update(record.schema, schema)
    return MetricRecord(
        uid=record.uid,
        version=record.version + 1,
        schema=schema,
        zone=record.zone,
        deleted=record.deleted,
    )


# --- bytes ---------------------------------------------------------------------------------------------------
# MessagePack maps, keys in the order of declaration. A field that a later version adds must be left out of the
# bytes while it has its default (msgspec.UNSET does that), or every schema would compare as changed. Unknown
# fields are refused rather than dropped: they say something about counting that this version can't do.


class _WireThreshold(msgspec.Struct, forbid_unknown_fields=True):
    code: str
    value: bytes  # 16, two's complement, least significant first
    recurring: bool


class _WireDimension(msgspec.Struct, forbid_unknown_fields=True):
    key: str
    values: list[str]


class _WireSchema(msgspec.Struct, forbid_unknown_fields=True):
    code: str
    agg_type: AggType
    filters: list[_WireDimension]
    thresholds: list[_WireThreshold]
    period_type: PeriodType
    billing_cycle_day: int
    time_zone: str
    unique_type: UniqueType
    grace_seconds: int | None
    description: str
    retain_raw_days: int | msgspec.UnsetType = msgspec.UNSET


class _WireRecord(msgspec.Struct, forbid_unknown_fields=True):
    uid: int
    version: int
    deleted: bool
    schema: _WireSchema
    zone: ZoneTable


_encoder = msgspec.msgpack.Encoder()
_schema_decoder = msgspec.msgpack.Decoder(_WireSchema)
_record_decoder = msgspec.msgpack.Decoder(_WireRecord)

_VALUE_BYTES = 16


def canonical(schema: MetricSchema) -> bytes:
    """Return the bytes of a valid schema: equal schemas give equal bytes, others don't."""
    return _encoder.encode(_to_wire(schema))


def decode_schema(data: bytes) -> MetricSchema:
    """Return the schema of its `canonical` bytes, which it obeys every rule but the zone's existence.

    Raises:
        RemoteProtocolError: they aren't the bytes of a valid schema.
    """
    try:
        wire = _schema_decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RemoteProtocolError(f"not a metric schema: {error!s:.200}") from error
    return _from_wire(wire)


def encode_record(record: MetricRecord) -> bytes:
    """Return the bytes of a record."""
    wire = _WireRecord(
        uid=record.uid,
        version=record.version,
        deleted=record.deleted,
        schema=_to_wire(record.schema),
        zone=record.zone,
    )
    return _encoder.encode(wire)


def decode_record(data: bytes) -> MetricRecord:
    """Return the record of its bytes, complete and consistent.

    Raises:
        RemoteProtocolError: they aren't the bytes of a valid record.
    """
    try:
        wire = _record_decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RemoteProtocolError(f"not a metric record: {error!s:.200}") from error
    if wire.uid < 0 or wire.version < 1:
        raise RemoteProtocolError(f"a metric record can't have uid {wire.uid} and version {wire.version}")
    problem = wire.zone.problem()
    if problem:
        raise RemoteProtocolError(f"not a metric record: {problem}")
    schema = _from_wire(wire.schema)
    if wire.zone.name != schema.time_zone:
        raise RemoteProtocolError(
            f"a metric of zone {schema.time_zone!r} carries the zone {wire.zone.name!r}"
        )
    return MetricRecord(
        uid=wire.uid, version=wire.version, schema=schema, zone=wire.zone, deleted=wire.deleted
    )


def _to_wire(schema: MetricSchema) -> _WireSchema:
    return _WireSchema(
        code=schema.code,
        agg_type=schema.agg_type,
        filters=[_WireDimension(key=item.key, values=list(item.values)) for item in schema.filters],
        thresholds=[
            _WireThreshold(
                code=item.code,
                value=item.value.to_bytes(_VALUE_BYTES, "little", signed=True),
                recurring=item.recurring,
            )
            for item in schema.thresholds
        ],
        period_type=schema.period_type,
        billing_cycle_day=schema.billing_cycle_day,
        time_zone=schema.time_zone,
        unique_type=schema.unique_type,
        grace_seconds=schema.grace_seconds,
        description=schema.description,
        retain_raw_days=msgspec.UNSET if schema.retain_raw_days is None else schema.retain_raw_days,
    )


def _from_wire(wire: _WireSchema) -> MetricSchema:
    if any(len(item.value) != _VALUE_BYTES for item in wire.thresholds):
        raise RemoteProtocolError(f"a threshold's value has {_VALUE_BYTES} bytes")
    schema = MetricSchema(
        code=wire.code,
        agg_type=wire.agg_type,
        filters=[DimensionFilter(key=item.key, values=item.values) for item in wire.filters],
        thresholds=[
            AlertThreshold(
                code=item.code,
                value=int.from_bytes(item.value, "little", signed=True),
                recurring=item.recurring,
            )
            for item in wire.thresholds
        ],
        period_type=wire.period_type,
        billing_cycle_day=wire.billing_cycle_day,
        time_zone=wire.time_zone,
        unique_type=wire.unique_type,
        grace_seconds=wire.grace_seconds,
        description=wire.description,
        retain_raw_days=None if wire.retain_raw_days is msgspec.UNSET else wire.retain_raw_days,
    )
    try:
        validate(schema, check_zone=False)
    except InvalidRequestError as error:
        raise RemoteProtocolError(f"not a valid metric schema: {error.message}") from error
    return schema
