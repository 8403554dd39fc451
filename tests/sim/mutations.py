"""Deliberate defects: each breaks one rule of the engine, to see that the simulator notices.

A mutation replaces methods of the real classes for the time of a `with` block; the product's code has no switches.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import msgspec

from tallymark_store import checkpointer, recovery, snapshots
from tallymark_store.archive import archiver, incoming
from tallymark_store.archive import manifest as manifests
from tallymark_store.copies import Copies
from tallymark_store.dedup import IdFile
from tallymark_store.fold.spilled import SpilledFiles
from tallymark_store.node import StoreNode
from tallymark_store.outcomes import Outcomes
from tallymark_store.partition import Partition
from tallymark_store.replicating import Replicating
from tallymark_store.replication.core import ReplicaCore
from tallymark_store.replication.effects import Discarded, Role
from tallymark_store.replication.election import Candidacy
from tallymark_store.replication.follower import Following
from tallymark_store.replication.leader import Leading
from tallymark_store.replication.messages import Appended
from tallymark_store.replication.replica import Replica
from tallymark_store.wal.scan import Scan
from tallymark_store.window_times import WindowTimes

from .simulation import Options

Patch = tuple[Any, str, Any]
_REGISTRY: dict[str, Mutation] = {}


class Mutation(NamedTuple):
    """A defect that can be switched on."""

    name: str
    what: str  # rule that is broken
    options: Options  # of runs that bring it to light
    patches: Callable[[], list[Patch]]

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Have the defect for a while."""
        with contextlib.ExitStack() as stack:
            for target, attribute, replacement in self.patches():
                stack.enter_context(mock.patch.object(target, attribute, replacement))
            yield


def _mutation(
    what: str,
    *kinds: str,
    mean_ms: int = 300,
    reads: int = 5,
    chunks: int = 36,
    recycle: bool = False,
    retains: bool = False,
    spills: bool = False,
) -> Callable[[Callable[[], list[Patch]]], Callable[[], list[Patch]]]:
    def register(patches: Callable[[], list[Patch]]) -> Callable[[], list[Patch]]:
        name = patches.__name__
        options = Options(
            kinds=kinds,
            mean_ms=mean_ms,
            reads=reads,
            chunks=chunks,
            recycle=recycle,
            retains=retains,
            spills=spills,
        )
        _REGISTRY[name] = Mutation(name, what, options, patches)
        return patches

    return register


def all_mutations() -> list[Mutation]:
    """Every defect there is."""
    return list(_REGISTRY.values())


# ---------------------------------------------------------------- epochs


@_mutation(
    "a replica obeys whoever speaks, whatever epoch it has promised",
    "storm",
    "end_lease",
    "stop",
    mean_ms=150,
)
def skip_the_epoch_check() -> list[Patch]:
    return [(ReplicaCore, "_may_promise", lambda self, epoch, instance: True)]


@_mutation(
    "promises are forgotten with the process", "kill", "power", "storm", "freeze", "isolate", "end_lease"
)
def forget_promises() -> list[Patch]:
    def persist(self: Replicating, number: int, state: Any) -> None:
        if (
            state is None
            or number not in self.file.states
            or self.file.states[number].copy_id != state.copy_id
        ):
            self.file.save(number, state)

    return [(Replicating, "persist", persist)]


@_mutation(
    "what a majority has is committed, whatever epoch wrote it last",
    "kill",
    "power",
    "isolate",
    "storm",
    "freeze",
)
def commit_stale_epochs() -> list[Patch]:
    original = Leading._lead

    def lead(self: Any, granted: Any, now_ns: int) -> None:
        original(self, granted, now_ns)
        for progress in self._followers.values():
            progress.match_end = progress.next_offset
        start, self._start_offset = self._start_offset, -1
        self._advance_commit(now_ns)
        self._start_offset = start

    return [(Leading, "_lead", lead)]


@_mutation("a restarted process goes on under the epoch of its earlier life", "kill", "power")
def resume_an_old_epoch() -> list[Patch]:
    original = Candidacy._tick_candidacy

    def tick(self: Any, now_ns: int) -> None:
        if (
            self.role is Role.FOLLOWER
            and self._key_holder == self.node_id
            and self.is_member
            and self._key_epoch
        ):
            epoch = self._key_epoch
            self.state = msgspec.structs.replace(self.state, promised=min(self.state.promised, epoch - 1))
            self._on_key_created(epoch, now_ns)
        original(self, now_ns)

    may_promise = ReplicaCore._may_promise

    def obey(self: Any, epoch: int, instance: str) -> bool:
        return may_promise(self, epoch, instance) or epoch == self.state.promised

    return [(Candidacy, "_tick_candidacy", tick), (ReplicaCore, "_may_promise", obey)]


@_mutation(
    "a candidate takes its own log for the most advanced one",
    "kill",
    "power",
    "isolate",
    "slow_disk",
    "storm",
)
def ignore_longer_logs() -> list[Patch]:
    original = Candidacy._on_promised

    def promised(self: Any, sender: str, message: Any, now_ns: int) -> None:
        original(self, sender, msgspec.structs.replace(message, log_end=0, tail=[], high_watermark=0), now_ns)

    return [(Candidacy, "_on_promised", promised)]


# ---------------------------------------------------------------- durability


@_mutation("a follower acknowledges what it has not synced", "power", "kill_all", "slow_disk")
def acknowledge_before_sync() -> list[Patch]:
    def acknowledge(self: Any) -> None:
        if self.leader and self._verified_epoch == self.promised:
            self._send(
                self.leader,
                Appended(
                    self.partition, self.promised, self.copy_id, self._verified_end, self.high_watermark
                ),
            )

    original = Following._on_append

    def on_append(self: Any, sender: str, message: Any, records: Any, now_ns: int) -> None:
        original(self, sender, message, records, now_ns)
        if records and self.role is Role.FOLLOWER:
            self._acknowledge()

    return [(Following, "_acknowledge", acknowledge), (Following, "_on_append", on_append)]


@_mutation("a leader counts its own copy before its sync", "power", "slow_disk", "isolate")
def count_own_unsynced() -> list[Patch]:
    original = Leading._advance_commit

    def advance(self: Any, now_ns: int) -> None:
        durable, self.durable_end = self.durable_end, self.log.log_end
        try:
            original(self, now_ns)
        finally:
            self.durable_end = durable

    return [(Leading, "_advance_commit", advance), (Replica, "appended", _appended_and_counted)]


_appended = Replica.appended


def _appended_and_counted(self: Any, now_ns: int) -> Any:
    effects = _appended(self, now_ns)
    self._advance_commit(now_ns)
    return effects + self._take_effects()


@_mutation("an answer is sent before its events are committed", "power", "isolate")
def answer_before_commit() -> list[Patch]:
    return [(Partition, "wait_commit", lambda self, offset, send, fail=None: send())]


@_mutation("a repeat is answered before its original is committed", "isolate", "slow_disk", "storm", "freeze")
def answer_repeats_before_commit() -> list[Patch]:
    original = Partition.prepare

    def prepare(self: Any, *args: Any) -> Any:
        prepared = original(self, *args)
        return prepared._replace(commit_offset=0) if prepared.record is None else prepared

    return [(Partition, "prepare", prepare)]


@_mutation(
    "a follower takes the leader's high watermark for its own log", "isolate", "storm", "freeze", "slow_disk"
)
def commit_what_is_not_verified() -> list[Patch]:
    original = Following._on_append

    def on_append(self: Any, sender: str, message: Any, records: Any, now_ns: int) -> None:
        if self.role is Role.FOLLOWER and self._may_promise(message.epoch, message.instance):
            self._commit(min(message.high_watermark, self._boundary(message.high_watermark)))
        original(self, sender, message, records, now_ns)

    def boundary(self: Any, offset: int) -> int:
        while offset > 0 and (offset > self.log.log_end or self.log.epoch_before(offset) < 0):
            offset -= 1
        return offset

    patches: list[Patch] = [(Following, "_on_append", on_append)]
    Following._boundary = boundary  # type: ignore[attr-defined]
    return patches


# ---------------------------------------------------------------- the judge


@_mutation(
    "a new leader's dedup index lacks the suffix that is not committed yet",
    "kill",
    "power",
    "storm",
    "slow_disk",
)
def forget_ids_at_takeover() -> list[Patch]:
    original = Partition.judge_logged

    def judge(self: Any, meta: Any, body: Any, columns: Any) -> None:
        with mock.patch.object(self.dedup, "apply"):
            original(self, meta, body, columns)

    return [(Partition, "judge_logged", judge)]


@_mutation("ids that are on disk only are not looked up", "kill", "power", "storm", spills=True)
def forget_spilled_ids() -> list[Patch]:
    return [(IdFile, "judge", lambda *_: None)]


@_mutation("a restart forgets the ids that are on disk only", "kill", "power", spills=True)
def forget_spilled_ids_at_start() -> list[Patch]:
    return [(recovery, "_restore_ids", lambda *_: None)]


@_mutation("of two files of cells the older one counts", "kill", "power", spills=True)
def prefer_older_cells() -> list[Patch]:
    def add(self: Any, file: Any) -> None:
        self.files.append(file)
        self.table = self._table()

    return [(SpilledFiles, "add", add)]


@_mutation("a new leader has forgotten which chunks the suffix holds", "kill", "power", "storm", "slow_disk")
def forget_chunks_at_takeover() -> list[Patch]:
    original = Partition.judge_logged

    def judge(self: Any, meta: Any, body: Any, columns: Any) -> None:
        with mock.patch.object(Partition, "_remember"):
            original(self, meta, body, columns)

    return [(Partition, "judge_logged", judge)]


@_mutation("ids of a truncated suffix stay in the index", "isolate", "freeze", "storm", "slow_disk")
def keep_truncated_ids() -> list[Patch]:
    original = Partition.demote

    def demote(self: Any) -> int:
        with mock.patch.object(self.dedup, "truncate"):
            return original(self)

    return [(Partition, "demote", demote)]


@_mutation(
    "chunks of a truncated suffix stay in the producer windows", "isolate", "freeze", "storm", "slow_disk"
)
def keep_truncated_chunks() -> list[Patch]:
    original = Partition.demote

    def demote(self: Any) -> int:
        with mock.patch.object(self.windows, "truncate"):
            return original(self)

    return [(Partition, "demote", demote)]


# ---------------------------------------------------------------- copies and members


@_mutation(
    "a copy whose files are gone takes part as if nothing was wrong",
    "wipe",
    "kill_all",
    "power",
    "isolate",
    "slow_disk",
    mean_ms=200,
)
def vote_with_a_wiped_copy() -> list[Patch]:
    original = Copies._add

    def add(self: Any, number: int, state: Any, founding: Any, damage: str) -> None:
        original(self, number, state, founding, "")

    return [(Copies, "_add", add)]


@_mutation("a copy that was discarded keeps its id", "wipe", "kill_all", "power", "isolate", mean_ms=200)
def keep_the_copy_id() -> list[Patch]:
    def on_rebuild(self: Any, message: Any) -> None:
        if self.role is not Role.DAMAGED or message.copy_id != self.copy_id or message.epoch < self.promised:
            return
        self.state = msgspec.structs.replace(self.state, high_watermark=0)
        self._emit(Discarded(self.state.copy_id))
        self.role = Role.FOLLOWER
        self.high_watermark = self.durable_end = 0
        self._verified_epoch = self._verified_end = 0
        self._history = self._history[:1] if self._history and self._history[0].offset < 0 else []

    return [(Following, "_on_rebuild", on_rebuild)]


@_mutation(
    "the quorum is that of the founding members, whatever the log says", "move", "wipe", "kill", "isolate"
)
def count_an_old_membership() -> list[Patch]:
    original = Leading._advance_commit

    def advance(self: Any, now_ns: int) -> None:
        history, self._history = self._history, self._history[:1]
        try:
            original(self, now_ns)
        finally:
            self._history = history

    return [(Leading, "_advance_commit", advance)]


@_mutation("a log that is cut below its recorded high watermark goes unnoticed", "rot", "power")
def truncate_below_the_high_watermark() -> list[Patch]:
    original = ReplicaCore._truncate

    def truncate(self: Any, new_end: int, now_ns: int) -> bool:
        self.high_watermark = min(self.high_watermark, new_end)
        return original(self, new_end, now_ns)

    def promised(self: Any, sender: str, message: Any, now_ns: int) -> None:
        before(self, sender, msgspec.structs.replace(message, log_end=0, tail=[], high_watermark=0), now_ns)

    before = Candidacy._on_promised
    return [(ReplicaCore, "_truncate", truncate), (Candidacy, "_on_promised", promised)]


@_mutation("bad bytes below the synced end are dropped as if they were a torn tail", "rot", "power")
def take_damage_for_tail() -> list[Patch]:
    return [(Scan, "_is_damage", lambda self, gap: False)]


# ---------------------------------------------------------------- dropped logs


@_mutation(
    "a snapshot is installed without the ids that it remembers",
    "wipe",
    "freeze",
    "kill",
    mean_ms=150,
    recycle=True,
)
def install_without_ids() -> list[Patch]:
    restore = snapshots.restore

    def forgetful(partition: Any, *args: Any) -> None:
        with mock.patch.object(partition.dedup, "load"):
            restore(partition, *args)

    return [(snapshots, "restore", forgetful)]


@_mutation("the log is dropped past what checkpoints hold", "kill", "power", "kill_all", recycle=True)
def recycle_past_the_checkpoint() -> list[Patch]:
    return [(checkpointer, "recycle_floor", lambda indexes, needed, end: end)]


@_mutation("ids are remembered as far back as the log reaches", "kill", "freeze", recycle=True)
def forget_ids_with_the_log() -> list[Patch]:
    def floor(self: Any, index: Any, append_ns: int) -> int:
        return max(original(self, index, append_ns), index.log_start)

    original = WindowTimes.floor
    return [(WindowTimes, "floor", floor)]


@_mutation(
    "a repeat of what the log has dropped is answered as if all of it had been stored",
    "wipe",
    "freeze",
    "storm",
    "end_lease",
    mean_ms=150,
    recycle=True,
)
def forget_outcomes_with_the_log() -> list[Patch]:
    return [(Outcomes, "note", lambda self, base, append_ns, verdicts, originals: None)]


# ---------------------------------------------------------------- archives


@_mutation("the log is dropped past what the archive holds", "kill", "power", "checkpoint", recycle=True)
def recycle_past_the_archive() -> list[Patch]:
    def covered(self: Any, number: int) -> int:
        return self._manifests[number].offset if number in self._manifests else 0

    return [(checkpointer.Checkpointer, "_needed", covered)]


@_mutation("a merged file lacks one of those that it replaces", "kill", "power", recycle=True)
def merge_without_the_last() -> list[Patch]:
    merge = archiver.merge

    def lossy(disk: Any, files: Any, *args: Any) -> Any:
        return merge(disk, files[:-1] if len(files) > 2 else files, *args)

    return [(archiver, "merge", lossy)]


@_mutation("a merge leaves one of its files listed under the range of all", "kill", "power", recycle=True)
def merge_doubles_a_range() -> list[Patch]:
    merge = archiver.merge

    def doubled(disk: Any, files: Any, *args: Any) -> Any:
        return merge(disk, (files[0], *files), *args)

    return [(archiver, "merge", doubled)]


@_mutation(
    "a snapshot is installed without all of its archive's files",
    "wipe",
    "freeze",
    "kill",
    mean_ms=150,
    recycle=True,
)
def install_without_archived_files() -> list[Patch]:
    owned = incoming.owned

    def fewer(manifest: Any, copy_id: str, offset: int, files: Any) -> Any:
        return owned(manifest, copy_id, offset, files[1:])

    return [(incoming, "owned", fewer)]


@_mutation("raw events are dropped that nobody writes down", "kill", "power", recycle=True, retains=True)
def drop_without_writing_down() -> list[Patch]:
    return [(manifests, "added", lambda before, more: tuple(before))]


# ---------------------------------------------------------------- reads


@_mutation(
    "a leader goes on whatever becomes of its lease", "isolate", "cut_from_etcd", reads=700, chunks=120
)
def outlive_the_lease() -> list[Patch]:
    return [
        (StoreNode, "_check_lease", lambda self: None),
        (Leading, "_hears_majority", lambda self, now_ns: True),
        (Replica, "lease_lost", lambda self, now_ns: []),
    ]
