"""A 64-bit hash of each row of an archive table, so that two sets of rows are compared by their sums.

The hash is of what a row says, whatever its encoding: words of dictionaries are hashed as texts. It finds defects and
rot; it is no defence against somebody who wants two tables to look alike.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tallymark_protocol.kernels.intrinsics import hash_bytes
from tallymark_store.fold.compiling import kernel

Words = npt.NDArray[np.uint64]

_STEP = np.uint64(0x9E3779B97F4A7C15)
_NULL = np.uint64(0x6E756C6C)


@kernel
def _hash_texts(pool: Any, ends: Any, first: Any, out: Any) -> None:
    """The hash of each text; `ends` has one more entry than there are texts, `first` is where they begin in it."""
    for i in range(len(out)):
        out[i] = hash_bytes(pool, np.int64(ends[first + i]), np.int64(ends[first + i + 1]), np.uint64(17))


def _mixed(values: Words) -> Words:
    """splitmix64's finaliser."""
    z = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: Words = z ^ (z >> np.uint64(31))
    return mixed


def row_hashes(table: pa.Table) -> Words:
    """The hashes of a table's rows."""
    total: Words = np.zeros(table.num_rows, np.uint64)
    for field in table.schema:
        for_column = [_hashes(chunk) for chunk in table.column(field.name).chunks]
        words = np.concatenate(for_column) if for_column else np.zeros(0, np.uint64)
        total = _mixed(total ^ words) + _STEP
    return total


def _hashes(array: pa.Array) -> Words:
    if pa.types.is_dictionary(array.type):
        if not len(array.dictionary):
            return np.full(len(array), _NULL)
        of_words = _hashes(array.dictionary)
        hashes = of_words[array.indices.fill_null(0).to_numpy(zero_copy_only=False)]
    elif pa.types.is_string(array.type):
        hashes = _text_hashes(array)
    elif pa.types.is_boolean(array.type):
        hashes = array.fill_null(False).to_numpy(zero_copy_only=False).astype(np.uint64)
    else:
        hashes = array.fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64).view(np.uint64)
        if array.type == pa.uint64():
            hashes = array.fill_null(0).to_numpy(zero_copy_only=False)
    mixed = _mixed(hashes + _STEP)
    return (
        np.where(array.is_null().to_numpy(zero_copy_only=False), _NULL, mixed) if array.null_count else mixed
    )


def _text_hashes(array: pa.Array) -> Words:
    out: Words = np.empty(len(array), np.uint64)
    _, ends, pool = array.buffers()
    if not len(array):
        return out
    data = np.zeros(1, np.uint8) if pool is None or not pool.size else np.frombuffer(pool, np.uint8).copy()
    _hash_texts(data, np.frombuffer(ends, np.int32).copy(), array.offset, out)
    return out
