"""When a delivery is tried, what an attempt's outcome means, and when it is given up. Pure.

An attempt ends in an `Outcome`. 2xx is delivered; 410 says that the endpoint is gone for good, and pauses the webhook;
everything else is tried again: after `first_ns`, doubled with each attempt up to `most_ns`, each with up to a fifth of
jitter on top, until `total_ns` have passed since the first attempt. There is a last attempt at the very end of that
time; when it fails, too, the delivery becomes a dead letter.
"""

from __future__ import annotations

import enum
import random

import msgspec

from tallymark_protocol import limits

SECOND = 1_000_000_000
ERROR_CHARACTERS_MAX = 200  # of an attempt's error that is kept
_JITTER = 0.2
_GONE = 410


class OutcomeKind(enum.StrEnum):
    """How an attempt ended."""

    DELIVERED = "delivered"
    GONE = "gone"  # 410
    STATUS = "status"  # any other status but 2xx
    TIMEOUT = "timeout"
    CONNECTION = "connection"  # refused, reset, TLS, DNS, no HTTP
    ADDRESS = "address"  # the host has an address that isn't public
    MISSING = "missing"  # the alert is not in its store: nothing was sent


class Outcome(msgspec.Struct, frozen=True):
    """How an attempt ended."""

    kind: OutcomeKind
    error: str = ""  # a sentence; "" where it was delivered

    @property
    def is_delivered(self) -> bool:
        """Whether the endpoint has it."""
        return self.kind is OutcomeKind.DELIVERED

    @property
    def is_gone(self) -> bool:
        """Whether the endpoint wants nothing more."""
        return self.kind is OutcomeKind.GONE


def outcome_of_status(status: int) -> Outcome:
    """What an HTTP status means."""
    if 200 <= status < 300:
        return Outcome(OutcomeKind.DELIVERED)
    if status == _GONE:
        return Outcome(OutcomeKind.GONE, "the endpoint answered 410 Gone")
    if 300 <= status < 400:
        return Outcome(OutcomeKind.STATUS, f"the endpoint answered {status}, and redirects are not followed")
    return Outcome(OutcomeKind.STATUS, f"the endpoint answered {status}")


def failure(kind: OutcomeKind, error: str) -> Outcome:
    """An outcome that is no answer; what is kept of the error is bounded."""
    return Outcome(kind, error[:ERROR_CHARACTERS_MAX])


class Schedule(msgspec.Struct, frozen=True):
    """The times of attempts, in nanoseconds."""

    first_ns: int = 5 * SECOND  # from the first attempt to the second
    most_ns: int = 4 * 3_600 * SECOND  # between two attempts, less jitter
    total_ns: int = limits.WEBHOOK_RETRY_NS_MAX  # from the first attempt to the last

    def next_attempt_ns(self, *, attempts: int, first_ns: int, now_ns: int, rng: random.Random) -> int | None:
        """When to try again after a failure; None: no more, it is a dead letter.

        Args:
            attempts: made so far, the one that failed just now included; 1 or more.
            first_ns: when the first was made.
            now_ns: the time.
            rng: for the jitter.
        """
        assert attempts >= 1, "an attempt has failed"
        end_ns = first_ns + self.total_ns
        if now_ns >= end_ns:
            return None
        # Doubling stops long before the shift gets large.
        delay_ns = min(self.first_ns << min(attempts - 1, 62), self.most_ns)
        delay_ns += int(delay_ns * _JITTER * rng.random())
        return min(now_ns + delay_ns, end_ns)

    def latest_ns(self, now_ns: int) -> int:
        """The latest time that a next attempt can have: a later one was written by a clock that was wrong."""
        return now_ns + int(self.most_ns * (1 + _JITTER))
