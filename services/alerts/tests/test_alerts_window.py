"""The window of a partition's newest records, against a plain list."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tallymark_alerts.matching import Filter
from tallymark_alerts.window import Window
from tallymark_protocol.messages import AlertRecord

from .alerts_fakes import record

ACCOUNTS = st.integers(0, 5)
METRICS = st.sampled_from(["a", "b", "c"])
FILTERS = st.builds(
    lambda accounts, metrics: Filter(accounts, metrics, 4), st.sets(ACCOUNTS), st.sets(METRICS)
)


def window_of(count: int, *, start: int = 0, records_max: int = 100) -> Window:
    """A window of records of account 1."""
    window = Window(0, start, records_max)
    window.append([record(0, position) for position in range(start, start + count)])
    return window


@given(
    st.integers(0, 10),
    st.integers(1, 20),
    st.lists(st.lists(st.tuples(ACCOUNTS, METRICS), max_size=12), max_size=8),
    st.lists(st.tuples(FILTERS, st.integers(0, 60), st.integers(1, 8)), min_size=1, max_size=8),
)
def test_it_finds_what_a_look_at_all_does(
    start: int,
    records_max: int,
    batches: list[list[tuple[int, str]]],
    questions: list[tuple[Filter, int, int]],
) -> None:
    """Any filter, position and limit; after any appends, with the oldest gone."""
    window = Window(0, start, records_max)
    everything: list[AlertRecord] = []
    for batch in batches:
        position = start + len(everything)
        records = [record(0, position + k, account, metric) for k, (account, metric) in enumerate(batch)]
        window.append(records)
        everything += records
        assert window.end == start + len(everything)
        assert len(window) == window.end - window.start <= records_max
        assert window.end - window.start >= min(len(everything), records_max - max(records_max // 8, 1) + 1)
    for wanted, ahead, limit in questions:
        position = min(window.start + ahead, window.end)
        found, after = window.find(wanted, position, limit)
        matching = [one for one in everything[position - start :] if wanted.matches(one)]
        assert found == matching[:limit]
        if not wanted.is_all:
            # Past what doesn't match, and before the first match that there was no room for.
            assert after == (found[-1].position + 1 if len(found) == limit else window.end)
        else:
            assert after == position + len(found)


@given(st.integers(0, 30), st.integers(0, 12))
def test_only_what_goes_on_is_missing(first: int, count: int) -> None:
    """Records that are there already are passed over; a gap is none of ours."""
    window = window_of(10, start=5)
    records = [record(0, position) for position in range(first, first + count)]
    missing = window.missing(records)
    if records and first > 15:
        assert missing is None
    else:
        assert list(missing or []) == [one for one in records if one.position >= 15]


@pytest.mark.parametrize(
    "records",
    [
        [record(0, 15), record(0, 17)],
        [record(0, 15), record(0, 15)],
        [record(0, 16), record(0, 15)],
        [record(1, 15)],
        [record(0, 14), record(1, 15)],
    ],
    ids=["gap", "twice", "backwards", "another partition's", "mixed"],
)
def test_what_is_no_sequence_is_not_taken(records: list[AlertRecord]) -> None:
    """A store's mistake must not become ours."""
    assert window_of(10, start=5).missing(records) is None


def test_records_are_found_by_position() -> None:
    """Those that are there."""
    window = window_of(30, start=5, records_max=16)
    assert [window.record(position).position for position in range(window.start, 35)] == list(
        range(window.start, 35)
    )


def test_what_is_let_go_leaves_no_index_behind() -> None:
    """Memory is bounded by the records kept, however many accounts there were."""
    window = Window(0, 0, 16)
    for position in range(1_000):
        window.append([record(0, position, position, f"m{position}")])
    assert len(window) <= 16
    assert set(window._by_account) == {window.record(p).account_id for p in range(window.start, window.end)}
    assert len(window._by_metric) == len(window)
