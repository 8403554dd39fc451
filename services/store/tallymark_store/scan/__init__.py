"""Scans over the raw events of a partition's log: what queries need beyond the cells.

    source     which records there are, their bytes, and whether they are what was written
    metric     what a scan has to know of a metric, and the groups it finds
    plan       how a bucket parts into period cell, day cells and raw events
    kernels    selecting and adding up, over many records at once
    totals     `TotalsScan`: sums by interval, group and account
    ranking    the accounts with the highest sums
    events     `EventsScan`: pages of raw events

`reads` is what the rest of the store uses.
"""
