"""A copy's judge: at the fold while it follows, at the log's end while it leads, and back again."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from tallymark_protocol.errors import Reason, RemoteProtocolError
from tallymark_protocol.identifiers import encode_event_id
from tallymark_protocol.model import AggType
from tallymark_protocol.payload import COLUMNS
from tallymark_store.partition import Partition
from tallymark_store.wal import RecordKind, RecordMeta

from .payload_builder import event
from .store_driver import BASE, WINDOW, Driver, metric

SUM = metric(5, code="sum", agg_type=AggType.SUM)
LATER = metric(9, code="later", agg_type=AggType.COUNT)
SECOND = 10**9


def send(driver: Driver, sequence: int, n: int = 10, *, code: str = "sum", first: int | None = None) -> Any:
    start = 100 * sequence if first is None else first
    events = [event(i % 3, code, value=i, id=encode_event_id(start + i)) for i in range(n)]
    return driver.append(0, events, [(7, sequence, BASE, n, sequence)], BASE + sequence * SECOND)


def written() -> Driver:
    """A log of a schema, three batches (one with duplicates), another schema, and a batch of its metric."""
    driver = Driver()
    driver.schema(0, SUM, BASE)
    for sequence in range(2):
        send(driver, sequence)
    send(driver, 2, first=5)
    driver.schema(0, LATER, BASE + 3 * SECOND)
    send(driver, 4, code="later")
    return driver


class Copy:
    """A copy that reads a driver's log."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.partition = Partition(0, dedup_window_ns=WINDOW, indexes=driver.wal.partitions, salt=99)
        self.partition.high_watermark = 0
        self._columns = np.zeros(COLUMNS, dtype=np.int64)

    def commit(self, offset: int) -> None:
        for answer in self.partition.commit(offset):
            answer()

    def fold(self, records: int = 1_000) -> None:
        partition = self.partition
        while records and partition.fold_behind:
            if partition.folds_from_log:
                found = self.driver.wal.read(0, partition.applied)
                assert found is not None
                partition.apply_logged(*found, self._columns)
            else:
                partition.fold_step()
            records -= 1

    def judge(self, records: int = 1_000) -> None:
        partition = self.partition
        while records and partition.judged_end < partition.log_end:
            found = self.driver.wal.read(0, partition.judged_end)
            assert found is not None
            partition.judge_logged(*found, self._columns)
            records -= 1

    def check(self) -> None:
        """The applied state is what the log says."""
        recount = Copy(self.driver)
        recount.commit(self.partition.applied)
        recount.fold()
        assert recount.partition.applied == self.partition.applied
        assert recount.partition.digest() == self.partition.digest()


def ends(driver: Driver) -> list[int]:
    index = driver.partitions[0].index
    return [int(x) for x in index.column("base_offset") + index.column("count")]


def test_a_follower_folds_what_is_committed() -> None:
    """Record by record; what is not committed leaves no trace, metrics included."""
    driver = written()
    copy = Copy(driver)
    for end in ends(driver):
        copy.commit(end)
        copy.fold()
        assert copy.partition.applied == copy.partition.judged_end == end
        copy.check()
    copy = Copy(driver)
    copy.commit(ends(driver)[3])
    copy.fold()
    assert copy.partition.schemas.slot_of("later") == -1
    assert copy.partition.schemas.slot_of("sum") == 0


def test_whoever_begins_to_lead_judges_as_the_one_before() -> None:
    """Repeats, ids and metrics of the whole log are known, at whatever offset the fold is."""
    driver = written()
    for folded in [0, *ends(driver)]:
        copy = Copy(driver)
        copy.commit(folded)
        copy.fold()
        copy.judge()
        partition = copy.partition
        assert partition.judged_end == partition.log_end
        assert partition.applied == folded
        driver.partitions[0], kept = partition, driver.partitions[0]
        repeat = driver.prepare(0, _payload(0), BASE + 9 * SECOND)[0]
        assert repeat.record is None
        known = driver.prepare(0, _payload(50, first=100), BASE + 9 * SECOND)[0]
        assert known.stored == 0
        assert known.answer.chunks is not None
        assert {x[1] for x in known.answer.chunks[0].exceptions} == {int(Reason.DUPLICATE)}
        assert partition.schemas.slot_of("later") == 1
        assert partition.last_append_ns == BASE + 4 * SECOND
        driver.partitions[0] = kept


def _payload(sequence: int, *, first: int | None = None) -> bytes:
    from .store_driver import payload_of

    start = 100 * sequence if first is None else first
    events = [event(i % 3, "sum", value=i, id=encode_event_id(start + i)) for i in range(10)]
    return payload_of(events, [(7, sequence, BASE, 10, sequence)])


def test_whoever_stops_forgets_what_is_not_folded() -> None:
    """Ids, chunks and metrics of the suffix are as new, whether they were judged here or read from the log."""
    driver = written()
    every = ends(driver)
    for folded in [0, *every]:
        copy = Copy(driver)
        copy.commit(folded)
        copy.fold()
        before = copy.partition.digest()
        copy.judge()
        copy.partition.demote()
        partition = copy.partition
        assert partition.judged_end == partition.applied == folded
        assert partition.digest() == before
        assert (partition.schemas.slot_of("later") >= 0) == (folded >= every[4])
        assert len(partition.schemas.uids) == len(partition.fold.schemas.uids)
        copy.commit(every[-1])
        copy.fold()
        copy.check()


def test_a_leaders_own_records_are_taken_back_with_the_log() -> None:
    """Appended, not committed, truncated: what another leader writes instead is judged as if they had never been."""
    driver = Driver()
    driver.schema(0, SUM, BASE)
    send(driver, 0)
    driver.sync()
    partition = driver.partitions[0]
    kept = partition.log_end
    send(driver, 1)
    driver.schema(0, LATER, BASE + 2 * SECOND)
    sent: list[str] = []
    partition.wait_commit(partition.log_end, lambda: sent.append("sent"), lambda: sent.append("failed"))
    freed = partition.demote()
    assert freed > 0
    for fail in partition.fail_waiting():
        fail()
    assert sent == ["failed"]
    assert partition.waiting_count == 0
    driver.wal.truncate(0, kept, epoch=1, append_ns=0)
    assert partition.schemas.slot_of("later") == -1
    assert partition.last_append_ns == BASE
    again = send(driver, 1)
    assert again.stored == 10
    driver.sync()
    driver.check_digests()


def test_a_leader_folds_what_it_found_and_what_it_wrote() -> None:
    """The part that came from the log is folded from it, then the queue, in one row."""
    driver = written()
    copy = Copy(driver)
    copy.commit(ends(driver)[0])
    copy.fold()
    copy.judge()
    driver.partitions[0] = copy.partition
    send(driver, 6)
    send(driver, 7)
    copy.commit(ends(driver)[2])
    copy.fold()
    copy.check()
    copy.commit(copy.partition.log_end)
    copy.fold()
    assert copy.partition.applied == copy.partition.log_end
    copy.check()
    assert send(driver, 6).record is None


@pytest.mark.parametrize("seed", range(12))
def test_any_order_of_leading_and_following(seed: int) -> None:
    """Two copies of one log take turns; at every stop both are what the log says, and answer alike."""
    rng = random.Random(seed)
    driver = Driver(seed=seed)
    copies = [Copy(driver), Copy(driver)]
    leading = 0
    driver.partitions[0] = copies[0].partition
    driver.schema(0, SUM, BASE)
    committed = driver.partitions[0].log_end
    sequence = 0
    for _ in range(60):
        lead, follow = copies[leading], copies[1 - leading]
        match rng.randrange(6):
            case 0 | 1:
                sequence += 1
                repeated = rng.random() < 0.3 and sequence > 1
                send(driver, rng.randrange(sequence) if repeated else sequence, rng.randrange(1, 12))
            case 2:
                boundaries = [end for end in ends(driver) if end >= committed]
                committed = rng.choice(boundaries) if boundaries else committed
                lead.commit(committed)
            case 3:
                lead.fold(rng.randrange(1, 4))
            case 4:
                follow.commit(committed)
                follow.fold(rng.randrange(1, 4))
            case 5:
                lead.partition.demote()
                lead.partition.fail_waiting()
                if rng.random() < 0.5:
                    driver.wal.truncate(0, committed, epoch=1, append_ns=0)
                    sequence += 100  # what was cut off may come again, under its own sequence, or never
                follow.commit(committed)
                follow.judge()
                leading = 1 - leading
                driver.partitions[0] = follow.partition
    for copy in copies:
        copy.commit(committed)
        copy.fold()
        copy.check()
    assert copies[0].partition.digest() == copies[1].partition.digest()


def test_a_batch_that_is_not_what_its_header_says_is_refused() -> None:
    """Bytes of another store never reach the fold unchecked."""
    driver = written()
    copy = Copy(driver)
    found = driver.wal.read(0, 1)
    assert found is not None
    meta, body = found
    copy.commit(1)
    copy.fold()
    wrong = RecordMeta(0, RecordKind.EVENTS, 1, 1, meta.count - 1, meta.append_ns)
    columns = np.zeros(COLUMNS, dtype=np.int64)
    with pytest.raises(RemoteProtocolError):
        copy.partition.apply_logged(wrong, body, columns)
    with pytest.raises(RemoteProtocolError):
        copy.partition.apply_logged(meta, body[:-3], columns)
