"""Compiling the fold's kernels before they are needed: a node does it before it takes a lease."""

from __future__ import annotations

import numpy as np

from tallymark_protocol import layout, payload
from tallymark_protocol.errors import Reason
from tallymark_protocol.model import AggType, AlertThreshold, DimensionFilter, MetricSchema
from tallymark_protocol.schema import MetricRecord
from tallymark_protocol.zones import UTC
from tallymark_store.fold import runs
from tallymark_store.fold.fold import Fold


def _payload(code: bytes) -> bytes:
    """A payload of one event, with nothing but an account and a metric."""
    sections = len(code).to_bytes(4, "little") + code + (1).to_bytes(8, "little")
    entry = layout.CHUNK_ENTRY.pack(1, 0, 0, 0, 1, 0, 0)
    length = layout.PAYLOAD_HEADER_BYTES + len(entry) + len(sections)
    header = layout.PAYLOAD_HEADER.pack(
        layout.PAYLOAD_MAGIC, length, 1, 1, layout.CONSTANT, 1, 0, len(code), 0, 0, 0, 0, 0
    )
    return header + entry + sections


def warm_up() -> None:
    """Run every kernel once, on next to nothing; takes long only where numba has no compiled copy cached."""
    schema = MetricSchema(
        code="m",
        agg_type=AggType.SUM,
        filters=[DimensionFilter(key="k", values=["v"])],
        thresholds=[AlertThreshold(code="t", value=1)],
    )
    fold = Fold(0)
    fold.put_schema(MetricRecord(1, 1, schema, UTC), 0)
    data = np.frombuffer(_payload(b"m"), dtype=np.uint8)
    columns = np.zeros(payload.COLUMNS, dtype=np.int64)
    status = payload.place_payload(data, 0, len(data), columns)
    assert status == payload.OK
    fold.apply(data, columns, None, 1, 0)
    fold.apply(data, columns, np.zeros(1, dtype=np.uint8), 2, 0)
    run = np.frombuffer(_payload(b"m") + bytes(1), dtype=np.uint8)
    places = np.array([[0, len(data), len(data), len(data) + 1, 3, 0, 0, 0]], dtype=np.int64)
    table = np.zeros((1, payload.COLUMNS), dtype=np.int64)
    status = runs.place_run(run, places, table)
    assert status == payload.OK
    runs.chunks_of_run(run, places, table, np.zeros((1, runs.ROW_WORDS), dtype=np.uint64))
    fold.apply_run(run, table, places)
    other = np.frombuffer(_payload(b"u"), dtype=np.uint8)
    status = payload.place_payload(other, 0, len(other), columns)
    assert status == payload.OK
    fold.apply(other, columns, np.full(1, int(Reason.UNKNOWN_METRIC), dtype=np.uint8), 4, 0)
    slot = fold.schemas.slot_of("m")
    start, end = fold.schemas.day_of(slot, 0)
    fold.period_stats(1, slot, 0)
    selection = fold.select(slot, [("k", ["v"])])
    fold.day_rows(1, slot, start, end, selection, [0], per_day=True)
    fold.day_rows(1, slot, start, end)
    fold.top_period(slot, start, 1)
    fold.top_days(slot, start, end, selection, 1)
    fold.dimensions.mask(selection)
    fold.alerts(0)
    restored = Fold.restore(0, fold.snapshot())
    assert restored.digest() == fold.digest()
