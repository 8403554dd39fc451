"""What a store knows of others' clocks and room, and who may stamp by it."""

from __future__ import annotations

import random

import pytest

from tallymark_store.peer_states import (
    HEARD_NS,
    PeerStates,
    differs,
    outvoted_by_ns,
    unfit_to_begin_by_ns,
)

S = 1_000_000_000
WALL = 1_700_000_000 * S


def test_a_clock_is_known_for_a_while() -> None:
    """As its distance to the own one, which it keeps while the own time goes on; then it isn't known any more."""
    peers = PeerStates()
    assert peers.difference_ns("b", WALL, 50 * S) is None
    assert peers.none_differs(WALL, 50 * S)
    peers.heard("b", wall_ns=WALL + 3 * S, is_full=False, now_ns=50 * S)
    assert peers.difference_ns("b", WALL, 50 * S) == 3 * S
    assert peers.difference_ns("b", WALL + 2 * S, 52 * S) == 3 * S
    assert peers.differences(["a", "b"], WALL, 50 * S) == {"b": 3 * S}
    assert peers.all_differences(WALL, 50 * S) == {"b": 3 * S}
    assert peers.difference_ns("b", WALL, 51 * S + HEARD_NS) is None


def test_a_step_of_the_own_clock_shows_at_once() -> None:
    """Before anything else was heard."""
    peers = PeerStates()
    peers.heard("b", wall_ns=WALL, is_full=False, now_ns=50 * S)
    assert peers.difference_ns("b", WALL + 90 * S, 50 * S) == -90 * S
    for quick in (peers.all_are_alike, peers.none_differs):
        assert not quick(WALL + 90 * S, 50 * S)
        assert not quick(WALL - 11 * S, 50 * S)
        assert quick(WALL + 9 * S, 50 * S)
        assert quick(WALL - 9 * S, 50 * S)


def test_late_bundles_do_not_count_beside_quick_ones() -> None:
    """One that was long on its way says that its sender's clock is behind; where all of them say so, it is."""
    peers = PeerStates()
    peers.heard("b", wall_ns=WALL, is_full=False, now_ns=50 * S)
    peers.heard("b", wall_ns=WALL - 30 * S, is_full=False, now_ns=50 * S)
    assert peers.difference_ns("b", WALL, 50 * S) == 0
    peers.heard("b", wall_ns=WALL - 28 * S, is_full=False, now_ns=52 * S)
    assert peers.difference_ns("b", WALL + 2 * S, 52 * S) == -30 * S


def test_a_bundle_that_does_not_say_changes_nothing() -> None:
    """Of clocks; that its sender has room is known."""
    peers = PeerStates()
    peers.heard("b", wall_ns=0, is_full=False, now_ns=50 * S)
    assert peers.difference_ns("b", WALL, 50 * S) is None
    assert peers.has_room("b", 50 * S)


def test_room_is_known_for_a_while() -> None:
    """Nobody is believed to be full, or to have room, who hasn't said so lately."""
    peers = PeerStates()
    assert not peers.has_room("b", 0)
    assert not peers.is_full("b", 0)
    peers.heard("b", wall_ns=WALL, is_full=True, now_ns=50 * S)
    assert peers.is_full("b", 50 * S)
    assert not peers.has_room("b", 50 * S)
    assert not peers.all_are_alike(WALL, 50 * S)
    assert not peers.is_full("b", 51 * S + HEARD_NS)
    assert peers.all_are_alike(WALL, 51 * S + HEARD_NS)
    peers.heard("b", wall_ns=WALL, is_full=False, now_ns=60 * S)
    assert peers.has_room("b", 60 * S)


def test_only_so_many_peers_are_kept() -> None:
    """Names are a peer's bytes: those that weren't heard of lately make room, and without room no more are taken."""
    peers = PeerStates()
    for i in range(3_000):
        peers.heard(f"old{i}", wall_ns=WALL, is_full=False, now_ns=50 * S)
    assert len(peers.all_differences(WALL, 50 * S)) == 1_024
    peers.heard("new", wall_ns=WALL, is_full=False, now_ns=60 * S)
    assert peers.all_differences(WALL, 60 * S) == {"new": WALL - WALL}


@pytest.mark.parametrize(
    ("differences", "members", "by"),
    [
        ([], 3, 0),
        ([11 * S, 12 * S], 3, 11 * S),
        ([-11 * S, -12 * S], 3, -11 * S),
        ([11 * S, -12 * S], 3, 0),
        ([11 * S, 9 * S], 3, 0),
        ([10 * S, 10 * S], 3, 0),
        ([11 * S], 3, 0),
        ([-11 * S], 2, 0),
        ([90 * S, 90 * S], 4, 0),
        ([90 * S, 90 * S, 91 * S], 4, 90 * S),
        ([90 * S, 90 * S], 5, 0),
        ([-90 * S, -80 * S, -70 * S, 0], 5, -70 * S),
    ],
)
def test_a_majority_of_all_members_outvotes_a_leader(differences: list[int], members: int, by: int) -> None:
    """On one side of its clock, by more than 10 s; fewer don't, and those who weren't heard of say nothing."""
    assert outvoted_by_ns(differences, members) == by


@pytest.mark.parametrize(
    ("differences", "by"),
    [
        ([], 0),
        ([9 * S], 0),
        ([11 * S], 0),
        ([-11 * S], -11 * S),
        ([11 * S, 0], 0),
        ([-11 * S, 0], 0),
        ([11 * S, 12 * S], 11 * S),
        ([11 * S, 12 * S, 0], 0),
        ([-11 * S, -12 * S, 0], -11 * S),
        ([11 * S, -12 * S], 0),
    ],
)
def test_who_begins_goes_by_those_that_are_known(differences: list[int], by: int) -> None:
    """Of two halves, the one that is behind may begin."""
    assert unfit_to_begin_by_ns(differences) == by


def test_somebody_can_always_lead() -> None:
    """Whatever the clocks are: of those that hear of each other one may begin, and isn't outvoted afterwards."""
    rng = random.Random(3)
    for _ in range(2_000):
        members = rng.randint(2, 7)
        heard = rng.randint(members // 2 + 1, members)
        clocks = [rng.choice((0, 0, 5, 20, 40, -30, 9_000)) * S for _ in range(heard)]
        fit = []
        for i, own in enumerate(clocks):
            differences = [clock - own for j, clock in enumerate(clocks) if j != i]
            if not differs(differences):
                assert unfit_to_begin_by_ns(differences) == 0
            if not unfit_to_begin_by_ns(differences) and not outvoted_by_ns(differences, members):
                fit.append(own)
        assert fit, clocks
