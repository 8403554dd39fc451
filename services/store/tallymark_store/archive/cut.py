"""A part of an archive's file, by offsets, as a file of its own.

For copies that begin with a snapshot: the archive that they get may reach beyond it, in a file that can't be taken as it
is; and what they have themselves may reach into what they get. One row group is held at a time, and what is to be
written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from tallymark_runtime.disk import Disk
from tallymark_store.archive.manifest import ArchiveError, ArchiveFile, file_name
from tallymark_store.archive.merge import joined
from tallymark_store.archive.writer import ROW_GROUP_ROWS, FileWriter, open_file


def cut(
    disk: Disk,
    name: str,
    file: ArchiveFile,
    offset: int,
    new_name: str,
    metadata: Mapping[str, str],
    check: Callable[[], None] = lambda: None,
    *,
    first: int | None = None,
) -> ArchiveFile | None:
    """Write what a file holds at offsets of [first, offset), in its range; None, and no file, where that is nothing.

    Args:
        disk: the folder.
        name: which the file has at present; its bytes have been looked at.
        file: what is listed of it.
        offset: exclusive.
        new_name: under which the part is written, durable in content.
        metadata: of the new file.
        check: called between pieces; what it raises ends it.
        first: inclusive; None: from the file's beginning.

    Raises:
        ArchiveError: it can't be read.
        DiskError: the disk refused.
    """
    first = file.start_offset if first is None else first
    assert file.start_offset <= first < offset <= file.end_offset, "a part is cut out of it"

    def chosen(_: int, group: pa.Table) -> npt.NDArray[np.bool_]:
        offsets = group.column("offset").to_numpy()
        found: npt.NDArray[np.bool_] = (offsets >= first) & (offsets < offset)
        return found

    made = write_part(disk, file, open_file(disk, name), chosen, new_name, metadata, check)
    if made is None:
        return None
    return msgspec.structs.replace(
        made, name=file_name(first, offset), start_offset=first, end_offset=offset, rewritten=0
    )


def write_part(
    disk: Disk,
    file: ArchiveFile,
    opened: pq.ParquetFile,
    choose: Callable[[int, pa.Table], npt.NDArray[np.bool_]],
    new_name: str,
    metadata: Mapping[str, str],
    check: Callable[[], None] = lambda: None,
) -> ArchiveFile | None:
    """Write some rows of a file to another one; None, and no file, where that is nothing. Raises as `cut`.

    Args:
        disk: the folder.
        file: what is listed of it.
        opened: the same.
        choose: given a row group and its number, says which rows.
        new_name: as for `cut`.
        metadata: likewise.
        check: likewise.
    """
    writer: FileWriter | None = None
    waiting: list[pa.Table] = []
    low = high = 0
    rows = 0
    try:
        for number, group in enumerate(_groups(opened)):
            check()
            part = group.filter(pa.array(choose(number, group)))
            if not part.num_rows:
                continue
            times = part.column("time_ns").to_numpy()
            low = min(low, int(times.min())) if rows else int(times.min())
            high = max(high, int(times.max())) if rows else int(times.max())
            rows += part.num_rows
            waiting.append(part)
            if sum(piece.num_rows for piece in waiting) >= ROW_GROUP_ROWS:
                table = joined(waiting)
                writer = writer or FileWriter(disk, new_name, table.slice(0, ROW_GROUP_ROWS), metadata)
                writer.write(table.slice(0, ROW_GROUP_ROWS))
                waiting = [table.slice(ROW_GROUP_ROWS)]
        if waiting and (writer is None or waiting[0].num_rows):
            table = joined(waiting)
            writer = writer or FileWriter(disk, new_name, table, metadata)
            writer.write(table)
    except BaseException:
        if writer is not None:
            writer.abandon()
        raise
    if writer is None:
        return None
    written = writer.close()
    return msgspec.structs.replace(
        file,
        at_home=False,
        rows=rows,
        bytes=written.size,
        crc32c=written.crc32c,
        tail_bytes=written.tail_bytes,
        tail_crc32c=written.tail_crc32c,
        min_time_ns=low,
        max_time_ns=high,
    )


def _groups(file: pq.ParquetFile) -> Iterator[pa.Table]:
    for number in range(file.num_row_groups):
        try:
            yield file.read_row_group(number, use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise ArchiveError(f"an archive's file cannot be read: {error}") from error
