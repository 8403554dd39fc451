"""Taking a backup while the cluster serves.

Each partition is read from its leader, which keeps what belongs to one state of it while that is read: a checkpoint, the
archive's files, and the log up to one offset (`tallymark_store.backups`). Partitions are taken one after the other, so
each is of a moment of its own. What is in the target already is not read again: files by their names, which say what is
in them; the log from where the newest backup's ends, if the leader's log is the same there.

The coordinator's keys are read twice. Metrics as of after the last partition: a log may name none that the backup
doesn't know. Everything else as of before the first: how far webhooks have got must not be ahead of the alerts.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any, Final

import google_crc32c
import msgspec

from tallymark_node.backup import layout
from tallymark_node.backup.layout import Backup, BackupObject, LogPart, PartitionBackup
from tallymark_node.backup.target import Target
from tallymark_protocol.errors import (
    ErrorCode,
    InvalidRequestError,
    RemoteProtocolError,
    ServerError,
    UnavailableError,
)
from tallymark_protocol.messages import (
    BackupFile,
    BackupPiece,
    BackupPlan,
    StoreBackup,
    StoreBackupRead,
)
from tallymark_runtime.catalog import (
    CLUSTER,
    EPOCH_BASE,
    METRICS,
    Leader,
    decode_value,
    leader_key,
    read_cluster,
)
from tallymark_runtime.coordinator import Coordinator, KeyValue
from tallymark_runtime.peer import PeerClient
from tallymark_store.backups import unpack_records

PIECE_BYTES: Final = 1024 * 1024
PART_BYTES: Final = 8 * 1024 * 1024  # of the log in one object; smaller ones are made anew by the next backup
ATTEMPTS: Final = 5  # at a partition, each of them from its beginning
RETRY_S: Final = 0.5
_LATE: Final = (METRICS, CLUSTER, EPOCH_BASE)  # keys that are taken as of after the partitions


class Incomplete(msgspec.Struct, frozen=True):
    """A partition whose archive was left out."""

    partition: int
    reason: str
    raw_events_from: int  # offset


class _ArchiveDamagedError(RemoteProtocolError):
    """A file of an archive can't be had as it was."""


class _LeaderlessError(UnavailableError):
    """A partition has no leader."""


class Summary(msgspec.Struct):
    """What was done."""

    number: int = 0  # of the backup
    bytes: int = 0  # of all that belongs to it
    written_bytes: int = 0  # of what wasn't there already
    objects: int = 0
    written_objects: int = 0
    ends: list[int] = []  # by partition
    incomplete: list[Incomplete] = []


class Taker:
    """Takes one backup.

    Args:
        target: where to.
        coordinator: of the cluster.
        rng: for the jitter of reconnecting.
        digests: have the stores say their states' digests.
        timeout_s: for each call.
        progress: told what is done now.
    """

    def __init__(
        self,
        target: Target,
        coordinator: Coordinator,
        rng: random.Random,
        *,
        digests: bool = False,
        timeout_s: float = 30.0,
        progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._target = target
        self._coordinator = coordinator
        self._rng = rng
        self._digests = digests
        self._timeout_s = timeout_s
        self._progress = progress
        self._peers: dict[str, PeerClient] = {}
        self._summary = Summary()
        self._written: set[str] = set()  # names of objects

    async def take(self, now_ns: int) -> Summary:
        """Take it.

        Raises:
            TallymarkError: a leader can't be reached, or something is damaged; no backup was made.
            OSError: the target refused; likewise.
        """
        try:
            return await self._take(now_ns)
        finally:
            for peer in self._peers.values():
                await peer.close()

    async def _take(self, now_ns: int) -> Summary:
        before = await self._coordinator.range(b"")
        cluster = await read_cluster(self._coordinator)
        known = await asyncio.to_thread(layout.numbers, self._target)
        newest = await self._newest(known, cluster.cluster_id)
        partitions = []
        for number in range(cluster.partition_count):
            earlier = newest.partitions[number].log if newest is not None else ()
            partitions.append(await self._partition(number, earlier))
        after = await self._coordinator.range(b"")
        items = [
            item
            for items, late in ((before.items, False), (after.items, True))
            for item in items
            if item.key.startswith(_LATE) == late and not item.lease
        ]
        backup = Backup(
            format_version=layout.FORMAT_VERSION,
            number=max(known, default=0) + 1,
            taken_ns=now_ns,
            cluster=cluster,
            revision=after.revision,
            items=await self._keys(items),
            partitions=tuple(partitions),
        )
        manifest = layout.encode_manifest(backup)
        await self._write(layout.manifest_name(backup.number), manifest)
        summary, objects = self._summary, backup.objects
        written = self._written & objects.keys()  # not what a try before has left, and is not needed
        summary.number, summary.bytes = backup.number, backup.bytes + len(manifest)
        summary.objects, summary.written_objects = len(objects) + 1, len(written) + 1
        summary.written_bytes = sum(objects[name] for name in written) + len(manifest)
        summary.incomplete = [
            Incomplete(part.partition, part.archive_problem, part.raw_start) for part in backup.incomplete
        ]
        summary.ends = [partition.end for partition in backup.partitions]
        return summary

    async def _newest(self, known: list[int], cluster_id: str) -> Backup | None:
        """The newest backup of this cluster that can be read: what it has of logs needn't be read again."""
        for number in reversed(known):
            try:
                backup = await asyncio.to_thread(layout.load_manifest, self._target, number)
            except (RemoteProtocolError, OSError):
                continue
            return backup if backup.cluster.cluster_id == cluster_id else None
        return None

    async def _keys(self, items: list[KeyValue]) -> BackupObject:
        data = msgspec.msgpack.encode(items)
        crc = int(google_crc32c.value(data))
        name = layout.object_name("coordinator", "keys", crc, len(data))
        if not await self._is_there(name, len(data)):
            await self._write(name, data)
        return BackupObject(name, "keys", len(data), crc)

    # ------------------------------------------------------------ one partition

    async def _partition(self, number: int, earlier: tuple[LogPart, ...]) -> PartitionBackup:
        for attempt in range(ATTEMPTS):
            try:
                return await self._try_partition(number, earlier)
            except UnavailableError as error:
                # The leader was lost, or a file was merged away: from the beginning, with what is there by now.
                if attempt == ATTEMPTS - 1:
                    if isinstance(error, _LeaderlessError):  # servers answer: it isn't that none does
                        raise ServerError(
                            f"{error.message}, so no backup was made: `tallymark cluster status` and the stores' output say why",
                            code=error.code,
                        ) from error
                    raise
                await asyncio.sleep(RETRY_S * (attempt + 1))
        raise AssertionError("the last attempt returns or raises")

    async def _try_partition(self, number: int, earlier: tuple[LogPart, ...]) -> PartitionBackup:
        self._progress(f"partition {number}")
        item = await self._coordinator.get(leader_key(number))
        if item is None:
            raise _LeaderlessError(f"nobody leads partition {number}", code=ErrorCode.NOT_LEADER)
        peer = self._peer(decode_value(Leader, item).address)
        plan = await peer.call(
            StoreBackup(number, digest=self._digests), BackupPlan, timeout_s=self._timeout_s
        )
        archive, problem = plan.archive, plan.archive_problem
        files: dict[str, list[BackupObject]] = {"checkpoint": [], "archive": []}
        for file in plan.files:
            if file.kind not in files:
                raise RemoteProtocolError(f"the store backs up a file of an unknown kind: {file.kind!r:.40}")
            if file.kind == "archive" and problem:
                continue
            try:
                files[file.kind].append(await self._file(peer, plan, number, file))
            except _ArchiveDamagedError as error:
                # An archive without a file would be taken for whole. State and log are worth having all the same.
                archive, problem, files["archive"] = b"", error.message, []
        return PartitionBackup(
            partition=number,
            end=plan.log_end,
            checkpoint=plan.checkpoint,
            archive=archive,
            checkpoint_files=tuple(files["checkpoint"]),
            archive_files=tuple(files["archive"]),
            log=tuple(await self._log(peer, plan, number, earlier)),
            digest=plan.digest,
            archive_problem=problem,
        )

    def _peer(self, address: str) -> PeerClient:
        if address not in self._peers:
            self._peers[address] = PeerClient(address, rng=self._rng, software="tallymark backup")
        return self._peers[address]

    async def _read(
        self, peer: PeerClient, plan: BackupPlan, name: str, position: int, skip: int = 0
    ) -> BackupPiece:
        call = StoreBackupRead(plan.token, name, position, PIECE_BYTES, skip)
        return await peer.call(call, BackupPiece, timeout_s=self._timeout_s)

    async def _file(self, peer: PeerClient, plan: BackupPlan, number: int, file: BackupFile) -> BackupObject:
        name = layout.object_name(f"{file.kind}-{number:04d}", file.name, file.crc32c, file.bytes)
        found = BackupObject(name, file.name, file.bytes, file.crc32c)
        if await self._is_there(name, file.bytes):
            return found
        writer = await asyncio.to_thread(self._target.create, name)
        try:
            position = crc = 0
            while position < file.bytes:
                try:
                    data = (await self._read(peer, plan, file.name, position)).data
                except UnavailableError as error:
                    if file.kind == "archive" and error.code == ErrorCode.PARTITION_DAMAGED:
                        raise _ArchiveDamagedError(error.message) from error
                    raise
                if not data:
                    if file.kind == "archive":
                        raise _ArchiveDamagedError(f"its file {file.name} ends at byte {position}")
                    raise UnavailableError(f"{file.name} ends at {position} bytes")
                crc = google_crc32c.extend(crc, data)
                await asyncio.to_thread(writer.write, data)
                position += len(data)
                self._progress(f"partition {number}: {file.name}, {position} of {file.bytes} bytes")
            if (position, crc) != (file.bytes, file.crc32c):
                if file.kind == "archive":
                    raise _ArchiveDamagedError(f"its file {file.name} is damaged: its checksum is wrong")
                raise RemoteProtocolError(
                    f"partition {number}: the store's file {file.name} is damaged: its checksum is not the one that it had"
                )
        except BaseException:
            await asyncio.to_thread(writer.abort)
            raise
        await asyncio.to_thread(writer.commit)
        self._written.add(name)
        return found

    async def _is_there(self, name: str, size: int) -> bool:
        return await asyncio.to_thread(self._target.size, name) == size

    async def _write(self, name: str, data: bytes) -> None:
        def write() -> None:
            writer = self._target.create(name)
            try:
                writer.write(data)
            except BaseException:
                writer.abort()
                raise
            writer.commit()

        await asyncio.to_thread(write)
        self._written.add(name)

    # ------------------------------------------------------------ the log

    async def _log(
        self, peer: PeerClient, plan: BackupPlan, number: int, earlier: tuple[LogPart, ...]
    ) -> list[LogPart]:
        kept = await self._kept(peer, plan, earlier)
        offset = kept[-1].end if kept else plan.log_start
        parts, skip = list(kept), 0
        data = bytearray()
        first: BackupPiece | None = None  # of the object that is being made
        start = offset
        while offset < plan.log_end:
            piece = await self._read(peer, plan, "", offset, skip)
            if not piece.data:
                raise UnavailableError(f"partition {number}: its log ends at offset {offset}")
            first = first or piece
            data += piece.data
            offset, skip = piece.next_offset, piece.next_skip
            self._progress(f"partition {number}: log, offset {offset} of {plan.log_end}")
            if skip == 0 and (len(data) >= PART_BYTES or offset >= plan.log_end):
                parts.append(await self._part(number, bytes(data), start, offset, first))
                data, first, start = bytearray(), None, offset
        return parts

    async def _kept(self, peer: PeerClient, plan: BackupPlan, earlier: tuple[LogPart, ...]) -> list[LogPart]:
        """What an earlier backup has of this very log, and is still needed."""
        parts = [part for part in earlier if part.end <= plan.log_end]
        if parts and parts[-1].bytes < PART_BYTES:
            parts.pop()  # else there would be many small ones some day
        needed = [part for part in parts if part.end > plan.log_start]
        if not needed or needed[0].start > plan.log_start:
            return []
        for part in needed:
            if await asyncio.to_thread(self._target.size, part.object) != part.bytes:
                return []
        # Two logs in which records of one epoch end at one offset are the same below.
        last = needed[-1]
        try:
            piece = await self._read(peer, plan, "", last.end)
        except InvalidRequestError:
            return []  # no record ends there
        if (piece.epoch, piece.append_ns) != (last.end_epoch, last.end_append_ns):
            return []
        return needed

    async def _part(self, number: int, data: bytes, start: int, end: int, first: BackupPiece) -> LogPart:
        """Make an object of packed records, once they are looked at."""
        offset, epoch, append_ns = start, first.epoch, first.append_ns
        for meta, _ in unpack_records(number, memoryview(data)):
            if meta.base_offset != offset:
                raise RemoteProtocolError(
                    f"partition {number}: a record at offset {meta.base_offset} follows the end at {offset}"
                )
            offset, epoch, append_ns = offset + meta.count, meta.epoch, meta.append_ns
        if offset != end:
            raise RemoteProtocolError(f"partition {number}: the log's records end at {offset}, not {end}")
        crc = int(google_crc32c.value(data))
        name = layout.object_name(f"log-{number:04d}", f"{start:020d}-{end:020d}", crc, len(data))
        if not await self._is_there(name, len(data)):
            await self._write(name, data)
        return LogPart(name, start, end, len(data), crc, first.epoch, first.append_ns, epoch, append_ns)


def document(summary: Summary) -> dict[str, Any]:
    """A summary for machines."""
    return dict(msgspec.to_builtins(summary))
