"""Settings of a node: defaults, then a TOML file, then environment variables, then the command line.

Every setting is one field of `Settings`; its environment variable is `TALLYMARK_` and the field's name in
capitals. An unknown key or a value of the wrong kind is an error that names it.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_type_hints

import msgspec

from tallymark_protocol import limits
from tallymark_protocol.errors import InvalidRequestError
from tallymark_runtime.coordinator import opening
from tallymark_runtime.framing import split_address

ENV_PREFIX = "TALLYMARK_"
ROLES = ("ingest", "store", "query", "alerts")
# Variables of that prefix that are no settings: the command's, the image's and the compose file's, an example's.
OTHER_VARIABLES = frozenset(
    {"TALLYMARK_SERVER", "TALLYMARK_ROLE", "TALLYMARK_IMAGE", "TALLYMARK_WEBHOOK_SECRET"}
)


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that can be set. Sizes are bytes, times are what their name says."""

    # Which node this is, and where it listens. Port 0 takes a free one.
    node_id: str = "node-1"
    host: str = "127.0.0.1"
    port: int = 7001
    advertise: str = ""  # "host:port" that others use to reach this node; empty: host and port as bound
    zone: str = ""  # stores: the zone this node is in; copies of a partition are spread over zones
    # Where the cluster's coordination lives: "embedded" (in the store's data directory), "tcp://host:port", the
    # address of the store that embeds it, or "etcd://host:port,host:port,...", members of an etcd cluster.
    coordinator: str = "embedded"
    coordinator_prefix: str = opening.DEFAULT_PREFIX  # of the cluster's keys in etcd: one for each cluster
    lease_ttl_seconds: float = 2.0  # how long a silent leader keeps its partitions; etcd takes whole seconds
    telemetry: str = ""  # "host:port" where Prometheus finds this node's figures; empty: nowhere
    grpc: str = ""  # "host:port" of gRPC health and administration; empty: nowhere
    data_dir: str = "tallymark-data"

    # The cluster's constants, fixed when its first store starts.
    partition_count: int = 4
    replication_factor: int = 1  # copies of each partition; 3 where etcd coordinates and nothing is set

    # Store.
    wal_segment_bytes: int = 64 * 1024 * 1024
    log_bytes_max: int = 0  # 0: as much as the disk holds
    checkpoint_interval_seconds: float = 60.0
    checkpoint_events: int = 5_000_000  # a checkpoint is also due after so many events
    # "on": events are kept as Parquet files in the data directory, and the log is dropped below what they and the
    # checkpoints hold; "off", or empty: the log is kept whole.
    archive: str = ""
    archive_events: int = 500_000  # a partition is archived when so many have gathered
    archive_interval_seconds: float = 300.0  # or after so long
    # For what can also be on disk: cells and sets, remembered event ids, alert records. 0: half of the machine's, or of
    # its container's; -1: no bound.
    memory_bytes: int = 0
    dedup_window_seconds: int = limits.DEDUP_WINDOW_NS // 10**9  # a constant of the cluster, too

    # Ingest.
    pending_bytes_max: int = 64 * 1024 * 1024
    coalesce_ms: float = 20.0

    # Alerts.
    webhook_allow_private: bool = False  # deliver to private, loopback and link-local addresses, too
    webhook_retry_s: float = 5.0  # before a delivery that failed is tried again for the first time


CLUSTER_REPLICATION_FACTOR = 3  # where etcd coordinates
_NAME_BYTES_MAX = 128
_YEARS_S = 10 * 366 * 86_400
# What a setting may be, both ends included.
_BOUNDS: dict[str, tuple[float, float]] = {
    "port": (0, 65_535),
    "partition_count": (1, limits.PARTITIONS_MAX),
    "replication_factor": (1, limits.REPLICAS_MAX),
    "lease_ttl_seconds": (0.1, 3_600.0),
    "wal_segment_bytes": (1024 * 1024, 1024**4),
    "log_bytes_max": (0, 2**62),
    "checkpoint_interval_seconds": (0.001, 1e10),
    "checkpoint_events": (1, 2**62),
    "archive_events": (1, 2**62),
    "archive_interval_seconds": (0.001, 1e10),
    "memory_bytes": (-1, 2**62),
    "dedup_window_seconds": (0, _YEARS_S),
    "pending_bytes_max": (1, 2**62),
    "coalesce_ms": (0.0, 10_000.0),
    "webhook_retry_s": (0.001, 3_600.0),
}


_KINDS = {int: "whole number", float: "number", str: "text"}
_BOOLEANS = {"true": True, "1": True, "false": False, "0": False}


def _convert(name: str, text: str, kind: type) -> Any:
    if kind is bool:
        if text.lower() not in _BOOLEANS:
            raise InvalidRequestError(f"{name}={text!r} is neither true nor false")
        return _BOOLEANS[text.lower()]
    try:
        return kind(text)
    except ValueError:
        raise InvalidRequestError(f"{name}={text!r} is not a {_KINDS[kind]}") from None


def load(
    path: Path | None, environment: Mapping[str, str], overrides: Mapping[str, Any] | None = None
) -> Settings:
    """Read the settings.

    Raises:
        InvalidRequestError: when the file cannot be read or a setting is unknown or of the wrong kind.
    """
    values: dict[str, Any] = {}
    kinds = get_type_hints(Settings)
    if path is not None:
        try:
            values.update(tomllib.loads(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise InvalidRequestError(f"cannot read the configuration {path}: {error.strerror}") from None
        except ValueError as error:  # not UTF-8, or not TOML
            raise InvalidRequestError(f"the configuration {path} is not valid TOML: {error}") from None
    for name, text in environment.items():
        field = name.removeprefix(ENV_PREFIX).lower()
        if name.startswith(ENV_PREFIX) and field in kinds:
            values[field] = _convert(name, text, kinds[field])
    values.update({name: value for name, value in (overrides or {}).items() if value is not None})
    unknown = sorted(set(values) - set(kinds))
    if unknown:
        raise InvalidRequestError(f"unknown setting {unknown[0]!r}; there are: {', '.join(sorted(kinds))}")
    if opening.is_etcd(str(values.get("coordinator"))):
        values.setdefault("replication_factor", CLUSTER_REPLICATION_FACTOR)
    try:
        settings = msgspec.convert(values, Settings)
    except msgspec.ValidationError as error:
        raise InvalidRequestError(f"bad configuration: {error}") from None
    for name, (least, most) in _BOUNDS.items():
        value = getattr(settings, name)
        if not least <= value <= most:  # also where it is not a number
            raise InvalidRequestError(f"{name} must be {least} to {most}, not {value}")
    _check_texts(settings)
    return settings


def unknown_variables(environment: Mapping[str, str]) -> list[str]:
    """Say of every variable that looks like a setting and is none, which setting may have been meant.

    They are no errors: other programs, and other versions, may have theirs.
    """
    known = {name.upper() for name in get_type_hints(Settings)}
    warnings = []
    for name in sorted(environment):
        rest = name.removeprefix(ENV_PREFIX)
        if not name.startswith(ENV_PREFIX) or rest.upper() in known or name in OTHER_VARIABLES:
            continue
        near = difflib.get_close_matches(rest.upper(), sorted(known), n=1)
        hint = f"; did you mean {ENV_PREFIX}{near[0]}?" if near else ""
        warnings.append(f"the variable {name:.80} is no setting, and is ignored{hint}")
    return warnings


def _check_texts(settings: Settings) -> None:
    opening.addresses_of(settings.coordinator)
    prefix = settings.coordinator_prefix
    # Without the slash, one cluster's keys could begin with another's prefix.
    if not prefix.endswith("/") or len(prefix.encode()) > _NAME_BYTES_MAX:
        raise InvalidRequestError(
            f'coordinator_prefix must be text of at most {_NAME_BYTES_MAX} bytes that ends with "/", not {prefix!r}'
        )
    if len(settings.zone.encode()) > _NAME_BYTES_MAX:
        raise InvalidRequestError(f"zone must be text of at most {_NAME_BYTES_MAX} bytes")
    if settings.archive not in {"", "off", "on"}:
        raise InvalidRequestError(f'archive must be "on" or "off", not {settings.archive!r}')
    for name in ("telemetry", "grpc"):
        address = getattr(settings, name)
        try:
            if address:
                split_address(address)
        except ValueError as error:
            raise InvalidRequestError(f'{name} must be "host:port", or empty for none: {error}') from None
