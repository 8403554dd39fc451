"""Pages of raw events: the accepted ones of an account, a metric and a time range, in log order.

Like `TotalsScan`, an `EventsScan` is stepped and reads only what was committed when it was made. A page ends at its
limit of events or of bytes, whichever comes first, but never before its first event. `next_offset` is the offset of
the first event behind the page, so reading on from it gives what follows, whatever was appended meanwhile.
"""

from __future__ import annotations

import struct
from typing import Final

import numpy as np

from tallymark_protocol import limits
from tallymark_protocol.errors import UnavailableError
from tallymark_protocol.layout import TIME_ABSENT
from tallymark_protocol.messages import EventRecord
from tallymark_protocol.payload import (
    C_ID_BYTES,
    C_ID_ENCODING,
    C_ID_ENDS,
    C_METRIC_BYTES,
    C_METRIC_ENDS,
    C_PROPERTY_BYTES,
    C_PROPERTY_ENDS,
    C_TEXT_BYTES,
    C_TEXT_ENCODING,
    C_TEXT_ENDS,
    COLUMNS,
    account_at,
    metric_at,
    operation_at,
    properties_at,
    time_at,
    value_at,
)
from tallymark_store.scan import kernels as k
from tallymark_store.scan.metric import ScanMetric
from tallymark_store.scan.source import ByteArray, IntArray, RecordCursor, RecordSource, damaged
from tallymark_store.scan.totals import _METRIC_INDEXES, RUN_EVENTS, _bits, rows_of_intervals

PAGE_BYTES_MAX: Final = 8 * 1024 * 1024  # of properties, ids and texts in a page, and a flat sum per event
_EVENT_BYTES: Final = 96  # the flat sum
_HITS: Final = 1_024  # events made in one step
_U32 = struct.Struct("<I")
_U16 = struct.Struct("<H")
_U64 = struct.Struct("<Q")


class EventsScan:
    """A page of events, in the making."""

    def __init__(
        self,
        source: RecordSource,
        *,
        account: int | None,
        metric: ScanMetric | None,
        start_ns: int,
        end_ns: int,
        applied: int,
        from_offset: int = 0,
        limit: int = limits.PAGE_EVENTS_MAX,
        bytes_max: int = PAGE_BYTES_MAX,
    ) -> None:
        """Prepare to read events timed in [start_ns, end_ns) at offsets [from_offset, applied).

        Args:
            source: where the records are.
            account: whose events; None for all.
            metric: events of which metric; None for all.
            start_ns: inclusive.
            end_ns: exclusive.
            applied: exclusive.
            from_offset: where the page begins.
            limit: events in the page, at least 1.
            bytes_max: about how large it may become.
        """
        assert limit > 0, "a page has room for an event"
        first, last = from_offset, applied
        if metric is not None:
            first = max(first, metric.first_offset)
            last = min(last, metric.end_offset)
        if first < min(last, source.log_start):
            raise UnavailableError(
                f"events below offset {source.log_start} are no longer in the log of partition {source.partition}",
                retriable=False,
            )
        rows = source.rows(first, max(first, last))
        self._cursor = RecordCursor(source, rows_of_intervals(rows, [(start_ns, max(start_ns, end_ns), 0)]))
        self._source = source
        self._start_ns = start_ns
        self._end_ns = end_ns
        self._from_offset = from_offset
        self._limit = limit
        self._bytes_left = bytes_max
        self._code = np.frombuffer(metric.code.encode() if metric else b"", np.uint8)
        self._request = np.zeros(k.REQUEST_FIELDS, np.int64)
        self._request[k.Q_ACCOUNT] = _bits(account or 0)
        self._request[k.Q_ALL_ACCOUNTS] = int(account is None)
        self._match = np.zeros(_METRIC_INDEXES, np.uint8)
        self._columns = np.zeros(COLUMNS, np.int64)
        self._hits = np.zeros((min(_HITS, limit + 1), 2), np.int64)
        self._state = np.zeros(k.STATE_FIELDS, np.int64)
        self._run: tuple[ByteArray, IntArray] | None = None
        self.events: list[EventRecord] = []
        self.next_offset: int | None = None  # where to read on; None: there is nothing more
        self.done = not len(self._cursor)

    def run(self) -> None:
        """Do what is left, all at once."""
        while not self.step(RUN_EVENTS):
            pass

    def step(self, events_max: int) -> bool:
        """Scan about `events_max` further events, or make some events of the page; return whether it is done.

        Raises:
            DamagedError: when a record's bytes aren't what was written.
        """
        if self.done:
            return True
        if self._run is None:
            self._run = self._cursor.next_run(events_max)
            self._state[:] = 0
            if self._run is None:
                self.done = True
                return True
        data, records = self._run
        self._state[k.S_HITS] = 0
        status = k.select_events(
            data,
            records,
            self._request,
            self._code,
            self._start_ns,
            self._end_ns,
            self._from_offset,
            self._match,
            self._hits,
            self._state,
            self._columns,
        )
        if status == k.MALFORMED:
            body = int(records[self._state[k.S_RECORD], k.K_BODY])
            raise damaged(self._source.partition, -1, body, "it is malformed")
        self.done = self._take_hits(data, records, self._hits[: self._state[k.S_HITS]].tolist())
        if status == k.DONE:
            self._run = None
        return self.done

    def _take_hits(self, data: ByteArray, records: IntArray, hits: list[list[int]]) -> bool:
        """Make events of hits; True when the page is full and the hit that follows it is known."""
        opened = -1
        reader: _RecordReader | None = None
        for record, event in hits:
            if record != opened or reader is None:
                reader = _RecordReader(self._source.partition, data, records[record].tolist())
                opened = record
            if self.events and (
                len(self.events) == self._limit or self._bytes_left < reader.size(event) + _EVENT_BYTES
            ):
                self.next_offset = reader.base_offset + event
                return True
            self._bytes_left -= reader.size(event) + _EVENT_BYTES
            self.events.append(reader.event(event))
        return False


class _RecordReader:
    """Makes events of one record, whose checksum has been checked."""

    def __init__(self, partition: int, data: ByteArray, record: list[int]) -> None:
        self.base_offset, count, self._append_ns, body, length = record
        columns = np.zeros(COLUMNS, np.int64)
        status = k.open_record(data, body, length, count, columns)
        assert status != -2, "the kernel that found the event has read the record"
        self._partition = partition
        self._data = data
        self._columns = columns
        self._at: list[int] = columns.tolist()
        self._codes: dict[int, str] = {}
        self._sets: dict[int, dict[str, str]] = {}

    def _span(self, ends: int, content: int, entry: int) -> tuple[int, int]:
        position = self._at[ends] + 4 * entry
        head = self._data[max(position - 4, self._at[ends]) : position + 4].tobytes()
        start = _U32.unpack_from(head)[0] if entry else 0
        end = _U32.unpack_from(head, len(head) - 4)[0]
        return self._at[content] + start, self._at[content] + end

    def _optional(self, encoding: int, ends: int, content: int, event: int) -> bytes:
        if self._at[encoding] == 0:
            return b""
        start, end = self._span(ends, content, event)
        return self._data[start:end].tobytes()

    def size(self, event: int) -> int:
        """Return how many bytes the event's parts of variable length take."""
        total = 0
        k_set = int(properties_at(self._data, self._columns, event))
        if k_set:
            start, end = self._span(C_PROPERTY_ENDS, C_PROPERTY_BYTES, k_set - 1)
            total += end - start
        for encoding, ends, content in (
            (C_ID_ENCODING, C_ID_ENDS, C_ID_BYTES),
            (C_TEXT_ENCODING, C_TEXT_ENDS, C_TEXT_BYTES),
        ):
            if self._at[encoding]:
                start, end = self._span(ends, content, event)
                total += end - start
        return total

    def event(self, event: int) -> EventRecord:
        """Return event number `event` of the record."""
        data, columns = self._data, self._columns
        metric = int(metric_at(data, columns, event))
        code = self._codes.get(metric)
        if code is None:
            start, end = self._span(C_METRIC_ENDS, C_METRIC_BYTES, metric)
            code = self._codes[metric] = data[start:end].tobytes().decode("ascii")
        time = int(time_at(data, columns, event))
        return EventRecord(
            account_id=int(account_at(data, columns, event)) & (2**64 - 1),
            metric_code=code,
            value=self._value(event),
            event_time_ns=self._append_ns if time == _TIME_ABSENT else time,
            append_time_ns=self._append_ns,
            operation=int(operation_at(data, columns, event)),
            properties=dict(self._properties(int(properties_at(data, columns, event)))),
            event_id=self._optional(C_ID_ENCODING, C_ID_ENDS, C_ID_BYTES, event) or None,
            partition=self._partition,
            offset=self.base_offset + event,
        )

    def _value(self, event: int) -> int | str:
        text = self._optional(C_TEXT_ENCODING, C_TEXT_ENDS, C_TEXT_BYTES, event)
        if text:
            if text[0] == _TAG_U64 and len(text) == 1 + _U64.size:
                return int(_U64.unpack_from(text, 1)[0])
            return text[1:].decode("utf-8", "replace")
        return int(value_at(self._data, self._columns, event))

    def _properties(self, number: int) -> dict[str, str]:
        if not number:
            return {}
        known = self._sets.get(number)
        if known is None:
            start, end = self._span(C_PROPERTY_ENDS, C_PROPERTY_BYTES, number - 1)
            known = self._sets[number] = parse_properties(self._data[start:end].tobytes())
        return known


_TIME_ABSENT = TIME_ABSENT
_TAG_U64 = 2


def parse_properties(encoded: bytes) -> dict[str, str]:
    """Read a property set (`layout`) that has been validated."""
    properties = {}
    position = 0
    while position < len(encoded):
        key_end = position + 1 + encoded[position]
        value_end = key_end + 2 + _U16.unpack_from(encoded, key_end)[0]
        key = encoded[position + 1 : key_end].decode("utf-8", "replace")
        properties[key] = encoded[key_end + 2 : value_end].decode("utf-8", "replace")
        position = value_end
    return properties
