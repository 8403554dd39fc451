"""What codes mean at which offset, and which dimensions a metric declares: a copy for a thread, as kernels want it.

A code that was deleted and created again is another metric from the offset of its schema record on. Keys of
dimensions never change under a uid, so one list per metric holds for all of its events.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tallymark_store.archive import kernels as k
from tallymark_store.fold.schemas import SchemaTable

Ints = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]


class MetricNames:
    """The metrics of a partition as of one offset; immutable.

    Attributes:
        count: slots.
        codes_of: the code of each slot.
        uids: of each slot.
        ranks: of each slot, its place in the order of uids.
    """

    def __init__(self, schemas: SchemaTable) -> None:
        self.count = schemas.count
        self.uids = schemas.uids.copy()
        self.ranks: Ints = self.uids.argsort().argsort().astype(np.int64)
        self.codes_of = [schemas.record(slot).schema.code for slot in range(self.count)]
        meanings: dict[
            str, list[tuple[int, int]]
        ] = {}  # by code: (offset from which on, slot), in this order
        for slot, code in enumerate(self.codes_of):  # slots are in log order
            meanings.setdefault(code, []).append((schemas.offsets_of(slot)[0], slot))
        self.pool, bounds = _pooled([code.encode() for code in meanings])
        self.codes: Ints = np.zeros((len(meanings), k.CODE_FIELDS), np.int64)
        self.versions: Ints = np.zeros((self.count, k.VERSION_FIELDS), np.int64)
        at = 0
        for c, versions in enumerate(meanings.values()):
            self.codes[c] = (*bounds[c], at, len(versions))
            for version in versions:
                self.versions[at] = version
                at += 1
        self.index = np.full(1 << max(4, (2 * len(meanings)).bit_length()), -1, np.int32)
        k.index_codes(self.pool, self.codes, self.index)
        keys: list[bytes] = []
        self.slot_keys: Ints = np.zeros((max(self.count, 1), 2), np.int64)
        for slot in range(self.count):
            declared = [dimension.key.encode() for dimension in schemas.record(slot).schema.filters]
            self.slot_keys[slot] = (len(keys), len(keys) + len(declared))
            keys += declared
        self.keys, self.key_bounds = _pooled(keys)


def _pooled(parts: list[bytes]) -> tuple[Bytes, Ints]:
    """All parts in one array, and where each begins and ends."""
    ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
    starts = ends - np.array([len(part) for part in parts], np.int64)
    pool = np.frombuffer(bytearray(b"".join(parts) or b"\0"), np.uint8)
    return pool, np.ascontiguousarray(np.stack((starts, ends), axis=1))
