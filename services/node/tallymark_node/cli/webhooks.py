"""`tallymark webhooks`: endpoints to which alerts are posted, and what could not be delivered to them."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from tallymark_node.cli.alerts import alert_json
from tallymark_node.cli.common import ACCOUNT, Options, client_command, connected

if TYPE_CHECKING:
    from tallymark import DeadLetter, Webhook

LIMIT = 100
LIMIT_MAX = 1_000


@click.group()
def webhooks() -> None:
    """Have alerts posted to URLs, and look at what could not be delivered."""


@webhooks.command()
@click.argument("url")
@click.option(
    "--secret",
    envvar="TALLYMARK_WEBHOOK_SECRET",
    metavar="WHSEC",
    help="By which receivers verify: whsec_ and base64; one is made otherwise. [env: TALLYMARK_WEBHOOK_SECRET]",
)
@click.option(
    "--account", "accounts", type=ACCOUNT, multiple=True, help="Alerts of this account only; may be repeated."
)
@click.option(
    "--metric", "codes", multiple=True, metavar="METRIC", help="Alerts of this metric only; may be repeated."
)
@click.option("--description", default="", help="For people.")
@click.option("--from-start", is_flag=True, help="From the first alert there is; otherwise from now on.")
@client_command
async def create(
    options: Options,
    url: str,
    secret: str | None,
    accounts: tuple[int, ...],
    codes: tuple[str, ...],
    description: str,
    from_start: bool,
) -> int | None:
    """Have alerts posted to URL, each at least once, from now on.

    Prints the secret by which the receiver verifies them; it can't be asked for later.
    """
    from tallymark_node import output

    async with connected(options) as client:
        made = await client.webhooks.create(
            url,
            secret,
            account_ids=accounts,
            metric_codes=codes,
            description=description,
            from_start=from_start,
        )
    if options.as_json:
        output.document({**webhook_json(made), "secret": made.secret})
        return None
    output.line(f"created webhook {made.id}")
    output.facts([("url", made.url), ("secret", made.secret)])
    return None


@webhooks.command(name="list")
@client_command
async def list_webhooks(options: Options) -> int | None:
    """List all webhooks, by their age."""
    from tallymark_node import output

    async with connected(options) as client:
        found = await client.webhooks.list()
    if options.as_json:
        output.document([webhook_json(webhook) for webhook in found])
        return None
    if not found:
        output.line("there are no webhooks yet; create one with `tallymark webhooks create URL`")
        return None
    output.table(
        ("webhook", "url", "accounts", "metrics", "pending", "dead", "state"),
        [
            (
                webhook.id,
                webhook.url,
                _some([str(account) for account in webhook.account_ids]),
                _some(webhook.metric_codes),
                f"{webhook.pending:,}",
                f"{webhook.dead:,}",
                _state(webhook),
            )
            for webhook in found
        ],
        numbers={4, 5},
    )
    return None


@webhooks.command()
@click.argument("webhook_id", metavar="WEBHOOK")
@click.option("--yes", "-y", is_flag=True, help="Don't ask.")
@client_command
async def delete(options: Options, webhook_id: str, yes: bool) -> int | None:
    """Forget WEBHOOK, what it has yet to be told, and its dead letters."""
    from tallymark_node import output

    async with connected(options) as client:
        webhook = await client.webhooks.get(webhook_id)
        if not yes and sys.stdin.isatty():
            waiting = webhook.pending + webhook.dead
            more = f", and {waiting:,} alerts that it hasn't got" if waiting else ""
            click.confirm(f"Delete the webhook to {webhook.url}{more}?", abort=True, err=True)
        await client.webhooks.delete(webhook_id)
    if options.as_json:
        output.document({"deleted": webhook_id})
    else:
        output.line(f"deleted webhook {webhook_id}")
    return None


@webhooks.command(name="dead-letters")
@click.argument("webhook_id", metavar="WEBHOOK")
@click.option(
    "--limit", type=click.IntRange(1, LIMIT_MAX), default=LIMIT, show_default=True, help="At most so many."
)
@click.option("--scaled", is_flag=True, help="Show values as decimals.")
@client_command
async def dead_letters(options: Options, webhook_id: str, limit: int, scaled: bool) -> int | None:
    """List what could not be delivered to WEBHOOK, the oldest first."""
    from tallymark_node import output

    async with connected(options) as client:
        letters = await client.webhooks.dead_letters(webhook_id, limit=limit)
    if options.as_json:
        output.document([_letter_json(letter, scaled=scaled) for letter in letters])
        return None
    if not letters:
        output.line("there are no dead letters")
        return None
    output.table(
        ("alert", "account", "metric", "threshold", "attempts", "first (UTC)", "last (UTC)", "error"),
        [
            (
                letter.alert.id,
                str(letter.alert.account_id),
                letter.alert.metric_code,
                letter.alert.threshold_code,
                f"{letter.attempts:,}",
                f"{letter.first_at:%Y-%m-%d %H:%M:%S}",
                f"{letter.last_at:%Y-%m-%d %H:%M:%S}",
                letter.error,
            )
            for letter in letters
        ],
        numbers={1, 4},
    )
    if letters.total > len(letters):
        output.line(f"there are {letters.total:,} of them: see --limit")
    return None


@webhooks.command()
@click.argument("webhook_id", metavar="WEBHOOK")
@click.argument("alert_ids", metavar="[ALERT]...", nargs=-1)
@client_command
async def redeliver(options: Options, webhook_id: str, alert_ids: tuple[str, ...]) -> int | None:
    """Try WEBHOOK's dead letters again: those of the ALERTs, or all."""
    from tallymark_node import output

    async with connected(options) as client:
        webhook = await client.webhooks.redeliver(webhook_id, list(alert_ids) or None)
    if options.as_json:
        output.document(webhook_json(webhook))
    else:
        output.line(
            f"webhook {webhook.id}: {_state(webhook)}, {webhook.pending:,} pending, {webhook.dead:,} dead"
        )
    return None


def webhook_json(webhook: Webhook) -> dict[str, Any]:
    """Write a webhook for JSON, without its secret."""
    return {
        "id": webhook.id,
        "url": webhook.url,
        "account_ids": webhook.account_ids,
        "metric_codes": webhook.metric_codes,
        "description": webhook.description,
        "created_at": webhook.created_at.isoformat().replace("+00:00", "Z"),
        "pending": webhook.pending,
        "dead": webhook.dead,
        "paused": webhook.paused or None,
        "last_error": webhook.last_error or None,
        "owner": webhook.owner or None,
    }


def _letter_json(letter: DeadLetter, *, scaled: bool) -> dict[str, Any]:
    return {
        "alert": alert_json(letter.alert, scaled=scaled),
        "attempts": letter.attempts,
        "first_at": letter.first_at.isoformat().replace("+00:00", "Z"),
        "last_at": letter.last_at.isoformat().replace("+00:00", "Z"),
        "error": letter.error,
    }


def _state(webhook: Webhook) -> str:
    if webhook.paused:
        return f"paused: {webhook.paused}"
    return f"failing: {webhook.last_error}" if webhook.last_error else "well"


def _some(items: list[str]) -> str:
    if not items:
        return "all"
    return ", ".join(items[:5]) + (f", … ({len(items)})" if len(items) > 5 else "")
