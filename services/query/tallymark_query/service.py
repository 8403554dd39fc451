"""A query node: answers questions by asking the stores that lead the partitions concerned.

Keeps nothing but caches: the metrics and the leaders, followed from the coordinator, and a connection to each leader.
A lost leader is a retry inside the caller's time, not the caller's error.
"""

from __future__ import annotations

import asyncio
import random
from typing import TypeVar

import msgspec

from tallymark_protocol.errors import ErrorCode, NotFoundError, TallymarkError, UnavailableError
from tallymark_protocol.messages import (
    PROTOCOL_VERSION,
    AlertsResult,
    Call,
    EventsPage,
    EventsResult,
    Message,
    QueryAlerts,
    QueryEvents,
    QueryRealtime,
    QueryTop,
    QueryTotals,
    RealtimeResult,
    TotalsResult,
    Welcome,
)
from tallymark_protocol.schema import MetricRecord
from tallymark_query import plan
from tallymark_runtime.catalog import LeaderCatalog, MetricCatalog
from tallymark_runtime.clock import Clock
from tallymark_runtime.coordinator import Coordinator
from tallymark_runtime.peer import PeerClient
from tallymark_runtime.transport import FrameServer, HandlerBase, ServerConnection

T = TypeVar("T")

RETRY_S = 0.02  # between attempts to reach a partition's leader; doubled up to ...
RETRY_MAX_S = 0.5
ATTEMPT_S = 30.0


class QueryConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What a query node is told."""

    node_id: str
    partition_count: int
    listen: str = "127.0.0.1:0"
    advertise: str = ""


class QueryService(HandlerBase):
    """A query node that serves. Made by `serve`."""

    def __init__(
        self, config: QueryConfig, coordinator: Coordinator, clock: Clock, rng: random.Random
    ) -> None:
        self.address = ""
        self._config = config
        self._coordinator = coordinator
        self._clock = clock
        self._rng = rng
        self._metrics = MetricCatalog(coordinator)
        self._leaders = LeaderCatalog(coordinator)
        self._peers: dict[str, PeerClient] = {}
        self._server = FrameServer(self, self._welcome)

    async def start(self) -> None:
        """Learn of the cluster, then listen."""
        await self._metrics.start()
        await self._leaders.start()
        bound = await self._server.start(self._config.listen)
        self.address = self._config.advertise or bound

    async def close(self) -> None:
        """Answer what is under way, then stop. Call it once."""
        await self._server.close()
        await self._metrics.close()
        await self._leaders.close()
        for peer in self._peers.values():
            await peer.close()

    def _welcome(self) -> Welcome:
        return Welcome(
            version=PROTOCOL_VERSION, node_id=self._config.node_id, role="query", now_ns=self._clock.now_ns()
        )

    # ------------------------------------------------------------ calls

    async def on_call(self, connection: ServerConnection, call: Call) -> Message:
        """Answer a query."""
        count = self._config.partition_count
        match call:
            case QueryRealtime():
                record = await self._metric(call.metric_code)
                asked = plan.realtime(call, count)
                realtime = await self._ask(asked.partition, asked, RealtimeResult)
                return plan.realtime_result(asked.partition, int(record.schema.agg_type), realtime)
            case QueryTotals():
                while True:
                    record = await self._metric(call.metric_code)
                    question, period = plan.totals(call, record, self._clock.now_ns(), count)
                    answer = await self._ask(question.partition, question, TotalsResult)
                    if await self._is_same_metric(record, [answer]):
                        return plan.totals_result(question, period, record, answer)
            case QueryTop():
                while True:
                    record = await self._metric(call.metric_code)
                    questions, period = plan.top(call, record, self._clock.now_ns(), count)
                    answers = await asyncio.gather(
                        *(self._ask(q.partition, q, TotalsResult) for q in questions)
                    )
                    if await self._is_same_metric(record, answers):
                        return plan.merge_top(call, period, record, answers)
            case QueryEvents():
                if call.metric_code is not None:
                    await self._metric(call.metric_code)
                page = plan.events(call, count)
                found = await self._ask(page.partition, page, EventsResult)
                cursor = "" if found.next_offset is None else plan.encode_cursor(found.next_offset)
                return EventsPage(events=found.events, cursor=cursor)
            case QueryAlerts():
                if call.metric_code is not None:
                    await self._metric(call.metric_code)
                wanted = plan.alerts(call, count)
                pages = await asyncio.gather(*(self._ask(q.partition, q, AlertsResult) for q in wanted))
                return plan.merge_alerts(call, wanted, pages)
        return await super().on_call(connection, call)

    async def _metric(self, code: str) -> MetricRecord:
        """The metric; one that is not known here is looked for at the coordinator before it is said not to be."""
        record = self._metrics.get(code)
        if record is None:
            record = await self._metrics.fetch(code)
        if record is None:
            raise NotFoundError(f"there is no metric {code!r}", code=ErrorCode.UNKNOWN_METRIC)
        return record

    async def _is_same_metric(self, record: MetricRecord, answers: list[TotalsResult]) -> bool:
        """Whether all answers are about the metric that the question was planned for.

        A code that was deleted and created again is another metric. Where not, whoever was behind is given time:
        this cache is brought up to the newest, a store learns of it by itself.
        """
        uids = {answer.metric_uid for answer in answers}
        if uids <= {record.uid}:
            return True
        await self._metrics.wait_revision(max(uids))
        if max(uids) <= record.uid:
            await asyncio.sleep(RETRY_S)
        return False

    async def _ask(self, partition: int, question: Call, kind: type[T]) -> T:
        """Ask the leader of a partition, again after a failure that may pass; the caller's timeout ends it."""
        delay = RETRY_S
        while True:
            try:
                return await self._leader(partition).call(question, kind, timeout_s=ATTEMPT_S)
            except TallymarkError as error:
                if not error.retriable and error.code != ErrorCode.CLOSED:
                    raise
            await asyncio.sleep(delay * (0.5 + self._rng.random()))
            delay = min(delay * 2, RETRY_MAX_S)

    def _leader(self, partition: int) -> PeerClient:
        address = self._leaders.address(partition)
        if address is None:
            raise UnavailableError(
                f"partition {partition} has no leader", code=ErrorCode.PARTITION_UNAVAILABLE
            )
        peer = self._peers.get(address)
        if peer is None:
            peer = PeerClient(address, rng=self._rng, software=self._config.node_id)
            self._peers[address] = peer
        return peer


async def serve(
    config: QueryConfig, coordinator: Coordinator, clock: Clock, rng: random.Random
) -> QueryService:
    """Start a query node; close it at the end."""
    service = QueryService(config, coordinator, clock, rng)
    try:
        await service.start()
    except BaseException:
        await service.close()
        raise
    return service
