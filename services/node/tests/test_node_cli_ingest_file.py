"""Files of usage: rows, ids, events, rejected rows, and loading them with failures."""

import asyncio
import csv
import gzip
import io
from types import SimpleNamespace

import pytest

from tallymark import AggType, InvalidRequestError, MetricSchema, OperationType, UniqueType
from tallymark.failures import ingest_error
from tallymark_node.ingest_file import (
    LINE_BYTES_MAX,
    Columns,
    Converter,
    CsvReader,
    JsonReader,
    Rejects,
    RowError,
    RowIds,
    Tally,
    load,
    open_stream,
    reason_text,
)
from tallymark_protocol.errors import Reason, UnavailableError, sentence

SUM = MetricSchema(code="m", agg_type=AggType.SUM)


def stream(data):
    """Bytes or text as a file."""
    return io.BufferedReader(io.BytesIO(data if isinstance(data, bytes) else data.encode()))


def convert(reader, columns, *schemas):
    """Every row's event, or the reason why there is none."""
    converter = Converter(columns, {schema.code: schema for schema in schemas}, RowIds(columns.source))
    found = []
    for row in reader:
        try:
            found.append(converter.event(row))
        except RowError as error:
            found.append(str(error))
    return found


def from_csv(text, schema=SUM, **columns):
    """Events of a CSV text with the columns a (account) and v (value)."""
    chosen = Columns(**{"account": "a", "value": "v", "metric": "m", **columns})
    return convert(CsvReader(stream(text), chosen), chosen, schema)


def from_json(text, schema=SUM, **columns):
    """Events of JSON lines with the members a (account) and v (value)."""
    chosen = Columns(**{"account": "a", "value": "v", "metric": "m", **columns})
    return convert(JsonReader(stream(text), chosen), chosen, schema)


def test_csv_columns_are_mapped():
    """Every column lands where the mapping says, whatever else the file holds."""
    (event,) = from_csv(
        "x,a,v,t,i,op,region,code\n0,42,5,1700000000,job-1,remove,eu,other\n",
        metric=None,
        metric_column="code",
        time="t",
        id="i",
        operation="op",
        properties=(("region", "region"), ("copy", "x")),
    )
    assert event.account_id == 42
    assert event.metric_code == "other"
    assert event.value == 5
    assert event.timestamp == 1_700_000_000 * 10**9
    assert event.id == "job-1"
    assert event.operation_type is OperationType.REMOVE
    assert event.properties == {"region": "eu", "copy": "0"}


def test_csv_quoting_line_ends_and_bom():
    """Quoted fields, CRLF, blank lines, a byte order mark and a missing last line end are all fine."""
    events = from_csv('\ufeffa,v,p\r\n1,2,"x, ""y""\nz"\r\n\r\n3,4,', properties=(("p", "p"),))
    assert [(event.account_id, event.value) for event in events] == [(1, 2), (3, 4)]
    assert events[0].properties == {"p": 'x, "y"\nz'}
    assert events[1].properties == {}


def test_csv_lines_are_counted_over_quoted_line_ends():
    """A row's line is its first line in the file."""
    columns = Columns(account="a", metric="m")
    rows = list(CsvReader(stream('a,b\n1,"x\ny"\n\n2,z\n'), columns))
    assert [row.line for row in rows] == [2, 5]


def test_csv_bad_rows_do_not_stop_the_others():
    """Rows with too few fields, bad quoting or bytes that aren't UTF-8 are refused one by one."""
    data = b'a,v\n1\n2,3,4\n5,6\n"7"x,8\n\xff,9\n10,11\n'
    found = from_csv(data)
    assert "1 fields" in found[0]
    assert "3 fields" in found[1]
    assert found[2].account_id == 5
    assert "not a row of CSV" in found[3]
    assert "UTF-8" in found[4]
    assert found[5].account_id == 10


def test_csv_header_problems():
    """A missing or doubled column, or no header, is told before anything is read."""
    for text, words in (
        ("acount,v\n", "no column 'a'"),
        ("a,a,v\n", "2 columns named 'a'"),
        ("", "empty"),
        ("\n", "empty"),
    ):
        with pytest.raises(InvalidRequestError, match=words):
            from_csv(text)
    with pytest.raises(InvalidRequestError, match="did you mean 'account'"):
        from_csv("account,v\n", account="acount")


def test_unreadable_files():
    """Lines without end, UTF-16 and cut off gzip files stop the load with the line."""
    with pytest.raises(InvalidRequestError, match="line 2 is longer"):
        from_csv("a,v\n" + "x" * (LINE_BYTES_MAX + 1))
    with pytest.raises(InvalidRequestError, match="UTF-16"):
        from_csv("a,v\n".encode("utf-16"))
    packed = gzip.compress(b"a,v\n" + b"".join(b"%d,%d\n" % (n, n * n) for n in range(50_000)))
    columns = Columns(account="a", value="v", metric="m")
    with pytest.raises(InvalidRequestError, match="can't be read on"):
        convert(CsvReader(open_stream(stream(packed[: len(packed) // 2])), columns), columns, SUM)


def test_gzip_is_recognised():
    """A gzipped file is read whatever its name."""
    columns = Columns(account="a", value="v", metric="m")
    packed = stream(gzip.compress(b"a,v\n1,2\n"))
    (event,) = convert(CsvReader(open_stream(packed), columns), columns, SUM)
    assert (event.account_id, event.value) == (1, 2)


def test_json_lines():
    """Members, paths into nested objects, numbers and booleans as properties, nulls as missing ones."""
    text = (
        '{"a": 18446744073709551615, "v": 7, "id": 12, "who": {"region": "eu", "n": 3}, "ok": true, "no": null}\n'
        "\n"
        '{"a": "5", "v": "8", "id": "x", "who.region": "flat"}\n'
    )
    properties = (("region", "who.region"), ("n", "who.n"), ("ok", "ok"), ("no", "no"))
    first, second = from_json(text, id="id", properties=properties)
    assert (first.account_id, first.value, first.id) == (2**64 - 1, 7, 12)
    assert first.properties == {"region": "eu", "n": "3", "ok": "true"}
    assert (second.account_id, second.value, second.id) == (5, 8, "x")
    assert second.properties == {"region": "flat"}


def test_json_bad_rows():
    """What is no object, or holds the wrong kind of thing, is refused with its reason."""
    lines = [
        "[1]",
        "{",
        '{"v": 1}',
        '{"a": 1.5, "v": 1}',
        '{"a": true, "v": 1}',
        '{"a": -1, "v": 1}',
        '{"a": 1, "v": 1.5}',
        '{"a": 1, "v": [1]}',
        '{"a": 1, "v": 1, "p": {"x": 1}}',
    ]
    found = from_json("\n".join(lines), properties=(("p", "p"),))
    assert [type(item) for item in found] == [str] * len(lines)
    assert "a is empty" in found[2]
    assert "--scale" in found[6]
    assert "property p" in found[8]


def test_scaled_values_are_exact():
    """Decimals keep every digit, from text and from JSON numbers; what six places can't hold is refused."""
    events = from_csv("a,v\n1,0.1\n2,9223372036854.775807\n", scaled=True)
    assert [event.value for event in events] == [100_000, 9_223_372_036_854_775_807]
    refused = from_csv("a,v\n3,0.0000001\n4,abc\n", scaled=True)
    assert "decimals" in refused[0]
    assert "no decimal number" in refused[1]
    (event,) = from_json('{"a": 1, "v": 9007199254740.993111}', scaled=True)
    assert event.value == 9_007_199_254_740_993_111


def test_values_by_metric():
    """COUNT ignores the value, unique strings stay text, unique numbers are never scaled."""
    count = MetricSchema(code="m", agg_type=AggType.COUNT)
    text = MetricSchema(code="m", agg_type=AggType.COUNT_UNIQUE, unique_type=UniqueType.STRING)
    unique = MetricSchema(code="m", agg_type=AggType.COUNT_UNIQUE)
    assert from_csv("a,v\n1,whatever\n2,\n", count)[1].value == 1
    assert from_csv("a,v\n1,007\n", text)[0].value == "007"
    assert from_csv("a,v\n1,18446744073709551615\n", unique, scaled=True)[0].value == 2**64 - 1
    assert from_csv("a,v\n1,\n") == ["v is empty"]
    assert from_csv("a,v\n1,2\n", value=None)[0].value == 1


@pytest.mark.parametrize(
    ("text", "unit", "time_ns"),
    [
        ("1700000000", None, 1_700_000_000 * 10**9),
        ("1700000000.000000001", None, 1_700_000_000 * 10**9 + 1),
        ("1700000000123", "ms", 1_700_000_000_123 * 10**6),
        ("1.5", "us", 1_500),
        ("7", "ns", 7),
        ("2026-01-31", None, 1_769_817_600 * 10**9),
        ("2026-01-31T01:00:00+01:00", "iso", 1_769_817_600 * 10**9),
    ],
)
def test_times(text, unit, time_ns):
    """Numbers are read in their unit, exactly; text as ISO 8601."""
    (event,) = from_csv(f"a,v,t\n1,2,{text}\n", time="t", time_unit=unit)
    assert event.timestamp == time_ns


@pytest.mark.parametrize(
    ("text", "unit", "words"),
    [
        ("", None, "t is empty"),
        ("1700000000000", None, "--time-unit"),
        ("-1", None, "outside 1970"),
        ("1.5", "ns", "finer"),
        ("soon", None, "'soon' is no date"),
        ("2026-01-31", "ms", "no number of ms"),
        ("1700000000", "iso", "no date"),
    ],
)
def test_bad_times(text, unit, words):
    """A bad time never turns into the time of loading."""
    (reason,) = from_csv(f"a,v,t\n1,2,{text}\n", time="t", time_unit=unit)
    assert words in reason


def test_an_empty_id_is_refused():
    """With an id column, a row without an id isn't stored without one: running again would count it twice."""
    assert from_csv("a,v,i\n1,2,\n", id="i") == ["i is empty"]


def test_derived_ids_tell_identical_rows_apart():
    """The second of two identical rows has another id; so a re-run gives the same ids, and a longer file more."""
    rows = "1,2\n1,2\n3,4\n"
    first = [event.id for event in from_csv("a,v\n" + rows)]
    assert len(set(first)) == 3
    assert first[0].split(":")[0] == first[1].split(":")[0]
    assert [event.id for event in from_csv("a,v\n" + rows)] == first
    grown = [event.id for event in from_csv("a,v\n9,9\n" + rows + "1,2\n")]
    assert set(first) < set(grown)
    assert len(set(grown)) == 5


def test_derived_ids_do_not_depend_on_form():
    """Quoting and line ends don't make another row; the place of a comma does."""
    plain = [event.id for event in from_csv("a,v,p\n1,2,x\n")]
    assert [event.id for event in from_csv('a,v,p\r\n"1","2","x"\r\n')] == plain
    assert from_csv('a,v,p\n1,2,"x,"\n')[0].id != from_csv('a,v,p\n1,"2","x"\n')[0].id


def test_a_source_makes_other_ids():
    """The same row under another source is another event."""
    ids = {from_csv("a,v\n1,2\n", source=source)[0].id for source in ("", "monday", "tuesday")}
    assert len(ids) == 3


def test_rejected_rows_count_in_derived_ids():
    """Ids depend on the file alone, not on what becomes of its rows."""
    text = "a,v,p\n1,2,x\nno account,2,x\n1,2,x\n"
    refused_between = from_csv(text)
    assert isinstance(refused_between[1], str)
    assert refused_between[2].id == from_csv("a,v,p\n1,2,x\n1,2,x\n")[1].id


def test_row_ids_beyond_memory():
    """Counting goes on in a file when there are too many distinct rows, with the same result."""
    contents = [b"%d" % (number * 7 % 13) for number in range(200)]
    small, large = RowIds(rows_max=3), RowIds()
    try:
        assert [small.next(content) for content in contents] == [large.next(content) for content in contents]
    finally:
        small.close()
        large.close()


def test_rejects_file(tmp_path):
    """Rejected rows are a CSV file with line, reason and the row; there is none without a rejected row."""
    path = tmp_path / "rejects.csv"
    rejects = Rejects(str(path), ["a", "v"])
    assert not path.exists()
    columns = Columns(account="a", value="v", metric="m")
    for row in CsvReader(stream('a,v\n1,"x\ny"\n'), columns):
        rejects.add(row, "because, so")
    rejects.close()
    with path.open(newline="") as file:
        assert list(csv.reader(file)) == [
            ["rejected_line", "rejected_reason", "a", "v"],
            ["2", "because, so", "1", "x\ny"],
        ]
    assert rejects.first == [(2, "because, so")]
    with pytest.raises(InvalidRequestError, match="can't write"):
        Rejects(str(tmp_path / "no" / "x"), ["a"]).add(row, "because")


def test_rejects_columns_are_no_content():
    """A row that comes from a file of rejected rows keeps its id, and is written again without nesting."""
    plain = [event.id for event in from_csv("a,v\n1,2\n1,2\n")]
    added = "rejected_line,rejected_reason,a,v\n7,because,1,2\n9,other,1,2\n"
    assert [event.id for event in from_csv(added)] == plain
    moved = "a,rejected_reason,v,rejected_line\n1,x,2,7\n1,,2,\n"
    assert [event.id for event in from_csv(moved)] == plain
    assert [event.id for event in from_csv("a,v,line,reason\n1,2,7,x\n1,2,9,y\n")] != plain
    columns = Columns(account="a", value="v", metric="m")
    reader = CsvReader(stream(added + "1,short\n1,\xff,3,4\n".replace("\xff", "é")), columns)
    assert reader.header == ["a", "v"]
    assert [list(row.raw) for row in reader] == [["1", "2"], ["1", "2"], [], ["3", "4"]]


def test_a_stale_rejects_file_is_removed(tmp_path):
    """Only a file that begins as ours; anything else of that name stays."""
    path = tmp_path / "r.csv"
    rejects = Rejects(str(path), ["a"])
    rejects.remove_stale()
    for text, stays in (
        ("rejected_line,rejected_reason,a\r\n2,x,1\r\n", False),
        ("rejected_line,rejected_reasons,a\n", True),
        ("a,rejected_line,rejected_reason\n", True),
        ("", True),
    ):
        path.write_text(text)
        rejects.remove_stale()
        assert path.exists() is stays
    Rejects(str(tmp_path), ["a"]).remove_stale()


def test_reasons_lose_the_position_in_the_request():
    """A rejection names the line of the file, not the event's place in a request."""
    assert (
        reason_text(sentence(Reason.UNKNOWN_METRIC, index=3, detail="cpu")) == "no metric has this code (cpu)"
    )


class FakeClient:
    """Stores events by id; fails where it is told to, storing before or instead of answering."""

    def __init__(self, failures=()):
        self.stored = {}
        self.calls = 0
        self.under_way = 0
        self.under_way_max = 0
        self._failures = list(failures)  # per call: None, "lost" (stored, no answer) or "dead"

    async def ingest(self, events):
        self.under_way += 1
        self.under_way_max = max(self.under_way, self.under_way_max)
        await asyncio.sleep(0)
        self.under_way -= 1
        failure = self._failures[self.calls] if self.calls < len(self._failures) else None
        self.calls += 1
        if failure == "dead":
            raise self._error(events, always=True)
        receipt = self._store(events)
        if failure == "lost":
            raise self._error(events, receipt)
        return receipt

    def _error(self, events, receipt=None, *, always=False):
        async def retry(timeout):
            if always:
                raise self._error(events, always=True)
            return receipt

        return ingest_error(UnavailableError("gone"), receipt, retry)

    def _store(self, events):
        stored = duplicates = 0
        rejected, conflicts = [], []
        for index, event in enumerate(events):
            if event.value == 666:
                rejected.append(
                    SimpleNamespace(index=index, message=f"event {index}: no metric has this code")
                )
            elif event.id not in self.stored:
                self.stored[event.id] = event
                stored += 1
            elif self.stored[event.id].value == event.value:
                duplicates += 1
            else:
                conflicts.append(SimpleNamespace(index=index))
        return SimpleNamespace(
            n_stored=stored, n_duplicates=duplicates, rejected=rejected, conflicts=conflicts
        )


async def run_load(client, text, path, *, batch_rows=3, in_flight=2, **columns):
    """Load a CSV text; return the tally and the reasons by line."""
    chosen = Columns(**{"account": "a", "value": "v", "metric": "m", **columns})
    reader = CsvReader(stream(text), chosen)
    rejects = Rejects(str(path), reader.header)
    tally = Tally()
    try:
        await load(
            client,
            reader,
            Converter(chosen, {"m": SUM}, RowIds()),
            rejects,
            tally=tally,
            batch_rows=batch_rows,
            in_flight=in_flight,
        )
    finally:
        rejects.close()
    return tally, rejects


async def test_load_counts_every_row_once(tmp_path):
    """Each row is stored, a duplicate or rejected, in order, with a bounded number of batches in flight."""
    text = "a,v,i\n" + "".join(f"{n},{n},id{n}\n" for n in range(10)) + "x,1,e\n1,666,f\n0,0,id0\n0,5,id0\n"
    client = FakeClient()
    tally, rejects = await run_load(client, text, tmp_path / "r.csv", id="i")
    assert (tally.rows, tally.stored, tally.duplicates, tally.rejected) == (14, 10, 1, 3)
    assert tally.settled == tally.rows
    assert [line for line, _ in rejects.first] == [12, 13, 15]
    assert rejects.first[1][1] == "no metric has this code"
    assert "other content" in rejects.first[2][1]
    assert client.under_way_max <= 2


async def test_load_again_counts_nothing_twice(tmp_path):
    """A second run over the same file, or one that has grown, stores only what is missing."""
    client = FakeClient()
    text = "a,v\n1,2\n1,2\n3,4\n"
    first, _ = await run_load(client, text, tmp_path / "r.csv")
    again, _ = await run_load(client, text, tmp_path / "r.csv", batch_rows=1)
    grown, _ = await run_load(client, text + "1,2\n", tmp_path / "r.csv", batch_rows=100)
    assert (first.stored, first.duplicates) == (3, 0)
    assert (again.stored, again.duplicates) == (0, 3)
    assert (grown.stored, grown.duplicates) == (1, 3)
    assert len(client.stored) == 4


async def test_a_corrected_rejects_file_is_loaded_itself(tmp_path):
    """Of a file of rejected rows, only those that were corrected are new."""
    client = FakeClient()
    path = tmp_path / "r.csv"
    first, _ = await run_load(client, "a,v\n1,2\n3,4\nx,6\ny,8\n", path)
    assert (first.stored, first.rejected) == (2, 2)
    # Rows 1 and 2 come back under their ids with other content: a conflict, whose rows are stored all the same.
    for event_id, event in list(client.stored.items()):
        client.stored[event_id] = SimpleNamespace(value=event.value + 1)
    second, _ = await run_load(client, "a,v\n1,2\n3,4\nx,6\ny,8\n", path)
    assert (second.stored, second.rejected) == (0, 4)
    corrected = path.read_text().replace(",x,6", ",5,6")
    third, _ = await run_load(client, corrected, tmp_path / "r2.csv")
    assert (third.stored, third.duplicates, third.rejected) == (1, 0, 3)
    assert len(client.stored) == 3
    with (tmp_path / "r2.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["rejected_line", "rejected_reason", "a", "v"]
    assert [row[2:] for row in rows[1:]] == [["1", "2"], ["3", "4"], ["y", "8"]]
    fixed, _ = await run_load(client, "a,v\n5,6\n", path)
    assert (fixed.stored, fixed.duplicates) == (0, 1)


async def test_load_retries_under_the_same_identity(tmp_path):
    """An answer that was lost is asked for again, and its rows count once."""
    client = FakeClient(failures=["lost", None])
    tally, _ = await run_load(client, "a,v\n1,2\n3,4\n5,6\n7,8\n", tmp_path / "r.csv")
    assert (tally.stored, tally.duplicates) == (4, 0)
    assert len(client.stored) == 4


async def test_load_gives_up_and_can_be_run_again(tmp_path):
    """When a batch can't be stored, the others are settled first; a later run stores the rest."""
    client = FakeClient(failures=[None, "dead"])
    text = "a,v\n" + "".join(f"{n},{n}\n" for n in range(9))
    with pytest.raises(UnavailableError, match="gone"):
        await run_load(client, text, tmp_path / "r.csv", in_flight=3)
    assert len(client.stored) == 6
    tally, _ = await run_load(client, text, tmp_path / "r.csv")
    assert (tally.stored, tally.duplicates) == (3, 6)
