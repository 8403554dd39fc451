"""`tallymark metrics`: create, list, update and delete what is counted."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from tallymark_node.cli import parse
from tallymark_node.cli.common import Options, client_command, connected, metric

if TYPE_CHECKING:
    from tallymark import MetricSchema

AGGREGATIONS = ("count", "sum", "max", "latest", "count_unique")
PERIODS = {
    "30-days": "FIXED_30_DAYS",
    "calendar": "CALENDAR",
    "day": "DAY",
    "year": "YEAR",
    "lifetime": "LIFETIME",
}
UNIQUE_TYPES = ("uint64", "int64", "string")


class _Retention(click.ParamType[int]):
    """Days, or 0 for ever."""

    name = "retention"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Parse what was given."""
        return 0 if value == "forever" else int(click.IntRange(1).convert(value, param, ctx))


RETENTION = _Retention()


@click.group()
def metrics() -> None:
    """Create, list, update and delete metrics: what is counted, and how."""


_dimension_help = (
    "A property to filter and group by: KEY takes any value, KEY=A,B tells these apart. May be repeated."
)
_threshold_help = (
    "Raise an alert when a billing period's total reaches VALUE; with :recurring at every further multiple, too. "
    "May be repeated."
)


@metrics.command()
@click.argument("code")
@click.option(
    "--agg",
    type=click.Choice(AGGREGATIONS, case_sensitive=False),
    default="count",
    show_default=True,
    help="How a period's events become one number.",
)
@click.option(
    "--period",
    type=click.Choice(list(PERIODS), case_sensitive=False),
    default="30-days",
    show_default=True,
    help="The billing period.",
)
@click.option(
    "--cycle-day", type=click.IntRange(1, 28), help="With --period calendar: the day on which months start."
)
@click.option("--zone", default="UTC", show_default=True, help="The IANA time zone of periods and days.")
@click.option("--dimension", "-d", "dimension", multiple=True, metavar="KEY[=A,B]", help=_dimension_help)
@click.option("--threshold", multiple=True, metavar="CODE=VALUE[:recurring]", help=_threshold_help)
@click.option(
    "--grace", metavar="DURATION", help="How long after a period's end late events still count: 3d."
)
@click.option(
    "--unique",
    type=click.Choice(UNIQUE_TYPES, case_sensitive=False),
    help="With --agg count_unique: what its values are. [default: uint64]",
)
@click.option(
    "--retain-raw-days",
    type=click.IntRange(1),
    metavar="DAYS",
    help="Drop raw events that are older than this, but never totals. [default: keep them for ever]",
)
@click.option("--description", default="", help="For people.")
@click.option("--scaled", is_flag=True, help="Thresholds are given in units with up to six decimals.")
@client_command
async def create(
    options: Options,
    code: str,
    agg: str,
    period: str,
    cycle_day: int | None,
    zone: str,
    dimension: tuple[str, ...],
    threshold: tuple[str, ...],
    grace: str | None,
    unique: str | None,
    retain_raw_days: int | None,
    description: str,
    scaled: bool,
) -> int | None:
    """Create the metric CODE.

    Creating one again with the very same schema does nothing; with another it is an error.
    """
    from tallymark import AggType, AlreadyExistsError, MetricSchema, PeriodType, UniqueType

    schema = MetricSchema(
        code=code,
        agg_type=AggType[agg.upper()],
        filters=parse.dimensions(dimension),
        thresholds=parse.thresholds(threshold, scaled=scaled),
        period_type=PeriodType[PERIODS[period]],
        billing_cycle_day=1 if cycle_day is None else cycle_day,
        time_zone=zone,
        unique_type=UniqueType[(unique or "uint64").upper()],
        grace_seconds=None if grace is None else parse.duration_seconds(grace),
        description=description,
        retain_raw_days=retain_raw_days,
    )
    async with connected(options) as client:
        try:
            made = await client.metrics.create(schema)
        except AlreadyExistsError as error:
            if not error.identical:
                raise
            made = schema
            _report(options, made, f"metric {code} exists already, with this very schema")
            return None
    _report(options, made, f"created metric {code}")
    return None


@metrics.command(name="list")
@click.option("--scaled", is_flag=True, help="Show thresholds in units.")
@client_command
async def list_metrics(options: Options, scaled: bool) -> int | None:
    """List all metrics."""
    from tallymark_node import output

    async with connected(options) as client:
        schemas = await client.metrics.list()
    if options.as_json:
        output.document([schema_json(schema) for schema in schemas])
        return None
    if not schemas:
        output.line("there are no metrics yet; create one with `tallymark metrics create CODE`")
        return None
    output.table(
        ("metric", "counts", "period", "dimensions", "thresholds", "description"),
        [
            (
                schema.code,
                _counts(schema),
                _period(schema),
                "; ".join(_dimension(item.key, item.values) for item in schema.filters),
                "; ".join(_threshold(item, scaled=scaled) for item in schema.thresholds),
                schema.description,
            )
            for schema in schemas
        ],
    )
    return None


@metrics.command()
@click.argument("code")
@click.option(
    "--dimension", "-d", "dimension", multiple=True, metavar="KEY=+A,+B", help="Add values to a dimension."
)
@click.option("--threshold", multiple=True, metavar="CODE=VALUE[:recurring]", help="Add a threshold.")
@click.option("--description", help="Set the description.")
@click.option(
    "--retain-raw-days",
    type=RETENTION,
    metavar="DAYS|forever",
    help="Drop raw events that are older than this, but never totals. What is dropped doesn't come back.",
)
@click.option("--scaled", is_flag=True, help="Thresholds are given in units with up to six decimals.")
@client_command
async def update(
    options: Options,
    code: str,
    dimension: tuple[str, ...],
    threshold: tuple[str, ...],
    description: str | None,
    retain_raw_days: int | None,
    scaled: bool,
) -> int | None:
    """Add thresholds or dimension values to the metric CODE, or set its description or for how long it keeps raw events.

    Nothing else of a metric can change. What is there already is left as it is.
    """
    import msgspec

    from tallymark import DimensionFilter, InvalidRequestError

    additions = parse.added_dimension_values(dimension)
    new_thresholds = parse.thresholds(threshold, scaled=scaled)
    if not additions and not new_thresholds and description is None and retain_raw_days is None:
        raise InvalidRequestError(
            "nothing to change: give --dimension, --threshold, --description or --retain-raw-days"
        )
    async with connected(options) as client:
        schema = await metric(client, code)
        declared = [item.key for item in schema.filters]
        for key in additions:
            if key not in declared:
                hint = parse.closest(key, declared)
                raise InvalidRequestError(f"metric {code} has no dimension {key!r:.80}{hint}")
        filters = []
        for item in schema.filters:
            if key_additions := additions.get(item.key):
                if not item.values:
                    raise InvalidRequestError(f"dimension {item.key!r:.80} takes any value already")
                new = [value for value in dict.fromkeys(key_additions) if value not in item.values]
                item = DimensionFilter(key=item.key, values=[*item.values, *new])
            filters.append(item)
        kept = list(schema.thresholds)
        changed = msgspec.structs.replace(
            schema,
            filters=filters,
            thresholds=[*kept, *(item for item in new_thresholds if item not in kept)],
            description=schema.description if description is None else description,
            retain_raw_days=schema.retain_raw_days if retain_raw_days is None else retain_raw_days or None,
        )
        if changed != schema:
            changed = await client.metrics.update(changed)
    _report(
        options, changed, f"updated metric {code}" if changed != schema else f"metric {code} is so already"
    )
    return None


@metrics.command()
@click.argument("code")
@click.option("--yes", "-y", is_flag=True, help="Don't ask.")
@client_command
async def delete(options: Options, code: str, yes: bool) -> int | None:
    """Delete the metric CODE.

    Events for it are refused from then on, and its totals can't be asked for any more.
    """
    from tallymark_node import output

    async with connected(options) as client:
        await metric(client, code)
        if not yes and sys.stdin.isatty():
            click.confirm(
                f"Delete metric {code}? Its totals can't be asked for after that.", abort=True, err=True
            )
        await client.metrics.delete(code)
    if options.as_json:
        output.document({"deleted": code})
    else:
        output.line(f"deleted metric {code}")
    return None


def schema_json(schema: MetricSchema) -> dict[str, Any]:
    """Write a schema for JSON: its fields, enums by name."""
    return {
        "code": schema.code,
        "agg_type": schema.agg_type.name,
        "filters": [{"key": item.key, "values": list(item.values)} for item in schema.filters],
        "thresholds": [
            {"code": item.code, "value": item.value, "recurring": item.recurring}
            for item in schema.thresholds
        ],
        "period_type": schema.period_type.name,
        "billing_cycle_day": schema.billing_cycle_day,
        "time_zone": schema.time_zone,
        "unique_type": schema.unique_type.name,
        "grace_seconds": schema.grace_seconds,
        "description": schema.description,
        "retain_raw_days": schema.retain_raw_days,
    }


def _report(options: Options, schema: MetricSchema, text: str) -> None:
    from tallymark_node import output

    if options.as_json:
        output.document(schema_json(schema))
    else:
        output.line(text)


def _counts(schema: MetricSchema) -> str:
    from tallymark import AggType

    name = schema.agg_type.name.lower().replace("_", " ")
    if schema.agg_type is AggType.COUNT_UNIQUE:
        return f"{name} ({schema.unique_type.name.lower()})"
    return name


def _period(schema: MetricSchema) -> str:
    text = next(shown for shown, name in PERIODS.items() if name == schema.period_type.name)
    if schema.billing_cycle_day != 1:
        text += f" from day {schema.billing_cycle_day}"
    if schema.time_zone != "UTC":
        text += f", {schema.time_zone}"
    if schema.grace_seconds is not None:
        text += f", sealed {_duration(schema.grace_seconds)} after its end"
    if schema.retain_raw_days is not None:
        text += f"; raw events for {schema.retain_raw_days} days"
    return text


def _duration(seconds: int) -> str:
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "m")):
        if seconds % size == 0:
            return f"{seconds // size}{unit}"
    return f"{seconds}s"


def _dimension(key: str, values: list[str]) -> str:
    if not values:
        return f"{key} (any)"
    shown = ", ".join(values[:8]) + (f", … ({len(values)})" if len(values) > 8 else "")
    return f"{key}={shown}"


def _threshold(item: Any, *, scaled: bool) -> str:
    from tallymark_node.output import number

    every = "every " if item.recurring else ""
    return f"{item.code}: {every}{number(item.value, scaled=scaled)}"
