"""Snapshots on their way: a checkpoint of a copy that leads gets to one that its log no longer reaches.

The leader's core says whom to offer one (`offer`), and the other's core whether it is of use (`install`); here is how
the bytes get across, by one-way messages as everything else. Who was offered a snapshot asks for its files piece by
piece, a few at a time, at a bounded rate, and again for what doesn't come (`sending` has the other end).

Where both sides have an archive, its files of what lies below come along, but for those that are here already.

Installing, in this order (`incoming` and `archive.incoming` draw what is on the disk in between):

1. all files are there, synced, their checksums right, and they decode as a checkpoint of this partition at the offset;
   the state is loaded, beside the one in force. That they are whole is noted durably, of the archive and then of the
   checkpoint.
2. in one step, between two messages: the log is emptied to begin at the offset, the loaded state takes the place of
   the one before, and the replica is told. It follows, acknowledges and votes from here on; nothing of that counts
   before the emptied log is on disk, as nothing of any log does.
3. once it is, the archive is put in force, and then the checkpoint is published. A process that ends before finds a log that begins where no checkpoint
   reaches, and publishes at its start. One that ends before the emptied log is on disk finds the copy as it was.

Nobody takes, publishes or removes a checkpoint meanwhile: the lock that checkpoints are taken under is held.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import google_crc32c

from tallymark_protocol.errors import BackpressureError, TallymarkError
from tallymark_runtime.clock import Clock
from tallymark_runtime.disk import Disk, DiskError, File
from tallymark_store import checkpoint, incoming
from tallymark_store.archive import incoming as incoming_archive
from tallymark_store.archive import manifest as archives
from tallymark_store.checkpointer import finish_incoming, folder
from tallymark_store.copies import Copies
from tallymark_store.partition import Partition
from tallymark_store.recovery import restore
from tallymark_store.recycling import Holds
from tallymark_store.replication.messages import Ask, Offer, Piece
from tallymark_store.replication.ports import Member, Membership, ReplicaConfig
from tallymark_store.sending import HOLD_NS, PIECE_BYTES, Sending
from tallymark_store.soundness import check_files
from tallymark_store.store import Offload, Store

if TYPE_CHECKING:
    from tallymark_store.archive.archiver import Archiver

_log = logging.getLogger(__name__)

WINDOW = 4  # pieces that are asked for and have not come
_ROOM_S = 1.0  # between two looks whether the log has room
_ROOM_TRIES = 30
_SILENCE_LEASES = 5  # lease times without a piece, after which a snapshot is given up
BACK_OFF_NS = 1_000_000_000  # after the first snapshot that could not be installed; doubled each time
BACK_OFF_NS_MAX = 60_000_000_000
_BURST_NS = 250_000_000  # no longer than this an unused rate is saved up
_SYNC_PIECES = 8  # of a file between two syncs, so that the log's own come in between
_ARCHIVE_MANIFEST = incoming_archive.staged_name("offered")


class _GivenUpError(Exception):
    """A snapshot is not waited for any longer: the next one that is offered may be taken at once."""


class _Place(NamedTuple):
    """Of a piece."""

    file: int
    position: int


class _Transfer:
    """A snapshot that is coming in."""

    def __init__(
        self, number: int, leader: str, offer: Offer, manifest: checkpoint.Manifest, now_ns: int
    ) -> None:
        self.number = number
        self.leader = leader
        self.offer = offer
        self.manifest = manifest
        self.sizes: dict[int, int] = {}  # of the files that are being fetched, by their places
        self.places: Iterator[_Place] = iter(())  # not asked for yet
        self.left = 0  # pieces that are not written yet
        self.asked: dict[_Place, int] = {}  # when; those that have not come
        self.arrived: deque[Piece] = deque()  # asked for, and not written yet
        self.heard_ns = now_ns  # when a piece came last
        self.news = asyncio.Event()
        self.is_dropped = False
        self.is_here = False  # all of it: what is left is this store's own work
        self.allowance_bytes = 0
        self.allowance_ns = now_ns
        self.expect({place: size for place, (_, size, _) in enumerate(offer.files)})

    def expect(self, sizes: Mapping[int, int]) -> None:
        """These files are to be fetched next: sizes by their places."""
        self.sizes = dict(sizes)
        self.places = _places(self.sizes)
        self.left = sum(_pieces(size) for size in sizes.values())

    def piece_bytes(self, place: _Place) -> int:
        return min(PIECE_BYTES, self.sizes[place.file] - place.position)


def _pieces(size: int) -> int:
    return -(-size // PIECE_BYTES)


def _places(sizes: Mapping[int, int]) -> Iterator[_Place]:
    for number, size in sizes.items():
        for position in range(0, size, PIECE_BYTES):
            yield _Place(number, position)


class Snapshots:
    """Both ends of it, for all partitions of a store.

    Args:
        store: the driver.
        disk: the folder that holds a folder for each partition's checkpoints.
        manifests: of the checkpoints in force; shared with who takes them.
        copies: whose state is replaced.
        clock: for waiting times.
        holds: where what is being sent is kept from being dropped.
        config: of the replicas: times, and the rate at which copies are brought up.
        salt: of this process's tables.
        dedup_window_ns: of the partitions.
        id_bytes: how much memory remembered ids of one partition may take when it begins; None: what they need.
        offload: runs what waits for the disk, or takes long.

    Attributes:
        sending: the end that has what others lack.
        installed: snapshots that have come in, and are in force.
        received_bytes: of pieces.
    """

    def __init__(
        self,
        store: Store,
        disk: Disk,
        manifests: dict[int, checkpoint.Manifest],
        copies: Copies,
        clock: Clock,
        holds: Holds,
        *,
        config: ReplicaConfig,
        salt: int,
        dedup_window_ns: int,
        offload: Offload,
        id_bytes: int | None = None,
    ) -> None:
        self.installed = self.received_bytes = 0
        self._store = store
        self._disk = disk
        self._manifests = manifests
        self._copies = copies
        self._clock = clock
        self._config = config
        self._salt = salt
        self._dedup_window_ns = dedup_window_ns
        self._offload = offload
        self._id_bytes = id_bytes
        self._checkpoint_lock: asyncio.Lock | None = None  # None: not started yet
        self._transfers: dict[int, _Transfer] = {}
        self._coming: defaultdict[int, asyncio.Lock] = defaultdict(asyncio.Lock)  # files of a partition
        # By partition: how often in a row one was not installed, and until when none is taken.
        self._failed: dict[int, tuple[int, int]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_closed = False
        self.sending = Sending(store, disk, manifests, clock, holds, spawn=self._spawn, offload=offload)
        self._archiver: Archiver | None = None
        store.replicating.snapshots = self

    def start(self, checkpoint_lock: asyncio.Lock, archiver: Archiver | None = None) -> None:
        """Take part; the lock is the one that checkpoints are taken under."""
        self._checkpoint_lock = checkpoint_lock
        self._archiver = self.sending.archiver = archiver

    def halt(self) -> None:
        """Stop at once, as in a crash."""
        self._is_closed = True
        for task in self._tasks:
            task.cancel()

    async def close(self) -> None:
        """Give up what is on its way."""
        self.halt()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _folder(self, number: int) -> Disk:
        return self._disk.at(folder(number))

    def take(self, sender: str, message: Ask | Piece) -> None:
        """Take a message that is about the bytes of a snapshot. Never waits."""
        if self._is_closed:
            return
        if isinstance(message, Ask):
            self.sending.on_ask(sender, message)
        else:
            self._on_piece(message)

    # ------------------------------------------------------------ sending

    def offer(self, number: int, to: str, epoch: int) -> None:
        """Offer a node the newest checkpoint of a partition, or the one that it is getting. Never waits.

        Nothing before `start`: it would go without the archive.
        """
        if not self._is_closed and self._checkpoint_lock is not None:
            self.sending.offer(number, to, epoch)

    # ------------------------------------------------------------ getting

    def install(self, number: int, leader: str, offer: Offer) -> None:
        """Get a snapshot, unless it is on its way, and put it in the place of log and state. Never waits.

        Raises:
            RemoteProtocolError: the offer makes no sense.
        """
        manifest = incoming.manifest_of(offer)
        if self._is_closed or self._checkpoint_lock is None:
            return
        now_ns = self._clock.monotonic_ns()
        if number in self._failed and now_ns < self._failed[number][1]:
            return
        before = self._transfers.get(number)
        if before is not None:
            is_silent = now_ns - before.heard_ns > self._config.lease_ns
            if (
                before.is_here
                or before.offer.snapshot == offer.snapshot
                or (offer.epoch <= before.offer.epoch and not is_silent)
            ):
                return
            self._drop(before)
        transfer = self._transfers[number] = _Transfer(number, leader, offer, manifest, now_ns)
        self._spawn(self._run(transfer))

    def forget(self, number: int) -> None:
        """The copy has been discarded: what is coming in is not for the next one, and its files are gone."""
        transfer = self._transfers.get(number)
        if transfer is not None:
            self._drop(transfer)
        self.sending.forget(number)
        if self._archiver is not None:
            self._archiver.forget(number)

    def _drop(self, transfer: _Transfer) -> None:
        transfer.is_dropped = True
        transfer.news.set()
        if self._transfers.get(transfer.number) is transfer:
            del self._transfers[transfer.number]

    def _on_piece(self, message: Piece) -> None:
        transfer = self._transfers.get(message.partition)
        if transfer is None or message.snapshot != transfer.offer.snapshot:
            return
        place = _Place(message.file, message.position)
        if place not in transfer.asked or len(message.data) != transfer.piece_bytes(place):
            return
        if google_crc32c.value(message.data) != message.checksum:
            return
        del transfer.asked[place]
        transfer.arrived.append(message)
        transfer.heard_ns = self._clock.monotonic_ns()
        transfer.news.set()
        self.received_bytes += len(message.data)

    async def _run(self, transfer: _Transfer) -> None:
        number = transfer.number
        # One at a time: what is dropped has to let go of the files first.
        async with self._coming[number]:
            if transfer.is_dropped:
                return
            offer = transfer.offer
            _log.info(
                "partition %d: getting the snapshot of offset %d from %s",
                number,
                offer.offset,
                transfer.leader,
            )
            disk = self._folder(number)
            try:
                await self._clear(transfer, disk)
                await self._get(transfer, disk)
                async with self._taking_in(transfer):
                    await self._get_archive(transfer)
                    transfer.is_here = True
                    await self._install(transfer, disk)
            except _GivenUpError as error:
                _log.warning("partition %d: no snapshot was installed: %s", number, error)
            except (DiskError, TallymarkError, checkpoint.CheckpointError, archives.ArchiveError) as error:
                _log.warning("partition %d: no snapshot was installed: %s", number, error)
                self._back_off(transfer)
            except Exception:
                # Of bytes that nobody thought of. It would be fetched again and again, in silence.
                _log.exception("partition %d: no snapshot was installed", number)
                self._back_off(transfer)
            finally:
                self._drop(transfer)

    def _back_off(self, transfer: _Transfer) -> None:
        """Take no snapshot of a partition for a while, the longer the more often that has failed."""
        if transfer.is_dropped:
            return
        failures, _ = self._failed.get(transfer.number, (0, 0))
        pause_ns = min(BACK_OFF_NS << min(failures, 10), BACK_OFF_NS_MAX)
        self._failed[transfer.number] = (failures + 1, self._clock.monotonic_ns() + pause_ns)

    async def _clear(self, transfer: _Transfer, disk: Disk) -> None:
        """Make room for the files; but what a copy has begun with, and was not published, is no rubbish."""
        assert self._checkpoint_lock is not None
        number = transfer.number
        async with self._checkpoint_lock:
            self._check(transfer)
            partition = self._store.partitions[number]
            await finish_incoming(
                self._store, self._manifests, disk, partition, self._offload, archiver=self._archiver
            )
            await self._offload(incoming.clear, disk)

    async def _get(self, transfer: _Transfer, disk: Disk) -> None:
        """Have all files of the checkpoint here, synced."""
        await self._fetch(
            transfer,
            disk,
            {
                place: (f"{incoming.PREFIX}{place}", size)
                for place, (_, size, _) in enumerate(transfer.offer.files)
            },
        )

    async def _fetch(self, transfer: _Transfer, disk: Disk, wanted: Mapping[int, tuple[str, int]]) -> None:
        """Have files here, synced.

        Args:
            transfer: on which they come.
            disk: the folder that they go into.
            wanted: by place in the offer, the name that a file gets, and its size.
        """
        transfer.expect({place: size for place, (_, size) in wanted.items()})
        left = {place: _pieces(size) for place, (_, size) in wanted.items()}  # of each file
        files: dict[int, File] = {}  # of which some pieces are here; no more than are asked for
        pause_s = self._config.resend_ns / 4e9
        transfer.heard_ns = self._clock.monotonic_ns()  # nothing was asked for before
        try:
            while transfer.left:
                self._ask(transfer)
                if not transfer.arrived:
                    transfer.news.clear()
                    try:
                        async with asyncio.timeout(pause_s):
                            await transfer.news.wait()
                    except TimeoutError:
                        self._give_up_silent(transfer)
                self._check(transfer)
                while transfer.arrived:
                    piece = transfer.arrived.popleft()
                    if piece.file not in files:
                        files[piece.file] = await self._offload(disk.create, wanted[piece.file][0])
                    file = files[piece.file]
                    await self._offload(file.write, piece.position, [piece.data])
                    transfer.left -= 1
                    left[piece.file] -= 1
                    if left[piece.file] % _SYNC_PIECES == 0:
                        await self._offload(file.sync)
                    if not left[piece.file]:
                        files.pop(piece.file).close()
        finally:
            for file in files.values():
                file.close()
        await self._offload(disk.sync_dir)

    @contextlib.asynccontextmanager
    async def _taking_in(self, transfer: _Transfer) -> AsyncIterator[None]:
        """From here on, where there is an archive: this copy archives nothing, the other side keeps what it offered."""
        if self._archiver is None:
            yield
            return
        keeping = asyncio.get_running_loop().create_task(self._keep(transfer))
        try:
            async with self._archiver.taking_in(transfer.number):
                yield
        finally:
            keeping.cancel()

    async def _get_archive(self, transfer: _Transfer) -> None:
        """Have the archive's files here that belong to the snapshot, and none else; noted as whole.

        Raises:
            ArchiveError: it isn't what was offered.
        """
        archiver, offer, number = self._archiver, transfer.offer, transfer.number
        if archiver is None:
            return
        if offer.archive is None:
            await archiver.take_none(number, offer.offset)
            return
        disk = archiver.folder(number)
        size, crc = offer.archive
        first = len(offer.files)
        await self._fetch(transfer, disk, {first: (_ARCHIVE_MANIFEST, size)})
        manifest = await self._offload(_offered_archive, disk, size, crc, number, offer.offset)
        missing = await archiver.missing(number, manifest, offer.offset)
        self._check(transfer)
        files = {place: manifest.files[place] for place in missing}
        await self._fetch(
            transfer,
            disk,
            {
                first + 1 + place: (incoming_archive.staged_name(file.name), file.bytes)
                for place, file in files.items()
            },
        )
        self._check(transfer)
        await archiver.take_in(number, manifest, offer.offset)
        self._check(transfer)

    @staticmethod
    def _check(transfer: _Transfer) -> None:
        if transfer.is_dropped:
            raise _GivenUpError("it is not wanted any more")

    def _give_up_silent(self, transfer: _Transfer) -> None:
        if self._clock.monotonic_ns() - transfer.heard_ns > _SILENCE_LEASES * self._config.lease_ns:
            raise _GivenUpError(f"{transfer.leader} has sent no piece of it for long")

    def _ask(self, transfer: _Transfer) -> None:
        """Ask for what is missing, as far as window and rate go, and again for what should have come."""
        now_ns = self._clock.monotonic_ns()
        rate = self._config.catch_up_bytes_per_s
        elapsed_ns = min(now_ns - transfer.allowance_ns, _BURST_NS)
        transfer.allowance_ns = now_ns
        burst = max(rate * _BURST_NS // 1_000_000_000, PIECE_BYTES)
        transfer.allowance_bytes = min(transfer.allowance_bytes + rate * elapsed_ns // 1_000_000_000, burst)
        for place, asked_ns in list(transfer.asked.items()):
            if now_ns - asked_ns >= self._config.resend_ns:
                self._send_ask(transfer, place, now_ns)
        while len(transfer.asked) + len(transfer.arrived) < WINDOW:
            # Debt is paid first, so that a piece may be larger than what is left.
            if transfer.allowance_bytes < 0:
                return
            following = next(transfer.places, None)
            if following is None:
                return
            transfer.allowance_bytes -= transfer.piece_bytes(following)
            self._send_ask(transfer, following, now_ns)

    def _send_ask(self, transfer: _Transfer, place: _Place, now_ns: int) -> None:
        transfer.asked[place] = now_ns
        ask = Ask(transfer.number, transfer.offer.snapshot, place.file, place.position)
        self._store.replicating.send(transfer.number, transfer.leader, ask)

    # ------------------------------------------------------------ installing

    async def _install(self, transfer: _Transfer, disk: Disk) -> None:
        waiting = asyncio.get_running_loop().create_task(self._keep(transfer))
        try:
            partition: Partition = await self._offload(self._load, transfer, disk)
            self._check(transfer)
            await self._offload(incoming.complete, disk, transfer.manifest, transfer.offer)
            for _ in range(_ROOM_TRIES):
                if await self._try_install(transfer, disk, partition):
                    return
                await asyncio.sleep(_ROOM_S)
        finally:
            waiting.cancel()

    async def _try_install(self, transfer: _Transfer, disk: Disk, partition: Partition) -> bool:
        """Install what is here, or find it of no use any more; False where there is no room in the log now."""
        assert self._checkpoint_lock is not None
        async with self._checkpoint_lock, self._copies.changing(transfer.number):
            is_complete = await self._offload(incoming.is_complete, disk, transfer.manifest)
            # No await from here to the exchange, so that what was found is still so.
            self._check(transfer)
            if not self._is_wanted(transfer):
                await self._offload(incoming.clear, disk)
                return True
            if not is_complete:
                raise checkpoint.CheckpointError("files of the snapshot that had come in are gone")
            try:
                self._replace(transfer, partition)
            except BackpressureError as error:
                _log.warning(
                    "partition %d: no room to begin with a snapshot: %s", transfer.number, error.message
                )
                return False
            await self._publish(transfer, disk, partition)
            return True

    async def _keep(self, transfer: _Transfer) -> None:
        """Have the snapshot, and the log from it on, kept where it comes from until it is in force here."""
        while True:
            ask = Ask(transfer.number, transfer.offer.snapshot, -1, 0)
            self._store.replicating.send(transfer.number, transfer.leader, ask)
            await asyncio.sleep(HOLD_NS / 4e9)

    def _load(self, transfer: _Transfer, disk: Disk) -> Partition:
        """The state of the snapshot, beside the one in force.

        Raises:
            CheckpointError, RemoteProtocolError: it is none of this partition at the offset that it was offered as.
        """
        for place, (_, size, crc) in enumerate(transfer.offer.files):
            if incoming.checksum(disk, f"{incoming.PREFIX}{place}", size) != crc:
                raise checkpoint.CheckpointError(f"file {place} of the snapshot is not what was offered")
        # What they were offered as may be what had become of them.
        check_files(disk, incoming.staged(transfer.manifest))
        partition = Partition(
            transfer.number,
            dedup_window_ns=self._dedup_window_ns,
            indexes=self._store.wal.partitions,
            salt=self._salt,
        )
        restore(partition, disk, incoming.staged(transfer.manifest), self._salt, self._id_bytes)
        # They are here under the names that they have while they come in.
        for file, name in zip(partition.fold.spilled.files, transfer.manifest.cell_files, strict=True):
            file.name = name
        for part, name in zip(partition.fold.alert_files.files, transfer.manifest.alert_files, strict=True):
            part.name = name
        partition.high_watermark = transfer.offer.offset
        return partition

    def _is_wanted(self, transfer: _Transfer) -> bool:
        """Whether the copy still is one that the snapshot is of use to."""
        store, number, offer = self._store, transfer.number, transfer.offer
        replica = store.replicas.get(number)
        return (
            not self._is_closed
            and replica is not None
            and store.partitions[number].error is None
            and replica.lacks(offer.offset, offer.last_epoch)
        )

    def _replace(self, transfer: _Transfer, partition: Partition) -> None:
        """Put log and state in their places, all at once.

        Raises:
            BackpressureError: there is no room; nothing has changed.
        """
        number, offer, store = transfer.number, transfer.offer, self._store
        replica = store.replicas[number]
        members = tuple(Member(*pair) for pair in offer.members)
        store.replicating.logs[number].reset(offer.offset, epoch=offer.last_epoch, append_ns=offer.append_ns)
        self._copies.replace_state(number, partition)
        if self._archiver is not None:
            self._archiver.replaced(number)
        store.replicating.call(
            number, replica.installed, offer.offset, Membership(members, offer.members_offset)
        )
        _log.info("partition %d: began with the snapshot of offset %d", number, offer.offset)

    async def _publish(self, transfer: _Transfer, disk: Disk, partition: Partition) -> None:
        """Make the snapshot the newest checkpoint, once the log that begins with it is on disk."""
        number, store = transfer.number, self._store
        await store.wait_durable(partition, transfer.offer.offset)
        try:
            if self._archiver is not None:
                await self._archiver.install(number, transfer.offer.offset)
            await self._offload(incoming.publish, disk, transfer.manifest)
        except (DiskError, checkpoint.CheckpointError) as error:
            # Whatever is done here next tries again; and a start before that finds what it needs.
            _log.warning("partition %d: the snapshot is in force, but was not published: %s", number, error)
            is_published = False
        else:
            is_published = True
        if store.partitions.get(number) is not partition:
            checkpoint.discard(disk, keeps_cells=True)  # the copy began anew meanwhile
            return
        if is_published:
            self._manifests[number] = transfer.manifest
        self._failed.pop(number, None)
        self.installed += 1


def _offered_archive(disk: Disk, size: int, crc: int, number: int, offset: int) -> archives.Manifest:
    """The manifest that has come in."""
    file = disk.open(_ARCHIVE_MANIFEST)
    try:
        data = file.read(0, size).tobytes()
    finally:
        file.close()
    if google_crc32c.value(data) != crc:
        raise archives.ArchiveError("the archive's manifest is not what was offered")
    return incoming_archive.offered(data, number, offset)
