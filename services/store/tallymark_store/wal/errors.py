"""What the write-ahead log refuses, and why."""

from __future__ import annotations

from tallymark_protocol.errors import BackpressureError, ErrorCode, ServerError, UnavailableError


class LogFullError(BackpressureError):
    """There is no room for the record. Nothing of it was taken; what was taken before is safe.

    Ends by itself once there is space again and `Wal.poll_space` has noticed.
    """

    default_code = ErrorCode.DISK_FULL


class LogBusyError(BackpressureError):
    """Too many bytes wait for the disk already. Nothing was taken; append again after the next sync."""


class DamagedError(UnavailableError):
    """Stored bytes of a partition cannot be trusted. The copy is of no use until it is replaced (`reset`).

    Attributes:
        partition: whose bytes they are.
        segment: the segment that holds them, -1 if that isn't known.
        position: where in it.
    """

    default_code = ErrorCode.PARTITION_DAMAGED
    default_retriable = False

    def __init__(self, message: str, *, partition: int, segment: int = -1, position: int = 0) -> None:
        super().__init__(message, details={"partition": partition, "segment": segment, "position": position})
        self.partition = partition
        self.segment = segment
        self.position = position


class LogFailedError(ServerError):
    """A write or sync of the log failed: what is on disk is unknown until the process has restarted.

    Whoever wanted something written may ask again: this process ends, and it or another copy takes over.
    """

    default_code = ErrorCode.PARTITION_UNAVAILABLE
    default_retriable = True


class LogVersionError(ServerError):
    """The log was written by another version, which this one can't read."""
