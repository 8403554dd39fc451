"""The page of limits says what the code does."""

from __future__ import annotations

import re
from pathlib import Path

from tallymark_protocol import limits
from tallymark_protocol.errors import Reason

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "limits.md").read_text(encoding="utf-8")


def test_every_number_is_the_constant() -> None:
    """Each `NAME` = number of the table is the module's."""
    rows = re.findall(r"`(\w+)` = (\d+)", PAGE)
    assert len(rows) >= 20
    for name, number in rows:
        assert getattr(limits, name) == int(number), name


def test_every_reason_exists() -> None:
    """The reasons that rejections are said to have are those that code can give."""
    reasons = re.findall(r"`([A-Z_]+)`(?:,| \||;)", PAGE)
    named = {name for name in reasons if name in Reason.__members__}
    assert {"PROPERTIES_TOO_LARGE", "INVALID_EVENT_ID", "TIME_IN_FUTURE", "VALUE_OUT_OF_RANGE"} <= named
