"""Prepaid credits: what is left is what was bought less what was used, both running totals that are always current.

A receipt means that the usage is counted: the next realtime query includes it, so the balance shown after a purchase
or a job is right at once. Tallymark counts; it reserves nothing. Between looking at the balance and using credits
other jobs may do the same, so a customer with jobs in parallel can go below zero by what runs at that moment: the
balance shows that exactly, too.

Run it against a server (`tallymark dev`): python examples/prepaid_credits.py [host:port]
"""

from __future__ import annotations

import os
import secrets
import sys
from decimal import Decimal

from tallymark import (
    AggType,
    AlertThreshold,
    AlreadyExistsError,
    Client,
    Event,
    MetricSchema,
    PeriodType,
    scale,
    unscale,
)

BOUGHT = MetricSchema(code="credits_bought", agg_type=AggType.SUM, period_type=PeriodType.LIFETIME)
USED = MetricSchema(
    code="credits_used",
    agg_type=AggType.SUM,
    period_type=PeriodType.LIFETIME,
    # Recorded at every further hundred: the moment to remind a customer of topping up.
    thresholds=[AlertThreshold(code="every_hundred", value=scale(100), recurring=True)],
)


class NotEnoughCreditsError(Exception):
    """The customer has to buy more first."""


class Credits:
    """One customer's credits."""

    def __init__(self, client: Client, customer: int) -> None:
        self._client = client
        self._customer = customer

    def balance(self) -> Decimal:
        """What is left."""
        bought = self._client.query_realtime(self._customer, BOUGHT.code).value.sum
        used = self._client.query_realtime(self._customer, USED.code).value.sum
        return unscale(bought - used)

    def buy(self, amount: Decimal, payment_id: str) -> None:
        """Add credits, once per payment however often the payment provider calls."""
        self._record(BOUGHT.code, amount, payment_id)

    def use(self, amount: Decimal, job_id: str) -> Decimal:
        """Use credits for a job, once per job id; return what is left.

        Raises:
            NotEnoughCreditsError: fewer are left.
        """
        if self.balance() < amount:
            raise NotEnoughCreditsError(f"job {job_id} needs {amount}, {self.balance()} are left")
        self._record(USED.code, amount, job_id)
        return self.balance()

    def _record(self, code: str, amount: Decimal, event_id: str) -> None:
        # `scale` refuses what six decimals can't hold, so nothing is rounded on the way.
        event = Event(account_id=self._customer, metric_code=code, value=scale(amount), id=event_id)
        receipt = self._client.ingest(event)
        if not receipt.ok:
            raise RuntimeError(f"{event_id} was not recorded: {receipt.rejected or receipt.conflicts}")


def main(address: str) -> dict[str, Decimal | int]:
    """Run the example against the server at `address`; return the numbers that it prints."""
    with Client([address]) as client:
        for schema in (BOUGHT, USED):
            try:
                client.metrics.create(schema)
            except AlreadyExistsError as error:
                if not error.identical:
                    raise
        # A new customer, so that another run starts from nothing, too: ids of events are per account.
        customer = secrets.randbits(63)
        account = Credits(client, customer)
        account.buy(Decimal(250), "payment-1")
        account.buy(Decimal(250), "payment-1")  # the provider's webhook came twice
        print(f"bought:          {account.balance()}")

        left = account.use(Decimal("99.999999"), "job-1")
        print(f"after job-1:     {left}")
        left = account.use(Decimal("120.5"), "job-2")
        print(f"after job-2:     {left}")
        refused = 0
        try:
            account.use(Decimal(40), "job-3")
        except NotEnoughCreditsError as error:
            refused = 1
            print(f"refused:         {error}")
        account.buy(Decimal(100), "payment-2")
        left = account.use(Decimal(40), "job-3")
        print(f"after topping up: {left}")
        reminders = client.list_alerts(customer, metric_code=USED.code)
        for alert in reminders:
            passed = unscale(alert.threshold_value * alert.last_multiple)
            print(f"reminder:        passed {passed} used credits, at {unscale(alert.value_at_cross)}")
    return {"left": left, "refused": refused, "reminders": len(reminders)}


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else os.environ.get("TALLYMARK_SERVER", "localhost:7001"))
