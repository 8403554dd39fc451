"""A file of remembered event ids: written once, sorted by key, mapped, looked up batch-wise.

Little-endian, in pages of 4 KiB::

    0     8 bytes  magic "TMKIDS01"
    8     i64      from, of the offsets that the file covers
    16    i64      to, exclusive
    24    u64      entries
    32    u64      words of the filter
    40    u32      CRC-32C of the index
    44    zeros
    4092  u32      CRC-32C of the page up to here
    4096  entries  key lo, key hi, fingerprint, offset; by key lo; the last block filled up with zeros
          index    u64 the first key lo of each block of entries
                   u32 the CRC-32C of each block
                   u64 the filter's words

The index is in memory while a file is open; blocks are read where they are mapped, and each is checked when it is needed
for the first time. All that is wrong with a file raises `IdFileError`, and nothing that is read from a damaged block ever
counts.
"""

from __future__ import annotations

import contextlib
import mmap
import struct
from collections.abc import Sequence
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt

from tallymark_runtime.disk import Disk, File, FileMissingError
from tallymark_store.dedup import file_kernels as kernels

ENTRY_DTYPE = np.dtype([("lo", "<u8"), ("hi", "<u8"), ("fingerprint", "<u8"), ("offset", "<i8")])
"""One remembered event id, as checkpoints carry it."""

PAGE_BYTES = 4_096
BITS_PER_ID = 16
MERGE_BLOCKS = 4_096  # of entries, that a step of a merge takes in
_ENTRY_BYTES = ENTRY_DTYPE.itemsize
_MAGIC = b"TMKIDS01"
_HEAD = struct.Struct("<8sqqQQI")
_CRC = struct.Struct("<I")
_WRITE_BYTES = 4 * 1024 * 1024  # between two syncs, so that ingest's own get between
_COUNT_MAX = 1 << 40

U64 = npt.NDArray[np.uint64]
U32 = npt.NDArray[np.uint32]
I64 = npt.NDArray[np.int64]
U8 = npt.NDArray[np.uint8]

assert kernels.BLOCK_ENTRIES * _ENTRY_BYTES == PAGE_BYTES


class IdFileError(Exception):
    """A file of event ids is missing or damaged; the message says which and how."""


class IdFile:
    """An open id file. `open_id_file` makes one.

    Attributes:
        start: of the offsets that it covers, [start, end).
        end: exclusive.
        count: entries in it.
    """

    def __init__(
        self,
        disk: Disk,
        name: str,
        *,
        start: int,
        end: int,
        count: int,
        entries: U64,
        fences: U64,
        checksums: U32,
        bits: U64,
    ) -> None:
        self._disk = disk
        self.name = name
        self.start = start
        self.end = end
        self.count = count
        self._entries = entries  # mapped; whole blocks
        self._fences = fences
        self._checksums = checksums
        self._bits = bits
        self._verified: U8 = np.zeros(len(fences), dtype=np.uint8)

    @property
    def memory_bytes(self) -> int:
        """Bytes of memory that it takes; what is mapped is not counted."""
        return self._fences.nbytes + self._checksums.nbytes + self._bits.nbytes + self._verified.nbytes

    @property
    def fences(self) -> U64:
        """The first key lo of each block."""
        return self._fences

    def judge(
        self,
        keys_lo: U64,
        keys_hi: U64,
        fingerprints: U64,
        wants: U8,
        floor_offset: int,
        verdict: U8,
        original: I64,
        chosen: I64,
    ) -> None:
        """Judge the wanted events whose ids have an entry here at or above the floor, and take their wishes away.

        `chosen` is room for as many numbers as there are events.

        Raises:
            IdFileError: a block is damaged; some of the events may have been judged.
        """
        many = int(kernels.pass_filter(self._bits, keys_lo, keys_hi, wants, chosen))
        if not many:
            return
        blocks = np.empty(many, dtype=np.int64)
        kernels.locate(self._fences, keys_lo, chosen, many, blocks)
        for block in np.unique(blocks[self._verified[blocks] == 0]).tolist():
            self.verify(block, block + 1)
        done = 0
        while done < many:
            done, block = kernels.judge_found(
                self._entries,
                self.count,
                self._fences,
                blocks,
                self._verified,
                keys_lo,
                keys_hi,
                fingerprints,
                wants,
                chosen,
                done,
                many,
                floor_offset,
                verdict,
                original,
            )
            if block >= 0:  # rare: keys that share their first half go on in the next
                self.verify(block, block + 1)

    def verify(self, first: int, end: int) -> None:
        """See that blocks are as they were written.

        Raises:
            IdFileError: one isn't.
        """
        raw = self._entries.view(np.uint8)
        for block in range(first, end):
            if self._verified[block]:
                continue
            part = raw[block * PAGE_BYTES : (block + 1) * PAGE_BYTES]
            if google_crc32c.value(part) != self._checksums[block]:
                raise IdFileError(f"checkpoint file {self.name}: block {block} of its event ids is damaged")
            self._verified[block] = 1

    def entries(self) -> npt.NDArray[Any]:
        """All entries, as `ENTRY_DTYPE`, verified, copied.

        Raises:
            IdFileError: the file is damaged.
        """
        self.verify(0, len(self._fences))
        out = np.empty(self.count, dtype=ENTRY_DTYPE)
        out.view(np.uint64)[:] = self._entries[: self.count * kernels.ENTRY_WORDS]
        return out

    def reader(self) -> File:
        """The file itself, to be closed by the caller.

        Raises:
            IdFileError: it is gone.
        """
        try:
            return self._disk.open(self.name)
        except FileMissingError:
            raise IdFileError(f"checkpoint file {self.name} is missing") from None

    def between(self, reader: File, low: int, past: int) -> U64:
        """The words of the entries with `low <= key lo < past`, read and verified.

        Raises:
            IdFileError: one of their blocks is damaged.
        """
        # Not by the mapping: that takes a fault for every page, and waits for the disk with the interpreter's lock.
        first = max(int(self._fences.searchsorted(np.uint64(low), side="left")) - 1, 0)
        end = len(self._fences)
        if past <= 2**64 - 1:
            end = max(int(self._fences.searchsorted(np.uint64(past), side="left")), first)
        raw = reader.read(PAGE_BYTES * (1 + first), PAGE_BYTES * (end - first))
        for block in range(first, end):
            part = raw[(block - first) * PAGE_BYTES : (block - first + 1) * PAGE_BYTES]
            if google_crc32c.value(part) != self._checksums[block]:
                raise IdFileError(f"checkpoint file {self.name}: block {block} of its event ids is damaged")
        words = raw.view(np.uint64)
        keys = words[:: kernels.ENTRY_WORDS][: self.count - first * kernels.BLOCK_ENTRIES]
        at = int(keys.searchsorted(np.uint64(low), side="left"))
        to = len(keys)
        if past <= 2**64 - 1:
            to = int(keys.searchsorted(np.uint64(past), side="left"))
        return words[at * kernels.ENTRY_WORDS : to * kernels.ENTRY_WORDS]

    def digest(self, low: int, past: int) -> tuple[int, int]:
        """The sums that an index's digest is made of, of the entries with `low <= offset < past`.

        Raises:
            IdFileError: the file is damaged.
        """
        self.verify(0, len(self._fences))
        a, b = kernels.digest(self._entries, self.count, low, past)
        return int(a), int(b)


def open_id_file(disk: Disk, name: str, start: int, end: int) -> IdFile:
    """Open the file that covers [start, end).

    Raises:
        IdFileError: it is missing, covers other offsets, or its header or index is damaged.
    """
    try:
        file = disk.open(name)
    except FileMissingError:
        raise IdFileError(f"checkpoint file {name} is missing") from None
    try:
        size = file.size()
        mapped = file.map() if size >= PAGE_BYTES else np.zeros(0, dtype=np.uint8)
        head = mapped[:PAGE_BYTES].tobytes()
        if head[: len(_MAGIC)] != _MAGIC:
            raise IdFileError(f"checkpoint file {name} holds no event ids")
        if _CRC.unpack(head[-_CRC.size :])[0] != google_crc32c.value(head[: -_CRC.size]):
            raise IdFileError(f"checkpoint file {name}: its header is damaged")
        _, found_start, found_end, count, words, index_crc = _HEAD.unpack(head[: _HEAD.size])
        if (found_start, found_end) != (start, end):
            raise IdFileError(f"checkpoint file {name} holds the ids of [{found_start}, {found_end})")
        blocks = -(-count // kernels.BLOCK_ENTRIES)
        index_at = PAGE_BYTES + blocks * PAGE_BYTES
        index_bytes = 12 * blocks + 8 * words
        if (
            not 0 < count <= _COUNT_MAX
            or not words
            or words % kernels.LINE_WORDS
            or size != index_at + index_bytes
        ):
            raise IdFileError(f"checkpoint file {name} has {size} bytes, which is not its length")
        raw = file.read(index_at, index_bytes)
        if len(raw) != index_bytes or google_crc32c.value(raw) != index_crc:
            raise IdFileError(f"checkpoint file {name}: its index is damaged")
    finally:
        file.close()
    _advise_random(mapped)
    fences = raw[: 8 * blocks].view(np.uint64).copy()
    checksums = raw[8 * blocks : 12 * blocks].view(np.uint32).copy()
    bits = _zeroed(words)
    bits.view(np.uint8)[:] = raw[12 * blocks :]
    return IdFile(
        disk,
        name,
        start=start,
        end=end,
        count=count,
        entries=mapped[PAGE_BYTES:index_at].view(np.uint64),
        fences=fences,
        checksums=checksums,
        bits=bits,
    )


class _Writer:
    """Writes a file from entries that come in the order of their keys, piece by piece.

    `capacity` is how many will come at most.
    """

    def __init__(self, disk: Disk, name: str, *, start: int, end: int, capacity: int) -> None:
        self.count = 0
        self._range = (start, end)
        words = -(-capacity * BITS_PER_ID // (64 * kernels.LINE_WORDS)) * kernels.LINE_WORDS
        self._bits = _zeroed(max(words, kernels.LINE_WORDS))
        self._fences: list[U64] = []
        self._checksums: list[int] = []
        self._rest: U64 = np.zeros(0, dtype=np.uint64)  # less than a block
        self._unsynced = 0
        self._position = PAGE_BYTES
        self._file: File = disk.create(name)

    def add(self, words: U64) -> None:
        """Write entries that follow those before. They may be changed afterwards."""
        self.count += len(words) // kernels.ENTRY_WORDS
        kernels.fill_filter(self._bits, words, len(words) // kernels.ENTRY_WORDS)
        if len(self._rest):
            words = np.concatenate([self._rest, words])
        block_words = kernels.BLOCK_ENTRIES * kernels.ENTRY_WORDS
        whole = len(words) // block_words * block_words
        self._rest = words[whole:].copy()
        self._write_blocks(words[:whole])

    def _write_blocks(self, words: U64) -> None:
        block_words = kernels.BLOCK_ENTRIES * kernels.ENTRY_WORDS
        self._fences.append(words[::block_words].copy())
        raw = words.view(np.uint8)
        self._checksums += [
            google_crc32c.value(raw[at : at + PAGE_BYTES]) for at in range(0, len(raw), PAGE_BYTES)
        ]
        self._write(raw)

    def _write(self, raw: U8) -> None:
        for at in range(0, len(raw), _WRITE_BYTES):
            piece = raw[at : at + _WRITE_BYTES]
            self._file.write(self._position, [piece])
            self._position += len(piece)
            self._unsynced += len(piece)
            if self._unsynced >= _WRITE_BYTES:
                self._file.sync()
                self._unsynced = 0

    def finish(self) -> None:
        """Write what is left, and make the file durable; its name is so with the folder."""
        assert self.count > 0, "a file without ids is not written"
        if len(self._rest):
            last = np.zeros(kernels.BLOCK_ENTRIES * kernels.ENTRY_WORDS, dtype=np.uint64)
            last[: len(self._rest)] = self._rest
            self._write_blocks(last)
        index = np.concatenate(
            [
                *(fences.view(np.uint8) for fences in self._fences),
                np.array(self._checksums, dtype=np.uint32).view(np.uint8),
                self._bits.view(np.uint8),
            ]
        )
        self._write(index)
        start, end = self._range
        head = _HEAD.pack(_MAGIC, start, end, self.count, len(self._bits), google_crc32c.value(index))
        head = head.ljust(PAGE_BYTES - _CRC.size, b"\0")
        self._file.write(0, [head + _CRC.pack(google_crc32c.value(head))])
        self._file.sync()

    def close(self) -> None:
        """Give the descriptor back; without `finish` the file is of no use."""
        self._file.close()


def write_id_file(disk: Disk, name: str, entries: npt.NDArray[Any], start: int, end: int) -> None:
    """Write and sync the file of the ids of [start, end), at least one, in any order.

    Raises:
        DiskError: the disk refuses.
    """
    rows = np.ascontiguousarray(entries).view(np.uint64).reshape(-1, kernels.ENTRY_WORDS)
    order = np.argsort(rows[:, 0].copy())
    writer = _Writer(disk, name, start=start, end=end, capacity=len(entries))
    try:
        piece = MERGE_BLOCKS * kernels.BLOCK_ENTRIES
        for at in range(0, len(order), piece):
            writer.add(rows.take(order[at : at + piece], axis=0).reshape(-1))
        writer.finish()
    finally:
        writer.close()


class IdMerge:
    """One file made of several neighbouring ones, in steps of bounded work and memory.

    Call `step` until it says that all is done, then `close`; entries below `floor_offset` are left behind. Where
    `count` is 0 in the end, nothing was left of them, and the file is none.

    Raises (also of `step`):
        DiskError: the disk refuses.
        IdFileError: one of the files is damaged.
    """

    def __init__(self, disk: Disk, files: Sequence[IdFile], name: str, floor_offset: int) -> None:
        self._files = files
        self._floor = floor_offset
        # Between two of these there is a bounded number of blocks, however the keys are spread.
        fences = np.sort(np.concatenate([file.fences for file in files]))
        self._lows = np.unique(fences[::MERGE_BLOCKS])
        self._lows[0] = 0
        self._next = 0
        self._out: U64 = np.zeros(0, dtype=np.uint64)  # kept: touching fresh pages takes longer than merging
        self._readers = [file.reader() for file in files]
        self._writer = _Writer(
            disk,
            name,
            start=files[0].start,
            end=files[-1].end,
            capacity=sum(file.count for file in files),
        )

    @property
    def count(self) -> int:
        """Entries that were written."""
        return self._writer.count

    def step(self) -> bool:
        """Do some of the work; False when all is done, and durable but for the name."""
        if self._next == len(self._lows):
            if self.count:
                self._writer.finish()
            return False
        low = int(self._lows[self._next])
        self._next += 1
        past = 2**64 if self._next == len(self._lows) else int(self._lows[self._next])
        parts = [
            file.between(reader, low, past) for file, reader in zip(self._files, self._readers, strict=True)
        ]
        ends = np.cumsum([len(part) for part in parts]) // kernels.ENTRY_WORDS
        heads = np.concatenate([[0], ends[:-1]]).astype(np.int64)
        source = np.concatenate(parts)
        if len(self._out) < len(source):
            self._out = np.empty(len(source) + len(source) // 8, dtype=np.uint64)
        count = int(kernels.merge(source, heads, ends.astype(np.int64), self._floor, self._out))
        self._writer.add(self._out[: count * kernels.ENTRY_WORDS])
        return True

    def close(self) -> None:
        """Give the descriptors back; not while another thread is in `step`."""
        self._writer.close()
        for reader in self._readers:
            reader.close()


def _zeroed(words: int) -> U64:
    """Zeros that begin at a page, so that a line of a filter is one of the cache."""
    mapping = mmap.mmap(-1, words * 8)
    with contextlib.suppress(OSError, AttributeError):
        mapping.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(mapping, dtype=np.uint64)


def _advise_random(mapped: U8) -> None:
    """Tell the operating system that single pages will be read."""
    base = mapped.base
    if isinstance(base, memoryview):
        base = base.obj
    if isinstance(base, mmap.mmap):
        with contextlib.suppress(OSError, AttributeError):
            base.madvise(mmap.MADV_RANDOM)
