"""Kernels of the archive: accepted events of many records to columns, ids and properties to text, and their order.

A call covers a run of event batches that lie in one buffer, as in `scan.kernels`; Python costs something per run and
nothing per event. What has a fixed width goes straight to its column. Of ids, texts and property sets only the
positions are noted (`P_` fields), and `write_ids`, `write_texts` and `write_sets` then write them as text, each in
one pass into a pool that is large enough for whatever they may become.

Kernels never allocate. Every byte they read has passed a checksum, and was validated before it was logged.
"""

from __future__ import annotations

from typing import Any

import numba as nb
import numpy as np

from tallymark_protocol import layout as lay
from tallymark_protocol.kernels.intrinsics import copy_bytes, equal_bytes, hash_bytes, load_u8, load_u16
from tallymark_protocol.payload import (
    C_EVENTS,
    C_ID_BYTES,
    C_ID_ENCODING,
    C_ID_ENDS,
    C_METRIC_BYTES,
    C_METRIC_ENCODING,
    C_METRIC_ENDS,
    C_METRICS,
    C_PROPERTIES_ENCODING,
    C_PROPERTY_BYTES,
    C_PROPERTY_ENDS,
    C_TEXT_BYTES,
    C_TEXT_ENCODING,
    C_TEXT_ENDS,
    account_at,
    metric_at,
    operation_at,
    properties_at,
    table_end,
    table_start,
    time_at,
    value_at,
)
from tallymark_store.scan.kernels import K_APPEND, K_BASE, K_BODY, K_COUNT, K_LENGTH, open_record

# Results of `decode_records`.
DONE = 0
MALFORMED = 1
NO_METRIC = 2  # an accepted event's code meant no metric there

# Rows of the wide columns (int64[WIDE_FIELDS, n]).
W_SLOT = 0
W_ACCOUNT = 1  # bits of a uint64
W_TIME = 2
W_APPEND = 3
W_VALUE = 4
W_OFFSET = 5
W_SET = 6  # 0: no properties, else 1 + the number of an entry
WIDE_FIELDS = 7

# Rows of the narrow columns (uint8[NARROW_FIELDS, n]).
B_OPERATION = 0
B_TIME_GIVEN = 1
B_ID_KIND = 2  # 0: no id, else its tag
B_TEXT_KIND = 3  # 0: the value stands in its column, else its tag
NARROW_FIELDS = 4

# Fields of a place (int64[n, PLACE_FIELDS]), positions in the buffer, per event of a run; equal where there is none.
P_ID_START = 0
P_ID_END = 1
P_TEXT_START = 2
P_TEXT_END = 3
PLACE_FIELDS = 4

# Fields of an entry (int64[n, ENTRY_FIELDS]): a property set as one metric looks at it.
E_START = 0
E_END = 1
E_SLOT = 2
ENTRY_FIELDS = 3

# Fields of a state array.
S_ROWS = 0  # accepted events so far, of the slice
S_PLACES = 1  # and of the run
S_ENTRIES = 2  # of the run
S_ENTRY_BASE = 3  # entries of the runs before
S_ID_BYTES = 4  # that the run's ids need at most
S_TEXT_BYTES = 5  # likewise
S_RECORD = 6  # where it went wrong
STATE_FIELDS = 7

# Fields of a code (int64[n, CODE_FIELDS]) and of a version (int64[n, VERSION_FIELDS]), see `names`.
N_START = 0  # in the pool of codes
N_END = 1
N_FIRST = 2  # its versions
N_COUNT = 3
CODE_FIELDS = 4
V_OFFSET = 0  # the code means the slot from here on
V_SLOT = 1
VERSION_FIELDS = 2

WAYS = 4  # entries that are remembered per property set of a record

_TIME_ABSENT = lay.TIME_ABSENT
_TAG_TEXT = 1
_TAG_UUID = 3
_TAG_INT = 4
_UUID_CHARS = 36
_DIGITS = 11  # bits of a digit of `order_by`
DIGIT_VALUES = 1 << _DIGITS
LIMBS = 72  # 32 bits each: an id's number has at most 255 bytes


@nb.njit(nogil=True, cache=True)
def find_code(
    pool: Any, codes: Any, versions: Any, index: Any, data: Any, start: Any, end: Any, base: Any
) -> Any:
    """The slot that a code means at offset `base`; -1 if none."""
    mask = len(index) - 1
    place = np.int64(hash_bytes(data, start, end, np.uint64(0)) & np.uint64(mask))
    while True:
        c = np.int64(index[place])
        if c < 0:
            return np.int64(-1)
        if codes[c, N_END] - codes[c, N_START] == end - start and equal_bytes(
            pool, codes[c, N_START], data, start, end - start
        ):
            break
        place = (place + 1) & mask
    slot = np.int64(-1)
    for v in range(codes[c, N_FIRST], codes[c, N_FIRST] + codes[c, N_COUNT]):
        if versions[v, V_OFFSET] <= base:
            slot = versions[v, V_SLOT]
    return slot


@nb.njit(nogil=True, cache=True)
def index_codes(pool: Any, codes: Any, index: Any) -> None:
    """Fill an emptied index of codes."""
    mask = len(index) - 1
    for c in range(len(codes)):
        place = np.int64(hash_bytes(pool, codes[c, N_START], codes[c, N_END], np.uint64(0)) & np.uint64(mask))
        while index[place] >= 0:
            place = (place + 1) & mask
        index[place] = c


@nb.njit(nogil=True, cache=True, forceinline=True)
def _entry_of(
    data: Any, columns: Any, k: Any, slot: Any, first: Any, memo: Any, entries: Any, state: Any
) -> Any:
    """The run's entry for property set k of a record, as the metric in `slot` looks at it; made if new."""
    way = k * WAYS + slot % WAYS
    e = memo[way]
    # What an earlier record left in the memo is below the record's first entry.
    if e >= first and entries[e, E_SLOT] == slot:
        return e
    e = state[S_ENTRIES]
    entries[e, E_START] = table_start(data, columns[C_PROPERTY_ENDS], columns[C_PROPERTY_BYTES], k)
    entries[e, E_END] = table_end(data, columns[C_PROPERTY_ENDS], columns[C_PROPERTY_BYTES], k)
    entries[e, E_SLOT] = slot
    memo[way] = e
    state[S_ENTRIES] = e + 1
    return e


@nb.njit(nogil=True, cache=True)
def decode_records(
    data: Any,
    records: Any,
    pool: Any,
    codes: Any,
    versions: Any,
    index: Any,
    wide: Any,
    narrow: Any,
    places: Any,
    entries: Any,
    memo: Any,
    slots: Any,
    columns: Any,
    state: Any,
) -> int:
    """Append a run's accepted events to the columns, in log order; see the module for what is noted beside them.

    `memo` (int64[WAYS * the most events of a record], -1 in the beginning) and `slots` (int64[65,536]) are scratch.
    """
    row = state[S_ROWS]
    place = state[S_PLACES]
    entry_base = 1 + state[S_ENTRY_BASE]
    id_bytes = np.int64(0)
    text_bytes = np.int64(0)
    for r in range(len(records)):
        base = records[r, K_BASE]
        append_ns = records[r, K_APPEND]
        state[S_RECORD] = r
        verdicts = open_record(data, records[r, K_BODY], records[r, K_LENGTH], records[r, K_COUNT], columns)
        if verdicts == -2:
            return MALFORMED
        metrics = columns[C_METRICS] if columns[C_METRIC_ENCODING] != 0 else 1
        for k in range(metrics):
            start = table_start(data, columns[C_METRIC_ENDS], columns[C_METRIC_BYTES], k)
            end = table_end(data, columns[C_METRIC_ENDS], columns[C_METRIC_BYTES], k)
            slots[k] = find_code(pool, codes, versions, index, data, start, end, base)
        has_sets = columns[C_PROPERTIES_ENCODING] != 0
        has_ids = columns[C_ID_ENCODING] == 2
        has_texts = columns[C_TEXT_ENCODING] == 2
        first = state[S_ENTRIES]
        for i in range(columns[C_EVENTS]):
            if verdicts >= 0 and load_u8(data, verdicts + i) != 0:
                continue
            slot = slots[metric_at(data, columns, i)]
            if slot < 0:
                return NO_METRIC
            wide[W_SLOT, row] = slot
            wide[W_ACCOUNT, row] = np.int64(account_at(data, columns, i))
            time = time_at(data, columns, i)
            wide[W_TIME, row] = append_ns if time == _TIME_ABSENT else time
            wide[W_APPEND, row] = append_ns
            wide[W_VALUE, row] = value_at(data, columns, i)
            wide[W_OFFSET, row] = base + i
            narrow[B_OPERATION, row] = operation_at(data, columns, i)
            narrow[B_TIME_GIVEN, row] = 0 if time == _TIME_ABSENT else 1
            entry = np.int64(0)
            if has_sets:
                k = properties_at(data, columns, i)
                if k > 0:
                    e = _entry_of(data, columns, k - 1, slot, first, memo, entries, state)
                    entry = entry_base + e
            wide[W_SET, row] = entry
            narrow[B_ID_KIND, row] = 0
            places[place, P_ID_START] = 0
            places[place, P_ID_END] = 0
            if has_ids:
                start = table_start(data, columns[C_ID_ENDS], columns[C_ID_BYTES], i)
                end = table_end(data, columns[C_ID_ENDS], columns[C_ID_BYTES], i)
                if end > start:
                    tag = load_u8(data, start)
                    narrow[B_ID_KIND, row] = tag
                    places[place, P_ID_START] = start
                    places[place, P_ID_END] = end
                    # A byte of a number is 2.41 digits, and there is the sign.
                    id_bytes += _UUID_CHARS if tag == _TAG_UUID else 3 * (end - start) + 1
            narrow[B_TEXT_KIND, row] = 0
            places[place, P_TEXT_START] = 0
            places[place, P_TEXT_END] = 0
            if has_texts:
                start = table_start(data, columns[C_TEXT_ENDS], columns[C_TEXT_BYTES], i)
                end = table_end(data, columns[C_TEXT_ENDS], columns[C_TEXT_BYTES], i)
                if end > start:
                    narrow[B_TEXT_KIND, row] = load_u8(data, start)
                    places[place, P_TEXT_START] = start
                    places[place, P_TEXT_END] = end
                    text_bytes += 3 * (end - start)
            row += 1
            place += 1
    state[S_ROWS] = row
    state[S_PLACES] = place
    state[S_ID_BYTES] = id_bytes
    state[S_TEXT_BYTES] = text_bytes
    return DONE


@nb.njit(nogil=True, cache=True)
def _write_number(pool: Any, at: Any, data: Any, start: Any, end: Any, signed: Any, limbs: Any) -> Any:
    """Write a little-endian number in decimal at `pool[at:]`; return where it ends."""
    length = end - start
    negative = signed and load_u8(data, end - 1) >= 0x80
    used = (length + 3) // 4
    for j in range(used):
        limbs[j] = 0
    carry = np.int64(1)
    for b in range(length):
        byte = np.int64(load_u8(data, start + b))
        if negative:  # its magnitude: the complement, plus one, which never needs another byte
            byte = (byte ^ 0xFF) + carry
            carry = byte >> 8
            byte &= 0xFF
        limbs[b // 4] |= byte << (8 * (b % 4))
    first = at
    while True:
        while used > 0 and limbs[used - 1] == 0:
            used -= 1
        remainder = np.int64(0)
        for j in range(used - 1, -1, -1):
            whole = (remainder << 32) | limbs[j]
            limbs[j] = whole // 1_000_000_000
            remainder = whole % 1_000_000_000
        while used > 0 and limbs[used - 1] == 0:
            used -= 1
        # Nine digits from the last on; all of them unless they lead.
        for _ in range(9):
            pool[at] = 48 + remainder % 10
            remainder //= 10
            at += 1
            if used == 0 and remainder == 0:
                break
        if used == 0:
            break
    if negative:
        pool[at] = 45
        at += 1
    last = at - 1
    while first < last:
        pool[first], pool[last] = pool[last], pool[first]
        first += 1
        last -= 1
    return at


@nb.njit(nogil=True, cache=True)
def _hex(value: Any) -> Any:
    return 48 + value if value < 10 else 87 + value


@nb.njit(nogil=True, cache=True)
def write_ids(data: Any, places: Any, pool: Any, ends: Any, limbs: Any) -> Any:
    """Write a run's ids as text; `ends` (int64[n]) takes where each ends. Returns how many bytes."""
    at = np.int64(0)
    for i in range(len(places)):
        start = places[i, P_ID_START]
        end = places[i, P_ID_END]
        if end > start:
            tag = load_u8(data, start)
            start += 1
            if tag == _TAG_TEXT:
                copy_bytes(pool, at, data, start, end - start)
                at += end - start
            elif tag != _TAG_INT:
                for b in range(end - start):
                    if tag == _TAG_UUID and (b == 4 or b == 6 or b == 8 or b == 10):
                        pool[at] = 45
                        at += 1
                    byte = np.int64(load_u8(data, start + b))
                    pool[at] = _hex(byte >> 4)
                    pool[at + 1] = _hex(byte & 15)
                    at += 2
            else:
                at = _write_number(pool, at, data, start, end, True, limbs)
        ends[i] = at
    return at


@nb.njit(nogil=True, cache=True)
def write_texts(data: Any, places: Any, pool: Any, ends: Any, limbs: Any) -> Any:
    """Write a run's values that are texts; as `write_ids`."""
    at = np.int64(0)
    for i in range(len(places)):
        start = places[i, P_TEXT_START]
        end = places[i, P_TEXT_END]
        if end > start:
            if load_u8(data, start) == _TAG_TEXT:
                copy_bytes(pool, at, data, start + 1, end - start - 1)
                at += end - start - 1
            else:
                at = _write_number(pool, at, data, start + 1, end, False, limbs)
        ends[i] = at
    return at


@nb.njit(nogil=True, cache=True)
def _write_quoted(pool: Any, at: Any, data: Any, start: Any, end: Any) -> Any:
    """Write a JSON string; UTF-8 stays as it is."""
    pool[at] = 34
    at += 1
    for p in range(start, end):
        c = np.int64(load_u8(data, p))
        if c == 34 or c == 92:
            pool[at] = 92
            pool[at + 1] = c
            at += 2
        elif c < 32:
            pool[at] = 92
            pool[at + 1] = 117
            pool[at + 2] = 48
            pool[at + 3] = 48
            pool[at + 4] = _hex(c >> 4)
            pool[at + 5] = _hex(c & 15)
            at += 6
        else:
            pool[at] = c
            at += 1
    pool[at] = 34
    return at + 1


@nb.njit(nogil=True, cache=True)
def _is_declared(keys: Any, bounds: Any, first: Any, last: Any, data: Any, start: Any, length: Any) -> Any:
    for k in range(first, last):
        if bounds[k, 1] - bounds[k, 0] == length and equal_bytes(keys, bounds[k, 0], data, start, length):
            return True
    return False


@nb.njit(nogil=True, cache=True)
def write_sets(
    data: Any,
    entries: Any,
    keys: Any,
    key_bounds: Any,
    slot_keys: Any,
    declared_pool: Any,
    declared_ends: Any,
    other_pool: Any,
    other_ends: Any,
) -> Any:
    """Write entries as JSON objects, dimensions that the metric declares and the rest apart; "" for an empty one.

    `slot_keys` (int64[slots, 2]) says which of `key_bounds` (int64[n, 2], in `keys`) a slot declares. Properties
    keep their order, by key bytes, so that equal sets give equal text. Returns the bytes written to both pools.
    """
    declared = np.int64(0)
    other = np.int64(0)
    for e in range(len(entries)):
        first = slot_keys[entries[e, E_SLOT], 0]
        last = slot_keys[entries[e, E_SLOT], 1]
        declared_start = declared
        other_start = other
        position = entries[e, E_START]
        while position < entries[e, E_END]:
            key = position + 1
            key_end = key + np.int64(load_u8(data, position))
            value = key_end + 2
            position = value + np.int64(load_u16(data, key_end))
            if _is_declared(keys, key_bounds, first, last, data, key, key_end - key):
                declared_pool[declared] = 123 if declared == declared_start else 44
                declared = _write_quoted(declared_pool, declared + 1, data, key, key_end)
                declared_pool[declared] = 58
                declared = _write_quoted(declared_pool, declared + 1, data, value, position)
            else:
                other_pool[other] = 123 if other == other_start else 44
                other = _write_quoted(other_pool, other + 1, data, key, key_end)
                other_pool[other] = 58
                other = _write_quoted(other_pool, other + 1, data, value, position)
        if declared > declared_start:
            declared_pool[declared] = 125
            declared += 1
        if other > other_start:
            other_pool[other] = 125
            other += 1
        declared_ends[e] = declared
        other_ends[e] = other
    return declared, other


@nb.njit(nogil=True, cache=True)
def is_ordered(key: Any) -> bool:
    """Whether a column (uint64) never falls."""
    before = key[0]
    ordered = True
    for i in range(len(key)):
        ordered = ordered and key[i] >= before
        before = key[i]
    return ordered


@nb.njit(nogil=True, cache=True)
def order_by(key: Any, bits: Any, order: Any, spare: Any, counts: Any) -> bool:
    """Sort `order` (int32[n], rows) by a key (uint64[n]) of so many bits, stably, least significant digit first.

    Returns whether the result is in `spare` instead of `order`. `counts` is int64[DIGIT_VALUES] of scratch.
    """
    n = len(key)
    mask = np.uint64(DIGIT_VALUES - 1)
    source = order
    target = spare
    swapped = False
    shift = 0
    while shift < bits:
        by = np.uint64(shift)
        counts[:] = 0
        for i in range(n):
            counts[np.int64((key[i] >> by) & mask)] += 1
        total = np.int64(0)
        for d in range(DIGIT_VALUES):
            count = counts[d]
            counts[d] = total
            total += count
        for j in range(n):
            row = source[j]
            digit = np.int64((key[row] >> by) & mask)
            target[counts[digit]] = row
            counts[digit] += 1
        source, target = target, source
        swapped = not swapped
        shift += _DIGITS
    return swapped


def warm_up() -> None:
    """Compile every kernel here, or load it from the cache."""
    data = np.zeros(128, np.uint8)
    data.setflags(write=False)  # as mapped files are: another type to the compiler
    wide = np.zeros((WIDE_FIELDS, 1), np.int64)
    pool = np.zeros(64, np.uint8)
    state = np.zeros(STATE_FIELDS, np.int64)
    limbs = np.zeros(LIMBS, np.int64)
    none = np.zeros(0, np.int64)
    index = np.full(16, -1, np.int32)
    codes = np.zeros((0, CODE_FIELDS), np.int64)
    index_codes(pool, codes, index)
    decode_records(
        data,
        np.zeros((0, 5), np.int64),
        pool,
        codes,
        np.zeros((0, VERSION_FIELDS), np.int64),
        index,
        wide,
        np.zeros((NARROW_FIELDS, 1), np.uint8),
        np.zeros((0, PLACE_FIELDS), np.int64),
        np.zeros((0, ENTRY_FIELDS), np.int64),
        none,
        none,
        none,
        state,
    )
    places = np.zeros((0, PLACE_FIELDS), np.int64)
    write_ids(data, places, pool, none, limbs)
    write_texts(data, places, pool, none, limbs)
    pairs = np.zeros((0, 2), np.int64)
    entries = np.zeros((0, ENTRY_FIELDS), np.int64)
    write_sets(data, entries, pool, pairs, pairs, pool, none, pool, none)
    key = np.zeros(1, np.uint64)
    is_ordered(key)
    read = key.copy()
    read.setflags(write=False)  # as columns of files are
    is_ordered(read)
    order = np.zeros(1, np.int32)
    order_by(key, 1, order, order.copy(), np.zeros(DIGIT_VALUES, np.int64))
