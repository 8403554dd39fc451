"""The seeds that every test run goes through, in steps small enough to be shared among workers."""

from __future__ import annotations

import logging

from .simulation import Failure, Options, run_seeds

STEP = 20


def check(start: int, options: Options | None = None, *, count: int = STEP) -> None:
    """Run `count` seeds from `start` on; a failure comes with its trace and how to repeat it."""
    logging.disable(logging.CRITICAL)  # of processes that are meant to fail
    try:
        run_seeds(range(start, start + count), options)
    except Failure as failure:
        trace = "\n".join(failure.trace.splitlines()[-300:])
        message = f"{trace}\n\n{failure.where}\n{failure}\nagain: make sim START={failure.seed} SEEDS=1"
        raise AssertionError(message) from None
    finally:
        logging.disable(logging.NOTSET)
