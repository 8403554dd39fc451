"""What a partition must answer, worked out from plain dicts: slow, and easy to believe."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tallymark_protocol import limits
from tallymark_protocol.errors import ErrorCode, Reason
from tallymark_protocol.model import AggType, UniqueType
from tallymark_protocol.periods import period_of
from tallymark_protocol.schema import MetricRecord
from tallymark_store.window_times import STEPS

from .store_driver import Chunk

Outcome = tuple[int, list[tuple[int, int, int]], int]  # base offset, exceptions, error code or 0


@dataclass
class Record:
    """One record of the log, as the model keeps it."""

    base: int
    end: int
    append_ns: int
    schema: MetricRecord | None = None
    events: list[dict[str, Any]] = field(default_factory=list)
    verdicts: list[int] = field(default_factory=list)
    chunks: list[tuple[Chunk, Outcome]] = field(default_factory=list)  # new ones with their first answer


class PartitionModel:
    """State follows from `records` alone, so a lost suffix is forgotten by leaving it out."""

    def __init__(self, window_ns: int) -> None:
        self.window_ns = window_ns
        self.records: list[Record] = []

    @property
    def log_end(self) -> int:
        return self.records[-1].end if self.records else 0

    @property
    def last_ns(self) -> int:
        return self.records[-1].append_ns if self.records else 0

    def cut(self, log_end: int) -> None:
        """The log came back with this end."""
        self.records = [record for record in self.records if record.end <= log_end]
        assert self.log_end == log_end

    def put_schema(self, record: MetricRecord, now_ns: int) -> None:
        base = self.log_end
        self.records.append(Record(base, base + 1, max(now_ns, self.last_ns), schema=record))

    def metrics(self) -> dict[str, MetricRecord]:
        living: dict[str, MetricRecord] = {}
        for record in self.records:
            if record.schema is not None and record.schema.deleted:
                living.pop(record.schema.schema.code, None)
            elif record.schema is not None:
                living[record.schema.schema.code] = record.schema
        return living

    def ids(self, now_ns: int) -> dict[Any, tuple[Any, int]]:
        """(account, uid, id) of stored events in the window -> (payload as sent, offset)."""
        found: dict[Any, tuple[Any, int]] = {}
        living: dict[str, int] = {}
        step_ns = max(self.window_ns // STEPS, 1)
        start_ns = (now_ns - self.window_ns) // step_ns * step_ns
        for record in self.records:
            if record.schema is not None:
                living[record.schema.schema.code] = record.schema.uid
            for i, event in enumerate(record.events):
                if event["id"] and record.verdicts[i] == 0 and record.append_ns >= start_ns:
                    found[self._key(event, living[event["metric"]])] = (self._sent(event), record.base + i)
        return found

    @staticmethod
    def _key(event: dict[str, Any], uid: int) -> Any:
        return event["account"], uid, event["id"]

    @staticmethod
    def _sent(event: dict[str, Any]) -> Any:
        properties = tuple(sorted(event["properties"].items()))
        value = 0 if event["text"] is not None else event["value"]
        return value, event["time"], event["operation"], properties, event["text"]

    # ------------------------------------------------------------ the answer

    def append(
        self, events: list[dict[str, Any]], chunks: list[Chunk], now_ns: int
    ) -> tuple[list[Outcome], int]:
        """Judge a payload and take it in: the answer for each chunk, and how many events were stored."""
        now = max(now_ns, self.last_ns)
        base = self.log_end
        known = self._known(now)
        ids = self.ids(now)
        metrics = self.metrics()
        verdicts: list[int] = []
        answers: list[Outcome] = []
        new: list[tuple[Chunk, Outcome]] = []
        at = 0
        for chunk in chunks:
            producer, sequence, first_sent, count, checksum = chunk
            part = events[at : at + count]
            windows = known.setdefault(producer, {})
            highest = max(windows, default=None)
            live = windows.get(sequence)
            if live is not None and highest is not None and sequence <= highest - limits.PRODUCER_WINDOW:
                live = None
            if live is not None:
                same = live[0] == (checksum, count)
                answers.append(live[1] if same else (-1, [], int(ErrorCode.SEQUENCE_REUSED)))
                verdicts += [int(Reason.REPEAT)] * count
            elif (highest is not None and sequence <= highest - limits.PRODUCER_WINDOW) or (
                first_sent < now - limits.CHUNK_RETRY_NS_MAX
            ):
                answers.append((-1, [], int(ErrorCode.OUTCOME_UNKNOWN)))
                verdicts += [int(Reason.REPEAT)] * count
            else:
                exceptions = []
                for i, event in enumerate(part):
                    reason, original = self._judge(event, base + at + i, now, metrics, ids)
                    verdicts.append(reason)
                    if reason:
                        exceptions.append((i, reason, original))
                outcome = (base + at, exceptions, 0)
                answers.append(outcome)
                new.append((chunk, outcome))
                windows[sequence] = ((checksum, count), outcome)
            at += count
        if new:
            self.records.append(
                Record(base, base + len(events), now, events=events, verdicts=verdicts, chunks=new)
            )
        return answers, verdicts.count(0)

    def _known(self, now: int) -> dict[int, dict[int, Any]]:
        """Producer -> sequence -> ((checksum, count), first answer), of what has not expired."""
        known: dict[int, dict[int, Any]] = {}
        for record in self.records:
            if record.append_ns >= now - limits.PRODUCER_RETENTION_NS:
                for (producer, sequence, _, count, checksum), outcome in record.chunks:
                    known.setdefault(producer, {})[sequence] = ((checksum, count), outcome)
        return known

    def _judge(
        self, event: dict[str, Any], offset: int, now: int, metrics: dict[str, MetricRecord], ids: dict[Any, Any]
    ) -> tuple[int, int]:  # fmt: skip
        record = metrics.get(event["metric"])
        if record is None:
            return int(Reason.UNKNOWN_METRIC), -1
        reason = self._fault(event, record, now)
        if reason:
            return int(reason), -1
        key = self._key(event, record.uid)
        if event["id"] and key in ids:
            sent, original = ids[key]
            return int(Reason.DUPLICATE if sent == self._sent(event) else Reason.CONFLICT), original
        if self._sealed(event, record, now):
            return int(Reason.PERIOD_SEALED), -1
        if event["id"]:
            ids[key] = (self._sent(event), offset)
        return 0, -1

    @staticmethod
    def _fault(event: dict[str, Any], record: MetricRecord, now: int) -> Reason:
        schema = record.schema
        unique = schema.agg_type == AggType.COUNT_UNIQUE
        if event["operation"] and not unique:
            return Reason.BAD_OPERATION
        if event["time"] is not None and event["time"] < 0:
            return Reason.TIME_BEFORE_EPOCH
        if event["time"] is not None and event["time"] > now + limits.TIME_FUTURE_NS_MAX:
            return Reason.TIME_IN_FUTURE
        if schema.agg_type == AggType.COUNT:
            return Reason.ACCEPTED
        if unique and schema.unique_type == UniqueType.STRING:
            return Reason.ACCEPTED if event["text"] is not None else Reason.VALUE_NOT_TEXT
        if event["text"] is not None:
            return Reason.VALUE_NOT_NUMBER
        if unique and event["value"] < 0:
            return Reason.VALUE_OUT_OF_RANGE
        return Reason.ACCEPTED

    @staticmethod
    def _sealed(event: dict[str, Any], record: MetricRecord, now: int) -> bool:
        schema = record.schema
        if schema.grace_seconds is None or event["time"] is None:
            return False
        end = period_of(event["time"], schema.period_type, schema.billing_cycle_day, record.zone).end_ns
        return now > end + schema.grace_seconds * 10**9

    # ------------------------------------------------------------ totals

    def totals(self) -> dict[tuple[int, int, int], tuple[int, int]]:
        """(account, uid, period start) -> (count, sum of values)."""
        found: dict[tuple[int, int, int], tuple[int, int]] = {}
        living: dict[str, MetricRecord] = {}
        for record in self.records:
            if record.schema is not None:
                living[record.schema.schema.code] = record.schema
            for event, verdict in zip(record.events, record.verdicts, strict=True):
                if verdict:
                    continue
                metric = living[event["metric"]]
                time = record.append_ns if event["time"] is None else event["time"]
                schema = metric.schema
                period = period_of(time, schema.period_type, schema.billing_cycle_day, metric.zone)
                key = (event["account"], metric.uid, period.start_ns)
                count, total = found.get(key, (0, 0))
                found[key] = (count + 1, total + event["value"])
        return found
