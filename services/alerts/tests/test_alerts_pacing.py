"""The pace of answers: never more than the rate allows, and never a wait below it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tallymark_alerts.pacing import Pacer


@given(st.lists(st.floats(0, 0.5), max_size=200), st.integers(1, 100), st.integers(1, 20))
def test_the_rate_is_kept(steps: list[float], rate: int, burst: int) -> None:
    """In any span at most the burst and what the rate gives; what is refused may go when it says so."""
    now = 1_000.0
    pacer = Pacer(rate, burst, now)
    gone: list[float] = []
    for step in steps:
        now += step
        if pacer.take(now):
            gone.append(now)
        else:
            wait_s = pacer.wait_s()
            assert 0 < wait_s <= 1 / rate
            now += wait_s * 1.001
            assert pacer.take(now)
            gone.append(now)
    for k, first in enumerate(gone):
        assert len(gone) - k <= burst + (gone[-1] - first) * rate + 1e-6


@given(st.integers(1, 50))
def test_below_the_rate_nothing_waits(rate: int) -> None:
    """Neither after a long silence nor at a steady pace."""
    pacer = Pacer(rate, 1, 0.0)
    assert all(pacer.take(k / rate * 1.001) for k in range(300))


def test_a_clock_that_goes_back_gives_nothing() -> None:
    """The loop's doesn't, but nothing rests on that."""
    pacer = Pacer(10, 2, 5.0)
    assert [pacer.take(now) for now in (5.0, 5.0, 4.0)] == [True, True, False]
