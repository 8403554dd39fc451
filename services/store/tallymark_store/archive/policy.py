"""Which files of an archive are to be merged. Pure.

Files are in **tiers** by their rows: below BASE_ROWS, below FAN_IN times that, and so on up to ROWS_MAX. FAN_IN adjacent
files of a tier, or of lower ones, become one. So an event is written once more per tier at most, and at the rate at which
a loaded store makes files only once in all; and there are fewer than FAN_IN files of each tier in a row, whatever sizes
they come in. Files that would grow beyond ROWS_MAX are left as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from tallymark_store.archive.manifest import ArchiveFile

FAN_IN: Final = 16
BASE_ROWS: Final = 32_768
ROWS_MAX: Final = FAN_IN * FAN_IN * BASE_ROWS  # of a merged file, but for a single event batch that is larger
BYTES_MAX: Final = 512 * 1024 * 1024  # likewise


def tier_of(file: ArchiveFile) -> int:
    """0 for the smallest files."""
    tier = 0
    above = BASE_ROWS
    while file.rows >= above and above < ROWS_MAX:
        tier += 1
        above *= FAN_IN
    return tier


def next_merge(files: Sequence[ArchiveFile]) -> tuple[int, int] | None:
    """The files [first, last) that are to become one, the smallest first; None where all is well.

    Args:
        files: of an archive, in offset order.
    """
    tiers = [tier_of(file) for file in files]
    for tier in range(max(tiers, default=0) + 1):
        run = 0  # where the files of this tier and below begin
        for place in range(len(files) + 1):
            if place < len(files) and tiers[place] <= tier:
                continue
            merge = _within(files, run, place)
            if merge is not None:
                return merge
            run = place + 1
    return None


def _within(files: Sequence[ArchiveFile], first: int, last: int) -> tuple[int, int] | None:
    """The oldest files of a run that fit into one, if the run is long enough."""
    if last - first < FAN_IN:
        return None
    while last - first >= 2:
        rows = size = 0
        end = first
        while end < last and end - first < FAN_IN:
            rows += files[end].rows
            size += files[end].bytes
            if rows > ROWS_MAX or size > BYTES_MAX:
                break
            end += 1
        if end - first >= 2:
            return first, end
        first += 1  # this one is full, or its neighbour is
    return None
