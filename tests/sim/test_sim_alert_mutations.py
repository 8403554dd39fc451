"""The simulator can see ALERT-1 broken: each deliberate defect is noticed within a bounded number of seeds."""

from __future__ import annotations

import logging

import pytest

from .alert_mutations import ALL
from .mutations import Mutation
from .simulation import Failure, run_seed

FIRST = 9_500
SEEDS_MAX = 30


@pytest.fixture(autouse=True)
def _quiet():
    """Broken engines have much to say."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def _caught(mutation: Mutation) -> int | None:
    """The first seed that sees a crossing with another number of records than one, or one that was not handed out."""
    for seed in range(FIRST, FIRST + SEEDS_MAX):
        try:
            run_seed(seed, mutation.options)
        except Failure as failure:
            if "ALERT-1" in str(failure):
                return seed
    return None


@pytest.mark.parametrize("mutation", ALL, ids=lambda mutation: mutation.name)
def test_sim_alert_mutation_is_caught(mutation: Mutation) -> None:
    """With the defect some seed fails with ALERT-1; without it the same seed passes."""
    with mutation.applied():
        caught = _caught(mutation)
    assert caught is not None, f"{SEEDS_MAX} seeds did not notice: {mutation.what}"
    run_seed(caught, mutation.options)
