"""From records of the log to sorted Arrow columns, with no Python per event.

Owns the layout of an archive file's columns (`SCHEMA`; docs/archive.md describes them) and how a slice of the log gets
there: `Slice` takes the runs of a `RecordCursor` one after the other, `table` then sorts what was accepted by (metric
uid, account, time, offset) and makes the Arrow table. A slice is bounded by its caller, in events and in bytes; it
keeps no reference to the log's buffers once a run is taken.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from tallymark_protocol.payload import COLUMNS
from tallymark_store.archive import kernels as k
from tallymark_store.archive.names import MetricNames
from tallymark_store.scan.kernels import K_BODY, K_COUNT
from tallymark_store.scan.source import ByteArray, IntArray
from tallymark_store.scan.totals import METRIC_INDEXES

_NAME: Final = pa.dictionary(pa.int32(), pa.string())
_WORD: Final = pa.dictionary(pa.int8(), pa.string())

SCHEMA: Final = pa.schema(
    [
        pa.field("metric", _NAME, nullable=False),
        pa.field("metric_uid", pa.uint64(), nullable=False),
        pa.field("account", pa.uint64(), nullable=False),
        pa.field("time_ns", pa.int64(), nullable=False),
        pa.field("time_given", pa.bool_(), nullable=False),
        pa.field("append_time_ns", pa.int64(), nullable=False),
        pa.field("value", pa.int64()),
        pa.field("value_text", pa.string()),
        pa.field("value_kind", _WORD),
        pa.field("operation", _WORD, nullable=False),
        pa.field("id", pa.string()),
        pa.field("id_kind", _WORD),
        pa.field("dimensions", _NAME),
        pa.field("properties", _NAME),
        pa.field("partition", pa.uint16(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
    ]
)
SORT_KEY: Final = ("metric_uid", "account", "time_ns", "offset")

# Words by the number that the log has for them, less one where 0 stands for nothing, which is NULL here.
VALUE_KINDS: Final = ("text", "uint64")
OPERATIONS: Final = ("none", "add", "remove")
ID_KINDS: Final = ("text", "bytes", "uuid", "int")

_Word = TypeVar("_Word", bound=np.generic)

_JSON_GROWTH: Final = 6  # a control character becomes \u00xx
_PROPERTY_GROWTH: Final = 8  # quotes, colon, comma, braces, in place of a length of three bytes


class MalformedError(Exception):
    """A record makes no sense, though its checksum holds; `body` is where it lies in its buffer."""

    def __init__(self, why: str, body: int) -> None:
        super().__init__(why)
        self.body = body


class _Text(NamedTuple):
    """A run's or a slice's strings: all bytes, and where each ends."""

    pool: ByteArray
    ends: IntArray


class Slice:
    """A part of a partition's log on its way into the archive.

    Args:
        partition: its number.
        names: the metrics, as of the end of the slice or later.
        events_max: offsets that the slice's records take, at most.
    """

    def __init__(self, partition: int, names: MetricNames, events_max: int) -> None:
        self._partition = partition
        self._names = names
        self._wide: IntArray = np.empty((k.WIDE_FIELDS, events_max), np.int64)
        self._narrow: ByteArray = np.empty((k.NARROW_FIELDS, events_max), np.uint8)
        self._ids: list[_Text] = []
        self._texts: list[_Text] = []
        self._declared: list[_Text] = []
        self._other: list[_Text] = []
        self._state: IntArray = np.zeros(k.STATE_FIELDS, np.int64)
        self._columns: IntArray = np.zeros(COLUMNS, np.int64)
        self._slots: IntArray = np.empty(METRIC_INDEXES, np.int64)
        self._limbs: IntArray = np.zeros(k.LIMBS, np.int64)

    @property
    def rows(self) -> int:
        """Accepted events so far."""
        return int(self._state[k.S_ROWS])

    def take(self, data: ByteArray, records: IntArray) -> None:
        """Take a run of records (`scan.kernels.K_` columns), which lie in `data`.

        Raises:
            MalformedError: a record makes no sense; the slice is of no use any more.
        """
        counts = records[:, K_COUNT]
        events = int(counts.sum())
        names, state = self._names, self._state
        places: IntArray = np.empty((events, k.PLACE_FIELDS), np.int64)
        entries: IntArray = np.empty((events, k.ENTRY_FIELDS), np.int64)
        memo: IntArray = np.full(k.WAYS * int(counts.max(initial=0)), -1, np.int64)
        state[k.S_PLACES] = state[k.S_ENTRIES] = 0
        status = k.decode_records(
            data,
            records,
            names.pool,
            names.codes,
            names.versions,
            names.index,
            self._wide,
            self._narrow,
            places,
            entries,
            memo,
            self._slots,
            self._columns,
            state,
        )
        if status != k.DONE:
            why = "it is malformed" if status == k.MALFORMED else "it names a metric that there is not"
            raise MalformedError(why, int(records[state[k.S_RECORD], K_BODY]))
        places = places[: state[k.S_PLACES]]
        entries = entries[: state[k.S_ENTRIES]]
        self._ids.append(self._strings(k.write_ids, data, places, int(state[k.S_ID_BYTES])))
        self._texts.append(self._strings(k.write_texts, data, places, int(state[k.S_TEXT_BYTES])))
        self._take_sets(data, entries)

    def _strings(self, write: Any, data: ByteArray, places: IntArray, bytes_max: int) -> _Text:
        if not bytes_max:
            return _Text(np.empty(0, np.uint8), np.zeros(len(places), np.int64))
        pool: ByteArray = np.empty(bytes_max, np.uint8)
        ends: IntArray = np.empty(len(places), np.int64)
        used = write(data, places, pool, ends, self._limbs)
        return _Text(pool[:used].copy(), ends)

    def _take_sets(self, data: ByteArray, entries: IntArray) -> None:
        count = len(entries)
        if not count:
            return
        names = self._names
        raw = int((entries[:, k.E_END] - entries[:, k.E_START]).sum())
        bound = _JSON_GROWTH * raw + _PROPERTY_GROWTH * count
        pools = [np.empty(bound, np.uint8) for _ in range(2)]
        ends = [np.empty(count, np.int64) for _ in range(2)]
        used = k.write_sets(
            data, entries, names.keys, names.key_bounds, names.slot_keys, pools[0], ends[0], pools[1], ends[1]
        )
        self._declared.append(_Text(pools[0][: used[0]].copy(), ends[0]))
        self._other.append(_Text(pools[1][: used[1]].copy(), ends[1]))
        self._state[k.S_ENTRY_BASE] += count

    def table(self) -> pa.Table:
        """Everything taken, sorted; call it once, at the end."""
        rows, names = self.rows, self._names
        wide, narrow = self._wide[:, :rows], self._narrow[:, :rows]
        slots = wide[k.W_SLOT]
        found = sorted_rows(
            names.ranks[slots].view(np.uint64),
            wide[k.W_ACCOUNT].view(np.uint64),
            wide[k.W_TIME].view(np.uint64),
        )
        order = found.astype(np.intp)  # once, where numpy would do so for each column
        slots = _in_order(slots, order)
        codes = sorted(set(names.codes_of))
        place_of = {code: place for place, code in enumerate(codes)}
        code_places = np.array([place_of[code] for code in names.codes_of], np.int32)
        kinds = _in_order(narrow[k.B_TEXT_KIND], order)
        id_kinds = _in_order(narrow[k.B_ID_KIND], order)
        sets = _in_order(wide[k.W_SET], order)
        arrays = [
            _dictionary(code_places[slots], codes),
            pa.array(names.uids[slots]),
            pa.array(_in_order(wide[k.W_ACCOUNT], order).view(np.uint64)),
            pa.array(_in_order(wide[k.W_TIME], order)),
            pa.array(_in_order(narrow[k.B_TIME_GIVEN], order).view(np.bool_)),
            pa.array(_in_order(wide[k.W_APPEND], order)),
            pa.array(_in_order(wide[k.W_VALUE], order), mask=kinds != 0 if kinds.any() else None),
            _taken(self._texts, narrow[k.B_TEXT_KIND] != 0, found),
            _dictionary(kinds.view(np.int8) - np.int8(1), list(VALUE_KINDS), kinds == 0),
            _dictionary(_in_order(narrow[k.B_OPERATION], order).view(np.int8), list(OPERATIONS)),
            _taken(self._ids, narrow[k.B_ID_KIND] != 0, found),
            _dictionary(id_kinds.view(np.int8) - np.int8(1), list(ID_KINDS), id_kinds == 0),
            _sets(self._declared, sets),
            _sets(self._other, sets),
            pa.array(np.full(rows, self._partition, np.uint16)),
            pa.array(wide[k.W_OFFSET].take(order)),
        ]
        return pa.Table.from_arrays(arrays, schema=SCHEMA)


def _in_order(column: npt.NDArray[_Word], order: npt.NDArray[np.intp]) -> npt.NDArray[_Word]:
    """A column's rows in an order; one that says the same in all of them, which most do, has every order."""
    if (column == column[0]).all():
        return column
    taken: npt.NDArray[_Word] = column.take(order)
    return taken


def sorted_rows(*keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.int32]:
    """Row numbers in the order of the keys, the first one most significant; equal ones stay as they were."""
    rows = len(keys[0])
    order: npt.NDArray[np.int32] = np.arange(rows, dtype=np.int32)
    if not rows:
        return order
    spare = np.empty_like(order)
    counts = np.empty(k.DIGIT_VALUES, np.int64)
    moved = False
    for key in reversed(keys):
        low, high = key.min(), key.max()
        # Untouched rows of an ordered column are in its order already, as times of appends usually are.
        if low == high or (not moved and k.is_ordered(key)):
            continue
        moved = True
        if k.order_by(key - low, int(high - low).bit_length(), order, spare, counts):
            order, spare = spare, order
    return order


def _string_array(parts: list[_Text], is_valid: npt.NDArray[np.bool_] | None) -> pa.Array:
    """Arrow's form of strings that lie in several pools, one after the other."""
    count = sum(len(part.ends) for part in parts)
    offsets: npt.NDArray[np.int32] = np.zeros(count + 1, np.int32)
    at, base = 1, 0
    for part in parts:
        offsets[at : at + len(part.ends)] = part.ends + base
        at += len(part.ends)
        base += len(part.pool)
    pool = np.concatenate([part.pool for part in parts]) if parts else np.empty(0, np.uint8)
    bitmap = None if is_valid is None else pa.py_buffer(np.packbits(is_valid, bitorder="little"))
    return pa.Array.from_buffers(pa.string(), count, [bitmap, pa.py_buffer(offsets), pa.py_buffer(pool)])


def _taken(parts: list[_Text], is_valid: npt.NDArray[np.bool_], order: npt.NDArray[np.int32]) -> pa.Array:
    if not is_valid.any():
        return pa.nulls(len(order), pa.string())
    return pc.take(_string_array(parts, is_valid), pa.array(order))


def _dictionary(
    places: npt.NDArray[Any], words: list[str] | pa.Array, mask: npt.NDArray[np.bool_] | None = None
) -> pa.DictionaryArray:
    if mask is not None and not mask.any():
        mask = None
    indices = pa.array(places, mask=mask)
    dictionary = words if isinstance(words, pa.Array) else pa.array(words, pa.string())
    return pa.DictionaryArray.from_arrays(indices, dictionary)


def _sets(parts: list[_Text], sets: IntArray) -> pa.DictionaryArray:
    """A column of property sets: each different text once, and which of them each row has."""
    if not parts:
        return _dictionary(np.zeros(len(sets), np.int32), [""], np.ones(len(sets), np.bool_))
    # Entry 0 is the set of events that have none.
    encoded = _string_array(
        [_Text(np.empty(0, np.uint8), np.zeros(1, np.int64)), *parts], None
    ).dictionary_encode()
    place_of_entry = encoded.indices.to_numpy()
    places = place_of_entry[sets]
    return _dictionary(places, encoded.dictionary, places == place_of_entry[0])
