"""Figures add up, whoever measured them, and percentiles are what they say."""

import msgspec
import pytest
from load_figures import Figures, Kind, bucket_of, seconds_of, summary, table


def test_buckets_are_within_two_percent() -> None:
    """A latency is at most its bucket's bound, and less than 2 % below it."""
    for seconds in (1e-6, 3.3e-6, 1e-3, 0.0123, 1.0, 59.9, 7200.0):
        bound = seconds_of(bucket_of(seconds))
        assert seconds <= bound * (1 + 1e-9)
        assert bound <= seconds * 1.0201
    assert bucket_of(0.0) == bucket_of(-1.0) == 0


def test_percentiles() -> None:
    """The share of calls that a percentile names is within it, and the longest call bounds all."""
    figures = Figures()
    for milliseconds in range(1, 101):
        figures.answered("call", milliseconds / 1000, 0)
    kind = figures.kinds["call"]
    assert kind.percentile(0.50) == pytest.approx(0.050, rel=0.02)
    assert kind.percentile(0.99) == pytest.approx(0.099, rel=0.02)
    assert kind.percentile(1.0) == kind.longest == 0.1
    assert Kind().percentile(0.5) == 0


def test_figures_of_two_processes_add_up() -> None:
    """What is taken, written as JSON, read and added is what one process would have measured."""
    alone, first, second, total = Figures(), Figures(), Figures(), Figures()
    for i in range(200):
        for figures in (alone, (first, second)[i % 2]):
            figures.answered("ingest", i / 1000, 3)
            if i % 7 == 0:
                figures.failed("ingest", "UnavailableError TIMEOUT" if i % 2 else "Broken")
            if i % 11 == 0:
                figures.failed("query", "UnavailableError TIMEOUT")
        if i % 50 == 49:
            for figures in (first, second):
                line = msgspec.json.encode(figures.take())
                total.add(msgspec.json.decode(line, type=Figures))
    assert first.kinds == {}
    assert summary(total, 2.0)["kinds"] == summary(alone, 2.0)["kinds"]
    assert summary(total, 2.0)["errors"] == {"UnavailableError TIMEOUT": 33, "Broken": 15}
    assert total.kinds["ingest"].events == 600


def test_the_report_names_everything() -> None:
    """The table has a row for each kind and a line for each kind of error; a kind that only failed is there, too."""
    figures = Figures()
    figures.answered("ingest", 0.5, 1000)
    figures.failed("query", "UnavailableError TIMEOUT")
    text = table(figures, 2.0)
    assert [line.split()[0] for line in text.splitlines()] == ["what", "ingest", "query", "1"]
    assert "500" in text.splitlines()[1]
    assert text.endswith("1 x UnavailableError TIMEOUT")
    document = summary(figures, 2.0)
    assert (document["calls"], document["failed"]) == (1, 1)
    assert document["kinds"]["ingest"]["events_per_second"] == 500
