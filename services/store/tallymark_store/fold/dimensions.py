"""Dimension values and their combinations, as numbers.

Each dimension of an event has a **code**: MISSING, OTHER (a value that isn't declared, where values are), or
VALUES + the number of an interned value. An event's **combination** is the codes of all dimensions of its metric;
combinations are interned too, and number 0 stands for metrics without dimensions. Numbers are given in log order,
so they are the same on every replica, and nothing is ever taken back.

A value that a later version of the schema declares counts as itself from that version's offset on; events before
it stay in `other`.

Property sets are resolved once per payload, metric and set: a small direct-mapped memo in front of the tables
remembers (metric, set) -> combination. A combination gets its number only when a day cell needs it, so what is
refused as the 10,001st of a day costs no memory.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tallymark_protocol import limits
from tallymark_protocol.errors import InvalidRequestError
from tallymark_protocol.kernels.intrinsics import (
    copy_bytes,
    equal_bytes,
    hash_bytes,
    load_u8,
    load_u16,
    mix64,
)
from tallymark_protocol.messages import GroupValue
from tallymark_store.fold.arena import Arena
from tallymark_store.fold.compiling import kernel
from tallymark_store.fold.index import (
    CAPACITY,
    FULL,
    LOW32,
    SHARDS,
    STEP_MAX,
    STRIDE,
    U32,
    ZERO,
    Index,
    home_of,
    insert,
    shard_of,
    tag_of,
)
from tallymark_store.fold.schemas import SchemaTable

Ints = npt.NDArray[np.int64]

MISSING = 0
OTHER = 1
VALUES = 2

WIDTH = limits.DIMENSIONS_MAX
assert WIDTH <= STEP_MAX  # values that an event may add

# Columns of a combination: its slot, then one code per dimension (MISSING beyond the last).
C_SLOT = 0
C_CODES = 1
COMBO_FIELDS = 1 + WIDTH

# Columns of a value.
V_OWNER = 0  # slot * WIDTH + dimension
V_START = 1  # in the pool
V_END = 2
V_SINCE = 3  # events below this offset came before it was declared
VALUE_FIELDS = 4

# Columns of a dimension, WIDTH rows a slot.
D_KEY_START = 0  # in the pool
D_KEY_END = 1
D_ANY = 2  # any value is told apart
D_FIELDS = 3

# Counters (int64[]).
N_COMBOS = 0
N_VALUES = 1
N_POOL = 2  # bytes
COUNTERS = 3

_NONE = -1


class DimensionArrays(NamedTuple):
    """What kernels take."""

    dimensions: Ints
    combos: npt.NDArray[np.int32]
    combo_table: npt.NDArray[np.uint64]
    combo_shards: Ints
    values: Ints
    value_table: npt.NDArray[np.uint64]
    value_shards: Ints
    pool: npt.NDArray[np.uint8]
    counters: Ints
    seed: np.uint64  # of the hashes


@kernel
def value_hash(data: Any, start: Any, end: Any, owner: Any, seed: Any) -> Any:
    """Hash of a value of a dimension. The seed keeps callers from choosing values that collide."""
    keyed = mix64(np.uint64(seed)) ^ (np.uint64(owner) * np.uint64(0x9E3779B97F4A7C15))
    return mix64(hash_bytes(data, start, end, keyed))


@kernel
def _find_value(a: Any, data: Any, start: Any, end: Any, owner: Any, h: Any) -> Any:
    shard = shard_of(h)
    capacity = a.value_shards[shard, CAPACITY]
    base = shard * a.value_shards[SHARDS, STRIDE]
    tag = tag_of(h)
    position = home_of(tag, capacity)
    values = a.values
    while True:
        entry = a.value_table[base + position]
        if entry == ZERO:
            return np.int64(_NONE)
        if (entry >> U32) == tag:
            row = np.int64(entry & LOW32) - 1
            first = values[row, V_START]
            if (
                values[row, V_OWNER] == owner
                and values[row, V_END] - first == end - start
                and equal_bytes(a.pool, first, data, start, end - start)
            ):
                return row
        position += 1
        if position == capacity:
            position = 0


@kernel
def find_value(a: Any, data: Any, start: Any, end: Any, owner: Any) -> Any:
    """The number of a value, -1 if it has none."""
    return _find_value(a, data, start, end, owner, value_hash(data, start, end, owner, a.seed))


@kernel
def intern_value(a: Any, data: Any, start: Any, end: Any, owner: Any, since: Any) -> Any:
    """The number of a value, giving it one if it has none."""
    h = value_hash(data, start, end, owner, a.seed)
    row = _find_value(a, data, start, end, owner, h)
    if row >= 0:
        return row
    row = a.counters[N_VALUES]
    first = a.counters[N_POOL]
    copy_bytes(a.pool, first, data, start, end - start)
    a.values[row, V_OWNER] = owner
    a.values[row, V_START] = first
    a.values[row, V_END] = first + end - start
    a.values[row, V_SINCE] = since
    a.counters[N_VALUES] = row + 1
    a.counters[N_POOL] = first + end - start
    insert(a.value_table, a.value_shards, h, row)
    return row


@kernel
def combo_hash(slot: Any, codes: Any, seed: Any) -> Any:
    """Hash of a combination. The seed keeps callers from choosing values whose combinations collide."""
    h = mix64(np.uint64(seed)) ^ np.uint64(slot)
    for d in range(WIDTH):
        h = mix64(h ^ np.uint64(codes[d])) + np.uint64(0x9E3779B97F4A7C15)
    return mix64(h)


@kernel
def _find_combo(a: Any, slot: Any, codes: Any, h: Any) -> Any:
    shard = shard_of(h)
    capacity = a.combo_shards[shard, CAPACITY]
    base = shard * a.combo_shards[SHARDS, STRIDE]
    tag = tag_of(h)
    position = home_of(tag, capacity)
    while True:
        entry = a.combo_table[base + position]
        if entry == ZERO:
            return np.int64(_NONE)
        if (entry >> U32) == tag:
            row = np.int64(entry & LOW32) - 1
            same = a.combos[row, C_SLOT] == slot
            for d in range(WIDTH):
                same = same and a.combos[row, C_CODES + d] == codes[d]
            if same:
                return row
        position += 1
        if position == capacity:
            position = 0


@kernel
def resolve_set(
    a: Any, slot: Any, width: Any, data: Any, start: Any, end: Any, offset: Any, intern: Any, codes: Any
) -> Any:
    """The combination of the property set `data[start:end]` for a metric with `width` dimensions.

    With `intern` it gets a number if it has none, otherwise that gives -1. `codes` (int64[WIDTH]) is overwritten.
    `offset` is the event's.
    """
    for d in range(WIDTH):
        codes[d] = MISSING
    known = True
    position = start
    while position < end:
        key_length = np.int64(load_u8(data, position))
        key = position + 1
        value_length = np.int64(load_u16(data, key + key_length))
        value = key + key_length + 2
        position = value + value_length
        for d in range(width):
            owner = slot * WIDTH + d
            first = a.dimensions[owner, D_KEY_START]
            if a.dimensions[owner, D_KEY_END] - first != key_length:
                continue
            if not equal_bytes(a.pool, first, data, key, key_length):
                continue
            if a.dimensions[owner, D_ANY] != 0 and intern:
                codes[d] = VALUES + intern_value(a, data, value, position, owner, np.int64(0))
                break
            h = value_hash(data, value, position, owner, a.seed)
            row = _find_value(a, data, value, position, owner, h)
            if row >= 0 and a.values[row, V_SINCE] <= offset:
                codes[d] = VALUES + row
            elif a.dimensions[owner, D_ANY] != 0:
                known = False
            else:
                codes[d] = OTHER
            break
    if not known:
        return np.int64(_NONE)
    h = combo_hash(slot, codes, a.seed)
    combo = _find_combo(a, slot, codes, h)
    if combo >= 0 or not intern:
        return combo
    combo = a.counters[N_COMBOS]
    a.combos[combo, C_SLOT] = slot
    for d in range(WIDTH):
        a.combos[combo, C_CODES + d] = codes[d]
    a.counters[N_COMBOS] = combo + 1
    insert(a.combo_table, a.combo_shards, h, combo)
    return combo


@kernel
def selected(combos: Any, combo: Any, selection: Any) -> bool:
    """Whether a combination passes every filter of a selection (int64[k, 2]: dimension, code; rising)."""
    i = 0
    n = len(selection)
    while i < n:
        dimension = selection[i, 0]
        code = combos[combo, C_CODES + dimension]
        hit = False
        while i < n and selection[i, 0] == dimension:
            hit = hit or selection[i, 1] == code
            i += 1
        if not hit:
            return False
    return True


@kernel
def _reindex_combos(a: Any, first: Any, codes: Any) -> Any:
    """Add the combinations from row `first` on to their index. Returns the row to go on with; at the end, their number."""
    for combo in range(first, a.counters[N_COMBOS]):
        if a.combo_shards[SHARDS, FULL] != 0:
            return np.int64(combo)
        for d in range(WIDTH):
            codes[d] = a.combos[combo, C_CODES + d]
        h = combo_hash(np.int64(a.combos[combo, C_SLOT]), codes, a.seed)
        insert(a.combo_table, a.combo_shards, h, combo)
    return a.counters[N_COMBOS]


@kernel
def _reindex_values(a: Any, first: Any) -> Any:
    """Add the values from row `first` on to their index. Returns the row to go on with; at the end, their number."""
    for row in range(first, a.counters[N_VALUES]):
        if a.value_shards[SHARDS, FULL] != 0:
            return np.int64(row)
        h = value_hash(a.pool, a.values[row, V_START], a.values[row, V_END], a.values[row, V_OWNER], a.seed)
        insert(a.value_table, a.value_shards, h, row)
    return a.counters[N_VALUES]


class Dimensions:
    """The interned values and combinations of one partition. See the module.

    `seed` decides where entries lie in the hash tables, nothing else.
    """

    def __init__(self, *, seed: int = 0) -> None:
        self._seed = np.uint64(seed)
        self._combos = Arena(np.int32, columns=COMBO_FIELDS, reserve_rows=1 << 29, initial_rows=1_024)
        self._values = Arena(np.int64, columns=VALUE_FIELDS, reserve_rows=1 << 28, initial_rows=1_024)
        self._pool = Arena(np.uint8, reserve_rows=1 << 36, initial_rows=64 * 1_024)
        self._combo_index = Index()
        self._value_index = Index()
        self._dimensions: Ints = np.zeros((0, D_FIELDS), dtype=np.int64)
        self.counters: Ints = np.zeros(COUNTERS, dtype=np.int64)
        self.counters[N_COMBOS] = 1  # number 0 is taken: no dimensions
        self._values_of: dict[int, GroupValue] = {}
        self.arrays = self._arrays()

    def _arrays(self) -> DimensionArrays:
        return DimensionArrays(
            self._dimensions,
            self._combos.array,
            self._combo_index.table,
            self._combo_index.shards,
            self._values.array,
            self._value_index.table,
            self._value_index.shards,
            self._pool.array,
            self.counters,
            self._seed,
        )

    @property
    def combo_count(self) -> int:
        """How many combinations have a number, 0 included."""
        return int(self.counters[N_COMBOS])

    @property
    def memory_bytes(self) -> int:
        """Bytes in use."""
        return (
            self._combos.row_bytes * int(self.counters[N_COMBOS])
            + self._values.row_bytes * int(self.counters[N_VALUES])
            + int(self.counters[N_POOL])
            + self._combo_index.memory_bytes
            + self._value_index.memory_bytes
        )

    @property
    def sound(self) -> bool:
        """Whether all codes of all combinations stand for something."""
        codes = self._combos.array[: self.combo_count, C_CODES:]
        return bool(
            codes.max(initial=0) < VALUES + int(self.counters[N_VALUES]) and codes.min(initial=0) >= 0
        )

    def ensure(self, combos: int, values: int, pool_bytes: int) -> None:
        """Make room for so many more of each."""
        self._combos.ensure(int(self.counters[N_COMBOS]) + combos)
        self._values.ensure(int(self.counters[N_VALUES]) + values)
        self._pool.ensure(int(self.counters[N_POOL]) + pool_bytes + 8)
        self.make_room()
        self.arrays = self._arrays()

    def make_room(self) -> None:
        """Grow what a kernel has marked as full."""
        if self._combo_index.make_room() | self._value_index.make_room():
            self.arrays = self._arrays()

    def put(self, schemas: SchemaTable, slot: int) -> None:
        """Take in a slot of the schema table, new or updated: its keys, and the values it declares."""
        filters = schemas.record(slot).schema.filters
        declared = schemas.declared(slot)
        if len(self._dimensions) < (slot + 1) * WIDTH:
            grown = np.zeros(((slot + 1) * WIDTH, D_FIELDS), dtype=np.int64)
            grown[: len(self._dimensions)] = self._dimensions
            self._dimensions = grown
            self.ensure(0, 0, sum(len(f.key.encode()) for f in filters))
            for d, dimension in enumerate(filters):
                key = np.frombuffer(dimension.key.encode(), dtype=np.uint8)
                start = int(self.counters[N_POOL])
                self._pool.array[start : start + len(key)] = key
                self.counters[N_POOL] = start + len(key)
                self._dimensions[slot * WIDTH + d] = (start, start + len(key), int(not dimension.values))
        for d, values in enumerate(declared):
            for value, since in values.items():
                data = np.frombuffer(value.encode() or b"\x00", dtype=np.uint8)
                length = len(value.encode())
                self.ensure(0, 1, length)
                intern_value(self.arrays, data, 0, length, slot * WIDTH + d, since)
        self.ensure(0, 0, 0)

    # ------------------------------------------------------------ reading

    def dimension(self, schemas: SchemaTable, slot: int, key: str) -> int:
        """The position of a key among a metric's dimensions.

        Raises:
            InvalidRequestError: the metric doesn't declare it.
        """
        schema = schemas.record(slot).schema
        for d, dimension in enumerate(schema.filters):
            if dimension.key == key:
                return d
        declared = ", ".join(repr(f.key) for f in schema.filters) or "none"
        raise InvalidRequestError(
            f"metric {schema.code!r} has no dimension {key!r}; its dimensions are: {declared}"
        )

    def selection(self, schemas: SchemaTable, slot: int, filters: list[tuple[str, list[str]]]) -> Ints:
        """Filters as the codes that pass them, for kernels (`selected`); all filters must be passed.

        Raises:
            InvalidRequestError: a key that isn't declared, or named twice, or a value that its dimension doesn't
                tell apart (such events are in `other`).
        """
        rows: list[tuple[int, int]] = []
        seen: set[int] = set()
        for key, values in filters:
            d = self.dimension(schemas, slot, key)
            if d in seen:
                raise InvalidRequestError(f"dimension {key!r} is filtered twice")
            seen.add(d)
            declared = schemas.declared(slot)[d]
            rows.append((d, -1))  # so that a filter without values passes nothing
            for value in values:
                if declared and value not in declared:
                    raise InvalidRequestError(
                        f"dimension {key!r} doesn't declare the value {value!r:.200}: such events are in 'other'"
                    )
                number = self._number(value, slot * WIDTH + d)
                if number >= 0:
                    rows.append((d, VALUES + number))
        rows.sort()
        return np.array(rows, dtype=np.int64).reshape(len(rows), 2)

    def mask(self, selection: Ints) -> npt.NDArray[np.bool_]:
        """Over all combinations, whether each passes; meaningful for those of the selection's metric."""
        mask = np.zeros(self.combo_count, dtype=np.bool_)
        mask_of(self.arrays.combos, selection, mask)
        return mask

    def _number(self, value: str, owner: int) -> int:
        encoded = value.encode("utf-8", "surrogatepass")
        data = np.frombuffer(encoded or b"\x00", dtype=np.uint8)
        return int(find_value(self.arrays, data, 0, len(encoded), owner))

    def group_value(self, code: int) -> GroupValue:
        """What a code stands for."""
        if code < VALUES:
            return GroupValue(2 if code == OTHER else 1)
        found = self._values_of.get(code)
        if found is None:
            _, start, end, _ = self._values.array[code - VALUES].tolist()
            found = GroupValue(0, self._pool.array[start:end].tobytes().decode())
            if len(self._values_of) >= limits.QUERY_ROWS_MAX:
                self._values_of.clear()
            self._values_of[code] = found
        return found

    def group(self, combo: int, dimensions: list[int]) -> list[GroupValue]:
        """The values of a combination in the given dimensions."""
        codes = self._combos.array[combo].tolist()
        return [self.group_value(codes[C_CODES + d]) for d in dimensions]

    # ------------------------------------------------------------ snapshots

    def snapshot(self) -> dict[str, npt.NDArray[Any]]:
        """Copies of all that `restore` needs beside the schemas."""
        combos, values, pool = self.counters.tolist()
        return {
            "dimension_keys": self._dimensions.copy(),
            "combos": self._combos.array[:combos].copy(),
            "dimension_values": self._values.array[:values].copy(),
            "dimension_pool": self._pool.array[:pool].copy(),
        }

    @classmethod
    def restore(cls, parts: dict[str, npt.NDArray[Any]], *, seed: int = 0) -> Dimensions:
        """Make one of a snapshot."""
        self = cls(seed=seed)
        combos, values, pool = parts["combos"], parts["dimension_values"], parts["dimension_pool"]
        self.ensure(len(combos), len(values), len(pool))
        self._dimensions = np.array(parts["dimension_keys"], dtype=np.int64).reshape(-1, D_FIELDS)
        self._combos.array[: len(combos)] = combos
        self._values.array[: len(values)] = values
        self._pool.array[: len(pool)] = pool
        self.counters[:] = (len(combos), len(values), len(pool))
        self._combo_index = Index(len(combos))
        self._value_index = Index(len(values))
        self.ensure(0, 0, 0)
        self._reindex()
        self.ensure(0, 0, 0)
        return self

    def _reindex(self) -> None:
        """Fill the empty indexes; whenever a shard is due to grow, make room and go on."""
        codes = np.zeros(WIDTH, dtype=np.int64)
        combo, value = 1, 0  # combination 0 has no entry
        while combo < self.combo_count:
            combo = int(_reindex_combos(self.arrays, combo, codes))
            self.make_room()
        while value < int(self.counters[N_VALUES]):
            value = int(_reindex_values(self.arrays, value))
            self.make_room()


@kernel
def mask_of(combos: Any, selection: Any, mask: Any) -> None:
    """`selected` for every combination below the mask's length."""
    for combo in range(len(mask)):
        mask[combo] = selected(combos, combo, selection)
