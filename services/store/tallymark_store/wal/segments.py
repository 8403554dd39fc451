"""The log's segment files: preparing them ahead, handing them out in order, mapping them, removing them.

A segment gets its name only when it is whole: filled with zeros under another name, synced, renamed, and the
folder synced. So every file named `wal-*.seg` was once whole, and they were named in order.

Preparing (`prepare_ahead`) is meant for a thread of its own; everything else belongs to the log's lock. `take`
waits for the disk only if that thread has fallen behind. No room at preparation is no failure: the store
is `full` until a later attempt succeeds.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque

from tallymark_runtime.disk import Disk, DiskFullError, File, FileMissingError
from tallymark_store.wal.errors import LogFullError
from tallymark_store.wal.format import (
    ALIGN,
    SEGMENT_BYTES_DEFAULT,
    SEGMENT_HEADER_BYTES,
    ByteArray,
    pack_segment_header,
    segment_name,
)

SEGMENTS_AHEAD = 1  # prepared beside the one in use
MAPS_MAX = 64  # segments kept mapped for reading
FILES_MAX = 4  # segments kept open for writing
ZERO_BYTES = 1024 * 1024  # written at once
ZERO_SYNC_BYTES = 4 * ZERO_BYTES  # synced at once: more would hold up the log's own syncs
FILE_ALIGN = 4096

_ZEROS = bytes(ZERO_BYTES)


class SegmentStore:
    """All segment files of one log.

    `log_bytes_max` bounds their sum, None leaves that to the disk.
    """

    def __init__(
        self,
        disk: Disk,
        log_id: bytes,
        *,
        segment_bytes: int = SEGMENT_BYTES_DEFAULT,
        log_bytes_max: int | None = None,
    ) -> None:
        assert segment_bytes % ALIGN == 0, "groups are aligned to the end"
        self._disk = disk
        self.log_id = log_id
        self._segment_bytes = segment_bytes
        self._log_bytes_max = log_bytes_max
        self._sizes: dict[int, int] = {}  # every segment file, in use or ready
        self._ready: deque[int] = deque()  # prepared, unused, ascending
        self._next = 0  # number of the next segment to be prepared
        self.full_reason = ""  # why the last preparation found no room; empty when there is room
        self._preparing = threading.Lock()  # held while a segment is prepared
        self._maps: OrderedDict[int, ByteArray] = OrderedDict()
        self._maps_lock = threading.Lock()
        self._files: OrderedDict[int, File] = OrderedDict()

    def adopt(self, sizes: dict[int, int], ready: list[int], next_segment: int) -> None:
        """Take over the files that recovery found; `ready` are those that hold nothing yet."""
        self._sizes = dict(sizes)
        self._ready = deque(sorted(ready))
        self._next = next_segment

    @property
    def full(self) -> bool:
        """Whether there was no room for the next segment."""
        return bool(self.full_reason)

    @property
    def total_bytes(self) -> int:
        """The sum of all segment files."""
        return sum(list(self._sizes.values()))

    def numbers(self) -> list[int]:
        """Return the numbers of all segment files."""
        return sorted(self._sizes)

    def prepare_ahead(self) -> bool:
        """Prepare what is missing ahead; return whether there was room for it.

        May be called in any thread. Raises DiskError when the disk fails otherwise.
        """
        with self._preparing:
            while len(self._ready) < SEGMENTS_AHEAD:
                if not self._prepare(self._next, self._segment_bytes):
                    return False
                self._ready.append(self._next)
                self._next += 1
            self.full_reason = ""
            return True

    def take(self, bytes_min: int) -> tuple[int, int]:
        """Return (number, size) of the next segment, of at least `bytes_min` bytes.

        Raises LogFullError, with nothing changed, when there is no room for one.
        """
        if self._ready and self._sizes[self._ready[0]] >= bytes_min:
            return self._pop()
        if self.full_reason and not self._ready:
            raise LogFullError(self.full_reason)
        with self._preparing:
            if self._ready and self._sizes[self._ready[0]] >= bytes_min:
                return self._pop()
            size = max(self._segment_bytes, -(-bytes_min // FILE_ALIGN) * FILE_ALIGN)
            # A larger segment than the one that is ready takes its place, and its number.
            number = self._ready[0] if self._ready else self._next
            if not self._prepare(number, size):
                raise LogFullError(self.full_reason)
            if not self._ready:
                self._ready.append(number)
                self._next += 1
            return self._pop()

    def _pop(self) -> tuple[int, int]:
        number = self._ready.popleft()
        return number, self._sizes[number]

    def _prepare(self, number: int, size: int) -> bool:
        """Make one segment file; False, and `full_reason` set, when there is no room."""
        others = self.total_bytes - self._sizes.get(number, 0)
        if self._log_bytes_max is not None and others + size > self._log_bytes_max:
            self.full_reason = f"the log may not be larger than {self._log_bytes_max} bytes"
            return False
        temporary = f"wal-{number:016d}.tmp"
        try:
            if self._disk.free_bytes() < size:
                self.full_reason = "the log's disk is full"
                return False
            file = self._disk.create(temporary)
            try:
                self._fill(file, number, size)
            finally:
                file.close()
            self._disk.rename(temporary, segment_name(number))
            self._disk.sync_dir()
        except DiskFullError:
            self._discard(temporary)
            self.full_reason = "the log's disk is full"
            return False
        self._sizes[number] = size
        self.full_reason = ""
        with self._maps_lock:
            self._maps.pop(number, None)  # a file that this one has replaced
        return True

    def _discard(self, name: str) -> None:
        try:
            self._disk.remove(name)
        except FileMissingError:
            return

    def _fill(self, file: File, number: int, size: int) -> None:
        for start in range(0, size, ZERO_BYTES):
            piece = min(ZERO_BYTES, size - start)
            file.write(start, [_ZEROS if piece == ZERO_BYTES else bytes(piece)])
            if (start + piece) % ZERO_SYNC_BYTES == 0:
                file.sync()
        header = pack_segment_header(self.log_id, number, size)
        file.write(0, [header])
        file.write(size - SEGMENT_HEADER_BYTES, [header])
        file.sync()

    def file(self, segment: int) -> File:
        """Return a segment's file for writing; kept open for the next call."""
        file = self._files.get(segment)
        if file is None:
            file = self._files[segment] = self._disk.open(segment_name(segment))
            while len(self._files) > FILES_MAX:
                self._files.popitem(last=False)[1].close()
        return file

    def map(self, segment: int) -> ByteArray:
        """Return a read-only view of a whole segment; bytes written later show in it.

        Good for as long as the caller keeps it, even when the file has been removed.
        """
        with self._maps_lock:
            view = self._maps.get(segment)
            if view is not None:
                self._maps.move_to_end(segment)
                return view
            file = self._disk.open(segment_name(segment))
            try:
                view = self._maps[segment] = file.map()
            finally:
                file.close()
            while len(self._maps) > MAPS_MAX:
                self._maps.popitem(last=False)
            return view

    def remove_before(self, floor: int) -> int:
        """Remove the segments below `floor`, which the caller no longer needs; return how many bytes that gave."""
        freed = 0
        for number in self.numbers():
            if number >= floor:
                break
            with self._maps_lock:
                self._maps.pop(number, None)
            file = self._files.pop(number, None)
            if file is not None:
                file.close()
            self._disk.remove(segment_name(number))
            freed += self._sizes.pop(number)
        if freed:
            self._disk.sync_dir()
        return freed

    def close(self) -> None:
        """Close what is open; views that were handed out stay valid."""
        for file in self._files.values():
            file.close()
        self._files.clear()
        with self._maps_lock:
            self._maps.clear()
