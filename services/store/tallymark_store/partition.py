"""One copy of a partition: the judge's state, the fold, and at a leader what waits for the commit.

Pure: payloads, records, times and positions come in, records and answers go out. The driver (`store.py`) owns the
log, the network and the order of things. At a leader:

    prepare(payload) -> Prepared     judged, nothing changed yet but the dedup index
    driver appends the record
    appended(prepared)               windows, positions, the fold's queue
    commit(offset)                   returns the answers that may now be sent
    fold_step()                      folds one committed record

Every answer carries the offset below which everything must be committed before it is sent: an answer that
relies on an earlier event (a repeat, a duplicate) is never ahead of that event.

Everywhere else the judge (dedup index, producer windows, schemas) stands where the fold stands, and both take
committed records from the log (`apply_logged`): what is not committed leaves no trace. Who begins to lead brings the
judge to the log's end first (`judge_logged`); who stops takes it back (`demote`).

    applied <= judged_end <= log end        a leader's judge: judged_end == log end; else: judged_end == applied
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from tallymark_protocol import limits
from tallymark_protocol.errors import ErrorCode, Reason, RemoteProtocolError, WireError
from tallymark_protocol.layout import ABSENT, PLAIN
from tallymark_protocol.messages import Appended, ChunkOutcome
from tallymark_protocol.payload import (
    C_EVENTS,
    C_ID_ENCODING,
    C_TIME_ENCODING,
    OK,
    explain,
    metric_codes,
    place_payload,
)
from tallymark_protocol.schema import MetricRecord, decode_record
from tallymark_store import batch, runs
from tallymark_store.dedup import NEW, REPEAT, REUSED, UNKNOWN, DedupIndex, ProducerWindows
from tallymark_store.fold import Fold, SchemaTable
from tallymark_store.holding import Hold
from tallymark_store.judge import WANTS_LOOKUP, event_keys, judge_events, sealed_events, time_range
from tallymark_store.outcomes import Outcomes
from tallymark_store.prepared import (
    HIGH_WORD,
    Bytes,
    FoldItem,
    Ints,
    JudgedChunks,
    LoggedVerdicts,
    Prepared,
    Words,
    chunk_words,
    exceptions_of,
)
from tallymark_store.runs import RUN_BODY_BYTES_MAX, RUN_BYTES_MAX, RUN_RECORDS_MAX, Run
from tallymark_store.wal import PartitionIndex, RecordKind, RecordMeta
from tallymark_store.window_times import WindowTimes

# What the producer windows take of a row of a chunk table: producer, sequence, checksum | count << 32, and first sent to judge by, or
# three places of their own to remember it.
_JUDGED_WORDS = np.array([0, 1, 3, 2])
_REMEMBERED_WORDS = np.array([0, 1, 3, 0, 0, 0])

_REPEAT_VERDICT = int(Reason.REPEAT)
_ACCEPTED = int(Reason.ACCEPTED)


class Partition:
    """The leader's side of one partition. See the module for the order of calls."""

    def __init__(
        self,
        partition: int,
        *,
        dedup_window_ns: int,
        indexes: Mapping[int, PartitionIndex],
        salt: int = 0,
    ) -> None:
        # The salt is this process's own: without it, clients could choose ids that collide in the tables.
        self.partition = partition
        self.dedup_window_ns = dedup_window_ns
        self._indexes = indexes  # the log's; a partition is in it from its first record on
        self._no_index = PartitionIndex(partition)
        self.epoch = 0  # of this leadership; 0 while there is none
        self.epoch_due = False  # there was no room for the epoch's first record; due before the next append
        self.error: WireError | None = None  # why the partition is not served
        self.schemas_stale = False  # a schema change could not be written; due before the next append
        # Exclusive; everything below is committed. applied <= high_watermark <= log end
        self.high_watermark = self.log_end
        # Exclusive: up to where schemas, dedup index and producer windows know the log.
        self.judged_end = 0
        self.schemas = SchemaTable()  # as of `judged_end`
        self.dedup = DedupIndex(salt=salt)  # likewise, uncommitted suffix included
        self.windows = ProducerWindows(salt=salt)  # likewise
        self.outcomes = Outcomes()  # likewise
        self.times = WindowTimes(dedup_window_ns)  # of what the log has dropped
        self.fold = Fold(partition, hash_seed=salt)  # as of `fold.applied`
        self.hold = Hold(self)
        self.last_append_ns = 0  # of the last record below `judged_end`
        # Appended by this leader, not folded, without a gap; what lies before the first of them is folded from the log.
        self._queue: deque[FoldItem] = deque()
        self._alerting: deque[int] = (
            deque()
        )  # base offsets of those in it that may raise alerts; see `may_alert`
        # (commit offset, send, fail), in log order
        self._waiting: deque[tuple[int, Callable[[], None], Callable[[], None] | None]] = deque()
        self._work = np.zeros(32, dtype=np.uint64)

    @property
    def index(self) -> PartitionIndex:
        """Where the partition's records lie."""
        return self._indexes.get(self.partition, self._no_index)

    @property
    def log_end(self) -> int:
        """The next offset to be written."""
        return self.index.log_end

    @property
    def applied(self) -> int:
        """The offset below which everything is in the cells; exclusive."""
        return self.fold.applied

    def stamp(self, now_ns: int) -> int:
        """The append time for a record written now: log time never decreases."""
        return max(now_ns, self.last_append_ns)

    def dedup_floor(self, append_ns: int) -> int:
        """The first offset whose ids are still remembered at `append_ns`: a pure function of the log."""
        return self.times.floor(self.index, append_ns)

    # ------------------------------------------------------------ append

    def prepare(
        self,
        payload: Bytes,
        columns: Ints,
        checksum: int,
        slots: Ints,
        now_ns: int,
        read_verdicts: Callable[[int], LoggedVerdicts],
    ) -> Prepared:
        """Judge a validated payload. `read_verdicts(base_offset)` reads a logged batch's verdict column.

        Only the dedup index remembers something already (`DedupIndex.judge` inserts as it looks up). Where the
        record then does not get into the log, or this raises, the driver calls `back_out`.
        """
        n = int(columns[C_EVENTS])
        append_ns = self.stamp(now_ns)
        base = self.log_end
        words = chunk_words(payload, columns)
        counts = (words[:, 3] >> HIGH_WORD).view(np.int64)
        first_offsets = counts.cumsum()
        first_offsets += base - counts
        judged, new = self._judge_chunks(words, append_ns)
        if new != len(words):
            return self._prepare_mixed(
                payload, columns, checksum, slots, append_ns, words, first_offsets, judged, read_verdicts
            )
        verdicts = np.zeros(n, dtype=np.uint8)
        originals, accepted = self._judge(payload, columns, slots, append_ns, verdicts)
        if accepted == n:
            answer = Appended(None, base)
            return self._record(
                payload,
                columns,
                checksum,
                append_ns,
                None,
                None,
                answer,
                words,
                judged.verdicts,
                first_offsets,
                accepted,
                slots,
            )
        outcomes = [
            ChunkOutcome(first, exceptions_of(verdicts, originals, first - base, count))
            for first, count in zip(first_offsets.tolist(), counts.tolist(), strict=True)
        ]
        return self._record(
            payload,
            columns,
            checksum,
            append_ns,
            verdicts,
            originals,
            Appended(outcomes, base),
            words,
            judged.verdicts,
            first_offsets,
            accepted,
            slots,
        )

    def _judge_chunks(self, words: Words, append_ns: int) -> tuple[JudgedChunks, int]:
        k = len(words)
        judged = JudgedChunks(
            np.empty(k, dtype=np.uint8), np.empty(k, dtype=np.int64), np.empty(k, dtype=np.int64)
        )
        new = self.windows.judge_rows(words.take(_JUDGED_WORDS, axis=1), append_ns, self.log_end, *judged)
        return judged, new

    def _prepare_mixed(
        self,
        payload: Bytes,
        columns: Ints,
        checksum: int,
        slots: Ints,
        append_ns: int,
        words: Words,
        first_offsets: Ints,
        judged: JudgedChunks,
        read_verdicts: Callable[[int], LoggedVerdicts],
    ) -> Prepared:
        """The rare payload in which some chunk is a repeat, or has no knowable outcome."""
        n = int(columns[C_EVENTS])
        base = self.log_end
        chunk_verdicts: Bytes = judged.verdicts
        counts = (words[:, 3] >> HIGH_WORD).tolist()
        verdicts = np.zeros(n, dtype=np.uint8)
        for c in np.flatnonzero(chunk_verdicts).tolist():
            start = int(first_offsets[c]) - base
            verdicts[start : start + counts[c]] = _REPEAT_VERDICT
        appends = bool((chunk_verdicts == NEW).any())
        originals: Ints = np.zeros(0, dtype=np.int64)
        accepted = 0
        if appends:
            originals, accepted = self._judge(payload, columns, slots, append_ns, verdicts)
        # Repeats stay in the record, marked as such, so that the gateway's bytes stay as they are: a new chunk's
        # own offset is not the one that the windows counted.
        own = {
            int(judged.first_offsets[c]): int(first_offsets[c])
            for c in np.flatnonzero(chunk_verdicts == NEW).tolist()
        }
        outcomes = []
        commit_offset = 0
        for c, verdict in enumerate(chunk_verdicts.tolist()):
            first = int(first_offsets[c])
            if verdict == REUSED:
                # Rests on the chunk that is there under this sequence: of its record one offset stands for all.
                commit_offset = max(commit_offset, min(int(judged.first_offsets[c]) + 1, base))
                outcomes.append(ChunkOutcome(-1, [], _REUSED_ERROR))
                continue
            if verdict == UNKNOWN:
                outcomes.append(ChunkOutcome(-1, [], _UNKNOWN_ERROR))
                continue
            if verdict == REPEAT:
                first = int(judged.first_offsets[c])
                if int(judged.record_offsets[c]) == base:
                    first = own[first]
                commit_offset = max(commit_offset, first + counts[c])
            record = int(judged.record_offsets[c])
            if first >= base:
                found: LoggedVerdicts | None = LoggedVerdicts(base, verdicts, originals)
            elif record < self.index.log_start:
                found = self.outcomes.find(record)  # the log has dropped it, or never held it
            else:
                found = read_verdicts(record)
            if found is None:
                outcomes.append(ChunkOutcome(-1, [], _UNKNOWN_ERROR))
                continue
            exceptions = exceptions_of(found.verdicts, found.originals, first - found.base_offset, counts[c])
            outcomes.append(ChunkOutcome(first, exceptions))
        answer = Appended(outcomes, base)
        if not appends:
            return Prepared(
                answer, commit_offset, commit_offset > 0, None, 0, append_ns, 0, 0, None, None, None, None, 0
            )
        prepared = self._record(
            payload,
            columns,
            checksum,
            append_ns,
            verdicts,
            originals,
            answer,
            words,
            chunk_verdicts,
            first_offsets,
            accepted,
            slots,
        )
        return prepared._replace(has_old_chunks=True)

    def _judge(
        self, payload: Bytes, columns: Ints, slots: Ints, append_ns: int, verdicts: Bytes
    ) -> tuple[Ints, int]:
        """Fill `verdicts`; returns the originals of duplicates and conflicts, in order, and how many are stored."""
        n = int(columns[C_EVENTS])
        schemas = self.schemas
        accepted = judge_events(
            payload, columns, slots, schemas.agg_types, schemas.unique_types, append_ns, verdicts
        )
        if not schemas.has_grace and columns[C_ID_ENCODING] != PLAIN:
            return _NO_OFFSETS, accepted
        sealed: Bytes | None = None
        if schemas.has_grace:
            sealed = np.zeros(n, dtype=np.uint8)
            sealed_events(payload, columns, slots, schemas.arrays, append_ns, verdicts, sealed)
        originals: Ints = _NO_OFFSETS
        if columns[C_ID_ENCODING] == PLAIN:
            keys_lo = np.empty(n, dtype=np.uint64)
            keys_hi = np.empty(n, dtype=np.uint64)
            fingerprints = np.empty(n, dtype=np.uint64)
            wants = np.empty(n, dtype=np.uint8)
            many = event_keys(
                payload,
                columns,
                slots,
                schemas.uids,
                verdicts,
                wants,
                keys_lo,
                keys_hi,
                fingerprints,
                self._work,
            )
            if many:
                if sealed is not None:
                    wants[(sealed != 0) & (wants != 0)] = WANTS_LOOKUP
                original = np.full(n, -1, dtype=np.int64)
                floor = self.dedup_floor(append_ns)
                self.dedup.judge(
                    keys_lo, keys_hi, fingerprints, wants, self.log_end, floor, verdicts, original
                )
                originals = original[original >= 0]
        if sealed is not None:
            verdicts[(sealed != 0) & (verdicts == _ACCEPTED)] = int(Reason.PERIOD_SEALED)
        return originals, n - int(np.count_nonzero(verdicts))

    def _record(
        self,
        payload: Bytes,
        columns: Ints,
        checksum: int,
        append_ns: int,
        verdicts: Bytes | None,
        originals: Ints | None,
        answer: Appended,
        words: Words,
        chunk_verdicts: Bytes,
        first_offsets: Ints,
        accepted: int,
        slots: Ints,
    ) -> Prepared:
        n = int(columns[C_EVENTS])
        base = self.log_end
        low = high = append_ns
        if columns[C_TIME_ENCODING] != ABSENT:
            marks = np.zeros(n, dtype=np.uint8) if verdicts is None else verdicts
            low, high = time_range(payload, columns, append_ns, marks)
        relies = verdicts is not None and (
            bool(((chunk_verdicts == REPEAT) | (chunk_verdicts == REUSED)).any())
            or (originals is not None and len(originals) > 0)
        )
        return Prepared(
            answer=answer,
            commit_offset=base + n,
            relies_on_commit=relies,
            record=[batch.encode_prefix(checksum, n, verdicts, originals), payload],
            event_count=n,
            append_ns=append_ns,
            min_time_ns=int(low),
            max_time_ns=int(high),
            item=FoldItem(base + n, base, append_ns, payload, columns, verdicts, None),
            chunks=words,
            chunk_verdicts=chunk_verdicts,
            first_offsets=first_offsets,
            stored=accepted,
            originals=originals,
            may_alert=self.schemas.widths(slots)[0] > 0,
        )

    def back_out(self, base: int, columns: Ints) -> None:
        """Forget what `prepare` remembered: the record did not get into the log, which still ends at `base`."""
        if columns[C_ID_ENCODING] == PLAIN:  # else there is nothing, and to look for it would take long
            self.dedup.truncate(base)

    def missing_codes(self, payload: Bytes, columns: Ints) -> list[str]:
        """The codes of a payload's metric table that the partition knows no living metric by."""
        return [code for code in metric_codes(payload, columns) if self.schemas.slot_of(code) < 0]

    def appended(self, prepared: Prepared) -> None:
        """The record is in the log's buffer: remember its chunks, queue it for the fold."""
        assert prepared.item is not None, "only a record is appended"
        assert prepared.chunks is not None and prepared.chunk_verdicts is not None  # noqa: PT018
        assert prepared.first_offsets is not None
        self.last_append_ns = prepared.append_ns
        words, first_offsets = prepared.chunks, prepared.first_offsets
        if prepared.has_old_chunks:
            new = prepared.chunk_verdicts == NEW
            words, first_offsets = words[new], first_offsets[new]
        self._remember(words, first_offsets, prepared.item.base_offset, prepared.append_ns)
        self.outcomes.note(
            prepared.item.base_offset, prepared.append_ns, prepared.item.verdicts, prepared.originals
        )
        self._enqueue(prepared.item)
        if prepared.may_alert:
            self._alerting.append(prepared.item.base_offset)

    def _remember(self, words: Words, first_offsets: Ints, base: int, append_ns: int) -> None:
        self.windows.insert_rows(words.take(_REMEMBERED_WORDS, axis=1), first_offsets, base, append_ns)

    def appended_schema(self, record: MetricRecord, offset: int, append_ns: int) -> None:
        """A metric schema record is in the log's buffer at `offset`."""
        self.last_append_ns = append_ns
        self.schemas.put(record, offset)
        self._enqueue(FoldItem(offset + 1, offset, append_ns, _NOTHING, _NO_COLUMNS, None, record))

    def appended_control(self, offset: int, append_ns: int) -> None:
        """A control record that carries no state is in the log's buffer at `offset`."""
        self.last_append_ns = append_ns
        self._enqueue(FoldItem(offset + 1, offset, append_ns, _NOTHING, _NO_COLUMNS, None, None))

    def _enqueue(self, item: FoldItem) -> None:
        assert item.base_offset == self.judged_end, "a leader judges at the log's end"
        self.judged_end = item.end_offset
        self._queue.append(item)

    # ------------------------------------------------------------ commit and fold

    def wait_commit(
        self, offset: int, send: Callable[[], None], fail: Callable[[], None] | None = None
    ) -> None:
        """Call `send` once everything below `offset` is committed (at once if it is).

        `fail` is what `fail_waiting` gives back where that will not be heard of here any more.
        """
        if offset <= self.high_watermark:
            send()
            return
        # Answers that rely on an older record queue behind newer ones: order is by commit offset only for
        # records, so a late, low offset would sit behind a higher one. It then waits a little longer.
        self._waiting.append((offset, send, fail))

    @property
    def waiting_count(self) -> int:
        """How many answers wait for a commit."""
        return len(self._waiting)

    def commit(self, offset: int) -> list[Callable[[], None]]:
        """Everything below `offset` is on a majority's disks. Returns the answers to send."""
        assert offset <= self.log_end, "nothing is committed that is not in the log"
        self.high_watermark = max(self.high_watermark, offset)
        ready = []
        while self._waiting and self._waiting[0][0] <= self.high_watermark:
            ready.append(self._waiting.popleft()[1])
        return ready

    def committed_floor(self) -> int:
        """The first offset whose ids are still remembered, by the append time of the last committed record."""
        index = self.index
        if self.high_watermark < index.log_start:
            return 0
        return self.dedup_floor(index.append_ns_before(self.high_watermark))

    @property
    def fold_behind(self) -> bool:
        """Whether a committed record waits to be folded, and may be now."""
        if self.fold.held:
            return False
        if self._queue and self._queue[0].base_offset == self.fold.applied:
            return self._queue[0].end_offset <= self.high_watermark
        return self.fold.applied < self.high_watermark

    @property
    def folds_from_log(self) -> bool:
        """Whether the next record to be folded is to be read from the log, for `apply_logged`."""
        return not self._queue or self._queue[0].base_offset != self.fold.applied

    @property
    def may_alert(self) -> bool:
        """Whether a committed record that waits to be folded may raise an alert: one of its metrics has thresholds.

        Of what is to be read from the log it isn't known: if any metric has.
        """
        if self.folds_from_log:
            return self.fold_behind and bool(self.schemas.arrays.thresholds.any())
        return bool(self._alerting) and self._alerting[0] < self.high_watermark

    def fold_step(self) -> tuple[int, int]:
        """Fold the next committed record; returns its events and its payload's bytes (0 for a control record)."""
        assert self.fold_behind, "only what is committed is folded"
        assert not self.folds_from_log, "apply_logged takes what is in the log only"
        item = self._queue[0]  # taken off only once it is in the cells: a failure never passes over a record
        if item.control is not None:
            self.fold.put_schema(item.control, item.base_offset)
        elif len(item.data):
            self.fold.apply(item.data, item.columns, item.verdicts, item.base_offset, item.append_ns)
        self._advance(item.end_offset, item.append_ns)
        self._queue.popleft()
        return (item.end_offset - item.base_offset if len(item.data) else 0), len(item.data)

    def fold_steps(self) -> tuple[int, int]:
        """Fold the next committed records, as many as make a run; returns what `fold_step` does, of all of them."""
        assert not self.folds_from_log, "apply_logged_run takes what is in the log only"
        items: list[FoldItem] = []
        size = 0
        for item in self._queue:
            if (
                item.end_offset > self.high_watermark
                or not 0 < len(item.data) <= RUN_BODY_BYTES_MAX
                or size + len(item.data) > RUN_BYTES_MAX
                or len(items) >= RUN_RECORDS_MAX
            ):
                break
            items.append(item)
            size += len(item.data)
        if len(items) < 2:
            return self.fold_step()
        run = runs.of_items(items)
        self._fold_run(run)
        for _ in items:
            self._queue.popleft()
        return run.events, run.payload_bytes

    def _fold_run(self, run: Run) -> None:
        self.fold.apply_run(run.data, run.columns, run.places)
        self._advance(run.end_offset, run.append_ns)

    def _advance(self, end_offset: int, append_ns: int) -> None:
        """Everything below is in the cells, and thus committed."""
        self.fold.advance(end_offset)
        self.windows.advance(end_offset, append_ns)
        self.outcomes.advance(end_offset, append_ns)
        while self._alerting and self._alerting[0] < end_offset:
            self._alerting.popleft()

    def fail_waiting(self) -> list[Callable[[], None]]:
        """Drop the answers that will not come; returns what is to be called instead of them."""
        fails = [fail for _, _, fail in self._waiting if fail is not None]
        self._waiting.clear()
        return fails

    def demote(self) -> int:
        """Take the judge back to where the fold is: the leadership ended; returns the bytes that left the queue.

        What is committed is judged again as it is folded; what is not is the next leader's to keep or to discard.
        """
        freed = sum([len(item.data) for item in self._queue])
        self._queue.clear()
        self._alerting.clear()
        applied = self.applied
        if self.judged_end > applied:
            self.dedup.truncate(applied)
            self.windows.truncate(applied)
            self.outcomes.truncate(applied)
            # Metrics that only the uncommitted suffix knows are gone with it.
            self.schemas = copy.deepcopy(self.fold.schemas)
            self.judged_end = applied
        index = self.index
        self.last_append_ns = index.append_ns_before(max(applied, index.log_start))
        self.schemas_stale = False
        self.epoch = 0
        self.epoch_due = False
        return freed

    def digest(self) -> str:
        """A digest of all replicated state at the applied offset, whatever the layout of tables.

        Equal on replicas at the same applied offset, and after a recount of the log. Call it with the fold at the
        high watermark.
        """
        return joined_digest(self.fold.digest(), self.judge_digests())

    def judge_digests(self) -> list[int]:
        """What `digest` has of the judge's state, as of the applied offset. To be called when that may be."""
        applied = self.applied
        last_ns = self.index.append_ns_before(applied)
        floor = min(self.dedup_floor(last_ns), applied)
        return [
            self.dedup.digest(floor, applied),
            self.windows.digest(applied, last_ns),
            self.outcomes.digest(applied),
        ]

    # ------------------------------------------------------------ records of the log

    def apply_logged(self, meta: RecordMeta, body: Bytes, columns: Ints) -> tuple[int, int]:
        """Fold the committed record at `applied`; the judge takes it in as well, if it has not.

        `columns` is room for a payload's columns. Returns the record's events and its payload's bytes.

        Raises:
            RemoteProtocolError: the record makes no sense to this version.
        """
        assert meta.base_offset == self.applied, "records are folded in order"
        view = self._placed(meta, body, columns)
        if self.judged_end == meta.base_offset:
            self._judge_logged(meta, body, view, columns)
        events = size = 0
        if view is not None:
            # A writable copy: the fold is compiled for the one kind of array that the judge hands it.
            verdicts = None if view.verdicts is None else view.verdicts.copy()
            self.fold.apply(view.data, columns, verdicts, meta.base_offset, meta.append_ns)
            events, size = meta.count, view.payload_length
        elif meta.kind == RecordKind.SCHEMA:
            self.fold.put_schema(decode_record(body.tobytes()), meta.base_offset)
        self._advance(meta.base_offset + meta.count, meta.append_ns)
        return events, size

    def apply_logged_run(self, records: Sequence[tuple[RecordMeta, Bytes]], columns: Ints) -> tuple[int, int]:
        """Do what `apply_logged` does, for one record, or for several event batches that are a run."""
        if len(records) == 1:
            return self.apply_logged(*records[0], columns)
        base = records[0][0].base_offset
        assert base == self.applied, "records are folded in order"
        run = runs.of_records(records)
        assert self.judged_end == base or self.judged_end >= run.end_offset, "all of it is judged, or nothing"
        if self.judged_end == base:
            self.windows.insert_made(run.chunks())
            for number, batch_columns in enumerate(run.columns):
                meta = records[number][0]
                verdicts = run.verdicts(number)
                self.outcomes.note(meta.base_offset, meta.append_ns, verdicts, run.originals[number])
                if batch_columns[C_ID_ENCODING] == PLAIN:
                    if verdicts is None:
                        verdicts = np.zeros(meta.count, dtype=np.uint8)
                    self._replay_ids(run.data, batch_columns, verdicts, meta.base_offset)
            self.last_append_ns = max(self.last_append_ns, run.append_ns)
            self.judged_end = run.end_offset
        self._fold_run(run)
        return run.events, run.payload_bytes

    def judge_logged(self, meta: RecordMeta, body: Bytes, columns: Ints) -> None:
        """Take the record at `judged_end`, ahead of the fold, into the judge's state; see `apply_logged`."""
        assert meta.base_offset == self.judged_end, "records are judged in order"
        self._judge_logged(meta, body, self._placed(meta, body, columns), columns)

    @staticmethod
    def _placed(meta: RecordMeta, body: Bytes, columns: Ints) -> batch.BatchView | None:
        """The event batch in a record, its columns found; None for another record."""
        if meta.kind != RecordKind.EVENTS:
            return None
        view = batch.parse(body, 0, len(body))
        status = place_payload(view.data, view.payload_base, view.payload_length, columns)
        if status != OK:
            raise explain(status, "logged payload")
        if view.event_count != meta.count or int(columns[C_EVENTS]) != meta.count:
            raise RemoteProtocolError(
                f"the batch at offset {meta.base_offset} does not hold {meta.count} events"
            )
        return view

    def _judge_logged(
        self, meta: RecordMeta, body: Bytes, view: batch.BatchView | None, columns: Ints
    ) -> None:
        if view is not None:
            self._judge_batch(view, columns, meta.base_offset, meta.append_ns)
        elif meta.kind == RecordKind.SCHEMA:
            self.schemas.put(decode_record(body.tobytes()), meta.base_offset)
        self.last_append_ns = max(self.last_append_ns, meta.append_ns)
        self.judged_end = meta.base_offset + meta.count

    def _judge_batch(self, view: batch.BatchView, columns: Ints, base_offset: int, append_ns: int) -> None:
        n = int(columns[C_EVENTS])
        verdicts = np.zeros(n, dtype=np.uint8) if view.verdicts is None else view.verdicts.copy()
        words = chunk_words(view.data, columns)
        counts = (words[:, 3] >> HIGH_WORD).view(np.int64)
        starts = counts.cumsum() - counts
        new = verdicts[starts] != _REPEAT_VERDICT
        self._remember(words[new], base_offset + starts[new], base_offset, append_ns)
        self.outcomes.note(base_offset, append_ns, view.verdicts, view.originals)
        if columns[C_ID_ENCODING] == PLAIN:
            self._replay_ids(view.data, columns, verdicts, base_offset)

    def _replay_ids(self, data: Bytes, columns: Ints, verdicts: Bytes, base_offset: int) -> None:
        n = int(columns[C_EVENTS])
        slots = self.schemas.slots_of(data, columns)
        keys_lo = np.empty(n, dtype=np.uint64)
        keys_hi = np.empty(n, dtype=np.uint64)
        fingerprints = np.empty(n, dtype=np.uint64)
        wants = np.empty(n, dtype=np.uint8)
        event_keys(
            data,
            columns,
            slots,
            self.schemas.uids,
            verdicts,
            wants,
            keys_lo,
            keys_hi,
            fingerprints,
            self._work,
        )
        chosen = np.flatnonzero(wants)
        if len(chosen):
            self.dedup.apply(keys_lo[chosen], keys_hi[chosen], fingerprints[chosen], base_offset + chosen)


def joined_digest(totals: int, judge: Sequence[int]) -> str:
    """A partition's digest, of the fold's and of what `judge_digests` has returned at the same offset."""
    return "-".join(f"{part:032x}" for part in (totals, *judge))


_NO_OFFSETS = np.zeros(0, dtype=np.int64)
_NOTHING = np.zeros(0, dtype=np.uint8)
_NO_COLUMNS = np.zeros(0, dtype=np.int64)
_REUSED_ERROR = WireError(
    int(ErrorCode.SEQUENCE_REUSED),
    False,
    "this producer sent other content under the same sequence before: the chunk was not stored",
)
_UNKNOWN_ERROR = WireError(
    int(ErrorCode.OUTCOME_UNKNOWN),
    False,
    f"the chunk is from outside the window in which repeats are recognised "
    f"({limits.PRODUCER_WINDOW} sequences, {limits.CHUNK_RETRY_NS_MAX // 60_000_000_000} minutes): "
    f"it may have been stored before or not, and was not stored now",
)
