"""Virtual time: one scheduler for the whole simulation, and an event loop for each simulated process.

Owns the order in which anything happens. `World` keeps a heap of (time, sequence) events; nothing in a simulation
runs but from it, so one seed is one history. A process has a `ProcessLoop` of its own, an asyncio loop without any
I/O: what it schedules runs in turns, as asyncio does it, each a little later than what asked for it, so that a loop
that polls without waiting moves time on and is noticed.

A process can be frozen (nothing of it runs, its timers fire late) and killed: then nothing of it ever runs again,
in the middle of whatever it was doing. `Crash` is how a port of a dead process ends the call that is under way.
"""

from __future__ import annotations

import asyncio
import contextvars
import heapq
from asyncio import events, format_helpers
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

from tallymark_protocol.errors import TallymarkError
from tallymark_runtime.disk import DiskError

TURN_NS = 10_000  # how long a turn of a loop takes
MILLISECOND = 1_000_000
SECOND = 1_000_000_000


class Crash(BaseException):
    """The process is dead: whatever it is doing ends here."""


class SimulationError(AssertionError):
    """The simulation found what must not be."""


class Event:
    """Something that is going to happen; `cancel` it where it must not."""

    __slots__ = ("args", "call")

    def __init__(self, call: Callable[..., object], args: tuple[Any, ...]) -> None:
        self.call: Callable[..., object] | None = call
        self.args = args

    def cancel(self) -> None:
        """Let it not happen."""
        self.call = None
        self.args = ()


class World:
    """The scheduler.

    Attributes:
        now_ns: the time, from 0 on.
        events: how many have happened.
    """

    def __init__(self, *, events_max: int = 2_000_000) -> None:
        self.now_ns = 0
        self.events = 0
        self.events_max = events_max
        self.is_halted = False  # a run ends at once: something was found
        self.graveyard: list[
            Any
        ] = []  # what dead processes left: collected when nobody can be disturbed by it
        self._heap: list[tuple[int, int, Event]] = []
        self._sequence = 0

    def at(self, when_ns: int, call: Callable[..., object], *args: Any) -> Event:
        """Have something happen at a time; what is due at one time happens in the order of these calls."""
        event = Event(call, args)
        self._sequence = sequence = self._sequence + 1
        heapq.heappush(self._heap, (max(self.now_ns, when_ns), sequence, event))
        return event

    def after(self, delay_ns: int, call: Callable[..., object], *args: Any) -> Event:
        """Have something happen after a while."""
        event = Event(call, args)
        self._sequence = sequence = self._sequence + 1
        heapq.heappush(self._heap, (self.now_ns + max(delay_ns, 0), sequence, event))
        return event

    def again(self, event: Event, call: Callable[..., object], delay_ns: int) -> None:
        """As `after` with an event that has happened, to be had anew; for what happens very often."""
        event.call = call
        self._sequence = sequence = self._sequence + 1
        heapq.heappush(self._heap, (self.now_ns + delay_ns, sequence, event))

    def run(self, until_ns: int, condition: Callable[[], bool] | None = None) -> bool:
        """Run to a time, or until the condition holds (looked at after every event); return whether it does.

        It also ends, and returns True, once `is_halted` is set.

        Raises:
            SimulationError: more happens than ever should.
        """
        heap, pop = self._heap, heapq.heappop
        if self.is_halted or (condition is not None and condition()):
            return True
        while heap and heap[0][0] <= until_ns:
            self.now_ns, _, event = pop(heap)
            call = event.call
            if call is None:
                continue
            self.events += 1
            if self.events > self.events_max:
                raise SimulationError(
                    f"{self.events} events at {self.now_ns / 1e9:.3f} s: something never rests"
                )
            event.call = None
            call(*event.args)
            if self.is_halted or (condition is not None and condition()):
                return True
        self.now_ns = max(self.now_ns, until_ns)
        return condition is not None and condition()


class _Handle(asyncio.Handle):
    """What asyncio has, without what it does for debugging: thousands of them are made in every run."""

    __slots__ = ()

    def __init__(
        self,
        callback: Callable[..., object],
        args: tuple[Any, ...],
        loop: ProcessLoop,
        context: contextvars.Context | None,
    ) -> None:
        self._context = contextvars.copy_context() if context is None else context
        self._loop = loop
        self._callback = callback
        self._args = args
        self._cancelled = False
        self._repr = None
        self._source_traceback = None


class ProcessLoop(asyncio.AbstractEventLoop):
    """The event loop of one process life.

    Args:
        world: the scheduler.
        name: of the process, for messages.
        monotonic_ns: the process's own monotonic clock.
        due_ns: when that clock will read a time, in the world's time.
        on_error: told of an exception that nobody handled.
        after_turn: called after each turn.
    """

    def __init__(
        self,
        world: World,
        name: str,
        *,
        monotonic_ns: Callable[[], int],
        due_ns: Callable[[int], int],
        on_error: Callable[[str, BaseException | None], None],
        after_turn: Callable[[], None] = lambda: None,
    ) -> None:
        self.name = name
        self.is_alive = True
        self.is_frozen = False
        self.stepping = False  # a turn is under way
        self._world = world
        self._monotonic_ns = monotonic_ns
        self._due_ns = due_ns
        self._on_error = on_error
        self._after_turn = after_turn
        self._ready: deque[Any] = deque()  # handles
        self._armed = False
        self._next_turn = Event(self._turn, ())  # one at a time, used over and over
        self._tasks: set[asyncio.Task[Any]] = set()

    # ------------------------------------------------------------ life

    def kill(self) -> None:
        """Nothing of this process runs from now on."""
        self.is_alive = False
        # What is cut off in the middle is neither cancelled nor finished; keep it from the collector's reach.
        self._world.graveyard.append((list(self._tasks), list(self._ready)))
        self._tasks.clear()
        self._ready.clear()

    def freeze(self) -> None:
        """Stop the process; what is due meanwhile waits."""
        self.is_frozen = True

    def thaw(self) -> None:
        """Let the process go on."""
        self.is_frozen = False
        if self._ready:
            self._arm()

    def post(self, call: Callable[..., object], *args: Any) -> None:
        """Hand the process something from outside, such as bytes that came in."""
        if self.is_alive:
            self.call_soon(call, *args)

    def _arm(self) -> None:
        if not self._armed:
            self._armed = True
            self._world.again(self._next_turn, self._turn, TURN_NS)

    def _turn(self) -> None:
        self._armed = False
        if not self.is_alive or self.is_frozen:
            return
        ready = self._ready
        events._set_running_loop(self)
        self.stepping = True
        try:
            for _ in range(len(ready)):
                handle = ready.popleft()
                if handle._cancelled:
                    continue
                try:  # as `Handle._run` does it
                    handle._context.run(handle._callback, *handle._args)
                except (SystemExit, KeyboardInterrupt):
                    raise
                except BaseException as error:
                    self._failed(handle, error)
                if not self.is_alive:
                    return
        finally:
            self.stepping = False
            events._set_running_loop(None)
        if ready:
            self._arm()
        self._after_turn()

    def _failed(self, handle: Any, error: BaseException) -> None:
        what = format_helpers._format_callback_source(handle._callback, handle._args)
        self.call_exception_handler({"message": f"Exception in callback {what}", "exception": error})

    # ------------------------------------------------------------ what asyncio asks of a loop

    def time(self) -> float:
        return self._monotonic_ns() / 1e9

    def call_soon(
        self, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        handle = _Handle(callback, args, self, context)
        if self.is_alive:
            self._ready.append(handle)
            if not self._armed and not self.is_frozen:
                self._armed = True
                self._world.again(self._next_turn, self._turn, TURN_NS)
        return handle

    call_soon_threadsafe = call_soon

    def call_later(
        self,
        delay: float,
        callback: Callable[..., object],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        return self.call_at(self.time() + delay, callback, *args, context=context)

    def call_at(
        self,
        when: float,
        callback: Callable[..., object],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        if self.is_alive:
            # A microsecond late, so that a rounded time is never early.
            self._world.at(self._due_ns(round(when * 1e9)) + 1_000, self._due, handle)
        return handle

    def _due(self, handle: asyncio.TimerHandle) -> None:
        if self.is_alive and not handle._cancelled:
            self._ready.append(handle)
            if not self.is_frozen:
                self._arm()

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        pass

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(
        self,
        coro: Coroutine[Any, Any, Any],
        *,
        name: str | None = None,
        context: contextvars.Context | None = None,
        **_: Any,
    ) -> asyncio.Task[Any]:
        task = asyncio.Task(coro, loop=self, name=name, context=context)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)
        return task

    def _task_done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if task.cancelled():
            return
        error = task.exception()
        if isinstance(error, Crash) and not self.is_alive:
            return
        # What asyncio would tell at the task's collection, if at all, is told here and now.
        if isinstance(error, Exception) and not isinstance(error, _HANDLED):
            self._on_error("a task failed", error)

    async def _executed(self, call: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        return call(*args)

    def run_in_executor(  # type: ignore[override]
        self, executor: object, func: Callable[..., Any], *args: Any
    ) -> asyncio.Task[Any]:
        return self.create_task(self._executed(func, args))

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return self.stepping

    def is_closed(self) -> bool:
        return not self.is_alive

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        if self.is_alive:
            self._on_error(str(context.get("message")), context.get("exception"))


# Errors that somebody is to handle; everything else is a defect.
_HANDLED = (TallymarkError, DiskError, TimeoutError)
