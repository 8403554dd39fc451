"""Plain-Python chunks and payloads for the gateway's tests: an encoder for chunks, a decoder for both."""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

import google_crc32c

from tallymark_protocol import layout as lay


class Ev(NamedTuple):
    """One event, as the layout holds it."""

    account: int = 0
    metric: bytes = b"m"
    value: int = 1
    time: int = lay.TIME_ABSENT
    operation: int = 0
    properties: bytes = b""
    id: bytes = b""
    text: bytes = b""


def _table(entries: list[bytes]) -> tuple[bytes, int]:
    ends, end = [], 0
    for entry in entries:
        end += len(entry)
        ends.append(end)
    return struct.pack(f"<{len(ends)}I", *ends) + b"".join(entries), end


def _column(values: list[int], neutral: int | None, code: str, *, plain: bool) -> tuple[int, bytes]:
    if not plain and neutral is not None and set(values) == {neutral}:
        return lay.ABSENT, b""
    if not plain and len(set(values)) == 1:
        return lay.CONSTANT, struct.pack("<" + code, values[0])
    return lay.PLAIN, struct.pack(f"<{len(values)}{code}", *values)


def encode_chunk(
    events: list[Ev],
    *,
    producer: int = 1,
    sequence: int = 1,
    first_sent_ns: int = 5,
    flags: int = 0,
    plain: bool = False,
    dedup_sets: bool = True,
) -> bytes:
    """The chunk of some events; with `plain` every column is spelled out."""
    codes = list(dict.fromkeys(event.metric for event in events))
    sets = [event.properties for event in events if event.properties]
    if dedup_sets:
        sets = list(dict.fromkeys(sets))
    taken = iter(range(1, len(sets) + 1))
    indexes = [
        0 if not e.properties else sets.index(e.properties) + 1 if dedup_sets else next(taken) for e in events
    ]
    metric_table, metric_bytes = _table(codes)
    set_table, set_bytes = _table(sets)
    columns = [
        _column([e.account for e in events], None, "Q", plain=plain),
        (lay.ABSENT, b"")
        if len(codes) == 1 and not plain
        else (lay.PLAIN, struct.pack(f"<{len(events)}H", *[codes.index(e.metric) for e in events])),
        _column([e.value for e in events], 1, "q", plain=plain),
        _column([e.time for e in events], lay.TIME_ABSENT, "q", plain=plain),
        _column([e.operation for e in events], 0, "B", plain=plain),
        _column(indexes, 0, "I", plain=plain),
    ]
    id_bytes = text_bytes = 0
    for name in ("id", "text"):
        content = [getattr(e, name) for e in events]
        if any(content) or plain:
            table, size = _table(content)
            columns.append((lay.PLAIN, table))
        else:
            size = 0
            columns.append((lay.ABSENT, b""))
        if name == "id":
            id_bytes = size
        else:
            text_bytes = size
    encodings = sum(encoding << (4 * k) for k, (encoding, _) in enumerate(columns))
    body = metric_table + set_table + b"".join(data for _, data in columns)
    rest = lay.CHUNK_HEADER.pack(
        lay.CHUNK_MAGIC, 0, lay.CHUNK_HEADER_BYTES + len(body), len(events), producer, sequence, first_sent_ns,
        encodings, flags, len(codes), metric_bytes, len(sets), set_bytes, id_bytes, text_bytes, 0,
    )[8:] + body  # fmt: skip
    return struct.pack("<II", lay.CHUNK_MAGIC, google_crc32c.value(rest)) + rest


class Entry(NamedTuple):
    """A chunk table entry of a payload."""

    producer: int
    sequence: int
    first_sent_ns: int
    checksum: int
    count: int
    flags: int


class Decoded(NamedTuple):
    """A payload, taken apart."""

    entries: list[Entry]
    events: list[Ev]
    encodings: tuple[int, ...]
    codes: list[bytes]
    sets: list[bytes]


def decode_payload(data: bytes) -> Decoded:
    """Take a payload apart by the layout's text alone."""
    (
        magic,
        length,
        n,
        chunks,
        encodings,
        metrics,
        _,
        metric_bytes,
        sets,
        set_bytes,
        id_bytes,
        text_bytes,
        _,
    ) = lay.PAYLOAD_HEADER.unpack_from(data)
    assert magic == lay.PAYLOAD_MAGIC
    assert length == len(data)
    at = lay.PAYLOAD_HEADER_BYTES
    entries = []
    for _ in range(chunks):
        entries.append(Entry(*lay.CHUNK_ENTRY.unpack_from(data, at)[:6]))
        at += lay.CHUNK_ENTRY_BYTES

    def table(count: int, size: int) -> list[bytes]:
        nonlocal at
        ends = struct.unpack_from(f"<{count}I", data, at)
        at += 4 * count
        content = data[at : at + size]
        at += size
        return [content[a:b] for a, b in zip((0, *ends[:-1]), ends, strict=True)] if count else []

    codes = table(metrics, metric_bytes)
    set_table = table(sets, set_bytes)
    kinds = tuple((encodings >> (4 * k)) & 15 for k in range(8))

    def column(number: int, code: str, neutral: Any) -> list[Any]:
        nonlocal at
        size = struct.calcsize("<" + code)
        if kinds[number] == lay.ABSENT:
            return [neutral] * n
        if kinds[number] == lay.CONSTANT:
            at += size
            return [struct.unpack_from("<" + code, data, at - size)[0]] * n
        at += size * n
        return list(struct.unpack_from(f"<{n}{code}", data, at - size * n))

    accounts = column(0, "Q", None)
    metric = column(1, "H", 0)
    values = column(2, "q", 1)
    times = column(3, "q", lay.TIME_ABSENT)
    operations = column(4, "B", 0)
    properties = column(5, "I", 0)
    ids = table(n, id_bytes) if kinds[6] else [b""] * n
    texts = table(n, text_bytes) if kinds[7] else [b""] * n
    assert at == len(data)
    events = [
        Ev(
            accounts[i],
            codes[metric[i]],
            values[i],
            times[i],
            operations[i],
            set_table[properties[i] - 1] if properties[i] else b"",
            ids[i],
            texts[i],
        )
        for i in range(n)
    ]
    return Decoded(entries, events, kinds, codes, set_table)


def property_set(**values: str) -> bytes:
    """The canonical bytes of a property set."""
    out = b""
    for key, value in sorted((k.encode(), v.encode()) for k, v in values.items()):
        out += bytes([len(key)]) + key + struct.pack("<H", len(value)) + value
    return out
