"""Arrays that grow without being copied.

An `Arena` reserves a large range of addresses (an anonymous mapping that commits memory page by page, when it is
first touched) and hands out one numpy view of it, so growing is free, stalls nobody and never moves what kernels
have seen. Where such a reservation is refused (strict overcommit, an address space limit), and where a range is
used up, it falls back to doubling with a copy. Fresh rows are zero either way.

From 8 MiB on, whole huge pages are asked for: random access to millions of cells otherwise spends more on address
translation than on the cells. Below that they would only waste memory.
"""

from __future__ import annotations

import math
import mmap
from typing import Any

import numpy as np
import numpy.typing as npt

_HUGE_PAGE = 2 * 1024 * 1024
_HUGE_FROM = 8 * 1024 * 1024
_HUGE_STEP = 32 * 1024 * 1024  # how much more is advised at a time
_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)


class Arena:
    """Rows of one dtype; `array` is (rows,) or (rows, columns), at least `ensure`d rows long.

    Rows are written by kernels; how many are in use is known to the owner alone. `array` must be read anew after
    every `ensure`.
    """

    def __init__(
        self, dtype: npt.DTypeLike, *, columns: int = 1, reserve_rows: int, initial_rows: int = 1_024
    ) -> None:
        self._dtype = np.dtype(dtype)
        self._columns = columns
        self.row_bytes = self._dtype.itemsize * columns
        self._map: mmap.mmap | None = None
        self._advised = _HUGE_FROM  # bytes below this offset have their page size decided
        self.array: npt.NDArray[Any]
        if not self._reserve(reserve_rows):
            self.array = self._allocate(initial_rows)

    @property
    def reserved(self) -> bool:
        """Whether growing costs nothing."""
        return self._map is not None

    @property
    def rows(self) -> int:
        """How many rows `array` has."""
        return len(self.array)

    def ensure(self, rows: int) -> None:
        """Make `array` at least `rows` long, and its pages huge where it is large."""
        if rows > len(self.array):
            larger = self._allocate(max(rows, 2 * len(self.array)))
            larger[: len(self.array)] = self.array
            self.array = larger
            self._map = None
        self.advise(0, rows)

    def advise(self, start_row: int, end_row: int) -> None:
        """Ask for huge pages up to `end_row`, if rows from `start_row` on make it worth it."""
        end = end_row * self.row_bytes
        if self._map is None or end <= self._advised or end - start_row * self.row_bytes < _HUGE_FROM:
            return
        target = min(math.ceil(end / _HUGE_STEP) * _HUGE_STEP, len(self._map))
        self._advise(self._advised, target)
        self._advised = target

    def advise_range(self, start_row: int, end_row: int) -> None:
        """Ask for huge pages for the whole ones within these rows, wherever they lie."""
        start = math.ceil(start_row * self.row_bytes / _HUGE_PAGE) * _HUGE_PAGE
        end = end_row * self.row_bytes // _HUGE_PAGE * _HUGE_PAGE
        if self._map is not None and end > start:
            self._advise(start, end)

    def _advise(self, start: int, end: int) -> None:
        if self._map is None or not hasattr(mmap, "MADV_HUGEPAGE"):
            return
        try:
            self._map.madvise(mmap.MADV_HUGEPAGE, start, end - start)
        except OSError:
            self._advised = len(self._map)  # this kernel has none; it's only a hint

    def _reserve(self, rows: int) -> bool:
        length = math.ceil(rows * self.row_bytes / _HUGE_PAGE) * _HUGE_PAGE
        try:
            self._map = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
        except (OSError, ValueError, OverflowError):
            return False
        flat = np.frombuffer(self._map, dtype=self._dtype, count=rows * self._columns)
        self.array = flat if self._columns == 1 else flat.reshape(rows, self._columns)
        return True

    def _allocate(self, rows: int) -> npt.NDArray[Any]:
        shape = (rows,) if self._columns == 1 else (rows, self._columns)
        return np.zeros(shape, dtype=self._dtype)
