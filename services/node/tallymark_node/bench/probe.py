"""What a server under measurement says of itself, and what the system says of it.

Its own figures come from its telemetry; memory, handles and processor time from /proc; files from the data directory.
"""

from __future__ import annotations

import http.client
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import msgspec

_TIMEOUT_S = 60.0  # a server that is busy answers late
_TICKS = os.sysconf("SC_CLK_TCK")


class Reading(msgspec.Struct, frozen=True, kw_only=True):
    """A server at one moment."""

    at_s: float  # of whatever clock the caller has
    anonymous_bytes: int  # memory of its own
    mapped_bytes: int  # pages of files that it has mapped: the system's to keep or to drop
    handles: int
    cpu_s: float  # of all its threads, since its start
    log_bytes: int
    recycled_bytes: int
    archive_bytes: int
    archive_files: int
    archived: int  # offsets, of all partitions
    archive_lag: int  # offsets that are committed and not archived
    checkpoint_bytes: int
    checkpoint_files: int
    remembered_ids: int
    ids_on_disk: int
    totals_bytes: int
    merges: int
    log_full: bool


def free_port() -> int:
    """A port that nothing listens on at present."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Probe:
    """Reads one server.

    Args:
        pid: its process.
        telemetry: "host:port" of its telemetry.
        data_dir: its data directory.
    """

    def __init__(self, pid: int, telemetry: str, data_dir: Path) -> None:
        self._pid = pid
        self._address = telemetry
        self._data_dir = data_dir

    def read(self, at_s: float) -> Reading:
        """Ask for everything. Raises OSError where the server doesn't answer."""
        figures = self._figures()
        status = self._status()
        archived = figures.get("tallymark_partition_archived", 0.0)
        committed = figures.get("tallymark_partition_high_watermark", 0.0)
        folder = self._data_dir / "store" / "checkpoints"
        sizes = list(_sizes(folder))
        fields = Path(f"/proc/{self._pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        return Reading(
            at_s=at_s,
            anonymous_bytes=status["RssAnon"],
            mapped_bytes=status["RssFile"] + status["RssShmem"],
            handles=sum(1 for _ in Path(f"/proc/{self._pid}/fd").iterdir()),
            cpu_s=(int(fields[11]) + int(fields[12])) / _TICKS,
            log_bytes=int(figures.get("tallymark_store_log_bytes", 0)),
            recycled_bytes=int(figures.get("tallymark_store_recycled_bytes_total", 0)),
            archive_bytes=int(figures.get("tallymark_partition_archive_bytes", 0)),
            archive_files=int(figures.get("tallymark_partition_archive_files", 0)),
            archived=int(archived),
            archive_lag=int(committed - archived),
            checkpoint_bytes=sum(sizes),
            checkpoint_files=len(sizes),
            remembered_ids=int(figures.get("tallymark_partition_remembered_ids", 0)),
            ids_on_disk=int(figures.get("tallymark_partition_remembered_ids_on_disk", 0)),
            totals_bytes=int(figures.get("tallymark_partition_totals_bytes", 0)),
            merges=int(figures.get("tallymark_store_archive_merges_total", 0)),
            log_full=bool(figures.get("tallymark_store_log_full", 0)),
        )

    def archive_lag(self) -> int:
        """How many committed offsets are not archived."""
        figures = self._figures()
        committed = figures.get("tallymark_partition_high_watermark", 0.0)
        return int(committed - figures.get("tallymark_partition_archived", 0.0))

    def _figures(self) -> dict[str, float]:
        """By name, the sum over all labels."""
        connection = http.client.HTTPConnection(self._address, timeout=_TIMEOUT_S)
        try:
            connection.request("GET", "/metrics")
            text = connection.getresponse().read().decode()
        finally:
            connection.close()
        found: dict[str, float] = {}
        for line in text.splitlines():
            if line and not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                name = name.partition("{")[0]
                found[name] = found.get(name, 0.0) + float(value)
        return found

    def _status(self) -> dict[str, int]:
        found = {}
        for line in Path(f"/proc/{self._pid}/status").read_text(encoding="ascii").splitlines():
            name, _, rest = line.partition(":")
            if name.startswith("Rss"):
                found[name] = int(rest.split()[0]) * 1024
        return found


def _sizes(folder: Path) -> Iterator[int]:
    """Sizes of all files in a folder, which come and go meanwhile."""
    for path in folder.rglob("*"):
        try:
            if path.is_file():
                yield path.stat().st_size
        except FileNotFoundError:
            continue


def tree_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(_sizes(folder))
