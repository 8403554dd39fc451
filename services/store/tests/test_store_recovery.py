"""From a data directory to partitions: whatever of the checkpoints is missing, and what must be refused."""

from __future__ import annotations

from typing import Any

import pytest

from tallymark_protocol.errors import ErrorCode
from tallymark_protocol.identifiers import encode_event_id
from tallymark_protocol.model import AggType
from tallymark_store import checkpoint

from .payload_builder import event
from .store_driver import BASE, Driver, metric

SUM = metric(5, code="sum", agg_type=AggType.SUM)
SECOND = 10**9


def filled(*, checkpoints: bool = True, partitions: int = 2) -> Driver:
    """A store with ids, repeats and a schema in each partition, records before and after a checkpoint."""
    driver = Driver(partition_count=partitions)
    for number in range(partitions):
        driver.schema(number, SUM, BASE)
        send(driver, number, 0, 40)
    driver.sync()
    for number in range(partitions if checkpoints else 0):
        driver.checkpoint(number)
        driver.wal_start()
    for number in range(partitions):
        send(driver, number, 1, 30)
    driver.sync()
    return driver


def send(driver: Driver, number: int, sequence: int, n: int) -> Any:
    events = [
        event(i % 3, "sum", value=i, id=encode_event_id(1_000 * sequence + i) if i % 2 else None)
        for i in range(n)
    ]
    return driver.append(number, events, [(7, sequence, BASE, n, sequence)], BASE + sequence * SECOND)


def state(driver: Driver) -> list[tuple[int, str]]:
    return [(partition.log_end, partition.digest()) for partition in driver.partitions.values()]


def check_repeats(driver: Driver, number: int) -> None:
    """Nothing is stored again: neither by its sequence nor by its ids."""
    for sequence, n in ((0, 40), (1, 30)):
        repeat = send(driver, number, sequence, n)
        assert repeat.record is None
        again = [
            event(i % 3, "sum", value=i, id=encode_event_id(1_000 * sequence + i)) for i in range(1, n, 2)
        ]
        prepared = driver.append(
            number, again, [(8, sequence, BASE + SECOND, len(again), 1)], BASE + 2 * SECOND
        )
        assert prepared.stored == 0
    driver.sync()


def test_a_restart_finds_the_same_state() -> None:
    """With checkpoints only what follows them is folded, without them everything; the state is the same."""
    for checkpoints, replayed in ((True, 2), (False, 6)):
        driver = filled(checkpoints=checkpoints)
        before = state(driver)
        driver.crash()
        assert state(driver) == before
        assert driver.reports == []
        assert driver.found.records_replayed == replayed
        driver.check_digests()
        for number in (0, 1):
            assert driver.partitions[number].high_watermark == driver.partitions[number].log_end
            check_repeats(driver, number)


@pytest.mark.parametrize("part", ["MANIFEST", "state-", "ids-"])
@pytest.mark.parametrize("kind", ["flip", "cut", "remove"])
def test_a_damaged_checkpoint_only_costs_time(part: str, kind: str) -> None:
    """The partition is folded again from its first record; the other one isn't."""
    driver = filled()
    before = state(driver)
    disk = driver.checkpoints(0)
    name = next(name for name in disk.list() if name.startswith(part))
    if kind == "flip":
        disk.flip_bit(name, 60)
    elif kind == "cut":
        disk.cut(name, 20)
    else:
        disk.remove(name)
        disk.sync_dir()
    driver.crash()
    assert state(driver) == before
    assert driver.found.records_replayed == 3 + 1
    assert (len(driver.reports) == 1) == (not (part == "MANIFEST" and kind == "remove"))
    assert 0 not in driver.manifests
    assert 1 in driver.manifests
    check_repeats(driver, 0)
    driver.checkpoint(0)
    driver.crash()
    assert driver.reports == []
    driver.check_digests()


def test_a_checkpoint_of_another_version_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """It costs time; and it is there for the version that can read it, until there is another one."""
    driver = filled()
    before, names = state(driver), driver.checkpoints(0).list()
    with monkeypatch.context() as other:
        other.setattr(checkpoint, "FORMAT_VERSION", checkpoint.FORMAT_VERSION + 1)
        driver.crash()
        assert state(driver) == before
        assert len(driver.reports) == 2
        assert driver.found.records_replayed == 6
        assert driver.checkpoints(0).list() == names
    driver.crash()
    assert state(driver) == before
    assert driver.found.records_replayed == 2
    check_repeats(driver, 0)


def test_a_checkpoint_of_another_partition_is_not_used() -> None:
    """Folders that were mixed up cost time, and no total."""
    driver = filled()
    before = state(driver)
    ours, theirs = driver.checkpoints(0), driver.checkpoints(1)
    manifest = checkpoint.load_manifest(theirs)
    assert manifest is not None
    checkpoint.discard(ours)
    for name in theirs.list():
        content = theirs.open(name).read(0, theirs.open(name).size())
        file = ours.create(name)
        file.write(0, [content])
        file.sync()
    ours.sync_dir()
    driver.crash()
    assert state(driver) == before
    assert len(driver.reports) == 1


def test_a_damaged_start_of_the_log_only_costs_time() -> None:
    """The whole log is read."""
    driver = filled()
    before = state(driver)
    driver.disk.at("checkpoints").flip_bit("wal-start", 50)
    driver.crash()
    assert state(driver) == before
    assert "whole log" in driver.reports[0]


def test_a_log_that_is_gone_is_never_taken_for_a_new_one() -> None:
    """A checkpoint shows what it held: the partition is refused, and nothing is overwritten."""
    for with_start in (True, False):
        driver = filled()
        wal = driver.disk.at("wal")
        for name in wal.list():
            wal.remove(name)
        wal.sync_dir()
        if not with_start:
            checkpoints = driver.disk.at("checkpoints")
            checkpoints.remove("wal-start")
            checkpoints.sync_dir()
        driver.crash()
        for partition in driver.partitions.values():
            assert partition.error is not None
            assert partition.error.code == ErrorCode.PARTITION_DAMAGED
            assert not partition.error.retriable
        assert len(driver.reports) >= 2
        manifest = checkpoint.load_manifest(driver.checkpoints(0))
        assert manifest is not None
        assert manifest.offset == 41
        driver.crash()
        assert all(partition.error is not None for partition in driver.partitions.values())


def test_damage_in_the_log_refuses_only_who_is_concerned() -> None:
    """With the file and the place, for a person; the other partition is served as before."""
    driver = filled(checkpoints=False)
    before = state(driver)
    index = driver.partitions[0].index
    row = index.row(index.find(20))
    wal = driver.disk.at("wal")
    name = wal.list()[0]
    driver.wal.write_marker()
    driver.sync()
    wal.flip_bit(name, row.position + 200)
    driver.crash()
    error = driver.partitions[0].error
    assert error is not None
    assert error.code == ErrorCode.PARTITION_DAMAGED
    assert name in error.message
    assert driver.partitions[1].error is None
    assert (driver.partitions[1].log_end, driver.partitions[1].digest()) == before[1]


def test_rot_behind_a_checkpoint_is_found_by_whoever_reads_there() -> None:
    """The log's start lets recovery pass over it; folding again does not."""
    driver = filled()
    index = driver.partitions[0].index
    row = index.row(index.find(20))
    wal = driver.disk.at("wal")
    wal.flip_bit(wal.list()[0], row.position + 200)
    driver.crash()
    assert driver.partitions[0].error is None
    disk = driver.checkpoints(0)
    disk.flip_bit(next(name for name in disk.list() if name.startswith("state-")), 80)
    driver.crash()
    error = driver.partitions[0].error
    assert error is not None
    assert "restore" in error.message.lower()
    assert driver.partitions[1].error is None
    driver.sync()
    driver.crash()
    assert driver.partitions[0].error is not None
