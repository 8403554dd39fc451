"""The split of a chunk with one event, in plain Python: by what `split` made of such a chunk before.

A caller that sends one event at a time sends chunks that differ in nothing but who sent them, the account, value and
time; and then almost all of what `split` costs is the way to its compiled part and back. `Singles` remembers
**shapes**: all bytes of a chunk that say how it is built (length, counts, encodings, metric code). `split` judged a
chunk of that shape to be well formed, and nothing that a shape leaves open can change that. So a further one becomes
its payload by putting its own bytes into the payload that was made then, which is what `split` gives, byte for byte.

Only plain events have shapes: an account, perhaps a value and a time, and no operation, properties, id or text.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from tallymark_ingest.split import Payload
from tallymark_protocol import layout as lay
from tallymark_protocol.identifiers import partition_of

SHAPES_MAX: Final = 1_024  # remembered; beyond that all are forgotten
_METRIC_BYTES_AT: Final = 48  # where a chunk's header says how long its one metric code is
_SECTIONS: Final = lay.CHUNK_HEADER_BYTES + 4  # behind the header and the end of the one metric code
_NEUTRAL_VALUE: Final = (1).to_bytes(8, "little")
_NEUTRAL_TIME: Final = lay.TIME_ABSENT.to_bytes(8, "little", signed=True)


class _Shape(NamedTuple):
    """How a payload is made of a chunk of this shape."""

    size: int  # of the chunk; what its header says of it is in the key
    head: bytes  # the payload's header
    table: bytes  # the rest of the chunk table's entry, and the metric table
    value_at: int  # where the value is behind the account; 0 for nowhere
    time_at: int  # likewise


class Singles:
    """Splits chunks of known shapes."""

    def __init__(self, partition_count: int) -> None:
        self._partition_count = partition_count
        self._shapes: dict[bytes, _Shape] = {}

    def split(self, body: bytes) -> Payload | None:
        """The payload of a chunk, the same as that of `split`; None where that must be asked.

        Args:
            body: a chunk with the length of a header at least, whose checksum has been checked.
        """
        end = _SECTIONS + int.from_bytes(body[_METRIC_BYTES_AT : _METRIC_BYTES_AT + 4], "little")
        shape = self._shapes.get(body[0:4] + body[8:16] + body[40:end])
        if shape is None or len(body) != shape.size:
            return None
        return self._make(body, body[end:], shape)

    def _make(self, body: bytes, words: bytes, shape: _Shape) -> Payload | None:
        _, head, table, value_at, time_at = shape
        # A value or time that might as well be absent is left out of a payload.
        if value_at and words[value_at : value_at + 8] == _NEUTRAL_VALUE:
            return None
        if time_at and words[time_at : time_at + 8] == _NEUTRAL_TIME:
            return None
        partition = partition_of(int.from_bytes(words[:8], "little"), self._partition_count)
        # The chunk table's entry: producer, sequence, when it was first sent; the chunk's checksum.
        data = b"".join((head, body[16:40], body[4:8], table, words))
        return Payload(partition, data, 1, [0], [1])

    def learn(self, body: bytes, payload: Payload) -> None:
        """Remember the shape of a chunk of which `split` made `payload`, if it has one."""
        header = lay.CHUNK_HEADER.unpack_from(body)
        _, _, _, events, _, _, _, encodings, _, metrics, metric_bytes, sets, _, id_bytes, text_bytes, _ = (
            header
        )
        kinds = [encodings >> 4 * column & 15 for column in range(8)]
        if events != 1 or metrics != 1 or sets or id_bytes or text_bytes:
            return
        if kinds[lay.COLUMN_METRIC] or any(kinds[lay.COLUMN_OPERATION :]):
            return
        value_at = 8 if kinds[lay.COLUMN_VALUE] else 0
        time_at = 8 + value_at if kinds[lay.COLUMN_TIME] else 0
        end = _SECTIONS + metric_bytes
        made = bytes(payload.data)
        table_at = lay.PAYLOAD_HEADER_BYTES + 28
        shape = _Shape(
            len(body),
            made[: lay.PAYLOAD_HEADER_BYTES],
            made[table_at : len(made) - len(body) + end],
            value_at,
            time_at,
        )
        again = self._make(body, body[end:], shape)
        if again is None or again.data != made or again.partition != payload.partition:
            return
        if len(self._shapes) >= SHAPES_MAX:
            self._shapes.clear()
        self._shapes[body[0:4] + body[8:16] + body[40:end]] = shape
