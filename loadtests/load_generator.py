"""A heavy load from a plain asyncio process: `python loadtests/load_generator.py --host HOST:PORT`.

Runs until SIGTERM, or for `--seconds`. Writes one line of JSON a second to standard output, the `Figures` of that
second, and the last one when every call has been answered; locust starts several of these and adds their lines up.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import secrets
import signal
import sys
import time
from collections.abc import Sequence

import msgspec
from load_calls import KINDS, Caller, prepare
from load_figures import Figures, table

from tallymark import AsyncClient, TallymarkError
from tallymark_runtime.loops import new_event_loop

LINE_SECONDS = 1.0
PAUSE_SECONDS = (
    0.1  # after a failed call: a server that refuses at once isn't asked a thousand times a second
)
# How many callers of each kind one process has, at work without a pause.
CALLERS = {
    "ingest columns": 8,
    "ingest events": 4,
    "ingest one event": 8,
    "query realtime": 2,
    "query month": 1,
    "breakdown": 1,
}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--host", required=True, help="gateways, HOST:PORT, separated by commas")
    made.add_argument("--seconds", type=float, default=0.0, help="0: until SIGTERM")
    made.add_argument("--accounts", type=int, default=10_000)
    made.add_argument("--batch", type=int, default=1000, help="events in a call of columns")
    made.add_argument("--scale", type=float, default=1.0, help="of the number of callers")
    made.add_argument("--timeout", type=float, default=30.0, help="seconds for each call, retries included")
    made.add_argument("--seed", type=int, default=0, help="0: another one each time")
    made.add_argument("--table", action="store_true", help="in the end a table, and no lines of JSON")
    return made


class Generator:
    """All callers of this process."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.figures = Figures()
        self._options = options
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        """Begin no further call."""
        self._stopping.set()

    async def run(self) -> None:
        """Make calls until `stop`; return when the last has been answered."""
        options = self._options
        addresses = [address.strip() for address in options.host.split(",")]
        seed = options.seed or secrets.randbits(48)
        async with AsyncClient(addresses, timeout=options.timeout) as client:
            await prepare(client)
        async with contextlib.AsyncExitStack() as stack, asyncio.TaskGroup() as group:
            serial = 0
            for kind, count in CALLERS.items():
                # One connection for all callers of a kind, as in an application.
                client = await stack.enter_async_context(AsyncClient(addresses, timeout=options.timeout))
                for _ in range(max(1, round(count * options.scale))):
                    serial += 1
                    caller = Caller(
                        client,
                        self.figures,
                        random.Random(f"{seed}-{serial}"),
                        name=f"{seed}-{serial}",
                        accounts=options.accounts,
                        batch=options.batch,
                    )
                    group.create_task(self._repeat(caller, kind))

    async def _repeat(self, caller: Caller, kind: str) -> None:
        assert kind in KINDS
        while True:  # however short the load is: each kind of call is made
            _, error = await caller.make(kind)
            if self._stopping.is_set():
                return
            if error is not None:
                await self._pause(PAUSE_SECONDS)

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stopping.wait()

    async def lines(self) -> None:
        """Write a line a second, until `stop`."""
        while not self._stopping.is_set():
            await self._pause(LINE_SECONDS)
            if not self._stopping.is_set():
                write(self.figures.take())


def write(figures: Figures) -> None:
    """Write a line. Whoever reads them may be gone: then nobody wants them."""
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.write(msgspec.json.encode(figures).decode() + "\n")
        sys.stdout.flush()


async def main(options: argparse.Namespace) -> None:
    """Generate the load that the command line asks for."""
    generator = Generator(options)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, generator.stop)
    if options.seconds > 0:
        loop.call_later(options.seconds, generator.stop)
    begun = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        if not options.table:
            group.create_task(generator.lines())
        await generator.run()
        generator.stop()
    if options.table:
        print(table(generator.figures, time.perf_counter() - begun))
    else:
        write(generator.figures.take())


def entry(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and run."""
    options = parser().parse_args(arguments)
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        try:
            runner.run(main(options))
        except* TallymarkError as group:
            sys.exit("; ".join(str(error) for error in group.exceptions))


if __name__ == "__main__":
    entry()
