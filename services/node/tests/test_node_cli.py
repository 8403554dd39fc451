"""The command against a server: metrics, files, questions, errors, the demo, and stopping."""

import json
import os
import re
import signal
import socket
import subprocess
import sys

import numba
import pytest
from click.testing import CliRunner

from tallymark_node.cli import serve
from tallymark_node.main import cli

ENVIRONMENT = {
    "GIT_AUTHOR_NAME": "Ada",
    "GIT_AUTHOR_EMAIL": "ada@example.com",
    "GIT_COMMITTER_NAME": "Ada",
    "GIT_COMMITTER_EMAIL": "ada@example.com",
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_CONFIG_SYSTEM": "/dev/null",
}


def document(result):
    """The one JSON document on standard output."""
    return json.loads(result.stdout)


def test_metrics_live_through_create_list_update_delete(tally):
    """A metric is created with everything, shown, extended, and deleted."""
    made = tally(
        *("metrics", "create", "life", "--agg", "sum", "--period", "calendar", "--cycle-day", 15),
        *("--zone", "Europe/Berlin", "--dimension", "provider=aws,gcp", "-d", "region", "--scaled"),
        *("--threshold", "free=10.5", "--threshold", "every=1:recurring", "--grace", "3d"),
        *("--description", "seconds of compute", "--retain-raw-days", 90, "--json"),
    )
    assert document(made) == {
        "code": "life",
        "agg_type": "SUM",
        "filters": [{"key": "provider", "values": ["aws", "gcp"]}, {"key": "region", "values": []}],
        "thresholds": [
            {"code": "free", "value": 10_500_000, "recurring": False},
            {"code": "every", "value": 1_000_000, "recurring": True},
        ],
        "period_type": "CALENDAR",
        "billing_cycle_day": 15,
        "time_zone": "Europe/Berlin",
        "unique_type": "UINT64",
        "grace_seconds": 259_200,
        "description": "seconds of compute",
        "retain_raw_days": 90,
    }
    shown = tally("metrics", "list", "--scaled").stdout
    assert "calendar from day 15, Europe/Berlin, sealed 3d after its end" in shown
    assert "provider=aws, gcp; region (any)" in shown
    assert "free: 10.5; every: every 1" in shown
    changed = document(
        tally(
            *("metrics", "update", "life", "--dimension", "provider=+azure", "--threshold", "more=7"),
            *("--description", "new", "--json"),
        )
    )
    assert changed["filters"][0]["values"] == ["aws", "gcp", "azure"]
    assert changed["thresholds"][2] == {"code": "more", "value": 7, "recurring": False}
    assert changed["description"] == "new"
    assert "so already" in tally("metrics", "update", "life", "--dimension", "provider=+azure").stdout
    assert "deleted" in tally("metrics", "delete", "life").stdout
    assert "life" not in [schema["code"] for schema in document(tally("metrics", "list", "--json"))]


def test_metrics_that_exist(tally):
    """The same schema again is fine, another one is an error."""
    tally("metrics", "create", "twice")
    assert "exists already" in tally("metrics", "create", "twice").stdout
    assert "another schema" in tally("metrics", "create", "twice", "--agg", "sum", status=1).stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("create", "a b"), "a-z A-Z"),
        (("create", "x", "--cycle-day", "5"), "billing_cycle_day"),
        (("create", "x", "--zone", "Mars/Base"), "Mars/Base"),
        (("create", "x", "--threshold", "free"), "free_tier=10000"),
        (("create", "x", "--dimension", "p="), "no dimension"),
        (("create", "x", "--grace", "soon"), "no duration"),
        (("create", "x", "--unique", "string"), "unique_type"),
        (("update", "twice"), "nothing to change"),
        (("update", "twice", "--dimension", "p=x"), "p=+NAME"),
    ],
)
def test_bad_metrics(tally, arguments, words):
    """What is wrong with a metric is said, with status 2."""
    assert words in tally("metrics", *arguments, status=2).stderr


def test_unknown_names_are_suggested(tally):
    """A misspelt metric or dimension gets the right one suggested."""
    tally("metrics", "create", "requests", "--dimension", "region")
    for arguments in (("usage", 1, "request"), ("metrics", "delete", "request"), ("top", "request")):
        assert "did you mean 'requests'?" in tally(*arguments, status=1).stderr
    assert "did you mean 'region'?" in tally("usage", 1, "requests", "--by", "regon", status=2).stderr
    assert "did you mean 'region'?" in tally("usage", 1, "requests", "-f", "regon=eu", status=2).stderr
    error = json.loads(tally("usage", 1, "request", "--json", status=1).stderr)
    assert error["error"]["code"] == "unknown_metric"


def test_bad_dates_are_quoted(tally):
    """A bad date is named as typed."""
    assert "'yesterday' is no date" in tally("usage", 1, "x", "--from", "yesterday", status=2).stderr
    assert "'2026-02-30' is no date" in tally("events", 1, "--to", "2026-02-30", status=2).stderr
    assert "'1969-12-31' is before 1970" in tally("events", 1, "--from", "1969-12-31", status=2).stderr
    assert "no account id" in tally("usage", "me", "x", status=2).stderr
    for command in (("usage", 1, "x"), ("top", "x"), ("events", 1)):
        reversed_range = tally(*command, "--from", "2026-02-01", "--to", "2026-01-01T10:00", status=2).stderr
        assert "--to 2026-01-01 10:00 lies before --from 2026-02-01 00:00 (both UTC)" in reversed_range


def test_no_server():
    """Where nobody listens that is said at once, with status 3."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        for arguments in (
            ["metrics", "list"],
            ["usage", "1", "x"],
            ["top", "x"],
            ["events", "1"],
            ["alerts"],
        ):
            result = CliRunner().invoke(cli, ["--server", address, *arguments])
            assert result.exit_code == 3
            assert result.stderr == (
                f"error: no Tallymark server answers at {address}; start one with `tallymark dev`\n"
            )
    assert "no address" in CliRunner().invoke(cli, ["--server", "here", "metrics", "list"]).stderr


USAGE = """account,seconds,at,provider,job
1,1.5,2026-01-10T10:00:00Z,aws,a
1,2.25,2026-01-20T10:30:00Z,gcp,b
1,4,2026-02-01T00:00:00Z,other,c
1,0.25,2026-02-01T00:59:59.999999999Z,,d
2,100,2026-01-31T23:59:59Z,aws,e
"""
MAPPING = (
    *("--metric", "seconds", "--account", "account", "--value", "seconds", "--scale"),
    *("--time", "at", "--property", "provider"),
)


SECONDS = (
    *("metrics", "create", "seconds", "--agg", "sum", "--period", "calendar", "-d", "provider=aws,gcp"),
    *("--threshold", "three=3", "--threshold", "each=1:recurring", "--scaled"),
)


@pytest.fixture(scope="module")
def usage_file(server, tmp_path_factory):
    """A file of usage that is loaded; its metric is `seconds`."""
    path = tmp_path_factory.mktemp("usage") / "usage.csv"
    path.write_text(USAGE)
    for arguments in (SECONDS, ("ingest", str(path), *MAPPING)):
        result = CliRunner().invoke(cli, ["--server", server, *arguments])
        assert result.exit_code == 0, result.output
    return path


def test_ingest_again_stores_nothing(tally, usage_file):
    """The same file again, and a longer one, stores only what is new."""
    again = document(tally("ingest", usage_file, *MAPPING, "--json", "--batch", 2))
    assert (again["rows"], again["stored"], again["duplicates"], again["rejected"]) == (5, 0, 5, 0)
    assert again["rejects_file"] is None
    through_stdin = tally("ingest", "-", "--format", "csv", *MAPPING, "--json", stdin=USAGE)
    assert document(through_stdin)["duplicates"] == 5


def test_usage_of_a_range(tally, usage_file):
    """A range counts exactly what is timed in it, its end excluded."""
    january = ("usage", 1, "seconds", "--from", "2026-01-01", "--to", "2026-02-01", "--scaled")
    found = document(tally(*january, "--json"))
    assert (found["total"], found["count"], found["min"], found["max"]) == ("3.75", 2, "1.5", "2.25")
    assert found["period"] == {"start": "2026-01-01T00:00:00Z", "end": "2026-02-01T00:00:00Z"}
    assert found["thresholds_crossed"] == ["three", "each"]
    shown = tally(*january).stdout
    assert "3.75" in shown
    assert "2026-01-01 to 2026-02-01 (UTC)" in shown
    raw = document(tally("usage", 1, "seconds", "--period", "all", "--json"))
    assert raw["total"] == 8_000_000


@pytest.mark.parametrize("consistency", ["leader", "stale", "quorum"])
def test_usage_says_whom_to_ask(tally, usage_file, consistency):
    """Where there is one copy, all of them answer the same."""
    asked = ("usage", 1, "seconds", "--period", "all", "--json")
    assert document(tally(*asked, "--consistency", consistency)) == document(tally(*asked))
    ranking = ("top", "seconds", "--period", "all", "--json")
    assert document(tally(*ranking, "--consistency", consistency)) == document(tally(*ranking))


def test_usage_filtered_grouped_and_in_time(tally, usage_file):
    """Filters, breakdowns with undeclared and missing values, and series add up."""
    everything = ("usage", 1, "seconds", "--period", "all", "--scaled", "--json")
    assert document(tally(*everything, "-f", "provider=aws", "-f", "provider=gcp"))["total"] == "3.75"
    rows = document(tally(*everything, "--by", "provider"))["rows"]
    groups = {json.dumps(row["group"]["provider"]): row["total"] for row in rows}
    assert groups == {'"aws"': "1.5", '"gcp"': "2.25", '{"other": true}': "4", "null": "0.25"}
    shown = tally(*everything[:-1], "--by", "provider").stdout
    assert "(other)" in shown
    assert "(missing)" in shown
    assert re.search(r"\(total\) +8 +4$", shown, re.MULTILINE)
    one = tally(*everything[:-1], "--by", "provider", "-f", "provider=aws").stdout
    assert re.search(r"\(total\) +1\.5 +1$", one, re.MULTILINE)
    months = document(tally(*everything, "--unit", "month"))["rows"]
    assert [(row["start"], row["total"]) for row in months] == [
        ("2026-01-01T00:00:00Z", "3.75"),
        ("2026-02-01T00:00:00Z", "4.25"),
    ]
    hours = tally(
        "usage", 1, "seconds", "--from", "2026-02-01", "--to", "2026-02-01T03:00", "--unit", "hour"
    ).stdout
    assert hours.count("2026-02-01 0") == 3
    assert "no usage" in tally("usage", 7, "seconds", "--period", "all", "--unit", "day").stdout
    assert "no usage" in tally("usage", 7, "seconds", "--period", "all", "--by", "provider").stdout


def test_hours_that_come_twice_are_told_apart(tally, tmp_path):
    """Where clocks are set back, both hours show their offset; all others are as they were."""
    tally("metrics", "create", "berlin", "--zone", "Europe/Berlin")
    path = tmp_path / "hours.csv"
    path.write_text("account_id,at\n9,2025-10-26T00:30Z\n9,2025-10-26T01:30Z\n9,2025-10-26T02:30Z\n")
    tally("ingest", path, "--metric", "berlin", "--time", "at")
    range_ = ("--from", "2025-10-26T00:00Z", "--to", "2025-10-26T03:00Z")
    shown = tally("usage", 9, "berlin", "--unit", "hour", *range_).stdout
    assert re.findall(r"^2025-10-26 (.*?) {2,}", shown, re.MULTILINE) == [
        "02:00 +02:00",
        "02:00 +01:00",
        "03:00",
    ]


@pytest.mark.parametrize("agg", ["max", "latest", "count_unique", "count"])
def test_a_breakdowns_total_is_the_metrics(tally, tmp_path, agg):
    """The last line is the total of the same question without groups, also where groups don't add up."""
    code = f"all_{agg}"
    tally("metrics", "create", code, "--agg", agg, "-d", "region")
    path = tmp_path / "regions.csv"
    path.write_text(
        "account_id,n,at,region\n1,7,2026-01-01,eu\n1,7,2026-01-02,us\n1,3,2026-01-03,eu\n2,9,2026-01-04,eu\n"
    )
    tally("ingest", path, "--metric", code, "--value", "n", "--time", "at", "-p", "region")
    shown = tally("usage", 1, code, "--period", "all", "--by", "region").stdout
    total = {"max": 7, "latest": 3, "count_unique": 2, "count": 3}[agg]
    assert re.search(rf"^\(total\) +{total} +3$", shown, re.MULTILINE)


def test_usage_now(tally, usage_file):
    """The running total is that of the current billing period, and takes no other question."""
    assert document(tally("usage", 1, "seconds", "--now", "--json"))["total"] == 0
    assert "running total" in tally("usage", 1, "seconds", "--now", "--by", "provider", status=2).stderr
    assert "together" in tally("usage", 1, "seconds", "--by", "provider", "--unit", "day", status=2).stderr


def test_top(tally, usage_file):
    """Accounts are ranked, the greatest first."""
    rows = document(tally("top", "seconds", "--period", "all", "--scaled", "--json"))
    assert [(row["account_id"], row["total"]) for row in rows] == [(2, "100"), (1, "8")]
    assert "100" in tally("top", "seconds", "--period", "all", "--limit", 1, "--scaled").stdout
    assert "no account" in tally("top", "seconds", "--period", "last").stdout


def test_events(tally, usage_file):
    """Stored events are listed as they are, to the nanosecond, as many as asked for."""
    result = tally("events", 1, "--metric", "seconds", "--scaled", "--json")
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["value"] for line in lines] == ["1.5", "2.25", "4", "0.25"]
    assert lines[3]["time"] == "2026-02-01T00:59:59.999999999Z"
    assert lines[0]["properties"] == {"provider": "aws"}
    assert lines[0]["id"].endswith(":1")
    few = tally("events", 1, "--metric", "seconds", "--limit", 2).stdout
    assert few.splitlines()[0].split()[-2:] == ["id", "offset"]
    assert "more than these 2" in few
    assert "more than" not in tally("events", 1, "--metric", "seconds", "--limit", 4).stdout
    assert "no events" in tally("events", 77).stdout


def test_alerts(tally, usage_file):
    """Crossings are listed with their threshold, period and total."""
    found = document(tally("alerts", 1, "--metric", "seconds", "--scaled", "--json"))
    january = [alert for alert in found if alert["period"]["start"] == "2026-01-01T00:00:00Z"]
    assert sorted(
        (alert["threshold"], alert["value_at_cross"], alert["last_multiple"]) for alert in january
    ) == [
        ("each", "1.5", 1),
        ("each", "3.75", 3),
        ("three", "3.75", 1),
    ]
    assert len({alert["id"] for alert in found}) == len(found)
    shown = tally("alerts", "--metric", "seconds", "--scaled").stdout
    assert "each (3, every 1)" in shown
    assert "more than these 1" in tally("alerts", "--metric", "seconds", "--limit", 1).stdout
    assert "no alerts" in tally("alerts", 77).stdout


def test_ingest_writes_rejected_rows(tally, tmp_path):
    """Rows that can't be stored go to a file with line and reason; the others are stored; the status is 1."""
    tally("metrics", "create", "calls")
    path = tmp_path / "calls.jsonl"
    path.write_text(
        '{"id": "a", "account_id": 5, "metric": "calls", "at": 1767225600}\n'
        '{"id": "b", "account_id": 5, "metric": "no_such", "at": 1767225600}\n'
        '{"id": "c", "account_id": "x", "metric": "calls", "at": 1767225600}\n'
        '{"id": "a", "account_id": 5, "metric": "calls", "at": 1767225601}\n'
        '{"id": "d", "account_id": 5, "metric": "calls", "at": 99999999999}\n'
    )
    mapping = ("--metric-column", "metric", "--id", "id", "--time", "at")
    result = tally("ingest", path, *mapping, status=1)
    assert "line 2: no metric has this code (no_such)" in result.stdout
    lines = (tmp_path / "calls.rejects.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["rejected_line", "2", "3", "4", "5"]
    assert "other content" in lines[3]
    assert "--time-unit" in lines[4]
    counts = document(tally("ingest", path, *mapping, "--json", "--rejects", tmp_path / "r.csv", status=1))
    assert (counts["stored"], counts["duplicates"], counts["rejected"]) == (0, 1, 4)
    assert document(tally("usage", 5, "calls", "--period", "all", "--json"))["total"] == 1


def test_a_corrected_rejects_file_counts_nothing_twice(tally, tmp_path):
    """Rejected and conflicting rows, one corrected: only that one is new; the file is gone once nothing is rejected."""
    tally("metrics", "create", "again", "--agg", "sum", "-d", "region")
    path = tmp_path / "usage.csv"
    path.write_text("account_id,n,at,region\n6,1.5,1767225600,eu\n6,x,1767225600,eu\n6,2,99999999999,eu\n")
    mapping = ("--metric", "again", "--value", "n", "--time", "at", "--scaled", "--json")
    first = document(tally("ingest", path, *mapping, status=1))
    assert (first["stored"], first["rejected"]) == (1, 2)
    # The same rows under another mapping are other events of the same ids.
    second = document(tally("ingest", path, *mapping, "-p", "region", status=1))
    assert (second["stored"], second["rejected"]) == (0, 3)
    rejects = tmp_path / "usage.rejects.csv"
    assert second["rejects_file"] == str(rejects)
    rejects.write_text(rejects.read_text().replace(",6,x,", ",6,4,"))
    third = document(tally("ingest", rejects, *mapping, status=1))
    assert (third["stored"], third["duplicates"], third["rejected"]) == (1, 1, 1)
    assert document(tally("usage", 6, "again", "--period", "all", "--json"))["total"] == 5_500_000
    path.write_text("account_id,n,at,region\n6,1.5,1767225600,eu\n6,4,1767225600,eu\n")
    last = document(tally("ingest", path, *mapping[:-2], "--scale", "--json"))
    assert (last["stored"], last["duplicates"]) == (0, 2)
    assert not rejects.exists()
    assert "usage.rejects.csv for usage.csv" in " ".join(tally("ingest", "--help").stdout.split())


def test_a_rejects_file_loads_with_another_delimiter_given(tally, tmp_path):
    """It has commas whatever the first file had, and the same options do."""
    tally("metrics", "create", "semicolons", "--agg", "sum")
    path = tmp_path / "usage.csv"
    path.write_text("account_id;n\n6;1\n6;x\n")
    mapping = ("--metric", "semicolons", "--value", "n", "--delimiter", ";", "--json")
    tally("ingest", path, *mapping, status=1)
    rejects = tmp_path / "usage.rejects.csv"
    rejects.write_text(rejects.read_text().replace(",6,x", ",6,2"))
    assert document(tally("ingest", rejects, *mapping))["stored"] == 1
    path.write_text("account_id;n\n6;1\n6;2\n")
    assert document(tally("ingest", path, *mapping))["duplicates"] == 2


def test_a_corrected_rejects_file_of_json_rows(tally, tmp_path):
    """The file is CSV with the objects in a column, and is loaded with the options of the JSON file."""
    tally("metrics", "create", "json_again", "--agg", "sum")
    path = tmp_path / "usage.jsonl"
    path.write_text(
        '{"account_id": 6, "n": 1, "name": "a, \\"b\\""}\n{"account_id": 6, "n": "x"}\n{"account_id": 6, "n": "y"}\n'
    )
    mapping = ("--metric", "json_again", "--value", "n", "--json")
    assert document(tally("ingest", path, *mapping, status=1))["rejected"] == 2
    rejects = tmp_path / "usage.rejects.csv"
    rejects.write_text(rejects.read_text().replace('""x""', "4"))
    found = document(tally("ingest", rejects, *mapping, status=1))
    assert (found["stored"], found["duplicates"], found["rejected"]) == (1, 0, 1)
    nested = (tmp_path / "usage.rejects.rejects.csv").read_text().splitlines()
    assert nested[0] == "rejected_line,rejected_reason,row"
    assert nested[1].startswith("3,")
    assert "rejected" not in nested[1]
    path.write_text(
        '{"account_id": 6, "n": 1, "name": "a, \\"b\\""}\n{"account_id": 6, "n": 4}\n{"account_id": 6, "n": 5}\n'
    )
    last = document(tally("ingest", path, *mapping))
    assert (last["stored"], last["duplicates"]) == (1, 2)
    assert document(tally("usage", 6, "json_again", "--json"))["total"] == 10


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("missing.csv", "--metric", "seconds"), "can't read"),
        (("FILE",), "--metric"),
        (("FILE", "--metric", "a", "--metric-column", "b"), "--metric"),
        (("FILE", "--metric", "seconds", "--account", "acount"), "did you mean 'account'?"),
        (("FILE", "--metric", "seconds", "--account", "account"), "--value"),
        (("FILE", "--metric", "requests", "--account", "account", "--scale"), "--scale"),
        (("FILE", "--metric", "seconds", "--time-unit", "s"), "--time"),
        (("FILE", "--metric", "seconds", "--delimiter", "ab"), "one character"),
        (("FILE", "--metric", "seconds", "-p", "x", "-p", "x=y"), "given twice"),
        (("FILE", "--metric", "seconds", "--rejects", "FILE"), "itself"),
    ],
)
def test_bad_ingest_commands(tally, usage_file, arguments, words):
    """A wrong mapping is told before anything is stored."""
    tally("metrics", "create", "requests", "--dimension", "region")
    given = [str(usage_file) if argument == "FILE" else argument for argument in arguments]
    assert words in tally("ingest", *given, status=2).stderr


def test_ingest_asks_for_the_format(tally, usage_file, tmp_path):
    """A name that doesn't tell the format needs --format."""
    path = tmp_path / "usage.dat"
    path.write_text(USAGE)
    assert "--format" in tally("ingest", path, *MAPPING, status=2).stderr
    assert "stored before  5" in tally("ingest", path, *MAPPING, "--format", "csv").stdout


def test_help_loads_no_kernel():
    """Help and client commands start without numba, numpy or the server's packages."""
    code = (
        "import sys; sys.argv = ['tallymark', '--help']\n"
        "from tallymark_node.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "import tallymark_node.cli.usage, tallymark_node.ingest_file, tallymark\n"
        "assert not {'numba', 'numpy', 'tallymark_store', 'tallymark_ingest'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_demo_of_a_small_repository(tmp_path):
    """The demo meters a repository, shows its tables, and ends with status 0 without a terminal."""
    environment = {**os.environ, **ENVIRONMENT}
    repository = tmp_path / "repository"
    (repository / "src").mkdir(parents=True)

    def git(*arguments):
        subprocess.run(
            ["git", "-C", str(repository), *arguments], env=environment, check=True, capture_output=True
        )

    git("init", "-q")
    for number in range(3):
        (repository / "src" / "code.py").write_text("x\n" * (number + 1) * 10)
        (repository / f"note{number}.md").write_text("y\n")
        git("add", ".")
        git("commit", "-q", "-m", str(number), "--date", f"2026-0{number + 1}-10T00:00:00Z")
    shown = subprocess.run(
        [sys.executable, "-m", "tallymark_node.main", "demo", "--git", str(repository)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "6 changes by 1 author as 30 events (five metrics each), stored in" in shown
    assert "the account's total equals a recount of the history" in shown
    assert "Ada: the last 3 months with changes" in shown
    assert "first_10_lines (10)" in shown
    assert "(root)" in shown
    assert "--server" not in shown
    assert "run `tallymark demo` in a terminal, or `tallymark dev`" in shown


def test_demo_without_a_repository(tmp_path):
    """A folder that is in no repository is named."""
    result = subprocess.run(
        [sys.executable, "-m", "tallymark_node.main", "demo", "--git", str(tmp_path)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert f"{tmp_path} is not in a git repository" in result.stderr


def test_dev_says_ready_and_stops_on_sigterm(tmp_path):
    """One line says that it serves; a second server on its port says why it can't; SIGTERM ends it with status 0."""
    command = [sys.executable, "-m", "tallymark_node.main", "dev", "--data-dir"]
    with subprocess.Popen(
        [*command, str(tmp_path / "one"), "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as first:
        try:
            line = first.stdout.readline()
            words = line.split()
            assert words[0] == "ready"
            address = words[1].removeprefix("gateway=")
            second = subprocess.run(
                [*command, str(tmp_path / "two"), "--port", address.rpartition(":")[2]],
                capture_output=True,
                text=True,
            )
            assert second.returncode == 1
            assert f"{address} is in use" in second.stderr
            same = subprocess.run(
                [*command, str(tmp_path / "one"), "--port", "0"], capture_output=True, text=True
            )
            assert same.returncode == 1, same.stderr
            assert str(tmp_path / "one") in same.stderr
        finally:
            first.send_signal(signal.SIGTERM)
            rest, errors = first.communicate()
    assert first.returncode == 0, errors
    assert rest == ""


def test_bench_help_names_the_command():
    """Its usage line is what one types."""
    shown = subprocess.run(
        [sys.executable, "-m", "tallymark_node.main", "bench", "--help"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert shown.startswith("Usage: tallymark bench ")


def test_a_first_start_says_that_it_compiles(tmp_path, monkeypatch, capsys):
    """Said at once where no compiled kernel of these sources is kept, and not where one is."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    (tmp_path / ".writable").touch()
    serve._compile("query")
    assert capsys.readouterr().err == serve.PREPARE_NOTICE + "\n"
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "kernel.nbi").touch()
    serve._compile("query")
    assert capsys.readouterr().err == ""


def test_bad_settings(tmp_path):
    """A wrong setting is named."""
    path = tmp_path / "node.toml"
    path.write_text("prot = 7001\n")
    result = CliRunner().invoke(cli, ["run", "--role", "store", "--config", str(path)])
    assert result.exit_code == 2
    assert "unknown setting 'prot'" in result.stderr
