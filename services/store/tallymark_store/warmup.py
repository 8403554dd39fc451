"""Compiling every kernel of the store before it serves, or loading it from numba's cache."""

from __future__ import annotations

import numpy as np

from tallymark_protocol.payload import COLUMNS, place_payload, validate_payload
from tallymark_store import dedup, fold, judge, reads
from tallymark_store.archive import kernels as archive_kernels
from tallymark_store.archive import merge_kernels
from tallymark_store.scan import column_kernels


def warm_up(*, archive: bool = True) -> None:
    """Compile what is not compiled yet. The first time takes up to a minute; later ones read a cache.

    `archive`: what only stores with an archive need, too.
    """
    data = np.zeros(128, dtype=np.uint8)
    data.setflags(write=False)  # as frames and mapped files are: another type to the compiler
    columns = np.zeros(COLUMNS, dtype=np.int64)
    validate_payload(data, 0, 128, columns)
    place_payload(data, 0, 128, columns)
    dedup.warm_up()
    fold.warm_up()
    judge.warm_up()
    reads.warm_up()
    if archive:
        archive_kernels.warm_up()
        column_kernels.warm_up()
        merge_kernels.warm_up()
