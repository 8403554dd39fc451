"""Running seeds by hand: `python -m tests.sim.run --start 0 --seeds 1000`; a failing seed's trace is printed."""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import sys
import time

from .simulation import Failure, Options, Result, run_seed


def _work(task: tuple[int, int, Options]) -> tuple[list[Result], tuple[int, str, str] | None]:
    """Run some seeds; the results, and the first failure: seed, message, trace."""
    start, stop, options = task
    logging.disable(logging.CRITICAL)
    sys.unraisablehook = lambda _: None  # of processes that were killed in the middle of something
    results: list[Result] = []
    for seed in range(start, stop):
        try:
            results += [run_seed(seed, options)]
        except Failure as failure:
            return results, (seed, f"{failure}\n{failure.where}", failure.trace)
    return results, None


def main() -> int:
    """Run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=1_000)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--kinds", default=None, help="of faults, comma-separated; drawn where not given")
    parser.add_argument("--destructive", action="store_true")
    parser.add_argument(
        "--recycle", choices=("on", "off"), default=None, help="drop logs; drawn where not given"
    )
    parser.add_argument(
        "--spills",
        choices=("on", "off"),
        default=None,
        help="no memory for ids, cells and alerts; drawn where not given",
    )
    parser.add_argument("--keep-going", action="store_true")
    parser.add_argument("--lines", type=int, default=400, help="of a failing seed's trace")
    args = parser.parse_args()
    kinds = None if args.kinds is None else tuple(kind for kind in args.kinds.split(",") if kind)
    recycle = None if args.recycle is None else args.recycle == "on"
    spills = None if args.spills is None else args.spills == "on"
    options = Options(kinds=kinds, is_destructive=args.destructive, recycle=recycle, spills=spills)
    size = 1 if args.keep_going else 10
    tasks = [
        (start, min(start + size, args.start + args.seeds), options)
        for start in range(args.start, args.start + args.seeds, size)
    ]
    began = time.perf_counter()
    done: list[Result] = []
    failed = 0
    pool = multiprocessing.get_context("fork").Pool(args.workers) if args.workers > 1 else None
    for results, failure in pool.imap(_work, tasks) if pool else map(_work, tasks):
        done += results
        if failure is not None:
            failed += 1
            seed, message, trace = failure
            if args.keep_going:
                print(f"seed {seed}: {message.splitlines()[0]}")
                continue
            print("\n".join(trace.splitlines()[-args.lines :]))
            print(message)
            print(f"again: make sim START={seed} SEEDS=1")
            break
    if pool:
        pool.terminate()
    took = time.perf_counter() - began
    count = max(len(done), 1)
    faults: dict[str, int] = {}
    for result in done:
        for kind, times in result.faults.items():
            faults[kind] = faults.get(kind, 0) + times
    print(
        f"{len(done)} seeds, {failed} failed, {1e3 * took / count:.0f} ms each; "
        f"{sum(r.acknowledged for r in done)} events acknowledged, {sum(r.commits for r in done)} records committed "
        f"in {sum(r.epochs for r in done)} epochs; new writes {sum(r.live_ms for r in done) // count} ms after healing "
        f"({max((r.live_ms for r in done), default=0)} at most)"
    )
    print(
        f"{sum(r.recycled_bytes > 0 for r in done)} seeds dropped {sum(r.recycled_bytes for r in done) // 1024} KiB of log, "
        f"{sum(r.installed > 0 for r in done)} of them installed {sum(r.installed for r in done)} snapshots; "
        f"{sum(r.archived for r in done)} events archived, {sum(r.merges for r in done)} merges, "
        f"{sum(r.dropped for r in done)} dropped; "
        f"{sum(r.spilled > 0 for r in done)} seeds spilled {sum(r.spilled for r in done)} units and alert records"
    )
    print("faults:", ", ".join(f"{kind} {times}" for kind, times in sorted(faults.items())))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
