"""Settings: what overrules what, and a sentence for everything that is wrong."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from tallymark_node import dev, run
from tallymark_node.cli import serve
from tallymark_node.config import Settings, load, unknown_variables
from tallymark_protocol.errors import InvalidRequestError, UnavailableError


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
        ("webhook_retry_s = 0.0", "webhook_retry_s"),
        ("webhook_allow_private = 1", "webhook_allow_private"),
        ('webhook_allow_private = "true"', "webhook_allow_private"),
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
        ('archive = "s3://bucket"', 'archive must be "on" or "off"'),
        ("archive_events = 0", "archive_events must be 1"),
        ("memory_bytes = -2", "memory_bytes must be -1"),
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


@pytest.mark.parametrize(
    ("text", "value"), [("true", True), ("1", True), ("True", True), ("false", False), ("0", False)]
)
def test_a_switch_is_a_word_in_the_environment(text: str, value: bool) -> None:
    """As the compose file gives it; what is neither yes nor no is an error, not a no."""
    assert load(None, {"TALLYMARK_WEBHOOK_ALLOW_PRIVATE": text}).webhook_allow_private is value
    for other in ("", "yes", "2"):
        with pytest.raises(InvalidRequestError, match="neither true nor false"):
            load(None, {"TALLYMARK_WEBHOOK_ALLOW_PRIVATE": other})


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
    assert (store.archive, limited.archive, store.recycle) == ("", "", False)
    off = dev.store_config(Settings(archive="off"), "l:0")
    assert (off.archive, off.recycle) == ("", False)
    archived = dev.store_config(Settings(archive="on", archive_events=5, archive_interval_seconds=7.5), "l:0")
    assert archived.recycle
    assert (archived.archive, archived.archive_events, archived.archive_interval_s) == ("on", 5, 7.5)
    assert dev.store_config(Settings(memory_bytes=7), "l:0").memory_bytes == 7
    assert dev.store_config(Settings(), "l:0").memory_bytes == 0
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


def test_a_mistyped_variable_is_told_with_what_was_meant() -> None:
    """It is no error: other programs may have theirs. Those of the command and of the image are known."""
    environment = {
        "TALLYMARK_DATADIR": "x",
        "TALLYMARK_QQQ": "x",
        "TALLYMARK_PORT": "1",
        "TALLYMARK_SERVER": "x",
        "TALLYMARK_ROLE": "store",
        "PORTS": "1",
    }
    assert unknown_variables(environment) == [
        "the variable TALLYMARK_DATADIR is no setting, and is ignored; did you mean TALLYMARK_DATA_DIR?",
        "the variable TALLYMARK_QQQ is no setting, and is ignored",
    ]


def test_a_mistyped_variable_is_a_warning_at_the_start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On standard error; what is set otherwise holds."""
    monkeypatch.setenv("TALLYMARK_ZOEN", "z1")
    monkeypatch.setenv("TALLYMARK_PORT", "5")
    assert serve._settings(None, {}) == load(None, {"TALLYMARK_PORT": "5"})
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "warning: the variable TALLYMARK_ZOEN is no setting" in captured.err
    assert "did you mean TALLYMARK_ZONE?" in captured.err


def test_a_port_in_use_is_told_with_the_way_to_choose_another() -> None:
    """`dev` has an option for it, `run` a variable."""
    error = OSError(errno.EADDRINUSE, "in use")
    assert "choose another with --port" in serve._start_problem(error, Settings(), None)
    shown = serve._start_problem(error, Settings(), "query")
    assert "--port" not in shown
    assert "choose another by TALLYMARK_PORT" in shown


def test_constants_at_their_defaults_were_not_asked_for() -> None:
    """So a cluster that has others needs to say nothing."""
    assert not dev.store_config(Settings(), "l:0").is_partition_count_set
    assert not dev.store_config(Settings(), "l:0").is_dedup_window_set
    assert dev.store_config(Settings(partition_count=5), "l:0").is_partition_count_set
    assert dev.store_config(Settings(dedup_window_seconds=5), "l:0").is_dedup_window_set


async def test_a_role_says_what_it_waits_for_and_when_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each reason once: the coordinator is away, there is no cluster, there is one."""
    monkeypatch.setattr(run, "START_RETRY_S", 0.0)
    away = UnavailableError("no etcd")
    answers: list[Any] = [away, away, None, None, object()]

    class Coordinator:
        async def get(self, key: bytes) -> Any:
            answer = answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer

    told: list[str] = []
    settings = Settings(coordinator="etcd://a:1")
    await run._wait_coordinator(Coordinator(), settings, told.append)  # type: ignore[arg-type]
    assert told == [
        "waiting for the coordinator at etcd://a:1: no etcd",
        "no cluster at etcd://a:1 yet: waiting for its first stores",
        "the cluster is there: starting",
    ]
    answers.append(object())
    told.clear()
    await run._wait_coordinator(Coordinator(), settings, told.append)  # type: ignore[arg-type]
    assert told == []
