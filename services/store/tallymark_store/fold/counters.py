"""The counters of a fold's state, for kernels: one int64 array.

Freed rows of cells are linked through their first word, freed entries of sets through their second, freed rows of
thresholds through their first, by how many there are of them; a list's head is one plus a row number, 0 where the list is empty.
"""

from __future__ import annotations

N_CELLS = 0  # rows in use or freed; likewise the next three
N_MEMBERS = 1
N_ROWS = 2
N_ALERTS = 3
N_FREE_CELLS = 4  # how many cells are freed
N_FREE_CELL = 5  # the first of them
N_FREE_ROWS = 6  # the first of each list of freed threshold rows: of one threshold, of two, ...
_THRESHOLDS_MAX = 8
N_SPILLED = N_FREE_ROWS + _THRESHOLDS_MAX  # cells that only files have
# Why a kernel has stopped: a unit is to be brought back. 0: it has not; -1: the file is damaged.
N_FREE_MEMBERS = N_SPILLED + 1  # how many entries of sets are freed
N_FREE_MEMBER = N_SPILLED + 2  # the first of them
N_SPILLED_MEMBERS = N_SPILLED + 3  # entries that only files have
N_NEED = N_SPILLED + 4  # its records
N_NEED_FILE = N_NEED + 1
N_NEED_RECORD = N_NEED + 2
N_LOADED = N_NEED + 3  # row of the unit's first cell, while it is being brought back
N_ALERT_BASE = N_NEED + 4  # the position of the first alert record in memory
COUNTERS = N_ALERT_BASE + 1
