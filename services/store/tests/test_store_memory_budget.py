"""What the setting `memory_bytes` gives, and when a start warns of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tallymark_store import memory_budget


@pytest.mark.parametrize("setting", [1, 1024 * 1024, 16 * 1024 * 1024 - 1])
def test_too_little_is_warned_of(setting: int) -> None:
    """The sentence names the setting, and what to give instead."""
    warning = memory_budget.warning_of(setting)
    assert warning.startswith(f"memory_bytes is {setting}: ")
    assert "16 MiB" in warning


@pytest.mark.parametrize("setting", [-1, 0, 16 * 1024 * 1024, 1 << 40])
def test_what_can_be_worked_with_is_not_warned_of(setting: int) -> None:
    """Nor is no bound at all."""
    assert memory_budget.warning_of(setting) == ""


def test_a_container_may_have_less_than_its_machine(tmp_path: Path) -> None:
    """Whatever its control group says, if it says anything."""
    machine = memory_budget.available([])
    says = tmp_path / "limit"
    for text, bytes_ in (
        ("1048576\n", 1_048_576),
        ("max\n", machine),
        (f"{2**63}\n", machine),
        ("", machine),
    ):
        says.write_text(text)
        assert memory_budget.available([str(tmp_path / "missing"), str(says)]) == bytes_
    assert 0 < (memory_budget.memory_of(0) or 0) <= machine // 2
