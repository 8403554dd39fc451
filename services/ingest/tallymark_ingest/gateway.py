"""The gateway's core: from callers' chunks to appends at the leaders, and from their answers to receipts.

Pure: it knows no socket, no loop and no clock. Frames, answers and `now_ns` (any clock that never goes back) come
in; what is to be sent collects in `take_answers` and `take_appends`, and `next_deadline` says when `tick` wants to
be called at the latest. `server` is its shell.

**Coalescing.** Requests that arrived since the last tick are split together, in one call, into one append per
partition: a **round**. What a round costs, at the gateway and at every copy, hardly depends on how many share it,
so under load new requests wait for company, at most `coalesce_ns_max`, and a single caller waits for nobody: see
`_is_held`. SYNC and ASYNC requests never share an append.

**No loss, no doubling.** Every request is answered exactly once. An append whose fate is open (connection lost, no
leader, no answer in time) is sent again, with the very same bytes, until an answer comes or all its requests have
been answered otherwise; the leader recognises its chunks by their identities. A request that is not resolved at
its deadline gets a receipt that says for which partitions, so its caller can send the same chunk again.

**Failover.** When a partition gets another leader, what failed is sent to it at once, and what the old leader has
not answered within `recall_ns` of being sent is sent to the new one as well: whichever answers first is believed,
as an answer is given only for what is committed, and a repeat gets the answer of the first.

**No partition holds another.** One that fails or doesn't answer stops counting among the rounds that new requests
wait for, and what queues up behind it has a bound of its own.

An append's life::

    QUEUED   behind `appends_in_flight_max` others of its partition
    SENT     out; ends with `answered` or `failed`, or is sent again elsewhere
    WAITING  failed and to be sent again at its time, or as soon as its partition's leader changes
    DONE     answered, refused for good, or wanted by nobody any more
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from typing import Any, Final

import msgspec

from tallymark_ingest.counters import IngestCounters
from tallymark_ingest.single import Singles
from tallymark_ingest.split import (
    ROUND_BYTES_MAX,
    ROUND_EVENTS_MAX,
    ROUND_METRICS_MAX,
    checksum_holds,
    glance,
    split,
)
from tallymark_ingest.work import Answer, Append, AppendState, Request, Round, check_answer
from tallymark_protocol import layout as lay
from tallymark_protocol import limits
from tallymark_protocol.codec import encode
from tallymark_protocol.errors import ErrorCode, RemoteProtocolError, WireError, to_wire
from tallymark_protocol.messages import (
    Appended,
    ChunkOutcome,
    EventOutcome,
    FrameType,
    PartitionFailure,
    PartitionRun,
    Receipt,
)
from tallymark_protocol.payload import OK, explain
from tallymark_runtime.instruments import count_in

REQUEST_OVERHEAD_BYTES: Final = 1_024  # what a request costs beside its body, roughly
_ATTEMPT_NS_MIN: Final = 1_000_000
_ROUNDS_PER_TICK: Final = 3  # of each kind; a tick must not hold the loop for long
_DEADLINES_MIN: Final = 1_024  # entries below which the heap of deadlines is left alone

# Codes by which a leader says that it took nothing: all others leave open whether the append is in its log.
_REFUSALS: Final = frozenset(
    {
        ErrorCode.MALFORMED,
        ErrorCode.INVALID_ARGUMENT,
        ErrorCode.TOO_LARGE,
        ErrorCode.OVERLOADED,
        ErrorCode.DISK_FULL,
    }
)


class GatewayConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The core's bounds. Times in nanoseconds."""

    appends_in_flight_max: int = 3  # per partition; and rounds under way before requests wait for each other
    small_rounds_max: int = 2  # rounds under way before requests wait that would make no full round together
    full_round_events: int = (
        8_192  # what a full round has: more in it costs as much as it would in the next one
    )
    full_round_bytes: int = 256 * 1024  # likewise
    coalesce_ns_max: int = (
        20_000_000  # how long a request waits for others at most, and a quarter of its timeout
    )
    pending_bytes_max: int = 64 * 1024 * 1024  # of requests and appends together; more is refused
    append_timeout_ns: int = 10_000_000_000  # for one attempt
    retry_ns_min: int = 20_000_000  # before the second attempt; doubles from there
    retry_ns_max: int = 500_000_000
    recall_ns: int = 100_000_000  # how long a leader that was replaced has to answer what it was sent
    patience_ns: int = 250_000_000  # how long an append may be out before requests stop waiting for it
    stall_ns: int = 1_000_000_000  # how long it may be out before its partition counts as failing
    request_timeout_ns: int = 30_000_000_000  # of requests that name none
    request_timeout_ns_max: int = 120_000_000_000
    answer_margin_ns_max: int = (
        250_000_000  # a receipt is sent this long (or a tenth) before its caller gives up
    )
    retry_after_ms: int = 50  # advice to callers that are refused for load


class Gateway:
    """The core; see the module's docstring. Not thread-safe: one loop calls it."""

    def __init__(self, partition_count: int, config: GatewayConfig, rng: random.Random) -> None:
        self.partition_count = partition_count
        self.config = config
        self.metrics_revision = 0  # of the last change of a metric that was answered here
        self.counters = IngestCounters()
        self._now_ns = 0  # as the caller of the input under way says
        self._rng = rng
        self._seed = rng.getrandbits(63)  # see `split`
        self._singles = Singles(partition_count)
        self._waiting: tuple[deque[Request], deque[Request]] = (
            deque(),
            deque(),
        )  # not yet split: SYNC, ASYNC
        self._release_ns = 0  # when they go out at the latest, if there are any
        self._waiting_events = 0  # in them
        self._waiting_bytes = 0  # likewise, of bodies
        self._open: dict[Request, None] = {}  # every request that has no answer yet, in order of arrival
        # Heap of (deadline, tie, request) with every open request, and some that have been answered since.
        self._deadlines: list[tuple[int, int, Request]] = []
        self._queues: list[deque[Append]] = [deque() for _ in range(partition_count)]
        self._queued_bytes = 0  # in all queues, by `_weight`
        self._live: list[list[Append]] = [[] for _ in range(partition_count)]  # appends SENT or WAITING
        self._failing = [0] * partition_count  # of them, those that have failed, or are out for too long
        self._is_slow = [False] * partition_count  # whether requests don't wait for its appends at present
        self._trouble = [""] * partition_count  # why its last attempt failed; empty after one that didn't
        self._look_ns = 0  # when to look next for appends that are out for long
        self._rounds = 0  # rounds that requests wait for
        self._round_requests = 0  # requests in them
        self._retries: list[
            tuple[int, int, Append]
        ] = []  # heap of (due_ns, tie, append); stale entries are skipped
        self._tie = 0
        self._bytes = 0  # held by requests and appends
        self._answers: list[Answer] = []
        self._appends: list[Append] = []

    # ------------------------------------------------------------ what the shell looks at

    @property
    def pending_bytes(self) -> int:
        """Memory held by requests and appends under way."""
        return self._bytes

    @property
    def is_full(self) -> bool:
        """Whether reading from callers should stop for now (three quarters of the bound)."""
        return 4 * self._bytes > 3 * self.config.pending_bytes_max

    @property
    def is_relieved(self) -> bool:
        """Whether reading may go on after `is_full` (five eighths of the bound)."""
        return 8 * self._bytes <= 5 * self.config.pending_bytes_max

    @property
    def is_busy(self) -> bool:
        """Whether requests have company to wait for: rounds are under way."""
        return self._rounds > 0

    @property
    def open_requests(self) -> int:
        """Requests without an answer."""
        return len(self._open)

    def take_answers(self) -> list[Answer]:
        """Frames for callers, each to be sent once."""
        answers = self._answers
        if answers:
            self._answers = []
        return answers

    def take_appends(self) -> list[Append]:
        """Appends to send to the leaders of their partitions, in order; report each with `answered` or `failed`."""
        appends = self._appends
        if appends:
            self._appends = []
        return appends

    def next_deadline(self) -> int | None:
        """When `tick` must be called at the latest; None when nothing is under way."""
        due = self._deadlines[0][0] if self._deadlines else None
        if self._waiting[0] or self._waiting[1]:
            due = self._release_ns if due is None or self._release_ns < due else due
            if self._rounds and self._look_ns < due:
                due = self._look_ns
        if self._retries and (due is None or self._retries[0][0] < due):
            due = self._retries[0][0]
        return due

    # ------------------------------------------------------------ inputs

    def ingest(self, connection: Any, request_id: int, body: bytes, timeout_ms: int, now_ns: int) -> None:
        """Take an INGEST frame. Call `tick` once all frames that came together are taken."""
        seen = glance(body)
        if seen is None:
            self._refuse(connection, request_id, _no_chunk(body))
            return
        if not checksum_holds(body):
            self._refuse(
                connection,
                request_id,
                WireError(int(ErrorCode.MALFORMED), False, "malformed chunk: its checksum does not match"),
            )
            return
        config = self.config
        cost = len(body) + 8 * seen.events + REQUEST_OVERHEAD_BYTES
        if self._bytes + cost > config.pending_bytes_max:
            self._refuse(
                connection,
                request_id,
                WireError(
                    int(ErrorCode.OVERLOADED),
                    True,
                    "the gateway holds as much as it may",
                    {"retry_after_ms": config.retry_after_ms},
                ),
            )
            return
        timeout = timeout_ms * 1_000_000 if timeout_ms else config.request_timeout_ns
        timeout = min(timeout, config.request_timeout_ns_max)
        deadline = now_ns + timeout - min(timeout // 10, config.answer_margin_ns_max)
        request = Request(connection, request_id, body, seen.events, seen.metrics, deadline, now_ns)
        counters = self.counters
        counters.chunks += 1
        counters.events += seen.events
        counters.bytes += len(body)
        self._bytes += cost
        self._open[request] = None
        self._tie += 1
        heapq.heappush(self._deadlines, (deadline, self._tie, request))
        # One whose caller won't wait long has no time to spend on waiting for company.
        release = now_ns + min(config.coalesce_ns_max, timeout // 4)
        if release < self._release_ns or not (self._waiting[0] or self._waiting[1]):
            self._release_ns = release
        self._waiting_events += seen.events
        self._waiting_bytes += len(body)
        self._waiting[seen.flags & lay.FLAG_ASYNC].append(request)

    def tick(self, now_ns: int) -> None:
        """Do what is due: expire, send again, split what has waited long enough or needs not wait."""
        self._now_ns = now_ns
        if self._deadlines and self._deadlines[0][0] <= now_ns:
            self._expire(now_ns)
        while self._retries and self._retries[0][0] <= now_ns:
            due, _, append = heapq.heappop(self._retries)
            if append.due_ns != due:
                continue
            if append.state is AppendState.WAITING:
                self._send_again(append, now_ns)
            elif append.state is AppendState.SENT:
                self._recall(append, now_ns)
        if now_ns >= self._look_ns:
            self._look(now_ns)
        for _ in range(_ROUNDS_PER_TICK):
            if not self._waiting[0] and not self._waiting[1]:
                break
            if self._is_held(now_ns):
                break
            for kind in (0, 1):
                if self._waiting[kind]:
                    self._split_round(self._waiting[kind], is_async=kind == 1, now_ns=now_ns)

    def answered(self, append: Append, appended: Appended, now_ns: int) -> None:
        """Take a leader's answer to an append that was sent, at whichever attempt."""
        if append.state is AppendState.DONE:
            return  # another attempt was answered before
        assert append.state is not AppendState.QUEUED
        self._now_ns = now_ns
        self.counters.append_ns.observe(now_ns - append.sent_ns)
        self._trouble[append.partition] = ""
        try:
            outcomes = check_answer(append, appended)
        except RemoteProtocolError as error:
            self._fail_all(append, WireError(int(ErrorCode.INTERNAL), False, error.message), not_stored=False)
            self._done(append, now_ns)
            return
        partition = append.partition
        if outcomes is None:
            base = appended.base_offset
            for request, count in zip(append.requests, append.counts, strict=True):
                if partition in request.left:
                    request.runs.append(PartitionRun(partition, base, count))
                    self._resolve(request, partition)
                base += count
        else:
            for number, outcome in enumerate(outcomes):
                request = append.requests[number]
                if partition in request.left:
                    self._take_outcome(append, number, request, outcome)
                    self._resolve(request, partition)
        self._done(append, now_ns)

    def failed(
        self, append: Append, error: WireError, now_ns: int, *, sent: bool, attempt: int | None = None
    ) -> None:
        """Take notice that an append got no APPENDED.

        Args:
            append: one that `take_appends` gave out.
            error: what the leader answered, or what went wrong on the way.
            now_ns: the time.
            sent: whether the leader may have received it.
            attempt: `append.attempts` as it was when it was given out; None for the present one.
        """
        if append.state is not AppendState.SENT or attempt not in {None, append.attempts}:
            return  # it was sent elsewhere since, or is over: what became of that attempt makes no difference
        self._now_ns = now_ns
        count_in(self.counters.append_failures, error.code)
        refused = error.code in _REFUSALS
        if sent and not refused:
            append.maybe_stored = True
        if not error.retriable or error.code == ErrorCode.DISK_FULL:
            # A full disk is for the caller to wait out: it backs off, and nothing piles up here meanwhile.
            self._fail_all(append, error, not_stored=refused and not append.maybe_stored)
            self._done(append, now_ns)
            return
        self._trouble[append.partition] = error.message
        self._mark_failing(append)
        if not append.is_wanted():
            self._done(append, now_ns)
            return
        config = self.config
        backoff = min(config.retry_ns_min << min(append.failures, 16), config.retry_ns_max)
        append.failures += 1
        append.state = AppendState.WAITING
        self._schedule(append, now_ns + backoff // 2 + int(self._rng.random() * (backoff // 2)))

    def leader_changed(self, partition: int, now_ns: int, target: str = "") -> None:
        """Send a partition's appends to its new leader: at the next tick what failed, in time what is out.

        Args:
            partition: whose leader has changed, or can be reached now.
            now_ns: the time.
            target: the leader, as the shell writes it to `Append.target`; what is out to this one stays there.
        """
        if not 0 <= partition < self.partition_count:
            return
        for append in self._live[partition]:
            if append.state is AppendState.WAITING:
                append.failures = 0
                if append.due_ns > now_ns:
                    self._schedule(append, now_ns)
            elif append.state is AppendState.SENT and append.target != target:
                self._schedule(append, max(now_ns, append.sent_ns + self.config.recall_ns))

    # ------------------------------------------------------------ splitting

    def _is_held(self, now_ns: int) -> bool:
        """Whether what waits shall wait on for company.

        With nothing under way it goes out at once. Otherwise a round is worth its cost if it is full, or carries as
        many requests as all that are under way: few callers then don't wait for each other, and many end up in two
        rounds, one of which is under way while the callers of the other take their answers.
        """
        config = self.config
        rounds = self._rounds
        if not rounds or now_ns >= self._release_ns:
            return False
        if rounds >= config.appends_in_flight_max:
            return True
        if self._waiting_events >= config.full_round_events or self._waiting_bytes >= config.full_round_bytes:
            return False
        waiting = len(self._waiting[0]) + len(self._waiting[1])
        return rounds >= config.small_rounds_max or waiting < self._round_requests

    def _begin_round(self, round_: Round, requests: int) -> None:
        """Count a round among those that requests wait for, unless none of its appends is."""
        if round_.left:
            round_.requests = requests
            self._rounds += 1
            self._round_requests += requests

    def _uncount(self, append: Append) -> None:
        """Let requests wait for this append no longer."""
        if append.uncount():
            self._rounds -= 1
            self._round_requests -= append.round.requests

    def _split_round(self, waiting: deque[Request], *, is_async: bool, now_ns: int) -> None:
        """Split as many waiting requests of a kind as go into one call, and hand on the appends."""
        if len(waiting) == 1 and self._split_single(waiting, is_async=is_async, now_ns=now_ns):
            return
        requests: list[Request] = []
        bodies: list[bytes] = []
        events = size = metrics = 0
        while waiting and len(requests) < limits.APPEND_CHUNKS_MAX:
            request = waiting[0]
            body = request.body
            if body is None:  # it has expired
                waiting.popleft()
                continue
            events += request.events
            size += len(body)
            metrics += request.metrics
            if requests and (
                events > ROUND_EVENTS_MAX or size > ROUND_BYTES_MAX or metrics > ROUND_METRICS_MAX
            ):
                break
            requests.append(request)
            bodies.append(body)
            waiting.popleft()
            self._waiting_events -= request.events
            self._waiting_bytes -= len(body)
        if not requests:
            return
        result = split(bodies, self.partition_count, self._seed)
        if len(bodies) == 1 and events == 1 and result.payloads:
            self._singles.learn(bodies[0], result.payloads[0])
        for request, body, status in zip(requests, bodies, result.status, strict=True):
            request.body = None
            self._bytes -= len(body) + 8 * request.events
            if status != OK:
                self._close(request)
                self._refuse(request.connection, request.request_id, to_wire(explain(status, "chunk")))
        round_ = Round(result.part, result.firsts)
        appends = []
        for payload in result.payloads:
            members = [requests[chunk] for chunk in payload.chunks]
            for request, count in zip(members, payload.counts, strict=True):
                request.left[payload.partition] = count
            append = Append(
                payload, members, round_, is_async=is_async, metrics_revision=self.metrics_revision
            )
            appends.append(append)
        # Only now: queueing can fail an append at once, and a request must know by then what else it waits for.
        for append in appends:
            self._queue(append, now_ns)
        self._begin_round(round_, len(requests))

    def _split_single(self, waiting: deque[Request], *, is_async: bool, now_ns: int) -> bool:
        """Hand on the one request that waits, if it is one event of a shape that is known. Whether that is done."""
        request = waiting[0]
        body = request.body
        if request.events != 1 or body is None:
            return False
        payload = self._singles.split(body)
        if payload is None:
            return False
        waiting.popleft()
        request.body = None
        self._bytes -= len(body) + 8
        self._waiting_events -= 1
        self._waiting_bytes -= len(body)
        request.left[payload.partition] = 1
        round_ = Round(None, [])
        append = Append(payload, [request], round_, is_async=is_async, metrics_revision=self.metrics_revision)
        self._queue(append, now_ns)
        self._begin_round(round_, 1)
        return True

    def _queue(self, append: Append, now_ns: int) -> None:
        """Send a new append, or queue it behind those of its partition."""
        partition = append.partition
        self._bytes += len(append.body)
        live = self._live[partition]
        if len(live) < self.config.appends_in_flight_max:
            if not self._is_slow[partition]:
                append.count()
            live.append(append)
            self._send(append, now_ns)
            return
        self._queues[partition].append(append)
        self._queued_bytes += _weight(append)
        if self._failing[partition]:
            self._shed(partition)
        elif not self._is_slow[partition]:
            append.count()

    def _shed(self, partition: int) -> None:
        """Keep what waits for a failing partition from taking the room of all others: drop the newest.

        A quarter of the bound is for what is queued; reading stops at three quarters and goes on at five eighths,
        so partitions without a leader never keep the gateway from reading.
        """
        queue = self._queues[partition]
        while queue and 4 * self._queued_bytes > self.config.pending_bytes_max:
            append = queue.pop()
            self._queued_bytes -= _weight(append)
            error = WireError(
                int(ErrorCode.OVERLOADED),
                True,
                f"partition {partition} can't be written to, and too much waits for it"
                + self._because(partition),
                {"retry_after_ms": self.config.retry_after_ms},
            )
            self._fail_all(append, error, not_stored=False)
            self._drop(append)

    def _drop(self, append: Append) -> None:
        """Forget an append that was QUEUED and is out of its queue."""
        assert append.state is AppendState.QUEUED
        append.state = AppendState.DONE
        self._bytes -= len(append.body)
        self._uncount(append)

    # ------------------------------------------------------------ an append's life

    def _send(self, append: Append, now_ns: int) -> None:
        append.attempts += 1
        append.sent_ns = now_ns
        append.state = AppendState.SENT
        append.due_ns = -1
        requests = append.requests
        last = requests[0].deadline_ns if len(requests) == 1 else max([r.deadline_ns for r in requests])
        append.timeout_ns = max(min(self.config.append_timeout_ns, last - now_ns), _ATTEMPT_NS_MIN)
        self._appends.append(append)

    def _send_again(self, append: Append, now_ns: int) -> None:
        if append.is_wanted():
            self._send(append, now_ns)
        else:
            self._done(append, now_ns)

    def _recall(self, append: Append, now_ns: int) -> None:
        """Send an append that is out to its partition's new leader as well."""
        append.maybe_stored = True
        self._trouble[append.partition] = "its leader was replaced"
        self._mark_failing(append)
        self._send_again(append, now_ns)

    def _mark_failing(self, append: Append) -> None:
        """An append failed, or might as well have: its partition must not hold up the others."""
        if append.has_failed:
            return
        append.has_failed = True
        self._failing[append.partition] += 1
        self._make_slow(append.partition)
        self._shed(append.partition)

    def _make_slow(self, partition: int) -> None:
        """Let requests no longer wait for what a partition has under way."""
        self._is_slow[partition] = True
        for append in self._live[partition]:
            self._uncount(append)
        for append in self._queues[partition]:
            self._uncount(append)

    def _look(self, now_ns: int) -> None:
        """Notice appends that are out for long. Costs a look at each partition, so it is done now and then only."""
        config = self.config
        self._look_ns = now_ns + config.patience_ns // 4
        for partition, live in enumerate(self._live):
            for append in live:
                if append.state is not AppendState.SENT or now_ns - append.sent_ns < config.patience_ns:
                    continue
                if not self._is_slow[partition]:
                    self._make_slow(partition)
                if now_ns - append.sent_ns >= config.stall_ns:
                    self._mark_failing(append)

    def _because(self, partition: int) -> str:
        """Why a partition can't be written to, to be put behind a sentence."""
        return f": {self._trouble[partition]}" if self._trouble[partition] else ""

    def _schedule(self, append: Append, due_ns: int) -> None:
        append.due_ns = due_ns
        self._tie += 1
        heapq.heappush(self._retries, (due_ns, self._tie, append))

    def _done(self, append: Append, now_ns: int) -> None:
        """An append that was SENT or WAITING is over: its place goes to the next of its partition."""
        assert append.state is AppendState.SENT or append.state is AppendState.WAITING
        partition = append.partition
        self._uncount(append)
        if append.has_failed:
            self._failing[partition] -= 1
        append.state = AppendState.DONE
        self._bytes -= len(append.body)
        self._is_slow[partition] = self._failing[partition] > 0
        live = self._live[partition]
        live.remove(append)
        queue = self._queues[partition]
        while queue and len(live) < self.config.appends_in_flight_max:
            following = queue.popleft()
            self._queued_bytes -= _weight(following)
            if following.is_wanted():
                live.append(following)
                self._send(following, now_ns)
            else:
                self._drop(following)

    # ------------------------------------------------------------ a request's end

    def _take_outcome(self, append: Append, number: int, request: Request, outcome: ChunkOutcome) -> None:
        """Add what the leader says about one chunk to its request's receipt."""
        partition = append.partition
        count = append.counts[number]
        error = outcome.error
        if error is not None:
            # The leader looked the identity up: other content stands under it, so none of this is stored.
            not_stored = error.code == ErrorCode.SEQUENCE_REUSED
            request.failures.append(PartitionFailure(partition, count, error, not_stored))
            return
        request.runs.append(PartitionRun(partition, outcome.base_offset, count))
        if not outcome.exceptions:
            return
        indexes = append.positions(number)
        for position, reason, offset in outcome.exceptions:
            request.outcomes.append(EventOutcome(int(indexes[position]), reason, partition, offset))

    def _fail_all(self, append: Append, error: WireError, *, not_stored: bool) -> None:
        partition = append.partition
        for request, count in zip(append.requests, append.counts, strict=True):
            if partition in request.left:
                request.failures.append(PartitionFailure(partition, count, error, not_stored))
                self._resolve(request, partition)

    def _resolve(self, request: Request, partition: int) -> None:
        """A partition's part of a request is settled; with the last of them the receipt goes out."""
        del request.left[partition]
        if not request.left:
            self._answer(request)

    def _answer(self, request: Request) -> None:
        self._close(request)
        self.counters.answered(request, self._now_ns)
        runs = request.runs
        if len(runs) > 1:
            runs.sort(key=_partition_of_run)
        if request.outcomes:
            request.outcomes.sort(key=_index_of_outcome)
        receipt = Receipt(self.partition_count, runs, request.outcomes, request.failures)
        self._answers.append(
            Answer(request.connection, request.request_id, FrameType.RECEIPT, encode(receipt))
        )

    def _close(self, request: Request) -> None:
        """Forget a request that is being answered."""
        del self._open[request]
        self._bytes -= REQUEST_OVERHEAD_BYTES
        if len(self._deadlines) > 2 * len(self._open) + _DEADLINES_MIN:
            # Most are of answered requests: drop those, which costs each of them a constant.
            self._deadlines = [(r.deadline_ns, tie, r) for tie, r in enumerate(self._open)]
            heapq.heapify(self._deadlines)
            self._tie = max(self._tie, len(self._deadlines))

    def _refuse(self, connection: Any, request_id: int, error: WireError) -> None:
        count_in(self.counters.refusals, error.code)
        self._answers.append(Answer(connection, request_id, FrameType.ERROR, encode(error)))

    def _expire(self, now_ns: int) -> None:
        """Answer every request whose deadline has passed."""
        while self._deadlines and self._deadlines[0][0] <= now_ns:
            _, _, request = heapq.heappop(self._deadlines)
            if request not in self._open:
                continue
            if request.body is not None:
                self._bytes -= len(request.body) + 8 * request.events
                self._waiting_events -= request.events
                self._waiting_bytes -= len(request.body)
                request.body = None
                self._close(request)
                error = WireError(int(ErrorCode.TIMEOUT), True, "the gateway did not get to it in time")
                self._refuse(request.connection, request.request_id, error)
                continue
            for partition, count in sorted(request.left.items()):
                error = WireError(
                    int(ErrorCode.TIMEOUT),
                    True,
                    f"partition {partition} did not answer in time" + self._because(partition),
                )
                request.failures.append(PartitionFailure(partition, count, error))
            request.left.clear()
            self._answer(request)


def _weight(append: Append) -> int:
    """What a queued append holds, with the requests that wait for it."""
    return len(append.body) + REQUEST_OVERHEAD_BYTES * len(append.requests)


def _partition_of_run(run: PartitionRun) -> int:
    return run.partition


def _index_of_outcome(outcome: EventOutcome) -> int:
    return outcome.index


def _no_chunk(body: bytes) -> WireError:
    if len(body) > limits.REQUEST_BYTES_MAX:
        return WireError(
            int(ErrorCode.TOO_LARGE),
            False,
            f"a chunk of {len(body)} bytes: at most {limits.REQUEST_BYTES_MAX} are allowed",
        )
    return WireError(int(ErrorCode.MALFORMED), False, "malformed chunk: its header can't be one")
