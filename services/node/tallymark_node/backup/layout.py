"""What a backup consists of, and how that is named in its target.

::

    objects/<kind>/<CRC-32C>-<bytes>-<name>    files: named by what is in them, shared by many backups
    backups/<number>.json                      one for each backup, written last: all objects of it, with checksums

A backup is there once its manifest is. The manifest is JSON on one line that ends with the CRC-32C of what stands
before it. Numbers rise; the newest backup is the one with the highest.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import google_crc32c
import msgspec

from tallymark_node.backup.target import Target
from tallymark_protocol.errors import RemoteProtocolError
from tallymark_runtime.catalog import Cluster
from tallymark_runtime.coordinator import KeyValue

FORMAT_VERSION: Final = 1
BACKUPS: Final = "backups"
_CHECK: Final = ',"crc32c":"%08x"}\n'
_CHECK_BYTES: Final = len(_CHECK % 0)


class BackupObject(msgspec.Struct, frozen=True):
    """One object of a backup."""

    object: str  # its name in the target
    name: str  # of the file that it is
    bytes: int
    crc32c: int


class LogPart(msgspec.Struct, frozen=True):
    """A piece of a partition's log: records packed as `tallymark_store.backups` says."""

    object: str
    start: int  # offset
    end: int  # exclusive
    bytes: int
    crc32c: int
    start_epoch: int  # of the record that ends at `start`
    start_append_ns: int
    end_epoch: int  # of the last record
    end_append_ns: int


class PartitionBackup(msgspec.Struct, frozen=True):
    """One partition: its state at one offset."""

    partition: int
    end: int  # exclusive: everything below is in it, nothing above
    checkpoint: bytes  # the manifest of a checkpoint; empty where there is none
    archive: bytes  # the manifest of an archive; empty where there is none
    checkpoint_files: tuple[BackupObject, ...]
    archive_files: tuple[BackupObject, ...]
    log: tuple[LogPart, ...]  # in order, without a gap; empty only where nothing was ever written
    digest: str = ""  # of the state at `end`, if it was asked for
    archive_problem: str = ""  # why its archive was left out, if it was

    @property
    def raw_start(self) -> int:
        """Raw events from this offset on are in it, where its archive was left out."""
        return self.log[0].start if self.log else self.end


class Backup(msgspec.Struct, frozen=True):
    """A backup's manifest."""

    format_version: int
    number: int
    taken_ns: int
    cluster: Cluster
    revision: int  # of the coordinator
    items: BackupObject  # the coordinator's keys, MessagePack
    partitions: tuple[PartitionBackup, ...]

    @property
    def objects(self) -> dict[str, int]:
        """The bytes of all objects, by name."""
        found = {self.items.object: self.items.bytes}
        for partition in self.partitions:
            for item in (*partition.checkpoint_files, *partition.archive_files):
                found[item.object] = item.bytes
            for part in partition.log:
                found[part.object] = part.bytes
        return found

    @property
    def bytes(self) -> int:
        """Of all objects."""
        return sum(self.objects.values())

    @property
    def incomplete(self) -> list[PartitionBackup]:
        """The partitions whose archives were left out."""
        return [partition for partition in self.partitions if partition.archive_problem]


def object_name(kind: str, name: str, crc32c: int, size: int) -> str:
    """The name of an object."""
    return f"objects/{kind}/{crc32c:08x}-{size}-{name}"


def encode_manifest(backup: Backup) -> bytes:
    """A manifest's bytes."""
    body: bytes = msgspec.json.encode(backup)[:-1]
    check: str = _CHECK % google_crc32c.value(body)
    return body + check.encode()


def decode_manifest(data: bytes) -> Backup:
    """A manifest of its bytes.

    Raises:
        RemoteProtocolError: they are damaged, or of another version.
    """
    body = data[:-_CHECK_BYTES]
    if data[-_CHECK_BYTES:] != (_CHECK % google_crc32c.value(body)).encode():
        raise RemoteProtocolError("the backup's manifest is damaged: its checksum doesn't match")
    try:
        backup = msgspec.json.decode(body + b"}", type=Backup)
    except msgspec.DecodeError as error:
        raise RemoteProtocolError(f"the backup's manifest can't be read: {error}") from None
    if backup.format_version != FORMAT_VERSION:
        raise RemoteProtocolError(
            f"the backup has format version {backup.format_version}, not {FORMAT_VERSION}"
        )
    return backup


def manifest_name(number: int) -> str:
    """The name of a backup's manifest."""
    return f"{BACKUPS}/{number:08d}.json"


def numbers(target: Target) -> list[int]:
    """The backups in a target, oldest first."""
    found = [name.removesuffix(".json") for name in target.names(BACKUPS) if name.endswith(".json")]
    return sorted(int(name) for name in found if name.isdecimal())


def load_manifest(target: Target, number: int) -> Backup:
    """A backup's manifest.

    Raises:
        RemoteProtocolError: it is damaged.
        OSError: it can't be read.
    """
    return decode_manifest(b"".join(target.read(manifest_name(number))))


def read_object(target: Target, name: str, size: int, crc32c: int) -> Iterator[bytes]:
    """An object's bytes, piece by piece; the last thing that happens is that they were right.

    Raises:
        RemoteProtocolError: they are not what was written.
        OSError: they can't be read.
    """
    found = crc = 0
    for data in target.read(name):
        found += len(data)
        crc = google_crc32c.extend(crc, data)
        yield data
    if (found, crc) != (size, crc32c):
        raise RemoteProtocolError(
            f"the backup's object {name} is damaged: its length or its checksum is wrong"
        )


def decode_items(data: bytes) -> list[KeyValue]:
    """The coordinator's keys. Raises RemoteProtocolError."""
    try:
        return msgspec.msgpack.decode(data, type=list[KeyValue])
    except msgspec.DecodeError as error:
        raise RemoteProtocolError(f"the coordinator's keys can't be read: {error}") from None
