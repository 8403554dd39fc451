"""What the coordinator knows of webhooks: keys, the records under them, and bounds on how much of them there is.

    webhooks/<id>                                   `Webhook`; never changes
    webhook_total                                   `Total`: how many there are, exactly; changed with each of them
    webhook_instances/<instance>                    `Instance`, under its lease: who may deliver
    webhook_owners/<id>                             `Owner`, under its lease: who does
    webhook_progress/<id>                           `Progress`; written by the owner only
    webhook_dead/<id>/<partition>/<position>        `Letter`
    webhook_redeliver/<id>/<partition>/<position>   a letter that its owner is to try again; b""
    webhook_redeliver/<id>/resume                   the owner is to go on where it is paused; b""

No usage is there: the alerts themselves stay in the stores and are found by partition and position. A letter changes
into a request to redeliver in one transaction, and that one into a pending delivery in another: so at any moment a
delivery that was begun and didn't succeed is in exactly one of the three.

**Bounds.** A coordinator is small (an embedded one holds 16 MiB, and leadership needs some of it). A webhook may have as
many pending deliveries and dead letters as limits say, as long as all webhooks together keep within `PENDING_IN_ALL`
and `LETTERS_IN_ALL`: with many webhooks each has its share. A webhook above its share (as there are more of them now)
keeps what it has and gets no more.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final, TypeVar

import msgspec

from tallymark_protocol import limits
from tallymark_protocol.errors import RemoteProtocolError
from tallymark_runtime.catalog import Catalog, decode_value
from tallymark_runtime.coordinator import Coordinator, KeyValue

_log = logging.getLogger(__name__)

S = TypeVar("S", bound=msgspec.Struct)
Place = tuple[int, int]  # partition and position: an alert's name in the store

WEBHOOKS: Final = b"webhooks/"
TOTAL: Final = b"webhook_total"
INSTANCES: Final = b"webhook_instances/"
OWNERS: Final = b"webhook_owners/"
PROGRESS: Final = b"webhook_progress/"
LETTERS: Final = b"webhook_dead/"
REQUESTS: Final = b"webhook_redeliver/"
_RESUME: Final = b"resume"

PENDING_IN_ALL: Final = 50_000  # pending deliveries of all webhooks: about 30 bytes each
LETTERS_IN_ALL: Final = 20_000  # dead letters of all webhooks: about 250 bytes each
WEBHOOKS_BYTES_MAX: Final = 2 * 1024 * 1024  # of all webhooks' records
_SHARE_MIN: Final = 20


class Webhook(msgspec.Struct, frozen=True):
    """An endpoint and what it wants."""

    url: str
    secret: str
    account_ids: list[int]  # none: all
    metric_codes: list[str]  # none: all
    description: str
    created_at_ns: int


class Total(msgspec.Struct, frozen=True):
    """All webhooks together."""

    count: int
    bytes: int


class Instance(msgspec.Struct, frozen=True):
    """An alerts process that may deliver."""

    node_id: str


class Owner(msgspec.Struct, frozen=True):
    """Who delivers for a webhook."""

    node_id: str
    instance: str  # of this process life


class Pending(msgspec.Struct, frozen=True, array_like=True):
    """A delivery that was begun (or is about to be) and hasn't succeeded."""

    partition: int
    position: int
    attempts: int = 0
    first_ns: int = 0  # of the first attempt; 0 before it
    next_ns: int = 0  # not to be tried before


class Progress(msgspec.Struct, frozen=True):
    """How far a webhook is: each matching alert below its partition's position is delivered, pending or dead."""

    positions: dict[int, int]
    pending: list[Pending] = []
    dead: int = 0  # how many letters there are; as of this writing
    paused: str = ""  # why nothing is tried; ""
    last_error: str = ""  # of the last attempt; "" where that went well


class Letter(msgspec.Struct, frozen=True):
    """A delivery that was given up."""

    alert_id: str
    attempts: int
    first_ns: int
    last_ns: int
    error: str


def webhook_key(webhook_id: str) -> bytes:
    """The key of a webhook."""
    return WEBHOOKS + webhook_id.encode()


def instance_key(instance: str) -> bytes:
    """The key of a process life."""
    return INSTANCES + instance.encode()


def owner_key(webhook_id: str) -> bytes:
    """The key of a webhook's owner."""
    return OWNERS + webhook_id.encode()


def progress_key(webhook_id: str) -> bytes:
    """The key of a webhook's progress."""
    return PROGRESS + webhook_id.encode()


def letters_prefix(webhook_id: str) -> bytes:
    """What the keys of a webhook's dead letters begin with."""
    return LETTERS + webhook_id.encode() + b"/"


def requests_prefix(webhook_id: str) -> bytes:
    """What the keys of requests to a webhook's owner begin with."""
    return REQUESTS + webhook_id.encode() + b"/"


def letter_key(webhook_id: str, place: Place) -> bytes:
    """The key of a dead letter."""
    return letters_prefix(webhook_id) + _name_of(place)


def request_key(webhook_id: str, place: Place | None) -> bytes:
    """The key of a request to try a dead letter again, or (None) to go on."""
    return requests_prefix(webhook_id) + (_RESUME if place is None else _name_of(place))


def _name_of(place: Place) -> bytes:
    return b"%d/%d" % place


def place_of(key: bytes) -> Place | None:
    """The place that a letter's or request's key names; None where it names none."""
    parts = key.rsplit(b"/", 2)
    if len(parts) == 3 and parts[1].isdigit() and parts[2].isdigit():
        return int(parts[1]), int(parts[2])
    return None


def share(most: int, in_all: int, webhooks: int) -> int:
    """How many of something one webhook may have: `most`, or its share of `in_all` where there are many webhooks."""
    return max(_SHARE_MIN, min(most, in_all // max(webhooks, 1)))


def pending_max(webhooks: int) -> int:
    """How many deliveries of a webhook may be pending, where there are so many webhooks."""
    return share(limits.WEBHOOK_PENDING_MAX, PENDING_IN_ALL, webhooks)


def letters_max(webhooks: int) -> int:
    """With how many dead letters a webhook is paused, where there are so many webhooks."""
    return share(limits.WEBHOOK_DEAD_LETTERS_MAX, LETTERS_IN_ALL, webhooks)


class RecordCatalog(Catalog):
    """Follows records of one kind, by the last part of their keys. One that can't be read counts as absent.

    `on_change` is called with the name of each record that came, changed or went.
    """

    def __init__(self, coordinator: Coordinator, prefix: bytes, kind: type[msgspec.Struct]) -> None:
        super().__init__(coordinator, prefix)
        self.on_change: Callable[[str], None] = _ignore
        self._kind = kind
        self.found: dict[str, tuple[KeyValue, msgspec.Struct]] = {}

    def on_put(self, item: KeyValue) -> None:
        """A record came or changed."""
        name = self._name(item)
        try:
            self.found[name] = item, decode_value(self._kind, item)
        except RemoteProtocolError as error:
            _log.warning("a record of webhooks is taken for absent: %s", error.message)
            self.found.pop(name, None)
        self.on_change(name)

    def on_delete(self, item: KeyValue) -> None:
        """A record went."""
        name = self._name(item)
        self.found.pop(name, None)
        self.on_change(name)

    def _name(self, item: KeyValue) -> str:
        return item.key[len(self._prefix) :].decode("utf-8", "replace")


class WebhookCatalog(RecordCatalog):
    """The webhooks, by id."""

    def __init__(self, coordinator: Coordinator) -> None:
        super().__init__(coordinator, WEBHOOKS, Webhook)

    def get(self, webhook_id: str) -> Webhook | None:
        """A webhook; None where there is none."""
        found = self.found.get(webhook_id)
        if found is None:
            return None
        assert isinstance(found[1], Webhook), "decoded as one"
        return found[1]

    def ids(self) -> list[str]:
        """Of all webhooks, in order."""
        return sorted(self.found)


class OwnerCatalog(RecordCatalog):
    """Who owns what."""

    def __init__(self, coordinator: Coordinator) -> None:
        super().__init__(coordinator, OWNERS, Owner)

    def revision_of(self, webhook_id: str, instance: str) -> int:
        """The create revision of a webhook's owner key where that is this instance's, else 0."""
        found = self.found.get(webhook_id)
        if found is None or not isinstance(found[1], Owner) or found[1].instance != instance:
            return 0
        return found[0].create_revision

    def held(self) -> dict[str, int]:
        """How many webhooks each instance owns; those that own none are not in it."""
        counts: dict[str, int] = {}
        for _, owner in self.found.values():
            assert isinstance(owner, Owner), "decoded as one"
            counts[owner.instance] = counts.get(owner.instance, 0) + 1
        return counts

    def is_free(self, webhook_id: str) -> bool:
        """Whether nobody owns a webhook, as far as is known here. A key that can't be read is somebody's."""
        return self.item(owner_key(webhook_id)) is None


class RequestCatalog(Catalog):
    """What owners are asked for. `on_change` is called with the id of the webhook concerned."""

    def __init__(self, coordinator: Coordinator) -> None:
        super().__init__(coordinator, REQUESTS)
        self.on_change: Callable[[str], None] = _ignore
        self._by_webhook: dict[str, dict[bytes, KeyValue]] = {}

    def on_put(self, item: KeyValue) -> None:
        """Something is asked for."""
        webhook_id = self._webhook_id(item)
        self._by_webhook.setdefault(webhook_id, {})[item.key] = item
        self.on_change(webhook_id)

    def on_delete(self, item: KeyValue) -> None:
        """It was done."""
        webhook_id = self._webhook_id(item)
        of_webhook = self._by_webhook.get(webhook_id, {})
        of_webhook.pop(item.key, None)
        if not of_webhook:
            self._by_webhook.pop(webhook_id, None)

    def of(self, webhook_id: str) -> list[KeyValue]:
        """What is asked of a webhook's owner, by key."""
        return [item for _, item in sorted(self._by_webhook.get(webhook_id, {}).items())]

    @staticmethod
    def _webhook_id(item: KeyValue) -> str:
        return item.key[len(REQUESTS) :].split(b"/", 1)[0].decode("utf-8", "replace")


def _ignore(name: str) -> None:
    """Take the place of a callback that was not given."""
