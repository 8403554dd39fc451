"""`tallymark dev`, `run`, `demo` and `bench`: the commands that start servers.

Settings come from defaults, a file, the environment and the command line, in this order (`tallymark_node.config`).
A server says on standard error what it is doing and prints one line on standard output when it serves: `ready`,
and its addresses as `name=host:port`.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from tallymark_node.cli.common import (
    STATUS_REFUSED,
    STATUS_UNAVAILABLE,
    Failure,
    current_options,
    failure,
    global_options,
)
from tallymark_protocol.limits import PARTITIONS_MAX

if TYPE_CHECKING:
    import asyncio

    from tallymark_node.config import Settings

PREPARE_NOTICE_SECONDS = 5.0  # a start from the cache is done by then
PREPARE_NOTICE = (
    "preparing the kernels: the first start compiles them, which takes a minute or two; "
    "later ones load them from a cache"
)


@click.command()
@click.option(
    "--port", type=click.IntRange(0, 65_535), help="Where to listen; 0 takes a free port. [default: 7001]"
)
@click.option("--host", help="On which address to listen. [default: 127.0.0.1]")
@click.option("--data-dir", metavar="DIR", help="Where the data lies. [default: tallymark-data]")
@click.option(
    "--partitions",
    "partition_count",
    type=click.IntRange(1, PARTITIONS_MAX),
    help="Fixed at the first start. [default: 4]",
)
@click.option(
    "--config", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="Settings, as TOML."
)
def dev(
    port: int | None, host: str | None, data_dir: str | None, partition_count: int | None, config: Path | None
) -> None:
    """Run everything in one process.

    Prints a line starting with `ready` when it serves. SIGTERM and Ctrl-C stop it; the data stays in its folder, and
    the next start goes on from there.
    """
    settings = _settings(
        config, {"port": port, "host": host, "data_dir": data_dir, "partition_count": partition_count}
    )
    _serve(settings, lambda stop: _dev(settings, Path(settings.data_dir).resolve(), stop))


@click.command()
@click.option(
    "--role", type=click.Choice(("ingest", "store", "query", "alerts")), required=True, help="What to run."
)
@click.option(
    "--config", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="Settings, as TOML."
)
def run(role: str, config: Path | None) -> None:
    """Run one role in a process of its own.

    Every setting can be given as an environment variable, too: TALLYMARK_ and its name in capitals, such as
    TALLYMARK_PORT. Prints a line starting with `ready` when it serves.
    """
    settings = _settings(config, {})
    _serve(settings, lambda stop: _role(role, settings, stop), role=role)


@click.command()
@click.option(
    "--git",
    "path",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="The repository. [default: Tallymark's own]",
)
@click.option(
    "--port", type=click.IntRange(0, 65_535), default=0, help="Where to listen. [default: a free port]"
)
@click.option("--data-dir", metavar="DIR", help="Keep the data there. [default: a temporary folder]")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Only the newest N changes.")
@global_options(at_group=False)
def demo(
    path: Path | None,
    port: int,
    data_dir: str | None,
    limit: int | None,
    server: str | None,
    as_json: bool,
    timeout: float | None,
) -> None:
    """Meter a git repository's history and show what can be asked about it.

    Every changed file of every commit is an event; authors are accounts. In a terminal the server stays up until
    Ctrl-C, for questions of your own.
    """
    options = current_options(server, as_json, timeout)
    if server is not None:
        raise click.UsageError("the demo starts a server of its own; --server isn't for it")
    from tallymark_node import demo as body
    from tallymark_protocol.errors import TallymarkError

    try:
        repository = body.repository(path)
    except TallymarkError as error:
        raise failure(error) from error
    plan = body.Plan(
        path=repository,
        port=port,
        data_dir=data_dir,
        limit=limit,
        stay=sys.stdin.isatty() and sys.stdout.isatty(),
        timeout=options.timeout,
    )
    _serve(None, lambda stop: body.run(plan, stop, _report))


@click.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def bench(arguments: tuple[str, ...]) -> None:
    """Measure throughput and latency on this machine. See `tallymark bench --help`."""
    import importlib

    sys.exit(
        importlib.import_module("tallymark_node.bench").main(list(arguments), prog_name="tallymark bench")
    )


def _report(text: str) -> None:
    click.echo(text, err=True)


def _settings(config: Path | None, overrides: dict[str, Any]) -> Settings:
    from tallymark_node.config import load, unknown_variables
    from tallymark_protocol.errors import TallymarkError

    try:
        settings = load(config, os.environ, overrides)
    except TallymarkError as error:
        raise failure(error) from error
    for warning in unknown_variables(os.environ):
        _report(f"warning: {warning}")
    return settings


def _serve(
    settings: Settings | None,
    main: Callable[[asyncio.Event], Coroutine[Any, Any, int]],
    *,
    role: str | None = None,
) -> None:
    """Run `main(stop)` until it returns and exit with its status; say in one line why it couldn't start.

    `role` says whose kernels to compile; None for everything's.
    """
    _stop_early()
    from tallymark_runtime.process import tune

    tune()
    import asyncio

    from tallymark_protocol.errors import TallymarkError
    from tallymark_runtime.disk import DiskError
    from tallymark_runtime.loops import run as run_loop

    try:
        _compile(role)
        status = run_loop(main)
    except TallymarkError as error:
        problem = failure(error)
        if problem.exit_code == STATUS_UNAVAILABLE and not error.retriable:
            # The status of a client that found no server: here it is this one that can't be, its folder in use.
            problem = Failure(problem.message, STATUS_REFUSED)
        raise problem from error
    except (DiskError, OSError) as error:
        raise Failure(_start_problem(error, settings, role), STATUS_REFUSED) from error
    except asyncio.CancelledError:
        raise Failure("stopped at once, at the second signal", 130) from None
    sys.exit(status)


def _compile(role: str | None) -> None:
    """Compile a role's kernels, or load them from the cache; say so when it takes long."""
    # Before there is an event loop, so that Ctrl-C works in the minutes that a first start may need for it.
    import threading

    notice = threading.Timer(PREPARE_NOTICE_SECONDS, _report, (PREPARE_NOTICE,))
    notice.daemon = True
    if _kernels_cached():
        notice.start()
    else:
        _report(PREPARE_NOTICE)
    try:
        if role in {None, "store"}:
            from tallymark_store import warmup

            warmup.warm_up()
        if role in {None, "ingest"}:
            from tallymark_ingest import split

            split.warm_up()
    finally:
        notice.cancel()


def _kernels_cached() -> bool:
    """Whether an earlier start has left compiled kernels of these very sources."""
    import numba

    import tallymark_protocol.kernels  # noqa: F401  # sets the folder

    folder: Any = numba.config.CACHE_DIR  # type: ignore[attr-defined]
    try:
        return any(Path(folder).rglob("*.nbi"))
    except FileNotFoundError:  # another process compiles there, too
        return False


def _stop_early() -> None:
    """Let SIGTERM and Ctrl-C end the process with status 0 while nothing has been started yet."""

    def stop(number: int, frame: object) -> NoReturn:  # noqa: ARG001
        sys.exit(0)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)


def _start_problem(error: Exception, settings: Settings | None, role: str | None) -> str:
    import errno

    number = getattr(error, "errno", None)
    where = f"{settings.host}:{settings.port}" if settings is not None else "that port"
    if number == errno.EADDRINUSE:
        way = "with --port" if role is None else "by TALLYMARK_PORT, or `port` in the file of --config"
        return f"{where} is in use: is another server running? choose another {way}, or stop that one"
    if number in {errno.EADDRNOTAVAIL, errno.EACCES} and "bind" in str(error):
        return f"can't listen on {where}: {error}"
    return f"can't start: {error}"


async def _dev(settings: Settings, data_dir: Path, stop: asyncio.Event) -> int:
    from tallymark_node import dev as node_module
    from tallymark_runtime.process import settle

    async with node_module.running(settings, _report) as node:
        settle()
        click.echo(
            f"ready gateway={node.address} query={node.query_address} store={node.store_address} "
            f"alerts={node.alerts_address} "
            f"{_telemetry(node.monitor.address)}data={data_dir}"
        )
        return await until(stop, node.failed)


async def _role(role: str, settings: Settings, stop: asyncio.Event) -> int:
    import logging

    from tallymark_node import run as role_module
    from tallymark_runtime import logs
    from tallymark_runtime.process import settle

    # From here on what is said goes through the log: it is a service's, and machines read it.
    handler = logs.configure(sys.stderr, fields={"node": settings.node_id, "role": role})
    report = logging.getLogger(f"tallymark_{role}").info
    try:
        async with role_module.running(role, settings, report) as running:
            settle()
            click.echo(f"ready {role}={running.address} {_telemetry(running.monitor.address)}".rstrip())
            return await until(stop, running.failed, report)
    finally:
        logs.remove(handler)


def _telemetry(address: str) -> str:
    return f"telemetry={address} " if address else ""


async def until(stop: asyncio.Event, failed: asyncio.Event, report: Callable[[str], object] = _report) -> int:
    """Wait until one of them is set; return the exit status: 0 if it was `stop`."""
    import asyncio

    stopped = asyncio.ensure_future(stop.wait())
    broken = asyncio.ensure_future(failed.wait())
    done = asyncio.get_running_loop().create_future()

    def end(_: object) -> None:
        if not done.done():
            done.set_result(None)

    stopped.add_done_callback(end)
    broken.add_done_callback(end)
    try:
        await done
    finally:
        stopped.cancel()
        broken.cancel()
        await asyncio.gather(stopped, broken, return_exceptions=True)
    if failed.is_set():
        report("the store failed; see above. What it has acknowledged is on disk: start it again")
        return 1
    return 0
