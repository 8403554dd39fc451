"""Looking at every byte of a file of units: what `verify` does, and nobody else, as each block is checked when it is used."""

from __future__ import annotations

from typing import Any

import numpy as np

from tallymark_store.fold.compiling import kernel
from tallymark_store.fold.units import B_SUM, BLOCK_BYTES, BLOCK_WORDS, F_BLOCKS, F_RECORDS, is_sound, peek


@kernel
def unsound_block(files: Any, f: Any, first: Any, end: Any) -> Any:
    """The first of the blocks [first, end) of a file that is not as it was written, its padding included; -1: all are."""
    for block in range(first, min(end, files[f, F_BLOCKS])):
        if not is_sound(files, f, block):
            return np.int64(block)
        address = files[f, F_RECORDS] + block * BLOCK_BYTES
        for word in range(B_SUM + 1, BLOCK_WORDS):
            if peek(address + 8 * word) != 0:
                return np.int64(block)
    return np.int64(-1)
