"""Exact with no room for cells in memory: the histories of `test_exact_history`, with everything spilling all the time.

Invariant FOLD-1 across spills, from the outside.
"""

import random

import pytest
import test_exact_history as history

from tallymark_store import spilling


class SpillingScene(history.Scene):
    """A server that has no memory for cells, nor for ids, and takes checkpoints all the time."""

    def __init__(self, folder, seed, partition_count, *, archive="off", spills=True):
        super().__init__(folder, seed, partition_count, archive=archive, spills=spills)


@pytest.fixture(autouse=True)
def spilling_all_the_time(monkeypatch):
    """Look for what can be spilled as often as the loop has time, and count what is."""
    spilled = []
    monkeypatch.setattr(spilling, "POLL_S", 0.002)
    monkeypatch.setattr(history, "Scene", SpillingScene)
    relieve = spilling.Spilling.relieve

    async def counted(self):
        before = self.spilled_units
        await relieve(self)
        spilled.append(self.spilled_units - before)

    monkeypatch.setattr(spilling.Spilling, "relieve", counted)
    yield
    assert sum(spilled) > 100
    assert sum(units > 0 for units in spilled) > 4


@pytest.mark.parametrize("archive", ["off", "on"])
async def test_history_is_counted_exactly_from_files(tmp_path, archive):
    """Every answer over the real history equals the oracle's, shuffled, with repeats, cuts and restarts."""
    rng = random.Random("spilled")
    facts = history.history_facts()
    numbers = list(range(0, len(facts), 2))
    rng.shuffle(numbers)
    scene = SpillingScene(tmp_path, seed=4, partition_count=2, archive=archive)
    meter, n_compared, log_starts = await history.run(
        scene,
        history.HISTORY_METRICS,
        facts,
        numbers,
        "large",
        rng,
        questions=40,
        numeric=frozenset({"files_touched"}),
    )
    assert meter.n_duplicates >= len(numbers) // 5
    assert n_compared > 400
    assert (min(log_starts) > 0) == (archive == "on")


@pytest.mark.parametrize("archive", ["off", "on"])
async def test_zones_and_periods_are_counted_exactly_from_files(tmp_path, archive):
    """Every period type and zone, with extreme values on the bounds."""
    await history.test_zones_and_periods_are_counted_exactly(tmp_path, archive)


@pytest.mark.parametrize("archive", ["off", "on"])
async def test_very_many_combinations_are_counted_exactly_from_files(tmp_path, archive):
    """A day of more combinations than cells are kept for goes to a file and comes back whole."""
    await history.test_days_of_very_many_combinations_are_counted_exactly(tmp_path, archive)
