"""What a crash or a bad disk leaves of the last record: a torn tail is dropped, damage is refused and named.

The data directory is a real server's, killed. Most of the hundreds of starts are recoveries of copies of it in
memory, by the store's own function; some are real processes.
"""

import asyncio
import contextlib
import random
import shutil
from pathlib import Path
from typing import NamedTuple

import google_crc32c
import numpy as np
import pytest
from ledger import ACCOUNTS, ALWAYS, Ledger, Repeater, create_metrics
from server import PARTITIONS, Server, wait_until

from tallymark import AsyncClient, Event, IngestError, UnavailableError
from tallymark_protocol.errors import ErrorCode
from tallymark_protocol.identifiers import partition_of
from tallymark_protocol.limits import DEDUP_WINDOW_NS
from tallymark_runtime.disk import MemoryDisk
from tallymark_store import recovery
from tallymark_store.wal import RECORD_HEADER_BYTES, WalConfig
from tallymark_store.wal.format import (
    GROUP_HEADER_BYTES,
    SEGMENT_HEADER_BYTES,
    align,
    parse_group_header,
    parse_segment_header,
    salt_of,
    segment_name,
)

pytestmark = pytest.mark.timeout(600)  # the first start compiles the kernels

ACCOUNT = 3
PARTITION = partition_of(ACCOUNT, PARTITIONS)
OTHER_ACCOUNT = next(account for account in range(ACCOUNTS) if partition_of(account, PARTITIONS) != PARTITION)
NO_CHECKPOINTS = {
    "TALLYMARK_CHECKPOINT_EVENTS": "1000000",
    "TALLYMARK_CHECKPOINT_INTERVAL_SECONDS": "3600",
}
EVERY_CHECKPOINT = {"TALLYMARK_CHECKPOINT_EVENTS": "1", "TALLYMARK_CHECKPOINT_INTERVAL_SECONDS": "0.1"}


class Last(NamedTuple):
    """Where the last record lies: the only one of its group."""

    file: str
    group: int  # where its group begins
    record: int  # where it begins
    end: int  # exclusive, of its last byte that isn't padding
    marker: int  # where the next group begins


class State(NamedTuple):
    """What a recovery made of a data directory."""

    log_ends: list[int]
    digests: list[str | None]
    errors: list[str | None]


def in_memory(data: Path) -> MemoryDisk:
    """A store's data directory, read into memory."""
    disk = MemoryDisk()
    root = data / "store"
    for path in sorted(root.rglob("*")):
        if path.is_file():
            folder = disk
            for name in path.relative_to(root).parts[:-1]:
                folder = folder.at(name)
            file = folder.create(path.name)
            file.write(0, [path.read_bytes()])
            file.sync()
            folder.sync_dir()
    return disk


def recover(disk: MemoryDisk) -> tuple[State, recovery.Recovered]:
    """Recover a store as a start does."""
    found = recovery.recover(
        disk,
        partition_count=PARTITIONS,
        dedup_window_ns=DEDUP_WINDOW_NS,
        wal_config=WalConfig(segment_bytes=64 * 1024),
        new_log_id=bytes(16),
        report=lambda text: None,
    )
    parts = [found.partitions[number] for number in range(PARTITIONS)]
    for part in parts:
        if part.error is not None:
            assert part.error.code == ErrorCode.PARTITION_DAMAGED
            assert not part.error.retriable
    state = State(
        [part.log_end for part in parts],
        [part.digest() if part.error is None else None for part in parts],
        [part.error.message if part.error is not None else None for part in parts],
    )
    found.wal.close()
    return state, found


def last_record(data: Path) -> Last:
    """Find the last record of ACCOUNT's partition, and check that it is alone in the last group of records."""
    _, found = recover(in_memory(data))
    index = found.wal.partitions[PARTITION]
    row = index.row(len(index) - 1)
    name = segment_name(row.segment)
    content = np.frombuffer((data / "store" / "wal" / name).read_bytes(), np.uint8)
    header = parse_segment_header(content)
    assert header is not None
    group = parse_group_header(salt_of(header.log_id, row.segment), content, row.position - GROUP_HEADER_BYTES)
    assert group is not None
    assert group.entries == 1
    end = row.position + RECORD_HEADER_BYTES + row.length
    assert group.end == align(end)
    return Last(name, group.position, row.position, end, group.end)


class Prepared(NamedTuple):
    """A killed server whose last record is known."""

    server: Server
    ledger: Ledger
    repeater: Repeater
    last: Last


async def prepare(server: Server, *, checkpoint: bool, marker: bool) -> Prepared:
    """Fill a server and kill it. Its last record is one chunk of ACCOUNT's, with an event id and a repeat."""
    ledger = Ledger(11)
    repeater = Repeater(server, ledger)
    server.environment |= EVERY_CHECKPOINT if checkpoint else NO_CHECKPOINTS
    await server.start()
    async with AsyncClient([server.address]) as client:
        await create_metrics(client)
        for _ in range(12):
            entries = ledger.batch(20)
            ledger.note(entries, await client.ingest([entry.event for entry in entries]))
    if checkpoint:
        folder = server.data / "store" / "checkpoints"
        assert await wait_until(lambda: len(list(folder.glob("*/MANIFEST"))) == PARTITIONS)
    server.kill()
    server.environment |= NO_CHECKPOINTS
    await server.start()
    async with AsyncClient([server.address]) as client:
        entries = ledger.batch(20)
        ledger.note(entries, await client.ingest([entry.event for entry in entries]))
    # Apart from what came before: in a group of its own.
    await repeater.send_one(
        [
            Event(account_id=ACCOUNT, metric_code="used", value=10**6, id="last"),
            Event(account_id=ACCOUNT, metric_code="used", value=10**6, id="last"),
            Event(account_id=ACCOUNT, metric_code="peak", value=10**6 + 1, properties={"note": "last"}),
        ]
    )
    if marker:
        path = server.data / "store" / "wal"

        def marked() -> bool:
            newest = max(path.glob("wal-*.seg"), key=lambda file: used_bytes(file))
            return used_bytes(newest) > 0 and ends_with_marker(newest)

        assert await wait_until(marked)
    server.kill()
    return Prepared(server, ledger, repeater, last_record(server.data))


def used_bytes(file: Path) -> int:
    """How much of a segment is written, by its last byte that isn't zero (its header's copy apart)."""
    content = np.frombuffer(file.read_bytes(), np.uint8)[SEGMENT_HEADER_BYTES:-SEGMENT_HEADER_BYTES]
    found = np.flatnonzero(content)
    return int(found[-1]) + 1 if len(found) else 0


def ends_with_marker(file: Path) -> bool:
    """Whether the last group of a segment is a marker."""
    content = np.frombuffer(file.read_bytes(), np.uint8)
    header = parse_segment_header(content)
    assert header is not None
    salt, position, marker = salt_of(header.log_id, header.segment), SEGMENT_HEADER_BYTES, False
    while (group := parse_group_header(salt, content, position)) is not None:
        position, marker = group.end, bool(group.flags & 1)
    return marker


def torn(disk: MemoryDisk, last: Last, at: int, filling: bytes) -> None:
    """Make of the log what a crash leaves that tore the last record's write at `at`."""
    wal = disk.at("wal")
    file = wal.open(last.file)
    size = file.size()
    file.write(at, [bytes(size - SEGMENT_HEADER_BYTES - at)])
    rest = max(0, last.marker - at)
    file.write(at, [(filling * rest)[:rest]])
    file.sync()


@pytest.mark.parametrize("checkpoint", [False, True])
async def test_torn_at_every_byte(server, checkpoint):
    """The last record torn at each byte, the rest zeros or rubbish: it is dropped whole, and nothing else is."""
    data, last = await _prepared_data(server, checkpoint=checkpoint)
    whole, _ = recover(in_memory(data))
    before = None
    rng = random.Random(1)
    for at in range(last.group, last.marker + 1):
        for filling in (b"\0", rng.randbytes(997)):
            disk = in_memory_copy(data, last, at)
            torn(disk, last, at, filling)
            state, _ = recover(disk)
            if before is None:
                before = state
                assert state.log_ends[PARTITION] == whole.log_ends[PARTITION] - 3
                assert state.errors == [None] * PARTITIONS
            kept = at >= last.end and (at == last.marker or filling == b"\0")
            assert state == (whole if kept else before) or _is_whole(at, last, state, whole), f"torn at {at}"
            # What recovery has left recovers to the same.
            if at % 16 == 0:
                assert recover(disk)[0] == state


def _is_whole(at: int, last: Last, state: State, whole: State) -> bool:
    """Torn in what the record's checksums don't cover, or where zeros stood anyway."""
    return at >= last.end - 8 and state == whole


def in_memory_copy(data: Path, last: Last, at: int) -> MemoryDisk:
    return in_memory(data)


async def _prepared_data(server, *, checkpoint):
    prepared = await prepare(server, checkpoint=checkpoint, marker=False)
    return prepared.server.data, prepared.last
