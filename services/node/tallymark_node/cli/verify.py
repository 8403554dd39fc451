"""`tallymark verify`: is what a stopped server has on disk as it was written, and every total what its events say?"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tallymark_node.cli.common import STATUS_REFUSED, STATUS_USAGE, Failure, current_options, global_options

if TYPE_CHECKING:
    from tallymark_runtime.catalog import Cluster
    from tallymark_store.verify import Report

_HALF = 0  # of the machine's memory, is what a recount may take
_SHOWN_MAX = 100  # findings; all are in the JSON document


@click.command()
@click.option(
    "--data-dir", required=True, metavar="DIR", type=click.Path(path_type=Path), help="Where the data lies."
)
@click.option(
    "--dedup-window-seconds",
    type=click.IntRange(min=0),
    metavar="N",
    help="How long the cluster remembers event ids, if its coordinator is elsewhere. [default: 35 days]",
)
@global_options(at_group=False)
def verify(
    data_dir: Path,
    dedup_window_seconds: int | None,
    server: str | None,
    as_json: bool,
    timeout: float | None,
) -> None:
    """Read everything in a stopped server's data directory again, and count its events again.

    Every byte of log, checkpoints and archive is compared with its checksum, the archive with the log, and all totals
    with a new count from raw events. Nothing is changed; a count that memory has no room for takes some of TMPDIR. What is found names file, position and partition.

    Exit status: 0 nothing is wrong; 1 something is.
    """
    options = current_options(server, as_json, timeout)
    from tallymark_protocol.errors import UnavailableError
    from tallymark_runtime.disk import DiskError

    try:
        report = verify_directory(data_dir, dedup_window_seconds, Progress())
    except (UnavailableError, DiskError, OSError) as error:
        raise Failure(f"can't verify {data_dir}: {error}", STATUS_REFUSED, as_json=options.as_json) from error
    _show(report, as_json=options.as_json)
    if report.count:
        click.get_current_context().exit(STATUS_REFUSED)


class Progress:
    """One line on a terminal's standard error that is written over."""

    def __init__(self) -> None:
        self._is_terminal = sys.stderr.isatty()
        self._said = ""

    def __call__(self, what: str) -> None:
        """Say what is looked at."""
        if self._is_terminal and what != self._said:
            self._said = what
            sys.stderr.write(f"\r\x1b[K{what}")
            sys.stderr.flush()

    def end(self) -> None:
        """Clear the line."""
        if self._said:
            sys.stderr.write("\r\x1b[K")


def verify_directory(data_dir: Path, dedup_window_seconds: int | None, progress: Progress) -> Report:
    """Verify the coordinator's state, where it is embedded, and the store's folder.

    Raises:
        Failure: there is no data directory of a store.
        UnavailableError: a server has it open.
        DiskError, OSError: it can't be read.
    """
    from tallymark_protocol.errors import UnavailableError
    from tallymark_protocol.limits import DEDUP_WINDOW_NS
    from tallymark_runtime.disk import DiskError, RealDisk
    from tallymark_runtime.read_only_disk import ReadOnlyDisk
    from tallymark_store import memory_budget
    from tallymark_store.verify import Report, Scratch, StoreDirectory

    store, prefix = data_dir / "store", "store/"
    if not store.is_dir():
        store, prefix = data_dir, ""
    if not (store / "wal").is_dir():
        raise Failure(f"{data_dir} is no data directory of a store", STATUS_USAGE)
    disk = ReadOnlyDisk(store)
    try:
        disk.lock("LOCK")
    except DiskError as error:
        raise UnavailableError("a server has it open; stop that first", retriable=False) from error
    try:
        report = Report(progress)
        cluster = _coordinator(data_dir / "coordinator", report)
        if cluster is None:
            window_ns = DEDUP_WINDOW_NS if dedup_window_seconds is None else dedup_window_seconds * 10**9
        else:
            window_ns = cluster.dedup_window_ns
        with tempfile.TemporaryDirectory(prefix="tallymark-verify-") as folder:
            directory = StoreDirectory(
                disk,
                report,
                cluster=cluster,
                prefix=prefix,
                dedup_window_ns=window_ns,
                scratch=Scratch(
                    RealDisk(Path(folder)),
                    cell_bytes=memory_budget.cells_of(_HALF) or 0,
                    alert_bytes=memory_budget.alerts_of(_HALF) or 0,
                ),
            )
            directory.verify()
    finally:
        disk.unlock()
        progress.end()
    return report


def _coordinator(folder: Path, report: Report) -> Cluster | None:
    """The cluster's constants, by the state of the coordinator that is embedded here; None where there is none."""
    from tallymark_protocol.errors import RemoteProtocolError
    from tallymark_runtime.catalog import CLUSTER, Cluster, decode_value
    from tallymark_runtime.coordinator.local import DamagedStateError, read_image

    if not folder.is_dir():
        report.note("the coordinator's state is not in this directory, and was not looked at")
        return None
    path = "coordinator/coordinator.state"
    try:
        image = read_image(folder)
    except DamagedStateError as error:
        report.find(error.message, file=path)
        return None
    report.looked_at("coordinator states")
    found = [item for item in image.items if item.key == CLUSTER] if image is not None else []
    if not found:
        report.find("the coordinator's state knows of no cluster", file=path)
        return None
    try:
        return decode_value(Cluster, found[0])
    except RemoteProtocolError as error:
        report.find(error.message, file=path)
        return None


def _show(report: Report, *, as_json: bool) -> None:
    from tallymark_node import output

    if as_json:
        import msgspec

        output.document(
            {
                "ok": report.count == 0,
                "findings": msgspec.to_builtins(report.findings),
                "finding_count": report.count,
                "notes": report.notes,
                "looked_at": report.counted,
            }
        )
        return
    for note in report.notes:
        output.line(f"note: {note}")
    for finding in report.findings[:_SHOWN_MAX]:
        where = finding.file + (f" at byte {finding.position}" if finding.position >= 0 else "")
        where += f"{', ' if where else ''}partition {finding.partition}" if finding.partition >= 0 else ""
        output.line(f"{where}: {finding.sentence}" if where else finding.sentence)
        if finding.expected or finding.found:
            output.line(f"    expected {finding.expected or 'nothing'}")
            output.line(f"    found    {finding.found or 'nothing'}")
    looked = ", ".join(f"{count:,} {what}" for what, count in report.counted.items())
    output.line(f"looked at: {looked}")
    if report.count:
        more = f" (the first {_SHOWN_MAX} are shown)" if report.count > _SHOWN_MAX else ""
        output.line(f"{report.count} finding{'s' if report.count != 1 else ''}{more}")
    else:
        output.line("nothing is wrong")
