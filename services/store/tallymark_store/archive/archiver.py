"""When a store's events go into the archive, and files into larger ones.

One partition at a time, and of it one slice at a time. What is archived of a partition is what is committed, folded
and on this store's own disk, once enough has gathered. On the loop, a slice's records are chosen and pinned, which is
short; decoding, sorting and writing happen in a thread, in kernels and in Arrow, which let go of the interpreter; the
manifest is switched when the file is durable. A slice is bounded in events, bytes and records, and so is the memory it
takes.

Each copy archives for itself, from its own log. An archive carries the id of its copy: where a copy has begun anew, the
archive of the one before is discarded, whenever that is noticed. An archive that turns out damaged only costs time while
the log is whole beside it. Where the log is dropped below the archive's end (`end_offset` tells how far that may go), it
is the only place that has these events: a damaged one is left as it is then, nothing is added to it, and the log is
dropped no further. So is one that ends before the log begins, as what is added behind a gap would hide it.

Where a metric wants its raw events kept for a time only, files are written again without those whose time is over
(`retention`), and the manifest says how many went.

A copy that begins with a snapshot gets the archive below it from whoever sends that (`lend`, `take_in`): nothing is
archived of a partition meanwhile, and what is lent stays, though it may be merged.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np

from tallymark_protocol.errors import ErrorCode, UnavailableError
from tallymark_runtime.clock import Clock
from tallymark_runtime.disk import Disk, DiskError
from tallymark_runtime.instruments import Histogram
from tallymark_store.archive import incoming, policy, retention
from tallymark_store.archive import manifest as manifests
from tallymark_store.archive.columns import MalformedError, Slice
from tallymark_store.archive.cut import cut
from tallymark_store.archive.home import Home, HomedDisk
from tallymark_store.archive.manifest import ArchiveError, ArchiveFile, Manifest
from tallymark_store.archive.merge import merge, verify
from tallymark_store.archive.names import MetricNames
from tallymark_store.archive.reading import ArchiveReader, ArchiveView
from tallymark_store.archive.writer import Written, write_file
from tallymark_store.checkpointer import folder
from tallymark_store.holding import to_the_end
from tallymark_store.partition import Partition
from tallymark_store.replication.effects import Role
from tallymark_store.scan.archived import ArchiveDamagedError
from tallymark_store.scan.source import RecordCursor, RecordSource, WalSource, damaged
from tallymark_store.store import Offload, Store
from tallymark_store.wal import DamagedError

_log = logging.getLogger(__name__)

POLL_S: Final = 0.25  # how often it is looked whether anything is due
RETRY_S: Final = 10.0  # after the disk refused
SLICE_EVENTS: Final = 500_000  # offsets of a slice, but for a single event batch that is larger
SLICE_BYTES: Final = 32 * 1024 * 1024  # of the log, likewise
SLICE_RECORDS: Final = 32_768
RUN_EVENTS: Final = 65_536  # decoded by one kernel call
RULES_NS: Final = 10_000_000_000  # how often it is looked what is to be dropped
HOME_POLL_S: Final = 5.0  # how often it is looked whether a file is to be copied to its home
TOOK_BOUNDS_NS: Final = tuple(int(seconds * 1e9) for seconds in (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100))


class Planned(NamedTuple):
    """A slice of a log that is ready to be read in a thread."""

    cursor: RecordCursor
    events: int  # offsets that its event batches take
    start_offset: int
    end_offset: int


class Stopped(UnavailableError):
    """The store closes: what was under way is left, and nothing lists it."""

    default_code = ErrorCode.CLOSED


class Archive:
    """The archive of one copy, as far as it is known in memory."""

    def __init__(self, manifest: Manifest, disk: Disk, now_ns: int) -> None:
        self.manifest = manifest
        self.disk = disk
        self.reader = ArchiveReader(disk, manifest.partition)
        # False: which manifest is in force on the disk is not known, and it has to be read again. Reads can rely on the
        # one before all the same: the files that the other one would have removed are kept.
        self.is_certain = True
        self.last_ns = now_ns  # when it was last brought up to date, or opened
        self._names: MetricNames | None = None
        self.rules: dict[int, retention.Rule] = {}  # by uid, what is to be dropped
        self.swept: set[str] = set()  # files that hold nothing of that
        self.due: dict[
            str, retention.Due
        ] = {}  # of files, when to look again: what the manifest doesn't say yet
        self.next_rules_ns = now_ns  # when it is looked again what is to be dropped

    def names(self, partition: Partition) -> MetricNames:
        """The metrics of everything that is folded."""
        schemas = partition.fold.schemas
        if self._names is None or self._names.count != schemas.count:
            self._names = MetricNames(schemas)
        return self._names


class Archiver:
    """Archives the partitions of a store.

    Args:
        store: the driver.
        disk: the folder that holds a folder for each partition.
        clock: what intervals are measured by.
        events: a partition is due when so many offsets have gathered.
        interval_s: or after so long, if there are any.
        report: told, in sentences, what needs attention.
        offload: runs what takes long, or waits for the disk.
        home: where files go that are never merged any more; None: they stay.
        cache: the folder for what is fetched from there.

    Attributes:
        archives: by partition; those that were opened.
        events_archived: since the start.
        merges: files made of others, since the start.
        events_dropped: that were kept for their time, since the start.
        failures: times that something had to be left for later, since the start.
        took_ns: of slices and of merges, from the plan to the manifest's switch.
    """

    def __init__(
        self,
        store: Store,
        disk: Disk,
        clock: Clock,
        *,
        events: int,
        interval_s: float,
        report: Callable[[str], None],
        offload: Offload = asyncio.to_thread,
        home: Home | None = None,
        cache: Disk | None = None,
    ) -> None:
        self.archives: dict[int, Archive] = {}
        self.events_archived = 0
        self.merges = 0
        self.events_dropped = 0
        self.failures = 0
        self.took_ns = Histogram(TOOK_BOUNDS_NS)
        self._store = store
        self._disk = disk
        self._clock = clock
        self._events = events
        self._interval_ns = int(interval_s * 1e9)
        self._report = report
        self._offload = offload
        self._lock = asyncio.Lock()
        self._refused: dict[
            int, str
        ] = {}  # by partition, the copy whose archive is of no use and can't be made anew
        self._why_refused: dict[int, str] = {}
        self._lent: dict[object, tuple[int, frozenset[str]]] = {}  # partition, names of files
        self._taking_in: set[int] = set()  # partitions of which an archive is coming in
        # The same, and the log begins behind what comes in: it is not in force yet.
        self._awaited: set[int] = set()
        self._damaged: dict[int, str] = {}  # by partition, what a read has found
        self._stopping = False
        self._home = home
        if home is not None:
            home.on_evicted = self._evicted
        self._cache = cache
        self._folders: dict[int, Disk] = {}
        self._told: dict[
            int, tuple[Manifest | None, frozenset[str]]
        ] = {}  # by partition, what its home was told last, and which files that lists

    async def run(self) -> None:
        """Archive for ever, whatever is due."""
        while True:
            await asyncio.sleep(POLL_S)
            try:
                await self.take_due()
            except DiskError as error:
                self.failures += 1
                _log.warning("nothing could be archived: %s", error)
                await asyncio.sleep(RETRY_S)
            except Exception:  # the log would grow and grow; never end it in silence
                self.failures += 1
                _log.exception("nothing could be archived")
                await asyncio.sleep(RETRY_S)

    async def run_home(self) -> None:
        """Copy files to their home for ever, once they are final."""
        while True:
            await asyncio.sleep(POLL_S)
            try:
                moved = await self.send_home()
            except DiskError as error:
                self.failures += 1
                _log.warning("nothing could be copied to the archive's home: %s", error)
                await asyncio.sleep(RETRY_S)
            except Exception:
                self.failures += 1
                _log.exception("nothing could be copied to the archive's home")
                await asyncio.sleep(RETRY_S)
            else:
                if not moved:
                    await asyncio.sleep(HOME_POLL_S)

    async def send_home(self) -> int:
        """Copy what is final to its home, a file of each partition; how many that were.

        Nothing of archiving waits for it.

        Raises:
            DiskError: that failed; what is here stays.
        """
        moved = 0
        for number, archive in sorted(self.archives.items()):
            disk = archive.disk
            if not isinstance(disk, HomedDisk):
                continue
            file = next((f for f in archive.manifest.files if not f.at_home and policy.is_full(f)), None)
            if file is not None:
                await self._in_thread(disk.send, file)
                moved += await self._list_at_home(number, archive, file)
            told, names = self._told.get(number, (None, frozenset()))
            manifest = archive.manifest
            at_home = any(f.at_home for f in manifest.files)
            # What a manifest lists whose fate isn't known must not be removed there either.
            is_sure = archive.is_certain and number not in self._taking_in
            if manifest is not told and is_sure and self._is_current(number, archive) and (at_home or names):
                listed = await self._in_thread(disk.tell, manifest, names)
                self._told[number] = manifest, listed
        return moved

    def _evicted(self, number: int, name: str) -> None:
        archive = self.archives.get(number)
        if archive is not None:
            archive.reader.release(name)

    async def _list_at_home(self, number: int, archive: Archive, file: ArchiveFile) -> bool:
        """Say in the manifest that a file is at home, if it still is one of the archive."""
        async with self._lock:
            files = archive.manifest.files
            listed = next((other for other in files if other.has_bytes_of(file)), None)
            if self.archives.get(number) is not archive or listed is None:
                return False
            if not self._is_current(number, archive) or number in self._taking_in:
                return False
            if not archive.is_certain:
                return False  # another manifest may be in force, and files that this one lists may be gone
            at_home = msgspec.structs.replace(listed, at_home=True)
            changed = tuple(at_home if f is listed else f for f in files)
            await self._publish(archive, msgspec.structs.replace(archive.manifest, files=changed))
            return True

    async def take_due(self) -> None:
        """Archive what is due, and merge what is to be merged.

        Raises:
            DiskError: the disk refused; what was archived stays.
        """
        await self._take(self._events, self._interval_ns)

    async def take_all(self) -> None:
        """Archive everything that is committed and folded now, due or not. Raises as `take_due`."""
        await self._take(1, 0)

    async def open_all(self) -> None:
        """Open the archives of all copies, so that reads find them; nothing is archived."""
        async with self._lock:
            for number in sorted(self._store.replicas):
                try:
                    await self._opened(number)
                except DiskError as error:
                    self.failures += 1
                    self._report(f"partition {number}: its archive can't be opened yet: {error}")

    def view(self, number: int) -> ArchiveView | None:
        """The archive of a partition as it is now, to read from; None where there is none."""
        archive = self.archives.get(number)
        if archive is None or not self._is_current(number, archive):
            return None
        return archive.reader.view(archive.manifest)

    def end_offset(self, number: int) -> int:
        """Below this offset a partition's log isn't needed for raw events: the archive has them, durably."""
        archive = self.archives.get(number)
        if archive is None or not self._is_current(number, archive):
            return 0
        return archive.manifest.end_offset

    def problem(self, number: int) -> str:
        """Why a copy's archive is not used, and nothing is added to it; "" where it isn't refused."""
        replica = self._store.replicas.get(number)
        if replica is None or self._refused.get(number) != replica.copy_id:
            return self._damaged.get(number, "")
        return self._why_refused.get(number, "")

    def reopen(self, number: int) -> None:
        """Another manifest was put in the place of a partition's: it is read again, also where the one before was refused."""
        self.archives.pop(number, None)
        self._refused.pop(number, None)
        self._damaged.pop(number, None)

    def damaged(self, number: int, why: str, reader: object = None) -> bool:
        """A read has found that an archive is damaged: nobody shall read it any more.

        False where that was another one than the one there is now: `reader` is the one that has found it, None the
        present one.
        """
        archive = self.archives.get(number)
        if archive is not None and reader is not None and archive.reader is not reader:
            return False
        if self.archives.pop(number, None) is not None:
            self._damaged[number] = why
        return True

    async def _take(self, events: int, interval_ns: int) -> None:
        async with self._lock:
            for number in sorted(self.archives.keys() - self._store.replicas.keys()):
                await self._in_thread(
                    manifests.discard, self.archives.pop(number).disk
                )  # the copy was removed
            for number in sorted(self._store.replicas):
                try:
                    await self._take_partition(number, events, interval_ns)
                except ArchiveError as error:
                    # Found while files were merged.
                    self.archives.pop(number, None)
                    await self._begin_anew(number, str(error))

    # ------------------------------------------------------------ one partition

    async def _take_partition(self, number: int, events: int, interval_ns: int) -> None:
        if number in self._taking_in:
            return
        archive = await self._opened(number)
        target = self._target(number)
        if archive is None or target is None:
            return
        now_ns = self._clock.monotonic_ns()
        waiting = target - archive.manifest.end_offset
        if waiting >= events or (waiting > 0 and now_ns - archive.last_ns >= interval_ns):
            archive.last_ns = now_ns
            while archive.manifest.end_offset < target:
                if not await self._take_slice(number, archive, target):
                    return
        # A long one would hold up others: one, and then it is looked again who is due.
        self._look_at_rules(number, archive, now_ns if interval_ns else archive.next_rules_ns)
        file = self._next_sweep(archive)
        if file is not None and self._is_current(number, archive):
            await self._sweep(number, archive, file)
            return
        chosen = policy.next_merge(archive.manifest.files, archive.manifest.gaps)
        if chosen is not None and self._is_current(number, archive):
            await self._merge(number, archive, *chosen)

    def _target(self, number: int) -> int | None:
        """Up to where a partition may be archived now; None: not at all."""
        partition, replica = self._store.partitions.get(number), self._store.replicas.get(number)
        if partition is None or partition.error is not None:
            return None
        if replica is None or replica.role is Role.DAMAGED or self._store.stopped.is_set():
            return None
        # Others may have been faster to sync: an archive must not know more than the log that it comes from.
        return min(partition.applied, replica.durable_end)

    def _is_current(self, number: int, archive: Archive) -> bool:
        """Whether an archive still is of the copy that is here."""
        replica = self._store.replicas.get(number)
        return replica is not None and replica.copy_id == archive.manifest.copy_id

    async def _opened(self, number: int) -> Archive | None:
        """The archive of the copy that is here; None while there can be none."""
        if self._target(number) is None or number in self._awaited:
            return None
        copy_id = self._store.replicas[number].copy_id
        index = self._store.partitions[number].index
        why = self._damaged.pop(number, None)
        if why is not None:
            await self._begin_anew(number, why)
            return None
        archive = self.archives.get(number)
        if archive is not None and archive.manifest.copy_id == copy_id:
            has_gap = archive.manifest.end_offset < index.log_start
            if has_gap and archive.manifest.files:
                self._refuse_gap(number, archive.manifest)
                return None
            if not has_gap and archive.is_certain:
                return archive
        else:
            self.archives.pop(number, None)
        if self._refused.get(number) == copy_id:
            return None
        disk = self.folder(number)
        try:
            found: Manifest | None = await self._in_thread(
                manifests.load, disk, self._kept(number), self._home is not None
            )
        except ArchiveError as error:
            await self._begin_anew(number, str(error))
            return None
        if found is not None and (found.copy_id != copy_id or found.partition != number):
            await self._in_thread(manifests.discard, disk)
            found = None
        if found is not None and isinstance(disk, HomedDisk):
            await self._in_thread(disk.knows, found.files)
        if self._store.partitions.get(number) is None:
            return None  # the copy was removed while the disk was asked
        index = self._store.partitions[number].index
        if found is not None and found.end_offset < index.log_start:
            if found.files:
                self._refuse_gap(number, found)
                return None
            # There are no events in it that could be lost; what it says of others stays.
            found = _reaching(found, index.log_start) if found.dropped or found.gaps else None
        if found is not None and found.end_offset > self._store.partitions[number].log_end:
            self._refuse(
                number,
                f"it holds more than the log, which ends at offset {self._store.partitions[number].log_end}",
            )
            return None
        # A copy that began with a snapshot has no raw events from before but those that came along, and must not seem to.
        start = index.log_start
        if found is None:
            found = Manifest(number, copy_id, end_offset=start, start_offset=start)
            if start > 0:
                # That is written down, so that it can be told from an archive that got lost.
                await self._in_thread(manifests.publish, disk, found, self._kept(number))
        fresh = Archive(found, disk, self._clock.monotonic_ns())
        await self._in_thread(incoming.clear, disk)  # of a snapshot that was not begun with
        if self._is_current(number, fresh):  # it may have begun anew while the disk was asked
            self.archives[number] = fresh
            return fresh
        return None

    async def _begin_anew(self, number: int, why: str) -> None:
        """An archive is damaged: the log has everything, if it begins where the partition does."""
        self.archives.pop(number, None)
        if self._store.partitions[number].index.log_start > 0:
            self._refuse(number, why)
            return
        self._report(f"partition {number}: archiving from the beginning: {why}")
        await self._in_thread(manifests.discard, self.folder(number))

    def _refuse_gap(self, number: int, manifest: Manifest) -> None:
        start = self._store.partitions[number].index.log_start
        self._refuse(number, f"it ends at offset {manifest.end_offset}, and the log begins at offset {start}")

    def _refuse(self, number: int, why: str) -> None:
        """Leave an archive as it is: it can't be used, and what it holds may be nowhere else."""
        self.failures += 1
        self.archives.pop(number, None)
        replica = self._store.replicas.get(number)
        self._refused[number] = "" if replica is None else replica.copy_id
        self._why_refused[number] = why
        self._report(f"partition {number}: its archive is left as it is, and nothing is added to it: {why}")

    # ------------------------------------------------------------ slices and merges

    async def _take_slice(self, number: int, archive: Archive, target: int) -> bool:
        """Archive the next slice below `target`; False where that ended early."""
        began_ns = self._clock.monotonic_ns()
        partition = self._store.partitions[number]
        if not self._is_current(number, archive) or archive.manifest.end_offset < partition.index.log_start:
            return False  # or a snapshot has taken the log's place: what lies between is not nothing
        source = WalSource(self._store.wal, number)
        planned = plan_slice(source, archive.manifest.end_offset, target)
        if planned is None:
            return False
        try:
            written: ArchiveFile | None = await self._in_thread(
                write_slice, archive.disk, number, archive.names(partition), planned, self._check
            )
        except DamagedError as error:
            if self._is_current(number, archive) and self._store.partitions.get(number) is partition:
                self._store.refuse(partition, error)
            return False
        if not self._is_current(number, archive):
            return False
        files = archive.manifest.files if written is None else (*archive.manifest.files, written)
        await self._publish(
            archive,
            msgspec.structs.replace(archive.manifest, end_offset=planned.end_offset, files=files),
        )
        if written is not None:
            self.events_archived += written.rows
            self.took_ns.observe(self._clock.monotonic_ns() - began_ns)
        return True

    async def _merge(self, number: int, archive: Archive, first: int, last: int) -> None:
        began_ns = self._clock.monotonic_ns()
        files = archive.manifest.files
        merged = await self._in_thread(merge_files, archive.disk, number, files[first:last], self._check)
        if not self._is_current(number, archive):
            return
        files = (*files[:first], merged, *files[last:])
        await self._publish(archive, msgspec.structs.replace(archive.manifest, files=files))
        self.merges += 1
        self.took_ns.observe(self._clock.monotonic_ns() - began_ns)

    def _look_at_rules(self, number: int, archive: Archive, now_ns: int) -> None:
        """See what is to be dropped by now: by log time, and no sooner than by this node's own clock.

        Log time is what some leader's clock said, which may have been wrong; what is gone doesn't come back.
        """
        if now_ns < archive.next_rules_ns:
            return
        archive.next_rules_ns = now_ns + RULES_NS
        partition = self._store.partitions.get(number)
        if partition is None or partition.applied < partition.index.log_start:
            return  # the copy was removed meanwhile, or a snapshot is being put in force
        log_ns = partition.index.append_ns_before(partition.applied)
        found = retention.rules(partition.fold.schemas, min(log_ns, self._clock.now_ns()))
        if found != archive.rules:
            archive.rules, archive.swept = found, set()

    @staticmethod
    def _next_sweep(archive: Archive) -> ArchiveFile | None:
        """A file that may hold something that is to be dropped."""
        if not archive.rules:
            return None
        for file in archive.manifest.files:
            if file.name in archive.swept:
                continue
            due = archive.due.get(file.name, file.due)
            if retention.is_due(msgspec.structs.replace(file, due=due), archive.rules):
                return file
            archive.swept.add(file.name)
        return None

    async def _sweep(self, number: int, archive: Archive, file: ArchiveFile) -> None:
        """Drop what is to be dropped of a file, and write down what that was, in one step."""
        began_ns = self._clock.monotonic_ns()
        metadata = _metadata(number, file.start_offset, file.end_offset)
        rules = archive.rules
        try:
            swept: retention.Swept = await self._in_thread(
                retention.sweep, archive.disk, file, rules, metadata, self._check
            )
        except DiskError as error:
            if not file.at_home:
                raise
            # Its home can't be reached: it is for the next time, and nothing else waits for it.
            self.failures += 1
            _log.warning("nothing could be dropped of a file at the archive's home: %s", error)
            archive.swept.add(file.name)
            archive.rules = {}  # what goes is looked for anew
            return
        if not self._is_current(number, archive):
            return
        if swept.dropped:
            place = archive.manifest.files.index(file)
            left = () if swept.file is None else (swept.file,)
            files = (*archive.manifest.files[:place], *left, *archive.manifest.files[place + 1 :])
            dropped = manifests.added(archive.manifest.dropped, swept.dropped)
            await self._publish(
                archive, msgspec.structs.replace(archive.manifest, files=files, dropped=dropped)
            )
            self.events_dropped += sum(item.events for item in swept.dropped)
            if swept.file is not None:
                self.took_ns.observe(self._clock.monotonic_ns() - began_ns)
        elif swept.due != file.due:
            # With the next manifest; until then it costs no more than to look once again, after a start.
            archive.due[file.name] = swept.due
        if swept.file is not None and rules is archive.rules:
            archive.swept.add(swept.file.name)

    async def _publish(self, archive: Archive, manifest: Manifest) -> None:
        names = {file.name for file in manifest.files}
        if archive.due:
            files = tuple(
                msgspec.structs.replace(file, due=archive.due.get(file.name, file.due))
                for file in manifest.files
            )
            manifest = msgspec.structs.replace(manifest, files=files)
        # Whoever begins to read while the manifest is switched finds what is removed by then.
        try:
            archive.reader.keep([file for file in archive.manifest.files if file.name not in names])
        except ArchiveDamagedError as error:
            raise ArchiveError(error.message) from error
        archive.is_certain = False
        disk = archive.disk
        kept = self._kept(archive.manifest.partition)
        await self._in_thread(manifests.publish, archive.disk, manifest, kept)
        archive.manifest = manifest
        archive.due.clear()
        archive.is_certain = True
        archive.reader.switch(manifest)
        if isinstance(disk, HomedDisk):
            await self._in_thread(disk.knows, manifest.files)
            disk.lists_only(manifest.files)

    # ------------------------------------------------------------ snapshots

    def _kept(self, number: int) -> frozenset[str]:
        return frozenset().union(*(names for lent, names in self._lent.values() if lent == number))

    async def lend(self, who: object, number: int, offset: int) -> Manifest | None:
        """Have a partition archived up to a committed offset, and keep the files below until `give_back`.

        They have been looked at. None where this copy has no archive that holds all of it.

        Raises:
            DiskError: the disk refused.
            UnavailableError: not now.
        """
        async with self._lock:
            archive = None if number in self._taking_in else await self._opened(number)
            if archive is None:
                replica = self._store.replicas.get(number)
                if replica is not None and self._refused.get(number) == replica.copy_id:
                    return None
                raise UnavailableError(f"partition {number} has no archive at present")
            target = self._target(number) or 0
            while archive.manifest.end_offset < offset:
                if target < offset or not await self._take_slice(number, archive, target):
                    raise UnavailableError(f"partition {number} can't be archived up to offset {offset}")
            files = [file for file in archive.manifest.files if file.start_offset < offset]
            self._lent[who] = number, frozenset(file.name for file in files)
            manifest = archive.manifest
        try:
            for file in files:
                await self._in_thread(verify, archive.disk, file)
        except ArchiveError as error:
            self.give_back(who)
            async with self._lock:
                if self.archives.get(number) is archive:
                    del self.archives[number]
                    await self._begin_anew(number, str(error))
            raise UnavailableError(f"partition {number}: {error}") from error
        except BaseException:
            self.give_back(who)
            raise
        return manifest

    def give_back(self, who: object) -> None:
        """What was lent is not needed any more; nothing where nothing is."""
        self._lent.pop(who, None)

    def folder(self, number: int) -> Disk:
        """Where a partition's archive is."""
        found = self._folders.get(number)
        if found is None:
            found = self._disk.at(folder(number))
            if self._home is not None:
                assert self._cache is not None, "what has a home is fetched from there"
                found = HomedDisk(found, self._cache.at(folder(number)), self._home, number)
            self._folders[number] = found
        return found

    @contextlib.asynccontextmanager
    async def taking_in(self, number: int) -> AsyncIterator[None]:
        """Archive nothing of a partition for the time of a block, in which an archive comes in."""
        async with self._lock:
            self._taking_in.add(number)
        try:
            yield
        finally:
            self._taking_in.discard(number)

    async def missing(self, number: int, manifest: Manifest, offset: int) -> list[int]:
        """Which files of an archive that is offered are to be fetched: their places. Raises DiskError.

        What that archive lacks, and this copy's log has, is archived before the log is gone.
        """
        await self._save(number, max([high for _, high in incoming.holes(manifest, offset)], default=0))
        return list(await self._in_thread(incoming.plan, self.folder(number), manifest, offset))

    async def take_in(self, number: int, manifest: Manifest, offset: int) -> None:
        """Make an archive of the files that have come in, for this copy, to be put in force by `install`.

        Raises:
            ArchiveError: they are not what was offered.
            DiskError: the disk refused.
        """
        copy_id = self._store.replicas[number].copy_id
        made = await self._in_thread(
            complete_incoming, self.folder(number), manifest, copy_id, offset, self._check
        )
        if made.gaps:
            ranges = ", ".join(f"{start} up to {end}" for start, end in made.gaps)
            self._report(
                f"partition {number}: the archive that came with the snapshot of offset {offset} begins at offset "
                f"{manifest.start_offset}; this copy keeps what it has from before, and neither has offsets {ranges}"
            )

    async def _save(self, number: int, end: int) -> None:
        """Archive what a log has below an offset, as far as that is committed, before it is gone."""
        async with self._lock:
            archive = await self._opened(number) if end else None
            target = min(self._target(number) or 0, end)
            while archive is not None and archive.manifest.end_offset < target:
                if not await self._take_slice(number, archive, target):
                    break

    async def take_none(self, number: int, offset: int) -> None:
        """A snapshot brings no archive: what this copy's log has is archived, and what a try before has left goes.

        Raises:
            DiskError: the disk refused.
        """
        await self._save(number, offset)
        await self._in_thread(incoming.clear, self.folder(number))

    def replaced(self, number: int) -> None:
        """The log begins with a snapshot from now on: its archive is in force once `install` says so."""
        archive = self.archives.get(number)
        if archive is not None:
            # Who reads it at present goes on with what will be removed.
            with contextlib.suppress(ArchiveDamagedError):
                archive.reader.keep(archive.manifest.files)
        self.reopen(number)
        self._awaited.add(number)

    def forget(self, number: int) -> None:
        """The copy has been discarded, and whatever came in for it is of no use."""
        self._awaited.discard(number)

    async def install(self, number: int, offset: int) -> None:
        """Put the archive in force that came in with the snapshot that the log begins with, if there is one.

        Raises:
            DiskError: the disk refused; call it again.
        """
        async with self._lock:
            if number not in self._awaited:
                return
            disk = self.folder(number)
            try:
                await self._in_thread(incoming.finish, disk, number, offset, self._kept(number))
            except ArchiveError as error:
                await self._in_thread(incoming.clear, disk)
                self.failures += 1
                self._report(f"partition {number}: the archive that had come in is left out: {error}")
            self._awaited.discard(number)
            await self._opened(number)

    # ------------------------------------------------------------ threads

    def _stop(self) -> None:
        self._stopping = True

    def _check(self) -> None:
        """Called in the thread between pieces of work."""
        if self._stopping:
            raise Stopped("the store closes")

    async def _in_thread(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run what takes long; when this is cancelled, only after it has ended. Raises `Stopped` where another is.

        A thread that went on beyond the store's end would write into a folder that is another process's by then.
        """
        return await to_the_end(self._offload(function, *args), self._stop)


def _reaching(manifest: Manifest, log_start: int) -> Manifest:
    """An archive without files that ends before the log begins: it goes on there, and says what it lacks in between."""
    gap = manifest.end_offset, log_start
    before = manifest.gaps
    if before and before[-1][1] == gap[0]:
        gap, before = (before[-1][0], log_start), before[:-1]
    return msgspec.structs.replace(manifest, end_offset=log_start, gaps=(*before, gap))


def plan_slice(source: RecordSource, start: int, target: int) -> Planned | None:
    """Choose and pin the records of the next slice of [start, target); None where there is none.

    To be called where the log's index may be read. Whoever has the plan may read it in any thread, once.
    """
    window_end = min(start + SLICE_EVENTS, target)
    rows = source.rows(start, window_end)
    ends = rows.base_offset + rows.event_count
    fits = int((ends <= target).sum())  # ends rise
    taken = min(fits, SLICE_RECORDS, max(int((rows.length.cumsum() <= SLICE_BYTES).sum()), 1))
    end = int(rows.base_offset[taken]) if taken < len(ends) else max([window_end, *ends[-1:].tolist()])
    if end <= start:
        return None
    kept = np.zeros(len(ends), np.bool_)
    kept[:taken] = True
    cursor = RecordCursor(source, rows.take(kept))
    return Planned(cursor, int(rows.event_count[:taken].sum()), start, end)


def write_slice(
    disk: Disk,
    partition: int,
    names: MetricNames,
    planned: Planned,
    check: Callable[[], None] = lambda: None,
) -> ArchiveFile | None:
    """Write a planned slice to a file, durable in content; None where no event was accepted.

    Raises:
        DamagedError: a record of the log can't be read.
        DiskError: the disk refused.
    """
    taken = Slice(partition, names, planned.events)
    while (run := planned.cursor.next_run(RUN_EVENTS)) is not None:
        check()
        try:
            taken.take(*run)
        except MalformedError as error:
            raise damaged(partition, planned.cursor.segment, error.body, str(error)) from error
    if not taken.rows:
        return None
    table = taken.table()
    check()
    name = manifests.file_name(planned.start_offset, planned.end_offset)
    metadata = _metadata(partition, planned.start_offset, planned.end_offset)
    written = write_file(disk, name, table, metadata)
    times = table.column("time_ns").to_numpy()
    return _listed(
        name, planned.start_offset, planned.end_offset, written, int(times.min()), int(times.max())
    )


def merge_files(
    disk: Disk, partition: int, files: tuple[ArchiveFile, ...], check: Callable[[], None] = lambda: None
) -> ArchiveFile:
    """Write one file of several, durable in content. Raises as `merge.merge`."""
    start, end = files[0].start_offset, files[-1].end_offset
    name = manifests.file_name(start, end)
    written = merge(disk, files, name, _metadata(partition, start, end), check)
    low, high = min(file.min_time_ns for file in files), max(file.max_time_ns for file in files)
    return _listed(name, start, end, written, low, high)


def complete_incoming(
    disk: Disk, offered: Manifest, copy_id: str, offset: int, check: Callable[[], None] = lambda: None
) -> Manifest:
    """Make an archive that ends at `offset` of offered files, which are here, and note durably that it is whole.

    Where what is offered has nothing, what this copy has archived itself is kept.

    Raises:
        ArchiveError: a file is not what was offered.
        DiskError: the disk refused.
    """
    own = incoming.own_archive(disk, offered.partition, copy_id)
    if own is not None and isinstance(disk, HomedDisk):
        disk.knows(own.files)
    known = {} if own is None else {file.name: file for file in own.files}
    files = []
    for file in offered.files:
        if file.start_offset >= offset:
            break
        file = msgspec.structs.replace(file, at_home=False)  # the sender's home is another one
        staged = incoming.staged_name(file.name)
        if file.end_offset <= offset:
            if not incoming.is_sound(disk, staged, file):
                if not incoming.is_sound(disk, file.name, file):
                    raise ArchiveError(f"the archive's file {file.name} is not what was offered")
                file = known.get(file.name, file)  # which may be at home
            files.append(file)
            continue
        if not incoming.is_sound(disk, staged, file):
            raise ArchiveError(f"the archive's file {file.name} is not what was offered")
        name = incoming.staged_name(manifests.file_name(file.start_offset, offset))
        metadata = _metadata(offered.partition, file.start_offset, offset)
        head = cut(disk, staged, file, offset, name, metadata, check)
        files += [] if head is None else [head]
        disk.remove(staged)
    lost: list[incoming.Part] = []
    for part in () if own is None else incoming.own_parts(own, offered, offset):
        check()
        try:
            files += _own_part(disk, offered.partition, part, check)
        except ArchiveError:
            lost.append(part)
    files.sort(key=lambda file: file.start_offset)
    made = incoming.owned(incoming.joined(offered, own, lost, offset), copy_id, offset, tuple(files))
    incoming.complete(disk, made)
    return made


def _own_part(
    disk: Disk, partition: int, part: incoming.Part, check: Callable[[], None]
) -> list[ArchiveFile]:
    """A file of this copy's own archive, as far as it is kept: none where nothing of it is. Raises ArchiveError."""
    file, first, last = part
    if not incoming.is_sound(disk, file.name, file):
        raise ArchiveError(f"the archive's file {file.name} is damaged")
    if (first, last) == (file.start_offset, file.end_offset):
        return [file]
    name = incoming.staged_name(manifests.file_name(first, last))
    made = cut(disk, file.name, file, last, name, _metadata(partition, first, last), check, first=first)
    return [] if made is None else [made]


def _metadata(partition: int, start: int, end: int) -> dict[str, str]:
    return {
        "tallymark.partition": str(partition),
        "tallymark.start_offset": str(start),
        "tallymark.end_offset": str(end),
    }


def _listed(name: str, start: int, end: int, written: Written, low: int, high: int) -> ArchiveFile:
    return ArchiveFile(
        name=name,
        start_offset=start,
        end_offset=end,
        rows=written.rows,
        bytes=written.size,
        crc32c=written.crc32c,
        min_time_ns=low,
        max_time_ns=high,
        tail_bytes=written.tail_bytes,
        tail_crc32c=written.tail_crc32c,
    )
