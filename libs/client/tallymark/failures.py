"""What an ingest call raises: errors of the common tree that also carry what is known so far, and how to go on.

Each is an `IngestError` and an error of its kind, so both `except BackpressureError` and `except IngestError`
catch it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tallymark.receipt import Receipt
from tallymark_protocol.errors import (
    BackpressureError,
    InvalidRequestError,
    OutcomeUnknownError,
    ServerError,
    TallymarkError,
    UnavailableError,
)


class IngestError(TallymarkError):
    """Not every event of an ingest call came to an end.

    Attributes:
        receipt: what is known of each event. `receipt.unknown` may be stored or not, `receipt.not_stored` are
            not; the others are settled.
    """

    receipt: Receipt
    _retry: Callable[[float | None], Any]

    def retry(self, timeout: float | None = None) -> Any:
        """Go on with the call: resume its unresolved chunks under their identities, so that nothing counts twice.

        Returns the whole call's `Receipt`: to be awaited where the call was (`AsyncClient`), directly from
        `Client`. Raises as the call does. Passing the very same `Event` objects to `ingest` does the same.

        Args:
            timeout: seconds; None for the client's default.
        """
        return self._retry(timeout)


class IngestBackpressureError(IngestError, BackpressureError):
    """The service takes no more at present, and didn't until the timeout."""


class IngestUnavailableError(IngestError, UnavailableError):
    """The service, or a partition of it, couldn't be reached until the timeout."""


class IngestServerError(IngestError, ServerError):
    """The service failed."""


class IngestInvalidRequestError(IngestError, InvalidRequestError):
    """The service refused a chunk whole: nothing of it is stored."""


class IngestOutcomeUnknownError(IngestError, OutcomeUnknownError):
    """Events may be stored or not and can't be retried safely any more.

    Find out by `list_events`, or send them anew as new `Event` objects (with ids, duplicates are still noticed
    within the dedup window).
    """


_KINDS: tuple[tuple[type[TallymarkError], type[IngestError]], ...] = (
    (BackpressureError, IngestBackpressureError),
    (UnavailableError, IngestUnavailableError),
    (InvalidRequestError, IngestInvalidRequestError),
    (OutcomeUnknownError, IngestOutcomeUnknownError),
)


def ingest_error(
    cause: TallymarkError, receipt: Receipt, retry: Callable[[float | None], Any]
) -> IngestError:
    """Make the exception of a cause; the caller raises it from that cause."""
    kind = next((made for base, made in _KINDS if isinstance(cause, base)), IngestServerError)
    error = kind(cause.message, code=cause.code, retriable=cause.retriable, details=cause.details)
    error.receipt = receipt
    error._retry = retry
    return error
