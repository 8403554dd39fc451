"""Verifying a store's folder: nothing is found where nothing is wrong, and whatever is wrong is found."""

from __future__ import annotations

import random

import pytest

from tallymark_store.replicas_file import SLOT_BYTES

from .verify_helpers import Directory


async def small(*, recycled: bool = False) -> Directory:
    """A directory with everything in it: two partitions, two checkpoints, an archive of several files, a tail."""
    directory = Directory()
    for _ in range(3 if not recycled else 40):
        directory.send(40, 0)
        directory.send(25, 1)
    directory.checkpoint()
    await directory.archived()
    directory.send(30, 0)
    directory.send(30, 1)
    await directory.archived()
    directory.send(10, 1)
    directory.checkpoint()
    directory.send(15, 0)
    if recycled:
        directory.recycle()
        assert directory.driver.partitions[0].index.log_start > 0
    directory.stop()
    return directory


@pytest.mark.parametrize("recycled", [False, True])
async def test_nothing_is_found_where_nothing_is_wrong(recycled: bool) -> None:
    """Log, checkpoints, archive and all totals agree, also where the log's beginning is gone; nothing is changed."""
    directory = await small(recycled=recycled)
    writes = directory.disk.write_count
    report = directory.verify()
    assert [finding.sentence for finding in report.findings] == []
    assert report.counted["partitions"] == 2
    assert report.counted["checkpoints"] == 2
    assert report.counted["archive files"] == 4
    assert report.counted["totals compared"] > 10
    assert report.counted["archived events compared with the log"] > 60
    assert directory.disk.write_count == writes


def is_meaningless(directory: Directory, name: str, position: int) -> bool:
    """Whether a byte is one that nobody ever reads: what lies behind the body of a slot of REPLICAS."""
    if name != "REPLICAS":
        return name == "LOCK"
    file = directory.disk.open(name)
    head = file.read(position // SLOT_BYTES * SLOT_BYTES, 24).tobytes()
    return position % SLOT_BYTES >= 24 + int.from_bytes(head[16:20], "little")


def files_of(directory: Directory) -> list[str]:
    """The paths of all files."""
    return sorted(directory.disk._memory.names)


def positions_of(directory: Directory, path: str, rng: random.Random, count: int) -> list[int]:
    """Where to flip in a file: its beginning, its end, and anywhere, most of it where something is written."""
    file = directory.disk.open(path)
    data = file.read(0, file.size())
    used = data.nonzero()[0].tolist()
    chosen = {0, len(data) - 1, *rng.sample(range(len(data)), min(count // 4, len(data)))}
    return sorted(chosen | set(rng.sample(used, min(count, len(used)))))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("recycled", [False, True])
async def test_a_flipped_byte_is_found_wherever_it_is(recycled: bool) -> None:
    """Each file, at many positions: the finding names the file, or the other one that it is compared with."""
    directory = await small(recycled=recycled)
    rng = random.Random(5)
    flips = 0
    for path in files_of(directory):
        for position in positions_of(directory, path, rng, 10 if recycled else 20):
            bit = rng.randrange(8)
            directory.disk.flip_bit(path, position, bit)
            report = directory.verify()
            directory.disk.flip_bit(path, position, bit)
            flips += 1
            if is_meaningless(directory, path, position):
                continue
            assert report.count > 0, f"{path} at {position}, bit {bit}"
            assert any(path.startswith(finding.file) for finding in report.findings), (path, report.findings)
    assert flips > 100
    assert directory.verify().count == 0
