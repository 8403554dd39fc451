"""Raw events that are kept for a time only: which go, that it is written down, and what reads say afterwards."""

from __future__ import annotations

import datetime as dt
from typing import Any

import msgspec
import pytest

from tallymark_protocol.errors import ErrorCode, InvalidRequestError
from tallymark_protocol.messages import StoreEvents, StoreTotals
from tallymark_protocol.model import AggType, PeriodType
from tallymark_protocol.schema import update_record
from tallymark_protocol.zones import TIME_END_NS
from tallymark_runtime.disk import MemoryDisk
from tallymark_store.archive import cut as cut_module
from tallymark_store.archive import manifest as manifests
from tallymark_store.archive import policy, retention
from tallymark_store.archive.archiver import merge_files
from tallymark_store.archive.manifest import ArchiveError, Dropped, Manifest
from tallymark_store.archive.names import MetricNames
from tallymark_store.archive.retention import Rule, coarse, cutoff_ns, is_due, sweep
from tallymark_store.archive.writer import open_file
from tallymark_store.fold.schemas import DAY_NS
from tallymark_store.reads import Reads
from tallymark_store.scan.source import WalSource
from tallymark_store.verify.archive import ArchiveFiles
from tallymark_store.verify.findings import Report

from .archive_helpers import APPEND, events_of, usual_log
from .payload_builder import event
from .power_cut import CountingDisk, CrashAt
from .store_driver import BASE, metric
from .test_store_archiver import SUM, World, small

__all__ = ["small"]  # the fixture

SHORT = metric(9, code="short", agg_type=AggType.SUM, period_type=PeriodType.DAY, retain_raw_days=2)
FIRST = BASE // DAY_NS * DAY_NS + DAY_NS


class Kept(World):
    """A store with one metric that keeps its raw events for two days, and one that keeps them for ever."""

    def __init__(self, **others: Any) -> None:
        super().__init__(**others)
        self.driver.schema(0, SHORT, BASE)
        self.driver.sync()

    def send_day(self, day: int, n: int = 6, *, late_ns: int = 0) -> None:
        """Events of both metrics at noon of a day, sent then."""
        now = FIRST + day * DAY_NS + DAY_NS // 2
        self.clock.wall_ns = now
        events = [
            event(i % 3, "short" if i % 2 else "sum", value=i + 1, time=now - late_ns if i % 3 else None)
            for i in range(n)
        ]
        self.driver.append(0, events, [(7, self.sequence, now, n, self.sequence)], now)
        self.sequence += 1
        self.driver.sync()

    async def settle(self) -> None:
        for _ in range(12):
            await self.archiver.take_all()

    def reads(self) -> Reads:
        return Reads(
            self.driver.partitions[0].fold,
            WalSource(self.driver.wal, 0),
            archive=lambda: self.archiver.view(0),
        )

    def check_all(self) -> None:
        """What is archived, and what was written down as dropped, are all accepted events below the end."""
        manifest = self.manifest()
        assert manifest is not None
        held = {row[0] for row in self.in_archive()}
        assert sum(file.rows for file in manifest.files) == len(held)
        gone = [row for row in self.logged() if row.offset < manifest.end_offset and row.offset not in held]
        if not manifest.dropped:
            assert not gone
            return
        (item,) = manifest.dropped
        assert (item.metric, item.metric_uid, item.is_at_most) == ("short", 9, False)
        assert item.events == len(gone)
        assert {row.metric_code for row in gone} == {"short"}
        times = [row.event_time_ns for row in gone]
        assert (item.start_ns, item.end_ns) == (min(times), max(times) + 1)
        assert (item.start_offset, item.end_offset) == (gone[0].offset, gone[-1].offset + 1)
        assert all(max(row.event_time_ns, row.append_time_ns) < item.before_ns for row in gone)

    def logged(self) -> list[Any]:
        reads = Reads(self.driver.partitions[0].fold, WalSource(self.driver.wal, 0))
        found: list[Any] = []
        at: int | None = 0
        while at is not None:
            page = reads.events(StoreEvents(0, None, None, 0, TIME_END_NS, at, 1_000))
            found += page.events
            at = page.next_offset
        return found


def test_the_cutoff_moves_in_steps() -> None:
    """By days, or by eighths of a long time: events stay for at least as long as they are to, and not much longer."""
    assert [cutoff_ns(2, log, 10) for log in (0, 19, 20, 29, 30, 39, 40)] == [0, 0, 0, 0, 10, 10, 20]
    assert {cutoff_ns(80, log, 10) for log in range(10_000, 10_100)} == {9_200}
    for days in (1, 7, 30, 365):
        for log in range(5_000 * 10, 5_400 * 10, 7):
            kept = log - cutoff_ns(days, log, 10)
            assert days * 10 <= kept < days * 10 + max(days // 8, 1) * 10


@pytest.mark.parametrize("bound", [-(10**18), 5, 25, 10**18])
def test_a_file_without_what_goes(bound: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Just the old rows of the metrics that want it are gone, all others are as they were, and both are counted."""
    monkeypatch.setattr(cut_module, "ROW_GROUP_ROWS", 16)
    log = usual_log()
    disk = MemoryDisk()
    (file,) = log.archived(disk)
    cutoff = APPEND + bound
    swept = sweep(disk, file, {5: Rule("a", cutoff), 77: Rule("none", 2**62)}, {})
    gone = [
        row for row in log.rows
        if row["metric_uid"] == 5 and row["time_ns"] < cutoff and row["append_time_ns"] < cutoff
    ]  # fmt: skip
    left = [row for row in log.rows if row not in gone]
    if not gone:
        assert swept[:2] == (file, ())
        return
    assert swept.file is not None
    assert swept.file.name == manifests.file_name(file.start_offset, file.end_offset, 1)
    assert events_of(open_file(disk, swept.file.name).read()) == left
    assert swept.file.rows == len(left)
    assert (swept.file.min_time_ns, swept.file.max_time_ns) == (
        min(row["time_ns"] for row in left), max(row["time_ns"] for row in left),
    )  # fmt: skip
    assert swept.dropped == (
        Dropped(
            "a", 5, len(gone), min(row["time_ns"] for row in gone), max(row["time_ns"] for row in gone) + 1,
            gone[0]["offset"], gone[-1]["offset"] + 1, cutoff,
        ),
    )  # fmt: skip
    # And again, by what is left: nothing more goes; all of it, where the other metric goes, too.
    assert sweep(disk, swept.file, {5: Rule("a", cutoff)}, {})[:2] == (swept.file, ())
    # Until when nobody needs to look at what is left is known of each metric, and that it has no others.
    assert (
        swept.due
        == swept.file.due
        == tuple(
            (
                uid,
                uid,
                min(max(row["time_ns"], row["append_time_ns"]) for row in left if row["metric_uid"] == uid),
            )
            for uid in sorted({row["metric_uid"] for row in left})
        )
    )
    for uid, _, due in swept.due:
        assert not is_due(swept.file, {uid: Rule("", due), 77: Rule("", 2**62)})
        assert is_due(swept.file, {uid: Rule("", due + 1)})
    everything = {5: Rule("a", 2**62), 6: Rule("s", 2**62)}
    rest = sweep(disk, swept.file, everything, {})
    assert rest.file is None
    assert sum(item.events for item in rest.dropped) == len(left)
    disk.flip_bit(file.name, 30)
    with pytest.raises(ArchiveError):
        sweep(disk, file, everything, {})


async def test_old_events_go_and_are_written_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the metric that wants it, day by day; merged files lose theirs, too."""
    monkeypatch.setattr(policy, "FAN_IN", 3)
    world = Kept()
    for day in range(9):
        world.send_day(day)
        await world.settle()
        world.check_all()
        manifest = world.manifest()
        assert manifest is not None
        expected = FIRST + (day - 2) * DAY_NS
        held = [row for row in world.logged() if row.offset in {r[0] for r in world.in_archive()}]
        assert not [row for row in held if row.metric_code == "short" and row.append_time_ns < expected]
        assert [row for row in held if row.metric_code == "sum"] == [
            row for row in world.logged() if row.metric_code == "sum"
        ]
    assert world.archiver.events_dropped == manifest.dropped[0].events == 6 * 3
    assert world.archiver.merges > 0
    assert world.reports == []
    # A life later nothing of it is forgotten, and nothing dropped again.
    world.start()
    await world.settle()
    assert world.manifest() == manifest
    assert world.archiver.events_dropped == 0


def test_many_metrics_share_what_is_known_of_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of more metrics than are told one by one says the lowest time of several: never too late a one."""
    monkeypatch.setattr(retention, "DUE_MAX", 4)
    ranges = [(uid, uid, 1_000 - uid * (-1) ** uid) for uid in range(3, 40)]
    due = coarse(ranges)
    assert len(due) <= 4
    for uid, _, at in ranges:
        assert [told for first, last, told in due if first <= uid <= last and told <= at]
    assert coarse([(3, 5, 9), (3, 5, 7), (1, 1, 8)]) == ((1, 1, 8), (3, 5, 7))


async def test_what_was_looked_at_is_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step further, with other rules, and a life later: only files that have something that goes now are opened."""
    monkeypatch.setattr(policy, "FAN_IN", 100)
    world = Kept()
    world.driver.schema(0, metric(12, code="other", agg_type=AggType.SUM), BASE)
    events = [event(1, "sum", value=1), event(1, "other", value=1)]  # and nothing of the metric in between
    world.driver.append(0, events, [(8, 0, FIRST, 2, 0)], FIRST + 1)
    world.driver.sync()
    await world.settle()
    opened: list[int] = []
    inner = retention.sweep

    def counted(disk: Any, file: Any, *args: Any) -> Any:
        opened.append(file.start_offset)
        return inner(disk, file, *args)

    monkeypatch.setattr(retention, "sweep", counted)
    days: list[tuple[int, int]] = []  # of each day: how many files were opened, and how many events went
    for day in range(1, 12):
        if day in (7, 10):
            world.start()
        del opened[:]
        before = world.archiver.events_dropped
        world.send_day(day)
        await world.settle()
        world.check_all()
        days.append((len(opened), world.archiver.events_dropped - before))
    assert days == [(0, 0)] * 2 + [(1, 0)] + [(1, 3)] * 8
    del opened[:]
    longest = update_record(SUM, msgspec.structs.replace(SUM.schema, retain_raw_days=1_000))
    world.driver.schema(0, longest, FIRST + 11 * DAY_NS + DAY_NS // 2)
    world.driver.sync()
    await world.settle()
    assert 5 in world.archiver.archives[0].rules
    assert not opened


async def test_a_late_event_stays_for_its_time() -> None:
    """It is old by its time, and was sent today: it goes when it was here for as long as others are."""
    world = Kept()
    world.send_day(0)
    world.send_day(5, late_ns=5 * DAY_NS)
    await world.settle()
    world.check_all()
    manifest = world.manifest()
    assert manifest is not None
    assert manifest.dropped[0].events == 3
    world.send_day(9)
    await world.settle()
    world.check_all()
    assert world.manifest().dropped[0].events == 6  # type: ignore[union-attr]


async def test_reads_say_what_they_would_need() -> None:
    """Whole days and periods are told as before; what needs dropped events is refused, and names them."""
    world = Kept()
    before: dict[Any, Any] = {}

    def whole(first: int, last: int, metric_code: str = "short", account: int | None = 1) -> Any:
        bounds = [(FIRST + first * DAY_NS, FIRST + last * DAY_NS)]
        request = StoreTotals(0, metric_code, account, bounds, top=0 if account is not None else 3)
        return [msgspec.structs.replace(row) for row in world.reads().totals(request).rows]

    for day in range(8):
        world.send_day(day)
    spans = [(0, 1), (0, 8), (-3, 5), (2, 9), (5, 8), (-3, 12)]
    for span in spans:
        for code in ("short", "sum"):
            for account in (1, None):
                before[span, code, account] = whole(*span, code, account)
    await world.settle()
    (item,) = world.manifest().dropped  # type: ignore[union-attr]
    assert item.events == 3 * 5
    for (span, code, account), rows in before.items():
        assert whole(*span, code, account) == rows
    noon = DAY_NS // 2

    def ragged(start: int, end: int, code: str = "short", account: int | None = 1) -> Any:
        request = StoreTotals(0, code, account, [(start, end)], top=0 if account is not None else 3)
        return world.reads().totals(request).rows

    for start, end in (
        (FIRST + noon + 1, FIRST + DAY_NS), (FIRST + DAY_NS, FIRST + 3 * DAY_NS + noon + 1),
        (FIRST + noon + 1, FIRST + 8 * DAY_NS + 1), (FIRST + noon, FIRST + noon + 1),
    ):  # fmt: skip
        for account in (1, None):
            with pytest.raises(
                InvalidRequestError, match="metric 'short' keeps them for a time only, and 15 events"
            ) as e:
                ragged(start, end, account=account)
            assert e.value.code == ErrorCode.EVENTS_DROPPED
            assert e.value.details["events"] == 15
            assert "whole days" in str(e.value)
            assert " ns " not in str(e.value)
            first = dt.datetime.fromtimestamp(e.value.details["start_ns"] // 10**9, dt.UTC)
            assert f"timed from {first:%Y-%m-%dT%H:%M:%S}" in str(e.value)
            assert "`--from " in str(e.value)
            assert ragged(start, end, "sum", account) is not None
    # What begins behind them, and what lies before them all, needs none of them.
    assert ragged(FIRST + 6 * DAY_NS + 1, FIRST + 8 * DAY_NS)[0].stats.count == 2
    assert ragged(FIRST - DAY_NS + 5, FIRST + 5)[0].stats.count == 0
    assert ragged(item.end_ns, FIRST + 8 * DAY_NS)[0].stats.count == 3

    def listed(code: str | None, start: int, end: int, from_offset: int = 0) -> list[Any]:
        return world.reads().events(StoreEvents(0, None, code, start, end, from_offset, 1_000)).events

    for code in ("short", None):
        with pytest.raises(InvalidRequestError, match="were dropped") as caught:
            listed(code, FIRST, FIRST + 8 * DAY_NS)
        assert caught.value.code == ErrorCode.EVENTS_DROPPED
        assert listed(code, item.end_ns, TIME_END_NS)
        assert listed(code, FIRST, TIME_END_NS, item.end_offset)
        assert not listed(code, 0, FIRST)
    assert len(listed("sum", 0, TIME_END_NS)) == 3 * 8


async def test_a_clock_that_ran_ahead_drops_nothing() -> None:
    """Log time is another node's clock: no event goes before this one's says that it is time, and then by log time."""
    world = Kept()
    world.send_day(0)
    world.send_day(1)
    world.send_day(400)  # stamped by a leader whose clock was wrong
    world.clock.wall_ns = FIRST + 2 * DAY_NS
    await world.settle()
    assert world.manifest().dropped == ()  # type: ignore[union-attr]
    world.check_all()
    world.clock.wall_ns = FIRST + 3 * DAY_NS
    await world.settle()
    assert world.manifest().dropped[0].events == 3  # type: ignore[union-attr]
    world.check_all()
    # The other way, too: log time decides where this node's clock is ahead.
    other = Kept()
    other.send_day(0)
    other.send_day(1)
    other.clock.wall_ns = FIRST + 400 * DAY_NS
    await other.settle()
    assert other.manifest().dropped == ()  # type: ignore[union-attr]


async def test_how_long_may_be_changed() -> None:
    """Longer: what is gone stays gone, and is still told of. For ever: nothing more goes. No total changes."""
    world = Kept()
    for day in range(6):
        world.send_day(day)
    await world.settle()
    (before,) = world.manifest().dropped  # type: ignore[union-attr]
    longer = update_record(SHORT, msgspec.structs.replace(SHORT.schema, retain_raw_days=4))
    world.driver.schema(0, longer, FIRST + 6 * DAY_NS)
    world.send_day(6)
    await world.settle()
    assert world.manifest().dropped == (before,)  # type: ignore[union-attr]
    for day in (7, 8):
        world.send_day(day)
    await world.settle()
    assert world.manifest().dropped[0].events == before.events + 3  # type: ignore[union-attr]
    world.check_all()
    forever = update_record(longer, msgspec.structs.replace(SHORT.schema, retain_raw_days=None))
    world.driver.schema(0, forever, FIRST + 9 * DAY_NS)
    world.send_day(30)
    await world.settle()
    assert world.manifest().dropped[0].events == before.events + 3  # type: ignore[union-attr]
    world.check_all()


async def test_retention_survives_a_crash_at_any_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Either an event is there, or it is written down as dropped; never both, and never neither."""
    step = 0
    while True:
        world = Kept()
        for day in range(5):
            world.send_day(day)
        monkeypatch.setattr(retention, "DAY_NS", DAY_NS * 100)
        await world.settle()
        monkeypatch.setattr(retention, "DAY_NS", DAY_NS)
        calls = [step]
        world.start(CountingDisk(world.driver.disk.at("archive"), calls))
        try:
            await world.settle()
        except CrashAt:
            world.driver.crash(lose_all=bool(step % 2))
            world.start()
            world.check_all()
            await world.settle()
            world.check_all()
            assert world.manifest().dropped[0].events == 3 * 2  # type: ignore[union-attr]
            step += 1
            continue
        break
    assert step > 15
    assert world.archiver.events_dropped == 6


async def test_an_archive_that_is_made_anew_drops_again(small: None) -> None:
    """From a whole log everything is archived again; the same goes again, and is counted once."""
    world = Kept()
    for day in range(6):
        world.send_day(day)
    await world.settle()
    (before,) = world.manifest().dropped  # type: ignore[union-attr]
    world.archiver.damaged(0, "a read has found it")
    await world.settle()
    world.check_all()
    assert world.manifest().dropped == (before,)  # type: ignore[union-attr]


async def test_what_was_dropped_is_remembered_without_files() -> None:
    """An archive of which everything was dropped, and behind which the log begins: what it says of that stays."""
    world = Kept()
    for day in (0, 1):
        now = FIRST + day * DAY_NS
        world.driver.append(0, [event(1, "short", value=1)] * 3, [(8, day, now, 3, day)], now)
    world.driver.sync()
    await world.settle()
    day = FIRST + 9 * DAY_NS
    world.clock.wall_ns = day
    world.driver.append(0, [event(1, "short", value=1, time=FIRST)], [(8, 2, day, 1, 2)], day)
    world.driver.sync()
    world.store.replicas[0].durable_end = world.end - 1  # the last one isn't archived
    await world.settle()
    manifest = world.manifest()
    assert manifest is not None
    assert manifest.files == ()
    assert manifest.dropped[0].events == 6
    # And again a copy with what nobody has any more: the log begins later.
    for gaps in ((), ((manifest.end_offset - 2, manifest.end_offset),)):
        manifests.publish(world.folder(), msgspec.structs.replace(manifest, gaps=gaps))
        world.driver.partitions[0].index.log_start = world.end
        world.start()
        await world.archiver.open_all()
        view = world.archiver.view(0)
        assert view is not None
        assert view.dropped == manifest.dropped
        start = gaps[0][0] if gaps else manifest.end_offset
        assert (view.start_offset, view.gaps) == (manifest.start_offset, ((start, world.end),))
        assert view.end_offset == world.end
    assert world.reports == []
    # What is archived from there on is added to it, durably.
    world.driver.partitions[0].index.log_start = 0
    world.send_day(9, 2)
    await world.archiver.take_all()
    after = world.manifest()
    assert after is not None
    assert after.dropped == manifest.dropped
    assert after.gaps
    assert after.rows == 2


async def test_verify_counts_what_is_gone() -> None:
    """An archive that lacks just what it says is sound; one event less or more, and it isn't."""
    world = Kept()
    for day in range(6):
        world.send_day(day)
    await world.settle()
    manifest = world.manifest()
    assert manifest is not None

    def findings() -> list[str]:
        report = Report(lambda _: None)
        files = ArchiveFiles(world.folder(), "archive", 0, report)
        files.check_files()
        fold = world.driver.partitions[0].fold
        files.check_against_log(WalSource(world.driver.wal, 0), MetricNames(fold.schemas), world.end)
        return [found.sentence for found in report.findings]

    assert findings() == []
    (item,) = manifest.dropped
    for wrong in (
        msgspec.structs.replace(item, events=item.events - 1),
        msgspec.structs.replace(item, before_ns=item.before_ns - 2 * DAY_NS),
    ):
        manifests.publish(world.folder(), msgspec.structs.replace(manifest, dropped=(wrong,)))
        assert findings()
    manifests.publish(world.folder(), msgspec.structs.replace(manifest, dropped=()))
    assert findings()


def test_what_was_dropped_is_cut_with_offsets() -> None:
    """Within a range it is as it was; where it reaches beyond, it is at most that."""
    a = Dropped("a", 1, 5, 10, 20, 100, 200, 30)
    b = Dropped("b", 2, 7, 10, 20, 150, 160, 30)
    assert manifests.dropped_within([a, b], [(0, 200)]) == [a, b]
    assert manifests.dropped_within([a, b], [(0, 90), (210, 300)]) == []
    cut = msgspec.structs.replace(a, end_offset=155, is_at_most=True)
    assert manifests.dropped_within([a], [(0, 155)]) == [cut]
    assert manifests.dropped_within([a], [(0, 120), (150, 155)]) == [cut]
    assert manifests.added([b], [a, a]) == (
        msgspec.structs.replace(a, events=10), b,
    )  # fmt: skip


def test_a_manifest_tells_of_what_was_dropped() -> None:
    """It survives its bytes, has a version that earlier software refuses, and what can't be is damage."""
    item = Dropped("a", 1, 5, 10, 20, 100, 200, 30)
    good = Manifest(0, "x", 300, dropped=(item,))
    data = manifests.encode(good)
    assert b'"format_version":2' in data
    assert manifests.decode(data) == good
    for wrong in (
        (msgspec.structs.replace(item, events=0),), (msgspec.structs.replace(item, end_ns=10),),
        (msgspec.structs.replace(item, end_offset=100),), (item, item),
    ):  # fmt: skip
        with pytest.raises(ArchiveError, match="makes no sense"):
            manifests.decode(manifests.encode(msgspec.structs.replace(good, dropped=wrong)))


def test_files_that_were_written_again_are_merged() -> None:
    """Under the name of their range, as any others."""
    log = usual_log()
    disk = MemoryDisk()
    half = log.rows[len(log.rows) // 2]["offset"] // 50 * 50 + 2
    files = [*log.archived(disk, 0, half), *log.archived(disk, half)]
    swept = sweep(disk, files[0], {5: Rule("a", APPEND + 25)}, {})
    assert swept.file is not None
    made = merge_files(disk, 3, (swept.file, files[1]))
    assert made.name == manifests.file_name(files[0].start_offset, files[1].end_offset)
    assert made.rows == swept.file.rows + files[1].rows
    assert made.rewritten == 0
