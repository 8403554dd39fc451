"""`tallymark ingest`: loading a file, with progress, and with a file of the rows that were rejected."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import click

from tallymark_node.cli.common import (
    STATUS_REFUSED,
    Options,
    client_command,
    connected,
    failure,
    metric,
)

if TYPE_CHECKING:
    from tallymark import AsyncClient, MetricSchema
    from tallymark_node.ingest_file import Columns, CsvReader, JsonReader, Rejects, Tally

FORMATS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
}
BATCH_ROWS = 2_000
IN_FLIGHT = 8
_PLAIN_SECONDS = 5  # between two lines of progress where there is no terminal

EPILOG = """\b
Examples:
  tallymark ingest usage.csv --metric api_calls --account customer --time at
  tallymark ingest usage.jsonl.gz --metric-column metric --account account_id \\
      --value usage.seconds --scaled --time ts --time-unit ms --id event_id --property region
"""


@click.command(epilog=EPILOG)
@click.argument("file")
@click.option("--format", "form", type=click.Choice(("csv", "jsonl")), help="[default: by the file's name]")
@click.option(
    "--delimiter", default=None, help="Between a CSV file's columns. [default: a comma; a tab for .tsv]"
)
@click.option("--metric", "code", metavar="METRIC", help="The metric of all rows.")
@click.option("--metric-column", metavar="COLUMN", help="The column that names each row's metric.")
@click.option("--account", default="account_id", show_default=True, metavar="COLUMN", help="Account ids.")
@click.option("--value", metavar="COLUMN", help="Values; without it every row's value is 1.")
@click.option(
    "--scaled", "--scale", "scaled", is_flag=True, help="Values are decimals (stored times 1,000,000)."
)
@click.option("--time", metavar="COLUMN", help="Event times; without it, the time of loading.")
@click.option(
    "--time-unit",
    type=click.Choice(("s", "ms", "us", "ns", "iso")),
    help="Of numeric times. [default: ISO 8601 and Unix seconds; times without a zone are UTC]",
)
@click.option("--id", "id_column", metavar="COLUMN", help="Event ids, unique per account and metric.")
@click.option("--operation", metavar="COLUMN", help="add or remove, for count_unique metrics.")
@click.option(
    "--property",
    "-p",
    "properties",
    multiple=True,
    metavar="[KEY=]COLUMN",
    help="A property; may be repeated.",
)
@click.option("--source", default="", help="Tells rows without an id from the same rows of other files.")
@click.option(
    "--rejects",
    "rejects_path",
    metavar="FILE",
    help="Where rejected rows go. [default: beside it: usage.rejects.csv for usage.csv]",
)
@click.option(
    "--batch",
    type=click.IntRange(1, 100_000),
    default=BATCH_ROWS,
    show_default=True,
    metavar="N",
    help="Rows in a request.",
)
@click.option(
    "--in-flight",
    type=click.IntRange(1, 256),
    metavar="N",
    help=f"Requests at once. [default: {IN_FLIGHT}; 1 for latest and count_unique, where the order of rows counts]",
)
@client_command
async def ingest(
    options: Options,
    file: str,
    form: str | None,
    delimiter: str | None,
    code: str | None,
    metric_column: str | None,
    account: str,
    value: str | None,
    scaled: bool,
    time: str | None,
    time_unit: str | None,
    id_column: str | None,
    operation: str | None,
    properties: tuple[str, ...],
    source: str,
    rejects_path: str | None,
    batch: int,
    in_flight: int | None,
) -> int | None:
    """Load FILE: CSV with a header line, or one JSON object a line; gzipped or not; - for standard input.

    It is safe to run again, after an interruption as well as after the file has grown: what is stored is
    recognised and not counted twice. Rows are known by --id, or else by their content: the second of two identical
    rows of a file counts, but the same row in two files counts once, so give an id column or --source where
    different files may hold the same rows. The server remembers ids for 35 days.

    Empty cells and nulls are missing properties. Rows that can't be stored are written to a CSV file with their
    line and the reason (rejected_line, rejected_reason); the others are stored. Correct the rows in that file and
    load it with the same options: these two columns don't count as content. (Without --id, a row that has become
    equal to one that is stored counts as that one; it shows under "stored before".) Exit status 0: all rows are stored; 1: some were rejected.
    """
    from tallymark_node.ingest_file import Columns, Converter, RowIds, Tally

    if (code is None) == (metric_column is None):
        raise click.UsageError("give the rows' metric: --metric METRIC, or --metric-column COLUMN")
    if time_unit is not None and time is None:
        raise click.UsageError("--time-unit says how to read --time: give that, too")
    columns = Columns(
        account=account,
        metric=code,
        metric_column=metric_column,
        value=value,
        time=time,
        time_unit=time_unit,
        id=id_column,
        operation=operation,
        properties=_properties(properties),
        scaled=scaled,
        source=source,
    )
    rejects_to = rejects_path or _rejects_path(file)
    tally = Tally()
    ids = RowIds(source)
    with _opened(file) as raw:
        reader, rejects = _reader(raw, file, form, delimiter, columns, rejects_to)
        try:
            async with connected(options) as client:
                schemas = await _schemas(client, columns)
                flights = in_flight or (1 if _order_counts(schemas, columns) else IN_FLIGHT)
                converter = Converter(columns, schemas, ids)
                seconds = await _load(client, reader, converter, rejects, tally, batch, flights, raw, options)
        finally:
            rejects.close()
            ids.close()
    if rejects.count == 0:
        rejects.remove_stale()
    _report(options, tally, rejects, seconds, derived=id_column is None)
    return STATUS_REFUSED if tally.rejected else None


def _properties(items: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    found: dict[str, str] = {}
    for item in items:
        key, equals, column = item.partition("=")
        if not key or (equals and not column):
            raise click.BadParameter(
                f"{item!r:.80} must be of the form COLUMN or KEY=COLUMN", param_hint="--property"
            )
        if key in found:
            raise click.BadParameter(f"property {key!r:.80} is given twice", param_hint="--property")
        found[key] = column or key
    return tuple(found.items())


def _bare(file: str) -> tuple[str, str]:
    """Split a file's name from its ending, leaving .gz out: `a/usage.csv.gz` gives `a/usage` and `.csv`."""
    stem, ending = os.path.splitext(file)  # noqa: PTH122  # "-" is no path
    if ending.lower() == ".gz":
        stem, ending = os.path.splitext(stem)  # noqa: PTH122
    return stem, ending.lower()


def _rejects_path(file: str) -> str:
    return "rejects.csv" if file == "-" else f"{_bare(file)[0]}.rejects.csv"


@contextmanager
def _opened(file: str) -> Iterator[Any]:
    if file == "-":
        stdin = sys.stdin.buffer
        yield stdin if hasattr(stdin, "peek") else io.BufferedReader(cast("io.RawIOBase", stdin))
        return
    try:
        raw = open(file, "rb")  # noqa: SIM115
    except OSError as error:
        raise click.BadParameter(f"can't read {file}: {error.strerror}", param_hint="FILE") from None
    with raw:
        yield raw


def _reader(
    raw: Any, file: str, form: str | None, delimiter: str | None, columns: Columns, rejects_to: str
) -> tuple[CsvReader | JsonReader, Rejects]:
    from tallymark_node.ingest_file import (
        CsvReader,
        JsonReader,
        Rejects,
        is_rejected_json,
        is_rejects_file,
        open_stream,
    )

    ending = _bare(file)[1]
    chosen = form or FORMATS.get(ending)
    if chosen is None:
        raise click.UsageError(
            f"the name {file!r:.80} doesn't tell the format: give --format csv or --format jsonl"
        )
    if os.path.exists(rejects_to) and file != "-" and os.path.samefile(rejects_to, file):  # noqa: PTH110, PTH121
        raise click.UsageError("--rejects is the file to load itself: give another")
    stream: BinaryIO = open_stream(raw)
    rejected_json = is_rejected_json(stream, columns)
    if rejected_json or chosen == "jsonl":
        if delimiter is not None:
            raise click.UsageError("--delimiter is for CSV files")
        return JsonReader(stream, columns, rejected=rejected_json), Rejects(rejects_to, JsonReader.header)
    separator = {"\\t": "\t", "tab": "\t", None: "\t" if ending == ".tsv" else ","}.get(delimiter, delimiter)
    if separator is None or len(separator) != 1 or separator in '"\r\n':
        raise click.BadParameter("must be one character", param_hint="--delimiter")
    if is_rejects_file(stream):
        separator = ","  # so that it loads with the options of the file that its rows are from
    reader = CsvReader(stream, columns, separator)
    return reader, Rejects(rejects_to, reader.header)


async def _schemas(client: AsyncClient, columns: Columns) -> dict[str, MetricSchema]:
    from tallymark import AggType

    if columns.metric is None:
        return {schema.code: schema for schema in await client.metrics.list()}
    schema = await metric(client, columns.metric)
    name = schema.agg_type.name.lower().replace("_", " ")
    if columns.value is None and schema.agg_type is not AggType.COUNT:
        raise click.UsageError(
            f"metric {schema.code} is a {name}: name the column of its values with --value"
        )
    if columns.scaled and schema.agg_type in {AggType.COUNT, AggType.COUNT_UNIQUE}:
        raise click.UsageError(
            f"metric {schema.code} is a {name}, whose values have no decimals: leave --scaled out"
        )
    return {schema.code: schema}


def _order_counts(schemas: dict[str, MetricSchema], columns: Columns) -> bool:
    from tallymark import AggType

    ordered = {AggType.LATEST, AggType.COUNT_UNIQUE}
    concerned = schemas.values() if columns.metric is None else [schemas[columns.metric]]
    return any(schema.agg_type in ordered for schema in concerned)


async def _load(
    client: AsyncClient,
    reader: CsvReader | JsonReader,
    converter: Any,
    rejects: Rejects,
    tally: Tally,
    batch: int,
    in_flight: int,
    raw: Any,
    options: Options,
) -> float:
    """Load, show progress on standard error, and return how many seconds it took."""
    import asyncio

    from tallymark import TallymarkError
    from tallymark_node.ingest_file import load
    from tallymark_runtime.clock import RealClock

    clock = RealClock()
    started = clock.monotonic_ns()
    again = "run the same command again to go on: what is stored isn't counted twice"
    with _Progress(raw, tally, clock) as progress:
        try:
            await load(
                client,
                reader,
                converter,
                rejects,
                tally=tally,
                batch_rows=batch,
                in_flight=in_flight,
                on_progress=progress.update,
            )
        except TallymarkError as error:
            more = f"{tally.settled:,} rows are settled; {again}"
            raise failure(error, as_json=options.as_json, more=more) from error
        except asyncio.CancelledError:
            progress.stop()
            click.echo(f"stopped after {tally.settled:,} rows; {again}", err=True)
            raise
    return (clock.monotonic_ns() - started) / 1e9


class _Progress:
    """Rows, rate and outcomes on standard error: a bar in a terminal, now and then a line elsewhere."""

    def __init__(self, raw: Any, tally: Tally, clock: Any) -> None:
        self._raw = raw
        self._tally = tally
        self._clock = clock
        self._started = clock.monotonic_ns()
        self._told = self._started
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
            )
            self._task = self._bar.add_task(self._text(0.0), total=self._size())
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def update(self) -> None:
        """Show how far it is."""
        now = self._clock.monotonic_ns()
        text = self._text((now - self._started) / 1e9)
        if self._bar is not None:
            self._bar.update(self._task, completed=self._position(), description=text)
        elif now - self._told >= _PLAIN_SECONDS * 10**9:
            self._told = now
            click.echo(text, err=True)

    def _size(self) -> int | None:
        try:
            return os.fstat(self._raw.fileno()).st_size or None
        except (OSError, ValueError):
            return None

    def _position(self) -> int:
        try:
            return int(self._raw.tell())
        except (OSError, ValueError):
            return 0

    def _text(self, seconds: float) -> str:
        tally = self._tally
        rate = tally.settled / seconds if seconds > 0 else 0.0
        return (
            f"{tally.settled:,} rows, {rate:,.0f}/s: {tally.stored:,} stored, "
            f"{tally.duplicates:,} stored before, {tally.rejected:,} rejected"
        )


def _report(options: Options, tally: Tally, rejects: Rejects, seconds: float, *, derived: bool) -> None:
    from tallymark_node import output

    rate = tally.rows / seconds if seconds > 0 else 0.0
    if options.as_json:
        output.document(
            {
                "rows": tally.rows,
                "stored": tally.stored,
                "duplicates": tally.duplicates,
                "rejected": tally.rejected,
                "rejects_file": rejects.path if rejects.count else None,
                "seconds": round(seconds, 3),
                "rows_per_second": round(rate),
            }
        )
        return
    output.facts(
        [
            ("rows", f"{tally.rows:,} in {seconds:.1f} s ({rate:,.0f}/s)"),
            ("stored", f"{tally.stored:,}"),
            ("stored before", f"{tally.duplicates:,}" + (_derived_hint(tally) if derived else "")),
            ("rejected", f"{tally.rejected:,}" + (f", see {rejects.path}" if rejects.count else "")),
        ]
    )
    for line, reason in rejects.first:
        output.line(f"  line {line}: {output.printable(reason)}")
    if rejects.count > len(rejects.first):
        output.line(f"  and {rejects.count - len(rejects.first):,} more")


def _derived_hint(tally: Tally) -> str:
    return " (rows of the same content; see --source)" if tally.duplicates else ""
