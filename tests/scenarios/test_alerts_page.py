"""Every example of docs/alerts.md runs against a server, each as a test of its own."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from snippets import run_python

from tallymark_node import dev
from tallymark_node.config import Settings

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "alerts.md").read_text(encoding="utf-8")
# An example is named by the words in bold that open its paragraph.
EXAMPLES = {
    re.sub(r"\W+", "-", title).strip("-").lower(): source
    for title, source in re.findall(
        r"^\*\*(.+?)\*\*(?:(?!^\*\*).)*?^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL
    )
}


def test_every_python_block_is_an_example() -> None:
    """The expression that finds them still fits the page."""
    assert len(EXAMPLES) == PAGE.count("```python") >= 8


@pytest.fixture
async def address(tmp_path: Path) -> AsyncIterator[str]:
    """A server of its own: examples look at all of an account's alerts."""
    async with dev.running(Settings(port=0, data_dir=str(tmp_path / "data"))) as node:
        yield node.address


@pytest.mark.parametrize("name", sorted(EXAMPLES))
async def test_example(name: str, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the page says is what happens."""
    monkeypatch.chdir(tmp_path)
    await run_python(EXAMPLES[name], address)
