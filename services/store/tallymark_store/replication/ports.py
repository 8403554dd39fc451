"""What a replica needs from its driver: the log, and the values that both share.

The log's methods never wait. What they write is durable only when the driver says so (`Replica.synced`).
"""

from __future__ import annotations

from typing import Protocol

import msgspec

from tallymark_store.replication.messages import Record, Tail


class Log(Protocol):
    """One partition's log as its replica sees it; `replication.memory_log` has the twin in memory."""

    @property
    def log_start(self) -> int:
        """The first offset that is kept."""
        ...

    @property
    def log_end(self) -> int:
        """The next offset to be written."""
        ...

    def tail(self, below: int, count: int) -> Tail:
        """Where the last `count` epochs end, of the part of the log below offset `below`.

        The first may be that of the record before `log_start`: all that is still known of what lay there.
        """
        ...

    def epoch_before(self, offset: int) -> int:
        """The epoch of the record that ends at `offset`; 0 at offset 0; -1 if no record is known to end there.

        Known from `log_start` on: also of the record that ended right there.
        """
        ...

    def append(self, records: list[Record]) -> None:
        """Write records at the log's end.

        Raises:
            BackpressureError: there is no room; nothing, or only the first of them, was written.
        """
        ...

    def truncate(self, new_end: int) -> None:
        """Cut the log at a record boundary. Raises as `append` does."""
        ...

    def read(self, start: int, bytes_max: int) -> list[Record]:
        """Records from the boundary `start` on: at least one if there is one, and no more than fit `bytes_max`.

        Raises:
            DamagedError: of this copy.
        """
        ...


class Member(msgspec.Struct, frozen=True, array_like=True, order=True):
    """A copy that counts."""

    node_id: str
    copy_id: str


class Membership(msgspec.Struct, frozen=True):
    """Who makes the quorum, from the record at `offset` on (-1: the founding one)."""

    members: tuple[Member, ...]
    offset: int = -1

    @property
    def quorum(self) -> int:
        """How many members are a majority."""
        return len(self.members) // 2 + 1

    def has(self, node_id: str, copy_id: str) -> bool:
        """Whether this very copy is a member."""
        return Member(node_id, copy_id) in self.members


class DurableState(msgspec.Struct, frozen=True):
    """What a replica must never forget. Persisted before anything that depends on it is sent."""

    copy_id: str
    promised: int = 0  # the highest epoch promised; no message of a lower one is obeyed
    instance: str = ""  # to whom
    high_watermark: int = 0  # a lower bound of what is known to be committed
    is_damaged: bool = False  # kept by the driver: this copy counts for nothing, whatever its log looks like


class ReplicaConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Times in nanoseconds, sizes in bytes."""

    lease_ns: int = 2_000_000_000
    heartbeat_ns: int = 250_000_000
    resend_ns: int = 300_000_000  # a request that was not answered is repeated after this
    candidacy_step_ns: int = 100_000_000  # a member waits this long for each rank before it
    preference_ns: int = 10_000_000_000  # the preferred leader takes over after it has been ready for so long
    window_bytes: int = 32 * 1024 * 1024  # sent to a follower and not acknowledged
    catch_up_bytes_per_s: int = 128 * 1024 * 1024  # to a copy that is no member yet: live traffic goes first
    message_bytes: int = 4 * 1024 * 1024  # of records in one message
