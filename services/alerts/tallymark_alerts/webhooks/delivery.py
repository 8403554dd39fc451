"""Delivering to one endpoint, while this instance owns it: three loops around an `Outbox`.

One loop reads alerts on from where the webhook is, as long as there is room for more; one tries what is due, a few at a
time; one writes the progress, in a transaction that requires the owner key to be as this instance created it. Whatever
an endpoint does takes time only from its own loops: endpoints share nothing but the process.

Of a delivery that a former owner began only the place is known. Its alert is read when it is due, beside the attempts
and one at a time for each partition (`_find`): so a partition that can't be read holds up its own deliveries only.

The owner key lives under a lease. Nothing is tried once that may have run out (`Shared.may_send`), and a write after it is
refused by the coordinator; so two instances deliver at one time for no longer than an attempt takes, and the progress
has one writer.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TypeVar

import msgspec

from tallymark_alerts.webhooks import message
from tallymark_alerts.webhooks.counters import WebhookCounters
from tallymark_alerts.webhooks.outbox import Delivery, Outbox, Unsaved
from tallymark_alerts.webhooks.ports import AlertReader, Sender
from tallymark_alerts.webhooks.records import (
    Place,
    Progress,
    RequestCatalog,
    Webhook,
    letter_key,
    letters_max,
    letters_prefix,
    owner_key,
    pending_max,
    place_of,
    progress_key,
)
from tallymark_alerts.webhooks.schedule import Outcome, OutcomeKind, Schedule, failure
from tallymark_protocol.errors import TallymarkError
from tallymark_protocol.messages import AlertRecord
from tallymark_runtime.catalog import decode_value
from tallymark_runtime.clock import Clock
from tallymark_runtime.coordinator import (
    Compare,
    Coordinator,
    Delete,
    Get,
    KeyValue,
    Put,
    Target,
    TxnResult,
    unchanged,
)

_log = logging.getLogger(__name__)

T = TypeVar("T")

READ_MAX = 64  # alerts that are read at a time
READ_WAIT_S = 20.0  # for which a read is held
CONNECTIONS_MAX = 8  # of an endpoint
ATTEMPTS_IN_ALL = 2_048  # of all endpoints of an instance: each is a socket
SAVE_INTERVAL_S = 1.0  # between two writes of an endpoint's progress, at least
SAVES_PER_S = 50  # of all endpoints of an instance, about
_RETRY_FIRST_S = 0.1  # of what the coordinator or the stores can't answer now
_RETRY_MOST_S = 5.0
_LOOK_S = 0.2  # before it is looked again whether the lease has been renewed
_UNREADABLE_S = 5.0  # before an alert is read again that couldn't be
_STUCK_FAILURES = (
    5  # of one write: nothing more is read until it succeeds, as it would all be delivered again
)
_EMPTY_S = 0.05  # before the next read after one that found nothing: whoever ends waits early is not asked in a circle
_REQUESTS_MAX = 50  # that one transaction grants


class LostError(TallymarkError):
    """This instance is not the webhook's owner any more."""


class Shared:
    """What all endpoints of an instance share.

    Attributes:
        webhooks: how many there are in the cluster; bounds depend on it.
        owned: how many endpoints this instance delivers for.
        may_send: whether the lease is surely in force.
    """

    def __init__(
        self,
        *,
        coordinator: Coordinator,
        clock: Clock,
        rng: random.Random,
        reader: AlertReader,
        requests: RequestCatalog,
        counters: WebhookCounters,
        schedule: Schedule,
        make_sender: Callable[[Webhook], Sender],
        user_agent: str,
    ) -> None:
        self.coordinator = coordinator
        self.clock = clock
        self.rng = rng
        self.reader = reader
        self.requests = requests
        self.counters = counters
        self.schedule = schedule
        self.make_sender = make_sender
        self.user_agent = user_agent
        self.webhooks = 0
        self.owned = 0
        self.may_send: Callable[[], bool] = _never

    @property
    def connections(self) -> int:
        """How many attempts an endpoint may have under way."""
        return max(1, min(CONNECTIONS_MAX, ATTEMPTS_IN_ALL // max(self.owned, 1)))

    @property
    def save_interval_s(self) -> float:
        """How long an endpoint waits between two writes of its progress."""
        return max(SAVE_INTERVAL_S, self.owned / SAVES_PER_S)


def _never() -> bool:
    return False


class Endpoint:
    """Delivers for one webhook. `run` it in a task; `finish` or cancel it.

    Args:
        webhook_id: whose.
        webhook: what it wants.
        owner_revision: the create revision of this instance's owner key.
        shared: what it shares with the others.
    """

    def __init__(self, webhook_id: str, webhook: Webhook, owner_revision: int, shared: Shared) -> None:
        self.webhook_id = webhook_id
        self.owner_revision = owner_revision
        self.outbox: Outbox | None = None  # None until its progress has been read
        self._webhook = webhook
        self._shared = shared
        self._signer = message.Signer(webhook.secret, shared.user_agent)
        self._sender = shared.make_sender(webhook)
        self._under_way: set[asyncio.Task[None]] = set()
        # By partition: what is due and whose alert is not here yet, and who reads it. Both have an entry, or neither.
        self._unread: dict[int, deque[Delivery]] = {}
        self._finding: dict[int, asyncio.Task[None]] = {}
        self._news = asyncio.Event()  # for the loop that tries
        self._room = asyncio.Event()  # for the loop that reads
        self._dirty = asyncio.Event()  # for the loop that writes
        self._granted: dict[
            bytes, int
        ] = {}  # requests that the outbox has, by the revision they were made at
        self._is_finishing = False
        self._writing = asyncio.Lock()
        self._is_stuck = False  # the progress can't be written
        self._progress_revision = 0  # at which the progress was written that the outbox goes on from

    # ------------------------------------------------------------ from outside

    @property
    def is_paused(self) -> bool:
        """Whether nothing is tried, because the endpoint wants nothing more or there are too many dead letters."""
        return self.outbox is not None and self._is_paused(self.outbox)

    def on_request(self) -> None:
        """Something is asked of the owner."""
        self._dirty.set()

    def on_webhooks(self) -> None:
        """There are more webhooks, or fewer: bounds have changed."""
        self._news.set()
        self._room.set()

    async def run(self) -> None:
        """Deliver until cancelled.

        Raises:
            LostError: another instance may be the owner.
            TallymarkError: its progress can't be read.
        """
        shared = self._shared
        try:
            self.outbox = Outbox(await self._load(), shared.schedule, shared.clock.now_ns())
            async with asyncio.TaskGroup() as group:
                group.create_task(self._read(self.outbox))
                group.create_task(self._try(self.outbox))
                group.create_task(self._save(self.outbox))
        except BaseExceptionGroup as raised:
            found = raised.exceptions[0]
            raise found from None
        finally:
            begun = [*self._under_way, *self._finding.values()]
            for task in begun:
                task.cancel()
            await asyncio.gather(*begun, return_exceptions=True)
            await self._sender.close()

    async def finish(self, wait_s: float) -> None:
        """Begin nothing more, let end what is under way, and write the progress; then cancel `run`.

        Raises:
            LostError: another instance may be the owner.
            TimeoutError: the progress couldn't be written in time.
        """
        self._is_finishing = True
        if self.outbox is None:
            return
        with contextlib.suppress(TimeoutError):  # what is under way then is cancelled, and pending
            async with asyncio.timeout(wait_s):
                await asyncio.gather(*self._under_way, return_exceptions=True)
        async with asyncio.timeout(wait_s):
            await self._write(self.outbox)

    async def _load(self) -> Progress:
        """What the last owner wrote. Nobody else can write any more: the owner key is ours."""
        item = await self._patiently(lambda: self._shared.coordinator.get(progress_key(self.webhook_id)))
        if item is None:
            raise LostError(f"the webhook {self.webhook_id} has no progress")
        self._progress_revision = item.mod_revision
        return decode_value(Progress, item)

    # ------------------------------------------------------------ reading

    async def _read(self, outbox: Outbox) -> None:
        shared, webhook = self._shared, self._webhook
        delay_s = _RETRY_FIRST_S
        while True:
            room = pending_max(shared.webhooks) - outbox.outstanding
            is_held = self._is_stuck or self._is_held(outbox)
            if room <= 0 or is_held or not shared.may_send():
                await self._wait(self._room, self._look_s())
                continue
            try:
                batch = await shared.reader.next_batch(
                    account_ids=webhook.account_ids,
                    metric_codes=webhook.metric_codes,
                    since=dict(outbox.positions),
                    limit=min(room, READ_MAX),
                    wait_s=READ_WAIT_S,
                )
            except TallymarkError as error:
                _log.info("no alerts for the webhook %s: %s", self.webhook_id, error)
                await asyncio.sleep(delay_s)
                delay_s = min(delay_s * 2, _RETRY_MOST_S)
                continue
            delay_s = _RETRY_FIRST_S
            if self._is_finishing:
                continue  # not taken: the position stays where it is
            outbox.take(batch, shared.clock.now_ns())
            if outbox.is_unsaved:
                self._news.set()
                self._dirty.set()
            if not batch.alerts:
                await asyncio.sleep(_EMPTY_S)

    def _is_paused(self, outbox: Outbox) -> bool:
        return bool(outbox.paused) or outbox.letters >= letters_max(self._shared.webhooks)

    def _is_held(self, outbox: Outbox) -> bool:
        return self._is_finishing or self._is_paused(outbox)

    # ------------------------------------------------------------ trying

    async def _try(self, outbox: Outbox) -> None:
        shared = self._shared
        while True:
            now_ns = shared.clock.now_ns()
            free = shared.connections - len(self._under_way)
            if free <= 0 or self._is_held(outbox) or not shared.may_send():
                await self._wait(self._news, self._look_s())
                continue
            for delivery in outbox.due(now_ns, free):
                if delivery.alert is None:
                    self._find_first(outbox, delivery)
                else:
                    task = asyncio.get_running_loop().create_task(
                        self._attempt(outbox, delivery, delivery.alert)
                    )
                    self._under_way.add(task)
                    task.add_done_callback(self._ended)
            next_ns = outbox.next_ns()
            if next_ns is None or len(self._under_way) >= shared.connections:
                await self._wait(self._news, None)
            else:
                await self._wait(self._news, min(max(next_ns - now_ns, 0) / 1e9, 60.0))

    def _look_s(self) -> float | None:
        """When to look again after finding that nothing may be done; None: whatever changes that will tell."""
        return None if self._shared.may_send() else _LOOK_S

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._under_way.discard(task)
        self._wake()
        if not task.cancelled() and task.exception() is not None:
            _log.error("an attempt for the webhook %s failed", self.webhook_id, exc_info=task.exception())

    def _wake(self) -> None:
        for event in (self._news, self._room, self._dirty):
            event.set()

    async def _attempt(self, outbox: Outbox, delivery: Delivery, alert: AlertRecord) -> None:
        shared = self._shared
        began_ns, began = shared.clock.now_ns(), shared.clock.monotonic_ns()
        try:
            body = message.body_of(alert)
            outcome = await self._sender.post(self._signer.headers(alert.id, began_ns, body), body)
        except asyncio.CancelledError:
            outbox.put_back(delivery, began_ns)
            raise
        except Exception as error:
            outcome = self._defect(error)
        self._conclude(outbox, delivery, outcome, began_ns, began)

    def _defect(self, error: Exception) -> Outcome:
        """The outcome of what failed here; no reason to stop delivering what can be delivered."""
        _log.error("an attempt for the webhook %s failed", self.webhook_id, exc_info=error)
        return failure(OutcomeKind.CONNECTION, f"{type(error).__name__}: {error}")

    def _conclude(
        self, outbox: Outbox, delivery: Delivery, outcome: Outcome, began_ns: int, began: int
    ) -> None:
        shared = self._shared
        now_ns = shared.clock.now_ns()
        counters = shared.counters
        counters.attempts[outcome.kind] += 1
        counters.attempt_ns.observe(shared.clock.monotonic_ns() - began)
        if outcome.is_delivered and delivery.alert is not None:
            counters.delivered_ns.observe(max(now_ns - delivery.alert.triggered_at_ns, 0))
        letters = outbox.letters
        outbox.finish(delivery, outcome, began_ns=began_ns, now_ns=now_ns, rng=shared.rng)
        counters.letters += outbox.letters - letters

    # ------------------------------------------------------------ alerts that a former owner had

    def _find_first(self, outbox: Outbox, delivery: Delivery) -> None:
        """Have a delivery's alert read; until that is done it counts as under way, but takes no attempt's slot."""
        partition = delivery.place[0]
        queue = self._unread.get(partition)
        if queue is None:
            queue = self._unread[partition] = deque()
            task = asyncio.get_running_loop().create_task(self._find(outbox, partition, queue))
            self._finding[partition] = task
            task.add_done_callback(self._ended)
        queue.append(delivery)

    async def _find(self, outbox: Outbox, partition: int, queue: deque[Delivery]) -> None:
        """Read a partition's alerts, one after another, until none is asked for or nothing may be tried."""
        try:
            while queue and not self._is_held(outbox):
                if not await self._find_next(outbox, queue):
                    await asyncio.sleep(_UNREADABLE_S)
        finally:
            for delivery in queue:
                outbox.put_back(delivery, delivery.next_ns)
            del self._unread[partition], self._finding[partition]

    async def _find_next(self, outbox: Outbox, queue: deque[Delivery]) -> bool:
        """Read one alert; say whether that could be done. An alert that can't be read now is no failed attempt."""
        shared, delivery = self._shared, queue[0]
        began_ns, began = shared.clock.now_ns(), shared.clock.monotonic_ns()
        try:
            delivery.alert = await shared.reader.alert(*delivery.place)
            outcome = failure(OutcomeKind.MISSING, "the alert is not in its store any more")
        except TallymarkError as error:
            _log.info("an alert for the webhook %s can't be read: %s", self.webhook_id, error)
            queue.rotate(-1)  # should it be this one only, the others are read before it is tried again
            return False
        except Exception as error:
            outcome = self._defect(error)
        queue.popleft()
        if delivery.alert is not None or self._is_held(outbox):
            outbox.put_back(delivery, delivery.next_ns)
        else:
            self._conclude(outbox, delivery, outcome, began_ns, began)
        self._wake()
        return True

    # ------------------------------------------------------------ writing

    async def _save(self, outbox: Outbox) -> None:
        while True:
            if not outbox.is_unsaved and not self._asked():
                self._dirty.clear()
                await self._dirty.wait()
                continue
            await self._write(outbox)
            await asyncio.sleep(self._shared.save_interval_s)

    def _asked(self) -> list[KeyValue]:
        return self._shared.requests.of(self.webhook_id)

    async def _write(self, outbox: Outbox) -> None:
        """Write what is unsaved, and grant what was asked for, in one transaction.

        Raises:
            LostError: the owner key is not ours any more, or the progress is not what was written last.
        """
        async with self._writing:
            asked = self._asked()[:_REQUESTS_MAX]
            await self._grant(outbox, asked)
            if not outbox.is_unsaved and not asked:
                return
            unsaved = outbox.unsaved()
            value = msgspec.msgpack.encode(unsaved.progress)
            compares, operations = self._transaction(unsaved, value, asked)
            read = [Get(owner_key(self.webhook_id)), Get(progress_key(self.webhook_id))]
            result = await self._commit(compares, operations, read)
            revision = result.revision
            if not result.succeeded:
                owner, progress = result.results
                if not owner or owner[0].create_revision != self.owner_revision:
                    raise LostError(f"the webhook {self.webhook_id} has another owner, or none")
                if progress and progress[0].mod_revision == self._progress_revision:
                    # A request was made anew: look again.
                    await self._patiently(self._shared.requests.catch_up)
                    return
                # An attempt whose answer was lost has taken effect; if not, there was another writer.
                if not progress or progress[0].value != value:
                    raise LostError(f"the progress of the webhook {self.webhook_id} was written by others")
                revision = progress[0].mod_revision
            self._progress_revision = revision
            self._shared.counters.writes += 1
            outbox.saved(unsaved)
            for item in asked:
                self._granted.pop(item.key, None)
            if asked:  # must not be seen again: they would be granted again
                await self._patiently(lambda: self._shared.requests.wait_revision(revision))

    async def _commit(
        self, compares: list[Compare], operations: list[Put | Delete], read: list[Get]
    ) -> TxnResult:
        """Have the coordinator do it, however long that takes.

        Whatever the error is: to begin anew would be to deliver again what couldn't be written, over and over.
        """
        failures = 0
        delay_s = _RETRY_FIRST_S
        while True:
            try:
                result = await self._shared.coordinator.txn(compares, operations, read)
            except TallymarkError as error:
                failures += 1
                self._shared.counters.write_failures += 1
                self._is_stuck = failures >= _STUCK_FAILURES
                _log.warning("the progress of the webhook %s can't be written: %s", self.webhook_id, error)
            else:
                self._is_stuck = False
                self._room.set()
                return result
            await asyncio.sleep(delay_s)
            delay_s = min(delay_s * 2, _RETRY_MOST_S)

    def _transaction(
        self, unsaved: Unsaved, value: bytes, asked: list[KeyValue]
    ) -> tuple[list[Compare], list[Put | Delete]]:
        key = progress_key(self.webhook_id)
        compares = [
            Compare(owner_key(self.webhook_id), Target.CREATE_REVISION, "=", self.owner_revision),
            Compare(key, Target.MOD_REVISION, "=", self._progress_revision),
        ]
        compares += [unchanged(item) for item in asked]
        operations: list[Put | Delete] = [Put(key, value)]
        operations += [
            Put(letter_key(self.webhook_id, place), msgspec.msgpack.encode(letter))
            for place, letter in unsaved.letters.items()
        ]
        operations += [Delete(item.key) for item in asked]
        return compares, operations

    async def _grant(self, outbox: Outbox, asked: list[KeyValue]) -> None:
        new = [item for item in asked if self._granted.get(item.key) != item.mod_revision]
        if not new:
            return
        prefix = letters_prefix(self.webhook_id)
        left = await self._patiently(lambda: self._shared.coordinator.range(prefix))
        now_ns = self._shared.clock.now_ns()
        places: list[Place] = []
        for item in new:
            self._granted[item.key] = item.mod_revision
            place = place_of(item.key)
            if place is not None:
                places.append(place)
        outbox.redeliver(places, len(left.items), now_ns)
        outbox.resume(now_ns)
        self._news.set()
        self._room.set()

    # ------------------------------------------------------------ waiting

    async def _patiently(self, ask: Callable[[], Awaitable[T]]) -> T:
        """Ask the coordinator until it answers. What can't succeed by repeating is raised."""
        delay_s = _RETRY_FIRST_S
        while True:
            try:
                return await ask()
            except TallymarkError as error:
                if not error.retriable:
                    raise
                _log.info("the coordinator doesn't answer about the webhook %s: %s", self.webhook_id, error)
            await asyncio.sleep(delay_s)
            delay_s = min(delay_s * 2, _RETRY_MOST_S)

    @staticmethod
    async def _wait(event: asyncio.Event, timeout_s: float | None) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                await event.wait()
        except TimeoutError:
            return
        finally:
            event.clear()
