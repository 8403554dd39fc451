"""128-bit sums between their forms: Python ints, 16 bytes on the wire, two 64-bit words in arrays.

Everywhere two's complement and little-endian: MessagePack and numpy stop at 64 bits, totals don't.
"""

from __future__ import annotations

from typing import Final

BYTES: Final = 16
MIN: Final = -(2**127)
MAX: Final = 2**127 - 1
ZERO: Final = bytes(BYTES)

_MASK = 2**64 - 1


def to_bytes(value: int) -> bytes:
    """Encode a number of MIN..MAX; anything else is an OverflowError."""
    return value.to_bytes(BYTES, "little", signed=True)


def from_bytes(data: bytes) -> int:
    """Decode 16 bytes.

    Raises:
        ValueError: another length.
    """
    if len(data) != BYTES:
        raise ValueError(f"a 128-bit number is {BYTES} bytes, not {len(data)}")
    return int.from_bytes(data, "little", signed=True)


def from_words(lo: int, hi: int) -> int:
    """Join the two words; each may be given signed or unsigned, `hi` carries the sign."""
    hi &= _MASK
    return ((hi - 2**64 if hi >= 2**63 else hi) << 64) | (lo & _MASK)


def to_words(value: int) -> tuple[int, int]:
    """Split into (lo, hi) as the signed 64-bit numbers that int64 arrays hold."""
    lo = value & _MASK
    return (lo - 2**64 if lo >= 2**63 else lo), value >> 64
