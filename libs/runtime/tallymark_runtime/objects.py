"""Where backups and archives lie: a folder, or whatever `pyarrow.fs` reaches by a URL, such as an S3-compatible store.

A target holds named objects, which are written whole and never changed. An object that is there is complete: in a
folder it is written under another name, synced and renamed; an object store shows what was closed only.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Protocol

from tallymark_protocol.errors import InvalidRequestError

READ_BYTES: Final = 4 * 1024 * 1024


class Writer(Protocol):
    """An object in the making."""

    def write(self, data: bytes) -> None:
        """Add to it."""
        ...

    def commit(self) -> None:
        """Have it there, durably, under its name."""
        ...

    def abort(self) -> None:
        """Leave nothing of it."""
        ...


class Target(Protocol):
    """Objects by name; a name has folders, separated by slashes. All calls may wait for a disk or a network."""

    def size(self, name: str) -> int | None:
        """How long an object is; None where there is none."""
        ...

    def create(self, name: str) -> Writer:
        """Begin an object."""
        ...

    def read(self, name: str) -> Iterator[bytes]:
        """An object's bytes, piece by piece. Raises OSError."""
        ...

    def names(self, folder: str) -> list[str]:
        """The names of the objects in a folder, without it, sorted; none where there is no such folder."""
        ...

    def delete(self, name: str) -> None:
        """Remove an object, if it is there. Raises OSError."""
        ...


def open_target(place: str, inside: str = "") -> Target:
    """The target that a command or a setting names, or a folder inside of it.

    Raises:
        InvalidRequestError: it names none.
    """
    if "://" not in place:
        return FolderTarget(Path(place) / inside)
    if place.startswith("file://"):
        return FolderTarget(Path(place.removeprefix("file://")) / inside)
    return ArrowTarget(place, inside)


class FolderTarget:
    """A folder of this machine."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def size(self, name: str) -> int | None:
        """How long an object is."""
        path = self._root / name
        return path.stat().st_size if path.is_file() else None

    def create(self, name: str) -> Writer:
        """Begin an object."""
        return _FolderWriter(self._root / name)

    def read(self, name: str) -> Iterator[bytes]:
        """An object's bytes."""
        with (self._root / name).open("rb") as file:
            while data := file.read(READ_BYTES):
                yield data

    def names(self, folder: str) -> list[str]:
        """The names in a folder."""
        path = self._root / folder
        if not path.is_dir():
            return []
        return sorted(entry.name for entry in path.iterdir() if entry.is_file())

    def delete(self, name: str) -> None:
        """Remove an object."""
        (self._root / name).unlink(missing_ok=True)


class _FolderWriter:
    def __init__(self, path: Path) -> None:
        self._path = path
        for folder in reversed([path.parent, *path.parent.parents]):
            if not folder.exists():
                folder.mkdir(exist_ok=True)
                _sync_folder(folder.parent)
        self._temporary = path.with_name(f".{path.name}.new")
        self._file = self._temporary.open("wb")

    def write(self, data: bytes) -> None:
        self._file.write(data)

    def commit(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._temporary.replace(self._path)
        _sync_folder(self._path.parent)

    def abort(self) -> None:
        self._file.close()
        self._temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class ArrowTarget:
    """What a URL names, by `pyarrow.fs`."""

    def __init__(self, url: str, inside: str = "") -> None:
        import pyarrow as pa
        from pyarrow import fs

        try:
            self._fs, base = fs.FileSystem.from_uri(url)
        except (pa.ArrowInvalid, OSError) as error:
            raise InvalidRequestError(f"{url!r} is no place for objects: {error}") from None
        self._base = "/".join(part for part in (base.rstrip("/"), inside) if part)  # a URL may end in options
        self._selector = fs.FileSelector
        self._types = fs.FileType

    def _path(self, name: str) -> str:
        return f"{self._base}/{name}"

    def size(self, name: str) -> int | None:
        """How long an object is."""
        info = self._fs.get_file_info(self._path(name))
        return int(info.size) if info.type == self._types.File else None

    def create(self, name: str) -> Writer:
        """Begin an object."""
        path = self._path(name)
        self._fs.create_dir(path.rpartition("/")[0], recursive=True)
        return _ArrowWriter(self._fs, path)

    def read(self, name: str) -> Iterator[bytes]:
        """An object's bytes."""
        with self._fs.open_input_stream(self._path(name)) as stream:
            while data := stream.read(READ_BYTES):
                yield bytes(data)

    def names(self, folder: str) -> list[str]:
        """The names in a folder."""
        found = self._fs.get_file_info(self._selector(self._path(folder), allow_not_found=True))
        return sorted(info.base_name for info in found if info.type == self._types.File)

    def delete(self, name: str) -> None:
        """Remove an object."""
        if self.size(name) is not None:
            self._fs.delete_file(self._path(name))


class _ArrowWriter:
    def __init__(self, filesystem: Any, path: str) -> None:
        self._fs = filesystem
        self._path = path
        # Object stores show nothing before it is closed, and can't rename; everything else can.
        self._shows_early = filesystem.type_name not in {"s3", "gcs", "abfs"}
        self._writes_to = f"{path}.new" if self._shows_early else path
        self._parts: list[bytes] = []
        self._stream = filesystem.open_output_stream(self._writes_to) if self._shows_early else None

    def write(self, data: bytes) -> None:
        if self._stream is None:
            # Opened late: what is never committed then leaves nothing at all.
            self._stream = self._fs.open_output_stream(self._writes_to)
        self._stream.write(data)

    def commit(self) -> None:
        if self._stream is None:
            self._stream = self._fs.open_output_stream(self._writes_to)
        self._stream.close()
        if self._shows_early:
            self._fs.move(self._writes_to, self._path)

    def abort(self) -> None:
        if self._stream is None:
            return
        self._stream.close()
        self._fs.delete_file(self._writes_to)
