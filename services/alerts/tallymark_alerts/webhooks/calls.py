"""Answers the Webhook calls, at any instance: everything that they ask for or change is in the coordinator.

A webhook's id is made of what it is (URL, secret, filter), so a creation that is repeated, because its answer was lost,
finds what the first one made. Creation and deletion change the total with the webhook, each on the condition that nobody
else did: so there are never more than limits allow. A deletion takes the owner key with it, and with that the owner's
right to write anything.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
from collections.abc import Callable
from typing import Final, TypeVar

import msgspec

from tallymark_alerts.webhooks.addresses import check_url
from tallymark_alerts.webhooks.ports import AlertReader
from tallymark_alerts.webhooks.records import (
    OWNERS,
    PROGRESS,
    TOTAL,
    WEBHOOKS,
    WEBHOOKS_BYTES_MAX,
    Letter,
    Owner,
    Place,
    Progress,
    Total,
    Webhook,
    letter_key,
    letters_max,
    letters_prefix,
    owner_key,
    place_of,
    progress_key,
    request_key,
    requests_prefix,
    webhook_key,
)
from tallymark_protocol import limits
from tallymark_protocol.errors import (
    ErrorCode,
    InvalidRequestError,
    NotFoundError,
    RemoteProtocolError,
    UnavailableError,
)
from tallymark_protocol.messages import (
    DeadLetter,
    DeadLettersResult,
    Message,
    WebhookCreate,
    WebhookDeadLetters,
    WebhookDelete,
    WebhookInfo,
    WebhookList,
    WebhookRedeliver,
    WebhooksResult,
)
from tallymark_protocol.schema import check_metric_code
from tallymark_runtime.catalog import decode_value
from tallymark_runtime.clock import Clock
from tallymark_runtime.coordinator import Coordinator, Delete, Get, KeyValue, Put, absent, unchanged

S = TypeVar("S", bound=msgspec.Struct)

WebhookCall = WebhookCreate | WebhookList | WebhookDelete | WebhookDeadLetters | WebhookRedeliver

SECRET_PREFIX: Final = "whsec_"  # noqa: S105 - what secrets begin with
_SECRET_BYTES: Final = 32
_SECRET_BYTES_MIN: Final = 24
_SECRET_BYTES_MAX: Final = 64
_ATTEMPTS_MAX: Final = 16  # of a change that others keep getting in the way of
_REDELIVER_MAX: Final = 50  # letters that one transaction turns into requests
_READS_MAX: Final = 16  # of alerts at a time


class WebhookCalls:
    """Answers the calls.

    Args:
        coordinator: where everything is.
        reader: of the alerts that dead letters are about, and of where webhooks begin.
        clock: tells when a webhook was made.
        secret_bytes: gives so many bytes that nobody can guess.
        allow_private: whether URLs may name addresses that aren't public.
    """

    def __init__(
        self,
        coordinator: Coordinator,
        reader: AlertReader,
        clock: Clock,
        secret_bytes: Callable[[int], bytes],
        *,
        allow_private: bool,
    ) -> None:
        self._coordinator = coordinator
        self._reader = reader
        self._clock = clock
        self._secret_bytes = secret_bytes
        self._allow_private = allow_private

    async def answer(self, call: WebhookCall) -> Message:
        """Carry out one call. Raises what the methods below raise."""
        match call:
            case WebhookCreate():
                return WebhooksResult([await self.create(call)])
            case WebhookList():
                return WebhooksResult(await self.describe_all())
            case WebhookDelete():
                return WebhooksResult([await self.delete(call.webhook_id)])
            case WebhookDeadLetters():
                return await self.dead_letters(call)
            case WebhookRedeliver():
                return WebhooksResult([await self.redeliver(call)])

    # ------------------------------------------------------------ creating

    async def create(self, call: WebhookCreate) -> WebhookInfo:
        """Create a webhook; one that is the same in everything but its description is the answer if it is there.

        Raises:
            InvalidRequestError: something about it is not allowed, or there are too many.
            UnavailableError: others keep changing webhooks, or a partition can't say where it ends now.
        """
        webhook = self._checked(call)
        webhook_id = id_of(webhook)
        key = webhook_key(webhook_id)
        item = await self._coordinator.get(key)
        progress = Progress({}) if item is not None or call.from_start else Progress(await self._ends())
        value = msgspec.msgpack.encode(webhook)
        for _ in range(_ATTEMPTS_MAX):
            if item is not None:
                existing = decode_value(Webhook, item)
                info = await self._info(item)
                return msgspec.structs.replace(info, secret=existing.secret)
            counted = await self._coordinator.get(TOTAL)
            total = Total(0, 0) if counted is None else decode_value(Total, counted)
            total = Total(total.count + 1, total.bytes + len(value))
            _check_total(total)
            result = await self._coordinator.txn(
                [absent(key), absent(TOTAL) if counted is None else unchanged(counted)],
                [
                    Put(key, value),
                    Put(progress_key(webhook_id), msgspec.msgpack.encode(progress)),
                    Put(TOTAL, msgspec.msgpack.encode(total)),
                ],
                [Get(key)],
            )
            if result.succeeded:
                return _describe(webhook_id, webhook, progress, None, 0, total.count, secret=webhook.secret)
            item = result.results[0][0] if result.results[0] else None
        raise _contended()

    def _checked(self, call: WebhookCreate) -> Webhook:
        check_url(call.url, allow_private=self._allow_private)
        if len(call.description.encode()) > limits.DESCRIPTION_BYTES_MAX:
            raise InvalidRequestError(
                f"a webhook's description has at most {limits.DESCRIPTION_BYTES_MAX} bytes"
            )
        accounts, codes = sorted(set(call.account_ids)), sorted(set(call.metric_codes))
        if len(accounts) > limits.SUBSCRIPTION_ACCOUNTS_MAX:
            raise InvalidRequestError(
                f"a webhook names at most {limits.SUBSCRIPTION_ACCOUNTS_MAX} accounts, not {len(accounts)}"
            )
        for account in accounts:
            if not 0 <= account <= limits.ACCOUNT_ID_MAX:
                raise InvalidRequestError(f"an account id is a whole number from 0 to 2^64-1, not {account}")
        if len(codes) > limits.SUBSCRIPTION_METRICS_MAX:
            raise InvalidRequestError(
                f"a webhook names at most {limits.SUBSCRIPTION_METRICS_MAX} metrics, not {len(codes)}"
            )
        for code in codes:
            check_metric_code(code)  # whether there is such a metric is open: it may come
        secret = call.secret
        if secret:
            check_secret(secret)
        else:
            secret = SECRET_PREFIX + base64.b64encode(self._secret_bytes(_SECRET_BYTES)).decode()
        return Webhook(call.url, secret, accounts, codes, call.description, self._clock.now_ns())

    async def _ends(self) -> dict[int, int]:
        batch = await self._reader.next_batch(
            account_ids=(), metric_codes=(), since=None, limit=1, wait_s=0.0
        )
        return batch.next

    # ------------------------------------------------------------ listing

    async def describe_all(self) -> list[WebhookInfo]:
        """All webhooks, the oldest first. One whose record can't be read is left out."""
        webhooks, progress, owners = await asyncio.gather(
            *(self._coordinator.range(prefix) for prefix in (WEBHOOKS, PROGRESS, OWNERS))
        )
        written = {item.key[len(PROGRESS) :]: item for item in progress.items}
        owned = {item.key[len(OWNERS) :]: item for item in owners.items}
        count = len(webhooks.items)
        infos: list[WebhookInfo] = []
        for item in sorted(webhooks.items, key=lambda one: one.create_revision):
            webhook = _readable(Webhook, item)
            name = item.key[len(WEBHOOKS) :]
            if webhook is not None:
                infos.append(
                    _describe(
                        name.decode("utf-8", "replace"),
                        webhook,
                        _readable(Progress, written.get(name)),
                        _readable(Owner, owned.get(name)),
                        None,
                        count,
                    )
                )
        return infos

    async def _info(self, item: KeyValue) -> WebhookInfo:
        """One webhook, with the dead letters as they are this moment."""
        webhook_id = item.key[len(WEBHOOKS) :].decode("utf-8", "replace")
        read = await self._coordinator.txn(
            [],
            [
                Get(progress_key(webhook_id)),
                Get(owner_key(webhook_id)),
                Get(letters_prefix(webhook_id), is_prefix=True),
                Get(TOTAL),
            ],
        )
        progress, owner, letters, totals = read.results
        total = _readable(Total, totals[0] if totals else None)
        return _describe(
            webhook_id,
            decode_value(Webhook, item),
            _readable(Progress, progress[0] if progress else None),
            _readable(Owner, owner[0] if owner else None),
            len(letters),
            1 if total is None else total.count,
        )

    # ------------------------------------------------------------ deleting

    async def delete(self, webhook_id: str) -> WebhookInfo:
        """Delete a webhook and everything about it; return what it was.

        Raises:
            NotFoundError: there is none.
            UnavailableError: others keep changing webhooks.
        """
        for _ in range(_ATTEMPTS_MAX):
            item = await self._find(webhook_id)
            info = await self._info(item)
            counted = await self._coordinator.get(TOTAL)
            total = Total(1, len(item.value)) if counted is None else decode_value(Total, counted)
            total = Total(max(total.count - 1, 0), max(total.bytes - len(item.value), 0))
            result = await self._coordinator.txn(
                [unchanged(item), absent(TOTAL) if counted is None else unchanged(counted)],
                [
                    Delete(item.key),
                    Delete(owner_key(webhook_id)),
                    Delete(progress_key(webhook_id)),
                    Delete(letters_prefix(webhook_id), is_prefix=True),
                    Delete(requests_prefix(webhook_id), is_prefix=True),
                    Put(TOTAL, msgspec.msgpack.encode(total)),
                ],
            )
            if result.succeeded:
                return info
        raise _contended()

    async def _find(self, webhook_id: str) -> KeyValue:
        # An id is part of keys: one with a slash would reach other keys' prefixes.
        item = None
        if is_id(webhook_id):
            item = await self._coordinator.get(webhook_key(webhook_id))
        if item is None:
            raise NotFoundError(f"there is no webhook {webhook_id!r}")
        return item

    # ------------------------------------------------------------ dead letters

    async def dead_letters(self, call: WebhookDeadLetters) -> DeadLettersResult:
        """Dead letters, the oldest first, with their alerts read from the stores.

        Raises:
            InvalidRequestError: the limit is none.
            NotFoundError: there is no such webhook.
            UnavailableError: an alert can't be read now.
        """
        most = limits.WEBHOOK_DEAD_LETTERS_MAX
        if not 1 <= call.limit <= most:
            raise InvalidRequestError(f"limit is 1 to {most}, not {call.limit}")
        await self._find(call.webhook_id)
        found = await self._letters(call.webhook_id)
        found.sort(key=lambda one: (one[2].first_ns, one[0]))
        slots = asyncio.Semaphore(_READS_MAX)

        async def read(place: Place, letter: Letter) -> DeadLetter | None:
            async with slots:
                alert = await self._reader.alert(*place)
            if alert is None:  # the store was restored to an earlier state: there is nothing to tell
                return None
            return DeadLetter(alert, letter.attempts, letter.first_ns, letter.last_ns, letter.error)

        try:
            async with asyncio.TaskGroup() as group:  # the first that can't be read ends the others
                reads = [group.create_task(read(place, letter)) for place, _, letter in found[: call.limit]]
        except ExceptionGroup as raised:
            raise raised.exceptions[0] from None
        letters = [one.result() for one in reads]
        return DeadLettersResult([letter for letter in letters if letter is not None], len(found))

    async def redeliver(self, call: WebhookRedeliver) -> WebhookInfo:
        """Ask the owner to try dead letters again, and to go on where the webhook is paused.

        Ids that are of no dead letter are passed over: an earlier attempt of the same call may have moved them.

        Raises:
            NotFoundError: there is no such webhook.
            UnavailableError: others keep changing the letters.
        """
        item = await self._find(call.webhook_id)
        wanted = set(call.alert_ids)
        resume = Put(request_key(call.webhook_id, None), b"")
        for _ in range(_ATTEMPTS_MAX + limits.WEBHOOK_DEAD_LETTERS_MAX // _REDELIVER_MAX):
            letters = await self._letters(call.webhook_id)
            letters = [one for one in letters if not wanted or one[2].alert_id in wanted]
            moved = letters[:_REDELIVER_MAX]
            result = await self._coordinator.txn(
                [unchanged(item), *(unchanged(letter) for _, letter, _ in moved)],
                [
                    resume,
                    *(Delete(letter.key) for _, letter, _ in moved),
                    *(Put(request_key(call.webhook_id, place), b"") for place, _, _ in moved),
                ],
            )
            if result.succeeded and len(moved) == len(letters):
                return await self._info(item)
            if not result.succeeded:
                item = await self._find(call.webhook_id)
        raise _contended()

    async def _letters(self, webhook_id: str) -> list[tuple[Place, KeyValue, Letter]]:
        listed = await self._coordinator.range(letters_prefix(webhook_id))
        found: list[tuple[Place, KeyValue, Letter]] = []
        for item in listed.items:
            place, letter = place_of(item.key), _readable(Letter, item)
            if place is not None and letter is not None and item.key == letter_key(webhook_id, place):
                found.append((place, item, letter))
        return found


def check_secret(secret: str) -> None:
    """Refuse a secret that is none of the Standard Webhooks' symmetric ones.

    Raises:
        InvalidRequestError: it isn't one. The message doesn't repeat it.
    """
    key = b""
    if secret.startswith(SECRET_PREFIX):
        try:
            key = base64.b64decode(secret.removeprefix(SECRET_PREFIX).encode(), validate=True)
        except (binascii.Error, UnicodeError):
            key = b""
    if not _SECRET_BYTES_MIN <= len(key) <= _SECRET_BYTES_MAX:
        raise InvalidRequestError(
            f"a webhook's secret is {SECRET_PREFIX!r} and the base64 of {_SECRET_BYTES_MIN} to "
            f"{_SECRET_BYTES_MAX} random bytes"
        )


def id_of(webhook: Webhook) -> str:
    """The id of a webhook: the same for the same URL, secret and filter."""
    what = msgspec.msgpack.encode([webhook.url, webhook.secret, webhook.account_ids, webhook.metric_codes])
    return "wh_" + hashlib.blake2b(what, digest_size=12).hexdigest()


def is_id(webhook_id: str) -> bool:
    """Whether a text can be a webhook's id."""
    name = webhook_id.removeprefix("wh_")
    return name != webhook_id and len(name) == 24 and all(one in "0123456789abcdef" for one in name)


def _check_total(total: Total) -> None:
    if total.count > limits.WEBHOOKS_MAX:
        raise InvalidRequestError(
            f"there are {limits.WEBHOOKS_MAX} webhooks already, and no more are allowed"
        )
    if total.bytes > WEBHOOKS_BYTES_MAX:
        raise InvalidRequestError(
            f"all webhooks together, with their URLs and filters, have at most {WEBHOOKS_BYTES_MAX} bytes"
        )


def _describe(
    webhook_id: str,
    webhook: Webhook,
    progress: Progress | None,
    owner: Owner | None,
    letters: int | None,
    webhooks: int,
    *,
    secret: str = "",
) -> WebhookInfo:
    """What is told of a webhook; `letters` as counted now, None: as its owner has written."""
    if progress is None:
        progress = Progress({}, paused="its progress can't be read")
    dead = progress.dead if letters is None else letters
    paused = progress.paused
    if not paused and dead >= letters_max(webhooks):
        paused = f"there are {dead} dead letters; redeliver them to go on"
    return WebhookInfo(
        id=webhook_id,
        url=webhook.url,
        account_ids=webhook.account_ids,
        metric_codes=webhook.metric_codes,
        description=webhook.description,
        created_at_ns=webhook.created_at_ns,
        secret=secret,
        pending=sum(entry.attempts > 0 for entry in progress.pending),
        dead=dead,
        paused=paused,
        last_error=progress.last_error,
        owner="" if owner is None else owner.node_id,
    )


def _readable(kind: type[S], item: KeyValue | None) -> S | None:
    if item is None:
        return None
    try:
        return decode_value(kind, item)
    except RemoteProtocolError:
        return None


def _contended() -> UnavailableError:
    return UnavailableError("webhooks keep being changed by others", code=ErrorCode.TIMEOUT)
