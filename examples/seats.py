"""Meter seats: who has one now, and how many different people used one in a month.

`seats` is a set that lasts: a join adds to it, a leave removes. Its period is LIFETIME, so the running total is how
many people have a seat now. `members_active` is a set per month: whoever was active at least once counts once.
Both are exact, and the order in which joins and leaves arrive doesn't matter: the time at which they happened does.

Run it against a server (`tallymark dev`): python examples/seats.py [host:port]
"""

from __future__ import annotations

import datetime as dt
import os
import sys

from tallymark import (
    AggType,
    AlreadyExistsError,
    Client,
    Event,
    MetricSchema,
    OperationType,
    Period,
    PeriodType,
    UniqueType,
)

SEATS = MetricSchema(
    code="seats",
    agg_type=AggType.COUNT_UNIQUE,
    unique_type=UniqueType.STRING,
    period_type=PeriodType.LIFETIME,
)
ACTIVE = MetricSchema(
    code="members_active",
    agg_type=AggType.COUNT_UNIQUE,
    unique_type=UniqueType.STRING,
    period_type=PeriodType.CALENDAR,
)
TEAM = 1001


def at(month: int, day: int, hour: int = 9) -> dt.datetime:
    """A time in 2025."""
    return dt.datetime(2025, month, day, hour, tzinfo=dt.UTC)


def join(member: str, when: dt.datetime) -> Event:
    """A member gets a seat."""
    return Event(TEAM, SEATS.code, member, when, operation_type=OperationType.ADD, id=f"join/{member}/{when}")


def leave(member: str, when: dt.datetime) -> Event:
    """A member gives it back."""
    return Event(
        TEAM, SEATS.code, member, when, operation_type=OperationType.REMOVE, id=f"leave/{member}/{when}"
    )


def active(member: str, when: dt.datetime) -> Event:
    """A member did something; one a day is enough."""
    return Event(TEAM, ACTIVE.code, member, when, id=f"{member}/{when:%Y-%m-%d}")


def main(address: str) -> dict[str, int | None]:
    """Run the example against the server at `address`; return the numbers that it prints."""
    with Client([address]) as client:
        for schema in (SEATS, ACTIVE):
            try:
                client.metrics.create(schema)
            except AlreadyExistsError as error:
                if not error.identical:
                    raise

        client.ingest(
            [
                join("ada", at(1, 7)),
                join("grace", at(1, 7)),
                leave("linus", at(2, 3)),  # arrives before the join that it undoes
                join("linus", at(1, 20)),
                leave("grace", at(1, 31)),
                join("grace", at(2, 10)),  # and comes back
                join("alan", at(2, 11)),
            ]
        )
        client.ingest([active("ada", at(2, day)) for day in range(1, 29)])
        client.ingest(
            [active("alan", at(2, 11)), active("alan", at(2, 11, 17)), active("grace", at(3, 1, 0))]
        )

        now = client.query_realtime(TEAM, SEATS.code).value.unique
        # As of any day: what the joins and leaves up to then come to.
        mid_february = client.query(TEAM, SEATS.code, ("1970-01-01T00:00:00Z", at(2, 5))).value.unique
        february = Period.between("2025-02-01T00:00:00Z", "2025-03-01T00:00:00Z")
        members = client.query(TEAM, ACTIVE.code, february).value.unique
    print(f"seats taken now:              {now}")
    print(f"seats taken on 5 February:    {mid_february}")
    print(f"members active in February:   {members}")
    return {"now": now, "mid_february": mid_february, "february_active": members}


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else os.environ.get("TALLYMARK_SERVER", "localhost:7001"))
