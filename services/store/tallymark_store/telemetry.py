"""What a store tells about itself: its log, its partitions at whatever role, and what it judged.

Owns the families' declarations and reads public attributes of the driver when it is asked; nothing here runs
otherwise. Where a store isn't running yet it tells nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from tallymark_runtime.clock import Clock
from tallymark_runtime.logs import LeadershipChange
from tallymark_runtime.telemetry import NS, Family, Scrape, add_outcomes
from tallymark_store.counters import StoreCounters
from tallymark_store.partition import Partition
from tallymark_store.replication.effects import Role
from tallymark_store.replication.replica import Replica
from tallymark_store.service import StoreService
from tallymark_store.store import Store
from tallymark_store.wal import Wal

if TYPE_CHECKING:
    from tallymark_store.archive.archiver import Archiver

_PARTITION = ("partition",)
CHANGES: Final[tuple[LeadershipChange, ...]] = ("gained", "lost", "failed")
_NAMED_MAX = 3  # partitions that a sentence names

APPENDS = Family("tallymark_store_appends_total", "counter", "Payloads judged as leader.")
EVENTS = Family(
    "tallymark_store_events_total",
    "counter",
    'Events judged as leader, by outcome: "stored", "repeat" (of a chunk that is in the log already), or why not.',
    ("outcome",),
)
FOLDED = Family("tallymark_store_folded_events_total", "counter", "Events folded into totals, in any role.")
HELD_TAILS = Family(
    "tallymark_store_held_tails", "gauge", "Calls of the alerts role that wait here for alert records."
)
BACKLOG = Family("tallymark_store_backlog_bytes", "gauge", "Payloads appended and not folded yet.")
SYNC_SECONDS = Family(
    "tallymark_store_sync_seconds", "histogram", "A write to the log and its fsync together.", scale=NS
)
SYNCED_BYTES = Family("tallymark_store_synced_bytes_total", "counter", "Bytes written to the log and synced.")
UNSYNCED_BYTES = Family("tallymark_store_unsynced_bytes", "gauge", "Taken into the log and not synced yet.")
LOG_BYTES = Family("tallymark_store_log_bytes", "gauge", "Size of all log files.")
RECYCLED_BYTES = Family(
    "tallymark_store_recycled_bytes_total",
    "counter",
    "Log files removed: archive and checkpoints hold what was in them.",
)
LOG_FULL = Family("tallymark_store_log_full", "gauge", "1 while there is no room for more log.")
CHECKPOINTS = Family("tallymark_store_checkpoints_total", "counter", "Checkpoints taken.")
CHECKPOINT_AGE = Family(
    "tallymark_store_checkpoint_age_seconds",
    "gauge",
    "Time since the last checkpoint was finished, or since the start.",
    scale=NS,
)
CHECKPOINT_SECONDS = Family(
    "tallymark_store_checkpoint_seconds", "gauge", "How long the last checkpoint took.", scale=NS
)
SNAPSHOTS = Family(
    "tallymark_store_snapshots_total",
    "counter",
    'Checkpoints sent to copies that lack what is no longer in the log ("sent"), and taken over as such ("installed").',
    ("change",),
)
SNAPSHOT_BYTES = Family(
    "tallymark_store_snapshot_bytes_total",
    "counter",
    'Bytes of such checkpoints, "sent" or "received".',
    ("change",),
)
ARCHIVED_EVENTS = Family(
    "tallymark_store_archived_events_total", "counter", "Events written to the archive, merges not counted."
)
ARCHIVE_MERGES = Family(
    "tallymark_store_archive_merges_total", "counter", "Archive files that were made of smaller ones."
)
ARCHIVE_DROPPED = Family(
    "tallymark_store_archive_dropped_total",
    "counter",
    "Raw events that were dropped from the archive after their metric's time.",
)
ARCHIVE_FAILURES = Family(
    "tallymark_store_archive_failures_total",
    "counter",
    "Times that archiving was left for later, or given up for a copy.",
)
ARCHIVE_SECONDS = Family(
    "tallymark_store_archive_seconds",
    "histogram",
    "Making an archive file, a merged one, or one without what was dropped.",
    scale=NS,
)
MEMORY_BUDGET = Family(
    "tallymark_store_memory_budget_bytes", "gauge", "What `memory_bytes` gives this store."
)
LEASE_SECONDS = Family(
    "tallymark_store_lease_seconds",
    "gauge",
    "How much longer this node may rely on its lease as it stands; below 0 it has run out.",
    scale=NS,
)
LINK_BYTES = Family(
    "tallymark_store_link_unsent_bytes",
    "gauge",
    "What waits to be sent to another store; absent while there is no connection to it.",
    ("peer",),
)
LINK_DROPS = Family(
    "tallymark_store_link_drops_total",
    "counter",
    "Bundles of messages not sent to other stores, for lack of a connection or of room. What matters is sent again.",
)
CLOCK_DIFFERENCE = Family(
    "tallymark_store_clock_difference_seconds",
    "gauge",
    "How far another store's clock is ahead of this one's; absent where nothing was heard of it lately.",
    ("peer",),
    scale=NS,
)
LOG_END = Family(
    "tallymark_partition_log_end", "gauge", "Next offset to be written, at this copy.", _PARTITION
)
LOG_START = Family(
    "tallymark_partition_log_start", "gauge", "Nothing below is in this copy's log.", _PARTITION
)
HIGH_WATERMARK = Family(
    "tallymark_partition_high_watermark",
    "gauge",
    "Everything below is on a majority's disks, as far as this copy knows.",
    _PARTITION,
)
APPLIED = Family(
    "tallymark_partition_applied", "gauge", "Everything below is in this copy's totals.", _PARTITION
)
WAITING = Family(
    "tallymark_partition_waiting_answers", "gauge", "Answers that wait for their commit.", _PARTITION
)
EPOCH = Family(
    "tallymark_partition_epoch",
    "gauge",
    "Epoch of this node's leadership; 0 while it does not lead.",
    _PARTITION,
)
ROLE = Family(
    "tallymark_partition_role",
    "gauge",
    "1 for the role that this copy has: follower, candidate, starting, leader or damaged.",
    ("partition", "role"),
)
LEADERSHIP = Family(
    "tallymark_partition_leadership_changes_total",
    "counter",
    'Changes of leadership at this node: "gained", "lost", or "failed" (tried in vain).',
    ("partition", "change"),
)
REPLICA_LAG = Family(
    "tallymark_partition_replica_lag",
    "gauge",
    "At the leader: offsets that a follower has not on disk yet, as far as it has said.",
    ("partition", "follower"),
)
IDS = Family(
    "tallymark_partition_remembered_ids",
    "gauge",
    "Event ids kept to tell duplicates, not swept ones included.",
    _PARTITION,
)
IDS_ON_DISK = Family(
    "tallymark_partition_remembered_ids_on_disk",
    "gauge",
    "Event ids in files that repeats are looked up in.",
    _PARTITION,
)
ID_BYTES = Family(
    "tallymark_partition_remembered_bytes",
    "gauge",
    "Memory of event ids and producers' sequences.",
    _PARTITION,
)
CELLS = Family("tallymark_partition_cells", "gauge", "Period and day cells.", _PARTITION)
CELLS_ON_DISK = Family(
    "tallymark_partition_cells_on_disk", "gauge", "Cells that are in files only.", _PARTITION
)
CELL_FILES = Family("tallymark_partition_cell_files", "gauge", "Files of cells.", _PARTITION)
ALERTS = Family(
    "tallymark_partition_alerts", "gauge", "Alert records, since the partition began.", _PARTITION
)
ALERTS_ON_DISK = Family(
    "tallymark_partition_alerts_on_disk", "gauge", "Alert records that are in files only.", _PARTITION
)
FOLD_BYTES = Family(
    "tallymark_partition_totals_bytes", "gauge", "Memory of cells, sets and alerts.", _PARTITION
)

ARCHIVED = Family(
    "tallymark_partition_archived",
    "gauge",
    "Everything below is in this copy's archive; absent where there is none.",
    _PARTITION,
)
ARCHIVE_REFUSED = Family(
    "tallymark_partition_archive_refused",
    "gauge",
    "1 while this copy's archive is left as it is, as it is of no use; absent while archiving is off.",
    _PARTITION,
)
ARCHIVE_FILES = Family("tallymark_partition_archive_files", "gauge", "Files of the archive.", _PARTITION)
ARCHIVE_BYTES = Family("tallymark_partition_archive_bytes", "gauge", "Size of those files.", _PARTITION)


class StoreTelemetry:
    """Reads a store. Give it to `Telemetry.add`."""

    def __init__(self, service: StoreService, clock: Clock) -> None:
        self._service = service
        self._clock = clock

    def __call__(self, scrape: Scrape) -> None:
        """Add what there is to tell now."""
        service, now_ns = self._service, self._clock.monotonic_ns()
        store = service.driver
        if store is None:
            return
        _add_counters(scrape, store.counters)
        scrape.add(FOLDED, store.events_folded)
        scrape.add(HELD_TAILS, store.tail.held_count)
        scrape.add(BACKLOG, store.backlog_bytes)
        _add_log(scrape, store.wal)
        for number, partition in sorted(store.partitions.items()):
            _add_partition(scrape, partition, store.replicas.get(number))
            for change in CHANGES:
                changes = store.counters.leadership.get((number, change), 0)
                scrape.add(LEADERSHIP, changes, str(number), change)
        checkpointer = service.checkpointer
        if checkpointer is not None:
            scrape.add(RECYCLED_BYTES, checkpointer.recycled_bytes)
            scrape.add(CHECKPOINTS, checkpointer.count)
            scrape.add(CHECKPOINT_AGE, now_ns - checkpointer.finished_ns)
            scrape.add(CHECKPOINT_SECONDS, checkpointer.took_ns)
        snapshots = service.node.snapshots
        if snapshots is not None:
            scrape.add(SNAPSHOTS, snapshots.sending.sent, "sent")
            scrape.add(SNAPSHOTS, snapshots.installed, "installed")
            scrape.add(SNAPSHOT_BYTES, snapshots.sending.sent_bytes, "sent")
            scrape.add(SNAPSHOT_BYTES, snapshots.received_bytes, "received")
        if service.archiver is not None:
            _add_archive(scrape, service.archiver, sorted(store.replicas))
        memory = service.node.memory_bytes
        if memory is not None:
            scrape.add(MEMORY_BUDGET, memory)
        deadline_ns = service.node.lease_deadline_ns
        scrape.add(LEASE_SECONDS, deadline_ns - now_ns if deadline_ns else 0)
        scrape.add(LINK_DROPS, service.peers.dropped)
        for node_id, difference_ns in store.replicating.fitness.clock_differences().items():
            scrape.add(CLOCK_DIFFERENCE, difference_ns, node_id)
        for node_id, waiting in sorted(service.peers.unsent_bytes().items()):
            scrape.add(LINK_BYTES, waiting, node_id)


def _add_counters(scrape: Scrape, counters: StoreCounters) -> None:
    scrape.add(APPENDS, counters.appends)
    add_outcomes(scrape, EVENTS, counters.stored, counters.outcomes)


def _add_log(scrape: Scrape, wal: Wal) -> None:
    scrape.add_histogram(SYNC_SECONDS, wal.sync_ns)
    scrape.add(SYNCED_BYTES, wal.synced_bytes)
    scrape.add(UNSYNCED_BYTES, wal.buffer_bytes)
    scrape.add(LOG_BYTES, wal.total_bytes)
    scrape.add(LOG_FULL, wal.full)


def _add_archive(scrape: Scrape, archiver: Archiver, copies: list[int]) -> None:
    for number in copies:
        scrape.add(ARCHIVE_REFUSED, archiver.problem(number) != "", str(number))
    scrape.add(ARCHIVED_EVENTS, archiver.events_archived)
    scrape.add(ARCHIVE_MERGES, archiver.merges)
    scrape.add(ARCHIVE_DROPPED, archiver.events_dropped)
    scrape.add(ARCHIVE_FAILURES, archiver.failures)
    scrape.add_histogram(ARCHIVE_SECONDS, archiver.took_ns)
    for number, archive in sorted(archiver.archives.items()):
        scrape.add(ARCHIVED, archive.manifest.end_offset, str(number))
        scrape.add(ARCHIVE_FILES, len(archive.manifest.files), str(number))
        scrape.add(ARCHIVE_BYTES, archive.manifest.bytes, str(number))


def _add_partition(scrape: Scrape, partition: Partition, replica: Replica | None) -> None:
    label = str(partition.partition)
    log_end = partition.log_end
    scrape.add(LOG_START, partition.index.log_start, label)
    scrape.add(LOG_END, log_end, label)
    scrape.add(HIGH_WATERMARK, partition.high_watermark, label)
    scrape.add(APPLIED, partition.applied, label)
    scrape.add(WAITING, partition.waiting_count, label)
    scrape.add(EPOCH, partition.epoch, label)
    scrape.add(IDS, len(partition.dedup), label)
    scrape.add(IDS_ON_DISK, partition.dedup.spilled_count, label)
    scrape.add(ID_BYTES, partition.dedup.memory_bytes + partition.windows.memory_bytes, label)
    scrape.add(CELLS, partition.fold.cell_count, label)
    scrape.add(CELLS_ON_DISK, partition.fold.spilled_cell_count, label)
    scrape.add(CELL_FILES, len(partition.fold.spilled.files), label)
    scrape.add(ALERTS, partition.fold.alert_count, label)
    scrape.add(ALERTS_ON_DISK, partition.fold.alert_files.end, label)
    scrape.add(FOLD_BYTES, partition.fold.memory_bytes(), label)
    if replica is None:
        return
    for role in Role:
        scrape.add(ROLE, replica.role is role, label, role.value)
    if replica.role is Role.LEADER:
        for node, progress in sorted(replica.followers.items()):
            scrape.add(REPLICA_LAG, max(log_end - progress.match_end, 0), label, node)


def store_problem(store: Store | None) -> str:
    """Why a store doesn't take its part in every partition that it holds a copy of; "" where it does."""
    if store is None:
        return "is starting"
    problems = []
    for number, partition in sorted(store.partitions.items()):
        replica = store.replicas.get(number)
        if partition.error is not None:
            problems.append(f"partition {number} is refused ({partition.error.message})")
        elif replica is None:
            continue  # no copy of it is here
        elif replica.role is Role.DAMAGED:
            problems.append(f"partition {number} is damaged ({replica.why})")
        elif replica.role is not Role.LEADER and not (replica.role is Role.FOLLOWER and replica.leader):
            problems.append(f"partition {number} has no leader that this copy follows ({replica.role.value})")
    if not problems:
        return ""
    more = f", and {len(problems) - _NAMED_MAX} more" if len(problems) > _NAMED_MAX else ""
    return "; ".join(problems[:_NAMED_MAX]) + more
