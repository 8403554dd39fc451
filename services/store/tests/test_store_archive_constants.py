"""Merging files whose columns say the same in every row: in all files, in some, or each file something else."""

from __future__ import annotations

from typing import Any

import pyarrow.parquet as pq
import pytest

from tallymark_protocol.identifiers import encode_event_id
from tallymark_protocol.model import AggType, UniqueType
from tallymark_runtime.disk import MemoryDisk
from tallymark_store.archive import writer
from tallymark_store.archive.merge import merge

from .archive_helpers import APPEND, Log, events_of, table_of

_ROWS = 30


def _plain(account: int, number: int) -> dict[str, Any]:
    return {"account": account, "code": "a", "value": 1}


def _valued(account: int, number: int) -> dict[str, Any]:
    return {"account": account, "code": "a", "value": number, "time": APPEND + number % 3}


def _same_time(account: int, number: int) -> dict[str, Any]:
    return {"account": account, "code": "a", "value": 7, "time": APPEND + 5}


def _identified(account: int, number: int) -> dict[str, Any]:
    return {"account": account, "code": "a", "value": 1, "id": encode_event_id(f"id-{number}")}


def _some_identified(account: int, number: int) -> dict[str, Any]:
    event = _plain(account, number)
    return event | {"id": encode_event_id(number)} if number % 4 == 0 else event


def _dimensioned(account: int, number: int) -> dict[str, Any]:
    return {"account": account, "code": "a", "value": 1, "properties": {"p": "x", "z": "y"}}


def _text(account: int, number: int) -> dict[str, Any]:
    return {"account": account, "code": "s", "value": b"\x01u%d" % (number % 5), "op": 1}


def _mixed(account: int, number: int) -> dict[str, Any]:
    return (_plain, _text, _identified, _dimensioned, _valued)[number % 5](account, number)


@pytest.mark.parametrize("group_rows", [7, _ROWS, 4 * _ROWS])
@pytest.mark.parametrize(
    "kinds",
    [
        (_plain, _plain, _plain),
        (_plain, _identified, _plain),
        (_plain, _some_identified, _dimensioned),
        (_same_time, _same_time),
        (_same_time, _valued, _plain),
        (_text, _text),
        (_text, _plain, _text),
        (_dimensioned, _dimensioned),
        (_mixed, _plain, _text, _mixed),
    ],
)
def test_what_is_constant_in_some_files_is_merged_as_it_is(kinds: tuple[Any, ...], group_rows: int) -> None:
    """Row by row what was archived, in row groups of any size; and again when the merged file is merged."""
    log = Log()
    log.metric(5, "a", agg_type=AggType.SUM)
    log.metric(6, "s", agg_type=AggType.COUNT_UNIQUE, unique_type=UniqueType.STRING)
    disk = MemoryDisk()
    files = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "ROW_GROUP_ROWS", group_rows)
        patch.setattr("tallymark_store.archive.merge.ROW_GROUP_ROWS", group_rows)
        at = 0
        for number, kind in enumerate(kinds):
            log.batch([kind(row * 7 % 11, number * _ROWS + row) for row in range(_ROWS)])
            files += log.archived(disk, at)
            at = log.end
        merge(disk, files, "m", {})
        wanted = sorted(log.rows, key=lambda row: row["offset"])
        assert events_of(table_of(disk, "m")) == wanted
        # What merges rely on: a column that says nothing is told to do so, in each row group.
        footer: pq.FileMetaData = writer.open_file(disk, "m").metadata
        places = {footer.schema.column(at).path: at for at in range(footer.num_columns)}
        table = table_of(disk, "m")
        at = 0
        for number in range(footer.num_row_groups):
            group = footer.row_group(number)
            part = table.slice(at, group.num_rows)
            at += group.num_rows
            for name in ("id_kind", "value_kind", "value"):
                told = group.column(places[name]).statistics
                assert told.null_count == part.column(name).null_count
            for name, kind_name in (("id", "id_kind"), ("value_text", "value_kind")):
                assert part.column(name).is_null().equals(part.column(kind_name).is_null())
