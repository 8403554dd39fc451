"""Backups, at the store: what a partition's backup is made of is kept while somebody reads it, piece by piece.

A backup of a partition is the newest checkpoint, the archive's files, and the log, from where it begins here up to what
is committed and folded at the moment. That is one state of the partition, whatever happens while it is read: committed records never change, and
the checkpoint's files and the log are held (`Holds`). Archive files that are merged away meanwhile are gone; whoever
reads then asks for the partition once more, and gets the merged ones.

Records travel packed, and lie so in a backup: a head, and the payload as it was logged::

    0   u32  CRC-32C of [4, end of the payload)     36  i64  append time, ns
    4   u32  length of the payload                  44  i64  lowest event time, ns
    8   u32  offsets taken                          52  i64  highest event time, ns
    12  u8   kind, 7 bytes 0                        60       payload
    20  i64  epoch
    28  i64  base offset
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

import google_crc32c
import msgspec

from tallymark_protocol.errors import InvalidRequestError, RemoteProtocolError, UnavailableError
from tallymark_protocol.messages import (
    BackupFile,
    BackupPiece,
    BackupPlan,
    StoreBackup,
    StoreBackupRead,
)
from tallymark_runtime.clock import Clock
from tallymark_runtime.disk import Disk, FileMissingError
from tallymark_store import checkpoint, incoming
from tallymark_store.archive import manifest as archives
from tallymark_store.checkpointer import folder
from tallymark_store.partition import Partition
from tallymark_store.recycling import Holds
from tallymark_store.soundness import check_files, damage_in_use
from tallymark_store.store import Offload, Store
from tallymark_store.wal import DamagedError, RecordMeta

if TYPE_CHECKING:
    from tallymark_store.archive.archiver import Archiver

PIECE_BYTES_MAX: Final = 4 * 1024 * 1024
HOLD_NS: Final = 120_000_000_000  # so long after the last question something is kept
HELD_MAX: Final = 16

_HEAD: Final = struct.Struct("<IIIB7xqqqqq")


class _Held:
    """What is kept for one backup of a partition."""

    def __init__(self, number: int, start: int, now_ns: int) -> None:
        self.number = number
        self.start = start
        self.end = 0
        self.files: dict[str, tuple[Disk, int]] = {}  # folder and bytes
        self.asked_ns = now_ns
        self.is_preparing = True


class Backups:
    """Answers the calls that backups are made by.

    Args:
        store: the driver.
        disk: the store's folder.
        manifests: of the checkpoints in force.
        archiver: who archives, if anybody does.
        clock: for waiting times.
        holds: where log and checkpoints are kept from being dropped.
        new_token: a random name.
        offload: runs what waits for the disk.
    """

    def __init__(
        self,
        store: Store,
        disk: Disk,
        manifests: dict[int, checkpoint.Manifest],
        archiver: Callable[[], Archiver | None],
        clock: Clock,
        holds: Holds,
        *,
        new_token: Callable[[], str],
        offload: Offload,
    ) -> None:
        self._store = store
        self._disk = disk
        self._manifests = manifests
        self._archiver = archiver
        self._clock = clock
        self._holds = holds
        self._new_token = new_token
        self._offload = offload
        self._held: dict[str, _Held] = {}  # by token

    async def begin(self, call: StoreBackup) -> BackupPlan:
        """Keep a partition's files and log as they are now.

        Raises:
            UnavailableError: this store does not lead the partition, or keeps too much already.
            DamagedError: files of its checkpoint are damaged.
            DiskError: a file can't be read.
        """
        number = call.partition
        partition = self._store.serving(number)
        self.expire()
        if len(self._held) >= HELD_MAX:
            raise UnavailableError("this store keeps as much for other backups as it may; try again later")
        manifest = self._manifests.get(number)
        archiver = self._archiver()
        archive = None if archiver is None else archiver.archives.get(number)
        if archive is not None and archive.manifest.copy_id != self._store.replicas[number].copy_id:
            archive = None  # of the copy that was here before: it is about to be discarded
        # All of the log that is here: what was dropped from it is in checkpoint and archive.
        start = partition.index.log_start
        held = _Held(number, start, self._clock.monotonic_ns())
        token = self._new_token()
        self._held[token] = held
        names = [] if manifest is None else checkpoint.files_of(manifest)
        self._holds.take(held, number, start, frozenset(names))
        try:
            files = []
            disk = self._disk.at("checkpoints").at(folder(number))
            if manifest is not None:
                await self._look_at(partition, disk, manifest)
            for name in names:
                size: int = await self._offload(incoming.file_size, disk, name)
                crc: int = await self._offload(incoming.checksum, disk, name, size)
                files.append(BackupFile("checkpoint", name, size, crc))
                held.files[name] = disk, size
            listed = None if archive is None else archives.all_here(archive.manifest)
            problem = "" if listed is not None else await self._archive_problem(number, start)
            if archive is not None and listed is not None:
                for file in listed.files:
                    files.append(BackupFile("archive", file.name, file.bytes, file.crc32c))
                    held.files[file.name] = archive.disk, file.bytes
            digest = ""
            if call.digest:
                digest, held.end = await self._store.folding.digest(partition)
            else:
                await self._store.wait_applied(partition)
                held.end = partition.applied
            if self._store.serving(number) is not partition:
                raise UnavailableError(f"this copy of partition {number} was discarded")
        except BaseException:
            self._release(token)
            raise
        held.is_preparing = False
        held.asked_ns = self._clock.monotonic_ns()
        return BackupPlan(
            token=token,
            log_start=start,
            log_end=held.end,
            checkpoint=b"" if manifest is None else msgspec.msgpack.encode(manifest),
            archive=b"" if listed is None else msgspec.json.encode(archives.versioned(listed)),
            files=files,
            digest=digest,
            archive_problem=problem,
        )

    async def _look_at(self, partition: Partition, disk: Disk, manifest: checkpoint.Manifest) -> None:
        """See that a checkpoint can be restored: a backup of what is damaged is none."""
        try:
            await self._offload(check_files, disk, manifest)
        except checkpoint.CheckpointError as error:
            number = partition.partition
            if self._manifests.get(number) is not manifest:
                raise UnavailableError(f"partition {number}: its checkpoint was discarded") from None
            damage = damage_in_use(partition, error)
            if damage is not None:
                self._store.refuse(partition, damage)
                raise damage from None
            # The next checkpoint, and so the next backup, is without it.
            raise DamagedError(f"partition {number}: {error}", partition=number) from None

    async def _archive_problem(self, number: int, start: int) -> str:
        """Why a partition without an archive in force should have one; "" where it needn't."""
        archiver = self._archiver()
        if archiver is not None:
            return archiver.problem(number) or ("it is not open yet" if start > 0 else "")
        names = await self._offload(self._disk.at("archive").at(folder(number)).list)
        if start == 0 or not {archives.NAME, archives.LACKS} & set(names):
            return ""  # none was ever needed, or the log has everything
        if archives.NAME in names:
            return "archiving is off, and nobody looks after the archive that there is"
        return "it was restored without its archive"

    async def read(self, call: StoreBackupRead) -> BackupPiece:
        """A piece of what is kept.

        Raises:
            InvalidRequestError: it is no part of that.
            UnavailableError: it is not kept any more: begin again.
            DamagedError: of the log.
        """
        held = self._held.get(call.token)
        if held is None or held.is_preparing:
            raise UnavailableError("what was kept for this backup is not kept any more", retriable=False)
        held.asked_ns = self._clock.monotonic_ns()
        length = min(call.length, PIECE_BYTES_MAX)
        if length <= 0 or call.position < 0 or call.skip < 0:
            raise InvalidRequestError("a piece of a backup has a length, and a place")
        if call.name:
            disk, size = held.files.get(call.name, (None, 0))
            if disk is None or call.position > size:
                raise InvalidRequestError(f"{call.name!r:.80} is no file of this backup, or not so long")
            try:
                return BackupPiece(
                    await self._offload(incoming.read_piece, disk, call.name, call.position, length)
                )
            except FileMissingError:
                archiver = self._archiver()
                archive = None if archiver is None else archiver.archives.get(held.number)
                if archive is not None and any(file.name == call.name for file in archive.manifest.files):
                    raise DamagedError(
                        f"partition {held.number}: the archive's file {call.name} is missing",
                        partition=held.number,
                    ) from None
                self._release(call.token)
                raise UnavailableError(
                    f"{call.name} was merged into another file meanwhile: begin again", retriable=False
                ) from None
        partition = self._store.partitions.get(held.number)
        index = self._store.wal.partitions.get(held.number)
        if partition is None or index is None or not held.start <= call.position <= held.end:
            raise InvalidRequestError("the log of this backup does not reach there")
        if not index.log_start <= call.position or not index.is_boundary(call.position):
            raise InvalidRequestError("no record begins there")
        piece: BackupPiece = await self._offload(self._log_piece, held, call.position, call.skip, length)
        self._store.folding.check_kept(partition)
        return piece

    def _log_piece(self, held: _Held, offset: int, skip: int, length: int) -> BackupPiece:
        index = self._store.wal.partitions[held.number]
        epoch, append_ns = index.epoch_before(offset), index.append_ns_before(offset)
        parts: list[bytes] = []
        left = length
        while offset < held.end and left > 0:
            found = self._store.wal.read(held.number, offset)
            assert found is not None, "it is held, and committed"
            packed = pack_record(found[0], found[1].tobytes())
            part = packed[skip : skip + left]
            parts.append(part)
            left -= len(part)
            skip += len(part)
            if skip < len(packed):
                break
            offset, skip = found[0].base_offset + found[0].count, 0
        return BackupPiece(b"".join(parts), offset, skip, epoch, append_ns)

    def expire(self) -> None:
        """Let go of what nobody has asked for in a while."""
        now_ns = self._clock.monotonic_ns()
        for token, held in list(self._held.items()):
            if not held.is_preparing and now_ns - held.asked_ns > HOLD_NS:
                self._release(token)

    def _release(self, token: str) -> None:
        held = self._held.pop(token, None)
        if held is not None:
            self._holds.release(held)


def pack_record(meta: RecordMeta, payload: bytes) -> bytes:
    """A record as it travels and lies in a backup."""
    packed = bytearray(
        _HEAD.pack(
            0,
            len(payload),
            meta.count,
            meta.kind,
            meta.epoch,
            meta.base_offset,
            meta.append_ns,
            meta.min_time_ns,
            meta.max_time_ns,
        )
    )
    packed += payload
    packed[:4] = int(google_crc32c.value(bytes(packed[4:]))).to_bytes(4, "little")
    return bytes(packed)


def unpack_records(partition: int, data: memoryview) -> Iterator[tuple[RecordMeta, bytes]]:
    """The records that were packed one after the other.

    Raises:
        RemoteProtocolError: they are damaged.
    """
    at = 0
    while at < len(data):
        if len(data) - at < _HEAD.size:
            raise RemoteProtocolError("a packed record is cut short")
        crc, length, count, kind, epoch, base, append_ns, low, high = _HEAD.unpack_from(data, at)
        end = at + _HEAD.size + length
        if end > len(data) or google_crc32c.value(bytes(data[at + 4 : end])) != crc:
            raise RemoteProtocolError(f"a packed record at byte {at} is damaged")
        meta = RecordMeta(partition, kind, epoch, base, count, append_ns, low, high)
        yield meta, bytes(data[at + _HEAD.size : end])
        at = end
