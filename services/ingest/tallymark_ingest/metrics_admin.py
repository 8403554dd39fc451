"""Creating, changing, listing and deleting metrics: transactions on the coordinator's keys `metrics/<code>`.

A key's value is a `schema.MetricRecord`. A metric's **uid** is the epoch base plus its key's create revision, which
is known only once the key is written. So the stored record carries the base alone and whoever reads it completes it
from the key (`catalog.metric_of`): one transaction, which requires the base to be as it was read, creates a metric,
and there is no moment at which it has no uid or a wrong one.

Every change is conditional on what was read, so two administrators never overwrite each other: a creation on the
key's absence, an update and a deletion on its last revision. A transaction that lost is judged again by what is
there now. Where the coordinator can't say whether a change was made, the error is retriable, and a repeated
creation that had been made answers `identical`.
"""

from __future__ import annotations

import difflib
from typing import Final

import msgspec

from tallymark_protocol import schema as rules
from tallymark_protocol.errors import (
    AlreadyExistsError,
    ErrorCode,
    NotFoundError,
    UnavailableError,
)
from tallymark_protocol.messages import (
    MetricCreate,
    MetricDelete,
    MetricInfo,
    MetricList,
    MetricsResult,
    MetricUpdate,
)
from tallymark_protocol.model import MetricSchema
from tallymark_runtime.catalog import METRICS, metric_key, metric_of
from tallymark_runtime.coordinator.port import Coordinator, Delete, Get, KeyValue, Put, absent, unchanged
from tallymark_runtime.epochs import read_base

_ATTEMPTS_MAX: Final = 8  # of a change that others keep getting in the way of
_NEAR_MAX: Final = 3  # similar codes that an error names

MetricCall = MetricCreate | MetricUpdate | MetricDelete | MetricList


def _stored(record: rules.MetricRecord, base: int) -> bytes:
    return rules.encode_record(msgspec.structs.replace(record, uid=base))


class MetricsAdmin:
    """Answers the Metric calls."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator
        self.revision = 0  # of the last change made here: leaders must know it before they judge what follows

    async def answer(self, call: MetricCall) -> MetricsResult:
        """Carry out one call. Raises what `create`, `update`, `delete` and `list` raise."""
        match call:
            case MetricCreate():
                records = [await self.create(call.schema)]
            case MetricUpdate():
                records = [await self.update(call.schema)]
            case MetricDelete():
                records = [await self.delete(call.code)]
            case MetricList():
                records = await self.list()
        return MetricsResult([MetricInfo(r.uid, r.version, r.schema) for r in records])

    async def create(self, schema: MetricSchema) -> rules.MetricRecord:
        """Create a metric.

        Raises:
            InvalidRequestError: the schema breaks a rule.
            AlreadyExistsError: the code is taken; `identical` says whether by an equal schema.
            UnavailableError: the code is deleted and created by others all the time.
        """
        record = rules.make_record(0, schema)
        key = metric_key(schema.code)
        for _ in range(_ATTEMPTS_MAX):
            read = await read_base(self._coordinator)
            put = Put(key, _stored(record, read.base))
            result = await self._coordinator.txn([absent(key), read.condition], [put], [Get(key)])
            if result.succeeded:
                self.revision = max(self.revision, result.revision)
                return msgspec.structs.replace(record, uid=read.base + result.revision)
            if result.results[0]:
                break
        else:
            raise _contended(schema.code)
        (existing,) = result.results[0]
        identical = rules.canonical(metric_of(existing).schema) == rules.canonical(schema)
        raise AlreadyExistsError(
            f"the metric {schema.code!r} exists already"
            + (", with this very schema" if identical else ", with another schema"),
            details={"identical": identical},
        )

    async def update(self, schema: MetricSchema) -> rules.MetricRecord:
        """Change what may be changed. A schema that is there already is no change, and no error.

        Raises:
            InvalidRequestError: the schema breaks a rule, or changes what is fixed.
            NotFoundError: there is no such metric.
            UnavailableError: others keep changing it.
        """
        rules.validate(schema)
        key = metric_key(schema.code)
        for _ in range(_ATTEMPTS_MAX):
            item = await self._find(schema.code)
            old = metric_of(item)
            if rules.canonical(old.schema) == rules.canonical(schema):
                return old
            record = rules.update_record(old, schema)
            stored = _stored(record, old.uid - item.create_revision)
            result = await self._coordinator.txn([unchanged(item)], [Put(key, stored)])
            if result.succeeded:
                self.revision = max(self.revision, result.revision)
                return record
        raise _contended(schema.code)

    async def delete(self, code: str) -> rules.MetricRecord:
        """Delete a metric; return what it was. Its events stay.

        Raises:
            InvalidRequestError: this can't be a code.
            NotFoundError: there is no such metric.
            UnavailableError: others keep changing it.
        """
        rules.check_metric_code(code)
        for _ in range(_ATTEMPTS_MAX):
            item = await self._find(code)
            result = await self._coordinator.txn([unchanged(item)], [Delete(item.key)])
            if result.succeeded:
                self.revision = max(self.revision, result.revision)
                return msgspec.structs.replace(metric_of(item), deleted=True)
        raise _contended(code)

    async def list(self) -> list[rules.MetricRecord]:
        """All metrics, by code."""
        listed = await self._coordinator.range(METRICS)
        return [metric_of(item) for item in listed.items]

    async def _find(self, code: str) -> KeyValue:
        item = await self._coordinator.get(metric_key(code))
        if item is not None:
            return item
        listed = await self._coordinator.range(METRICS)
        codes = [other.key[len(METRICS) :].decode("ascii", "replace") for other in listed.items]
        near = difflib.get_close_matches(code, codes, n=_NEAR_MAX)
        hint = f"; did you mean {' or '.join(repr(name) for name in near)}?" if near else ""
        raise NotFoundError(
            f"there is no metric {code!r}{hint}", code=ErrorCode.UNKNOWN_METRIC, details={"near": near}
        )


def _contended(code: str) -> UnavailableError:
    return UnavailableError(f"the metric {code!r} is being changed by others at the same time")
