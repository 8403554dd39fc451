"""What is in the log is in the files, each accepted event once and as it was given."""

from __future__ import annotations

import uuid
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tallymark_protocol.identifiers import encode_event_id, encode_text
from tallymark_protocol.model import AggType, UniqueType
from tallymark_runtime.disk import MemoryDisk
from tallymark_store.archive import archiver, writer
from tallymark_store.archive.columns import sorted_rows
from tallymark_store.archive.merge import merge
from tallymark_store.archive.merge_kernels import merge_runs
from tallymark_store.archive.names import MetricNames
from tallymark_store.scan.events import EventsScan
from tallymark_store.wal import DamagedError

from .archive_helpers import APPEND, PARTITION, Log, events_of, table_of, usual_log

ACCOUNTS = [0, 1, 42, 2**63 - 1, 2**63, 2**64 - 1]
WORDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
NUMBERS = st.one_of(
    st.integers(-(2**2039), 2**2039 - 1),
    st.integers(-(2**70), 2**70),
    st.sampled_from(
        [0, -1, 127, 128, -128, -129, 255, 256, 10**9, 10**9 - 1, -(10**18), 2**63, -(2**63), 2**64]
    ),
)
IDS = st.one_of(
    st.none(),
    WORDS.filter(bool),
    st.binary(min_size=1, max_size=40),
    st.integers(0, 2**128 - 1).map(lambda number: uuid.UUID(int=number)),
    NUMBERS,
).map(lambda event_id: None if event_id is None else encode_event_id(event_id))
VALUES = st.one_of(
    st.sampled_from([1, 0, -1, 2**63 - 1, -(2**63)]),
    st.integers(-(2**63), 2**63 - 1),
    WORDS.map(encode_text),
    st.integers(2**63, 2**64 - 1).map(lambda number: b"\x02" + number.to_bytes(8, "little")),
)
PROPERTIES = st.dictionaries(st.sampled_from(["p", "r", "x", 'q"\\\n', "\u00e9\u4e2d"]), WORDS, max_size=4)
EVENTS = st.fixed_dictionaries(
    {
        "account": st.sampled_from(ACCOUNTS),
        "code": st.sampled_from(["a", "b", "c"]),
        "value": VALUES,
        "time": st.one_of(st.none(), st.integers(APPEND - 5, APPEND + 5), st.integers(0, 2**62)),
        "op": st.integers(0, 2),
        "properties": PROPERTIES,
        "id": IDS,
    }
)
BATCHES = st.lists(st.tuples(EVENTS, st.sampled_from([0, 0, 0, 1, 2, 3])), min_size=1, max_size=12)
STEPS = st.lists(st.one_of(BATCHES, st.sampled_from(["again", "version", "control"])), min_size=1, max_size=6)


def log_of(steps: list[Any]) -> Log:
    log = Log()
    log.metric(5, "a", agg_type=AggType.SUM)
    log.metric(6, "b", agg_type=AggType.COUNT_UNIQUE, unique_type=UniqueType.STRING)
    log.metric(7, "c")
    for step in steps:
        if step == "again":  # the code was deleted, and created again: once is enough
            if log.schemas.slot_of_uid(8) < 0:
                log.metric(8, "a")
        elif step == "version":
            log.changed("b")
        elif step == "control":
            log.end += 1
        else:
            log.batch([event for event, _ in step], [verdict for _, verdict in step])
    return log


def by_offset(log: Log) -> list[dict[str, Any]]:
    return sorted(log.rows, key=lambda row: row["offset"])


@settings(deadline=None, max_examples=150)
@given(steps=STEPS)
def test_every_accepted_event_is_in_the_file_as_it_was_given(steps: list[Any]) -> None:
    """Every kind of id, value, property, verdict and time, metrics that change and that are made again."""
    log = log_of(steps)
    disk = MemoryDisk()
    files = log.archived(disk)
    assert len(files) == bool(log.rows)
    for file in files:
        table = table_of(disk, file.name)
        assert events_of(table) == by_offset(log)
        assert file.rows == len(log.rows)
        assert file.bytes == disk.open(file.name).size()
        times = [row["time_ns"] for row in log.rows]
        assert (file.min_time_ns, file.max_time_ns) == (min(times), max(times))


@settings(deadline=None, max_examples=60)
@given(steps=STEPS, events=st.integers(1, 9))
def test_slices_and_merges_keep_every_event(steps: list[Any], events: int) -> None:
    """However the log is cut into slices, wherever row groups end, and however files are merged."""
    log = log_of(steps)
    disk = MemoryDisk()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(archiver, "SLICE_EVENTS", events)
        patch.setattr(archiver, "RUN_EVENTS", 4)
        patch.setattr(writer, "ROW_GROUP_ROWS", 3)
        patch.setattr("tallymark_store.archive.merge.ROW_GROUP_ROWS", 3)
        patch.setattr(writer, "_COMPACT_FROM", 0)
        files = log.archived(disk)
        assert sorted(
            (event for file in files for event in events_of(table_of(disk, file.name))),
            key=lambda event: event["offset"],
        ) == by_offset(log)
        if len(files) >= 2:
            half = len(files) // 2
            if half >= 2:
                merged = archiver.merge_files(disk, PARTITION, tuple(files[:half]))
                files = [merged, *files[half:]]
            whole = archiver.merge_files(disk, PARTITION, tuple(files))
            assert events_of(table_of(disk, whole.name)) == by_offset(log)
            assert (whole.start_offset, whole.end_offset) == (files[0].start_offset, files[-1].end_offset)


def test_what_a_reader_of_the_log_finds_is_what_the_file_holds() -> None:
    """The same events as `list_events` pages through."""
    log = usual_log()
    disk = MemoryDisk()
    (file,) = log.archived(disk)
    scan = EventsScan(log.source, account=None, metric=None, start_ns=0, end_ns=2**62, applied=log.end)
    scan.run()
    found = [
        (
            e.offset,
            e.account_id,
            e.metric_code,
            e.event_time_ns,
            e.append_time_ns,
            e.operation,
            e.properties,
            e.event_id,
        )
        for e in scan.events
    ]
    rows = events_of(table_of(disk, file.name))
    names = ("offset", "account", "metric", "time_ns", "append_time_ns", "operation", "properties", "id")
    assert found == [tuple(row[name] for name in names) for row in rows]
    values = [row["value"][1:].decode() if isinstance(row["value"], bytes) else row["value"] for row in rows]
    assert [e.value for e in scan.events] == values


def test_row_groups_tell_what_they_hold() -> None:
    """Bounded, with the least and the greatest of what is looked for, so that few need be read."""
    log = usual_log(records=20)
    disk = MemoryDisk()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "ROW_GROUP_ROWS", 100)
        (file,) = log.archived(disk)
    found = writer.open_file(disk, file.name)
    assert found.metadata.num_row_groups == -(-file.rows // 100)
    assert found.metadata.metadata[b"tallymark.start_offset"] == b"0"
    assert found.metadata.metadata[b"tallymark.end_offset"] == str(log.end).encode()
    last = 0
    for number in range(found.metadata.num_row_groups):
        group = found.metadata.row_group(number)
        assert group.num_rows <= 100
        by_name = {group.column(c).path_in_schema: group.column(c) for c in range(group.num_columns)}
        uid = by_name["metric_uid"].statistics
        assert last <= uid.min <= uid.max
        last = uid.max
        for name in ("account", "time_ns", "offset", "metric"):
            column = found.read_row_group(number, columns=[name]).column(name).to_pylist()
            assert (by_name[name].statistics.min, by_name[name].statistics.max) == (min(column), max(column))


def test_many_different_properties_are_kept() -> None:
    """More than a dictionary may hold: each row group is written with its own, or without any."""
    log = Log()
    log.metric(5, "a")
    for r in range(4):
        log.batch(
            [
                {
                    "account": i % 7, "code": "a", "value": 1, "id": encode_event_id(uuid.UUID(int=r * 10_000 + i)),
                    "properties": {"p": str(i % 3), "request": f"{r}/{i}" * 9},
                }
                for i in range(5_000)
            ]
        )  # fmt: skip
    disk = MemoryDisk()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "ROW_GROUP_ROWS", 15_000)
        files = log.archived(disk)
    assert events_of(table_of(disk, files[0].name)) == by_offset(log)


def test_a_slice_ends_between_records() -> None:
    """At its bound of events, of bytes or of records, with one record at least; control records are passed over."""
    log = usual_log(records=6, events=10)
    start = 2  # two metrics come first
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(archiver, "SLICE_EVENTS", 25)
        assert archiver.plan_slice(log.source, 0, log.end)[1:] == (30, 0, start + 30)  # type: ignore[index]
        assert archiver.plan_slice(log.source, start + 30, log.end)[1:] == (30, start + 30, log.end)  # type: ignore[index]
        patch.setattr(archiver, "SLICE_BYTES", 1)
        assert archiver.plan_slice(log.source, 0, log.end)[1:] == (10, 0, start + 10)  # type: ignore[index]
        patch.undo()
        patch.setattr(archiver, "SLICE_RECORDS", 2)
        assert archiver.plan_slice(log.source, 0, log.end)[1:] == (20, 0, start + 20)  # type: ignore[index]
        patch.undo()
        # What isn't whole below the target is left.
        assert archiver.plan_slice(log.source, 0, start + 15)[1:] == (10, 0, start + 10)  # type: ignore[index]
        assert archiver.plan_slice(log.source, start, start + 5) is None
        assert archiver.plan_slice(log.source, 0, start)[1:] == (0, 0, start)  # type: ignore[index]
        assert archiver.plan_slice(log.source, log.end, log.end) is None


def test_damage_in_the_log_is_told_and_nothing_is_written() -> None:
    """A record whose checksum fails, and one whose checksum holds but that makes no sense."""
    log = usual_log()
    log.source.flip_bit(3, 60)
    disk = MemoryDisk()
    with pytest.raises(DamagedError, match="checksum"):
        log.archived(disk)
    assert disk.list() == []
    log = Log()
    log.metric(5, "a")
    log.metric(6, "b")
    log.batch([{"account": 1, "code": "b", "value": 1}])
    strange = Log()
    strange.metric(5, "a")
    planned = archiver.plan_slice(log.source, 0, log.end)
    assert planned is not None
    with pytest.raises(DamagedError, match="a metric that there is not"):
        archiver.write_slice(disk, PARTITION, MetricNames(strange.schemas), planned)
    log.source.append(
        b"\0" * 40, base_offset=log.end, count=3, append_ns=APPEND, min_time_ns=0, max_time_ns=1
    )
    log.end += 3
    with pytest.raises(DamagedError, match="malformed"):
        log.archived(disk)


@settings(deadline=None, max_examples=100)
@given(data=st.data(), rows=st.integers(0, 300))
def test_rows_are_ordered_by_all_keys(data: Any, rows: int) -> None:
    """As Python sorts them, equal ones in their first order."""
    word = st.sampled_from([st.integers(0, 3), st.integers(0, 2**64 - 1), st.just(7)])
    keys = [
        np.array(data.draw(st.lists(data.draw(word), min_size=rows, max_size=rows)), np.uint64)
        for _ in range(3)
    ]
    expected = sorted(range(rows), key=lambda row: tuple(int(key[row]) for key in keys))
    assert sorted_rows(*keys).tolist() == expected


def test_a_file_is_the_same_whenever_it_is_written() -> None:
    """Byte for byte: nothing of the machine or the moment is in it."""
    disks = [MemoryDisk(), MemoryDisk()]
    files = [usual_log().archived(disk) for disk in disks]
    assert files[0] == files[1]
    assert writer.checksum(disks[0], files[0][0].name) == (files[0][0].bytes, files[0][0].crc32c)


def test_merging_holds_a_row_group_of_each_file() -> None:
    """Not whole files: what is sorted at a time is bounded by the groups that are held."""
    log = usual_log(records=40)
    disk = MemoryDisk()
    held = taken = 0

    def watched(*arguments: Any) -> Any:
        nonlocal held, taken
        *_, ends, order = arguments
        held, taken = max(held, int(ends[-1])), max(taken, len(order))
        return merge_runs(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(archiver, "SLICE_EVENTS", 500)
        patch.setattr(writer, "ROW_GROUP_ROWS", 20)
        patch.setattr("tallymark_store.archive.merge.ROW_GROUP_ROWS", 20)
        files = log.archived(disk)
        assert len(files) == 4
        patch.setattr("tallymark_store.archive.merge.merge_runs", watched)
        merge(disk, files, "m", {})
    assert 20 < held <= 4 * 20
    assert 0 < taken <= 20
    assert events_of(table_of(disk, "m")) == by_offset(log)


@pytest.mark.parametrize("runs", [1, 2, 3, 5, 16, 17])
def test_runs_are_merged_as_a_stable_sort_would(runs: int) -> None:
    """Step by step, runs without rows among them, keys up to the largest: equal ones in the order of their runs."""
    rng = np.random.default_rng(runs)
    for step in (1, 7, 1_000):
        sizes = rng.integers(0, 40, runs)
        ends = np.cumsum(sizes)
        starts = ends - sizes
        keys = rng.choice(np.array([0, 1, 2**63, 2**64 - 1], np.uint64), (3, int(ends[-1])))
        for start, end in zip(starts, ends, strict=True):
            within = np.lexsort(keys[::-1, start:end])
            keys[:, start:end] = keys[:, start:end][:, within]
        expected = np.lexsort(keys[::-1]).tolist()
        at, found = starts.copy(), []
        while len(found) < len(expected):
            before = at.copy()
            order = np.empty(min(step, len(expected) - len(found)), np.int32)
            merge_runs(*keys, at, ends, order)
            rows = np.concatenate([np.arange(a, b) for a, b in zip(before, at, strict=True)])
            found += rows[order].tolist()
        assert found == expected
        assert at.tolist() == ends.tolist()
