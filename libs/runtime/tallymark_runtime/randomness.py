"""The randomness port: a seeded `random.Random`, made here and handed to whoever needs one.

Secrets come from `secret_bytes`, straight from the operating system.

Tests and simulations make their own `random.Random(seed)`; real processes take theirs from `new_random`.
"""

from __future__ import annotations

import os
import random


def new_random() -> random.Random:
    """A generator seeded by the operating system: for jitter and ids, not for secrets."""
    return random.Random(int.from_bytes(os.urandom(32), "little"))  # noqa: S311 - no secrets come from it


def secret_bytes(count: int) -> bytes:
    """Bytes that nobody can guess: for secrets."""
    return os.urandom(count)
