"""Who makes a partition's quorum: the record's bytes, and which single copy is to be changed next. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import msgspec

from tallymark_protocol.errors import RemoteProtocolError
from tallymark_store.replication.ports import Member, Membership

MEMBERS_MAX = 64


def encode_members(members: tuple[Member, ...]) -> bytes:
    """The payload of a membership record."""
    return msgspec.msgpack.encode([(member.node_id, member.copy_id) for member in members])


def decode_members(data: bytes) -> tuple[Member, ...]:
    """Read a membership record's payload.

    Raises:
        RemoteProtocolError: it is none.
    """
    try:
        pairs = msgspec.msgpack.decode(data, type=list[tuple[str, str]])
    except msgspec.DecodeError as error:
        raise RemoteProtocolError(f"malformed membership record: {error}") from None
    if not 0 < len(pairs) <= MEMBERS_MAX or len({node for node, _ in pairs}) != len(pairs):
        raise RemoteProtocolError("malformed membership record: no members, too many, or a node twice")
    return tuple(Member(node, copy_id) for node, copy_id in pairs)


class CopyView(NamedTuple):
    """What the leader knows of a node's copy."""

    copy_id: str  # "" while it was not heard of
    is_alive: bool  # heard of within a lease time, undamaged
    has_caught_up: bool


def next_membership(
    membership: Membership, wish: tuple[str, ...], own_node: str, copies: Mapping[str, CopyView]
) -> tuple[Member, ...] | None:
    """The members after the next change of one copy; None where there is nothing to do, or it would be unsafe now.

    A change is proposed only if a majority of the members after it is alive and has caught up, so that the change
    itself can be committed. The leader never removes itself: it hands the leadership over first.
    """
    members = membership.members
    nodes = {member.node_id for member in members}
    # A copy that was discarded can never count again: its place is given up first.
    for member in members:
        view = copies.get(member.node_id)
        if member.node_id != own_node and view is not None and view.copy_id not in ("", member.copy_id):
            return _if_safe(tuple(m for m in members if m != member), own_node, copies)
    for node in wish:
        view = copies.get(node)
        if node not in nodes and view is not None and view.copy_id and view.is_alive and view.has_caught_up:
            return _if_safe((*members, Member(node, view.copy_id)), own_node, copies)
    if wish and all(node in nodes for node in wish):
        for member in members:
            if member.node_id not in wish and member.node_id != own_node:
                return _if_safe(tuple(m for m in members if m != member), own_node, copies)
    return None


def _if_safe(
    members: tuple[Member, ...], own_node: str, copies: Mapping[str, CopyView]
) -> tuple[Member, ...] | None:
    ready = 0
    for member in members:
        view = copies.get(member.node_id)
        if member.node_id == own_node or (
            view is not None and view.copy_id == member.copy_id and view.is_alive and view.has_caught_up
        ):
            ready += 1
    return members if ready > len(members) // 2 else None
