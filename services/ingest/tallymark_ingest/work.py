"""What the gateway's core works on: requests, the appends that carry their events, and the answers to both.

Plain objects with few rules of their own; `gateway` moves them along.
"""

from __future__ import annotations

import enum
from typing import Any, Final, NamedTuple

import google_crc32c
import numpy as np
import numpy.typing as npt

from tallymark_ingest.split import Payload, event_indexes
from tallymark_protocol.codec import encode
from tallymark_protocol.errors import Reason, RemoteProtocolError
from tallymark_protocol.messages import (
    Appended,
    AppendHeader,
    ChunkOutcome,
    EventOutcome,
    FrameType,
    PartitionFailure,
    PartitionRun,
)

_FIRST: Final = np.zeros(1, dtype=np.int64)


class Answer(NamedTuple):
    """A frame to send to a caller."""

    connection: Any
    request_id: int
    kind: FrameType
    body: bytes


class AppendState(enum.Enum):
    """Where an append stands; see the module's docstring."""

    QUEUED = "queued"
    SENT = "sent"
    WAITING = "waiting"
    DONE = "done"


class Request:
    """One caller's chunk under way."""

    __slots__ = (
        "arrived_ns",
        "body",
        "connection",
        "deadline_ns",
        "events",
        "failures",
        "left",
        "metrics",
        "outcomes",
        "request_id",
        "runs",
    )

    def __init__(
        self,
        connection: Any,
        request_id: int,
        body: bytes,
        events: int,
        metrics: int,
        deadline_ns: int,
        arrived_ns: int,
    ) -> None:
        self.connection = connection
        self.request_id = request_id
        self.body: bytes | None = body  # None once it is split
        self.events = events
        self.metrics = metrics
        self.deadline_ns = deadline_ns
        self.arrived_ns = arrived_ns
        self.left: dict[int, int] = {}  # once split: partition -> events, of the partitions without an answer
        self.runs: list[PartitionRun] = []
        self.outcomes: list[EventOutcome] = []
        self.failures: list[PartitionFailure] = []


class Round:
    """What the appends of one split share."""

    __slots__ = ("firsts", "left", "part", "requests")

    def __init__(self, part: npt.NDArray[np.uint16] | None, firsts: list[int]) -> None:
        self.part = part  # None: there is one event
        self.firsts = firsts
        self.left = 0  # appends that requests to come should wait for
        self.requests = 0  # in it, once it counts among the rounds that requests wait for


class Append:
    """One partition's payload under way to its leader."""

    __slots__ = (
        "_counted",
        "attempts",
        "body",
        "chunks",
        "counts",
        "due_ns",
        "failures",
        "has_failed",
        "is_async",
        "maybe_stored",
        "partition",
        "requests",
        "round",
        "sent_ns",
        "state",
        "target",
        "timeout_ns",
    )

    def __init__(
        self,
        payload: Payload,
        requests: list[Request],
        round_: Round,
        *,
        is_async: bool,
        metrics_revision: int,
    ) -> None:
        data = payload.data
        self.partition = payload.partition
        self.is_async = is_async
        header = encode(
            AppendHeader(
                partition=payload.partition,
                checksum=google_crc32c.value(data),
                is_async=is_async,
                metrics_revision=metrics_revision,
            )
        )
        # The whole frame's body, kept until the append is done: a second attempt sends the same bytes.
        self.body = b"".join(
            (len(header).to_bytes(2, "little"), header, data if isinstance(data, bytes) else data.data)
        )
        self.chunks = payload.chunks  # numbers of the chunks in the split, in the order of the chunk table
        self.counts = payload.counts
        self.requests = requests  # whose chunks these are, in the same order
        self.round = round_
        self.state = AppendState.QUEUED
        self.attempts = 0
        self.failures = 0  # of attempts since its partition's leader changed
        self.has_failed = False  # its partition counts as failing while there is such an append
        self.maybe_stored = False  # an attempt ended without the leader saying that it took nothing
        self.due_ns = -1  # while WAITING: when to send it again; while SENT: likewise, -1 for no such time
        self.sent_ns = 0  # while SENT: since when
        self.target = ""  # while SENT: to whom, in the shell's words
        self.timeout_ns = 0  # while SENT: for how long to wait for the answer
        self._counted = False

    def positions(self, number: int) -> npt.NDArray[np.int64]:
        """Where in its chunk each event of the payload's chunk `number` stands."""
        part = self.round.part
        if part is None:
            return _FIRST
        return event_indexes(part, self.round.firsts, self.chunks[number], self.partition)

    def is_wanted(self) -> bool:
        """Whether a request still waits for it."""
        partition = self.partition
        return any(partition in request.left for request in self.requests)

    def count(self) -> None:
        """Let coming requests wait for this append."""
        self._counted = True
        self.round.left += 1

    def uncount(self) -> bool:
        """Stop letting requests wait for it. Returns whether it was the last of its round."""
        if not self._counted:
            return False
        self._counted = False
        self.round.left -= 1
        return self.round.left == 0


def check_answer(append: Append, appended: Appended) -> list[ChunkOutcome] | None:
    """Check the leader's answer against what was asked, whole, before any of it is believed.

    Returns:
        The outcomes by chunk; None where all is stored from `base_offset` on.

    Raises:
        RemoteProtocolError: it doesn't fit.
    """
    outcomes = appended.chunks
    if outcomes is None:
        if appended.base_offset < 0:
            raise RemoteProtocolError("malformed answer to an append: stored, but without an offset")
        return None
    if len(outcomes) != len(append.counts):
        raise RemoteProtocolError(
            f"malformed answer to an append: {len(outcomes)} outcomes for {len(append.counts)} chunks"
        )
    for count, outcome in zip(append.counts, outcomes, strict=True):
        if outcome.error is None and outcome.base_offset < 0:
            raise RemoteProtocolError("malformed answer to an append: stored, but without an offset")
        before = -1
        for position, reason, _ in outcome.exceptions:
            if not before < position < count or reason == Reason.ACCEPTED:
                raise RemoteProtocolError("malformed answer to an append: an outcome for no event of it")
            before = position
    return outcomes
