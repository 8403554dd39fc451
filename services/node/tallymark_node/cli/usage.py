"""`tallymark usage` and `tallymark top`: totals, breakdowns, series and rankings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import click

from tallymark_node.cli import parse
from tallymark_node.cli.common import ACCOUNT, INSTANT, Options, client_command, connected, metric

if TYPE_CHECKING:
    from tallymark import MetricSchema, Period
    from tallymark_protocol.periods import PeriodSpec

CONSISTENCIES = ("leader", "stale", "quorum")
PERIODS = ("current", "last", "month", "last-month", "all")
TOP_LIMIT_MAX = 10_000
_YEAR_NS = 366 * 86_400 * 10**9

_period_help = (
    "current or last billing period of the metric, this or the last calendar month in its zone, or all time. "
    "[default: current]"
)


def _period_options(function: Any) -> Any:
    for decorator in (
        click.option(
            "--filter",
            "-f",
            "where",
            multiple=True,
            metavar="KEY=VALUE",
            help="Count only these; repeat for more.",
        ),
        click.option(
            "--consistency",
            type=click.Choice(CONSISTENCIES),
            default="leader",
            show_default=True,
            help="Whom to ask: the leader, any copy, or the leader after a majority has confirmed it.",
        ),
        click.option("--to", "end_ns", type=INSTANT, metavar="WHEN", help="End of the range (exclusive)."),
        click.option(
            "--from",
            "start_ns",
            type=INSTANT,
            metavar="WHEN",
            help=f"Start of a range: {parse.INSTANT_HELP}.",
        ),
        click.option("--period", type=click.Choice(PERIODS), help=_period_help),
    ):
        function = decorator(function)
    return function


@click.command()
@click.argument("account", type=ACCOUNT)
@click.argument("code", metavar="METRIC")
@_period_options
@click.option(
    "--by",
    "group_by",
    multiple=True,
    metavar="KEY",
    help="A row for each value of a dimension; may be repeated.",
)
@click.option(
    "--unit", type=click.Choice(("hour", "day", "month")), help="A row for each hour, day or month."
)
@click.option(
    "--now", "--realtime", "realtime", is_flag=True, help="The running total of the current billing period."
)
@click.option("--scaled", is_flag=True, help="The metric's values are decimals (times 1,000,000).")
@client_command
async def usage(
    options: Options,
    account: int,
    code: str,
    period: str | None,
    start_ns: int | None,
    end_ns: int | None,
    where: tuple[str, ...],
    consistency: Literal["leader", "stale", "quorum"],
    group_by: tuple[str, ...],
    unit: str | None,
    realtime: bool,
    scaled: bool,
) -> int | None:
    """Show what ACCOUNT used of METRIC: exactly the events timed in the period."""
    from tallymark import InvalidRequestError

    wanted = parse.filters(where)
    if group_by and unit:
        raise InvalidRequestError("--by and --unit don't go together: ask for one of them")
    if realtime and (period or wanted or group_by or unit or start_ns is not None or end_ns is not None):
        raise InvalidRequestError(
            "--now is the whole running total: it takes no period, filter, --by or --unit"
        )
    bounds = choose_period(period, start_ns, end_ns, with_units=unit is not None)
    async with connected(options) as client:
        schema = await metric(client, code)
        _check_dimensions(schema, [*wanted, *group_by])
        show = _Shown(options, schema, account, scaled=scaled)
        if group_by:
            rows = await client.breakdown(
                account, code, bounds, group_by=list(group_by), filters=wanted, consistency=consistency
            )
            whole = await client.query(account, code, bounds, filters=wanted, consistency=consistency)
            show.breakdown(rows, list(group_by), whole)
        elif unit:
            series = await client.series(
                account, code, bounds, unit=unit, filters=wanted, consistency=consistency
            )
            show.series(series, unit, trim=period == "all" or start_ns is None or end_ns is None)
        elif realtime:
            show.total(await client.query_realtime(account, code, consistency=consistency))
        else:
            show.total(await client.query(account, code, bounds, filters=wanted, consistency=consistency))
    return None


@click.command()
@click.argument("code", metavar="METRIC")
@_period_options
@click.option(
    "--limit", type=click.IntRange(1, TOP_LIMIT_MAX), default=10, show_default=True, help="How many accounts."
)
@click.option("--scaled", is_flag=True, help="The metric's values are decimals (times 1,000,000).")
@client_command
async def top(
    options: Options,
    code: str,
    period: str | None,
    start_ns: int | None,
    end_ns: int | None,
    where: tuple[str, ...],
    consistency: Literal["leader", "stale", "quorum"],
    limit: int,
    scaled: bool,
) -> int | None:
    """Show the accounts that used most of METRIC."""
    from tallymark_node import output

    wanted = parse.filters(where)
    bounds = choose_period(period, start_ns, end_ns, with_units=False)
    async with connected(options) as client:
        schema = await metric(client, code)
        _check_dimensions(schema, list(wanted))
        rows = await client.top_accounts(code, bounds, limit=limit, filters=wanted, consistency=consistency)
    if options.as_json:
        output.document(
            [
                {"account_id": row.account_id, **output.stats_json(schema.agg_type, row.value, scaled=scaled)}
                for row in rows
            ]
        )
        return None
    if not rows:
        output.line("no account has any usage there")
        return None
    units = scaled and output.has_units(schema.agg_type)
    output.table(
        ("", "account", code, "events"),
        [
            (
                str(rank),
                str(row.account_id),
                output.number(output.total(schema.agg_type, row.value), scaled=units),
                output.number(row.value.count),
            )
            for rank, row in enumerate(rows, 1)
        ],
        numbers={0, 1, 2, 3},
    )
    return None


def choose_period(
    period: str | None, start_ns: int | None, end_ns: int | None, *, with_units: bool
) -> Period | PeriodSpec:
    """Turn the period options into a period.

    Args:
        period: one of `PERIODS`, or None.
        start_ns: inclusive; None with an end means from the beginning.
        end_ns: exclusive; None with a start means no end.
        with_units: whether it will be cut into hours, days or months; then "no end" is a year from now, which
            is beyond every event there can be, because the time in between would make rows, too.

    Raises:
        InvalidRequestError: a period and a range, or a range that ends before it starts.
    """
    from tallymark import (
        InvalidRequestError,
        Period,
        current_month,
        current_period,
        last_billing_period,
        last_month,
    )

    if start_ns is None and end_ns is None and period != "all":
        named = {
            "current": current_period,
            "last": last_billing_period,
            "month": current_month,
            "last-month": last_month,
        }
        return named[period or "current"]()
    if period is not None and period != "all":
        raise InvalidRequestError("--period and --from/--to don't go together: give one or the other")
    if start_ns is not None and end_ns is not None:
        parse.check_range(start_ns, end_ns)
    from tallymark_protocol.zones import TIME_END_NS

    end = end_ns
    if end is None:
        end = TIME_END_NS
        if with_units:
            from tallymark_runtime.clock import RealClock

            end = max(RealClock().now_ns() + _YEAR_NS, (start_ns or 0) + _YEAR_NS)
    return Period(start_ns or 0, min(end, TIME_END_NS))


def _check_dimensions(schema: MetricSchema, keys: Sequence[str]) -> None:
    from tallymark import InvalidRequestError

    declared = [item.key for item in schema.filters]
    for key in keys:
        if key not in declared:
            hint = parse.closest(key, declared) if declared else "; it declares none"
            raise InvalidRequestError(f"metric {schema.code} has no dimension {key!r:.80}{hint}")


class _Shown:
    """Prints answers about one account and metric."""

    def __init__(self, options: Options, schema: MetricSchema, account: int, *, scaled: bool) -> None:
        from tallymark_node import output

        self._output = output
        self._as_json = options.as_json
        self._schema = schema
        self._agg = schema.agg_type
        self._account = account
        self._scaled = scaled
        self._units = scaled and output.has_units(schema.agg_type)
        self._zone = output.zone_here(schema.time_zone)

    def total(self, answer: Any) -> None:
        """Print one total."""
        output, stats, bounds = self._output, answer.value, answer.period
        crossed = [
            item.code for bit, item in enumerate(self._schema.thresholds) if stats.alert_flags >> bit & 1
        ]
        if self._as_json:
            shown = {
                **self._head(bounds),
                **output.stats_json(self._agg, stats, scaled=self._scaled),
                "thresholds_crossed": crossed,
                **_age_json(answer),
            }
            output.document(shown)
            return
        facts = [
            ("account", str(self._account)),
            ("metric", f"{self._schema.code} ({self._agg.name.lower().replace('_', ' ')})"),
            ("period", output.span(bounds.start_ns, bounds.end_ns, self._zone)),
            ("total", self._number(self._value(stats))),
            ("events", output.number(stats.count)),
        ]
        if output.has_units(self._agg) and stats.count:
            facts += [("smallest", self._number(stats.min)), ("largest", self._number(stats.max))]
        if behind := sum(answer.lag.values()):
            facts.append(
                ("behind", f"{output.number(behind)} events are stored that this copy has not counted yet")
            )
        if heard := heard_text(answer.silence_ms):
            facts.append(("answered", heard))
        if crossed:
            facts.append(("thresholds crossed", ", ".join(crossed)))
        output.facts(facts)

    def breakdown(self, rows: Any, keys: list[str], whole: Any) -> None:
        """Print a row for each group, the greatest first, and their total.

        Args:
            rows: the groups.
            keys: the dimensions.
            whole: the answer to the same question without groups. A breakdown doesn't say which instants a period
                by name came to, and not every aggregation's total follows from the groups' ones.
        """
        output, bounds = self._output, whole.period
        if self._as_json:
            groups = [
                {
                    "group": {key: _group_json(row.group[key]) for key in keys},
                    **output.stats_json(self._agg, row.value, scaled=self._scaled),
                }
                for row in rows
            ]
            output.document({**self._head(bounds), "rows": groups, **_age_json(rows)})
            return
        title = f"account {self._account}, {self._schema.code}, {output.span(bounds.start_ns, bounds.end_ns, self._zone)}"
        if not rows:
            output.line(f"{title}: no usage")
            return
        ordered = sorted(rows, key=lambda row: self._rank(row.value))
        output.table(
            (*keys, self._schema.code, "events"),
            [
                (
                    *(group_text(row.group[key]) for key in keys),
                    self._number(self._value(row.value)),
                    output.number(row.value.count),
                )
                for row in ordered
            ]
            + [self._all_groups(rows, keys, whole.value)],
            title=title,
            numbers={len(keys), len(keys) + 1},
        )
        self._tell_age(rows.silence_ms)

    def _all_groups(self, rows: list[Any], keys: list[str], whole: Any) -> tuple[str, ...]:
        from tallymark import AggType

        # From the rows where that is possible: events that came between the two questions must not show as a gap.
        values = [value for row in rows if (value := self._value(row.value)) is not None]
        if self._agg in {AggType.COUNT, AggType.SUM}:
            total: int | None = sum(values)
        elif self._agg is AggType.MAX:
            total = max(values, default=None)
        else:
            total = self._value(whole)
        events = self._output.number(sum(row.value.count for row in rows))
        return ("(total)", *[""] * (len(keys) - 1), self._number(total), events)

    def series(self, series: Any, unit: str, *, trim: bool) -> None:
        """Print a row for each bucket; with `trim` without the empty ones at both ends."""
        output = self._output
        age, silence_ms = _age_json(series), series.silence_ms
        if trim:
            used = [number for number, (_, stats) in enumerate(series) if stats.count]
            series = series[used[0] : used[-1] + 1] if used else []
        if self._as_json:
            buckets = [
                {
                    **output.period_json(bounds.start_ns, bounds.end_ns),
                    **output.stats_json(self._agg, stats, scaled=self._scaled),
                }
                for bounds, stats in series
            ]
            output.document(
                {
                    "account_id": self._account,
                    "metric": self._schema.code,
                    "unit": unit,
                    "rows": buckets,
                    **age,
                }
            )
            return
        title = f"account {self._account}, {self._schema.code} by {unit} ({self._zone})"
        labels = [_bucket(output.moment(bounds.start_ns, self._zone), unit) for bounds, _ in series]
        # Where clocks are set back, an hour comes twice.
        twice = {label for label, count in Counter(labels).items() if count > 1}
        labels = [
            f"{label} {output.utc_offset(bounds.start_ns, self._zone)}" if label in twice else label
            for label, (bounds, _) in zip(labels, series, strict=True)
        ]
        if not series:
            output.line(f"{title}: no usage")
            return
        output.table(
            (unit, self._schema.code, "events"),
            [
                (
                    label,
                    self._number(self._value(stats)),
                    output.number(stats.count),
                )
                for label, (_, stats) in zip(labels, series, strict=True)
            ],
            title=title,
            numbers={1, 2},
        )
        self._tell_age(silence_ms)

    def _tell_age(self, silence_ms: dict[int, int]) -> None:
        if heard := heard_text(silence_ms):
            self._output.line(f"answered {heard}")

    def _head(self, bounds: Period) -> dict[str, Any]:
        return {
            "account_id": self._account,
            "metric": self._schema.code,
            "agg_type": self._agg.name,
            "period": self._output.period_json(bounds.start_ns, bounds.end_ns),
        }

    def _value(self, stats: Any) -> int | None:
        return self._output.total(self._agg, stats)

    def _rank(self, stats: Any) -> tuple[bool, int]:
        value = self._value(stats)
        return (value is None, -(value or 0))

    def _number(self, value: int | None) -> str:
        return self._output.number(value, scaled=self._units)


def heard_text(silence_ms: dict[int, int]) -> str:
    """Say how old an answer of copies may be; "" for one of leaders."""
    if not silence_ms:
        return ""
    if min(silence_ms.values()) < 0:
        return "from a copy that has not heard from a leader since it started"
    return f"from a copy that heard from its leader {max(silence_ms.values()):,} ms ago"


def _age_json(answer: Any) -> dict[str, Any]:
    """Write up to where an answer counts, for JSON, by partition; `lag` and `silence_ms` are those of copies."""
    return {"as_of": answer.as_of, "lag": answer.lag, "silence_ms": answer.silence_ms}


def group_text(value: Any) -> str:
    """Write a group's value for people: missing and undeclared ones in brackets, like nothing that is a value."""
    from tallymark import OTHER

    if value is None:
        return "(missing)"
    if value is OTHER:
        return "(other)"
    return '""' if value == "" else str(value)


def _group_json(value: Any) -> Any:
    from tallymark import OTHER

    # The row of undeclared values can't be a string: any string may be a value.
    return {"other": True} if value is OTHER else value


def _bucket(text: str, unit: str) -> str:
    if unit == "hour" or not text.endswith(" 00:00"):
        return text  # a cut bucket, or a day that doesn't start at midnight
    date = text.removesuffix(" 00:00")
    return date[:7] if unit == "month" and date.endswith("-01") else date
