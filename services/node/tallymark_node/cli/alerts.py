"""`tallymark alerts`: which thresholds were crossed, and with `--follow` those that are crossed from now on.

Following with `--since FILE` keeps the subscription's offsets in that file: written after an alert is printed, so a
run that is killed prints at most the last ones again.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tallymark_node.cli import parse
from tallymark_node.cli.common import ACCOUNT, INSTANT, Options, client_command, connected, metric

if TYPE_CHECKING:
    from tallymark import Alert, AlertSubscription, AsyncClient

LIMIT = 1_000
LIMIT_MAX = 10_000_000
POLL_SECONDS = 1.0  # how often offsets are written, and an interruption told, while nothing happens
_PAGE = 1_000

ALERT_COLUMNS = ("account", "metric", "threshold", "period", "total then", "raised (UTC)")


@click.command()
@click.argument("account", type=ACCOUNT, required=False)
@click.option("--metric", "code", metavar="METRIC", help="Of this metric only.")
@click.option(
    "--from",
    "start_ns",
    type=INSTANT,
    metavar="WHEN",
    help=f"Raised from then on: {parse.INSTANT_HELP}.",
)
@click.option("--to", "end_ns", type=INSTANT, metavar="WHEN", help="Raised before.")
@click.option("--follow", is_flag=True, help="Print alerts as they are raised, a line each, until Ctrl-C.")
@click.option(
    "--since",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="With --follow: go on after what an earlier run with this file has printed.",
)
@click.option(
    "--limit",
    type=click.IntRange(1, LIMIT_MAX),
    help=f"At most so many. [default: {LIMIT:,}; all that follow]",
)
@click.option("--scaled", is_flag=True, help="Show values as decimals.")
@client_command
async def alerts(
    options: Options,
    account: int | None,
    code: str | None,
    start_ns: int | None,
    end_ns: int | None,
    follow: bool,
    since: Path | None,
    limit: int | None,
    scaled: bool,
) -> int | None:
    """List the alerts raised, of ACCOUNT or of all accounts.

    With --follow, print those that are raised from now on, with --json one document a line. Each is printed at least
    once: a run with --since FILE that was killed may have printed the last ones before.
    """
    from tallymark_protocol.errors import InvalidRequestError

    if follow:
        if start_ns is not None or end_ns is not None:
            raise InvalidRequestError(
                "--follow prints what is raised from now on: it takes no --from or --to"
            )
        return await _follow(options, account, code, since, limit, scaled=scaled)
    if since is not None:
        raise InvalidRequestError("--since goes with --follow; to choose alerts by time there is --from")
    return await _list(options, account, code, start_ns, end_ns, limit or LIMIT, scaled=scaled)


# ---------------------------------------------------------------- those there are


async def _list(
    options: Options,
    account: int | None,
    code: str | None,
    start_ns: int | None,
    end_ns: int | None,
    limit: int,
    *,
    scaled: bool,
) -> int | None:
    from tallymark_node import output

    parse.check_range(start_ns or 0, 2**63 - 1 if end_ns is None else end_ns)
    async with connected(options) as client:
        if code is not None:
            await metric(client, code)
        found = await all_alerts(client, account, code, limit + 1, start_ns=start_ns, end_ns=end_ns)
        zones = {schema.code: schema.time_zone for schema in await client.metrics.list()}
    more = len(found) > limit
    found = found[:limit]
    if options.as_json:
        output.document([alert_json(alert, scaled=scaled) for alert in found])
        return None
    if not found:
        output.line("no alerts were raised")
        return None
    output.table(ALERT_COLUMNS, [alert_row(alert, zones, scaled=scaled) for alert in found], numbers={0, 4})
    if more:
        output.line(f"there are more than these {limit:,}: see --limit")
    return None


async def all_alerts(
    client: AsyncClient,
    account: int | None,
    code: str | None,
    limit: int,
    *,
    start_ns: int | None = None,
    end_ns: int | None = None,
) -> list[Alert]:
    """Read alerts page by page, in order within each partition, until there are `limit` or no more."""
    found: list[Alert] = []
    since: dict[int, int] = {}
    while len(found) < limit:
        page = await client.list_alerts(
            account,
            metric_code=code,
            since=since,
            start=start_ns,
            end=end_ns,
            limit=min(_PAGE, limit - len(found)),
        )
        found += page
        if not page.more or page.next == since:
            break
        since = page.next
    return found


# ---------------------------------------------------------------- those that come


async def _follow(
    options: Options,
    account: int | None,
    code: str | None,
    file: Path | None,
    limit: int | None,
    *,
    scaled: bool,
) -> int | None:
    import asyncio

    offsets = _Offsets(file)
    with _interruptible():
        try:
            async with connected(options) as client:
                if code is not None:
                    await metric(client, code)
                zones = {schema.code: schema.time_zone for schema in await client.metrics.list()}
                subscription = client.alerts.subscribe(
                    account_ids=account, metric_codes=code, since=offsets.read()
                )
                async with subscription:
                    offsets.write(subscription)
                    await _print(options, subscription, zones, offsets, limit, scaled=scaled)
        except asyncio.CancelledError:
            return 0  # Ctrl-C, or SIGTERM: how following ends
    return None


async def _print(
    options: Options,
    subscription: AlertSubscription,
    zones: dict[str, str],
    offsets: _Offsets,
    limit: int | None,
    *,
    scaled: bool,
) -> None:
    from tallymark_node import output

    count = 0
    problem = ""
    try:
        while True:
            # Asking for the next one says that those before have been printed.
            alert = await subscription.next(timeout=0 if count == limit else POLL_SECONDS)
            offsets.write(subscription)
            if count == limit:
                return
            error = subscription.error
            if (error.message if error else "") != problem:
                problem = error.message if error else ""
                click.echo(f"waiting: {problem}" if problem else "going on", err=True)
            if alert is None:
                continue
            count += 1
            if options.as_json:
                output.document(alert_json(alert, scaled=scaled))
            else:
                output.line("  ".join(_line(alert, zones, scaled=scaled)))
            sys.stdout.flush()
    finally:
        offsets.write(subscription)


def _line(alert: Alert, zones: dict[str, str], *, scaled: bool) -> list[str]:
    from tallymark_node import output

    account, code, threshold, period, total, raised = alert_row(alert, zones, scaled=scaled)
    cells = [f"{raised} UTC", f"account {account}", code, threshold, f"total {total}", period]
    return [output.printable(cell) for cell in cells]


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM cancel the task that runs this."""
    import asyncio

    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    assert task is not None, "a command runs in a task"
    kinds = (signal.SIGINT, signal.SIGTERM)
    try:
        for kind in kinds:
            loop.add_signal_handler(kind, task.cancel)
        yield
    finally:
        for kind in kinds:
            loop.remove_signal_handler(kind)


class _Offsets:
    """The file in which a subscription's offsets are kept, if there is to be one."""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._written: dict[str, int] | None = None

    def read(self) -> dict[str, int] | None:
        """Where to go on; None: from now on, for the file isn't there yet.

        Raises:
            InvalidRequestError: the file can't be read, or holds something else.
        """
        from tallymark.alerts import positions_of
        from tallymark_protocol.errors import InvalidRequestError

        if self._file is None:
            return None
        try:
            offsets = json.loads(self._file.read_bytes())
            positions_of(offsets)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, InvalidRequestError) as error:
            raise InvalidRequestError(f"{self._file} holds no offsets: {error}") from error
        if not isinstance(offsets, dict):
            raise InvalidRequestError(f"{self._file} holds no offsets")
        return offsets

    def write(self, subscription: AlertSubscription) -> None:
        """Write what has changed; whoever reads the file sees the old offsets or the new ones, whole."""
        from tallymark_protocol.errors import InvalidRequestError

        if self._file is None:
            return
        offsets = subscription.offsets()
        if offsets == self._written:
            return
        draft = self._file.with_name(f"{self._file.name}.{os.getpid()}.tmp")
        try:
            draft.write_text(json.dumps(offsets) + "\n", encoding="ascii")
            draft.replace(self._file)
        except OSError as error:
            raise InvalidRequestError(f"can't write {self._file}: {error}") from error
        self._written = offsets


# ---------------------------------------------------------------- how they are shown


def alert_row(alert: Alert, zones: dict[str, str], *, scaled: bool = False) -> tuple[str, ...]:
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


def alert_json(alert: Alert, *, scaled: bool) -> dict[str, Any]:
    """Write an alert for JSON."""
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
        "position": alert.position,
        "event_offset": alert.event_offset,
    }
