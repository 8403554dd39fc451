"""What collects during one turn of the loop, and when it goes out."""

from __future__ import annotations

import asyncio
from typing import Any

from tallymark_protocol.connection import Connection, Role
from tallymark_runtime.framing import FramedProtocol, turn_of


class Transport(asyncio.Transport):
    """Remembers what was written, one entry a write."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[bytes] = []

    def write(self, data: Any) -> None:
        self.written.append(bytes(data))

    def is_closing(self) -> bool:
        return False

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass


def connected() -> tuple[FramedProtocol, Transport]:
    protocol = FramedProtocol(
        Connection(Role.CLIENT), asyncio.get_running_loop(), write_buffer_high_bytes=1_000
    )
    transport = Transport()
    protocol.connection_made(transport)
    return protocol, transport


async def test_what_is_written_in_a_turn_goes_out_at_its_end() -> None:
    """In one write for each connection, without another round of the loop."""
    (one, first), (two, second) = connected(), connected()
    with turn_of(asyncio.get_running_loop()):
        one.write(b"a", b"b")
        two.write(b"x")
        with turn_of(asyncio.get_running_loop()):
            one.write(b"c")
        assert first.written == second.written == []
    assert (first.written, second.written) == ([b"abc"], [b"x"])


async def test_what_is_written_outside_of_a_turn_goes_out_with_the_next_round() -> None:
    """Joined as well."""
    one, first = connected()
    one.write(b"a")
    one.write(b"b")
    assert first.written == []
    await asyncio.sleep(0)
    assert first.written == [b"ab"]


async def test_what_is_deferred_runs_before_anything_goes_out() -> None:
    """And what it defers itself, too; outside of a turn it runs in the next round."""
    turn = turn_of(asyncio.get_running_loop())
    one, first = connected()
    ran: list[str] = []

    def last() -> None:
        ran.append("last")
        one.write(b"2")

    def late() -> None:
        ran.append("late")
        one.write(b"1")
        turn.defer(last)

    with turn:
        turn.defer(late)
        assert ran == []
    assert ran == ["late", "last"]
    assert first.written == [b"12"]
    turn.defer(late)
    assert len(ran) == 2
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert ran == ["late", "last", "late", "last"]


async def test_a_deferred_callback_that_fails_harms_nobody_else() -> None:
    """It is told to the loop; the others run, and what was written goes out."""
    loop = asyncio.get_running_loop()
    one, first = connected()
    told: list[Any] = []
    loop.set_exception_handler(lambda _, context: told.append(context["exception"]))

    def fail() -> None:
        raise RuntimeError("a defect")

    with turn_of(loop):
        turn_of(loop).defer(fail)
        turn_of(loop).defer(lambda: one.write(b"x"))
    assert first.written == [b"x"]
    assert [str(error) for error in told] == ["a defect"]
