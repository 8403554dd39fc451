"""Making files of units: packing sorted records into blocks, and merging files.

A file is::

    0      header, see `spilled`
    4096   blocks (see `units`)
           index: int64[blocks, 3], the kind, account and start of the unit that each block's first record belongs to
           filter: u64[filter blocks, 8]; a unit sets six bits in one of them
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tallymark_protocol.kernels import intrinsics
from tallymark_store.fold.cells import CELL_WORDS, W_ACCOUNT, W_KEY, W_START
from tallymark_store.fold.compiling import kernel
from tallymark_store.fold.evicting import U_FIRST, U_LENGTH
from tallymark_store.fold.units import (
    B_COUNT,
    B_SUM,
    BLOCK_BYTES,
    BLOCK_RECORDS,
    BLOCK_WORDS,
    DAMAGED,
    F_COUNT,
    FILTER_PROBES,
    block_sum,
    filter_block,
    is_before,
    is_sound,
    kind_of,
    peek,
    record_address,
    unit_hash,
    unit_length,
)

mix64: Any = intrinsics.mix64

# Figures of a file in the making.
P_RECORDS = 0
P_UNITS = 1
P_KIND = 2  # of the last unit; -1: there is none yet
P_ACCOUNT = 3
P_START = 4
P_FIRST = 5  # lowest start of a day; then of a period
P_LAST = 7
P_FIELDS = 9

_NINE = np.uint64(0x1FF)
_SIX = np.uint64(6)
_SIX_BITS = np.uint64(63)
_ONE = np.uint64(1)


@kernel
def gather(units: Any, order: Any, first: Any, end: Any, records: Any, out: Any) -> Any:
    """Copy the records of the units `order[first:end]` in this order, as far as there is room.

    Returns the place in the order to go on with, and the number of records.
    """
    count = np.int64(0)
    for i in range(first, end):
        at = units[order[i], U_FIRST]
        length = units[order[i], U_LENGTH]
        if count + length > len(out):
            return np.int64(i), count
        for j in range(length):
            for word in range(CELL_WORDS):
                out[count, word] = records[at + j, word]
            count += 1
    return np.int64(end), count


@kernel
def _add_to_filter(filters: Any, h: Any) -> None:
    block = filter_block(h, len(filters))
    bits = mix64(h)
    for probe in range(FILTER_PROBES):
        bit = (bits >> np.uint64(9 * probe)) & _NINE
        filters[block, np.int64(bit >> _SIX)] |= _ONE << (bit & _SIX_BITS)


@kernel
def _seal(blocks: Any, address: Any, b: Any, count: Any, number: Any) -> None:
    blocks[b, B_COUNT] = count
    blocks[b, B_SUM] = block_sum(address + b * BLOCK_BYTES, number)


@kernel
def pack(
    records: Any,
    count: Any,
    blocks: Any,
    address: Any,
    first_block: Any,
    figures: Any,
    index: Any,
    filters: Any,
) -> None:
    """Append sorted records to a file's blocks, of which `blocks` holds those from number `first_block` on.

    There is room in all arrays. Full blocks are sealed.
    """
    for i in range(count):
        kind = kind_of(records[i, W_KEY])
        account = records[i, W_ACCOUNT]
        start = records[i, W_START]
        at = figures[P_RECORDS]
        b = at // BLOCK_RECORDS - first_block
        place = at % BLOCK_RECORDS
        if place == 0:
            for word in range(BLOCK_WORDS):
                blocks[b, word] = 0
            index[at // BLOCK_RECORDS, 0] = kind
            index[at // BLOCK_RECORDS, 1] = account
            index[at // BLOCK_RECORDS, 2] = start
        for word in range(CELL_WORDS):
            blocks[b, place * CELL_WORDS + word] = records[i, word]
        if kind != figures[P_KIND] or account != figures[P_ACCOUNT] or start != figures[P_START]:
            figures[P_KIND] = kind
            figures[P_ACCOUNT] = account
            figures[P_START] = start
            figures[P_UNITS] += 1
            figures[P_FIRST + (kind & 1)] = min(figures[P_FIRST + (kind & 1)], start)
            figures[P_LAST + (kind & 1)] = max(figures[P_LAST + (kind & 1)], start)
            _add_to_filter(filters, unit_hash(kind, account, start))
        figures[P_RECORDS] = at + 1
        if place == BLOCK_RECORDS - 1:
            _seal(blocks, address, b, BLOCK_RECORDS, first_block + b)


@kernel
def seal_last(blocks: Any, address: Any, first_block: Any, figures: Any) -> None:
    """Seal the last block, which is not full."""
    at = figures[P_RECORDS]
    _seal(blocks, address, at // BLOCK_RECORDS - first_block, at % BLOCK_RECORDS, at // BLOCK_RECORDS)


@kernel
def _length_at(files: Any, f: Any, record: Any, checked: Any) -> Any:
    block = record // BLOCK_RECORDS
    if checked[f] != block:
        if not is_sound(files, f, block):
            return np.int64(DAMAGED)
        checked[f] = block
    return unit_length(files, f, record)


@kernel
def merge_units(files: Any, cursors: Any, lengths: Any, checked: Any, out: Any) -> Any:
    """Merge files, the newest first, as many units as there is room for; returns how many records, or DAMAGED.

    `cursors` are the records that are next; `lengths` (-1 everywhere at the start: not known) those of the units there,
    `checked` the blocks that were looked at (likewise). Of several copies of a unit the newest is taken.
    """
    count = np.int64(0)
    while True:
        best = np.int64(-1)
        best_at = np.int64(0)
        for f in range(len(files)):
            if cursors[f] >= files[f, F_COUNT]:
                continue
            if lengths[f] < 0:
                lengths[f] = _length_at(files, f, cursors[f], checked)
                if lengths[f] < 0:
                    return np.int64(DAMAGED)
            at = record_address(files, f, cursors[f])
            if best < 0 or is_before(
                kind_of(peek(at + 8 * W_KEY)), peek(at + 8 * W_ACCOUNT), peek(at + 8 * W_START),
                kind_of(peek(best_at + 8 * W_KEY)), peek(best_at + 8 * W_ACCOUNT), peek(best_at + 8 * W_START),
            ):  # fmt: skip
                best = np.int64(f)
                best_at = at
        if best < 0:
            return count
        if count + lengths[best] > len(out):
            return count
        for j in range(lengths[best]):
            at = record_address(files, best, cursors[best] + j)
            for word in range(CELL_WORDS):
                out[count, word] = peek(at + 8 * word)
            count += 1
        kind = kind_of(peek(best_at + 8 * W_KEY))
        account = peek(best_at + 8 * W_ACCOUNT)
        start = peek(best_at + 8 * W_START)
        for f in range(len(files)):
            if cursors[f] >= files[f, F_COUNT]:
                continue
            at = record_address(files, f, cursors[f])
            if (
                kind_of(peek(at + 8 * W_KEY)) == kind
                and peek(at + 8 * W_ACCOUNT) == account
                and peek(at + 8 * W_START) == start
            ):
                cursors[f] += lengths[f]
                lengths[f] = -1
