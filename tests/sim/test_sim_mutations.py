"""The simulator can see: each deliberate defect is noticed within a bounded number of seeds."""

from __future__ import annotations

import logging

import pytest

from .mutations import Mutation, all_mutations
from .simulation import Failure, run_seed

FIRST = 9_000
SEEDS_MAX = 60


@pytest.fixture(autouse=True)
def _quiet():
    """Broken engines have much to say."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def _caught(mutation: Mutation) -> tuple[int, str] | None:
    """The first seed that notices the defect, and what it says."""
    for seed in range(FIRST, FIRST + SEEDS_MAX):
        try:
            run_seed(seed, mutation.options)
        except Failure as failure:
            return seed, str(failure)
    return None


def test_sim_mutations_are_many() -> None:
    """There are enough of them, each with a rule that it breaks."""
    assert len(all_mutations()) >= 12
    assert all(mutation.what for mutation in all_mutations())


@pytest.mark.parametrize("mutation", all_mutations(), ids=lambda mutation: mutation.name)
def test_sim_mutation_is_caught(mutation: Mutation) -> None:
    """With the defect some seed fails; without it the same seed passes: it was the defect that was seen."""
    with mutation.applied():
        caught = _caught(mutation)
    assert caught is not None, f"{SEEDS_MAX} seeds did not notice: {mutation.what}"
    run_seed(caught[0], mutation.options)
