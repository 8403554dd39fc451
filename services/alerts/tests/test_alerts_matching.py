"""Who wants which record, against a look at everybody."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tallymark_alerts.matching import Filter, Matching
from tallymark_protocol.errors import BackpressureError
from tallymark_protocol.identifiers import partition_of

from .alerts_fakes import record

ACCOUNTS = st.integers(0, 4)
METRICS = st.sampled_from(["a", "b", "c"])
FILTERS = st.tuples(st.frozensets(ACCOUNTS, max_size=3), st.frozensets(METRICS, max_size=2))


@given(
    st.lists(st.tuples(st.booleans(), FILTERS), max_size=40),
    st.lists(st.lists(st.tuples(ACCOUNTS, METRICS), min_size=1, max_size=4), min_size=1, max_size=5),
    st.integers(0, 1_000),
)
def test_everybody_who_wants_a_record_is_found(
    steps: list[tuple[bool, tuple[frozenset[int], frozenset[str]]]],
    batches: list[list[tuple[int, str]]],
    seed: int,
) -> None:
    """After any coming and going. Of several records of one account, some that match are enough."""
    rng = random.Random(seed)
    matching: Matching[int] = Matching(names_max=60)
    waiting: dict[int, Filter] = {}
    for waiter, (comes, (accounts, metrics)) in enumerate(steps):
        if comes or not waiting:
            wanted = Filter(accounts, metrics, 4)
            try:
                matching.add(wanted, waiter)
            except BackpressureError:
                named = {one.key: one.name_count for one in waiting.values()}
                assert sum(named.values()) + wanted.name_count > 60, "only where there is no room"
            else:
                waiting[waiter] = wanted
        else:
            gone = rng.choice(sorted(waiting))
            matching.remove(waiting.pop(gone), gone)
        assert len(matching) == len(waiting)
        assert sorted(matching.everybody()) == sorted(waiting)
        assert matching.name_count <= 60
    for batch in batches:
        records = [record(0, position, *what) for position, what in enumerate(batch)]
        found = set(matching.waiting(records))
        assert found == {
            waiter for waiter, wanted in waiting.items() if any(wanted.matches(one) for one in records)
        }


def test_a_filter_stays_for_those_who_come_back() -> None:
    """Coming and going costs nothing that grows with what a filter names."""
    matching: Matching[str] = Matching(names_max=10)
    wanted = Filter(range(8), (), 4)
    for _ in range(3):
        matching.add(wanted, "one")
        matching.remove(wanted, "one")
    assert matching.filter_count() == 1
    assert matching.name_count == 8
    # It goes when there is no room for others, the longest idle first.
    matching.add(Filter(range(20, 25), (), 4), "other")
    assert matching.filter_count() == 1
    assert not list(matching.waiting([record(0, 0, 3)]))
    assert list(matching.waiting([record(0, 0, 22)])) == ["other"]


def test_those_who_wait_are_never_forgotten() -> None:
    """Who comes when they name too much in all is refused."""
    matching: Matching[str] = Matching(names_max=10)
    matching.add(Filter(range(8), (), 4), "one")
    with pytest.raises(BackpressureError):
        matching.add(Filter(range(3), (), 4), "other")
    assert list(matching.waiting([record(0, 0, 2)])) == ["one"]


def test_equal_filters_are_one() -> None:
    """However they were written."""
    matching: Matching[str] = Matching()
    matching.add(Filter([2, 1, 1], ["a"], 4), "one")
    matching.add(Filter([1, 2], ["a"], 4), "other")
    assert matching.filter_count() == 1
    assert list(matching.waiting([record(0, 0, 1, "a")])) == ["one", "other"]
    assert not list(matching.waiting([record(0, 0, 1, "b")]))


def test_a_filter_knows_the_partitions_of_its_accounts() -> None:
    """Nothing of other partitions can match it; one that names none is of all."""
    accounts = [3, 4, 2**64 - 1]
    assert Filter(accounts, (), 12).partitions == tuple(
        sorted({partition_of(account, 12) for account in accounts})
    )
    assert Filter((), ["a"], 12).partitions == ()
