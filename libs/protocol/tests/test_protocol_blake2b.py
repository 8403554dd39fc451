"""The BLAKE2b kernel against hashlib."""

import hashlib
import random
from typing import Any

import numba as nb
import numpy as np

from tallymark_protocol.kernels.blake2b import WORK_WORDS, blake2b_128


@nb.njit
def hash_each(prefixes_a: Any, prefixes_b: Any, data: Any, starts: Any, ends: Any, out: Any) -> None:
    """Call the kernel from another kernel, as its users do."""
    work = np.empty(WORK_WORDS, dtype=np.uint64)
    for i in range(len(starts)):
        lo, hi = blake2b_128(prefixes_a[i], prefixes_b[i], data, starts[i], ends[i], work)
        out[i, 0] = lo
        out[i, 1] = hi


def expected(a: int, b: int, message: bytes) -> tuple[int, int]:
    digest = hashlib.blake2b(
        a.to_bytes(8, "little") + b.to_bytes(8, "little") + message, digest_size=16
    ).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


def check(cases: list[tuple[int, int, int, int]], data: bytes) -> None:
    out = np.zeros((len(cases), 2), dtype=np.uint64)
    columns = list(zip(*cases, strict=True))
    hash_each(
        np.array(columns[0], dtype=np.uint64),
        np.array(columns[1], dtype=np.uint64),
        np.frombuffer(data, dtype=np.uint8),
        np.array(columns[2], dtype=np.int64),
        np.array(columns[3], dtype=np.int64),
        out,
    )
    for (a, b, start, end), (lo, hi) in zip(cases, out.tolist(), strict=True):
        assert (lo, hi) == expected(a, b, data[start:end]), (a, b, start, end)


def test_every_length_up_to_several_blocks():
    """Lengths 0 to 400 cover each tail and each block boundary, the prefix included."""
    data = random.Random(1).randbytes(500)
    check([(42, 7, 3, 3 + length) for length in range(401)], data)


def test_random_slices_and_prefixes():
    """Any alignment, any prefix; bytes around the slice don't matter."""
    source = random.Random(2)
    data = source.randbytes(5_000)
    cases = []
    for _ in range(1_500):
        start = source.randrange(5_001)
        end = min(len(data), start + source.choice([5, 40, 112, 113, 240, 1_000, 5_000]))
        cases.append((source.getrandbits(64), source.getrandbits(64), start, end))
    cases += [(0, 0, 0, 0), (2**64 - 1, 2**64 - 1, 5_000, 5_000), (2**63, 1, 0, 5_000)]
    check(cases, data)


def test_the_work_array_carries_nothing_over():
    """A short message hashed after a long one isn't padded with the long one's bytes."""
    data = b"\xff" * 300
    check([(1, 2, 0, 300), (1, 2, 0, 1), (1, 2, 0, 112), (1, 2, 5, 5)], data)


def test_direct_call_from_python():
    """The kernel is callable without a wrapper and returns (lo, hi)."""
    data = np.frombuffer(b"job-8812", dtype=np.uint8)
    work = np.empty(WORK_WORDS, dtype=np.uint64)
    lo, hi = blake2b_128(np.uint64(42), np.uint64(9), data, 0, 8, work)
    assert (int(lo), int(hi)) == expected(42, 9, b"job-8812")
