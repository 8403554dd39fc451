"""The write-ahead log: one per store process, shared by its partitions.

Start at `log.Wal`, which is what the rest of the store uses. `format` draws the bytes; `writer` is the pure
writing end; `scan` and `replay` read a log back and tell a torn tail from damage; `recovery` makes it ready to
go on; `segments` owns the files; `threads` runs it all.
"""

from tallymark_store.wal.errors import (
    DamagedError,
    LogBusyError,
    LogFailedError,
    LogFullError,
    LogVersionError,
)
from tallymark_store.wal.format import RECORD_HEADER_BYTES, Position, RecordKind, RecordMeta
from tallymark_store.wal.index import PartitionIndex, Row
from tallymark_store.wal.log import Wal, WalConfig, open_wal
from tallymark_store.wal.recovery import Recovery, WalStart
from tallymark_store.wal.replay import Damage
from tallymark_store.wal.threads import WalThreads
from tallymark_store.wal.writer import Group, WalWriter

__all__ = [
    "RECORD_HEADER_BYTES",
    "Damage",
    "DamagedError",
    "Group",
    "LogBusyError",
    "LogFailedError",
    "LogFullError",
    "LogVersionError",
    "PartitionIndex",
    "Position",
    "RecordKind",
    "RecordMeta",
    "Recovery",
    "Row",
    "Wal",
    "WalConfig",
    "WalStart",
    "WalThreads",
    "WalWriter",
    "open_wal",
]
