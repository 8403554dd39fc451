"""What the fold must say, worked out event by event from plain Python lists: slow, and easy to believe."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

from tallymark_protocol import int128, limits
from tallymark_protocol.messages import AlertRecord, GroupValue, Stats
from tallymark_protocol.model import AggType, OperationType
from tallymark_protocol.periods import day_of, period_of
from tallymark_protocol.schema import MetricRecord

MISSING = GroupValue(1)
OTHER = GroupValue(2)


@dataclass
class Folded:
    """One accepted event as the reference keeps it."""

    account: int
    metric: Metric
    value: int
    unique: Any
    time: int
    offset: int
    operation: int
    group: tuple[GroupValue, ...]
    period: tuple[int, int]
    day: int


@dataclass
class Metric:
    """A metric uid: its schema as in force, and since when each dimension value is declared."""

    record: MetricRecord
    declared: list[dict[str, int]] = field(default_factory=list)


class FoldReference:
    """The reference. Events are dicts of `payload_builder.event`."""

    def __init__(self) -> None:
        self.events: list[Folded] = []
        self.alerts: list[dict[str, Any]] = []
        self._metrics: dict[int, Metric] = {}
        self._codes: dict[str, int] = {}
        self._fired: dict[
            tuple[Any, ...], int
        ] = {}  # (account, uid, period start, threshold) -> highest multiple
        self._combos: dict[tuple[Any, ...], list[tuple[GroupValue, ...]]] = {}
        self._overflowed: set[tuple[int, int, int]] = set()
        self._in_cells: dict[int, bool] = {}

    def put_schema(self, record: MetricRecord, offset: int) -> None:
        metric = self._metrics.get(record.uid)
        if metric is None:
            metric = Metric(record, [dict.fromkeys(f.values, offset) for f in record.schema.filters])
            self._metrics[record.uid] = metric
        else:
            metric.record = record
            for declared, dimension in zip(metric.declared, record.schema.filters, strict=True):
                for value in dimension.values:
                    declared.setdefault(value, offset)
        if record.deleted:
            self._codes.pop(record.schema.code, None)
        else:
            self._codes[record.schema.code] = record.uid

    def apply(
        self, events: list[dict[str, Any]], verdicts: list[int] | None, base: int, append_ns: int
    ) -> None:
        for i, event in enumerate(events):
            if verdicts is None or verdicts[i] == 0:
                self._apply(event, base + i, append_ns)

    def _apply(self, event: dict[str, Any], offset: int, append_ns: int) -> None:
        metric = self._metrics[self._codes[event["metric"]]]
        schema, zone = metric.record.schema, metric.record.zone
        time = append_ns if event["time"] is None else event["time"]
        period = period_of(time, schema.period_type, schema.billing_cycle_day, zone)
        group = []
        for declared, dimension in zip(metric.declared, schema.filters, strict=True):
            value = event["properties"].get(dimension.key)
            if value is None:
                group.append(MISSING)
            elif dimension.values and declared.get(value, offset + 1) > offset:
                group.append(OTHER)
            else:
                group.append(GroupValue(0, value))
        text = event["text"]
        unique = event["value"] if text is None else text
        folded = Folded(
            event["account"], metric, event["value"] if text is None else 0, unique, time, offset,
            event["operation"], tuple(group), (period.start_ns, period.end_ns), day_of(time, zone).start_ns,
        )  # fmt: skip
        self.events.append(folded)
        if schema.filters:
            key = (folded.account, metric.record.uid, folded.day)
            combos = self._combos.setdefault(key, [])
            if folded.group not in combos:
                if len(combos) < limits.DIMENSION_COMBINATIONS_MAX:
                    combos.append(folded.group)
                else:
                    self._overflowed.add(key)
        self._check_thresholds(folded, append_ns)

    def _check_thresholds(self, event: Folded, append_ns: int) -> None:
        schema = event.metric.record.schema
        if not schema.thresholds:
            return
        uid = event.metric.record.uid
        total = self._aggregate([e for e in self.events if self._same_period(e, event)], schema.agg_type)
        for index, threshold in enumerate(schema.thresholds):
            key = (event.account, uid, event.period[0], index)
            reached = 0 if total is None or total < 0 else total // threshold.value
            highest = self._fired.get(key, 0)
            if not threshold.recurring:
                reached = min(reached, 1)
            if reached > highest:
                self._fired[key] = reached
                self.alerts.append(
                    {
                        "account": event.account,
                        "uid": uid,
                        "metric": schema.code,
                        "code": threshold.code,
                        "threshold": threshold.value,
                        "index": index,
                        "period": event.period,
                        "value": total,
                        "first": highest + 1,
                        "last": reached,
                        "offset": event.offset,
                        "append_ns": append_ns,
                    }
                )

    @staticmethod
    def _same_period(a: Folded, b: Folded) -> bool:
        return a.account == b.account and a.metric is b.metric and a.period == b.period

    def _aggregate(self, events: list[Folded], agg: AggType) -> int | None:
        if agg == AggType.COUNT:
            return len(events)
        if agg == AggType.COUNT_UNIQUE:
            return self._members(events)
        if agg == AggType.SUM:
            return sum(e.value for e in events)
        if not events:
            return None
        if agg == AggType.MAX:
            return max(e.value for e in events)
        return max(events, key=lambda e: (e.time, e.offset)).value

    @staticmethod
    def _members(events: list[Folded]) -> int:
        last: dict[Any, Folded] = {}
        for e in events:
            if e.unique not in last or (e.time, e.offset) > (last[e.unique].time, last[e.unique].offset):
                last[e.unique] = e
        return sum(e.operation != OperationType.REMOVE for e in last.values())

    def stats(self, events: list[Folded], agg: AggType, flags: int = 0) -> Stats:
        """The statistics of events, at least one."""
        if agg == AggType.COUNT_UNIQUE:
            return Stats(count=len(events), unique=self._members(events), alert_flags=flags)
        last = max(events, key=lambda e: (e.time, e.offset))
        if agg == AggType.COUNT:
            return Stats(
                count=len(events), last_event_at=last.time, last_offset=last.offset, alert_flags=flags
            )
        values = [e.value for e in events]
        return Stats(
            len(values), int128.to_bytes(sum(values)), min(values), max(values), last.value, last.time, last.offset,
            alert_flags=flags,
        )  # fmt: skip

    def period_stats(self, account: int, uid: int, time: int) -> tuple[Stats | None, int, int]:
        metric = self._metrics[uid]
        schema = metric.record.schema
        period = period_of(time, schema.period_type, schema.billing_cycle_day, metric.record.zone)
        bounds = (period.start_ns, period.end_ns)
        events = [
            e for e in self.events if e.account == account and e.metric is metric and e.period == bounds
        ]
        if not events:
            return None, *bounds
        flags = sum(
            1 << i for i in range(len(schema.thresholds)) if (account, uid, bounds[0], i) in self._fired
        )
        return self.stats(events, schema.agg_type, flags), *bounds

    def day_rows(
        self, account: int, uid: int, first: int, end: int, filters: list[tuple[str, list[str]]], group_by: list[int],
        *, per_day: bool,
    ) -> tuple[dict[tuple[Any, ...], Stats], list[int]]:  # fmt: skip
        """({(day or 0, group...): stats}, overflowed days), the latter without rows."""
        metric = self._metrics[uid]
        keys = [f.key for f in metric.record.schema.filters]
        overflowed = {d for a, u, d in self._overflowed if a == account and u == uid and first <= d < end}
        groups: dict[tuple[Any, ...], list[Folded]] = {}
        for e in self.events:
            if (
                e.account != account
                or e.metric is not metric
                or not first <= e.day < end
                or e.day in overflowed
            ):
                continue
            if any(e.group[keys.index(k)] not in [GroupValue(0, v) for v in values] for k, values in filters):
                continue
            group = tuple((e.group[d].kind, e.group[d].value) for d in group_by)
            groups.setdefault((e.day if per_day else 0, *group), []).append(e)
        agg = metric.record.schema.agg_type
        return {key: self.stats(events, agg) for key, events in groups.items()}, sorted(overflowed)


def blake2b_of_text(uid: int, text: bytes) -> bytes:
    """The 128 bits that stand for a string in a set."""
    message = bytes(8) + uid.to_bytes(8, "little") + text
    return hashlib.blake2b(message, digest_size=16).digest()


def check_alerts(found: list[AlertRecord], reference: FoldReference, partition: int) -> None:
    """Check alert records, from the first one on, against the reference's: every field of each."""
    assert len(found) == len(reference.alerts)
    for position, (got, want) in enumerate(zip(found, reference.alerts, strict=True)):
        assert got.position == position
        assert got.id == f"{partition}-{want['offset']}-{want['index']}-{want['uid']}"
        numbers = [
            int128.from_bytes(field) for field in (got.value_at_cross, got.first_multiple, got.last_multiple)
        ]
        assert numbers == [want["value"], want["first"], want["last"]]
        assert (got.partition, got.account_id) == (partition, want["account"])
        assert (got.metric_code, got.threshold_code) == (want["metric"], want["code"])
        assert got.threshold_value == want["threshold"]
        assert (got.period_start_ns, got.period_end_ns) == want["period"]
        assert (got.event_offset, got.triggered_at_ns) == (want["offset"], want["append_ns"])
