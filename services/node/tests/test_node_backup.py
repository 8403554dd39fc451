"""Backups of a server that runs, and what is made of them: the same state, and a server that goes on."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from tallymark import AggType, AsyncClient, DimensionFilter, Event, MetricSchema, UniqueType, current_month
from tallymark_node import dev
from tallymark_node.backup import layout, taking
from tallymark_node.backup.restoring import Restorer
from tallymark_node.backup.taking import Taker
from tallymark_node.backup.target import FolderTarget, open_target
from tallymark_node.cli.common import failure
from tallymark_node.config import Settings
from tallymark_node.main import cli
from tallymark_protocol.errors import InvalidRequestError, RemoteProtocolError, ServerError
from tallymark_runtime.coordinator.remote import RemoteCoordinator

NOW = 1_800_000_000 * 10**9
METRICS = [
    MetricSchema(code="sum", agg_type=AggType.SUM, filters=[DimensionFilter(key="z", values=["1", "2"])]),
    MetricSchema(code="users", agg_type=AggType.COUNT_UNIQUE, unique_type=UniqueType.UINT64),
]


def settings_of(folder: Path, **others: object) -> Settings:
    return Settings(
        port=0, data_dir=str(folder), partition_count=2, wal_segment_bytes=1024 * 1024, archive_events=50,
        **{"archive": "on", **others},
    )  # fmt: skip


async def send(client: AsyncClient, first: int, count: int, filler: str = "") -> None:
    """Events with ids, some of them repeats of earlier ones."""
    for code in ("sum", "users"):
        events = [
            Event(
                account_id=i % 7,
                metric_code=code,
                value=i % 5 + 1,
                id=f"{code}-{i}",
                properties={"z": str(i % 3), "filler": filler and f"{filler}{i}"},
            )
            for i in range(max(first - 2, 0), first + count)
        ]
        await client.ingest(events)


async def totals(client: AsyncClient) -> list[object]:
    """What is asked of either server."""
    found = []
    for account in range(7):
        for code in ("sum", "users"):
            usage = await client.query(account, code, current_month())
            found.append(usage.value)
    return found


async def wait_spilled(node: dev.Node) -> None:
    """Wait until there are cells, and none of them is in memory."""
    folds = [partition.fold for partition in node._store.driver.partitions.values()]
    for _ in range(6_000):
        if all(fold.cell_count and not fold.cell_bytes() for fold in folds):
            return
        await asyncio.sleep(0.01)
    raise AssertionError("cells are still in memory")


async def take(node: dev.Node, target: Path, *, digests: bool = True):
    coordinator = RemoteCoordinator(node.store_address, rng=random.Random(1))
    try:
        return await Taker(FolderTarget(target), coordinator, random.Random(2), digests=digests).take(NOW)
    finally:
        await coordinator.close()


def restored(target: Path, folder: Path, number: int = 0) -> Restorer:
    place = FolderTarget(target)
    backup = layout.load_manifest(place, number or layout.numbers(place)[-1])
    restorer = Restorer(
        place, backup, folder, node_id="node-1", rng=random.Random(3), segment_bytes=1024 * 1024
    )
    restorer.restore()
    return restorer


@pytest.mark.parametrize(("archive", "memory_bytes"), [("on", -1), ("", -1), ("on", 1)])
async def test_a_restored_server_has_the_same_state_and_goes_on(
    tmp_path: Path, archive: str, memory_bytes: int
) -> None:
    """Digests and totals are those at the backup; repeats are still known; verify finds nothing wrong."""
    target, folder = tmp_path / "target", tmp_path / "restored"
    async with (
        dev.running(settings_of(tmp_path / "first", archive=archive, memory_bytes=memory_bytes)) as node,
        AsyncClient([node.address]) as client,
    ):
        for schema in METRICS:
            await client.metrics.create(schema)
        await send(client, 0, 300)
        if memory_bytes > 0:
            await wait_spilled(node)
        await node.checkpoint()
        await send(client, 300, 50)
        summary = await take(node, target)
        expected = await totals(client)
        assert summary.number == 1
        assert sum(summary.ends) > 700
        await send(client, 350, 50)  # not in it
        assert await totals(client) != expected
    restorer = restored(target, folder)
    assert len(restorer.digests) == 2
    assert bool(list(folder.rglob("cells-*"))) == (memory_bytes > 0)
    result = CliRunner().invoke(cli, ["verify", "--data-dir", str(folder), "--json"])
    assert json.loads(result.output)["findings"] == []
    assert result.exit_code == 0
    async with (
        dev.running(settings_of(folder, archive=archive, memory_bytes=memory_bytes)) as node,
        AsyncClient([node.address]) as client,
    ):
        assert await totals(client) == expected
        assert [schema.code for schema in await client.metrics.list()] == ["sum", "users"]
        receipt = await client.ingest(
            [Event(account_id=5, metric_code="sum", value=1, id="sum-5", properties={"z": "2", "filler": ""})]
        )
        assert receipt.n_duplicates == 1
        await client.metrics.create(MetricSchema(code="new", agg_type=AggType.COUNT))
        await client.ingest([Event(account_id=1, metric_code="new"), Event(account_id=1, metric_code="sum")])
        assert (await client.query(1, "new", current_month())).value.count == 1
        # A backup of what was restored is one of another cluster.
        assert (await take(node, target)).number == 2
    again = restored(target, tmp_path / "again")
    assert len(again.digests) == 2


async def test_a_log_whose_beginning_was_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies below comes from the checkpoint: the same state, and offsets that go on; also from two backups."""
    made = dev.store_config
    monkeypatch.setattr(
        dev, "store_config", lambda *given: msgspec.structs.replace(made(*given), recycle=True)
    )
    target = tmp_path / "target"
    settings = settings_of(tmp_path / "first", archive="")
    async with dev.running(settings) as node, AsyncClient([node.address]) as client:
        for schema in METRICS:
            await client.metrics.create(schema)
        for start in range(0, 3_000, 500):
            await send(client, start, 500, filler="x" * 1_000)
        await node.checkpoint()
        await take(node, target)
        await send(client, 3_000, 100)
        summary = await take(node, target)
        expected = [(await client.query_realtime(a, "sum")).value for a in range(7)]
    backup = layout.load_manifest(FolderTarget(target), 2)
    assert max(part.log[0].start for part in backup.partitions) > 0
    assert [part.end for part in backup.partitions] == summary.ends
    restorer = restored(target, tmp_path / "restored")
    assert [restorer.digests[part.partition] for part in backup.partitions] == [
        part.digest for part in backup.partitions
    ]
    settings = settings_of(tmp_path / "restored", archive="")
    async with dev.running(settings) as node, AsyncClient([node.address]) as client:
        assert [(await client.query_realtime(a, "sum")).value for a in range(7)] == expected
        again = Event(
            account_id=5,
            metric_code="sum",
            value=1,
            id="sum-5",
            properties={"z": "2", "filler": "x" * 1_000 + "5"},
        )
        assert (await client.ingest([again])).n_duplicates == 1


async def with_a_short_log(node: dev.Node, client: AsyncClient) -> None:
    """Send until something of the log is in archive and checkpoint only, of either partition."""
    for schema in METRICS:
        await client.metrics.create(schema)
    partitions = node._store.driver.partitions.values()
    for turn in range(100):
        await send(client, turn * 500, 500, filler="x" * 1_000)
        await node._store.archiver.take_all()
        await node.checkpoint()
        if all(partition.index.log_start > 0 for partition in partitions):
            return
    raise AssertionError("nothing of the log was dropped")


def command(*arguments: str):
    return asyncio.to_thread(CliRunner().invoke, cli, list(arguments))


async def test_an_archive_that_is_not_in_a_backup_is_told_of(tmp_path: Path) -> None:
    """A file that rots, one that is gone, a refused archive: the rest is kept, and everybody is told; `verify`, too."""
    first, target = tmp_path / "first", str(tmp_path / "target")
    folder = first / "store" / "archive" / "p-0001"
    async with dev.running(settings_of(first)) as node, AsyncClient([node.address]) as client:
        await with_a_short_log(node, client)
        start = node._store.driver.partitions[1].index.log_start
        expected = [(await client.query_realtime(a, "sum")).value for a in range(7)]
        file = min(folder.glob("events-*"))
        content = file.read_bytes()
        place = len(content) // 2
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        arguments = ("backup", target, "--server", node.address)
        rotten = await command(*arguments)
        file.unlink()
        gone = await command(*arguments, "--json")
        file.write_bytes(content)
        assert (await command(*arguments)).exit_code == 0
        node._store.archiver._refuse(1, "as it is of no use")
        refused = await command(*arguments, "--json")
        assert not list(folder.glob("LACKS*"))
    assert rotten.exit_code == 4, rotten.output
    told = f"its totals are whole, its raw events are there from offset {start} on"
    assert rotten.stderr.startswith(f"incomplete: partition 1 without its archive: its file {file.name} is")
    assert told in rotten.stderr
    assert "backup 1 is in" in rotten.stdout
    for result, reason in ((gone, "missing"), (refused, "as it is of no use")):
        assert result.exit_code == 4
        (lacking,) = json.loads(result.stdout)["incomplete"]
        assert (lacking["partition"], lacking["raw_events_from"]) == (1, start)
        assert reason in lacking["reason"]
    listed = await command("restore", target, "--list")
    assert listed.output.count("incomplete: partition 1") == 3
    backups = json.loads((await command("restore", target, "--list", "--json")).output)["backups"]
    assert [len(backup["incomplete"]) for backup in backups] == [1, 1, 0, 1]
    assert [backup["number"] for backup in backups] == [1, 2, 3, 4]

    whole = await command("restore", target, "--data-dir", str(tmp_path / "whole"), "--backup", "3")
    assert (whole.exit_code, whole.stderr) == (0, "")
    made = await command("restore", target, "--data-dir", str(tmp_path / "made"))
    assert made.exit_code == 0
    assert told in made.stderr
    assert (await command("verify", "--data-dir", str(tmp_path / "whole"))).exit_code == 0
    found = json.loads((await command("verify", "--data-dir", str(tmp_path / "made"), "--json")).output)
    assert [(finding["file"], finding["partition"]) for finding in found["findings"]] == [
        ("store/archive/p-0001", 1)
    ]
    assert "not in the backup" in found["findings"][0]["sentence"]
    # Once it is started, its archive says with which offset it begins: that is all there will ever be.
    settings = settings_of(tmp_path / "made")
    async with dev.running(settings) as node, AsyncClient([node.address]) as client:
        assert [(await client.query_realtime(a, "sum")).value for a in range(7)] == expected
    found = json.loads((await command("verify", "--data-dir", str(tmp_path / "made"), "--json")).output)
    assert found["findings"] == []
    assert any("its archive begins at offset" in note for note in found["notes"])


async def test_a_further_backup_copies_only_what_is_new(tmp_path: Path) -> None:
    """Files that are there already are not copied; each backup is complete, and an older one can be restored."""
    target = tmp_path / "target"
    # No archive: what that makes in the background would be new.
    settings = settings_of(tmp_path / "first", archive="")
    async with dev.running(settings) as node, AsyncClient([node.address]) as client:
        for schema in METRICS:
            await client.metrics.create(schema)
        await send(client, 0, 2_000)
        await node.checkpoint()
        first = await take(node, target)
        expected = await totals(client)
        second = await take(node, target)
        assert second.bytes == first.bytes
        assert second.written_objects <= 2  # the manifest, and the coordinator's keys where a lease ended
        await send(client, 2_000, 10)
        third = await take(node, target)
        assert third.number == 3
        assert 0 < third.written_bytes < first.written_bytes
        assert (first.written_bytes, first.written_objects) == (first.bytes, first.objects)
        assert third.written_objects < third.objects
    restored(target, tmp_path / "old", 1)
    async with (
        dev.running(settings_of(tmp_path / "old", archive="")) as node,
        AsyncClient([node.address]) as client,
    ):
        assert await totals(client) == expected


async def test_a_damaged_backup_is_not_restored(tmp_path: Path) -> None:
    """Whichever object is damaged, or missing: an error, and no data directory. Nor is one overwritten."""
    target = tmp_path / "target"
    async with dev.running(settings_of(tmp_path / "first")) as node, AsyncClient([node.address]) as client:
        for schema in METRICS:
            await client.metrics.create(schema)
        await send(client, 0, 100)
        await node.checkpoint()
        await take(node, target)
    paths = sorted(path for path in target.rglob("*") if path.is_file())
    assert {path.parent.name.split("-")[0] for path in paths} >= {"backups", "log", "checkpoint"}, paths
    for path in paths:
        content = path.read_bytes()
        place = len(content) // 2
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(RemoteProtocolError):
            restored(target, tmp_path / "restored")
        path.write_bytes(content)
        assert not (tmp_path / "restored").exists()
    restored(target, tmp_path / "restored")
    with pytest.raises(InvalidRequestError, match="not empty"):
        restored(target, tmp_path / "restored")


async def test_the_commands(tmp_path: Path) -> None:
    """`backup` finds coordinator and leaders by the gateway; `restore` lists, and makes a directory."""
    target = tmp_path / "target"
    runner = CliRunner()
    import asyncio

    async with dev.running(settings_of(tmp_path / "first")) as node, AsyncClient([node.address]) as client:
        for schema in METRICS:
            await client.metrics.create(schema)
        await send(client, 0, 20)
        arguments = ["backup", f"file://{target}", "--server", node.address, "--json"]
        result = await asyncio.to_thread(runner.invoke, cli, arguments)
        assert result.exit_code == 0, result.output
        assert json.loads(result.output)["number"] == 1
        running = await asyncio.to_thread(
            runner.invoke, cli, ["verify", "--data-dir", str(tmp_path / "first")]
        )
        assert running.exit_code == 1
        assert "stop that first" in running.output
    listed = runner.invoke(cli, ["restore", str(target), "--list"])
    assert listed.output.startswith("backup 1 of ")
    made = runner.invoke(cli, ["restore", str(target), "--data-dir", str(tmp_path / "made")])
    assert made.exit_code == 0, made.output
    assert runner.invoke(cli, ["restore", str(tmp_path / "none"), "--data-dir", "x"]).exit_code == 1
    nowhere = runner.invoke(cli, ["restore", str(tmp_path / "none"), "--list"])
    assert nowhere.exit_code == 1
    assert "there is no folder" in nowhere.output


async def test_a_partition_without_a_leader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers answer, so it is not told as if none did."""
    monkeypatch.setattr(taking, "RETRY_S", 0)

    class Empty:
        async def get(self, key: bytes) -> None:
            del key

    taker = Taker(FolderTarget(tmp_path), Empty(), random.Random(1))  # type: ignore[arg-type]
    with pytest.raises(ServerError, match="nobody leads partition 0, so no backup") as caught:
        await taker._partition(0, ())
    assert failure(caught.value).exit_code == 1


def test_targets_by_url(tmp_path: Path) -> None:
    """An object is there once it is committed, in a folder as in a file system of pyarrow's."""
    from tallymark_node.backup.target import ArrowTarget

    for target in (open_target(str(tmp_path / "a")), ArrowTarget(f"file://{tmp_path / 'b'}")):
        assert target.names("objects") == []
        writer = target.create("objects/one")
        writer.write(b"12")
        assert target.size("objects/one") is None
        writer.write(b"3")
        writer.commit()
        assert target.size("objects/one") == 3
        assert b"".join(target.read("objects/one")) == b"123"
        other = target.create("objects/two")
        other.write(b"x")
        other.abort()
        assert target.names("objects") == ["one"]
    with pytest.raises(InvalidRequestError):
        open_target("nowhere://x")
