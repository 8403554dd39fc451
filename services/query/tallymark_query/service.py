"""A query node: answers questions by asking the stores that hold the partitions concerned.

Keeps nothing but caches: metrics and whom to ask, followed from the coordinator (`asking`). What a question means and
how answers merge is `plan`'s.
"""

from __future__ import annotations

import asyncio
import random
from typing import TypeVar

import msgspec

from tallymark_protocol.codec import decode, encode
from tallymark_protocol.errors import ErrorCode, NotFoundError, TallymarkError
from tallymark_protocol.messages import (
    PROTOCOL_VERSION,
    AlertsResult,
    Call,
    Consistency,
    EventsResult,
    FrameType,
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
from tallymark_query.counters import QueryCounters
from tallymark_runtime.asking import Asking
from tallymark_runtime.catalog import MetricCatalog
from tallymark_runtime.clock import Clock
from tallymark_runtime.coordinator import Coordinator
from tallymark_runtime.transport import FrameServer, HandlerBase, ServerConnection

PASSED_ON_MAX = 4_096  # questions out that have no task
_RESULT = int(FrameType.RESULT)
RETRY_S = 0.02  # before a question is asked again of a store that has not heard of a metric yet


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
        self.counters = QueryCounters()
        self._config = config
        self._coordinator = coordinator
        self._clock = clock
        self._rng = rng
        self._metrics = MetricCatalog(coordinator)
        self._asking = Asking(coordinator, config.node_id, rng)
        self._server = FrameServer(self, self._welcome)
        self._passed_on = 0  # questions out that have no task

    async def start(self) -> None:
        """Learn of the cluster, then listen."""
        await self._metrics.start()
        await self._asking.start()
        bound = await self._server.start(self._config.listen)
        self.address = self._config.advertise or bound

    async def close(self) -> None:
        """Answer what is under way, then stop. Call it once."""
        await self._server.close()
        await self._metrics.close()
        await self._asking.close()

    def _welcome(self) -> Welcome:
        return Welcome(
            version=PROTOCOL_VERSION, node_id=self._config.node_id, role="query", now_ns=self._clock.now_ns()
        )

    @property
    def partition_count(self) -> int:
        """Of the cluster."""
        return self._config.partition_count

    @property
    def connection_count(self) -> int:
        """Connections of callers."""
        return len(self._server.connections)

    def leaderless(self) -> list[int]:
        """Partitions whose leader isn't known here, in order."""
        address = self._asking.leaders.address
        return [number for number in range(self._config.partition_count) if address(number) is None]

    # ------------------------------------------------------------ calls

    def on_call_now(self, connection: ServerConnection, request_id: int, call: Call, deadline: float) -> bool:
        """Pass on a question for a running total whose leader is known, and its answer, without a task in between."""
        if type(call) is not QueryRealtime or self._passed_on >= PASSED_ON_MAX:
            return super().on_call_now(connection, request_id, call, deadline)
        record = self._metrics.get(call.metric_code)
        if record is None:
            return False
        try:
            asked = plan.realtime(call, self._config.partition_count)
        except TallymarkError:
            return False  # it is counted there
        began_ns = self._clock.monotonic_ns()

        def over() -> None:
            self._passed_on -= 1
            self.counters.under_way -= 1

        def on_answer(body: bytes) -> None:
            over()
            try:
                found = decode(RealtimeResult, body)
                answer = plan.realtime_result(asked.partition, int(record.schema.agg_type), found)
            except TallymarkError as error:
                self.counters.failed(call, error)
                connection.respond_error(request_id, error)
                return
            self.counters.answered(call, self._clock.monotonic_ns() - began_ns)
            connection.respond(request_id, _RESULT, encode(answer))

        def on_failure() -> None:
            over()
            connection.run_call(request_id, call, deadline)

        if not self._asking.ask_now(
            asked.partition, asked, deadline, on_answer=on_answer, on_failure=on_failure
        ):
            return False
        self._passed_on += 1
        self.counters.under_way += 1
        return True

    async def on_call(self, connection: ServerConnection, call: Call) -> Message:
        """Answer a query."""
        counters = self.counters
        began_ns = self._clock.monotonic_ns()
        counters.under_way += 1
        try:
            answer = await self._answer(connection, call)
        except BaseException as error:
            counters.failed(call, error)
            raise
        finally:
            counters.under_way -= 1
        counters.answered(call, self._clock.monotonic_ns() - began_ns)
        return answer

    async def _answer(self, connection: ServerConnection, call: Call) -> Message:
        count = self._config.partition_count
        match call:
            case QueryRealtime():
                record = await self._metric(call.metric_code)
                asked = plan.realtime(call, count)
                realtime = await self._asking.ask(asked.partition, asked, RealtimeResult)
                return plan.realtime_result(asked.partition, int(record.schema.agg_type), realtime)
            case QueryTotals():
                while True:
                    record = await self._metric(call.metric_code)
                    question, period = plan.totals(call, record, self._clock.now_ns(), count)
                    answer = await self._asking.ask(question.partition, question, TotalsResult)
                    if await self._is_same_metric(record, [answer]):
                        return plan.totals_result(question, period, record, answer)
                    call = _at_leader(call)
            case QueryTop():
                while True:
                    record = await self._metric(call.metric_code)
                    questions, period = plan.top(call, record, self._clock.now_ns(), count)
                    answers = await asyncio.gather(
                        *(self._asking.ask(q.partition, q, TotalsResult) for q in questions)
                    )
                    if await self._is_same_metric(record, answers):
                        return plan.merge_top(call, period, record, answers)
                    call = _at_leader(call)
            case QueryEvents():
                if call.metric_code is not None:
                    await self._metric(call.metric_code)
                page = plan.events(call, count)
                found = await self._asking.ask(page.partition, page, EventsResult)
                return plan.events_page(page.partition, found)
            case QueryAlerts():
                if call.metric_code is not None:
                    await self._metric(call.metric_code)
                wanted = plan.alerts(call, count)
                pages = await asyncio.gather(
                    *(self._asking.ask(q.partition, q, AlertsResult) for q in wanted)
                )
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
        await self._metrics.wait_uid(max(uids))
        if max(uids) <= record.uid:
            await asyncio.sleep(RETRY_S)
        return False


C = TypeVar("C", QueryTotals, QueryTop)


def _at_leader(call: C) -> C:
    """A copy that was asked has not heard of the metric as it is now: the next question goes to who must have."""
    if call.consistency is not Consistency.STALE:
        return call
    return msgspec.structs.replace(call, consistency=Consistency.LEADER)


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
