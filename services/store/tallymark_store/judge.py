"""The one judge: what becomes of each event of a payload, decided once, at append, by the leader.

`judge_events` looks at an event's own fields and at its metric's schema; the dedup index then decides about
event ids (`DedupIndex.judge`), and `seal` last, so that a repeat of a stored event is told to be a duplicate
even when its period has been sealed since. The order of the checks is part of the contract: a reason is
reported only when every check before it passed.

Nothing here reads a clock: `append_ns` is the batch's stamp, and every bound follows from it.
"""

from __future__ import annotations

from typing import Any

import numba as nb
import numpy as np

from tallymark_protocol import limits
from tallymark_protocol.errors import Reason
from tallymark_protocol.kernels.blake2b import blake2b_128
from tallymark_protocol.kernels.intrinsics import hash_bytes, load_u8, mix64
from tallymark_protocol.layout import TIME_ABSENT
from tallymark_protocol.model import AggType, UniqueType
from tallymark_protocol.payload import (
    C_EVENTS,
    C_ID_BYTES,
    C_ID_ENCODING,
    C_ID_ENDS,
    C_PROPERTY_BYTES,
    C_PROPERTY_ENDS,
    C_TEXT_BYTES,
    C_TEXT_ENCODING,
    C_TEXT_ENDS,
    C_TIME_ENCODING,
    COLUMNS,
    account_at,
    metric_at,
    operation_at,
    properties_at,
    table_end,
    table_start,
    time_at,
    value_at,
)
from tallymark_store.fold.schemas import S_GRACE, SchemaTable, period_bounds

_ACCEPTED = int(Reason.ACCEPTED)
_UNKNOWN_METRIC = int(Reason.UNKNOWN_METRIC)
_BAD_OPERATION = int(Reason.BAD_OPERATION)
_TIME_IN_FUTURE = int(Reason.TIME_IN_FUTURE)
_TIME_BEFORE_EPOCH = int(Reason.TIME_BEFORE_EPOCH)
_PERIOD_SEALED = int(Reason.PERIOD_SEALED)
_VALUE_OUT_OF_RANGE = int(Reason.VALUE_OUT_OF_RANGE)
_VALUE_NOT_TEXT = int(Reason.VALUE_NOT_TEXT)
_VALUE_NOT_NUMBER = int(Reason.VALUE_NOT_NUMBER)
_COUNT = int(AggType.COUNT)
_COUNT_UNIQUE = int(AggType.COUNT_UNIQUE)
_UINT64 = int(UniqueType.UINT64)
_STRING = int(UniqueType.STRING)
_FUTURE = limits.TIME_FUTURE_NS_MAX
_ABSENT = TIME_ABSENT
_TEXT_STRING = 1
_TEXT_U64 = 2

WANTS_NOTHING = 0  # no id, or already rejected
WANTS_INSERT = 1  # look the id up, and remember it
WANTS_LOOKUP = 2  # look the id up only: the event will not be accepted


@nb.njit(nogil=True, cache=True)
def _value_reason(agg: Any, unique_type: Any, text_tag: Any, value: Any) -> int:
    """Whether a value suits its metric; `text_tag` 0 means that it stands in the value column."""
    if agg == _COUNT:
        return _ACCEPTED
    if agg == _COUNT_UNIQUE and unique_type == _STRING:
        return _ACCEPTED if text_tag == _TEXT_STRING else _VALUE_NOT_TEXT
    if text_tag == _TEXT_STRING:
        return _VALUE_NOT_NUMBER
    if agg == _COUNT_UNIQUE and unique_type == _UINT64:
        if text_tag == 0 and value < 0:
            return _VALUE_OUT_OF_RANGE
        return _ACCEPTED
    if text_tag == _TEXT_U64:
        return _VALUE_OUT_OF_RANGE
    return _ACCEPTED


@nb.njit(nogil=True, cache=True)
def judge_events(
    data: Any,
    columns: Any,
    slots: Any,
    agg_types: Any,
    unique_types: Any,
    append_ns: Any,
    verdicts: Any,
) -> int:
    """Judge every event whose verdict is still ACCEPTED by its own fields. Returns how many remain accepted.

    `slots` maps the payload's metric table to slots of the schema arrays, -1 for an unknown metric.
    `verdicts` (uint8[n], in and out) comes in with REPEAT where a chunk is not new.
    """
    accepted = 0
    horizon = append_ns + _FUTURE
    plain_time = columns[C_TIME_ENCODING] != 0
    has_text = columns[C_TEXT_ENCODING] == 2
    for i in range(columns[C_EVENTS]):
        if verdicts[i] != _ACCEPTED:
            continue
        slot = slots[metric_at(data, columns, i)]
        if slot < 0:
            verdicts[i] = _UNKNOWN_METRIC
            continue
        operation = operation_at(data, columns, i)
        if operation > 2 or (operation != 0 and agg_types[slot] != _COUNT_UNIQUE):
            verdicts[i] = _BAD_OPERATION
            continue
        if plain_time:
            time_ns = time_at(data, columns, i)
            if time_ns != _ABSENT:
                if time_ns < 0:
                    verdicts[i] = _TIME_BEFORE_EPOCH
                    continue
                if time_ns > horizon:
                    verdicts[i] = _TIME_IN_FUTURE
                    continue
        text_tag = 0
        if has_text:
            start = table_start(data, columns[C_TEXT_ENDS], columns[C_TEXT_BYTES], i)
            if table_end(data, columns[C_TEXT_ENDS], columns[C_TEXT_BYTES], i) > start:
                text_tag = int(load_u8(data, start))
        reason = _value_reason(agg_types[slot], unique_types[slot], text_tag, value_at(data, columns, i))
        if reason != _ACCEPTED:
            verdicts[i] = reason
            continue
        accepted += 1
    return accepted


@nb.njit(nogil=True, cache=True)
def event_keys(
    data: Any,
    columns: Any,
    slots: Any,
    uids: Any,
    verdicts: Any,
    wants: Any,
    keys_lo: Any,
    keys_hi: Any,
    fingerprints: Any,
    work: Any,
) -> int:
    """Dedup keys and payload fingerprints of the accepted events that carry an id. Returns how many.

    The key is BLAKE2b-128 of (account, metric uid, typed id). The fingerprint covers the payload as sent:
    value, time (absent is a value of its own), operation, properties, text. `wants` is set per event.
    """
    if columns[C_ID_ENCODING] != 2:
        wants[:] = 0
        return 0
    count = 0
    has_text = columns[C_TEXT_ENCODING] == 2
    for i in range(columns[C_EVENTS]):
        wants[i] = 0
        if verdicts[i] != _ACCEPTED:
            continue
        start = table_start(data, columns[C_ID_ENDS], columns[C_ID_BYTES], i)
        end = table_end(data, columns[C_ID_ENDS], columns[C_ID_BYTES], i)
        if end == start:
            continue
        uid = uids[slots[metric_at(data, columns, i)]]
        account = account_at(data, columns, i)
        lo, hi = blake2b_128(np.uint64(account), np.uint64(uid), data, start, end, work)
        state = mix64(np.uint64(value_at(data, columns, i)))
        state = mix64(state ^ np.uint64(time_at(data, columns, i)))
        state = mix64(state + np.uint64(operation_at(data, columns, i)))
        properties = properties_at(data, columns, i)
        if properties > 0:
            a = table_start(data, columns[C_PROPERTY_ENDS], columns[C_PROPERTY_BYTES], properties - 1)
            b = table_end(data, columns[C_PROPERTY_ENDS], columns[C_PROPERTY_BYTES], properties - 1)
            state = hash_bytes(data, a, b, state)
        if has_text:
            a = table_start(data, columns[C_TEXT_ENDS], columns[C_TEXT_BYTES], i)
            b = table_end(data, columns[C_TEXT_ENDS], columns[C_TEXT_BYTES], i)
            if b > a:  # an event without one is the same whether or not others of its payload have one
                state = mix64(hash_bytes(data, a, b, state))
        keys_lo[i] = lo
        keys_hi[i] = hi
        fingerprints[i] = state
        wants[i] = 1
        count += 1
    return count


@nb.njit(nogil=True, cache=True)
def sealed_events(
    data: Any, columns: Any, slots: Any, arrays: Any, append_ns: Any, verdicts: Any, sealed: Any
) -> int:
    """Mark in `sealed` (uint8[n]) the accepted events whose period's grace has run out; returns how many.

    A period [start, end) is sealed once append time has passed end + grace.
    """
    count = 0
    for i in range(columns[C_EVENTS]):
        sealed[i] = 0
        if verdicts[i] != _ACCEPTED:
            continue
        slot = slots[metric_at(data, columns, i)]
        grace = arrays.slots[slot, S_GRACE]
        if grace < 0:
            continue
        time_ns = time_at(data, columns, i)
        if time_ns == _ABSENT:
            continue
        _, end = period_bounds(arrays, slot, time_ns)
        if end < append_ns and append_ns - end > grace:
            sealed[i] = 1
            count += 1
    return count


@nb.njit(nogil=True, cache=True)
def time_range(data: Any, columns: Any, append_ns: Any, verdicts: Any) -> Any:
    """The least and the greatest event time among accepted events; (append_ns, append_ns) where none is."""
    if columns[C_TIME_ENCODING] == 0:
        return append_ns, append_ns
    low = np.int64(2**63 - 1)
    high = np.int64(-1)
    for i in range(columns[C_EVENTS]):
        if verdicts[i] != _ACCEPTED:
            continue
        time_ns = time_at(data, columns, i)
        if time_ns == _ABSENT:
            time_ns = append_ns
        low = min(low, time_ns)
        high = max(high, time_ns)
    if high < 0:
        return append_ns, append_ns
    return low, high


def warm_up() -> None:
    """Compile every kernel here, or load it from the cache."""
    data = np.zeros(128, dtype=np.uint8)
    data.setflags(write=False)  # as frames and mapped files are: another type to the compiler
    columns = np.zeros(COLUMNS, dtype=np.int64)
    slots = np.zeros(1, dtype=np.int64)
    kinds = np.zeros(1, dtype=np.int64)
    bytes_ = np.zeros(1, dtype=np.uint8)
    words = np.zeros(1, dtype=np.uint64)
    arrays = SchemaTable().arrays
    judge_events(data, columns, slots, kinds, kinds, 0, bytes_)
    event_keys(
        data, columns, slots, words, bytes_, bytes_, words, words, words, np.zeros(32, dtype=np.uint64)
    )
    sealed_events(data, columns, slots, arrays, 0, bytes_, bytes_)
    time_range(data, columns, 0, bytes_)
