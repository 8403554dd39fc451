"""Pages of alert records: by accounts, metrics and time; nothing that is asked for is passed over."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tallymark_protocol import limits
from tallymark_protocol.errors import InvalidRequestError
from tallymark_protocol.messages import AlertRecord, StoreAlerts
from tallymark_protocol.model import AggType, AlertThreshold, MetricSchema
from tallymark_protocol.schema import make_record
from tallymark_store import reads as reads_module
from tallymark_store.fold import Fold
from tallymark_store.reads import Reads
from tallymark_store.scan.source import MemorySource

from .payload_builder import build_payload, event, place

ACCOUNTS = [0, 1, 7, 2**63, 2**64 - 1]
CODES = ["a", "b"]
END = 2**63 - 1


def filled(rng: random.Random) -> tuple[Fold, list[AlertRecord]]:
    """A fold with records of several accounts and metrics, one of which was deleted and made anew."""
    fold = Fold(0)
    each = [AlertThreshold(code="each", value=1, recurring=True)]
    uid = offset = 0
    append_ns = 100

    def create(code: str) -> None:
        nonlocal uid, offset
        uid += 1
        schema = MetricSchema(code=code, agg_type=AggType.COUNT, thresholds=each)
        fold.put_schema(make_record(uid, schema), offset)
        offset += 1

    for code in CODES:
        create(code)
    for round_number in range(30):
        if round_number == 15:
            create("a")
        events = [event(rng.choice(ACCOUNTS), rng.choice(CODES)) for _ in range(rng.randrange(1, 5))]
        data, columns = place(build_payload(events))
        append_ns += rng.randrange(3)
        fold.apply(data, columns, None, offset, append_ns)
        fold.advance(offset + len(events))
        offset += len(events)
    return fold, fold.alerts(0, limit=10_000)


def pages(reads: Reads, request: StoreAlerts) -> tuple[list[AlertRecord], int]:
    """All pages from a request on, and the position that the last of them ends with."""
    found: list[AlertRecord] = []
    position = request.from_position
    while True:
        page = reads.alerts(_replace(request, from_position=position))
        assert len(page.alerts) <= request.limit
        assert page.next_position >= position
        assert not page.more or page.next_position > position, "a page goes on"
        found += page.alerts
        position = page.next_position
        if not page.more:
            return found, position


def _replace(request: StoreAlerts, **changes: Any) -> StoreAlerts:
    fields = {name: getattr(request, name) for name in request.__struct_fields__}
    return StoreAlerts(**(fields | changes))


@pytest.mark.parametrize("scanned_max", [1, 7, 1 << 20])
def test_pages_hold_what_a_plain_filter_does(monkeypatch: pytest.MonkeyPatch, scanned_max: int) -> None:
    """Whatever the page's size, and however little a store looks at for one page."""
    monkeypatch.setattr(reads_module, "ALERTS_SCANNED_MAX", scanned_max)
    rng = random.Random(scanned_max)
    fold, records = filled(rng)
    reads = Reads(fold, MemorySource(0))
    times = [record.triggered_at_ns for record in records]
    assert times == sorted(times)
    for _ in range(300):
        accounts = rng.sample([*ACCOUNTS, 5], rng.randrange(4))
        codes = rng.sample([*CODES, "never"], rng.randrange(3))
        start, end = sorted(rng.choices([0, *times, times[-1] + 1, END], k=2))
        position = rng.randrange(len(records) + 3)
        request = StoreAlerts(
            0,
            from_position=position,
            limit=rng.choice([1, 2, 1_000]),
            start_ns=start,
            end_ns=end,
            account_ids=accounts,
            metric_codes=codes,
        )
        found, last = pages(reads, request)
        assert found == [
            record
            for record in records[position:]
            if (not accounts or record.account_id in accounts)
            and (not codes or record.metric_code in codes)
            and start <= record.triggered_at_ns < end
        ]
        # What is later than the range is still to come for whoever goes on from there.
        later = [record.position for record in records if record.triggered_at_ns >= end] if end < END else []
        assert last == max(min(later, default=len(records)), position)


def test_a_code_stands_for_all_metrics_that_ever_had_it() -> None:
    """Subscribers go by the code; the filter of a query by the metric that has it now."""
    fold, records = filled(random.Random(1))
    reads = Reads(fold, MemorySource(0))
    uids = {record.id.rsplit("-", 1)[1] for record in pages(reads, StoreAlerts(0, metric_codes=["a"]))[0]}
    assert uids == {"1", "3"}
    current = pages(reads, StoreAlerts(0, metric_code="a"))[0]
    assert {record.id.rsplit("-", 1)[1] for record in current} == {"3"}
    assert current == [record for record in records if record.id.endswith("-3")]


def test_a_range_at_the_end_of_time_tells_where_the_records_end() -> None:
    """That is how the alerts role asks for the end."""
    fold, records = filled(random.Random(2))
    page = Reads(fold, MemorySource(0)).alerts(StoreAlerts(0, limit=1, start_ns=END, end_ns=END))
    assert (page.alerts, page.next_position, page.more) == ([], len(records), False)


def test_only_what_is_given_back_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Records that a filter drops cost no Python objects."""
    fold, records = filled(random.Random(3))
    made = []
    make = Fold._alert

    def counting(self: Fold, position: int, row: list[int], data: bytes) -> AlertRecord:
        made.append(position)
        return make(self, position, row, data)

    monkeypatch.setattr(Fold, "_alert", counting)
    wanted = [record for record in records if record.account_id == 7][:2]
    page = Reads(fold, MemorySource(0)).alerts(StoreAlerts(0, limit=2, account_ids=[7]))
    assert page.alerts == wanted
    assert made == [record.position for record in wanted]


@pytest.mark.parametrize(
    "request_",
    [
        StoreAlerts(0, start_ns=5, end_ns=4),
        StoreAlerts(0, account_ids=[-1]),
        StoreAlerts(0, account_ids=[2**64]),
        StoreAlerts(0, account_ids=list(range(limits.SUBSCRIPTION_ACCOUNTS_MAX + 1))),
        StoreAlerts(0, metric_codes=["m"] * (limits.SUBSCRIPTION_METRICS_MAX + 1)),
    ],
    ids=["range", "negative", "too high", "many accounts", "many codes"],
)
def test_what_makes_no_sense_is_refused(request_: StoreAlerts) -> None:
    """With a sentence, not with an answer."""
    with pytest.raises(InvalidRequestError):
        Reads(Fold(0), MemorySource(0)).alerts(request_)


@pytest.mark.parametrize("more", [{}, {"account_ids": [1]}, {"metric_codes": ["never"]}, {"account_id": 1}])
def test_positions_that_no_record_can_have_are_refused(more: dict[str, Any]) -> None:
    """With a filter and without; the last that there can be is only far ahead, and stays."""
    reads = Reads(Fold(0), MemorySource(0))
    for position in (-1, 2**63, 2**64 - 1):
        with pytest.raises(InvalidRequestError, match=f"no position {position}"):
            reads.alerts(StoreAlerts(0, from_position=position, limit=5, **more))
    page = reads.alerts(StoreAlerts(0, from_position=2**63 - 1, limit=5, **more))
    assert (page.alerts, page.next_position, page.more) == ([], 2**63 - 1, False)
