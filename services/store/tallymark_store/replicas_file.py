"""REPLICAS: what the copies of a store must never forget besides their logs.

For each partition with a copy here: its copy id, the highest promise, and a high watermark known when it was written
(`DurableState`), and the id of the log that it lies in: a log that was lost and begun anew is another one, and only
copies that are begun after that lie in it. `save` returns when all that is durable, and is called before any message
that relies on it. And how often the store was started, which tells a disk that was put back from a backup.

The file is made once, with room for all that may ever be in it, and holds two slots of `SLOT_BYTES`. A save writes
the first slot, syncs, and writes the second: so a full disk keeps nobody from making a promise, and at any moment one
of the two is whole. A slot is, little-endian::

    0   8s   magic "TMREPLC1"       16  u32  length of the body
    8   u64  sequence of the save   20  u32  CRC-32C of [0, 20) and the body
    24       the body, MessagePack: (log id, life, list of (partition, state, log id of this copy))

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
    log_id: bytes


class _Body(msgspec.Struct, frozen=True, array_like=True):
    log_id: bytes
    life: int
    entries: list[_Entry]


class ReplicasFile:
    """The file, and what is in it.

    Attributes:
        states: by partition, as they are on disk.
        log_id: of the log that new copies lie in; empty before it was told.
        life: how often the store was started on this disk, or on those before it.
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
        self.life = 0
        self._log_ids: dict[int, bytes] = {}  # of the log that a copy was begun in; for each of `states`
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
        self.life = body.life
        self.states = {entry.partition: entry.state for entry in body.entries}
        self._log_ids = {entry.partition: entry.log_id for entry in body.entries}
        if len(whole) < 2 or whole[0][0] != whole[1][0]:
            self._write()  # heal it, while the other slot is whole

    def is_lost(self, partition: int) -> bool:
        """Whether a copy lies in another log than the present one: what it held is gone."""
        return partition in self.states and self._log_ids[partition] != self.log_id

    def use_log(self, log_id: bytes) -> None:
        """Copies that are begun from now on lie in this log; which log the others lie in stays known. See `save`."""
        if log_id != self.log_id:
            self._replace(self.states, log_id)

    def begin_life(self, life: int, states: dict[int, DurableState]) -> None:
        """Count a start, and keep what was found out about the copies at it, in one write. See `save`."""
        before, self.life = self.life, life
        try:
            self.save_all(states)
        except BaseException:
            self.life = before
            raise

    def save(self, partition: int, state: DurableState | None) -> None:
        """Make a partition's state durable; None forgets it. A copy under another id than before is a new one.

        Raises:
            DiskError: what is on disk is either the state before or this one.
        """
        states = dict(self.states)
        if state is None:
            states.pop(partition, None)
        else:
            states[partition] = state
        self._replace(states, self.log_id)

    def save_all(self, states: dict[int, DurableState]) -> None:
        """Make everything durable at once; see `save`."""
        self._replace(dict(states), self.log_id)

    def _replace(self, states: dict[int, DurableState], log_id: bytes) -> None:
        before = self.states, self.log_id, self._log_ids
        self._log_ids = {
            partition: self._log_ids[partition]
            if partition in self.states and self.states[partition].copy_id == state.copy_id
            else log_id
            for partition, state in states.items()
        }
        self.states, self.log_id = states, log_id
        try:
            self._write()
        except BaseException:
            self.states, self.log_id, self._log_ids = before
            raise

    def _write(self) -> None:
        self._sequence += 1
        entries = [
            _Entry(partition, self.states[partition], self._log_ids[partition])
            for partition in sorted(self.states)
        ]
        body = msgspec.msgpack.encode(_Body(self.log_id, self.life, entries))
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
