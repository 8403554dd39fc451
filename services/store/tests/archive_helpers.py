"""Archives for tests: events and logs to archive, and the rows of files back as plain values."""

from __future__ import annotations

import json
import uuid
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tallymark_protocol.identifiers import encode_event_id
from tallymark_protocol.model import AggType, DimensionFilter, MetricSchema, UniqueType
from tallymark_protocol.schema import make_record, update_record
from tallymark_runtime.disk import MemoryDisk
from tallymark_store.archive.archiver import plan_slice, write_slice
from tallymark_store.archive.columns import SCHEMA
from tallymark_store.archive.manifest import ArchiveFile
from tallymark_store.archive.names import MetricNames
from tallymark_store.archive.writer import open_file
from tallymark_store.fold.schemas import SchemaTable
from tallymark_store.scan.source import MemorySource

from .scan_helpers import build_body, event_times

APPEND = 1_763_000_000 * 10**9
PARTITION = 3
DIMENSIONS = {5: {"p", "r"}, 6: set(), 7: {'q"\\\n'}, 8: {"x"}}  # by uid


class Log:
    """A partition's log: metrics that come and go, and event batches between them."""

    def __init__(self) -> None:
        self.source = MemorySource(PARTITION, segment_bytes=4_096)
        self.schemas = SchemaTable()
        self.end = 0
        self.rows: list[dict[str, Any]] = []  # what an archive is to hold, in log order
        self._uids: dict[str, int] = {}
        self._append_ns = APPEND

    def metric(self, uid: int, code: str, **fields: Any) -> None:
        """Create a metric, in place of the one that had the code."""
        filters = [DimensionFilter(key=key) for key in sorted(DIMENSIONS[uid])]
        self.schemas.put(make_record(uid, MetricSchema(code=code, filters=filters, **fields)), self.end)
        self._uids[code] = uid
        self.end += 1

    def changed(self, code: str) -> None:
        """A further version of a metric."""
        record = self.schemas.record(self.schemas.slot_of(code))
        newer = update_record(record, MetricSchema(**{**_fields(record.schema), "description": "new"}))
        self.schemas.put(newer, self.end)
        self.end += 1

    def batch(
        self, events: list[dict[str, Any]], verdicts: list[int] | None = None, wait_ns: int = 10
    ) -> None:
        self._append_ns += wait_ns
        times = event_times(events, self._append_ns)
        self.source.append(
            build_body(events, verdicts), base_offset=self.end, count=len(events), append_ns=self._append_ns,
            min_time_ns=min(times), max_time_ns=max(times),
        )  # fmt: skip
        for i, event in enumerate(events):
            if not verdicts or not verdicts[i]:
                self.rows.append(
                    {
                        "metric": event["code"],
                        "metric_uid": self._uids[event["code"]],
                        "account": event["account"],
                        "time_ns": times[i],
                        "time_given": event.get("time") is not None,
                        "append_time_ns": self._append_ns,
                        "value": event["value"],
                        "operation": event.get("op", 0),
                        "id": event.get("id"),
                        "properties": event.get("properties") or {},
                        "partition": PARTITION,
                        "offset": self.end + i,
                    }
                )
        self.end += len(events)

    def archived(self, disk: MemoryDisk, start: int = 0, end: int | None = None) -> list[ArchiveFile]:
        """Write [start, end) as slices do; returns the files."""
        names = MetricNames(self.schemas)
        target = self.end if end is None else end
        files = []
        while start < target:
            planned = plan_slice(self.source, start, target)
            assert planned is not None
            assert planned.start_offset == start
            assert start < planned.end_offset <= target
            written = write_slice(disk, PARTITION, names, planned)
            if written is not None:
                files.append(written)
            start = planned.end_offset
        assert start == target
        return files


def _fields(schema: MetricSchema) -> dict[str, Any]:
    return {name: getattr(schema, name) for name in schema.__struct_fields__}


def table_of(disk: MemoryDisk, name: str) -> pa.Table:
    """A file's rows, once its order and its columns are as they are said to be."""
    file: pq.ParquetFile = open_file(disk, name)
    assert file.schema_arrow.equals(SCHEMA)
    table = file.read()
    keys = np.stack(
        [
            table.column(key).to_numpy().astype(object)
            for key in ("metric_uid", "account", "time_ns", "offset")
        ]
    )
    rows = list(zip(*keys, strict=True))
    assert rows == sorted(rows)
    return table


def events_of(table: pa.Table) -> list[dict[str, Any]]:
    """Rows as `Log.rows` has them, by offset."""
    events = []
    for row in table.to_pylist():
        dimensions = json.loads(row.pop("dimensions") or "{}")
        others = json.loads(row.pop("properties") or "{}")
        assert set(dimensions) <= DIMENSIONS[row["metric_uid"]]
        assert not set(others) & DIMENSIONS[row["metric_uid"]]
        row["properties"] = {**dimensions, **others}
        row["value"] = _value(row.pop("value_kind"), row["value"], row.pop("value_text"))
        row["id"] = _id(row.pop("id_kind"), row["id"])
        row["operation"] = ["none", "add", "remove"].index(row["operation"])
        events.append(row)
    return sorted(events, key=lambda event: event["offset"])


def _value(kind: str | None, value: int | None, text: str | None) -> Any:
    if kind is None:
        assert text is None
        return value
    assert value is None
    assert text is not None
    return b"\x01" + text.encode() if kind == "text" else b"\x02" + int(text).to_bytes(8, "little")


def _id(kind: str | None, text: str | None) -> bytes | None:
    if kind is None:
        assert text is None
        return None
    assert text is not None
    given = {"text": str, "bytes": bytes.fromhex, "uuid": uuid.UUID, "int": int}[kind](text)
    return encode_event_id(given)


def usual_log(records: int = 8, events: int = 50, seed: int = 1) -> Log:
    """A log whose archive is larger than a few rows."""
    log = Log()
    log.metric(5, "a", agg_type=AggType.SUM)
    log.metric(6, "s", agg_type=AggType.COUNT_UNIQUE, unique_type=UniqueType.STRING)
    rng = np.random.default_rng(seed)
    for r in range(records):
        batch = []
        for i in range(events):
            account = int(rng.integers(0, 9))
            if i % 7 == 3:
                batch.append(
                    {"account": account, "code": "s", "value": b"\x01u%d" % rng.integers(0, 5), "op": i % 3}
                )
                continue
            batch.append(
                {
                    "account": account, "code": "a", "value": int(rng.integers(-50, 50)),
                    "time": APPEND + int(rng.integers(-10, 10)) if i % 2 else None,
                    "properties": {"p": "x" if i % 3 else "y", "z": str(i % 4)} if i % 5 else {},
                    "id": encode_event_id(f"{r}-{i}") if i % 4 == 0 else None,
                }
            )  # fmt: skip
        log.batch(batch, [1 if i % 11 == 5 else 0 for i in range(events)])
    return log
