"""The buffer of a subscription: nothing lost, nothing out of order, and a cursor that covers what is done with."""

import random

from fake_alerts import AlertLog
from hypothesis import given
from hypothesis import strategies as st

from tallymark._feed import Feed
from tallymark_protocol import messages as m


def fetch(log, feed, wanted, accounts=()):
    """Ask the log what a reader would ask an instance."""
    return log.batch(m.AlertsFetch(list(accounts), [], feed.reading, wanted, 0))


def read(log, feed, accounts=()):
    """Ask once, and take the answer."""
    wanted = feed.wanted()
    if wanted:
        feed.add(fetch(log, feed, wanted, accounts), wanted)
    return wanted


def test_an_alert_is_covered_once_the_next_is_asked_for():
    """Not when it is handed out."""
    log = AlertLog(2)
    log.add(1, 2, 3)
    feed = Feed(64, {})
    read(log, feed)
    assert feed.covered == {}
    assert feed.take().account_id == 1
    assert feed.covered == {}
    assert feed.take().account_id == 2
    assert feed.covered == {0: 1}
    assert feed.take().account_id == 3
    assert feed.covered == {0: 2}
    assert feed.take() is None
    assert feed.covered == {0: 3, 1: 0}


def test_the_cursor_passes_what_does_not_match():
    """Before, between and behind the matches; but not behind one that is being handled."""
    log = AlertLog(2)
    log.add(9, 9, 1, 9)
    log.add(9, 9, partition=1)
    feed = Feed(64, {})
    read(log, feed, [1])
    assert feed.take().account_id == 1
    assert feed.covered == {}
    assert feed.take() is None
    assert feed.covered == {0: 4, 1: 2}
    log.add(9, 9)
    read(log, feed, [1])
    assert feed.covered == {0: 6, 1: 2}


def test_what_does_not_fit_is_read_again():
    """The buffer never holds more than its size; then only what fits is asked for, from half of it on."""
    log = AlertLog(1)
    log.add(*range(20))
    feed = Feed(4, {})
    assert [read(log, feed), read(log, feed), feed.wanted()] == [4, 4, 0]
    assert feed.dropped == 4
    taken = []
    asked = []
    while (alert := feed.take()) is not None:
        taken.append(alert.account_id)
        asked.append(read(log, feed))
    assert taken == list(range(20))
    assert feed.dropped == 4
    assert max(asked) <= 4
    assert 1 not in asked
    log.add(20)
    assert read(log, feed) == 4  # caught up
    assert feed.take().account_id == 20


def test_a_partition_that_is_cut_stays_behind_its_first_alert_let_go():
    """The others go on to where the answer came."""
    log = AlertLog(3)
    log.add(1, 2)
    log.add(3, 9, 4, 5, partition=1)
    feed = Feed(3, {})
    wanted = feed.wanted()
    batch = log.batch(m.AlertsFetch([1, 2, 3, 4, 5], [], {}, 64, 0))
    feed.add(batch, wanted)
    assert feed.reading == {0: 2, 1: 2, 2: 0}
    assert feed.dropped == 2
    assert [feed.take().account_id for _ in range(3)] == [1, 2, 3]
    assert feed.take() is None
    assert feed.covered == {0: 2, 1: 2, 2: 0}


def test_repeats_and_positions_that_go_back_are_ignored():
    """An instance must not answer so; if one does, nothing is handed out twice."""
    log = AlertLog(1)
    log.add(1, 2)
    feed = Feed(64, {})
    batch = fetch(log, feed, 64)
    feed.add(batch, 64)
    feed.add(batch, 64)
    feed.add(m.AlertsBatch([], {0: 1}), 64)
    assert feed.reading == {0: 2}
    assert [feed.take().account_id, feed.take().account_id, feed.take()] == [1, 2, None]


def test_answers_without_matches_leave_one_mark():
    """However many came while the consumer was busy: the feed stays bounded."""
    feed = Feed(2, {})
    for position in range(1, 1_000):
        feed.add(m.AlertsBatch([], {0: position}), 2)
    assert len(feed._items) == 1
    assert feed.covered == {0: 999}


def test_pinned_later():
    """A feed without a start begins where it is pinned."""
    feed = Feed(2, None)
    assert not feed.is_pinned
    feed.pin({0: 7})
    assert feed.reading == feed.covered == {0: 7}


@given(st.randoms(use_true_random=False), st.integers(1, 9), st.booleans())
def test_every_alert_once_in_order_and_again_after_a_crash(rng: random.Random, size, is_filtered):
    """Any interleaving of raising, reading, taking and crashing: in order, at least once, once between crashes."""
    log = AlertLog(3)
    accounts = [1, 2] if is_filtered else []
    since = {}
    feed = Feed(size, since)
    seen = []  # (partition, position) of what was done with, crashes included
    life = []  # of this life
    held = None  # handed out, being handled
    for step in range(200 + 40 * size):
        kind = rng.randrange(12)
        if kind < 3 and step < 200:
            log.add(*rng.choices([1, 2, 3], k=rng.randrange(6)), partition=rng.randrange(3))
        elif kind < 6:
            read(log, feed, accounts)
        elif kind < 11 or step >= 200:
            if held is not None:
                seen.append((held.partition, held.position))
            held = feed.take()
            if held is not None:
                life.append((held.partition, held.position))
        else:
            covered = feed.covered
            assert held is None or covered.get(held.partition, 0) <= held.position
            assert len(set(life)) == len(life)
            feed, held, life = Feed(size, covered), None, []
        assert feed._held <= size
        assert len(feed._items) <= 2 * size + 1
    while True:
        if held is not None:
            seen.append((held.partition, held.position))
        held = feed.take()
        if held is not None:
            life.append((held.partition, held.position))
        elif not read(log, feed, accounts) or feed.reading == log.ends():
            if (held := feed.take()) is None:
                break
            life.append((held.partition, held.position))
    assert len(set(life)) == len(life)
    for partition, records in enumerate(log.partitions):
        expected = [r.position for r in records if not accounts or r.account_id in accounts]
        assert sorted({position for p, position in seen if p == partition}) == expected
        in_life = [position for p, position in life if p == partition]
        assert in_life == sorted(in_life)
    assert feed.covered == log.ends()
