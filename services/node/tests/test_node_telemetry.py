"""What each role tells about itself: exactly what was done with it, and whether it is ready."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import math
import os
import pkgutil
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from prometheus_client.parser import text_string_to_metric_families

import tallymark_alerts
import tallymark_ingest
import tallymark_query
import tallymark_runtime
import tallymark_store
from tallymark import AggType, AsyncClient, Event, MetricSchema, NotFoundError, current_month
from tallymark_node import dev, run
from tallymark_node.config import Settings
from tallymark_node.health import READY, check
from tallymark_node.monitor import Monitor
from tallymark_protocol.chunk import encode_events
from tallymark_protocol.errors import InvalidRequestError
from tallymark_protocol.messages import FrameType
from tallymark_runtime.clock import ManualClock
from tallymark_runtime.peer import PeerClient
from tallymark_runtime.randomness import new_random
from tallymark_runtime.telemetry import Family

WAIT_S = 60.0  # bound of what has to happen soon, on a busy machine
OPERATIONS = Path(__file__).parents[3] / "docs" / "operations.md"


def _settings(tmp_path, **others):
    return Settings(port=0, telemetry="127.0.0.1:0", data_dir=str(tmp_path), **others)


async def _get(address, path):
    """Status and body of a GET."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        head, _, body = (await asyncio.wait_for(reader.read(), WAIT_S)).partition(b"\r\n\r\n")
    finally:
        writer.close()
    return int(head.split()[1]), body.decode()


class Figures:
    """The samples of one text: name and some labels -> value."""

    def __init__(self, text):
        self.samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
        self.names = {family.name for family in text_string_to_metric_families(text)}

    def __call__(self, name, **labels):
        """The sum of all samples of that name with these labels."""
        return math.fsum(
            s.value for s in self.samples if s.name == name and labels.items() <= s.labels.items()
        )


def _figures(monitor):
    """What a scrape says right now, whatever was scraped a moment ago."""
    return Figures(monitor.telemetry.render().decode())


async def _ready(monitor):
    async with asyncio.timeout(WAIT_S):
        while monitor.readiness.problems():  # noqa: ASYNC110 - it is ready when it is
            await asyncio.sleep(0.01)


async def test_dev_tells_exactly_what_was_done(tmp_path):
    """Three stored, a duplicate, a conflict, a rejection, two queries and a failed one: the figures say so."""
    async with dev.running(_settings(tmp_path)) as node:
        monitor = node.monitor
        await _ready(monitor)
        before = _figures(monitor)
        async with AsyncClient([node.address]) as client:
            await client.metrics.create(MetricSchema(code="calls", agg_type=AggType.SUM))
            receipt = await client.ingest([Event(7, "calls", value, id=f"id-{value}") for value in (1, 2, 3)])
            assert receipt.n_stored == 3
            receipt = await client.ingest(
                [Event(7, "calls", 1, id="id-1"), Event(7, "calls", 99, id="id-2"), Event(7, "unknown", 1)]
            )
            assert (receipt.n_stored, receipt.n_duplicates) == (0, 1)
            now = _figures(monitor)

            def moved(name, **labels):
                return now(name, **labels) - before(name, **labels)

            assert moved("tallymark_ingest_chunks_total") == 2
            assert moved("tallymark_ingest_events_total") == 6
            assert moved("tallymark_ingest_bytes_total") > 0
            assert moved("tallymark_ingest_receipts_total") == 2
            for family in ("tallymark_ingest_outcomes_total", "tallymark_store_events_total"):
                outcomes = {"stored": 3, "duplicate": 1, "conflict": 1, "unknown_metric": 1}
                assert {name: moved(family, outcome=name) for name in outcomes} == outcomes
                assert moved(family) == 6
            assert moved("tallymark_ingest_receipt_seconds_count") == 2
            assert moved("tallymark_ingest_receipt_seconds_bucket", le="+Inf") == 2
            assert moved("tallymark_ingest_receipt_seconds_sum") > 0
            assert moved("tallymark_ingest_append_seconds_count") == 2
            assert moved("tallymark_ingest_append_failures_total") == 0
            assert moved("tallymark_store_appends_total") == 2
            # A schema record, and both batches whole: offsets are given to rejected events, too.
            assert moved("tallymark_partition_log_end") == 7
            assert moved("tallymark_partition_high_watermark") == 7
            assert moved("tallymark_partition_remembered_ids") == 3
            assert moved("tallymark_store_sync_seconds_count") >= 1
            assert moved("tallymark_store_synced_bytes_total") > 0
            assert now("tallymark_ingest_open_requests") == 0
            assert now("tallymark_ingest_connections") == 1
            assert now("tallymark_partition_waiting_answers") == 0

            usage = await client.query(7, "calls", current_month())
            assert usage.value.sum == 6
            assert (await client.query_realtime(7, "calls")).value.sum == 6
            with pytest.raises(NotFoundError):
                await client.query_realtime(7, "nothing")
            now = _figures(monitor)
            assert moved("tallymark_query_seconds_count", kind="totals") == 1
            assert moved("tallymark_query_seconds_count", kind="realtime") == 1
            assert moved("tallymark_query_seconds_count") == 2
            assert moved("tallymark_query_failures_total", kind="realtime", code="unknown_metric") == 1
            assert moved("tallymark_query_failures_total") == 1
            assert now("tallymark_query_under_way") == 0
            # A read has waited for the fold.
            assert moved("tallymark_partition_applied") == 7
            assert moved("tallymark_store_folded_events_total") == 6
            assert moved("tallymark_partition_cells") == 2
            assert now("tallymark_store_backlog_bytes") == 0

        checkpoints = now("tallymark_store_checkpoints_total")
        await node.checkpoint()
        now = _figures(monitor)
        assert now("tallymark_store_checkpoints_total") == checkpoints + 1
        assert now("tallymark_store_checkpoint_seconds") > 0
        assert 0 <= now("tallymark_store_checkpoint_age_seconds") < WAIT_S


async def test_a_repeated_chunk_counts_as_a_repeat_at_the_store(tmp_path):
    """The same chunk again: the gateway tells its caller the first outcome, the store stores nothing."""
    async with dev.running(_settings(tmp_path, partition_count=1)) as node:
        monitor = node.monitor
        await _ready(monitor)
        async with AsyncClient([node.address]) as client:
            await client.metrics.create(MetricSchema(code="calls", agg_type=AggType.SUM))
        events = [Event(7, "calls", 1) for _ in range(5)]
        (chunk,) = encode_events(events, producer_id=9, sequence=1, first_sent_ns=time.time_ns()).chunks
        peer = PeerClient(node.address, rng=new_random())
        await peer.connect()
        try:
            for _ in range(2):
                await peer.request(FrameType.INGEST, chunk.data, timeout_s=WAIT_S)
        finally:
            await peer.close()
        now = _figures(monitor)
        assert now("tallymark_ingest_outcomes_total", outcome="stored") == 10
        assert now("tallymark_store_events_total", outcome="stored") == 5
        assert now("tallymark_store_events_total", outcome="repeat") == 5


async def test_dev_says_how_it_is(tmp_path):
    """Ready and alive while it serves; every role is there; stopping is told before anything stops."""
    async with contextlib.AsyncExitStack() as stack:
        node = await stack.enter_async_context(dev.running(_settings(tmp_path)))
        monitor = node.monitor
        await _ready(monitor)
        assert await _get(monitor.address, "/readyz") == (200, "ready\n")
        assert await _get(monitor.address, "/healthz") == (200, "alive\n")
        status, text = await _get(monitor.address, "/metrics")
        assert status == 200
        now = Figures(text)
        roles = {"store", "query", "ingest"}
        assert {role for role in roles if now("tallymark_node_info", role=role, node="node-1")} == roles
        assert now("tallymark_telemetry_failures_total") == 0
        assert now("tallymark_telemetry_dropped") == 0
        assert now("tallymark_ingest_leaderless_partitions") == 0
        assert now("tallymark_partition_leadership_changes_total", change="gained") == 4
        assert now("tallymark_partition_epoch", partition="0") > 0
        assert now("tallymark_coordinator_seconds_count", role="store", operation="lease_grant") >= 1
        address = monitor.address
        node.failed.set()
        assert await _get(address, "/healthz") == (503, "store: its log has failed\n")
        node.failed.clear()
    assert "the process is stopping" in monitor.readiness.problems()
    with pytest.raises(OSError):
        await _get(address, "/healthz")


async def test_each_role_tells_of_itself_alone(tmp_path):
    """A store and each other role as they run alone: each is ready, and tells its own figures."""
    store_settings = _settings(tmp_path)
    async with contextlib.AsyncExitStack() as stack:
        store = await stack.enter_async_context(run.running("store", store_settings))
        others = {}
        for role in ("query", "alerts", "ingest"):
            settings = _settings(tmp_path, node_id=role, coordinator=f"tcp://{store.address}")
            others[role] = await stack.enter_async_context(run.running(role, settings))
        own = {
            "store": "tallymark_partition_log_end",
            "query": "tallymark_query_seconds_count",
            "alerts": "tallymark_alerts_tailed_total",
            "ingest": "tallymark_ingest_chunks_total",
        }
        for role, running in {"store": store, **others}.items():
            await _ready(running.monitor)
            assert await _get(running.monitor.address, "/readyz") == (200, "ready\n")
            found = {sample.name for sample in _figures(running.monitor).samples}
            assert {name for name in own.values() if name in found} == {own[role]}
            assert _figures(running.monitor)("tallymark_coordinator_seconds_count", role=role) > 0
        # The store goes: the others stay alive, and say so when they know no leader any more.
        assert await _get(others["ingest"].monitor.address, "/healthz") == (200, "alive\n")


async def test_a_cluster_tells_its_leaders_and_their_followers(tmp_path, caplog):
    """Three copies of each partition: one leads, its followers' lag goes to 0; a store that stops says why it led."""
    names = ("s1", "s2", "s3")

    def settings(name, coordinator, **others):
        return _settings(
            tmp_path / name,
            node_id=name,
            coordinator=coordinator,
            replication_factor=3,
            partition_count=2,
            lease_ttl_seconds=8.0,  # all of it runs on one loop, on a busy machine
            **others,
        )

    caplog.set_level("INFO")
    async with contextlib.AsyncExitStack() as stack, contextlib.AsyncExitStack() as last:
        first = await stack.enter_async_context(run.running("store", settings("s1", "embedded")))
        where = f"tcp://{first.address}"
        second = await stack.enter_async_context(run.running("store", settings("s2", where)))
        third = await last.enter_async_context(run.running("store", settings("s3", where)))
        gateway = await stack.enter_async_context(run.running("ingest", settings("g", where)))
        monitors = dict(zip(names, (first.monitor, second.monitor, third.monitor), strict=True))
        for monitor in (*monitors.values(), gateway.monitor):
            await _ready(monitor)
        async with AsyncClient([gateway.address]) as client:
            await client.metrics.create(MetricSchema(code="calls", agg_type=AggType.SUM))
            receipt = await client.ingest([Event(account, "calls", 1) for account in range(100)])
            assert receipt.n_stored == 100

        def told(name, **labels):
            """By store."""
            return {store: _figures(monitor)(name, **labels) for store, monitor in monitors.items()}

        async with asyncio.timeout(WAIT_S):
            while sum(told("tallymark_partition_replica_lag").values()) > 0:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        lags = [
            sample
            for monitor in monitors.values()
            for sample in _figures(monitor).samples
            if sample.name == "tallymark_partition_replica_lag"
        ]
        assert len(lags) == 4  # of two partitions, each with two followers
        for partition in "01":
            leaders = told("tallymark_partition_role", partition=partition, role="leader")
            assert sorted(leaders.values()) == [0, 0, 1]
            epochs = told("tallymark_partition_epoch", partition=partition)
            assert {store for store in names if epochs[store]} == {s for s in names if leaders[s]}
            assert len(set(told("tallymark_partition_log_end", partition=partition).values())) == 1
        # Only a leader judges, and each event once.
        assert sum(told("tallymark_store_events_total", outcome="stored").values()) == 100
        assert all(value > 0 for value in told("tallymark_store_lease_seconds").values())
        # The lease of a store that is not the coordinator's host is renewed over a connection of its own.
        assert _figures(second.monitor)("tallymark_coordinator_watches_total", role="store_lease") == 0

        led = told("tallymark_partition_role", role="leader")["s3"]
        caplog.clear()
        await last.aclose()
        lost = [r for r in caplog.records if getattr(r, "event", "") == "leadership" and r.change == "lost"]
        assert _figures(third.monitor)("tallymark_partition_leadership_changes_total", change="lost") == led
        assert len(lost) >= led
        assert all(record.reason and record.epoch > 0 for record in lost)
        del monitors["s3"]
        for monitor in monitors.values():
            await _ready(monitor)
        assert sum(told("tallymark_partition_role", role="leader").values()) == 2


def test_a_gateway_is_ready_once_it_has_seen_every_leader():
    """Not before; afterwards as long as it knows one leader, so that one partition doesn't take it out."""
    missing = [0, 1, 2]
    server = SimpleNamespace(leaderless=lambda: list(missing), core=SimpleNamespace(partition_count=3))
    monitor = Monitor(Settings(), ManualClock(), None)
    monitor.readiness.starting("ingest")
    monitor.watch_ingest(server)
    assert monitor.readiness.problems() == ["ingest: no partition has a leader"]
    missing[:] = [1]
    assert monitor.readiness.problems() == [
        "ingest: 1 of 3 partitions have no leader yet, partition 1 among them"
    ]
    missing[:] = []
    assert monitor.readiness.problems() == []
    missing[:] = [0, 2]
    assert monitor.readiness.problems() == []
    missing[:] = [0, 1, 2]
    assert monitor.readiness.problems() == ["ingest: no partition has a leader"]
    missing[:] = [2]
    assert monitor.readiness.problems() == []


async def test_without_the_setting_nothing_listens(tmp_path):
    """Nothing is gathered and nothing listens, but readiness is kept."""
    async with dev.running(Settings(port=0, data_dir=str(tmp_path))) as node:
        await _ready(node.monitor)
        assert node.monitor.address == ""
        assert node.monitor.telemetry is None


@pytest.mark.parametrize("address", ["nonsense", "127.0.0.1:99999", "256.1.1.1:0"])
async def test_an_address_that_is_none_is_an_error(tmp_path, address):
    """It names the setting, and nothing has been started."""
    settings = Settings(port=0, telemetry=address, data_dir=str(tmp_path))
    with pytest.raises(InvalidRequestError, match="telemetry"):
        async with dev.running(settings):
            pass


async def test_a_taken_port_is_an_error_of_this_setting(tmp_path):
    """The message is about the telemetry's address, not the role's."""
    server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        settings = Settings(port=0, telemetry=f"127.0.0.1:{port}", data_dir=str(tmp_path))
        with pytest.raises(InvalidRequestError, match=f"telemetry = '127.0.0.1:{port}'"):
            async with dev.running(settings):
                pass


def test_run_logs_lines_that_machines_read(tmp_path):
    """Every line on standard error is JSON with the node and its role; the leaderships say why; SIGTERM is a 0."""
    environment = {
        "TALLYMARK_PORT": "0",
        "TALLYMARK_TELEMETRY": "127.0.0.1:0",
        "TALLYMARK_NODE_ID": "store-7",
        "TALLYMARK_PARTITION_COUNT": "2",
        "TALLYMARK_DATA_DIR": str(tmp_path / "data"),
    }
    errors = tmp_path / "errors"
    with errors.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "tallymark_node.main", "run", "--role", "store"],
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=stream,
            text=True,
        )
        try:
            line = process.stdout.readline()
            words = dict(word.split("=", 1) for word in line.split()[1:])
            assert line.startswith("ready store=127.0.0.1:")
            assert check(words["telemetry"]) == (READY, "ready")
            process.send_signal(signal.SIGTERM)
            assert process.wait(WAIT_S) == 0
        finally:
            process.kill()
            process.communicate()
    # What is said before anything starts, about compiling kernels, is for people.
    lines = [line for line in errors.read_text().splitlines() if not line.startswith("preparing")]
    records = [json.loads(line) for line in lines]
    assert all({"time", "level", "logger", "message"} <= record.keys() for record in records)
    assert {(record["node"], record["role"]) for record in records} == {("store-7", "store")}
    gained = [r for r in records if r.get("event") == "leadership" and r["change"] == "gained"]
    assert sorted(record["partition"] for record in gained) == [0, 1]
    assert all(record["reason"] and record["epoch"] > 0 for record in gained)


# ------------------------------------------------------------ the page


def _declared():
    """Every family that the code declares."""
    found = {}
    for package in (tallymark_alerts, tallymark_ingest, tallymark_query, tallymark_runtime, tallymark_store):
        for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            if module.name.rsplit(".", 1)[1] == "telemetry":
                for value in vars(importlib.import_module(module.name)).values():
                    if isinstance(value, Family):
                        found[value.name] = value
    return found


def test_the_page_lists_every_family():
    """docs/operations.md has a row for each family, with its kind and labels, and none besides."""
    rows = re.findall(r"^\| `(tallymark_\w+)` \| (\w+) \|([^|]*)\|", OPERATIONS.read_text(), re.MULTILINE)
    listed = {name: (kind, tuple(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}
    assert len(listed) == len(rows)
    declared = {name: (family.kind, family.labels) for name, family in _declared().items()}
    assert listed == declared


def test_families_follow_the_rules():
    """Prefix, a counter's suffix, units at the end, one line that says what it is; labels are bounded by kind."""
    allowed = {"node", "role", "version", "source", "operation", "code", "outcome", "kind"}
    allowed |= {"partition", "change", "follower", "peer"}
    for family in _declared().values():
        assert re.fullmatch(r"tallymark_[a-z_]+", family.name)
        assert family.name.endswith("_total") == (family.kind == "counter")
        assert (family.scale == 1e-9) == family.name.endswith("_seconds")
        assert "\n" not in family.documentation
        assert family.documentation.endswith(".")
        assert set(family.labels) <= allowed
