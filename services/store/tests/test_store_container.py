"""Files of named arrays: what goes in comes out, and nothing damaged does."""

from __future__ import annotations

import google_crc32c
import msgspec
import numpy as np
import pytest

from tallymark_store import container
from tallymark_store.dedup.index import ENTRY_DTYPE

PARTS: dict[str, container.Part] = {
    "bytes": b"some bytes",
    "nothing": b"",
    "table": np.arange(12, dtype=np.int64).reshape(3, 4),
    "empty": np.zeros((0, 8), dtype=np.int64),
    "records": np.array([(1, 2, 3, 4), (2**64 - 1, 6, 7, -8)], dtype=ENTRY_DTYPE),
    "strided": np.arange(10, dtype=np.uint32)[::3],
    "flags": np.array([True, False]),
}


def encoded(parts: dict[str, container.Part] = PARTS) -> np.ndarray:
    return np.frombuffer(b"".join(bytes(part) for part in container.encode(parts)), dtype=np.uint8)


def test_parts_come_back_as_they_were() -> None:
    """Values, types and shapes; arrays can be written to."""
    found = container.decode(encoded())
    assert list(found) == list(PARTS)
    for name, part in PARTS.items():
        back = found[name]
        if isinstance(part, bytes):
            assert back == part
            continue
        assert isinstance(back, np.ndarray)
        assert back.dtype == part.dtype
        assert back.shape == part.shape
        assert (back == part).all()
        assert back.flags.writeable


def test_every_flipped_bit_is_found() -> None:
    """Whichever byte it is in."""
    whole = encoded()
    for position in range(len(whole)):
        bad = whole.copy()
        bad[position] ^= 1 << (position % 8)
        with pytest.raises(container.ContainerError):
            container.decode(bad)


def test_every_cut_is_found() -> None:
    """A file that ends too early is no smaller file."""
    whole = encoded({"a": b"12345", "b": np.arange(3)})
    for length in range(len(whole)):
        with pytest.raises(container.ContainerError):
            container.decode(whole[:length])


@pytest.mark.parametrize(
    "entries",
    [
        {"not": "a list"},
        [["x", "<i8", [3], 8, 0]],
        [["x", "no type", [1], 0, 0]],
        [["x", None, [], -5, 0]],
    ],
    ids=["no list", "wrong shape", "wrong type", "negative length"],
)
def test_a_header_that_makes_no_sense_is_an_error_of_the_file(entries: object) -> None:
    """Also under a right checksum."""
    header = msgspec.msgpack.encode(entries)
    head = container._HEAD.pack(b"TMKFILE1", len(header), google_crc32c.value(header))
    data = np.frombuffer(head + header + bytes(8), dtype=np.uint8)
    with pytest.raises(container.ContainerError):
        container.decode(data)
