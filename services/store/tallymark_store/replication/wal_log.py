"""One partition's log in the write-ahead log, as its replica sees it: the `Log` port's real twin.

Owns the translation between the two, and one rule: what a sync says of the partition. The log groups records of all
partitions, and the sync of a group reports the log end that the partition had in it. After a truncation (or a reset)
the groups before the one that holds it report ends of bytes that are no longer in the log: they must not count, even
where the log has grown to that offset again. So `WalLog` remembers that group's number, and `durable_end` passes over
everything older.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tallymark_store.replication.membership import decode_members
from tallymark_store.replication.messages import Record, Tail
from tallymark_store.replication.ports import Membership
from tallymark_store.wal import PartitionIndex, RecordKind, Wal
from tallymark_store.wal.format import record_bytes


class WalLog:
    """The log of one partition; see the `Log` port for what its methods promise."""

    def __init__(self, wal: Wal, partition: int, on_written: Callable[[], None] = lambda: None) -> None:
        self._wal = wal
        self._indexes = wal.partitions
        self._on_written = on_written  # something waits for a sync
        self._partition = partition
        self._empty = PartitionIndex(partition)
        # Number of the group from which on syncs count. What is on its way now may have been written by a copy that
        # was here before this one, and has been discarded.
        self._barrier = wal.next_group

    @property
    def _index(self) -> PartitionIndex:
        return self._indexes.get(self._partition, self._empty)

    @property
    def log_start(self) -> int:
        """The first offset that is kept."""
        return self._index.log_start

    @property
    def log_end(self) -> int:
        """The next offset to be written."""
        return self._index.log_end

    def tail(self, below: int, count: int) -> Tail:
        """Where the last `count` epochs end, of the part of the log below offset `below`, oldest first.

        Of what lies before the log's start the last epoch is known.
        """
        index = self._index
        row = index.find(min(below, index.log_end) - 1)
        epochs, bases = index.column("epoch"), index.column("base_offset")
        found: Tail = []
        end = min(below, index.log_end)
        while row >= 0 and len(found) < count:
            epoch = int(epochs[row])
            found.append((epoch, end))
            first = int(epochs[: row + 1].searchsorted(epoch, side="left"))  # epochs never fall
            end = int(bases[first])
            row = first - 1
        start = index.log_start
        if 0 < start <= below and len(found) < count and (not found or found[-1][0] != index.start_epoch):
            found.append((index.start_epoch, start))
        found.reverse()
        return found

    def epoch_before(self, offset: int) -> int:
        """The epoch of the record that ends at `offset`; 0 at offset 0; -1 if no record is known to end there."""
        return self._index.epoch_before(offset)

    def append(self, records: Sequence[Record]) -> None:
        """Write records at the log's end.

        Raises:
            BackpressureError: there is no room; nothing, or only the first of them, was written.
            DamagedError: this copy takes nothing before it is reset.
        """
        for record in records:
            self._wal.append(record.meta, record.parts)
            self._on_written()

    def truncate(self, new_end: int) -> None:
        """Cut the log at a record boundary. Raises as `append` does."""
        index = self._index
        # Of no meaning for what it does; the same on every run.
        self._barrier = self._wal.truncate(
            self._partition, new_end, epoch=index.last_epoch(), append_ns=index.last_append_ns()
        )
        self._on_written()

    def reset(self, log_start: int = 0, *, epoch: int = 0, append_ns: int = 0) -> None:
        """Discard the copy: an empty log, undamaged, from `log_start` on. Raises as `append` does.

        `epoch` and `append_ns` are those of the record that ended there.
        """
        self._barrier = self._wal.reset(self._partition, log_start, epoch=epoch, append_ns=append_ns)
        self._on_written()

    def read(self, start: int, bytes_max: int) -> list[Record]:
        """Records from the boundary `start` on: at least one if there is one, and no more than fit `bytes_max`.

        None where no record begins there: such offsets come from other nodes, too. What isn't synced yet comes in the pieces it was written in, everything else as a view of the log's files.

        Raises:
            DamagedError: of this copy.
        """
        index = self._index
        row = index.find(start)
        records: list[Record] = []
        if row < 0 or index.column("base_offset", row, row + 1).item(0) != start:
            return records
        lengths = index.column("length")
        left = bytes_max
        while row < len(lengths):
            left -= record_bytes(lengths.item(row))
            if left < 0 and records:
                break
            meta, parts = self._wal.read_parts(self._partition, row)
            records.append(Record(meta, parts))
            row += 1
        return records

    def durable_end(self, group: int, end: int) -> int | None:
        """What the sync of a group says: everything below is on disk. None if it says nothing any more.

        Args:
            group: its number.
            end: the partition's log end in it.
        """
        return min(end, self.log_end) if group >= self._barrier else None

    def memberships(self) -> list[Membership]:
        """All memberships that the log records, ascending; those before its start are a checkpoint's to know.

        Raises:
            DamagedError: one of them cannot be read.
            RemoteProtocolError: one of them makes no sense.
        """
        index = self._index
        found = []
        kinds = index.column("kind")
        for row in (kinds == int(RecordKind.MEMBERSHIP)).nonzero()[0].tolist():
            meta, body = self._wal.read_record(self._partition, row)
            found.append(Membership(decode_members(body.tobytes()), meta.base_offset))
        return found
