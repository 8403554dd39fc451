"""What a serving process asks of the interpreter and the C library; called once, before anything else runs.

Settings, each for a cost that was measured:

- Threads hand the interpreter lock over at its switch interval, 5 ms by default. The log's thread needs it for some
  microseconds after each sync, and a receipt waits for that.
- glibc gives large freed blocks back to the system, and every column array is such a block: the next batch pays for
  fresh pages with a page fault each. Kept instead, splitting a batch takes a third of the time.
- A mapped file keeps a descriptor, and an archive maps a file for some million events each: a soft limit of 1,024, usual
  for shells, would be reached one day. It is raised to the hard one.
- The garbage collector looks at every object of the compiler and of all modules again with each full collection, which
  takes tens of milliseconds. What is there when a server is ready stays for its life: `settle` takes it out of sight.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import resource
import sys

SWITCH_INTERVAL_S = 0.0005
GC_THRESHOLDS = (20_000, 20, 50)  # allocations between collections of the youngest objects, and so on
KEEP_BYTES = 256 * 1024 * 1024  # freed memory that is kept for the next batch
_M_TRIM_THRESHOLD = -1  # of glibc's malloc.h
_M_TOP_PAD = -2
_M_MMAP_THRESHOLD = -3
_TOP_PAD_BYTES = 16 * 1024 * 1024


def tune() -> None:
    """Apply all but `settle`; on a C library without `mallopt` its part is left out."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # not every system lets the one be as high as it says
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    gc.set_threshold(*GC_THRESHOLDS)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    mallopt(_M_MMAP_THRESHOLD, KEEP_BYTES)
    mallopt(_M_TRIM_THRESHOLD, KEEP_BYTES)
    mallopt(_M_TOP_PAD, _TOP_PAD_BYTES)


def settle() -> None:
    """Let the garbage collector overlook what is there now: call it once, when the server is ready."""
    gc.collect()
    gc.freeze()
