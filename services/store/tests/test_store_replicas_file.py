"""REPLICAS: what was promised is never forgotten, whatever happens to the file in between."""

from __future__ import annotations

import random

import pytest

from tallymark_runtime.disk import DiskError, DiskFullError, MemoryDisk
from tallymark_store.replicas_file import NAME, SLOT_BYTES, ReplicasFile, ReplicasFileError
from tallymark_store.replication.ports import DurableState

OLD = DurableState("copy", 5, "one", 10)
NEW = DurableState("copy", 6, "two", 12)


def saved(disk: MemoryDisk) -> ReplicasFile:
    file = ReplicasFile(disk)
    file.use_log(b"log")
    file.save_all({3: OLD})
    return file


def test_what_is_saved_is_there_after_a_crash() -> None:
    """States of several partitions, and which log they lie in."""
    disk = MemoryDisk()
    file = ReplicasFile(disk)
    assert file.is_new
    file.use_log(b"log")
    file.save(3, OLD)
    file.save(200, NEW)
    file.save(3, NEW)
    disk.crash(random.Random(1), lose_all=True)
    again = ReplicasFile(disk)
    assert not again.is_new
    assert (again.states, again.log_id) == ({3: NEW, 200: NEW}, b"log")
    again.save(200, None)
    assert ReplicasFile(disk).states == {3: NEW}


@pytest.mark.parametrize("slot", [0, 1])
def test_one_rotten_slot_costs_nothing(slot: int) -> None:
    """The other one holds the same, and the file is healed."""
    disk = MemoryDisk()
    saved(disk).save(3, NEW)
    disk.flip_bit(NAME, slot * SLOT_BYTES + 30)
    assert ReplicasFile(disk).states == {3: NEW}
    disk.flip_bit(NAME, (1 - slot) * SLOT_BYTES + 30)
    assert ReplicasFile(disk).states == {3: NEW}


def test_two_rotten_slots_are_damage() -> None:
    """Never an empty state."""
    disk = MemoryDisk()
    saved(disk)
    disk.flip_bit(NAME, 30)
    disk.flip_bit(NAME, SLOT_BYTES + 30)
    with pytest.raises(ReplicasFileError):
        ReplicasFile(disk)


@pytest.mark.parametrize("seed", range(40))
def test_a_torn_save_leaves_the_old_state_or_the_new(seed: int) -> None:
    """A crash in the middle of either slot's write."""
    disk = MemoryDisk()
    file = saved(disk)
    rng = random.Random(seed)
    disk.fail_next("sync") if seed % 2 else disk.fail_next("write")
    try:
        file.save(3, NEW)
    except DiskError:
        assert file.states == {3: OLD}
    disk.crash(rng)
    assert ReplicasFile(disk).states[3] in (OLD, NEW)


def test_a_full_disk_keeps_nobody_from_promising() -> None:
    """The room was taken when the file was made."""
    disk = MemoryDisk()
    file = saved(disk)
    disk.capacity = 2 * SLOT_BYTES
    for epoch in range(6, 50):
        file.save(3, DurableState("copy", epoch, "x" * 16, 2**62))
    assert ReplicasFile(disk).states[3].promised == 49
    empty = MemoryDisk(capacity=100)
    with pytest.raises(DiskFullError):
        ReplicasFile(empty).save(3, OLD)


def test_there_is_room_for_a_whole_cluster() -> None:
    """256 partitions with the longest of everything."""
    disk = MemoryDisk()
    file = ReplicasFile(disk)
    state = DurableState("f" * 32, 2**63 - 1, "f" * 16, 2**63 - 1)
    file.use_log(bytes(16))
    file.save_all(dict.fromkeys(range(256), state))
    assert len(ReplicasFile(disk).states) == 256


def test_a_file_that_was_being_made_is_none() -> None:
    """It gets its name when it is whole."""
    disk = MemoryDisk()
    ReplicasFile(disk)
    disk.create(NAME + ".new").write(0, [b"half"])
    file = ReplicasFile(disk)
    assert file.is_new
    file.save(1, OLD)
    assert ReplicasFile(disk).states == {1: OLD}


def test_a_copy_lies_in_the_log_that_it_was_begun_in() -> None:
    """One that was begun after the log was lost is there after every restart, the others are lost."""
    disk = MemoryDisk()
    file = saved(disk)
    file.save(4, OLD)
    file = ReplicasFile(disk)
    file.use_log(b"another")
    assert [number for number in (3, 4, 5) if file.is_lost(number)] == [3, 4]
    file.save(3, DurableState("copy", 6, "one", 10))
    assert file.is_lost(3)
    file.save(3, DurableState("fresh", 6, "one", 0))
    file.save(5, NEW)
    for _ in range(2):
        file = ReplicasFile(disk)
        file.use_log(b"another")
        assert [number for number in (3, 4, 5) if file.is_lost(number)] == [4]
    disk.fail_next("write")
    with pytest.raises(DiskError):
        file.save(4, DurableState("fresh", 6, "one", 0))
    assert file.is_lost(4)
