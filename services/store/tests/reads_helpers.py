"""Logs with metrics of every kind, questions about them, and a plain recount that knows the answers."""

from __future__ import annotations

import random
from typing import Any

import google_crc32c
import msgspec
import numpy as np
import pytest

from tallymark_protocol.identifiers import encode_text
from tallymark_protocol.messages import Filter, GroupValue, Stats, StoreTotals
from tallymark_protocol.model import (
    AggType,
    AlertThreshold,
    DimensionFilter,
    MetricSchema,
    PeriodType,
    UniqueType,
)
from tallymark_protocol.periods import buckets, day_of, period_of
from tallymark_protocol.schema import MetricRecord, make_record, update_record
from tallymark_runtime.disk import MemoryDisk
from tallymark_store import batch
from tallymark_store.archive import archiver, writer
from tallymark_store.archive.archiver import merge_files, plan_slice, write_slice
from tallymark_store.archive.manifest import ArchiveFile, Manifest
from tallymark_store.archive.names import MetricNames
from tallymark_store.archive.reading import ArchiveReader, ArchiveView
from tallymark_store.fold import Fold
from tallymark_store.reads import Reads, TotalsRead, empty_stats
from tallymark_store.scan.source import MemorySource

from .fold_reference import Folded, FoldReference
from .payload_builder import build_payload, event, place

HOUR = 3_600 * 10**9
DAY = 24 * HOUR
BASE = 19_789 * DAY  # 2024-03-07: New York changes its clocks three days later
END = 2**63 - 1
ACCOUNTS = (0, 1, 7, 2**64 - 1)
PARTITION = 3

DIMENSIONS = [DimensionFilter(key="provider", values=["aws", "gcp"]), DimensionFilter(key="region")]
SCHEMAS = [
    MetricSchema(code="count", filters=DIMENSIONS, time_zone="Asia/Kathmandu"),
    MetricSchema(
        code="sum",
        agg_type=AggType.SUM,
        period_type=PeriodType.CALENDAR,
        billing_cycle_day=9,
        time_zone="America/New_York",
        filters=DIMENSIONS,
        thresholds=[AlertThreshold(code="t", value=4, recurring=True)],
    ),
    MetricSchema(code="max", agg_type=AggType.MAX, period_type=PeriodType.DAY, filters=DIMENSIONS[1:]),
    MetricSchema(code="latest", agg_type=AggType.LATEST, period_type=PeriodType.LIFETIME),
    MetricSchema(
        code="users",
        agg_type=AggType.COUNT_UNIQUE,
        period_type=PeriodType.DAY,
        time_zone="America/New_York",
        filters=DIMENSIONS,
    ),
    MetricSchema(
        code="names",
        agg_type=AggType.COUNT_UNIQUE,
        unique_type=UniqueType.STRING,
        period_type=PeriodType.CALENDAR,
    ),
]


class Log:
    """A log, its fold, its source, and the reference's list of what counts."""

    def __init__(self) -> None:
        self.fold = Fold(PARTITION)
        self.source = MemorySource(PARTITION, segment_bytes=8_000)
        self.reference = FoldReference()
        self.records: dict[str, MetricRecord] = {}
        self.by_reference = True
        self.reader: ArchiveReader | None = None
        self.manifest = Manifest(PARTITION, "")
        self.uniques_max = 1_024

    @property
    def reads(self) -> Reads:
        return Reads(self.fold, self.source, uniques_max=self.uniques_max, archive=self.view)

    def view(self) -> ArchiveView | None:
        return None if self.reader is None else self.reader.view(self.manifest)

    def archive(self, rng: random.Random, end: int, disk: MemoryDisk | None = None) -> MemoryDisk:
        """Archive what lies below an offset, in slices of any size, some of them merged; drop some of that log."""
        disk = disk or MemoryDisk()
        names = MetricNames(self.fold.schemas)
        files: list[ArchiveFile] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(writer, "ROW_GROUP_ROWS", rng.choice((3, 20, 100)))
            patch.setattr("tallymark_store.archive.merge.ROW_GROUP_ROWS", rng.choice((3, 20, 100)))
            at = 0
            while at < end:
                patch.setattr(archiver, "SLICE_EVENTS", rng.choice((1, 30, 200)))
                planned = plan_slice(self.source, at, end)
                if planned is None:
                    break
                at = planned.end_offset
                written = write_slice(disk, PARTITION, names, planned)
                files += [] if written is None else [written]
                if len(files) > 2 and rng.random() < 0.3:
                    first = rng.randrange(len(files) - 1)
                    files[first:] = [merge_files(disk, PARTITION, tuple(files[first:]))]
        self.reader = ArchiveReader(disk, PARTITION)
        self.manifest = Manifest(PARTITION, "", at, tuple(files))
        self.source.drop(rng.randrange(at + 1))
        return disk

    def put(self, record: MetricRecord) -> None:
        self.reference.put_schema(record, self.fold.applied)
        self.fold.put_schema(record, self.fold.applied)
        self.records[record.schema.code] = record

    def append(self, events: list[dict[str, Any]], append_ns: int, verdicts: list[int] | None = None) -> None:
        base = self.fold.applied
        payload = build_payload(events)
        marks = None if verdicts is None or not any(verdicts) else np.array(verdicts, np.uint8)
        originals = None if marks is None else np.zeros(int(np.isin(marks, (1, 2)).sum()), np.int64)
        body = batch.encode_prefix(google_crc32c.value(payload), len(events), marks, originals) + payload
        kept = [e for i, e in enumerate(events) if verdicts is None or not verdicts[i]]
        times = [append_ns if e["time"] is None else e["time"] for e in kept] or [append_ns]
        self.source.append(
            body,
            base_offset=base,
            count=len(events),
            append_ns=append_ns,
            min_time_ns=min(times),
            max_time_ns=max(times),
        )
        if self.by_reference:
            self.reference.apply(events, verdicts, base, append_ns)
        data, columns = place(payload)
        self.fold.apply(data, columns, marks, base, append_ns)

    def wanted(
        self, code: str, account: int | None, start: int, end: int, filters: list[Filter]
    ) -> list[Folded]:
        record = self.records[code]
        keys = [dimension.key for dimension in record.schema.filters]
        return [
            e
            for e in self.reference.events
            if e.metric.record.uid == record.uid
            and (account is None or e.account == account)
            and start <= e.time < end
            and all(
                e.group[keys.index(f.key)].kind == 0 and e.group[keys.index(f.key)].value in f.values
                for f in filters
            )
        ]

    def totals(self, request: StoreTotals) -> list[tuple[int, list[GroupValue], Stats]]:
        """What `request` must give, flags aside."""
        schema = self.records[request.metric_code].schema
        keys = [dimension.key for dimension in schema.filters]
        rows: list[tuple[int, list[GroupValue], Stats]] = []
        for bucket, (start, end) in enumerate(request.buckets):
            groups: dict[tuple[tuple[int, str], ...], list[Folded]] = {}
            for e in self.wanted(request.metric_code, request.account_id, start, end, request.filters):
                values = [e.group[keys.index(key)] for key in request.group_by]
                groups.setdefault(tuple((v.kind, v.value) for v in values), []).append(e)
            for group in sorted(groups):
                stats = self.reference.stats(groups[group], schema.agg_type)
                rows.append((bucket, [GroupValue(*value) for value in group], stats))
        if not rows and not request.group_by and len(request.buckets) == 1:
            rows.append((0, [], empty_stats(schema.agg_type)))
        return rows


def random_event(rng: random.Random) -> dict[str, Any]:
    schema = rng.choice(SCHEMAS)
    fields: dict[str, Any] = {"id": None}
    if rng.random() < 0.7:
        fields["time"] = BASE + rng.choice((0, 15, 20)) * DAY // 4 + rng.randrange(-24, 24 * 6) * HOUR // 4
        fields["time"] += rng.choice((-1, 0, 1))
    values = {"provider": ["aws", "gcp", "ibm", ""], "region": ["eu", "us", "", "é" * 20], "x": ["1", "2"]}
    fields["properties"] = {key: rng.choice(known) for key, known in values.items() if rng.random() < 0.6}
    if schema.agg_type == AggType.COUNT_UNIQUE:
        fields["operation"] = rng.randrange(3)
        if schema.unique_type == UniqueType.STRING:
            fields["text"] = encode_text(f"user {rng.randrange(6)}")
        elif rng.random() < 0.3:
            fields["text"] = b"\x02" + (2**63 + rng.randrange(3)).to_bytes(8, "little")
        else:
            fields["value"] = rng.randrange(5)
    else:
        fields["value"] = rng.choice((1, 2, 0, -3, rng.randrange(9), END, -END - 1))
    return event(rng.choice(ACCOUNTS), schema.code, **fields)


def random_log(seed: int, *, records: int = 30) -> Log:
    """All metrics; midway a value is declared, and one code is deleted and created again."""
    rng = random.Random(seed)
    log = Log()
    for uid, schema in enumerate(SCHEMAS, 10):
        log.put(make_record(uid, schema))
    append_ns = BASE + DAY
    for number in range(records):
        append_ns += rng.randrange(DAY // 3)
        events = [random_event(rng) for _ in range(rng.choice((1, 5, 40)))]
        verdicts = [rng.choice((0, 0, 0, 1, 2, 3, 20)) for _ in events] if rng.random() < 0.5 else None
        log.append(events, append_ns, verdicts)
        if number == records // 2:
            more = [DimensionFilter(key="provider", values=["aws", "gcp", "ibm"]), DIMENSIONS[1]]
            for code in ("sum", "count", "users"):
                schema = msgspec.structs.replace(log.records[code].schema, filters=more)
                log.put(update_record(log.records[code], schema))
            old = log.records["max"]
            log.put(MetricRecord(old.uid, 2, old.schema, old.zone, deleted=True))
            log.put(make_record(99, old.schema))
    return log


def random_buckets(rng: random.Random, record: MetricRecord) -> list[tuple[int, int]]:
    """Aligned and unaligned ranges, days, hours, months, and odd neighbours."""
    schema, zone = record.schema, record.zone
    at = BASE + rng.randrange(-2, 12) * DAY + rng.choice((0, 1, HOUR * 7))
    period = period_of(at, schema.period_type, schema.billing_cycle_day, zone)
    day = day_of(at, zone)
    until = day_of(at + rng.randrange(1, 6) * DAY, zone)
    match rng.randrange(10):
        case 9:  # days, with holes and odd edges
            parts = buckets(day.start_ns, until.end_ns + 12 * DAY, "day", zone, 1_000)
            kept = [(part.start_ns + rng.choice((0, 0, 0, 1)), part.end_ns) for part in parts]
            return [bounds for bounds in kept if rng.random() < 0.9]
        case 0:
            return [(period.start_ns, period.end_ns)]
        case 1:
            return [(day.start_ns, until.end_ns)]
        case 2:
            return [(day.start_ns + rng.randrange(-2, 3), until.end_ns + rng.randrange(-2, 3))]
        case 3:
            return [(at, at + rng.randrange(0, 3 * DAY))]
        case 4:
            unit = rng.choice(("hour", "day", "month"))
            parts = buckets(at, at + rng.randrange(1, 5) * DAY, unit, zone, 1_000)
            return [(part.start_ns, part.end_ns) for part in parts]
        case 5:
            return [(0, END)]
        case 6:
            return [(-5, period.start_ns), (period.start_ns, at), (at, at), (at, END)]
        case 7:
            return [(period.start_ns, until.end_ns)]
        case _:
            return [(day.start_ns, day.end_ns), (until.start_ns + 1, until.end_ns)]


def random_filters(rng: random.Random, record: MetricRecord) -> list[Filter]:
    filters = []
    for dimension in record.schema.filters:
        if rng.random() < 0.35:
            known = dimension.values or ["eu", "us", "", "nowhere"]
            filters.append(Filter(key=dimension.key, values=rng.sample(known, rng.randrange(1, 3))))
    rng.shuffle(filters)
    return filters


def finish(read: TotalsRead, rng: random.Random) -> Any:
    while not read.step(rng.choice((1, 50, 10_000))):
        pass
    return read.result()


def without_flags(stats: Stats) -> Stats:
    return msgspec.structs.replace(stats, alert_flags=0)
