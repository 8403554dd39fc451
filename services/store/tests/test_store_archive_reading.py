"""What is read from archive and log is what the log alone would have given."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tallymark_protocol import int128
from tallymark_protocol.errors import UnavailableError
from tallymark_protocol.messages import EventRecord, StoreEvents, StoreTotals
from tallymark_protocol.model import AggType
from tallymark_protocol.periods import day_of
from tallymark_protocol.schema import make_record
from tallymark_runtime.disk import MemoryDisk
from tallymark_store.archive import archiver, reading, writer
from tallymark_store.archive.archiver import merge_files
from tallymark_store.archive.manifest import Manifest
from tallymark_store.archive.reading import ArchiveReader
from tallymark_store.scan import column_kernels
from tallymark_store.scan.archived import ArchiveDamagedError
from tallymark_store.scan.events import EventsScan
from tallymark_store.scan.metric import ScanMetric
from tallymark_store.scan.source import MemorySource
from tallymark_store.scan.totals import TotalsScan

from . import archive_helpers
from .archive_helpers import APPEND
from .payload_builder import event
from .reads_helpers import (
    ACCOUNTS,
    BASE,
    DAY,
    END,
    PARTITION,
    SCHEMAS,
    Log,
    finish,
    random_buckets,
    random_filters,
    random_log,
    without_flags,
)
from .test_store_archive_columns import ACCOUNTS as ODD_ACCOUNTS
from .test_store_archive_columns import STEPS, log_of


def split_of(log: Log, rng: random.Random) -> int:
    """An offset between two records."""
    ends = [0, *(log.source.rows(0, END).base_offset.tolist()), log.fold.applied]
    return int(rng.choice(ends[1:]))


@pytest.mark.parametrize("seed", range(16))
def test_totals_equal_a_recount(seed: int) -> None:
    """Every aggregation, range, filter and breakdown, wherever the archive ends and the log begins."""
    log = random_log(seed)
    rng = random.Random(seed + 700)
    log.uniques_max = rng.choice((16, 1_024))
    log.archive(rng, log.fold.applied if seed % 4 == 0 else split_of(log, rng))
    for _ in range(80):
        record = log.records[rng.choice(SCHEMAS).code]
        keys = [dimension.key for dimension in record.schema.filters]
        request = StoreTotals(
            partition=PARTITION,
            metric_code=record.schema.code,
            account_id=rng.choice((*ACCOUNTS, 555)),
            buckets=random_buckets(rng, record),
            filters=random_filters(rng, record),
            group_by=rng.sample(keys, rng.randrange(len(keys) + 1)) if rng.random() < 0.5 else [],
        )
        result = finish(log.reads.plan_totals(request), rng)
        got = [(row.bucket, row.group, without_flags(row.stats)) for row in result.rows]
        assert got == log.totals(request), request


@pytest.mark.parametrize("seed", range(6))
def test_rankings_equal_a_recount(seed: int) -> None:
    """The best accounts over any range and filter."""
    log = random_log(seed)
    rng = random.Random(seed + 800)
    log.archive(rng, split_of(log, rng))
    for _ in range(40):
        record = log.records[rng.choice(SCHEMAS).code]
        agg_type = record.schema.agg_type
        request = StoreTotals(
            PARTITION,
            record.schema.code,
            None,
            random_buckets(rng, record)[:1],
            random_filters(rng, record) if rng.random() < 0.5 else [],
            top=rng.choice((1, 2, 100)),
        )
        result = finish(log.reads.plan_totals(request), rng)
        expected = []
        for account in ACCOUNTS:
            events = log.wanted(record.schema.code, account, *request.buckets[0], request.filters)
            if events:
                stats = log.reference.stats(events, agg_type)
                aggregate = {
                    AggType.COUNT: stats.count,
                    AggType.SUM: int128.from_bytes(stats.sum),
                    AggType.MAX: stats.max,
                    AggType.LATEST: stats.last_value,
                    AggType.COUNT_UNIQUE: stats.unique,
                }[agg_type]
                assert aggregate is not None
                expected.append((-aggregate, account, stats))
        expected.sort(key=lambda row: row[:2])
        got = [(row.account_id, without_flags(row.stats)) for row in result.rows]
        assert got == [(account, stats) for _, account, stats in expected[: request.top]], request


@pytest.mark.parametrize("seed", range(4))
def test_pages_go_on_while_the_archive_grows(seed: int) -> None:
    """A cursor means the same before and after what it points at was archived, merged, and dropped from the log."""
    log, twin = random_log(seed), random_log(seed)
    rng = random.Random(seed + 900)
    for code in (None, "max", "sum", "names"):
        for account in (7, None):
            at: int | None = 0
            got, expected = [], []
            while at is not None:
                if rng.random() < 0.2:
                    log.source = random_log(seed).source
                    log.archive(rng, split_of(log, rng))
                request = StoreEvents(
                    PARTITION, account, code, BASE, BASE + 4 * DAY, at, rng.choice((1, 9, 50))
                )
                page, other = log.reads.events(request), twin.reads.events(request)
                assert msgspec.msgpack.encode(page) == msgspec.msgpack.encode(other)
                got += page.events
                expected += other.events
                at = page.next_offset
            assert got == expected


def pages(log: archive_helpers.Log, source: MemorySource, archived: Any, **asked: Any) -> list[EventRecord]:
    scan = EventsScan(source, applied=log.end, archived=archived, **asked)
    scan.run()
    return [*scan.events, scan.next_offset]  # type: ignore[list-item]


@settings(deadline=None, max_examples=120)
@given(steps=STEPS, choices=st.randoms(use_true_random=False))
def test_events_are_given_back_as_from_the_log(steps: list[Any], choices: random.Random) -> None:
    """Every kind of id, value and property set: byte for byte the same pages, whatever of them is archived."""
    log = log_of(steps)
    disk = MemoryDisk()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(archiver, "SLICE_EVENTS", choices.randrange(1, 9))
        patch.setattr(writer, "ROW_GROUP_ROWS", choices.choice((2, 5, 100)))
        patch.setattr(reading, "HITS", choices.choice((1, 3, 100)))
        patch.setattr(reading, "DECODED_MAX_BYTES", choices.choice((0, 10**6)))
        ends = [*log.source.rows(0, log.end).base_offset.tolist(), log.end]
        end = choices.choice(ends)
        files = log.archived(disk, 0, end) if end else []
        if len(files) > 1 and choices.random() < 0.5:
            files = [merge_files(disk, archive_helpers.PARTITION, tuple(files))]
        view = ArchiveReader(disk, archive_helpers.PARTITION).view(
            Manifest(archive_helpers.PARTITION, "", end, tuple(files))
        )
        metrics = [
            ScanMetric("a", 5, AggType.SUM, 0, 2**62), ScanMetric("b", 6, AggType.COUNT_UNIQUE, 0, 2**62), None,
        ]  # fmt: skip
        if log.schemas.slot_of_uid(8) >= 0:
            since = log.schemas.offsets_of(log.schemas.slot_of_uid(8))[0]
            metrics[0] = metrics[0]._replace(end_offset=since)  # type: ignore[union-attr]
            metrics.append(ScanMetric("a", 8, AggType.SUM, since, 2**62))
        for _ in range(4):
            low = choices.choice((0, APPEND - 3, APPEND, APPEND + 4))
            asked = {
                "account": choices.choice((*ODD_ACCOUNTS, None, None)),
                "metric": choices.choice(metrics),
                "start_ns": low,
                "end_ns": choices.choice((low, low + 3, 2**63 - 1)),
                "from_offset": choices.randrange(log.end + 2),
                "limit": choices.choice((1, 2, 1_000)),
                "bytes_max": choices.choice((1, 300, 10**6)),
            }
            whole = pages(log, log.source, None, **asked)
            assert msgspec.msgpack.encode(pages(log, log.source, view, **asked)) == msgspec.msgpack.encode(
                whole
            )
        dropped = log_of(steps).source
        dropped.drop(end)
        everything = {"account": None, "metric": None, "start_ns": 0, "end_ns": 2**63 - 1}
        assert pages(log, dropped, view, **everything) == pages(log, log.source, None, **everything)


def test_a_flipped_bit_never_gives_a_wrong_answer() -> None:
    """Anywhere in a file: what is told is right, or it is said that the archive is damaged."""
    log = random_log(5, records=8)
    disk = log.archive(random.Random(1), log.fold.applied)
    whole = merge_files(disk, PARTITION, log.manifest.files)
    log.manifest = msgspec.structs.replace(log.manifest, files=(whole,))
    log.source.drop(log.fold.applied)
    requests: list[Any] = [
        StoreTotals(PARTITION, code, 7, [(BASE + 1, BASE + 9 * DAY)], [], by)
        for code, by in (("sum", ["provider", "region"]), ("users", []), ("names", []))
    ]
    requests.append(StoreEvents(PARTITION, 7, None, 0, END))

    def answers() -> list[Any]:
        log.reader = ArchiveReader(disk, PARTITION)
        return [
            log.reads.events(request) if isinstance(request, StoreEvents) else log.reads.totals(request)
            for request in requests
        ]

    right = answers()
    n_found = n_same = 0
    for file in log.manifest.files:
        for position in [
            *range(0, file.bytes, max(file.bytes // 150, 1)),
            *range(file.bytes - 12, file.bytes),
        ]:
            disk.flip_bit(file.name, position, position % 8)
            found: Any = None
            try:
                found = answers()
            except ArchiveDamagedError as error:
                found = error.message
            if isinstance(found, str):
                n_found += 1
                assert file.name in found
            else:
                n_same += 1
                assert found == right, (file.name, position)
            disk.flip_bit(file.name, position, position % 8)
    assert n_found > 3 * n_same
    assert answers() == right


@pytest.mark.parametrize("kind", [pa.ArrowMemoryError, pa.ArrowCapacityError])
def test_lack_of_memory_is_no_damage(kind: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    """A read that there is no memory for fails, and says nothing bad of the file."""
    log = random_log(3)
    log.archive(random.Random(2), log.fold.applied)
    log.source.drop(log.fold.applied)
    request = StoreTotals(PARTITION, "sum", 7, [(BASE + 1, BASE + 9 * DAY)])

    def refuse(*_: Any, **__: Any) -> Any:
        raise kind("malloc of size 1 failed")

    with monkeypatch.context() as full:
        full.setattr(pq.ParquetFile, "read_row_group", refuse)
        with pytest.raises(UnavailableError, match="no memory") as caught:
            log.reads.totals(request)
    assert not isinstance(caught.value, ArchiveDamagedError)
    assert caught.value.retriable
    assert log.reads.totals(request).rows


def test_a_view_outlives_its_files() -> None:
    """A read goes on when files are merged away, or the archive is discarded, under it."""
    log = random_log(3)
    rng = random.Random(2)
    disk = log.archive(rng, log.fold.applied)
    log.source.drop(log.fold.applied)
    request = StoreTotals(PARTITION, "sum", 7, [(BASE + 1, BASE + 9 * DAY)])
    expected = log.reads.totals(request)
    assert log.reader is not None
    reads = [log.reads.plan_totals(request) for _ in range(2)]
    page = log.reads.plan_events(StoreEvents(PARTITION, 7, None, 0, END))
    reads[0].step()
    files = log.manifest.files
    log.reader.keep(files)
    for file in files:
        disk.remove(file.name)
    early = log.reads.plan_events(StoreEvents(PARTITION, 7, None, 0, END))  # while the manifest is switched
    log.reader.switch(Manifest(PARTITION, ""))
    for read in reads:
        assert read.run() == expected
    assert page.run() == early.run()
    with pytest.raises(ArchiveDamagedError, match="it is missing"):
        log.reads.totals(request)


def test_what_neither_holds_is_said() -> None:
    """Below the archive's start, or between archive and log, there is an error and no smaller total."""
    log = Log()
    log.put(make_record(1, SCHEMAS[0]))
    for n in range(8):
        log.append([event(1, "count", time=BASE + n)], BASE + n)
    log.archive(random.Random(1), 5)
    log.source.drop(4)
    raw = StoreTotals(PARTITION, "count", 1, [(BASE, BASE + 7)])
    page = StoreEvents(PARTITION, None, None, 0, END)
    assert log.reads.totals(raw).rows[0].stats.count == 7
    assert len(log.reads.events(page).events) == 8
    whole = log.manifest
    for manifest, start in ((msgspec.structs.replace(whole, start_offset=2), 2), (whole, 6)):
        log.manifest = manifest
        if start == 6:
            log.source.drop(6)
        with pytest.raises(UnavailableError, match=f"below offset {start} are no longer"):
            log.reads.totals(raw)
        with pytest.raises(UnavailableError, match=f"below offset {start} are no longer"):
            log.reads.events(page)
        behind = msgspec.structs.replace(page, from_offset=start)
        assert [e.offset for e in log.reads.events(behind).events] == list(range(start, 9))
    day = day_of(BASE, log.records["count"].zone)
    whole_day = StoreTotals(PARTITION, "count", 1, [(day.start_ns, day.end_ns)])
    assert log.reads.totals(whole_day).rows[0].stats.count == 8


def test_only_what_may_hold_an_answer_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many files those of the time asked for, and of these the row groups of the account."""
    log = Log()
    log.put(make_record(1, SCHEMAS[0]))
    for day in range(6):
        log.append([event(a, "count", time=BASE + day * DAY + a) for a in range(40)], BASE + day * DAY)
    rng = random.Random(0)
    monkeypatch.setattr(rng, "choice", lambda values: values[1])
    monkeypatch.setattr(rng, "random", lambda: 1.0)
    log.archive(rng, log.fold.applied)
    assert len(log.manifest.files) == 6
    read: list[tuple[str, int]] = []
    original = ArchiveReader.read

    def noted(self: Any, file: Any, opened: Any, group: int, columns: Any) -> Any:
        read.append((file.listed.name, group))
        return original(self, file, opened, group, columns)

    monkeypatch.setattr(ArchiveReader, "read", noted)
    request = StoreTotals(PARTITION, "count", 33, [(BASE + 2 * DAY, BASE + 2 * DAY + 34)])
    assert log.reads.totals(request).rows[0].stats.count == 1
    assert read == [(log.manifest.files[2].name, 1)]
    read.clear()
    page = log.reads.events(StoreEvents(PARTITION, 33, "count", 0, END, 0, 2))
    assert len(page.events) == 2
    assert page.next_offset is not None
    assert {name for name, _ in read} == {file.name for file in log.manifest.files[:3]}


def test_what_is_kept_of_files_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many files are read, few footers are kept."""
    monkeypatch.setattr(reading, "FILES_MAX", 3)
    monkeypatch.setattr(reading, "INDEXES_MAX", 2)
    monkeypatch.setattr(reading, "FOOTERS_MAX_BYTES", 1)
    log = random_log(4)
    log.archive(random.Random(3), log.fold.applied)
    request = StoreTotals(PARTITION, "sum", 7, [(BASE + 1, BASE + 9 * DAY)])
    expected = log.reads.totals(request)
    assert log.reader is not None
    assert len(log.manifest.files) > 3
    assert (len(log.reader._mapped), len(log.reader._indexes), len(log.reader._footers)) == (3, 2, 1)
    assert log.reads.totals(request) == expected
    log.reader.switch(Manifest(PARTITION, ""))
    assert (log.reader._mapped, log.reader._indexes, log.reader._footers, log.reader._footer_bytes) == (
        {},
        {},
        {},
        0,
    )


def test_kernels_have_one_form_each() -> None:
    """Whatever a file holds, no read makes anyone wait for the compiler once the store has warmed up."""
    column_kernels.warm_up()
    log = random_log(6)
    rng = random.Random(5)
    log.archive(rng, log.fold.applied)
    for schema in SCHEMAS:
        keys = [dimension.key for dimension in schema.filters]
        log.reads.totals(StoreTotals(PARTITION, schema.code, None, [(BASE + 1, BASE + 9 * DAY)], top=3))
        log.reads.totals(StoreTotals(PARTITION, schema.code, 7, [(BASE + 1, BASE + 9 * DAY)], [], keys))
    log.reads.events(StoreEvents(PARTITION, None, None, 0, END))
    for name in ("scan_columns", "select_rows", "parse_sets", "tag_texts"):
        assert len(getattr(column_kernels, name).signatures) == 1, name


def test_values_that_are_texts_count_once() -> None:
    """The same set member in the archive and in the log is one member."""
    log = random_log(9)
    record = log.records["names"]
    metric = ScanMetric("names", record.uid, AggType.COUNT_UNIQUE, 0, 2**62)
    plain = TotalsScan(log.source, metric, account=None, intervals=[(0, END, 0)], applied=log.fold.applied)
    plain.run()
    rng = random.Random(4)
    log.archive(rng, split_of(log, rng))
    scan = TotalsScan(
        log.source,
        metric,
        account=None,
        intervals=[(0, END, 0)],
        applied=log.fold.applied,
        archived=log.view(),
    )
    scan.run()
    assert sorted(scan.rows[:, [1, 3, 11]].tolist()) == sorted(plain.rows[:, [1, 3, 11]].tolist())
