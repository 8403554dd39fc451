"""Making a data directory of a backup: of `tallymark dev`, or of a single store that embeds its coordinator.

The restored cluster has one copy of each partition, on one node, and is another cluster than the one that was backed up:
it has an id of its own, copies have ids of their own, and epochs go on above all that the logs have seen. Metrics keep
their uids, as the logs refer to them. Each partition gets its log as it was, from where the backup has it, and behind it
one membership record that makes the new copy its only member; then the checkpoint, and the archive under the new copy's
id. A start does the rest, as after any other stop.

Everything is made in a folder beside the data directory, which gets its name last: what is there under that name is
whole.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec
import numpy as np

from tallymark_node.backup import layout
from tallymark_node.backup.layout import Backup, BackupObject, PartitionBackup
from tallymark_node.backup.target import Target
from tallymark_protocol.errors import InvalidRequestError, RemoteProtocolError
from tallymark_protocol.payload import COLUMNS
from tallymark_runtime.assignments import (
    ASSIGNMENTS,
    COPIES,
    DRAINING,
    FOUNDING,
    LIVES,
    Assignment,
    Copy,
    Founding,
    Life,
    assignment_key,
    copy_key,
    founding_key,
    life_key,
)
from tallymark_runtime.catalog import (
    CLUSTER,
    EPOCH_BASE,
    LEADERS,
    METRICS,
    NODES,
    Cluster,
    EpochBase,
    decode_value,
    metric_of,
)
from tallymark_runtime.coordinator import KeyValue
from tallymark_runtime.coordinator.local import write_image
from tallymark_runtime.coordinator.state import Image
from tallymark_runtime.disk import Disk, RealDisk
from tallymark_runtime.placement import PLACEMENT, Placement
from tallymark_store import checkpoint
from tallymark_store.backups import unpack_records
from tallymark_store.belonging import check_cluster
from tallymark_store.checkpointer import folder
from tallymark_store.partition import Partition
from tallymark_store.recovery import restore as restore_checkpoint
from tallymark_store.replicas_file import ReplicasFile
from tallymark_store.replication.membership import encode_members
from tallymark_store.replication.ports import DurableState, Member
from tallymark_store.soundness import check_files
from tallymark_store.wal import RecordKind, RecordMeta, Wal, WalConfig, open_wal

_SYNC_BYTES: Final = 8 * 1024 * 1024  # of the log between two syncs
# Keys of the cluster that was: who held what, and who was there.
_GONE: Final = (ASSIGNMENTS, COPIES, FOUNDING, DRAINING, LIVES, LEADERS, NODES, PLACEMENT, CLUSTER)
_LIFE: Final = 1


class Restorer:
    """Restores one backup.

    Args:
        target: where it lies.
        backup: its manifest.
        data_dir: what is to be made; must not be there, or be empty.
        node_id: of the one node that the restored cluster has.
        rng: for ids.
        segment_bytes: of the log.
        progress: told what is done now.
    """

    def __init__(
        self,
        target: Target,
        backup: Backup,
        data_dir: Path,
        *,
        node_id: str,
        rng: random.Random,
        segment_bytes: int,
        progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._target = target
        self._backup = backup
        self._data_dir = data_dir
        self._work = data_dir.with_name(f".{data_dir.name}.restoring")
        self._node_id = node_id
        self._rng = rng
        self._segment_bytes = segment_bytes
        self._progress = progress
        self._copies = {part.partition: self._new_id() for part in backup.partitions}
        self._seen = 0  # the highest epoch in a log
        self.digests: dict[
            int, str
        ] = {}  # of the states as restored, where the backup has one to compare with

    def _new_id(self) -> str:
        return f"{self._rng.getrandbits(128):032x}"

    def restore(self) -> None:
        """Do it.

        Raises:
            InvalidRequestError: the data directory is in use.
            RemoteProtocolError: the backup is damaged; nothing is there under the data directory's name.
            DiskError, OSError: a disk refused; likewise.
        """
        if self._data_dir.exists() and (
            not self._data_dir.is_dir() or next(self._data_dir.iterdir(), None) is not None
        ):
            raise InvalidRequestError(f"{self._data_dir} is not empty: restore into a new folder")
        if self._work.exists():
            shutil.rmtree(self._work)  # of a restore that did not get to its end
        disk = RealDisk(self._work / "store")
        cluster = msgspec.structs.replace(self._backup.cluster, cluster_id=self._new_id())
        check_cluster(disk, cluster)
        wal, _ = open_wal(
            disk.at("wal"),
            new_log_id=self._rng.randbytes(16),
            config=WalConfig(segment_bytes=self._segment_bytes),
        )
        try:
            for part in self._backup.partitions:
                self._restore_partition(disk, wal, part)
            wal.write_marker()
            wal.sync_all()
            self._write_replicas(disk, wal)
        finally:
            wal.close()
        self._write_coordinator(cluster)
        if self._data_dir.exists():
            self._data_dir.rmdir()
        self._work.rename(self._data_dir)
        RealDisk(self._data_dir.parent).sync_dir()

    # ------------------------------------------------------------ one partition

    def _restore_partition(self, disk: Disk, wal: Wal, part: PartitionBackup) -> None:
        number = part.partition
        end = self._restore_log(wal, part)
        if end != part.end:
            raise RemoteProtocolError(
                f"the backup of partition {number} has its log up to offset {end}, not {part.end}"
            )
        if part.checkpoint:
            self._restore_checkpoint(disk.at("checkpoints").at(folder(number)), part)
        if part.archive:
            self._restore_archive(disk.at("archive").at(folder(number)), part)
        elif part.archive_problem and part.raw_start > 0:
            from tallymark_store.archive import manifest as manifests

            lacks = manifests.Lacks(part.raw_start, part.archive_problem)
            manifests.write_lacks(disk.at("archive").at(folder(number)), lacks)
        if part.digest:
            self._check_digest(disk, wal, part)
        if end > 0:
            index = wal.partitions[number]
            payload = encode_members((Member(self._node_id, self._copies[number]),))
            append_ns = index.last_append_ns()
            meta = RecordMeta(
                number, RecordKind.MEMBERSHIP, index.last_epoch(), end, 1, append_ns, append_ns, append_ns
            )
            wal.append(meta, [payload])
        wal.sync_all()

    def _restore_log(self, wal: Wal, part: PartitionBackup) -> int:
        number, end = part.partition, 0
        for place, piece in enumerate(part.log):
            self._progress(f"partition {number}: log, {place + 1} of {len(part.log)}")
            data = b"".join(layout.read_object(self._target, piece.object, piece.bytes, piece.crc32c))
            if place == 0 and piece.start > 0:
                wal.reset(number, piece.start, epoch=piece.start_epoch, append_ns=piece.start_append_ns)
                end = piece.start
            waiting = 0
            for meta, payload in unpack_records(number, memoryview(data)):
                if meta.base_offset != end:
                    raise RemoteProtocolError(
                        f"the backup of partition {number} has a record at offset {meta.base_offset} behind the end at {end}"
                    )
                wal.append(meta, [payload])
                end += meta.count
                self._seen = max(self._seen, meta.epoch)
                waiting += len(payload)
                if waiting >= _SYNC_BYTES:
                    wal.sync_all()
                    waiting = 0
            wal.sync_all()
        return end

    def _copy(self, disk: Disk, item: BackupObject) -> None:
        file = disk.create(item.name)
        try:
            position = 0
            for data in layout.read_object(self._target, item.object, item.bytes, item.crc32c):
                file.write(position, [data])
                position += len(data)
            file.sync()
        finally:
            file.close()

    def _restore_checkpoint(self, disk: Disk, part: PartitionBackup) -> None:
        try:
            manifest = msgspec.msgpack.decode(part.checkpoint, type=checkpoint.Manifest)
        except msgspec.DecodeError as error:
            raise RemoteProtocolError(f"the backup's checkpoint makes no sense: {error}") from None
        wanted = set(checkpoint.files_of(manifest))
        if wanted != {item.name for item in part.checkpoint_files} or manifest.offset > part.end:
            raise RemoteProtocolError(
                f"the backup of partition {part.partition} lacks files of its checkpoint"
            )
        for item in part.checkpoint_files:
            self._progress(f"partition {part.partition}: {item.name}")
            self._copy(disk, item)
        disk.sync_dir()
        try:
            check_files(disk, manifest)
        except checkpoint.CheckpointError as error:
            raise RemoteProtocolError(
                f"the backup of partition {part.partition} has a damaged checkpoint: {error}"
            ) from None
        checkpoint.publish(disk, manifest)

    def _restore_archive(self, disk: Disk, part: PartitionBackup) -> None:
        from tallymark_store.archive import manifest as manifests

        try:
            manifest = msgspec.json.decode(part.archive, type=manifests.Manifest)
        except msgspec.DecodeError as error:
            raise RemoteProtocolError(f"the backup's archive makes no sense: {error}") from None
        if manifest.format_version > manifests.LACKS_VERSION:
            raise RemoteProtocolError(
                f"the backup's archive has format version {manifest.format_version}, which this software can't read"
            )
        if {file.name for file in manifest.files} != {item.name for item in part.archive_files}:
            raise RemoteProtocolError(f"the backup of partition {part.partition} lacks files of its archive")
        for item in part.archive_files:
            self._progress(f"partition {part.partition}: {item.name}")
            self._copy(disk, item)
        manifests.publish(disk, msgspec.structs.replace(manifest, copy_id=self._copies[part.partition]))

    def _check_digest(self, disk: Disk, wal: Wal, part: PartitionBackup) -> None:
        """The restored state is the one that was backed up."""
        self._progress(f"partition {part.partition}: comparing the state")
        partition = Partition(
            part.partition,
            dedup_window_ns=self._backup.cluster.dedup_window_ns,
            indexes=wal.partitions,
        )
        folded = disk.at("checkpoints").at(folder(part.partition))
        manifest = checkpoint.load_manifest(folded)
        if manifest is not None:
            restore_checkpoint(partition, folded, manifest, 0)
        columns = np.zeros(COLUMNS, dtype=np.int64)
        while partition.applied < part.end:
            found = wal.read(part.partition, partition.applied)
            assert found is not None, "it was written a moment ago"
            partition.apply_logged(*found, columns)
        self.digests[part.partition] = partition.digest()
        if partition.digest() != part.digest:
            raise RemoteProtocolError(
                f"the restored state of partition {part.partition} is not the one that was backed up at offset {part.end}"
            )

    # ------------------------------------------------------------ what stands around the partitions

    def _write_replicas(self, disk: Disk, wal: Wal) -> None:
        file = ReplicasFile(disk)
        try:
            file.use_log(wal.log_id)
            states = {}
            for number, copy_id in self._copies.items():
                index = wal.partitions.get(number)
                states[number] = DurableState(
                    copy_id,
                    promised=0 if index is None else index.last_epoch(),
                    high_watermark=wal.log_end(number),
                )
            file.begin_life(_LIFE, states)
        finally:
            file.close()

    def _write_coordinator(self, cluster: Cluster) -> None:
        item = self._backup.items
        data = b"".join(layout.read_object(self._target, item.object, item.bytes, item.crc32c))
        kept = [key for key in layout.decode_items(data) if not key.lease and not key.key.startswith(_GONE)]
        base = 0
        for key in kept:
            if key.key == EPOCH_BASE:
                base = decode_value(EpochBase, key).base
            elif key.key.startswith(METRICS):
                self._seen = max(self._seen, metric_of(key).uid)
        # What the next keys get is above everything that the logs have seen.
        revision = max([self._backup.revision, self._seen - base, *(key.mod_revision for key in kept)]) + 1
        nodes = (self._node_id,)
        wish = Assignment(nodes)
        made: dict[bytes, msgspec.Struct] = {
            CLUSTER: cluster,
            PLACEMENT: Placement(1, tuple(wish for _ in range(cluster.partition_count))),
            life_key(self._node_id): Life(_LIFE),
        }
        for number, copy_id in self._copies.items():
            made[assignment_key(number)] = wish
            made[copy_key(number, self._node_id)] = Copy(copy_id)
            made[founding_key(number)] = Founding(((self._node_id, copy_id),))
        items = [
            *kept,
            *(
                KeyValue(key, msgspec.msgpack.encode(value), revision, revision, 1)
                for key, value in made.items()
            ),
        ]
        items.sort(key=lambda found: found.key)
        write_image(self._work / "coordinator", Image(revision, 1, items))
