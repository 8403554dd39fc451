"""Which files of an archive are to be merged. Pure.

Files are in **tiers** by their rows: below BASE_ROWS, below FAN_IN times that, and so on. FAN_IN adjacent files of a tier,
or of lower ones, become one, up to the largest size; a file of more than half of that is **full** and is left as it is. So
an event is written about once more per tier, at the rate at which a loaded store makes files once in all, and there are
never FAN_IN files in a row of a tier and those below, whatever sizes they come in.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Final

from tallymark_store.archive.manifest import ArchiveFile

FAN_IN: Final = 16
BASE_ROWS: Final = 32_768
ROWS_MAX: Final = FAN_IN * FAN_IN * BASE_ROWS  # of a merged file, but for a single event batch that is larger
BYTES_MAX: Final = 512 * 1024 * 1024  # likewise


def is_full(file: ArchiveFile) -> bool:
    """Whether a file is never merged any more: two of them would be too large."""
    return 2 * file.rows > ROWS_MAX or 2 * file.bytes > BYTES_MAX


def tier_of(file: ArchiveFile) -> int:
    """0 for the smallest files, rising with their rows."""
    tier = 0
    above = BASE_ROWS
    while file.rows >= above:
        tier += 1
        above *= FAN_IN
    return tier


def next_merge(files: Sequence[ArchiveFile], gaps: Sequence[tuple[int, int]] = ()) -> tuple[int, int] | None:
    """The files [first, last) that are to become one, of the lowest tier that has enough; None where all is well.

    Args:
        files: of an archive, in offset order.
        gaps: ranges of offsets that no merged file may reach across.
    """
    # Of each file the gap that follows next: files with the same one have none between them.
    ahead = [bisect.bisect_right(gaps, (file.start_offset,)) for file in files]
    tiers = [None if is_full(file) else tier_of(file) for file in files]
    for tier in sorted({tier for tier in tiers if tier is not None}):
        first = 0  # where the run of files of this tier and below begins
        for place, own in enumerate(tiers):
            if place and ahead[place] != ahead[place - 1]:
                first = place
            if own is None or own > tier:
                first = place + 1
            elif place + 1 - first == FAN_IN:
                return first, _end_of(files, first)
    return None


def _end_of(files: Sequence[ArchiveFile], first: int) -> int:
    """Up to where the files of a run fit into one: two do, as none is full."""
    rows = size = 0
    for place in range(first, first + FAN_IN):
        rows += files[place].rows
        size += files[place].bytes
        if rows > ROWS_MAX or size > BYTES_MAX:
            return place
    return first + FAN_IN
