"""What a gateway knows of the cluster: who leads which partition, and where the other nodes are.

Follows two prefixes of the coordinator. `leaders/<partition>` is the partition's leader key: a map with `address`,
`epoch` and `instance`, written by the leader under its lease. `nodes/<node id>` is a node's registration: a map with
`address` and `role` ("ingest", "store", "query", "alerts", or several joined by "+"), or `roles`, a list. Values are
MessagePack or JSON; one that can't be read counts as absent. The gateway only routes by this: that a leader is one
is decided by the replicas, never by what is known here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final

import msgspec

from tallymark_protocol.errors import TallymarkError
from tallymark_runtime.coordinator.port import Coordinator, EventKind, KeyValue, Snapshot, follow

LEADERS_PREFIX: Final = b"leaders/"
NODES_PREFIX: Final = b"nodes/"
_RETRY_S: Final = 0.2  # after the coordinator could not be reached


class Leader(msgspec.Struct, frozen=True):
    """A partition's leader, by its key."""

    address: str
    epoch: int = 0
    instance: Any = None


class Node(msgspec.Struct, frozen=True):
    """A node's registration."""

    address: str
    role: str = ""
    roles: list[str] = []

    def has_role(self, role: str) -> bool:
        """Whether it serves a role."""
        return role in self.roles or role in self.role.split("+")


def _read(value: bytes, kind: type[Any]) -> Any:
    """A key's value as `kind`; None where it can't be."""
    try:
        # No map in MessagePack begins with "{".
        module = msgspec.json if value.startswith(b"{") else msgspec.msgpack
        return module.decode(value, type=kind)
    except (ValueError, RecursionError):
        return None


class Directory:
    """The cluster as last heard.

    Args:
        coordinator: where to follow.
        on_leader: called with a partition whenever its leader has changed (also to none).

    Attributes:
        leaders: by partition; without those that have none.
        nodes: by node id.
    """

    def __init__(self, coordinator: Coordinator, on_leader: Callable[[int], None]) -> None:
        self.leaders: dict[int, Leader] = {}
        self.nodes: dict[str, Node] = {}
        self._coordinator = coordinator
        self._on_leader = on_leader
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Follow from now on; returns once what is there has been read, or the coordinator can't be reached."""
        ready = [asyncio.Event(), asyncio.Event()]
        loop = asyncio.get_running_loop()
        self._tasks = [
            loop.create_task(self._follow(LEADERS_PREFIX, self._set_leader, ready[0])),
            loop.create_task(self._follow(NODES_PREFIX, self._set_node, ready[1])),
        ]
        for event in ready:
            await event.wait()

    async def close(self) -> None:
        """Stop following."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def addresses(self, role: str) -> list[str]:
        """Addresses of the nodes that serve a role, sorted."""
        return sorted({node.address for node in self.nodes.values() if node.has_role(role)})

    async def _follow(
        self, prefix: bytes, apply: Callable[[bytes, bytes | None], None], ready: asyncio.Event
    ) -> None:
        known: dict[bytes, KeyValue] = {}
        while True:
            try:
                async for change in follow(self._coordinator, prefix):
                    if isinstance(change, Snapshot):
                        items = {item.key: item for item in change.items}
                        for key in known.keys() - items.keys():
                            apply(key[len(prefix) :], None)
                        for key, item in items.items():
                            if known.get(key) != item:
                                apply(key[len(prefix) :], item.value)
                        known = items
                        ready.set()
                        continue
                    for event in change:
                        key = event.item.key
                        if event.kind is EventKind.PUT:
                            known[key] = event.item
                            apply(key[len(prefix) :], event.item.value)
                        else:
                            known.pop(key, None)
                            apply(key[len(prefix) :], None)
            except TallymarkError:
                # What was known stays: a leader is a leader until somebody says otherwise.
                ready.set()
            await asyncio.sleep(_RETRY_S)

    def _set_leader(self, name: bytes, value: bytes | None) -> None:
        if not name.isdigit():
            return
        partition = int(name)
        leader = _read(value, Leader) if value is not None else None
        before = self.leaders.get(partition)
        if leader is None:
            self.leaders.pop(partition, None)
        else:
            self.leaders[partition] = leader
        if leader != before:
            self._on_leader(partition)

    def _set_node(self, name: bytes, value: bytes | None) -> None:
        node_id = name.decode("utf-8", "replace")
        node = _read(value, Node) if value is not None else None
        if node is None:
            self.nodes.pop(node_id, None)
        else:
            self.nodes[node_id] = node
