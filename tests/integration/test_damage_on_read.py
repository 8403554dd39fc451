"""Damage that only a read finds: behind the checkpoint, where no start looks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tallymark import AsyncClient, Event, MetricSchema, UnavailableError, current_period
from tallymark_node import dev
from tallymark_node.config import Settings
from tallymark_protocol.errors import ErrorCode
from tallymark_protocol.identifiers import partition_of

NEEDLE = b"a-needle-in-the-log"


def flip(folder: Path) -> str:
    """Flip a bit in the middle of the needle, wherever it lies in the log; return the file's name."""
    for path in sorted((folder / "store" / "wal").glob("*.seg")):
        at = path.read_bytes().find(NEEDLE)
        if at >= 0:
            with path.open("r+b") as file:
                file.seek(at + 3)
                file.write(bytes([NEEDLE[3] ^ 1]))
            return path.name
    raise AssertionError("the needle is not in the log")


async def expect_damage(coroutine: object) -> UnavailableError:
    """The call fails with PARTITION_DAMAGED."""
    with pytest.raises(UnavailableError) as caught:
        await coroutine  # type: ignore[misc]
    assert caught.value.code == ErrorCode.PARTITION_DAMAGED
    return caught.value


async def test_a_partition_found_damaged_by_a_read_is_refused_from_then_on(tmp_path: Path) -> None:
    """The read names the file; totals, appends, and the next start are refused as well; other partitions serve."""
    settings = Settings(port=0, data_dir=str(tmp_path))
    async with dev.running(settings) as node, AsyncClient([node.address]) as client:
        await client.metrics.create(MetricSchema(code="m"))
        receipt = await client.ingest(
            [Event(account_id=7, metric_code="m", properties={"text": NEEDLE.decode()})]
        )
        (damaged,) = receipt.partitions
        partition_count = settings.partition_count
        other = next(a for a in range(100) if partition_of(a, partition_count) != damaged)
        assert (await client.ingest([Event(account_id=other, metric_code="m")])).n_stored == 1
        await node.checkpoint()
        name = flip(tmp_path)

        error = await expect_damage(client.list_events(7, 0, 2**62).__anext__())
        assert name in error.message
        await expect_damage(client.query(7, "m", current_period()))
        await expect_damage(client.ingest([Event(account_id=7, metric_code="m")]))
        assert (await client.ingest([Event(account_id=other, metric_code="m")])).n_stored == 1
    reports: list[str] = []
    async with dev.running(settings, reports.append) as node, AsyncClient([node.address]) as client:
        await expect_damage(client.query(7, "m", current_period()))
        assert (await client.query_realtime(other, "m")).value.count == 2
    assert any("damaged" in report for report in reports)
