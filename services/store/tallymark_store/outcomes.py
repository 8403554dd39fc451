"""What became of the events of recent records, as far as not all of them were stored: to answer repeats with.

A repeated chunk is answered as it was first. The verdicts stand in its record; but the log may have dropped it, or may
never have held it where a copy began with a snapshot. So they are kept beside the producers' windows, for as long as
these remember chunks; and as nearly all events are stored, that is little. It is bounded all the same: beyond
`BYTES_MAX` the oldest go, and what became of a repeat of theirs is not known any more if the log doesn't say.

What goes is decided as records are folded, never by one that may yet be taken back: so what is kept is a function of
the log below the fold, the same on every copy, and belongs to its digest. Only a leader that has as much again waiting
for its fold lets go earlier.
"""

from __future__ import annotations

import hashlib
from collections import deque
from typing import Any

import msgspec
import numpy as np

from tallymark_protocol.errors import RemoteProtocolError
from tallymark_protocol.limits import PRODUCER_RETENTION_NS
from tallymark_store.prepared import Bytes, Ints, LoggedVerdicts

BYTES_MAX = 32 * 1024 * 1024
_ENTRY_BYTES = 200  # of memory, beside its arrays


class _Entry(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A record with others than accepted events."""

    base: int
    append_ns: int
    count: int  # of its events
    places: bytes  # u32: which of them, ascending
    reasons: bytes  # u8 each: an `errors.Reason`
    originals: bytes  # i64: as in the record

    @property
    def size(self) -> int:
        return _ENTRY_BYTES + len(self.places) + len(self.reasons) + len(self.originals)


class _Part(msgspec.Struct, frozen=True, array_like=True):
    floor: int
    entries: list[_Entry]


class Outcomes:
    """The verdicts of a partition's recent records. Records are noted in log order."""

    def __init__(self, *, bytes_max: int = BYTES_MAX) -> None:
        self._bytes_max = bytes_max
        self._floor = 0  # nothing is known of records below; above, what isn't here has accepted events only
        self._entries: dict[int, _Entry] = {}  # by base offset
        # In log order: those that are folded, and those that may yet be taken back.
        self._folded: deque[_Entry] = deque()
        self._waiting: deque[_Entry] = deque()
        self._folded_bytes = self._waiting_bytes = 0

    def note(self, base: int, append_ns: int, verdicts: Bytes | None, originals: Ints | None) -> None:
        """A record has these verdicts; None: all its events are accepted."""
        if verdicts is None:
            return
        places = np.flatnonzero(verdicts)
        if not len(places):
            return
        held = b"" if originals is None else originals.astype("<i8").tobytes()
        entry = _Entry(
            base, append_ns, len(verdicts), places.astype("<u4").tobytes(), verdicts[places].tobytes(), held
        )
        self._entries[base] = entry
        self._waiting.append(entry)
        self._waiting_bytes += entry.size
        while self._folded_bytes + self._waiting_bytes > 2 * self._bytes_max:
            self._drop_oldest()

    def advance(self, folded_end: int, folded_ns: int) -> None:
        """The log below `folded_end` is folded, its last record appended at `folded_ns`: what is too old, or too much, goes."""
        waiting, folded = self._waiting, self._folded
        while waiting and waiting[0].base < folded_end:
            entry = waiting.popleft()
            folded.append(entry)
            self._waiting_bytes -= entry.size
            self._folded_bytes += entry.size
        oldest_ns = folded_ns - PRODUCER_RETENTION_NS
        while folded and (self._folded_bytes > self._bytes_max or folded[0].append_ns < oldest_ns):
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        if self._folded:
            entry = self._folded.popleft()
            self._folded_bytes -= entry.size
        else:
            entry = self._waiting.popleft()
            self._waiting_bytes -= entry.size
        del self._entries[entry.base]
        self._floor = entry.base + 1

    def find(self, base: int) -> LoggedVerdicts | None:
        """The verdicts of the record at `base`; None if they are not known any more."""
        if base < self._floor:
            return None
        entry = self._entries.get(base)
        if entry is None:
            return LoggedVerdicts(base, None, np.empty(0, np.int64))
        verdicts = np.zeros(entry.count, np.uint8)
        verdicts[np.frombuffer(entry.places, "<u4")] = np.frombuffer(entry.reasons, np.uint8)
        return LoggedVerdicts(base, verdicts, np.frombuffer(entry.originals, "<i8"))

    def truncate(self, log_end: int) -> None:
        """Forget the records at and above `log_end`, none of which is folded."""
        assert not self._folded or self._folded[-1].base < log_end, "what is folded is never truncated"
        while self._waiting and self._waiting[-1].base >= log_end:
            entry = self._waiting.pop()
            self._waiting_bytes -= entry.size
            del self._entries[entry.base]
        self._floor = min(self._floor, log_end)  # what is written there now is known again

    def encode(self, end: int) -> bytes:
        """What is known of the records below `end`, for a checkpoint."""
        entries = [entry for part in (self._folded, self._waiting) for entry in part if entry.base < end]
        return msgspec.msgpack.encode(_Part(min(self._floor, end), entries))

    def digest(self, end: int) -> int:
        """A 128-bit digest of what is known of the records below `end`, the end of what is folded."""
        return int.from_bytes(hashlib.blake2b(self.encode(end), digest_size=16).digest(), "little")

    @classmethod
    def decode(cls, data: Any, *, bytes_max: int = BYTES_MAX) -> Outcomes:
        """Rebuild what `encode` gave.

        Raises:
            RemoteProtocolError: it can't be that.
        """
        try:
            part = msgspec.msgpack.decode(data, type=_Part)
        except (msgspec.DecodeError, TypeError) as error:
            raise RemoteProtocolError(f"malformed outcomes of records: {error}") from None
        outcomes = cls(bytes_max=bytes_max)
        outcomes._floor = part.floor
        before = -1
        for entry in part.entries:
            places = np.frombuffer(entry.places, "<u4") if len(entry.places) % 4 == 0 else None
            if (
                places is None
                or entry.base <= before
                or len(places) != len(entry.reasons)
                or len(entry.originals) % 8
                or len(places) == 0
                or int(places.max()) >= entry.count
            ):
                raise RemoteProtocolError("malformed outcomes of records")
            before = entry.base
            outcomes._entries[entry.base] = entry
            outcomes._folded.append(entry)
            outcomes._folded_bytes += entry.size
        return outcomes
