"""Webhooks: endpoints to which the cluster posts alerts, and what could not be delivered to them."""

from __future__ import annotations

import base64
import datetime as dt
import secrets as randomness
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Final

import msgspec

from tallymark._gateways import details_repeated
from tallymark.alerts import accounts_of, metrics_of
from tallymark.results import Alert, alert_of
from tallymark_protocol.errors import InvalidRequestError, NotFoundError, ServerError
from tallymark_protocol.messages import (
    DeadLettersResult,
    Message,
    WebhookCreate,
    WebhookDeadLetters,
    WebhookDelete,
    WebhookInfo,
    WebhookList,
    WebhookRedeliver,
    WebhooksResult,
)
from tallymark_protocol.periods import from_ns

SECRET_PREFIX: Final = "whsec_"  # noqa: S105  # what every secret begins with, not one
SECRET_BYTES: Final = 32


class Webhook(msgspec.Struct, frozen=True, kw_only=True):
    """An endpoint to which alerts are posted, and how far it is."""

    id: str
    url: str
    account_ids: list[int]  # none: all
    metric_codes: list[str]  # none: all
    description: str
    created_at: dt.datetime
    secret: str  # as `create` returns it; "" everywhere else: it can't be asked for
    pending: int  # deliveries that failed and are tried again
    dead: int  # dead letters
    paused: str  # why nothing new is tried; "" while it goes on
    last_error: str  # of the last attempt; "" if that went well
    owner: str  # the alerts instance that delivers; "" while none does

    def __repr__(self) -> str:
        """Leave the secret out: what is printed ends up in logs."""
        return f"Webhook(id={self.id!r}, url={self.url!r}, pending={self.pending}, dead={self.dead})"


class DeadLetter(msgspec.Struct, frozen=True, kw_only=True):
    """An alert that could not be delivered to a webhook."""

    alert: Alert
    attempts: int
    first_at: dt.datetime  # the first attempt
    last_at: dt.datetime
    error: str  # of the last attempt


class DeadLetters(list[DeadLetter]):
    """Dead letters, the oldest first. `total` is how many there are in all."""

    total: int


class AsyncWebhooks:
    """The webhooks of a cluster: `client.webhooks`. Every call takes `timeout`, in seconds.

    Errors of all calls: `UnavailableError` and `BackpressureError` where the service couldn't answer within the
    timeout (call again), `InvalidRequestError` where the request can never succeed.
    """

    def __init__(self, call: Callable[[Message, type[Any], float | None], Awaitable[Any]]) -> None:
        self._call = call

    async def create(
        self,
        url: str,
        secret: str | None = None,
        *,
        account_ids: Iterable[int] | int | None = None,
        metric_codes: Iterable[str] | str | None = None,
        description: str = "",
        from_start: bool = False,
        timeout: float | None = None,
    ) -> Webhook:
        """Have alerts posted to a URL, signed as Standard Webhooks says. Each comes at least once.

        The answer has the `secret` by which a receiver verifies them; it is the only one that has. The same call
        with the same secret again returns the webhook that is there.

        Args:
            url: `https://…` or `http://…`; its addresses must be public, unless the service is told otherwise.
            secret: "whsec_" and the base64 of 24 to 64 bytes; None: one is made.
            account_ids: alerts of these accounts; None or none: of all.
            metric_codes: alerts of these metrics; None or none: of all.
            description: a note for people.
            from_start: from the first alert there is; otherwise those raised from now on.
            timeout: seconds, retries included.

        Raises:
            InvalidRequestError: the URL or the secret can't be one; there are too many webhooks.
        """
        for name, text in (("url", url), ("secret", secret or ""), ("description", description)):
            if not isinstance(text, str):
                raise InvalidRequestError(f"{name} must be a string, not {type(text).__name__}")
        message = WebhookCreate(
            url,
            secret or new_secret(),
            accounts_of(account_ids),
            metrics_of(metric_codes),
            description,
            bool(from_start),
        )
        return _single(await self._call(message, WebhooksResult, timeout))

    async def list(self, *, timeout: float | None = None) -> list[Webhook]:
        """Return all webhooks, by their age."""
        result = await self._call(WebhookList(), WebhooksResult, timeout)
        return [webhook_of(info) for info in result.webhooks]

    async def get(self, webhook_id: str, *, timeout: float | None = None) -> Webhook:
        """Return a webhook.

        Raises:
            NotFoundError: there is none of this id.
        """
        for webhook in await self.list(timeout=timeout):
            if webhook.id == webhook_id:
                return webhook
        raise NotFoundError(f"there is no webhook {webhook_id!r:.80}")

    async def delete(self, webhook_id: str, *, timeout: float | None = None) -> None:
        """Forget a webhook, what it has yet to be told, and its dead letters.

        Raises:
            NotFoundError: there is none of this id.
        """
        try:
            await self._call(WebhookDelete(_id(webhook_id)), WebhooksResult, timeout)
        except NotFoundError as error:
            if not details_repeated(error):
                raise

    async def dead_letters(
        self, webhook_id: str, *, limit: int = 100, timeout: float | None = None
    ) -> DeadLetters:
        """Return what could not be delivered to a webhook, the oldest first.

        Raises:
            NotFoundError: there is no webhook of this id.
        """
        message = WebhookDeadLetters(_id(webhook_id), limit)
        return dead_letters_of(await self._call(message, DeadLettersResult, timeout))

    async def redeliver(
        self, webhook_id: str, alert_ids: Iterable[str] | str | None = None, *, timeout: float | None = None
    ) -> Webhook:
        """Try dead letters again, as if they were new: those of these alerts, or (None) all.

        Also makes a webhook go on that was paused. Raises:
            NotFoundError: there is no webhook of this id.
        """
        if alert_ids is None:
            listed = []
        else:
            listed = [alert_ids] if isinstance(alert_ids, str) else [*alert_ids]
            if not listed:
                raise InvalidRequestError("alert_ids is empty: pass None for all dead letters")
            if not all(isinstance(alert_id, str) and alert_id for alert_id in listed):
                raise InvalidRequestError("alert_ids must be ids of alerts")
        return _single(await self._call(WebhookRedeliver(_id(webhook_id), listed), WebhooksResult, timeout))


def new_secret() -> str:
    """Make a secret. Here and not at the server, so that a call that is repeated makes no second webhook."""
    return SECRET_PREFIX + base64.b64encode(randomness.token_bytes(SECRET_BYTES)).decode()


def webhook_of(info: WebhookInfo) -> Webhook:
    """Read a webhook."""
    return Webhook(
        id=info.id,
        url=info.url,
        account_ids=info.account_ids,
        metric_codes=info.metric_codes,
        description=info.description,
        created_at=from_ns(info.created_at_ns),
        secret=info.secret,
        pending=info.pending,
        dead=info.dead,
        paused=info.paused,
        last_error=info.last_error,
        owner=info.owner,
    )


def dead_letters_of(result: DeadLettersResult) -> DeadLetters:
    """Read dead letters."""
    letters = DeadLetters(
        DeadLetter(
            alert=alert_of(letter.alert),
            attempts=letter.attempts,
            first_at=from_ns(letter.first_ns),
            last_at=from_ns(letter.last_ns),
            error=letter.error,
        )
        for letter in result.letters
    )
    letters.total = result.count
    return letters


def _id(webhook_id: str) -> str:
    if not isinstance(webhook_id, str) or not webhook_id:
        raise InvalidRequestError(f"a webhook's id is a string, not {webhook_id!r:.40}")
    return webhook_id


def _single(result: WebhooksResult) -> Webhook:
    if not result.webhooks:
        raise ServerError("the service named no webhook")
    return webhook_of(result.webhooks[0])
