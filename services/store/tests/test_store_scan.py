"""Scans over raw events against a plain recount."""

from __future__ import annotations

import random
from collections import defaultdict
from typing import Any

import numpy as np
import pytest

from tallymark_protocol.errors import InvalidRequestError
from tallymark_protocol.identifiers import encode_text
from tallymark_protocol.model import AggType
from tallymark_store.scan import kernels as k
from tallymark_store.scan.events import EventsScan, parse_properties
from tallymark_store.scan.metric import ScanDimension, ScanMetric
from tallymark_store.scan.source import MemorySource
from tallymark_store.scan.totals import TotalsScan
from tallymark_store.wal.errors import DamagedError

from .scan_helpers import build_body, encode_properties, event_times

END = 2**63 - 1
ACCOUNTS = (0, 1, 2, 2**63, 2**64 - 1)
CODES = ("cpu", "api", "cp", "cpu.x")
PROVIDERS = (None, "aws", "gcp", "azure", "", "späti")


class Stream:
    """A source and the plain list of what is in it."""

    def __init__(self, seed: int, *, records: int = 40, unique: str = "") -> None:
        self.rng = random.Random(seed)
        self.source = MemorySource(3, segment_bytes=6_000)
        self.events: list[dict[str, Any]] = []  # accepted ones, with time and offset
        self.offset = 1
        self.append_ns = 1_000
        for _ in range(records):
            self.append(unique)
            self.offset += self.rng.randrange(3)  # control records

    def append(self, unique: str = "") -> None:
        rng = self.rng
        self.append_ns += rng.randrange(5)
        n = rng.choice((1, 2, 30, 300))
        fixed_account = rng.choice(ACCOUNTS) if rng.random() < 0.2 else None
        fixed_code = rng.choice(CODES) if rng.random() < 0.5 else None
        timed = rng.choice(("none", "all", "some"))
        operations = bool(unique) and rng.random() < 0.8
        events: list[dict[str, Any]] = []
        for _ in range(n):
            provider = rng.choice(PROVIDERS)
            properties = {} if provider is None else {"provider": provider}
            if rng.random() < 0.5:
                properties["zone"] = f"z{rng.randrange(40)}"
            if rng.random() < 0.2:
                properties["a-request"] = str(rng.randrange(10**6))
            value: int | bytes = rng.choice((1, 0, -5, 7, 2**63 - 1, -(2**63), rng.randrange(100)))
            if unique == "text":
                value = encode_text(f"user-{rng.randrange(60)}")
            elif unique == "u64":
                number = rng.choice((rng.randrange(60), 2**63 + rng.randrange(60)))
                value = number if number < 2**63 else b"\x02" + number.to_bytes(8, "little")
            has_time = timed == "all" or (timed == "some" and rng.random() < 0.5)
            events.append(
                {
                    "account": rng.choice(ACCOUNTS) if fixed_account is None else fixed_account,
                    "code": fixed_code or rng.choice(CODES),
                    "value": value,
                    "time": rng.randrange(900, 1_300) if has_time else None,
                    "op": rng.randrange(3) if operations else 0,
                    "properties": properties,
                    "id": bytes([2, rng.randrange(256)]) if rng.random() < 0.1 else b"",
                }
            )
        verdicts = None
        if rng.random() < 0.4:
            verdicts = [rng.choice((0, 0, 0, 1, 2, 3, 16, 20)) for _ in events]
        times = event_times(events, self.append_ns)
        body = build_body(events, verdicts, repeat_codes=rng.random() < 0.3)
        self.source.append(
            body,
            base_offset=self.offset,
            count=n,
            append_ns=self.append_ns,
            min_time_ns=min(times),
            max_time_ns=max(times),
        )
        for i, event in enumerate(events):
            if verdicts is None or verdicts[i] == 0:
                self.events.append(
                    {**event, "at": times[i], "offset": self.offset + i, "append": self.append_ns}
                )
        self.offset += n


def plain_code(dimension: ScanDimension, event: dict[str, Any]) -> tuple[int, str]:
    value = event["properties"].get(dimension.key)
    if value is None:
        return 1, ""
    if dimension.any_value or dimension.since.get(value, END) <= event["offset"]:
        return 0, value
    return 2, ""


def recount(
    stream: Stream,
    metric: ScanMetric,
    account: int | None,
    intervals: list[tuple[int, int, int]],
    applied: int,
    filters: list[tuple[int, frozenset[str]]],
    group_by: list[int],
) -> dict[tuple[Any, ...], dict[str, int]]:
    rows: dict[tuple[Any, ...], dict[str, int]] = {}
    sets: dict[tuple[Any, ...], dict[Any, tuple[int, int, int]]] = defaultdict(dict)
    for event in stream.events:
        if event["code"] != metric.code or not metric.first_offset <= event["offset"] < metric.end_offset:
            continue
        if event["offset"] >= applied or (account is not None and event["account"] != account):
            continue
        bucket = next((b for start, end, b in intervals if start <= event["at"] < end), None)
        if bucket is None:
            continue
        codes = [plain_code(dimension, event) for dimension in metric.dimensions]
        if not all(codes[place][0] == 0 and codes[place][1] in allowed for place, allowed in filters):
            continue
        key = (bucket, event["account"] if account is None else 0, tuple(codes[place] for place in group_by))
        row = rows.setdefault(
            key, {"count": 0, "sum": 0, "min": END, "max": -END - 1, "time": -1, "offset": -1}
        )
        row["count"] += 1
        if metric.agg_type == AggType.COUNT_UNIQUE:
            old = sets[key].get(event["value"], (-1, -1, 0))
            sets[key][event["value"]] = max(old, (event["at"], event["offset"], event["op"]))
            row["unique"] = sum(op != 2 for _, _, op in sets[key].values())
            continue
        row["sum"] += event["value"]
        row["min"] = min(row["min"], event["value"])
        row["max"] = max(row["max"], event["value"])
        if (event["at"], event["offset"]) > (row["time"], row["offset"]):
            row.update(time=event["at"], offset=event["offset"], last=event["value"])
    return rows


def rows_of(scan: TotalsScan, metric: ScanMetric) -> dict[tuple[Any, ...], dict[str, int]]:
    rows = {}
    for row in scan.rows.tolist():
        key = (row[k.R_BUCKET], row[k.R_ACCOUNT] & (2**64 - 1), scan.tables.group(row[k.R_GROUP]))
        if metric.agg_type == AggType.COUNT_UNIQUE:
            values = {"count": row[k.R_COUNT], "unique": row[k.R_UNIQUE]}
        else:
            total = (row[k.R_SUM_HI] << 64) + (row[k.R_SUM_LO] & (2**64 - 1))
            values = {
                "count": row[k.R_COUNT],
                "sum": total,
                "min": row[k.R_MIN],
                "max": row[k.R_MAX],
                "last": row[k.R_LAST_VALUE],
                "time": row[k.R_LAST_TIME],
                "offset": row[k.R_LAST_OFFSET],
            }
        assert key not in rows
        rows[key] = values
    return rows


def metric_of(agg_type: AggType, since: int, first: int = 0, end: int = END) -> ScanMetric:
    declared = {"aws": 0, "gcp": 0, "": 0, "azure": since}
    dimensions = (ScanDimension("provider", False, declared), ScanDimension("zone", True, {}))
    return ScanMetric("cpu", 77, agg_type, first, end, dimensions)


def random_intervals(rng: random.Random) -> list[tuple[int, int, int]]:
    edges = sorted(rng.sample(range(880, 1_350), 6))
    pairs = [
        (edges[0], edges[1], 0),
        (edges[1], edges[2], 1),
        (edges[3], edges[4], 1),
        (edges[4], edges[5], 2),
    ]
    return rng.choice(([(0, END, 0)], pairs))


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize(
    ("agg_type", "unique"),
    [
        (AggType.SUM, ""),
        (AggType.COUNT_UNIQUE, "text"),
        (AggType.COUNT_UNIQUE, "u64"),
        (AggType.COUNT_UNIQUE, ""),
    ],
)
def test_totals_equal_a_recount(seed: int, agg_type: AggType, unique: str) -> None:
    """Any account, intervals, filters and groups: the scan's rows are a plain recount's."""
    stream = Stream(seed, unique=unique or ("" if agg_type is AggType.SUM else "i64"))
    rng = random.Random(seed + 1_000)
    for _ in range(12):
        middle = stream.offset // 2
        first, end = rng.choice(((0, END), (middle, END), (0, middle)))
        bounds = sorted(stream.source.rows(0, END).base_offset.tolist())
        first, end = (next((b for b in bounds if b >= x), x) for x in (first, end))
        metric = metric_of(agg_type, rng.choice(bounds), first, end)
        applied = rng.choice((stream.offset, rng.choice(bounds)))
        account = rng.choice((*ACCOUNTS, None, None))
        filters = []
        if rng.random() < 0.5:
            filters.append((0, frozenset(rng.sample(["aws", "gcp", "azure", "", "späti"], rng.randrange(4)))))
        if rng.random() < 0.3:
            filters.append((1, frozenset(f"z{rng.randrange(50)}" for _ in range(20))))
        group_by = rng.choice(([], [], [0], [1], [1, 0], [0, 1]))
        intervals = random_intervals(rng)
        scan = TotalsScan(
            stream.source,
            metric,
            account=account,
            intervals=intervals,
            applied=applied,
            filters=filters,
            group_by=group_by,
            uniques_max=rng.choice((16, 1_024, 1 << 20)),
        )
        while not scan.step(rng.choice((1, 200, 100_000))):
            pass
        expected = recount(stream, metric, account, intervals, applied, filters, group_by)
        if agg_type is AggType.COUNT_UNIQUE:
            expected = {
                key: {"count": row["count"], "unique": row["unique"]} for key, row in expected.items()
            }
        assert rows_of(scan, metric) == expected


def test_several_passes_over_distinct_values() -> None:
    """A set larger than the table is counted in passes, with the same result."""
    source = MemorySource(0)
    values = [i * 7 for i in range(9_000)]
    events = [{"account": 1, "code": "u", "value": v, "op": 1, "time": 5 + v} for v in values * 2]
    events += [{"account": 1, "code": "u", "value": v, "op": 2, "time": 6 + v} for v in values[:100]]
    source.append(
        build_body(events), base_offset=0, count=len(events), append_ns=9, min_time_ns=5, max_time_ns=10**6
    )
    metric = ScanMetric("u", 1, AggType.COUNT_UNIQUE, 0, END)
    for uniques_max in (1_024, 1 << 20):
        scan = TotalsScan(
            source, metric, account=1, intervals=[(0, END, 0)], applied=10**6, uniques_max=uniques_max
        )
        scan.run()
        assert rows_of(scan, metric) == {(0, 0, ()): {"count": len(events), "unique": 8_900}}


def test_a_flipped_bit_anywhere_is_damage() -> None:
    """No byte of a record can change unnoticed, and the error says where it lies."""
    events = [{"account": i, "code": "u", "value": i} for i in range(9)]
    body = build_body(events)
    metric = ScanMetric("u", 1, AggType.SUM, 0, END)
    for byte in range(len(body)):
        source = MemorySource(5)
        source.append(body, base_offset=0, count=9, append_ns=9, min_time_ns=9, max_time_ns=9)
        source.append(body, base_offset=9, count=9, append_ns=9, min_time_ns=9, max_time_ns=9)
        source.flip_bit(1, byte, byte % 8)
        scan = TotalsScan(source, metric, account=1, intervals=[(0, END, 0)], applied=18)
        with pytest.raises(DamagedError) as caught:
            scan.run()
        assert caught.value.partition == 5
        assert caught.value.position == len(body)
        page = EventsScan(source, account=None, metric=None, start_ns=0, end_ns=END, applied=18)
        with pytest.raises(DamagedError):
            page.run()


def test_a_record_whose_count_differs_is_damage() -> None:
    """An index that disagrees with the bytes never shifts offsets."""
    source = MemorySource(5)
    body = build_body([{"account": 1, "code": "u", "value": 1}] * 4)
    source.append(body, base_offset=0, count=5, append_ns=9, min_time_ns=9, max_time_ns=9)
    scan = TotalsScan(
        source, ScanMetric("u", 1, AggType.SUM, 0, END), account=1, intervals=[(0, END, 0)], applied=9
    )
    with pytest.raises(DamagedError):
        scan.run()


def test_too_many_rows_are_refused() -> None:
    """A breakdown by a value that differs in every event ends in an error, not in all memory."""
    source = MemorySource(0)
    events = [{"account": 1, "code": "u", "value": 1, "properties": {"r": str(i)}} for i in range(2_000)]
    source.append(build_body(events), base_offset=0, count=2_000, append_ns=9, min_time_ns=9, max_time_ns=9)
    metric = ScanMetric("u", 1, AggType.SUM, 0, END, (ScanDimension("r", True, {}),))
    scan = TotalsScan(
        source, metric, account=1, intervals=[(0, END, 0)], applied=2_000, group_by=[0], rows_max=1_000
    )
    with pytest.raises(InvalidRequestError, match="more than 1000 rows"):
        scan.run()


def test_nothing_to_scan() -> None:
    """No intervals, no records: done at once, without rows."""
    stream = Stream(1)
    metric = metric_of(AggType.SUM, 0)
    for source, intervals in ((stream.source, []), (MemorySource(0), [(0, END, 0)])):
        scan = TotalsScan(source, metric, account=None, intervals=intervals, applied=END)
        assert scan.done
        scan.run()
        assert len(scan.rows) == 0


def expected_page(stream: Stream, **want: Any) -> list[dict[str, Any]]:
    return [
        event
        for event in stream.events
        if (want["account"] is None or event["account"] == want["account"])
        and (want["code"] is None or event["code"] == want["code"])
        and want["start"] <= event["at"] < want["end"]
        and want["first"] <= event["offset"] < want["applied"]
    ]


@pytest.mark.parametrize("seed", range(8))
def test_pages_equal_the_stream(seed: int) -> None:
    """Reading page by page gives each wanted event once, in log order, with all that was sent."""
    stream = Stream(seed, unique=("", "text", "u64")[seed % 3])
    rng = random.Random(seed)
    bounds = stream.source.rows(0, END).base_offset.tolist()
    for _ in range(8):
        account = rng.choice((*ACCOUNTS, None))
        code = rng.choice((*CODES, None))
        start, end = sorted(rng.sample(range(880, 1_350), 2))
        applied = rng.choice((stream.offset, rng.choice(bounds)))
        limit = rng.choice((1, 7, 100, 10_000))
        if limit == 1:
            end = start + 10
        metric = None if code is None else ScanMetric(code, 1, AggType.SUM, 0, END)
        got: list[Any] = []
        at: int | None = rng.choice((0, 0, applied // 2))
        expected = expected_page(
            stream, account=account, code=code, start=start, end=end, first=at, applied=applied
        )
        while at is not None:
            page = EventsScan(
                stream.source,
                account=account,
                metric=metric,
                start_ns=start,
                end_ns=end,
                applied=applied,
                from_offset=at,
                limit=limit,
                bytes_max=rng.choice((1, 2_000, 10**9)),
            )
            while not page.step(rng.choice((1, 500))):
                pass
            assert len(page.events) <= limit
            assert page.events or page.next_offset is None
            got += page.events
            assert page.next_offset is None or page.next_offset > got[-1].offset
            at = page.next_offset
        assert len(got) == len(expected)
        for record, event in zip(got, expected, strict=True):
            value = event["value"]
            if isinstance(value, bytes):
                value = value[1:].decode() if value[0] == 1 else int.from_bytes(value[1:], "little")
            assert (record.account_id, record.metric_code, record.value) == (
                event["account"],
                event["code"],
                value,
            )
            assert (record.event_time_ns, record.append_time_ns) == (event["at"], event["append"])
            assert (record.operation, record.offset, record.partition) == (event["op"], event["offset"], 3)
            assert record.properties == event["properties"]
            assert record.event_id == (event["id"] or None)


def test_a_page_ends_exactly_at_the_last_event() -> None:
    """A page that is full with the last event says that there is no more."""
    source = MemorySource(0)
    events = [{"account": 1, "code": "u", "value": i} for i in range(5)]
    source.append(build_body(events), base_offset=7, count=5, append_ns=9, min_time_ns=9, max_time_ns=9)
    for limit, after in ((5, None), (4, 11), (6, None)):
        page = EventsScan(source, account=1, metric=None, start_ns=0, end_ns=END, applied=12, limit=limit)
        page.run()
        assert [event.offset for event in page.events] == list(range(7, 7 + min(limit, 5)))
        assert page.next_offset == after


def test_property_sets_round_trip() -> None:
    """Properties come back as they were sent, empty and longest values included."""
    for properties in ({}, {"k": ""}, {"k" * 128: "v" * 1_024, "ä": "ö"}):
        assert parse_properties(encode_properties(properties)) == properties


@pytest.mark.parametrize("n", [1, 255, 256, 257, 700])
def test_an_account_is_found_at_every_place(n: int) -> None:
    """The block-wise search finds first, last and all events, wherever block borders lie."""
    accounts = np.zeros(n, np.int64)
    for places in ([0], [n - 1], [n // 2], list(range(n)), list(range(0, n, 3))):
        accounts[:] = 8
        accounts[places] = 9
        events = [{"account": int(a), "code": "u", "value": i} for i, a in enumerate(accounts)]
        source = MemorySource(0)
        source.append(build_body(events), base_offset=0, count=n, append_ns=9, min_time_ns=9, max_time_ns=9)
        page = EventsScan(source, account=9, metric=None, start_ns=0, end_ns=END, applied=n)
        page.run()
        assert [event.offset for event in page.events] == places
