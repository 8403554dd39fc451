"""Meter infrastructure: machine time by provider and region, with decimals, late reports and repeated ones.

An agent reports every machine's running time once an hour. Reports come late and sometimes twice; the event id
says which machine and hour one is about, so a repeat counts once.

Run it against a server (`tallymark dev`): python examples/infrastructure.py [host:port]
"""

from __future__ import annotations

import datetime as dt
import os
import sys
from decimal import Decimal

from tallymark import (
    OTHER,
    AggType,
    AlreadyExistsError,
    Client,
    DimensionFilter,
    Event,
    MetricSchema,
    Period,
    PeriodType,
    scale,
    unscale,
)

COMPUTE = MetricSchema(
    code="compute_hours",
    agg_type=AggType.SUM,
    period_type=PeriodType.CALENDAR,
    time_zone="Europe/Berlin",
    filters=[
        DimensionFilter(key="provider", values=["aws", "gcp"]),  # others are counted in one row
        DimensionFilter(key="region"),  # any value
    ],
)

CUSTOMER = 42
START = dt.datetime(2025, 3, 1, tzinfo=dt.UTC)
FLEET = [  # machine, provider, region, hours that it runs a day
    ("web-1", "aws", "eu-central-1", Decimal(24)),
    ("web-2", "aws", "us-east-1", Decimal(24)),
    ("batch-1", "gcp", "europe-west3", Decimal("2.5")),
    ("lab-1", "hetzner", "fsn1", Decimal("0.75")),
]


def reports(days: int) -> list[Event]:
    """What the agent sends: a report for every machine and hour that it ran in."""
    events = []
    for day in range(days):
        for machine, provider, region, hours in FLEET:
            left = hours
            for hour in range(24):
                ran = min(left, Decimal(1))
                if not ran:
                    break
                left -= ran
                at = START + dt.timedelta(days=day, hours=hour)
                events.append(
                    Event(
                        account_id=CUSTOMER,
                        metric_code=COMPUTE.code,
                        value=scale(ran),  # whole numbers with six decimals: sums are exact
                        timestamp=at,
                        properties={"provider": provider, "region": region, "machine": machine},
                        id=f"{machine}/{at:%Y-%m-%dT%H}",
                    )
                )
    return events


def main(address: str) -> dict[str, Decimal]:
    """Run the example against the server at `address`; return March's hours by provider."""
    with Client([address]) as client:
        try:
            client.metrics.create(COMPUTE)
        except AlreadyExistsError as error:
            if not error.identical:
                raise

        first = client.ingest(reports(days=20))
        print(f"days 1-20:          {first.n_stored} stored, {first.n_duplicates} known")
        # The agent lost its place and starts over: what was counted is not counted again.
        again = client.ingest(reports(days=31))
        print(f"days 1-31, resent:  {again.n_stored} stored, {again.n_duplicates} known")

        # March as the customer's invoice has it, in the metric's zone; any other range is as exact.
        march = Period.between("2025-03-01T00:00:00+01:00", "2025-04-01T00:00:00+02:00")
        total = client.query(CUSTOMER, COMPUTE.code, march)
        print(f"March: {unscale(total.value.sum)} hours")
        by_provider = {}
        for row in client.breakdown(CUSTOMER, COMPUTE.code, march, group_by="provider"):
            name = "other" if row.group["provider"] is OTHER else str(row.group["provider"])
            by_provider[name] = unscale(row.value.sum)
            print(f"  {name:<6} {by_provider[name]:>10}")
        aws = {"provider": "aws"}
        for row in client.breakdown(CUSTOMER, COMPUTE.code, march, group_by="region", filters=aws):
            print(f"  aws in {row.group['region']}: {unscale(row.value.sum)}")
        days = client.series(CUSTOMER, COMPUTE.code, march, unit="day", filters=aws)
        busiest, totals = max(days, key=lambda day: day[1].sum)
        print(f"  aws, busiest day: {busiest.start:%Y-%m-%d %H:%M} UTC on, {unscale(totals.sum)} hours")
    return by_provider


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else os.environ.get("TALLYMARK_SERVER", "localhost:7001"))
