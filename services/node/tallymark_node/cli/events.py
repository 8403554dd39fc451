"""`tallymark events`: what was stored."""

from __future__ import annotations

from typing import Any

import click

from tallymark_node.cli import parse
from tallymark_node.cli.common import ACCOUNT, INSTANT, Options, client_command, connected, metric

LIMIT_MAX = 10_000_000
_PAGE = 1_000


@click.command()
@click.argument("account", type=ACCOUNT)
@click.option("--from", "start_ns", type=INSTANT, metavar="WHEN", help=f"Start: {parse.INSTANT_HELP}.")
@click.option("--to", "end_ns", type=INSTANT, metavar="WHEN", help="End (exclusive).")
@click.option("--metric", "code", metavar="METRIC", help="Of this metric only.")
@click.option(
    "--limit", type=click.IntRange(1, LIMIT_MAX), default=100, show_default=True, help="At most so many."
)
@click.option("--scaled", is_flag=True, help="Show values as decimals.")
@client_command
async def events(
    options: Options,
    account: int,
    start_ns: int | None,
    end_ns: int | None,
    code: str | None,
    limit: int,
    scaled: bool,
) -> int | None:
    """List the stored events of ACCOUNT, in the order in which they were stored.

    With --json, one document a line.
    """
    from tallymark_node import output
    from tallymark_protocol.zones import TIME_END_NS

    start = 0 if start_ns is None else start_ns
    end = TIME_END_NS if end_ns is None else end_ns
    parse.check_range(start, end)
    async with connected(options) as client:
        if code is not None:
            await metric(client, code)
        stored = client.list_events(account, start, end, metric_code=code, page_size=min(limit + 1, _PAGE))
        rows: list[tuple[str, ...]] = []
        more = False
        count = 0
        async for event in stored:
            if count == limit:
                more = True
                break
            count += 1
            if options.as_json:
                output.document(_event_json(event, scaled=scaled))
            else:
                rows.append(_event_row(event, scaled=scaled))
    if options.as_json:
        return None
    if not rows:
        output.line(f"account {account} has no events there")
        return None
    output.table(("time (UTC)", "metric", "value", "properties", "id", "offset"), rows, numbers={2})
    if more:
        output.line(f"there are more than these {count:,}: see --limit, --from and --to")
    return None


def _event_row(event: Any, *, scaled: bool) -> tuple[str, ...]:
    from tallymark import OperationType
    from tallymark_node import output

    value = output.number(event.value, scaled=scaled and isinstance(event.value, int))
    if event.operation_type is OperationType.REMOVE:
        value = f"remove {value}"
    properties = ", ".join(f"{key}={text}" for key, text in sorted(event.properties.items()))
    return (
        output.moment(event.timestamp_ns),
        event.metric_code,
        value,
        properties,
        _id_text(event.id),
        f"{event.partition}:{event.offset}",
    )


def _event_json(event: Any, *, scaled: bool) -> dict[str, Any]:
    from tallymark_node import output

    return {
        "account_id": event.account_id,
        "metric": event.metric_code,
        "value": output.plain(event.value, scaled=scaled),
        "time": output.iso(event.timestamp_ns),
        "stored_at": output.iso(event.stored_at_ns),
        "operation": event.operation_type.name,
        "properties": dict(event.properties),
        "id": event.id if isinstance(event.id, str | int | None) else _id_text(event.id),
        "partition": event.partition,
        "offset": event.offset,
    }


def _id_text(event_id: Any) -> str:
    if event_id is None:
        return ""
    return event_id.hex() if isinstance(event_id, bytes) else str(event_id)
