"""The invariants, by their numbers, looked at after every turn of every store, and at the end.

An omniscient observer: it keeps the one log that was ever committed, record by record, as whoever commits first has
it, and holds everybody else to it. `Model` reads that log along and says what its verdicts must be.
"""

from __future__ import annotations

import bisect
import functools
import random
from collections import defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple

import google_crc32c
import numpy as np

from tallymark_protocol.payload import COLUMNS
from tallymark_store.partition import Partition
from tallymark_store.replication.effects import Role
from tallymark_store.replication.ports import DurableState
from tallymark_store.replication.replica import Replica
from tallymark_store.store import Store
from tallymark_store.wal import DamagedError, PartitionIndex, Position, RecordKind, RecordMeta, Wal

from .alerts import Crossings
from .archives import check_archive
from .clients import Ledger, Part
from .logbook import ACCEPTED, LoggedEvent, Model, parse_batch
from .loop import SECOND, SimulationError, World
from .process import Process
from .trace import Trace


class Committed(NamedTuple):
    """A record as it was committed first."""

    base: int
    count: int
    kind: int
    epoch: int
    append_ns: int
    checksum: int


class CommittedLog:
    """What was committed, as a log that was never dropped: to count it again."""

    def __init__(self, number: int, records: list[Committed], payloads: list[np.ndarray]) -> None:
        index = PartitionIndex(number)
        self._records = []
        for record, payload in zip(records, payloads, strict=True):
            meta = RecordMeta(number, record.kind, record.epoch, record.base, record.count, record.append_ns)
            index.append(meta, segment=0, position=0, length=len(payload))
            self._records.append((meta, payload))
        self.partitions = {number: index}

    def read(self, number: int, offset: int) -> tuple[RecordMeta, Any]:
        """As `Wal.read` does."""
        return self._records[self.partitions[number].find(offset)]


class Gone(NamedTuple):
    """A copy that has begun anew as another."""

    end: int  # up to where it was on disk
    at_ns: int  # when it was
    epochs: dict[int, int]  # of its records, by where they end


def epochs_of(index: PartitionIndex) -> dict[int, int]:
    """The epochs of a log's records, by where they end."""
    ends = (index.column("base_offset") + index.column("count")).tolist()
    return {index.log_start: index.start_epoch} | dict(zip(ends, index.column("epoch").tolist(), strict=True))


class Seen:
    """What one copy showed last."""

    __slots__ = (
        "applied",
        "copy_id",
        "damaged",
        "epochs",
        "high_watermark",
        "life",
        "log_end",
        "promised",
        "promised_by",
        "role",
        "state",
    )

    def __init__(self) -> None:
        self.life = 0
        self.copy_id = ""
        self.high_watermark = 0
        self.applied = 0
        self.log_end = 0
        self.role = Role.FOLLOWER
        self.damaged = ""  # copy id under which it was damaged, in this life
        self.epochs: dict[int, int] = {}  # of its records then, by where they end
        self.promised = 0  # also of earlier lives
        self.promised_by = ""  # the copy that promised
        self.state: DurableState | None = (
            None  # which all of the above was compared with; never changes itself
        )


class Checkers:
    """All of them, for all partitions."""

    def __init__(
        self,
        world: World,
        rng: random.Random,
        trace: Trace,
        ledger: Ledger,
        processes: dict[str, Process],
        partitions: int,
    ) -> None:
        self.committed: list[list[Committed]] = [[] for _ in range(partitions)]
        self._gone: dict[tuple[int, str], Gone] = {}  # by partition and copy id
        self.ends = [0] * partitions  # of what is known to be committed; exclusive
        self.models = [Model(number) for number in range(partitions)]
        self.crossings = [Crossings(number) for number in range(partitions)]
        self.accepted: list[list[LoggedEvent]] = [[] for _ in range(partitions)]  # of `committed`, by offset
        self.commits = 0
        self.leaderships: list[dict[int, tuple[str, int]]] = [{} for _ in range(partitions)]  # epoch -> who
        self.digests_compared = 0
        self._payloads: list[list[np.ndarray]] = [[] for _ in range(partitions)]  # of `committed`
        self._rows: list[dict[int, int]] = [
            {} for _ in range(partitions)
        ]  # base offset -> position in `committed`
        self._digests: list[dict[int, tuple[str, str]]] = [{} for _ in range(partitions)]
        self._seen: defaultdict[str, dict[int, Seen]] = defaultdict(dict)  # by process, then by partition
        # By process: its replicas, partitions and the log's indexes as they were found right last, and what was compared.
        self._glances: dict[
            str, tuple[Any, Any, Any, list[tuple[Seen, Replica, Partition, PartitionIndex]]]
        ] = {}
        self._world = world
        self._rng = rng
        self._trace = trace
        self._ledger = ledger
        self._processes = processes
        self._early: list[list[Part]] = [[] for _ in range(partitions)]

    # ------------------------------------------------------------ during the run

    def after_turn(self, process: Process, store: Store) -> bool:
        """LOG-2, LOG-3, LOG-4, and that a majority has what is said to be committed; whether anything is new.

        Most turns change nothing of a copy: that is seen at a glance.
        """
        partitions, replicas, indexes = store.partitions, store.replicas, store.wal.partitions
        glance = self._glances.get(process.name)
        # Three dictionaries of the very same objects, and nothing of theirs has moved.
        if glance and glance[0] == replicas and glance[1] == partitions and glance[2] == indexes:
            for seen, replica, partition, index in glance[3]:
                if (
                    seen.state is not replica.state
                    or seen.log_end != index.log_end
                    or seen.applied != partition.fold.applied
                    or seen.high_watermark != replica.high_watermark
                    or seen.role is not replica.role
                ):
                    break
            else:
                return False
        copies = self._seen[process.name]
        life = process.life
        has_changed = False
        found = []
        for number, replica in replicas.items():
            partition = partitions.get(number)
            if partition is None:
                continue
            seen = copies.get(number)
            if seen is None:
                seen = copies[number] = Seen()
            found.append((seen, replica, partition, partition.index))
            if (
                seen.state is replica.state
                and seen.log_end == partition.index.log_end
                and seen.applied == partition.fold.applied
                and seen.high_watermark == replica.high_watermark
                and seen.role is replica.role
                and seen.life == life
            ):
                continue  # all that is looked at below is as it was when it was found to be right
            has_changed = True
            if (seen.life, seen.copy_id) != (process.life, replica.copy_id):
                if seen.life == process.life and seen.copy_id not in ("", replica.copy_id):
                    # A damaged copy begins anew. What it had on disk when it said so may be counted a moment longer,
                    # as that of a disk that was lost, under its own id only; nobody elects a leader with it.
                    end = process.durable_ends.get(number, 0)
                    self._gone[number, seen.copy_id] = Gone(end, self._world.now_ns, seen.epochs)
                seen.damaged = seen.damaged if seen.life == process.life else ""
                seen.epochs = {}
                seen.life, seen.copy_id = process.life, replica.copy_id
                seen.high_watermark = seen.applied = seen.log_end = 0
                seen.role = Role.FOLLOWER
            if replica.promised != seen.promised and replica.role is not Role.DAMAGED:
                if replica.promised < seen.promised and seen.promised_by == replica.copy_id:
                    raise SimulationError(
                        f"LOG-3: {process} partition {number} has promised {seen.promised}, and now only "
                        f"{replica.promised}"
                    )
                seen.promised, seen.promised_by = replica.promised, replica.copy_id
            if replica.role is not Role.FOLLOWER and replica.role is not seen.role:
                self._became(process, number, seen, replica)
            seen.role = replica.role
            if seen.damaged == replica.copy_id and replica.role is not Role.DAMAGED:
                raise SimulationError(
                    f"LOG-1: {process} partition {number}: a damaged copy counts again under its id"
                )
            high_watermark, applied = replica.high_watermark, partition.applied
            if high_watermark != seen.high_watermark or applied != seen.applied:
                self._moved(process, number, seen, high_watermark, applied)
            seen.log_end = partition.log_end
            if seen.log_end < high_watermark:
                raise SimulationError(
                    f"LOG-4: {process} partition {number}: the log ends at {seen.log_end}, below {high_watermark}"
                )
            seen.state = replica.state
        self._glances[process.name] = dict(replicas), dict(partitions), dict(indexes), found
        return has_changed

    def _became(self, process: Process, number: int, seen: Seen, replica: Replica) -> None:
        """LOG-1: whoever takes over has everything that was ever committed."""
        if replica.role is Role.DAMAGED:
            seen.damaged = replica.copy_id
            store = process.store
            index = None if store is None else store.wal.partitions.get(number)
            if index is not None:
                seen.epochs = epochs_of(index)
        elif replica.role in (Role.STARTING, Role.LEADER) and self.committed[number]:
            last, end = self.committed[number][-1], self.ends[number]
            if replica.log.log_end < end or replica.log.epoch_before(end) != last.epoch:
                raise SimulationError(
                    f"LOG-1: {process} takes over partition {number} with a log to {replica.log.log_end}, without "
                    f"{last}, which was committed"
                )

    def recovered(self, process: Process, wal: Wal) -> None:
        """LOG-5: what was on disk is there after a restart, or is known to be damaged."""
        for number, durable_end in process.durable_ends.items():
            seen = self._seen[process.name].get(number)
            index = wal.partitions.get(number)
            if seen is None or (wal._writer.unproven if index is None else index.damaged):
                continue  # nothing known of it, or known to be damaged
            end = min(durable_end, seen.high_watermark)
            found = 0 if index is None else index.log_end
            if found < end and not (index is None and process.wiped):
                raise SimulationError(
                    f"LOG-5: {process} partition {number} was committed and on disk to {end}, and ends at {found} after "
                    f"a restart, as if nothing was wrong"
                )

    def _moved(self, process: Process, number: int, seen: Seen, high_watermark: int, applied: int) -> None:
        where = f"{process} partition {number}"
        if high_watermark < seen.high_watermark or applied < seen.applied:
            raise SimulationError(
                f"LOG-4: {where}: from high watermark {seen.high_watermark}, applied {seen.applied} back to "
                f"{high_watermark}, {applied}"
            )
        if applied > high_watermark:
            raise SimulationError(
                f"LOG-4: {where}: applied {applied} above the high watermark {high_watermark}"
            )
        if high_watermark > seen.high_watermark:
            self._advance(process, number, seen.high_watermark, high_watermark)
        seen.high_watermark = high_watermark
        if applied > seen.applied:
            seen.applied = applied
            if self._rng.random() < 0.05:
                self.compare_digest(process, number)

    def _advance(self, process: Process, number: int, start: int, end: int) -> None:
        store = process.store
        assert store is not None
        replica = store.replicas[number]
        index = store.wal.partitions[number]
        if end > self.ends[number]:
            self._check_commit(process, number, end)
        at = start
        if start < index.log_start:
            # It was dropped, or a snapshot has taken its place: that must be something that is committed.
            at = index.log_start
            last = None if self.ends[number] < at else self._ending(number, at)
            if last is None or (last.epoch, last.append_ns) != (index.start_epoch, index.start_append_ns):
                raise SimulationError(
                    f"LOG-2: {process} partition {number} has a log that begins at {at}, behind a record of epoch "
                    f"{index.start_epoch} and time {index.start_append_ns}; committed is {last}"
                )
        row = index.find(at)
        while at < end:
            try:
                meta, payload = store.wal.read_record(number, row)
            except DamagedError:
                if process.is_tainted:
                    return  # the node has not noticed yet
                raise
            record = Committed(
                meta.base_offset,
                meta.count,
                int(meta.kind),
                meta.epoch,
                meta.append_ns,
                google_crc32c.value(payload.tobytes()),
            )
            known = self._rows[number].get(record.base)
            if known is not None:
                if self.committed[number][known] != record:
                    raise SimulationError(
                        f"LOG-2: {process} partition {number} has committed {record}, others "
                        f"{self.committed[number][known]}"
                    )
            elif record.base != self.ends[number]:
                raise SimulationError(
                    f"LOG-2: {process} partition {number} has committed {record}, which is no record of the others"
                )
            else:
                self._add(number, record, payload)
            at = record.base + record.count
            row += 1
        if at != end:
            raise SimulationError(
                f"LOG-4: {process} partition {number}: the high watermark {end} is inside a record"
            )
        self._trace(
            process.name,
            "partition %d is committed to %d (%s, epoch %d)",
            number,
            end,
            replica.role.value,
            replica.epoch,
        )

    def _append_ns(self, number: int, offset: int) -> int:
        """When a committed event was appended: its own time, too, as none is sent with one."""
        at = bisect.bisect_right(self.committed[number], offset, key=lambda record: record.base) - 1
        return self.committed[number][at].append_ns

    def _ending(self, number: int, offset: int) -> Committed | None:
        """The committed record that ends at an offset."""
        at = bisect.bisect_left(self.committed[number], offset, key=lambda record: record.base) - 1
        found = self.committed[number][at] if at >= 0 else None
        return found if found is not None and found.base + found.count == offset else None

    def _add(self, number: int, record: Committed, payload: Any) -> None:
        self._rows[number][record.base] = len(self.committed[number])
        # A copy: what is on a disk may rot.
        self._payloads[number].append(np.frombuffer(bytes(payload), np.uint8))
        previous = self.committed[number][-1] if self.committed[number] else None
        if previous is not None and record.epoch < previous.epoch:
            raise SimulationError(f"LOG-3: partition {number}: the epoch falls from {previous} to {record}")
        if previous is not None and record.append_ns < previous.append_ns:
            raise SimulationError(f"LOG-3: partition {number}: log time falls from {previous} to {record}")
        self.committed[number].append(record)
        self.ends[number] = record.base + record.count
        self.commits += 1
        logged = None
        if record.kind == RecordKind.EVENTS:
            logged = parse_batch(record.base, payload)
            self.models[number].take(logged)
            self.accepted[number] += [event for event in logged.events if event.verdict == ACCEPTED]
        self.crossings[number].take(record.kind, payload, record.append_ns, logged)

    def _check_commit(self, process: Process, number: int, end: int) -> None:
        """Whoever says first that something is committed: one leader an epoch, and a majority has it on disk."""
        store = process.store
        assert store is not None
        replica = store.replicas[number]
        if replica.role not in (Role.LEADER, Role.STARTING):
            return  # its leader has died since, or has stepped down in the same turn
        who = (process.name, process.life)
        known = self.leaderships[number].setdefault(replica.epoch, who)
        if known != who:
            raise SimulationError(
                f"LOG-3: partition {number} epoch {replica.epoch}: {process} commits, and so has {known[0]}"
            )
        last_epoch = replica.log.epoch_before(end)
        if last_epoch != replica.epoch:
            raise SimulationError(
                f"LOG-3: {process} says in epoch {replica.epoch} that partition {number} is committed to {end}, where a "
                f"record of epoch {last_epoch} ends"
            )
        holders = []
        members = replica.membership.members
        for member in members:
            other = self._processes.get(member.node_id)
            if self._had(number, member.copy_id, end, last_epoch) or (
                other is not None and self._has(other, number, end, last_epoch)
            ):
                holders.append(member.node_id)
        if len(holders) <= len(members) // 2:
            raise SimulationError(
                f"LOG-1: {process} says that partition {number} is committed to {end}, but of its members "
                f"{[m.node_id for m in members]} only {holders} have that on disk"
            )

    def _had(self, number: int, copy_id: str, end: int, epoch: int) -> bool:
        """Whether a copy that has begun anew as another one, just now, had this log up to `end`, when it said so."""
        gone = self._gone.get((number, copy_id))
        if gone is None or gone.end < end or self._world.now_ns - gone.at_ns >= 3 * SECOND:
            return False
        # What lies before its log's start was committed, and so is the same everywhere.
        return end < min(gone.epochs, default=0) or gone.epochs.get(end) == epoch

    def _has(self, process: Process, number: int, end: int, epoch: int) -> bool:
        """Whether a copy surely has the log up to `end` on its disk. One that is down is believed to."""
        if process.lost_ends.get(number, 0) >= end and self._world.now_ns - process.lost_ns < 3 * SECOND:
            return True  # it had, when it said so
        if process.store is None:
            return process.durable_ends.get(number, 0) >= end
        index = process.store.wal.partitions.get(number)
        if index is not None and 0 < end <= index.log_start:
            # It is in a checkpoint; or in a snapshot that is, once the log that begins with it is on disk.
            return process.durable_ends.get(number, 0) >= end
        at = -1 if index is None else index.find(end - 1)
        if index is None or at < 0:
            return False
        row = index.row(at)
        is_synced = Position(row.segment, row.position) < process.store.wal.synced_end
        return is_synced and row.base_offset + row.count == end and row.epoch == epoch

    def answered(self, part: Part) -> None:
        """LOG-1 and DEDUP-1: what was acknowledged is committed, and the log says what the answer said."""
        if part.is_async:
            return
        self.check_answer(part)

    def check_answer(self, part: Part) -> None:
        """The log's word against the answer's."""
        logged = self.models[part.partition].chunks.get(part.identity)
        if logged is None:
            raise SimulationError(
                f"LOG-1: {part} was acknowledged at {part.outcome}, but is not in what is committed, which ends at "
                f"{self.ends[part.partition]}"
            )
        if logged != part.outcome:
            raise SimulationError(f"DEDUP-1: {part} was answered {part.outcome}, but the log says {logged}")

    def compare_digest(self, process: Process, number: int) -> None:
        """FOLD-1: one applied offset, one state."""
        assert process.store is not None
        partition = process.store.partitions[number]
        digest = partition.digest()
        known = self._digests[number].setdefault(partition.applied, (digest, process.name))
        self.digests_compared += 1
        if known[0] != digest:
            raise SimulationError(
                f"FOLD-1: partition {number} at {partition.applied}: {process} has {digest}, {known[1]} has {known[0]}"
            )

    # ------------------------------------------------------------ after healing

    def at_rest(self, members: Iterable[tuple[Process, int]], salt: int) -> None:
        """Everything that was acknowledged is there, once; every copy is the log's and only the log's doing."""
        for part in self._ledger.parts.values():
            if part.outcome is not None and not part.is_async:
                self.check_answer(part)
        recounted: set[int] = set()
        for process, number in members:
            store = process.store
            assert store is not None
            partition = store.partitions[number]
            if partition.applied != self.ends[number]:
                raise SimulationError(
                    f"LIVE-1: {process} partition {number} has applied {partition.applied} of {self.ends[number]}"
                )
            self.compare_digest(process, number)
            index = store.wal.partitions[number]
            kept = [record for record in self.committed[number] if record.base >= index.log_start]
            for row, record in enumerate(kept):
                try:
                    meta, payload = store.wal.read_record(number, row)
                except DamagedError:
                    if process.is_tainted:
                        break  # nobody has read it yet: known to be bad when somebody does
                    raise
                found = Committed(
                    meta.base_offset,
                    meta.count,
                    int(meta.kind),
                    meta.epoch,
                    meta.append_ns,
                    google_crc32c.value(payload.tobytes()),
                )
                if found != record:
                    raise SimulationError(f"LOG-2: {process} partition {number} holds {found}, not {record}")
            if index.log_end < self.ends[number]:
                raise SimulationError(f"LOG-1: {process} partition {number} ends at {index.log_end}")
            check_archive(process, number, self.accepted[number], functools.partial(self._append_ns, number))
            if number not in recounted and not process.is_tainted:
                recounted.add(number)
                book = CommittedLog(number, self.committed[number], self._payloads[number])
                counted = Partition(
                    number, dedup_window_ns=partition.dedup_window_ns, indexes=book.partitions, salt=salt
                )
                columns = np.zeros(COLUMNS, dtype=np.int64)
                while counted.applied < partition.applied:  # one after the other, as stores mostly don't
                    counted.apply_logged(*book.read(number, counted.applied), columns)
                if counted.digest() != partition.digest():
                    raise SimulationError(
                        f"FOLD-1: {process} partition {number} is not what its log counts to"
                    )
