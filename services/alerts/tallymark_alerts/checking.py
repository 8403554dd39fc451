"""What a subscriber, or a webhook, may ask for: pure checks of what comes from outside."""

from __future__ import annotations

import re
from typing import Final

from tallymark_protocol import limits
from tallymark_protocol.errors import ErrorCode, InvalidRequestError
from tallymark_protocol.messages import AlertsFetch

_METRIC_CODE: Final = re.compile(limits.METRIC_CODE_PATTERN)


def check_fetch(call: AlertsFetch, partition_count: int) -> None:
    """Refuse a fetch that makes no sense.

    Accounts and metrics need not exist: who subscribes before the first event, or after a metric's end, is right to.

    Raises:
        InvalidRequestError: says what is wrong.
    """
    if not 1 <= call.limit <= limits.PAGE_EVENTS_MAX:
        raise InvalidRequestError(f"limit must be 1 to {limits.PAGE_EVENTS_MAX}, not {call.limit}")
    if not 0 <= call.wait_ms <= limits.ALERTS_WAIT_MS_MAX:
        raise InvalidRequestError(f"wait_ms must be 0 to {limits.ALERTS_WAIT_MS_MAX}, not {call.wait_ms}")
    check_filter(call.account_ids, call.metric_codes)
    for partition, position in (call.since or {}).items():
        if not 0 <= partition < partition_count:
            raise InvalidRequestError(
                f"since: there is no partition {partition}; the cluster has {partition_count}",
                details={"partition": str(partition)},
            )
        if not 0 <= position < 2**63:
            raise InvalidRequestError(f"since: there is no position {position} in partition {partition}")


def check_filter(account_ids: list[int], metric_codes: list[str]) -> None:
    """Refuse a filter that names too much, or what can't be.

    Raises:
        InvalidRequestError: says what is wrong.
    """
    if len(account_ids) > limits.SUBSCRIPTION_ACCOUNTS_MAX:
        raise InvalidRequestError(
            f"a filter names at most {limits.SUBSCRIPTION_ACCOUNTS_MAX} accounts, not {len(account_ids)}",
            code=ErrorCode.TOO_LARGE,
        )
    if len(metric_codes) > limits.SUBSCRIPTION_METRICS_MAX:
        raise InvalidRequestError(
            f"a filter names at most {limits.SUBSCRIPTION_METRICS_MAX} metrics, not {len(metric_codes)}",
            code=ErrorCode.TOO_LARGE,
        )
    for account in account_ids:
        if not 0 <= account <= limits.ACCOUNT_ID_MAX:
            raise InvalidRequestError(
                f"account_ids: {account} is none: an account id is a whole number from 0 to 2^64-1"
            )
    for code in metric_codes:
        if _METRIC_CODE.fullmatch(code) is None:
            raise InvalidRequestError(f"metric_codes: \"{code:.80}\" can't be a metric's code")
