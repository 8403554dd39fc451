"""Who shall hold which partition, and under which copy ids: the records in the coordinator and their keys.

    assignments/<partition>      `Assignment`: the wish
    copies/<partition>/<node>    `Copy`: the copy id under which a node's copy takes part
    founding/<partition>         `Founding`: the members of the empty log, made once
    draining/<node>              `Draining`: the node shall hold nothing
    lives/<node>                 `Life`: how often its store was started; an older disk knows of fewer

The fact, who makes a partition's quorum, is in its log. See docs/replication.md.
"""

from __future__ import annotations

import msgspec

ASSIGNMENTS = b"assignments/"
COPIES = b"copies/"
FOUNDING = b"founding/"
DRAINING = b"draining/"
LIVES = b"lives/"

NO_LEADER = "no leader is known"  # how the status of a copy begins that waits for one


class Assignment(msgspec.Struct, frozen=True):
    """The nodes that shall hold a partition, the preferred leader first."""

    nodes: tuple[str, ...]
    zones: tuple[str, ...] = ()  # of the nodes as they were assigned, for when one is gone; may be shorter


class Copy(msgspec.Struct, frozen=True):
    """A node's copy of a partition."""

    copy_id: str  # random; renewed whenever the copy is discarded
    is_removed: bool = False  # by the leader: this copy is no member any more, and its node is to discard it
    removed_at: int = (
        0  # the epoch of that leader; says nothing about a copy that has obeyed a later one since
    )


class Founding(msgspec.Struct, frozen=True):
    """The members of a partition's empty log: (node id, copy id)."""

    members: tuple[tuple[str, str], ...]


class Draining(msgspec.Struct, frozen=True):
    """A node that shall hold nothing."""

    successor: str = ""  # who was to take its copies, if somebody in particular


class Life(msgspec.Struct, frozen=True):
    """How often a store was started, as its disk says as well: a disk that says less was put back from a backup."""

    number: int


def assignment_key(partition: int) -> bytes:
    """The key under which a partition's assignment lies."""
    return ASSIGNMENTS + str(partition).encode()


def copy_key(partition: int, node_id: str) -> bytes:
    """The key under which a node's copy of a partition is registered."""
    return COPIES + f"{partition}/{node_id}".encode()


def founding_key(partition: int) -> bytes:
    """The key under which a partition's founding members lie."""
    return FOUNDING + str(partition).encode()


def draining_key(node_id: str) -> bytes:
    """The key that tells that a node shall hold nothing."""
    return DRAINING + node_id.encode()


def life_key(node_id: str) -> bytes:
    """The key that tells how often a node's store was started."""
    return LIVES + node_id.encode()
