"""Compiling the fold's kernels before they are needed: a node does it before it takes a lease."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from tallymark_protocol import layout, payload
from tallymark_protocol.errors import Reason
from tallymark_protocol.model import AggType, AlertThreshold, DimensionFilter, MetricSchema
from tallymark_protocol.schema import MetricRecord
from tallymark_protocol.zones import UTC
from tallymark_store.fold import evicting, runs, units
from tallymark_store.fold.fold import Fold
from tallymark_store.fold.spilled import Piece, SpilledFile, merged_records, pack_in_memory

Ints = npt.NDArray[np.int64]


def _payload(code: bytes) -> bytes:
    """A payload of one event, with nothing but an account and a metric."""
    sections = len(code).to_bytes(4, "little") + code + (1).to_bytes(8, "little")
    entry = layout.CHUNK_ENTRY.pack(1, 0, 0, 0, 1, 0, 0)
    length = layout.PAYLOAD_HEADER_BYTES + len(entry) + len(sections)
    header = layout.PAYLOAD_HEADER.pack(
        layout.PAYLOAD_MAGIC, length, 1, 1, layout.CONSTANT, 1, 0, len(code), 0, 0, 0, 0, 0
    )
    return header + entry + sections


def _file_of(fold: Fold, records: Iterator[Ints], record_count: int, unit_count: int) -> SpilledFile:
    return SpilledFile("f", pack_in_memory(fold.partition, records, record_count, unit_count), fold.partition)


def _warm_up_files(fold: Fold) -> None:
    """Spill, merge, look, and bring back."""
    evicting.count_entries(fold._state.members, 0, 0, np.zeros(0, dtype=np.int32))
    for _ in range(2):
        piece = Piece(fold.coldest(1.0, 0), fold.cell_rows, 1)
        for sizes in fold.set_sizes():
            fold.collect(piece, 0, fold.cell_rows, sizes)
        evicting.copy_entries(
            fold._state.members, 0, 0, piece.set_units, piece.units, piece.records, piece.entry_rows
        )
        fold.add_spilled(_file_of(fold, piece.sorted_records(), piece.record_count, piece.unit_count))
    fold.evict(piece, 0, piece.unit_count)
    files = list(fold.spilled.files)
    records = sum(file.records for file in files)
    fold.replace_spilled(files, _file_of(fold, merged_records(fold.partition, files), records, records))
    state = fold._state
    units.next_unit(state.files, 0, 1, records)
    units.load_unit(
        state.cells, state.table, state.shards, state.members, state.member_table, state.member_shards, state.rows,
        state.counters, state.files, 0, 0, 0, 0, fold.dimensions.combo_count, True, fold._seed,
    )  # fmt: skip


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
    digest = restored.digest()
    assert digest == fold.digest()
    _warm_up_files(fold)
    assert digest == fold.digest()
    fold.period_stats(1, slot, 0)
    fold.day_rows(1, slot, start, end)
    fold.top_period(slot, start, 1)
    place = payload.place_payload(data, 0, len(data), columns)
    assert place == payload.OK
    fold.apply(data, columns, None, 5, 0)  # brings them back
    assert fold.spilled_cell_count == 0
