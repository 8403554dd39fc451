"""Verifying a store's folder: nothing is found where nothing is wrong, and whatever is wrong is found."""

from __future__ import annotations

import random

import msgspec
import numpy as np
import pyarrow as pa
import pytest

from tallymark_protocol.schema import update_record
from tallymark_runtime.disk import MemoryDisk
from tallymark_store.archive import manifest as manifests
from tallymark_store.archive import retention
from tallymark_store.archive.writer import open_file, write_file
from tallymark_store.fold.cells import PERIOD, W_COUNT, W_KEY
from tallymark_store.replicas_file import SLOT_BYTES
from tallymark_store.verify import Scratch, differences

from .payload_builder import event
from .store_driver import BASE
from .verify_helpers import METRICS, SECOND, Directory


async def small(*, recycled: bool = False, spilled: bool = False) -> Directory:
    """A directory with everything in it: two partitions, two checkpoints, an archive of several files, a tail.

    With `spilled` nearly all cells are in files, several a partition.
    """
    directory = Directory()
    for turn in range(3 if not recycled else 40):
        directory.send(40, 0)
        directory.send(25, 1)
        if spilled and turn < 3:
            await directory.spilled()
    directory.checkpoint()
    await directory.archived()
    directory.send(30, 0)
    directory.send(30, 1)
    await directory.archived()
    directory.send(10, 1)
    if spilled:
        await directory.spilled()
        assert directory.driver.partitions[0].fold.cell_bytes() == 0
        assert directory.driver.partitions[0].fold.alert_files.end > 3
    directory.checkpoint()
    directory.send(15, 0)
    if recycled:
        directory.recycle()
        assert directory.driver.partitions[0].index.log_start > 0
    directory.stop()
    return directory


@pytest.mark.parametrize("spilled", [False, True])
@pytest.mark.parametrize("recycled", [False, True])
async def test_nothing_is_found_where_nothing_is_wrong(recycled: bool, spilled: bool) -> None:
    """Log, checkpoints, archive and all totals agree, also where the log's beginning is gone; nothing is changed."""
    directory = await small(recycled=recycled, spilled=spilled)
    writes = directory.disk.write_count
    report = directory.verify()
    assert [finding.sentence for finding in report.findings] == []
    assert report.counted["partitions"] == 2
    assert report.counted["checkpoints"] == 2
    assert report.counted["archive files"] == 4
    assert report.counted["totals compared"] > 10
    assert report.counted.get("files of cells and alerts", 0) > (3 if spilled else -1)
    assert report.counted["archived events compared with the log"] > 60
    assert directory.disk.write_count == writes


async def test_a_recount_needs_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """With no room for cells everything that is counted again goes to files, and a difference is told all the same."""
    monkeypatch.setattr(differences, "PASS_CELLS", 5)
    directory = await small(spilled=True)
    room = MemoryDisk()
    report = directory.verify(Scratch(room, cell_bytes=0, alert_bytes=0))
    assert [finding.sentence for finding in report.findings] == []
    names = room.at("p-0000").list()
    assert {name.split("-")[0] for name in names} == {"alerts", "cells"}
    assert len(names) < 80  # what is merged is removed
    directory = await small()
    fold = directory.driver.partitions[0].fold
    cells = fold._cells.array[: fold.cell_count]
    for row in (0, 7):
        cells[row, W_COUNT] += 1
    directory.driver.append(0, [event(5, "calls", value=1)], [(9, 9, BASE, 1, 9)], BASE + 10**12)
    directory.driver.sync()
    directory.checkpoint()
    directory.stop()
    found = [finding.sentence for finding in directory.verify().findings]
    assert len(found) == 2
    rooms = Scratch(MemoryDisk(), cell_bytes=0, alert_bytes=0)
    assert [finding.sentence for finding in directory.verify(rooms).findings] == found


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
@pytest.mark.parametrize(
    ("recycled", "spilled"), [(False, False), (True, False), (False, True), (True, True)]
)
async def test_a_flipped_byte_is_found_wherever_it_is(recycled: bool, spilled: bool) -> None:
    """Each file, at many positions: the finding names the file, or the other one that it is compared with."""
    directory = await small(recycled=recycled, spilled=spilled)
    rng = random.Random(5)
    flips = 0
    for path in files_of(directory):
        if spilled and "/cells-" not in path and "/alerts-" not in path:
            continue  # as without
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
    assert flips > (50 if spilled else 100)
    assert directory.verify().count == 0


@pytest.mark.parametrize("spilled", [False, True])
@pytest.mark.parametrize("recycled", [False, True])
@pytest.mark.parametrize("metric", range(4))
async def test_a_total_that_is_not_what_its_events_say_is_found(
    recycled: bool, metric: int, spilled: bool
) -> None:
    """A cell that went wrong before it was written, under the right checksums: account, metric and both numbers are told."""
    directory = Directory(1)
    for _ in range(40 if recycled else 3):
        directory.send(40)
    fold = directory.driver.partitions[0].fold
    cells = fold._cells.array[: fold.cell_count]
    periods = np.flatnonzero(
        ((cells[:, W_KEY] >> 32) & 0xFFFFFFFF == PERIOD) & (cells[:, W_KEY] & 0xFFFFFFFF == metric)
    )
    cells[periods[0], W_COUNT] += 1
    if spilled:
        await directory.spilled()
        assert fold.cell_bytes() == 0
    directory.checkpoint()
    await directory.archived()
    if recycled:
        directory.send(5)
        directory.recycle()
        assert directory.driver.partitions[0].index.log_start > 0
    directory.stop()
    report = directory.verify()
    assert report.count == 1, report.findings
    finding = report.findings[0]
    assert f"metric {METRICS[metric].schema.code!r}" in finding.sentence
    assert finding.partition == 0
    assert finding.file == "checkpoints/p-0000"
    assert finding.expected != finding.found


@pytest.mark.parametrize("recycled", [False, True])
@pytest.mark.parametrize("change", ["lost", "twice", "other value"])
async def test_an_archive_that_is_not_what_was_accepted_is_found(recycled: bool, change: str) -> None:
    """A file that was written wrongly, under the right checksums; by the log, or where that is gone by the totals."""
    directory = Directory(1)
    for _ in range(40):
        directory.send(40)
    directory.checkpoint()
    await directory.archived()
    directory.send(3)
    if recycled:
        directory.recycle()
    disk = directory.disk.at("archive").at("p-0000")
    manifest = manifests.load(disk)
    assert manifest is not None
    file = manifest.files[0]
    table = open_file(disk, file.name).read()
    row = next(  # of a metric whose value counts, in what the log has dropped
        i for i, code in enumerate(table.column("metric").to_pylist())
        if code == "sum" and table.column("offset")[i].as_py() < 500
    )  # fmt: skip
    if change == "lost":
        table = pa.concat_tables([table.slice(0, row), table.slice(row + 1)])
    elif change == "twice":
        table = pa.concat_tables([table.slice(0, row + 1), table.slice(row)])
    else:
        values = table.column("value").to_pylist()
        values[row] += 1
        place = table.schema.get_field_index("value")
        table = table.set_column(place, table.schema.field(place), pa.array(values, pa.int64()))
    written = write_file(disk, file.name, table.unify_dictionaries().combine_chunks(), {})
    fresh = msgspec.structs.replace(file, rows=written.rows, bytes=written.size, crc32c=written.crc32c)
    manifests.publish(disk, msgspec.structs.replace(manifest, files=(fresh, *manifest.files[1:])))
    directory.stop()
    report = directory.verify()
    assert report.count > 0
    assert {finding.partition for finding in report.findings} == {0}
    told = " ".join(finding.sentence for finding in report.findings)
    if change == "twice":
        assert "not in the order" in told
        assert "twice" in told
    elif recycled:
        assert "is not what archive and log say" in told
    else:
        assert "is not what the log accepted" in told


@pytest.mark.parametrize("recycled", [False, True])
async def test_what_was_dropped_after_its_time_is_counted(
    recycled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is found where just that is gone which is written down; everything else is compared as ever."""
    monkeypatch.setattr(retention, "DAY_NS", 10 * SECOND)
    directory = Directory(1)
    for record in (METRICS[0], METRICS[3]):
        shorter = msgspec.structs.replace(record.schema, retain_raw_days=1)
        directory.driver.schema(0, update_record(record, shorter), BASE)
    for _ in range(40):
        directory.send(40)
    directory.checkpoint()
    for _ in range(5):
        await directory.archived()
    directory.send(3)
    if recycled:
        directory.recycle()
        assert directory.driver.partitions[0].index.log_start > 0
    directory.stop()
    disk = directory.disk.at("archive").at("p-0000")
    manifest = manifests.load(disk)
    assert manifest is not None
    assert {item.metric for item in manifest.dropped} == {"sum", "users"}
    report = directory.verify()
    assert [finding.sentence for finding in report.findings] == []
    assert report.counted["archived events"] == manifest.rows
    assert any("compared by their events' number only" in note for note in report.notes) is recycled
    for place, item in enumerate(manifest.dropped):
        dropped = list(manifest.dropped)
        for more in (-1, 1):
            dropped[place] = msgspec.structs.replace(item, events=item.events + more)
            manifests.publish(disk, msgspec.structs.replace(manifest, dropped=tuple(dropped)))
            report = directory.verify()
            assert any(f"events of metric {item.metric!r}" in found.sentence for found in report.findings)
        # An archive that was put together of two: it says how many at most, and not one more may be missing.
        for more, is_wrong in ((-1, True), (0, False), (1, False)):
            dropped[place] = msgspec.structs.replace(item, events=item.events + more, is_at_most=True)
            manifests.publish(disk, msgspec.structs.replace(manifest, dropped=tuple(dropped)))
            report = directory.verify()
            assert (report.count > 0) is is_wrong
            assert all(f"events of metric {item.metric!r}" in found.sentence for found in report.findings)
    manifests.publish(disk, msgspec.structs.replace(manifest, dropped=()))
    assert directory.verify().count > 0


async def test_an_archive_that_lacks_offsets_is_not_taken_for_all_there_was() -> None:
    """One that begins late, or has gaps: a note says so, and no total is called wrong for it."""
    directory = Directory(1)
    for _ in range(40):
        directory.send(40)
    directory.checkpoint()
    await directory.archived()
    directory.send(5)
    directory.recycle()
    disk = directory.disk.at("archive").at("p-0000")
    manifest = manifests.load(disk)
    assert manifest is not None
    start = manifest.end_offset
    manifests.publish(disk, msgspec.structs.replace(manifest, files=(), start_offset=start))
    directory.stop()
    assert directory.driver.partitions[0].index.log_start <= start
    report = directory.verify()
    assert any("its archive begins at offset" in note for note in report.notes)
    assert [finding.sentence for finding in report.findings] == []


@pytest.mark.parametrize("shown_by", ["another archive", "files", "the backup"])
async def test_an_archive_that_is_gone_is_found(shown_by: str) -> None:
    """Where the log has dropped what only an archive can have had, that is said; whatever it is that shows it."""
    directory = await small(recycled=True)
    disk = directory.disk.at("archive").at("p-0000")
    other = directory.disk.at("archive").at("p-0001")
    for folder in (disk, other):
        folder.remove(manifests.NAME)
    if shown_by != "files":
        for folder in (disk, other):
            for name in folder.list():
                folder.remove(name)
    if shown_by == "another archive":
        manifests.publish(other, manifests.Manifest(1, "copy-1", end_offset=2, start_offset=2))
    if shown_by == "the backup":
        manifests.write_lacks(disk, manifests.Lacks(7, "it was refused"))
    sentences = [found.sentence for found in directory.verify().findings if found.file == "archive/p-0000"]
    expected = {
        "another archive": "archive of partition 1 shows",
        "files": "no manifest",
        "the backup": "not in the backup",
    }
    assert len(sentences) == 1
    assert expected[shown_by] in sentences[0]


async def test_files_of_the_log_are_removed_only_with_an_archive() -> None:
    """No archive anywhere: a copy that began with a snapshot, unless the log's first file was removed."""
    directory = await small(recycled=True)
    for number in range(2):
        disk = directory.disk.at("archive").at(f"p-{number:04d}")
        for name in disk.list():
            disk.remove(name)
    removed = "wal-0000000000000000.seg" not in directory.disk.at("wal").list()
    report = directory.verify()
    assert report.count == (2 if removed else 0)
    assert any("there is no archive" in note for note in report.notes) is not removed


async def test_files_that_are_gone_or_cut_are_found() -> None:
    """A segment, a checkpoint's or an archive's file, REPLICAS or CLUSTER: the finding says which."""
    for path in files_of(await small(spilled=True)):
        if path == "LOCK" or path.endswith("wal-start"):
            continue  # without the latter, the whole log is read
        for cut in (False, True):
            directory = await small(spilled=True)
            if path not in files_of(directory):
                continue
            if cut:
                directory.disk.cut(path, max(len(directory.disk.open(path).read(0, 2**40)) - 100, 0))
            else:
                directory.disk.remove(path) if "/" not in path else _remove(directory, path)
            report = directory.verify()
            if path.endswith(("MANIFEST", "MANIFEST.json")) and not cut:
                assert any(path.rpartition("/")[0] in note for note in report.notes)  # as if there were none
                continue
            assert report.count > 0, (path, cut)


def _remove(directory: Directory, path: str) -> None:
    folder, _, name = path.rpartition("/")
    disk = directory.disk
    for part in folder.split("/"):
        disk = disk.at(part)
    disk.remove(name)
