"""Runs: records folded together end in the state that they end in one by one."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import numpy as np
import pytest

from tallymark_protocol.errors import RemoteProtocolError
from tallymark_protocol.identifiers import encode_event_id
from tallymark_protocol.model import AggType, AlertThreshold, DimensionFilter, UniqueType
from tallymark_protocol.payload import C_CHUNK_TABLE, COLUMNS
from tallymark_store import folding, runs
from tallymark_store.folding import Folding
from tallymark_store.outcomes import Outcomes
from tallymark_store.partition import Partition
from tallymark_store.prepared import exceptions_of
from tallymark_store.wal import DamagedError, RecordKind

from .payload_builder import event
from .store_driver import BASE, WINDOW, Driver, metric, payload_of

SECOND = 10**9
METRICS = [
    metric(
        5,
        code="sum",
        agg_type=AggType.SUM,
        filters=[DimensionFilter(key="region", values=["eu", "us"]), DimensionFilter(key="who")],
        thresholds=[AlertThreshold(code="t", value=40), AlertThreshold(code="u", value=900)],
    ),
    metric(6, code="count", agg_type=AggType.COUNT, grace_seconds=3_600),
    metric(7, code="names", agg_type=AggType.COUNT_UNIQUE, unique_type=UniqueType.STRING),
    metric(8, code="top", agg_type=AggType.MAX),
]


class Manual(Folding):
    """Folds when it is told to."""

    def __init__(self, driver: Driver, partitions: dict[int, Partition]) -> None:
        self.damaged: list[str] = []
        super().__init__(
            driver.wal,
            partitions,
            driver_clock(),
            pause_reading=lambda _: None,
            on_damage=lambda _, error: self.damaged.append(error.message),
            on_failed=lambda _: None,
        )


class _Still:
    def monotonic_ns(self) -> int:
        return 0

    def now_ns(self) -> int:
        return 0


def driver_clock() -> Any:
    return _Still()


def some_event(rng: random.Random, t: int) -> dict[str, Any]:
    code = rng.choice(["sum", "count", "names", "top", "later"])
    fields: dict[str, Any] = {}
    if rng.random() < 0.3:
        fields["id"] = encode_event_id(rng.randrange(30))
    if rng.random() < 0.5:
        fields["time"] = t - rng.randrange(3) * 86_400 * SECOND
    if code == "sum" and rng.random() < 0.6:
        fields["properties"] = {"region": rng.choice(["eu", "us", "ap"]), "who": rng.choice("abcdef")}
    if code == "names":
        fields["text"] = rng.choice([b"\x01ada", b"\x01bob", b"\x01cy", b""])
        fields["operation"] = rng.randrange(3)
    else:
        fields["value"] = rng.randrange(-3, 60)
    return event(rng.randrange(4), code, **fields)


def written(seed: int, records: int = 40) -> Driver:
    """A log of everything that there is: repeats, duplicates, refused events, schemas in between."""
    rng = random.Random(seed)
    driver = Driver(seed=seed)
    for record in METRICS:
        driver.schema(0, record, BASE)
    sent: list[tuple[list[dict[str, Any]], tuple[int, int, int, int, int]]] = []
    t = BASE
    for number in range(records):
        t += rng.randrange(3) * SECOND
        if number == records // 2:
            driver.schema(0, metric(9, code="later", agg_type=AggType.COUNT), t)
        events: list[dict[str, Any]] = []
        chunks = []
        for c in range(rng.randrange(1, 4)):
            if sent and rng.random() < 0.15:
                mine, chunk = rng.choice(sent)
            else:
                mine = [some_event(rng, t) for _ in range(rng.randrange(1, 5))]
                chunk = (rng.randrange(2), 10 * number + c, t, len(mine), rng.getrandbits(32))
                sent.append((mine, chunk))
            events += mine
            chunks.append(chunk)
        driver.append(0, events, chunks, t)
    return driver


def copy_of(driver: Driver, salt: int = 99) -> Partition:
    found = Partition(0, dedup_window_ns=WINDOW, indexes=driver.wal.partitions, salt=salt)
    found.high_watermark = 0
    return found


def one_by_one(driver: Driver, copy: Partition, upto: int) -> None:
    columns = np.zeros(COLUMNS, dtype=np.int64)
    copy.commit(upto)
    while copy.fold_behind:
        found = driver.wal.read(0, copy.applied)
        assert found is not None
        copy.apply_logged(*found, columns)


@pytest.mark.parametrize("seed", range(12))
async def test_a_follower_that_folds_runs_is_where_one_is_that_folds_records(seed: int) -> None:
    """At any pace of commits, also where the judge is ahead on part of the way."""
    rng = random.Random(100 + seed)
    driver = written(seed)
    index = driver.partitions[0].index
    ends = [int(x) for x in index.column("base_offset") + index.column("count")]
    copy = copy_of(driver)
    folds = Manual(driver, {0: copy})
    columns = np.zeros(COLUMNS, dtype=np.int64)
    done = 0
    while done < len(ends):
        done = min(done + rng.randrange(1, 25), len(ends))
        copy.commit(ends[done - 1])
        if rng.random() < 0.4:
            for _ in range(rng.randrange(12)):
                if copy.judged_end < copy.log_end:
                    found = driver.wal.read(0, copy.judged_end)
                    assert found is not None
                    copy.judge_logged(*found, columns)
        steps = 0
        while copy.fold_behind:
            assert folds.fold_some(copy)
            steps += 1
        assert copy.applied == ends[done - 1]
        if copy.judged_end > copy.applied:
            copy.demote()
        other = copy_of(driver, salt=5)
        one_by_one(driver, other, copy.applied)
        assert copy.digest() == other.digest()
        assert copy.outcomes.encode(copy.applied) == other.outcomes.encode(copy.applied)
        assert copy.last_append_ns == other.last_append_ns
        assert folds.events_folded <= copy.applied
    for base in index.column("base_offset")[index.column("kind") == RecordKind.EVENTS].tolist():
        logged, known = driver.read(0, base), copy.outcomes.find(base)
        assert known is not None
        n = int(index.column("count")[index.find(base)])
        wanted = exceptions_of(logged.verdicts, logged.originals, 0, n)
        assert exceptions_of(known.verdicts, known.originals, 0, n) == wanted


async def test_a_repeat_is_answered_as_first_by_a_leader_that_has_folded_runs() -> None:
    """Where the log has dropped the record, and only what was noted of it is left."""
    driver = Driver()
    driver.schema(0, metric(5, code="sum", agg_type=AggType.SUM), BASE)
    twice = [event(1, "sum", value=1, id=encode_event_id(i)) for i in (1, 1, 2)]
    first = [driver.append(0, twice, [(7, n, BASE, 3, 99 + n)], BASE) for n in range(6)]
    copy = copy_of(driver)
    copy.commit(copy.log_end)
    folds = Manual(driver, {0: copy})
    assert folds.fold_some(copy)  # the schema
    assert folds.fold_some(copy)
    assert copy.applied == copy.log_end, "a run"
    driver.partitions[0] = copy
    copy.index.log_start = copy.log_end
    for n in range(6):
        again, _ = driver.prepare(0, payload_of(twice, [(7, n, BASE, 3, 99 + n)]), BASE)
        assert again.record is None
        answers = first[n].answer.chunks, again.answer.chunks
        assert answers[0] == answers[1]
        assert answers[1] is not None
        assert len(answers[1][0].exceptions) == (1 if n == 0 else 3)


@pytest.mark.parametrize("seed", range(6))
def test_a_leader_folds_runs_of_what_it_appended(seed: int) -> None:
    """As one that folds record by record; what is not committed stays."""
    rng = random.Random(seed)
    driver = written(seed)
    leader = driver.partitions[0]
    leader.high_watermark = 0
    index = leader.index
    ends = [int(x) for x in index.column("base_offset") + index.column("count")]
    done = calls = 0
    while done < len(ends):
        done = min(done + rng.randrange(1, 25), len(ends))
        leader.commit(ends[done - 1])
        while leader.fold_behind:
            leader.fold_steps()
            calls += 1
        assert leader.applied == ends[done - 1]
        other = copy_of(driver)
        one_by_one(driver, other, leader.applied)
        other_digest = other.fold.digest()
        assert leader.fold.digest() == other_digest
    assert calls < len(ends)
    assert leader.digest() == other.digest()
    assert leader.outcomes.encode(leader.applied) == other.outcomes.encode(leader.applied)
    assert leader.outcomes.digest(leader.applied) != Outcomes().digest(leader.applied)


async def test_a_run_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """By records, by bytes, and by the size of each: what is large goes alone."""
    driver = written(3)
    copy = copy_of(driver)
    copy.commit(copy.log_end)
    folds = Manual(driver, {0: copy})
    sizes = [int(x) for x in copy.index.column("length")[4:12]]
    assert len(folding.read_run(driver.wal, copy, copy.high_watermark)) == 1  # a schema
    for _ in METRICS:
        folds.fold_some(copy)
    kinds = copy.index.column("kind")[len(METRICS) :].tolist()
    assert len(folding.read_run(driver.wal, copy, copy.high_watermark)) == kinds.index(RecordKind.SCHEMA) > 10
    monkeypatch.setattr(folding, "RUN_RECORDS_MAX", 3)
    assert len(folding.read_run(driver.wal, copy, copy.high_watermark)) == 3
    monkeypatch.setattr(folding, "RUN_RECORDS_MAX", 64)
    monkeypatch.setattr(folding, "RUN_BYTES_MAX", sum(sizes[:2]))
    assert len(folding.read_run(driver.wal, copy, copy.high_watermark)) == 2
    monkeypatch.setattr(folding, "RUN_BODY_BYTES_MAX", sizes[0] - 1)
    assert len(folding.read_run(driver.wal, copy, copy.high_watermark)) == 1
    assert folds.fold_some(copy)
    assert copy.applied == int(copy.index.column("base_offset")[5])


async def test_damage_behind_the_first_record_of_a_run_is_found_in_its_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What lies before it is folded."""
    driver = written(4)
    copy = copy_of(driver)
    copy.commit(copy.log_end)
    folds = Manual(driver, {0: copy})
    bad = len(METRICS) + 6
    read = driver.wal.read_record

    def read_record(number: int, row: int) -> Any:
        if row == bad:
            raise DamagedError("a bad record", partition=number)
        return read(number, row)

    monkeypatch.setattr(driver.wal, "read_record", read_record)
    while folds.fold_some(copy):
        pass
    assert folds.damaged == ["a bad record"]
    assert copy.applied == int(copy.index.column("base_offset")[bad])
    assert copy.judged_end == copy.applied


def test_a_run_that_does_not_hold_what_its_records_say_is_refused() -> None:
    """Counts, payloads and chunk tables are looked at."""
    driver = written(5)
    index = driver.partitions[0].index
    first = int(index.find(int(index.column("base_offset")[len(METRICS)])))
    good = [driver.wal.read_record(0, row) for row in range(first, first + 2)]
    made = runs.of_records(good)
    assert made.events == sum(meta.count for meta, _ in good)
    wrong = msgspec.structs.replace(good[1][0], count=good[1][0].count + 1)
    with pytest.raises(RemoteProtocolError, match="does not hold"):
        runs.of_records([good[0], (wrong, good[1][1])])
    cut = np.frombuffer(bytes(good[1][1])[:-1], np.uint8)
    with pytest.raises(RemoteProtocolError, match="malformed logged payload"):
        runs.of_records([good[0], (good[1][0], cut)])
    data = made.data.copy()
    data[int(made.columns[0, C_CHUNK_TABLE]) + 28] = 0  # the count of a chunk
    data.setflags(write=False)
    with pytest.raises(RemoteProtocolError, match="chunk table"):
        made._replace(data=data).chunks()
