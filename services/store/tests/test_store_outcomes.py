"""Verdicts that are kept beside the log: found again as they were, bounded, and lost without a wrong answer."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from tallymark_protocol.errors import Reason, RemoteProtocolError
from tallymark_protocol.limits import PRODUCER_RETENTION_NS
from tallymark_store.outcomes import Outcomes
from tallymark_store.prepared import exceptions_of

OK, DUPLICATE, CONFLICT = int(Reason.ACCEPTED), int(Reason.DUPLICATE), int(Reason.CONFLICT)


def note(
    outcomes: Outcomes, base: int, verdicts: list[int], originals: list[int], append_ns: int = 0
) -> None:
    outcomes.note(base, append_ns, np.array(verdicts, np.uint8), np.array(originals, np.int64))


def test_verdicts_are_found_as_they_were() -> None:
    """By record; one that isn't kept has accepted events only."""
    outcomes = Outcomes()
    note(outcomes, 5, [OK, DUPLICATE, OK, CONFLICT, 3, 17], [2, 1])
    outcomes.note(11, 0, None, None)
    note(outcomes, 20, [OK, OK], [])
    for kept in (outcomes, Outcomes.decode(outcomes.encode(30))):
        found = kept.find(5)
        assert found is not None
        assert exceptions_of(found.verdicts, found.originals, 0, 4) == [(1, DUPLICATE, 2), (3, CONFLICT, 1)]
        assert exceptions_of(found.verdicts, found.originals, 3, 3) == [
            (0, CONFLICT, 1),
            (1, 3, -1),
            (2, 17, -1),
        ]
        for base in (11, 20):
            other = kept.find(base)
            assert other is not None
            assert exceptions_of(other.verdicts, other.originals, 0, 2) == []


def test_a_truncated_suffix_is_forgotten() -> None:
    """And what a checkpoint does not cover is not in it."""
    outcomes = Outcomes()
    note(outcomes, 5, [DUPLICATE], [1])
    note(outcomes, 9, [DUPLICATE], [1])
    before = Outcomes.decode(outcomes.encode(9))
    outcomes.truncate(9)
    for kept in (before, outcomes):
        found = kept.find(9)
        assert found is not None
        assert found.verdicts is None
        note(kept, 9, [CONFLICT], [4])
    assert before.encode(99) == outcomes.encode(99)


def test_what_is_dropped_is_known_to_be_unknown() -> None:
    """Beyond the bound, or after the time for which chunks are remembered: never taken for accepted."""
    outcomes = Outcomes(bytes_max=2_000)
    for base in range(0, 100, 10):
        note(outcomes, base, [DUPLICATE] * 10, [1] * 10)
        outcomes.advance(base + 10, 0)
    kept = [base for base in range(0, 100, 10) if outcomes.find(base) is not None]
    assert kept == list(range(100 - 10 * len(kept), 100, 10))
    assert 0 < len(kept) < 10
    again = Outcomes.decode(outcomes.encode(1_000), bytes_max=2_000)
    assert [base for base in range(0, 100, 10) if again.find(base) is not None] == kept
    note(outcomes, 200, [DUPLICATE], [1], append_ns=PRODUCER_RETENTION_NS + 1)
    outcomes.advance(201, PRODUCER_RETENTION_NS + 1)
    assert outcomes.find(90) is None
    assert outcomes.find(200) is not None


@pytest.mark.parametrize("pace", [1, 3, 20])
def test_what_is_kept_is_a_function_of_what_is_folded(pace: int) -> None:
    """Whatever lies above it in the log, is taken back, or was folded in one go: copies must not differ."""
    one, other = Outcomes(bytes_max=1_000), Outcomes(bytes_max=1_000)
    minute = 60 * 10**9
    ends = []
    for k in range(40):
        base, append_ns = 10 * k, k * minute
        note(one, base, [DUPLICATE] * (1 + k % 7), [1] * (1 + k % 7), append_ns)
        one.advance(base + 10, append_ns)
        ends.append((base + 10, append_ns, one.digest(base + 10), one.encode(base + 10)))
    for k in range(40):
        note(other, 10 * k, [DUPLICATE] * (1 + k % 7), [1] * (1 + k % 7), k * minute)
        if (k + 1) % pace:
            continue
        end, append_ns, digest, encoded = ends[k]
        # A suffix that is never committed, late enough to make all of it old.
        note(other, end + 5, [CONFLICT], [3], append_ns + 2 * PRODUCER_RETENTION_NS)
        other.advance(end, append_ns)
        assert other.digest(end) == digest
        other.truncate(end)
        assert other.encode(end + 100) == encoded
        assert Outcomes.decode(encoded, bytes_max=1_000).digest(end) == digest
    assert len({digest for _, _, digest, _ in ends}) == 40


def test_what_waits_for_the_fold_is_bounded_too() -> None:
    """Then the oldest go early; what is written in the place of a suffix that was taken back is known."""
    outcomes = Outcomes(bytes_max=1_000)
    for base in range(0, 1_000, 10):
        note(outcomes, base, [DUPLICATE], [1])
    assert len(outcomes.encode(2_000)) < 2_000
    assert outcomes.find(0) is None
    assert outcomes.find(990) is not None
    outcomes.truncate(500)
    note(outcomes, 500, [CONFLICT], [4])
    found = outcomes.find(500)
    assert found is not None
    assert exceptions_of(found.verdicts, found.originals, 0, 1) == [(0, CONFLICT, 4)]
    assert outcomes.find(490) is None


@pytest.mark.parametrize(
    "entry",
    [
        (5, 0, 1, b"\0\0\0", b"\1", b""),
        (5, 0, 1, b"\1\0\0\0", b"\1", b""),
        (5, 0, 1, b"\0\0\0\0", b"\1\1", b""),
        (5, 0, 1, b"\0\0\0\0", b"\1", b"\0"),
        (5, 0, 1, b"", b"", b""),
        (-1, 0, 1, b"\0\0\0\0", b"\1", b""),
        (5, 0, 1, 7, b"\1", b""),
    ],
)
def test_malformed_outcomes_are_refused(entry: tuple[object, ...]) -> None:
    """They come from another copy: bytes that make no sense are an error, whatever their checksum."""
    with pytest.raises(RemoteProtocolError):
        Outcomes.decode(msgspec.msgpack.encode((0, [entry])))
    for junk in (b"", b"\xff", np.zeros(3, np.uint8), None):
        with pytest.raises(RemoteProtocolError):
            Outcomes.decode(junk)
