"""What a log's records and markers add up to: the partitions' indexes, and which of them can't be trusted.

Fed by `scan` with what lies in the log, in log order; knows nothing of files. The rule is that nothing is
trusted without proof. A partition's records are numbered: as long as no number is missing and all checksums
are right, its copy is whole. Where the log is unreadable in a way that records may have vanished (a **gap**),
each partition's next record, or the next marker's line about it, shows whether any of its own did; a partition
about which nothing follows is damaged, as nobody can say that it isn't. A damaged copy keeps the rows before
the damage, and takes nothing more until a reset discards it.
"""

from __future__ import annotations

import msgspec

from tallymark_store.wal.format import (
    ENTRY_DAMAGED,
    MarkerEntry,
    Position,
    RecordHeader,
    RecordKind,
    segment_name,
)
from tallymark_store.wal.index import PartitionIndex


class Damage(msgspec.Struct, frozen=True):
    """Bytes of the log that were once synced and are no longer what they were."""

    partition: (
        int | None
    )  # whose copy it damages; None: nobody's, as everything in the file could be verified
    segment: int
    file: str
    position: int  # where in the file the bad bytes are or begin
    offset: int  # the partition's copy is good below this offset, exclusive
    sentence: str  # what was found, for a person


class Replay:
    """The state of a log up to the last thing that was fed.

    `partitions` may come from a checkpoint, and is taken over. `unproven` says that partitions may have been
    in the log of which no trace is left.
    """

    def __init__(self, partitions: dict[int, PartitionIndex], *, unproven: bool = False) -> None:
        self.partitions = partitions
        self.unproven = unproven
        self.damages: dict[int, Damage] = {}  # of partitions
        self.findings: list[Damage] = []  # of nobody
        self._gaps: list[tuple[Position, str]] = []  # where records may have vanished, and how
        self._proven: dict[int, int] = {}  # how many of the gaps a partition is known to have come through
        for index in partitions.values():
            if index.damaged:
                self.damage(index, Position(-1, 0), "was known to be damaged at the checkpoint")

    def gap(self, place: Position, sentence: str) -> None:
        """Note that records may have vanished at `place`."""
        self._gaps.append((place, sentence))
        self.unproven = True

    def finding(self, place: Position, sentence: str) -> None:
        """Note damage by which nothing was lost."""
        self.findings.append(
            Damage(None, place.segment, segment_name(place.segment), place.position, 0, sentence)
        )

    def damage(self, index: PartitionIndex, place: Position, sentence: str) -> None:
        """Distrust a partition's copy from its present end on; the first reason is the one that is kept."""
        index.damaged = True
        if index.partition not in self.damages:
            name = segment_name(place.segment) if place.segment >= 0 else ""
            self.damages[index.partition] = Damage(
                index.partition,
                place.segment,
                name,
                place.position,
                index.log_end,
                f"partition {index.partition}: {sentence}",
            )

    def record(self, header: RecordHeader, place: Position, *, payload_good: bool) -> None:
        """Add a record whose header is good."""
        meta = header.meta
        index = self.partitions.get(meta.partition)
        if index is None:
            index = self.partitions[meta.partition] = PartitionIndex(meta.partition)
        if meta.kind == RecordKind.RESET:
            index.reset(meta.base_offset, epoch=meta.epoch, append_ns=meta.append_ns)
            index.next_sequence = header.sequence + 1
            self.damages.pop(meta.partition, None)
            self._proven[meta.partition] = len(self._gaps)
            return
        if index.damaged:
            return
        problem = self._problem(index, header, payload_good)
        if problem:
            self._lost(index, place, problem)
            return
        index.next_sequence += 1
        self._proven[meta.partition] = len(self._gaps)
        if meta.kind == RecordKind.TRUNCATION:
            index.truncate(meta.base_offset)
        else:
            index.append(meta, segment=place.segment, position=place.position, length=header.payload_bytes)

    @staticmethod
    def _problem(index: PartitionIndex, header: RecordHeader, payload_good: bool) -> str:
        meta = header.meta
        if header.sequence != index.next_sequence:
            return (
                f"record {header.sequence} (offset {meta.base_offset}) follows record {index.next_sequence - 1}, "
                f"which ended at offset {index.log_end}: what lay between them is missing"
            )
        if not payload_good:
            return f"the record of offsets [{meta.base_offset}, {meta.base_offset + meta.count}) fails its checksum"
        if meta.kind == RecordKind.TRUNCATION:
            inside = index.log_start <= meta.base_offset <= index.log_end and index.is_boundary(
                meta.base_offset
            )
            return (
                "" if inside else f"a truncation to offset {meta.base_offset} doesn't fit the log before it"
            )
        if meta.base_offset != index.log_end or meta.count < 1:
            return f"a record at offset {meta.base_offset} follows the end at offset {index.log_end}"
        return ""

    def marker(self, entries: list[MarkerEntry], place: Position, *, complete: bool) -> None:
        """Compare with what the log itself recorded of all its partitions."""
        for entry in entries:
            index = self.partitions.get(entry.partition)
            if index is None:
                index = self.partitions[entry.partition] = PartitionIndex(entry.partition)
            if index.damaged:
                continue
            if entry.flags & ENTRY_DAMAGED:
                self.damage(index, place, "was recorded as damaged before")
            elif (entry.next_sequence, entry.log_end) != (index.next_sequence, index.log_end):
                self._lost(
                    index,
                    place,
                    f"the log was recorded to end at offset {entry.log_end} and record {entry.next_sequence}, and "
                    f"ends at offset {index.log_end} and record {index.next_sequence}",
                )
            else:
                self._proven[entry.partition] = len(self._gaps)
        self.unproven = not complete

    def finish(self) -> None:
        """Damage whatever isn't proven: called once, at the log's end."""
        for index in self.partitions.values():
            if not index.damaged and self._proven.get(index.partition, 0) < len(self._gaps):
                self._lost(
                    index,
                    self._gaps[-1][0],
                    f"nothing proves that no record after offset {index.log_end} was lost",
                )

    def _lost(self, index: PartitionIndex, place: Position, sentence: str) -> None:
        """Damage a partition; where gaps have come since its last proof, the first of them is the place."""
        proven = self._proven.get(index.partition, 0)
        if proven < len(self._gaps):
            gap, reason = self._gaps[proven]
            self.damage(index, gap, f"{sentence}; {reason}")
        else:
            self.damage(index, place, sentence)
