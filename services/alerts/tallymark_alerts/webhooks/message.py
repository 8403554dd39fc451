"""What a webhook's endpoint is sent: the body of an alert, and the headers that prove whose it is. Pure.

The headers are those of Standard Webhooks (https://www.standardwebhooks.com): the id is the alert's, the same at every
attempt; the timestamp is the attempt's; the signature is an HMAC-SHA256 over both and the body.

Numbers that can be beyond 2^53 are decimal strings, in every message: JavaScript and others read JSON's numbers as
doubles and would round them without a word. Times are RFC 3339 in UTC, with as many decimals as they need.
"""

from __future__ import annotations

import datetime as dt
from typing import Final

import msgspec
import standardwebhooks

from tallymark_protocol import int128
from tallymark_protocol.messages import AlertRecord

ALERT_RAISED: Final = "alert.raised"
_EPOCH: Final = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
_SECOND: Final = 1_000_000_000


class AlertData(msgspec.Struct, frozen=True):
    """An alert as endpoints see it."""

    id: str
    account_id: str
    metric_code: str
    threshold_code: str
    threshold_value: str
    value_at_cross: str
    first_multiple: str
    last_multiple: str
    period_start: str
    period_end: str
    triggered_at: str
    event_offset: int
    partition: int
    position: int


class AlertMessage(msgspec.Struct, frozen=True):
    """The body."""

    type: str
    timestamp: str
    data: AlertData


def body_of(alert: AlertRecord) -> bytes:
    """The body of an alert: the same bytes at every attempt."""
    raised = utc_text(alert.triggered_at_ns)
    data = AlertData(
        id=alert.id,
        account_id=str(alert.account_id),
        metric_code=alert.metric_code,
        threshold_code=alert.threshold_code,
        threshold_value=str(alert.threshold_value),
        value_at_cross=str(int128.from_bytes(alert.value_at_cross)),
        first_multiple=str(int128.from_bytes(alert.first_multiple)),
        last_multiple=str(int128.from_bytes(alert.last_multiple)),
        period_start=utc_text(alert.period_start_ns),
        period_end=utc_text(alert.period_end_ns),
        triggered_at=raised,
        event_offset=alert.event_offset,
        partition=alert.partition,
        position=alert.position,
    )
    return msgspec.json.encode(AlertMessage(ALERT_RAISED, raised, data))


def utc_text(ns: int) -> str:
    """A time in RFC 3339: `2026-11-21T09:30:00Z`, with decimals where it has any."""
    seconds, rest = divmod(ns, _SECOND)
    text = (_EPOCH + dt.timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%S")
    decimals = f".{rest:09d}".rstrip("0") if rest else ""
    return f"{text}{decimals}Z"


class Signer:
    """Makes the headers of one webhook's messages.

    Args:
        secret: "whsec_" and base64, checked before.
        user_agent: what this software calls itself.
    """

    def __init__(self, secret: str, user_agent: str) -> None:
        self._webhook = standardwebhooks.Webhook(secret)
        self._user_agent = user_agent

    def headers(self, message_id: str, now_ns: int, body: bytes) -> dict[str, str]:
        """The headers of an attempt at a time."""
        seconds = now_ns // _SECOND
        moment = _EPOCH + dt.timedelta(seconds=seconds)
        return {
            "content-type": "application/json",
            "user-agent": self._user_agent,
            "webhook-id": message_id,
            "webhook-timestamp": str(seconds),
            "webhook-signature": self._webhook.sign(message_id, moment, body.decode()),
        }
