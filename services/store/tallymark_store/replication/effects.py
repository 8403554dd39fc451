"""What a replica asks of its driver, to be carried out in this order."""

from __future__ import annotations

import enum
from typing import NamedTuple

from tallymark_store.replication.messages import AnyMessage, Offer, Record
from tallymark_store.replication.ports import DurableState, Membership


class Send(NamedTuple):
    """Send a message to a node, with the records that belong to it."""

    to: str  # node id
    message: AnyMessage
    records: list[Record]


class Persist(NamedTuple):
    """Make this durable before any later effect."""

    state: DurableState


class CreateKey(NamedTuple):
    """Try to create the leader key under the node's lease. Answer with `key_created` or `key_refused`."""


class DeleteKey(NamedTuple):
    """Delete the leader key if it is the one created at this epoch."""

    epoch: int


class BeginEpoch(NamedTuple):
    """Bring the judge up to the log's end, append the epoch start record, then call `appended`."""

    epoch: int


class Serve(NamedTuple):
    """The epoch start is committed: take appends and reads."""

    epoch: int


class StepDown(NamedTuple):
    """Take no more appends; what waits for a commit fails; the judge goes back to what is applied."""

    epoch: int
    reason: str


class AppendMembership(NamedTuple):
    """Append a membership record, then call `appended`."""

    membership: Membership


class Truncated(NamedTuple):
    """The log was cut at `log_end`, above the high watermark: forget what came from above."""

    log_end: int


class Committed(NamedTuple):
    """Everything below is committed, and in this copy's log."""

    high_watermark: int


class Discarded(NamedTuple):
    """Discard the copy, whose new id is persisted: reset the log, forget all state, register the new copy id."""

    copy_id: str


class OfferSnapshot(NamedTuple):
    """Offer a node the newest checkpoint; asked for again and again, until its log can be gone on with."""

    to: str
    epoch: int


class Install(NamedTuple):
    """Get this checkpoint from who leads, put it in the place of log and state, then call `installed`.

    Asked for again with each offer. Nothing changes for the replica before.
    """

    leader: str
    offer: Offer


class Fault(NamedTuple):
    """This copy cannot be trusted: it counts for nothing from here on, also after a restart."""

    reason: str


Effect = (
    Send
    | Persist
    | CreateKey
    | DeleteKey
    | BeginEpoch
    | Serve
    | StepDown
    | AppendMembership
    | Truncated
    | Committed
    | Discarded
    | OfferSnapshot
    | Install
    | Fault
)


class Role(enum.Enum):
    """What a replica is doing. See docs/replication.md for the transitions."""

    FOLLOWER = "follower"  # obeys whom it promised; also a learner, and a copy without any contact
    CANDIDATE = "candidate"  # has the key; gathers promises, fetches what it lacks
    STARTING = "starting"  # has a majority; its epoch start is not committed yet
    LEADER = "leader"
    DAMAGED = "damaged"  # counts for nothing until a leader has it begin anew
