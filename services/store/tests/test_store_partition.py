"""One partition at its leader: what it answers, when it may answer, and that a restart changes neither."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import numpy as np
import pytest

from tallymark_protocol import int128, limits
from tallymark_protocol.errors import ErrorCode, Reason
from tallymark_protocol.identifiers import encode_event_id, encode_text
from tallymark_protocol.model import AggType, AlertThreshold, PeriodType, UniqueType
from tallymark_runtime.disk import DiskError
from tallymark_store import checkpoint
from tallymark_store.prepared import Prepared, exceptions_of
from tallymark_store.window_times import STEPS

from .partition_model import Outcome, PartitionModel
from .payload_builder import event
from .store_driver import BASE, DAY, WINDOW, Driver, metric, payload_of

SECOND = 10**9
MINUTE = 60 * SECOND
SUM = metric(5, code="sum", agg_type=AggType.SUM)
DAILY = metric(6, code="daily", period_type=PeriodType.DAY, grace_seconds=3_600)
USERS = metric(7, code="users", agg_type=AggType.COUNT_UNIQUE)
NAMES = metric(8, code="names", agg_type=AggType.COUNT_UNIQUE, unique_type=UniqueType.STRING)
METRICS = (SUM, DAILY, USERS, NAMES)


def started(**kwargs: Any) -> Driver:
    driver = Driver(**kwargs)
    for number in driver.partitions:
        for record in METRICS:
            driver.schema(number, record, BASE)
    driver.sync()
    return driver


def outcomes(prepared: Prepared, chunks: list[Any]) -> list[Outcome]:
    """An answer in full, also where it says no more than that all went well."""
    answer = prepared.answer
    if answer.chunks is None:
        found: list[Outcome] = []
        base = answer.base_offset
        for chunk in chunks:
            found.append((base, [], 0))
            base += chunk[3]
        return found
    return [
        (outcome.base_offset, list(outcome.exceptions), outcome.error.code if outcome.error else 0)
        for outcome in answer.chunks
    ]


def stats(driver: Driver, account: int, uid: int, time: int) -> tuple[int, int]:
    fold = driver.partitions[0].fold
    found, _, _ = fold.period_stats(account, fold.schemas.slot_of_uid(uid), time)
    return (0, 0) if found is None else (found.count, int128.from_bytes(found.sum) if found.sum else 0)


def test_it_is_known_which_records_may_raise_alerts():
    """From their append to their fold, only those with a metric that has thresholds; what the log holds, if one has."""
    driver = started()
    partition = driver.partitions[0]
    watched = metric(9, code="watched", thresholds=[AlertThreshold(code="first", value=1)])

    def append(sequence: int, code: str) -> int:
        driver.append(0, [event(1, code)], [(9, sequence, BASE, 1, 1)], BASE)
        return partition.log_end

    def committed(end: int) -> bool:
        partition.commit(end)
        return partition.may_alert

    assert not committed(append(1, "sum"))
    driver.schema(0, watched, BASE)
    assert not committed(partition.log_end)
    first, second, plain, third = (
        append(n, code) for n, code in enumerate(("watched", "sum", "none", "watched"), 2)
    )
    assert not partition.may_alert, "nothing of it is committed"
    assert committed(first)
    while partition.applied < first:
        partition.fold_step()
    assert not committed(plain)
    assert committed(third)
    while partition.fold_behind:
        partition.fold_steps()
    assert not partition.may_alert
    end = append(6, "watched")
    driver.wal.sync_all()
    partition.demote()
    assert committed(end), "it is to be read from the log"
    assert (second, partition.folds_from_log) == (first + 1, True)


# ---------------------------------------------------------------- answers


def test_a_repeat_is_answered_as_the_first_time() -> None:
    """Verdicts and originals included; before the commit, after it, and after a restart."""
    driver = started()
    kept = encode_event_id("kept")
    events = [
        event(1, "sum", id=kept),
        event(1, "sum", id=kept),
        event(1, "nothing"),
        event(1, "sum", id=kept, value=2),
        event(1, "sum", operation=1),
    ]
    chunks = [(9, 0, BASE, 5, 77)]
    first = driver.append(0, events, chunks, BASE)
    base = first.answer.base_offset
    expected = [
        (
            base,
            [
                (1, int(Reason.DUPLICATE), base),
                (2, int(Reason.UNKNOWN_METRIC), -1),
                (3, int(Reason.CONFLICT), base),
                (4, int(Reason.BAD_OPERATION), -1),
            ],
            0,
        )
    ]
    assert outcomes(first, chunks) == expected
    assert first.stored == 1
    for step in range(4):
        again = driver.append(0, events, chunks, BASE + step)
        assert again.record is None
        assert again.stored == 0
        assert outcomes(again, chunks) == expected
        assert again.commit_offset == base + 5
        assert again.relies_on_commit
        if step == 0:
            driver.sync()
        if step == 1:
            driver.crash()
        if step == 2:
            driver.checkpoint(0)
            driver.crash()
    assert driver.partitions[0].log_end == base + 5


def test_a_mixed_payload_stores_only_what_is_new() -> None:
    """Repeats, reused and forgotten sequences beside new chunks, one of them twice in the same payload."""
    driver = started()
    driver.append(0, [event(1, "sum", value=10), event(1, "none")], [(9, 4, BASE, 2, 1)], BASE)
    first = driver.partitions[0].log_end - 2
    events = [event(1, "sum", value=100 + i) for i in range(8)]
    chunks = [
        (9, 4, BASE, 2, 1),  # a repeat
        (9, 5, BASE, 1, 2),  # new
        (9, 4, BASE, 1, 3),  # reused
        (8, 0, BASE - limits.CHUNK_RETRY_NS_MAX - 1, 1, 4),  # from outside the window
        (9, 5, BASE, 1, 2),  # a repeat of the new one
        (7, 0, BASE, 2, 5),  # new
    ]
    prepared = driver.append(0, events, chunks, BASE)
    base = first + 2
    assert outcomes(prepared, chunks) == [
        (first, [(1, int(Reason.UNKNOWN_METRIC), -1)], 0),
        (base + 2, [], 0),
        (-1, [], int(ErrorCode.SEQUENCE_REUSED)),
        (-1, [], int(ErrorCode.OUTCOME_UNKNOWN)),
        (base + 2, [], 0),
        (base + 6, [], 0),
    ]
    assert prepared.stored == 3
    assert prepared.relies_on_commit
    assert prepared.commit_offset == base + 8
    driver.sync()
    assert stats(driver, 1, 5, BASE) == (4, 10 + 102 + 106 + 107)
    repeated = driver.append(0, events[6:], [chunks[5]], BASE)
    assert outcomes(repeated, [chunks[5]]) == [(base + 6, [], 0)]
    driver.crash()
    driver.check_digests()
    repeated = driver.append(0, events[6:], [chunks[5]], BASE)
    assert outcomes(repeated, [chunks[5]]) == [(base + 6, [], 0)]


def test_a_repeat_of_a_chunk_from_a_mixed_record_keeps_its_exceptions() -> None:
    """Its events' place in the record's verdict column is not that of the first chunk."""
    driver = started()
    kept = encode_event_id(1)
    driver.append(0, [event(1, "sum", id=kept)], [(9, 0, BASE, 1, 1)], BASE)
    original = driver.partitions[0].log_end - 1
    events = [
        event(1, "sum", id=kept),
        event(2, "sum", id=kept),
        event(2, "sum", id=kept),
        event(1, "sum", id=kept),
    ]
    chunks = [(9, 0, BASE, 1, 1), (9, 1, BASE, 1, 2), (9, 2, BASE, 2, 3)]
    prepared = driver.append(0, events, chunks, BASE)
    base = original + 1
    expected = [
        (0, int(Reason.DUPLICATE), base + 1),
        (1, int(Reason.DUPLICATE), original),
    ]
    assert outcomes(prepared, chunks)[2] == (base + 2, expected, 0)
    driver.crash()
    driver.sync()
    if driver.partitions[0].log_end == base + 4:
        again = driver.append(0, events[2:], chunks[2:], BASE)
        assert outcomes(again, chunks[2:]) == [(base + 2, expected, 0)]


def test_an_id_is_the_same_whatever_else_is_in_its_payload() -> None:
    """A gateway joins what many callers sent: a column that others need must not make a conflict."""
    driver = started()
    kept = encode_event_id("x")
    plain = event(1, "sum", id=kept, value=3)
    driver.append(0, [plain], [(1, 0, BASE, 1, 1)], BASE)
    original = driver.partitions[0].log_end - 1
    others = [
        event(2, "names", text=encode_text("ada")),
        event(2, "sum", properties={"a": "b"}, time=BASE),
        event(2, "users", operation=1),
    ]
    chunks = [(2, 0, BASE, 4, 1)]
    prepared = driver.append(0, [*others, plain], chunks, BASE)
    assert outcomes(prepared, chunks)[0][1] == [(3, int(Reason.DUPLICATE), original)]


@pytest.mark.parametrize(
    "change",
    [{"value": 4}, {"time": BASE}, {"properties": {"a": "b"}}, {"properties": {"b": "a"}}],
    ids=["value", "time", "property", "other property"],
)
def test_the_same_id_with_another_payload_is_a_conflict(change: dict[str, Any]) -> None:
    """Also an explicit time that equals the append time of the first."""
    driver = started()
    plain = event(1, "sum", id=encode_event_id("x"), value=3)
    driver.append(0, [plain], [(1, 0, BASE, 1, 1)], BASE)
    prepared = driver.append(0, [plain | change], [(1, 1, BASE, 1, 1)], BASE)
    assert [x[1] for x in outcomes(prepared, [(1, 1, BASE, 1, 1)])[0][1]] == [int(Reason.CONFLICT)]
    assert prepared.relies_on_commit


def test_ids_are_per_account_and_metric_and_type() -> None:
    """`1` and `"1"`, two accounts, two metrics: all different."""
    driver = started()
    events = [
        event(1, "sum", id=encode_event_id(1)),
        event(1, "sum", id=encode_event_id("1")),
        event(2, "sum", id=encode_event_id(1)),
        event(1, "daily", id=encode_event_id(1)),
    ]
    assert driver.append(0, events, [(1, 0, BASE, 4, 1)], BASE).stored == 4


def test_a_sealed_period_takes_repeats_but_nothing_new() -> None:
    """A repeat of a stored event is a duplicate also then; a rejected event's id is not remembered."""
    driver = started()
    late = event(1, "daily", id=encode_event_id("late"), time=BASE + 5)
    driver.append(0, [late], [(1, 0, BASE, 1, 1)], BASE + 5)
    stored = driver.partitions[0].log_end - 1
    sealed = BASE + DAY + 3_600 * SECOND
    on_time = event(1, "daily", id=encode_event_id("edge"), time=BASE + 6)
    assert driver.append(0, [on_time], [(1, 1, sealed, 1, 1)], sealed).stored == 1
    new = event(1, "daily", id=encode_event_id("new"), time=BASE + 7)
    chunks = [(1, 2, sealed, 3, 1)]
    prepared = driver.append(0, [late, new, new], chunks, sealed + 1)
    assert outcomes(prepared, chunks)[0][1] == [
        (0, int(Reason.DUPLICATE), stored),
        (1, int(Reason.PERIOD_SEALED), -1),
        (2, int(Reason.PERIOD_SEALED), -1),
    ]
    again = event(1, "daily", id=encode_event_id("new"))  # timed by its append
    assert driver.append(0, [again], [(1, 3, sealed, 1, 1)], sealed + 1).stored == 1
    driver.sync()
    driver.crash()
    driver.check_digests()
    assert driver.append(0, [again], [(1, 4, sealed, 1, 1)], sealed + 2).stored == 0


# ---------------------------------------------------------------- windows


def test_an_id_is_remembered_for_the_whole_window_and_no_longer() -> None:
    """And to the end of its step, by append time, to the nanosecond; the same after a restart and from a checkpoint."""
    driver = started()
    one = event(1, "sum", id=encode_event_id("x"))
    driver.append(0, [one], [(1, 0, BASE, 1, 1)], BASE + 1)
    driver.append(0, [event(1, "sum")], [(1, 1, BASE, 1, 1)], BASE + 2)
    driver.sync()
    driver.checkpoint(0)
    step = WINDOW // STEPS
    end = ((BASE + 1) // step + 1) * step - 1 + WINDOW
    assert BASE + 1 + WINDOW <= end < BASE + 1 + WINDOW + step
    inside = driver.append(0, [one], [(2, 0, end, 1, 1)], end)
    assert inside.stored == 0
    driver.sync()
    driver.crash()
    assert driver.append(0, [one], [(2, 1, end, 1, 1)], end).stored == 0
    assert driver.append(0, [one], [(2, 2, end, 1, 1)], end + 1).stored == 1
    assert driver.append(0, [one], [(2, 3, end, 1, 1)], end + 1).stored == 0
    driver.sync()
    driver.checkpoint(0)
    driver.crash()
    driver.check_digests()
    assert driver.append(0, [one], [(2, 4, end, 1, 1)], end + 1).stored == 0


def test_append_time_never_goes_back() -> None:
    """With a clock that does, and with the clock of another life."""
    driver = started()
    ahead = BASE + DAY
    first = driver.append(0, [event(1, "sum")], [(1, 0, ahead, 1, 1)], ahead)
    second = driver.append(0, [event(1, "sum")], [(1, 1, BASE + DAY, 1, 1)], BASE)
    assert (first.append_ns, second.append_ns) == (ahead, ahead)
    driver.sync()
    for _ in range(2):
        driver.crash()
        third = driver.append(0, [event(1, "sum")], [(2, 0, BASE + DAY, 1, 1)], BASE)
        assert third.append_ns == ahead
        driver.sync()
        driver.checkpoint(0)
        times = driver.partitions[0].index.column("append_ns")
        assert (np.diff(times) >= 0).all()


# ---------------------------------------------------------------- order of things


def test_an_answer_waits_for_all_that_it_rests_on() -> None:
    """A duplicate and a repeat of an uncommitted event are not told before its commit."""
    driver = started()
    partition = driver.partitions[0]
    one = event(1, "sum", id=encode_event_id("x"))
    sent: list[str] = []

    def wait(name: str, prepared: Prepared) -> None:
        partition.wait_commit(prepared.commit_offset, lambda: sent.append(name))

    wait("first", driver.append(0, [one], [(1, 0, BASE, 1, 1)], BASE))
    wait("duplicate", driver.append(0, [one], [(2, 0, BASE, 1, 1)], BASE))
    repeat = driver.append(0, [one], [(1, 0, BASE, 1, 1)], BASE)
    assert repeat.record is None
    wait("repeat", repeat)
    reused = driver.append(0, [one], [(1, 0, BASE, 1, 2)], BASE)
    assert reused.record is None
    assert reused.relies_on_commit
    wait("reused", reused)
    assert sent == []
    end = partition.log_end
    for ready in partition.commit(end - 1):
        ready()
    assert sent == ["first"]
    for ready in partition.commit(end):
        ready()
    assert sent == ["first", "duplicate", "repeat", "reused"]
    wait("late", driver.append(0, [one], [(1, 0, BASE, 1, 1)], BASE))
    assert sent[-1] == "late"


def test_what_the_log_refused_leaves_no_trace() -> None:
    """An id of a refused batch is stored when it is sent again, also if another batch came between."""
    driver = started()
    partition = driver.partitions[0]
    events = [event(1, "sum", id=encode_event_id(i)) for i in range(50)]
    chunks = [(1, 0, BASE, 50, 1)]
    before = len(partition.windows)
    prepared, columns = driver.prepare(0, payload_of(events, chunks), BASE)
    assert prepared.stored == 50
    partition.back_out(partition.log_end, columns)
    assert len(partition.windows) == before
    driver.append(0, [event(2, "sum")] * 10, [(2, 0, BASE, 10, 1)], BASE)
    again = driver.append(0, events, chunks, BASE)
    assert again.stored == 50
    driver.sync()
    driver.check_digests()


def test_a_record_that_cannot_be_folded_is_not_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fold stops at it; going on would give totals that lack it."""
    driver = started()
    partition = driver.partitions[0]
    driver.append(0, [event(1, "sum")], [(1, 0, BASE, 1, 1)], BASE)
    applied = partition.applied

    def fail(*_: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(partition.fold, "apply", fail)
        with pytest.raises(MemoryError):
            driver.sync()
    assert partition.applied == applied
    driver.sync()
    assert partition.applied == applied + 1
    assert stats(driver, 1, 5, BASE) == (1, 1)


def test_a_recreated_metric_is_another() -> None:
    """Its ids and totals begin anew; both follow from the log alone."""
    driver = started()
    one = event(1, "sum", id=encode_event_id("x"), value=5)
    driver.append(0, [one], [(1, 0, BASE, 1, 1)], BASE)
    driver.schema(0, msgspec.structs.replace(SUM, deleted=True), BASE)
    gone = driver.append(0, [one], [(1, 1, BASE, 1, 1)], BASE)
    assert outcomes(gone, [])[0][1] == [(0, int(Reason.UNKNOWN_METRIC), -1)]
    driver.schema(0, msgspec.structs.replace(SUM, uid=50), BASE)
    assert driver.append(0, [one], [(1, 2, BASE, 1, 1)], BASE).stored == 1
    assert driver.append(0, [one], [(1, 3, BASE, 1, 1)], BASE).stored == 0
    driver.sync()
    for _ in range(2):
        assert stats(driver, 1, 5, BASE) == (1, 5)
        assert stats(driver, 1, 50, BASE) == (1, 5)
        driver.check_digests()
        driver.checkpoint(0)
        driver.crash()


def test_exceptions_are_cut_out_of_a_verdict_column() -> None:
    """Originals are counted from the column's start, not from the chunk's."""
    verdicts = np.array([1, 0, 16, 2, 1, 0, 20], dtype=np.uint8)
    originals = np.array([70, 80, 90], dtype=np.int64)
    assert exceptions_of(None, originals, 0, 7) == []
    assert exceptions_of(verdicts, originals, 0, 1) == [(0, 1, 70)]
    assert exceptions_of(verdicts, originals, 1, 1) == []
    assert exceptions_of(verdicts, originals, 2, 3) == [(0, 16, -1), (1, 2, 80), (2, 1, 90)]
    assert exceptions_of(verdicts, originals, 5, 2) == [(1, 20, -1)]


# ---------------------------------------------------------------- against the model


class Model:
    """Random work on two partitions, each answer and each restart compared with the model's."""

    def __init__(self, seed: int, id_bytes: int | None = None) -> None:
        self.rng = random.Random(seed)
        self.driver = Driver(partition_count=2, seed=seed, id_bytes=id_bytes)
        self.merges = 0
        self.spilled = 0  # partitions that had ids on disk only, at checks
        self.models = [PartitionModel(WINDOW), PartitionModel(WINDOW)]
        self.now = BASE
        self.uid = 100
        self.sent: list[list[tuple[list[dict[str, Any]], Any]]] = [[], []]  # chunks for repeats
        self.sequences: dict[int, int] = {}
        for number in (0, 1):
            for record in METRICS:
                self.schema(number, record)
        self.driver.sync()

    def schema(self, number: int, record: Any) -> None:
        self.driver.schema(number, record, self.now)
        self.models[number].put_schema(record, self.now)

    def event(self) -> dict[str, Any]:
        rng = self.rng
        code = rng.choice(["sum", "sum", "daily", "users", "names", "unknown"])
        time = rng.choice([None, None, self.now, self.now - rng.randrange(3 * DAY), self.now + 2 * MINUTE])
        if rng.random() < 0.05:
            time = rng.choice([-1, self.now + 2 * 3_600 * SECOND, 0])
        text = encode_text(f"n{rng.randrange(5)}") if code == "names" and rng.random() < 0.9 else None
        return event(
            rng.randrange(4),
            code,
            value=rng.randrange(-2, 5) if text is None else 0,
            time=time,
            operation=rng.choice([0, 0, 0, 0, 1, 2]),
            properties={"p": str(rng.randrange(2))} if rng.random() < 0.2 else {},
            id=encode_event_id(rng.randrange(25)) if rng.random() < 0.6 else None,
            text=text,
        )

    def chunk(self, number: int) -> tuple[list[dict[str, Any]], Any]:
        rng = self.rng
        sent = self.sent[number]
        if sent and rng.random() < 0.35:
            events, chunk = rng.choice(sent[-12:])
            if rng.random() < 0.1:
                return events, (*chunk[:4], chunk[4] + 1)  # the same sequence with other content
            return events, chunk
        producer = rng.randrange(3)
        step = 1 if rng.random() < 0.95 else limits.PRODUCER_WINDOW + rng.randrange(3)
        sequence = self.sequences[producer] = self.sequences.get(producer, 2_000) + step
        if rng.random() < 0.05:
            sequence = max(0, sequence - rng.randrange(1_500))
        events = [self.event() for _ in range(rng.randint(1, 6))]
        first_sent = self.now - rng.choice([0, 0, 0, SECOND, limits.CHUNK_RETRY_NS_MAX + MINUTE])
        made = events, (producer, sequence, first_sent, len(events), rng.randrange(2**32 - 1))
        sent.append(made)
        return made

    def append(self) -> None:
        number = self.rng.randrange(2)
        picked = [self.chunk(number) for _ in range(self.rng.randint(1, 4))]
        events = [one for part, _ in picked for one in part]
        chunks = [chunk for _, chunk in picked]
        expected, stored = self.models[number].append(events, chunks, self.now)
        partition = self.driver.partitions[number]
        data = payload_of(events, chunks)
        if self.rng.random() < 0.1:  # the log is busy: it is sent again
            _, columns = self.driver.prepare(number, data, self.now)
            partition.back_out(partition.log_end, columns)
        prepared = self.driver.append(number, events, chunks, self.now)
        assert outcomes(prepared, chunks) == expected
        assert prepared.stored == stored
        relies = any(first < prepared.answer.base_offset for first, _, code in expected if not code)
        assert prepared.relies_on_commit or not relies
        assert partition.log_end == self.models[number].log_end

    def checkpoint(self) -> None:
        number = self.rng.randrange(2)
        if self.rng.random() < 0.4:
            operation = self.rng.choice(["create", "write", "sync", "rename", "remove", "sync_dir"])
            self.driver.disk.fail_next(operation, name=self.rng.choice(["", "state", "ids", "MANIFEST"]))
        try:
            if self.rng.random() < 0.3:
                self.driver.write_checkpoint(number)  # and no more: it is never switched to
            else:
                self.driver.sync()
                self.driver.checkpoint(number)
            if self.driver.budget.limit_bytes is not None:
                while number in self.driver.manifests and self.driver.merge(number):
                    self.merges += 1
            if self.rng.random() < 0.5:
                self.driver.wal_start()
        except DiskError:
            self.restart()
        self.driver.disk._memory.faults.clear()

    def restart(self) -> None:
        committed = [partition.high_watermark for partition in self.driver.partitions.values()]
        self.driver.crash(lose_all=self.rng.random() < 0.3)
        for number, partition in self.driver.partitions.items():
            assert partition.error is None
            assert partition.log_end >= committed[number], "LOG-1: what was acknowledged is there"
            self.models[number].cut(partition.log_end)
        self.check()

    def check(self) -> None:
        self.driver.sync()
        self.driver.check_digests()
        for number, partition in self.driver.partitions.items():
            self.spilled += partition.dedup.spilled_end > 0
            fold = partition.fold
            for (account, uid, start), (count, total) in self.models[number].totals().items():
                found, _, _ = fold.period_stats(account, fold.schemas.slot_of_uid(uid), start)
                assert found is not None
                assert found.count == count
                if uid == SUM.uid:
                    assert int128.from_bytes(found.sum) == total

    def recreate(self) -> None:
        number = self.rng.randrange(2)
        living = self.models[number].metrics().get("sum")  # none: it came back deleted from a crash
        if living is not None:
            self.schema(number, msgspec.structs.replace(living, deleted=True))
        self.uid += 1
        self.schema(number, msgspec.structs.replace(SUM, uid=self.uid))

    def run(self, steps: int) -> None:
        for _ in range(steps):
            if self.driver.budget.limit_bytes is not None and self.rng.random() < 0.4:
                self.checkpoint()
            draw = self.rng.random()
            if draw < 0.60:
                self.append()
            elif draw < 0.72:
                self.driver.sync()
            elif draw < 0.80:
                self.checkpoint()
            elif draw < 0.86:
                self.restart()
            elif draw < 0.88:
                self.recreate()
            else:
                span = self.rng.choice([SECOND, MINUTE, 10 * MINUTE, 3_600 * SECOND, DAY, -MINUTE])
                self.now += self.rng.randrange(abs(span)) * (1 if span > 0 else -1)
        self.check()
        self.restart()


@pytest.mark.parametrize("seed", range(6))
def test_every_answer_is_the_models(seed: int) -> None:
    """Chunks, repeats, ids, conflicts, sealed periods, checkpoints that fail, crashes: DEDUP-1, FOLD-1, LOG-1."""
    Model(seed).run(150)


@pytest.mark.parametrize("seed", range(10, 18))
def test_every_answer_is_the_models_with_ids_on_disk(seed: int) -> None:
    """The same with no memory for ids, or some: all of them, or the older ones, are in files, which are merged."""
    model = Model(seed, id_bytes=0 if seed % 2 else 2_500)
    model.driver.spills_all = bool(seed % 2)
    model.run(250)
    assert model.merges > 0
    assert model.spilled > 5


@pytest.mark.parametrize("spills", [True, False])
def test_an_id_on_disk_is_remembered_to_the_windows_edge(spills: bool) -> None:
    """Of a file that holds ids from before it and after it, and of a merged one; beside a twin in memory."""
    driver = started(id_bytes=0 if spills else None)
    step = WINDOW // STEPS
    times = [BASE + i * step for i in range(12)]
    for i, time in enumerate(times):
        driver.append(0, [event(1, "sum", id=encode_event_id(i))], [(1, i, time, 1, 1)], time)
        driver.sync()
        driver.checkpoint(0)
    while spills and driver.merge(0):
        pass
    assert (len(driver.manifests[0].id_files) < 8) == spills
    sequence = 0
    for i, time in enumerate(times):
        end = (time // step + 1) * step - 1 + WINDOW
        for now, stored in ((end, 0), (end + 1, 1), (end + 1, 0)):
            again = driver.append(
                0, [event(1, "sum", id=encode_event_id(i))], [(2, sequence, now, 1, 1)], now
            )
            assert again.stored == stored
            sequence += 1
        driver.sync()
        driver.check_digests()
        if i % 3 == 2:
            driver.checkpoint(0)
            driver.crash()
            assert (driver.partitions[0].dedup.spilled_end > 0) == spills
            driver.check_digests()


def test_a_checkpoint_is_not_in_force_before_the_switch() -> None:
    """Its files may be there, whole; the one before still is what counts."""
    driver = started()
    driver.checkpoint(0)
    before = driver.manifests[0]
    driver.append(0, [event(1, "sum")], [(1, 0, BASE, 1, 1)], BASE)
    driver.sync()
    written = driver.write_checkpoint(0)
    assert written.offset > before.offset
    assert checkpoint.load_manifest(driver.checkpoints(0)) == before
