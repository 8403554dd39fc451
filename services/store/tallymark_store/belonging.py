"""Which cluster a data directory belongs to: the file CLUSTER in it, made with it, holds the cluster's id.

Metrics' uids and epochs are revisions of one coordinator's history; under another one they would stand for others.
"""

from __future__ import annotations

from tallymark_protocol.errors import UnavailableError
from tallymark_runtime.catalog import Cluster
from tallymark_runtime.disk import Disk

_CLUSTER_FILE = "CLUSTER"


def check_cluster(disk: Disk, cluster: Cluster) -> None:
    """Refuse a data directory of another cluster, or one whose coordinator's state is gone, before any write.

    Raises:
        UnavailableError: it is one; nothing was changed.
    """
    mark = cluster.cluster_id.encode()
    if _CLUSTER_FILE not in disk.list():
        if disk.at("wal").list():
            raise UnavailableError(
                f"the store's data has no file {_CLUSTER_FILE}; restore it", retriable=False
            )
        temporary = _CLUSTER_FILE + ".new"
        file = disk.create(temporary)
        file.write_sync(0, [mark])
        file.close()
        disk.rename(temporary, _CLUSTER_FILE)
        disk.sync_dir()
        return
    file = disk.open(_CLUSTER_FILE)
    found = file.read(0, file.size()).tobytes()
    file.close()
    if found != mark:
        raise UnavailableError(
            "the store's data belongs to another cluster than the coordinator's state: one of the two was lost or "
            "replaced. Restore both from one backup; nothing was changed",
            retriable=False,
        )
