"""Builds event-batch bodies for scan tests: every encoding that a column can have, chosen by what fits."""

from __future__ import annotations

import struct
from typing import Any

import google_crc32c
import numpy as np

from tallymark_protocol import layout as lay
from tallymark_store import batch


def encode_properties(properties: dict[str, str]) -> bytes:
    out = b""
    for key, value in sorted((k.encode(), v.encode()) for k, v in properties.items()):
        out += bytes([len(key)]) + key + struct.pack("<H", len(value)) + value
    return out


def build_payload(events: list[dict[str, Any]], *, repeat_codes: bool = False) -> bytes:
    """Events: account, code, value (int or bytes: a text), time (None: absent), op, properties, id (bytes)."""
    n = len(events)
    codes: list[str] = []
    indexes = []
    for i, event in enumerate(events):
        if event["code"] not in codes or (repeat_codes and i % 3 == 0):
            codes.append(event["code"])
        indexes.append(len(codes) - 1 - codes[::-1].index(event["code"]))
    sets: list[bytes] = []
    set_indexes = []
    for event in events:
        encoded = encode_properties(event.get("properties") or {})
        if not encoded:
            set_indexes.append(0)
            continue
        if encoded not in sets:
            sets.append(encoded)
        set_indexes.append(sets.index(encoded) + 1)
    encodings = 0
    sections = b""

    def column(number: int, values: list[int], form: str, absent: int | None) -> None:
        nonlocal encodings, sections
        if absent is not None and all(value == absent for value in values):
            return
        if number != lay.COLUMN_METRIC and all(value == values[0] for value in values):
            encodings |= lay.CONSTANT << (4 * number)
            sections += struct.pack("<" + form, values[0])
            return
        encodings |= lay.PLAIN << (4 * number)
        sections += struct.pack(f"<{n}{form}", *values)

    def ends(parts: list[bytes]) -> bytes:
        return np.cumsum([len(part) for part in parts]).astype("<u4").tobytes()

    texts = [event["value"] if isinstance(event["value"], bytes) else b"" for event in events]
    ids = [event.get("id") or b"" for event in events]
    times = [lay.TIME_ABSENT if event.get("time") is None else event["time"] for event in events]
    column(lay.COLUMN_ACCOUNT, [event["account"] for event in events], "Q", None)
    column(lay.COLUMN_METRIC, indexes, "H", 0)
    values = [0 if isinstance(event["value"], bytes) else event["value"] for event in events]
    column(lay.COLUMN_VALUE, values, "q", 1)
    column(lay.COLUMN_TIME, times, "q", lay.TIME_ABSENT)
    column(lay.COLUMN_OPERATION, [event.get("op", 0) for event in events], "B", 0)
    column(lay.COLUMN_PROPERTIES, set_indexes, "I", 0)
    if any(ids):
        encodings |= lay.PLAIN << (4 * lay.COLUMN_ID)
        sections += ends(ids) + b"".join(ids)
    if any(texts):
        encodings |= lay.PLAIN << (4 * lay.COLUMN_TEXT)
        sections += ends(texts) + b"".join(texts)
    tables = ends([code.encode() for code in codes]) + "".join(codes).encode()
    tables += (ends(sets) if sets else b"") + b"".join(sets)
    chunk = lay.CHUNK_ENTRY.pack(1, 1, 0, 0, n, 0, 0)
    length = lay.PAYLOAD_HEADER_BYTES + len(chunk) + len(tables) + len(sections)
    header = lay.PAYLOAD_HEADER.pack(
        lay.PAYLOAD_MAGIC,
        length,
        n,
        1,
        encodings,
        len(codes),
        0,
        len("".join(codes)),
        len(sets),
        len(b"".join(sets)),
        len(b"".join(ids)),
        len(b"".join(texts)),
        0,
    )
    return header + chunk + tables + sections


def build_body(events: list[dict[str, Any]], verdicts: list[int] | None = None, **kwargs: Any) -> bytes:
    payload = build_payload(events, **kwargs)
    column = None
    originals = None
    if verdicts is not None and any(verdicts):
        column = np.array(verdicts, np.uint8)
        originals = np.arange(sum(v in (1, 2) for v in verdicts), dtype=np.int64)
    return batch.encode_prefix(google_crc32c.value(payload), len(events), column, originals) + payload


def event_times(events: list[dict[str, Any]], append_ns: int) -> list[int]:
    return [append_ns if event.get("time") is None else event["time"] for event in events]
