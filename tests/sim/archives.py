"""ARCHIVE-1: what a copy has archived, held against what was accepted, event by event.

Reads the files in a process's folder as anybody would: by the manifest, and with nothing of the store's memory.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable

from tallymark_store.archive import manifest as manifests
from tallymark_store.archive.incoming import is_sound
from tallymark_store.archive.manifest import ArchiveError, Manifest
from tallymark_store.archive.writer import open_file
from tallymark_store.checkpointer import folder

from .logbook import LoggedEvent
from .loop import SimulationError
from .process import Process

_OPERATIONS = ("none", "add", "remove")
_COLUMNS = ("offset", "account", "metric", "value", "operation")


def check_archive(
    process: Process, number: int, accepted: list[LoggedEvent], append_ns: Callable[[int], int]
) -> None:
    """Below its end a copy's archive holds just the accepted events, once each; from there on they are in its log.

    But for those that were dropped, which are just as many as it says, of the times that it says.

    Args:
        process: at rest.
        number: of the partition.
        accepted: all that were ever committed of it, by offset.
        append_ns: when the event at an offset was appended; their times are the same.

    Raises:
        SimulationError: it doesn't.
    """
    store = process.store
    assert store is not None
    where = f"ARCHIVE-1: {process} partition {number}"
    manifest = _manifest(process, number, where)
    if manifest is None or manifest.copy_id != store.replicas[number].copy_id:
        manifest = Manifest(number, "")  # of a copy that was here before, or none
    log_start = store.partitions[number].index.log_start
    if log_start > manifest.end_offset:
        raise SimulationError(
            f"{where}: the archive ends at {manifest.end_offset}, the log begins at {log_start}"
        )
    if manifest.end_offset > store.partitions[number].log_end:
        raise SimulationError(f"{where}: the archive ends at {manifest.end_offset}, behind the log")
    disk = process.disk.at("archive").at(folder(number))
    found: list[tuple[int, int, str, int, str]] = []
    for file in manifest.files:
        if not is_sound(disk, file.name, file):
            raise SimulationError(f"{where}: {file.name} is not what the manifest lists")
        table = open_file(disk, file.name).read(list(_COLUMNS), use_threads=False)
        rows = list(zip(*(table.column(name).to_pylist() for name in _COLUMNS), strict=True))
        if len(rows) != file.rows or any(not file.start_offset <= row[0] < file.end_offset for row in rows):
            raise SimulationError(f"{where}: {file.name} has {len(rows)} rows, some may be out of its range")
        found += rows
    end = bisect.bisect_left(accepted, manifest.end_offset, key=lambda event: event.offset)
    expected = [
        (event.offset, event.account, event.metric, event.value, _OPERATIONS[event.operation])
        for event in accepted[:end]
    ]
    for item in manifest.dropped:
        held = {row[0] for row in found}
        gone = [
            event
            for event in expected
            if event[2] == item.metric
            and event[0] not in held
            and item.start_offset <= event[0] < item.end_offset
            and item.start_ns <= append_ns(event[0]) < min(item.end_ns, item.before_ns)
        ]
        if len(gone) != item.events and not (item.is_at_most and len(gone) < item.events):
            raise SimulationError(f"{where}: {len(gone)} events are gone, and {item} says otherwise")
        expected = sorted(set(expected) - set(gone))
    if sorted(found) != expected:
        wrong = sorted(set(found) ^ set(expected))[:3]
        raise SimulationError(
            f"{where}: {len(found)} events of {len(expected)} below {manifest.end_offset} are archived; first {wrong}"
        )


def _manifest(process: Process, number: int, where: str) -> Manifest | None:
    disk = process.disk.at("archive").at(folder(number))
    if manifests.NAME not in disk.list():
        return None
    file = disk.open(manifests.NAME)
    try:
        return manifests.decode(file.read(0, file.size()).tobytes())
    except ArchiveError as error:
        raise SimulationError(f"{where}: {error}") from error
    finally:
        file.close()
