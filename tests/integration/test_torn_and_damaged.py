"""What a crash or a bad disk leaves of the last record: a torn tail is dropped, damage is refused and named.

The data directory is a real server's, killed. Most of the hundreds of starts are recoveries of copies of it in
memory, by the store's own function; some are real processes.
"""

import asyncio
import itertools
import random
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from ledger import ACCOUNTS, ALWAYS, Ledger, Repeater, create_metrics
from server import PARTITIONS, POLL_SECONDS, WAIT_SECONDS_MAX, Server, wait_until

from tallymark import AsyncClient, Event, IngestError, UnavailableError
from tallymark_protocol.errors import ErrorCode
from tallymark_protocol.identifiers import partition_of
from tallymark_protocol.limits import DEDUP_WINDOW_NS
from tallymark_runtime.disk import MemoryDisk
from tallymark_store import recovery
from tallymark_store.checkpoint import load_wal_start
from tallymark_store.wal import RECORD_HEADER_BYTES, Recovery, WalConfig, open_wal
from tallymark_store.wal.format import (
    FLAG_MARKER,
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
CONFIG = WalConfig(segment_bytes=64 * 1024)  # of what recovery adds
_salts = itertools.count(1)  # each process life has another; no state may depend on it
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


def files_of(data: Path) -> dict[Path, bytes]:
    """A store's files, without the segments that hold nothing yet: a crash may come before they are made."""
    root = data / "store"
    files = {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    return {path: content for path, content in files.items() if path.suffix != ".seg" or used_bytes(content)}


def in_memory(files: dict[Path, bytes]) -> MemoryDisk:
    """A disk with these files."""
    disk = MemoryDisk()
    for path, content in files.items():
        folder = disk
        for name in path.parts[:-1]:
            folder = folder.at(name)
        file = folder.create(path.name)
        file.write(0, [content])
        file.sync()
        folder.sync_dir()
    return disk


def recover(disk: MemoryDisk) -> tuple[State, list[str]]:
    """Recover a store as a start does; return what it made of it, and said about it."""
    reports: list[str] = []
    found = recovery.recover(
        disk,
        partition_count=PARTITIONS,
        dedup_window_ns=DEDUP_WINDOW_NS,
        wal_config=CONFIG,
        new_log_id=bytes(16),
        salt=next(_salts),
        report=reports.append,
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
    return state, reports


def last_record(data: Path) -> Last:
    """Find the last record of ACCOUNT's partition, and check that it is alone in the last group of records."""
    wal, _ = open_wal(in_memory(files_of(data)).at("wal"), new_log_id=bytes(16), config=CONFIG)
    index = wal.partitions[PARTITION]
    row = index.row(len(index) - 1)
    name = segment_name(row.segment)
    content = np.frombuffer((data / "store" / "wal" / name).read_bytes(), np.uint8)
    header = parse_segment_header(content)
    assert header is not None
    group = parse_group_header(
        salt_of(header.log_id, row.segment), content, row.position - GROUP_HEADER_BYTES
    )
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
        wal = server.data / "store" / "wal"

        def marked() -> bool:
            used = [content for path in wal.glob("wal-*.seg") if used_bytes(content := path.read_bytes())]
            return ends_with_marker(max(used, key=_number))

        assert await wait_until(marked)
    server.kill()
    return Prepared(server, ledger, repeater, last_record(server.data))


def used_bytes(content: bytes) -> int:
    """How much of a segment is written, by its last byte that isn't zero, its headers apart."""
    found = np.flatnonzero(np.frombuffer(content, np.uint8)[SEGMENT_HEADER_BYTES:-SEGMENT_HEADER_BYTES])
    return int(found[-1]) + 1 if len(found) else 0


def _number(content: bytes) -> int:
    header = parse_segment_header(np.frombuffer(content, np.uint8))
    assert header is not None
    return header.segment


def ends_with_marker(content: bytes) -> bool:
    """Whether the last group of a segment is a marker."""
    data = np.frombuffer(content, np.uint8)
    header = parse_segment_header(data)
    assert header is not None
    salt, position, marker = salt_of(header.log_id, header.segment), SEGMENT_HEADER_BYTES, False
    while (group := parse_group_header(salt, data, position)) is not None:
        position, marker = group.end, bool(group.flags & FLAG_MARKER)
    return marker


def torn(content: bytes, last: Last, at: int, filling: bytes) -> bytes:
    """What a crash leaves of a segment when it tears the last record's write at `at`: of what follows, `filling`."""
    rest = (filling * last.marker)[: max(0, last.marker - at)]
    behind = content[-SEGMENT_HEADER_BYTES:]
    return content[:at] + rest + bytes(len(content) - at - len(rest) - len(behind)) + behind


def recover_log(disk: MemoryDisk) -> tuple[list[int], Recovery]:
    """Recover the log alone, from the checkpoint's start if there is one; return the log ends."""
    start = load_wal_start(disk.at("checkpoints"))
    wal, found = open_wal(disk.at("wal"), new_log_id=bytes(16), config=CONFIG, start=start)
    wal.close()
    return [wal.log_end(number) for number in range(PARTITIONS)], found


class Copies:
    """Copies in memory of a data directory that differ in the file of the last record."""

    def __init__(self, data: Path, last: Last) -> None:
        self._files = files_of(data)
        self._path = Path("wal") / last.file
        self.content = self._files[self._path]

    def whole(self, content: bytes) -> MemoryDisk:
        """A copy in which that file is this."""
        assert len(content) == len(self.content)
        return in_memory(self._files | {self._path: content})

    def log(self, content: bytes) -> MemoryDisk:
        """A copy of what the log's own recovery reads."""
        files = self._files | {self._path: content}
        return in_memory({path: files[path] for path in files if path.parent.name in {"wal", "checkpoints"}})


@pytest.mark.parametrize("checkpoint", [False, True])
async def test_torn_at_every_byte(server, checkpoint):
    """The last record torn at each byte, the rest zeros or rubbish: it is dropped whole, and nothing else is."""
    last = (await prepare(server, checkpoint=checkpoint, marker=False)).last
    copies = Copies(server.data, last)
    whole = recover(copies.whole(copies.content))[0]
    before = recover(copies.whole(torn(copies.content, last, last.group, b"\0")))[0]
    assert before.errors == whole.errors == [None] * PARTITIONS
    ends = list(whole.log_ends)
    ends[PARTITION] -= 3
    assert before.log_ends == ends
    rubbish = random.Random(1).randbytes(997)
    for at in range(last.group, last.marker + 1):
        for filling in (b"\0", rubbish) if at % 4 == 0 else (b"\0",):
            content = torn(copies.content, last, at, filling)
            # Of what comes behind the payload nothing counts; and some of its bytes may be zeros anyway.
            expected = whole if content[: last.end] == copies.content[: last.end] else before
            log_ends, found = recover_log(copies.log(content))
            assert not found.damages
            assert not found.findings
            assert log_ends == expected.log_ends, f"torn at {at}"
            if (at - last.group) % 64 == 0 or at == last.end - 1:
                disk = copies.whole(content)
                assert recover(disk) == (expected, []), f"torn at {at}"
                assert recover(disk) == (expected, []), f"torn at {at}, recovered once already"


@pytest.mark.parametrize("checkpoint", [False, True])
async def test_damaged_at_every_byte(server, checkpoint):
    """A bit flipped in each byte of an idle log's last record: the partition is refused, and no other."""
    last = (await prepare(server, checkpoint=checkpoint, marker=True)).last
    copies = Copies(server.data, last)
    whole = recover(copies.whole(copies.content))[0]
    for at in range(last.group, last.end):
        content = bytearray(copies.content)
        content[at] ^= 1 << at % 8
        disk = copies.log(bytes(content))
        log_ends, found = recover_log(disk)
        if at < last.record:
            # The group's header is only a way to the record, which proves itself.
            assert log_ends == whole.log_ends
            assert not found.damages
            assert [finding.file for finding in found.findings] == [last.file]
        else:
            assert list(found.damages) == [PARTITION], f"flipped at {at}"
            damage = found.damages[PARTITION]
            assert (damage.file, damage.offset) == (last.file, whole.log_ends[PARTITION] - 3)
            assert last.group <= damage.position <= at
        kept = disk.at("wal").open(last.file).read(0, last.marker).tobytes()
        assert kept == content[: last.marker], "what is damaged is evidence: it stays as it is"
        if (at - last.record) % 32 == 0 and at >= last.record:
            disk = copies.whole(bytes(content))
            for _ in range(2):  # the second time what the first has left
                state = recover(disk)[0]
                message = state.errors[PARTITION]
                assert message is not None
                assert last.file in message
                assert "restore" in message
                for number in range(PARTITIONS):
                    if number != PARTITION:
                        assert state.errors[number] is None
                        assert state.digests[number] == whole.digests[number]


async def test_torn_through_the_process(server):
    """A start after a torn record serves, and the chunk that was torn is stored once when it is sent again."""
    prepared = await prepare(server, checkpoint=True, marker=False)
    ledger, last = prepared.ledger, prepared.last
    path = server.data / "store" / "wal" / last.file
    content = path.read_bytes()
    for at in (last.group, last.record + 5, last.end - 1):
        path.write_bytes(torn(content, last, at, b"\xa5"))
        await server.start()
        async with AsyncClient([server.address]) as client:
            events = [event async for event in client.list_events(ACCOUNT, *ALWAYS)]
            assert not [event for event in events if event.value in {10**6, 10**6 + 1}]
            # Sent again it gets the place that it had, or a later one: its first answer was never given.
            prepared.repeater.forget_last()
            await prepared.repeater.repeat()
            await prepared.repeater.repeat()
            await ledger.check(client, settled=True)
        await server.check_digests()
        server.kill()


async def test_damaged_through_the_process(server):
    """A start with a damaged record serves all but its partition, whose refusal names the file and the way out."""
    prepared = await prepare(server, checkpoint=False, marker=True)
    last = prepared.last
    path = server.data / "store" / "wal" / last.file
    backup = server.data.with_name("backup")
    shutil.copytree(server.data, backup)
    content = bytearray(path.read_bytes())
    content[last.end - 3] ^= 0x10
    path.write_bytes(content)
    server.environment |= EVERY_CHECKPOINT  # which must not make a later start forget where the damage lies
    for life in range(2):
        await server.start()
        async with AsyncClient([server.address]) as client:
            with pytest.raises(UnavailableError) as refused:
                await client.query(ACCOUNT, "used", ALWAYS, timeout=5)
            assert refused.value.code == ErrorCode.PARTITION_DAMAGED
            assert "restore" in refused.value.message
            assert last.file in refused.value.message
            events = [Event(account_id=n, metric_code="peak") for n in (ACCOUNT, OTHER_ACCOUNT)]
            with pytest.raises(IngestError) as failed:
                await client.ingest(events, timeout=5)
            assert failed.value.code == ErrorCode.PARTITION_DAMAGED
            assert failed.value.receipt.unknown == [0]  # an earlier try of it may be in what can't be read
            assert failed.value.receipt.n_stored == 1
            before = (await client.query(OTHER_ACCOUNT, "peak", ALWAYS)).value
            await client.ingest(Event(account_id=OTHER_ACCOUNT, metric_code="peak", value=life))
            after = (await client.query(OTHER_ACCOUNT, "peak", ALWAYS)).value
            assert after.count == before.count + 1
        async with asyncio.timeout(WAIT_SECONDS_MAX):
            while not (status := await server.status()).details["checkpoints"]:  # noqa: ASYNC110
                await asyncio.sleep(POLL_SECONDS)
        assert [bool(part.error) for part in status.partitions] == [n == PARTITION for n in range(PARTITIONS)]
        server.kill()
        assert path.read_bytes()[: last.marker] == content[: last.marker], "it can still be put right"
    shutil.rmtree(server.data)
    backup.rename(server.data)
    await server.start()
    await prepared.repeater.repeat()
    async with AsyncClient([server.address]) as client:
        await prepared.ledger.check(client, settled=True)
