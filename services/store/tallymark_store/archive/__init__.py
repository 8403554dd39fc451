"""The archive: a partition's committed, accepted events as sorted Parquet files, beside its log.

    kernels    events of many records to columns, ids and properties to text, and their order
    names      what metric codes mean at which offset
    columns    a slice of the log to a sorted Arrow table; the layout of the files
    writer     a table to a file, and back
    manifest   which files there are; switched atomically
    policy     which of them are merged
    merge      several sorted files to one, in bounded memory
    cut        a part of a file, as a file of its own
    retention  files without the events whose time is over
    incoming   an archive on its way in, with a snapshot
    home       final files elsewhere, and fetched again
    reading    what queries read
    archiver   when all this happens, and to which partition

docs/archive.md is what others read. `pyarrow` takes half a second to import, so nothing of a store without an archive
imports any of these but `kernels`.
"""
