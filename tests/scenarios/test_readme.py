"""Every snippet of the README and of docs/sdk.md runs: Python on a server, commands through the command line."""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from snippets import blocks_of, run_command, run_python

import tallymark
from tallymark_node import dev
from tallymark_node.config import Settings

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SDK = (ROOT / "docs" / "sdk.md").read_text(encoding="utf-8")


BLOCKS = blocks_of(README)
SDK_BLOCKS = blocks_of(SDK)
CSV = "customer,at,route\n7,2026-01-31T10:00:00Z,/users\n8,2026-01-31T10:00:01Z,/jobs\n"


def test_the_readme_has_snippets_of_both_kinds() -> None:
    """The expression that finds them still fits the file."""
    kinds = [kind for kind, _ in BLOCKS]
    assert kinds.count("python") >= 6
    assert kinds.count("console") >= 4
    assert [kind for kind, _ in SDK_BLOCKS].count("python") >= 7


def test_the_sdk_page_names_everything_that_is_exported() -> None:
    """What can be imported from `tallymark` is on the page; an entry for it is the author's to write."""
    words = set(re.findall(r"\w+", SDK))
    assert sorted(set(tallymark.__all__) - words) == []


def test_make_targets_that_the_readme_names_exist() -> None:
    """What a newcomer is told to type is in the Makefile."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"(?:`|^)make (\w+)", README, re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_links_lead_somewhere() -> None:
    """Every relative link of the README and of docs/ names a file."""
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


@pytest.mark.timeout(300)
@pytest.mark.parametrize("blocks", [BLOCKS, SDK_BLOCKS], ids=["readme", "sdk"])
async def test_every_snippet_runs_in_order(blocks: list[tuple[str, str]], tmp_path: Path) -> None:
    """A server for a page, all snippets from top to bottom; servers that snippets start are started elsewhere."""
    (tmp_path / "usage.csv").write_text(CSV, encoding="utf-8")
    settings = Settings(port=0, data_dir=str(tmp_path / "data"))
    async with dev.running(settings) as node:
        for kind, text in blocks:
            if kind == "python":
                await run_python(text, node.address)
            elif kind == "console":
                for line in text.splitlines():
                    command = line.removeprefix("$ ")
                    if command != "tallymark dev" and " run --role " not in command:
                        await run_command(command, node.address, tmp_path)


@pytest.mark.timeout(300)
async def test_roles_run_alone_as_the_readme_says(tmp_path: Path) -> None:
    """The four commands of the operations section bring up a cluster that counts."""
    lines = [
        line.removeprefix("$ ") for _, text in BLOCKS for line in text.splitlines() if " run --role " in line
    ]
    assert [re.search(r"--role (\w+)", line).group(1) for line in lines] == [
        "store",
        "query",
        "alerts",
        "ingest",
    ]  # type: ignore[union-attr]
    processes = []
    store_address = ""
    address = ""
    try:
        for line in lines:
            words = shlex.split(line)
            given = dict(word.split("=", 1) for word in words if re.match(r"TALLYMARK_\w+=", word))
            given["TALLYMARK_PORT"] = "0"  # whichever is free, in a test
            given["TALLYMARK_DATA_DIR"] = str(tmp_path / "data")
            if "TALLYMARK_COORDINATOR" in given:
                given["TALLYMARK_COORDINATOR"] = f"tcp://{store_address}"
            command = words[words.index("tallymark") + 1 :]
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "tallymark_node.main",
                *command,
                env=dict(os.environ, **given),
                stdout=subprocess.PIPE,
            )
            processes.append(process)
            assert process.stdout is not None
            ready = (await process.stdout.readline()).decode()
            assert ready.startswith("ready"), ready
            address = ready.split("=", 1)[1].split()[0]
            store_address = store_address or address
        quickstart = next(text for kind, text in BLOCKS if kind == "python")
        subscribing = next(text for kind, text in BLOCKS if kind == "python" and "subscribe(" in text)
        await run_python(quickstart, address)
        await run_python(subscribing, address)
    finally:
        for process in reversed(processes):
            process.terminate()
        for process in reversed(processes):
            assert await process.wait() == 0
