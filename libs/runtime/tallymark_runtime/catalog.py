"""What every role knows of the cluster: metrics, leaders and nodes, followed from the coordinator.

Owns the coordinator's key names and the records under them. A catalog is a cache that is never behind what
its owner waited for (`wait_revision`); `fetch` looks beyond it and has it catch up, so that a metric made a
moment ago through another gateway is found, and its owner hears of that metric's end as of any other's.

    metrics/<code>         `schema.encode_record`; the stored uid is the epoch base, and `metric_of` adds the key's
                           create revision
    leaders/<partition>    `Leader`, under its node's lease; `epoch_of` tells the epoch
    nodes/<role>/<node>    `Node`, under its node's lease
    cluster                `Cluster`: constants fixed when the cluster is created
    epoch_base             `EpochBase`: what revisions count from; see `epochs`

Copies and who shall hold them are in `assignments`, how a cluster is first placed in `placement`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import TypeVar

import msgspec

from tallymark_protocol import limits
from tallymark_protocol.errors import (
    InvalidRequestError,
    NotFoundError,
    RemoteProtocolError,
    TallymarkError,
    UnavailableError,
)
from tallymark_protocol.schema import MetricRecord, decode_record
from tallymark_runtime.assignments import ASSIGNMENTS, Assignment, assignment_key
from tallymark_runtime.coordinator import (
    Coordinator,
    EventKind,
    Get,
    KeyValue,
    Put,
    Snapshot,
    absent,
    follow,
)

_log = logging.getLogger(__name__)

S = TypeVar("S", bound=msgspec.Struct)

METRICS = b"metrics/"
LEADERS = b"leaders/"
NODES = b"nodes/"
CLUSTER = b"cluster"
EPOCH_BASE = b"epoch_base"
FORMAT_VERSION = 1

RETRY_S = 0.2  # between attempts to reach the coordinator


class Leader(msgspec.Struct, frozen=True):
    """Who leads a partition."""

    node_id: str
    address: str  # "host:port" of the store
    instance: str  # of this process life
    epoch_base: int = 0  # when the key was created; the epoch is this plus the key's create revision


class Node(msgspec.Struct, frozen=True):
    """A process of some role."""

    node_id: str
    address: str
    role: str  # "ingest", "store", "query" or "alerts"
    zone: str = ""  # what may fail as one; copies of a partition are spread over zones


class EpochBase(msgspec.Struct, frozen=True):
    """What is added to revisions to make epochs and uids; 0 where it is not there."""

    base: int


class Cluster(msgspec.Struct, frozen=True):
    """Constants of a cluster, fixed by whichever store is its first."""

    partition_count: int
    format_version: int = FORMAT_VERSION
    # Random; data directories carry it, so that they never meet another coordinator's state.
    cluster_id: str = ""
    # How long event ids are remembered: a part of what the log means, so the same for every copy of it.
    dedup_window_ns: int = limits.DEDUP_WINDOW_NS


def metric_key(code: str) -> bytes:
    """The key under which a metric lies."""
    return METRICS + code.encode()


def leader_key(partition: int) -> bytes:
    """The key under which a partition's leader lies."""
    return LEADERS + str(partition).encode()


def node_key(role: str, node_id: str) -> bytes:
    """The key under which a node of a role lies."""
    return NODES + role.encode() + b"/" + node_id.encode()


def metric_of(item: KeyValue) -> MetricRecord:
    """The metric under a key: its uid is the base that it was stored with plus the key's create revision.

    Raises:
        RemoteProtocolError: the value is no record of that key's metric.
    """
    record = decode_record(item.value)
    if metric_key(record.schema.code) != item.key:
        raise RemoteProtocolError(f"the key {item.key!r} holds the metric {record.schema.code!r}")
    return msgspec.structs.replace(record, uid=record.uid + item.create_revision)


def epoch_of(item: KeyValue) -> int:
    """The epoch of a leader key: the base that it was created under plus its create revision.

    Raises:
        RemoteProtocolError: the key's value is no leader.
    """
    leader = decode_value(Leader, item)
    return leader.epoch_base + item.create_revision


def decode_value(kind: type[S], item: KeyValue) -> S:
    """A value of the types above.

    Raises:
        RemoteProtocolError: it is not one.
    """
    try:
        return msgspec.msgpack.decode(item.value, type=kind)
    except (ValueError, RecursionError) as error:  # what msgspec raises, all of it
        raise RemoteProtocolError(f"malformed value of {item.key!r}: {error}") from None


async def establish_cluster(coordinator: Coordinator, wanted: Cluster) -> Cluster:
    """Create the cluster's constants, or read those that are there already.

    Raises:
        InvalidRequestError: what is wanted is outside the limits.
        RemoteProtocolError: they were written by a version that this one does not know.
    """
    if not 1 <= wanted.partition_count <= limits.PARTITIONS_MAX:
        raise InvalidRequestError(
            f"a cluster has 1 to {limits.PARTITIONS_MAX} partitions, not {wanted.partition_count}"
        )
    await coordinator.txn([absent(CLUSTER)], [Put(CLUSTER, msgspec.msgpack.encode(wanted))])
    return await read_cluster(coordinator)


async def read_cluster(coordinator: Coordinator) -> Cluster:
    """Read the cluster's constants.

    Raises:
        UnavailableError: no store has made the cluster yet.
        RemoteProtocolError: they were written by a version that this one does not know.
    """
    item = await coordinator.get(CLUSTER)
    if item is None:
        raise UnavailableError("no store has made the cluster yet")
    found = decode_value(Cluster, item)
    if found.format_version != FORMAT_VERSION:
        raise RemoteProtocolError(
            f"the cluster has format version {found.format_version}; this software knows {FORMAT_VERSION}"
        )
    return found


class Catalog:
    """Follows one prefix of the coordinator in a task of its own. `start` it, `close` it."""

    def __init__(self, coordinator: Coordinator, prefix: bytes) -> None:
        self.coordinator = coordinator
        self.revision = 0  # everything up to this revision is known here
        self._prefix = prefix
        self._items: dict[bytes, KeyValue] = {}
        self._changed = asyncio.Event()  # set, and replaced, whenever something was taken in
        self._task: asyncio.Task[None] | None = None
        self._question: asyncio.Task[None] | None = None  # not asked yet: see `catch_up`
        self._asking = asyncio.Lock()

    async def start(self) -> None:
        """Begin to follow; returns when the first picture is there."""
        self._task = asyncio.get_running_loop().create_task(self._follow())
        await self.wait_revision(1)

    async def close(self) -> None:
        """Stop following."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def halt(self) -> None:
        """Hear of nothing any more, at once: a process that is to end in a moment waits for nobody."""
        if self._task is not None:
            self._task.cancel()

    async def wait_revision(self, revision: int) -> None:
        """Wait until every change up to `revision` is known, asking the coordinator where that takes long.

        Raises:
            UnavailableError: the coordinator cannot be reached, or has not seen such a revision itself.
        """
        while self.revision < revision:
            changed = self._changed
            try:
                async with asyncio.timeout(0.05):
                    await changed.wait()
            except TimeoutError:
                # The revision may have touched other prefixes only, of which a watch says nothing.
                await self._list()
                if self.revision < revision:
                    raise UnavailableError(
                        f"the coordinator is at revision {self.revision}, before {revision}"
                    ) from None

    async def catch_up(self) -> None:
        """Know everything that the coordinator knew when this was called; callers at one time share one question.

        Raises:
            UnavailableError: the coordinator cannot be reached.
        """
        if self._question is None:
            self._question = asyncio.get_running_loop().create_task(self._ask())
        await asyncio.shield(self._question)

    async def _ask(self) -> None:
        async with self._asking:
            self._question = None  # whoever comes from now on needs an answer of a later moment
            # With a read in it: a coordinator may answer a transaction without one from a member that is behind.
            now = await self.coordinator.txn([], [Get(CLUSTER)])
        await self.wait_revision(now.revision)

    def items(self) -> list[KeyValue]:
        """Everything under the prefix, by key."""
        return [self._items[key] for key in sorted(self._items)]

    def item(self, key: bytes) -> KeyValue | None:
        """What is under a key."""
        return self._items.get(key)

    def on_put(self, item: KeyValue) -> None:
        """A key was set; for children."""

    def on_delete(self, item: KeyValue) -> None:
        """A key was deleted; `item` is what it was. For children."""

    async def _list(self) -> None:
        listed = await self.coordinator.range(self._prefix)
        self._take_snapshot(Snapshot(listed.items, listed.revision))

    async def _follow(self) -> None:
        while True:
            try:
                async for news in follow(self.coordinator, self._prefix):
                    if isinstance(news, Snapshot):
                        self._take_snapshot(news)
                        continue
                    for event in news:
                        if event.item.mod_revision > self.revision:
                            self._take(event.item, deleted=event.kind is EventKind.DELETE)
                    self._advance(max(event.item.mod_revision for event in news))
            except TallymarkError as error:
                _log.warning("the coordinator cannot be followed: %s", error)
                await asyncio.sleep(RETRY_S)

    def _take_snapshot(self, snapshot: Snapshot) -> None:
        if snapshot.revision < self.revision:
            return
        present = {item.key for item in snapshot.items}
        for key in sorted(set(self._items) - present):
            self._take(self._items[key], deleted=True)
        for item in snapshot.items:
            known = self._items.get(item.key)
            if known is None or known.mod_revision != item.mod_revision:
                self._take(item, deleted=False)
        self._advance(max(snapshot.revision, 1))

    def _take(self, item: KeyValue, *, deleted: bool) -> None:
        known = self._items.pop(item.key, None)
        # A key that was deleted and set again in between is another one: its end is told first.
        if known is not None and (deleted or known.create_revision != item.create_revision):
            self.on_delete(known)
        if not deleted:
            self._items[item.key] = item
            self.on_put(item)

    def _advance(self, revision: int) -> None:
        self.revision = max(self.revision, revision)
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


class MetricCatalog(Catalog):
    """The metrics. `on_change` is called with each changed record; with `deleted=True` when it is gone."""

    def __init__(self, coordinator: Coordinator) -> None:
        super().__init__(coordinator, METRICS)
        self.on_change: Callable[[MetricRecord], None] = _ignore
        self._records: dict[str, MetricRecord] = {}
        self._epoch_base = 0  # the highest that is known here

    @property
    def newest_uid(self) -> int:
        """Every metric with a uid up to this one is known here, or is deleted. Revisions say nothing of uids."""
        return self._epoch_base + self.revision

    async def start(self) -> None:
        """Begin to follow; returns when the first picture is there."""
        await self._read_base()
        await super().start()

    async def wait_uid(self, uid: int) -> None:
        """Wait until a metric with this uid is known here, or was and is deleted. Raises as `wait_revision` does."""
        if uid > self.newest_uid:
            await self._read_base()
            await self.wait_revision(uid - self._epoch_base)

    async def _read_base(self) -> None:
        item = await self.coordinator.get(EPOCH_BASE)
        if item is not None:
            found = decode_value(EpochBase, item)
            self._epoch_base = max(self._epoch_base, found.base)

    def on_put(self, item: KeyValue) -> None:
        """A metric was created or changed."""
        record = metric_of(item)
        self._epoch_base = max(self._epoch_base, record.uid - item.create_revision)
        self._records[record.schema.code] = record
        self.on_change(record)

    def on_delete(self, item: KeyValue) -> None:
        """A metric was deleted."""
        record = metric_of(item)
        self._records.pop(record.schema.code, None)
        self.on_change(msgspec.structs.replace(record, deleted=True))

    def get(self, code: str) -> MetricRecord | None:
        """The metric with this code, as far as is known here."""
        return self._records.get(code)

    def all(self) -> list[MetricRecord]:
        """All metrics known here, by code."""
        return [self._records[code] for code in sorted(self._records)]

    async def fetch(self, code: str) -> MetricRecord | None:
        """The metric with this code as the coordinator has it now; what is returned is known here too."""
        await self.catch_up()
        return self._records.get(code)


class LeaderCatalog(Catalog):
    """Who leads which partition. `on_change` is called with a partition whose leader has changed, also to none.

    A key that can't be read counts as absent: what is known here only routes, the replicas decide who leads.
    """

    def __init__(self, coordinator: Coordinator) -> None:
        super().__init__(coordinator, LEADERS)
        self.on_change: Callable[[int], None] = _ignore_partition
        self._leaders: dict[int, Leader] = {}

    def on_put(self, item: KeyValue) -> None:
        """A partition has another leader, or the same one anew."""
        self._set(item.key, _readable(Leader, item))

    def on_delete(self, item: KeyValue) -> None:
        """A partition has no leader."""
        self._set(item.key, None)

    def _set(self, key: bytes, leader: Leader | None) -> None:
        name = key[len(LEADERS) :]
        if not name.isdigit():
            return
        partition = int(name)
        before = self._leaders.pop(partition, None)
        if leader is not None:
            self._leaders[partition] = leader
        if leader is not None or before is not None:
            self.on_change(partition)

    def leader(self, partition: int) -> Leader | None:
        """Who leads a partition; None while nobody does."""
        return self._leaders.get(partition)

    def address(self, partition: int) -> str | None:
        """The leader's address; None while nobody leads."""
        leader = self._leaders.get(partition)
        return None if leader is None else leader.address

    def led_by(self, address: str) -> list[int]:
        """The partitions that are led from an address, in order."""
        return sorted(number for number, leader in self._leaders.items() if leader.address == address)

    def addresses(self) -> set[str]:
        """Of all that lead something."""
        return {leader.address for leader in self._leaders.values()}


class NodeCatalog(Catalog):
    """Which nodes there are. `on_change` is called after each change. One that can't be read counts as absent."""

    def __init__(self, coordinator: Coordinator) -> None:
        super().__init__(coordinator, NODES)
        self.on_change: Callable[[], None] = _ignore_nothing
        self._nodes: dict[bytes, Node] = {}

    def on_put(self, item: KeyValue) -> None:
        """A node came, or came back."""
        node = _readable(Node, item)
        if node is None:
            self._nodes.pop(item.key, None)
        else:
            self._nodes[item.key] = node
        self.on_change()

    def on_delete(self, item: KeyValue) -> None:
        """A node went."""
        self._nodes.pop(item.key, None)
        self.on_change()

    def addresses(self, role: str) -> list[str]:
        """The addresses of all nodes of a role, by node id."""
        prefix = NODES + role.encode() + b"/"
        return [self._nodes[key].address for key in sorted(self._nodes) if key.startswith(prefix)]

    def address(self, role: str, node_id: str) -> str | None:
        """The address of a node; None while it is not registered."""
        node = self._nodes.get(node_key(role, node_id))
        return None if node is None else node.address


class AssignmentCatalog(Catalog):
    """Which nodes shall hold which partition. An assignment that can't be read counts as absent."""

    def __init__(self, coordinator: Coordinator) -> None:
        super().__init__(coordinator, ASSIGNMENTS)
        self._nodes: dict[bytes, tuple[str, ...]] = {}

    def on_put(self, item: KeyValue) -> None:
        """A partition was assigned, or assigned otherwise."""
        assignment = _readable(Assignment, item)
        self._nodes[item.key] = () if assignment is None else assignment.nodes

    def on_delete(self, item: KeyValue) -> None:
        """An assignment is gone."""
        self._nodes.pop(item.key, None)

    def nodes(self, partition: int) -> tuple[str, ...]:
        """The ids of the nodes that shall hold a partition."""
        return self._nodes.get(assignment_key(partition), ())


def _readable(kind: type[S], item: KeyValue) -> S | None:
    """A value as `kind`; None, and a line in the log, where it is none."""
    try:
        return decode_value(kind, item)
    except RemoteProtocolError as error:
        _log.warning("a record of the coordinator is taken for absent: %s", error.message)
        return None


async def register(
    coordinator: Coordinator, role: str, node_id: str, address: str, lease_ttl_s: float
) -> asyncio.Task[None]:
    """Tell the cluster of a node, and keep telling it until the task returned is cancelled."""

    async def announce() -> int:
        lease = await coordinator.lease_grant(lease_ttl_s)
        value = msgspec.msgpack.encode(Node(node_id, address, role))
        await coordinator.put(node_key(role, node_id), value, lease=lease)
        return lease

    async def keep(lease: int) -> None:
        try:
            while True:
                await asyncio.sleep(lease_ttl_s / 3)
                try:
                    try:
                        await coordinator.lease_keepalive(lease)
                    except NotFoundError:
                        lease = await announce()
                except TallymarkError as error:  # it may come back, and then this node must be in it again
                    _log.warning("the coordinator cannot be told of this node: %s", error)
        finally:
            await coordinator.lease_revoke(lease)

    return asyncio.get_running_loop().create_task(keep(await announce()))


def _ignore(record: MetricRecord) -> None:
    """Take the place of a callback that was not given."""


def _ignore_partition(partition: int) -> None:
    """Likewise."""


def _ignore_nothing() -> None:
    """Likewise."""
