"""Which files an archive has, and which of them are merged: whole or not there, whatever fails in between."""

from __future__ import annotations

import random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tallymark_runtime.disk import DiskError, MemoryDisk
from tallymark_store.archive import archiver, policy
from tallymark_store.archive import manifest as manifests
from tallymark_store.archive.manifest import ArchiveError, ArchiveFile, Manifest

from .power_cut import CountingDisk, CrashAt

OLD = [(0, 5), (5, 9)]
NEW = [(0, 9), (9, 20)]


def listed(start: int, end: int, rows: int = 1, size: int = 3) -> ArchiveFile:
    return ArchiveFile(manifests.file_name(start, end), start, end, rows, size, 7, 1, 2)


def of(ranges: list[tuple[int, int]], end: int = 20) -> Manifest:
    return Manifest(3, "copy", end, tuple(listed(*edges) for edges in ranges))


def write(disk: MemoryDisk, manifest: Manifest) -> None:
    """The files of a manifest, synced but for their names, as whoever publishes it has written them."""
    for file in manifest.files:
        if file.name not in disk.list():
            handle = disk.create(file.name)
            handle.write(0, [b"abc"])
            handle.sync()


def published(*ranges: tuple[int, int]) -> MemoryDisk:
    disk = MemoryDisk()
    write(disk, of(list(ranges)))
    manifests.publish(disk, of(list(ranges)))
    return disk


def test_what_was_published_is_loaded() -> None:
    """An archive without files, too; what it doesn't list is gone, of the one before and of nobody."""
    disk = MemoryDisk()
    assert manifests.load(disk) is None
    manifests.publish(disk, Manifest(3, "copy", 4))
    assert manifests.load(disk) == Manifest(3, "copy", 4)
    disk = published(*OLD)
    write(disk, of(NEW))
    manifests.publish(disk, of(NEW))
    names = [manifests.file_name(*edges) for edges in NEW]
    assert disk.list() == ["MANIFEST.json", *names]
    disk.create("events-half.parquet")
    disk.create("MANIFEST.json.new")
    found = manifests.load(disk)
    assert found == of(NEW)
    assert (found.rows, found.bytes) == (2, 6)
    assert disk.list() == ["MANIFEST.json", *names]


def test_files_without_a_manifest_are_of_no_meaning() -> None:
    """They are removed when it is looked for."""
    disk = MemoryDisk()
    disk.create(manifests.file_name(0, 5))
    assert manifests.load(disk) is None
    assert disk.list() == []


@pytest.mark.parametrize("lose_all", [False, True])
def test_power_may_go_at_every_step_of_publishing(lose_all: bool) -> None:
    """The old archive is in force, or the new one, and every file of it is there."""
    step = 0
    while True:
        disk = published(*OLD)
        calls = [step]
        try:
            write(CountingDisk(disk, calls), of(NEW))  # type: ignore[arg-type]
            manifests.publish(CountingDisk(disk, calls), of(NEW))  # type: ignore[arg-type]
        except CrashAt:
            disk.crash(random.Random(step), lose_all=lose_all)
            assert manifests.load(disk) in [of(OLD), of(NEW)]
            step += 1
            continue
        disk.crash(random.Random(step), lose_all=lose_all)
        assert manifests.load(disk) == of(NEW)
        break
    assert step > 10


def test_what_was_loaded_is_not_lost_again() -> None:
    """A process ends between a manifest's renaming and its sync, the next one relies on it, and the power goes."""
    step = 0
    while True:
        disk = published(*OLD)
        calls = [step]
        try:
            write(CountingDisk(disk, calls), of(NEW))  # type: ignore[arg-type]
            manifests.publish(CountingDisk(disk, calls), of(NEW))  # type: ignore[arg-type]
        except CrashAt:
            found = manifests.load(disk)
            disk.crash(random.Random(step), lose_all=True)
            assert manifests.load(disk) == found
            step += 1
            continue
        break
    assert step > 10


@pytest.mark.parametrize("lose_all", [False, True])
def test_power_may_go_at_every_step_of_discarding(lose_all: bool) -> None:
    """The archive is whole, or there is none."""
    step = 0
    while True:
        disk = published(*OLD)
        calls = [step]
        try:
            manifests.discard(CountingDisk(disk, calls))  # type: ignore[arg-type]
        except CrashAt:
            disk.crash(random.Random(step), lose_all=lose_all)
            assert manifests.load(disk) in [of(OLD), None]
            step += 1
            continue
        assert disk.list() == []
        disk.crash(random.Random(step), lose_all=lose_all)
        assert manifests.load(disk) is None
        break
    assert step > 4


@pytest.mark.parametrize("operation", ["create", "write", "sync", "rename", "remove", "sync_dir"])
def test_a_failing_disk_leaves_one_whole_archive(operation: str) -> None:
    """Whichever call fails; also after the crash that follows."""
    disk = published(*OLD)
    write(disk, of(NEW))
    disk.fail_next(operation)
    with pytest.raises(DiskError):
        manifests.publish(disk, of(NEW))
    disk.crash(random.Random(1))
    assert manifests.load(disk) in [of(OLD), of(NEW)]


def test_damage_is_an_error_and_never_another_archive() -> None:
    """A flipped bit anywhere, a cut, a file that is missing, short or long."""
    size = len(manifests.encode(of(OLD)))
    for position in range(size):
        disk = published(*OLD)
        disk.flip_bit("MANIFEST.json", position, position % 8)
        with pytest.raises(ArchiveError):
            manifests.load(disk)
    for cut in range(0, size, 7):
        disk = published(*OLD)
        disk.cut("MANIFEST.json", cut)
        with pytest.raises(ArchiveError, match="checksum"):
            manifests.load(disk)
    name = manifests.file_name(*OLD[1])
    disk = published(*OLD)
    disk.remove(name)
    with pytest.raises(ArchiveError, match=f"{name} is missing"):
        manifests.load(disk)
    disk = published(*OLD)
    disk.cut(name, 2)
    with pytest.raises(ArchiveError, match="has 2 bytes instead of 3"):
        manifests.load(disk)


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        (Manifest(3, "c", 9, (listed(0, 5), listed(4, 9))), "offset 4 comes after 5"),
        (Manifest(3, "c", 8, (listed(0, 5), listed(5, 9))), "offset 8 comes after 9"),
        (Manifest(3, "c", 9, (listed(0, 5, rows=6),)), "has 6 rows"),
        (Manifest(3, "c", 9, (listed(0, 5, rows=0),)), "has 0 rows"),
        (Manifest(3, "c", 9, (msgspec.structs.replace(listed(0, 5), name="../x"),)), "no name of its range"),
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused(manifest: Manifest, message: str) -> None:
    """Though it is undamaged."""
    with pytest.raises(ArchiveError, match=message):
        manifests.decode(manifests.encode(manifest))


def test_a_manifest_of_a_later_version_is_refused() -> None:
    """It may say something that this software would not understand."""
    body = manifests.encode(Manifest(3, "c", 9)).replace(b'"format_version":1', b'"format_version":3')
    body = body[: -len(manifests._check_of(b""))]
    with pytest.raises(ArchiveError, match="version 3; this software reads versions up to 2"):
        manifests.decode(body + manifests._check_of(body))


# ------------------------------------------------------------ which files are merged


def sized(rows: list[int]) -> list[ArchiveFile]:
    files = []
    at = 0
    for count in rows:
        files.append(listed(at, at + count, count, count * 9))
        at += count
    return files


def merged(files: list[ArchiveFile], chosen: tuple[int, int]) -> list[ArchiveFile]:
    first, last = chosen
    part = files[first:last]
    rows = sum(file.rows for file in part)
    one = listed(part[0].start_offset, part[-1].end_offset, rows, sum(file.bytes for file in part))
    return [*files[:first], one, *files[last:]]


def test_a_loaded_store_writes_each_event_twice() -> None:
    """Its slices are merged once, into files of the greatest size."""
    slice_rows = archiver.SLICE_EVENTS
    files: list[ArchiveFile] = []
    rewritten = 0
    for _ in range(100):
        start = files[-1].end_offset if files else 0
        files.append(listed(start, start + slice_rows, slice_rows, slice_rows * 9))
        while (chosen := policy.next_merge(files)) is not None:
            assert chosen == (len(files) - policy.FAN_IN, len(files))
            files = merged(files, chosen)
            rewritten += files[-1].rows
    assert rewritten == sum(file.rows for file in files[:6]) == 96 * slice_rows
    assert [file.rows for file in files] == 6 * [policy.FAN_IN * slice_rows] + 4 * [slice_rows]
    assert all(policy.is_full(file) for file in files[:6])


@settings(deadline=None, max_examples=60)
@given(
    rows=st.lists(
        st.one_of(st.integers(1, 100), st.integers(1, 600_000), st.integers(1, policy.ROWS_MAX)),
        min_size=1,
        max_size=150,
    )
)
def test_files_stay_few_and_are_seldom_written_again(rows: list[int]) -> None:
    """Whatever sizes slices have: adjacent ones are merged, within bounds, and it comes to an end."""
    tiers = 4  # of files that aren't full
    files: list[ArchiveFile] = []
    written = 0
    for file in sized(rows):
        files.append(file)
        while (chosen := policy.next_merge(files)) is not None:
            first, last = chosen
            assert 2 <= last - first <= policy.FAN_IN
            assert sum(one.rows for one in files[first:last]) <= policy.ROWS_MAX
            assert sum(one.bytes for one in files[first:last]) <= policy.BYTES_MAX
            written += sum(one.rows for one in files[first:last])
            files = merged(files, chosen)
    assert sum(file.rows for file in files) == sum(rows)
    # A row of small files is merged before it gets long; between two of those lies a file that is larger.
    for tier in range(tiers):
        run = 0
        for file in files:
            run = run + 1 if policy.tier_of(file) <= tier and not policy.is_full(file) else 0
            assert run < policy.FAN_IN
    assert written <= 2 * tiers * sum(rows)


def test_files_that_are_full_are_left() -> None:
    """In rows or in bytes; smaller ones beside them are merged all the same."""
    full = policy.ROWS_MAX
    assert policy.next_merge(sized([full] * 50)) is None
    assert policy.next_merge(sized([full * 2 // 3] * 50)) is None
    assert policy.next_merge(sized([full // 3] * 50)) == (0, 3)
    assert policy.next_merge(sized([full] * 3 + [10] * 16 + [full])) == (3, 19)
    large = [listed(i, i + 1, 1, policy.BYTES_MAX * 2 // 3) for i in range(50)]
    assert policy.next_merge(large) is None
    assert policy.next_merge([]) is None
    assert policy.next_merge(sized([10] * 15)) is None
    assert policy.next_merge(sized([10] * 17)) == (0, 16)
