"""Who shall hold which partition, and under which copy ids: the records in the coordinator and their keys.

    assignments/<partition>      `Assignment`: the wish
    copies/<partition>/<node>    `Copy`: the copy id under which a node's copy takes part
    founding/<partition>         `Founding`: the members of the empty log, made once

The fact, who makes a partition's quorum, is in its log. See docs/replication.md.
"""

from __future__ import annotations

import msgspec

ASSIGNMENTS = b"assignments/"
COPIES = b"copies/"
FOUNDING = b"founding/"


class Assignment(msgspec.Struct, frozen=True):
    """The nodes that shall hold a partition, the preferred leader first."""

    nodes: tuple[str, ...]


class Copy(msgspec.Struct, frozen=True):
    """A node's copy of a partition."""

    copy_id: str  # random; renewed whenever the copy is discarded


class Founding(msgspec.Struct, frozen=True):
    """The members of a partition's empty log: (node id, copy id)."""

    members: tuple[tuple[str, str], ...]


def assignment_key(partition: int) -> bytes:
    """The key under which a partition's assignment lies."""
    return ASSIGNMENTS + str(partition).encode()


def copy_key(partition: int, node_id: str) -> bytes:
    """The key under which a node's copy of a partition is registered."""
    return COPIES + f"{partition}/{node_id}".encode()


def founding_key(partition: int) -> bytes:
    """The key under which a partition's founding members lie."""
    return FOUNDING + str(partition).encode()
