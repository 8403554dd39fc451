"""Reads during the run and after it: READ-1.

Every event's value is its own, so a total says a lot: it includes what was acknowledged before the read began, and
nothing that was never sent. At one leader, totals never go back. At the end every total is what the model counts.
"""

from __future__ import annotations

import random
from typing import Any

from tallymark_protocol.errors import NotFoundError, TallymarkError, UnavailableError
from tallymark_protocol.messages import RealtimeResult, StoreRealtime

from .clients import ACCOUNTS, METRIC_COUNT
from .loop import MILLISECOND, SimulationError
from .process import Process


def _sum(result: RealtimeResult) -> tuple[int, int]:
    return result.stats.count, int.from_bytes(result.stats.sum, "little", signed=True)


class Readers:
    """Asks for totals. `simulation` is what they are of."""

    def __init__(self, simulation: Any, rng: random.Random) -> None:
        self._s = simulation
        self._rng = rng
        self._waiting = 0
        self._seen: dict[
            tuple[str, int, int, int, str], int
        ] = {}  # by process life and what it is of: the count
        self.answered = 0

    def plan(self, end_ns: int, count: int) -> None:
        """Draw when to read."""
        for _ in range(count):
            self._s.world.at(self._rng.randint(end_ns // 10, end_ns), self._read)

    def is_done(self) -> bool:
        """Whether every read has its answer."""
        return self._waiting == 0

    def _read(self) -> None:
        """Ask any store that may think that it leads."""
        rng = self._rng
        number = rng.randrange(self._s.partition_count)
        process: Process = rng.choice(list(self._s.processes.values()))
        holder = self._s.processes.get(self._s._believed(number))
        if holder is not None and rng.random() < 0.7:
            process = holder
        account, metric = self._key(number)
        # What the answer must include: everything of this key that is known to be acknowledged now.
        least = self._acknowledged(number, account, metric)
        life = (process.name, process.life, number, account, metric)
        before = self._seen.get(life, 0)  # what was answered before this is asked

        def answer(result: Any, error: BaseException | None) -> None:
            if error is not None:
                if isinstance(error, NotFoundError):
                    result = None
                elif isinstance(error, TallymarkError):
                    return
            count = 0 if result is None else _sum(result)[0]
            self.answered += 1
            if result is not None and life[1] == process.life and count < before:
                raise_later(
                    SimulationError(f"READ-1: {process} went back from {before} to {count} for {life}")
                )
            self._seen[life] = max(count, self._seen.get(life, 0))
            if count < least:
                raise_later(
                    SimulationError(
                        f"READ-1: {process} counts {count} events of account {account} and {metric} in partition "
                        f"{number}, {least} were acknowledged before it was asked"
                    )
                )

        def raise_later(error: SimulationError) -> None:
            self._s.defect = self._s.defect or error

        if process.is_up:
            process.call(StoreRealtime(number, metric, account), answer)

    def _key(self, number: int) -> tuple[int, str]:
        for part in reversed(self._s.clients.acknowledged[-10:]):
            if part.partition == number and self._rng.random() < 0.5:
                event = self._rng.choice(part.events)
                return event.account, event.metric  # what a store that is behind lacks most likely
        keys = list(self._s.checkers.models[number].totals)
        if keys and self._rng.random() < 0.9:
            return self._rng.choice(keys)
        return self._rng.randrange(ACCOUNTS), f"m{self._rng.randrange(METRIC_COUNT)}"

    def _acknowledged(self, number: int, account: int, metric: str) -> int:
        count = 0
        for part in self._s.ledger.parts.values():
            if part.partition == number and part.outcome is not None and not part.is_async:
                others = {index for index, _, _ in part.outcome[1]}
                for i, event in enumerate(part.events):
                    count += (event.account, event.metric) == (account, metric) and i not in others
        return count

    def check_totals(self) -> None:
        """Ask every leader for every total, and compare."""
        for number in range(self._s.partition_count):
            process = next(iter(self._s.processes.values()))
            for (account, metric), total in sorted(self._s.checkers.models[number].totals.items()):
                self._check(process, number, account, metric, total)

    def _check(
        self, process: Process, number: int, account: int, metric: str, total: tuple[int, int]
    ) -> None:
        self._waiting += 1

        def answer(result: Any, error: BaseException | None) -> None:
            if isinstance(error, UnavailableError) and error.retriable:
                self._s.world.after(50 * MILLISECOND, again)
                return
            self._waiting -= 1
            found = error if error is not None else _sum(result)
            if found != total:
                self._s.defect = self._s.defect or SimulationError(
                    f"FOLD-1: {process} says {found} of account {account} and {metric} in partition {number}, the log "
                    f"counts to {total}"
                )

        def again() -> None:
            holder = self._s.processes.get(self._s._holders[number], process)
            holder.call(StoreRealtime(number, metric, account), answer)

        again()
