"""Who delivers for which webhook: keys under this instance's lease, claimed, given up and taken over.

An instance has a lease and, under it, a key that says that it is there and one for each webhook that it owns. When it
dies, or can't renew the lease, the keys go and the others see it: a webhook without an owner is **free**. Whoever holds
fewest claims first: an instance waits a step longer for each one that holds fewer than itself, looks again, and claims a
few. An instance that holds more than its part gives one up at a time, after it has written its progress, so that those
that came later get theirs.

What is claimed is decided by the coordinator: the claim requires the owner key to be absent and the webhook to be there.
From then on every write of the progress requires the owner key to be that very one. When the lease is lost, everything
is stopped before another one is asked for.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Coroutine, Iterable, Mapping
from typing import Any, Final, TypeVar

import msgspec

from tallymark_alerts.webhooks.delivery import Endpoint, LostError, Shared
from tallymark_alerts.webhooks.records import (
    INSTANCES,
    Instance,
    Owner,
    OwnerCatalog,
    RecordCatalog,
    RequestCatalog,
    Webhook,
    WebhookCatalog,
    instance_key,
    owner_key,
    webhook_key,
)
from tallymark_protocol.errors import TallymarkError
from tallymark_runtime.clock import Clock
from tallymark_runtime.coordinator import Compare, Coordinator, Delete, Get, Put, Target, absent
from tallymark_runtime.lease import LeaseKeeper

_log = logging.getLogger(__name__)

T = TypeVar("T")

CLAIM_STEP_S: Final = 0.1  # that an instance leaves to each one that holds fewer
CLAIMS_MAX: Final = 16  # at a time
GIVE_UP_INTERVAL_S: Final = 0.5
FINISH_S: Final = 5.0  # for what is under way when an endpoint is given up, or the instance stops
_RETRY_S: Final = 0.5
_RESTART_FIRST_S: Final = 1.0  # before delivering is begun anew where it failed
_RESTART_MOST_S: Final = 60.0


def rank(instance: str, held: Mapping[str, int], instances: set[str]) -> int:
    """How many instances hold fewer webhooks than this one: it lets them claim before it."""
    mine = held.get(instance, 0)
    return sum(held.get(other, 0) < mine for other in instances if other != instance)


def surplus(instance: str, held: Mapping[str, int], instances: set[str], webhooks: int) -> int:
    """How many webhooks an instance holds beyond its part."""
    count = len(instances | {instance})
    return max(0, held.get(instance, 0) - -(-webhooks // count))


async def _all(steps: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Take steps side by side, and wait for all of them; the first failure is raised after the last has ended.

    A step that were left running would meet the next round's, about the same webhook.
    """
    results = await asyncio.gather(*steps, return_exceptions=True)
    done: list[T] = []
    for result in results:
        if isinstance(result, BaseException):
            raise result
        done.append(result)
    return done


class Owners:
    """Owns webhooks and runs their endpoints. `start` it, `close` it.

    Args:
        node_id: of this node.
        life: a name of this process life, that no other has.
        shared: what endpoints share.
        clock: of the lease.
        lease_ttl_s: how long the lease lasts.

    Attributes:
        endpoints: by webhook: what this instance delivers for.
    """

    def __init__(
        self,
        *,
        node_id: str,
        life: str,
        coordinator: Coordinator,
        requests: RequestCatalog,
        shared: Shared,
        clock: Clock,
        rng: random.Random,
        lease_ttl_s: float,
    ) -> None:
        self.endpoints: dict[str, Endpoint] = {}
        self.webhooks = WebhookCatalog(coordinator)
        self.owners = OwnerCatalog(coordinator)
        self._instances = RecordCatalog(coordinator, INSTANCES, Instance)
        self._requests = requests
        self._node_id = node_id
        self._life = life
        self._instance = life  # of this lease: see `_run`
        self._coordinator = coordinator
        self._shared = shared
        self._rng = rng
        self._keeper = LeaseKeeper(coordinator, clock, lease_ttl_s)
        self._tasks: dict[str, asyncio.Task[None]] = {}  # of endpoints
        self._changed = asyncio.Event()
        self._main: asyncio.Task[None] | None = None
        self._is_closing = False
        shared.may_send = self._may_send

    @property
    def has_lease(self) -> bool:
        """Whether this instance may own anything now."""
        return self._keeper.is_valid

    def _may_send(self) -> bool:
        return self._keeper.is_valid

    async def start(self) -> None:
        """Learn of the webhooks, and begin to own some."""
        for catalog in (self.webhooks, self.owners, self._instances):
            catalog.on_change = self._on_change
            await catalog.start()
        self._requests.on_change = self._on_request
        await self._requests.start()
        self._main = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        """Write every progress, and leave the webhooks to others."""
        self._is_closing = True
        self._changed.set()
        if self._main is not None:
            await asyncio.gather(self._main, return_exceptions=True)
        for catalog in (self.webhooks, self.owners, self._instances, self._requests):
            await catalog.close()

    def _on_change(self, _: str) -> None:
        self._changed.set()

    def _on_request(self, webhook_id: str) -> None:
        endpoint = self.endpoints.get(webhook_id)
        if endpoint is not None:
            endpoint.on_request()

    # ------------------------------------------------------------ the lease

    async def _run(self) -> None:
        lives = 0
        while not self._is_closing:
            lives += 1
            # Keys of a lease that was lost may be there for a while: they are those of somebody else.
            self._instance = f"{self._life}.{lives}"
            try:
                await self._keeper.grant()
                await self._announce()
                await self._own()
            except TallymarkError as error:
                _log.warning("no lease for delivering to webhooks: %s", error)
                await self._pause()
            except Exception:
                _log.exception("owning webhooks failed")
                await self._pause()

    async def _pause(self) -> None:
        self._changed.clear()
        if not self._is_closing:
            await self._wait_change(_RETRY_S)

    async def _own(self) -> None:
        """Own webhooks until the lease is lost or this instance stops; leave nothing behind."""
        lease = self._keeper.lease
        keeping = asyncio.get_running_loop().create_task(self._keeper.keep())
        keeping.add_done_callback(lambda _: self._changed.set())
        try:
            await self._manage(lease, keeping)
            if self._is_closing and not keeping.done():
                await self._finish_all()
        finally:
            await self._stop_all()
            if keeping.done() and not keeping.cancelled() and keeping.exception() is None:
                _log.warning("the lease for delivering to webhooks is lost: %s", keeping.result())
            keeping.cancel()
            await asyncio.gather(keeping, return_exceptions=True)
            await self._revoke(lease)

    async def _announce(self) -> None:
        value = msgspec.msgpack.encode(Instance(self._node_id))
        await self._coordinator.put(instance_key(self._instance), value, lease=self._keeper.lease)

    async def _revoke(self, lease: int) -> None:
        try:
            await self._coordinator.lease_revoke(lease)
        except TallymarkError as error:
            _log.info("the lease of webhooks is left to run out: %s", error)

    # ------------------------------------------------------------ who owns what

    async def _manage(self, lease: int, keeping: asyncio.Task[str]) -> None:
        """Own what falls to this instance, for as long as the lease is kept."""
        while not keeping.done() and not self._is_closing:
            self._changed.clear()
            await self._match_tasks()
            webhooks = self.webhooks.ids()
            if self._shared.webhooks != len(webhooks):
                self._shared.webhooks = len(webhooks)
                for endpoint in self.endpoints.values():
                    endpoint.on_webhooks()
            free = [one for one in webhooks if one not in self._tasks and self.owners.is_free(one)]
            held, instances = self.owners.held(), set(self._instances.found)
            try:
                if free:
                    before = rank(self._instance, held, instances)
                    if before:
                        await asyncio.sleep(before * CLAIM_STEP_S * (1 + self._rng.random()))
                        free = [one for one in free if self.owners.is_free(one)]
                    # A part, and not the first ones: others claim at the same time.
                    count = min(-(-len(free) // len(instances | {self._instance})), CLAIMS_MAX)
                    await self._claim(lease, self._rng.sample(free, count))
                elif surplus(self._instance, held, instances, len(webhooks)):
                    await asyncio.sleep(GIVE_UP_INTERVAL_S)
                    await self._give_up()
                else:
                    await self._wait_change(None)
            except TallymarkError as error:
                _log.warning("webhooks can't be claimed or given up: %s", error)
                await asyncio.sleep(_RETRY_S)

    async def _match_tasks(self) -> None:
        """Run endpoints for exactly the owner keys that are this instance's."""
        for webhook_id in sorted(self._tasks):
            endpoint = self.endpoints.get(webhook_id)
            revision = self.owners.revision_of(webhook_id, self._instance)
            is_ours = endpoint is None or revision == endpoint.owner_revision
            if not revision or not is_ours or self.webhooks.get(webhook_id) is None:
                await self._stop(webhook_id)
        for webhook_id in self.webhooks.ids():
            revision = self.owners.revision_of(webhook_id, self._instance)
            webhook = self.webhooks.get(webhook_id)
            if revision and webhook is not None and webhook_id not in self._tasks:
                self._begin(webhook_id, webhook, revision)

    async def _claim(self, lease: int, webhook_ids: list[str]) -> None:
        revisions = await _all(self._claim_one(lease, one) for one in webhook_ids)
        if any(revisions):
            # Endpoints begin as soon as the keys are seen: one way only, also for a claim whose answer was lost.
            await self.owners.wait_revision(max(revisions))
            self._changed.set()
        elif webhook_ids:
            await self.owners.catch_up()

    async def _claim_one(self, lease: int, webhook_id: str) -> int:
        key = owner_key(webhook_id)
        owner = Owner(self._node_id, self._instance)
        result = await self._coordinator.txn(
            [absent(key), Compare(webhook_key(webhook_id), Target.CREATE_REVISION, ">", 0)],
            [Put(key, msgspec.msgpack.encode(owner), lease)],
            [Get(key)],
        )
        return result.revision if result.succeeded else 0

    async def _give_up(self) -> None:
        """Leave some webhooks to others, if there are still more than this instance's part."""
        held, instances = self.owners.held(), set(self._instances.found)
        count = surplus(self._instance, held, instances, len(self.webhooks.found))
        # A few at a time: while they are on their way, others may come who change what everybody's part is.
        count = min(-(-count // 4), CLAIMS_MAX, len(self._tasks))
        await _all(self._leave(one) for one in self._rng.sample(sorted(self._tasks), count))

    async def _leave(self, webhook_id: str) -> None:
        revision = self.owners.revision_of(webhook_id, self._instance)
        endpoint = self.endpoints.get(webhook_id)
        try:
            if endpoint is not None:
                await endpoint.finish(FINISH_S)
        except TimeoutError:
            _log.warning("the progress of the webhook %s can't be written", webhook_id)
        finally:
            await self._stop(webhook_id)
        key = owner_key(webhook_id)
        result = await self._coordinator.txn(
            [Compare(key, Target.CREATE_REVISION, "=", revision)], [Delete(key)]
        )
        await self.owners.wait_revision(result.revision)

    # ------------------------------------------------------------ endpoints

    def _begin(self, webhook_id: str, webhook: Webhook, revision: int) -> None:
        self._tasks[webhook_id] = asyncio.get_running_loop().create_task(
            self._deliver(webhook_id, webhook, revision)
        )
        self._shared.owned = len(self._tasks)

    async def _deliver(self, webhook_id: str, webhook: Webhook, revision: int) -> None:
        """Deliver for a webhook until cancelled; what failed is begun anew, from what is written."""
        delay_s = _RESTART_FIRST_S
        while True:
            endpoint = self.endpoints[webhook_id] = Endpoint(webhook_id, webhook, revision, self._shared)
            try:
                await endpoint.run()
            except LostError as error:
                # Where the owner key is gone, the catalog says so in a moment, and this task is cancelled.
                self._shared.counters.lost += 1
                _log.info("delivering for the webhook %s ended: %s", webhook_id, error)
            except Exception:
                _log.exception("delivering for the webhook %s failed", webhook_id)
            await asyncio.sleep(delay_s)
            delay_s = min(delay_s * 2, _RESTART_MOST_S)

    async def _stop(self, webhook_id: str) -> None:
        task = self._tasks.pop(webhook_id, None)
        if task is None:  # it was stopped meanwhile
            return
        self.endpoints.pop(webhook_id, None)
        self._shared.owned = len(self._tasks)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def _finish_all(self) -> None:
        """Write what can be written while the lease lasts."""
        results = await asyncio.gather(
            *(endpoint.finish(FINISH_S) for endpoint in self.endpoints.values()), return_exceptions=True
        )
        for result in results:
            if isinstance(result, Exception):
                _log.info("a webhook's progress was not written at the end: %s", result)

    async def _stop_all(self) -> None:
        for task in self._tasks.values():  # all at once, before any is waited for
            task.cancel()
        for webhook_id in list(self._tasks):
            await self._stop(webhook_id)

    async def _wait_change(self, timeout_s: float | None) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()
        except TimeoutError:
            return
