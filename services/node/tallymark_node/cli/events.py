"""`tallymark events` and `tallymark alerts`: what was stored, and which thresholds were crossed."""

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


@click.command()
@click.argument("account", type=ACCOUNT, required=False)
@click.option("--metric", "code", metavar="METRIC", help="Of this metric only.")
@click.option(
    "--limit", type=click.IntRange(1, LIMIT_MAX), default=1_000, show_default=True, help="At most so many."
)
@click.option("--scaled", is_flag=True, help="Show values as decimals.")
@client_command
async def alerts(
    options: Options, account: int | None, code: str | None, limit: int, scaled: bool
) -> int | None:
    """List the alerts raised, of ACCOUNT or of all accounts."""
    from tallymark_node import output

    async with connected(options) as client:
        if code is not None:
            await metric(client, code)
        found = await all_alerts(client, account, code, limit + 1)
        zones = {schema.code: schema.time_zone for schema in await client.metrics.list()}
    more = len(found) > limit
    found = found[:limit]
    if options.as_json:
        output.document([_alert_json(alert, scaled=scaled) for alert in found])
        return None
    if not found:
        output.line("no alerts were raised")
        return None
    output.table(ALERT_COLUMNS, [alert_row(alert, zones, scaled=scaled) for alert in found], numbers={0, 4})
    if more:
        output.line(f"there are more than these {limit:,}: see --limit")
    return None


ALERT_COLUMNS = ("account", "metric", "threshold", "period", "total then", "raised (UTC)")


async def all_alerts(client: Any, account: int | None, code: str | None, limit: int) -> list[Any]:
    """Read alerts page by page, in order within each partition, until there are `limit` or no more."""
    found: list[Any] = []
    since: dict[int, int] = {}
    while len(found) < limit:
        page = await client.list_alerts(
            account, metric_code=code, since=since, limit=min(_PAGE, limit - len(found))
        )
        found += page
        if not page.more or page.next == since:
            break
        since = page.next
    return found


def alert_row(alert: Any, zones: dict[str, str], *, scaled: bool = False) -> tuple[str, ...]:
    """Write an alert as the cells of `ALERT_COLUMNS`."""
    from tallymark_node import output

    value = output.number(alert.threshold_value, scaled=scaled)
    if alert.last_multiple > 1 or alert.first_multiple != alert.last_multiple:
        reached = output.number(alert.threshold_value * alert.last_multiple, scaled=scaled)
        threshold = f"{alert.threshold_code} ({reached}, every {value})"
    else:
        threshold = f"{alert.threshold_code} ({value})"
    zone = output.zone_here(zones.get(alert.metric_code, "UTC"))
    return (
        str(alert.account_id),
        alert.metric_code,
        threshold,
        output.span(alert.period.start_ns, alert.period.end_ns, zone).removesuffix(" (UTC)"),
        output.number(alert.value_at_cross, scaled=scaled),
        f"{alert.triggered_at:%Y-%m-%d %H:%M:%S}",
    )


def _alert_json(alert: Any, *, scaled: bool) -> dict[str, Any]:
    from tallymark_node import output

    return {
        "id": alert.id,
        "account_id": alert.account_id,
        "metric": alert.metric_code,
        "threshold": alert.threshold_code,
        "threshold_value": output.plain(alert.threshold_value, scaled=scaled),
        "period": output.period_json(alert.period.start_ns, alert.period.end_ns),
        "value_at_cross": output.plain(alert.value_at_cross, scaled=scaled),
        "first_multiple": alert.first_multiple,
        "last_multiple": alert.last_multiple,
        "triggered_at": alert.triggered_at.isoformat().replace("+00:00", "Z"),
        "partition": alert.partition,
        "event_offset": alert.event_offset,
    }


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
