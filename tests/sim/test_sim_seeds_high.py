"""The simulator's fixed seeds, second half: whatever goes wrong, every invariant holds, and the cluster recovers."""

from __future__ import annotations

import pytest

from .seeds import STEP, check


@pytest.mark.parametrize("start", range(500, 1_000, STEP))
def test_sim_seeds_high(start: int) -> None:
    """No seed finds a lost, doubled or miscounted event, nor a cluster that doesn't come back."""
    check(start)
