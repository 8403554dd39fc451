"""The `Log` port in memory: for tests, and for reading what the port means."""

from __future__ import annotations

from tallymark_protocol.errors import BackpressureError
from tallymark_store.replication.messages import Record, Tail
from tallymark_store.wal import DamagedError


class MemoryLog:
    """One partition's records in a list.

    Attributes:
        records: in order, tiling [0, log_end).
        room: how many more records it takes; None: as many as come.
        is_damaged: reads raise DamagedError.
    """

    def __init__(self, records: list[Record] | None = None) -> None:
        self.records: list[Record] = list(records or [])
        self.room: int | None = None
        self.is_damaged = False

    @property
    def log_start(self) -> int:
        """See `ports.Log`."""
        return 0

    @property
    def log_end(self) -> int:
        """See `ports.Log`."""
        return self.records[-1].end if self.records else 0

    def tail(self, below: int, count: int) -> Tail:
        """See `ports.Log`."""
        ends: dict[int, int] = {}
        for record in self.records:
            if record.end <= below:
                ends[record.meta.epoch] = record.end
        return list(ends.items())[-count:]

    def epoch_before(self, offset: int) -> int:
        """See `ports.Log`."""
        if offset == 0:
            return 0
        return next((record.meta.epoch for record in self.records if record.end == offset), -1)

    def append(self, records: list[Record]) -> None:
        """See `ports.Log`."""
        for record in records:
            assert record.meta.base_offset == self.log_end, "records tile the log"
            if self.room is not None:
                if self.room == 0:
                    raise BackpressureError("the log is full")
                self.room -= 1
            self.records.append(record)

    def truncate(self, new_end: int) -> None:
        """See `ports.Log`."""
        assert new_end == 0 or self.epoch_before(new_end) >= 0, "a log is cut between records"
        while self.records and self.records[-1].end > new_end:
            self.records.pop()

    def read(self, start: int, bytes_max: int) -> list[Record]:
        """See `ports.Log`."""
        if self.is_damaged:
            raise DamagedError("a record can't be read", partition=0)
        found: list[Record] = []
        size = 0
        for record in self.records:
            if record.meta.base_offset >= start:
                size += sum(len(part) for part in record.parts)
                if found and size > bytes_max:
                    break
                found.append(record)
        return found
