"""Raw events that were kept for as long as their metric wants them kept: which these are, and a file without them.

A metric's schema says for how many days its raw events are kept (`retain_raw_days`), and a partition's log time says what
the time is, unless this node's own clock is behind it: a leader's clock that ran ahead can't have anything dropped before
its time on other nodes. So *which* events go one after the other is the same for all copies; *when* is each copy's own
affair, as each answers exactly until then, and says afterwards that it can't. An event goes once it was both timed and
appended before `cutoff_ns`. That moves in steps of a day or of an eighth of the time, so a file is written again a few
times in all, and not every day.

What goes is counted, by metric, and the manifest says how many events of which times that were, for ever: reads that
would need one of them are refused by that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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

Mask = npt.NDArray[np.bool_]


class Rule(NamedTuple):
    """What goes of one metric."""

    metric: str
    cutoff_ns: int  # events that were timed and appended before


class Swept(NamedTuple):
    """What became of a file."""

    file: ArchiveFile | None  # what is left of it, in a file of its own; None: nothing
    dropped: tuple[Dropped, ...]  # empty: the file is as it was


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
        if not _may_go(opened.metadata, cutoffs):
            return Swept(file, ())
        verify(disk, file)  # what goes is never looked at again
        check()
        masks: list[Mask] = []
        found: dict[int, Dropped] = {}
        for group in range(opened.num_row_groups):
            check()
            keys = opened.read_row_group(
                group, columns=["metric_uid", "time_ns", "append_time_ns", "offset"], use_threads=False
            )
            old = old_rows(keys, cutoffs)
            masks.append(old)
            _count(found, keys.filter(pa.array(old)), ruled)
    except (pa.ArrowException, OSError) as error:
        raise ArchiveError(f"an archive's file cannot be read: {error}") from error
    dropped = tuple(found[uid] for uid in sorted(found))
    gone = sum(item.events for item in dropped)
    if not gone:
        return Swept(file, ())
    if gone == file.rows:
        return Swept(None, dropped)
    name = file_name(file.start_offset, file.end_offset, file.rewritten + 1)
    made = write_part(disk, file, opened, lambda group, _: ~masks[group], name, metadata, check)
    assert made is not None, "something is left"
    if made.rows != file.rows - gone:
        raise ArchiveError(f"{made.rows} rows are left of {file.rows} without {gone}")
    return Swept(msgspec.structs.replace(made, name=name, rewritten=file.rewritten + 1), dropped)


def _may_go(footer: pq.FileMetaData, cutoffs: Mapping[int, int]) -> bool:
    """Whether a row group may hold something that goes."""
    places = {footer.schema.column(at).path: at for at in range(footer.num_columns)}
    uids = np.array(sorted(cutoffs), np.uint64)
    bounds = np.array([cutoffs[uid] for uid in sorted(cutoffs)], np.int64)
    for number in range(footer.num_row_groups):
        group = footer.row_group(number)
        columns = [
            group.column(places[name]).statistics for name in ("metric_uid", "time_ns", "append_time_ns")
        ]
        if any(column is None or not column.has_min_max for column in columns):
            return True
        uid, time, append = columns
        first, last = uids.searchsorted(np.uint64(uid.min)), uids.searchsorted(np.uint64(uid.max), "right")
        if first < last and max(time.min, append.min) < int(bounds[first:last].max()):
            return True
    return False


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
