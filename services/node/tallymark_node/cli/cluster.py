"""`tallymark cluster`: where copies lie, and moving them.

A change is a call to any gateway, which plans it and writes it as a wish; then the command looks on, by asking for
the cluster's status, until the fact is what was wished. Whoever interrupts it stops looking, nothing else.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import click

from tallymark_node.cli.common import STATUS_REFUSED, Options, client_command, failure, probe

if TYPE_CHECKING:
    from collections.abc import Collection

    from tallymark_protocol.messages import Call, ClusterChange, ClusterInfo, PartitionInfo, StoreInfo

POLL_SECONDS = 0.5
STUCK_POLLS = 4  # looks in a row at which only stores that are down are waited for
PARTITIONS_NAMED = 5  # of those that something is said of


@click.group()
def cluster() -> None:
    """Look at the cluster's stores, and move copies and leaderships between them."""


def _waiting(function: Callable[..., Any]) -> Callable[..., Any]:
    function = click.option(
        "--within",
        type=click.FloatRange(min=0.0),
        metavar="SECONDS",
        help="Stop looking on after this time, with exit status 1.",
    )(function)
    return click.option(
        "--wait/--no-wait", default=True, show_default=True, help="Look on until everything is in its place."
    )(function)


@cluster.command()
@click.option("--check", is_flag=True, help="Exit with status 1 unless everything is as it is wished.")
@client_command
async def status(options: Options, check: bool) -> int | None:
    """Show stores and partitions: who leads, who holds a copy, what is on its way."""
    from tallymark_node import output

    async with _gateway(options) as gateway:
        info = await gateway.status()
    if options.as_json:
        output.document(info_json(info))
    else:
        _show(info)
    return STATUS_REFUSED if check and not _is_settled(info) else None


@cluster.command()
@click.argument("node")
@_waiting
@client_command
async def drain(options: Options, node: str, wait: bool, within: float | None) -> int | None:
    """Move every copy off the store NODE, and give it no more.

    When the command is done, the store holds nothing and can be stopped. `undrain` makes it a store like others again.
    """
    from tallymark_protocol.messages import ClusterDrain

    return await _change(options, ClusterDrain(node), wait=wait, within=within, done=f"{node} is empty")


@cluster.command()
@click.argument("node")
@client_command
async def undrain(options: Options, node: str) -> int | None:
    """Let the store NODE be given copies again; `rebalance` gives it its share."""
    from tallymark_protocol.messages import ClusterDrain

    done = f"{node} may be given copies; `tallymark cluster rebalance` gives it its share"
    return await _change(options, ClusterDrain(node, undo=True), wait=False, within=None, done=done)


@cluster.command()
@click.option(
    "--copies",
    type=click.IntRange(min=1),
    help="Change how many copies each partition has. [default: as many]",
)
@_waiting
@client_command
async def rebalance(options: Options, copies: int | None, wait: bool, within: float | None) -> int | None:
    """Spread copies and leaderships evenly over the stores, with as few moves as possible.

    A new store gets its share by this. What a store that is down holds stays there: see `replace`.
    """
    from tallymark_protocol.messages import ClusterRebalance

    call = ClusterRebalance(copies or 0)
    return await _change(options, call, wait=wait, within=within, done="the cluster is balanced")


@cluster.command()
@click.argument("node")
@click.option("--with", "successor", default="", metavar="NODE", help="The store that takes the copies.")
@_waiting
@client_command
async def replace(
    options: Options, node: str, successor: str, wait: bool, within: float | None
) -> int | None:
    """Move the copies of the store NODE, which may be gone for good, to another, or to those that have the fewest.

    The store is given nothing more, should it come back, until `undrain`.
    """
    from tallymark_protocol.messages import ClusterReplace

    call = ClusterReplace(node, successor)
    return await _change(options, call, wait=wait, within=within, done=f"{node} is replaced")


@cluster.command()
@click.option("--yes", "-y", is_flag=True, help="Don't ask.")
@client_command
async def recover(options: Options, yes: bool) -> int | None:
    """Raise the epoch base, after etcd was restored from a backup and before the stores are started.

    What etcd forgot must not be given out a second time: with the base raised, epochs and the numbers of metrics go
    on above everything that was ever given. Metrics that were made after the backup must be created again.
    """
    from tallymark_node import output
    from tallymark_protocol.messages import ClusterChange, ClusterRecover

    if not yes and sys.stdin.isatty():
        click.confirm("Was etcd's state restored from a backup?", abort=True, err=True)
    async with _gateway(options) as gateway:
        change = await gateway.call(ClusterRecover(), ClusterChange)
    if options.as_json:
        output.document({"epoch_base": change.epoch_base})
    else:
        output.line(f"epochs now count from {change.epoch_base}; start the stores")
    return None


# --- the gateway ---------------------------------------------------------------------------------------------


class _Gateway:
    """The gateways of an invocation: each call goes to the first that answers."""

    def __init__(self, options: Options, peers: list[Any]) -> None:
        self._options = options
        self._peers = peers

    async def call(self, call: Call, kind: type[Any]) -> Any:
        """Make a call, again at other gateways where one is away, or says that it may pass.

        All of these calls may be repeated: a change that was made already is none.
        """
        import asyncio

        from tallymark_protocol.errors import ErrorCode, InvalidRequestError, TallymarkError

        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._options.timeout
        told: TallymarkError | None = None  # by a gateway, rather than by nobody's answer
        while True:
            for peer in list(self._peers):
                left = deadline - loop.time()
                try:
                    return await peer.call(call, kind, timeout_s=max(left, 0.001))
                except InvalidRequestError as error:
                    # The command line was read and sent; what is wrong with it, the gateway found.
                    refused = failure(error, as_json=self._options.as_json)
                    refused.exit_code = STATUS_REFUSED  # type: ignore[misc]
                    raise refused from error
                except TallymarkError as error:
                    silent = error.code in {ErrorCode.CLOSED, ErrorCode.TIMEOUT}
                    if not silent:
                        told = error
                    if not (silent or error.retriable) or loop.time() + POLL_SECONDS >= deadline:
                        raise (told or error) from error
                self._peers.append(self._peers.pop(0))
            await asyncio.sleep(POLL_SECONDS)

    async def status(self) -> ClusterInfo:
        """Ask for the cluster's status."""
        from tallymark_protocol.messages import ClusterInfo, ClusterStatus

        info = await self.call(ClusterStatus(), ClusterInfo)
        assert isinstance(info, ClusterInfo)
        return info


@asynccontextmanager
async def _gateway(options: Options) -> AsyncIterator[_Gateway]:
    from tallymark_runtime.peer import PeerClient
    from tallymark_runtime.randomness import new_random

    await probe(options)
    peers = [PeerClient(address, rng=new_random(), software="tallymark-cli") for address in options.addresses]
    try:
        yield _Gateway(options, peers)
    finally:
        for peer in peers:
            await peer.close()


# --- changes -------------------------------------------------------------------------------------------------


async def _change(options: Options, call: Call, *, wait: bool, within: float | None, done: str) -> int | None:
    """Make a change, look on until it is carried out, and say so; return the exit status."""
    from tallymark_node import output
    from tallymark_protocol.messages import ClusterChange

    async with _gateway(options) as gateway:
        change = await gateway.call(call, ClusterChange)
        if not options.as_json:
            output.line(_plan_text(change))
        unfinished = await _watch(gateway, within) if wait else ""
        info = await gateway.status() if options.as_json else None
    if info is not None:
        output.document({**change_json(change), "waited": wait, "unfinished": unfinished, **info_json(info)})
    elif unfinished:
        click.echo(f"not finished: {unfinished}", err=True)
    elif wait or not change.moves:
        output.line(done)
    else:
        output.line("`tallymark cluster status` shows how far it is")
    return STATUS_REFUSED if unfinished else None


async def _watch(gateway: _Gateway, within: float | None) -> str:
    """Look on until everything is in its place; return what is not, where that can't be waited for."""
    import asyncio

    loop = asyncio.get_running_loop()
    until = None if within is None else loop.time() + within
    stuck = 0
    with _Progress() as progress:
        while True:
            info = await gateway.status()
            progress.update(remaining(info))
            if _is_settled(info):
                return ""
            waits = [item for item in info.partitions if not item.is_settled]
            away = blockers(info)
            stuck = stuck + 1 if away else 0
            if stuck >= STUCK_POLLS:
                return f"{_partitions(waits)}: {', '.join(away)} must be up first"
            if until is not None and loop.time() + POLL_SECONDS > until:
                return _partitions(waits)
            await asyncio.sleep(POLL_SECONDS)


def remaining(info: ClusterInfo) -> tuple[int, int]:
    """How many copies and how many leaderships are not where they shall be."""
    copies = leaders = 0
    for item in info.partitions:
        missing = set(item.wished) - set(item.members)
        extra = set(item.members) - set(item.wished)
        copies += max(len(missing), len(extra))
        leaders += not item.leader or item.leader != item.wished[0]
    return copies, leaders


def blockers(info: ClusterInfo) -> list[str]:
    """The stores that are down and without which nothing more can be done; none where something else can."""
    down = {store.node_id for store in info.stores if not store.is_up}
    found: set[str] = set()
    for item in info.partitions:
        if item.is_settled:
            continue
        needed = set(item.wished) - set(item.members)
        if not needed and item.members and sorted(item.members) == sorted(item.wished):
            needed = {item.wished[0]} if item.leader else set(item.members)
        if not needed & down:
            return []
        found |= needed & down
    return sorted(found)


class _Progress:
    """What remains, on standard error: a bar in a terminal, a line whenever it changes elsewhere."""

    def __init__(self) -> None:
        self._total = 0
        self._told: tuple[int, int] | None = None
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> _Progress:
        if sys.stderr.isatty():
            from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

            from tallymark_node.output import console

            self._bar = Progress(
                SpinnerColumn(),
                BarColumn(),
                TextColumn("{task.description}"),
                TimeElapsedColumn(),
                console=console(stderr=True),
                transient=True,
            )
            self._task = self._bar.add_task("", total=None)
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, left: tuple[int, int]) -> None:
        """Show what remains."""
        self._total = max(self._total, sum(left))
        text = f"{left[0]:,} copies and {left[1]:,} leaderships to move"
        if self._bar is not None:
            moved = self._total - sum(left)
            self._bar.update(self._task, total=self._total or 1, completed=moved, description=text)
        elif left != self._told:
            click.echo(text, err=True)
        self._told = left


# --- showing -------------------------------------------------------------------------------------------------


def _is_settled(info: ClusterInfo) -> bool:
    return all(item.is_settled for item in info.partitions)


def _partitions(items: list[PartitionInfo]) -> str:
    numbers = ", ".join(str(item.partition) for item in items[:PARTITIONS_NAMED])
    more = f" and {len(items) - PARTITIONS_NAMED} more" if len(items) > PARTITIONS_NAMED else ""
    return f"partition{'s' if len(items) > 1 else ''} {numbers}{more}"


def _plan_text(change: ClusterChange) -> str:
    if not change.moves and not change.leaders:
        return "nothing needs to move"
    sources = {source for _, source, _ in change.moves if source}
    targets = {target for _, _, target in change.moves if target}
    text = f"{len(change.moves):,} copies move"
    if sources:
        text += f" from {', '.join(sorted(sources))}"
    if targets:
        text += f" to {', '.join(sorted(targets))}"
    return f"{text}; {len(change.leaders):,} partitions get another preferred leader"


def store_state(store: StoreInfo) -> str:
    """Say in a word or two how a store is."""
    if not store.is_up:
        state = "down"
    elif store.error:
        state = "silent"
    else:
        state = "full" if store.is_full else "up"
    if store.is_draining:
        state += ", draining" if store.wished or store.held else ", drained"
    return state


def _away(info: ClusterInfo) -> set[str]:
    """The stores whose copies nobody can count on now."""
    return {store.node_id for store in info.stores if not store.is_up or store.error}


def partition_state(item: PartitionInfo, away: Collection[str] = ()) -> str:
    """Say in a few words how a partition is, while the stores `away` are down or silent."""
    words = []
    copies = item.members or item.wished
    down = sorted(name for name in copies if name in away)
    up = len(copies) - len(down)
    if not item.leader:
        words.append("no leader")
    # Without a majority there is no leader, and the gateway says why.
    if down and up > len(copies) // 2:
        words.append(f"{up} of {len(copies)} copies; down: {', '.join(down)}")
    if item.members:
        words += [f"+{name}" for name in item.wished if name not in item.members]
        words += [f"-{name}" for name in item.members if name not in item.wished]
    if item.leader and item.is_placed and not item.is_settled and item.wished[0] not in away:
        words.append(f"leader moves to {item.wished[0]}")
    if item.error:
        words.append(item.error)
    return ", ".join(words) or "ok"


def _show(info: ClusterInfo) -> None:
    from tallymark_node import output

    output.table(
        ("store", "zone", "state", "address", "copies", "wished", "leads", "log MB", "error"),
        [
            (
                store.node_id,
                store.zone,
                store_state(store),
                store.address or output.NOTHING,
                output.number(store.held),
                output.number(store.wished),
                output.number(store.led),
                output.number(store.log_bytes // 10**6) if store.is_up else output.NOTHING,
                store.error,
            )
            for store in info.stores
        ],
        title=f"Stores ({info.replication_factor} copies of each partition)",
        numbers={4, 5, 6, 7},
    )
    output.line()
    away = _away(info)
    output.table(
        ("partition", "leader", "members", "epoch", "log end", "committed", "lag", "state"),
        [
            (
                str(item.partition),
                item.leader or output.NOTHING,
                " ".join(item.members) or output.NOTHING,
                str(item.epoch) if item.epoch else output.NOTHING,
                output.number(item.log_end),
                output.number(item.high_watermark),
                output.number(max(item.lags.values(), default=0)),
                partition_state(item, away),
            )
            for item in info.partitions
        ],
        title="Partitions",
        numbers={0, 3, 4, 5, 6},
    )


def info_json(info: ClusterInfo) -> dict[str, Any]:
    """Write a cluster's status for JSON."""
    from msgspec.structs import asdict

    copies, leaders = remaining(info)
    away = _away(info)
    return {
        "is_settled": _is_settled(info),
        "copies_to_move": copies,
        "leaderships_to_move": leaders,
        "replication_factor": info.replication_factor,
        "epoch_base": info.epoch_base,
        "stores": [{**asdict(store), "state": store_state(store)} for store in info.stores],
        "partitions": [
            {**asdict(item), "is_settled": item.is_settled, "state": partition_state(item, away)}
            for item in info.partitions
        ],
    }


def change_json(change: ClusterChange) -> dict[str, Any]:
    """Write what a change moves for JSON."""
    return {
        "moves": [{"partition": p, "from": a or None, "to": b or None} for p, a, b in change.moves],
        "preferred_leaders": [{"partition": p, "from": a, "to": b} for p, a, b in change.leaders],
    }
