"""A stopped store's data directory, read as a whole: is every byte as it was written, and every total what its events say?

In this order, one partition after the other where there are several: the log's files byte by byte (`log`); REPLICAS and
CLUSTER; what recovery makes of the log, without changing it (`overlay`); checkpoints; archive files, by themselves and
against the log (`archive`); and the recount. Where a log begins with a partition's first record, everything is folded
from there and compared with the newest checkpoint, all of the state; what memory has no place for goes to files of
verify's own (`scratch`). Where it doesn't, the totals of billing periods
are counted from archive and log (`totals`); days, sets of dimensions and ids of what the log has dropped are then
taken as the checkpoint has them.

Nothing is changed. What can't be trusted is a finding, never an exception; a disk that can't be read is a DiskError.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from tallymark_protocol import limits
from tallymark_protocol.errors import RemoteProtocolError
from tallymark_protocol.payload import COLUMNS
from tallymark_runtime.catalog import Cluster
from tallymark_runtime.disk import Disk, DiskError, FileMissingError
from tallymark_store import checkpoint, recovery
from tallymark_store.archive import manifest as manifests
from tallymark_store.checkpointer import folder
from tallymark_store.fold.alert_files import AlertFile
from tallymark_store.fold.spilled import SpilledFile
from tallymark_store.partition import Partition
from tallymark_store.replicas_file import NAME as REPLICAS
from tallymark_store.replicas_file import SLOT_BYTES, _Body, _parse
from tallymark_store.scan.source import WalSource
from tallymark_store.verify.findings import Report
from tallymark_store.verify.log import LogFiles
from tallymark_store.verify.overlay import OverlayDisk
from tallymark_store.verify.scratch import Scratch
from tallymark_store.wal import DamagedError, Wal, WalStart, open_wal
from tallymark_store.wal.errors import LogVersionError
from tallymark_store.wal.recovery import MixedLogError, Recovery

_CLUSTER_FILE = "CLUSTER"
_OWN = frozenset({REPLICAS, _CLUSTER_FILE, "LOCK"})
_OTHER_INDEX = "the kept start of the log says something else of a record than the record itself"
_PASS_CELLS = 4_000_000  # totals that are recounted in one pass over the archive


class StoreDirectory:
    """Verifies one store's folder.

    Args:
        disk: the store's folder.
        report: takes the findings.
        cluster: the cluster's constants, where they are known.
        prefix: the folder's path in the data directory, for findings; "" or ending in a slash.
        dedup_window_ns: the cluster's, where its constants are not known.
        scratch: where what is counted again may go; None: it stays in memory.
    """

    def __init__(
        self,
        disk: Disk,
        report: Report,
        *,
        cluster: Cluster | None,
        prefix: str = "",
        dedup_window_ns: int = limits.DEDUP_WINDOW_NS,
        scratch: Scratch | None = None,
    ) -> None:
        self._scratch = scratch
        self._disk = disk
        self._report = report
        self._cluster = cluster
        self._prefix = prefix
        self._window_ns = dedup_window_ns if cluster is None else cluster.dedup_window_ns
        self._copies: dict[int, str] = {}  # copy ids by partition, as REPLICAS has them

    def verify(self) -> None:
        """Look at everything.

        Raises:
            DiskError: the disk can't be read.
        """
        report = self._report
        for name in self._disk.list():
            if name not in _OWN:
                report.note(f"{self._prefix}{name} is none of the store's files, and means nothing")
        self._check_cluster_file()
        self._check_replicas()
        LogFiles(self._disk.at("wal"), f"{self._prefix}wal", report).check()
        start = self._wal_start()
        report.progress("log: what it adds up to")
        try:
            wal, found = open_wal(OverlayDisk(self._disk.at("wal")), new_log_id=bytes(16), start=start)
        except (LogVersionError, MixedLogError) as error:
            report.find(error.message, file=f"{self._prefix}wal")
            return
        try:
            self._check_recovery(found)
            for number in self._numbers(wal):
                report.looked_at("partitions")
                _PartitionCheck(self, wal, found, number).run()
        finally:
            wal.close()

    # ------------------------------------------------------------ small files

    def _read(self, name: str) -> bytes | None:
        try:
            file = self._disk.open(name)
        except FileMissingError:
            return None
        try:
            return file.read(0, file.size()).tobytes()
        finally:
            file.close()

    def _check_cluster_file(self) -> None:
        found = self._read(_CLUSTER_FILE)
        path = f"{self._prefix}{_CLUSTER_FILE}"
        if found is None:
            self._report.find("the file is missing", file=path)
        elif self._cluster is not None:
            if found != self._cluster.cluster_id.encode():
                self._report.find(
                    "the store's data belongs to another cluster than the coordinator's state",
                    file=path,
                    expected=self._cluster.cluster_id,
                    found=found.decode(errors="replace"),
                )
        elif not re.fullmatch(rb"[0-9a-f]{32}", found):
            self._report.find("the file holds no cluster's id", file=path)

    def _check_replicas(self) -> None:
        path = f"{self._prefix}{REPLICAS}"
        data = self._read(REPLICAS)
        if data is None:
            self._report.find("the file is missing", file=path)
            return
        if len(data) < 2 * SLOT_BYTES:
            self._report.find(
                "the file is cut", file=path, expected=f"{2 * SLOT_BYTES} bytes", found=f"{len(data)} bytes"
            )
        slots = [_parse(data[at : at + SLOT_BYTES]) for at in (0, SLOT_BYTES)]
        for place, slot in enumerate(slots):
            if slot is None:
                self._report.find(
                    f"slot {place} of 2 is not whole; a start goes by the other one, if that is",
                    file=path,
                    position=place * SLOT_BYTES,
                )
        whole = [slot for slot in slots if slot is not None]
        if not whole:
            return
        if len(whole) == 2 and whole[0][0] != whole[1][0]:
            self._report.note(
                f"{path}: a save was cut short between its two slots; the next start finishes it"
            )
        body: _Body = max(whole, key=lambda item: item[0])[1]
        self._copies = {entry.partition: entry.state.copy_id for entry in body.entries}
        for entry in body.entries:
            if entry.state.is_damaged:
                self._report.find("this copy is recorded as damaged", file=path, partition=entry.partition)

    def _wal_start(self) -> WalStart | None:
        try:
            return checkpoint.load_wal_start(self._disk.at("checkpoints"))
        except checkpoint.CheckpointError as error:
            self._report.find(str(error), file=f"{self._prefix}checkpoints/wal-start")
            return None

    def _check_recovery(self, found: Recovery) -> None:
        for damage in (*found.damages.values(), *found.findings):
            self._report.find(
                damage.sentence,
                file=f"{self._prefix}wal/{damage.file}" if damage.file else "",
                position=damage.position,
                partition=-1 if damage.partition is None else damage.partition,
            )
        if found.unproven:
            self._report.find(
                "partitions may have been in the log of which no trace is left", file=f"{self._prefix}wal"
            )

    def _numbers(self, wal: Wal) -> list[int]:
        known = {*wal.partitions, *self._copies}
        if self._cluster is not None:
            known |= set(range(self._cluster.partition_count))
        return sorted(known)


class _PartitionCheck:
    """Checkpoint, archive and recount of one partition."""

    def __init__(self, directory: StoreDirectory, wal: Wal, found: Recovery, number: int) -> None:
        self._directory = directory
        self._report = directory._report  # one object in two pieces
        self._wal = wal
        self._number = number
        self._scratch = directory._scratch
        self._is_damaged = found.is_damaged(number)
        self._foreign = found.start_ignored
        self._disk = directory._disk
        self._checkpoints = f"{directory._prefix}checkpoints/{folder(number)}"
        self._archive = f"{directory._prefix}archive/{folder(number)}"
        self._log = f"{directory._prefix}wal"

    def _partition(self) -> Partition:
        return Partition(
            self._number,
            dedup_window_ns=self._directory._window_ns,
            indexes=self._wal.partitions,
        )

    def run(self) -> None:
        running = self._restored()
        index = self._wal.partitions.get(self._number)
        recounted: Partition | None = None
        if self._is_damaged or index is None:
            if index is not None:
                self._report.note(f"partition {self._number} was not counted again: its log is damaged")
        elif index.log_start == 0:
            recounted = self._recounted(running)
        elif running is None:
            self._report.find(
                f"the log begins at offset {index.log_start}, and no checkpoint that can be used holds what lies below",
                file=self._checkpoints,
                partition=self._number,
            )
        newest = recounted
        if newest is None and running is not None and not self._is_damaged and index is not None:
            newest = self._replayed(running)
        names = set(self._disk.at("archive").at(folder(self._number)).list())
        if names:
            self._check_archive(newest, running, has_log=not self._is_damaged and index is not None)
        if index is None or index.log_start == 0 or manifests.NAME in names:
            return
        lost = self._lost_archive(names)
        if lost:
            self._report.find(
                f"the log begins at offset {index.log_start}, and the archive of what lies below is gone: {lost}",
                file=self._archive,
                partition=self._number,
            )
        else:
            self._report.note(
                f"partition {self._number} was not counted again: its log begins at offset {index.log_start}, and "
                f"there is no archive"
            )

    def _lost_archive(self, names: set[str]) -> str:
        """What shows that a partition without an archive's manifest had one; "" where nothing does.

        A copy that began with a snapshot has a log that begins late, too. Where archiving is on it writes down with which
        offset its archive begins; where it never was, there is no archive at all, and nothing of the log was ever removed.
        """
        if manifests.LACKS in names:
            return "it was not in the backup that this was restored from"
        if any(name.startswith("events-") for name in names):
            return "files of one are there, and no manifest"
        root = self._disk.at("archive")
        for number in self._directory._numbers(self._wal):
            if manifests.NAME in root.at(folder(number)).list():
                return f"archiving was on, as the archive of partition {number} shows"
        if not any(name == "wal-0000000000000000.seg" for name in self._disk.at("wal").list()):
            return "files of the log were removed, which is done only once an archive has what is in them"
        return ""

    # ------------------------------------------------------------ checkpoint

    def _restored(self) -> Partition | None:
        """The newest checkpoint's state, once everything in its files was looked at."""
        disk = self._disk.at("checkpoints").at(folder(self._number))
        report, number = self._report, self._number
        names = disk.list()
        report.progress(f"partition {number}: checkpoint")
        try:
            manifest = checkpoint.load_manifest(disk)
            listed: set[str] = set()
            if manifest is not None:
                listed = {"MANIFEST", *checkpoint.files_of(manifest)}
            for name in names:
                if name not in listed and name != "MANIFEST":
                    report.note(
                        f"{self._checkpoints}/{name} is not listed by the manifest: it is finished, or removed, at the "
                        f"next start"
                    )
            if manifest is None:
                return None
            report.looked_at("checkpoints")
            index = self._wal.partitions.get(number)
            if manifest.partition != number:
                raise checkpoint.CheckpointError(f"the manifest is of partition {manifest.partition}")
            log_end = 0 if index is None else index.log_end
            if manifest.offset > log_end and not self._is_damaged:
                report.find(
                    "the log ends below the checkpoint: acknowledged records are missing",
                    file=self._log,
                    partition=number,
                    expected=f"at least {manifest.offset}",
                    found=log_end,
                )
            partition = self._partition()
            recovery.restore(partition, disk, manifest, 0)
            if not self._are_files_sound(partition):
                return None
        except (checkpoint.CheckpointError, RemoteProtocolError) as error:
            report.find(str(error), file=self._checkpoints, partition=number)
            return None
        except (DiskError, MemoryError):
            raise
        except Exception as error:  # of bytes that nobody thought of
            report.find(
                f"the checkpoint cannot be read: {type(error).__name__} {error}",
                file=self._checkpoints,
                partition=number,
            )
            return None
        return partition

    def _are_files_sound(self, partition: Partition) -> bool:
        """Look at every byte of the files of cells and alerts; damage is a finding."""
        count = self._report.count
        fold = partition.fold
        files: list[SpilledFile | AlertFile] = [*fold.spilled.files, *fold.alert_files.files]
        for file in files:
            for position in file.damage():
                self._report.progress(f"partition {self._number}: {file.name}")
                if position >= 0:
                    self._report.find(
                        "a block of this file of cells or alert records is not as it was written",
                        file=f"{self._checkpoints}/{file.name}",
                        position=position,
                        partition=self._number,
                    )
            self._report.looked_at("files of cells and alerts")
        return self._report.count == count

    # ------------------------------------------------------------ the log from its first record

    def _fold(self, partition: Partition, upto: int) -> bool:
        """Fold up to an offset; False where a record can't be folded, which is a finding."""
        columns = np.zeros(COLUMNS, dtype=np.int64)
        index = partition.index
        while partition.applied < upto:
            row = index.find(partition.applied)
            place = index.row(row)
            try:
                meta, body = self._wal.read_record(self._number, row)
                if meta != index.meta(row):
                    self._report.find(
                        _OTHER_INDEX,
                        file=f"{self._log}/wal-{place.segment:016d}.seg",
                        position=place.position,
                        partition=self._number,
                        expected=meta,
                        found=index.meta(row),
                    )
                partition.apply_logged(meta, body, columns)
                if self._scratch is not None:
                    self._scratch.relieve(partition)
            except (DamagedError, RemoteProtocolError) as error:
                self._report.find(
                    error.message,
                    file=f"{self._log}/wal-{place.segment:016d}.seg",
                    position=place.position,
                    partition=self._number,
                )
                return False
            if row % 1_000 == 0:
                self._report.progress(
                    f"partition {self._number}: counting again, offset {partition.applied} of {upto}"
                )
        return True

    def _recounted(self, running: Partition | None) -> Partition | None:
        """Everything folded from the first record on; compared with the checkpoint where that stands."""
        partition = self._partition()
        end = partition.index.log_end
        stop = end if running is None else min(running.applied, end)
        if not self._fold(partition, stop):
            return None
        if running is not None and running.applied == partition.applied:
            self._compare(running, partition)
        if not self._fold(partition, end):
            return None
        self._report.looked_at("offsets folded again", end)
        return partition

    def _compare(self, running: Partition, recounted: Partition) -> None:
        from tallymark_store.verify.differences import report_differences

        if running.digest() != recounted.digest():
            report_differences(running, recounted, self._checkpoints, self._report)
        self._report.looked_at("totals compared", recounted.fold.cell_count)

    def _replayed(self, running: Partition) -> Partition | None:
        """A checkpoint's state, with what the log has beyond: another object than `running`, which stays as it is."""
        disk = self._disk.at("checkpoints").at(folder(self._number))
        manifest = checkpoint.load_manifest(disk)
        assert manifest is not None, "it was restored a moment ago"
        partition = self._partition()
        recovery.restore(partition, disk, manifest, 0)
        self._check_rows(partition.index.log_start, running.applied)
        return partition if self._fold(partition, partition.index.log_end) else None

    def _check_rows(self, start: int, end: int) -> None:
        """Records that are not folded: whether they are what the index says."""
        index = self._wal.partitions[self._number]
        first, last = index.rows_of(start, end)
        for row in range(first, last):
            place = index.row(row)
            try:
                meta, _ = self._wal.read_record(self._number, row)
                problem = "" if meta == index.meta(row) else _OTHER_INDEX
            except DamagedError as error:
                problem = error.message
            if problem:
                self._report.find(
                    problem,
                    file=f"{self._log}/wal-{place.segment:016d}.seg",
                    position=place.position,
                    partition=self._number,
                )

    # ------------------------------------------------------------ the archive

    def _check_archive(self, newest: Partition | None, running: Partition | None, *, has_log: bool) -> None:
        # And with it pyarrow, which those without an archive needn't have.
        from tallymark_store.archive.names import MetricNames
        from tallymark_store.archive.writer import open_file
        from tallymark_store.verify.archive import ArchiveFiles, log_tables, tables_of
        from tallymark_store.verify.totals import Gone, PeriodTotals, compare, running_totals

        report, number = self._report, self._number
        disk = self._disk.at("archive").at(folder(number))
        files = ArchiveFiles(disk, self._archive, number, report)
        files.check_files()
        manifest = files.manifest
        if manifest is None:
            return
        copy_id = self._directory._copies.get(number)
        if copy_id is not None and copy_id != manifest.copy_id:
            report.note(f"{self._archive} is of a copy that was there before: the next start begins it anew")
            return
        if not files.is_sound or newest is None or not has_log:
            return
        index = newest.index
        source = WalSource(self._wal, number)
        names = MetricNames(newest.fold.schemas)
        try:
            files.check_against_log(source, names, index.log_end)
            if index.log_start == 0 or running is None or not files.is_sound:
                return
            if manifest.end_offset < index.log_start:
                report.find(
                    "what the log has dropped is not all in the archive",
                    file=f"{self._archive}/MANIFEST.json",
                    partition=number,
                    expected=f"at least {index.log_start}",
                    found=manifest.end_offset,
                )
                return
            if manifest.covered(index.log_start) != [(0, index.log_start)]:
                report.note(
                    f"partition {number} was not counted again: its archive begins at offset {manifest.start_offset}, or "
                    f"has gaps"
                )
                return
            if files.away:
                report.note(f"partition {number} was not counted again: files of its archive are elsewhere")
                return
            gone = Gone(running.fold.schemas, manifest.dropped, running.applied)
            passes = max(1, -(-running.fold.cell_count // _PASS_CELLS))
            for part in range(passes):
                report.progress(
                    f"partition {number}: counting again from the archive, {part + 1} of {passes}"
                )
                counted = PeriodTotals(running.fold.schemas, running.applied, (part, passes))
                for file in manifest.files:
                    if file.start_offset < running.applied:
                        for table in tables_of(open_file(disk, file.name)):
                            counted.take(table)
                for _, logged in log_tables(source, names, number, manifest.end_offset, running.applied):
                    if logged is not None:
                        counted.take(logged)
                for uid in sorted(counted.unknown):
                    report.find(
                        f"archived events are of a metric with uid {uid}, of which the checkpoint knows nothing",
                        file=self._archive,
                        partition=number,
                    )
                recounted = counted.result()
                told = running_totals(running.fold, (part, passes))
                gone.count(told, recounted)
                for total in compare(running.fold.schemas, gone.without(told), gone.without(recounted)):
                    report.find(
                        f"the running total of account {total.account}, metric {total.code!r}, in the period from "
                        f"{total.start_ns} ns is not what archive and log say",
                        file=self._checkpoints,
                        partition=number,
                        expected=total.recounted,
                        found=total.running,
                    )
                report.looked_at("totals compared", len(recounted))
            for item, missing in gone.differences():
                report.find(
                    f"not so many events of metric {item.metric!r} as were written down as dropped are missing",
                    file=f"{self._archive}/MANIFEST.json",
                    partition=number,
                    expected=item.events,
                    found=missing,
                )
            if manifest.dropped:
                report.note(
                    f"partition {number}: totals of {gone.skipped} billing periods were compared by their events' number "
                    f"only, as raw events of {', '.join(item.metric for item in manifest.dropped)} were dropped"
                )
        except DamagedError as error:
            report.find(error.message, file=self._log, partition=number)


def verify_store(
    disk: Disk,
    *,
    cluster: Cluster | None = None,
    prefix: str = "",
    progress: Callable[[str], None] = lambda _: None,
    scratch: Scratch | None = None,
) -> Report:
    """Verify a stopped store's folder, which the caller has locked; see the module.

    Raises:
        DiskError: the disk can't be read.
    """
    report = Report(progress)
    StoreDirectory(disk, report, cluster=cluster, prefix=prefix, scratch=scratch).verify()
    return report
