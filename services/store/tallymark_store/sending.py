"""Sending snapshots: checkpoints that are kept while somebody asks for their files, piece by piece.

An archive's files go along, if there is one: those of what lies below the checkpoint's offset, as they are at that
moment; so what the checkpoint doesn't hold is archived first.

Owns what is offered to whom, and for how long it is kept from being dropped (`Holds`): neither many snapshots at a
time, nor for ever. It is the other side that asks, and that says how fast.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

import google_crc32c

from tallymark_protocol.errors import UnavailableError
from tallymark_runtime.clock import Clock
from tallymark_runtime.disk import Disk, DiskError
from tallymark_store import checkpoint, incoming
from tallymark_store.archive import manifest as archives
from tallymark_store.checkpointer import folder
from tallymark_store.recycling import Holds
from tallymark_store.replication.messages import Ask, Offer, Piece
from tallymark_store.soundness import check_files, damage_in_use
from tallymark_store.store import Offload, Store

if TYPE_CHECKING:
    from tallymark_store.archive.archiver import Archiver

_log = logging.getLogger(__name__)

PIECE_BYTES = 512 * 1024
HOLD_NS = 30_000_000_000  # so long after the last question a snapshot is kept for whoever was offered it
HELD_MAX = 8  # snapshots that are kept at a time
_READS_MAX = 16  # pieces that are read at a time


class _Held:
    """A checkpoint that is kept while it is sent."""

    def __init__(self, number: int, name: str, manifest: checkpoint.Manifest, now_ns: int) -> None:
        self.number = number
        self.name = name
        self.manifest = manifest
        self.files: list[tuple[str, int, int]] = []  # name, bytes, CRC-32C; empty while that is reckoned
        self.archive: archives.Manifest | None = None  # of what lies below, where it comes along
        self.archive_bytes = b""  # its manifest's
        self.is_reckoning = True
        self.asked_ns = now_ns  # when somebody last asked for a piece, or it became ready

    @property
    def archive_summary(self) -> tuple[int, int] | None:
        """What an offer says of the archive's manifest."""
        if self.archive is None:
            return None
        return len(self.archive_bytes), google_crc32c.value(self.archive_bytes)

    def find(self, place: int) -> tuple[str, int] | None:
        """Name and size of the file at a place of the offer, if there is one."""
        if 0 <= place < len(self.files):
            name, size, _ = self.files[place]
            return name, size
        place -= len(self.files)
        if self.archive is None or not 0 <= place <= len(self.archive.files):
            return None
        if place == 0:
            return archives.NAME, len(self.archive_bytes)
        file = self.archive.files[place - 1]
        return file.name, file.bytes


class Sending:
    """The end of `snapshots.Snapshots` that has what others lack.

    Attributes:
        archiver: whose files go along, where there is an archive.
        sent: snapshots of which a last piece was sent.
        sent_bytes: of pieces.
    """

    def __init__(
        self,
        store: Store,
        disk: Disk,
        manifests: dict[int, checkpoint.Manifest],
        clock: Clock,
        holds: Holds,
        *,
        spawn: Callable[[Coroutine[Any, Any, None]], None],
        offload: Offload,
    ) -> None:
        self.sent = self.sent_bytes = 0
        self.archiver: Archiver | None = None  # where there is an archive
        self._store = store
        self._disk = disk
        self._manifests = manifests
        self._clock = clock
        self._holds = holds
        self._spawn = spawn  # runs something to its end
        self._offload = offload
        self._held: dict[str, _Held] = {}  # by name
        self._offered: dict[tuple[int, str], str] = {}  # what a node was offered of a partition
        self._reads = 0

    def _folder(self, number: int) -> Disk:
        return self._disk.at(folder(number))

    def _folder_of(self, held: _Held, place: int) -> Disk:
        if place < len(held.files):
            return self._folder(held.number)
        assert self.archiver is not None, "only who has an archive offers one"
        return self.archiver.folder(held.number)

    def offer(self, number: int, to: str, epoch: int) -> None:
        """Offer a node the newest checkpoint of a partition, or the one that it is getting. Never waits."""
        replica = self._store.replicas.get(number)
        if replica is None or replica.epoch != epoch:
            return
        self.expire()
        held = self._held.get(self._offered.get((number, to), ""))
        if held is None:
            held = self._hold(number, replica.copy_id)
        if held is None or not held.files:
            return  # it is offered again
        self._offered[number, to] = held.name
        manifest = held.manifest
        members_offset, members = manifest.memberships[-1] if manifest.memberships else (-1, [])
        offer = Offer(
            number,
            epoch,
            replica.instance,
            held.name,
            manifest.offset,
            manifest.epoch,
            manifest.last_append_ns,
            members,
            members_offset,
            held.files,
            held.archive_summary,
        )
        self._store.replicating.send(number, to, offer)

    def _hold(self, number: int, copy_id: str) -> _Held | None:
        manifest = self._manifests.get(number)
        if manifest is None:
            return None
        name = f"{copy_id}-{manifest.offset}"
        held = self._held.get(name)
        if held is None and len(self._held) < HELD_MAX:
            held = self._held[name] = _Held(number, name, manifest, self._clock.monotonic_ns())
            names = checkpoint.files_of(manifest)
            self._holds.take(held, number, manifest.offset, frozenset(names))
            self._spawn(self._reckon(held, names))
        return held

    async def _reckon(self, held: _Held, names: list[str]) -> None:
        """Find out what is said of the files in an offer."""
        disk = self._folder(held.number)
        files = []
        partition = self._store.partitions.get(held.number)
        try:
            await self._offload(check_files, disk, held.manifest)
            for name in names:
                size = await self._offload(incoming.file_size, disk, name)
                files.append((name, size, await self._offload(incoming.checksum, disk, name, size)))
            if self.archiver is not None:
                held.archive = await self.archiver.lend(held, held.number, held.manifest.offset)
                held.archive_bytes = b"" if held.archive is None else archives.encode(held.archive)
        except (DiskError, UnavailableError, checkpoint.CheckpointError) as error:
            _log.warning("partition %d: its checkpoint cannot be sent: %s", held.number, error)
            is_held = self._held.get(held.name) is held
            self._release(held)
            if isinstance(error, checkpoint.CheckpointError) and partition is not None and is_held:
                damage = damage_in_use(partition, error)
                if damage is not None:
                    self._store.refuse(partition, damage)
            return
        if self._held.get(held.name) is not held:
            self._release(held)  # the copy has been discarded meanwhile
            return
        held.is_reckoning = False
        held.files = files
        held.asked_ns = self._clock.monotonic_ns()

    def _release(self, held: _Held) -> None:
        if self._held.get(held.name) is held:
            del self._held[held.name]
        self._holds.release(held)
        if self.archiver is not None:
            self.archiver.give_back(held)
        self._offered = {key: name for key, name in self._offered.items() if name != held.name}

    def expire(self) -> None:
        """Let go of what nobody has asked for in a while."""
        now_ns = self._clock.monotonic_ns()
        for held in list(self._held.values()):
            if not held.is_reckoning and now_ns - held.asked_ns > HOLD_NS:
                self._release(held)

    def on_ask(self, sender: str, message: Ask) -> None:
        """Send a piece, if it is one of what is kept. Never waits."""
        held = self._held.get(message.snapshot)
        if held is None or held.number != message.partition or not held.files:
            return
        held.asked_ns = self._clock.monotonic_ns()
        found = held.find(message.file)
        if found is None or self._reads >= _READS_MAX:
            return
        name, size = found
        if message.position % PIECE_BYTES or message.position >= size:
            return
        self._reads += 1
        self._spawn(self._send_piece(sender, held, message, name, size))

    async def _send_piece(self, to: str, held: _Held, ask: Ask, name: str, size: int) -> None:
        try:
            length = min(PIECE_BYTES, size - ask.position)
            data: bytes
            if ask.file == len(held.files):
                data = held.archive_bytes[ask.position : ask.position + length]
            else:
                disk = self._folder_of(held, ask.file)
                data = await self._offload(incoming.read_piece, disk, name, ask.position, length)
        except DiskError as error:
            _log.warning("partition %d: its checkpoint cannot be sent: %s", held.number, error)
            self._release(held)
            return
        finally:
            self._reads -= 1
        if len(data) != length or held.number not in self._store.replicas:
            return
        piece = Piece(held.number, held.name, ask.file, ask.position, data, google_crc32c.value(data))
        self._store.replicating.send(held.number, to, piece)
        self.sent_bytes += length
        if ask.file == len(held.files) - 1 and ask.position + length == size:
            self.sent += 1

    def forget(self, number: int) -> None:
        """The copy of a partition here has been discarded, and its checkpoints with it."""
        for held in [held for held in self._held.values() if held.number == number]:
            self._release(held)
