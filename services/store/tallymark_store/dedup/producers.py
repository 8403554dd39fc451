"""Which chunks a partition has in its log: (producer id, sequence) of every chunk that may still be retried.

A set of entries, one per chunk, sharded by producer, in open-addressing tables of a `ShardArena`. Verdicts
follow from rules about the entries, never from what happens to lie in the table, so that replicas whose
tables were cleaned at different times agree. At a time `now`, with the retention R and the window W:

- an entry has **expired** when its `append_ns < now - R`;
- a producer's **highest** is the highest sequence among its entries that have not expired;
- an entry is **live** when it has not expired and its `sequence > highest - W`;
- a chunk without a live entry is **unknown** when `sequence <= highest - W` or
  `first_sent_ns < now - CHUNK_RETRY_NS_MAX`: it may have been there and have been forgotten. Else it is new.

So no chunk is new twice, provided that its first sending is dated at most R - CHUNK_RETRY_NS_MAX after the
append time of the record that holds it: its entry is live; or it fell out of the window, and then the
sequence that pushed it out keeps it out until it expires itself (it was appended before that one, so it
does so first); or it has expired, and then its first sending lies further back than a retry may. The proviso
is about clocks: the client's may run ahead, and a new leader's behind that of one whose suffix was truncated,
by that much together. Beyond it, only the client's own count of the time since the first sending prevents a
late retry.

Entries that are dead by the rules stay in the table until that is final. Time and highest sequence come
from records that may yet be truncated, and truncation revives what they had killed; so cleaning goes by
the last state that `advance` has declared committed.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from tallymark_protocol.limits import PRODUCER_RETENTION_NS, PRODUCER_WINDOW
from tallymark_store.dedup import producer_kernels as kernels
from tallymark_store.dedup.arena import ShardArena

ENTRY_DTYPE = np.dtype(
    [
        ("producer", "<u8"),
        ("sequence", "<u8"),
        ("checksum", "<u4"),
        ("count", "<u4"),
        ("first_offset", "<i8"),
        ("record_base", "<i8"),
        ("append_ns", "<i8"),
    ]
)
"""One remembered chunk, as checkpoints carry it."""

_LOAD_MAX = 0.70
_GROWTH = 1.5
_REFILL_MAX = 0.60
_SLOTS_MAX = 2**27  # 6 GiB of address space
U64 = npt.NDArray[np.uint64]
U32 = npt.NDArray[np.uint32]
I64 = npt.NDArray[np.int64]
U8 = npt.NDArray[np.uint8]


class ProducerWindows:
    """The chunks that a partition remembers, and the verdict about each that arrives.

    Per append the leader calls `judge_chunks`, which changes nothing, decides, and calls `insert` with the chunks
    that the record holds; followers and recovery only `insert`. `truncate` takes back, `advance` lets go.

    `salt` (any 64 bits, random in production) decides where entries lie; no result depends on it.
    """

    def __init__(self, *, salt: int = 0, slots_max: int = _SLOTS_MAX) -> None:
        self._arena = ShardArena(
            shards=kernels.SHARD_COUNT,
            slot_words=kernels.SLOT_WORDS,
            load_max=_LOAD_MAX,
            growth=_GROWTH,
            refill_max=_REFILL_MAX,
            slots_max=slots_max,
        )
        self._salt = np.uint64(salt)
        self._committed_end = 0  # exclusive; every record below this offset is committed
        self._committed_ns = 0  # append time of the last of them
        self._scratch: U64 = np.empty(
            (0, kernels.SLOT_WORDS), dtype=np.uint64
        )  # a shard's entries while it is rebuilt
        self._no_undo = np.zeros((1, 7), dtype=np.uint64)

    def advance(self, committed_end: int, committed_ns: int) -> None:
        """Declare the log below `committed_end` committed, its last record appended at `committed_ns`.

        What is dead by then may be dropped, a shard at a time, whenever one is full. Lower values than before
        change nothing.
        """
        self._committed_end = max(self._committed_end, committed_end)
        self._committed_ns = max(self._committed_ns, committed_ns)

    def judge_chunks(
        self,
        producer: U64,
        sequence: U64,
        checksum: U32,
        first_sent_ns: I64,
        count: U32,
        now_ns: int,
        record_base: int,
        verdict: U8,
        first_offset: I64,
        original_base: I64,
    ) -> None:
        """Judge the chunks of one append in order, each after the new ones before it; remembers nothing.

        `now_ns` is the append time the record would get, not below that of the log's last record;
        `record_base` is the log end. Written for every chunk:

        - `verdict`: `NEW`, `REPEAT`, `REUSED` or `UNKNOWN`;
        - `first_offset`: where its events begin. `NEW`: counted from `record_base` over the new chunks
          before it. `REPEAT`, `REUSED`: of the chunk remembered (for `REPEAT` the count is the same). Else -1;
        - `original_base`: base offset of the record that holds it, `record_base` for new chunks. Else -1.

        A repeat of a new chunk of this same call refers to that one's offsets. A `first_sent_ns` in the future
        counts as now.

        Raises:
            TableFullError: the reserved range is exhausted; nothing has changed but the outputs.
        """
        n = len(producer)
        assert len(sequence) == len(checksum) == len(first_sent_ns) == len(count) == n
        assert len(verdict) == len(first_offset) == len(original_base) == n
        chunks = np.empty((n, 4), dtype=np.uint64)
        chunks[:, 0] = producer
        chunks[:, 1] = sequence
        chunks[:, 2] = _pack(checksum, count)
        chunks[:, 3] = np.asarray(first_sent_ns, dtype=np.int64).view(np.uint64)
        self.judge_rows(chunks, now_ns, record_base, verdict, first_offset, original_base)

    def judge_rows(
        self,
        chunks: U64,
        now_ns: int,
        record_base: int,
        verdict: U8,
        first_offset: I64,
        original_base: I64,
    ) -> int:
        """Judge as `judge_chunks` does; return how many are `NEW`.

        `chunks` has a row of four words a chunk: producer, sequence, checksum | count << 32, first_sent_ns.
        """
        n = len(chunks)
        assert now_ns >= self._committed_ns, "append time never decreases"
        assert record_base >= self._committed_end
        arena = self._arena
        undo = np.empty((n, 7), dtype=np.uint64)
        room = 64
        while True:
            rows, full = kernels.judge(
                arena.table,
                arena.stride_words,
                arena.capacity,
                arena.limit,
                arena.used,
                self._salt,
                chunks,
                now_ns,
                record_base,
                verdict,
                first_offset,
                original_base,
                undo,
            )
            kernels.undo(arena.table, arena.used, undo, rows)
            if full < 0:
                return int(rows)
            # Two slots a chunk are enough for all of them; most calls need far fewer.
            self._rebuild(int(full), room=min(room, 2 * n))
            room *= 4

    def insert(
        self,
        producer: U64,
        sequence: U64,
        checksum: U32,
        count: U32,
        first_offset: I64,
        record_base: int,
        append_ns: int,
    ) -> None:
        """Remember the chunks of one record of the log; records come in log order.

        Chunks that are there already (the record was applied before) are no change.

        Raises:
            TableFullError: the reserved range is exhausted; the chunks before are remembered.
        """
        rows = np.empty((len(producer), kernels.SLOT_WORDS), dtype=np.uint64)
        rows[:, 0] = producer
        rows[:, 1] = sequence
        rows[:, 2] = _pack(checksum, count)
        self.insert_rows(rows, first_offset, record_base, append_ns)

    def insert_rows(self, rows: U64, first_offset: I64, record_base: int, append_ns: int) -> None:
        """Remember as `insert` does. `rows` has `SLOT_WORDS` words a chunk, of which the first three are filled in."""
        assert record_base >= 0
        assert append_ns >= 0
        rows[:, 3] = first_offset
        rows[:, 4] = record_base
        rows[:, 5] = append_ns
        self._insert(rows)

    def insert_made(self, rows: U64) -> None:
        """Remember as `insert` does, the chunks of several records: all `SLOT_WORDS` words of each are filled in."""
        self._insert(rows)

    def truncate(self, log_end: int) -> None:
        """Forget the chunks of records at or above `log_end`, a record boundary not below what is committed."""
        assert log_end >= self._committed_end, "committed records are never truncated"
        for shard in range(kernels.SHARD_COUNT):
            self._rebuild(shard, log_end=log_end)

    def entries(self, max_offset: int, now_ns: int | None = None) -> npt.NDArray[Any]:
        """The chunks of records below `max_offset`, as `ENTRY_DTYPE`, in log order.

        With `now_ns`, only the live ones as of that time: the same on every replica. Without, whatever the table
        holds, which judges the same. Chunks that were live at `max_offset` and are dead for good as of the committed
        end may be missing: the log between the two says why.
        """
        out = np.empty(int(self._arena.used.sum()), dtype=ENTRY_DTYPE)
        rows = out.view(np.uint64).reshape(-1, kernels.SLOT_WORDS)
        done = 0
        for shard in range(kernels.SHARD_COUNT):
            count, _ = self._collect(shard, rows[done:], log_end=max_offset)
            done += count
        out = out[:done]
        out["first_offset"] -= kernels.MARK_BIAS
        if now_ns is not None:
            out = out[out["append_ns"] >= now_ns - PRODUCER_RETENTION_NS]
            _, inverse = np.unique(out["producer"], return_inverse=True)
            highest = np.zeros(len(out), dtype=np.uint64)
            np.maximum.at(highest, inverse, out["sequence"])
            highest = highest[inverse]
            window = np.uint64(PRODUCER_WINDOW)
            out = out[(highest < window) | (out["sequence"] > highest - np.minimum(highest, window))]
        return out[np.lexsort((out["sequence"], out["producer"], out["first_offset"], out["record_base"]))]

    def load(self, entries: npt.NDArray[Any]) -> None:
        """Remember the entries of a checkpoint, in any number of parts, beside those already there.

        The arrays come from `entries`, here or on another replica, under a checksum that the caller has verified.
        """
        held = self.entries(2**63 - 1)
        merged = np.concatenate([held, entries.astype(ENTRY_DTYPE)])
        merged = merged[np.lexsort((merged["first_offset"], merged["record_base"]))]
        # Heads are built in log order, so everything goes in again.
        for shard in range(kernels.SHARD_COUNT):
            self._rebuild(shard, log_end=-1)
        rows = merged.view(np.uint64).reshape(-1, kernels.SLOT_WORDS)
        self._insert(rows)

    def digest(self, end_offset: int, now_ns: int) -> int:
        """A 128-bit digest of the chunks of records below `end_offset` that are live at `now_ns`.

        `end_offset` must not be below the committed end last given to `advance`, nor `now_ns` below its time.
        """
        assert end_offset >= self._committed_end, "what was live then may have been dropped"
        rows = self.entries(end_offset, now_ns).view(np.uint64).reshape(-1, kernels.SLOT_WORDS)
        a, b = kernels.digest(rows)
        return int(a) << 64 | int(b)

    @property
    def memory_bytes(self) -> int:
        """Bytes of memory in use, whole pages."""
        return self._arena.memory_bytes + self._scratch.nbytes

    def __len__(self) -> int:
        """How many slots are in use: entries, dead ones not dropped yet, and one head for each producer."""
        return int(self._arena.used.sum())

    def _insert(self, rows: U64) -> None:
        arena = self._arena
        done = 0
        while True:
            done = kernels.insert(
                arena.table,
                arena.stride_words,
                arena.capacity,
                arena.limit,
                arena.used,
                self._salt,
                rows,
                done,
                self._no_undo,
            )
            if done == len(rows):
                return
            self._rebuild(int(kernels.shard_of(rows[done, 0], self._salt)), room=2)

    def _collect(self, shard: int, out: U64, log_end: int) -> tuple[int, int]:
        arena = self._arena
        count, heads = kernels.collect(
            arena.table,
            arena.base(shard),
            int(arena.capacity[shard]),
            self._salt,
            self._committed_end,
            self._committed_ns,
            log_end,
            out,
        )
        return int(count), int(heads)

    def _rebuild(self, shard: int, *, room: int = 0, log_end: int = 2**63 - 1) -> None:
        """Write the shard anew without what is dead for good, in the size that fits what is left."""
        arena = self._arena
        used = int(arena.used[shard])
        if len(self._scratch) < used:
            # Kept for the next time: touching fresh pages would take longer than the rebuild.
            self._scratch = np.empty((used + used // 4, kernels.SLOT_WORDS), dtype=np.uint64)
        kept = self._scratch
        count, heads = self._collect(shard, kept, log_end)
        arena.resize(shard, arena.size_for(shard, count + min(count, heads), room))
        arena.used[shard] = kernels.refill(
            arena.table, arena.base(shard), int(arena.capacity[shard]), self._salt, kept, count
        )


def _pack(checksum: U32, count: U32) -> U64:
    """Checksum and count in one word, as slots hold them."""
    return checksum.astype(np.uint64) | (count.astype(np.uint64) << np.uint64(32))
