"""When what lies before the log's start was appended: as much of it as the window of remembered ids is reckoned by.

The window begins with the first record of a **step** of append time: 1/4096 of the window's length. So its beginning
is a pure function of the log, and one number for each step, the first offset appended in it, says all that has to be
known of records that are no longer there. An id is remembered for the whole window, and up to one step longer.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tallymark_store.wal import PartitionIndex

IntArray = npt.NDArray[np.int64]

STEPS = 4096  # in a window


class WindowTimes:
    """First offsets of steps, of records that the log has dropped; and where the window begins, by them and the log."""

    def __init__(self, window_ns: int, marks: IntArray | None = None) -> None:
        self._window_ns = window_ns
        self._step_ns = max(window_ns // STEPS, 1)
        # (step, first offset appended in it), ascending in both; may reach into what is still in the log.
        self._marks: IntArray = np.empty((0, 2), np.int64) if marks is None else marks

    def floor(self, index: PartitionIndex, append_ns: int) -> int:
        """The first offset in the window that ends at `append_ns`; the log's end if there is none."""
        step = (append_ns - self._window_ns) // self._step_ns
        times = index.column("append_ns")
        row = int(times.searchsorted(step * self._step_ns, side="left"))
        if row == 0 and index.log_start > 0:
            at = int(self._marks[:, 0].searchsorted(step, side="left"))
            if at < len(self._marks):
                return min(int(self._marks[at, 1]), index.log_start)
        return int(index.column("base_offset")[row]) if row < len(times) else index.log_end

    def below(self, index: PartitionIndex, offset: int) -> IntArray:
        """What is to be known of everything below `offset`, a boundary of the log, where the log begins there."""
        rows = index.rows_of(index.log_start, offset)[1]
        times, bases = index.column("append_ns", 0, rows), index.column("base_offset", 0, rows)
        steps, first = np.unique(times // self._step_ns, return_index=True)
        fresh = np.stack((steps, bases[first]), axis=1)
        kept = self._marks[self._marks[:, 1] < index.log_start]
        if len(kept) and len(fresh) and kept[-1, 0] == fresh[0, 0]:
            fresh = fresh[1:]
        oldest = (index.append_ns_before(offset) - self._window_ns) // self._step_ns
        marks = np.concatenate((kept, fresh))
        return marks[marks[:, 0] >= oldest]

    def drop(self, index: PartitionIndex, offset: int) -> None:
        """The log is about to drop everything below `offset`, which is committed."""
        self._marks = self.below(index, offset)
