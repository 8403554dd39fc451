"""Units that are in files: how they lie there, how they are found, and how they come back.

A **unit** is all that the fold knows of an account's metric in one billing period, or in one day. In a file it is a run
of records of the form of cells, twelve 64-bit words each (see `cells`), the first three of which say whose it is:

    a period's    the cell; of its links only the low 16 bits, what has fired and how many thresholds there are
                  per two entries of its set one of the combination MEMBERS: value, time and offset of each in the words
                  3 to 10; in word 11 what was done, plus one: in the low byte the first's, in the next the second's
                  per four thresholds one of the combination THRESHOLDS: the totals at which they fire next in the
                  words 3 to 10, its place among them in word 11
    a day's       the head's cell, with its flags; then those of the other combinations

Files are sorted by units: metric slot and kind, account, start. They consist of blocks of 4 KiB::

    42 records    count u64    checksum u64    zeros

and are mapped; kernels see a table of addresses, a row per file, the newest first. A block is compared with its
checksum each time that it is looked at for something.

What is looked for goes through a file's range of starts, a filter, and an index of the blocks' first units.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from tallymark_protocol.kernels import intrinsics
from tallymark_store.fold.cells import (
    CELL_WORDS,
    HEAD_KEY,
    NO_COMBO,
    PERIOD,
    W_ACCOUNT,
    W_KEY,
    W_LINKS,
    W_START,
    cell_hash,
    cell_key,
    find_cell,
    find_head,
    head_of,
    new_row,
    next_of,
    set_links,
)
from tallymark_store.fold.compiling import inlined, kernel
from tallymark_store.fold.counters import N_CELLS, N_LOADED, N_MEMBERS, N_SPILLED, N_SPILLED_MEMBERS
from tallymark_store.fold.index import FULL, SHARDS, insert
from tallymark_store.fold.schemas import S_DIMENSIONS
from tallymark_store.fold.thresholds import new_threshold_rows
from tallymark_store.fold.uniques import (
    M_HI,
    M_LO,
    M_OFFSET,
    M_OWNER,
    M_TIME,
    member_hash,
    new_member,
)

fold_multiply: Any = intrinsics.fold_multiply
mix64: Any = intrinsics.mix64

MEMBERS = 0xFFFFFFFC  # in the place of a combination
THRESHOLDS = 0xFFFFFFFD  # likewise
THRESHOLDS_A_RECORD = 4
MEMBERS_A_RECORD = 2

BLOCK_BYTES = 4096
BLOCK_WORDS = BLOCK_BYTES // 8
BLOCK_RECORDS = 42
B_COUNT = BLOCK_RECORDS * CELL_WORDS
B_SUM = B_COUNT + 1
_RECORD_BYTES = 8 * CELL_WORDS

# Columns of the table of files.
F_RECORDS = 0  # address of the first block
F_COUNT = 1  # records
F_BLOCKS = 2
F_INDEX = 3  # address of int64[blocks, 3]: each one's first unit
F_FILTER = 4  # address of u64[filter blocks, 8]
F_FILTER_BLOCKS = 5
F_FIRST = 6  # lowest start of a day; then of a period
F_LAST = 8  # highest start, likewise
FILE_FIELDS = 10

FILTER_PROBES = 6
DAMAGED = -2  # in the place of a file's number

_MASK32 = 0xFFFFFFFF
_PRIME = np.uint64(0x9E3779B97F4A7C15)
_LANE = np.uint64(0xD6E8FEB86659FD93)
_NINE = np.uint64(0x1FF)
_SIX = np.uint64(6)
_SIX_BITS = np.uint64(63)
_ONE = np.uint64(1)
_U32 = np.uint64(32)


@intrinsic
def _peek(typingctx: Any, address: Any) -> Any:  # noqa: ARG001

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        pointer = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.load(pointer, align=1)

    return types.int64(types.int64), codegen


peek: Any = _peek
"""The int64 at an address, which need not be aligned."""


@inlined
def record_address(files: Any, f: Any, record: Any) -> Any:
    """Where a record lies."""
    return (
        files[f, F_RECORDS] + record // BLOCK_RECORDS * BLOCK_BYTES + record % BLOCK_RECORDS * _RECORD_BYTES
    )


@inlined
def kind_of(key: Any) -> Any:
    """Slot and kind of the unit that word 2 of a record belongs to: twice the slot, plus one for a period."""
    return ((key & _MASK32) << 1) | np.int64(1 if (key >> 32) & _MASK32 >= MEMBERS else 0)


@inlined
def is_before(a_kind: Any, a_account: Any, a_start: Any, b_kind: Any, b_account: Any, b_start: Any) -> Any:
    """Whether unit a comes before unit b."""
    if a_kind != b_kind:
        return a_kind < b_kind
    if a_account != b_account:
        return np.uint64(a_account) < np.uint64(b_account)
    return a_start < b_start


@inlined
def unit_hash(kind: Any, account: Any, start: Any) -> Any:
    """Hash of a unit for filters. Files hold it: it must not change."""
    return mix64(mix64(mix64(np.uint64(kind) + _PRIME) ^ np.uint64(account)) ^ np.uint64(start))


@kernel
def block_sum(address: Any, number: Any) -> Any:
    """The checksum of a block: of its records and their count, and of its place in the file."""
    a = np.uint64(number) ^ _PRIME
    b = np.uint64(number) ^ _LANE
    c = np.uint64(number) + _PRIME
    d = np.uint64(number) + _LANE
    # Four lanes, so that the multiplications overlap.
    for word in range(0, B_COUNT, 4):
        at = address + 8 * word
        a = fold_multiply(a ^ np.uint64(peek(at)), _PRIME) + _LANE
        b = fold_multiply(b ^ np.uint64(peek(at + 8)), _PRIME) + _LANE
        c = fold_multiply(c ^ np.uint64(peek(at + 16)), _PRIME) + _LANE
        d = fold_multiply(d ^ np.uint64(peek(at + 24)), _PRIME) + _LANE
    total = mix64(np.uint64(peek(address + 8 * B_COUNT)) ^ a)
    total = mix64(total ^ b)
    total = mix64(total ^ c)
    return np.int64(mix64(total ^ d))


@kernel
def is_sound(files: Any, f: Any, block: Any) -> Any:
    """Whether a block is as it was written."""
    address = files[f, F_RECORDS] + block * BLOCK_BYTES
    expected = min(files[f, F_COUNT] - block * BLOCK_RECORDS, BLOCK_RECORDS)
    return peek(address + 8 * B_COUNT) == expected and peek(address + 8 * B_SUM) == block_sum(address, block)


@inlined
def filter_block(h: Any, blocks: Any) -> Any:
    """The block of a filter that a hash belongs to."""
    return np.int64(((h >> _U32) * np.uint64(blocks)) >> _U32)


@inlined
def _passes(files: Any, f: Any, h: Any) -> Any:
    address = files[f, F_FILTER] + 64 * filter_block(h, files[f, F_FILTER_BLOCKS])
    bits = mix64(h)
    for probe in range(FILTER_PROBES):
        bit = (bits >> np.uint64(9 * probe)) & _NINE
        if (np.uint64(peek(address + 8 * np.int64(bit >> _SIX))) >> (bit & _SIX_BITS)) & _ONE == np.uint64(0):
            return False
    return True


@inlined
def _is_unit_at(address: Any, kind: Any, account: Any, start: Any) -> Any:
    return (
        kind_of(peek(address + 8 * W_KEY)) == kind
        and peek(address + 8 * W_ACCOUNT) == account
        and peek(address + 8 * W_START) == start
    )


@kernel
def _search(files: Any, f: Any, kind: Any, account: Any, start: Any) -> Any:
    """The first record of a unit in a file; -1 where it isn't there, DAMAGED where that can't be said."""
    index = files[f, F_INDEX]
    low = np.int64(0)
    high = files[f, F_BLOCKS]
    while low < high:
        middle = (low + high) >> 1
        at = index + 24 * middle
        if is_before(peek(at), peek(at + 8), peek(at + 16), kind, account, start):
            low = middle + 1
        else:
            high = middle
    block = low
    if block > 0:  # the unit may begin in the block before the one that begins with it, or with what follows
        if not is_sound(files, f, block - 1):
            return np.int64(DAMAGED)
        first = (block - 1) * BLOCK_RECORDS
        low = first
        high = min(first + BLOCK_RECORDS, files[f, F_COUNT])
        end = high
        while low < high:
            middle = (low + high) >> 1
            at = record_address(files, f, middle)
            if is_before(
                kind_of(peek(at + 8 * W_KEY)), peek(at + 8 * W_ACCOUNT), peek(at + 8 * W_START),
                kind, account, start,
            ):  # fmt: skip
                low = middle + 1
            else:
                high = middle
        if low < end and _is_unit_at(record_address(files, f, low), kind, account, start):
            return low
    if block < files[f, F_BLOCKS]:
        at = index + 24 * block
        if peek(at) == kind and peek(at + 8) == account and peek(at + 16) == start:
            if not is_sound(files, f, block):
                return np.int64(DAMAGED)
            return block * BLOCK_RECORDS
    return np.int64(-1)


@kernel
def find_unit(files: Any, first: Any, end: Any, kind: Any, account: Any, start: Any) -> Any:
    """The newest of the files [first, end) that has a unit, and its first record there.

    The file is -1 where none has it, DAMAGED where that can't be said; the record then is the file concerned.
    """
    h = unit_hash(kind, account, start)
    for f in range(first, end):
        if start < files[f, F_FIRST + (kind & 1)] or start > files[f, F_LAST + (kind & 1)]:
            continue
        if not _passes(files, f, h):
            continue
        record = _search(files, f, kind, account, start)
        if record >= 0:
            return np.int64(f), record
        if record == DAMAGED:
            return np.int64(DAMAGED), np.int64(f)
    return np.int64(-1), np.int64(-1)


@kernel
def unit_length(files: Any, f: Any, record: Any) -> Any:
    """How many records the unit that begins with `record` has; DAMAGED where that can't be said.

    The block that it begins in is sound, the caller knows.
    """
    at = record_address(files, f, record)
    kind = kind_of(peek(at + 8 * W_KEY))
    account = peek(at + 8 * W_ACCOUNT)
    start = peek(at + 8 * W_START)
    end = record + 1
    while end < files[f, F_COUNT]:
        if end % BLOCK_RECORDS == 0 and not is_sound(files, f, end // BLOCK_RECORDS):
            return np.int64(DAMAGED)
        if not _is_unit_at(record_address(files, f, end), kind, account, start):
            break
        end += 1
    return end - record


@kernel
def load_unit(
    cells: Any,
    table: Any,
    shards: Any,
    members: Any,
    member_table: Any,
    member_shards: Any,
    rows: Any,
    counters: Any,
    files: Any,
    f: Any,
    record: Any,
    length: Any,
    done: Any,
    combo_count: Any,
    indexed: Any,
    seed: Any,
) -> Any:
    """Bring a unit of `length` records into memory, but for the `done` first ones; its blocks are sound.

    There is room in the dense arrays. Returns how many are in; fewer than `length` when the index is due to grow, -1
    where a record makes no sense. Without `indexed` it's a copy that only scans will see.
    """
    for j in range(done, length):
        at = record_address(files, f, record + j)
        key = peek(at + 8 * W_KEY)
        links = peek(at + 8 * W_LINKS)
        combo = (key >> 32) & _MASK32
        if combo == THRESHOLDS:
            if j == 0:
                return np.int64(-1)
            cell = cells[counters[N_LOADED], W_LINKS]
            first = ((cell >> 32) & _MASK32) - 1
            for q in range(THRESHOLDS_A_RECORD):
                t = links * THRESHOLDS_A_RECORD + q
                if 0 <= t < (cell >> 8) & 0xFF:
                    rows[first + t, 0] = peek(at + 24 + 16 * q)
                    rows[first + t, 1] = peek(at + 32 + 16 * q)
            continue
        # Two at least, so that a small unit is brought back at once: an index stops in time.
        if indexed and shards[SHARDS, FULL] | member_shards[SHARDS, FULL] != 0 and j >= done + 2:
            return np.int64(j)
        if combo == MEMBERS:
            if j == 0:
                return np.int64(-1)
            owner = counters[N_LOADED]
            for q in range(MEMBERS_A_RECORD):
                operation = ((links >> (8 * q)) & 0xFF) - 1
                if operation < 0:
                    continue
                e = new_member(members, counters)
                members[e, M_OWNER] = owner | (operation << 32)
                members[e, M_LO] = peek(at + 24 + 32 * q)
                members[e, M_HI] = peek(at + 32 + 32 * q)
                members[e, M_TIME] = peek(at + 40 + 32 * q)
                members[e, M_OFFSET] = peek(at + 48 + 32 * q)
                if indexed:
                    counters[N_SPILLED_MEMBERS] -= 1
                    h = member_hash(owner, members[e, M_LO], members[e, M_HI], seed)
                    insert(member_table, member_shards, h, e)
            continue
        if combo != PERIOD and combo >= combo_count:
            return np.int64(-1)
        row = new_row(cells, counters)
        for word in range(W_LINKS):
            cells[row, word] = peek(at + 8 * word)
        if j == 0:
            counters[N_LOADED] = row
        if combo == PERIOD:
            count = (links >> 8) & 0xFF
            if count > 8 or j > 0:
                return np.int64(-1)
            cells[row, W_LINKS] = links & 0xFFFF
            if count > 0:
                first = new_threshold_rows(rows, counters, count)
                cells[row, W_LINKS] = (links & 0xFFFF) | ((first + 1) << 32)
        elif j == 0:
            set_links(cells, row, np.int64(-1), (links >> 32) & _MASK32)
        else:
            head = counters[N_LOADED]
            set_links(cells, row, next_of(cells, head), np.int64(0))
            set_links(cells, head, row, head_of(cells, head))
        if indexed:
            counters[N_SPILLED] -= 1
            account = cells[row, W_ACCOUNT]
            start = cells[row, W_START]
            insert(table, shards, cell_hash(account, start, key, seed), row)
            if j == 0 and combo != PERIOD and combo != NO_COMBO:
                h = cell_hash(account, start, cell_key(key & _MASK32, HEAD_KEY), seed)
                insert(table, shards, h, row)
    return np.int64(length)


@kernel
def find_in_memory(
    cells: Any, table: Any, shards: Any, slots: Any, kind: Any, account: Any, start: Any, seed: Any
) -> Any:
    """The row of a unit's first cell, -1 if it isn't in memory."""
    slot = kind >> 1
    if kind & 1:
        key = cell_key(slot, PERIOD)
    elif slots[slot, S_DIMENSIONS] > 0:
        h = cell_hash(account, start, cell_key(slot, HEAD_KEY), seed)
        return find_head(table, shards, cells, h, account, start, slot)
    else:
        key = cell_key(slot, NO_COMBO)
    return find_cell(table, shards, cells, cell_hash(account, start, key, seed), account, start, key)


@kernel
def copy_units(
    state: Any,
    slots: Any,
    f: Any,
    record: Any,
    end: Any,
    kind: Any,
    first_start: Any,
    end_start: Any,
    combo_count: Any,
    seed: Any,
    copy: Any,
) -> Any:
    """Copy the units of a file from `record` on that count: neither memory nor a newer file has them.

    Only of `kind` (-1: any) and with a start in [first_start, end_start). `copy` is a state of its own, without an
    index. Returns the record to go on with, when `copy` is full; -1 where the file is damaged.
    """
    cells = state.cells
    table = state.table
    shards = state.shards
    files = state.files
    counters = copy.counters
    checked = np.int64(-1)
    while record < end:
        block = record // BLOCK_RECORDS
        if block != checked:
            if not is_sound(files, f, block):
                return np.int64(-1)
            checked = block
        length = unit_length(files, f, record)
        if length < 0:
            return np.int64(-1)
        at = record_address(files, f, record)
        its_kind = kind_of(peek(at + 8 * W_KEY))
        account = peek(at + 8 * W_ACCOUNT)
        start = peek(at + 8 * W_START)
        if its_kind >> 1 >= len(slots):
            return np.int64(-1)
        if (kind < 0 or its_kind == kind) and first_start <= start < end_start:
            used = counters[N_CELLS] + counters[N_MEMBERS] // MEMBERS_A_RECORD
            if used + length > len(copy.cells):
                return np.int64(record if used > 0 else -1)
            if find_in_memory(cells, table, shards, slots, its_kind, account, start, seed) < 0:
                newer, _ = find_unit(files, 0, f, its_kind, account, start)
                if newer == DAMAGED:
                    return np.int64(-1)
                if newer < 0:
                    done = load_unit(
                        copy.cells, table, shards, copy.members, state.member_table, state.member_shards, copy.rows,
                        counters, files, f, record, length, 0, combo_count, False, seed,
                    )  # fmt: skip
                    if done < 0:
                        return np.int64(-1)
        record += length
    return record


@kernel
def next_unit(files: Any, f: Any, record: Any, end: Any) -> Any:
    """The first record from `record` on that begins a unit, or `end`; DAMAGED where that can't be said."""
    block = (record - 1) // BLOCK_RECORDS
    if not is_sound(files, f, block) or not is_sound(files, f, record // BLOCK_RECORDS):
        return np.int64(DAMAGED)
    length = unit_length(files, f, record - 1)
    if length < 0:
        return np.int64(DAMAGED)
    return min(record - 1 + length, np.int64(end))


@kernel
def copy_unit(
    state: Any,
    slots: Any,
    kind: Any,
    account: Any,
    start: Any,
    combo_count: Any,
    seed: Any,
    is_whole: Any,
    copy: Any,
) -> Any:
    """Copy one unit if it is in a file and not in memory; its first cell only, unless `is_whole`.

    Returns 0 when that is done or there is nothing to do, the room that it takes where `copy` has less, or -1 where
    the file is damaged.
    """
    if find_in_memory(state.cells, state.table, state.shards, slots, kind, account, start, seed) >= 0:
        return np.int64(0)
    files = state.files
    f, record = find_unit(files, 0, len(files), kind, account, start)
    if f == DAMAGED:
        return np.int64(-1)
    if f < 0:
        return np.int64(0)
    length = unit_length(files, f, record) if is_whole else np.int64(1)
    if length < 0:
        return np.int64(-1)
    if copy.counters[N_CELLS] + length > len(copy.cells):
        return length
    done = load_unit(
        copy.cells, state.table, state.shards, copy.members, state.member_table, state.member_shards, copy.rows,
        copy.counters, files, f, record, length, 0, combo_count, False, seed,
    )  # fmt: skip
    return np.int64(-1) if done < 0 else np.int64(0)
