"""The `Log` port in memory: for tests, and for reading what the port means."""

from __future__ import annotations

from tallymark_protocol.errors import BackpressureError
from tallymark_store.replication.messages import Record, Tail
from tallymark_store.wal import DamagedError


class MemoryLog:
    """One partition's records in a list.

    Attributes:
        records: in order, tiling [log_start, log_end).
        room: how many more records it takes; None: as many as come.
        is_damaged: reads raise DamagedError.
    """

    def __init__(self, records: list[Record] | None = None, *, start: int = 0, start_epoch: int = 0) -> None:
        self.records: list[Record] = list(records or [])
        self.room: int | None = None
        self.is_damaged = False
        self._start = start
        self._start_epoch = start_epoch  # of the record that ended at the start

    @property
    def log_start(self) -> int:
        """See `ports.Log`."""
        return self._start

    @property
    def start_epoch(self) -> int:
        """Of the record that ended at `log_start`."""
        return self._start_epoch

    @property
    def log_end(self) -> int:
        """See `ports.Log`."""
        return self.records[-1].end if self.records else self._start

    def tail(self, below: int, count: int) -> Tail:
        """See `ports.Log`."""
        ends: dict[int, int] = {}
        if 0 < self._start <= below:
            ends[self._start_epoch] = self._start
        for record in self.records:
            if record.end <= below:
                ends[record.meta.epoch] = record.end
        return list(ends.items())[-count:]

    def epoch_before(self, offset: int) -> int:
        """See `ports.Log`."""
        if offset == self._start:
            return self._start_epoch
        return next((record.meta.epoch for record in self.records if record.end == offset), -1)

    def trim(self, offset: int) -> None:
        """Forget the records below a boundary."""
        epoch = self.epoch_before(offset)
        assert epoch >= 0, "a log is trimmed between records"
        self.records = [record for record in self.records if record.end > offset]
        self._start, self._start_epoch = offset, epoch

    def reset(self, log_start: int = 0, *, epoch: int = 0) -> None:
        """Forget everything: an empty log, undamaged, from `log_start` on, where a record of this epoch ended."""
        self.records = []
        self.is_damaged = False
        self._start, self._start_epoch = log_start, epoch

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
        assert self.epoch_before(new_end) >= 0, "a log is cut between records"
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
