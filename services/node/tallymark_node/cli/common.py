"""What every command shares: global options, the connection, and how failures are told.

A command that talks to a server is an async function decorated with `client_command`; it gets the `Options` of its
invocation, returns its exit status (None for 0) and lets errors of the project's tree through, which become one
line on standard error. Exit statuses: 0 done, 1 done in part or refused by the server, 2 wrong command line, 3 no
server, or none that could answer, 4 a backup was made, and something is not in it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click

from tallymark_node.cli import parse

if TYPE_CHECKING:
    from tallymark import AsyncClient, MetricSchema, TallymarkError

DEFAULT_SERVER = "localhost:7001"
DEFAULT_TIMEOUT = 30.0  # seconds
PROBE_SECONDS = 5.0  # how long a server may take to accept a connection

STATUS_REFUSED = 1
STATUS_USAGE = 2
STATUS_UNAVAILABLE = 3
STATUS_INCOMPLETE = 4

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Options:
    """The global options of one invocation."""

    server: str = DEFAULT_SERVER  # gateways as "host:port", separated by commas
    as_json: bool = False
    timeout: float = DEFAULT_TIMEOUT  # seconds for each call, retries included

    @property
    def addresses(self) -> list[str]:
        """The gateways, one by one."""
        return [address.strip() for address in self.server.split(",") if address.strip()]


class Failure(click.ClickException):
    """An error for people: one line, and an exit status."""

    def __init__(self, message: str, status: int, *, as_json: bool = False, code: str = "") -> None:
        super().__init__(message)
        self.exit_code = status  # type: ignore[misc]  # declared as a class variable, but read from the instance
        self._as_json = as_json
        self._code = code

    def show(self, file: Any = None) -> None:
        """Print it to standard error; for `--json` as a document."""
        from tallymark_node.output import printable

        if self._as_json:
            error = {"error": {"code": self._code, "message": self.message}}
            click.echo(json.dumps(error, ensure_ascii=False), err=True, file=file)
        else:
            text = "\n".join(printable(part) for part in self.message.split("\n"))
            click.echo(f"error: {text}", err=True, file=file)


def global_options(*, at_group: bool) -> Callable[[F], F]:
    """Add the global options. A command takes them too, so that they may stand on either side of its name."""

    def decorate(function: F) -> F:
        decorators = [
            click.option(
                "--server",
                metavar="HOST:PORT",
                envvar="TALLYMARK_SERVER" if at_group else None,
                default=DEFAULT_SERVER if at_group else None,
                hidden=not at_group,
                show_default=at_group,
                help="A gateway, or several separated by commas. [env: TALLYMARK_SERVER]",
            ),
            click.option(
                "--json", "as_json", is_flag=True, default=False, hidden=not at_group, help="Print JSON."
            ),
            click.option(
                "--timeout",
                type=click.FloatRange(min=0.1, max=86_400),
                default=DEFAULT_TIMEOUT if at_group else None,
                hidden=not at_group,
                metavar="SECONDS",
                show_default=at_group,
                help="For each request, retries included.",
            ),
        ]
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


def current_options(server: str | None, as_json: bool, timeout: float | None) -> Options:
    """Combine a command's own global options with those given before it."""
    outer = click.get_current_context().find_object(Options) or Options()
    return Options(
        server=server if server is not None else outer.server,
        as_json=as_json or outer.as_json,
        timeout=timeout if timeout is not None else outer.timeout,
    )


def client_command(
    function: Callable[..., Coroutine[Any, Any, int | None]],
) -> Callable[..., None]:
    """Make a command body of an async function whose first argument is its `Options`."""

    @functools.wraps(function)
    def run(server: str | None, as_json: bool, timeout: float | None, **arguments: Any) -> None:
        options = current_options(server, as_json, timeout)
        status = execute(options, lambda: function(options, **arguments))
        if status:
            click.get_current_context().exit(status)

    return global_options(at_group=False)(run)


def execute(options: Options, make: Callable[[], Coroutine[Any, Any, int | None]]) -> int | None:
    """Run a coroutine and return its status; errors of the project's tree become a `Failure`."""
    import asyncio

    from tallymark_protocol.errors import TallymarkError

    try:
        return asyncio.run(make())
    except TallymarkError as error:
        raise failure(error, as_json=options.as_json) from error
    except BrokenPipeError:
        # Whoever read our output has seen enough, as with `| head`.
        import os
        import sys

        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def failure(error: TallymarkError, *, as_json: bool = False, more: str = "") -> Failure:
    """Say an error of the project's tree to people, with `more` on further lines."""
    from tallymark_protocol.errors import (
        BackpressureError,
        ErrorCode,
        InvalidRequestError,
        OutcomeUnknownError,
        UnavailableError,
    )

    status = STATUS_REFUSED
    if isinstance(error, InvalidRequestError):
        status = STATUS_USAGE
    elif isinstance(error, UnavailableError | BackpressureError | OutcomeUnknownError):
        status = STATUS_UNAVAILABLE
    try:
        code = ErrorCode(error.code).name.lower()
    except ValueError:
        code = str(error.code)
    return Failure(f"{error}\n{more}" if more else str(error), status, as_json=as_json, code=code)


@asynccontextmanager
async def connected(options: Options) -> AsyncIterator[AsyncClient]:
    """Connect to the server.

    Raises:
        Failure: nobody answers there; said at once, whatever the timeout.
        UnavailableError: somebody does, but not as a Tallymark server does.
    """
    from tallymark import AsyncClient

    await probe(options)
    client = AsyncClient(options.addresses, timeout=options.timeout)
    await client.connect()
    try:
        yield client
    finally:
        await client.close()


async def probe(options: Options) -> None:
    """Find out whether anybody answers. Raises what `connected` does, but UnavailableError."""
    # The SDK goes on trying until its timeout, as an application wants it. A person at a terminal wants to know.
    import asyncio

    from tallymark_protocol.errors import InvalidRequestError

    if not options.addresses:
        raise InvalidRequestError("--server is empty: write HOST:PORT")
    for address in options.addresses:
        host, colon, port = address.rpartition(":")
        if not colon or not host or not port.isdecimal() or int(port) > 65_535:
            raise InvalidRequestError(f"{address!r} is no address: write HOST:PORT, such as {DEFAULT_SERVER}")
        try:
            async with asyncio.timeout(min(PROBE_SECONDS, options.timeout)):
                _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
        except (OSError, TimeoutError):
            continue
        writer.close()
        return
    shown = " or ".join(options.addresses)
    raise Failure(
        f"no Tallymark server answers at {shown}; start one with `tallymark dev`",
        STATUS_UNAVAILABLE,
        as_json=options.as_json,
        code="unavailable",
    )


async def metric(client: AsyncClient, code: str) -> MetricSchema:
    """Return a metric's schema.

    Raises:
        NotFoundError: there is none; the message names what may have been meant.
    """
    from tallymark_protocol.errors import ErrorCode, NotFoundError

    schemas = await client.metrics.list()
    for schema in schemas:
        if schema.code == code:
            return schema
    hint = parse.closest(code, [schema.code for schema in schemas])
    raise NotFoundError(f"no metric has the code {code!r:.80}{hint}", code=ErrorCode.UNKNOWN_METRIC)


class Account(click.ParamType[int]):
    """An account id on the command line."""

    name = "account"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Read it."""
        from tallymark_protocol.errors import InvalidRequestError

        if isinstance(value, int):
            return value
        try:
            return parse.account(value)
        except InvalidRequestError as error:
            self.fail(error.message, param, ctx)


class Instant(click.ParamType[int]):
    """An instant on the command line, as nanoseconds since the Unix epoch."""

    name = "when"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Read it."""
        from tallymark_protocol.errors import InvalidRequestError

        if isinstance(value, int):
            return value
        try:
            return parse.instant_ns(value)
        except InvalidRequestError as error:
            self.fail(error.message, param, ctx)


ACCOUNT = Account()
INSTANT = Instant()
