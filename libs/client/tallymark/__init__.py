"""Tallymark's SDK: count what customers use, exactly.

`AsyncClient` is for code on an event loop, `Client` the same for code without one::

    async with AsyncClient(["localhost:7001"]) as client:
        receipt = await client.ingest([Event(account_id=42, metric_code="api_calls")])
        usage = await client.query(42, "api_calls", current_month())
"""

from tallymark.alerts import AlertSubscription, AsyncAlerts
from tallymark.blocking import Client, Metrics
from tallymark.blocking_alerts import BlockingAlerts, BlockingAlertSubscription, Webhooks
from tallymark.client import AsyncClient
from tallymark.failures import IngestError
from tallymark.metrics import AsyncMetrics
from tallymark.receipt import Original, Receipt, Rejection
from tallymark.results import (
    OTHER,
    AccountTotal,
    Alert,
    Alerts,
    BreakdownRow,
    Rows,
    StoredEvent,
    Totals,
    Usage,
)
from tallymark.webhooks import AsyncWebhooks, DeadLetter, DeadLetters, Webhook
from tallymark_protocol.errors import (
    AlreadyExistsError,
    BackpressureError,
    InvalidRequestError,
    NotFoundError,
    OutcomeUnknownError,
    Reason,
    ServerError,
    TallymarkError,
    UnavailableError,
)
from tallymark_protocol.model import (
    AggType,
    AlertThreshold,
    DeliveryMode,
    DimensionFilter,
    Event,
    MetricSchema,
    OperationType,
    PeriodType,
    UniqueType,
)
from tallymark_protocol.periods import (
    Period,
    current_billing_period,
    current_month,
    current_period,
    last_billing_period,
    last_month,
)
from tallymark_protocol.scale import scale, unscale

__all__ = [
    "OTHER",
    "AccountTotal",
    "AggType",
    "Alert",
    "AlertSubscription",
    "AlertThreshold",
    "Alerts",
    "AlreadyExistsError",
    "AsyncAlerts",
    "AsyncClient",
    "AsyncMetrics",
    "AsyncWebhooks",
    "BackpressureError",
    "BlockingAlertSubscription",
    "BlockingAlerts",
    "BreakdownRow",
    "Client",
    "DeadLetter",
    "DeadLetters",
    "DeliveryMode",
    "DimensionFilter",
    "Event",
    "IngestError",
    "InvalidRequestError",
    "MetricSchema",
    "Metrics",
    "NotFoundError",
    "OperationType",
    "Original",
    "OutcomeUnknownError",
    "Period",
    "PeriodType",
    "Reason",
    "Receipt",
    "Rejection",
    "Rows",
    "ServerError",
    "StoredEvent",
    "TallymarkError",
    "Totals",
    "UnavailableError",
    "UniqueType",
    "Usage",
    "Webhook",
    "Webhooks",
    "current_billing_period",
    "current_month",
    "current_period",
    "last_billing_period",
    "last_month",
    "scale",
    "unscale",
]
