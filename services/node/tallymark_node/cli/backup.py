"""`tallymark backup` and `tallymark restore`: a cluster's data in a folder or an object store, and back."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tallymark_node.cli.common import (
    STATUS_INCOMPLETE,
    STATUS_REFUSED,
    Failure,
    Options,
    client_command,
    current_options,
    failure,
    global_options,
    probe,
)

if TYPE_CHECKING:
    from tallymark_node.backup.layout import Backup
    from tallymark_node.backup.target import Target
    from tallymark_runtime.coordinator import Coordinator


@click.command()
@click.argument("target")
@click.option(
    "--coordinator",
    metavar="URL",
    help="The cluster's coordinator, as in the setting of that name. [default: the store's, as --server knows it]",
)
@click.option(
    "--coordinator-prefix",
    metavar="TEXT",
    help="What the cluster's keys begin with in etcd. [default: as the setting]",
)
@click.option(
    "--digests",
    is_flag=True,
    help="Have states compared when the backup is restored. Holds each store up for a moment.",
)
@client_command
async def backup(
    options: Options, target: str, coordinator: str | None, coordinator_prefix: str | None, digests: bool
) -> int | None:
    """Back the cluster up to TARGET, a folder or a URL such as s3://bucket/folder, while it serves.

    What is in the target already is not copied again, so backups that follow are small. Each is complete by itself, and
    is there once the command has ended with status 0. Status 4: it is there, and can be restored, but the archive of a
    partition is not in it, as standard error says.
    """
    from tallymark_node import output
    from tallymark_node.backup.taking import Taker, document
    from tallymark_node.backup.target import open_target
    from tallymark_node.cli.verify import Progress
    from tallymark_node.output import printable
    from tallymark_runtime.clock import RealClock
    from tallymark_runtime.randomness import new_random

    progress = Progress()
    found = await _coordinator(options, coordinator, coordinator_prefix)
    try:
        taker = Taker(
            open_target(target),
            found,
            new_random(),
            digests=digests,
            timeout_s=options.timeout,
            progress=progress,
        )
        summary = await taker.take(RealClock().now_ns())
    except OSError as error:
        raise Failure(f"can't write to {target}: {error}", STATUS_REFUSED, as_json=options.as_json) from error
    finally:
        progress.end()
        await found.close()
    if options.as_json:
        output.document(document(summary))
    else:
        output.line(
            f"backup {summary.number} is in {target}: {summary.bytes:,} bytes in {summary.objects:,} objects, of which "
            f"{summary.written_bytes:,} bytes in {summary.written_objects:,} were written now"
        )
    for lacking in summary.incomplete:
        click.echo(
            printable(_incomplete(lacking.partition, lacking.reason, lacking.raw_events_from)), err=True
        )
    return STATUS_INCOMPLETE if summary.incomplete else None


def _incomplete(partition: int, reason: str, raw_events_from: int) -> str:
    return (
        f"incomplete: partition {partition} without its archive: {reason}; its totals are whole, its raw events are there "
        f"from offset {raw_events_from} on"
    )


async def _coordinator(options: Options, url: str | None, prefix: str | None) -> Coordinator:
    from tallymark_node.config import load
    from tallymark_runtime.coordinator.opening import EMBEDDED, open_remote
    from tallymark_runtime.randomness import new_random

    given = {"coordinator": url, "coordinator_prefix": prefix}
    settings = load(None, os.environ, {name: value for name, value in given.items() if value is not None})
    if settings.coordinator != EMBEDDED:
        return open_remote(settings.coordinator, new_random(), prefix=settings.coordinator_prefix)
    return await _embedded(options)


async def _embedded(options: Options) -> Coordinator:
    """The coordinator that a store embeds: a gateway says where the stores are, and one of them has it."""
    from tallymark_protocol.errors import TallymarkError, UnavailableError
    from tallymark_protocol.messages import ClusterInfo, ClusterStatus
    from tallymark_runtime.catalog import CLUSTER
    from tallymark_runtime.coordinator.remote import RemoteCoordinator
    from tallymark_runtime.peer import PeerClient
    from tallymark_runtime.randomness import new_random

    await probe(options)
    stores: list[str] = []
    error: TallymarkError = UnavailableError("no store is up")
    for address in options.addresses:
        peer = PeerClient(address, rng=new_random(), software="tallymark-cli")
        try:
            info = await peer.call(ClusterStatus(), ClusterInfo, timeout_s=options.timeout)
            stores = [store.address for store in info.stores if store.is_up and store.address]
            break
        except TallymarkError as reason:
            error = reason
        finally:
            await peer.close()
    for store in stores:
        coordinator = RemoteCoordinator(store, rng=new_random(), timeout_s=options.timeout)
        try:
            await coordinator.get(CLUSTER)
        except TallymarkError as reason:
            error = reason
            await coordinator.close()
            continue
        return coordinator
    raise UnavailableError(
        f"no store of this server embeds the coordinator: name it by --coordinator ({error})", retriable=False
    )


@click.command()
@click.argument("target")
@click.option(
    "--data-dir",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="The data directory to be made; new, or empty.",
)
@click.option(
    "--backup", "number", type=click.IntRange(min=1), metavar="N", help="Which one. [default: the newest]"
)
@click.option("--node-id", help="Of the node that the data is for. [default: as the setting]")
@click.option("--list", "only_list", is_flag=True, help="Show which backups there are, and restore nothing.")
@global_options(at_group=False)
def restore(
    target: str,
    data_dir: Path | None,
    number: int | None,
    node_id: str | None,
    only_list: bool,
    server: str | None,
    as_json: bool,
    timeout: float | None,
) -> None:
    """Make a data directory of a backup in TARGET.

    It is one of `tallymark dev`, or of a single store with an embedded coordinator, whatever the cluster was that was
    backed up: a new cluster with one copy of each partition. Start the server on it afterwards.
    """
    options = current_options(server, as_json, timeout)
    from tallymark_node import output
    from tallymark_node.backup import layout
    from tallymark_node.backup.restoring import Restorer
    from tallymark_node.backup.target import open_target
    from tallymark_node.cli.verify import Progress
    from tallymark_node.config import load
    from tallymark_node.output import printable
    from tallymark_protocol.errors import NotFoundError, TallymarkError
    from tallymark_runtime.disk import DiskError
    from tallymark_runtime.randomness import new_random
    from tallymark_store.checkpoint import CheckpointError

    if data_dir is None and not only_list:
        raise click.UsageError("--data-dir says what is to be made")
    progress = Progress()
    try:
        place = open_target(target)
        known = layout.numbers(place)
        if only_list:
            _list(target, place, known, as_json=options.as_json)
            return
        assert data_dir is not None, "looked at above"
        if not known or (number is not None and number not in known):
            raise NotFoundError(f"there is no {'such ' if known else ''}backup in {target}")
        backup = layout.load_manifest(place, known[-1] if number is None else number)
        settings = load(None, os.environ, {} if node_id is None else {"node_id": node_id})
        restorer = Restorer(
            place,
            backup,
            data_dir,
            node_id=settings.node_id,
            rng=new_random(),
            segment_bytes=settings.wal_segment_bytes,
            progress=progress,
        )
        restorer.restore()
    except TallymarkError as error:
        problem = failure(error, as_json=options.as_json)
        raise problem from error
    except (DiskError, OSError, CheckpointError) as error:
        raise Failure(f"can't restore: {error}", STATUS_REFUSED, as_json=options.as_json) from error
    finally:
        progress.end()
    if options.as_json:
        output.document({**_document(backup), "backup": backup.number, "data_dir": str(data_dir)})
    else:
        output.line(f"{_told(backup)} is in {data_dir}: start `tallymark dev --data-dir {data_dir}`")
    for part in backup.incomplete:
        click.echo(printable(_incomplete(part.partition, part.archive_problem, part.raw_start)), err=True)


def _list(target: str, place: Target, known: list[int], *, as_json: bool) -> None:
    """Show which backups there are."""
    from tallymark_node import output
    from tallymark_node.backup import layout
    from tallymark_node.output import printable
    from tallymark_protocol.errors import NotFoundError

    if not known and "://" not in target and not Path(target).is_dir():
        raise NotFoundError(f"there is no folder {target}")
    backups = [layout.load_manifest(place, number) for number in known]
    if as_json:
        output.document({"backups": [_document(backup) for backup in backups]})
        return
    for backup in backups:
        output.line(_told(backup))
        for part in backup.incomplete:
            output.line(f"    {printable(_incomplete(part.partition, part.archive_problem, part.raw_start))}")


def _document(backup: Backup) -> dict[str, object]:
    from tallymark_node.output import iso

    return {
        "number": backup.number,
        "taken": iso(backup.taken_ns),
        "taken_ns": backup.taken_ns,
        "bytes": backup.bytes,
        "cluster": backup.cluster.cluster_id,
        "ends": [part.end for part in backup.partitions],
        "incomplete": [
            {
                "partition": part.partition,
                "reason": part.archive_problem,
                "raw_events_from": part.raw_start,
            }
            for part in backup.incomplete
        ],
    }


def _told(backup: Backup) -> str:
    from tallymark_node.output import iso

    return f"backup {backup.number} of {iso(backup.taken_ns)}, {backup.bytes:,} bytes"
