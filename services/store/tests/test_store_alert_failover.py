"""ALERT-1 over leader changes: every copy has the same records at the same positions, those that the log counts to."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest

from tallymark_protocol.model import AggType, AlertThreshold, MetricSchema, OperationType, PeriodType
from tallymark_protocol.schema import decode_record, encode_record, make_record, update_record
from tallymark_runtime.catalog import metric_key
from tallymark_store import warmup
from tallymark_store.wal import RecordKind

from .cluster_driver import Cluster
from .fold_reference import FoldReference, check_alerts
from .payload_builder import event

ROUNDS = 14
BATCH_MAX = 12

SCHEMAS = [
    MetricSchema(
        code="sum",
        agg_type=AggType.SUM,
        period_type=PeriodType.LIFETIME,
        thresholds=[AlertThreshold(code="once", value=9), AlertThreshold(code="again", value=4, recurring=True)],
    ),
    MetricSchema(
        code="users",
        agg_type=AggType.COUNT_UNIQUE,
        period_type=PeriodType.LIFETIME,
        thresholds=[AlertThreshold(code="two", value=2), AlertThreshold(code="each", value=1, recurring=True)],
    ),
    MetricSchema(code="last", agg_type=AggType.LATEST, thresholds=[AlertThreshold(code="l", value=3)]),
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def kernels() -> None:
    """Loaded before anything has a deadline."""
    warmup.warm_up()


def random_events(rng: random.Random) -> list[dict[str, Any]]:
    """Totals that go up and down, and sets that lose members."""
    found = []
    for _ in range(rng.randrange(1, BATCH_MAX)):
        code = rng.choice(["sum", "sum", "users", "last"])
        operation = rng.choice(list(OperationType)) if code == "users" else OperationType.NONE
        value = rng.randrange(6) if code == "users" else rng.choice([1, 2, 3, 6, -2, -5])
        found.append(event(rng.randrange(3), code, value=value, operation=operation))
    return found


def logged(cluster: Cluster, name: str, sent: dict[int, list[dict[str, Any]]]) -> FoldReference:
    """What a copy's log counts to, with the events that are known to lie at its offsets."""
    store = cluster.nodes[name].store
    reference = FoldReference()
    offset = row = 0
    while offset < store.partitions[0].applied:
        meta, payload = store.wal.read_record(0, row)
        assert meta.base_offset == offset
        if meta.kind == RecordKind.SCHEMA:
            reference.put_schema(decode_record(payload.tobytes()), offset)
        elif meta.kind == RecordKind.EVENTS:
            assert len(sent[offset]) == meta.count
            reference.apply(sent[offset], None, offset, meta.append_ns)
        offset += meta.count
        row += 1
    assert offset == store.partitions[0].applied
    return reference


async def disturb(cluster: Cluster, rng: random.Random) -> None:
    """Take the leadership away from whoever has it, in one way or another."""
    for name in sorted(cluster.disks.keys() - cluster.nodes.keys()):
        await cluster.start(name)
    cluster.cut.clear()
    leader = await cluster.wait_leader()
    match rng.randrange(4):
        case 0:
            cluster.kill(leader)
        case 1:
            await cluster.nodes[leader].hand_over()
        case 2:
            cluster.isolate(leader)
        case _:
            cluster.kill(rng.choice(sorted(cluster.nodes)))


@pytest.mark.parametrize("seed", range(3))
async def test_every_copy_has_the_records_of_the_log(seed: int) -> None:
    """Leaders killed, cut off and relieved between the events and in the middle of them, with checkpoints."""
    rng = random.Random(seed)
    cluster = Cluster(checkpoint_interval_s=0.3, checkpoint_events=20)
    sent: dict[int, list[dict[str, Any]]] = {}
    try:
        for schema in SCHEMAS:
            await cluster.create(schema)
        await cluster.start()
        first_epoch = cluster.nodes[await cluster.wait_leader()].store.replicas[0].epoch
        for round_ in range(ROUNDS):
            events = random_events(rng)
            if rng.random() < 0.5:
                # Nobody may hear whether this is stored: it is sent again, as it is.
                leader = await cluster.wait_leader()
                cluster.send(leader, events, (1, round_))
            if rng.random() < 0.6:
                await disturb(cluster, rng)
            answer = await cluster.append_anywhere(events, (1, round_))
            base = answer.base_offset if answer.chunks is None else answer.chunks[0].base_offset
            assert answer.chunks is None or not answer.chunks[0].exceptions
            sent[base] = events
            if round_ == ROUNDS // 2:
                old = make_record(0, SCHEMAS[0])  # as it is stored: the key's revision makes its uid
                more = AlertThreshold(code="late", value=3, recurring=True)
                changed = msgspec.structs.replace(old.schema, thresholds=[*old.schema.thresholds, more])
                await cluster.coordinator.put(metric_key("sum"), encode_record(update_record(old, changed)))
        cluster.cut.clear()
        for name in sorted(cluster.disks.keys() - cluster.nodes.keys()):
            await cluster.start(name)
        answer = await cluster.append_anywhere([event(0, "sum", value=7)], (2, 0))
        sent[answer.base_offset] = [event(0, "sum", value=7)]
        await cluster.check_digests()
        assert sorted(cluster.nodes) == ["a", "b", "c"]
        assert cluster.nodes["a"].store.replicas[0].log.epoch_before(answer.base_offset) > first_epoch
        for name in sorted(cluster.nodes):
            partition = cluster.nodes[name].store.partitions[0]
            reference = logged(cluster, name, sent)
            assert {"once", "again", "two", "each", "l", "late"} == {a["code"] for a in reference.alerts}
            check_alerts(partition.fold.alerts(0), reference, 0)
    finally:
        await cluster.close()
