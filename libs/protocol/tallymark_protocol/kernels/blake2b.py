"""BLAKE2b with a 16-byte digest (RFC 7693), as a kernel that other kernels call.

It hashes two 64-bit prefixes followed by a slice of a byte array, which is what event-id keys
(account, metric uid, typed id) and text values of unique sets (0, metric uid, text) are made of, without
building that message anywhere. The result equals `hashlib.blake2b(message, digest_size=16)` bit for bit:
keys are part of the replicated state, so they may depend on nothing but their input.
"""

from typing import Any

import numba as nb
import numpy as np

from tallymark_protocol.kernels.intrinsics import load_u8, load_u64

WORK_WORDS = 16
"""Length of the uint64 array that callers of `blake2b_128` provide: one message block."""

_BLOCK_BYTES = 128
_PREFIX_BYTES = 16

_IV = (
    np.uint64(0x6A09E667F3BCC908),
    np.uint64(0xBB67AE8584CAA73B),
    np.uint64(0x3C6EF372FE94F82B),
    np.uint64(0xA54FF53A5F1D36F1),
    np.uint64(0x510E527FADE682D1),
    np.uint64(0x9B05688C2B3E6C1F),
    np.uint64(0x1F83D9ABFB41BD6B),
    np.uint64(0x5BE0CD19137E2179),
)
# The first word of the parameter block: digest length 16, no key, fan-out and depth 1.
_PARAMETERS = np.uint64(0x01010000 ^ 16)


@nb.njit(nogil=True, cache=True, forceinline=True)
def _mix(a: Any, b: Any, c: Any, d: Any, x: Any, y: Any) -> Any:
    """The function G of RFC 7693, section 3.1."""
    a = a + b + x
    d ^= a
    d = (d >> np.uint64(32)) | (d << np.uint64(32))
    c = c + d
    b ^= c
    b = (b >> np.uint64(24)) | (b << np.uint64(40))
    a = a + b + y
    d ^= a
    d = (d >> np.uint64(16)) | (d << np.uint64(48))
    c = c + d
    b ^= c
    b = (b >> np.uint64(63)) | (b << np.uint64(1))
    return a, b, c, d


@nb.njit(nogil=True, cache=True, forceinline=True)
def _round(v: Any, m: Any, s: Any) -> Any:
    """One round of RFC 7693, section 3.2, over the working vector `v`, with the schedule row `s`.

    Everything is a tuple with constant indexes, so that twelve of these become straight-line code over
    registers: a third faster than a loop that looks the schedule up.
    """
    v0, v1, v2, v3, v4, v5, v6, v7, v8, v9, v10, v11, v12, v13, v14, v15 = v
    v0, v4, v8, v12 = _mix(v0, v4, v8, v12, m[s[0]], m[s[1]])
    v1, v5, v9, v13 = _mix(v1, v5, v9, v13, m[s[2]], m[s[3]])
    v2, v6, v10, v14 = _mix(v2, v6, v10, v14, m[s[4]], m[s[5]])
    v3, v7, v11, v15 = _mix(v3, v7, v11, v15, m[s[6]], m[s[7]])
    v0, v5, v10, v15 = _mix(v0, v5, v10, v15, m[s[8]], m[s[9]])
    v1, v6, v11, v12 = _mix(v1, v6, v11, v12, m[s[10]], m[s[11]])
    v2, v7, v8, v13 = _mix(v2, v7, v8, v13, m[s[12]], m[s[13]])
    v3, v4, v9, v14 = _mix(v3, v4, v9, v14, m[s[14]], m[s[15]])
    return v0, v1, v2, v3, v4, v5, v6, v7, v8, v9, v10, v11, v12, v13, v14, v15


@nb.njit(nogil=True, cache=True, inline="always")
def _fill_block(data: Any, position: Any, end: Any, work: Any, word: Any) -> Any:
    """Put the next bytes of the message into `work[word:16]`, zero-padded; return the position after them."""
    while word < 16 and position + 8 <= end:
        work[word] = load_u64(data, position)
        position += 8
        word += 1
    if word < 16:
        tail = np.uint64(0)
        shift = np.uint64(0)
        while position < end:
            tail |= np.uint64(load_u8(data, position)) << shift
            shift += np.uint64(8)
            position += 1
        work[word] = tail
        for i in range(word + 1, 16):
            work[i] = np.uint64(0)
    return position


@nb.njit(nogil=True, cache=True)
def blake2b_128(prefix_a: Any, prefix_b: Any, data: Any, start: Any, end: Any, work: Any) -> Any:
    """Hash `le64(prefix_a) || le64(prefix_b) || data[start:end]`; return the digest as (lo, hi).

    `lo` is the digest's first eight bytes, little-endian, `hi` the other eight. The prefixes are uint64, `data`
    is uint8, `start` and `end` are int64 with `0 <= start <= end <= len(data)` (not checked), and `work` is
    a uint64 array of `WORK_WORDS` that is overwritten.
    """
    h0 = _IV[0] ^ _PARAMETERS
    h1, h2, h3, h4, h5, h6, h7 = _IV[1], _IV[2], _IV[3], _IV[4], _IV[5], _IV[6], _IV[7]
    work[0] = np.uint64(prefix_a)
    work[1] = np.uint64(prefix_b)
    left = _PREFIX_BYTES + (end - start)
    hashed = 0
    position = _fill_block(data, start, end, work, 2)
    while True:
        final = left <= _BLOCK_BYTES
        hashed += left if final else _BLOCK_BYTES
        v0, v1, v2, v3, v4, v5, v6, v7 = h0, h1, h2, h3, h4, h5, h6, h7
        v8, v9, v10, v11 = _IV[0], _IV[1], _IV[2], _IV[3]
        v12, v13, v14, v15 = _IV[4] ^ np.uint64(hashed), _IV[5], _IV[6], _IV[7]
        if final:
            v14 = ~v14
        v = (v0, v1, v2, v3, v4, v5, v6, v7, v8, v9, v10, v11, v12, v13, v14, v15)
        # The message schedule of RFC 7693, section 2.7; the last two rounds repeat the first two.
        v = _round(v, work, (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15))
        v = _round(v, work, (14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3))
        v = _round(v, work, (11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4))
        v = _round(v, work, (7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8))
        v = _round(v, work, (9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13))
        v = _round(v, work, (2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9))
        v = _round(v, work, (12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11))
        v = _round(v, work, (13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10))
        v = _round(v, work, (6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5))
        v = _round(v, work, (10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0))
        v = _round(v, work, (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15))
        v = _round(v, work, (14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3))
        v0, v1, v2, v3, v4, v5, v6, v7, v8, v9, v10, v11, v12, v13, v14, v15 = v
        h0 ^= v0 ^ v8
        h1 ^= v1 ^ v9
        h2 ^= v2 ^ v10
        h3 ^= v3 ^ v11
        h4 ^= v4 ^ v12
        h5 ^= v5 ^ v13
        h6 ^= v6 ^ v14
        h7 ^= v7 ^ v15
        if final:
            return h0, h1
        left -= _BLOCK_BYTES
        position = _fill_block(data, position, end, work, 0)
