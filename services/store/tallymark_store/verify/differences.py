"""What differs between two states of a partition at one offset: named as people know it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from tallymark_store.fold import Fold
from tallymark_store.fold import cells as c
from tallymark_store.fold.dimensions import C_CODES, V_END, V_START, VALUES, WIDTH
from tallymark_store.partition import Partition
from tallymark_store.verify.findings import Report
from tallymark_store.verify.totals import Difference, all_cells, compare, is_share, running_totals

NAMED_MAX = 20  # of one kind
PASS_CELLS = 1_000_000  # that are looked at together


def report_differences(running: Partition, recounted: Partition, folder: str, report: Report) -> None:
    """Say which totals differ, and what else does. Both are at one applied offset, and their digests differ.

    Args:
        running: as the checkpoint has it.
        recounted: folded from the log's first record.
        folder: of the checkpoint, in the data directory.
        report: takes the findings.
    """
    number = running.partition
    before = report.count
    passes = max(1, -(-max(running.fold.cell_count, recounted.fold.cell_count) // PASS_CELLS))
    found: list[Difference] = []
    for share in range(passes):
        sides = [running_totals(one.fold, (share, passes)) for one in (running, recounted)]
        found += compare(recounted.fold.schemas, *sides)
    for total in found[:NAMED_MAX]:
        report.find(
            f"the running total of account {total.account}, metric {total.code!r}, in the period from "
            f"{total.start_ns} ns is not what its events say",
            file=folder,
            partition=number,
            expected=total.recounted,
            found=total.running,
        )
    if len(found) > NAMED_MAX:
        report.find(f"{len(found) - NAMED_MAX} further totals differ", file=folder, partition=number)
    _report_days(running.fold, recounted.fold, passes, folder, number, report)
    parts = ("totals, sets, thresholds or alerts", "event ids", "producers' windows", "outcomes")
    for part, one, other in zip(
        parts, running.digest().split("-"), recounted.digest().split("-"), strict=True
    ):
        if one != other and not (part == parts[0] and report.count > before):
            report.find(
                f"the digest of {part} in the checkpoint is not that of a recount",
                file=folder,
                partition=number,
                expected=other,
                found=one,
            )


def _report_days(
    running: Fold, recounted: Fold, passes: int, folder: str, number: int, report: Report
) -> None:
    one: dict[_Key, list[int]] = {}
    other: dict[_Key, list[int]] = {}
    for part in range(passes):
        of_one, of_other = _days(running, (part, passes)), _days(recounted, (part, passes))
        differing = [key for key in {**of_one, **of_other} if of_one.get(key) != of_other.get(key)]
        one |= {key: of_one[key] for key in differing if key in of_one}
        other |= {key: of_other[key] for key in differing if key in of_other}
    keys = sorted({**one, **other})
    for account, slot, start, combination in keys[:NAMED_MAX]:
        key = account, slot, start, combination
        report.find(
            f"the total of account {account}, metric {recounted.schemas.record(slot).schema.code!r}, on the day from "
            f"{start} ns, dimensions {list(combination)}, is not what its events say",
            file=folder,
            partition=number,
            expected=other.get(key, "none"),
            found=one.get(key, "none"),
        )
    if len(keys) > NAMED_MAX:
        report.find(f"{len(keys) - NAMED_MAX} further totals of days differ", file=folder, partition=number)


_Key = tuple[int, int, int, tuple[str, ...]]


def _days(fold: Fold, share: tuple[int, int]) -> dict[_Key, list[int]]:
    """Day cells that are not the same by bytes on both sides would be many where a state is rotten: all are told."""
    dims = fold.dimensions.arrays
    texts: dict[int, tuple[str, ...]] = {}
    found: dict[_Key, list[int]] = {}
    for row in _day_rows(fold, share):
        combination = (row[c.W_KEY] >> 32) & 0xFFFFFFFF
        if combination not in texts:
            codes = dims.combos[combination, C_CODES : C_CODES + WIDTH].tolist()
            texts[combination] = tuple(_value(dims, int(code)) for code in codes)
        key = row[c.W_ACCOUNT] % 2**64, row[c.W_KEY] & 0xFFFFFFFF, row[c.W_START], texts[combination]
        found[key] = row[c.W_COUNT : c.W_LINKS]
    return found


def _day_rows(fold: Fold, share: tuple[int, int]) -> Iterator[list[int]]:
    for cells in all_cells(fold):
        chosen = (cells[:, c.W_KEY] >> 32) & 0xFFFFFFFF != c.PERIOD
        chosen &= is_share(cells[:, c.W_ACCOUNT].view(np.uint64), share)
        yield from cells[chosen].tolist()


def _value(dims: Any, code: int) -> str:
    if code < VALUES:
        return "-" if code == 0 else "other"
    start, end = dims.values[code - VALUES, [V_START, V_END]].tolist()
    return bytes(np.asarray(dims.pool[start:end])).decode(errors="replace")
