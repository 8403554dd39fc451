"""The fold: from committed, accepted events to totals, one partition at a time.

    arena, index    memory: growable arrays, and the hash index that lies beside the dense ones
    schemas         what each metric is, as arrays for kernels: aggregation, periods, thresholds
    dimensions      property sets as numbered combinations of dimension values
    cells           period cells and day cells: the running statistics
    uniques         the sets of COUNT_UNIQUE metrics
    thresholds      crossings and their alert records
    kernel          the one pass over a payload that updates all of these
    reads, digest   kernels for queries, and for comparing replicas
    fold            `Fold`, which owns the state and is all that other modules use

State is a pure function of the log: nothing here knows the clock, the network or the disk.
"""

from tallymark_store.fold.fold import AlertChoice, DayRow, DayRows, Fold, TopAccounts
from tallymark_store.fold.schemas import SchemaArrays, SchemaTable, day_bounds, period_bounds
from tallymark_store.fold.warmup import warm_up

__all__ = [
    "AlertChoice",
    "DayRow",
    "DayRows",
    "Fold",
    "SchemaArrays",
    "SchemaTable",
    "TopAccounts",
    "day_bounds",
    "period_bounds",
    "warm_up",
]
