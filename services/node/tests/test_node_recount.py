"""`tallymark recount`: a total beside the count of its events."""

import json

import pytest

from tallymark import AggType, Client, Event, MetricSchema, OperationType, UniqueType
from tallymark_node.cli import recount as module

DAY = 86_400 * 10**9


@pytest.fixture(scope="module", autouse=True)
def events(server):
    """Events of every aggregation, with repeats, removals, late and negative ones."""
    with Client([server]) as client:
        for agg in AggType:
            unique = {"unique_type": UniqueType.STRING} if agg is AggType.COUNT_UNIQUE else {}
            client.metrics.create(MetricSchema(code=agg.name.lower(), agg_type=agg, **unique))
        batch = []
        for agg in AggType:
            for i in range(60):
                is_unique = agg is AggType.COUNT_UNIQUE
                batch.append(
                    Event(
                        account_id=7,
                        metric_code=agg.name.lower(),
                        value=f"user-{i % 9}" if is_unique else (i % 13 - 6) * 10**15,
                        timestamp=1_750_000_000 * 10**9 - (i * 7 % 60) * DAY // 4,
                        id=f"{i % 50}" if agg is AggType.SUM else None,
                        operation_type=OperationType.REMOVE
                        if is_unique and i % 5 == 0
                        else OperationType.NONE,
                    )
                )
        client.ingest(batch)


@pytest.mark.parametrize("agg", list(AggType))
@pytest.mark.parametrize(
    "choice", [["--period", "all"], ["--from", "2025-06-03", "--to", "2025-06-12T05:00"]]
)
def test_a_total_is_what_its_events_say(tally, agg, choice):
    """Whatever is counted, over all time and over a ragged range; and nothing is there for another account."""
    result = tally("recount", 7, agg.name.lower(), *choice, "--json", "--events")
    found = json.loads(result.stdout)
    assert found["differs"] == []
    assert found["running"] == found["recounted"]
    assert 0 < found["recounted"]["count"] == len(found["events"]) <= 60
    empty = json.loads(tally("recount", 8, agg.name.lower(), *choice, "--json").stdout)
    assert empty["recounted"]["count"] == 0
    shown = tally("recount", 7, agg.name.lower(), *choice).stdout
    assert "they are the same" in shown


def test_a_difference_is_said(tally, monkeypatch):
    """Exit status 1, and which of the numbers it is."""
    monkeypatch.setattr(module.Recount, "facts", lambda self: {"count": self.count, "sum": self.sum + 1})
    result = tally("recount", 7, "sum", "--period", "all", status=1)
    assert "they differ" in result.stdout
