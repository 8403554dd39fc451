"""REPLICAS: what the copies of a store must never forget besides their logs.

For each partition with a copy here: its copy id, the highest promise, and a high watermark known when it was written
(`DurableState`); and the id of the log that they lie in: a log that was lost and begun anew is another one. `save`
returns when all that is durable, and is called before any message that relies on it.

The file is made once, with room for all that may ever be in it, and holds two slots of `SLOT_BYTES`. A save writes
the first slot, syncs, and writes the second: so a full disk keeps nobody from making a promise, and at any moment one
of the two is whole. A slot is, little-endian::

    0   8s   magic "TMREPLC1"       16  u32  length of the body
    8   u64  sequence of the save   20  u32  CRC-32C of [0, 20) and the body
    24       the body, MessagePack: (log id, list of (partition, state))

Reading takes the whole slot with the higher sequence. A first slot that is torn was never relied upon, as the second
had not been written; and where one slot has rotted, the other one holds the same. With neither whole, what was
promised is unknown: every copy here counts as damaged.
"""

from __future__ import annotations

import struct

import google_crc32c
import msgspec

from tallymark_runtime.disk import Disk, File, FileMissingError
from tallymark_store.replication.ports import DurableState

NAME = "REPLICAS"
SLOT_BYTES = 128 * 1024  # room for 256 partitions, with twice the bytes that their states take
_MAGIC = b"TMREPLC1"
_HEAD = struct.Struct("<8sQII")


class ReplicasFileError(Exception):
    """The file is not what was written: no slot of it is whole."""


class _Entry(msgspec.Struct, frozen=True, array_like=True):
    partition: int
    state: DurableState


class _Body(msgspec.Struct, frozen=True, array_like=True):
    log_id: bytes
    entries: list[_Entry]


class ReplicasFile:
    """The file, and what is in it.

    Attributes:
        states: by partition, as they are on disk.
        log_id: of the log that the copies lie in; empty before it was told.
        is_new: there was no such file.
    """

    def __init__(self, disk: Disk) -> None:
        """Open it; it is made with the first `save` where there is none.

        Raises:
            ReplicasFileError: it is damaged.
            DiskError: it cannot be read.
        """
        self._disk = disk
        self._file: File | None = None
        self._sequence = 0
        self.states: dict[int, DurableState] = {}
        self.log_id = b""
        try:
            self._file = disk.open(NAME)
        except FileMissingError:
            self.is_new = True
            return
        self.is_new = False
        found = [_parse(self._file.read(slot * SLOT_BYTES, SLOT_BYTES).tobytes()) for slot in (0, 1)]
        whole = [item for item in found if item is not None]
        if not whole:
            raise ReplicasFileError(f"{NAME} is damaged: what its copies have promised is not known")
        self._sequence, body = max(whole, key=lambda item: item[0])
        self.log_id = body.log_id
        self.states = {entry.partition: entry.state for entry in body.entries}
        if len(whole) < 2 or whole[0][0] != whole[1][0]:
            self._write()  # heal it, while the other slot is whole

    def save(self, partition: int, state: DurableState | None) -> None:
        """Make a partition's state durable; None forgets it.

        Raises:
            DiskError: what is on disk is either the state before or this one.
        """
        before = self.states
        self.states = {**before, partition: state} if state is not None else dict(before)
        if state is None:
            self.states.pop(partition, None)
        try:
            self._write()
        except BaseException:
            self.states = before
            raise

    def save_all(self, states: dict[int, DurableState], log_id: bytes) -> None:
        """Make everything durable at once; see `save`."""
        before = self.states, self.log_id
        self.states, self.log_id = dict(states), log_id
        try:
            self._write()
        except BaseException:
            self.states, self.log_id = before
            raise

    def _write(self) -> None:
        self._sequence += 1
        entries = [_Entry(partition, self.states[partition]) for partition in sorted(self.states)]
        body = msgspec.msgpack.encode(_Body(self.log_id, entries))
        assert _HEAD.size + len(body) <= SLOT_BYTES, "there is room for every partition of a cluster"
        slot = _pack(self._sequence, body)
        if self._file is None:
            self._make(slot)
            return
        self._file.write_sync(0, [slot])
        self._file.write_sync(SLOT_BYTES, [slot])

    def _make(self, slot: bytes) -> None:
        temporary = NAME + ".new"
        file = self._disk.create(temporary)
        padded = slot + bytes(SLOT_BYTES - len(slot))
        file.write(0, [padded, padded])
        file.sync()
        self._disk.rename(temporary, NAME)
        self._disk.sync_dir()
        self._file = file

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _pack(sequence: int, body: bytes) -> bytes:
    head = _HEAD.pack(_MAGIC, sequence, len(body), 0)[:20]
    checksum = int(google_crc32c.extend(google_crc32c.value(head), body))
    return head + checksum.to_bytes(4, "little") + body


def _parse(slot: bytes) -> tuple[int, _Body] | None:
    """A slot's sequence and body; None unless it is whole."""
    if len(slot) < _HEAD.size:
        return None
    magic, sequence, length, checksum = _HEAD.unpack_from(slot)
    body = slot[_HEAD.size : _HEAD.size + length]
    if magic != _MAGIC or len(body) != length:
        return None
    if google_crc32c.extend(google_crc32c.value(slot[:20]), body) != checksum:
        return None
    try:
        return sequence, msgspec.msgpack.decode(body, type=_Body)
    except msgspec.DecodeError:
        return None
