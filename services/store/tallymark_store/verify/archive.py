"""An archive's files: whole, sorted, within their ranges, and saying what the log says.

A file that is as long as the manifest says and has its checksum is as it was written; that it was written rightly is
looked at besides: its rows are in order and within the file's offsets and times, no offset is in it twice, and where
the log still has the offsets, the rows are those that the log gives when it is archived once more. That is compared by
sums of hashes, slice by slice of the log, so memory is bounded by a row group, a slice, and the offsets of one file.
Events that may have been dropped, by the times that the manifest says, are left out on both sides, and counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from tallymark_runtime.disk import Disk, DiskError, FileMissingError
from tallymark_store.archive import manifest as manifests
from tallymark_store.archive.archiver import RUN_EVENTS, plan_slice
from tallymark_store.archive.columns import SCHEMA, SORT_KEY, MalformedError, Slice
from tallymark_store.archive.manifest import ArchiveError, ArchiveFile, Manifest
from tallymark_store.archive.names import MetricNames
from tallymark_store.archive.retention import old_rows
from tallymark_store.archive.writer import checksum, open_file
from tallymark_store.scan.source import RecordSource
from tallymark_store.verify.findings import Report
from tallymark_store.verify.hashing import row_hashes
from tallymark_store.wal import DamagedError

NAMED_MAX: Final = 5  # offsets that differ and are named, of a file


class _Edges(NamedTuple):
    """What the log says of slices of a file's range."""

    starts: npt.NDArray[np.int64]  # of slices, ascending
    rows: npt.NDArray[np.int64]
    sums: npt.NDArray[np.uint64]


class ArchiveFiles:
    """Looks at one partition's archive.

    Args:
        disk: its folder.
        folder: the folder's path in the data directory, for findings.
        number: of the partition.
        report: takes the findings.

    Attributes:
        manifest: as it was read; None where there is none, or none that can be read.
        away: names of files that are elsewhere.
        is_sound: whether nothing was found.
    """

    def __init__(self, disk: Disk, folder: str, number: int, report: Report) -> None:
        self.manifest: Manifest | None = None
        self.away: set[str] = set()
        self._disk = disk
        self._folder = folder
        self._number = number
        self._report = report
        self._found_before = report.count
        self._cutoffs: dict[int, int] = {}  # by uid: rows from before may have been dropped
        # By uid: how many such rows the log has more than the archive, of the offsets that were compared.
        self._gone: Counter[int] = Counter()
        names = disk.list()
        if manifests.NAME not in names:
            for name in names:
                report.note(f"{folder}/{name} is listed by no manifest, and means nothing")
            return
        try:
            file = disk.open(manifests.NAME)
            try:
                self.manifest = manifests.decode(file.read(0, file.size()).tobytes())
            finally:
                file.close()
        except ArchiveError as error:
            self._find(manifests.NAME, str(error))
            return
        if self.manifest.partition != number:
            self._find(
                manifests.NAME,
                "the archive is of another partition",
                expected=number,
                found=self.manifest.partition,
            )
        self._cutoffs = {item.metric_uid: item.before_ns for item in self.manifest.dropped}
        listed = {manifests.NAME, *(file.name for file in self.manifest.files)}
        self.away = {file.name for file in self.manifest.files if file.at_home and file.name not in names}
        if self.away:
            report.note(
                f"{len(self.away)} files of {folder} are at the archive's home only, and were not looked at"
            )
        for name in names:
            if name not in listed:
                report.note(f"{folder}/{name} is not listed by the manifest, and means nothing")

    @property
    def is_sound(self) -> bool:
        """Whether nothing was found."""
        return self._report.count == self._found_before

    def _find(self, name: str, sentence: str, *, expected: object = "", found: object = "") -> None:
        self._report.find(
            sentence,
            file=f"{self._folder}/{name}",
            partition=self._number,
            expected=expected,
            found=found,
        )

    # ------------------------------------------------------------ files by themselves

    def check_files(self) -> None:
        """Look at every file of the manifest."""
        if self.manifest is None:
            return
        for place, file in enumerate(self.manifest.files):
            if file.name in self.away:
                continue
            self._report.progress(
                f"partition {self._number}: archive file {place + 1} of {len(self.manifest.files)}"
            )
            try:
                self._check_file(file)
            except FileMissingError:
                self._find(file.name, "the file is missing")
            except DiskError as error:
                self._find(file.name, f"the file cannot be read: {error}")
            except (pa.ArrowException, OSError, ValueError) as error:
                self._find(file.name, f"the file cannot be decoded: {error}")
            self._report.looked_at("archive files")

    def _check_file(self, file: ArchiveFile) -> None:
        size, crc = checksum(self._disk, file.name)
        if size != file.bytes:
            self._find(file.name, "the file has another length", expected=file.bytes, found=size)
            return
        if crc != file.crc32c:
            self._find(
                file.name, "the file's checksum is wrong", expected=f"{file.crc32c:08x}", found=f"{crc:08x}"
            )
            return
        offsets: list[npt.NDArray[np.int64]] = []
        before: tuple[int, ...] | None = None
        low, high = 2**63 - 1, -(2**63)
        for table in tables_of(open_file(self._disk, file.name)):
            if not table.schema.equals(SCHEMA):
                self._find(file.name, "the file has other columns")
                return
            keys = [table.column(name).to_numpy() for name in SORT_KEY]
            if not _is_sorted(keys, before):
                self._find(file.name, "rows are not in the order of metric, account, time and offset")
            before = tuple(int(key[-1]) for key in keys)
            if (table.column("partition").to_numpy() != self._number).any():
                self._find(file.name, "rows are of another partition")
            low, high = min(low, int(keys[2].min())), max(high, int(keys[2].max()))
            offsets.append(keys[3])
        found = np.concatenate(offsets) if offsets else np.empty(0, np.int64)
        if len(found) != file.rows:
            self._find(file.name, "the file has another number of rows", expected=file.rows, found=len(found))
            return
        found.sort()
        if found[0] < file.start_offset or found[-1] >= file.end_offset:
            self._find(
                file.name,
                "rows lie outside of the file's offsets",
                expected=f"[{file.start_offset}, {file.end_offset})",
                found=f"{found[0]} to {found[-1]}",
            )
        twice = np.flatnonzero(np.diff(found) == 0)
        if len(twice):
            self._find(
                file.name, f"{len(twice)} events are in the file twice, first that of {found[twice[0]]}"
            )
        if (low, high) != (file.min_time_ns, file.max_time_ns):
            self._find(
                file.name,
                "event times are not those that the manifest says",
                expected=f"{file.min_time_ns} to {file.max_time_ns}",
                found=f"{low} to {high}",
            )
        self._report.looked_at("archived events", len(found))

    # ------------------------------------------------------------ against the log

    def check_against_log(self, source: RecordSource, names: MetricNames, log_end: int) -> None:
        """Compare the files with what the log says, where it still has their offsets.

        Call it where the files are sound.
        """
        manifest = self.manifest
        if manifest is None:
            return
        if manifest.end_offset > log_end:
            self._find(
                manifests.NAME,
                "the archive holds more than the log",
                expected=f"at most {log_end}",
                found=manifest.end_offset,
            )
            return
        at = manifest.start_offset
        for file in manifest.files:
            self._check_empty(source, names, max(at, source.log_start), file.start_offset)
            start = max(file.start_offset, source.log_start)
            if start < file.end_offset and file.name not in self.away:
                self._report.progress(f"partition {self._number}: archive against log from offset {start} on")
                self._compare(file, source, names, start)
            at = file.end_offset
        self._check_empty(source, names, max(at, source.log_start), manifest.end_offset)
        for item in manifest.dropped:
            gone = self._gone[item.metric_uid]
            # What was written down is all of it where all was compared, and in any case the most that may be missing.
            is_all = source.log_start <= item.start_offset and not item.is_at_most and not self.away
            if gone > item.events or (is_all and gone < item.events):
                self._find(
                    manifests.NAME,
                    f"not so many events of metric {item.metric!r} as were written down as dropped are missing",
                    expected=item.events,
                    found=gone,
                )

    def _without_old(self, table: pa.Table, sign: int) -> pa.Table:
        """Rows that must be on both sides; the others are counted."""
        if not self._cutoffs:
            return table
        old = old_rows(table, self._cutoffs)
        for uid, count in zip(
            *np.unique(table.column("metric_uid").to_numpy()[old], return_counts=True), strict=True
        ):
            self._gone[int(uid)] += sign * int(count)
        return table.filter(pa.array(~old))

    def _check_empty(self, source: RecordSource, names: MetricNames, start: int, end: int) -> None:
        """The log accepted nothing where no file is."""
        for first, table in log_tables(source, names, self._number, start, end):
            table = None if table is None else self._without_old(table, 1)
            if table is not None and table.num_rows:
                self._find(
                    manifests.NAME,
                    f"no file has the {table.num_rows} events that the log accepted from offset {first} on",
                )

    def _compare(self, file: ArchiveFile, source: RecordSource, names: MetricNames, start: int) -> None:
        said = self._said_by_log(source, names, start, file.end_offset)
        rows: npt.NDArray[np.int64] = np.zeros(len(said.starts), np.int64)
        sums: npt.NDArray[np.uint64] = np.zeros(len(said.starts), np.uint64)
        for whole in tables_of(open_file(self._disk, file.name)):
            known_here = whole.filter(pa.array(whole.column("offset").to_numpy() >= start))
            table = self._without_old(known_here, -1)
            offsets = table.column("offset").to_numpy()
            place = np.searchsorted(said.starts, offsets, side="right") - 1
            rows += np.bincount(place, minlength=len(rows))
            np.add.at(sums, place, row_hashes(table))
        self._report.looked_at("archived events compared with the log", int(said.rows.sum()))
        different = np.flatnonzero((rows != said.rows) | (sums != said.sums))
        if not len(different):
            return
        first = int(said.starts[different[0]])
        more = len(said.starts) > different[0] + 1
        end = int(said.starts[different[0] + 1]) if more else file.end_offset
        named = self._differences(file, source, names, first, end)
        self._find(
            file.name,
            f"what it holds of the offsets from {first} up to {end} is not what the log accepted: offsets "
            f"{', '.join(map(str, named[:NAMED_MAX])) or 'unknown'}",
            expected=f"{int(said.rows[different[0]])} events",
            found=f"{int(rows[different[0]])} events",
        )

    def _said_by_log(self, source: RecordSource, names: MetricNames, start: int, end: int) -> _Edges:
        starts, rows, sums = [], [], []
        for first, table in log_tables(source, names, self._number, start, end):
            starts.append(first)
            table = None if table is None else self._without_old(table, 1)
            rows.append(0 if table is None else table.num_rows)
            sums.append(np.uint64(0) if table is None else row_hashes(table).sum(dtype=np.uint64))
        return _Edges(np.array(starts, np.int64), np.array(rows, np.int64), np.array(sums, np.uint64))

    def _differences(
        self, file: ArchiveFile, source: RecordSource, names: MetricNames, start: int, end: int
    ) -> list[int]:
        """The first offsets of [start, end) that are not the same on both sides."""
        held: dict[int, int] = {}
        for whole in tables_of(open_file(self._disk, file.name)):
            table = self._without_old(whole, 0)
            offsets = table.column("offset").to_numpy()
            chosen = (offsets >= start) & (offsets < end)
            if chosen.any():
                held.update(zip(offsets[chosen].tolist(), row_hashes(table)[chosen].tolist(), strict=True))
        for _, logged in log_tables(source, names, self._number, start, end):
            if logged is None:
                continue
            logged = self._without_old(logged, 0)
            offsets = logged.column("offset").to_numpy().tolist()
            for offset, digest in zip(offsets, row_hashes(logged).tolist(), strict=True):
                if held.get(offset) == digest:
                    del held[offset]
                else:
                    held[offset] = digest
        return sorted(held)


def log_tables(
    source: RecordSource, names: MetricNames, number: int, start: int, end: int
) -> Iterator[tuple[int, pa.Table | None]]:
    """What the log accepted of [start, end), in slices: where each begins, and its sorted rows, if there are any.

    Raises:
        DamagedError: a record can't be read, or makes no sense.
    """
    while start < end:
        planned = plan_slice(source, start, end)
        if planned is None:
            return
        taken = Slice(number, names, planned.events)
        while (run := planned.cursor.next_run(RUN_EVENTS)) is not None:
            try:
                taken.take(*run)
            except MalformedError as error:
                raise DamagedError(
                    f"partition {number}: a record from offset {start} on makes no sense: {error}",
                    partition=number,
                ) from error
        yield start, taken.table() if taken.rows else None
        start = planned.end_offset


def tables_of(file: pq.ParquetFile) -> Iterator[pa.Table]:
    """The rows of a file, a row group at a time."""
    for group in range(file.num_row_groups):
        table = file.read_row_group(group, use_threads=False)
        if table.num_rows:
            yield table


def _is_sorted(keys: list[npt.NDArray[np.generic]], before: tuple[int, ...] | None) -> bool:
    if before is not None and before >= tuple(int(key[0]) for key in keys):
        return False
    ordered = np.zeros(len(keys[0]) - 1, np.bool_)
    for key in reversed(keys):
        ordered = (key[:-1] < key[1:]) | ((key[:-1] == key[1:]) & ordered)
    return bool(ordered.all())
