"""Hostile chunks and payloads: validation refuses what is wrong and never reads outside of its bytes.

Chunks and payloads are built here in plain Python from the layout alone. The reads outside are looked for in a
process of its own, where the bytes end at a page that can't be read: one byte too far kills it.
"""

import random
import subprocess
import sys
import uuid
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tallymark_protocol import layout as lay
from tallymark_protocol import limits
from tallymark_protocol import payload as pay
from tallymark_protocol.errors import RemoteProtocolError
from tallymark_protocol.identifiers import decode_event_id, encode_event_id, encode_text


def table(entries, width="<u4"):
    """A table's two parts: where entries end, and their bytes."""
    ends = np.cumsum([len(entry) for entry in entries], dtype=np.int64).astype(width).tobytes()
    return ends, b"".join(entries)


def property_set(properties):
    """A property set's bytes."""
    parts = []
    for key, value in sorted((k.encode(), v.encode()) for k, v in properties.items()):
        parts += [bytes([len(key)]), key, len(value).to_bytes(2, "little"), value]
    return b"".join(parts)


class Sections:
    """The sections of a chunk or payload, by column: None = absent, a tuple of one = constant, a list = plain."""

    def __init__(self, n, **columns):
        self.n = n
        self.metrics = columns.pop("metrics", [b"cpu"])
        self.sets = columns.pop("sets", [])
        self.columns = {"account": (1,)} | columns

    def encode(self):
        """Encodings, sizes (metric, property, id, text bytes) and the bytes."""
        encodings = 0
        metric_ends, metric_bytes = table(self.metrics)
        set_ends, set_bytes = table(self.sets)
        parts = [metric_ends, metric_bytes, set_ends, set_bytes]
        kinds = [
            ("account", "<u8"),
            ("metric", "<u2"),
            ("value", "<i8"),
            ("time", "<i8"),
            ("operation", "u1"),
            ("properties", "<u4"),
        ]
        for number, (name, kind) in enumerate(kinds):
            column = self.columns.get(name)
            if column is not None:
                encodings |= (lay.PLAIN if isinstance(column, list) else lay.CONSTANT) << (4 * number)
                parts.append(np.array(column, dtype=kind).tobytes())
        sizes = [len(metric_bytes), len(set_bytes)]
        for number, name in ((lay.COLUMN_ID, "id"), (lay.COLUMN_TEXT, "text")):
            column = self.columns.get(name)
            ends, content = table(column) if column is not None else (b"", b"")
            if column is not None:
                encodings |= lay.PLAIN << (4 * number)
            parts += [ends, content]
            sizes.append(len(content))
        return encodings, sizes, b"".join(parts)


def chunk(sections):
    """A chunk's bytes; its checksum is not the validator's to check."""
    encodings, sizes, body = sections.encode()
    header = lay.CHUNK_HEADER.pack(
        lay.CHUNK_MAGIC,
        0,
        lay.CHUNK_HEADER_BYTES + len(body),
        sections.n,
        7,
        1,
        1_700_000_000_000_000_000,
        encodings,
        0,
        len(sections.metrics),
        sizes[0],
        len(sections.sets),
        *sizes[1:],
        0,
    )
    return header + body


def payload(sections, counts):
    """A payload's bytes, of chunks with `counts` events."""
    encodings, sizes, body = sections.encode()
    entries = b"".join(lay.CHUNK_ENTRY.pack(7, i, 1_700, 0, count, 0, 0) for i, count in enumerate(counts))
    header = lay.PAYLOAD_HEADER.pack(
        lay.PAYLOAD_MAGIC,
        lay.PAYLOAD_HEADER_BYTES + len(entries) + len(body),
        sections.n,
        len(counts),
        encodings,
        len(sections.metrics),
        0,
        sizes[0],
        len(sections.sets),
        *sizes[1:],
        0,
    )
    return header + entries + body


def random_sections(rng):
    """Valid sections with every kind of column."""
    n = rng.choice([1, 2, 3, 10, 50])
    metrics = [
        bytes(rng.choices(b"abcXYZ059_.:-", k=rng.choice([1, 5, 64]))) for _ in range(rng.randint(1, 4))
    ]
    texts = ["", "a", "aws", "gcp", "é" * 20, "日本", "😀", "x" * 1_000]
    sets = [
        property_set({rng.choice(["k", "provider", "région"]) + str(i): rng.choice(texts) for i in range(m)})
        for m in rng.choices([1, 2, 5], k=rng.randint(0, min(3, n)))
    ]
    ids = ["job-1", "ü", b"\xff\x00", uuid.UUID(int=5), 0, -1, 127, 128, -129, 2**64, "x" * 255]
    some_ids = [b"" if rng.random() < 0.3 else encode_event_id(rng.choice(ids)) for _ in range(n)]
    some_texts = [
        rng.choice([b"", encode_text(rng.choice(texts)), b"\x02" + (2**63 + i).to_bytes(8, "little")])
        for i in range(n)
    ]

    def column(make, *, constant=True, absent=True):
        choices = ["plain"] + ["constant"] * constant + ["absent"] * absent
        match rng.choice(choices):
            case "plain":
                return [make() for _ in range(n)]
            case "constant":
                return (make(),)
        return None

    return Sections(
        n,
        metrics=metrics,
        sets=sets,
        account=column(lambda: rng.getrandbits(64), absent=False),
        metric=column(lambda: rng.randrange(len(metrics)), constant=False),
        value=column(lambda: rng.randint(limits.VALUE_MIN, limits.VALUE_MAX)),
        time=column(lambda: rng.choice([lay.TIME_ABSENT, 0, 1_700_000_000_000_000_000])),
        operation=column(lambda: rng.randrange(256)),
        properties=column(lambda: rng.randint(0, len(sets))),
        id=rng.choice([None, some_ids]),
        text=rng.choice([None, some_texts]),
    )


def random_valid(rng):
    """A valid chunk or payload, and what validates it."""
    sections = random_sections(rng)
    if rng.random() < 0.5:
        return chunk(sections), pay.validate_chunk
    cuts = sorted(rng.sample(range(1, sections.n), k=rng.randint(0, min(3, sections.n - 1))))
    counts = [b - a for a, b in zip([0, *cuts], [*cuts, sections.n], strict=True)]
    return payload(sections, counts), pay.validate_payload


def mutate(rng, data):
    """Flip, overwrite, cut or extend; announced lengths are mended half of the time, to get further in."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(changed)) if rng.random() < 0.5 else rng.randrange(min(len(changed), 160))
        match rng.randrange(6):
            case 0:
                changed[at] ^= 1 << rng.randrange(8)
            case 1:
                changed[at] = rng.choice([0, 1, 2, 0x7F, 0x80, 0xFF])
            case 2:
                at &= ~3
                changed[at : at + 4] = rng.choice([0, 1, 0x7FFFFFFF, 0xFFFFFFFF, len(data)]).to_bytes(
                    4, "little"
                )
            case 3:
                del changed[at : at + rng.randint(1, 12)]
            case 4:
                changed[at:at] = rng.randbytes(rng.randint(1, 12))
            case _:
                other = rng.randrange(len(changed))
                changed[at : at + 4] = changed[other : other + 4]
        if not changed:
            changed = bytearray(1)
    if rng.random() < 0.5 and len(changed) >= 12:
        at = 8 if changed[:4] == b"TMC1" else 4
        changed[at : at + 4] = len(changed).to_bytes(4, "little")
    return bytes(changed)


def validate(data, validator, *, before=0, after=0):
    """The status and columns for bytes that lie inside of a larger buffer."""
    buffer = np.frombuffer(b"\xaa" * before + data + b"\xaa" * after, dtype=np.uint8).copy()
    columns = np.full(pay.COLUMNS, -1, dtype=np.int64)
    return validator(buffer, before, len(data), columns), columns, buffer


def table_entries(buffer, ends, content, count):
    """A table's entries, read in plain Python."""
    found = buffer[ends : ends + 4 * count].view("<u4").tolist()
    raw = buffer[content : content + (found[-1] if found else 0)].tobytes()
    starts = [0, *found][: len(found)]
    return [raw[a:b] for a, b in zip(starts, found, strict=True)]


def check_accepted(buffer, columns, data, before):
    """What was accepted must be readable without a doubt, by the naive reader too."""
    n = int(columns[pay.C_EVENTS])
    assert columns[pay.C_END] == before + len(data)
    for name in pay.metric_codes(buffer, columns):
        assert 1 <= len(name) <= limits.METRIC_CODE_BYTES_MAX
    sets = table_entries(
        buffer, columns[pay.C_PROPERTY_ENDS], columns[pay.C_PROPERTY_BYTES], int(columns[pay.C_PROPERTY_SETS])
    )
    for entry in sets:
        position = 0
        keys = []
        while position < len(entry):
            key_end = position + 1 + entry[position]
            value_end = key_end + 2 + int.from_bytes(entry[key_end : key_end + 2], "little")
            keys.append(entry[position + 1 : key_end])
            keys[-1].decode()
            entry[key_end + 2 : value_end].decode()
            position = value_end
        assert position == len(entry)
        assert keys == sorted(set(keys))
    for i in range(n):
        assert 0 <= pay.metric_at(buffer, columns, i) < columns[pay.C_METRICS]
        assert 0 <= pay.properties_at(buffer, columns, i) <= len(sets)
    if columns[pay.C_ID_ENCODING] == lay.PLAIN:
        for entry in table_entries(buffer, columns[pay.C_ID_ENDS], columns[pay.C_ID_BYTES], n):
            if entry:
                assert encode_event_id(decode_event_id(entry)) == entry
    if columns[pay.C_TEXT_ENCODING] == lay.PLAIN:
        for entry in table_entries(buffer, columns[pay.C_TEXT_ENDS], columns[pay.C_TEXT_BYTES], n):
            if entry[:1] == b"\x01":
                assert encode_text(entry[1:].decode()) == entry
            elif entry:
                assert entry[0] == 2
                assert int.from_bytes(entry[1:], "little") >= 2**63
                assert len(entry) == 9


# ---------------------------------------------------------------- in this process


def test_valid_chunks_and_payloads_are_accepted():
    """The builder here and the validator agree, wherever the bytes lie."""
    rng = random.Random(1)
    for _ in range(300):
        data, validator = random_valid(rng)
        before = rng.choice([0, 1, 7, 100])
        status, columns, buffer = validate(data, validator, before=before, after=rng.choice([0, 5]))
        assert status == pay.OK
        check_accepted(buffer, columns, data, before)


def test_mutated_bytes_are_refused_or_readable():
    """A status that has a sentence, or columns that a naive reader can follow to the end."""
    rng = random.Random(2)
    statuses = set()
    for _ in range(3_000):
        data, validator = random_valid(rng)
        data = mutate(rng, data)
        status, columns, buffer = validate(data, validator, before=3, after=4)
        statuses.add(int(status))
        if status == pay.OK:
            check_accepted(buffer, columns, data, 3)
        else:
            assert isinstance(pay.explain(status, "chunk"), RemoteProtocolError)
    assert statuses == set(range(pay.BAD_CHUNK_TABLE + 1)), "every refusal has been met"


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300), st.sampled_from([b"", b"TMC1", b"TMP1"]))
def test_random_bytes_are_refused(data, magic):
    """Random bytes are no chunk."""
    for validator in (pay.validate_chunk, pay.validate_payload):
        status, _, _ = validate(magic + data, validator)
        assert status != pay.OK


def test_a_length_beyond_the_buffer_is_refused():
    """Also when the caller gets it wrong."""
    data = chunk(Sections(1))
    columns = np.zeros(pay.COLUMNS, dtype=np.int64)
    buffer = np.frombuffer(data, dtype=np.uint8).copy()
    for base, length in ((1, len(data)), (0, len(data) + 1), (-1, len(data)), (2**40, len(data))):
        assert pay.validate_chunk(buffer, base, length, columns) == pay.BAD_LENGTH
        assert pay.validate_payload(buffer, base, length, columns) == pay.BAD_LENGTH


@pytest.mark.parametrize(
    ("entry", "status"),
    [
        (b"\x01" + "é😀".encode(), pay.OK),
        (b"\x01\xff", pay.BAD_ID),
        (b"\x01\xc0\x80", pay.BAD_ID),  # overlong
        (b"\x01\xe0\x80\x80", pay.BAD_ID),
        (b"\x01\xf0\x80\x80\x80", pay.BAD_ID),
        (b"\x01\xed\xa0\x80", pay.BAD_ID),  # a surrogate
        (b"\x01\xf4\x90\x80\x80", pay.BAD_ID),  # above U+10FFFF
        (b"\x01\xf4\x8f\xbf\xbf", pay.OK),
        (b"\x01abcdefg\xc3", pay.BAD_ID),  # cut off
        (b"\x01abcdefghijk\xe2\x82", pay.BAD_ID),
        (b"\x01", pay.BAD_ID),
        (b"\x02\xff", pay.OK),
        (b"\x03" + bytes(16), pay.OK),
        (b"\x03" + bytes(15), pay.BAD_ID),
        (b"\x03" + bytes(17), pay.BAD_ID),
        (b"\x04\x00", pay.OK),
        (b"\x04\x80\x00", pay.OK),
        (b"\x04\x7f\x00", pay.BAD_ID),
        (b"\x04\xff\xff", pay.BAD_ID),
        (b"\x04\x7f\xff", pay.OK),
        (b"\x05x", pay.BAD_ID),
        (b"\x00x", pay.BAD_ID),
        (b"\x02" + bytes(255), pay.OK),
        (b"\x02" + bytes(256), pay.BAD_ID),
    ],
)
def test_event_ids_have_one_form(entry, status):
    """What `encode_event_id` wouldn't write would be a second id for the same thing."""
    assert validate(chunk(Sections(2, id=[b"", entry])), pay.validate_chunk)[0] == status
    assert validate(chunk(Sections(2, id=[entry, b""])), pay.validate_chunk)[0] == status


@pytest.mark.parametrize(
    ("entry", "status"),
    [
        (b"\x01", pay.OK),
        (b"\x01" + "日本".encode(), pay.OK),
        (b"\x01\x80", pay.BAD_TEXT),
        (b"\x02" + (2**63).to_bytes(8, "little"), pay.OK),
        (b"\x02" + (2**63 - 1).to_bytes(8, "little"), pay.BAD_TEXT),  # belongs into the value column
        (b"\x02\xff", pay.BAD_TEXT),  # reading 8 bytes of it would read beyond it
        (b"\x02" + b"\xff" * 9, pay.BAD_TEXT),
        (b"\x02", pay.BAD_TEXT),
        (b"\x03" + bytes(16), pay.BAD_TEXT),
        (b"\x01" + bytes(limits.VALUE_TEXT_BYTES_MAX - 1), pay.OK),
        (b"\x01" + bytes(limits.VALUE_TEXT_BYTES_MAX), pay.BAD_TEXT),
    ],
)
def test_texts_have_one_form(entry, status):
    """Tag 1 and UTF-8, or tag 2 and a large u64."""
    assert validate(chunk(Sections(2, text=[b"", entry])), pay.validate_chunk)[0] == status


@pytest.mark.parametrize(
    ("entry", "status"),
    [
        (property_set({"a": "1", "b": "2"}), pay.OK),
        (property_set({"é": "ü"}), pay.OK),
        (b"\x01b\x01\x002\x01a\x01\x001", pay.BAD_PROPERTY_TABLE),  # not sorted
        (b"\x01a\x01\x001\x01a\x01\x001", pay.BAD_PROPERTY_TABLE),  # a key twice
        (b"\x00\x01\x001", pay.BAD_PROPERTY_TABLE),  # an empty key
        (b"\x01a\x02\x001", pay.BAD_PROPERTY_TABLE),  # cut off
        (b"\x01a\x01", pay.BAD_PROPERTY_TABLE),
        (b"\x01", pay.BAD_PROPERTY_TABLE),
        (b"\x01\xff\x01\x001", pay.BAD_PROPERTY_TABLE),
        (b"\x01a\x01\x00\xff", pay.BAD_PROPERTY_TABLE),
        (b"\x01a\x00\x00", pay.OK),  # an empty value
        (b"\x01a\x00\x04" + bytes(1_024), pay.OK),
        (b"\x01a\x01\x04" + bytes(1_025), pay.BAD_PROPERTY_TABLE),
        (b"\x80" + b"k" * 128 + b"\x00\x00", pay.OK),
        (b"\x81" + b"k" * 129 + b"\x00\x00", pay.BAD_PROPERTY_TABLE),
    ],
)
def test_property_sets_have_one_form(entry, status):
    """Sorted, each key once, UTF-8, within the limits."""
    assert validate(chunk(Sections(1, sets=[entry], properties=(1,))), pay.validate_chunk)[0] == status


@pytest.mark.parametrize(
    ("sections", "status"),
    [
        (Sections(1, metrics=[]), pay.BAD_COUNT),
        (Sections(1, metrics=[b""]), pay.BAD_METRIC_TABLE),
        (Sections(1, metrics=[b"x" * 65]), pay.BAD_METRIC_TABLE),
        (Sections(1, metrics=[b"caf\xc3\xa9"]), pay.BAD_METRIC_TABLE),
        (Sections(1, metrics=[b"a b"]), pay.BAD_METRIC_TABLE),
        (Sections(2, metric=[0, 1]), pay.BAD_METRIC_INDEX),
        (Sections(1, properties=(1,)), pay.BAD_PROPERTY_INDEX),
        (Sections(2, sets=[property_set({"a": "b"})], properties=[1, 2]), pay.BAD_PROPERTY_INDEX),
        (Sections(1, sets=[property_set({"a": str(i)}) for i in range(2)]), pay.BAD_COUNT),
        (Sections(0), pay.BAD_COUNT),
        (Sections(1, account=None), pay.BAD_ENCODING),
        (Sections(1, metric=(0,)), pay.BAD_ENCODING),
    ],
)
def test_malformed_sections_are_refused(sections, status):
    """Each with the status that names what is wrong."""
    assert validate(chunk(sections), pay.validate_chunk)[0] == status
    if sections.n:
        assert validate(payload(sections, [sections.n]), pay.validate_payload)[0] == status


@pytest.mark.parametrize("counts", [[1], [3], [2, 0], [1, 2], [2**32 - 1, 3], []])
def test_chunk_tables_must_add_up(counts):
    """To exactly the events that are there, with none empty."""
    data = payload(Sections(2), counts)
    assert validate(data, pay.validate_payload)[0] in (pay.BAD_CHUNK_TABLE, pay.BAD_COUNT)
    assert validate(payload(Sections(2), [1, 1]), pay.validate_payload)[0] == pay.OK


# ---------------------------------------------------------------- beside a page that can't be read


def test_nothing_is_read_outside_of_the_bytes():
    """Bytes that end, or begin, at an unreadable page: any read beyond them would kill the process."""
    result = subprocess.run(
        [sys.executable, str(Path(__file__))], capture_output=True, text=True, timeout=240, check=False
    )
    assert result.returncode == 0, result.stderr[-2_000:]
    assert result.stdout.startswith("accepted ")
    assert int(result.stdout.split()[1]) > 100


def _fuzz_beside_a_guard():
    import ctypes
    import mmap

    page = mmap.PAGESIZE
    pages = 64
    area = mmap.mmap(-1, (pages + 2) * page)
    whole = np.frombuffer(area, dtype=np.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    for guard in (0, pages + 1):
        if libc.mprotect(ctypes.c_void_p(whole.ctypes.data + guard * page), page, 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    room = whole[page : (pages + 1) * page]
    columns = np.zeros(pay.COLUMNS, dtype=np.int64)
    rng = random.Random(3)
    accepted = 0
    for round_number in range(3_000):
        data, validator = random_valid(rng)
        if round_number % 8:
            data = mutate(rng, data)
        if len(data) > room.size:
            continue
        view = room[room.size - len(data) :] if round_number % 4 else room[: len(data)]
        view[:] = np.frombuffer(data, dtype=np.uint8)
        status = validator(view, 0, len(data), columns)
        if status == pay.OK:
            accepted += 1
            for i in range(int(columns[pay.C_EVENTS])):
                pay.account_at(view, columns, i)
                pay.metric_at(view, columns, i)
                pay.value_at(view, columns, i)
                pay.time_at(view, columns, i)
                pay.operation_at(view, columns, i)
                pay.properties_at(view, columns, i)
    print("accepted", accepted)


if __name__ == "__main__":
    _fuzz_beside_a_guard()
