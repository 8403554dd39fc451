"""Alert records: ALERT-1, at every copy and at whoever follows them.

`Crossings` adds the committed events of a partition up again, one by one, and says which alert records there must
be. Every record that any copy ever shows is held to that, right after the turn in which it appeared: so a copy that
folds what isn't committed, forgets what has fired, or writes a record at another event or position is noticed.
"""

from __future__ import annotations

import random
from typing import Any

import msgspec

from tallymark_protocol import int128
from tallymark_protocol.messages import AlertRecord
from tallymark_protocol.model import AggType, AlertThreshold, MetricSchema, OperationType
from tallymark_protocol.periods import period_of
from tallymark_protocol.schema import MetricRecord, decode_record, encode_record, make_record, update_record
from tallymark_runtime.catalog import metric_key
from tallymark_runtime.coordinator import Put
from tallymark_store.store import Store
from tallymark_store.wal import RecordKind

from .logbook import ACCEPTED, SEATS, LoggedBatch
from .loop import MILLISECOND, SimulationError
from .process import Process


def _threshold(code: str, value: int, *, recurring: bool = False) -> AlertThreshold:
    return AlertThreshold(code=code, value=value, recurring=recurring)


# A run's accounts have a few events each, with values of up to about a hundred.
SCHEMAS = [
    MetricSchema(
        code="m0",
        agg_type=AggType.SUM,
        thresholds=[_threshold("once", 30), _threshold("again", 12, recurring=True)],
    ),
    MetricSchema(code="m1", agg_type=AggType.SUM, thresholds=[_threshold("each", 1, recurring=True)]),
    MetricSchema(code="m2", agg_type=AggType.SUM),
    MetricSchema(
        code=SEATS,
        agg_type=AggType.COUNT_UNIQUE,
        thresholds=[_threshold("two", 2), _threshold("more", 1, recurring=True)],
    ),
]
ADDED = [_threshold("late", 25), _threshold("later", 9, recurring=True)]  # to m2, in the middle of a run


class Crossings:
    """The alert records that a partition's log counts to."""

    def __init__(self, partition: int) -> None:
        self.partition = partition
        self.records: list[AlertRecord] = []
        self._metrics: dict[str, MetricRecord] = {}
        self._sums: dict[tuple[int, int, int], int] = {}  # by account, uid and the period's start
        self._members: dict[tuple[int, int, int], set[int]] = {}  # likewise
        self._highest: dict[
            tuple[int, int, int, int], int
        ] = {}  # likewise, and the threshold: multiple reached

    def take(self, kind: int, payload: Any, append_ns: int, logged: LoggedBatch | None) -> None:
        """Read the next committed record; `logged` is what is in it, of an event batch."""
        if kind == RecordKind.SCHEMA:
            record = decode_record(payload.tobytes())
            self._metrics[record.schema.code] = record
        elif logged is not None:
            for event in logged.events:
                if event.verdict == ACCEPTED:
                    self._count(event, append_ns)

    def _count(self, event: Any, append_ns: int) -> None:
        metric = self._metrics[event.metric]
        schema = metric.schema
        period = period_of(append_ns, schema.period_type, schema.billing_cycle_day, metric.zone)
        key = (event.account, metric.uid, period.start_ns)
        if schema.agg_type == AggType.COUNT_UNIQUE:
            members = self._members.setdefault(key, set())
            (members.discard if event.operation == OperationType.REMOVE else members.add)(event.value)
            total = len(members)
        else:
            total = self._sums[key] = self._sums.get(key, 0) + event.value
        for index, threshold in enumerate(schema.thresholds):
            highest = self._highest.get((*key, index), 0)
            reached = max(total, 0) // threshold.value
            if not threshold.recurring:
                reached = min(reached, 1)
            if reached > highest:
                self._highest[*key, index] = reached
                self.records.append(
                    AlertRecord(
                        id=f"{self.partition}-{event.offset}-{index}-{metric.uid}",
                        account_id=event.account,
                        metric_code=schema.code,
                        threshold_code=threshold.code,
                        threshold_value=threshold.value,
                        period_start_ns=period.start_ns,
                        period_end_ns=period.end_ns,
                        value_at_cross=int128.to_bytes(total),
                        first_multiple=int128.to_bytes(highest + 1),
                        last_multiple=int128.to_bytes(reached),
                        triggered_at_ns=append_ns,
                        event_offset=event.offset,
                        partition=self.partition,
                        position=len(self.records),
                    )
                )


class Alerts:
    """Declares metrics with thresholds, and looks at every copy's alert records. `simulation` is what they are of."""

    def __init__(self, simulation: Any, rng: random.Random) -> None:
        self._s = simulation
        self._rng = rng
        self._crossings: list[Crossings] = simulation.checkers.crossings
        # By process, then by partition: the copy, how many it had, and its replica's state then.
        self._seen: dict[str, dict[int, tuple[tuple[int, str], int, object]]] = {}
        self.compared = 0

    # ------------------------------------------------------------ what there is to cross

    def plan(self, end_ns: int) -> None:
        """Draw when thresholds are added to a metric in use."""
        self._s.world.at(self._rng.randint(end_ns // 5, end_ns * 4 // 5), self._add)

    def _add(self) -> None:
        if self._s.etcd.is_away:
            self._s.world.after(100 * MILLISECOND, self._add)
            return
        old = make_record(0, SCHEMAS[2])
        record = update_record(old, msgspec.structs.replace(old.schema, thresholds=ADDED))
        self._s.etcd.txn([], [Put(metric_key(old.schema.code), encode_record(record))], [])
        self._s.trace("clients", "thresholds are added to %s", old.schema.code)

    # ------------------------------------------------------------ copies

    def after_turn(self, process: Process, store: Store) -> None:
        """Look at what the turn has added; nothing is unless a copy's applied offset has moved, or it is another."""
        copies = self._seen.get(process.name)
        if copies is None:
            copies = self._seen[process.name] = {}
        replicas = store.replicas
        for number, partition in store.partitions.items():
            replica = replicas.get(number)
            if replica is None:
                continue
            count = partition.fold.alert_count
            state = replica.state
            known = copies.get(number)
            if known is not None and known[2] is state and known[1] == count:
                continue  # a state is one copy's in one life
            copy = (process.life, replica.copy_id)
            seen = 0
            if known is not None and known[0] == copy:
                seen = known[1]
            if count != seen or (known is not None and known[0] != copy):
                self._compare(process, number, seen, count)
            copies[number] = (copy, count, state)

    def _compare(self, process: Process, number: int, seen: int, count: int) -> None:
        where = f"ALERT-1: {process} partition {number}"
        if count < seen:
            raise SimulationError(f"{where}: has {count} alert records, and had {seen}")
        expected = self._crossings[number].records
        if count > len(expected):
            raise SimulationError(
                f"{where}: has {count} alert records, while {len(expected)} crossings are committed"
            )
        found = process.node.driver.partitions[number].fold.alerts_at(range(seen, count))  # type: ignore[union-attr]
        for record in found:
            self.compared += 1
            if record != expected[record.position]:
                raise SimulationError(f"{where}: has {record}, the log counts to {expected[record.position]}")

    def at_rest(self, members: list[tuple[Process, int]]) -> None:
        """Every copy has every crossing."""
        for process, number in members:
            assert process.store is not None
            count = process.store.partitions[number].fold.alert_count
            self._compare(process, number, 0, count)
            if count != len(self._crossings[number].records):
                raise SimulationError(
                    f"ALERT-1: {process} partition {number} has {count} alert records of "
                    f"{len(self._crossings[number].records)} crossings"
                )
