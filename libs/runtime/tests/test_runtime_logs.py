"""Structured logs: the two formats, their bounds, the thread that writes, and the line about leadership."""

from __future__ import annotations

import io
import json
import logging
import sys
import threading

import pytest

from tallymark_runtime import logs


def _record(message="hello %s", *args, level=logging.WARNING, extra=None, exc_info=None):
    logger = logging.Logger("tallymark_store.node")
    return logger.makeRecord(logger.name, level, "f.py", 1, message, args or ("you",), exc_info, extra=extra)


def _json(record, fields=None):
    line = logs.JsonFormatter(fields).format(record)
    assert line.isascii()
    assert "\n" not in line
    return json.loads(line)


class _Stuck(io.StringIO):
    """A stream that nobody reads until it is let go."""

    def __init__(self):
        super().__init__()
        self.may_write = threading.Event()
        self.is_called = threading.Event()

    def write(self, text):
        self.is_called.set()
        self.may_write.wait()
        return super().write(text)


@pytest.fixture
def logger():
    """A logger of its own, without the root's handlers."""
    made = logging.Logger("tallymark_test")
    yield made
    for handler in list(made.handlers):
        made.removeHandler(handler)
        handler.close()


def test_a_json_line_has_the_fields():
    """What stands in extra is a field beside time, level, logger and message; the process's own come first."""
    record = _record(extra={"partition": 3, "ratio": 0.5, "ok": True, "nothing": None})
    record.created = 1_772_366_400.25
    assert _json(record, {"node": "store-1", "role": "store"}) == {
        "time": "2026-03-01T12:00:00.250000Z",
        "level": "warning",
        "logger": "tallymark_store.node",
        "message": "hello you",
        "node": "store-1",
        "role": "store",
        "partition": 3,
        "ratio": 0.5,
        "ok": True,
        "nothing": None,
    }


def test_a_json_line_is_one_line_of_ascii_whatever_it_says():
    """Line ends, controls, lone surrogates, odd objects: nothing breaks the line, and it stays valid JSON."""

    class Odd:
        def __str__(self):
            raise ValueError("no text")

    nasty = 'a\nb\r\u2028\x00"\\\ud800é'
    found = _json(_record("%s", nasty, extra={"text": nasty, "nan": float("nan"), "odd": Odd(), "list": [1]}))
    assert found["message"] == found["text"] == nasty
    assert found["nan"] == "nan"
    assert found["odd"] == "<Odd>"
    assert found["list"] == "[1]"


def test_reserved_names_do_not_overwrite():
    """A field that is called like one of ours is kept under another name."""
    found = _json(_record(extra={"level": 9, "time": 8, "exception": 7}))
    assert found["level"] == "warning"
    assert (found["field_level"], found["field_time"], found["field_exception"]) == (9, 8, 7)


def test_lines_are_bounded():
    """Long messages and values are cut, many fields are dropped."""
    extra = {f"f{number}": "x" * 10_000 for number in range(100)}
    found = _json(_record("%s", "y" * 100_000, extra=extra))
    assert len(found["message"]) == logs.MESSAGE_CHARACTERS_MAX + 1
    fields = [name for name in found if name.startswith("f")]
    assert len(fields) == logs.FIELDS_MAX
    assert all(len(found[name]) == logs.VALUE_CHARACTERS_MAX + 1 for name in fields)


def test_a_wrong_log_call_is_not_lost():
    """A message whose arguments don't fit it is given as it is."""
    assert "hello %d" in _json(_record("hello %d %d", "you"))["message"]


def test_an_exception_is_in_the_line():
    """The traceback is a field in JSON, and lines of its own for people."""
    try:
        raise ValueError("deep down")
    except ValueError:
        record = _record(exc_info=sys.exc_info())
    assert "ValueError: deep down" in _json(record)["exception"]
    text = logs.LogfmtFormatter().format(record)
    assert text.splitlines()[-1] == "ValueError: deep down"


def test_logfmt_is_for_people():
    """Message first, then fields, quoted where they need it."""
    record = _record("lease\nlost", extra={"partition": 3, "why": 'no "quorum"', "empty": "", "none": None})
    record.args = ()
    record.created = 1_772_366_400.25
    assert logs.LogfmtFormatter().format(record) == (
        '12:00:00.250 WARNING  lease\\nlost  partition=3 why="no \\"quorum\\"" empty="" none="" '
        "logger=tallymark_store.node"
    )


def test_logfmt_sends_no_commands_to_the_terminal():
    """Escape sequences, in a message, a field or a traceback, are shown and not obeyed."""
    nasty = "\x1b[2J\x9b\r\u2028\ud800"
    try:
        raise ValueError(nasty)
    except ValueError:
        record = _record("%s", nasty, extra={"why": nasty}, exc_info=sys.exc_info())
    text = logs.LogfmtFormatter().format(record)
    assert text.replace("\n", "").isprintable()
    assert text.count("\\x1b[2J") == 2
    assert "\\u001b[2J" in text


def test_leadership_lines_say_why(logger):
    """One line a change, with partition, epoch, change and reason as fields."""
    stream = io.StringIO()
    handler = logs.ThreadedHandler(stream)
    handler.setFormatter(logs.JsonFormatter({"node": "s1"}))
    logger.addHandler(handler)
    for change in ("gained", "lost", "failed"):
        logs.leadership_changed(
            logger, partition=2, change=change, epoch=17, reason="a higher epoch was seen", leader="s2"
        )
    handler.flush()
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line["message"] for line in lines] == [
        "leads partition 2 in epoch 17: a higher epoch was seen",
        "leads partition 2 no more (epoch 17): a higher epoch was seen",
        "did not become leader of partition 2 (epoch 17): a higher epoch was seen",
    ]
    for line, change in zip(lines, ("gained", "lost", "failed"), strict=True):
        fields = {"event": "leadership", "partition": 2, "change": change, "epoch": 17, "leader": "s2"}
        assert fields.items() <= line.items()
        assert line["reason"] == "a higher epoch was seen"


def test_a_stuck_stream_holds_nobody(logger):
    """Logging goes on while the stream is stuck; what is over the bound is dropped, and a later line says so."""
    stream = _Stuck()
    handler = logs.ThreadedHandler(stream, lines_max=3)
    handler.setFormatter(logs.JsonFormatter())
    logger.addHandler(handler)
    logger.warning("line %d", 0)
    assert stream.is_called.wait(20.0)  # the writer holds line 0, the queue is empty
    for number in range(1, 8):
        logger.warning("line %d", number)
    assert handler.dropped == 4
    stream.may_write.set()
    handler.flush()
    logger.warning("line 8")
    handler.flush()
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line["message"] for line in lines] == ["line 0", "line 1", "line 2", "line 3", "line 8"]
    assert lines[-1]["dropped_lines"] == 4
    logger.warning("line 9")
    handler.flush()
    assert "dropped_lines" not in json.loads(stream.getvalue().splitlines()[-1])


def test_a_broken_stream_is_no_error(logger):
    """Where nobody reads any more, lines go nowhere, and the end comes at once."""

    class Broken(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    handler = logs.ThreadedHandler(Broken())
    logger.addHandler(handler)
    logger.warning("one")
    handler.flush()
    logger.warning("two")
    handler.close()
    assert not handler._thread.is_alive()


def test_configure_sends_everything_and_remove_ends_it():
    """The root logs to the stream, in JSON where it is no terminal; noisy libraries stay quiet."""
    root, stream = logging.getLogger(), io.StringIO()
    level, handlers = root.level, list(root.handlers)
    quiet = {name: logging.getLogger(name).level for name in logs._QUIET}
    handler = logs.configure(stream, fields={"role": "store"})
    try:
        logging.getLogger("tallymark_store").info("started", extra={"partitions": 4})
        logging.getLogger("asyncio").info("chatter")
        logging.getLogger("tallymark_store").debug("detail")
    finally:
        logs.remove(handler)
        root.setLevel(level)
        for name, before in quiet.items():
            logging.getLogger(name).setLevel(before)
    assert root.handlers == handlers
    (line,) = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert (line["message"], line["role"], line["partitions"]) == ("started", "store", 4)
