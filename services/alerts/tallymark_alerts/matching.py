"""Who wants which alert record: pure.

A **filter** names accounts and metric codes; none of a kind means all. Those who wait are kept by filter, filters by
what they name: a new record finds them by its account, by its metric, or among those that name neither, without a look
at the others. Subscribers come back with the same filter over and over, so a filter stays for a while after the last
one has left, and coming and going costs nothing that grows with what it names.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final, Generic, TypeVar

from tallymark_protocol.errors import BackpressureError
from tallymark_protocol.identifiers import partition_of
from tallymark_protocol.messages import AlertRecord

W = TypeVar("W")

NAMES_MAX: Final = 500_000  # accounts and codes of all filters that are kept; those without anybody go first


class Filter:
    """Accounts and metric codes; none of a kind: all.

    Attributes:
        partitions: which the accounts belong to, in order; empty where it names none: all there are.
        is_all: whether everything matches.
    """

    __slots__ = ("accounts", "is_all", "key", "metrics", "partitions")

    def __init__(self, accounts: Iterable[int], metrics: Iterable[str], partition_count: int) -> None:
        self.accounts = frozenset(accounts)
        self.metrics = frozenset(metrics)
        self.is_all = not self.accounts and not self.metrics
        self.key = self.accounts, self.metrics
        self.partitions = tuple(sorted({partition_of(account, partition_count) for account in self.accounts}))

    def matches(self, record: AlertRecord) -> bool:
        """Whether it wants a record."""
        return (not self.accounts or record.account_id in self.accounts) and (
            not self.metrics or record.metric_code in self.metrics
        )

    @property
    def name_count(self) -> int:
        """How many accounts and codes it names."""
        return len(self.accounts) + len(self.metrics)


class _Entry(Generic[W]):
    """A filter, and who waits with it."""

    __slots__ = ("filter", "waiters")

    def __init__(self, wanted: Filter) -> None:
        self.filter = wanted
        self.waiters: dict[W, None] = {}  # in the order in which they came


class Matching(Generic[W]):
    """Those who wait, by what they wait for. A waiter is any object that can be a key."""

    def __init__(self, names_max: int = NAMES_MAX) -> None:
        self.name_count = 0
        self._names_max = names_max
        self._entries: dict[Any, _Entry[W]] = {}  # by the filter's key
        self._idle: dict[Any, None] = {}  # keys of entries without a waiter, the longest idle first
        self._by_account: dict[
            int, dict[_Entry[W], None]
        ] = {}  # filters that name accounts, by each of these
        self._by_metric: dict[str, dict[_Entry[W], None]] = {}  # filters that name codes only
        self._all: dict[_Entry[W], None] = {}  # filters that name nothing
        self._count = 0

    def __len__(self) -> int:
        """How many wait."""
        return self._count

    def filter_count(self) -> int:
        """How many filters are kept."""
        return len(self._entries)

    def add(self, wanted: Filter, waiter: W) -> None:
        """Have a waiter wait.

        Raises:
            BackpressureError: those who wait name too much in all.
        """
        entry = self._entries.get(wanted.key)
        if entry is None:
            entry = self._enter(wanted)
        self._idle.pop(wanted.key, None)
        assert waiter not in entry.waiters, "a waiter waits once"
        entry.waiters[waiter] = None
        self._count += 1

    def remove(self, wanted: Filter, waiter: W) -> None:
        """It waits no more."""
        entry = self._entries[wanted.key]
        del entry.waiters[waiter]
        self._count -= 1
        if not entry.waiters:
            self._idle[wanted.key] = None

    def waiting(self, records: Sequence[AlertRecord]) -> Iterator[W]:
        """All who want some of these records; some of them more than once. Nobody may be added or removed meanwhile."""
        metrics_of: dict[int, set[str]] = {}
        for record in records:
            metrics_of.setdefault(record.account_id, set()).add(record.metric_code)
        for account, codes in metrics_of.items():
            for entry in self._by_account.get(account, ()):
                metrics = entry.filter.metrics
                if entry.waiters and (not metrics or not metrics.isdisjoint(codes)):
                    yield from entry.waiters
        if self._by_metric:
            for metric in dict.fromkeys(record.metric_code for record in records):
                for entry in self._by_metric.get(metric, ()):
                    yield from entry.waiters
        for entry in self._all:
            yield from entry.waiters

    def everybody(self) -> Iterator[W]:
        """All who wait."""
        for entry in self._entries.values():
            yield from entry.waiters

    def _enter(self, wanted: Filter) -> _Entry[W]:
        needed = wanted.name_count
        while self.name_count + needed > self._names_max and self._idle:
            self._forget(next(iter(self._idle)))
        if self.name_count + needed > self._names_max:
            raise BackpressureError("those who wait for alerts name too many accounts in all")
        entry: _Entry[W] = _Entry(wanted)
        self._entries[wanted.key] = entry
        self.name_count += needed
        if wanted.accounts:
            for account in wanted.accounts:
                self._by_account.setdefault(account, {})[entry] = None
        elif wanted.metrics:
            for metric in wanted.metrics:
                self._by_metric.setdefault(metric, {})[entry] = None
        else:
            self._all[entry] = None
        return entry

    def _forget(self, key: Any) -> None:
        del self._idle[key]
        entry = self._entries.pop(key)
        wanted = entry.filter
        self.name_count -= wanted.name_count
        if wanted.accounts:
            for account in wanted.accounts:
                _leave(self._by_account, account, entry)
        elif wanted.metrics:
            for metric in wanted.metrics:
                _leave(self._by_metric, metric, entry)
        else:
            del self._all[entry]


def _leave(index: dict[Any, dict[Any, None]], key: Any, entry: object) -> None:
    entries = index[key]
    del entries[entry]
    if not entries:
        del index[key]
