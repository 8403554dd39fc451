"""Alert records that are in files: every read answers as if they were in memory, and damage is never an answer."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from tallymark_protocol.model import AggType, AlertThreshold
from tallymark_runtime.disk import MemoryDisk
from tallymark_store import alert_spilling
from tallymark_store.alert_spilling import hot_records, mergeable, merged_parts, open_alerts, write_alerts
from tallymark_store.checkpoint import CheckpointError
from tallymark_store.fold import Fold
from tallymark_store.fold.alert_files import AlertFile, AlertFiles, in_pieces
from tallymark_store.fold.fold import AlertChoice
from tallymark_store.fold.spilled import SpilledFileError
from tallymark_store.wal import DamagedError

from .payload_builder import build_payload, event, place
from .store_driver import BASE, metric

SECOND = 10**9
SCHEMAS = [
    metric(
        5 + k,
        code=f"m{k}",
        agg_type=AggType.COUNT,
        thresholds=[
            AlertThreshold(code="every", value=1, recurring=True),
            AlertThreshold(code="two", value=2),
        ],
    )
    for k in range(2)
]


def made(batches: int, *, seed: int = 1) -> Fold:
    """A fold with hundreds of alert records, several at most moments."""
    rng = random.Random(seed)
    fold = Fold(3)
    for record in SCHEMAS:
        fold.put_schema(record, fold.applied)
    for number in range(batches):
        events = [event(rng.randrange(5), f"m{rng.randrange(2)}", value=1, time=BASE) for _ in range(40)]
        data, columns = place(build_payload(events, [(7, number, BASE, len(events))]))
        fold.apply(data, columns, None, fold.applied, BASE + number // 2 * SECOND)
    return fold


def spill(fold: Fold, disk: MemoryDisk, count: int, name: str) -> AlertFile:
    """The oldest records that are in memory, to a file."""
    start = fold.alert_files.end
    file = write_alerts(disk, name, 3, start, in_pieces(fold.oldest_alerts(count)), count)
    fold.forget_alerts(file)
    return file


def questions(fold: Fold) -> list[Any]:
    """What is asked of either."""
    count = fold.alert_count
    asked: list[Any] = [count, fold.digest(), fold.alerts(0, limit=10_000), fold.alerts_at([])]
    asked.append(fold.alerts_at([0, 1, count // 2, count - 1]))
    for start in range(0, count, 97):
        asked.append(fold.alerts_at(range(start, min(start + 30, count))))
        asked.append(fold.find_alerts(start, count, account=3, limit=7))
        asked.append(fold.find_alerts(start, start + 300, slot=1, limit=1_000))
        asked.append(fold.find_alerts(start, count, choice=AlertChoice([1, 4], ["m0"]), limit=20))
        asked.append(fold.find_alerts(start, count, limit=5))
        asked.append(fold.alerts(start, account=2, slot=0, limit=3))
    asked += [fold.alert_at_time(time) for time in range(BASE - SECOND, BASE + 30 * SECOND, SECOND // 2)]
    return asked


@pytest.mark.parametrize("counts", [[1], [255, 1], [256], [257], [100, 156, 300, 8], None])
def test_reads_are_the_same_wherever_records_are(counts: list[int] | None) -> None:
    """Pages, filters, times and digest, across the edges of files and of what has a checksum; and after a restart."""
    twin, fold, disk = made(24), made(24), MemoryDisk()
    assert twin.alert_count > 900
    expected = questions(twin)
    for number, count in enumerate([twin.alert_count] if counts is None else counts):
        spill(fold, disk, count, f"alerts-{number}")
    assert fold.alert_bytes() == (twin.alert_count - fold.alert_files.end) * 96
    assert fold.memory_bytes() < twin.memory_bytes()
    assert questions(fold) == expected
    files = [open_alerts(disk, name, name, 3) for name in fold.alert_files.names]
    restored = Fold.restore(3, fold.snapshot(), hash_seed=5, alert_files=files)
    assert questions(restored) == expected
    with pytest.raises(Exception, match="alert records end at position"):
        Fold.restore(3, fold.snapshot(), alert_files=files[:-1])


def test_records_are_added_behind_those_in_files() -> None:
    """Folding goes on, whether all records went or some; what is spilled later follows."""
    twin, fold, disk = made(12), made(12), MemoryDisk()
    spill(fold, disk, fold.alert_count, "alerts-1")
    for number in range(12, 16):
        for one in (twin, fold):
            events = [event(k % 5, "m0", value=1, time=BASE) for k in range(60)]
            data, columns = place(build_payload(events, [(7, number, BASE, len(events))]))
            one.apply(data, columns, None, one.applied, BASE + number * SECOND)
        if number % 2:
            spill(fold, disk, 50, f"alerts-{number}")
    assert fold.alert_files.end < fold.alert_count
    assert questions(fold) == questions(twin)


def test_neighbours_are_merged() -> None:
    """Files of about one size become one, of the same records; very different ones stay, unless there are too many."""
    twin, fold, disk = made(24), made(24), MemoryDisk()
    for number in range(8):
        assert mergeable(fold.alert_files.files) == []
        spill(fold, disk, 20 + 10 * number, f"alerts-{number}")
    old = mergeable(fold.alert_files.files)
    assert len(old) == alert_spilling.MERGED_FILES == 8
    new = write_alerts(disk, "alerts-all", 3, 0, merged_parts(old), old[-1].end)
    fold.alert_files.replace(old, new)
    assert fold.alert_files.names == ["alerts-all"]
    assert questions(fold) == questions(twin)
    with pytest.raises(SpilledFileError, match="begins at position"):
        AlertFiles(3, [old[1]])


def test_every_flipped_bit_is_damage() -> None:
    """Of header, sums or records: found when the file is opened or when the record is read, and by a look at all."""
    fold, disk = made(24), MemoryDisk()
    count = fold.alert_count
    file = spill(fold, disk, count, "alerts-1")
    assert set(file.damage()) == {-1}
    written = disk.open("alerts-1")
    size = written.size()
    rng = random.Random(3)
    for position in [*range(64), *rng.sample(range(64, size), 60), size - 1]:
        data = np.array(written.read(0, size))
        data[position] ^= 1 << rng.randrange(8)
        disk.create("rotten").write_sync(0, [data.tobytes()])
        try:
            rotten = open_alerts(disk, "rotten", "rotten", 3)
        except CheckpointError:
            continue
        assert max(rotten.damage()) >= 64
        with pytest.raises(DamagedError, match="rotten"):
            list(rotten.pieces(0, count))
        # What lies elsewhere in the file is as good as before.
        record = (position - 64) // 96
        far = 0 if record >= 256 else 256
        assert (rotten.rows(far, far + 1) == file.rows(far, far + 1)).all()
    disk.create("cut").write_sync(0, [np.array(written.read(0, size - 1)).tobytes()])
    with pytest.raises(CheckpointError, match="bytes"):
        open_alerts(disk, "cut", "cut", 3)
    with pytest.raises(CheckpointError, match="none of partition 4"):
        open_alerts(disk, "alerts-1", "alerts-1", 4)


def test_the_newest_stay_where_they_fit() -> None:
    """Of a budget at most half is left full, of all partitions together."""
    assert hot_records(0, 4) == 0
    assert hot_records(96 * 80, 4) == 10
    assert hot_records(2**40, 1) == alert_spilling.HOT_RECORDS
