"""Checkpoint files: whole or not there, whatever fails in between, and only what is still needed."""

from __future__ import annotations

import contextlib
import random

import msgspec
import numpy as np
import pytest

from tallymark_runtime.disk import DiskError, MemoryDisk
from tallymark_store import checkpoint, container
from tallymark_store.dedup.index import ENTRY_DTYPE
from tallymark_store.wal import WalConfig, open_wal

from .power_cut import CountingDisk, CrashAt

Manifest = checkpoint.Manifest


def ids(start: int, end: int) -> np.ndarray:
    """Remembered ids of the events [start, end)."""
    rows = np.zeros(end - start, dtype=ENTRY_DTYPE)
    rows["offset"] = np.arange(start, end)
    rows["lo"] = rows["offset"] * 7
    return rows


def take(
    disk: MemoryDisk,
    previous: Manifest | None,
    offset: int,
    *,
    floor: int = 0,
    new: np.ndarray | None = None,
) -> Manifest:
    """Write and publish a checkpoint at `offset`, whose ids are those since the one before."""
    since = previous.offset if previous else 0
    manifest = Manifest(checkpoint.FORMAT_VERSION, 3, offset, offset * 10)
    written = checkpoint.write(
        disk,
        previous,
        manifest=manifest,
        state={"x": np.array([offset])},
        new_ids=ids(since, offset) if new is None else new,
        id_floor=floor,
    )
    checkpoint.publish(disk, written)
    return written


def loaded(disk: MemoryDisk) -> tuple[int, list[int]] | None:
    """The offset of the checkpoint in force and the offsets of its ids; None where there is none."""
    manifest = checkpoint.load_manifest(disk)
    if manifest is None:
        return None
    state = checkpoint.load_state(disk, manifest)
    assert state["x"].tolist() == [manifest.offset]  # type: ignore[union-attr]
    assert manifest.last_append_ns == manifest.offset * 10
    offsets = [int(x) for part in checkpoint.load_ids(disk, manifest) for x in part["offset"]]
    return manifest.offset, sorted(offsets)


def test_a_checkpoint_adds_to_the_one_before() -> None:
    """Ids are written once and listed again; files that nobody lists are gone."""
    disk = MemoryDisk()
    assert loaded(disk) is None
    first = take(disk, None, 5)
    second = take(disk, first, 5 + 4)
    third = take(disk, second, 20, new=ids(0, 0))
    assert loaded(disk) == (20, list(range(9)))
    assert [entry[1:] for entry in third.id_files] == [(0, 5), (5, 9)]
    assert disk.list() == sorted(["MANIFEST", third.state_file, *(name for name, _, _ in third.id_files)])


def test_id_files_leave_with_the_window() -> None:
    """A file goes once its last id has expired, not before."""
    disk = MemoryDisk()
    manifest = take(disk, None, 10)
    manifest = take(disk, manifest, 20, floor=9)
    assert loaded(disk) == (20, list(range(20)))
    manifest = take(disk, manifest, 30, floor=10)
    assert loaded(disk) == (30, list(range(10, 30)))
    manifest = take(disk, manifest, 40, floor=40)
    assert [entry[1:] for entry in manifest.id_files] == [(30, 40)]


def test_many_id_files_are_joined() -> None:
    """Nothing that is still remembered is lost in it, and nothing expired is carried on for ever."""
    disk = MemoryDisk()
    manifest = None
    for i in range(1, 101):
        floor = max(0, 10 * (i - 50) + 3)
        manifest = take(disk, manifest, 10 * i, floor=floor)
        assert len(manifest.id_files) <= checkpoint.ID_FILES_MAX + 1
        found = loaded(disk)
        assert found is not None
        assert [x for x in found[1] if x >= floor] == list(range(floor, 10 * i))
    assert manifest is not None
    joined = checkpoint.load_ids(disk, manifest)[0]
    assert len(manifest.id_files) < checkpoint.ID_FILES_MAX
    assert int(joined["offset"].min()) > 0


def test_a_damaged_id_file_cannot_be_joined() -> None:
    """The error says so, and writing everything anew works."""
    disk = MemoryDisk()
    manifest = None
    for i in range(1, checkpoint.ID_FILES_MAX + 1):
        manifest = take(disk, manifest, 10 * i)
    assert manifest is not None
    disk.flip_bit(manifest.id_files[4][0], 100)
    with pytest.raises(checkpoint.CheckpointError, match="ids-"):
        take(disk, manifest, 1_000)
    assert checkpoint.load_manifest(disk) == manifest
    take(disk, None, 1_000)
    assert loaded(disk) == (1_000, list(range(1_000)))


@pytest.mark.parametrize("operation", ["create", "write", "sync", "rename", "remove", "sync_dir"])
def test_a_failing_disk_leaves_one_whole_checkpoint(operation: str) -> None:
    """Whichever call fails, the old one is in force or the new one; also after the crash that follows."""
    for skip in range(8):
        disk = MemoryDisk()
        first = take(disk, None, 5)
        names = ["ids-", "state-", "MANIFEST", ""]
        disk.fail_next(operation, name=names[skip % 4])
        with contextlib.suppress(DiskError):
            take(disk, first, 9)
        assert loaded(disk) in [(5, list(range(5))), (9, list(range(9)))]
        disk.crash(random.Random(skip))
        now = loaded(disk)
        assert now in [(5, list(range(5))), (9, list(range(9)))]
        before = checkpoint.load_manifest(disk)
        take(disk, before, 12)
        assert loaded(disk) == (12, list(range(12)))


def test_power_may_go_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a checkpoint that joins files and removes them: the old one is in force or the new one, and readable."""
    monkeypatch.setattr(checkpoint, "ID_FILES_MAX", 4)
    steps = 0
    for lose_all in (False, True):
        step = 0
        while True:
            disk = MemoryDisk()
            manifest = take(disk, None, 10)
            for i in range(2, checkpoint.ID_FILES_MAX + 1):
                manifest = take(disk, manifest, 10 * i)
            old = loaded(disk)
            calls = [step]
            try:
                take(CountingDisk(disk, calls), manifest, 1_000, floor=5)  # type: ignore[arg-type]
            except CrashAt:
                disk.crash(random.Random(step), lose_all=lose_all)
                found = loaded(disk)
                assert found in [old, (1_000, list(range(5, 1_000)))]
                step += 1
                continue
            disk.crash(random.Random(step), lose_all=lose_all)
            assert loaded(disk) == (1_000, list(range(5, 1_000)))
            break
        steps += step
    assert steps > 40


def test_a_half_written_checkpoint_does_not_harm_the_next() -> None:
    """Its files have the names of the next one's, with other content, if the log's tail was lost in between."""
    disk = MemoryDisk()
    first = take(disk, None, 5)
    manifest = Manifest(checkpoint.FORMAT_VERSION, 3, 9, 90)
    checkpoint.write(
        disk, first, manifest=manifest, state={"x": np.arange(5_000)}, new_ids=ids(100, 900), id_floor=0
    )
    disk.crash(random.Random(1))
    assert loaded(disk) == (5, list(range(5)))
    take(disk, first, 9)
    disk.crash(random.Random(2))
    assert loaded(disk) == (9, list(range(9)))


def test_damage_is_an_error_and_never_another_state() -> None:
    """Of each file, by each kind of damage."""
    for kind in ("flip", "cut", "remove"):
        disk = MemoryDisk()
        take(disk, take(disk, None, 5), 9)
        for name in disk.list():
            whole = disk.open(name).read(0, disk.open(name).size()).copy()
            if kind == "flip":
                disk.flip_bit(name, len(whole) // 2)
            elif kind == "cut":
                disk.cut(name, len(whole) - 1)
            elif name == "MANIFEST":
                continue
            else:
                disk.remove(name)
            with pytest.raises(checkpoint.CheckpointError):
                loaded(disk)
            disk.create(name).write(0, [whole])
        assert loaded(disk) == (9, list(range(9)))


def test_a_newer_format_is_refused() -> None:
    """With a sentence that names both versions."""
    disk = MemoryDisk()
    manifest = msgspec.structs.replace(take(disk, None, 5), format_version=99)
    checkpoint.publish(disk, manifest)
    with pytest.raises(checkpoint.CheckpointError, match=r"99.*reads versions 3 and 4"):
        checkpoint.load_manifest(disk)


@pytest.mark.parametrize("content", [{"manifest": b"\xc1"}, {"other": b""}, {"manifest": np.zeros(3)}])
def test_a_file_that_is_no_manifest_is_refused(content: dict[str, container.Part]) -> None:
    """Though it is undamaged."""
    disk = MemoryDisk()
    checkpoint.write_container(disk, "MANIFEST", content)
    with pytest.raises(checkpoint.CheckpointError):
        checkpoint.load_manifest(disk)


def test_ids_of_another_shape_are_refused() -> None:
    """Though the file is undamaged."""
    disk = MemoryDisk()
    manifest = take(disk, None, 5)
    checkpoint.write_container(disk, manifest.id_files[0][0], {"entries": np.zeros(5)})
    with pytest.raises(checkpoint.CheckpointError, match="holds no event ids"):
        checkpoint.load_ids(disk, manifest)


def test_discarding_leaves_nothing() -> None:
    """Also of files that no manifest lists; the manifest goes first."""
    disk = MemoryDisk()
    take(disk, None, 5)
    disk.create("state-00000000000000000009").write(0, [b"x"])
    checkpoint.discard(disk)
    assert disk.list() == []
    checkpoint.discard(disk)
    disk.crash(random.Random(1))
    assert disk.list() == []


def test_the_logs_start_is_kept_whole() -> None:
    """The old one or the new one, at every step of replacing it; damage is an error."""
    disk = MemoryDisk()
    assert checkpoint.load_wal_start(disk) is None
    wal, _ = open_wal(disk.at("wal"), new_log_id=bytes(range(16)), config=WalConfig(segment_bytes=4_096))
    old = wal.snapshot()
    checkpoint.write_wal_start(disk, old)
    step = 0
    while True:
        calls = [step]
        try:
            checkpoint.write_wal_start(CountingDisk(disk, calls), old)  # type: ignore[arg-type]
        except CrashAt:
            disk.crash(random.Random(step))
            found = checkpoint.load_wal_start(disk)
            assert found is not None
            assert found.position == old.position
            step += 1
            continue
        break
    assert step > 4
    disk.flip_bit("wal-start", 40)
    with pytest.raises(checkpoint.CheckpointError, match="wal-start"):
        checkpoint.load_wal_start(disk)
