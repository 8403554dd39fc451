"""An archive's files elsewhere: copied there once they are final, and fetched again, whole, when they are read.

A file is final when it is never merged any more (`policy.is_full`). It is copied to its **home**, a folder or an object
store, read back there, and the manifest then says that it is at home; from then on the copy here is one of a **cache**:
it goes when that is larger than it may be, the one first that wasn't used for longest, and comes back when it is needed. So
nothing changes for whoever reads: `HomedDisk` is the partition's folder with all of its files in it. The manifest itself,
and what isn't final, stays here; nothing that commits, folds or archives waits for the home.

Behind its files, a manifest is copied there, too: of those files up to the first one that isn't there. What neither that
nor the one before lists is removed. A store has a folder of its own there, by its node's id::

    URL/<node id>/p-0003/MANIFEST.json
    URL/<node id>/p-0003/events-<from>-<to>.parquet
"""

from __future__ import annotations

import collections
import errno
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Final, NoReturn

import google_crc32c
import msgspec

from tallymark_runtime.disk import ByteArray, BytesLike, Disk, DiskError, File, FileMissingError
from tallymark_runtime.objects import READ_BYTES, Target
from tallymark_store.archive import manifest as manifests
from tallymark_store.archive.manifest import ArchiveFile, Manifest

_PART: Final = ".part"


def _failed(operation: str, name: str, error: Exception) -> NoReturn:
    raise DiskError(operation, f"{name} at the archive's home ({error})", errno.EIO) from error


class Home:
    """Where the final files of a store are, and how much of them is here.

    Args:
        target: the store's own folder there.
        cache_bytes: of files that are at home, and here.
    """

    def __init__(self, target: Target, cache_bytes: int) -> None:
        self.target = target
        self.fetched_bytes = 0
        # Told, in any thread, which file of which partition goes: a mapping of it would keep its bytes on the disk.
        self.on_evicted: Callable[[int, str], None] = lambda _, __: None
        self._cache_bytes = cache_bytes
        self._lock = threading.Lock()  # of what follows
        # Files here that are at home as well, the one last that was used last: where they are, and their sizes.
        self._here: collections.OrderedDict[tuple[int, str], tuple[Disk, int]] = collections.OrderedDict()
        self._bytes = 0

    def keep(self, number: int, name: str, disk: Disk, size: int) -> None:
        """A file is here as well; others may have to go for it."""
        self.forget(number, name)
        gone = []
        with self._lock:
            self._here[number, name] = disk, size
            self._bytes += size
            while self._bytes > self._cache_bytes and len(self._here) > 1:
                key, (folder, freed) = self._here.popitem(last=False)
                self._bytes -= freed
                gone.append((folder, *key))
        for folder, other, file in gone:
            _remove(folder, file)
            self.on_evicted(other, file)

    def used(self, number: int, name: str) -> None:
        """A file that is here was used."""
        with self._lock:
            if (number, name) in self._here:
                self._here.move_to_end((number, name))

    def forget(self, number: int, name: str) -> None:
        """A file isn't here any more."""
        with self._lock:
            found = self._here.pop((number, name), None)
            if found is not None:
                self._bytes -= found[1]


def _remove(disk: Disk, name: str) -> None:
    try:
        disk.remove(name)
    except FileMissingError:
        return


class HomedDisk:
    """A partition's archive folder, with the files in it that are at home only.

    Args:
        disk: the folder.
        cache: another one, for what is fetched; emptied now.
        home: where the others are.
        number: of the partition.
    """

    def __init__(self, disk: Disk, cache: Disk, home: Home, number: int) -> None:
        self.home = home
        self.number = number
        self._disk = disk
        self._cache = cache
        self._away: dict[str, ArchiveFile] = {}  # files that are at home, as they are listed
        self._fetching = threading.Lock()
        for name in cache.list():
            cache.remove(name)

    def knows(self, files: Iterable[ArchiveFile]) -> None:
        """These are listed: those at home can be opened from now on."""
        names = set(self._disk.list())
        for file in files:
            if not file.at_home:
                continue
            known = self._away.get(file.name)
            if known is not None and known.has_bytes_of(file):
                continue
            if known is not None:  # of a copy that was here before
                _remove(self._cache, file.name)
            self._away[file.name] = file
            if file.name in names:
                self.home.keep(self.number, file.name, self._disk, file.bytes)
            else:
                self.home.forget(self.number, file.name)

    def lists_only(self, files: Iterable[ArchiveFile]) -> None:
        """No others are listed any more."""
        listed = {file.name for file in files}
        for name in [name for name in self._away if name not in listed]:
            del self._away[name]
            self.home.forget(self.number, name)
            _remove(self._cache, name)

    def path(self, name: str) -> str:
        """The name of an object."""
        return f"p-{self.number:04d}/{name}"

    def open(self, name: str) -> File:
        """Open a file, wherever it is."""
        try:
            found = self._disk.open(name)
        except FileMissingError:
            listed = self._away.get(name)
            if listed is None:
                raise
            return _AwayFile(self, listed)
        self.home.used(self.number, name)
        return found

    def fetch(self, listed: ArchiveFile) -> File:
        """Have a file here, and open it.

        Raises:
            DiskError: it can't be had at present, or isn't what was copied there.
        """
        with self._fetching:  # one at a time: who waits for it finds it here
            try:
                found = self._cache.open(listed.name)
            except FileMissingError:
                pass
            else:
                self.home.used(self.number, listed.name)
                return found
            part = listed.name + _PART
            file = self._cache.create(part)
            position = crc = 0
            try:
                for data in self.home.target.read(self.path(listed.name)):
                    file.write(position, [data])
                    position += len(data)
                    crc = google_crc32c.extend(crc, data)
            except DiskError:
                raise
            except (OSError, ValueError) as error:  # pyarrow's errors are both
                _failed("fetch", listed.name, error)
            finally:
                file.close()
            if (position, crc) != (listed.bytes, listed.crc32c):
                self._cache.remove(part)
                raise DiskError("fetch", f"{listed.name}, which is not what was copied there,", errno.EIO)
            self._cache.rename(part, listed.name)
            found = self._cache.open(listed.name)
            self.home.fetched_bytes += position
            self.home.keep(self.number, listed.name, self._cache, listed.bytes)
            return found

    def send(self, file: ArchiveFile) -> None:
        """Copy a file to its home, and look at it there.

        Raises:
            DiskError: that failed; what is there is of no meaning.
        """
        source = self._disk.open(file.name)
        path = self.path(file.name)
        try:
            writer = self.home.target.create(path)
            try:
                for position in range(0, file.bytes, READ_BYTES):
                    writer.write(source.read(position, READ_BYTES).tobytes())
                writer.commit()
            except BaseException:
                writer.abort()
                raise
            size = crc = 0
            for data in self.home.target.read(path):
                size += len(data)
                crc = google_crc32c.extend(crc, data)
        except DiskError:
            raise
        except (OSError, ValueError) as error:
            _failed("copy", file.name, error)
        finally:
            source.close()
        if (size, crc) != (file.bytes, file.crc32c):
            raise DiskError("copy", f"{file.name}, which is not there what it is here,", errno.EIO)

    def tell(self, manifest: Manifest, kept: frozenset[str]) -> frozenset[str]:
        """Copy there what is said of the files at home, and remove all others but for those that are `kept`.

        Returns the names of those that are listed now: to be kept the next time.

        Raises:
            DiskError: that failed; call it again.
        """
        files: list[ArchiveFile] = []
        for file in manifest.files:
            if not file.at_home:
                break
            files.append(file)
        end = files[-1].end_offset if files else manifest.start_offset
        told = msgspec.structs.replace(
            manifest,
            files=tuple(files),
            end_offset=end,
            gaps=tuple(gap for gap in manifest.gaps if gap[1] <= end),
            dropped=manifests.added((), manifests.dropped_within(manifest.dropped, [(0, end)])),
        )
        listed = frozenset(file.name for file in manifest.files if file.at_home)
        try:
            writer = self.home.target.create(self.path(manifests.NAME))
            try:
                writer.write(manifests.encode(told))
                writer.commit()
            except BaseException:
                writer.abort()
                raise
            for name in self.home.target.names(f"p-{self.number:04d}"):
                if name != manifests.NAME and name not in listed and name not in kept:
                    self.home.target.delete(self.path(name))
        except (OSError, ValueError) as error:
            _failed("copy", manifests.NAME, error)
        return listed

    # ------------------------------------------------------------ as the folder has it

    def at(self, folder: str) -> Disk:
        """A folder inside; what is in it is here."""
        return self._disk.at(folder)

    def list(self) -> list[str]:
        """The names of what is here."""
        return self._disk.list()

    def create(self, name: str) -> File:
        """Create a file here."""
        return self._disk.create(name)

    def rename(self, old: str, new: str) -> None:
        """Rename what is here."""
        self._disk.rename(old, new)

    def remove(self, name: str) -> None:
        """Remove what is here."""
        self._disk.remove(name)

    def sync_dir(self) -> None:
        """Make names durable."""
        self._disk.sync_dir()

    def free_bytes(self) -> int:
        """What is free here."""
        return self._disk.free_bytes()

    def lock(self, name: str) -> None:
        """Lock the folder."""
        self._disk.lock(name)

    def unlock(self) -> None:
        """Unlock it."""
        self._disk.unlock()


class _AwayFile:
    """A file at home: its length is known, its bytes are fetched when somebody wants them."""

    def __init__(self, disk: HomedDisk, listed: ArchiveFile) -> None:
        self.name = listed.name
        self._disk = disk
        self._listed = listed
        self._file: File | None = None

    def _here(self) -> File:
        if self._file is None:
            self._file = self._disk.fetch(self._listed)
        return self._file

    def size(self) -> int:
        return self._listed.bytes

    def read(self, position: int, length: int) -> ByteArray:
        return self._here().read(position, length)

    def map(self) -> ByteArray:
        return self._here().map()

    def write(self, position: int, parts: Sequence[BytesLike]) -> None:
        del position, parts
        raise DiskError("write", self.name, errno.EROFS)

    def write_sync(self, position: int, parts: Sequence[BytesLike]) -> None:
        del position, parts
        raise DiskError("write", self.name, errno.EROFS)

    def truncate(self, size: int) -> None:
        del size
        raise DiskError("truncate", self.name, errno.EROFS)

    def sync(self) -> None:
        """Nothing was written."""

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
