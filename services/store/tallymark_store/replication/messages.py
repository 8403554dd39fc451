"""What replicas of a partition say to each other. Every message is one way and may be lost, doubled or late.

Offsets are exclusive ends where they are called ends. A `tail` tells where a log's last epochs end, oldest first:
two logs agree up to the lower end of the highest epoch that both have.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from tallymark_runtime.disk import BytesLike
from tallymark_store.wal import RecordMeta

Tail = list[tuple[int, int]]  # (epoch, end offset of its last record here), ascending in both
TAIL_EPOCHS_MAX = (
    64  # of a tail in a message; where logs parted earlier, the high watermark is where to go on
)


class Record(msgspec.Struct, frozen=True, gc=False):
    """A record of the log on its way: what the log knows of it, and its payload as the leader wrote it."""

    meta: RecordMeta
    parts: Sequence[BytesLike]  # the payload in pieces

    @property
    def end(self) -> int:
        """The offset behind it."""
        return self.meta.base_offset + self.meta.count


class Message(msgspec.Struct, frozen=True, array_like=True, tag=True, gc=False):
    """Base of all. Records travel beside the message, not in it."""

    partition: int


class Announce(Message, frozen=True, gc=False):
    """A candidate asks for a promise."""

    epoch: int
    instance: str
    copy_id: str  # the candidate's own


class Promised(Message, frozen=True, gc=False):
    """The answer to `Announce`: whether it was promised, and where the log stands."""

    epoch: int  # the one that was asked for
    granted: bool
    promised: int  # the highest epoch promised; of the refusal's reason
    copy_id: str
    log_end: int
    high_watermark: int
    tail: Tail
    is_damaged: bool = False
    log_start: int = 0  # nothing below it can be fetched from here


class Fetch(Message, frozen=True, gc=False):
    """A candidate asks a more advanced replica for what it lacks."""

    epoch: int
    log_end: int
    high_watermark: int  # of the candidate: what is committed is the same in both logs
    tail: Tail


class Fetched(Message, frozen=True, gc=False):
    """The answer to `Fetch`: records from the offset `base` on, where the two logs part; `log_end` of the sender."""

    epoch: int
    base: int
    log_end: int
    record_count: int = 0  # of the records that travel with it


class Append(Message, frozen=True, gc=False):
    """The leader's records from `base` on, or a heartbeat without any."""

    epoch: int
    instance: str
    prev_epoch: int  # of the record that ends at `base`; 0 at the log's start
    base: int
    high_watermark: int
    record_count: int = 0


class Appended(Message, frozen=True, gc=False):
    """Everything below `match_end` equals the leader's log and is durable."""

    epoch: int
    copy_id: str
    match_end: int
    high_watermark: int = 0  # as far as the follower knows; for telemetry


class Mismatch(Message, frozen=True, gc=False):
    """An `Append` did not fit the log, or is not obeyed at all."""

    epoch: int  # of the append
    base: int  # likewise
    promised: int
    copy_id: str
    log_end: int
    high_watermark: int
    tail: Tail
    is_obeyed: bool  # False: the append's epoch is below the promised one, or is another instance's
    is_damaged: bool = False  # it acknowledges nothing before it is told to begin anew


class Rebuild(Message, frozen=True, gc=False):
    """A leader with a majority tells a damaged copy to discard itself and begin anew as a learner."""

    epoch: int
    copy_id: str  # the damaged copy's


class HandOver(Message, frozen=True, gc=False):
    """The leader gives its key up for this node, whose log has everything: create the key without waiting."""

    epoch: int


class Offer(Message, frozen=True, gc=False):
    """The leader's log no longer reaches back to where the follower's ends: here is a checkpoint to begin from.

    Its state is that of everything below `offset`, all of which is committed. Its files are asked for by `Ask`.
    """

    epoch: int
    instance: str
    snapshot: str  # names this checkpoint of this copy, for as long as its files are kept
    offset: int
    last_epoch: int  # of the record that ends at `offset`
    append_ns: int  # of that record
    members: list[tuple[str, str]]  # in force at `offset`: node ids and copy ids
    members_offset: int  # of the record that says so; -1: the founding members
    files: list[tuple[str, int, int]]  # name, length in bytes, CRC-32C
    # Length and CRC-32C of the manifest of an archive of what lies below `offset`; None: no archive comes along. Its
    # place is the one behind `files`, those of the files that it lists follow.
    archive: tuple[int, int] | None = None


class Ask(Message, frozen=True, gc=False):
    """A copy asks who offered it a snapshot for a piece of a file."""

    snapshot: str
    file: int  # its place in the offer; -1: for nothing, but the snapshot is still wanted
    position: int


class Piece(Message, frozen=True, gc=False):
    """A piece of a snapshot's file; its length follows from the file's."""

    snapshot: str
    file: int
    position: int
    data: bytes
    checksum: int  # CRC-32C of the data


AnyMessage = (
    Announce
    | Promised
    | Fetch
    | Fetched
    | Append
    | Appended
    | Mismatch
    | Rebuild
    | HandOver
    | Offer
    | Ask
    | Piece
)
