"""What a store counts and tells: outcomes of what it judged, changes of leadership, its copies."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tallymark_protocol.errors import ErrorCode, Reason, WireError
from tallymark_runtime.clock import ManualClock
from tallymark_runtime.instruments import Histogram
from tallymark_runtime.telemetry import Telemetry
from tallymark_store.counters import StoreCounters
from tallymark_store.replication.effects import Role
from tallymark_store.telemetry import StoreTelemetry, store_problem

S = 1_000_000_000
OK, DUPLICATE, REPEAT, UNKNOWN = (
    int(reason) for reason in (Reason.ACCEPTED, Reason.DUPLICATE, Reason.REPEAT, Reason.UNKNOWN_METRIC)
)


def _prepared(verdicts, *, appended=True):
    """What the judge says of a payload, as far as it is counted."""
    column = None if verdicts is None else np.array(verdicts, dtype=np.uint8)
    return SimpleNamespace(item=SimpleNamespace(verdicts=column) if appended else None)


def _replica(role, leader="", why="", followers=None):
    progress = {node: SimpleNamespace(match_end=end) for node, end in (followers or {}).items()}
    return SimpleNamespace(role=role, leader=leader, why=why, followers=progress)


def _partition(number, *, log_end=10, high_watermark=8, applied=6, epoch=0, error=None):
    sized = SimpleNamespace(memory_bytes=100)
    return SimpleNamespace(
        partition=number,
        index=SimpleNamespace(log_start=4),
        log_end=log_end,
        high_watermark=high_watermark,
        applied=applied,
        waiting_count=2,
        epoch=epoch,
        error=error,
        dedup=type("Dedup", (), {"memory_bytes": 50, "spilled_count": 9, "__len__": lambda self: 3})(),
        windows=sized,
        fold=SimpleNamespace(
            cell_count=4,
            spilled_cell_count=3,
            spilled=SimpleNamespace(files=["one", "two"]),
            alert_count=8,
            alert_files=SimpleNamespace(end=7),
            memory_bytes=lambda: 512,
        ),
    )


def _store(partitions, replicas):
    sync_ns = Histogram()
    sync_ns.observe(150_000)
    return SimpleNamespace(
        counters=StoreCounters(),
        events_folded=6,
        backlog_bytes=77,
        tail=SimpleNamespace(held_count=2),
        wal=SimpleNamespace(
            sync_ns=sync_ns, synced_bytes=4096, buffer_bytes=10, total_bytes=2**26, full=False
        ),
        partitions={partition.partition: partition for partition in partitions},
        replicas=dict(enumerate(replicas)),
        replicating=SimpleNamespace(
            fitness=SimpleNamespace(clock_differences=lambda: {"s2": -11_500_000_000})
        ),
    )


def _figures(
    store,
    checkpointer=None,
    clock=None,
    *,
    lease_deadline_ns=0,
    unsent=None,
    snapshots=None,
    archiver=None,
    memory_bytes=None,
):
    clock = clock or ManualClock()
    service = SimpleNamespace(
        driver=store,
        checkpointer=checkpointer,
        node=SimpleNamespace(
            lease_deadline_ns=lease_deadline_ns, snapshots=snapshots, memory_bytes=memory_bytes
        ),
        archiver=archiver,
        peers=SimpleNamespace(dropped=5, unsent_bytes=lambda: unsent or {}),
    )
    telemetry = Telemetry(clock, node_id="n", version="v")
    telemetry.add("store", StoreTelemetry(service, clock))
    found = {}
    for family in text_string_to_metric_families(telemetry.render().decode()):
        for sample in family.samples:
            found[sample.name, tuple(sorted(sample.labels.items()))] = sample.value
    assert found["tallymark_telemetry_failures_total", (("source", "store"),)] == 0
    return found


def test_a_refused_archive_has_a_series_that_stays():
    """One for each copy, 0 or 1, also where nothing is archived; none where archiving is off."""
    store = _store([_partition(0), _partition(1)], [_replica(Role.LEADER), _replica(Role.LEADER)])
    archiver = SimpleNamespace(
        events_archived=0, merges=0, events_dropped=0, failures=1, took_ns=Histogram((1,)), archives={},
        problem=lambda number: "it is damaged" if number == 1 else "",
    )  # fmt: skip
    found = _figures(store, archiver=archiver, memory_bytes=1 << 30)
    name = "tallymark_partition_archive_refused"
    assert [found[name, (("partition", label),)] for label in ("0", "1")] == [0, 1]
    assert found["tallymark_store_memory_budget_bytes", ()] == 1 << 30
    names = {key[0] for key in _figures(store)}
    assert not {name, "tallymark_store_memory_budget_bytes"} & names


# ------------------------------------------------------------ counters


def test_outcomes_add_up_to_the_events_that_came():
    """All accepted, some not, and none new: each event is counted once, under what became of it."""
    counters = StoreCounters()
    counters.judged(_prepared(None), 5)
    counters.judged(_prepared([OK, DUPLICATE, OK, UNKNOWN, UNKNOWN, REPEAT]), 6)
    counters.judged(_prepared([OK, OK]), 2)
    counters.judged(_prepared([DUPLICATE]), 1)
    counters.judged(_prepared(None, appended=False), 4)
    assert counters.appends == 5
    assert counters.stored == 5 + 2 + 2
    assert counters.outcomes == {DUPLICATE: 2, UNKNOWN: 2, REPEAT: 1 + 4}
    assert counters.stored + sum(counters.outcomes.values()) == 18


def test_a_change_of_leadership_is_counted_and_logged(caplog):
    """Once by partition and kind, with one line that says why."""
    counters = StoreCounters()
    with caplog.at_level(logging.INFO):
        counters.leadership_changed(1, "gained", epoch=7, reason="the key was free", log_end=9)
        counters.leadership_changed(1, "lost", epoch=7, reason="s2 has epoch 8", leader="s2")
        counters.leadership_changed(1, "gained", epoch=9, reason="the key was free")
    assert counters.leadership == {(1, "gained"): 2, (1, "lost"): 1}
    assert [record.getMessage() for record in caplog.records] == [
        "leads partition 1 in epoch 7: the key was free",
        "leads partition 1 no more (epoch 7): s2 has epoch 8",
        "leads partition 1 in epoch 9: the key was free",
    ]
    first, second, _ = caplog.records
    assert (first.partition, first.epoch, first.change, first.log_end) == (1, 7, "gained", 9)
    assert (second.reason, second.leader) == ("s2 has epoch 8", "s2")


# ------------------------------------------------------------ what is told


def test_positions_roles_and_lag_are_told_by_partition():
    """A leader tells its followers' lag, never below 0; a follower tells where it stands; both their role."""
    leader = _replica(Role.LEADER, followers={"s2": 7, "s3": 12})
    follower = _replica(Role.FOLLOWER, leader="s2", followers={"s9": 1})
    found = _figures(_store([_partition(0, epoch=5), _partition(1, log_end=4)], [leader, follower]))

    def told(name, **labels):
        return found.get((f"tallymark_partition_{name}", tuple(sorted(labels.items()))))

    assert [told(name, partition="0") for name in ("log_end", "high_watermark", "applied")] == [10, 8, 6]
    assert (told("epoch", partition="0"), told("epoch", partition="1")) == (5, 0)
    assert told("replica_lag", partition="0", follower="s2") == 3
    assert told("replica_lag", partition="0", follower="s3") == 0
    assert told("replica_lag", partition="1", follower="s9") is None
    roles = {role.value: told("role", partition="1", role=role.value) for role in Role}
    assert roles == {"follower": 1, "candidate": 0, "starting": 0, "leader": 0, "damaged": 0}
    assert told("waiting_answers", partition="0") == 2
    assert told("remembered_ids", partition="0") == 3
    assert told("remembered_ids_on_disk", partition="0") == 9
    assert told("cells_on_disk", partition="0") == 3
    assert told("cell_files", partition="0") == 2
    assert told("alerts_on_disk", partition="0") == 7
    assert told("remembered_bytes", partition="0") == 150
    assert told("alerts", partition="0") == 8
    assert (told("cells", partition="0"), told("totals_bytes", partition="0")) == (4, 512)
    # Told before they ever happen: a rate is blind to the step that makes a series.
    assert told("leadership_changes_total", partition="1", change="lost") == 0


def test_the_log_and_checkpoints_are_told():
    """Syncs as a histogram in seconds; the last checkpoint's age grows with time."""
    clock = ManualClock(monotonic_ns=100 * S)
    checkpointer = SimpleNamespace(count=3, finished_ns=40 * S, took_ns=S // 2, recycled_bytes=2**20)
    found = _figures(_store([], []), checkpointer, clock)
    assert found["tallymark_store_sync_seconds_count", ()] == 1
    assert found["tallymark_store_sync_seconds_bucket", (("le", "0.0001"),)] == 0
    assert found["tallymark_store_sync_seconds_bucket", (("le", "0.0002"),)] == 1
    assert found["tallymark_store_sync_seconds_sum", ()] == pytest.approx(0.00015)
    assert found["tallymark_store_synced_bytes_total", ()] == 4096
    assert found["tallymark_store_unsynced_bytes", ()] == 10
    assert found["tallymark_store_log_bytes", ()] == 2**26
    assert found["tallymark_store_recycled_bytes_total", ()] == 2**20
    assert found["tallymark_store_log_full", ()] == 0
    assert found["tallymark_store_backlog_bytes", ()] == 77
    assert found["tallymark_store_held_tails", ()] == 2
    assert found["tallymark_store_checkpoints_total", ()] == 3
    assert found["tallymark_store_checkpoint_age_seconds", ()] == pytest.approx(60)
    assert found["tallymark_store_checkpoint_seconds", ()] == 0.5


def test_the_lease_and_links_are_told():
    """What is left of the lease, also below zero; what waits for each store that there is a connection to."""
    clock = ManualClock(monotonic_ns=100 * S)
    store = _store([], [])
    found = _figures(store, clock=clock, lease_deadline_ns=101 * S, unsent={"s2": 9, "s3": 0})
    assert found["tallymark_store_lease_seconds", ()] == pytest.approx(1)
    assert found["tallymark_store_link_drops_total", ()] == 5
    assert found["tallymark_store_clock_difference_seconds", (("peer", "s2"),)] == -11.5
    assert found["tallymark_store_link_unsent_bytes", (("peer", "s2"),)] == 9
    assert found["tallymark_store_link_unsent_bytes", (("peer", "s3"),)] == 0
    found = _figures(store, clock=clock, lease_deadline_ns=98 * S)
    assert found["tallymark_store_lease_seconds", ()] == pytest.approx(-2)
    assert _figures(store, clock=clock)["tallymark_store_lease_seconds", ()] == 0


def test_snapshots_are_told():
    """What went out and what came in, each by itself."""
    sending = SimpleNamespace(sent=2, sent_bytes=900)
    snapshots = SimpleNamespace(sending=sending, installed=1, received_bytes=300)
    found = _figures(_store([], []), snapshots=snapshots)
    assert found["tallymark_store_snapshots_total", (("change", "sent"),)] == 2
    assert found["tallymark_store_snapshots_total", (("change", "installed"),)] == 1
    assert found["tallymark_store_snapshot_bytes_total", (("change", "sent"),)] == 900
    assert found["tallymark_store_snapshot_bytes_total", (("change", "received"),)] == 300


def test_a_store_that_does_not_run_yet_tells_nothing():
    """Its families are absent, and that is no failure."""
    names = {name for name, _ in _figures(None)}
    assert not {name for name in names if name.startswith(("tallymark_store", "tallymark_partition"))}


# ------------------------------------------------------------ readiness


@pytest.mark.parametrize(
    ("replica", "error", "words"),
    [
        (_replica(Role.LEADER), None, ""),
        (_replica(Role.FOLLOWER, leader="s2"), None, ""),
        (_replica(Role.FOLLOWER), None, "partition 0 has no leader that this copy follows (follower)"),
        (_replica(Role.CANDIDATE), None, "partition 0 has no leader that this copy follows (candidate)"),
        (_replica(Role.STARTING), None, "partition 0 has no leader that this copy follows (starting)"),
        (_replica(Role.DAMAGED, why="bad bytes"), None, "partition 0 is damaged (bad bytes)"),
        (
            _replica(Role.LEADER),
            WireError(int(ErrorCode.PARTITION_DAMAGED), False, "bad bytes"),
            "partition 0 is refused (bad bytes)",
        ),
    ],
)
def test_a_store_is_ready_when_it_takes_part_everywhere(replica, error, words):
    """Leading, or following somebody, in every partition that it has a copy of; anything else is said."""
    assert store_problem(_store([_partition(0, error=error)], [replica])) == words


def test_many_problems_are_a_short_sentence():
    """The first partitions are named, the others counted; no store yet is a problem, too."""
    store = _store([_partition(number) for number in range(6)], [_replica(Role.FOLLOWER)] * 6)
    problem = store_problem(store)
    assert problem.startswith("partition 0 has no leader")
    assert problem.endswith("and 3 more")
    assert store_problem(None) == "is starting"
