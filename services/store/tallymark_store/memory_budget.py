"""How the setting `memory_bytes` bounds a store's memory, and how that is divided.

One part each is for what can also be on disk, of all partitions together; what a part doesn't use nobody else gets, so
that none of them depends on what the others do:

    half        cells and sets, with what their files keep in memory (`spilling`)
    a quarter   remembered event ids, likewise (`id_budget`)
    an eighth   alert records (`alert_spilling`)
    the rest    what has no bound of its own, and work under way: reads, merges, checkpoints
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

UNBOUNDED = -1  # of the setting
SMALL_BYTES = (
    16 * 1024 * 1024
)  # with less nearly everything is read from files, and written to them, all the time
_CELLS_SHARE = 2  # one part in so many
_IDS_SHARE = 4
_ALERTS_SHARE = 8
_CONTAINER_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def memory_of(setting: int) -> int | None:
    """The bytes of memory that a setting gives a store: 0 half of what there is, `UNBOUNDED` no bound (None)."""
    if setting < 0:
        return None
    return setting or available(_CONTAINER_LIMITS) // 2


def available(limits: Sequence[str]) -> int:
    """The machine's memory, or what its control group may take if that is less. `limits`: files that say so."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in limits:
        try:
            text = Path(name).read_text(encoding="ascii").strip()
        except (OSError, ValueError):
            continue  # there are two versions of control groups
        if text.isdecimal() and int(text) > 0:  # else it is "max"
            memory = min(memory, int(text))
    return memory


def warning_of(setting: int) -> str:
    """What is to be said of a setting at the start; "" where nothing is."""
    memory = memory_of(setting)
    if memory is None or memory >= SMALL_BYTES:
        return ""
    return (
        f"memory_bytes is {setting}: so little memory makes everything slow, as nearly all of it is in files; give at "
        f"least {SMALL_BYTES} (16 MiB), 0 for half of the machine's memory, or {UNBOUNDED} for no bound"
    )


def cells_of(setting: int) -> int | None:
    """The part of it that is for cells and sets."""
    memory = memory_of(setting)
    return None if memory is None else memory // _CELLS_SHARE


def ids_of(setting: int) -> int | None:
    """The part of it that is for remembered ids."""
    memory = memory_of(setting)
    return None if memory is None else memory // _IDS_SHARE


def alerts_of(setting: int) -> int | None:
    """The part of it that is for alert records."""
    memory = memory_of(setting)
    return None if memory is None else memory // _ALERTS_SHARE
