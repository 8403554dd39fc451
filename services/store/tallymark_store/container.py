"""A file of named arrays and byte strings, each with its own checksum.

Checkpoints are written in it. Little-endian::

    0   8 bytes  magic "TMKFILE1"
    8   u32      header length
    12  u32      CRC-32C of the header
    16  header   MessagePack list of [name, dtype description or None, shape, length, CRC-32C]
        data     the parts, one after another, in the header's order

A part with dtype None is a byte string. Reading checks every checksum.
"""

from __future__ import annotations

import struct
from typing import Any

import google_crc32c
import msgspec
import numpy as np
import numpy.typing as npt

Part = npt.NDArray[Any] | bytes

_MAGIC = b"TMKFILE1"
_HEAD = struct.Struct("<8sII")
_PIECE_BYTES = 1024 * 1024


class ContainerError(Exception):
    """The bytes are not a whole, undamaged container; the message says what is wrong."""


class _Entry(msgspec.Struct, array_like=True):
    name: str
    dtype: Any
    shape: list[int]
    length: int
    checksum: int


def _raw(part: Part) -> npt.NDArray[np.uint8]:
    if isinstance(part, bytes):
        return np.frombuffer(part, dtype=np.uint8)
    return np.ascontiguousarray(part).reshape(-1).view(np.uint8)


def _checksum(raw: npt.NDArray[np.uint8]) -> int:
    """In pieces: the interpreter's lock is held for each, and a part may be of hundreds of megabytes."""
    crc = 0
    for start in range(0, len(raw), _PIECE_BYTES):
        crc = google_crc32c.extend(crc, raw[start : start + _PIECE_BYTES])
    return int(crc)


def encode(parts: dict[str, Part]) -> list[bytes | npt.NDArray[np.uint8]]:
    """The file's content as buffers to be written in order; arrays are not copied when contiguous."""
    entries = []
    buffers: list[bytes | npt.NDArray[np.uint8]] = []
    for name, part in parts.items():
        raw = _raw(part)
        described = None if isinstance(part, bytes) else np.lib.format.dtype_to_descr(part.dtype)
        shape = [] if isinstance(part, bytes) else list(part.shape)
        checksum = _checksum(raw)
        entries.append(_Entry(name, described, shape, len(raw), checksum))
        buffers.append(raw)
    header = msgspec.msgpack.encode(entries)
    return [_HEAD.pack(_MAGIC, len(header), google_crc32c.value(header)), header, *buffers]


def _dtype(described: Any) -> np.dtype[Any]:
    if isinstance(described, list):
        described = [tuple(tuple(x) if isinstance(x, list) else x for x in field) for field in described]
    dtype: np.dtype[Any] = np.dtype(described)
    return dtype


def decode(data: npt.NDArray[np.uint8]) -> dict[str, Part]:
    """Read a container; arrays are writable copies.

    Raises:
        ContainerError: when anything of it is missing or damaged.
    """
    if len(data) < _HEAD.size:
        raise ContainerError("the file is shorter than its header")
    magic, header_length, checksum = _HEAD.unpack(data[: _HEAD.size].tobytes())
    header = data[_HEAD.size : _HEAD.size + header_length].tobytes()
    if magic != _MAGIC or len(header) != header_length or google_crc32c.value(header) != checksum:
        raise ContainerError("the file's header is damaged")
    try:
        entries = msgspec.msgpack.decode(header, type=list[_Entry])
        return _parts(entries, data, _HEAD.size + header_length)
    except (msgspec.DecodeError, ValueError, TypeError) as error:
        raise ContainerError(f"the file's header makes no sense: {error}") from None


def _parts(entries: list[_Entry], data: npt.NDArray[np.uint8], position: int) -> dict[str, Part]:
    parts: dict[str, Part] = {}
    for entry in entries:
        raw = data[position : position + entry.length]
        position += entry.length
        if len(raw) != entry.length or _checksum(raw) != entry.checksum:
            raise ContainerError(f"part {entry.name!r} of the file is damaged")
        if entry.dtype is None:
            parts[entry.name] = raw.tobytes()
        else:
            parts[entry.name] = raw.copy().view(_dtype(entry.dtype)).reshape(entry.shape)
    return parts
