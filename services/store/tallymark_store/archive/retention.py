"""Raw events that were kept for as long as their metric wants them kept: which these are, and a file without them.

A metric's schema says for how many days its raw events are kept (`retain_raw_days`), and a partition's log time says what
the time is, unless this node's own clock is behind it: a leader's clock that ran ahead can't have anything dropped before
its time on other nodes. So *which* events go one after the other is the same for all copies; *when* is each copy's own
affair, as each answers exactly until then, and says afterwards that it can't. An event goes once it was both timed and
appended before `cutoff_ns`. That moves in steps of a day or of an eighth of the time, so a file is written again a few
times in all, and not every day.

A file that was looked at once says from when on it is to be looked at again (`ArchiveFile.due`), metric by metric: until
then nobody opens it, whatever rules come and go, and however often this store is started.

What goes is counted, by metric, and the manifest says how many events of which times that were, for ever: reads that
would need one of them are refused by that.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Mapping
from typing import Final, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from tallymark_runtime.disk import Disk
from tallymark_store.archive.cut import write_part
from tallymark_store.archive.manifest import ArchiveError, ArchiveFile, Dropped, file_name
from tallymark_store.archive.merge import verify
from tallymark_store.archive.writer import open_file
from tallymark_store.fold.schemas import SchemaTable

DAY_NS: Final = 86_400 * 10**9
STEPS: Final = 8  # that the time takes to pass, at most
DUE_MAX: Final = 64  # ranges of metrics of which a file says when it is to be looked at again
_FOREVER: Final = 2**63 - 1

Due = tuple[tuple[int, int, int], ...]  # as in `ArchiveFile`

Mask = npt.NDArray[np.bool_]


class Rule(NamedTuple):
    """What goes of one metric."""

    metric: str
    cutoff_ns: int  # events that were timed and appended before


class Swept(NamedTuple):
    """What became of a file."""

    file: ArchiveFile | None  # what is left of it, in a file of its own; None: nothing
    dropped: tuple[Dropped, ...]  # empty: the file is as it was
    due: Due = ()  # of what is left


def cutoff_ns(days: int, now_ns: int, day_ns: int) -> int:
    """Up to which time events are dropped that are kept for so many days; 0: none yet."""
    step = max(days // STEPS, 1) * day_ns
    return max(now_ns // step * step - days * day_ns, 0)


def rules(schemas: SchemaTable, now_ns: int) -> dict[int, Rule]:
    """What goes by now, by the uids of metrics."""
    found = {}
    for slot in range(schemas.count):
        record = schemas.record(slot)
        days = record.schema.retain_raw_days
        if days is None:
            continue
        cutoff = cutoff_ns(days, now_ns, DAY_NS)
        if cutoff > 0:
            found[record.uid] = Rule(record.schema.code, cutoff)
    return found


def is_due(file: ArchiveFile, ruled: Mapping[int, Rule]) -> bool:
    """Whether a file may hold something that goes, by what is known of it without opening it."""
    if not file.due:
        return any(file.min_time_ns < rule.cutoff_ns for rule in ruled.values())
    uids = sorted(ruled)
    for first, last, due_ns in file.due:
        for uid in uids[bisect.bisect_left(uids, first) : bisect.bisect_right(uids, last)]:
            if due_ns < ruled[uid].cutoff_ns:
                return True
    return False


def coarse(ranges: Iterable[tuple[int, int, int]]) -> Due:
    """No more ranges than a file may have of them: adjacent ones become one, with the lowest time."""
    known: dict[tuple[int, int], int] = {}
    for first, last, due_ns in ranges:
        known[first, last] = min(due_ns, known.get((first, last), _FOREVER))
    ordered = [(*bounds, known[bounds]) for bounds in sorted(known)]
    of = max(-(-len(ordered) // DUE_MAX), 1)
    return tuple(
        (part[0][0], max(last for _, last, _ in part), min(due_ns for _, _, due_ns in part))
        for part in (ordered[at : at + of] for at in range(0, len(ordered), of))
    )


def old_rows(table: pa.Table, cutoffs: Mapping[int, int]) -> Mask:
    """Which rows were timed and appended before the cutoff of their metric's uid."""
    uids = np.array(sorted(cutoffs), np.uint64)
    bounds = np.array([cutoffs[uid] for uid in sorted(cutoffs)] or [0], np.int64)
    own = table.column("metric_uid").to_numpy()
    place = np.minimum(uids.searchsorted(own), len(bounds) - 1)
    is_ruled = (uids[place] == own) if len(uids) else np.zeros(len(own), np.bool_)
    bound = bounds[place]
    old: Mask = is_ruled & (table.column("time_ns").to_numpy() < bound)
    old &= table.column("append_time_ns").to_numpy() < bound
    return old


def sweep(
    disk: Disk,
    file: ArchiveFile,
    ruled: Mapping[int, Rule],
    metadata: Mapping[str, str],
    check: Callable[[], None] = lambda: None,
) -> Swept:
    """Write a file without what goes, durable in content; nothing is written where nothing, or everything, goes.

    Raises:
        ArchiveError: the file is damaged.
        DiskError: the disk refused.
    """
    opened = open_file(disk, file.name)
    cutoffs = {uid: rule.cutoff_ns for uid, rule in ruled.items()}
    try:
        told = _told(opened.metadata)
        if not is_due(msgspec.structs.replace(file, due=told), ruled):
            return Swept(file, (), told)
        verify(disk, file)  # what goes is never looked at again
        check()
        masks: list[Mask] = []
        found: dict[int, Dropped] = {}
        earliest: dict[int, int] = {}
        for group in range(opened.num_row_groups):
            check()
            keys = opened.read_row_group(
                group, columns=["metric_uid", "time_ns", "append_time_ns", "offset"], use_threads=False
            )
            old = old_rows(keys, cutoffs)
            masks.append(old)
            _count(found, keys.filter(pa.array(old)), ruled)
            _take_earliest(earliest, keys.filter(pa.array(~old)))
    except (pa.ArrowException, OSError) as error:
        raise ArchiveError(f"an archive's file cannot be read: {error}") from error
    dropped = tuple(found[uid] for uid in sorted(found))
    due = coarse((uid, uid, due_ns) for uid, due_ns in earliest.items())
    gone = sum(item.events for item in dropped)
    if not gone:
        return Swept(file, (), due)
    if gone == file.rows:
        return Swept(None, dropped)
    name = file_name(file.start_offset, file.end_offset, file.rewritten + 1)
    made = write_part(disk, file, opened, lambda group, _: ~masks[group], name, metadata, check)
    assert made is not None, "something is left"
    if made.rows != file.rows - gone:
        raise ArchiveError(f"{made.rows} rows are left of {file.rows} without {gone}")
    left = msgspec.structs.replace(made, name=name, rewritten=file.rewritten + 1, due=due)
    return Swept(left, dropped, due)


def _told(footer: pq.FileMetaData) -> Due:
    """What a footer says of when a file is to be looked at: of its row groups' ranges, and so not too late."""
    places = {footer.schema.column(at).path: at for at in range(footer.num_columns)}
    ranges = []
    for number in range(footer.num_row_groups):
        group = footer.row_group(number)
        columns = [
            group.column(places[name]).statistics for name in ("metric_uid", "time_ns", "append_time_ns")
        ]
        if any(column is None or not column.has_min_max for column in columns):
            return ((0, 2**64 - 1, -(2**63)),)
        uid, time, append = columns
        ranges.append((int(uid.min), int(uid.max), max(int(time.min), int(append.min))))
    return coarse(ranges)


def _take_earliest(earliest: dict[int, int], left: pa.Table) -> None:
    """The time from which on an event would go, of each metric: the later one of its two."""
    if not left.num_rows:
        return
    uids = left.column("metric_uid").to_numpy()
    later = np.maximum(left.column("time_ns").to_numpy(), left.column("append_time_ns").to_numpy())
    first = np.append(0, np.flatnonzero(np.diff(uids)) + 1)  # rows are in the order of uids
    for uid, due_ns in zip(uids[first].tolist(), np.minimum.reduceat(later, first).tolist(), strict=True):
        earliest[uid] = min(due_ns, earliest.get(uid, _FOREVER))


def _count(found: dict[int, Dropped], old: pa.Table, ruled: Mapping[int, Rule]) -> None:
    if not old.num_rows:
        return
    uids = old.column("metric_uid").to_numpy()
    times, offsets = old.column("time_ns").to_numpy(), old.column("offset").to_numpy()
    edges = np.flatnonzero(np.diff(uids)) + 1  # rows are in the order of uids
    for first, last in zip([0, *edges.tolist()], [*edges.tolist(), len(uids)], strict=True):
        uid = int(uids[first])
        item = Dropped(
            metric=ruled[uid].metric,
            metric_uid=uid,
            events=last - first,
            start_ns=int(times[first:last].min()),
            end_ns=int(times[first:last].max()) + 1,
            start_offset=int(offsets[first:last].min()),
            end_offset=int(offsets[first:last].max()) + 1,
            before_ns=ruled[uid].cutoff_ns,
        )
        found[uid] = item if uid not in found else found[uid].plus(item)
