"""Payloads for tests, in plain Python: an independent second writer of `layout`."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np

from tallymark_protocol import layout, payload

Event = dict[str, Any]


def event(account: int = 1, metric: str = "m", **fields: Any) -> Event:
    """An event as the builder takes it.

    Fields: value (int, 1), time (int ns or None), operation (0), properties (dict of str, {}), id (typed bytes or
    None), text (tagged bytes or None; the value column then holds 0).
    """
    return {
        "account": account,
        "metric": metric,
        "value": 1,
        "time": None,
        "operation": 0,
        "properties": {},
        "id": None,
        "text": None,
        **fields,
    }


def encode_properties(properties: dict[str, str]) -> bytes:
    """A property set: sorted by key bytes."""
    out = b""
    for key, value in sorted((k.encode(), v.encode()) for k, v in properties.items()):
        out += struct.pack("<B", len(key)) + key + struct.pack("<H", len(value)) + value
    return out


def _ends(entries: list[bytes]) -> bytes:
    total = 0
    out = []
    for entry in entries:
        total += len(entry)
        out.append(total)
    return struct.pack(f"<{len(out)}I", *out)


def _column(
    values: list[int], letter: str, absent: int | None, *, plain: bool, constant: bool = True
) -> tuple[int, bytes]:
    if not plain and absent is not None and all(v == absent for v in values):
        return layout.ABSENT, b""
    if not plain and constant and len(set(values)) == 1:
        return layout.CONSTANT, struct.pack(f"<{letter}", values[0])
    return layout.PLAIN, struct.pack(f"<{len(values)}{letter}", *values)


def build_payload(
    events: list[Event],
    chunks: list[tuple[int, int, int, int]] | None = None,
    *,
    plain: bool = False,
    flags: int = 0,
) -> bytes:
    """The payload of these events.

    Args:
        events: from `event`, in order.
        chunks: (producer id, sequence, first_sent_ns, event count) per chunk; one chunk of everything by default.
        plain: never leave a column out or write it as a constant.
        flags: of every chunk.
    """
    n = len(events)
    if chunks is None:
        chunks = [(1, 0, 0, n)]
    assert sum(chunk[3] for chunk in chunks) == n
    codes = list(dict.fromkeys(e["metric"] for e in events))
    sets = list(dict.fromkeys(encode_properties(e["properties"]) for e in events if e["properties"]))
    set_index = {data: i + 1 for i, data in enumerate(sets)}
    values = [0 if e["text"] is not None else e["value"] for e in events]
    times = [layout.TIME_ABSENT if e["time"] is None else e["time"] for e in events]
    properties = [set_index[encode_properties(e["properties"])] if e["properties"] else 0 for e in events]
    indexes = [codes.index(e["metric"]) for e in events]
    ids = [e["id"] or b"" for e in events]
    texts = [e["text"] or b"" for e in events]
    columns = [
        _column([e["account"] for e in events], "Q", None, plain=plain),
        _column(indexes, "H", 0, plain=plain, constant=False),
        _column(values, "q", 1, plain=plain),
        _column(times, "q", layout.TIME_ABSENT, plain=plain),
        _column([e["operation"] for e in events], "B", 0, plain=plain),
        _column(properties, "I", 0, plain=plain),
        (layout.PLAIN, _ends(ids)) if plain or any(ids) else (layout.ABSENT, b""),
        (layout.PLAIN, _ends(texts)) if plain or any(texts) else (layout.ABSENT, b""),
    ]
    encodings = sum(encoding << (4 * i) for i, (encoding, _) in enumerate(columns))
    code_bytes = [code.encode() for code in codes]
    sections = _ends(code_bytes) + b"".join(code_bytes) + _ends(sets) + b"".join(sets)
    sections += b"".join(data for _, data in columns[:6])
    sections += columns[6][1] + b"".join(ids) + columns[7][1] + b"".join(texts)
    table = b"".join(
        layout.CHUNK_ENTRY.pack(producer, sequence, sent, 0, count, flags, 0)
        for producer, sequence, sent, count in chunks
    )
    length = layout.PAYLOAD_HEADER_BYTES + len(table) + len(sections)
    header = layout.PAYLOAD_HEADER.pack(
        layout.PAYLOAD_MAGIC,
        length,
        n,
        len(chunks),
        encodings,
        len(codes),
        0,
        sum(map(len, code_bytes)),
        len(sets),
        sum(map(len, sets)),
        sum(map(len, ids)),
        sum(map(len, texts)),
        0,
    )
    return header + table + sections


def place(data: bytes) -> tuple[Any, Any]:
    """(array, columns) of a payload; asserts that it is a valid one."""
    array = np.frombuffer(data, dtype=np.uint8)
    columns = np.zeros(payload.COLUMNS, dtype=np.int64)
    status = payload.validate_payload(array, 0, len(array), columns)
    assert status == payload.OK, status
    return array, columns
