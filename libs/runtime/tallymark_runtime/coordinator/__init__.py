"""Coordination: who leads, who is there, which metrics exist. The port, and what stands behind it.

`Coordinator` is the port, in the shape of etcd v3. `MemoryCoordinator` keeps everything in memory,
`FileCoordinator` in a synced file, `RemoteCoordinator` asks another process, which answers with
`CoordinatorService`; `etcd.EtcdCoordinator` asks an etcd cluster. `open_remote` opens the one that a setting names.
No usage data ever goes here.
"""

from tallymark_runtime.coordinator.local import FileCoordinator, MemoryCoordinator
from tallymark_runtime.coordinator.opening import open_remote
from tallymark_runtime.coordinator.port import (
    CompactedError,
    Compare,
    Coordinator,
    Delete,
    EventKind,
    Get,
    KeyValue,
    Operation,
    Put,
    RangeResult,
    Snapshot,
    Target,
    TxnResult,
    WatchEvent,
    absent,
    follow,
    unchanged,
)
from tallymark_runtime.coordinator.remote import CoordinatorService, RemoteCoordinator, serve_coordinator

__all__ = [
    "CompactedError",
    "Compare",
    "Coordinator",
    "CoordinatorService",
    "Delete",
    "EventKind",
    "FileCoordinator",
    "Get",
    "KeyValue",
    "MemoryCoordinator",
    "Operation",
    "Put",
    "RangeResult",
    "RemoteCoordinator",
    "Snapshot",
    "Target",
    "TxnResult",
    "WatchEvent",
    "absent",
    "follow",
    "open_remote",
    "serve_coordinator",
    "unchanged",
]
