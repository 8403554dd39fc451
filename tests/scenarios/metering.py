"""Sending facts through the SDK, and comparing every kind of answer with the oracle's.

`Meter` holds what was sent and where each fact lies, so that the oracle knows the order within an account; `Check`
asks random questions and collects differences instead of stopping at the first.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from oracle import OTHER, TIME_END, Answer, Calendar, Fact, Oracle

from tallymark import (
    OTHER as OTHER_ROW,
)
from tallymark import (
    AsyncClient,
    Event,
    IngestError,
    MetricSchema,
    OperationType,
    Period,
    Totals,
)

WORKERS = 3
DAY = 86_400 * 10**9


def _time_ns(event: Event) -> int:
    assert isinstance(event.timestamp, int), "facts are sent with their times"
    return event.timestamp


def answer_of(totals: Totals) -> Answer:
    """Bring the SDK's totals into the oracle's form."""
    at = totals.last_event_at
    microseconds = None if at is None else (int(at.timestamp()) * 1_000_000 + at.microsecond)
    return Answer(
        count=totals.count,
        sum=totals.sum,
        min=totals.min,
        max=totals.max,
        last_value=totals.last_value,
        last_event_us=microseconds,
        unique=totals.unique,
    )


def event_of(fact: Fact, text_is_number: bool) -> Event:
    """Make the event to send of a fact."""
    properties = {"note": "not a dimension"} if fact.time_ns % 3 == 0 else {}
    if fact.area is not None:
        properties["area"] = fact.area
    if fact.kind is not None:
        properties["kind"] = fact.kind
    value: int | str = fact.value
    if fact.text is not None:
        value = int(fact.text) if text_is_number else fact.text
    return Event(
        account_id=fact.account_id,
        metric_code=fact.metric,
        value=value,
        timestamp=fact.time_ns,
        properties=properties,
        operation_type=OperationType(fact.operation),
        id=fact.id,
    )


class Meter:
    """Sends facts in batches and keeps where each of them was stored, once."""

    def __init__(self, facts: Sequence[Fact], numbers: frozenset[str]) -> None:
        self.events = [event_of(fact, fact.metric in numbers) for fact in facts]
        self.places: list[tuple[int, int] | None] = [None] * len(facts)
        self.n_sent = 0
        self.n_duplicates = 0
        self.n_retried = 0
        self.problems: list[str] = []
        self._awaited: tuple[int, asyncio.Event] | None = None
        self._originals: list[tuple[int, tuple[int, int]]] = []

    @property
    def offsets(self) -> list[int | None]:
        """By fact its offset; None where it isn't stored."""
        return [None if place is None else place[1] for place in self.places]

    async def send(
        self,
        client: AsyncClient,
        batches: Sequence[Sequence[int]],
        rng: random.Random,
        *,
        impatient: bool = True,
    ) -> None:
        """Send batches of facts (by number), several at a time, some as columns, retrying until all are settled."""
        waiting = iter(batches)

        async def work() -> None:
            for batch in waiting:
                timeout = rng.choice((0.001, 0.02, 0.1)) if impatient and rng.random() < 0.1 else 60.0
                if rng.random() < 0.4:
                    await self._send_columns(client, batch, timeout)
                else:
                    # Copies, for a fact may be in several batches: each is a call of its own.
                    events = [msgspec.structs.replace(self.events[number]) for number in batch]
                    await self._settle(batch, client.ingest(events, timeout=timeout))

        await asyncio.gather(*(work() for _ in range(WORKERS)))

    async def _send_columns(self, client: AsyncClient, batch: Sequence[int], timeout: float) -> None:
        by_metric: dict[str, list[int]] = {}
        for number in batch:
            by_metric.setdefault(self.events[number].metric_code, []).append(number)
        for code, numbers in by_metric.items():
            events = [self.events[number] for number in numbers]
            keys = sorted({key for event in events for key in event.properties})
            call = client.ingest_columns(
                code,
                account_ids=[event.account_id for event in events],
                values=[event.value for event in events],
                timestamps_ns=[event.timestamp for event in events],
                ids=[event.id for event in events],
                properties={key: [event.properties.get(key) for event in events] for key in keys} or None,
                operations=[event.operation_type for event in events],
                timeout=timeout,
            )
            await self._settle(numbers, call)

    async def _settle(self, numbers: Sequence[int], call: Any) -> None:
        while True:
            try:
                receipt = await call
                break
            except IngestError as error:
                if not error.retriable:
                    raise
                self.n_retried += 1
                call = error.retry(60.0)
        self.n_sent += len(numbers)
        if self._awaited is not None and self.n_sent >= self._awaited[0]:
            self._awaited[1].set()
        self.n_duplicates += receipt.n_duplicates
        if not receipt.ok:
            self.problems.append(f"refused: {receipt.rejected[:2]} {receipt.conflicts[:2]}")
        for number, place in zip(numbers, receipt.offsets, strict=True):
            if place is not None:
                if self.places[number] is not None:
                    self.problems.append(f"stored twice: {self.events[number]} {self.places[number]} {place}")
                self.places[number] = place
        for original in receipt.duplicates:
            self._originals.append((numbers[original.index], (original.partition, original.offset)))

    async def wait_sent(self, count: int) -> None:
        """Wait until so many events more have been answered."""
        self._awaited = (self.n_sent + count, asyncio.Event())
        await self._awaited[1].wait()

    async def send_what_must_not_count(self, client: AsyncClient, rng: random.Random) -> None:
        """Send repeats, ids used for something else, and events that are refused, among each other."""
        stored = [number for number, place in enumerate(self.places) if place is not None]
        mixed: list[tuple[str, int, Event]] = []
        for number in rng.sample(stored, 300):
            event = self.events[number]
            other = rng.choice(
                (
                    {"timestamp": _time_ns(event) + rng.choice((-1, 1)) if event.timestamp else 1},
                    {"timestamp": None},
                    {"properties": event.properties | {"extra": ""}},
                    {"value": event.value + "!" if isinstance(event.value, str) else event.value // 2 + 5},
                )
            )
            mixed += [
                ("duplicate", number, msgspec.structs.replace(event)),
                ("conflict", number, msgspec.structs.replace(event, **other)),
                ("rejected", number, msgspec.structs.replace(event, metric_code="no_such_metric")),
                ("rejected", number, msgspec.structs.replace(event, id=None, timestamp=2**63 - 2)),
            ]
        mixed = [entry for entry in mixed if entry[2] != self.events[entry[1]] or entry[0] == "duplicate"]
        rng.shuffle(mixed)
        receipt = await client.ingest([event for _, _, event in mixed])
        found = {entry.index: "duplicate" for entry in receipt.duplicates}
        found |= {entry.index: "conflict" for entry in receipt.conflicts}
        found |= {entry.index: "rejected" for entry in receipt.rejected}
        assert receipt.n_stored == 0, receipt
        assert found == {index: kind for index, (kind, _, _) in enumerate(mixed)}
        for original in [*receipt.duplicates, *receipt.conflicts]:
            assert (original.partition, original.offset) == self.places[mixed[original.index][1]]

    def check(self) -> None:
        """Every fact sent was stored once, and every duplicate was told where."""
        for number, place in self._originals:
            if self.places[number] != place:
                self.problems.append(f"duplicate of {place}, stored at {self.places[number]}")
        assert self.problems[:5] == []
        n_stored = sum(place is not None for place in self.places)
        assert self.n_sent == n_stored + self.n_duplicates
        places = [place for place in self.places if place is not None]
        assert len(set(places)) == len(places)


def cut(numbers: Sequence[int], rng: random.Random, sizes: str) -> list[list[int]]:
    """Cut facts into batches of 1 to 5000: all large, of all sizes, or small ones."""
    batches = []
    at = 0
    while at < len(numbers):
        size = {"large": 5000, "mixed": int(5000 ** rng.random()), "small": rng.randrange(1, 600)}[sizes]
        batches.append(list(numbers[at : at + size]))
        at += size
    return batches


def twice(numbers: Sequence[int], rng: random.Random, share: float) -> list[int]:
    """Repeat a share of the facts, some right after, some at any later place."""
    repeated = rng.sample(numbers, int(len(numbers) * share))
    later: dict[int, list[int]] = {}
    position = {number: at for at, number in enumerate(numbers)}
    for number in repeated:
        at = position[number]
        after = at if rng.random() < 0.3 else rng.randrange(at, len(numbers))
        later.setdefault(after, []).append(number)
    return [entry for at, number in enumerate(numbers) for entry in (number, *later.get(at, ()))]


class Check:
    """Asks the SDK and the oracle the same random questions."""

    def __init__(
        self,
        client: AsyncClient,
        oracle: Oracle,
        schemas: Sequence[MetricSchema],
        facts: Sequence[Fact],
        rng: random.Random,
    ) -> None:
        self._client = client
        self._oracle = oracle
        self._schemas = schemas
        self._rng = rng
        self._calendars = {schema.time_zone: Calendar(schema.time_zone) for schema in schemas}
        self._accounts = sorted({fact.account_id for fact in facts})
        self._facts = facts
        self._kinds = sorted({fact.kind for fact in facts if fact.kind is not None})
        times = [fact.time_ns for fact in facts]
        self._bounds = min(times), max(times) + 1
        self.differences: list[str] = []
        self.n_compared = 0
        self.n_events = 0  # counted in the answers: questions that nothing answers prove little

    def _compare(self, what: str, found: Any, expected: Any) -> None:
        self.n_compared += 1
        if found != expected:
            if isinstance(found, dict) and isinstance(expected, dict):
                keys = [key for key in {**found, **expected} if found.get(key) != expected.get(key)]
                found, expected = ({key: side.get(key) for key in keys[:2]} for side in (found, expected))
            self.differences.append(f"{what}: {found} instead of {expected}")

    # ------------------------------------------------------------ questions

    async def everything(self) -> None:
        """Compare every account's whole usage of every metric, in whole time and in one random range each."""
        for schema in self._schemas:
            for start, end in ((0, TIME_END), self._range(schema)):
                expected = self._oracle.ask(schema.agg_type.name, schema.code, start, end)
                rows = await self._client.top_accounts(schema.code, Period(start, end), limit=10_000)
                found = {(row.account_id,): answer_of(row.value) for row in rows}
                self._compare(f"ranking {schema.code} [{start}, {end})", found, expected)
                ranks = [_aggregate(schema, answer_of(row.value)) for row in rows]
                self._compare(f"order {schema.code} [{start}, {end})", ranks, sorted(ranks, reverse=True))
                self.n_events += sum(row.value.count for row in rows)

    async def random_questions(self, count: int) -> None:
        """Compare totals, breakdowns and series of random accounts, ranges and dimensions."""
        for _ in range(count):
            schema = self._rng.choice(self._schemas)
            start, end = self._range(schema)
            account = self._account()
            await self._total(schema, account, start, end, None)
            await self._total(schema, account, start, end, self._filters(schema))
            await self._breakdown(schema, account, start, end)
            await self._series(schema, account, start, end)

    async def _total(
        self, schema: MetricSchema, account: int, start: int, end: int, filters: dict[str, list[str]] | None
    ) -> None:
        answers = self._oracle.ask(
            schema.agg_type.name, schema.code, start, end, account=account, filters=filters
        )
        expected = answers.get((), _nothing(schema))
        usage = await self._client.query(account, schema.code, Period(start, end), filters=filters)
        what = f"total {schema.code} {account} [{start}, {end}) {filters}"
        self._compare(what, answer_of(usage.value), expected)
        self._compare(f"bounds of {what}", (usage.period.start_ns, usage.period.end_ns), (start, end))
        self.n_events += usage.value.count
        flags = 0
        if not filters and (start, end) == self._period(schema, start):
            flags = expected_flags(schema, expected)
        self._compare(f"flags of {what}", usage.value.alert_flags, flags)

    async def _breakdown(self, schema: MetricSchema, account: int, start: int, end: int) -> None:
        keys = self._rng.choice((["area"], ["kind"], ["area", "kind"], ["kind", "area"]))
        filters = self._filters(schema) if self._rng.random() < 0.4 else None
        expected = self._oracle.ask(
            schema.agg_type.name, schema.code, start, end, account=account, filters=filters, group_by=keys
        )
        rows = await self._client.breakdown(
            account, schema.code, Period(start, end), group_by=keys, filters=filters
        )
        found = {
            tuple(OTHER if row.group[key] is OTHER_ROW else row.group[key] for key in keys): answer_of(
                row.value
            )
            for row in rows
        }
        what = f"breakdown {schema.code} {account} [{start}, {end}) by {keys} of {filters}"
        self._compare(what, found, expected)
        self._compare(f"rows of {what}", len(found), len(rows))

    async def _series(self, schema: MetricSchema, account: int, start: int, end: int) -> None:
        unit = self._rng.choice(("hour", "day", "month"))
        low, high = self._bounds
        # A series of all time would be mostly empty buckets.
        start, end = max(start, low - 40 * DAY), min(end, high + 40 * DAY)
        if unit == "hour":
            start = max(start, min(self._time(), end) - 30 * DAY)
            end = min(end, start + self._rng.randrange(1, 60 * DAY))
        elif unit == "day":
            start = max(start, min(self._time(), end) - 300 * DAY)
            end = min(end, start + self._rng.randrange(1, 500 * DAY))
        if start >= end:
            return
        filters = self._filters(schema) if self._rng.random() < 0.4 else None
        starts = self._calendars[schema.time_zone].starts(start, end, unit)
        answers = self._oracle.ask(
            schema.agg_type.name, schema.code, start, end, account=account, filters=filters, starts=starts
        )
        expected = [
            (a, b, answers.get((a,), _nothing(schema)))
            for a, b in zip(starts, [*starts[1:], end], strict=True)
        ]
        series = await self._client.series(
            account, schema.code, Period(start, end), unit=unit, filters=filters
        )
        found = [(period.start_ns, period.end_ns, answer_of(totals)) for period, totals in series]
        what = f"series {schema.code} {schema.time_zone} {account} [{start}, {end}) by {unit} of {filters}"
        if len(found) == len(expected) and found != expected:
            at = next(i for i in range(len(found)) if found[i] != expected[i])
            found, expected = found[at : at + 1], expected[at : at + 1]
        self._compare(what, found, expected)

    async def realtime(self, count: int) -> None:
        """Compare running totals of metrics whose period never ends."""
        for schema in self._schemas:
            if schema.period_type.name != "LIFETIME":
                continue
            for account in {self._account() for _ in range(count)}:
                answers = self._oracle.ask(schema.agg_type.name, schema.code, 0, TIME_END, account=account)
                expected = answers.get((), _nothing(schema))
                usage = await self._client.query_realtime(account, schema.code)
                self._compare(f"realtime {schema.code} {account}", answer_of(usage.value), expected)

    async def listings(self, events: Sequence[Event], places: Sequence[Any], count: int) -> None:
        """Compare the stored events of some accounts and ranges, one by one and in the log's order."""
        accounts = [self._account() for _ in range(count)]
        stored: dict[int, list[tuple[int, Event]]] = {account: [] for account in accounts}
        for event, place in zip(events, places, strict=True):
            if place is not None and event.account_id in stored:
                stored[event.account_id].append((place[1], event))
        for account in accounts:
            schema = self._rng.choice(self._schemas)
            code = self._rng.choice((None, schema.code))
            start, end = self._range(schema)
            start = max(start, 0)  # the period that holds 1970 may begin before
            end = max(end, start)
            expected = sorted(
                (offset, event.id, event.metric_code, event.value, event.timestamp, event.properties,
                 event.operation_type)
                for offset, event in stored[account]
                if start <= _time_ns(event) < end and code in {None, event.metric_code}
            )  # fmt: skip
            page = self._rng.choice((7, 333, 10_000)) if len(expected) < 2_000 else 10_000
            found = [
                (e.offset, e.id, e.metric_code, e.value, e.timestamp_ns, e.properties, e.operation_type)
                async for e in self._client.list_events(account, start, end, metric_code=code, page_size=page)
            ]
            if found != expected:
                missing = [row for row in expected if row not in found][:1]
                extra = [row for row in found if row not in expected][:1]
                self.differences.append(
                    f"events of {account} [{start}, {end}) {code}: {len(found)} instead of {len(expected)}, "
                    f"without {missing}, with {extra}"
                )
            self.n_compared += 1

    async def alerts(self) -> None:
        """Compare which accounts crossed which thresholds in which periods: each crossing once."""
        expected = []
        for schema in self._schemas:
            if not schema.thresholds:
                continue
            calendar = self._calendars[schema.time_zone]
            rows = self._oracle.rows(
                "SELECT account, time, sum(value), count(*) FROM events WHERE metric = ? GROUP BY ALL",
                [schema.code],
            )
            totals: dict[tuple[int, int, int], int] = {}
            for account, time_ns, value, events in rows:
                start, end = calendar.period(time_ns, schema.period_type.name, schema.billing_cycle_day)
                add = events if schema.agg_type.name == "COUNT" else int(value)
                totals[account, start, end] = totals.get((account, start, end), 0) + add
            for (account, start, end), total in totals.items():
                expected += [
                    (schema.code, threshold.code, account, start, end)
                    for threshold in schema.thresholds
                    if total >= threshold.value
                ]
        found = []
        since: Mapping[int, int] = {}
        while True:
            page = await self._client.list_alerts(since=since, limit=997)
            found += [
                (
                    alert.metric_code,
                    alert.threshold_code,
                    alert.account_id,
                    alert.period.start_ns,
                    alert.period.end_ns,
                )
                for alert in page
            ]
            since = page.next
            if not page.more:
                break
        self._compare("alerts", sorted(found), sorted(expected))

    # ------------------------------------------------------------ what to ask

    def _period(self, schema: MetricSchema, time_ns: int) -> tuple[int, int]:
        if time_ns >= TIME_END:
            return TIME_END, TIME_END
        calendar = self._calendars[schema.time_zone]
        return calendar.period(time_ns, schema.period_type.name, schema.billing_cycle_day)

    def _account(self) -> int:
        if self._rng.random() < 0.04:
            return self._rng.getrandbits(64)  # one without events
        if self._rng.random() < 0.3:
            return self._rng.choice(self._accounts)
        return self._rng.choice(self._facts).account_id

    def _time(self) -> int:
        return self._rng.choice(self._facts).time_ns

    def _range(self, schema: MetricSchema) -> tuple[int, int]:
        rng = self._rng
        calendar = self._calendars[schema.time_zone]
        match rng.choice(
            ("period", "period", "days", "days", "months", "ragged", "ragged", "edge", "tiny", "all")
        ):
            case "period":
                return self._period(schema, self._time())
            case "days":
                days = sorted((calendar.day(self._time()), calendar.day(self._time())))
                return calendar.day_start(days[0]), calendar.day_start(days[1])
            case "months":
                months = sorted(calendar.period(self._time(), "CALENDAR") for _ in range(2))
                return months[0][0], months[1][1]
            case "ragged":
                start, end = sorted(self._time() + rng.randrange(-DAY, DAY) for _ in range(2))
                return start, end
            case "edge":
                # On an event, or a nanosecond beside it or beside a period's bound.
                period = self._period(schema, self._time())
                start = rng.choice((self._time(), period[0])) + rng.choice((-1, 0, 1))
                end = rng.choice((self._time(), min(period[1], TIME_END - 2))) + rng.choice((-1, 0, 1))
                return max(min(start, end), 0), max(start, end)
            case "tiny":
                start = self._time() - rng.randrange(3)
                return start, start + rng.randrange(5)
        return 0, TIME_END

    def _filters(self, schema: MetricSchema) -> dict[str, list[str]]:
        declared = next(dimension.values for dimension in schema.filters if dimension.key == "area")
        areas = self._rng.sample(declared, self._rng.randrange(1, 4))
        weighted = [fact.kind for fact in self._rng.choices(self._facts, k=3) if fact.kind is not None]
        kinds = sorted({*weighted, self._rng.choice([*self._kinds, "never-seen"])})
        filters = {"area": areas, "kind": kinds}
        keys = self._rng.choice((["area"], ["kind"], ["area", "kind"]))
        return {key: filters[key] for key in keys}


def expected_flags(schema: MetricSchema, answer: Answer) -> int:
    """Return which thresholds a total has crossed; of values that aren't negative, it can't have come back."""
    total = _aggregate(schema, answer)
    if total is None:
        return 0
    return sum(1 << i for i, threshold in enumerate(schema.thresholds) if total >= threshold.value)


def _aggregate(schema: MetricSchema, answer: Answer) -> Any:
    match schema.agg_type.name:
        case "COUNT":
            return answer.count
        case "SUM":
            return answer.sum
        case "MAX":
            return answer.max
        case "LATEST":
            return answer.last_value
    return answer.unique


def _nothing(schema: MetricSchema) -> Answer:
    return Answer(unique=0 if schema.agg_type.name == "COUNT_UNIQUE" else None)
