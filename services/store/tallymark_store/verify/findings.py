"""What a verification has found, bounded, and how far it is.

A **finding** is something that is not as it was written or counted: a verification with one has failed. A **note** says
what was left out, or lies there without a meaning; it fails nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

FINDINGS_MAX = 1_000  # that are kept; all are counted


class Finding(msgspec.Struct, frozen=True, omit_defaults=True):
    """One difference between what is there and what should be."""

    sentence: str  # for a person
    file: str = ""  # path in the data directory
    position: int = -1  # byte in the file; -1: the file as a whole, or none
    partition: int = -1  # -1: of no one partition
    expected: str = ""
    found: str = ""


class Report:
    """What is found while a verification runs.

    Args:
        progress: told, in a few words, what is looked at now.

    Attributes:
        findings: the first of them.
        count: of all findings.
        notes: what was left out, in sentences.
        counted: how many of what were looked at.
    """

    def __init__(self, progress: Callable[[str], None] = lambda _: None) -> None:
        self.findings: list[Finding] = []
        self.count = 0
        self.notes: list[str] = []
        self.counted: dict[str, int] = {}
        self.progress = progress

    def find(
        self,
        sentence: str,
        *,
        file: str = "",
        position: int = -1,
        partition: int = -1,
        expected: object = "",
        found: object = "",
    ) -> None:
        """Note a finding."""
        self.count += 1
        if len(self.findings) < FINDINGS_MAX:
            self.findings.append(Finding(sentence, file, position, partition, str(expected), str(found)))

    def note(self, sentence: str) -> None:
        """Say something that is no finding."""
        if len(self.notes) < FINDINGS_MAX:
            self.notes.append(sentence)

    def looked_at(self, what: str, count: int = 1) -> None:
        """Count what was looked at."""
        self.counted[what] = self.counted.get(what, 0) + count
