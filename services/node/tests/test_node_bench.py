"""The soak's load and ledger, its verdicts, and the commands' arguments: all that needs no server."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

from tallymark_node.bench import archived, soak
from tallymark_node.bench.probe import Reading
from tallymark_node.bench.run import main
from tallymark_node.bench.soak_load import BATCH, COMBINATIONS, Generator, Ledger

ACCOUNTS = 3_000
NOW = 1_763_000_000 * 10**9


def test_a_batch_is_made_of_its_number() -> None:
    """The same whenever it is made, but for the times of late events; others differ."""
    one, other = Generator(ACCOUNTS, 1), Generator(ACCOUNTS, 1)
    for number in range(20):
        first, second = one.batch(number, NOW), other.batch(number, NOW)
        assert first.kind == second.kind
        assert first.accounts.tolist() == second.accounts.tolist()
        assert first.values.tolist() == second.values.tolist()
        assert first.properties == second.properties
        assert (first.ids is None) == (first.kind != "jobs")
        assert (first.times is None) == (first.kind != "late")
    assert one.batch(0, NOW).accounts.tolist() != one.batch(1, NOW).accounts.tolist()
    assert Generator(ACCOUNTS, 2).batch(0, NOW).accounts.tolist() != one.batch(0, NOW).accounts.tolist()


def test_the_ledger_counts_what_was_stored() -> None:
    """As a plain count over all events of the sampled accounts does."""
    generator, ledger = Generator(ACCOUNTS, 1), Ledger(ACCOUNTS)
    counts: dict[tuple[str, int, int], list[int]] = {}
    members: dict[int, set[int]] = {}
    total = 0
    for number in range(40):
        batch = generator.batch(number, NOW)
        ledger.stored(batch)
        places = batch.combinations if batch.combinations is not None else np.zeros(BATCH, np.int64)
        for account, value, place in zip(
            batch.accounts.tolist(), batch.values.tolist(), places.tolist(), strict=True
        ):
            found = counts.setdefault((batch.metric, account, place), [0, 0])
            found[0] += 1
            found[1] += value
            if batch.metric == "seats":
                members.setdefault(account, set()).add(value)
            if batch.metric == "used":
                total += value
    assert ledger.events == 40 * BATCH
    assert ledger.sums == {"used": total}
    assert ledger.sampled[0] == 0
    for sample, account in enumerate(ledger.sampled):
        wanted = [tuple(counts.get(("used", account, place), (0, 0))) for place in range(len(COMBINATIONS))]
        assert ledger.used(sample) == wanted
        assert ledger.jobs[sample] == counts.get(("jobs", account, 0), [0])[0]
        assert ledger.seats[sample] == counts.get(("seats", account, 0), [0])[0]
        assert ledger.members[sample].sum() == len(members.get(account, ()))


def _line(minute: int, **changed: float) -> soak.Line:
    fields = dict.fromkeys(Reading.__struct_fields__, 0) | {"handles": 30, "log_full": False}
    fields |= {
        "anonymous_bytes": int(changed.pop("memory", 2**30)),
        "log_bytes": int(changed.pop("log", 2**28)),
    }
    line = soak.Line(
        minute=minute,
        events_s=300_000,
        receipt_p50_ms=5,
        receipt_p99_ms=20,
        query_p50_ms=1,
        query_p99_ms=10,
        top_ms=50,
        cores=1,
        reading=msgspec.convert(fields, Reading),
    )
    return msgspec.structs.replace(line, **changed)


def _missed(lines: list[soak.Line]) -> set[str]:
    plan = soak.Plan(minutes=len(lines), memory_bytes=2 * 2**30)
    return {verdict.what for verdict in soak._verdicts(plan, lines) if not verdict.is_met}


def test_verdicts() -> None:
    """What stays as it was is met; what grows, or becomes slow, is not."""
    steady = [_line(minute) for minute in range(9)]
    assert _missed(steady) == set()
    assert _missed([_line(m, memory=2**30 * (1 + m / 10)) for m in range(9)]) == {"memory flat, MiB"}
    assert "memory within the budget" in _missed([*steady, _line(9, memory=2**31 + 1)])
    assert _missed([_line(m, log=2**30 * (1 + m / 5)) for m in range(9)]) == {"log flat, MiB"}
    assert _missed([*steady, _line(9, receipt_p99_ms=61)]) == {"p99 of receipts, ms"}
    assert _missed([*steady, _line(9, query_p99_ms=31)]) == {"p99 of queries, ms"}
    assert _missed([_line(m, events_s=250_000) for m in range(9)]) == {"events a second, sustained"}


def test_only_wrong_numbers_fail() -> None:
    """A condition that is not met is told; what isn't right, or was never looked at, ends the command with 1."""
    slow = soak.Verdict(what="p99", wanted="1", found="2", is_met=False)
    right = soak.Verdict(what="totals", wanted="x", found="x", is_met=True, is_exact=True)
    assert soak.is_exact([slow, right])
    assert not soak.is_exact([slow])
    assert not soak.is_exact([right, msgspec.structs.replace(right, is_met=False)])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--soak", "1", "--rate", "0"], "a number of events a second"),
        (["--soak", "1", "--rate", "fast"], "a number of events a second"),
        (["--soak", "1", "--set", "archiv=on"], "there is no setting 'archiv'"),
        (["--archive", "10"], "--archive"),
        (["--archive", str(10**15)], "TMPDIR names another folder"),
    ],
)
def test_arguments_that_are_refused(arguments: list[str], said: str) -> None:
    """Before anything is started, with what is wrong."""
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert said in result.output


def test_the_first_whole_month() -> None:
    """The calendar month that begins next, in UTC."""
    day = 86_400 * 10**9
    month = archived._month(NOW)  # in November 2025
    assert month.start_ns == 1_764_547_200 * 10**9
    assert month.end_ns - month.start_ns == 31 * day
