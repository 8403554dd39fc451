"""The page of guarantees names tests that exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "guarantees.md").read_text(encoding="utf-8")


def test_every_line_names_a_test() -> None:
    """Each fault is shown by a test, and each test that is named is there."""
    rows = [
        row for row in PAGE.splitlines() if re.match(r"\| .* \| .* \| .* \|$", row) and "shown by" not in row
    ]
    assert len(rows) > 10
    for row in rows:
        named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", row.split("|")[3])
        assert named, row
        for file, name in named:
            found = list((ROOT / "tests").glob(f"*/{file}"))
            assert len(found) == 1, file
            assert re.search(
                rf"^(async )?def {name}\(", found[0].read_text(encoding="utf-8"), re.MULTILINE
            ), name
