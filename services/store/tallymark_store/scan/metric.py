"""What a scan has to know of a metric: its code, from which offsets on the code meant it, and its dimensions.

Dimension values follow the cells' rule: an event's value counts as declared if it was when the event was stored.
So a value declared at offset X is `other` for the events below X, for ever.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tallymark_protocol import limits
from tallymark_protocol.errors import InvalidRequestError
from tallymark_protocol.model import AggType
from tallymark_store.scan import kernels as k

IntArray = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]


class ScanDimension(NamedTuple):
    """A declared dimension."""

    key: str
    any_value: bool  # declared without values
    since: dict[str, int]  # declared value -> first offset at which it is declared


class ScanMetric(NamedTuple):
    """A metric of one uid."""

    code: str
    uid: int
    agg_type: AggType
    first_offset: int  # events of the code in [first_offset, end_offset) are this metric's
    end_offset: int
    dimensions: tuple[ScanDimension, ...] = ()

    def dimension(self, key: str) -> int:
        """Return a dimension's place.

        Raises:
            InvalidRequestError: when the key is not declared.
        """
        for place, dimension in enumerate(self.dimensions):
            if dimension.key == key:
                return place
        declared = ", ".join(dimension.key for dimension in self.dimensions) or "none"
        raise InvalidRequestError(
            f'metric "{self.code}" has no dimension "{key}" (declared: {declared})',
            details={"key": key},
        )


GroupKey = tuple[tuple[int, str], ...]
"""A group: (kind, value) per grouped dimension; kinds as in `messages.GroupValue`."""


class DimensionTables:
    """The dimensions that a scan looks at, as kernels want them, and the groups it has met."""

    def __init__(
        self, metric: ScanMetric, filters: Sequence[tuple[int, frozenset[str]]], group_by: Sequence[int]
    ) -> None:
        """Prepare for filters of (dimension, allowed values), at most one per dimension, and a group-by."""
        assert len(set(group_by)) == len(group_by), "a dimension is grouped by once"
        wanted = dict(filters)
        assert len(wanted) == len(filters), "a dimension is filtered by once"
        self._group_by = list(group_by)
        used = sorted({*wanted, *group_by})
        self.width = len(group_by)
        self.dims: IntArray = np.zeros((len(used), k.DIM_FIELDS), np.int64)
        keys = b""
        entries: list[tuple[int, bytes, int, int]] = []
        for d, place in enumerate(used):
            dimension = metric.dimensions[place]
            encoded = dimension.key.encode()
            grouped = self._group_by.index(place) if place in self._group_by else -1
            self.dims[d] = (
                len(keys),
                len(keys) + len(encoded),
                int(dimension.any_value),
                int(place in wanted),
                grouped,
            )
            keys += encoded
            allowed = wanted.get(place, frozenset())
            known = dict.fromkeys(sorted(allowed), 0) if dimension.any_value else dimension.since
            for value, since in known.items():
                entries.append(
                    (
                        d,
                        value.encode("utf-8", "surrogatepass"),
                        since,
                        int(place not in wanted or value in allowed),
                    )
                )
        self.keys: Bytes = np.frombuffer(keys or b"\0", np.uint8)
        # Room for one property set's new values is all that a kernel needs to make progress.
        spare = limits.DIMENSIONS_MAX * limits.PROPERTY_VALUE_BYTES_MAX
        pool = b"".join(entry[1] for entry in entries)
        self.pool: Bytes = np.zeros(len(pool) + 4 * spare, np.uint8)
        self.pool[: len(pool)] = np.frombuffer(pool, np.uint8)
        self.values: IntArray = np.zeros((len(entries) + 64, k.VALUE_FIELDS), np.int64)
        self.value_index = np.empty(0, np.int32)
        self.groups: IntArray = np.zeros((16, max(self.width, 1)), np.int64)
        self.group_index = np.empty(0, np.int32)
        self.values_used = len(entries)
        self.pool_used = len(pool)
        self.groups_used = 0
        position = 0
        for number, (d, encoded, since, passes) in enumerate(entries):
            self.values[number] = (d, position, position + len(encoded), since, passes)
            position += len(encoded)
        self._index_values()
        self._index_groups()

    def _index_values(self) -> None:
        self.value_index = np.full(table_size(len(self.values)), -1, np.int32)
        k.rebuild_value_index(self.pool, self.values, self.values_used, self.value_index)

    def _index_groups(self) -> None:
        self.group_index = np.full(table_size(len(self.groups)), -1, np.int32)
        k.rebuild_group_index(self.groups, self.groups_used, self.width, self.group_index)

    def grow_values(self) -> None:
        """Make room for more values (those used are in `values_used` and `pool_used`)."""
        self.values = doubled(self.values)
        self.pool = np.concatenate((self.pool, np.zeros(len(self.pool), np.uint8)))
        self._index_values()

    def grow_groups(self) -> None:
        """Make room for more groups."""
        self.groups = doubled(self.groups)
        self._index_groups()

    def group(self, number: int) -> GroupKey:
        """Return a group that a kernel has made."""
        if not self.width:
            return ()
        return tuple(self._value(code) for code in self.groups[number].tolist())

    def _value(self, code: int) -> tuple[int, str]:
        if code == k.CODE_MISSING:
            return 1, ""
        if code == k.CODE_OTHER:
            return 2, ""
        start, end = self.values[code - k.CODE_VALUES, k.V_START : k.V_END + 1].tolist()
        # Property values were checked to be lengths, not text; what isn't UTF-8 must not fail a query.
        return 0, self.pool[start:end].tobytes().decode("utf-8", "replace")


def table_size(entries: int) -> int:
    """Return a power of two of at least twice `entries`."""
    return 1 << max(4, (2 * entries - 1).bit_length())


def doubled(array: IntArray) -> IntArray:
    """Return a table of twice the rows that begins with those of `array`; the rest is zero."""
    grown = np.zeros((2 * len(array), array.shape[1]), np.int64)
    grown[: len(array)] = array
    return grown
