"""The fold alone: time per event, and memory per cell."""

from __future__ import annotations

import time

import numpy as np
import numpy.typing as npt

from tallymark_node.bench.scenarios import Figure, Ints
from tallymark_protocol import layout as lay
from tallymark_protocol.model import AggType, MetricSchema
from tallymark_protocol.payload import COLUMNS, OK, place_payload
from tallymark_protocol.schema import make_record
from tallymark_store.fold import Fold

_BATCH = 10_000
_NOW_NS = 1_750_000_000 * 10**9


def _payload(accounts: Ints, values: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
    """A payload of one chunk: the sections of a client's chunk behind a payload's header."""
    n = len(accounts)
    entry = lay.CHUNK_ENTRY.pack(1, 1, _NOW_NS, 0, n, 0, 0)
    code = b"usage"
    sections = (
        len(code).to_bytes(4, "little")
        + code
        + accounts.astype("<u8").tobytes()
        + values.astype("<i8").tobytes()
    )
    encodings = lay.PLAIN << (4 * lay.COLUMN_ACCOUNT) | lay.PLAIN << (4 * lay.COLUMN_VALUE)
    length = lay.PAYLOAD_HEADER_BYTES + len(entry) + len(sections)
    header = lay.PAYLOAD_HEADER.pack(
        lay.PAYLOAD_MAGIC, length, n, 1, encodings, 1, 0, len(code), 0, 0, 0, 0, 0
    )
    return np.frombuffer(header + entry + sections, dtype=np.uint8)


def measure(accounts: int) -> list[Figure]:
    """Fold a few million events, few accounts first, then many at random."""
    figures = []
    rng = np.random.default_rng(5)
    for count, wanted in ((10_000, "<= 40 ns"), (accounts, "<= 200 ns")):
        fold = Fold(0)
        fold.put_schema(make_record(1, MetricSchema(code="usage", agg_type=AggType.SUM)), 0)
        fold.advance(1)
        columns = np.zeros(COLUMNS, dtype=np.int64)
        order = [np.arange(i, min(i + _BATCH, count), dtype=np.uint64) for i in range(0, count, _BATCH)]
        random = [rng.integers(0, count, _BATCH, dtype=np.uint64) for _ in range(300)]
        batches = [
            _payload(chosen, rng.integers(1, 100, len(chosen), dtype=np.int64))
            for chosen in [*order, *random]
        ]
        offset = 1
        begun = time.perf_counter()
        for number, data in enumerate(batches):
            if number == len(order):
                begun = time.perf_counter()
            status = place_payload(data, 0, len(data), columns)
            assert status == OK, "the payload is well formed"
            fold.apply(data, columns, None, offset, _NOW_NS)
            offset += int(columns[0])
            fold.advance(offset)
        taken = time.perf_counter() - begun
        figures.append(
            Figure(
                name=f"fold, {count:,} accounts (period cell and day cell each)",
                figure=f"{taken / (len(random) * _BATCH) * 1e9:.0f} ns/event",
                wanted=wanted,
                batch=str(_BATCH),
                memory=f"{fold.memory_bytes() / fold.cell_count:.0f} B/cell",
                note="memory per cell <= 128 B wanted",
            )
        )
    return figures
