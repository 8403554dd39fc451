"""Connections to all peers of a kind, by address: `PeerPool`.

Owns one `PeerClient` for each address that is wanted. It keeps all of them connected in the background, so that a
request that moves from one peer to another finds a connection there, and lets go of those that nobody wants any
more. Which addresses are wanted, and what is asked of whom, is its owner's.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Iterable
from typing import Final

from tallymark_protocol.errors import TallymarkError
from tallymark_runtime.peer import PeerClient, PeerOptions

_log = logging.getLogger(__name__)

_DRAIN_S: Final = 1.0  # for answers of a peer that is let go

# Peers are given up, and tried again, sooner than a lone client would: others can take over from them.
POOL_OPTIONS: Final = PeerOptions(connect_timeout_s=2.0, backoff_max_s=0.25, silence_max_s=2.0)


class PeerPool:
    """Clients of all peers that are wanted. Use it on one event loop; close it at the end.

    Attributes:
        on_connected: called with an address whenever a connection to it stands.
        on_answers: called after a peer's answers were handed to those who wait for them, once for all of them. Set it
            before an address is wanted.
    """

    def __init__(self, *, rng: random.Random, software: str, options: PeerOptions = POOL_OPTIONS) -> None:
        self.on_connected: Callable[[str], None] = _ignore
        self.on_answers: Callable[[], None] = _nothing
        self._rng = rng
        self._software = software
        self._options = options
        self._peers: dict[str, PeerClient] = {}  # of the addresses that are wanted
        self._connecting: dict[str, asyncio.Task[None]] = {}  # by address
        self._closing: set[asyncio.Task[None]] = set()  # peers that are let go
        self._is_closed = False

    def get(self, address: str) -> PeerClient | None:
        """The client of a wanted address; None for one that isn't wanted, or is none."""
        return self._peers.get(address)

    def addresses(self) -> list[str]:
        """All that are wanted."""
        return list(self._peers)

    def add(self, address: str) -> None:
        """Want an address, and begin to connect to it."""
        if self._is_closed or address in self._peers:
            return
        try:
            peer = PeerClient(address, rng=self._rng, software=self._software, options=self._options)
        except ValueError as error:
            _log.warning("a node gave an address that is none: %s", error)
            return
        peer.on_disconnect = lambda: self.connect(address)
        peer.on_answers = self.on_answers
        self._peers[address] = peer
        self.connect(address)

    def keep(self, addresses: Iterable[str]) -> None:
        """Want these addresses, and no others."""
        wanted = set(addresses)
        for address in [address for address in self._peers if address not in wanted]:
            task = self._connecting.pop(address, None)
            if task is not None:
                task.cancel()
            # It may still answer what it was sent.
            closing = asyncio.get_running_loop().create_task(self._peers.pop(address).close(drain_s=_DRAIN_S))
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)
        for address in sorted(wanted):
            self.add(address)

    def connect(self, address: str) -> None:
        """Begin to connect to a wanted address, unless that is done or under way."""
        peer = self._peers.get(address)
        if peer is None or peer.is_connected or address in self._connecting or self._is_closed:
            return
        self._connecting[address] = asyncio.get_running_loop().create_task(self._connect(address, peer))

    async def _connect(self, address: str, peer: PeerClient) -> None:
        """Try until it stands; the client waits between attempts."""
        while self._peers.get(address) is peer:
            try:
                await peer.connect()
            except TallymarkError as error:
                _log.debug("can't connect to %s: %s", address, error.message)
            else:
                break
        if self._peers.get(address) is peer:
            self._connecting.pop(address, None)
            if peer.is_connected:
                self.on_connected(address)
            else:
                self.connect(address)  # it was lost again before we heard of it

    async def close(self) -> None:
        """Close all connections; what is under way fails."""
        self._is_closed = True
        tasks = [*self._connecting.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, *self._closing, return_exceptions=True)
        peers, self._peers = self._peers, {}
        await asyncio.gather(*(peer.close() for peer in peers.values()))


def _ignore(address: str) -> None:
    """Take the place of a callback that was not given."""


def _nothing() -> None:
    """Likewise."""
