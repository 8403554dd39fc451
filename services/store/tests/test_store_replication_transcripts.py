"""The important conversations of replicas, as texts to be read: `transcripts/*.txt`.

To write down anew what they print, after having read the difference: TRANSCRIPTS=write pytest <this file>.
"""

import os
from pathlib import Path

import pytest

from .replication_transcript import run

FOLDER = Path(__file__).parent / "transcripts"
NAMES = sorted(path.name for path in FOLDER.glob("*.txt"))


def test_there_are_transcripts():
    """Every conversation that the design names is there."""
    assert {
        "takeover_with_a_longer_follower.txt",
        "divergent_suffix.txt",
        "deposed_leader_writes_on.txt",
        "lagging_follower.txt",
        "damaged_replica.txt",
        "membership_change.txt",
        "hand_over.txt",
        "learner_behind_the_log_start.txt",
        "member_behind_the_log_start.txt",
        "candidate_behind_the_log_start.txt",
    } <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_transcript(name):
    """Every command prints what the transcript says."""
    path = FOLDER / name
    text = path.read_text()
    played = run(text)
    if os.environ.get("TRANSCRIPTS") == "write":
        path.write_text(played)
    assert played.strip() == text.strip()
