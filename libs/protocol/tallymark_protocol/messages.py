"""Message bodies: what travels inside frames, other than chunks and payloads.

Structs are MessagePack arrays: a newer peer may append fields with defaults, an older one ignores what it does
not know. 128-bit sums are 16 bytes, little-endian, two's complement. Times are i64 ns, ranges half-open.

Frame types and who sends what::

    HELLO / WELCOME      first frame either way; versions, features, topology
    INGEST -> RECEIPT    a chunk (bytes of `layout`) to a gateway
    APPEND -> APPENDED   a payload from a gateway to the leader of its partition
    CALL -> RESULT       one struct of the union `Call`; the answer's type goes with the call's
    ERROR                instead of any answer: a `WireError`
    PING -> PONG         empty
    REPLICATE            from a store to another: what replicas say to each other; one way, never answered
    GOAWAY               the server stops taking requests on this connection; answers under way still come
"""

from __future__ import annotations

import enum
from typing import Final

import msgspec

from tallymark_protocol.errors import WireError
from tallymark_protocol.model import MetricSchema
from tallymark_protocol.periods import Period, PeriodSpec

PROTOCOL_VERSION: Final = 1
PROTOCOL_VERSION_MIN: Final = 1


class FrameType(enum.IntEnum):
    """What a frame carries."""

    HELLO = 1
    WELCOME = 2
    ERROR = 3
    GOAWAY = 4
    PING = 5
    PONG = 6
    REPLICATE = 8
    INGEST = 16
    RECEIPT = 17
    APPEND = 32
    APPENDED = 33
    CALL = 48
    RESULT = 49


class Consistency(enum.IntEnum):
    """Which copy of a partition may answer a read, and how sure it must be of its place."""

    LEADER = 0  # the leader, while its lease lasts: what a receipt has confirmed is counted
    STALE = 1  # any copy; the answer says how far it is behind
    QUORUM = 2  # the leader, after a majority has confirmed that its epoch still is the highest


class Message(msgspec.Struct, array_like=True, frozen=True):
    """Base of every message body."""


# What a read's answer says of the copy it comes from, wherever `as_of`, `lag` and `silence_ms` appear:
# `as_of` is the applied offset it was computed at. `lag` is how many offsets below the high watermark, as that copy
# last heard of it, are not counted; 0 at a leader, but for STALE reads while it has not folded all of it. A copy that is
# cut off hears of no newer high watermark, so `silence_ms` says how long ago it last heard from a leader: 0 at a leader,
# -1 if it hasn't since it started.


# ---------------------------------------------------------------- handshake


class Hello(Message, frozen=True):
    """The first frame of a client (or of a node that connects to another)."""

    version_min: int
    version_max: int
    software: str = ""  # name and version, for logs only
    features: list[str] = []


class Topology(Message, frozen=True):
    """Where to send what. Addresses are "host:port"."""

    partition_count: int
    gateways: list[str] = []
    query: list[str] = []
    alerts: list[str] = []
    refresh_seconds: int = 30


class Welcome(Message, frozen=True):
    """The answer to Hello: the highest version both speak, the features both have."""

    version: int
    node_id: str
    role: str  # "ingest", "store", "query", "alerts", or several joined by "+"
    now_ns: int  # the server's clock, so that clients can stamp chunks in server time
    features: list[str] = []
    topology: Topology | None = None  # from gateways
    request_events_max: int = 0
    request_bytes_max: int = 0


# ---------------------------------------------------------------- ingest


class PartitionRun(Message, frozen=True):
    """Where a chunk's events for one partition lie: in chunk order at offsets [base, base + count)."""

    partition: int
    base_offset: int
    count: int


class EventOutcome(Message, frozen=True):
    """What became of an event that was not simply stored."""

    index: int  # in the chunk
    reason: int  # errors.Reason
    partition: int
    offset: int  # of the original event for a duplicate or a conflict, else -1


class PartitionFailure(Message, frozen=True):
    """The chunk's events for one partition were not resolved: stored or not is open unless `not_stored`."""

    partition: int
    count: int
    error: WireError
    not_stored: bool = False  # true where the leader refused them, so that nothing of them is in the log


class Receipt(Message, frozen=True):
    """The answer to a chunk. Events not in `outcomes` and not of a failed partition are stored."""

    partition_count: int
    runs: list[PartitionRun]
    outcomes: list[EventOutcome] = []
    failures: list[PartitionFailure] = []


# APPEND is this header (msgpack), preceded by its length as a u16, followed by the payload's bytes.
class AppendHeader(Message, frozen=True):
    """A gateway's request to the leader of a partition."""

    partition: int
    checksum: int  # CRC-32C of the payload
    is_async: bool = False  # every chunk in it was sent with ASYNC
    metrics_revision: int = 0  # the leader judges only once it knows the metrics as of this revision


class ChunkOutcome(Message, frozen=True):
    """What became of one chunk of a payload, in the order of its chunk table."""

    base_offset: int  # of its first event; -1 where error is set
    # (index in the payload's part of the chunk, reason, offset of the original or -1), for events not stored
    exceptions: list[tuple[int, int, int]] = []
    error: WireError | None = None


class Appended(Message, frozen=True):
    """The answer to an APPEND."""

    chunks: list[ChunkOutcome] | None = (
        None  # None: all chunks new and all events stored, from base_offset on
    )
    base_offset: int = -1


# ---------------------------------------------------------------- totals


class Stats(Message, frozen=True):
    """The statistics of a set of events. `sum` is 16 bytes; min, max, last are None when there is none.

    For COUNT_UNIQUE metrics `count` is the number of operations and only `unique` is set beside it.
    """

    count: int = 0
    sum: bytes = b"\x00" * 16
    min: int | None = None
    max: int | None = None
    last_value: int | None = None
    last_event_at: int | None = None
    last_offset: int = -1
    unique: int | None = None
    alert_flags: int = 0  # bit i: threshold i was crossed in this period (period totals only)


class Row(Message, frozen=True):
    """Statistics of one group in one bucket.

    `group` has one entry per group_by key: ("value", text), None where the property was missing, and
    OTHER where its value is not a declared one.
    """

    stats: Stats
    bucket: int = 0
    group: list[GroupValue] = []
    account_id: int = -1  # set in Top rows


class GroupValue(Message, frozen=True):
    """One dimension value of a group: kind 0 = a value, 1 = missing, 2 = other (undeclared values)."""

    kind: int
    value: str = ""


class Filter(Message, frozen=True):
    """A dimension must have one of these values."""

    key: str
    values: list[str]


# ---------------------------------------------------------------- calls to a store (leader of a partition)


class StoreTotals(Message, frozen=True, tag="store_totals"):
    """Statistics of one account's events of one metric, exactly those timed in each bucket.

    Buckets are sorted and disjoint. `account_id = None` with `top > 0` ranks accounts by the aggregate
    of the single bucket (no group_by), the best first, ties by account id; `after` unused.
    """

    partition: int
    metric_code: str
    account_id: int | None
    buckets: list[tuple[int, int]]
    filters: list[Filter] = []
    group_by: list[str] = []
    top: int = 0
    consistency: Consistency = Consistency.LEADER


class TotalsResult(Message, frozen=True):
    """Rows with at least one event (or operation); a single ungrouped bucket always gives one row per bucket."""

    rows: list[Row]
    as_of: int  # applied offset the answer was computed at
    partition: int = 0
    metric_uid: int = 0
    lag: int = 0
    silence_ms: int = 0


class StoreRealtime(Message, frozen=True, tag="store_realtime"):
    """The running total of the billing period that contains `at_ns` (None: now)."""

    partition: int
    metric_code: str
    account_id: int
    at_ns: int | None = None
    consistency: Consistency = Consistency.LEADER


class RealtimeResult(Message, frozen=True):
    """The period cell."""

    stats: Stats
    start_ns: int
    end_ns: int
    as_of: int
    partition: int = 0
    lag: int = 0
    silence_ms: int = 0


class StoreEvents(Message, frozen=True, tag="store_events"):
    """Accepted events in log order, from offset `from_offset` on, of an account (None: all) and metric (None: all)."""

    partition: int
    account_id: int | None
    metric_code: str | None
    start_ns: int
    end_ns: int
    from_offset: int = 0
    limit: int = 100
    consistency: Consistency = Consistency.LEADER


class EventRecord(Message, frozen=True):
    """One stored event as it is given back."""

    account_id: int
    metric_code: str
    value: int | str
    event_time_ns: int
    append_time_ns: int
    operation: int
    properties: dict[str, str]
    event_id: bytes | None  # typed canonical form
    partition: int
    offset: int


class EventsResult(Message, frozen=True):
    """A page; `next_offset` continues after it, None at the end."""

    events: list[EventRecord]
    next_offset: int | None
    as_of: int
    lag: int = 0
    silence_ms: int = 0


class StoreAlerts(Message, frozen=True, tag="store_alerts"):
    """Alert records of a partition from a position on, in log order, raised in [start_ns, end_ns).

    The two lists say the same as the single filters do, for many; but a code in `metric_codes` stands for every metric
    that ever had it, and need not exist.
    """

    partition: int
    account_id: int | None = None
    metric_code: str | None = None
    from_position: int = 0  # position in the partition's sequence of alert records
    limit: int = 1_000
    consistency: Consistency = Consistency.LEADER
    start_ns: int = 0  # of the append time of the crossing event
    end_ns: int = 2**63 - 1
    account_ids: list[int] = []  # none: all
    metric_codes: list[str] = []  # none: all


class AlertRecord(Message, frozen=True):
    """A threshold crossing."""

    id: str
    account_id: int
    metric_code: str
    threshold_code: str
    threshold_value: int
    period_start_ns: int
    period_end_ns: int
    value_at_cross: bytes  # 16 bytes
    first_multiple: bytes  # 16 bytes; 1 for a threshold that does not recur
    last_multiple: bytes
    triggered_at_ns: int  # append time of the crossing event
    event_offset: int
    partition: int
    position: int  # in the partition's sequence of alert records


class AlertsResult(Message, frozen=True):
    """A page of alert records; `next_position` is where to go on (also when the page is empty)."""

    alerts: list[AlertRecord]
    next_position: int
    more: bool
    as_of: int = -1  # -1 from a store of an earlier version
    lag: int = 0
    silence_ms: int = 0


class StoreTail(Message, frozen=True, tag="store_tail"):
    """New alert records of partitions that a store leads; answered as soon as there are any, or the wait is over.

    A partition that it doesn't lead is refused, at once.
    """

    positions: dict[int, int]  # by partition: the position to go on from
    limit: int = 1_000  # records in all
    wait_ms: int = 0


class TailPart(Message, frozen=True):
    """New alert records of one partition, without a gap from the position asked for on."""

    partition: int
    alerts: list[AlertRecord]
    end: int  # how many records the partition has: the position of the next one


class TailResult(Message, frozen=True):
    """Answer to StoreTail. Partitions without news are in neither."""

    parts: list[TailPart]
    refused: dict[int, WireError] = {}


class StoreStatus(Message, frozen=True, tag="store_status"):
    """Ask a store what it holds."""


class PartitionStatus(Message, frozen=True):
    """One partition at a store."""

    partition: int
    epoch: int
    log_end: int
    high_watermark: int
    applied: int
    error: str = ""  # why it is not served
    digest: str = ""  # logical digest of the applied state, only when asked for by StoreDigest
    role: str = ""  # "follower", "candidate", "starting", "leader" or "damaged"
    leader: str = ""  # node id of whom this copy follows; "" if it knows none
    members: list[tuple[str, str]] = []  # (node id, copy id) that make the quorum, by this copy's log
    lags: dict[str, int] = {}  # at the leader: by node id, how many offsets a copy lacks; learners too
    copy_id: str = ""  # of this copy


class StatusResult(Message, frozen=True):
    """All partitions of a store."""

    node_id: str
    partitions: list[PartitionStatus]
    log_bytes: int
    log_full: bool
    details: dict[str, int] = {}


class StoreDigest(Message, frozen=True, tag="store_digest"):
    """Logical digest of a partition's state, and (with `recount`) of a from-scratch recount of its log."""

    partition: int
    recount: bool = False


class StoreBackup(Message, frozen=True, tag="store_backup"):
    """Ask a partition's leader to keep what a backup is made of, as of now, while it is read by StoreBackupRead."""

    partition: int
    digest: bool = False  # say the state's digest, too, which holds the store up for a moment


class BackupFile(Message, frozen=True):
    """One file of a backup's plan."""

    kind: str  # "checkpoint" or "archive"
    name: str
    bytes: int
    crc32c: int


class BackupPlan(Message, frozen=True):
    """What a partition's backup is made of: answer to StoreBackup."""

    token: str  # of what is kept; for StoreBackupRead
    log_start: int  # the first offset of the log that belongs to it
    log_end: int  # exclusive; everything below is committed
    checkpoint: bytes  # its manifest, MessagePack; empty where there is none
    archive: bytes  # its manifest, JSON; empty where there is none
    files: list[BackupFile]
    digest: str = ""  # of the state at `log_end`, if it was asked for
    archive_problem: str = ""  # why there is no archive in it, where there should be one


class StoreBackupRead(Message, frozen=True, tag="store_backup_read"):
    """Read a piece of a file that is kept for a backup, or of the log."""

    token: str
    name: str  # of a file; empty: the log
    position: int  # in the file; in the log: the offset that a record begins at
    length: int  # at most
    skip: int = 0  # in the log: bytes of the first record that are passed over


class BackupPiece(Message, frozen=True):
    """Answer to StoreBackupRead."""

    data: bytes
    # Of a piece of the log: where to go on, and what is known of the record that ends at `position`.
    next_offset: int = 0
    next_skip: int = 0
    epoch: int = 0
    append_ns: int = 0


# ---------------------------------------------------------------- calls to a query node


class QueryTotals(Message, frozen=True, tag="query_totals"):
    """One account's usage of a metric in a period, filtered."""

    account_id: int
    metric_code: str
    period: PeriodSpec | Period
    filters: list[Filter] = []
    group_by: list[str] = []
    unit: str | None = None  # "hour", "day", "month": a time series
    consistency: Consistency = Consistency.LEADER


class QueryRealtime(Message, frozen=True, tag="query_realtime"):
    """One account's running total in the current billing period."""

    account_id: int
    metric_code: str
    consistency: Consistency = Consistency.LEADER


class QueryTop(Message, frozen=True, tag="query_top"):
    """The accounts with the highest aggregate."""

    metric_code: str
    period: PeriodSpec | Period
    limit: int = 10
    filters: list[Filter] = []
    consistency: Consistency = Consistency.LEADER


class QueryEvents(Message, frozen=True, tag="query_events"):
    """Raw events, paginated: pass the `cursor` of the page before."""

    account_id: int
    start_ns: int
    end_ns: int
    metric_code: str | None = None
    cursor: str = ""
    limit: int = 1_000
    consistency: Consistency = Consistency.LEADER


class QueryAlerts(Message, frozen=True, tag="query_alerts"):
    """Alert records raised in [start_ns, end_ns); `since` maps partition to the position to read from."""

    account_id: int | None = None
    metric_code: str | None = None
    since: dict[int, int] = {}
    limit: int = 1_000
    consistency: Consistency = Consistency.LEADER
    start_ns: int = 0  # of the append time of the crossing event
    end_ns: int = 2**63 - 1


class AlertsFetch(Message, frozen=True, tag="alerts_fetch"):
    """A subscriber's next alerts; answered as soon as there are any, or the wait is over.

    The cursor is the caller's: whichever instance is asked, the answer goes on from `since`.
    """

    account_ids: list[int] = []  # none: all
    metric_codes: list[str] = []  # none: all
    since: dict[int, int] | None = None  # by partition, absent ones from the first; None: from now on
    limit: int = 64
    wait_ms: int = 0


class AlertsBatch(Message, frozen=True):
    """Answer to AlertsFetch: matching alerts, in order within each partition, and the `since` that continues.

    `next` is past alerts that don't match, too. It names every partition.
    """

    alerts: list[AlertRecord]
    next: dict[int, int]


class WebhookCreate(Message, frozen=True, tag="webhook_create"):
    """Have matching alerts posted to a URL, from now on, or from the first one."""

    url: str
    secret: str = ""  # "whsec_" and base64 of 24 to 64 bytes; "": one is made
    account_ids: list[int] = []  # none: all
    metric_codes: list[str] = []  # none: all
    description: str = ""
    from_start: bool = False


class WebhookList(Message, frozen=True, tag="webhook_list"):
    """All webhooks, by their age."""


class WebhookDelete(Message, frozen=True, tag="webhook_delete"):
    """Forget a webhook, what it has yet to be told, and its dead letters."""

    webhook_id: str


class WebhookDeadLetters(Message, frozen=True, tag="webhook_dead_letters"):
    """What could not be delivered to a webhook, the oldest first."""

    webhook_id: str
    limit: int = 100


class WebhookRedeliver(Message, frozen=True, tag="webhook_redeliver"):
    """Try dead letters again, as if they were new."""

    webhook_id: str
    alert_ids: list[str] = []  # none: all


class WebhookInfo(Message, frozen=True):
    """A webhook, and how far it is."""

    id: str
    url: str
    account_ids: list[int]
    metric_codes: list[str]
    description: str
    created_at_ns: int
    secret: str = ""  # only in the answer to WebhookCreate
    pending: int = 0  # deliveries that failed and are tried again
    dead: int = 0  # dead letters
    paused: str = ""  # why nothing new is tried; ""
    last_error: str = ""  # of the last attempt; "" where that went well
    owner: str = ""  # the instance that delivers


class WebhooksResult(Message, frozen=True):
    """Answer to every change of webhooks, and to WebhookList: those concerned."""

    webhooks: list[WebhookInfo]


class DeadLetter(Message, frozen=True):
    """An alert that could not be delivered."""

    alert: AlertRecord
    attempts: int
    first_ns: int  # of the first attempt
    last_ns: int
    error: str  # of the last attempt


class DeadLettersResult(Message, frozen=True):
    """Answer to WebhookDeadLetters."""

    letters: list[DeadLetter]
    count: int  # of all there are


class QueryResult(Message, frozen=True):
    """Answer to QueryTotals, QueryTop and QueryRealtime. Bounds are those the answer was computed with."""

    rows: list[Row]
    start_ns: int
    end_ns: int
    buckets: list[tuple[int, int]] = []
    as_of: dict[int, int] = {}  # offset by partition
    agg_type: int = 0
    lag: dict[int, int] = {}  # by partition, of those where it isn't 0
    silence_ms: dict[int, int] = {}  # likewise


class EventsPage(Message, frozen=True):
    """Answer to QueryEvents; an empty cursor means that there is no more."""

    events: list[EventRecord]
    cursor: str
    as_of: dict[int, int] = {}
    lag: dict[int, int] = {}
    silence_ms: dict[int, int] = {}


class AlertsPage(Message, frozen=True):
    """Answer to QueryAlerts; `next` is the `since` that continues."""

    alerts: list[AlertRecord]
    next: dict[int, int]
    more: bool
    as_of: dict[int, int] = {}
    lag: dict[int, int] = {}
    silence_ms: dict[int, int] = {}


# ---------------------------------------------------------------- calls to a gateway


class GetTopology(Message, frozen=True, tag="get_topology"):
    """Ask for the topology again."""


class MetricCreate(Message, frozen=True, tag="metric_create"):
    """Create a metric."""

    schema: MetricSchema


class MetricUpdate(Message, frozen=True, tag="metric_update"):
    """Change what may be changed of a metric: add thresholds, add dimension values, description."""

    schema: MetricSchema


class MetricDelete(Message, frozen=True, tag="metric_delete"):
    """Delete a metric. Its events stay; its code can be created anew, with a new uid."""

    code: str


class MetricList(Message, frozen=True, tag="metric_list"):
    """All metrics."""


class MetricInfo(Message, frozen=True):
    """A metric as it is."""

    uid: int
    version: int
    schema: MetricSchema


class MetricsResult(Message, frozen=True):
    """Answer to every Metric call: the metrics concerned."""

    metrics: list[MetricInfo]


class ClusterStatus(Message, frozen=True, tag="cluster_status"):
    """What the cluster's stores are, and how far they are from what is wished."""


class ClusterDrain(Message, frozen=True, tag="cluster_drain"):
    """Move everything off a store and give it nothing more; with `undo` let it be given copies again."""

    node_id: str
    undo: bool = False


class ClusterRebalance(Message, frozen=True, tag="cluster_rebalance"):
    """Spread copies and leaderships evenly; new stores get their share. 0: as many copies as before."""

    replication_factor: int = 0


class ClusterReplace(Message, frozen=True, tag="cluster_replace"):
    """Move a store's copies to a successor, or to whom they suit; the store gets nothing more."""

    node_id: str
    successor: str = ""


class ClusterRecover(Message, frozen=True, tag="cluster_recover"):
    """Raise the epoch base, after the coordinator was restored from a backup."""


class StoreInfo(Message, frozen=True):
    """A store, as the cluster knows it."""

    node_id: str
    address: str  # "" while it is not registered
    zone: str
    is_up: bool  # registered with the coordinator
    is_draining: bool
    wished: int  # copies that it shall hold
    held: int  # copies of it that are members
    led: int  # partitions that it leads
    error: str = ""  # why it could not be asked
    log_bytes: int = 0
    is_full: bool = False


class PartitionInfo(Message, frozen=True):
    """A partition, as its leader tells, or the most advanced copy that answers where there is no leader."""

    partition: int
    wished: list[str]  # node ids, the preferred leader first
    members: list[str]
    leader: str  # "" while nobody leads it
    epoch: int = 0
    log_end: int = 0
    high_watermark: int = 0
    lags: dict[str, int] = {}  # by node id
    error: str = ""

    @property
    def is_settled(self) -> bool:
        """Whether the fact is what is wished: these members and this leader."""
        return self.is_placed and self.leader == self.wished[0]

    @property
    def is_placed(self) -> bool:
        """Whether it has the members that are wished, and a leader."""
        return bool(self.leader) and bool(self.wished) and sorted(self.members) == sorted(self.wished)


class ClusterInfo(Message, frozen=True):
    """Answer to ClusterStatus."""

    stores: list[StoreInfo]
    partitions: list[PartitionInfo]
    replication_factor: int
    epoch_base: int = 0


class ClusterChange(Message, frozen=True):
    """Answer to every change of a cluster: what will move."""

    moves: list[tuple[int, str, str]]  # (partition, from, to); "" where a copy is only added, or only removed
    leaders: list[tuple[int, str, str]] = []  # (partition, from, to): preferred leaders that change
    epoch_base: int = 0  # after ClusterRecover


# ---------------------------------------------------------------- calls to the process that hosts the coordinator


class CoordinatorCall(Message, frozen=True, tag="coordinator"):
    """An operation of the coordinator port, for roles that run alone beside an embedded coordinator."""

    operation: str
    body: bytes


class CoordinatorResult(Message, frozen=True):
    """Its answer."""

    body: bytes


Call = (
    StoreTotals
    | StoreRealtime
    | StoreEvents
    | StoreAlerts
    | StoreTail
    | StoreStatus
    | StoreDigest
    | StoreBackup
    | StoreBackupRead
    | QueryTotals
    | QueryRealtime
    | QueryTop
    | QueryEvents
    | QueryAlerts
    | AlertsFetch
    | WebhookCreate
    | WebhookList
    | WebhookDelete
    | WebhookDeadLetters
    | WebhookRedeliver
    | GetTopology
    | MetricCreate
    | MetricUpdate
    | MetricDelete
    | MetricList
    | ClusterStatus
    | ClusterDrain
    | ClusterRebalance
    | ClusterReplace
    | ClusterRecover
    | CoordinatorCall
)
