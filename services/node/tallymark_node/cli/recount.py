"""`tallymark recount`: one total, counted again here from the raw events that the server has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from tallymark_node.cli.common import (
    ACCOUNT,
    INSTANT,
    STATUS_REFUSED,
    Options,
    client_command,
    connected,
    metric,
)
from tallymark_node.cli.usage import PERIODS, choose_period

if TYPE_CHECKING:
    from tallymark import AggType

PAGE = 10_000


class Recount:
    """Counts stored events by themselves: what a total's fields should be.

    Memory is bounded, but for COUNT_UNIQUE, which needs every different value of the period.
    """

    def __init__(self, agg: AggType) -> None:
        from tallymark import AggType

        self._is_unique = agg is AggType.COUNT_UNIQUE
        self._is_count = agg is AggType.COUNT
        self.count = 0
        self.sum = 0
        self.min: int | None = None
        self.max: int | None = None
        self.last_value: int | None = None
        self._last = (-1, -1)  # time and offset
        self._members: dict[int | str, tuple[int, int, bool]] = {}

    def take(self, event: Any) -> None:
        """Count an event."""
        from tallymark import OperationType

        self.count += 1
        at = (event.timestamp_ns, event.offset)
        if self._is_unique:
            before = self._members.get(event.value)
            if before is None or before[:2] < at:
                removes = event.operation_type is OperationType.REMOVE
                self._members[event.value] = (*at, removes)
            return
        if not self._is_count:
            self.sum += event.value
            self.min = event.value if self.min is None else min(self.min, event.value)
            self.max = event.value if self.max is None else max(self.max, event.value)
        if at > self._last:
            self._last = at
            self.last_value = None if self._is_count else event.value

    def facts(self) -> dict[str, Any]:
        """The fields of the total that the metric's aggregation has."""
        if self._is_unique:
            present = sum(1 for *_, removed in self._members.values() if not removed)
            return {"count": self.count, "unique": present}
        if self._is_count:
            return {"count": self.count}
        return {
            "count": self.count,
            "sum": self.sum,
            "min": self.min,
            "max": self.max,
            "last_value": self.last_value,
        }


@click.command()
@click.argument("account", type=ACCOUNT)
@click.argument("code", metavar="METRIC")
@click.option("--period", type=click.Choice(PERIODS), help="As for `usage`. [default: current]")
@click.option("--from", "start_ns", type=INSTANT, metavar="WHEN", help="Start of a range.")
@click.option("--to", "end_ns", type=INSTANT, metavar="WHEN", help="End of the range (exclusive).")
@click.option("--events", "with_events", is_flag=True, help="List the events that were counted.")
@client_command
async def recount(
    options: Options,
    account: int,
    code: str,
    period: str | None,
    start_ns: int | None,
    end_ns: int | None,
    with_events: bool,
) -> int | None:
    """Count one total again from raw events, and compare it with the running one.

    Both are as of one offset of the log. Exit status: 0 they are the same; 1 they differ.
    """
    from tallymark_node import output
    from tallymark_node.cli.events import _event_json, _event_row

    bounds = choose_period(period, start_ns, end_ns, with_units=False)
    async with connected(options) as client:
        schema = await metric(client, code)
        answer = await client.query(account, code, bounds)
        counted = Recount(schema.agg_type)
        listed: list[Any] = []
        stored = client.list_events(
            account, answer.period.start_ns, answer.period.end_ns, metric_code=code, page_size=PAGE
        )
        async for event in stored:
            if event.offset >= answer.as_of.get(event.partition, 0):
                continue  # it came after the total was told
            counted.take(event)
            if with_events:
                listed.append(
                    _event_json(event, scaled=False) if options.as_json else _event_row(event, scaled=False)
                )
    recounted = counted.facts()
    running = {name: getattr(answer.value, name) for name in recounted}
    if not recounted["count"]:
        running = {name: running[name] or recounted[name] for name in running}  # nothing may be 0 or None
    differs = [name for name in recounted if running[name] != recounted[name]]
    if options.as_json:
        document = {
            "account_id": account,
            "metric": code,
            "start": output.iso(answer.period.start_ns),
            "end": output.iso(answer.period.end_ns),
            "as_of": {str(number): offset for number, offset in answer.as_of.items()},
            "running": running,
            "recounted": recounted,
            "differs": differs,
        }
        output.document({**document, "events": listed} if with_events else document)
    else:
        if listed:
            output.table(("time (UTC)", "metric", "value", "properties", "id", "offset"), listed, numbers={2})
        rows = [
            (name, _shown(running[name]), _shown(recounted[name]), "differs" if name in differs else "")
            for name in recounted
        ]
        output.table(("", "running", "recounted", ""), rows, numbers={1, 2})
        output.line("they differ" if differs else "they are the same")
    return STATUS_REFUSED if differs else None


def _shown(value: int | None) -> str:
    from tallymark_node import output

    return output.NOTHING if value is None else output.number(value)
