"""The judge's memory: which event ids and which chunks a partition has already taken.

Both are replicated state, rebuilt from checkpoint and log, and both give verdicts by rules about offsets
and append times alone. See `index` and `producers`.
"""

import numpy as np
import numpy.typing as npt

from tallymark_runtime.disk import MemoryDisk
from tallymark_store.dedup.arena import TableFullError
from tallymark_store.dedup.id_file import IdFile, IdFileError, IdMerge, open_id_file, write_id_file
from tallymark_store.dedup.index import DedupIndex
from tallymark_store.dedup.index_kernels import CONFLICT, DUPLICATE, LOOK_UP_AND_REMEMBER, LOOK_UP_ONLY
from tallymark_store.dedup.producer_kernels import NEW, REPEAT, REUSED, UNKNOWN
from tallymark_store.dedup.producers import ProducerWindows

__all__ = [
    "CONFLICT",
    "DUPLICATE",
    "LOOK_UP_AND_REMEMBER",
    "LOOK_UP_ONLY",
    "NEW",
    "REPEAT",
    "REUSED",
    "UNKNOWN",
    "DedupIndex",
    "IdFile",
    "IdFileError",
    "IdMerge",
    "ProducerWindows",
    "TableFullError",
    "open_id_file",
    "warm_up",
    "write_id_file",
]


def warm_up() -> None:
    """Compile every kernel of this package, or load it from the cache, so that no later call has to."""
    words = np.arange(2, dtype=np.uint64)
    flags = np.ones(2, dtype=np.uint8)
    offsets = np.arange(2, dtype=np.int64)
    index = DedupIndex(slots_max=2**16)
    index.judge(words, words, words, flags, 0, 0, np.zeros(2, dtype=np.uint8), np.zeros(2, dtype=np.int64))
    index.apply(words, words, words, offsets)
    for shard in range(64):
        index.load(index.entries(shard, 0, 1))
    index.reserve(64 * 64)
    index.digest(0, 2)
    index.truncate(1)
    index.sweep(1, 64)
    _warm_up_files(words, flags, offsets)

    windows = ProducerWindows(slots_max=2**16)
    small = np.ones(2, dtype=np.uint32)
    columns = (words, words, small)
    outputs = (np.zeros(2, dtype=np.uint8), np.zeros(2, dtype=np.int64), np.zeros(2, dtype=np.int64))
    windows.judge_chunks(*columns, offsets, small, 0, 0, *outputs)
    windows.insert(*columns, small, offsets, 0, 0)
    windows.load(windows.entries(1, 0))
    windows.digest(1, 0)
    windows.truncate(0)


def _warm_up_files(
    words: npt.NDArray[np.uint64], flags: npt.NDArray[np.uint8], offsets: npt.NDArray[np.int64]
) -> None:
    disk = MemoryDisk()
    index = DedupIndex(slots_max=2**16)
    index.apply(words, words, words, offsets)
    entries = np.concatenate([index.entries(shard, 0, 2) for shard in range(64)])
    write_id_file(disk, "one", entries, 0, 2)
    one = open_id_file(disk, "one", 0, 2)
    merge = IdMerge(disk, [one], "merged", 0)
    while merge.step():
        pass
    index.spill(2, [open_id_file(disk, "merged", 0, 2)])
    index.judge(words, words, words, flags, 2, 0, np.zeros(2, dtype=np.uint8), np.zeros(2, dtype=np.int64))
    index.digest(0, 2)
