"""Structured logs: one line a record, on the standard logging of Python.

Owns how records look and how they get out, not what is logged. A module logs as always, `_log.warning("no lease",
extra={"partition": 3})`, and what stands in `extra` becomes a field of the line::

    {"time": "2026-03-01T12:00:00.123456Z", "level": "warning", "logger": "tallymark_store.node",
     "message": "no lease", "node": "store-1", "role": "store", "partition": 3}

in JSON, for machines (always one line, always ASCII), or in logfmt, for people, where standard error is a terminal::

    12:00:00.123 WARNING no lease  partition=3 logger=tallymark_store.node

Lines are made where they are logged and written by a thread of its own: a terminal that is stopped, or a pipe that
nobody reads, must not stop a server's event loop and with it its leases. What waits to be written is bounded; what
is over that is dropped and counted, in a line that says so.

Changes of leadership have a helper, `leadership_changed`: the one line that says who leads since when, and why.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import queue
import threading
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final, Literal, TextIO

Style = Literal["auto", "json", "logfmt"]
LeadershipChange = Literal["gained", "lost", "failed"]

LINES_MAX: Final = 10_000  # waiting to be written
MESSAGE_CHARACTERS_MAX: Final = 8_192
VALUE_CHARACTERS_MAX: Final = 2_048  # of one field
TRACEBACK_CHARACTERS_MAX: Final = 32_768
FIELDS_MAX: Final = 32  # of one record
FLUSH_S_MAX: Final = 2.0  # how long the end of the process waits for lines to be written
_QUIET: Final = ("asyncio", "concurrent", "grpclib", "h2", "hpack", "numba")  # say too much below WARNING

# What every record has by itself: all else came in by `extra`.
_OWN: Final = frozenset(vars(logging.LogRecord("", 0, "", 0, "", (), None))) | {
    "message",
    "asctime",
    "taskName",
}
_RESERVED: Final = frozenset({"time", "level", "logger", "message", "exception"})


class JsonFormatter(logging.Formatter):
    """One JSON object a record, on one line. `fields` are part of every line."""

    def __init__(self, fields: Mapping[str, str] | None = None) -> None:
        super().__init__()
        self._fields = dict(fields or {})

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record, without its end."""
        at = datetime.fromtimestamp(record.created, UTC)
        line: dict[str, Any] = {
            "time": at.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": message_of(record),
            **self._fields,
            **fields_of(record),
        }
        if record.exc_info:
            line["exception"] = _cut(self.formatException(record.exc_info), TRACEBACK_CHARACTERS_MAX)
        return json.dumps(line, ensure_ascii=True, allow_nan=False)


class LogfmtFormatter(logging.Formatter):
    """The message, then `key=value` for every field; a traceback follows on lines of its own."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record, without its end."""
        at = datetime.fromtimestamp(record.created, UTC)
        message = _printable(message_of(record))
        parts = [f"{at:%H:%M:%S}.{at.microsecond // 1000:03d}", f"{record.levelname:<8}", message]
        fields = {**fields_of(record), "logger": record.name}
        line = " ".join(parts) + "  " + " ".join(f"{key}={_logfmt(value)}" for key, value in fields.items())
        if record.exc_info:
            trace = _cut(self.formatException(record.exc_info), TRACEBACK_CHARACTERS_MAX)
            line += "".join("\n" + _printable(part) for part in trace.split("\n"))
        return line


def message_of(record: logging.LogRecord) -> str:
    """A record's message, cut to its bound; one whose arguments don't fit it is given with them."""
    try:
        message = record.getMessage()
    except Exception:  # a wrong log call is no reason to lose what it was about to say
        message = f"{record.msg!s} {record.args!r}"
    return _cut(message, MESSAGE_CHARACTERS_MAX)


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    """What the logger's caller gave in `extra`, as values that JSON has; at most `FIELDS_MAX`."""
    fields: dict[str, Any] = {}
    for name, value in vars(record).items():
        if name in _OWN:
            continue
        if len(fields) == FIELDS_MAX:
            break
        fields[f"field_{name}" if name in _RESERVED else name] = _plain(value)
    return fields


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    try:
        return _cut(str(value), VALUE_CHARACTERS_MAX)
    except Exception:
        return f"<{type(value).__name__}>"


def _logfmt(value: Any) -> str:
    text = "" if value is None else str(value)
    if text and text.isprintable() and not set(text) & {" ", '"', "="}:
        return text
    return json.dumps(text, ensure_ascii=not text.isprintable())


def _printable(text: str) -> str:
    """The text without what a terminal would take for commands, line ends included."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _cut(text: str, characters_max: int) -> str:
    return text if len(text) <= characters_max else text[:characters_max] + "…"


class ThreadedHandler(logging.Handler):
    """Writes lines to a stream in a thread of its own; see the module's docstring. Close it at the end.

    Attributes:
        dropped: lines that were not written, for lack of room, since the last that said so.
    """

    def __init__(self, stream: TextIO, *, lines_max: int = LINES_MAX) -> None:
        super().__init__()
        self.dropped = 0
        self._stream = stream
        # Lines; an event to be set once all before it are written; None to end.
        self._lines: queue.Queue[str | threading.Event | None] = queue.Queue(lines_max)
        self._thread = threading.Thread(target=self._run, name="log-writer", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Take a record: format it here and now, leave the writing to the thread."""
        try:
            if self.dropped:
                # In the stead of a line of their own, which there might be no room for either.
                record.__dict__["dropped_lines"] = self.dropped
            line = self.format(record)
        except Exception:
            self.handleError(record)
            return
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self.dropped += 1
        else:
            self.dropped = 0

    def flush(self) -> None:
        """Wait until what was logged by now is written, for a bounded time."""
        written = threading.Event()
        with contextlib.suppress(queue.Full):
            self._lines.put(written, timeout=FLUSH_S_MAX)
            written.wait(FLUSH_S_MAX)

    def close(self) -> None:
        """Write what waits, for a bounded time, and end the thread."""
        try:
            self._lines.put(None, timeout=FLUSH_S_MAX)
        except queue.Full:
            pass
        else:
            self._thread.join(FLUSH_S_MAX)
        super().close()

    def _run(self) -> None:
        while (item := self._lines.get()) is not None:
            if isinstance(item, threading.Event):
                item.set()
                continue
            # Where nobody reads any more there is nobody to tell.
            with contextlib.suppress(OSError, ValueError):
                self._stream.write(item + "\n")
                if self._lines.empty():
                    self._stream.flush()


def configure(
    stream: TextIO,
    *,
    style: Style = "auto",
    level: int = logging.INFO,
    fields: Mapping[str, str] | None = None,
) -> ThreadedHandler:
    """Send what the whole process logs to `stream`; give the handler to `remove` at the end.

    Args:
        stream: usually standard error.
        style: "auto" is logfmt on a terminal and JSON elsewhere.
        level: what is below is not written.
        fields: part of every line in JSON: the node, its role.
    """
    handler = ThreadedHandler(stream)
    is_json = style == "json" or (style == "auto" and not _is_terminal(stream))
    handler.setFormatter(JsonFormatter(fields) if is_json else LogfmtFormatter())
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(level)
    for name in _QUIET:
        logging.getLogger(name).setLevel(max(level, logging.WARNING))
    return handler


def remove(handler: ThreadedHandler) -> None:
    """Undo `configure`: write what waits, and send nothing there any more."""
    logging.getLogger().removeHandler(handler)
    handler.close()


def _is_terminal(stream: TextIO) -> bool:
    try:
        return os.isatty(stream.fileno())
    except (OSError, ValueError):  # io.UnsupportedOperation is both
        return False


def leadership_changed(
    logger: logging.Logger,
    *,
    partition: int,
    change: LeadershipChange,
    epoch: int,
    reason: str,
    **fields: str | int,
) -> None:
    """Log the one line about a change of a partition's leadership at this node.

    Args:
        logger: the caller's.
        partition: whose.
        change: "gained": this node leads and serves; "lost": it did, and stopped; "failed": it tried and gave up.
        epoch: of the leadership that began, ended or was tried.
        reason: why, in words: what happened, who took over.
        fields: further ones: offsets, the new leader.
    """
    texts = {
        "gained": "leads partition %d in epoch %d: %s",
        "lost": "leads partition %d no more (epoch %d): %s",
        "failed": "did not become leader of partition %d (epoch %d): %s",
    }
    extra = {
        **fields,
        "event": "leadership",
        "partition": partition,
        "change": change,
        "epoch": epoch,
        "reason": reason,
    }
    logger.info(texts[change], partition, epoch, reason, extra=extra)
