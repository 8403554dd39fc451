"""The command and alerts: listing by time, following across restarts, and webhooks."""

import asyncio
import json
import os
import signal
import sys
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from tallymark import AlertThreshold, AsyncClient, Event, MetricSchema
from tallymark_node import dev
from tallymark_node.config import Settings


class Following:
    """A running `tallymark alerts --follow`."""

    def __init__(self, process):
        self.process = process

    async def line(self):
        """The next line."""
        async with asyncio.timeout(30):
            return (await self.process.stdout.readline()).decode()

    async def end(self, kind=signal.SIGINT):
        """Interrupt it; returns its status, and what else it wrote."""
        self.process.send_signal(kind)
        return await self.wait()

    async def wait(self):
        """Wait for its end."""
        async with asyncio.timeout(30):
            out, err = await self.process.communicate()
        return self.process.returncode, out.decode(), err.decode()


@asynccontextmanager
async def following(server, *arguments, file):
    """Follow alerts; entered once the subscription has begun, which its file tells."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "tallymark_node.main", "alerts", "--follow", "--since", str(file), *map(str, arguments)),
        env=os.environ | {"TALLYMARK_SERVER": server, "COLUMNS": "80"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(30):
            while not file.exists() and process.returncode is None:  # noqa: ASYNC110  # another process writes it
                await asyncio.sleep(0.02)
        yield Following(process)
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


async def raise_alerts(server, code, *accounts):
    """Make each account cross the metric's threshold of 1."""
    async with AsyncClient([server]) as client:
        schema = MetricSchema(
            code=code, thresholds=[AlertThreshold(code="each", value=1, recurring=True)], time_zone="UTC"
        )
        if code not in [found.code for found in await client.metrics.list()]:
            await client.metrics.create(schema)
        for account in accounts:
            assert (await client.ingest(Event(account, code))).ok


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
async def test_follow_goes_on_where_it_ended(server, tmp_path, kind):
    """Live alerts are printed as they come; the file makes the next run print what was raised meanwhile, once."""
    code = f"followed_{kind.name}"
    file = tmp_path / "offsets.json"
    await raise_alerts(server, code, 1)
    async with following(server, "--json", "--metric", code, file=file) as follow:
        await raise_alerts(server, code, 2)
        first = json.loads(await follow.line())
        assert (first["account_id"], first["metric"], first["threshold"]) == (2, code, "each")
        await raise_alerts(server, code, 3)
        assert json.loads(await follow.line())["account_id"] == 3
        status, out, err = await follow.end(kind)
        assert (status, out, err) == (0, "", "")
    await raise_alerts(server, code, 4, 5)
    async with following(server, "--json", "--metric", code, "--limit", 2, file=file) as follow:
        status, out, err = await follow.wait()
        assert (status, err) == (0, "")
        # Accounts of one partition come in order, others in any.
        assert {json.loads(line)["account_id"] for line in out.splitlines()} == {4, 5}
    async with following(server, 6, "--metric", code, file=file) as follow:
        await raise_alerts(server, code, 7, 6)
        line = await follow.line()
        assert f" UTC  account 6  {code}  each (1)  total 1  " in line
        assert (await follow.end())[0] == 0


async def test_follow_ends_when_nobody_reads(server, tmp_path):
    """As with `| head -1`: no complaint."""
    async with following(server, "--metric", "x", file=tmp_path / "never") as refused:
        status, _, err = await refused.wait()
        assert (status, "no metric has the code 'x'" in err) == (1, True)
    await raise_alerts(server, "piped")
    async with following(server, "--metric", "piped", file=tmp_path / "offsets") as follow:
        follow.process.stdout._transport.close()
        await raise_alerts(server, "piped", 1, 2, 3)
        async with asyncio.timeout(30):
            assert await follow.process.wait() == 0


async def test_follow_outlives_the_server(tmp_path):
    """What it waits for is told on standard error, and what was raised meanwhile is printed."""
    settings = Settings(port=0, data_dir=str(tmp_path / "data"))
    async with AsyncExitStack() as stack:
        async with dev.running(settings) as node:
            server = node.address
            await raise_alerts(server, "outlived")
            file = tmp_path / "offsets"
            follow = await stack.enter_async_context(following(server, "--json", file=file))
            await raise_alerts(server, "outlived", 1)
            assert json.loads(await follow.line())["account_id"] == 1
        async with asyncio.timeout(30):
            assert (await follow.process.stderr.readline()).decode().startswith("waiting: ")
        settings = Settings(port=int(server.rpartition(":")[2]), data_dir=settings.data_dir)
        async with dev.running(settings):
            await raise_alerts(server, "outlived", 2)
            assert json.loads(await follow.line())["account_id"] == 2
            status, out, err = await follow.end()
            assert (status, out) == (0, "")
            assert err.endswith("going on\n")


def test_alerts_by_time(tally, server):
    """Those raised in a range; following takes none."""
    asyncio.run(raise_alerts(server, "by_time", 1, 2))
    found = json.loads(tally("alerts", "--metric", "by_time", "--json").stdout)
    assert {alert["account_id"] for alert in found} == {1, 2}
    assert {alert["position"] for alert in found} <= set(range(100))
    for arguments, count in (
        (("--from", "2026-01-01"), 2),
        (("--to", "2026-01-01"), 0),
        (("--from", "2026-01-01", "--to", "2200-01-01"), 2),
        (("--from", "2200-01-01"), 0),
    ):
        shown = tally("alerts", "--metric", "by_time", *arguments, "--json").stdout
        assert len(json.loads(shown)) == count


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--follow", "--from", "2026-01-01"), "takes no --from or --to"),
        (("--since", "FILE"), "goes with --follow"),
        (("--from", "2026-01-02", "--to", "2026-01-01"), "lies before"),
        (("--follow", "--since", "FILE"), "holds no offsets"),
        (("--follow", "--since", "."), "directory"),
        (("--follow", "--since", "/no/such/folder/offsets"), "can't write"),
        (("--limit", "0"), "--limit"),
    ],
)
def test_bad_commands(tally, tmp_path, arguments, words):
    """Each is told in a sentence, with the status of a wrong command line."""
    file = tmp_path / "offsets"
    file.write_text('{"0": "seven"}')
    given = [str(file) if argument == "FILE" else argument for argument in arguments]
    assert words in tally("alerts", *given, status=2).stderr


def test_webhooks(tally):
    """Created with a secret that is shown once, listed, asked for dead letters, redelivered, deleted."""
    assert "no webhooks yet" in tally("webhooks", "list").stdout
    made = json.loads(
        tally(
            *(
                "webhooks",
                "create",
                "https://example.com/alerts",
                "--account",
                7,
                "--metric",
                "b",
                "--metric",
                "a",
            ),
            *("--description", "the bell", "--json"),
        ).stdout
    )
    assert made["secret"].startswith("whsec_")
    assert (made["account_ids"], made["metric_codes"], made["description"]) == ([7], ["a", "b"], "the bell")
    (listed,) = json.loads(tally("webhooks", "list", "--json").stdout)
    assert listed["id"] == made["id"]
    assert "secret" not in listed
    shown = tally("webhooks", "list").stdout
    assert "https://example.com/alerts" in shown
    assert "a, b" in shown
    assert "no dead letters" in tally("webhooks", "dead-letters", made["id"]).stdout
    assert json.loads(tally("webhooks", "dead-letters", made["id"], "--json").stdout) == []
    assert "0 pending, 0 dead" in tally("webhooks", "redeliver", made["id"]).stdout
    assert "deleted webhook" in tally("webhooks", "delete", made["id"]).stdout
    assert json.loads(tally("webhooks", "list", "--json").stdout) == []
    assert tally("webhooks", "delete", made["id"], status=1).stderr.startswith("error: there is no webhook")
    assert "whsec_" in tally("webhooks", "create", "https://example.com/b").stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ("ftp://example.com",),
        ("example.com",),
        ("https://user@example.com/",),
        ("https://example.com", "--secret", "mine"),
        ("https://example.com", "--metric", "a b"),
        ("https://example.com", "--account", "-1"),
    ],
)
def test_webhooks_that_are_refused(tally, arguments):
    """A URL or a secret that can't be one."""
    assert (
        "Error" in (stderr := tally("webhooks", "create", *arguments, status=2).stderr) or "error: " in stderr
    )
