"""The byte layouts of chunks and payloads: constants shared by the encoder, the kernels and the docs.

A **chunk** is what a client sends: one call's events as columns. The gateway splits chunks by partition and
joins what many callers sent into one **payload** per partition; the payload's bytes then travel unchanged to
the log, to followers and to disk. Both carry the same *sections*; only their headers differ. Everything is
little-endian and nothing is aligned or padded.

Chunk header (72 bytes)::

    0   u32  magic "TMC1"          40  u32  encodings, 4 bits a column, account lowest
    4   u32  CRC-32C of [8, end)   44  u16  flags: 1 = ASYNC
    8   u32  length, whole chunk   46  u16  metric_count
    12  u32  event_count           48  u32  metric_bytes
    16  u64  producer_id           52  u32  property_count
    24  u64  sequence              56  u32  property_bytes
    32  i64  first_sent_ns         60  u32  id_bytes
                                   64  u32  text_bytes
                                   68  u32  0

Payload header (48 bytes), then the chunk table::

    0   u32  magic "TMP1"          20  u16  metric_count, u16 0
    4   u32  length, whole payload 24  u32  metric_bytes
    8   u32  event_count           28  u32  property_count
    12  u32  chunk_count           32  u32  property_bytes
    16  u32  encodings             36  u32  id_bytes
                                   40  u32  text_bytes
                                   44  u32  0

Chunk table entry (40 bytes)::

    0  u64 producer_id   8  u64 sequence   16  i64 first_sent_ns
    24 u32 checksum of the client's chunk  28  u32 event_count  32 u32 flags  36 u32 0

The events of a payload are in the order of its chunk table, each chunk's in the order in which they stood in
the client's chunk.

Sections, in this order (n = event_count)::

    metric table     u32 end[metric_count]    then metric_bytes of ASCII codes
    property table   u32 end[property_count]  then property_bytes of property sets
    account          constant: u64            plain: u64[n]
    metric           absent: index 0          plain: u16[n], index into the metric table
    value            absent: 1                constant: i64    plain: i64[n]
    time             absent: append time      constant: i64    plain: i64[n], TIME_ABSENT = append time
    operation        absent: NONE             constant: u8     plain: u8[n]
    properties       absent: none             constant: u32    plain: u32[n], 0 = none, k = set k-1
    id               absent: none             plain: u32 end[n] then id_bytes; empty = none
    text             absent: none             plain: u32 end[n] then text_bytes; empty = none

`end[i]` is where entry i ends, counted from the start of the bytes that follow; it begins at end[i-1] (or 0).

A property set is its properties sorted by key bytes, each key once:
`u8 key_length, key, u16 value_length, value` (UTF-8). Equal sets have equal bytes. An id is in the typed
canonical form of `identifiers.encode_event_id`. A text is a value that the value column cannot hold: tag 1 and
UTF-8 (the string of a COUNT_UNIQUE STRING event, `identifiers.encode_text`), or tag 2 and a u64 of at least
2^63 (a COUNT_UNIQUE UINT64 event). Where an event has a text, its value column holds 0.
"""

import struct

CHUNK_MAGIC = int.from_bytes(b"TMC1", "little")
PAYLOAD_MAGIC = int.from_bytes(b"TMP1", "little")

CHUNK_HEADER = struct.Struct("<IIIIQQqIHHIIIIII")
CHUNK_HEADER_BYTES = 72
PAYLOAD_HEADER = struct.Struct("<IIIIIHHIIIIII")
PAYLOAD_HEADER_BYTES = 48
CHUNK_ENTRY = struct.Struct("<QQqIIII")
CHUNK_ENTRY_BYTES = 40

FLAG_ASYNC = 1

ABSENT = 0
CONSTANT = 1
PLAIN = 2

# Column numbers: the nibble of `encodings` that holds the column's encoding.
COLUMN_ACCOUNT = 0
COLUMN_METRIC = 1
COLUMN_VALUE = 2
COLUMN_TIME = 3
COLUMN_OPERATION = 4
COLUMN_PROPERTIES = 5
COLUMN_ID = 6
COLUMN_TEXT = 7

TIME_ABSENT = -(2**63)

assert CHUNK_HEADER.size == CHUNK_HEADER_BYTES
assert PAYLOAD_HEADER.size == PAYLOAD_HEADER_BYTES
assert CHUNK_ENTRY.size == CHUNK_ENTRY_BYTES
