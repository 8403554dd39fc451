"""`tallymark verify`: of a real server's data directory, coordinator included."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner

from tallymark import AsyncClient, Event, MetricSchema
from tallymark_node import dev
from tallymark_node.config import Settings
from tallymark_node.main import cli


def run(folder: Path, *arguments: str):
    return CliRunner().invoke(cli, ["verify", "--data-dir", str(folder), *arguments])


async def test_a_directory_is_verified(tmp_path: Path) -> None:
    """Nothing is found, and nothing changed; a flipped byte is found, in the coordinator's state and in CLUSTER, too."""
    folder = tmp_path / "data"
    settings = Settings(port=0, data_dir=str(folder), partition_count=2, wal_segment_bytes=1024 * 1024)
    async with dev.running(settings) as node, AsyncClient([node.address]) as client:
        await client.metrics.create(MetricSchema(code="calls"))
        await client.ingest([Event(account_id=i, metric_code="calls") for i in range(50)])
        await node.checkpoint()
        await client.ingest([Event(account_id=i, metric_code="calls") for i in range(50)])
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    result = run(folder)
    assert result.exit_code == 0, result.output
    assert result.output.endswith("nothing is wrong\n")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    for name in ("coordinator/coordinator.state", "store/CLUSTER", "store/wal/wal-0000000000000000.seg"):
        content = before[folder / name]
        (folder / name).write_bytes(content[:20] + bytes([content[20] ^ 4]) + content[21:])
        found = json.loads(run(folder, "--json").output)
        assert not found["ok"]
        assert any(finding["file"] == name for finding in found["findings"]), found
        (folder / name).write_bytes(content)
    assert run(folder).exit_code == 0
    assert run(tmp_path).exit_code == 2
