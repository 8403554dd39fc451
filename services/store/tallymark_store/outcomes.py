"""What became of the events of recent records, as far as not all of them were stored: to answer repeats with.

A repeated chunk is answered as it was first. The verdicts stand in its record; but the log may have dropped it, or may
never have held it where a copy began with a snapshot. So they are kept beside the producers' windows, for as long as
these remember chunks; and as nearly all events are stored, that is little. It is bounded all the same: beyond
`BYTES_MAX` the oldest go, and what became of a repeat of theirs is not known any more if the log doesn't say.
"""

from __future__ import annotations

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
        self._entries: dict[int, _Entry] = {}  # by base offset, in log order
        self._bytes = 0

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
        self._bytes += entry.size
        while self._entries:
            oldest = next(iter(self._entries.values()))
            if self._bytes <= self._bytes_max and oldest.append_ns >= append_ns - PRODUCER_RETENTION_NS:
                break
            self._forget(oldest)
            self._floor = oldest.base + 1

    def _forget(self, entry: _Entry) -> None:
        del self._entries[entry.base]
        self._bytes -= entry.size

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
        """Forget the records at and above `log_end`."""
        for entry in [entry for base, entry in self._entries.items() if base >= log_end]:
            self._forget(entry)

    def encode(self, end: int) -> bytes:
        """What is known of the records below `end`, for a checkpoint."""
        return msgspec.msgpack.encode(
            _Part(self._floor, [entry for base, entry in self._entries.items() if base < end])
        )

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
            outcomes._bytes += entry.size
        return outcomes
