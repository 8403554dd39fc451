"""Settings: what overrules what, and a sentence for everything that is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tallymark_node import dev
from tallymark_node.config import Settings, load
from tallymark_protocol.errors import InvalidRequestError


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write(text: str | bytes) -> Path:
        path = tmp_path / "node.toml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return write


def test_defaults_hold_where_nothing_is_set() -> None:
    """Other programs' variables change nothing."""
    assert load(None, {"PORT": "9", "TALLYMARK_SERVER": "x", "HOME": "/"}) == Settings()


def test_the_later_source_wins(write: Any) -> None:
    """File, then environment, then command line; each overrides single settings."""
    path = write('port = 1\nhost = "h"\ncoalesce_ms = 5\npartition_count = 8\n')
    environment = {"TALLYMARK_PORT": "2", "TALLYMARK_PARTITION_COUNT": "9", "TALLYMARK_COALESCE_MS": "0.5"}
    settings = load(path, environment, {"port": 3, "data_dir": None})
    assert settings == Settings(port=3, host="h", partition_count=9, coalesce_ms=0.5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prot = 5", "unknown setting 'prot'; there are: .*port"),
        ('port = "x"', "bad configuration: .*port"),
        ("port = 1.5", "port"),
        ("port = true", "port"),
        ("port = ", "not valid TOML"),
        (b"node_id = '\xff'", "not valid TOML"),
        ("port = 65536", "port must be 0 to 65535, not 65536"),
        ("port = -1", "port must be"),
        ("partition_count = 0", "partition_count must be 1 to 256"),
        ("partition_count = 4097", "partition_count"),
        ("wal_segment_bytes = 1000", "wal_segment_bytes must be 1048576"),
        ("log_bytes_max = -1", "log_bytes_max"),
        ("checkpoint_interval_seconds = nan", "checkpoint_interval_seconds"),
        ("checkpoint_interval_seconds = inf", "checkpoint_interval_seconds"),
        ("checkpoint_interval_seconds = 0.0", "checkpoint_interval_seconds"),
        ("checkpoint_events = 0", "checkpoint_events"),
        ("dedup_window_seconds = -1", "dedup_window_seconds"),
        ("dedup_window_seconds = 10000000000", "dedup_window_seconds"),
        ("pending_bytes_max = 0", "pending_bytes_max"),
        ("coalesce_ms = nan", "coalesce_ms"),
        ("coalesce_ms = -1", "coalesce_ms"),
        ("replication_factor = 0", "replication_factor must be 1 to 7"),
        ("lease_ttl_seconds = 0", "lease_ttl_seconds must be"),
        ("lease_ttl_seconds = nan", "lease_ttl_seconds must be"),
        ('coordinator = "elsewhere"', "coordinator must be .*not 'elsewhere'"),
        ('coordinator = "tcp://host"', "coordinator must be .*'host' is no address"),
        ('coordinator = "etcd://a:1,a:1"', "one twice"),
        ('coordinator_prefix = "cluster"', "coordinator_prefix must be .*ends with"),
        ('coordinator_prefix = ""', "coordinator_prefix must be"),
        (f'coordinator_prefix = "{"x" * 128}/"', "coordinator_prefix must be"),
        (f'zone = "{"x" * 129}"', "zone must be"),
        ('telemetry = "9100"', "telemetry must be .*'9100' is no address"),
        ('grpc = "host:port"', "grpc must be"),
        ('archive = "s3://bucket"', 'archive must be "on", or empty'),
        ("archive_events = 0", "archive_events must be 1"),
        ("archive_interval_seconds = 0.0", "archive_interval_seconds must be"),
    ],
)
def test_what_is_wrong_is_named(write: Any, text: str | bytes, message: str) -> None:
    """Unknown keys, wrong kinds, values that cannot be."""
    with pytest.raises(InvalidRequestError, match=message):
        load(write(text), {})


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("TALLYMARK_PORT", "x", "TALLYMARK_PORT='x' is not a whole number"),
        ("TALLYMARK_COALESCE_MS", "soon", "TALLYMARK_COALESCE_MS='soon' is not a number"),
        ("TALLYMARK_COALESCE_MS", "inf", "coalesce_ms must be"),
    ],
)
def test_a_bad_variable_is_named(name: str, text: str, message: str) -> None:
    """With what it was set to."""
    with pytest.raises(InvalidRequestError, match=message):
        load(None, {name: text})


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """With the system's reason."""
    with pytest.raises(
        InvalidRequestError, match=r"cannot read the configuration .*gone\.toml: No such file"
    ):
        load(tmp_path / "gone.toml", {})
    with pytest.raises(InvalidRequestError, match="cannot read the configuration"):
        load(tmp_path, {})


def test_settings_reach_the_store_and_the_gateway() -> None:
    """In their own units; 0 bytes of log means as much as the disk holds."""
    settings = Settings(dedup_window_seconds=5, coalesce_ms=1.5, partition_count=3, advertise="a:1")
    store = dev.store_config(settings, "l:0")
    assert store.dedup_window_ns == 5 * 10**9
    assert store.wal.log_bytes_max is None
    assert (store.listen, store.advertise, store.partition_count) == ("l:0", "a:1", 3)
    limited = dev.store_config(Settings(log_bytes_max=2**30), "l:0")
    assert limited.wal.log_bytes_max == 2**30
    assert (store.archive, limited.archive) == ("", "")
    archived = dev.store_config(Settings(archive="on", archive_events=5, archive_interval_seconds=7.5), "l:0")
    assert (archived.archive, archived.archive_events, archived.archive_interval_s) == ("on", 5, 7.5)
    gateway = dev.gateway_config(settings, 7, "l:0")
    assert gateway.core.coalesce_ns_max == 1_500_000
    assert gateway.partition_count == 7


def test_a_cluster_keeps_three_copies_where_nothing_else_is_set(write: Any) -> None:
    """With etcd; a node that coordinates itself keeps one."""
    assert load(None, {}).replication_factor == 1
    assert load(None, {"TALLYMARK_COORDINATOR": "tcp://a:1"}).replication_factor == 1
    assert load(None, {"TALLYMARK_COORDINATOR": "etcd://a:1,b:2"}).replication_factor == 3
    path = write('coordinator = "etcd://a:1"\nreplication_factor = 2')
    assert load(path, {}).replication_factor == 2
    assert load(path, {"TALLYMARK_REPLICATION_FACTOR": "5"}).replication_factor == 5


def test_addresses_of_what_is_offered_beside_the_data(write: Any) -> None:
    """Off, or a place to listen."""
    settings = load(write('telemetry = "0.0.0.0:9100"\ngrpc = "[::1]:0"\nzone = "a"'), {})
    assert (settings.telemetry, settings.grpc, settings.zone) == ("0.0.0.0:9100", "[::1]:0", "a")
    assert (Settings().telemetry, Settings().grpc) == ("", "")
