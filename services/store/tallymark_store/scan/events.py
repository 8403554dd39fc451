"""Pages of raw events: the accepted ones of an account, a metric and a time range, in log order.

What the archive holds comes from there, what lies behind from the log: a cursor is an offset, and means the same in both.

Like `TotalsScan`, an `EventsScan` is stepped and reads only what was committed when it was made. A page ends at its
limit of events or of bytes, whichever comes first, but never before its first event. `next_offset` is the offset of
the first event behind the page, so reading on from it gives what follows, whatever was appended meanwhile.
"""

from __future__ import annotations

import struct
from typing import Final

import numpy as np

from tallymark_protocol import limits
from tallymark_protocol.messages import EventRecord
from tallymark_protocol.payload import COLUMNS
from tallymark_store.scan import kernels as k
from tallymark_store.scan.archived import Archived, ArchivedEvents, check_covered, check_not_dropped, usable
from tallymark_store.scan.metric import ScanMetric
from tallymark_store.scan.source import (
    ByteArray,
    IntArray,
    RecordCursor,
    RecordSource,
    damaged,
    rows_between,
)
from tallymark_store.scan.totals import METRIC_INDEXES, RUN_EVENTS, bits_of, rows_of_intervals

PAGE_BYTES_MAX: Final = 8 * 1024 * 1024  # of properties, ids and texts in a page, and a flat sum per event
_EVENT_BYTES: Final = 96  # the flat sum
_HITS: Final = 1_024  # events made in one step
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
        archived: Archived | None = None,
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
            archived: what is read in place of the log below its end.
        """
        assert limit > 0, "a page has room for an event"
        first, last = from_offset, applied
        if metric is not None:
            first = max(first, metric.first_offset)
            last = min(last, metric.end_offset)
        archived = usable(archived, source.log_start)
        split = 0 if archived is None else min(archived.end_offset, applied)
        check_covered(source, archived, first, last)
        if start_ns < end_ns:
            check_not_dropped(
                archived,
                None if metric is None else metric.uid,
                np.array([start_ns], np.int64),
                np.array([end_ns], np.int64),
                (first, last),
                else_ask="totals are kept",
            )
        self._archived: ArchivedEvents | None = None
        if archived is not None and first < min(last, split):
            self._archived = archived.events(
                uid=None if metric is None else metric.uid,
                account=account,
                start_ns=start_ns,
                end_ns=end_ns,
                first=first,
                last=min(last, split),
                count=limit + 1,
            )
        rows = rows_between(source, max(first, split), last)
        self._cursor = RecordCursor(source, rows_of_intervals(rows, [(start_ns, max(start_ns, end_ns), 0)]))
        self._source = source
        self._start_ns = start_ns
        self._end_ns = end_ns
        self._from_offset = max(from_offset, split)
        self._limit = limit
        self._bytes_left = bytes_max
        self._code = np.frombuffer(metric.code.encode() if metric else b"", np.uint8)
        self._request = np.zeros(k.REQUEST_FIELDS, np.int64)
        self._request[k.Q_ACCOUNT] = bits_of(account or 0)
        self._request[k.Q_ALL_ACCOUNTS] = int(account is None)
        self._match = np.zeros(METRIC_INDEXES, np.uint8)
        self._columns = np.zeros(COLUMNS, np.int64)
        self._hits = np.zeros((min(_HITS, limit + 1), 2), np.int64)
        self._described = np.zeros((len(self._hits), k.EVENT_FIELDS), np.int64)
        self._codes: dict[bytes, str] = {}  # metric codes met so far
        self._state = np.zeros(k.STATE_FIELDS, np.int64)
        self._run: tuple[ByteArray, IntArray] | None = None
        self.events: list[EventRecord] = []
        self.next_offset: int | None = None  # where to read on; None: there is nothing more
        self.done = self._archived is None and not len(self._cursor)

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
        if self._archived is not None:
            return self._step_archived(self._archived)
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
            raise damaged(self._source.partition, self._cursor.segment, body, "it is malformed")
        self.done = self._take_hits(data, records, self._hits[: self._state[k.S_HITS]])
        if status == k.DONE:
            self._run = None
        return self.done

    @property
    def reads_files(self) -> bool:
        """Whether the next step may read the archive, which is nothing for an event loop."""
        return self._archived is not None and not self.done

    def _step_archived(self, archived: ArchivedEvents) -> bool:
        if archived.advance():
            self.done = any(self._is_full(_EVENT_BYTES + size, event) for size, event in archived.found)
        else:
            self._archived = None
            self.done = not len(self._cursor)
        return self.done

    def _is_full(self, size: int, event: EventRecord) -> bool:
        """Add an event to the page, or have the next page begin with it."""
        if self.events and (len(self.events) == self._limit or self._bytes_left < size):
            self.next_offset = event.offset
            return True
        self._bytes_left -= size
        self.events.append(event)
        return False

    def _take_hits(self, data: ByteArray, records: IntArray, hits: IntArray) -> bool:
        """Make events of hits; True when the page is full and the hit that follows it is known."""
        described = self._described[: len(hits)]
        k.describe_events(data, records, hits, self._columns, described)
        for fields in described.tolist():
            size = (
                _EVENT_BYTES
                + (fields[k.E_SET_END] - fields[k.E_SET_START])
                + (fields[k.E_ID_END] - fields[k.E_ID_START])
                + (fields[k.E_TEXT_END] - fields[k.E_TEXT_START])
            )
            if self.events and (len(self.events) == self._limit or self._bytes_left < size):
                self.next_offset = fields[k.E_OFFSET]
                return True
            self._bytes_left -= size
            self.events.append(self._event(data, fields))
        return False

    def _event(self, data: ByteArray, fields: list[int]) -> EventRecord:
        (
            offset,
            append_ns,
            account,
            value,
            time,
            operation,
            code_start,
            code_end,
            set_start,
            set_end,
            id_start,
            id_end,
            text_start,
            text_end,
        ) = fields
        code = data[code_start:code_end].tobytes()
        name = self._codes.get(code)
        if name is None:
            name = self._codes[code] = code.decode("ascii")
        return EventRecord(
            account_id=account & (2**64 - 1),
            metric_code=name,
            value=text_value(data[text_start:text_end].tobytes()) if text_start < text_end else value,
            event_time_ns=time,
            append_time_ns=append_ns,
            operation=operation,
            properties=parse_properties(data[set_start:set_end].tobytes()) if set_start < set_end else {},
            event_id=data[id_start:id_end].tobytes() if id_start < id_end else None,
            partition=self._source.partition,
            offset=offset,
        )


def text_value(encoded: bytes) -> int | str:
    """Return the value that a text stands for (`layout`)."""
    if encoded[0] == _TAG_U64 and len(encoded) == 1 + _U64.size:
        return int(_U64.unpack_from(encoded, 1)[0])
    return encoded[1:].decode("utf-8", "replace")


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
